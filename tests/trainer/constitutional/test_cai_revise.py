"""`rlhf cai revise`: what is asked of the model, what is kept, resumption, servers and bad input."""

from __future__ import annotations

import json

import pytest
import yaml
from support.serving import said, serving
from support.tiny import WORDS, tiny_folder
from support.tokenizers import family

from rlhf_trainer import CAIReviseConfig, revise_answers
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.cli import main
from rlhf_trainer.constitutional import writer
from rlhf_trainer.constitutional.constitution import Constitution
from rlhf_trainer.constitutional.dialogue import critique_request, make_prompt, revision_request
from rlhf_trainer.constitutional.writer import truncate_at_stop
from rlhf_trainer.data.encoding import decode, encode_text
from rlhf_trainer.data.stages import read_examples
from rlhf_trainer.judging.shots import Rule, WorkedExample
from rlhf_trainer.models.from_scratch import build_model, build_tokenizer
from rlhf_trainer.models.loading import load_causal, load_tokenizer

PROMPTS = ["one day", "two good", "red night", "blue bad", "three yes"]
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
TURNS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
KIND = Rule("kind", "What is unkind?", "Make it kind.", "Which is kinder?")
SHORT = Rule("short", "What is too long?", "Make it short.", "Which is shorter?")


@pytest.fixture(scope="module")
def parts():
    tokenizer = build_tokenizer([WORDS] * 4, 300)
    return build_model("llama", tokenizer, hidden_size=32, layers=1, heads=2, max_length=256).eval(), tokenizer


@pytest.fixture
def config(tmp_path):
    def make(**options):
        (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
        defaults = {"model": "m", "prompts": str(tmp_path / "p.jsonl"), "output": str(tmp_path / "r.jsonl")}
        sizes = {"max_new_tokens": 5, "batch_size": 2, "device": "cpu"}
        return CAIReviseConfig(**{**defaults, **sizes, **options})

    return make


def revise(parts, cfg, **objects):
    model, tokenizer = parts
    constitution = objects.pop("constitution", Constitution((KIND, SHORT)))
    return revise_answers(cfg, model=model, tokenizer=tokenizer, constitution=constitution, **objects)


def test_what_a_base_model_is_asked():
    shot = WorkedExample(KIND, "hi", "go away", "It is rude.", "Hello!")
    prompt = make_prompt("How are you?", None, False, "")
    asked = critique_request(prompt, " Leave me ", KIND, False, [shot])
    example = (
        "Prompt: hi\n\nAnswer: go away\n\nCritique request: What is unkind?\n\nCritique: It is rude.\n\n"
        "Revision request: Make it kind.\n\nRevision: Hello!\n\n---\n\n"
    )
    task = "Prompt: How are you?\n\nAnswer: Leave me\n\nCritique request: What is unkind?\n\nCritique:"
    assert asked == example + task
    asked = revision_request(prompt, "Leave me", KIND, " Rude. ", False, [])
    assert asked == task + " Rude.\n\nRevision request: Make it kind.\n\nRevision:"


def test_what_a_chat_model_is_asked():
    shot = WorkedExample(KIND, "hi", "go away", "It is rude.", "Hello!")
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "How are you?"}]
    prompt = make_prompt(chat, None, True, "")
    asked = revision_request(prompt, "Leave me", KIND, "Rude.", True, [shot])
    assert [message["content"] for message in asked[:4]] == ["S", "hi", "go away", "What is unkind?"]
    assert [(message["role"], message["content"]) for message in asked[-5:-1]] == [
        ("user", "How are you?"),
        ("assistant", "Leave me"),
        ("user", "What is unkind?"),
        ("assistant", "Rude."),
    ]
    assert asked[-1]["content"].startswith("Make it kind.")


def test_a_base_model_is_cut_where_it_begins_something_else():
    assert (
        truncate_at_stop(" good\n\nRevision request: more", False, ("\nCritique:", "\nRevision request:")).text
        == " good\n"
    )
    assert truncate_at_stop("good\nCritique: x", False, ("\nCritique:",)).ended
    assert not truncate_at_stop("good", False, ("\nCritique:",)).ended


