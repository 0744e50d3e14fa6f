"""GGUF files, written: read back by our reader and by the package `gguf`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import bitskip_cpu
from bitskip.program import main
from bitskip_export.foreign import gguf_file, gguf_write, given
from bitskip_export.foreign.convert import import_model
from bitskip_export.foreign.gguf_read import read_gguf
from bitskip_export.foreign.gguf_write import pack_blocks, ternary_kind, write_gguf
from bitskip_export.foreign.hf_read import read_huggingface
from bitskip_export.foreign.hf_write import write_huggingface
from bitskip_export.foreign.source import RefusedError
from bitskip_ref.compare import difference
from bitskip_ref.config import ModelConfig, small_twin
from bitskip_ref.folder import read_folder
from bitskip_ref.model import ReferenceModel
from bitskip_text.tokenizer import TokenizerError
from tests.cli.conftest import byte_level_bpe, write_model
from tests.helpers import random_folder, twin
from tests.interop.test_int8 import relative

gguf = pytest.importorskip("gguf")
STORIES = Path(bitskip_cpu.__file__).parent / "models/stories-24"
LLAMA = small_twin("bitskip-v1").replace(head_format="float32")
WIDE = {"hidden_size": 256, "intermediate_size": 512}
FLOAT = small_twin("llama3")
GIVEN: dict[str, ModelConfig] = {
    "F16": LLAMA,  # 48 weights a row fit no block
    "TQ2_0": LLAMA.replace(**WIDE, num_attention_heads=16),
    "Q2_0": LLAMA.replace(hidden_size=64, intermediate_size=192, head_format="int8"),
    "F32": FLOAT,
    "float16": FLOAT.replace(head_format="float16", rope_scaling="linear", rope_factor=4.0),
    "bfloat16": FLOAT.replace(head_format="bfloat16"),
    "biases": FLOAT.replace(biases="qkvo"),
    "llama3": FLOAT.replace(
        rope_scaling="llama3",
        rope_factor=8.0,
        rope_original_context=32,
        head_dim=16,
        rope_theta=500_000.0,
    ),
    "qwen2": FLOAT.replace(biases="qkv", tie_word_embeddings=True),
    "qwen3": FLOAT.replace(qk_norm=True),
    "bitnet": small_twin("bitnet-2b4t").replace(
        ffn="swiglu", hidden_size=64, head_format="float32"
    ),
}


def back(path: Path, out: Path) -> Path:
    import_model(read_gguf(path), out)
    return out


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_written_comes_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_folder(random_folder(tmp_path / "model", GIVEN[name]))
    write_gguf(first, tmp_path / "m.gguf")
    again = read_folder(back(tmp_path / "m.gguf", tmp_path / "again"))
    assert again.config == first.config and again.eos_token_id is None
    for key, t in first.tensors.items():
        assert difference(key, t, again.tensors[key]) is None
    if first.config.linear == "ternary" and name != "TQ2_0":
        return  # they hold Q2_0, which the package cannot read
    theirs = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    up = theirs["blk.1.ffn_up.weight"]
    assert up.tensor_type.name == ("TQ2_0" if name == "TQ2_0" else "F32")
    if name == "TQ2_0":
        values = gguf.quants.dequantize(up.data, up.tensor_type)
        alpha = theirs["blk.1.ffn_up.scale"].data[0]
        packed = first.tensors["layers.1.up_proj.scale"][0]
        assert alpha == packed and set(np.unique(values)) == {-1, 0, 1}
        # Planted: rows of queries left in halves.
        monkeypatch.setattr(gguf_write, "from_pairs", lambda rows, _: np.arange(rows))
        write_gguf(first, tmp_path / "wrong.gguf")
        wrong = read_folder(back(tmp_path / "wrong.gguf", tmp_path / "wrong"))
        key = "layers.1.q_proj.weight"
        assert difference(key, first.tensors[key], wrong.tensors[key]) is not None


def test_blocks_are_the_packages() -> None:
    codes = np.random.default_rng(0).integers(-1, 2, (8, 512)).astype(np.int8)
    codes[:, 0] = 1  # of each block, too: the package takes its scale from the largest
    codes[:, 256] = -1
    kind = gguf.GGMLQuantizationType.TQ2_0
    assert ternary_kind(512) == (35, 132)
    expected = gguf.quants.quantize(codes.astype(np.float32), kind)
    assert np.array_equal(pack_blocks(codes, 35), expected)


def test_an_exit_is_written_as_a_model(tmp_path: Path) -> None:
    config = LLAMA.replace(exit_norm="per_layer", exit_head="per_layer", gates=True)
    full = read_folder(random_folder(tmp_path / "model", config))
    report = write_gguf(full, tmp_path / "m.gguf", exit_layer=2)
    assert len(report.dropped) == 3
    cut = read_folder(back(tmp_path / "m.gguf", tmp_path / "cut"))
    ids = [1, 2, 3, 4, 5]
    assert np.array_equal(
        ReferenceModel(cut.config, cut.tensors).logits(ids),
        ReferenceModel(full.config, full.tensors).logits(ids, 2),
    )


def test_an_exit_with_a_block_of_its_own_is_refused(tmp_path: Path) -> None:
    config = LLAMA.replace(exit_blocks=(2,))
    full = read_folder(random_folder(tmp_path / "model", config))
    with pytest.raises(ValueError, match="exit 2 has a block of its own"):
        write_gguf(full, tmp_path / "m.gguf", exit_layer=2)
    report = write_gguf(full, tmp_path / "m.gguf")
    assert report.dropped == ("blocks of exits: 2",)
    cut = read_folder(back(tmp_path / "m.gguf", tmp_path / "cut"))
    ids = [1, 2, 3, 4, 5]
    assert np.array_equal(
        ReferenceModel(cut.config, cut.tensors).logits(ids),
        ReferenceModel(full.config, full.tensors).logits(ids),
    )


def test_the_shipped_model_there_and_back(tmp_path: Path) -> None:
    shipped = read_folder(STORIES)
    result = CliRunner().invoke(
        main, ["export", "stories-24", "--to", "gguf", "-o", str(tmp_path / "s.gguf")]
    )
    assert result.exit_code == 0 and "codes and scales" in result.output, result.output
    again = read_folder(back(tmp_path / "s.gguf", tmp_path / "again"))
    assert again.config == shipped.config.replace(gates=False)
    for key, t in again.tensors.items():
        assert difference(key, shipped.tensors[key], t) is None
    assert (again.eos_token_id, again.draft_vocab) == (shipped.eos_token_id, shipped.draft_vocab)
    ours, theirs = (bitskip_cpu.load(p).tokenizer for p in (STORIES, again.path))
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(rng.choice(list("abc dé\n's 12中😀.,!"), rng.integers(1, 40)))
        assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize(("name", "words"), [
    ("bitskip-v3", "hadamard"), ("wt2-baseline", "layer norms"), ("bitnet-2b4t", "SiLU built in"),
    ("rope-yarn", "yarn"),
], ids=str)  # fmt: skip
def test_what_llama_cpp_cannot_compute_is_refused(name: str, words: str, tmp_path: Path) -> None:
    folder = read_folder(random_folder(tmp_path / "model", twin(name)))
    with pytest.raises(RefusedError, match=words):
        write_gguf(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_factors_of_llama_3_are_known(tmp_path: Path) -> None:
    """Files of others name no scaling: the factors of Llama 3.2 say it, others are refused."""
    config = FLOAT.replace(head_dim=64, rope_theta=500_000.0, rope_scaling="llama3",
                           rope_factor=32.0, rope_original_context=8192)  # fmt: skip
    first = read_folder(random_folder(tmp_path / "model", config))
    write_gguf(first, tmp_path / "m.gguf")
    raw = (tmp_path / "m.gguf").read_bytes()
    theirs = raw.replace(b"bitskip.rope_", b"somebodyrope_")
    assert theirs != raw
    (tmp_path / "t.gguf").write_bytes(theirs)
    assert read_gguf(tmp_path / "t.gguf").config == config
    factors = gguf_write.frequency_factors(config).tobytes()
    assert theirs.count(factors) == 1 and len(set(np.frombuffer(factors, np.float32))) > 3
    odd = np.linspace(1, 5, 32, dtype=np.float32).tobytes()
    (tmp_path / "t.gguf").write_bytes(theirs.replace(factors, odd))
    with pytest.raises(RefusedError, match="rope_freqs"):
        read_gguf(tmp_path / "t.gguf")


def test_int8_rows_become_the_floats_that_they_stand_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turned rows are turned back, to both formats."""
    config = small_twin("llama3").replace(linear="int8", hadamard=True, head_format="int8")
    first = read_folder(random_folder(tmp_path / "int8", config))
    write_gguf(first, tmp_path / "m.gguf")
    assert relative(first.path, back(tmp_path / "m.gguf", tmp_path / "a")) < 0.1
    assert read_folder(tmp_path / "a").config.linear == "float32"
    report = write_huggingface(first, tmp_path / "hf")
    assert "int8 rows as the float32" in report.converted[0] and not report.kept
    import_model(read_huggingface(tmp_path / "hf"), tmp_path / "b")
    for name, t in read_folder(tmp_path / "a").tensors.items():
        assert difference(name, t, read_folder(tmp_path / "b").tensors[name]) is None
    monkeypatch.setattr(given, "rotate_unpadded", lambda rows: rows)
    write_gguf(first, tmp_path / "wrong.gguf")
    assert relative(first.path, back(tmp_path / "wrong.gguf", tmp_path / "c")) > 0.5


