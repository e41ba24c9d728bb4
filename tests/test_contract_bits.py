"""Same bits every run, whatever else is in the batch, wherever a row stands, however many threads there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import edge_cases
from support.backends import Backend, require_backend
from torch import Tensor

import rlhf_kernels as rk


def _logits_op(backend: Backend, temperature: float | Tensor = 0.7) -> Callable[..., list[Tensor]]:
    """(logits, labels, upstream) -> logprobs, entropy, gradient."""

    def call(logits: Tensor, labels: Tensor, upstream: Tensor) -> list[Tensor]:
        x = logits.detach().to(backend.device).requires_grad_()
        outputs = rk.selected_logprobs(x, labels.to(backend.device), temperature=temperature, with_entropy=True)
        upstream = upstream.to(backend.device)
        (grad,) = torch.autograd.grad(outputs, x, [upstream, 0.3 * upstream])
        return [tensor.detach().cpu() for tensor in (*outputs, grad)]

    return call


def _kl_op(
    backend: Backend, directions: tuple[str, ...] = ("reverse", "forward", "jsd")
) -> Callable[..., list[Tensor]]:
    """(logits, ref_logits, upstream) -> the divergence and its gradient in every direction."""

    def call(logits: Tensor, ref: Tensor, upstream: Tensor) -> list[Tensor]:
        x = logits.detach().to(backend.device).requires_grad_()
        outputs = []
        for direction in directions:
            kl = rk.full_kl(x, ref.to(backend.device), direction=direction, temperature=0.7)
            outputs += [kl, torch.autograd.grad(kl, x, upstream.to(backend.device))[0]]
        return [tensor.detach().cpu() for tensor in outputs]

    return call


def _gae_op(backend: Backend) -> Callable[..., list[Tensor]]:
    def call(rewards: Tensor, values: Tensor, mask: Tensor) -> list[Tensor]:
        moved = (x.to(backend.device) for x in (rewards, values, mask))
        return [tensor.cpu() for tensor in rk.gae(*moved)]

    return call


def _ppo_advantages_op(backend: Backend, whiten: bool) -> Callable[..., list[Tensor]]:
    def call(rewards: Tensor, values: Tensor, mask: Tensor) -> list[Tensor]:
        moved = (x.to(backend.device) for x in (rewards, -rewards, values[:, 0], values, mask))
        return [tensor.cpu() for tensor in rk.ppo_advantages(*moved, kl_coef=0.1, whiten=whiten)]

    return call


def _packed_gae_op(backend: Backend) -> Callable[..., list[Tensor]]:
    """(rewards, values, mask) [B, T] -> advantages, returns of their beginnings, packed; a row's mask says how long."""

    def call(rewards: Tensor, values: Tensor, mask: Tensor) -> list[Tensor]:
        lengths = (mask.shape[1] - mask[:, :7].int().sum(1)).clamp(min=0)
        inside = torch.arange(mask.shape[1]) < lengths[:, None]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(backend.device)
        moved = (x[inside].to(backend.device) for x in (rewards, values, mask))
        outputs = rk.gae(*moved, cu_seqlens=offsets)
        return [torch.zeros(mask.shape).masked_scatter(inside, x.cpu()) for x in outputs]

    return call


def _assert_rows_do_not_depend_on_the_batch(call: Callable[..., list[Tensor]], rows: list[Tensor]) -> None:
    """rows: arguments whose first dimension is the batch."""
    count = len(rows[0])
    whole = call(*rows)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    for a, b in zip(whole, call(*rows), strict=True):
        assert torch.equal(a, b), "two runs differ"
    for a, b in zip(whole, call(*(x[order] for x in rows)), strict=True):
        assert torch.equal(a[order], b), "the place in the batch matters"
    for few in (slice(0, 1), slice(1, 2), slice(count - 1, None), slice(1, 4)):
        for a, b in zip(whole, call(*(x[few] for x in rows)), strict=True):
            assert torch.equal(a[few], b), "the size of the batch matters"
        for a, b in zip(whole, call(*(x[few].clone() for x in rows)), strict=True):
            assert torch.equal(a[few], b), "the address matters"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [128, 1001, 40_000])
def test_logits_rows(backend: Backend, V: int, dtype: torch.dtype) -> None:
    rows = 5 if backend.interpreted else 9 if V > 10_000 else 257
    logits = edge_cases.logits_of("normal", (rows, V), dtype)
    labels = edge_cases.labels_for((rows,), V)
    upstream = torch.randn(rows, generator=torch.Generator().manual_seed(4))
    _assert_rows_do_not_depend_on_the_batch(_logits_op(backend), [logits, labels, upstream])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [128, 1001, 5000])
