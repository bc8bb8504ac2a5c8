"""Faults, many of them, and what became of each: damaged artefacts, killed and hanging processes, full disks, clocks that jump.

    python tools/fault_campaign.py --short --out runs/faults          # some of every kind
    python tools/fault_campaign.py --long --seed 0 --out runs/faults  # all of them
    python tools/fault_campaign.py --seed 0 --only NAME --out runs/faults

docs/faults.md says what each fault must lead to. Exit code 1 where one did not.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from faults.artefacts import Undisturbed, drawn, try_fault
from faults.cache_chain import CACHE, CacheChain
from faults.chain import LONG, SHORT, Chain, Disturbance
from faults.kills import clocks, kills, try_kill
from faults.places import bad_places, can_mount, try_place
from faults.rows import Book, Row
from faults.yard import Yard

SHORT_ARTEFACTS, SHORT_PLACES, SHORT_KILLS, SHORT_CLOCKS = 45, 6, 4, 2
LONG_KILLS = 3  # of each command and signal
CHAINS = (*LONG, CACHE)  # the last of another command


@dataclass(frozen=True)
class Try:
    """A fault that can be tried by itself."""

    name: str
    go: Callable[[], Row]


def main(words: Sequence[str]) -> int:
    """Runs a campaign; 1 with violations."""
    given = _parser().parse_args(words)
    if given.scratch is None:
        with tempfile.TemporaryDirectory(prefix="asft-faults-", ignore_cleanup_errors=True) as scratch:
            return _campaign(given, Path(scratch).resolve())
    return _campaign(given, given.scratch.resolve())


def _campaign(given: argparse.Namespace, scratch: Path) -> int:
    yard = Yard(scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    mounts = can_mount(scratch)
    tries = _tries(given, yard, mounts=mounts)
    chains = _chains(given, mounts=mounts)
    book = Book(seed=given.seed, planned=len(tries) + sum(len(chain) + 1 for chain in chains.values()))
    if tries or chains:
        _import_what_commands_need()
    if (tries or chains) and not (given.keep and yard.pristine.is_dir()):
        print("making the artefacts", file=sys.stderr, flush=True)
        yard.make()
    for part in given.join:
        book.join(part, _names(mounts=mounts))
    book.write(given.out, called=_called(given), notes=_notes(mounts=mounts))
    for row in _rows(given, yard, tries, chains):
        book.add(row)
        book.write(given.out, called=_called(given), notes=_notes(mounts=mounts))  # a campaign may be ended
    print(f"{len(book.rows)} faults, {book.violations} violations: {given.out / 'fault_campaign.md'}")
    return 1 if book.violations else 0


def _rows(
    given: argparse.Namespace,
    yard: Yard,
    tries: Sequence[Try],
    chains: Mapping[int, tuple[Disturbance, ...]],
) -> Iterator[Row]:
    for number, disturbances in chains.items():  # first: they take longest
        yard.restore()
        kind = Chain if given.short or CHAINS[number] is not CACHE else CacheChain
        yield from kind(yard, seed=given.seed, number=number).disturb(disturbances)
    for one in tries:
        yield one.go()


def _names(*, mounts: bool) -> set[str]:
    """Of all faults of the long form."""
    alone = {
        x.name
        for some in (drawn(None, seed=0), bad_places(mounts=mounts), kills(LONG_KILLS), clocks())
        for x in some
    }
    chained = {one.name(n, place) for n, chain in enumerate(CHAINS) for place, one in enumerate(chain)}
    return alone | chained | {f"chain{number}:end:clock" for number in range(len(CHAINS))}


def _tries(given: argparse.Namespace, yard: Yard, *, mounts: bool) -> list[Try]:
    """What is tried: all, those of a name, or some of each kind."""
    undisturbed, seed = Undisturbed(yard), given.seed
    chance = random.Random(f"{seed} which")
    every = given.only is not None or not given.short
    found: list[Try] = []

    def take(tries: Iterator[Try], count: int) -> None:
        kept = list(tries)
        if given.only is not None:
            kept = [one for one in kept if given.only in one.name]
        found.extend(kept if every else chance.sample(kept, min(count, len(kept))))

    def lazily(function: Callable[..., Row], fault: object, *more: object) -> Callable[[], Row]:
        return lambda: function(fault, yard, *more, seed=seed)

    artefacts = drawn(None if every else SHORT_ARTEFACTS, seed=seed)
    take((Try(x.name, lazily(try_fault, x, undisturbed)) for x in artefacts), len(artefacts))
    take((Try(x.name, lazily(try_place, x)) for x in bad_places(mounts=mounts)), SHORT_PLACES)
    take((Try(x.name, lazily(try_kill, x, undisturbed)) for x in kills(LONG_KILLS)), SHORT_KILLS)
    take((Try(x.name, lazily(try_kill, x, undisturbed)) for x in clocks()), SHORT_CLOCKS)
    return found


def _chains(given: argparse.Namespace, *, mounts: bool) -> dict[int, tuple[Disturbance, ...]]:
    """Runs on ranks that are disturbed, by number; with `--only` those that have such a disturbance, whole."""
    every = [SHORT] if given.short else CHAINS
    numbered = {n: tuple(x for x in chain if mounts or x.how != "full") for n, chain in enumerate(every)}

    def named(number: int, chain: tuple[Disturbance, ...]) -> bool:
        return any(given.only in one.name(number, place) for place, one in enumerate(chain))

    return {n: chain for n, chain in numbered.items() if given.only is None or named(n, chain)}


def _notes(*, mounts: bool) -> list[str]:
    disks = (
        "full and read-only disks are file systems in memory, mounted for the fault"
        if mounts
        else "this user may mount nothing: full and read-only disks were not tried, limits of a file's size were"
    )
    rights = "root gives up its right to pass over modes" if os.geteuid() == 0 else "the user is not root"
    return [
        f"Made on {os.cpu_count()} cores: {disks}; for unreadable files and read-only folders {rights}.",
        "Seconds are those of the command, or of the whole fault where it has several; the machine had other work.",
    ]


def _called(given: argparse.Namespace) -> str:
    """The command that gives these rows, without the places of this machine."""
    only = () if given.only is None else ("--only", given.only)
    if given.join:
        only = ("(in parts by --only, put together by --join)",)
    form = "--short" if given.short else "--long"
    return " ".join(["python tools/fault_campaign.py", form, "--seed", str(given.seed), *only])


def _import_what_commands_need() -> None:
    """Here once, so that the process of each command, a fork of this one, starts at once."""
    needed = (
        *("asft_eval.run", "asft_eval.drift", "asft_eval.backends", "matplotlib.figure", "torch"),
        *("transformers.generation.utils", "transformers.models.auto.modeling_auto"),
        *("transformers.models.auto.tokenization_auto", "transformers.models.qwen2.modeling_qwen2"),
        *("asft_nemo.checkpoint.dist_write", "asft_nemo.checkpoint.lora_import", "asft_nemo.data"),
        *("asft_nemo.reference.cache_reader", "asft_nemo.reporting.run_page", "asft_nemo.cli"),
    )
    modules = {name: importlib.import_module(name) for name in needed}
    modules["torch"].set_num_threads(1)
    modules["asft_nemo.cli"].parser()
    load = importlib.import_module("asft_nemo.config.load")
    load.compose(["recipe=tiny_cpu", "objective=asft", "model.path=m", "data.train=[d]"], check_inputs=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--short", action="store_true", help="some of every kind")
    form.add_argument("--long", action="store_true", help="all (default)")
    parser.add_argument("--seed", type=int, default=0, help="of every random place and moment")
    parser.add_argument("--only", metavar="NAME", help="only faults with this in their names")
    parser.add_argument("--out", type=Path, required=True, help="folder of fault_campaign.json and .md")
    parser.add_argument("--scratch", type=Path, help="where artefacts are made (default: a folder that goes)")
    parser.add_argument(
        "--join",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="--out of earlier parts of this campaign (--only), whose rows go in front",
    )
    parser.add_argument("--keep", action="store_true", help="use the artefacts that are in --scratch already")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ranks and mounts go with it
    sys.exit(main(sys.argv[1:]))
