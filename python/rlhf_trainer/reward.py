"""`rlhf reward`: a scalar head on any backbone, -log sigmoid(r(chosen) - r(rejected) - margin) per pair."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.base import shared
from rlhf_trainer.base.config import option, require
from rlhf_trainer.base.console import say
from rlhf_trainer.base.distributed import distributed_context, on_all_ranks, resolve_device
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.encoding import padding_id
from rlhf_trainer.data.records import Pair
from rlhf_trainer.data.rows import (
    TokenizedExample,
    TokenizedPair,
    closed_by_eos,
    encode_examples,
    encode_pairs,
    left_pad,
)
from rlhf_trainer.data.splits import drawn
from rlhf_trainer.data.stages import read_examples, read_pairs
from rlhf_trainer.models import adapters, precision, quantised
from rlhf_trainer.models.adapters import score_head
from rlhf_trainer.models.checks import check_forward
from rlhf_trainer.models.fingerprint import (
    Fingerprint,
    Part,
    model_part,
    pairs_part,
    rows_part,
    sha256,
    tokenizer_part,
    weights_digest,
)
from rlhf_trainer.models.loading import load_reward_model, load_tokenizer, suppress_transformers_warnings
from rlhf_trainer.models.scoring import NORMALISATION, last_token_scores, score_sequences
from rlhf_trainer.models.sharding import fsdp_forward, prepare_trained_model
from rlhf_trainer.reports.page import curves_figure, embed, metric_curve, write_or_warn, write_page
from rlhf_trainer.training.finish import finish
from rlhf_trainer.training.pair_metrics import (
    calibration_figure,
    heldout_metrics,
    heldout_table,
    length_baseline,
    losses_of,
    pair_metrics,
    summary,
)
from rlhf_trainer.training.rates import with_lr
from rlhf_trainer.training.runlog import read_metrics
from rlhf_trainer.training.supervised import (
    SupervisedConfig,
    TrainingObjective,
    length_limit,
    train_loop,
    validate_options,
)

SUMMARY = "Train a reward model on preference pairs, starting from a language model (usually the SFT model)."
EXAMPLE = "rlhf reward --model runs/sft --data pairs.jsonl --output_dir runs/reward --heldout 312"
REFERENCE_SAMPLES = 2000  # completions at most that the normalisation is taken from

FULL_LR = 5e-5


@dataclass
class RewardConfig(SupervisedConfig):
    """Data: {"prompt", "chosen", "rejected"} a line, optionally "label" and "margin"; HH-RLHF transcripts; chats."""

    heldout: float = shared.heldout_pairs()
    batch_size: int = option(32, "pairs per optimizer step; those of a prompt stay together, so that a step may differ")
    lr: float | None = shared.lr(FULL_LR)
    margin: float = option(0.0, "reward units by which the better answer shall win, added to each pair's own margin")
    reference_data: str | None = option(
        None, "examples whose scores become mean 0 and std 1; none: the answers of the training pairs"
    )


Config = RewardConfig


@dataclass
class RewardResult:
    """What `train_reward` returns: the trained classifier, the last step's metrics, and reward.json's figures."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    metrics: dict[str, float]
    figures: dict[str, Any]
    output_dir: str  # "": nothing was written

    def fingerprint(self) -> Part:
        """Of `score` as the reward of another run."""
        figures = [self.figures["reference_mean"], self.figures["reference_std"]]
        weights = {"weights": weights_digest(self.model), "normalisation": sha256(figures)}
        return tokenizer_part(self.tokenizer) | model_part(self.model) | weights

    def score(self, prompts: list[str], completions: list[str]) -> list[float]:
        """The normalised rewards, as `train_ppo(reward=...)` and `best_of_n(reward=...)` take them."""
        raw = score_sequences(self.model.eval(), self.tokenizer, prompts, completions)
        return ((raw - self.figures["reference_mean"]) / self.figures["reference_std"]).tolist()


def linear_head(model: PreTrainedModel) -> nn.Linear | None:
    """The layer that gives the score: the head of a decoder, the last of an encoder-decoder model's."""
    head = score_head(model)
    last = getattr(head, "out_proj", head)
    return last if isinstance(last, nn.Linear) else None


