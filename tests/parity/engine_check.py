"""The compiled engine against the reference, bit for bit: one call per configuration.

Also a script, so that a process with another instruction-set path can run the same comparison:
`python -m tests.parity.engine_check NAME ...` prints one JSON object, name -> problems. A name
may end in `:float16` or `:int8`, the kind of cache (SPEC 6.5, 6.8).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bitskip_cpu.engine import Engine
from bitskip_ref.cache import cached_arrays
from bitskip_ref.compare import difference
from bitskip_ref.config import ModelConfig, small_twin
from bitskip_ref.decoding.choice import Choice
from bitskip_ref.decoding.draft import Draft
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.exits import ConfidenceExit, FixedExit, GateExit
from bitskip_ref.model import ReferenceModel
from bitskip_ref.packing import pack_ternary
from bitskip_ref.rule import ExitRule
from tests.helpers import random_tensors, random_tokens, twin

SIZES: dict[str, ModelConfig] = {
    # Widths above one group of packed weights, none a multiple of it; two heads of an odd half.
    "wide": small_twin("bitskip-v1").replace(
        hidden_size=320, intermediate_size=600, num_attention_heads=3, num_key_value_heads=1,
        head_dim=26, num_hidden_layers=2, vocab_size=150,
    ),
    "wide-hadamard": small_twin("bitskip-v2").replace(
        hidden_size=320, intermediate_size=600, num_hidden_layers=2,
    ),
    # Rows of floats in groups of registers (`float_simd`), with and without padding, and others.
    "wide-floats": small_twin("bitskip-v1").replace(
        hidden_size=144, intermediate_size=256, num_attention_heads=3, num_key_value_heads=1,
        head_dim=26, num_hidden_layers=2, vocab_size=150, linear="float32", head_format="bfloat16",
    ),
    # More tokens than the engine takes at a time, more positions than a group of cached keys.
    "long": small_twin("bitskip-v3").replace(max_position_embeddings=150, num_hidden_layers=2),
    "smallest": small_twin("bitskip-v1").replace(
        vocab_size=1, hidden_size=1, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=2, intermediate_size=1, max_position_embeddings=6,
    ),
    # Positions of three pages of a cache, few enough to be run with NumPy's bounds checks.
    "pages": small_twin("bitskip-v1").replace(
        vocab_size=3, hidden_size=2, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=2, intermediate_size=2, max_position_embeddings=36,
    ),
    "extreme": small_twin("bitskip-v1").replace(
        hidden_size=512, intermediate_size=512, num_hidden_layers=2,
    ),
}  # fmt: skip

Stages = dict[str, np.ndarray]


def config_of(name: str) -> ModelConfig:
    name, _, _ = name.partition(":")
    return SIZES[name] if name in SIZES else twin(name)


def tensors_of(name: str) -> dict[str, np.ndarray]:
    """Random tensors; for `extreme`, those that make every sum as large as it can become."""
    config = config_of(name)
    tensors = random_tensors(config)
    if name.startswith("extreme"):
        for key, t in tensors.items():
            if t.dtype == np.uint8:
                width = config.linear_shapes()[key.split(".")[2]][1]
                sign = -1 if "o_proj" in key else 1
                t[:] = pack_ternary(np.full((len(t), width), sign, np.int8))
            elif t.dtype == np.int8:
                t[:] = 127 if "embed" in key else np.where(np.arange(t.size) % 5, 127, -127
                                                           ).reshape(t.shape)  # fmt: skip
            elif "norm" in key:
                t[:] = 1.0
    return tensors


def traced(engine: Any, ids: Sequence[int], cache: Any) -> Stages:
    stages: Stages = {}
    z = engine.extend(ids, cache, trace=lambda name, x: stages.update({name: x.copy()}))
    return stages | {"returned logits": z}


def rules(config: ModelConfig) -> Iterator[ExitRule]:
    """Rules that stop always, never and now and then."""
    yield FixedExit(1)
    yield FixedExit(config.num_hidden_layers)
    yield FixedExit()
    for threshold in (0.0, 0.02, 1.0):
        yield ConfidenceExit(threshold, "max")
    yield ConfidenceExit(0.004, "margin")
    for threshold in (0.0, 0.06):
        yield ConfidenceExit(threshold, "entropy")
    if config.num_hidden_layers > 2:
        yield ConfidenceExit(0.02, layers=(2,))
        yield ConfidenceExit(0.02, layers=(1, 2), last=3)
    if config.gates:
        for threshold in (0.0, 0.5, 1.0):
            yield GateExit(threshold)


def stepped(engine: Any, prompt: Sequence[int], rule: ExitRule, ids: Sequence[int]) -> Stages:
    """Logits, depth and the last step's stages when ids follow a prompt under a rule."""
    cache = engine.new_cache()
    found: Stages = {"prompt": engine.extend(prompt, cache, exit_layer=rule.deepest(engine.config))}

    def trace(name: str, x: np.ndarray) -> None:
        found[f"last {name}"] = x.copy()

    for i, token in enumerate(ids):
        last = i == len(ids) - 1
        z, depth = engine.step(token, cache, rule, trace if last else None)
        found[f"step {i}"], found[f"depth {i}"] = z, np.array(depth)
    return found


def compare(what: str, expected: Stages, actual: Stages) -> Iterator[str]:
    if list(expected) != list(actual):
        yield f"{what}: stages {list(actual)}, expected {list(expected)}"
    for name in expected.keys() & actual.keys():
        problem = difference(f"{what}: {name}", expected[name], actual[name])
        if problem:
            yield problem


