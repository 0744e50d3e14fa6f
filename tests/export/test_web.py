"""The site that `export --to web` writes, without a network; its sampler where Node.js is."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from bitskip.program import main
from bitskip_export import load_onnx, web_site
from bitskip_ref.arithmetic import functions
from bitskip_ref.compare import difference
from bitskip_ref.config import ModelConfig
from bitskip_ref.decoding.sampling import Sampler, uniform
from bitskip_ref.folder import read_folder
from bitskip_ref.model import load
from bitskip_serve.page_files import page_files
from tests.cli.conftest import CONFIG, write_model
from tests.helpers import random_folder, random_tokens

NODE = shutil.which("node")


def archive(contents: dict[str, bytes]) -> bytes:
    """A package as npm packs it."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return raw.getvalue()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for the two packages, and a folder with their archives."""
    folder = tmp_path / "packages"
    folder.mkdir()
    stand_ins = []
    for package in web_site.PACKAGES:
        data = archive({inside: f"{package.name} {inside}".encode() for inside in package.files})
        (folder / package.archive).write_bytes(data)
        digest = base64.b64encode(hashlib.sha512(data).digest()).decode()
        stand_ins.append(dataclasses.replace(package, integrity=digest))
    monkeypatch.setattr(web_site, "PACKAGES", tuple(stand_ins))
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", *(str(a) for a in arguments)])


def test_a_site(tmp_path: Path, packages: Path) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "model-site"
    result = run(model, "--to", "web", "--exit-layer", "1,3", "--packages", packages)
    assert result.exit_code == 0, result.output
    assert str(out / "index.html") in result.output
    facts = json.loads((out / "model.json").read_text())
    names = {p.name for p in out.iterdir()}
    assert names == {
        "index.html", "page.css", "page.js", "source.js", "sampling.js", "model.json",
        "tokenizer.json", "ort.js", "ort-wasm.js", "ort-wasm.wasm", "tokenizers.js",
        "tokenizers-LICENSE", "exit-1.onnx", "exit-3.onnx", facts["files"]["weights"],
    }  # fmt: skip
    assert facts["depths"] == [1, 3] and facts["exits"] == [1, 3] and facts["model"] == "model"
    assert facts["end_ids"] == list(read_folder(model).end_ids)
    assert facts["repetition_penalty"] == 1
    assert facts["files"]["graphs"] == {"1": "exit-1.onnx", "3": "exit-3.onnx"}
    assert (out / "ort.js").read_bytes() == b"onnxruntime-web dist/ort.wasm.min.mjs"
    for name in ("index.html", "page.css", "page.js"):  # the server's, not copies that part
        assert (out / name).read_bytes() == page_files()[f"/{name}"][0]
    page = (out / "index.html").read_text()
    assert "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'" in page
    for name in ("index.html", "page.css", "page.js", "source.js", "sampling.js"):
        assert "://" not in (out / name).read_text()  # nothing from elsewhere
    ids, engine = random_tokens(CONFIG, 7), load_onnx(out)
    for n in (1, 3):
        assert difference("logits", load(model).logits(ids, n), engine.logits(ids, n)) is None


def test_another_page_is_not_written_over(tmp_path: Path, packages: Path) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "home"
    out.mkdir()
    (out / "index.html").write_text("mine")
    words = [model, "--to", "web", "--exit-layer", "1", "--packages", packages, "-o", out]
    result = run(*words)
    assert result.exit_code == 1 and "a page of its own" in result.stderr, result.output
    assert [p.name for p in out.iterdir()] == ["index.html"]
    assert run(*words, "--force").exit_code == 0 and run(*words).exit_code == 0
    assert (out / "index.html").read_text() != "mine"


def test_exits_are_the_models_unless_given(tmp_path: Path, packages: Path) -> None:
    model = write_model(tmp_path / "model")
    assert run(model, "--to", "web", "--packages", packages).exit_code == 0
    facts = json.loads((tmp_path / "model-site" / "model.json").read_text())
    assert facts["depths"] == read_folder(model).exits == [1, 2, 3, 4]


def test_packages_are_those_that_were_published(tmp_path: Path, packages: Path) -> None:
    model = write_model(tmp_path / "model")
    ort = packages / web_site.PACKAGES[0].archive
    ort.write_bytes(archive({inside: b"other" for inside in web_site.PACKAGES[0].files}))
    result = run(model, "--to", "web", "--packages", packages)
    assert result.exit_code == 1 and "is not what was published" in result.output
    ort.unlink()
    result = run(model, "--to", "web", "--packages", packages)
    assert result.exit_code == 1 and "run npm pack onnxruntime-web@" in result.output
    assert not (tmp_path / "model-site").exists()  # nothing was written
    result = run(model, "--to", "onnx", "--packages", packages)
    assert result.exit_code == 2 and "--packages is for --to web" in result.output


def test_npm_missing_and_failing_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, programs = write_model(tmp_path / "model"), tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    result = run(model, "--to", "web")
    assert result.exit_code == 1 and "npm is not installed" in result.output
    npm = programs / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    npm.chmod(0o755)
    result = run(model, "--to", "web")
    assert result.exit_code == 1 and result.output.count("\n") == 1, result.output
    assert "failed (npm error code ENOTFOUND): is there a network?" in result.output
    assert "--packages" in result.output and not (tmp_path / "model-site").exists()


