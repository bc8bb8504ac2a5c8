"""The project's exception family.

Everything a user can mend is a `UserError`: one sentence that says what is wrong and the cure. The command line turns it into that
sentence on stderr and exit code 2; any other exception is our bug and exits with 1 and a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


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
