"""The PPO loop: invariants at step 0, what accumulation may not change, guards, stop criteria, what it writes."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trainer import PPOConfig, ppo, train_ppo
from rlhf_trainer.base.errors import InvariantError, UserError
from rlhf_trainer.cli import main
from rlhf_trainer.models.loading import save_folder
from rlhf_trainer.onpolicy import inputs as ppo_inputs
from rlhf_trainer.onpolicy import metrics as ppo_metrics
from rlhf_trainer.onpolicy.value_head import VALUE_HEAD, ValueHead
from rlhf_trainer.onpolicy.watch import RewardHackingMonitor, repetition
from rlhf_trainer.sampling.rollout import generate
from rlhf_trainer.worlds.exact import PROMPTS, make_model, make_tokenizer, oracle

TOKENIZER = make_tokenizer()
TIMES = ("eps", "tokens_per_second", "seconds/rollout", "seconds/scoring", "seconds/update")


def config(**options):
    defaults = {"updates": 2, "batch_size": 32, "max_new_tokens": 5, "lr": 1e-3, "kl_coef": 0.3, "device": "cpu"}
    return PPOConfig(**{**defaults, **options})


def train(model=None, reward=oracle, ref_model=None, on_update=None, **options):
    model = make_model(TOKENIZER, 0) if model is None else model
    given = {"model": model, "tokenizer": TOKENIZER, "reward": reward, "ref_model": ref_model, "prompts": PROMPTS}
    return train_ppo(config(**options), on_update=on_update, **given)


def untimed(metrics):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in metrics]


def weights(result):
    return torch.cat([p.detach().flatten() for p in [*result.policy.parameters(), *result.value_head.parameters()]])


# Invariants


def test_kl_is_zero_and_the_ratio_one_at_step_0():
    result = train(updates=1, epochs=1, minibatches=1)
    first = result.metrics[0]
    assert first["objective/kl"] == 0.0
    assert first["val/ratio"] == 1.0
    assert first["policy/approxkl_avg"] == 0.0
    assert first["policy/clipfrac_avg"] == 0.0


def test_a_reference_computed_differently_is_caught(monkeypatch):
    right = ppo.token_outputs

    def reference_without_temperature(policy, head, rollout, rows, temperature, **options):
        return right(policy, head, rollout, rows, temperature if head is not None else 1.0, **options)

    monkeypatch.setattr(ppo, "token_outputs", reference_without_temperature)
    with pytest.raises(InvariantError, match=r"step 0: the policy has the reference's weights, but their logprobs"):
        train(temperature=0.7)


def test_dropout_is_caught_by_the_first_ratio(monkeypatch):
    """Dropout that eval() does not switch off."""
    model = make_model(TOKENIZER, 0)
    model.lm_head.register_forward_pre_hook(
        lambda module, inputs: (torch.nn.functional.dropout(inputs[0], 0.1) if torch.is_grad_enabled() else inputs[0],)
    )
    with pytest.raises(InvariantError, match="the first minibatch's ratio is not 1"):
        train(model)


def test_dropout_of_the_config_is_off():
    model = make_model(TOKENIZER, 0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert train(model.train(), updates=1).metrics[0]["objective/kl"] == 0.0


def test_another_reference_starts_at_a_positive_kl_and_stays_as_it_is():
    reference = make_model(TOKENIZER, 5)
    before = copy.deepcopy(reference.state_dict())
    result = train(ref_model=reference, batch_size=256, updates=1)
    assert result.metrics[0]["objective/kl"] > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in reference.state_dict().items())
    assert all(parameter.requires_grad for parameter in reference.parameters())  # it is the caller's
    model = make_model(TOKENIZER, 0)
    train(model, ref_model=model, updates=1)  # the policy itself: a copy is frozen, not the policy
    with pytest.raises(UserError, match="nothing to train"):
        train(make_model(TOKENIZER, 0).requires_grad_(False))


# The pieces


def assessed(cfg, scores, value=0.0):
    """A rollout assessed with a value head that says `value` everywhere."""
    model, head = make_model(TOKENIZER, 0), ValueHead(32)
    torch.nn.init.zeros_(head.linear.weight)
    torch.nn.init.constant_(head.linear.bias, value)
    rollout = generate(model, TOKENIZER, PROMPTS, max_new_tokens=5, generator=torch.Generator().manual_seed(0))
    return ppo.compute_advantages(model, model, head, rollout, scores, torch.arange(8), cfg.kl_coef, cfg)


def test_the_score_comes_at_the_last_counted_token():
    """Without value and discounting, every counted token's return is the score; one slot late, the last has none."""
    scores = torch.arange(1.0, 9.0)
    batch = assessed(config(batch_size=8, minibatches=1, lam=1.0), scores)
    mask = batch.rollout.response_mask
    torch.testing.assert_close(batch.returns, scores[:, None] * mask)
    discounted = assessed(config(batch_size=8, minibatches=1, lam=1.0, gamma=0.5), scores)
    steps_left = mask.sum(-1, keepdim=True) - torch.arange(1, mask.shape[1] + 1)
    torch.testing.assert_close(discounted.returns, (scores[:, None] * 0.5 ** steps_left.float()) * mask)


