"""asft eval --drift: how a model reads held-out text, and how far it has gone from its base."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asft_nemo.errors import UserError

if TYPE_CHECKING:
    from asft_eval.drift import DriftRequest


def add_drift_options(evaluate: argparse.ArgumentParser) -> None:
    """Adds --drift and --base."""
    evaluate.add_argument(
        "--drift",
        type=Path,
        metavar="TEXT",
        help="perplexity, entropy and calibration on held-out text, and KL to the base: JSON Lines of prompt and response or of text, or any text file",
    )
    evaluate.add_argument(
        "--base", type=Path, metavar="MODEL_DIR", help="with --drift: what the model was fine-tuned from"
    )


def drift_request(arguments: argparse.Namespace) -> DriftRequest | None:
    """What --drift and --base ask for.

    Raises:
        UserError: a base without a text.
    """
    if arguments.drift is None:
        if arguments.base is not None:
            raise UserError("--base is for the drift from it, which needs text: give --drift TEXT, too")
        return None
    from asft_eval.drift import DriftRequest

    return DriftRequest(text=arguments.drift, base=arguments.base)


def drift_words(drift: Mapping[str, Any] | None) -> list[str]:
    """The figures in a line or two; none where nothing was measured."""
    if drift is None:
        return []
    own = drift["model"]
    lines = [
        f"held-out text: perplexity {own['perplexity']:.2f}, entropy {own['entropy']['value']:.3f} nats, "
        f"calibration error {own['calibration']['ece']:.3f}, over {drift['tokens']} tokens"
    ]
    if drift["base"] is not None:
        forward, reverse = drift["forward_kl"], drift["reverse_kl"]
        lines.append(
            f"drift: KL(ref||policy) {forward['value']:.4g} nats per token, 95 % interval {forward['low']:.4g} to {forward['high']:.4g}; "
            f"KL(policy||ref) {reverse['value']:.4g}"
        )
    return lines
