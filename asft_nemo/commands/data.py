"""asft data: the files a run will read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asft_nemo.commands.data_words import files_and_run, questions_of, tokenizer_dir
from asft_nemo.commands.download import add_download
from asft_nemo.commands.output import DONE, MENDABLE, Parser, answer
from asft_nemo.commands.preparation import add_prepare
from asft_nemo.errors import UserError

if TYPE_CHECKING:
    from asft_nemo.config.schema import FieldsConfig, RunConfig
    from asft_nemo.data import TextTokenizer
    from asft_nemo.data.contamination import Contaminated
    from asft_nemo.data.inspection import Inspection


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
        help="evaluation suites, named as for asft eval (math500, gsm8k, ..., math, medical, code), or JSON Lines files with `prompt`: rows that "
        "hold one of their questions are reported",
    )
    check.add_argument(
        "--show",
        type=int,
        default=2,
        metavar="N",
        help="examples of each entry to print (default: %(default)s)",
    )
    check.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="of the examples (default: %(default)s)",
    )
    check.set_defaults(command=_data_check)
    add_prepare(kinds, common)
    add_download(kinds, common)


def _data_check(arguments: argparse.Namespace) -> int:
    files, run = files_and_run(arguments.words, command="asft data check")
    from asft_nemo.data import TextTokenizer, inspect_files

    show = arguments.show
    if show < 0:
        raise UserError(f"--show={show} is negative: give 0 or more")
    folder = tokenizer_dir(run.model.path)
    tokenizer = TextTokenizer.load(folder)
    _refuse_smaller_model(tokenizer, folder)
    report = inspect_files(files, run.data, tokenizer=tokenizer, show=0 if arguments.json else show)
    found = [] if arguments.against is None else _contaminated(files, run.data.fields, arguments.against)
    if arguments.json:
        answer(arguments, _values(report, found, run, arguments.against), "")
    else:
        _say(report, found, run, tokenizer, arguments)
    return MENDABLE if report.bad else DONE


def _refuse_smaller_model(tokenizer: TextTokenizer, folder: Path) -> None:
    """Holds the tokenizer against the model beside it, where there is one."""
    from asft_nemo.config.model_shape import read_model_shape

    if (folder / "config.json").is_file():
        tokenizer.refuse_smaller_model(read_model_shape(folder).vocab_size)


def _values(
    report: Inspection, found: list[Contaminated], run: RunConfig, against: str | None
) -> dict[str, Any]:
    """The answer for --json."""
    from asft_nemo.data.inspection import histogram

    total, twins = report.total(), report.duplicates
    bound = run.data.sequence_length
    values = {
        **total.summary(),
        "histogram": [found._asdict() for found in histogram(total.lengths, bound + 1)],
        "duplicates": None if twins is None else twins._asdict(),
        "entries": {entry.name: entry.summary() for entry in report.entries},
        "sequence_length": bound,
        "tokenizer": run.model.path,
        "reasons": [{"reason": kind.reason, "rows": kind.rows} for kind in report.reasons()],
        "bad_rows": [row._asdict() for row in report.bad],
    }
    if against is not None:
        values["contaminated_rows"] = [row._asdict() for row in found]
    return values


def _say(
    report: Inspection,
    found: list[Contaminated],
    run: RunConfig,
    tokenizer: TextTokenizer,
    arguments: argparse.Namespace,
) -> None:
    """The answer for people; every bad row on stderr, behind the summary."""
    from asft_nemo.commands import check_words

    words = [check_words.check_words(report, run.data, run.model.path)]
    if arguments.against is not None:
        words.append(f"{len(found)} rows hold a question of {arguments.against}")
    if report.shown:
        colour = check_words.coloured(arguments.color, sys.stdout)
        words.append("\n" + check_words.legend(colour=colour))
        words += [
            "\n" + check_words.example_words(shown, run.data, tokenizer, colour=colour)
            for shown in report.shown
        ]
    print(check_words.printable("\n".join(words), sys.stdout), flush=True)
    for row in (*report.bad, *found):
        print(row, file=sys.stderr)


def _contaminated(files: list[str], fields: FieldsConfig, suites: str) -> list[Contaminated]:
    from asft_nemo.data.contamination import EvaluationIndex, contaminated
    from asft_nemo.data.sources import read_records

    index = EvaluationIndex(questions_of(suites))
    return list(contaminated(read_records(files, fields), index))
