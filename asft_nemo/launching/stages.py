"""The stages of a launched run, as rows: which apply, what each waits for, and the `asft` commands it is made of.

Everything a stage makes is in run.dir, under a name that says what it was made from, so that a stage that is started
again finds what is there: data/NAME (prepared), base/ (imported), reference_cache/, checkpoints/, hf/STEP (exported),
verify/STEP, eval/base and eval/STEP, compare/STEP.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from asft_nemo.config.cluster_rules import on_slurm, ranks_per_node
from asft_nemo.config.recipes import suggest
from asft_nemo.config.run_folder import BASE_FOLDER
from asft_nemo.config.schema import DataConfig, RunConfig, replace, walk
from asft_nemo.errors import UserError
from asft_nemo.launching.eval_check import await_judge
from asft_nemo.launching.prepared import entries, prepared_dir, prepared_names
from asft_nemo.launching.settings import settings_file
from asft_nemo.launching.words import setting, shell_line


@dataclass(frozen=True)
class Stage:
    """One job.

    Attributes:
        name: of the stage.
        lines: of its shell script; they stop at the first that fails.
        ranks: it runs once on every rank, else once.
        gpus: it needs GPUs; one with ranks has one for each rank, an evaluation as many as hold the model.
        after: stages that must have succeeded.
    """

    name: str
    lines: tuple[str, ...]
    ranks: bool = False
    gpus: bool = False
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch:
    """What the stages are made from.

    Attributes:
        run: the settings, checked.
        asft: the words that start `asft` on the node.
        folder: run.dir, absolute.
        prepared: the training reads data that the stage `prepare` made.
    """

    run: RunConfig
    asft: tuple[str, ...]
    folder: Path
    prepared: bool

    def command(self, *words: str | Path) -> str:
        """A line that runs `asft`."""
        return shell_line([*self.asft, *map(str, words)])

    def rank_command(self, name: str) -> str:
        """The line that makes the shell of a rank that rank; signals then reach it."""
        return f"exec {self.command(name, '--settings', settings_file(self.folder))}"


class _Row(NamedTuple):
    """A stage: why it may not apply (None: it does), its lines, what it needs and what it waits for."""

    idle: Callable[[RunConfig], str | None]
    lines: Callable[[Launch], list[str]]
    after: tuple[str, ...] = ()
    ranks: bool = False
    gpus: bool = False


# The run's to say when it reads prepared data, see docs/data.md; the others are fixed where data are prepared.
_OF_THE_RUN = (
    *("train", "validation", "templates", "validation_templates", "weights", "weights_by", "when_exhausted"),
    *("template", "sequence_length", "packing", "group_by_length", "on_too_long"),
)


def _prepare(launch: Launch) -> list[str]:
    data, default = launch.run.data, dict(walk(DataConfig(), "data."))
    fixed = [
        setting(key, value)
        for key, value in walk(data, "data.")
        if value != default[key] and key.removeprefix("data.") not in _OF_THE_RUN
    ]
    names = prepared_names(launch.run)
    return [
        launch.command(
            *("data", "prepare", entry, "--out", prepared_dir(launch.folder, names[entry])),
            *(setting("model.path", launch.run.model.path), setting("data.template", template), *fixed),
        )
        for entry, template in entries(launch.run)
    ]


def _import(launch: Launch) -> list[str]:
    return [launch.command("import", launch.run.model.path, launch.folder / BASE_FOLDER, "--once")]


def settings_of_ranks(launch: Launch) -> RunConfig:
    """What ranks are told: nothing of the cluster, to read what `prepare` makes, and to go on from the last complete checkpoint."""
    changes: dict[str, Any] = {
        "run.dir": str(launch.folder),
        "trainer.resume": "if_exists",
        "cluster": {"name": "local"},
    }
    if launch.prepared:
        names, data = prepared_names(launch.run), launch.run.data
        for key, files in (("data.train", data.train), ("data.validation", data.validation)):
            changes[key] = [
                str(prepared_dir(launch.folder, names[name])) if name in names else name for name in files
            ]
    return replace(launch.run, changes)


def _cache(launch: Launch) -> list[str]:
    return [launch.rank_command("cache-reference")]


def _train(launch: Launch) -> list[str]:
    return [launch.rank_command("train")]


def _step(launch: Launch) -> tuple[str, str]:
    """The checkpoint that is exported, and the lines that find the name of its step."""
    link = "best" if launch.run.trainer.keep.startswith("best:") else "latest"
    folder = launch.folder / "checkpoints"
    where = shlex.quote(str(folder / link))
    nothing = f"{{ echo 'asft: there is no checkpoint at' {where} >&2; exit 2; }}"
    return _of_step(folder), f'checkpoint=$(readlink -e {where}) || {nothing}\nstep=$(basename "$checkpoint")'


def _export(launch: Launch) -> list[str]:
    checkpoint, find = _step(launch)
    target = _of_step(launch.folder / "hf")
    merge = " --adapters merge" if launch.run.peft.name == "lora" else ""
    return [find, _unless(target, f"{launch.command('export')} {checkpoint} {target}{merge}")]


def _verify(launch: Launch) -> list[str]:
    checkpoint, find = _step(launch)
    layout, run = launch.run.parallel, launch.run
    one_node = run.run.world_size <= (ranks_per_node(run) if on_slurm(run) else run.run.world_size)
    # Logits are compared in fp32 with two whole models in memory: for what is trained in fp32, which is small.
    if one_node and run.precision == "fp32":
        words = [setting("parallel.tp_size", layout.tp_size), setting("parallel.pp_size", layout.pp_size)]
    else:
        words = ["--weights-only"]
    end = " ".join(["--out", _of_step(launch.folder / "verify"), *words])
    return [find, f"{launch.command('verify')} {checkpoint} {_of_step(launch.folder / 'hf')} {end}"]


def _eval(launch: Launch) -> list[str]:
    _, find = _step(launch)
    settings = launch.run.eval
    words = ["--suite", ",".join(settings.suites)] if settings.suites else []
    words += [
        "--backend",
        settings.backend,
        "--protocol",
        settings.protocol,
        "--seed",
        str(settings.seed),
    ]
    given = {
        "--drift": settings.drift,
        "--base": settings.drift and launch.run.model.path,
        "--batch-size": settings.batch_size,
        "--tensor-parallel-size": settings.tensor_parallel_size,
        "--prompt": settings.prompt,
        "--max-tokens": settings.max_tokens,
        "--limit": settings.limit,
    }
    words += [word for name, value in given.items() if value is not None for word in (name, str(value))]
    words += ["--allow-code-execution"] if settings.allow_code_execution else []
    how = shell_line(words)
    base, tuned = launch.folder / "eval" / "base", _of_step(launch.folder / "eval")
    evaluate = launch.command("eval")
    lines = [find, f"{evaluate} {_of_step(launch.folder / 'hf')} {how} --out {tuned}"]
    if not _nemo_base(launch.run):
        path = shlex.quote(launch.run.model.path)
        # Also where it was evaluated before: other suites may be asked now, and an answer that is there is not asked again.
        lines.insert(0, f"{evaluate} {path} {how} --out {shlex.quote(str(base))}")
    return lines


def _compare(launch: Launch) -> list[str]:
    _, find = _step(launch)
    base, tuned = shlex.quote(f"base={launch.folder / 'eval' / 'base'}"), _of_step(launch.folder / "eval")
    name, out = launch.run.objective.name, _of_step(launch.folder / "compare")
    curves = shlex.quote(f"{name}={launch.folder}")
    return [find, f"{launch.command('compare')} {base} {name}={tuned} --run {curves} --out {out}"]


def _of_step(folder: Path) -> str:
    """The folder's entry for the step whose name the script found."""
    return f'{shlex.quote(str(folder))}/"$step"'


