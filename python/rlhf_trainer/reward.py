"""`rlhf reward`: a scalar head on a causal backbone, -log sigmoid(r(chosen) - r(rejected) - margin) per pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_kernels import pairwise_loss
from rlhf_trainer import adapters
from rlhf_trainer.config import option, require, say
from rlhf_trainer.data import Findings, Pair, read_examples, read_pairs
from rlhf_trainer.errors import UserError
from rlhf_trainer.models import (
    NORMALISATION,
    last_token_scores,
    left_pad,
    load_reward_model,
    load_tokenizer,
    quiet,
    resolve_device,
    save_folder,
)
from rlhf_trainer.supervised import (
    FitConfig,
    Row,
    Task,
    encode_row,
    fit,
    length_limit,
    read_both,
    say_findings,
    validate_options,
)

SUMMARY = "Train a reward model on preference pairs, starting from a causal language model (usually the SFT model)."
EXAMPLE = "rlhf reward --model runs/sft --data pairs.jsonl --output_dir runs/reward --heldout 312"
REFERENCE_SAMPLES = 2000  # completions at most that the normalisation is taken from
BINS = 5  # of the calibration table


@dataclass
class Config(FitConfig):
    """Data: {"prompt", "chosen", "rejected"} a line, optionally "label" and "margin"; HH-RLHF transcripts; chats."""

    heldout: float = option(0.1, "held out of --data: a share below 1, or a number of pairs; 0: nothing")
    lr: float = option(5e-5, "AdamW's peak learning rate")
    margin: float = option(0.0, "reward units by which chosen shall win, added to each pair's own margin")
    reference_data: str | None = option(
        None, "examples whose scores become mean 0 and std 1; none: the answers of the training pairs"
    )


@dataclass(frozen=True)
class PairRows:
    pair: Pair
    chosen: Row
    rejected: Row


def init_head(model: PreTrainedModel) -> None:
    """Score head ~ N(0, 1/(d + 1)): scores of order 1 from unit-variance states (Stiennon et al. 2020)."""
    head = model.score
    nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def load_for_training(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A one-output classifier on cfg.model's backbone; its head is new unless the folder holds a reward model."""
    torch.manual_seed(cfg.seed)
    with quiet():
        model = load_reward_model(cfg.model, tokenizer, trust_remote_code=cfg.trust_remote_code, num_labels=1)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"{cfg.model}: {type(model).__name__} has no linear `score` head; a causal backbone is needed")
    if not has_head(cfg.model, cfg.trust_remote_code):
        init_head(model)
    adapters.add_adapter(model, cfg, "SEQ_CLS")
    model.score.requires_grad_(True)
    return model


def has_head(path: str, trust_remote_code: bool) -> bool:
    """Whether the folder holds a classifier, so that its head is kept."""
    if adapters.config_of(path) is not None:
        return bool(adapters.read_weights(path)[1])
    architectures = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).architectures or []
    return any(name.endswith("SequenceClassification") for name in architectures)


def score_rows(model: PreTrainedModel, rows: Sequence[Row], pad_id: int) -> Tensor:
    """[M] float32: raw reward of each row, read at its last token (EOS)."""
    device = next(model.parameters()).device
    ids, mask = left_pad([row.ids for row in rows], pad_id)
    return last_token_scores(model, ids.to(device), mask.to(device))[:, 0]


def pair_losses(model: PreTrainedModel, pairs: Sequence[PairRows], pad_id: int, margin: float) -> Tensor:
    """[M] loss of each pair; chosen and rejected go through the model together."""
    scores = score_rows(model, [p.chosen for p in pairs] + [p.rejected for p in pairs], pad_id)
    chosen, rejected = scores.split(len(pairs))
    margins = torch.tensor([p.pair.margin + margin for p in pairs], device=scores.device)
    labels = torch.tensor([p.pair.label for p in pairs], device=scores.device)
    return pairwise_loss(chosen, rejected, margin=margins, label=labels, reduction="none")


@torch.no_grad()
def all_scores(model: PreTrainedModel, rows: Sequence[Row], pad_id: int, batch_size: int) -> Tensor:
    """[M] raw rewards of any number of rows, on the CPU."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    scores = torch.empty(len(rows))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        scores[part] = score_rows(model, [rows[i] for i in part], pad_id).cpu()
    return scores


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927); (0, 1) without observations."""
    if count == 0:
        return 0.0, 1.0
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (centre - spread) / (1 + z * z / count)), min(1.0, (centre + spread) / (1 + z * z / count))


def calibration(probabilities: Tensor, right: Tensor) -> tuple[list[dict[str, float]], float]:
    """Bins of stated confidence in [0.5, 1] against the share that was right, and the expected calibration error."""
    bins, error = [], 0.0
    confidence = torch.maximum(probabilities, 1 - probabilities)
    index = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    for i in range(BINS):
        members = index == i
        count = int(members.sum())
        if count:
            stated, seen = confidence[members].mean().item(), right[members].mean().item()
            bins.append({"confidence": stated, "accuracy": seen, "pairs": count})
            error += abs(stated - seen) * count / len(right)
    return bins, error


