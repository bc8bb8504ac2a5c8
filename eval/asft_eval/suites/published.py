"""The published suites: version, file, how a row is read, who grades it. A suite more = one row of `SUITES`.

`eval/asft_eval/suites/README.md` says of each which published protocol it matches and where it differs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from asft_eval.errors import EvaluationError, did_you_mean
from asft_eval.suites import code, records
from asft_eval.suites.records import Asked, Record


@dataclass(frozen=True, slots=True)
class Hub:
    """A file of a dataset repository of the Hugging Face hub; it is only looked for in the cache, never fetched."""

    repo: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """One suite.

    Attributes:
        file: below the folder that ASFT_DATA_DIR names (JSON Lines, gzipped or not, or a JSON array).
        field: of the bare question, for finding it in training data.
        read: a row's question and answer.
        grader: a name of `asft_eval.graders`.
        group: what `--suite GROUP` asks.
        rows: of the published file; another number is an error.
        version: changes with prompt, answer or grading.
        prompt: the variant unless one is chosen.
        wraps: whether another variant may be chosen.
        choices: the continuations whose log probabilities decide; empty = the model writes.
        download: the set of `asft data download` that has it; empty = none.
        hub: where its file lies on the hub, for the cache.
        repos: further dataset repositories of the hub with the same questions, by which the suite may be named.
    """

    file: str
    field: str
    read: Callable[[Record], Asked]
    grader: str
    group: str
    rows: int
    version: str = "1"
    prompt: str = "alpaca"
    wraps: bool = True
    choices: tuple[str, ...] = ()
    download: str = ""
    hub: Hub | None = None
    repos: tuple[str, ...] = ()


_FILES = (".jsonl", ".json", ".gz", ".txt")
_LETTERS = tuple(f" {letter}" for letter in records.LETTERS)


def _math(name: str, read: Callable[[Record], Asked], rows: int, **more: object) -> dict[str, Definition]:
    settings = {"file": f"math/{name}_test.jsonl", "field": "problem", "version": "2", **more}
    return {name: Definition(read=read, grader="math", group="math", rows=rows, **settings)}  # type: ignore[arg-type]


def _medical(name: str, read: Callable[[Record], Asked], rows: int, **more: object) -> dict[str, Definition]:
    return {
        name: Definition(
            file=f"medical/{name}_test.jsonl", field="question", read=read, grader="choice", group="medical", rows=rows,
            prompt="raw", wraps=False, choices=_LETTERS, **more,  # type: ignore[arg-type]
        )
    }  # fmt: skip


def _code(name: str, read: Callable[[Record], Asked], rows: int, **more: object) -> dict[str, Definition]:
    settings = {"file": f"code/{name}_test.jsonl", "field": "prompt", **more}
    return {name: Definition(read=read, grader="code", group="code", rows=rows, prompt="raw", **settings)}  # type: ignore[arg-type]


_MATH500 = Hub("HuggingFaceH4/MATH-500", "test.jsonl")
_MEDQA = Hub("GBaker/MedQA-USMLE-4-options", "phrases_no_exclude_test.jsonl")
SUITES: Mapping[str, Definition] = MappingProxyType(
    {
        **_math("math500", records.math500, 500, download="math500", hub=_MATH500),
        **_math("gsm8k", records.gsm8k, 1319, field="question", download="gsm8k", repos=("openai/gsm8k",)),
        **_math("aime24", records.aime24, 30, download="aime24"),
        **_math("aime25", records.aime25, 30, hub=Hub("math-ai/aime25", "test.jsonl")),
        **_math("amc23", records.amc23, 40, field="question", hub=Hub("math-ai/amc23", "test.jsonl")),
        **_math("minerva", records.minerva, 272),
        **_math("olympiadbench", records.olympiad, 675, field="question"),
        **_medical("medqa", records.medqa, 1273, download="medqa", hub=_MEDQA),
        **_medical(
            "medmcqa", records.medmcqa, 4183, download="medmcqa", repos=("openlifescienceai/medmcqa",)
        ),
        **_medical("mmlu_medical", records.mmlu, 2739, download="mmlu"),
        **_code(
            "humaneval",
            code.humaneval,
            164,
            file="code/HumanEval.jsonl.gz",
            download="humaneval",
            repos=("openai/openai_humaneval",),
        ),
        **_code("humaneval_plus", code.humaneval, 164),
        **_code("mbpp", code.mbpp, 500, field="text"),
        **_code("mbpp_plus", code.mbpp, 378),
        "alpaca_eval": Definition(
            file="instruct/alpaca_eval.json",
            field="instruction",
            read=records.alpaca_eval,
            grader="judge",
            group="instruct",
            rows=805,
            version="2",
            download="alpaca_eval",
            hub=Hub("tatsu-lab/alpaca_eval", "alpaca_eval.json"),
        ),
    }
)


def groups() -> dict[str, list[str]]:
    """Group -> its suites, in the order of the table."""
    found: dict[str, list[str]] = {}
    for name, definition in SUITES.items():
        found.setdefault(definition.group, []).append(name)
    return found


def hub_ids() -> dict[str, str]:
    """Id of a dataset on the hub -> the suite that asks its questions."""
    return {
        repo: name
        for name, definition in SUITES.items()
        for repo in (*((definition.hub.repo,) if definition.hub else ()), *definition.repos)
    }


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a dataset's id on the hub, and not that of a file."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not name.endswith(_FILES)


def unknown(name: str) -> EvaluationError:
    """What is said of a name that is neither suite, group nor file."""
    if is_hub_id(name):
        return EvaluationError(
            f"there is no file {name}, and no suite by that id of the hub: of the hub's datasets {', '.join(hub_ids())} can be given, which are looked "
            "up as the suites of their names are, or a JSON Lines file"
        )
    known = did_you_mean(name, [*SUITES, *groups()])
    return EvaluationError(
        f"there is no suite or file {name or '(a name is empty)'}: {known} (the last {len(groups())} are groups), or give a JSON Lines file"
    )


def spread(names: Sequence[str]) -> list[str]:
    """The names without spaces around them, each group as its suites and each id of the hub as its suite, each once and in the order named."""
    members = {**groups(), **{repo: [name] for repo, name in hub_ids().items()}}
    return list(dict.fromkeys(one for name in map(str.strip, names) for one in members.get(name, [name])))
