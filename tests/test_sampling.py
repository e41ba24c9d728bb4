"""sample_tokens: what it draws, with which frequency, and the logprob it reports, against float64 on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from support import edge_cases, truth
from support.backends import Backend
from torch import Tensor
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

import rlhf_kernels as rk
from rlhf_kernels.ops import sampling

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (top_k, top_p)
FILTERS = [(None, None), (5, None), (None, 0.8), (9, 0.6)]
# What fp32 exponentials and their sums may be off by, relative to the total, when a column's boundary is looked for.
ROUNDING = 4e-6


def draw(backend: Backend, logits: Tensor, uniform: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Tokens and logprobs for given numbers u [N], on the CPU."""
    moved = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in options.items()}
    call = {"mask": None, "temperature": 1.0, "top_k": None, "top_p": None, **moved}
    tokens, logprobs = sampling._draw(logits.to(backend.device), uniform.to(backend.device), **call)
    assert tokens.dtype == torch.int64
    assert logprobs.dtype == torch.float32
    return tokens.cpu(), logprobs.cpu()


def check(
    backend: Backend,
    logits: Tensor,
    uniform: Tensor,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> None:
    """One draw a row: u lies in the token's cell of the exact CDF, and the logprob is the cell's width."""
    shape = logits.shape[:-1]
    options = {"mask": mask, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    tokens, logprobs = draw(backend, logits, uniform, **options)
    assert tokens.shape == logprobs.shape == shape
    wanted = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    assert (tokens[~wanted] == 0).all()
    assert (logprobs[~wanted] == 0).all()
    x = logits[wanted]
    divisor = torch.as_tensor(temperature, dtype=torch.float64).expand(shape)[wanted]
    probability, spoilt = truth.sampling_distribution(x, divisor, top_k, top_p)
    assert (tokens[wanted][spoilt] == 0).all()
    assert logprobs[wanted][spoilt].isnan().all()
    probability, token = probability[~spoilt], tokens[wanted][~spoilt].unsqueeze(-1)
    width = probability.gather(-1, token)
    above = probability.cumsum(-1).gather(-1, token)
    u = uniform.view(shape)[wanted][~spoilt].unsqueeze(-1)
    assert (width > 0).all()
    assert (u >= above - width - ROUNDING).all()
    assert (u <= above + ROUNDING).all()
    exact = width.log().squeeze(-1)
    scaled = (x[~spoilt].float() / divisor[~spoilt].float().unsqueeze(-1)).masked_fill(probability == 0, -math.inf)
    plain = scaled.log_softmax(-1).gather(-1, token).squeeze(-1)
    truth.assert_accurate(logprobs[wanted][~spoilt], exact, max(truth.max_error(plain, exact), 2e-7))


def _uniform(rows: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
@pytest.mark.parametrize("value_class", edge_cases.LOGITS)
def test_every_kind_of_value(
    backend: Backend, small_blocks: None, value_class: str, top_k: int | None, top_p: float | None, dtype: torch.dtype
) -> None:
    if backend.interpreted and dtype == torch.float16:
        pytest.skip("as bfloat16, at the interpreter's price")
    if backend.interpreted and dtype == torch.bfloat16 and value_class == "denormal":
        pytest.skip("the interpreter reads bfloat16 denormals as 0")
    rows, V = (1, 130) if backend.interpreted else (6, 1500)
    logits = edge_cases.logits_of(value_class, (rows, V), dtype)
    check(backend, logits, _uniform(rows), temperature=0.7, top_k=top_k, top_p=top_p)


@pytest.mark.parametrize("V", [1, 2, 63, 64, 65, 1023, 1024, 1025, 4097, 70_000, 300_001])
@pytest.mark.parametrize(("top_k", "top_p"), [*FILTERS, (1, None), (10**9, 1.0), (3000, None), (None, 0.9999)])
def test_every_size(V: int, top_k: int | None, top_p: float | None) -> None:
    """Segments of one and of several blocks; candidates few, and too many to keep."""
    for name in ("reference", "cpu"):
        if name == "cpu" and rk.dispatch.available()["cpu"]:
            continue
        with rk.use_backend(name):
            logits = edge_cases.logits_of("normal", (3, V), torch.float32)
            check(Backend(name, "cpu"), logits, _uniform(3), top_k=top_k, top_p=top_p)
            flat = 1e-3 * logits  # nearly every column is in the nucleus
            check(Backend(name, "cpu"), flat, _uniform(3), top_k=top_k, top_p=top_p)


@pytest.mark.parametrize("V", [1, 2, 127, 128, 129, 257])
def test_every_size_in_triton(V: int, kernel_backend: Backend, small_blocks: None) -> None:
    if kernel_backend.name != "triton":
        pytest.skip("test_every_size")
    for top_k, top_p in FILTERS:
        logits = edge_cases.logits_of("normal", (2, V), torch.float32)
        check(kernel_backend, logits, _uniform(2), top_k=top_k, top_p=top_p)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (8, 0.9)])
def test_u_swept_over_the_cells_of_the_distribution(
    backend: Backend, small_blocks: None, top_k: int | None, top_p: float | None
) -> None:
    """Just inside both ends of every cell: that token and no other."""
    V = 10 if backend.interpreted else 200
    logits = edge_cases.logits_of("normal", (1, V), torch.float32) / 3
    logits[0, 3] = -math.inf
    probability, _ = truth.sampling_distribution(logits, torch.ones(1, dtype=torch.float64), top_k, top_p)
    upto = probability[0].cumsum(0)
    cells = [i for i in range(V) if probability[0, i] > 4 * ROUNDING]
    assert len(cells) >= 5
    low = torch.stack([upto[i] - probability[0, i] + ROUNDING for i in cells])
    high = torch.stack([upto[i] - ROUNDING for i in cells])
    for uniform in (low, high):
        tokens, _ = draw(backend, logits.expand(len(cells), V), uniform, top_k=top_k, top_p=top_p)
        assert tokens.tolist() == cells


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_ends_of_the_unit_interval(
    backend: Backend, small_blocks: None, top_k: int | None, top_p: float | None, dtype: torch.dtype
) -> None:
    """u = 0 and the largest u below 1 fall on tokens that can be drawn, at the first and last places of them."""
    rows = edge_cases.logits_of("normal", (1, 40), dtype).repeat(2, 1)
    rows[:, :7] = -math.inf
    rows[:, 31:] = -math.inf
    probability, _ = truth.sampling_distribution(rows, torch.ones(2, dtype=torch.float64), top_k, top_p)
    possible = probability[0].nonzero().flatten()
    uniform = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    tokens, logprobs = draw(backend, rows, uniform, top_k=top_k, top_p=top_p)
    assert tokens.tolist() == [possible[0].item(), possible[-1].item()]
    assert logprobs.isfinite().all()


def test_one_certain_token(backend: Backend) -> None:
    logits = torch.full((4, 50), -math.inf)
    logits[:, 17] = -1e4
    uniform = torch.tensor([0.0, 0.5, 1 - 2.0**-53, 2.0**-53], dtype=torch.float64)
    for top_k, top_p in FILTERS:
        tokens, logprobs = draw(backend, logits, uniform, top_k=top_k, top_p=top_p)
        assert (tokens == 17).all()
        assert (logprobs == 0).all()


@pytest.mark.parametrize("top_p", [None, 0.7])
def test_ties_with_the_last_token_are_kept(backend: Backend, small_blocks: None, top_p: float | None) -> None:
    """-0.0 and 0.0 tie as well."""
    row = torch.tensor([2.0, 1.0, 0.0, -0.0, 0.0, -3.0, -4.0])
    options = {"top_k": 3} if top_p is None else {"top_p": 0.85}
    count = 16 if backend.interpreted else 4000  # the least likely has 0.07
    tokens, _ = draw(backend, row.expand(count, 7), (torch.arange(count).double() + 0.5) / count, **options)
    assert set(tokens.tolist()) == {0, 1, 2, 3, 4}


def _kept(backend: Backend, row: Tensor, options: dict[str, object]) -> set[int]:
    """The tokens that some u of a fine grid brings."""
    count = 16 if backend.interpreted else 20_000
    uniform = (torch.arange(count).double() + 0.5) / count
    return set(draw(backend, row.expand(count, len(row)), uniform, **options)[0].tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"top_k": 4}, {"top_p": 0.75}, {"top_k": 6, "top_p": 0.75}], ids=str)
