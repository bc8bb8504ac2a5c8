"""Where a model's weights go: on one GPU where they fit beside what a pass needs, else over all that are visible."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asft_eval.errors import EvaluationError

log = logging.getLogger(__name__)

#: Share of a GPU's free memory for weights: the rest is for keys and values, logits and the allocator.
FOR_WEIGHTS = 0.75
#: The same of a GPU that is the only one, whose owner can make batches smaller and nothing else. Keys and values of the hf backend's batch (16 answers of 4096
#: tokens, prompts of 500) take 4 GB of Qwen2.5-7B (15.2 GB: no question on 24 GB) and 19 GB of Qwen2.5-32B: of its 65.5 GB on 80 GB, multiple choice runs as it is and
#: answers with a --batch-size of 8. Logits are of one position a text: little. The tenth that is left is for a batch of one (1.2 GB there) and CUDA's own.
FOR_WEIGHTS_ALONE = 0.9
#: Bytes of a number, by torch's names of what weights are stored in.
ITEMSIZES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
_GIB = 2**30
#: Names of safetensors, and torch's.
_STORED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def gpus_for(weights: int, memory: int) -> int:
    """GPUs that a model of so many bytes asks for: a power of two.

    Args:
        weights: bytes of the model's weights.
        memory: bytes of one GPU.
    """
    number = 1
    while weights > FOR_WEIGHTS * memory * number:
        number *= 2
    return number


def spread(model_dir: Path, weights: int, free: Sequence[int]) -> dict[int, int] | None:
    """Bytes of weights that each visible GPU may get; None where the first one takes the model whole.

    Nothing is put into host memory or onto the disk instead: a model that is run from there takes days where this takes hours.

    Args:
        model_dir: named in the error.
        weights: bytes of the model's weights.
        free: bytes free on each visible GPU.

    Raises:
        EvaluationError: all of them together are too small.
    """
    if weights <= FOR_WEIGHTS * free[0]:
        return None
    if len(free) == 1 and weights <= FOR_WEIGHTS_ALONE * free[0]:
        log.warning(
            "the weights of %s take %d %% of what the only visible GPU has free: where its memory runs out, give a smaller --batch-size, or run where more are visible",
            model_dir, 100 * weights / free[0],
        )  # fmt: skip
        return None
    room = {number: int(FOR_WEIGHTS * bytes_) for number, bytes_ in enumerate(free)}
    if len(free) == 1 or weights > sum(room.values()):
        raise EvaluationError(
            f"the weights of {model_dir} take {weights / _GIB:.1f} GiB, and {len(free)} visible GPU{'s have' if len(free) > 1 else ' has'} "
            f"{sum(free) / _GIB:.1f} GiB free, for what a pass needs, too: run where more GPUs are visible (CUDA_VISIBLE_DEVICES)"
        )
    return room


def weight_bytes(model_dir: Path, itemsize: int | None) -> int:
    """Bytes of the weights in a directory's safetensors files.

    Args:
        model_dir: a Hugging Face model directory.
        itemsize: bytes of a number once loaded; None: as stored.

    Raises:
        EvaluationError: a file is no safetensors file.
    """
    return sum(_of_file(file, itemsize) for file in sorted(model_dir.glob("*.safetensors")))


def _of_file(file: Path, itemsize: int | None) -> int:
    tensors = _tensors(file)
    if itemsize is None:
        return sum(tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in tensors)
    return itemsize * sum(_numbers(tensor["shape"]) for tensor in tensors)


def _tensors(file: Path) -> list[dict[str, Any]]:
    """Of each tensor its `dtype`, `shape` and `data_offsets`."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: Mapping[str, dict[str, Any]] = json.loads(stream.read(length))
        tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
        if not all({"dtype", "shape", "data_offsets"} <= set(tensor) for tensor in tensors):
            raise ValueError("its header is incomplete")
        return tensors
    except (
        OSError,
        ValueError,
        struct.error,
        AttributeError,
        TypeError,
        MemoryError,
        OverflowError,
    ) as error:
        raise EvaluationError(f"{file} cannot be read as safetensors ({error}): copy it again") from None


def _numbers(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def share_heads(heads: int, kv_heads: int, number: int) -> bool:
    """Whether so many GPUs can share a model's attention heads evenly: vLLM divides query heads, and divides key-value heads or repeats them."""
    return heads % number == 0 and (kv_heads % number == 0 or number % kv_heads == 0)


def stored_dtype(model_dir: Path) -> str:
    """What config.json says that the weights are in, which transformers goes by; where it says nothing, what most numbers of the files are in.

    Returns:
        A key of `ITEMSIZES`: torch's name.

    Raises:
        EvaluationError: a file is no safetensors file.
    """
    try:
        config: dict[str, Any] = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    config = {**config.get("text_config", {}), **config}
    said = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    if said in ITEMSIZES:
        return said
    files = sorted(model_dir.glob("*.safetensors"))
    numbers = dict.fromkeys(_STORED, 0)
    for tensor in (tensor for file in files for tensor in _tensors(file)):
        if tensor["dtype"] in numbers:
            numbers[str(tensor["dtype"])] += _numbers(tensor["shape"])
    return _STORED[max(numbers, key=numbers.__getitem__)]
