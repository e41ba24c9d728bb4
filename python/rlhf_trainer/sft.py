"""`rlhf sft`: next-token loss on completions only, -log p(completion, EOS | prompt) per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.base.config import require
from rlhf_trainer.base.distributed import distributed_context, on_all_ranks, resolve_device
from rlhf_trainer.data.encoding import end_ids, padding_id
from rlhf_trainer.data.records import Example
from rlhf_trainer.data.rows import TokenizedExample, counted_tokens, encode_examples
from rlhf_trainer.data.stages import read_examples
from rlhf_trainer.models import adapters, precision, quantised
from rlhf_trainer.models.checks import check_forward
from rlhf_trainer.models.fingerprint import rows_part, tokenizer_part
from rlhf_trainer.models.loading import load_causal, load_tokenizer
from rlhf_trainer.models.logprobs import completion_losses
from rlhf_trainer.models.sharding import prepare_trained_model
from rlhf_trainer.training.finish import finish
from rlhf_trainer.training.rates import with_lr
from rlhf_trainer.training.supervised import (
    FULL_LR,
    SupervisedConfig,
    TrainingObjective,
    length_limit,
    train_loop,
    validate_options,
)

SUMMARY = "Fine-tune a causal language model on prompts and completions; the loss counts completions only."
EXAMPLE = "rlhf sft --model runs/base --data examples.jsonl --output_dir runs/sft --epochs 2 --lr 1e-4"


@dataclass
class SFTConfig(SupervisedConfig):
    """Data: {"prompt", "completion"}, {"instruction", "input", "output"} or {"messages"} a line, or plain text."""


Config = SFTConfig


@dataclass
class SFTResult:
    """What `train_sft` returns: the trained model, its tokenizer, and the last step's metrics."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    metrics: dict[str, float]
    output_dir: str  # "": nothing was written


@torch.no_grad()
def mean_loss(model: PreTrainedModel, rows: Sequence[TokenizedExample], pad_id: int, batch_size: int) -> float:
    """Nats per completion token over all rows."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    total = torch.zeros((), dtype=torch.float64)
    for (batch,), weight in distributed_context().shard_microbatches(batches, 1):
        total += weight * completion_losses(model, batch, pad_id).sum().item()
    distributed_context().sum_(total)
    return total.item() / sum(map(counted_tokens, rows))


@on_all_ranks
def train_sft(
    cfg: SFTConfig,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    examples: Sequence[Example] | None = None,
) -> SFTResult:
    """Fine-tune a language model on completions. What is not passed as an object is loaded from what cfg names.

    Args:
        model, tokenizer: the model (trained in place; lora_r puts an adapter on it) and its tokenizer.
        examples: the training examples; cfg.heldout of them are held out.

    Without cfg.output_dir nothing is written.

    Raises:
        UserError: bad input, one sentence.
    """
    needed = {"model": model, "data": examples}
    require(cfg, *(name for name, given in needed.items() if given is None))
    validate_options(cfg)
    device = resolve_device(cfg.device)
    if tokenizer is None:
        tokenizer = load_tokenizer(cfg.model, cfg.pad_token, cfg.trust_remote_code)
    split = cfg.load_records(read_examples, tokenizer, examples)
    training, heldout, findings, heldout_findings = split.training, split.heldout, split.report, split.heldout_report
    torch.manual_seed(cfg.seed)
    options = {"trust_remote_code": cfg.trust_remote_code, **quantised.load_options(cfg.load_in_4bit, device)}
    start = load_causal(cfg.model, tokenizer, **options) if model is None else model
    adapters.add_adapter(start, cfg.lora, output_dir=cfg.output_dir)
    restored = cfg.merge or model is not None
    model = prepare_trained_model(start, device, dtype=cfg.dtype, restored=restored)
    quantised.check_adapter(cfg.load_in_4bit, model)
    limit = length_limit(cfg.max_length, model)
    ends, pad_id = end_ids(tokenizer, model), padding_id(tokenizer)
    rows = encode_examples(tokenizer, training, limit, findings, ends=ends)
    heldout_rows = encode_examples(tokenizer, heldout, limit, heldout_findings, ends=ends)
    split.say("examples", training=len(training), heldout=len(heldout))
    with precision.autocast(cfg.dtype, device):
        check_forward(model, lambda some: completion_losses(model, some, pad_id), rows)

    def evaluate() -> dict[str, float]:
        if not heldout_rows:
            return {}
        return {"heldout/loss": mean_loss(model, heldout_rows, pad_id, cfg.batch_size)}

    task = TrainingObjective(
        losses=lambda batch: completion_losses(model, batch, pad_id),
        units=counted_tokens,
        length=lambda row: len(row.ids),
        line=lambda row: row.line,
        text=lambda row: str(tokenizer.decode(row.ids, skip_special_tokens=True)),
        evaluate=evaluate,
        fingerprint=lambda: {
            "tokenizer": tokenizer_part(tokenizer),
            "data": rows_part(rows),
            "heldout_data": rows_part(heldout_rows),
        },
    )
    cfg = with_lr(cfg, model, FULL_LR)
    metrics = train_loop(cfg, "sft", model, rows, task)
    finish(model, tokenizer, output_dir=cfg.output_dir, dtype=cfg.dtype, merge=cfg.merge)
    return SFTResult(model, tokenizer, metrics, cfg.output_dir)


def run(cfg: SFTConfig) -> dict[str, Any]:
    """Train, save an ordinary Hugging Face folder; returns the last metrics."""
    require(cfg, "model", "data", "output_dir")
    return train_sft(cfg).metrics
