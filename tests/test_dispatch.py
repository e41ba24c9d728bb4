"""Which backend serves a call, what happens when one is missing, and how bad calls are refused."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from support.backends import HAS_GPU, Backend, require_backend
from support.op_calls import OPS, WITH_KERNEL, inputs_of, outputs_of

import rlhf_kernels as rk
from rlhf_kernels import dispatch

X = torch.zeros(2, 3, 5)
LABELS = torch.zeros(2, 3, dtype=torch.int64)
BT = torch.zeros(2, 3)


def _python(program: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, **environment}
    merged = {name: value for name, value in merged.items() if value is not None}
    return subprocess.run([sys.executable, "-c", program], env=merged, capture_output=True, text=True, check=False)


def test_automatic_choice_follows_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, served in ((True, "cpu"), (False, None)):
        monkeypatch.setattr(dispatch, "_AUTOMATIC", {"cpu": [dispatch._BY_NAME["cpu"]]} if available else {})
        assert dispatch.select_backend("gae", BT) == served
        assert dispatch.select_backend("gae", BT.half()) == served
        assert dispatch.select_backend("gae", BT.double()) is None
        assert dispatch.select_backend("pairwise_loss", BT) is None


def test_forced_choice_is_undone(backend: Backend) -> None:
    expected = None if backend.name == "reference" else backend.name
    assert dispatch.select_backend("gae", BT) == expected
    assert dispatch.select_backend("gae", BT.double()) is None
    with rk.use_backend("reference"):
        assert dispatch.select_backend("gae", BT) is None
        with rk.use_backend(None):
            assert dispatch.select_backend("gae", BT) == dispatch.automatic("gae", "cpu")
        assert dispatch.select_backend("gae", BT) is None
    assert dispatch.select_backend("gae", BT) == expected
    with pytest.raises(KeyError), rk.use_backend("reference"):
        raise KeyError
    assert dispatch.select_backend("gae", BT) == expected


def test_the_forced_backend_is_the_one_that_runs(kernel_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = dispatch.backend_module(kernel_backend.name), []
    for name in ("selected_logprobs_fwd", "selected_logprobs_bwd", "gae"):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, name=name: (calls.append(name), f(*a))[1])
    x = X.to(kernel_backend.device).requires_grad_()
    rk.selected_logprobs(x, LABELS.to(kernel_backend.device)).sum().backward()
    rk.gae(BT.to(kernel_backend.device), BT.to(kernel_backend.device))
    assert calls == ["selected_logprobs_fwd", "selected_logprobs_bwd", "gae"]
    with rk.use_backend("reference"):
        rk.gae(BT, BT)
    assert len(calls) == 3


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"'gpu'.*'reference', 'triton', 'cuda', 'cpu' or None"), rk.use_backend("gpu"):
        pass


def test_missing_backend_raises_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._AVAILABLE, "cpu", False)
    monkeypatch.setattr(dispatch, "_AUTOMATIC", {})
    with pytest.raises(RuntimeError, match="native module was not built"), rk.use_backend("cpu"):
        pass
    advantages, _ = rk.gae(BT, BT)  # the automatic choice falls back
    assert advantages.shape == BT.shape


def test_forced_backend_without_the_kernel(kernel_backend: Backend) -> None:
    with pytest.raises(NotImplementedError, match=f"'{kernel_backend.name}'.*pairwise_loss"):
        rk.pairwise_loss(BT[0].to(kernel_backend.device), BT[0].to(kernel_backend.device))


def test_triton_on_cpu_tensors_without_the_interpreter() -> None:
    program = (
        "import torch, rlhf_kernels as rk\nwith rk.use_backend('triton'): rk.gae(torch.zeros(2, 3), torch.zeros(2, 3))"
    )
    done = _python(program, TRITON_INTERPRET=None)
    assert done.returncode == 1
    assert "RuntimeError: the triton backend got tensors on the CPU" in done.stderr


def test_import_loads_no_optional_package() -> None:
    program = (
        "import sys, rlhf_kernels\n"
        "optional = ('triton', 'transformers', 'rlhf_kernels.backends.triton', 'rlhf_kernels.backends.cpu')\n"
        "sys.exit(', '.join(name for name in optional if name in sys.modules) or None)"
    )
    done = _python(program)
    assert done.returncode == 0, done.stderr


def test_info_names_backends_and_ops(capsys: pytest.CaptureFixture[str]) -> None:
    rk.info()
    text = capsys.readouterr().out
    for backend in dispatch.BACKENDS:
        assert f"backend {backend.name}:" in text
    for op in ("selected_logprobs", "gae", "whiten", "policy_loss", "value_loss", "pairwise_loss"):
        assert f"op {op}:" in text
    done = _python("import runpy; runpy.run_module('rlhf_kernels', run_name='__main__')", TRITON_INTERPRET=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("rlhf_kernels ")


def test_info_returns_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    found = rk.info()
    text = capsys.readouterr().out
    assert set(found) == {"versions", "machine", "backends", "ops"}
    assert set(found["backends"]) == {backend.name for backend in dispatch.BACKENDS}
    assert set(found["ops"]) <= set(rk.__all__)
    for op, served in found["ops"].items():
        assert f"op {op}: cpu tensors by {served['cpu']}, cuda tensors by {served['cuda']}" in text
    linear = [found["ops"][op] for op in found["ops"] if op.startswith("linear_")]
    assert len(linear) == 5
    assert all(served == found["ops"]["linear_logprobs"] for served in linear)


def test_record_dispatch_names_op_and_backend(backend: Backend) -> None:
    x, labels = torch.randn(2, 3, 4, device=backend.device), torch.zeros(2, 3, dtype=torch.int64, device=backend.device)
    weight = torch.randn(5, 4, device=backend.device)
    sides, zeros = (x, x, weight, labels, labels), torch.zeros(2, device=backend.device)
    with rk.record_dispatch() as calls:
        rk.selected_logprobs(x, labels)
        rk.linear_cross_entropy(x, weight, labels)
        rk.linear_cross_entropy(x, weight, labels, z_loss=0.1)
        rk.linear_policy_loss(x, weight, labels, x[..., 0], x[..., 1], ratio="sequence")
        with rk.record_dispatch() as inner:
            rk.whiten(x)
        rk.linear_dpo_loss(*sides, zeros, zeros)
        rk.gae(x[0], x[1])
    assert inner == [("whiten", backend.name)]
    ops = ["selected_logprobs", "linear_cross_entropy", "linear_cross_entropy", "linear_policy_loss"]
    ops += ["linear_dpo_loss", "gae"]
    assert calls == [(op, backend.name) for op in ops]
    rk.whiten(x)
    assert len(inner) == 1


def test_a_choice_is_its_threads_own() -> None:
    seen: list[str] = []

    def work() -> None:
        with rk.record_dispatch() as calls:
            rk.whiten(torch.randn(4))
        seen.extend(backend for _, backend in calls)

    with rk.use_backend("reference"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        with rk.record_dispatch() as calls:
            rk.whiten(torch.randn(4))
    assert calls == [("whiten", "reference")]
    assert seen == [dispatch.automatic("whiten", "cpu") or "reference"]


@pytest.mark.parametrize("op", [name for name in WITH_KERNEL if OPS[name].leaves])
def test_a_choice_holds_for_the_backward(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called outside of the block, and in another one."""
    require_backend("triton")
    require_backend("cpu")
    other = dispatch.backend_module("cpu")
    with rk.use_backend("triton"):
        mask, labels, tensors = inputs_of(op, 3, 5, torch.float32, "cuda" if HAS_GPU else "cpu")
        outputs = outputs_of(OPS[op].call(mask, labels, 0.1, *tensors))
        expected = torch.autograd.grad(sum(y.sum() for y in outputs), tensors[0], retain_graph=True)
    for name in {name for kernels in dispatch.OPS.values() for name in kernels.functions if hasattr(other, name)}:
        if name not in ("allocate", "logits_dtype", "products_are_invariant"):
            monkeypatch.setattr(other, name, lambda *_, name=name, **__: pytest.fail(f"{name} of another backend"))
    for chosen in (None, "cpu"):
        with rk.use_backend(chosen):
            found = torch.autograd.grad(sum(y.sum() for y in outputs), tensors[0], retain_graph=True)
        assert torch.equal(found[0], expected[0])


