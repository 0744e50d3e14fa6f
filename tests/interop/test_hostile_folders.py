"""Hugging Face folders that are damaged or lie: one clear error each, nothing left behind."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitskip_export.foreign.hf_read import read_huggingface
from bitskip_export.foreign.safetensors_shards import open_shards
from bitskip_export.foreign.source import RefusedError
from bitskip_ref.tensors import FormatError
from bitskip_text.tokenizer import TokenizerError, parse_tokenizer
from tests.interop.blocks import edit
from tests.interop.test_huggingface import bring, ternary_model
from tests.text.tokenizers_of_all_kinds import KINDS

safetensors = pytest.importorskip("safetensors.numpy")


def change_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header of a folder's safetensors file."""
    file = path / "model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def change_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Rewrite a folder's tensors."""
    tensors = safetensors.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.save_file(tensors, path / "model.safetensors", {"format": "pt"})


def cut(path: Path, size: int) -> None:
    """Shorten the weights' file."""
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


Q = "model.layers.1.self_attn.q_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "cannot be read"),
    "nested config": (lambda p: (p / "config.json").write_text("[" * 100_000), "as JSON"),
    "config of bytes": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe{"), "as JSON"),
    "other model": (lambda p: edit(p / "config.json", model_type="gpt2"), "model_type 'gpt2'"),
    "gelu": (lambda p: edit(p / "config.json", hidden_act="gelu"), "hidden_act 'gelu'"),
    "biases": (
        lambda p: edit(p / "config.json", attention_bias=True),
        "biases beside ternary weights",
    ),
    "biases in the FFN": (lambda p: edit(p / "config.json", mlp_bias=True), "biases in the FFN"),
    "a bias of up": (
        lambda p: change_tensors(
            p, lambda t: t.update({"model.layers.1.mlp.up_proj.bias": np.ones(96, np.float32)})
        ),
        "biases there are not known",
    ),
    "sliding windows": (
        lambda p: edit(p / "config.json", layer_types=["full_attention", "sliding_attention"]),
        "full attention",
    ),
    "no width": (lambda p: edit(p / "config.json", hidden_size=None), "lacks hidden_size"),
    "text width": (lambda p: edit(p / "config.json", hidden_size="64"), "type int"),
    "absurd blocks": (lambda p: edit(p / "config.json", num_hidden_layers=4096), "lacks tensors"),
    "more blocks": (lambda p: edit(p / "config.json", num_hidden_layers=4), "lacks tensor"),
    "absurd context": (
        lambda p: edit(p / "config.json", max_position_embeddings=(1 << 24) - 1),
        "max_position_embeddings = 16777215 takes",
    ),
    "a shape that is none": (
        lambda p: change_header(
            p, lambda h: h["model.norm.weight"].update(shape={}, data_offsets=[0, 4])
        ),
        "does not lie where the header says",
    ),
    "fewer blocks": (lambda p: edit(p / "config.json", num_hidden_layers=2), "has no place"),
    "no heads": (lambda p: edit(p / "config.json", num_attention_heads=0), "config.json"),
    "other vocabulary": (lambda p: edit(p / "config.json", vocab_size=97), "asks for"),
    "group scales": (
        lambda p: change_tensors(p, lambda t: t.update({f"{Q}_scale": np.ones(4, np.float32)})),
        "4 scales",
    ),
    "scale of zero": (
        lambda p: change_tensors(p, lambda t: t.update({f"{Q}_scale": np.zeros(1, np.float32)})),
        "must be positive",
    ),
    "scale not finite": (
        lambda p: change_tensors(
            p, lambda t: t.update({f"{Q}_scale": np.full(1, np.nan, np.float32)})
        ),
        "not finite",
    ),
    "no scale": (lambda p: change_tensors(p, lambda t: t.pop(f"{Q}_scale")), "no weight_scale"),
    "code 3": (lambda p: change_tensors(p, lambda t: t[Q].__setitem__(0, 255)), "code 3"),
    "a norm of NaN": (
        lambda p: change_tensors(p, lambda t: t["model.norm.weight"].__setitem__(0, np.nan)),
        "not finite",
    ),
    "query norm": (
        lambda p: change_tensors(
            p, lambda t: t.update({Q.replace("q_proj", "q_norm"): np.ones(16, np.float32)})
        ),
        "has no place",
    ),
    "unknown tensor": (
        lambda p: change_tensors(p, lambda t: t.update(extra=np.ones(1, np.float32))),
        "extra",
    ),
    "wrong eos": (lambda p: edit(p / "generation_config.json", eos_token_id=96), "eos_token_id"),
    "gptq": (
        lambda p: edit(p / "config.json", quantization_config={"quant_method": "gptq"}),
        "gptq",
    ),
    "norm in linears": (
        lambda p: edit(
            p / "config.json",
            quantization_config={"quant_method": "bitnet", "use_rms_norm": True},
        ),
        "norm inside each linear",
    ),
    "large template": (
        lambda p: (p / "chat_template.jinja").write_text("x" * ((1 << 20) + 1)),
        "would have 1048577 bytes",
    ),
    "a template that is no Unicode": (
        lambda p: (p / "tokenizer_config.json").write_text(r'{"chat_template": "\ud800"}'),
        "would not be valid Unicode",
    ),
    "tokenizer": (lambda p: (p / "tokenizer.json").write_text("{}"), "not a tokenizer"),
    "empty": (lambda p: cut(p, 0), "truncated"),
    "short header": (lambda p: cut(p, 100), "truncated"),
    "short data": (lambda p: cut(p, -1), "cut off"),
    "huge header": (
        lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"{}"),
        "truncated",
    ),
    "product overflows": (
        lambda p: change_header(p, lambda h: h[Q].update(shape=[1 << 40, 1 << 40])),
        "lie",
    ),
    "negative": (lambda p: change_header(p, lambda h: h[Q].update(shape=[-16, -64])), "lie"),
    "offsets": (
        lambda p: change_header(p, lambda h: h[Q].update(data_offsets=[1 << 60, 1 << 61])),
        "lie",
    ),
    "dtype": (lambda p: change_header(p, lambda h: h[Q].update(dtype="F8_E4M3")), "F8_E4M3"),
    "entry": (lambda p: change_header(p, lambda h: h.update({Q: 5})), "damaged"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused(fault: str, tmp_path: Path) -> None:
    path = ternary_model(tmp_path / "hf", "Llama", "offline")
    FAULTS[fault][0](path)
    refusals = (RefusedError, FormatError, TokenizerError)
    with pytest.raises(refusals, match=FAULTS[fault][1]) as caught:
        bring(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]  # nothing is left


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    path = ternary_model(tmp_path / "hf", "Llama", "offline")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(RefusedError, match="pickle"):
        read_huggingface(path)


def test_an_index_cannot_lead_elsewhere(tmp_path: Path) -> None:
    path = ternary_model(tmp_path / "hf", "Llama", "offline")
    (path / "model.safetensors").rename(tmp_path / "other.safetensors")
    index = {"weight_map": {Q: "../other.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RefusedError, match="not the name of a file"):
        read_huggingface(path)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"], ids=["long", "null"])
def test_an_index_of_impossible_names(name: str, tmp_path: Path) -> None:
    path = ternary_model(tmp_path / "hf", "Llama", "offline")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q: name}}))
    with pytest.raises(RefusedError, match="which its index names") as caught:
        read_huggingface(path)
    assert len(str(caught.value)) < 500


