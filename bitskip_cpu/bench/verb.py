"""What `bitskip-cpu bench` does: load or make a model, measure, report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from bitskip.terminal import progress_bar
from bitskip_cpu import isa, models
from bitskip_cpu.bench.limits import Limits
from bitskip_cpu.bench.report import Report
from bitskip_cpu.bench.rows import limit_figures, rows_of
from bitskip_cpu.bench.timing import Case, Task, measure, plan
from bitskip_cpu.cli.loading import prepare
from bitskip_cpu.compiling import KERNELS
from bitskip_cpu.engine import Engine
from bitskip_cpu.machine import fingerprint
from bitskip_cpu.weights import random_tensors
from bitskip_ref.cache import usual_kv_cache
from bitskip_ref.config import preset as preset_config
from bitskip_ref.folder import read_folder


def bench(
    model: str | None,
    preset: str | None,
    tasks: Sequence[Task],
    *,
    threads: Sequence[int] | None,
    exits: Sequence[int] | None,
    repetitions: int,
    seed: int,
    kv_caches: Sequence[str] | None = None,
) -> tuple[Report, bool]:
    """Measure a model, or random weights of a preset's shape; a progress bar on a terminal.

    threads: None for what `generate` takes. exits: None for the full depth. kv_caches: None for
    what the folder recommends, else int8. A preset's context grows to what the tasks need. Returns
    the report and whether Ctrl-C ended it early, which passes once every row has a sample. Raises
    ValueError.
    """
    machine = {**fingerprint(), "isa": isa.PATH.name}
    compiled, start = not KERNELS.lacking(), time.perf_counter()
    prepare()
    compile_s = 0.0 if compiled else time.perf_counter() - start
    start = time.perf_counter()
    if preset is None:
        folder = read_folder(models.resolve(model))
        name, config, tensors = str(folder.path), folder.config, folder.tensors
        recommended = folder.kv_cache
    else:
        config, recommended = preset_config(preset), None
        needed = max(task.depth + task.tokens for task in tasks)
        context = max(needed, config.max_position_embeddings)
        config = config.replace(max_position_embeddings=context)
        name, tensors = f"{preset} (random weights, seed {seed})", random_tensors(config, seed)
        start = time.perf_counter()
    counts: Sequence[int | None] = threads or [None]
    kv_caches = kv_caches or [usual_kv_cache(recommended, "int8", config)]
    kinds = [(count, kind) for count in counts for kind in kv_caches]
    engines = [Engine(config, tensors, *kinds[0])]
    load_s = time.perf_counter() - start
    engines += [Engine(config, engines[0].weights, *kind) for kind in kinds[1:]]
    exits = exits or [config.num_hidden_layers]
    cases = plan(engines, tasks, exits)
    limits = Limits(engines[0].greedy_bytes(max(exits)))
    interrupted = False
    try:
        _with_progress_bar(cases, repetitions, limits, seed)
    except KeyboardInterrupt:
        if not all(case.samples for case in cases):
            raise
        interrupted = True
    about = {"name": name, "parameters": config.parameters(), "config": config.to_dict()}
    seconds = {"compile_s": compile_s, "load_s": load_s}
    report = Report(machine, about, seconds, limit_figures(limits), rows_of(cases, limits))
    return report, interrupted


def _with_progress_bar(cases: Sequence[Case], repetitions: int, limits: Limits, seed: int) -> None:
    with progress_bar("", len(cases) * (repetitions + 1)) as advance:
        show = partial(advance, 1)
        measure(cases, repetitions, limits=limits, progress=show, seed=seed)
