"""The KL that is reported: over the whole vocabulary, against the enumeration and against the sampled one."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

from rlhf_trainer import PPOConfig, train_ppo
from rlhf_trainer.sampling.responses import exact_kl, token_outputs
from rlhf_trainer.sampling.rollout import generate
from rlhf_trainer.worlds.exact import PROMPTS, ExactWorld, make_model, make_tokenizer, oracle

TOKENIZER = make_tokenizer()
COLD = 0.7


@pytest.fixture(scope="module")
def compared():
    """A rollout of one policy, and both KLs of each response to another one [B, R]."""
    policy, reference = make_model(TOKENIZER, 0), make_model(TOKENIZER, 5)
    generator = torch.Generator().manual_seed(0)
    rollout = generate(policy, TOKENIZER, PROMPTS * 32, max_new_tokens=5, generator=generator, temperature=COLD)
    kept, rows = [], torch.arange(len(rollout.prompts))
    with torch.no_grad():
        logprobs = token_outputs(policy, None, rollout, rows, COLD, keep=kept)[0]
        sampled = logprobs - token_outputs(reference, None, rollout, rows, COLD, keep=kept)[0]
        return policy, reference, rollout, kept, sampled, exact_kl(*kept, COLD, sampled)


def test_it_is_the_kl_of_the_two_distributions(compared):
    policy, reference, rollout, _, _, found = compared
    start = rollout.prompt_length
    positions = (rollout.mask.long().cumsum(-1) - 1).clamp(min=0)
    own, other = (
        (model(rollout.ids, attention_mask=rollout.mask.long(), position_ids=positions).logits / COLD).log_softmax(-1)
        for model in (policy, reference)
    )
    expected = kl_div(other, own, log_target=True, reduction="none").sum(-1)[:, start - 1 : -1]
    expected = torch.where(rollout.response_mask, expected, 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_it_has_the_mean_of_the_enumeration_and_a_fraction_of_the_spread(compared):
    policy, reference, _, _, sampled, found = compared
    world = ExactWorld(reference, TOKENIZER, beta=1.0, temperature=COLD)
    each, noisy = found.sum(-1), sampled.sum(-1)
    true = world.measure(policy).kl_to_reference
    assert each.mean().item() == pytest.approx(true, abs=4 * each.std().item() / len(each) ** 0.5)
    assert each.std() < 0.7 * noisy.std()
    assert each.min() >= 0 > noisy.min()


def test_models_that_scale_their_logits_differently_have_the_sampled_one(compared):
    *_, kept, sampled, found = compared
    other = {**kept[1], "logit_scale": 2.0}
    assert exact_kl(kept[0], other, COLD, sampled) is sampled
    assert found is not sampled


def test_both_are_logged_and_the_exact_one_decides():
    cfg = PPOConfig(updates=2, batch_size=64, max_new_tokens=5, lr=1e-3, kl_coef=0.3, device="cpu", stop_kl=1e-9)
    result = train_ppo(cfg, model=make_model(TOKENIZER, 0), tokenizer=TOKENIZER, reward=oracle, prompts=PROMPTS)
    first, second = result.metrics
    assert first["objective/kl"] == first["objective/kl_sampled"] == 0
    assert second["objective/kl"] > 0
    assert second["objective/kl"] != second["objective/kl_sampled"]
    assert second["objective/non_score_reward"] == pytest.approx(-0.3 * second["objective/kl"])
    assert "exceeded --stop_kl" in result.stopped
