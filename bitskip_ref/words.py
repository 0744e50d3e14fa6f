"""What is said of a word that is none of those known: with the likeliest one meant."""

from __future__ import annotations

from collections.abc import Iterable

MANY = 20  # words; of more than these, none is listed beside the one that was meant


def unknown(kind: str, word: str, known: Iterable[str]) -> str:
    """A line that names the word, the closest known one, and all known ones.

    kind: what the word should name, for example "preset".
    """
    import difflib  # not for those who make no mistakes

    words = list(known)
    folded = {w.casefold(): w for w in reversed(words)}
    close = difflib.get_close_matches(word.casefold(), folded, 1)
    meant = f" (did you mean {folded[close[0]]}?)" if close else ""
    if close and len(words) > MANY:
        return f"unknown {kind} {word!r}{meant}"
    return f"unknown {kind} {word!r}{meant}; known: {', '.join(words) or 'none'}"
