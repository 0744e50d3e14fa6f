"""Timing of prompts and of decoding: which runs there are, and in which order they are taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from bitskip_cpu.bench.energy import Energy
from bitskip_cpu.machine import peak_rss_bytes
from bitskip_ref.checks import check_exit_layer
from bitskip_ref.decoding import sampling
from bitskip_ref.decoding.contenders import Contenders
from bitskip_ref.decoding.generate import Choosing, Together
from bitskip_ref.engine import Engine

Progress = Callable[[str], None]
"""Called before each run with what it is."""


@dataclass(frozen=True)
class Task:
    """What is timed: a prompt in one call, then tokens decoded, on a cache of `depth` tokens."""

    prompt: int
    generated: int
    depth: int = 0

    @property
    def name(self) -> str:
        """pp<prompt>, tg<generated>, or pp<prompt>+tg<generated>."""
        parts = [("pp", self.prompt), ("tg", self.generated)]
        return "+".join(f"{kind}{count}" for kind, count in parts if count)

    @property
    def tokens(self) -> int:
        """Tokens that are timed."""
        return self.prompt + self.generated


def tasks_of(
    prompts: Sequence[int],
    generated: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    depths: Sequence[int],
) -> list[Task]:
    """All tests at each depth; zeros are left out. Raises ValueError if none is left."""
    kinds = [(p, 0) for p in prompts] + [(0, n) for n in generated] + list(pairs)
    tasks = [Task(p, n, depth) for depth in depths for p, n in kinds if p + n]
    if not tasks:
        raise ValueError("nothing to measure: give -p, -n or -pg a number above 0")
    return tasks


@dataclass(frozen=True)
class Sample:
    """One timed run."""

    seconds: float
    first_s: float | None  # until the prompt's logits, None without a prompt
    steps_s: list[float]  # of each token decoded; those of one call, alike
    joules: float | None = None  # of the whole machine; None: not counted


@dataclass
class Case:
    """One row: a task at an exit on an engine, and its samples."""

    task: Task
    exit_layer: int
    engine: Engine
    samples: list[Sample] = field(default_factory=list)
    peak_rss_bytes: int = 0  # of the process, when the warm-up had ended

    @property
    def threads(self) -> int:
        """Of the engine."""
        return self.engine.threads

    @property
    def kv_cache(self) -> str:
        """Of the engine, one of KV_CACHES."""
        return self.engine.kv_cache

    @property
    def name(self) -> str:
        """The row in words."""
        depth = f" at depth {self.task.depth}" if self.task.depth else ""
        cache = "" if self.kv_cache == "float32" else f", {self.kv_cache} KV cache"
        return f"{self.task.name}{depth}, exit {self.exit_layer}, threads {self.threads}{cache}"

    def tokens_per_s(self) -> list[float]:
        """Of each sample."""
        return [self.task.tokens / sample.seconds for sample in self.samples]

    def run(self, cache: Any, token_ids: Sequence[int]) -> Sample:
        """Time the task once; the cache is cut back to the task's depth first.

        What is decoded is a token that is given, then greedy ones, as a text is made: of logits
        only what they need is asked for (SPEC 9.6), of the prompt's, too.
        """
        cache.length = self.task.depth
        prompt, generated, greedy = self.task.prompt, self.task.generated, Contenders()
        first, steps, token = None, list[float](), token_ids[prompt] if generated else None
        choosing = Choosing(self.engine, sampling.Sampler(), generated, generated, None, ())
        together = Together(self.engine, cache, self.exit_layer, greedy, choosing)
        start = before = time.perf_counter()
        if prompt:
            self.engine.extend(
                token_ids[:prompt], cache, exit_layer=self.exit_layer, last_only=True,
                contenders=greedy,
            )  # fmt: skip
            before = time.perf_counter()
            first = before - start
        while token is not None and not choosing.over:
            followed, z = together.run(token)
            for token in followed:
                choosing.took(token)
            token = choosing.next(z)
            now, count = time.perf_counter(), 1 + len(followed)
            steps += [(now - before) / count] * count
            before = now
        return Sample(before - start, first, steps)


class Sampler(Protocol):
    """What is measured beside the cases (`bitskip_cpu.bench.limits.Limits`)."""

    def sample(self, threads: int) -> None:
        """Measure once, on that many threads."""


def plan(engines: Sequence[Engine], tasks: Sequence[Task], exits: Sequence[int]) -> list[Case]:
    """Every task at every exit on every engine, all of one configuration.

    Raises ValueError for an exit that the model lacks and for what does not fit its context.
    """
    config = engines[0].config
    for n in exits:
        check_exit_layer(n, config)
    for task in tasks:
        needed = task.depth + task.tokens
        if needed > config.max_position_embeddings:
            raise ValueError(
                f"{task.name} at depth {task.depth} needs {needed} positions, "
                f"but the model's context is {config.max_position_embeddings}"
            )
    return [Case(t, n, engine) for engine in engines for t in tasks for n in exits]


def measure(
    cases: Sequence[Case],
    repetitions: int,
    *,
    limits: Sampler | None = None,
    energy: Energy | None = None,
    progress: Progress = lambda _: None,
    seed: int = 0,
) -> None:
    """Add `repetitions` samples to each case, of random tokens.

    Each case runs once before, unmeasured. The repetitions of all cases alternate, and `limits` is
    sampled before each round and after the last, so that a slow minute hits everything alike.
    Ctrl-C leaves the samples so far.
    """
    rng = np.random.default_rng(seed)
    vocab = cases[0].engine.config.vocab_size
    longest = max(case.task.depth + case.task.tokens for case in cases)
    ids = rng.integers(0, vocab, longest).tolist()
    deepest = max(case.exit_layer for case in cases)
    counters = energy or Energy()
    caches: dict[tuple[int, str], Any] = {}  # with so many tokens, for every exit

    def run(case: Case) -> Sample:
        depth = case.task.depth
        key = depth, case.kv_cache
        if key not in caches:
            caches[key] = case.engine.new_cache()
            if depth:
                case.engine.extend(
                    ids[:depth], caches[key], exit_layer=deepest, last_only=True,
                    contenders=Contenders(),
                )  # fmt: skip
        before = counters.read()
        sample = case.run(caches[key], ids[depth : depth + case.task.tokens])
        return replace(sample, joules=counters.joules(before))

    for case in cases:
        progress(f"warm-up: {case.name}")
        run(case)
        case.peak_rss_bytes = peak_rss_bytes()
    counts = sorted({case.threads for case in cases})
    for number in range(repetitions + 1):
        if limits:
            for count in counts:
                limits.sample(count)
        for case in cases if number < repetitions else ():
            progress(f"{number + 1} of {repetitions}: {case.name}")
            case.samples.append(run(case))
