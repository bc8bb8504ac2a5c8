"""Evaluate Hugging Face checkpoints: suites of examples, graders, backends, drift from a reference, and comparison.

Imports nothing of `asft_nemo`: whatever trained a model, its checkpoint is judged the same way.
"""

from asft_eval.errors import EvaluationError
from asft_eval.types import Completion, Example, Protocol, Score, Suite

__version__ = "0.1.0"

__all__ = ["Completion", "EvaluationError", "Example", "Protocol", "Score", "Suite", "__version__"]