def test_every_changed_byte_of_a_header_is_an_error_or_harmless(tmp_path: Path) -> None:
    path = ternary_model(tmp_path / "hf", "Llama", "offline")
    file = path / "model.safetensors"
    raw = file.read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    rng = np.random.default_rng(0)
    for at in rng.integers(0, size, 150).tolist():
        changed = bytearray(raw)
        changed[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(changed)
        with suppress(RefusedError):
            bring(path, tmp_path / "out", force=True)


# ---- what would cost much, or run wrongly -----------------------------------------------


def test_parts_at_odd_places_are_not_copied(tmp_path: Path) -> None:
    names = "abcdefgh"
    header = {
        n: {"dtype": "F32", "shape": [1 << 17], "data_offsets": [i << 19, (i + 1) << 19]}
        for i, n in enumerate(names)
    }
    text = json.dumps(header).encode()
    text += b" " * ((1 - len(text)) % 4)  # data from no multiple of four on
    body = np.arange(8 << 17, dtype=np.float32).tobytes()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)
    tracemalloc.start()
    tensors = open_shards(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert (tensors["b"].floats().rows(5, 7) == [(1 << 17) + 5, (1 << 17) + 6]).all()
    change_header(tmp_path, lambda h: h["b"].update(data_offsets=h["a"]["data_offsets"]))
    with pytest.raises(RefusedError, match="'b' lies where 'a' does"):
        open_shards(tmp_path)


def test_a_tied_head_of_its_own_is_refused(tmp_path: Path) -> None:
    path = ternary_model(tmp_path / "hf", "Llama", "offline")
    edit(path / "config.json", tie_word_embeddings=True)
    change_tensors(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 1}))
    assert "lm_head" in read_huggingface(path).report.dropped[0]
    change_tensors(path, lambda t: t["lm_head.weight"].__setitem__((3, 3), 7))
    with pytest.raises(RefusedError, match=r"lm_head\.weight is another matrix"):
        read_huggingface(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "from layer to layer"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0},
             "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "differ in factor",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "a part of each head"),
        ({"use_sliding_window": True}, "sliding-window"),
    ],
)  # fmt: skip
def test_rope_that_is_not_clear_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = ternary_model(tmp_path / "hf", "Llama", "offline")
    edit(path / "config.json", **{"rope_parameters": None, "rope_theta": 10_000.0} | changes)
    with pytest.raises(RefusedError, match=words):
        read_huggingface(path)


def test_templates_that_add_without_end_are_refused(tmp_path: Path) -> None:
    path = ternary_model(tmp_path / "hf", "Llama", "offline")
    stored = json.loads(KINDS["byte-level"]().to_str())
    text = {"Sequence": {"id": "A", "type_id": 0}}
    stored["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "Z", "type_id": 0}}] * 20_000 + [text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"Z": {"id": "Z", "ids": [0] * 20_000, "tokens": ["a"] * 20_000}},
    }
    (path / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(RefusedError, match="adds 400000000 ids"):
        read_huggingface(path)


def test_the_first_token_is_the_tokenizers(tmp_path: Path) -> None:
    path = ternary_model(tmp_path / "hf", "Llama", "offline")
    (path / "tokenizer.json").write_text(KINDS["byte-level"]().to_str())
    words = parse_tokenizer((path / "tokenizer.json").read_text(), "").vocabulary()
    (path / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "b"}')
    edit(path / "config.json", bos_token_id=words["c"])
    assert read_huggingface(path).bos_token_id == words["b"]
    (path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    assert read_huggingface(path).bos_token_id == words["c"]
