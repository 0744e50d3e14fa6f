"""The fast engine against the reference, bit for bit, on this machine."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from bitskip_cpu import isa, models
from bitskip_cpu.cores import default_threads
from bitskip_cpu.engine import Engine
from bitskip_cpu.heldout.watch import Watch
from bitskip_cpu.weights import Weights
from bitskip_ref.compare import difference
from bitskip_ref.config import ModelConfig
from bitskip_ref.constants import KV_CACHES
from bitskip_ref.decoding.draft import Draft
from bitskip_ref.decoding.generate import stream
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.engine import Engine as AnyEngine
from bitskip_ref.exits import ConfidenceExit, FixedExit, GateExit
from bitskip_ref.folder import read_folder
from bitskip_ref.model import ReferenceModel
from bitskip_ref.rule import ExitRule

PROMPT, STEPS = 12, 6  # tokens: enough for a prompt tile with a remainder, few for the reference
SMALLER_CACHES = [kind for kind in KV_CACHES if kind != "float32"]


@dataclass(frozen=True)
class Check:
    """One comparison; `problem` is None or one line that names the first difference."""

    threads: int
    name: str
    problem: str | None


def run(model: str | None, threads: int | None, echo: Callable[[str], None]) -> int:
    """What `bitskip-cpu selftest` does with a MODEL argument. Returns the exit code.

    Tests one thread and `threads` (None: every physical core). Stops at the first difference,
    since whatever follows from it differs too.
    """
    folder = read_folder(models.resolve(model))
    counts = sorted({1, threads or default_threads()})
    start = time.perf_counter()
    echo(f"{folder.path} on path {isa.PATH.name}, against the NumPy reference")
    reference = ReferenceModel(folder.config, folder.tensors)
    weights = Weights(folder.config, folder.tensors)
    same: dict[int, list[str]] = {}
    smaller = [copy.copy(reference) for _ in SMALLER_CACHES]  # on the same tensors
    for other, kind in zip(smaller, SMALLER_CACHES, strict=True):
        other.kv_cache = kind

    def engine(threads: int, kv_cache: str = "float32") -> Engine:
        return Engine(folder.config, weights, threads, kv_cache)

    for check in chain(
        selftest(reference, engine, counts),
        *(smaller_cache(other, engine, counts) for other in smaller),
    ):
        if check.problem:
            echo(f"DIFFERENT with {check.threads} thread(s), {check.name}: {check.problem}")
            return 1
        same.setdefault(check.threads, []).append(check.name)
    for count, names in same.items():
        echo(f"same bits with {count} thread(s): {'; '.join(names)}")
    total = sum(map(len, same.values()))
    echo(f"all {total} comparisons equal, in {time.perf_counter() - start:.1f} s")
    return 0


def selftest(
    reference: AnyEngine,
    engine_for: Callable[[int], AnyEngine],
    threads: Sequence[int],
    seed: int = 0,
) -> Iterator[Check]:
    """Compare, for each number of threads, stages, exits, ways of feeding, rules and choices.

    engine_for: makes the engine under test with that many threads. Tokens are random.
    """
    config, ids = reference.config, random_prompt(reference.config, seed)
    stages = record(reference, ids)
    exits = {n: reference.logits(ids, n) for n in quarters(config)}
    rules = {rule: follow(reference, ids, rule) for rule in rules_for(reference, ids)}
    sampler = Sampler(temperature=1.0, top_k=40, top_p=0.95, seed=seed)
    text = [(t.id, t.depth) for t in stream(reference, ids, FixedExit(), sampler, STEPS)]
    drafted = speculated(reference, ids)
    for count in threads:
        engine = engine_for(count)
        yield Check(count, "every stage of a prompt", stage_difference(stages, engine, ids))
        for n, expected in exits.items():
            problem = difference("logits", expected, engine.logits(ids, n))
            yield Check(count, f"exit {n}", problem)
        problem = difference("logits", stages[-1][1], singly(engine, ids))
        yield Check(count, "token by token", problem)
        for rule, (logits, depths) in rules.items():
            got_logits, got_depths = follow(engine, ids, rule)
            problem = difference("exit layers", depths, got_depths)
            problem = problem or difference("logits", logits, got_logits)
            name = "gate" if isinstance(rule, GateExit) else rule.measure
            shown = ", ".join(map(str, sorted(set(depths.tolist()))))
            yield Check(count, f"{name} > {rule.threshold:.3g} (exits {shown})", problem)
        got = [(t.id, t.depth) for t in stream(engine, ids, FixedExit(), sampler, STEPS)]
        problem = None if got == text else f"(token, exit layer): {got}, expected {text}"
        yield Check(count, "sampled tokens", problem)
        for expected, actual in zip(drafted, speculated(engine, ids), strict=True):
            problem = difference("logits after drafts", expected, actual)
            yield Check(count, "a round of speculation", problem)


def smaller_cache(
    reference: AnyEngine,
    engine_for: Callable[[int, str], AnyEngine],
    threads: Sequence[int],
    seed: int = 0,
) -> Iterator[Check]:
    """Compare, for each number of threads, engines of the reference's kind of cache."""
    ids, kind = random_prompt(reference.config, seed), reference.kv_cache
    expected = singly(reference, ids)
    for count in threads:
        problem = difference("logits", expected, singly(engine_for(count, kind), ids))
        yield Check(count, f"token by token, {kind} cache", problem)


