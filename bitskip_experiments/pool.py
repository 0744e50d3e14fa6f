"""Training runs as child processes, several at once, with progress and a clean Ctrl-C."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue

from bitskip_experiments.environment import commit
from bitskip_experiments.runs import Run

ROOT = Path(__file__).parent.parent
WAIT_S = 2.0  # between looks at a run that another process trains


@dataclass
class Pool:
    """Runs children; `jobs` at once, each on GPUs of its own where there are any."""

    jobs: int
    processes: int = 1  # of one run, under torchrun
    gpus: int = 0
    say: Callable[[str], None] = print
    measure: Callable[[Run], None] = lambda run: None  # after training, one at a time
    stopping: threading.Event = field(default_factory=threading.Event)
    failed: dict[str, str] = field(default_factory=dict)  # digest -> name of the run, and why
    running: dict[str, Run] = field(default_factory=dict)  # digest -> run

    def __post_init__(self) -> None:
        self._children: set[subprocess.Popen[bytes]] = set()
        self._measuring = threading.Lock()
        self._slots: Queue[int] = Queue()
        for slot in range(self.jobs):
            self._slots.put(slot)

    def train_all(self, runs: Sequence[Run]) -> None:
        """Train what is not trained, then measure. Failures are noted; the others go on.

        What another process trains is waited for when all else is done.
        """
        unique = list({run.folder: run for run in runs}.values())
        for wait in (False, True):
            with ThreadPoolExecutor(self.jobs) as threads:
                list(threads.map(lambda run, wait=wait: self.train(run, wait), unique))
            unique = [run for run in unique if not run.trained and run.digest not in self.failed]

    def train(self, run: Run, wait: bool = False) -> bool:
        """Train one run to its end in a child and measure it; False if it failed or was stopped.

        wait: until nobody else trains it; otherwise that is an end, too.
        """
        slot = self._slots.get()
        try:
            with _locked(run.folder, lambda: wait and not self.stopping.wait(WAIT_S)) as lock:
                if self.stopping.is_set():
                    return False
                if lock is None:
                    self.say(f"{run.name}: another process trains it")
                    return False
                if not run.trained:
                    self._train(run, slot, lock)
            if run.trained:
                with self._measuring:
                    self.measure(run)
        except (OSError, ValueError, RuntimeError) as error:  # those of our packages among them
            self.failed[run.digest] = f"{run.name}: {error}"
        finally:
            self._slots.put(slot)
            self.running.pop(run.digest, None)
        if run.digest in self.failed:
            self.say(f"failed: {self.failed[run.digest]}")
        return run.trained and run.digest not in self.failed

    def _train(self, run: Run, slot: int, lock: int) -> None:
        """Start the child, wait, note time and end."""
        threads = str(run.point.train.threads or 1)
        environment = os.environ | {"OMP_NUM_THREADS": threads}
        if (ROOT / "pyproject.toml").exists():  # a clone that may not be installed
            paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        if self.gpus:
            first = slot * self.processes
            mine = [str(i % self.gpus) for i in range(first, first + self.processes)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        self.running[run.digest] = run
        run.note(identity=run.identity, commit=run.about.get("commit") or commit())
        started = time.monotonic()
        log = run.folder / "train.log"
        with log.open("ab") as output:
            # The child holds the lock too: if this process dies, nobody trains beside the child.
            child = subprocess.Popen(
                run.command(self.processes), stdout=output, stderr=output,
                stdin=subprocess.DEVNULL, env=environment, pass_fds=[lock],
            )  # fmt: skip
            self._children.add(child)
            if self.stopping.is_set():  # between the check above and now
                child.send_signal(signal.SIGINT)
            code, cpu = _wait(child)
            self._children.discard(child)
        spent = {"seconds": time.monotonic() - started, "cpu_seconds": cpu}
        spent = {key: value + run.about.get(key, 0.0) for key, value in spent.items()}
        run.note(**spent, **({"finished": True} if code == 0 else {}))
        if code not in (0, 130) and not self.stopping.is_set():
            why = f"{_last_line(log)} (exit code {code}; all of it in {log})"
            self.failed[run.digest] = f"{run.name}: {why}"

    def stop(self, forward: bool) -> None:
        """Start no further run; with `forward` tell the children, which save and end."""
        self.stopping.set()
        for child in list(self._children) if forward else ():
            child.send_signal(signal.SIGINT)


def _wait(child: subprocess.Popen[bytes]) -> tuple[int, float]:
    """Exit code of a child and the processor time it took, its own children's included."""
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, usage.ru_utime + usage.ru_stime


@contextmanager
def stopping_on_signals(pool: Pool) -> Iterator[None]:
    """Ctrl-C and SIGTERM stop the pool; a second Ctrl-C raises KeyboardInterrupt."""

    def note(number: int, frame: object) -> None:
        if pool.stopping.is_set():
            raise KeyboardInterrupt
        # A terminal sends Ctrl-C to its whole foreground group, which the children are in; a second
        # one would make them drop the step at hand.
        pool.stop(forward=number != signal.SIGINT or not _in_foreground())

    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_foreground() -> bool:
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


@contextmanager
def _locked(folder: Path, again: Callable[[], bool]) -> Iterator[int | None]:
    """A descriptor whose lock on the folder lasts as long as anyone holds it; None: it is taken.

    `again` says whether to try once more, after a pause of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while not (free := _try_lock(handle)) and again():
            pass
        yield handle if free else None
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else "it said nothing"
