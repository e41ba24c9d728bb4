"""The native CPU kernels (csrc/cpu): allocates outputs and passes addresses, sizes and strides."""

from rlhf_kernels import _native
from rlhf_kernels.backends.cpu.full_kl import full_kl_bwd, full_kl_fwd
from rlhf_kernels.backends.cpu.linear import allocate, linear_fold, linear_gradient, product_dtype
from rlhf_kernels.backends.cpu.logits import selected_logprobs_bwd, selected_logprobs_fwd
from rlhf_kernels.backends.cpu.losses import loss_bwd, policy_loss, value_loss
from rlhf_kernels.backends.cpu.sampling import sample_tokens
from rlhf_kernels.backends.cpu.scan import gae, gae_packed, ppo_advantages
from rlhf_kernels.backends.cpu.tokens import (
    per_token_kl_bwd,
    per_token_kl_fwd,
    shaped_rewards,
    whiten_bwd,
    whiten_fwd,
    whiten_moments,
)

__all__ = [
    "allocate",
    "describe",
    "full_kl_bwd",
    "full_kl_fwd",
    "gae",
    "gae_packed",
    "linear_fold",
    "linear_gradient",
    "loss_bwd",
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


def describe() -> str:
    """The instruction set in use and those that this machine could run."""
    return f"{_native.isa()} of {', '.join(_native.available_isas())}"
