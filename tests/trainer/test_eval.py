"""Evaluation: estimates and their intervals, KL against a known value, scorers, and what it leaves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.tiny import WORDS, tiny_folder
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from rlhf_trainer import eval as evaluation
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.cli import main
from rlhf_trainer.data.files import read_jsonl, write_jsonl
from rlhf_trainer.data.rows import encode_completion, encode_prompt
from rlhf_trainer.judging.rewards import load_reward
from rlhf_trainer.models.loading import load_causal, load_tokenizer
from rlhf_trainer.reports import estimates, intervals

PROMPTS = [f"{a} {b}" for a in ("one", "two", "three", "red", "blue") for b in ("day", "night", "good", "bad")]
MEASURE = """
def longer(prompts, completions):
    return [float(len(completion)) for completion in completions]

def broken(prompts, completions):
    return [float("nan")] * len(completions)
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    tiny_folder(root / "sft", seed=0)
    tiny_folder(root / "ppo", seed=1)
    write_jsonl(root / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    (root / "measure.py").write_text(MEASURE)
    return root


def config(places, output, **options):
    given = {"before": f"{places}/sft", "after": [f"{places}/ppo"], "prompts": f"{places}/prompts.jsonl"}
    return evaluation.Config(**{**given, "output_dir": str(output), "max_new_tokens": 6, "bootstrap": 200, **options})


def test_bootstrap_interval_has_the_width_of_the_standard_error():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = intervals.estimate(values, 4000, seed=0)
    half = 1.96 * values.std() / 20
    assert found["mean"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert intervals.estimate(values, 4000, seed=0) == found


def test_bootstrap_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(1)
    found = [intervals.estimate(rng.exponential(1.0, 100), 300, seed) for seed in range(300)]
    assert 0.90 <= np.mean([interval["low"] <= 1.0 <= interval["high"] for interval in found]) <= 0.98


def test_interval_of_constants_is_a_point():
    assert intervals.estimate(np.full(10, 3.0), 50, 0) == {"mean": 3.0, "low": 3.0, "high": 3.0}


def test_distinct_counts_grams_over_all_texts():
    value, left_out = evaluation.distinct(["a b c", "a b d"], 2)  # ab bc ab bd
    assert value == 3 / 4
    assert left_out.tolist() == [1.0, 1.0]
    assert evaluation.distinct(["a b a", "a"], 1)[0] == 2 / 4
    assert evaluation.distinct(["", ""], 2)[0] == 0.0
    assert evaluation.distinct([], 2)[0] == 0.0


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=200)
    left_out = (values.sum() - values) / 199
    found = intervals.jackknife(values.mean(), left_out)
    assert found["high"] - found["mean"] == pytest.approx(1.972 * values.std(ddof=1) / np.sqrt(200), rel=1e-3)
    assert found["mean"] - found["low"] == pytest.approx(found["high"] - found["mean"])


def test_perplexity_is_a_ratio_of_sums_whose_interval_covers_the_truth():
    """Long completions are the less surprising ones, so that a mean over completions is another number."""
    columns = np.array([[2.0, 3.0], [1.0, 9.0]])
    assert intervals.bootstrap_sums(estimates.perplexity, columns, 50, 0)["mean"] == pytest.approx(np.exp(5 / 10))
    rng, covered = np.random.default_rng(0), 0
    truth = np.exp((1 / 2 + 20 / 8) / (1 + 20))
    for seed in range(300):
        long = rng.random(150) < 0.5
        tokens = np.where(long, 20.0, 1.0)
        nats = tokens * np.where(long, 1 / 8, 1 / 2) * rng.exponential(1.0, 150)
        found = intervals.bootstrap_sums(estimates.perplexity, np.stack([nats, tokens]), 300, seed)
        covered += found["low"] <= truth <= found["high"]
    assert 0.90 <= covered / 300 <= 0.98


def test_change_of_perplexity_is_paired():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 30, 200).astype(float)
    nats = tokens * rng.exponential(1.0, 200)
    same = intervals.bootstrap_sums(
        estimates.perplexity_change, np.stack([nats, tokens, nats, tokens]), resamples=100, seed=0
    )
    assert same == {"mean": 0.0, "low": 0.0, "high": 0.0}
    more = intervals.bootstrap_sums(
        estimates.perplexity_change, np.stack([nats + tokens, tokens, nats, tokens]), resamples=100, seed=0
    )
    ratio = nats.sum() / tokens.sum()
    assert more["mean"] == pytest.approx(np.exp(ratio + 1) - np.exp(ratio))
    assert more["low"] > 0


