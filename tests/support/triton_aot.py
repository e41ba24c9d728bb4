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
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from rlhf_kernels.backends.triton.full_kl import full_kl_bwd, full_kl_fwd
from rlhf_kernels.backends.triton.linear import linear_gradient, online_softmax_update
from rlhf_kernels.backends.triton.logits import selected_logprobs_bwd, selected_logprobs_fwd
from rlhf_kernels.backends.triton.losses import policy_loss as policy_loss_kernel
from rlhf_kernels.backends.triton.losses import value_loss as value_loss_kernel
from rlhf_kernels.backends.triton.sampling import sample_tokens
from rlhf_kernels.backends.triton.scan import gae, gae_packed, ppo_advantages
from rlhf_kernels.backends.triton.tokens import per_token_kl_bwd, per_token_kl_fwd, shaped_rewards
from rlhf_kernels.backends.triton.whiten import whiten_bwd, whiten_fwd

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


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_logits(outer: int, inner: int, V: int, dtype: torch.dtype, full: bool, temperature: float = 0.7) -> None:
    """Forward and backward; `full` turns on mask, temperature per row, entropy and 64-bit labels."""
    N = outer * inner
    x, labels = _empty(outer, inner, V, dtype=dtype), _empty(N, dtype=torch.int64 if full else torch.int32)
    mask, row_temperature = (_empty(N, dtype=torch.bool), _empty(N)) if full else (None, None)
    selected_logprobs_fwd(x, labels, mask, temperature, row_temperature, full)
    grads = _empty(N), _empty(N) if full else None
    saved = _empty(N, 2), _empty(N)
    selected_logprobs_bwd(*grads, x, labels, mask, temperature, row_temperature, *saved, False)


def launch_linear(rows: int, width: int, dtype: torch.dtype, full: bool, scalar: float = 0.7, first: int = 8) -> None:
    """Both epilogues of a tile; `full` turns on bias, softcap, temperature per row, entropy and 64-bit labels."""
    tile, labels = _empty(rows, width, dtype=dtype), _empty(rows, dtype=torch.int64 if full else torch.int32)
    bias, row_temperature = (_empty(width), _empty(rows)) if full else (None, None)
    head = (tile, first, bias, 30.0 if full else 0.0, scalar, labels, scalar, row_temperature)
    online_softmax_update(*head, _empty(rows, 4, dtype=torch.float64), full)
    linear_gradient(*head, _empty(rows, 4))


def launch_full_kl(
    outer: int, inner: int, V: int, dtype: torch.dtype, direction: int, full: bool, temperature: float = 0.7
) -> None:
    """Forward and backward; `full` turns on mask and temperature per row."""
    N = outer * inner
    x, y = _empty(outer, inner, V, dtype=dtype), _empty(outer, inner, V, dtype=dtype)
    mask, row_temperature = (_empty(N, dtype=torch.bool), _empty(N)) if full else (None, None)
    full_kl_fwd(x, y, mask, temperature, row_temperature, direction)
    full_kl_bwd(_empty(N), x, y, mask, temperature, row_temperature, direction, _empty(N, 5))


def launch_gae(B: int, T: int, dtype: torch.dtype, full: bool, masked: int = 0, gamma: float = 0.9) -> None:
    x = _empty(B, T, dtype=dtype)
    mask, bootstrap = (_empty(B, T, dtype=torch.bool), _empty(B)) if full else (None, None)
    gae(x, x, mask, bootstrap, gamma, 0.95, masked)


def launch_gae_packed(S: int, total: int, offsets: torch.dtype, masked: int = 0) -> None:
    x, mask = _empty(total), _empty(total, dtype=torch.bool)
    gae_packed(x, x, mask, _empty(S), _empty(S + 1, dtype=offsets), 0.9, 0.95, masked)


def launch_sampling(
    outer: int,
    inner: int,
    V: int,
    dtype: torch.dtype,
    full: bool,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float = 0.7,
) -> None:
    N = outer * inner
    mask, row_temperature = (_empty(N, dtype=torch.bool), _empty(N)) if full else (None, None)
    uniform = _empty(N, dtype=torch.float64)
    sample_tokens(_empty(outer, inner, V, dtype=dtype), uniform, mask, temperature, row_temperature, top_k, top_p)


