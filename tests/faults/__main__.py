"""`python -m tests.faults`: verbs killed, with no room, no home and no threads; nothing is lost."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import click

os.environ.setdefault("BITSKIP_CHECK", "1")
from tests.faults import tested
from tests.faults.harness import KINDS, disturb
from tests.faults.verbs import VERBS

NAMES = {"first": "the first start (compiling replayed)"}
WHAT = {
    "kill": "kills of", "full": "a full disk in", "home": "no home for", "log": "a full log of",
    "threads": "no threads for", "forks": "forks during", "two": "two at once of",
    "all": "faults of every kind in",
}  # fmt: skip


@click.command()
@click.option("--verb", type=click.Choice([*VERBS, "all"]), default="all", show_default=True)
@click.option("--kind", type=click.Choice([*KINDS, "all"]), default="kill", show_default=True)
@click.option("--cases", "--kills", type=click.IntRange(1), default=20, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--first", type=click.IntRange(0), default=0, help="Start at this case of the seed.")
@click.option("--keep", type=click.Path(path_type=Path), help="For the files of failing cases.")
@click.option("--record", type=click.Path(path_type=Path), help="Add what was run to this file.")
def main(
    verb: str, kind: str, cases: int, seed: int, first: int, keep: Path | None, record: Path | None
) -> None:
    """Exit code 1 if something was lost, torn, unclear, or could not be run again.

    A case is a function of (verb, kind, seed, its number), but for the moment of a signal.
    """
    failed = False
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        for name in list(VERBS) if verb == "all" else [verb]:
            started = time.monotonic()
            kinds = KINDS if kind == "all" else (kind,)
            report = disturb(name, Path(root), dict.fromkeys(kinds, cases), seed, keep, first)
            for broken in report.broken:
                click.echo(broken)
            click.echo(
                f"{name}, {kind}, seed {seed}, cases {first}..{first + cases - 1}: "
                f"{report.disturbed} disturbed, {len(report.broken)} broken; "
                f"{time.monotonic() - started:.0f} s"
            )
            failed |= bool(report.broken)
            if record is not None:
                of = f"{WHAT[kind]} {NAMES.get(name, name)}"
                command = f"tests.faults --verb {name}" + f" --kind {kind}" * (kind != "kill")
                tested.record(record, {
                    "what": of, "command": command, "seed": seed, "commit": tested.commit(),
                    "cases": report.cases, "seconds": round(time.monotonic() - started),
                    "faults": len(report.broken),
                })  # fmt: skip
    sys.exit(failed)


if __name__ == "__main__":
    main()
