"""The whole grid, minutes long: every quantized preset and option, engine, instruction-set path,
optimization level, number of threads, way of feeding and exit. The default run samples it.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bitskip_cpu.engine
import bitskip_export
import bitskip_train
from bitskip_cpu.isa import available_paths
from bitskip_ref.compare import difference
from bitskip_ref.model import ReferenceModel
from tests.helpers import OPTIONS, QUANTIZED, random_folder, random_tensors, random_tokens, twin
from tests.parity.test_engine_paths import ROOT, X86, start

pytestmark = pytest.mark.slow

NAMES = [*QUANTIZED, *OPTIONS]
EXITS = (1, 2, 3, 4)
LEVELS = (0, 1, 2, 3, 99)


def engines(folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, engine) of all but the reference, in turn."""
    for threads in (1, 2):
        torch.set_num_threads(threads)
        yield f"torch, {threads} threads", bitskip_train.load_exported(folder)
        yield f"numba, {threads} threads", bitskip_cpu.engine.load(folder, threads)
        for level in LEVELS:
            engine = bitskip_export.load_onnx(folder, threads=threads, optimization=level)
            yield f"onnx, level {level}, {threads} threads", engine


@pytest.mark.parametrize("name", NAMES)
def test_engines(name: str, tmp_path: Path) -> None:
    config = twin(name)
    ids = random_tokens(config, 6)
    reference = ReferenceModel(config, random_tensors(config))
    expected = {n: reference.logits(ids, n) for n in EXITS}
    threads = torch.get_num_threads()
    try:
        for (who, engine), n in itertools.product(engines(random_folder(tmp_path, config)), EXITS):
            cache = engine.new_cache()
            steps = [engine.extend([t], cache, exit_layer=n) for t in ids]
            for how, z in (("whole", engine.logits(ids, n)), ("stepped", np.concatenate(steps))):
                report = difference(f"{who}, exit {n}, {how}", expected[n], z)
                assert report is None, report
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("path", X86)
def test_paths(path: str) -> None:
    if path not in {possible.name for possible in available_paths()}:
        pytest.skip(f"this machine cannot run {path}")
    process = start(X86[path], NAMES)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    problems = json.loads(out)["problems"]
    assert set(problems) == set(NAMES) and not any(problems.values()), problems


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name: str) -> None:
    """Kernels as plain Python: two tokens, whole and stepped, at two exits."""
    config = twin(name)
    ids = random_tokens(config, 2)
    reference = ReferenceModel(config, random_tensors(config))
    code = f"""
import sys
import numpy as np
from bitskip_cpu.engine import Engine
from tests.helpers import random_tensors, twin
engine = Engine(twin({name!r}), random_tensors(twin({name!r})))
for n in (1, 2):
    cache = engine.new_cache()
    steps = [engine.extend([t], cache, exit_layer=n) for t in {ids}]
    for z in (engine.logits({ids}, n), np.concatenate(steps)):
        sys.stdout.buffer.write(z.tobytes())
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True,
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
    )  # fmt: skip
    expected = b"".join(reference.logits(ids, n).tobytes() * 2 for n in (1, 2))
    assert run.stdout == expected
