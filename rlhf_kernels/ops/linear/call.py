"""What the linear family's ops share: the checked call, and the arguments that every registered op starts with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from rlhf_kernels.ops import rows, validate
from rlhf_kernels.ops.linear.chunks import ChunkedHead, Head
from rlhf_kernels.ops.linear.shards import local, shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Lora = tuple[Tensor, Tensor, float]  # A [r, D], B [V, r], scale: weight + scale * B @ A
# What may want a gradient, in this order: hidden, weight, bias, lora_a, lora_b.
Leaves = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
LEAVES = 5


class Inputs(NamedTuple):
    """What every registered op of the family starts with; N = O * I rows."""

    hidden: Tensor  # [O, I, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    lora_a: Tensor | None  # [r, D], times its scale
    lora_b: Tensor | None  # [V, r]
    labels: Tensor  # [N]
    mask: Tensor | None  # [N]
    temperature: Tensor
    row_temperature: Tensor | None  # [N], replaces temperature
    softcap: Tensor | None
    logit_scale: Tensor
    vocab_offset: int  # token of weight's first row, in a vocabulary sharded over `group`
    largest_shard_rows: int  # rows of the largest shard
    group: str
    invariant: bool
    workspace: int

    @property
    def leaves(self) -> Leaves:
        return self.hidden, self.weight, self.bias, self.lora_a, self.lora_b

    def head(self) -> Head:
        """The scalars live on the CPU, where reading them is no sync."""
        return Head(
            *self.leaves[1:],
            temperature=self.temperature.item(),
            row_temperature=self.row_temperature,
            softcap=None if self.softcap is None else self.softcap.item(),
            logit_scale=self.logit_scale.item(),
            vocab_offset=self.vocab_offset,
            largest_shard_rows=self.largest_shard_rows,
            group=self.group,
            invariant=self.invariant,
        )

    def sweep(self, op: str, **plan: Any) -> ChunkedHead:
        return ChunkedHead(op, self.hidden, self.head(), self.labels, self.mask, self.workspace, **plan)

    def empty_gradients(self, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
        """Of the shapes that the registered ops return: zero elements for a gradient that is not wanted."""
        hidden, weight, _, lora_a, lora_b = (None if x is None else x.shape for x in self.leaves)
        shapes = (
            hidden,
            weight,
            self.weight.shape[:1],
            lora_a,
            lora_b,
        )  # of the bias: also where there is none
        return tuple(
            (self.weight if x is None else x).new_empty(shape if want and shape is not None else (0,))
            for x, shape, want in zip(self.leaves, shapes, wanted, strict=True)
        )


# torch reads a schema from a function's annotations only where it names every argument.
_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", str: "str", bool: "bool"}
SCHEMA = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(Inputs).items())
GRADIENTS = "Tensor, Tensor, Tensor, Tensor, Tensor"
TENSORS = SCHEMA.count("Tensor")  # so many of Inputs, the first ones, are tensors


def split(arguments: Sequence[Any]) -> tuple[Inputs, Sequence[Any]]:
    """A registered op's arguments: what the family shares, and its own."""
    return Inputs(*arguments[: len(Inputs._fields)]), arguments[len(Inputs._fields) :]


