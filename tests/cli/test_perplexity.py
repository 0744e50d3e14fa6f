"""Held-out loss: every token once, the right numbers, the trainer's documents."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import bitskip_cpu
import bitskip_ref
from bitskip_cpu import perplexity as module
from bitskip_cpu.cli import main
from bitskip_cpu.perplexity import Text, perplexity, read_text, windows
from bitskip_ref.documents import read_documents
from tests.cli.conftest import CONFIG, UniformEngine, write_model

TEXT = "the cat sat\n\n on the 😀\n<|endoftext|>\n\n<|endoftext|>\r\nOnce upon a time\n\n"


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.txt"
    path.write_bytes((TEXT * 4).encode())
    return path


def text_of(count: int) -> Text:
    ids = np.random.default_rng(3).integers(0, CONFIG.vocab_size, count)
    return Text(ids, 2 * count, 1)


@given(st.integers(2, 80), st.integers(1, 20), st.data())
def test_every_token_but_the_first_is_scored_once(count, context, data) -> None:
    stride = data.draw(st.integers(1, context))
    scored = []
    for begin, before, end in windows(count, context, stride):
        assert 0 <= begin <= before < end <= count - 1
        assert end - begin <= context
        scored += range(before + 1, end + 1)
    assert scored == list(range(1, count))


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    (result,) = perplexity(UniformEngine(CONFIG), text_of(150), [4])
    assert result.tokens == 149
    assert result.ppl == pytest.approx(CONFIG.vocab_size, rel=1e-12)
    assert result.bits_per_byte == pytest.approx(math.log2(CONFIG.vocab_size) * 149 / 300)
    assert result.loss_se == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("context", "stride"), [(64, 64), (10, 10), (10, 4)])
def test_it_is_the_loss_of_the_reference(folder: Path, context: int, stride: int) -> None:
    model, text = bitskip_ref.load(folder), text_of(28)
    results = perplexity(bitskip_cpu.load(folder), text, [4, 2, 2], context=context, stride=stride)
    assert [r.exit_layer for r in results] == [2, 4]
    for result in results:
        total, predicted, at = 0.0, 0, 1
        while at < 28:
            # The first window that reaches the token predicts it.
            begin = next(b for b in range(0, 28, stride) if b + context >= at)
            z = model.logits(text.tokens[begin:at], result.exit_layer)[-1].astype(np.float64)
            total += float(np.log(np.exp(z - z.max()).sum()) + z.max() - z[text.tokens[at]])
            predicted, at = predicted + 1, at + 1
        assert result.tokens == predicted == 27
        assert result.loss == pytest.approx(total / predicted, rel=1e-12)


def test_logits_in_pieces_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bitskip_cpu.load(folder)
    whole = perplexity(model, text_of(50), [3], context=40, stride=15)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 7 * CONFIG.vocab_size)
    pieces = perplexity(model, text_of(50), [3], context=40, stride=15)
    assert pieces[0].loss == pytest.approx(whole[0].loss, rel=1e-12)


def test_documents(text_file: Path) -> None:
    cat, joined = "the cat sat\n\n on the 😀", "Once upon a time\n\nthe cat sat\n\n on the 😀"
    last = "Once upon a time\n"
    assert list(read_documents(text_file)) == [cat, joined, joined, joined, last]


def test_the_tokens_are_the_trainers(folder: Path, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from bitskip_train.data import TextSource, load_split
    from bitskip_train.tokenizer import make_tokenizer

    tokenizer = make_tokenizer(str(folder / "tokenizer.json"), [])
    (tmp_path / "cache").mkdir()
    split = load_split(TextSource((str(text_file),), "validation"), tokenizer, tmp_path / "cache")
    model = bitskip_cpu.load(folder)
    text = read_text(text_file, model.tokenizer, model.folder.eos_token_id)
    assert text.tokens.tolist() == split.tokens.tolist()
    assert text.bytes == split.bytes
    assert text.documents == 5


def test_json(folder: Path, text_file: Path) -> None:
    arguments = ["perplexity", str(folder), "--text", str(text_file), "--exit-layer", "4,1"]
    result = CliRunner().invoke(main, [*arguments, "--json", "--ctx", "16"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["context"] == facts["stride"] == 16
    assert facts["documents"] == 5
    assert [e["exit_layer"] for e in facts["exits"]] == [1, 4]
    for e in facts["exits"]:
        assert e.keys() == {"exit_layer", "tokens", "loss", "loss_se", "ppl", "bits_per_byte"}
        assert e["ppl"] == pytest.approx(math.exp(e["loss"]))
        assert e["bits_per_byte"] * facts["bytes"] * math.log(2) == pytest.approx(
            e["loss"] * e["tokens"]
        )
    plain = CliRunner().invoke(main, arguments)
    assert f"{facts['exits'][0]['tokens']} tokens predicted, 5 documents" in plain.stdout


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", [], "at least 2"),
        (b"caf\xe9", [], "not UTF-8"),
        (None, [], "No such file"),
        (b"the cat", ["--exit-layer", "5"], "choose 1..4"),
        (b"the cat", ["--ctx", "65"], "choose 1..64"),
        (b"the cat", ["--ctx", "8", "--stride", "9"], "within 1..8"),
        (b"the cat", ["--exit-layer", "1,x"], "whole numbers"),
    ],
)
def test_bad_input(folder: Path, tmp_path: Path, content, options, message) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    arguments = ["perplexity", str(folder), "--text", str(path), *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_end_of_text_a_text_is_refused(tmp_path: Path, text_file: Path) -> None:
    path = write_model(tmp_path / "model", eos_token_id=None)
    tokenizer = path / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text("utf-8").replace("<|endoftext|>", "<other>"), "utf-8")
    result = CliRunner().invoke(main, ["perplexity", str(path), "--text", str(text_file)])
    assert result.exit_code == 1
    assert "eos_token_id" in result.stderr