def launch_losses(B: int, T: int, dtype: torch.dtype, full: bool, sequence: bool, clip: float = 0.2) -> None:
    """`full` turns on mask, weights, old values and a denominator on the device."""
    x = _empty(B, T, dtype=dtype)
    mask, weights = (_empty(B, T, dtype=torch.bool), x) if full else (None, None)
    denominator = _empty() if full else 3.0
    policy_loss_kernel(x, x, x, mask, weights, 1 - clip, 1 + clip, 3.0, denominator, sequence, sequence, True)
    value_loss_kernel(x, weights, x, mask, clip, denominator, sequence, True)


def launch_ppo_advantages(B: int, T: int, dtype: torch.dtype, whiten: bool = True, kl_coef: float = 0.1) -> None:
    x, mask = _empty(B, T, dtype=dtype), _empty(B, T, dtype=torch.bool)
    ppo_advantages(x, x, _empty(B), x, mask, kl_coef, 0.9, 0.95, 1e-8 if whiten else None)


def launch_tokens(B: int, T: int, dtype: torch.dtype, estimator: int, full: bool, scalar: float = 0.1) -> None:
    """per_token_kl, shaped_rewards and whiten with their gradients; `full`: strided rows, a mask, the mean kept."""
    x = _empty(B, T + 3, dtype=dtype)[:, :T] if full else _empty(B, T, dtype=dtype)
    mask = _empty(B, T, dtype=torch.bool)
    kl, slope = per_token_kl_fwd(x, x, estimator, True)
    per_token_kl_bwd(kl, slope, dtype, torch.float32)
    shaped_rewards(_empty(B), x, mask, scalar, 10 * scalar)
    y, moments = whiten_fwd(x, mask if full else None, None, scalar, not full)
    whiten_bwd(y, x, mask if full else None, moments, scalar, not full)


