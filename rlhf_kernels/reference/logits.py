"""logprob of the chosen token, and entropy: z = logits / T, logp = z[label] - logsumexp(z), H = -sum(p log p)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.reference.common import row_sum, upcast


def selected_logprobs(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """logits [..., V], labels, mask (bool or None) and temperature [...] -> logprobs and entropy [...].

    A bad label makes its whole row NaN, gradient too.
    """
    x = upcast(logits)
    bad = (labels < 0) | (labels >= x.shape[-1])
    if mask is not None:
        x = torch.where(mask.unsqueeze(-1), x, 0.0)
        bad = bad & mask
    divisor = temperature * torch.where(bad, float("nan"), 1.0).to(x.dtype)
    # The maximum first, then the division: at logits of 1e4 a rounded quotient would cost 5e-4 nats.
    z = (x - x.detach().amax(-1, keepdim=True)) / divisor.unsqueeze(-1)
    # Row scalars are combined with row scalars only: spread over V, they would bring a torch.sum into the backward.
    e = z.exp()
    s = row_sum(e)
    log_s = s.log()
    safe_labels = labels.clamp(0, x.shape[-1] - 1).long()
    logprobs = z.gather(-1, safe_labels.unsqueeze(-1)).squeeze(-1) - log_s
    if mask is not None:
        logprobs = torch.where(mask, logprobs, 0.0)
    if not with_entropy:
        return logprobs, None
    # 0 * -inf: a token of probability 0 adds nothing to the entropy and gets no gradient from it.
    entropy = log_s - row_sum(e * z.masked_fill(z == float("-inf"), 0.0)) / s
    return logprobs, entropy if mask is None else torch.where(mask, entropy, 0.0)
