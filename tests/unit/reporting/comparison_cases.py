"""Finished evaluations that no model made, and what a browser says of a page."""

from __future__ import annotations

import html
import json
import random
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from asft_eval.protocols import protocols
from asft_eval.requests import Request, parts_of, requests_of
from asft_eval.result import Result, SuiteResult, write_result
from asft_eval.scoring import figures
from asft_eval.suites import suite_from_pairs
from asft_eval.types import Completion

#: model -> chance of a right answer, drift
MODELS: Mapping[str, tuple[float, float]] = {
    "base": (0.4, 0.0),
    "sft": (0.42, 0.2),
    "dft_of_a_long_name_and_seed0": (0.05, 0.5),
    "asft": (0.75, 0.07),
}
SUITES = [
    suite_from_pairs(
        name, [(f"{name} {i}: what is <b>{i}</b> times {i + 1}?", str(i * (i + 1))) for i in range(n)]
    )
    for name, n in (("math500", 60), ("a_suite_of_a_long_name", 40))
]

_PROBE = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify({
  width: innerWidth, content: document.documentElement.scrollWidth, paper: getComputedStyle(document.body).backgroundColor,
  cells: [...document.querySelectorAll("th, td")].filter(x => x.scrollWidth > x.clientWidth).map(x => x.textContent),
  inner: [...document.querySelectorAll(".scroll")].map(x => x.scrollWidth - x.clientWidth)}), "*"))</script>"""
_FRAME = """<!doctype html><title>none</title><body style="margin:0">
<iframe src="probe.html" style="border:0;width:{width}px;height:{height}px"></iframe>
<script>addEventListener("message", e => {{ document.title = e.data }})</script>"""


def make_results(folder: Path) -> dict[str, Path]:
    """A finished evaluation of each of `MODELS` with made-up answers and drift: name -> directory."""
    parts = parts_of(SUITES, protocols("greedy", max_tokens=64))
    for name, (right, drift) in MODELS.items():
        luck = random.Random(name)
        found: dict[str, SuiteResult] = {}
        samples: list[dict[str, Any]] = []
        for part in parts:
            prompts = [example.prompt for example in part.suite.examples]
            requests = requests_of(part, prompts, model=name, backend="fake")
            rows = [_graded(request, correct=luck.random() < right) for request in requests]
            found[part.name] = figures(part, rows, backend="fake")
            samples += rows
        result = Result(
            model={"path": f"models/{name}", "fingerprint": name},
            backend="fake",
            protocol="greedy",
            seed=None,
            versions={"asft_eval": "0"},
            suites=found,
            drift=made_up_drift(drift),
        )
        write_result(folder / name, result, samples)
    return {name: folder / name for name in MODELS}


def _graded(request: Request, *, correct: bool) -> dict[str, Any]:
    text = request.example.answer if correct else "<script>none</script>"
    row = request.row(Completion(text, len(text), True), 0.0)
    return {
        **row,
        "parsed": text,
        "correct": correct,
        "reason": "the same text" if correct else "another text",
    }


def made_up_drift(kl: float) -> dict[str, Any]:
    """A key `drift` whose figures follow from one."""

    def around(value: float) -> dict[str, float]:
        return {"value": value, "low": 0.9 * value, "high": 1.1 * value}

    def reading(moved: float) -> dict[str, Any]:
        tenths = [(i / 10, (i + 1) / 10) for i in range(10)]
        bins = [
            {"low": a, "high": b, "tokens": 10, "confidence": (a + b) / 2, "accuracy": max(0.0, a - moved)}
            for a, b in tenths
        ]
        return {
            "nll": around(1.2 + moved),
            "perplexity": 3.3 + moved,
            "entropy": around(1.0 - moved),
            "calibration": {"ece": 0.03 + moved, "bins": bins},
            "label_probability": {"edges": [i / 20 for i in range(21)], "shares": [0.05] * 20},
        }

    return {
        "text": {"path": "held_out.jsonl", "sha256": "x", "texts": 200},
        "tokens": 12345,
        "model": reading(kl),
        "base": {"path": "base", "fingerprint": "f", **reading(0.0)},
        "forward_kl": around(kl),
        "reverse_kl": around(2 * kl),
        "nll_change": around(kl),
    }


def chromium() -> str:
    """The browser's command; the test is skipped where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    return found


class Browser:
    """A page in headless Chromium, as wide as asked: in a frame, because the browser's own window has a least width.

    Args:
        page: an HTML file.
        folder: for the browser's files.
        width: of the frame in pixels.
        dark: whether the reader prefers dark paper.
    """

    def __init__(self, page: Path, folder: Path, *, width: int, dark: bool, height: int = 2600):
        self._folder, self._size = folder, (width, height)
        (folder / "probe.html").write_text(page.read_text() + _PROBE)
        (folder / "frame.html").write_text(_FRAME.format(width=width, height=height))
        self._scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"

    def measured(self) -> dict[str, Any]:
        """Widths of the frame and of the page's content, how far tables overflow theirs, texts wider than their cells, colour of the paper."""
        dom = self._run("--dump-dom", "--virtual-time-budget=5000")
        title = re.search(r"<title>(.*?)</title>", dom)
        assert title, dom[:300]
        return json.loads(html.unescape(title[1]))

    def screenshot(self) -> Path:
        """A picture of the page from its top."""
        file = self._folder / "page.png"
        self._run(f"--screenshot={file}", f"--window-size={self._size[0]},{self._size[1]}")
        return file

    def _run(self, *flags: str) -> str:
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", self._scheme]
        own = f"--user-data-dir={self._folder / 'profile'}"
        page = (self._folder / "frame.html").as_uri()
        done = subprocess.run(
            [chromium(), *words, own, *flags, page], capture_output=True, text=True, timeout=120, check=True
        )
        return done.stdout