def init_head(model: PreTrainedModel) -> None:
    """Score head ~ N(0, 1/(d + 1)): scores of order 1 from unit-variance states (Stiennon et al. 2020)."""
    head = linear_head(model)
    assert head is not None
    nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def load_for_training(cfg: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A one-output classifier on cfg.model's backbone; its head is new unless the folder holds a reward model."""
    torch.manual_seed(cfg.seed)
    with suppress_transformers_warnings():
        options = {
            "trust_remote_code": cfg.trust_remote_code,
            **quantised.load_options(cfg.load_in_4bit, resolve_device(cfg.device)),
        }
        model = load_reward_model(cfg.model, tokenizer, num_labels=1, **options)
    check_head(model, cfg.model)
    if not has_head(cfg.model, cfg.trust_remote_code):
        init_head(model)
    return model


def check_head(model: PreTrainedModel, name: str) -> None:
    if linear_head(model) is None:
        raise UserError(
            f"{name}: {type(model).__name__} has no head at the last token; a causal or encoder-decoder backbone "
            "is needed"
        )


def prepare(cfg: RewardConfig, model: PreTrainedModel) -> PreTrainedModel:
    """The model with the adapter that cfg asks for; its head is trained whatever else is."""
    check_head(model, cfg.model or "model")
    adapters.add_adapter(model, cfg.lora, output_dir=cfg.output_dir, task="SEQ_CLS")
    quantised.check_adapter(cfg.load_in_4bit, model)
    head = score_head(model)
    assert head is not None
    head.requires_grad_(True)
    return model


def has_head(path: str, trust_remote_code: bool) -> bool:
    """Whether the folder holds a classifier, so that its head is kept."""
    if adapters.adapter_folder(path) is not None:
        return bool(adapters.read_weights(path)[1])
    architectures = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).architectures or []
    return any(name.endswith("SequenceClassification") for name in architectures)


@fsdp_forward
def score_rows(model: PreTrainedModel, rows: Sequence[TokenizedExample], pad_id: int) -> Tensor:
    """[M] float32: raw reward of each row, read at its last token (EOS)."""
    device = next(model.parameters()).device
    ids, mask = left_pad([row.ids for row in rows], pad_id)
    return last_token_scores(model, ids.to(device), mask.to(device))[:, 0]


def pair_scores(model: PreTrainedModel, pairs: Sequence[TokenizedPair], pad_id: int) -> tuple[Tensor, Tensor]:
    """[M] raw rewards of the chosen and of the rejected answers; an answer of several pairs goes through once."""
    rows = {tuple(row.ids): row for pair in pairs for row in (pair.chosen, pair.rejected)}
    place = {ids: index for index, ids in enumerate(rows)}
    scores = score_rows(model, list(rows.values()), pad_id)
    chosen = torch.tensor([place[tuple(pair.chosen.ids)] for pair in pairs], device=scores.device)
    rejected = torch.tensor([place[tuple(pair.rejected.ids)] for pair in pairs], device=scores.device)
    return scores[chosen], scores[rejected]


def pair_losses(model: PreTrainedModel, pairs: Sequence[TokenizedPair], pad_id: int, margin: float) -> Tensor:
    """[M] loss of each pair."""
    chosen, rejected = pair_scores(model, pairs, pad_id)
    return losses_of(chosen, rejected, [item.pair for item in pairs], margin)


