"""What a model folder holds: shapes, bits, sizes and ternary statistics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from bitskip.tables import size, table
from bitskip_ref.config import ModelConfig
from bitskip_ref.exits.named import describe_rule, named_rule, rule_label
from bitskip_ref.folder import CONFIG, Folder, read_folder
from bitskip_text.tokenizer import read_tokenizer

# Byte -> how many of its four codes are 0, 1, 2 (weights -1, 0, +1; FORMAT 1).
_CODES = (np.arange(256)[:, None] >> np.array([0, 2, 4, 6])) & 3
WEIGHT_BITS = {"ternary": 2, "int8": 8, "float32": 32}  # in a file, without padding
_COUNTS = np.stack([np.equal(_CODES, code).sum(1) for code in range(3)], 1)


def inspect(path: Path) -> dict[str, Any]:
    """What `bitskip-cpu inspect` prints. Raises FormatError for a folder that is not whole."""
    return facts_of(read_folder(path))


def facts_of(folder: Folder) -> dict[str, Any]:
    """What `inspect` says of a folder that was read.

    Keys: path, parameters, bits_per_weight (of linear layers, with the padding of rows),
    bits_per_weight_unpadded, bytes (per kind of tensor), layers (ternary statistics, one entry per
    block), exits, tokenizer, generation, config, weights_sha256.
    """
    config = folder.config
    sizes = sizes_by_kind(folder)
    linears = config.quantizable_parameters()
    tokenizer = read_tokenizer(folder.tokenizer, config.vocab_size) if folder.tokenizer else None
    stored = json.loads((folder.path / CONFIG).read_text("utf-8"))
    return {
        "path": str(folder.path),
        "parameters": config.parameters(),
        "linear_parameters": linears,
        "bits_per_weight": 8 * sizes["linear layers"] / linears,
        "bits_per_weight_unpadded": WEIGHT_BITS[config.linear],
        "bytes": sizes,
        "layers": [ternary_statistics(folder, i) for i in range(config.num_hidden_layers)]
        if config.linear == "ternary"
        else [],
        "exits": {
            "layers": config.num_hidden_layers,
            "gates": config.gates,
            "norm": config.exit_norm,
            "head": config.exit_head,
            "blocks": list(config.exit_blocks),
        },
        "tokenizer": {"tokens": tokenizer.size} if tokenizer else None,
        "generation": {
            "eos_token_id": list(folder.end_ids) or None,
            "chat": folder.chat is not None,
            "bos_token_id": folder.bos_token_id,
            "sampling": dict(folder.sampling),
            "exit_layer": folder.exit_layer,
            "auto_exit": describe_rule(folder.auto_exit, config) if folder.auto_exit else None,
        },
        "config": config.to_dict(),
        "weights_sha256": stored["weights_sha256"],
    }


def sizes_by_kind(folder: Folder) -> dict[str, int]:
    """Kind of tensor -> bytes in the file; `total` is the sum."""
    kinds = "linear layers", "biases", "embedding", "heads", "norms", "gates", "scales"
    sizes = dict.fromkeys(kinds, 0)
    for name, tensor in folder.tensors.items():
        sizes[_kind(name)] += tensor.nbytes
    return {**sizes, "total": sum(sizes.values())}


def _kind(name: str) -> str:
    if name.endswith(".scale"):
        return "scales"
    if name.endswith(".bias"):
        return "biases"
    if "_proj." in name:
        return "linear layers"
    if ".gate." in name:
        return "gates"
    if "norm." in name:
        return "norms"
    return "embedding" if name.startswith("embed") else "heads"


def ternary_statistics(folder: Folder, layer: int) -> dict[str, Any]:
    """Shares of -1, 0, +1 in a block's weights, their entropy in bits, and each matrix's alpha."""
    config = folder.config
    total = np.zeros(3, np.int64)
    alphas = {}
    for name, (rows, width) in config.linear_shapes().items():
        packed = folder.tensors[f"layers.{layer}.{name}.weight"]
        total += np.bincount(packed.reshape(-1), minlength=256) @ _COUNTS
        total[1] -= rows * (packed.shape[1] * 4 - width)  # padding, stored as zeros
        alphas[name] = float(folder.tensors[f"layers.{layer}.{name}.scale"][0])
    shares = total / total.sum()
    return {
        "layer": layer + 1,
        "minus": float(shares[0]),
        "zero": float(shares[1]),
        "plus": float(shares[2]),
        "entropy_bits": float(-sum(p * math.log2(p) for p in shares if p > 0)),
        "alpha": alphas,
    }


def bits(facts: dict[str, Any]) -> str:
    """Bits of a linear layer's weight in words: without padding, and with it where there is any."""
    unpadded, stored = facts["bits_per_weight_unpadded"], facts["bits_per_weight"]
    return f"{unpadded} bits" + (f" ({stored:.3f} with rows padded)" if stored > unpadded else "")


def describe(facts: dict[str, Any]) -> str:
    """The facts of `inspect` as text."""
    config, generation = facts["config"], facts["generation"]
    tokens = facts["tokenizer"]
    exits = facts["exits"]
    recommended = generation["exit_layer"] or exits["layers"]
    auto = "not calibrated"
    if generation["auto_exit"]:
        shape = ModelConfig.from_dict(config)
        auto = rule_label(named_rule(**generation["auto_exit"], config=shape), shape)
    lines = [
        facts["path"],
        f"{facts['parameters']:,} parameters, {facts['linear_parameters']:,} of them in linear "
        f"layers at {bits(facts)}",
        f"{config['num_hidden_layers']} blocks, hidden {config['hidden_size']}, "
        f"{config['num_attention_heads']} heads x {config['head_dim']} "
        f"({config['num_key_value_heads']} for keys and values), FFN "
        f"{config['intermediate_size']} {config['ffn']}, vocabulary {config['vocab_size']}, "
        f"context {config['max_position_embeddings']}",
        f"{config['norm_position']}-norm ({config['norm']}), {config['linear']} linears, "
        f"{config['activation_bits']}-bit activations, "
        f"{'Hadamard' if config['hadamard'] else 'no Hadamard'}, {config['head_format']} head",
        f"exits 1..{exits['layers']}, recommended {recommended}, auto: {auto}",
        f"exit norms {exits['norm']}, heads "
        f"{exits['head']}, {'with' if exits['gates'] else 'no'} gates, blocks of their own: "
        f"{', '.join(map(str, exits['blocks'])) or 'none'}",
        f"tokenizer: {tokens['tokens']} tokens" if tokens else "no tokenizer",
        f"end-of-text {', '.join(map(str, generation['eos_token_id'] or ['none']))}, "
        f"begin {generation['bos_token_id']}, {'a' if generation['chat'] else 'no'} chat template",
        "recommended sampling: "
        + (", ".join(f"{n} {v:g}" for n, v in generation["sampling"].items()) or "greedy"),
        f"weights sha256 {facts['weights_sha256']}",
        "",
        table(("kind", "size"), [(kind, size(n)) for kind, n in facts["bytes"].items()]),
    ]
    if facts["layers"]:
        rows = [
            (
                block["layer"],
                *(f"{block[k]:.1%}" for k in ("minus", "zero", "plus")),
                f"{block['entropy_bits']:.3f}",
                f"{min(block['alpha'].values()):.4g}",
                f"{max(block['alpha'].values()):.4g}",
            )
            for block in facts["layers"]
        ]
        header = ("block", "-1", "0", "+1", "entropy (bits)", "least alpha", "largest alpha")
        lines += ["", table(header, rows)]
    return "\n".join(lines)
