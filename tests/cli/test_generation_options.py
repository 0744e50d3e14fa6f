"""GenerationOptions: every option checked when made; texts that go on after a cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitskip_cpu
from bitskip_cpu.generate import TextStream
from bitskip_cpu.generation_options import GenerationOptions
from bitskip_ref.decoding.generate import stream
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.decoding.speculate import Speculation
from bitskip_ref.decoding.speculate import stream as speculate
from bitskip_ref.exits import FixedExit
from tests.cli.conftest import CONFIG as MODEL
from tests.cli.conftest import command, write_model
from tests.helpers import random_tensors, random_tokens, twin
from tests.parity.engines import make


@pytest.mark.parametrize(
    ("option", "values", "words"),
    [
        ("max_tokens", (1.5, "3", None, True, -1, float("nan")), "max tokens"),
        ("exit_layer", (1.5, True, [18], b"max", np.float32(2)), "exit_layer"),
        ("exit_threshold", ("0.5", True, [0.5]), "exit_threshold"),
        ("exit_looks", ("12", 6, (1.5,), [True], ["6"], (None,)), "exit_looks"),
        ("exit_last", (1.5, "4", False), "exit_last"),
        ("speculate", (2.5, True, [2], "some", "AUTO"), "speculate"),
        ("top_k", (2.5, "3", True, -1), "top-k"),
        ("seed", (2.5, "3", None, -1, 1 << 64), "seed"),
        (
            "temperature",
            ("1", True, -1, 1e-38, 1e-7, 101, float("nan"), [1.0]),
            "temperature",
        ),
        ("top_p", (0, 1.1, "1", float("nan")), "top-p"),
        ("min_p", (-0.1, 1.1, "1"), "min-p"),
        ("repetition_penalty", (0, 1e-44, 101, "1"), "repetition penalty"),
        ("stop", ("dog!", None, b"dog", [1], [None], 5), "stop = "),
        ("stop", ([""], ("a", "")), "empty stop string"),
        ("context", (1.5, "64", True), "context"),
        ("draft_exit", (1.5, "2"), "draft_exit"),
        ("draft_vocab", (1.5, "2"), "draft_vocab"),
    ],
)
def test_a_wrong_value_is_one_line(option: str, values: tuple[Any, ...], words: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=words) as caught:
            GenerationOptions(**{option: value})
        assert "\n" not in str(caught.value)


def test_the_same_through_a_model(folder: Path) -> None:
    model = bitskip_cpu.load(folder, threads=1)
    for changes in ({"max_tokens": 1.5}, {"top_k": 2.5}, {"stop": "dog!"}, {"stop": None},
                    {"exit_layer": 1.5}, {"seed": 2.5}):  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            model.generate("Once", **changes)
    for prompt in ([1, 2], None, 5, b"Once"):
        with pytest.raises(ValueError, match="it must be a string"):
            model.generate(prompt)
    with pytest.raises(TypeError, match="temprature"):
        model.generate("Once", temprature=1.0)


def test_options_and_keywords_are_the_same(folder: Path) -> None:
    model = bitskip_cpu.load(folder, threads=1)
    options = GenerationOptions(max_tokens=9, temperature=0.9, seed=4, stop=["zzz"], exit_layer=3)
    assert options.stop == ("zzz",)  # a list is stored as a tuple
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.seed = 5
    one = model.generate("Once", options)
    two = model.generate("Once", max_tokens=9, temperature=0.9, seed=4, stop=("zzz",), exit_layer=3)
    three = model.generate("Once", options.replace(seed=5), seed=4)
    assert one.token_ids == two.token_ids == three.token_ids and set(one.exit_layers) == {3}
    assert hash(options) == hash(options.replace())
    several = GenerationOptions(max_tokens=np.int64(3), seed=np.uint64(1 << 63), temperature=1)
    assert len(model.generate("Once", several).token_ids) == 3


def test_what_is_not_said_is_as_the_folder_recommends(tmp_path: Path) -> None:
    """SPEC 9.7, in `generate`, `generate_many` and the verb."""
    said = {"temperature": 1.5, "top_k": 40, "repetition_penalty": 1.3}
    model = bitskip_cpu.load(write_model(tmp_path / "m", sampling=said), threads=1)
    plain = bitskip_cpu.load(write_model(tmp_path / "n"), threads=1)
    asked = {"max_tokens": 12, "seed": 3}
    drawn = model.generate("Once", **asked).text
    assert drawn == plain.generate("Once", **asked, **said).text
    assert drawn != plain.generate("Once", **asked).text  # which is greedy
    assert [g.text for g in model.generate_many(["Once"], **asked)] == [drawn]
    one = model.generate("Once", **asked, top_k=1, repetition_penalty=1.0).text
    assert one == plain.generate("Once", **asked).text
    greedy = model.generate("Once", **asked, temperature=0).text
    assert greedy == plain.generate("Once", **asked, repetition_penalty=1.3).text
    assert GenerationOptions(top_k=5).recommended(model.folder).top_k == 5
    done = command("generate", tmp_path / "m", "-p", "Once", "-n", 12, "--seed", 3, "-q")
    assert done.stdout == drawn + "\n"
    assert "recommended sampling: temperature 1.5, top_k 40" in command(
        "inspect", tmp_path / "m"
    ).stdout  # fmt: skip


# ---- texts that go on -----------------------------------------------------------------

CONFIG = twin("bitskip-v1")
TENSORS = random_tensors(CONFIG)


@pytest.mark.parametrize("name", ["reference", "numba", "torch"])
@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(1.0, repetition_penalty=1.2, seed=3)])
def test_token_streams_go_on_after_a_cache(name: str, count: int | None, sampler: Sampler) -> None:
    """A prompt in two parts gives the tokens of the whole, and the cache holds all but the last."""
    engine, prompt = make(name, CONFIG, TENSORS), random_tokens(CONFIG, 12)

    def tokens(ids: list[int], **options: Any) -> list[int]:
        if count is None:
            found = stream(engine, ids, FixedExit(), sampler, 9, **options)
        else:
            how = Speculation(CONFIG, FixedExit(), 1, count)
            found = speculate(engine, ids, how, sampler, 9, **options)
        return [token.id for token in found]

    expected = tokens(prompt)
    for cut in (1, 5, 11):
        cache = engine.new_cache()
        engine.extend(prompt[:cut], cache)
        assert tokens(prompt[cut:], cache=cache, seen=prompt[:cut]) == expected
        assert cache.length == 12 + 8
        after = engine.extend(expected[-1:], cache)
        assert after.tobytes() == engine.logits([*prompt, *expected])[-1:].tobytes()


@pytest.mark.parametrize("speculation", [{}, {"speculate": 3, "draft_exit": 1}])
def test_a_chat_reads_only_what_is_new(folder: Path, speculation: dict[str, Any]) -> None:
    """Turn after turn on one cache: the tokens of the whole text so far, each read once."""
    model = bitskip_cpu.load(folder, threads=1)
    options = GenerationOptions(max_tokens=5, **speculation)
    cache, ids = model.new_cache(), []
    for words in ("Once", " upon", " a time", " there"):
        new = model.tokenizer.encode(words)
        fresh = TextStream(
            model.engine, model.tokenizer, [*ids, *new], rule=FixedExit(), sampler=Sampler(),
            max_tokens=5, eos_token_id=model.folder.eos_token_id,
        )  # fmt: skip
        list(fresh)
        got = model.generate(words, options, cache=cache)
        assert got.token_ids == fresh.generation().token_ids
        assert got.prompt_tokens == len(new)
        ids += [*new, *got.token_ids]
        assert cache.length == len(ids)
    fork = cache.fork()  # both branches go on
    one, two = (model.generate("!", options, cache=c).token_ids for c in (cache, fork))
    assert one == two


def test_a_broken_off_text_can_go_on(folder: Path) -> None:
    """Whoever stops within a round of speculation finds the cache at the tokens that came."""
    model = bitskip_cpu.load(folder, threads=1)
    for speculation in ({}, {"speculate": 8, "draft_exit": 3}):
        for stop_after in range(1, 6):
            cache = model.new_cache()
            text = model.stream("Once", GenerationOptions(**speculation), cache=cache)
            for _, _ in zip(range(stop_after), text, strict=False):
                pass
            text.finish()
            said = text.generation().token_ids
            assert text.generation().stop_reason == "interrupted"
            all_ids = [*model.tokenizer.encode("Once"), *said]
            assert cache.length == len(all_ids)
            z = model.extend([7], cache)
            assert z.tobytes() == model.logits([*all_ids, 7])[-1:].tobytes()


def test_the_context_counts_what_the_cache_holds(folder: Path) -> None:
    model = bitskip_cpu.load(folder, threads=1)
    cache = model.new_cache()
    first = model.generate("Once", max_tokens=10, cache=cache)
    held = first.prompt_tokens + 10
    new = len(model.tokenizer.encode(" upon"))
    got = model.generate(" upon", cache=cache, context=held + new + 3)
    assert got.stop_reason == "context" and len(got.token_ids) == 4
    with pytest.raises(ValueError, match=f"after {cache.length} that the cache holds"):
        model.generate(" upon", cache=cache, context=held)
    with pytest.raises(ValueError, match=r"choose 1\.\.64"):
        model.generate("Once", context=65)


def test_a_begin_token_is_read_once(tmp_path: Path) -> None:
    model = bitskip_cpu.load(write_model(tmp_path / "m", MODEL, bos_token_id=7), threads=1)
    cache = model.new_cache()
    assert model.generate("Once", max_tokens=2, cache=cache).prompt_tokens == 1 + len(
        model.tokenizer.encode("Once")
    )
    assert model.generate(" upon", max_tokens=2, cache=cache).prompt_tokens == len(
        model.tokenizer.encode(" upon")
    )
