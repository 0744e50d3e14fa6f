"""What caches hold where nobody says: what a folder recommends, or a verb's usual kind."""

from __future__ import annotations

import json
from pathlib import Path

import bitskip_cpu
from bitskip_ref.cache import usual_kv_cache
from tests.helpers import random_folder, twin


def test_a_folder_may_recommend_a_kind(tmp_path: Path) -> None:
    folder = random_folder(tmp_path / "model", twin("bitskip-v1"))
    kinds = [
        bitskip_cpu.load(folder).kv_cache,
        bitskip_cpu.load(folder, usual_cache="int8").kv_cache,
    ]
    place = folder / "generation_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "kv_cache": "float16"}))
    kinds += [
        bitskip_cpu.load(folder).kv_cache,
        bitskip_cpu.load(folder, usual_cache="int8").kv_cache,
        bitskip_cpu.load(folder, kv_cache="float32").kv_cache,
    ]
    assert kinds == ["float32", "int8", "float16", "float16", "float32"]


def test_positions_that_int8_sums_cannot_take() -> None:
    config = twin("bitskip-v1").replace(max_position_embeddings=131_073)
    assert usual_kv_cache(None, "int8", config) == "float16"
    assert usual_kv_cache("float32", "int8", config) == "float32"
