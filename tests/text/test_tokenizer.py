"""The loader of tokenizers: ids of the text and nothing else, one line of error (faults B2-B5)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models

from bitskip_ref.documents import END_OF_TEXT
from bitskip_text import tokenizer as tokenizer_module
from bitskip_text.tokenizer import Tokenizer, TokenizerError, parse_tokenizer, read_tokenizer
from bitskip_train.tokenizer import make_tokenizer
from tests.text.tokenizers_of_all_kinds import KINDS

TEXT = "the cat sat on the mat, it didn't"


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> str:
    """The tokenizer.json of a kind, changed."""
    stored = json.loads(KINDS[name]().to_str())
    change(stored)
    return json.dumps(stored, ensure_ascii=False)


TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 10**10}, "direction": "Left", "pad_to_multiple_of": None,
    "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>",
}  # fmt: skip
STORED: dict[str, Callable[[dict[str, Any]], object]] = {
    "truncation": lambda t: t.update(truncation=TRUNCATION),
    "padding": lambda t: t.update(padding=PADDING),
    "padding of batches": lambda t: t.update(padding={**PADDING, "strategy": "BatchLongest"}),
    "dropout": lambda t: t["model"].update(dropout=0.5),
}


@pytest.mark.parametrize("setting", STORED)
def test_stored_settings_are_off_and_not_passed_on(setting: str, tmp_path: Path) -> None:
    text = edited("byte-level", STORED[setting])
    plain = Tokenizer(KINDS["byte-level"](), "plain")
    (tmp_path / "t.json").write_text(text, "utf-8")
    for tokenizer in (
        parse_tokenizer(text, "t"),
        read_tokenizer(tmp_path / "t.json", plain.size),
        make_tokenizer(str(tmp_path / "t.json"), []),
    ):
        assert tokenizer.encode(TEXT) == plain.encode(TEXT)
        assert tokenizer.encode_batch([TEXT, "a"]) == [plain.encode(TEXT), plain.encode("a")]
        stored = json.loads(tokenizer.json)
        assert stored["truncation"] is None and stored["padding"] is None
        assert stored["model"]["dropout"] is None
        assert Library.from_str(tokenizer.json).encode(TEXT).ids == plain.encode(TEXT)


def test_a_file_without_such_settings_is_passed_on_as_it_is() -> None:
    text = edited("word-piece", lambda t: None)
    assert parse_tokenizer(text, "t").json == text


@pytest.mark.parametrize("name", KINDS)
def test_special_tokens_in_a_text_are_text_unless_asked(name: str) -> None:
    tokenizer = Tokenizer(KINDS[name](), name)
    end = tokenizer.token_id(END_OF_TEXT)
    text = f"a {END_OF_TEXT} b"
    assert end is not None
    assert end not in tokenizer.encode(text)
    assert end in tokenizer.encode(text, special=True)
    assert end not in tokenizer.encode_batch([text])[0]  # the state of before does not stay
    assert end not in tokenizer.encode(END_OF_TEXT)
    assert tokenizer.encode(END_OF_TEXT, special=True) == [end]


def test_a_special_token_as_text_is_read_back() -> None:
    for name in ("byte-level", "byte-fallback"):
        tokenizer = Tokenizer(KINDS[name](), name)
        assert tokenizer.decode(tokenizer.encode(f"a {END_OF_TEXT} b")) == f"a {END_OF_TEXT} b"


def test_pieces_of_a_model_that_are_special_tokens_are_spelled() -> None:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), *((p, -3.0) for p in ["▁", "a", "<", "s", ">"])]
    library = Library(models.Unigram(pieces, 0, False))
    library.add_special_tokens(["<s>", "<unk>"])
    tokenizer = Tokenizer(library, "t")
    assert [tokenizer.token(i) for i in tokenizer.encode("a<s>a")] == ["a", "<", "s", ">", "a"]
    assert tokenizer.encode("aß") == [3, 0]  # what is unknown stays unknown
    assert tokenizer.encode("a<s>", special=True) == [3, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["model"]["vocab"].update({"far": 1 << 31}), "token id 2147483648"),
        (lambda t: t["model"]["vocab"].update({"far": 320}), "another model"),
        (lambda t: t["model"].update(type="None"), "not a tokenizer"),
        (lambda t: t.update(decoder={"type": "Strip", "content": " ", "start": 0, "stop": 1}),
         "set the step's stop to 0"),
        (lambda t: t.pop("model"), "not a tokenizer"),
    ],
)  # fmt: skip
def test_bad_files_are_refused(change: Callable, words: str) -> None:
    with pytest.raises(TokenizerError, match=words):
        parse_tokenizer(edited("byte-level", change), "t", 320)


@pytest.mark.parametrize(
    "model",
    [
        models.WordPiece({"a": 0}, unk_token="[UNK]"), models.WordLevel({"a": 0}, "[UNK]"),
        models.BPE({"a": 0}, [], unk_token="[UNK]"), models.Unigram([("a", -1.0)], None, False),
    ],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_a_tokenizer_without_its_unknown_token_says_so(model: models.Model) -> None:
    tokenizer = Tokenizer(Library(model), "t.json")
    assert tokenizer.encode("a") == [0]
    with pytest.raises(
        TokenizerError, match=r"t\.json: cannot encode the text .*(?i:unk)"
    ) as found:
        tokenizer.encode("ß")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("text", ["\udce4", 7, None, ["a", "b"], b"a"])
def test_what_is_no_text_is_refused(text: Any) -> None:
    tokenizer = Tokenizer(KINDS["byte-level"](), "t")
    with pytest.raises(ValueError, match=r"valid Unicode|must be a string"):
        tokenizer.encode(text)


def test_a_panic_of_the_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    tokenizer = Tokenizer(KINDS["byte-level"](), "t.json")

    class Panics:
        def decode(self, *_: Any, **__: Any) -> str:
            raise PanicException("index out of bounds\n" + 180 * "stack\n")

    monkeypatch.setattr(tokenizer, "_library", Panics())
    with pytest.raises(TokenizerError, match=r"^t\.json: cannot decode \(index out of bounds\)$"):
        tokenizer.decode([1])


def test_ctrl_c_is_no_panic(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(KINDS["byte-level"](), "t.json")

    class Interrupted:
        def decode(self, *_: Any, **__: Any) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "_library", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.decode([1])


def test_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    (folder / "tokenizer.json").write_text(KINDS["byte-level"]().to_str(), "utf-8")
    assert read_tokenizer(folder / "tokenizer.json").decode([65]) == "a"
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="not a tokenizer"):
        read_tokenizer(folder / "tokenizer.json")


def test_a_tokenizer_with_a_bom(tmp_path: Path) -> None:
    text = KINDS["byte-level"]().to_str()
    (tmp_path / "t.json").write_text("\ufeff" + text, "utf-8")
    assert read_tokenizer(tmp_path / "t.json").json == text
    assert make_tokenizer(str(tmp_path / "t.json"), []).json == text


def test_what_a_panic_prints_is_not_seen() -> None:
    code = (
        "import os\n"
        "from bitskip_text.tokenizer import _panics_unprinted\n"
        "with _panics_unprinted():\n"
        "    os.write(2, b'thread panicked')\n"
        "os.write(2, b'after')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stderr == b"after"


def with_regex(pattern: str) -> str:
    def change(stored: dict[str, Any]) -> None:
        stored["pre_tokenizer"] = {
            "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False,
        }  # fmt: skip

    return edited("words", change)


COMMON = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*$", "(?:a|aa)+$"])
def test_expressions_that_take_for_ever_are_refused(
    pattern: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TokenizerError) as refused:
        parse_tokenizer(with_regex(pattern), "tokenizer.json")
    assert str(refused.value).count("\n") == 0
    assert capfd.readouterr().err == ""


def test_expressions_in_use_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_tokenizer(with_regex(COMMON), "tokenizer.json").encode("the cat")
    monkeypatch.setattr(tokenizer_module, "PATIENCE", -1.0)
    with pytest.raises(TokenizerError, match="regular expressions take"):
        parse_tokenizer(with_regex(COMMON), "tokenizer.json")


def test_an_expression_spelled_in_escapes_is_tried(capfd: pytest.CaptureFixture[str]) -> None:
    hidden = with_regex("(a+)+$").replace('"Regex"', '"R\\u0065gex"')
    assert hidden != with_regex("(a+)+$")
    with pytest.raises(TokenizerError):
        parse_tokenizer(hidden, "tokenizer.json")


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GROWING: dict[str, tuple[str, dict[str, Any]]] = {
    "doubled": ("normalizer", {"type": "Sequence", "normalizers": [DOUBLE] * 40}),
    "nested": (
        "normalizer",
        {
            "type": "Sequence",
            "normalizers": [{"type": "Sequence", "normalizers": [DOUBLE] * 20}] * 2,
        },
    ),
    "everywhere": ("normalizer", {**DOUBLE, "pattern": {"Regex": ""}, "content": "a" * 20_000}),
    "bytes": ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [BYTES] * 40}),
    "decoded": ("decoder", {"type": "Sequence", "decoders": [DOUBLE] * 40}),
}


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("name", GROWING)
def test_steps_that_grow_without_end_are_refused(name: str, early: bool) -> None:
    """early: whether a token is normalized while the library reads the file."""
    part, step = GROWING[name]

    def change(stored: dict[str, Any]) -> None:
        stored[part] = step
        if early:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
            new = {"id": len(stored["model"]["vocab"]), "content": "a\u00e9", "normalized": True}
            stored["added_tokens"] = [new | flags]

    with pytest.raises(TokenizerError, match="characters of one"):
        parse_tokenizer(edited("byte-level", change), "tokenizer.json")
