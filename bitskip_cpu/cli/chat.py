"""The verb `chat`. Only click is imported here: `--help` must answer at once."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from bitskip.options import EXIT, MODEL, THREADS, WHOLE, NumberOr, exit_layer, kv_cache_or
from bitskip_cpu.cli.loading import load_model

if TYPE_CHECKING:
    from bitskip_cpu.chat import Chat
    from bitskip_cpu.generation_options import GenerationOptions

HELP = (
    "/exit N or a word: where tokens stop; /exit alone: the model's own setting\n"
    "/clear: begin anew   /quit or end of input: leave   Ctrl-C: stop the answer\n"
    'A line that ends with a backslash goes on; """ begins and ends a text of many lines.'
)


@click.command()
@MODEL
@click.option("--system", help="What the model is told before the first message.")
@click.option("--max-tokens", "-n", type=WHOLE, default=1024, show_default=True,
              help="Tokens of an answer, at most.")  # fmt: skip
@exit_layer("exit_layer", EXIT, "As for generate; /exit changes it.", "N|WORD")
@click.option(
    "--speculate", metavar="K|auto|lookup",
    type=NumberOr("speculation", lambda: ["auto", "lookup"]),
    help="As for generate.",
)  # fmt: skip
@click.option("--temperature", "--temp", type=float, help="As for generate.")
@click.option("--top-k", type=WHOLE, help="As for generate.")
@click.option("--top-p", type=float, help="As for generate.")
@click.option("--min-p", type=float, help="As for generate.")
@click.option("--repetition-penalty", type=float, help="As for generate.")
@click.option("--seed", type=WHOLE, default=0, show_default=True, help="As for generate.")
@kv_cache_or("float32")
@THREADS
@click.option("--show-exits", is_flag=True, help="Colour each token by its exit layer.")
@click.option("--quiet", "-q", is_flag=True, help="Print the answers and nothing else.")
def chat(
    model: str | None, system: str | None, kv_cache: str | None, threads: int | None,
    show_exits: bool, quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Talk with MODEL, which must have a chat template. /help lists what else can be typed.

    Messages are read from standard input, answers go to standard output. Ctrl-C stops an answer,
    and what it said stays in the conversation.
    """
    from bitskip_cpu.chat import Chat, form_of
    from bitskip_cpu.generation_options import GenerationOptions

    chosen = GenerationOptions(**options)
    loaded = load_model(
        model, threads, quiet, kv_cache, check=lambda folder: (form_of(folder), chosen.rule(folder))
    )
    talk = Chat(loaded, system)
    if not quiet:
        click.echo("/help lists commands", err=True)
    while (text := _read(quiet)) is not None:
        word, _, rest = text.strip().partition(" ")
        if not word:
            continue
        if word == "/quit":
            return
        if word == "/help":
            click.echo(HELP, err=True)
        elif word == "/clear":
            talk = Chat(loaded, system)
        elif word == "/exit":
            chosen = _other_exit(talk, chosen, rest.strip())
        elif word.startswith("/") and "\n" not in text:
            click.echo(f"no command {word}; {HELP}", err=True)
        else:
            _answer(talk, text, chosen, show_exits, quiet)


def _read(quiet: bool) -> str | None:
    """One message; None at the end of input."""
    lines: list[str] = []
    fenced = False
    while True:
        if not quiet and sys.stdin.isatty():
            click.echo("... " if lines or fenced else "> ", nl=False, err=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:  # what was typed is dropped, the conversation goes on
            click.echo("\n/quit leaves", err=True)
            lines, fenced = [], False
            continue
        if not line:
            return "\n".join(lines) if lines else None
        line = line.rstrip("\r\n")
        if line.strip() == '"""':
            if fenced:
                return "\n".join(lines)
            fenced = True
        elif fenced:
            lines.append(line)
        elif line.endswith("\\"):
            lines.append(line[:-1])
        else:
            return "\n".join([*lines, line])


def _other_exit(talk: Chat, options: GenerationOptions, word: str) -> GenerationOptions:
    try:
        changed = options.replace(exit_layer=int(word) if word.isdecimal() else word or None)
        changed.rule(talk.model.folder)
    except ValueError as error:
        click.echo(f"error: {error}", err=True)
        return options
    return changed


def _answer(
    talk: Chat, text: str, options: GenerationOptions, show_exits: bool, quiet: bool
) -> None:
    """Stream one answer; Ctrl-C ends it and nothing else."""
    from bitskip.terminal import visible

    try:
        stream = talk.ask(text, options)
    except ValueError as error:
        click.echo(f"error: {error}", err=True)
        return
    colours = None
    if show_exits:
        from bitskip_cpu.cli.showing import Colours

        colours = Colours(talk.model.config.num_hidden_layers, sys.stdout)
    try:
        for piece in stream:
            painted = colours.paint(piece) if colours else visible(piece.text)
            click.echo(painted, nl=False, color=True if colours else None)
    except KeyboardInterrupt:
        click.echo(visible(stream.finish().text), nl=False)
    talk.keep(stream)
    click.echo()
    if not quiet:
        click.echo(_statistics(talk, stream.generation()), err=True)


def _statistics(talk: Chat, told: Any) -> str:
    parts = [f"{len(told.token_ids)} tokens"]
    if told.decode_tokens_per_s:
        parts.append(f"{told.decode_tokens_per_s:.1f} tokens/s")
    parts.append(f"prompt {told.prompt_tokens} after {talk.reused} kept")
    if told.mean_exit_layer is not None:
        depth = f"{told.mean_exit_layer:.2f}".removesuffix(".00")
        parts.append(f"exit layer {depth} of {talk.model.config.num_hidden_layers}")
    return f"[{', '.join(parts)}; ended: {told.stop_reason.replace('_', ' ')}]"