def test_perplexity_is_the_first_policys_per_token_and_untempered(places, tmp_path, monkeypatch):
    right, rollouts = evaluation.generate, []
    monkeypatch.setattr(
        evaluation, "generate", lambda *args, **options: rollouts.append(right(*args, **options)) or rollouts[-1]
    )
    result = evaluation.measure_policies(config(places, tmp_path, temperature=0.5, batch_size=7))
    tokenizer = load_tokenizer(places / "sft")
    model = load_causal(places / "sft", tokenizer)
    for name, own in (("sft", rollouts[:3]), ("ppo", rollouts[3:])):
        nats, tokens, each = 0.0, 0, []
        for rollout in own:
            for ids, mask in zip(rollout.ids, rollout.mask, strict=True):
                row, counted = ids[mask], int(mask[rollout.prompt_length :].sum())
                with torch.no_grad():
                    logs = model(input_ids=row.unsqueeze(0)).logits[0, :-1].double().log_softmax(-1)
                found = -logs.gather(-1, row[1:, None])[-counted:].sum().item()
                nats, tokens, each = nats + found, tokens + counted, [*each, np.exp(found / counted)]
        estimate = result["policies"][name]["measures"][evaluation.PERPLEXITY]
        assert estimate["mean"] == pytest.approx(np.exp(nats / tokens), rel=1e-4)
        assert estimate["low"] < estimate["mean"] < estimate["high"]
        shown = [sample["measures"][name][evaluation.PERPLEXITY] for sample in result["samples"]]
        np.testing.assert_allclose(shown, each, rtol=1e-4)


