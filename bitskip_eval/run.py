"""Tasks of lm-eval run on a model at one exit after the other, and what came out as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import setup_logging

from bitskip.tables import table
from bitskip_cpu.model import Model
from bitskip_eval.adapter import BitskipLM
from bitskip_ref.exits.named import describe_rule, rule_label
from bitskip_ref.words import unknown


def run(
    model: Model,
    tasks: Sequence[str],
    exits: Sequence[int | str | None],
    threshold: float | None,
    include_path: Path | None,
    parallel: int,
    asked: Mapping[str, Any],
) -> dict[str, Any]:
    """JSON values: lm-eval's results of each exit, behind how the exit is asked for.

    threshold: of the exits that have one. asked: further arguments of lm-eval's `simple_evaluate`.
    Raises ValueError for an unknown task, and for what the tasks ask that the model cannot do.
    """
    setup_logging("ERROR")
    manager = _manager(tasks, include_path)
    # Which exits have a threshold, and whether it fits, is said before anything is run.
    models = [
        BitskipLM(
            model, n, threshold if isinstance(n, str) and n != "auto" else None,
            batch_size=parallel,
        )
        for n in exits
    ]  # fmt: skip
    found = []
    for lm in models:
        results = simple_evaluate(lm, tasks=list(tasks), task_manager=manager, **asked)
        facts = {k: results[k] for k in ("results", "n-shot", "versions", "n-samples")}
        found.append({
            **describe_rule(lm.rule, model.config), "label": rule_label(lm.rule, model.config),
            **facts,
        })  # fmt: skip
    return {"model": str(model.folder.path), "kv_cache": model.kv_cache, "exits": found}


def _manager(tasks: Sequence[str], include_path: Path | None) -> TaskManager:
    """What knows the tasks: of a folder alone, if that has them all; lm-eval's own take seconds."""
    place = None if include_path is None else str(include_path)
    if place is not None:
        own = TaskManager(include_path=place, include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=place)
    for name in tasks:
        if name not in manager.all_tasks:
            raise ValueError(unknown("task", name, manager.all_tasks))
    return manager


def report(found: Mapping[str, Any]) -> str:
    """The results as a table, a line for each exit and measure of a task."""
    rows = []
    for at_exit in found["exits"]:
        for task, values in at_exit["results"].items():
            for key, value in sorted(values.items()):
                name, _, kind = key.partition(",")
                if not isinstance(value, int | float) or not kind or name.endswith("_stderr"):
                    continue
                error = values.get(f"{name}_stderr,{kind}")
                said = f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")
                name = name if kind == "none" else f"{name} ({kind})"
                rows.append((values.get("alias", task).strip(" -"), at_exit["label"], name, said))
    return table(("task", "exit", "measure", "value"), rows)
