"""GGUF files, read, against transformers' own reader and the package `gguf`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitskip_cpu
from bitskip_export.foreign import gguf_read
from bitskip_export.foreign.convert import import_model
from bitskip_export.foreign.gguf_read import read_gguf
from bitskip_export.foreign.source import RefusedError
from bitskip_ref.folder import read_folder
from bitskip_ref.packing import unpack_ternary
from bitskip_text.tokenizer import TokenizerError, parse_tokenizer
from tests.interop.blocks import distances, random_model, torch

gguf = pytest.importorskip("gguf")
STORIES = Path(bitskip_cpu.__file__).parent / "models/stories-24"
SHAPE = {"intermediate_size": 96, "hidden_size": 64}
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's converter lays them."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def theirs(model: Any) -> dict[str, np.ndarray]:
    """GGUF's names and rows of a Llama of transformers."""
    c, tensors = model.config, {}
    for name, p in model.state_dict().items():
        w = p.numpy()
        if c.model_type == "llama" and (".q_proj." in name or ".k_proj." in name):
            w = permuted(w, c.num_attention_heads if "q_" in name else c.num_key_value_heads)
        for long, short in NAMES.items():
            name = name.replace(long, short)
        name = name.replace("model.layers.", "blk.").replace("model.embed_tokens", "token_embd")
        name = name.replace("model.norm", "output_norm").replace("lm_head", "output")
        tensors[name] = np.ascontiguousarray(w)
    if c.tie_word_embeddings:
        tensors.pop("output.weight", None)
    return tensors


