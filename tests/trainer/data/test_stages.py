"""One reader for all stages: every source, every form of a record, and no field that vanishes without a word."""

from __future__ import annotations

import csv
import gzip
import json

import pytest
from datasets import Dataset
from support.tokenizers import family

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.records import DataReport, Pair, check_pairs
from rlhf_trainer.data.stages import read_examples, read_pairs, read_prompts

QUESTION = {"role": "user", "content": "q"}
YES, NO = ({"role": "assistant", "content": text} for text in "ab")
READERS = {"prompts": read_prompts, "examples": read_examples, "pairs": read_pairs}
RECORDS = {
    "prompts": [{"prompt": "one"}, {"prompt": "two\nlines"}],
    "examples": [{"prompt": "one", "completion": " a"}, {"prompt": "two\nlines", "completion": " b"}],
    "pairs": [
        {"prompt": "one", "chosen": " a", "rejected": " b", "label": 1.0},
        {"prompt": "two\nlines", "chosen": " b", "rejected": " a", "label": 0.5},
    ],
}


def written(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def found(reader, path, **options):
    result = READERS[reader](path, family("byte_level"), **options)
    return result if reader == "prompts" else result[0]


def table(path, records, delimiter):
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w", newline="") as file:
        rows = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
        rows.writeheader()
        rows.writerows(records)


SOURCES = {
    "r.json": lambda path, records: path.write_text(json.dumps(records, indent=1)),
    "r.csv": lambda path, records: table(path, records, ","),
    "r.csv.gz": lambda path, records: table(path, records, ","),
    "r.tsv": lambda path, records: table(path, records, "\t"),
    "r.parquet": lambda path, records: Dataset.from_list(records).to_parquet(path),
    "folder": lambda path, records: Dataset.from_list(records).save_to_disk(path),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("reader", READERS)
def test_every_source_is_read_by_every_stage(tmp_path, reader, source):
    wanted = found(reader, written(tmp_path / "r.jsonl", *RECORDS[reader]))
    SOURCES[source](tmp_path / source, RECORDS[reader])
    assert found(reader, tmp_path / source) == wanted
    assert len(wanted) == 2


def test_a_markdown_table_is_read(tmp_path):
    (tmp_path / "r.md").write_text(
        "# Pairs\n\n| instruction | chosen | rejected |\n|:---|----|---:|\n| say \\| it | yes | no |\n| two | a | b |\n"
    )
    assert found("pairs", tmp_path / "r.md") == [Pair("say | it\n\n", "yes", "no"), Pair("two\n\n", "a", "b")]


def test_an_instruction_is_the_same_prompt_in_every_stage(tmp_path):
    said = {"instruction": "do", "input": "it"}
    prompt = "do\n\nit\n\n"
    path = written(tmp_path / "r.jsonl", said | {"output": "x", "chosen": "x", "rejected": "y"})
    assert found("prompts", path) == [prompt]
    assert found("examples", written(tmp_path / "e.jsonl", said | {"output": "x"}))[0].prompt == prompt
    assert found("pairs", written(tmp_path / "p.jsonl", said | {"chosen": "x", "rejected": "y"}))[0].prompt == prompt


@pytest.mark.parametrize("prompt", ["q", [QUESTION]])
@pytest.mark.parametrize("repeated", [False, True])
def test_a_chat_is_read_the_same_however_it_is_laid_out(tmp_path, prompt, repeated):
    """`chosen` may repeat the prompt's turns; a prompt of text before message lists is the user's turn."""
    before = [QUESTION] if repeated else []
    record = {"prompt": prompt, "chosen": [*before, YES], "rejected": [*before, NO]}
    (pair,) = found("pairs", written(tmp_path / "p.jsonl", record))
    (example,) = found("examples", written(tmp_path / "e.jsonl", {"messages": [QUESTION, YES]}))
    assert (pair.prompt, pair.chosen) == (example.prompt, example.completion)
    assert pair.prompt.count("<|im_start|>user\nq<|im_end|>") == 1
    assert pair.rejected == "b<|im_end|>\n"
    (other,) = found("examples", written(tmp_path / "o.jsonl", {"prompt": prompt, "completion": [*before, YES]}))
    assert other == example


@pytest.mark.parametrize("reader", READERS)
def test_a_system_text_beside_messages_is_the_first_turn(tmp_path, reader):
    answers = {"completion": [YES]} if reader == "examples" else {"chosen": [YES], "rejected": [NO]}
    record = {"prompt": [QUESTION], "system": "be kind"} | ({} if reader == "prompts" else answers)
    (read,) = found(reader, written(tmp_path / "r.jsonl", record))
    text = read if reader == "prompts" else read.prompt
    assert text.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nq")
    record["prompt"] = [{"role": "system", "content": "be rude"}, QUESTION]
    with pytest.raises(UserError, match="'system' beside a system message"):
        found(reader, written(tmp_path / "r.jsonl", record))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("field", ["tools", "system"])
def test_a_field_that_is_not_used_is_counted_and_an_error_under_strict(tmp_path, reader, field, capsys):
    path = written(tmp_path / "r.jsonl", *RECORDS[reader], {**RECORDS[reader][0], "prompt": "three", field: "x"})
    finding = f"field '{field}' is not used, --ignore_fields {field} lets it pass"
    if reader == "prompts":
        found(reader, path)
        assert f"1 x {finding} (first: line 3)" in capsys.readouterr().err
        return
    _, report = READERS[reader](path, family("byte_level"))
    assert report[finding] == 1
    with pytest.raises(UserError, match=f"r.jsonl:3: field '{field}' is not used"):
        READERS[reader](path, family("byte_level"), strict=True)
    READERS[reader](path, family("byte_level"), strict=True, ignore_fields=[field])


def test_a_mark_on_a_turn_is_counted(tmp_path):
    path = written(tmp_path / "r.jsonl", {"messages": [QUESTION, YES | {"weight": 0}], "prompt": "other"})
    _, report = read_examples(path, family("byte_level"))
    assert sorted(report.lines) == [
        "field 'messages[].weight' is not used, --ignore_fields weight lets it pass",
        "field 'prompt' is not used, --ignore_fields prompt lets it pass",
    ]


@pytest.mark.parametrize(
    ("second", "finding"),
    [
        (("a", "b", 1.0), "duplicate"),
        (("b", "a", 0.0), "duplicate"),
        (("b", "a", 1.0), "contradicts an earlier pair"),
        (("a", "b", 0.2), "contradicts an earlier pair"),
        (("b", "a", 0.5), "contradicts an earlier pair"),
    ],
)
def test_what_a_pair_says_is_read_with_its_label(second, finding):
    report = DataReport("file")
    assert len(check_pairs((Pair("p", *sides), report) for sides in (("a", "b", 1.0), second))) == 2
    assert list(report.lines) == [finding]
