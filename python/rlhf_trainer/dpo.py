"""`rlhf dpo`: a policy straight from preference pairs, without reward model and rollouts (Rafailov et al. 2023)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from rlhf_kernels import dpo_loss
from rlhf_trainer.base import shared
from rlhf_trainer.base.config import option, require
from rlhf_trainer.base.console import say
from rlhf_trainer.base.distributed import distributed_context, on_all_ranks, resolve_device
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.encoding import end_ids, padding_id
from rlhf_trainer.data.records import Pair
from rlhf_trainer.data.rows import TokenizedExample, TokenizedPair, counted_tokens, encode_pairs
from rlhf_trainer.data.stages import read_pairs
from rlhf_trainer.models import adapters, precision, quantised
from rlhf_trainer.models.checks import check_forward
from rlhf_trainer.models.fingerprint import (
    Fingerprint,
    Part,
    model_part,
    pairs_part,
    tokenizer_part,
)
from rlhf_trainer.models.loading import check_vocabulary, load_causal, load_tokenizer
from rlhf_trainer.models.logprobs import completion_losses
from rlhf_trainer.models.sharding import prepare_model, prepare_trained_model
from rlhf_trainer.reports.page import curves_figure, embed, metric_curve, write_or_warn, write_page
from rlhf_trainer.training.checkpoint import refuse_leftovers
from rlhf_trainer.training.finish import finish
from rlhf_trainer.training.pair_metrics import heldout_metrics, heldout_table, length_baseline, pair_metrics, summary
from rlhf_trainer.training.rates import with_lr
from rlhf_trainer.training.runlog import read_metrics
from rlhf_trainer.training.supervised import (
    SupervisedConfig,
    TrainingObjective,
    length_limit,
    train_loop,
    validate_options,
)

SUMMARY = """Train a policy on preference pairs with DPO or IPO; its frozen start, or --ref_model, is the reference.

Data as `rlhf reward` reads it. The reference's logprobs are computed once, before training, and kept in output_dir."""
EXAMPLE = "rlhf dpo --model runs/sft --data pairs.jsonl --output_dir runs/dpo --beta 0.1 --lr 5e-6"
REFERENCE_CACHE = "reference_logprobs.safetensors"

FULL_LR = 5e-6


@dataclass
class DPOConfig(SupervisedConfig):
    """Data: {"prompt", "chosen", "rejected"} a line, optionally "label"; HH-RLHF transcripts; chats."""

    heldout: float = shared.heldout_pairs()
    lr: float | None = shared.lr(FULL_LR)
    ref_model: str | None = shared.ref_model()
    beta: float = option(0.1, "strength of the pull towards the reference, the KL penalty's beta")
    loss_type: str = option("sigmoid", "`sigmoid` (DPO) or `ipo`, which does not drive certain pairs without bound")
    label_smoothing: float = option(0.0, "probability that a pair's label is wrong, below 0.5; sigmoid only")
    per_token: bool = option(False, "logprobs per token instead of per answer, as TRL does for ipo")


Config = DPOConfig


@dataclass(frozen=True)
class PairWithReference:
    """A pair in tokens, and the reference's logprob of its two answers."""

    rows: TokenizedPair
    ref_chosen: float
    ref_rejected: float


@dataclass
class DPOResult:
    """What `train_dpo` returns: the trained policy, the last step's metrics, and dpo.json's figures."""

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    metrics: dict[str, float]
    figures: dict[str, Any]
    output_dir: str  # "": nothing was written


def check_options(cfg: DPOConfig) -> None:
    validate_options(cfg)
    if cfg.loss_type not in ("sigmoid", "ipo"):
        raise UserError(f"--loss_type {cfg.loss_type}: it takes sigmoid, ipo")
    if not cfg.beta > 0:
        raise UserError(f"--beta {cfg.beta}: must be more than 0")
    if not 0 <= cfg.label_smoothing < 0.5:
        raise UserError(f"--label_smoothing {cfg.label_smoothing}: must be at least 0 and below 0.5")
    if cfg.loss_type == "ipo" and cfg.label_smoothing:
        raise UserError("--label_smoothing is for --loss_type sigmoid; ipo has none")


def answer_logprobs(model: PreTrainedModel, rows: Sequence[TokenizedExample], pad_id: int, per_token: bool) -> Tensor:
    """[M] float32, nats: logprob of each row's answer, EOS included; with `per_token` its mean over the tokens."""
    logprobs = -completion_losses(model, rows, pad_id)
    return logprobs / logprobs.new_tensor([counted_tokens(row) for row in rows]) if per_token else logprobs


