"""Whether the evaluation at the end of a launch can work: a misspelt name is found now, not behind the training.

Not among the rules of `asft_nemo.config`, which recipes import: these know nothing of evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from asft_eval.backends import BACKENDS, Options, check_options
from asft_eval.errors import EvaluationError
from asft_eval.graders import JUDGED
from asft_eval.protocols import protocols
from asft_eval.suites import SUITES
from asft_eval.suites.load import find_file
from asft_eval.suites.prompts import PROMPTS
from asft_eval.suites.published import groups, hub_ids, spread

from asft_nemo.config.cluster_rules import on_slurm
from asft_nemo.config.named_paths import is_path
from asft_nemo.config.recipes import suggest
from asft_nemo.config.schema import RunConfig
from asft_nemo.errors import ConfigError
from asft_nemo.launching.eval_fit import unfit, without_vllm

# In cluster.env: nodes look elsewhere than this machine.
_DATA_VARIABLES = ("ASFT_DATA_DIR=", "HF_HOME=", "HF_HUB_CACHE=")


def check_evaluation(run: RunConfig, *, look_for_files: bool) -> None:
    """Checks the settings of the stage `eval`.

    Args:
        run: the settings; something is to be measured.
        look_for_files: also look for the suites' files, and for vLLM where this Python is to run it.

    Raises:
        ConfigError: a sentence for everything that is wrong.
    """
    found = [*_names(run), *unfit(run), *((*_files(run), *without_vllm(run)) if look_for_files else ())]
    if found:
        raise ConfigError(found)


def await_judge(run: RunConfig) -> bool:
    """Whether all suites are of the kind that has no score until a judge is asked, which no launch does."""
    suites = spread(run.eval.suites)
    return bool(suites) and all(name in SUITES and SUITES[name].grader == JUDGED for name in suites)


def _names(run: RunConfig) -> Iterator[str]:
    settings = run.eval
    yield from _backend(run)
    try:
        protocols(settings.protocol)
    except EvaluationError as error:
        yield f"eval.protocol={settings.protocol} cannot be used: {error}"
    if settings.prompt is not None and settings.prompt not in PROMPTS:
        yield f"eval.prompt={settings.prompt} is unknown: {suggest(settings.prompt, tuple(PROMPTS))}"
    yield from _suites(run)
    if settings.drift is not None and (Path(run.model.path) / "weights").is_dir():
        yield (
            "eval.drift measures how far the model goes from a Hugging Face base, and model.path is a NeMo checkpoint: name the directory that it was "
            "imported from as model.path, or leave eval.drift out"
        )


def _backend(run: RunConfig) -> Iterator[str]:
    name, size = run.eval.backend, run.eval.tensor_parallel_size
    if name not in BACKENDS:
        yield f"eval.backend={name} is unknown: {suggest(name, tuple(BACKENDS))}"
        return
    if name == "openai":
        yield "eval.backend=openai asks a server, and none serves what this launch will export: set eval.backend=vllm or hf"
    try:
        check_options(name, Options(batch_size=run.eval.batch_size, tensor_parallel_size=size))
    except EvaluationError as error:
        yield f"eval cannot run so: {error}"
    if size is not None and on_slurm(run) and size > run.cluster.gpus_per_node:
        yield (
            f"eval.tensor_parallel_size={size} is more than the {run.cluster.gpus_per_node} GPUs of a node (cluster.gpus_per_node), and an evaluation "
            "runs on one: lower it"
        )


def _suites(run: RunConfig) -> Iterator[str]:
    known = (*groups(), *SUITES, *hub_ids())
    for name in run.eval.suites:
        if name not in known and not is_path("eval.suites", name):
            yield f"eval.suites has '{name}', which is no suite and no JSON Lines file: {suggest(name, known)}"
    runs_code = [name for name in _published(run) if SUITES[name].grader == "code"]
    if runs_code and not run.eval.allow_code_execution:
        yield (
            f"eval.suites has {', '.join(runs_code)}, and the model's programs are run to grade them: set eval.allow_code_execution=true, or "
            "leave them out"
        )


def _published(run: RunConfig) -> list[str]:
    """The published suites that are asked for, those of groups among them."""
    return [name for name in spread(run.eval.suites) if name in SUITES]


def _files(run: RunConfig) -> Iterator[str]:
    published = _published(run)
    for name in run.eval.suites:
        if name not in published and is_path("eval.suites", name) and not Path(name).is_file():
            yield f"eval.suites has {name}, which does not exist: correct it, or leave it out"
    drift = run.eval.drift
    if drift is not None and not Path(drift).is_file():
        yield f"eval.drift={drift} does not exist: correct it, or leave it out"
    if any(word.startswith(_DATA_VARIABLES) for word in run.cluster.env):
        return
    for name in published:
        try:
            find_file(name)
        except EvaluationError as error:
            yield f"eval.suites={name} cannot be used: {error}"
