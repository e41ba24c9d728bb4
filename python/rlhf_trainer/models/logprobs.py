"""The next-token loss on completions, straight from the hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_kernels import linear_logprobs
from rlhf_trainer.data.rows import TokenizedExample, left_pad
from rlhf_trainer.models.forward import head_inputs
from rlhf_trainer.models.seq2seq import is_encoder_decoder
from rlhf_trainer.models.sharding import fsdp_forward


@fsdp_forward
def completion_losses(model: PreTrainedModel, rows: Sequence[TokenizedExample], pad_id: int) -> Tensor:
    """[M] float32: -log p of each row's completion tokens, EOS included, summed; prompt and padding do not count.

    A completion that nothing precedes (empty prompt, no BOS) counts from its second token.
    """
    device = next(model.parameters()).device
    lay_out = _prompts_then_completions if is_encoder_decoder(model) else _texts
    ids, mask, start, counted = lay_out(rows, pad_id)
    inputs = head_inputs(model, ids.to(device), mask.to(device), start)
    return -linear_logprobs(**inputs, mask=counted.to(device)).sum(-1)


def _texts(rows: Sequence[TokenizedExample], pad_id: int) -> tuple[Tensor, Tensor, int, Tensor]:
    """ids, mask [M, L], start, and which of the tokens from there on count [M, L - start], for a causal model."""
    ids, mask = left_pad([row.ids for row in rows], pad_id)
    counted = torch.zeros_like(mask)
    for i, row in enumerate(rows):
        counted[i, ids.shape[1] - len(row.ids) + max(row.prompt_length, 1) :] = True
    return ids, mask, 1, counted[:, 1:]


def _prompts_then_completions(rows: Sequence[TokenizedExample], pad_id: int) -> tuple[Tensor, Tensor, int, Tensor]:
    """The same for an encoder-decoder model: prompts padded on the left, completions on the right."""
    prompts, prompt_mask = left_pad([row.ids[: row.prompt_length] for row in rows], pad_id)
    turned, mask = left_pad([row.ids[row.prompt_length :][::-1] for row in rows], pad_id)
    mask = mask.flip(1)
    counted = mask.clone()
    counted[:, 0] = torch.tensor([row.prompt_length > 0 for row in rows])
    return torch.cat([prompts, turned.flip(1)], 1), torch.cat([prompt_mask, mask], 1), prompts.shape[1], counted