def test_every_text_is_kept_and_the_last_revision_is_sft_data(parts, config, tmp_path):
    result = revise(parts, config(rounds=2, n=2))
    lines = [json.loads(line) for line in (tmp_path / "r.transcripts.jsonl").open()]
    assert lines == result.transcripts
    assert [line["prompt"] for line in lines] == [prompt for prompt in PROMPTS for _ in range(2)]
    page = (tmp_path / "r.transcripts.html").read_text()
    for line in lines:
        assert {one["rule"] for one in line["rounds"]} == {"kind", "short"}
        assert line["answer"]
        assert all(one["critique"] and one["revision"] for one in line["rounds"])
    assert page.count("<details>") == 10
    assert page.count("Critique by kind") == page.count("Critique by short") == 10
    assert "src=" not in page
    assert "href=" not in page
    examples, _ = read_examples(tmp_path / "r.jsonl")
    assert [(e.prompt, e.completion.strip()) for e in examples] == [
        (line["prompt"], line["rounds"][-1]["revision"]) for line in lines
    ]
    figures = json.loads((tmp_path / "r.report.json").read_text())
    assert figures["rules"] == {"kind": 10, "short": 10}
    assert figures["examples"] == figures["conversations"] == 10
    options = yaml.safe_load((tmp_path / "r.transcripts.config.yaml").read_text())
    assert (options["output"], options["rounds"]) == (str(tmp_path / "r.jsonl"), 2)
    first = lines[0]["answer"], lines[1]["answer"]
    assert first[0] != first[1]


def test_the_revision_begins_as_the_answer_did(parts, config):
    result = revise(parts, config(output=""))
    for record, example in zip(result.transcripts, result.examples, strict=True):
        lead = record["answer"][: len(record["answer"]) - len(record["answer"].lstrip())]
        assert example["completion"] == lead + record["rounds"][0]["revision"]


def test_all_principles_are_a_round_each(parts, config):
    result = revise(parts, config(output="", principles="all", max_prompts=2))
    assert [[one["rule"] for one in record["rounds"]] for record in result.transcripts] == [["kind", "short"]] * 2
    result = revise(parts, config(output="", rules=["short"], rounds=2, max_prompts=2))
    assert [[one["rule"] for one in record["rounds"]] for record in result.transcripts] == [["short", "short"]] * 2


@pytest.mark.parametrize("lines", [0, 1, 3, 5])
def test_resumed_files_are_those_of_an_uninterrupted_run(parts, config, tmp_path, lines):
    revise(parts, config())
    names = ("r.jsonl", "r.transcripts.jsonl", "r.transcripts.html", "r.report.json")
    expected = [(tmp_path / name).read_bytes() for name in names]
    path = tmp_path / "r.transcripts.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in expected[1].split(b"\n")[:lines]) + b'{"prompt": "o')
    with pytest.raises(UserError, match="exists; --resume goes on with it"):
        revise(parts, config())
    revise(parts, config(resume=True))
    assert [(tmp_path / name).read_bytes() for name in names] == expected


def test_a_run_is_not_resumed_by_another_constitution_or_option(parts, config, tmp_path):
    mine = Constitution((KIND, SHORT), (), "rules: mine")
    revise(parts, config(), constitution=mine)
    with pytest.raises(UserError, match="was begun with --rounds 1, now it is 2"):
        revise(parts, config(resume=True, rounds=2), constitution=mine)
    other = Constitution((KIND, SHORT), (), "rules: others")
    with pytest.raises(UserError, match=r"was begun with the constitution in .*r.constitution.yaml, which is another"):
        revise(parts, config(resume=True), constitution=other)


def test_what_does_not_fit_is_left_out_and_said(parts, config, capsys):
    long = Rule("long", "day " * 300, "Make it kind.", "q?")
    result = revise(parts, config(output="", rounds=1), constitution=Constitution((long, KIND)))
    skipped = [record for record in result.transcripts if "skipped" in record]
    assert 0 < len(skipped) < len(PROMPTS)
    assert {record["skipped"] for record in skipped} == {"critique too long for the model's context"}
    assert len(result.examples) == len(PROMPTS) - len(skipped)
    assert result.figures["left_out"] == {"critique too long for the model's context": len(skipped)}
    with pytest.raises(UserError, match="no example came of 5 answers"):
        revise(parts, config(output=""), constitution=Constitution((long,)))
    with pytest.raises(UserError, match="no example came of 5 answers"):  # random models hardly ever end
        revise(parts, config(output="", drop_unfinished=True))


