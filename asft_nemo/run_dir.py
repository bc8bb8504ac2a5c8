"""The folder of a run: what is in it, whether it may be used, and where a run continues.

run.json              the settings, versions, git commit, base and data fingerprints
base/                 the base model in NeMo form, when model.path is a Hugging Face directory
adapter/              peft.adapter in NeMo form
metrics.jsonl         one object a step
checkpoints/step_N/   complete checkpoints; checkpoints/latest links to the newest
alarms.jsonl          what went wrong, one object each; starts.jsonl: when the run began and was resumed
tensorboard/          the same metrics as events
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from asft_nemo.config.run_folder import BASE_FOLDER, has_trained, other_base
from asft_nemo.config.schema import RunConfig, from_dict, to_dict
from asft_nemo.errors import CheckpointError, ConfigError
from asft_nemo.run_lock import lock_run_dir

if TYPE_CHECKING:
    from asft_nemo.checkpoint.adapters import AdapterDescription

ALARMS, STARTS = "alarms.jsonl", "starts.jsonl"
ADAPTER_FOLDER = "adapter"  # what peft.adapter became
CACHE_FOLDER = "reference_cache"  # of the reference, where reference.cache_dir names no other
logger = logging.getLogger(__name__)

# What stages of a launched run leave before it trains.
MADE_BEFORE = (BASE_FOLDER, ADAPTER_FOLDER, CACHE_FOLDER, "data", "launch", "launch.json", "eval")
VERSIONED = (
    "asft_nemo",
    "torch",
    "megatron-core",
    "nemo_toolkit",
    "transformers",
    "transformer-engine",
    "apex",
    "numpy",
)

# A run continues only as itself: these settings decide what is being trained (the learning-rate schedule is a function of the number of
# steps). Layout, precision, how often something is written and where may change.
IDENTITY = (
    "objective",
    "reference.form",
    "model",
    "data",
    "peft",
    "optim",
    "run.seed",
    "trainer.global_batch_size",
    "trainer.max_steps",
    "trainer.epochs",
    "loss.normalize_by",
)


def resume_from(run: RunConfig) -> Path | None:
    """The checkpoint this run continues from, or None for a start from the base.

    Raises:
        CheckpointError: trainer.resume=must and there is no complete checkpoint, or it does not fit the model.
    """
    if run.trainer.resume == "never":
        return None
    latest = Path(run.run.dir) / "checkpoints" / "latest"
    if latest.exists():
        check_fits(latest.resolve(), hf_dir(run), adapters=adapter_description(run))
        return latest.resolve()
    if latest.is_symlink():
        raise CheckpointError(
            f"{latest} points to {os.readlink(latest)}, which is not there: point it at one of "
            f"{[f'step_{step}' for step in checkpoint_steps(latest.parent)]}, or remove it to start from the base"
        )
    if run.trainer.resume == "must":
        raise CheckpointError(
            f"trainer.resume=must, but {run.run.dir} holds no complete checkpoint to resume from: check run.dir, "
            "or start it with trainer.resume=never"
        )
    return None


def hf_dir(run: RunConfig) -> Path:
    """Where the model's config.json and tokenizer files are: model.path itself, or its `context/hf`."""
    source = Path(run.model.path)
    return source / "context" / "hf" if (source / "weights").is_dir() else source


def adapter_description(run: RunConfig) -> AdapterDescription | None:
    """The adapters that this run's checkpoints hold, None where they hold the whole model."""
    from asft_nemo.checkpoint.adapters import AdapterDescription

    peft = run.peft
    if peft.name == "none":
        return None
    return AdapterDescription(peft.rank, peft.alpha, peft.dropout, peft.targets)


def check_fits(checkpoint: Path, model_dir: Path, *, adapters: AdapterDescription | None = None) -> None:
    """Checks that a distributed checkpoint holds exactly the tensors of the model, in its shapes (reads metadata only).

    Args:
        checkpoint: the checkpoint's folder.
        model_dir: where the model's config.json is.
        adapters: it holds these adapters of the model alone.

    Raises:
        CheckpointError: tensors are missing, left over, or of another shape.
    """
    from asft_nemo.checkpoint.adapters import check_adapter_tensors
    from asft_nemo.checkpoint.checks import check_megatron_tensors
    from asft_nemo.checkpoint.dist_read import DistReader
    from asft_nemo.model import read_model_spec

    reader, spec = DistReader(checkpoint / "weights"), read_model_spec(model_dir)
    if adapters is None:
        check_megatron_tensors(reader, spec)
    else:
        check_adapter_tensors(reader, spec, adapters)


