"""The project's exception family.

Everything a user can mend is a `UserError`: one sentence that says what is wrong and the cure. The command line turns it into that
sentence on stderr and exit code 2; any other exception is our bug and exits with 1 and a traceback.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any


class UserError(Exception):
    """Something the user can mend. The message is one sentence that names the cure."""


class ConfigError(UserError):
    """One or more settings are wrong; all violations are reported together.

    Attributes:
        violations: one sentence per violated rule, in the order of the rules.
    """

    def __init__(self, violations: Sequence[str] | str):
        self.violations: tuple[str, ...] = (violations,) if isinstance(violations, str) else tuple(violations)
        super().__init__("\n".join(self.violations))


class DataError(UserError):
    """A data file, record or field is unusable; the message names file, line and reason."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, or does not fit the model it is loaded into."""


class CacheError(UserError):
    """The reference's hidden-state cache is absent, damaged, of another run, or cannot be written."""


class LayoutError(UserError):
    """A parallel layout does not fit the model, the batch or the machine."""


class ObjectiveError(UserError):
    """An unknown objective, or an option that the objective does not have."""


# What a system says of files and disks that a user can mend, and how.
_CURES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "ask its owner for the right, or choose another place"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, or choose a place on another disk"),
    **dict.fromkeys(
        (errno.EISDIR, errno.ENOTDIR, errno.EEXIST), "move away what is there, or choose another place"
    ),
    errno.EROFS: "choose a place that can be written to",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or choose another file system",
    errno.ELOOP: "mend the link",
    errno.ENAMETOOLONG: "choose a shorter name",
    **dict.fromkeys((errno.EIO, errno.ESTALE), "look after that disk or mount, and try again"),
}


def mendable(error: OSError) -> UserError | None:
    """The sentence for what the system said of a file or disk; None where it is nothing that a user can mend."""
    if error.errno is None and error.args and isinstance(error.args[0], list):
        return _of_copies(error.args[0])
    cure = _CURES.get(error.errno or 0)
    if cure is None:
        return None
    where = f"{error.filename} cannot be used" if error.filename else "a file cannot be written"
    return UserError(f"{where} ({error.strerror}): {cure}")


_LESS_MEMORY = {
    "train": "lower trainer.micro_batch_size or data.sequence_length, set recompute.granularity, or divide the model over more GPUs; asft plan says what fits",
    # neither other lengths, of which the cache would be another one, nor recomputing: nothing is kept for backward
    "cache": "lower reference.micro_batch_size (or trainer.micro_batch_size where it is not set), or divide the model over more GPUs",
    "logits": "divide the model over more GPUs",
}


def full_gpu(error: Exception, *, job: str) -> UserError | None:
    """The sentence for torch's error of a full GPU; None for any other. By its name, so that saying it needs no torch.

    Args:
        error: what ended the job.
        job: ``train``, ``cache``, ``repair`` or ``logits``.
    """
    if type(error).__name__ != "OutOfMemoryError":
        return None
    said = "; ".join(
        " ".join(str(error).split()).split(". ")[:3]
    )  # behind that torch lists processes and settings
    cure = _LESS_MEMORY["cache" if job == "repair" else job]
    return UserError(f"a GPU's memory is too small for this layout ({said}): {cure}")


def _of_copies(failed: list[Any]) -> UserError | None:
    """`shutil.copytree` says what failed as a list of source, target and words."""
    for _, target, words in failed:
        for number, cure in _CURES.items():
            if str(words).startswith(f"[Errno {number}]"):
                return UserError(f"{target} cannot be written ({os.strerror(number)}): {cure}")
    return None
