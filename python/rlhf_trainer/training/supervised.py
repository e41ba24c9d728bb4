"""What `rlhf sft`, `rlhf reward` and `rlhf dpo` share: options, text to token rows, and the training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from rlhf_trainer.base import shared
from rlhf_trainer.base.conditions import parse_gates
from rlhf_trainer.base.config import option, save_config
from rlhf_trainer.base.console import say
from rlhf_trainer.base.distributed import distributed_context
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.records import DataReport
from rlhf_trainer.data.splits import Record, Split, load_train_and_heldout
from rlhf_trainer.models import adapters, precision, quantised
from rlhf_trainer.models.fingerprint import Fingerprint
from rlhf_trainer.models.loading import context_length
from rlhf_trainer.models.modes import train_mode
from rlhf_trainer.models.sharding import unsharded_tensor
from rlhf_trainer.training.alerts import SHOWN, Alerts, announce
from rlhf_trainer.training.checkpoint import Checkpoints, stop_on_signals
from rlhf_trainer.training.runlog import RunLog
from rlhf_trainer.training.trackers import chosen_trackers

Item = TypeVar("Item")
FULL_LR = 1e-4  # sft's; reward and dpo have their own
SCHEDULES = ("cosine", "linear", "constant")
LONGEST = 1024  # tokens, where neither the user nor the model sets a limit below
LARGEST_GROUP = 36  # items: all pairs of nine completions, the most that InstructGPT's labellers ranked of a prompt


@dataclass
class SupervisedConfig:
    """Options that sft, reward and dpo share."""

    model: str = option("", "folder (or hub name) of the model to start from")
    data: str = option("", "training data: JSON lines, a JSON array or a table (.gz too), or Parquet")
    eval_data: str | None = option(None, "held-out data of the same kind; none: a part of --data, see --heldout")
    heldout: float = option(0.05, "held out of --data: a share below 1, or a number of records; 0: nothing")
    output_dir: str = option("", "folder for the trained model, metrics.jsonl, TensorBoard and checkpoints")
    epochs: int = option(1, "passes over the data")
    batch_size: int = option(32, "records per optimizer step")
    micro_batch_size: int | None = option(None, "records per forward pass; changes memory, never the loss")
    lr: float | None = shared.lr(FULL_LR)
    schedule: str = option("cosine", f"learning rate after the warm-up: {', '.join(SCHEDULES)}")
    warmup: float = option(0.03, "share of the steps over which the learning rate rises to --lr, evenly")
    weight_decay: float = option(0.0, "AdamW's weight decay; norms and biases have none")
    max_grad_norm: float = shared.max_grad_norm()
    max_length: int | None = option(None, f"longest record in tokens; none: the model's context, {LONGEST} at most")
    evals: int = option(10, "how many times the held-out records are scored")
    save_every: int = option(0, "steps between checkpoints; 0: none")
    keep_checkpoints: int = shared.keep_checkpoints()
    report_to: list[str] = shared.report_to()
    alert: list[str] = shared.alert()
    stop_on_alert: bool = shared.stop_on_alert()
    resume: bool = shared.resume()
    accept_changes: list[str] = shared.accept_changes()
    overwrite: bool = shared.overwrite()
    strict: bool = option(False, "make every oddity of the data (duplicates, empty texts, cut ones) an error")
    ignore_fields: list[str] = option([], "fields of the data that are known not to be used, and are not counted")
    lora_r: int = shared.lora_r()
    lora_alpha: int = shared.lora_alpha()
    lora_dropout: float = option(0.0, "dropout before LoRA's A, while training")
    lora_targets: list[str] = shared.lora_targets()
    load_in_4bit: bool = shared.load_in_4bit()
    merge: bool = shared.merge()
    seed: int = option(0, "seed of the order of the records, of the held-out part and of new weights")
    device: str = shared.device()
    dtype: str = shared.dtype()
    gradient_checkpointing: bool = shared.gradient_checkpointing()
    pad_token: str | None = shared.pad_token()
    trust_remote_code: bool = shared.trust_remote_code()

    def load_records(
        self, read: Callable[..., tuple[list[Record], DataReport]], tokenizer: Any, given: Sequence[Record] | None
    ) -> Split[Record]:
        """Training and held-out records as the options say; `given` ones take the place of --data's."""
        return load_train_and_heldout(
            read,
            tokenizer,
            data=self.data,
            eval_data=self.eval_data,
            heldout=self.heldout,
            seed=self.seed,
            strict=self.strict,
            ignore_fields=self.ignore_fields,
            given=given,
        )

    @property
    def lora(self) -> adapters.LoraOptions:
        return adapters.LoraOptions(self.lora_r, self.lora_alpha, self.lora_targets, self.lora_dropout)