def test_the_kept_tokens_are_those_of_transformers(
    backend: Backend, small_blocks: None, options: dict[str, object], dtype: torch.dtype
) -> None:
    if backend.interpreted and dtype == torch.float32:
        pytest.skip("twice the passes over the row of bfloat16, at the interpreter's price")
    row = (1.5 * torch.linspace(-1, 1, 12)).to(dtype)[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    scores = row.float()[None] / 0.9
    if "top_k" in options:
        scores = TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = TopPLogitsWarper(options["top_p"])(None, scores)
    kept = set(scores[0].isfinite().nonzero().flatten().tolist())
    assert _kept(backend, row, {"temperature": 0.9, **options}) == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_frequencies(temperature: float, top_k: int | None, top_p: float | None, dtype: torch.dtype) -> None:
    """Chi-square of 50,000 draws with a fixed seed against the exact distribution."""
    row = edge_cases.logits_of("normal", (1, 30), dtype) / 2
    draws = 50_000
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    tokens, logprobs = rk.sample_tokens(row.expand(draws, 30), seed=1234, **options)
    probability, _ = truth.sampling_distribution(row, torch.tensor([temperature], dtype=torch.float64), top_k, top_p)
    counts = torch.bincount(tokens, minlength=30).double()
    assert counts[probability[0] == 0].sum() == 0
    likely = probability[0] * draws > 10
    expected = probability[0][likely] * draws
    statistic = ((counts[likely] - expected).square() / expected).sum().item()
    freedom = max(int(likely.sum()) - 1, 1)
    # Wilson and Hilferty's quantile of chi-square for one in a million.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    exact = probability[0].log()[tokens]
    truth.assert_accurate(logprobs, exact, 5e-7)


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_logprob_is_that_of_the_filtered_logits(
    backend: Backend, small_blocks: None, top_k: int | None, top_p: float | None
) -> None:
    rows, V = (3, 140) if backend.interpreted else (40, 2000)
    logits = edge_cases.logits_of("normal", (rows, V), torch.float32)
    tokens, logprobs = draw(backend, logits, _uniform(rows), temperature=0.8, top_k=top_k, top_p=top_p)
    divisor = torch.full((rows,), 0.8, dtype=torch.float64)
    probability, _ = truth.sampling_distribution(logits, divisor, top_k, top_p)
    filtered = logits.masked_fill(probability == 0, -math.inf)
    with rk.use_backend("reference"):
        expected = rk.selected_logprobs(filtered, tokens, temperature=0.8)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", edge_cases.LAYOUTS)
@pytest.mark.parametrize("V", [48, 37])
def test_every_layout(backend: Backend, layout: str, V: int) -> None:
    logits = edge_cases.logits_of("normal", (3, 2, V), torch.bfloat16)
    placed = edge_cases.LAYOUTS[layout](logits)
    options = {} if backend.interpreted else {"top_p": 0.9}
    expected = draw(backend, logits, _uniform(6), **options)
    for a, b in zip(draw(backend, placed, _uniform(6), **options), expected, strict=True):
        assert torch.equal(a, b)
    check(backend, placed, _uniform(6), **options)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 2), (0,), (3, 0)])
