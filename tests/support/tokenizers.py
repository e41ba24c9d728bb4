"""Tokenizers of the families in use, trained in a moment on a few sentences."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXT = [
    "a good day thanks, one two three",
    "the good night said thanks to the day",
    "playing and played, they say yes no maybe",
    "question: 1 + 1 = 2\n\nanswer: two",
    "  two  spaces and\ttabs ünïcödé 日本",
] * 4
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SPACE = "▁"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _bpe(**options: object) -> Tokenizer:
    return Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, **options))


def _byte_level(add_prefix_space: bool) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return made


def _with_bytes(trained: Tokenizer, **options: object) -> Tokenizer:
    """The same merges, with a token for each byte, which stand for characters that the vocabulary lacks."""
    import json

    model = json.loads(trained.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    merges = [tuple(merge) for merge in model["merges"]]
    return _bpe(vocab=vocabulary, merges=merges, byte_fallback=True, **options)


def _sentencepiece_bpe(dummy_prefix: bool, byte_fallback: bool) -> Tokenizer:
    """As Llama 2's: white space is a letter, and nothing splits a text before the merges."""
    made = _bpe()
    spaces = normalizers.Replace(" ", SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces] if dummy_prefix else [spaces])
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False))
    if byte_fallback:
        normalizer = made.normalizer
        made = _with_bytes(made)
        made.normalizer = normalizer
        made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return made


def _unigram(scheme: str, split: bool) -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme, split=split)
    made.train_from_iterator(
        TEXT, trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    )
    return made


def _metaspace_bpe(scheme: str) -> Tokenizer:
    made = _bpe()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme, split=True)
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False))
    return made


def _word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+|\w+|[^\w\s]"), "isolated")
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    made.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    )
    return made


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": lambda: _byte_level(False),
    "byte_level_prefix_space": lambda: _byte_level(True),
    "sentencepiece_bpe_dummy_prefix": lambda: _sentencepiece_bpe(True, False),
    "sentencepiece_bpe": lambda: _sentencepiece_bpe(False, False),
    "byte_fallback_dummy_prefix": lambda: _sentencepiece_bpe(True, True),
    "byte_fallback": lambda: _sentencepiece_bpe(False, True),
    "metaspace_first": lambda: _metaspace_bpe("first"),
    "metaspace_always": lambda: _metaspace_bpe("always"),
    "unigram_always": lambda: _unigram("always", True),
    "unigram_first": lambda: _unigram("first", False),
    "unigram_no_prefix": lambda: _unigram("never", True),
    "word_piece": _word_piece,
}
AFFIXES = {"nothing": "$A", "bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>", "eos_twice": "</s> $A </s>"}


@cache
def family(name: str, affixes: str = "bos", **names: str) -> PreTrainedTokenizerFast:
    """A tokenizer of FAMILIES that adds what AFFIXES says; names: further arguments, such as bos_token."""
    made = Tokenizer.from_str(_trained(name))
    known = [(token, made.token_to_id(token)) for token in SPECIAL]
    made.post_processor = processors.TemplateProcessing(single=AFFIXES[affixes], special_tokens=known)
    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **names}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **options)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


@cache
def _trained(name: str) -> str:
    return FAMILIES[name]().to_str()
