"""Streamed text is the library's own decode, for any tokenizer and any ids (faults B3)."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from bitskip_text.decoders import Decoder
from bitskip_text.streaming import StreamDecoder
from bitskip_text.tokenizer import Tokenizer
from tests.text.tokenizers_of_all_kinds import BYTES, DECODERS, KINDS, with_decoder

REPLACEMENT = "\ufffd"


def made(name: str) -> Tokenizer:
    """A tokenizer of KINDS or DECODERS."""
    return Tokenizer(KINDS[name]() if name in KINDS else with_decoder(name), name)


def sequences(tokenizer: Tokenizer, count: int, seed: int) -> Iterator[list[int]]:
    """Random ids, some of none, with runs of bytes and repeats as texts have them."""
    draw = random.Random(seed)
    every = range(tokenizer.size + 3)
    some = [i for t in BYTES if (i := tokenizer.token_id(t)) is not None] or every
    characters = ["é", "😀", "本"]
    for _ in range(count):
        ids: list[int] = []
        for _ in range(draw.randrange(12)):
            kind = draw.random()
            if kind < 0.4:
                ids.append(draw.choice(every))
            elif kind < 0.6:
                ids += draw.choices(some, k=draw.randrange(4))
            elif kind < 0.7 and ids:
                ids += ids[-1:] * draw.randrange(3)
            else:
                raw = draw.choice(characters).encode()
                spelled = [tokenizer.token_id(f"<0x{b:02X}>") for b in raw]
                ids += [i for i in spelled if i is not None] or [draw.choice(every)]
        yield ids


def check(tokenizer: Tokenizer, ids: list[int], before: list[int]) -> None:
    """Pieces of a stream after `before` join to the library's text, and none is ever wrong."""
    whole = tokenizer.decode([*before, *ids])
    start = tokenizer.decode(before)
    decoder = StreamDecoder(tokenizer, before)
    pieces = [decoder.feed(i) for i in ids]
    said, rest = "".join(pieces), decoder.finish()
    assert decoder.finish() == ""
    if not before or (tokenizer.decoder.streams and whole.startswith(start)):
        assert said + rest == whole[len(start) :], (before, ids, pieces, rest)


def run(name: str, count: int, seed: int) -> None:
    tokenizer = made(name)
    befores = sequences(tokenizer, count, seed + 1)
    for n, (ids, before) in enumerate(zip(sequences(tokenizer, count, seed), befores, strict=True)):
        check(tokenizer, ids, [])
        if n % 4 == 0 and clean(tokenizer, before):
            check(tokenizer, ids, before)


def clean(tokenizer: Tokenizer, before: list[int]) -> bool:
    """Whether `before` could be a prompt's ids: its last character is whole."""
    shown = [t for i in before if (t := tokenizer.token(i)) is not None]
    return not (shown and shown[-1] in BYTES) and not tokenizer.decode(before).endswith(REPLACEMENT)


@pytest.mark.parametrize("name", [*KINDS, *DECODERS])
def test_pieces_join_to_the_library_s_text(name: str) -> None:
    run(name, 300, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_pieces_join_to_the_library_s_text_100_000_times(name: str) -> None:
    run(name, 100_000, seed=1000)


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_odd_decoders_20_000_times(name: str) -> None:
    run(name, 20_000, seed=2000)


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback", "ends-within", "made-bytes"])
def test_a_decoder_taken_for_a_simple_one_is_seen(name: str) -> None:
    tokenizer = made(name)
    tokenizer.decoder = Decoder()
    with pytest.raises(AssertionError):
        for ids in sequences(tokenizer, 300, seed=0):
            check(tokenizer, ids, [])


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("byte-level", 0), ("byte-fallback", 0), ("metaspace", 0), ("unigram-bytes", 0),
        ("word-piece", 0), ("ends-of-words", 0), ("words", 0), ("made-bytes", 99),
    ],
)  # fmt: skip
def test_text_comes_as_soon_as_it_is_certain(name: str, held: int) -> None:
    tokenizer = made(name)
    decoder, said = StreamDecoder(tokenizer), ""
    ids = tokenizer.encode("the cat sat")
    for n, i in enumerate(ids):
        said += decoder.feed(i)
        assert len(said) >= len(tokenizer.decode(ids[: n + 1])) - held
    assert bool(decoder.finish()) == bool(held)


def test_a_run_of_byte_tokens_comes_when_it_ends() -> None:
    tokenizer = made("byte-fallback")
    ids = [tokenizer.token_id(f"<0x{b:02X}>") for b in "😀é".encode()]
    the = tokenizer.token_id("t")
    assert None not in ids and the is not None
    decoder = StreamDecoder(tokenizer)
    assert [decoder.feed(i) for i in [*ids, the] if i is not None] == [*[""] * 6, "😀ét"]
    decoder = StreamDecoder(tokenizer)  # one more byte makes the whole run no text
    said = [decoder.feed(i) for i in [*ids, ids[0], the] if i is not None]
    assert "".join(said) == "\ufffd" * 7 + "t"


def test_a_stream_after_a_prompt_keeps_its_first_space() -> None:
    tokenizer = made("metaspace")
    ids = tokenizer.encode("the cat sat")
    cut = next(n for n in range(1, len(ids)) if tokenizer.decode(ids[:n]) == "the")
    decoder = StreamDecoder(tokenizer, before=ids[:cut])
    assert "".join(map(decoder.feed, ids[cut:])) == " cat sat"
