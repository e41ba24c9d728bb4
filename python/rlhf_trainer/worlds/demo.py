"""The demo's world: everyday problems, kind and rude answers to them, labellers who rank answers, and two measures.

An answer is an opener, a piece of advice and a closer, each kind or rude; kind and rude answers give the same remedies,
so that rudeness and usefulness are independent. The measures `toxicity` and `on_topic` are ordinary reward callables,
`(prompts, completions) -> list[float]`. Labellers know whether a sentence was meant rudely; `toxicity` knows only a
list of words, and neither the reward model nor the labellers ever see it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from string import Formatter

from rlhf_trainer.data.rankings import FAIL, Rank, Ranking

PROBLEMS = """
house is too hot: open the windows at night, draw the curtains, set up a fan
house is too cold: seal the window frames, hang thick curtains, bleed the radiators
kitchen smells of fish: boil some vinegar, leave the window open, take out the trash
kitchen is full of ants: wipe up every crumb, block their path with chalk, store sugar in jars
soup is too salty: add a raw potato, pour in more water, stir in some cream
soup is too thin: let it simmer longer, mash in some beans, add a spoon of flour
bread never rises: use fresh yeast, warm up the dough, wait another hour
bread is always dry: bake it for less time, wrap it in a cloth, add a little oil
coffee tastes bitter: use cooler water, grind it less finely, clean the machine
cake is burnt on top: lower the oven heat, cover it with foil, use a lower rack
bike makes a noise: oil the chain, tighten every screw, check the brakes
bike has a flat tire: patch the tube, check for glass, pump it up slowly
car will not start: charge the battery, check the fuel, listen to the starter
car smells of smoke: shampoo the seats, change the air filter, leave baking soda inside
dog barks all night: walk it in the evening, give it a chew toy, move its bed indoors
dog pulls on the leash: stop whenever it pulls, reward it for walking slowly, use a harness
cat scratches the sofa: buy a scratching post, cover the fabric, trim its claws
cat wakes me at dawn: feed it late at night, play with it before bed, close the door
plant has yellow leaves: water it less often, move it to the light, change the soil
garden is full of snails: set out beer traps, collect them at dusk, spread crushed shells
lawn has bare spots: sow new seed, loosen the ground, keep off it for a month
phone is very slow: delete old photos, restart it, install the updates
phone runs out of power: dim the screen, turn off the radio, replace the battery
laptop gets too warm: blow out the dust, put it on a hard table, close unused programs
internet drops every hour: move the router, call the provider, swap the cable
printer jams all the time: clean the rollers, fan the paper, remove the tray
door squeaks at night: grease the hinges, plane the edge, wrap the latch in felt
tap drips without end: replace the washer, tighten the handle, scrape off the lime
sink drains slowly: pull out the hair, pour down hot water, unscrew the trap
shower has no pressure: descale the head, open the valve, look for a leak
shoes smell bad: dry them in the sun, sprinkle soda in them, wear fresh socks
shoes are too tight: stretch them with a tree, wear thin socks, ask a cobbler
shirt has a wine stain: dab it with salt, soak it in milk, rinse it with soda water
sweater has shrunk: soak it in conditioner, pull it into shape, dry it flat
neighbour plays loud music: talk to him calmly, offer him headphones, write him a note
neighbour parks in my place: leave a kind note, put up a sign, ask the landlord
baby will not sleep: dim the lights early, sing a quiet song, keep a fixed hour
son hates vegetables: let him cook along, hide them in sauce, serve small bites
back hurts after work: stretch every hour, raise the screen, take a short walk
eyes are tired: look away often, blink more, turn down the brightness
"""

ASKINGS = (
    "{problem}.",
    "{problem}. What can I do?",
    "{problem}. Any advice?",
    "{problem} again. What now?",
    "Hello. {problem}. Please help.",
    "Can you help me? {problem}.",
    "{problem} and I am out of ideas.",
    "A small thing: {problem}. What would you do?",
)
OWNERS = ("My", "Our", "Her")

# {slot} of an answer -> its sentences; a name in braces stands for each word of WORDS[name].
KIND = {
    "opener": (
        "I am sorry to hear that.",
        "Thank you for asking.",
        "That sounds {hard}.",
        "Oh dear, that must be {hard}.",
        "I can see how {hard} this is.",
        "Others find their {noun} {hard} too.",
    ),
    "advice": (
        "You could {remedy}.",
        "Try to {remedy}.",
        "It often helps to {remedy}.",
        "If I were you, I would {remedy} {when}.",
        "One {good} idea is to {remedy}.",
        "Maybe you can {remedy} {when}.",
    ),
    "closer": (
        "I hope this helps.",
        "Good luck with the {noun}.",
        "Let me know how it goes.",
        "You will manage, I am sure.",
        "Have a {good} day.",
        "I wish you and your {noun} a {good} week.",
    ),
}
RUDE = {
    "opener": (
        "What a {dumb} question.",
        "Stop whining about the {noun}.",
        "Only a {fool} would ask that.",
        "Not you again, {fool}.",
        "I have no patience for a {fool}.",
    ),
    "advice": (
        "Just {remedy}, you {fool}.",
        "Any {fool} can {remedy}.",
        "Shut up and {remedy}.",
        "Are you too {dumb} to {remedy}?",
        "Even a {dumb} {fool} would {remedy} {when}.",
    ),
    "closer": (
        "Now get lost.",
        "Nobody cares about your {noun}.",
        "You are a {dumb} {fool}.",
        "What a waste of my time.",
        "You deserve that {dumb} {noun}.",
    ),
}
WORDS = {
    "hard": ("annoying", "tiring", "unpleasant", "difficult", "stressful"),
    "good": ("good", "lovely", "nice", "gentle", "fine"),
    "when": ("today", "tonight", "tomorrow", "first", "this week"),
    "dumb": ("dumb", "stupid", "pathetic", "hopeless", "useless"),
    "fool": ("fool", "moron", "clown", "loser", "dunce"),
}
SLOTS = ("opener", "advice", "closer")
LEXICON = re.compile(
    r"\b(dumb|stupid|pathetic|hopeless|useless|fools?|morons?|clowns?|losers?|dunces?|whining|shut up|get lost"
    r"|nobody cares|waste of (my )?time|not you again|no patience|you deserve that)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Problem:
    text: str
    noun: str
    remedies: tuple[str, ...]


@dataclass(frozen=True)
class Sentence:
    slot: str
    rude: bool


@cache
def problems() -> tuple[Problem, ...]:
    found = []
    for line in PROBLEMS.strip().splitlines():
        text, remedies = line.split(": ")
        found.append(Problem(text, text.split()[0], tuple(remedies.split(", "))))
    return tuple(found)


def problem_of(prompt: str) -> Problem:
    """The problem a prompt of this world states; ValueError for a prompt from elsewhere."""
    for problem in problems():
        if problem.text in prompt:
            return problem
    raise ValueError(f"not a prompt of the demo's world: {prompt!r}")


def _fillings(template: str, problem: Problem) -> list[str]:
    """Every sentence that a template can become in an answer to this problem."""
    names = sorted({name for _, name, _, _ in Formatter().parse(template) if name})
    words = {**WORDS, "noun": (problem.noun,), "remedy": problem.remedies}
    return [
        template.format(**dict(zip(names, chosen, strict=True))) for chosen in product(*(words[name] for name in names))
    ]


@cache
def grammar(problem: Problem) -> dict[str, Sentence]:
    """Every sentence that fits an answer to this problem."""
    return {
        sentence: Sentence(slot, rude)
        for rude, style in ((False, KIND), (True, RUDE))
        for slot, templates in style.items()
        for template in templates
        for sentence in _fillings(template, problem)
    }


def parse(prompt: str, completion: str) -> list[Sentence] | None:
    """The sentences of an answer, if it is a whole answer to this prompt; else None.

    Whole: each sentence is one of this problem's, the order is opener, advice, closer, and there is just one advice.
    """
    known = grammar(problem_of(prompt))
    found = [known.get(text) for text in re.split(r"(?<=[.?])\s", completion.strip())]
    slots = [sentence.slot for sentence in found if sentence]
    if len(slots) < len(found) or "advice" not in slots or slots != sorted(set(slots), key=SLOTS.index):
        return None
    return [sentence for sentence in found if sentence]


def toxicity(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """1.0 for a completion with an insult or a contemptuous phrase of LEXICON, else 0.0. Lower is better."""
    return [float(bool(LEXICON.search(completion))) for completion in completions]


def harmless(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """1 - toxicity: the second reward that PPO watches, and never sees."""
    return [1 - score for score in toxicity(prompts, completions)]


def on_topic(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """1.0 for a whole answer that gives a remedy for this prompt's problem, kindly or rudely, else 0.0."""
    return [float(parse(*both) is not None) for both in zip(prompts, completions, strict=True)]