@torch.no_grad()
def all_logprobs(model: PreTrainedModel, rows: Sequence[TokenizedExample], pad_id: int, cfg: DPOConfig) -> Tensor:
    """`answer_logprobs` of any number of rows, on the CPU."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    ranks, logprobs = distributed_context(), torch.zeros(len(rows))
    size = 2 * (cfg.micro_batch_size or cfg.batch_size)  # a pair is two rows
    device = next(model.parameters()).device
    for (start,), weight in ranks.shard_microbatches(range(0, len(order), size), 1):
        part = order[start : start + size]
        with precision.autocast(cfg.dtype, device):
            found = answer_logprobs(model, [rows[i] for i in part], pad_id, cfg.per_token)
        if weight:
            logprobs[part] = found.cpu()
    ranks.sum_(logprobs)
    return logprobs


def pair_losses(policy: Tensor, reference: Tensor, labels: Sequence[float], cfg: DPOConfig) -> Tensor:
    """[M] losses; policy, reference [2, M]: logprobs of chosen and rejected. A label is the share that `chosen` won."""
    losses, _, _ = dpo_loss(
        *policy,
        *reference,
        beta=cfg.beta,
        label_smoothing=cfg.label_smoothing,
        kind="ipo" if cfg.loss_type == "ipo" else "sigmoid",
        label=policy.new_tensor(labels),
        reduction="none",
    )
    return losses


class PairLoss:
    """The losses of a policy, and what the pairs of the step under way looked like."""

    def __init__(self, model: PreTrainedModel, pad_id: int, cfg: DPOConfig) -> None:
        self.model, self.pad_id, self.cfg = model, pad_id, cfg
        self.seen: list[Tensor] = []  # [4, M] of each micro-batch: logprob and reward of chosen and rejected
        self.labels: list[float] = []

    def losses(self, items: list[PairWithReference]) -> Tensor:
        rows = [item.rows.chosen for item in items] + [item.rows.rejected for item in items]
        policy = answer_logprobs(self.model, rows, self.pad_id, self.cfg.per_token).view(2, len(items))
        reference = policy.new_tensor([[i.ref_chosen for i in items], [i.ref_rejected for i in items]])
        labels = [item.rows.pair.label for item in items]
        self.seen.append(torch.cat([policy.detach(), self.cfg.beta * (policy.detach() - reference)]).cpu())
        self.labels += labels
        return pair_losses(policy, reference, labels, self.cfg)

    def observe(self) -> dict[str, float]:
        """TRL's names; a pair without a winner (label 0.5) does not count in the accuracy."""
        everyone = distributed_context().all_gather_object((torch.cat([torch.empty(4, 0), *self.seen], 1), self.labels))
        logps_chosen, logps_rejected, chosen, rejected = torch.cat([seen for seen, _ in everyone], 1)
        labels = torch.tensor([label for _, labels in everyone for label in labels])
        self.discard()
        right = ((chosen - rejected) * (labels - 0.5).sign())[labels != 0.5]
        accuracies = ((right > 0).float() + 0.5 * (right == 0)).mean().item()
        return {
            "rewards/chosen": chosen.mean().item(),
            "rewards/rejected": rejected.mean().item(),
            "rewards/margins": (chosen - rejected).mean().item(),
            **({"rewards/accuracies": accuracies} if len(right) else {}),  # else all of them ties
            "logps/chosen": logps_chosen.mean().item(),
            "logps/rejected": logps_rejected.mean().item(),
        }

    def discard(self) -> None:
        self.seen, self.labels = [], []


def reference_part(reference: PreTrainedModel) -> Part:
    """The reference's fingerprint: all weights count, for it may be the policy, which is trained afterwards."""
    return model_part(reference, frozen=False)


