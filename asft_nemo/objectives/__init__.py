"""Objectives as rows of a table: what weighs a token, what anchors it, and what must be read to know."""

from asft_nemo.objectives.objective import Objective, objective
from asft_nemo.objectives.table import OBJECTIVES, ObjectiveRow, Option, objective_names
from asft_nemo.objectives.weights import TOP_K, WeightInputs, topk_entropy

__all__ = [
    "OBJECTIVES",
    "TOP_K",
    "Objective",
    "ObjectiveRow",
    "Option",
    "WeightInputs",
    "objective",
    "objective_names",
    "topk_entropy",
]