def test_kl_is_that_of_the_two_distributions(places, tmp_path):
    prompt = "one day"
    write_jsonl(tmp_path / "same.jsonl", [{"prompt": prompt}] * 1500)
    options = {"prompts": f"{tmp_path}/same.jsonl", "max_prompts": 1500, "max_new_tokens": 1, "batch_size": 500}
    result = evaluation.measure_policies(config(places, tmp_path, **options, temperature=0.5))
    tokenizer = load_tokenizer(places / "sft")
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    logs = [
        (load_causal(places / name, tokenizer)(input_ids=ids).logits[0, -1].double() / 0.5).log_softmax(-1)
        for name in ("ppo", "sft")
    ]
    exact = (logs[0].exp() * (logs[0] - logs[1])).sum().item()
    found = result["policies"]["ppo"]["measures"]
    assert exact > 0.01
    assert found["KL (nats)"] == {"mean": pytest.approx(exact, rel=1e-4), "low": None, "high": None}  # one prompt
    error = (logs[0].exp() * (logs[0] - logs[1] - exact) ** 2).sum().item() ** 0.5 / 1500**0.5
    assert found["KL of the sampled tokens (nats)"]["mean"] == pytest.approx(exact, abs=4 * error)
    assert result["policies"]["sft"]["measures"]["KL (nats)"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_a_policy_equal_to_the_reference_is_at_kl_zero_and_answers_the_same(places, tmp_path):
    result = evaluation.measure_policies(
        config(places, tmp_path, after=[f"copy={places}/sft"], measures=[f"chars={places}/measure.py:longer"])
    )
    assert result["policies"]["copy"] == result["policies"]["sft"]
    for name, change in result["changes"]["copy"].items():
        assert change["mean"] == 0
        assert (change["low"] == change["high"] == 0) is (name != "ended by itself")  # a share may yet differ


def test_several_completions_of_a_prompt_are_one_observation(places, tmp_path):
    """--n 6: the intervals are over the prompts, those of a measure that the prompt decides as with --n 1."""
    (tmp_path / "own.py").write_text(
        "def of_prompt(prompts, completions):\n    return [len(p) + 0.5 for p in prompts]\n"
    )
    options = {"max_prompts": 5, "measures": [f"own={tmp_path}/own.py:of_prompt"]}
    once, often = (evaluation.measure_policies(config(places, tmp_path, n=n, **options)) for n in (1, 6))
    assert once["prompts"] == often["prompts"] == 5
    assert len(often["samples"]) == 30
    first, second = (found["policies"]["ppo"]["measures"]["own"] for found in (once, often))
    assert second == pytest.approx(first)
    assert (
        evaluation.measure_policies(config(places, tmp_path, n=6, max_prompts=1))["changes"]["ppo"]["length (tokens)"][
            "low"
        ]
        is None
    )


def save_classifier(tokenizer, folder, problem=None):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    labels = {"id2label": {0: "fine", 1: "toxic", 2: "odd"}, "label2id": {"fine": 0, "toxic": 1, "odd": 2}}
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=len(tokenizer), **shape, **labels, problem_type=problem)
    )
    model.score.weight.data.mul_(50)  # a random head hardly differs from class to class
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_toxicity_is_the_probability_of_the_class(places, tmp_path, problem):
    tokenizer = load_tokenizer(places / "sft")
    save_classifier(tokenizer, tmp_path / "classifier", problem)
    scorer = evaluation.load_toxicity(
        config(places, tmp_path, toxicity=f"{tmp_path}/classifier", toxicity_label="toxic"), torch.device("cpu")
    )
    completions = [" good", " a good night thanks"]
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier").eval()
    for completion, score in zip(completions, scorer(PROMPTS[:2], completions), strict=True):
        ids = encode_prompt(tokenizer, PROMPTS[completions.index(completion)]) + encode_completion(
            tokenizer, completion
        )
        logits = again.score(again.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1])
        expected = logits.sigmoid() if problem else logits.softmax(-1)
        assert score == pytest.approx(expected[1].item(), rel=1e-4)
    with pytest.raises(UserError, match="--toxicity_label"):
        evaluation.load_toxicity(config(places, tmp_path, toxicity=f"{tmp_path}/classifier"), torch.device("cpu"))


def test_a_name_without_a_folder_is_the_hubs(places, tmp_path, monkeypatch):
    """As in the detoxification lab: --toxicity owner/classifier, which is neither a folder nor a function."""
    save_classifier(load_tokenizer(places / "sft"), tmp_path / "owner" / "classifier")
    asked = []
    real = evaluation.load_reward_model, evaluation.load_tokenizer
    monkeypatch.setattr(
        evaluation,
        "load_reward_model",
        lambda name, **options: asked.append(name) or real[0](tmp_path / name, **options),
    )
    monkeypatch.setattr(
        evaluation, "load_tokenizer", lambda name, *options, **more: real[1](tmp_path / name, *options, **more)
    )
    cfg = config(places, tmp_path, toxicity="owner/classifier", toxicity_label="toxic")
    (score,) = evaluation.load_toxicity(cfg, torch.device("cpu"))(PROMPTS[:1], [" good"])
    assert asked == ["owner/classifier"]
    assert 0 < score < 1


def test_reward_of_a_classifier_is_its_class_and_may_see_the_completion_alone(places, tmp_path):
    folder = tmp_path / "classifier"
    save_classifier(load_tokenizer(places / "sft"), folder)
    options = {"reward": str(folder), "reward_label": "fine"}
    found = {}
    for alone in (False, True):
        cfg = config(places, tmp_path, **options, reward_completion_only=alone)
        found[alone] = evaluation.load_scorers(cfg, torch.device("cpu"))["reward"](PROMPTS[:2], [" good", " night"])
        direct = load_reward(str(folder), label="fine", completion_only=alone)
        assert found[alone] == direct(PROMPTS[:2], [" good", " night"])
    assert found[False] != found[True]


