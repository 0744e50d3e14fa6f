"""The one type that holds everything a training run needs beside the model's shape."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_type_hints

from bitskip_ref.config import ConfigError

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
    "hadamard_form": ("definition", "unscaled", "after"),
    "linear_form": ("definition", "public"),
    "init": ("definition", "public"),
    "mask": ("causal", "none"),
}

# Closed ranges of the numbers; fields that are not named must be 0 or more.
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
    "seed": (0, (1 << 32) - 1),
    "exit_first": (1, 1 << 16),
    "exit_last": (-(1 << 16), 1 << 16),
    "dropout_max": (0.0, 1.0),
    "log_every": (1, 1 << 40),
    "save_every": (1, 1 << 40),
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run. Checked when made; stored in every checkpoint.

    A step takes `batch * accumulation` windows of `context` tokens. Exits are counted as in
    SPEC 8.1: n = executed blocks.
    """

    # data
    data: tuple[str, ...] = ()  # text files, folders of .txt, "tinystories" or "wikitext-2"
    valid: tuple[str, ...] = ()  # the same, held out; empty: no evaluation
    tokenizer: str = "gpt2"  # gpt2 | bpe:SIZE | a tokenizer.json | a folder with vocab and merges
    context: int = 512
    batch: int = 16
    accumulation: int = 1
    seed: int = 0
    # optimizer
    steps: int = 1000
    lr: float = 6e-4
    min_lr: float = 0.0
    warmup: int = 100  # steps from 0 to lr
    schedule: str = "linear"
    decay: float = 0.2  # wsd: the last part of the steps, in which lr falls to min_lr
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  # largest global gradient norm
    # early-exit loss (SPEC 10 row 11)
    exit_lambda: float = 0.0  # 0: no early-exit loss
    exit_weights: str = "linear"  # n + 1 | inverse: 1 / n | triangular: n (n + 1) / 2 | uniform: 1
    exit_first: int = 1
    exit_last: int = -1  # 0 or less: counted from L (v1: -1, v2: 0)
    exit_layers: tuple[int, ...] = ()  # these exits in place of exit_first .. exit_last
    exit_subset: int = 0  # exits used in a step, in rotation; 0: all
    exit_targets: str = "next"  # "same": the unshifted reading
    exit_distill: float = 0.0  # weight of KL(last layer || exit) beside the cross-entropy
    exit_ramp: int = 0  # steps over which exit_lambda grows from 0 (a curriculum)
    exit_detach: bool = False  # the exits' loss does not move the norm and head they share
    exit_raw: bool = False  # the exits' loss reads hidden states without the final norm
    # layer dropout (SPEC 10 row 10)
    dropout_max: float = 0.0  # 0: none
    dropout_form: str = "v1"
    dropout_ramp: int = 0  # steps over which the probabilities grow from 0 (a curriculum)
    # routing gates and quantization loss (SPEC 10 rows 12 to 14)
    route_lambda: float = 0.0
    route_leftover: str = "last"
    quant_lambda: float = 0.0
    quant_reduction: str = "mean"
    # other readings of the papers, for comparison (SPEC 10 rows 5, 18, 19, 21, 23 and 24)
    hadamard_form: str = "definition"  # unscaled: entries +-1 | after: the quantized values turn
    linear_form: str = "definition"  # public: the linear layers of the authors' public code
    init: str = "definition"  # public: the linear layers' first weights, of that code
    mask: str = "causal"  # none: every position sees the whole window, what it is to name too
    pad_documents: bool = False  # each document filled up with end-of-text, which is scored too
    targets: str = "next"  # "same": the last layer is to name the token it is given
    # evaluation, reports, files
    eval_every: int = 0  # steps; 0: only at the end
    eval_tokens: int = 0  # at most so many of the validation tokens; 0: all
    eval_exits: tuple[int, ...] = ()  # beside the last layer
    patience: int = 0  # stop after so many evaluations without a better loss; 0: never
    save_every: int = 500
    log_every: int = 10
    # machine
    device: str = "auto"  # auto: cuda where there is one, else cpu
    dtype: str = "float32"  # bfloat16: autocast; master weights stay float32
    threads: int = 0  # 0: PyTorch's choice
    compile: bool = False

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _typed(field.name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
            if field.name in CHOICES and value not in CHOICES[field.name]:
                raise ConfigError(
                    f"{field.name} = {value!r}: must be one of {', '.join(CHOICES[field.name])}"
                )
            if hints[field.name] in (int, float):
                low, high = RANGES.get(field.name, (0, float("inf")))
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


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The value as its field's type; only int -> float and list -> tuple are converted."""
    if kind is float and type(value) is int:
        return float(value)
    item = {tuple[int, ...]: int, tuple[str, ...]: str}.get(kind)
    if item is not None:
        if type(value) in (list, tuple) and all(type(v) is item for v in value):
            return tuple(value)
        raise ConfigError(f"{name} = {value!r}: must be a list of {item.__name__}")
    if type(value) is not kind:
        raise ConfigError(f"{name} = {value!r}: must be of type {kind.__name__}")
    return value
