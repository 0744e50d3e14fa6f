"""Verdicts, fits and the documents' tables: each by its stated rule."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from bitskip_experiments import claims, fits, pilots, starts
from bitskip_experiments.definitions import load
from bitskip_experiments.documents import refresh
from bitskip_experiments.errors import ExperimentError
from bitskip_experiments.results import read_results, result_path
from bitskip_experiments.statistics import geometric_mean, holm, mean, student_tail
from bitskip_experiments.tables import WIDE, markdown, number
from bitskip_experiments.units import effect
from tests.experiments.test_tables import write

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    "docs/FINDINGS.md", "docs/EXITS.md", "bitskip_cpu/models/stories-24/README.md",
)  # fmt: skip


def test_student_tails_give_the_tabled_quantiles() -> None:
    for degrees, quantile in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262)):
        assert student_tail(quantile, degrees) == pytest.approx(0.05, abs=5e-5)
    assert student_tail(0.0, 2) == 1
    assert mean([1.0, 2.0, 3.0]).p_value(2.0) == 1
    assert mean([1.0]).p_value(0.0) is None
    assert mean([1.0, math.inf]).p_value(0.0) == mean([1.0, 2.0, math.nan]).p_value(0.0) == 1
    assert mean([2.0, 2.0]).p_value(2.0) == 1 and mean([2.0, 2.0]).p_value(1.0) == 0


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_perplexities_have_geometric_means() -> None:
    found = geometric_mean([50.0, 200.0])
    assert found.value == pytest.approx(100) and found.error == pytest.approx(100 * math.log(2))
    assert geometric_mean([3.0]).value == 3.0
    assert geometric_mean([1.0, math.inf]).value == math.inf


@pytest.mark.parametrize(
    ("shift", "word"), [(-0.2, "reproduced"), (0.2, "contradicted"), (-0.072, "not settled")]
)
def test_a_verdict_follows_from_its_rule(tmp_path: Path, shift: float, word: str) -> None:
    """Half of the paper's -0.07 bits a byte is -0.0725 nats of these tokens of 3 bytes."""
    write(tmp_path, "v2-length")
    experiment = load("v2-length", "cpu")
    for i, label in enumerate(("Baseline", "H-only")):
        for seed, noise in enumerate((-0.002, 0.0, 0.002)):
            path = result_path(tmp_path, experiment, label, seed)
            values = json.loads(path.read_text())
            loss = 4 + i * (shift + noise)
            values["figures"]["exits"]["12"]["bits_per_byte"] = loss / (3 * math.log(2))
            path.write_text(json.dumps(values))
    found = next(v for v in claims.verdicts(tmp_path) if "Hadamard improves" in v.claim["name"]
                 and v.experiment == "v2-length")  # fmt: skip
    assert found.high == pytest.approx(effect(185.46, 228.77, "wikitext-2") / 2)
    assert found.word == word
    path.unlink()  # with a seed less there is no verdict, and no part in the correction
    again = next(v for v in claims.verdicts(tmp_path) if v.claim == found.claim)
    assert (again.word, again.p) == ("not complete", None)


def test_claims_without_results_or_tests_say_so(tmp_path: Path) -> None:
    words = {v.claim["name"]: v.word for v in claims.verdicts(tmp_path)}
    assert words["Hadamard improves the baseline (-18.9 %)"] == "not run"
    assert words["More layer dropout is better"] == "not tested at this scale"
    with pytest.raises(ExperimentError, match="needs paper, range or untested"):
        claims.span({"name": "a", "figure": "b"}, "wikitext-2")
    with pytest.raises(ExperimentError, match="unknown key 'rnage'"):
        claims.span({"name": "a", "rnage": [0, 1]}, "wikitext-2")


def test_a_fit_is_the_mean_distance_of_its_cells(tmp_path: Path) -> None:
    found = {"figures": {"exits": {"24": {"loss": 0.5 * math.log(2048)}}},
             "model": {"vocab_size": 2048}, "label": "V1", "seed": 0}  # fmt: skip
    cells = {"V1": {"24": math.sqrt(50_257)}}
    assert fits.distances(cells, {"V1": found}, "exits") == pytest.approx(
        (0, 0.5 * math.log(50_257 / 2048))
    )
    experiment = load("no-mask", "cpu")
    assert sum("not run" in line for line in fits.tables(experiment, tmp_path)) == 8
    write(tmp_path, "no-mask")
    lines = fits.tables(experiment, tmp_path)
    assert sum("not run" in line for line in lines) == 2  # of other experiments
    assert sum("| 3 |" in line for line in lines) == 6