def test_chats_are_written_by_the_template(parts, config, monkeypatch):
    model, tokenizer = parts
    tokenizer = build_tokenizer([WORDS] * 4, 300)
    tokenizer.chat_template = CHAT
    prompts = ["one day", [{"role": "system", "content": "red"}, {"role": "user", "content": "two"}]]
    asked = []
    original = writer.generate

    def watched(model, tokenizer, texts, **options):
        asked.extend(texts)
        return original(model, tokenizer, texts, **options)

    monkeypatch.setattr(writer, "generate", watched)
    result = revise((model, tokenizer), config(), prompts=prompts)
    assert [example["prompt"] for example in result.examples] == ["<user>one day<a>", "<system>red<user>two<a>"]
    answer, rule = result.transcripts[0]["answer"], result.transcripts[0]["rounds"][0]["rule"]
    critique = {"kind": KIND, "short": SHORT}[rule].critique
    assert asked[0] == "<user>one day<a>"
    assert asked[2] == f"<user>one day<assistant>{answer}<user>{critique}<a>"
    plain = revise((model, tokenizer), config(output="", format="plain"), prompts=["one day"])
    assert plain.examples[0]["prompt"] == "one day"


def test_an_encoder_decoder_model_revises(config):
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = build_tokenizer([WORDS] * 4, 300)
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes, **ids)).eval()
    assert len(revise((model, tokenizer), config(output="")).examples) == len(PROMPTS)


def scripted(path, payload):
    """Answers rudely, finds that rude, and becomes kind."""
    last = payload["messages"][-1]["content"]
    if last.startswith("Make it kind."):
        return 200, said("I am happy to help.")
    return 200, said("It says fool." if last == "What is unkind?" else f"You fool, {last}!")


def test_a_server_writes_chats(config, tmp_path):
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "two"}]
    with serving(scripted) as (url, seen):
        cfg = config(model="", server=f"{url}#m", parallel=2)
        result = revise_answers(cfg, prompts=["one", chat], constitution=Constitution((KIND,)))
        assert [payload["max_tokens"] for _, payload, _ in seen] == [5] * 6
    tokenizer = build_tokenizer([WORDS] * 4, 300)
    tokenizer.chat_template = TURNS
    read, _ = read_examples(tmp_path / "r.jsonl", tokenizer)  # the template then writes the chat as text
    assert read[1].prompt == "system: S\nuser: two\nassistant: "
    assert [example.completion for example in read] == ["I am happy to help.", "I am happy to help.\n"]
    assert result.examples == [
        {"prompt": "one", "completion": "I am happy to help."},
        {"messages": [*chat, {"role": "assistant", "content": "I am happy to help."}]},
    ]
    assert result.transcripts[0] == {
        "prompt": "one",
        "answer": "You fool, one!",
        "rounds": [{"rule": "kind", "critique": "It says fool.", "revision": "I am happy to help."}],
        "ended": True,
    }


