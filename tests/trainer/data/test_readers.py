"""Readers of preferences: every format recognised by itself and by name, every malformed record named by its line."""

from __future__ import annotations

import gzip
import json
import re

import datasets
import pytest
from support.preferences import BAD, GOOD, PROMPTED, RANKED, USER, argilla_answers, chat_options, studio

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.formats import Options
from rlhf_trainer.data.rankings import RankedPrompt, Ranking
from rlhf_trainer.data.readers import read_preferences
from rlhf_trainer.data.records import Pair

HUGE = "1" + "0" * 400  # an integer that no float holds


def write(path, *records, array=False):
    text = json.dumps(records, indent=1) if array else "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")
    return str(path)


def read(path, **options):
    found = read_preferences([str(path)], **options)
    return found.formats[0], [pair for pair, _ in found.pairs], [record for record, _ in found.ranked]


@pytest.mark.parametrize(
    ("kind", "record", "expected"),
    [
        ("pairs", PROMPTED, Pair("p", "good", "bad")),
        ("pairs", {**PROMPTED, "label": 0.5, "margin": 2, "id": 7}, Pair("p", "good", "bad", 0.5, 2.0)),
        ("pairs", {"question": "p", "Chosen": "good", "rejected-response": "bad"}, Pair("p", "good", "bad")),
        ("pairs", {"instruction": "p", "input": "i", "chosen": "g", "rejected": "b"}, Pair("p\n\ni\n\n", "g", "b")),
        ("pairs", {"instruction": "p", "input": None, "chosen": "g", "rejected": "b"}, Pair("p\n\n", "g", "b")),
        (
            "hh",
            {"chosen": "\n\nHuman: p\n\nAssistant: yes", "rejected": "\n\nHuman: p\n\nAssistant: yo"},
            Pair("\n\nHuman: p\n\nAssistant:", " yes", " yo"),
        ),
        (
            "hh",
            {"chosen": "<|user|>\np\n<|assistant|>\nyes", "rejected": "<|user|>\np\n<|assistant|>\nno"},
            Pair("<|user|>\np\n<|assistant|>\n", "yes", "no"),
        ),
    ],
)
def test_pairs(tmp_path, kind, record, expected):
    for array in (False, True):
        path = write(tmp_path / f"{array}.json", record, array=array)
        for name in ("auto", kind):
            assert read(path, format=name) == (kind, [expected], [])


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "p", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "p", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "p", "chosen": GOOD, "rejected": BAD},
        {"conversations": 1, "prompt": [{"from": "human", "value": "p"}], "chosen": {"from": "gpt", "value": "good"},
         "rejected": {"from": "gpt", "value": "bad"}},
    ],
)  # fmt: skip
def test_chats_are_written_by_the_template(tmp_path, record):
    path = write(tmp_path / "c.jsonl", record)
    expected = Pair("[user]p<eos>[assistant]", "good", "bad")
    assert read(path, options=chat_options()) == ("chat", [expected], [])
    with pytest.raises(UserError, match=r"c\.jsonl:1: .*--model"):
        read(path)


def test_chat_that_cannot_be_a_pair(tmp_path):
    for record, reason in (
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "q"}, BAD]}, "differ before their last message"),
        ({"chosen": [USER, GOOD, USER], "rejected": [USER, BAD, USER]}, "'user', not an answer"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "one message has no prompt"),
        ({"chosen": [{"role": "user"}], "rejected": [BAD]}, "no field 'content'"),
    ):
        with pytest.raises(UserError, match=rf"c\.jsonl:1: .*{reason}"):
            read(write(tmp_path / "c.jsonl", record), options=chat_options())


def test_gzip_and_byte_order_mark(tmp_path):
    path = tmp_path / "h.jsonl.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(PROMPTED).encode()))
    assert read(path) == ("pairs", [Pair("p", "good", "bad")], [])


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_tables_with_quotes_line_breaks_and_umlauts(tmp_path, delimiter):
    header = delimiter.join(("instruction", "chosen", "rejected", "label"))
    cells = delimiter.join(('"zwei\nZeilen, ""ü"""', '"good; x|y\tz,"', "bad", "0.75"))
    path = tmp_path / "t.csv"
    path.write_text(f"{header}\n{cells}\n\n{delimiter.join('pcrl').replace('l', '')}\n", encoding="utf-8")
    expected = [Pair('zwei\nZeilen, "ü"\n\n', "good; x|y\tz,", "bad", 0.75), Pair("p\n\n", "c", "r")]
    kind, pairs, _ = read(path)
    assert (kind, pairs) == ("pairs", expected)
    assert [pair.line for pair in pairs] == [2, 5]


