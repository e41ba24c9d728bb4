"""What samples is what is trained: logprobs of sampled tokens with the cache, against the training forward."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_kernels import linear_logprobs
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.rows import TokenizedExample, left_pad
from rlhf_trainer.models.checks import differ, two_lengths
from rlhf_trainer.models.decoding import decoder_for
from rlhf_trainer.models.forward import head_inputs
from rlhf_trainer.models.sharding import is_sharded

STEPS = 6  # tokens of each row
_AGREED: WeakSet[PreTrainedModel] = WeakSet()


@torch.no_grad()
def check_rollout(model: PreTrainedModel, prompts: Sequence[list[int]], pad_id: int, max_new_tokens: int) -> None:
    """UserError if the model samples from another distribution than its training forward has; once for each model.

    Two prompts as one left-padded batch, with the cache, whose rows change places half-way; then each row alone,
    without padding and cache. Not of a model in shards, whose ranks would have to go together.
    """
    if model in _AGREED or is_sharded(model):
        return
    rows = [row.ids for row in two_lengths([TokenizedExample(ids, len(ids)) for ids in prompts])]
    ids, sampled = _sample_with_cache(model, rows, pad_id, min(max_new_tokens, STEPS))
    new = sampled.shape[1]
    trained = torch.stack(
        [_training_logprobs(model, ids[i, -len(row) - new :], len(row)) for i, row in enumerate(rows)]
    )
    if not bool((sampled.isfinite() & trained.isfinite()).all()):
        return  # the rollout itself names the prompt
    if differ(model, sampled, trained):
        raise UserError(
            f"{type(model).__name__}: the logprobs of sampled tokens differ from the training forward's by up to "
            f"{(sampled - trained).abs().max().item():.3g} nats; this architecture's cache, its attention mask or "
            "its attention over later tokens does not let it sample from what is trained"
        )
    _AGREED.add(model)


def _sample_with_cache(model: PreTrainedModel, rows: list[list[int]], pad_id: int, steps: int) -> tuple[Tensor, Tensor]:
    """(ids [B, P + T], logprobs [B, T] of the sampled tokens); one that is not finite is the last."""
    device = next(model.parameters()).device
    ids, mask = (x.to(device) for x in left_pad(rows, pad_id))
    turned = torch.arange(len(rows) - 1, -1, -1, device=device)
    decoder, found = decoder_for(model, ids, mask), []
    generator = torch.Generator().manual_seed(0)  # its own: the run's numbers are the run's
    for step in range(steps):
        logprobs = decoder.next_logits(ids, mask).float().log_softmax(-1)
        bad = logprobs.isnan().any(-1, keepdim=True)
        token = torch.multinomial(logprobs.exp().masked_fill(bad, 1.0).cpu(), 1, generator=generator).to(device)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token, dtype=torch.bool)], 1)
        found.append(logprobs.gather(1, token))
        if step == steps // 2:
            decoder.select_rows(turned)
            ids, mask, found = ids[turned], mask[turned], [x[turned] for x in found]
        if bool(bad.any()):
            break
    return (ids[turned], torch.cat(found, 1)[turned]) if len(found) > steps // 2 else (ids, torch.cat(found, 1))


def _training_logprobs(model: PreTrainedModel, ids: Tensor, start: int) -> Tensor:
    """[T] logprobs of the tokens ids[start:], as the losses compute them."""
    row = ids[None]
    return linear_logprobs(**head_inputs(model, row, torch.ones_like(row, dtype=torch.bool), start))[0]
