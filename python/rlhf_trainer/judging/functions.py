"""A user's function as a reward: called in parts, with a time limit, awaited; its answer made numbers; its source."""

from __future__ import annotations

import ast
import asyncio
import functools
import inspect
import math
import sys
import sysconfig
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.models.fingerprint import Part, sha256

OURS = Path(__file__).parents[1]
RewardFunction = Callable[[list[str], list[str]], Sequence[float]]


def scores_of(
    reward: RewardFunction, prompts: list[str], completions: list[str], what: str = "reward", first: int = 0
) -> torch.Tensor:
    """Call a reward function, plain or async; the scores [B] float32.

    first: the number of the first completion, for the message.

    Raises:
        UserError: it raises, calls sys.exit, returns the wrong count, or something that is no finite number.
    """
    try:
        returned: Any = reward(list(prompts), list(completions))  # copies: the function may do with them what it likes
        if inspect.isawaitable(returned):
            returned = asyncio.run_coroutine_threadsafe(_result_of(returned), _event_loop()).result()
        if isinstance(returned, (str, bytes, Mapping, set, frozenset)) or not isinstance(returned, Iterable):
            kind = type(returned).__name__
            raise UserError(f"the {what} function returned {kind}, expected a list of numbers, one per completion")
        listed = list(islice(returned, len(prompts) + 1))  # of an iterator, which may have no end
    except (UserError, KeyboardInterrupt):
        raise
    except SystemExit as error:
        raise UserError(f"the {what} function called sys.exit({error.code!r}); nothing was trained on it") from error
    except BaseException as error:  # the user's code may raise anything, asyncio.CancelledError too
        raise UserError(f"the {what} function raised {type(error).__name__}: {error}") from error
    if len(listed) != len(prompts):
        count = len(returned) if isinstance(returned, Sized) else f"{len(listed)} or more"
        raise UserError(f"the {what} function returned {count} scores for {len(prompts)} completions")
    scores = []
    for index, (score, prompt, completion) in enumerate(zip(listed, prompts, completions, strict=True), start=first):
        where = f"for completion {index}: prompt {prompt[:60]!r}, completion {completion[:60]!r}"
        scores.append(_number(score, f"the {what} function returned", where))
    return torch.tensor(scores, dtype=torch.float32)


async def _result_of(awaitable: Any) -> Any:
    return await awaitable


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for the whole process, in a thread: what an async reward keeps, a client say, belongs to its loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def _number(score: Any, who: str, where: str) -> float:
    """A score as a float that float32 holds."""
    if isinstance(score, (str, bytes)):
        raise UserError(f"{who} the text {score[:40]!r}, expected a list of numbers, {where}")
    try:
        number = float(score)
    except OverflowError:
        raise UserError(f"{who} a number beyond what a float holds {where}") from None
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        raise UserError(f"{who} {type(score).__name__} for a score, expected a list of numbers, {where}") from None
    if not math.isfinite(number):
        raise UserError(f"{who} {number} {where}")
    if abs(number) > torch.finfo(torch.float32).max:
        raise UserError(f"{who} {number:g}, beyond what float32 holds, {where}")
    return number


