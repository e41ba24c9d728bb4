"""Run every kernel on memory that ends, or begins, at a page nobody may touch, and across offsets past 2**31.

Run as a program: `python -m support.guarded_memory {cpu|triton} {behind|before|far}`. An access outside an input kills
the process; a wrong result raises; otherwise it prints how many calls it made.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # CPU memory, on every machine

import torch
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import dispatch
from support import edge_cases

PAGE = mmap.PAGESIZE
MAP_NORESERVE = 0x4000  # Linux; mmap names it from Python 3.12 on
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_keep: list[mmap.mmap] = []


def _map(size: int) -> tuple[int, mmap.mmap]:
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    _keep.append(area)
    return ctypes.addressof(ctypes.c_char.from_buffer(area)), area


def guarded(x: Tensor, side: str) -> Tensor:
    """A copy of `x` whose last byte lies before, or whose first byte lies behind, a page without any access."""
    if x.numel() == 0:
        return x
    pages = -(-x.nbytes // PAGE) * PAGE
    address, area = _map(pages + PAGE)
    start = 0 if side == "behind" else PAGE
    offset = start + (pages - x.nbytes if side == "behind" else 0)
    if _libc.mprotect(address + (pages if side == "behind" else 0), PAGE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(area, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
    return copy.copy_(x)


def _same(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def check_logits(backend: str, side: str) -> int:
    """The backend's own functions, so that bad labels reach the kernel."""
    module, calls = dispatch.backend_module(backend), 0
    for V in (1, 37, 128, 4097):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for label_dtype in (torch.int64, torch.int32):
                mask = torch.tensor([True, False, True])
                logits = edge_cases.logits_of("normal", (1, 3, V), dtype, calls)
                labels = torch.tensor([0, -(2**31), V - 1], dtype=label_dtype)
                plain = (logits, labels, mask, 1.0, torch.tensor([0.5, 1.0, 2.0]))
                fenced = [guarded(x, side) if isinstance(x, Tensor) else x for x in plain]
                outputs = []
                for arguments in (plain, fenced):
                    logprobs, entropy, stats = module.selected_logprobs_fwd(*arguments, True)
                    g = [guarded(torch.ones(3), side) for _ in range(2)]
                    grad = module.selected_logprobs_bwd(*g, *arguments, stats, entropy, False)
                    inplace = module.selected_logprobs_bwd(*g, *arguments, stats, entropy, True)
                    outputs.append((logprobs, entropy, grad, inplace))
                for a, b in zip(*outputs, strict=True):
                    _same(a, b)
                calls += 1
        for bad in (-1, V, 2**31 - 1, -(2**31)):
            labels = guarded(torch.tensor([0, bad, 0]), side)
            arguments = (guarded(torch.zeros(1, 3, V), side), labels, None, 1.0, None)
            if backend == "cpu":
                try:
                    module.selected_logprobs_fwd(*arguments, False)
                except IndexError:
                    calls += 1
                continue
            logprobs, entropy, stats = module.selected_logprobs_fwd(*arguments, False)
            grad = module.selected_logprobs_bwd(torch.ones(3), None, *arguments, stats, entropy, False)
            assert logprobs.isnan().tolist() == [False, True, False]
            assert grad.isnan().all(-1).flatten().tolist() == [False, True, False]
            assert grad[0, [0, 2]].isfinite().all()
            calls += 1
    return calls


def check_full_kl(backend: str, side: str) -> int:
    module, calls = dispatch.backend_module(backend), 0
    for V in (1, 37, 128, 4097):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for direction in range(3):
                logits, ref = edge_cases.logits_of("normal", (2, 1, 3, V), dtype, calls)
                mask, temperatures = torch.tensor([True, False, True]), torch.tensor([0.5, 1.0, 2.0])
                plain = (logits, ref, mask, 1.0, temperatures, direction)
                fenced = [guarded(x, side) if isinstance(x, Tensor) else x for x in plain]
                outputs = []
                for arguments in (plain, fenced):
                    kl, stats = module.full_kl_fwd(*arguments)
                    grad = module.full_kl_bwd(guarded(torch.ones(3), side), *arguments, guarded(stats, side))
                    outputs.append((kl, stats, grad))
                for a, b in zip(*outputs, strict=True):
                    _same(a, b)
                calls += 1
    return calls


