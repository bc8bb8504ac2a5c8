"""Lets the real NeMo and Megatron code run on a machine without a GPU (gloo ranks)."""
