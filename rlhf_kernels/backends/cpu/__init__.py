"""The native CPU kernels (csrc/cpu): allocates outputs and passes addresses, sizes and strides."""

from rlhf_kernels import _native
from rlhf_kernels.backends.cpu.losses import loss_bwd

__all__ = ["describe", "loss_bwd"]  # what no other backend has


def describe() -> str:
    """The instruction set in use and those that this machine could run."""
    return f"{_native.isa()} of {', '.join(_native.available_isas())}"
