"""The command `bitskip-cpu`. Only click is imported here: `--help` must answer at once."""

from __future__ import annotations

import json
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from bitskip_cpu.heldout.verbs import calibrate, exits, perplexity
from bitskip_cpu.options import (
    KV_CACHE,
    KV_CACHES,
    MODEL,
    THREADS,
    Choices,
    NumberOrWord,
    Numbers,
    Pair,
    Verbs,
    load_model,
)

if TYPE_CHECKING:
    from bitskip_cpu.generate import Piece, TextStream
    from bitskip_cpu.model import Model

STORY = "Once upon a time"  # the prompt of the models that come with the package


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="bitskip", prog_name="bitskip-cpu")
def main() -> None:
    """Run ternary language models with early exits on the CPU.

    MODEL is a model folder or the name of a model that comes with the package; without it the
    verbs take the one that ships.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model's text may leave a narrow code page


@main.command()
@MODEL
@click.option("--prompt", "-p", help="Text to continue; - reads standard input.")
@click.option(
    "--prompt-file", "-f", type=click.File("rb"),
    help="UTF-8 file with the prompt, without its last newline; - is standard input.",
)  # fmt: skip
@click.option("--max-tokens", "-n", type=click.IntRange(0), default=200, show_default=True)
@click.option(
    "--exit-layer", "--exit", type=NumberOrWord(), metavar="N|WORD",
    help="Blocks to run, or what decides for each token: gate, max (probability), margin, entropy; "
    "auto: the model's calibrated setting. Default: the model's recommendation, else all.",
)  # fmt: skip
@click.option(
    "--exit-threshold", type=float,
    help="0 to 1; a token stops above it. Default: 0.5 for gate, 0.9 for the others.",
)  # fmt: skip
@click.option(
    "--exit-looks", type=Numbers(1), metavar="N,N,...",
    help="Blocks after which it may stop. Default: all for gate, the quarters for the others.",
)  # fmt: skip
@click.option(
    "--exit-last", type=int, metavar="N", help="Stop there at the latest. Default: the last block."
)
@click.option(
    "--speculate", type=NumberOrWord(), metavar="K|auto",
    help="Draft K tokens at an early exit and verify them at once; auto adapts K. Greedy text "
    "stays the same.",
)  # fmt: skip
@click.option("--draft-exit", type=int, help="Blocks that draft. Default: a quarter.")
@click.option(
    "--draft-vocab",
    type=int,
    help="Draft among so many first ids. Default: the folder's, else all.",
)
@click.option(
    "--temperature", type=float, default=0.0, show_default=True,
    help="0 always takes the likeliest token; the next three then change nothing.",
)  # fmt: skip
@click.option("--top-k", type=int, default=0, help="Keep the k likeliest tokens; 0: all.")
@click.option("--top-p", type=float, default=1.0, help="Keep the likeliest with this sum.")
@click.option("--min-p", type=float, default=0.0, help="Drop below this share of the likeliest.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same text.")
@click.option(
    "--special", is_flag=True,
    help="Special tokens spelled in the prompt, as <|endoftext|>, are those tokens, not text.",
)  # fmt: skip
@click.option("--stop", multiple=True, help="End before this string. Repeatable.")
@click.option("--ctx", type=int, help="Positions to use. Default: the model's context.")
@KV_CACHE
@THREADS
@click.option(
    "--show-exits", is_flag=True,
    help="Colour each token by its exit layer; FORCE_COLOR=1 does so without a terminal, too.",
)  # fmt: skip
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path),
    help="Also write a page with each token's exit layer and time.",
)  # fmt: skip
@click.option("--quiet", "-q", is_flag=True, help="Print the generated text and nothing else.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.pass_context
def generate(
    click_context: click.Context, model: str | None, prompt: str | None,
    prompt_file: IO[bytes] | None, threads: int | None, kv_cache: str, ctx: int | None,
    quiet: bool, as_json: bool, show_exits: bool, html: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Continue a prompt. The text streams to standard output, statistics go to standard error.

    Ctrl-C ends the text, keeps what was said, and exits with 130.
    """
    text = _prompt(prompt, prompt_file)
    loaded = load_model(model, threads, quiet, kv_cache)
    if text is None:
        from bitskip_cpu import models

        if model is not None and model not in models.names():
            raise ValueError("no prompt: give --prompt TEXT or --prompt-file FILE")
        text = STORY
    if html is not None and not html.absolute().parent.is_dir():
        raise ValueError(f"{html}: no such folder")
    stream = loaded.stream(text, context=ctx, **options)
    colours = None
    if show_exits:
        from bitskip_cpu.showing import Colours

        colours = Colours(loaded.config.num_hidden_layers, sys.stdout)
    pieces: list[Piece] = []

    def say(piece: Piece) -> None:
        pieces.append(piece)
        if not as_json:
            painted = colours.paint(piece) if colours else piece.text
            click.echo(painted, nl=False, color=True if colours else None)

    if not as_json and not quiet:
        click.secho(text, dim=True, nl=False)
    interrupted = False
    try:
        for piece in stream:
            say(piece)
    except KeyboardInterrupt:
        interrupted = True
        say(stream.finish())
    if html is not None:
        from bitskip_cpu.page import write_page

        write_page(html, text, pieces, stream, loaded, options)
    if as_json:
        click.echo(json.dumps(_generation(stream, loaded, text, options["seed"])))
    else:
        click.echo()
        if colours and not quiet:
            legend = Colours(colours.blocks, sys.stderr).legend(stream.generation().exit_layers)
            click.echo(legend, err=True, color=True)
        if not quiet:
            click.echo(_statistics(stream, loaded), err=True)
    if interrupted:
        click_context.exit(130)


