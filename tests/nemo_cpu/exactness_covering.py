"""A small set of cases in which every two levels that go together occur together."""

from __future__ import annotations

import itertools

import numpy as np
from exactness_factors import BLOCKS, DEFAULTS, FACTORS, Case, allowed, refusal

_LEVELS = [(factor, level) for factor, levels in FACTORS.items() for level in levels]
_PLACE = {level: place for place, level in enumerate(_LEVELS)}


def covering_cases() -> list[Case]:
    """Cases that cover every possible pair, always the same: each brings the most pairs that none before it had.

    All combinations of the blocks' allowed ones are candidates; of blocks whose levels refuse each other only those that run.
    """
    learned, placed, computed = (allowed(block) for block in BLOCKS)
    together = [
        {**one, **other}
        for one, other in itertools.product(learned, placed)
        if refusal({**DEFAULTS, **one, **other}) is None
    ]
    candidates = [{**one, **other} for one, other in itertools.product(together, computed)]
    has_CL = np.zeros((len(candidates), len(_LEVELS)), dtype=np.float32)
    for number, case in enumerate(candidates):
        has_CL[number, [_PLACE[level] for level in case.items()]] = 1
    missing_LL = np.triu(np.ones((len(_LEVELS), len(_LEVELS)), dtype=np.float32), 1)
    chosen = []
    while True:
        gain_C = np.einsum("cl,cl->c", has_CL @ missing_LL, has_CL)
        best = int(gain_C.argmax())
        if gain_C[best] == 0:
            return chosen
        case = {factor: candidates[best][factor] for factor in FACTORS}
        if refusal(case) is None:
            chosen.append(case)
            missing_LL[np.outer(has_CL[best], has_CL[best]) > 0] = 0
        else:
            has_CL[best] = 0
