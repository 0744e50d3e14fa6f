"""Models of transformers, and ours against them block by block with forced inputs.

Whole models are no measure: an activation at the edge between two codes may round to the other one,
which blocks above amplify; transformers' own two ternary classes differ from each other so. With
inputs taken from transformers each block stands for itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitskip_ref.folder import read_folder
from bitskip_ref.model import ReferenceModel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # which transformers demands for ternary models
torch.compiler.set_stance("force_eager")  # compiling its quantizers takes half a minute
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": None, "eos_token_id": [3, 5], "initializer_range": 0.15,
}  # fmt: skip


def random_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A model of transformers with random weights, norms too; kind `Llama` or `BitNet`."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**TINY, **changes})
    made = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.3 * torch.randn_like(p))
            elif name.endswith(".bias"):
                p.copy_(0.3 * torch.randn_like(p))
    return made


def save(model: Any, path: Path, **config: Any) -> Path:
    """As a folder; config: fields of config.json that are added or changed."""
    model.save_pretrained(path)
    edit(path / "config.json", **config)
    return path


def edit(path: Path, **fields: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def load(path: Path) -> Any:
    """A folder as transformers reads it, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def distances(theirs: Any, folder: Path, length: int = 120) -> np.ndarray:
    """Largest difference over the row's largest value, f64 [L + 1, 120]: blocks, then logits.

    Each of our blocks has as input what went into theirs. length: tokens of a sequence; where a
    code flips in a key or value, all later tokens of its sequence see it.
    """
    read = read_folder(folder)
    ours = ReferenceModel(read.config, read.tensors)
    batch = np.random.default_rng(0).integers(0, read.config.vocab_size, (120 // length, length))
    passed: list[tuple[np.ndarray, np.ndarray]] = []

    def keep(_: Any, args: Any, result: Any) -> None:
        out = result[0] if isinstance(result, tuple) else result
        passed.append((args[0].numpy(), out.reshape(args[0].shape).numpy()))

    handles = [layer.register_forward_hook(keep) for layer in theirs.model.layers]
    with torch.no_grad():
        logits = theirs(torch.tensor(batch)).logits.numpy()
    for handle in handles:
        handle.remove()
    last = read.config.num_hidden_layers
    assert len(passed) == last
    found = []
    for s, ids in enumerate(batch):
        assert np.array_equal(passed[0][0][s], ours.embed(ids))
        pairs = [
            (out[s], ours.block(i, x[s], ours.new_cache(), 0)) for i, (x, out) in enumerate(passed)
        ]
        pairs.append((logits[s], ours.exit(passed[-1][1][s], last)))
        found.append([np.abs(a - b).max(1) / np.abs(a).max(1) for a, b in pairs])
    return np.concatenate(found, axis=1)


def assert_close(found: np.ndarray) -> None:
    """The bar: within 1e-5 in 99 % of tokens; a code at an edge may flip in the others."""
    share = (found < 1e-5).mean()
    assert share >= 0.99 and found.max() < 3e-2, (share, found.max(1))
