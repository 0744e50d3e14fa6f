"""Random models for tests: every number differs from 0 and 1, so that no rule hides another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bitskip_ref.arithmetic.quant import quantize_activations, quantize_weights
from bitskip_ref.config import HEAD_BITS, PRESETS, ModelConfig, small_twin
from bitskip_ref.decoding.draft import Draft
from bitskip_ref.engine import Engine
from bitskip_ref.floats import stored
from bitskip_ref.folder import write_folder
from bitskip_ref.packing import pack_ternary
from bitskip_ref.tensors import expected_tensors, parameter_shapes

QUANTIZED = [name for name, config in PRESETS.items() if config.linear == "ternary"]
OPTIONS: dict[str, ModelConfig] = {
    "int6-head": small_twin("bitskip-v1").replace(head_format="int6"),
    "int4-head": small_twin("wt2-h").replace(head_format="int4"),
    "float32-head": small_twin("bitskip-v1").replace(head_format="float32"),
    "float16-head": small_twin("bitskip-v1").replace(head_format="float16"),
    "bfloat16-head": small_twin("bitskip-v1").replace(head_format="bfloat16"),
    "per-layer-exits": small_twin("bitskip-v1").replace(
        exit_norm="per_layer", exit_head="per_layer", gates=True
    ),
    "rope-llama3": small_twin("bitskip-v1").replace(
        rope_scaling="llama3", rope_factor=8.0, rope_original_context=32
    ),
    "rope-yarn": small_twin("bitskip-v1").replace(
        rope_scaling="yarn",
        rope_factor=4.0,
        rope_original_context=2048,
        rope_attention_factor=1.125,
    ),
    "biases": small_twin("bitskip-v1").replace(biases="qkvo", qk_norm=True),
    "biases-layer-norm": small_twin("wt2-h").replace(biases="qkv", qk_norm=True, head_dim=12),
    "int8": small_twin("llama3").replace(
        linear="int8",
        hadamard=True,
        head_format="int8",
        biases="qkv",
        hidden_size=36,
        intermediate_size=28,
    ),
    "int8-plain": small_twin("wt2-baseline").replace(linear="int8", head_format="int4"),
    "relu2-in-linear": small_twin("wt2-bitskip").replace(relu2_in_linear=True),
    "4-bit-post-norm": small_twin("wt2-bitskip").replace(activation_bits=4),
    "exit-blocks": small_twin("bitskip-v1").replace(exit_blocks=(1, 3), gates=True),
    "exit-blocks-post-norm": small_twin("wt2-bitskip").replace(
        exit_blocks=(2,), exit_norm="per_layer"
    ),
    "exit-blocks-int8": small_twin("llama3").replace(
        linear="int8",
        hadamard=True,
        head_format="int8",
        hidden_size=36,
        intermediate_size=28,
        exit_blocks=(1, 2, 3),
    ),
}
"""Configurations whose features no preset has."""


def twin(name: str) -> ModelConfig:
    """The small configuration of a preset's or an option's name."""
    return OPTIONS[name] if name in OPTIONS else small_twin(name)


def random_parameters(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Full-precision f32 parameters under FORMAT's names, as a trainer would hold them."""
    rng = np.random.default_rng(seed)
    parameters = {}
    for name, shape in parameter_shapes(config).items():
        x = rng.standard_normal(shape, dtype=np.float32)
        scale = 1.0 if "embed" in name else 0.3 if len(shape) == 1 else shape[-1] ** -0.5
        centre = 1.0 if len(shape) == 1 and name.endswith("norm.weight") else 0.0
        parameters[name] = (x * scale + centre).astype(np.float32)
    return parameters


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """A model folder's tensors, quantized from `random_parameters` by the reference."""
    parameters = random_parameters(config, seed)
    tensors: dict[str, np.ndarray] = {}
    for name, (kind, _) in expected_tensors(config).items():
        if name not in parameters:
            continue  # a scale: made with its weight
        scale = name.removesuffix("weight") + "scale"
        if kind is np.uint8:
            codes, alpha = quantize_weights(parameters[name])
            tensors[name], tensors[scale] = pack_ternary(codes), np.array([alpha])
        elif kind is np.int8:
            form = "int8" if name.endswith("_proj.weight") else config.head_format
            codes, step = quantize_activations(parameters[name], HEAD_BITS[form])
            tensors[name], tensors[scale] = codes, step[:, 0]
        else:
            tensors[name] = stored(parameters[name], kind)
    return tensors


def random_folder(path: Path, config: ModelConfig, seed: int = 0) -> Path:
    """Write a random model folder (no tokenizer) and return its path."""
    write_folder(path, config, random_tensors(config, seed), eos_token_id=0)
    return path


def random_tokens(config: ModelConfig, count: int, seed: int = 1) -> list[int]:
    """Token ids in 0..V-1."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, count).tolist()


def chosen_round(
    engine: Engine, token: int, cache: Any, count: int, draft: Draft,
    choose: Callable[[np.ndarray], int], exit_layer: int | None = None,
) -> tuple[list[int], np.ndarray]:  # fmt: skip
    """`Engine.speculate` with drafts by `choose`, run by way of `Engine.round`."""
    under_way, ids = engine.round(cache, draft, exit_layer), [token]
    while True:
        z = under_way.draft(ids[-1])
        if len(ids) > count or not draft.sure(z):
            return ids[1:], under_way.verify()
        ids.append(choose(z))