def test_wide_errors_show_the_seeds(tmp_path: Path) -> None:
    write(tmp_path, "v1-table3")
    experiment = load("v1-table3", "cpu")
    path = result_path(tmp_path, experiment, "Llama3 FP32", 2)
    values = json.loads(path.read_text())
    values["figures"]["exits"]["24"]["ppl"] *= 2
    path.write_text(json.dumps(values))
    text = markdown(experiment, read_results(tmp_path, experiment, None))
    shown = geometric_mean([math.exp(4.2), math.exp(4.21), 2 * math.exp(4.22)])
    assert shown.error is not None and shown.error > WIDE * shown.value
    assert f"{number(shown.value)} (66.69, 67.36, 136.1)" in text
    path.unlink()
    for seed in (0, 1):
        result_path(tmp_path, experiment, "Llama3 FP32", seed).unlink()
    text = markdown(experiment, read_results(tmp_path, experiment, None))
    assert "Not run yet: Llama3 FP32." in text
    assert "| Llama3 FP32 less BitSkip-V1 | not run |" in text


def test_committed_pages_and_documents_are_what_the_results_say() -> None:
    results = ROOT / "results"
    assert (results / "claims.md").read_text("utf-8") == claims.page(results), (
        "render: python cli.py reproduce all --render"
    )
    for name in DOCUMENTS:
        text = (ROOT / name).read_text("utf-8")
        assert refresh(text, results) == text, f"python -m bitskip_experiments.documents {name}"


def _untold(document: str) -> list[str]:
    """Figures of three digits and more in a document's prose that are in no table of it.

    A table has one if some figure of it rounds to the one told; the papers' are in the TOML files.
    """
    tables = re.findall(r"<!-- results: .*?<!-- end -->", document, re.DOTALL)
    papers = [path.read_text("utf-8") for path in (ROOT / "bitskip_experiments").rglob("*.toml")]
    known = [_value(told) for text in (*tables, *papers) for told in _FIGURE.findall(text)]
    prose = re.sub(r"<!-- results: .*?<!-- end -->|`[^`]*`|\(\S*\)", "", document, flags=re.DOTALL)
    told = [figure for figure in _FIGURE.findall(prose) if len(re.sub(r"\D", "", figure)) > 2]
    places = {figure: len(figure.partition(".")[2]) for figure in told}
    return [
        figure
        for figure in told
        if all(abs(_value(figure) - x) > 0.5001 * 10.0 ** -places[figure] for x in known)
    ]


_FIGURE = re.compile(r"(?<![\w.])\d[\d,_]*(?:\.\d+)?(?!\w)")


def _value(told: str) -> float:
    return float(re.sub("[,_]", "", told))


def test_figures_in_prose_are_in_the_tables() -> None:
    text = (ROOT / "docs/FINDINGS.md").read_text("utf-8")
    years = ["2025", "2026"]
    assert _untold(text) == years
    planted = text.replace("## Not settled", "V1 stood at 5,027 and at 1.0772.\n## Not settled")
    assert planted != text and _untold(planted) == [*years, "5,027", "1.0772"]


def test_documents_take_tables_from_results(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/table.md").write_text(
        "# A\n\n| x |\n|---|\n| 1 |\n\n| y |\n|---|\n| 2 |\n\n- n\n"
    )
    text = "a\n<!-- results: a, 2 -->\nold\n<!-- end -->\nb\n"
    assert refresh(text, tmp_path) == (
        "a\n<!-- results: a, 2 -->\n| y |\n|---|\n| 2 |\n<!-- end -->\nb\n"
    )
    assert "not run yet" in refresh("<!-- results: rates -->\n<!-- end -->", tmp_path)
    with pytest.raises(ExperimentError, match="no such page"):
        refresh("<!-- results: b -->\n<!-- end -->", tmp_path)
    with pytest.raises(ExperimentError, match="no such table"):
        refresh("<!-- results: a, 3 -->\n<!-- end -->", tmp_path)


def test_first_gradients_are_those_of_the_committed_page() -> None:
    folder = ROOT / "results/first-gradients"
    found = json.loads((folder / "gradients.json").read_text("utf-8"))
    assert (folder / "table.md").read_text("utf-8") == starts.page(found)


def test_pilots_are_those_of_the_committed_page() -> None:
    folder = ROOT / "results/exits"
    assert (folder / "table.md").read_text("utf-8") == pilots.page(folder)