def test_table_errors_name_the_line_on_which_the_row_begins(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('prompt,chosen,rejected\n"a\nb",c,d\np,c\n')
    with pytest.raises(UserError, match=r"t\.csv:4: 2 cells for 3 columns \(prompt, chosen, rejected\)"):
        read(path)
    path.write_text('prompt,chosen,rejected\np,"c" x,d\n')
    with pytest.raises(UserError, match=r"t\.csv:2: not a table"):
        read(path)
    path.write_text("just a line\n")
    with pytest.raises(UserError, match=r"t\.csv:1: neither JSON nor a table"):
        read(path)


def test_negative_scores_in_a_table_are_numbers(tmp_path):
    """-1 is less than 0, which it was read as in words; -0.5 was refused."""
    path = tmp_path / "s.csv"
    path.write_text("prompt,response,score\np,a,-1\np,b,0\np,c,-0.5\np,d,+1\n")
    (record,) = [ranked for ranked, _ in read_preferences([str(path)]).ranked]
    assert record.rankings[0].ranks == (1.0, 0.0, 0.5, -1.0)


def test_thumbs_and_scores_a_row_each(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("prompt,response,label,annotator\np,a,true,x\np,b,thumbs down,x\np,a,0,y\nq,c,1,x\nq,d,0.5,x\n")
    kind, _, ranked = read(path)
    assert kind == "scores"
    assert ranked == [
        RankedPrompt("p", ("a", "b"), (Ranking("x", (-1.0, 0.0)), Ranking("y", (0.0, None))), scored=True),
        RankedPrompt("q", ("c", "d"), (Ranking("x", (-1.0, -0.5)),), scored=True),
    ]


def test_unpaired_records_without_labeller(tmp_path):
    rows = [{"prompt": "p", "completion": text, "label": good} for text, good in (("a", True), ("b", False))]
    _, _, ranked = read(write(tmp_path / "k.jsonl", *rows, rows[0], {**rows[0], "label": False}))
    assert ranked == [RankedPrompt("p", ("a", "b"), (Ranking("unnamed", (-1.0, 0.0)),), scored=True)]


def test_scores_side_by_side(tmp_path):
    scores = [{"labeller": "x", "scores": [1, None, 0.5]}, {"labeller": "y", "scores": [True, False, None]}]
    record = {"prompt": "p", "completions": ["a", "b", "c"], "scores": scores}
    rankings = (Ranking("x", (-1.0, None, -0.5)), Ranking("y", (-1.0, 0.0, None)))
    assert read(write(tmp_path / "s.jsonl", record))[2] == [RankedPrompt("p", ("a", "b", "c"), rankings, scored=True)]
    _, _, ranked = read(write(tmp_path / "s.jsonl", {**record, "scores": [3, 1, 2]}))
    assert ranked[0].rankings == (Ranking("scores", (-3.0, -1.0, -2.0)),)


def test_rankings_of_one_prompt_are_merged_over_lines_and_files(tmp_path):
    one = write(tmp_path / "1.jsonl", RANKED)
    turned = {**RANKED, "completions": ["b", "a"], "rankings": [{"labeller": "y", "ranks": [1, "F"]}]}
    again = {**RANKED, "rankings": [{"labeller": "x", "ranks": [2, 1]}]}
    two = write(tmp_path / "2.jsonl", turned, again)
    found = read_preferences([one, two])
    assert [record for record, _ in found.ranked] == [
        RankedPrompt("p", ("a", "b"), (Ranking("x", (2, 1)), Ranking("y", ("F", 1))))
    ]
    assert found.reports[1].lines == {"ranked again by the same labeller, the later ranking counts": [2]}


@pytest.mark.parametrize("version", ["2", "2 flat", "1", "1 as a data set"])
def test_argilla(tmp_path, version):
    path = write(tmp_path / "a.json", argilla_answers(version), array=True)
    expected = RankedPrompt("p", ("a", "b"), (Ranking("u1", (2.0, 1.0)), Ranking("u2", (1.0, 2.0))))
    assert read(path) == ("argilla", [], [expected])


def test_a_rank_that_no_float_holds_names_its_line(tmp_path):
    record = argilla_answers("2")
    huge = [{"value": "response-1", "rank": 10**400}, {"value": "response-2", "rank": 1}]
    record["responses"]["rank"][0]["value"] = huge
    with pytest.raises(UserError, match=r"a\.json:\d: not built as format argilla is: OverflowError"):
        read(write(tmp_path / "a.json", record, array=True))


def test_argilla_label_question_and_open_records(tmp_path):
    fields = {"instruction": "p", "response_a": "x", "response_b": "y"}
    done = {"fields": fields, "responses": {"best": [{"user_id": "u", "value": "B"}, {"user_id": "v", "value": "tie"}]}}
    path = write(tmp_path / "a.json", {"fields": fields, "responses": {}}, done, array=True)
    found = read_preferences([path])
    assert found.ranked[0][0] == RankedPrompt("p", ("x", "y"), (Ranking("u", (2.0, 1.0)), Ranking("v", (1.0, 1.0))))
    assert found.reports[0].lines == {"not labelled yet, skipped": [2]}
    assert read_preferences([path], strict=True).ranked  # an open task is no error


def test_argilla_that_needs_a_word(tmp_path):
    record = argilla_answers("2")
    record["responses"]["other"] = record["responses"]["rank"]
    path = write(tmp_path / "a.json", record, array=True)
    with pytest.raises(
        UserError, match=r"a\.json:2: several rankings; --columns question=NAME picks one of rank, other"
    ):
        read(path)
    assert len(read(path, options=Options(columns={"question": "rank"}))[2][0].rankings) == 2
    record["fields"] = {"x": "p", "response-1": "a", "response-2": "b"}
    del record["responses"]["other"]
    path = write(tmp_path / "a.json", record, array=True)
    with pytest.raises(
        UserError, match=r"which field is the prompt\? --columns prompt=NAME; the fields are x, response-1"
    ):
        read(path)
    assert read(path, options=Options(columns={"prompt": "x"}))[2][0].prompt == "p"


@pytest.mark.parametrize(
    ("result", "ranks"),
    [
        ([{"type": "pairwise", "from_name": "pw", "to_name": "t1,t2", "value": {"selected": "right"}}], (2.0, 1.0)),
        ([{"type": "pairwise", "value": {"selected": "left"}}], (1.0, 2.0)),
        ([{"type": "pairwise", "value": {}}], (1.0, 1.0)),
        ([{"type": "choices", "value": {"choices": ["Answer 2"]}}], (2.0, 1.0)),
        ([{"type": "choices", "value": {"choices": ["left"]}}], (1.0, 2.0)),
        ([{"type": "choices", "value": {"choices": ["Tie"]}}], (1.0, 1.0)),
        (
            [
                {"type": "textarea", "to_name": "prompt", "value": {"text": ["why"]}},
                {"type": "rating", "to_name": "answer1", "value": {"rating": 2}},
                {"type": "rating", "to_name": "answer2", "value": {"rating": 5}},
            ],
            (-2.0, -5.0),
        ),
    ],
)
def test_label_studio(tmp_path, result, ranks):
    path = write(tmp_path / "l.json", studio(result), array=True)
    assert read(path) == ("labelstudio", [], [RankedPrompt("p", ("a", "b"), (Ranking("x@y", ranks),))])


@pytest.mark.parametrize(
    "value", [["k2", "k1", "k3"], {"rank": ["k2", "k1", "k3"]}, {"_": [], "best": ["k2", "k1", "k3"]}]
)
def test_label_studio_ranker(tmp_path, value):
    data = {
        "prompt": "p",
        "items": [{"id": f"k{i}", "title": "t", "body": text} for i, text in enumerate("abc", start=1)],
    }
    path = write(tmp_path / "l.json", studio([{"type": "ranker", "value": {"ranker": value}}], data), array=True)
    assert read(path)[2] == [RankedPrompt("p", ("a", "b", "c"), (Ranking("x@y", (2.0, 1.0, 3.0)),))]


def test_label_studio_open_cancelled_and_unclear(tmp_path):
    result = [{"type": "pairwise", "value": {"selected": "left"}}]
    open_task, cancelled = {**studio(result), "annotations": []}, studio(result, was_cancelled=True)
    done = studio(result, completed_by=7)
    found = read_preferences([write(tmp_path / "l.json", open_task, cancelled, done, array=True)])
    assert [ranking.labeller for record, _ in found.ranked for ranking in record.rankings] == ["7"]
    assert found.reports[0]["not labelled yet, skipped"] == 2
    data = {"prompt": "p", "meta:id": "z", "answer1": "a", "answer2": "b"}
    assert read(write(tmp_path / "l.json", studio(result, data), array=True))[2][0].completions == ("a", "b")
    data = {"prompt": "p", "source": "web", "answer": "a", "other": "b"}
    path = write(tmp_path / "l.json", studio(result, data), array=True)
    with pytest.raises(UserError, match=r"l\.json:2: .*--columns completions=A,B"):
        read(path)
    options = Options(columns={"completions": "answer,other"})
    assert read(path, options=options)[2][0].completions == ("a", "b")


def test_columns_are_renamed(tmp_path):
    path = write(tmp_path / "c.jsonl", {"frage": "p", "besser": "good", "schlechter": "bad"})
    columns = {"prompt": "frage", "chosen": "besser", "rejected": "schlechter"}
    assert read(path, options=Options(columns=columns)) == ("pairs", [Pair("p", "good", "bad")], [])
    with pytest.raises(
        UserError, match=r"c\.jsonl:1: no known format has the fields frage, besser, schlechter; --columns"
    ):
        read(path)
    with pytest.raises(UserError, match=r"c\.jsonl:1: no column 'nein'; the columns are frage"):
        read(path, options=Options(columns={**columns, "prompt": "nein"}))


@pytest.mark.parametrize("how", ["parquet", "disk", "disk dict", "folder"])
def test_data_sets(tmp_path, how):
    rows = datasets.Dataset.from_list([PROMPTED, {"prompt": "q", "chosen": "x", "rejected": "y"}])
    path = tmp_path / ("d.parquet" if how == "parquet" else "d")
    if how == "parquet":
        rows.to_parquet(path)
    elif how == "disk":
        rows.save_to_disk(path)
    elif how == "disk dict":
        datasets.DatasetDict({"train": rows}).save_to_disk(path)
        with pytest.raises(UserError, match="no split 'test'; --split names one of train"):
            read(path, split="test")
    else:
        path.mkdir()
        write(path / "train.jsonl", *rows)
    kind, pairs, _ = read(path)
    assert (kind, pairs) == ("pairs", [Pair("p", "good", "bad"), Pair("q", "x", "y")])
    assert [pair.line for pair in pairs] == [1, 2]


def test_a_name_goes_to_the_datasets_library(monkeypatch):
    asked = []

    def load(name, split):
        asked.append((name, split))
        return [{**PROMPTED, "extra": None}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_preferences(["someone/prefs-v1.5"], split="test")
    assert asked == [("someone/prefs-v1.5", "test")]
    assert found.reports[0].path == "someone/prefs-v1.5[test]"

    def fail(name, split):
        raise ConnectionError("no network\n at all")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"^someone/prefs: the data set cannot be loaded: no network at all$"):
        read_preferences(["someone/prefs"])
    for path in ("none.jsonl", "./none", "a/b/c"):
        with pytest.raises(UserError, match=f"^{re.escape(path)}: no such file or directory$"):
            read_preferences([path])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "f.json: no record in it"),
        ('[\n{"prompt": "p", "chosen": "a", "rejected": "b"},\n{"prompt": ]', "f.json:3: not JSON"),
        ('[\n\n {"prompt": "p", "chosen": 1, "rejected": "b"}]', "f.json:3: no known format"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "chosen": 2, "rejected": "b"}',
         "f.json:2: field 'chosen' is int"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "completion": "a", "label": 1}',
         "f.json:2: no field 'chosen'; the fields are prompt"),
        ("[1]", "f.json:1: expected a JSON object, got int"),
        ("[", "f.json:1: not JSON"),
        ("[]", "f.json: no record in it"),
        ('[{"prompt": "p", "chosen": "a", "rejected": "b"}\n] x', "f.json:2: not JSON: there is more after"),
        ("{]", "f.json:1: not JSON"),
        ('{"chosen": "x", "rejected": "y"}', "f.json:1: no field 'prompt', and 'chosen' and 'rejected' share"),
        ('{"prompt": "p", "completion": "a", "label": "maybe"}', "f.json:1: 'maybe' is neither a number nor a thumb"),
        (f'{{"prompt": "p", "completion": "a", "score": {HUGE}}}', "0 is neither a number nor a thumb"),
        (
            f'{{"prompt": "p", "completions": ["a", "b"], "rankings": [{{"labeller": "x", "ranks": [1, {HUGE}]}}]}}',
            '0 is neither a number nor "F"',
        ),
        (f'{{"prompt": "p", "chosen": "a", "rejected": "b", "margin": {HUGE}}}', "expected a number in"),
        ('{"prompt": 1, "chosen": "a", "rejected": "b"}', "the prompt is int, expected text or chat messages"),
        ("prompt,chosen,rejected,chosen\na,b,c,d\n", "f.json:1: two columns are called 'chosen'"),
        ('{"prompt": "p", "completion": "a", "label": NaN}', "f.json:1: nan is neither"),
        ('{"prompt": "p", "completions": ["a", "b"], "scores": [1, "x"]}', "f.json:1: score 'x' is not a number"),
        ('{"prompt": "p", "completions": ["a", "b"], "scores": [1]}', "f.json:1: 1 scores for 2 completions"),
        ('{"data": {"prompt": "p"}, "annotations": [{"result": [1]}]}', "f.json:1: fewer than two completions"),
        ('{"data": {"prompt": "p", "a": "x", "b": "y"}, "annotations": [{"result": [1]}]}',
         "f.json:1: not built as format labelstudio is: AttributeError"),
    ],
)  # fmt: skip
def test_malformed_files_name_the_line(tmp_path, text, reason):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(UserError, match=reason) as caught:
        read(tmp_path / "f.json")
    assert "\n" not in str(caught.value)


