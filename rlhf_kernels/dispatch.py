"""Which kernel, if any, serves a call: decided by the op's name and the tensor's device and dtype only."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Backend(NamedTuple):
    """One folder under rlhf_kernels/backends."""

    name: str
    device: str  # device type it serves when nobody forces a backend
    needs: str  # module whose presence makes the backend available
    why_absent: str
    ops: frozenset[str]


# A backend is one module and one line here; for a device the first available one that has the op wins.
BACKENDS = (
    Backend(
        "triton",
        "cuda",
        "triton",
        "triton is not installed: pip install triton",
        frozenset(
            {
                "full_kl",
                "gae",
                "gae_packed",
                "linear_kl",
                "linear_logprobs",
                "linear_policy_loss",
                "per_token_kl",
                "policy_loss",
                "ppo_advantages",
                "sample_tokens",
                "selected_logprobs",
                "shaped_rewards",
                "value_loss",
                "whiten",
            }
        ),
    ),
    Backend(
        "cuda",
        "cuda",
        "rlhf_kernels._cuda",
        "the CUDA module was not built: reinstall where nvcc is, without RLHF_KERNELS_NO_CUDA",
        frozenset(
            {
                "gae",
                "gae_packed",
            }
        ),
    ),
    Backend(
        "cpu",
        "cpu",
        "rlhf_kernels._native",
        "the native module was not built: reinstall with a C++17 compiler and without RLHF_KERNELS_NO_NATIVE",
        frozenset(
            {
                "full_kl",
                "gae",
                "gae_packed",
                "linear_kl",
                "linear_logprobs",
                "linear_policy_loss",
                "per_token_kl",
                "policy_loss",
                "ppo_advantages",
                "sample_tokens",
                "selected_logprobs",
                "shaped_rewards",
                "value_loss",
                "whiten",
            }
        ),
    ),
)


def _present(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


_AVAILABLE = {backend.name: _present(backend.needs) for backend in BACKENDS}
_AUTOMATIC: dict[str, list[Backend]] = {}
for _backend in BACKENDS:
    if _AVAILABLE[_backend.name]:
        _AUTOMATIC.setdefault(_backend.device, []).append(_backend)
_BY_NAME = {backend.name: backend for backend in BACKENDS}
_modules: dict[str, ModuleType] = {}
_forced: str | None = None


def available() -> dict[str, str | None]:
    """Backend name -> None when it can be used, else the reason why not, in one sentence."""
    return {b.name: None if _AVAILABLE[b.name] else b.why_absent for b in BACKENDS}


def automatic(op: str, device_type: str) -> str | None:
    """Name of the backend that serves `op` on that type of device, None for the reference."""
    for backend in _AUTOMATIC.get(device_type, ()):
        if op in backend.ops:
            return backend.name
    return None


def select_backend(op: str, tensor: Tensor) -> str | None:
    """Name of the backend whose kernel serves `op` on `tensor`; None means the reference.

    float64 goes to the reference also under a forced backend, so that gradcheck works.
    Raises NotImplementedError when a forced backend has no kernel for `op`.
    """
    if tensor.dtype not in KERNEL_DTYPES or _forced == "reference":
        return None
    if _forced is None:
        return automatic(op, tensor.device.type)
    if op not in _BY_NAME[_forced].ops:
        raise NotImplementedError(
            f"use_backend({_forced!r}): this backend has no kernel for {op}; "
            f"call it outside the with-block or under use_backend('reference')"
        )
    return _forced


def require_backend(op: str, tensor: Tensor) -> str:
    """As `select_backend`, for a registered op at run time: that a kernel serves the call was chosen at trace time."""
    name = select_backend(op, tensor) if _forced != "reference" else automatic(op, tensor.device.type)
    if name is None:
        raise NotImplementedError(f"torch.ops.rlhf_kernels.{op}: no kernel for {tensor.dtype} on {tensor.device}")
    return name


def backend_module(name: str) -> ModuleType:
    """The backend's module, imported at its first use."""
    module = _modules.get(name)
    if module is None:
        module = _modules[name] = importlib.import_module(f"rlhf_kernels.backends.{name}")
    return module


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend inside a with-block; None restores the automatic choice.

    Args:
        name: "reference", "cpu", "triton", "cuda", or None. The choice is process-wide, not per thread.

    Raises:
        ValueError: unknown name.
        RuntimeError: a known backend that this installation lacks (automatic choice would fall back,
            a backend asked for by name does not).
    """
    global _forced
    if name not in (None, "reference") and name not in _BY_NAME:
        raise ValueError(
            f"use_backend: name is {name!r}; it takes 'reference', {', '.join(map(repr, _BY_NAME))} or None"
        )
    if name in _BY_NAME and not _AVAILABLE[name]:
        raise RuntimeError(f"use_backend({name!r}): not available here: {_BY_NAME[name].why_absent}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous
