"""`config.json` of Hugging Face's Llama-like models to and from ModelConfig (SPEC 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bitskip_export.foreign.source import RefusedError
from bitskip_ref.config import CHOICES, ConfigError, ModelConfig
from bitskip_ref.excerpt import shown

OURS = "bitskip"  # the key under which a folder that we wrote carries what theirs has no word for
ACTIVATIONS = {"silu": "swiglu", "relu2": "gated_relu2"}  # hidden_act -> ffn
# What stands for a float32 of 1e-6, say, in models whose configuration leaves a field out:
# transformers' own defaults of each class.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0},
    "bitnet": {"hidden_act": "relu2", "rms_norm_eps": 1e-5, "rope_theta": 500_000.0},
    "qwen2": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0},
    "qwen3": {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "head_dim": 128,
    },
}
CLASSES = {
    "llama": "LlamaForCausalLM", "bitnet": "BitNetForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip
# RoPE scaling by name -> its fields, theirs to ours (SPEC 6.6).
ROPE = {
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor", "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
        "original_max_position_embeddings": "rope_original_context",
    },
    "yarn": {
        "factor": "rope_factor", "original_max_position_embeddings": "rope_original_context",
        "beta_fast": "rope_beta_fast", "beta_slow": "rope_beta_slow",
        "attention_factor": "rope_attention_factor",
    },
}  # fmt: skip
BIAS_SCALE = "transformers multiplies them by the weights' scale, too"
REMEDY = "bitskip cannot run it as it was meant"


@dataclass(frozen=True)
class Quantization:
    """How a folder's linear weights are ternary."""

    inverse_scale: bool  # `weight_scale` divides (BitLinear) or multiplies (AutoBitLinear)


def read_config(raw: dict[str, Any], sub_norm: bool) -> tuple[ModelConfig, Quantization | None]:
    """The configuration and, for ternary models, what their scales mean.

    sub_norm: whether the files hold the norms before o_proj and down_proj; the configuration has no
    word for it. Raises RefusedError, naming what a model needs and bitskip lacks.
    """
    try:
        return _read(raw, sub_norm)
    except KeyError as error:
        raise RefusedError(f"config.json lacks {error.args[0]}") from None
    except RefusedError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = str(error) if isinstance(error, ConfigError) else "a field has a wrong type"
        raise RefusedError(f"config.json: {reason}") from None


def _read(raw: dict[str, Any], sub_norm: bool) -> tuple[ModelConfig, Quantization | None]:
    """`read_config`, but for errors of values that have other types than they should."""
    kind = raw.get("model_type")
    if kind not in DEFAULTS:
        raise RefusedError(f"model_type {shown(kind)} is none of {', '.join(DEFAULTS)}: {REMEDY}")
    values = {**DEFAULTS[kind], **{k: v for k, v in raw.items() if v is not None}}
    _refuse_unknown_features(values)
    act = values["hidden_act"]
    if act not in ACTIVATIONS:
        raise RefusedError(f"hidden_act {shown(act)} is none of {', '.join(ACTIVATIONS)}: {REMEDY}")
    quantization = _quantization(raw)
    heads, width = values["num_attention_heads"], values["hidden_size"]
    config = ModelConfig(
        vocab_size=values["vocab_size"],
        hidden_size=width,
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=values.get("num_key_value_heads", heads),
        head_dim=values.get("head_dim") or width // heads,
        intermediate_size=values["intermediate_size"],
        max_position_embeddings=values.get("max_position_embeddings", 2048),
        linear="ternary" if quantization else "float32",
        ffn=ACTIVATIONS[act],
        norm_eps=values["rms_norm_eps"],
        biases=_biases(kind, values),
        qk_norm=kind == "qwen3",
        sub_norm=sub_norm,
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        head_format=_head_format(raw, ternary=quantization is not None),
        **_rope(values),
    )
    if quantization and config.biases != "none":
        raise RefusedError(f"biases beside ternary weights: {BIAS_SCALE}: {REMEDY}")
    return config, quantization


