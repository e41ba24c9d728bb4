"""Triton kernels: NVIDIA and AMD GPUs, and any CPU through Triton's interpreter (TRITON_INTERPRET=1)."""

from rlhf_kernels.backends.triton.logits import selected_logprobs_bwd, selected_logprobs_fwd
from rlhf_kernels.backends.triton.scan import gae

__all__ = ["gae", "selected_logprobs_bwd", "selected_logprobs_fwd"]
