"""What would become of the rows of some files, for `asft data check`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from asft_nemo.config.schema import DataConfig
from asft_nemo.data.loading import LoadReport, load
from asft_nemo.data.tokenization import TextTokenizer


def inspect_files(files: Iterable[str | Path], data: DataConfig, *, tokenizer: TextTokenizer) -> LoadReport:
    """What would become of the rows; bad and over-long rows are counted whatever the policies say.

    Raises:
        DataError: a file cannot be read at all.
    """
    report = LoadReport()
    if data.on_too_long == "fail":
        data = dataclasses.replace(data, on_too_long="drop")
    load(files, data, tokenizer, report)
    return report
