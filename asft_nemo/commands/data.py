"""asft data: the files a run will read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asft_nemo.commands.output import DONE, MENDABLE, Parser, answer, not_yet
from asft_nemo.errors import UserError

if TYPE_CHECKING:
    from asft_nemo.config.schema import FieldsConfig
    from asft_nemo.data import LoadReport
    from asft_nemo.data.contamination import Contaminated


def add_data(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the commands."""
    data = commands.add_parser(
        "data", help="validate the files a run will read", description="Validate data files."
    )
    kinds = data.add_subparsers(metavar="KIND", required=True, parser_class=Parser)
    text = "counts, lengths and every bad row; exit code 2 when a row is bad"
    check = kinds.add_parser("check", help=text, description=text, parents=[common])
    check.add_argument(
        "words",
        nargs="+",
        metavar="FILE | KEY=VALUE",
        help="files or directories, and settings such as data.template=chat or model.path=DIR (tokenizer)",
    )
    check.add_argument(
        "--against",
        metavar="SUITE[,SUITE]",
        help="evaluation suites, by name (math500, gsm8k, ...; in the folder ASFT_DATA_DIR names) or JSON Lines file with `prompt`: rows that "
        "hold one of their questions are reported",
    )
    check.set_defaults(command=_data_check)
    for name in ("prepare", "download"):
        later = kinds.add_parser(name, help="(not available yet)", parents=[common])
        later.set_defaults(command=not_yet, name=f"data {name}", instead="give your own files in data.train")


def _data_check(arguments: argparse.Namespace) -> int:
    files = [word for word in arguments.words if "=" not in word or Path(word).exists()]
    overrides = [word for word in arguments.words if word not in files]
    if not files:
        raise UserError("asft data check got no file: name at least one")
    from asft_nemo.config.load import compose

    given = {word.partition("=")[0] for word in overrides}
    # Only the data settings and the tokenizer matter here, so the rest of a run need not be spelt out.
    fill = ("recipe=tiny_cpu", "objective=sft")
    run = compose(
        [word for word in fill if word.partition("=")[0] not in given] + overrides, check_inputs=False
    )
    from asft_nemo.data import TextTokenizer, inspect_files

    report = inspect_files(files, run.data, tokenizer=TextTokenizer.load(_tokenizer_dir(run.model.path)))
    summary = report.summary()
    bad = [row._asdict() for row in report.bad]
    values = {
        **summary,
        "sequence_length": run.data.sequence_length,
        "tokenizer": run.model.path,
        "bad_rows": bad,
    }
    words = _data_words(report, run.data.sequence_length, run.model.path)
    found = [] if arguments.against is None else _contaminated(files, run.data.fields, arguments.against)
    if arguments.against is not None:
        values["contaminated_rows"] = [row._asdict() for row in found]
        words += f"\n{len(found)} rows hold a question of {arguments.against}"
    answer(arguments, values, words)
    for row in (*report.bad, *found) if not arguments.json else ():
        print(row, file=sys.stderr)
    return MENDABLE if bad else DONE


def _contaminated(files: list[str], fields: FieldsConfig, suites: str) -> list[Contaminated]:
    from asft_eval.errors import EvaluationError
    from asft_eval.suites.questions import questions

    from asft_nemo.data.contamination import EvaluationIndex, contaminated
    from asft_nemo.data.sources import read_records

    try:
        index = EvaluationIndex({suite: questions(suite) for suite in suites.split(",")})
    except EvaluationError as error:
        raise UserError(str(error)) from error
    return list(contaminated(read_records(files, fields), index))


def _tokenizer_dir(model_path: str) -> Path:
    inside = Path(model_path) / "context" / "hf"
    return inside if inside.is_dir() else Path(model_path)


def _data_words(report: LoadReport, sequence_length: int, tokenizer: str) -> str:
    lines = [f"{report.rows} rows, {report.rows - len(report.bad)} usable, {len(report.bad)} bad"]
    if report.lengths:
        figures = report.summary()["lengths"]
        words = ", ".join(f"{name} {value}" for name, value in figures.items())
        lines.append(f"tokens an example: {words} (tokenizer of {tokenizer})")
        lines.append(
            f"{report.too_long} examples are longer than data.sequence_length={sequence_length}; "
            f"{report.kept} remain with {report.tokens} tokens, {report.learned_tokens} of them learned"
        )
    return "\n".join(lines)
