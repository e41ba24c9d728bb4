"""Triton kernels: NVIDIA and AMD GPUs, and any CPU through Triton's interpreter (TRITON_INTERPRET=1)."""
