"""Checkpoints in and out of Hugging Face format, streamed block by block and bit-exact.

Usable without NeMo or Megatron being imported.
"""

from __future__ import annotations

from asft_nemo.checkpoint.convert import ExportReport, ImportReport, export_hf, import_hf
from asft_nemo.checkpoint.verify import TensorDifference, VerifyReport, verify

__all__ = [
    "ExportReport",
    "ImportReport",
    "TensorDifference",
    "VerifyReport",
    "export_hf",
    "import_hf",
    "verify",
]
