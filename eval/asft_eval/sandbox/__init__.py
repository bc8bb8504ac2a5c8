"""A sandbox for programs that a model wrote: what it promises is in README.md beside this file."""

from asft_eval.sandbox.box import Run, Sandbox, open_sandbox
from asft_eval.sandbox.limits import Limits, Outcome

__all__ = ["Limits", "Outcome", "Run", "Sandbox", "open_sandbox"]
