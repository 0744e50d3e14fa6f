"""A verb in a process of its own, forked from one that has everything imported, amid a fault."""

from __future__ import annotations

import faulthandler
import os
import resource
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

PRELOADED = [
    "bitskip.program", "bitskip_cpu.cli.generate", "bitskip_cpu.cli.heldout",
    "bitskip_cpu.cli.machine", "bitskip_cpu.heldout.calibrate", "bitskip_cpu.cli.page",
    "bitskip_train.trainer", "bitskip_train.cli", "bitskip_export.pack", "bitskip_export.report",
    "bitskip_export.foreign.verbs", "bitskip_export.foreign.hf_read", "rich.progress",
    "torch._dynamo", "torch.profiler",  # which an optimizer imports when it is made
    "tests.faults.verbs", "tests.faults.child", "tests.faults.preload",
]  # fmt: skip
NOBODY = 54321  # a user who has no processes and no entry among the users


def run(words: list[str], place: Path, errors: Any, fault: dict[str, Any]) -> None:
    """What the process does; `fault` holds what it is given by name (`FAULTS`).

    errors: a pipe for standard error, which no limit on files concerns.
    """
    from bitskip.program import main
    from bitskip_cpu.compiling import warmup

    os.environ["RUST_BACKTRACE"] = "0"
    os.chdir(place)
    os.dup2(errors.fileno(), 2)
    errors.close()
    for stream, name in ((1, "stdout"), (2, "stderr")):
        if stream == 1 or name in fault:
            to = os.open(fault.get(name, os.devnull), os.O_WRONLY)
            os.dup2(to, stream)
            os.close(to)
    sys.stdout = os.fdopen(1, "w", closefd=False)  # of the new files
    sys.stderr = os.fdopen(2, "w", closefd=False)
    faulthandler.disable()
    warnings.simplefilter("default")
    if words[0] == "warmup":
        _replayed()
        os.environ["BITSKIP_CACHE_DIR"] = str(place / "kernels")
    else:
        warmup()
    for name, of in FAULTS.items():
        if name in fault:
            of(fault[name], place)
    (place / "started").touch()
    try:
        main(words, prog_name="bitskip")
    except SystemExit as end:  # standard output may be full: nothing flushes it once more
        os._exit(end.code if isinstance(end.code, int) else end.code is not None)


def _replayed() -> None:
    """Compile by reading what was compiled before, slowly: the files are written as ever."""
    from bitskip_cpu import beside
    from bitskip_cpu.compiling import ARGUMENTS, KERNELS
    from bitskip_cpu.kernels import object_code

    beside.possible = lambda: False
    kept = {name: KERNELS._stored(name) for name in ARGUMENTS}
    assert all(kept.values()), "tests.faults needs kernels that are compiled"

    def slowly(name: str, arguments: int, progress: Any) -> bytes:
        for count in range(8):
            time.sleep(0.005)
            progress(count / 8)
        return kept[name] or b""

    object_code.machine_code = slowly  # type: ignore[assignment]
    KERNELS.__init__()  # type: ignore[misc]
    vars(KERNELS).pop("_folder", None)
    vars(KERNELS).pop("directory", None)


# ---- faults -------------------------------------------------------------------------


def _full(room: int, place: Path) -> None:
    """No file may grow beyond so many bytes: writing fails as on a full disk, for any user."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


def _home(kind: str, place: Path) -> None:
    """No HOME and no entry among the users; one that cannot be written; a file in its place."""
    import pwd
    import tempfile

    for name in ("BITSKIP_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        os.environ.pop(name, None)
    tempfile.tempdir = str(place)
    if kind == "none":

        def nobody(*_: Any) -> Any:
            raise KeyError("no such user")

        pwd.getpwuid = nobody  # type: ignore[assignment]
    else:
        (place / "file").write_text("no folder")
        os.environ["HOME"] = "/proc" if kind == "unwritable" else str(place / "file")


def _threads(most: int, place: Path) -> None:
    """The system refuses further threads: as another user with a limit, or Python's alone."""
    if os.geteuid() == 0:
        for folder, folders, files in os.walk(place):
            for name in [".", *folders, *files]:
                os.chown(os.path.join(folder, name), NOBODY, NOBODY)
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))


def _forks(seconds: float, place: Path) -> None:
    """Another thread forks again and again; each child ends at once."""

    def fork() -> None:
        while True:
            time.sleep(seconds)
            child = os.fork()
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)

    threading.Thread(target=fork, daemon=True).start()


FAULTS = {"full": _full, "home": _home, "threads": _threads, "forks": _forks}


if __name__ == "__main__":
    sys.exit("started by tests.faults.harness")
