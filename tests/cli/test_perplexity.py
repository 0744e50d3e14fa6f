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
from bitskip.program import runtime as main
from bitskip_cpu.heldout.scoring import exit_losses, step_through
from bitskip_cpu.heldout.text import Text, read_text
from bitskip_ref.documents import read_documents
from bitskip_ref.exits import ConfidenceExit, FixedExit, GateExit
from bitskip_ref.heldout import HeldOutLoss, windows
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
    engine = UniformEngine(CONFIG)
    stepped = step_through(engine, text_of(150), [FixedExit(4), ConfidenceExit()])
    for result in (exit_losses(engine, text_of(150), [4])[4], *(s.losses for s in stepped)):
        assert result.tokens == 149
        assert result.ppl == pytest.approx(CONFIG.vocab_size, rel=1e-12)
        assert result.bits_per_byte == pytest.approx(math.log2(CONFIG.vocab_size) * 149 / 300)
        assert result.loss_se == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("context", "stride", "kv_cache"), [
    (64, 64, "float32"), (10, 10, "float16"), (10, 4, "float32"),
])  # fmt: skip
def test_it_is_the_loss_of_the_reference(
    folder: Path, context: int, stride: int, kv_cache: str
) -> None:
    model, text = bitskip_ref.load(folder, kv_cache), text_of(28)
    mine = bitskip_cpu.load(folder, kv_cache=kv_cache).engine
    results = exit_losses(mine, text, [4, 2, 2], context=context, stride=stride)
    assert list(results) == [2, 4]
    for exit_layer, result in results.items():
        total, predicted, at = 0.0, 0, 1
        while at < 28:
            # The first window that reaches the token predicts it.
            begin = next(b for b in range(0, 28, stride) if b + context >= at)
            z = model.logits(text.tokens[begin:at], exit_layer)[-1].astype(np.float64)
            total += float(np.log(np.exp(z - z.max()).sum()) + z.max() - z[text.tokens[at]])
            predicted, at = predicted + 1, at + 1
        assert result.tokens == predicted == 27
        assert result.loss == pytest.approx(total / predicted, rel=1e-12)


@pytest.mark.parametrize(("context", "stride"), [(40, 40), (9, 9), (9, 4), (9, 1), (1, 1)])
def test_stepping_is_the_same_loss(folder: Path, context: int, stride: int) -> None:
    """Fixed exits, and rules that always or never stop, have the losses of one pass for all."""
    model, text = bitskip_cpu.load(folder).engine, text_of(50)
    cut = {"context": context, "stride": stride}
    rules = [
        FixedExit(2), FixedExit(4), GateExit(1.0), ConfidenceExit(1.0, "margin"),
        ConfidenceExit(1.0, last=2),
    ]  # fmt: skip
    expected = exit_losses(model, text, [2, 4], **cut)
    alone = step_through(model, text, rules, **cut)
    beside = step_through(model, text, rules, **cut, at_once=3)
    for result, other in zip(alone, beside, strict=True):
        assert (result.losses.sums == other.losses.sums).all()
        assert (result.depths == other.depths).all()
        depth = result.rule.deepest(CONFIG)
        assert set(result.depths.tolist()) == {depth} and len(result.depths) == 49
        assert result.losses.loss == pytest.approx(expected[depth].loss, rel=1e-12)
        assert result.losses.loss_se == pytest.approx(expected[depth].loss_se, rel=1e-9)


def test_windows_side_by_side_are_those_of_one_thread(folder: Path) -> None:
    one, text = bitskip_cpu.load(folder, threads=1).engine, text_of(50)
    two = bitskip_cpu.load(folder, threads=2).engine
    cut = {"context": 9, "stride": 4}
    assert len(two.beside()) == two.threads, "such a small model has an engine for each thread"
    told: list[int] = []
    expected = exit_losses(one, text, [2, 4], **cut)
    for n, found in exit_losses(two, text, [2, 4], **cut, advance=told.append).items():
        assert found.sums.tolist() == expected[n].sums.tolist()
    assert sum(told) == 49
    rules = [FixedExit(2), ConfidenceExit(0.03, "max"), GateExit(0.55, layers=(1, 3))]
    alone = step_through(one, text, rules, **cut, at_once=3)
    for found, other in zip(alone, step_through(two, text, rules, **cut, at_once=3), strict=True):
        assert found.rule == other.rule
        assert found.losses.sums.tolist() == other.losses.sums.tolist()
        assert found.depths.tolist() == other.depths.tolist()


def test_what_goes_wrong_in_a_window_is_told(folder: Path) -> None:
    class Broken(ConfidenceExit):
        def stops(self, probe):
            raise RuntimeError("broken rule")

    for threads in (1, 2):
        engine = bitskip_cpu.load(folder, threads=threads).engine
        with pytest.raises(RuntimeError, match="broken rule"):
            step_through(engine, text_of(50), [Broken()], context=9, at_once=3)


