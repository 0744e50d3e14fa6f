"""What is damaged, and what is then done with it: model folders, checkpoints, tokenizer files."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitskip_ref import folder as fd
from bitskip_ref.config import ConfigError
from bitskip_ref.tensors import WEIGHTS
from tests.fuzz import checkpoints, foreign
from tests.fuzz.mutations import (
    dumped,
    mutate_bytes,
    mutate_safetensors,
    mutate_tree,
    put_odd_file,
)
from tests.helpers import OPTIONS, random_folder, random_tensors, twin
from tests.text.tokenizers_of_all_kinds import DECODERS, KINDS, with_decoder


@dataclass(frozen=True)
class Target:
    """A kind of file: how a case is written into an empty folder, and how it is used.

    `use` says `refused` or `used`; any exception but a ValueError is a fault.
    """

    prepare: Callable[[Path], None]  # undamaged files, made once
    write: Callable[[random.Random, Path, Path], None]  # (draw, prepared, where to)
    use: Callable[[Path], str]
    what: str = ""  # it is, in words
    each: int = 1  # of these in a case


# ---- model folders ------------------------------------------------------------------

ODD_SHAPES = 500  # models of them, each made when first needed
BASES = ["bitskip-v1", "wt2-bitskip", "bitnet-2b4t", "llama3", "tiny", *OPTIONS]
SHAPES: dict[str, list[int]] = {
    "vocab_size": [1, 2, 16, 97], "hidden_size": [1, 2, 3, 4, 16, 48, 65],
    "head_dim": [2, 4, 6, 16], "num_hidden_layers": [1, 2, 5], "num_attention_heads": [1, 2, 4, 6],
    "num_key_value_heads": [1, 2], "intermediate_size": [1, 2, 17, 80, 257],
    "max_position_embeddings": [1, 2, 16, 64, 300],
}  # fmt: skip


def _prepare_folders(root: Path) -> None:
    from bitskip_cpu.compiling import warmup

    warmup()
    tokenizer = KINDS["byte-fallback"]().to_str()
    for name in BASES:
        config = twin(name)
        exit_blocks = (1,) if config.exit_blocks else ()
        random_folder(root / name, config.replace(num_hidden_layers=2, exit_blocks=exit_blocks))
        generation = json.loads((root / name / fd.GENERATION).read_text())
        generation["auto_exit"] = {
            "exit_layer": "max", "threshold": 0.5, "looks": [1], "last": 2, "budget": 0.04,
        }  # fmt: skip
        (root / name / fd.GENERATION).write_text(json.dumps(generation))
    wide = twin("bitskip-v1").replace(vocab_size=400)
    fd.write_folder(
        root / "with-text", wide, random_tensors(wide), tokenizer_json=tokenizer, eos_token_id=0
    )


def _write_folder(draw: random.Random, prepared: Path, out: Path) -> None:
    """Change some files of a model in memory; the others are links to the undamaged ones."""
    name = draw.choice([*BASES, "with-text"])
    if draw.random() < 0.15:
        name = f"odd-{draw.randrange(ODD_SHAPES)}"
        if not (prepared / name).exists():
            _odd_shape(random.Random(name), prepared / name)
    whole = _files(prepared / name)
    files: dict[str, bytes | None] = dict(whole)  # None: no regular file
    for _ in range(draw.choice([1, 1, 1, 2])):
        kind = draw.randrange(12)
        name = draw.choice([fd.CONFIG, fd.GENERATION, WEIGHTS, fd.TOKENIZER])
        raw = files.get(name)
        if kind == 0:
            files[name] = None
        elif raw is None:
            continue
        elif kind == 1:
            files[name] = mutate_bytes(draw, raw)
        elif name == WEIGHTS:
            files[name] = mutate_safetensors(draw, raw)
            if draw.random() < 0.9:
                _sign(files)
        else:
            try:
                tree = json.loads(raw)
            except (ValueError, RecursionError):
                continue
            files[name] = dumped(draw, mutate_tree(draw, tree))
    for name, raw in files.items():
        if raw is None:
            put_odd_file(draw, out / name)
        elif raw is whole.get(name):
            os.link(whole.path / name, out / name)
        else:
            (out / name).write_bytes(raw)


class _Whole(dict[str, bytes]):
    """The files of an undamaged model."""

    path: Path


@functools.cache
def _files(root: Path) -> _Whole:
    """Read once per process."""
    files = _Whole((path.name, path.read_bytes()) for path in sorted(root.iterdir()))
    files.path = root
    return files


def _odd_shape(draw: random.Random, out: Path) -> None:
    """A whole model of an unusual shape, its weights at times as large as they may be."""
    while True:
        changes: dict[str, Any] = {k: draw.choice(SHAPES[k]) for k in draw.sample(list(SHAPES), 3)}
        try:
            config = twin(draw.choice(BASES)).replace(**changes)
            break
        except ConfigError:
            continue
    tensors = random_tensors(config, draw.randrange(1000))
    if draw.random() < 0.5:
        name = draw.choice(list(tensors))
        if tensors[name].dtype.kind == "f":
            largest = float(np.finfo(tensors[name].dtype).max)
            tensors[name][...] = draw.choice([0.0, -0.0, largest, -largest, 1e-7, 1.0])
    fd.write_folder(out, config, tensors, eos_token_id=0)


def _sign(files: dict[str, bytes | None]) -> None:
    """Make the checksum right, so that the checks behind it are reached."""
    config, weights = files[fd.CONFIG], files[WEIGHTS]
    if config is None or weights is None:
        return
    try:
        stored = json.loads(config)
        stored["weights_sha256"] = hashlib.sha256(weights).hexdigest()
        files[fd.CONFIG] = json.dumps(stored).encode()
    except (ValueError, TypeError, RecursionError):
        return


def _use_folder(out: Path) -> str:
    from bitskip_cpu.engine import Engine
    from bitskip_cpu.inspect import facts_of
    from bitskip_cpu.model import Model

    try:
        folder = fd.read_folder(out)
        if folder.config.max_position_embeddings > 1 << 12:
            return "used"  # its caches are as large as it says; that is not the reader's fault
        facts_of(folder)
        model = Model(Engine(folder.config, folder.tensors, 1), folder)
        ids = [0, folder.config.vocab_size - 1][: folder.config.max_position_embeddings]
        cache = model.new_cache()
        model.extend(ids, cache)
        rule = folder.auto_exit or model.exit_rule()
        if cache.length < folder.config.max_position_embeddings:
            model.step(0, model.new_cache(), rule)
        if folder.tokenizer is not None:
            model.generate("the cat <s>", max_tokens=3, stop=["a"])
    except ValueError:
        return "refused"
    return "used"


# ---- tokenizer files ----------------------------------------------------------------

TEXTS = ["the cat 😀 <s> sat</w> naïve  \n", "", "<|endoftext|>", "日本 本日" * 20, "a" * 300]
STEPS: list[dict[str, Any]] = [
    {"type": "Strip", "content": " ", "start": 5, "stop": 0},
    {"type": "Strip", "content": "a", "start": 0, "stop": 3},
    {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
    {"type": "WordPiece", "prefix": "", "cleanup": True},
    {"type": "BPEDecoder", "suffix": ""},
    {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
    {"type": "Replace", "pattern": {"Regex": "(?<=a)b*"}, "content": ""},
    {"type": "Metaspace", "replacement": "t", "prepend_scheme": "first", "split": False},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Fuse"}, {"type": "ByteFallback"},
]  # fmt: skip


def _prepare_tokenizers(root: Path) -> None:
    for name in KINDS:
        (root / f"{name}.json").write_text(KINDS[name]().to_str(), "utf-8")
    for name in DECODERS:
        (root / f"{name}.json").write_text(with_decoder(name).to_str(), "utf-8")


def _write_tokenizer(draw: random.Random, prepared: Path, out: Path) -> None:
    files = sorted(prepared.glob("*.json"))
    tree = json.loads(draw.choice(files).read_bytes())
    others = [json.loads(draw.choice(files).read_bytes())]
    if draw.random() < 0.2:
        steps = draw.sample(STEPS, draw.randrange(1, 4))
        tree["decoder"] = {"type": "Sequence", "decoders": copy.deepcopy(steps)}
    if draw.random() < 0.8:
        tree = mutate_tree(draw, tree, others)
    (out / fd.TOKENIZER).write_bytes(dumped(draw, tree))


def _use_tokenizer(out: Path) -> str:
    from bitskip_text.streaming import StreamDecoder
    from bitskip_text.tokenizer import read_tokenizer

    draw = random.Random(0)
    try:
        tokenizer = read_tokenizer(out / fd.TOKENIZER, draw.choice([None, 400]))
        again = read_tokenizer(out / fd.TOKENIZER)
        assert len(again.json) > 2
        for special in (False, True):
            for text in TEXTS:
                tokenizer.encode(text, special)
        tokenizer.encode_batch(TEXTS)
        for _ in range(5):
            ids = [draw.randrange(tokenizer.size + 2) for _ in range(draw.randrange(9))]
            decoder = StreamDecoder(tokenizer)
            said = "".join(map(decoder.feed, ids)) + decoder.finish()
            assert said == tokenizer.decode(ids), (ids, said, tokenizer.decode(ids))
    except ValueError:
        return "refused"
    return "used"


# ---- calls of the Python API --------------------------------------------------------

CALLS = 50  # in a case
JUDGED = 0.05  # of all cases are done by the reference, too


def _prepare_calls(root: Path) -> None:
    from bitskip_cpu.compiling import warmup

    warmup()


def _write_calls(draw: random.Random, prepared: Path, out: Path) -> None:
    (out / "seed").write_bytes(draw.randbytes(8))


def _use_calls(out: Path) -> str:
    """What is refused is so by a ValueError; anything else ends the case."""
    from bitskip_ref.constants import KV_CACHES
    from tests.fuzz.calls import Calls, engines

    draw = random.Random((out / "seed").read_bytes())
    both = engines(draw.choice(KV_CACHES))
    calls = Calls(draw, both if draw.random() < JUDGED else both[:1])
    for _ in range(CALLS):
        calls.act()
    return "used"


TARGETS = {
    "folder": Target(_prepare_folders, _write_folder, _use_folder, "model folders"),
    "tokenizer": Target(_prepare_tokenizers, _write_tokenizer, _use_tokenizer, "tokenizer files"),
    "checkpoint": Target(checkpoints.prepare, checkpoints.write, checkpoints.use, "checkpoints"),
    "huggingface": Target(
        foreign.prepare_huggingface,
        foreign.write_huggingface_case,
        foreign.use,
        "models of Hugging Face",
    ),
    "gguf": Target(foreign.prepare_gguf, foreign.write_gguf_case, foreign.use, "GGUF files"),
    "calls": Target(_prepare_calls, _write_calls, _use_calls, "calls of the Python API", CALLS),
}
