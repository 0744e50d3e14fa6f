"""What is measured of a trained run, one function each. PyTorch is imported when one runs.

Exits are counted as in SPEC 8.1: n = executed blocks. The paper's layer l of v2 is n = l + 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bitskip_experiments.definitions import Experiment
from bitskip_experiments.errors import ExperimentError
from bitskip_experiments.runs import Run
from bitskip_ref.heldout import HeldOutLoss

if TYPE_CHECKING:
    from bitskip_train.data import Split
    from bitskip_train.model import BitskipModel

Figures = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained run with its model in memory, and what the experiment wants of it."""

    run: Run
    experiment: Experiment

    @functools.cached_property
    def _loaded(self) -> tuple[BitskipModel, str]:
        from bitskip_train.checkpoint import load_checkpoint
        from bitskip_train.model import BitskipModel
        from bitskip_train.trainer import pick_device

        loaded = load_checkpoint(self.run.folder / f"{self.experiment.checkpoint}.pt")
        assert loaded.tokenizer_json is not None  # the trainer always writes it
        return BitskipModel.restored(loaded).to(pick_device("auto")).eval(), loaded.tokenizer_json

    @property
    def model(self) -> BitskipModel:
        """The model of the experiment's checkpoint, on a GPU where there is one."""
        return self._loaded[0]

    def split(self, name: str) -> Split:
        """Tokens of a split by the run's own tokenizer, in whole."""
        from bitskip_experiments.corpora import HUB_SPLITS
        from bitskip_train.data import TextSource, load_split
        from bitskip_train.tokenizer import parse_tokenizer

        tokenizer = parse_tokenizer(self._loaded[1], str(self.run.folder))
        source = TextSource((self.run.corpus.place(name),), HUB_SPLITS[name])
        return load_split(source, tokenizer, self.run.work / "tokens")

    @property
    def chosen(self) -> tuple[int, ...]:
        """The exits that the experiment measures, as far as the model has them; none named: all."""
        every = tuple(range(1, self.model.config.num_hidden_layers + 1))
        return tuple(n for n in self.experiment.exits if n in every) or every

    def losses(
        self, split: str, exits: tuple[int, ...] = (), bypass: str = "none", targets: str = "next"
    ) -> dict[int, HeldOutLoss]:
        """Loss of a split's first tokens (the scale's number), products in float32, per exit.

        The text's bytes are taken in proportion to the tokens. targets: `readings.shifted`.
        """
        from bitskip_train.evaluate import evaluate

        text, limit = self.split(split), self.experiment.tokens
        tokens = text.tokens[: limit + 1] if limit else text.tokens
        share = len(tokens) / len(text.tokens)
        return evaluate(
            self.model, tokens, round(text.bytes * share), context=self.run.point.train.context,
            exits=exits or (self.model.config.num_hidden_layers,), bypass=bypass, targets=targets,
        )  # fmt: skip


def exits(subject: Subject) -> Figures:
    """Held-out loss of the chosen exits (none chosen: all), with standard error over windows."""
    return {str(n): loss.facts() for n, loss in subject.losses("valid", subject.chosen).items()}


def as_trained(subject: Subject) -> Figures:
    """The same of the run's own task: its targets, its mask (SPEC 10 rows 19 and 21)."""
    found = subject.losses("valid", subject.chosen, targets=subject.run.point.train.targets)
    return {str(n): loss.facts() for n, loss in found.items()}


def masked(subject: Subject) -> Figures:
    """The same of the next token with the causal mask on, whatever the run was trained with."""
    own = subject.model.reading
    subject.model.reading = own.replace(mask="causal")
    found = subject.losses("valid", subject.chosen)
    subject.model.reading = own
    return {str(n): loss.facts() for n, loss in found.items()}


def test(subject: Subject) -> Figures:
    """Loss of the test split at full depth. Nothing is chosen by it."""
    return next(iter(subject.losses("test").values())).facts()


