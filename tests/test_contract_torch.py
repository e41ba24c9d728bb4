"""The ops as PyTorch citizens: gradcheck, opcheck, compile without breaks or recompiles, autocast, backward twice."""

from __future__ import annotations

import pytest
import torch
from support import edge_cases
from support.backends import Backend
from support.op_calls import OPS, READS_LABELS, WITH_KERNEL, D, V, inputs_of, normal, outputs_of, with_gradients
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import rlhf_kernels as rk
from rlhf_kernels.ops import validate


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if op.leaves])
def test_gradcheck(op: str) -> None:
    mask, labels, tensors = inputs_of(op, 3, 5, torch.float64, "cpu")
    assert torch.autograd.gradcheck(lambda *x: OPS[op].call(mask, labels, 0.1, *x), tensors)


def test_gradcheck_under_a_forced_backend(backend: Backend) -> None:
    """float64 goes to the reference."""
    mask, labels, (x,) = inputs_of("selected_logprobs", 2, 3, torch.float64, backend.device)
    assert rk.selected_logprobs(x, labels).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda y: OPS["selected_logprobs"].call(mask, labels, 0.1, y), (x,))


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_logits(kernel_backend: Backend, dtype: torch.dtype, with_entropy: bool) -> None:
    device, ops = kernel_backend.device, torch.ops.rlhf_kernels
    mask, labels, (x,) = inputs_of("selected_logprobs", 2, 3, dtype, device)
    mask, labels, row_temperature = mask.flatten(), labels.flatten(), torch.linspace(0.5, 2, 6, device=device)
    one = torch.ones((), dtype=torch.float64)
    forward = (x, labels, mask, one, row_temperature, with_entropy, False)
    torch.library.opcheck(ops.selected_logprobs.default, forward)
    _, entropy, stats = (y.detach() for y in ops.selected_logprobs(*forward))
    g = normal(6).to(device)
    backward = (g, g if with_entropy else None, x.detach(), labels, mask, one, row_temperature, stats, entropy)
    torch.library.opcheck(ops.selected_logprobs_backward.default, backward)
    torch.library.opcheck(ops.selected_logprobs_backward_.default, backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_linear_logprobs(kernel_backend: Backend, dtype: torch.dtype) -> None:
    ops = torch.ops.rlhf_kernels
    call = _head_inputs(kernel_backend.device, dtype)
    bare = [None if i in (2, 3, 4, 6, 8, 9) else x for i, x in enumerate(call)]
    frozen = (bare[0], bare[1].detach(), *bare[2:])
    torch.library.opcheck(ops.linear_logprobs.default, (*call, True, False))
    torch.library.opcheck(ops.linear_logprobs.default, (*bare, False, False))
    torch.library.opcheck(ops.linear_logprobs.default, (*frozen, False, True))
    _, entropy, stats, _ = (y.detach() for y in ops.linear_logprobs(*call, True, False))
    g = normal(6).to(kernel_backend.device)
    inputs = [x.detach() if isinstance(x, Tensor) else x for x in call]
    for wanted in ([True] * 5, [False, True, False, False, True]):
        torch.library.opcheck(ops.linear_logprobs_backward.default, (*inputs, g, g, entropy, stats, wanted))


def _head_inputs(device: str, dtype: torch.dtype = torch.float32) -> tuple[object, ...]:
    """What every registered op of the linear family starts with, its optional tensors too: six rows, two chunks."""
    mask, labels, (hidden, weight, bias) = inputs_of("linear_logprobs", 2, 3, dtype, device)
    lora_a, lora_b = (x.to(device).requires_grad_() for x in (normal(2, weight.shape[1]), normal(weight.shape[0], 2)))
    row_temperature, one = torch.linspace(0.5, 2, 6, device=device), torch.ones((), dtype=torch.float64)
    head = (hidden, weight, bias, lora_a, lora_b, labels.flatten(), mask.flatten())
    return *head, one, row_temperature, 3 * one, one, True, 0, weight.shape[0], "", False, 500


@pytest.mark.parametrize("kind", ["policy k3", "nll"])
def test_opcheck_linear_policy_loss(kernel_backend: Backend, kind: str) -> None:
    entropy = kind != "nll"
    per_row = normal(5 if entropy else 1, 6).to(kernel_backend.device)
    scalars = torch.tensor([0.2, 0.3, 2.0, 0.1, 0.1], dtype=torch.float64)
    call = [x.detach() if isinstance(x, Tensor) else x for x in _head_inputs(kernel_backend.device)]
    arguments = (*call, per_row, scalars, kind, entropy, [True] * 5)
    torch.library.opcheck(torch.ops.rlhf_kernels.linear_policy_loss.default, arguments)


@pytest.mark.parametrize("direction", [0, 2])
def test_opcheck_linear_kl(kernel_backend: Backend, direction: int) -> None:
    ops, call = torch.ops.rlhf_kernels, _head_inputs(kernel_backend.device)
    _, other, *_ = _head_inputs(kernel_backend.device, torch.float32)
    ref = (call[0].detach(), other.detach() * 0.5, None, None, None, direction)
    torch.library.opcheck(ops.linear_kl.default, (*call, *ref))
    _, stats = (y.detach() for y in ops.linear_kl(*call, *ref))
    inputs = [x.detach() if isinstance(x, Tensor) else x for x in call]
    g = normal(6).to(kernel_backend.device)
    torch.library.opcheck(ops.linear_kl_backward.default, (*inputs, *ref, g, stats, [True] * 5))


@pytest.mark.parametrize("direction", [0, 1, 2])
def test_opcheck_full_kl(kernel_backend: Backend, direction: int) -> None:
    device, ops = kernel_backend.device, torch.ops.rlhf_kernels
    mask, _, (x, y) = inputs_of("full_kl", 2, 3, torch.bfloat16 if direction == 1 else torch.float32, device)
    one, row_temperature = torch.ones((), dtype=torch.float64), torch.linspace(0.5, 2, 6, device=device)
    arguments = (y, mask.flatten(), one, row_temperature, direction)
    torch.library.opcheck(ops.full_kl.default, (x, *arguments))
    _, stats = (output.detach() for output in ops.full_kl(x, *arguments))
    torch.library.opcheck(ops.full_kl_backward.default, (normal(6).to(device), x.detach(), *arguments, stats))


def test_opcheck_gae(kernel_backend: Backend) -> None:
    mask, _, (rewards, values) = inputs_of("gae", 3, 7, torch.float32, kernel_backend.device)
    discounts = torch.tensor([0.9, 0.95], dtype=torch.float64)
    for extra in ((mask, torch.ones(3, device=kernel_backend.device)), (None, None)):
        for plain in (False, True):
            arguments = (rewards, values, *extra, None, *discounts, 0, plain)
            torch.library.opcheck(torch.ops.rlhf_kernels.gae.default, arguments)
    offsets = torch.tensor([0, 4, 4, 21], dtype=torch.int32, device=kernel_backend.device)
    flat = (rewards.flatten(), values.flatten(), mask.flatten(), None, offsets, *discounts, 0, False)
    torch.library.opcheck(torch.ops.rlhf_kernels.gae.default, flat)


def test_opcheck_ppo_advantages(kernel_backend: Backend) -> None:
    mask, _, tensors = inputs_of("ppo_advantages", 3, 7, torch.float32, kernel_backend.device)
    scalars = torch.tensor([0.1, 0.9, 0.95], dtype=torch.float64)
    for eps, plain in ((1e-8, False), (None, False), (1e-8, True)):
        arguments = (*tensors, mask, *scalars, eps, plain)
        torch.library.opcheck(torch.ops.rlhf_kernels.ppo_advantages.default, arguments)


def test_opcheck_per_token_kl(kernel_backend: Backend) -> None:
    ops = torch.ops.rlhf_kernels
    _, _, (a, b) = inputs_of("per_token_kl", 3, 5, torch.bfloat16, kernel_backend.device)
    for with_slope in (True, False):
        leaves = (a, b) if with_slope else (a.detach(), b.detach())
        torch.library.opcheck(ops.per_token_kl.default, (*leaves, 2, with_slope))
    _, slope = (y.detach() for y in ops.per_token_kl(a, b, 2, True))
    for dtypes in ((torch.bfloat16, torch.float32), (None, torch.float16)):
        torch.library.opcheck(ops.per_token_kl_backward.default, (torch.ones_like(slope), slope, *dtypes))


def test_opcheck_shaped_rewards(kernel_backend: Backend) -> None:
    mask, _, (scores, kl) = inputs_of("shaped_rewards", 3, 5, torch.bfloat16, kernel_backend.device)
    scalars = torch.tensor([0.1, 2.0], dtype=torch.float64)
    torch.library.opcheck(torch.ops.rlhf_kernels.shaped_rewards.default, (scores, kl, mask, *scalars))


def test_opcheck_whiten(kernel_backend: Backend) -> None:
    ops = torch.ops.rlhf_kernels
    holes, _, (x,) = inputs_of("whiten", 3, 5, torch.bfloat16, kernel_backend.device)
    eps = torch.tensor(1e-3, dtype=torch.float64)
    for mask, shift_mean in ((holes, True), (None, False)):
        torch.library.opcheck(ops.whiten_moments.default, (x.detach(), mask))
        torch.library.opcheck(ops.whiten.default, (x, mask, None, eps, shift_mean))
        white, moments = (y.detach() for y in ops.whiten(x, mask, None, eps, shift_mean))
        torch.library.opcheck(ops.whiten.default, (x.detach(), mask, moments.expand(2, 3), eps, shift_mean))
        torch.library.opcheck(ops.whiten_backward.default, (white, x.detach(), mask, moments, eps, shift_mean))


@pytest.mark.parametrize(
    ("backend", "op"),
    [("reference", op) for op in OPS] + [(name, op) for name in ("cpu", "triton") for op in WITH_KERNEL],
    indirect=["backend"],
)
def test_compiles_whole_and_once(backend: Backend, op: str) -> None:
    """No graph break; a new N, T, temperature, clip or discount compiles nothing again."""
    torch._dynamo.reset()
    compiled = torch.compile(OPS[op].call, fullgraph=True, dynamic=True, backend="aot_eager")
    sizes = ((3, 5), (4, 9), (7, 6), (2, 17))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for s, (n, t) in zip((0.11, 0.23, 0.31, 0.05), sizes, strict=True):
            arguments = inputs_of(op, n, t, torch.float32, backend.device)
            expected = with_gradients(OPS[op].call, s, *arguments)
            for a, b in zip(with_gradients(compiled, s, *arguments), expected, strict=True):
                torch.testing.assert_close(a, b)


def test_inductor(backend: Backend) -> None:
    """The kernels inside generated code, with policy_loss fused around them."""

    def step(logits: Tensor, labels: Tensor, mask: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        logprobs, entropy = rk.selected_logprobs(logits, labels, mask=mask, with_entropy=True)
        if backend.name != "reference":
            return (logprobs * advantages + 0.1 * entropy).sum()
        loss, _ = rk.policy_loss(logprobs, old, advantages, mask)
        return loss - 0.1 * rk.whiten(entropy, mask).sum()

    torch._dynamo.reset()
    mask, labels, (logits,) = inputs_of("selected_logprobs", 3, 5, torch.float32, backend.device)
    rest = (labels, mask, -normal(3, 5).abs().to(backend.device), normal(3, 5, seed=1).to(backend.device))
    compiled = torch.compile(step, fullgraph=True)
    for function in (step, compiled):
        logits.grad = None
        function(logits, *rest).backward()
        if function is step:
            expected = logits.grad
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("op", [op for op in WITH_KERNEL if not op.startswith("linear_")])
def test_autocast(backend: Backend, op: str) -> None:
    mask, labels, tensors = inputs_of(op, 3, 5, torch.float32, backend.device)
    plain = outputs_of(OPS[op].call(mask, labels, 0.1, *tensors))
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        under = outputs_of(OPS[op].call(mask, labels, 0.1, *tensors))
    for a, b in zip(plain, under, strict=True):
        assert torch.equal(a, b)


def test_autocast_of_the_linear_family(backend: Backend) -> None:
    """A head is a linear layer: cast as torch's own, gradients in the parameters' dtype."""
    mask, labels, tensors = inputs_of("linear_logprobs", 3, 5, torch.float32, backend.device)
    call = OPS["linear_logprobs"].call
    narrow = [x.detach().bfloat16().requires_grad_() for x in tensors]
    expected = with_gradients(call, 0.1, mask, labels, narrow)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        outputs = call(mask, labels, 0.1, *tensors)
    grads = torch.autograd.grad(sum(y.sum() for y in outputs), tensors)
    for a, b in zip((*outputs, *grads), expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


def test_autocast_of_a_head(backend: Backend) -> None:
    """bf16 logits out of an autocast matmul, fp32 logprobs, gradient back to the fp32 weight."""
    mask, labels, _ = inputs_of("selected_logprobs", 3, 5, torch.float32, backend.device)
    hidden, weight = normal(3, 5, 8).to(backend.device), normal(V, 8, seed=1).to(backend.device).requires_grad_()
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        logits = hidden @ weight.T
        logprobs = rk.selected_logprobs(logits, labels, mask=mask)
    assert logits.dtype == torch.bfloat16
    assert logprobs.dtype == torch.float32
    logprobs.sum().backward()
    assert weight.grad.dtype == torch.float32
    assert weight.grad.isfinite().all()


def test_backward_twice_gives_the_same(backend: Backend) -> None:
    mask, labels, (x,) = inputs_of("selected_logprobs", 3, 5, torch.float32, backend.device)
    logprobs, entropy = rk.selected_logprobs(x, labels, mask=mask, with_entropy=True)
    first, second = (torch.autograd.grad((logprobs + entropy).sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first is not second


def test_no_gradient_for_what_needs_none(backend: Backend) -> None:
    _, labels, (x,) = inputs_of("selected_logprobs", 3, 5, torch.float32, backend.device)
    assert not rk.selected_logprobs(x.detach(), labels).requires_grad
    with torch.no_grad():
        assert not rk.selected_logprobs(x, labels).requires_grad


def test_inplace_backward(kernel_backend: Backend) -> None:
    """The gradient lands in the logits' own memory, through their strides, and PyTorch knows of it."""
    device = kernel_backend.device
    for dtype in (torch.float32, torch.bfloat16):
        source = normal(3, 6, V, dtype=dtype).to(device)
        labels = edge_cases.labels_for((3, 5), V).to(device)
        mask = edge_cases.MASKS["holes"](torch.Size((3, 5))).to(device)
        leaf = source.clone().requires_grad_()
        logprobs = rk.selected_logprobs(leaf[:, :-1], labels, mask=mask, temperature=0.8)
        (expected,) = torch.autograd.grad(logprobs.sum(), leaf)

        leaf = source.clone().requires_grad_()
        buffer = leaf.clone()  # as a model's output would be
        view = buffer[:, :-1]
        version = view._version
        logprobs = rk.selected_logprobs(view, labels, mask=mask, temperature=0.8, inplace_backward=True)
        assert torch.equal(buffer.detach(), source)  # nothing happens before backward
        (grad,) = torch.autograd.grad(logprobs.sum(), leaf, retain_graph=True)
        assert torch.equal(grad, expected)
        assert view._version > version
        assert torch.equal(view.detach(), expected[:, :-1])
        assert torch.equal(buffer[:, -1].detach(), source[:, -1])  # what was not asked about stays
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(logprobs.sum(), leaf)


def test_inplace_backward_refuses_logits_that_overlap(kernel_backend: Backend) -> None:
    x = normal(1, V).to(kernel_backend.device).requires_grad_()
    labels = torch.zeros(3, dtype=torch.int64, device=kernel_backend.device)
    for logits in (x.expand(3, V), normal(V, 3).to(kernel_backend.device).requires_grad_().T):
        with pytest.raises(ValueError, match="inplace_backward"):
            rk.selected_logprobs(logits, labels, inplace_backward=True)


@pytest.mark.parametrize("op", OPS)
def test_no_value_is_read_on_a_gpu(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake CUDA tensors have no values: whatever looks at one (a sync on a real GPU) raises."""
    monkeypatch.setattr(validate, "readable", lambda x: True)  # else nobody would try
    for checked in ("0", "1"):
        monkeypatch.setenv("RLHF_KERNELS_CHECK", checked)
        with FakeTensorMode():
            sizes = {"n": 3, "t": 5, "v": V, "d": D}
            shapes = [*OPS[op].leaves, *OPS[op].constants]
            tensors = [torch.empty([sizes[letter] for letter in shape], device="cuda") for shape in shapes]
            mask = torch.empty(3, 5, dtype=torch.bool, device="cuda")
            labels = torch.empty(3, 5, dtype=torch.int64, device="cuda")
            if checked == "1" and op in READS_LABELS:  # the labels are looked at, as asked for
                with pytest.raises(DataDependentOutputException):
                    OPS[op].call(mask, labels, 0.1, *tensors)
            else:
                assert all(y.device.type == "cuda" for y in outputs_of(OPS[op].call(mask, labels, 0.1, *tensors)))
