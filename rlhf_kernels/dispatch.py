"""Which kernel, if any, serves a call: decided by the op's name and the tensor's device and dtype only."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Asked in every call: looking them up costs as much as calling them.
_is_compiling = torch.compiler.is_compiling
_transforms_active = torch._C._are_functorch_transforms_active

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Kernels(NamedTuple):
    """The kernels of one op."""

    file: str  # NAME of rlhf_kernels/backends/<backend>/NAME.py, in each backend
    backends: tuple[str, ...]
    functions: tuple[str, ...]  # what that file defines for `ops` to call


_BOTH = ("triton", "cpu")
_ALL = ("triton", "cuda", "cpu")
_LINEAR = Kernels(
    "linear",
    _BOTH,
    (
        "allocate",
        "logits_dtype",
        "products_are_invariant",
        "fp32_product",
        "multiplies_narrow",
        "online_softmax_update",
        "linear_gradient",
    ),
)
# Every op with kernels is one line here; what is not here, the reference serves.
OPS = {
    "full_kl": Kernels("full_kl", _BOTH, ("full_kl_fwd", "full_kl_bwd")),
    "gae": Kernels("scan", _ALL, ("gae",)),
    "gae_packed": Kernels("scan", _ALL, ("gae_packed",)),
    "linear_cross_entropy": _LINEAR,
    "linear_dpo_loss": _LINEAR,
    "linear_kl": _LINEAR,
    "linear_logprobs": _LINEAR,
    "linear_policy_loss": _LINEAR,
    "per_token_kl": Kernels("tokens", _BOTH, ("per_token_kl_fwd", "per_token_kl_bwd")),
    "policy_loss": Kernels("losses", _BOTH, ("policy_loss",)),
    "ppo_advantages": Kernels("scan", _BOTH, ("ppo_advantages",)),
    "sample_tokens": Kernels("sampling", _BOTH, ("sample_tokens",)),
    "selected_logprobs": Kernels("logits", _BOTH, ("selected_logprobs_fwd", "selected_logprobs_bwd")),
    "shaped_rewards": Kernels("tokens", _BOTH, ("shaped_rewards",)),
    "value_loss": Kernels("losses", _BOTH, ("value_loss",)),
    "whiten": Kernels("whiten", _BOTH, ("whiten_moments", "whiten_fwd", "whiten_bwd")),
}


class Backend(NamedTuple):
    """One folder under rlhf_kernels/backends."""

    name: str
    device: str  # device type it serves when nobody forces a backend
    needs: str  # module whose presence makes the backend available
    why_absent: str

    @property
    def ops(self) -> frozenset[str]:
        return _SERVED[self.name]


# For a device the first available one that has the op wins.
BACKENDS = (
    Backend("triton", "cuda", "triton", "triton is not installed: pip install triton"),
    Backend(
        "cuda",
        "cuda",
        "rlhf_kernels._cuda",
        "the CUDA module was not built: reinstall where nvcc is, without RLHF_KERNELS_NO_CUDA",
    ),
    Backend(
        "cpu",
        "cpu",
        "rlhf_kernels._native",
        "the native module was not built: reinstall with a C++17 compiler and without RLHF_KERNELS_NO_NATIVE",
    ),
)
_SERVED = {b.name: frozenset(op for op, kernels in OPS.items() if b.name in kernels.backends) for b in BACKENDS}


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


class _Thread(threading.local):
    forced: str | None = None
    recorded: list[tuple[str, str]] | None = None


_thread = _Thread()
# How many with-blocks are open in any thread: while there is none, no call looks at what its thread has chosen.
_blocks = 0
_blocks_lock = threading.Lock()
# The last choice of any thread. A trace rests on it: its guards cannot see what belongs to a thread.
_forced_last: str | None = None


def forced() -> str | None:
    """The backend that this thread has forced."""
    if _is_compiling():
        return _forced_last
    return _thread.forced if _blocks else None


@contextmanager
def _block() -> Iterator[None]:
    global _blocks
    with _blocks_lock:
        _blocks += 1
    try:
        yield
    finally:
        with _blocks_lock:
            _blocks -= 1


def available() -> dict[str, str | None]:
    """Backend name -> None when it can be used, else the reason why not, in one sentence."""
    return {b.name: None if _AVAILABLE[b.name] else b.why_absent for b in BACKENDS}


def automatic(op: str, device_type: str) -> str | None:
    """Name of the backend that serves `op` on that type of device, None for the reference."""
    for backend in _AUTOMATIC.get(device_type, ()):
        if op in backend.ops:
            return backend.name
    return None


def transformed() -> bool:
    """Whether torch.func or forward-mode AD looks at what is computed: they see through the reference, not a kernel."""
    return not _is_compiling() and (_transforms_active() or forward_ad._current_level >= 0)


def select_backend(op: str, tensor: Tensor) -> str | None:
    """Name of the backend whose kernel serves `op` on `tensor`; None means the reference.

    float64, torch.func (grad, vmap, jvp, ...) and forward-mode AD go to the reference, also under a forced backend.
    Raises NotImplementedError when a forced backend has no kernel for `op`.
    """
    if _is_compiling():
        return _backend_of(op, tensor, _forced_last)
    seen_through = _transforms_active() or forward_ad._current_level >= 0
    if not _blocks:
        return None if seen_through or tensor.dtype not in KERNEL_DTYPES else automatic(op, tensor.device.type)
    name = None if seen_through else _backend_of(op, tensor, _thread.forced)
    if _thread.recorded is not None:
        _thread.recorded.append((op, name or "reference"))
    return name


def _backend_of(op: str, tensor: Tensor, chosen: str | None) -> str | None:
    if tensor.dtype not in KERNEL_DTYPES or chosen == "reference":
        return None
    if chosen is None:
        return automatic(op, tensor.device.type)
    if op not in _BY_NAME[chosen].ops:
        raise NotImplementedError(
            f"use_backend({chosen!r}): this backend has no kernel for {op}; "
            f"call it outside the with-block or under use_backend('reference')"
        )
    return chosen


def require_backend(op: str, tensor: Tensor) -> str:
    """As `select_backend`, for a registered op at run time: that a kernel serves the call was chosen at trace time."""
    chosen = _thread.forced if _blocks else None
    name = _backend_of(op, tensor, None if chosen == "reference" else chosen)
    if name is None:
        raise NotImplementedError(f"torch.ops.rlhf_kernels.{op}: no kernel for {tensor.dtype} on {tensor.device}")
    return name


def backend_module(name: str) -> ModuleType:
    """The backend's package, imported at its first use, with the functions that OPS lists for it."""
    module = _modules.get(name)
    if module is None:
        module = importlib.import_module(f"rlhf_kernels.backends.{name}")
        for op in sorted(_SERVED[name]):
            file = importlib.import_module(f"{module.__name__}.{OPS[op].file}")
            for function in OPS[op].functions:
                setattr(module, function, getattr(file, function))
        _modules[name] = module
    return module


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend inside a with-block; None restores the automatic choice.

    Args:
        name: "reference", "cpu", "triton", "cuda", or None. The choice is this thread's, and holds for the backward of
            what ran under it, wherever that is called. torch.compile traces under the last choice of any thread.

    Raises:
        ValueError: unknown name.
        RuntimeError: a known backend that this installation lacks (automatic choice would fall back,
            a backend asked for by name does not).
    """
    global _forced_last
    if name not in (None, "reference") and name not in _BY_NAME:
        raise ValueError(
            f"use_backend: name is {name!r}; it takes 'reference', {', '.join(map(repr, _BY_NAME))} or None"
        )
    if name in _BY_NAME and not _AVAILABLE[name]:
        raise RuntimeError(f"use_backend({name!r}): not available here: {_BY_NAME[name].why_absent}")
    previous, _thread.forced = _thread.forced, name
    previous_last, _forced_last = _forced_last, name
    try:
        with _block():
            yield
    finally:
        _thread.forced, _forced_last = previous, previous_last


@contextmanager
def record_dispatch() -> Iterator[list[tuple[str, str]]]:
    """Tell which backend served each call of an op, in this thread and in eager mode.

        with rlhf_kernels.record_dispatch() as calls:
            rlhf_kernels.whiten(x)
        assert calls == [("whiten", "cpu")]

    Yields a list that grows by (op, backend) with every call, "reference" where no kernel served it. gae of packed
    sequences is "gae_packed".
    """
    previous, _thread.recorded = _thread.recorded, []
    try:
        with _block():
            yield _thread.recorded
    finally:
        _thread.recorded = previous
