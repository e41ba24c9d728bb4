"""The native CPU kernels (csrc/cpu): allocates outputs and passes addresses, sizes and strides."""

from rlhf_kernels import _native
from rlhf_kernels.backends.cpu.logits import selected_logprobs_bwd, selected_logprobs_fwd
from rlhf_kernels.backends.cpu.scan import gae

__all__ = ["describe", "gae", "selected_logprobs_bwd", "selected_logprobs_fwd"]


def describe() -> str:
    """The instruction set in use and those that this machine could run."""
    return f"{_native.isa()} of {', '.join(_native.available_isas())}"