def _cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """(description, call of the launchers) over the options that change the code, and small, odd and large V."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for V, dtype, full in itertools.product((50257, 128256), dtypes, (False, True)):
        name = f"V={V} {str(dtype)[6:]}{' all options' if full else ''}"
        yield name, partial(launch_logits, 4, 8, V, dtype, full)
    for V in (1, 1000):
        yield f"V={V} float32 all options", partial(launch_logits, 4, 8, V, torch.float32, True)
    for width, dtype, full in itertools.product((8192, 1105), dtypes, (False, True)):
        name = f"tile of {width} {str(dtype)[6:]}{' all options' if full else ''}"
        yield name, partial(launch_linear, 32, width, dtype, full)
    for V, dtype in itertools.product((50257, 128256), dtypes):
        yield f"V={V} {str(dtype)[6:]}", partial(launch_sampling, 4, 8, V, dtype, False)
        yield f"V={V} {str(dtype)[6:]} top-k, top-p", partial(launch_sampling, 4, 8, V, dtype, True, 50, 0.9)
    for V, top_k, top_p in ((1, 1, 0.9), (1000, 50, 1.0), (1000, 0, 0.9)):
        yield f"V={V} float32 {top_k} {top_p}", partial(launch_sampling, 4, 8, V, torch.float32, True, top_k, top_p)
    for dtype, direction in itertools.product((torch.float32, torch.bfloat16), range(3)):
        name = f"V=128256 {str(dtype)[6:]} {('reverse', 'forward', 'jsd')[direction]}"
        yield name, partial(launch_full_kl, 4, 8, 128256, dtype, direction, True)
    yield "V=50257 float16 jsd", partial(launch_full_kl, 4, 8, 50257, torch.float16, 2, False)
    yield "V=1 float32 reverse", partial(launch_full_kl, 4, 8, 1, torch.float32, 0, False)
    for dtype, masked in itertools.product((torch.float32, torch.bfloat16), range(3)):
        name = f"T=131072 {str(dtype)[6:]} mask {('skip', 'stop', 'zero')[masked]}"
        yield name, partial(launch_gae, 4, 131072, dtype, True, masked)
    for offsets in (torch.int32, torch.int64):
        yield f"packed 131072 offsets {str(offsets)[6:]}", partial(launch_gae_packed, 4, 131072, offsets)
    for dtype, sequence in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        name = f"losses T=131072 {str(dtype)[6:]}{' sequences' if sequence else ''}"
        yield name, partial(launch_losses, 4, 131072, dtype, True, sequence)
    yield "losses T=1000 float32", partial(launch_losses, 4, 1000, torch.float32, False, False)
    for dtype, whiten in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        name = f"T=131072 {str(dtype)[6:]}{' whitened' if whiten else ''}"
        yield name, partial(launch_ppo_advantages, 4, 131072, dtype, whiten)
    for estimator, dtype in itertools.product(range(4), (torch.float32, torch.bfloat16)):
        full = dtype == torch.bfloat16
        yield (
            f"T=131072 {str(dtype)[6:]} estimator {estimator}",
            partial(launch_tokens, 4, 131072, dtype, estimator, full),
        )
    yield "T=1000 float32", partial(launch_gae, 4, 1000, torch.float32, False)


def _repetitions() -> Iterator[tuple[str, list[Callable[[], None]]]]:
    """(description, calls that shall share one compilation): batch, length and scalars change, nothing else."""
    calls = []
    for outer, inner in ((1, 1), (1, 3), (3, 1), (16, 16), (7, 4096)):
        for temperature in (1.0, 0.7):
            calls.append(partial(launch_logits, outer, inner, 50257, torch.bfloat16, False, temperature))
    yield "V=50257, any batch and temperature", calls
    calls = []
    for rows, width, first in ((1, 8192, 0), (16, 5008, 16), (37, 6000, 90000)):
        calls.append(partial(launch_linear, rows, width, torch.bfloat16, True, 0.1 * rows, first))
    yield "a tile anywhere", calls
    calls = []
    for outer, inner in ((1, 1), (1, 3), (16, 16), (7, 4096)):
        for top_k, top_p in ((1, 0.9), (16, 0.5), (50, 0.25)):
            calls.append(partial(launch_sampling, outer, inner, 50257, torch.bfloat16, False, top_k, top_p, top_p))
    yield "V=50257, any batch, temperature, top-k and top-p", calls
    calls = []
    for outer, inner in ((1, 1), (1, 3), (16, 16), (7, 4096)):
        for temperature in (1.0, 0.7):
            calls.append(partial(launch_full_kl, outer, inner, 50257, torch.bfloat16, 0, False, temperature))
    yield "two rows of V=50257, any batch and temperature", calls
    calls = []
    for B, T in ((1, 1), (1, 16), (3, 17), (16, 1024), (2, 131072)):
        for gamma in (1.0, 0.9):
            calls.append(partial(launch_gae, B, T, torch.float32, True, 0, gamma))
    yield "any batch, length and discount", calls
    sizes = ((1, 1), (1, 16), (3, 17), (16, 1024), (2, 131072))
    calls = [partial(launch_ppo_advantages, B, T, torch.float32, kl_coef=0.1 * T) for B, T in sizes]
    yield "any batch and length of a rollout", calls
    sizes = ((1, 1), (3, 17), (16, 16), (300, 131072))
    calls = []
    for B, T in ((1, 1), (1, 16), (3, 17), (16, 1024), (2, 131072)):
        for scalar in (1.0, 0.1):
            calls.append(partial(launch_tokens, B, T, torch.bfloat16, 2, False, scalar))
    yield "tokens of any batch, length and scalars", calls
    yield "any packing", [partial(launch_gae_packed, S, total, torch.int32) for S, total in sizes]
    sizes = ((1, 1), (3, 17), (16, 1024), (2, 131072))
    yield (
        "losses, any batch, length and clip",
        [partial(launch_losses, B, T, torch.float32, True, False, clip) for B, T in sizes for clip in (0.1, 1.0)],
    )


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
    run = JITFunction.run
    JITFunction.run = lambda *args, **kwargs: compiled.append(run(*args, **{**kwargs, "warmup": True}))
    for target_name, target in ((name, TARGETS[name]) for name in sys.argv[1:]):
        triton.runtime.driver.set_active(DeviceFreeDriver(target))
        for description, call in _cases():
            compiled.clear()
            call()
            for kernel in compiled:
                asm = kernel.asm
                usage = _nvidia_usage(asm["cubin"]) if "cubin" in asm else _amd_usage(asm["amdgcn"])
                row = {"target": target_name, "kernel": kernel.metadata.name, "case": description, **usage}
                print(json.dumps(row))
    triton.runtime.driver.set_active(DeviceFreeDriver(TARGETS["sm_90"]))
    for description, calls in _repetitions():
        compiled.clear()
        for call in calls:
            call()
        versions = Counter(kernel.metadata.name for kernel in {kernel.hash: kernel for kernel in compiled}.values())
        print(json.dumps({"repeated": description, "versions": versions}))


if __name__ == "__main__":
    main()
