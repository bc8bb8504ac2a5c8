"""`asft cache-reference` on two ranks that is disturbed again and again, and repeated each time.

In the end the cache must have the rows of an undisturbed one, bit for bit; on the way no finished file of it may go or change.
"""

from __future__ import annotations

import hashlib

from faults.cached import rows_of
from faults.chain import Chain, Disturbance
from faults.places import Disk
from faults.yard import PROJECT, SETTINGS, Yard

CACHE: tuple[Disturbance, ...] = (
    Disturbance("cache", "launcher", "full"),
    Disturbance("cache", "rank 1", "SIGKILL"),
    Disturbance("cache", "all", "SIGTERM"),
    Disturbance("cache", "launcher", "SIGKILL"),
)
_PAGE = 4096
_ROWS = 128  # enough to write for some seconds


class CacheChain(Chain):
    """The disturbed job; arguments as `Chain`."""

    artefact, command = "reference cache", "asft cache-reference"

    def __init__(self, yard: Yard, *, seed: int, number: int):
        super().__init__(yard, seed=seed, number=number)
        rows = (PROJECT / "assets" / "tiny-data" / "train.jsonl").read_text().splitlines(keepends=True)
        (yard.here / "many.jsonl").write_text("".join(rows[:_ROWS]))
        self._usual_rows: dict[int, str] = {}
        self._finished: dict[str, str] = {}

    def words(self) -> list[str]:
        """The job's command; two data-parallel ranks, so that two write."""
        return self._words(self._name)

    def _words(self, name: str) -> list[str]:
        here = self._yard.here
        return [
            *("cache-reference", *SETTINGS, "parallel.tp_size=1", f"model.path={here / 'hf'}"),
            *(f"data.train=[{here / 'many.jsonl'}]", f"run.dir={here / name}"),
            f"reference.cache_dir={here / f'{name}_cache'}",
        ]

    def _disk(self) -> Disk:
        return Disk(self._cache).__enter__()

    def _fill(self, disk: Disk) -> str:
        """Somebody fills the disk while rows are being written: not a page more fits."""
        held = disk.held()
        disk.become(f"size={held + _PAGE}")
        return f"{held + _PAGE} bytes of room, of which {held} were taken when it filled up"

    def saved_is_whole(self) -> str:
        """Finished files stay as they are, and what can be read is what was computed undisturbed."""
        now = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self._cache.glob("rows-*.safetensors")
        }
        for name, digest in self._finished.items():
            if now.get(name) != digest:
                return f"{name} was finished, and is {'another' if name in now else 'gone'}"
        self._finished = now
        if not (self._cache / "manifest.json").exists():
            return ""
        usual = self.undisturbed()
        if any(usual.get(sample) != digest for sample, digest in rows_of(self._cache).items()):
            return "the cache has a row that is not as undisturbed"
        return ""

    def as_undisturbed(self) -> str:
        found = rows_of(self._cache)
        if found == self.undisturbed():
            return ""
        return f"the cache has {len(found)} of {len(self.undisturbed())} examples, or other rows than undisturbed"

    def undisturbed(self) -> dict[int, str]:
        """Of the same command in a folder of its own, asked once."""
        if not self._usual_rows:
            name = f"{self._name}_usual"
            self._yard.asft_with_ranks(*self._words(name))
            self._usual_rows = rows_of(self._yard.here / f"{name}_cache")
        return self._usual_rows
