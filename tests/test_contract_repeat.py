"""Every native op again and again: a thousand runs, eight Python threads at once, any number of torch's threads, and
every instruction set of this machine; each time the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import edge_cases
from support.backends import require_backend
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import dispatch

B, T, V, D = 3, 70, 300, 24  # long enough for several tasks where a kernel hands them out by element
ISAS = dispatch.backend_module("cpu")._native.available_isas() if dispatch.available()["cpu"] is None else ["not built"]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LOGITS, REF_LOGITS = _normal(B, T, V), _normal(B, T, V, seed=1)
LABELS = edge_cases.labels_for((B, T), V)
MASK = edge_cases.MASKS["holes"](torch.Size((B, T)))
HIDDEN, WEIGHT = _normal(B, T, D, seed=2), _normal(V, D, seed=3)
A, C, E, F = (_normal(B, T, seed=seed) for seed in range(4, 8))
SCORES = _normal(B, seed=8)
OFFSETS = torch.tensor([0, 5, 5, 100, B * T])


def _backward(outputs: Tensor | tuple[Tensor, ...], *leaves: Tensor) -> list[Tensor]:
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(sum(y.sum() for y in outputs), leaves)]


def _leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def _linear_logprobs() -> list[Tensor]:
    hidden, weight = _leaf(HIDDEN), _leaf(WEIGHT)
    return _backward(rk.linear_logprobs(hidden, weight, LABELS, mask=MASK, with_entropy=True), hidden, weight)


def _linear_policy_loss() -> list[Tensor]:
    hidden, weight = _leaf(HIDDEN), _leaf(WEIGHT)
    loss, stats = rk.linear_policy_loss(hidden, weight, LABELS, A - 5, C, MASK, entropy_coef=0.1)
    return [*_backward(loss, hidden, weight), *stats.values()]


def _loss(function: Callable, x: Tensor, *rest: Tensor) -> list[Tensor]:
    x = _leaf(x)
    loss, stats = function(x, *rest, MASK, aggregate="seq-mean-token-mean")
    return [*_backward(loss, x), *stats.values()]


def _by_gradient(function: Callable[[Tensor], Tensor | tuple[Tensor, ...]], x: Tensor) -> list[Tensor]:
    leaf = _leaf(x)
    return _backward(function(leaf), leaf)


CALLS: dict[str, Callable[[], list[Tensor]]] = {
    "full_kl": lambda: _by_gradient(lambda x: rk.full_kl(x, REF_LOGITS, direction="jsd", mask=MASK), LOGITS),
    "gae": lambda: list(rk.gae(A, C, MASK)),
    "gae_packed": lambda: list(rk.gae(A.flatten(), C.flatten(), MASK.flatten(), cu_seqlens=OFFSETS)),
    "linear_logprobs": _linear_logprobs,
    "linear_policy_loss": _linear_policy_loss,
    "per_token_kl": lambda: _by_gradient(lambda x: rk.per_token_kl(x, C, estimator="k3"), A),
    "policy_loss": lambda: _loss(rk.policy_loss, A, C, E),
    "ppo_advantages": lambda: list(rk.ppo_advantages(A, C, SCORES, E, MASK, kl_coef=0.1)),
    "sample_tokens": lambda: list(rk.sample_tokens(LOGITS, top_k=50, top_p=0.9, seed=3)),
    "selected_logprobs": lambda: _by_gradient(
        lambda x: rk.selected_logprobs(x, LABELS, mask=MASK, with_entropy=True), LOGITS
    ),
    "shaped_rewards": lambda: [rk.shaped_rewards(SCORES, A, MASK, kl_coef=0.1)],
    "value_loss": lambda: _loss(rk.value_loss, A, C, E),
    "whiten": lambda: _by_gradient(lambda x: rk.whiten(x, MASK), A),
}


@pytest.fixture(autouse=True)
def _forced() -> Iterator[None]:
    require_backend("cpu")
    with rk.use_backend("cpu"):
        yield


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native = dispatch.backend_module("cpu")._native
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def _assert_same(expected: list[Tensor], got: list[Tensor]) -> None:
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)


def test_every_op_with_a_kernel_is_here() -> None:
    (cpu,) = (backend for backend in dispatch.BACKENDS if backend.name == "cpu")
    assert set(cpu.ops) <= set(CALLS) | {"linear_cross_entropy", "linear_dpo_loss", "linear_kl"}


@pytest.mark.parametrize("op", CALLS)
def test_a_thousand_runs(op: str, threads: Callable[[int], None]) -> None:
    threads(1)  # two would wait for each other; the number of threads is the next test's matter
    expected = CALLS[op]()
    for _ in range(1000):
        _assert_same(expected, CALLS[op]())


# A GEMM of torch's may sum in another order with other threads; the contract leaves the linear family out.
@pytest.mark.parametrize("op", [op for op in CALLS if not op.startswith("linear")])
def test_any_number_of_threads(op: str, isa: str, threads: Callable[[int], None]) -> None:
    threads(1)
    expected = CALLS[op]()
    for count in (2, 3, 8):
        threads(count)
        for _ in range(3):
            _assert_same(expected, CALLS[op]())


@pytest.mark.parametrize("op", CALLS)
def test_eight_python_threads(op: str, isa: str, threads: Callable[[int], None]) -> None:
    threads(1)
    expected = CALLS[op]()
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: CALLS[op](), range(32)):
            _assert_same(expected, got)
