"""What the ranks do for the tests of checkpoints across layer kinds."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def like_transformer_engine(received: list[Any], *, gain: bool) -> Iterator[None]:
    """Megatron's local layers write and ask for extra states where Transformer Engine's do, in the form of its versions from 2.0 on.

    A byte tensor with a pickle in it, of every linear layer, of attention and of the final norm, not of the head, which is Megatron's own
    with both kinds of layers (`get_extra_state` in transformer_engine/pytorch/module/base.py). Attention and norm have no hook that fills
    a missing entry in, so that a strict load misses it, as it does with Transformer Engine's modules.

    Args:
        received: gets what modules are given when a checkpoint is loaded.
        gain: the final norm has one parameter more, which no checkpoint holds.
    """
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from asft_nemo.cpu.norm import RMSNorm
    from asft_nemo.nemo import layer_spec
    from asft_nemo.nemo.head import LossHead

    class FinalNorm(RMSNorm):
        def __init__(self, config: Any, hidden_size: int, **given: Any):
            super().__init__(config, hidden_size, **given)
            if gain:
                self.gain = nn.Parameter(torch.ones(()))

    def get(self: nn.Module) -> torch.Tensor:
        state = {"extra_fp8_variables": {"num_gemms": 1}, "recipe": type(self).__name__}
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

    with contextlib.ExitStack() as undo:

        def put(holder: Any, name: str, value: Any) -> None:
            own = vars(holder).get(name)
            undo.callback(setattr, holder, name, own) if own is not None else undo.callback(
                delattr, holder, name
            )
            setattr(holder, name, value)

        for kind in (ColumnParallelLinear, RowParallelLinear, DotProductAttention, FinalNorm):
            put(kind, "get_extra_state", get)
            put(kind, "set_extra_state", lambda self, state: received.append(state))
        put(LossHead, "get_extra_state", lambda self: None)
        submodules = layer_spec.TransformerBlockSubmodules
        put(
            layer_spec,
            "TransformerBlockSubmodules",
            lambda **given: submodules(**{**given, "layer_norm": FinalNorm}),
        )
        yield


def train(settings: dict[str, Any], *, valid: list[int], like: str, gain: bool = False) -> dict[str, Any]:
    """A run with one kind of layers; what its modules received as extra states while checkpoints were loaded, or why it ended.

    Args:
        like: `local` or `transformer_engine`.
    """
    from jobs import fit

    received: list[Any] = []
    layers = like_transformer_engine(received, gain=gain) if like != "local" else contextlib.nullcontext()
    error = ""
    with layers:
        try:
            fit(settings, valid=valid)
        except Exception as raised:
            if not gain:
                raise
            error = str(raised)
    return {
        "none": sum(state is None for state in received),
        "given": sum(state is not None for state in received),
        "error": error,
    }


class RunsCode:
    """What makes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def objects_of_a_stranger(folder: str, *, trusts: bool, guarded: bool, name: str) -> dict[str, Any]:
    """Writes a checkpoint whose one object `name` runs code, reads it, and says what came of it.

    Args:
        trusts: what the strategy says of the checkpoint.
        guarded: through this project's reader, or through Megatron's alone.
    """
    from types import SimpleNamespace

    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    import asft_nemo.nemo  # noqa: F401  (the CPU backend)
    from asft_nemo.errors import CheckpointError
    from asft_nemo.nemo.extra_state import ExtraStateTolerant

    rank, made = torch.distributed.get_rank(), Path(folder) / "made_by_the_object"
    weights = Path(folder) / "weights"

    def state(value: Any) -> dict[str, Any]:
        tensor = torch.full((2,), 7.0 if value is not None else 0.0)
        return {
            "tensor": ShardedTensor.from_rank_offsets("tensor", tensor, replica_id=rank),
            name: ShardedObject(name, value, (1,), (0,), replica_id=rank),
        }

    def read(path: Any, sharded_state_dict: Any) -> Any:
        return dist_checkpointing.load(sharded_state_dict, str(Path(path) / "weights"))

    weights.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state(RunsCode(made)), str(weights))
    io: Any = SimpleNamespace(load_checkpoint=read)
    reader = ExtraStateTolerant(io, lambda: trusts) if guarded else io
    error, loaded = "", {}
    try:
        loaded = reader.load_checkpoint(folder, sharded_state_dict=state(None))
    except CheckpointError as raised:
        error = str(raised)
    torch.distributed.barrier()
    return {"error": error, "loaded": sorted(loaded), "ran": made.exists()}
