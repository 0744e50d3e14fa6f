"""Early exits of models of other programs: every rule, drafts, fitted gates, calibration."""

from __future__ import annotations

import json
from pathlib import Path

from bitskip_ref.config import small_twin
from bitskip_ref.folder import read_folder
from tests.cli.conftest import CORPUS, write_model
from tests.interop.test_verbs import run


def test_exits_of_an_imported_model(tmp_path: Path) -> None:
    theirs = small_twin("llama3").replace(vocab_size=320)
    write_model(tmp_path / "m", theirs)
    assert run("export", tmp_path / "m", "--to", "hf").exit_code == 0
    folder, gated, text = tmp_path / "in", tmp_path / "gated", tmp_path / "text.txt"
    said = run("import", tmp_path / "m-hf", "-o", folder).output
    assert "early exits: 1..3 run, training decides" in said
    text.write_text("\n<|endoftext|>\n".join(CORPUS * 40))

    def told(model: Path, *words: object) -> dict[str, object]:
        result = run("generate", model, "-p", "the cat", "-n", 6, "--temp", 0, "--json", *words)
        assert result.exit_code == 0, result.output
        found: dict[str, object] = json.loads(result.stdout)
        return found

    plain = told(folder)
    assert told(folder, "--exit-layer", 2)["mean_exit_layer"] == 2
    assert told(folder, "--exit-layer", "max", "--exit-threshold", 0)["mean_exit_layer"] != 4
    for how in ("auto", "lookup"):
        assert told(folder, "--speculate", how)["token_ids"] == plain["token_ids"]
    result = run("fit-gates", folder, "--data", text, "--steps", 2, "--batch", 2,
                 "--token-cache", tmp_path / "tokens", "-o", gated)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert read_folder(gated).config == read_folder(folder).config.replace(gates=True)
    assert told(gated)["token_ids"] == plain["token_ids"]
    result = run("calibrate", gated, "--text", text, "--budget", "99%", "--tokens", 60)
    assert result.exit_code == 0, result.output
    assert read_folder(gated).auto_exit is not None
    assert told(gated, "--exit-layer", "auto")["exit_layers"]
