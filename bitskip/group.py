"""A program of verbs, each imported when it is used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from io import TextIOWrapper
from typing import Any

import click
from click.shell_completion import CompletionItem

from bitskip.errors import one_line_errors
from bitskip.signals import ends_on_signals
from bitskip.terminal import drop_unwritten, open_streams
from bitskip_ref.words import unknown

Sections = Mapping[str, Mapping[str, tuple[str, str]]]
"""Heading -> verb -> (module:command, what --help says of it)."""


class Verbs(click.Group):
    """A group that knows its verbs by a table, and whose errors are one line each."""

    def __init__(self, *args: Any, sections: Sections, elsewhere: Sections, **kwargs: Any) -> None:
        """elsewhere: verbs that another program, `bitskip`, has."""
        super().__init__(*args, **kwargs)
        self.subcommand_metavar = "VERB ..."
        self.sections, self.elsewhere = sections, elsewhere

    @property
    def verbs(self) -> dict[str, tuple[str, str]]:
        """Verb -> (module:command, help)."""
        return {n: v for section in self.sections.values() for n, v in section.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs, in the order of --help."""
        return list(self.verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb; None for an unknown one."""
        if cmd_name not in self.verbs:
            return None
        module, attribute = self.verbs[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's; an unknown verb is told the likeliest one."""
        name = args[0]
        if name not in self.verbs and not name.startswith("-") and not ctx.resilient_parsing:
            if any(name in section for section in self.elsewhere.values()):
                ctx.fail(f"{name} is a verb of the program bitskip: bitskip {name}")
            ctx.fail(unknown("verb", name, self.verbs))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The verbs under their headings."""
        widest = max(map(len, self.verbs))
        for heading, section in self.sections.items():
            with formatter.section(heading):
                formatter.write_dl([(n.ljust(widest), text) for n, (_, text) in section.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Verbs with their help, and options; nothing is imported."""
        verbs = [
            CompletionItem(name, help=text)
            for name, (_, text) in self.verbs.items()
            if name.startswith(incomplete)
        ]
        return verbs + click.Command.shell_complete(self, ctx, incomplete)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """As click's; what standard output could not take is not tried again when Python ends."""
        try:
            return super().main(*args, **kwargs)
        finally:
            drop_unwritten()

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """As click's, with our error lines."""
        open_streams()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="replace")  # a text may leave a narrow code page
        with one_line_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb."""
        with one_line_errors(), ends_on_signals():
            result = super().invoke(ctx)
            sys.stdout.flush()  # a closed pipe shows here, not when Python ends
            return result
