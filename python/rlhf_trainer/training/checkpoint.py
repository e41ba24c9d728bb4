"""Checkpoints that survive a kill at any moment: written aside, fsynced, renamed; safetensors and JSON only."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from rlhf_trainer.base.console import say
from rlhf_trainer.base.distributed import distributed_context, rank_and_world_size
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.base.jsons import dumps
from rlhf_trainer.models.fingerprint import Part, model_part, trained_part
from rlhf_trainer.models.sharding import gathered, shard_like
from rlhf_trainer.training.changes import refuse_changes
from rlhf_trainer.training.history import History, read_history, restore_metrics
from rlhf_trainer.training.runlog import read_metrics

NAME = re.compile(r"^step-\d{8}$")
# Options that may change between a run and its resumption: none of them changes the numbers, or a fingerprint says of
# the content that they name whether it has changed.
MAY_CHANGE_ON_RESUME = {
    "accept_changes",
    "alert",
    "data",
    "eval_data",
    "gold_reward",
    "model",
    "prompts",
    "ref_model",
    "reference_data",
    "reward",
    "reward_timeout",
    "reward_workers",
    "gather_for_rollout",
    "gradient_checkpointing",
    "resume",
    "overwrite",
    "save_every",
    "keep_checkpoints",
    "output_dir",
    "report_to",
    "stop_on_alert",
    "device",
}


class StopRequest:
    """True once a signal has come. saves: whether the run has a folder, and so a checkpoint to go on from."""

    def __init__(self, saves: bool) -> None:
        self.saves, self.code = saves, 0

    def __bool__(self) -> bool:
        return self.code != 0

    def exit(self, step: int) -> SystemExit:
        """What the loop raises after `step`; it may be another rank's signal."""
        if self.saves:
            say(f"stopped after step {step}; --resume goes on from its checkpoint")
        return SystemExit(self.code or TERMINATED)


TERMINATED = 128 + signal.SIGTERM  # exit code, as shells give it
HEARD, AGAIN = b"\nCtrl-C: stopping after this step, with a checkpoint", b"; once more stops at once"


@contextmanager
def stop_on_signals(saves: bool) -> Iterator[StopRequest]:
    """Within the block SIGTERM, SIGHUP, and Ctrl-C if the run `saves`, only raise the flag.

    The loop saves at its next boundary and exits with the flag's code. A second signal ends the run at once, whatever
    hangs: Ctrl-C interrupts, and once it was swallowed ends the process as the others do.
    """
    flag = StopRequest(saves)
    if threading.current_thread() is not threading.main_thread():
        yield flag  # signals reach the main thread alone
        return
    # Of what a shell runs in the background Ctrl-C is ignored, of what nohup runs SIGHUP.
    asked = (signal.SIGTERM, signal.SIGHUP, *((signal.SIGINT,) if saves else ()))
    previous = {each: signal.getsignal(each) for each in asked if signal.getsignal(each) is not signal.SIG_IGN}

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    def heed(number: int, _: Any) -> None:
        flag.code = 128 + number
        rank, world = rank_and_world_size()
        if world == 1:  # of several, the launcher passes on what the terminal has sent to all of them already
            for each in previous:
                signal.signal(each, interrupt if each == signal.SIGINT else signal.SIG_DFL)
        if rank == 0 and number == signal.SIGINT:
            # Not through sys.stderr, in the middle of whose own write this may come.
            os.write(2, HEARD + AGAIN * (world == 1) + b"\n")

    for each in previous:
        signal.signal(each, heed)
    try:
        yield flag
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


class Resumed(NamedTuple):
    """Where a run goes on."""

    step: int  # steps done
    extra: dict[str, float]  # numbers of the stage's own
    history: History  # metrics of the steps done; `save` keeps it, with what was appended


