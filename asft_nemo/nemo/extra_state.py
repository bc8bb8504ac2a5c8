"""Checkpoints across layer kinds: Transformer Engine's modules ask for `_extra_state` entries that others do not write.

The tensors of a checkpoint have the same names with both kinds of layers; these entries differ. Megatron's local linear layers write empty
ones, Transformer Engine's linear layers and norms their own. One too many in a checkpoint is never read. One too few would end the load,
although nothing is lost with it: it holds the scales of delayed FP8 scaling, which start anew, and nothing of any other layer. So requests
for entries that were not written are dropped, and modules without an entry are given None, which both kinds take for nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableMapping
from typing import Any

from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from megatron.core.dist_checkpointing.mapping import ShardedObject
from nemo.lightning.io.pl import ckpt_to_weights_subdir
from torch import nn
from typing_extensions import override

from asft_nemo.checkpoint.dist_metadata import read_metadata

logger = logging.getLogger(__name__)

_SUFFIX = "_extra_state"


class ExtraStateTolerant(_WrappingCheckpointIO):
    """Loads a distributed checkpoint whose `_extra_state` entries are fewer than the model's; every other gap stays an error."""

    @override
    def load_checkpoint(self, path: Any, **given: Any) -> dict[str, Any]:
        """As NeMo's, without the extra states that the checkpoint has not. Collective over all ranks."""
        assert self.checkpoint_io is not None
        asked = given.get("sharded_state_dict")
        if asked is not None:
            written = read_metadata(ckpt_to_weights_subdir(path, is_saving=False)).state_dict_metadata
            absent = [
                (holder, key) for holder, key in _extra_states(asked) if holder[key].unique_key not in written
            ]
            for holder, key in absent:
                del holder[key]
            if absent:
                logger.info("%s: %d modules start without the extra state they ask for", path, len(absent))
        return self.checkpoint_io.load_checkpoint(path, **given)


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
