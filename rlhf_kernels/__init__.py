"""Fused ops for the hot paths of RLHF. Every op states its formula, shapes, dtypes and errors in its docstring."""

from importlib.metadata import PackageNotFoundError, version

from rlhf_kernels.dispatch import record_dispatch, use_backend
from rlhf_kernels.heads import head_of
from rlhf_kernels.info import info
from rlhf_kernels.ops.full_kl import Direction, full_kl
from rlhf_kernels.ops.linear.dpo import linear_dpo_loss
from rlhf_kernels.ops.linear.kl import linear_kl
from rlhf_kernels.ops.linear.logprobs import linear_logprobs
from rlhf_kernels.ops.linear.losses import linear_cross_entropy, linear_policy_loss
from rlhf_kernels.ops.logits import selected_logprobs
from rlhf_kernels.ops.losses import Aggregate, Ratio, policy_loss, value_loss
from rlhf_kernels.ops.preference import dpo_loss, group_advantages, pairwise_loss
from rlhf_kernels.ops.sampling import sample_tokens
from rlhf_kernels.ops.scan import Masked, gae, ppo_advantages
from rlhf_kernels.ops.tokens import Estimator, per_token_kl, shaped_rewards, whiten

try:
    __version__ = version("rlhf-kernels")
except PackageNotFoundError:  # run from a source tree that nobody installed
    __version__ = "0+source"

__all__ = [
    "Aggregate",
    "Direction",
    "Estimator",
    "Masked",
    "Ratio",
    "dpo_loss",
    "full_kl",
    "gae",
    "group_advantages",
    "head_of",
    "info",
    "linear_cross_entropy",
    "linear_dpo_loss",
    "linear_kl",
    "linear_logprobs",
    "linear_policy_loss",
    "pairwise_loss",
    "per_token_kl",
    "policy_loss",
    "ppo_advantages",
    "record_dispatch",
    "sample_tokens",
    "selected_logprobs",
    "shaped_rewards",
    "use_backend",
    "value_loss",
    "whiten",
]
