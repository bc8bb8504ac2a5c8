"""The shell, Python and diff blocks of README, CONTRIBUTING and docs/, and a folder in which a page's runnable blocks run one after the other.

A line before a block says what becomes of it here; a reader of the rendered page does not see it:

    <!-- runnable: fast -->       run by `make test`
    <!-- runnable: long -->       run by `make test-long`
    <!-- runnable: ranks -->      likewise; it starts training ranks
    <!-- not run: a reason -->    not run

A page with diffs gets a copy of the source, to which `git apply` puts them, and its other blocks run with that copy.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("fast", "long", "ranks")
SECONDS = 540  # for one block; pytest ends a test after 600
#: What a page with diffs changes, and so has a copy of.
SOURCE = ("asft_nemo", "eval", "conf", "recipes", "tests")
#: File that a page takes for granted -> where it lies in the folder of published data sets.
PUBLISHED = {
    "gsm8k_train.jsonl": "math/gsm8k_train.jsonl",
    "medmcqa_test.jsonl": "medical/medmcqa_test.jsonl",
}
#: Likewise, made here: rows of a form that the page speaks of.
MADE = {
    "tasks.jsonl": '{"task": "Say A.", "context": "Loudly.", "reply": "A!"}\n',
    "chats.jsonl": '{"dialogue": [{"role": "user", "content": "Say A."}, {"role": "assistant", "content": "A"}]}\n',
    "suite.jsonl": '{"prompt": "What is two and two?", "answer": "4"}\n',
}

_BLOCK = re.compile(
    r"(?:^<!-- (?P<verb>runnable|not run): (?P<said>.+?) -->\n)?^```(?P<language>bash|python|diff)\n(?P<text>.*?)^```",
    flags=re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One block of shell, Python or a diff.

    Attributes:
        page: its file.
        line: of its first fence, from 1.
        language: bash, python or diff.
        text: what is between the fences.
        kind: one of `KINDS`; None where it is not run.
        reason: why it is not run; None where nothing is said.
    """

    page: Path
    line: int
    language: str
    text: str
    kind: str | None
    reason: str | None

    @property
    def name(self) -> str:
        return f"{os.path.relpath(self.page, ROOT)}:{self.line}"

    @property
    def needs(self) -> set[str]:
        """Published files that it reads."""
        return {name for name in PUBLISHED if name in self.text} | (
            {"data"} if "ASFT_DATA_DIR" in self.text else set()
        )


def blocks_of(page: Path) -> list[Block]:
    """Every block of a page, in its order."""
    text = page.read_text()
    found: list[Block] = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        run, said = match["verb"] == "runnable", match["said"]
        found.append(
            Block(
                page=page,
                line=line,
                language=match["language"],
                text=match["text"],
                kind=said if run else None,
                reason=None if run else said,
            )
        )
    return found


class PageFolder:
    """Where the blocks of one page run: the repository's folders, linked, and the files that the page takes for granted."""

    def __init__(self, folder: Path, blocks: list[Block], data: Path | None) -> None:
        """Args:
        folder: an empty directory.
        blocks: those that will run, in order.
        data: the folder of published data sets, where there is one.
        """
        self.folder = folder
        self._left = list(blocks)
        self._changed = any(block.language == "diff" for block in blocks)
        for entry in ROOT.iterdir():
            if self._changed and entry.name in SOURCE:
                shutil.copytree(entry, folder / entry.name, ignore=shutil.ignore_patterns("__pycache__"))
            elif entry.name not in {".git", "runs", "site", "build", "dist", ".pytest_cache"}:
                (folder / entry.name).symlink_to(entry)
        for name, text in MADE.items():
            (folder / name).write_text(text)
        if data is not None:
            (folder / "data").symlink_to(data)
            for name, place in PUBLISHED.items():
                (folder / name).symlink_to(data / place)

    def missing(self, block: Block) -> set[str]:
        """Published files that this block, or one that runs before it, reads and that are not here."""
        if block not in self._left:
            return set()
        needed = set().union(*(one.needs for one in self._left[: self._left.index(block) + 1]))
        return {name for name in needed if not (self.folder / name).exists()}

    def run_to(self, block: Block) -> None:
        """Runs a block, after those before it that have not run.

        Raises:
            AssertionError: one of them ended with an error; the message names it and has what it said.
        """
        while block in self._left:
            self._run(self._left.pop(0))

    def _run(self, block: Block) -> None:
        command = {
            "bash": ["bash", "-euo", "pipefail", "-c", block.text],
            "python": [sys.executable, "-c", block.text],
            "diff": ["git", "apply", "--whitespace=error", "-"],
        }[block.language]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        if self._changed:
            environment["PYTHONPATH"] = f"{self.folder}{os.pathsep}{self.folder / 'eval'}"
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that what it started ends with it
        )
        try:
            said, _ = process.communicate(block.text if block.language == "diff" else "", timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said = f"{process.communicate()[0]}\nnot done after {SECONDS} s"
        assert process.returncode == 0, f"{block.name} ends with {process.returncode}:\n{said[-3000:]}"
