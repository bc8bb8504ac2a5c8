"""The next commands that a user would run on an artefact, and how two of their answers are held against each other."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asft_nemo.checkpoint.dist_metadata import TensorStorageMetadata, read_metadata
from asft_nemo.checkpoint.seal import SEAL
from faults.shell import LIMIT, Job, Said, run
from faults.yard import LAUNCHED, STEPS, Yard, eval_words, prepare_words, read_started, start_from_adapters

# Of when and where something was made, not of what; the commit may change while a campaign runs.
_PASSING = re.compile(r'"(seconds|digested_ns|modified_ns|inode|checksum|git_commit)": ("[^"]*"|[0-9.e+-]+)')


@dataclass(frozen=True)
class Check:
    """One command.

    Attributes:
        title: how the table calls it.
        job: its words, or a function that does what a rank does with the artefact.
        makes: files and folders that it writes; nothing else may change.
        told: the parts of its answer that count; None compares nothing but the files.
        reports: what it makes says what is wrong, and is made then, too.
    """

    title: str
    job: Callable[[Yard], Job]
    makes: tuple[str, ...] = ()
    told: Callable[[Said], Any] | None = None
    reports: bool = False


@dataclass(frozen=True)
class Answer:
    """What a command that succeeded gave: digests of what it made, and what it said."""

    files: dict[str, str]
    told: Any


def _json(said: Said) -> Any:
    values = json.loads(said.out)
    values.pop("seconds", None)
    return values


def _words(*words: str) -> Callable[[Yard], Job]:
    return lambda yard: list(words)


def _whole_out(said: Said) -> Any:
    return said.out


def _finished(said: Said) -> Any:
    return f"is finished: step {STEPS} of {STEPS}" in said.err


def _lora_finished(said: Said) -> Any:
    return "is finished: step 1 of 1" in said.err


CHECKS: dict[str, Check] = {
    "import": Check("asft import", _words("import", "hf", "out"), ("out",)),
    "import_shards": Check("asft import", _words("import", "exported", "out"), ("out",)),
    "import_once": Check("asft import --once", _words("import", "--once", "hf", "nemo")),
    "verify": Check(
        "asft verify", _words("verify", "--weights-only", "nemo", "hf", "--out", "v"), ("v",), reports=True
    ),
    "verify_export": Check(
        "asft verify",
        _words(
            *("verify", "--weights-only", "run/checkpoints/latest", "exported", "--out", "v"),
        ),
        ("v",),
        reports=True,
    ),
    "export_base": Check("asft export", _words("export", "nemo", "out"), ("out",)),
    "export": Check("asft export", _words("export", "run/checkpoints/latest", "out"), ("out",)),
    "inspect_base": Check("asft inspect", _words("inspect", "--json", "nemo"), (), _json),
    "inspect_run": Check("asft inspect", _words("inspect", "--json", "run"), (), _json),
    "eval": Check("asft eval", lambda yard: eval_words("hf", "out"), ("out",)),
    "eval_export": Check("asft eval", lambda yard: eval_words("exported", "out"), ("out",)),
    "eval_again": Check("asft eval again", lambda yard: eval_words("hf", "results"), ("results",)),
    "explain": Check(
        "asft eval explain", _words("eval", "explain", "--json", "results", "{first}"), (), _json
    ),
    "compare": Check(
        "asft compare",
        _words("compare", "before=results", "after=results_other", "--out", "c"),
        ("c",),
    ),
    "data_check": Check(
        "asft data check",
        _words("data", "check", "--json", "train.jsonl", "data.template=raw", "model.path=hf"),
        (),
        _json,
    ),
    "prepare_again": Check(
        "asft data prepare again", lambda yard: prepare_words("train.jsonl", "prepared"), ("prepared",)
    ),
    "read_data": Check("a rank reads its data", lambda yard: lambda: _read_data(yard), (), _whole_out),
    "read_cache": Check("a rank reads its cache", lambda yard: lambda: _read_cache(yard), (), _whole_out),
    "resume": Check(
        "asft train, resumed",
        lambda yard: yard.train_words("run", "trainer.resume=must"),
        ("run/run.json", "run/.run.owner", "run/.run.lock"),
        _finished,
    ),
    "report": Check("asft report", _words("report", "run", "--out", "r.html"), ("r.html",)),
    "status": Check("asft status", _words("status", "--json", LAUNCHED), (), _json),
    "logs": Check("asft logs", _words("logs", LAUNCHED, "prepare"), (), _whole_out),
    "settings": Check(
        "asft train --settings",
        _words("train", "--settings", f"{LAUNCHED}/launch/settings.json"),
        tuple(f"{LAUNCHED}/{name}" for name in ("run.json", ".run.owner", ".run.lock")),
        _lora_finished,
    ),
    "export_adapters": Check(
        "asft export --adapters peft",
        _words("export", f"{LAUNCHED}/checkpoints/latest", "out", "--adapters", "peft"),
        ("out",),
    ),
    "start_adapters": Check(
        "a run starts from adapters",
        lambda yard: lambda: _user_errors(lambda: str(start_from_adapters(yard, "fresh"))),
        ("fresh",),
    ),
    "read_adapters": Check(
        "a rank reads its adapters",
        lambda yard: lambda: _user_errors(lambda: str(read_started(yard))),
        ("more/.adapter.lock",),
        _whole_out,
    ),
}


def perform(check: Check, yard: Yard, *, bound: bool = False, largest_file: int | None = None) -> Said:
    """Runs a command in the yard."""
    return run(check.job(yard), cwd=yard.here, seconds=LIMIT, bound=bound, largest_file=largest_file)


def answer_of(check: Check, yard: Yard, said: Said) -> Answer:
    """What a command that succeeded gave."""
    files: dict[str, str] = {}
    for name in check.makes:
        place = yard.here / name
        found = [place] if place.is_file() else sorted(x for x in place.rglob("*") if x.is_file())
        for path in found:
            if path.name == SEAL.name or (path.name.startswith(".") and path.name != ".metadata"):
                continue  # a sum over the others; locks and who holds them
            files[str(path.relative_to(yard.here))] = _digest(path)
    return Answer(files, None if check.told is None else check.told(said))


def _digest(path: Path) -> str:
    """SHA-256 of what counts: not how long something took, or the name that torch gives each save."""
    if path.name == ".metadata":
        found = read_metadata(path.parent)
        places = sorted((str(index), str(place)) for index, place in found.storage_data.items())
        held = [
            (name, repr(value) if isinstance(value, TensorStorageMetadata) else "object")
            for name, value in sorted(found.state_dict_metadata.items())
        ]
        return hashlib.sha256(repr((held, places)).encode()).hexdigest()
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl", ".html"):
        data = _PASSING.sub("", data.decode(errors="replace")).encode()
    return hashlib.sha256(data).hexdigest()


def _user_errors(job: Callable[[], str]) -> int:
    """Runs a function as `asft_nemo.ranks` would."""
    from asft_nemo.errors import UserError, mendable

    try:
        print(job())
    except (UserError, OSError) as error:
        told = mendable(error) if isinstance(error, OSError) else error
        if told is None:
            raise
        print(f"asft: {told}", file=sys.stderr)
        return 2
    return 0


def _read_data(yard: Yard) -> int:
    """What every rank does before it trains, and then reads in an epoch."""
    from asft_nemo.config.load import compose
    from asft_nemo.data import prepare

    def read() -> str:
        words: Sequence[str] = yard.train_words("fresh")[1:]
        data = prepare(compose(list(words)), tokenizer_dir=yard.here / "hf")
        seen = hashlib.sha256(f"{data.fingerprint} {data.summary}".encode())
        for place in range(len(data.train)):
            for name, value in sorted(data.train[place].items()):
                seen.update(name.encode() + value.numpy().tobytes())
        return seen.hexdigest()

    return _user_errors(read)


def _read_cache(yard: Yard) -> int:
    """What a rank of the last stage does with its cache: every example is looked for, and every row read."""
    from asft_nemo.errors import CacheError
    from asft_nemo.reference.cache_manifest import CacheIdentity
    from asft_nemo.reference.cache_reader import CacheReader

    values = json.loads((yard.pristine / "cache" / "manifest.json").read_text())["identity"]
    identity = CacheIdentity(**values)

    def read() -> str:
        seen = hashlib.sha256()
        with CacheReader(yard.here / "cache", identity) as reader:
            missing = reader.missing(list(range(identity.num_samples)))
            if missing:  # as `asft_nemo.nemo.cache.cached_reference` says it, behind a collective
                raise CacheError(f"the cache in {yard.here / 'cache'} lacks {len(missing)} examples")
            for sample in range(identity.num_samples):
                offsets = reader.offsets(sample)
                seen.update(offsets.tobytes())
                ids = [sample] * len(offsets)
                seen.update(reader.read(ids, offsets).numpy().tobytes())
        return seen.hexdigest()

    return _user_errors(read)
