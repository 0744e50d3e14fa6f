"""A GGUF file as a `Source`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from bitskip_export.foreign.gguf_file import (
    BLOCK,
    LLAMA3,
    ROPE_FACTORS,
    TOP,
    Tensor,
    frequency_factors,
    open_gguf,
    written_name,
)
from bitskip_export.foreign.gguf_words import chat_form, end_ids, tokenizer_json
from bitskip_export.foreign.hf_read import meaning
from bitskip_export.foreign.source import (
    Floats,
    RefusedError,
    Report,
    Source,
    Ternary,
    Weight,
    lossless_head,
)
from bitskip_ref.config import CHOICES, ConfigError, ModelConfig
from bitskip_ref.excerpt import shown
from bitskip_ref.tensors import parameter_shapes, tensor_count

OURS = "bitskip"  # keys of files that we wrote, for what theirs have no word for
_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")
# Architecture -> (ffn, whether each head's rows of q and k lie in interleaved pairs).
ARCHITECTURES = {
    "llama": ("swiglu", True), "bitnet": ("swiglu", False), "qwen2": ("swiglu", False),
    "qwen3": ("swiglu", False),
}  # fmt: skip
USUAL_LLAMA3 = {
    "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_original_context": 8192,
}  # fmt: skip
TERNARY = ("TQ1_0", "TQ2_0", "Q2_0", "I2_S")
CHUNK = 4096  # rows looked at in one go


def read_gguf(path: Path) -> Source:
    """Open a GGUF file; weights are read later.

    Raises RefusedError: for what is damaged, and for what bitskip could only run wrongly.
    """
    metadata, tensors = open_gguf(path)
    try:
        return _read(path, metadata, tensors)
    except RefusedError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:  # any key may hold any type
        reason = str(error) if isinstance(error, ConfigError) else "a key has a wrong type"
        raise RefusedError(f"{path}: {reason}") from None


def _read(path: Path, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> Source:
    """`read_gguf` of a file's parts, but for errors of keys of other types than they should be."""
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise RefusedError(
            f"{path}: architecture {shown(architecture)} is none of {', '.join(ARCHITECTURES)}"
        )
    named: dict[str, Tensor] = {}
    factors = tensors.pop(ROPE_FACTORS, None)
    for name, tensor in tensors.items():
        mine = _ours(name)
        if mine is None:
            raise RefusedError(f"{path}: tensor {shown(name)}{meaning(name)}")
        named[mine] = tensor
    if "embed_tokens.weight" not in named:
        raise RefusedError(f"{path} has no weights: tensor token_embd.weight is not there")
    linear = {t.kind for n, t in named.items() if n.endswith("_proj.weight")}
    scaled = "layers.0.q_proj.scale" in named  # float codes beside their scales
    ternary = architecture == "bitnet" or bool(linear & set(TERNARY)) or scaled
    config = _config(path, metadata, named, ternary)
    if factors is not None:
        config = _llama3(path, metadata, config, factors.floats().whole())
    if tensor_count(config) > 4 * len(named) + 64:
        raise RefusedError(f"{path} lacks tensors: it tells of {config.num_hidden_layers} blocks")
    shapes = parameter_shapes(config)
    if missing := shapes.keys() - named.keys():
        raise RefusedError(f"{path} lacks {written_name(min(missing))} ({len(missing)} in all)")
    pairs = ARCHITECTURES[architecture][1]
    weights: dict[str, Weight] = {}
    for name, shape in shapes.items():
        tensor = named.pop(name)
        if tensor.shape != shape:
            raise RefusedError(
                f"{path}: {tensor.name} is {list(tensor.shape)}, {list(shape)} was expected"
            )
        order = None
        if pairs and (".q_proj." in name or ".k_proj." in name):
            order = from_pairs(shape[0], config.head_dim)
        floats = tensor.floats(order)
        if ternary and name.endswith("_proj.weight"):
            scale = named.pop(name.removesuffix("weight") + "scale", None)
            weights[name] = _ternary(path, tensor.name, floats, scale)
        else:
            weights[name] = floats
    if named:
        name = next(iter(named.values())).name
        raise RefusedError(f"{path}: tensor {shown(name)} has no place in what the keys describe")
    if config.head_format == "float32":
        config = config.replace(head_format=lossless_head(weights))
    words = tokenizer_json(path, metadata, config.vocab_size)
    return Source(
        origin=f"GGUF file {path}",
        config=config,
        weights=weights,
        tokenizer_json=words,
        eos_token_ids=end_ids(path, metadata, config.vocab_size),
        bos_token_id=_first_id(path, metadata, config.vocab_size),
        exit_layer=_number(path, metadata, "exit_layer", config.num_hidden_layers),
        draft_vocab=_number(path, metadata, "draft_vocab", config.vocab_size),
        chat=chat_form(path, metadata),
        report=Report(
            converted=("tokenizer: from the file's lists to tokenizer.json",) if words else ()
        ),
    )


