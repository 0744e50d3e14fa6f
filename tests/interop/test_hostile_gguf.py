"""GGUF files that lie, or that need what bitskip has not: refused in one line, at little cost."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitskip_export.foreign import gguf_file, gguf_read
from bitskip_export.foreign.gguf_read import read_gguf
from bitskip_export.foreign.gguf_words import tokenizer_json
from bitskip_export.foreign.source import RefusedError
from tests.interop.blocks import random_model
from tests.interop.test_gguf import gguf, some_words, theirs, write


def made(path: Path, keys: Callable[[Any], object], **options: Any) -> Path:
    return write(path / "m.gguf", theirs(random_model("Llama")), keys=keys, **options)


NEEDS: dict[str, tuple[Callable[[Any], object], str]] = {
    "soft caps": (lambda o: o.add_attn_logit_softcapping(50.0), "soft caps of attention"),
    "soft caps of logits": (lambda o: o.add_final_logit_softcapping(30.0), "soft caps of logits"),
    "a window": (lambda o: o.add_sliding_window(64), "sliding-window"),
    "all tokens": (lambda o: o.add_causal_attention(False), "later tokens"),
    "a scale": (lambda o: o.add_attention_scale(0.5), "scale of attention"),
    "clamps": (lambda o: o.add_clamp_kqv(8.0), "bounds of queries"),
    "alibi": (lambda o: o.add_max_alibi_bias(8.0), "ALiBi"),
    "logits": (lambda o: o.add_logit_scale(0.1), "scaled logits"),
    "embeddings": (lambda o: o.add_embedding_scale(12.0), "scaled embeddings"),
    "residuals": (lambda o: o.add_residual_scale(0.2), "scaled residuals"),
    "yarn's factor": (lambda o: o.add_rope_scaling_attn_factors(1.2), "larger"),
    "experts": (lambda o: o.add_expert_count(8), "experts"),
    "dynamic": (
        lambda o: (o.add_string("llama.rope.scaling.type", "dynamic"),
                   o.add_rope_scaling_factor(2.0)), "type 'dynamic'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("need", NEEDS)
def test_what_bitskip_lacks_is_refused(need: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=NEEDS[need][1]):
        read_gguf(made(tmp_path, NEEDS[need][0]))


def plain(out: Any) -> None:
    """The same keys, saying what is so anyway."""
    out.add_sliding_window(128)
    out.add_causal_attention(True)
    out.add_attention_scale(0.25)
    out.add_logit_scale(1.0)
    out.add_attn_logit_softcapping(0.0)
    out.add_rope_scaling_attn_factors(1.0)
    out.add_expert_count(0)


def test_what_changes_nothing_is_not(tmp_path: Path) -> None:
    assert read_gguf(made(tmp_path, plain)).config.head_dim == 16


@pytest.mark.parametrize(
    "name", ["llama.rope.scaling.factor", "llama.rope.scale_linear"], ids=["factor", "old name"]
)
def test_scaling_without_a_type_is_linear(name: str, tmp_path: Path) -> None:
    config = read_gguf(made(tmp_path, lambda o: o.add_float32(name, 4.0))).config
    assert (config.rope_scaling, config.rope_factor) == ("linear", 4.0)


def test_norms_of_heads_do_not_fit_interleaved_rows(tmp_path: Path) -> None:
    tensors = theirs(random_model("Llama"))
    norms = {
        f"blk.{i}.attn_{n}_norm.weight": np.ones(16, np.float32) for i in range(3) for n in "qk"
    }
    with pytest.raises(RefusedError, match="norms of each head in architecture llama"):
        read_gguf(write(tmp_path / "m.gguf", tensors | norms))


def test_a_second_scale_far_below_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_read, "CHUNK", 16)
    tensors = theirs(random_model("Llama", hidden_size=256, intermediate_size=256, head_dim=64))
    for name, w in tensors.items():
        if w.ndim == 2 and name.startswith("blk."):
            tensors[name] = np.sign(w)
    read_gguf(write(tmp_path / "one.gguf", tensors, "TQ2_0"))
    tensors["blk.1.ffn_up.weight"][16:] *= 2  # as of two shards of a training
    with pytest.raises(RefusedError, match=r"ffn_up.*one scale a matrix"):
        read_gguf(write(tmp_path / "two.gguf", tensors, "TQ2_0"))


ODD: dict[str, Any] = {
    "texts": ["x", "y"], "a text": ["x"], "numbers": [1, 2, 3], "a number": [7], "word": "x",
}  # fmt: skip
KEYS = (
    "general.architecture", "split.count", "llama.block_count", "llama.attention.head_count",
    "llama.rope.freq_base", "llama.rope.scaling.factor", "llama.rope.scaling.type",
    "llama.expert_count", "llama.attention.sliding_window", "llama.attention.causal",
    "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens",
    "tokenizer.ggml.add_bos_token", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
    "tokenizer.chat_template", "bitskip.exit_layer", "bitskip.head_format",
)  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_keys_of_any_type(odd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = made(tmp_path, some_words), gguf_file.open_gguf
    value = np.array(ODD[odd]) if odd.endswith(("number", "numbers")) else ODD[odd]
    for key in KEYS:
        monkeypatch.setattr(
            gguf_read, "open_gguf",
            lambda p, key=key: (lambda m, t: (m | {key: value}, t))(*opened(p)),
        )  # fmt: skip
        try:
            read_gguf(path)
        except RefusedError as error:
            assert "\n" not in str(error), error


def test_split_counts_of_any_type(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="parts: merge them"):
        read_gguf(made(tmp_path, lambda o: o.add_array("split.count", [1, 2, 3])))


def test_two_tensors_in_one_place(tmp_path: Path) -> None:
    path = made(tmp_path, lambda _: None)
    raw, name = path.read_bytes(), b"blk.1.attn_q.weight"
    at = raw.index(name) + len(name) + 4 + 16 + 4  # axes, their sizes, the type
    other = raw.index(b"blk.0.attn_q.weight") + len(name) + 24
    path.write_bytes(raw[:at] + raw[other : other + 8] + raw[at + 8 :])
    with pytest.raises(RefusedError, match=r"'blk\.1\.attn_q\.weight' lies where 'blk\.0"):
        read_gguf(path)


def test_texts_have_a_bound_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "STRINGS", 99)
    made(tmp_path, some_words)  # 96 tokens and a merge
    gguf_file.open_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(gguf_file, "STRINGS", 96)
    with pytest.raises(RefusedError, match="tells of 1 strings"):
        gguf_file.open_gguf(tmp_path / "m.gguf")


def sentencepiece(tokens: list[str], scores: np.ndarray | None = None) -> str | None:
    """The tokenizer of a list of tokens, the first of them the unknown one."""
    kinds = np.ones(len(tokens), np.int32)
    kinds[0] = gguf.TokenType.UNKNOWN
    scores = -np.arange(len(tokens), dtype=np.float32) if scores is None else scores
    keys = {"model": "llama", "tokens": tokens, "token_type": kinds, "scores": scores}
    metadata = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    return tokenizer_json(Path("m.gguf"), metadata, 1 << 20)


def test_tokens_that_would_take_hours() -> None:
    began = time.process_time()
    with pytest.raises(RefusedError, match="has 300000 characters"):
        sentencepiece(["<unk>", "x" * 300_000])
    tracemalloc.start()
    with pytest.raises(RefusedError, match="in too many ways"):
        sentencepiece(["<unk>", *("a" * n for n in range(1, 512))])  # 130 kB, 130,000 merges
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20 << 20 and time.process_time() - began < 60
    with pytest.raises(RefusedError, match="scores"):
        sentencepiece(["<unk>", "a"], np.array([0.0, np.nan], np.float32))
