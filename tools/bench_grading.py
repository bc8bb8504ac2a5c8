"""Seconds that grading takes: 500 problems of mathematics with 16 completions each, HumanEval's programs, and multiple choice, in one run.

    python tools/bench_grading.py --out benchmarks/results --name cpu_grading
    python tools/bench_grading.py --problems 5 --programs 4 --repeats 1 --out runs/bench

Questions and right answers are the published ones (`ASFT_DATA_DIR`, by default ../shared/data); no model wrote the completions, they are made of them:

* mathematics, 16 a problem: six right (the published solution, other spellings), one right without a box, one right after a wrong box, one right and 12,000
  characters long; five wrong but for chance (answers of other problems, a digit or a sign off); one without an answer; one that repeats itself until it is cut.
* mathematics, all different: 16 wrong answers of other problems a problem, so that no comparison is spared. The worst case.
* math-verify alone: the first mixture with its `parse` and `verify` on every pair, as many processes as there are cores, its own time limits; once.
* code: the canonical solutions in the sandbox. choice: the three medical suites.

All run on the cores of this machine, whole suites one after another, in interleaved rounds. Writes `<name>.json` and `<name>.md` into `--out`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import multiprocessing
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from asft_eval import suites
from asft_eval.graders import grade
from asft_eval.suites.load import DATA_DIR_VARIABLE
from asft_eval.types import Example

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench import report

ROOT = Path(__file__).resolve().parents[1]

log = logging.getLogger("bench_grading")

SAMPLES = 16
MIX, WORST, ALONE, CODE, CHOICE = (
    "mathematics",
    "mathematics, all different",
    "math-verify alone",
    "code",
    "choice",
)
BARS = {MIX: 60.0, CODE: 20.0}
"""Seconds at most, at full size."""
FULL = {MIX: 500 * SAMPLES, CODE: 164}
_MEDICAL = ("medqa", "medmcqa", "mmlu_medical")
_LONG = 12_000
_THINKING = "Let us check this step once more, because the sum in it may hide a mistake. "

Pairs = list[tuple[Example, str]]


def spelled(answer: str) -> str:
    """A right answer as another writer spells it."""
    return answer.replace(r"\frac", r"\dfrac").replace(",", ", ").replace("+", " + ")


def nearly(answer: str) -> str:
    """A wrong answer that looks right: the last digit is another, or the sign where there is none."""
    places = [match.start() for match in re.finditer(r"\d", answer)]
    if not places:
        return f"-({answer})"
    last = places[-1]
    return f"{answer[:last]}{(int(answer[last]) + 3) % 10}{answer[last + 1 :]}"


def completions(place: int, answers: Sequence[str], solution: str) -> list[str]:
    """The mixture of one problem; see the module's text."""
    right = answers[place]
    others = [answers[(place + step) % len(answers)] for step in (1, 7, 31)]
    return [
        *(f"{start}{solution}" for start in ("", "We begin.\n", "Step 1. ", "Note that ")),
        f"{solution[:300]}\nSo the result is $\\boxed{{{spelled(right)}}}$.",
        f"Hence $x = y$ and we get \\[ \\boxed{{ {right} }} \\]",
        f"{solution[:200]}\nThe answer is ${right}$.",
        f"First I found $\\boxed{{{others[0]}}}$, which is wrong. It is $\\boxed{{{right}}}$.",
        f"{_THINKING * (_LONG // len(_THINKING))}\n$\\boxed{{{right}}}$",
        *(f"{solution[:400]}\nThus $\\boxed{{{other}}}$." for other in others),
        f"{solution[:400]}\nThus $\\boxed{{{nearly(right)}}}$.",
        f"We conclude that the answer is $-{nearly(right)}$.",
        f"{_THINKING}I cannot finish this problem with what is given here.",
        f"{solution[:100]}\n" + "Wait, that is not it. " * (_LONG // 22),
    ]  # fmt: skip


def mathematics(problems: int) -> tuple[Pairs, Pairs]:
    """The mixture, and the worst case."""
    suite = suites.load_suite("math500")
    examples = suite.examples[:problems]
    file = Path(os.environ[DATA_DIR_VARIABLE]) / "math" / "math500_test.jsonl"
    solutions = [json.loads(line)["solution"] for line in file.read_text(encoding="utf-8").splitlines()]
    every = [example.answer for example in suite.examples]
    mixture = [
        (example, text) for i, example in enumerate(examples) for text in completions(i, every, solutions[i])
    ]
    worst = [
        (example, f"So $\\boxed{{{every[(i + 29 * step) % len(every)]}}}$.")
        for i, example in enumerate(examples)
        for step in range(1, SAMPLES + 1)
    ]
    return mixture, worst


def programs(count: int) -> Pairs:
    """HumanEval with its canonical solutions."""
    file = Path(os.environ[DATA_DIR_VARIABLE]) / "code" / "HumanEval.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as rows:
        solutions = [json.loads(row)["canonical_solution"] for row in rows]
    return list(zip(suites.load_suite("humaneval").examples, solutions, strict=True))[:count]


def choices() -> Pairs:
    """Every medical question, answered A."""
    return [(example, " A") for name in _MEDICAL for example in suites.load_suite(name).examples]


def _by_math_verify(pair: tuple[str, str]) -> bool:
    from math_verify import parse, verify

    gold, text = pair
    return bool(verify(parse(f"${gold}$"), parse(text)))


def alone(pairs: Pairs) -> list[bool]:
    """What math-verify says without anything around it."""
    texts = [(example.answer, text) for example, text in pairs]
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        return pool.map(_by_math_verify, texts, chunksize=20)


def graded(name: str, pairs: Pairs) -> list[bool]:
    """The verdicts of a grader."""
    return [score.correct for score in grade(name, pairs, allow_code_execution=True)]


def processor_seconds() -> float:
    """Of this process and of the children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(
    work: dict[str, tuple[Pairs, Callable[[Pairs], list[bool]]]], repeats: int
) -> dict[str, dict[str, Any]]:
    """Seconds of every kind of work in every round, and its verdicts."""
    found: dict[str, dict[str, Any]] = {
        name: {"completions": len(pairs), "seconds": [], "processor_seconds": [], "idle_before": []}
        for name, (pairs, _) in work.items()
    }
    verdicts: dict[str, list[bool]] = {}
    for number in range(repeats):
        for name, (pairs, judge) in work.items():
            if name == ALONE and number:
                continue
            idle = report.idle_share()
            used, began = processor_seconds(), time.perf_counter()
            verdicts[name] = judge(pairs)
            seconds = time.perf_counter() - began
            found[name]["seconds"].append(round(seconds, 3))
            found[name]["processor_seconds"].append(round(processor_seconds() - used, 3))
            found[name]["idle_before"].append(idle)
            log.info("round %d, %s: %.1f s", number + 1, name, seconds)
    for name, row in found.items():
        row["right"] = sum(verdicts[name])
    found[CODE]["processor_seconds"] = None  # its processes belong to nobody who could count them
    if ALONE in verdicts:
        pairs = zip(verdicts[MIX], verdicts[ALONE], strict=True)
        found[ALONE]["verdicts_as_ours"] = sum(a == b for a, b in pairs)
    return found


def bars(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Which bars were met, of what was measured at full size."""
    rows = [(name, limit, found[name]) for name, limit in BARS.items()]
    return [
        {"what": name, "at_most_seconds": limit, "seconds": max(row["seconds"]), "met": max(row["seconds"]) < limit}
        for name, limit, row in rows
        if row["completions"] == FULL[name]
    ]  # fmt: skip


def table(found: dict[str, dict[str, Any]], verdicts: list[dict[str, Any]]) -> str:
    """Markdown: what was graded, then the bars."""
    lines = [
        "| what | completions | right | seconds, median (min to max) | processor seconds, median | completions/s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found.items():
        took = report.spread(row["seconds"])
        used = (
            "" if row["processor_seconds"] is None else f"{statistics.median(row['processor_seconds']):.1f}"
        )
        digits = 1 if took["median"] >= 1 else 3
        spread = f"{took['median']:.{digits}f} ({took['min']:.{digits}f} to {took['max']:.{digits}f})"
        rate = f"{row['completions'] / took['median']:.0f}"
        lines.append(f"| {name} | {row['completions']} | {row['right']} | {spread} | {used} | {rate} |")
    if verdicts:
        lines += ["", "| bar | at most | slowest round | |", "| --- | --- | --- | --- |"]
    for bar in verdicts:
        met = "met" if bar["met"] else "**missed**"
        lines.append(f"| {bar['what']} | {bar['at_most_seconds']:.0f} s | {bar['seconds']:.1f} s | {met} |")
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=500, help="of mathematics, 1 to 500")
    parser.add_argument("--programs", type=int, default=164, help="of HumanEval, 1 to 164")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--without-alone", action="store_true", help="leave math-verify alone out")
    parser.add_argument("--note", default="", help="what else ran, for the record")
    parser.add_argument("--name", default="bench_grading", help="of the files written")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return parser


def main() -> None:
    """Measures and writes."""
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault(DATA_DIR_VARIABLE, str(ROOT.parent / "shared" / "data"))
    mixture, worst = mathematics(arguments.problems)
    work: dict[str, tuple[Pairs, Callable[[Pairs], list[bool]]]] = {
        MIX: (mixture, lambda pairs: graded("math", pairs)),
        WORST: (worst, lambda pairs: graded("math", pairs)),
        CODE: (programs(arguments.programs), lambda pairs: graded("code", pairs)),
        CHOICE: (choices(), lambda pairs: graded("choice", pairs)),
    }
    if not arguments.without_alone:
        work[ALONE] = (mixture, alone)
    found = measure(work, arguments.repeats)
    record = {
        "environment": report.environment(),
        "note": arguments.note,
        "results": found,
        "bars": bars(found),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = table(found, record["bars"])
    (arguments.out / f"{arguments.name}.json").write_text(
        json.dumps(record, indent=1) + "\n", encoding="utf-8"
    )
    (arguments.out / f"{arguments.name}.md").write_text(text, encoding="utf-8")
    log.info("%s", text)


if __name__ == "__main__":
    main()
