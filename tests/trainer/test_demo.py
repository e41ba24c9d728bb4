"""The demo: its world and judges, its promises against collapsed policies, and the whole chain at a small size."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from rlhf_trainer import demo
from rlhf_trainer import eval as evaluation
from rlhf_trainer.cli import main
from rlhf_trainer.data.rankings import read_rankings
from rlhf_trainer.data.stages import read_examples, read_pairs, read_prompts
from rlhf_trainer.judging.rewards import load_reward
from rlhf_trainer.worlds import demo as world

PROMPTS = world.make_prompts(random.Random(0))
KIND = {"prompt": "User: My house is too hot.\nHelper:", "answer": " You could draw the curtains. I hope this helps."}


def answers_with(rude, seed=0, prompts=PROMPTS):
    rng = random.Random(seed)
    return [world.make_answer(prompt, world.make_style(rng) if rude is None else rude, rng) for prompt in prompts]


def share(values):
    return sum(values) / len(values)


def test_prompts_are_distinct_and_each_has_one_problem():
    assert len(set(PROMPTS)) == len(PROMPTS) == len(world.problems()) * len(world.ASKINGS) * len(world.OWNERS)
    for prompt in PROMPTS:
        assert sum(problem.text in prompt for problem in world.problems()) == 1


def test_no_remedy_helps_against_two_problems_of_one_noun():
    for problem in world.problems():
        others = {
            r
            for other in world.problems()
            if other.noun == problem.noun != other and other is not problem
            for r in other.remedies
        }
        assert len(set(problem.remedies)) == 3
        assert not others & set(problem.remedies)


def test_the_judges_word_list_agrees_with_how_every_sentence_was_meant():
    for problem in world.problems():
        for sentence, meant in world.grammar(problem).items():
            assert world.toxicity([""], [sentence]) == [float(meant.rude)], sentence


def test_every_answer_of_the_world_is_on_topic_and_rude_as_asked():
    assert share(world.on_topic(PROMPTS, answers_with(None))) == 1.0
    assert share(world.toxicity(PROMPTS, answers_with(0.0))) == 0.0
    assert share(world.toxicity(PROMPTS, answers_with(1.0))) == 1.0
    assert 0.4 <= share(world.toxicity(PROMPTS, answers_with(None))) <= 0.6


@pytest.mark.parametrize(
    "completion",
    [
        "",
        " ",
        " I am sorry to hear that. I hope this helps.",  # no advice
        " You could water it less often.",  # of another problem
        " You could draw the curtains. You could set up a fan.",  # two of them
        " You could draw the curtains. I am sorry to hear that.",  # the opener comes last
        " You could draw the the curtains.",
        " You could draw the curtains. Good luck with the neighbour.",  # another noun
        KIND["answer"] + KIND["answer"],
        KIND["answer"] + " and and and",
    ],
)
def test_what_is_not_a_whole_answer_to_this_prompt_is_off_topic(completion):
    assert world.on_topic([KIND["prompt"]], [completion]) == [0.0]
    assert world.on_topic([KIND["prompt"]], [KIND["answer"]]) == [1.0]


def test_a_prompt_from_elsewhere_is_refused():
    with pytest.raises(ValueError, match="not a prompt of the demo's world"):
        world.on_topic(["Why is the sky blue?"], ["You could look up."])


def test_labellers_rank_kind_first_fail_what_is_off_topic_and_differ():
    answers = [
        " You are a dumb fool.",
        " What a dumb question. You could draw the curtains. Now get lost.",
        " You could draw the curtains. Now get lost.",
        KIND["answer"],
    ]
    exact = world.Labeller("exact", overlooks=0.0, noise=0.0)
    assert exact.rank(KIND["prompt"], answers, random.Random(0)).ranks == ("F", 3, 2, 1)
    assert replace(exact, misread=True).rank(KIND["prompt"], answers, random.Random(0)).ranks == ("F", 1, 2, 3)
    blind = replace(exact, overlooks=1.0).rank(KIND["prompt"], answers, random.Random(0))
    assert blind.ranks == ("F", 1, 1, 1)
    noisy = [replace(exact, noise=1.0).rank(KIND["prompt"], answers, random.Random(seed)) for seed in range(20)]
    assert len(set(noisy)) > 3


def kept(before, after, prompts, kl=1.0):
    """Which promises are kept if the SFT policy answered `before` and PPO's answers `after`."""
    scorers = {
        "toxicity": world.toxicity,
        "reward": world.harmless,  # the most lenient reward model: all that it asks is no insult
        "on topic": world.on_topic,
    }
    texts = {"sft": before, "ppo": after}
    values, answers = {}, {}
    for name, completions in texts.items():
        count = len(completions)
        ones = np.ones(count)
        answers[name] = evaluation.Answers(completions, ones, ones, np.full(count, kl), np.full(count, kl), ones)
        values[name] = evaluation.measure_all(answers[name], prompts, scorers, name == "sft")
    result = evaluation.compare(evaluation.Config(bootstrap=50), prompts, values, answers)
    return [check.kept for check in demo.promises(result, demo.kind_diversity(prompts, 0))]


