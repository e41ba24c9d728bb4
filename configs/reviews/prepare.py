"""Movie-review sentences -> corpus, SFT records, preference pairs, prompts and the judge's sentences of this example.

python configs/reviews/prepare.py FOLDER OUT    reads FOLDER/rt-polarity.pos.txt and .neg.txt, one sentence a line
(Pang and Lee 2005). Each sentence lands in exactly one part, so that the judge has seen no sentence which the policy
or the reward model was trained on, and evaluation prompts come from sentences nobody was trained on.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

PROMPT_WORDS = 4
PARTS = {"judge": 1500, "heldout": 200}  # sentences of each class; the rest trains the policy and the reward model


def read_sentences(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [" ".join(line.split()) for line in lines if len(line.split()) > PROMPT_WORDS + 2]


def split(sentences: list[str], rng: random.Random) -> dict[str, list[str]]:
    rng.shuffle(sentences)
    parts, start = {}, 0
    for name, size in PARTS.items():
        parts[name] = sentences[start : start + size]
        start += size
    return parts | {"train": sentences[start:]}


def prompt_and_rest(sentence: str) -> tuple[str, str]:
    words = sentence.split(" ")
    return " ".join(words[:PROMPT_WORDS]), " " + " ".join(words[PROMPT_WORDS:])


def write_jsonl(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    print(f"{path}: {len(records)} records")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    positive = split(read_sentences(arguments.folder / "rt-polarity.pos.txt"), rng)
    negative = split(read_sentences(arguments.folder / "rt-polarity.neg.txt"), rng)
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    train = positive["train"] + negative["train"]
    rng.shuffle(train)
    (out / "corpus.txt").write_text("\n".join(train) + "\n", encoding="utf-8")
    records = [dict(zip(("prompt", "completion"), prompt_and_rest(s), strict=True)) for s in train]
    write_jsonl(out / "sft.jsonl", records)
    # The sentences of a pair begin differently: an empty prompt, and the whole sentence is the completion.
    pairs = zip(positive["train"], negative["train"], strict=False)
    write_jsonl(out / "pairs.jsonl", [{"prompt": "", "chosen": good, "rejected": bad} for good, bad in pairs])
    write_jsonl(out / "prompts.jsonl", [{"prompt": record["prompt"]} for record in records])
    heldout = positive["heldout"] + negative["heldout"]
    write_jsonl(out / "heldout_prompts.jsonl", [{"prompt": prompt_and_rest(s)[0]} for s in heldout])
    labelled = [{"text": s, "positive": 1} for s in positive["judge"]] + [
        {"text": s, "positive": 0} for s in negative["judge"]
    ]
    write_jsonl(out / "judge.jsonl", labelled)


if __name__ == "__main__":
    main()
