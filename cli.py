"""python cli.py VERB: every verb of the project. A verb's package is imported when it is called."""

from __future__ import annotations

import importlib

import click

VERBS = {  # verb -> (module:command, what --help says)
    "train": ("bitskip_train.cli:train", "Train a model."),
    "evaluate": ("bitskip_train.cli:evaluate", "Held-out loss of a checkpoint, per exit."),
    "reproduce": ("bitskip_experiments.cli:reproduce", "A table or figure of the papers."),
    "average": ("bitskip_train.cli:average", "The mean of several checkpoints' weights."),
    "fit-gates": ("bitskip_train.cli:fit_gates", "Give a trained checkpoint routing gates."),
    "export": ("bitskip_export.cli:export", "Checkpoint to a packed model folder."),
    "verify": (
        "bitskip_export.cli:verify",
        "Compare every engine with the reference, by bits.",
    ),
    "generate": ("bitskip_cpu.cli:generate", "Continue a prompt (as bitskip-cpu; so all below)."),
    "bench": ("bitskip_cpu.cli:bench", "Measure tokens a second."),
    "perplexity": ("bitskip_cpu.cli:perplexity", "Held-out loss of a folder, per exit."),
    "exits": ("bitskip_cpu.cli:exits", "Loss and speed of a folder, per exit and threshold."),
    "calibrate": ("bitskip_cpu.cli:calibrate", "Find a folder's exit within a budget of loss."),
    "inspect": ("bitskip_cpu.cli:inspect", "Shapes, sizes and ternary statistics of a folder."),
    "selftest": ("bitskip_cpu.cli:selftest", "The compiled engine against the reference."),
    "warmup": ("bitskip_cpu.cli:warmup", "Compile the kernels."),
    "doctor": ("bitskip_cpu.cli:doctor", "What this machine offers and lacks."),
}


class LazyGroup(click.Group):
    """A group that imports a verb's module only when the verb is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        module, attribute = VERBS[name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])


@click.command(cls=LazyGroup)
def main() -> None:
    """Ternary language models with early exit: train, export, run."""


if __name__ == "__main__":
    main()
