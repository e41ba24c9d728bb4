"""The other exact worlds: rewards by hand, enumerations of other lengths, PPO's way in a few updates."""

from __future__ import annotations

import pytest
import torch

from rlhf_trainer.verification import other_worlds
from rlhf_trainer.verification.cases import fitted_reference
from rlhf_trainer.worlds.exact import ExactWorld, oracle
from rlhf_trainer.worlds.threads import one_thread

SHORT = 0.8  # of the gap


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


def test_rewards_by_hand():
    found = other_worlds.counted(["ab", "ab", "c"], ["aba", "aaa", "d"], [True, False, True])
    assert found == pytest.approx([1.6, 1.6 - 0.8 - 1.0, 0.0])
    steps = (0.7 * torch.randn(4, 5, generator=torch.Generator().manual_seed(3))).tolist()
    ended, cut = other_worlds.drawn(3, ["ca", "ca"], ["bd", "bd"], [True, False])
    assert ended == pytest.approx(steps[0][1] + steps[1][3] + steps[3][4])
    assert cut == pytest.approx(steps[0][1] + steps[1][3] - 1)


@pytest.mark.parametrize("length", [1, 3])
def test_every_response_of_another_length_is_enumerated(length):
    tokenizer, reference = fitted_reference(0)
    world = ExactWorld(reference, tokenizer, 0.3, 0.8, max_tokens=length)
    assert world.rewards.shape == (8, sum(4**n for n in range(length + 1)))
    torch.testing.assert_close(world.reference.exp().sum(-1), torch.ones(8, dtype=torch.float64), atol=1e-6, rtol=0)
    cut = [len(text) == length for _, text in world.pairs]
    expected = oracle(*zip(*world.pairs, strict=True), [not one for one in cut])
    assert world.rewards.flatten().tolist() == expected


def test_ppo_goes_to_another_worlds_optimum():
    world = other_worlds.WORLDS["counted letters"]
    assert other_worlds.gap_in(world, seed=0, updates=25) > SHORT


@pytest.mark.sweep
def test_the_worlds_gates():
    assert [line.kept for line in other_worlds.check_worlds(0)] == [True] * 3
