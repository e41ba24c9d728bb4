"""What the linear family's ops share: the checked call, and the arguments that every registered op starts with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from rlhf_kernels.ops import rows, validate
from rlhf_kernels.ops.linear.chunks import ChunkedHead
from rlhf_kernels.ops.linear.shards import local, shard
from rlhf_kernels.reference.common import autocast_enabled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Lora = tuple[Tensor, Tensor, float]  # A [r, D], B [V, r], scale: weight + scale * B @ A


class Wanted(NamedTuple):
    """Which of the head's inputs want a gradient. Gradients come back in this order."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    lora_a: bool = False
    lora_b: bool = False

    @property
    def needs_exact_tiles(self) -> bool:
        """Whether a tile's gradient enters sums, or products of float32, besides those of 16 bits."""
        return self.bias or self.lora_a or self.lora_b


class LinearCall(NamedTuple):
    """The checked arguments that the whole family shares: in the caller's shapes, or by rows (see `by_rows`).

    logits = softcap * tanh((hidden @ (weight + lora_b @ lora_a).T + bias) * logit_scale / softcap), over a temperature.
    """

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    lora_a: Tensor | None  # [r, D], times its scale; several adapters one below the other
    lora_b: Tensor | None  # [V, r]
    labels: Tensor  # [...]
    mask: Tensor | None  # [...] bool
    temperature: Tensor  # this and the other scalars: [] float64 on the CPU, where reading them is no sync
    row_temperature: Tensor | None  # [...], replaces temperature
    softcap: Tensor | None
    logit_scale: Tensor
    fp32_logits: bool  # products stay float32 until the softmax
    vocab_offset: int  # token of weight's first row: not 0 for a shard of the vocabulary
    largest_shard_rows: int  # rows of the largest shard: all ranks must cut the same chunks
    group: str  # name of the process group whose ranks hold the other shards, or ""
    batch_invariant: bool  # a row's products have the same bits in any batch
    workspace: int  # bytes

    @property
    def head_inputs(self) -> tuple[Tensor | None, ...]:
        """What may want a gradient, in Wanted's order."""
        return tuple(getattr(self, name) for name in Wanted._fields)

    @property
    def wanted(self) -> Wanted:
        return Wanted(*(torch.is_grad_enabled() and x is not None and x.requires_grad for x in self.head_inputs))

    @property
    def divisor(self) -> Tensor:
        """The temperature, of one or of each row, in the dtype of the reference's arithmetic."""
        found = self.temperature if self.row_temperature is None else self.row_temperature
        return found.to(torch.float64 if self.hidden.dtype == torch.float64 else torch.float32)

    def reference_arguments(self) -> dict[str, Any]:
        """What the reference's head_logits takes."""
        return {name: getattr(self, name) for name in (*Wanted._fields, "mask", "softcap", "logit_scale")}

    def detached(self) -> LinearCall:
        return self.with_head_inputs(None if x is None else x.detach() for x in self.head_inputs)

    def by_rows(self) -> LinearCall:
        """As the registered ops take it: hidden [O, I, D], everything else of its shape [N] with N = O * I.

        Without a softcap logit_scale is 1: it goes into the temperature.
        """
        temperature, row_temperature, scale = self.temperature, self.row_temperature, self.logit_scale
        if self.softcap is None:  # z * scale / T
            temperature, scale = temperature / scale, validate.runtime_scalar(1.0)
            row_temperature = None if row_temperature is None else row_temperature / self.logit_scale
        return self._replace(
            hidden=rows.as_rows(self.hidden),
            labels=self.labels.reshape(-1),
            mask=rows.flat(self.mask),
            temperature=temperature,
            row_temperature=rows.flat(row_temperature),
            logit_scale=scale,
        )

    def with_head_inputs(self, found: Iterable[Tensor | None]) -> LinearCall:
        return self._with(Wanted._fields, found)

    def _with(self, names: Sequence[str], values: Iterable[Tensor | None]) -> LinearCall:
        changes: dict[str, Any] = dict(zip(names, values, strict=True))
        return self._replace(**changes)

    def sweep(self, op: str, **plan: Any) -> ChunkedHead:
        return ChunkedHead(op, self, **plan)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What a graph saves for the backward; `with_tensors` puts it back."""
        return tuple(getattr(self, name) for name in _TENSORS)

    def without_tensors(self) -> LinearCall:
        return self._with(_TENSORS, [None] * len(_TENSORS))

    def with_tensors(self, saved: Sequence[Tensor | None]) -> LinearCall:
        return self._with(_TENSORS, saved)

    def empty_gradients(self, wanted: Wanted) -> tuple[Tensor, ...]:
        """Of the shapes that the registered ops return: zero elements for a gradient that is not wanted."""
        shapes = [None if x is None else x.shape for x in self.head_inputs]
        shapes[Wanted._fields.index("bias")] = self.weight.shape[:1]  # also where there is none
        return tuple(
            (self.weight if x is None else x).new_empty(shape if want and shape is not None else (0,))
            for x, shape, want in zip(self.head_inputs, shapes, wanted, strict=True)
        )


# torch reads a schema from a function's annotations only where it names every argument.
_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", str: "str", bool: "bool"}
_TYPES = get_type_hints(LinearCall)
_TENSORS = [name for name, kind in _TYPES.items() if kind in (Tensor, Tensor | None)]
SCHEMA = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in _TYPES.items())
GRADIENTS = ", ".join(["Tensor"] * len(Wanted._fields))


def split(arguments: Sequence[Any]) -> tuple[LinearCall, Sequence[Any]]:
    """A registered op's arguments: the call by rows, and the op's own."""
    return LinearCall(*arguments[: len(LinearCall._fields)]), arguments[len(LinearCall._fields) :]


def prepare(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    *,
    bias: Tensor | None,
    lora: Lora | Sequence[Lora] | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: Tensor | None,
    logits_dtype: torch.dtype | None,
    workspace: int,
    process_group: ProcessGroup | None,
    batch_invariant: bool = False,
    sharded_like: LinearCall | None = None,
) -> LinearCall:
    """Checks what the family's ops have in common, applies autocast, and reads labels where that is free.

    sharded_like: a call whose weight is sharded in the same way; the ranks are not asked again.
    """
    weight, bias = local(op, "weight", weight, process_group), local(op, "bias", bias, process_group)
    shape = _check_head(op, hidden, weight, bias)
    lora_a, lora_b = _low_rank(op, lora, weight, process_group)
    if labels is not None:
        _check_labels(op, labels, shape, hidden.device)
    given, mask = mask, validate.bool_mask(op, mask, "hidden", shape, hidden.device)
    if softcap is not None:
        softcap = validate.number(op, "softcap", softcap, above=0)
    logit_scale = validate.number(op, "logit_scale", logit_scale, above=0)
    validate.choice(op, "logits_dtype", logits_dtype, (torch.float32, None))
    workspace = validate.number(op, "workspace", workspace, low=0)
    hidden, weight, bias = _autocast(hidden, weight, bias)

    row_temperature = rows.row_temperature(op, temperature, hidden, shape, mask, given)
    if sharded_like is None:
        vocab_offset, vocab, largest_shard_rows = shard(process_group, weight.shape[0], hidden.device)
    else:
        # The size of the vocabulary is for labels alone.
        vocab_offset, vocab, largest_shard_rows = sharded_like.vocab_offset, 0, sharded_like.largest_shard_rows
    if rows.reading_is_free(hidden):
        rows.positive(op, row_temperature)
        if labels is not None:
            validate.label_in_range(op, labels, mask, vocab)
    if labels is None:  # the op has none, and its kernels look at none
        labels = torch.zeros(shape, dtype=torch.int64, device=hidden.device)
    return LinearCall(
        hidden=hidden,
        weight=weight,
        bias=bias,
        lora_a=lora_a,
        lora_b=lora_b,
        labels=labels,
        mask=mask,
        temperature=rows.scalar(temperature if row_temperature is None else row_temperature),
        row_temperature=row_temperature,
        softcap=None if softcap is None else validate.runtime_scalar(softcap),
        logit_scale=validate.runtime_scalar(logit_scale),
        fp32_logits=logits_dtype is not None,
        vocab_offset=vocab_offset,
        largest_shard_rows=largest_shard_rows,
        group="" if process_group is None else process_group.group_name,
        batch_invariant=batch_invariant,
        workspace=workspace,
    )


def _check_labels(op: str, labels: object, shape: torch.Size, device: torch.device) -> None:
    if not isinstance(labels, Tensor) or labels.dtype not in validate.INTS:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{op}: labels is {got}; it takes an int64 or int32 tensor")
    validate.same_device_and_shape(op, "labels", labels, "hidden", shape, device)


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
    validate.same_device_and_shape(op, "weight", weight, "hidden", weight.shape, hidden.device)
    if bias is not None:
        validate.float_tensor(op, "bias", bias)
        validate.same_device_and_shape(op, "bias", bias, "weight", weight.shape[:1], hidden.device)
    if not autocast_enabled(hidden.device):
        for name, x in (("weight", weight), ("bias", bias)):
            if x is not None and x.dtype != hidden.dtype:
                raise TypeError(
                    f"{op}: {name} is {x.dtype}, hidden {hidden.dtype}; pass {name}.to({hidden.dtype}), or use autocast"
                )
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
        validate.same_device_and_shape(op, "lora A", a, "weight", (a.shape[0], width), weight.device)
        validate.same_device_and_shape(op, "lora B", b, "lora A and weight", (vocab, a.shape[0]), weight.device)
        validate.number(op, "lora scale", scale)
    scaled = [a if scale == 1 else a * scale for a, _, scale in triples]
    if len(triples) == 1:
        return scaled[0], triples[0][1]
    return torch.cat(scaled), torch.cat([b for _, b, _ in triples], 1)


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As torch.nn.functional.linear: all in autocast's dtype; float64 stays."""
    if not autocast_enabled(hidden.device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
