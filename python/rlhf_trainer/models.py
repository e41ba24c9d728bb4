"""Models and tokenizers as ordinary Hugging Face folders: load, save; scores."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
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

from rlhf_trainer import adapters, precision, quantised
from rlhf_trainer.config import say_once
from rlhf_trainer.distributed import current, launched
from rlhf_trainer.errors import UserError
from rlhf_trainer.forward import hidden_states
from rlhf_trainer.rows import encode_row, left_pad
from rlhf_trainer.seq2seq import is_encoder_decoder, sequence_states, settle_attention
from rlhf_trainer.sharding import gathered, is_sharded

NORMALISATION = "reward_normalisation.json"  # {"mean": float, "std": float} beside a reward model


def resolve_device(device: str) -> torch.device:
    """ "auto" is CUDA if there is a GPU, else the CPU; of several processes each has a GPU of its own."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if name == "cuda" and launched()[1] > 1 and torch.cuda.is_available():
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no CUDA GPU here; use --device cpu or auto")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {device}: not a device; use auto, cpu or cuda") from None


# Loading and saving


def _folder(path: str | Path, what: str) -> str:
    hub_name = str(path).count("/") <= 1 and not str(path).startswith((".", "/"))
    if os.path.isdir(path) or (hub_name and not os.path.exists(path)):
        return str(path)
    raise UserError(f"{path}: no such {what} folder")


