"""Cases in forked processes with limits on memory and time, so that a crash is seen and named."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tests.fuzz.targets import TARGETS, Target

SECONDS = 20  # of processor time for a case; the usual ones take some milliseconds
PATIENCE = 120  # seconds of waiting for a case, for what takes no processor time
KEPT = 16 << 20  # bytes that earlier cases may leave to the next ones
ROOM = 300 << 20  # bytes that a case may take beside twice its files
SLACK = 1 << 30  # of address space above that, which threads reserve and do not use
LIBC = ctypes.CDLL(None)
SHARED = "/dev/shm"
PER_PROCESS = 5000  # cases; then a new process, so that what is kept by libraries goes


@dataclass(frozen=True)
class Fault:
    """A case that did what none may do."""

    case: int
    what: str


@dataclass
class Report:
    """How the cases ended."""

    used: int = 0
    refused: int = 0
    faults: list[Fault] = field(default_factory=list)
    most_memory: int = 0  # bytes above the start of the process


def fuzz(
    kind: str, cases: int, seed: int = 0, first: int = 0, workers: int = 1, keep: Any = None
) -> Report:
    """Run cases `first`.. of a seed. keep: a folder to which failing cases' files are copied."""
    target, report = TARGETS[kind], Report()
    os.environ["RUST_BACKTRACE"] = "0"
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_in_memory()) as place:
        prepared = Path(place) / "prepared"
        prepared.mkdir()
        _apart(lambda: target.prepare(prepared))
        share = -(-cases // workers)
        parts = [(a, min(a + share, first + cases)) for a in range(first, first + cases, share)]
        running = [_Worker(target, kind, seed, part, prepared, Path(place), keep) for part in parts]
        for worker in running:
            worker.start()
        for worker in running:
            worker.finish(report)
    report.faults.sort(key=lambda fault: fault.case)
    return report


def _in_memory() -> str | None:
    """A folder in memory, where there is one: most of a case's time is making files."""
    return SHARED if os.access(SHARED, os.W_OK | os.X_OK) else None


def _apart(work: Any) -> None:
    """Run in a process of its own: threads that libraries start there would not survive a fork."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _alone()
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the undamaged files could not be made")


def _alone() -> None:
    """In a forked child: PyTorch does not wait for threads that an earlier test left behind."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


class _Worker:
    """A range of cases, in one process after the other."""

    def __init__(
        self, target: Target, kind: str, seed: int, part: tuple[int, int], prepared: Path,
        place: Path, keep: Any,
    ) -> None:  # fmt: skip
        self.target, self.kind, self.seed = target, kind, seed
        self.next, self.stop = part
        self.prepared, self.keep = prepared, keep
        self.folder = place / f"case-{self.next}"

    def start(self) -> None:
        """Fork a process for the cases from `next`."""
        read, write = os.pipe()
        self.end = min(self.stop, self.next + PER_PROCESS)
        self.child = os.fork()
        if self.child == 0:
            code = 1
            try:
                _alone()
                os.close(read)
                with os.fdopen(write, "w", buffering=1) as out:
                    self._run(out)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(write)
        self.lines = os.fdopen(read)

    def finish(self, report: Report) -> None:
        """Read what the processes report, starting new ones, until all cases are done."""
        while True:
            running = None
            for line in self.lines:
                case, what, memory = json.loads(line)
                if what == "running":
                    running = case
                    continue
                running, self.next = None, case + 1
                report.most_memory = max(report.most_memory, memory)
                if what in ("used", "refused"):
                    setattr(report, what, getattr(report, what) + 1)
                else:
                    report.faults.append(Fault(case, what))
            self.lines.close()
            status = os.waitpid(self.child, 0)[1]
            if running is not None:
                if os.WIFEXITED(status):
                    raise RuntimeError(f"case {running} could not be written")
                report.faults.append(Fault(running, _death(status)))
                self._keep(running)
                self.next = running + 1
            elif status:
                raise RuntimeError(f"after case {self.next - 1}: {_death(status)}")
            if self.next >= self.stop:
                return
            self.start()

    # ---- in the child ---------------------------------------------------------------

    def _run(self, out: IO[str]) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()  # the parent says what happened
        self.resident = 0  # bytes, of memory that was last given back
        gc.freeze()  # what was there before the cases stays
        for case in range(self.next, self.end):
            print(json.dumps([case, "running", 0]), file=out)
            what, memory = self._case(case)
            if what not in ("used", "refused"):
                self._keep(case)
            print(json.dumps([case, what, memory]), file=out)

    def _case(self, case: int) -> tuple[str, int]:
        _empty(self.folder)
        draw = random.Random(f"{self.kind} {self.seed} {case}")
        self.target.write(draw, self.prepared, self.folder)
        with os.scandir(self.folder) as files:
            sizes = [f.stat().st_size for f in files if f.is_file(follow_symlinks=False)]
        allowed = 2 * sum(sizes) + ROOM
        before, space = _memory("VmRSS", "VmSize")
        if before > self.resident + KEPT and hasattr(LIBC, "malloc_trim"):
            LIBC.malloc_trim(0)  # or what earlier cases left would hide this one's
            self.resident = before = _memory("VmRSS")[0]
        _write("/proc/self/clear_refs", b"5")  # the peak counts from here
        resource.setrlimit(resource.RLIMIT_AS, (space + allowed + SLACK, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
        signal.alarm(PATIENCE)
        quiet, kept = os.open(os.devnull, os.O_WRONLY), os.dup(2)
        os.dup2(quiet, 2)
        try:
            what = self.target.use(self.folder)
        except BaseException as error:
            what = "".join(traceback.format_exception(error)[-4:])
            what = f"{type(error).__name__}: {what}"[:2000]
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            os.dup2(kept, 2)
            os.close(quiet)
            os.close(kept)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        memory = _memory("VmHWM")[0] - before
        if memory > allowed and what in ("used", "refused"):
            what = f"memory: {memory} bytes, {allowed} allowed"
        return what, memory

    def _keep(self, case: int) -> None:
        if self.keep is not None:
            to = Path(self.keep) / f"{self.kind}-{self.seed}-{case}"
            shutil.rmtree(to, ignore_errors=True)
            shutil.copytree(self.folder, to, symlinks=True, copy_function=_copy_plain)


def _copy_plain(source: str, to: str) -> None:
    if Path(source).is_file():
        shutil.copyfile(source, to)


def _empty(folder: Path) -> None:
    """A folder without files; the few of a case go faster one by one."""
    try:
        with os.scandir(folder) as files:
            for file in files:
                if file.is_dir(follow_symlinks=False):
                    shutil.rmtree(file.path)
                else:
                    os.unlink(file.path)
    except FileNotFoundError:
        folder.mkdir()


def _write(path: str, raw: bytes) -> None:
    file = os.open(path, os.O_WRONLY)
    os.write(file, raw)
    os.close(file)


def _memory(*names: str) -> list[int]:
    """Bytes of /proc/self/status."""
    file = os.open("/proc/self/status", os.O_RDONLY)
    raw = os.read(file, 1 << 14).decode()
    os.close(file)
    return [int(raw.partition(f"\n{name}:")[2].split(None, 1)[0]) << 10 for name in names]


def _death(status: int) -> str:
    if not os.WIFSIGNALED(status):
        return f"exit code {os.waitstatus_to_exitcode(status)}"
    name = signal.Signals(os.WTERMSIG(status)).name
    if name == "SIGPROF":
        return f"hang: more than {SECONDS} s of processor time"
    return f"hang: {PATIENCE} s" if name == "SIGALRM" else f"crash: {name}"
