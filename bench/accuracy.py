"""How exact every op is, by backend and dtype, beside plain PyTorch and other libraries: writes docs/accuracy.md.

python bench/accuracy.py [--quick] [--out docs/accuracy.md]

Truth is the reference in float64 on the same (already rounded) inputs. Other libraries take part where they are
installed (`pip install trl torchrl verl`). Triton runs on a GPU, else in its interpreter, whose bf16 and fp16 stores
truncate: 16-bit gradients are then left out for it.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import libraries
import plain
from harness import environment
from torch import Tensor

import rlhf_kernels as rk

ROOT = Path(__file__).resolve().parents[1]
BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
GAMMA, LAM = 0.99, 0.95
Formulation = Callable[..., list[Tensor]]


class Case(NamedTuple):
    """One op: what it returns by name, its inputs by class of value, and who computes it."""

    op: str
    quantities: tuple[str, ...]
    inputs: Mapping[str, tuple[Tensor, ...]]  # float ones are rounded to the dtype under test
    ours: Formulation
    others: Mapping[str, Formulation]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


class Row(NamedTuple):
    quantity: str
    inputs: str
    dtype: str
    who: str
    ulp: float
    error: float
    wrong: int  # NaN or infinity where truth is finite, or the other way round


def ulp(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of `dtype`'s numbers at each truth, in float64."""
    exponent = torch.frexp(truth.abs()).exponent.double()
    floor = math.log2(torch.finfo(dtype).tiny) + 1
    return torch.exp2(exponent.clamp(min=floor) - BITS[dtype])


