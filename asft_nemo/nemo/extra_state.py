"""What a checkpoint holds beside tensors: the `_extra_state` entries of layers, and other objects. All of them are pickles.

The tensors of a checkpoint have the same names with both kinds of layers; `_extra_state` entries differ. Megatron's local linear layers
write empty ones, Transformer Engine's linear layers and norms their own: the scales of delayed FP8 scaling, and nothing that matters
otherwise. Transformer Engine runs the pickle that it is given (`set_extra_state`, `pickle.loads`). So these entries are asked for in one
case alone, where a run in `fp8_delayed` goes on from its own checkpoint; elsewhere nobody reads them, and modules are given None, which both
kinds of layers take for nothing. Where they are asked for and were not written, scales start anew.

Objects that are asked for (an optimizer's parameter groups, these scales) torch would unpickle, whatever they name: they are looked at by
its unpickler for weights first, which makes nothing but plain values and tensors.
"""

from __future__ import annotations

import contextlib
import io
import logging
import pickle  # nosec B403 # for the name of an error
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from megatron.core.dist_checkpointing.mapping import ShardedObject
from nemo.lightning.io.pl import ckpt_to_weights_subdir
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from typing_extensions import override

from asft_nemo.checkpoint.dist_metadata import read_metadata
from asft_nemo.checkpoint.dist_read import check_before_load
from asft_nemo.errors import CheckpointError
from asft_nemo.hang_watch import at

logger = logging.getLogger(__name__)

_SUFFIX = "_extra_state"


class ExtraStateTolerant(_WrappingCheckpointIO):
    """Loads a distributed checkpoint whatever `_extra_state` entries it has; every other gap stays an error.

    Args:
        checkpoint_io: NeMo's.
        trusts: whether the checkpoint that is about to be loaded is this run's own, and its layers need what they wrote there.
    """

    def __init__(self, checkpoint_io: Any, trusts: Callable[[], bool]):
        super().__init__(checkpoint_io)
        self.trusts = trusts

    @override
    def load_checkpoint(self, path: Any, **given: Any) -> dict[str, Any]:
        """As NeMo's, without the extra states that are not trusted or were not written. Collective over all ranks.

        Raises:
            CheckpointError: an object in it is more than plain values, or a file is not as it was written.
        """
        assert self.checkpoint_io is not None
        weights = Path(ckpt_to_weights_subdir(path, is_saving=False))
        at("reading a checkpoint", may_take_long=True)
        check_before_load(weights, torch.distributed.get_rank(), torch.distributed.get_world_size())
        asked = given.get("sharded_state_dict")
        if asked is not None:
            trusted = self.trusts()
            written = read_metadata(weights).state_dict_metadata
            entries = list(_extra_states(asked))
            absent = 0
            for holder, key in entries:
                there = holder[key].unique_key in written
                absent += not there
                if not (there and trusted):
                    del holder[key]
            if trusted and absent:
                logger.info("%s: %d modules start without the extra state they ask for", path, absent)
        with objects_looked_at():
            return self.checkpoint_io.load_checkpoint(path, **given)


@contextlib.contextmanager
def objects_looked_at() -> Iterator[None]:
    """Lets torch's unpickler for weights look at each object of a distributed checkpoint before torch unpickles it.

    `DefaultLoadPlanner.load_bytes` (torch 2.13) says `weights_only=False`.
    """
    read = DefaultLoadPlanner.load_bytes

    def load_bytes(self: DefaultLoadPlanner, item: Any, value: io.BytesIO) -> None:
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{item.dest_index.fqn} of the checkpoint is more than plain values, and reading it would run code: do not use this checkpoint"
            ) from error
        value.seek(0)
        read(self, item, value)

    with mock.patch.object(DefaultLoadPlanner, "load_bytes", load_bytes):
        try:
            yield
        except CheckpointException as error:  # torch's, of all ranks, and no Exception
            ours = [failed for failed, _ in error.failures.values() if isinstance(failed, CheckpointError)]
            if not ours:
                raise
            raise ours[0] from error


def _extra_states(asked: dict[Any, Any]) -> Iterator[tuple[dict[Any, Any], Any]]:
    """The extra states that are asked for in nested dicts, each as (dict, key)."""
    for key, value in asked.items():
        if isinstance(value, dict):
            yield from _extra_states(value)
        elif isinstance(value, ShardedObject) and value.key.endswith(_SUFFIX):
            yield asked, key


def fill_extra_states(chunk: nn.Module, state: MutableMapping[str, Any]) -> None:
    """Gives None to every module of a chunk whose extra state a loaded checkpoint has not.

    Args:
        chunk: a chunk of MegatronParallel, in its wrappers.
        state: the chunk's part of a loaded checkpoint; NeMo evens out by how many `module.` its names begin.
    """
    there = {_bare(name) for name in state}
    for name in chunk.state_dict(keep_vars=True):
        if name.endswith(_SUFFIX) and _bare(name) not in there:
            state[name] = None


def _bare(name: str) -> str:
    """A name without the wrappers' `module.` before it."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name
