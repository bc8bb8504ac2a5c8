"""Checkpoints in and out of Hugging Face format, streamed block by block and bit-exact.

Usable without NeMo or Megatron being imported.
"""

from __future__ import annotations

from asft_nemo.checkpoint.convert import ExportReport, ImportReport, export_hf, import_hf
from asft_nemo.checkpoint.inspection import Inspection, inspect
from asft_nemo.checkpoint.lora_import import PeftImportReport, import_peft
from asft_nemo.checkpoint.lora_merge import export_merged
from asft_nemo.checkpoint.lora_peft import export_peft
from asft_nemo.checkpoint.verify import TensorDifference, VerifyReport, verify

__all__ = [
    "ExportReport",
    "ImportReport",
    "Inspection",
    "PeftImportReport",
    "TensorDifference",
    "VerifyReport",
    "export_hf",
    "export_merged",
    "export_peft",
    "import_hf",
    "import_peft",
    "inspect",
    "verify",
]
