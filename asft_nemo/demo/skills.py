"""The small world of the demo: skills, the text the base model was pre-trained on, and the new skill it is fine-tuned on.

Everything is generated here from a seed; no file is read. A skill turns a random number generator into a `Sample`. Its
prompts are divided by a hash of the prompt itself into two parts that cannot meet: pre-training and fine-tuning draw from
the one, tests and held-out text from the other. Fact recall is the exception and says so: a fact can only be recalled if
it was seen, so its tests ask the facts of pre-training.

Strings are written in capitals without spaces, because the tokenizer of `tools/make_tiny_base.py` keeps every capital and
every digit a token of its own: reversing five letters is moving five tokens.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

LETTERS = string.ascii_uppercase
MIN_LETTERS, MAX_LETTERS = 3, 6
LARGEST_ADDEND = 99
TEST_SHARE = 0.1  # of all prompts of a skill, by hash

NEW_SKILL = "swap"
"""The skill the demo fine-tunes: first and last letter change places. Pre-training showed it rarely: one example in 470."""

WRONG_SHARE = 0.4
"""Share of wrong answers in the fine-tuning data of the new skill; tests are always right."""


class Sample(NamedTuple):
    """One prompt and its response; the text of a training example is `prompt + response` and the end token."""

    prompt: str
    response: str


def is_test_prompt(prompt: str) -> bool:
    """Whether a prompt belongs to the tests, decided by its SHA-256 alone, so that no seed can move it across."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:4], "big") < TEST_SHARE * 2**32


def _letters(rng: random.Random) -> str:
    return "".join(rng.sample(LETTERS, rng.randint(MIN_LETTERS, MAX_LETTERS)))


def _next_letters(letters: str) -> str:
    return "".join(LETTERS[(LETTERS.index(x) + 1) % len(LETTERS)] for x in letters)


RULES: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {
        "copy": lambda letters: letters,
        "reverse": lambda letters: letters[::-1],
        "up": lambda letters: "".join(sorted(letters)),
        "down": lambda letters: "".join(sorted(letters, reverse=True)),
        "next": _next_letters,  # the alphabet is a ring: A follows Z
        "back": lambda letters: _next_letters(letters)[::-1],
        "swap": lambda letters: letters[-1] + letters[1:-1] + letters[0],
    }
)
"""What each skill on letters makes of them; the prompt is `NAME LETTERS:`."""


def _on_letters(name: str) -> Callable[[random.Random], Sample]:
    def draw(rng: random.Random) -> Sample:
        letters = _letters(rng)
        return Sample(f"{name} {letters}:", RULES[name](letters))

    return draw


def _add(rng: random.Random) -> Sample:
    a, b = rng.randint(0, LARGEST_ADDEND), rng.randint(0, LARGEST_ADDEND)
    return Sample(f"add {a}+{b}:", str(a + b))


def _made_up_word(rng: random.Random, syllables: int) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))


def _made_up_facts() -> Mapping[str, str]:
    rng = random.Random("facts of the small world")
    capitals: dict[str, str] = {}
    while len(capitals) < 64:
        capitals[_made_up_word(rng, 3)] = _made_up_word(rng, 2)
    return MappingProxyType(capitals)


CAPITALS = _made_up_facts()
"""64 made-up lands and their capitals."""


def _fact(rng: random.Random) -> Sample:
    land = rng.choice(tuple(CAPITALS))
    return Sample(f"capital of {land}:", CAPITALS[land])


_NOUNS = (
    "cat",
    "dog",
    "bird",
    "fox",
    "king",
    "queen",
    "farmer",
    "baker",
    "child",
    "teacher",
    "robot",
    "dragon",
    "sailor",
    "doctor",
)
_THINGS = (
    "apple",
    "book",
    "stone",
    "river",
    "house",
    "garden",
    "letter",
    "lamp",
    "boat",
    "cake",
    "song",
    "hat",
)
_ADJECTIVES = ("red", "blue", "small", "old", "happy", "quiet", "brave", "clever", "tired", "golden")
_VERBS = ("sees", "finds", "likes", "carries", "paints", "hides", "sells", "follows", "wants", "remembers")
_PLACES = ("in the forest", "by the sea", "at home", "under the bridge", "near the market", "on the hill")
_TIMES = ("today", "at night", "in the morning", "after the rain", "every day")


def _sentence(rng: random.Random) -> str:
    one = f"{rng.choice(['the', 'a'])} {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"
    two = f"{rng.choice(['the', 'a'])} {rng.choice(_THINGS)}"
    tail = " ".join(
        x for x in (rng.choice(["", rng.choice(_PLACES)]), rng.choice(["", rng.choice(_TIMES)])) if x
    )
    return f"{one} {rng.choice(_VERBS)} {two}{' ' + tail if tail else ''}."


