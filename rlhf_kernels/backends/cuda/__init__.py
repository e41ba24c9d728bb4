"""CUDA C++ kernels (csrc/cuda) for NVIDIA GPUs: allocates outputs and passes addresses and the current stream."""