def _head_format(raw: dict[str, Any], ternary: bool) -> str:
    kept = raw.get(OURS)
    if isinstance(kept, dict) and kept.get("head_format") in CHOICES["head_format"]:
        return str(kept["head_format"])
    return "int8" if ternary else "float32"


def _refuse_unknown_features(values: dict[str, Any]) -> None:
    """Raise RefusedError for fields that change the arithmetic in a way SPEC has no rule for."""
    for field, what in (
        ("mlp_bias", "biases in the FFN"),
        ("use_sliding_window", "sliding-window attention"),
        ("use_qk_norm", "norms of queries and keys, which its class does not have"),
    ):
        if values.get(field):
            raise RefusedError(f"{field}: the model needs {what}: {REMEDY}")
    if set(map(str, values.get("layer_types") or ())) - {"full_attention"}:
        raise RefusedError(f"layer_types: the model needs other than full attention: {REMEDY}")
    if values.get("pretraining_tp", 1) != 1:
        raise RefusedError("pretraining_tp: the model needs sums cut into slices")


def _biases(kind: str, values: dict[str, Any]) -> str:
    """Which of a block's linear layers have one: Qwen2 has no word for its own."""
    return "qkv" if kind == "qwen2" else "qkvo" if values.get("attention_bias") else "none"


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """RoPE's fields, from rope_theta and rope_scaling or from the newer rope_parameters."""
    older, newer = values.get("rope_scaling", {}), values.get("rope_parameters", {})
    for field, stored in (("rope_scaling", older), ("rope_parameters", newer)):
        if not isinstance(stored, dict):
            raise RefusedError(f"config.json: {field} is no object")
        if any(isinstance(value, dict) for value in stored.values()):
            raise RefusedError(f"{field} differs from layer to layer: {REMEDY}")
    if odd := [key for key in older.keys() & newer.keys() if older[key] != newer[key]]:
        raise RefusedError(f"config.json: rope_scaling and rope_parameters differ in {min(odd)}")
    rope = {"rope_theta": values["rope_theta"], **older, **newer}
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise RefusedError(f"RoPE over a part of each head ({shown(partial)}): {REMEDY}")
    found = {"rope_theta": rope["rope_theta"]}
    if kind == "default":
        return found
    if kind not in ROPE:
        raise RefusedError(f"RoPE scaling of type {shown(kind)}: {REMEDY}")
    if kind == "yarn":
        return found | {"rope_scaling": "yarn"} | _yarn(rope)
    if missing := ROPE[kind].keys() - rope.keys():
        raise RefusedError(f"config.json: RoPE scaling {kind} lacks {min(missing)}")
    return found | {"rope_scaling": kind} | {our: rope[key] for key, our in ROPE[kind].items()}


def _yarn(rope: dict[str, Any]) -> dict[str, Any]:
    """YaRN's fields; what is left out is as transformers has it."""
    fields = ROPE["yarn"]
    if missing := {"factor", "original_max_position_embeddings"} - rope.keys():
        raise RefusedError(f"config.json: RoPE scaling yarn lacks {min(missing)}")
    if rope.get("truncate", True) is not True or rope.get("mscale") or rope.get("mscale_all_dim"):
        raise RefusedError(f"RoPE scaling yarn with truncate or mscale: {REMEDY}")
    values = {"beta_fast": 32.0, "beta_slow": 1.0}
    values |= {k: v for k, v in rope.items() if k in fields and v is not None}
    if "attention_factor" not in values:
        values["attention_factor"] = 0.1 * math.log(values["factor"]) + 1.0
    return {fields[key]: value for key, value in values.items()}