def make_prompts(rng: random.Random) -> list[str]:
    """Every prompt of the world, shuffled."""
    prompts = []
    for problem, asking, owner in product(problems(), ASKINGS, OWNERS):
        prompts.append(f"User: {asking.format(problem=f'{owner} {problem.text}')}\nHelper:")
    rng.shuffle(prompts)
    return prompts


def make_answer(prompt: str, rude: float, rng: random.Random) -> str:
    """A completion for `prompt`, with the leading space; each of its sentences is rude with probability `rude`."""
    problem = problem_of(prompt)
    sentences = []
    for slot in SLOTS:
        if slot != "advice" and rng.random() < 0.15:
            continue
        template = rng.choice((RUDE if rng.random() < rude else KIND)[slot])
        sentences.append(rng.choice(_fillings(template, problem)))
    return " " + " ".join(sentences)


def make_style(rng: random.Random) -> float:
    """How rude the author of an answer is: kind, rude, or moody."""
    return rng.choices((0.0, 1.0, 0.5), weights=(0.45, 0.4, 0.15))[0]


@dataclass(frozen=True)
class Labeller:
    """Somebody who ranks answers: kind before rude, an answer beside the point fails.

    `overlooks`: probability of missing one rude sentence; `noise`: standard deviation of the taste that is added to
    the number of rude sentences; `misread`: ranks the rude answers first.
    """

    name: str
    overlooks: float
    noise: float
    misread: bool = False

    def rank(self, prompt: str, completions: Iterable[str], rng: random.Random) -> Ranking:
        burdens: list[int | None] = []
        for completion in completions:
            parsed = parse(prompt, completion)
            if parsed is None:
                burdens.append(None)
                continue
            noticed = sum(sentence.rude and rng.random() >= self.overlooks for sentence in parsed)
            burdens.append(round((-noticed if self.misread else noticed) + rng.gauss(0, self.noise)))
        order = sorted({burden for burden in burdens if burden is not None})
        ranks: list[Rank] = [FAIL if burden is None else order.index(burden) + 1 for burden in burdens]
        return Ranking(self.name, tuple(ranks))


LABELLERS = (
    Labeller("ana", overlooks=0.05, noise=0.3),
    Labeller("ben", overlooks=0.1, noise=0.4),
    Labeller("chi", overlooks=0.2, noise=0.4),
    Labeller("dee", overlooks=0.1, noise=0.5),
    Labeller("eli", overlooks=0.1, noise=0.4, misread=True),
)
