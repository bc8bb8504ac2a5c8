"""Anchored supervised fine-tuning on NeMo and Megatron-core."""

__version__ = "0.1.0"
