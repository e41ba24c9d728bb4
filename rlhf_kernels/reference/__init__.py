"""The specification: every op in plain, differentiable PyTorch; fast kernels are tested against it in float64."""