def _unless(name: str, line: str) -> str:
    """A line that is left out where its result, which appears whole or not at all, is there; its name is quoted."""
    return f"if [ -e {name} ]; then\n  echo {name} 'is there already'\nelse\n  {line}\nfi"


def _nemo_base(run: RunConfig) -> bool:
    return (Path(run.model.path) / "weights").is_dir()


def _no_suites(run: RunConfig) -> str | None:
    measured = run.eval.suites or run.eval.drift
    return None if measured else "eval.suites is empty: set eval.suites=[suite.jsonl]"


def _not_compared(run: RunConfig) -> str | None:
    if _nemo_base(run):
        return "the base is a NeMo checkpoint, which is not evaluated"
    if await_judge(run) and not run.eval.drift:
        return "a judge decides eval.suites: asft eval judge for each folder of eval/, then asft compare"
    return _no_suites(run)


def _always(run: RunConfig) -> None:
    return None


STAGES: dict[str, _Row] = {
    "prepare": _Row(lambda run: None if entries(run) else "all data are prepared", _prepare),
    "import": _Row(lambda run: "model.path is a NeMo checkpoint" if _nemo_base(run) else None, _import),
    "cache-reference": _Row(
        lambda run: (
            None
            if (run.reference.form, run.reference.fill) == ("cached", "job")
            else f"reference={run.reference.form}, reference.fill={run.reference.fill} needs no cache job"
        ),
        _cache,
        after=("prepare", "import"),
        ranks=True,
        gpus=True,
    ),
    "train": _Row(_always, _train, after=("prepare", "import", "cache-reference"), ranks=True, gpus=True),
    "export": _Row(_always, _export, after=("train",)),
    "verify": _Row(
        lambda run: "an export of merged adapters holds other numbers" if run.peft.name == "lora" else None,
        _verify,
        after=("export",),
    ),
    "eval": _Row(_no_suites, _eval, after=("export",), gpus=True),
    "compare": _Row(_not_compared, _compare, after=("eval",)),
}


def choose(run: RunConfig, asked: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """Names of the stages to run, in order, and of those that do not apply, with the reason.

    Args:
        run: the settings.
        asked: names; None = all that apply.

    Raises:
        UserError: a name that is no stage, or a stage that was asked for and does not apply.
    """
    for name in asked or ():
        if name not in STAGES:
            raise UserError(f"unknown stage '{name}': {suggest(name, tuple(STAGES))}")
    wanted = [name for name in STAGES if asked is None or name in asked]
    idle = {name: why for name in wanted if (why := STAGES[name].idle(run)) is not None}
    if asked is not None and idle:
        name, why = next(iter(idle.items()))
        raise UserError(f"stage {name} does nothing here ({why}): leave it out of --stages")
    return [name for name in wanted if name not in idle], idle


def build(launch: Launch, names: Sequence[str]) -> list[Stage]:
    """The chosen stages; one that is left out is waited through to those before it."""

    def before(name: str) -> list[str]:
        found: list[str] = []
        for earlier in STAGES[name].after:
            found += [earlier] if earlier in names else before(earlier)
        return list(dict.fromkeys(found))

    return [
        Stage(
            name,
            tuple(STAGES[name].lines(launch)),
            STAGES[name].ranks,
            STAGES[name].gpus,
            tuple(before(name)),
        )
        for name in names
    ]
