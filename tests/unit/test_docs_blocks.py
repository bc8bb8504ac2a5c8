"""The code blocks of README and docs/: every one is run as its page has it, or says why it is not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from docs_blocks import KINDS, ROOT, Block, PageFolder, blocks_of

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [block for page in PAGES if page.is_file() for block in blocks_of(page)]
FAST = [block for block in BLOCKS if block.kind == "fast"]
RUNNABLE = [block for block in BLOCKS if block.kind]

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="no README here: not a clone")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_every_block_is_marked(block: Block) -> None:
    marks = " or ".join(f"<!-- runnable: {kind} -->" for kind in KINDS)
    assert block.kind or block.reason, (
        f"{block.name}: no {marks} or <!-- not run: reason --> on the line before"
    )
    assert block.kind in (None, *KINDS), f"{block.name}: runnable is {marks}"


def test_most_pages_have_something_that_runs() -> None:
    assert len(FAST) >= 10
    assert len(RUNNABLE) >= 25


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Block, list[Block]], PageFolder]:
    """The folder of a block's page, the same one for all that run together."""
    made: dict[tuple[Path, int], PageFolder] = {}

    def folder(block: Block, together: list[Block]) -> PageFolder:
        key = (block.page, len(together))
        if key not in made:
            data = Path(os.environ.get("ASFT_DATA_DIR", ROOT.parent / "shared" / "data"))
            mine = [one for one in together if one.page == block.page]
            made[key] = PageFolder(
                tmp_path_factory.mktemp(block.page.stem), mine, data if data.is_dir() else None
            )
        if missing := made[key].missing(block):
            pytest.skip(f"no {', '.join(sorted(missing))}: set ASFT_DATA_DIR")
        return made[key]

    return folder


Folder = Callable[[Block, list[Block]], PageFolder]


@pytest.mark.parametrize("block", FAST, ids=lambda block: block.name)
def test_fast_blocks_run(block: Block, folder_of: Folder) -> None:
    folder_of(block, FAST).run_to(block)


@pytest.mark.long
@pytest.mark.parametrize("block", RUNNABLE, ids=lambda block: block.name)
def test_all_blocks_run_in_order(block: Block, folder_of: Folder) -> None:
    """Fast ones too: what they leave is what later ones of their page begin with."""
    folder_of(block, RUNNABLE).run_to(block)
