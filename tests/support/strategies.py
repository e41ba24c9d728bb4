"""Random calls for hypothesis: shape around the block, dtype, layout, class of value, label and mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from support import edge_cases

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCK_V, BLOCK_T = 128, 16  # what the small_blocks fixture sets


# Strategies are built once, not at every draw: millions of calls are drawn (soak.py).
_DTYPE, _SEED, _FLAG = st.sampled_from(DTYPES), st.integers(0, 1000), st.booleans()
_VOCAB = st.one_of(st.integers(1, 40), st.sampled_from([k * BLOCK_V + d for k in (1, 2) for d in (-1, 0, 1)]))
_LOGITS_SHAPE = st.tuples(st.integers(1, 3), st.integers(1, 4))
_CLASSES = st.lists(st.sampled_from(sorted(edge_cases.LOGITS)), min_size=1, max_size=4)
_LABEL_DTYPE = st.sampled_from([torch.int64, torch.int32])
_MASK = st.sampled_from(sorted(edge_cases.MASKS))
_LAYOUT = st.sampled_from(sorted(edge_cases.LAYOUTS))
_TEMPERATURE = st.sampled_from([1.0, 0.5, 1.7, None])  # None: one for each row
_TIME = st.one_of(st.integers(1, 8), st.sampled_from([k * BLOCK_T + d for k in (1, 2, 3) for d in (-1, 0, 1)]))
_BATCH = st.integers(1, 3)
_SCALE = st.sampled_from([1.0, 1e-3, 1e3])
_SHARE = st.sampled_from([None, 0.0, 0.1, 0.5, 0.9, 1.0])
_DISCOUNT = st.sampled_from([0.0, 0.5, 0.97, 1.0])
_HOLES = st.sampled_from(["skip", "stop", "zero"])
_LENGTHS = st.lists(
    st.one_of(st.integers(0, 9), st.sampled_from([k * BLOCK_T + d for k in (1, 2) for d in (-1, 0, 1)])), max_size=6
)
_DTYPES = st.tuples(*4 * [_DTYPE])
_MODE = st.sampled_from(["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum"])


class LogitsCall(NamedTuple):
    logits: Tensor
    labels: Tensor
    mask: Tensor | None
    temperature: float | Tensor
    drawn: tuple  # what the tensors were made from

    def __repr__(self) -> str:
        return f"logits {list(self.logits.shape)} {self.logits.dtype}, drawn as {self.drawn}"


@st.composite
def logits_calls(draw: st.DrawFn) -> LogitsCall:
    V, shape, dtype, seed = draw(_VOCAB), draw(_LOGITS_SHAPE), draw(_DTYPE), draw(_SEED)
    # Each row its own class of value: one row's NaN or infinity must not reach the next.
    classes = draw(_CLASSES)
    x = torch.randn((*shape, V), generator=torch.Generator().manual_seed(seed))
    rows = [edge_cases.LOGITS[classes[n % len(classes)]](row) for n, row in enumerate(x.view(-1, V))]
    logits = torch.stack(rows).view(*shape, V).to(dtype)
    labels = edge_cases.labels_for(shape, V, seed, draw(_LABEL_DTYPE))
    kind, layout, strided, temperature = draw(_MASK), draw(_LAYOUT), draw(_FLAG), draw(_TEMPERATURE)
    mask = edge_cases.MASKS[kind](torch.Size(shape))
    logits, labels = edge_cases.spoil(logits, labels, mask)
    if strided:
        labels = labels.repeat_interleave(2, -1)[..., ::2]
    drawn = (seed, classes, kind, layout, temperature)
    if temperature is None:
        temperature = torch.linspace(0.5, 2.0, shape[1])
    return LogitsCall(edge_cases.LAYOUTS[layout](logits), labels, mask, temperature, drawn)


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
    time, batch, dtype, scale, share = draw(_TIME), draw(_BATCH), draw(_DTYPE), draw(_SCALE), draw(_SHARE)
    generator = torch.Generator().manual_seed(draw(_SEED))
    rewards, values = ((scale * torch.randn(batch, time, generator=generator)).to(dtype) for _ in range(2))
    mask = None if share is None else torch.rand(batch, time, generator=generator) < share
    rewards, values = edge_cases.hide(mask, rewards, values)
    if draw(_FLAG):  # rows of a wider tensor
        rewards, values = (torch.cat([x, x], 1)[:, :time] for x in (rewards, values))
    bootstrap = scale * torch.randn(batch, generator=generator) if draw(_FLAG) else None
    return GaeCall(rewards, values, mask, bootstrap, draw(_HOLES), draw(_DISCOUNT), draw(_DISCOUNT))


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
    lengths, dtype = draw(_LENGTHS), draw(_DTYPE)
    total = sum(lengths)
    generator = torch.Generator().manual_seed(draw(_SEED))
    rewards, values = (torch.randn(total, generator=generator).to(dtype) for _ in range(2))
    share = draw(_SHARE)
    mask = None if share is None else torch.rand(total, generator=generator) < share
    rewards, values = edge_cases.hide(mask, rewards, values)
    bootstrap = torch.randn(len(lengths), generator=generator) if draw(_FLAG) else None
    options = draw(_HOLES), draw(_DISCOUNT), draw(_DISCOUNT), draw(_LABEL_DTYPE)
    return PackedCall(lengths, rewards, values, mask, bootstrap, *options)


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


class BatchCall(NamedTuple):
    """What the token family, the losses and PPO's advantages take."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]  # [B, T], each its own dtype and layout
    row: Tensor  # [B]
    mask: Tensor | None
    aggregate: str
    flag: bool
    drawn: tuple  # what the tensors were made from

    def __repr__(self) -> str:
        return f"[B, T] = {list(self.tensors[0].shape)}, {[x.dtype for x in self.tensors]}, drawn as {self.drawn}"


