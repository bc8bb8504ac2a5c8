"""asft data prepare."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asft_nemo.commands.data_words import files_and_run, questions_of, tokenizer_dir
from asft_nemo.commands.output import DONE, answer, progress_of
from asft_nemo.errors import UserError

if TYPE_CHECKING:
    from asft_nemo.data.preparation import Result, Suites

_TEMPLATES = ("data.templates", "data.validation_templates")


def add_prepare(kinds: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command."""
    text = "tokenise files once, in parallel, to a directory that data.train and data.validation take"
    prepare = kinds.add_parser("prepare", help=text, description=text, parents=[common])
    prepare.add_argument(
        "words",
        nargs="+",
        metavar="FILE | KEY=VALUE",
        help="files, patterns or directories, and settings such as data.template=chat and model.path=DIR (tokenizer)",
    )
    prepare.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="the prepared directory: a new one, or one from before, of which what has not changed is used again",
    )
    prepare.add_argument(
        "--workers", type=_workers, metavar="N", help="tokenising processes (default: one for each core)"
    )
    prepare.add_argument(
        "--drop-contaminated",
        metavar="SUITE[,SUITE]",
        help="evaluation suites, named as for asft data check --against: rows that hold one of their questions are left out",
    )
    prepare.set_defaults(command=_prepare)


def _workers(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of processes: give 1 or more")
    return int(text)


def _prepare(arguments: argparse.Namespace) -> int:
    # Ahead of the run's own rules, which would ask for as many templates as there are entries.
    named = [word.partition("=")[0] for word in arguments.words if not word.endswith("=[]")]
    _refuse_templates([key for key in _TEMPLATES if key in named])
    files, run = files_and_run(arguments.words, command="asft data prepare")
    in_recipe = (run.data.templates, run.data.validation_templates)
    _refuse_templates([key for key, value in zip(_TEMPLATES, in_recipe, strict=True) if value])
    from asft_nemo.data.preparation import prepare_files

    names = arguments.drop_contaminated
    with progress_of("prepare") as progress:
        result = prepare_files(
            files,
            run.data,
            tokenizer_dir=tokenizer_dir(run.model.path),
            out=arguments.out,
            workers=arguments.workers or len(os.sched_getaffinity(0)),
            suites=None if names is None else _suites(names),
            progress=progress,
        )
    answer(arguments, _values(result, arguments.out), _words(result, arguments.out))
    return DONE


def _refuse_templates(keys: Sequence[str]) -> None:
    if keys:
        raise UserError(
            f"asft data prepare makes one domain with one template, data.template, and takes no {keys[0]}: set {keys[0]}=[] or leave it "
            "out, and prepare each domain into a directory of its own with data.template=..."
        )


def _suites(names: str) -> Suites:
    from asft_nemo.data.contamination import EvaluationIndex
    from asft_nemo.data.preparation import Suites

    suites = questions_of(names)
    digest = hashlib.sha256(json.dumps(list(suites.items())).encode()).hexdigest()
    return Suites(tuple(suites), EvaluationIndex(suites), digest)


def _values(result: Result, out: Path) -> dict[str, Any]:
    total = asdict(result.manifest.total())
    return {
        "out": str(out),
        **{name: total[name] for name in ("rows", "examples", "tokens", "learned")},
        "bad_rows": total["bad"],
        "contaminated_rows": total["contaminated"],
        "sources": [
            {"file": source.name, "bytes": source.bytes, "sha256": source.sha256, **asdict(source.counts)}
            for source in result.manifest.sources
        ],
        "tokenised": result.made,
        "used_again": result.used_again,
        "unchanged": result.unchanged,
    }


def _words(result: Result, out: Path) -> str:
    total = result.manifest.total()
    left_out = {"bad": total.bad, "with evaluation questions": total.contaminated}
    dropped = ", ".join(f"{number} {why}" for why, number in left_out.items() if number)
    rows = f"{total.rows} rows{f' ({dropped}: left out)' if dropped else ''}"
    held = f"{rows}, {total.examples} examples, {total.tokens} tokens, {total.learned} of them learned"
    if result.unchanged:
        return f"{out} is up to date: {held}"
    again = f", {result.used_again} as before" if result.used_again else ""
    files = "file" if result.made == 1 else "files"
    return f"{held}\n{result.made} {files} tokenised{again}; train with data.train=[{out}]"
