"""The exact world: its identities, its gates, and that one broken detail of PPO is seen by them."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext

import pytest
import torch

from rlhf_kernels import per_token_kl
from rlhf_trainer import dpo, ppo, verify
from rlhf_trainer.cli import main
from rlhf_trainer.sampling.rollout import Rollout, generate
from rlhf_trainer.verification import cases as verify_rows
from rlhf_trainer.worlds.exact import PROMPTS, ExactWorld, make_model, oracle

SHORT_DPO = 0.75  # a quarter of the pairs close 0.84 of the gap, without the reference 0.61
SHORTER = {
    verify: {"QUICK": 30, "EVERY": 10},
    verify_rows: {"QUICK": 30, "GROUP_UPDATES": 20, "PAIRS": 1280, "MICRO_UPDATES": 2},
}
UPDATES = 30  # the right code closes 0.975 to 0.985 of the gap by then, the least wrong one 0.93


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with verify.one_thread():
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return verify_rows.fitted_reference(0)[0]


@pytest.fixture(scope="module")
def reference():
    return verify_rows.fitted_reference(0)[1]


@pytest.fixture(scope="module")
def world(reference, tokenizer):
    return ExactWorld(reference, tokenizer, beta=0.3, temperature=1.0)


def gap_closed(reference, tokenizer, temperature=1.0):
    world = ExactWorld(reference, tokenizer, 0.3, temperature)
    cfg = verify.ppo_config(UPDATES, temperature=temperature)
    policy = copy.deepcopy(reference)
    result = ppo.train_ppo(cfg, model=policy, tokenizer=tokenizer, reward=oracle, prompts=PROMPTS)
    return world.gap_closed(world.measure(result.policy).objective, world.measure(reference).objective)


def test_oracle_by_hand():
    texts = {
        "ab": 1.5,
        "abc": 1.75,
        "abcd": 1.5,
        "": -0.5,
        "c": -0.25,
        "aaaaa": 1 - 0.75 - 1,
        "abcda": 1 + 1 - 0.75 - 1,
    }
    assert dict(zip(texts, oracle(["da"] * len(texts), list(texts)), strict=True)) == texts


def test_every_response_is_enumerated(world, tokenizer):
    assert world.reference.shape == (8, 1365)
    for seed in (1, 2):  # any policy of this kind, not just the fitted one
        total = world.log_policy(make_model(tokenizer, seed)).exp().sum(-1)
        torch.testing.assert_close(total, torch.ones(8, dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_gap_to_the_optimum_is_beta_times_the_kl(world, reference, tokenizer):
    for model in (reference, make_model(tokenizer, 1)):
        exact = world.measure(model)
        assert world.best - exact.objective == pytest.approx(0.3 * exact.kl_to_optimum, abs=1e-6)
        assert exact.objective < world.best
    assert world.measure(reference).kl_to_reference == 0


def test_rollouts_follow_the_enumerated_distribution(world, reference, tokenizer):
    """Sampling (left padding, KV cache) and the training forward against the enumeration, response by response."""
    generator = torch.Generator().manual_seed(0)
    rollout = generate(reference, tokenizer, PROMPTS * 512, max_new_tokens=5, generator=generator)
    place = {pair: i for i, pair in enumerate(world.pairs)}
    drawn = torch.tensor([place[p] for p in zip(rollout.prompts, rollout.completions, strict=True)])
    exact = world.reference.flatten()[drawn]
    with torch.no_grad():
        logprobs, _, _ = ppo.token_outputs(reference, None, rollout, torch.arange(len(drawn)), 1.0)
    torch.testing.assert_close(logprobs.double().sum(-1), exact, atol=1e-4, rtol=0)
    entropy = -(world.reference.exp() * world.reference).sum(-1).mean().item()
    error = exact.std().item() / len(drawn) ** 0.5
    assert -exact.mean().item() == pytest.approx(entropy, abs=4 * error)
    first = torch.tensor([text[:1] == "a" for _, text in world.pairs]).view(8, -1)
    expected = (world.reference.exp() * first).sum(-1)
    counts = torch.bincount(drawn // 1365, first.flatten()[drawn].double(), minlength=8) / 512
    torch.testing.assert_close(counts, expected, atol=0.09, rtol=0)  # 4 standard errors


def wrong_sign(monkeypatch):
    monkeypatch.setattr(ppo, "kl_penalty", lambda logprobs, ref: -per_token_kl(logprobs, ref, estimator="k1"))


def k3_in_the_reward(monkeypatch):
    monkeypatch.setattr(ppo, "kl_penalty", lambda logprobs, ref: per_token_kl(logprobs, ref, estimator="k3"))


def shifted_values(monkeypatch):
    right = ppo.token_outputs

    def wrong(*arguments, **options):
        logprobs, entropy, values = right(*arguments, **options)
        return logprobs, entropy, torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)

    monkeypatch.setattr(ppo, "token_outputs", wrong)


def eos_is_padding(monkeypatch):
    monkeypatch.setattr(Rollout, "response_mask", property(lambda r: r.mask[:, r.prompt_length :] & (r.responses != 1)))


def no_temperature(monkeypatch):
    right = ppo.token_outputs
    monkeypatch.setattr(ppo, "token_outputs", lambda *arguments, **options: right(*arguments[:-1], 1.0, **options))


BROKEN = {
    "KL sign": (wrong_sign, 1.0),
    "k3 in the reward": (k3_in_the_reward, 1.0),
    "value shifted by one": (shifted_values, 1.0),
    "EOS as padding": (eos_is_padding, 1.0),
    "logprobs without temperature": (no_temperature, 0.7),
}


def details():
    """Two of them in every run; the sweep takes all five."""
    for detail in BROKEN:
        yield detail if detail in ("KL sign", "EOS as padding") else pytest.param(detail, marks=pytest.mark.sweep)


@pytest.mark.parametrize("detail", list(details()))
def test_one_broken_detail_fails_the_gate(detail, reference, tokenizer, monkeypatch):
    break_it, temperature = BROKEN[detail]
    break_it(monkeypatch)
    assert gap_closed(reference, tokenizer, temperature) < verify.QUICK_GAP


def best_of_two_by_hand(world, prompt):
    """Probability of every response as the best of two, from all ordered pairs; ties go to the first."""
    pi, rewards = world.reference[prompt].exp(), world.rewards[prompt]
    both = pi[:, None] * pi[None, :]
    first = rewards[:, None] >= rewards[None, :]
    return (both * first).sum(1) + (both * ~first).sum(0)


def test_best_of_n_by_enumeration(world):
    probability, log_ratio = verify_rows.best_of(world, 2)
    torch.testing.assert_close(probability[3], best_of_two_by_hand(world, 3), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(log_ratio, probability.log() - world.reference, atol=1e-5, rtol=0)
    for n in (1, 4, 64):
        probability, log_ratio = verify_rows.best_of(world, n)
        torch.testing.assert_close(probability.sum(-1), torch.ones(8, dtype=torch.float64), atol=1e-9, rtol=0)
        kl = (probability * log_ratio).sum(-1)
        assert bool((kl <= verify_rows.kl_bound(n) + 1e-9).all())
    assert kl.min() > 2  # far from the policy, and below log 64 - 63/64 = 3.17 as many responses share a reward


def test_best_of_n_keeps_what_the_enumeration_says():
    lines = verify_rows.check_bon(0)
    assert [line.kept for line in lines] == [True] * 3
    assert lines[0].reached > 1.2  # the reference's own reward is about 0


def test_choosing_the_worst_fails_the_best_of_n_gate(monkeypatch):
    right = verify_rows.best_of_n

    def worst(*arguments, reward, **options):
        return right(*arguments, reward=lambda p, c: [-score for score in reward(p, c)], **options)

    monkeypatch.setattr(verify_rows, "best_of_n", worst)
    assert not verify_rows.check_bon(0)[0].kept


def test_pairs_are_the_references_own_answers_as_sampled(reference, tokenizer, world):
    pairs = verify_rows.sampled_pairs(reference, tokenizer, 64, 0)
    assert len(pairs) <= 64 * 8
    for item in pairs:
        for row, text in ((item.chosen, item.pair.chosen), (item.rejected, item.pair.rejected)):
            answer = row.ids[row.prompt_length :]
            assert tokenizer.decode(answer, skip_special_tokens=True) == text
            assert (answer[-1] == tokenizer.eos_token_id) == (len(text) < 5)
        rewards = oracle([item.pair.prompt] * 2, [item.pair.chosen, item.pair.rejected])
        assert item.pair.label == pytest.approx(torch.tensor(rewards[0] - rewards[1]).sigmoid().item(), rel=1e-6)


def short_dpo(monkeypatch):
    """Share of the gap that DPO closes on a quarter of the pairs."""
    monkeypatch.setattr(verify_rows, "PAIRS", 512)
    return verify_rows.check_dpo(0)[0].reached


def test_dpo_goes_where_ppo_goes(monkeypatch):
    assert short_dpo(monkeypatch) > SHORT_DPO


def test_dpo_without_its_reference_goes_elsewhere(monkeypatch):
    right = dpo.pair_losses
    monkeypatch.setattr(dpo, "pair_losses", lambda policy, ref, *rest: right(policy, torch.zeros_like(ref), *rest))
    assert short_dpo(monkeypatch) < SHORT_DPO


def test_the_command_at_another_temperature(tmp_path, monkeypatch, capsys):
    """PPO alone, in half of its updates; the sweep runs what the command does without options."""
    monkeypatch.setattr(verify, "QUICK", UPDATES)
    assert main(["verify", "--rows", "none", "--temperature", "0.7", "--output_dir", str(tmp_path)]) == 0
    verdict = json.loads((tmp_path / "verify.json").read_text())
    assert verdict["gap_closed"] >= 0.95
    assert verdict["updates"] == UPDATES
    assert verdict["rows"] == []
    assert [step for step, _ in verdict["curve"]] == list(range(0, UPDATES + 1, verify.EVERY))
    assert "passed" in capsys.readouterr().out


@pytest.mark.sweep
def test_the_command_passes_its_quick_gates(tmp_path, monkeypatch, capsys):
    """With half of its updates and pairs, and with its own gates."""
    for module, names in SHORTER.items():
        for name, value in names.items():
            monkeypatch.setattr(module, name, value)
    assert main(["verify", "--output_dir", str(tmp_path)]) == 0
    verdict = json.loads((tmp_path / "verify.json").read_text())
    assert verdict["gap_closed"] >= 0.95
    assert verdict["updates"] == verify.QUICK
    reached = {row["name"]: row["reached"] for row in verdict["rows"] if row["kept"]}
    gaps = [name for name in reached if name.endswith("gap closed")]
    assert gaps == [f"{way}: gap closed" for way in ("PPO with LoRA", "grpo", "rloo", "DPO")]
    assert len(reached) == len(verdict["rows"]) == 10
    assert min(reached[name] for name in gaps) >= 0.95
    assert [step for step, _ in verdict["curve"]] == list(range(0, verify.QUICK + 1, verify.EVERY))
    assert (tmp_path / "verify.png").read_bytes().startswith(b"\x89PNG")
    assert "passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gap", "kl", "code"), [(0.995, 0.01, 0), (0.98, 0.01, 1), (0.995, 0.03, 1), (float("nan"), 0.01, 1)]
)
def test_a_failed_gate_is_exit_code_1(gap, kl, code, tmp_path, monkeypatch, capsys):
    verdict = verify.Verdict(150, gap, kl, 1.8, 0.0, 0.75, 0.76, [(0, 0.0), (150, 0.75)])
    monkeypatch.setattr(verify, "train_and_measure", lambda *_, **__: verdict)
    monkeypatch.setattr(verify, "CHECKS", {"dpo": lambda seed: [verify.CheckResult("DPO", 0.97, ">= 0.95", True)]})
    assert main(["verify", "--full", "--rows", "dpo", "--output_dir", str(tmp_path)]) == code
    assert ("FAILED" in capsys.readouterr().out) == bool(code)


def test_a_failed_row_is_exit_code_1(tmp_path, monkeypatch, capsys):
    verdict = verify.Verdict(60, 0.98, 0.02, 1.8, 0.0, 0.75, 0.76, [(0, 0.0), (60, 0.75)])
    monkeypatch.setattr(verify, "train_and_measure", lambda *_, **__: verdict)
    monkeypatch.setattr(verify, "CHECKS", {"dpo": lambda seed: [verify.CheckResult("DPO", 0.9, ">= 0.95", False)]})
    assert main(["verify", "--rows", "dpo", "--output_dir", str(tmp_path)]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert main(["verify", "--rows", "sft", "--output_dir", str(tmp_path)]) == 2
    assert "--rows sft: not one of dpo" in capsys.readouterr().err


@pytest.mark.sweep
def test_a_reference_with_the_adapter_on_fails_the_lora_row(monkeypatch):
    """Then the policy is its own reference, KL is always 0 and the reward is all that counts."""
    monkeypatch.setattr(ppo, "use_adapter", lambda reference: nullcontext(reference.model))
    monkeypatch.setattr(verify_rows, "QUICK", UPDATES)
    gap, moved = verify_rows.check_lora(0)
    assert not gap.kept
    assert moved.kept


def test_a_folder_that_cannot_be_made_is_said_before_the_minutes_it_takes(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(verify, "train_and_measure", lambda *_, **__: pytest.fail("it has begun"))
    assert main(["verify", "--output_dir", str(tmp_path / "file" / "x")]) == 2
    assert "not a directory" in capsys.readouterr().err


def test_bad_options_are_refused(tmp_path, capsys):
    assert main(["verify", "--beta", "0", "--output_dir", str(tmp_path / "x")]) == 2
    assert "--beta 0.0: must be more than 0" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
