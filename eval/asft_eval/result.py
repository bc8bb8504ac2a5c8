"""`results.json`: what was measured, how, on what, with which versions. Schema version 4; docs/evaluation.md says it in full.

    {schema_version, model: {path, fingerprint}, backend, protocol, seed, versions: {package: version},
     suites: {name: {version, sha256, grader, prompt, protocol: {name, max_tokens, n, temperature, top_p, seed, k},
                     backend, n, right, accuracy, stderr, interval, tokens, cut, seconds, calibration}}}

`backend` and `protocol` are those that were asked for last; each suite has its own, for a folder may gather several evaluations of one model, and `both` is two. Where completions are drawn, the
suite's name is SUITE@PROTOCOL. `n` examples, `right` completions of `n * protocol.n`; `accuracy` the mean over examples of their share
of right completions, or of pass@k; `stderr` its standard error over examples; `interval` 95 %, Wilson's; `tokens` generated in all;
`cut` completions that `max_tokens` ended; `seconds` the model took; `calibration` that of multiple choice (`asft_eval.calibration`), else null; `seed` null where nothing is drawn. Beside it `samples.jsonl` holds one
line a completion: suite, id, sample, prompt, answer, completion, num_tokens, finished, seconds, logprobs (multiple choice: of each choice),
request (a hash of all that the completion depends on), parsed, correct, reason. `for_judge` has the suites that a judge decides (`asft_eval.judge`), with
the figures that need no verdict; they are in `suites` too as soon as one has, and until then the `correct` of their samples is null.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from asft_eval.errors import EvaluationError, one_line
from asft_eval.types import Protocol

SCHEMA_VERSION = 4
_READABLE = (2, 3, 4)  # 2 had no drift; 3 no backend and no calibration of a suite
RESULTS, SAMPLES = "results.json", "samples.jsonl"

_ALWAYS = ("suite", "id", "sample", "prompt", "answer", "completion", "num_tokens", "finished")
"""What every line of `samples.jsonl` has, graded or not."""
_BLOCK = 1 << 16
_BLOCKS_OF_A_LARGE_FILE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteResult:
    """One suite's figures; the names are those of `results.json`."""

    version: str
    sha256: str
    grader: str
    prompt: str
    protocol: Protocol
    backend: str
    n: int
    right: int
    accuracy: float
    stderr: float
    interval: tuple[float, float]
    tokens: int
    cut: int
    seconds: float
    calibration: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Everything in one `results.json`."""

    model: Mapping[str, str]
    backend: str
    protocol: str
    seed: int | None
    versions: Mapping[str, str]
    suites: Mapping[str, SuiteResult]
    drift: Mapping[str, Any] | None = None
    for_judge: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """The object as written to the file."""
        return asdict(self)


def fingerprint(model_dir: Path) -> str:
    """SHA-256 over names, sizes and content of the model's JSON and safetensors files.

    Of a file larger than 4 MiB 64 evenly spaced blocks of 64 KiB are read, the first and the last among them, so that a
    model of 140 GB takes a moment. Two checkpoints of one training run differ in every block.
    """
    digest = hashlib.sha256()
    files = sorted(x for x in model_dir.iterdir() if x.suffix in (".json", ".safetensors") and x.is_file())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            if size <= _BLOCK * _BLOCKS_OF_A_LARGE_FILE:
                digest.update(content.read())
                continue
            for i in range(_BLOCKS_OF_A_LARGE_FILE):
                content.seek((size - _BLOCK) * i // (_BLOCKS_OF_A_LARGE_FILE - 1))
                digest.update(content.read(_BLOCK))
    return digest.hexdigest()


def write_result(out_dir: Path, result: Result, samples: Iterable[Mapping[str, Any]]) -> None:
    """Write `samples.jsonl`, then `results.json`, each complete or not at all."""
    out_dir.mkdir(parents=True, exist_ok=True)
    write_whole(out_dir / SAMPLES, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in samples))
    write_whole(out_dir / RESULTS, json.dumps(result.to_json(), indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there complete or not at all.

    Raises:
        OSError: it cannot be written; it is named.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    with named(path):
        try:
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, path)
        except OSError:  # most likely a full disk, where a part of a file takes room from the next one
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise


@contextmanager
def named(path: Path) -> Generator[None, None, None]:
    """The system names no file when writing to an open one fails, for example on a full disk: within, its error names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def read_result(result_dir: Path | str) -> Result:
    """Read the `results.json` of a directory.

    Raises:
        EvaluationError: there is none, it is damaged, or of another schema version.
    """
    path = Path(result_dir) / RESULTS
    if not path.is_file():
        raise EvaluationError(
            f"{result_dir} holds no {RESULTS}: evaluate a model with this directory as --out first"
        )
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=constant)
        found = content["schema_version"]
        if found not in _READABLE:
            raise EvaluationError(
                f"{path} has schema version {found}, this is {SCHEMA_VERSION}: use the asft that wrote it, or move that file away and evaluate again"
            )
        rows: dict[str, dict[str, Any]] = content["suites"]
        for row in [*rows.values(), *content.get("for_judge", {}).values()]:
            row.setdefault("backend", content["backend"])
            row.setdefault("calibration", None)
        for row in rows.values():
            row["interval"] = tuple(row["interval"])
            row["protocol"] = Protocol(**row["protocol"])
        content["suites"] = {name: SuiteResult(**row) for name, row in rows.items()}
        content["schema_version"] = SCHEMA_VERSION
        return Result(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{path} is damaged ({error}): move that file away and evaluate again"
        ) from error


def read_samples(result_dir: Path | str) -> list[dict[str, Any]]:
    """The lines of `samples.jsonl`; see `each_sample`."""
    return list(each_sample(result_dir))


def each_sample(result_dir: Path | str) -> Iterator[dict[str, Any]]:
    """The lines of `samples.jsonl`, one at a time: all of them may be gigabytes.

    Raises:
        EvaluationError: there is no such file, or a line is damaged.
    """
    path = Path(result_dir) / SAMPLES
    try:
        # Lines of a file end at line feeds alone; splitlines() would also cut at U+2028 within a completion.
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield _sample(line, f"line {number} of {path}")
    except FileNotFoundError:
        raise EvaluationError(f"{result_dir} holds no {SAMPLES}: evaluate again") from None


def constant(name: str) -> float:
    """For `json.loads`: a log probability may be minus infinity, and nothing that was measured is NaN.

    Raises:
        ValueError: it is.
    """
    if name == "NaN":
        raise ValueError("NaN is no number")
    return float(name)


def _sample(line: bytes, where: str) -> dict[str, Any]:
    try:
        row: Any = json.loads(line, parse_constant=constant)
        lacks = [f"no {name}" for name in _ALWAYS if name not in row]
    except (ValueError, TypeError, RecursionError) as error:
        row, lacks = None, [one_line(error)]
    if lacks:
        raise EvaluationError(
            f"{where} is damaged ({lacks[0]}): evaluate with this directory as --out again, which asks only what is lost"
        )
    return row
