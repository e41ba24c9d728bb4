"""The ops as other libraries offer them on a CPU, where those are installed: name with version -> function."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

PACKAGES = ("trl", "verl", "torchrl")


def installed() -> dict[str, str]:
    """Package -> name with version."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return found


def logprobs_and_entropy() -> dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """(logits [N, V], labels [N]) -> logprobs, entropy, each [N]."""
    names, functions = installed(), {}
    if "trl" in names:
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax

        functions[names["trl"]] = lambda x, y: (selective_log_softmax(x, y), entropy_from_logits(x))
    if "verl" in names:
        from verl.utils import torch_functional as verl

        functions[names["verl"]] = lambda x, y: (verl.logprobs_from_logits(x, y), verl.entropy_from_logits(x))
    return functions


def policy_loss() -> dict[str, Callable[..., Tensor]]:
    """(logprobs, old_logprobs, advantages, mask), all [B, T] -> token-mean loss at a clip of 0.2."""
    if "verl" not in installed():
        return {}
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
    from verl.workers.config import ActorConfig

    config = ActorConfig(strategy="fsdp", clip_ratio=0.2, rollout_n=1, use_dynamic_bsz=True)

    def verl(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return compute_policy_loss_vanilla(old_logprobs, logprobs, advantages, mask, config=config)[0]

    return {installed()["verl"]: verl}


def gae(gamma: float, lam: float) -> dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """(rewards, values, mask), all [B, T] -> advantages, returns. torchrl knows no mask: it is applied afterwards."""
    names, functions = installed(), {}
    if "torchrl" in names:
        from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

        def torchrl(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            rewards, values = rewards * mask, values * mask
            following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
            done = torch.zeros_like(rewards, dtype=torch.bool)
            columns = (x.unsqueeze(-1) for x in (values, following, rewards, done, done))
            advantages, returns = vec_generalized_advantage_estimate(gamma, lam, *columns)
            return advantages[..., 0] * mask, returns[..., 0] * mask

        functions[names["torchrl"]] = torchrl
    return functions
