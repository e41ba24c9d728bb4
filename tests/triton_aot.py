"""Compile the Triton kernels without a device, exactly as their launchers would, and print what each one uses.

Run as a program, in a process without TRITON_INTERPRET; one JSON object per kernel on stdout. The launchers get tensors
on the meta device and Triton a driver that knows a target but no GPU, so block sizes, warps and specialisation are
those of a real launch.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from rlhf_kernels.backends.triton import gae, selected_logprobs_bwd, selected_logprobs_fwd

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class DeviceFreeDriver:
    """The part of Triton's driver that compilation asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # the key of Triton's cache of compiled kernels

    def get_current_stream(self, device: str) -> int:
        return 0


def _launches() -> Iterator[tuple[str, object]]:
    """(description, call of a launcher) over the options that change the code, and small, odd and large V."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def logits_calls(V: int, dtype: torch.dtype, full: bool):
        x, labels = empty(4, 8, V, dtype=dtype), empty(32, dtype=torch.int64 if full else torch.int32)
        mask = empty(32, dtype=torch.bool) if full else None
        row_temperature = empty(32) if full else None
        stats, entropy, g = empty(32, 2), empty(32), empty(32)
        selected_logprobs_fwd(x, labels, mask, 0.7, row_temperature, full)
        selected_logprobs_bwd(g, g if full else None, x, labels, mask, 0.7, row_temperature, stats, entropy, False)

    def gae_call(T: int, dtype: torch.dtype, full: bool, masked: int):
        x = empty(4, T, dtype=dtype)
        gae(x, x, empty(4, T, dtype=torch.bool) if full else None, empty(4) if full else None, 1.0, 0.9, masked)

    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for V, dtype, full in itertools.product((50257, 128256), dtypes, (False, True)):
        yield f"V={V} {str(dtype)[6:]} {'all options' if full else 'plain'}", lambda *a: logits_calls(V, dtype, full)
    for V in (1, 1000):
        yield f"V={V} float32 all options", lambda *a: logits_calls(V, torch.float32, True)
    for dtype, masked in itertools.product((torch.float32, torch.bfloat16), range(3)):
        name = f"T=131072 {str(dtype)[6:]} mask {('skip', 'stop', 'zero')[masked]}"
        yield name, lambda *a: gae_call(131072, dtype, True, masked)
    yield "T=1000 float32 no mask", lambda *a: gae_call(1000, torch.float32, False, 0)


def _nvidia_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", report).groups()
    return {"registers": int(registers), "spilled": int(stack) + int(re.search(r"LOCAL:(\d+)", report)[1])}


def _amd_usage(assembly: str) -> dict[str, int]:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    spilled = field("vgpr_spill_count") + field("sgpr_spill_count") + field("private_segment_fixed_size")
    return {"registers": field("vgpr_count"), "spilled": spilled}


def main() -> None:
    compiled = []
    launch = JITFunction.run
    JITFunction.run = lambda *args, **kwargs: compiled.append(launch(*args, **{**kwargs, "warmup": True}))
    for name, target in TARGETS.items():
        triton.runtime.driver.set_active(DeviceFreeDriver(target))
        for description, call in _launches():
            compiled.clear()
            call()
            for kernel in compiled:
                asm = kernel.asm
                usage = _nvidia_usage(asm["cubin"]) if "cubin" in asm else _amd_usage(asm["amdgcn"])
                print(json.dumps({"target": name, "kernel": kernel.metadata.name, "case": description, **usage}))


if __name__ == "__main__":
    main()