def check(
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    threads: Sequence[int] = (1, 2),
    against: Mapping[str, np.ndarray] | None = None,
    kv_cache: str = "float32",
) -> list[str]:
    """All differences between engines on `tensors` and the reference on them, or on `against`."""
    reference = ReferenceModel(config, against or tensors, kv_cache)
    engines = {  # that share even the smallest stage
        f"{n} threads, ": Engine(config, tensors, n, kv_cache, share_from=0) for n in threads
    }
    layers, room = config.num_hidden_layers, config.max_position_embeddings
    ids = random_tokens(config, min(23, room) if room < 150 else 140)
    prompt, rest = ids[: len(ids) // 3], ids[len(ids) // 3 :][:6]
    problems: list[str] = []

    cache = reference.new_cache()
    whole = traced(reference, ids, cache)
    caches = {i: held(cache, i) for i in range(layers)}
    z = whole["returned logits"]
    for who, engine in engines.items():
        mine = engine.new_cache()
        problems += compare(f"{who}whole", whole, traced(engine, ids, mine))
        for i, arrays in caches.items():
            problems += compare(f"{who}cache {i}", arrays, held(mine, i))
        problems += compare(f"{who}in parts", {"logits": z}, {"logits": in_parts(engine, ids)})
        last = engine.extend(ids, engine.new_cache(), last_only=True)
        problems += compare(f"{who}last only", {"logits": z[-1:]}, {"logits": last})
    every = exits_of(reference, ids, layers)
    for who, engine in engines.items():
        problems += compare(f"{who}every exit", every, exits_of(engine, ids, layers))
    for n in range(1, layers + 1):
        z = reference.logits(prompt, n)
        problems += compare("reference at once", {"": z}, {"": every[f"exit {n}"][: len(prompt)]})
        for who, engine in engines.items():
            problems += compare(f"{who}exit {n}", {"": z}, {"": engine.logits(prompt, n)})
    for rule in rules(config):
        steps = stepped(reference, prompt, rule, rest)
        for who, engine in engines.items():
            problems += compare(f"{who}{rule}", steps, stepped(engine, prompt, rule, rest))
    chosen = chosen_of(reference, prompt)
    for who, engine in engines.items():
        problems += compare(f"{who}chosen", chosen, chosen_of(engine, prompt))
    if layers > 1:
        rounds = rounds_of(reference, prompt)
        for who, engine in engines.items():
            problems += compare(f"{who}speculation", rounds, rounds_of(engine, prompt))
    return problems


def held(cache: Any, i: int) -> Stages:
    """What a cache holds of block i, by name."""
    names = cached_arrays(cache.config, cache.kv_cache)
    return dict(zip(names, cache.layer(i), strict=True))


def check_named(name: str) -> list[str]:
    """`check` of a configuration with its cache's kind: NAME or NAME:KIND."""
    kind = name.partition(":")[2] or "float32"
    return check(config_of(name), tensors_of(name), kv_cache=kind)


def rounds_of(engine: Any, prompt: Sequence[int]) -> Stages:
    """Drafts and logits of rounds of speculation after a prompt, of 1 to 4 positions."""
    cache, found = engine.new_cache(), {}
    engine.extend(prompt, cache)
    for count in range(4):
        drafts, z = engine.speculate(count, cache, count, Draft(1))
        found |= {f"drafts {count}": np.array(drafts, np.int64), f"logits {count}": z}
        cache.length -= len(drafts)
    return found


def chosen_of(engine: Any, prompt: Sequence[int]) -> Stages:
    """Tokens that follow a prompt in one call, greedy and drawn, and logits."""
    found: Stages = {}
    for name, sampler in {
        "greedy": Sampler(), "penalty": Sampler(repetition_penalty=1.3), "drawn": Sampler(0.9),
        "top": Sampler(0.8, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.3, seed=5),
    }.items():  # fmt: skip
        cache = engine.new_cache()
        engine.extend(prompt, cache)
        count = min(5, cache.room - len(prompt) - 1)
        ids, z = engine.step_on(0, cache, count, Choice(sampler, (), {0, *prompt}))
        found |= {f"ids {name}": np.array(ids, np.int64), f"logits {name}": z}
    return found


def exits_of(engine: Any, ids: Sequence[int], layers: int) -> Stages:
    """Logits at every exit and of the token after, from one pass over the ids but the last."""
    pieces: dict[str, list[np.ndarray]] = {f"exit {n}": [] for n in range(1, layers + 1)}

    def visit(n: int, first: int, z: np.ndarray) -> None:
        assert first == sum(map(len, pieces[f"exit {n}"]))
        pieces[f"exit {n}"].append(z.copy())

    cache = engine.new_cache()
    engine.extend_exits(ids[:-1], cache, list(range(layers, 0, -1)), visit)
    after = engine.extend(ids[-1:], cache)
    return {name: np.concatenate(z) for name, z in pieces.items()} | {"after": after}


def in_parts(engine: Any, ids: Sequence[int]) -> np.ndarray:
    """The ids in several calls, so that each way of multiplying tokens is used."""
    cache, parts, start = engine.new_cache(), [], 0
    for size in (1, 2, 3, 7, len(ids)):
        if ids[start : start + size]:
            parts.append(engine.extend(ids[start : start + size], cache))
        start += size
    return np.concatenate(parts)


if __name__ == "__main__":
    from bitskip_cpu.isa import PATH

    found = {name: check_named(name) for name in sys.argv[1:]}
    print(json.dumps({"path": PATH.name, "problems": found}))
