"""Reward sources: functions, reward models, classifiers; what a faulty one gets to hear."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import tiny_folder
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
)

from rlhf_trainer.base.console import say_once
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.rows import encode_prompt
from rlhf_trainer.judging import rewards
from rlhf_trainer.judging.functions import limited, reward_part, scores_of
from rlhf_trainer.judging.rewards import load_reward, shared_scores
from rlhf_trainer.models.from_scratch import build_tokenizer
from rlhf_trainer.models.loading import load_reward_model, load_tokenizer, save_folder, suppress_transformers_warnings
from rlhf_trainer.models.scoring import NORMALISATION, load_normalisation, score_sequences
from rlhf_trainer.sampling.vllm import to_rollout


def reward_folder(tmp_path, labels=1):
    tokenizer = load_tokenizer(tiny_folder(tmp_path / "base"))
    torch.manual_seed(3)
    model = load_reward_model(tmp_path / "base", tokenizer, num_labels=labels)
    save_folder(tmp_path / "reward", model, tokenizer)
    return tmp_path / "reward"


PROMPTS, COMPLETIONS = ["a", "one two three"], [" good day night", " bad"]


def expected_scores(folder, label=0):
    """One sequence at a time, no padding, transformers' own head on the last position."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = tokenizer(prompt)["input_ids"] + tokenizer(completion, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            scores.append(model.score(model.base_model(ids).last_hidden_state[:, -1])[0, label].item())
    return scores


def test_a_reward_model_scores_the_last_token_of_padded_rows(tmp_path):
    folder = reward_folder(tmp_path)
    assert load_reward(str(folder))(PROMPTS, COMPLETIONS) == pytest.approx(expected_scores(folder), abs=1e-5)


def test_in_bfloat16_the_backbone_is_rounded_before_the_device_takes_it_and_the_head_is_not(tmp_path, monkeypatch):
    folder, placed = reward_folder(tmp_path), {}
    monkeypatch.setattr(PreTrainedModel, "to", lambda *_: pytest.fail("to the device before `place`"))
    monkeypatch.setattr(rewards, "prepare_model", lambda model, device: placed.update(dict(model.named_parameters())))
    reward = load_reward(str(folder), dtype="bfloat16")
    saved = dict(AutoModelForSequenceClassification.from_pretrained(folder).named_parameters())
    assert torch.equal(placed["score.weight"], saved["score.weight"])
    assert torch.equal(
        placed["model.layers.0.mlp.up_proj.weight"], saved["model.layers.0.mlp.up_proj.weight"].bfloat16()
    )
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected_scores(folder), abs=0.02)


def test_normalisation_is_applied(tmp_path):
    folder = reward_folder(tmp_path)
    (folder / NORMALISATION).write_text(json.dumps({"mean": 2.0, "std": 0.5}))
    wanted = [(score - 2.0) / 0.5 for score in expected_scores(folder)]
    assert load_reward(str(folder))(PROMPTS, COMPLETIONS) == pytest.approx(wanted, abs=1e-5)
    (folder / NORMALISATION).write_text("{}")
    with pytest.raises(UserError, match=r"expected .'mean'"):
        load_reward(str(folder))


def test_a_classifiers_class_is_chosen_by_name_or_number(tmp_path):
    folder = reward_folder(tmp_path, labels=3)
    wanted = pytest.approx(expected_scores(folder, label=2), abs=1e-5)
    assert load_reward(str(folder), label="LABEL_2")(PROMPTS, COMPLETIONS) == wanted
    assert load_reward(str(folder), label="2")(PROMPTS, COMPLETIONS) == wanted
    with pytest.raises(UserError, match="say which with --reward_label"):
        load_reward(str(folder))
    with pytest.raises(UserError, match="has no class 'rude'"):
        load_reward(str(folder), label="rude")


def test_batching_does_not_change_scores(tmp_path):
    folder = reward_folder(tmp_path)
    tokenizer = load_tokenizer(folder)
    model = load_reward_model(folder).eval()
    alone = score_sequences(model, tokenizer, PROMPTS, COMPLETIONS, batch_size=1)
    torch.testing.assert_close(score_sequences(model, tokenizer, PROMPTS, COMPLETIONS, batch_size=8), alone)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_text_beyond_the_context_is_scored_without_its_beginning(tmp_path, capsys, kind):
    """It ended the run with "index out of range" where positions are a table."""
    say_once.cache_clear()
    folder = tiny_folder(tmp_path / "model", "gpt2")
    tokenizer, config = load_tokenizer(folder), {"max_position_embeddings": 64, "num_labels": 1, "pad_token_id": 0}
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with suppress_transformers_warnings():
        model = load_reward_model(folder, tokenizer, num_labels=1)
    if kind == "bert":
        model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **size, **config)).eval()
    prompts = [f"{first}{' a good day' * 30}" for first in ("no", "red blue", "no")]
    same, equal, other = score_sequences(model, tokenizer, prompts, [" yes", " yes", " thanks"]).tolist()
    assert same == pytest.approx(equal, rel=1e-5)
    assert other != pytest.approx(same, rel=1e-5)
    assert capsys.readouterr().err.count("texts beyond its 64 tokens are scored without their beginning") == 1


