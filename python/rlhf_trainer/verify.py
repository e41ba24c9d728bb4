"""`rlhf verify`: PPO, DPO and best-of-N where their results are known exactly. Exit code 1 if one fails."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel

from rlhf_trainer.base.config import option
from rlhf_trainer.base.console import say
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.base.jsons import dumps
from rlhf_trainer.base.writing import write_text
from rlhf_trainer.ppo import train_ppo
from rlhf_trainer.verification import cases, other_worlds, reward_model
from rlhf_trainer.verification.cases import QUICK, QUICK_GAP, CheckResult, fitted_reference, ppo_config
from rlhf_trainer.worlds.exact import PROMPTS, ExactWorld, oracle
from rlhf_trainer.worlds.threads import one_thread

matplotlib.use("Agg")  # a server has no display

SUMMARY = """Train with PPO in a world small enough to enumerate, and compare with its known optimum.

PPO with LoRA, with group baselines (grpo, rloo), and DPO on pairs must reach the same optimum, best-of-N its exact
reward and KL: see --rows."""
EXAMPLE = "rlhf verify --full --output_dir runs/verify"

CHECKS = cases.CHECKS | reward_model.CHECKS | {"worlds": other_worlds.check_worlds}
DEFAULT = ("lora", "grpo", "rloo", "dpo", "bon", "ranks", "micro")  # the others take as long again, see docs/verify.md

FULL = 150  # updates
EVERY = 5  # updates between two points of the curve: enumerating costs about as much as an update
FULL_GAP, FULL_KL = 0.990, 0.025


@dataclass
class Config:
    full: bool = option(False, f"{FULL} updates and the strict gates, instead of {QUICK} updates")
    output_dir: str = option("runs/verify", "folder for verify.json and verify.png")
    seed: int = option(0, "seed of the world's corpus, the model and the training")
    beta: float = option(0.3, "weight of the KL penalty")
    temperature: float = option(1.0, "sampling temperature")
    rows: list[str] = option(
        list(DEFAULT), f"what is checked besides PPO, of {', '.join(CHECKS)}; or all, or none; at the gates' own beta"
    )


@dataclass
class Verdict:
    """What a run in the exact world reached. J is in reward units, KL in nats, averaged over the prompts."""

    updates: int
    gap_closed: float
    kl_to_optimum: float
    kl_to_reference: float
    j_reference: float
    j_policy: float
    j_optimum: float
    curve: list[tuple[int, float]]  # (updates done, J of the policy)


def run(cfg: Config) -> dict[str, Any]:
    for name in ("beta", "temperature"):
        if not getattr(cfg, name) > 0:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be more than 0")
    names = list(CHECKS) if cfg.rows == ["all"] else [] if cfg.rows == ["none"] else list(dict.fromkeys(cfg.rows))
    for name in names:
        if name not in CHECKS:
            raise UserError(f"--rows {name}: not one of {', '.join(CHECKS)}, and not all or none by itself")
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)  # fails now if it cannot be written, not after minutes of training
    say(f"fitting the reference, then {FULL if cfg.full else QUICK} updates of PPO; about a minute on one core")
    verdict = train_and_measure(FULL if cfg.full else QUICK, seed=cfg.seed, beta=cfg.beta, temperature=cfg.temperature)
    checks = gates(verdict, cfg.full)
    lines: list[CheckResult] = []
    for place, name in enumerate(names, start=1):
        say(f"checking {name}, {place} of {len(names)}")
        began = time.perf_counter()
        try:
            with one_thread():
                found = CHECKS[name](cfg.seed)
        except UserError as error:  # the results so far are still written
            say(f"  {error}")
            found = [CheckResult(f"{name}: stopped by an error", 0, "finishes", False)]
        for line in found:
            say(f"  {line.name}: {line.reached:.4g}, gate {line.gate}, {'passed' if line.kept else 'FAILED'}")
        say(f"  {time.perf_counter() - began:.0f} s")
        lines += found
    result = asdict(verdict) | {"rows": [asdict(line) for line in lines]}
    write_text(folder / "verify.json", dumps(result, indent=2) + "\n")
    plot(verdict, folder / "verify.png")
    show(verdict, checks, lines)
    print(f"J(pi) per update against J*: {folder / 'verify.png'}")
    return {"passed": all(kept for _, kept in checks.values()) and all(line.kept for line in lines)} | result


def train_and_measure(updates: int, *, seed: int = 0, beta: float = 0.3, temperature: float = 1.0) -> Verdict:
    """Fit the reference, train with `train_ppo` as any user would, and compare with the enumerated optimum."""
    with one_thread():
        tokenizer, reference = fitted_reference(seed)
        world = ExactWorld(reference, tokenizer, beta, temperature)
        start = world.measure(reference)
        curve = [(0, start.objective)]

        def record(done: int, policy: PreTrainedModel) -> None:
            if done % EVERY == 0:
                curve.append((done, world.measure(policy).objective))

        result = train_ppo(
            ppo_config(updates, seed, beta, temperature),
            model=copy.deepcopy(reference),
            tokenizer=tokenizer,
            reward=oracle,
            prompts=PROMPTS,
            on_update=record,
        )
        end = world.measure(result.policy)
    return Verdict(
        updates=updates,
        gap_closed=world.gap_closed(end.objective, start.objective),
        kl_to_optimum=end.kl_to_optimum,
        kl_to_reference=end.kl_to_reference,
        j_reference=start.objective,
        j_policy=end.objective,
        j_optimum=world.best,
        curve=curve,
    )


def gates(verdict: Verdict, full: bool) -> dict[str, tuple[str, bool]]:
    """Gate -> (what it asks for, whether it is kept). A number that is not finite keeps none."""
    if not full:
        return {"gap closed": (f">= {QUICK_GAP}", verdict.gap_closed >= QUICK_GAP)}
    return {
        "gap closed": (f">= {FULL_GAP}", verdict.gap_closed >= FULL_GAP),
        "KL(pi || pi*)": (f"<= {FULL_KL}", verdict.kl_to_optimum <= FULL_KL),
    }


def show(verdict: Verdict, checks: dict[str, tuple[str, bool]], lines: Sequence[CheckResult]) -> None:
    table = Table(title=f"The exact world; PPO after {verdict.updates} updates")
    for column in ("", "reached", "gate", ""):
        table.add_column(column, justify="left" if not column else "right")
    values = {
        "gap closed": verdict.gap_closed,
        "KL(pi || pi*)": verdict.kl_to_optimum,
        "KL(pi || ref)": verdict.kl_to_reference,
        "J(ref)": verdict.j_reference,
        "J(pi)": verdict.j_policy,
        "J*": verdict.j_optimum,
    }
    for name, value in values.items():
        gate, kept = checks.get(name, ("", None))
        table.add_row(name, f"{value:.4f}", gate, {True: "passed", False: "FAILED", None: ""}[kept])
    for line in lines:
        table.add_row(escape(line.name), f"{line.reached:.4g}", line.gate, "passed" if line.kept else "FAILED")
    Console().print(table)


def plot(verdict: Verdict, path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*verdict.curve, strict=True), marker=".", label="J(pi)")
    axes.axhline(verdict.j_optimum, color="black", linestyle="--", label="J*, the enumerated optimum")
    axes.axhline(verdict.j_reference, color="grey", linestyle=":", label="J(ref)")
    axes.set(xlabel="updates", ylabel="E[r] - beta KL(pi || ref)", title=f"gap closed: {verdict.gap_closed:.4f}")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