class Checkpoints:
    """The checkpoints of one run, in output_dir/checkpoints/step-XXXXXXXX.

    Args:
        options: the stage's, by name; output_dir ("": no checkpoints), resume, overwrite and keep_checkpoints are used.
        modules: what is trained, by name. optimizer, scheduler: torch's. generator: the one that all sampling uses.
        inputs: fingerprints of what else the run depends on, by name; called only where there are checkpoints.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        scheduler: LambdaLR,
        generator: torch.Generator,
        inputs: Callable[[], Mapping[str, Part]] = dict,
    ) -> None:
        self.options, self.modules, self.optimizer, self.scheduler = options, modules, optimizer, scheduler
        self.output_dir: str = options["output_dir"]
        self.generator = generator
        self.history = History()
        self.stopped: str | None = None  # after `resume`: why the run had stopped, and is only to be finished
        self.folder = Path(self.output_dir) / "checkpoints"
        self.identity: dict[str, Any] = {"config": _config_values(options), "inputs": {}}
        if self.output_dir:
            parts = {name.replace("policy", "model"): model_part(module) for name, module in modules.items()}
            self.identity["inputs"] = parts | dict(inputs())

    def resume(self, extra: Mapping[str, float] = MappingProxyType({})) -> Resumed:
        """From the newest valid checkpoint if asked to resume, else from step 0 with the stage's own `extra` state."""
        if not self.output_dir:
            return Resumed(0, dict(extra), self.history)
        if not self.options["resume"]:
            refuse_leftovers(self.output_dir, resume=False, overwrite=self.options["overwrite"])
            distributed_context().barrier()  # every rank has looked
            if distributed_context().main:
                if read_metrics(self.output_dir):
                    say(f"{self.output_dir}: what an earlier run left there, metrics and model, is replaced")
                shutil.rmtree(self.folder, ignore_errors=True)
            return Resumed(0, dict(extra), self.history)
        newest = distributed_context().broadcast_object(self._newest() if distributed_context().main else None)
        if newest is not None:
            return self._restore(newest, extra)
        say(f"{self.folder}: no checkpoint to resume from; starting at step 0")
        return Resumed(0, dict(extra), self.history)

    def _newest(self) -> Path | None:
        for path in reversed(self.all()):
            reason = why_invalid(path)
            if reason is None:
                return path
            say(f"{path}: skipped, {reason}")
        return None

    def all(self) -> list[Path]:
        """The checkpoint folders, oldest first; anything else that lies there, links included, is passed over."""
        return _checkpoints_in(self.folder)

    def save(self, step: int, *, stopped: str | None = None, **extra: float) -> Path:
        """Write a checkpoint, then delete the oldest beyond keep_checkpoints.

        stopped: why the run ends at this step. extra: numbers of the stage's own that `resume` gives back.

        Every rank calls it: what is spread over them is gathered, and the first one writes.
        """
        ranks, final = distributed_context(), self.folder / f"step-{step:08d}"
        temporary = self.folder / f".step-{step:08d}.tmp"
        generators = ranks.all_gather_object(_rng())
        state = {"step": step, **extra, "identity": self.identity, "scheduler": self.scheduler.state_dict()}
        state["stopped"] = None if stopped is None else [stopped, _alerting(self.options)]
        try:
            if ranks.main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            for name, tensors in self._files(generators):
                if ranks.main:
                    save_file(tensors, temporary / f"{name}.safetensors")
            if ranks.main:
                state |= {"rng": [{name: rng[name] for name in ("python", "numpy")} for rng in generators]}
                (temporary / "metrics.json").write_text(dumps(list(self.history)), encoding="utf-8")
                (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
                commit(temporary, final)
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own way
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f"{final}: cannot write the checkpoint: {error}; earlier ones are kept") from None
        if ranks.main:
            for old in self.all()[: -max(1, self.options["keep_checkpoints"])]:
                shutil.rmtree(old)
        ranks.barrier()
        return final

    def _files(self, generators: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Each safetensors file of a checkpoint, one at a time in memory."""
        for name, module in self.modules.items():
            yield name, gathered(trained_part(module))
        yield "optimizer", gathered(self._optimizer_tensors())
        states = {f"{name}.{rank}": x for rank, rng in enumerate(generators) for name, x in rng["torch"].items()}
        yield "rng", states | {"generator": self.generator.get_state().cpu()}

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for index, entry in self.optimizer.state_dict()["state"].items():
            for key, value in entry.items():
                tensors[f"{index}.{key}"] = torch.as_tensor(value)
        return tensors

    def _restore(self, path: Path, extra: Mapping[str, float]) -> Resumed:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        harmless = MAY_CHANGE_ON_RESUME - self.identity["inputs"].keys()
        accepted = set(self.options["accept_changes"]) - harmless
        refuse_changes(state["identity"], self.identity, accepted, path)
        for name, module in self.modules.items():
            load_parameters(module, load_file(path / f"{name}.safetensors"), path / f"{name}.safetensors")
        restored: dict[int, dict[str, Tensor]] = {}
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for key, tensor in load_file(path / "optimizer.safetensors").items():
            index, _, name = key.partition(".")
            restored.setdefault(int(index), {})[name] = shard_like(tensor, parameters[int(index)])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": restored, "param_groups": groups})
        self._restore_schedule(state["scheduler"])
        tensors = load_file(path / "rng.safetensors")
        self.generator.set_state(tensors["generator"])
        ranks, others = distributed_context(), len(state["rng"])
        rank = ranks.rank if ranks.rank < others else 0
        own = {name.partition(".")[0]: x for name, x in tensors.items() if name.partition(".")[2] == str(rank)}
        _set_rng(state["rng"][rank] | {"torch": own})
        if ranks.world != others:
            say(f"{path}: was made by {others} processes; {ranks.world} go on with it, equal up to rounding")
        step = state["step"]
        self.history = read_history(path / "metrics.json")
        if ranks.main:
            restore_metrics(self.output_dir, self.history)
        say(f"resumed from {path} after step {step}")
        if state.get("stopped") and state["stopped"][1] == _alerting(self.options):
            self.stopped = state["stopped"][0]
            say(f"the run had stopped there: {self.stopped}")
        return Resumed(step, {name: state[name] for name in extra}, self.history)

    def _restore_schedule(self, state: dict[str, Any]) -> None:
        """Go on where the schedule stood, with the peak and the length that the options give now."""
        peaks = self.scheduler.base_lrs
        self.scheduler.load_state_dict(state)
        self.scheduler.base_lrs = peaks
        step, factors = self.scheduler.last_epoch, self.scheduler.lr_lambdas
        self.scheduler._last_lr = [peak * factor(step) for peak, factor in zip(peaks, factors, strict=True)]
        for group, lr in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = lr


def refuse_leftovers(output_dir: str, *, resume: bool, overwrite: bool) -> None:
    """UserError if a new run would discard the checkpoints of an earlier one without being told to."""
    folder = Path(output_dir) / "checkpoints"
    if not resume and not overwrite and _checkpoints_in(folder):
        raise UserError(
            f"{folder} holds checkpoints of an earlier run; --resume goes on from them, --overwrite "
            "discards them, or choose another --output_dir"
        )


def _checkpoints_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if NAME.match(p.name) and p.is_dir() and not p.is_symlink())


def why_invalid(path: Path) -> str | None:
    """Why a checkpoint cannot be used, None if every file has the SHA-256 that meta.json says."""
    try:
        digests = json.loads((path / "meta.json").read_text(encoding="utf-8"))["sha256"]
        missing = sorted({"state.json", "metrics.json", "optimizer.safetensors", "rng.safetensors"} - digests.keys())
        if missing:
            return f"incomplete (no sum of {missing[0]})"
        for name, digest in digests.items():
            if Path(name).name != name or _digest((path / name).read_bytes()) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"incomplete ({error})"
    return None


def load_parameters(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """UserError naming `source` where the module's trained weights are not these."""
    own = module.state_dict()
    expected = {name: tensor.shape for name, tensor in trained_part(module).items()}
    if expected != {name: tensor.shape for name, tensor in tensors.items()}:
        raise UserError(f"{source}: does not fit the model, whose trained weights are others; cannot resume")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(shard_like(tensor, own[name]))


def _config_values(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in MAY_CHANGE_ON_RESUME}


def _alerting(options: Mapping[str, Any]) -> list[Any]:
    """The options that stop a run. If they have changed, --resume goes on with a run that had stopped."""
    return [list(options["alert"]), options["stop_on_alert"]]


def _rng() -> dict[str, Any]:
    """The states of this process's global generators: dropout draws from them, and a reward function may."""
    state: Any = np.random.get_state()  # noqa: NPY002
    name, keys, *rest = state
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    torchs = {"torch": torch.get_rng_state()} | {f"cuda{index}": state for index, state in enumerate(cuda)}
    return {"torch": torchs, "python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"]["torch"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda{index}" in state["torch"]:  # the checkpoint may come from a machine with fewer GPUs
            torch.cuda.set_rng_state(state["torch"][f"cuda{index}"], index)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002


def commit(temporary: Path, final: Path) -> None:
    """Add the sums of the files, bring everything to the disk, and give the folder its name."""
    digests = {p.name: _digest(p.read_bytes()) for p in sorted(temporary.iterdir())}
    (temporary / "meta.json").write_text(json.dumps({"sha256": digests}, indent=2), encoding="utf-8")
    for path in [*temporary.iterdir(), temporary]:
        _fsync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    _fsync(final.parent)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