def cache_dir(run: RunConfig) -> Path:
    """Where the reference's hidden states are cached: reference.cache_dir, or a folder of the run."""
    given = run.reference.cache_dir
    return Path(given) if given else Path(run.run.dir) / CACHE_FOLDER


def base_checkpoint(run: RunConfig) -> Path:
    """The base model in NeMo form: model.path itself, or its import into `run.dir/base` (made once, by whichever rank comes first).

    Raises:
        CheckpointError: model.path is neither a Hugging Face directory nor a NeMo checkpoint, or its tensors are not the model's.
        ConfigError: `run.dir/base` was made from another model.
    """
    source = Path(run.model.path)
    if (source / "weights").is_dir():
        if not (source / "context" / "hf" / "config.json").is_file():
            raise CheckpointError(
                f"model.path={source} is a NeMo checkpoint without context/hf: import the Hugging Face model with `asft import`"
            )
        check_fits(source, hf_dir(run))
        return source
    from asft_nemo.checkpoint.convert import import_hf

    target = Path(run.run.dir) / BASE_FOLDER
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target.parent / ".base.lock")):
        if not target.is_dir():
            import_hf(source, target)
        elif (problem := other_base(target, source)) is not None:
            raise ConfigError(problem)
        else:
            check_fits(target, hf_dir(run))
    return target


def initial_adapters(run: RunConfig, base_dir: Path) -> Path | None:
    """`peft.adapter` in NeMo form: its import into `run.dir/adapter` (made once, by whichever rank comes first); None for fresh adapters.

    Args:
        run: the settings of a run that has no checkpoint of its own yet.
        base_dir: the base in NeMo form.

    Raises:
        CheckpointError: it is not plain LoRA of this model, or needs other settings of `peft`.
    """
    described, source = adapter_description(run), run.peft.adapter
    if described is None or source is None:
        return None
    from asft_nemo.checkpoint import adapters
    from asft_nemo.checkpoint.journal import files_identity
    from asft_nemo.checkpoint.lora_import import import_peft

    target = Path(run.run.dir) / ADAPTER_FOLDER
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target.parent / ".adapter.lock")):
        origin = target.parent / ".adapter.origin"
        given = Path(source)  # may be gone once it has been read
        now = json.dumps(files_identity(given.glob("*"))) if given.is_dir() else None
        if not target.is_dir():
            origin.write_text(now or "")
            hf_files = base_dir / "context" / "hf"
            import_peft(source, target, hf_dir=hf_files, adapters=described, seed=run.run.seed)
        elif adapters.adapter_description(target) != described or now not in (None, origin.read_text()):
            raise CheckpointError(
                f"{target} was made with other settings of peft, or from other adapters than {source} holds now: remove it, or choose another "
                "run.dir"
            )
    return target


def check_initial_adapters(run: RunConfig) -> None:
    """Checks that `peft.adapter` fits the model and the settings of `peft`; reads its headers and changes nothing.

    Raises:
        CheckpointError: as `initial_adapters`.
    """
    described, source = adapter_description(run), run.peft.adapter
    if described is not None and source is not None:
        from asft_nemo.checkpoint.lora_import import check_peft

        check_peft(source, hf_dir=hf_dir(run), adapters=described)


def check_run_dir(run: RunConfig, *, data_fingerprint: str) -> None:
    """Checks that `run.dir` may be used for this run; changes nothing.

    Raises:
        ConfigError: the folder holds another run.
        CheckpointError: nothing to resume from.
    """
    folder = Path(run.run.dir)
    record = folder / "run.json"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.dir={folder} is a file: choose another run.dir")
    resume_from(run)
    if has_trained(folder):
        if run.trainer.resume == "never":
            raise ConfigError(
                f"run.dir={folder} holds another run: choose another run.dir, or set trainer.resume=if_exists to continue it"
            )
        if not record.exists():
            raise ConfigError(
                f"run.dir={folder} holds a run, and no {record.name} that says which: copy context/run.json of its latest checkpoint there, or "
                "choose another run.dir"
            )
        _same_run(run, record, data_fingerprint)  # also without a checkpoint yet
    elif (
        not record.exists()
        and folder.exists()
        and any(
            entry.name not in MADE_BEFORE and not entry.name.startswith(".") for entry in folder.iterdir()
        )
    ):
        raise ConfigError(f"run.dir={folder} is not empty and holds no run: choose another run.dir")


