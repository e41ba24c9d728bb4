"""The pipeline of RLHF on rlhf_kernels' ops: SFT, reward model, DPO, PPO, evaluation; `rlhf --help`.

Every command is a function too, `train_sft(SFTConfig(...))`: a config, and objects in place of what it would load.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_trainer.base.errors import InvariantError, UserError
    from rlhf_trainer.bon import BonConfig, BonResult, best_of_n
    from rlhf_trainer.constitutional.constitution import Constitution, load_constitution
    from rlhf_trainer.constitutional.label import CAILabelConfig, CAILabelResult, label_answers
    from rlhf_trainer.constitutional.revise import CAIReviseConfig, CAIReviseResult, revise_answers
    from rlhf_trainer.data.files import write_jsonl
    from rlhf_trainer.data.records import Example, Pair
    from rlhf_trainer.dpo import DPOConfig, DPOResult, train_dpo
    from rlhf_trainer.eval import EvalConfig, EvalResult, evaluate
    from rlhf_trainer.generate import GenerateConfig, GenerateResult, generate_completions
    from rlhf_trainer.init import InitConfig, InitResult, init_model
    from rlhf_trainer.judging.judges import load_judge
    from rlhf_trainer.judging.rewards import load_reward
    from rlhf_trainer.judging.shots import Rule
    from rlhf_trainer.label import LabelConfig, label_server
    from rlhf_trainer.models.loading import load_causal, load_tokenizer, save_folder
    from rlhf_trainer.onpolicy.config import PPOConfig
    from rlhf_trainer.ppo import PPOResult, train_ppo
    from rlhf_trainer.prefs import PrefsConfig, PrefsResult, make_pairs
    from rlhf_trainer.reward import RewardConfig, RewardResult, train_reward
    from rlhf_trainer.sft import SFTConfig, SFTResult, train_sft
    from rlhf_trainer.training.runlog import read_metrics

MODULES = {
    "base.errors": ("InvariantError", "UserError"),
    "bon": ("BonConfig", "BonResult", "best_of_n"),
    "constitutional.constitution": ("Constitution", "load_constitution"),
    "constitutional.label": ("CAILabelConfig", "CAILabelResult", "label_answers"),
    "constitutional.revise": ("CAIReviseConfig", "CAIReviseResult", "revise_answers"),
    "data.files": ("write_jsonl",),
    "data.records": ("Example", "Pair"),
    "dpo": ("DPOConfig", "DPOResult", "train_dpo"),
    "eval": ("EvalConfig", "EvalResult", "evaluate"),
    "generate": ("GenerateConfig", "GenerateResult", "generate_completions"),
    "init": ("InitConfig", "InitResult", "init_model"),
    "judging.judges": ("load_judge",),
    "judging.rewards": ("load_reward",),
    "judging.shots": ("Rule",),
    "label": ("LabelConfig", "label_server"),
    "models.loading": ("load_causal", "load_tokenizer", "save_folder"),
    "onpolicy.config": ("PPOConfig",),
    "ppo": ("PPOResult", "train_ppo"),
    "prefs": ("PrefsConfig", "PrefsResult", "make_pairs"),
    "reward": ("RewardConfig", "RewardResult", "train_reward"),
    "sft": ("SFTConfig", "SFTResult", "train_sft"),
    "training.runlog": ("read_metrics",),
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
    "load_causal",
    "load_constitution",
    "load_judge",
    "load_reward",
    "load_tokenizer",
    "make_pairs",
    "read_metrics",
    "revise_answers",
    "save_folder",
    "train_dpo",
    "train_ppo",
    "train_reward",
    "train_sft",
    "write_jsonl",
]


def __getattr__(name: str) -> Any:
    """A stage is imported on first use: transformers takes seconds, which `rlhf --help` need not wait for."""
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"rlhf_trainer.{MODULE_OF[name]}"), name)
