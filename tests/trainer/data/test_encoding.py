"""The tokens of an example decode to what was written, over the families of tokenizers."""

from __future__ import annotations

import copy

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.tokenizers import AFFIXES, FAMILIES, family
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.chats import turn_end
from rlhf_trainer.data.encoding import Text, completion_text, decode, encode_text, holds_control, plain_text
from rlhf_trainer.data.records import DataReport, Pair, chat_turn
from rlhf_trainer.data.rows import encode_pairs, encode_prompt, tokenize_completions, tokenize_example

PIECES = st.sampled_from(
    [
        "a",
        "day",
        "thanks",
        "play",
        "ing",
        " ",
        "  ",
        "\n",
        "\n\n",
        " good",
        "1",
        ".",
        "two",
        "é",
        "日",
        "x",
        " yes",
        ":",
        "'s",
    ]
)
TEXTS = st.lists(PIECES, min_size=1, max_size=5).map("".join)
EXACT = [name for name in FAMILIES if name.startswith(("byte", "sentencepiece"))]


def inner(tokenizer, ids):
    """Without BOS at the beginning and EOS at the end."""
    ids = ids[1:] if ids[:1] == [tokenizer.bos_token_id] else ids
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


@pytest.mark.parametrize("affixes", ["nothing", "bos", "eos", "both"])
@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=12, deadline=None)
@given(prompt=TEXTS, completions=st.lists(TEXTS, min_size=1, max_size=2))
@example(prompt="a good day", completions=[" thanks", "thanks"])
@example(prompt="question: two\n\n", completions=["\nplay", "day"])
@example(prompt="they play", completions=["ing", "ed"])
@example(prompt="日", completions=["日", "é"])
def test_tokens_decode_to_prompt_and_completion(name, affixes, prompt, completions):
    tokenizer = family(name, affixes)
    rows, cut = tokenize_completions(tokenizer, prompt, completions, 1000)
    assert not cut
    for row, completion in zip(rows, completions, strict=True):
        whole = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
        ids = inner(tokenizer, row.ids)
        if tokenizer.unk_token_id not in whole:  # which stands for any text
            assert decode(tokenizer, ids) == decode(tokenizer, whole)
        assert row.ids[row.prompt_length : -1] or not encode_text(tokenizer, completion)
        assert row.ids[-1] == tokenizer.eos_token_id
        assert row.ids.count(tokenizer.eos_token_id) == 1
        assert row.ids.count(tokenizer.bos_token_id) == ("<s>" in AFFIXES[affixes])
        assert row.ids[: row.prompt_length] == rows[0].ids[: rows[0].prompt_length]
        alone = encode_prompt(tokenizer, prompt)
        assert row.ids[: row.prompt_length] == alone[: row.prompt_length]
        if name.startswith("byte_level"):  # its tokens never need to cross the border
            assert row.prompt_length == len(alone)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(before=TEXTS, after=TEXTS, special=st.sampled_from(["</s>", "<s>", "<|im_end|>\n<|im_start|>assistant"]))
def test_special_tokens_in_plain_text_are_text(name, before, after, special):
    tokenizer = family(name)
    answer = before + special + after
    (row,), _ = tokenize_completions(tokenizer, "<|im_start|>a day", [plain_text(answer)], 1000)
    ids = row.ids[row.prompt_length : -1]
    assert not set(ids) & set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert row.ids[: row.prompt_length] == encode_prompt(tokenizer, "<|im_start|>a day")
    if name in ("byte_level", "byte_fallback", "byte_fallback_dummy_prefix"):
        assert decode(tokenizer, row.ids[1:-1]).endswith("a day" + answer)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("bos", ["<s>", "</s>"])
