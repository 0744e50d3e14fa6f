"""Exit blocks fitted to a model that stays as it is (SPEC 8.8)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import bitskip_cpu
from bitskip.program import main
from bitskip_cpu.model import Model
from bitskip_export.exit_blocks import fit, hidden_states, write_exit_blocks
from bitskip_export.verify import ENGINES, verify
from bitskip_ref.config import ConfigError, ModelConfig
from bitskip_ref.exits import ConfidenceExit
from bitskip_ref.folder import read_folder, write_auto_exit
from bitskip_ref.heldout import log_probabilities
from bitskip_train.errors import DataError
from bitskip_train.exit_blocks import TEXT
from tests.helpers import random_folder, random_tokens
from tests.train.conftest import small_config, small_split

CONTEXT = 16


def fitted(
    folder: Path, out: Path, exits: list[int], steps: int = 60
) -> tuple[Model, list[dict[int, float]]]:
    """A folder's model with blocks for these exits, and what was measured on the way."""
    model, measured = bitskip_cpu.load(folder, 1), list[dict[int, float]]()
    blocks = fit(
        model, small_split(count=600).tokens.astype(np.int64), exits, steps=steps,
        context=CONTEXT, report=lambda step, found: measured.append(found),
    )  # fmt: skip
    write_exit_blocks(model.folder, out, blocks)
    return bitskip_cpu.load(out, 1), measured


@pytest.mark.parametrize(
    "config",
    [
        small_config("wt2-bitskip", exit_norm="per_layer"),
        small_config("llama3", linear="int8", hadamard=True, head_format="int8"),
        small_config(head_format="bfloat16"),
        pytest.param(small_config("llama3", tie_word_embeddings=True), marks=pytest.mark.slow),
    ],
    ids=["hadamard, post-norm", "int8", "ternary, bfloat16", "float32, tied"],
)
def test_blocks_learn_what_full_depth_says_and_nothing_else_moves(
    config: ModelConfig, tmp_path: Path
) -> None:
    base = random_folder(tmp_path / "base", config)
    model, measured = fitted(base, tmp_path / "new", [1, 3])
    before, after = read_folder(base), read_folder(tmp_path / "new")
    assert after.config == before.config.replace(exit_blocks=(1, 3))
    assert after.eos_token_id == before.eos_token_id and after.trained_exits == (1, 3, 4)
    for name, tensor in before.tensors.items():
        assert after.tensors[name].tobytes() == tensor.tobytes(), name
    assert len(measured) == 11
    least = {n: min(found[n] for found in measured) for n in (1, 3)}
    assert all(least[n] < 0.98 * measured[0][n] for n in (1, 3)), measured
    # Every engine says what was measured when fitting, but for the rounding of the head.
    held = small_split(count=600).tokens[:61].astype(np.int64)
    texts = [held[start : start + CONTEXT + 1].tolist() for start in range(0, 60, CONTEXT)]
    for n in (1, 3):
        said, text = measures(model, n, texts)
        assert said + TEXT * text == pytest.approx(least[n], rel=0.05)
        unfitted, _ = measures(bitskip_cpu.load(base, 1), n, texts)
        assert said < 0.95 * unfitted, n  # of what full depth says alone


def measures(model: Model, n: int, texts: list[list[int]]) -> tuple[float, float]:
    """Means over tokens, in nats: KL(full depth || exit n), and the exit's cross-entropy."""
    said, text = [], []
    for ids in texts:
        p, q = (log_probabilities(model.logits(ids[:-1], e)) for e in (4, n))
        said.append((np.exp(p) * (p - q)).sum(1))
        text.append(-q[range(len(q)), ids[1:]])
    return float(np.concatenate(said).mean()), float(np.concatenate(text).mean())


def test_every_engine_runs_them(tmp_path: Path) -> None:
    base = random_folder(tmp_path / "base", small_config())
    model, _ = fitted(base, tmp_path / "new", [2], steps=2)
    ids = random_tokens(model.config, 6)
    assert not any(c.problem for c in verify(tmp_path / "new", ids, [1, 2], [*ENGINES], [1]))


def test_other_exits_keep_their_blocks(tmp_path: Path) -> None:
    base = random_folder(tmp_path / "base", small_config())
    fitted(base, tmp_path / "one", [3], steps=2)
    write_auto_exit(read_folder(tmp_path / "one"), ConfidenceExit(), {})
    fitted(tmp_path / "one", tmp_path / "two", [1], steps=2)
    one, two = (read_folder(tmp_path / name) for name in ("one", "two"))
    assert one.auto_exit and two.auto_exit is None and two.config.exit_blocks == (1, 3)
    for name, tensor in one.tensors.items():
        assert two.tensors[name].tobytes() == tensor.tobytes()
    fitted(tmp_path / "two", tmp_path / "two", [1], steps=4)  # once more, in its place
    again, name = read_folder(tmp_path / "two"), "exits.1.block.up_proj.weight"
    assert again.tensors[name].tobytes() != two.tensors[name].tobytes()


def test_hidden_states_are_the_engines(tmp_path: Path) -> None:
    model = bitskip_cpu.load(random_folder(tmp_path / "base", small_config()), 1)
    texts = [np.array(random_tokens(model.config, n, n)) for n in (5, 3)]
    found = hidden_states(model, texts, (2, 4))
    assert {n: x.shape for n, x in found.items()} == {2: (8, 16), 4: (8, 16)}
    seen: dict[str, np.ndarray] = {}
    cache = model.new_cache()
    model.extend(texts[1].tolist(), cache, trace=lambda k, x: seen.update({k: x.copy()}))
    assert np.array_equal(found[2][5:], seen["layers.1.out"])


def test_the_last_exit_is_refused(tmp_path: Path) -> None:
    base = random_folder(tmp_path / "base", small_config())
    with pytest.raises(ConfigError, match=r"exit_blocks = \[4\]: must rise within 1..3"):
        fitted(base, tmp_path / "new", [4])
    assert not (tmp_path / "new").exists()


def test_a_text_too_short_to_hold_back_a_tenth_is_refused(tmp_path: Path) -> None:
    model = bitskip_cpu.load(random_folder(tmp_path / "base", small_config()), 1)
    with pytest.raises(DataError, match=r"9 tokens of text: .* give 10 or more"):
        fit(model, np.arange(9), [1], steps=1, context=2)


def test_the_verb(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once there was a dog. It ran to the park and saw a cat.\n<|endoftext|>\n" * 20)
    words = ["fit-exits", "--text", str(text), "--layers", "12,6", "-o", str(tmp_path / "out")]
    options = ["--steps", "2", "--context", "24", "--threads", "1"]
    result = CliRunner().invoke(main, [*words, *options])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == str(tmp_path / "out")
    assert result.stdout.splitlines()[1].startswith("exit 6: ")
    assert result.stderr.splitlines()[-1].startswith("step 2/2 | exit 6 ")
    made, shipped = read_folder(tmp_path / "out"), read_folder(bitskip_cpu.load().folder.path)
    assert made.config.exit_blocks == (6, 12) and made.draft_vocab == shipped.draft_vocab
    said = CliRunner().invoke(main, ["generate", str(tmp_path / "out"), "-p", "Once", "-n", "4"])
    assert said.exit_code == 0, said.output
    refused = CliRunner().invoke(main, [*words, *options, "--layers", "24"])
    assert refused.exit_code == 1 and "exit_blocks = [24]" in refused.stderr