def test_full_kl_rows(backend: Backend, V: int, dtype: torch.dtype) -> None:
    rows = 5 if backend.interpreted else 257 if V == 1001 else 9
    logits, ref = edge_cases.logits_of("normal", (2, rows, V), dtype)
    upstream = torch.randn(rows, generator=torch.Generator().manual_seed(4))
    directions = (("reverse",), ("forward",), ("jsd",))[(128, 1001, 5000).index(V)] if backend.interpreted else None
    call = _kl_op(backend, directions) if directions else _kl_op(backend)
    _assert_rows_do_not_depend_on_the_batch(call, [logits, ref, upstream])


@pytest.mark.parametrize(
    ("filters", "dtype"), [({}, torch.float32), ({"top_k": 20, "top_p": 0.8}, torch.bfloat16)], ids=str
)
def test_sampled_rows(backend: Backend, small_blocks: None, filters: dict[str, object], dtype: torch.dtype) -> None:
    """Given its u, a row's token and logprob are its own, to the bit."""
    if backend.interpreted and filters:
        pytest.skip("several passes over every row, at the interpreter's price")
    rows, V = (5, 130) if backend.interpreted else (257, 129 if backend.name == "reference" else 1001)
    logits = edge_cases.logits_of("normal", (rows, V), dtype)
    uniform = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(6))

    def call(logits: Tensor, uniform: Tensor) -> list[Tensor]:
        moved = logits.to(backend.device), uniform.to(backend.device)
        return [x.cpu() for x in rk.sample_tokens(moved[0], uniform=moved[1], temperature=0.7, **filters)]

    _assert_rows_do_not_depend_on_the_batch(call, [logits, uniform])


