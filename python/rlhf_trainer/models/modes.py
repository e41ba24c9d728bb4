"""The mode that a model is trained in: nothing in it is random but LoRA's dropout, where the user asked for that."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def train_mode(model: nn.Module, *, lora_dropout: bool = True) -> None:
    """Evaluation mode, but LoRA's dropout and gradient checkpointing are at work.

    So whatever a model does at random while training is off, whatever it is called: dropout, a router's jitter, layers
    left out. The losses compare several forward passes of the same weights.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.train(lora_dropout)
        elif isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True  # its own flag alone: what lies in it stays in evaluation mode
