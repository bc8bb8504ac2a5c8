"""The key `drift` of `results.json`: what a model makes of held-out text, and how far it has gone from its base.

docs/evaluation.md says what each figure is. What was measured is kept in `held_out.json`, with the figures of each text, and not measured
again while model, base and text are the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import asft_eval
from asft_eval.again import drop_former, owner_of, require_same_model
from asft_eval.backends.hf import load_tokenizer
from asft_eval.backends.tokens import require_model
from asft_eval.calibration import calibration
from asft_eval.errors import EvaluationError
from asft_eval.folder import held
from asft_eval.held_out import HeldOut, read_held_out
from asft_eval.reading import Tokens, free_gpus, read_texts, reading_dtype
from asft_eval.resampling import RESAMPLES, bootstrap_together
from asft_eval.result import (
    RESULTS,
    SAMPLES,
    Result,
    fingerprint,
    read_result,
    write_result,
    write_whole,
)

log = logging.getLogger(__name__)

MEASURED = "held_out.json"
BATCH_SIZE = 8
_VERSION = 1
_HISTOGRAM = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftRequest:
    """What is to be measured.

    Attributes:
        text: file of held-out text; see `asft_eval.held_out`.
        base: Hugging Face directory of the model that this one was fine-tuned from; None = no KL, only what the model makes of the text.
    """

    text: Path
    base: Path | None


def measure(model_dir: Path, request: DriftRequest, out_dir: Path) -> dict[str, Any]:
    """The figures, measured now or found in `out_dir`; no model is in memory afterwards.

    Args:
        model_dir: Hugging Face model directory.
        request: text and base.
        out_dir: gets `held_out.json`.

    Raises:
        EvaluationError: an unusable text, a model that cannot be loaded, or two that cannot be compared.
    """
    source = request.base or model_dir
    tokenizer = load_tokenizer(source)
    text = read_held_out(request.text, tokenizer, positions=_positions(source))
    base = None
    if request.base is not None:
        base = {"path": str(request.base), "fingerprint": fingerprint(request.base)}
    dtype = reading_dtype(model_dir)
    name = str(dtype).removeprefix("torch.")
    asked = [_VERSION, fingerprint(model_dir), base and base["fingerprint"], text.sha256, text.window, name]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    former = _former(out_dir / MEASURED, key)
    if former is not None:
        log.info("drift: measured before, kept")
        return {**former, "text": {**former["text"], "path": text.path}}
    started = time.perf_counter()
    log.info("drift: reading %d texts of %s in %s", len(text.encoded), text.path, name)
    pad_id: int = tokenizer.pad_token_id
    read = read_texts(
        model_dir, request.base, text.encoded, pad_id=pad_id, batch_size=BATCH_SIZE, dtype=dtype
    )
    free_gpus()  # what is evaluated next may be another process or engine
    found: dict[str, Any] = {"dtype": name, **figures(read, text, base)}
    found["seconds"] = round(time.perf_counter() - started, 3)
    out_dir.mkdir(parents=True, exist_ok=True)
    content = {"request": key, "drift": found, "texts": _texts(read)}
    write_whole(out_dir / MEASURED, json.dumps(content) + "\n")
    return found


def measure_alone(model_dir: Path, request: DriftRequest, out_dir: Path) -> Result:
    """`measure` without any suite: sets the key `drift` of the model's `results.json`, of which everything else stays; see there.

    Raises:
        EvaluationError: see `measure`; or `out_dir` holds another model's result, a damaged one, or answers without a result.
    """
    import transformers

    require_model(model_dir)
    with held(out_dir, model_dir, request.base):
        model = {"path": str(model_dir), "fingerprint": fingerprint(model_dir)}
        former = _former_result(model_dir, out_dir)
        found = measure(model_dir, request, out_dir)
        versions = {
            "python": platform.python_version(),
            "asft_eval": asft_eval.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        if former is not None and former.model["fingerprint"] != model["fingerprint"]:
            drop_former(former.model, former, model_dir, out_dir, drift_too=False)
            former = None
        if former is not None and (former.suites or former.for_judge):
            versions = {**versions, **former.versions}  # what suites were measured with
            result = replace(former, versions=versions, drift=found)
            write_whole(out_dir / RESULTS, json.dumps(result.to_json(), indent=2) + "\n")
            return result
        result = Result(
            model=model, backend="hf", protocol="none", seed=None, versions=versions, suites={}, drift=found
        )
        write_result(out_dir, result, [])
        return result


def _former_result(model_dir: Path, out_dir: Path) -> Result | None:
    """The result of this model's directory that the folder holds; None where it holds nothing."""
    if not (out_dir / RESULTS).is_file():
        samples = out_dir / SAMPLES
        if samples.is_file() and samples.stat().st_size:
            raise EvaluationError(
                f"{out_dir} holds answers of an evaluation that is not finished: finish it with its --suite and --drift together, or give another --out"
            )
        require_same_model(owner_of(None, out_dir), model_dir, out_dir)
        return None
    former = read_result(out_dir)
    require_same_model(former.model, model_dir, out_dir)
    return former


