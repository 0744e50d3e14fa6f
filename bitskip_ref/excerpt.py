"""Values out of files, as a part of one line of an error."""

from __future__ import annotations

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxdict = 4


def shown(value: object) -> str:
    """`repr` of any value that JSON or TOML can hold, in a few words however large it is."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # a number of more digits than Python writes
        return "a very large number"


def one_line(error: BaseException) -> str:
    """What an error of a library says, as a part of a line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