def test_whitening_sees_counted_tokens_alone_and_returns_stay_unwhitened():
    batch = assessed(config(batch_size=8, minibatches=1), torch.arange(1.0, 9.0), value=2.0)
    mask = batch.rollout.response_mask
    assert not mask.all()
    counted = batch.advantages[mask]
    assert counted.mean().abs() < 1e-5
    assert counted.var(correction=0) == pytest.approx(1, abs=1e-4)
    assert batch.advantages[~mask].abs().max() == 0
    plain = assessed(config(batch_size=8, minibatches=1, whiten_advantages=False), torch.arange(1.0, 9.0), value=2.0)
    torch.testing.assert_close(batch.returns, plain.returns)
    torch.testing.assert_close(plain.returns[mask], plain.advantages[mask] + 2.0)


def test_missing_eos_is_subtracted_or_replaces():
    scores, ended = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    assert ppo.final_scores(scores, ended, None).tolist() == [2.0, 2.0]
    assert ppo.final_scores(scores, ended, 3.0).tolist() == [2.0, -1.0]
    assert ppo.final_scores(scores, ended, 3.0, replace=True).tolist() == [2.0, -3.0]
    means = [train(missing_eos_penalty=3.0, missing_eos=way).metrics[0] for way in ("subtract", "replace")]
    assert means[0]["objective/scores"] != means[1]["objective/scores"]


def test_beta_adapts_by_the_formula():
    moving = {"target": 2.0, "episodes": 32, "horizon": 320}
    assert ppo.adapt_kl_coef(0.5, 2.2, **moving) == pytest.approx(0.5 * (1 + 0.1 * 32 / 320))
    assert ppo.adapt_kl_coef(0.5, 99.0, **moving) == pytest.approx(0.5 * (1 + 0.2 * 32 / 320))
    assert ppo.adapt_kl_coef(0.5, 0.0, **moving) == pytest.approx(0.5 * (1 - 0.2 * 32 / 320))
    assert ppo.adapt_kl_coef(0.5, 99.0, target=None, episodes=32, horizon=320) == 0.5
    history = train(updates=3, kl_target=0.5, kl_horizon=100).metrics
    assert history[1]["objective/kl_coef"] == pytest.approx(0.3 * (1 - 0.2 * 32 / 100))  # KL 0 at first


def test_every_prompt_comes_once_per_pass_in_a_fresh_order():
    options = {"batch_size": 6, "group_size": 1, "seed": 0}
    drawn = [prompt for update in range(4) for prompt in ppo.prompt_batch(PROMPTS, update, **options)]
    passes = [drawn[i : i + 8] for i in range(0, 24, 8)]
    assert all(sorted(part) == sorted(PROMPTS) for part in passes)
    assert passes[0] != passes[1] != passes[2]


# The update


def test_accumulation_changes_nothing():
    whole, split = (weights(train(updates=1, micro_batch_size=size)) for size in (None, 5))
    torch.testing.assert_close(split, whole, atol=2e-5, rtol=1e-4)
    before = torch.cat([p.detach().flatten() for p in make_model(TOKENIZER, 0).parameters()])
    assert (whole[: len(before)] - before).abs().max() > 1e-3


