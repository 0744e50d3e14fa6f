"""The verb `bench`. Only click is imported here: `--help` must answer at once."""

from __future__ import annotations

from typing import Any

import click

from bitskip.options import COUNT, MODEL, PRESET, WHOLE, Listed, Word, exit_layer
from bitskip_ref.constants import KV_CACHES


@click.command()
@MODEL
@click.option("--preset", type=PRESET, help="Random weights of this shape instead of a model.")
@click.option("-p", "prompts", type=Listed(WHOLE), metavar="N,N,...", default="128",
              show_default=True, help="Prompt lengths; 0 leaves the test out.")  # fmt: skip
@click.option("-n", "generated", type=Listed(WHOLE), metavar="N,N,...", default="64",
              show_default=True, help="Tokens to generate; 0 leaves the test out.")  # fmt: skip
@click.option("-pg", "pairs", type=Listed(COUNT, count=2), metavar="P,N", multiple=True,
              help="A prompt and then tokens, timed as one. Repeatable.")  # fmt: skip
@click.option("-d", "depths", type=Listed(WHOLE), metavar="N,N,...", default="0", show_default=True,
              help="Tokens in the cache before the timed part.")  # fmt: skip
@click.option("--threads", "-t", "threads", type=Listed(COUNT), metavar="N,N,...",
              help="Threads to compute with. Default: what `generate` takes.")  # fmt: skip
@exit_layer("exits", Listed(COUNT), "Default: all blocks.", "N,N,...")
@click.option("--kv-cache", "kv_caches", type=Listed(Word("KV cache", lambda: KV_CACHES)),
              metavar="WORD,...",
              help="Keys and values. Default: what the folder recommends, else int8.")  # fmt: skip
@click.option("-r", "repetitions", type=COUNT, default=5, show_default=True,
              help="Samples of each test, in turns; shown are their medians.")  # fmt: skip
@click.option("-o", "--output", type=click.Choice(["md", "json", "jsonl", "csv"]), default="md",
              show_default=True, help="Form of the table.")  # fmt: skip
@click.option("--seed", type=WHOLE, default=0, show_default=True,
              help="Of the random prompts, and of the weights of --preset.")  # fmt: skip
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
