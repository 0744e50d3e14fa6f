"""Models of other programs, damaged: Hugging Face folders and GGUF files, imported and run."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

from bitskip_ref import folder as fd
from tests.fuzz.mutations import (
    ODD,
    dumped,
    mutate_bytes,
    mutate_safetensors,
    mutate_tree,
    put_odd_file,
)
from tests.helpers import random_tensors, twin
from tests.text.tokenizers_of_all_kinds import KINDS

MODELS: dict[str, dict[str, Any]] = {  # of theirs, what each is made from
    "ternary": {},
    "float": {"linear": "float32", "head_format": "float32", "rope_scaling": "linear",
              "rope_factor": 2.0},
    "biases": {"linear": "float32", "head_format": "float32", "biases": "qkv"},
    "bfloat16": {"linear": "float32", "head_format": "bfloat16"},
    "head norms": {"linear": "float32", "head_format": "float32", "qk_norm": True},
    "sub norms": {"sub_norm": True, "tie_word_embeddings": True},
}  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
HF_CONFIG, SHARDS = "config.json", "model.safetensors.index.json"


def _prepare(root: Path) -> None:
    """A folder of ours for each of MODELS."""
    from bitskip_cpu.compiling import warmup

    warmup()
    words = KINDS["byte-level"]().to_str()
    for name, changes in MODELS.items():
        config = twin("bitskip-v1").replace(
            vocab_size=400, hidden_size=64, num_attention_heads=4, head_dim=16,
            num_key_value_heads=2, intermediate_size=128, num_hidden_layers=2, **changes,
        )  # fmt: skip
        fd.write_folder(
            root / "ours" / name, config, random_tensors(config), eos_token_id=[0, 5],
            bos_token_id=1, tokenizer_json=words, chat=fd.ChatForm(TEMPLATE),
        )  # fmt: skip


def prepare_huggingface(root: Path) -> None:
    """The folders that we export, one of them in two files, and one in bfloat16."""
    from bitskip_export.foreign.hf_write import write_huggingface

    _prepare(root)
    for name in MODELS:
        write_huggingface(fd.read_folder(root / "ours" / name), root / name)
    shutil.copytree(root / "float", root / "shards")
    raw = (root / "float" / "model.safetensors").read_bytes()
    (root / "shards" / "model.safetensors").unlink()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    places = {}
    for part in (0, 1):
        file, kept, body = f"model-{part}.safetensors", dict[str, Any](), b""
        for i, (name, entry) in enumerate(header.items()):
            if i % 2 == part:
                values = data[slice(*entry["data_offsets"])]
                kind = "BF16" if part else entry["dtype"]
                if part:
                    values = (np.frombuffer(values, np.uint32) >> 16).astype(np.uint16).tobytes()
                kept[name] = {"dtype": kind, "shape": entry["shape"],
                              "data_offsets": [len(body), len(body) + len(values)]}  # fmt: skip
                body, places[name] = body + values, file
        text = json.dumps(kept).encode()
        (root / "shards" / file).write_bytes(struct.pack("<Q", len(text)) + text + body)
    (root / "shards" / SHARDS).write_text(json.dumps({"weight_map": places}))


def write_huggingface_case(draw: random.Random, prepared: Path, out: Path) -> None:
    """One of the folders with one or two of its files changed."""
    for path in (prepared / draw.choice([*MODELS, "shards"])).iterdir():
        shutil.copyfile(path, out / path.name)
    for _ in range(draw.choice([1, 1, 1, 2])):
        path = draw.choice(sorted(out.iterdir()))
        kind = draw.randrange(12)
        if kind == 0:
            if path.is_dir() and not path.is_symlink():  # it was replaced before
                path.rmdir()
            path.unlink(missing_ok=True)
            put_odd_file(draw, path)
        elif not path.is_file():
            continue
        elif path.suffix == ".safetensors":
            path.write_bytes(mutate_safetensors(draw, path.read_bytes()))
        elif kind == 1 or path.suffix != ".json":
            path.write_bytes(mutate_bytes(draw, path.read_bytes()))
        else:
            try:
                tree = json.loads(path.read_bytes())
            except (ValueError, RecursionError):
                continue
            path.write_bytes(dumped(draw, mutate_tree(draw, tree)))


# ---- GGUF -----------------------------------------------------------------------------

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
           12: "d"}  # fmt: skip
STRING, ARRAY = 8, 9
QUANTIZED = ("Q8_0", "Q4_0", "Q4_1")


def prepare_gguf(root: Path) -> None:
    """The files that we export, and the float one with weights in ggml's blocks."""
    from bitskip_export.foreign import gguf_write

    _prepare(root)
    for name in MODELS:
        gguf_write.write_gguf(fd.read_folder(root / "ours" / name), root / f"{name}.gguf")
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    original = gguf_write._entries
    for word in QUANTIZED:
        kind = GGMLQuantizationType[word]

        def entries(model: Any, architecture: str, kind: Any = kind) -> Any:
            for name, entry in original(model, architecture):
                if "blk." in name and len(entry.shape) == 2:
                    values = np.concatenate([*entry.pieces]).reshape(entry.shape)
                    raw = quantize(values.astype(np.float32), kind)
                    entry = gguf_write.Entry(kind.value, entry.shape, raw.nbytes, [raw])
                yield name, entry

        gguf_write._entries, gguf_write.FILE_TYPES[kind.value] = entries, 0
        folder = fd.read_folder(root / "ours" / "float")
        gguf_write.write_gguf(folder, root / f"{word}.gguf")
    gguf_write._entries = original
    raw = (root / "float.gguf").read_bytes()
    tree, data = parsed(raw)
    assert serialized(tree) + data == raw  # or damage would begin with the container's