def _prompt(prompt: str | None, file: IO[bytes] | None) -> str | None:
    """The prompt from its option, a file, or standard input; None if none was given."""
    from bitskip_ref.documents import decode_utf8

    if prompt is not None and file is not None:
        raise click.UsageError("--prompt and --prompt-file exclude each other: give one")
    if prompt == "-":
        file = sys.stdin.buffer
    if file is None:
        return prompt
    return decode_utf8(file.read(), "the prompt").removesuffix("\n")


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
        parts.append(f"{s['acceptance']:.0%} of {s['drafted']} drafts at {s['draft_exit']} right")
    return f"[{', '.join(parts)}; ended: {g.stop_reason.replace('_', ' ')}]"


@main.command()
@MODEL
@click.option("--preset", help="Random weights of a preset's shape instead of a model.")
@click.option("-p", "prompts", type=Numbers(0), default="128", show_default=True,
              help="Prompt lengths; 0 leaves the test out.")  # fmt: skip
@click.option("-n", "generated", type=Numbers(0), default="64", show_default=True,
              help="Tokens to generate; 0 leaves the test out.")  # fmt: skip
@click.option("-pg", "pairs", type=Pair(), multiple=True,
              help="A prompt and then tokens, timed as one. Repeatable.")  # fmt: skip
@click.option("-d", "depths", type=Numbers(0), default="0", show_default=True,
              help="Tokens in the cache before the timed part.")  # fmt: skip
@click.option("-t", "threads", type=Numbers(1), help="Default: what `generate` takes.")
@click.option("--exit-layer", "--exit", "exits", type=Numbers(1), help="Default: all blocks.")
@click.option("--kv-cache", "kv_caches", type=Choices(KV_CACHES), default="float32",
              show_default=True, help="Keys and values: float32, float16, or both.")  # fmt: skip
@click.option("-r", "repetitions", type=click.IntRange(1), default=5, show_default=True)
@click.option("-o", "--output", type=click.Choice(["md", "json", "jsonl", "csv"]), default="md",
              show_default=True)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@click.pass_context
def bench(
    click_context: click.Context, model: str | None, preset: str | None, prompts: list[int],
    generated: list[int], pairs: tuple[tuple[int, int], ...], depths: list[int], output: str,
    **options: Any,
) -> None:  # fmt: skip
    """Measure prompt processing (pp) and decoding (tg), and what of the machine's limits they use.

    Numbers may be lists: -t 1,2. Compiling and one run of each test come before the measured ones.
    Ctrl-C prints what is measured so far, if every test has run once, and exits with 130.
    """
    if model is not None and preset is not None:
        raise click.UsageError("MODEL and --preset exclude each other: give one")
    from bitskip_cpu.bench.timing import tasks_of
    from bitskip_cpu.bench.verb import bench

    tasks = tasks_of(prompts, generated, pairs, depths)
    report, interrupted = bench(model, preset, tasks, **options)
    click.echo(report.format(output))
    if interrupted:
        click_context.exit(130)


main.add_command(perplexity)
main.add_command(calibrate)
main.add_command(exits)


@main.command()
@MODEL
@click.option("--json", "as_json", is_flag=True)
def inspect(model: str | None, as_json: bool) -> None:
    """Shapes, bits, sizes and ternary statistics of a model."""
    from bitskip_cpu import models
    from bitskip_cpu.inspect import describe, inspect

    facts = inspect(models.resolve(model))
    click.echo(json.dumps(facts) if as_json else describe(facts))


@main.command()
@MODEL
@THREADS
def selftest(model: str | None, threads: int | None) -> None:
    """Compare the engine with the reference, bit for bit, on this machine."""
    from bitskip_cpu.progress import prepare
    from bitskip_cpu.selftest import run

    prepare()
    sys.exit(run(model, threads, click.echo))


@main.command()
def warmup() -> None:
    """Compile the kernels now, so that the first `generate` starts at once."""
    from bitskip_cpu.compiling import KERNELS
    from bitskip_cpu.progress import prepare

    prepare()
    if KERNELS.directory is None:
        raise ValueError(
            "the cache folder cannot be written, so nothing was kept: set BITSKIP_CACHE_DIR to a "
            "folder that can"
        )
    click.echo(f"kernels are ready in {KERNELS.directory}")


@main.command()
@click.option("--json", "as_json", is_flag=True)
def doctor(as_json: bool) -> None:
    """What this installation runs on, and what is wrong with it."""
    from bitskip_cpu.doctor import describe, doctor

    facts = doctor()
    click.echo(json.dumps(facts) if as_json else describe(facts))
    sys.exit(1 if facts["problems"] else 0)
