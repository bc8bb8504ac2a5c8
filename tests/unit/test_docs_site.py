"""The documentation site: it builds strict, needs nothing from elsewhere, and its links lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from mkdocs.config import load_config
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import get_files
from mkdocs.structure.pages import Page as SitePage

ROOT = Path(__file__).resolve().parents[2]
API = ("objectives", "losses", "reference", "checkpoint", "planner", "data", "evaluation", "model")

_spec = importlib.util.spec_from_file_location("docs_site", ROOT / "tools" / "docs_site.py")
assert _spec is not None
assert _spec.loader is not None
docs_site = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(docs_site)

pytestmark = pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="no site here: not a clone")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make docs` makes it; without a network as far as programs that heed proxies go."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


class Page(HTMLParser):
    """Addresses and ids of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: set[str] = set()
        self.links: set[str] = set()
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("id"):
            self.ids.add(str(found["id"]))
        if tag == "a" and found.get("href"):
            self.links.add(str(found["href"]))
        elif tag in ("link", "script", "img", "iframe"):
            self.loads |= {str(found[name]) for name in ("href", "src") if found.get(name)}


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {str(file.relative_to(site)): Page(file.read_text()) for file in sorted(site.rglob("*.html"))}


def test_nothing_is_fetched(pages: dict[str, Page], site: Path) -> None:
    for name, page in pages.items():
        elsewhere = {address for address in page.loads if urlsplit(address).netloc}
        assert not elsewhere, f"{name} loads {elsewhere}"
        for address in page.loads if name != "404.html" else ():
            file = site / os.path.dirname(name) / unquote(urlsplit(address).path)
            assert address.startswith("data:") or file.exists(), f"{name} loads {address}, which is not there"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*['\"]?https?:", sheet.read_text()), sheet.name


def test_links_within_the_site_lead_somewhere(pages: dict[str, Page], site: Path) -> None:
    for name, page in pages.items():
        for address in page.links if name != "404.html" else ():
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            file = (
                os.path.normpath(os.path.join(os.path.dirname(name), unquote(parts.path)))
                if parts.path
                else name
            )
            file = os.path.join(file, "index.html") if (site / file).is_dir() else file
            assert (site / file).is_file(), f"{name} links to {address}"
            if parts.fragment and file in pages:
                assert unquote(parts.fragment) in pages[file].ids, (
                    f"{name} links to {address}: no such heading"
                )


def test_equations_are_mathml(site: Path) -> None:
    method = (site / "method.html").read_text()
    assert method.count("<math") > 40
    assert "arithmatex" not in method
    assert r"\[" not in method


def test_equations_use_nothing_that_a_git_host_refuses() -> None:
    assert (
        r"\operatorname" not in (ROOT / "docs" / "method.md").read_text()
    )  # GitHub renders none that has it


@pytest.mark.parametrize("name", API)
def test_api_pages_say_what_docstrings_say(name: str, pages: dict[str, Page], site: Path) -> None:
    text = (site / "api" / f"{name}.html").read_text()
    assert text.count("doc-heading") >= 8
    assert "Parameters:" in text or "Attributes:" in text


def turned(markdown: str, repo_url: str | None = None) -> str:
    """What the hook makes of a text of docs/lora.md."""
    config = load_config(str(ROOT / "mkdocs.yml"), repo_url=repo_url)
    config.plugins._current_plugin = "docs_site"  # which mkdocs sets while a hook runs
    files = docs_site.on_files(get_files(config), config)
    file = files.get_file_from_path("lora.md")
    assert file is not None
    return docs_site.on_page_markdown(markdown, SitePage(None, file, config), config, files)


def test_links_are_turned_towards_the_site() -> None:
    assert (
        turned("[a](data.md#files) [b](../README.md#objectives)")
        == "[a](data.md#files) [b](index.md#objectives)"
    )
    assert (
        turned("[s](../eval/asft_eval/suites/README.md) [h](#checkpoints)")
        == "[s](suites.md) [h](#checkpoints)"
    )
    assert turned("```\n[a](../setup.py)\n```\n") == "```\n[a](../setup.py)\n```\n"


def test_a_file_of_the_repository_is_linked_where_there_is_an_address_and_named_where_not() -> None:
    link = "[`setup.py`](../setup.py)"
    assert (
        turned(link) == '<span class="repository-file" title="setup.py in the repository">`setup.py`</span>'
    )
    assert turned(link, "https://git.example.org/us/asft/") == (
        "[`setup.py`](https://git.example.org/us/asft/blob/main/setup.py)"
    )


@pytest.mark.parametrize("target", ["gone.md", "../gone.py", "../../outside.py"])
def test_a_broken_link_ends_the_build(target: str) -> None:
    with pytest.raises(PluginError, match=r"lora\.md links to"):
        turned(f"[gone]({target})")