class Call(NamedTuple):
    """The checked arguments that the whole family shares, in the caller's shapes."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None  # [r, D], times its scale; several adapters one below the other
    lora_b: Tensor | None  # [V, r]
    labels: Tensor
    mask: Tensor | None  # bool
    temperature: float
    row_temperature: Tensor | None  # [...], replaces temperature
    softcap: float | None
    logit_scale: float
    workspace: int
    vocab_offset: int
    largest_shard_rows: int
    group: str = ""
    invariant: bool = False

    @property
    def leaves(self) -> Leaves:
        return self.hidden, self.weight, self.bias, self.lora_a, self.lora_b

    @property
    def divisor(self) -> float | Tensor:
        return self.temperature if self.row_temperature is None else self.row_temperature

    def detached(self) -> Call:
        bias, lora_a, lora_b = (None if x is None else x.detach() for x in self.leaves[2:])
        return self._replace(
            hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias, lora_a=lora_a, lora_b=lora_b
        )

    def flat(self) -> Inputs:
        temperature, row_temperature, scale = self.temperature, self.row_temperature, 1.0
        if self.softcap is not None:
            scale = self.logit_scale
        else:  # z * scale / T
            temperature = temperature / self.logit_scale
            row_temperature = None if row_temperature is None else row_temperature / self.logit_scale
        return Inputs(
            rows.as_rows(self.hidden),
            *self.leaves[1:],
            self.labels.reshape(-1),
            rows.flat(self.mask),
            validate.runtime_scalar(temperature),
            rows.flat(row_temperature),
            None if self.softcap is None else validate.runtime_scalar(self.softcap),
            validate.runtime_scalar(scale),
            self.vocab_offset,
            self.largest_shard_rows,
            self.group,
            self.invariant,
            self.workspace,
        )


def prepare(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    bias: Tensor | None,
    lora: Lora | Sequence[Lora] | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: Tensor | None,
    workspace: int,
    process_group: ProcessGroup | None = None,
    like: Call | None = None,
) -> Call:
    """Checks what the family's ops have in common, applies autocast, and reads labels where that is free.

    like: a call whose weight is sharded in the same way; the ranks are not asked again.
    """
    weight, bias = local(op, "weight", weight, process_group), local(op, "bias", bias, process_group)
    shape = _check_head(op, hidden, weight, bias)
    lora_a, lora_b = _low_rank(op, lora, weight, process_group)
    if labels is not None:
        _check_labels(op, labels, shape, hidden.device)
    mask = validate.bool_mask(op, mask, "hidden", shape, hidden.device)
    if softcap is not None:
        validate.number(op, "softcap", softcap, above=0)
    validate.number(op, "logit_scale", logit_scale, above=0)
    validate.number(op, "workspace", workspace, low=0)
    hidden, weight, bias = _autocast(hidden, weight, bias)

    row_temperature = rows.row_temperature(op, temperature, hidden, shape, mask)
    if like is None:
        vocab_offset, vocab, largest_shard_rows = shard(process_group, weight.shape[0], hidden.device)
    else:
        # The size of the vocabulary is for labels alone.
        vocab_offset, vocab, largest_shard_rows = like.vocab_offset, 0, like.largest_shard_rows
    if rows.reading_is_free(hidden):
        rows.positive(op, row_temperature)
        if labels is not None:
            validate.label_in_range(op, labels, mask, vocab)
    if isinstance(temperature, Tensor):
        temperature = 1.0
    if labels is None:  # the op has none, and its kernels look at none
        labels = torch.zeros(shape, dtype=torch.int64, device=hidden.device)
    return Call(
        *(hidden, weight, bias, lora_a, lora_b, labels, mask),
        *(temperature, row_temperature, softcap, logit_scale, workspace, vocab_offset, largest_shard_rows),
        group="" if process_group is None else process_group.group_name,
    )


def _check_labels(op: str, labels: object, shape: torch.Size, device: torch.device) -> None:
    if not isinstance(labels, Tensor) or labels.dtype not in validate.INTS:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{op}: labels is {got}; it takes an int64 or int32 tensor")
    validate.same_place(op, "labels", labels, "hidden", shape, device)


def _check_head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.Size:
    validate.float_tensor(op, "hidden", hidden)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{op}: hidden has shape {list(hidden.shape)}; it takes [..., D] with D >= 1")
    validate.float_tensor(op, "weight", weight)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{op}: weight has shape {list(weight.shape)}; with hidden {list(hidden.shape)} it takes "
            f"[V, {hidden.shape[-1]}] with V >= 1"
        )
    validate.same_place(op, "weight", weight, "hidden", weight.shape, hidden.device)
    if bias is not None:
        validate.float_tensor(op, "bias", bias)
        validate.same_place(op, "bias", bias, "weight", weight.shape[:1], hidden.device)
    if not torch.is_autocast_enabled(hidden.device.type):
        for name, x in (("weight", weight), ("bias", bias)):
            if x is not None and x.dtype != hidden.dtype:
                raise TypeError(f"{op}: {name} is {x.dtype}; with this hidden it takes {hidden.dtype}")
    return hidden.shape[:-1]


def _low_rank(
    op: str, lora: Lora | Sequence[Lora] | None, weight: Tensor, group: ProcessGroup | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """scale * A [r, D] and B [V, r] of all adapters together: their ranks side by side."""
    if lora is None:
        return None, None
    try:
        adapters: list[Any] = [lora] if isinstance(lora[0], Tensor) else list(lora)
        given: list[Lora] = [(a, b, scale) for a, b, scale in adapters]
    except (TypeError, ValueError, IndexError):
        raise TypeError(f"{op}: lora is a {type(lora).__name__}; it takes (A, B, scale) or a list of such") from None
    triples = [(a, local(op, "lora B", b, group), scale) for a, b, scale in given]
    vocab, width = weight.shape
    for a, b, scale in triples:
        validate.float_tensor(op, "lora A", a)
        if a.dim() != 2 or a.shape[0] == 0:
            raise ValueError(f"{op}: lora A has shape {list(a.shape)}; it takes [r, D] with r >= 1")
        validate.float_tensor(op, "lora B", b)
        validate.same_place(op, "lora A", a, "weight", (a.shape[0], width), weight.device)
        validate.same_place(op, "lora B", b, "lora A and weight", (vocab, a.shape[0]), weight.device)
        validate.number(op, "lora scale", scale)
    scaled = [a if scale == 1 else a * scale for a, _, scale in triples]
    if len(triples) == 1:
        return scaled[0], triples[0][1]
    return torch.cat(scaled), torch.cat([b for _, b, _ in triples], 1)


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As torch.nn.functional.linear: all in autocast's dtype; float64 stays."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
