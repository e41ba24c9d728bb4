"""The pipeline of RLHF on rlhf_kernels' ops: SFT, reward model, PPO, evaluation. `rlhf --help` is its command line.

From Python: `from rlhf_trainer import PPOConfig, train_ppo`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_trainer.ppo import PPOConfig, PPOResult, train_ppo

__all__ = ["PPOConfig", "PPOResult", "train_ppo"]


def __getattr__(name: str) -> Any:
    """The loop is imported on first use: transformers takes seconds, which `rlhf --help` need not wait for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rlhf_trainer import ppo

    return getattr(ppo, name)
