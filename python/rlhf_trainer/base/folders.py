"""What lies in a model's folder, looked at before any library reads it: nothing that runs code, nothing damaged."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rlhf_trainer.base.errors import UserError

# Files of weights that are read with pickle, which runs whatever they say; by the end of their names.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
WEIGHTS = ("model", "pytorch_model", "adapter_model", "tf_model", "flax_model")  # how their names begin
BASE_RECORD = "base_model.json"  # beside an adapter: the sum of the base's files
HUB_SECONDS = 10.0


def checked_folder(path: str | Path, what: str, trust_remote_code: bool = False) -> str:
    """The place of a model: a folder whose files are sound, or a name that the hub knows or has given before.

    Raises:
        UserError: no such place; weights that only pickle reads; a damaged file; a config that reaches beyond.
    """
    if not os.path.isdir(path):
        _check_hub_name(str(path), what)
        return str(path)
    folder = Path(path)
    for name in ("config.json", "adapter_config.json", "tokenizer_config.json", "generation_config.json"):
        record = read_object(folder / name)
        if name == "config.json":
            _check_config(folder / name, record, trust_remote_code)
    for index in folder.glob("*.safetensors.index.json"):
        parts = read_object(index).get("weight_map")
        names = parts.values() if isinstance(parts, dict) else [None]
        wrong = next((each for each in names if not isinstance(each, str) or Path(each).name != each), None)
        if wrong is not None or not isinstance(parts, dict):
            raise UserError(f"{index}: names {wrong!r} as a file; only files beside it may be named")
    sound = [file for file in folder.glob("*.safetensors") if file.is_file()]
    for file in sound:
        check_safetensors(file)
    pickled = sorted(
        file.name for file in folder.iterdir() if file.name.startswith(WEIGHTS) and file.name.endswith(PICKLES)
    )
    if pickled and not sound:
        raise UserError(
            f"{folder / pickled[0]}: its format runs code when it is read, and is refused; convert it to safetensors "
            "(in transformers: save_pretrained of the loaded model) where you trust it"
        )
    return str(path)


def read_object(file: Path) -> dict[str, Any]:
    """The object of a JSON file, {} where there is none. UserError where it is something else."""
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(record, dict):
        raise UserError(f"{file}: expected a JSON object, got {type(record).__name__}")
    return record


def _check_config(file: Path, record: dict[str, Any], trust_remote_code: bool) -> None:
    names = record.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{file}: architectures is {names!r}, expected a list of names")
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        kernel = json.dumps(record.get(key))  # may be an object with one for each part of the model
        if "/" in kernel and not trust_remote_code:
            raise UserError(f"{file}: {key} {kernel} would fetch code to run; --trust_remote_code allows it")


def check_safetensors(file: Path) -> None:
    """UserError if a file is cut short or is no safetensors at all; only its header is read."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{file}: damaged, or no safetensors file: {' '.join(str(error).split())[:200]}") from None


def read_tensors(file: Path) -> dict[str, Tensor]:
    check_safetensors(file)
    return load_file(file)


def _check_hub_name(path: str, what: str) -> None:
    """UserError unless it may be a model of the hub, and either lies in the hub's cache or is there now."""
    parent, _, name = path.rpartition("/")
    near = difflib.get_close_matches(name, os.listdir(parent or ".") if os.path.isdir(parent or ".") else [], n=1)
    meant = f"; did you mean {os.path.join(parent, near[0])}?" if near else ""
    local = path.startswith((".", "/", "~")) or path.count("/") > 1 or os.path.exists(path) or "\0" in path
    if local or (parent and os.path.isdir(parent)):
        raise UserError(f"{path}: no such {what} folder{meant}")
    from huggingface_hub import model_info, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        if any(isinstance(try_to_load_from_cache(path, f), str) for f in ("config.json", "tokenizer_config.json")):
            return
        model_info(path, timeout=HUB_SECONDS)
    except GatedRepoError:  # loading says what to do
        return
    except (HFValidationError, RepositoryNotFoundError):
        raise UserError(f"{path}: no such {what} folder, and no model of that name on the hub{meant}") from None
    except Exception as error:  # offline, a proxy, a server's fault: of every kind of HTTP library
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: no such {what} folder, and the hub cannot be asked ({reason}){meant}") from None


# An adapter's base


def write_base_record(adapter: Path, base: str) -> None:
    """Keep with an adapter which base it was trained on, if that is a folder."""
    digest = base_digest(base)
    if digest is not None:
        (adapter / BASE_RECORD).write_text(json.dumps({"sha256": digest}) + "\n", encoding="utf-8")


def check_base(adapter: str | Path, base: str) -> None:
    """UserError if an adapter was trained on another base than lies there now, though it may be of the same shape."""
    kept, digest = read_object(Path(adapter) / BASE_RECORD).get("sha256"), base_digest(base)
    if kept is not None and digest is not None and kept != digest:
        raise UserError(
            f"{adapter}: it was trained on another base than lies in {base} now; name the right one in its "
            f"adapter_config.json (base_model_name_or_path), or delete {BASE_RECORD} beside it to use it all the same"
        )


def base_digest(folder: str) -> str | None:
    """SHA-256 over the weights' files of a folder, whatever they are loaded as; None of a hub name."""
    files = sorted(Path(folder).glob("*.safetensors")) if os.path.isdir(folder) else []
    files = [file for file in files if file.name.startswith(WEIGHTS)]  # a value head beside them is none of the base's
    states = [(file, file.stat()) for file in files]
    return _digest(tuple((str(f), s.st_size, s.st_mtime_ns, s.st_ino) for f, s in states)) if files else None


@functools.lru_cache(maxsize=16)
def _digest(files: tuple[tuple[str, int, int, int], ...]) -> str:
    total = hashlib.sha256()
    for name, *_ in files:
        with open(name, "rb") as file:
            while block := file.read(1 << 22):
                total.update(block)
    return total.hexdigest()