def test_a_function_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def length(prompts, completions):\n    return [len(c) for c in completions]\n")
    assert load_reward(f"{file}:length")(["p"], ["four"]) == [4]
    assert load_reward("math:prod")([2, 3]) == 6
    with pytest.raises(UserError, match="has no function 'width'"):
        load_reward(f"{file}:width")
    with pytest.raises(UserError, match="no such Python file"):
        load_reward(f"{tmp_path}/none.py:f")
    with pytest.raises(UserError, match="No module named 'nosuch'"):
        load_reward("nosuch:f")
    file.write_text("def length(:\n")
    with pytest.raises(UserError, match="cannot be imported: SyntaxError"):
        load_reward(f"{file}:length")
    with pytest.raises(UserError, match="no such model folder"):
        load_reward(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 scores for 2 completions"),
        ([1.0, float("nan")], "returned nan for completion 1: prompt 'q', completion 'b'"),
        ([float("inf"), 1.0], "returned inf for completion 0"),
        (None, "returned NoneType, expected a list of numbers"),
        (["good", "bad"], "the text 'good', expected a list of numbers, for completion 0: prompt 'p'"),
        ("11", "returned str, expected a list of numbers"),
        ({"a": 1.0, "b": 2.0}, "returned dict, expected a list"),
        ({1.0, 2.0}, "returned set, expected a list"),
        ([10**400, 1.0], "a number beyond what a float holds for completion 0"),
        ([1.0, 1e39], r"returned 1e\+39, beyond what float32 holds, for completion 1"),
        ([[1.0, 2.0], 1.0], "returned list for a score, expected a list of numbers, for completion 0"),
        (torch.ones(2, 2), "returned Tensor for a score"),
        ([1j, 1.0], "returned complex for a score"),
        (itertools.count(), "returned 3 or more scores for 2 completions"),
        ((1.0 / number for number in (1, 0)), "raised ZeroDivisionError"),
    ],
)
def test_faulty_scores_are_refused(returned, message):
    with pytest.raises(UserError, match=message):
        scores_of(lambda prompts, completions: returned, ["p", "q"], ["a", "b"])


def test_a_function_that_raises():
    def broken(prompts, completions):
        return 1 / 0

    with pytest.raises(UserError, match="the reward function raised ZeroDivisionError"):
        scores_of(broken, ["p"], ["a"])
    assert scores_of(lambda p, c: torch.tensor([1.0, 2.0]), ["p", "q"], ["a", "b"]).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("raised", "told"), [(SystemExit(0), r"called sys.exit\(0\)"), (asyncio.CancelledError(), "raised CancelledError")]
)
def test_a_function_that_would_end_the_run_in_silence(raised, told):
    def ends(prompts, completions):
        raise raised

    with pytest.raises(UserError, match=told):
        scores_of(ends, ["p"], ["a"])


def test_a_function_may_do_with_its_lists_what_it_likes():
    def empties(prompts, completions):
        scores = [len(prompts.pop() + completions.pop()) for _ in range(2)]
        return scores[::-1]

    prompts, completions = ["p", "qq"], ["a", "b"]
    assert scores_of(empties, prompts, completions).tolist() == [2, 3]
    assert (prompts, completions) == (["p", "qq"], ["a", "b"])


def test_an_async_function_is_awaited_in_one_loop():
    loops = []

    async def judged(prompts, completions):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return [len(text) for text in completions]

    async def within_a_notebook():
        return scores_of(judged, ["p"], ["four"])

    assert scores_of(judged, ["p"], ["four"]).tolist() == [4]
    assert asyncio.run(within_a_notebook()).tolist() == [4]
    assert loops[0] is loops[1]


def test_parts_of_a_batch_are_scored_at_once():
    together = threading.Barrier(3, timeout=20)

    def score(prompts, completions):
        together.wait()
        return [float(text) for text in completions]

    texts = [str(number) for number in range(8)]
    assert scores_of(limited(score, None, 3), texts, texts).tolist() == list(range(8))
    lopsided = limited(lambda prompts, completions: [0.0] * (1 if "0" in prompts else 3), None, 4)
    with pytest.raises(UserError, match="returned 1 scores for 2 completions"):  # eight in all, but of the wrong ones
        scores_of(lopsided, texts, texts)


def test_a_function_that_hangs_is_named_with_its_batch():
    def hangs(prompts, completions):
        while "5" in prompts:
            time.sleep(0.01)
        return [0.0] * len(prompts)

    texts = [str(number) for number in range(8)]
    told = "has not answered within 0.2 s for completions 4 to 7 of the batch, the first to prompt .4.; --reward_time"
    with pytest.raises(UserError, match=told):
        scores_of(limited(hangs, 0.2, 2), texts, texts)
    for options, name in (((0.0, 1), "--reward_timeout 0"), ((None, 0), "--reward_workers 0")):
        with pytest.raises(UserError, match=name):
            limited(hangs, *options)


