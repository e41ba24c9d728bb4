"""Triton kernels: NVIDIA and AMD GPUs, and any CPU through Triton's interpreter (TRITON_INTERPRET=1)."""

from rlhf_kernels.backends.triton.full_kl import full_kl_bwd, full_kl_fwd
from rlhf_kernels.backends.triton.linear import allocate, linear_fold, linear_gradient, product_dtype
from rlhf_kernels.backends.triton.logits import selected_logprobs_bwd, selected_logprobs_fwd
from rlhf_kernels.backends.triton.losses import policy_loss, value_loss
from rlhf_kernels.backends.triton.sampling import sample_tokens
from rlhf_kernels.backends.triton.scan import gae, gae_packed, ppo_advantages
from rlhf_kernels.backends.triton.tokens import per_token_kl_bwd, per_token_kl_fwd, shaped_rewards
from rlhf_kernels.backends.triton.whiten import whiten_bwd, whiten_fwd, whiten_moments

__all__ = [
    "allocate",
    "full_kl_bwd",
    "full_kl_fwd",
    "gae",
    "gae_packed",
    "linear_fold",
    "linear_gradient",
    "per_token_kl_bwd",
    "per_token_kl_fwd",
    "policy_loss",
    "ppo_advantages",
    "product_dtype",
    "sample_tokens",
    "selected_logprobs_bwd",
    "selected_logprobs_fwd",
    "shaped_rewards",
    "value_loss",
    "whiten_bwd",
    "whiten_fwd",
    "whiten_moments",
]