def parsed(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """A file as (its head as a JSON tree, its data)."""
    at = 4

    def take(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", raw, at)
        at += struct.calcsize(f"<{form}")
        return value

    def text() -> str:
        nonlocal at
        size = take("Q")
        at += size
        return raw[at - size : at].decode()

    def value(kind: int) -> Any:
        if kind == STRING:
            return text()
        if kind == ARRAY:
            inner, count = take("I"), take("Q")
            return [inner, count, [value(inner) for _ in range(count)]]
        return take(NUMBERS[kind])

    tree: dict[str, Any] = {"version": take("I"), "tensors": take("Q"), "keys": take("Q")}
    tree["metadata"] = [
        [text(), kind := take("I"), value(kind)] for _ in range(tree["keys"])
    ]  # fmt: skip
    tree["table"] = [
        [text(), [take("Q") for _ in range(take("I"))], take("I"), take("Q")]
        for _ in range(tree["tensors"])
    ]  # fmt: skip
    start = -(-at // 32) * 32
    return tree, raw[start:]


def serialized(tree: Any) -> bytes:
    """A head, however little sense it makes; numbers that do not fit are cut, the rest is left."""

    def number(form: str, value: Any) -> bytes:
        if form in "fd":
            try:
                return struct.pack(f"<{form}", float(value))
            except (TypeError, ValueError, OverflowError):
                return bytes(struct.calcsize(form))
        size = struct.calcsize(f"<{form}")
        try:
            return (int(value) % (1 << 8 * size)).to_bytes(size, "little")
        except (TypeError, ValueError, OverflowError):
            return bytes(size)

    def text(value: Any) -> bytes:
        raw = str(value).encode("utf-8", "surrogatepass")
        return number("Q", len(raw)) + raw

    def typed(kind: Any, value: Any) -> bytes:
        if kind == STRING:
            return text(value)
        if kind == ARRAY and isinstance(value, list) and len(value) == 3:
            inner, count, items = value
            items = items if isinstance(items, list) else [items]
            whole = b"".join(typed(inner, item) for item in items)
            return number("I", inner) + number("Q", count) + whole
        return number(NUMBERS.get(kind, "I") if isinstance(kind, int) else "I", value)

    def listed(value: Any, size: int) -> list[Any]:
        return value if isinstance(value, list) and len(value) == size else [value] * size

    def entries(name: str) -> list[Any]:
        return tree[name] if isinstance(tree.get(name), list) else []

    tree = tree if isinstance(tree, dict) else {"version": tree}
    out = b"GGUF" + number("I", tree.get("version"))
    out += number("Q", tree.get("tensors")) + number("Q", tree.get("keys"))
    for entry in entries("metadata"):
        key, kind, value = listed(entry, 3)
        out += text(key) + number("I", kind) + typed(kind, value)
    for entry in entries("table"):
        name, axes, kind, offset = listed(entry, 4)
        axes = axes if isinstance(axes, list) else [axes]
        out += text(name) + number("I", len(axes)) + b"".join(number("Q", n) for n in axes)
        out += number("I", kind) + number("Q", offset)
    return out.ljust(-(-len(out) // 32) * 32, b"\0")


def write_gguf_case(draw: random.Random, prepared: Path, out: Path) -> None:
    """One of the files, its head changed as a tree, its head's bytes, or its data."""
    raw = draw.choice(sorted(prepared.glob("*.gguf"))).read_bytes()
    tree, data = parsed(raw)
    kind = draw.randrange(10)
    if kind < 6:
        part = draw.choice(["metadata", "metadata", "table", None])
        if part is None:
            tree = mutate_tree(draw, tree)
        else:
            changed = mutate_tree(draw, tree[part])
            tree[part] = changed if isinstance(changed, list) else [changed]
            tree["keys"], tree["tensors"] = len(tree["metadata"]), len(tree["table"])
        if draw.random() < 0.1 and isinstance(tree, dict):
            tree[draw.choice(["keys", "tensors"])] = draw.choice(ODD)
        raw = serialized(tree) + data
    elif kind < 9:
        head = len(raw) - len(data)
        raw = mutate_bytes(draw, raw[:head]) + data
    else:
        raw = raw[: len(raw) - len(data)] + mutate_bytes(draw, data)
    (out / "model.gguf").write_bytes(raw)


def use(out: Path) -> str:
    """Import what lies there, and run it."""
    from bitskip_cpu.engine import Engine
    from bitskip_cpu.model import Model
    from bitskip_export.foreign.convert import import_model, usual
    from bitskip_export.foreign.opened import open_source

    place = out / "model.gguf" if (out / "model.gguf").exists() else out
    try:
        source = open_source(place)
        import_model(source, out / "made", linear=usual(source))
    except ValueError as error:
        assert len(str(error).splitlines()) == 1, error
        return "refused"
    folder = fd.read_folder(out / "made")  # what was written must be whole
    if folder.config.max_position_embeddings > 1 << 12:
        return "used"  # its caches are as large as it says
    model = Model(Engine(folder.config, folder.tensors, 1), folder)
    try:
        model.extend([0, folder.config.vocab_size - 1], model.new_cache())
        if folder.tokenizer is not None:
            model.generate("the cat <s>", max_tokens=3)
    except ValueError:
        return "refused"
    return "used"