BAD_CALLS = {
    "logits int": (lambda: rk.selected_logprobs(X.long(), LABELS), TypeError, "logits is torch.int64"),
    "logits list": (lambda: rk.selected_logprobs([1.0], LABELS), TypeError, "logits is a list"),
    "logits empty V": (lambda: rk.selected_logprobs(X[..., :0], LABELS), ValueError, r"logits has shape \[2, 3, 0\]"),
    "logits scalar": (lambda: rk.selected_logprobs(X[0, 0, 0], LABELS[0, 0]), ValueError, "logits has shape"),
    "labels float": (lambda: rk.selected_logprobs(X, BT), TypeError, "labels is torch.float32"),
    "labels shape": (lambda: rk.selected_logprobs(X, LABELS.T), ValueError, r"labels has shape \[3, 2\].*\[2, 3\]"),
    "labels device": (lambda: rk.selected_logprobs(X, LABELS.to("meta")), ValueError, "labels is on meta"),
    "mask shape": (lambda: rk.selected_logprobs(X, LABELS, mask=BT[0]), ValueError, "mask has shape"),
    "mask list": (lambda: rk.selected_logprobs(X, LABELS, mask=[1]), TypeError, "mask is a list"),
    "temperature 0": (lambda: rk.selected_logprobs(X, LABELS, temperature=0), ValueError, "temperature is 0"),
    "temperature < 0": (lambda: rk.selected_logprobs(X, LABELS, temperature=-1.0), ValueError, "temperature is -1.0"),
    "temperature nan": (lambda: rk.selected_logprobs(X, LABELS, temperature=float("nan")), ValueError, "temperature"),
    "temperature inf": (lambda: rk.selected_logprobs(X, LABELS, temperature=float("inf")), ValueError, "temperature"),
    "temperature str": (lambda: rk.selected_logprobs(X, LABELS, temperature="1"), TypeError, "temperature is a str"),
    "temperature bool": (lambda: rk.selected_logprobs(X, LABELS, temperature=True), TypeError, "temperature is a bool"),
    "temperatures 0": (lambda: rk.selected_logprobs(X, LABELS, temperature=BT), ValueError, "temperature holds"),
    "temperatures shape": (
        lambda: rk.selected_logprobs(X, LABELS, temperature=torch.ones(4)),
        ValueError,
        "temperature has shape",
    ),
    "temperatures grad": (
        lambda: rk.selected_logprobs(X, LABELS, temperature=torch.ones(3, requires_grad=True)),
        ValueError,
        "temperature requires grad",
    ),
    "ref_logits shape": (
        lambda: rk.full_kl(X, X[..., :4]),
        ValueError,
        r"ref_logits has shape \[2, 3, 4\].*\[2, 3, 5\]",
    ),
    "ref_logits int": (lambda: rk.full_kl(X, LABELS), TypeError, "ref_logits is torch.int64"),
    "direction": (
        lambda: rk.full_kl(X, X, direction="js"),
        ValueError,
        "direction is 'js'.*'reverse', 'forward', 'jsd'",
    ),
    "full_kl temperature": (lambda: rk.full_kl(X, X, temperature=0.0), ValueError, "full_kl: temperature is 0.0"),
    "full_kl temperatures": (lambda: rk.full_kl(X, X, temperature=BT), ValueError, "full_kl: temperature holds"),
    "rewards int": (lambda: rk.gae(BT.long(), BT), TypeError, "rewards is torch.int64"),
    "values shape": (lambda: rk.gae(BT, BT[:, :2]), ValueError, r"values has shape \[2, 2\]"),
    "gamma": (lambda: rk.gae(BT, BT, gamma=1.5), ValueError, "gamma is 1.5"),
    "lam": (lambda: rk.gae(BT, BT, lam=-0.1), ValueError, "lam is -0.1"),
    "bootstrap": (lambda: rk.gae(BT, BT, bootstrap=BT), ValueError, "bootstrap has shape"),
    "masked": (lambda: rk.gae(BT, BT, masked="hole"), ValueError, "masked is 'hole'.*'skip', 'stop', 'zero'"),
    "estimator": (lambda: rk.per_token_kl(BT, BT, estimator="k4"), ValueError, "estimator is 'k4'"),
    "ref shape": (lambda: rk.per_token_kl(BT, BT[0]), ValueError, "ref_logprobs has shape"),
    "kl_coef": (lambda: rk.shaped_rewards(BT[:, 0], BT, BT, kl_coef=-1.0), ValueError, "kl_coef is -1.0"),
    "clip 0": (lambda: rk.shaped_rewards(BT[:, 0], BT, BT, kl_coef=0.1, clip=0.0), ValueError, "clip is 0.0"),
    "mask none": (lambda: rk.shaped_rewards(BT[:, 0], BT, None, kl_coef=0.1), TypeError, "mask is None"),
    "scores": (lambda: rk.shaped_rewards(BT, BT, BT, kl_coef=0.1), ValueError, "scores has shape"),
    "eps": (lambda: rk.whiten(BT, eps=0.0), ValueError, "eps is 0.0"),
    "aggregate": (lambda: rk.policy_loss(BT, BT, BT, aggregate="mean"), ValueError, "aggregate is 'mean'"),
    "ratio": (lambda: rk.policy_loss(BT, BT, BT, ratio="seq"), ValueError, "ratio is 'seq'"),
    "dual_clip": (lambda: rk.policy_loss(BT, BT, BT, dual_clip=0.5), ValueError, "dual_clip is 0.5"),
    "no denominator": (lambda: rk.policy_loss(BT, BT, BT, aggregate="constant"), ValueError, "denominator is None"),
    "denominator": (lambda: rk.policy_loss(BT, BT, BT, denominator=0), ValueError, "denominator is 0"),
    "sequences": (lambda: rk.policy_loss(BT[0], BT[0], BT[0], ratio="sequence"), ValueError, r"take \[B, T\]"),
    "weights": (lambda: rk.policy_loss(BT, BT, BT, importance_weights=BT[0]), ValueError, "importance_weights"),
    "old_values": (lambda: rk.value_loss(BT, None, BT), ValueError, "old_values is None"),
    "returns": (lambda: rk.value_loss(BT, BT, BT.long()), TypeError, "returns is torch.int64"),
    "rejected": (lambda: rk.pairwise_loss(BT[0], BT[1, :2]), ValueError, "rejected has shape"),
    "label": (lambda: rk.pairwise_loss(BT[0], BT[1], label=1.5), ValueError, "label is 1.5"),
    "labels tensor": (lambda: rk.pairwise_loss(BT[0], BT[1], label=BT[0] + 2), ValueError, "label holds a value"),
    "margin": (lambda: rk.pairwise_loss(BT[0], BT[1], margin=float("inf")), ValueError, "margin is inf"),
    "reduction": (lambda: rk.pairwise_loss(BT[0], BT[1], reduction="sum"), ValueError, "reduction is 'sum'"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_name_the_argument(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()
