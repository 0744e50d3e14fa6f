"""The compiled engine has the reference's bits: this machine's best path, 1 and 2 threads."""

from __future__ import annotations

import numpy as np
import pytest

import bitskip_ref.arithmetic.attention
import bitskip_ref.model
from bitskip_cpu import workspace
from bitskip_cpu.engine import Engine
from bitskip_ref.arithmetic.hadamard import rotate, rotate_unpadded
from bitskip_ref.config import PRESETS
from bitskip_ref.model import ReferenceModel
from tests.helpers import OPTIONS, random_tensors, random_tokens, twin
from tests.parity.engine_check import SIZES, check, check_named, config_of, tensors_of

# Presets that differ in size alone have the same twin.
NAMES = list({config_of(name): name for name in [*PRESETS, *OPTIONS, *SIZES]}.values())


# Heads of every size, several groups of positions, heads that share keys and that do not.
SMALLER = [
    f"{name}:{kind}"
    for name in ("extreme", "long", "wide", "smallest", "wt2-bitskip")
    for kind in ("float16", "int8")
]


@pytest.mark.parametrize("name", [*NAMES, *SMALLER])
def test_bits_equal_the_reference(name: str) -> None:
    assert check_named(name) == []


def test_rows_of_a_large_embedding_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few at a time; what is computed stays the same."""
    returned: list[np.ndarray] = []
    monkeypatch.setattr(workspace, "SPARSE", 1)
    monkeypatch.setattr(workspace, "give_back", returned.append)
    config, tensors = twin("bitskip-v1"), random_tensors(twin("bitskip-v1"))
    ids = random_tokens(config, 40)
    found = Engine(config, tensors, 1).logits(ids)
    assert [r is tensors["embed_tokens.weight"] for r in returned] == [True, True]  # 16, 32
    assert np.array_equal(found, ReferenceModel(config, tensors).logits(ids))


def test_another_kind_of_cache_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether something was rounded must show: in the cache, and behind it, not before."""
    monkeypatch.setattr(bitskip_ref.model, "half", lambda x: x)
    problems = check(config_of("bitskip-v1"), tensors_of("bitskip-v1"), [1], kv_cache="float16")
    assert any("cache 0: keys" in line for line in problems)
    assert any("layers.0.attn" in line for line in problems)
    assert not any("layers.0.k" in line or "layers.0.v" in line for line in problems)


@pytest.mark.parametrize("name", ["LARGEST_WEIGHT", "SOFTMAX_UNIT"])
def test_other_sums_over_an_int8_cache_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, or exponentials, that are rounded otherwise show behind a cache that is the same."""
    monkeypatch.setattr(bitskip_ref.arithmetic.attention, name, np.float32(32767))
    problems = check(config_of("bitskip-v1"), tensors_of("bitskip-v1"), [1], kv_cache="int8")
    assert any("layers.0.attn" in line for line in problems)
    assert not any("cache 0" in line for line in problems)


def test_a_flipped_weight_code_is_seen() -> None:
    right = tensors_of("bitskip-v1")
    wrong = dict(right)
    name = "layers.3.down_proj.weight"
    wrong[name] = right[name].copy()
    wrong[name][5, 7] ^= np.uint8(1 if right[name][5, 7] & 3 < 2 else 2)
    problems = check(config_of("bitskip-v1"), wrong, [1], against=right)
    assert any("layers.3.out" in line for line in problems)
    assert not any("layers.3.act" in line for line in problems if "whole" in line)


def test_a_swapped_butterfly_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(x: np.ndarray) -> np.ndarray:
        y = rotate(x)
        y[..., 1] = -y[..., 1]
        return y

    monkeypatch.setattr(bitskip_ref.model, "rotate", swapped)
    problems = check(config_of("bitskip-v3"), tensors_of("bitskip-v3"), [1])
    assert any("layers.0.q" in line for line in problems)


@pytest.mark.parametrize("stage", ["embed", "layers.0.q", "logits"])
def test_another_rotation_without_padding_is_seen(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def swapped(x: np.ndarray) -> np.ndarray:
        """A changed sign in one place of the three: embedding, first linear, head."""
        nonlocal calls
        y = rotate_unpadded(x)
        place = "embed" if not calls else "layers.0.q" if calls == 1 else "logits"
        calls += 1
        if place == stage:
            y[..., 1] = -y[..., 1]
        return y

    config = config_of("int8").replace(num_hidden_layers=1)
    tensors = random_tensors(config)
    right = Engine(config, tensors, 1).logits([1, 2, 3])
    reference = bitskip_ref.model.ReferenceModel(config, tensors)
    assert np.array_equal(reference.logits([1, 2, 3]), right)
    monkeypatch.setattr(bitskip_ref.model, "rotate_unpadded", swapped)
    assert not np.array_equal(reference.logits([1, 2, 3]), right)


def test_a_wrong_norm_of_one_exit_is_seen() -> None:
    right = tensors_of("per-layer-exits")
    wrong = right | {"exits.2.norm.weight": right["exits.3.norm.weight"]}
    problems = check(config_of("per-layer-exits"), wrong, [1], against=right)
    assert any("exit 2" in line for line in problems)
    assert not any(part in line for line in problems for part in ("exit 1", "exit 3", "whole"))


def test_a_wrong_block_of_one_exit_is_seen() -> None:
    right = tensors_of("exit-blocks")
    name = "exits.3.block.down_proj.scale"
    problems = check(config_of("exit-blocks"), right | {name: right[name] * 2}, [1], against=right)
    assert any("exit 3" in line for line in problems)
    assert not any(part in line for line in problems for part in ("exit 1", "exit 2", "whole"))


def test_float_exit_blocks() -> None:
    config = config_of("layerskip").replace(exit_blocks=(1, 3))
    tensors = random_tensors(config)
    assert check(config, tensors, [1]) == []


def test_what_kernels_stream_starts_at_a_cache_line() -> None:
    config = twin("bitskip-v1").replace(head_format="int4")
    engine = Engine(config, random_tensors(config, 0))
    cache, (head, _) = engine.new_cache(), engine.weights.head("lm_head")
    for array in (engine.weights.linear, head, cache.pages.memory[-1]):
        assert array.ctypes.data % 64 == 0
