"""The native matrix product: float32 sums of any layout and dtype, whose bits depend on row and column alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from support.backends import require_backend
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1), (2, 33, 17), (5, 3, 2), (12, 32, 16), (37, 31, 0), (13, 70, 1029), (300, 40, 9), (3, 1100, 18)]


def _isas() -> list[str]:
    try:
        from rlhf_kernels import _native
    except ImportError:
        return []
    return _native.available_isas()


@pytest.fixture(params=_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    require_backend("cpu")
    from rlhf_kernels import _native

    before = _native.isa()
    _native.set_isa(request.param)
    try:
        yield request.param
    finally:
        _native.set_isa(before)


def _matrix(rows: int, columns: int, dtype: torch.dtype, transposed: bool, seed: int) -> Tensor:
    """A part of a larger matrix, row by row or column by column."""
    shape = (columns, rows + 2) if transposed else (rows, columns + 2)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x[:, :rows].T if transposed else x[:, :columns]


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_against_float64(isa: str, m: int, n: int, k: int) -> None:
    from rlhf_kernels import _native
    from rlhf_kernels.backends.cpu.linear import fp32_product

    for a_dtype, b_dtype, a_turned, b_turned in itertools.product(DTYPES, DTYPES, (False, True), (False, True)):
        a, b = _matrix(m, k, a_dtype, a_turned, 0), _matrix(k, n, b_dtype, b_turned, 1)
        for accumulate, round_a in itertools.product((False, True), (False, True)):
            memory = torch.full((m + 1, n + 3), 7.0)
            out, before = memory[:m, :n], torch.randn(m, n)
            out.copy_(before if accumulate else torch.full((m, n), float("nan")))
            fp32_product(a, b, out=out, accumulate=accumulate, round_a=round_a)
            rounds = round_a and b_dtype == torch.bfloat16 and _native.has_bfloat_pairs()
            left = (a.bfloat16() if rounds else a).double()
            expected = left @ b.double() + (before.double() if accumulate else 0)
            # A rounding for each of the k terms, two where pairs are multiplied, and of the last addition.
            bound = (k + 2) * 2**-23 * (left.abs() @ b.double().abs()) + 2**-23 * before.double().abs()
            assert ((out - expected).abs() <= bound).all(), (a_dtype, b_dtype, a_turned, b_turned)
            assert (memory[m:] == 7).all()
            assert (memory[:, n:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rows_bits_depend_on_nothing_else(isa: str, dtype: torch.dtype) -> None:
    from rlhf_kernels.backends.cpu.linear import fp32_product

    m, n, k = 290, 1100, 1030  # several tasks and blocks of K
    a, b = _matrix(m, k, dtype, False, 0), _matrix(k, n, dtype, True, 1)
    whole = torch.empty(m, n)
    fp32_product(a, b, out=whole)
    threads = torch.get_num_threads()
    try:
        for rows in (slice(0, 1), slice(7, 10), slice(11, 24), slice(17, 290)):
            torch.set_num_threads(1 if rows.start else 3)
            part = torch.empty(rows.stop - rows.start, n)
            fp32_product(a[rows], b, out=part)
            assert torch.equal(part, whole[rows])
            some = torch.empty(m, 45)
            fp32_product(a, b[:, 1000:1045], out=some)
            assert torch.equal(some, whole[:, 1000:1045])
    finally:
        torch.set_num_threads(threads)


def test_infinities_and_nan_stay_in_their_row_and_column(isa: str) -> None:
    from rlhf_kernels.backends.cpu.linear import fp32_product

    for dtype in DTYPES:
        a, b = torch.ones(15, 20, dtype=dtype), torch.ones(20, 40, dtype=dtype)
        a[3, 4], a[5, 6], b[7, 9] = float("inf"), float("nan"), float("-inf")
        out = torch.empty(15, 40)
        fp32_product(a, b, out=out)
        expected = a.double() @ b.double()
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=0, equal_nan=True)


def test_torchs_precision_of_float32_products_does_not_matter(isa: str) -> None:
    from rlhf_kernels.backends.cpu.linear import fp32_product

    a, b = _matrix(64, 200, torch.float32, False, 0), _matrix(200, 90, torch.float32, False, 1)
    found = []
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            out = torch.empty(64, 90)
            fp32_product(a, b, out=out)
            found.append(out)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(*found)