def test_every_leading_shape(backend: Backend, shape: tuple[int, ...]) -> None:
    logits = edge_cases.logits_of("normal", (*shape, 40), torch.float32)
    check(backend, logits, _uniform(math.prod(shape)), top_k=7)


@pytest.mark.parametrize("kind", edge_cases.MASKS)
def test_every_mask_over_rows_that_nobody_may_read(backend: Backend, kind: str) -> None:
    shape = torch.Size((2, 4))
    mask = edge_cases.MASKS[kind](shape)
    logits = edge_cases.logits_of("normal", (*shape, 70), torch.float32)
    logits, _ = edge_cases.spoil(logits, torch.zeros(shape, dtype=torch.int64), mask)
    check(backend, logits, _uniform(8), mask, top_k=9, top_p=0.8)
    check(backend, logits, _uniform(8), mask)


def test_temperature_per_row(backend: Backend) -> None:
    logits = edge_cases.logits_of("normal", (2, 3, 60), torch.float32)
    for temperature in (torch.tensor([[0.5, 1.0, 2.0]]), torch.tensor([[0.3], [1.7]]), torch.tensor(0.9)):
        rows = sampling.rows.row_temperature("", temperature, logits, torch.Size((2, 3)), None, None)
        check(backend, logits, _uniform(6), None, rows, top_p=0.8)


