"""The specification: every op in plain, differentiable PyTorch. The fast kernels are tested against these in float64."""