@st.composite
def batch_calls(draw: st.DrawFn) -> BatchCall:
    """Normal numbers around the block sizes, some replaced by extreme ones, NaN where the mask hides them."""
    shape, seed, share, dtypes = (draw(_BATCH), draw(_TIME)), draw(_SEED), draw(_SHARE), draw(_DTYPES)
    extreme, strided = draw(_FLAG), draw(_FLAG)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, *shape, generator=generator)
    if extreme:
        special = torch.tensor([0.0, 119.0, -119.0, 1e4, -1e4, 1e-30, 3e-4])
        place = torch.rand(x.shape, generator=generator)
        x = torch.where(place < 0.2, special[(place * 35).long() % 7], x)
    mask = None if share is None else torch.rand(shape, generator=generator) < share
    tensors = edge_cases.hide(mask, *(one.to(dtype) for one, dtype in zip(x, dtypes, strict=True)))
    if strided:
        tensors = [torch.cat([one, one], 1)[:, : shape[1]] for one in tensors]
    row = torch.randn(shape[0], generator=generator)
    drawn = (seed, share, extreme, strided)
    return BatchCall(tuple(tensors), row, mask, draw(_MODE), draw(_FLAG), drawn)


class SamplingCall(NamedTuple):
    call: LogitsCall
    top_k: int | None
    top_p: float | None
    seed: int
    repeat: int  # how many first rows of [B, T] to draw a second time, with the same seed

    def __repr__(self) -> str:
        return f"top_k {self.top_k}, top_p {self.top_p}, seed {self.seed}, repeat {self.repeat}, {self.call}"


_SAMPLING = st.builds(
    SamplingCall,
    logits_calls(),
    st.sampled_from([None, None, 1, 2, 5, 30, 127, 10**6]),
    st.sampled_from([None, None, 1e-6, 0.1, 0.5, 0.8, 0.9999, 1.0]),
    st.integers(0, 2**63 - 1),
    st.sampled_from([0, 0, 0, 0, 0, 0, 1, 3]),  # 3: all there are
)


def sampling_calls() -> st.SearchStrategy[SamplingCall]:
    return _SAMPLING


class PreferenceCall(NamedTuple):
    pairs: tuple[Tensor, Tensor, Tensor, Tensor]  # [M], each its own dtype and layout
    margin: float | Tensor | None
    label: float | Tensor | None
    options: dict[str, object]  # of dpo_loss
    groups: Tensor | int  # of M scores
    kind: str  # of advantage
    described: str

    def __repr__(self) -> str:
        return self.described


_PAIRS = st.integers(0, 40)
_NUMBER = st.sampled_from([None, 0.0, 0.25, 1.0, "each"])
_BETA = st.sampled_from([0.01, 0.1, 0.5, 2.0])
_DPO = st.sampled_from([("sigmoid", 0.0), ("sigmoid", 0.1), ("sigmoid", 0.5), ("ipo", 0.0)])
_KIND = st.sampled_from(["grpo", "rloo", "mean"])
_GROUP = st.sampled_from([1, 2, 4, 7, None])  # None: by ids


