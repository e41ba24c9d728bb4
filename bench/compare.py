"""The table of ratios: every op against its peers, interleaved in one process; JSON into bench/results/.

python bench/compare.py [--only full_kl gae] [--rounds 15] [--quiet 0.05] [--out bench/results/cpu.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import peers
import token_cases
import torch
from harness import Comparison, Contender, compare, environment
from linear import FEW, ROWS, VOCAB, WIDTH, few_rows, frozen_head, linear, widened
from losses import SHAPE, losses
from sampling import SAMPLED, sampling
from torch import Tensor

import rlhf_kernels as rk

OURS = "rlhf_kernels"
KINDS = (
    "forward",
    "backward",
    "full_kl",
    "gae",
    "losses",
    "ppo",
    "sampling",
    "tokens",
    "linear",
    "frozen_head",
    "openmp",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def forward(dtype: torch.dtype, rounds: int, quiet: float) -> Comparison:
    logits, labels = peers.logits_case(dtype)
    plain = {**peers.PLAIN, **peers.compiled()}
    if dtype != torch.float32:
        plain["row loop"] = peers.row_loop
    contenders = {name: Contender(lambda f=f: f(logits, labels)) for name, f in plain.items()}
    contenders["one read: x.sum()"] = Contender(logits.sum)
    contenders[OURS] = Contender(lambda: rk.selected_logprobs(logits, labels))
    contenders[f"{OURS}, entropy too"] = Contender(lambda: rk.selected_logprobs(logits, labels, with_entropy=True))
    with torch.no_grad():
        result = compare(contenders, rounds, quiet=quiet)
    ours = result.median(OURS)
    result.ratios = {
        "faster than eager log_softmax + gather": result.median("log_softmax + gather") / ours,
        "faster than the best compiled": result.best("compiled") / ours,
        "of the time of one read": ours / result.median("one read: x.sum()"),
        "of that with entropy": result.median(f"{OURS}, entropy too") / ours,
    }
    return result


def backward(dtype: torch.dtype, rounds: int, quiet: float) -> Comparison:
    logits, labels = peers.logits_case(dtype)
    grad_logprobs = torch.randn(peers.ROWS)
    leaf = logits.clone().requires_grad_()

    def step(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(f(leaf, labels), leaf, grad_logprobs)

    def restore() -> None:
        with torch.no_grad():
            leaf.copy_(logits)

    plain = {**peers.PLAIN, **peers.compiled()}
    contenders = {name: Contender(step(f)) for name, f in plain.items()}
    contenders[OURS] = Contender(step(rk.selected_logprobs))
    contenders[f"{OURS}, in place"] = Contender(
        step(lambda x, labels: rk.selected_logprobs(x, labels, inplace_backward=True)), prepare=restore
    )
    result = compare(contenders, rounds, quiet=quiet)
    fresh, inplace = result.median(OURS), result.median(f"{OURS}, in place")
    eager, compiled = result.median("log_softmax + gather"), result.best("compiled")
    result.ratios = {
        "faster than eager": eager / fresh,
        "faster than the best compiled": compiled / fresh,
        "in place, faster than eager": eager / inplace,
        "in place, faster than the best compiled": compiled / inplace,
    }
    return result


def full_kl(dtype: torch.dtype, rounds: int, quiet: float) -> Comparison:
    logits, ref = peers.kl_case(dtype)
    contenders = {
        name: Contender(lambda f=f: f(logits, ref)) for name, f in {**peers.PLAIN_KL, **peers.compiled_kl()}.items()
    }
    contenders["one read: x.sum(), ref.sum()"] = Contender(lambda: (logits.sum(), ref.sum()))
    contenders[OURS] = Contender(lambda: rk.full_kl(logits, ref))
    for direction in ("forward", "jsd"):
        contenders[f"{OURS}, {direction}"] = Contender(lambda d=direction: rk.full_kl(logits, ref, direction=d))
    with torch.no_grad():
        result = compare(contenders, rounds, quiet=quiet)
    ours, read = result.median(OURS), result.median("one read: x.sum(), ref.sum()")
    result.ratios = {
        "faster than eager log_softmax": result.median("log_softmax") / ours,
        "faster than the best compiled": result.best("compiled") / ours,
        "of the time of one read of both": ours / read,
        "of that for jsd": result.median(f"{OURS}, jsd") / read,
    }
    return result


def full_kl_backward(dtype: torch.dtype, rounds: int, quiet: float) -> Comparison:
    logits, ref = peers.kl_case(dtype)
    leaf, upstream = logits.requires_grad_(), torch.randn(len(logits))
    plain = {**peers.PLAIN_KL, **peers.compiled_kl(), OURS: rk.full_kl}
    contenders = {
        name: Contender(lambda f=f: torch.autograd.grad(f(leaf, ref), leaf, upstream)) for name, f in plain.items()
    }
    result = compare(contenders, rounds, quiet=quiet)
    result.ratios = {
        "faster than eager": result.median("log_softmax") / result.median(OURS),
        "faster than the best compiled": result.best("compiled") / result.median(OURS),
    }
    return result


def gae(rounds: int, quiet: float) -> Comparison:
    rewards, values, mask = peers.gae_case()
    contenders = {
        "per-step loop": Contender(lambda: peers.gae_loop(rewards, values, mask)),
        OURS: Contender(lambda: rk.gae(rewards, values, mask, gamma=peers.GAMMA, lam=peers.LAM)),
    }
    if find_spec("torchrl"):
        contenders["torchrl, vectorised, no mask"] = Contender(lambda: peers.torchrl_gae(rewards, values))
    result = compare(contenders, rounds, calls=5, quiet=quiet)
    result.ratios = {
        f"faster than {name}": timing.median / result.median(OURS)
        for name, timing in result.timings.items()
        if name != OURS
    }
    return result


def gae_packed(rounds: int, quiet: float) -> Comparison:
    """The same number of positions as rows, as equal sequences, and as many positions again in ragged ones."""
    rewards, values, _ = peers.gae_case()
    flat_rewards, flat_values = rewards.flatten(), values.flatten()
    even = torch.arange(0, rewards.numel() + 1, peers.TIME)
    ragged_rewards, ragged_values, offsets = peers.ragged_case()
    lengths = offsets.diff()
    half = rewards[:, : peers.TIME // 2].contiguous(), values[:, : peers.TIME // 2].contiguous()

    def padded() -> object:
        """What it takes without packed sequences: scatter, scan rows of the longest, gather."""
        inside = torch.arange(int(lengths.max())) < lengths[:, None]
        rows = (torch.zeros(inside.shape).masked_scatter(inside, x) for x in (ragged_rewards, ragged_values))
        return [x[inside] for x in rk.gae(*rows, inside)]

    contenders = {
        "padded": Contender(lambda: rk.gae(rewards, values)),
        "packed, equal lengths": Contender(lambda: rk.gae(flat_rewards, flat_values, cu_seqlens=even)),
        "padded, half as long": Contender(lambda: rk.gae(*half)),
        "packed, heavy tail": Contender(lambda: rk.gae(ragged_rewards, ragged_values, cu_seqlens=offsets)),
        "heavy tail, padded and back": Contender(padded),
    }
    result = compare(contenders, rounds, calls=5, quiet=quiet)
    tokens = ragged_rewards.numel() / half[0].numel()
    result.ratios = {
        "of padded, equal lengths": result.median("packed, equal lengths") / result.median("padded"),
        "of padded, heavy tail, per token": result.median("packed, heavy tail")
        / result.median("padded, half as long")
        / tokens,
        "faster than padding a heavy tail": result.median("heavy tail, padded and back")
        / result.median("packed, heavy tail"),
    }
    return result


def ppo_advantages(batch: int, rounds: int, quiet: float) -> Comparison:
    case = peers.rollout_case(batch)
    options = {"gamma": peers.GAMMA, "lam": peers.LAM}

    def single_ops() -> object:
        logprobs, ref_logprobs, scores, values, mask = case
        kl = torch.where(mask, rk.per_token_kl(logprobs, ref_logprobs), 0.0)
        rewards = rk.shaped_rewards(scores, kl, mask, kl_coef=peers.KL_COEF)
        advantages, returns = rk.gae(rewards, values, mask, **options)
        return rk.whiten(advantages, mask), returns, kl

    contenders = {
        "eager, as TRL writes it": Contender(lambda: peers.trl_advantages(*case)),
        "our single ops": Contender(single_ops),
        OURS: Contender(lambda: rk.ppo_advantages(*case, kl_coef=peers.KL_COEF, **options)),
    }
    result = compare(contenders, rounds, calls=5, quiet=quiet)
    result.ratios = {
        f"faster than {name}": timing.median / result.median(OURS)
        for name, timing in result.timings.items()
        if name != OURS
    }
    return result


def tokens(op: str, shape: tuple[int, int], rounds: int, quiet: float) -> Comparison:
    contenders = {name: Contender(call) for name, call in token_cases.contenders(op, shape).items()}
    result = compare(contenders, rounds, calls=20 if shape[0] < 100 else 3, quiet=quiet)
    ours = result.median(OURS)
    result.ratios = {f"faster than {name}": result.median(name) / ours for name in ("eager", "compiled")}
    return result


def openmp(rounds: int, quiet: float) -> Comparison:
    """Does a torch op, or ours, run slower when the two alternate than when each follows itself?"""
    logits, labels = peers.logits_case(torch.float32)
    logits, labels = logits[:64], labels[:64]  # short calls: waking and spinning threads would show
    a, b = torch.randn(384, 384), torch.randn(1 << 20)

    def ours() -> Tensor:
        return rk.selected_logprobs(logits, labels)

    torch_ops: dict[str, Callable[[], object]] = {"matmul": lambda: a @ a, "exp": b.exp}
    contenders = {f"{OURS} after itself": Contender(ours, prepare=ours)}
    for name, op in torch_ops.items():
        contenders[f"{name} after itself"] = Contender(op, prepare=op)
        # The control: torch's own parallel op, which moves as much memory through the caches as ours does.
        contenders[f"{name} after torch's sum"] = Contender(op, prepare=logits.sum)
        contenders[f"{name} after {OURS}"] = Contender(op, prepare=ours)
        contenders[f"{OURS} after {name}"] = Contender(ours, prepare=op)
    with torch.no_grad():
        result = compare(contenders, rounds, calls=20, quiet=quiet)
    for name in torch_ops:
        for other in (OURS, "torch's sum"):
            ratio = result.median(f"{name} after {other}") / result.median(f"{name} after itself")
            result.ratios[f"{name} after {other} / after itself"] = ratio
        result.ratios[f"{OURS} after {name} / after itself"] = result.median(f"{OURS} after {name}") / result.median(
            f"{OURS} after itself"
        )
    return result


def show(title: str, result: Comparison) -> None:
    print(f"\n{title}   (others used {result.others:.0%} of the cores; {result.busy_rounds} busy rounds repeated)")
    for name, t in result.timings.items():
        print(f"  {name:42} {t.median:9.3f} ms   quartiles {t.low:.3f} .. {t.high:.3f}")
    for name, ratio in result.ratios.items():
        print(f"  {ratio:8.2f} x  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS)
    parser.add_argument("--dtype", choices=DTYPES, help="of the kinds that have two: this one alone")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--quiet", type=float, default=0.05, help="share of the cores others may use in a round that counts"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    options = parser.parse_args()
    record: dict[str, object] = {"environment": environment()}
    print(", ".join(f"{k} {v}" for k, v in environment().items()))

    repeat = (options.rounds, options.quiet)
    shape = f"[{peers.ROWS}, {peers.VOCAB}]"
    cases: list[tuple[str, str, Callable[[], Comparison]]] = []
    dtypes = {name: dtype for name, dtype in DTYPES.items() if options.dtype in (None, name)}
    for name, dtype in dtypes.items():
        title = f"selected_logprobs forward {name} {shape}"
        cases.append(("forward", title, lambda dtype=dtype: forward(dtype, *repeat)))
    for name, dtype in dtypes.items():
        title = f"selected_logprobs forward + backward {name} {shape}"
        cases.append(("backward", title, lambda dtype=dtype: backward(dtype, *repeat)))
    for name, dtype in dtypes.items():
        shape = f"{name} [{peers.ROWS // 2}, {peers.VOCAB}]"
        cases.append(("full_kl", f"full_kl forward {shape}", lambda dtype=dtype: full_kl(dtype, *repeat)))
        title = f"full_kl forward + backward {shape}"
        cases.append(("full_kl", title, lambda dtype=dtype: full_kl_backward(dtype, *repeat)))
    cases.append(("gae", f"gae fp32 [{peers.BATCH}, {peers.TIME}] with mask", lambda: gae(*repeat)))
    cases.append(("gae", f"gae fp32, {peers.BATCH * peers.TIME} positions packed", lambda: gae_packed(*repeat)))
    for batch in (64, peers.BATCH):
        title = f"ppo_advantages fp32 [{batch}, {peers.TIME}]"
        cases.append(("ppo", title, lambda batch=batch: ppo_advantages(batch, *repeat)))
    for shape in token_cases.SHAPES:
        for op in token_cases.OPS:
            cases.append(("tokens", f"{op} fp32 {list(shape)}", lambda op=op, shape=shape: tokens(op, shape, *repeat)))
    for name, dtype in dtypes.items():
        sizes = f"{name}, {ROWS} rows, width {WIDTH}, vocabulary {VOCAB}"
        cases.append(("linear", f"linear family {sizes}", lambda dtype=dtype: linear(dtype, *repeat)))
        if widened(dtype):
            title = f"linear family {name}, {FEW} rows, width {WIDTH}, vocabulary {VOCAB}, beside torch's own"
            cases.append(("linear", title, lambda dtype=dtype: few_rows(dtype, *repeat)))
        title = f"linear_logprobs under a frozen head {sizes}"
        cases.append(("frozen_head", title, lambda dtype=dtype: frozen_head(dtype, *repeat)))
    cases.append(
        ("losses", f"policy_loss + value_loss, forward + backward fp32 {list(SHAPE)}", lambda: losses(*repeat))
    )
    for name, dtype in dtypes.items():
        title = f"sample_tokens {name} {list(SAMPLED)}"
        cases.append(("sampling", title, lambda dtype=dtype: sampling(dtype, *repeat)))
    cases.append(("openmp", "calls alternating with torch ops", lambda: openmp(*repeat)))
    for kind, title, run in cases:
        if options.only is None or kind in options.only:
            result = run()
            show(title, result)
            record[title] = asdict(result)
            torch.compiler.reset()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