def margins_and_accuracies(differences: Tensor, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
    """Of every decided pair: the reward of the preferred answer over the other's, and 1 if that is more than 0."""
    signed = [
        d if pair.label > 0.5 else -d for d, pair in zip(differences.tolist(), pairs, strict=True) if pair.label != 0.5
    ]
    return [(margin, 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0) for margin in signed]


@torch.no_grad()
def all_scores(model: PreTrainedModel, rows: Sequence[TokenizedExample], pad_id: int, batch_size: int) -> Tensor:
    """[M] raw rewards of any number of rows, on the CPU."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    ranks, scores = distributed_context(), torch.zeros(len(rows))
    for (start,), weight in ranks.shard_microbatches(range(0, len(order), batch_size), 1):
        part = order[start : start + batch_size]
        found = score_rows(model, [rows[i] for i in part], pad_id).cpu()
        if weight:
            scores[part] = found
    ranks.sum_(scores)
    return scores


def reference_rows(
    cfg: RewardConfig,
    tokenizer: PreTrainedTokenizerBase,
    training: Sequence[TokenizedPair],
    limit: int,
    closing: dict[str, Any],
) -> list[TokenizedExample]:
    """The samples whose scores are brought to mean 0 and std 1."""
    if not cfg.reference_data:
        pairs = drawn(training, REFERENCE_SAMPLES // 2, cfg.seed)
        return [row for pair in pairs for row in (pair.chosen, pair.rejected)]
    examples, findings = read_examples(cfg.reference_data, tokenizer, cfg.strict, cfg.ignore_fields)
    rows = encode_examples(tokenizer, drawn(examples, REFERENCE_SAMPLES, cfg.seed), limit, findings, **closing)
    say(findings.summary(len(rows), "reference samples"))
    return rows


def prompt_group(item: TokenizedPair) -> Hashable:
    """Pairs of one prompt are learned from in one step; where the prompt is empty each is on its own."""
    return item.pair.prompt or (item.pair.chosen, item.pair.rejected)


def fit_pairs(
    cfg: RewardConfig,
    model: PreTrainedModel,
    rows: Sequence[TokenizedPair],
    heldout: Sequence[TokenizedPair],
    pad_id: int,
    others: Callable[[], Fingerprint] = dict,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Train `model` in place on rows of tokens; returns the last metrics and the held-out figures.

    others: fingerprints of what the run depends on besides.
    """
    longest: dict[Hashable, int] = {}  # of a prompt's answers: its pairs go through the model together
    for item in rows:
        length = max(len(item.chosen.ids), len(item.rejected.ids))
        longest[prompt_group(item)] = max(length, longest.get(prompt_group(item), 0))
    seen: list[tuple[float, float]] = []  # margin and accuracy of each pair of the step

    def losses(batch: list[TokenizedPair]) -> Tensor:
        chosen, rejected = pair_scores(model, batch, pad_id)
        pairs = [item.pair for item in batch]
        seen.extend(margins_and_accuracies((chosen - rejected).detach(), pairs))
        return losses_of(chosen, rejected, pairs, cfg.margin)

    def observe() -> dict[str, float]:
        everyone = [pair for part in distributed_context().all_gather_object(seen) for pair in part]
        seen.clear()
        if not everyone:  # all of them ties
            return {}
        margin, accuracy = (sum(column) / len(everyone) for column in zip(*everyone, strict=True))
        return {"margin": margin, "accuracy": accuracy}

    def figures() -> dict[str, Any]:
        chosen = all_scores(model, [p.chosen for p in heldout], pad_id, cfg.batch_size)
        rejected = all_scores(model, [p.rejected for p in heldout], pad_id, cfg.batch_size)
        return pair_metrics(chosen, rejected, [p.pair for p in heldout], cfg.margin)

    def evaluate() -> dict[str, float]:
        names = ("loss", "accuracy", "margin", "calibration_error")
        return heldout_metrics(figures(), *names) if heldout else {}

    task = TrainingObjective(
        losses=losses,
        units=lambda item: 1,
        length=lambda item: longest[prompt_group(item)],
        line=lambda item: item.pair.line,
        text=lambda item: f"{item.pair.prompt}{item.pair.chosen} | {item.pair.rejected}",
        evaluate=evaluate,
        fingerprint=lambda: {"data": pairs_part(rows), "heldout_data": pairs_part(heldout), **others()},
        observe=observe,
        discard=seen.clear,
        group=prompt_group,
    )
    metrics = train_loop(cfg, "reward", model, rows, task)
    with precision.autocast(cfg.dtype, next(model.parameters()).device):
        return metrics, figures() if heldout else {}


@on_all_ranks
def train_reward(
    cfg: RewardConfig,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pairs: Sequence[Pair] | None = None,
) -> RewardResult:
    """Train a reward model on preference pairs. What is not passed as an object is loaded from what cfg names.

    Args:
        model, tokenizer: a sequence classifier with one output (trained in place), such as an earlier reward model, and
            its tokenizer.
        pairs: the training pairs; cfg.heldout of them are held out.

    Without cfg.output_dir nothing is written.

    Raises:
        UserError: bad input, one sentence.
    """
    needed = {"model": model, "data": pairs}
    require(cfg, *(name for name, given in needed.items() if given is None))
    validate_options(cfg)
    device = resolve_device(cfg.device)
    if tokenizer is None:
        tokenizer = load_tokenizer(cfg.model, cfg.pad_token, cfg.trust_remote_code)
    split = cfg.load_records(read_pairs, tokenizer, pairs)
    training, heldout, findings, heldout_findings = split.training, split.heldout, split.report, split.heldout_report
    start = prepare(cfg, load_for_training(cfg, tokenizer) if model is None else model)
    restored = cfg.merge or model is not None
    model = prepare_trained_model(start, device, dtype=cfg.dtype, restored=restored)
    limit, pad_id = length_limit(cfg.max_length, model), padding_id(tokenizer)
    closing = closed_by_eos(tokenizer, model)
    rows = encode_pairs(tokenizer, training, limit, findings, **closing)
    heldout_rows = encode_pairs(tokenizer, heldout, limit, heldout_findings, **closing)
    training, heldout = [row.pair for row in rows], [row.pair for row in heldout_rows]
    split.say("pairs", training=len(training), heldout=len(heldout))
    with precision.autocast(cfg.dtype, device):
        check_forward(model, lambda some: score_rows(model, some, pad_id), [pair.chosen for pair in rows])
    samples = reference_rows(cfg, tokenizer, rows, limit, closing)  # read now: a bad file fails before training

    def others() -> Fingerprint:
        return {"tokenizer": tokenizer_part(tokenizer), "reference_data": rows_part(samples)}

    cfg = with_lr(cfg, model, FULL_LR)
    metrics, figures = fit_pairs(cfg, model, rows, heldout_rows, pad_id, others)
    with precision.autocast(cfg.dtype, device):
        reference = all_scores(model, samples, pad_id, cfg.batch_size)
    mean, std = reference.mean().item(), reference.std(correction=0).item()
    if not std > 0:
        raise UserError(
            f"the reward model gives all {len(reference)} reference samples the same score; nothing was saved"
        )
    found: dict[str, Any] = {"train_pairs": len(training), "reference_mean": mean, "reference_std": std}
    if heldout:
        found["heldout"] = figures | {"length_baseline": length_baseline(training, heldout)}
    records = {NORMALISATION: {"mean": mean, "std": std}, "reward.json": found}
    finish(model, tokenizer, output_dir=cfg.output_dir, dtype=cfg.dtype, merge=cfg.merge, records=records)
    if cfg.output_dir and distributed_context().main:
        write_or_warn(lambda: write_report(cfg.output_dir, found), "the report")
    return RewardResult(model, tokenizer, metrics, found, cfg.output_dir)


def write_report(folder: str, found: dict[str, Any]) -> None:
    """report.html: the learning curves and the figures on held-out pairs; calibration.png where there are any."""
    records, heldout = read_metrics(folder), found.get("heldout")
    curves = [
        metric_curve(records, {key: "training", f"heldout/{key}": "held-out"}, title, unit, limits)
        for key, title, unit, limits in (
            ("loss", "loss", "nats", None),
            ("accuracy", "share of pairs ranked right", "", (0, 1)),
            ("margin", "reward of the preferred answer over the other's", "raw reward", None),
        )
    ]
    parts = [f"<p>{found['train_pairs']} training pairs.</p>"]
    if heldout:
        figure = calibration_figure(heldout)
        figure.savefig(Path(folder) / "calibration.png", dpi=130)
        parts += ["<h2>Held-out pairs</h2>", heldout_table(heldout), embed(figure, "calibration")]
    parts.append("<h2>Learning curves</h2>" + embed(curves_figure(curves), "learning curves"))
    write_page(Path(folder) / "report.html", "Reward model", parts)


def run(cfg: RewardConfig) -> dict[str, Any]:
    """Train, save an ordinary classifier folder with its normalisation and reward.json; returns what that holds."""
    require(cfg, "model", "data", "output_dir")
    found = train_reward(cfg).figures
    if "heldout" in found:
        say(summary(found["heldout"]))
    return found