def reference_logprobs(
    cfg: DPOConfig, reference: PreTrainedModel, pairs: Sequence[TokenizedPair], pad_id: int, part: Part
) -> list[PairWithReference]:
    """Every pair with its reference logprobs: from the file that an earlier start left in output_dir, or computed.

    part: the reference's fingerprint.
    """
    rows = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
    ranks, logprobs = distributed_context(), None
    if cfg.output_dir:
        refuse_leftovers(cfg.output_dir, resume=cfg.resume, overwrite=cfg.overwrite)
        path = Path(cfg.output_dir) / REFERENCE_CACHE
        described = [
            part,
            cfg.dtype,
            cfg.per_token,
            [[row.ids, row.prompt_length] for row in rows],
        ]
        identity = hashlib.sha256(json.dumps(described).encode()).hexdigest()
        logprobs = ranks.broadcast_object(_kept(path, identity) if ranks.main else None)
    if logprobs is None:
        training = reference.training
        logprobs = all_logprobs(reference.eval(), rows, pad_id, cfg)
        reference.train(training)
        if not bool(logprobs.isfinite().all()):
            raise UserError(f"{cfg.ref_model or cfg.model}: the reference's logprobs are not finite")
        if cfg.output_dir and ranks.main:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.tmp")
            save_file({"logprobs": logprobs}, temporary, metadata={"identity": identity})
            temporary.replace(path)
    both = logprobs.view(-1, 2).tolist()
    return [PairWithReference(pair, *values) for pair, values in zip(pairs, both, strict=True)]


def _kept(path: Path, identity: str) -> Tensor | None:
    """The file's logprobs if they belong to this reference and these rows."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("identity") == identity:
                return file.get_tensor("logprobs")
    except (OSError, SafetensorError):  # none, or a damaged one: they are computed again
        pass
    return None


def fit_pairs(
    cfg: DPOConfig,
    model: PreTrainedModel,
    items: Sequence[PairWithReference],
    kept: Sequence[PairWithReference],
    pad_id: int,
    others: Callable[[], Fingerprint] = dict,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Train `model` in place on `items`; returns the last metrics and the figures on `kept`, the held-out ones.

    others: fingerprints of what the run depends on besides the pairs.
    """
    trained = PairLoss(model, pad_id, cfg)

    def figures() -> dict[str, Any]:
        sides = [item.rows.chosen for item in kept] + [item.rows.rejected for item in kept]
        policy = all_logprobs(model, sides, pad_id, cfg).view(2, len(kept))
        fixed = torch.tensor([[item.ref_chosen for item in kept], [item.ref_rejected for item in kept]])
        rewards = cfg.beta * (policy - fixed)
        own = [item.rows.pair for item in kept]
        found = pair_metrics(rewards[0], rewards[1], own)
        found["loss"] = pair_losses(policy, fixed, [pair.label for pair in own], cfg).mean().item()
        return found

    def evaluate() -> dict[str, float]:
        return heldout_metrics(figures(), "loss", "accuracy", "margin") if kept else {}

    def fingerprint() -> Fingerprint:
        parts = {"data": items, "heldout_data": kept}
        return {name: pairs_part([item.rows for item in part]) for name, part in parts.items()} | others()

    task = TrainingObjective(
        losses=trained.losses,
        units=lambda item: 1,
        length=lambda item: max(len(item.rows.chosen.ids), len(item.rows.rejected.ids)),
        line=lambda item: item.rows.pair.line,
        text=lambda item: f"{item.rows.pair.prompt}{item.rows.pair.chosen} | {item.rows.pair.rejected}",
        evaluate=evaluate,
        fingerprint=fingerprint,
        observe=trained.observe,
        discard=trained.discard,
    )
    metrics = train_loop(cfg, "dpo", model, items, task)
    return metrics, figures() if kept else {}


