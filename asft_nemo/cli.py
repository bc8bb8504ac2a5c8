"""The `asft` command.

Exit codes: 0 done; 2 the user can mend it (one sentence and the cure, no traceback unless --debug); 1 our
bug (traceback). Everything heavy is imported by the command that needs it, so that `asft --help` answers at
once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence

import asft_nemo
from asft_nemo.commands.checkpoint import add_checkpoints
from asft_nemo.commands.comparison import add_comparison
from asft_nemo.commands.data import add_data
from asft_nemo.commands.doctor import add_doctor
from asft_nemo.commands.evaluation import add_evaluation
from asft_nemo.commands.launch import add_launch
from asft_nemo.commands.output import BUG, DONE, INTERRUPTED, MENDABLE, Command, Parser
from asft_nemo.commands.plan import add_plan
from asft_nemo.commands.report import add_report
from asft_nemo.commands.training import add_training
from asft_nemo.errors import ConfigError, UserError, mendable
from asft_nemo.logs import set_up_logging


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        arguments, unknown = parser().parse_known_args(words)
        if hasattr(arguments, "layout"):  # argparse takes words of a list in one place only
            arguments.layout += [word for word in unknown if word.startswith("parallel.")]
            unknown = [word for word in unknown if not word.startswith("parallel.")]
        if hasattr(arguments, "overrides"):  # likewise
            arguments.overrides += [word for word in unknown if "=" in word and not word.startswith("-")]
            unknown = [word for word in unknown if word.startswith("-") or "=" not in word]
        if hasattr(arguments, "words"):  # of `asft data` and `asft plan`, likewise
            arguments.words += [word for word in unknown if not word.startswith("-")]
            unknown = [word for word in unknown if word.startswith("-")]
        if unknown:
            raise UserError(f"unrecognized arguments: {' '.join(unknown)}: see asft --help")
        set_up_logging()
        logging.getLogger("asft_eval").setLevel(logging.INFO)
        return _written(arguments.command(arguments))
    except UserError as error:
        return _said(error, debug=debug)
    except KeyboardInterrupt:
        print("asft: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, for example `asft ... | head`
        _drop()
        return DONE
    except Exception as error:
        if isinstance(error, OSError) and (told := mendable(error)) is not None:
            return _said(told, debug=debug)
        traceback.print_exc()
        print(
            "asft: this is a bug in asft, not in your settings: please report the lines above",
            file=sys.stderr,
        )
        return BUG


def _written(code: int) -> int:
    """Hands on what is still to be printed: at the interpreter's end it would be too late to say that it cannot be."""
    try:
        if sys.stdout is not None:  # a process may be started without one
            sys.stdout.flush()
    except OSError as error:
        _drop()
        if not isinstance(error, BrokenPipeError):
            raise
    return code


def _drop() -> None:
    """Forgets what is not yet written; the interpreter would try it once more at its end, and then exit with 120."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)


def _said(error: UserError, *, debug: bool) -> int:
    """Says what the user can mend."""
    if debug:
        traceback.print_exc()
    sentences = error.violations if isinstance(error, ConfigError) else (str(error),)
    for sentence in sentences:
        print(f"asft: {sentence}", file=sys.stderr)
    return MENDABLE


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of every error")
    common.add_argument("--json", action="store_true", help="print the result as one JSON object")
    top = Parser(prog="asft", description="Anchored supervised fine-tuning on NeMo and Megatron-core.")
    top.add_argument("--version", action="version", version=f"asft {asft_nemo.__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[common])
        sub.set_defaults(command=command)
        return sub

    add_training(add)
    add_launch(add)
    add_report(add)
    add_plan(add)
    add_data(commands, common)
    add_checkpoints(add)
    add_evaluation(add)
    add_comparison(add)
    add_doctor(add)
    return top
