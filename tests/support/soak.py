"""Very many random calls of every op on one backend against the reference in float64: counts, and the worst of each.

In tests/:

python -m support.soak {cpu|triton} --cases 1000000 --seed 0 --record FILE [--part 1/2] [--only|--skip OP ...]
python -m support.soak reference --cases 60000 ...     the ops that have no kernel: plain PyTorch in the call's dtypes
python -m support.soak sum FILE ...                    what the records of any number of processes hold together

A case is one random call of one op on the backend, forward and backward, its options drawn with it, and the same call
of the reference in float64. (`sample_tokens` draws one time in four again, which is not counted.) A mismatch is NaN or
infinity where truth has none (or another one), something other than 0 at a masked place, or an error above the op's
limit: 16, where the unit is an ulp of fp32 at the largest number that the result comes from, or for `linear_*` 1, where
it is the bound in soaked_linear.py. The accuracy rule proper, which compares with plain PyTorch's error, is what the
conformance tests check. The exit code is 1 if there is a mismatch, and the call is printed; 130 if stopped.

Cases come in batches of an op, seeded by --seed, the op and the batch's number. --part K/N runs every N-th batch, so N
processes share a run. Each finished batch is a line of FILE, which several processes may write; one that FILE already
holds is not run again, so a run that was stopped goes on where it was. Triton runs in its interpreter without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from hypothesis import HealthCheck, Phase, given, seed, settings

from support import soaked, soaked_linear, soaked_sampling

SOAKED = dict(sorted({**soaked.SOAKED, **soaked_sampling.SOAKED, **soaked_linear.SOAKED}.items()))
BATCH = 250  # cases of one run of hypothesis: half a minute in Triton's interpreter


class Batch(NamedTuple):
    """One line of a record."""

    backend: str
    seed: int
    op: str
    batch: int
    cases: int
    mismatches: int
    worst: float  # error, in the op's unit
    seconds: float  # of the processor
    device: str
    commit: str


def soak(op: str, backend: str, cases: int, batch_seed: str) -> tuple[int, float, list[str]]:
    """Run `cases` calls -> how many ran, the worst error of those that match, what the others are."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    worst, ran, mismatches = 0.0, 0, []

    def check(call: object) -> None:
        nonlocal worst, ran
        ran += 1
        try:
            worst = max(worst, SOAKED[op].check(call, backend, device))
        except AssertionError as error:
            mismatches.append(f"{error}, at {call}")

    run = settings(
        max_examples=cases,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )(given(call=SOAKED[op].calls)(check))
    seed(batch_seed)(run)()
    return ran, worst, mismatches


