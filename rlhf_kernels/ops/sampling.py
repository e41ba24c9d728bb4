"""The sampling family: the next token, and its logprob under the distribution it was drawn from."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import dispatch
from rlhf_kernels.ops import rows, validate
from rlhf_kernels.reference import sampling as reference

OP = "sample_tokens"


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    uniform: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw each row's next token, and return its logprob under exactly the distribution it was drawn from.

    That distribution is `softmax(logits / temperature)` over the kept tokens, renormalised. `top_k` keeps the k largest
    logits and what ties with the k-th. `top_p` then keeps the smallest set of largest logits whose probability reaches
    `top_p`, and what ties with its last (Holtzman et al. 2020, arXiv:1904.09751); both as in transformers' warpers. The
    token is the first at which the running sum of probabilities exceeds u, one uniform number in [0, 1) per row. A
    token of probability 0 is never drawn. Not differentiable.

    Args:
        logits: [..., V] float32, float16, bfloat16 (kernels) or float64 (reference). Rows may be strided; if the last
            dimension is not contiguous it is copied once. -inf is a legal logit.
        temperature: > 0; a float, or a tensor that broadcasts to [...] for one temperature per row.
        top_k: >= 1, None keeps all tokens.
        top_p: in (0, 1], None and 1 keep all tokens.
        generator: source of u, on the device of logits; None is torch's own. The u of row n depends on all rows.
        seed: in [0, 2**63), instead of a generator: the u of row n is a hash of (seed, n), the same on every device, in
            any batch, and inside torch.compile. Take a new seed for every step.
        uniform: [...] float64 in [0, 1), the u of every row, instead of both: for rows that are sorted or spread over
            devices, and must be drawn alike. Not read at masked rows; elsewhere its range is checked on the CPU, or
            with RLHF_KERNELS_CHECK=1.
        mask: [...] bool or 0/1, true where a token is wanted; masked rows of logits are never read.

    Returns:
        tokens [...] int64 and logprobs [...] float32 (float64 for float64 logits), nats; 0 and 0 at masked rows. A row
        of only -inf, or with NaN or +inf, gives token 0 and logprob NaN. Given its u, a row's result has the same bits
        whatever else is in the batch; backends may differ where u lies within rounding of a boundary.
        Workspace: 8 bytes per 4096 logits on a GPU, none on the CPU.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option; more than one of generator, seed and uniform.
    """
    logits = validate.float_tensor(OP, "logits", logits).detach()
    shape, _ = rows.check_logits(OP, "logits", logits)
    given, mask = mask, validate.bool_mask(OP, mask, "logits", shape, logits.device)
    row_temperature = rows.row_temperature(OP, temperature, logits, shape, mask, given)
    if rows.reading_is_free(logits):
        rows.positive(OP, row_temperature)
    if top_k is not None:
        _check_integer("top_k", top_k, 1)
    if top_p is not None:
        top_p = validate.number(OP, "top_p", top_p, above=0, high=1)
    if uniform is None:
        numbers = _uniform(generator, seed, math.prod(shape), logits.device)
    elif generator is None and seed is None:
        numbers = _given(uniform, shape, logits, mask)
    else:
        raise ValueError(f"{OP}: uniform is given, and a generator or a seed too; it takes one of them or none")
    return _draw(logits, numbers, mask, temperature if row_temperature is None else row_temperature, top_k, top_p)


def _check_integer(name: str, value: object, low: int) -> None:
    tracing = torch.compiler.is_compiling()
    if not tracing and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{OP}: {name} is a {type(value).__name__}; it takes an int or None")
    if not low <= value < 1 << 63:  # type: ignore[operator]
        raise ValueError(f"{OP}: {name} is {value}; it takes an int in [{low}, 2**63)")


def _uniform(generator: torch.Generator | None, seed: int | None, count: int, device: torch.device) -> Tensor:
    """[count] float64 in [0, 1)."""
    if seed is not None:
        if generator is not None:
            raise ValueError(f"{OP}: generator and seed are both given; it takes one of them or neither")
        _check_integer("seed", seed, 0)
        return reference.uniforms(seed, count, device)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"{OP}: generator is a {type(generator).__name__}; it takes a torch.Generator or None")
        if generator.device.type != device.type:
            raise ValueError(
                f"{OP}: generator is on {generator.device}, logits on {device}; both must be on one device"
            )
    return torch.rand(count, dtype=torch.float64, device=device, generator=generator)


def _given(uniform: Tensor, shape: torch.Size, logits: Tensor, mask: Tensor | None) -> Tensor:
    """The caller's numbers [...] as [N], checked where a row counts: what the mask hides is not read."""
    if not isinstance(uniform, Tensor) or uniform.dtype != torch.float64:
        found = uniform.dtype if isinstance(uniform, Tensor) else type(uniform).__name__
        raise TypeError(f"{OP}: uniform is {found}; it takes a float64 tensor or None")
    validate.same_device_and_shape(OP, "uniform", uniform, "logits", shape, logits.device)
    if rows.reading_is_free(logits):
        counted = uniform if mask is None else uniform[mask]
        if not bool(((counted >= 0) & (counted < 1)).all()):
            raise ValueError(f"{OP}: uniform holds a value outside [0, 1)")
    return uniform.reshape(-1).contiguous()


def _draw(
    logits: Tensor,
    uniform: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    top_k: int | None,
    top_p: float | None,
) -> tuple[Tensor, Tensor]:
    """logits [..., V], uniform [N] -> tokens, logprobs [...]."""
    shape = logits.shape[:-1]
    if top_p is not None and top_p >= 1:
        top_p = None
    if dispatch.select_backend(OP, logits) is None:
        return reference.sample_tokens(logits, uniform.view(shape), mask, temperature, top_k, top_p)
    tokens, logprobs = _sample_tokens(
        rows.as_rows(logits),
        uniform,
        rows.flat(mask),
        rows.scalar(temperature),
        rows.flat(temperature) if isinstance(temperature, Tensor) else None,
        validate.runtime_scalar(0 if top_k is None else top_k),
        validate.runtime_scalar(1 if top_p is None else top_p),
    )
    return tokens.view(shape), logprobs.view(shape)


@torch.library.custom_op("rlhf_kernels::sample_tokens", mutates_args=())
def _sample_tokens(
    logits: Tensor,
    uniform: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    row_temperature: Tensor | None,
    top_k: Tensor,
    top_p: Tensor,
) -> tuple[Tensor, Tensor]:
    """logits [O, I, V], scalars [], the rest [N = O*I] -> tokens, logprobs [N]; top_k 0 and top_p 1 keep everything."""
    backend = dispatch.backend_module(dispatch.require_backend(OP, logits))
    keep = min(int(top_k.item()), logits.shape[-1]), top_p.item()
    return backend.sample_tokens(logits, uniform, mask, temperature.item(), row_temperature, *keep)


@_sample_tokens.register_fake
def _(logits: Tensor, uniform: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return uniform.new_empty(uniform.shape, dtype=torch.int64), uniform.new_empty(uniform.shape, dtype=torch.float32)
