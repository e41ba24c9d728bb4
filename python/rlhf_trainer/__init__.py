"""The pipeline of RLHF on rlhf_kernels' ops: SFT, reward model, DPO, PPO, evaluation; `rlhf --help`.

From Python: `from rlhf_trainer import PPOConfig, train_ppo`, or `DPOConfig, train_dpo`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_trainer.bon import BonConfig, BonResult, best_of_n
    from rlhf_trainer.dpo import DPOConfig, DPOResult, train_dpo
    from rlhf_trainer.ppo import PPOConfig, PPOResult, train_ppo
    from rlhf_trainer.reward import RewardConfig, RewardResult, train_reward

STAGE_OF = {
    "BonConfig": "bon",
    "BonResult": "bon",
    "best_of_n": "bon",
    "DPOConfig": "dpo",
    "DPOResult": "dpo",
    "train_dpo": "dpo",
    "PPOConfig": "ppo",
    "PPOResult": "ppo",
    "train_ppo": "ppo",
    "RewardConfig": "reward",
    "RewardResult": "reward",
    "train_reward": "reward",
}
__all__ = [
    "BonConfig",
    "BonResult",
    "DPOConfig",
    "DPOResult",
    "PPOConfig",
    "PPOResult",
    "RewardConfig",
    "RewardResult",
    "best_of_n",
    "train_dpo",
    "train_ppo",
    "train_reward",
]


def __getattr__(name: str) -> Any:
    """The loop is imported on first use: transformers takes seconds, which `rlhf --help` need not wait for."""
    if name not in STAGE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"rlhf_trainer.{STAGE_OF[name]}"), name)
