"""The model folder (FORMAT): reading with every check, writing whole or not at all.

The safetensors header is read and written here, and not by its library, because the data must
start at a multiple of 64 bytes, keep its order, and be mapped without a copy.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitskip_ref.config import HEAD_BITS, ConfigError, ModelConfig
from bitskip_ref.engine import ExitRule
from bitskip_ref.exits.named import describe_rule, named_rule
from bitskip_ref.files import replace_file
from bitskip_ref.packing import IllegalCodeError, check_codes, packed_width

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"
DTYPES = {"U8": np.uint8, "I8": np.int8, "F32": np.float32, "F16": np.float16}
DTYPE_NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}
HEAD_DTYPES = {**dict.fromkeys(HEAD_BITS, np.int8), "float32": np.float32, "float16": np.float16}
ALIGNMENT = 64
LARGEST_HEADER = 100 << 20  # as the safetensors library


class FormatError(ValueError):
    """A model folder that breaks FORMAT; the message names the file and the rule."""


@dataclass(frozen=True)
class Folder:
    """A model as read. Arrays are read-only views of the mapped file."""

    path: Path
    config: ModelConfig
    tensors: dict[str, np.ndarray]
    tokenizer: Path | None
    eos_token_id: int | None = None
    bos_token_id: int | None = None
    exit_layer: int | None = None  # where it stops unless told otherwise; None: at full depth
    draft_vocab: int | None = None  # speculation drafts among so many first ids; None: all
    auto_exit: ExitRule | None = None  # what `--exit-layer auto` means; None: not calibrated


def expected_tensors(config: ModelConfig) -> dict[str, tuple[type, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor, in file order (FORMAT 3)."""
    ternary = config.linear == "ternary"
    blocks = range(config.num_hidden_layers)
    table: dict[str, tuple[type, tuple[int, ...]]] = {}
    for i in blocks:
        for name, (rows, width) in config.linear_shapes().items():
            table[f"layers.{i}.{name}.weight"] = (
                (np.uint8, (rows, packed_width(width))) if ternary else (np.float32, (rows, width))
            )
    heads = ["embed_tokens"] + ([] if config.tie_word_embeddings else ["lm_head"])
    exits = range(1, config.num_hidden_layers)
    if config.exit_head == "per_layer":
        heads += [f"exits.{n}.head" for n in exits]
    for name in heads:
        shape = (config.vocab_size, config.hidden_size)
        table[f"{name}.weight"] = (HEAD_DTYPES[config.head_format], shape)
    if ternary:
        for i in blocks:
            for name in config.linear_shapes():
                table[f"layers.{i}.{name}.scale"] = (np.float32, (1,))
    if config.head_format in HEAD_BITS:
        for name in heads:
            table[f"{name}.scale"] = (np.float32, (config.vocab_size,))

    def norm(name: str, width: int, biased: bool = config.norm == "layer") -> None:
        table[f"{name}.weight"] = (np.float32, (width,))
        if biased:
            table[f"{name}.bias"] = (np.float32, (width,))

    if config.embedding_norm:
        norm("embedding_norm", config.hidden_size)
    for i in blocks:
        for name, width in config.norm_shapes().items():
            norm(f"layers.{i}.{name}", width)
        if config.gates:
            norm(f"layers.{i}.gate.norm", config.hidden_size, biased=True)
            inner = (config.gate_width, config.hidden_size)
            table[f"layers.{i}.gate.fc1.weight"] = (np.float32, inner)
            table[f"layers.{i}.gate.fc2.weight"] = (np.float32, (1, config.gate_width))
    if config.exit_norm == "per_layer":
        for n in exits:
            norm(f"exits.{n}.norm", config.hidden_size)
    norm("final_norm", config.hidden_size)
    return table


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the full-precision parameters that training holds: no scales, no packing."""
    shapes = {name: s for name, (_, s) in expected_tensors(config).items() if ".scale" not in name}
    for i in range(config.num_hidden_layers):
        for name, shape in config.linear_shapes().items():
            shapes[f"layers.{i}.{name}.weight"] = shape
    return shapes


def check_tensors(
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    checked: Callable[[np.ndarray], None] = lambda _: None,
) -> None:
    """Raise FormatError unless names, dtypes, shapes and values are those of the config.

    checked: called with each tensor whose values are right.
    """
    expected = expected_tensors(config)
    for problem, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has an unknown", tensors.keys() - expected.keys()),
    ):
        if names:
            raise FormatError(f"{WEIGHTS} {problem} tensor {min(names)!r} ({len(names)} in all)")
    for name, (kind, shape) in expected.items():
        t = tensors[name]
        if t.dtype != kind or t.shape != shape:
            raise FormatError(
                f"{WEIGHTS}: {name} is {t.dtype}{list(t.shape)}, "
                f"the config asks for {np.dtype(kind)}{list(shape)}"
            )
        if kind is np.uint8:
            try:
                check_codes(t)
            except IllegalCodeError as error:
                raise FormatError(f"{WEIGHTS}: {name}: {error}") from None
        elif kind is np.int8:
            largest = 2 ** (HEAD_BITS[config.head_format] - 1) - 1
            if t.size and (t.min() < -largest or t.max() > largest):
                worst = t.min() if t.min() < -largest else t.max()
                raise FormatError(
                    f"{WEIGHTS}: {name} holds the illegal {config.head_format} code {worst}: "
                    f"codes lie in -{largest}..{largest}"
                )
        elif not np.isfinite(t).all():
            raise FormatError(f"{WEIGHTS}: {name} holds a value that is not finite")
        checked(t)


# ---- reading ------------------------------------------------------------------------


def read_folder(path: str | os.PathLike[str]) -> Folder:
    """Map a model folder. Raises FormatError (or its sub-case in the message) for any fault."""
    root = Path(path)
    if not root.is_dir():
        raise FormatError(f"no model folder at {root}")
    stored = _read_json(root / CONFIG)
    if stored.pop("model_type", None) != "bitskip" or stored.pop("bitskip_format", None) != FORMAT:
        raise FormatError(f"{root / CONFIG}: not a bitskip model of format {FORMAT}")
    stored.pop("architectures", None)
    digest = stored.pop("weights_sha256", None)
    try:
        config = ModelConfig.from_dict(stored)
    except ConfigError as error:
        raise FormatError(f"{root / CONFIG}: {error}") from None
    weights = root / WEIGHTS
    if not weights.is_file():
        raise FormatError(f"{root} lacks {WEIGHTS}")
    tensors = read_tensors(weights)
    # Values and checksum each take a core for a while: side by side.
    problems: list[BaseException] = []

    def check() -> None:
        try:
            check_tensors(config, tensors, give_back)
        except BaseException as error:
            problems.append(error)

    checking = threading.Thread(target=check)
    checking.start()
    with open(weights, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    checking.join()
    if found != digest:
        raise FormatError(
            f"{weights} does not match the checksum in {CONFIG}: the file is damaged or was "
            "exchanged; copy or export it again"
        )
    if problems:
        raise problems[0]
    extra = _read_json(root / GENERATION) if (root / GENERATION).exists() else {}
    numbers = {}
    for name, limit in (
        ("eos_token_id", config.vocab_size - 1),
        ("bos_token_id", config.vocab_size - 1),
        ("exit_layer", config.num_hidden_layers),
        ("draft_vocab", config.vocab_size),
    ):
        value = extra.get(name)
        if value is not None and (type(value) is not int or not 0 <= value <= limit):
            raise FormatError(f"{root / GENERATION}: {name} = {value!r} is not in 0..{limit}")
        numbers[name] = value
    auto_exit = _auto_exit(root / GENERATION, extra, config)
    tokenizer = root / TOKENIZER
    return Folder(
        root, config, tensors, tokenizer if tokenizer.is_file() else None,
        **numbers, auto_exit=auto_exit,
    )  # fmt: skip


def give_back(array: np.ndarray) -> None:
    """Let the system take back the memory of a mapped file's part; it is mapped anew when read."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, mmap.mmap) or not hasattr(base, "madvise"):
        return
    offset = array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (offset + array.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0:
        base.madvise(mmap.MADV_DONTNEED, start, size)


def _auto_exit(path: Path, extra: dict[str, Any], config: ModelConfig) -> ExitRule | None:
    stored = extra.get("auto_exit")
    if stored is None:
        return None
    try:
        return named_rule(
            stored["exit_layer"], stored["threshold"], stored["looks"], stored["last"], config
        )
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(
            f"{path}: auto_exit is not a setting of this model ({error!r}): calibrate again, or "
            "remove it"
        ) from None


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Map a safetensors file. Raises FormatError if header, offsets or length are off."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, LARGEST_HEADER):
            raise FormatError(f"{path}: truncated, the header does not fit the file")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = [(n, e["dtype"], e["shape"], e["data_offsets"]) for n, e in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise FormatError(f"{path}: the header is not that of a safetensors file") from None
    mapped = np.memmap(path, np.uint8, mode="r")
    data = mapped[8 + length :]
    tensors, end = {}, 0
    for name, dtype, shape, offsets in entries:
        if dtype not in DTYPES:
            raise FormatError(f"{path}: {name} has dtype {dtype}, known: {', '.join(DTYPES)}")
        natural = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
        count = np.dtype(DTYPES[dtype]).itemsize
        for n in shape if natural else []:
            count *= n
        if not natural or offsets != [end, end + count] or end + count > data.size:
            raise FormatError(f"{path}: {name} does not lie where the header says, or is cut off")
        raw_tensor = data[end : end + count]
        if (8 + length + end) % np.dtype(DTYPES[dtype]).itemsize:
            raw_tensor = raw_tensor.copy()  # a view would be unaligned
        tensors[name] = raw_tensor.view(DTYPES[dtype]).reshape(shape)
        end += count
    if end != data.size:
        raise FormatError(f"{path}: {data.size - end} bytes after the last tensor")
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path.parent} lacks {path.name}: not a model folder") from None
    except (ValueError, OSError) as error:
        raise FormatError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: must hold a JSON object")
    return value


# ---- writing ------------------------------------------------------------------------


def write_folder(
    path: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    tokenizer_json: str | None = None,
    eos_token_id: int | None = None,
    bos_token_id: int | None = None,
    exit_layer: int | None = None,
    draft_vocab: int | None = None,
) -> None:
    """Write a model folder; each file appears whole or not at all, config.json last.

    Raises FormatError before anything is written if the tensors are not those of the config.
    """
    check_tensors(config, tensors)
    root = Path(path)
    root.mkdir(parents=True, exist_ok=True)
    ordered = {name: tensors[name] for name in expected_tensors(config)}
    digest = write_tensors(root / WEIGHTS, ordered)
    if tokenizer_json is not None:
        _write_text(root / TOKENIZER, tokenizer_json)
    generation = {
        "eos_token_id": eos_token_id,
        "bos_token_id": bos_token_id,
        "exit_layer": exit_layer,
        "draft_vocab": draft_vocab,
    }
    _write_text(root / GENERATION, json.dumps(generation, indent=2) + "\n")
    stored = {
        "model_type": "bitskip",
        "architectures": ["BitskipForCausalLM"],
        "bitskip_format": FORMAT,
        **config.to_dict(),
        "weights_sha256": digest,
    }
    _write_text(root / CONFIG, json.dumps(stored, indent=2) + "\n")


def write_auto_exit(folder: Folder, rule: ExitRule, found: Mapping[str, Any]) -> None:
    """Make `rule` what `--exit-layer auto` means for a model folder; nothing else changes.

    found: JSON values that say how it was found; they are kept with the setting.
    """
    path = folder.path / GENERATION
    generation = _read_json(path) if path.exists() else {}
    generation["auto_exit"] = {**describe_rule(rule, folder.config), **found}
    _write_text(path, json.dumps(generation, indent=2) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> str:
    """Write a safetensors file whose data starts at a multiple of 64. Returns its SHA-256."""
    header: dict[str, Any] = {"__metadata__": {"format": "bitskip"}}
    end = 0
    for name, t in tensors.items():
        header[name] = {
            "dtype": DTYPE_NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [end, end + t.nbytes],
        }
        end += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    digest = hashlib.sha256()

    with replace_file(path) as file:
        for part in (struct.pack("<Q", len(text)), text, *tensors.values()):
            raw = part if isinstance(part, bytes) else np.ascontiguousarray(part).data.cast("B")
            digest.update(raw)
            file.write(raw)
    return digest.hexdigest()


def _write_text(path: Path, text: str) -> None:
    with replace_file(path) as file:
        file.write(text.encode("utf-8"))