def _story(rng: random.Random) -> Sample:
    first = _sentence(rng)
    return Sample(f"story: {first}", f" {_sentence(rng)} {_sentence(rng)}")


SKILLS: Mapping[str, Callable[[random.Random], Sample]] = MappingProxyType(
    {
        **{name: _on_letters(name) for name in RULES},
        "add": _add,
        "fact": _fact,
        "story": _story,
    }
)

PRETRAINING_MIX: Mapping[str, float] = MappingProxyType(
    {
        "copy": 1.0,
        "reverse": 2.0,
        "up": 3.0,
        "down": 0.03,
        "back": 0.03,
        "swap": 0.03,
        "next": 2.0,
        "add": 4.0,
        "fact": 1.5,
        "story": 0.6,
    }
)
"""Relative number of examples of each skill in pre-training. Their order is part of the seed's meaning."""

OLD_SKILLS = ("copy", "reverse", "up", "next", "back", "add", "fact")
"""Skills with one right answer that pre-training taught and fine-tuning does not show. `down` is missing on purpose: it was
shown as rarely as the new skill and was hardly learned, so there is nothing to forget."""


def _draw(name: str, rng: random.Random, *, test: bool) -> Sample:
    while True:
        sample = SKILLS[name](rng)
        if name == "fact" or is_test_prompt(sample.prompt) == test:
            return sample


def _draw_distinct(name: str, n: int, seed: int, *, test: bool) -> list[Sample]:
    """`n` samples with distinct prompts (at most the 64 facts); ValueError where the skill has not so many."""
    if name == "fact":
        facts = [Sample(f"capital of {land}:", capital) for land, capital in CAPITALS.items()]
        return facts[:n]
    rng = random.Random(f"{name} {'test' if test else 'train'} {seed}")
    chosen: dict[str, Sample] = {}
    for _ in range(20 * n):
        if len(chosen) == n:
            break
        sample = _draw(name, rng, test=test)
        chosen.setdefault(sample.prompt, sample)
    else:
        raise ValueError(
            f"skill {name} has no {n} distinct {'test' if test else 'training'} prompts: ask for fewer"
        )
    return list(chosen.values())


def pretraining_samples(seed: int) -> Iterator[Sample]:
    """Endless examples of the pre-training mix; never a test prompt (facts excepted, see the module's text)."""
    rng = random.Random(f"pretraining {seed}")
    names, weights = tuple(PRETRAINING_MIX), tuple(PRETRAINING_MIX.values())
    while True:
        for name in rng.choices(names, weights, k=1024):
            yield _draw(name, rng, test=False)


def new_skill_train(n: int, seed: int, *, wrong_share: float = WRONG_SHARE) -> list[Sample]:
    """`n` fine-tuning examples of the new skill with distinct prompts; a share of the answers is wrong.

    A wrong answer has the right letters in a wrong order, drawn once per example: what careless annotators leave in a real
    data set. The prompts do not depend on `wrong_share`.
    """
    rng = random.Random(f"wrong answers {seed}")
    return [
        _spoilt(sample, rng) if rng.random() < wrong_share else sample
        for sample in _draw_distinct(NEW_SKILL, n, seed, test=False)
    ]


def _spoilt(sample: Sample, rng: random.Random) -> Sample:
    letters = list(sample.response)
    while "".join(letters) == sample.response:
        rng.shuffle(letters)
    return Sample(sample.prompt, "".join(letters))


def tests(name: str, n: int, seed: int) -> list[Sample]:
    """`n` test examples of a skill with distinct prompts, none of which training can draw (facts: at most 64, all seen)."""
    return _draw_distinct(name, n, seed, test=True)


def new_skill_test(n: int, seed: int) -> list[Sample]:
    """`n` test examples of the new skill; every answer is right."""
    return tests(NEW_SKILL, n, seed)


def old_skill_tests(n: int, seed: int) -> dict[str, list[Sample]]:
    """At most `n` test examples of each old skill (there are 64 facts), by name."""
    return {name: tests(name, n, seed) for name in OLD_SKILLS}


def held_out_text(n: int, seed: int) -> list[Sample]:
    """`n` test examples of the old skills and of stories in turn: the text on which the drift from the base is measured."""
    names = (*OLD_SKILLS, "story")
    rngs = {name: random.Random(f"held-out {name} {seed}") for name in names}
    return [_draw(names[i % len(names)], rngs[names[i % len(names)]], test=True) for i in range(n)]
