"""What a tokenizer's decoder lets one say of a text before all its tokens are there.

The library's decoders are steps from tokens to strings. Most give each token its text whatever
follows; the others change what was decoded before when more tokens come. `decoder_of` tells them
apart. Of steps that are not known here nothing is certain before the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

INCOMPLETE = "\ufffd"  # what the library writes for bytes that are not, or not yet, a character

TOKENWISE = ("Replace", "Metaspace", "WordPiece", "Strip")
"""Steps whose text of a token depends on it, and on whether it is the first one."""


@dataclass(frozen=True)
class Decoder:
    """When text is certain: whatever tokens come, the whole text starts with it."""

    streams: bool = True  # False: not before the end
    bytes_join: bool = False  # tokens `<0x..>` one after the other are a text only together
    utf8: bool = False  # the last character may lack bytes; it is a U+FFFD so far
    last_differs: bool = False  # a token has another text if no other follows

    def joins(self, token: str) -> bool:
        """Whether the text of a token may depend on the next one."""
        return self.bytes_join and "<" in token and ">" in token


def decoder_of(stored: dict[str, Any] | None) -> Decoder:
    """`stored`: the decoder of a tokenizer.json; None joins tokens with spaces.

    Raises ValueError for a decoder that the library cannot run.
    """
    steps = list(_flat(stored)) if stored is not None else []
    for step in steps:
        if step["type"] == "Strip" and step["stop"]:
            raise ValueError(
                f"its decoder strips {step['stop']} characters off the end of tokens, and the "
                "tokenizers library breaks at one that has fewer: set the step's stop to 0"
            )
    kinds = [step["type"] for step in steps]
    if "BPEDecoder" in kinds:
        return Decoder(last_differs=True, streams=set(kinds[1:]) <= {"Fuse"} and len(kinds) <= 2)
    fusing = next((i for i, kind in enumerate(kinds) if kind in ("Fuse", "ByteLevel")), len(kinds))
    neighbours = [i for i, kind in enumerate(kinds[:fusing]) if kind in ("ByteFallback", "CTC")]
    early = steps[: neighbours[0]] if neighbours else []
    streams = (
        len(neighbours) <= 1
        and all(kind in TOKENWISE for i, kind in enumerate(kinds[:fusing]) if i not in neighbours)
        # Tokens that `joins` does not see must not become `<0x..>` on the way.
        and not any("<" in step.get("content", "") for step in early)
        and all(map(_prefixes_stay, steps[fusing + 1 :]))
    )
    return Decoder(streams, "ByteFallback" in kinds, "ByteLevel" in kinds)


def _flat(stored: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if stored["type"] != "Sequence":
        yield stored
        return
    for part in stored["decoders"]:
        yield from _flat(part)


def _prefixes_stay(step: dict[str, Any]) -> bool:
    """Whether a step on the whole text makes of a longer text a longer one, the start unchanged."""
    if INCOMPLETE in json.dumps(step, ensure_ascii=False):
        return False  # it would hide that bytes are missing
    if step["type"] == "Replace":
        return len(step["pattern"].get("String", "")) == 1
    return step["type"] in ("Fuse", "Strip", "Metaspace")
