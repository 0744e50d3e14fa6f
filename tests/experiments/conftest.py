"""A miniature of the experiments: a run, a sweep that shares it, a little text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bitskip.program import main
from bitskip_experiments import definitions

GROUP = """
data = "wikitext-2"
scales = ["mini"]
preset = "wt2-ee"

[runs."With exits"]
"""
SCALES = """
[full.mini]
[cpu]
measure_tokens = 300

[cpu.mini.model]
vocab_size = 300
hidden_size = 16
num_hidden_layers = 3
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 8
intermediate_size = 32
max_position_embeddings = 16

[cpu.mini.times]
warmup = 0.002

[cpu.mini.train]
tokenizer = "bpe:300"
context = 16
batch = 2
accumulation = 1
steps = 3
dtype = "float32"
eval_every = 1
eval_tokens = 200
save_every = 1
log_every = 1
threads = 1
"""
TABLE = """
title = "A table"
source = "nowhere, Table 1"
group = "mini"
measures = ["training", "exits", "test", "bypass", "weights", "activations", "unigram"]
seeds = { cpu = [0, 1], full = [7] }
plot = { kind = "bars", figure = "training.best_ppl" }
notes = ["A note."]

[[compare]]
name = "Ternary less FP"
plus = ["With exits"]
minus = []
figure = "derived.ternary_cost"
paper = 0.896

[[columns]]
name = "Best PPL"
figure = "training.best_ppl"
paper = { "With exits" = 252.37 }

[[columns]]
name = "Exit 2"
figure = "exits.2.loss"
format = ".2f"

[[columns]]
name = "Status"
figure = "derived.status"
"""
SWEEP = """
title = "A sweep"
source = "nowhere, Table 2"
group = "mini"
measures = ["training"]
seeds = { cpu = [0], full = [7] }
plot = { kind = "sweep", figure = "training.final_ppl" }

[grid]
label = "{route_lambda}"
values = { route_lambda = [0.2, 0.0] }

[[columns]]
name = "Final PPL"
figure = "training.final_ppl"
paper = { "0.2" = 251.11, "0.0" = 254.56 }
"""
TEXT = "The quick brown fox saw number {} and was not amused .\n"


def write_definitions(folder: Path) -> Path:
    """The TOML files above."""
    (folder / "groups").mkdir(parents=True)
    for name, text in (
        ("groups/mini", GROUP), ("scales", SCALES), ("v2-table1", TABLE), ("v2-table2", SWEEP),
    ):  # fmt: skip
        (folder / f"{name}.toml").write_text(text)
    return folder


def write_data(folder: Path) -> Path:
    """A data set in the place of WikiText-2."""
    (folder / "wikitext-2").mkdir(parents=True)
    for i, split in enumerate(("train", "valid", "test")):
        text = "".join(TEXT.format(k * (i + 3)) for k in range(200))
        (folder / "wikitext-2" / f"wiki.{split}.tokens").write_text(text)
    return folder


@pytest.fixture
def mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the miniature's definitions (in use), `data`, and room for work and results."""
    monkeypatch.setattr(definitions, "HERE", write_definitions(tmp_path / "definitions"))
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    write_data(tmp_path / "data")
    yield tmp_path


def reproduce(place: Path, *words: str) -> Result:
    """The verb, in this process; an exception that is no clean exit fails the test."""
    folders = ["--data", place / "data", "--work", place / "work", "--results", place / "results"]
    arguments = ["reproduce", *words, *map(str, folders)]
    result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
