"""The verbs that read a held-out text. Only click is imported here: `--help` must be instant."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitskip.options import (
    COUNT,
    EXIT,
    FILE,
    JSON,
    KV_CACHE,
    MODEL,
    NEW_FILE,
    RULE,
    SHARE,
    THREADS,
    Finite,
    Listed,
    Word,
    exit_layer,
)
from bitskip_cpu.cli.loading import load_model

if TYPE_CHECKING:
    from bitskip_cpu.model import Model
    from bitskip_ref.rule import ExitRule

TEXT = click.option(
    "--text", "text_file", required=True, type=FILE,
    help="UTF-8 text; lines <|endoftext|> separate documents.",
)  # fmt: skip
CONTEXT = click.option(
    "--ctx", "--context", "ctx", type=COUNT,
    help="Tokens of a window. Default: the model's context.",
)  # fmt: skip
STRIDE = click.option(
    "--stride", type=COUNT, help="From window to window. Default: --ctx, no overlap."
)
THRESHOLD = click.option("--exit-threshold", "threshold", type=SHARE, help="As of generate.")
LOOKS = click.option(
    "--exit-looks", "looks", type=Listed(COUNT), metavar="N,N,...", help="As of generate."
)
LAST = click.option("--exit-last", "last", type=COUNT, metavar="N", help="As of generate.")


class Part(click.ParamType):
    """A part of one, as 0.04 or 4%."""

    name = "part"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """From 0 to 1."""
        if isinstance(value, float):
            return value
        percent = str(value).endswith("%")
        number = float(Finite().convert(str(value).removesuffix("%"), param, ctx))
        number = number / 100 if percent else number
        if not 0 <= number <= 1:
            meant = f"; {value}% is {value} percent" if 1 < number <= 100 and not percent else ""
            self.fail(f"{value} is not between 0 and 1{meant}", param, ctx)
        return number


RULE_OR_NONE = Word("rule", lambda: [*RULE.known(), "none"])
KIND = Word("rule", lambda: ["fixed", *RULE.known()])


def _rules(model: Model, exits: list[int | str], *beside: Any) -> list[ExitRule]:
    """The exits' rules; threshold, looks and last block are for those that have them."""
    takes = [e for e in exits if isinstance(e, str) and e != "auto"] or exits
    return [model.exit_rule(e, *(beside if e in takes else ())) for e in exits]


@click.command()
@MODEL
@TEXT
@exit_layer(
    "exits", Listed(EXIT), "Blocks to run, or what decides for each token, as of generate. "
    "Default: all blocks.", "N|WORD,...",
)  # fmt: skip
@THRESHOLD
@LOOKS
@LAST
@CONTEXT
@STRIDE
@click.option(
    "--tokens", type=COUNT, help="Read documents until they have this many tokens. Default: all."
)
@KV_CACHE
@THREADS
@JSON
def perplexity(
    model: str | None, text_file: Path, exits: list[int | str] | None, threshold: float | None,
    looks: list[int] | None, last: int | None, ctx: int | None, stride: int | None,
    tokens: int | None, kv_cache: str, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Loss of a text at each exit, over all its tokens but the first.

    Each document is followed by end-of-text, as in training. Numbered exits share one pass; an
    exit that decides for each token decides as in generation. Default of --threads: all cores.
    """
    from bitskip_cpu.cores import default_threads
    from bitskip_cpu.heldout.perplexity import report

    loaded = load_model(model, threads or default_threads(), kv_cache=kv_cache)
    rules = _rules(loaded, exits or [loaded.config.num_hidden_layers], threshold, looks, last)
    click.echo(report(loaded, text_file, rules, ctx, stride, tokens, as_json))


@click.command()
@MODEL
@TEXT
@click.option(
    "--budget", type=Part(), default="4%", show_default=True,
    help="How much perplexity may rise over full depth's: 4% or 0.04; 1.64 standard errors of "
    "the increase are added to it.",
)  # fmt: skip
@click.option(
    "--rule", "rules", type=Listed(KIND, empty=True), default="", metavar="WORD,...",
    help="Kinds to try: fixed, gate, max, margin, entropy. Default: all that the model has.",
)  # fmt: skip
@CONTEXT
@click.option(
    "--tokens", type=COUNT, default=8192, show_default=True,
    help="Read documents until they have this many tokens.",
)  # fmt: skip
@THREADS
@click.option("--dry-run", is_flag=True, help="Print the table, write nothing.")
@JSON
def calibrate(
    model: str | None, text_file: Path, budget: float, rules: list[str], ctx: int | None,
    tokens: int, threads: int | None, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Find the fastest exit within a budget of loss, and make it the model's `auto`.

    Settings of each kind are judged from one survey of the text; the best of each is then run on
    it, beside full depth. The choice goes into MODEL's generation_config.json.
    """
    from bitskip_cpu.heldout.calibrate import calibrate

    loaded = load_model(model, threads)
    click.echo(calibrate(loaded, text_file, budget, rules, ctx, tokens, as_json, dry_run))


@click.command()
@MODEL
@TEXT
@exit_layer("layers", Listed(COUNT), "Default: every one.", "N,N,...")
@click.option(
    "--rule", "words", type=Listed(RULE_OR_NONE), metavar="WORD,...",
    help="What decides for each token: gate, max, margin, entropy. Default: all there are; "
    "none: fixed exits only.",
)  # fmt: skip
@click.option(
    "--thresholds", type=Listed(SHARE), default="0.5,0.7,0.8,0.9,0.95,0.98", show_default=True,
    metavar="X,X,...", help="For each --rule.",
)  # fmt: skip
@LOOKS
@LAST
@CONTEXT
@click.option(
    "--tokens", type=COUNT, default=4096, show_default=True,
    help="Read documents until they have this many tokens.",
)  # fmt: skip
@click.option("--plot", type=NEW_FILE, help="Draw to this .png, .svg or .pdf.")
@THREADS
@JSON
def exits(
    model: str | None, text_file: Path, layers: list[int] | None, words: list[str] | None,
    thresholds: list[float], looks: list[int] | None, last: int | None, ctx: int | None,
    tokens: int, plot: Path | None, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Loss and speed against exit layer, and against threshold: what stopping early costs.

    Every setting predicts the text token by token, in turns, so that the speeds compare. Marked
    are those that no other beats in both.
    """
    if plot is not None:
        from bitskip_cpu.heldout.plotting import check

        check(plot)
    from bitskip_cpu.heldout.curve import curve

    loaded = load_model(model, threads)
    blocks = loaded.config.num_hidden_layers
    if words is None:
        words = (
            [w for w in RULE.known() if w != "gate" or loaded.config.gates] if blocks > 1 else []
        )
    rules = [loaded.exit_rule(n) for n in layers or range(1, blocks + 1)]
    rules += [loaded.exit_rule(w, x, looks, last) for w in words if w != "none" for x in thresholds]
    click.echo(curve(loaded, text_file, rules, ctx, tokens, as_json, plot))
