"""PyTorch's exact arithmetic against the reference: bits, dtypes, shapes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bitskip_ref.arithmetic import functions, norms, quant
from bitskip_ref.arithmetic.confidence import confidence
from bitskip_ref.arithmetic.hadamard import rotate
from bitskip_ref.arithmetic.sums import feature_sum, position_sum
from bitskip_ref.compare import difference
from bitskip_ref.config import ModelConfig
from bitskip_ref.exits import ConfidenceExit, FixedExit, GateExit
from bitskip_ref.model import ReferenceModel
from bitskip_train import exact, load_exported
from bitskip_train.layers import Cache
from bitskip_train.loaded import TorchEngine
from bitskip_train.model import BitskipModel
from tests.helpers import (
    OPTIONS,
    QUANTIZED,
    random_folder,
    random_parameters,
    random_tensors,
    random_tokens,
    twin,
)
from tests.parity.engine_check import exits_of

f32 = np.float32
NAMES = [*QUANTIZED, *OPTIONS]
SMALLER = [(n, kind) for n in ("bitskip-v1", "wt2-bitskip") for kind in ("float16", "int8")]


def equal(expected: np.ndarray, actual: np.ndarray | torch.Tensor, name: str = "values") -> None:
    assert (report := difference(name, expected, np.asarray(actual))) is None, report


def engines(name: str, kv_cache: str = "float32") -> tuple[ReferenceModel, TorchEngine]:
    config = twin(name)
    tensors = random_tensors(config)
    return ReferenceModel(config, tensors, kv_cache), TorchEngine(config, tensors, kv_cache)


def stages(
    model: ReferenceModel | TorchEngine, ids: list[int], exit_layer: int | None = None
) -> dict[str, np.ndarray]:
    """All that a trace reports of a whole prompt."""
    seen: dict[str, np.ndarray] = {}
    model.extend(
        ids, model.new_cache(), exit_layer=exit_layer,
        trace=lambda name, x: seen.update({name: x.copy()}),
    )  # fmt: skip
    return seen


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def numbers() -> np.ndarray:
    """f32 [64, 48] of many magnitudes: both zeros, subnormals, a zero row, ties, large values."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((64, 48)) * 10.0 ** rng.integers(-3, 3, (64, 48))
    x[0] = 0.0
    x[1, :4] = -0.0, 1e-40, -1e-45, 0.5
    x[2] = np.arange(48) - 23.5
    x[3] = 1e-7
    return x.astype(f32)


