"""What mkdocs does for this repository beyond its own: pages from outside docs/, links to files, equations without a script.

`make docs` builds docs/ and the Markdown files of `OUTSIDE` into site/. Links in them are written for a reader of the repository; here
they are turned towards the site's own pages. A link to any other file goes to the repository's address where mkdocs.yml knows one
(`repo_url`, from the variable ASFT_REPOSITORY), and is plain text, named as a file of the repository, where it does not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
#: File of the repository -> its place in the site; whatever lies in docs/ is there by itself.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "assets/demo-report.png": "images/demo-report.png",
    "assets/tiny-base/README.md": "tiny_base.md",
    "assets/tiny-data/README.md": "tiny_data.md",
    "eval/asft_eval/suites/README.md": "suites.md",
    "eval/asft_eval/sandbox/README.md": "sandbox.md",
    "benchmarks/results/README.md": "results/index.md",
    "benchmarks/results/cpu_sweep.png": "results/cpu_sweep.png",
    **{
        f"benchmarks/results/{name}.md": f"results/{name}.md"
        for name in (
            *("compat", "coverage", "cpu_convert", "cpu_step", "cpu_step_pp1"),
            *("exactness", "fault_campaign", "mutation", "simulation"),
        )
    },
}

_FENCE = re.compile(r"^(```|~~~).*?^\1[^\S\n]*$", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")
_LOGARITHM = re.compile(r"(<mi>(?:log|ln)</mi>)(?!<mo)")
_EQUATION = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', flags=re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files of `OUTSIDE`."""
    for source, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links of a page; what is fenced is left alone."""
    source = Path(str(page.file.abs_src_path)).resolve()

    def turned(match: re.Match[str]) -> str:
        return _turned(match, source=source, page=page, config=config, files=files)

    return _outside_fences(markdown, lambda text: _LINK.sub(turned, text))


def _outside_fences(text: str, change: Callable[[str], str]) -> str:
    parts: list[str] = []
    end = 0
    for fence in _FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def _turned(match: re.Match[str], *, source: Path, page: Page, config: MkDocsConfig, files: Files) -> str:
    """One link as the site has it."""
    mark, text, target = match.groups()
    name, _, anchor = target.partition("#")
    if not name or re.match(r"[a-z]+:", name):
        return match.group()
    file = Path(os.path.normpath(source.parent / name))
    place = _place(file, files)
    if place is not None:
        here = os.path.relpath(place, Path(page.file.src_uri).parent)
        return f"{mark}[{text}]({here}{'#' + anchor if anchor else ''})"
    if not file.exists() or not file.is_relative_to(ROOT):
        raise PluginError(f"{page.file.src_uri} links to {target}: there is no such file in the repository")
    path = file.relative_to(ROOT).as_posix()
    if config.repo_url:
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})"
    return f'<span class="repository-file" title="{path} in the repository">{text}</span>'


def _place(file: Path, files: Files) -> str | None:
    """Where the site has a file of the repository; None where it has it not."""
    docs = ROOT / "docs"
    place = file.relative_to(docs) if file.is_relative_to(docs) else None
    if place is not None and files.get_file_from_path(place.as_posix()):
        return place.as_posix()
    return OUTSIDE.get(os.path.relpath(file, ROOT))


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Equations as MathML, which browsers show without a script and without the network."""
    return _EQUATION.sub(lambda match: _mathml(match.group(2), block=match.group(1) == "div"), html)


def _mathml(text: str, *, block: bool) -> str:
    r"""The MathML of what stands between `\(` and `\)` or `\[` and `\]`."""
    latex = unescape(text).strip()[2:-2].strip()
    mathml = convert(latex, display="block" if block else "inline")
    mathml = _LOGARITHM.sub(r'\1<mspace width="0.17em"/>', mathml)  # TeX's own space behind such a word
    return f'<div class="equation" tabindex="0">{mathml}</div>' if block else mathml
