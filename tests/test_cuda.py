"""The CUDA C++ scan: its code run on the CPU, thread by thread, against truth; what nvcc made of it; its backend."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support import edge_cases, guarded_memory, strategies, truth
from support.backends import require_backend
from torch import Tensor

import rlhf_kernels as rk

HERE = Path(__file__).parent
CHUNK = 256  # positions of a block in tests/cuda_on_cpu/scan.cpp
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FRESH = 7e7  # what outputs hold before a kernel writes them
MASKED = ("skip", "stop", "zero")
Scan = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Scan:
    """csrc/cuda/scan.cuh compiled by the host's compiler against tests/cuda_on_cpu, a thread being a fiber."""
    compiler = shutil.which("g++") or pytest.skip("no g++ to build tests/cuda_on_cpu with")
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "scan.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    command = [compiler, *flags, f"-I{HERE / 'cuda_on_cpu'}", str(HERE / "cuda_on_cpu/scan.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    kernel = ctypes.CDLL(str(library)).gae

    def call(
        rewards: Tensor,
        values: Tensor,
        mask: Tensor | None = None,
        bootstrap: Tensor | None = None,
        masked: str = "skip",
        gamma: float = 0.97,
        lam: float = 0.95,
        offsets: Tensor | None = None,
        first_thread: int = 0,
    ) -> tuple[Tensor, Tensor]:
        outputs = [guarded_memory.guarded(torch.full(rewards.shape, FRESH), "behind") for _ in range(2)]
        if rewards.dim() == 2:
            rows, time = rewards.shape
            strides = [rewards.stride(0), values.stride(0), 0 if mask is None else mask.stride(0)]
        else:
            rows, time, strides = len(offsets) - 1, len(rewards), [0, 0, 0]

        def address(x: Tensor | None) -> ctypes.c_void_p:
            return ctypes.c_void_p(None if x is None else x.data_ptr())

        kernel(
            address(rewards),
            address(values),
            DTYPES[rewards.dtype],
            address(mask),
            address(bootstrap),
            address(offsets),
            0 if offsets is None else offsets.element_size(),
            *map(ctypes.c_int64, (rows, time, *strides)),
            ctypes.c_double(gamma),
            ctypes.c_double(lam),
            MASKED.index(masked),
            *map(address, outputs),
            ctypes.c_uint(first_thread),
        )
        return outputs[0], outputs[1]

    return call


