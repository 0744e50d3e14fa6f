"""Helper threads: many callers, more threads than cores, forks, and a clean end."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bitskip_cpu.cores import default_threads
from bitskip_cpu.engine import Engine, load, random_model
from bitskip_cpu.kernels.layout import (
    BLOCKS,
    DOWN,
    FILL,
    QKV,
    SYNC_AHEAD,
    SYNC_AHEAD_AT,
    SYNC_AHEAD_END,
    SYNC_AHEAD_PART,
    SYNC_STAGE,
)
from bitskip_cpu.weights import random_tensors
from bitskip_ref.config import ModelConfig, preset, small_twin
from bitskip_ref.exits import ConfidenceExit, FixedExit
from bitskip_ref.folder import read_folder
from bitskip_ref.tensors import WEIGHTS
from tests.helpers import random_folder, random_tokens

CONFIG = small_twin("wt2-bitskip")
WIDE = CONFIG.replace(
    linear="int8", hidden_size=256, head_dim=64, intermediate_size=256, vocab_size=300
)  # each of its products has two parts at least, so that threads share it
IDS = random_tokens(CONFIG, 20)
WEIGHTS_AHEAD = SYNC_AHEAD_AT, SYNC_AHEAD_END, SYNC_AHEAD_PART


def eager(threads: int, config: ModelConfig = CONFIG) -> Engine:
    """An engine that shares even the smallest stage of more than one part."""
    return Engine(config, random_tensors(config, 0), threads, share_from=0)


def text(engine: Engine) -> np.ndarray:
    """Logits of a prompt and of some steps under a rule, f32 [.., V]."""
    cache = engine.new_cache()
    parts = [engine.extend(IDS[:12], cache)]
    parts += [engine.step(i, cache, ConfidenceExit(0.02))[0][None] for i in IDS[12:]]
    return np.concatenate(parts)


@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["narrow", "wide"])
def test_threads_and_callers_do_not_change_a_bit(config: ModelConfig) -> None:
    expected = text(eager(1, config))
    engines = [eager(n, config) for n in (2, 2, 5)]  # together more threads than cores
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(text, engines * 4))
    for result in results:
        assert result.tobytes() == expected.tobytes()


def test_helpers_are_told_of_the_weights_that_come_next() -> None:
    """Where they lie and what a part of them is; that they are asked for changes no bit."""
    engine = eager(2, WIDE)
    cache = engine.new_cache()  # kept, as the calls below write into it
    engine.step(1, cache, FixedExit())
    s, products, sync = engine._space.state, engine._space.products, engine._space.sync

    def told(at: int, rows: int, row_bytes: int) -> bool:
        begin, end, part = (int(sync[i // 8]) for i in WEIGHTS_AHEAD)
        return begin == at and end == at + rows * row_bytes and part % row_bytes == 0 < part

    assert told(int(s["vocab_weights"]), WIDE.vocab_size, int(s["vocab_row_bytes"]))
    for i in range(WIDE.num_hidden_layers):
        block = engine.weights.linear.ctypes.data + i * engine.weights.layer_bytes
        for action, index in ((BLOCKS, DOWN), (FILL, QKV)):
            engine._call(action, i, i + 1)
            p = products[index]
            first = WIDE.attention_size // 16 * 16 if action == FILL else 0  # keys, values alone
            size, rows = int(p["row_bytes"]), int(p["rows"]) - first
            assert told(block + int(p["weights"]) + first * size, rows, size)
            assert not told(block, rows, size) or first == p["weights"] == 0
    engine._call(BLOCKS, 0, 2)
    assert int(sync[SYNC_AHEAD // 8]) == int(sync[SYNC_STAGE // 8])  # nothing follows the last


def test_a_product_that_is_not_shared_is_not_told() -> None:
    """Helpers would read what the leader alone needs."""
    engine = eager(2)
    cache = engine.new_cache()
    engine.step(1, cache, FixedExit())
    engine._call(BLOCKS, 0, 2)
    assert not engine._space.state["ahead_bytes"] and not engine._space.sync[SYNC_AHEAD // 8]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
def test_four_threads_on_one_busy_core() -> None:
    """Helpers are taken off the core in the middle of parts; nothing hangs or changes."""
    expected = text(eager(1))
    allowed = os.sched_getaffinity(0)
    spin = [sys.executable, "-c", "while True: pass"]
    try:
        os.sched_setaffinity(0, {min(allowed)})  # threads and processes made from here on inherit
        busy = [subprocess.Popen(spin) for _ in range(2)]
        try:
            engine = eager(4)
            results = [text(engine) for _ in range(3)]
        finally:
            for process in busy:
                process.kill()
                process.wait()
    finally:
        os.sched_setaffinity(0, allowed)
    for result in results:
        assert result.tobytes() == expected.tobytes()


def test_engines_may_share_weights() -> None:
    """Turn by turn and side by side: each has its own workspace."""
    first = eager(1)
    engines = [first, *(Engine(CONFIG, first.weights, n, share_from=0) for n in (1, 2, 3))]
    for engine in engines:
        assert engine.weights is first.weights
    expected = text(eager(1))
    for engine in engines:
        assert text(engine).tobytes() == expected.tobytes()
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(text, engines * 3):
            assert result.tobytes() == expected.tobytes()
    with pytest.raises(ValueError, match="another model's"):
        Engine(small_twin("bitskip-v1"), first.weights)


def test_sleeping_helpers_come_back() -> None:
    engine = eager(2)
    expected = text(engine)
    team = engine._team
    assert team is not None
    for _ in range(3):
        deadline = time.monotonic() + 60
        while not team._parked and time.monotonic() < deadline:
            time.sleep(0.01)
        assert team._parked == 1  # asleep in Python, burning nothing
        assert text(engine).tobytes() == expected.tobytes()


def test_helpers_end_with_their_engine() -> None:
    gc.collect()
    before = threading.active_count()
    engine = eager(3)
    text(engine)
    assert threading.active_count() == before + 2
    del engine
    gc.collect()
    assert threading.active_count() == before


def test_one_thread_starts_none() -> None:
    before = threading.active_count()
    engine = eager(1)
    text(engine)
    assert threading.active_count() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_fork_gets_helpers_of_its_own() -> None:
    engine = eager(2)
    expected = text(engine)
    child = os.fork()
    if child == 0:
        os._exit(0 if text(engine).tobytes() == expected.tobytes() else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert text(engine).tobytes() == expected.tobytes()


def in_child(work: Callable[[], bool]) -> bool:
    """Whether a forked child finds `work` true, and comes to an end."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # which ends a child that hangs
        os._exit(0 if work() else 1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def forks_in_the_middle(engine: Engine) -> bool:
    """Whether a child works that was forked while another thread was inside the engine."""
    expected, cache = text(engine), engine.new_cache()
    inside, forked = threading.Event(), threading.Event()
    space = engine._space

    def stay(*_: object) -> None:
        inside.set()
        forked.wait()

    thread = threading.Thread(target=engine.extend, args=([1, 2], cache), kwargs={"trace": stay})
    thread.start()
    inside.wait()
    vocab = int(space.state["vocab"])
    space.state["vocab"] = 3  # as a draft does, which puts it back in the end
    try:
        whole = in_child(lambda: text(engine).tobytes() == expected.tobytes())
        reused = in_child(lambda: engine.extend([1, 2], cache).shape == (2, CONFIG.vocab_size))
    finally:
        space.state["vocab"] = vocab
        forked.set()
        thread.join()
    return whole and reused and text(engine).tobytes() == expected.tobytes()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_fork_while_another_thread_is_in_the_engine(threads: int) -> None:
    assert forks_in_the_middle(eager(threads))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("planted", ["bitskip_ref.turn._TURNS", "bitskip_cpu.engine._ENGINES"])
def test_what_a_fork_leaves_behind_is_seen(monkeypatch: pytest.MonkeyPatch, planted: str) -> None:
    """Without a new lock the child waits for ever; without a new workspace it has odd numbers."""
    engine = eager(1)
    monkeypatch.setattr(planted, set())
    monkeypatch.setattr(signal, "alarm", lambda _, alarm=signal.alarm: alarm(3))
    assert not forks_in_the_middle(engine)


@pytest.mark.filterwarnings("ignore:.*threads.*:RuntimeWarning")
@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_threads_that_cannot_start(monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    """The text is the same, with those that could; one line says so, and the next engine tries."""
    expected, started = text(eager(1)), []
    start = threading.Thread.start

    def limited(self: threading.Thread) -> None:
        started.append(self)
        if len(started) >= fails_at:
            raise RuntimeError("can't start new thread")
        start(self)

    engine = eager(4)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", limited)
        with pytest.warns(RuntimeWarning, match=f"computes with {fails_at} instead of 4 threads"):
            assert text(engine).tobytes() == expected.tobytes()
    assert len(started) == fails_at and text(engine).tobytes() == expected.tobytes()
    assert engine.threads == 4
    assert text(eager(4)).tobytes() == expected.tobytes()


def test_the_interpreter_ends_cleanly(tmp_path: Path) -> None:
    folder = random_folder(tmp_path / "model", CONFIG)
    program = (
        "import bitskip_cpu.engine as e, bitskip_ref.folder as f\n"
        f"folder = f.read_folder({str(folder)!r})\n"
        "engine = e.Engine(folder.config, folder.tensors, 3, share_from=0)\n"
        "print(engine.logits([1, 2, 3]).shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"(3, {CONFIG.vocab_size})\n", "")


def test_small_models_have_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    assert random_model(CONFIG).threads == 1
    assert random_model(CONFIG, threads=2).threads == 2
    monkeypatch.setattr("bitskip_cpu.engine.SMALL", 0)
    assert random_model(CONFIG).threads == default_threads() >= 1


def test_wrong_requests(tmp_path: Path) -> None:
    engine = load(random_folder(tmp_path / "model", CONFIG))
    cache = engine.new_cache()
    for ids, problem in (
        ([], "no tokens"), ([CONFIG.vocab_size], "token ids"), ([-1], "token ids"),
        ([0] * (CONFIG.max_position_embeddings + 1), "exceed the context"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=problem):
            engine.extend(ids, cache)
    with pytest.raises(ValueError, match="exit layer 9"):
        engine.extend([1], cache, exit_layer=9)
    assert cache.length == 0
    cache.length = -1
    with pytest.raises(ValueError, match="cache length -1"):
        engine.extend([1], cache)
    with pytest.raises(ValueError, match="another model"):
        engine.extend([1], random_model(small_twin("bitskip-v1"), threads=1).new_cache())
    with pytest.raises(ValueError, match="threads 0"):
        random_model(CONFIG, threads=0)


def test_a_shortened_cache_forgets() -> None:
    engine = eager(1)
    cache = engine.new_cache()
    engine.extend(IDS[:9], cache)
    engine.extend([5, 5, 5, 5], cache)
    cache.length = 9
    again = engine.extend(IDS[9:], cache)
    assert again.tobytes() == engine.logits(IDS)[9:].tobytes()


def test_a_cache_serves_only_the_blocks_it_holds() -> None:
    """SPEC 8.2."""
    engine = eager(1)
    cache = engine.new_cache()
    engine.extend(IDS[:5], cache)
    engine.step(IDS[5], cache, FixedExit(2))
    for attempt in (
        lambda: engine.extend([1], cache, exit_layer=3),
        lambda: engine.step(1, cache, ConfidenceExit()),
        lambda: engine.step(1, cache, FixedExit()),
    ):
        with pytest.raises(ValueError, match="filled at exit layer 2"):
            attempt()
    cache.length = 0
    assert engine.extend(IDS, cache).tobytes() == engine.logits(IDS).tobytes()


def test_embeddings_are_used_where_they_are_mapped(tmp_path: Path) -> None:
    config = preset("tiny").replace(hidden_size=128)
    tensors = read_folder(random_folder(tmp_path / "model", config)).tensors
    engine = Engine(config, tensors)
    assert engine._space.state["embedding"] == tensors["embed_tokens.weight"].ctypes.data


def test_packed_rows_given_back_can_be_read_again(tmp_path: Path) -> None:
    folder = read_folder(random_folder(tmp_path / "model", preset("tiny")))
    before = {name: tensor.copy() for name, tensor in folder.tensors.items()}
    Engine(folder.config, folder.tensors).logits([1])
    for name, tensor in folder.tensors.items():
        assert np.array_equal(before[name], tensor), name


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_a_loaded_file_does_not_stay_in_memory(tmp_path: Path) -> None:
    """Of what was read to be checked and packed anew, only pages that tensors share remain."""
    config = preset("tiny").replace(hidden_size=512, vocab_size=4096)
    folder = read_folder(random_folder(tmp_path / "model", config))
    engine = Engine(config, folder.tensors)

    def resident() -> int:
        parts = Path("/proc/self/smaps").read_text().split("model.safetensors\n")[1:]
        return sum(1024 * int(part.split("Rss:")[1].split()[0]) for part in parts)

    size = (tmp_path / "model" / WEIGHTS).stat().st_size
    assert resident() < size / 4
    engine.logits([1])  # packs the head
    assert resident() < size / 4
