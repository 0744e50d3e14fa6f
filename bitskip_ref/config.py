"""The one configuration type and the presets (SPEC section 1).

Dimension letters used in every package: B batch, T tokens, S cached positions,
D hidden_size, H attention heads, K key-value heads, E head_dim,
F intermediate_size, V vocab_size, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, get_type_hints

from bitskip_ref.excerpt import shown
from bitskip_ref.words import unknown

BIASES: dict[str, tuple[str, ...]] = {
    "none": (),
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "qkvo": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
"""biases -> the linear layers of a block that have one (SPEC 4.7)."""

# Allowed words of the text fields; anything else is refused when a config is made.
CHOICES: dict[str, tuple[str, ...]] = {
    "linear": ("ternary", "int8", "float32"),
    "ffn": ("swiglu", "relu2", "gated_relu2"),
    "norm": ("rms", "layer"),
    "norm_position": ("pre", "post"),
    "biases": tuple(BIASES),
    "rope_scaling": ("none", "linear", "llama3", "yarn"),
    "exit_norm": ("shared", "per_layer"),
    "exit_head": ("shared", "per_layer"),
    "head_format": ("int8", "int6", "int4", "float32", "float16", "bfloat16"),
}

HEAD_BITS = {"int8": 8, "int6": 6, "int4": 4}
"""head_format -> bits of the codes of embedding and head (SPEC 4.4); the others are floats."""


MOST_ODD = 255
"""The largest odd part of a width that SPEC 5.3 turns: its work grows with it."""

MOST_LAYERS = 4096
"""Every block has about twenty tensors, whose table is made before a file is compared with it."""


class ConfigError(ValueError):
    """A configuration that no engine would run; the message names field, value and rule."""


@functools.cache
def _types() -> dict[str, Any]:
    """Field -> its type. Finding them takes longer than all checks, so once."""
    return get_type_hints(ModelConfig)


def odd_part(width: int) -> int:
    """m of width = m * 2^k, m odd."""
    return width // (width & -width)


def _exits(value: Any, layers: int) -> tuple[int, ...]:
    """A list of exits before the last as a tuple. Raises ConfigError."""
    if not isinstance(value, list | tuple) or any(type(n) is not int for n in value):
        raise ConfigError(f"exit_blocks = {shown(value)}: must be a list of exits, like [6, 12]")
    if any(not 0 < n < layers for n in value) or list(value) != sorted(set(value)):
        raise ConfigError(
            f"exit_blocks = {shown(list(value))}: must rise within 1..{layers - 1}, the exits "
            "before the last"
        )
    return tuple(value)


@dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of a model. Checked when made; stored as `config.json`."""

    # Shape
    vocab_size: int
    """V, the tokens of the vocabulary; at least those of the tokenizer."""
    hidden_size: int
    """D, the width of the hidden state."""
    num_hidden_layers: int
    """L, the blocks. Exits are numbered 1..L (SPEC 8.1)."""
    num_attention_heads: int
    """H, the query heads."""
    num_key_value_heads: int
    """K, the heads of keys and values; divides H (SPEC 6.2)."""
    head_dim: int
    """E, the width of a head; even, as RoPE turns pairs (SPEC 6.1)."""
    intermediate_size: int
    """F, the width inside the FFN."""
    max_position_embeddings: int = 512
    """The context: the most positions that a prompt and its continuation may have."""
    # Arithmetic
    linear: str = "ternary"
    """Weights of the linear layers: `ternary` (SPEC 4.1 to 4.3; v1 Eq. 7, v2 Eq. 1), `int8` (rows
    with a scale each, SPEC 4.8), or `float32`, which quantizes nothing (the papers' FP models)."""
    activation_bits: int = 8
    """Bits of the activations that enter ternary layers: 8 or 4 (SPEC 4.2; v2 Eq. 2). `int8` layers
    take 8."""
    hadamard: bool = False
    """Whether activations go through a Hadamard transform before they are quantized (SPEC 5;
    v2 Eq. 3); in `int8` layers through one that needs no padding (SPEC 5.3). Needs `linear =
    "ternary"` or `"int8"`."""
    ffn: str = "swiglu"
    """The FFN (SPEC 7.1): `swiglu` (v1), `relu2` (v2 Eq. 3), `gated_relu2` (BitNet b1.58 2B4T)."""
    relu2_in_linear: bool = False
    """Another reading of v2 Eq. 3: a squared ReLU after every linear layer (SPEC 4.6). Needs
    `hadamard` and `ffn = "relu2"`."""
    norm: str = "rms"
    """The norms: `rms` (v1) or `layer` (v2) (SPEC 3)."""
    norm_position: str = "pre"
    """Whether a norm stands before (`pre`, v1) or after (`post`, v2) attention and FFN (SPEC 7.2,
    7.3)."""
    norm_eps: float = 1e-5
    """What is added under the norms' root; between 0 and 1."""
    biases: str = "none"
    """Whether a bias is added to what `q_proj`, `k_proj` and `v_proj` give (`qkv`, Qwen2), or to
    `o_proj`, too (`qkvo`) (SPEC 4.7)."""
    qk_norm: bool = False
    """Whether each head's queries and keys have a norm before they are turned (SPEC 6.7; Qwen3)."""
    sub_norm: bool = False
    """Whether the layers `o_proj` and `down_proj` have a norm before them, too (SPEC 7.1)."""
    embedding_norm: bool = False
    """Whether a norm follows the embedding (SPEC 7.4; in the papers' post-norm models)."""
    rope_theta: float = 10_000.0
    """The base of RoPE's frequencies (SPEC 6.1); between 1 and 1e12."""
    rope_scaling: str = "none"
    """How RoPE's frequencies are lowered for a longer context (SPEC 6.6): not at all, all alike
    (`linear`), or the low ones (`llama3`, `yarn`)."""
    rope_factor: float = 1.0
    """By what they are divided; from 1 on."""
    rope_low_freq_factor: float = 1.0
    """`llama3`: frequencies of fewer turns in the original context are divided."""
    rope_high_freq_factor: float = 4.0
    """`llama3`: frequencies of more turns stay as they are; above `rope_low_freq_factor`."""
    rope_original_context: int = 8192
    """`llama3`, `yarn`: the context before it was made longer."""
    rope_beta_fast: float = 32.0
    """`yarn`: pairs of more turns in the original context stay as they are; above
    `rope_beta_slow`."""
    rope_beta_slow: float = 1.0
    """`yarn`: pairs of fewer turns are divided."""
    rope_attention_factor: float = 1.0
    """`yarn`: what cosines and sines are multiplied by; above 0 and at most 16."""
    tie_word_embeddings: bool = False
    """Whether the head's weights are the embedding's."""
    # Exits
    gates: bool = False
    """Whether every block has a routing gate (SPEC 8.4; v2 Eq. 6)."""
    exit_norm: str = "shared"
    """The final norm of exits before the last: the last one's (`shared`), or their own
    (`per_layer`) (SPEC 8.1)."""
    exit_head: str = "shared"
    """Their head, the same way. `per_layer` excludes `tie_word_embeddings`."""
    exit_blocks: tuple[int, ...] = ()
    """Exits before the last that have a feed-forward block of their own between hidden state and
    final norm (SPEC 8.8), rising."""
    head_format: str = "int8"
    """How embedding and head are stored when exported: codes of 8, 6 or 4 bits (SPEC 4.4), or
    floats of 4 or 2 bytes (SPEC 4.5)."""

    def __post_init__(self) -> None:
        hints = _types()
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), hints[field.name]
            if field.name == "exit_blocks":
                object.__setattr__(self, field.name, _exits(value, self.num_hidden_layers))
            elif kind is float and type(value) is int and abs(value) < 1 << 53:
                object.__setattr__(self, field.name, float(value))
            elif type(value) is not kind:
                raise ConfigError(f"{field.name} = {shown(value)}: must be of type {kind.__name__}")
            if field.name in CHOICES and value not in CHOICES[field.name]:
                raise ConfigError(
                    f"{field.name} = {shown(value)}: must be one of "
                    f"{', '.join(CHOICES[field.name])}"
                )
            if kind is int and value < 1:
                raise ConfigError(f"{field.name} = {shown(value)}: must be at least 1")
            # The largest numbers stop a damaged config from asking for absurd memory.
            largest = MOST_LAYERS if field.name == "num_hidden_layers" else 1 << 24
            if kind is int and value > largest:
                raise ConfigError(f"{field.name} = {shown(value)}: must be at most {largest}")
        if self.activation_bits not in (4, 8):
            raise ConfigError(f"activation_bits = {self.activation_bits}: must be 4 or 8")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads = {self.num_key_value_heads}: "
                f"must divide num_attention_heads = {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim = {self.head_dim}: must be even, RoPE turns pairs")
        if not 0.0 < self.norm_eps < 1.0:
            raise ConfigError(f"norm_eps = {self.norm_eps}: must be between 0 and 1")
        if not 1.0 < self.rope_theta < 1e12:
            raise ConfigError(f"rope_theta = {self.rope_theta}: must be between 1 and 1e12")
        if not 1.0 <= self.rope_factor < 1e6:
            raise ConfigError(f"rope_factor = {self.rope_factor}: must be from 1 to below 1e6")
        if self.rope_factor != 1.0 and self.rope_scaling == "none":
            raise ConfigError(f"rope_factor = {self.rope_factor}: needs a rope_scaling")
        if not 0.0 < self.rope_low_freq_factor < self.rope_high_freq_factor < 1e6:
            raise ConfigError(
                f"rope_low_freq_factor = {self.rope_low_freq_factor}: must be above 0 and below "
                f"rope_high_freq_factor = {self.rope_high_freq_factor}"
            )
        if not 0.0 < self.rope_beta_slow < self.rope_beta_fast < 1e6:
            raise ConfigError(
                f"rope_beta_slow = {self.rope_beta_slow}: must be above 0 and below "
                f"rope_beta_fast = {self.rope_beta_fast}"
            )
        if not 0.0 < self.rope_attention_factor <= 16.0:
            raise ConfigError(
                f"rope_attention_factor = {self.rope_attention_factor}: must be above 0 and at "
                "most 16"
            )
        if self.rope_attention_factor != 1.0 and self.rope_scaling != "yarn":
            raise ConfigError(
                f"rope_attention_factor = {self.rope_attention_factor}: needs rope_scaling 'yarn'"
            )
        if self.hadamard and self.linear == "float32":
            raise ConfigError("hadamard = true: needs linear = 'ternary' or 'int8' (SPEC 5)")
        if self.linear == "int8" and self.activation_bits != 8:
            raise ConfigError(f"activation_bits = {self.activation_bits}: linear = 'int8' takes 8")
        if self.hadamard and self.linear == "int8":
            for width in self.linear_inputs():
                if odd_part(width) > MOST_ODD:
                    raise ConfigError(
                        f"hadamard = true: a width of {width} is {odd_part(width)} times a power "
                        f"of two; at most {MOST_ODD} times one is turned (SPEC 5.3)"
                    )
        if self.relu2_in_linear and not (self.hadamard and self.ffn == "relu2"):
            raise ConfigError("relu2_in_linear = true: needs hadamard = true and ffn = 'relu2'")
        if self.exit_head == "per_layer" and self.tie_word_embeddings:
            raise ConfigError("exit_head = 'per_layer': needs tie_word_embeddings = false")
        # Exactness in float32 engines: |sum of codes| must stay below 2^24 (SPEC 4.3).
        if max(self.padded(n) for n in self.linear_inputs()) * 127 >= 1 << 24:
            raise ConfigError("a linear input above 132,000 values could leave float32's integers")

    # ---- derived shapes -------------------------------------------------------------

    @property
    def gated(self) -> bool:
        """Whether the FFN has a gate projection beside the up projection."""
        return self.ffn in ("swiglu", "gated_relu2")

    @property
    def attention_size(self) -> int:
        """H * E, the width of the concatenated heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """K * E, the width of one position's keys (or values)."""
        return self.num_key_value_heads * self.head_dim

    def linear_inputs(self) -> tuple[int, ...]:
        """Widths before padding that enter linear layers: D, H * E and F."""
        return self.hidden_size, self.attention_size, self.intermediate_size

    def padded(self, width: int) -> int:
        """Input width of a linear layer: the next power of two in an H-BitLinear (SPEC 5.1)."""
        whole = self.hadamard and self.linear == "ternary"
        return 1 << (width - 1).bit_length() if whole else width

    @property
    def rotated_head(self) -> bool:
        """Whether embedding and head lie in the space that SPEC 5.3 turns to (SPEC 5.4)."""
        return self.hadamard and self.linear == "int8" and self.head_format in HEAD_BITS

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of one block's linear layers, in file order (FORMAT 3)."""
        d, a, f = (self.padded(n) for n in self.linear_inputs())
        shapes = {
            "q_proj": (self.attention_size, d),
            "k_proj": (self.kv_size, d),
            "v_proj": (self.kv_size, d),
            "o_proj": (self.hidden_size, a),
        }
        if self.gated:
            shapes["gate_proj"] = (self.intermediate_size, d)
        shapes["up_proj"] = (self.intermediate_size, d)
        shapes["down_proj"] = (self.hidden_size, f)
        return shapes

    def exit_block_shapes(self) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of an exit block's linear layers: those of a block's FFN (SPEC 8.8)."""
        names = ("gate_proj", "up_proj", "down_proj")
        return {name: s for name, s in self.linear_shapes().items() if name in names}

    def exit_block_norms(self) -> dict[str, int]:
        """Name -> width of an exit block's norms (SPEC 8.8)."""
        return {name: w for name, w in self.norm_shapes().items() if name.startswith("ffn_")}

    def bias_shapes(self) -> dict[str, int]:
        """Name -> width of one block's biases, by the linear layer that they belong to."""
        return {name: self.linear_shapes()[name][0] for name in BIASES[self.biases]}

    def norm_shapes(self) -> dict[str, int]:
        """Name -> width of one block's norms."""
        widths = {"attn_norm": self.hidden_size, "ffn_norm": self.hidden_size}
        if self.qk_norm:
            widths |= {"q_norm": self.head_dim, "k_norm": self.head_dim}
        if self.sub_norm:
            widths |= {"attn_sub_norm": self.attention_size, "ffn_sub_norm": self.intermediate_size}
        return widths

    @property
    def gate_width(self) -> int:
        """Inner width of a routing gate, D / 4 (v2 Eq. 6)."""
        return max(1, self.hidden_size // 4)

    def quantizable_parameters(self) -> int:
        """Weights held by the linear layers of all blocks and exit blocks."""
        blocks = self.num_hidden_layers * sum(o * i for o, i in self.linear_shapes().values())
        exits = len(self.exit_blocks) * sum(o * i for o, i in self.exit_block_shapes().values())
        return blocks + exits

    def parameters(self) -> int:
        """Linear weights, embedding and heads; norms and gates are left out, as in the papers."""
        heads = 0 if self.tie_word_embeddings else 1
        if self.exit_head == "per_layer":
            heads = self.num_hidden_layers
        return self.quantizable_parameters() + (1 + heads) * self.vocab_size * self.hidden_size

    def exit_names(self, n: int) -> tuple[str, str]:
        """Names of the norm and the head that give the logits after n = 1..L blocks (SPEC 8.1)."""
        early = n < self.num_hidden_layers
        norm = f"exits.{n}.norm" if early and self.exit_norm == "per_layer" else "final_norm"
        if early and self.exit_head == "per_layer":
            return norm, f"exits.{n}.head"
        return norm, "embed_tokens" if self.tie_word_embeddings else "lm_head"

    # ---- conversion -----------------------------------------------------------------

    def replace(self, **changes: Any) -> ModelConfig:
        """A checked copy with some fields changed; an unknown name is refused."""
        self._refuse_unknown(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Field -> value, as JSON has it."""
        return {**dataclasses.asdict(self), "exit_blocks": list(self.exit_blocks)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`. Raises ConfigError for unknown, missing or wrong fields."""
        cls._refuse_unknown(values)
        needed = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        missing = [name for name in needed if name not in values]
        if missing:
            raise ConfigError(f"missing field(s): {', '.join(missing)}")
        return cls(**values)

    @classmethod
    def _refuse_unknown(cls, values: dict[str, Any]) -> None:
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"unknown field(s): {shown(unknown)}; known: {', '.join(sorted(known))}"
            )


_V1 = ModelConfig(
    vocab_size=50_257, hidden_size=2048, num_hidden_layers=24, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, intermediate_size=4096,
)  # fmt: skip
_WT2 = ModelConfig(
    vocab_size=50_257, hidden_size=512, num_hidden_layers=12, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64, intermediate_size=2048, ffn="relu2", norm="layer",
    norm_position="post", sub_norm=True, embedding_norm=True, gates=True,
)  # fmt: skip

PRESETS: dict[str, ModelConfig] = {
    "bitskip-v1": _V1,
    "bitskip-v2": _V1.replace(hadamard=True, sub_norm=True, activation_bits=4),
    "bitskip-v3": _V1.replace(hadamard=True, sub_norm=True),
    "layerskip": _V1.replace(linear="float32", head_format="float32"),
    "llama3": _V1.replace(linear="float32", head_format="float32"),
    # The 2x2 differs in Hadamard here and in the training recipe (bitskip_train.recipes):
    # shapes, norms and gates are the same in all four, so that each factor is isolated.
    "wt2-baseline": _WT2,
    "wt2-h": _WT2.replace(hadamard=True),
    "wt2-ee": _WT2,
    "wt2-bitskip": _WT2.replace(hadamard=True),
    "stories-24": _V1.replace(
        vocab_size=4096, hidden_size=192, num_attention_heads=3, num_key_value_heads=1,
        intermediate_size=384,
    ),
    "bitnet-2b4t": ModelConfig(
        vocab_size=128_256, hidden_size=2560, num_hidden_layers=30, num_attention_heads=20,
        num_key_value_heads=5, head_dim=128, intermediate_size=6912, ffn="gated_relu2",
        sub_norm=True, rope_theta=500_000.0, tie_word_embeddings=True,
        max_position_embeddings=4096,
    ),
    "tiny": _V1.replace(
        vocab_size=256, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=128, max_position_embeddings=128,
    ),
}  # fmt: skip


def preset(name: str) -> ModelConfig:
    """The preset of that name. Raises ConfigError, listing the names, for an unknown one."""
    if name not in PRESETS:
        raise ConfigError(unknown("preset", name, PRESETS))
    return PRESETS[name]


def small_twin(name: str) -> ModelConfig:
    """A preset's features on a shape small enough for exhaustive tests (4 layers, D = 48).

    Widths are chosen to be awkward on purpose: D is no power of two (tree sums and the
    Hadamard transform must pad) and rows do not fill 256 weights (packing must pad).
    """
    full = preset(name)
    return full.replace(
        vocab_size=97, hidden_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=80, max_position_embeddings=64,
    )  # fmt: skip
