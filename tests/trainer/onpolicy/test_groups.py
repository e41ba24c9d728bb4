"""Group baselines in the PPO loop: who is compared with whom, what is left out without a value head, resumption."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from rlhf_trainer import PPOConfig, ppo, train_ppo
from rlhf_trainer.cli import main
from rlhf_trainer.onpolicy.value_head import VALUE_HEAD
from rlhf_trainer.worlds.exact import PROMPTS, make_model, make_tokenizer, oracle

TOKENIZER = make_tokenizer()
TIMES = ("eps", "tokens_per_second", "seconds/rollout", "seconds/scoring", "seconds/update")


def config(**options):
    defaults = {"updates": 2, "batch_size": 32, "max_new_tokens": 5, "lr": 1e-3, "kl_coef": 0.3, "device": "cpu"}
    return PPOConfig(**{**defaults, "advantage": "rloo", "group_size": 4, **options})


def train(on_update=None, **options):
    given = {"model": make_model(TOKENIZER, 0), "tokenizer": TOKENIZER, "reward": oracle, "prompts": PROMPTS}
    return train_ppo(config(**options), on_update=on_update, **given)


def test_every_prompt_stands_group_size_times_in_a_row():
    drawn = [ppo.prompt_batch(PROMPTS, update, batch_size=12, group_size=3, seed=0) for update in range(4)]
    for batch in drawn:
        assert [batch[i] for i in range(0, 12, 3) for _ in range(3)] == batch
    heads = [batch[i] for batch in drawn for i in range(0, 12, 3)]
    assert sorted(heads[:8]) == sorted(heads[8:]) == sorted(PROMPTS)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "mean"])
def test_advantages_compare_reward_and_kl_within_the_group(kind):
    generator = torch.Generator().manual_seed(0)
    scores, kl = torch.randn(8, generator=generator), torch.randn(8, 5, generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 5, 5, 1])[:, None]
    found = ppo.group_baseline(scores, kl * mask, mask, kl_coef=0.3, group_size=4, kind=kind)
    costs = -0.3 * (kl * mask).sum(-1)
    returns = scores + costs
    for start in (0, 4):
        own = slice(start, start + 4)
        for i in range(start, start + 4):
            others = torch.cat([returns[start:i], returns[i + 1 : start + 4]])
            relative = (scores[i] - scores[own].mean()) / (scores[own].std() + 1e-6)
            expected = {
                "grpo": relative + costs[i] - costs[own].mean(),
                "rloo": returns[i] - others.mean(),
                "mean": returns[i] - returns[own].mean(),
            }[kind]
            torch.testing.assert_close(found[i], torch.where(mask[i], expected, 0.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", [0.0, 0.1, 1000.1, -3e-5])
def test_where_all_scores_are_equal_kl_counts_as_much_as_beta_says(score):
    """A KL divided by its own deviation would pull alike at every beta."""
    kl = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    mask, scores = torch.ones(6, 5, dtype=torch.bool), torch.full((6,), score)
    options = {"group_size": 6, "kind": "grpo"}
    small, large = (ppo.group_baseline(scores, kl, mask, kl_coef=beta, **options) for beta in (1e-6, 0.5))
    torch.testing.assert_close(large, small * 5e5, rtol=1e-4, atol=1e-6)
    assert small.abs().max() < 1e-4
    assert not ppo.group_baseline(scores, kl, mask, kl_coef=0.0, **options).any()


def test_the_share_of_groups_that_teach_nothing_is_a_metric():
    assert train(updates=1).metrics[0]["val/groups_without_spread"] < 0.5
    flat = train_ppo(
        config(updates=1, advantage="grpo"),
        model=make_model(TOKENIZER, 0),
        tokenizer=TOKENIZER,
        reward=lambda prompts, completions: [float(prompt == "a") for prompt in prompts],
        prompts=PROMPTS,
    )
    assert flat.metrics[0]["val/groups_without_spread"] == 1.0
    assert "val/groups_without_spread" not in train(updates=1, advantage="gae", group_size=1).metrics[0]


def test_the_advantage_of_a_response_is_its_score_minus_beta_kl(monkeypatch):
    """Through the loop: score - beta * sum of KL of each response, less the mean of the others of its prompt."""
    kept = []
    right = ppo.compute_advantages
    monkeypatch.setattr(ppo, "compute_advantages", lambda *arguments: kept.append(right(*arguments)) or kept[-1])
    train(updates=3)
    batch = kept[-1]
    assert batch.kl.abs().max() > 0
    returns = batch.scores - 0.3 * batch.kl.sum(-1)
    mask = batch.rollout.response_mask
    for start in range(0, 32, 4):
        assert len(set(batch.rollout.prompts[start : start + 4])) == 1
        group = returns[start : start + 4]
        expected = (group - group.mean()) * 4 / 3
        torch.testing.assert_close(
            batch.advantages[start : start + 4], expected[:, None] * mask[start : start + 4], rtol=1e-4, atol=1e-5
        )


def test_there_is_no_value_head_anywhere(tmp_path):
    result = train(output_dir=str(tmp_path / "out"), save_every=1)
    assert result.value_head is None
    assert not (tmp_path / "out" / VALUE_HEAD).exists()
    assert not list((tmp_path / "out").rglob("value_head*"))
    assert not {"loss/value_avg", "val/clipfrac_avg", "val/var_explained"} & result.metrics[0].keys()
    assert result.metrics[0]["val/ratio"] == pytest.approx(1.0, abs=0.1)
    with_head = train(advantage="gae", updates=1)  # of groups too
    assert with_head.metrics[0].keys() - result.metrics[0].keys() == {
        "loss/value_avg",
        "val/clipfrac_avg",
        "val/var_explained",
    }


def test_micro_batches_change_nothing_but_rounding():
    whole, split = train(), train(micro_batch_size=5)
    for a, b in zip(whole.metrics, split.metrics, strict=True):
        for key in a.keys() - set(TIMES):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4)


def test_resumed_run_ends_with_the_bits_of_one_never_stopped(tmp_path):
    options = {"updates": 4, "save_every": 2, "keep_checkpoints": 9, "advantage": "grpo"}
    train(output_dir=str(tmp_path / "whole"), **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step-00000004")
    (tmp_path / "killed" / "model.safetensors").unlink()
    train(output_dir=str(tmp_path / "killed"), resume=True, **options)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    first, second = ([{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in log] for log in logs)
    assert first == second


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--advantage", "vtrace"], "--advantage vtrace: it takes gae, grpo, rloo, mean"),
        (["--advantage", "grpo"], "--advantage grpo compares responses to one prompt; --group_size must be 2 or more"),
        (
            ["--advantage", "rloo", "--group_size", "4", "--whiten_rewards"],
            "--whiten_rewards: for gae; --advantage rloo compares whole scores",
        ),
        (["--group_size", "3"], "--group_size 3 does not divide --batch_size 64"),
        (["--group_size", "0"], "--group_size 0: must be at least 1"),
    ],
)
def test_bad_options_are_refused(options, reason, tmp_path, capsys):
    given = ["--model", "nowhere", "--reward", "a:b", "--prompts", "p.txt", "--output_dir", str(tmp_path / "out")]
    assert main(["ppo", *given, *options]) == 2
    assert capsys.readouterr().err.strip() == f"rlhf ppo: error: {reason}"
