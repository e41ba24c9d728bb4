"""Random calls for hypothesis: shape around the block, dtype, layout, class of value, label and mask."""

from __future__ import annotations

from typing import NamedTuple

import edge_cases
import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCK_V, BLOCK_T = 128, 16  # what the small_blocks fixture sets


class LogitsCall(NamedTuple):
    logits: Tensor
    labels: Tensor
    mask: Tensor | None
    temperature: float | Tensor
    described: str

    def __repr__(self) -> str:
        return self.described


@st.composite
def logits_calls(draw: st.DrawFn) -> LogitsCall:
    near_block = st.sampled_from([k * BLOCK_V + d for k in (1, 2) for d in (-1, 0, 1)])
    V = draw(st.one_of(st.integers(1, 40), near_block))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 1000))
    # Each row its own class of value: one row's NaN or infinity must not reach the next.
    classes = draw(st.lists(st.sampled_from(sorted(edge_cases.LOGITS)), min_size=1, max_size=4))
    rows = [edge_cases.logits_of(classes[n % len(classes)], (V,), dtype, seed + n) for n in range(shape[0] * shape[1])]
    logits = torch.stack(rows).view(*shape, V)
    labels = edge_cases.labels_for(shape, V, seed, draw(st.sampled_from([torch.int64, torch.int32])))
    kind = draw(st.sampled_from(sorted(edge_cases.MASKS)))
    mask = edge_cases.MASKS[kind](torch.Size(shape))
    logits, labels = edge_cases.spoil(logits, labels, mask)
    layout = draw(st.sampled_from(sorted(edge_cases.LAYOUTS)))
    if draw(st.booleans()):
        labels = labels.repeat_interleave(2, -1)[..., ::2]
    temperature = draw(st.sampled_from([1.0, 0.5, 1.7, torch.linspace(0.5, 2.0, shape[1])]))
    described = f"{[*shape, V]} {dtype} {classes} seed {seed}, {layout}, mask {kind}, temperature {temperature}"
    return LogitsCall(edge_cases.LAYOUTS[layout](logits), labels, mask, temperature, described)


class KlCall(NamedTuple):
    logits: Tensor
    ref: Tensor
    mask: Tensor | None
    temperature: float | Tensor
    direction: str
    described: str

    def __repr__(self) -> str:
        return self.described


@st.composite
def kl_calls(draw: st.DrawFn) -> KlCall:
    near_block = st.sampled_from([k * BLOCK_V + d for k in (1, 2) for d in (-1, 0, 1)])
    V = draw(st.one_of(st.integers(1, 40), near_block))
    shape = torch.Size((draw(st.integers(1, 2)), draw(st.integers(1, 3))))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 1000))
    kind = draw(st.sampled_from(sorted(edge_cases.MASKS)))
    mask = edge_cases.MASKS[kind](shape)
    direction = draw(st.sampled_from(["reverse", "forward", "jsd"]))
    temperature = draw(st.sampled_from([1.0, 0.5, 1.7, torch.linspace(0.5, 2.0, shape[1])]))
    sides, described = [], f"{[*shape, V]} {dtype} {direction}, mask {kind}, temperature {temperature}, seed {seed}"
    for side in (0, 5000):  # other numbers, other classes of value and another layout on either side
        classes = draw(st.lists(st.sampled_from(sorted(edge_cases.LOGITS)), min_size=1, max_size=4))
        rows = [
            edge_cases.logits_of(classes[n % len(classes)], (V,), dtype, seed + side + n) for n in range(shape.numel())
        ]
        logits, _ = edge_cases.spoil(torch.stack(rows).view(*shape, V), torch.zeros(shape, dtype=torch.int64), mask)
        layout = draw(st.sampled_from(sorted(edge_cases.LAYOUTS)))
        described += f"; {classes} {layout}"
        sides.append(edge_cases.LAYOUTS[layout](logits))
    return KlCall(*sides, mask, temperature, direction, described)


class GaeCall(NamedTuple):
    rewards: Tensor
    values: Tensor
    mask: Tensor | None
    bootstrap: Tensor | None
    masked: str
    gamma: float
    lam: float


