"""Protocols by name: how many completions of a prompt are drawn, how, and what their score is.

    greedy   one completion, the most probable token each time
    paper    the ASFT paper's: 16 completions at temperature 1 and top_p 1, the share of right ones over all of them
    pass@K   the probability that one of K completions is right, estimated without bias from max(16, 2 K) at temperature 1
    both     greedy and paper

Each draws at most 4096 tokens unless told otherwise.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

from asft_eval.errors import EvaluationError, did_you_mean
from asft_eval.types import Protocol

MAX_TOKENS = 4096
_GREEDY = Protocol(name="greedy", max_tokens=MAX_TOKENS)
_PAPER = Protocol(name="paper", max_tokens=MAX_TOKENS, n=16, temperature=1.0, top_p=1.0, seed=0)
_NAMED = {"greedy": (_GREEDY,), "paper": (_PAPER,), "both": (_GREEDY, _PAPER)}
_LARGEST_K = 1000


def protocols(name: str, *, max_tokens: int | None = None, seed: int = 0) -> tuple[Protocol, ...]:
    """The protocols that a name stands for; two of them for `both`.

    Args:
        name: greedy, paper, both, or pass@K with a number K.
        max_tokens: of each completion; None = the protocol's own.
        seed: of what is drawn.

    Raises:
        EvaluationError: there is no such protocol.
    """
    found = _NAMED.get(name) or _pass_at(name)
    return tuple(
        replace(
            one,
            max_tokens=one.max_tokens if max_tokens is None else max_tokens,
            seed=None if one.temperature == 0 else seed,
        )
        for one in found
    )


def _pass_at(name: str) -> tuple[Protocol, ...]:
    match = re.fullmatch(r"pass@([1-9][0-9]{0,3})", name)
    if match is None or int(match[1]) > _LARGEST_K:
        raise EvaluationError(
            f"there is no protocol {name!r}: {did_you_mean(name, [*_NAMED])}, or pass@K with K from 1 to {_LARGEST_K}"
        )
    k = int(match[1])
    return (replace(_PAPER, name=name, n=max(_PAPER.n, 2 * k), k=k),)


def pass_at_k(right: int, n: int, k: int) -> float:
    """`1 - C(n - right, k) / C(n, k)`: the unbiased estimate of pass@k from n completions (Chen et al. 2021, eq. 1).

    Args:
        right: completions that are right, 0 to n.
        n: completions, at least k.
        k: completions that one may choose from.
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