def compare(
    who: str, results: list[Tensor], truths: list[Tensor], case: Case, inputs: str, dtype: torch.dtype
) -> Iterator[Row]:
    for quantity, result, truth in zip(case.quantities, results, truths, strict=True):
        own = result.dtype
        result, truth = result.detach().double().cpu(), truth.detach().double().cpu()
        finite = result.isfinite() & truth.isfinite()
        same = (result == truth) | (result.isnan() & truth.isnan())
        error = (result - truth).abs()[finite]
        ulps = error / ulp(truth[finite], own if own in BITS else torch.float32)
        largest = (ulps.max().item(), error.max().item()) if error.numel() else (0.0, 0.0)
        yield Row(quantity, inputs, SHORT[dtype], who, *largest, int((~finite & ~same).sum()))


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def with_gradient(function: Callable[..., object], *tensors: Tensor, count: int = 1) -> list[Tensor]:
    """The first `count` outputs and the gradient of their sum into the first tensor."""
    x = leaf(tensors[0])
    outputs = function(x, *tensors[1:])
    outputs = list(outputs)[:count] if isinstance(outputs, tuple) else [outputs]
    (grad,) = torch.autograd.grad(sum(y.sum() for y in outputs), x)
    return [*(y.detach() for y in outputs), grad]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits_cases(rows: int, vocab: int) -> Iterator[Case]:
    labels = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(1))
    x = normal(rows, vocab)
    masked = torch.where(torch.arange(vocab) < vocab // 10, 3 * x, -math.inf)
    kinds = {"N(0, 3)": 3 * x, "N(30, 2)": 30 + 2 * x, "±1e4": 1e4 * x.sign() + 3 * x, "-inf tail": masked}
    formulations = {"plain PyTorch": plain.logprobs_and_entropy, **libraries.logprobs_and_entropy()}
    yield Case(
        "selected_logprobs",
        ("logprob", "entropy", "gradient"),
        {name: (x, labels % (vocab // 10)) for name, x in kinds.items()},
        lambda x, y: with_gradient(lambda x: rk.selected_logprobs(x, y, with_entropy=True), x, count=2),
        {name: lambda x, y, f=f: with_gradient(f, x, y, count=2) for name, f in formulations.items()},
    )
    near = 3 * x + 0.01 * normal(rows, vocab, seed=2)
    for direction in ("reverse", "forward", "jsd"):
        yield Case(
            f"full_kl {direction}",
            ("kl", "gradient"),
            {"far apart": (3 * x, 3 * normal(rows, vocab, seed=2)), "close": (3 * x, near)},
            lambda p, q, d=direction: with_gradient(lambda p: rk.full_kl(p, q, direction=d), p),
            {"plain PyTorch": lambda p, q, d=direction: with_gradient(lambda p: plain.full_kl(p, q, d), p)},
        )
    yield Case(
        "sample_tokens",
        ("logprob",),
        {"N(0, 3)": (3 * x,)},
        lambda x: [rk.sample_tokens(x, seed=3)[1]],
        {"plain PyTorch": lambda x: [plain.logprobs_and_entropy(x, rk.sample_tokens(x, seed=3)[0])[0]]},
    )


def linear_cases(rows: int, vocab: int) -> Iterator[Case]:
    """The GEMM is torch's: on a CPU a 16-bit one rounds the logits to 16 bits, ours as anybody's."""
    labels = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(1))
    hidden, weight = normal(rows, 64), 0.3 * normal(vocab, 64, seed=1)

    def plainly(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return plain.logprobs_and_entropy(h @ w.T, y)

    yield Case(
        "linear_logprobs",
        ("logprob", "entropy", "gradient"),
        {"logits N(0, 2.4)": (hidden, weight, labels)},
        lambda h, w, y: with_gradient(lambda h: rk.linear_logprobs(h, w, y, with_entropy=True), h, count=2),
        {"plain PyTorch": lambda h, w, y: with_gradient(lambda h: plainly(h, w, y), h, count=2)},
    )


def token_cases(batch: int, time: int) -> Iterator[Case]:
    old, advantages = -2 - normal(batch, time).abs(), normal(batch, time, seed=1)
    mask = torch.arange(time) < torch.randint(1, time + 1, (batch, 1), generator=torch.Generator().manual_seed(2))
    kinds = {"close": old + 0.02 * normal(batch, time, seed=3), "far apart": old + 3 * normal(batch, time, seed=3)}
    tiny = old.to(torch.float32) + 3e-4
    for estimator in ("k1", "k2", "k3"):
        yield Case(
            f"per_token_kl {estimator}",
            ("kl", "gradient"),
            {**{name: (new, old) for name, new in kinds.items()}, "d = 3e-4": (tiny, old)},
            lambda a, b, e=estimator: with_gradient(lambda a: rk.per_token_kl(a, b, estimator=e), a),
            {"plain PyTorch": lambda a, b, e=estimator: with_gradient(lambda a: plain.per_token_kl(a, b, e), a)},
            dtypes=(torch.float32,),
        )
    yield Case(
        "policy_loss",
        ("loss", "gradient"),
        {name: (new, old, advantages, mask) for name, new in kinds.items()},
        lambda new, *rest: with_gradient(rk.policy_loss, new, *rest),
        {
            name: lambda *t, f=f: with_gradient(f, *t)
            for name, f in {"plain PyTorch": plain.policy_loss, **libraries.policy_loss()}.items()
        },
        dtypes=(torch.float32,),
    )
    yield Case(
        "value_loss",
        ("loss", "gradient"),
        {"N(0, 1)": (advantages, advantages + 0.3 * normal(batch, time, seed=4), normal(batch, time, seed=5), mask)},
        lambda v, *rest: with_gradient(rk.value_loss, v, *rest),
        {"plain PyTorch": lambda v, *rest: with_gradient(plain.value_loss, v, *rest)},
        dtypes=(torch.float32,),
    )
    yield Case(
        "whiten",
        ("whitened",),
        {"N(0, 1)": (advantages, mask), "N(1e4, 0.01)": (1e4 + 0.01 * advantages, mask)},
        lambda x, m: [rk.whiten(x, m)],
        {"plain PyTorch": lambda x, m: [plain.whiten(x, m)]},
        dtypes=(torch.float32,),
    )
    rewards, values = normal(batch, time, seed=6), normal(batch, time, seed=7)
    scans = {"per-step loop": partial(plain.gae, gamma=GAMMA, lam=LAM), **libraries.gae(GAMMA, LAM)}
    yield Case(
        "gae",
        ("advantages", "returns"),
        {"N(0, 1)": (rewards, values, mask)},
        lambda r, v, m: list(rk.gae(r, v, m, gamma=GAMMA, lam=LAM)),
        {name: lambda r, v, m, f=f: list(f(r, v, m)) for name, f in scans.items()},
        dtypes=(torch.float32,),
    )
    scores = normal(batch, seed=8)
    yield Case(
        "ppo_advantages",
        ("advantages", "returns", "kl"),
        {"close": (kinds["close"], old, scores, values, mask)},
        lambda *t: list(rk.ppo_advantages(*t, kl_coef=0.05, gamma=GAMMA, lam=LAM)),
        {"eager composition": lambda *t: list(plain.ppo_advantages(*t, kl_coef=0.05, gamma=GAMMA, lam=LAM))},
        dtypes=(torch.float32,),
    )


def measure(case: Case) -> Iterator[Row]:
    interpreted = not torch.cuda.is_available()
    for inputs, tensors in case.inputs.items():
        for dtype in case.dtypes:
            rounded = [x.to(dtype) if x.is_floating_point() else x for x in tensors]
            wide = [x.double() if x.is_floating_point() else x for x in rounded]
            with rk.use_backend("reference"):
                truths = case.ours(*wide)
            for backend in ("cpu", "triton"):
                if rk.dispatch.available()[backend]:
                    continue
                device = "cuda" if backend == "triton" and not interpreted else "cpu"
                with rk.use_backend(backend):
                    results = case.ours(*(x.to(device) for x in rounded))
                for row in compare(f"rlhf_kernels, {backend}", results, truths, case, inputs, dtype):
                    truncates = backend == "triton" and interpreted and dtype != torch.float32
                    if not (truncates and row.quantity == "gradient"):
                        yield row
            for name, formulation in case.others.items():
                yield from compare(name, formulation(*rounded), truths, case, inputs, dtype)


def table(case: Case, rows: list[Row]) -> str:
    lines = [
        f"## {case.op}",
        "",
        "| | inputs | dtype | | max ulp | max abs error | NaN or inf wrong |",
        "|---|---|---|---|---|---|---|",
    ]
    for quantity in case.quantities:
        for row in (row for row in rows if row.quantity == quantity):
            figures = f"{row.ulp:.3g} | {row.error:.2e} | {row.wrong or ''}"
            lines.append(f"| {row.quantity} | {row.inputs} | {row.dtype} | {row.who} | {figures} |")
    return "\n".join(lines)


def preface() -> str:
    machine = ", ".join(f"{k} {v}" for k, v in environment().items())
    packages = ", ".join(libraries.installed().values()) or "no other library installed"
    where = "a GPU" if torch.cuda.is_available() else "its interpreter on the CPU"
    return (
        "# Accuracy\n\n"
        f"Written by `python bench/accuracy.py`: {machine}; {packages}.\n\n"
        "Truth is the reference in float64 on the same rounded inputs. Ulp are those of the result's own dtype: fp32,\n"
        "or the inputs' for a gradient. A kernel may err twice as much as plain PyTorch, plus 2 ulp.\n"
        f"Triton ran in {where}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "accuracy.md")
    options = parser.parse_args()
    sizes = ((2, 300), (3, 40)) if options.quick else ((4, 32001), (32, 200))
    parts = [preface()]
    for case in (*logits_cases(*sizes[0]), *linear_cases(*sizes[0]), *token_cases(*sizes[1])):
        parts.append(table(case, list(measure(case))))
        print(parts[-1], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n\n".join(parts) + "\n")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