@on_all_ranks
def train_dpo(
    cfg: DPOConfig,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ref_model: PreTrainedModel | None = None,
    pairs: Sequence[Pair] | None = None,
) -> DPOResult:
    """Train a policy on preference pairs. What is not passed as an object is loaded from what cfg names.

    Args:
        model, tokenizer: the policy (trained in place) and its tokenizer.
        ref_model: the frozen reference; None: cfg.ref_model, or the policy as it is now, without a second copy of it.
        pairs: the training pairs; cfg.heldout of them are held out.

    Raises:
        UserError: bad input, one sentence.
    """
    needed = {"model": model, "data": pairs}
    require(cfg, *(name for name, given in needed.items() if given is None))
    check_options(cfg)
    device = resolve_device(cfg.device)
    set_seed(cfg.seed)
    if tokenizer is None:
        tokenizer = load_tokenizer(cfg.model, cfg.pad_token, cfg.trust_remote_code)
    split = cfg.load_records(read_pairs, tokenizer, pairs)
    training, heldout, findings, heldout_findings = split.training, split.heldout, split.report, split.heldout_report
    options = {"trust_remote_code": cfg.trust_remote_code, **quantised.load_options(cfg.load_in_4bit, device)}
    policy = load_causal(cfg.model, tokenizer, **options) if model is None else model
    adapters.add_adapter(policy, cfg.lora, output_dir=cfg.output_dir)
    restored = cfg.merge or model is not None
    policy = prepare_trained_model(policy, device, dtype=cfg.dtype, restored=restored)
    quantised.check_adapter(cfg.load_in_4bit, policy)
    if ref_model is None and cfg.ref_model is not None:
        check_vocabulary(cfg.ref_model, tokenizer, cfg.trust_remote_code)
        ref_model = load_causal(cfg.ref_model, tokenizer, **options)
        precision.to_bf16(ref_model, cfg.dtype, include_trainable=True)
    elif ref_model is not None:
        precision.widen(ref_model, cfg.dtype)
    limit = length_limit(cfg.max_length, policy)
    ends, pad_id = end_ids(tokenizer, policy), padding_id(tokenizer)
    rows = encode_pairs(tokenizer, training, limit, findings, ends=ends)
    heldout_rows = encode_pairs(tokenizer, heldout, limit, heldout_findings, ends=ends)
    training, heldout = [row.pair for row in rows], [row.pair for row in heldout_rows]
    for pair in training:
        if pair.margin:
            findings.count("margin, which DPO does not use", pair.line)
    split.say("pairs", training=len(training), heldout=len(heldout))
    chosen = [pair.chosen for pair in rows]
    with precision.autocast(cfg.dtype, device):
        check_forward(policy, lambda some: completion_losses(policy, some, pad_id), chosen)
    reference = policy if ref_model is None else prepare_model(ref_model, device)
    part = reference_part(reference) if cfg.output_dir else {}
    items = reference_logprobs(cfg, reference, [*rows, *heldout_rows], pad_id, part)
    if reference is not policy:
        precision.narrow(reference)
    del reference, ref_model  # one that was loaded here takes no memory in training

    def others() -> Fingerprint:
        return {"tokenizer": tokenizer_part(tokenizer), "reference": part}

    cfg = with_lr(cfg, policy, FULL_LR)
    metrics, figures = fit_pairs(cfg, policy, items[: len(rows)], items[len(rows) :], pad_id, others)
    result: dict[str, Any] = {"train_pairs": len(training)}
    if heldout:
        result["heldout"] = figures | {"length_baseline": length_baseline(training, heldout)}
    saved: dict[str, Any] = {"output_dir": cfg.output_dir, "dtype": cfg.dtype, "merge": cfg.merge}
    finish(policy, tokenizer, records={"dpo.json": result}, **saved)
    if cfg.output_dir and distributed_context().main:
        write_or_warn(lambda: write_curves(cfg, result), "the report")
    return DPOResult(policy, tokenizer, metrics, result, cfg.output_dir)


def write_curves(cfg: DPOConfig, result: dict[str, Any]) -> Path:
    """report.html: the learning curves, and the figures on held-out pairs."""
    records = read_metrics(cfg.output_dir)
    both = {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}
    curves = [
        metric_curve(records, {"loss": "training", "heldout/loss": "held-out"}, f"loss ({cfg.loss_type})"),
        metric_curve(
            records,
            {"rewards/accuracies": "training", "heldout/accuracy": "held-out"},
            "share of pairs ranked right",
            limits=(0, 1),
        ),
        metric_curve(records, both, "reward: beta (log pi - log ref)", "nats x beta"),
        metric_curve(
            records, {"logps/chosen": "chosen", "logps/rejected": "rejected"}, "logprob of the answer", "nats"
        ),
    ]
    parts = [f"<p>{result['train_pairs']} training pairs, beta {cfg.beta:g}.</p>"]
    heldout = result.get("heldout")
    if heldout:
        parts.append("<h2>Held-out pairs</h2>" + heldout_table(heldout))
    parts.append("<h2>Learning curves</h2>" + embed(curves_figure(curves), "learning curves"))
    return write_page(Path(cfg.output_dir) / "report.html", "DPO", parts)


def run(cfg: DPOConfig) -> dict[str, Any]:
    """Train, save an ordinary Hugging Face folder with dpo.json and report.html; returns what dpo.json holds."""
    require(cfg, "model", "data", "output_dir")
    result = train_dpo(cfg).figures
    if "heldout" in result:
        say(summary(result["heldout"]))
    return result