def test_u_of_a_row_is_a_function_of_seed_and_row() -> None:
    device = torch.device("cpu")
    numbers = sampling.reference.uniforms(7, 1000, device)
    assert torch.equal(sampling.reference.uniforms(7, 10, device), numbers[:10])
    # Known values: splitmix64's finaliser in Python's own integers.
    assert numbers[:3].tolist() == [_splitmix(7, n) for n in range(3)]
    assert sampling.reference.uniforms(2**63 - 1, 2, device).tolist() == [_splitmix(2**63 - 1, n) for n in range(2)]
    many = torch.stack([sampling.reference.uniforms(seed, 400, device) for seed in range(400)])
    assert ((many >= 0) & (many < 1)).all()
    assert many.unique().numel() == many.numel()
    assert abs(many.mean().item() - 0.5) < 0.004  # 5 standard errors of 160,000 draws
    for axis in (0, 1):  # neighbouring seeds, neighbouring rows
        pairs = torch.stack([many.narrow(axis, 0, 399).flatten(), many.narrow(axis, 1, 399).flatten()])
        assert abs(pairs.corrcoef()[0, 1].item()) < 0.0125


def test_uniform_is_not_read_where_the_mask_hides_a_row(backend: Backend) -> None:
    logits = torch.randn(2, 6, 50, device=backend.device)
    mask = torch.tensor([[True, False, True, False, False, False], [True] * 6], device=backend.device)
    uniform = torch.rand(2, 6, dtype=torch.float64, device=backend.device)
    hidden = torch.tensor([7.0, -1.0, math.nan, math.inf], dtype=torch.float64, device=backend.device)
    spoilt = uniform.masked_scatter(~mask, hidden)
    for options in ({}, {"top_k": 5, "top_p": 0.7}):
        expected = rk.sample_tokens(logits, uniform=uniform, mask=mask, **options)
        for got, one in zip(rk.sample_tokens(logits, uniform=spoilt, mask=mask, **options), expected, strict=True):
            assert torch.equal(got, one)
            assert (got[~mask] == 0).all()
    for wrong in hidden if backend.device == "cpu" else ():
        with pytest.raises(ValueError, match="uniform holds a value outside"):
            rk.sample_tokens(logits, uniform=torch.where(mask, wrong, uniform), mask=mask)


def _splitmix(seed: int, row: int) -> float:
    full = (1 << 64) - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & full
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & full
        return x ^ (x >> 31)

    return (mix((mix(seed) + (row + 1) * 0x9E3779B97F4A7C15) & full) >> 11) * 2.0**-53


def test_uniform_given(backend: Backend) -> None:
    """Any numbers in any order of the rows: the u of a row goes with it."""
    logits = torch.randn(2, 15, 50, device=backend.device)
    uniform = torch.rand(2, 15, dtype=torch.float64, device=backend.device)
    tokens, logprobs = rk.sample_tokens(logits, uniform=uniform)
    alone = [rk.sample_tokens(logits[1, n], uniform=uniform[1, n]) for n in range(15)]
    assert torch.equal(tokens[1], torch.stack([token for token, _ in alone]))
    assert torch.equal(logprobs[1], torch.stack([logprob for _, logprob in alone]))
    order = torch.randperm(15, device=backend.device)[:7]
    some, their_logprobs = rk.sample_tokens(logits[:, order], uniform=uniform[:, order])
    assert torch.equal(some, tokens[:, order])
    assert torch.equal(their_logprobs, logprobs[:, order])
    assert torch.equal(rk.sample_tokens(logits, uniform=torch.zeros_like(uniform))[0], torch.zeros_like(tokens))


