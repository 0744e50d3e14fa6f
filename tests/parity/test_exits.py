"""Every exit strategy over many prompts: the same tokens, exit layers and cache bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from bitskip_cpu.engine import Engine
from bitskip_cpu.heldout.watch import Watch
from bitskip_cpu.weights import Weights
from bitskip_ref.compare import difference
from bitskip_ref.decoding.generate import stream
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.exits import ConfidenceExit, FixedExit, GateExit
from bitskip_ref.exits.confidence import MEASURES
from bitskip_ref.model import ReferenceModel
from bitskip_ref.rule import ExitRule
from tests.helpers import random_tensors, random_tokens, twin

# Pre-norm and post-norm, both with gates, on caches of both kinds.
NAMES = (
    ("per-layer-exits", "float32"), ("wt2-bitskip", "float32"), ("wt2-bitskip", "float16"),
    ("wt2-bitskip", "int8"), ("exit-blocks", "float32"),
)  # fmt: skip
STEPS = 6


@pytest.fixture(scope="module", params=NAMES, ids=" ".join)
def engines(request: pytest.FixtureRequest) -> tuple[ReferenceModel, Engine]:
    name, kv_cache = request.param
    config = twin(name)
    tensors = random_tensors(config)
    return (
        ReferenceModel(config, tensors, kv_cache),
        Engine(config, tensors, 1, kv_cache=kv_cache),
    )


def rules(seen: dict[str, list[float]]) -> Iterator[ExitRule]:
    """Each strategy with thresholds that stop always, never, and at some of the blocks."""
    for n in (1, 2, 4):
        yield FixedExit(n)
    for name, values in seen.items():
        for threshold in (
            0.0,
            float(np.quantile(values, 0.4)),
            float(np.quantile(values, 0.8)),
            1.0,
        ):
            for layers, last in ((None, None), ((2,), None), ((1, 3), None), ((1,), 3), ((), 2)):
                if name == "gate":
                    yield GateExit(threshold, layers=layers, last=last)
                else:
                    yield ConfidenceExit(threshold, name, layers=layers, last=last)


def generate(engine: Any, prompt: list[int], rule: Any, seed: int) -> tuple[list[Any], Any]:
    """What is generated after a prompt, (id, depth) each, and the cache that it leaves."""
    cache = engine.new_cache()
    sampler = Sampler(temperature=float(seed % 2), seed=seed)
    tokens = stream(engine, prompt, rule, sampler, STEPS, cache=cache)
    return [(t.id, t.depth) for t in tokens], cache


def layers_of(cache: Any) -> Iterator[tuple[np.ndarray, ...]]:
    """What is held of each block."""
    return (cache.layer(i) for i in range(cache.config.num_hidden_layers))


def test_200_prompts(engines: tuple[ReferenceModel, Engine]) -> None:
    reference, engine = engines
    context = reference.config.max_position_embeddings
    watch = Watch(reference.config)
    generate(reference, random_tokens(reference.config, 20, 9), watch, 0)
    choices = list(rules(watch.seen))
    depths: dict[str, set[int]] = {}
    for i in range(100):  # of each of the models
        size = (1, context, context - 3)[i % 3] if i < 12 else 1 + i * 7 % (context // 2)
        prompt, rule = random_tokens(reference.config, size, 100 + i), choices[i % len(choices)]
        expected, cache = generate(reference, prompt, rule, i)
        actual, mine = generate(engine, prompt, rule, i)
        assert expected == actual, (i, rule)
        assert len(expected) == min(STEPS, context - size + 1)
        depth = rule.deepest(reference.config)
        pairs = list(zip(layers_of(cache), layers_of(mine), strict=True))[:depth]
        for layer, (there, here) in enumerate(pairs):
            for part, (a, b) in enumerate(zip(there, here, strict=True)):
                assert len(a) == cache.length == mine.length
                problem = difference(f"{rule}, block {layer}, array {part}", a, b)
                assert problem is None, problem
        depths.setdefault(type(rule).__name__, set()).update(d for _, d in actual[1:])
    assert all(len(found) > 2 for found in depths.values()), depths


def test_thresholds_0_and_1(engines: tuple[ReferenceModel, Engine]) -> None:
    """Above 0 stops at once (no margin or entropy here is 0); nothing is above 1."""
    for engine in engines:
        for make in (GateExit, *(lambda t, m=m: ConfidenceExit(t, m) for m in MEASURES)):
            for prompt in ([5], random_tokens(engine.config, 11)):
                assert [d for _, d in generate(engine, prompt, make(0.0), 1)[0]] == [
                    4,
                    1,
                    1,
                    1,
                    1,
                    1,
                ]
                assert [d for _, d in generate(engine, prompt, make(1.0), 1)[0]] == [4] * 6


def test_a_prompt_of_the_whole_context(engines: tuple[ReferenceModel, Engine]) -> None:
    for engine in engines:
        prompt = random_tokens(engine.config, engine.config.max_position_embeddings)
        for rule, depth in ((ConfidenceExit(0.0, "entropy"), 4), (FixedExit(1), 1)):
            found, cache = generate(engine, prompt, rule, 0)
            assert [d for _, d in found] == [depth] and cache.length == len(prompt)
        with pytest.raises(ValueError, match="exceed the context"):
            generate(engine, [*prompt, 1], ConfidenceExit(), 0)


def test_thresholds_beside_a_gates_value(engines: tuple[ReferenceModel, Engine]) -> None:
    """The kernel compares in float32, the rule in binary64: never with another result."""
    reference, _ = engines
    prompt = random_tokens(reference.config, 6)
    watch = Watch(reference.config, (2,), ["gate"])
    generate(reference, prompt, watch, 0)
    p = watch.seen["gate"][0]
    for threshold, depth in ((np.nextafter(p, 0), 2), (p, 4), (np.nextafter(p, 1), 4)):
        rule = GateExit(float(threshold), layers=(2,))
        for each in engines:
            assert generate(each, prompt, rule, 0)[0][1][1] == depth
    for odd, depth in ((-(10**400), 2), (10**400, 4), (-1e300, 2), (1e300, 4), (np.nan, 4)):
        for each in engines:  # `step` takes what `generate` would refuse
            assert each.step(1, each.new_cache(), GateExit(odd, layers=(2,)))[1] == depth


def test_a_wrong_look_is_seen(engines: tuple[ReferenceModel, Engine]) -> None:
    reference, engine = engines
    prompt = random_tokens(reference.config, 5)
    right = generate(reference, prompt, ConfidenceExit(0.0, layers=(2,)), 0)
    wrong = generate(engine, prompt, ConfidenceExit(0.0, layers=(3,)), 0)
    assert right[0] != wrong[0]


@pytest.mark.parametrize(("name", "kv_cache"), NAMES)
def test_pytorch(name: str, kv_cache: str) -> None:
    loaded = pytest.importorskip("bitskip_train.loaded")
    config = twin(name)
    tensors = random_tensors(config)
    reference = ReferenceModel(config, tensors, kv_cache)
    engine = loaded.TorchEngine(config, tensors, kv_cache)
    watch = Watch(reference.config)
    generate(reference, random_tokens(config, 20, 9), watch, 0)
    for i, rule in enumerate([*rules(watch.seen)][2::6]):
        prompt = random_tokens(config, 1 + i % 7, i)
        expected, cache = generate(reference, prompt, rule, i)
        actual, mine = generate(engine, prompt, rule, i)
        assert expected == actual, rule
        for layer in range(rule.deepest(config)):
            for x, y in zip(cache.layer(layer), mine.layer(layer), strict=True):
                assert (problem := difference(f"{rule}", x, y)) is None, problem


def test_ctrl_c_while_gates_are_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call under the same rule asks them all the same."""
    config = twin("per-layer-exits")
    engine, rule = Engine(config, random_tensors(config), 1), GateExit(0.0)

    def broken(self: Weights, n: int) -> int:
        raise KeyboardInterrupt

    cache = engine.new_cache()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Weights, "gate_at", broken)
        engine.step(1, cache, rule)
    assert cache.length == 0
    assert engine.step(1, cache, rule)[1] == 1  # any gate is above 0