def judge(chosen: Tensor, rejected: Tensor, pairs: Sequence[Pair], margin: float = 0.0) -> dict[str, Any]:
    """Held-out figures from raw rewards [M]: loss, accuracy with its interval over decided pairs, calibration.

    Equal rewards count as half right. Pairs with label 0.5 (ties) count in the loss alone.
    """
    labels = torch.tensor([pair.label for pair in pairs])
    margins = torch.tensor([pair.margin + margin for pair in pairs])
    decided = labels != 0.5
    difference = (chosen - rejected)[decided]
    better = torch.where(labels[decided] > 0.5, difference, -difference)
    right = (better > 0).float() + 0.5 * (better == 0)
    accuracy = right.mean().item() if len(right) else 0.0
    low, high = wilson_interval(accuracy, len(right))
    bins, error = calibration(difference.sigmoid(), right)
    return {
        "pairs": len(right),
        "loss": pairwise_loss(chosen, rejected, margin=margins, label=labels).item(),
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "calibration_error": error,
        "calibration": bins,
    }


def length_baseline(training: Sequence[Pair], heldout: Sequence[Pair]) -> float:
    """Held-out accuracy of preferring the longer answer, or the shorter, whichever wins in training."""

    def longer_wins(pairs: Sequence[Pair]) -> float:
        signs = [(len(p.chosen) - len(p.rejected)) * (1 if p.label > 0.5 else -1) for p in pairs if p.label != 0.5]
        return sum((sign > 0) + 0.5 * (sign == 0) for sign in signs) / max(len(signs), 1)

    return longer_wins(heldout) if longer_wins(training) >= 0.5 else 1 - longer_wins(heldout)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], limit: int, findings: Findings
) -> list[PairRows]:
    encoded = []
    for pair in pairs:
        chosen, cut = encode_row(tokenizer, pair.prompt, pair.chosen, limit)
        rejected, cut_too = encode_row(tokenizer, pair.prompt, pair.rejected, limit)
        if cut or cut_too:
            findings.note(f"longer than {limit} tokens, cut", pair.line)
        encoded.append(PairRows(pair, chosen, rejected))
    return encoded


def reference_rows(
    cfg: Config, tokenizer: PreTrainedTokenizerBase, training: Sequence[PairRows], limit: int
) -> list[Row]:
    """The samples whose scores are brought to mean 0 and std 1."""
    if cfg.reference_data:
        examples, _ = read_examples(cfg.reference_data, tokenizer, cfg.strict)
        return [encode_row(tokenizer, e.prompt, e.completion, limit)[0] for e in examples[:REFERENCE_SAMPLES]]
    return [row for pair in training[: REFERENCE_SAMPLES // 2] for row in (pair.chosen, pair.rejected)]


def run(cfg: Config) -> dict[str, Any]:
    """Train, save an ordinary classifier folder with its normalisation and reward.json; returns what that holds."""
    require(cfg, "model", "data", "output_dir")
    validate_options(cfg)
    device = resolve_device(cfg.device)
    tokenizer = load_tokenizer(cfg.model, cfg.pad_token, cfg.trust_remote_code)
    pairs, heldout, findings, heldout_findings = read_both(cfg, read_pairs, tokenizer)
    model = load_for_training(cfg, tokenizer).to(device).train()
    limit, pad_id = length_limit(cfg, model), tokenizer.pad_token_id
    rows = encode_pairs(tokenizer, pairs, limit, findings)
    heldout_rows = encode_pairs(tokenizer, heldout, limit, heldout_findings)
    say_findings(cfg, len(pairs), len(heldout), findings, heldout_findings, "pairs")

    def figures() -> dict[str, Any]:
        chosen = all_scores(model, [p.chosen for p in heldout_rows], pad_id, cfg.batch_size)
        rejected = all_scores(model, [p.rejected for p in heldout_rows], pad_id, cfg.batch_size)
        return judge(chosen, rejected, heldout, cfg.margin)

    def evaluate() -> dict[str, float]:
        names = ("loss", "accuracy", "calibration_error")
        return {f"heldout/{name}": value for name, value in figures().items() if name in names} if heldout else {}

    task = Task(
        losses=lambda batch: pair_losses(model, batch, pad_id, cfg.margin),
        units=lambda pair: 1,
        length=lambda pair: max(len(pair.chosen.ids), len(pair.rejected.ids)),
        line=lambda pair: pair.pair.line,
        text=lambda pair: f"{pair.pair.prompt}{pair.pair.chosen} | {pair.pair.rejected}",
        evaluate=evaluate,
    )
    fit(cfg, "reward", model, rows, task)
    reference = all_scores(model.eval(), reference_rows(cfg, tokenizer, rows, limit), pad_id, cfg.batch_size)
    mean, std = reference.mean().item(), reference.std(correction=0).item()
    if not std > 0:
        raise UserError(
            f"the reward model gives all {len(reference)} reference samples the same score; nothing was saved"
        )
    result: dict[str, Any] = {"train_pairs": len(pairs), "reference_mean": mean, "reference_std": std}
    if heldout:
        result["heldout"] = figures() | {"length_baseline": length_baseline(pairs, heldout)}
        say(summary(result["heldout"]))
    records = {NORMALISATION: {"mean": mean, "std": std}, "reward.json": result}
    if cfg.merge:
        adapters.merge(model)
    save_folder(cfg.output_dir, model, tokenizer, records=records)
    return result


def summary(figures: dict[str, Any]) -> str:
    low, high = figures["accuracy_low"], figures["accuracy_high"]
    return (
        f"held-out pair accuracy {figures['accuracy']:.3f} [{low:.3f}, {high:.3f}] on {figures['pairs']} pairs; "
        f"by length {figures['length_baseline']:.3f}, chance 0.500; "
        f"calibration error {figures['calibration_error']:.3f}"
    )
