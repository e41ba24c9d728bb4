"""The native module under every instruction set this machine has: accuracy, bits, conversions, threads, processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import edge_cases, programs
from support.backends import Backend, require_backend
from support.checks import full_kl, ppo_advantages, scan, scan_packed
from support.checks.logits import check as check_logprobs
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import rlhf_kernels as rk
from rlhf_kernels import dispatch
from rlhf_kernels.reference import scan as reference

CPU = Backend("cpu", "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ISAS = dispatch.backend_module("cpu")._native.available_isas() if dispatch.available()["cpu"] is None else ["not built"]


@pytest.fixture(autouse=True)
def _forced() -> Iterator[None]:
    require_backend("cpu")
    with rk.use_backend("cpu"):
        yield


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn, restored after."""
    native = dispatch.backend_module("cpu")._native
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, which may die; a hang is a failure."""
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=120
    )


def _case(rows: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return edge_cases.logits_of("normal", (rows, V), dtype), edge_cases.labels_for((rows,), V)


def _everything(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """logprobs, entropy, gradient."""
    x = logits.detach().requires_grad_()
    outputs = rk.selected_logprobs(x, labels, temperature=0.7, with_entropy=True)
    (grad,) = torch.autograd.grad(outputs, x, [torch.ones(labels.shape), torch.full(labels.shape, 0.3)])
    return [*(x.detach() for x in outputs), grad]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value_class", edge_cases.LOGITS)
def test_accuracy_of_logprobs(isa: str, value_class: str, dtype: torch.dtype) -> None:
    V = 2500  # two full blocks of 1024 and a short one
    logits = edge_cases.logits_of(value_class, (4, V), dtype)
    check_logprobs(CPU, logits, torch.tensor([0, V // 2, V - 1, 1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value_class", edge_cases.LOGITS)
def test_accuracy_of_full_kl(isa: str, value_class: str, dtype: torch.dtype) -> None:
    V = 2500
    logits, ref = (edge_cases.logits_of(value_class, (2, V), dtype, seed) for seed in range(2))
    full_kl.check(CPU, logits, ref)
    full_kl.check(CPU, logits, edge_cases.logits_of("normal", (2, V), dtype), directions=["reverse", "jsd"])
    full_kl.check(CPU, edge_cases.logits_of("normal", (2, V), dtype), ref, directions=["forward"])


@pytest.mark.parametrize("V", [1, 17, 63, 65, 1023, 1024, 1025, 2049])
def test_full_kl_around_block_sizes(isa: str, V: int) -> None:
    pair = (edge_cases.logits_of("normal", (4, V), torch.float16, seed) for seed in range(2))
    full_kl.check(CPU, *pair)


@pytest.mark.parametrize("V", [1, 17, 63, 64, 65, 1023, 1024, 1025, 2049])
def test_accuracy_around_block_sizes(isa: str, V: int) -> None:
    logits, labels = _case(40, V, torch.bfloat16)
    check_logprobs(CPU, logits, labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", scan.MASKED)
def test_accuracy_of_gae(isa: str, masked: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for batch, time in ((1, 1), (7, 3), (9, 8), (17, 41)):  # around the eight positions of a vector
        rewards, values = (torch.randn(batch, time, generator=generator).to(dtype) for _ in range(2))
        mask = torch.rand(batch, time, generator=generator) > 0.3
        bootstrap = torch.randn(batch, generator=generator)
        scan.check(CPU, *edge_cases.hide(mask, rewards, values), mask, bootstrap, masked)
    lengths = torch.randint(0, 40, (50,), generator=generator).tolist()
    rewards, values, bootstrap = (x.to(dtype) for x in scan_packed.packed_case(lengths))
    scan_packed.check(CPU, lengths, rewards, values, None, bootstrap, masked)


@pytest.mark.parametrize("masked", scan.MASKED)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1e-3, 1e-3), (1.0, 0.0)])
def test_an_infinity_is_what_the_recurrence_makes_of_it(isa: str, gamma: float, lam: float, masked: str) -> None:
    """Though powers of the decay underflow, and sums of a few terms overflow that the whole sum does not."""
    generator = torch.Generator().manual_seed(2)
    rewards, values = (torch.randn(4, 50, generator=generator) for _ in range(2))
    mask = torch.arange(50) % 11 != 3
    rewards[0, 20] = rewards[1, 20] = float("inf")
    rewards[1, 30] = rewards[2, 45] = float("-inf")
    if gamma == 1.0:
        rewards[3, 30:33] = torch.tensor([3e38, 3e38, -3e38])
    for kept in (None, mask.expand(4, 50)):
        got = rk.gae(rewards, values, kept, gamma=gamma, lam=lam, masked=masked)
        expected = reference.gae(rewards, values, kept, None, gamma, lam, masked)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_of_ppo_advantages(isa: str, dtype: torch.dtype) -> None:
    for batch, time in ((7, 3), (9, 8), (17, 41)):
        mask = ppo_advantages.mask_of("holes", batch, time)
        for whiten in (False, True):
            ppo_advantages.check(CPU, ppo_advantages.rollout(batch, time, dtype=dtype), mask, whiten=whiten)


def test_bits_do_not_depend_on_threads_or_neighbours(isa: str, threads: int) -> None:
    logits, labels = _case(257, 1500)
    torch.set_num_threads(1)
    rows = [_everything(*_row(logits, labels, n)) for n in (0, 100, 256)]
    alone = [torch.cat(parts) for parts in zip(*rows, strict=True)]
    torch.set_num_threads(threads)
    for a, b in zip(alone, _everything(logits, labels), strict=True):
        assert torch.equal(a, b[[0, 100, 256]])
    rewards, values = edge_cases.logits_of("normal", (2, 257, 300), torch.float32)
    together = rk.gae(rewards, values)
    for n in (0, 100, 256):
        for a, b in zip(together, rk.gae(rewards[n], values[n]), strict=True):
            assert torch.equal(a[n], b)
    packed = rk.gae(rewards.flatten(), values.flatten(), cu_seqlens=torch.arange(0, 257 * 300 + 1, 300))
    for a, b in zip(together, packed, strict=True):
        assert torch.equal(a.flatten(), b)


def _row(logits: Tensor, labels: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return logits[n : n + 1].clone(), labels[n : n + 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_is_read_exactly(isa: str, dtype: torch.dtype) -> None:
    """With gamma = 0 and no value an advantage is its reward."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(64, 1024)
    advantages, _ = rk.gae(x, torch.zeros_like(x), gamma=0.0)
    # 0 * infinity: what follows an infinite or NaN reward is NaN, so those are looked at alone.
    spoilt = ~x.isfinite()
    finite = torch.where(spoilt, 0, x)
    torch.testing.assert_close(rk.gae(finite, torch.zeros_like(x), gamma=0.0)[0], finite.float(), rtol=0, atol=0)
    last = x[spoilt].unsqueeze(-1)
    advantages, _ = rk.gae(last, torch.zeros_like(last), gamma=0.0)
    torch.testing.assert_close(advantages, last.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_are_rounded_to_nearest_even(isa: str, dtype: torch.dtype) -> None:
    """With m = log_s = 0 and logits 0, the gradient beside the label is -g: every rounding is that of `.to(dtype)`."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    numbers = numbers[numbers.isfinite()]
    bits = numbers.view(torch.int32)
    half = torch.tensor([0, 1, 2**12, 2**13 - 1, 2**15, 2**15 + 1, 2**16 - 1], dtype=torch.int32)
    g = (bits[:, None] + half).view(torch.float32).flatten()  # numbers, midpoints, and their neighbours
    g = g[g.isfinite()]
    N = len(g)
    grad = dispatch.backend_module("cpu").selected_logprobs_bwd(
        -g, None, torch.zeros(1, N, 2, dtype=dtype), torch.zeros(N, dtype=torch.int64), None, 1.0, None,
        torch.zeros(N, 2), torch.zeros(N), False,
    )  # fmt: skip
    expected = g.to(dtype)
    expected[g == 0] = 0  # a row without an upstream gradient is +0
    assert torch.equal(grad[0, :, 1].view(torch.int16), expected.view(torch.int16))


def test_in_place_gradient_has_the_same_bits_and_skipped_rows_are_not_read(isa: str) -> None:
    logits, labels = _case(5, 1100, torch.bfloat16)
    mask = torch.tensor([True, False, True, True, True])
    logits[1] = logits[3] = float("nan")
    g = torch.tensor([1.0, 2.0, -1.0, 0.0, 3.0])
    backend = dispatch.backend_module("cpu")
    arguments = (labels, mask, 1.0, None)
    _, _, stats = backend.selected_logprobs_fwd(logits[None], *arguments, False)
    fresh = backend.selected_logprobs_bwd(g, None, logits[None], *arguments, stats, stats[:0, 0], False)
    wide = torch.full((5, 1200), 7.0, dtype=logits.dtype)
    wide[:, :1100] = logits
    over = backend.selected_logprobs_bwd(g, None, wide[None, :, :1100], *arguments, stats, stats[:0, 0], True)
    assert torch.equal(fresh, over)
    assert over.data_ptr() == wide.data_ptr()
    assert (wide[:, 1100:] == 7).all()
    assert (fresh[0, [1, 3]] == 0).all()  # masked; without an upstream gradient, though the row is NaN
    assert (fresh[0, [0, 2, 4]] != 0).any(-1).all()


def test_strided_and_expanded_rows(isa: str) -> None:
    logits, labels = _case(6, 1030)
    expected = _everything(logits, labels)
    strided = torch.full((2, 3, 2, 1035), float("nan"))[:, :, 0, 3:1033].copy_(logits.view(2, 3, 1030))
    for a, b in zip(expected, _everything(strided, labels.view(2, 3)), strict=True):
        assert torch.equal(a, b.reshape(a.shape))
    expanded = _everything(logits[:1].expand(4, -1), labels[:1].expand(4))
    for a, b in zip(_everything(logits[:1], labels[:1]), expanded, strict=True):
        assert torch.equal(a.expand_as(b), b)


@pytest.mark.parametrize("side", ["behind", "before", "far"])
def test_memory(isa: str, side: str) -> None:
    """Guard pages and offsets past 2**31 for each instruction set."""
    done = programs.run("guarded_memory", "cpu", side, environment={**os.environ, "RLHF_KERNELS_ISA": isa})
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 0


def test_several_python_threads(isa: str) -> None:
    cases = [_case(40, 900 + n) for n in range(8)]
    expected = [_everything(*case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for one, other in zip(expected, pool.map(lambda case: _everything(*case), cases), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class _Logprobs(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return rk.selected_logprobs(*_case(64, 1000 + index))


def test_dataloader_workers() -> None:
    expected = [_Logprobs()[n] for n in range(6)]  # starts the parent's threads
    loader = DataLoader(_Logprobs(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    for a, b in zip(expected, loader, strict=True):
        assert torch.equal(a, b)


def test_bare_fork_does_not_hang() -> None:
    """torch's own parallel ops do hang there: the child has none of the OpenMP team."""
    done = _python(
        "import os, torch, rlhf_kernels as rk\n"
        "torch.set_num_threads(2)\n"
        "x, labels = torch.randn(64, 4096), torch.zeros(64, dtype=torch.int64)\n"
        "with rk.use_backend('cpu'):\n"
        "    before = rk.selected_logprobs(x, labels)\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        backend = rk.dispatch.backend_module('cpu')\n"
        "        after, _, _ = backend.selected_logprobs_fwd(x[None], labels, None, 1.0, None, False)\n"
        "        os._exit(0 if after.tolist() == before.tolist() else 1)\n"
        "    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert done.returncode == 0, done.stderr


def test_first_bad_label_is_named_and_nothing_computed() -> None:
    logits, labels = _case(50, 30)
    mask = torch.ones(50, dtype=torch.bool)
    labels[[3, 20, 40]] = torch.tensor([-100, 30, -1])
    mask[3] = False
    for dtype in (torch.int64, torch.int32):
        with pytest.raises(IndexError, match=r"label 30 at row 20\b.*\[0, 30\)"):
            rk.selected_logprobs(logits, labels.to(dtype), mask=mask)


@pytest.mark.parametrize("name", ISAS)
def test_environment_forces_an_instruction_set(name: str) -> None:
    program = "from rlhf_kernels import _native; print(_native.isa())"
    done = _python(program, RLHF_KERNELS_ISA=name)
    assert done.stdout.strip() == name, done.stderr


def test_environment_names_an_unknown_instruction_set() -> None:
    done = _python("from rlhf_kernels import _native", RLHF_KERNELS_ISA="x86-64-v9")
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: RLHF_KERNELS_ISA: 'x86-64-v9'")
    assert all(name in message for name in ISAS)
    with pytest.raises(ValueError, match="'sse9' is not an instruction set of this machine"):
        dispatch.backend_module("cpu")._native.set_isa("sse9")


def test_the_best_instruction_set_is_chosen() -> None:
    program = "from rlhf_kernels import _native; print(_native.isa())"
    assert _python(program, RLHF_KERNELS_ISA="").stdout.strip() == ISAS[0]
