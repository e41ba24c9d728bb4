"""Models and tokenizers as ordinary Hugging Face folders: load, save; scores."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from rlhf_trainer.base.console import say_once
from rlhf_trainer.base.distributed import distributed_context
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.base.folders import checked_folder
from rlhf_trainer.base.jsons import dumps
from rlhf_trainer.models import adapters, quantised
from rlhf_trainer.models.adapters import score_head
from rlhf_trainer.models.seq2seq import first_tokens, force_eager_attention
from rlhf_trainer.models.sharding import gathered, is_sharded

# Loading and saving


def _load(loader: Any, path: str | Path, what: str, **options: Any) -> Any:
    place = checked_folder(path, what, options.get("trust_remote_code", False))
    if "config" in options:  # weights, and none that pickle reads
        options["use_safetensors"] = True
    try:
        return loader.from_pretrained(place, **options)
    except Exception as error:  # what a folder holds may trip a library anywhere
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot load a {what} from it: {type(error).__name__}: {reason[:300]}") from None


def load_tokenizer(
    path: str | Path, pad_token: str | None = None, trust_remote_code: bool = False, generates: bool = True
) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, left-padding.

    pad_token: becomes its pad token. None is needed: rows are masked by length, so that any id fills them up.
    generates: False for a BERT-like classifier's tokenizer, which is taken as it is.

    Raises:
        UserError: it cannot be loaded, or has no EOS.
    """
    tokenizer = _load(AutoTokenizer, path, "tokenizer", trust_remote_code=trust_remote_code)
    if not generates:
        return tokenizer
    if pad_token is not None:
        tokenizer.add_special_tokens({"pad_token": pad_token})
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, so that no answer could ever end")
    tokenizer.padding_side = "left"
    return tokenizer


