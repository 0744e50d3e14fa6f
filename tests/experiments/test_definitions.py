"""The TOML files, and what they mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitskip_experiments import definitions
from bitskip_experiments.corpora import Corpus
from bitskip_experiments.definitions import SCALES, load, names
from bitskip_experiments.derived import DERIVED
from bitskip_experiments.errors import ExperimentError
from bitskip_experiments.measures import MEASURES
from bitskip_experiments.plots import KINDS
from bitskip_experiments.runs import runs_of
from bitskip_train.objective import losses
from bitskip_train.recipes import recipe
from tests.experiments.conftest import write_data

OURS = [
    "bitnet-v2",
    "composition",
    "data-limited",
    "no-mask",
    "no-mask-long",
    "own-rates",
    "public-code",
    "rates",
    "readings-v1",
    "readings-v2",
    "rotation",
    "seen-once",
    "stories-pilots",
    "v1-activations",
    "v2-length",
]
PAPERS = [
    "v1-table3",
    "v1-table4",
    "v1-table5",
    "v1-figure1",
    *(f"v2-table{n}" for n in range(2, 10)),
]


def test_the_papers_tables_are_all_there() -> None:
    assert sorted(names()) == sorted([*OURS, *PAPERS])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", [*OURS, *PAPERS])
def test_every_file_is_whole(name: str, scale: str) -> None:
    experiment = load(name, scale)
    labels = set(experiment.labels)
    layers = experiment.points[0].model.num_hidden_layers if experiment.points else 0
    assert set(experiment.measures) <= set(MEASURES)
    assert all(1 <= n <= layers for n in experiment.exits)
    keys = {str(n) for n in range(1, layers + 1)} if experiment.rows == "exit" else labels
    for column in experiment.columns:
        assert set(column.get("paper", {})) <= keys, column["name"]
        assert set(column.get("text", {})) <= labels
        assert ("figure" in column) != ("text" in column)
        if (path := column.get("figure", "")).startswith("derived."):
            assert path.removeprefix("derived.") in DERIVED
    for item in experiment.compare:
        assert {*item["plus"], *item["minus"]} <= labels
    assert experiment.plot.get("kind", "bars") in KINDS
    if experiment.speed:
        assert experiment.speed in PAPERS
    assert bool(experiment.points) != bool(experiment.measured)
    for point in experiment.points:  # the trainer's own check, without a model
        if point.train.exit_lambda:
            losses.exit_weights(point.train, layers)
        assert point.train.context <= point.model.max_position_embeddings


def test_full_is_the_recipe_itself() -> None:
    for name, label, preset in (
        ("v1-table3", "BitSkip-V2", "bitskip-v2-phase1"), ("v1-table4", "Llama3 FP32", "llama3"),
        ("v2-table2", "BitSkip (H+EE)", "wt2-bitskip"),
    ):  # fmt: skip
        point = load(name, "full").point(label)
        assert (point.model, point.train) == recipe(preset)
    assert load("v2-table6", "full").points[0].train.steps == 500


def test_the_twin_keeps_what_tells_variants_apart() -> None:
    points = {p.label: p for p in load("v1-table3", "cpu").points}
    eight, four = points["BitSkip-V1"].train, points["BitSkip-V2"].train
    assert (four.lr, four.warmup, four.clip) == (eight.lr / 2, eight.warmup * 4, eight.clip / 2)
    for name in ("v1-table3", "v2-table2"):
        small, full = load(name, "cpu").points[0].model, load(name, "full").points[0].model
        for field in ("num_hidden_layers", "norm_position", "ffn", "sub_norm", "gates"):
            assert getattr(small, field) == getattr(full, field)
        ratios = [
            (m.num_attention_heads / m.num_key_value_heads, m.intermediate_size / m.hidden_size)
            for m in (small, full)
        ]
        assert ratios[0] == ratios[1]


def test_tables_share_runs(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")

    def digests(name: str) -> dict[str, str]:
        experiment = load(name, "cpu")
        return {r.point.label: r.digest for r in runs_of(experiment.points, (0,), data, tmp_path)}

    assert digests("v2-table2") == digests("v2-table3") == digests("v2-table4")
    sixth, seventh, eighth = (digests(f"v2-table{n}") for n in (6, 7, 8))
    assert sixth["0.0"] == eighth["lambda_r 0.0, p_max 0.5"]
    assert sixth["0.2"] == eighth["lambda_r 0.2, p_max 0.5"]
    assert sixth["0.01"] == seventh["0.0"]  # the twin's lambda_r there
    assert len({*sixth.values(), *seventh.values(), *eighth.values()}) == 13


def test_an_identity_has_no_place_and_no_machine(tmp_path: Path) -> None:
    first, second = write_data(tmp_path / "a"), write_data(tmp_path / "b")
    points = load("v2-table2", "cpu").points[:1]
    run = runs_of(points, (0,), first, tmp_path)[0]
    assert run.digest == runs_of(points, (0,), second, tmp_path / "w")[0].digest
    assert run.digest != runs_of(points, (1,), first, tmp_path)[0].digest
    (second / "wikitext-2/wiki.valid.tokens").write_text("other\n")
    import bitskip_experiments.corpora

    bitskip_experiments.corpora._digest.cache_clear()
    assert run.digest != runs_of(points, (0,), second, tmp_path)[0].digest
    assert not {"threads", "data", "device", "exit_distill"} & set(run.identity["train"])


def test_a_part_of_a_data_set_is_its_first_lines(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    part, whole = (Corpus(n, data, tmp_path) for n in ("wikitext-2-16th", "wikitext-2"))
    text, all_of_it = (Path(c.place("train")).read_text() for c in (part, whole))
    assert all_of_it.startswith(text) and text.endswith("\n")
    assert 0 <= len(text) - len(all_of_it) / 16 < len(text.splitlines()[-1]) + 1
    assert part.place("valid") == whole.place("valid") and part.digest() != whole.digest()
    with pytest.raises(ExperimentError, match="a part of a file; needs --data DIR"):
        Corpus("wikitext-2-16th", None).place("train")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("v2-table1", 'title = "A table"', "", "lacks the key 'title'"),
        ("v2-table1", "notes =", "note =", "unknown key 'note'; known: checkpoint"),
        ("v2-table1", "format =", "form =", "column 'Exit 2': unknown key 'form'"),
        ("v2-table1", "[[columns]]", "[[columns]", "cannot be read as TOML"),
        ("groups/mini", "wt2-ee", "wt2-no", "unknown preset 'wt2-no'"),
        ("scales", "steps = 3", "step = 3", "unknown field(s): step"),
        ("scales", "head_dim = 8", "head_dim = 7", "head_dim = 7: must be even"),
    ],
)
def test_a_wrong_file_is_named(mini: Path, file: str, old: str, new: str, message: str) -> None:
    path = definitions.HERE / f"{file}.toml"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ExperimentError) as error:
        load("v2-table1", "cpu")
    assert message in str(error.value)
