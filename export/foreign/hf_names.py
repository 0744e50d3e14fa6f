"""Names of tensors in Hugging Face's Llama-like models, and ours (FORMAT 3)."""

from __future__ import annotations

import re

# Ours, within a block or at the top -> theirs. One table for reading and writing.
BLOCK = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
}
TOP = {"embed_tokens": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
# 1bitLLM's class, which is not transformers' own, names the two sub-norms so.
OLDER = {
    "self_attn.inner_attn_ln": "attn_sub_norm",
    "mlp.ffn_layernorm": "ffn_sub_norm",
}
_OURS = {theirs: ours for ours, theirs in BLOCK.items()} | OLDER
_OURS_TOP = {theirs: ours for ours, theirs in TOP.items()}
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(.+)")


def theirs(name: str) -> str:
    """`layers.3.q_proj.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    *layer, part, leaf = name.split(".")
    if layer:
        return f"model.{'.'.join(layer)}.{BLOCK[part]}.{leaf}"
    return f"{TOP[part]}.{leaf}"


def ours(name: str) -> str | None:
    """Inverse of `theirs`, also for older spellings; None for a name that is not in the table."""
    stem, _, leaf = name.rpartition(".")
    if found := _LAYER.fullmatch(stem):
        part = _OURS.get(found[2])
        return f"layers.{found[1]}.{part}.{leaf}" if part else None
    part = _OURS_TOP.get(stem)
    return f"{part}.{leaf}" if part else None
