"""Options that several stages share, each with its text and default written once; a stage says where they stand.

`device: str = shared.device()` in a stage's dataclass is one `config.option`. Where the stages' defaults differ, each
gives its own: `lr: float | None = shared.lr(1e-4)`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from rlhf_trainer.base.config import option

# The model, and the machine
device = partial(option, "auto", "auto, cpu or cuda")
pad_token = partial(option, None, "pad token to give the tokenizer; none is needed, for rows are masked by length")
trust_remote_code = partial(option, False, "run code that comes with the model folder")
ref_model = partial(option, None, "folder of the frozen reference; none: the policy as it is at the start")
dtype = partial(option, "float32", "float32, or bfloat16: mixed precision, what is trained stays in float32")
gradient_checkpointing = partial(
    option,
    False,
    "compute a layer's activations again in the backward pass: less memory, a third more time, same result",
)

# Adapters
lora_r = partial(option, 0, "rank of LoRA adapters on the frozen model; 0: every weight is trained")
lora_alpha = partial(option, 16, "LoRA's scale is lora_alpha / lora_r")
lora_targets = partial(option, [], "modules that get LoRA, or all-linear; none: peft's choice for the architecture")
load_in_4bit = partial(
    option, False, "keep the frozen base in 4 bits (QLoRA; needs bitsandbytes): an adapter is trained on it"
)
merge = partial(option, False, "add the adapter into the weights and save a whole model, not the adapter")

# Prompts, responses and their reward
prompts = partial(
    option,
    "",
    "file of prompts: one a line (.txt), or records with `prompt`, `messages` or `instruction` (JSON lines, a table)",
)
bootstrap = partial(option, 2000, "resamples of the prompts behind each 95 % interval")
n = partial(option, help="completions per prompt")
max_new_tokens = partial(option, 32, "longest response in tokens")
stop_token = partial(option, None, "a token that ends a response as EOS does, such as a newline")
reward = partial(option, help="reward model or classifier folder, or file.py:function, or package.module:function")
reward_label = partial(option, None, "class whose logit is the reward, for a classifier of several classes")
reward_timeout = partial(option, None, "seconds that a reward function may take for a batch; none: any time")
reward_workers = partial(option, 1, "parts of a batch for which a reward function is called at once, in threads")
reward_completion_only = partial(option, False, "show the reward model the completion without its prompt")

# Training
LORA_TIMES = 10  # an adapter's best rate over that of all weights (Schulman et al. 2025, "LoRA Without Regret")
heldout_pairs = partial(option, 0.1, "held out of --data: a share below 1, or a number of pairs; 0: nothing")


def lr(full: float) -> Any:
    """The learning rate, whose default `training.rates` chooses; full: the one for training every weight."""
    return option(None, f"peak learning rate; none: {full:g}, or with LoRA {LORA_TIMES * full:g}")


max_grad_norm = partial(option, 1.0, "gradients are scaled down to this norm")
report_to = partial(
    option,
    ["tensorboard"],
    "where metrics, completions and alerts go besides metrics.jsonl: tensorboard, wandb, trackio; or none",
)
alert = partial(
    option,
    [],
    "warn once a metric crosses a bound, as in 'objective/kl>20' or 'change in val/response_length>50'; any number",
)
stop_on_alert = partial(option, False, "stop training, and save the model, once an --alert is given")
keep_checkpoints = partial(option, 2, "how many checkpoints to keep")
resume = partial(option, False, "go on from the newest valid checkpoint in output_dir")
accept_changes = partial(
    option,
    [],
    "with --resume: what may have changed since the checkpoint, by the names that the refusal gives, such as data",
)
overwrite = partial(option, False, "discard the checkpoints of an earlier run in output_dir")