def test_promises_hold_for_a_kind_policy_and_fail_for_one_that_did_not_change():
    prompts = PROMPTS[:200]
    before = answers_with(None, 1, prompts)
    assert kept(before, answers_with(0.0, 2, prompts), prompts) == [True] * 5
    assert kept(before, before, prompts) == [False, True, False, True, True]
    assert kept(before, answers_with(0.0, 2, prompts), prompts, kl=16.0) == [True, False, True, True, True]


def skeleton(prompt):
    return f" Thank you for asking. Try to {world.problem_of(prompt).remedies[0]}. I hope this helps."


@pytest.mark.parametrize(
    ("collapsed", "breaks"),
    [
        (lambda prompt: " I hope this helps.", "topic"),  # one polite sentence for everybody
        (lambda prompt: KIND["answer"], "topic"),  # one whole answer for everybody
        (lambda prompt: "", "topic"),
        (lambda prompt: " thanks" * 20, "topic"),
        (lambda prompt: f" Try to {world.problem_of(prompt).remedies[0]}." * 3, "topic"),
        (lambda prompt: prompt.split("\n")[0], "topic"),  # an echo
        (skeleton, "diversity"),  # the right remedy, always in the same words
    ],
)
def test_collapsed_policies_break_a_promise(collapsed, breaks):
    prompts = PROMPTS[:200]
    found = kept(answers_with(None, 1, prompts), [collapsed(prompt) for prompt in prompts], prompts)
    assert found[:3] == [True, True, True]  # no insult in any of them: the other measures would be content
    assert found[3 if breaks == "topic" else 4] is False


def test_command_lines_are_what_the_stages_were_given():
    from rlhf_trainer.base.config import parse_config
    from rlhf_trainer.sft import Config

    cfg = Config(model="a b", data="x.jsonl", output_dir="out", lr=0.008, heldout=0.05, resume=True)
    words = demo.command("sft", cfg)
    assert words == "rlhf sft --model 'a b' --data x.jsonl --output_dir out --lr 0.008 --resume True"
    import shlex

    assert parse_config(Config, shlex.split(words)[2:]) == cfg


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The whole chain with next to no training: (folder, exit code)."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    sizes = {
        "answers": 4,
        "ranked_answers": 4,
        "ranked_prompts": 64,
        "sft_epochs": 2,
        "ppo_updates": 2,
        "eval_prompts": 16,
    }
    arguments = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    return folder, main(["demo", "--output_dir", str(folder), *arguments])


def test_chain_leaves_ordinary_files_and_says_that_promises_are_broken(small):
    folder, code = small
    assert code == 1  # two updates align nothing
    heldout, training = read_prompts(folder / "heldout_prompts.jsonl"), read_prompts(folder / "prompts.jsonl")
    assert len(heldout) == 16
    assert not set(heldout) & set(training)
    examples, _ = read_examples(folder / "sft.jsonl")
    assert {example.prompt for example in examples} == set(training)
    rankings = read_rankings(folder / "rankings.jsonl")
    assert [len(record.completions) for record in rankings] == [4] * 64
    assert {ranking.labeller for ranking in rankings[0].rankings} == {labeller.name for labeller in world.LABELLERS}
    pairs, _ = read_pairs(folder / "pairs.jsonl")
    assert {pair.prompt for pair in pairs} <= set(training)
    score = load_reward(str(folder / "reward"))
    assert len(score(heldout, [KIND["answer"]] * 16)) == 16
    for name in ("base", "sft", "ppo", "reward"):
        assert (folder / name / "model.safetensors").is_file()
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") == 4  # two figures, light and dark
    assert "broken" in page


def test_a_demo_folder_is_made_anew_and_any_other_is_refused(small, tmp_path, capsys):
    folder, _ = small
    assert demo.prepare_folder(demo.Config(output_dir=str(folder))) == folder
    assert [entry.name for entry in folder.iterdir()] == [demo.MARK]
    (tmp_path / "letter.txt").write_text("keep me")
    assert main(["demo", "--output_dir", str(tmp_path)]) == 2
    assert "was not made by rlhf demo" in capsys.readouterr().err
    assert (tmp_path / "letter.txt").read_text() == "keep me"