def validate_options(cfg: SupervisedConfig) -> None:
    """UserError for options that cannot work, before anything is loaded."""
    if cfg.schedule not in SCHEDULES:
        raise UserError(f"--schedule {cfg.schedule}: it takes {', '.join(SCHEDULES)}")
    # 2 tokens: EOS, and one to predict it from
    for name, low in (("epochs", 1), ("batch_size", 1), ("micro_batch_size", 1), ("evals", 1), ("max_length", 2)):
        value = getattr(cfg, name)
        if value is not None and value < low:
            raise UserError(f"--{name} {value}: must be at least {low}")
    cfg.lora.validate()
    precision.validate_dtype(cfg.dtype)
    quantised.validate_options(cfg.load_in_4bit, merge=cfg.merge)
    chosen_trackers(cfg.report_to)
    parse_gates(cfg.alert, None, "--alert")
    for name in ("lr", "max_grad_norm"):
        if getattr(cfg, name) is not None and not getattr(cfg, name) > 0:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be more than 0")
    for name, high in (("warmup", 1.0), ("weight_decay", math.inf), ("heldout", math.inf), ("save_every", math.inf)):
        if not 0 <= getattr(cfg, name) <= high:
            raise UserError(
                f"--{name} {getattr(cfg, name)}: must be at least 0" + (" and at most 1" if high == 1 else "")
            )


def length_limit(max_length: int | None, model: PreTrainedModel) -> int:
    """Longest row in tokens; UserError if --max_length is beyond the model's context."""
    context = context_length(model)
    if max_length is None:
        return min(context or LONGEST, LONGEST)
    if context is not None and max_length > context:
        raise UserError(f"--max_length {max_length} is beyond the model's context of {context} tokens")
    return max_length


@dataclass
class TrainingObjective(Generic[Item]):
    """What is learned from each item.

    losses: items -> [M] loss of each item, summed over its units (tokens of a completion; 1 for a pair).
    units, length: of one item; length is in tokens and groups similar items. line, text: where it stands, how it reads.
    evaluate: metrics on held-out data, by name.
    observe: metrics of the step just done, from what `losses` saw on all ranks. discard: forget what it saw so far.
    fingerprint: of the data and of what else is read.
    group: items of one group are always learned from in the same step; None: every item on its own.
    """

    losses: Callable[[list[Item]], Tensor]
    units: Callable[[Item], int]
    length: Callable[[Item], int]
    line: Callable[[Item], int]
    text: Callable[[Item], str]
    evaluate: Callable[[], dict[str, float]]
    fingerprint: Callable[[], Fingerprint]
    observe: Callable[[], dict[str, float]] = dict
    discard: Callable[[], None] = lambda: None
    group: Callable[[Item], Hashable] | None = None


def order_of(count: int, epoch: int, seed: int) -> list[int]:
    """The permutation of an epoch, by seed and epoch alone: a resumed run sees the same one."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def groups_of(items: Sequence[Item], group: Callable[[Item], Hashable] | None, largest: int) -> list[list[int]]:
    """Indices of the items of each group, in the order of their first; a group of more than `largest` is split."""
    if group is None:
        return [[index] for index in range(len(items))]
    members: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        members.setdefault(group(item), []).append(index)
    return [one[start : start + largest] for one in members.values() for start in range(0, len(one), largest)]


def batches_of(groups: Sequence[list[int]], size: int, epoch: int, seed: int) -> list[list[int]]:
    """An epoch's batches: the groups in shuffled order, as many as fit into `size` items; a larger one by itself."""
    batches: list[list[int]] = []
    for index in order_of(len(groups), epoch, seed):
        if batches and len(batches[-1]) + len(groups[index]) <= size:
            batches[-1].extend(groups[index])
        else:
            batches.append(list(groups[index]))
    return batches


def all_batches(
    items: Sequence[Item], group: Callable[[Item], Hashable] | None, *, epochs: int, batch_size: int, seed: int
) -> list[tuple[float, list[int]]]:
    """(epochs done after it, indices of its items) of every step of the run."""
    groups = groups_of(items, group, max(batch_size, LARGEST_GROUP))
    steps = []
    for epoch in range(epochs):
        batches = batches_of(groups, batch_size, epoch, seed)
        steps += [(epoch + (place + 1) / len(batches), batch) for place, batch in enumerate(batches)]
    return steps


