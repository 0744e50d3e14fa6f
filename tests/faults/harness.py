"""Faults on purpose: a verb is disturbed at a random moment, looked at, and run again."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitskip_ref.files import unfinished
from tests.faults.child import PRELOADED, run
from tests.faults.verbs import VERBS, Found, fresh, old_output, prepare

PATIENCE = 120.0  # seconds that a verb may take; each takes about one
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
KINDS = ("kill", "full", "home", "threads", "forks", "two", "log")
CONTEXT = multiprocessing.get_context("forkserver")


class Broken(AssertionError):
    """A verb did what none may do."""


@dataclass
class End:
    """How a process ended."""

    code: int | None
    errors: str
    started: bool  # whether it had come to its verb

    def __str__(self) -> str:
        return f"exit code {self.code}, {self.errors[-600:]!r}"


@dataclass
class Report:
    """What happened in all cases of a verb."""

    cases: int = 0
    disturbed: int = 0
    """Cases in which the verb could not finish."""
    broken: list[str] = field(default_factory=list)


class Faults:
    """A verb's cases, in a folder of its own."""

    def __init__(self, verb: str, root: Path, seed: int) -> None:
        """root: an empty folder; what is prepared there is used again if it holds that."""
        self.name, self.verb, self.seed = verb, VERBS[verb], seed
        self.inputs, self.place = root / "inputs", root / f"case-{verb}"
        CONTEXT.set_forkserver_preload(PRELOADED)
        if not self.inputs.exists():
            making = root / "making"
            prepare(making)
            making.rename(self.inputs)
        for _ in range(2):  # the first one waits for imports
            fresh(self.inputs, self.place)
            child = self.start()
            began = self._begun(child)
            end = self.end(child)
            self.seconds = time.monotonic() - began
            if end.code:
                raise Broken(f"undisturbed: {end}")
        self.whole = self.verb.state(self.place)
        assert self.whole

    def start(self, **fault: Any) -> Any:
        """The verb as a process that is running."""
        (self.place / "started").unlink(missing_ok=True)
        words = [str(word) for word in self.verb.words(self.place)]
        errors, write = CONTEXT.Pipe(duplex=False)
        child = CONTEXT.Process(target=run, args=(words, self.place, write, fault))
        child.start()
        write.close()
        child.errors = errors
        return child

    def _begun(self, child: Any) -> float:
        """Wait until it has come to its verb; the time then."""
        while not (self.place / "started").exists() and child.exitcode is None:
            time.sleep(0.001)
        return time.monotonic()

    def end(self, child: Any) -> End:
        """Wait for its end."""
        child.join(PATIENCE)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise Broken(f"hangs: {PATIENCE} s")
        with os.fdopen(os.dup(child.errors.fileno()), "rb") as errors:
            text = errors.read().decode("utf-8", "replace")
        child.errors.close()
        return End(child.exitcode, text, (self.place / "started").exists())

    # ---- one case -------------------------------------------------------------------

    def case(self, number: int, kind: str) -> bool:
        """Disturb the verb; True if it could not finish. Raises Broken."""
        draw = random.Random(f"{self.name} {kind} {self.seed} {number}")
        fresh(self.inputs, self.place)
        if draw.random() < 0.5:
            old_output(self.place, self.name)
        before = self.verb.state(self.place)
        disturbed = getattr(self, f"_{kind}")(draw)
        self._intact(before)
        self._leave_the_user()
        again = self.end(self.start())
        if again.code and not (self.name == "train" and "exists" in again.errors):
            raise Broken(f"run again: {again}")
        self._whole()
        return bool(disturbed)

    def _kill(self, draw: random.Random) -> bool:
        number = draw.choice(SIGNALS)
        child = self.start()
        self._begun(child)
        child.join(draw.uniform(0, 1.1 * self.seconds))
        if child.exitcode is None:
            os.kill(child.pid, number)
        end = self.end(child)
        if end.code == -signal.SIGKILL:
            return True
        if end.code == 0:
            return False
        if end.code == -signal.SIGTERM and not end.errors:
            return True  # before the verb began, or when all was done: as any program ends
        self._one_line(end, 128 + number, "stopped; go on with", "interrupted", "ended")
        return True

    def _full(self, draw: random.Random) -> bool:
        sizes = [p.stat().st_size for p in self._written()]
        end = self.end(self.start(full=draw.randrange(1 + max(sizes, default=1))))
        if end.code:
            self._one_line(end, 1, "error: ")
            reasons = os.strerror(errno.EFBIG), "No usable temporary directory", "was full"
            if not any(reason in end.errors for reason in reasons):
                raise Broken(f"does not name the reason: {end}")
        return bool(end.code)

    def _home(self, draw: random.Random) -> bool:
        kind = draw.choice(["none", "unwritable", "file"])
        if self.name in ("train", "first"):  # these have a place given
            kind = draw.choice(["none", "unwritable"])
        end = self.end(self.start(home=kind))
        if end.code:
            self._one_line(end, 1, "error: ")
        return bool(end.code)

    def _threads(self, draw: random.Random) -> bool:
        end = self.end(self.start(threads=draw.choice([1, 2, 4])))
        if end.code:
            self._one_line(end, 1, "error: ")
        return bool(end.code)

    def _forks(self, draw: random.Random) -> bool:
        end = self.end(self.start(forks=draw.uniform(0.001, 0.02)))
        if end.code:
            raise Broken(f"forks: {end}")
        return False

    def _two(self, draw: random.Random) -> bool:
        first = self.start()
        first.join(draw.uniform(0, 0.5 * self.seconds))
        second = self.start()
        one, two = self.end(first), self.end(second)
        for end in (one, two):
            if end.code:
                self._one_line(end, 1, "error: ")
        if one.code and two.code:
            raise Broken(f"two at once: {one}; {two}")
        return bool(one.code or two.code)

    def _log(self, draw: random.Random) -> bool:
        """Where it prints is full."""
        name = draw.choice(["stdout", "stderr"])
        end = self.end(self.start(**{name: "/dev/full"}))
        if end.code and name == "stdout":
            self._one_line(end, 1, "error: ")
        return bool(end.code)

    # ---- what must hold -------------------------------------------------------------

    def _one_line(self, end: End, code: int, *said: str) -> None:
        lines = end.errors.splitlines()
        if not end.started and end.code == code:
            return
        if "Traceback" in end.errors or "panicked" in end.errors or end.code != code:
            raise Broken(f"no clean end ({code}): {end}")
        if not lines or not (lines[-1].startswith(said) or "ended: interrupted" in lines[-1]):
            raise Broken(f"no clear line: {end}")

    def _intact(self, before: Found) -> None:
        """The output is what it was, or what it should become, or well on its way."""
        try:
            found = self.verb.state(self.place)
        except (ValueError, AssertionError, OSError) as error:
            raise Broken(f"torn: {type(error).__name__}: {error}") from None
        if found not in (before, self._goal()) and not self.verb.begun(found, self.whole):
            raise Broken(f"neither old nor new: {found}")

    def _whole(self) -> None:
        found = self.verb.state(self.place)
        if found != self._goal():
            raise Broken(f"run again, it gave {found} instead of {self.whole}")
        left = [str(p) for p in self.place.rglob("*") if unfinished(p.name)]
        if left:
            raise Broken(f"left behind: {left}")
        if (self.place / "out" / "README.md").exists():
            assert (self.place / "out" / "README.md").read_text() == "mine"

    def _goal(self) -> Found:
        return self.whole

    def _written(self) -> Iterator[Path]:
        for name in self.verb.files:
            path = self.place / name
            yield from (p for p in [path, *path.rglob("*")] if p.is_file())

    def _leave_the_user(self) -> None:
        """Files of the other user, to whom a case may have given them, are ours again."""
        if os.geteuid() == 0:
            for path in [self.place, *self.place.rglob("*")]:
                os.chown(path, 0, 0, follow_symlinks=False)


def disturb(
    verb: str, root: Path, kinds: dict[str, int], seed: int = 0, keep: Path | None = None,
    first: int = 0,
) -> Report:  # fmt: skip
    """So many cases of each kind. keep: a folder for the places of cases that fail."""
    faults, report = Faults(verb, root, seed), Report()
    for kind, count in kinds.items():
        for number in range(first, first + count):
            report.cases += 1
            try:
                report.disturbed += faults.case(number, kind)
            except Broken as broken:
                report.broken.append(f"{verb} {kind} {number}: {broken}")
                if keep is not None:
                    to = keep / f"{verb}-{kind}-{seed}-{number}"
                    shutil.rmtree(to, ignore_errors=True)
                    shutil.copytree(faults.place, to, symlinks=True)
    return report
