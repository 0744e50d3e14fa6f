"""Tokenizers: GPT-2's, one from a file, or a byte-level BPE trained on the spot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from bitskip_ref.documents import END_OF_TEXT, read_text
from bitskip_ref.excerpt import one_line
from bitskip_text import tokenizer as loader
from bitskip_text.tokenizer import Tokenizer, TokenizerError
from bitskip_train.errors import DataError


def make_tokenizer(spec: str, documents: Iterable[str]) -> Tokenizer:
    """The tokenizer that a specification names. It always knows `<|endoftext|>`.

    spec: `gpt2` (from the Hugging Face hub), a folder that holds vocab.json and merges.txt, the
    path of a tokenizer.json, or `bpe:SIZE`, trained on `documents`. Raises DataError.
    """
    if spec.startswith("bpe:"):
        tokenizer = Tokenizer(_train_bpe(spec, documents), spec)
    elif Path(spec).is_dir():
        tokenizer = Tokenizer(_byte_level(_bpe_folder(Path(spec))), spec)
    elif Path(spec).is_file():
        tokenizer = parse_tokenizer(_text_of(Path(spec)), spec)
    elif spec == "gpt2":
        try:
            tokenizer = Tokenizer(Library.from_pretrained("gpt2"), spec)
        except Exception as error:  # the hub raises many types, for network and for file trouble
            raise DataError(
                f"tokenizer 'gpt2': not available from the hub ({one_line(error)}); give "
                "a folder with its vocab.json and merges.txt: --set train.tokenizer=FOLDER"
            ) from None
    else:
        raise DataError(
            f"tokenizer {spec!r}: no such file; use gpt2, bpe:SIZE, a tokenizer.json, or a folder "
            "with vocab.json and merges.txt"
        )
    if tokenizer.token_id(END_OF_TEXT) is None:
        raise DataError(f"tokenizer {spec!r}: has no token {END_OF_TEXT}, which ends documents")
    return tokenizer


def parse_tokenizer(text: str, source: str) -> Tokenizer:
    """A tokenizer from the text of its tokenizer.json. Raises DataError naming the source."""
    try:
        return loader.parse_tokenizer(text, source)
    except TokenizerError as error:
        raise DataError(str(error)) from None


def _text_of(path: Path) -> str:
    try:
        return read_text(path)
    except ValueError as error:
        raise DataError(str(error)) from None


def _train_bpe(spec: str, documents: Iterable[str]) -> Library:
    size = spec.removeprefix("bpe:")
    if not size.isdecimal() or not 257 <= int(size) <= 1 << 20:
        raise DataError(f"tokenizer {spec!r}: the size must be a number from 257 (256 bytes + end)")
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=int(size),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _bpe_folder(folder: Path) -> models.BPE:
    try:
        return models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises plain Exception
        raise DataError(
            f"{folder}: needs GPT-2's vocab.json and merges.txt ({one_line(error)})"
        ) from None


def _byte_level(model: models.BPE) -> Library:
    """GPT-2's way of splitting text, around a BPE model."""
    tokenizer = Library(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer
