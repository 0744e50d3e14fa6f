"""The programs `bitskip` and `bitskip-cpu`. Only click is imported: `--help` answers at once."""

from __future__ import annotations

import click

import bitskip
from bitskip.group import Sections, Verbs

_CPU = "bitskip_cpu.cli"

RUN: Sections = {
    "Run a model": {
        "generate": (f"{_CPU}.generate:generate", "Continue a prompt."),
        "chat": (f"{_CPU}.chat:chat", "Talk with a model that has a chat template."),
        "serve": ("bitskip_serve.cli:serve", "Serve a model over HTTP: OpenAI's API, and a page."),
        "bench": (f"{_CPU}.bench:bench", "Measure tokens a second."),
        "inspect": (f"{_CPU}.machine:inspect", "Show shapes, sizes and statistics of a model."),
    },
    "Choose an exit": {
        "perplexity": (
            f"{_CPU}.heldout:perplexity",
            "Measure held-out loss of a model at each exit.",
        ),
        "exits": (f"{_CPU}.heldout:exits", "Measure loss and speed at each exit and threshold."),
        "calibrate": (
            f"{_CPU}.heldout:calibrate",
            "Find the fastest exit within a budget of loss.",
        ),
        "eval": ("bitskip_eval.cli:evaluate", "Run tasks of the harness lm-eval at each exit."),
    },
    "This machine": {
        "selftest": (f"{_CPU}.machine:selftest", "Compare the compiled engine with the reference."),
        "warmup": (f"{_CPU}.machine:warmup", "Compile the kernels."),
        "doctor": (f"{_CPU}.machine:doctor", "Show what this machine offers and lacks."),
    },
}
MAKE: Sections = {
    "Make a model": {
        "train": ("bitskip_train.cli:train", "Train a model."),
        "evaluate": (
            "bitskip_train.cli:evaluate",
            "Measure held-out loss of a checkpoint at each exit.",
        ),
        "average": ("bitskip_train.cli:average", "Write the mean of several checkpoints' weights."),
        "fit-gates": (
            "bitskip_train.cli:fit_gates",
            "Give a checkpoint or model folder routing gates.",
        ),
        "soft-targets": (
            "bitskip_export.soft_targets:soft_targets",
            "Write a teacher's predictions of a text, to train from.",
        ),
        "fit-exits": (
            "bitskip_export.exit_blocks:fit_exits",
            "Give early exits of a finished model a block each.",
        ),
        "export": (
            "bitskip_export.cli:export",
            "Write a model folder, ONNX, Hugging Face, GGUF or a site.",
        ),
        "import": ("bitskip_export.foreign.verbs:bring", "Convert a Hugging Face or GGUF model."),
        "verify": (
            "bitskip_export.cli:verify",
            "Compare every engine with the reference, bit for bit.",
        ),
        "reproduce": (
            "bitskip_experiments.cli:reproduce",
            "Reproduce a table or figure of the papers.",
        ),
    },
}
INSPECT = ("bitskip.inspect:inspect", "Show shapes, sizes and statistics of a model or checkpoint.")
WHOLE: Sections = {**RUN, **MAKE, "Run a model": {**RUN["Run a model"], "inspect": INSPECT}}
SETTINGS = {"help_option_names": ["-h", "--help"]}


@click.command(
    cls=Verbs, sections=WHOLE, elsewhere={}, context_settings=SETTINGS,
)  # fmt: skip
@click.version_option(bitskip.__version__, prog_name="bitskip")
def main() -> None:
    """Train, export and run ternary language models that can stop early.

    bitskip VERB -h lists a verb's options.
    """


@click.command(cls=Verbs, sections=RUN, elsewhere=MAKE, context_settings=SETTINGS)
@click.version_option(bitskip.__version__, prog_name="bitskip-cpu")
def runtime() -> None:
    """Run ternary language models with early exits on the CPU.

    MODEL is a model folder or the name of a model that comes with the package; without it the
    verbs take the one that ships. bitskip-cpu VERB -h lists a verb's options.
    """
