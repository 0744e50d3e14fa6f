"""Hugging Face folders, read and written, against transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitskip_cpu
from bitskip_export.foreign.convert import import_model
from bitskip_export.foreign.hf_read import read_huggingface
from bitskip_export.foreign.hf_write import pack_rows, write_huggingface
from bitskip_export.foreign.source import RefusedError
from bitskip_ref.arithmetic.quant import quantize_weights
from bitskip_ref.compare import difference
from bitskip_ref.config import HEAD_BITS, ModelConfig, small_twin
from bitskip_ref.folder import read_folder
from bitskip_ref.tensors import expected_tensors
from bitskip_text.tokenizer import TokenizerError
from tests.cli.conftest import write_model
from tests.helpers import random_folder
from tests.interop.blocks import (
    assert_close,
    distances,
    edit,
    load,
    random_model,
    save,
    torch,
)  # fmt: skip

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0,
    "original_max_position_embeddings": 2048,
}  # fmt: skip
STORIES = Path(bitskip_cpu.__file__).parent / "models/stories-24"
safetensors = pytest.importorskip("safetensors.numpy")


def bring(path: Path, out: Path, **options: Any) -> Path:
    """Import a Hugging Face folder."""
    import_model(read_huggingface(path), out, **options)
    return out


def quantized(path: Path, inverse: bool) -> Path:
    """Pack a saved float model's linear weights as the two classes of transformers store them."""
    file = path / "model.safetensors"
    tensors = safetensors.load_file(file)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        codes, alpha = quantize_weights(tensors[name])
        tensors[name] = pack_rows(codes)
        scale = np.float32(1) / alpha if inverse else alpha
        tensors[f"{name}_scale"] = np.array([scale], np.float32)
    safetensors.save_file(tensors, file, {"format": "pt"})
    return path


TERNARY = {
    "bitlinear": {"quant_method": "bitnet"},
    "offline": {
        "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline",
    },
    "online": {
        "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online",
    },
}  # fmt: skip


def ternary_model(path: Path, kind: str, form: str, **changes: Any) -> Path:
    """A random ternary model in one of the three forms."""
    save(random_model(kind, **changes), path, quantization_config=TERNARY[form])
    return path if form == "online" else quantized(path, inverse=form == "bitlinear")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", TERNARY)
@pytest.mark.parametrize("kind", ["BitNet", "Llama"])
def test_ternary_blocks_are_theirs(kind: str, form: str, tied: bool, tmp_path: Path) -> None:
    path = ternary_model(tmp_path / "hf", kind, form, tie_word_embeddings=tied)
    folder = bring(path, tmp_path / "out", head_format="float32")
    config = read_folder(folder).config
    assert config.linear == "ternary" and config.sub_norm == (kind == "BitNet")
    assert config.ffn == ("gated_relu2" if kind == "BitNet" else "swiglu")
    assert_close(distances(load(path), folder, length=4))


@pytest.mark.parametrize(("kind", "changes", "biases"), [
    ("Qwen2", {}, "qkv"), ("Qwen3", {"head_dim": 32}, "none"),
    ("Qwen3", {"head_dim": 16, "attention_bias": True}, "qkvo"),
    ("Llama", {"attention_bias": True}, "qkvo"),
], ids=str)  # fmt: skip
def test_biases_and_head_norms_are_theirs(
    kind: str, changes: dict[str, Any], biases: str, tmp_path: Path
) -> None:
    model = random_model(kind, **changes)
    folder = bring(save(model, tmp_path / "hf"), tmp_path / "out")
    config = read_folder(folder).config
    assert (config.biases, config.qk_norm) == (biases, kind == "Qwen3")
    assert distances(model, folder).max() < 1e-5
    # Planted: the biases or norms of queries and keys exchanged.
    swapped = safetensors.load_file(tmp_path / "hf/model.safetensors")
    at = "model.layers.1.self_attn."
    a, b = (
        (f"{at}q_norm.weight", f"{at}k_norm.weight") if kind == "Qwen3"
        else (f"{at}k_proj.bias", f"{at}v_proj.bias")
    )  # fmt: skip
    swapped[a], swapped[b] = swapped[b], swapped[a]
    safetensors.save_file(swapped, tmp_path / "hf/model.safetensors", {"format": "pt"})
    assert distances(model, bring(tmp_path / "hf", tmp_path / "other")).max() > 1e-3


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True}, {"head_dim": 32}, {"num_key_value_heads": None},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    {"rope_parameters": LLAMA3}, {"rope_parameters": YARN, "head_dim": 32},
    {"rope_parameters": YARN | {"attention_factor": 1.0, "beta_fast": 4.0}, "head_dim": 32},
], ids=str)  # fmt: skip
def test_float_blocks_are_theirs(changes: dict[str, Any], tmp_path: Path) -> None:
    path = save(random_model("Llama", **changes), tmp_path / "hf")
    folder = bring(path, tmp_path / "out")
    assert read_folder(folder).config.head_format == "float32"
    found = distances(load(path), folder)
    assert found.max() < 1e-5