def i2_s(codes: np.ndarray, scale: np.float32) -> np.ndarray:
    """bitnet.cpp's layout: of 128 weights byte p holds p, p + 32, p + 64, p + 96, high bits first;
    behind all of them 32 bytes that begin with the scale."""
    w = (codes.reshape(-1, 4, 32) + 1).astype(np.uint8)
    packed = w[:, 0] << 6 | w[:, 1] << 4 | w[:, 2] << 2 | w[:, 3]
    tail = np.zeros(32, np.uint8)
    tail[:4] = np.array([scale], np.float32).view(np.uint8)
    return np.concatenate([packed.reshape(-1), tail])


def test_i2_s_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LLAMA.replace(hidden_size=128, intermediate_size=256, num_attention_heads=8)
    first = read_folder(random_folder(tmp_path / "model", config))
    original = gguf_write._entries

    def entries(model: given.Given, architecture: str) -> Iterator[tuple[str, gguf_write.Entry]]:
        ours = dict(original(model, architecture))
        for name, entry in ours.items():
            scale = ours.get(name.removesuffix("weight") + "scale")
            if name.endswith(".scale"):
                continue
            if scale is not None:
                packed = np.concatenate([*entry.pieces])
                kind = {gguf_write.Q2_0: "Q2_0", gguf_write.TQ2_0: "TQ2_0"}[entry.kind]
                codes = gguf_file._dequantize(packed, kind)
                raw = i2_s(codes, np.concatenate([*scale.pieces])[0])
                entry = gguf_write.Entry(gguf_file.I2_S, entry.shape, raw.nbytes, [raw])
            yield name, entry

    monkeypatch.setattr(gguf_write, "_entries", entries)
    monkeypatch.setitem(gguf_write.FILE_TYPES, gguf_file.I2_S, 0)
    write_gguf(first, tmp_path / "m.gguf")
    again = read_folder(back(tmp_path / "m.gguf", tmp_path / "again"))
    for key, t in first.tensors.items():
        assert difference(key, t, again.tensors[key]) is None
    raw = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(raw[:-64])
    with pytest.raises(RefusedError, match="cut off"):
        read_gguf(tmp_path / "m.gguf")


def test_a_tokenizer_that_llama_cpp_would_run_otherwise(tmp_path: Path) -> None:
    config = FLOAT.replace(vocab_size=320)
    stored = json.loads(byte_level_bpe())

    def written(**changes: object) -> Path:
        made = {**stored, "model": stored["model"] | changes}
        write_model(tmp_path / "m", config, tokenizer_json="\ufeff" + json.dumps(made))
        write_gguf(read_folder(tmp_path / "m"), tmp_path / "m.gguf")
        return tmp_path / "m.gguf"

    read_gguf(written())  # a byte order mark is none of its words
    for changes in ({"ignore_merges": True}, {"end_of_word_suffix": "</w>"}):
        with pytest.raises(RefusedError, match="not exported"):
            written(**changes)
    write_model(tmp_path / "m", config.replace(vocab_size=299))
    with pytest.raises(TokenizerError, match="belongs to another model"):
        write_gguf(read_folder(tmp_path / "m"), tmp_path / "m.gguf")
