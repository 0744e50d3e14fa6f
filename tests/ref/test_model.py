"""The reference engine: laws that any right implementation must obey."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bitskip_ref.arithmetic.attention import attention, int8_attention
from bitskip_ref.arithmetic.functions import half, relu2, silu
from bitskip_ref.arithmetic.quant import quantize_activations
from bitskip_ref.cache import check_kv_cache
from bitskip_ref.compare import difference
from bitskip_ref.config import PRESETS, ConfigError, ModelConfig, preset, small_twin
from bitskip_ref.constants import KV_CACHES
from bitskip_ref.decoding.generate import stream
from bitskip_ref.decoding.sampling import Sampler, splitmix64, uniform
from bitskip_ref.exits import ConfidenceExit, FixedExit, GateExit
from bitskip_ref.model import ReferenceModel
from tests.helpers import OPTIONS, random_tensors, random_tokens, twin

f32 = np.float32
NAMES = [*PRESETS, *OPTIONS]


def model(name: str, kv_cache: str = "float32") -> ReferenceModel:
    return ReferenceModel(twin(name), random_tensors(twin(name)), kv_cache)


def equal(expected: np.ndarray, actual: np.ndarray) -> None:
    assert (report := difference("values", expected, actual)) is None, report


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("name", NAMES)
def test_whole_prompt_equals_token_by_token(name: str, kv_cache: str) -> None:
    m, ids = model(name, kv_cache), random_tokens(twin(name), 7)
    for exit_layer in (1, 3, None):
        whole = m.logits(ids, exit_layer)
        assert whole.shape == (7, m.config.vocab_size) and whole.dtype == f32
        cache = m.new_cache()
        steps = [m.extend([t], cache, exit_layer=exit_layer) for t in ids]
        equal(whole, np.concatenate(steps))


@pytest.mark.parametrize("name", NAMES)
def test_no_token_sees_the_future(name: str) -> None:
    m, ids = model(name), random_tokens(twin(name), 7)
    changed = [*ids[:4], *((t + 1) % m.config.vocab_size for t in ids[4:])]
    before, after = m.logits(ids), m.logits(changed)
    equal(before[:4], after[:4])
    assert (before[4] != after[4]).any()


def test_a_float16_cache_rounds_what_is_cached_and_nothing_else() -> None:
    """SPEC 6.5, by way of a float32 cache whose content is rounded from outside."""
    config, tensors = twin("bitskip-v1"), random_tensors(twin("bitskip-v1"))
    tensors["layers.1.attn_norm.weight"][:] *= 1e7  # beyond float16
    plain, small = ReferenceModel(config, tensors), ReferenceModel(config, tensors, "float16")
    ids = random_tokens(config, 6)
    seen: list[dict[str, np.ndarray]] = [{}, {}]
    for m, stages in zip((plain, small), seen, strict=True):
        m.extend(ids[:1], m.new_cache(), trace=lambda n, x, s=stages: s.update({n: x}))
    for stage in ("embed", "layers.0.q", "layers.0.k", "layers.0.v"):
        equal(seen[0][stage], seen[1][stage])  # traced before rounding
    equal(half(seen[0]["layers.0.v"]).astype(f32).ravel()[:16], seen[1]["layers.0.attn"][0, :16])
    caches = plain.new_cache(), small.new_cache()
    for t in ids:
        for m, cache in zip((plain, small), caches, strict=True):
            m.extend([t], cache)
        kept = caches[1].keys + caches[1].values
        assert all(x.dtype == np.float16 and np.isfinite(x).all() for x in kept)
    assert max(np.abs(x).max() for x in kept) == 65504
    assert (small.logits(ids) != plain.logits(ids)).any()


def test_an_unknown_kind_of_cache_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'bfloat16': must be float32 or float16 or int8"):
        ReferenceModel(twin("tiny"), random_tensors(twin("tiny")), "bfloat16")


def test_every_exit_differs() -> None:
    m, ids = model("per-layer-exits"), random_tokens(twin("per-layer-exits"), 3)
    exits = [m.logits(ids, n) for n in (1, 2, 3, 4)]
    assert all((a != b).any() for a, b in itertools.pairwise(exits))
    equal(exits[-1], m.logits(ids))


def test_attention_by_hand() -> None:
    # Two equal keys share the weight; a third in the future is not seen.
    q = np.zeros((2, 1, 2), f32)
    k = np.ones((3, 1, 2), f32)
    v = np.array([[[2.0, 0.0]], [[4.0, 8.0]], [[6.0, 1.0]]], f32)
    got = attention(q, k, v)
    assert got.tolist() == [[3.0, 4.0], [4.0, 3.0]]


def int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return quantize_activations(x, 8)


def test_int8_attention_by_hand() -> None:
    """SPEC 6.8 with equal scores: codes of values, of weights, and the sum of exponentials."""
    q, k = np.zeros((1, 1, 2), f32), np.zeros((2, 1, 2), f32)
    v = np.array([[[2.0, 0.0]], [[4.0, 8.0]]], f32)  # codes 127, 0 and 64 (63.5), 127
    weights = 4096, 16383  # 16383 * 2 / 8 = 4095.75, and the largest
    sums = np.array([weights[0] * 127 + weights[1] * 64, weights[1] * 127])
    factor = f32(f32(8 / 127) / f32(16383)) / f32(2)
    equal((sums.astype(f32) * factor)[None], int8_attention(q, *int8(k), *int8(v)))


def test_int8_attention_is_near_and_has_no_order() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, 2, 32)).astype(f32) for n in (1, 300, 300))
    found = int8_attention(q, *int8(k), *int8(v))
    assert np.abs(found - attention(q, k, v)).max() < 0.02
    order = rng.permutation(300)
    equal(found, int8_attention(q, *int8(k[order]), *int8(v[order])))


def test_a_context_beyond_exact_sums_is_refused() -> None:
    config = twin("tiny").replace(max_position_embeddings=131_073)
    with pytest.raises(ValueError, match=r"131073 positions, exact sums fit up to 131072"):
        check_kv_cache("int8", config)
    assert check_kv_cache("int8", twin("tiny").replace(max_position_embeddings=131_072)) == "int8"


def test_query_heads_share_their_group() -> None:
    rng = np.random.default_rng(0)
    q = np.repeat(rng.standard_normal((1, 1, 4)), 4, axis=1).astype(f32)
    k, v = rng.standard_normal((2, 5, 2, 4)).astype(f32)
    got = attention(q, k, v).reshape(4, 4)
    equal(got[0], got[1])
    equal(got[2], got[3])
    assert (got[0] != got[2]).any()


def test_a_flipped_weight_code_shows() -> None:
    config = twin("bitskip-v1")
    tensors, ids = random_tensors(config), random_tokens(config, 5)
    good = ReferenceModel(config, tensors).logits(ids)
    packed = tensors["layers.2.down_proj.weight"].copy()
    packed[0, 0] = (packed[0, 0] & ~np.uint8(3)) | np.uint8((int(packed[0, 0] & 3) + 1) % 3)
    bad = ReferenceModel(config, tensors | {"layers.2.down_proj.weight": packed}).logits(ids)
    assert difference("logits", good, bad) is not None


# ---- exits --------------------------------------------------------------------------


def cache_bits(cache: object) -> list[np.ndarray]:
    return [*cache.keys, *cache.values]  # type: ignore[attr-defined]


def test_dynamic_exit_that_never_stops_is_the_full_model() -> None:
    m, ids = model("wt2-ee"), random_tokens(twin("wt2-ee"), 5)
    caches = [m.new_cache() for _ in range(2)]
    for cache in caches:
        m.extend(ids, cache)
    z, depth = m.step(9, caches[0], GateExit(1.0))
    equal(m.extend([9], caches[1])[0], z)
    assert depth == 4
    for a, b in zip(*map(cache_bits, caches), strict=True):
        equal(a, b)


@pytest.mark.parametrize("name", ["wt2-ee", "per-layer-exits"])
def test_dynamic_exit_at_once_fills_the_blocks_above(name: str) -> None:
    m, ids = model(name), random_tokens(twin(name), 5)
    dynamic, fixed = m.new_cache(), m.new_cache()
    m.extend(ids, dynamic)
    m.extend(ids, fixed)
    z, depth = m.step(9, dynamic, GateExit(0.0))
    assert depth == 1
    # The exit's logits are those of one block on the same past.
    equal(m.extend([9], fixed, exit_layer=1)[0], z)
    assert all(k.shape[0] == 6 for k in dynamic.keys)
    # Block 2's keys come from the hidden state after block 1, at this position (SPEC 8.6).
    seen: dict[str, np.ndarray] = {}
    again = m.new_cache()
    m.extend([*ids, 9], again, exit_layer=1, trace=lambda s, x: seen.setdefault(s, x.copy()))
    x = seen["layers.0.out"][5:]
    a = m.norm("layers.1.attn_norm", x) if m.config.norm_position == "pre" else x
    k, v = m.keys_values(1, a, 5)
    equal(k[0], dynamic.keys[1][5])
    equal(v[0], dynamic.values[1][5])


def test_confidence_is_the_softmax() -> None:
    m, ids = model("bitskip-v1"), random_tokens(twin("bitskip-v1"), 4)
    z = m.logits(ids, 1)[-1].astype(np.float64)
    p = np.sort(np.exp(z - z.max()) / np.exp(z - z.max()).sum())
    entropy = 1 + (p * np.log(p)).sum() / np.log(len(p))
    for measure, value in (("max", p[-1]), ("margin", p[-1] - p[-2]), ("entropy", entropy)):
        for threshold, depth in ((value - 1e-4, 1), (value + 1e-4, None)):
            cache = m.new_cache()
            m.extend(ids[:-1], cache)
            _, got = m.step(ids[-1], cache, ConfidenceExit(threshold, measure))
            assert (got == 1) == (depth == 1)


def test_gates_are_integer_rows() -> None:
    """SPEC 8.4 step by step in Python's integers, and near the float gate that was trained."""
    m = model("wt2-bitskip")
    x = np.random.default_rng(1).standard_normal((1, m.config.hidden_size), np.float32)
    at = "layers.1.gate"

    def product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        def codes(row: np.ndarray) -> tuple[list[int], np.float32]:
            s = max(np.float32(1e-5), np.abs(row).max())
            return [int(c) for c in np.rint(row * (np.float32(127) / s))], s / np.float32(127)

        a, step = codes(x)
        rows = [codes(row) for row in w]
        sums = [sum(p * q for p, q in zip(a, b, strict=True)) for b, _ in rows]
        scales = [step * scale for _, scale in rows]
        return np.array([np.float32(t) * s for t, s in zip(sums, scales, strict=True)])

    normed = m.norm(f"{at}.norm", x)[0]
    first, second = (m.tensors[f"{at}.{fc}.weight"] for fc in ("fc1", "fc2"))
    z = product(np.maximum(product(normed, first), np.float32(0)), second)[0]
    exact = m._gate(x, 2)
    assert exact == pytest.approx(1 / (1 + np.exp(-np.float64(z))), rel=3e-7)
    floats = second[0] @ np.maximum(first @ normed, 0)
    assert z != floats and z == pytest.approx(floats, abs=0.05 * float(np.abs(second).sum()))


