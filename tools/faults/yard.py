"""Every artefact of the project, made once by its own commands, and put back as it was before each fault.

The artefacts name each other by their absolute places, so all faults happen in one place, `DIR/yard`; `DIR/pristine` is what it is put back from.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from faults.processes import end_with
from faults.shell import LIMIT, Said, run

PROJECT = Path(__file__).resolve().parents[2]
LINKED_BYTES = 200_000  # larger files are linked, not copied, until a fault touches them
RANKS_LIMIT = 400.0  # seconds for one with ranks, on a busy machine

STEPS = 8
PLACE = "place"  # in the yard: where commands write to that find a bad place
STARTED, _GIVEN = "more", "given"  # in the yard: a run that begins with adapters, and where these were
LAUNCHED = "launched"  # in the yard: a small run with adapters, by `asft launch` on this machine
SETTINGS = (
    "recipe=tiny_cpu",
    "objective=asft",
    "data.template=raw",
    "data.sequence_length=64",
    f"trainer.max_steps={STEPS}",
    "trainer.checkpoint_every=1",
    f"trainer.keep=last:{STEPS}",
    "parallel.tp_size=2",
    "run.world_size=2",
    "alarms.nll_factor=1.0001",
    "alarms.nll_window=2",
)


@dataclass(frozen=True)
class Yard:
    """The places of one campaign.

    Attributes:
        root: the campaign's scratch folder.
    """

    root: Path

    @property
    def here(self) -> Path:
        """Where commands work."""
        return self.root / "yard"

    @property
    def pristine(self) -> Path:
        """What they work on, undisturbed."""
        return self.root / "pristine"

    def train_words(self, name: str = "run", *more: str, cache: str = "cache") -> list[str]:
        """`asft train` as the run of this name was trained: reading, and filling, the cache."""
        return [
            *("train", *SETTINGS, f"model.path={self.here / 'hf'}"),
            f"data.train=[{self.here / 'prepared'}]",
            "reference=cached",
            "reference.fill=first_epoch",
            f"reference.cache_dir={self.here / cache}",
            f"run.dir={self.here / name}",
            *more,
        ]

    def lora_words(self, name: str, *more: str) -> list[str]:
        """The settings of a run of one step and one rank that trains adapters."""
        return [
            *("recipe=tiny_cpu", "objective=asft", "peft=lora", "reference=adapter_disabled"),
            *("data.template=raw", "data.sequence_length=64", "trainer.max_steps=1", "run.world_size=1"),
            *(f"model.path={self.here / 'hf'}", f"data.train=[{self.here / 'train.jsonl'}]"),
            *(f"run.dir={self.here / name}", *more),
        ]

    def asft(self, *words: str) -> Said:
        """Runs a command that must succeed."""
        said = run(words, cwd=self.here, seconds=LIMIT)
        if said.code != 0:
            raise RuntimeError(f"asft {' '.join(words)}: {said.code}\n{said.out}\n{said.err}")
        return said

    def asft_with_ranks(self, *words: str) -> None:
        """Runs a command that starts ranks and must succeed."""
        campaign = os.getpid()
        done = subprocess.run(
            [sys.executable, "-m", "asft_nemo", *words],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=RANKS_LIMIT,
            preexec_fn=lambda: end_with(campaign),
        )
        if done.returncode != 0:
            raise RuntimeError(f"asft {' '.join(words)}: {done.returncode}\n{done.stderr[-3000:]}")

    def make(self) -> None:
        """Makes all artefacts: one training run with its cache, everything before and behind it, and a launched run with adapters."""
        here = self.here
        shutil.rmtree(self.root, ignore_errors=True)
        here.mkdir(parents=True)
        shutil.copytree(PROJECT / "assets" / "tiny-base", here / "hf")
        rows = (PROJECT / "assets" / "tiny-data" / "train.jsonl").read_text().splitlines(keepends=True)
        (here / "train.jsonl").write_text("".join(rows[:24]))
        (here / "other.jsonl").write_text("".join(rows[24:48]))
        (here / "held.jsonl").write_text("".join(rows[48:52]))
        asked = (PROJECT / "assets" / "tiny-data" / "swap.jsonl").read_text().splitlines(keepends=True)
        (here / "suite.jsonl").write_text("".join(asked[:4]))
        self.asft("import", "hf", "nemo")
        for name, rows_of in (("prepared", "train"), ("prepared_other", "other")):
            self.asft(*prepare_words(f"{rows_of}.jsonl", name))
        self.asft_with_ranks(*self.train_words())
        self.asft("export", "run/checkpoints/latest", "exported", "--max-shard-size", "2MB")
        self.asft("export", f"run/checkpoints/step_{STEPS - 1}", "exported_other", "--max-shard-size", "2MB")
        for name, model in (("results", "hf"), ("results_other", "exported")):
            self.asft(*eval_words(model, name))
        self.asft("compare", "before=results", "after=results_other", "--out", "comparison")
        self.asft_with_ranks("launch", *self.lora_words(LAUNCHED), "--stages", "prepare,train")
        self.asft("export", f"{LAUNCHED}/checkpoints/latest", "adapter", "--adapters", "peft")
        self.start_with_adapters()
        shutil.copytree(here, self.pristine, symlinks=True, copy_function=shutil.copy2)

    def start_with_adapters(self) -> None:
        """Adapters of a run that began with a directory which is gone by now: put back, a directory is another one to that run."""
        (self.here / "adapter").rename(self.here / _GIVEN)
        started = run(lambda: start_from_adapters(self, STARTED, given=_GIVEN), cwd=self.here, seconds=LIMIT)
        if started.code != 0:
            raise RuntimeError(f"adapters are not imported: {started.err}")
        (self.here / _GIVEN).rename(self.here / "adapter")

    def restore(self) -> None:
        """Puts everything back. What is large is linked: `alone` parts a file that is about to be damaged."""
        for place in (self.here / PLACE, *self.here.glob("chain*")):
            release(place)  # of a campaign that was killed
        _remove(self.here)
        shutil.copytree(self.pristine, self.here, symlinks=True, copy_function=_copy_or_link)

    def alone(self, name: str) -> Path:
        """A file of the yard as a file of its own."""
        path = self.here / name
        if path.is_file() and path.stat().st_nlink > 1:
            path.unlink()
            shutil.copy2(self.pristine / name, path)
        return path


def start_from_adapters(yard: Yard, name: str, *, given: str = "adapter") -> int:
    """What the launcher of a run with `peft.adapter` does before it starts ranks."""
    from asft_nemo.config.load import compose
    from asft_nemo.run_dir import check_initial_adapters, initial_adapters

    run = compose(yard.lora_words(name, f"peft.adapter={yard.here / given}"))
    check_initial_adapters(run)
    initial_adapters(run, yard.here / "nemo")
    return 0


def read_started(yard: Yard) -> int:
    """What every rank does with them, ahead of Megatron's loader."""
    from asft_nemo.checkpoint.dist_read import check_before_load
    from asft_nemo.config.load import compose
    from asft_nemo.run_dir import initial_adapters

    words = yard.lora_words(STARTED, f"peft.adapter={yard.here / _GIVEN}")
    made = initial_adapters(compose(words, check_inputs=False), yard.here / "nemo")
    assert made is not None
    check_before_load(made / "weights", rank=0, ranks=1)
    return 0


