"""A Hugging Face folder as a `Source`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bitskip_export.foreign.hf_config import OURS, Quantization, read_config
from bitskip_export.foreign.hf_names import ours
from bitskip_export.foreign.safetensors_shards import Stored, open_shards, read_json
from bitskip_export.foreign.source import (
    RefusedError,
    Report,
    Source,
    Ternary,
    Weight,
    lossless_head,
    pieces,
)
from bitskip_export.foreign.words import added_first
from bitskip_ref.config import ModelConfig
from bitskip_ref.folder import (
    CHAT,
    CONFIG,
    GENERATION,
    TOKENIZER,
    ChatForm,
    recommended_sampling,
)
from bitskip_ref.tensors import parameter_shapes
from bitskip_text.tokenizer import parse_tokenizer

PACKED = 4  # rows in a byte of transformers' 2-bit matrices
TOP_K = 50  # transformers', of a generation_config that names none
IGNORED = ("rotary_emb.inv_freq",)  # tables that old checkpoints carry


def read_huggingface(root: Path) -> Source:
    """Open a folder of config.json, safetensors and tokenizer.json; weights are read later.

    Raises RefusedError: for what is damaged, and for what bitskip could only run wrongly.
    """
    raw = read_json(root / CONFIG)
    stored = open_shards(root)
    named: dict[str, Stored] = {}
    scales: dict[str, Stored] = {}
    for name, tensor in stored.items():
        if name.endswith(IGNORED):
            continue
        if name.endswith(".weight_scale"):
            scales[name.removesuffix("_scale")] = tensor
        elif (mine := ours(name)) is not None:
            if mine in named:
                raise RefusedError(f"{root}: {name} and {named[mine].name} are the same tensor")
            named[mine] = tensor
        else:
            raise RefusedError(f"{root}: tensor {name}{meaning(name)}")
    sub_norm = any(name.endswith("_sub_norm.weight") for name in named)
    config, quantization = read_config(raw, sub_norm)
    dropped = []
    if config.tie_word_embeddings and (head := named.pop("lm_head.weight", None)) is not None:
        if not _same(head, named.get("embed_tokens.weight")):
            raise RefusedError(
                f"{root}: tie_word_embeddings is true, but lm_head.weight is another matrix than "
                "the embedding: remove one of the two"
            )
        dropped.append("lm_head.weight: the configuration ties the head to the embedding")
    if config.num_hidden_layers > len(named):  # before a table of them is made
        raise RefusedError(
            f"{root} lacks tensors: config.json tells of {config.num_hidden_layers} blocks"
        )
    shapes = parameter_shapes(config)
    if missing := shapes.keys() - named.keys():
        raise RefusedError(f"{root} lacks tensor {min(missing)} ({len(missing)} in all)")
    if extra := named.keys() - shapes.keys():
        name = named[min(extra)].name
        hint = " (biases there are not known)" if name.endswith(".bias") else ""
        raise RefusedError(
            f"{root}: tensor {name} has no place in what config.json describes{hint}"
        )
    weights: dict[str, Weight] = {}
    for name, shape in shapes.items():
        scale = scales.pop(named[name].name, None)
        if name.endswith("_proj.weight") and quantization:
            weights[name] = _linear(named[name], scale, shape, quantization)
        elif scale is not None:
            raise RefusedError(f"{scale.file}: {scale.name} scales a tensor that is not ternary")
        else:
            _check_shape(named[name], shape)
            weights[name] = named[name].floats()
    if config.head_format == "float32":
        config = config.replace(head_format=lossless_head(weights))
    if scales:
        raise RefusedError(f"{root}: {min(scales)}_scale scales a tensor that is not there")
    own = raw.get(OURS) if isinstance(raw.get(OURS), dict) else {}
    tokenizer = _tokenizer(root) if (root / TOKENIZER).is_file() else None
    generation = read_json(root / GENERATION) if (root / GENERATION).is_file() else {}
    return Source(
        origin=f"Hugging Face folder {root}",
        config=config,
        weights=weights,
        tokenizer_json=tokenizer,
        eos_token_ids=_end_ids(generation, raw, config),
        bos_token_id=_bos(root, tokenizer, raw, config),
        exit_layer=_number(own, "exit_layer", config.num_hidden_layers),
        draft_vocab=_number(own, "draft_vocab", config.vocab_size),
        chat=_chat(root),
        sampling=_sampling(root, generation),
        report=Report(dropped=tuple(dropped)),
    )


def meaning(name: str) -> str:
    """What a tensor without a place says about its model."""
    for part, what in (
        (".rms_norm", "the model needs a norm inside each linear"),
        (".bias", "the model needs biases"),
        (".experts", "the model needs experts"),
        ("lora_", "an adapter, not a model: merge it first"),
    ):
        if part in name:
            return f": {what}, which bitskip cannot run"
    return " is in no model that bitskip knows"


def _same(one: Stored, other: Stored | None) -> bool:
    """Whether two matrices hold the same numbers."""
    if other is None or one.shape != other.shape or not one.shape:
        return False
    a, b = one.floats(), other.floats()
    return all(np.array_equal(a.rows(*p), b.rows(*p)) for p in pieces(one.shape))


def _check_shape(tensor: Stored, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise RefusedError(
            f"{tensor.file}: {tensor.name} is {list(tensor.shape)}, "
            f"config.json asks for {list(shape)}"
        )


def _linear(
    tensor: Stored, scale: Stored | None, shape: tuple[int, ...], meaning: Quantization
) -> Weight:
    """A ternary matrix: packed with its scale, codes as floats with it, or masters to quantize."""
    rows, width = shape
    if tensor.dtype != "U8":
        _check_shape(tensor, shape)
        if scale is None:
            return tensor.floats()
        return Ternary((rows, width), tensor.dtype, _float_codes(tensor), _alpha(scale, meaning))
    if scale is None:
        raise RefusedError(f"{tensor.file}: {tensor.name} is packed, but has no weight_scale")
    if rows % PACKED:
        raise RefusedError(f"{tensor.file}: {tensor.name}: {rows} rows are not a multiple of 4")
    _check_shape(tensor, (rows // PACKED, width))
    return Ternary((rows, width), "U8", _packed_codes(tensor), _alpha(scale, meaning))


def _packed_codes(tensor: Stored) -> Any:
    """Byte (r, c) holds rows r, r + R, r + 2R and r + 3R of column c, R the stored rows."""
    quarter = tensor.shape[0]

    def codes(first: int, end: int) -> np.ndarray:
        parts = []
        for plane in range(PACKED):
            low, high = max(first, plane * quarter), min(end, (plane + 1) * quarter)
            if low < high:
                part = tensor.values[low - plane * quarter : high - plane * quarter]
                parts.append((part >> np.uint8(2 * plane)) & np.uint8(3))
        both = np.concatenate(parts)
        if both.size and both.max() > 2:
            raise RefusedError(f"{tensor.file}: {tensor.name} holds code 3, which is no weight")
        return both.view(np.int8) - np.int8(1)

    return codes


def _float_codes(tensor: Stored) -> Any:
    floats = tensor.floats()

    def codes(first: int, end: int) -> np.ndarray:
        part = floats.rows(first, end)
        whole = part.astype(np.int8)
        if (np.abs(part) > 1).any() or (whole != part).any():
            raise RefusedError(
                f"{tensor.file}: {tensor.name} has a weight_scale, but is not -1, 0 and 1"
            )
        return whole

    return codes


def _alpha(scale: Stored, meaning: Quantization) -> np.float32:
    if scale.values.size != 1:
        raise RefusedError(
            f"{scale.file}: {scale.name} holds {scale.values.size} scales: bitskip has one a matrix"
        )
    value = Stored(scale.name, scale.file, scale.dtype, scale.values.reshape(1)).floats().whole()[0]
    if not value > 0:
        raise RefusedError(f"{scale.file}: {scale.name} is {value}, a scale must be positive")
    alpha = np.float32(1) / value if meaning.inverse_scale else value
    if not np.isfinite(alpha) or alpha <= 0:
        raise RefusedError(f"{scale.file}: {scale.name} is {value}: no float32 has its inverse")
    return np.float32(alpha)


# ---- words and stops ----------------------------------------------------------------


def _tokenizer(root: Path) -> str:
    try:
        return (root / TOKENIZER).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        raise RefusedError(f"{root / TOKENIZER} cannot be read as UTF-8") from None


def _end_ids(
    generation: dict[str, Any], raw: dict[str, Any], config: ModelConfig
) -> tuple[int, ...]:
    """generation_config.json's end-of-text ids, else config.json's: one id or a list of them."""
    found = generation.get("eos_token_id")
    if found is None:
        found = raw.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    for i in ids:
        if type(i) is not int or not 0 <= i < config.vocab_size:
            raise RefusedError(f"eos_token_id {i!r} is not in 0..{config.vocab_size - 1}")
    return tuple(dict.fromkeys(ids))


def _bos(
    root: Path, tokenizer_json: str | None, raw: dict[str, Any], config: ModelConfig
) -> int | None:
    """The id that every prompt begins with: what the tokenizer puts there, if it does."""
    if tokenizer_json is None:
        return None
    path, place = root / "tokenizer_config.json", str(root / TOKENIZER)
    stored = read_json(path) if path.is_file() else {}
    adds = stored.get("add_bos_token")
    bos = added_first(tokenizer_json, place) if adds is None else None
    if adds is True:  # the tokenizer's own, whatever id the model's configuration names
        bos = parse_tokenizer(tokenizer_json, place).token_id(_word(stored, "bos_token"))
        bos = raw.get("bos_token_id") if bos is None else bos
    if bos is not None and (type(bos) is not int or not 0 <= bos < config.vocab_size):
        raise RefusedError(f"bos_token_id {bos!r} is not in 0..{config.vocab_size - 1}")
    return bos


def _sampling(root: Path, generation: dict[str, Any]) -> dict[str, float]:
    """What generation_config.json recommends; what it leaves out is as transformers has it."""
    if generation.get("do_sample") is True:
        generation = {"top_k": TOP_K, **{k: v for k, v in generation.items() if v is not None}}
    try:
        return recommended_sampling(generation)
    except ValueError as error:
        raise RefusedError(f"{root / GENERATION}: {error}") from None


def _chat(root: Path) -> ChatForm | None:
    """chat_template.jinja, else what tokenizer_config.json holds: a text, or several by name."""
    path = root / "tokenizer_config.json"
    stored = read_json(path) if path.is_file() else {}
    template = stored.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if (root / CHAT).is_file():
        template = (root / CHAT).read_text("utf-8", errors="replace")
    if not isinstance(template, str):
        return None
    return ChatForm(template, _word(stored, "bos_token"), _word(stored, "eos_token"))


def _word(stored: dict[str, Any], name: str) -> str:
    """A special token of tokenizer_config.json; an empty text for none."""
    word = stored.get(name)
    word = word.get("content") if isinstance(word, dict) else word
    return word if isinstance(word, str) else ""


def _number(values: Any, name: str, limit: int) -> int | None:
    value = values.get(name) if isinstance(values, dict) else None
    if value is None:
        return None
    if type(value) is not int or not 1 <= value <= limit:
        raise RefusedError(f"config.json: {OURS}.{name} = {value!r} is not in 1..{limit}")
    return value
