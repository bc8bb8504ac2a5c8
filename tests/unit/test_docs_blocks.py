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


PAGE = """# A page

<!-- runnable: fast -->
```bash
echo first > said
```

```bash
unmarked
```

<!-- not run: needs the moon -->
```python
import moon
```

<!-- runnable: fast -->
```bash
cat said
false | cat
echo not reached
```
"""


def test_a_block_that_fails_is_named_with_what_it_said(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    first, unmarked, moon, last = blocks_of(page)
    assert [block.line for block in (first, unmarked, moon, last)] == [4, 8, 13, 18]
    assert (first.kind, unmarked.kind, moon.kind, last.kind) == ("fast", None, None, "fast")
    assert (unmarked.reason, moon.reason) == (None, "needs the moon")
    (tmp_path / "here").mkdir()
    folder = PageFolder(tmp_path / "here", [first, last], data=None)
    with pytest.raises(AssertionError, match=r"page\.md:18 ends with 1:\nfirst\n$"):
        folder.run_to(last)
    assert (folder.folder / "said").read_text() == "first\n"


def test_a_diff_changes_a_copy(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    lines = (ROOT / "conf" / "objective" / "dft.yaml").read_text().splitlines()
    diff = (
        f"--- a/conf/objective/dft.yaml\n+++ b/conf/objective/dft.yaml\n@@ -1 +1,2 @@\n {lines[0]}\n+# more\n"
    )
    page.write_text(f"<!-- runnable: fast -->\n```diff\n{diff}```\n")
    (tmp_path / "here").mkdir()
    [block] = blocks_of(page)
    folder = PageFolder(tmp_path / "here", [block], data=None)
    folder.run_to(block)
    assert "# more" in (folder.folder / "conf" / "objective" / "dft.yaml").read_text()
    assert "# more" not in (ROOT / "conf" / "objective" / "dft.yaml").read_text()


def test_a_block_that_needs_data_waits_for_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- runnable: fast -->\n```bash\nwc gsm8k_train.jsonl\n```\n")
    [block] = blocks_of(page)
    (tmp_path / "here").mkdir()
    assert PageFolder(tmp_path / "here", [block], data=None).missing(block) == {"gsm8k_train.jsonl"}


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