def test_a_judge_reads_a_chat_without_the_templates_tokens(places, tmp_path):
    tiny_folder(tmp_path / "chat")
    tokenizer = load_tokenizer(tmp_path / "chat")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    user = {"role": "user", "content": "good day"}
    turns = [user, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "one"}]
    write_jsonl(tmp_path / "chats.jsonl", [{"prompt": [user]}, {"messages": [user, turns[1]]}, {"prompt": turns}])
    seen = []

    def judge(prompts, answers, others):
        seen.extend(prompts)
        return [0.5] * len(prompts)

    cfg = config(
        places, tmp_path, before=f"{tmp_path}/chat", after=[f"{places}/ppo"], prompts=f"{tmp_path}/chats.jsonl"
    )
    evaluation.measure_policies(cfg, judge=judge)
    assert seen[:3] == ["good day", "good day", "user: good day\n\nassistant: yes\n\nuser: one"]


def test_run_leaves_figures_completions_and_a_page(places, tmp_path, capsys):
    arguments = ["--before", f"{places}/sft", "--after", f"{places}/ppo", f"other={places}/sft"]
    arguments += ["--prompts", f"{places}/prompts.jsonl", "--output_dir", str(tmp_path), "--max_new_tokens", "6"]
    arguments += ["--reward", f"{places}/measure.py:longer", "--max_prompts", "12", "--bootstrap", "50"]
    assert main(["eval", *arguments]) == 0
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert list(figures["policies"]) == ["sft", "ppo", "other"]
    assert figures["prompts"] == 12
    rows = [record for _, record in read_jsonl(tmp_path / "completions.jsonl")]
    assert [record["prompt"] for record in rows] == PROMPTS[:12]
    for name in figures["policies"]:
        scores = [record["measures"][name]["reward"] for record in rows]
        assert scores == [len(record["completions"][name]) for record in rows]
        assert figures["policies"][name]["measures"]["reward"]["mean"] == pytest.approx(np.mean(scores))
    assert figures["policies"]["other"]["measures"]["win rate by reward"]["mean"] == 0.5
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2  # light and dark
    assert "report.html" in capsys.readouterr().out


def test_same_seed_same_figures(places, tmp_path):
    first, second, other = (evaluation.measure_policies(config(places, tmp_path, seed=seed)) for seed in (3, 3, 4))
    assert first == second
    assert first["samples"] != other["samples"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"after": []}, "--after is needed"),
        ({"after": ["a/ppo", "b/ppo"]}, "two policies are called 'ppo'"),
        ({"measures": ["nameless"]}, "--measures nameless: expected name=file.py:function"),
        ({"measures": ["a=m.py:f", "a=m.py:g"]}, "two measures are called 'a'"),
        ({"reward": "m.py:f", "measures": ["reward=m.py:g"]}, "two measures are called 'reward'"),
        ({"measures": ["kl=m.py:f"]}, r"two measures are called 'KL \(nats\)'"),
        ({"prompts": "none.jsonl"}, "none.jsonl: no such file"),
        ({"temperature": 0.0}, "--temperature 0.0: must be more than 0"),
        ({"max_new_tokens": 63}, "longer than the model's context of 64"),
    ],
)
def test_bad_options(places, tmp_path, options, reason):
    with pytest.raises(UserError, match=reason):
        evaluation.run(config(places, tmp_path / "out", **options))
    assert not (tmp_path / "out" / "eval.json").exists()


def test_a_measure_that_returns_nan_is_named(places, tmp_path):
    with pytest.raises(UserError, match="the strange function returned nan for completion 0"):
        evaluation.run(config(places, tmp_path, measures=[f"strange={places}/measure.py:broken"]))
    assert not (tmp_path / "eval.json").exists()


def test_policies_of_different_vocabularies_are_refused(places, tmp_path):
    tiny_folder(tmp_path / "alien", text=WORDS.replace("o", "u"))
    with pytest.raises(UserError, match="different vocabularies"):
        evaluation.run(config(places, tmp_path / "out", after=[f"{tmp_path}/alien"]))
