"""asft eval."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from asft_nemo.commands.drift import add_drift_options, drift_request, drift_words
from asft_nemo.commands.judging import chosen_judge, judged, options_of, require_judged_suite, unjudged
from asft_nemo.commands.output import DONE, Add, answer
from asft_nemo.config.schema import EvalConfig
from asft_nemo.errors import UserError

if TYPE_CHECKING:
    from asft_eval.drift import DriftRequest


_NUMBERS = {
    "seed": "of what is drawn; default: %(default)s",
    "limit": "only the first examples of each suite",
    "max_tokens": "of one completion; default: the protocol's, 4096",
    "batch_size": "prompts run together; default: hf 16, openai 32, vllm its own",
    "tensor_parallel_size": "vllm: GPUs; default: all visible ones that can share the model's heads",
}


def add_evaluation(add: Add) -> None:
    """Adds the command."""
    defaults = EvalConfig()
    evaluate = add("eval", _eval, "accuracy of a Hugging Face model on suites")
    evaluate.add_argument(
        "what",
        nargs="+",
        metavar="MODEL_DIR | explain RESULT_DIR ID | judge RESULT_DIR",
        help="the model; or, of a finished evaluation, why example ID (or SUITE:ID) was judged as it was; or the score of alpaca_eval by --judge",
    )
    evaluate.add_argument(
        "--suite",
        help="separated by commas: suites (math500, medqa, ...), groups (math, medical, code, instruct), JSON Lines files of prompt and answer",
    )
    evaluate.add_argument(
        "--backend", default=defaults.backend, help="hf, vllm or openai (a server); default: %(default)s"
    )
    evaluate.add_argument(
        "--protocol",
        default=defaults.protocol,
        help="greedy, paper (16 completions at temperature 1), both, or pass@K; default: %(default)s",
    )
    evaluate.add_argument(
        "--prompt",
        default=defaults.prompt,
        help="prompt variant: alpaca, alpaca_newline, chat, question_answer, qwen_boxed, raw; default: each suite's own",
    )
    for name, words in _NUMBERS.items():
        option = f"--{name.replace('_', '-')}"
        evaluate.add_argument(option, type=int, default=getattr(defaults, name), help=words)
    evaluate.add_argument(
        "--base-url", help="openai: the server, e.g. http://127.0.0.1:8000/v1; default: OPENAI_BASE_URL"
    )
    evaluate.add_argument("--api", help="openai: completions or chat; default: completions")
    evaluate.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="code suites: run the programs that the model wrote, in a sandbox",
    )
    evaluate.add_argument(
        "--judge",
        help="alpaca_eval: who decides which answer is better: a model directory, a model of a server, or alpaca_eval[:CONFIG], the package",
    )
    add_drift_options(evaluate)
    evaluate.add_argument("--out", type=Path, help="folder for results.json and samples.jsonl")


@contextmanager
def evaluation_errors() -> Iterator[None]:
    """asft_eval knows nothing of asft_nemo: its error becomes ours here."""
    from asft_eval.errors import EvaluationError

    try:
        yield
    except EvaluationError as error:
        raise UserError(str(error)) from error


def _explain(arguments: argparse.Namespace) -> int:
    _, folder, example = arguments.what
    with evaluation_errors():
        from asft_eval.explain import explain

        words = explain(folder, example)
    answer(arguments, {"explanation": words}, words)
    return DONE


def _judge(arguments: argparse.Namespace) -> int:
    with evaluation_errors():
        judge = chosen_judge(arguments.judge, options_of(arguments), backend=arguments.backend)
        values, words = judged(Path(arguments.what[1]), judge)
    answer(arguments, values, "\n".join(words))
    return DONE


def _read_text(arguments: argparse.Namespace, request: DriftRequest) -> int:
    """The drift alone, without any suite."""
    with evaluation_errors():
        from asft_eval.drift import measure_alone

        result = measure_alone(Path(arguments.what[0]), request, arguments.out)
    lines = [*drift_words(result.drift), f"results: {arguments.out / 'results.json'}"]
    answer(arguments, result.to_json(), "\n".join(lines))
    return DONE


def _eval(arguments: argparse.Namespace) -> int:
    if arguments.what[0] == "explain" and len(arguments.what) == 3:
        return _explain(arguments)
    if arguments.what[0] == "judge" and len(arguments.what) == 2 and arguments.judge:
        return _judge(arguments)
    if len(arguments.what) != 1 or not (arguments.suite or arguments.drift) or not arguments.out:
        raise UserError(
            "asft eval needs MODEL_DIR --suite SUITES (or --drift TEXT) --out DIR, explain RESULT_DIR ID, or judge RESULT_DIR --judge MODEL: see asft eval --help"
        )
    suites = arguments.suite.split(",") if arguments.suite else []
    if arguments.judge:
        require_judged_suite(suites)
    request = drift_request(arguments)
    if request is not None and not arguments.suite:
        return _read_text(arguments, request)
    with evaluation_errors():
        from asft_eval.run import evaluate

        judge = chosen_judge(arguments.judge, backend=EvalConfig().backend) if arguments.judge else None
        result = evaluate(
            arguments.what[0],
            suites,
            backend=arguments.backend,
            out_dir=arguments.out,
            max_tokens=arguments.max_tokens,
            options=options_of(arguments),
            limit=arguments.limit,
            protocol=arguments.protocol,
            prompt=arguments.prompt,
            seed=arguments.seed,
            allow_code_execution=arguments.allow_code_execution,
            drift=request,
        )
        values, words = (
            judged(arguments.out, judge) if judge else (result.to_json(), unjudged(result, arguments.out))
        )
    lines = [
        f"{name}: {100 * suite.accuracy:.1f} % of {suite.n} right, 95 % interval "
        f"{100 * suite.interval[0]:.1f} to {100 * suite.interval[1]:.1f}"
        for name, suite in result.suites.items()
    ]
    lines += [*drift_words(result.drift), *words]
    answer(arguments, values, "\n".join([*lines, f"results: {arguments.out / 'results.json'}"]))
    return DONE