@st.composite
def gae_calls(draw: st.DrawFn) -> GaeCall:
    near_block = st.sampled_from([k * BLOCK_T + d for k in (1, 2, 3) for d in (-1, 0, 1)])
    time = draw(st.one_of(st.integers(1, 8), near_block))
    batch = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from(DTYPES))
    scale = draw(st.sampled_from([1.0, 1e-3, 1e3]))
    rewards, values = ((scale * torch.randn(batch, time, generator=generator)).to(dtype) for _ in range(2))
    share = draw(st.sampled_from([None, 0.0, 0.1, 0.5, 0.9, 1.0]))
    mask = None if share is None else torch.rand(batch, time, generator=generator) < share
    rewards, values = edge_cases.hide(mask, rewards, values)
    if draw(st.booleans()):  # rows of a wider tensor
        rewards, values = (torch.cat([x, x], 1)[:, :time] for x in (rewards, values))
    bootstrap = scale * torch.randn(batch, generator=generator) if draw(st.booleans()) else None
    discounts = st.sampled_from([0.0, 0.5, 0.97, 1.0])
    masked = draw(st.sampled_from(["skip", "stop", "zero"]))
    return GaeCall(rewards, values, mask, bootstrap, masked, draw(discounts), draw(discounts))


class PackedCall(NamedTuple):
    lengths: list[int]
    rewards: Tensor
    values: Tensor
    mask: Tensor | None
    bootstrap: Tensor | None
    masked: str
    gamma: float
    lam: float
    dtype: torch.dtype  # of the offsets


@st.composite
def packed_calls(draw: st.DrawFn) -> PackedCall:
    near_block = st.sampled_from([k * BLOCK_T + d for k in (1, 2) for d in (-1, 0, 1)])
    lengths = draw(st.lists(st.one_of(st.integers(0, 9), near_block), max_size=6))
    total, dtype = sum(lengths), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    rewards, values = (torch.randn(total, generator=generator).to(dtype) for _ in range(2))
    share = draw(st.sampled_from([None, 0.0, 0.1, 0.5, 0.9, 1.0]))
    mask = None if share is None else torch.rand(total, generator=generator) < share
    rewards, values = edge_cases.hide(mask, rewards, values)
    bootstrap = torch.randn(len(lengths), generator=generator) if draw(st.booleans()) else None
    discounts = st.sampled_from([0.0, 0.5, 0.97, 1.0])
    masked = draw(st.sampled_from(["skip", "stop", "zero"]))
    offsets = draw(st.sampled_from([torch.int32, torch.int64]))
    return PackedCall(lengths, rewards, values, mask, bootstrap, masked, draw(discounts), draw(discounts), offsets)


class RolloutCall(NamedTuple):
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]  # logprobs, ref_logprobs, scores, values
    mask: Tensor
    kl_coef: float
    gamma: float
    lam: float
    whiten: bool


@st.composite
def rollout_calls(draw: st.DrawFn) -> RolloutCall:
    near_block = st.sampled_from([k * BLOCK_T + d for k in (1, 2) for d in (-1, 0, 1)])
    # At least three rows: the whitening of one or two numbers magnifies any rounding.
    batch, time = draw(st.integers(3, 12)), draw(st.one_of(st.integers(4, 8), near_block))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtype, scale = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1.0, 1e-3, 1e3]))
    rows = ((scale * torch.randn(batch, time, generator=generator)).to(dtype) for _ in range(3))
    mask = torch.rand(batch, time, generator=generator) < draw(st.sampled_from([0.5, 0.9, 1.0]))
    logprobs, ref_logprobs, values = edge_cases.hide(mask, *rows)
    scores = scale * torch.randn(batch, generator=generator)
    discounts = st.sampled_from([0.0, 0.5, 0.97, 1.0])
    coefficients = draw(st.sampled_from([0.0, 0.05, 1.0])), draw(discounts), draw(discounts)
    return RolloutCall((logprobs, ref_logprobs, scores, values), mask, *coefficients, draw(st.booleans()))


class TokenCall(NamedTuple):
    tensors: tuple[Tensor, Tensor, Tensor]
    mask: Tensor | None
    aggregate: str


@st.composite
def token_calls(draw: st.DrawFn) -> TokenCall:
    """Three [B, T] tensors of finite numbers, small and extreme, NaN where the mask hides them."""
    shape = (draw(st.integers(0, 3)), draw(st.integers(0, 6)))
    numbers = st.one_of(st.floats(-3, 3, width=32), st.sampled_from([0.0, 119.0, -119.0, 1e4, -1e4, 1e-30, 3e-4]))
    count = shape[0] * shape[1]
    values = st.lists(numbers, min_size=count, max_size=count)
    tensors = [torch.tensor(draw(values), dtype=torch.float32).view(shape) for _ in range(3)]
    mask = None
    if draw(st.booleans()):
        flags = draw(st.lists(st.booleans(), min_size=count, max_size=count))
        mask = torch.tensor(flags, dtype=torch.bool).view(shape)
    modes = ["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum"]
    return TokenCall(tuple(edge_cases.hide(mask, *tensors)), mask, draw(st.sampled_from(modes)))
