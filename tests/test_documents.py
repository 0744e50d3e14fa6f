"""Documents that must stay true: the settings' tables, links, commands."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from bitskip_train.described import settings
from bitskip_train.settings import TrainConfig

ROOT = Path(__file__).parent.parent


def generator() -> Any:
    """docs/make_settings.py as a module."""
    spec = importlib.util.spec_from_file_location("make_settings", ROOT / "docs/make_settings.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_settings_tables_are_up_to_date() -> None:
    written = (ROOT / "docs/SETTINGS.md").read_text("utf-8")
    assert written == generator().document(), "run: python docs/make_settings.py"


def test_a_changed_setting_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    found = generator()
    monkeypatch.setitem(found.train_config.RANGES, "context", (3, 1 << 20))
    assert "| 3 to 1,048,576 |" in found.document()


def test_a_setting_without_words_is_seen() -> None:
    assert {s.name for s in settings(TrainConfig)} == set(vars(TrainConfig()))
    with pytest.raises(AssertionError, match=r"Bare\.x: no meaning"):
        settings(Bare)


class Bare:
    """Settings of which one lacks its meaning."""

    x: int = 1
    y: int = 2
    """Some meaning."""