def random_prompt(config: ModelConfig, seed: int) -> list[int]:
    """Token ids that every comparison runs."""
    size = min(PROMPT, config.max_position_embeddings // 2)
    return np.random.default_rng(seed).integers(0, config.vocab_size, size).tolist()


def speculated(engine: AnyEngine, ids: Sequence[int]) -> list[np.ndarray]:
    """Logits [k + 1, V] of a round of speculation after the ids; none where there is no room."""
    layers, room = engine.config.num_hidden_layers, engine.config.max_position_embeddings
    count = min(3, room - len(ids))
    if layers == 1 or len(ids) == 1:
        return []
    cache = engine.new_cache()
    engine.extend(ids[:-1], cache, last_only=True)
    return [engine.speculate(ids[-1], cache, count, Draft(max(1, layers // 4)))[1]]


def quarters(config: ModelConfig) -> list[int]:
    """Exit layers at a quarter, half, three quarters and all of the blocks."""
    layers = config.num_hidden_layers
    return sorted({max(1, layers * n // 4) for n in (1, 2, 3, 4)})


def rules_for(reference: AnyEngine, ids: Sequence[int]) -> list[ConfidenceExit | GateExit]:
    """The rules that decide token by token, with thresholds at which half the places stop."""
    watch = Watch(reference.config)
    follow(reference, ids, watch)
    rules: list[ConfidenceExit | GateExit] = []
    for name, values in watch.seen.items():
        at = float(np.median(values)) if values else 0.5
        rules.append(GateExit(at) if name == "gate" else ConfidenceExit(at, name))
    return rules


def record(engine: AnyEngine, ids: Sequence[int]) -> list[tuple[str, np.ndarray]]:
    """Every stage that the engine reports for a prompt, in forward order, copied."""
    stages: list[tuple[str, np.ndarray]] = []
    engine.extend(ids, engine.new_cache(), trace=lambda name, x: stages.append((name, x.copy())))
    return stages


def stage_difference(
    expected: Sequence[tuple[str, np.ndarray]], engine: AnyEngine, ids: Sequence[int]
) -> str | None:
    """The first stage, in forward order, whose bits differ."""
    actual = dict(record(engine, ids))
    for name, values in expected:
        if name not in actual:
            return f"{name}: not reported"
        problem = difference(name, values, actual[name])
        if problem:
            return problem
    return None


def singly(engine: AnyEngine, ids: Sequence[int]) -> np.ndarray:
    """Logits [T, V] of the tokens fed one by one."""
    cache = engine.new_cache()
    return np.concatenate([engine.extend([t], cache) for t in ids])


def follow(engine: AnyEngine, ids: Sequence[int], rule: ExitRule) -> tuple[np.ndarray, np.ndarray]:
    """Half the tokens as a prompt, the others step by step under a rule: (logits, depths)."""
    cache = engine.new_cache()
    half = len(ids) // 2
    engine.extend(ids[:half], cache, last_only=True)
    steps = [engine.step(t, cache, rule) for t in ids[half:]]
    return np.stack([z.copy() for z, _ in steps]), np.array([n for _, n in steps])