def release(place: Path) -> None:
    """Takes away what is mounted there, and gives its owner all rights."""
    if place.is_mount():
        subprocess.run(["umount", "-l", str(place)], check=True, capture_output=True)
    if place.is_dir():
        place.chmod(0o755)


def prepare_words(file: str, out: str) -> list[str]:
    """`asft data prepare` as the campaign uses it."""
    return [
        *("data", "prepare", file, "data.template=raw", "model.path=hf", "--workers", "1", "--out", out),
    ]


def eval_words(model: str, out: str) -> list[str]:
    """`asft eval` as the campaign uses it."""
    return [
        *("eval", model, "--suite", "suite.jsonl", "--max-tokens", "4", "--drift", "held.jsonl"),
        *("--out", out),
    ]


def digests(folder: Path) -> dict[str, str]:
    """Every file and link below a folder, hidden ones too: name -> SHA-256, or where it leads."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder: name -> bytes and time of the last change."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def _copy_or_link(source: str, target: str) -> object:
    if not os.path.islink(source) and os.path.getsize(source) > LINKED_BYTES:
        return os.link(source, target)
    return shutil.copy2(source, target)


def _remove(folder: Path) -> None:
    def give_rights(_: object, path: str, __: object) -> None:
        os.chmod(os.path.dirname(path), 0o700)
        os.chmod(path, 0o700)
        (shutil.rmtree if os.path.isdir(path) else os.unlink)(path)

    if folder.exists():
        shutil.rmtree(folder, onerror=give_rights)