@st.composite
def preference_calls(draw: st.DrawFn) -> PreferenceCall:
    """Pairs of rewards or of logprobs, some extreme, and a partition of as many scores into groups."""
    size, seed, dtypes, extreme, strided = draw(_GROUP), draw(_SEED), draw(_DTYPES), draw(_FLAG), draw(_FLAG)
    count = draw(_PAIRS)
    count -= count % (size or 1)
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(4, count, generator=generator)
    if extreme:
        special = torch.tensor([0.0, 119.0, -119.0, 1e4, -1e4, 1e-30, 3e-4])
        place = torch.rand(x.shape, generator=generator)
        x = torch.where(place < 0.2, special[(place * 35).long() % 7], x)
    pairs = [one.to(dtype) for one, dtype in zip(x, dtypes, strict=True)]
    if strided:
        pairs = [one.repeat_interleave(2)[::2] for one in pairs]
    margin, label = draw(_NUMBER), draw(_NUMBER)
    if margin == "each":
        margin = torch.randn(count, generator=generator)
    if label == "each":
        label = torch.rand(count, generator=generator)
    groups: Tensor | int = size or torch.randint(-3, 9, (count,), generator=generator).to(draw(_LABEL_DTYPE))
    (kind, smoothing), beta = draw(_DPO), draw(_BETA)
    options = {"beta": beta, "kind": kind, "label_smoothing": smoothing}
    described = (
        f"M={count}, {dtypes}, seed {seed}, extreme {extreme}, margin {margin}, label {label}, {options}, {groups}"
    )
    return PreferenceCall(tuple(pairs), margin, label, options, groups, draw(_KIND), described)


class HeadCall(NamedTuple):
    hidden: Tensor  # [B, T, D]
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    mask: Tensor | None
    scalars: dict[str, object]
    workspace: int
    seed: int
    drawn: tuple  # what the tensors were made from

    def __repr__(self) -> str:
        shapes = f"hidden {list(self.hidden.shape)} {self.hidden.dtype}, weight {list(self.weight.shape)}"
        return f"{shapes}, {self.scalars}, workspace {self.workspace}, seed {self.seed}, drawn as {self.drawn}"


_WIDTH = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33]))
_BIAS = st.sampled_from(["none", "plain", "offset", "masked"])
_SOFTCAP = st.sampled_from([None, 3.0, 30.0])
_LOGIT_SCALE = st.sampled_from([1.0, 0.3, 2.0])
_WORKSPACE = st.sampled_from([0, 700, 5000, 64 << 20])


@st.composite
def head_calls(draw: st.DrawFn) -> HeadCall:
    """Heads of any small size: hidden rows spoilt, a bias that masks tokens, workspaces of one or many chunks."""
    shape, width, vocab, dtype, seed = draw(_LOGITS_SHAPE), draw(_WIDTH), draw(_VOCAB), draw(_DTYPE), draw(_SEED)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, width, generator=generator).to(dtype)
    weight = (3 * torch.randn(vocab, width, generator=generator) / width**0.5).to(dtype)
    labels = torch.randint(0, vocab, shape, generator=generator)
    kind, softcap, masked = draw(_BIAS), draw(_SOFTCAP), draw(_MASK)
    bias = None if kind == "none" else torch.randn(vocab, generator=generator).to(dtype)
    if kind == "offset":
        bias = bias - 50
    if kind == "masked" and softcap is None:
        bias[torch.arange(vocab) % 3 == 1] = float("-inf")
        labels = labels // 3 * 3
    mask = edge_cases.MASKS[masked](torch.Size(shape))
    hidden, labels = edge_cases.spoil(hidden, labels, mask)
    layout, temperature = draw(_LAYOUT), draw(_TEMPERATURE)
    scalars = {"softcap": softcap, "logit_scale": draw(_LOGIT_SCALE)}
    scalars["temperature"] = torch.linspace(0.5, 2.0, shape[1]) if temperature is None else temperature
    drawn = (kind, masked, layout)
    hidden = edge_cases.LAYOUTS[layout](hidden)
    return HeadCall(hidden, weight, labels.to(draw(_LABEL_DTYPE)), bias, mask, scalars, draw(_WORKSPACE), seed, drawn)