def test_same_seed_same_bits():
    first, again, other = (train(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(weights(first), weights(again))
    assert untimed(first.metrics) == untimed(again.metrics)
    assert not torch.equal(weights(first), weights(other))


def test_the_learning_rate_falls_linearly():
    rates = [metrics["lr"] for metrics in train(updates=4, lr=0.004).metrics]
    assert rates == pytest.approx([0.004, 0.003, 0.002, 0.001])


def test_an_update_stops_early_on_approx_kl(monkeypatch):
    seen = []
    right = ppo.update_policy
    monkeypatch.setattr(ppo, "update_policy", lambda *arguments: seen.append(right(*arguments)) or seen[-1])
    train(updates=1)
    train(updates=1, target_kl=1e-9)
    full, stopped = seen
    assert len(full) == 8
    assert len(stopped) == 2  # the first minibatch is at KL 0
    assert stopped[-1]["approx_kl"] > 1e-9


def test_training_stops_on_a_criterion(capsys):
    stopped = train(updates=9, stop_reward=-5.0).stopped
    assert "reached --stop_reward" in stopped
    said = " ".join(capsys.readouterr().err.split())
    assert f"stopped after update 5 of 9: {stopped}" in said  # a mean over fewer says too little
    by_kl = train(updates=9, stop_kl=1e-9)
    assert "exceeded --stop_kl" in by_kl.stopped
    assert len(by_kl.metrics) == 2
    assert train().stopped == "all updates done"


@pytest.mark.parametrize("metric", ["scores", "gold_scores"])
def test_one_lucky_batch_stops_nothing(metric):
    def reason(values, bar):
        history = [{"objective/scores": 0.0, "objective/kl": 0.0} | {f"objective/{metric}": value} for value in values]
        bars = {"stop_reward": None, "stop_gold": None, "stop_kl": None}
        bars["stop_reward" if metric == "scores" else "stop_gold"] = bar
        return ppo_metrics.stop_reason(history, **bars)

    assert reason([0.1, 0.0, 0.2, 0.1, 0.9], 0.2) is None
    assert reason([0.9] * 4, 0.2) is None
    assert reason([0.1, 0.6, 0.5, 0.7, 0.6, 0.6], 0.6) is None  # 0.6 on the mean, but not surely
    assert "surely 0.533" in reason([0.1, 0.6, 0.5, 0.7, 0.6, 0.6], 0.5)


def test_a_policy_that_never_gets_there_is_hardly_ever_stopped():
    """20 updates of a mean score of 0.1 with a spread of 0.2: the bar of 0.6 is out of reach."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        history = [
            {"objective/scores": 0.1 + 0.2 * x, "objective/kl": 0.0}
            for x in torch.randn(20, generator=generator).tolist()
        ]
        for done in range(1, 21):
            assert ppo_metrics.stop_reason(history[:done], stop_reward=0.6, stop_gold=None, stop_kl=None) is None


# Guards


@pytest.mark.parametrize("estimator", ["k2", "k3", "abs"])
def test_only_k1_is_allowed_in_the_reward(estimator):
    with pytest.raises(UserError, match=f"{estimator}: as a penalty inside the reward only k1 has the gradient"):
        train(kl_estimator=estimator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "--temperature 0.0: must be more than 0"),
        ({"minibatches": 64}, "--minibatches 64: more than --batch_size 32"),
        ({"micro_batch_size": 0}, "--micro_batch_size 0: must be at least 1"),
        ({"missing_eos": "drop"}, "--missing_eos drop: it takes subtract or replace"),
        ({"kl_coef": -0.1}, "--kl_coef -0.1: must be at least 0"),
        ({"lr": float("nan")}, "--lr 'nan': must be a finite number"),
        ({"max_grad_norm": 0.0}, "--max_grad_norm 0.0: must be more than 0"),
        ({"target_kl": -1.0}, "--target_kl -1.0: must be more than 0"),
        ({"gamma": 1.5}, "--gamma 1.5: must be at least 0 and at most 1"),
        ({"lam": -0.1}, "--lam -0.1: must be at least 0 and at most 1"),
        ({"clip": -0.2}, "--clip -0.2: must be at least 0"),
        ({"save_every": -1}, "--save_every -1: must be at least 0"),
        ({"stop_kl": float("nan")}, "--stop_kl 'nan': must be a finite number"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(UserError, match=message):
        train(**options)


def test_a_reward_that_goes_nan_stops_the_run_before_anything_is_updated():
    calls = []

    def reward(prompts, completions):
        calls.append(0)
        return [float("nan") if len(calls) == 2 and i == 7 else 1.0 for i in range(len(prompts))]

    model, kept = make_model(TOKENIZER, 0), []
    with pytest.raises(UserError, match="returned nan for completion 7: prompt"):
        train(model, reward, on_update=lambda _, policy: kept.append(copy.deepcopy(policy.state_dict())))
    assert all(torch.equal(kept[0][name], tensor) for name, tensor in model.state_dict().items())


def test_a_loss_that_is_not_finite_stops_before_the_step(monkeypatch):
    right = ppo.value_loss

    def broken(values, *arguments, **options):
        loss, stats = right(values, *arguments, **options)
        return loss * float("nan"), stats

    monkeypatch.setattr(ppo, "value_loss", broken)
    model = make_model(TOKENIZER, 0)
    with pytest.raises(UserError, match=r"update 1: loss is not finite in samples \[.*\], .*nothing was updated"):
        train(model)
    fresh = make_model(TOKENIZER, 0).state_dict()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_that_are_nan_are_named_not_trained():
    model = make_model(TOKENIZER, 0)
    with torch.no_grad():
        model.model.final_layernorm.weight[0] = float("inf")
    with pytest.raises(UserError, match=r"the policy's logits are not finite after prompt '.+': its weights"):
        train(model)


# The command


@pytest.fixture
def folders(tmp_path):
    save_folder(tmp_path / "policy", make_model(TOKENIZER, 0), TOKENIZER)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (tmp_path / "reward.py").write_text("def score(prompts, completions):\n    return [len(c) for c in completions]\n")
    return tmp_path


def command(folder, **options):
    values = {
        "model": folder / "policy",
        "prompts": folder / "prompts.txt",
        "reward": f"{folder}/reward.py:score",
        "output_dir": folder / "out",
        "updates": 2,
        "batch_size": 16,
        "max_new_tokens": 5,
        "lr": 0.001,
        "device": "cpu",
    }
    return main(["ppo", *(f"--{key}={value}" for key, value in (values | options).items())])


def test_phases_are_timed_and_their_shares_printed():
    rows = [{"seconds/rollout": 1.0, "seconds/scoring": 0.5, "seconds/update": 0.5}] * 2
    said = "2 updates: rollout 2.0 s (50%), scoring 1.0 s (25%), update 1.0 s (25%)"
    assert ppo_metrics.phase_times(rows) == said


def test_the_command_writes_an_ordinary_folder(folders, capsys):
    assert command(folders) == 0
    assert re.search(r"2 updates: rollout .* s \(.*%\), scoring .*, update ", capsys.readouterr().err)
    out = folders / "out"
    policy = AutoModelForCausalLM.from_pretrained(out)
    assert policy.config.model_type == "phi"
    assert AutoTokenizer.from_pretrained(out).pad_token == "<pad>"
    assert load_file(out / VALUE_HEAD)["linear.weight"].shape == (1, 32)
    assert (out / "config_resolved.yaml").exists()
    assert any((out / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    names = """objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward objective/scores
    objective/kl_coef policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg loss/policy_avg loss/value_avg
    val/clipfrac_avg val/ratio val/ratio_var val/num_eos_tokens val/var_explained eps lr episode tokens_per_second
    seconds/rollout seconds/scoring seconds/update"""
    assert set(names.split()) <= set(lines[0])
    assert lines[0]["objective/kl"] == 0
    assert lines[1]["episode"] == 32
    assert not list(out.rglob("*.pt")) + list(out.rglob("*.bin")) + list(out.rglob("*.pkl"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "/no/such"}, "/no/such: no such tokenizer folder"),
        ({"prompts": "/no/such.txt"}, "/no/such.txt"),
        ({"reward": "/no/such.py:f"}, "/no/such.py: no such Python file"),
        ({"kl_estimator": "k3"}, "only k1 has the gradient"),
        ({"max_new_tokens": 32}, "longer than the model's context of 32"),
        ({"device": "gpu"}, "--device gpu: not a device"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(folders, capsys, options, message):
    assert command(folders, **options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("rlhf ppo: error: ")
    assert message in error
    assert not (folders / "out").exists()


def test_an_empty_prompt_names_its_line(folders, capsys):
    (folders / "prompts.txt").write_text("a\n\nb\n")
    assert command(folders) == 2
    assert "prompts.txt:2: empty prompt" in capsys.readouterr().err


def test_a_faulty_reward_leaves_no_policy_behind(folders, capsys):
    (folders / "reward.py").write_text("def score(prompts, completions):\n    return [0.0]\n")
    assert command(folders) == 2
    assert "returned 1 scores for 16 completions" in capsys.readouterr().err
    assert not list(folders.glob("out/*.safetensors"))


# The watch


def test_the_gold_reward_is_loaded_as_the_reward_is(monkeypatch):
    """It sees what the reward sees, and a folder without a padding token works for both."""
    asked = {}

    def load(source, **options):
        asked[source] = options
        return oracle

    monkeypatch.setattr(ppo, "load_reward", load)
    monkeypatch.setattr(ppo_inputs, "load_reward", load)
    options = {"reward_completion_only": True, "reward_label": "fine", "gold_label": "kind"}
    cfg = config(reward="r", gold_reward="g", pad_token="<pad>", updates=1, **options)
    train_ppo(cfg, model=make_model(TOKENIZER, 0), tokenizer=TOKENIZER, prompts=PROMPTS)
    del asked["r"]["base"]  # an adapter of its own on the policy's base is the reward's alone
    assert asked["g"] == asked["r"] | {"label": "kind"}
    assert asked["g"]["completion_only"] is True


def test_repetition_by_hand():
    assert repetition(["no no no yes", "a b"]) == pytest.approx((2 / 3 + 0) / 2)
    assert repetition([]) == 0


def test_the_watch_names_the_metric():
    model = make_model(TOKENIZER, 0)
    rollout = generate(model, TOKENIZER, PROMPTS, max_new_tokens=5, generator=torch.Generator().manual_seed(0))
    calm = {"objective/kl": 0.1, "val/response_length": 5.0, "val/missing_eos": 0.0, "objective/scores": 0.0}
    wild = calm | {"val/response_length": 11.0, "val/missing_eos": 0.5, "objective/kl": 0.9}
    watch = RewardHackingMonitor(1.0)
    history = [dict(calm), dict(wild)]
    assert watch.check(history[:1], rollout) == []
    warnings = watch.check(history, rollout)
    assert [warning.metric for warning in warnings] == ["objective/kl", "val/response_length", "val/missing_eos"]
    assert [warning.value for warning in warnings] == [0.9, 11.0, 0.5]
    assert watch.check([*history, dict(wild)], rollout) == []  # said once, then quiet for a while
    assert RewardHackingMonitor(1.0, history).check([*history, dict(wild)], rollout) == []  # in a resumed run too
    later = [*history, *(dict(history[1]) for _ in range(9))]
    assert len(RewardHackingMonitor(1.0, later).check([*later, dict(wild)], rollout)) == 3


def test_the_watch_warns_where_nothing_is_written(capsys):
    metrics = train(stop_kl=1e-6).metrics
    assert all({"watch/distinct_2", "watch/repetition"} <= row.keys() for row in metrics)
    assert "warning: objective/kl: " in capsys.readouterr().err


def test_the_watch_sees_the_gold_reward_fall_while_the_score_rises():
    rollout = generate(
        make_model(TOKENIZER, 0), TOKENIZER, PROMPTS, max_new_tokens=5, generator=torch.Generator().manual_seed(0)
    )
    calm = {"objective/kl": 0.1, "val/response_length": 5.0, "val/missing_eos": 0.0}
    history = [calm | {"objective/scores": step / 10, "objective/gold_scores": -step / 10} for step in range(20)]
    (warning,) = RewardHackingMonitor().check(history, rollout)
    assert warning.metric == "objective/gold_scores"
    assert warning.reason.startswith("fell by 1.000 over 10 updates while the score rose 1.0")
