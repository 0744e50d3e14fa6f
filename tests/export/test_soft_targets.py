"""The verb `soft-targets` against the reference's own predictions."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from bitskip_export import soft_targets
from bitskip_export.soft_targets import documents, predictions
from bitskip_ref import load as load_reference
from bitskip_ref.folder import read_folder
from bitskip_train.data import TextSource, load_split
from bitskip_train.soft_targets import UNIT, read_soft_targets
from bitskip_train.tokenizer import make_tokenizer
from tests.cli.conftest import write_model
from tests.train.test_cli import run

CONTEXT = 16


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model folder and a text with documents of one token to several windows."""
    write_model(tmp_path / "model")
    long = "the cat sat on the mat and the dog sat on the cat. " * 4
    parts = ["a", "the cat sat.", long, "mat", long[:70], "dog " * 9]
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(parts) + "\n<|endoftext|>\n")
    return tmp_path


def words(place: Path, name: str = "soft") -> list[str | Path]:
    found = ["soft-targets", place / "model", "--data", place / "text.txt", "-o", place / name]
    return [*found, "--top", 4, "--context", CONTEXT, "-t", 1, "--token-cache", place / "tokens"]


def tokens_of(place: Path) -> np.ndarray:
    tokenizer = make_tokenizer(str(place / "model" / "tokenizer.json"), [])
    return load_split(
        TextSource((str(place / "text.txt"),), "train"), tokenizer, place / "tokens"
    ).tokens


def test_every_token_has_the_references_prediction(place: Path) -> None:
    assert run(*words(place)).exit_code == 0
    assert not list(place.glob("*.partial"))
    tokens, reference = tokens_of(place), load_reference(place / "model")
    found = read_soft_targets(place / "soft", tokens, reference.config.vocab_size)
    end, first = int(tokens[-1]), 0
    for last in np.flatnonzero(tokens == end).tolist():
        document = [end, *tokens[first : last + 1].tolist()]
        for i in range(first, last + 1):
            until = i - first + 1  # tokens before this one, end-of-text among them
            # The first window holds CONTEXT; each later one begins CONTEXT / 2 further on.
            begin = 0
            while until > begin + CONTEXT:
                begin += CONTEXT // 2
            z = reference.logits(document[begin:until])[-1].astype(np.float64)
            p = np.exp(z - z.max())
            p /= p.sum()
            assert set(found.ids[i].tolist()) == set(np.argsort(-p)[:4].tolist()), i
            assert found.probabilities[i] / UNIT == pytest.approx(p[found.ids[i]], abs=3e-5)
        first = last + 1
    assert first == len(tokens)


def test_stopped_it_goes_on_and_gives_the_same_bytes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*words(place)).exit_code == 0
    whole = (place / "soft").read_bytes()
    asked: list[int] = []

    def stopping(engine, parts, top, after=3):
        asked.append(len(parts))
        for k, found in enumerate(predictions(engine, parts, top)):
            if k == after and len(asked) == 1:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(soft_targets, "predictions", stopping)
    assert run(*words(place, "other")).exit_code == 130
    partial = place / "other.partial"
    assert partial.exists() and not (place / "other").exists()
    partial.write_bytes(partial.read_bytes()[:-5])  # as a crash within a write leaves it
    assert run(*words(place, "other")).exit_code == 0
    assert asked[1] == asked[0] - 2
    assert (place / "other").read_bytes() == whole
    # What another model or text has left there is not taken.
    partial.write_bytes(b'{"text": "another"}\n' + b"\0" * 1000)
    assert run(*words(place, "other")).exit_code == 0
    assert asked[2] == asked[0] and (place / "other").read_bytes() == whole


def test_one_process_at_a_time(place: Path) -> None:
    about = {"text": "", "model": "", "top": 4, "context": 16}
    with closing(soft_targets.Rows(place / "soft.partial", about)):
        said = run(*words(place))
        assert said.exit_code == 1 and "another process writes there" in said.stderr
    assert run(*words(place)).exit_code == 0


def test_parts_cover_every_token_once() -> None:
    tokens = np.array([5, 6, 0, 0, *range(1, 40), 0, 7, 0])
    parts = list(documents(tokens, 0, 8))
    at = 0
    for part in parts:
        assert part.first == at and 1 <= part.new <= len(part.inputs) <= 8
        new = part.inputs[len(part.inputs) - part.new :]
        before = [
            0 if i == 0 or tokens[i - 1] == 0 else tokens[i - 1] for i in range(at, at + part.new)
        ]
        assert new.tolist() == before
        at += part.new
    assert at == len(tokens)


def test_what_cannot_be(place: Path) -> None:
    said = run(*words(place), "--context", 100_000)
    assert said.exit_code == 1 and "must be at most" in said.stderr
    (place / "model" / "tokenizer.json").unlink()
    assert run(*words(place)).exit_code == 1


def test_another_file_is_not_written_over(place: Path) -> None:
    text = (place / "text.txt").read_bytes()
    said = run(*words(place, "text.txt"))
    assert said.exit_code == 1 and "something else than soft targets" in said.stderr
    assert (place / "text.txt").read_bytes() == text
    assert run(*words(place)).exit_code == 0 and run(*words(place)).exit_code == 0


def test_documents_end_as_in_training_whatever_ends_the_models_texts(place: Path) -> None:
    assert run(*words(place)).exit_code == 0
    settings = place / "model" / "generation_config.json"
    settings.write_text(settings.read_text().replace('"eos_token_id": 0', '"eos_token_id": 7'))
    assert read_folder(place / "model").eos_token_id == 7
    assert run(*words(place, "other")).exit_code == 0
    assert (place / "other").read_bytes() == (place / "soft").read_bytes()
