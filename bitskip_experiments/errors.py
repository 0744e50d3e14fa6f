"""The error of this package that a user can mend; the command prints its one line."""

from __future__ import annotations


class ExperimentError(ValueError):
    """A definition, a run or a result that cannot be used; the message says what to do."""