def test_odd_rankings_are_counted_or_an_error(tmp_path):
    odd = {**RANKED, "completions": ["a", "a", " ", "b"], "rankings": [{"labeller": "x", "ranks": [1, 1, 2, 3]}]}
    path = write(tmp_path / "r.jsonl", RANKED, odd, {**RANKED, "prompt": " "}, {**RANKED, "completions": ["", "b"]})
    found = read_preferences([path])
    assert found.reports[0].lines == {
        "empty completion, dropped": [2, 4],
        "the same completion twice, not compared": [2],
        "empty prompt": [3],
        "one completion, nothing to compare": [4],
    }
    assert [record.completions for record, _ in found.ranked] == [("a", "b"), ("a", "a", "b"), ("a", "b")]
    assert found.ranked[1][0].rankings == (Ranking("x", (1, 1, 3)),)
    with pytest.raises(UserError, match=r"r\.jsonl:2: empty completion, dropped \(an error because of --strict\)"):
        read_preferences([path], strict=True)


def test_repeated_completions_are_an_oddity_only_if_ranked_apart(tmp_path):
    same = {**RANKED, "completions": ["a", "a", "b"], "rankings": [{"labeller": "x", "ranks": [1, 1, 2]}]}
    path = write(tmp_path / "r.jsonl", same)
    found = read_preferences([path], strict=True)
    assert found.reports[0].lines == {"the same completion twice, not compared": [1]}
    apart = {**same, "rankings": [{"labeller": "x", "ranks": [1, 2, 2]}]}
    with pytest.raises(UserError, match=r"r\.jsonl:1: different ranks for the same completion \(an error"):
        read_preferences([write(tmp_path / "r.jsonl", apart)], strict=True)


