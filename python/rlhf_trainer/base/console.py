"""Lines for the user."""

from __future__ import annotations

import functools
import sys

from rlhf_trainer.base.distributed import rank_and_world_size
from rlhf_trainer.base.errors import printable


def say(message: str) -> None:
    """A line for the user; of several ranks the first one speaks."""
    if rank_and_world_size()[0] == 0:
        print(printable(message), file=sys.stderr, flush=True)


@functools.cache
def say_once(message: str) -> None:
    """`say` what need not be said again in this process."""
    say(message)
