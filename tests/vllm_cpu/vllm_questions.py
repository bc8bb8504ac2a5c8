"""What vLLM and transformers are both asked about the tiny model."""

from __future__ import annotations

SERVED, KEY = "tiny", "key-of-the-test"
SECONDS = 420  # for vLLM to start and answer, on a machine that does other things meanwhile
MAX_TOKENS = 24
EVALUATION = ("--protocol", "both", "--max-tokens", "8")
SKILLS = [f"copy {word}:" for word in ("KTAB", "QZ", "MOTOR", "A")]
SKILLS += [f"reverse {word}:" for word in ("ABC", "QWERTZ", "XY")]
SUMS = [f"add {a}+{b}:" for a, b in ((3, 4), (12, 30), (9, 9), (27, 5), (40, 41))]
STORIES = [
    f"story: the {who} {what}" for who in ("cat", "dog", "old bird") for what in ("sees", "likes a", "is")
]
STRANGE = ["", " ", "zzz 0 zzz", "Ünï 漢字 {x}", "copy " * 40]
PROMPTS = [*SKILLS, *SUMS, *STORIES, *STRANGE]
CHOICES = [" A", "K", " the old cat"]  # the last one has several tokens
TEXTS = [
    ("copy KTAB:", "KTAB"),
    ("add 12+30:", "42"),
    ("reverse ABC:", "CBA"),
    ("story: a dog.", " the old cat sees a hat."),
    ("", "copy"),
]  # fmt: skip
