"""A short run of the fuzzer, and mistakes planted for it to find."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitskip_export.foreign import gguf_file, hf_config, hf_read
from bitskip_ref import folder as fd
from bitskip_text import tokenizer as text
from bitskip_train.memory import keep_freed_memory
from tests.fuzz import targets, workers
from tests.fuzz.targets import TARGETS

CASES = {
    "folder": 150, "tokenizer": 150, "checkpoint": 40, "calls": 20, "huggingface": 60, "gguf": 80,
}  # fmt: skip

if not hasattr(os, "fork") or not Path("/proc/self/clear_refs").exists():
    pytest.skip("the fuzzer forks and reads /proc", allow_module_level=True)


@pytest.mark.parametrize("kind", TARGETS)
def test_damaged_files_are_used_or_refused(kind: str) -> None:
    report = workers.fuzz(kind, CASES[kind], seed=0)
    assert report.faults == []
    assert report.used + report.refused == CASES[kind]
    # Damage that always shows would reach little; of calls some are refused in every case.
    assert report.used and (report.refused or kind == "calls")


def test_a_case_is_a_function_of_its_number(tmp_path: Path) -> None:
    import random

    prepared = tmp_path / "prepared"
    prepared.mkdir()
    targets.TARGETS["tokenizer"].prepare(prepared)
    written = []
    for name in "ab":
        (tmp_path / name).mkdir()
        targets.TARGETS["tokenizer"].write(random.Random("x 1 2"), prepared, tmp_path / name)
        written.append((tmp_path / name / fd.TOKENIZER).read_bytes())
    assert written[0] == written[1]


def unchecked(path: Path, most: int = 0) -> dict[str, np.ndarray]:
    """A reader of safetensors that trusts the header."""
    import json
    import struct

    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    kinds = {"U8": np.uint8, "I8": np.int8, "F32": np.float32, "F16": np.float16}
    return {
        name: np.frombuffer(raw, np.uint8)[8 + length :][slice(*entry["data_offsets"])]
        .view(kinds[entry["dtype"]])
        .reshape(entry["shape"])
        for name, entry in header.items()
    }


def test_a_reader_without_checks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fd, "read_tensors", unchecked)
    found = workers.fuzz("folder", 150, seed=0).faults
    assert any(fault.what.startswith(("KeyError", "TypeError", "error")) for fault in found)


def test_a_tokenizer_that_is_trusted_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "decoder_of", lambda stored: text.Decoder())
    found = workers.fuzz("tokenizer", 150, seed=0).faults
    assert any(fault.what.startswith("AssertionError") for fault in found)


def test_a_configuration_that_is_trusted_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_read, "read_config", hf_config._read)  # values of any type
    found = workers.fuzz("huggingface", 150, seed=1).faults
    assert any(fault.what.startswith("TypeError") for fault in found)


def test_lengths_that_are_believed_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(self: Any, size: int) -> bytes:
        self.at += size
        return bytes(self.data[self.at - size : self.at])

    monkeypatch.setattr(gguf_file._Reader, "take", take)
    assert workers.fuzz("gguf", 80, seed=0).faults


def planted(monkeypatch: pytest.MonkeyPatch, use: Any) -> list[str]:
    target = targets.Target(lambda _: None, lambda *_: None, use)
    monkeypatch.setitem(TARGETS, "planted", target)
    return [fault.what for fault in workers.fuzz("planted", 3).faults]


def test_crashes_hangs_and_hunger_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(_: Path) -> str:
        os.kill(os.getpid(), signal.SIGSEGV)
        return "used"

    def spin(_: Path) -> str:
        while True:
            pass

    def wait(_: Path) -> str:
        signal.pause()
        return "used"

    def hungry(_: Path) -> str:
        return "used" if np.ones(400 << 20, np.uint8).any() else "refused"

    def hoarding(place: Path) -> str:
        keep_freed_memory()  # as training does, which may have run in this process
        return hungry(place)

    def greedy(_: Path) -> str:
        return "used" if np.ones(1 << 40, np.uint8).any() else "refused"

    monkeypatch.setattr(workers, "SECONDS", 0.2)
    monkeypatch.setattr(workers, "PATIENCE", 1)
    assert planted(monkeypatch, crash) == ["crash: SIGSEGV"] * 3
    assert planted(monkeypatch, spin) == ["hang: more than 0.2 s of processor time"] * 3
    assert planted(monkeypatch, wait) == ["hang: 1 s"] * 3
    monkeypatch.setattr(workers, "SECONDS", 20)
    monkeypatch.setattr(workers, "PATIENCE", 120)
    assert [w[:7] for w in planted(monkeypatch, hungry)] == ["memory:"] * 3
    assert [w[:7] for w in planted(monkeypatch, hoarding)] == ["memory:"] * 3
    assert all("MemoryError" in w for w in planted(monkeypatch, greedy))
    assert planted(monkeypatch, lambda _: "used") == []


def test_a_tree_deeper_than_json_can_write_is_written() -> None:
    """Damage twice over: what the first left may be readable and no more."""
    import random
    import sys

    from tests.fuzz.mutations import dumped

    deep: Any = 1
    for _ in range(2 * sys.getrecursionlimit()):
        deep = [deep]
    assert b"[[[[" in dumped(random.Random(0), deep)
