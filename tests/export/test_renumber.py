"""Numbering tokens by how common they are changes their numbers, and nothing that is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import bitskip_cpu
from bitskip_cpu.generation_options import GenerationOptions
from bitskip_export.pack import ExportError, export_checkpoint
from bitskip_export.renumber import frequent_first
from bitskip_ref.documents import END_OF_TEXT
from bitskip_ref.exits import FixedExit
from tests.cli.conftest import byte_level_bpe
from tests.export.test_pack import CONFIG, write_checkpoint

TEXT = "the cat sat on the mat\nthe dog sat on the cat\n"
MODEL = CONFIG.replace(vocab_size=320)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(f"{TEXT}{END_OF_TEXT}\n{TEXT}", "utf-8")
    return path


def test_the_same_text_with_common_tokens_first(tmp_path: Path, text: Path) -> None:
    path = write_checkpoint(tmp_path / "a.pt", MODEL, byte_level_bpe())
    plain = bitskip_cpu.load(export_checkpoint(path, tmp_path / "plain"), threads=1)
    sorted_ = bitskip_cpu.load(
        export_checkpoint(path, tmp_path / "sorted", by_frequency=text), threads=1
    )
    old, new = plain.tokenizer.encode(TEXT), sorted_.tokenizer.encode(TEXT)
    assert old != new and plain.tokenizer.decode(old) == sorted_.tokenizer.decode(new) == TEXT
    assert max(new) < len(set(new)) + 1 < max(old)  # the text's tokens, and the end of text
    assert sorted_.folder.draft_vocab == 80 and plain.folder.draft_vocab is None
    speculation = GenerationOptions(speculate="auto").speculation(FixedExit(), sorted_.folder)
    assert speculation is not None and speculation.draft.vocab == 80
    z, sorted_z = plain.logits(old), sorted_.logits(new)
    order = np.argsort(sorted_z, kind="stable")[:, ::-1], np.argsort(z, kind="stable")[:, ::-1]
    assert (np.take_along_axis(sorted_z, order[0], 1) == np.take_along_axis(z, order[1], 1)).all()
    for prompt in ("the", "a dog"):
        a = plain.generate(prompt, max_tokens=30)
        b = sorted_.generate(prompt, max_tokens=30, speculate=2, draft_exit=1)
        assert a.text == b.text and a.stop_reason == b.stop_reason


def test_ties_keep_their_order_and_every_id_is_used_once(text: Path) -> None:
    new, order = frequent_first(byte_level_bpe(), [TEXT], 330)
    assert sorted(order) == list(range(330)) and list(order[-10:]) == list(range(320, 330))
    ids = json.loads(new)["model"]["vocab"].values()
    assert len(set(ids)) == len(ids) and max(ids) < 320
    again, order = frequent_first(new, [TEXT], 330)
    assert list(order) == list(range(330)) and json.loads(again) == json.loads(new)


def test_special_tokens_of_a_template_move_too() -> None:
    stored = json.loads(byte_level_bpe())
    stored["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [0], "tokens": [END_OF_TEXT]}},
    }
    new = json.loads(frequent_first(json.dumps(stored), [TEXT], 320)[0])
    (added,) = [a["id"] for a in new["added_tokens"] if a["content"] == END_OF_TEXT]
    assert new["post_processor"]["special_tokens"][END_OF_TEXT]["ids"] == [added] != [0]


def test_refusals(tmp_path: Path, text: Path) -> None:
    path = write_checkpoint(tmp_path / "a.pt", MODEL)
    with pytest.raises(ExportError, match="no tokenizer that could be renumbered"):
        export_checkpoint(path, tmp_path / "m", by_frequency=text)
    stored = json.loads(byte_level_bpe())
    sides = {"sep": [END_OF_TEXT, 0], "cls": [END_OF_TEXT, 0]}
    stored["post_processor"] = {"type": "BertProcessing", **sides}
    with pytest.raises(ValueError, match="'BertProcessing': it cannot be renumbered"):
        frequent_first(json.dumps(stored), [TEXT], 320)
    with pytest.raises(ValueError, match="only models with a table of ids"):
        frequent_first('{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}', [], 4)