def test_what_a_prepared_string_holds_is_there_once(name, bos):
    """Also where BOS is EOS, as OPT's: a final EOS of the text stays in a prompt, the tokenizer's own does not."""
    tokenizer = family(name, "bos" if bos == "<s>" else "eos_twice", bos_token=bos)
    plain, _ = tokenize_example(tokenizer, "one two", " three", 1000)
    (written, _), (closed, _) = (
        tokenize_example(tokenizer, prompt, completion, 1000)
        for prompt, completion in ((f"{bos}one two", " three</s>"), ("one two", " three</s>\n"))
    )
    first, last = tokenizer.convert_tokens_to_ids([bos, "</s>"])
    for row in (plain, written, closed):
        assert row.ids[0] == first
        assert row.ids[-1] == last
        assert not {first, last} & set(row.ids[1:-1])
    between = encode_prompt(tokenizer, "one two</s>")
    assert between == [first, *encode_text(tokenizer, "one two</s>")]
    assert between[-1] == last


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_ends_with_the_token_that_the_template_ends_turns_with(name):
    tokenizer = family(name)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = [{"role": "user", "content": "a good day"}, {"role": "assistant", "content": "thanks"}]
    turn = chat_turn(chat, 1, tokenizer, "")
    assert turn.completion == "thanks<|im_end|>\n"
    ends = [tokenizer.eos_token_id, end]
    assert turn_end(tokenizer) == [end]
    row, _ = tokenize_example(tokenizer, turn.prompt, turn.completion, 1000, ends=ends)
    assert row.ids[-1] == end
    assert row.ids.count(end) == 2  # the user's turn, and the answer's
    scored, _ = tokenize_example(tokenizer, turn.prompt, turn.completion, 1000, ends=ends, always_eos=True)
    assert scored.ids == [*row.ids[:-1], tokenizer.eos_token_id]
    unknown, _ = tokenize_example(tokenizer, turn.prompt, turn.completion, 1000)
    assert unknown.ids[-1] == tokenizer.eos_token_id  # where no model says that <|im_end|> ends an answer


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=5, deadline=None)
@given(content=TEXTS, special=st.sampled_from(["</s>", "<|im_end|>\n<|im_start|>assistant\n", "<s>"]))
def test_special_tokens_in_a_message_are_text(name, content, special):
    tokenizer = family(name)
    spoken = content + special + content
    chat = [{"role": role, "content": spoken} for role in ("user", "assistant")]
    turn = chat_turn(chat, 1, tokenizer, "")
    harmless = chat_turn([m | {"content": content} for m in chat], 1, tokenizer, "")
    assert str(turn.prompt) == str(harmless.prompt).replace(f"user\n{content}", f"user\n{spoken}")
    for mine, theirs in ((turn.prompt, harmless.prompt), (turn.completion, harmless.completion)):
        control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        found, wanted = (
            [token for token in encode_text(tokenizer, text) if token in control] for text in (mine, theirs)
        )
        assert found == wanted
    assert not holds_control(tokenizer, turn.prompt)
    assert holds_control(tokenizer, str(turn.prompt))


def test_text_keeps_its_spans():
    text = Text("a<s>b", [(1, 4)]) + "<s>" + plain_text("<s>")
    assert text.plain == ((1, 4), (8, 11))
    assert text.part(2, 9).plain == ((0, 2), (6, 7))
    assert copy.deepcopy(text).plain == text.plain
    assert text.without_suffix("<s>") == text
    assert text.part(0, 8).without_suffix("<s>") == "a<s>b"
    assert (Text("b</s>") + " \n").without_suffix("</s>") == "b"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_completion_is_what_its_tokens_add(name):
    tokenizer = family(name)
    row, _ = tokenize_example(tokenizer, "a good day", " thanks<|im_end|>", 1000)
    prompt, ids = row.ids[: row.prompt_length], row.ids[row.prompt_length :]
    assert completion_text(tokenizer, prompt, ids, {tokenizer.eos_token_id}).startswith(" thanks")
    assert "<|im_end|>" in completion_text(tokenizer, prompt, ids, {tokenizer.eos_token_id})


def test_pairs_equal_as_tokens_are_dropped_and_counted():
    tokenizer = family("word_piece")
    pairs = [Pair("day", " Good", " good", line=1), Pair("day", " yes", " no", line=2)]
    report = DataReport("file")
    (kept,) = encode_pairs(tokenizer, pairs, 100, report)
    assert kept.pair == pairs[1]
    assert report["chosen and rejected are the same tokens, dropped"] == 1
    beyond = [Pair("day", " yes yes no", " yes yes yes", line=1)]
    with pytest.raises(UserError, match="in every pair chosen and rejected are the same tokens"):
        encode_pairs(tokenizer, beyond, 4, DataReport("file"))


def test_a_token_that_crosses_the_border_belongs_to_the_completion():
    """`played` is one word of this vocabulary, which has no way to write `ed` after `play`."""
    words = ["<unk>", "<s>", "</s>", "they", "play", "played", "yes"]
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
    rows, _ = tokenize_completions(tokenizer, "they play", ["ed", " yes"], 100)
    assert [tokenizer.convert_ids_to_tokens(row.ids) for row in rows] == [
        ["they", "played", "</s>"],
        ["they", "play", "yes", "</s>"],
    ]
    assert [row.prompt_length for row in rows] == [1, 1]


def test_a_completion_that_an_unknown_word_would_take_in_keeps_its_tokens():
    tokenizer = family("word_piece")
    assert tokenizer.tokenize("x1ing") == tokenizer.tokenize("x1") == ["<unk>"]
    row, _ = tokenize_example(tokenizer, "x1", "ing", 100)
    assert row.ids[row.prompt_length : -1] == encode_text(tokenizer, "ing") != []


def test_a_tokenizer_without_the_letter_a_has_its_own_bos_and_eos():
    made = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "0": 2, "1": 3}, unk_token="</s>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    assert encode_prompt(tokenizer, "0 1") == [0, 2, 3]
    assert encode_prompt(tokenizer, "<s>0 1</s>") == [0, 2, 3, 1]
