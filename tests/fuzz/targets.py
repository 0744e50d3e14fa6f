"""What is damaged, and what is then done with it: model folders, checkpoints, tokenizer files."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitskip_ref import folder as fd
from bitskip_ref.config import ConfigError, ModelConfig
from bitskip_ref.tensors import WEIGHTS
from tests.fuzz import foreign
from tests.fuzz.mutations import (
    ODD,
    dumped,
    mutate_bytes,
    mutate_safetensors,
    mutate_tree,
    replace_file_by_odd,
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


# ---- model folders ------------------------------------------------------------------

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
        random_folder(root / name, twin(name))
        generation = json.loads((root / name / fd.GENERATION).read_text())
        generation["auto_exit"] = {
            "exit_layer": "max", "threshold": 0.5, "looks": [1, 2], "last": 4, "budget": 0.04,
        }  # fmt: skip
        (root / name / fd.GENERATION).write_text(json.dumps(generation))
    wide = twin("bitskip-v1").replace(vocab_size=400)
    fd.write_folder(
        root / "with-text", wide, random_tensors(wide), tokenizer_json=tokenizer, eos_token_id=0
    )


def _write_folder(draw: random.Random, prepared: Path, out: Path) -> None:
    if draw.random() < 0.15:
        _odd_shape(draw, out)
    else:
        name = draw.choice([*BASES, "with-text"])
        for path in (prepared / name).iterdir():
            shutil.copyfile(path, out / path.name)
    for _ in range(draw.choice([1, 1, 1, 2])):
        kind = draw.randrange(12)
        name = draw.choice([fd.CONFIG, fd.GENERATION, WEIGHTS, fd.TOKENIZER])
        path = out / name
        if kind == 0:
            replace_file_by_odd(draw, path)
        elif not path.is_file():
            continue
        elif kind == 1:
            path.write_bytes(mutate_bytes(draw, path.read_bytes()))
        elif name == WEIGHTS:
            path.write_bytes(mutate_safetensors(draw, path.read_bytes()))
            if draw.random() < 0.9:
                _sign(out)
        else:
            try:
                tree = json.loads(path.read_bytes())
            except (ValueError, RecursionError):
                continue
            path.write_bytes(dumped(draw, mutate_tree(draw, tree)))


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


def _sign(out: Path) -> None:
    """Make the checksum right, so that the checks behind it are reached."""
    if not (out / fd.CONFIG).is_file():  # a FIFO would be waited for
        return
    try:
        config = json.loads((out / fd.CONFIG).read_bytes())
        config["weights_sha256"] = hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest()
        (out / fd.CONFIG).write_text(json.dumps(config))
    except (OSError, ValueError, TypeError, RecursionError):
        return


def _use_folder(out: Path) -> str:
    from bitskip_cpu.engine import Engine
    from bitskip_cpu.inspect import inspect
    from bitskip_cpu.model import Model

    try:
        folder = fd.read_folder(out)
        if folder.config.max_position_embeddings > 1 << 12:
            return "used"  # its caches are as large as it says; that is not the reader's fault
        inspect(out)
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


# ---- checkpoints --------------------------------------------------------------------


def _checkpoint() -> dict[str, Any]:
    """What a small run writes, as plain values."""
    import torch

    from bitskip_train.model import BitskipModel
    from bitskip_train.settings import TrainConfig
    from bitskip_train.trainer import make_optimizer

    config: ModelConfig = twin("tiny").replace(vocab_size=16, hidden_size=8, num_hidden_layers=2)
    torch.manual_seed(0)
    model, train = BitskipModel(config), TrainConfig(steps=4, context=8)
    optimizer = make_optimizer(model, train)
    loss = torch.stack([p.square().sum() for p in model.parameters()]).sum()
    torch.autograd.backward(loss)
    optimizer.step()
    return {
        "format": "bitskip-checkpoint-1", "config": config.to_dict(), "state": model.state_dict(),
        "tokenizer_json": KINDS["words"]().to_str(), "train": train.to_dict(), "step": 1,
        "position": 1, "best_loss": 2.5, "history": [{"step": 1, "loss": 2.5}],
        "optimizer": optimizer.state_dict(),
    }  # fmt: skip


def _prepare_checkpoints(root: Path) -> None:
    import torch

    torch.save(_checkpoint(), root / "last.pt")


def _odd_tensor(draw: random.Random, like: Any) -> Any:
    """A tensor that should not be there, or nearly fits."""
    import torch

    whole = like if isinstance(like, torch.Tensor) else torch.zeros(3)
    kinds: list[Callable[[], Any]] = [
        lambda: torch.zeros(3), lambda: torch.zeros(0), lambda: torch.zeros(()),
        lambda: whole.to(torch.bfloat16), lambda: whole.to(torch.int8), lambda: whole.double(),
        lambda: whole.to(torch.complex64), lambda: whole.bool(), lambda: whole.half(),
        lambda: whole.to("meta"), lambda: whole.to_sparse(), lambda: whole * float("nan"),
        lambda: whole * float("inf"), lambda: whole.flatten(), lambda: whole.t(),
        lambda: whole.unsqueeze(0), lambda: torch.zeros(1).expand(whole.shape),
        lambda: whole.to(torch.float8_e4m3fn), lambda: torch.nested.nested_tensor([whole, whole]),
        lambda: torch.quantize_per_tensor(whole, 0.1, 0, torch.qint8), lambda: whole.tolist(),
        lambda: torch.nn.Parameter(whole.float()), lambda: -whole, lambda: draw.choice(ODD),
    ]  # fmt: skip
    try:
        return draw.choice(kinds)()
    except (RuntimeError, NotImplementedError):
        return torch.zeros(2)


@functools.cache
def _loaded(whole: Path) -> dict[str, Any]:
    """The undamaged checkpoint, read once per process."""
    import torch

    values: dict[str, Any] = torch.load(whole, weights_only=True)
    return values


def _write_checkpoint(draw: random.Random, prepared: Path, out: Path) -> None:
    import torch

    whole, target = prepared / "last.pt", out / "last.pt"
    if draw.random() < 0.15:
        target.write_bytes(mutate_bytes(draw, whole.read_bytes()))
        return
    values = copy.deepcopy(_loaded(whole))
    for _ in range(draw.choice([1, 1, 2])):
        part = draw.choice(["state", "optimizer", "all", "all"])
        if part == "state":
            key = draw.choice(list(values["state"]) if isinstance(values["state"], dict) else [0])
            if isinstance(values["state"], dict):
                values["state"][key] = _odd_tensor(draw, values["state"].get(key))
        elif part == "optimizer" and isinstance(values["optimizer"], dict):
            _damage_optimizer(draw, values["optimizer"])
        else:
            values = _damage_values(draw, values)
            break
    try:
        torch.save(values, target)
    except Exception:  # torch cannot save all that one can think of
        target.write_bytes(b"")


def _damage_optimizer(draw: random.Random, optimizer: dict[str, Any]) -> None:
    states, groups = optimizer.get("state"), optimizer.get("param_groups")
    kind = draw.randrange(3)
    if kind == 0 and isinstance(states, dict) and states:
        of = states[draw.choice(list(states))]
        key = draw.choice(["exp_avg", "exp_avg_sq", "step"])
        of[key] = _odd_tensor(draw, of.get(key))
    elif kind == 1 and isinstance(groups, list) and groups:
        group = draw.choice(groups)
        group[draw.choice(list(group))] = copy.deepcopy(draw.choice(ODD))
    else:
        optimizer[draw.choice(["state", "param_groups", "extra"])] = draw.choice(ODD)


def _damage_values(draw: random.Random, values: dict[str, Any]) -> dict[str, Any]:
    plain = {k: v for k, v in values.items() if k not in ("state", "optimizer")}
    changed = mutate_tree(draw, plain)
    if not isinstance(changed, dict) or draw.random() < 0.05:
        return changed
    return {**changed, **{k: values[k] for k in ("state", "optimizer") if draw.random() < 0.97}}


def _use_checkpoint(out: Path) -> str:
    from bitskip_export.pack import export_checkpoint
    from bitskip_train.checkpoint import load_checkpoint
    from bitskip_train.errors import TrainingError

    try:
        loaded = load_checkpoint(out / "last.pt")
    except ValueError:
        return "refused"
    used = "used"
    for use in (
        lambda: export_checkpoint(out / "last.pt", out / "model"),
        lambda: _resume(loaded, out),
    ):
        try:
            use()
        except (ValueError, TrainingError):
            used = "refused"
    return used


def _resume(loaded: Any, out: Path) -> None:
    """A step of training from there, as `train --resume` takes it."""
    from bitskip_train.data import Split
    from bitskip_train.settings import TrainConfig
    from bitskip_train.trainer import Trainer
    from bitskip_train.world import World

    settings = TrainConfig.from_dict(loaded.train)
    if settings.context > 64 or settings.batch > 8 or settings.accumulation > 8:
        return
    tokens = np.arange(300, dtype=np.uint16) % loaded.config.vocab_size
    split = Split(tokens, 300)
    trainer = Trainer(
        loaded.config,
        settings,
        split,
        None,
        loaded.tokenizer_json,
        out / "run",
        loaded,
        World(),
        accept_changes=True,
    )
    trainer.train_step()


TARGETS = {
    "folder": Target(_prepare_folders, _write_folder, _use_folder),
    "tokenizer": Target(_prepare_tokenizers, _write_tokenizer, _use_tokenizer),
    "checkpoint": Target(_prepare_checkpoints, _write_checkpoint, _use_checkpoint),
    "huggingface": Target(foreign.prepare_huggingface, foreign.write_huggingface_case, foreign.use),
    "gguf": Target(foreign.prepare_gguf, foreign.write_gguf_case, foreign.use),
}
