"""Readers: every format, every malformed line named as `file:line: reason`, odd records counted."""

from __future__ import annotations

import gzip
import json

import pytest

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.files import read_jsonl, write_jsonl
from rlhf_trainer.data.records import Example, Pair, split_heldout
from rlhf_trainer.data.rows import encode_prompt
from rlhf_trainer.data.stages import read_examples, read_pairs, read_prompts
from rlhf_trainer.models.from_scratch import build_tokenizer


def lines(path, *records):
    text = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")
    return path


class ChatTokenizer:
    """What the readers use of a tokenizer: a template that ends each turn with EOS and a line end."""

    chat_template = "there is one"
    eos_token = "<eos>"
    bos_token = None

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert tokenize is False
        text = "".join(f"<{m['role']}>{m['content']}<eos>\n" for m in messages)
        return text + "<assistant>" * add_generation_prompt


def test_text_prompts(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffone\r\ntwo words \nünïcödé".encode())
    assert read_prompts(tmp_path / "p.txt") == ["one", "two words ", "ünïcödé"]


def test_json_prompts_text_and_chat(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    path = lines(tmp_path / "p.jsonl", {"prompt": "a"}, "", {"prompt": chat}, {"messages": chat})
    assert read_prompts(path, ChatTokenizer()) == ["a", *["<user>hi<eos>\n<assistant>"] * 2]


def test_the_answer_at_the_end_of_messages_is_no_prompt(tmp_path):
    """A file of rlhf sft's data serves as prompts; where "prompt" holds the chat, it is all the prompt."""
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    path = lines(tmp_path / "p.jsonl", {"messages": chat}, {"prompt": chat})
    assert read_prompts(path, ChatTokenizer()) == [
        "<user>hi<eos>\n<assistant>",
        "<user>hi<eos>\n<assistant>yes<eos>\n<assistant>",
    ]
    path = lines(tmp_path / "q.jsonl", {"messages": chat}, {"messages": chat[1:]})
    with pytest.raises(UserError, match=r"q\.jsonl:2: no message to answer"):
        read_prompts(path, ChatTokenizer())


def test_a_template_that_writes_bos_does_not_double_it(tmp_path):
    tokenizer = build_tokenizer(["hi there"], 300)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    path = lines(tmp_path / "p.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    ids = encode_prompt(tokenizer, read_prompts(path, tokenizer)[0])
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_a_template_that_fails_names_the_line(tmp_path):
    tokenizer = build_tokenizer(["hi there"], 300)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = lines(tmp_path / "p.jsonl", {"prompt": "a"}, {"messages": [{"role": "user", "content": "hi"}]})
    with pytest.raises(UserError, match=r"p\.jsonl:2: the tokenizer's chat template failed: roles must alternate"):
        read_prompts(path, tokenizer)


def test_gz_is_read_like_plain(tmp_path):
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as file:
        file.write('{"prompt": "a"}\n')
    assert read_prompts(tmp_path / "p.jsonl.gz") == ["a"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"prompt": "a"}\n{"prompt" "b"}\n', r":2: not JSON: Expecting ':'"),
        ('{"prompt": "a"}\n[1]\n', ":2: expected a JSON object, got list"),
        ('{"prompt": "a"}\n\n{"text": "b"}\n', ":3: no field 'prompt'; the fields are text"),
        ('{"prompt": 3}\n', ":1: field 'prompt' is int, expected text"),
        ('{"prompt": "a"}\n{"prompt": "  "}\n', ":2: empty prompt"),
        ('{"prompt": "\\ud800"}\n', ":1: field 'prompt' holds half of a surrogate pair"),
        ('{"prompt": [{"role": "user"}]}\n', ":1: no field 'content'"),
        ('{"prompt": [{"role": "user", "content": "hi"}]}\n', ":1: chat messages need a tokenizer with a chat"),
        ("[" * 100_000 + "\n", ":1: not usable JSON: nested too deeply"),
        ("", ": no prompt in it"),
    ],
)
def test_malformed_prompts_name_file_and_line(tmp_path, content, reason):
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=reason) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_name_the_line(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"p\.txt:2: not UTF-8"):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"no gzip at all", lambda b: b[:10] + b"x" * 9]
)
def test_damaged_gz(tmp_path, damage):
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(damage(gzip.compress(b'{"prompt": "a"}\n' * 100)))
    with pytest.raises(UserError, match=r"p\.jsonl\.gz:\d+: damaged gzip"):
        read_prompts(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.jsonl: no such file"):
        read_prompts(tmp_path / "nothing.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=r"folder\.jsonl: the data set cannot be loaded"):
        read_prompts(tmp_path / "folder.jsonl")


def test_example_formats(tmp_path):
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    path = lines(
        tmp_path / "s.jsonl",
        {"prompt": "p", "completion": " c"},
        {"instruction": "do", "input": "", "output": "done"},
        {"instruction": "do", "input": "this", "output": "done"},
        {"messages": chat},
    )
    examples, findings = read_examples(path, ChatTokenizer())
    first = "<user>a<eos>\n<assistant>"
    assert examples == [
        Example("p", " c"),
        Example("do\n\n", "done"),
        Example("do\n\nthis\n\n", "done"),
        Example(first, "b"),
        Example(f"{first}b<eos>\n<user>c<eos>\n<assistant>", "d"),
    ]
    assert findings.lines == {}


def test_text_file_is_one_example_a_line(tmp_path):
    (tmp_path / "s.txt").write_text("one\n\ntwo\n")
    examples, findings = read_examples(tmp_path / "s.txt")
    assert examples == [Example("", "one"), Example("", "two")]
    assert findings.lines == {"empty completion, dropped": [2]}


def test_odd_examples_are_counted_or_an_error(tmp_path):
    good, bare = {"prompt": "p", "completion": "c"}, {"prompt": "", "completion": "c"}
    path = lines(tmp_path / "s.jsonl", good, {"prompt": "p", "completion": " "}, good, bare)
    examples, findings = read_examples(path)
    assert examples == [Example("p", "c"), Example("p", "c"), Example("", "c")]
    assert findings.lines == {"empty completion, dropped": [2], "duplicate": [3], "empty prompt": [4]}
    assert "3 examples; 1 x empty completion, dropped (first: line 2)" in findings.summary(3, "examples")
    with pytest.raises(UserError, match=r"s\.jsonl:2: empty completion, dropped"):
        read_examples(path, strict=True)


def test_pair_formats(tmp_path):
    shared = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    user = {"role": "user", "content": "q"}
    good, bad = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
    path = lines(
        tmp_path / "p.jsonl",
        {"prompt": "p", "chosen": "x", "rejected": "y", "label": 0.5, "margin": 2},
        {"chosen": f"{shared} I see", "rejected": f"{shared} I say"},
        # the answers of the first turn already differ: what follows belongs to the completions
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: d", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        {"chosen": [user, good], "rejected": [user, bad]},
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
    )
    pairs, findings = read_pairs(path, ChatTokenizer())
    prompt = "<user>q<eos>\n<assistant>"
    assert pairs == [
        Pair("p", "x", "y", label=0.5, margin=2.0),
        Pair(shared, " I see", " I say"),
        Pair("\n\nHuman: a\n\nAssistant:", " b\n\nHuman: d", " c"),
        Pair(prompt, "yes", "no"),
        Pair(prompt, "yes", "no"),
    ]
    assert findings.lines == {"duplicate": [5]}


def test_odd_pairs(tmp_path):
    pair = {"prompt": "p", "chosen": "x", "rejected": "y"}
    path = lines(
        tmp_path / "p.jsonl",
        pair,
        {"prompt": "p", "chosen": "y", "rejected": "x"},
        pair,
        {"prompt": "p", "chosen": "x", "rejected": "x"},
        {"prompt": "p", "chosen": "x", "rejected": ""},
        {"prompt": "", "chosen": "x", "rejected": "y"},
    )
    pairs, findings = read_pairs(path)
    assert len(pairs) == 4
    assert findings.lines == {
        "contradicts an earlier pair": [2, 3],
        "duplicate": [3],
        "chosen equals rejected, dropped": [4],
        "empty answer, dropped": [5],
        "empty prompt": [6],
    }
    with pytest.raises(UserError, match=r"p\.jsonl:2: contradicts an earlier pair"):
        read_pairs(path, strict=True)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": "a", "rejected": "b"}, "share no beginning up to 'Assistant:'"),
        ({"prompt": "p", "chosen": "a"}, "no field 'rejected'"),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "label": 1.5},
            r"'label' is 1.5, expected a number in \[0, 1\]",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": float("nan")}, "'margin' is nan"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": True}, "'margin' is True"),
    ],
)
def test_malformed_pairs(tmp_path, record, reason):
    with pytest.raises(UserError, match=rf":1: .*{reason}"):
        read_pairs(lines(tmp_path / "p.jsonl", record))


