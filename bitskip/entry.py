"""Where the programs begin: Ctrl-C while Python still imports ends in the same line as later."""

from __future__ import annotations

from bitskip.early import listen


def main(prog_name: str | None = None) -> None:
    """The program `bitskip`; prog_name: what it was called by, None for the command's name."""
    listen()
    from bitskip import program

    program.main(prog_name=prog_name)


def runtime(prog_name: str | None = None) -> None:
    """The program `bitskip-cpu`."""
    listen()
    from bitskip import program

    program.runtime(prog_name=prog_name)
