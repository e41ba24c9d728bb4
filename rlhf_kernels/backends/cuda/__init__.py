"""CUDA C++ kernels (csrc/cuda) for NVIDIA GPUs: allocates outputs and passes addresses and the current stream."""

from rlhf_kernels.backends.cuda.scan import gae, gae_packed

__all__ = ["gae", "gae_packed"]