def load_causal(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """The folder's causal or encoder-decoder LM; its embedding grows if the tokenizer gained tokens.

    An adapter folder gives the base that it names with the adapter on it, which alone is trained. `options` go to
    from_pretrained, as `quantised.load_options` makes them.

    Raises:
        UserError: there is no language model in the folder, or it cannot be loaded.
    """
    adapter = adapters.adapter_folder(path)
    base = path if adapter is None else adapter.base
    config = _load(AutoConfig, base, "model", trust_remote_code=trust_remote_code)
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
        raise UserError(f"{base}: a reward model or another classifier; a language model is needed")
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = _load(
        loader,
        base,
        "language model",
        config=config,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        **options,
    )
    model = fit_vocabulary(force_eager_attention(quantised.disable_weight_repacking(model)), tokenizer)
    if adapter is not None and adapters.attach(model, adapter):
        raise UserError(f"{path}: the adapter of a reward model; a language model is needed")
    return model


def check_vocabulary(path: str | Path, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False) -> None:
    """UserError if the model at `path` takes `tokenizer`'s ids for other tokens; new tokens on one side are none.

    A folder without a tokenizer is not judged.
    """
    try:
        own = _load(AutoTokenizer, path, "tokenizer", trust_remote_code=trust_remote_code).get_vocab()
    except UserError:
        return
    ours = tokenizer.get_vocab()
    if not (own.items() <= ours.items() or ours.items() <= own.items()):
        raise UserError(f"{path}: its vocabulary is another than the policy's, whose tokens it would misread")


@torch.no_grad()
def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
    """New tokens get the mean row, not a random one: an adapter's base grows the same way each time it is loaded.

    The config's PAD stays as it was loaded, unless the tokenizer's is new or the config of a classifier has none.
    """
    if tokenizer is not None:
        embedding: Any = model.get_input_embeddings()
        before = embedding.weight.shape[0]
        if len(tokenizer) > before:
            name = model.config.name_or_path or type(model).__name__
            say_once(f"{name}: its embedding grows from {before} to {len(tokenizer)} rows, for the tokenizer has more")
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            vars(model)[adapters.GROWN] = len(tokenizer) - before
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                for parameter in [] if layer is None else layer.parameters():
                    parameter[before:] = parameter[:before].mean(0)
            model.config.pad_token_id = tokenizer.pad_token_id
        if model.config.pad_token_id is None and score_head(model) is not None:
            model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _load_classifier(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype,
    trust_remote_code: bool,
    num_labels: int | None,
    **options: Any,
) -> PreTrainedModel:
    """A folder of a whole model as `AutoModelForSequenceClassification`."""
    config = _load(AutoConfig, path, "model", trust_remote_code=trust_remote_code)
    if num_labels is not None:
        config.num_labels = num_labels
    model, loading = _load(
        AutoModelForSequenceClassification,
        path,
        "sequence classifier",
        config=config,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        **options,
    )
    if num_labels is None and loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise UserError(f"{path}: no trained classifier ({missing} would be random); `rlhf reward` trains one")
    return fit_vocabulary(quantised.disable_weight_repacking(model), tokenizer)


def load_reward_model(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    num_labels: int | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The folder's `AutoModelForSequenceClassification`; `num_labels` puts a new head on a causal LM's backbone."""
    adapter = adapters.adapter_folder(path)
    if adapter is None:
        return _load_classifier(path, tokenizer, dtype, trust_remote_code, num_labels, **options)
    _, head = adapters.read_weights(path)
    weight = head.get("weight", head.get("out_proj.weight"))
    if weight is None and num_labels is None:
        raise UserError(f"{path}: the adapter has no `score` head, so that it is no reward model")
    labels = len(weight) if weight is not None else num_labels
    with suppress_transformers_warnings():
        model = _load_classifier(adapter.base, tokenizer, dtype, trust_remote_code, labels, **options)
    adapters.attach(model, adapter)
    own = score_head(model)
    if own is not None:
        own.requires_grad_(True)
        if head:
            own.load_state_dict(head)
    return model


def on_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model moved to the device, in evaluation mode."""
    nn.Module.to(model, device)  # transformers' own has no usable type
    model.eval()
    return model


@contextmanager
def suppress_transformers_warnings() -> Iterator[None]:
    """No warnings of transformers, such as of a missing head where one is expected to be missing."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


# What belongs to a model or its tokenizer, under the names that transformers, peft and this trainer give it.
MODEL_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors", "model*.safetensors.index.json"),
    *("pytorch_model*.bin", "pytorch_model*.bin.index.json", "tf_model.h5", "flax_model.msgpack", "adapter_*"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt"),
    *("spiece.model", "sentencepiece*.model", "source.spm", "target.spm"),
    *("value_head.safetensors", "reward_normalisation.json"),
)


def _model_files(folder: Path) -> set[str]:
    return {path.name for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()}


def save_folder(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tensors: dict[str, dict[str, Tensor]] | None = None,
    records: dict[str, dict[str, Any]] | None = None,
) -> Path:
    """Write a Hugging Face folder (plus safetensors and JSON files by name), whole or not at all.

    Of a model with an adapter only the adapter is written.

    It is written beside its place and renamed. Of a folder that stood there the files of model and tokenizer are
    replaced as a set: an adapter beside a whole model, or shards of another one, would be loaded with it. Logs and
    checkpoints in it stay. Of several ranks the first one writes.

    Raises:
        OSError: it cannot be written; a model that stood there before is still whole if writing failed.
    """
    own = None
    if adapters.has_adapter(model):
        own = gathered(adapters.saved_tensors(model))
    elif is_sharded(model):
        own = gathered(model.state_dict(keep_vars=True))
    tensors = {name: gathered(state) for name, state in (tensors or {}).items()}
    if not distributed_context().main:
        return Path(folder)
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if adapters.has_adapter(model):
            adapters.save_adapter(model, temporary, own or {})
        else:
            model.save_pretrained(temporary, state_dict=own)
        tokenizer.save_pretrained(temporary)
        for name, state in tensors.items():
            save_file(state, temporary / name)
        for name, record in (records or {}).items():
            (temporary / name).write_text(dumps(record, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            kept = {file.name for file in temporary.iterdir()}
            for file in sorted(temporary.iterdir()):
                os.replace(file, folder / file.name)
            for stale in _model_files(folder) - kept:
                (folder / stale).unlink()
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def same_weights(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    """Whether two models have the same parameters, bit by bit, rounded where b is kept in fewer."""
    first, second = dict(a.named_parameters()), dict(b.named_parameters())
    return first.keys() == second.keys() and all(
        torch.equal(first[name].to(second[name]), second[name]) for name in first
    )


def context_length(model: PreTrainedModel) -> int | None:
    """How many tokens the model's positions reach, None if it does not say."""
    config = model.config
    if getattr(config, "relative_attention_num_buckets", None):
        return None  # T5: its n_positions is what it was trained on, and no limit
    if getattr(config, "relative_attention", False) and not getattr(config, "position_biased_input", True):
        return None  # DeBERTa
    # RoBERTa and its kin count positions from padding_idx + 1 on, in a table of max_position_embeddings rows.
    tables = (module for name, module in model.named_modules() if name.endswith("embeddings.position_embeddings"))
    for table in tables:
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table.num_embeddings - table.padding_idx - 1
    forced = len(first_tokens(model)) - 1 if config.is_encoder_decoder else 0
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value - forced
    return None


# Scores
