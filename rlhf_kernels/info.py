"""What this installation has: version, backends, ISA, and the backend of each op per device."""

from __future__ import annotations

import platform

import torch

from rlhf_kernels import dispatch


def info() -> None:
    """Print version, backends and, per op, the backend that serves CPU and CUDA tensors; one plain line each."""
    import rlhf_kernels

    print(
        f"rlhf_kernels {rlhf_kernels.__version__}, torch {torch.__version__}, "
        f"python {platform.python_version()}, {platform.machine()}"
    )
    for name, missing in dispatch.available().items():
        detail = missing or (dispatch.backend_module("cpu").describe() if name == "cpu" else "available")
        if name in ("triton", "cuda") and missing is None and not torch.cuda.is_available():
            detail = "available, no GPU found"
        print(f"backend {name}: {detail}")
    for op in sorted(set(rlhf_kernels.__all__) - {"info", "use_backend"}):
        served = {device: dispatch.automatic(op, device) or "reference" for device in ("cpu", "cuda")}
        print(f"op {op}: " + ", ".join(f"{device} tensors by {backend}" for device, backend in served.items()))
