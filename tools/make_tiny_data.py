"""Make `assets/tiny-data`: the rows that `experiment=tiny` learns, and the questions it is asked before and after.

    python tools/make_tiny_data.py --out assets/tiny-data

The skill is the demo's new one, `swap`; no question is a training row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from asft_nemo.demo import skills

ROWS, QUESTIONS, SEED = 128, 16, 0


def files() -> dict[str, str]:
    """File name -> its text, JSON Lines."""
    train = skills.new_skill_train(ROWS, SEED, wrong_share=0)
    questions = skills.new_skill_test(QUESTIONS, SEED)
    return {
        "train.jsonl": _lines({"prompt": row.prompt, "response": row.response} for row in train),
        "swap.jsonl": _lines({"prompt": row.prompt, "answer": row.response} for row in questions),
    }


def _lines(rows: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("assets/tiny-data"))
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main()
