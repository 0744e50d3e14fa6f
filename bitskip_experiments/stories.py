"""The shipped model from its text: `python -m bitskip_experiments.stories DATA WORK OUT`.

One recipe, one seed, nothing by hand: preset `stories-24` on all stories below DATA/tinystories but
those held out for measuring and those held back for the gates, then gates, then the folder OUT,
which recommends a repetition penalty: without one greedy texts of so small a model loop. Stopped or
killed, the same command goes on from WORK; what is done is not done again. Further words are
settings of the trainer, `--set NAME=VALUE`, for smaller trials.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bitskip_experiments.errors import ExperimentError
from bitskip_ref.documents import END_OF_TEXT, read_documents
from bitskip_ref.files import replace_file
from bitskip_ref.folder import GENERATION, stored_sampling

TRAIN = ("tinystories_train.txt", "tinystories_more.txt", "tinystories_more_recased.txt")
VALID = "tinystories_valid.txt"
HELD_BACK = 300
"""Stories, the last of `TRAIN[0]`, that the gates are fitted on and nothing else: on text that a
model was trained on its exits are worse beside full depth than on any other."""

SAMPLING = {"repetition_penalty": 1.1}
"""What the folder recommends (SPEC 9.7)."""


def split(data: Path, work: Path) -> tuple[list[Path], Path]:
    """(training text, held-back text), below `work`. Raises ExperimentError for a missing file."""
    paths = [data / "tinystories" / name for name in TRAIN]
    if missing := [path for path in [*paths, paths[0].with_name(VALID)] if not path.is_file()]:
        raise ExperimentError(f"{missing[0]}: no such file")
    stories = list(read_documents(paths[0]))
    found = [work / "train.txt", work / "held-back.txt"]
    for path, part in zip(found, (stories[:-HELD_BACK], stories[-HELD_BACK:]), strict=True):
        if not path.exists():
            with replace_file(path) as file:
                file.write("".join(f"{story}\n{END_OF_TEXT}\n" for story in part).encode())
    return [found[0], *paths[1:]], found[1]


def commands(
    data: Path, work: Path, out: Path, settings: tuple[str, ...] = ()
) -> Iterator[list[str]]:
    """What is left to do, each as words after `bitskip`; the next is asked for when it is done."""
    texts, held_back = split(data, work)
    run, gated = work / "run", work / "gated.pt"
    tokens = ["--token-cache", str(work / "tokens")]
    if not gated.exists():
        if (run / "last.pt").exists():  # a run that was at its end ends at once
            yield ["train", "--resume", "--out", str(run), *tokens, *settings]
        else:
            words = [word for text in texts for word in ("--data", str(text))]
            words += ["--valid", str(data / "tinystories" / VALID)]
            yield ["train", "--preset", "stories-24", *words, "--out", str(run), *tokens, *settings]
        yield [
            "fit-gates", str(run / "last.pt"), "-o", str(gated), "--data", str(held_back),
            "--scale", "0.5", *tokens,
        ]  # fmt: skip
    if not out.exists():
        yield [
            "export", str(gated), "-o", str(out), "--by-frequency", str(texts[0]), "--head", "int6",
        ]  # fmt: skip


def main(data: str, work: str, out: str, *settings: str) -> None:
    """Run them one after the other; the first that fails ends it with its exit code."""
    Path(work).mkdir(parents=True, exist_ok=True)
    for words in commands(Path(data), Path(work), Path(out), settings):
        code = subprocess.run([sys.executable, "-m", "bitskip", *words]).returncode
        if code:
            sys.exit(code)
    recommend(Path(out))


def recommend(folder: Path) -> None:
    """Let a model folder recommend SAMPLING beside what it recommends already."""
    path = folder / GENERATION
    said = json.loads(path.read_text("utf-8")) | stored_sampling(SAMPLING)
    with replace_file(path) as file:
        file.write(f"{json.dumps(said, indent=2)}\n".encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