def test_rules_refuse_what_means_nothing() -> None:
    config = twin("bitskip-v1")
    for rule, words in (
        (GateExit(), "no routing gates"),
        (GateExit(1.5), "between 0 and 1"),
        (ConfidenceExit(0.5, "entropy?"), "max, margin, entropy"),
        (ConfidenceExit(0.5, layers=(2, 4)), r"exit look 4: .* choose 1\.\.3"),
        (ConfidenceExit(0.5, layers=(2, 3), last=3), r"exit look 3: .* choose 1\.\.2"),
        (ConfidenceExit(0.5, last=5), r"exit layer 5 is out of range"),
        (ConfidenceExit(0.5, layers=(0,)), r"choose 1\.\.3"),
        (FixedExit(0), "1..4"),
        (FixedExit(5), "1..4"),
    ):
        with pytest.raises(ValueError, match=words):
            rule.check(config)


def test_a_shallow_cache_does_not_serve_deeper_exits() -> None:
    m = model("tiny")
    cache = m.new_cache()
    m.extend([1, 2], cache, exit_layer=3)
    m.extend([3], cache, exit_layer=2)
    with pytest.raises(ValueError, match="filled at exit layer 2 and cannot serve 3"):
        m.extend([4], cache, exit_layer=3)
    with pytest.raises(ValueError, match="cannot serve 4"):
        m.step(4, cache, ConfidenceExit(0.5))
    assert cache.length == 3
    cache.length = 2  # forget the shallow position
    equal(m.logits([1, 2, 5], 3)[2:], m.extend([5], cache, exit_layer=3))


