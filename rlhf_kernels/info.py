"""What this installation has: version, backends, ISA, and the backend of each op per device."""

from __future__ import annotations

import platform
from typing import Any

import torch

from rlhf_kernels import dispatch

NO_OPS = {"head_of", "info", "record_dispatch", "use_backend"}  # of the public names


def info() -> dict[str, Any]:
    """Print version, backends and, per op, the backend that serves CPU and CUDA tensors; one plain line each.

    Returns:
        The same as data: "versions" of rlhf_kernels, torch and python, the "machine", "backends" as name -> what it
        has, or why it cannot be used, and "ops" as op -> {"cpu": backend, "cuda": backend}.
    """
    import rlhf_kernels

    found: dict[str, Any] = {
        "versions": {
            "rlhf_kernels": rlhf_kernels.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "machine": platform.machine(),
        "backends": {name: _detail(name, missing) for name, missing in dispatch.available().items()},
        "ops": {
            op: {device: dispatch.automatic(op, device) or "reference" for device in ("cpu", "cuda")}
            for op in sorted(name for name in rlhf_kernels.__all__ if name.islower() and name not in NO_OPS)
        },
    }
    print(", ".join(f"{name} {version}" for name, version in found["versions"].items()) + f", {found['machine']}")
    for name, detail in found["backends"].items():
        print(f"backend {name}: {detail}")
    for op, served in found["ops"].items():
        print(f"op {op}: " + ", ".join(f"{device} tensors by {backend}" for device, backend in served.items()))
    return found


def _detail(name: str, missing: str | None) -> str:
    if missing:
        return missing
    if name == "cpu":
        return str(dispatch.backend_module("cpu").describe())
    return "available" if torch.cuda.is_available() else "available, no GPU found"
