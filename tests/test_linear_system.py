"""The linear family as a whole: sharded vocabularies, peak memory, accuracy over many chunks, bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from support import linear_truth, programs
from support.backends import Backend, require_backend
from support.checks.linear import head, run

import rlhf_kernels as rk


def _run(program: str, *arguments: str) -> str:
    done = programs.run(program, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("world", [2, 4])
def test_vocabulary_sharded_over_processes(world: int) -> None:
    require_backend("cpu")
    _run("linear_ranks", str(world))


class Peak(NamedTuple):
    op: str
    dtype: str
    N: int
    V: int
    D: int
    workspace: int  # KiB
    accumulator: bool = False  # a 16-bit weight's gradient, and several chunks: an fp32 sum of its size


# Each would pass its bound if it held one matrix [N, V] of logits, or [V, D], more than it should.
CASES = {
    "logprobs, logits made again": Peak("logprobs", "float32", 1024, 32001, 16, 64 << 10),
    "logprobs, 16-bit logits made again": Peak("logprobs", "bfloat16", 320, 64128, 4, 4 << 10),
    "logprobs, logits in the memory of dW": Peak("logprobs", "float32", 104, 128256, 104, 16 << 10),
    "logprobs, 16-bit logits there": Peak("logprobs", "bfloat16", 8, 16032, 1024, 1 << 10),
    "logprobs, accumulator": Peak("logprobs", "bfloat16", 8, 16032, 1024, 48, True),
    "logprobs, head frozen": Peak("frozen", "float32", 1024, 32001, 256, 8 << 10),
    "logprobs, 16-bit head frozen": Peak("frozen", "bfloat16", 1024, 32001, 256, 8 << 10),
    "policy": Peak("policy", "float32", 1024, 32001, 16, 64 << 10),
    "policy, 16-bit": Peak("policy", "bfloat16", 320, 64128, 4, 4 << 10, True),
    "policy, 16-bit, one chunk": Peak("policy", "bfloat16", 8, 16032, 1024, 1 << 10),
    "policy, accumulator": Peak("policy", "bfloat16", 20, 1 << 20, 8, 8 << 10, True),
    "adapter, weight frozen": Peak("lora", "float32", 64, 16032, 1024, 16 << 10),  # no copy with B @ A in it
    "jsd of a shard": Peak("sharded_jsd", "float32", 400, 32001, 8, 64 << 10),  # 89 MiB: its terms in float64
    "kl, 16-bit": Peak("kl", "bfloat16", 800, 16032, 128, 4 << 10, True),
}
# Products of 16-bit matrices are rounded or stay float32, whatever this CPU would do.
PEAKS = {(name, products): case for name, case in CASES.items() for products in sorted({case.dtype, "float32"})}


# In every run; the others are a sweep.
QUICK = ("logprobs, 16-bit logits made again", "logprobs, accumulator", "policy, 16-bit, one chunk", "kl, 16-bit")


def named_peaks() -> Iterator[ParameterSet]:
    for name, products in PEAKS:
        yield pytest.param(name, products, marks=[] if name in QUICK else pytest.mark.sweep)


@pytest.fixture(scope="module")
def peaks(request: pytest.FixtureRequest) -> dict[tuple[str, str], list[int]]:
    """Bytes beyond inputs and gradients in each of PEAKS, and the library's share of them."""
    require_backend("cpu")
    wanted = {item.callspec.id for item in request.session.items if item.name.startswith("test_peak_memory[")}
    chosen = {key: peak for key, peak in PEAKS.items() if "-".join(key) in wanted}
    cases = (":".join(map(str, (*peak[:2], products, *peak[2:6]))) for (_, products), peak in chosen.items())
    lines = _run("linear_memory", *cases).splitlines()
    return {name: list(map(int, line.split())) for name, line in zip(chosen, lines, strict=True)}


@pytest.mark.parametrize(("name", "products"), list(named_peaks()))
def test_peak_memory(peaks: dict[tuple[str, str], list[int]], name: str, products: str) -> None:
    """At most the workspace and 32 MiB beyond what the library takes for one product by itself.

    An fp32 accumulator only where several chunks add to a 16-bit gradient.
    """
    case, (peak, library) = CASES[name], peaks[name, products]
    accumulator = case.accumulator * 4 * case.V * case.D
    bound = (case.workspace << 10) + (32 << 20) + accumulator + library
    assert peak <= bound, f"{peak / 2**20:.0f} of {bound / 2**20:.0f} MiB"
    assert peak > 0.95 * accumulator, "nothing is measured where none is used"  # Linux counts pages in batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_of_the_weight_gradient_stays_flat_over_chunks(dtype: torch.dtype) -> None:
    """1 to 1024 chunks, at most twice the error and two ulp of the fp32 sum; a 16-bit accumulator's grows 7-fold.

    Root mean squares, because the largest error of a few hundred elements is a lottery.
    """
    require_backend("cpu")
    case = head(1024, 16, 40, dtype, bias=False)
    g = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    expected = linear_truth.logprobs(case, g, torch.zeros(1024))[3]
    errors = {}
    with rk.use_backend("cpu"):
        for chunks in (1, 4, 32, 256, 1024):
            leaf = case.weight.clone().requires_grad_()
            # A workspace of 2 * rows * (size + 4) * D bytes makes chunks of that many rows.
            workspace = 2 * (1024 // chunks) * (case.hidden.element_size() + 4) * 16
            logprobs = rk.linear_logprobs(case.hidden, leaf, case.labels, workspace=workspace)
            (grad,) = torch.autograd.grad(logprobs, leaf, g)
            errors[chunks] = (grad.double() - expected).square().mean().sqrt().item()
    ulp = torch.finfo(torch.float32).eps * expected.square().mean().sqrt().item()
    assert max(errors.values()) <= 2 * errors[1] + 2 * ulp, errors


def test_runs_give_the_same_bits(kernel_backend: Backend) -> None:
    """At one number of threads: with another a library's GEMM may sum in another order."""
    case = head(9, 16, 300 if kernel_backend.interpreted else 3000)
    first = run(kernel_backend, case, workspace=20_000)
    for _ in range(3):
        for a, b in zip(run(kernel_backend, case, workspace=20_000), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariant_rows(kernel_backend: Backend, dtype: torch.dtype) -> None:
    """A row alone, in any place and any batch: the same bits, which a library's GEMM does not give."""
    rows, vocab = (9, 200) if kernel_backend.interpreted else (257, 5003)
    case = head(rows, 100, vocab, dtype, bias=False)

    def logprobs(part: torch.Tensor | slice) -> list[torch.Tensor]:
        hidden, labels = (x[part].to(kernel_backend.device) for x in (case.hidden, case.labels))
        weight = case.weight.to(kernel_backend.device)
        return list(rk.linear_logprobs(hidden, weight, labels, with_entropy=True, batch_invariant=True))

    whole = logprobs(slice(None))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    for part in (order, slice(0, 1), slice(3, 4), slice(rows - 1, None), slice(1, 4), slice(2, 8)):
        for a, b in zip(logprobs(part), whole, strict=True):
            assert torch.equal(a, b[part])