def write(
    path: Path, tensors: dict[str, np.ndarray], kind: str = "F32", architecture: str = "llama",
    heads: tuple[int, int] = (4, 2), keys: Callable[[Any], object] = lambda _: None,
) -> Path:  # fmt: skip
    """A GGUF file by the package `gguf`; matrices of blocks in `kind`."""
    out = gguf.GGUFWriter(path, architecture)
    norm = tensors["output_norm.weight"]
    out.add_context_length(128)
    out.add_embedding_length(norm.size)
    out.add_block_count(1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("blk.")))
    out.add_feed_forward_length(tensors["blk.0.ffn_up.weight"].shape[0])
    out.add_head_count(heads[0])
    out.add_head_count_kv(heads[1])
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_dimension_count(norm.size // heads[0])
    out.add_rope_freq_base(10_000.0)
    keys(out)
    for name, w in tensors.items():
        matrix = w.ndim == 2 and name.startswith("blk.")
        q = gguf.GGMLQuantizationType[kind if matrix else "F32"]
        out.add_tensor(name, gguf.quants.quantize(w, q) if matrix else w, raw_dtype=q)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def bring(path: Path, out: Path, **options: Any) -> Path:
    """Import a GGUF file."""
    import_model(read_gguf(path), out, **options)
    return out


@pytest.mark.parametrize("tied", [False, True])
def test_blocks_are_theirs(tied: bool, tmp_path: Path) -> None:
    model = random_model("Llama", tie_word_embeddings=tied)
    folder = bring(write(tmp_path / "m.gguf", theirs(model)), tmp_path / "out")
    assert read_folder(folder).config.tie_word_embeddings == tied
    assert distances(model, folder).max() < 1e-5


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Llama"])
def test_biases_and_head_norms_are_theirs(kind: str, tmp_path: Path) -> None:
    changes = {"Qwen2": {}, "Qwen3": {"head_dim": 16}, "Llama": {"attention_bias": True}}[kind]
    model = random_model(kind, **changes)
    path = write(tmp_path / "m.gguf", theirs(model), architecture=kind.lower())
    config = read_folder(bring(path, tmp_path / "out")).config
    assert config.qk_norm == (kind == "Qwen3")
    assert config.biases == {"Qwen2": "qkv", "Qwen3": "none", "Llama": "qkvo"}[kind]
    assert distances(model, tmp_path / "out").max() < 1e-5


def test_the_reader_of_transformers_agrees(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = random_model("Llama")
    path = write(tmp_path / "m.gguf", theirs(model), keys=some_words)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    assert distances(read.eval(), bring(path, tmp_path / "out")).max() < 1e-5


def test_unpermuted_queries_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("Llama")
    path = write(tmp_path / "m.gguf", theirs(model))
    monkeypatch.setattr(gguf_read, "from_pairs", lambda rows, _: np.arange(rows))
    assert distances(model, bring(path, tmp_path / "out")).max() > 1e-2


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_values_are_those_of_the_package(kind: str, tmp_path: Path) -> None:
    model = random_model("Llama", **SHAPE)
    tensors = theirs(model)
    folder = read_folder(bring(write(tmp_path / "m.gguf", tensors, kind), tmp_path / "out"))
    q = gguf.GGMLQuantizationType[kind]
    for theirs_, ours in (("ffn_down", "down_proj"), ("attn_output", "o_proj")):
        w = tensors[f"blk.1.{theirs_}.weight"]
        expected = gguf.quants.dequantize(gguf.quants.quantize(w, q), q)
        assert np.array_equal(folder.tensors[f"layers.1.{ours}.weight"], expected)
        assert 0 < np.abs(expected - w).max() < 0.1 * np.abs(w).max()


def test_q6_k_is_read(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (64, 2, 210), np.uint8)
    raw[..., 208:] = np.array([2**-6], np.float16).view(np.uint8)
    out = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    q = gguf.GGMLQuantizationType.Q6_K
    out.add_tensor("w", raw.reshape(64, -1), raw_dtype=q)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    _, tensors = gguf_read.open_gguf(tmp_path / "m.gguf")
    found = tensors["w"].floats().whole()
    assert found.shape == (64, 512)
    assert np.array_equal(found, gguf.quants.dequantize(raw.reshape(64, -1), q))


# ---- ternary ------------------------------------------------------------------------


def ternary_tensors(width: int = 256, layers: int = 2) -> dict[str, np.ndarray]:
    """Matrices of -a, 0, a with an a that float16 holds; norms and embedding random."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {
        "token_embd.weight": rng.standard_normal((96, width)),
        "output_norm.weight": 1 + 0.1 * rng.standard_normal(width),
    }
    for i in range(layers):
        for name in list(NAMES.values())[:9]:
            if name.endswith("norm"):
                tensors[f"blk.{i}.{name}.weight"] = 1 + 0.1 * rng.standard_normal(width)
                continue
            rows = width // 2 if name in ("attn_k", "attn_v") else width
            codes = rng.integers(-1, 2, (rows, width))
            tensors[f"blk.{i}.{name}.weight"] = codes * 2.0 ** -(4 + i)
    return {name: t.astype(np.float32) for name, t in tensors.items()}


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_ternary_codes_and_scales(kind: str, tmp_path: Path) -> None:
    tensors = ternary_tensors()
    scales = {f"blk.{i}.ffn_up.scale": np.array([0.3], np.float32) for i in range(2)}
    folder = read_folder(
        bring(write(tmp_path / "m.gguf", tensors | scales, kind), tmp_path / "out")
    )
    assert folder.config.linear == "ternary" and folder.config.head_format == "int8"
    for i in range(2):
        up = folder.tensors[f"layers.{i}.up_proj.weight"]
        w = tensors[f"blk.{i}.ffn_up.weight"]
        assert np.array_equal(unpack_ternary(up, 256), np.sign(w))
        alpha = folder.tensors[f"layers.{i}.up_proj.scale"][0]
        assert alpha == np.float32(2.0 ** -(4 + i)) * np.float32(0.3)
        assert folder.tensors[f"layers.{i}.down_proj.scale"][0] == 2.0 ** -(4 + i)


def test_group_scales_are_refused(tmp_path: Path) -> None:
    tensors = ternary_tensors()
    tensors["blk.1.ffn_up.weight"][100:] *= 2
    path = write(tmp_path / "m.gguf", tensors, "TQ2_0")
    with pytest.raises(RefusedError, match=r"ffn_up.*one scale a matrix"):
        read_gguf(path)


# ---- words --------------------------------------------------------------------------


def some_words(out: Any) -> None:
    """The metadata of a byte-level tokenizer of 96 ids and one merge."""
    words(out, ["a", "b", "ab", *map(chr, range(0x4E00, 0x4E00 + 92)), "<|endoftext|>"], ["a b"])


def words(out: Any, tokens: list[str], merges: list[str], pre: str = "gpt-2") -> None:
    """A byte-level tokenizer whose last token ends a text."""
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list(tokens)
    out.add_token_types([1] * (len(tokens) - 1) + [3])
    out.add_token_merges(merges)
    out.add_eos_token_id(len(tokens) - 1)


def test_a_byte_level_tokenizer_comes_back(tmp_path: Path) -> None:
    import json

    text = (STORIES / "tokenizer.json").read_text("utf-8")
    first = parse_tokenizer(text, "stories-24")
    tokens = sorted(first.vocabulary(), key=first.vocabulary().__getitem__)
    stored = json.loads(text)["model"]["merges"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in stored]
    end = tokens.index("<|endoftext|>")
    kinds = [3 if i == end else 1 for i in range(len(tokens))]

    def keys(out: Any) -> None:
        out.add_tokenizer_model("gpt2")
        out.add_tokenizer_pre("gpt-2")
        out.add_token_list(tokens)
        out.add_token_types(kinds)
        out.add_token_merges(merges)
        out.add_eos_token_id(end)

    model = random_model("Llama", vocab_size=len(tokens))
    source = read_gguf(write(tmp_path / "m.gguf", theirs(model), keys=keys))
    assert source.eos_token_ids == (end,) and source.tokenizer_json is not None
    again = parse_tokenizer(source.tokenizer_json, "again")
    rng = np.random.default_rng(0)
    letters = list("abcdefgh ABC  \n\t.,!?'0123456789éß中文😀")
    for _ in range(500):
        sample = "".join(rng.choice(letters, rng.integers(1, 40)))
        assert first.encode(sample) == again.encode(sample)
        assert again.decode(again.encode(sample)) == sample


@pytest.mark.parametrize(("pre", "added", "first"), [
    ("llama-bpe", None, 7), ("llama-bpe", False, None), ("gpt-2", None, None), ("gpt-2", True, 7),
])  # fmt: skip
def test_the_first_token_where_no_key_says(
    pre: str, added: bool | None, first: int | None, tmp_path: Path
) -> None:
    def keys(out: Any) -> None:
        tokens = ["a", "b", "ab", *map(chr, range(0x4E00, 0x4E00 + 92)), "<|endoftext|>"]
        words(out, tokens, ["a b"], pre)
        out.add_bos_token_id(7)
        if added is not None:
            out.add_add_bos_token(added)

    path = write(tmp_path / "m.gguf", theirs(random_model("Llama")), keys=keys)
    assert read_gguf(path).bos_token_id == first


def test_sentencepiece_by_scores(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    kinds = [2, 3, 3] + [6] * 256
    pieces = [*"▁abcd", "ab", "▁a", "abc", "▁ab", "cd"]
    scores = [0.0] * len(tokens) + [-100.0] * 5 + [-3.0, -2.0, -1.0, -4.0, -5.0]
    tokens, kinds = tokens + pieces, kinds + [1] * len(pieces)

    def keys(out: Any) -> None:
        out.add_tokenizer_model("llama")
        out.add_token_list(tokens)
        out.add_token_types(kinds)
        out.add_token_scores(scores)
        out.add_bos_token_id(1)
        out.add_eos_token_id(2)

    model = random_model("Llama", vocab_size=len(tokens))
    source = read_gguf(write(tmp_path / "m.gguf", theirs(model), keys=keys))
    assert source.bos_token_id == 1 and source.eos_token_ids == (2,)
    made = parse_tokenizer(source.tokenizer_json or "", "made")

    def cut(text: str) -> list[str]:
        return [tokens[i] for i in made.encode(text)]

    # ▁a (-2) is joined before ab (-3), so that abc (-1) cannot be made.
    assert cut("abc") == ["▁ab", "c"] and cut("dabcd") == ["▁", "d", "abc", "d"]
    assert cut("é") == ["▁", "<0xC3>", "<0xA9>"]
    assert made.decode(made.encode("dab é cd")) == "dab é cd"


# ---- hostile files ------------------------------------------------------------------


def changed(path: Path, old: bytes, new: bytes) -> None:
    """Replace the first place of some bytes."""
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new, 1))


def at(path: Path, place: int, new: bytes) -> None:
    """Overwrite bytes."""
    raw = bytearray(path.read_bytes())
    raw[place : place + len(new)] = new
    path.write_bytes(raw)


HUGE = b"\xff\xff\xff\xff\xff\xff\xff\x7f"
NAME = b"blk.0.attn_q.weight"
DIMENSIONS = NAME + b"\2\0\0\0" + 2 * b"\x40\0\0\0\0\0\0\0"  # its type follows
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "magic": (lambda p: at(p, 0, b"GGML"), "not a GGUF"),
    "version": (lambda p: at(p, 4, b"\x01"), "version 1"),
    "tensors": (lambda p: at(p, 8, HUGE), "tensors: cut off"),
    "keys": (lambda p: at(p, 16, HUGE), "keys: cut off"),
    "string": (lambda p: at(p, 24, HUGE), "cut off, or a length"),
    "cut in the keys": (lambda p: p.write_bytes(p.read_bytes()[:100]), "cut off"),
    "cut in the data": (lambda p: p.write_bytes(p.read_bytes()[:-64]), "does not lie"),
    "architecture": (lambda p: changed(p, b"llama", b"mamba"), "architecture 'mamba'"),
    "axes": (lambda p: changed(p, NAME + b"\2", NAME + b"\xff"), "axes"),
    "dimension": (
        lambda p: changed(p, NAME + b"\2\0\0\0" + b"\x40\0\0\0\0\0\0\0",
                          NAME + b"\2\0\0\0" + HUGE), "the shape",
    ),
    "no dimension": (
        lambda p: changed(p, NAME + b"\2\0\0\0" + b"\x40", NAME + b"\2\0\0\0" + b"\0"),
        "the shape",
    ),
    "unknown tensor": (lambda p: changed(p, NAME, b"blk.0.attn_z.weight"), "attn_z"),
    "query norm": (lambda p: changed(p, b"blk.0.attn_norm", b"blk.0.x.q_norm_"), "x.q_norm"),
    "value type": (
        lambda p: changed(p, b"llama.context_length\4", b"llama.context_length\x63"),
        "unknown type",
    ),
    "blocks": (
        lambda p: changed(p, b"llama.block_count\4\0\0\0\3", b"llama.block_count\4\0\0\0\4"),
        "lacks blk.3",
    ),
    "no heads": (
        lambda p: changed(
            p, b"llama.attention.head_count\4\0\0\0\4", b"llama.attention.head_count\4\0\0\0\0"
        ),
        "m.gguf: ",
    ),
    **{
        f"type {kind}": (
            lambda p, kind=kind: changed(p, DIMENSIONS + b"\0", DIMENSIONS + bytes([kind])),
            f"of type {kind}, which",
        )
        for kind in (9, 15, 24, 26, 28, 200)  # Q8_1, Q8_K, I8, I32, F64, none
    },
    "a merge that is not UTF-8": (
        lambda p: changed(p, b"\3\0\0\0\0\0\0\0a b", b"\3\0\0\0\0\0\0\0a \xff"),
        "tokenizer cannot be built",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused(fault: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", theirs(random_model("Llama")), keys=some_words)
    FAULTS[fault][0](path)
    with pytest.raises(RefusedError, match=FAULTS[fault][1]) as caught:
        bring(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_every_changed_byte_is_an_error_or_harmless(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", theirs(random_model("Llama")), keys=some_words)
    raw, rng = path.read_bytes(), np.random.default_rng(0)
    head = raw.index(NAME) + 2000
    for place in rng.integers(0, head, 300).tolist():
        broken = bytearray(raw)
        broken[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        try:
            bring(path, tmp_path / "out", force=True)
        except (RefusedError, TokenizerError) as error:
            assert "\n" not in str(error)
