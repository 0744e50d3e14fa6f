"""The one type that holds everything a training run needs beside the model's shape."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from bitskip_ref.config import ConfigError, ModelConfig

# Allowed words of the text fields.
CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": ("linear", "cosine", "wsd"),
    "dtype": ("float32", "bfloat16"),
    "exit_weights": ("linear", "inverse", "triangular", "uniform"),
    "exit_targets": ("next", "same"),
    "dropout_form": ("v1", "v2"),
    "route_leftover": ("last", "zero"),
    "quant_reduction": ("mean", "sum"),
    "targets": ("next", "same"),
    "hadamard_form": ("definition", "unscaled", "after", "o_down"),
    "linear_form": ("definition", "public"),
    "init": ("definition", "public"),
    "mask": ("causal", "none"),
}

# Closed ranges; `allowed` has those of the other numbers.
RANGES: dict[str, tuple[float, float]] = {
    "context": (2, 1 << 20),
    "batch": (1, 1 << 20),
    "accumulation": (1, 1 << 20),
    "steps": (1, 1 << 40),
    "lr": (1e-12, 10.0),
    "decay": (0.0, 1.0),
    "beta1": (0.0, 0.999999),
    "beta2": (0.0, 0.999999),
    "clip": (1e-9, 1e9),
    "soft_share": (0.0, 1.0),
    "seed": (0, (1 << 32) - 1),
    "exit_first": (1, 1 << 16),
    "exit_last": (-(1 << 16), 1 << 16),
    "dropout_max": (0.0, 1.0),
    "log_every": (1, 1 << 40),
    "save_every": (1, 1 << 40),
    "threads": (0, 4096),
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run. Checked when made; stored in every checkpoint.

    A step takes `batch * accumulation` windows of `context` tokens. Exits are counted as in
    SPEC 8.1: n = executed blocks. The string below a field is its meaning, a comment on a line of
    its own begins a group: docs/SETTINGS.md and `config.toml` are made of them.
    """

    # Data
    data: tuple[str, ...] = ()
    """Training text: text files, folders of `.txt` files, or `tinystories` or `wikitext-2`, which
    are downloaded. A line `<|endoftext|>` ends a document (SPEC 10 row 18)."""
    valid: tuple[str, ...] = ()
    """Held-out text, given the same way. Empty: no evaluation."""
    tokenizer: str = "gpt2"
    """`bpe:SIZE` trains a byte-level tokenizer of SIZE tokens on the data; `gpt2` is downloaded; a
    path names a `tokenizer.json`, or a folder with `vocab.json` and `merges.txt`."""
    context: int = 512
    """Tokens in a training window, and in a window of the evaluation. At most the model's
    `max_position_embeddings`."""
    batch: int = 16
    """Windows in one forward and backward pass (of each process). Memory grows with it."""
    accumulation: int = 1
    """Passes whose gradients are added up for one step."""
    seed: int = 0
    """First weights, order of windows, layer dropout and gates' draws are functions of it."""
    # Optimizer (AdamW)
    steps: int = 1000
    """Optimizer steps of the whole run, those before a resume included."""
    lr: float = 6e-4
    """Largest learning rate (v1 Table 1: 6e-4; its 4-bit model 3e-4)."""
    min_lr: float = 0.0
    """Learning rate at the end. At most `lr`."""
    warmup: int = 100
    """Steps in which the learning rate rises from 0 to `lr`."""
    schedule: str = "linear"
    """After the warm-up: `linear` falls to `min_lr` (v1), `cosine` does on a cosine, `wsd` stays at
    `lr` and falls in the last part only (v2; SPEC 10 row 17)."""
    decay: float = 0.2
    """Of `wsd`: the last part of all steps, in which the learning rate falls."""
    weight_decay: float = 0.1
    """AdamW's, on matrices only."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    clip: float = 1.0
    """Largest norm of the whole gradient; a longer one is scaled down to it."""
    # Teacher (docs/EXITS.md)
    soft_targets: str = ""
    """A file of `bitskip soft-targets` for this data and tokenizer: what another model, the
    teacher, thinks of each token. The last layer and the exits learn it. Empty: no teacher."""
    soft_share: float = 1.0
    """What the teacher's probabilities are multiplied by; the rest of each target, with all that
    the file leaves out, is the text's own token."""
    # Early-exit loss (SPEC 10 row 11)
    exit_lambda: float = 0.0
    """Weight of the early-exit loss beside the last layer's (v1 Eq. 5, v2 Eq. 7: 0.3). 0: none."""
    exit_weights: str = "linear"
    """Weight of exit n among the exits: `linear` n + 1 (v1 Eq. 6), `inverse` 1 / n (v2 Eq. 4),
    `triangular` n (n + 1) / 2 (LayerSkip), `uniform` 1. They are scaled to sum 1."""
    exit_first: int = 1
    """First exit that is trained."""
    exit_last: int = -1
    """Last exit that is trained; 0 or less counts from the last layer L (v1: -1, v2: 0)."""
    exit_layers: tuple[int, ...] = ()
    """These exits in place of `exit_first` to `exit_last`."""
    exit_shares: tuple[int, ...] = ()
    """Weights of `exit_layers`, one for each, in place of `exit_weights`; scaled to sum 1."""
    exit_subset: int = 0
    """Exits used in one step, in rotation, as every exit costs a head. 0: all in every step."""
    exit_targets: str = "next"
    """What an exit is to name: `next` the next token, `same` the token it is given, which gives the
    cliff of v2 Table 5 (docs/FINDINGS.md)."""
    exit_distill: float = 0.0
    """Weight, within an exit's loss, of its divergence from the last layer's prediction."""
    exit_ramp: int = 0
    """Steps in which `exit_lambda` grows from 0 to its value. 0: at once."""
    exit_detach: bool = False
    """Whether the exits' loss leaves the final norm and head, which they share with the last layer,
    alone (docs/EXITS.md)."""
    exit_raw: bool = False
    """Whether the exits' loss reads hidden states without the final norm, as in the authors' public
    code (SPEC 10 row 24)."""
    # Layer dropout (SPEC 10 row 10)
    dropout_max: float = 0.0
    """The p_max of the probability that a block is skipped for a sample. 0: no layer dropout."""
    dropout_form: str = "v1"
    """How it grows with depth: `v1` p_max (l / L)^2 for l = 1..L, scaled to sum 1 (v1 3.3); `v2`
    the same for l = 0..L-1, unscaled (v2 Eq. 5). The last block is never skipped."""
    dropout_ramp: int = 0
    """Steps in which the probabilities grow from 0 to their values. 0: at once."""
    dropout_until: int = 0
    """Step from which no block is skipped any more. 0: blocks are skipped to the end."""
    # Routing gates and quantization loss (SPEC 10 rows 12 to 14)
    route_lambda: float = 0.0
    """Weight of the route loss, which draws the gates' mean exit layer to L / 2 (v2 Eq. 7 and 9;
    there 0.2). Needs `gates`. 0: none."""
    route_leftover: str = "last"
    """A token that no gate stops counts as the last layer (`last`) or as 0 (`zero`)."""
    peak_lambda: float = 0.0
    """Weight of the peak loss: how far the largest value of a quantized input stands out, its
    square over the mean square. The less it does, the finer are the steps of the 8-bit codes."""
    peak_blocks: int = 0
    """The inputs of so many first blocks count in the peak loss. 0: of all."""
    peak_rest: float = 0.0
    """Beside their mean: the weight of that of the other inputs, the last head's among them."""
    quant_lambda: float = 0.0
    """Weight of the quantization loss, which draws weights to their ternary values (v2 Eq. 7 and 8;
    there 0.05). Needs `linear = "ternary"`. 0: none."""
    quant_reduction: str = "mean"
    """Over all weights the `mean`; or the `sum` in each matrix, then the mean over matrices."""
    # Other readings of the papers, for comparison
    hadamard_form: str = "definition"
    """The transform in training: `definition` is SPEC 5; `unscaled` has entries +-1; `after`
    transforms the quantized values; `o_down` transforms before `o_proj` and `down_proj` alone, as
    BitNet v2 does. All but the first cannot be exported (SPEC 10 row 5)."""
    linear_form: str = "definition"
    """Linear layers in training: `definition` is SPEC 4 and 5; `public` is the authors' public
    code, which cannot be exported (SPEC 10 row 23)."""
    init: str = "definition"
    """First weights of the linear layers; `public`: those of the authors' public code (SPEC 10
    rows 23 and 25)."""
    mask: str = "causal"
    """`none`: every position sees the whole window, the token it is to name, too. That cannot be
    exported (SPEC 10 row 19)."""
    pad_documents: bool = False
    """Whether each document is filled up to a window with end-of-text, which is scored, too
    (SPEC 10 row 18)."""
    targets: str = "next"
    """What the last layer is to name: `next` the next token, `same` the token it is given (SPEC 10
    row 21)."""
    # Evaluation and files
    eval_every: int = 0
    """Steps from one evaluation of `valid` to the next. 0: only at the end."""
    eval_tokens: int = 0
    """At most this many validation tokens. 0: all."""
    eval_exits: tuple[int, ...] = ()
    """Exits evaluated beside the last layer."""
    patience: int = 0
    """Stop after this many evaluations in a row without a better loss; needs `eval_every`.
    0: never."""
    save_every: int = 500
    """Steps from one `last.pt` to the next. A process that is killed loses what came after the
    last one."""
    log_every: int = 10
    """Steps from one line of `history.jsonl` to the next."""
    # Machine
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`; `auto` takes a GPU where there is one."""
    dtype: str = "float32"
    """Of the products: `bfloat16` runs them under autocast; weights and optimizer stay float32."""
    threads: int = 0
    """CPU threads. 0: measured at the start; the number found is kept, also by a resume."""
    compile: bool = False
    """Whether blocks are compiled by `torch.compile`: faster steps, a minute more to begin. Needs a
    C++ compiler."""

    def __post_init__(self) -> None:
        hints = _types()
        for field in dataclasses.fields(self):
            value = _typed(field.name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
            if field.name in CHOICES and value not in CHOICES[field.name]:
                raise ConfigError(
                    f"{field.name} = {value!r}: must be one of {', '.join(CHOICES[field.name])}"
                )
            if hints[field.name] in (int, float):
                low, high = allowed(field.name, hints[field.name])
                if not low <= value <= high:  # also refuses nan
                    raise ConfigError(f"{field.name} = {value}: must be from {low:g} to {high:g}")
        if self.min_lr > self.lr:
            raise ConfigError(f"min_lr = {self.min_lr}: must not be above lr = {self.lr}")
        if self.patience and not self.eval_every:
            raise ConfigError(f"patience = {self.patience}: needs eval_every above 0")
        for name in ("exit_layers", "eval_exits"):
            layers = getattr(self, name)
            if any(n < 1 for n in layers) or len(set(layers)) != len(layers):
                raise ConfigError(f"{name} = {layers}: must be different layers from 1")
        shares = self.exit_shares
        if shares and (len(shares) != len(self.exit_layers) or min(shares) < 1):
            raise ConfigError(
                f"exit_shares = {shares}: must be whole numbers from 1, one for each of "
                f"exit_layers, which are {self.exit_layers or 'none'}"
            )

    def replace(self, **changes: Any) -> TrainConfig:
        """A checked copy with some fields changed."""
        return self.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values; tuples become lists, as in TOML and JSON."""
        return {k: list(v) if type(v) is tuple else v for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Inverse of `to_dict`; missing fields take their defaults.

        Raises ConfigError for unknown or wrong fields.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"unknown field(s): {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**values)


@functools.cache
def _types() -> dict[str, Any]:
    return get_type_hints(TrainConfig)


def check_settings(config: ModelConfig, train: TrainConfig) -> None:
    """Raise ConfigError where model and training settings contradict each other."""
    check_exits(train.eval_exits, config.num_hidden_layers)
    if train.context > config.max_position_embeddings:
        raise ConfigError(
            f"context = {train.context}: the model holds {config.max_position_embeddings} "
            "positions; raise model.max_position_embeddings"
        )
    if train.route_lambda and not config.gates:
        raise ConfigError("route_lambda above 0: needs model.gates = true")
    if train.hadamard_form != "definition" and (not config.hadamard or config.linear == "int8"):
        raise ConfigError(
            f"hadamard_form = {train.hadamard_form!r}: needs model.hadamard = true and ternary "
            "linear layers"
        )
    if train.hadamard_form == "o_down" and config.padded(config.hidden_size) != config.hidden_size:
        raise ConfigError(
            "hadamard_form = 'o_down': leaves inputs of q, k, v, gate and up as wide as they are, "
            f"so model.hidden_size must be a power of two, and is {config.hidden_size}"
        )
    if train.linear_form != "definition":
        _check_public(config, train)
    if train.soft_targets:
        if "same" in (train.targets, train.exit_targets) or train.pad_documents:
            raise ConfigError(
                "soft_targets: a teacher names the next token of the text as it is; needs targets "
                "and exit_targets = 'next', pad_documents = false"
            )
        if config.vocab_size > 1 << 16:
            raise ConfigError(
                f"soft_targets: their files hold ids of at most {1 << 16:,} tokens, "
                f"and model.vocab_size = {config.vocab_size:,}"
            )
    if train.peak_lambda and config.linear == "float32":
        raise ConfigError("peak_lambda above 0: needs linear layers whose inputs are quantized")
    if train.peak_rest and not train.peak_blocks:
        raise ConfigError("peak_rest above 0: needs peak_blocks above 0, whose inputs it is beside")
    if train.quant_lambda and config.linear != "ternary":
        raise ConfigError("quant_lambda above 0: needs model.linear = 'ternary'")


def _check_public(config: ModelConfig, train: TrainConfig) -> None:
    if config.linear != "ternary" or config.relu2_in_linear or train.hadamard_form != "definition":
        raise ConfigError(
            "linear_form = 'public': needs model.linear = 'ternary', relu2_in_linear = false and "
            "hadamard_form = 'definition'"
        )
    widths = {out for out, _ in config.linear_shapes().values()}
    if config.hadamard and any(n & (n - 1) for n in widths):
        raise ConfigError(
            "linear_form = 'public' with hadamard: transforms outputs, so their widths must be "
            f"powers of two, and they are {', '.join(map(str, sorted(widths)))}"
        )


def check_exits(exits: Sequence[int], layers: int) -> list[int]:
    """The exits in order without repeats. Raises ConfigError if one is not in 1..L."""
    for n in exits:
        if not 1 <= n <= layers:
            raise ConfigError(f"exit layer {n}: must be within 1..{layers}")
    return sorted(set(exits))


def allowed(name: str, kind: type) -> tuple[float, float]:
    """The closed range of a field that holds numbers of a kind, int or float."""
    return RANGES.get(name, (0, 1 << 40 if kind is int else 1e9))


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The value as its field's type; only int -> float and list -> tuple are converted."""
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{name}: the number is too large") from None
    item = {tuple[int, ...]: int, tuple[str, ...]: str}.get(kind)
    if item is not None:
        if type(value) not in (list, tuple) or any(type(v) is not item for v in value):
            raise ConfigError(f"{name} = {value!r}: must be a list of {item.__name__}")
        value = tuple(value)
    elif type(value) is not kind:
        raise ConfigError(f"{name} = {value!r}: must be of type {kind.__name__}")
    if item is str or kind is str:
        try:  # files of settings are UTF-8
            "".join(value).encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{name} = {value!r}: must be text in UTF-8; rename it") from None
    return value