def figures(read: Tokens, text: HeldOut, base: Mapping[str, str] | None) -> dict[str, Any]:
    """The key `drift`, but for its dtype and seconds.

    Args:
        read: every scored token.
        text: what was read.
        base: path and fingerprint; None = there is none.
    """
    intervals = _intervals(read)
    return {
        "text": {
            "path": text.path,
            "sha256": text.sha256,
            "texts": len(text.encoded),
            "window": text.window,
            "cut": text.cut,
            "left_out": text.left_out,
        },
        "tokens": len(read.text),
        "model": _reading(read, intervals, ""),
        "base": None if base is None else {**base, **_reading(read, intervals, "base_")},
        **{
            name: None if base is None else intervals[name]
            for name in ("forward_kl", "reverse_kl", "nll_change")
        },
    }


def _intervals(read: Tokens) -> dict[str, dict[str, float]]:
    """Means over tokens with their intervals over texts."""
    names = ("nll", "entropy", "base_nll", "base_entropy", "forward_kl", "reverse_kl")
    sums = {name: read.by_text(name) for name in names if name in read.figures}
    if "base_nll" in sums:
        sums["nll_change"] = sums["nll"] - sums["base_nll"]
    weights = read.counts()
    log.info("drift: %d resamples of %d texts for the intervals", RESAMPLES, len(weights))
    return {name: asdict(interval) for name, interval in bootstrap_together(sums, weights).items()}


def _reading(read: Tokens, intervals: Mapping[str, dict[str, float]], prefix: str) -> dict[str, Any]:
    nll = intervals[f"{prefix}nll"]
    return {
        "nll": nll,
        "perplexity": math.exp(min(nll["value"], 700.0)),
        "entropy": intervals[f"{prefix}entropy"],
        "calibration": calibration(read.figures[f"{prefix}confidence"], read.figures[f"{prefix}hit"]),
        "label_probability": histogram(read.figures[f"{prefix}label_probability"]),
    }


def histogram(probabilities: Sequence[float] | Any) -> dict[str, list[float]]:
    """Share of tokens in each of twenty bins of the probability of the text's token."""
    place = np.minimum(
        (np.asarray(probabilities, dtype=np.float64) * _HISTOGRAM).astype(np.int64), _HISTOGRAM - 1
    )
    counts = np.bincount(place, minlength=_HISTOGRAM)
    return {
        "edges": [i / _HISTOGRAM for i in range(_HISTOGRAM + 1)],
        "shares": [float(count) for count in counts / counts.sum()],
    }


def _texts(read: Tokens) -> list[dict[str, float]]:
    """Of every text its tokens and the means over them."""
    names = [
        name
        for name in read.figures
        if name.removeprefix("base_") in ("nll", "entropy") or name.endswith("_kl")
    ]
    counts = read.counts()
    means = {name: read.by_text(name) / counts for name in names}
    return [
        {"tokens": int(counts[i]), **{name: float(values[i]) for name, values in means.items()}}
        for i in range(len(counts))
    ]


def _former(path: Path, key: str) -> dict[str, Any] | None:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        return content["drift"] if content["request"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _positions(model_dir: Path) -> int:
    try:
        config: Any = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        return int(config["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{model_dir}/config.json says no max_position_embeddings ({error}): name a complete Hugging Face model directory"
        ) from None