def check_gae(backend: str, side: str) -> int:
    if backend == "triton":
        from rlhf_kernels.backends.triton import scan

        scan.BLOCK_T = 16  # the interpreter spends 0.1 ms on each position of a block
    calls = 0
    for time in (1, 16, 31, 33):
        for dtype in (torch.float32, torch.bfloat16):
            rewards, values = edge_cases.logits_of("normal", (2, 2, time), dtype)
            mask = edge_cases.MASKS["holes"](rewards.shape)
            for masked in ("skip", "stop", "zero"):
                plain = (rewards, values, mask)
                bootstrap = torch.ones(2)
                with rk.use_backend(backend):
                    expected = rk.gae(*plain, bootstrap=bootstrap, masked=masked)
                    fenced = [guarded(x, side) for x in plain]
                    got = rk.gae(*fenced, bootstrap=guarded(bootstrap, side), masked=masked)
                for a, b in zip(expected, got, strict=True):
                    _same(a, b)
                calls += 1
    return calls


def check_gae_packed(backend: str, side: str) -> int:
    calls = 0
    lengths = [1, 0, 16, 33, 31, 2]
    total = sum(lengths)
    for dtype in (torch.float32, torch.bfloat16):
        rewards, values = edge_cases.logits_of("normal", (2, total), dtype)
        mask = edge_cases.MASKS["holes"](rewards.shape)
        for offset_dtype in (torch.int32, torch.int64):
            offsets = torch.tensor([0, *lengths]).cumsum(0).to(offset_dtype)
            plain = (rewards, values, mask, torch.ones(len(lengths)), offsets)
            fenced = [guarded(x, side) for x in plain]
            for a, b in zip(*(_gae_packed(backend, *tensors) for tensors in (plain, fenced)), strict=True):
                _same(a, b)
            calls += 1
            top = torch.iinfo(offset_dtype).max
            for wrong in ([5, total], [0, total + 5], [0, -5, total], [9, 2, 1], [top, -top], [-top, top], [total] * 3):
                offsets = guarded(torch.tensor(wrong, dtype=offset_dtype), side)
                bootstrap = guarded(torch.ones(len(wrong) - 1), side)
                try:
                    _gae_packed(backend, *fenced[:3], bootstrap, offsets)
                except ValueError:
                    assert backend == "cpu"
                else:
                    assert backend == "triton"
                calls += 1
    return calls


def _gae_packed(backend: str, rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor, offsets: Tensor):
    """The backend's own function, so that wrong offsets reach the kernel."""
    module = dispatch.backend_module(backend)
    return module.gae_packed(rewards, values, mask, bootstrap, offsets, 0.9, 0.95, 0)


def check_far(backend: str) -> int:
    """Rows more than 2**31 elements apart: 10 GB of addresses, of which only the rows themselves become memory."""
    if backend == "triton":
        from triton.runtime import interpreter

        # The interpreter works on our memory itself; copying results "back" would touch all of it.
        interpreter.GridExecutor._restore_args_dev = lambda *_: None
    V, stride = 37, 1_200_000_000
    _, area = _map(4 * (2 * stride + V))
    flat = torch.frombuffer(area, dtype=torch.float32, count=2 * stride + V)
    labels = torch.tensor([3, 4, 5])
    near = edge_cases.logits_of("normal", (3, V), torch.float32)
    for shape, strides in (((3, 1, V), (stride, V, 1)), ((1, 3, V), (V, stride, 1))):
        far = flat.as_strided(shape, strides)
        results = []
        for logits in (near.view(shape), far.copy_(near.view(shape))):
            module = dispatch.backend_module(backend)
            arguments = (logits, labels, None, 0.7, None)
            logprobs, entropy, stats = module.selected_logprobs_fwd(*arguments, True)
            g = torch.ones(3)
            grad = module.selected_logprobs_bwd(g, g, *arguments, stats, entropy, False)
            inplace = module.selected_logprobs_bwd(g, g, *arguments, stats, entropy, True)
            results.append((logprobs, entropy, grad, inplace.clone()))
            logits.copy_(near.view(shape))  # the gradient lies there now
            for first, second in ((logits, 2 * near.view(shape)), (2 * near.view(shape), logits)):
                kl, stats = module.full_kl_fwd(first, second, None, 0.7, None, 0)
                grad = module.full_kl_bwd(g, first, second, None, 0.7, None, 0, stats)
                results[-1] += (kl, grad)
            uniform = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
            results[-1] += module.sample_tokens(logits, uniform, None, 0.7, None, 20, 0.9)
        for a, b in zip(*results, strict=True):
            _same(a, b)
    rewards = flat.as_strided((3, 20), (stride, 1)).copy_(near[:, :20])
    with rk.use_backend(backend):
        for a, b in zip(rk.gae(rewards, rewards), rk.gae(near[:, :20], near[:, :20]), strict=True):
            _same(a, b)
        close = (near[:, :20], near[:, 1:21], near[:, 0], near[:, 2:22], near[:, :20] > 0)
        apart = [flat.as_strided((3, 20), (stride - 200, 1), 100 * n).copy_(close[n]) for n in (0, 1, 3)]
        for a, b in zip(
            rk.ppo_advantages(*close, kl_coef=0.1),
            rk.ppo_advantages(*apart[:2], close[2], apart[2], close[4], kl_coef=0.1),
            strict=True,
        ):
            _same(a, b)
        mask = edge_cases.MASKS["holes"](rewards.shape)
        for call in (
            lambda x: rk.per_token_kl(x, x.flip(0), estimator="k3"),
            lambda x: rk.shaped_rewards(torch.ones(3), x, mask, kl_coef=0.1),
            lambda x: rk.whiten(x, mask),
        ):
            _same(call(rewards), call(near[:, :20]))
        for call in (
            lambda x: rk.policy_loss(x, x.detach() + 0.1, x.detach(), mask),
            lambda x: rk.policy_loss(x, x.detach() + 0.1, x.detach(), mask, ratio="sequence"),
            lambda x: rk.policy_loss(near[:, :20].clone().requires_grad_(), x.detach(), x.detach(), mask),
            lambda x: rk.value_loss(x, x.detach() + 0.3, x.detach() - 0.5, mask),
            lambda x: rk.value_loss(near[:, 1:21].clone().requires_grad_(), x.detach(), x.detach(), mask),
        ):
            results = []
            for x in (rewards, near[:, :20]):
                loss, stats = call(x.detach().requires_grad_())
                results.append([loss.detach(), *stats.values()])
            for a, b in zip(*results, strict=True):
                _same(a, b)
        grads = []
        for x in (rewards, near[:, :20]):
            leaf = x.detach().requires_grad_()
            loss = rk.policy_loss(leaf, x + 0.1, x, mask)[0] + rk.value_loss(leaf, x + 0.3, x - 0.5, mask)[0]
            grads += torch.autograd.grad(loss, leaf)
        _same(*grads)
    return 10


