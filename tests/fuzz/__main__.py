"""`python -m tests.fuzz`: files damaged at random; each is used, or refused in one line."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import click

os.environ.setdefault("BITSKIP_CHECK", "1")
from tests.faults import tested
from tests.fuzz.targets import TARGETS
from tests.fuzz.workers import fuzz


@click.command()
@click.option("--kind", type=click.Choice(list(TARGETS)), required=True)
@click.option("--cases", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--first", type=click.IntRange(0), default=0, help="Start at this case of the seed.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True)
@click.option("--keep", type=click.Path(), help="A folder for the files of cases that fail.")
@click.option("--record", type=click.Path(path_type=Path), help="Add what was run to this file.")
def main(
    kind: str, cases: int, seed: int, first: int, workers: int, keep: str | None,
    record: Path | None,
) -> None:  # fmt: skip
    """Exit code 1 if a case crashed, hung, took too much memory, or raised what it should not.

    A case is a function of (kind, seed, its number): repeat one with --first N --cases 1.
    """
    started = time.monotonic()
    report = fuzz(kind, cases, seed, first, workers, keep)
    seconds, most = time.monotonic() - started, report.most_memory >> 20
    for fault in report.faults:
        click.echo(f"case {fault.case}: {fault.what}")
    click.echo(
        f"{kind}, seed {seed}, cases {first}..{first + cases - 1}: {report.used} used, "
        f"{report.refused} refused, {len(report.faults)} faults; most memory "
        f"{most} MiB above start; {seconds:.0f} s"
    )
    if record is not None:
        of = TARGETS[kind]
        tested.record(record, {
            "what": of.what, "command": f"tests.fuzz --kind {kind}", "seed": seed,
            "commit": tested.commit(), "cases": cases * of.each, "seconds": round(seconds),
            "faults": len(report.faults), "memory": most,
        })  # fmt: skip
    sys.exit(1 if report.faults else 0)


if __name__ == "__main__":
    main()
