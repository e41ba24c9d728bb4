"""The pipeline of RLHF on rlhf_kernels' ops: SFT, reward model, DPO, PPO, evaluation; `rlhf --help`.

Every command is a function too, `train_sft(SFTConfig(...))`: a config, and objects in place of what it would load.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_trainer.bon import BonConfig, BonResult, best_of_n
    from rlhf_trainer.cai_label import CAILabelConfig, CAILabelResult, label_answers
    from rlhf_trainer.cai_revise import CAIReviseConfig, CAIReviseResult, revise_answers
    from rlhf_trainer.constitution import Constitution, Rule, load_constitution
    from rlhf_trainer.data import Example, Pair
    from rlhf_trainer.dpo import DPOConfig, DPOResult, train_dpo
    from rlhf_trainer.errors import InvariantError, UserError
    from rlhf_trainer.eval import EvalConfig, EvalResult, evaluate
    from rlhf_trainer.generate import GenerateConfig, GenerateResult, generate_completions
    from rlhf_trainer.init import InitConfig, InitResult, init_model
    from rlhf_trainer.judges import load_judge
    from rlhf_trainer.label import LabelConfig, label_server
    from rlhf_trainer.ppo import PPOConfig, PPOResult, train_ppo
    from rlhf_trainer.prefs import PrefsConfig, PrefsResult, make_pairs
    from rlhf_trainer.reward import RewardConfig, RewardResult, train_reward
    from rlhf_trainer.rewards import load_reward
    from rlhf_trainer.sft import SFTConfig, SFTResult, train_sft

MODULES = {
    "bon": ("BonConfig", "BonResult", "best_of_n"),
    "cai_label": ("CAILabelConfig", "CAILabelResult", "label_answers"),
    "cai_revise": ("CAIReviseConfig", "CAIReviseResult", "revise_answers"),
    "constitution": ("Constitution", "Rule", "load_constitution"),
    "data": ("Example", "Pair"),
    "dpo": ("DPOConfig", "DPOResult", "train_dpo"),
    "errors": ("InvariantError", "UserError"),
    "eval": ("EvalConfig", "EvalResult", "evaluate"),
    "generate": ("GenerateConfig", "GenerateResult", "generate_completions"),
    "init": ("InitConfig", "InitResult", "init_model"),
    "judges": ("load_judge",),
    "label": ("LabelConfig", "label_server"),
    "ppo": ("PPOConfig", "PPOResult", "train_ppo"),
    "prefs": ("PrefsConfig", "PrefsResult", "make_pairs"),
    "reward": ("RewardConfig", "RewardResult", "train_reward"),
    "rewards": ("load_reward",),
    "sft": ("SFTConfig", "SFTResult", "train_sft"),
}
MODULE_OF = {name: module for module, names in MODULES.items() for name in names}
__all__ = [
    "BonConfig",
    "BonResult",
    "CAILabelConfig",
    "CAILabelResult",
    "CAIReviseConfig",
    "CAIReviseResult",
    "Constitution",
    "DPOConfig",
    "DPOResult",
    "EvalConfig",
    "EvalResult",
    "Example",
    "GenerateConfig",
    "GenerateResult",
    "InitConfig",
    "InitResult",
    "InvariantError",
    "LabelConfig",
    "PPOConfig",
    "PPOResult",
    "Pair",
    "PrefsConfig",
    "PrefsResult",
    "RewardConfig",
    "RewardResult",
    "Rule",
    "SFTConfig",
    "SFTResult",
    "UserError",
    "best_of_n",
    "evaluate",
    "generate_completions",
    "init_model",
    "label_answers",
    "label_server",
    "load_constitution",
    "load_judge",
    "load_reward",
    "make_pairs",
    "revise_answers",
    "train_dpo",
    "train_ppo",
    "train_reward",
    "train_sft",
]


def __getattr__(name: str) -> Any:
    """A stage is imported on first use: transformers takes seconds, which `rlhf --help` need not wait for."""
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"rlhf_trainer.{MODULE_OF[name]}"), name)
