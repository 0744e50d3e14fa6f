"""Random GGUF models of a preset's shape, for llama.cpp.

    python -m benchmarks.random_gguf PRESET FORMAT HEAD OUT        (needs the package `gguf`)

FORMAT is what the linear layers hold: TQ1_0, TQ2_0 (then the architecture is `bitnet`, with
sub-norms, and the embedding is the head), or Q4_0, Q8_0, F16, F32 (`llama`, with a head of its own
unless the preset ties it). HEAD is what embedding and head hold: Q6_K, Q8_0 or F16.

One random layer is written for all of them, and one random band of rows for the whole vocabulary:
every byte of the file is read all the same. llama.cpp has no ungated FFN in these architectures:
such a preset gets a gated one of about 2/3 the width, rounded down to what the TQ formats can hold,
which favours llama.cpp.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bitskip_ref.config import ModelConfig, preset

TERNARY = ("TQ1_0", "TQ2_0")
BLOCK = 256  # weights in a block of the TQ and K formats
BAND = 1024  # rows of the vocabulary that are made and then repeated


def nearest(config: ModelConfig) -> ModelConfig:
    """The shape that llama.cpp can run. Raises ValueError where no block format fits a width."""
    config = config.replace(hadamard=False)
    if not config.gated:
        width = config.intermediate_size * 2 // 3 // BLOCK * BLOCK
        config = config.replace(intermediate_size=max(width, BLOCK), ffn="swiglu")
    for width in config.linear_inputs():
        if width % BLOCK:
            raise ValueError(f"a row of {width} weights: llama.cpp's formats need {BLOCK}s")
    return config


def quantize(weights: np.ndarray, name: str) -> tuple[np.ndarray, Any]:
    """f32 [rows, n] in a GGUF format: (bytes or floats [rows, ...], its GGMLQuantizationType)."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[name]
    if name == "Q6_K":  # which `gguf` can only read
        return _random_q6_k(*weights.shape), kind
    return quants.quantize(weights, kind), kind


def _random_q6_k(rows: int, width: int) -> np.ndarray:
    """Random blocks of 210 bytes: 192 of codes, 16 scales, one float16 that is kept small."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (rows, width // BLOCK, 210), np.uint8)
    blocks[..., 208:] = np.array([2**-18], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write(config: ModelConfig, linear: str, head: str, path: Path) -> None:
    """Write a model whose linear layers are `linear` and whose embedding and head are `head`."""
    import gguf

    c = nearest(config)
    ternary = linear in TERNARY
    rng = np.random.default_rng(0)
    out = gguf.GGUFWriter(path, "bitnet" if ternary else "llama")
    out.add_vocab_size(c.vocab_size)
    out.add_tokenizer_model("no_vocab")
    out.add_context_length(4096)
    out.add_embedding_length(c.hidden_size)
    out.add_block_count(c.num_hidden_layers)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    out.add_layer_norm_rms_eps(c.norm_eps)
    out.add_rope_dimension_count(c.head_dim)
    out.add_rope_freq_base(c.rope_theta)
    if ternary:
        out.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        out.add_rope_scaling_factor(1.0)
    out.add_file_type(gguf.LlamaFileType[f"{'ALL' if linear == 'F32' else 'MOSTLY'}_{linear}"])
    out.add_quantization_version(gguf.GGML_QUANT_VERSION)

    band = 0.02 * rng.standard_normal((BAND, c.hidden_size), np.float32)
    rows, kind = quantize(band, head)
    table = np.resize(rows, (c.vocab_size, rows.shape[1]))
    out.add_tensor("token_embd.weight", table, raw_dtype=kind)
    if not (ternary or c.tie_word_embeddings):
        out.add_tensor("output.weight", table, raw_dtype=kind)
    out.add_tensor("output_norm.weight", np.ones(c.hidden_size, np.float32))

    names = dict(zip(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
        strict=True,
    ))  # fmt: skip
    layer = {}
    for ours, shape in c.linear_shapes().items():
        weights = rng.integers(-1, 2, shape).astype(np.float32) * shape[1] ** -0.5
        layer[names[ours]] = quantize(weights.astype(np.float32), linear)
    norms = {"attn_norm": c.hidden_size, "ffn_norm": c.hidden_size}
    if ternary:
        norms |= {"attn_sub_norm": c.attention_size, "ffn_sub_norm": c.intermediate_size}
    for i in range(c.num_hidden_layers):
        for name, width in norms.items():
            out.add_tensor(f"blk.{i}.{name}.weight", np.ones(width, np.float32))
        for name, (data, kind) in layer.items():
            out.add_tensor(f"blk.{i}.{name}.weight", data, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def main() -> None:
    """Write one file and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("preset", "format", "head"):
        parser.add_argument(name)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    try:
        write(preset(options.preset), options.format, options.head, options.out)
    except (ValueError, KeyError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
