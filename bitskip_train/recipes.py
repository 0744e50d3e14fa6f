"""Recipes: a preset's model and how the papers train it; files and overrides on top."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitskip_ref.config import PRESETS, ConfigError, ModelConfig
from bitskip_ref.documents import read_text
from bitskip_ref.words import unknown
from bitskip_train.settings import TrainConfig

# The papers compute every exit's loss in every step. With 50,257 words that costs more than the
# model itself, so recipes use a few exits a step, in rotation; exit_subset = 0 takes all.

# v1 Table 1; phase 1 has neither the early-exit loss nor layer dropout (SPEC 10 row 16).
_V1_PHASE1 = TrainConfig(
    data=("tinystories",), tokenizer="gpt2", context=512, batch=16, accumulation=4, steps=50_000,
    lr=6e-4, warmup=1000, schedule="linear", weight_decay=0.1, clip=1.0, dtype="bfloat16",
    eval_every=1000, eval_tokens=200_000, save_every=1000, exit_subset=4,
)  # fmt: skip
_EXIT_LOSS: dict[str, Any] = {
    "exit_lambda": 0.3, "exit_weights": "linear", "exit_first": 1, "exit_last": -1,
}  # fmt: skip
_PHASE2: dict[str, Any] = {**_EXIT_LOSS, "dropout_max": 0.5, "dropout_form": "v1"}
_V2_RATES: dict[str, Any] = {"lr": 3e-4, "warmup": 4000, "clip": 0.5}  # the 4-bit model of v1

# v2 4.2 and 4.3. Not stated there and chosen here: warm-up, decay part, weight decay, clip.
_WT2 = TrainConfig(
    data=("wikitext-2",), tokenizer="gpt2", context=512, batch=32, accumulation=4, steps=10_000,
    lr=6e-4, warmup=500, schedule="wsd", decay=0.2, weight_decay=0.1, clip=1.0, seed=7,
    route_lambda=0.2, quant_lambda=0.05, eval_every=100, patience=3, save_every=100,
    dtype="bfloat16", exit_subset=2,
)  # fmt: skip
_WT2_EXITS: dict[str, Any] = {
    "exit_lambda": 0.3, "exit_weights": "inverse", "exit_first": 1, "exit_last": 0,
    "dropout_max": 0.7, "dropout_form": "v2",
}  # fmt: skip

# The shipped model's successor in one run, about ten hours of one core; the card
# (bitskip_cpu/models/stories-24/README.md) tells how what ships now was made, in several. Exits are
# to be used: lambda above the papers', three of them in every step, and the norm and head they
# share learn from the last layer alone; steps are small (docs/EXITS.md). Gates are fitted
# afterwards (`fit-gates`).
_STORIES = TrainConfig(
    data=("tinystories",), tokenizer="bpe:4096", context=512, batch=4, steps=20_000, lr=3e-3,
    min_lr=1e-5, warmup=200, schedule="wsd", decay=0.2, weight_decay=0.03, seed=1,
    **{**_PHASE2, "exit_lambda": 3.0}, exit_layers=(6, 12, 18), exit_detach=True,
    eval_every=500, eval_tokens=50_000, eval_exits=(6, 12, 18), save_every=100, log_every=20,
    dtype="bfloat16", threads=1, compile=True,
)  # fmt: skip
_TINY = TrainConfig(
    data=("tinystories",), tokenizer="bpe:512", context=64, batch=8, steps=200, lr=3e-3, warmup=20,
    **_PHASE2, eval_every=100, eval_tokens=20_000, eval_exits=(1, 2, 3), save_every=50,
)  # fmt: skip

Recipe = tuple[ModelConfig, TrainConfig]

RECIPES: dict[str, Recipe] = {
    "bitskip-v1": (PRESETS["bitskip-v1"], _V1_PHASE1.replace(**_PHASE2)),
    "bitskip-v1-phase1": (PRESETS["bitskip-v1"], _V1_PHASE1),
    "bitskip-v2": (PRESETS["bitskip-v2"], _V1_PHASE1.replace(**_V2_RATES, **_PHASE2)),
    "bitskip-v2-phase1": (PRESETS["bitskip-v2"], _V1_PHASE1.replace(**_V2_RATES)),
    "bitskip-v3": (PRESETS["bitskip-v3"], _V1_PHASE1.replace(**_PHASE2)),
    "layerskip": (PRESETS["layerskip"], _V1_PHASE1.replace(**_PHASE2)),
    "layerskip-phase1": (PRESETS["layerskip"], _V1_PHASE1),
    "llama3": (PRESETS["llama3"], _V1_PHASE1.replace(**_EXIT_LOSS)),
    "llama3-phase1": (PRESETS["llama3"], _V1_PHASE1),
    "wt2-baseline": (PRESETS["wt2-baseline"], _WT2),
    "wt2-h": (PRESETS["wt2-h"], _WT2),
    "wt2-ee": (PRESETS["wt2-ee"], _WT2.replace(**_WT2_EXITS)),
    "wt2-bitskip": (PRESETS["wt2-bitskip"], _WT2.replace(**_WT2_EXITS)),
    "stories-24": (PRESETS["stories-24"], _STORIES),
    # A vocabulary that a byte-level tokenizer can have: 256 bytes and end-of-text do not fit 256.
    "tiny": (PRESETS["tiny"].replace(vocab_size=512), _TINY),
}

Tables = dict[str, dict[str, Any]]
"""Changes to make: {"model": {field: value}, "train": {field: value}}."""

_FIELDS = {
    "model": {f.name for f in dataclasses.fields(ModelConfig)},
    "train": {f.name for f in dataclasses.fields(TrainConfig)},
}


def recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ConfigError, listing the names, for an unknown one."""
    if name not in RECIPES:
        raise ConfigError(unknown("preset", name, RECIPES))
    return RECIPES[name]


