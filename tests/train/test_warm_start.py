"""Runs that begin with a model folder's weights, with its tokenizer or another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bitskip_ref.config import ConfigError, ModelConfig
from bitskip_ref.folder import read_folder
from bitskip_text.tokenizer import Tokenizer
from bitskip_train.checkpoint import load_checkpoint
from bitskip_train.loaded import TorchEngine
from bitskip_train.model import BitskipModel
from bitskip_train.tokenizer import make_tokenizer
from bitskip_train.warm_start import carried, check_config, first_weights, token_origins
from tests.helpers import random_folder, random_tokens
from tests.train.conftest import small_config, stories
from tests.train.test_cli import SMALL, run

CONFIGS = [
    small_config("bitskip-v1", head_format="int6"),
    small_config("wt2-bitskip", exit_norm="per_layer", exit_head="per_layer"),
    small_config("llama3", linear="int8", hadamard=True, head_format="int8"),
    small_config("llama3", head_format="bfloat16", tie_word_embeddings=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["ternary", "hadamard", "int8", "floats"])
def test_a_run_begins_with_the_folders_model(config: ModelConfig, tmp_path: Path) -> None:
    folder = read_folder(random_folder(tmp_path / "m", config))
    words = make_tokenizer("bpe:300", [stories()])
    state = first_weights(config, folder, words, words)
    trained = BitskipModel(config)
    trained.load_state_dict(state)
    engine = TorchEngine(folder.config, folder.tensors).model
    ids = torch.tensor([random_tokens(config, 12)])
    with torch.no_grad():
        trained.arithmetic = engine.arithmetic = "exact"
        depth = config.num_hidden_layers
        mine, its = (m.logits(m(ids, collect={depth})[depth], depth) for m in (trained, engine))
    spread = float(its.std())
    assert float((mine - its).abs().median()) < 1e-3 * spread  # codes and scales are the same
    wrong = BitskipModel(config)
    wrong.load_state_dict(
        {**state, "layers.1.down_proj.weight": -state["layers.1.down_proj.weight"]}
    )
    wrong.arithmetic = "exact"
    with torch.no_grad():
        other = wrong.logits(wrong(ids, collect={depth})[depth], depth)
    assert float((other - its).abs().median()) > 1e-2 * spread


def test_tokens_of_both_vocabularies_keep_their_rows() -> None:
    old = make_tokenizer("bpe:400", [stories()])
    new = make_tokenizer("bpe:300", [stories() + "Lily Lily ran. zebra zebra zebra zebra."])
    origins = token_origins(new, old)
    rows = np.random.default_rng(0).normal(size=(400, 5)).astype(np.float32)
    made = carried(rows, origins, 310)
    theirs, kept, split, none = old.vocabulary(), 0, 0, 0
    for token, i in new.vocabulary().items():
        if token in theirs:
            kept += 1
            assert made[i].tobytes() == rows[theirs[token]].tobytes(), token
        elif origins[i]:
            split += 1
            assert old.decode(origins[i]) == new.decode([i])
            assert made[i] == pytest.approx(rows[origins[i]].mean(0), abs=1e-6)
        else:
            none += 1
    assert kept > 256 and split > 0 and kept + split + none == new.size
    assert made[new.size :] == pytest.approx(np.tile(rows.mean(0), (310 - new.size, 1)), abs=1e-6)


def test_a_token_that_is_no_character_comes_from_all() -> None:
    class Halves(Tokenizer):
        def vocabulary(self) -> dict[str, int]:
            return {"half a character": 0}

        def decode(self, ids: object) -> str:
            return "\ufffd"

    old = make_tokenizer("bpe:300", [stories()])
    new = make_tokenizer("bpe:300", [stories()])
    new.__class__ = Halves
    assert token_origins(new, old)[0] == []


def test_train_from_a_folder_with_another_tokenizer(text: Path, tmp_path: Path) -> None:
    rest = [
        "--data",
        text,
        "--valid",
        text,
        "--token-cache",
        tmp_path / "cache",
        "--no-tensorboard",
    ]
    sets = [word for s in SMALL for word in ("--set", s)]
    first = ["train", "--preset", "tiny", *rest, *sets, "--set", "steps=30", "--set", "lr=1e-2"]
    assert run(*first, "-o", tmp_path / "a").exit_code == 0
    assert run("export", tmp_path / "a" / "last.pt", "-o", tmp_path / "m").exit_code == 0
    still = ["--set", "steps=1", "--set", "lr=1e-9", "--set", "context=16", "--set", "batch=2"]
    again = ["train", "--from", tmp_path / "m", *rest, *still, *sets[-6:]]
    assert run(*again, "-o", tmp_path / "b").exit_code == 0
    before, after = (load_checkpoint(tmp_path / n / "last.pt") for n in "ab")
    assert after.tokenizer_json == before.tokenizer_json and after.config == before.config
    ends = [c.history[-1]["valid_loss"] for c in (before, after)]
    assert ends[1] == pytest.approx(ends[0], abs=0.05)
    other = ["--set", "tokenizer=bpe:290", "--set", "model.linear=float32"]
    assert run(*again, *other, "-o", tmp_path / "c").exit_code == 0
    carried_over = load_checkpoint(tmp_path / "c" / "last.pt")
    assert carried_over.config.vocab_size == 290
    assert carried_over.config.linear == "float32"


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 8}, {"hadamard": True}, {"norm": "layer"}, {"rope_theta": 3.0}]
)
def test_what_would_give_weights_another_meaning_is_refused(changes: dict, tmp_path: Path) -> None:
    config = small_config("bitskip-v1")
    folder = read_folder(random_folder(tmp_path / "m", config))
    words = make_tokenizer("bpe:300", [stories()])
    with pytest.raises(ConfigError, match=f"model.{next(iter(changes))} = .* must stay"):
        first_weights(config.replace(**changes), folder, words, words)


@pytest.mark.parametrize(
    ("start", "changes", "named"),
    [
        ("llama3", {"head_format": "bfloat16"}, "head_format"),  # embedding and head, SPEC 5.4
        ("llama3", {"linear": "ternary"}, "linear"),
        ("wt2-bitskip", {"linear": "int8"}, "linear"),
    ],
)
@pytest.mark.parametrize("width", [24, 32])  # padded in ternary layers, and not
def test_weights_that_are_turned_otherwise_are_refused(
    start: str, changes: dict, named: str, width: int, tmp_path: Path
) -> None:
    kind = {"linear": "int8", "hadamard": True, "head_format": "int8"} if start == "llama3" else {}
    config = small_config(start, **kind).replace(intermediate_size=width)
    with pytest.raises(ConfigError, match=rf"model\.{named} = .* must stay .* turned"):
        check_config(config.replace(**changes), config)
    check_config(config.replace(head_format="int4"), config)


def test_a_vocabulary_below_the_tokenizers_is_one_line(text: Path, tmp_path: Path) -> None:
    folder = random_folder(tmp_path / "m", small_config("bitskip-v1", vocab_size=320))
    (folder / "tokenizer.json").write_text(make_tokenizer("bpe:300", [stories()]).json)
    words = ["--token-cache", tmp_path / "cache", "--set", "context=16"]
    words += ["--set", "model.vocab_size=20"]
    said = run("train", "--from", folder, "--data", text, "-o", tmp_path / "out", *words)
    assert said.exit_code == 1 and "--set model.vocab_size=300" in said.stderr
