"""What a run tells: a bar or lines, history.jsonl, TensorBoard."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bitskip_ref.files import replace_file


class Report:
    """Collects a run's figures and shows them; `history` is also what checkpoints keep."""

    def __init__(
        self,
        out: Path | None,
        steps: int,
        done: int,
        history: list[dict[str, Any]],
        tensorboard: bool | None = None,
    ) -> None:
        """out: None keeps the history and says nothing (all processes but the main one).

        tensorboard: None writes its files if the package is there, True insists on it. Raises
        ImportError if it is asked for and missing.
        """
        self.history = history
        self.console = Console(stderr=True, quiet=out is None)
        self._steps, self._start_step = steps, done
        self._started = time.monotonic()
        self._bar: Progress | None = None
        self._board = self._file = None
        if out is None:
            return
        with replace_file(out / "history.jsonl") as file:  # drops what came after the checkpoint
            file.writelines(_line(entry) for entry in history)
        self._file = (out / "history.jsonl").open("ab", buffering=0)
        self._board = self._open_board(out, done, tensorboard)
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self._task = self._bar.add_task("training", total=steps, completed=done)
            self._bar.start()

    def _open_board(self, out: Path, done: int, wanted: bool | None) -> Any:
        if wanted is False:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            if wanted:
                raise
            self.note("tensorboard is not installed: no event files")
            return None
        return SummaryWriter(str(out / "tensorboard"), purge_step=done + 1)

    def note(self, text: str) -> None:
        """One line for the reader. A full disk behind the log does not end the training."""
        with suppress(OSError):
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Move the bar to a step that is done."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def train(self, step: int, values: dict[str, float]) -> None:
        """Figures of training, after a step."""
        self._record({"step": step, **values}, "train")
        text = f"loss {values['loss']:.4f} | {values['tokens_per_second']:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, description=text)
            return
        left = (time.monotonic() - self._started) * (self._steps - step)
        left /= max(1, step - self._start_step)
        minutes, seconds = divmod(round(left), 60)
        self.note(
            f"step {step}/{self._steps} | {text} | lr {values['lr']:.2e} | "
            f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"
        )

    def valid(self, step: int, losses: dict[int, float], best: bool) -> None:
        """Validation losses by exit layer, after a step; `best`: the last layer's is a record."""
        values = {f"exit_{n}": loss for n, loss in losses.items()}
        self._record({"step": step, "valid_loss": losses[max(losses)], **values}, "valid")
        text = ", ".join(f"exit {n}: {loss:.4f}" for n, loss in losses.items())
        self.note(f"step {step} | validation {text}{' (best)' if best else ''}")

    def _record(self, entry: dict[str, Any], group: str) -> None:
        self.history.append(entry)
        if self._file:
            self._file.write(_line(entry))
        if self._board:
            for name, value in entry.items():
                if name != "step":
                    self._board.add_scalar(f"{group}/{name}", value, entry["step"])

    def close(self) -> None:
        """Stop the bar and close the files."""
        if self._bar:
            self._bar.stop()
        if self._board:
            self._board.close()
        if self._file:
            self._file.close()


def _line(entry: dict[str, Any]) -> bytes:
    return (json.dumps(entry) + "\n").encode()
