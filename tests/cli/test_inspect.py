"""The verb `inspect`: its counts against unpacked weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bitskip.program import runtime as main
from bitskip_cpu.bench.costs import linear_weights
from bitskip_cpu.inspect import inspect
from bitskip_ref.config import small_twin
from bitskip_ref.exits import ConfidenceExit
from bitskip_ref.folder import read_folder, write_auto_exit
from bitskip_ref.packing import unpack_ternary
from tests.cli.conftest import CONFIG
from tests.helpers import random_folder


def test_ternary_statistics_are_those_of_the_weights(folder: Path) -> None:
    read, facts = read_folder(folder), inspect(folder)
    assert [block["layer"] for block in facts["layers"]] == [1, 2, 3, 4]
    for i, block in enumerate(facts["layers"]):
        codes = np.concatenate(
            [
                unpack_ternary(read.tensors[f"layers.{i}.{name}.weight"], width).reshape(-1)
                for name, (_, width) in CONFIG.linear_shapes().items()
            ]
        )
        for key, code in (("minus", -1), ("zero", 0), ("plus", 1)):
            assert block[key] == np.mean(codes == code)
        shares = [np.mean(codes == code) for code in (-1, 0, 1)]
        assert block["entropy_bits"] == pytest.approx(-sum(p * np.log2(p) for p in shares))
        assert block["alpha"]["o_proj"] == read.tensors[f"layers.{i}.o_proj.scale"][0]


def test_sizes_add_up(folder: Path) -> None:
    facts = inspect(folder)
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    data = (folder / "model.safetensors").stat().st_size - 8 - header
    assert facts["bytes"].pop("total") == data == sum(facts["bytes"].values())
    weights = CONFIG.quantizable_parameters()
    assert facts["bits_per_weight"] == 8 * facts["bytes"]["linear layers"] / weights


def test_exit_blocks_are_counted(tmp_path: Path) -> None:
    config = small_twin("bitskip-v1").replace(exit_blocks=(1, 3))
    facts = inspect(random_folder(tmp_path / "model", config))
    assert facts["exits"]["blocks"] == [1, 3]
    block = sum(o * i for o, i in config.linear_shapes().values())
    ffn = 3 * config.hidden_size * config.intermediate_size
    assert facts["linear_parameters"] == 4 * block + 2 * ffn
    assert [linear_weights(config, n) for n in (1, 2, 4)] == [block + ffn, 2 * block, 4 * block]


@pytest.mark.parametrize("name", ["wt2-bitskip", "llama3", "bitnet-2b4t"])
def test_every_kind_of_model(name: str, tmp_path: Path) -> None:
    path = random_folder(tmp_path / "model", small_twin(name))
    plain = CliRunner().invoke(main, ["inspect", str(path)])
    assert plain.exit_code == 0, plain.output
    result = CliRunner().invoke(main, ["inspect", str(path), "--json"])
    facts = json.loads(result.stdout)
    assert facts["tokenizer"] is None
    assert facts["generation"] == {
        "eos_token_id": [0], "chat": False, "bos_token_id": None, "exit_layer": None,
        "auto_exit": None, "sampling": {},
    }  # fmt: skip
    assert "auto: not calibrated" in plain.stdout
    write_auto_exit(read_folder(path), ConfidenceExit(0.5, layers=(1,), last=3), {})
    plain = CliRunner().invoke(main, ["inspect", str(path)])
    assert "auto: max > 0.5 at 1, else 3" in plain.stdout
    assert len(facts["layers"]) == (0 if name == "llama3" else 4)
    assert facts["config"] == small_twin(name).to_dict()
    assert facts["weights_sha256"] in plain.stdout


def test_d6_bits_with_and_without_padding(folder: Path, tmp_path: Path) -> None:
    """Rows of 48 codes are stored as rows of 256."""
    facts = inspect(folder)
    assert facts["bits_per_weight_unpadded"] == 2 < facts["bits_per_weight"]
    text = CliRunner().invoke(main, ["inspect", str(folder)]).stdout
    assert f"at 2 bits ({facts['bits_per_weight']:.3f} with rows padded)" in text
    plain = random_folder(tmp_path / "model", small_twin("llama3"))
    assert (
        "in linear layers at 32 bits\n" in CliRunner().invoke(main, ["inspect", str(plain)]).stdout
    )
