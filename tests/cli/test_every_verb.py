"""Every verb of the program: bad input, and extras that are not installed, are one line each."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from bitskip.errors import EXTRAS, LONGEST
from bitskip.options import Listed, NumberOr, Word
from bitskip.program import main, runtime
from bitskip_ref.folder import ChatForm
from bitskip_train.checkpoint import load_checkpoint, save_checkpoint
from tests.cli.conftest import CONFIG, byte_level_bpe, write_model
from tests.export.test_pack import write_checkpoint

ROOT = Path(__file__).parents[2]
CONTEXT = click.Context(main)
VERBS = {name: main.get_command(CONTEXT, name) for name in main.list_commands(CONTEXT)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, a checkpoint of a like model, a text, and what is none of these."""
    root = tmp_path_factory.mktemp("every")
    write_model(root / "model")
    write_model(root / "talker", chat=ChatForm("{{ messages[-1].content }}"))
    made = load_checkpoint(write_checkpoint(root / "a.pt", CONFIG, byte_level_bpe()))
    made.train["context"] = 16
    save_checkpoint(root / "a.pt", made)
    assert run(["export", f"{root}/model", "--to", "hf", "-o", f"{root}/hf"]).exit_code == 0
    (root / "text.txt").write_text("the cat sat on the mat.\n<|endoftext|>\nand sat again.\n" * 50)
    (root / "binary").write_bytes(bytes(range(256)))
    (root / "empty").write_bytes(b"")
    (root / "folder").mkdir()
    return root


def fine(verb: str, place: Path) -> list[str]:
    """Arguments with which a verb would do its work."""
    model, text, checkpoint = place / "model", place / "text.txt", place / "a.pt"
    out, held = place / "out", ["--text", text]
    cache = ["--token-cache", place / "tokens"]
    words: dict[str, list[Any]] = {
        "generate": [model, "-p", "Once", "-n", 1],
        "chat": [place / "talker", "-n", 1],
        "bench": [model, "-p", 2, "-n", 1, "-r", 1],
        "inspect": [model],
        "serve": [model, "--port", 0],
        "perplexity": [model, *held],
        "eval": [model, "--tasks", "piqa"],
        "exits": [model, *held, "--tokens", 4, "--exit-layer", 4, "--rule", "none"],
        "calibrate": [model, *held, "--dry-run", "--tokens", 4],
        "selftest": [model],
        "warmup": [],
        "doctor": [],
        "train": [
            "--preset", "tiny", "--data", text, "--out", out, "--no-tensorboard", *cache,
            "--set", "tokenizer=bpe:300", "--set", "context=16", "--set", "steps=1",
        ],
        "evaluate": [checkpoint, *held, "--context", 8, *cache],
        "average": [checkpoint, "-o", place / "mean.pt"],
        "fit-gates": [checkpoint, "--data", text, "-o", place / "gated.pt", "--steps", 1, *cache],
        "fit-exits": [
            model, *held, "--layers", 1, "-o", out, "--steps", 1, "--context", 8,
        ],
        "soft-targets": [model, "--data", text, "-o", place / "soft", *cache],
        "export": [checkpoint, "-o", out],
        "verify": [model, "--engines", "ref", "--tokens", 2, "--exit-layer", 1],
        "import": [place / "hf", "-o", out],
        "reproduce": ["--work", place / "work", "--results", place / "results"],
    }  # fmt: skip
    return [verb, *map(str, words[verb])]