def check_ppo_advantages(backend: str, side: str) -> int:
    calls = 0
    for time in (1, 16, 31, 33):
        for dtype in (torch.float32, torch.bfloat16):
            logprobs, ref_logprobs, values = edge_cases.logits_of("normal", (3, 2, time), dtype)
            plain = (logprobs, ref_logprobs, torch.ones(2), values, edge_cases.MASKS["holes"](values.shape))
            fenced = [guarded(x, side) for x in plain]
            with rk.use_backend(backend):
                results = [rk.ppo_advantages(*tensors, kl_coef=0.1) for tensors in (plain, fenced)]
            for a, b in zip(*results, strict=True):
                _same(a, b)
            calls += 1
    return calls


def check_tokens(backend: str, side: str) -> int:
    """per_token_kl, shaped_rewards and whiten with their gradients, on whole and on ragged chunks."""
    module, calls = dispatch.backend_module(backend), 0
    for time in (1, 8, 37, 1025):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x, ref, grad = edge_cases.logits_of("normal", (3, 2, time), torch.float32)
            mask = edge_cases.MASKS["holes"](x.shape)
            plain = x.to(dtype), ref, grad, mask, torch.ones(2)
            outputs = []
            for a, b, g, m, scores in (plain, [guarded(tensor, side) for tensor in plain]):
                kl, slope = module.per_token_kl_fwd(a, b, 2, True)
                kl_grads = module.per_token_kl_bwd(g, guarded(slope, side), dtype, torch.float32)
                rewards = module.shaped_rewards(scores, a, m, 0.1, 0.5)
                y, moments = module.whiten_fwd(a, m, None, 1e-8, True)
                grad_x = module.whiten_bwd(g, a, m, guarded(moments, side), 1e-8, True)
                outputs.append((kl, slope, *kl_grads, rewards, y, moments, grad_x))
            for one, other in zip(*outputs, strict=True):
                _same(one, other)
            calls += 1
    return calls


def check_linear(backend: str, side: str) -> int:
    """Both epilogues of a tile, bare and with bias, softcap and labels outside the tile."""
    module, calls = dispatch.backend_module(backend), 0
    for width in (1, 37, 128, 1100):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for dressed in (False, True):
                tile = edge_cases.logits_of("normal", (3, width), dtype, calls)
                bias = edge_cases.logits_of("normal", (width,), torch.float32) if dressed else None
                labels = torch.tensor([5, 4 + width, -(2**31)] if dressed else [5, 5 + width, 2**31])
                start = torch.tensor([float("-inf"), 0.0, 0.0, float("nan")], dtype=torch.float64).repeat(3, 1)
                plain = (tile, bias, labels, torch.tensor([0.5, 1.0, 2.0]), start, torch.tensor([[0.3, 0.2, 1, 2]] * 3))
                outputs = []
                for place in (Tensor.clone, lambda x: guarded(x, side)):
                    x, b, label, temperature, state, rows = (None if y is None else place(y) for y in plain)
                    head = (x, 5, b, 3.0 if dressed else 0.0, 0.7 if dressed else 1.0, label, 1.0, temperature)
                    module.online_softmax_update(*head, state, True)
                    module.linear_gradient(*head, rows)
                    outputs.append((state, x))
                for one, other in zip(*outputs, strict=True):
                    _same(one, other)
                calls += 1
    return calls


