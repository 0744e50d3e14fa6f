"""Packing checkpoints: what is written, what is refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bitskip.options import _foreign
from bitskip.program import main
from bitskip_export.pack import ExportError, check_target, export_checkpoint, pack
from bitskip_export.report import summary
from bitskip_ref.compare import difference
from bitskip_ref.config import ModelConfig
from bitskip_ref.exits import FixedExit
from bitskip_ref.floats import BFLOAT16, stored
from bitskip_ref.folder import ChatForm, read_folder, write_auto_exit, write_folder
from bitskip_ref.model import load
from bitskip_ref.packing import unpack_ternary
from bitskip_ref.tensors import FormatError
from bitskip_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from bitskip_train.errors import CheckpointError
from bitskip_train.settings import TrainConfig
from tests.cli.conftest import byte_level_bpe
from tests.helpers import OPTIONS, QUANTIZED, random_parameters, random_tensors, twin

CONFIG = twin("per-layer-exits")
LINEAR = "layers.2.up_proj.weight"


def write_checkpoint(
    path: Path, config: ModelConfig = CONFIG, tokenizer: str | None = None, **changes: np.ndarray
) -> Path:
    """A checkpoint of random parameters, some of them changed."""
    state = {n: torch.from_numpy(w) for n, w in (random_parameters(config) | changes).items()}
    save_checkpoint(path, Checkpoint(config, state, tokenizer, TrainConfig().to_dict(), step=7))
    return path


@pytest.mark.parametrize("name", [*QUANTIZED, *OPTIONS, "layerskip"])
def test_packing_follows_the_specification(name: str) -> None:
    """`random_tensors` quantizes the same parameters by itself."""
    config = twin(name)
    state = random_parameters(config)
    before = {n: w.copy() for n, w in state.items()}
    tensors, expected = pack(config, state), random_tensors(config)
    assert tensors.keys() == expected.keys()
    for key, values in expected.items():
        assert difference(key, values, tensors[key]) is None
    assert all(difference(n, before[n], state[n]) is None for n in before)


def test_a_checkpoint_becomes_a_folder(tmp_path: Path) -> None:
    config = CONFIG.replace(vocab_size=320)
    tokenizer = byte_level_bpe()
    path = write_checkpoint(tmp_path / "best.pt", config, tokenizer)
    digest = hashlib.sha256(path.read_bytes()).digest()
    folder = read_folder(export_checkpoint(path, tmp_path / "model", exit_layer=3))
    assert folder.config == config and folder.exit_layer == 3 and folder.eos_token_id == 0
    assert folder.tokenizer and folder.tokenizer.read_text("utf-8") == tokenizer
    for name, values in random_tensors(config).items():
        assert difference(name, values, folder.tensors[name]) is None
    assert hashlib.sha256(path.read_bytes()).digest() == digest
    text = summary(folder.path)
    assert (
        "2 bits (9.481 with rows padded) per weight" in text
    )  # rows of 48, 64 and 80 weights take 64 bytes each
    assert "sparsest: block" in text


def test_the_head_format_can_be_chosen(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.pt")
    folder = read_folder(export_checkpoint(path, tmp_path / "m", head_format="float16"))
    assert folder.config == CONFIG.replace(head_format="float16")
    head = random_parameters(CONFIG)["lm_head.weight"].astype(np.float16)
    assert difference("head", head, folder.tensors["lm_head.weight"]) is None
    folder = read_folder(export_checkpoint(path, tmp_path / "m", head_format="bfloat16"))
    head = stored(random_parameters(CONFIG)["lm_head.weight"], BFLOAT16)
    assert np.array_equal(head, folder.tensors["lm_head.weight"])
    for value, kind in ((7e4, "float16"), (3.4e38, "bfloat16")):
        large = {"lm_head.weight": np.full((97, 48), value, np.float32)}
        path = write_checkpoint(tmp_path / "b.pt", **large)
        with pytest.raises(ExportError, match=rf"lm_head.weight exceeds {kind} .*--head int8"):
            export_checkpoint(path, tmp_path / "n", head_format=kind)
        assert not (tmp_path / "n").exists()


def test_ternary_weights_are_kept_only_when_said(tmp_path: Path) -> None:
    codes = np.random.default_rng(5).integers(-1, 2, (80, 48)).astype(np.float32)
    state = random_parameters(CONFIG)
    linear = [n for n in state if "_proj." in n]
    state |= {n: np.sign(np.round(2 * state[n])) * np.float32(0.3) for n in linear}
    state[LINEAR] = codes * np.float32(0.02)
    tensors = pack(CONFIG, state, ternary=True)
    assert tensors["layers.2.up_proj.scale"].tolist() == [np.float32(0.02)]
    assert (unpack_ternary(tensors[LINEAR], 48) == codes).all()
    with pytest.raises(ExportError, match=r"ternary already.*--ternary"):
        pack(CONFIG, state)
    state[LINEAR][3, 4] = 0.01
    with pytest.raises(ExportError, match=r"up_proj.weight is not ternary: .* holds 0.01"):
        pack(CONFIG, state, ternary=True)


def test_zero_and_constant_weights_are_quantized() -> None:
    state = random_parameters(CONFIG)
    state[LINEAR][:] = 0.0
    state["layers.1.up_proj.weight"][:] = -0.5
    tensors = pack(CONFIG, state)
    assert tensors["layers.2.up_proj.scale"][0] == np.float32(1e-5)
    assert not unpack_ternary(tensors[LINEAR], 48).any()
    assert (unpack_ternary(tensors["layers.1.up_proj.weight"], 48) == -1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [LINEAR, "lm_head.weight", "final_norm.weight"])
def test_numbers_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    state = random_parameters(CONFIG)
    state[name].reshape(-1)[7] = bad
    with pytest.raises(ExportError, match=rf"{name}\[.*\] is {bad}: training has diverged"):
        pack(CONFIG, state)


def test_wrong_tensors_are_refused() -> None:
    state = random_parameters(CONFIG)
    with pytest.raises(ExportError, match=r"lacks tensor final_norm\.weight"):
        pack(CONFIG, {n: w for n, w in state.items() if n != "final_norm.weight"})
    with pytest.raises(ExportError, match="has an unknown tensor extra"):
        pack(CONFIG, state | {"extra": np.zeros(1, np.float32)})
    for wrong in (state[LINEAR].T, state[LINEAR].astype(np.float64)):
        with pytest.raises(ExportError, match=rf"{LINEAR} is .*asks for float32\[80, 48\]"):
            pack(CONFIG, state | {LINEAR: wrong})


def test_hostile_checkpoints_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "model"
    (tmp_path / "noise.pt").write_bytes(b"\x80\x02cos\nsystem\n(S'true'\ntR.")
    torch.save({"format": "bitskip-checkpoint-1"}, tmp_path / "empty.pt")
    for name in ("absent.pt", "noise.pt", "empty.pt"):
        with pytest.raises(CheckpointError):
            export_checkpoint(tmp_path / name, out)
    path = write_checkpoint(tmp_path / "a.pt", **{LINEAR: np.zeros((3, 3), np.float32)})
    with pytest.raises(CheckpointError, match=r"is \[3, 3\], the configuration asks"):
        export_checkpoint(path, out)
    assert not out.exists()


def test_other_files_are_not_mixed_with_a_model(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.pt")
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.txt").write_text("words")
    with pytest.raises(ExportError, match="holds files and no model"):
        export_checkpoint(path, out)
    with pytest.raises(ExportError, match="is a file"):
        export_checkpoint(path, out / "chapter1.txt")
    assert [p.name for p in out.iterdir()] == ["chapter1.txt"]
    export_checkpoint(path, out, force=True)
    assert (out / "chapter1.txt").read_text() == "words"
    (out / "tokenizer.json").write_text("an older model's")
    export_checkpoint(path, out)  # a model now, so no force
    assert read_folder(out).tokenizer is None


def test_an_exit_out_of_range_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.pt")
    with pytest.raises(ExportError, match=r"exit layer 5: must be in 1\.\.4"):
        export_checkpoint(path, tmp_path / "m", exit_layer=5)
    with pytest.raises(FormatError):
        read_folder(tmp_path / "m")


@pytest.mark.parametrize(
    "reading", [{"hadamard_form": "after"}, {"linear_form": "public"}, {"mask": "none"}]
)
def test_readings_that_no_engine_runs_are_refused_in_one_line(
    tmp_path: Path, reading: dict[str, str]
) -> None:
    state = {n: torch.from_numpy(w) for n, w in random_parameters(CONFIG).items()}
    path = tmp_path / "last.pt"
    save_checkpoint(path, Checkpoint(CONFIG, state, None, TrainConfig(**reading).to_dict(), step=7))
    [(name, value)] = reading.items()
    with pytest.raises(ExportError, match=f"trained with {name} = '{value}': no engine runs it$"):
        export_checkpoint(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_d1_exporting_again_keeps_what_the_folder_says(tmp_path: Path) -> None:
    """The calibrated exit, the default exit, ends of text, the chat template; other files, too."""
    config, tokenizer = CONFIG.replace(vocab_size=320, gates=False), byte_level_bpe()
    out, chat = tmp_path / "model", ChatForm("{{ messages }}")
    write_folder(
        out, config, random_tensors(config, 5), tokenizer_json=tokenizer, eos_token_id=[3, 4],
        bos_token_id=5, exit_layer=2, draft_vocab=17, chat=chat,
    )  # fmt: skip
    write_auto_exit(read_folder(out), FixedExit(3), {"budget": 0.04})
    (out / "README.md").write_text("mine")
    before = read_folder(out)
    path = write_checkpoint(tmp_path / "best.pt", config, tokenizer)
    after = read_folder(export_checkpoint(path, out))
    assert after.tensors["layers.0.q_proj.scale"] != before.tensors["layers.0.q_proj.scale"]
    for name in ("auto_exit", "exit_layer", "draft_vocab", "end_ids", "bos_token_id", "chat"):
        assert getattr(after, name) == getattr(before, name), name
    assert json.loads((out / "generation_config.json").read_text())["auto_exit"]["budget"] == 0.04
    assert (out / "README.md").read_text() == "mine"
    assert read_folder(export_checkpoint(path, out, exit_layer=1)).exit_layer == 1
    assert read_folder(export_checkpoint(path, out, head_format="int4")).auto_exit is not None

    # Another shape or vocabulary: what was said of the old one says nothing of it.
    other = write_checkpoint(tmp_path / "other.pt", config.replace(ffn="relu2"), tokenizer)
    found = read_folder(export_checkpoint(other, out))
    assert (found.auto_exit, found.exit_layer, found.end_ids, found.chat) == (
        None,
        None,
        (0,),
        None,
    )


def test_the_folder_knows_the_exits_trained_for(tmp_path: Path) -> None:
    loaded = load_checkpoint(write_checkpoint(tmp_path / "best.pt"))
    for changes, known in (
        ({"exit_lambda": 0.3, "exit_layers": (1, 2)}, (1, 2, 4)),
        ({"exit_lambda": 0.3, "exit_layers": ()}, (1, 2, 3, 4)),
        ({"exit_lambda": 0.0}, (4,)),
        ({"exit_lambda": 0.3, "exit_layers": (9,)}, None),  # of another model
        ({"unheard_of": 1}, None),
    ):
        loaded.train.update(changes)
        assert read_folder(_exported(loaded, tmp_path)).trained_exits == known


def test_d3_the_folder_knows_the_context_of_training(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "best.pt", CONFIG.replace(vocab_size=320), byte_level_bpe())
    loaded = load_checkpoint(path)
    for context, known in ((9, 9), (CONFIG.max_position_embeddings + 1, None), ("9", None)):
        loaded.train["context"] = context
        folder = _exported(loaded, tmp_path)
        assert read_folder(folder).trained_context == known
    loaded.train["context"] = 9
    (tmp_path / "text").write_text("the cat sat on the mat " * 9)
    words = [
        "perplexity",
        str(_exported(loaded, tmp_path)),
        "--text",
        str(tmp_path / "text"),
        "-t1",
    ]
    said = "longer than the 9 of training: --ctx 9 keeps to those"
    assert said in CliRunner().invoke(main, words).stdout
    short = CliRunner().invoke(main, [*words, "--ctx", "9"])
    assert short.exit_code == 0 and "of training" not in short.stdout


def _exported(loaded: Checkpoint, place: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitskip_train.checkpoint.load_checkpoint", lambda path: loaded)
        return export_checkpoint(place / "best.pt", place / "model")


def test_a_place_with_an_odd_config_is_no_model(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    for make in (
        lambda: os.mkfifo(config),
        lambda: config.symlink_to("/dev/zero"),
        lambda: config.write_text("[" * 200_000),
        lambda: config.write_text("[]"),
    ):
        make()
        with pytest.raises(ExportError, match="no model of this kind"):
            check_target(tmp_path)
        assert not _foreign(tmp_path)
        config.unlink()


@pytest.mark.parametrize("trained", ["int8", "float32"])
def test_another_head_is_the_same_model(trained: str, tmp_path: Path) -> None:
    """SPEC 5.4: integer rows beside int8 layers lie turned, floats do not."""
    config = twin("llama3").replace(linear="int8", hadamard=True, head_format=trained)
    path = write_checkpoint(tmp_path / "a.pt", config)
    z = {
        head: load(export_checkpoint(path, tmp_path / head, head_format=head)).logits([1, 2, 3])
        for head in ("int8", "float32")
    }
    assert np.abs(z["int8"] - z["float32"]).max() < 0.1 * z["float32"].std()