def run(words: list[str], program: click.Command = main, **options: Any) -> Result:
    """The program in this process; an exception that is no clean end fails the test."""
    result = CliRunner().invoke(program, words, **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def one_line(result: Result, *said: str) -> None:
    """The end of a verb that could not: one line `error: ...`."""
    lines = result.stderr.splitlines()
    assert result.exit_code in (1, 2), result.output
    assert lines and lines[-1].startswith("error: ") and len(lines[-1]) > len("error: ")
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert "Traceback" not in result.stderr
    for text in said:
        assert text in lines[-1]


# ---- options ------------------------------------------------------------------------


def wrong_values(param: click.Parameter) -> list[str]:
    """Values that an option or argument can never take."""
    kind = param.type
    if isinstance(kind, Listed):
        inner = [v for v in wrong_values_of(kind.item) if v or not kind.empty]
        return [*inner, "1,,2", *(["", ",", "1"] if kind.count else []), "1;2"]
    return wrong_values_of(kind)


def wrong_values_of(kind: click.ParamType) -> list[str]:
    """The same of a type."""
    if isinstance(kind, NumberOr):
        return ["", "0", "-1", "1.5", "nonsense"]
    if isinstance(kind, Word | click.Choice):
        return ["", "nonsense"]
    if isinstance(kind, click.IntRange):
        return ["", "x", "1.5", "nan", "-1"]
    if isinstance(kind, click.FloatRange):
        return ["", "x", "nan", "-inf"]
    if isinstance(kind, click.types.FloatParamType):
        return ["", "x", "1,5"]
    if isinstance(kind, click.Path) and kind.exists:
        return ["", "no/such/place", "empty/child", "x" * 5000]
    return []


def cases() -> Iterator[Any]:
    """(verb, option, wrong value)."""
    for name, verb in VERBS.items():
        assert verb is not None
        for param in verb.params:
            if isinstance(param, click.Option):
                for value in wrong_values(param):
                    option = max(param.opts, key=len)
                    yield pytest.param(name, option, value, id=f"{name} {option} {value[:20]!r}")


@pytest.mark.parametrize(("verb", "option", "value"), cases())
def test_a_wrong_value_is_one_line(verb: str, option: str, value: str, place: Path) -> None:
    result = run([*fine(verb, place), option, value])
    one_line(result)
    assert result.exit_code == 2, result.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_option_names_the_likeliest(verb: str, place: Path) -> None:
    for word in ("--hepl", "--", "-Z"):
        result = run([*fine(verb, place), word, "x", "y", "z"])
        if verb != "average" or word != "--":
            assert result.exit_code == 2
        one_line(result)
    one_line(run([verb, "--hepl"]), "--help")


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_without_arguments_works_or_says_what_it_needs(verb: str) -> None:
    needs = {
        "perplexity": "--text", "exits": "--text", "calibrate": "--text", "train": "--out",
        "fit-exits": "--text", "soft-targets": "--data",
        "evaluate": "CHECKPOINT", "average": "CHECKPOINT", "fit-gates": "CHECKPOINT",
        "export": "MODEL", "import": "SOURCE", "eval": "--tasks",
    }  # fmt: skip
    if verb in needs:
        one_line(run([verb]), needs[verb])


# ---- what arguments name ------------------------------------------------------------

MODELS = {
    "no such folder": ("nowhere/model", "no model folder at"),
    "no such name": ("storeys-24", "did you mean stories-24?"),
    "nothing": ("", "unknown model ''"),
    "a text": ("Once upon a time", "--prompt"),
    "a file": ("{}/text.txt", "is a file"),
    "a folder of something else": ("{}/folder", "config.json"),
    "too long": ("x" * 5000, "error: "),
    "control characters": ("a\x1b]0;title\x07\nb", "a\\x1b]0;title\\x07"),
}
TAKING_MODELS = [
    name
    for name, verb in VERBS.items()
    if verb and any(p.name == "model" for p in verb.params) and name != "export"
]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("verb", TAKING_MODELS)
def test_what_is_no_model_is_one_line(verb: str, kind: str, place: Path) -> None:
    model, said = MODELS[kind]
    words = fine(verb, place)
    words[1] = model.format(place)
    result = run(words)
    one_line(result)
    assert said in result.stderr and len(result.stderr) < LONGEST + 100
    assert "\x1b" not in result.stderr


@pytest.mark.parametrize("verb", [v for v in TAKING_MODELS if v not in ("bench", "inspect")])
def test_a_checkpoint_for_a_model_says_export(verb: str, place: Path) -> None:
    words = fine(verb, place)
    words[1] = str(place / "a.pt")
    one_line(run(words), f"is a checkpoint, not a model folder: bitskip export {place / 'a.pt'}")


@pytest.mark.parametrize(
    ("verb", "name"),
    [
        (verb, name)
        for verb in ("evaluate", "average", "fit-gates", "export")
        for name in ("nowhere.pt", "folder", "empty", "binary", "text.txt", "model")
        if (verb, name) != ("fit-gates", "model")  # gates are fitted to folders, too
    ],
)
def test_what_is_no_checkpoint_is_one_line(verb: str, name: str, place: Path) -> None:
    words = fine(verb, place)
    words[1] = str(place / name)
    one_line(run(words))


@pytest.mark.parametrize("verb", ["perplexity", "exits", "calibrate", "evaluate", "fit-exits"])
@pytest.mark.parametrize("name", ["nowhere.txt", "folder", "empty", "binary"])
def test_what_is_no_text_is_one_line(verb: str, name: str, place: Path) -> None:
    words = fine(verb, place)
    words[words.index("--text") + 1] = str(place / name)
    one_line(run(words))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--preset, --config or --from is missing"),
        (["--from", "{}/model", "--preset", "tiny"], "--from: not beside --preset"),
        (["--from", "{}/model", "--resume"], "--from: not beside --resume"),
        (["--from", "{}/folder"], "config.json"),
        (["--from", "{}/model", "--set", "hidden_size=32"], "--from it must stay"),
        (["--preset", "tinny"], "did you mean tiny?"),
        (["--preset", "tiny", "--config", "{}/text.txt"], "not TOML"),
        (["--preset", "tiny", "--config", "{}/binary"], "UTF-8"),
        (["--preset", "tiny", "--config", "{}/folder"], "is a directory"),
        (["--preset", "tiny", "--set", "hiden_size=3"], "did you mean hidden_size?"),
        (["--preset", "tiny", "--set", "modle.hidden_size=3"], "did you mean model?"),
        (["--preset", "tiny", "--set", "lr"], "must be KEY=VALUE"),
        (["--preset", "tiny", "--set", "lr="], "lr"),
        (["--preset", "tiny", "--set", "lr=fast"], "lr"),
        (["--preset", "tiny", "--set", "schedule=cosin"], "cosine"),
        (["--preset", "tiny", "--data", ""], "error: "),
        (["--preset", "tiny", "--data", "{}/folder"], "error: "),
        (["--preset", "tiny", "--data", "{}/binary"], "UTF-8"),
        (["--preset", "tiny", "--data", "{}/empty"], "error: "),
        (["--preset", "tiny", "--data", "{}/text.txt", "--set", "tokenizer=/"], "error: "),
        (["--resume"], "no such file"),
    ],
)
def test_training_mistakes(words: list[str], said: str, place: Path) -> None:
    given = [w.format(place) for w in words]
    result = run(["train", "--out", str(place / "run"), *given])
    one_line(result)
    assert said in result.stderr
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    "verb", ["train", "average", "fit-gates", "fit-exits", "soft-targets", "export"]
)
def test_where_nothing_can_be_written(verb: str, place: Path) -> None:
    words = fine(verb, place)
    option = "--out" if "--out" in words else "-o"
    words[words.index(option) + 1] = str(place / "text.txt" / "below")
    one_line(run(words))


