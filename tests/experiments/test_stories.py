"""The shipped model: its recipe as one command, and the figures of its card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitskip_experiments import shipped, stories
from bitskip_experiments.errors import ExperimentError
from bitskip_ref.documents import END_OF_TEXT, read_documents
from bitskip_ref.folder import read_folder
from bitskip_train.checkpoint import load_checkpoint
from bitskip_train.schedule import learning_rate
from bitskip_train.settings import TrainConfig
from bitskip_train.tokenizer import make_tokenizer
from tests.helpers import random_folder
from tests.train.conftest import small_config

ROOT = Path(__file__).parents[2]
TINY = (
    "num_hidden_layers=3", "hidden_size=16", "num_attention_heads=2", "num_key_value_heads=1",
    "head_dim=8", "intermediate_size=32", "max_position_embeddings=32", "context=32", "batch=2",
    "warmup=1", "exit_layers=1,2", "eval_exits=1", "compile=false", "save_every=2",
)  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data/tinystories"
    folder.mkdir(parents=True)
    for i, name in enumerate((*stories.TRAIN, stories.VALID)):
        text = (f"Cat {k} of {i} saw a dog.\n{END_OF_TEXT}\n" for k in range(310))
        (folder / name).write_text("".join(text))
    return tmp_path / "data"


def test_stories_are_held_back_from_training(data: Path, tmp_path: Path) -> None:
    texts, held_back = stories.split(data, tmp_path)
    first = list(read_documents(data / "tinystories" / stories.TRAIN[0]))
    assert list(read_documents(texts[0])) == first[:10]
    assert list(read_documents(held_back)) == first[10:]
    assert [path.name for path in texts[1:]] == list(stories.TRAIN[1:])
    (data / "tinystories" / stories.TRAIN[1]).unlink()
    with pytest.raises(ExperimentError, match=r"tinystories_more\.txt: no such file"):
        stories.split(data, tmp_path)


def test_what_is_done_is_not_done_again(data: Path, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    for name in ("trunk", "again"):  # whose trainings are not run here
        (work / name).mkdir(parents=True)

    def verbs(source: Path = tmp_path / "smol.gguf") -> list[str]:
        return [" ".join(words[:2]) for words in stories.commands(data, work, out, source)]

    smol, run = f"import {tmp_path / 'smol.gguf'}", work / "teacher-run"
    tune, teach = "train --from", f"soft-targets {work / 'teacher'}"
    whole, given = f"export {run / 'last.pt'}", f"import {work / 'teacher-hf'}"
    parts = len(stories.FURTHER)
    last = work / f"again-{parts + 1}/last.pt"
    packed, gates = f"export {work / 'run/last.pt'}", f"fit-gates {last}"
    end = ["train --from", *["train --resume"] * parts, gates, f"export {work / 'gated.pt'}"]
    student = ["train --preset", "train --resume", packed, *end]
    assert verbs() == [smol, tune, whole, given, teach, *student]
    assert verbs(tmp_path) == [tune, whole, given, teach, *student]
    (work / "published").mkdir()
    assert verbs() == [tune, whole, given, teach, *student]
    run.mkdir()
    (run / "last.pt").touch()
    assert verbs() == ["train --resume", whole, given, teach, *student]
    (work / "teacher-hf").mkdir()
    assert verbs() == [given, teach, *student]
    (work / "teacher").mkdir()
    assert verbs() == [teach, *student]
    (work / "soft").touch()
    assert verbs() == student
    (work / "trunk/last.pt").write_text("trunk")
    assert verbs() == ["train --resume", "train --resume", packed, *end]
    assert (work / "run/last.pt").read_text() == "trunk"
    assert verbs() == ["train --resume", packed, *end]
    (work / "first").mkdir()
    (work / "again/last.pt").write_text("again")
    assert verbs() == ["train --resume", *end[1:]]
    assert last.read_text() == "again"
    assert verbs() == end[parts:]
    (work / "gated.pt").touch()
    assert verbs() == end[parts + 2 :]
    out.mkdir()
    assert verbs() == []


def test_the_folder_recommends_a_repetition_penalty(tmp_path: Path) -> None:
    folder = random_folder(tmp_path / "model", small_config())
    stories.recommend(folder)
    read = read_folder(folder)
    assert read.sampling == stories.SAMPLING and read.eos_token_id == 0


@pytest.mark.slow
def test_the_recipe_makes_a_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stories, "TUNING", (*stories.TUNING, "steps=3", "compile=false"))
    monkeypatch.setattr(stories, "TRUNK", ("steps=2", "decay=0.0"))
    monkeypatch.setattr(stories, "TAUGHT", ("steps=4", *stories.TAUGHT[1:]))
    monkeypatch.setattr(stories, "AGAIN", (*stories.AGAIN, "steps=3"))
    further = [
        (*part, f"steps={4 + k}", "exit_shares=1,2") for k, part in enumerate(stories.FURTHER)
    ]
    monkeypatch.setattr(stories, "FURTHER", further)
    config = small_config("llama3", max_position_embeddings=512, vocab_size=4096)
    teacher = random_folder(tmp_path / "smol", config)
    own = make_tokenizer("bpe:4096", [(data / "tinystories" / stories.VALID).read_text()])
    (teacher / "tokenizer.json").write_text(own.json)
    places = [str(path) for path in (data, tmp_path / "work", tmp_path / "out")]
    stories.main(*places, "--teacher", str(teacher), *stories.sets(*TINY))
    folder = read_folder(tmp_path / "out")
    assert folder.config.gates and folder.config.num_hidden_layers == 3
    assert folder.config.head_format == "int8" and folder.sampling == stories.SAMPLING
    student = load_checkpoint(tmp_path / "work/run/last.pt")
    assert student.step == 4 and student.train["soft_targets"] == str(tmp_path / "work/soft")
    assert student.train["exit_weights"] == "uniform"
    student = load_checkpoint(tmp_path / "work/again-5/last.pt")
    assert student.train["exit_shares"] == [1, 2]
    assert student.step == 7 and student.train["soft_targets"] == str(tmp_path / "work/soft")
    assert student.train["dropout_max"] == 0


def test_the_last_parts_rates_lie_on_one_line() -> None:
    whole = rates((*stories.AGAIN, "steps=17000", "decay=0.353", "lr=2e-3"))
    first, second = (rates((*stories.AGAIN, *part)) for part in stories.FURTHER[:2])
    for step in (11_000, 12_345, 14_999, 15_000, 16_999):
        found = (first if step < 15_000 else second)(step)
        assert found == pytest.approx(whole(step), rel=1e-3)


def rates(settings: tuple[str, ...]) -> Callable[[int], float]:
    """The rate at each step of a training with these settings."""
    given = dict(word.split("=") for word in settings)
    values: dict[str, Any] = {n: float(given[n]) for n in ("lr", "min_lr", "decay")}
    values |= {n: int(given[n]) for n in ("steps", "warmup")}
    train = TrainConfig(schedule=given["schedule"], **values)
    return lambda step: learning_rate(train, step)


def test_what_a_loop_is() -> None:
    assert not shipped.loops("a b c d e a b c d e")
    assert shipped.loops("a b c d e a b c d e a b c d e")
    assert not shipped.loops(" ".join(map(str, range(100))))


def test_beginnings_are_words_of_stories() -> None:
    found = shipped.beginnings([f"{k} one two three four five six seven eight" for k in range(240)])
    assert len(found) == shipped.TEXTS
    assert found[1] == f"{240 // shipped.TEXTS} one two three four five six seven"


def test_the_card_is_that_of_the_committed_figures() -> None:
    folder = ROOT / "results/stories-24"
    found = json.loads((folder / "figures.json").read_text("utf-8"))
    assert (folder / "table.md").read_text("utf-8") == shipped.page(found)
