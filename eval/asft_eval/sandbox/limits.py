"""What a program in the sandbox may use, and how its run ended. Plain values."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one run.

    Attributes:
        wall_seconds: the whole run is ended after this time.
        cpu_seconds: of one process; whole seconds, as the kernel counts them.
        memory_bytes: address space of one process, and resident memory of all processes together.
        processes: processes and threads at once.
        disk_bytes: size of the scratch directory, which is in memory.
        open_files: open files of one process.
    """

    wall_seconds: float = 15.0
    cpu_seconds: int = 5
    memory_bytes: int = 2048 * MIB
    processes: int = 16
    disk_bytes: int = 64 * MIB
    open_files: int = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    Attributes:
        kind: "exit", "signal", "wall", "memory", "closed" (its owner let go of it) or "lost" (no word came of it).
        number: the exit status or the signal's number; 0 for other kinds.
    """

    kind: str
    number: int = 0

    @property
    def reason(self) -> str:
        """The outcome in a few words."""
        if self.kind == "exit":
            return f"the program exited with status {self.number}"
        if self.kind == "signal":
            return _SIGNALS.get(self.number, f"the program was ended by signal {self.number}")
        return _KINDS[self.kind]


_SIGNALS = {
    9: "the program was killed",
    11: "the program crashed (segmentation fault)",
    24: "the program passed its limit of processor time",
    25: "the program passed its limit of file size",
}
_KINDS = {
    "wall": "the program passed its time limit",
    "memory": "the program passed its memory limit",
    "closed": "the program was ended before it was done",
    "lost": "the sandbox ended without a word on the program",
}