def check_products(backend: str, side: str) -> int:
    """Matrices of every dtype in both layouts, of whole and ragged register tiles and pairs."""
    module, calls = dispatch.backend_module(backend), 0
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for m, n, k in ((1, 1, 1), (3, 33, 5), (13, 16, 32), (12, 65, 129)):
        for a_dtype, b_dtype, turned in itertools.product(dtypes, dtypes, (False, True)):
            a = edge_cases.logits_of("normal", (k, m) if turned else (m, k), a_dtype, calls)
            b = edge_cases.logits_of("normal", (n, k) if turned else (k, n), b_dtype, calls + 1)
            outputs = []
            for place in (Tensor.clone, lambda x: guarded(x, side)):
                out = place(torch.ones(m, n))
                factors = [x.T if turned else x for x in (place(a), place(b))]
                for accumulate, round_a in ((False, False), (True, True)):
                    module.fp32_product(*factors, out=out, accumulate=accumulate, round_a=round_a)
                outputs.append([out])
            for one, other in zip(*outputs, strict=True):
                _same(one, other)
            calls += 1
    return calls


def check_sampling(backend: str, side: str) -> int:
    """Every filter on whole and on ragged blocks, a row in the middle that nobody may read."""
    module, calls = dispatch.backend_module(backend), 0
    sizes, dtypes = (1, 37, 128, 4097), (torch.float32, torch.float16, torch.bfloat16)
    filters = ((0, 1.0), (1, 1.0), (0, 0.8), (30, 0.8))
    if backend == "triton":  # the filters take several passes over a row, at the interpreter's price
        from rlhf_kernels.backends.triton import sampling

        sampling.blocks = lambda V: (128, 1)
        sizes, dtypes, filters = (37, 129), dtypes[:1], filters[::3]
    for V, dtype, (top_k, top_p) in itertools.product(sizes, dtypes, filters):
        logits = edge_cases.logits_of("normal", (1, 3, V), dtype, calls)
        mask, temperatures = torch.tensor([True, False, True]), torch.tensor([0.5, 1.0, 2.0])
        uniform = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
        plain = (logits, uniform, mask, 1.0, temperatures, min(top_k, V), top_p)
        fenced = [guarded(x, side) if isinstance(x, Tensor) else x for x in plain]
        for a, b in zip(*(module.sample_tokens(*arguments) for arguments in (plain, fenced)), strict=True):
            _same(a, b)
        calls += 1
    return calls


def check_losses(backend: str, side: str) -> int:
    """policy_loss by token and by sequence, and value_loss, with their gradients."""
    calls = 0
    for time, dtype in itertools.product((1, 37, 1025), (torch.float32, torch.bfloat16)):
        mask = edge_cases.MASKS["holes"](torch.Size((2, time)))
        plain = (*edge_cases.logits_of("normal", (4, 2, time), dtype, calls), mask)
        outputs = []
        for place in (Tensor.clone, lambda x: guarded(x, side)):
            x, old, third, weights, counted = (place(y) for y in plain)
            outputs.append([])
            with rk.use_backend(backend):
                for ratio in ("token", "sequence"):
                    leaf = x.requires_grad_()
                    loss, stats = rk.policy_loss(leaf, old, third, counted, importance_weights=weights, ratio=ratio)
                    outputs[-1] += [loss, *stats.values(), *torch.autograd.grad(loss, leaf)]
                loss, stats = rk.value_loss(leaf, old, third, counted)
                outputs[-1] += [loss, *stats.values(), *torch.autograd.grad(loss, leaf)]
        for a, b in zip(*outputs, strict=True):
            _same(a.detach(), b.detach())
        calls += 1
    return calls


def check_near(backend: str, side: str) -> int:
    checks = [
        check_full_kl,
        check_logits,
        check_gae,
        check_gae_packed,
        check_ppo_advantages,
        check_tokens,
        check_linear,
        check_products,
    ]
    checks += [check_sampling, check_losses]
    return sum(check(backend, side) for check in checks)


if __name__ == "__main__":
    name, where = sys.argv[1:]
    print(check_far(name) if where == "far" else check_near(name, where))
