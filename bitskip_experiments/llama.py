"""The Llama class of `transformers`, FP32 with a cache, as something `bitskip_cpu.bench` times."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from bitskip_ref.config import ModelConfig
from bitskip_ref.decoding.sampling import Sampler

NAMES = {
    "embed_tokens": "model.embed_tokens", "final_norm": "model.norm",
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj", "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


class LlamaCache:
    """What the bench resets by setting `length`, of transformers' own cache."""

    def __init__(self, config: Any) -> None:
        from transformers import DynamicCache

        self.inner = DynamicCache(config=config)
        self.room = config.max_position_embeddings
        self._length = 0

    @property
    def length(self) -> int:
        """Positions held."""
        return self._length

    @length.setter
    def length(self, value: int) -> None:
        if value < self._length:
            self.inner.crop(value - self._length)  # below 0: so many tokens less
        self._length = value


class LlamaEngine:
    """Prompts and single steps of a Llama with our weights, which are not copied.

    An exit at n runs the first n blocks, then final norm and head, as ours does.
    """

    kv_cache = "float32"

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, np.ndarray], threads: int
    ) -> None:
        """`tensors` f32, as in the folder of an FP32 model of v1's kind."""
        from transformers import LlamaConfig, LlamaForCausalLM

        self.config, self.threads = config, threads
        settings = LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size, head_dim=config.head_dim,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.norm_eps, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        with torch.device("meta"):
            self.model = LlamaForCausalLM(settings)
        state = {_name(name): torch.from_numpy(np.asarray(t)) for name, t in tensors.items()}
        self.model.load_state_dict(state, assign=True)
        rotary = type(self.model.model.rotary_emb)
        self.model.model.rotary_emb = rotary(settings)  # its tables are no weights
        self.model.eval()
        self._layers = self.model.model.layers

    def new_cache(self) -> LlamaCache:
        """An empty cache."""
        return LlamaCache(self.model.config)

    @torch.inference_mode()
    def extend(
        self, token_ids: Sequence[int], cache: LlamaCache, *, exit_layer: int, last_only: bool
    ) -> np.ndarray:
        """Logits of the tokens [T, V], or of the last one."""
        torch.set_num_threads(self.threads)
        self.model.model.layers = self._layers[:exit_layer]
        out = self.model(
            input_ids=torch.tensor([list(token_ids)]), past_key_values=cache.inner, use_cache=True,
            logits_to_keep=1 if last_only else 0,
        )  # fmt: skip
        cache.length += len(token_ids)
        return out.logits[0].numpy()

    def choose(
        self, logits: np.ndarray, sampler: Sampler, seen: Collection[int], index: int
    ) -> int:
        """As of an engine."""
        return sampler.choose(logits, seen, index)

    def step_on(
        self, token_id: int, cache: LlamaCache, count: int, choice: Any, *, exit_layer: int,
        contenders: Any = None,
    ) -> tuple[list[int], np.ndarray]:  # fmt: skip
        """As of an engine, one token a call: all its logits [V], whichever are asked for."""
        return [], self.extend([token_id], cache, exit_layer=exit_layer, last_only=True)[0]


def _name(ours: str) -> str:
    *layer, part, end = ours.split(".")
    prefix = f"model.{'.'.join(layer)}." if layer else ""
    return f"{prefix}{NAMES.get(part, part)}.{end}"