def refuse_busy(run: RunConfig) -> None:
    """Refuses a folder that another process trains in, ahead of all that takes long or reads what that process is about to remove.

    Raises:
        ConfigError: naming that process.
    """
    if (Path(run.run.dir) / ".run.lock").exists():
        try:
            lock_run_dir(Path(run.run.dir), claim=False).release()
        except OSError:  # said with more words where it is opened
            return


def open_run_dir(run: RunConfig, *, data_fingerprint: str) -> FileLock:
    """Checks `run.dir`, locks it and writes run.json. Called once a run.

    Returns:
        The lock, held until it is released or the process ends.

    Raises:
        ConfigError: the folder holds another run, another process trains in it, or it cannot be written.
        CheckpointError: nothing to resume from.
    """
    check_run_dir(run, data_fingerprint=data_fingerprint)
    folder = Path(run.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_run_dir(folder, claim=True)
        write_json(folder / "run.json", run_record(run, data_fingerprint=data_fingerprint))
    except OSError as error:
        raise ConfigError(
            f"run.dir={folder} cannot be written ({error.strerror}): choose another run.dir"
        ) from None
    return lock


_held: list[FileLock] = []  # until `leave_run_dir` or the end of this process


def claim_run_dir(run: RunConfig, *, data_fingerprint: str) -> None:
    """Opens the run's folder where no launcher of ours has: ranks started by torchrun or NeMo-Run directly. Global rank 0 does it.

    Raises:
        UserError: as `open_run_dir`; torchrun then ends the other ranks.
    """
    if os.environ.get("ASFT_LAUNCHER_PID") is None and os.environ.get("RANK", "0") == "0":
        _held.append(open_run_dir(run, data_fingerprint=data_fingerprint))


def leave_run_dir() -> None:
    """Releases what `claim_run_dir` holds, when this rank has done its work: without flock the lock's file would outlast the process."""
    while _held:
        _held.pop().release()


def _same_run(run: RunConfig, record: Path, data_fingerprint: str) -> None:
    try:
        before = json.loads(record.read_text())
        recorded = from_dict(before["config"])  # settings that are newer than the run have their defaults
        before_data = before["data_fingerprint"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{record} is damaged ({error!r}): copy context/run.json of the latest checkpoint there, or choose another run.dir"
        ) from None
    changed = [key for key in IDENTITY if _at(to_dict(run), key) != _at(to_dict(recorded), key)]
    if run.data.packing and run.parallel.cp_size != recorded.parallel.cp_size:
        changed.append("parallel.cp_size, which packed rows depend on")
    if before_data != data_fingerprint and "data" not in changed:
        changed.append("the contents of the data files")
    if changed:
        raise ConfigError(
            f"run.dir={run.run.dir} holds another run (different: {', '.join(changed)}): resume with the same settings, "
            "or choose another run.dir"
        )


def _at(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def run_record(run: RunConfig, *, data_fingerprint: str) -> dict[str, Any]:
    """What run.json holds."""
    return {
        "format": 1,
        "config": to_dict(run),
        "versions": versions(),
        "git_commit": git_commit(),
        "data_fingerprint": data_fingerprint,
        "base": str(Path(run.model.path)),
    }


def versions() -> dict[str, str | None]:
    """Versions of what decides a run's numbers; None where a package is not installed."""
    found: dict[str, str | None] = {}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_commit() -> str | None:
    """The commit this code runs from, with `+changes` when the tree differs from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None  # installed: the repository around an environment is somebody else's

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name and renames it: never half a file."""
    partial = path.with_name(f".{path.name}.new")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def drop_steps_after(path: Path, step: int) -> None:
    """Keeps the lines of steps up to `step`: a resumed run writes the later ones again. A torn line goes too."""
    if not path.exists():
        return
    kept = []
    for number, text in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            if json.loads(text)["step"] <= step:
                kept.append(text)
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: line %d is damaged and left out", path, number)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in kept))
    partial.replace(path)


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Adds a line of JSON; what a killed process has left of one goes first, for the next would become a part of it."""
    text = path.read_bytes() if path.exists() else b""
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(path, whole)
    with path.open("a") as out:
        out.write(json.dumps(value) + "\n")


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending."""
    names = (entry.name.removeprefix("step_") for entry in folder.glob("step_*"))
    return sorted(int(name) for name in names if name.isdigit())


def point_at(folder: Path, link: str, name: str) -> None:
    """Moves a link, ``latest`` or ``best``, to `name` in one step."""
    new = folder / f".{link}.new"
    new.unlink(missing_ok=True)
    new.symlink_to(name)
    os.replace(new, folder / link)