def test_a_dynamic_exit_is_scored_as_it_generates(folder: Path) -> None:
    """Token by token after the window's first, with the caches that skipping leaves."""
    model, text = bitskip_ref.load(folder), text_of(30)
    for rule in (ConfidenceExit(0.03, "max"), GateExit(0.55, layers=(1, 3))):
        total, depths = 0.0, []
        for begin in (0, 10, 20):
            cache, ids = model.new_cache(), text.tokens[begin : begin + 11].tolist()
            rows = [(model.extend(ids[:1], cache)[0], 4)]
            rows += [model.step(token, cache, rule) for token in ids[1:-1]]
            for (z, depth), target in zip(rows, ids[1:], strict=True):
                p = np.exp(z.astype(np.float64))
                total -= math.log(p[target] / p.sum())
                depths.append(depth)
        for at_once in (1, 2, 16):
            engine = bitskip_cpu.load(folder).engine
            (result,) = step_through(engine, text, [rule], context=10, at_once=at_once)
            assert result.depths.tolist() == depths and 4 > result.mean_depth > 1
            assert result.losses.loss == pytest.approx(total / 29, rel=1e-12)
            assert result.steps.tolist() == [9, 9, 8]


def test_a_difference_of_the_same_windows_has_a_small_error() -> None:
    rng = np.random.default_rng(0)
    sizes, sums = np.full(40, 100), 200 + 30 * rng.standard_normal(40)
    loss = HeldOutLoss(sums, sizes, 1)
    worse = HeldOutLoss(sums + 5 + rng.standard_normal(40), sizes, 1)
    more, error = worse.above(loss)
    assert more == pytest.approx(0.05, abs=0.005)
    assert loss.loss_se == pytest.approx(sums.std(ddof=1) / 100 / 40**0.5)
    assert error is not None and error < 0.002 < loss.loss_se
    assert HeldOutLoss(sums[:1], sizes[:1], 1).loss_se is None


def test_the_losses_are_the_trainers(folder: Path) -> None:
    torch_engine = pytest.importorskip("bitskip_train").load_exported(folder)
    from bitskip_train.evaluate import evaluate

    text = text_of(61)
    theirs = evaluate(torch_engine.model, text.tokens, text.bytes, context=16, exits=[1, 3, 4])
    ours = exit_losses(bitskip_cpu.load(folder).engine, text, [1, 3, 4], context=16)
    assert list(theirs) == list(ours)
    for n, loss in ours.items():
        assert theirs[n].sizes.tolist() == loss.sizes.tolist()
        assert theirs[n].facts() == pytest.approx(loss.facts(), rel=1e-5)


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
    text = read_text(text_file, model)
    assert text.tokens.tolist() == split.tokens.tolist()
    assert text.bytes == split.bytes
    assert text.documents == 5


def test_a_text_can_be_cut_short(folder: Path, text_file: Path) -> None:
    model = bitskip_cpu.load(folder)
    whole = read_text(text_file, model)
    first = int(np.flatnonzero(whole.tokens == 0)[0]) + 1
    for limit, documents in ((1, 1), (first - 1, 1), (first, 2), (10_000, 5)):
        cut = read_text(text_file, model, limit)
        assert cut.documents == documents
        assert cut.tokens.tolist() == whole.tokens[: len(cut.tokens)].tolist()


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["perplexity", *map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_json(folder: Path, text_file: Path) -> None:
    exits = ("--exit-layer", "4,max,1,gate", "--exit-threshold", 0.02, "--exit-looks", 2)
    facts = json.loads(run(folder, "--text", text_file, *exits, "--json", "--ctx", 16))
    assert facts["context"] == facts["stride"] == 16
    assert facts["documents"] == 5
    assert [e["exit_layer"] for e in facts["exits"]] == [1, 4, "max", "gate"]
    assert [e["mean_exit_layer"] for e in facts["exits"][:2]] == [1, 4]
    assert [e["looks"] for e in facts["exits"]] == [None, None, [2], [2]]
    assert 2 <= facts["exits"][2]["mean_exit_layer"] <= 4
    for e in facts["exits"]:
        assert e.keys() == {
            "exit_layer", "threshold", "looks", "last", "mean_exit_layer", "tokens", "loss",
            "loss_se", "ppl", "bits_per_byte",
        }  # fmt: skip
        assert e["ppl"] == pytest.approx(math.exp(e["loss"]))
        assert e["bits_per_byte"] * facts["bytes"] * math.log(2) == pytest.approx(
            e["loss"] * e["tokens"]
        )


def test_table(folder: Path, text_file: Path) -> None:
    said = run(folder, "--text", text_file, "--exit-layer", "2,entropy", "--exit-looks", "1,2,3")
    assert "entropy > 0.9 at 1, 2, 3, else 4" in said and "| 2 " in said
    assert "tokens predicted, 5 documents" in said
    found = run(folder, "--text", text_file, "--kv-cache", "float16", "--exit-layer", 4)
    assert "float16 KV cache" in found and "float16" not in said
    assert "4 |    4" in run(folder, "--text", text_file).replace("   4 |", "4 |")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", [], "at least 2"),
        (b"caf\xe9", [], "not UTF-8"),
        (None, [], "does not exist"),
        (b"the cat", ["--exit-layer", "5"], "choose 1..4"),
        (b"the cat", ["--ctx", "65"], "choose 1..64"),
        (b"the cat", ["--ctx", "8", "--stride", "9"], "within 1..8"),
        (b"the cat", ["--exit-layer", "1,x"], "gate, max, margin, entropy, auto"),
        (b"the cat", ["--exit-layer", "auto"], "bitskip-cpu calibrate"),
        (b"the cat", ["--exit-layer", "1", "--exit-threshold", "0.5"], "need an exit that has"),
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
