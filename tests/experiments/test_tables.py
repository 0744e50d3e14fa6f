"""What tables, differences and pictures say, from results made up here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bitskip_experiments import plots, tables
from bitskip_experiments.definitions import load, names
from bitskip_experiments.derived import look_up
from bitskip_experiments.errors import ExperimentError
from bitskip_experiments.results import read_results, result_path, speed_path
from bitskip_experiments.speed import EXITS, speed_page
from bitskip_experiments.statistics import contrast, mean
from bitskip_experiments.tables import number


def figures(layers: int, loss: float) -> dict[str, Any]:
    """Figures of every kind, from one loss; earlier exits lose 0.1 nats a block."""
    held_out = {
        str(n): {"loss": x, "ppl": math.exp(x), "bits_per_byte": x / (3 * math.log(2))}
        for n in range(1, layers + 1)
        for x in [loss + 0.1 * (layers - n)]
    }
    return {
        "exits": held_out, "as_trained": held_out, "masked": held_out,
        "test": {"ppl": math.exp(loss) + 1},
        "training": {"best_ppl": math.exp(loss), "best_loss": loss, "best_step": 80, "steps": 100,
                     "final_ppl": math.exp(loss) + 2, "final_loss": loss, "train_tokens": 40_000,
                     "curve": [[50, loss + 1], [100, loss]], "exit_curves": {"11": [loss + 2] * 2}},
        "bypass": {
            name: {"loss": x, "ppl": math.exp(x), "bits_per_byte": x / (3 * math.log(2))}
            for name, x in (("none", loss), ("weights", loss + 0.5), ("activations", loss + 1))
        },
        "weights": {"mean_scale": 0.0051, "zeros": 0.3, "plus": 0.34, "minus": 0.36,
                    "half_zero_layers": 4},
        "activations": {str(n): {"std": 0.1 * n} for n in range(layers + 1)},
        "unigram": {"loss": 4.9, "ppl": math.exp(4.9)},
    }  # fmt: skip


def measured(loss: float) -> dict[str, Any]:
    """Figures of a model that was there, from one loss."""
    facts = {"loss": loss, "ppl": math.exp(loss), "bits_per_byte": loss / (3 * math.log(2))}
    values = {"log_kurtosis": loss, "log_peak": 1.0, "layers": [loss] * 4, "tail": [0.1] * 33}
    inputs = dict.fromkeys(("qkv", "o", "up", "down"), values)
    return {"float": facts, "8": facts, "4": facts, "cost": {"8": 0.1, "4": 0.2}, "inputs": inputs}


def write(results: Path, name: str) -> None:
    """Result files of an experiment: run i of seed k has loss 4 + 0.1 i + 0.01 k."""
    experiment = load(name, "cpu")
    for i, label in enumerate(experiment.labels if experiment.measured else ()):
        for seed in experiment.seeds:
            values = {"label": label, "seed": seed, "figures": measured(4 + 0.1 * i + 0.01 * seed),
                      "tokens": 512, "commit": {"measured": "abc"}}  # fmt: skip
            path = result_path(results, experiment, label, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))
    for i, point in enumerate(experiment.points):
        for seed in experiment.seeds:
            values = {
                "label": point.label, "seed": seed, "run": "0",
                "figures": figures(point.model.num_hidden_layers, 4 + 0.1 * i + 0.01 * seed),
                "model": point.model.to_dict(), "train": point.train.to_dict(),
                "seconds": {"training": 60.0, "training_cpu": 50.0}, "commit": {"trained": "abc"},
            }  # fmt: skip
            path = result_path(results, experiment, point.label, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))


@pytest.mark.parametrize("name", names())
def test_every_table_and_picture_is_made_from_results(name: str, tmp_path: Path) -> None:
    write(tmp_path, name)
    experiment = load(name, "cpu")
    found = read_results(tmp_path, experiment, None)
    text = tables.markdown(experiment, found)
    head = next(line for line in text.splitlines() if line.startswith("| "))
    count = head.count("|")
    rows = text.split("\n\n")[2].splitlines()
    assert len(rows) > 2 and all(row.count("|") == count for row in rows)
    assert len(tables.csv_text(experiment, found).splitlines()) == len(rows) - 1
    if experiment.plot:
        plots.draw(experiment, found, tmp_path / "plot.png")
        for label in [*found][:2] if len(found) > 1 else []:  # while not every run is done
            some = {name: runs for name, runs in found.items() if name != label}
            plots.draw(experiment, some, tmp_path / "some.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_2x2_states_paired_differences(tmp_path: Path) -> None:
    write(tmp_path, "v2-table2")
    experiment = load("v2-table2", "cpu")
    text = tables.markdown(experiment, read_results(tmp_path, experiment, None))
    row = "| Baseline |  |  | 55.15 ± 0.32 | 228.8 | 1.928 ± 0.003 | 1.807 | 100 | 1800 | 80 | "
    assert row + "56.15 ± 0.32 |" in text
    line = next(row for row in text.splitlines() if row.startswith("| Hadamard: H-only"))
    # Every seed differs by the same: the interval has no width, though the means have errors.
    # 3 bytes a token here; the paper's -18.9 % are -0.0698 bits a byte.
    assert "| +0.1000 | +0.1000 to +0.1000 | +10.5% | +0.0481 | -0.0697 | above 0 |" in line
    assert "3 seeds" not in text and "seeds 0, 1, 2" in text


def test_speeds_come_from_their_own_file(tmp_path: Path) -> None:
    write(tmp_path, "v1-table4")
    write(tmp_path, "v1-table5")
    fourth, fifth = load("v1-table4", "cpu"), load("v1-table5", "cpu")
    assert "not measured" in tables.markdown(fourth, read_results(tmp_path, fourth, None))
    speeds = {p.label: {"6": 60, "12": 40, "18": 40, "24": 30 - i}
              for i, p in enumerate(fourth.points)}  # fmt: skip
    assert speed_path(tmp_path, fifth) == speed_path(tmp_path, fourth)
    speed_path(tmp_path, fourth).write_text(json.dumps({"table": speeds}))
    text = tables.markdown(fifth, read_results(tmp_path, fifth, None))
    # (exp(0.6) - 1) / (40 / 30 - 1) = 2.47
    assert "| BitSkip-V1 | 1 | 1 | 1 | 2 | Poor | Excellent |" in text
    assert "| 2.47 ± 0.00 | 0.80 |" in text


def test_a_speed_page_has_a_row_for_each_runtime() -> None:
    rows = [
        {"shape": shape, "label": "Llama3 FP32", "runtime": runtime, "exit_layer": n, "threads": 2,
         "tokens": 16, "tokens_per_s": {"median": 100 / n, "samples": [1.0]}}
        for shape in ("paper", "twin") for runtime in ("bitskip-cpu", "onnxruntime") for n in EXITS
    ]  # fmt: skip
    machine = {"cpu": "a processor", "usable_cores": 2}
    text = speed_page({"rows": rows, "environment": machine, "commit": "0123456789"})
    line = "| Llama3 FP32 | onnxruntime | 2 | 16 | 16.67 | 8.333 | 5.556 | 4.167 | +33.3% |"
    assert text.count(line) == 2


def test_means_and_contrasts() -> None:
    one = mean([3.0])
    assert (one.value, one.error, one.interval) == (3.0, None, None)
    three = mean([1.0, 2.0, 3.0])
    assert three.value == 2 and three.error == pytest.approx(1 / math.sqrt(3))
    assert three.interval == pytest.approx((2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)))
    assert mean([1.0, math.inf]).value == math.inf
    paired = contrast([{0: 1.0, 1: 5.0}], [{0: 0.5, 1: 4.5, 2: 9.0}])
    assert (paired.value, paired.error, paired.count) == (0.5, 0.0, 2)
    with pytest.raises(ValueError, match="no seed"):
        contrast([{0: 1.0}], [{1: 1.0}])


def test_derived_figures() -> None:
    made = figures(24, 4.0) | {"speed": {"6": 50.0, "12": 45.0, "18": 40.0, "24": 30.0}}
    assert look_up(made, "derived.ppl_increase") == pytest.approx(math.expm1(0.6))
    assert look_up(made, "derived.speed_gain") == pytest.approx(1 / 3)
    assert look_up(made, "derived.optimal_exit") == 18
    assert look_up(made, "derived.viability") == "Poor"
    assert look_up(made, "derived.degradation") == pytest.approx(math.expm1(-1))
    assert look_up(made, "derived.status") == "Learning"
    made["training"]["best_loss"] = 4.95
    assert look_up(made, "derived.status") == "Collapsed"
    for path, message in (
        ("derived.nothing", "unknown; known: ppl_increase"),
        ("exits.99.ppl", "has no '99'"),
        ("exits.6", "is no number"),
    ):
        with pytest.raises(ExperimentError, match=message):
            look_up(made, path)


def test_numbers_are_short() -> None:
    shown = [number(x) for x in (228.77, 26048.98, 0.0051, 1.5e9, math.inf, 3.0)]
    assert shown == ["228.8", "26,049", "0.0051", "1.5e+09", "inf", "3"]