@pytest.mark.parametrize("op", ["selected_logprobs", "full_kl", "sample_tokens", "linear_logprobs"])
def test_a_masked_rows_temperature_is_nobodys_business(
    backend: Backend, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like its logits: 0, negative or NaN there is no error and changes no bit of results and gradients."""
    rows, V = 6, 130
    generator = torch.Generator().manual_seed(8)
    logits, ref = (torch.randn(rows, V, generator=generator).to(backend.device) for _ in range(2))
    weight = torch.randn(V, 16, generator=generator).to(backend.device)
    labels = torch.randint(0, V, (rows,), generator=generator).to(backend.device)
    mask = torch.tensor([True, False, True, False, True, False], device=backend.device)
    uniform = torch.rand(rows, dtype=torch.float64, generator=generator).to(backend.device)

    def call(temperature: Tensor) -> list[Tensor]:
        x, options = logits.clone().requires_grad_(), {"mask": mask, "temperature": temperature.to(backend.device)}
        if op == "sample_tokens":
            return list(rk.sample_tokens(logits, uniform=uniform, **options))
        if op == "selected_logprobs":
            outputs = rk.selected_logprobs(x, labels, with_entropy=True, **options)
        elif op == "full_kl":
            outputs = (rk.full_kl(x, ref, **options),)
        else:
            outputs = rk.linear_logprobs(x[:, :16], weight, labels, with_entropy=True, **options)
        return [*outputs, *torch.autograd.grad(sum(y.sum() for y in outputs), x)]

    plain = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.7, 1.0])
    odd = torch.where(mask.cpu(), plain, torch.tensor([1.0, 0.0, 1.0, -3.0, 1.0, float("nan")]))
    for expected, found in zip(call(plain), call(odd), strict=True):
        assert torch.equal(expected, found)
    monkeypatch.setenv("RLHF_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="temperature holds a value that is not > 0"):
        call(torch.where(mask.cpu(), 0.0, plain))


def test_gae_rows(backend: Backend, small_blocks: None) -> None:
    rows = 9 if backend.interpreted else 257
    generator = torch.Generator().manual_seed(5)
    rewards, values = (torch.randn(rows, 45, generator=generator) for _ in range(2))
    mask = torch.rand(rows, 45, generator=generator) > 0.3
    _assert_rows_do_not_depend_on_the_batch(_gae_op(backend), [rewards, values, mask])
    _assert_rows_do_not_depend_on_the_batch(_packed_gae_op(backend), [rewards, values, mask])
    _assert_rows_do_not_depend_on_the_batch(_ppo_advantages_op(backend, whiten=False), [rewards, values, mask])
    whitened = [_ppo_advantages_op(backend, whiten=True)(rewards, values, mask) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*whitened, strict=True))


def _token_rows_op(backend: Backend) -> Callable[..., list[Tensor]]:
    """The ops of the token family whose rows know nothing of each other, with their gradients."""

    def call(logprobs: Tensor, ref: Tensor, mask: Tensor, scores: Tensor) -> list[Tensor]:
        leaves = [x.detach().to(backend.device).requires_grad_() for x in (logprobs, ref)]
        kl = rk.per_token_kl(*leaves, estimator="k3")
        grads = torch.autograd.grad(kl.square().sum(), leaves)
        rewards = rk.shaped_rewards(scores.to(backend.device), kl, mask.to(backend.device), kl_coef=0.1, clip=0.5)
        return [tensor.detach().cpu() for tensor in (kl, *grads, rewards)]

    return call


def test_token_rows(backend: Backend, small_blocks: None) -> None:
    rows = 7 if backend.interpreted else 257
    generator = torch.Generator().manual_seed(6)
    logprobs, ref = (torch.randn(rows, 45, generator=generator) for _ in range(2))
    mask, scores = torch.rand(rows, 45, generator=generator) > 0.3, torch.randn(rows, generator=generator)
    _assert_rows_do_not_depend_on_the_batch(_token_rows_op(backend), [logprobs, ref, mask, scores])


def _whiten_op(backend: Backend) -> Callable[..., list[Tensor]]:
    def call(x: Tensor, mask: Tensor, upstream: Tensor) -> list[Tensor]:
        leaf = x.detach().to(backend.device).requires_grad_()
        white = rk.whiten(leaf, mask.to(backend.device))
        return [white.detach().cpu(), torch.autograd.grad(white, leaf, upstream.to(backend.device))[0].cpu()]

    return call


def test_whiten_gives_the_same_bits_every_run(backend: Backend, small_blocks: None) -> None:
    x, upstream = edge_cases.logits_of("wide", (2, 9, 37), torch.float32)
    mask = edge_cases.MASKS["holes"](x.shape)
    for a, b in zip(*(_whiten_op(backend)(x, mask, upstream) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("V", [1000, 131_072])
def test_number_of_threads(V: int) -> None:
    """One long row is where a library splits the sum over threads."""
    logits, labels = edge_cases.logits_of("normal", (3, V), torch.float32), edge_cases.labels_for((3,), V)
    # Large enough to be shared among threads: 32,768 positions are a task.
    rewards, values = edge_cases.logits_of("normal", (2, 2048, 40), torch.float32)
    scanned = rewards, values, edge_cases.MASKS["holes"](rewards.shape)
    x = edge_cases.logits_of("wide", (300, 500), torch.float32)  # more than a thread takes at a time
    before = torch.get_num_threads()
    for name in ("reference", "cpu"):
        if name == "cpu" and rk.dispatch.available()["cpu"]:
            continue
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            try:
                with rk.use_backend(name):
                    device = Backend(name, "cpu")
                    one = _logits_op(device)(logits[:1], labels[:1], torch.ones(1))
                    all_rows = _logits_op(device)(logits, labels, torch.ones(3))
                    all_rows += _kl_op(device)(logits, logits.flip(0), torch.ones(3))
                    one += _kl_op(device)(logits[:1], logits[2:], torch.ones(1))
                    scans = [*_gae_op(device)(*scanned), *_packed_gae_op(device)(*scanned)]
                    if name == "cpu":  # the reference's whitening sums as torch does, which depends on the threads
                        scans += _ppo_advantages_op(device, whiten=True)(*scanned)
                    results.append([*one, *all_rows, *scans])
                    results[-1] += _token_rows_op(device)(x, x.flip(0), x > 29, x[:, 0])
                    if name == "cpu":  # the reference sums with torch.sum, which splits by threads
                        results[-1] += _whiten_op(device)(x, x > 29, x.flip(0))
            finally:
                torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_layout_changes_no_bit(backend: Backend) -> None:
    """A strided view and its copy: also where the copy is aligned to 16 elements and the view is not."""
    for V in (48, 37):
        logits = edge_cases.logits_of("normal", (3, 5, V), torch.bfloat16)
        labels = edge_cases.labels_for((3, 5), V)
        expected = _logits_op(backend)(logits, labels, torch.ones(3, 5))
        for place in edge_cases.LAYOUTS.values():
            for a, b in zip(expected, _logits_op(backend)(place(logits), labels, torch.ones(3, 5)), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("V", [48, 37])
def test_triton_is_promised_alignment_only_where_it_holds(V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong promise is a fault on a GPU, unseen by the interpreter; one that varies with the layout changes bits."""
    require_backend("triton")
    from rlhf_kernels.backends.triton import logits as module

    launches = []
    monkeypatch.setattr(module, "launch", lambda *args, **kwargs: launches.append((args, kwargs["ALIGN"])))
    labels, stats = edge_cases.labels_for((15,), V), torch.zeros(15, 2)
    for place in edge_cases.LAYOUTS.values():
        logits = place(edge_cases.logits_of("normal", (3, 5, V), torch.bfloat16))
        arguments = (logits, labels, None, 1.0, None)
        module.selected_logprobs_fwd(*arguments, False)
        assert launches[-1][1] == (16 if V % 16 == 0 else 1)
        module.selected_logprobs_bwd(torch.ones(15), None, *arguments, stats, torch.empty(0), False)
        if logits.stride(-1) == 1:
            module.selected_logprobs_bwd(torch.ones(15), None, *arguments, stats, torch.empty(0), True)
    for (kernel, _, *args), align in launches:
        if align == 16:
            rows = [args[0]] if "fwd" in kernel.fn.__name__ else [args[0], args[8]]
            for x in rows:
                assert x.data_ptr() % 32 == 0
                assert all(stride % 16 == 0 for stride in x.stride()[:-1])