def whole(tables: Tables, path: Path) -> Recipe:
    """A recipe from a file that leaves out nothing that has no default, as `described.to_toml`
    writes it. Raises ConfigError."""
    try:
        model = ModelConfig.from_dict(tables.get("model", {}))
    except ConfigError as error:
        remedy = "; or name a --preset that the file changes" if "missing" in str(error) else ""
        raise ConfigError(f"{path}: [model]: {error}{remedy}") from None
    return model, TrainConfig.from_dict(tables.get("train", {}))


def apply(base: Recipe, changes: Tables) -> Recipe:
    """Checked copies of a recipe's two parts with the changes made."""
    model, train = base
    return model.replace(**changes.get("model", {})), train.replace(**changes.get("train", {}))


def read_toml(path: Path) -> Tables:
    """Changes from a file with the tables [model] and [train]. Raises ConfigError."""
    try:
        tables = tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML ({error})") from None
    for table, values in tables.items():
        if table not in _FIELDS or not isinstance(values, dict):
            raise ConfigError(f"{path}: {table!r} is no table; known: [model], [train]")
        for key in values:
            _refuse_unknown(f"{path}: {table}.{key}", table, key)
    return tables


def parse_overrides(texts: Sequence[str]) -> Tables:
    """Changes from `model.key=value`, `train.key=value` or, as no key is in both, `key=value`.

    Values are written as in TOML, but text needs no quotes, and a list is also `6,12`. Raises
    ConfigError for an unknown key.
    """
    changes: Tables = {"model": {}, "train": {}}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: must be KEY=VALUE")
        table, dot, name = key.strip().partition(".")
        if not dot:
            table, name = "model" if key.strip() in _FIELDS["model"] else "train", key.strip()
        _refuse_unknown(f"--set {text}", table, name, bare=not dot)
        changes[table][name] = _parse_value(value.strip(), table, name)
    return changes


def known_settings() -> list[str]:
    """`model.KEY` and `train.KEY` of every setting."""
    return [f"{table}.{name}" for table in _FIELDS for name in sorted(_FIELDS[table])]


def _refuse_unknown(what: str, table: str, name: str, bare: bool = False) -> None:
    """Raise ConfigError for no setting; bare: KEY was written without its table."""
    if table not in _FIELDS:
        raise ConfigError(f"{what}: {unknown('table', table, _FIELDS)}")
    if name not in _FIELDS[table]:
        names = [n for t in _FIELDS for n in sorted(_FIELDS[t]) if bare or t == table]
        raise ConfigError(f"{what}: {unknown('setting', name, names)}")


def _parse_value(text: str, table: str, name: str) -> Any:
    kind = ModelConfig if table == "model" else TrainConfig
    lists = isinstance(getattr(kind, name, None), tuple)
    if lists and not text.startswith("["):
        items = [item.strip() for item in text.split(",") if item.strip()]
        return [int(item) if item.isdecimal() else item for item in items]
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
