"""The fast engine against the reference, bit for bit, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bitskip_cpu import isa, models
from bitskip_cpu.engine import Engine
from bitskip_cpu.threads import default_threads
from bitskip_ref.compare import difference
from bitskip_ref.config import ModelConfig
from bitskip_ref.engine import Engine as AnyEngine
from bitskip_ref.engine import ExitRule
from bitskip_ref.exits import ConfidenceExit, FixedExit, GateExit
from bitskip_ref.folder import read_folder
from bitskip_ref.generate import stream
from bitskip_ref.model import ReferenceModel
from bitskip_ref.sampling import Sampler

PROMPT, STEPS = 12, 6  # tokens: enough for a prompt tile with a remainder, few for the reference


@dataclass(frozen=True)
class Check:
    """One comparison; `problem` is None or one line that names the first difference."""

    name: str
    problem: str | None


def run(model: str | None, threads: int | None, echo: Callable[[str], None]) -> int:
    """What `bitskip-cpu selftest` does with a MODEL argument. Returns the exit code.

    Tests one thread and `threads` (None: every physical core). Stops at the first
    difference, since whatever follows from it differs too.
    """
    folder = read_folder(models.resolve(model))
    counts = sorted({1, threads or default_threads()})
    echo(f"{folder.path}, path {isa.PATH}, {' and '.join(map(str, counts))} threads")
    start, done = time.perf_counter(), 0
    reference = ReferenceModel(folder.config, folder.tensors)
    checks = selftest(reference, lambda n: Engine(folder.config, folder.tensors, n), counts)
    for check in checks:
        if check.problem:
            echo(f"DIFFERENT  {check.name}")
            echo(f"           {check.problem}")
            return 1
        echo(f"same bits  {check.name}")
        done += 1
    echo(f"all {done} comparisons equal, in {time.perf_counter() - start:.1f} s")
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
    config = reference.config
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, config.vocab_size, min(PROMPT, config.max_position_embeddings // 2))
    ids = prompt.tolist()
    stages = record(reference, ids)
    exits = {n: reference.logits(ids, n) for n in quarters(config)}
    rules = {rule: follow(reference, ids, rule) for rule in rules_for(config)}
    sampler = Sampler(temperature=1.0, top_k=40, top_p=0.95, seed=seed)
    text = [(t.id, t.depth) for t in stream(reference, ids, FixedExit(), sampler, STEPS)]
    for count in threads:
        engine = engine_for(count)
        where = f"{count} thread{'s' if count > 1 else ''}"
        yield Check(f"every stage of a prompt, {where}", stage_difference(stages, engine, ids))
        for n, expected in exits.items():
            yield Check(f"exit {n}, {where}", difference("logits", expected, engine.logits(ids, n)))
        expected = stages[-1][1]
        yield Check(f"token by token, {where}", difference("logits", expected, singly(engine, ids)))
        for rule, (logits, depths) in rules.items():
            got_logits, got_depths = follow(engine, ids, rule)
            problem = difference("exit layers", depths, got_depths)
            yield Check(
                f"{describe(rule)}, depths {sorted(set(depths.tolist()))}, {where}",
                problem or difference("logits", logits, got_logits),
            )
        got = [(t.id, t.depth) for t in stream(engine, ids, FixedExit(), sampler, STEPS)]
        problem = None if got == text else f"(token, exit layer): {got}, expected {text}"
        yield Check(f"sampled tokens, {where}", problem)


def quarters(config: ModelConfig) -> list[int]:
    """Exit layers at a quarter, half, three quarters and all of the blocks."""
    layers = config.num_hidden_layers
    return sorted({max(1, layers * n // 4) for n in (1, 2, 3, 4)})


def rules_for(config: ModelConfig) -> list[ExitRule]:
    """Rules that decide token by token, with thresholds low enough to stop early sometimes."""
    rules: list[ExitRule] = [ConfidenceExit(0.3, "max"), ConfidenceExit(0.3, "margin")]
    return [*rules, GateExit(0.5)] if config.gates else rules


def describe(rule: ExitRule) -> str:
    """The rule in words."""
    if isinstance(rule, ConfidenceExit):
        return f"confidence exit ({rule.measure} > {rule.threshold})"
    return f"gate exit (> {rule.threshold})" if isinstance(rule, GateExit) else "fixed exit"


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
