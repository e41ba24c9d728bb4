"""An error on one rank stops all of them, and each one raises that error.

A rank that waits in a collective would wait for ever for one that has stopped. So the rank that fails writes its
message to the store through which the ranks found each other, and leaves the process group. With gloo that ends the
others' waiting. With NCCL it does not: each rank also looks for a message once a second, and ends its process
if need be.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from rlhf_trainer.base.errors import UserError

ERROR, GONE = "rlhf/error", "rlhf/gone"
PATIENCE = 10.0  # seconds that a rank waits for the others to read its message
GRACE = 5.0  # seconds that a rank has to end by itself after another's message


@contextmanager
def propagate_errors(rank: int, world: int) -> Iterator[None]:
    """Within the block an error of any rank is raised in all of them; nobody leaves it before the others.

    Raises:
        UserError: with "rank N: " and the message of the rank that failed first, where that was another one.
    """
    if world == 1:
        yield
        return
    # A connection of its own: the process group blocks in the other one.
    default: Any = dist.distributed_c10d._get_default_store()
    store = default.clone()
    done = threading.Event()
    threading.Thread(target=_watch, args=(store.clone(), rank, done), daemon=True).start()
    try:
        yield
        dist.barrier()
    except Exception as error:
        failure = _report_error(store, rank, world, error)
        done.set()
        if failure is error:
            raise
        raise failure from None
    finally:
        done.set()


def _report_error(store: dist.Store, rank: int, world: int, error: Exception) -> Exception:
    """Write the error to the store, unless another rank wrote first; returns what this rank raises."""
    first, text = json.loads(store.compare_set(ERROR, "", json.dumps([rank, _text(error)])))
    dist.destroy_process_group()  # wakes those who wait for this rank
    store.set(f"{GONE}/{rank}", "1")
    # The launcher ends every process when one has left: rank 0 must have spoken first. It may be the store's host too.
    others = [f"{GONE}/{other}" for other in (range(1, world) if rank == 0 else [0])]
    heard = _wait(store, others)
    failure = error if first == rank else UserError(f"rank {first}: {text}")
    if rank > 0 and heard:
        time.sleep(0.5)
        failure.told_by_rank_0 = True  # type: ignore[attr-defined]
    return failure


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _wait(store: dist.Store, keys: list[str]) -> bool:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if store.check(keys):
                return True
        except RuntimeError:  # the store's host has left: so has rank 0, or what started it
            return True
        time.sleep(0.05)
    return False


def _watch(store: dist.Store, rank: int, done: threading.Event) -> None:
    while not done.wait(1.0):
        try:
            if not store.check([ERROR]):
                continue
            first, text = json.loads(store.get(ERROR))
        except RuntimeError:  # the store's host is gone; so will be this process
            return
        if first == rank or done.wait(GRACE):
            return
        print(f"rlhf: error: rank {first}: {text}", file=sys.stderr, flush=True)
        with suppress(RuntimeError):  # the store's host may have left meanwhile
            store.set(f"{GONE}/{rank}", "1")
        os._exit(2)