def test_tokens_are_checked() -> None:
    m = model("tiny")
    for ids, words in (
        ([], "at least one"),
        ([97], r"0\.\.96"),
        ([-1], r"0\.\.96"),
        ([1] * 65, "context of 64"),
    ):
        with pytest.raises(ValueError, match=words):
            m.logits(ids)


# ---- generation and sampling --------------------------------------------------------


def generated(name: str, rule: object, sampler: Sampler, count: int = 8) -> list[tuple[int, int]]:
    m = model(name)
    tokens = stream(m, random_tokens(m.config, 4), rule, sampler, count)  # type: ignore[arg-type]
    return [(t.id, t.depth) for t in tokens]


def test_greedy_generation_follows_the_argmax() -> None:
    m, ids = model("bitskip-v1"), random_tokens(twin("bitskip-v1"), 4)
    expected = list(ids)
    for _ in range(8):
        expected.append(int(np.argmax(m.logits(expected, 2)[-1])))
    assert generated("bitskip-v1", FixedExit(2), Sampler()) == [(t, 2) for t in expected[4:]]


def test_generation_ends() -> None:
    m = model("tiny")
    tokens = list(stream(m, [1, 2], FixedExit(), Sampler(temperature=1.0), 1000))
    assert len(tokens) == 63  # the last of 65 needs no position of its own
    first = tokens[0].id
    assert list(stream(m, [1, 2], FixedExit(), Sampler(temperature=1.0), 9, first)) == []


