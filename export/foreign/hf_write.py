"""A model folder written as a Hugging Face folder that transformers loads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bitskip_export.foreign.convert import Progress
from bitskip_export.foreign.given import Given, at_exit
from bitskip_export.foreign.hf_config import OURS, write_config
from bitskip_export.foreign.hf_names import theirs
from bitskip_export.foreign.source import RefusedError, Report
from bitskip_export.foreign.words import with_first
from bitskip_export.pack import check_target
from bitskip_ref.documents import read_text
from bitskip_ref.files import replace_file, replace_folder
from bitskip_ref.floats import stored
from bitskip_ref.folder import CHAT, CONFIG, GENERATION, TOKENIZER, Folder, stored_sampling
from bitskip_ref.safetensors_file import write_tensors
from bitskip_ref.tensors import WEIGHTS, parameter_shapes
from bitskip_text.tokenizer import parse_tokenizer

PACKED = 4  # rows in a byte of transformers' 2-bit matrices
PARTS = ("*.safetensors", "*.json", "*.jinja", "README.md", CONFIG)  # of such a folder


def write_huggingface(
    folder: Folder,
    out: Path,
    *,
    exit_layer: int | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Write blocks 1..exit_layer (None: all) as LlamaForCausalLM or BitNetForCausalLM.

    The folder appears whole or not at all. Ternary weights and their scales are kept exactly,
    embedding and head become floats. Raises RefusedError, naming what transformers does not
    compute, before anything is written.
    """
    check_target(out, force, lambda config: isinstance(config.get(OURS), dict))
    model = at_exit(folder, exit_layer)
    end, begin = folder.eos_token_id, folder.bos_token_id
    config = write_config(model.config, eos=list(folder.end_ids), bos=begin)
    for name, (rows, _) in model.config.linear_shapes().items():
        if model.config.linear == "ternary" and rows % PACKED:
            raise RefusedError(f"{name} has {rows} rows: transformers packs {PACKED} to a byte")
    # What their configuration has no word for, so that importing gives the folder back.
    carried: dict[str, Any] = {"head_format": model.config.head_format}
    if exit_layer is None:
        carried |= {"exit_layer": folder.exit_layer, "draft_vocab": folder.draft_vocab}
    config[OURS] = {key: value for key, value in carried.items() if value is not None}
    text, words = "", dict[int, str]()
    if folder.tokenizer is not None:  # transformers puts there what this file says, nothing else
        place = str(folder.tokenizer)
        text = with_first(read_text(folder.tokenizer), place, begin)
        ids = parse_tokenizer(text, place, model.config.vocab_size).vocabulary()
        words = {i: word for word, i in ids.items()}
    with replace_folder(out, PARTS) as root:
        _write_weights(model, root / WEIGHTS, progress)
        if folder.tokenizer is not None:
            _write(root / TOKENIZER, text)
            _write_json(root / "tokenizer_config.json", {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "add_bos_token": begin is not None,
                "bos_token": None if begin is None else words.get(begin),
                "eos_token": None if end is None else words.get(end),
                "model_max_length": model.config.max_position_embeddings,
                "clean_up_tokenization_spaces": False,
            })  # fmt: skip
        _write_json(root / GENERATION, {
            "eos_token_id": list(folder.end_ids) if folder.more_eos_token_ids else end,
            "bos_token_id": begin, "do_sample": False, **stored_sampling(folder.sampling),
        })  # fmt: skip
        if folder.chat is not None:
            _write(root / CHAT, folder.chat.template)
        _write(root / "README.md", _card(model))
        _write_json(root / CONFIG, config)
    return model.report("")


def _write_weights(model: Given, path: Path, progress: Progress) -> None:
    """One safetensors file, some thousand rows at a time."""
    shapes: dict[str, tuple[type, tuple[int, ...]]] = {}  # by our names
    ternary = model.config.linear == "ternary"
    for name, shape in parameter_shapes(model.config).items():
        if ternary and name.endswith("_proj.weight"):
            shapes[name] = np.uint8, (shape[0] // PACKED, shape[1])
            shapes[f"{name}_scale"] = np.float32, (1,)
        else:
            # transformers leaves floats of a quantized model as the file has them, whatever dtype
            # is asked for, and then computes in 16 bits.
            shapes[name] = np.float32 if ternary else model.written_kind(name), shape
    named = {theirs(n.removesuffix("_scale")) + "_scale" * n.endswith("_scale"): s
             for n, s in shapes.items()}  # fmt: skip
    total = sum(np.dtype(kind).itemsize * math.prod(shape) for kind, shape in shapes.values())

    def pieces() -> Iterator[np.ndarray]:
        done = 0
        for name, (kind, _) in shapes.items():
            for piece in _pieces(model, name, kind):
                yield piece
                done += piece.nbytes
                progress(done, total)

    write_tensors(path, named, pieces(), "pt")


def _pieces(model: Given, name: str, kind: type) -> Iterable[np.ndarray]:
    if name.endswith("_scale"):
        return [np.array([model.alpha(name.removesuffix("_scale"))], np.float32)]
    if kind is np.uint8:
        return [pack_rows(model.codes(name))]
    return (stored(piece, kind) for piece in model.pieces(name))


def pack_rows(codes: np.ndarray) -> np.ndarray:
    """int8 [out, in] in -1..1 -> uint8 [out / 4, in]: rows r, r + R, ... of a byte (INTEROP)."""
    planes = (codes + 1).astype(np.uint8).reshape(PACKED, -1, codes.shape[1])
    return planes[0] | planes[1] << 2 | planes[2] << 4 | planes[3] << 6


def _card(model: Given) -> str:
    c = model.config
    kind = "ternary weights, 8-bit activations" if c.linear == "ternary" else "float32 weights"
    needs = " Loading it needs `accelerate`." if c.linear == "ternary" else ""
    cut = (
        f" These are the first {c.num_hidden_layers} of its "
        f"{model.folder.config.num_hidden_layers} blocks, with that exit's norm and head."
        if c.num_hidden_layers < model.folder.config.num_hidden_layers
        else ""
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [bitskip, {"bitnet, ternary, " if c.linear == "ternary" else ""}early-exit]
---
# A bitskip model

{c.num_hidden_layers} blocks of width {c.hidden_size}, {c.parameters():,} parameters, {kind}, a
context of {c.max_position_embeddings} tokens. Exported by bitskip.{cut}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
Use `dtype="float32"`: in bfloat16 about one activation code in twelve is another.{needs}

transformers sums in another order than bitskip and does not quantize the head's input, so
logits agree closely, not to the bit. `bitskip import PATH` gives bitskip's folder back.
"""


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    with replace_file(path) as file:
        file.write(text.encode("utf-8"))
