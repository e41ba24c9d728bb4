"""The end of a training stage: what was trained is saved, and the model given back in float32."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.models import adapters, precision
from rlhf_trainer.models.loading import save_folder


def finish(cfg: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **files: Any) -> None:
    """Merge the adapter if cfg.merge, write cfg.output_dir (see `save_folder`; "": nothing), undo `precision.halve`.

    An adapter is saved before memory is taken for float32; a base is merged and saved with no bit rounded away.
    """
    if cfg.merge or not adapters.has_adapter(model):
        precision.restore(model, cfg.dtype)
    if cfg.merge:
        adapters.merge(model)
    if cfg.output_dir:
        save_folder(cfg.output_dir, model, tokenizer, **files)
    precision.restore(model, cfg.dtype)
