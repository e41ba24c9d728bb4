"""Rows of `rlhf verify` beyond PPO itself: encoder-decoder world, micro-batches, reward models, what is chosen."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_trainer import ppo, verify
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.cli import main
from rlhf_trainer.data.records import Pair
from rlhf_trainer.sampling.rollout import generate
from rlhf_trainer.verification import cases as verify_rows
from rlhf_trainer.verification import reward_model as verify_reward
from rlhf_trainer.worlds.exact import PROMPTS, ExactWorld, make_seq2seq, make_tokenizer

TOKENIZER = make_tokenizer()
SHORT_SEQ2SEQ = 0.5
SHORT_REWARD = 0.4


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with verify.one_thread():
        yield


@pytest.fixture(scope="module")
def world():
    tokenizer, reference = verify_rows.fitted_reference(0)
    return ExactWorld(reference, tokenizer, beta=0.3, temperature=1.0)


# Encoder-decoder


def test_every_response_of_an_encoder_decoder_is_enumerated_as_it_is_sampled():
    model = make_seq2seq(TOKENIZER, 1)
    world = ExactWorld(model, TOKENIZER, beta=0.3, temperature=0.7)
    torch.testing.assert_close(world.reference.exp().sum(-1), torch.ones(8, dtype=torch.float64), atol=1e-6, rtol=0)
    generator = torch.Generator().manual_seed(0)
    rollout = generate(model, TOKENIZER, PROMPTS * 16, max_new_tokens=5, generator=generator, temperature=0.7)
    place = {pair: i for i, pair in enumerate(world.pairs)}
    drawn = torch.tensor([place[pair] for pair in zip(rollout.prompts, rollout.completions, strict=True)])
    with torch.no_grad():
        logprobs, _, _ = ppo.token_outputs(model, None, rollout, torch.arange(len(drawn)), 0.7)
    torch.testing.assert_close(logprobs.double().sum(-1), world.reference.flatten()[drawn], atol=1e-4, rtol=0)


def test_ppo_of_an_encoder_decoder_goes_to_its_optimum(monkeypatch):
    """From random weights, in a quarter of the updates; the fitted reference is the row itself."""
    monkeypatch.setattr(verify_rows, "fitted_seq2seq", lambda seed: (TOKENIZER, make_seq2seq(TOKENIZER, seed)))
    monkeypatch.setattr(verify_rows, "QUICK", 15)
    (line,) = verify_rows.check_seq2seq(0)
    assert line.reached > SHORT_SEQ2SEQ


# Micro-batches


def test_micro_batches_change_nothing_and_a_mean_over_each_part_would(monkeypatch):
    monkeypatch.setattr(verify_rows, "MICRO_UPDATES", 2)
    assert verify_rows.check_micro(0)[0].kept
    right = ppo.policy_loss

    def mean_of_each_part(*arguments, denominator, **options):
        return right(*arguments, **options)

    monkeypatch.setattr(ppo, "policy_loss", mean_of_each_part)
    assert not verify_rows.check_micro(0)[0].kept


# Reward models


def test_pair_loss_and_correlation_by_hand():
    small = SimpleNamespace(
        reference=torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log(),
        rewards=torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64),
    )
    scores = torch.tensor([[2.0, 0.5, 1.0]], dtype=torch.float64)
    pi, rewards, own = small.reference[0].exp().tolist(), small.rewards[0].tolist(), scores[0].tolist()
    expected = 0.0
    for i, j in itertools.product(range(3), repeat=2):
        label, said = (1 / (1 + math.exp(b - a)) for a, b in ((rewards[i], rewards[j]), (own[i], own[j])))
        expected -= pi[i] * pi[j] * (label * math.log(said) + (1 - label) * math.log(1 - said))
    assert verify_reward.pair_loss(small, scores) == pytest.approx(expected)
    assert verify_reward.correlation(small, 3 * small.rewards + 7) == pytest.approx(1)
    assert verify_reward.correlation(small, -small.rewards) == pytest.approx(-1)


def test_no_scores_have_a_lower_loss_than_the_true_reward(world):
    least = verify_reward.pair_loss(world, world.rewards)
    assert verify_reward.pair_loss(world, torch.zeros_like(world.rewards)) == pytest.approx(math.log(2), abs=1e-5)
    for scores in (1.2 * world.rewards, 0.8 * world.rewards, world.rewards + 0.1 * world.lengths):
        assert verify_reward.pair_loss(world, scores) > least


def test_hard_labels_are_drawn_from_the_soft_ones():
    pairs = [Pair("a", "x", "y", label=0.8)] * 2000
    drawn = verify_reward.hard_labels(pairs, seed=0)
    assert {(pair.chosen, pair.rejected, pair.label) for pair in drawn} == {("x", "y", 1.0), ("y", "x", 1.0)}
    assert sum(pair.chosen == "x" for pair in drawn) / 2000 == pytest.approx(0.8, abs=0.04)


def short_reward(monkeypatch, pairs):
    """Lines of the row with so few pairs of each prompt."""
    monkeypatch.setattr(verify_reward, "PAIRS", pairs)
    return verify_reward.check_reward(0)


def test_a_reward_model_learns_the_true_reward(monkeypatch):
    above, found = short_reward(monkeypatch, 128)
    assert above.reached > 0
    assert found.reached > SHORT_REWARD


def test_a_reward_model_of_swapped_pairs_does_not(monkeypatch):
    right = verify_reward.train_reward

    def swapped(cfg, pairs):
        return right(cfg, pairs=[replace(pair, label=1 - pair.label) for pair in pairs])

    monkeypatch.setattr(verify_reward, "train_reward", swapped)
    above, found = short_reward(monkeypatch, 128)
    assert not above.kept
    assert found.reached < -SHORT_REWARD


@pytest.mark.sweep
def test_over_optimisation_is_seen_by_the_watch():
    lines = verify_reward.check_overoptimisation(0)
    assert [line.kept for line in lines] == [True] * 4
    by_beta, by_update = lines[0].series, lines[1].series
    assert max(by_beta["true_reward"]) - by_beta["true_reward"][-1] == pytest.approx(lines[0].reached)
    assert len(by_update["scores"]) == len(by_update["gold_scores"]) == verify_reward.LOOSE_UPDATES


def test_a_true_reward_that_only_rises_fails_the_row(monkeypatch):
    """Both the figures and the watch: the score is the true reward here."""
    monkeypatch.setattr(verify_reward, "LOOSE_UPDATES", 22)
    monkeypatch.setattr(verify_reward, "trained_reward", lambda *_: verify_rows.oracle)
    exact, lost, _, warned = verify_reward.check_overoptimisation(0)
    assert not any(line.kept for line in (exact, lost, warned))
    assert warned.reached == 0


# What is chosen


@pytest.mark.parametrize(
    ("rows", "checked"), [(["all"], ["a", "b"]), (["none"], []), (["b"], ["b"]), (["b", "b"], ["b"])]
)
def test_rows_are_chosen_and_progress_is_said(rows, checked, tmp_path, monkeypatch, capsys):
    verdict = verify.Verdict(60, 0.98, 0.02, 1.8, 0.0, 0.75, 0.76, [(0, 0.0), (60, 0.75)])
    monkeypatch.setattr(verify, "train_and_measure", lambda *_, **__: verdict)
    own = {
        name: lambda seed, name=name: [verify.CheckResult(f"line {name}", 0.97, ">= 0.95", True)] for name in ("a", "b")
    }
    monkeypatch.setattr(verify, "CHECKS", own)
    assert main(["verify", "--rows", *rows, "--output_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    for place, name in enumerate(checked, start=1):
        assert f"checking {name}, {place} of {len(checked)}" in said
        assert f"line {name}: 0.97, gate >= 0.95, passed" in said
    assert said.count("checking") == len(checked)


def test_a_row_that_stops_fails_alone_and_the_rest_is_kept(tmp_path, monkeypatch, capsys):
    """--rows ranks on a machine where no process group starts: PPO's verdict and the other rows are not lost."""
    verdict = verify.Verdict(60, 0.98, 0.02, 1.8, 0.0, 0.75, 0.76, [(0, 0.0), (60, 0.75)])
    monkeypatch.setattr(verify, "train_and_measure", lambda *_, **__: verdict)

    def stops(seed):
        raise UserError("no process group here")

    fine = verify.CheckResult("line b", 0.97, ">= 0.95", True, {"beta": [1.0]})
    monkeypatch.setattr(verify, "CHECKS", {"a": stops, "b": lambda seed: [fine]})
    assert main(["verify", "--rows", "all", "--output_dir", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "no process group here" in said.err
    found = json.loads((tmp_path / "verify.json").read_text())
    assert [(row["name"], row["kept"]) for row in found["rows"]] == [
        ("a: stopped by an error", False),
        ("line b", True),
    ]
    assert found["rows"][1]["series"] == {"beta": [1.0]}
    assert found["gap_closed"] == 0.98
    assert "FAILED" in said.out


def test_the_page_names_every_row():
    page = (Path(__file__).resolve().parents[3] / "docs" / "verify.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in verify.CHECKS)