def test_uniform_draws_are_stated() -> None:
    # The published first outputs of SplitMix64 seeded with 1234567.
    golden = 0x9E3779B97F4A7C15
    assert splitmix64(1234567 + golden) == 6457827717110365317
    assert splitmix64(1234567 + 2 * golden) == 3203168211198807973
    draws = [uniform(7, i) for i in range(4000)]
    assert min(draws) >= 0 and max(draws) < 1 and abs(np.mean(draws) - 0.5) < 0.02


def test_sampling_follows_the_distribution() -> None:
    z = np.log(np.array([0.5, 0.3, 0.15, 0.05], f32))
    counts = np.bincount([Sampler(1.0, seed=3).choose(z, (), i) for i in range(8000)], minlength=4)
    np.testing.assert_allclose(counts / 8000, [0.5, 0.3, 0.15, 0.05], atol=0.02)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.7}, [0, 1]),
        ({"top_p": 0.45}, [0]),
        ({"min_p": 0.25}, [0, 1, 2]),
        ({"top_k": 3, "min_p": 0.5}, [0, 1]),
    ],
)
def test_filters_by_hand(options: dict[str, float], left: list[int]) -> None:
    z = np.log(np.array([0.5, 0.3, 0.15, 0.05], f32))
    ids, _ = Sampler(1.0, **options).candidates(z)  # type: ignore[arg-type]
    assert ids.tolist() == left


def test_ties_go_to_the_lowest_id() -> None:
    z = np.array([1, 2, 2, 2], f32)
    assert Sampler().choose(z, (), 0) == 1
    assert Sampler(1.0, top_k=2).candidates(z)[0].tolist() == [1, 2]


def test_repetition_penalty_by_hand() -> None:
    z = np.array([2.0, -1.0, 1.5], f32)
    got = Sampler(repetition_penalty=2.0).penalised(z, [0, 1])
    assert got.tolist() == [1.0, -2.0, 1.5] and z[0] == 2.0


