"""The verbs that write, made small: what each reads, is called with, and leaves behind."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitskip_ref.config import small_twin
from bitskip_ref.folder import CONFIG, GENERATION, PARTS, read_folder

TRAINING = """
[model]
hidden_size = 16
intermediate_size = 24
[train]
threads = 1
tokenizer = "bpe:300"
steps = 6
context = 8
batch = 2
warmup = 2
eval_every = 3
eval_tokens = 60
save_every = 2
log_every = 1
"""
STORY = "Lily saw a red ball.\nThen Tom came and they played all day.\n<|endoftext|>\n"
Found = dict[str, Any]
"""What is to be seen of a verb's output: name -> a digest, or plain values."""


@dataclass(frozen=True)
class Verb:
    """A verb on small inputs.

    words: its arguments, in a place. state: what it leaves, read with every check (an exception
    means that it is torn); {} for nothing. same: whether what was begun may be gone on with.
    """

    words: Callable[[Path], list[Any]]
    state: Callable[[Path], Found]
    files: tuple[str, ...]  # what it writes, below the place
    begun: Callable[[Found, Found], bool] = lambda found, whole: False
    """Whether a state is a good one on the way to the whole."""


def prepare(root: Path) -> None:
    """What all verbs read: a model folder, one of Hugging Face, a checkpoint, a text."""
    from bitskip.program import main
    from tests.cli.conftest import CONFIG as SHAPE
    from tests.cli.conftest import byte_level_bpe, write_model
    from tests.export.test_pack import write_checkpoint

    write_model(root / "model", SHAPE)
    write_checkpoint(root / "a.pt", SHAPE, byte_level_bpe())
    (root / "text.txt").write_text(STORY * 40)
    (root / "config.toml").write_text(TRAINING)
    plain = small_twin("llama3").replace(vocab_size=320)
    write_model(root / "plain", plain)
    main(["export", f"{root}/plain", "--to", "hf", "-o", f"{root}/hf"], standalone_mode=False)


def old_output(place: Path, verb: str) -> None:
    """Give a place what an earlier call of the verb has left: for a model, one of other weights."""
    from tests.cli.conftest import write_model

    if verb in ("export", "import"):
        write_model(place / "out", small_twin("layerskip").replace(vocab_size=320))
        (place / "out" / "README.md").write_text("mine")
    elif verb == "generate":
        (place / "page.html").write_text("<html>old</html>")


def _folder_state(root: Path) -> Found:
    if not root.exists():
        return {}
    read_folder(root)
    files = [root / name for name in PARTS if (root / name).exists()]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def _page(place: Path) -> Found:
    page = place / "page.html"
    if not page.exists():
        return {}
    text = page.read_text("utf-8")
    assert text.lower().startswith(("<html>", "<!doctype html>")) and text.rstrip().endswith(
        "</html>"
    )
    return {"page": "old" if "<html>old" in text else "new"}


def _run(place: Path) -> Found:
    """A run's folder: its checkpoints' weights, and the history."""
    from bitskip_train.checkpoint import load_checkpoint

    found: Found = {}
    for name in ("last.pt", "best.pt"):
        if (place / "run" / name).exists():
            loaded = load_checkpoint(place / "run" / name)
            digest = hashlib.sha256()
            for key in sorted(loaded.state):
                digest.update(loaded.state[key].numpy().tobytes())
            found[name] = (loaded.step, digest.hexdigest())
    return found


def _auto(place: Path) -> Found:
    """The calibrated setting, without what depends on the speed of the hour."""
    folder = read_folder(place / "model")
    stored = json.loads((place / "model" / GENERATION).read_text("utf-8"))
    auto = stored.pop("auto_exit", None)
    assert json.loads((place / "model" / CONFIG).read_text("utf-8"))
    assert (auto is None) == (folder.auto_exit is None)
    kept = {k: auto[k] for k in ("budget", "text", "tokens", "full_loss")} if auto else {}
    return {"rest": stored, "auto": kept}


def _kernels(place: Path) -> Found:
    """Compiled kernels: whole ones, that is, such as start without compiling."""
    from bitskip_cpu.compiling import DIGEST

    found = {}
    for path in (place / "kernels").glob("kernels-*/[!.]*"):
        content = path.read_bytes()
        assert hashlib.sha256(content[DIGEST:]).digest() == content[:DIGEST], path
        found[path.name] = content[:DIGEST].hex()
    return found


def _train_words(place: Path) -> list[Any]:
    words = ["train", "--out", place / "run", "--no-tensorboard", "--token-cache", place / "tokens"]
    if (place / "run" / "last.pt").exists():
        return [*words, "--resume"]
    text = place / "text.txt"
    given = ["--preset", "tiny", "--config", place / "config.toml", "--data", text, "--valid", text]
    return [*words, *given]


VERBS: dict[str, Verb] = {
    "first": Verb(
        lambda p: ["warmup"], _kernels, ("kernels",),
        lambda found, whole: found.items() <= whole.items(),
    ),
    "generate": Verb(
        lambda p: [
            "generate", p / "model", "-p", "Once", "-n", 60, "-t", 1, "--html", p / "page.html",
        ],
        _page, ("page.html",),
    ),
    "train": Verb(
        _train_words, _run, ("run", "tokens"),
        lambda found, whole: all(n in whole and found[n][0] <= whole["last.pt"][0] for n in found),
    ),
    "export": Verb(
        lambda p: ["export", p / "a.pt", "-o", p / "out"],
        lambda p: _folder_state(p / "out"), ("out",),
    ),
    "calibrate": Verb(
        lambda p: [
            "calibrate", p / "model", "--text", p / "text.txt", "--tokens", 60, "--ctx", 20,
            "--rule", "fixed,max", "-t", 1,
        ],
        _auto, (f"model/{GENERATION}",),
    ),
    "import": Verb(
        lambda p: ["import", p / "hf", "-o", p / "out"],
        lambda p: _folder_state(p / "out"), ("out",),
    ),
}  # fmt: skip


def fresh(root: Path, place: Path) -> None:
    """A place with all inputs and no output."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(root, place)