def _quantization(raw: dict[str, Any]) -> Quantization | None:
    stored = raw.get("quantization_config")
    if stored is None:
        # 1bitLLM's class has fields of its own instead, and masters that it quantizes when it runs.
        older = "BitnetForCausalLM" in (raw.get("architectures") or [])
        if older and (raw.get("weight_bits", 1), raw.get("input_bits", 8)) != (1, 8):
            raise RefusedError(
                f"weight_bits {raw.get('weight_bits')} and input_bits {raw.get('input_bits')}: "
                "only 1 and 8 are known"
            )
        return Quantization(inverse_scale=True) if older else None
    if not isinstance(stored, dict) or stored.get("quant_method") != "bitnet":
        method = stored.get("quant_method") if isinstance(stored, dict) else stored
        raise RefusedError(
            f"weights quantized by {shown(method)}: only 'bitnet' is known: {REMEDY}"
        )
    if stored.get("use_rms_norm"):
        raise RefusedError(f"use_rms_norm: the model needs a norm inside each linear: {REMEDY}")
    others = set(stored.get("modules_to_not_convert") or ()) - {"lm_head", "embed_tokens"}
    if others:
        raise RefusedError(
            f"modules_to_not_convert: {min(map(str, others))} is float beside ternary linears: "
            f"{REMEDY}"
        )
    meaning = stored.get("linear_class") or "bitlinear"
    if meaning not in ("bitlinear", "autobitlinear"):
        raise RefusedError(
            f"linear_class {shown(meaning)}: the meaning of its weight_scale is unknown"
        )
    return Quantization(inverse_scale=meaning == "bitlinear")


def write_config(config: ModelConfig, *, eos: list[int], bos: int | None) -> dict[str, Any]:
    """The fields of `config.json` with which transformers builds the same model.

    Raises RefusedError for what none of its classes computes.
    """
    for wrong, what in (
        (config.norm != "rms", f"norm = {config.norm!r}: layer norms"),
        (config.norm_position != "pre", "norm_position = 'post': norms after each block's parts"),
        (config.hadamard, "hadamard: a rotation before each linear"),
        (config.embedding_norm, "embedding_norm: a norm after the embedding"),
        (not config.gated, f"ffn = {config.ffn!r}: an FFN without a gate"),
        (
            config.linear == "ternary" and config.activation_bits != 8,
            f"activation_bits = {config.activation_bits}: activations of other than 8 bits",
        ),
        (
            config.linear == "ternary" and config.biases != "none",
            f"biases beside ternary weights ({BIAS_SCALE})",
        ),
        (
            config.qk_norm and config.sub_norm,
            "qk_norm with sub_norm",
        ),
        (
            config.qk_norm and config.biases == "qkv",
            "qk_norm with biases of queries, keys and values alone",
        ),
        (
            config.biases == "qkv" and config.sub_norm,
            "sub_norm with biases of queries, keys and values alone",
        ),
        (
            config.sub_norm and config.attention_size != config.hidden_size,
            "sub_norm with heads wider than the model",
        ),
        (
            config.sub_norm and config.hidden_size % config.num_attention_heads != 0,
            "sub_norm with a head_dim of its own",
        ),
    ):
        if wrong:
            raise RefusedError(f"{what}: no class of transformers computes that, so not exported")
    kind = (
        "bitnet" if config.sub_norm
        else "qwen3" if config.qk_norm
        else "qwen2" if config.biases == "qkv"
        else "llama"
    )  # fmt: skip
    scaling: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling != "none":
        fields = ROPE[config.rope_scaling].items()
        scaling = {"rope_type": config.rope_scaling} | {k: getattr(config, o) for k, o in fields}
    return {
        "model_type": kind,
        "architectures": [CLASSES[kind]],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": {ours: act for act, ours in ACTIVATIONS.items()}[config.ffn],
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        # Both spellings: the second is what transformers 5 reads, the first what others do.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, **scaling},
        **({"rope_scaling": scaling} if config.rope_scaling != "none" else {}),
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.biases == "qkvo",
        "mlp_bias": False,
        "bos_token_id": bos,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "torch_dtype": "float32",
    } | (
        {
            "quantization_config": {
                "quant_method": "bitnet",
                "linear_class": "autobitlinear",  # its scale multiplies: alpha itself is kept
                "quantization_mode": "offline",
                "modules_to_not_convert": None,
            }
        }
        if config.linear == "ternary"
        else {}
    )
