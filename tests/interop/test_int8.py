"""Float models imported as int8 rows, rotated (SPEC 4.8, 5.3, 5.4)."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from bitskip_export.foreign import convert
from bitskip_export.foreign.convert import import_model
from bitskip_export.foreign.hf_read import read_huggingface
from bitskip_export.foreign.hf_write import write_huggingface
from bitskip_export.foreign.source import RefusedError
from bitskip_ref.arithmetic.hadamard import rotate_unpadded
from bitskip_ref.folder import read_folder
from bitskip_ref.model import ReferenceModel
from tests.interop.blocks import random_model, save
from tests.interop.test_huggingface import ternary_model


def relative(folder: Path, exact: Path) -> float:
    """Root mean square of the difference of two folders' logits, over that of the second."""
    a, b = (
        ReferenceModel(f.config, f.tensors).logits(list(range(40)))
        for f in map(read_folder, (folder, exact))
    )
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


@pytest.mark.parametrize("width", [64, 80, 72])
def test_int8_is_near_the_floats(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"hidden_size": width, "intermediate_size": 112, "head_dim": 16}
    source = read_huggingface(save(random_model("Qwen2", **shape), tmp_path / "hf"))
    import_model(source, tmp_path / "float", linear="float32")
    report = import_model(source, tmp_path / "int8", linear="int8")
    assert any("int8 rows, rotated" in line for line in report.lines())
    config = read_folder(tmp_path / "int8").config
    assert config.linear == config.head_format == "int8" and config.rotated_head
    assert config.linear_shapes()["down_proj"][1] == 112  # nothing is padded
    assert relative(tmp_path / "int8", tmp_path / "float") < 0.1
    # Planted: weights that are not turned, and an embedding that is not.
    monkeypatch.setattr(convert, "rotated", lambda weight: weight)
    import_model(source, tmp_path / "wrong", linear="int8")
    assert relative(tmp_path / "wrong", tmp_path / "float") > 0.5


def test_turning_pays_where_one_value_is_large() -> None:
    """What it is for: outliers among activations take all codes of the others otherwise."""
    from bitskip_ref.arithmetic.quant import int8_linear, quantize_activations

    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 576), np.float32)
    x[:, 100] *= 100
    w = rng.standard_normal((64, 576), np.float32)

    def off(x_: np.ndarray, w_: np.ndarray) -> float:
        codes, steps = quantize_activations(w_, 8)
        error = int8_linear(x_, codes, steps[:, 0]) - x @ w.T
        return float(np.sqrt(np.mean(error**2)))

    assert 3 * off(rotate_unpadded(x), rotate_unpadded(w)) < off(x, w)


def test_what_is_asked_for_is_taken(tmp_path: Path) -> None:
    source = read_huggingface(save(random_model("Llama"), tmp_path / "hf"))
    import_model(source, tmp_path / "a", linear="int8", head_format="float16")
    folder = read_folder(tmp_path / "a")
    assert folder.config.head_format == "float16" and not folder.config.rotated_head
    write_huggingface(folder, tmp_path / "out")  # linear layers as floats, the head as it was
    assert read_huggingface(tmp_path / "out").config.head_format == "float16"
    wide = source.config.replace(intermediate_size=257 * 4)
    assert not convert.chosen(wide, "int8", None).hadamard  # an odd part above 255
    ternary = read_huggingface(ternary_model(tmp_path / "t", "Llama", "offline"))
    assert convert.usual(ternary) == "ternary" and convert.usual(source) == "int8"
    with pytest.raises(RefusedError, match="kept so, not made int8"):
        import_model(ternary, tmp_path / "b", linear="int8")


@pytest.mark.parametrize("linear", ["int8", "float32"])
def test_memory_is_that_of_the_largest_tensor(linear: str, tmp_path: Path) -> None:
    """Beside what is mapped: at most 1.6 times the largest tensor as float32."""
    shape = {"vocab_size": 16_000, "hidden_size": 256, "intermediate_size": 8000}
    path = save(random_model("Llama", **shape, num_attention_heads=4), tmp_path / "hf")
    largest = 4 * 16_000 * 256
    tracemalloc.start()
    import_model(read_huggingface(path), tmp_path / "out", linear=linear)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (path / "model.safetensors").stat().st_size > 5 * largest
    assert peak < 1.6 * largest