def test_split_keeps_groups_together_and_depends_on_the_seed_alone():
    records = [(group, item) for group in range(50) for item in range(3)]
    training, heldout = split_heldout(records, 0.2, 0, group=lambda record: record[0])
    assert sorted(training + heldout) == records
    assert len(heldout) == 30
    assert not {group for group, _ in training} & {group for group, _ in heldout}
    assert split_heldout(records, 30, 0, group=lambda record: record[0]) == (training, heldout)
    assert split_heldout(records, 0.2, 1, group=lambda record: record[0]) != (training, heldout)
    assert split_heldout(records, 0, 0, group=lambda record: record[0]) == (records, [])


def test_split_that_leaves_nothing_is_an_error():
    with pytest.raises(UserError, match="leaves none of the 3 records"):
        split_heldout([1, 2, 3], 3, 0, group=lambda record: record)
    with pytest.raises(UserError, match="one prompt"):
        split_heldout([1, 2, 3], 1, 0, group=lambda record: 0)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_jsonl(tmp_path / "new" / "x.jsonl", [{"a": "ü"}])
    assert [record for _, record in read_jsonl(path)] == [{"a": "ü"}]
    with pytest.raises(TypeError):
        write_jsonl(path, [{"a": 1}, {"a": object()}])
    assert [record for _, record in read_jsonl(path)] == [{"a": "ü"}]
    assert [entry.name for entry in path.parent.iterdir()] == ["x.jsonl"]


