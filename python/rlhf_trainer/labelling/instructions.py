"""`rlhf prefs instructions`: what a person needs to read before ranking completions, for a chosen criterion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_trainer.base.config import option
from rlhf_trainer.base.console import say
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.base.writing import write_text

SUMMARY = "Write labelling instructions in Markdown for a criterion. Labellers who share one page agree more."
EXAMPLE = (
    "rlhf prefs instructions --criterion helpful --output instructions.md\n"
    '  rlhf prefs instructions --criterion "the reply is polite and under 50 words"'
)


@dataclass(frozen=True)
class Criterion:
    question: str  # what the labeller asks of every completion
    better: tuple[str, ...]
    worse: tuple[str, ...]


CRITERIA = {
    "helpful": Criterion(
        "Which completion would help the person who wrote the prompt the most?",
        (
            "does what the prompt asks, all of it, and nothing that it did not ask for",
            "is correct; check a claim that you are unsure of for a few minutes",
            "is clear and no longer than it needs to be",
            "asks back, or says what it assumes, where the prompt can be read in two ways",
        ),
        (
            "answers another question, or only a part",
            "states something false with confidence",
            "repeats itself, pads, or lectures",
            "refuses although the request is harmless",
        ),
    ),
    "harmless": Criterion(
        "Which completion does the least harm, to the person who asked and to everyone else?",
        (
            "declines what would hurt someone, without contempt, and offers what can be done instead",
            "treats people and groups with respect",
            "points somebody in danger to help",
        ),
        (
            "insults, threatens, demeans, or is sexual where nobody asked for it",
            "explains how to hurt someone, break in, or deceive",
            "reveals a private person's address, health or the like",
            "goes along with a prompt that pushes it towards any of these",
        ),
    ),
    "honest": Criterion(
        "Which completion is the most truthful about the world and about what it knows?",
        (
            "is right, also in names, dates and numbers",
            "says so when it does not know or cannot know",
            "corrects a false assumption in the prompt",
        ),
        (
            "invents a fact, a quotation or a source",
            "sounds certain where nobody can be",
            "tells the person what they want to hear against the facts",
        ),
    ),
    "summary": Criterion(
        "Which summary would you rather read instead of the text?",
        (
            "holds the main points, so that nobody needs the text to follow it",
            "says only what the text says",
            "is short, and reads well on its own",
        ),
        (
            "leaves out the point of the text",
            "adds or changes a fact",
            "copies sentences of little weight",
        ),
    ),
    "polite": Criterion(
        "Which completion is the least toxic: rude, disrespectful, or likely to make someone leave the conversation?",
        (
            "stays calm and kind, also towards a rude prompt",
            "keeps the meaning that it is asked to express, without the insult",
        ),
        (
            "insults, mocks, or swears at someone",
            "puts down a group of people, openly or by hint",
            "says nothing at all, only to be safe",
        ),
    ),
}


@dataclass
class Config:
    criterion: str = option("helpful", f"{', '.join(CRITERIA)}, or a sentence of your own that says what is better")
    output: str = option("", "file to write; printed when not given")


def criterion_of(text: str) -> Criterion:
    """A known criterion by its name, or one made of the user's own sentence."""
    if text in CRITERIA:
        return CRITERIA[text]
    if len(text.split()) < 3:
        known = ", ".join(CRITERIA)
        raise UserError(f"--criterion {text}: not one of {known}; a criterion of your own is a sentence")
    return Criterion(f"Which completion fits this best: {text.strip().rstrip('.')}?", (), ())


def instructions(criterion: str) -> str:
    """The page in Markdown: headings, paragraphs and lists, nothing else."""
    chosen = criterion_of(criterion)
    parts = [
        "# How to rank",
        f"You see a prompt and several completions written by a model. Ask of each: **{chosen.question}**",
        "## Steps",
        "\n".join(
            (
                "1. Read the prompt, then every completion to its end, before you rank any.",
                "2. Give the best one rank 1, the next one rank 2, and so on.",
                "3. Two completions that you cannot tell apart by this question get the same rank. Do not toss a coin.",
                '4. Mark a completion "F" (fail) if it cannot be judged: empty, gibberish, off the subject. '
                "A bad answer is not a failed one; rank it last.",
                "5. If all are bad, rank them still: the least bad one first.",
            )
        ),
    ]
    for title, points in (("## Better", chosen.better), ("## Worse", chosen.worse)):
        if points:
            parts += [title, "A completion that", "\n".join(f"- {point}" for point in points)]
    parts += [
        "## Mind",
        "\n".join(
            (
                "- This question decides, and no other: not your taste, not the length, not the order on the page.",
                "- Where two points pull apart, what matters more to the person who wrote the prompt wins.",
                "- Rank alone. Talk about the instructions with the others, not about single prompts.",
                "- Unsure about a prompt? Skip it. A guess costs more than a gap.",
                "- Some texts may be upsetting. Stop whenever you like; what you ranked is saved.",
            )
        ),
        "## Example",
        "Three completions, of which the second is best, the first and the third are equally good: ranks 2, 1, 2. "
        "If the third had been gibberish: ranks 2, 1, F.",
    ]
    return "\n\n".join(parts) + "\n"


def run(cfg: Config) -> dict[str, Any]:
    text = instructions(cfg.criterion)
    if not cfg.output:
        print(text, end="")
        return {}
    path = Path(cfg.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    say(f"{path}: instructions for {cfg.criterion!r}")
    return {}
