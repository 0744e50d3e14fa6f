"""What the server has done, as Prometheus reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from bitskip_cpu.many.scheduler import Scheduler


def metrics(scheduler: Scheduler, requests: Counter[int]) -> str:
    """The text of /metrics. requests: HTTP status -> answers."""
    f, lines = scheduler.figures, list[str]()

    def add(name: str, kind: str, what: str, values: Iterable[tuple[str, float]]) -> None:
        lines.append(f"# HELP bitskip_{name} {what}")
        lines.append(f"# TYPE bitskip_{name} {kind}")
        lines.extend(f"bitskip_{name}{label} {value}" for label, value in values)

    def one(name: str, kind: str, what: str, value: float) -> None:
        add(name, kind, what, [("", value)])

    def by(label: str, counts: Counter[Any]) -> list[tuple[str, float]]:
        # Of a copy: the scheduler's thread may add a key meanwhile.
        return [(f'{{{label}="{key}"}}', n) for key, n in sorted(counts.copy().items())]

    add("http_responses_total", "counter", "Answers by HTTP status.", by("status", requests))
    one("texts_running", "gauge", "Texts that run.", scheduler.running)
    one("texts_waiting", "gauge", "Texts that wait for a place.", scheduler.waiting)
    add("texts_ended_total", "counter", "Texts by why they ended.", by("reason", f.ended))
    one("texts_refused_total", "counter", "Texts refused for a full queue.", f.refused)
    one("steps_total", "counter", "Steps of the scheduler.", f.steps)
    one("busy_seconds_total", "counter", "Time spent in steps.", f.busy_s)
    one("prompt_tokens_total", "counter", "Prompt tokens that were run.", f.prompt_tokens)
    one("reused_tokens_total", "counter", "Prompt tokens that were held.", f.reused_tokens)
    one("generated_tokens_total", "counter", "Tokens generated.", f.generated_tokens)
    one("kv_bytes", "gauge", "Keys and values promised or kept.", scheduler.pool.used_bytes)
    add("exit_layer_tokens_total", "counter", "Tokens by the blocks that they ran.",
        by("exit_layer", f.exit_layers))  # fmt: skip
    add("steps_by_texts_total", "counter", "Steps by how many texts were in them.",
        by("texts", f.batches))  # fmt: skip
    return "\n".join(lines) + "\n"