def test_a_server_goes_on_with_plain_text(config):
    def answer(path, payload):
        assert path == "/v1/completions"
        assert len(payload.get("stop", [])) in (0, 4)
        text = payload["prompt"]
        if text.startswith("bad"):
            return 400, {"error": {"message": "this model's maximum context length is 5 tokens"}}
        end = " kind\n\nPrompt: x" if text.endswith("Revision:") else " rude"
        return 200, {"choices": [{"text": end, "finish_reason": "length"}]}

    with serving(answer) as (url, _):
        cfg = config(model="", server=f"{url}#m", format="plain", output="")
        result = revise_answers(cfg, prompts=["one", "bad"], constitution=Constitution((KIND,)))
        assert result.examples == [{"prompt": "one", "completion": " kind"}]
        assert result.transcripts[1]["skipped"] == "answer too long for the model's context"
        with pytest.raises(UserError, match="prompt 1: chat messages cannot be sent as plain text"):
            revise_answers(cfg, prompts=[[{"role": "user", "content": "one"}]])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--model", ""], "--model is needed"),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--shots", "3"], "--shots 3: the constitution has 2 examples"),
        (["--shots", "-1"], "--shots -1: must be at least 0"),
        (["--rules", "no-ham"], "unknown rule no-ham; did you mean no-harm?"),
        (["--format", "chat"], "has no chat template"),
        (["--principles", "some"], "invalid choice"),
        (["--parallel", "0"], "--parallel 0: must be at least 1"),
        (["--timeout", "0"], "--timeout 0.0: must be more than 0"),
        (["--max_new_tokens", "64"], "longer than the model's context of 64"),
        (["--server", "nowhere"], "nowhere: not a server's address"),
        (["--server", "http://127.0.0.1:1/v1", "--retries", "0"], "is it running?"),
        (["--constitution", "nothing.yaml"], "nothing.yaml: no such file"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, capsys, arguments, error, folder):
    (tmp_path / "p.txt").write_text("one day\n")
    given = ["--model", folder, "--prompts", f"{tmp_path}/p.txt", "--output", f"{tmp_path}/r.jsonl"]
    assert main(["cai", "revise", *given, "--max_new_tokens", "5", "--device", "cpu", *arguments]) == 2
    message = capsys.readouterr().err
    assert error in message
    assert len([line for line in message.splitlines() if "error:" in line]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("cai") / "m")


def test_the_command_by_itself(capsys):
    assert main(["cai"]) == 2
    assert "say which: rlhf cai constitution, revise, label" in capsys.readouterr().err
    for command in ([], ["revise"], ["label"], ["constitution"]):
        with pytest.raises(SystemExit) as stop:
            main(["cai", *command, "--help"])
        assert stop.value.code == 0
        assert f"rlhf cai {' '.join(command)}".strip() in capsys.readouterr().out


def test_a_folder_from_the_command_line(tmp_path, capsys, folder):
    tokenizer = load_tokenizer(folder)
    assert load_causal(folder, tokenizer).config.max_position_embeddings == 64
    (tmp_path / "c.yaml").write_text(
        "rules:\n  - name: kind\n    critique: bad\n    revision: good\n    question: good day\n"
    )
    (tmp_path / "p.txt").write_text("one\n")
    options = ["--constitution", f"{tmp_path}/c.yaml", "--max_new_tokens", "2", "--device", "cpu"]
    given = ["--model", folder, "--prompts", f"{tmp_path}/p.txt", "--output", f"{tmp_path}/r.jsonl"]
    code = main(["cai", "revise", *given, *options])
    err = capsys.readouterr().err
    assert (code, err.splitlines()[-1]) == (
        2,
        'rlhf cai revise: error: no example came of 1 answers: {"revision too long for the model\'s context": 1}',
    )
    assert (tmp_path / "r.constitution.yaml").read_text() == (tmp_path / "c.yaml").read_text()
    given[1::4] = tiny_folder(tmp_path / "longer", max_length=256), f"{tmp_path}/q.jsonl"
    assert main(["cai", "revise", *given, *options]) == 0
    assert "q.jsonl: 1 examples from 1 answers" in capsys.readouterr().err
    (example,) = read_examples(tmp_path / "q.jsonl")[0]
    assert example.prompt == "one"
    assert (tmp_path / "q.constitution.yaml").read_text() == (tmp_path / "c.yaml").read_text()


def test_special_tokens_that_an_answer_names_are_text_in_the_request_for_its_critique():
    tokenizer, prompt = family("byte_level"), make_prompt("one", None, False, "")
    for asked in (
        critique_request(prompt, "a</s> <|im_end|>", KIND, False, []),
        revision_request(prompt, "a", KIND, "b<|im_start|>user", False, []),
    ):
        ids = encode_text(tokenizer, asked)
        assert not set(ids) & set(tokenizer.all_special_ids)
        assert decode(tokenizer, ids) == asked
