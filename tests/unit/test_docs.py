"""README, CONTRIBUTING and docs/: links lead somewhere, commands parse, quoted errors are what is said, tables are the code's."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from asft_nemo import cli
from asft_nemo.config import tables
from asft_nemo.config.load import compose

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md") if (ROOT / name).is_file()
] + sorted((ROOT / "docs").glob("*.md"))
READMES = [
    page for folder in ("assets", "benchmarks", "eval") for page in sorted((ROOT / folder).rglob("README.md"))
]
HERE = "the link must lead to a file of the repository"

pytestmark = [
    pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="no README here: not a clone"),
    pytest.mark.usefixtures("keep_logging_and_warnings"),
]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text()))
    return [target for target in targets if not target.startswith("https://")]


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def shell_commands(page: Path) -> list[list[str]]:
    """The words of every line of a page's bash blocks, continued lines joined, a leading `srun ...` left out."""
    lines = [
        line
        for block in code_blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    commands = [shlex.split(line, comments=True) for line in lines]
    return [words[words.index("asft") :] if words[0] == "srun" else words for words in commands]


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}: {HERE}"
        assert file.is_relative_to(ROOT), f"{page.name} links to {target}: {HERE}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}: no such heading"


def test_every_page_is_reached_from_the_readme() -> None:
    reached = {(ROOT / target.partition("#")[0]).resolve() for target in links(ROOT / "README.md")}
    assert set(PAGES) - {ROOT / "README.md"} <= reached


COMMANDS = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)[:70]}")
    for page in PAGES
    if not code_blocks(
        page, "diff"
    )  # the commands of a page with diffs are those of a changed source: test_docs_blocks.py
    for words in shell_commands(page)
]


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_parse(words: list[str]) -> None:
    """`asft` commands exist and their settings compose; `make` targets exist; nothing else is of ours to check."""
    if words[0] == "make":
        rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert [word for word in words[1:] if "=" not in word and word not in rules] == []
    if words[0] != "asft" or words[1:] == ["--help"]:
        return
    arguments = cli.parser().parse_args(words[1:])
    if words[1] == "train":
        compose(arguments.overrides, check_inputs=False)
    if words[1] == "launch":
        compose(arguments.overrides, check_inputs=False, launched=True)
    if words[1:3] == ["data", "check"]:
        settings = [word for word in arguments.words if "=" in word]
        compose(["recipe=tiny_cpu", "objective=sft", *settings], check_inputs=False)


def test_there_are_commands_to_check() -> None:
    assert sum(words[0] == "asft" for page in PAGES for words in shell_commands(page)) >= 10


def quoted_errors() -> list[tuple[list[str], list[str]]]:
    """(words, sentences) of every `$ asft ...` in the console blocks of docs/troubleshooting.md."""
    found: list[tuple[list[str], list[str]]] = []
    for block in code_blocks(ROOT / "docs" / "troubleshooting.md", "console"):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((shlex.split(line[2:]), []))
            else:
                found[-1][1].append(line)
    return found


@pytest.mark.parametrize(
    ("words", "sentences"),
    quoted_errors(),
    ids=lambda value: " ".join(value)[:80] if value[0] == "asft" else "",
)
def test_quoted_errors_are_what_is_said(
    words: list[str],
    sentences: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = [json.dumps({"question": f"copy A{i}:", "answer": f"A{i}"}) for i in range(3)]
    bad = [
        good[0],
        "oops",
        json.dumps({"question": "x", "answer": ""}),
        json.dumps({"prompt": "x", "answer": "y"}),
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(good))
    (tmp_path / "bad.jsonl").write_text("\n".join(bad))
    monkeypatch.chdir(tmp_path)
    assert sentences
    assert cli.main(words[1:]) == 2
    said = capsys.readouterr().err
    for sentence in sentences:
        assert sentence in said
    assert said.count("\n") == len(sentences), "the page leaves out a line"


def table_rows(page: Path, first_cell: str) -> list[list[str]]:
    """The rows of the table whose header begins with `first_cell`."""
    lines = iter(page.read_text().splitlines())
    for line in lines:
        if line.startswith(f"| {first_cell} |"):
            break
    next(lines)
    rows: list[list[str]] = []
    for line in lines:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "docs" / "objectives.md"], ids=lambda page: page.name
)
def test_tables_of_objectives_are_the_codes(page: Path) -> None:
    said = {row[0].strip("`"): row[-1] == "yes" for row in table_rows(page, "name")}
    assert said == dict.fromkeys(tables.OBJECTIVES, True)


FIGURES = [
    pytest.param(cells[column], cells[linked], id=f"{page}: {cells[0][:50]}")
    for page, first, column, linked in (("performance", "question", 2, 3), ("numerics", "compared", 3, 3))
    for cells in table_rows(ROOT / "docs" / f"{page}.md", first)
    if "](" in cells[linked] and re.search(r"\d", re.sub(r"\(.*\)", "", cells[column]))
]


@pytest.mark.parametrize(("said", "linked"), FIGURES)
def test_figures_are_those_of_the_page_they_are_from(said: str, linked: str) -> None:
    sources = re.findall(r"\]\(([^)#]+)[^)]*\)", linked)
    text = "".join((ROOT / "docs" / source).read_text() for source in sources)
    figures = re.findall(r"\d[\d.,]*(?:e-?\d+)?(?<![.,])", re.sub(r"\]\([^)]*\)", "", said))
    assert figures
    for figure in figures:
        assert figure in text, f"{figure} is not in {sources}"


def test_there_are_figures_to_compare() -> None:
    assert len(FIGURES) >= 8


def test_gradient_figures_are_within_the_tests_bound() -> None:
    source = (ROOT / "tests" / "nemo_cpu" / "gradients.py").read_text()
    bound = float(re.findall(r"^BOUND = (\S+)", source, flags=re.MULTILINE)[0])
    cells = [cell for row in table_rows(ROOT / "README.md", "layout") for cell in row[2:] if cell]
    assert len(cells) >= 20
    assert all(0 < float(cell) <= bound for cell in cells)
