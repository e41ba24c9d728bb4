"""The options of `rlhf ppo`."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_trainer.base import shared
from rlhf_trainer.base.config import option
from rlhf_trainer.models import adapters

FULL_LR = 1e-5


@dataclass
class PPOConfig:
    model: str = option("", "folder (or hub name) of the policy to start from, usually the SFT model")
    ref_model: str | None = shared.ref_model()
    reward: str = shared.reward("")
    reward_label: str | None = shared.reward_label()
    reward_timeout: float | None = shared.reward_timeout()
    reward_workers: int = shared.reward_workers()
    reward_completion_only: bool = option(False, "show the reward models the completion without its prompt")
    gold_reward: str | None = option(
        None, "a second reward that is only watched: falling while the first rises is over-fitting; see stop_gold"
    )
    gold_label: str | None = option(None, "class whose logit is the gold reward, such as a toxicity model's `nothate`")
    prompts: str = shared.prompts()
    output_dir: str = option("", "folder for the aligned policy, metrics.jsonl, TensorBoard and checkpoints")
    updates: int = option(100, "number of rollout-and-update iterations, at most")
    batch_size: int = option(64, "responses per rollout")
    group_size: int = option(1, "responses to each prompt of a rollout; grpo and rloo compare them")
    minibatches: int = option(2, "optimizer steps per epoch over the rollout")
    rollout_batch_size: int | None = option(
        None, "responses sampled at once, prompts of similar length together; none: all of the batch"
    )
    gather_for_rollout: bool = option(
        True, "under FSDP 2 every rank gathers the whole policy for a rollout; false: layer by layer, slower"
    )
    micro_batch_size: int | None = option(None, "sequences per forward pass; changes memory, never the result")
    epochs: int = option(4, "passes over each rollout")
    max_new_tokens: int = shared.max_new_tokens()
    temperature: float = option(1.0, "sampling temperature; all logprobs divide the logits by it")
    stop_token: str | None = shared.stop_token()
    rollout_engine: str = option("hf", "what samples: `hf`, the policy itself, or `vllm` on the same GPU (extra vllm)")
    vllm_memory: float = option(0.3, "share of the GPU's memory that vLLM may take")
    missing_eos_penalty: float | None = option(None, "reward units for a response that never ended")
    missing_eos: str = option(
        "subtract", "what the penalty does: `subtract` it from the score, or `replace` the score by -it"
    )
    lr: float | None = shared.lr(FULL_LR)  # of Adam, decayed linearly to 0
    value_lr: float | None = option(
        None, "learning rate of the value head, decayed as lr; none: 0.3 / the width of the states that it reads"
    )
    adam_eps: float = option(1e-5, "Adam's epsilon")
    max_grad_norm: float = shared.max_grad_norm()
    kl_coef: float = option(0.05, "beta, the weight of the KL penalty in the reward")
    kl_estimator: str = option("k1", "estimator of the penalty; only k1 has the right gradient inside the reward")
    kl_target: float | None = option(None, "nats per response to steer beta to (adaptive KL); none: beta is fixed")
    kl_horizon: int = option(10000, "episodes over which an adaptive beta reacts")
    advantage: str = option(
        "gae", "`gae` with a value head; `grpo`, `rloo`, `mean`: reward and KL of a response against its group's"
    )
    gamma: float = option(1.0, "discount of gae")
    lam: float = option(0.95, "lambda of gae")
    clip: float = option(0.2, "PPO's clip range of the ratio")
    value_clip: float = option(0.2, "clip range of the value")
    vf_coef: float = option(0.1, "weight of the value loss")
    entropy_coef: float = option(0.0, "weight of the entropy bonus")
    whiten_advantages: bool = option(True, "gae's advantages to mean 0 and variance 1 over the counted tokens")
    whiten_rewards: bool = option(False, "token rewards to variance 1, mean kept")
    score_clip: float | None = option(None, "bound on |score|")
    target_kl: float | None = option(None, "stop an update's epochs once approx_kl of a minibatch exceeds this")
    stop_reward: float | None = option(
        None, "stop training once the mean score over 5 updates surely reaches this (95 %)"
    )
    stop_gold: float | None = option(None, "stop training once the mean gold reward over 5 updates surely reaches this")
    stop_kl: float | None = option(None, "stop training once KL to the reference exceeds this many nats per response")
    report_to: list[str] = shared.report_to()
    alert: list[str] = shared.alert()
    stop_on_alert: bool = shared.stop_on_alert()
    save_every: int = option(25, "updates between checkpoints; 0: none")
    keep_checkpoints: int = shared.keep_checkpoints()
    resume: bool = shared.resume()
    accept_changes: list[str] = shared.accept_changes()
    lora_r: int = shared.lora_r()
    lora_alpha: int = shared.lora_alpha()
    lora_targets: list[str] = shared.lora_targets()
    value_adapter: bool = option(False, "a LoRA adapter of the value's own; false: its head reads the policy's states")
    load_in_4bit: bool = shared.load_in_4bit()
    merge: bool = shared.merge()
    seed: int = option(0, "seed of sampling, permutations and the value head")
    device: str = shared.device()
    dtype: str = shared.dtype()
    gradient_checkpointing: bool = shared.gradient_checkpointing()
    overwrite: bool = shared.overwrite()
    pad_token: str | None = shared.pad_token()
    trust_remote_code: bool = shared.trust_remote_code()

    @property
    def lora(self) -> adapters.LoraOptions:
        return adapters.LoraOptions(self.lora_r, self.lora_alpha, self.lora_targets)
