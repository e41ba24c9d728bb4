"""The preference family against the formulas of the papers, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from support import truth
from torch import Tensor
from torch.nn.functional import logsigmoid

import rlhf_kernels as rk


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _formula(chosen: float, rejected: float, margin: float = 0.0, label: float = 1.0) -> float:
    d = chosen - rejected
    return label * _softplus(margin - d) + (1 - label) * _softplus(margin + d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("margin", [None, 0.3, "tensor"])
@pytest.mark.parametrize("label", [None, 0.5, 0.9, "tensor"])
def test_values_and_gradients(dtype: torch.dtype, margin: float | str | None, label: float | str | None) -> None:
    generator = torch.Generator().manual_seed(3)
    chosen, rejected = (4 * torch.randn(50, generator=generator).to(dtype) for _ in range(2))
    chosen.requires_grad_()
    rejected.requires_grad_()
    given_margin = torch.rand(50, generator=generator) if margin == "tensor" else margin
    given_label = torch.rand(50, generator=generator) if label == "tensor" else label
    margins = torch.as_tensor(0.0 if given_margin is None else given_margin, dtype=torch.float64).expand(50)
    labels = torch.as_tensor(1.0 if given_label is None else given_label, dtype=torch.float64).expand(50)

    losses = rk.pairwise_loss(chosen, rejected, margin=given_margin, label=given_label, reduction="none")
    assert losses.dtype == torch.float32
    tokens = (x.detach().double().tolist() for x in (chosen, rejected, margins, labels))
    expected = torch.tensor([_formula(*pair) for pair in zip(*tokens, strict=True)], dtype=torch.float64)
    d, m = chosen.detach().float() - rejected.detach().float(), margins.float()
    q = labels.float()
    plain = -q * logsigmoid(d - m) - (1 - q) * logsigmoid(-d - m)
    truth.assert_accurate(losses, expected, truth.max_error(plain, expected))

    mean = rk.pairwise_loss(chosen, rejected, margin=given_margin, label=given_label)
    assert mean.item() == pytest.approx(expected.mean().item(), rel=1e-6)
    grad, rejected_grad = torch.autograd.grad(losses.sum(), [chosen, rejected])

    def slope_of(d: Tensor, m: Tensor, q: Tensor) -> Tensor:
        return (1 - q) * torch.sigmoid(d + m) - q * torch.sigmoid(m - d)

    slope = slope_of(chosen.detach().double() - rejected.detach().double(), margins, labels)
    truth.assert_accurate(grad, slope, truth.max_error(slope_of(d, m, q).to(dtype), slope))
    assert torch.equal(grad, -rejected_grad)


def test_known_values() -> None:
    losses = rk.pairwise_loss(torch.tensor([0.0, 5.0, 0.0]), torch.tensor([10.0, 0.0, 0.0]), reduction="none")
    expected = torch.tensor([10.000045, 0.0067153, 0.6931472])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("margin", [None, 0.0, 3.0])
def test_a_tie_pulls_both_ways_alike(margin: float | None) -> None:
    chosen = torch.tensor([2.0], requires_grad=True)
    (grad,) = torch.autograd.grad(rk.pairwise_loss(chosen, torch.tensor([2.0]), label=0.5, margin=margin), chosen)
    assert grad.item() == 0


def test_a_pair_turned_round_has_the_same_loss() -> None:
    chosen, rejected, label = (torch.rand(20, generator=torch.Generator().manual_seed(i)) for i in range(3))
    losses = rk.pairwise_loss(chosen, rejected, margin=0.4, label=label, reduction="none")
    turned = rk.pairwise_loss(rejected, chosen, margin=0.4, label=1 - label, reduction="none")
    torch.testing.assert_close(losses, turned)


@pytest.mark.parametrize("gap", [1e4, -1e4, 3e38, -3e38])
def test_extreme_gaps_are_finite(gap: float) -> None:
    chosen = torch.tensor([gap], requires_grad=True)
    for label in (None, 0.5):
        loss = rk.pairwise_loss(chosen, torch.zeros(1), label=label)
        (grad,) = torch.autograd.grad(loss, chosen)
        assert loss.isfinite()
        assert grad.isfinite().all()


def test_no_pairs() -> None:
    empty = torch.empty(0, requires_grad=True)
    loss = rk.pairwise_loss(empty, torch.empty(0))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, empty)[0].shape == (0,)
    assert rk.pairwise_loss(empty, torch.empty(0), reduction="none").shape == (0,)


def _pairs(count: int, dtype: torch.dtype, seed: int = 5) -> list[Tensor]:
    """policy and reference logprobs of long answers: hundreds of nats that differ by a few."""
    generator = torch.Generator().manual_seed(seed)
    ref = -300 * torch.rand(2, count, generator=generator)
    policy = ref + 4 * torch.randn(2, count, generator=generator)
    return [x.to(dtype) for x in (*policy, *ref)]


def _plain_dpo(pairs: list[Tensor], beta: float, label_smoothing: float, kind: str) -> Tensor:
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = (x.float() for x in pairs)
    h = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
    if kind == "ipo":
        return (h - 1 / (2 * beta)).square().mean()
    return (-logsigmoid(beta * h) * (1 - label_smoothing) - logsigmoid(-beta * h) * label_smoothing).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "label_smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0)])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo(dtype: torch.dtype, kind: str, label_smoothing: float, beta: float) -> None:
    pairs = _pairs(60, dtype)
    leaves = [x.clone().requires_grad_() for x in pairs]
    loss, chosen, rejected = rk.dpo_loss(*leaves, beta=beta, label_smoothing=label_smoothing, kind=kind)
    assert loss.dtype == chosen.dtype == rejected.dtype == torch.float32
    exact = list(zip(*(x.double().tolist() for x in pairs), strict=True))
    expected, slopes = truth.dpo(exact, beta, label_smoothing, kind)
    # The plain formulation's error over several draws: one may be lucky.
    plain = 0.0
    for seed in range(5):
        draw = _pairs(60, dtype, seed)
        tuples = list(zip(*(x.double().tolist() for x in draw), strict=True))
        value = truth.dpo(tuples, beta, label_smoothing, kind)[0]
        plain = max(plain, abs(_plain_dpo(draw, beta, label_smoothing, kind).item() - value))
    truth.assert_accurate(loss, torch.tensor(expected), plain)

    policy_chosen, policy_rejected, ref_chosen, ref_rejected = (x.double() for x in pairs)
    truth.assert_accurate(chosen, beta * (policy_chosen - ref_chosen), 1e-6 * beta)
    truth.assert_accurate(rejected, beta * (policy_rejected - ref_rejected), 1e-6 * beta)
    assert not chosen.requires_grad
    assert not rejected.requires_grad

    loss.backward()
    slope = torch.tensor(slopes, dtype=torch.float64)
    leaf = pairs[0].clone().requires_grad_()
    (plain_grad,) = torch.autograd.grad(_plain_dpo([leaf, *pairs[1:]], beta, label_smoothing, kind), leaf)
    truth.assert_accurate(leaves[0].grad, slope, truth.max_error(plain_grad, slope))
    assert leaves[0].grad.dtype == dtype
    assert torch.equal(leaves[1].grad, -leaves[0].grad)
    assert leaves[2].grad is leaves[3].grad is None  # the reference is a constant


def test_dpo_where_policy_and_reference_agree() -> None:
    """The first step of every run: log 2 to the last bit, rewards 0, whatever the lengths."""
    _, _, *ref = _pairs(9, torch.float32)
    loss, chosen, rejected = rk.dpo_loss(*ref, *ref)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-7)
    assert (chosen == 0).all()
    assert (rejected == 0).all()
    assert rk.dpo_loss(*ref, *ref, kind="ipo", beta=0.1)[0].item() == pytest.approx(25, rel=1e-6)


@pytest.mark.parametrize("gap", [1e4, -1e4, 1e30, -1e30])
def test_dpo_of_extreme_gaps_is_finite(gap: float) -> None:
    chosen = torch.tensor([gap], requires_grad=True)
    for label_smoothing in (0.0, 0.3):
        loss, *_ = rk.dpo_loss(chosen, *(torch.zeros(1) for _ in range(3)), label_smoothing=label_smoothing)
        (grad,) = torch.autograd.grad(loss, chosen)
        assert loss.isfinite()
        assert grad.isfinite().all()


@pytest.mark.parametrize(("kind", "label_smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0)])
def test_dpo_with_labels(kind: str, label_smoothing: float) -> None:
    """A label of q: q of the pair as it stands, 1 - q of it turned round; one call for all labels."""
    generator = torch.Generator().manual_seed(5)
    pairs = [torch.randn(8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(4)]
    labels = torch.tensor([1.0, 0.0, 0.5, 0.9, 0.25, 1.0, 0.7, 0.0], dtype=torch.float64)
    options = {"beta": 0.3, "label_smoothing": label_smoothing, "kind": kind}
    losses, *rewards = rk.dpo_loss(*pairs, **options, label=labels, reduction="none")
    alone = [
        q * rk.dpo_loss(*row, **options)[0] + (1 - q) * rk.dpo_loss(*(row[i] for i in (1, 0, 3, 2)), **options)[0]
        for q, *row in zip(labels, *(x.split(1) for x in pairs), strict=True)
    ]
    torch.testing.assert_close(losses, torch.stack(alone))
    for found, expected in zip(rewards, rk.dpo_loss(*pairs, **options)[1:], strict=True):
        assert torch.equal(found, expected)
    mean = rk.dpo_loss(*pairs, **options, label=labels)[0]
    assert mean.item() == pytest.approx(losses.mean().item())
    grads, expected = (torch.autograd.grad(x.sum(), pairs[:2]) for x in (losses, torch.stack(alone)))
    for found, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, right)
    ref = [x.detach() for x in pairs[2:]]
    assert torch.autograd.gradcheck(
        lambda *x: rk.dpo_loss(*x, *ref, **options, label=labels, reduction="none")[0], pairs[:2]
    )
    half = rk.dpo_loss(*pairs, **options, label=0.5, reduction="none")[0]
    turned = rk.dpo_loss(*(pairs[i] for i in (1, 0, 3, 2)), **options, label=0.5, reduction="none")[0]
    torch.testing.assert_close(half, turned)


def test_dpo_without_pairs() -> None:
    empty = torch.empty(0, requires_grad=True)
    loss, chosen, rejected = rk.dpo_loss(empty, *(torch.empty(0) for _ in range(3)))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, empty)[0].shape == chosen.shape == rejected.shape == (0,)


def test_dpo_refuses() -> None:
    x = torch.zeros(3)
    for error, text, change in (
        (TypeError, "policy_chosen is a list", {"policy_chosen": [0.0]}),
        (TypeError, "ref_chosen is torch.int64", {"ref_chosen": torch.zeros(3, dtype=torch.int64)}),
        (ValueError, r"policy_rejected has shape \[2\]", {"policy_rejected": torch.zeros(2)}),
        (ValueError, "beta is 0", {"beta": 0.0}),
        (TypeError, "beta is a str", {"beta": "0.1"}),
        (ValueError, "label_smoothing is 0.6", {"label_smoothing": 0.6}),
        (ValueError, "kind is 'hinge'", {"kind": "hinge"}),
        (ValueError, "label is 1.5", {"label": 1.5}),
        (ValueError, "label holds a value outside", {"label": torch.full((3,), -0.1)}),
        (ValueError, r"label has shape \[2\]", {"label": torch.zeros(2)}),
        (ValueError, "reduction is 'sum'", {"reduction": "sum"}),
        (ValueError, r"label_smoothing is 0.1; with kind='ipo'", {"kind": "ipo", "label_smoothing": 0.1}),
    ):
        tensors = dict.fromkeys(("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"), x)
        with pytest.raises(error, match=rf"dpo_loss: {text}"):
            rk.dpo_loss(**{**tensors, **change})
    with pytest.raises(ValueError, match=r"policy_chosen has shape \[3, 1\]"):
        rk.dpo_loss(*(torch.zeros(3, 1) for _ in range(4)))


KINDS = ("grpo", "rloo", "mean")


def _check_groups(scores: Tensor, groups: Tensor | int, kind: str, eps: float = 1e-6) -> None:
    """Against the definition, and exact 0 for groups of one."""
    ids = groups if isinstance(groups, Tensor) else torch.arange(len(scores)) // groups
    got = rk.group_advantages(scores, groups, kind=kind, eps=eps)
    assert got.dtype == torch.float32
    # Sums are in float64: nothing is lost but the last rounding, and eps shields what is all cancellation.
    expected = truth.group_advantages(scores, ids, kind, eps)
    truth.assert_accurate(got, expected, 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [[1], [2], [8] * 5, [1, 3, 1, 16, 2, 33], [257]], ids=str)
def test_groups_of_any_sizes_in_any_order(kind: str, dtype: torch.dtype, sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(11)
    names = torch.tensor([7, -3, 2**31 - 1, 0, -(2**31), 41])
    ids = torch.cat([names[i].expand(size) for i, size in enumerate(sizes)])
    scores = (3 * torch.randn(len(ids), generator=generator) + 2).to(dtype)
    for order in (torch.arange(len(ids)), torch.randperm(len(ids), generator=generator)):
        _check_groups(scores[order], ids[order], kind)
        _check_groups(scores[order], ids[order].int(), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_groups_of_one_size(kind: str, size: int) -> None:
    scores = torch.randn(4 * size, generator=torch.Generator().manual_seed(2))
    _check_groups(scores, size, kind)
    by_ids = rk.group_advantages(scores, torch.arange(4 * size) // size, kind=kind)
    torch.testing.assert_close(rk.group_advantages(scores, size, kind=kind), by_ids, rtol=2e-7, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_far_from_zero(kind: str) -> None:
    """One pass (mean of squares minus square of the mean) loses everything here."""
    scores = 1e4 + torch.tensor([0.0, 1e-2, 2e-2, 5e-2, 1e-3, 0.0])
    _check_groups(scores, 3, kind)
    _check_groups(scores, torch.tensor([0, 1, 0, 1, 0, 1]), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4, 1e30])
def test_equal_scores_give_exactly_zero(kind: str, value: float) -> None:
    for groups in (3, torch.tensor([1, 0, 1, 0, 1, 0])):
        assert (rk.group_advantages(torch.full((6,), value), groups, kind=kind) == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_score_spoils_its_own_group_alone(kind: str, bad: float) -> None:
    scores = torch.tensor([1.0, 2.0, bad, 4.0, 5.0, 7.0])
    ids = torch.tensor([4, 3, 4, 3, 3, 9])
    got = rk.group_advantages(scores, ids, kind=kind)
    clean = rk.group_advantages(torch.where(scores.isfinite(), scores, 0.0), ids, kind=kind)
    assert torch.equal(got[ids != 4], clean[ids != 4])
    assert not got[ids == 4].isfinite().any()
    by_size = rk.group_advantages(scores, 3, kind=kind)
    assert by_size[3:].isfinite().all()
    assert not by_size[:3].isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_has_the_same_bits_in_any_batch(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    scores, ids = torch.randn(4096, generator=generator), torch.randint(0, 300, (4096,), generator=generator)
    before = torch.get_num_threads()
    whole = rk.group_advantages(scores, ids, kind=kind)
    by_size = rk.group_advantages(scores, 16, kind=kind)
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(rk.group_advantages(scores, ids, kind=kind), whole)
            assert torch.equal(rk.group_advantages(scores, 16, kind=kind), by_size)
    finally:
        torch.set_num_threads(before)
    for group in (0, 17, 299):
        mine = ids == group
        assert torch.equal(rk.group_advantages(scores[mine], ids[mine] + 5, kind=kind), whole[mine])
    for group in (0, 100, 255):
        rows = slice(16 * group, 16 * group + 16)
        assert torch.equal(rk.group_advantages(scores[rows], 16, kind=kind), by_size[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_no_answers(kind: str) -> None:
    for groups in (4, torch.empty(0, dtype=torch.int64)):
        assert rk.group_advantages(torch.empty(0), groups, kind=kind).shape == (0,)


def test_group_advantages_are_targets() -> None:
    scores = torch.randn(6, requires_grad=True)
    assert not rk.group_advantages(scores, 3).requires_grad
    assert rk.group_advantages(scores.double(), 3).dtype == torch.float64


@pytest.mark.parametrize("by_ids", [False, True])
def test_a_trace_serves_every_batch_and_size_of_group(by_ids: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(rk.group_advantages, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (12, 8, 1000, 20):  # one row is a case of its own to every trace
            scores = torch.randn(batch)
            groups = torch.arange(batch) % 3 if by_ids else 4
            assert torch.equal(compiled(scores, groups), rk.group_advantages(scores, groups))


def test_group_advantages_refuse() -> None:
    scores = torch.zeros(6)
    for error, text, groups, options in (
        (ValueError, r"groups is 4; .*divides 6", 4, {}),
        (ValueError, "groups is 0", 0, {}),
        (TypeError, "groups is a float", 3.0, {}),
        (TypeError, "groups is a bool", True, {}),
        (TypeError, "groups is torch.float32", torch.zeros(6), {}),
        (ValueError, r"groups has shape \[5\]", torch.zeros(5, dtype=torch.int64), {}),
        (ValueError, "kind is 'std'", 3, {"kind": "std"}),
        (ValueError, "eps is -1", 3, {"eps": -1.0}),
    ):
        with pytest.raises(error, match=rf"group_advantages: {text}"):
            rk.group_advantages(scores, groups, **options)
    with pytest.raises(ValueError, match=r"scores has shape \[2, 3\]"):
        rk.group_advantages(torch.zeros(2, 3), 3)
    with pytest.raises(TypeError, match="scores is a list"):
        rk.group_advantages([0.0], 1)
