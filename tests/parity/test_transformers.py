"""An independent check: Hugging Face's Llama and BitNet classes against the reference.

They share no code with us and sum in other orders, so the promise is a bound, not bits, on the
largest difference over the largest logit: 1e-5. In ternary models a last-bit difference before a
quantizer can, rarely, move a code by one (1/127 of that token's largest activation); there the
median over seeds keeps the bound and no seed exceeds 3e-2.
"""

from __future__ import annotations

import numpy as np
import pytest

from bitskip_export.foreign import hf_names
from bitskip_ref.arithmetic.quant import quantize_weights
from bitskip_ref.config import ModelConfig, small_twin
from bitskip_ref.model import ReferenceModel
from bitskip_ref.packing import pack_ternary
from bitskip_ref.tensors import expected_tensors
from tests.helpers import random_parameters, random_tokens

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_format": "float32"}
LLAMA = small_twin("llama3").replace(**SHAPE)
BITNET = small_twin("bitnet-2b4t").replace(**SHAPE)
CASES: dict[str, tuple[ModelConfig, float]] = {  # with the bound on the worst seed
    "llama-fp32": (LLAMA, 1e-5),
    "llama-ternary": (LLAMA.replace(linear="ternary"), 3e-2),
    "bitnet-fp32": (BITNET.replace(linear="float32"), 1e-5),
    "bitnet-ternary": (BITNET, 3e-2),
}


def theirs(config: ModelConfig, parameters: dict[str, np.ndarray]) -> object:
    """The transformers model with these weights; their quantization where ours is ternary."""
    bitnet = config.ffn == "gated_relu2"
    kind = transformers.BitNetConfig if bitnet else transformers.LlamaConfig
    settings = kind(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )
    made = (transformers.BitNetForCausalLM if bitnet else transformers.LlamaForCausalLM)(settings)
    state = {hf_names.theirs(n): torch.from_numpy(value) for n, value in parameters.items()}
    missing, unexpected = made.load_state_dict(state, strict=False)
    assert not unexpected and all("lm_head" in name for name in missing), (missing, unexpected)
    made.tie_weights()
    if config.linear == "ternary":
        from transformers.integrations.bitnet import ActQuant, WeightQuant

        def quantized(module: torch.nn.Linear, inputs: tuple) -> object:
            return torch.nn.functional.linear(
                ActQuant.apply(inputs[0]), WeightQuant.apply(module.weight)
            )

        for name, module in made.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.forward = lambda x, m=module: quantized(m, (x,))
    return made.eval()


def ours(config: ModelConfig, parameters: dict[str, np.ndarray]) -> ReferenceModel:
    tensors = {}
    for name, (kind, _) in expected_tensors(config).items():
        if kind is np.uint8:
            codes, alpha = quantize_weights(parameters[name])
            tensors[name] = pack_ternary(codes)
            tensors[name.removesuffix("weight") + "scale"] = np.array([alpha])
        elif not name.endswith(".scale"):
            tensors[name] = parameters[name]
    return ReferenceModel(config, tensors)


def distance(config: ModelConfig, seed: int, broken: bool = False) -> float:
    parameters, ids = random_parameters(config, seed), random_tokens(config, 24, seed)
    with torch.no_grad():
        expected = theirs(config, parameters)(torch.tensor([ids])).logits[0].numpy()
    if broken:  # one transposed projection
        name = "layers.1.o_proj.weight"
        parameters[name] = np.ascontiguousarray(parameters[name].T)
    actual = ours(config, parameters).logits(ids)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_blocks_agree(case: str) -> None:
    config, bound = CASES[case]
    distances = [distance(config, seed) for seed in range(5)]
    assert np.median(distances) < 1e-5
    assert max(distances) < bound


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_exceeds_the_bound(case: str) -> None:
    config, bound = CASES[case]
    assert distance(config, 0, broken=True) > 10 * bound
