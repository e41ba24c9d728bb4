"""The value head: it starts at 0, is blind to the size of the states, and learns at a rate of its own."""

from __future__ import annotations

import pytest
import torch

from rlhf_trainer import PPOConfig, ppo, train_ppo
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.onpolicy.value_head import ValueHead
from rlhf_trainer.worlds.exact import PROMPTS, make_model, make_tokenizer, oracle

TOKENIZER = make_tokenizer()


def fortunate(prompts, completions):
    """A score that the prompt decides, so that a value can know it."""
    return [3.0 * (prompt[0] in "ab") for prompt in prompts]


def train(reward=oracle, **options):
    defaults = {"updates": 2, "batch_size": 64, "max_new_tokens": 5, "lr": 1e-3, "kl_coef": 0.3, "device": "cpu"}
    given = {"model": make_model(TOKENIZER, 0), "tokenizer": TOKENIZER, "reward": reward, "prompts": PROMPTS}
    return train_ppo(PPOConfig(**{**defaults, **options}), **given)


def test_every_value_is_0_before_anything_is_learned(monkeypatch):
    kept, right = [], ppo.compute_advantages
    monkeypatch.setattr(ppo, "compute_advantages", lambda *arguments: kept.append(right(*arguments)) or kept[-1])
    result = train()
    assert not kept[0].values.any()
    assert kept[1].values.any()
    assert result.metrics[0]["val/var_explained"] == pytest.approx(0, abs=1e-6)


def test_the_size_of_the_states_does_not_matter():
    head, hidden = ValueHead(8), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    torch.nn.init.ones_(head.linear.weight)
    assert head(hidden).abs().min() > 0
    for scale in (0.2, 30.0):
        torch.testing.assert_close(head(scale * hidden), head(hidden), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("value_lr", "expected"), [(None, 0.3 / 32), (1e-4, 1e-4)])
def test_the_head_has_a_rate_of_its_own_that_decays_alike(value_lr, expected):
    head = ValueHead(32)
    cfg = PPOConfig(updates=4, lr=1e-3, value_lr=value_lr)
    optimizer, scheduler = ppo.make_optimizer(cfg, make_model(TOKENIZER, 0), head, torch.device("cpu"))
    assert optimizer.param_groups[1]["params"] == [*head.parameters()]
    assert scheduler.get_last_lr() == pytest.approx([1e-3, expected])
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.75e-3, 0.75 * expected])


def test_it_explains_the_returns_and_at_the_policys_rate_it_does_not():
    fast, slow = (
        [row["val/var_explained"] for row in train(fortunate, updates=12, lr=1e-4, **given).metrics]
        for given in ({}, {"value_lr": 1e-4})
    )
    assert min(fast[6:]) > 0.3
    assert max(slow) < 0.15


def test_a_rate_that_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"--value_lr 0.0: must be more than 0"):
        train(value_lr=0.0)
