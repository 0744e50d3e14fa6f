"""The verb `eval`. Only click is imported here: `--help` must answer at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from bitskip.options import (
    COUNT,
    EXIT,
    FOLDER,
    JSON,
    KV_CACHE,
    MODEL,
    SHARE,
    THREADS,
    WHOLE,
    Listed,
    exit_layer,
)
from bitskip_cpu.cli.loading import load_model


class Task(click.ParamType):
    """A task's name; which there are depends on lm-eval's version and --include-path."""

    name = "task"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """The name as it is."""
        if not re.fullmatch(r"[\w.+/-]+", value):
            self.fail(f"{value!r} is no name of a task", param, ctx)
        return str(value)


@click.command("eval")
@MODEL
@click.option(
    "--tasks", required=True, type=Listed(Task()), metavar="NAME,NAME,...",
    help="Of lm-eval: `lm-eval ls tasks` lists them. Their data come from the Hugging Face hub.",
)  # fmt: skip
@exit_layer(
    "exits", Listed(EXIT), "Blocks to run, or what decides for each token, as of generate; each "
    "is evaluated. Default: all blocks.", "N|WORD,...",
)  # fmt: skip
@click.option("--exit-threshold", "threshold", type=SHARE, help="As of generate.")
@click.option("--num-fewshot", "shots", type=WHOLE, help="Examples before each question. "
              "Default: as the task says.")  # fmt: skip
@click.option("--limit", type=COUNT, help="Take so many first questions of each task.")
@click.option("--include-path", type=FOLDER, help="A folder of tasks (.yaml) beside lm-eval's.")
@click.option("--chat", "templated", is_flag=True, help="Ask by the model's chat template.")
@click.option("--parallel", type=COUNT, default=8, show_default=True,
              help="Texts that are generated at once.")  # fmt: skip
@KV_CACHE
@THREADS
@JSON
def evaluate(
    model: str | None, tasks: list[str], exits: list[int | str] | None, threshold: float | None,
    shots: int | None, limit: int | None, include_path: Path | None, templated: bool, parallel: int,
    kv_cache: str, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Evaluate MODEL on tasks of lm-eval, at one exit or several.

    Likelihoods and texts are those of the model alone, to the bit, whatever runs side by side.
    """
    from bitskip_cpu import models

    models.resolve(model)
    import lm_eval  # noqa: F401  # if it is missing, better said before the model is loaded

    from bitskip_eval.run import report, run

    loaded = load_model(model, threads, kv_cache=kv_cache)
    asked = {"num_fewshot": shots, "limit": limit, "apply_chat_template": templated}
    found = run(loaded, tasks, exits or [None], threshold, include_path, parallel, asked)
    click.echo(json.dumps(found) if as_json else report(found))
