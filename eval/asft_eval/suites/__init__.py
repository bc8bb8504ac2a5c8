"""Suites: versioned examples, published ones by name, from files, or made in memory from (prompt, answer) pairs."""

from asft_eval.suites.jsonl import load_jsonl, suite_from_pairs, write_jsonl
from asft_eval.suites.load import load_suite, load_suites
from asft_eval.suites.published import SUITES

__all__ = ["SUITES", "load_jsonl", "load_suite", "load_suites", "suite_from_pairs", "write_jsonl"]
