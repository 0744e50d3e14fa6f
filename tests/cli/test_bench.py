"""The verb `bench`: rows, keys and refusals; never a speed."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bitskip_cpu.bench import bench
from bitskip_cpu.cli import main
from tests.cli.conftest import CONFIG, ScriptEngine


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_json_rows(folder: Path) -> None:
    result = run(
        folder, "-p", "16,8", "-n", 4, "-t", "1,2", "--exit-layer", "2,4", "-r", 2, "-o", "json"
    )
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert {"cpu", "isa", "packages", "usable_cores"} <= facts["machine"].keys()
    assert facts["model"]["name"] == str(folder)
    keys = [(row["test"], row["exit_layer"], row["threads"]) for row in facts["rows"]]
    assert keys == [
        (test, exit_layer, threads)
        for threads in (1, 2)
        for test in ("pp16", "pp8", "tg4")
        for exit_layer in (2, 4)
    ]
    for row in facts["rows"]:
        speed = row["tokens_per_s"]
        assert len(speed["samples"]) == 2 and min(speed["samples"]) > 0
        assert speed["mean"] == pytest.approx(statistics.fmean(speed["samples"]))
        assert speed["sd"] == pytest.approx(statistics.stdev(speed["samples"]))
        assert row["peak_rss_bytes"] > 1 << 20
        assert ("latency_ms" in row) == (row["test"] == "tg4")
    assert "warm-up" in result.stderr


def test_a_preset_has_random_weights() -> None:
    result = run("--preset", "tiny", "-p", 0, "-n", 2, "-t", 1, "-r", 1)
    assert result.exit_code == 0, result.stderr
    assert "tiny (random weights, seed 0)" in result.stdout
    assert [line.split("|")[1].strip() for line in result.stdout.splitlines()[5:]] == ["tg2"]


def test_warm_up_is_no_sample_and_repetitions_alternate() -> None:
    calls: list[int] = []

    class Engine(ScriptEngine):
        def extend(self, token_ids: Any, cache: Any, **options: Any) -> Any:
            assert cache.length == 0
            calls.append(len(token_ids))
            return super().extend(token_ids, cache, **options)

    rows = bench(
        lambda _: Engine(CONFIG, [1]), prompts=[3, 5], generated=[0], threads=[1], exits=[4],
        repetitions=2,
    )  # fmt: skip
    assert calls == [3, 5] * 3
    assert [len(row["tokens_per_s"]["samples"]) for row in rows] == [2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "65"], "pp65: needs 1..64"),
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["--exit-layer", "9"], "choose 1..4"),
        (["-r", "0"], "-r"),
        (["-t", "0"], "below 1"),
        (["-p", "1;2"], "whole numbers"),
        (["--preset", "tiny"], "exclude each other"),
    ],
)
def test_bad_options(folder: Path, options: list[str], message: str) -> None:
    result = run(folder, *options)
    assert result.exit_code in (1, 2)
    assert message in result.stderr.splitlines()[-1]


def test_an_unknown_preset_lists_the_known_ones() -> None:
    result = run("--preset", "huge")
    assert result.exit_code == 1
    assert "unknown preset 'huge'" in result.stderr and "tiny" in result.stderr