# ---- the program itself -------------------------------------------------------------


def test_words_of_the_program() -> None:
    one_line(run(["genrate"]), "did you mean generate?")
    one_line(run(["train"], runtime), "train is a verb of the program bitskip")
    one_line(run(["--vresion"]), "--version")
    assert run(["-h"]).output == run(["--help"]).output
    assert run(["--version"]).output == "bitskip, version 0.1.0\n"
    assert set(runtime.list_commands(CONTEXT)) < set(VERBS)
    empty = run([])
    assert empty.exit_code == 2 and "Usage: " in empty.stderr


def test_ctrl_c_and_a_mistake_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitskip_cpu.doctor

    def raising(error: BaseException) -> None:
        def fail() -> None:
            raise error

        monkeypatch.setattr(bitskip_cpu.doctor, "doctor", fail)

    raising(KeyboardInterrupt())
    assert run(["doctor"]).exit_code == 130
    raising(MemoryError())
    one_line(run(["doctor"]), "not enough memory")
    raising(OSError(28, "No space left on device"))
    one_line(run(["doctor"]), "No space left on device")
    raising(ImportError("cannot import name 'x' from 'torch'", name="torch"))
    one_line(run(["doctor"]), "torch is installed but cannot be imported")
    raising(RuntimeError("can't start new thread"))
    one_line(run(["doctor"]), "ulimit -u")
    panic = type("PanicException", (BaseException,), {})
    raising(panic("ThreadPoolBuildError { kind: IOError }"))
    one_line(run(["doctor"]), "ulimit -u")
    raising(panic("index out of bounds"))
    one_line(run(["doctor"]), "index out of bounds")
    raising(TypeError("a mistake of ours"))
    with pytest.raises(TypeError):
        run(["doctor"])