def _check(got: tuple[Tensor, Tensor], rewards: Tensor, values: Tensor, mask: Tensor | None, *rest) -> None:
    if mask is not None:
        rewards, values = (torch.where(mask, x, torch.zeros_like(x)) for x in (rewards, values))
    bootstrap, masked, gamma, lam = rest
    expected = truth.gae(rewards, values, mask, bootstrap, gamma, lam, masked)
    by_loop = truth.gae_loop_error(rewards, values, mask, bootstrap, gamma, lam, masked)
    for actual, exact, error in zip(got, expected, by_loop, strict=True):
        truth.assert_accurate(actual, exact, error)
        if mask is not None:
            assert (actual[~mask] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", MASKED)
@pytest.mark.parametrize("kind", edge_cases.MASKS)
def test_every_semantics_and_mask(scan: Scan, kind: str, masked: str, dtype: torch.dtype) -> None:
    """Lengths around a thread's pack, a warp and a chunk, on memory fenced behind its last byte."""
    for time in (1, 4, 5, CHUNK, CHUNK + 1, 2 * CHUNK + 130):
        rewards, values = edge_cases.logits_of("normal", (2, 2, time), dtype, seed=time)
        mask = edge_cases.MASKS[kind](rewards.shape)
        bootstrap = torch.tensor([0.7, -1.2]) if time % 2 else None
        plain = (*edge_cases.hide(mask, rewards, values), mask, bootstrap)
        fenced = [None if x is None else guarded_memory.guarded(x, "behind") for x in plain]
        _check(scan(*fenced, masked, 0.97, 0.9), *plain, masked, 0.97, 0.9)


@settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(call=strategies.gae_calls())
def test_random_calls(scan: Scan, call: strategies.GaeCall) -> None:
    """Strided rows among them, whose packs are not aligned."""
    got = scan(*call[:5], call.gamma, call.lam)
    _check(got, *call)


def test_packed_sequences_are_the_padded_ones(scan: Scan) -> None:
    """To the bit, empty sequences and packs off their alignment included."""
    lengths = [5, 0, 300, 1, 0, 257, 4]
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    rewards, values = edge_cases.logits_of("normal", (2, int(offsets[-1])), torch.float32)
    mask = torch.arange(len(rewards)) % 5 != 3
    bootstrap = torch.arange(len(lengths)) / 3
    for masked, width in itertools.product(MASKED, (torch.int32, torch.int64)):
        got = scan(rewards, values, mask, bootstrap, masked, offsets=offsets.to(width))
        for n, length in enumerate(lengths):
            piece = slice(int(offsets[n]), int(offsets[n + 1]))
            row = [x[None, piece].clone() for x in (rewards, values, mask)]
            if length:
                for packed, padded in zip(got, scan(*row, bootstrap[n : n + 1], masked), strict=True):
                    assert torch.equal(packed[piece], padded[0])


@pytest.mark.parametrize("wrong", [[-5, 4, 20], [2, 1, 9], [0, 40, 9], [3, 3, 3], [0, 2**31 - 1, -(2**31)]])
def test_wrong_offsets_stay_inside(scan: Scan, wrong: list[int]) -> None:
    for side in ("behind", "before"):
        rewards, values = (guarded_memory.guarded(torch.ones(9), side) for _ in range(2))
        for output in scan(rewards, values, offsets=torch.tensor(wrong, dtype=torch.int32)):
            assert (output != FRESH).all()
            assert output[edge_cases.covered(wrong, 9) == 0].isnan().all()
            first, last = (min(max(n, 0), 9) for n in (wrong[0], wrong[-1]))
            assert output[first:last].isfinite().all()


def test_the_order_of_threads_and_padding_change_no_bit(scan: Scan) -> None:
    rewards, values = edge_cases.logits_of("normal", (2, 3, 600), torch.float32)
    mask = torch.arange(600).expand(3, 600) < torch.tensor([[600], [311], [255]])
    expected = scan(rewards, values, mask)
    for first in (1, 17, 63):
        for a, b in zip(expected, scan(rewards, values, mask, first_thread=first), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(expected, scan(*(x[1:2, :311].clone() for x in (rewards, values))), strict=True):
        assert torch.equal(a[1:2, :311], b)


def test_a_hole_that_stops_forgets_infinities(scan: Scan) -> None:
    rewards, values = torch.ones(1, 300), torch.zeros(1, 300)
    rewards[0, 290] = float("inf")
    mask = torch.arange(300)[None] != 280
    advantages, _ = scan(rewards, values, mask, masked="stop", gamma=1.0, lam=1.0)
    assert advantages[0, :280].isfinite().all()
    assert advantages[0, 290].isinf()


def test_machine_code_neither_spills_nor_uses_local_memory() -> None:
    require_backend("cuda")
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton")
        tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    from rlhf_kernels import _cuda

    report = subprocess.run([tool, "--dump-resource-usage", _cuda.__file__], check=True, capture_output=True, text=True)
    architectures = re.findall(r"arch = (sm_\d+)", report.stdout)
    usage = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report.stdout)
    registers = max(int(numbers[0]) for numbers in usage)
    print(f"\n{', '.join(sorted(set(architectures)))}: {len(usage)} kernels, at most {registers} registers")
    assert len(usage) >= 12 * len(set(architectures))  # 3 dtypes x (3 kinds of hole + no mask)
    assert "sm_80" in architectures
    assert {(stack, local) for _, stack, _, local in usage} == {("0", "0")}


def test_needs_tensors_on_a_gpu() -> None:
    require_backend("cuda")
    with rk.use_backend("cuda"), pytest.raises(RuntimeError, match="cuda backend got tensors on cpu"):
        rk.gae(torch.zeros(2, 3), torch.zeros(2, 3))


def test_triton_comes_first() -> None:
    """Until a measurement on a GPU says that the CUDA kernel is the faster one."""
    require_backend("cuda")
    require_backend("triton")
    assert rk.dispatch.automatic("gae", "cuda") == "triton"
