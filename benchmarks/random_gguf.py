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
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bitskip_export.foreign.gguf_file import written_name
from bitskip_export.foreign.gguf_write import F32, Entry, described, write_container
from bitskip_export.foreign.source import VOCABULARY
from bitskip_ref.config import ModelConfig, preset
from bitskip_ref.files import replace_file
from bitskip_ref.tensors import parameter_shapes

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


def quantize(weights: np.ndarray, name: str) -> tuple[np.ndarray, int]:
    """f32 [rows, n] in a GGUF format: (bytes or floats [rows, ...], the format's number)."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[name]
    if name == "Q6_K":  # which `gguf` can only read
        return _random_q6_k(*weights.shape), kind.value
    return quants.quantize(weights, kind), kind.value


def _random_q6_k(rows: int, width: int) -> np.ndarray:
    """Random blocks of 210 bytes: 192 of codes, 16 scales, one float16 that is kept small."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (rows, width // BLOCK, 210), np.uint8)
    blocks[..., 208:] = np.array([2**-18], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write(config: ModelConfig, linear: str, head: str, path: Path) -> None:
    """Write a model whose linear layers are `linear` and whose embedding and head are `head`.

    Raises KeyError for a format that `gguf` does not know.
    """
    from gguf import LlamaFileType

    shape, ternary = nearest(config), linear in TERNARY
    c = ModelConfig(  # of a plain float model, whose every tensor has its own name and shape
        shape.vocab_size, shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads,
        shape.num_key_value_heads, shape.head_dim, shape.intermediate_size, 4096, "float32",
        norm_eps=shape.norm_eps, rope_theta=shape.rope_theta, sub_norm=ternary,
        tie_word_embeddings=ternary or shape.tie_word_embeddings,
    )  # fmt: skip
    metadata = described(c, "bitnet" if ternary else "llama") | {
        "general.file_type": LlamaFileType[f"{'ALL' if linear == 'F32' else 'MOSTLY'}_{linear}"],
        "tokenizer.ggml.model": "no_vocab",
    }
    with replace_file(path) as file:
        write_container(file, metadata, dict(_entries(c, linear, head)))


def _entries(c: ModelConfig, linear: str, head: str) -> Iterator[tuple[str, Entry]]:
    rng = np.random.default_rng(0)
    band = quantize(0.02 * rng.standard_normal((BAND, c.hidden_size), np.float32), head)
    layer = {}
    for name, shape in c.linear_shapes().items():
        weights = rng.integers(-1, 2, shape).astype(np.float32) * np.float32(shape[1] ** -0.5)
        layer[name] = quantize(weights, linear)
    for name, shape in parameter_shapes(c).items():
        kind, data = F32, np.ones(shape[0], np.float32)
        if name in VOCABULARY:
            data, kind = band
            data = np.resize(data, (shape[0], data.shape[1]))
        elif len(shape) == 2:
            data, kind = layer[name.split(".")[2]]
        yield written_name(name), Entry(kind, shape, data.nbytes, [data])


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
