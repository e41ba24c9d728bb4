"""sample_tokens on the native module (csrc/cpu/sampling.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import _native
from rlhf_kernels.backends.cpu.common import DTYPES, address, contiguous, last_contiguous


def sample_tokens(
    logits: Tensor,
    uniform: Tensor,
    mask: Tensor | None,
    temperature: float,
    row_temperature: Tensor | None,
    top_k: int,
    top_p: float,
) -> tuple[Tensor, Tensor]:
    """logits [O, I, V]; uniform float64, mask, row_temperature [O*I] -> tokens int64, logprobs float32 [O*I].

    top_k in [1, V] or 0, top_p in (0, 1]; 0 and 1 keep everything. Logits whose last dimension is strided are copied
    once.
    """
    outer, inner, vocab = logits.shape
    tokens = torch.empty(outer * inner, dtype=torch.int64, device="cpu")
    logprobs = torch.empty(outer * inner, dtype=torch.float32, device="cpu")
    logits, uniform = last_contiguous(logits), uniform.contiguous()
    mask, row_temperature = contiguous(mask), contiguous(row_temperature)
    _native.sample_tokens(
        logits=logits.data_ptr(),
        dtype=DTYPES[logits.dtype],
        outer=outer,
        inner=inner,
        stride_outer=logits.stride(0),
        stride_inner=logits.stride(1),
        vocab=vocab,
        uniform=uniform.data_ptr(),
        mask=address(mask),
        temperature=temperature,
        row_temperature=address(row_temperature),
        top_k=top_k,
        top_p=top_p,
        tokens=tokens.data_ptr(),
        logprobs=logprobs.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return tokens, logprobs