def test_the_old_spelling_of_rope(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 50_000.0}
    path = save(random_model("Llama", rope_parameters=rope), tmp_path / "hf")
    new = read_huggingface(path).config
    edit(path / "config.json", rope_parameters=None, rope_theta=50_000.0, rope_scaling=None)
    assert read_huggingface(path).config == new and new.rope_theta == 50_000.0


def test_scaled_rope_is_seen_and_comes_back(tmp_path: Path) -> None:
    model = random_model("Llama", rope_parameters=LLAMA3)
    folder = bring(save(model, tmp_path / "hf"), tmp_path / "out")
    config = read_folder(folder).config
    assert config.rope_scaling == "llama3" and config.rope_factor == 8.0
    write_huggingface(read_folder(folder), tmp_path / "again")
    assert distances(load(tmp_path / "again"), folder).max() < 1e-5
    assert read_huggingface(tmp_path / "again").config == config
    edit(tmp_path / "hf/config.json", rope_parameters=LLAMA3 | {"factor": 4.0})
    assert distances(model, bring(tmp_path / "hf", tmp_path / "other")).max() > 1e-3
    edit(tmp_path / "hf/config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4})
    with pytest.raises(RefusedError, match="yarn lacks factor"):
        read_huggingface(tmp_path / "hf")
    edit(tmp_path / "hf/config.json", rope_parameters={"rope_type": "longrope", "rope_theta": 1e4})
    with pytest.raises(RefusedError, match="RoPE scaling of type 'longrope'"):
        read_huggingface(tmp_path / "hf")


def test_sharded_and_bfloat16_masters(tmp_path: Path) -> None:
    model = random_model("BitNet", tie_word_embeddings=True).to(torch.bfloat16)
    config = {"quantization_config": TERNARY["online"]}
    whole = save(model, tmp_path / "whole", **config)
    model.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    edit(tmp_path / "parts/config.json", **config)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    one, other = (
        read_folder(bring(p, tmp_path / f"{p.name}-out", head_format="float32"))
        for p in (whole, tmp_path / "parts")
    )
    assert one.config == other.config
    for name, t in one.tensors.items():
        assert difference(name, t, other.tensors[name]) is None
    assert_close(distances(load(whole), one.path, length=4))


def test_1bitllm_names(tmp_path: Path) -> None:
    path = ternary_model(tmp_path / "hf", "BitNet", "online", hidden_act="silu")
    expected = read_folder(bring(path, tmp_path / "a"))
    tensors = safetensors.load_file(path / "model.safetensors")
    renamed = {
        name.replace("attn_sub_norm", "inner_attn_ln").replace("ffn_sub_norm", "ffn_layernorm"): t
        for name, t in tensors.items()
    }
    safetensors.save_file(renamed, path / "model.safetensors", {"format": "pt"})
    edit(path / "config.json", quantization_config=None, model_type="llama", weight_bits=1,
         architectures=["BitnetForCausalLM"], input_bits=8)  # fmt: skip
    found = read_folder(bring(path, tmp_path / "b"))
    assert found.config == expected.config and found.config.ffn == "swiglu"
    for name, t in expected.tensors.items():
        assert difference(name, t, found.tensors[name]) is None


def test_stops_are_those_of_generation_config(tmp_path: Path) -> None:
    path = save(random_model("Llama"), tmp_path / "hf")
    assert read_huggingface(path).eos_token_ids == (3, 5)
    edit(path / "generation_config.json", eos_token_id=[7, 9])
    assert read_huggingface(path).eos_token_ids == (7, 9)


def test_sampling_goes_in_and_out(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    path = save(random_model("Llama"), tmp_path / "hf")
    edit(path / "generation_config.json", do_sample=True, top_p=0.9)
    expected = {"temperature": 1.0, "top_k": 50, "top_p": 0.9}  # transformers' for what lacks
    folder = read_folder(bring(path, tmp_path / "ours"))
    assert folder.sampling == expected
    write_huggingface(folder, tmp_path / "again")
    assert GenerationConfig.from_pretrained(tmp_path / "again").top_p == 0.9
    assert read_huggingface(tmp_path / "again").sampling == expected
    edit(path / "generation_config.json", do_sample=True, top_p=2)
    with pytest.raises(RefusedError, match="top-p"):
        read_huggingface(path)


# ---- planted mistakes ---------------------------------------------------------------


def test_an_inverted_scale_is_seen(tmp_path: Path) -> None:
    path = ternary_model(tmp_path / "hf", "Llama", "offline")
    theirs = load(path)
    edit(path / "config.json", quantization_config=TERNARY["bitlinear"])
    folder = bring(path, tmp_path / "out", head_format="float32")
    with pytest.raises(AssertionError):
        assert_close(distances(theirs, folder, length=4))


def test_a_wrong_activation_is_seen(tmp_path: Path) -> None:
    path = ternary_model(tmp_path / "hf", "BitNet", "offline")
    theirs = load(path)
    edit(path / "config.json", hidden_act="silu")
    folder = bring(path, tmp_path / "out", head_format="float32")
    with pytest.raises(AssertionError):
        assert_close(distances(theirs, folder, length=4))


@pytest.mark.parametrize("tied", [False, True])
def test_a_bfloat16_head_stays(tied: bool, tmp_path: Path) -> None:
    """As the file has it, and out again; int8 only where that is wanted."""
    model = random_model("Llama", tie_word_embeddings=tied).to(torch.bfloat16)
    source = read_huggingface(save(model, tmp_path / "hf"))
    report = import_model(source, tmp_path / "a", linear="float32")
    assert "kept: embedding and head: BF16 as bfloat16" in report.lines()
    folder = read_folder(tmp_path / "a")
    assert folder.config.head_format == "bfloat16"
    theirs = model.state_dict()["model.embed_tokens.weight"].view(torch.int16).numpy()
    assert np.array_equal(folder.tensors["embed_tokens.weight"], theirs.view(np.uint16))
    write_huggingface(folder, tmp_path / "out")
    again = load(tmp_path / "out").to(torch.bfloat16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(again.state_dict()[name], model.state_dict()[name])
    report = import_model(source, tmp_path / "b", linear="float32", head_format="float16")
    assert "converted: embedding and head: BF16 to float16" in report.lines()
    import_model(source, tmp_path / "c", linear="int8")
    assert read_folder(tmp_path / "c").config.head_format == "int8"


# ---- written ------------------------------------------------------------------------

LLAMA = small_twin("bitskip-v1")
BITNET = small_twin("bitnet-2b4t").replace(hidden_size=64)
GIVEN: dict[str, ModelConfig] = {
    "llama": LLAMA.replace(head_format="float32"),
    "llama-int8": LLAMA,
    "llama-int4": LLAMA.replace(head_format="int4"),
    "llama-float16": LLAMA.replace(head_format="float16"),
    "llama-bfloat16": LLAMA.replace(head_format="bfloat16"),
    "llama-relu2": LLAMA.replace(ffn="gated_relu2", head_format="float32"),
    "llama-float": small_twin("llama3"),
    "llama-biases": small_twin("llama3").replace(biases="qkvo"),
    "qwen2": small_twin("llama3").replace(biases="qkv"),
    "qwen3": small_twin("llama3").replace(qk_norm=True),
    "bitnet": BITNET.replace(head_format="float32"),
    "bitnet-silu": BITNET.replace(ffn="swiglu", tie_word_embeddings=False, head_format="float32"),
    "bitnet-float": BITNET.replace(linear="float32", head_format="float32"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_written_comes_back(name: str, tmp_path: Path) -> None:
    first = read_folder(random_folder(tmp_path / "model", GIVEN[name]))
    write_huggingface(first, tmp_path / "hf")
    if first.config.head_format not in HEAD_BITS:
        assert_close(distances(load(tmp_path / "hf"), first.path, length=4))
    again = read_folder(bring(tmp_path / "hf", tmp_path / "again"))
    assert again.config == first.config and again.eos_token_id == first.eos_token_id
    for key, t in first.tensors.items():
        assert difference(key, t, again.tensors[key]) is None


def test_an_exit_is_written_as_a_model(tmp_path: Path) -> None:
    config = LLAMA.replace(
        exit_norm="per_layer", exit_head="per_layer", gates=True, head_format="float32"
    )
    full = read_folder(random_folder(tmp_path / "model", config))
    report = write_huggingface(full, tmp_path / "hf", exit_layer=2)
    assert len(report.dropped) == 3
    cut = bitskip_ref_logits(bring(tmp_path / "hf", tmp_path / "cut"), None)
    assert np.array_equal(cut, bitskip_ref_logits(full.path, 2))


def bitskip_ref_logits(path: Path, exit_layer: int | None) -> np.ndarray:
    """Of the reference, f32 [T, V]."""
    from bitskip_ref.model import load as load_reference

    return load_reference(path).logits([1, 2, 3, 4, 5], exit_layer)


@pytest.mark.parametrize(("name", "words"), [
    ("bitskip-v2", "hadamard"), ("wt2-baseline", "layer norms"), ("odd", "qk_norm with biases"),
], ids=str)  # fmt: skip
def test_what_transformers_cannot_compute_is_refused(name: str, words: str, tmp_path: Path) -> None:
    odd = small_twin("llama3").replace(biases="qkv", qk_norm=True)
    config = odd if name == "odd" else small_twin(name)
    folder = read_folder(random_folder(tmp_path / "model", config))
    with pytest.raises(RefusedError, match=words):
        write_huggingface(folder, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_the_shipped_model_there_and_back(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    shipped = read_folder(STORIES)
    write_huggingface(shipped, tmp_path / "hf")
    assert "pipeline_tag: text-generation" in (tmp_path / "hf/README.md").read_text()
    again = read_folder(bring(tmp_path / "hf", tmp_path / "again"))
    assert again.config == shipped.config.replace(gates=False)
    for key in expected_tensors(again.config):
        assert difference(key, shipped.tensors[key], again.tensors[key]) is None
    assert (again.eos_token_id, again.bos_token_id) == (shipped.eos_token_id, None)
    assert again.draft_vocab == shipped.draft_vocab

    ours, theirs = bitskip_cpu.load(tmp_path / "again"), load(tmp_path / "hf")
    text = ours.generate("Once upon a time", max_tokens=60, temperature=0.9).text
    words = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert words(text).input_ids == ours.tokenizer.encode(text)
    assert words.eos_token_id == shipped.eos_token_id
    same, losses = [], []
    for seed in range(4):  # texts of the model's own: 4 x 250 tokens
        told = ours.generate("Once upon a time", max_tokens=250, temperature=1.0, seed=seed)
        ids = ours.tokenizer.encode("Once upon a time") + told.token_ids
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0].numpy()
        both = [logits[:-1].astype(np.float64), ours.logits(ids)[:-1].astype(np.float64)]
        same.append(both[0].argmax(1) == both[1].argmax(1))
        chosen = np.arange(len(ids) - 1), np.array(ids[1:])
        losses.append([np.log(np.exp(z).sum(1)) - z[chosen] for z in both])
    # 99 % and 0.002 nats on held-out text; on text drawn from the model more choices are even.
    assert np.concatenate(same).mean() >= 0.98
    means = np.concatenate(losses, axis=1).mean(1)
    assert abs(means[0] - means[1]) < 0.005


def test_transformers_begins_texts_as_the_folder_says(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = small_twin("llama3").replace(vocab_size=320)
    write_model(tmp_path / "m", config, bos_token_id=5)
    write_huggingface(read_folder(tmp_path / "m"), tmp_path / "first")
    ids = AutoTokenizer.from_pretrained(tmp_path / "first")("the cat").input_ids
    assert ids[0] == 5 and ids[1:] == bitskip_cpu.load(tmp_path / "m").tokenizer.encode("the cat")
    again = read_folder(bring(tmp_path / "first", tmp_path / "again"))
    assert again.bos_token_id == 5
    # A folder that begins with none, whose tokenizer.json would.
    words = (tmp_path / "first" / "tokenizer.json").read_text()
    write_model(tmp_path / "m", config, tokenizer_json=words)
    write_huggingface(read_folder(tmp_path / "m"), tmp_path / "none")
    assert AutoTokenizer.from_pretrained(tmp_path / "none")("the cat").input_ids == ids[1:]
    write_model(tmp_path / "m", config, bos_token_id=319)
    with pytest.raises(RefusedError, match="no token of id 319"):
        write_huggingface(read_folder(tmp_path / "m"), tmp_path / "no")
    write_model(tmp_path / "m", config.replace(vocab_size=299))  # of 300 tokens
    with pytest.raises(TokenizerError, match="belongs to another model"):
        write_huggingface(read_folder(tmp_path / "m"), tmp_path / "no")
