"""`serve --config FILE`: flags over environment over file; what is wrong is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from bitskip_serve.cli import serve

WHOLE = """
model = "stories-24"
host = "0.0.0.0"
port = 9000
api-key = ["a", "b"]
parallel = 2
kv-memory = "500M"
cors-origin = ["https://x.y"]
kv-cache = "int8"
threads = 3
quiet = true
"""


@pytest.fixture
def got(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `serve` would have run with."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(serve, "callback", lambda **options: found.update(options))
    return found


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(serve, arguments, env=environment)


def test_flags_over_environment_over_file(tmp_path: Path, got: dict[str, Any]) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(WHOLE)
    assert run("--config", str(path)).exit_code == 0
    assert {n: got[n] for n in ("model", "host", "port", "keys", "kv_memory", "origins")} == {
        "model": "stories-24", "host": "0.0.0.0", "port": 9000, "keys": ("a", "b"),
        "kv_memory": 500 << 20, "origins": ("https://x.y",),
    }  # fmt: skip
    assert (got["kv_cache"], got["threads"], got["quiet"]) == ("int8", 3, True)
    assert (got["parallel"], got["rows"]) == (2, 64)  # of the file; the usual one
    environment = {
        "BITSKIP_CONFIG": str(path), "BITSKIP_PORT": "9001", "BITSKIP_SERVE_PARALLEL": "5",
        "BITSKIP_SERVE_ROWS": "7", "BITSKIP_API_KEY": "c",
    }  # fmt: skip
    assert run(**environment).exit_code == 0
    assert (got["port"], got["parallel"], got["rows"]) == (9001, 5, 7)
    assert got["keys"] == ("c",) and got["host"] == "0.0.0.0"
    assert run("other", "--port", "9002", "--rows", "8", **environment).exit_code == 0
    assert (got["model"], got["port"], got["parallel"], got["rows"]) == ("other", 9002, 5, 8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("paralel = 2", "unknown key 'paralel' (did you mean parallel?)"),
        ("config = 'x'", "unknown key 'config'"),
        ("keys = ['x']", "unknown key 'keys'"),
        ("[server]\nport = 1", "unknown key 'server'"),
        ("parallel = true", "parallel = True: must be a string or a whole number"),
        ("parallel = 1.5", "parallel = 1.5: must be a string or a whole number"),
        ("parallel = [1]", "must be a string or a whole number"),
        ("api-key = 'x'", "api-key = 'x': must be a list"),
        ("quiet = 'yes'", "quiet = 'yes': must be true or false"),
        ("port = 99999", "--port"),
        ("kv-memory = 'much'", "'much' is no size"),
        ("port = ", "not a TOML file"),
        ("\udcff", "not a TOML file"),
    ],
)
def test_what_is_wrong(tmp_path: Path, got: dict[str, Any], text: str, words: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    result = run("--config", str(path))
    assert result.exit_code == 2 and words in result.output and not got, result.output
    if words != "--port" and "size" not in words:
        assert str(path) in result.output


def test_every_option_has_its_key(tmp_path: Path, got: dict[str, Any]) -> None:
    keys = {max(p.opts, key=len).lstrip("-") for p in serve.params if isinstance(p, click.Option)}
    path = tmp_path / "serve.toml"
    for key in keys - {"config"}:
        path.write_text(f"{key} = 1e9")  # of no option's type
        output = run("--config", str(path)).output
        assert "must be" in output and "unknown" not in output, output
