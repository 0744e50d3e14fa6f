"""Streaming of text: split characters, stop strings, what a generation reports."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bitskip_cpu
from bitskip_cpu.model import Model
from bitskip_ref.folder import Folder
from bitskip_ref.tensors import FormatError
from bitskip_text.streaming import StopStrings, StreamDecoder
from bitskip_text.tokenizer import Tokenizer, read_tokenizer
from tests.cli.conftest import CONFIG, ScriptEngine, byte_level_bpe


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(byte_level_bpe(), "utf-8")
    return read_tokenizer(path, CONFIG.vocab_size)


@pytest.fixture
def say(tokenizer: Tokenizer, tmp_path: Path):
    """A model that says the given text, or token ids, and then end-of-text."""
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_level_bpe(), "utf-8")

    def make(script: str | list[int], depths: list[int] | None = None, **numbers) -> Model:
        ids = tokenizer.encode(script) if isinstance(script, str) else script
        folder = Folder(tmp_path, CONFIG, {}, path, **{"eos_token_id": 0, **numbers})
        return Model(ScriptEngine(CONFIG, [*ids, 0], depths), folder)

    return make


# ---- decoding -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["naïve café", "😀👩‍👩‍👧 🇩🇪!", "日本語のテキスト", "a\n\nb  c", ""]
)
def test_pieces_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.feed(i) for i in ids]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert decoder.finish() == ""


def test_a_character_over_four_tokens_comes_at_once(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("𝄞")  # not in the corpus: four byte tokens
    assert len(ids) == 4
    decoder = StreamDecoder(tokenizer)
    assert [decoder.feed(i) for i in ids] == ["", "", "", "𝄞"]


def test_an_unfinished_character_is_given_at_the_end(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.encode("a𝄞")[:-1]
    assert "".join(decoder.feed(i) for i in ids) == "a"
    assert decoder.finish() == "\ufffd" == tokenizer.decode(ids)[1:]
    assert decoder.finish() == ""


@given(st.lists(st.integers(1, 299), max_size=30))
def test_any_tokens_stream_as_they_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.feed(i) for i in ids]
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(ids)


def test_special_tokens_give_no_text(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer)
    ids = [*tokenizer.encode("a"), 0, *tokenizer.encode("b")]
    assert "".join(decoder.feed(i) for i in ids) == "ab"


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_level_bpe(), "utf-8")
    with pytest.raises(FormatError, match="belongs to another model"):
        read_tokenizer(path, 100)
    path.write_text("{}", "utf-8")
    with pytest.raises(FormatError, match="not a tokenizer"):
        read_tokenizer(path, 100)


# ---- stop strings -------------------------------------------------------------------


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_the_first_one_is_complete(text: str, stops: list[str]) -> None:
    # Fed letter by letter, the text ends before the stop string that is complete first.
    ends = [text.find(s) + len(s) for s in stops if s in text]
    expected = text
    if ends:
        seen = text[: min(ends)]
        expected = seen[: min(seen.find(s) for s in stops if s in seen)]
    stop, out = StopStrings(stops), ""
    for letter in text:
        out += stop.feed(letter)
        if stop.found:
            break
    assert stop.found == bool(ends)
    assert out + stop.finish() == expected


def test_a_stop_string_of_millions_costs_what_is_held() -> None:
    """A loop over all of its beginnings would take hours at every token."""
    stop = StopStrings("ab" * 3_000_000)
    assert stop.feed("xaba") == "x" and stop.feed("c") == "abac" and stop.finish() == ""


def test_a_possible_stop_is_held_back() -> None:
    stop = StopStrings(["\n\nThe"])
    assert stop.feed("one\n\n") == "one"
    assert stop.feed("Two") == "\n\nTwo"
    assert stop.feed("\n\nTheir") == ""
    assert stop.found


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty stop string"):
        StopStrings(["a", ""])


# ---- generation ---------------------------------------------------------------------


def test_a_generation_reports_what_happened(say) -> None:
    model = say("the cat", depths=[3, 2, 1, 3, 3, 3, 3])
    g = model.generate("Once", exit_layer="max")
    assert g.text == "the cat"
    assert g.stop_reason == "end_of_text"
    assert g.token_ids == model.engine.script[:-1]
    # The first token's logits are the prompt's, of full depth (SPEC 8.7).
    assert g.exit_layers == [4, 3, 2, 1, 3][: len(g.token_ids)]
    assert g.prompt_tokens == len(model.tokenizer.encode("Once")) == len(model.engine.prompt)
    assert g.ttft_s is not None and g.ttft_s > 0 and g.prefill_tokens_per_s > 0
    assert g.decode_tokens_per_s > 0
    assert g.mean_exit_layer == np.mean(g.exit_layers)


def test_reasons_to_stop(say) -> None:
    ids = say("x").tokenizer.encode("a b c d e f g")
    model = say(ids)
    assert model.generate("a", max_tokens=3).stop_reason == "max_tokens"
    assert model.generate("a", max_tokens=0).text == ""
    stopped = say(ids).generate("a", stop=["c"])
    assert (stopped.text, stopped.stop_reason) == ("a b ", "stop_string")
    full = say(ids).generate("a", context=4)
    assert full.stop_reason == "context"
    assert len(full.token_ids) == 4  # 1 + 3 positions, and a last token that needs none


def test_streamed_pieces_are_the_text(say) -> None:
    text = "the 𝄞 cat 😀"
    model = say(text)
    pieces = list(model.stream("Once"))
    assert "".join(p.text for p in pieces) == text == model.generate("Once").text
    ids = [p.token_id for p in pieces if p.token_id is not None]
    assert ids == model.generate("Once").token_ids
    assert all(p.exit_layer is not None for p in pieces if p.token_id is not None)


def test_text_held_back_for_a_stop_string_comes_at_the_end(say) -> None:
    pieces = list(say("the cat").stream("Once", stop=["cat sat"]))
    assert "".join(p.text for p in pieces) == "the cat"
    assert pieces[-1].token_id is None and pieces[-1].text == "cat"


def test_a_stream_that_is_broken_off_keeps_what_was_said(say) -> None:
    stream = say("the 𝄞 cat").stream("Once", stop=["he!"])
    said = "".join(p.text for p in itertools.islice(stream, 2))
    said += stream.finish().text
    g = stream.generation()
    assert g.stop_reason == "interrupted"
    assert g.text == said
    assert len(g.token_ids) == len(g.exit_layers) == 2


def test_begin_token_and_recommended_exit_are_used(say) -> None:
    model = say("the", bos_token_id=7, exit_layer=2)
    g = model.generate("Once")
    assert model.engine.prompt[0] == 7
    assert g.prompt_tokens == 1 + len(model.tokenizer.encode("Once"))
    assert g.exit_layers[0] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "a b c d e f g h" * 20}, "context holds 64"),
        ({"prompt": "a b c", "context": 1}, "context holds 1"),
        ({"prompt": "\udce4"}, "not valid Unicode"),
        ({"context": 65}, "choose 1..64"),
        ({"context": 0}, "choose 1..64"),
        ({"exit_layer": 0}, "choose 1..4"),
        ({"exit_layer": 5}, "choose 1..4"),
        ({"exit_layer": "never"}, "gate, max, margin"),
        ({"exit_layer": 2, "exit_threshold": 0.5}, "threshold"),
        ({"exit_layer": "max", "exit_threshold": 1.5}, "between 0 and 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top-p"),
        ({"seed": -1}, "seed"),
        ({"max_tokens": -1}, "max tokens"),
        ({"stop": [""]}, "empty stop string"),
    ],
)
def test_bad_options_are_refused_with_the_rule(say, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        say("the").generate(**{"prompt": "a", **options})


def test_threads_belong_to_the_model(folder: Path) -> None:
    models = [bitskip_cpu.load(folder, threads=n) for n in (1, 2)]
    assert [m.threads for m in models] == [1, 2]
    alone, shared = (m.generate("Once", max_tokens=6).token_ids for m in models)
    assert alone == shared
    with pytest.raises(TypeError, match="threads"):
        models[0].generate("Once", threads=2)
    with pytest.raises(ValueError, match="at least 1"):
        bitskip_cpu.load(folder, threads=0)


def test_a_folder_without_tokenizer_says_so(tmp_path: Path) -> None:
    model = Model(ScriptEngine(CONFIG, [1]), Folder(tmp_path, CONFIG, {}, None))
    with pytest.raises(ValueError, match=r"lacks tokenizer\.json"):
        model.generate("a")
    assert model.logits([1, 2]).shape == (2, CONFIG.vocab_size)