def test_nothing_to_compare_says_why(tmp_path):
    path = write(tmp_path / "k.jsonl", *({"prompt": f"p{i}", "completion": "a", "label": True} for i in range(2)))
    with pytest.raises(UserError, match=r"no preference in .*: 2 records; 2 x one completion, nothing to compare"):
        read(path)


def test_a_prompt_that_stands_in_the_answers_too_is_mentioned(tmp_path):
    record = {"prompt": "What is red?", "chosen": "What is red? A cherry.", "rejected": "What is red? A sky."}
    found = read_preferences([write(tmp_path / "p.jsonl", record, {**record, "chosen": "A cherry."})], strict=True)
    assert found.reports[0].lines == {"both answers begin with the prompt (twice there?)": [1]}
    assert len(found.pairs) == 2


def test_records_of_an_array_know_the_line_on_which_they_begin(tmp_path):
    path = tmp_path / "a.json"
    records = [json.dumps({**PROMPTED, "prompt": f"p{i}"}, indent=1) for i in range(4)]
    path.write_text("\n[" + ",\n".join(records[:2]) + " , " + ",\n\n".join(records[2:]) + "\n]\n")
    assert [pair.line for pair in read(path)[1]] == [2, 7, 11, 17]


def test_label_studio_buckets(tmp_path):
    """The pool "_" that nobody moved is no ranking; several filled buckets have no order between them."""
    data = {"prompt": "p", "answer1": "a", "answer2": "b", "answer3": "c"}

    def read(value):
        record = studio([{"type": "ranker", "value": {"ranker": value}}], data)
        return read_preferences([str(write(tmp_path / "l.json", record, array=True))]).ranked[0][0]

    ranked = read({"_": ["answer1"], "good": ["answer3", "answer2"], "bad": []})
    assert dict(zip(ranked.completions, ranked.rankings[0].ranks, strict=True)) == {"a": None, "b": 2.0, "c": 1.0}
    for value, filled in (
        ({"_": ["answer1", "answer2", "answer3"], "rank": []}, "none"),
        ({"_": [], "good": ["answer1"], "bad": ["answer2"]}, "good, bad"),
    ):
        with pytest.raises(UserError, match=f"several buckets, filled: {filled}; a ranking is one bucket in order"):
            read(value)