@pytest.mark.parametrize("record", [{"mean": 0, "std": -1}, {"mean": 0, "std": 0}, {"mean": float("nan"), "std": 1}])
def test_a_normalisation_that_turns_or_destroys_scores_is_refused(tmp_path, record):
    (tmp_path / NORMALISATION).write_text(json.dumps(record))
    with pytest.raises(UserError, match="both must be finite, and std more than 0"):
        load_normalisation(tmp_path)


# Fingerprints, by which a resumed run sees that its reward is another


def test_the_fingerprint_of_a_function_is_of_its_code_and_what_it_uses(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file, helper = tmp_path / "mine_fp.py", tmp_path / "helper_fp.py"

    def part(code, helping="def sign():\n    return 1\n"):
        file.write_text(code)
        helper.write_text(helping)
        for name in ("mine_fp", "helper_fp"):
            sys.modules.pop(name, None)
        return reward_part(load_reward(f"{file}:score"))

    code = "import helper_fp, torch\n\nBONUS = 2\ndef score(p, c):\n    return [helper_fp.sign() * BONUS for _ in c]\n"
    first = part(code)
    assert part(code.replace("\n\n", "\n# a comment\n\n\n")) == first
    for other in ("return [-helper_fp", "BONUS = 3"):
        old = {"return [-helper_fp": "return [helper_fp", "BONUS = 3": "BONUS = 2"}[other]
        assert part(code.replace(old, other)) != first
    assert part(code, "def sign():\n    return 2 - 3\n") != first


def test_the_fingerprint_of_an_object_holds_its_values():
    def scaled(by):
        return lambda prompts, completions: [by * len(text) for text in completions]

    assert reward_part(scaled(1)) == reward_part(scaled(1)) != reward_part(scaled(-1))
    assert reward_part(limited(scaled(1), 1.0, 2)) == reward_part(scaled(1))
    assert reward_part(functools.partial(max, default=1)) != reward_part(functools.partial(max, default=2))


def test_the_fingerprint_of_a_reward_model_names_what_changed(tmp_path):
    folder = reward_folder(tmp_path)
    first = reward_part(load_reward(str(folder)))

    def changed():
        now = reward_part(load_reward(str(folder)))
        return {aspect for aspect in now if now[aspect] != first[aspect]}

    assert changed() == set()
    (folder / NORMALISATION).write_text(json.dumps({"mean": 1.0, "std": 1.0}))
    assert changed() == {"normalisation"}
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5.0
    (folder / "config.json").write_text(json.dumps(config))
    assert changed() == {"normalisation", "config"}
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][::-1]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert changed() == {"normalisation", "config", "rules"}
    weights = load_file(folder / "model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert changed() == {"normalisation", "config", "rules", "weights"}


def rollout_of(tokenizer, prompts, answers, ended=True):
    """A rollout whose answers are these ids."""
    end = [tokenizer.eos_token_id] if ended else []
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    return to_rollout(tokenizer, prompts, rows, [[*answer, *end] for answer in answers], end, torch.device("cpu"))


@pytest.mark.parametrize("ended", [True, False])
def test_a_rollout_reaches_a_reward_model_of_the_same_tokenizer_as_ids(tmp_path, monkeypatch, ended):
    """`goo` + `d` is other tokens than the text `good`, and says <bos> by its id."""
    folder = reward_folder(tmp_path)
    reward, tokenizer = load_reward(str(folder)), load_tokenizer(folder)
    letters = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "good"]
    assert letters != tokenizer("good", add_special_tokens=False)["input_ids"]
    answers = [[*letters, tokenizer.bos_token_id, letters[0]], letters[:2]]
    rollout = rollout_of(tokenizer, PROMPTS, answers, ended)
    found = shared_scores(reward, rollout, tokenizer, 1)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for prompt, answer, score in zip(PROMPTS, answers, found.tolist(), strict=True):
        ids = torch.tensor([[*encode_prompt(tokenizer, prompt), *answer, tokenizer.eos_token_id]])
        with torch.no_grad():
            wanted = model.score(model.base_model(ids).last_hidden_state[:, -1])[0, 0].item()
        assert score == pytest.approx(wanted, abs=1e-5)
    other = build_tokenizer(["one two three"], 270)
    by_text = shared_scores(reward, rollout, other, 1)
    assert by_text.tolist() == pytest.approx(reward(rollout.prompts, rollout.completions))
    assert by_text[0] != pytest.approx(found[0].item())


def test_special_tokens_in_an_answer_are_text_to_a_reward_model(tmp_path):
    folder = reward_folder(tmp_path)
    tokenizer, rows = load_tokenizer(folder), []
    answer = " yes<eos> no"
    model = load_reward_model(folder, tokenizer).eval()
    model.base_model.register_forward_pre_hook(
        lambda module, args, options: rows.append(options["input_ids"].tolist()[0]), with_kwargs=True
    )
    score_sequences(model, tokenizer, ["<bos>a"], [answer])
    assert rows[0].count(tokenizer.eos_token_id) == 1
    assert rows[0].count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(rows[0]) == f"<bos>a{answer}<eos>"
