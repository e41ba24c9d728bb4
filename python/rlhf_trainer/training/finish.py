"""The end of a training stage: what was trained is saved, and the model given back in the dtype it came in."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.models import adapters, precision
from rlhf_trainer.models.loading import save_folder


def finish(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    output_dir: str,
    dtype: str,
    merge: bool,
    **files: Any,
) -> None:
    """Merge the adapter if asked to, write output_dir (see `save_folder`; "": nothing), undo what `precision` did.

    An adapter is saved before memory is taken for float32; a base is merged and saved with no bit rounded away.
    """
    if merge or not adapters.has_adapter(model):
        precision.restore(model, dtype)
    if merge:
        adapters.merge(model)
    if output_dir:
        save_folder(output_dir, model, tokenizer, **files)
    precision.restore(model, dtype)
    precision.narrow(model)
