"""The verb `generate`. Only click is imported here: `--help` must answer at once."""

from __future__ import annotations

import json
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from bitskip.options import (
    COUNT,
    EXIT,
    FILE,
    JSON,
    MODEL,
    NEW_FILE,
    SHARE,
    THREADS,
    WHOLE,
    Listed,
    NumberOr,
    exit_layer,
    kv_cache_or,
)
from bitskip.signals import Terminated, exit_code
from bitskip.terminal import coloured, visible
from bitskip_cpu.cli.loading import load_model

if TYPE_CHECKING:
    from bitskip_cpu.generate import Piece, TextStream
    from bitskip_cpu.generation_options import GenerationOptions
    from bitskip_cpu.model import Model

STORY = "Once upon a time"  # the prompt of the models that come with the package


@click.command()
@MODEL
@click.option(
    "--prompt", "-p", "prompts", multiple=True, help="Text to continue; - reads standard input."
)
@click.option(
    "--prompt-file", "-f", type=click.File("rb"),
    help="UTF-8 file with the prompt, without its last newline; - is standard input.",
)  # fmt: skip
@click.option(
    "--prompts", "prompts_file", type=FILE, metavar="FILE.jsonl",
    help="Many prompts, a line each: a JSON string, or an object with prompt and options, as "
    '{"prompt": "Tom", "exit_layer": 18}. Needs --output.',
)  # fmt: skip
@click.option(
    "--output", "-o", type=NEW_FILE, metavar="FILE.jsonl",
    help="Where the answers to --prompts go, in their order. If it is there, what is missing is "
    "added.",
)  # fmt: skip
@click.option(
    "--parallel", type=COUNT, default=8, show_default=True,
    help="Texts of --prompts that run side by side; no text depends on it.",
)  # fmt: skip
@click.option(
    "--max-tokens",
    "-n",
    type=WHOLE,
    default=200,
    show_default=True,
    help="Tokens to write, at most.",
)
@exit_layer(
    "exit_layer", EXIT, "Blocks to run, or what decides for each token: gate, max (probability), "
    "margin, entropy; auto: the model's calibrated setting. Default: the model's recommendation, "
    "else all.", "N|WORD",
)  # fmt: skip
@click.option(
    "--exit-threshold", type=SHARE,
    help="0 to 1; a token stops above it. Default: 0.5 for gate, 0.9 for the others.",
)  # fmt: skip
@click.option(
    "--exit-looks", type=Listed(COUNT), metavar="N,N,...",
    help="Blocks after which it may stop. Default: all for gate, the quarters for the others.",
)  # fmt: skip
@click.option(
    "--exit-last",
    type=COUNT,
    metavar="N",
    help="Stop there at the latest. Default: the last block.",
)
@click.option(
    "--speculate", metavar="K|auto|lookup",
    type=NumberOr("speculation", lambda: ["auto", "lookup"]),
    help="Draft K tokens at an early exit and verify them at once; auto adapts K; lookup drafts "
    "what followed in the text before. Greedy text stays the same, with lookup any.",
)  # fmt: skip
@click.option("--draft-exit", type=COUNT, help="Blocks that draft. Default: a quarter.")
@click.option(
    "--draft-vocab", type=COUNT,
    help="Draft among the first V token ids only. Default: the folder's, else all.",
)  # fmt: skip
@click.option(
    "--temperature", "--temp", type=float,
    help="0 always takes the likeliest token (greedy); --top-k, --top-p and --min-p then change "
    "nothing. Default of these and the penalty: as the model recommends, else greedy.",
)  # fmt: skip
@click.option("--top-k", type=WHOLE, help="Keep the k likeliest tokens; 0: all.")
@click.option(
    "--top-p", type=float, help="Keep the likeliest tokens whose probabilities add up to this."
)
@click.option(
    "--min-p", type=float, help="Drop tokens less likely than this share of the likeliest."
)
@click.option(
    "--repetition-penalty", type=float,
    help="Above 1: tokens that stand in prompt or text become less likely. 1: off.",
)  # fmt: skip
@click.option("--seed", type=WHOLE, default=0, show_default=True, help="Same seed, same text.")
@click.option(
    "--special", is_flag=True,
    help="Special tokens spelled in the prompt, as <|endoftext|>, are those tokens, not text.",
)  # fmt: skip
@click.option("--stop", multiple=True, help="End before this string. Repeatable.")
@click.option(
    "--ctx", "--context", "ctx", type=COUNT, help="Positions to use. Default: the model's context."
)
@kv_cache_or("float32")
@THREADS
@click.option(
    "--show-exits", is_flag=True,
    help="Colour each token by its exit layer; FORCE_COLOR=1 does so without a terminal, too.",
)  # fmt: skip
@click.option(
    "--html", type=NEW_FILE,
    help="Also write a page with each token's exit layer and time.",
)  # fmt: skip
@click.option("--quiet", "-q", is_flag=True, help="Print the generated text and nothing else.")
@JSON
@click.pass_context
def generate(
    click_context: click.Context, model: str | None, prompts: tuple[str, ...],
    prompt_file: IO[bytes] | None, prompts_file: Path | None, output: Path | None, parallel: int,
    threads: int | None, kv_cache: str | None, ctx: int | None,
    quiet: bool, as_json: bool, show_exits: bool, html: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Continue a prompt. The text streams to standard output, statistics go to standard error.

    On a terminal control characters in the text are spelled out, as \\x1b; pipes and files get
    them as they are. Ctrl-C ends the text, keeps what was said, and exits with 130.
    """
    from bitskip_cpu.generation_options import GenerationOptions

    chosen = GenerationOptions(context=ctx, **options)
    if prompts_file is not None or output is not None:
        if prompts_file is None or output is None or prompts or prompt_file is not None:
            raise click.UsageError("--prompts and --output go together, and without --prompt")
        if as_json or show_exits or html is not None:
            raise click.UsageError("--json, --show-exits and --html are for one text")
        _many(model, prompts_file, output, parallel, chosen, (threads, quiet, kv_cache))
        return
    text = _prompt(model, prompts, prompt_file)
    if html is not None and not html.absolute().parent.is_dir():
        raise ValueError(f"{html}: no such folder")
    loaded = load_model(model, threads, quiet, kv_cache, check=chosen.rule)
    stream = loaded.stream(text, chosen)
    if not quiet:
        _note_what_changes_nothing(click_context, chosen.recommended(loaded.folder))
    colours = None
    if show_exits:
        from bitskip_cpu.cli.showing import Colours

        colours = Colours(loaded.config.num_hidden_layers, sys.stdout)
    pieces: list[Piece] = []
    terminal = sys.stdout.isatty()

    def say(piece: Piece) -> None:
        pieces.append(piece)
        if not as_json:
            if terminal:
                piece = replace(piece, text=visible(piece.text))
            painted = colours.paint(piece) if colours else piece.text
            click.echo(painted, nl=False, color=True)  # nothing is taken out

    if not as_json and not quiet:
        shown = visible(text) if terminal else text
        dim = terminal and coloured(sys.stdout)
        click.echo(click.style(shown, dim=True) if dim else shown, nl=False, color=True)
    code = 0
    try:
        for piece in stream:
            say(piece)
    except (KeyboardInterrupt, Terminated) as error:
        code = exit_code(error)
        say(stream.finish())
    if html is not None:
        from bitskip_cpu.cli.page import write_page

        write_page(html, text, pieces, stream, loaded, chosen)
    if as_json:
        click.echo(json.dumps(_generation(stream, loaded, text, chosen.seed)))
    else:
        click.echo()
        if colours and not quiet:
            legend = Colours(colours.blocks, sys.stderr).legend(stream.generation().exit_layers)
            click.echo(legend, err=True, color=True)
        if not quiet:
            click.echo(_statistics(stream, loaded), err=True)
    click_context.exit(code)


def _many(
    model: str | None, file: Path, output: Path, parallel: int, options: GenerationOptions,
    load: tuple[int | None, bool, str | None],
) -> None:  # fmt: skip
    """Answer a file of prompts."""
    import time

    from bitskip.terminal import animated
    from bitskip_cpu.many.offline import answer_file, read_prompts

    lines = read_prompts(file, options)
    loaded = load_model(model, *load)
    quiet, start, begun = load[1], time.perf_counter(), None
    for done in answer_file(loaded, lines, output, parallel):
        begun = done if begun is None else begun
        if animated(sys.stderr) and not quiet:
            click.echo(f"\r{done} of {len(lines)}", err=True, nl=False)
    if not quiet:
        there = f", {begun} were there" if begun else ""
        seconds = time.perf_counter() - start
        click.echo(f"\r[{len(lines)} answers{there}; {seconds:.1f} s]", err=True)


def _prompt(model: str | None, prompts: tuple[str, ...], file: IO[bytes] | None) -> str:
    """The prompt from its option, a file, or standard input; a story's start if none was given."""
    if len(prompts) > 1:
        raise click.UsageError("--prompt is given more than once: join the texts")
    if prompts and file is not None:
        raise click.UsageError("--prompt and --prompt-file exclude each other: give one")
    if not prompts and file is None:
        return _story(model)
    if prompts and prompts[0] != "-":
        return prompts[0]
    from bitskip_ref.documents import decode_utf8

    stream = file or sys.stdin.buffer
    return decode_utf8(stream.read(), "the prompt").removesuffix("\n")


def _story(model: str | None) -> str:
    """The prompt of the models that come with the package, which tell stories."""
    from bitskip_cpu import models

    models.resolve(model)
    if model is not None and model not in models.names():
        raise ValueError("no prompt: give --prompt TEXT or --prompt-file FILE")
    if _is_piped(sys.stdin):
        click.echo("standard input is not read: --prompt - takes it as the prompt", err=True)
    return STORY


def _is_piped(stream: IO[str] | None) -> bool:
    """Whether somebody may have put text there: a pipe, or a file that is not empty."""
    try:
        status = os.fstat(stream.fileno()) if stream is not None else None
    except (OSError, ValueError):  # closed, or no file at all
        return False
    if status is None:
        return False
    return stat.S_ISFIFO(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_size > 0)


def _note_what_changes_nothing(context: click.Context, options: GenerationOptions) -> None:
    """Name on standard error the sampling options that greedy text ignores."""
    if options.temperature != 0:
        return
    for name in ("top_k", "top_p", "min_p"):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            click.echo(f"{option} changes nothing at --temperature 0, which is greedy", err=True)


def _generation(stream: TextStream, model: Model, prompt: str, seed: int) -> dict[str, Any]:
    """What `generate --json` prints."""
    from bitskip_cpu.machine import peak_rss_bytes

    g = stream.generation()
    return {
        "model": str(model.folder.path),
        "prompt": prompt,
        "text": g.text,
        "token_ids": g.token_ids,
        "prompt_tokens": g.prompt_tokens,
        "generated_tokens": len(g.token_ids),
        "exit_layers": g.exit_layers,
        "mean_exit_layer": g.mean_exit_layer,
        "speculation": g.speculation.statistics() if g.speculation else None,
        "stop_reason": g.stop_reason,
        "seed": seed,
        "threads": model.threads,
        "kv_cache": model.kv_cache,
        "ttft_s": g.ttft_s,
        "prefill_tokens_per_s": g.prefill_tokens_per_s,
        "decode_tokens_per_s": g.decode_tokens_per_s,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _statistics(stream: TextStream, model: Model) -> str:
    """One line about a generation."""
    g = stream.generation()
    parts = [f"{len(g.token_ids)} tokens"]
    if g.decode_tokens_per_s:
        parts.append(f"{g.decode_tokens_per_s:.1f} tokens/s")
    if g.ttft_s is not None:
        parts.append(f"first after {g.ttft_s * 1e3:.0f} ms ({g.prompt_tokens} of prompt)")
    if g.mean_exit_layer is not None:
        depth = f"{g.mean_exit_layer:.2f}".removesuffix(".00")
        parts.append(f"exit layer {depth} of {model.config.num_hidden_layers}")
    if g.speculation and g.speculation.drafted:
        s = g.speculation.statistics()
        place = f" at {s['draft_exit']}" if s["draft_exit"] else ""
        parts.append(f"{s['acceptance']:.0%} of {s['drafted']} drafts{place} right")
    return f"[{', '.join(parts)}; ended: {g.stop_reason.replace('_', ' ')}]"
