"""Kernels, one module per backend: each allocates its outputs and launches; no validation, no autograd."""