def test_functions(numbers: np.ndarray) -> None:
    x = torch.from_numpy(numbers)
    ops = exact.ExactOps()
    wide = np.random.default_rng(0).uniform(-100, 100, 1 << 16).astype(f32)
    equal(functions.exp(wide), exact.exp(torch.from_numpy(wide)))
    cache = Cache(twin("bitskip-v1"), kv_cache="float16")
    shape = (
        2,
        -1,
        *cache.arrays["keys"].shape[-2:],
    )  # tests 6.5 with ties, subnormals and what is too large
    near = np.concatenate([np.ldexp(wide, -30), wide * 1e4, np.rint(wide * 64) + 0.5]).astype(f32)
    near = near[: near.size // 4096 * 4096].reshape(shape)
    kept = torch.zeros(1, 1, near.shape[1], *shape[2:], dtype=torch.float16)
    cache.arrays = {"keys": kept, "values": kept}
    for part in near:
        kept, _ = cache.write(0, 0, *[torch.from_numpy(part)[None]] * 2)
        equal(functions.half(part).astype(f32), kept[0])
    equal(functions.log(abs(wide)), exact.log(torch.from_numpy(abs(wide))))
    for row in (*numbers, numbers[0, :1], wide):
        for name, value in confidence(row).items():
            equal(np.asarray(value), exact.confidence(torch.from_numpy(row), name), name)
    for name in ("sigmoid", "silu", "relu2"):
        equal(getattr(functions, name)(numbers), getattr(ops, name)(x), name)
    equal(feature_sum(numbers), exact.feature_sum(x))
    equal(position_sum(numbers[:, :5]), exact.position_sum(x[:, :5]))
    w, b = numbers[5], numbers[6]
    tw, tb = torch.from_numpy(w), torch.from_numpy(b)
    equal(norms.rms_norm(numbers, w, 1e-5), ops.norm(x, tw, None, 1e-5))
    equal(norms.layer_norm(numbers, w, b, 1e-5), ops.norm(x, tw, tb, 1e-5))
    equal(rotate(numbers), ops.rotate(x, {}))


def test_quantizers(numbers: np.ndarray) -> None:
    x = torch.from_numpy(numbers)
    for bits in (8, 4):
        codes, step = exact.quantize(x, bits)
        expected, expected_step = quant.quantize_activations(numbers, bits)
        equal(expected, codes.to(torch.int8))
        equal(expected_step, step)
    for w in (numbers, numbers[4:], np.zeros((3, 5), f32), numbers[2:3]):
        codes, alpha = quant.quantize_weights(w)
        made = exact.ExactOps().prepare([torch.from_numpy(w)], [None])
        equal(codes, made.codes.to(torch.int8))
        equal(np.full(len(w), alpha), made.alpha)


@pytest.mark.parametrize(("name", "kv_cache"), [*((n, "float32") for n in NAMES), *SMALLER])
def test_every_stage_equals_the_reference(name: str, kv_cache: str, threads: int) -> None:
    reference, engine = engines(name, kv_cache)
    ids = random_tokens(reference.config, 19)
    for exit_layer in (2, None):
        expected = stages(reference, ids, exit_layer)
        actual = stages(engine, ids, exit_layer)
        assert list(actual) == list(expected)
        for stage, x in expected.items():
            equal(x, actual[stage], stage)


@pytest.mark.parametrize(("name", "kv_cache"), [*((n, "float32") for n in NAMES), *SMALLER])
def test_token_by_token(name: str, kv_cache: str) -> None:
    reference, engine = engines(name, kv_cache)
    ids = random_tokens(reference.config, 9)
    whole = reference.logits(ids)
    cache = engine.new_cache()
    parts = [engine.extend(ids[:4], cache)] + [engine.extend([t], cache) for t in ids[4:]]
    equal(whole, np.concatenate(parts))
    last = engine.extend(ids, engine.new_cache(), last_only=True)
    equal(whole[-1:], last)


@pytest.mark.parametrize("name", ["bitskip-v2", "wt2-bitskip", "per-layer-exits"])
def test_batch_equals_single(name: str) -> None:
    _, engine = engines(name)
    ids = torch.tensor([random_tokens(engine.config, 11, seed) for seed in range(5)])
    together = engine.model(ids, collect=(1, 3))
    for b in range(len(ids)):
        alone = engine.model(ids[b : b + 1], collect=(1, 3))
        for n, hidden in together.items():
            equal(alone[n][0].numpy(), hidden[b])


def test_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, engine = engines("float32-head")
    ids = random_tokens(reference.config, 19)
    monkeypatch.setattr(exact, "CHUNK", 1000)
    equal(reference.logits(ids), engine.logits(ids))


@pytest.mark.parametrize("name", ["wt2-bitskip", "per-layer-exits"])
def test_every_exit_at_once(name: str) -> None:
    reference, engine = engines(name)
    ids = random_tokens(reference.config, 9)
    expected, actual = (exits_of(model, ids, 4) for model in (reference, engine))
    assert expected.keys() == actual.keys()
    for stage, values in expected.items():
        equal(values, actual[stage], stage)


@pytest.mark.parametrize("name", ["wt2-bitskip", "per-layer-exits", "bitskip-v1"])
def test_steps_under_exit_rules(name: str) -> None:
    reference, engine = engines(name)
    ids = random_tokens(reference.config, 12)
    rules = [FixedExit(2), ConfidenceExit(0.02), ConfidenceExit(0.003, "margin")]
    rules.append(ConfidenceExit(0.06, "entropy"))
    if reference.config.gates:
        rules.append(GateExit(0.5))
    depths = set()
    for rule in rules:
        caches = reference.new_cache(), engine.new_cache()
        for model, cache in zip((reference, engine), caches, strict=True):
            model.extend(ids[:3], cache, exit_layer=rule.deepest(model.config))
        for token in ids[3:]:
            expected, depth = reference.step(token, caches[0], rule)
            actual, own_depth = engine.step(token, caches[1], rule)
            assert depth == own_depth
            depths.add(depth)
            equal(expected, actual)
    assert len(depths) > 1


@pytest.mark.parametrize("name", NAMES)
def test_unexported_model(name: str) -> None:
    """A model in training, evaluated exactly, is what its export will be."""
    config = twin(name)
    model = BitskipModel(config)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in random_parameters(config).items()})
    model.arithmetic = "exact"
    ids = random_tokens(config, 6)
    hidden = model(torch.tensor([ids]), exit_layer=3)[3]
    logits = model.logits(hidden, 3)
    assert not logits.requires_grad
    equal(ReferenceModel(config, random_tensors(config)).logits(ids, 3), logits[0].numpy())


@pytest.mark.parametrize("name", ["layerskip", "llama3"])
def test_float_models_within_bound(name: str) -> None:
    """SPEC 4.5: library products are held to 1e-5 of the largest logit of a row."""
    reference, engine = engines(name)
    ids = random_tokens(reference.config, 19)
    expected, actual = reference.logits(ids), engine.logits(ids)
    assert actual.dtype == f32
    bound = 1e-5 * np.abs(expected).max(-1, keepdims=True)
    assert (np.abs(actual - expected) <= bound).all()


def test_folder(tmp_path: Path) -> None:
    config = twin("bitskip-v3")
    engine = load_exported(random_folder(tmp_path, config))
    ids = random_tokens(config, 5)
    equal(ReferenceModel(config, random_tensors(config)).logits(ids), engine.logits(ids))


def test_planted_mistakes_show(monkeypatch: pytest.MonkeyPatch) -> None:
    # Stages, not logits: the next quantizer may swallow a difference in the last bit.
    reference, engine = engines("bitskip-v1")
    ids = random_tokens(reference.config, 9)
    expected = stages(reference, ids)

    def differs() -> bool:
        return any(difference(name, expected[name], x) for name, x in stages(engine, ids).items())

    assert not differs()
    with monkeypatch.context() as patch:
        patch.setattr(exact, "exp", torch.exp)
        assert differs()
    with monkeypatch.context() as patch:
        patch.setattr(exact, "mean", lambda x: x.mean(-1, keepdim=True))
        assert differs()
    _, engine = engines("bitskip-v1")  # codes are prepared at the first pass
    weight = engine.model.block(1).k_proj.weight
    weight[0, 0] = 1 if weight[0, 0] != 1 else -1
    assert differs()


def test_context_is_checked() -> None:
    _, engine = engines("tiny")
    config: ModelConfig = engine.config
    cache = engine.new_cache()
    engine.extend(random_tokens(config, config.max_position_embeddings), cache)
    for call in (
        lambda: engine.extend([1], cache),
        lambda: engine.logits([]),
        lambda: engine.logits([config.vocab_size]),
        lambda: engine.logits([1], exit_layer=5),
    ):
        with pytest.raises(ValueError):
            call()