def test_one_record_says_how_to_go_without_a_held_out_part():
    with pytest.raises(UserError, match="--heldout 0, or a file for it by --eval_data"):
        split_heldout(["a"], 0.05, 0, lambda record: record)


def test_a_name_in_gz_is_written_compressed_and_the_same_each_time(tmp_path):
    records = [{"prompt": "é\u2028"}, {"prompt": "b"}]
    first, second = (write_jsonl(tmp_path / name, records).read_bytes() for name in ("a.jsonl.gz", "b.jsonl.gz"))
    assert first == second
    assert [record for _, record in read_jsonl(tmp_path / "a.jsonl.gz")] == records


def test_a_json_array_is_read_as_json_lines_are(tmp_path):
    """The form of Alpaca's own file."""
    records = [{"instruction": "Say", "input": "", "output": f" it {i}"} for i in range(3)]
    (tmp_path / "alpaca.json").write_text(json.dumps(records, indent=2))
    examples, _ = read_examples(tmp_path / "alpaca.json")
    assert [(example.completion, example.line) for example in examples] == [(" it 0", 2), (" it 1", 7), (" it 2", 12)]
    (tmp_path / "prompts.json").write_text('[{"prompt": "one"}, {"prompt": "two"}]')
    assert read_prompts(tmp_path / "prompts.json") == ["one", "two"]
    (tmp_path / "cut.json").write_text('[{"prompt": "one"},\n {"pro')
    with pytest.raises(UserError, match=r"cut.json:2: not JSON"):
        read_prompts(tmp_path / "cut.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": 2} {"a": 3}\n', ":2: not JSON: there is more after the object, at column 9"),
        ('{"a": 1}\n {"a": }\n', ":2: not JSON: Expecting value"),
        ('[{"a": 1},\n {"a":\n }]\n', ":3: not JSON: Expecting value"),
        ("[\n\n 7]\n", ":3: expected a JSON object, got int"),
    ],
)
def test_a_broken_object_is_named_by_its_line(tmp_path, text, message):
    file = tmp_path / "x.jsonl"
    file.write_text(text)
    with pytest.raises(UserError) as raised:
        list(read_jsonl(file))
    assert message in str(raised.value)
