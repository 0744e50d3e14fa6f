"""The verb `bench`: rows, figures, formats and refusals; never a speed."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from bitskip.program import runtime as main
from bitskip_cpu import isa
from bitskip_cpu.bench import costs, limits, loops, rows
from bitskip_cpu.bench.energy import Energy
from bitskip_cpu.bench.timing import Case, Sample, Task, measure, plan, tasks_of
from bitskip_cpu.kernels.products.ternary_layout import TILE_ROWS, tile_bytes
from bitskip_ref.config import preset
from tests.cli.conftest import CONFIG, ScriptEngine

FAST = {"ENOUGH": 1 << 16, "TURNS": 1 << 4}  # samples of the limits that take no time


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FAST.items():
        monkeypatch.setattr(limits, name, value)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def rows_in_json(*arguments: Any) -> dict[str, Any]:
    result = run(*arguments, "-o", "json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)  # type: ignore[no-any-return]


# ---- the figures of a run -------------------------------------------------------------


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FAST.items():
            patch.setattr(limits, name, value)
        return rows_in_json(
            folder, "-p", "16,8", "-n", 4, "-pg", "6,3", "-d", "0,9", "-t", "1,2",
            "--exit-layer", "2,4", "-r", 2,
        )  # fmt: skip


def test_rows_are_every_test_at_every_depth_exit_and_number_of_threads(
    facts: dict[str, Any], folder: Path
) -> None:
    assert {"cpu", "isa", "packages", "usable_cores"} <= facts["machine"].keys()
    assert facts["model"]["name"] == str(folder)
    assert facts["model"]["config"]["num_hidden_layers"] == 4
    assert facts["start"]["load_s"] > 0 and facts["start"]["compile_s"] == 0.0
    names = ("threads", "depth", "test", "exit_layer")
    assert [tuple(row[name] for name in names) for row in facts["rows"]] == [
        (threads, depth, test, exit_layer)
        for threads in (1, 2)
        for depth in (0, 9)
        for test in ("pp16", "pp8", "tg4", "pp6+tg3")
        for exit_layer in (2, 4)
    ]
    assert len({tuple(row) for row in facts["rows"]}) == 1  # the same keys everywhere


def test_speeds_and_gains(facts: dict[str, Any]) -> None:
    medians = {}
    for row in facts["rows"]:
        speed, samples = row["tokens_per_s"], row["tokens_per_s"]["samples"]
        assert len(samples) == 2 and min(samples) > 0
        assert speed["mean"] == pytest.approx(statistics.fmean(samples))
        assert speed["median"] == pytest.approx(statistics.median(samples))
        assert speed["sd"] == pytest.approx(statistics.stdev(samples))
        assert row["peak_rss_bytes"] > 1 << 20
        medians[row["test"], row["depth"], row["threads"], row["exit_layer"]] = speed["median"]
        assert (row["first_token_ms"] is not None) == (row["prompt_tokens"] > 0)
        assert (row["step_ms"]["p95"] is not None) == (row["generated_tokens"] > 0)
    for row in facts["rows"]:
        here = row["test"], row["depth"], row["threads"]
        gain = medians[*here, 2] / medians[*here, 4] - 1
        expected = None if row["exit_layer"] == 4 else pytest.approx(100 * gain)
        assert row["gain_percent"] == expected


def test_shares_of_the_limits_of_the_same_run(facts: dict[str, Any]) -> None:
    limit = {found["threads"]: found for found in facts["limits"]}
    assert sorted(limit) == [1, 2]
    weights = CONFIG.quantizable_parameters() / 4  # of a block
    for row in facts["rows"]:
        speed, n = row["tokens_per_s"]["median"], row["exit_layer"]
        found = limit[row["threads"]]
        bandwidth = found["read_bytes_per_s"]["median"]
        assert len(found["read_bytes_per_s"]["samples"]) == 3  # around two rounds
        if row["test"] == "tg4":
            entropy = n * weights * np.log2(3) / 8
            assert row["roofline"] == pytest.approx(speed * entropy / bandwidth)
            # A block's rows in tiles, as the path packs them; the int8 head of 48 padded to 64
            # with a scale; int8 keys and values, a step each, of depth + (1 + 2 + 3 + 4) / 4
            # tokens.
            shapes = CONFIG.linear_shapes().values()
            packed = sum(rows * tile_bytes(width) // TILE_ROWS for rows, width in shapes)
            cached = CONFIG.kv_size + 4 * CONFIG.num_key_value_heads
            cache = 2 * n * cached * (row["depth"] + 2.5)
            read = n * packed + CONFIG.vocab_size * (64 + 4) + cache
            assert row["read_bytes_per_token"] == read
            assert row["read_bytes_per_s"] == pytest.approx(read * speed)
            assert row["read_share"] == pytest.approx(read * speed / bandwidth)
        else:
            assert row["roofline"] is row["read_bytes_per_token"] is row["read_share"] is None
        if row["generated_tokens"] == 0 and isa.PATH.accumulators:
            tokens = row["prompt_tokens"]
            products = tokens * n * weights + CONFIG.vocab_size * CONFIG.hidden_size
            done = products * speed / tokens
            assert row["multiply_adds_per_s"] == pytest.approx(done)
            peak = found["multiply_adds_per_s"]["median"]
            assert row["int8_share"] == pytest.approx(done / peak)
        elif row["generated_tokens"]:
            assert row["multiply_adds_per_s"] is row["int8_share"] is None


def test_costs_of_the_papers_model() -> None:
    config = preset("bitskip-v1")
    assert costs.linear_weights(config, 24) == 855_638_016
    assert costs.entropy_bytes(config, 24) == pytest.approx(169.5e6, rel=1e-3)  # 1.585 bits each
    assert costs.entropy_bytes(config, 18) == pytest.approx(0.75 * 169.5e6, rel=1e-3)
    head = 50_257 * 2048
    assert costs.multiply_adds(config, 24, 512) == 512 * 855_638_016 + head
    assert costs.multiply_adds(config, 18, 1) == 641_728_512 + head
    assert costs.cache_bytes(config, 24, 1024, "float32") == 2 * 24 * 8 * 64 * 4 * 1024
    assert costs.cache_bytes(config, 24, 1024, "int8") == 2 * 24 * 8 * (64 + 4) * 1024
    floats = preset("llama3")
    assert costs.entropy_bytes(floats, 24) == 4 * 855_638_016
    assert costs.multiply_adds(floats, 24, 512) == 0
    half = config.replace(head_format="float16")
    assert costs.multiply_adds(half, 24, 2) == 2 * 855_638_016


def test_percentiles_and_first_token_are_over_all_samples() -> None:
    class Engine(ScriptEngine):
        threads = 3

    case = Case(Task(5, 2), 2, Engine(CONFIG, [1]))
    case.samples = [
        Sample(0.5, 0.3, [0.1, 0.1]), Sample(0.7, 0.5, [0.1, 0.1]), Sample(7, 0.4, [0.1, 6.5]),
    ]  # fmt: skip
    (row,) = rows.rows_of([case], limits.Limits(1))
    assert row["threads"] == 3 and row["gain_percent"] is None
    assert row["first_token_ms"] == pytest.approx(400)
    assert row["tokens_per_s"]["median"] == pytest.approx(10)
    assert row["tokens_per_s"]["samples"] == pytest.approx([14, 10, 1])
    p95 = float(np.percentile([100] * 5 + [6500], 95))
    assert row["step_ms"] == pytest.approx({"p50": 100, "p95": p95})


# ---- the order of runs ------------------------------------------------------------------


class Recorder(ScriptEngine):
    """Writes down each call: tokens, exit, and how long the cache was."""

    def __init__(self, calls: list[Any], threads: int) -> None:
        super().__init__(CONFIG, [1])
        self.calls, self.threads = calls, threads

    def extend(self, token_ids: Any, cache: Any, **options: Any) -> Any:
        self.calls.append((self.threads, len(token_ids), options["exit_layer"], cache.length))
        return super().extend(token_ids, cache, **options)

    def step(self, token_id: int, cache: Any, rule: Any, trace: Any = None, **_: Any) -> Any:
        self.calls.append((self.threads, "step", rule.deepest(CONFIG), cache.length))
        return super().step(token_id, cache, rule)


def test_warm_up_is_no_sample_and_everything_alternates() -> None:
    calls: list[Any] = []

    class Beside:
        def sample(self, threads: int) -> None:
            calls.append(f"limit {threads}")

    engines = [Recorder(calls, 1), Recorder(calls, 2)]
    cases = plan(engines, tasks_of([3, 5], [0], [], [0]), [4])
    shown: list[str] = []
    measure(cases, 2, limits=Beside(), progress=shown.append)
    turn = [(1, 3, 4, 0), (1, 5, 4, 0), (2, 3, 4, 0), (2, 5, 4, 0)]
    beside = ["limit 1", "limit 2"]
    assert calls == [*turn, *beside, *turn, *beside, *turn, *beside]
    assert [len(case.samples) for case in cases] == [2] * 4
    assert shown[:1] + shown[-1:] == [
        "warm-up: pp3, exit 4, threads 1", "2 of 2: pp5, exit 4, threads 2",
    ]  # fmt: skip


def test_a_depth_is_filled_once_for_all_exits_and_cut_back() -> None:
    calls: list[Any] = []
    tasks = tasks_of([0], [2], [(3, 1)], [0, 7])
    measure(plan([Recorder(calls, 1)], tasks, [2, 4]), 1)

    def turn(depth: int, n: int) -> list[Any]:
        return [(1, "step", n, depth), (1, "step", n, depth + 1)]

    def pair(depth: int, n: int) -> list[Any]:
        return [(1, 3, n, depth), (1, "step", n, depth + 3)]

    at_0 = [*turn(0, 2), *turn(0, 4), *pair(0, 2), *pair(0, 4)]
    at_7 = [*turn(7, 2), *turn(7, 4), *pair(7, 2), *pair(7, 4)]
    assert calls == [*at_0, (1, 7, 4, 0), *at_7, *at_0, *at_7]


def test_interrupted_after_a_round_it_prints_what_there_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rounds in (1, 0):
        left = iter(range(rounds))

        def sample(self: Any, threads: int, left: Any = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        monkeypatch.setattr(limits.Limits, "sample", sample)
        result = run(folder, "-p", 4, "-n", 2, "-t", 1, "-o", "json")
        assert result.exit_code == 130
        found = json.loads(result.stdout)["rows"] if rounds else []
        assert [len(row["tokens_per_s"]["samples"]) for row in found] == [1, 1][: 2 * rounds]


# ---- the machine's limits ---------------------------------------------------------------


def test_the_read_loop_reads_everything() -> None:
    memory = np.random.default_rng(0).integers(0, 1 << 62, 1 << 12)
    read = loops.reader()
    assert read(memory.ctypes.data, memory.nbytes) == np.bitwise_xor.reduce(memory)
    assert read(memory.ctypes.data, 4096) == np.bitwise_xor.reduce(memory[:512])


@pytest.mark.skipif(
    isa.PATH.matrix_unit or not isa.PATH.accumulators, reason="no vector instruction of the path"
)
def test_the_multiply_loop_does_every_product() -> None:
    turns, seed, count = 3, 12345, isa.PATH.accumulators
    lanes = isa.PATH.width // 4
    signed = np.full(lanes, seed * 0x01030507 % 2**32, np.uint32).view(np.int8).astype(np.int32)
    sums = [np.full(lanes, seed + 7919 * i, np.int32) for i in range(count)]
    for _ in range(turns):
        for i in range(count):
            products = sums[(i + 1) % count].view(np.uint8).astype(np.int32) * signed
            if isa.PATH.pairs:
                pairs = np.clip(products.reshape(-1, 2).sum(1), -(2**15), 2**15 - 1)
                sums[i] = (sums[i].view(np.int16) + pairs).astype(np.int16).view(np.int32)
            else:
                sums[i] = (sums[i] + products.reshape(-1, 4).sum(1)).astype(np.int32)
    expected = np.bitwise_xor.reduce(np.stack(sums)).view(np.int64)
    assert loops.multiplier()(turns, seed) == np.bitwise_xor.reduce(expected)


def test_the_path_plain_has_no_peak(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "PATH", isa.PATHS[-1])
    facts = rows_in_json(folder, "-p", 4, "-n", 2, "-t", 1, "-r", 1)
    assert facts["limits"][0]["multiply_adds_per_s"] is None
    prompt, decoding = facts["rows"]
    assert prompt["int8_share"] is None and prompt["multiply_adds_per_s"] > 0
    assert decoding["roofline"] > 0


# ---- output -----------------------------------------------------------------------------


def test_json_lines_and_csv_have_the_same_rows(folder: Path) -> None:
    options = folder, "-p", "4", "-n", "2", "-t", 1, "-r", 2
    by_line = [json.loads(line) for line in run(*options, "-o", "jsonl").stdout.splitlines()]
    table = list(csv.DictReader(io.StringIO(run(*options, "-o", "csv").stdout)))
    assert [row["test"] for row in by_line] == [row["test"] for row in table] == ["pp4", "tg2"]
    for line, row in zip(by_line, table, strict=True):
        assert list(line) == list(row)
        assert line["model"] == row["model"] == str(folder) and line["isa"] == isa.PATH.name
        assert len(line["tokens_per_s_samples"]) == len(row["tokens_per_s_samples"].split()) == 2
        assert float(row["tokens_per_s_median"]) > 0 and float(row["limit_read_bytes_per_s"]) > 0
        assert row["gain_percent"] == "" and line["gain_percent"] is None
    assert table[0]["step_ms_p50"] == "" and float(table[1]["step_ms_p50"]) > 0


def test_markdown_leaves_out_empty_columns(folder: Path) -> None:
    def header(*options: Any) -> list[str]:
        lines = run(folder, "-t", 1, "-r", 1, *options).stdout.splitlines()
        assert lines[0] == str(folder) and lines[2].startswith("limits of 1 thread: ")
        return [cell.strip() for cell in lines[4].split("|")[1:-1]]

    usual = ["test", "exit", "threads", "KV cache", "tokens/s", "mean ± sd"]
    assert header("-p", 4, "-n", 0)[:7] == [*usual, "first ms"]
    assert header("-p", 4, "-n", 0, "--kv-cache", "float32")[3] == "tokens/s"
    found = header("-p", 0, "-n", 2, "-d", 3, "--exit-layer", "2,4")
    assert found[:8] == ["test", "depth", *usual[1:], "gain %"]
    assert found[8:] == ["p50 ms", "p95 ms", "roofline", "read GB/s", "of limit %", "peak memory"]


def test_both_kinds_of_cache_take_turns(folder: Path) -> None:
    options = folder, "-p", 0, "-n", 2, "-d", 20, "-t", 1, "--kv-cache", "float32,float16"
    rows = rows_in_json(*options, "-r", 1, "--exit-layer", "2,4")["rows"]
    assert [(row["kv_cache"], row["exit_layer"]) for row in rows] == [
        ("float32", 2), ("float32", 4), ("float16", 2), ("float16", 4),
    ]  # fmt: skip
    for full, half in zip(rows[:2], rows[2:], strict=True):
        cached = costs.cache_bytes(CONFIG, full["exit_layer"], 21.5, "float32")
        assert full["read_bytes_per_token"] - half["read_bytes_per_token"] == cached / 2
        assert (full["gain_percent"] is None) == (half["gain_percent"] is None)


def test_a_preset_has_random_weights_and_the_context_it_needs() -> None:
    context = preset("tiny").max_position_embeddings
    facts = rows_in_json("--preset", "tiny", "-p", 0, "-n", 2, "-d", context, "-t", 1, "-r", 1)
    assert facts["model"]["name"] == "tiny (random weights, seed 0)"
    assert facts["model"]["config"]["max_position_embeddings"] == context + 2
    assert [(row["test"], row["depth"]) for row in facts["rows"]] == [("tg2", context)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "65"], "pp65 at depth 0 needs 65 positions, but the model's context is 64"),
        (["-n", "4", "-p", "0", "-d", "61"], "tg4 at depth 61 needs 65 positions"),
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-pg", "4"], "'4': must be 2 values, separated by commas"),
        (["-pg", "4,0"], "0 is not in the range x>=1"),
        (["-d", "-1"], "-1 is not in the range x>=0"),
        (["--exit-layer", "9"], "choose 1..4"),
        (["-r", "0"], "-r"),
        (["-t", "0"], "0 is not in the range x>=1"),
        (["-p", "1;2"], "'1;2' is not a valid integer"),
        (["--kv-cache", "float32,q8"], "unknown KV cache 'q8'; known: float32, float16, int8"),
        (["-o", "xml"], "'md', 'json', 'jsonl', 'csv'"),
        (["--preset", "tiny"], "exclude each other"),
    ],
)
def test_bad_options(folder: Path, options: list[str], message: str) -> None:
    result = run(folder, *options)
    assert result.exit_code in (1, 2)
    assert message in result.stderr.splitlines()[-1]


def test_an_unknown_preset_lists_the_known_ones() -> None:
    result = run("--preset", "huge")
    assert result.exit_code == 2
    assert "unknown preset 'huge'" in result.stderr and "tiny" in result.stderr


# ---- energy -------------------------------------------------------------------------------


def test_energy_where_it_is_counted(tmp_path: Path) -> None:
    zones = [tmp_path / f"intel-rapl:{i}" for i in range(2)]
    for zone, counted in zip((*zones, tmp_path / "intel-rapl:0:0"), (10, 900, 5), strict=True):
        zone.mkdir()
        (zone / "energy_uj").write_text(f"{counted}000000\n")
        (zone / "max_energy_range_uj").write_text("1000000000\n")
    energy = Energy(tmp_path)
    before = energy.read()
    (zones[0] / "energy_uj").write_text("12000000\n")
    (zones[1] / "energy_uj").write_text("3000000\n")  # it began anew
    assert energy.joules(before) == 2 + 103
    (zones[1] / "energy_uj").unlink()
    assert energy.read() is None and energy.joules(before) is None
    nothing = Energy(tmp_path / "nowhere")
    assert nothing.read() is None and nothing.joules(None) is None


def test_tokens_per_joule() -> None:
    class Counted(Energy):
        def read(self) -> list[int]:
            return [0]

        def joules(self, before: list[int] | None) -> float:
            return 0.5

    cases = plan([ScriptEngine(CONFIG, [1])], tasks_of([3, 6], [0], [], [0]), [4])
    measure(cases, 2, energy=Counted())
    found = rows.rows_of(cases, limits.Limits(1))
    assert [row["tokens_per_joule"] for row in found] == [6, 12]
