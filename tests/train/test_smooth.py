"""A head whose input was made even says the same, and loses less to 8-bit rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import bitskip_cpu
from bitskip_export.cli import export
from bitskip_export.pack import ExportError, export_checkpoint
from bitskip_ref.config import ConfigError, ModelConfig
from bitskip_train.checkpoint import load_checkpoint, save_checkpoint
from bitskip_train.model import BitskipModel
from bitskip_train.smooth import smooth
from tests.cli.conftest import byte_level_bpe
from tests.export.test_pack import CONFIG, write_checkpoint

MODEL = CONFIG.replace(
    vocab_size=320, tie_word_embeddings=False, head_format="int8", exit_norm="shared",
    exit_head="shared",
)  # fmt: skip
WIDE = 3, 25.0  # a channel, and how much larger than the others
TOKENS = np.arange(300)
TEXT = "the cat sat on the mat\n" * 20


def widened(config: ModelConfig) -> dict[str, torch.Tensor]:
    """A model's parameters with one channel that is wide after final norms and narrow in heads."""
    model = BitskipModel(config)
    model.reset_parameters(torch.Generator().manual_seed(3))
    state = {name: w.detach().clone() for name, w in model.state_dict().items()}
    channel, by = WIDE
    for name, w in state.items():
        if name == "final_norm.weight" or name.endswith(".norm.weight"):
            w[channel] *= by
        elif name.endswith(("lm_head.weight", ".head.weight")):
            w[:, channel] /= by
    return state


def logits(config: ModelConfig, state: dict[str, torch.Tensor], n: int) -> torch.Tensor:
    """Of the training arithmetic, which rounds no head."""
    model = BitskipModel(config)
    model.load_state_dict(state)
    with torch.no_grad():
        return model.logits(model(torch.from_numpy(TOKENS[:64])[None], collect=[n])[n], n)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"norm": "layer"}, {"exit_norm": "per_layer"},
        {"exit_norm": "per_layer", "exit_head": "per_layer"}, {"head_format": "int6"},
        {"exit_blocks": [1]},
    ],
)  # fmt: skip
def test_the_same_logits_but_for_rounding(changes: dict[str, Any]) -> None:
    config = MODEL.replace(**changes)
    state, exits = widened(config), [1, config.num_hidden_layers]
    found = smooth(config, state, TOKENS, 64, exits)
    changed = {name for name in state if not torch.equal(state[name], found[name])}
    assert {"final_norm.weight", "lm_head.weight"} <= changed
    assert all("norm" in name or "head" in name for name in changed)
    for n in range(1, config.num_hidden_layers + 1):
        before, after = logits(config, state, n), logits(config, found, n)
        assert (before - after).abs().max() < 1e-5 * before.abs().max()


def test_rounding_takes_less(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.pt", MODEL, byte_level_bpe())
    loaded = load_checkpoint(path)
    loaded.state.update(widened(loaded.config))
    save_checkpoint(path, loaded)
    text = tmp_path / "text.txt"
    text.write_text(TEXT, "utf-8")
    plain = bitskip_cpu.load(export_checkpoint(path, tmp_path / "plain"), threads=1)
    even = bitskip_cpu.load(export_checkpoint(path, tmp_path / "even", smooth_head=text), threads=1)
    true = logits(loaded.config, dict(loaded.state), loaded.config.num_hidden_layers).numpy()
    errors = [np.abs(m.logits(list(TOKENS[:64])) - true).std() for m in (plain, even)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head_format": "float32"}, "nothing is rounded"),
        ({"tie_word_embeddings": True}, "the head is the embedding"),
        ({"hadamard": True, "linear": "int8"}, "even already"),
    ],
)
def test_what_cannot_be_smoothed_is_refused(changes: dict[str, Any], said: str) -> None:
    config = MODEL.replace(**changes)
    with pytest.raises(ConfigError, match=said):
        smooth(config, {}, TOKENS, 64, [1])


def test_text_and_tokenizer_are_needed(tmp_path: Path) -> None:
    bare = write_checkpoint(tmp_path / "a.pt", MODEL, None)
    text = tmp_path / "text.txt"
    text.write_text("", "utf-8")
    with pytest.raises(ExportError, match="has none"):
        export_checkpoint(bare, tmp_path / "m", smooth_head=text)
    named = write_checkpoint(tmp_path / "b.pt", MODEL, byte_level_bpe())
    with pytest.raises(ValueError, match="no tokens"):
        export_checkpoint(named, tmp_path / "m", smooth_head=text)
    assert not (tmp_path / "m").exists()


def test_a_folder_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, "utf-8")
    given = ["stories-24", "--to", "hf", "-o", str(tmp_path / "m"), "--smooth-head", str(text)]
    result = CliRunner().invoke(export, given)
    assert result.exit_code == 2 and "is for checkpoints" in result.output
