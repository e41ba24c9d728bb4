"""A mask is bool, or holds 0 and 1 alone: anything else raises where values are looked at, and is NaN where not."""

from __future__ import annotations

import pytest
import torch
from support.backends import Backend
from support.op_calls import OPS, WITH_KERNEL, inputs_of, outputs_of
from torch import Tensor

from rlhf_kernels.ops import validate

MASKED = [
    name
    for name in OPS
    if name not in ("per_token_kl", "dpo_loss", "pairwise_loss", "group_advantages")  # these take none
]
SERVED = [("reference", op) for op in MASKED] + [(name, op) for name in ("cpu", "triton") for op in WITH_KERNEL]
every_op_and_backend = pytest.mark.parametrize(
    ("backend", "op"), [case for case in SERVED if case[1] in MASKED], indirect=["backend"]
)
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8]


def _call(op: str, mask: Tensor, device: str) -> list[Tensor]:
    _, labels, tensors = inputs_of(op, 3, 5, torch.float32, device)
    return outputs_of(OPS[op].call(mask, labels, 0.1, *(x.detach() for x in tensors)))


@every_op_and_backend
def test_numbers_other_than_0_and_1_raise(backend: Backend, op: str) -> None:
    for value, dtype in ((0.25, torch.float32), (0.5, torch.bfloat16), (2, torch.int64), (-1, torch.int32)):
        mask = torch.ones(3, 5, dtype=dtype, device=backend.device)
        mask[1, 2] = value
        name = "linear_dpo_loss" if op == "linear_dpo_loss" else op.removesuffix("_frozen").removesuffix("_packed")
        with pytest.raises(ValueError, match=rf"^{name}.*: mask holds {value:g}; it takes a bool tensor, or 0 and 1"):
            _call(op, mask, backend.device)
    nan = torch.full((3, 5), float("nan"), device=backend.device)
    with pytest.raises(ValueError, match="mask holds nan"):
        _call(op, nan, backend.device)


@every_op_and_backend
def test_0_and_1_of_any_dtype_are_a_mask(backend: Backend, op: str) -> None:
    mask, _, _ = inputs_of(op, 3, 5, torch.float32, backend.device)
    expected = _call(op, mask, backend.device)
    for dtype in DTYPES:
        for a, b in zip(_call(op, mask.to(dtype), backend.device), expected, strict=True):
            assert torch.equal(a, b)


@every_op_and_backend
def test_where_values_are_not_read_the_result_is_nan(
    backend: Backend, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where reading them would be a sync."""
    monkeypatch.setattr(validate, "readable", lambda x: False)
    mask = torch.ones(3, 5, device=backend.device)
    clean = _call(op, mask, backend.device)
    assert not any(x.isnan().any() for x in clean if x.is_floating_point())
    mask[1, 2] = 0.5
    spoilt = _call(op, mask, backend.device)
    assert any(x.isnan().any() for x in spoilt if x.is_floating_point())
