"""Errors that a user can mend; the command line prints their one line and no traceback."""

from __future__ import annotations


class DataError(ValueError):
    """Text or a tokenizer that cannot be used; the message says which and what to do."""


class CheckpointError(ValueError):
    """A file that is no usable checkpoint."""


class TrainingError(RuntimeError):
    """Training cannot go on, for example because the loss is no longer finite."""