def training(subject: Subject) -> Figures:
    """Best and final validation perplexity, where they were, and how the training ended."""
    train, history = subject.run.point.train, subject.run.history()
    found = [(e["step"], e["valid_loss"]) for e in history if "valid_loss" in e]
    best_step, best = min(found, key=lambda item: item[1])
    step, final = found[-1]
    return {
        "best_ppl": math.exp(best), "best_loss": best, "best_step": best_step,
        "final_ppl": math.exp(final), "final_loss": final, "steps": step,
        "stopped_early": step < train.steps,
        "tokens": step * train.batch * train.accumulation * train.context,
        "seconds": subject.run.about.get("seconds"),
        "curve": found,
        "train_tokens": len(subject.split("train").tokens),
        "exit_curves": {
            str(n): [e[f"exit_{n}"] for e in history if "valid_loss" in e] for n in train.eval_exits
        },
    }  # fmt: skip


def bypass(subject: Subject) -> Figures:
    """Full depth: quantized, weights in full precision, activations too (SPEC 10 row 20)."""
    return {
        name: next(iter(subject.losses("valid", bypass=name).values())).facts()
        for name in ("none", "weights", "activations")
    }


def weights(subject: Subject) -> Figures:
    """Ternary statistics (SPEC 4.1): the mean of alpha over the linear layers, fractions of all
    their weights, how many of them have at least half zeros; each layer's own beside."""
    from bitskip_ref.arithmetic.quant import quantize_weights

    layers: dict[str, dict[str, float]] = {}
    for name, weight in subject.model.quantized_weights():
        codes, alpha = quantize_weights(weight.detach().cpu().numpy())
        shares = {"zeros": (codes == 0), "plus": (codes > 0), "minus": (codes < 0)}
        layers[name] = {key: float(where.mean()) for key, where in shares.items()}
        layers[name] |= {"scale": float(alpha), "size": codes.size}
    if not layers:
        raise ExperimentError(f"{subject.run.name}: has no ternary layers")
    sizes = [layer["size"] for layer in layers.values()]
    means = {
        key: float(np.average([layer[key] for layer in layers.values()], weights=sizes))
        for key in ("zeros", "plus", "minus")
    }
    return {
        "mean_scale": float(np.mean([layer["scale"] for layer in layers.values()])),
        **means,
        "half_zero_layers": sum(layer["zeros"] >= 0.5 for layer in layers.values()),
        "matrices": layers,
    }


def activations(subject: Subject) -> Figures:
    """Standard deviation of the residual stream after each block, over held-out tokens.

    All values of all positions of 16 windows; key `0` is the embedding.
    """
    import torch

    tokens, context = subject.split("valid").tokens, subject.run.point.train.context
    count = min(16, max(1, (len(tokens) - 1) // context))
    ids = torch.from_numpy(
        np.stack([tokens[i * context : (i + 1) * context] for i in range(count)]).astype(np.int64)
    ).to(next(subject.model.parameters()).device)
    depth = subject.model.config.num_hidden_layers
    with torch.no_grad():
        hidden = subject.model(ids, collect=range(depth + 1))
    return {str(n): {"std": float(h.std())} for n, h in sorted(hidden.items())}


def unigram(subject: Subject) -> Figures:
    """What knows only how common each token is: training counts plus one, on held-out text.

    A model that is not better has learned nothing of the context: it has collapsed.
    """
    size = subject.model.config.vocab_size
    counts = np.bincount(subject.split("train").tokens, minlength=size) + 1.0
    limit = subject.run.point.train.eval_tokens
    held_out = subject.split("valid").tokens[1 : limit + 1 if limit else None]
    loss = float(-np.log(counts / counts.sum())[held_out].mean())
    return {"loss": loss, "ppl": math.exp(loss)}


MEASURES: dict[str, Callable[[Subject], Figures]] = {
    "exits": exits, "test": test, "training": training, "bypass": bypass, "weights": weights,
    "activations": activations, "unigram": unigram, "as_trained": as_trained, "masked": masked,
}  # fmt: skip
"""Name in the TOML files -> function."""
