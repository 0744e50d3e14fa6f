"""What a `tokenizer.json` says beside its vocabulary."""

from __future__ import annotations

from tokenizers import Tokenizer

from bitskip_export.foreign.source import RefusedError
from bitskip_text.tokenizer import parse_tokenizer


def added_first(tokenizer_json: str, place: str) -> int | None:
    """The id that the tokenizer puts before every text; None if it adds nothing.

    Raises RefusedError where it adds more than that, which no setting of a folder could say.
    """
    parse_tokenizer(tokenizer_json, place)  # with its errors
    tokenizer = Tokenizer.from_str(tokenizer_json)
    plain, added = (tokenizer.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    if plain == added:
        return None
    if added[1:] != plain:
        raise RefusedError(f"{place}: adds {added} around {plain}: only one first id is known")
    return int(added[0])
