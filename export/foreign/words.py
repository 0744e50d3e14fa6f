"""What a `tokenizer.json` says beside its vocabulary."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

from bitskip_export.foreign.source import RefusedError
from bitskip_text.tokenizer import parse_tokenizer

MOST_ADDED = 16  # ids that a template may put around a text


def _ids(processor: Any) -> int:
    """How many ids the templates of a post-processor name for one text."""
    if not isinstance(processor, dict):
        return 0
    named = processor.get("special_tokens") or {}
    words = [
        piece["SpecialToken"]["id"]
        for piece in processor.get("single") or ()
        if "SpecialToken" in piece
    ]
    return sum(len(named[word]["ids"]) for word in words) + sum(
        map(_ids, processor.get("processors") or ())
    )


def with_first(tokenizer_json: str, place: str, first: int | None) -> str:
    """The same tokenizer, putting `first`, or nothing, before every text.

    Raises RefusedError where no token has that id.
    """
    try:
        if added_first(tokenizer_json, place) == first:
            return tokenizer_json
    except RefusedError:
        pass  # it adds more than that
    stored = json.loads(tokenizer_json)
    stored["post_processor"] = None
    if first is not None:
        words = {i: w for w, i in parse_tokenizer(tokenizer_json, place).vocabulary().items()}
        if first not in words:
            raise RefusedError(f"{place}: has no token of id {first}, which every text begins with")
        word, text = words[first], {"Sequence": {"id": "A", "type_id": 0}}
        begin = {"SpecialToken": {"id": word, "type_id": 0}}
        stored["post_processor"] = {
            "type": "TemplateProcessing", "single": [begin, text],
            "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {word: {"id": word, "ids": [first], "tokens": [word]}},
        }  # fmt: skip
    return json.dumps(stored, ensure_ascii=False)


def added_first(tokenizer_json: str, place: str) -> int | None:
    """The id that the tokenizer puts before every text; None if it adds nothing.

    Raises RefusedError where it adds more than that, which no setting of a folder could say.
    """
    parse_tokenizer(tokenizer_json, place)  # with its errors
    many = _ids(json.loads(tokenizer_json).get("post_processor"))
    if many > MOST_ADDED:
        raise RefusedError(f"{place}: adds {many} ids to a text: only one first id is known")
    tokenizer = Tokenizer.from_str(tokenizer_json)
    plain, added = (tokenizer.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    if plain == added:
        return None
    if added[1:] != plain:
        raise RefusedError(f"{place}: adds {added} around {plain}: only one first id is known")
    return int(added[0])
