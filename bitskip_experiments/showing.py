"""Progress of a pool: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from bitskip_experiments.pool import Pool
from bitskip_experiments.runs import Run

LINE_EVERY_S = 60.0


class Progress:
    """Shows, as a context, how many runs are trained, where the current ones are, and what is left.

    The time left supposes that a step of a run to come takes as long as one of those that ran
    since the start.
    """

    def __init__(self, console: Console, runs: list[Run], pool: Pool) -> None:
        self.runs, self.pool, self.console = runs, pool, console
        self.steps = {run.digest: run.point.train.steps for run in runs}
        self.done = {run.digest for run in runs if run.trained}
        self.first = self._steps_done()
        self.started = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._end.set()
        self._thread.join()

    def _steps_done(self) -> int:
        return sum(
            self.steps[run.digest] if run.digest in self.done else run.step()
            for run in self.runs
        )  # fmt: skip

    def text(self) -> str:
        """One line: runs done, current steps, time left."""
        self.done |= {run.digest for run in self.runs if run.trained}
        now, total = self._steps_done(), sum(self.steps.values())
        current = ", ".join(
            f"{run.name}: {run.step()}/{run.point.train.steps}"
            for run in list(self.pool.running.values())
        )
        left = ""
        if now > self.first:
            seconds = (time.monotonic() - self.started) / (now - self.first) * (total - now)
            left = f" | about {seconds / 60:.0f} min left"
        return f"{len(self.done)} of {len(self.runs)} runs | {current or '-'}{left}"

    def _watch(self) -> None:
        if not self.console.is_terminal:
            while not self._end.wait(LINE_EVERY_S):
                self.console.print(self.text(), soft_wrap=True, highlight=False, markup=False)
            return
        columns = (BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
        with Bars(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task("", total=sum(self.steps.values()))
            while not self._end.wait(1.0):
                bars.update(task, completed=self._steps_done(), description=self.text())