class LimitedFunction:
    """A reward function that is called for `workers` parts of a batch at once, and waited for `timeout` seconds.

    A call that takes longer goes on in its thread, which ends with the process: Python cannot stop it.
    """

    def __init__(self, function: RewardFunction, timeout: float | None, workers: int, what: str = "reward") -> None:
        self.function, self.timeout, self.workers, self.what = function, timeout, workers, what

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        size = max(1, -(-len(prompts) // self.workers))
        shares = [slice(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]
        answers: list[Any] = [None] * len(shares)
        done = [threading.Event() for _ in shares]

        def work(index: int, share: slice) -> None:
            try:
                parts = prompts[share], completions[share]
                answers[index] = scores_of(self.function, *parts, self.what, share.start).tolist()
            except BaseException as error:
                answers[index] = error
            finally:
                done[index].set()

        end = None if self.timeout is None else time.monotonic() + self.timeout
        for index, share in enumerate(shares):
            threading.Thread(target=work, args=(index, share), daemon=True).start()
        for index, share in enumerate(shares):
            if not done[index].wait(None if end is None else max(0.0, end - time.monotonic())):
                raise UserError(
                    f"the {self.what} function has not answered within {self.timeout:g} s for completions "
                    f"{share.start} to {share.stop - 1} of the batch, the first to prompt "
                    f"{prompts[share.start][:60]!r}; --reward_timeout sets the limit"
                )
            if isinstance(answers[index], BaseException):
                raise answers[index]
        return [score for answer in answers for score in answer]


def limited(function: RewardFunction, timeout: float | None, workers: int, what: str = "reward") -> RewardFunction:
    """The function itself where it may take any time and is called once a batch."""
    if timeout is not None and not timeout > 0:
        raise UserError(f"--reward_timeout {timeout:g}: must be more than 0")
    if workers < 1:
        raise UserError(f"--reward_workers {workers}: must be at least 1")
    plain = timeout is None and workers == 1
    return function if plain else LimitedFunction(function, timeout, workers, what)


# Fingerprints


def reward_part(reward: Any) -> Part:
    """A model's fingerprint, or a function's: its source without comments, its modules', and the plain values it holds.

    An object with a method `fingerprint() -> {aspect: text}` says it itself.
    """
    reward = getattr(reward, "function", reward) if isinstance(reward, LimitedFunction) else reward
    own = getattr(reward, "fingerprint", None) or getattr(getattr(reward, "__self__", None), "fingerprint", None)
    if callable(own):
        return {str(aspect): str(value) for aspect, value in own().items()}
    partial = isinstance(reward, functools.partial)
    function = inspect.unwrap(reward.func if partial else reward)
    bound = [reward.args, sorted(reward.keywords.items())] if partial else []
    if not inspect.isroutine(function) and not inspect.isclass(function):  # an object that can be called
        bound, function = [*bound, vars(function) if hasattr(function, "__dict__") else {}], type(function)
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _filled(cell)]
    values = [*bound, *held, getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None)]
    return {"source": sha256(_sources(function)), "values": sha256([_plain(value) for value in values])}


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that is not bound yet
        return False


def _plain(value: Any) -> Any:
    """A value as JSON; of what is no plain value its type, of a function its source."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return _sources(value) if inspect.isfunction(value) else type(value).__name__


def _sources(function: Any) -> list[str]:
    """A function's file and the user's other files that it uses; in a script its own lines alone."""
    names = getattr(function, "__globals__", None) or vars(sys.modules.get(getattr(function, "__module__", "")) or ast)
    if names["__name__"] == "__main__" or not _is_users(names):
        return [_source(function)]
    return [_parsed(Path(each["__file__"]).read_text(encoding="utf-8")) for each in _users_files(names)]


def _users_files(names: dict[str, Any]) -> list[dict[str, Any]]:
    """The namespaces of a module and of those it uses, if they are the user's own."""
    found: dict[str, dict[str, Any]] = {}
    queue = [names]
    while queue:
        one = queue.pop()
        if not _is_users(one) or one["__file__"] in found:
            continue
        found[one["__file__"]] = one
        for value in one.values():
            module = value if isinstance(value, ModuleType) else sys.modules.get(str(getattr(value, "__module__", "")))
            queue += [] if module is None else [vars(module)]
    return [found[file] for file in sorted(found)]


def _is_users(names: Mapping[str, Any]) -> bool:
    """Whether a module's namespace is of a source file, neither Python's, nor an installed package's, nor ours."""
    file = Path(str(names.get("__file__") or ""))
    places = {sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib")} | {str(OURS)}
    installed = {"site-packages", "dist-packages"} & set(file.parts) or any(map(file.is_relative_to, places))
    return file.suffix == ".py" and not installed


def _source(what: Any) -> str:
    try:
        return _parsed(textwrap.dedent(inspect.getsource(what)))
    except (OSError, TypeError):  # typed into a prompt, or written in C
        code = getattr(what, "__code__", None)
        return repr(what) if code is None else repr([code.co_code, code.co_names, code.co_consts])


def _parsed(source: str) -> str:
    """As Python understands it: without comments and layout."""
    try:
        return ast.unparse(ast.parse(source))
    except SyntaxError:  # of a lambda in the middle of a call
        return source
