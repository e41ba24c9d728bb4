"""Very many random calls of every op on one backend against the reference in float64; prints the worst of each.

python tests/soak.py {cpu|triton} --cases 1000000 --seed 0 [--only OP]   (Triton: in its interpreter without a GPU)

A mismatch is NaN or infinity where truth has none (or another one), something other than 0 at a masked place, or an
error above 16 ulp (fp32) of the largest number involved. The exit code is 1 if there is one, and the call is printed.
The accuracy rule proper, which compares with plain PyTorch's error, is what the conformance tests check.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import soaked
import soaked_linear
import soaked_sampling
from hypothesis import HealthCheck, Phase, given, seed, settings

SOAKED = dict(sorted({**soaked.SOAKED, **soaked_sampling.SOAKED, **soaked_linear.SOAKED}.items()))
BATCH = 2_000  # cases of one run of hypothesis, whose memory grows with them


def soak(op: str, backend: str, cases: int, first_seed: int) -> tuple[int, float]:
    """Run `cases` calls -> (how many ran, worst error). Raises AssertionError with the call at a mismatch."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    worst, ran = 0.0, 0

    def check(call: object) -> None:
        nonlocal worst, ran
        try:
            worst = max(worst, SOAKED[op].check(call, backend, device))
        except AssertionError as error:
            raise AssertionError(f"{error}, at {call}") from error
        ran += 1

    for start in range(0, cases, BATCH):
        run = settings(
            max_examples=min(BATCH, cases - start),
            phases=[Phase.generate],
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(given(call=SOAKED[op].calls)(check))
        seed(first_seed + start // BATCH)(run)()
    return ran, worst


def small_triton_blocks() -> None:
    """The interpreter's time goes with the size of a block, and short inputs shall span several."""
    import conftest
    import pytest

    conftest.shrink_blocks(pytest.MonkeyPatch())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=["cpu", "triton"])
    parser.add_argument("--cases", type=int, default=10_000, help="over all ops")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=SOAKED, metavar="OP")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.backend == "triton" and not torch.cuda.is_available():
        small_triton_blocks()
    ops = options.only or list(SOAKED)
    total, failed = 0, False
    for number, op in enumerate(ops):
        share = options.cases // len(ops) + (number < options.cases % len(ops))
        began = time.perf_counter()
        try:
            ran, worst = soak(op, options.backend, share, options.seed)
        except AssertionError as error:
            print(f"{op}: MISMATCH {error}", flush=True)
            failed = True
            continue
        total += ran
        print(f"{op:20} {ran:8} cases, worst {worst:6.2f} ulp, {time.perf_counter() - began:.0f} s", flush=True)
    print(f"{total} cases on {options.backend}, seed {options.seed}: {'MISMATCHES' if failed else '0 mismatches'}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
