"""What a user of the evaluation can mend."""

from __future__ import annotations


class EvaluationError(Exception):
    """A model, suite, backend or result is unusable; the message is one sentence that names the cure."""