def lr_factor(step: int, *, schedule: str, warmup: int, total: int) -> float:
    """The learning rate of a step (from 0) over its peak: 1/warmup at first, so that no step is without effect."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]


def decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay; vectors, which are norms and biases, do not."""
    if not weight_decay:
        return [{"params": list(parameters), "weight_decay": 0.0}]
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (weight_decay, 0.0)]
    for parameter in parameters:
        groups[parameter.ndim < 2]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def train_loop(
    cfg: SupervisedConfig, name: str, model: PreTrainedModel, items: Sequence[Item], task: TrainingObjective[Item]
) -> dict[str, float]:
    """Train `model`, as `sharding.place` gives it, in place; returns the last metrics, the model in evaluation mode.

    Each step minimises the sum of its items' losses over the batch's units: neither micro-batches nor the number of
    ranks that share it change anything.

    Raises:
        UserError: a loss or gradient that is not finite, before the optimizer steps; it names step and items.
    """
    batches = all_batches(items, task.group, epochs=cfg.epochs, batch_size=cfg.batch_size, seed=cfg.seed)
    total = len(batches)
    if cfg.gradient_checkpointing:
        precision.enable_checkpointing(model)
    train_mode(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ranks = distributed_context()
    if ranks.rank:
        torch.manual_seed(cfg.seed * 1_000_003 + ranks.rank)  # no two ranks with one mask of LoRA's dropout
    assert cfg.lr is not None  # `with_lr` has chosen one
    optimizer = torch.optim.AdamW(decay_groups(parameters, cfg.weight_decay), lr=cfg.lr, fused=True)
    factor = partial(lr_factor, schedule=cfg.schedule, warmup=round(cfg.warmup * total), total=total)
    scheduler = LambdaLR(optimizer, factor)
    checkpoints = Checkpoints(asdict(cfg), {"model": model}, optimizer, scheduler, torch.Generator(), task.fingerprint)
    start, _, past = checkpoints.resume()
    if cfg.output_dir:
        save_config(cfg, cfg.output_dir)
    evaluations = {round(total * (i + 1) / cfg.evals) for i in range(cfg.evals)}
    metrics: dict[str, float] = {}
    reporting: dict[str, Any] = {"report_to": cfg.report_to, "options": asdict(cfg)}
    alerts = Alerts(cfg.alert, past)
    logging = RunLog(cfg.output_dir, total, name, start=start, **reporting) if cfg.output_dir else nullcontext()
    with logging as log, stop_on_signals(bool(cfg.output_dir)) as terminated:
        for step in range(start + 1, start if checkpoints.stopped else total + 1):
            epoch, indices = batches[step - 1]
            batch = [items[i] for i in indices]
            lr = float(scheduler.get_last_lr()[0])
            metrics = _optimizer_step(cfg, model, optimizer, batch, task, step)
            scheduler.step()
            metrics |= task.observe() | {"lr": lr, "epoch": epoch}
            if step in evaluations:
                model.eval()
                with precision.autocast(cfg.dtype, parameters[0].device):
                    metrics |= task.evaluate()
                train_mode(model)
            past.append(metrics)
            if log is not None:
                log.step(step, metrics, _note(metrics))
            alarms = alerts.check(metrics)
            announce(log, step, alarms, [task.text(item) for item in batch[:SHOWN]] if alarms else [])
            alert = alarms[0] if alarms and cfg.stop_on_alert else None
            stop = ranks.broadcast_object(None if alert is None else f"{alert.metric}: {alert.reason}")
            leave = ranks.any(bool(terminated))
            if cfg.output_dir and (leave or (cfg.save_every and step % cfg.save_every == 0)):
                checkpoints.save(step, stopped=stop)
            if stop is not None:  # though a signal came too: the model is as good as done
                say(f"stopped at step {step} of {total}: {stop}")
                break
            if leave:
                raise terminated.exit(step)
    model.eval()
    return metrics


def _optimizer_step(
    cfg: SupervisedConfig,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Item],
    task: TrainingObjective[Item],
    step: int,
) -> dict[str, float]:
    ranks, units = distributed_context(), sum(task.units(item) for item in batch)
    mean = 0.0
    # Parts of similar length, so that little is padding.
    for part, weight in ranks.shard_microbatches(sorted(batch, key=task.length), cfg.micro_batch_size):
        with precision.autocast(cfg.dtype, next(model.parameters()).device):
            losses = task.losses(list(part))
        if not weight:
            task.discard()
        finite = losses.detach().isfinite().tolist()
        bad = [item for item, fine in zip(part, finite, strict=True) if not fine]
        if bad:
            raise _not_finite("loss", step, bad, task)
        loss = losses.sum() / units * weight
        loss.backward()
        mean += loss.item()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ranks.sum_gradients(parameters)
    norm = unsharded_tensor(torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm))
    if not norm.isfinite():
        raise _not_finite("gradient", step, batch, task)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    total = torch.tensor(mean, dtype=torch.float64)
    ranks.sum_(total)
    return {"loss": total.item(), "grad_norm": norm.item()}


def _not_finite(what: str, step: int, items: Sequence[Item], task: TrainingObjective[Item]) -> UserError:
    places = ", ".join(f"line {task.line(item)} ({task.text(item)[:60]!r})" for item in items[:3])
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return UserError(f"step {step}: the {what} is not finite for {places}{more}; stopped before the weights took it")


def _note(metrics: dict[str, float]) -> str:
    shown = {"loss": "loss", "heldout/loss": "held-out", "heldout/accuracy": "accuracy"}
    return "  ".join(f"{name} {metrics[key]:.3f}" for key, name in shown.items() if key in metrics)