def test_bad_sampling_options_are_refused() -> None:
    for options in ({"temperature": -1.0}, {"top_p": 0.0}, {"min_p": 2.0}, {"top_k": -1}):
        with pytest.raises(ValueError, match="must be"):
            Sampler(**options)  # type: ignore[arg-type]


# ---- configuration ------------------------------------------------------------------


def test_published_parameter_counts() -> None:
    assert preset("bitskip-v1").parameters() == 1_061_490_688
    assert preset("wt2-bitskip").quantizable_parameters() == 34_603_008


def test_config_round_trip() -> None:
    for name in PRESETS:
        config = preset(name)
        assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hiden_size": 3}, "unknown field.*hiden_size"),
        ({"hidden_size": 0}, "at least 1"),
        ({"hidden_size": "64"}, "type int"),
        ({"hidden_size": True}, "type int"),
        ({"activation_bits": 5}, "4 or 8"),
        ({"ffn": "gelu"}, "one of swiglu"),
        ({"num_key_value_heads": 3}, "must divide"),
        ({"head_dim": 15}, "even"),
        ({"linear": "float32", "hadamard": True}, "ternary"),
        ({"relu2_in_linear": True}, "hadamard"),
        ({"hidden_size": 200_000}, "132,000"),
    ],
)
def test_wrong_configs_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small_twin("bitskip-v1").replace(**changes)


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="stories-24"):
        preset("stories")


@pytest.mark.parametrize("name", ["exit-blocks", "exit-blocks-post-norm", "exit-blocks-int8"])
def test_an_exit_block_changes_its_exit_and_nothing_else(name: str) -> None:
    """SPEC 8.8, against the same model without exit blocks."""
    config, tensors, ids = twin(name), random_tensors(twin(name)), random_tokens(twin(name), 6)
    plain = {key: t for key, t in tensors.items() if ".block." not in key}
    own = ReferenceModel(config, tensors)
    base = ReferenceModel(config.replace(exit_blocks=()), plain)
    for n in range(1, 5):
        caches = own.new_cache(), base.new_cache()
        a, b = (m.extend(ids, c, exit_layer=n) for m, c in zip((own, base), caches, strict=True))
        assert (a.tobytes() == b.tobytes()) == (n not in config.exit_blocks)
        for i in range(n):
            for x, y in zip(caches[0].layer(i), caches[1].layer(i), strict=True):
                equal(x, y)


@pytest.mark.parametrize(("name", "n"), [("exit-blocks", 3), ("exit-blocks-post-norm", 2)])
def test_an_exit_block_by_its_rule(name: str, n: int) -> None:
    """SPEC 8.8: what the final norm reads, before and after the residual's norm."""
    m, seen, at = model(name), dict[str, np.ndarray](), f"exits.{n}.block"
    m.extend([5, 6, 7], m.new_cache(), exit_layer=n, trace=lambda k, x: seen.update({k: x}))
    x = seen[f"layers.{n - 1}.out"]
    if name == "exit-blocks":
        f = m.norm(f"{at}.ffn_norm", x)
        g, up = m.linear(f"{at}.gate_proj", f), m.linear(f"{at}.up_proj", f)
        x = x + m.linear(f"{at}.down_proj", silu(g) * up)
    else:
        f = m.norm(f"{at}.ffn_sub_norm", relu2(m.linear(f"{at}.up_proj", x)))
        x = m.norm(f"{at}.ffn_norm", x + m.linear(f"{at}.down_proj", f))
    equal(x, seen[f"{at}.out"])
    norm, head = m.config.exit_names(n)
    equal(m.head(head, m.norm(norm, x)), seen["logits"])


@pytest.mark.parametrize("exits", [[4], [0, 1], [2, 1], [1, 1], "12", [1.0], [True], 3])
def test_exit_blocks_are_exits_before_the_last(exits: object) -> None:
    with pytest.raises(ConfigError, match="exit_blocks = "):
        twin("bitskip-v1").replace(exit_blocks=exits)
