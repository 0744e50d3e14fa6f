"""What is installed: the wheel opened, and the program run from it outside the clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import bitskip

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(
    p.name for p in ROOT.glob("bitskip*") if p.is_dir() and (p / "__init__.py").exists()
)


def _leave_out(folder: str, names: list[str]) -> set[str]:
    return {n for n in names if n == "__pycache__" or n.endswith(".egg-info")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: building leaves files beside its sources."""
    source = tmp_path_factory.mktemp("wheel") / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in [*PACKAGES, "export", "tests"]:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=_leave_out)
        if (ROOT / name).is_symlink():
            shutil.rmtree(source / name)
            (source / name).symlink_to(os.readlink(ROOT / name))
    subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--no-build-isolation", "--wheel-dir", str(source.parent), str(source),
        ],
        check=True, timeout=300,
    )  # fmt: skip
    (found,) = source.parent.glob("*.whl")
    return found


def test_the_wheel_holds_what_runs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        (info,) = {n.split("/")[0] for n in names if ".dist-info/" in n}
        about = opened.read(f"{info}/METADATA").decode()
        programs = opened.read(f"{info}/entry_points.txt").decode()
    assert f"\nVersion: {bitskip.__version__}\n" in about
    assert "bitskip = bitskip.entry:main\n" in programs
    assert "bitskip-cpu = bitskip.entry:runtime\n" in programs
    inside = {n for n in names if not n.startswith(info)}
    assert {n.split("/")[0] for n in inside} == set(PACKAGES)
    assert not [n for n in inside if "test" in n.split("/")[-1] and n.endswith(".py")
                and n.split("/")[-1] != "selftest.py"]  # fmt: skip
    for package in PACKAGES:
        assert f"{package}/py.typed" in inside
        # Every file of the sources: no subpackage was forgotten in pyproject.toml.
        for path in (ROOT / package).rglob("*"):
            wanted = path.suffix in (".py", ".toml") or path.parent.name in ("page", "web")
            wanted |= path.parent.parent.name == "models"
            if path.is_file() and wanted and "__pycache__" not in path.parts:
                assert path.relative_to(ROOT).as_posix() in inside


def test_what_is_imported_is_declared() -> None:
    """Every library that the runtime imports at all stands in the dependencies."""
    text = (ROOT / "pyproject.toml").read_text()
    for name in ("numpy", "numba", "llvmlite", "tokenizers", "click", "rich", "platformdirs",
                 "psutil"):  # fmt: skip
        assert f'"{name}>=' in text


@pytest.mark.slow
def test_the_program_of_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, whose other packages are this one's; outside the clone."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = home / "bin" / "python"
    site = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    (Path(site) / "outer.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
         str(wheel)], check=True,
    )  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*words: str, program: str = "bitskip") -> str:
        done = subprocess.run(
            [str(home / "bin" / program), *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version") == f"bitskip, version {bitskip.__version__}\n"
    where = subprocess.check_output(
        [python, "-c", "import bitskip; print(bitskip.__file__)"], cwd=tmp_path, env=environment
    )
    assert where.decode().startswith(str(home))
    assert run("generate", "-n", "3", program="bitskip-cpu").startswith("Once upon a time")
    (tmp_path / "text.txt").write_text("the cat sat on the mat and saw a dog.\n" * 60)
    run(
        "train", "--preset", "tiny", "--data", "text.txt", "--out", "run", "--no-tensorboard",
        "--token-cache", "tokens", "--set", "tokenizer=bpe:300", "--set", "steps=2",
        "--set", "context=16",
    )  # fmt: skip
    run("evaluate", "run/last.pt", "--text", "text.txt", "--token-cache", "tokens")
    run("export", "run/last.pt", "-o", "model")
    assert " of " in run("verify", "model", "--tokens", "3", "--threads", "1")
    assert "v2-table2" in run("reproduce")
    shutil.copytree(ROOT / "results" / "v2-table2", tmp_path / "results" / "v2-table2")
    run("reproduce", "v2-table2", "--render")