def planned(ops: list[str], cases: int, part: tuple[int, int]) -> Iterator[tuple[str, int, int]]:
    """(op, batch, its cases) of part K of N, the ops in turn, so that a run that is stopped has some of each."""
    shares = {op: cases // len(ops) + (number < cases % len(ops)) for number, op in enumerate(ops)}
    for batch in range(-(-max(shares.values()) // BATCH)):
        if batch % part[1] == part[0] - 1:
            for op, share in shares.items():
                if share > batch * BATCH:
                    yield op, batch, min(BATCH, share - batch * BATCH)


def read(files: Iterable[Path]) -> dict[tuple, Batch]:
    """The records' batches, each once: of two runs of one, the longer."""
    batches: dict[tuple, Batch] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                one = Batch(**json.loads(line))
            except ValueError:  # torn by a kill
                continue
            held = batches.get(one[:4])
            if held is None or held.cases < one.cases:
                batches[one[:4]] = one
    return batches


def report(batches: Iterable[Batch]) -> int:
    """Print a line for each backend, seed and op, and each backend's sum -> the number of mismatches."""
    rows: dict[tuple, list[Batch]] = {}
    for one in batches:
        rows.setdefault((one.backend, one.device, one.seed, one.op), []).append(one)
    for key, row in sorted(rows.items()):
        backend, device, first_seed, op = key
        cases, bad = sum(one.cases for one in row), sum(one.mismatches for one in row)
        took, worst = sum(one.seconds for one in row), max(one.worst for one in row)
        print(
            f"{backend} on {device}, seed {first_seed}, {op:20} {cases:8} cases, {bad} mismatches, worst {worst:6.3f},"
            f" {1000 * took / max(1, cases):6.1f} ms a case, {'/'.join(sorted({one.commit for one in row}))}"
        )
    for backend, device in sorted({key[:2] for key in rows}):
        mine = [one for row in rows.values() for one in row if (one.backend, one.device) == (backend, device)]
        cases, bad, took = (sum(getattr(one, name) for one in mine) for name in ("cases", "mismatches", "seconds"))
        print(
            f"{backend} on {device}: {cases} cases, {bad} mismatches, {took / 3600:.2f} hours of one core", flush=True
        )
    return sum(one.mismatches for row in rows.values() for one in row)


def small_triton_blocks() -> None:
    """The interpreter's time goes with the size of a block, and short inputs shall span several."""
    import pytest

    from support.backends import shrink_blocks

    shrink_blocks(pytest.MonkeyPatch())


def patch_triton_once() -> None:
    """The interpreter replaces triton.language's functions at every call of a jitted function, half of its time.

    What it puts there is the same each time, and no kernel is compiled in this process: once is enough.
    """
    from triton.runtime import interpreter

    stock, patched = interpreter._patch_lang, set()
    languages = (interpreter.tl, interpreter.tl.core)

    def patch(fn: object) -> interpreter._LangPatchScope:
        seen = tuple(any(value is module for value in fn.__globals__.values()) for module in languages)
        if seen not in patched:
            patched.add(seen)
            stock(fn)
        return interpreter._LangPatchScope()  # restores nothing

    interpreter._patch_lang = patch
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")  # inf - inf


def run_batches(options: argparse.Namespace, ops: list[str]) -> tuple[list[Batch], bool]:
    """Run this part's batches that the record does not hold -> those that are finished, whether a signal stopped it."""
    done = read([options.record]) if options.record and options.record.exists() else {}
    device = torch.cuda.get_device_name() if options.backend == "triton" and torch.cuda.is_available() else "cpu"
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    finished: list[Batch] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for op, batch, cases in planned(ops, options.cases, options.part):
            key = (options.backend, options.seed, op, batch)
            if key in done and done[key].cases >= cases:
                finished.append(done[key])
                continue
            began = time.process_time()
            ran, worst, mismatches = soak(op, options.backend, cases, f"{options.seed} {op} {batch}")
            took = time.process_time() - began
            one = Batch(*key, ran, len(mismatches), worst, round(took, 3), device, git.stdout.strip())
            finished.append(one)
            if options.record:
                with options.record.open("a", encoding="utf-8") as record:  # one write: processes may share the file
                    record.write(json.dumps(one._asdict()) + "\n")
            for mismatch in mismatches:
                print(f"{op}: MISMATCH {mismatch}", flush=True)
            total = sum(one.cases for one in finished)
            print(
                f"{time.strftime('%H:%M:%S')} {op} batch {batch}: {ran} cases, worst {worst:.3f}, {took:.1f} s;"
                f" {total} cases so far",
                flush=True,
            )
    except KeyboardInterrupt:
        print("stopped; the batches that finished count", flush=True)
        return finished, True
    return finished, False


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    part = int(number), int(count)
    if not 1 <= part[0] <= part[1]:
        raise ValueError(text)
    return part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=["cpu", "triton", "reference", "sum"])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="records to sum")
    parser.add_argument("--cases", type=int, default=10_000, help="of all parts, in equal shares for the ops")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", type=_part, default=(1, 1), metavar="K/N", help="run the K-th of N parts")
    parser.add_argument("--only", nargs="+", choices=SOAKED, metavar="OP")
    parser.add_argument("--skip", nargs="+", choices=SOAKED, metavar="OP", default=[])
    parser.add_argument("--record", type=Path, metavar="FILE", help="append each batch to FILE, skip those it holds")
    options = parser.parse_args()
    if options.backend == "sum":
        sys.exit(report(read(options.files).values()) > 0)
    wanted = [op for op, one in SOAKED.items() if one.kernel == (options.backend != "reference")]
    ops = [op for op in wanted if op in (options.only or wanted) and op not in options.skip]
    if options.files or not ops or {*(options.only or []), *options.skip} - set(wanted):
        parser.error(f"{options.backend} takes no files, and of the ops these: {', '.join(wanted)}")
    torch.set_num_threads(1)
    if options.backend == "triton" and not torch.cuda.is_available():
        patch_triton_once()
        small_triton_blocks()
    finished, stopped = run_batches(options, ops)
    mismatches = report(finished)
    sys.exit(1 if mismatches else 130 if stopped else 0)


if __name__ == "__main__":
    main()