def test_generator_and_seed(backend: Backend) -> None:
    logits = edge_cases.logits_of("normal", (8, 40), torch.float32).to(backend.device)

    def with_generator(seed: int) -> Tensor:
        return rk.sample_tokens(logits, generator=torch.Generator(backend.device).manual_seed(seed))[0]

    assert torch.equal(with_generator(3), with_generator(3))
    assert not torch.equal(with_generator(3), with_generator(4))
    first, second = (rk.sample_tokens(logits, seed=seed)[0] for seed in (3, 4))
    assert torch.equal(first, rk.sample_tokens(logits, seed=3)[0])
    assert not torch.equal(first, second)
    assert torch.equal(rk.sample_tokens(logits[:5], seed=3)[0], first[:5])
    torch.manual_seed(5)
    drawn = rk.sample_tokens(logits)[0]
    torch.manual_seed(5)
    assert torch.equal(rk.sample_tokens(logits)[0], drawn)


def test_nothing_is_differentiable(backend: Backend) -> None:
    logits = edge_cases.logits_of("normal", (2, 20), torch.float32).to(backend.device).requires_grad_()
    tokens, logprobs = rk.sample_tokens(logits, seed=1)
    assert not tokens.requires_grad
    assert not logprobs.requires_grad
    assert rk.sample_tokens(logits.double(), seed=1)[1].dtype == torch.float64


def test_refusals() -> None:
    logits = torch.zeros(3, 5)
    generator = torch.Generator()
    for error, text, options in (
        (ValueError, "generator and seed are both given", {"generator": generator, "seed": 1}),
        (TypeError, "generator is a int", {"generator": 3}),
        (ValueError, r"seed is -1; it takes an int in \[0", {"seed": -1}),
        (ValueError, "seed is 9223372036854775808", {"seed": 1 << 63}),
        (TypeError, "seed is a float", {"seed": 1.0}),
        (ValueError, r"top_k is 0; it takes an int in \[1", {"top_k": 0}),
        (TypeError, "top_k is a float", {"top_k": 5.0}),
        (TypeError, "top_k is a bool", {"top_k": True}),
        (ValueError, "top_p is 0.0", {"top_p": 0.0}),
        (ValueError, "top_p is 1.1", {"top_p": 1.1}),
        (ValueError, "top_p is nan", {"top_p": math.nan}),
        (ValueError, "temperature is 0", {"temperature": 0.0}),
        (ValueError, "temperature holds a value", {"temperature": torch.tensor([1.0, 0.0, 1.0])}),
        (ValueError, r"temperature has shape \[2\]", {"temperature": torch.ones(2)}),
        (ValueError, r"mask has shape \[5\]", {"mask": torch.ones(5)}),
        (TypeError, "uniform is torch.float32", {"uniform": torch.zeros(3)}),
        (TypeError, "uniform is float", {"uniform": 0.5}),
        (ValueError, r"uniform has shape \[2\]", {"uniform": torch.zeros(2, dtype=torch.float64)}),
        (ValueError, "uniform holds a value outside", {"uniform": torch.ones(3, dtype=torch.float64)}),
        (ValueError, "uniform is given, and", {"uniform": torch.zeros(3, dtype=torch.float64), "seed": 1}),
    ):
        with pytest.raises(error, match=rf"sample_tokens: {text}"):
            rk.sample_tokens(logits, **options)
    for error, text, bad in (
        (TypeError, "logits is torch.int64", torch.zeros(3, 5, dtype=torch.int64)),
        (TypeError, "logits is a list", [1.0]),
        (ValueError, r"logits has shape \[3, 0\]", torch.zeros(3, 0)),
    ):
        with pytest.raises(error, match=rf"sample_tokens: {text}"):
            rk.sample_tokens(bad)
