"""A short name for base weights: the same for every import of the same model, another for another model."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from asft_nemo.checkpoint.dist_read import DistReader

_WHOLE_ROWS_BYTES = 1 << 16
_SAMPLES = 8


def weights_fingerprint(weights_dir: str | Path) -> str:
    """SHA-256 (hex) over names, shapes and dtypes of all tensors of a torch distributed checkpoint, and over sampled values.

    Of each layer of each tensor, one of at most 64 KiB counts whole; of a larger one, eight evenly spaced rows do, the first and the
    last among them. How the tensors lie in files does not count, so two imports of a model have one name, whatever the layout.

    It tells models apart, a base from its fine-tuned or quantized versions among them, for these differ everywhere. It does not see a
    change confined to rows in between: it is no protection against damage. It reads about 10 MB of a 7B and 50 MB of a 72B model.
    """
    total = hashlib.sha256()
    with DistReader(weights_dir) as reader:
        for key in sorted(key for key in reader.tensors if "_extra_state" not in key):
            size = tuple(reader.tensors[key].size)
            total.update(f"{key} {size} {reader.dtype(key)}\n".encode())
            stacked = ".layers." in key
            rows_shape = size[1:] if stacked else size
            for layer in range(size[0]) if stacked else (None,):
                for start, rows in _sampled(rows_shape, reader.dtype(key).itemsize):
                    part = torch.empty(rows, *rows_shape[1:], dtype=reader.dtype(key))
                    reader.read_rows(key, layer, start, part)
                    total.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _sampled(shape: tuple[int, ...], itemsize: int) -> list[tuple[int, int]]:
    """(first row, rows) of what is read of a tensor."""
    elements = 1
    for dim in shape:
        elements *= dim
    if elements * itemsize <= _WHOLE_ROWS_BYTES or shape[0] <= _SAMPLES:
        return [(0, shape[0])]
    return [(round(place * (shape[0] - 1) / (_SAMPLES - 1)), 1) for place in range(_SAMPLES)]