def _ours(name: str) -> str | None:
    """`blk.3.attn_q.weight` -> `layers.3.q_proj.weight`; None for a name not in the table."""
    stem, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "scale", "bias"):
        return None
    if found := _LAYER.fullmatch(stem):
        part = {theirs: ours for ours, theirs in BLOCK.items()}.get(found[2])
        return f"layers.{found[1]}.{part}.{leaf}" if part else None
    part = {theirs: ours for ours, theirs in TOP.items()}.get(stem)
    return f"{part}.{leaf}" if part else None


def _config(
    path: Path, metadata: dict[str, Any], named: dict[str, Tensor], ternary: bool
) -> ModelConfig:
    a = metadata["general.architecture"]

    def key(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{a}.{name}", default)
        if isinstance(value, np.ndarray):
            values = set(value.tolist())
            if len(values) != 1:
                raise RefusedError(f"{path}: {a}.{name} differs from block to block")
            value = values.pop()
        if value is None:
            raise RefusedError(f"{path} lacks the key {a}.{name}")
        return value

    heads, width = key("attention.head_count"), key("embedding_length")
    head, context = key("attention.key_length", width // heads), key("context_length")
    for name, plain, what in (
        ("expert_count", {0}, "experts"),
        ("attention.value_length", {head}, "keys and values of different widths"),
        ("rope.dimension_count", {head}, "RoPE over a part of each head"),
        ("rope.scaling.attn_factor", {1.0}, "RoPE that makes queries and keys larger"),
        ("attention.causal", {True}, "attention to later tokens"),
        ("attention.scale", {0.0, np.float32(head**-0.5)}, "another scale of attention"),
        ("attention.clamp_kqv", {0.0}, "bounds of queries, keys and values"),
        ("attention.max_alibi_bias", {0.0}, "ALiBi"),
        ("attn_logit_softcapping", {0.0}, "soft caps of attention"),
        ("final_logit_softcapping", {0.0}, "soft caps of logits"),
        ("logit_scale", {0.0, 1.0}, "scaled logits"),
        ("embedding_scale", {0.0, 1.0}, "scaled embeddings"),
        ("residual_scale", {0.0, 1.0}, "scaled residuals"),
    ):
        value = metadata.get(f"{a}.{name}")
        if value is not None and key(name) not in plain:
            raise RefusedError(
                f"{path}: {a}.{name} = {shown(value)}: {what}, which bitskip has not"
            )
    if 0 < key("attention.sliding_window", 0) < context:
        raise RefusedError(
            f"{path}: the model needs sliding-window attention, which bitskip has not"
        )
    scaling, factor = key("rope.scaling.type", "linear"), 1.0  # as llama.cpp has it
    if scaling != "none":
        factor = float(key("rope.scaling.factor", key("rope.scale_linear", 0.0))) or 1.0
    if scaling not in ("none", "linear") and factor != 1.0:
        raise RefusedError(f"{path}: RoPE scaling of type {shown(scaling)}: not known")
    ffn, pairs = ARCHITECTURES[a]
    if pairs and "layers.0.q_norm.weight" in named:
        raise RefusedError(f"{path}: norms of each head in architecture {a}, which has none")
    return ModelConfig(
        vocab_size=named["embed_tokens.weight"].shape[0],
        hidden_size=width,
        num_hidden_layers=key("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=key("attention.head_count_kv", heads),
        head_dim=head,
        intermediate_size=key("feed_forward_length"),
        max_position_embeddings=context,
        linear="ternary" if ternary else "float32",
        ffn=ffn,
        norm_eps=float(np.float32(key("attention.layer_norm_rms_epsilon")).astype(str)),
        rope_theta=float(np.float32(key("rope.freq_base", 10_000.0)).astype(str)),
        rope_scaling="linear" if factor != 1.0 else "none",
        rope_factor=factor,
        biases=(
            "qkvo"
            if "layers.0.o_proj.bias" in named
            else "qkv"
            if "layers.0.q_proj.bias" in named
            else "none"
        ),
        qk_norm="layers.0.q_norm.weight" in named,
        sub_norm="layers.0.attn_sub_norm.weight" in named,
        tie_word_embeddings="lm_head.weight" not in named,
        head_format=_head_format(metadata, "int8" if ternary else "float32"),
    )


def _llama3(
    path: Path, metadata: dict[str, Any], config: ModelConfig, factors: np.ndarray
) -> ModelConfig:
    """The scaling of RoPE that has these factors, which the file's keys do not name (SPEC 6.6).

    Tried are the numbers of files that we wrote, else those that all Llama 3 models have.
    """
    values: dict[str, Any] = {
        "rope_factor": float(np.float32(factors.max(initial=1)).astype(str)), **USUAL_LLAMA3,
    }  # fmt: skip
    values |= {key: metadata[f"{OURS}.{key}"] for key in LLAMA3 if f"{OURS}.{key}" in metadata}
    values |= {k: float(np.float32(values[k]).astype(str)) for k in LLAMA3[:3]}
    found = config.replace(rope_scaling="llama3", **values)
    expected = frequency_factors(found)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-5, atol=0):
        raise RefusedError(
            f"{path}: {ROPE_FACTORS} are not the factors of a Llama 3 model (rope_scaling llama3, "
            f"original context {values['rope_original_context']}): bitskip has no such scaling"
        )
    return found


def _head_format(metadata: dict[str, Any], usual: str) -> str:
    kept = metadata.get(f"{OURS}.head_format")
    return kept if kept in CHOICES["head_format"] else usual


def _number(path: Path, metadata: dict[str, Any], name: str, limit: int) -> int | None:
    value = metadata.get(f"{OURS}.{name}")
    if value is not None and (type(value) is not int or not 1 <= value <= limit):
        raise RefusedError(f"{path}: {OURS}.{name} = {shown(value)} is not in 1..{limit}")
    return value


def from_pairs(rows: int, head_dim: int) -> np.ndarray:
    """Which row of the file each of ours is: there a head's halves lie interleaved (RoPE NORM)."""
    file = np.arange(rows).reshape(-1, head_dim // 2, 2)
    return file.swapaxes(1, 2).reshape(-1)


def _ternary(path: Path, name: str, floats: Floats, scale: Tensor | None) -> Ternary:
    """A matrix of one value, its negative and 0. Raises RefusedError for any other."""
    rows, width = floats.shape
    value = np.float32(0)
    for first in range(0, rows, CHUNK):
        part = np.abs(floats.rows(first, min(first + CHUNK, rows)))
        value = value or part.max()  # the first that is not 0
        others = part[(part != 0) & (part != value)]
        if others.size:
            raise RefusedError(
                f"{path}: {name} holds {others[0]:.6g} beside {value:.6g}: bitskip has one scale a "
                "matrix, and no group scales"
            )
    alpha = value or np.float32(1)
    if scale is not None:
        if scale.shape != (1,):
            raise RefusedError(f"{path}: {scale.name} holds {scale.shape[0]} scales")
        alpha = np.float32(alpha * scale.floats().whole()[0])
        if not alpha > 0:
            raise RefusedError(f"{path}: {scale.name} is {alpha}, a scale must be positive")

    def codes(first: int, end: int) -> np.ndarray:
        return np.sign(floats.rows(first, end)).astype(np.int8)

    return Ternary((rows, width), floats.stored, codes, alpha)


def _first_id(path: Path, metadata: dict[str, Any], vocab_size: int) -> int | None:
    """The id that every prompt begins with."""
    spm = metadata.get("tokenizer.ggml.model") == "llama"
    usual = spm or metadata.get("tokenizer.ggml.pre") == "llama-bpe"  # as llama.cpp has it
    if not metadata.get("tokenizer.ggml.add_bos_token", usual):
        return None
    bos = metadata.get("tokenizer.ggml.bos_token_id", 1 if spm else None)
    if bos is not None and (type(bos) is not int or not 0 <= bos < vocab_size):
        raise RefusedError(f"{path}: bos_token_id {shown(bos)} is not in 0..{vocab_size - 1}")
    return bos