@pytest.mark.parametrize("program", ["-m bitskip", "-m bitskip_cpu", "cli.py"])
def test_a_closed_pipe_ends_quietly(program: str) -> None:
    script = f"{sys.executable} {program} inspect | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == ""


# ---- extras -------------------------------------------------------------------------

PROBE = """
import json, sys
sys.modules[sys.argv[1]] = None  # importing it, or what is in it, fails as if it were not there
from click.testing import CliRunner
from bitskip.program import main
for words in json.loads(sys.argv[2]):
    result = CliRunner().invoke(main, words)
    error = result.exception
    if error is not None and not isinstance(error, SystemExit):
        raise error
    print(json.dumps([result.exit_code, result.stderr]), file=sys.__stdout__)
"""


def with_extras(place: Path) -> dict[str, list[str]]:
    """Verbs as above, and with the options that bring in more."""
    named = {verb: fine(verb, place) for verb in VERBS}
    del named["warmup"], named["selftest"], named["doctor"]  # no extras, and they take their time
    del named["serve"], named["eval"]  # tests/serve/test_process.py, tests/eval/test_eval.py
    named["exits --plot"] = [*fine("exits", place), "--plot", str(place / "exits.svg")]
    named["export --to onnx"] = [*fine("export", place), "--to", "onnx"]
    named["verify onnx"] = [*fine("verify", place), "--engines", "onnx"]
    named["verify torch"] = [*fine("verify", place), "--engines", "torch"]
    named["train --tensorboard"] = [*fine("train", place)[:-1], "steps=2", "--tensorboard"]
    return named


TRAINING = {
    "train", "train --tensorboard", "evaluate", "average", "fit-gates", "fit-exits",
    "soft-targets", "export", "export --to onnx", "verify torch",
}  # fmt: skip
NEEDS = {  # module -> what cannot go without it
    "torch": TRAINING,
    "tensorboard": {"train --tensorboard"},
    "onnx": {"export --to onnx", "verify onnx"},
    "onnxruntime": {"verify onnx"},
    "matplotlib": {"exits --plot"},
    "optuna": set(),
    "transformers": set(),
    "datasets": set(),
    "huggingface_hub": set(),
    "gguf": set(),
    "jinja2": {"chat"},
    "lm_eval": set(),
    "starlette": set(),
    "uvicorn": set(),
}


@pytest.mark.parametrize("module", EXTRAS)
def test_a_missing_extra_says_what_to_install(module: str, place: Path, tmp_path: Path) -> None:
    named = with_extras(place)
    words = [[w.replace(str(place / "out"), str(tmp_path / n)) for w in named[n]] for n in named]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, module, json.dumps(words)],
        capture_output=True, text=True, cwd=ROOT, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends = dict(zip(named, map(json.loads, done.stdout.splitlines()), strict=True))
    for name, (code, errors) in ends.items():
        if name in NEEDS[module]:
            line = f'error: {module} is not installed: pip install "bitskip[{EXTRAS[module]}]"'
            assert (code, errors.splitlines()[-1]) == (1, line), name
        else:
            assert code == 0, (name, errors)


@pytest.mark.parametrize(
    ("module", "name"), [("optuna", "v2-table6"), ("matplotlib", "v1-figure1")]
)
def test_what_reproduce_lacks_shows_before_it_trains(
    module: str, name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    one_line(run([*fine("reproduce", place), name]), f"bitskip[{EXTRAS[module]}]")
    assert not (place / "work").exists()


def test_the_table_of_extras_is_that_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for module, extra in EXTRAS.items():
        assert any(r.replace("-", "_").startswith(module) for r in extras[extra]), module
