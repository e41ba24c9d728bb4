"""The tokens of an example decode to what was written, over the families of tokenizers."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.tokenizers import AFFIXES, FAMILIES, family

from rlhf_trainer.data.encoding import decode, plain_text
from rlhf_trainer.data.rows import encode_prompt, tokenize_completions

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


@pytest.mark.parametrize("affixes", AFFIXES)
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
        assert decode(tokenizer, ids) == decode(tokenizer, whole)
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
