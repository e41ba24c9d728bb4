"""gae over packed sequences: the bits of each sequence alone, every backend; offsets that are wrong."""

from __future__ import annotations

import pytest
import torch
from support import edge_cases, truth
from support.backends import HAS_GPU, Backend, require_backend
from support.checks.scan import MASKED, run
from support.checks.scan_packed import check, offsets_of, packed_case

import rlhf_kernels as rk
from rlhf_kernels.reference import scan as reference

LENGTHS = [5, 0, 1, 16, 17, 0, 33, 8, 7, 9, 31, 2, 0]


@pytest.mark.parametrize("with_bootstrap", [False, True])
@pytest.mark.parametrize("masked", MASKED)
@pytest.mark.parametrize("kind", ["none", "holes", "nothing"])
def test_the_bits_of_each_sequence_alone(
    backend: Backend, small_blocks: None, kind: str, masked: str, with_bootstrap: bool
) -> None:
    rewards, values, bootstrap = packed_case(LENGTHS)
    mask = edge_cases.MASKS[kind](rewards.shape)
    rewards, values = edge_cases.hide(mask, rewards, values)
    check(backend, LENGTHS, rewards, values, mask, bootstrap if with_bootstrap else None, masked)


@pytest.mark.parametrize("masked", MASKED)
def test_truth(backend: Backend, small_blocks: None, masked: str) -> None:
    """Not through the padded op: a fault that both share would pass above."""
    lengths = [20, 3, 0, 40]
    rewards, values, bootstrap = packed_case(lengths)
    mask = edge_cases.MASKS["holes"](rewards.shape)
    offsets = offsets_of(lengths)
    got = run(backend, rewards, values, mask, bootstrap=bootstrap, masked=masked, gamma=0.97, cu_seqlens=offsets)
    plain = reference.gae_packed(rewards, values, mask, bootstrap, offsets, 0.97, 0.95, masked)
    pieces = zip(*(x.split(lengths) for x in (rewards, values, mask)), bootstrap, strict=True)
    exact = [truth.gae(r[None], v[None], m[None], end[None], 0.97, 0.95, masked) for r, v, m, end in pieces]
    for actual, by_loop, parts in zip(got, plain, zip(*exact, strict=True), strict=True):
        expected = torch.cat(parts, 1)[0]
        truth.assert_accurate(actual, expected, truth.max_error(by_loop, expected))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_either_integer(backend: Backend, small_blocks: None, dtype: torch.dtype) -> None:
    rewards, values, bootstrap = packed_case(LENGTHS)
    check(backend, LENGTHS, rewards, values, None, bootstrap, dtype=dtype)
    every_second = torch.stack([offsets_of(LENGTHS, dtype)] * 2, 1)[:, 0]
    strided = run(backend, rewards, values, None, cu_seqlens=every_second)
    for a, b in zip(strided, run(backend, rewards, values, None, cu_seqlens=every_second.clone()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype_and_layout(backend: Backend, small_blocks: None, dtype: torch.dtype) -> None:
    rewards, values, bootstrap = packed_case(LENGTHS)
    rewards, values = rewards.to(dtype), values.to(dtype)
    mask = edge_cases.MASKS["holes"](rewards.shape)
    check(backend, LENGTHS, rewards, values, mask, bootstrap)
    check(backend, LENGTHS, rewards.float(), values, mask, bootstrap)  # not of one dtype
    strided = (torch.stack([x, x], 1)[:, 0] for x in (rewards, values, mask))
    check(backend, LENGTHS, *strided, bootstrap)


def test_many_lengths_fill_the_lanes(backend: Backend) -> None:
    """More sequences than lanes, some far longer than the rest: lanes take their next one at different times."""
    generator = torch.Generator().manual_seed(1)
    count = 20 if backend.interpreted else 200
    lengths = torch.randint(0, 30, (count,), generator=generator)
    lengths[[3, 11]] = 300
    rewards, values, bootstrap = packed_case(lengths.tolist())
    mask = torch.rand(rewards.shape, generator=generator) > 0.2
    check(backend, lengths.tolist(), rewards, values, mask, bootstrap)


def test_nothing_to_scan(backend: Backend) -> None:
    for lengths in ([], [0], [0, 0, 0]):
        rewards, values, bootstrap = packed_case(lengths)
        for x in run(backend, rewards, values, None, bootstrap=bootstrap, cu_seqlens=offsets_of(lengths)):
            assert x.shape == (0,)


def test_a_nan_stays_in_its_sequence(backend: Backend, small_blocks: None) -> None:
    lengths = [20, 20, 20]
    rewards, values, bootstrap = packed_case(lengths)
    clean = run(backend, rewards, values, None, cu_seqlens=offsets_of(lengths))[0]
    rewards[30] = float("nan")
    bootstrap[2] = float("nan")
    spoilt = run(backend, rewards, values, None, cu_seqlens=offsets_of(lengths), bootstrap=bootstrap)[0]
    assert spoilt.isnan().tolist() == [False] * 20 + [True] * 11 + [False] * 9 + [True] * 20
    only_reward = run(backend, rewards, values, None, cu_seqlens=offsets_of(lengths))[0]
    assert torch.equal(only_reward[:20], clean[:20])
    assert torch.equal(only_reward[31:], clean[31:])


@pytest.mark.parametrize(
    ("offsets", "place"),
    [
        ([1, 4, 10], 0),
        ([-1, 4, 10], 0),
        ([0, 4, 9], 2),
        ([0, 4, 11], 2),
        ([0, 7, 4, 10], 2),
        ([0, 12, 10], 1),
        ([0, -3, 10], 1),
        ([3], 0),
        ([0], 0),
        ([0, 2**31 - 1, 10], 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_wrong_offsets_are_named(backend: Backend, offsets: list[int], place: int, dtype: torch.dtype) -> None:
    x, cu_seqlens = torch.zeros(10), torch.tensor(offsets, dtype=dtype)
    with pytest.raises(ValueError, match=rf"cu_seqlens holds {offsets[place]} at {place}; .* end at 10"):
        rk.gae(x, x, cu_seqlens=cu_seqlens)


WRONG = [
    [-5, 4, 30],
    [20, 1, 39],
    [0, 50, 9],
    [33, 33, 33],
    [0, 2**31 - 1, -(2**31)],
    [19, 21],
    [0],
    [40],
    [3, 9, 9, 20],
]
WRONG += torch.randint(-9, 50, (12, 5), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("wrong", WRONG, ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_what_wrong_offsets_leave_out_is_nan_on_a_gpu(
    wrong: list[int], dtype: torch.dtype, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where offsets are not read before the launch, no element stays uninitialised memory.

    What a sequence has may be written by others too, in any order: by one that overlaps it, or as left out at an end.
    """
    require_backend("triton")
    from rlhf_kernels.backends.triton import scan

    device = "cuda" if HAS_GPU else "cpu"
    x, bootstrap = torch.ones(40, device=device), torch.zeros(len(wrong) - 1, device=device)
    offsets = torch.tensor(wrong, dtype=dtype, device=device)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, lambda *args, **kwargs: torch.full((40,), 777.0, device=device))
    outputs = scan.gae_packed(x, x, None, bootstrap, offsets, 0.9, 0.95, 0)
    monkeypatch.undo()
    sequences = edge_cases.covered(wrong, 40).to(device)
    first, last = (min(max(n, 0), 40) for n in (wrong[0], wrong[-1]))
    for output in outputs:
        assert (output != 777).all()
        assert output[sequences == 0].isnan().all()
        assert output[first:last].isfinite().all()


def test_wrong_arguments() -> None:
    x = torch.zeros(10)
    cu_seqlens = torch.tensor([0, 10])
    with pytest.raises(TypeError, match=r"cu_seqlens is torch.float32; it takes int32 or int64"):
        rk.gae(x, x, cu_seqlens=cu_seqlens.float())
    with pytest.raises(TypeError, match=r"cu_seqlens is a list"):
        rk.gae(x, x, cu_seqlens=[0, 10])
    with pytest.raises(ValueError, match=r"cu_seqlens has shape \[1, 2\]; it takes \[S \+ 1\]"):
        rk.gae(x, x, cu_seqlens=cu_seqlens[None])
    with pytest.raises(ValueError, match=r"cu_seqlens has shape \[0\]"):
        rk.gae(x, x, cu_seqlens=cu_seqlens[:0])
    with pytest.raises(ValueError, match=r"rewards has shape \[2, 5\]; with cu_seqlens it takes \[total\]"):
        rk.gae(x.view(2, 5), x.view(2, 5), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=r"bootstrap has shape \[2\]; with this cu_seqlens it takes \[1\]"):
        rk.gae(x, x, cu_seqlens=cu_seqlens, bootstrap=torch.zeros(2))