def test_what_a_browser_cannot_run_is_refused(tmp_path: Path, packages: Path) -> None:
    for name, config, words in (
        ("float", CONFIG.replace(linear="float32"), "has float32 linear layers"),
        ("wordless", CONFIG, "has no tokenizer.json"),
    ):
        folder = random_folder(tmp_path / name, config)
        result = run(folder, "--to", "web", "--packages", packages)
        assert result.exit_code == 1 and words in result.output, result.output
    model = write_model(tmp_path / "spaces")
    stored = json.loads((model / "tokenizer.json").read_text())
    stored["decoder"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"}
    (model / "tokenizer.json").write_text(json.dumps(stored))
    result = run(model, "--to", "web", "--packages", packages)
    assert result.exit_code == 1 and "is not a byte-level BPE" in result.output, result.output


def in_node(folder: Path, source: str, program: str, given: object) -> Any:
    """What a program makes of `given`, with sampling.js as `source`."""
    (folder / "sampling.mjs").write_text(source)
    (folder / "given.json").write_text(json.dumps(given))
    (folder / "check.mjs").write_text(
        'import { choose, exp, penalised, uniform } from "./sampling.mjs";\n'
        'import fs from "node:fs";\n'
        'const given = JSON.parse(fs.readFileSync("given.json"));\n'
        'const bytes = (hex) => new Uint8Array(Buffer.from(hex, "hex"));\n'
        "const floats = (hex) => new Float32Array(bytes(hex).buffer);\n"
        f"console.log(JSON.stringify({program}));\n"
    )
    assert NODE is not None
    done = subprocess.run([NODE, "check.mjs"], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


SAMPLING = (files("bitskip_export") / "web" / "sampling.js").read_text("utf-8")


@pytest.mark.skipif(NODE is None, reason="no Node.js on this machine")
def test_exp_and_draws_in_javascript(tmp_path: Path) -> None:
    """SPEC 2.6 and 9.3 to the bit; a coefficient that is one unit off shows."""
    x = np.concatenate([np.linspace(-100, 100, 20001), [0.0, -0.0, 0.34657359, -87.0, 88.0]])
    x = x.astype(np.float32)
    program = "Buffer.from(floats(given).map(exp).buffer).toString('hex')"
    wanted = functions.exp(x).tobytes().hex()
    assert in_node(tmp_path, SAMPLING, program, x.tobytes().hex()) == wanted
    wrong = SAMPLING.replace("1.66666655e-1", "1.66666670e-1")
    assert in_node(tmp_path, wrong, program, x.tobytes().hex()) != wanted
    draws = [(s, i) for s in (0, 1, 2**32 - 1, 2**64 - 1) for i in (0, 1, 511)]
    program = "given.map(([seed, i]) => uniform(BigInt(seed), i))"
    found = in_node(tmp_path, SAMPLING, program, [(str(s), i) for s, i in draws])
    assert found == [uniform(s, i) for s, i in draws]


@pytest.mark.skipif(NODE is None, reason="no Node.js on this machine")
def test_the_sampler_in_javascript(tmp_path: Path) -> None:
    """SPEC 9.1, 9.2: logits of all sizes, ties, -0; all kinds of temperature, seed, penalty."""
    rng = np.random.default_rng(0)
    cases, wanted = [], []
    for i in range(200):
        z = (rng.standard_normal(300) * 10.0 ** rng.uniform(-3, 2)).astype(np.float32)
        z[rng.integers(300, size=40)] = z[7]
        z[rng.integers(300, size=5)] = -0.0
        seed, index = int(rng.integers(1 << 63)) * 2 + 1, int(rng.integers(500))
        temperature = (0.0, 0.7, 1.0, 3.0, 1e-6)[i % 5]
        penalty, seen = (1.0, 1.1, 0.3)[i % 3], rng.integers(300, size=30).tolist()
        cases.append([z.tobytes().hex(), temperature, str(seed), index, penalty, seen])
        sampler = Sampler(temperature, seed=seed, repetition_penalty=penalty)
        wanted.append(sampler.choose(z, seen, index))
    program = (
        "given.map(([z, t, seed, i, r, seen]) => "
        "choose(penalised(floats(z), new Set(seen), r), t, BigInt(seed), i))"
    )
    assert in_node(tmp_path, SAMPLING, program, cases) == wanted
    # SPEC 9.5
    program = (
        "given.map((z) => { try { choose(Float32Array.from(z, Number), 1, 0n, 0); return 0 }"
        " catch { return 1 } })"
    )
    refused = [["NaN", 1], [1, "Infinity"], ["-Infinity"], [1, "-Infinity"]]
    assert in_node(tmp_path, SAMPLING, program, refused) == [1, 1, 1, 0]


def test_exits_trained_for(tmp_path: Path) -> None:
    """What is written is read; few are offered, many not; what is no list of exits is refused."""
    config: ModelConfig = CONFIG.replace(num_hidden_layers=24)
    path = write_model(tmp_path / "model", config)
    generation = path / "generation_config.json"
    stored = json.loads(generation.read_text())
    for trained, exits in (
        ([6, 24], [6, 24]), (list(range(1, 25)), [6, 12, 18, 24]), (None, [6, 12, 18, 24]),
    ):  # fmt: skip
        generation.write_text(json.dumps({**stored, "trained_exits": trained}))
        folder = read_folder(path)
        assert folder.trained_exits == (None if trained is None else tuple(trained))
        assert folder.exits == exits
    for wrong in (6, [0], [25], [6, 6], [12, 6], ["6"], [True]):
        generation.write_text(json.dumps({**stored, "trained_exits": wrong}))
        with pytest.raises(ValueError, match=r"is no list of exits 1\.\.24"):
            read_folder(path)
