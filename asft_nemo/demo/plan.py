"""What the demo runs: objectives, seeds, sizes; the data it writes; and each run as the words a user would type."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from asft_eval.suites import suite_from_pairs, write_jsonl
from asft_eval.types import Suite

from asft_nemo.demo import skills

TP_SIZE, PP_SIZE = 2, 2
MAX_NEW_TOKENS = 12
"""The longest right answer of any skill has six tokens and an end."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One demo. The optimizer's other settings are the recipe's.

    Attributes:
        objectives: in the order of the report.
        seeds: each objective is trained once a seed; a seed draws the training examples, their wrong answers and their order.
        steps, global_batch_size, micro_batch_size, lr, kl_weight, sequence_length: of every run.
        examples: training examples a seed.
        new_tests: test examples of the new skill.
        old_tests: test examples of each old skill (there are 64 facts).
        text_blocks: the held-out text is measured in so many equal blocks; their spread gives the KL's standard error.
        texts_a_block: texts of one block, a multiple of 8, so that every kind of text is in every block alike.
    """

    objectives: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    global_batch_size: int = 32
    micro_batch_size: int = 16
    lr: float = 5e-4
    kl_weight: float = 0.05
    sequence_length: int = 24
    examples: int = 2000
    new_tests: int
    old_tests: int
    text_blocks: int
    texts_a_block: int


FULL = Plan(
    objectives=("sft", "dft", "sft_kl", "asft"),
    seeds=(0, 1, 2),
    steps=80,
    new_tests=200,
    old_tests=100,
    text_blocks=6,
    texts_a_block=40,
)

QUICK = Plan(
    objectives=("sft", "asft"),
    seeds=(0,),
    steps=20,
    examples=1000,
    new_tests=60,
    old_tests=30,
    text_blocks=4,
    texts_a_block=16,
)


@dataclass(frozen=True)
class Entry:
    """One training run of the plan."""

    objective: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.objective}_seed{self.seed}"


def entries(plan: Plan) -> list[Entry]:
    """All runs, objective by objective within a seed, so that a stopped demo has whole seeds."""
    return [Entry(objective, seed) for seed in plan.seeds for objective in plan.objectives]


def training_file(data_dir: Path, seed: int) -> Path:
    """Where the training examples of a seed lie."""
    return data_dir / f"train_seed{seed}.jsonl"


def suites(plan: Plan) -> list[Suite]:
    """The tests: the new skill first, then every old one. The same for all models."""
    new = suite_from_pairs(skills.NEW_SKILL, skills.new_skill_test(plan.new_tests, 0))
    old = skills.old_skill_tests(plan.old_tests, 0)
    return [new, *(suite_from_pairs(name, samples) for name, samples in old.items())]


def held_out_blocks(plan: Plan) -> list[list[skills.Sample]]:
    """The text on which the drift is measured, in blocks of the same mixture."""
    texts = skills.held_out_text(plan.text_blocks * plan.texts_a_block, 0)
    return [texts[i * plan.texts_a_block : (i + 1) * plan.texts_a_block] for i in range(plan.text_blocks)]


def write_data(plan: Plan, data_dir: Path) -> None:
    """Writes training files, test suites and held-out text as JSON Lines."""
    tests_dir = data_dir / "tests"
    tests_dir.mkdir(parents=True)
    for seed in plan.seeds:
        _write_samples(training_file(data_dir, seed), skills.new_skill_train(plan.examples, seed))
    for suite in suites(plan):
        write_jsonl(tests_dir / f"{suite.name}.jsonl", suite)
    _write_samples(data_dir / "held_out.jsonl", [text for block in held_out_blocks(plan) for text in block])


def _write_samples(path: Path, samples: Sequence[skills.Sample]) -> None:
    path.write_text("".join(json.dumps(sample._asdict()) + "\n" for sample in samples), encoding="utf-8")


def words(plan: Plan, entry: Entry, *, model: Path, data: Path, run_dir: Path) -> list[str]:
    """The run as `asft train` would be told it.

    Args:
        plan: sizes and settings.
        entry: which run.
        model: the base model, a Hugging Face directory or NeMo checkpoint.
        data: the training file.
        run_dir: the run's folder.
    """
    return [
        "recipe=tiny_cpu",
        f"objective={entry.objective}",
        *([f"objective.kl_weight={plan.kl_weight}"] if reads_reference(entry.objective) else []),
        f"model.path={quoted(model)}",
        f"data.train=[{quoted(data)}]",
        "data.template=raw",
        "data.fields.prompt=prompt",
        "data.fields.response=response",
        f"data.sequence_length={plan.sequence_length}",
        f"parallel.tp_size={TP_SIZE}",
        f"parallel.pp_size={PP_SIZE}",
        f"optim.lr={plan.lr}",
        f"trainer.max_steps={plan.steps}",
        f"trainer.global_batch_size={plan.global_batch_size}",
        f"trainer.micro_batch_size={plan.micro_batch_size}",
        f"run.seed={entry.seed}",
        f"run.dir={quoted(run_dir)}",
    ]


def reads_reference(objective: str) -> bool:
    """Whether the objective has a divergence to the reference."""
    from asft_nemo.objectives import OBJECTIVES

    return OBJECTIVES[objective].direction is not None


def quoted(path: Path) -> str:
    """A path as a value of Hydra's grammar, whatever characters it has."""
    from hydra.core.override_parser.types import Quote, QuotedString

    text = str(path)
    plain = all(c.isalnum() or c in "/._-" for c in text)
    return text if plain else QuotedString(text, Quote.single).with_quotes()
