"""`python -m tests.faults`: verbs killed, with no room, no home and no threads; nothing is lost."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import click

os.environ.setdefault("BITSKIP_CHECK", "1")
from tests.faults.harness import KINDS, disturb
from tests.faults.verbs import VERBS


@click.command()
@click.option("--verb", type=click.Choice([*VERBS, "all"]), default="all", show_default=True)
@click.option("--kind", type=click.Choice([*KINDS, "all"]), default="kill", show_default=True)
@click.option("--cases", "--kills", type=click.IntRange(1), default=20, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--first", type=click.IntRange(0), default=0, help="Start at this case of the seed.")
@click.option("--keep", type=click.Path(path_type=Path), help="For the files of failing cases.")
def main(verb: str, kind: str, cases: int, seed: int, first: int, keep: Path | None) -> None:
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
    sys.exit(failed)


if __name__ == "__main__":
    main()
