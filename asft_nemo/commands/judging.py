"""asft eval judge: the score of suites that a judge decides, and --judge of asft eval, which asks it at once."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asft_nemo.errors import UserError

if TYPE_CHECKING:
    from asft_eval.backends import Options
    from asft_eval.judge import Judge
    from asft_eval.result import Result

_OPENAI = "https://api.openai.com/v1"


def chosen_judge(name: str, options: Options | None = None, *, backend: str) -> Callable[[], Judge]:
    """How the judge of that name is opened; that it can be is looked at now, its model is loaded when it is called.

    Args:
        name: `alpaca_eval`, `alpaca_eval:CONFIG`, a Hugging Face model directory, or a model that a server knows.
        options: of the judge's backend; None = its own.
        backend: for a directory; a server is asked for any other name, and for a directory where `base_url` says which.

    Raises:
        UserError: no server is named and there is no key for OpenAI's.
    """
    from asft_eval.backends import OWN
    from asft_eval.judge_model import ModelJudge
    from asft_eval.judge_package import COMMAND, PackageJudge

    options = options or OWN
    package, _, annotators = name.partition(":")
    if package == COMMAND:
        found = PackageJudge(annotators or None)
        return lambda: found
    if Path(name).is_dir() and not options.base_url and backend != "openai":
        return lambda: ModelJudge(name, backend=backend, options=options)
    if not options.base_url and not os.environ.get("OPENAI_BASE_URL"):
        if not os.environ.get("OPENAI_API_KEY"):
            raise UserError(
                f"the judge {name} is neither a model directory nor behind a server: give --base-url, or set OPENAI_API_KEY"
            )
        options = replace(options, base_url=_OPENAI)
    return lambda: ModelJudge(name, backend="openai", options=replace(options, api="chat"))


def require_judged_suite(suites: list[str]) -> None:
    """Whether a judge has anything to do.

    Raises:
        UserError: it has not.
    """
    from asft_eval.graders import JUDGED
    from asft_eval.suites.published import SUITES, spread

    if not any(name in SUITES and SUITES[name].grader == JUDGED for name in spread(suites)):
        raise UserError(
            f"--judge says nothing to {', '.join(suites) or 'a text'}: leave it out, or add the suite alpaca_eval"
        )


def judged(folder: Path, judge: Callable[[], Judge]) -> tuple[dict[str, Any], list[str]]:
    """Has a result judged; the judge is opened once it is known to have something to do.

    Returns:
        The content of results.json with that of judge.json under `judge`, and both in words.
    """
    from asft_eval.backends import close
    from asft_eval.judge import VERDICTS, judge_result, result_for_judge

    result_for_judge(folder)
    opened = judge()
    try:
        result = judge_result(folder, opened)
    finally:
        close(opened)
    told: dict[str, Any] = json.loads((folder / VERDICTS).read_text(encoding="utf-8"))
    return {**result.to_json(), "judge": told}, [_line(suite, one) for suite, one in told.items()]


def _line(suite: str, told: dict[str, Any]) -> str:
    length_controlled = told["length_controlled_win_rate"]
    lines = f"{suite}: {told['judge']} prefers {100 * told['win_rate']:.1f} % of {told['n']} answers to the reference's"
    if length_controlled is not None:
        lines += f", length-controlled {100 * length_controlled:.1f} %"
    if told["unreadable"]:
        lines += f"; {told['unreadable']} verdicts could not be read and count as not won"
    return f"{lines}\n  {told['remark']}"


def unjudged(result: Result, folder: Path) -> list[str]:
    """A sentence for each suite that has no score because no judge was named."""
    return [
        f"{name}: no score, for no judge was named; {asked['n']} answers lie in {folder / f'{name}_outputs.json'}: asft eval judge {folder} --judge MODEL"
        for name, asked in result.for_judge.items()
        if name not in result.suites
    ]


def options_of(arguments: argparse.Namespace) -> Options:
    """How the backend is opened, by the words of the command."""
    from asft_eval.backends import Options

    return Options(
        batch_size=arguments.batch_size,
        tensor_parallel_size=arguments.tensor_parallel_size,
        base_url=arguments.base_url,
        api=arguments.api,
    )