def _load(loader: Any, path: str | Path, what: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(_folder(path, what), **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:  # RuntimeError: shapes that do not fit
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot load a {what} from it: {reason[:300]}") from None


def load_tokenizer(
    path: str | Path, pad_token: str | None = None, trust_remote_code: bool = False, generates: bool = True
) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, left-padding. UserError unless it has a pad token other than EOS (see `pad_token`).

    `generates=False` (a BERT-like classifier's) is taken as it is.
    """
    tokenizer = _load(AutoTokenizer, path, "tokenizer", trust_remote_code=trust_remote_code)
    if not generates:
        return tokenizer
    if pad_token is not None:
        tokenizer.add_special_tokens({"pad_token": pad_token})
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, so that no answer could ever end")
    if tokenizer.pad_token_id is None:
        raise UserError(f"{path}: the tokenizer has no pad token; pass --pad_token '<pad>' to add one")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"{path}: the tokenizer pads with its EOS token {tokenizer.eos_token!r}, which would hide where answers "
            f"end; pass --pad_token '<pad>' to add one"
        )
    tokenizer.padding_side = "left"
    return tokenizer


def _without_dropout(config: Any) -> Any:
    """Every dropout probability set to 0: PPO's ratios compare two forward passes of the same weights."""
    for key, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(config, key, 0.0)
    return config


def load_causal(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """The folder's causal or encoder-decoder LM without dropout; its embedding grows if the tokenizer gained tokens.

    An adapter folder gives the base that it names with the adapter on it, which alone is trained. `options` go to
    from_pretrained, as `quantised.load_options` makes them.
    """
    adapter = adapters.config_of(path)
    if adapter is not None:
        model = load_causal(adapters.base_of(path, adapter), tokenizer, dtype, trust_remote_code, **options)
        if adapters.attach(model, path):
            raise UserError(f"{path}: the adapter of a reward model; a language model is needed")
        return model
    config = _load(AutoConfig, path, "model", trust_remote_code=trust_remote_code)
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
        raise UserError(f"{path}: a reward model or another classifier; a language model is needed")
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = _load(
        loader,
        path,
        "language model",
        config=_without_dropout(config),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        **options,
    )
    return fit_vocabulary(settle_attention(quantised.settle(model)), tokenizer)


def check_vocabulary(path: str | Path, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False) -> None:
    """UserError if the model at `path` takes `tokenizer`'s ids for other tokens; new tokens on one side are none.

    A folder without a tokenizer is not judged.
    """
    try:
        own = AutoTokenizer.from_pretrained(_folder(path, "model"), trust_remote_code=trust_remote_code).get_vocab()
    except (OSError, ValueError, KeyError):
        return
    ours = tokenizer.get_vocab()
    if not (own.items() <= ours.items() or ours.items() <= own.items()):
        raise UserError(f"{path}: its vocabulary is another than the policy's, whose tokens it would misread")


@torch.no_grad()
def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
    """New tokens get the mean row, not a random one: an adapter's base grows the same way each time it is loaded."""
    if tokenizer is not None:
        before = model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > before:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                for parameter in [] if layer is None else layer.parameters():
                    parameter[before:] = parameter[:before].mean(0)
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def load_reward_model(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    num_labels: int | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The folder's `AutoModelForSequenceClassification`; `num_labels` puts a new head on a causal LM's backbone."""
    adapter = adapters.config_of(path)
    if adapter is not None:
        return _load_reward_adapter(
            path, adapters.base_of(path, adapter), tokenizer, dtype, trust_remote_code, num_labels, **options
        )
    config = _without_dropout(_load(AutoConfig, path, "model", trust_remote_code=trust_remote_code))
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
    return fit_vocabulary(quantised.settle(model), tokenizer)


def _load_reward_adapter(
    path: str | Path,
    base: str,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype,
    trust_remote_code: bool,
    num_labels: int | None,
    **options: Any,
) -> PreTrainedModel:
    _, head = adapters.read_weights(path)
    weight = head.get("weight", head.get("out_proj.weight"))
    if weight is None and num_labels is None:
        raise UserError(f"{path}: the adapter has no `score` head, so that it is no reward model")
    labels = len(weight) if weight is not None else num_labels
    with quiet():
        model = load_reward_model(base, tokenizer, dtype, trust_remote_code, labels, **options)
    adapters.attach(model, path)
    own = score_head(model)
    if own is not None:
        own.requires_grad_(True)
        if head:
            own.load_state_dict(head)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of transformers, such as of a missing head where one is expected to be missing."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def save_folder(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tensors: dict[str, dict[str, Tensor]] | None = None,
    records: dict[str, dict[str, Any]] | None = None,
) -> Path:
    """Write a Hugging Face folder (plus safetensors and JSON files by name), whole or not at all.

    Of a model with an adapter only the adapter is written.

    It is written beside its place and renamed; a folder that stood there is replaced file by file, so that logs and
    checkpoints in it stay. Of several ranks the first one writes.
    """
    own = None
    if adapters.has_adapter(model):
        own = gathered(adapters.saved_tensors(model))
    elif is_sharded(model):
        own = gathered(model.state_dict(keep_vars=True))
    tensors = {name: gathered(state) for name, state in (tensors or {}).items()}
    if not current().main:
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
            (temporary / name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            for file in sorted(temporary.iterdir()):
                os.replace(file, folder / file.name)
            if not adapters.has_adapter(model):  # an earlier run's would come first in loading
                for name in (adapters.CONFIG, adapters.WEIGHTS):
                    (folder / name).unlink(missing_ok=True)
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
    if getattr(model.config, "relative_attention_num_buckets", None):
        return None  # T5: its n_positions is what it was trained on, and no limit
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(model.config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


# Scores


def score_head(model: nn.Module) -> nn.Module | None:
    """The head that reads a decoder's state at the last token; None of a classifier that pools in its own way."""
    return next((getattr(model, name) for name in adapters.HEADS if hasattr(model, name)), None)


def last_token_scores(model: PreTrainedModel, ids: Tensor, mask: Tensor, head: nn.Module | None = None) -> Tensor:
    """ids, mask [B, L] -> the classifier's outputs [B, num_labels] at each row's last real token by the mask.

    `head` in place of the model's own. An encoder-decoder model has the whole row in its encoder and again, one later,
    in its decoder, as its own classifier does.

    Not the model's own pooling, which looks for the pad id and errs where PAD is EOS.
    """
    if is_encoder_decoder(model):
        hidden, last = sequence_states(model, ids, mask), mask.sum(-1) - 1
    else:
        hidden, last = hidden_states(model, ids, mask), mask.long().cumsum(-1).argmax(-1)
    head = score_head(model) if head is None else head
    states = hidden[torch.arange(len(ids), device=ids.device), last]
    with precision.full(ids.device):
        return head(states.to(next(head.parameters()).dtype)).float()


def load_normalisation(folder: str | Path) -> tuple[float, float]:
    """(mean, std) of the raw scores on reference samples; (0, 1) where the folder says nothing."""
    file = Path(folder) / NORMALISATION
    if not file.is_file():
        return 0.0, 1.0
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return float(record["mean"]), float(record["std"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: expected {{'mean': number, 'std': number}}: {error}") from None


def _say_cut(model: PreTrainedModel, limit: int) -> None:
    name = model.config.name_or_path or type(model).__name__
    say_once(f"{name}: texts beyond its {limit} tokens are scored without their beginning")


@torch.no_grad()
def classifier_outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    batch_size: int = 64,
    head: nn.Linear | None = None,
) -> Tensor:
    """Raw outputs [M, num_labels] float32 on the CPU of a sequence classifier for prompt + completion.

    With `head` the model is any decoder, whose states it reads.
    Decoder backbones score at the last real token, EOS appended; others (BERT-like) pool in their own way. Of a text
    longer than the context the beginning is left out, as in training, and said to be.
    """
    device, limit = next(model.parameters()).device, context_length(model) or sys.maxsize
    outputs = torch.empty(len(prompts), model.config.num_labels if head is None else head.out_features)
    if head is None and score_head(model) is None:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        limit = min(limit, tokenizer.model_max_length)
        tokenizer.truncation_side = "left"
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            encoded = tokenizer(batch, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(device)
            if encoded["input_ids"].shape[1] >= limit:
                _say_cut(model, limit)
            outputs[start : start + batch_size] = model(**encoded).logits.float().cpu()
        return outputs
    encoded_rows = [encode_row(tokenizer, *texts, limit) for texts in zip(prompts, completions, strict=True)]
    if any(cut for _, cut in encoded_rows):
        _say_cut(model, limit)
    rows = [row.ids for row, _ in encoded_rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # similar lengths together: little padding
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = left_pad([rows[i] for i in chosen], tokenizer.pad_token_id)
        outputs[chosen] = last_token_scores(model, ids.to(device), mask.to(device), head).cpu()
    return outputs


def score_sequences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    label: int = 0,
    batch_size: int = 64,
    head: nn.Linear | None = None,
) -> Tensor:
    """Raw scores [M] float32 on the CPU: output `label` of `classifier_outputs`."""
    outputs = classifier_outputs(model, tokenizer, prompts, completions, batch_size=batch_size, head=head)
    return outputs[:, label]
