"""Suites: versioned examples from files, or made in memory from (prompt, answer) pairs."""

from asft_eval.suites.jsonl import load_jsonl, suite_from_pairs, write_jsonl

__all__ = ["load_jsonl", "suite_from_pairs", "write_jsonl"]
