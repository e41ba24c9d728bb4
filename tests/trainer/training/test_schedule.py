"""Learning rates of the supervised stages, and what decays."""

from __future__ import annotations

import pytest
import torch
from support.tiny import tiny_folder
from transformers import get_scheduler

from rlhf_trainer.models.loading import load_causal
from rlhf_trainer.training.supervised import SCHEDULES, decay_groups, lr_factor


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_first_step_of_a_warm_up_counts_and_the_rest_is_transformers_own(schedule):
    rates = [lr_factor(step, schedule=schedule, warmup=4, total=20) for step in range(20)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=4, num_training_steps=20).lr_lambdas[0]
    assert rates[4:] == pytest.approx([theirs(step) for step in range(4, 20)])
    assert lr_factor(0, schedule=schedule, warmup=0, total=1) == 1


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_norms_and_biases_do_not_decay(arch, tmp_path):
    model = load_causal(tiny_folder(tmp_path / "m", arch))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, others = decay_groups(list(model.parameters()), 0.1)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    kept = {names[id(parameter)] for parameter in others["params"]}
    assert kept == {name for name in names.values() if "norm" in name or "ln_" in name or name.endswith("bias")}
    assert len(kept) + len(decaying["params"]) == len(names)
    assert [group["weight_decay"] for group in decay_groups(list(model.parameters()), 0.0)] == [0.0]
