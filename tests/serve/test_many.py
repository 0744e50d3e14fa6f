"""The scheduler's promise: what a request says depends on the request alone."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitskip_cpu
from bitskip_cpu.generation_options import GenerationOptions
from bitskip_cpu.many.offline import answer_file, read_prompts
from bitskip_cpu.many.scheduler import Full, Scheduler
from bitskip_cpu.many.sequence import Sequence
from bitskip_cpu.model import Model
from bitskip_cpu.pages import Pool
from bitskip_ref.decoding import generate
from bitskip_ref.decoding.contenders import Contenders
from bitskip_text.tokenizer import Tokenizer
from tests.cli.conftest import write_model
from tests.serve.asked import Heard, check, random_request, run_all


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return bitskip_cpu.load(write_model(tmp_path_factory.mktemp("many") / "random"), threads=1)


def some(model: Model, count: int, seed: int) -> None:
    """Random requests under random settings of the scheduler."""
    rng = random.Random(seed)
    page = Pool(model.engine, 1 << 20).page_bytes
    heads = [[rng.randrange(1, 290) for _ in range(n)] for n in (0, 1, 16, 33)]
    while count > 0:
        requests = [random_request(rng, model, heads) for _ in range(min(count, 60))]
        scheduler = Scheduler(
            model, parallel=rng.choice((1, 3, 8, 20)), rows=rng.choice((1, 5, 16, 64)),
            memory=page * rng.choice((8, 4000)),
        )  # fmt: skip
        run_all(scheduler, requests)
        for request in requests:
            check(model, request)
        assert scheduler.running == scheduler.waiting == 0
        assert sum(scheduler.figures.ended.values()) == len(requests)
        count -= len(requests)


def test_a_text_depends_on_its_request_alone(model: Model) -> None:
    some(model, 40, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("threads", "kv_cache"), [(1, "float32"), (2, "int8"), (2, "float16")])
def test_two_thousand_requests(tmp_path: Path, threads: int, kv_cache: str) -> None:
    folder = write_model(tmp_path / "model")
    some(bitskip_cpu.load(folder, threads=threads, kv_cache=kv_cache), 700, threads)


def test_texts_one_after_the_other(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone, several tokens in a call: stop strings within it, pages used again."""
    monkeypatch.setattr(generate, "CALL_S", 1e9)
    rng, counts = random.Random(5), Counter[int]()
    run = model.engine.step_on

    def note(token: int, cache: Any, count: int, *how: Any, **options: Any) -> Any:
        found = run(token, cache, count, *how, **options)
        counts[len(found[0])] += 1
        return found

    monkeypatch.setattr(model.engine, "step_on", note)
    scheduler, heads = Scheduler(model), [[*range(1, 30)]]
    for _ in range(60):
        request = random_request(rng, model, heads)
        request.arrives, request.gone_after = 0, None
        run_all(scheduler, [request])
        check(model, request)
        heads.append([*request.ids, *request.tokens][:30])
    assert max(counts) > 4 and scheduler.figures.ended["stop_string"]


def test_a_text_of_another_depth_is_seen(model: Model) -> None:
    """The check can fail: a request that is told of another exit's text."""
    asked = Heard([5, 6, 7], GenerationOptions(max_tokens=8, exit_layer=1))
    run_all(Scheduler(model), [asked])
    asked.options = GenerationOptions(max_tokens=8, exit_layer=2)
    with pytest.raises(AssertionError):
        check(model, asked)


def test_a_prefix_is_run_once(model: Model) -> None:
    scheduler = Scheduler(model)
    ids = [*range(1, 40)]
    first = Heard(ids, GenerationOptions(max_tokens=4, exit_layer=2))
    run_all(scheduler, [first])
    again = Heard([*ids, 50], GenerationOptions(max_tokens=4, exit_layer=2))
    deeper = Heard([*ids, 50], GenerationOptions(max_tokens=4))
    run_all(scheduler, [again])
    assert again.end is not None and again.end.reused >= 32
    run_all(scheduler, [deeper])
    assert deeper.end is not None and deeper.end.reused == 0
    for request in (first, again, deeper):
        check(model, request)


def test_a_dynamic_text_is_no_prefix(model: Model) -> None:
    """Its positions were run to other depths than a prompt's are."""
    scheduler = Scheduler(model)
    how = GenerationOptions(max_tokens=20, exit_layer="max", exit_threshold=0.0, exit_looks=(1,))
    first = Heard([5, 6, 7], how)
    run_all(scheduler, [first])
    again = Heard([5, 6, 7, *first.tokens, 9], how)
    run_all(scheduler, [again])
    assert again.end is not None and again.end.reused <= 3
    check(model, again)


def test_long_prompts_and_texts_take_turns(model: Model) -> None:
    """Every step carries a row of each running text, and no more rows than allowed."""
    seen: list[int] = []
    scheduler = Scheduler(model, rows=8)
    texts = [Heard([3, 4], GenerationOptions(max_tokens=20, exit_layer=2)) for _ in range(3)]
    long = Heard([*range(1, 60)], GenerationOptions(max_tokens=2, exit_layer=2), arrives=4)
    with pytest.MonkeyPatch.context() as patch:
        run = model.engine.step_many
        patch.setattr(
            model.engine, "step_many", lambda rows: (seen.append(len(rows)), run(rows))[1]
        )
        run_all(scheduler, [*texts, long])
    assert max(seen) <= 8
    assert seen[5:8] == [8, 8, 8]  # three texts' tokens, five of the long prompt
    for text in [*texts, long]:
        check(model, text)


def test_of_a_text_alone_only_logits_that_may_be_chosen_are_wanted(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SPEC 9.6, unless it tells of log probabilities."""
    asked = set[Any]()

    def note(verb: Any) -> Any:
        def call(*row: Any, contenders: Any, **options: Any) -> Any:
            asked.add(contenders)
            return verb(*row, contenders=contenders, **options)

        return call

    for verb in ("step", "step_on"):
        monkeypatch.setattr(model.engine, verb, note(getattr(model.engine, verb)))
    how, seeded = GenerationOptions(max_tokens=6), GenerationOptions(temperature=1.0, top_k=9)
    for texts, expected in (
        ([Heard([3, 4], how)], {Contenders()}),
        ([Heard([3, 4], seeded)], {Contenders(9, 1.0)}),
        ([Heard([3, 4], how, alternatives=2)], {None}),
        ([Heard([3, 4], how), Heard([5, 6], how)], set()),
    ):
        asked.clear()
        run_all(Scheduler(model), texts)
        assert asked == expected
    monkeypatch.undo()
    for text in texts:
        check(model, text)


def test_limits(model: Model) -> None:
    how = GenerationOptions(max_tokens=5)
    scheduler = Scheduler(model, parallel=1, queue=1, memory=1 << 16)
    asked = [Heard([1, 2], how) for _ in range(3)]
    for a in asked:
        a.text = Sequence(model, a.ids, a.options, a.tell)
    scheduler.submit([asked[0].text, asked[1].text])
    with pytest.raises(Full, match="waiting"):
        scheduler.submit([asked[2].text])
    late = Heard([1, 2], how)
    late.text = Sequence(model, late.ids, late.options, late.tell, deadline=time.monotonic() - 1)
    scheduler.step()
    scheduler.step()
    while scheduler.waiting:
        scheduler.step()
    scheduler.submit([late.text])
    while scheduler.step():
        pass
    assert late.end is not None and late.end.generation.stop_reason == "deadline"
    check(model, asked[1])
    with pytest.raises(ValueError, match="parallel 257: at most 256"):
        Scheduler(model, parallel=257)
    large = Heard([1] * 20, GenerationOptions(max_tokens=9))
    tiny = Scheduler(model, memory=20_000)  # one page
    run_all(tiny, [large])
    assert large.end is not None and "memory for keys and values" in str(large.end.error)


def test_an_error_concerns_one_text(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = (Heard([n, 2], GenerationOptions(max_tokens=5)) for n in (7, 8))
    choose = model.engine.choose

    def fail(z: Any, sampler: Any, seen: Any, index: int) -> int:
        if index == 2 and 8 in seen:
            raise ValueError("planted")
        return choose(z, sampler, seen, index)

    monkeypatch.setattr(model.engine, "choose", fail)
    run_all(Scheduler(model), [good, bad])
    assert bad.end is not None and bad.end.error == "planted"
    check(model, good)


def test_a_tokenizer_that_cannot_decode_ends_one_text(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither when a token comes nor when what was held back is asked for."""
    good, bad = (Heard([n, 2], GenerationOptions(max_tokens=5)) for n in (7, 8))
    decode = Tokenizer.decode

    def fail(self: Tokenizer, ids: Any) -> str:
        if 8 in ids and len(ids) > 2:
            raise ValueError("planted")
        return decode(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", fail)
    run_all(Scheduler(model), [good, bad])
    assert bad.end is not None and bad.end.error == "planted"
    monkeypatch.undo()
    check(model, good)


def test_memory_that_lacks_for_a_text_ends_that_text(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = (Heard([n, 2], GenerationOptions(max_tokens=5)) for n in (7, 8))
    lend = Pool.open

    def fail(self: Pool, ids: list[int], depth: int, most: int) -> Any:
        if 8 in ids:
            raise MemoryError
        return lend(self, ids, depth, most)

    monkeypatch.setattr(Pool, "open", fail)
    run_all(Scheduler(model), [bad, good])
    assert bad.end is not None and bad.end.error == "not enough memory"
    check(model, good)


def test_a_mistake_of_ours_leaves_nobody_waiting(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(model, parallel=1)
    asked = [Heard([n, 2], GenerationOptions(max_tokens=5)) for n in (7, 8)]
    for a in asked:
        a.text = Sequence(model, a.ids, a.options, a.tell)
    scheduler.submit([a.text for a in asked])
    monkeypatch.setattr(Pool, "keep", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        scheduler.run()
    assert scheduler.failed and all(a.end is not None for a in asked)
    assert asked[1].end is not None and "ZeroDivisionError" in str(asked[1].end.error)
    with pytest.raises(Full, match="has failed"):
        scheduler.submit([Sequence(model, [1], GenerationOptions(), print)])


# ---- without a server -------------------------------------------------------------------


def test_generate_many(model: Model) -> None:
    special = GenerationOptions(max_tokens=3, exit_layer=1)
    prompts = ["the cat", ("a little", special), "sat"] * 5
    found = list(model.generate_many(prompts, max_tokens=9, parallel=4))
    for prompt, g in zip(prompts, found, strict=True):
        text, how = (prompt, None) if isinstance(prompt, str) else prompt
        one = model.generate(text, how) if how else model.generate(text, max_tokens=9)
        assert (g.text, g.token_ids, g.exit_layers) == (one.text, one.token_ids, one.exit_layers)
    with pytest.raises(ValueError, match="the prompt is empty"):
        list(model.generate_many([""]))


def test_hidden_states(model: Model) -> None:
    ids = model.prompt_ids("the cat sat")
    assert model.hidden("the cat sat", 2).shape == (len(ids), model.config.hidden_size)
    z = model.logits(ids, 2)
    same = model.hidden("the cat sat", 1) == model.hidden("the cat sat", 2)
    assert np.isfinite(z).all() and not same.all()
    with pytest.raises(ValueError, match="exit layer 99"):
        model.hidden("a", 99)


def test_a_file_of_prompts_goes_on_where_it_stopped(model: Model, tmp_path: Path) -> None:
    file, whole, broken = (tmp_path / n for n in ("prompts.jsonl", "whole.jsonl", "broken.jsonl"))
    given = [{"prompt": "the cat", "id": f"x{i}", "max_tokens": i % 5} for i in range(12)]
    file.write_text("\n".join(map(json.dumps, [*given, "sat"])) + "\n\n")
    lines = read_prompts(file, GenerationOptions(max_tokens=4))
    assert list(answer_file(model, lines, whole, 3)) == list(range(14))
    work = answer_file(model, lines, broken, 2)
    for _ in range(5):
        next(work)
    work.close()
    with broken.open("ab") as out:
        out.write(b'{"half')
    assert next(iter(answer_file(model, lines, broken, 2))) == 4
    list(answer_file(model, lines, broken, 2))
    assert broken.read_bytes() == whole.read_bytes()
    assert [json.loads(x).get("id") for x in whole.read_text().splitlines()][:2] == ["x0", "x1"]
    with pytest.raises(ValueError, match="line 1, is not the answer"):
        list(answer_file(model, read_prompts(file, GenerationOptions(seed=3)), whole, 3))


@pytest.mark.parametrize("prompt", ["a " * 999, "", "\ud800"])
def test_a_prompt_that_is_refused_is_named(model: Model, tmp_path: Path, prompt: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, ["sat", "the", "cat", prompt])))
    with pytest.raises(ValueError, match=r"prompt 3: the (prompt|text)"):
        list(answer_file(model, read_prompts(file, GenerationOptions()), tmp_path / "out", 3))


@pytest.mark.parametrize(
    ("line", "words"),
    [("{", "line 2: not JSON"), ("3", "must be a string"), ('{"prompt": 1}', "must be a string"),
     ('{"prompt": "a", "tempreature": 1}', "temperature"),
     ('{"prompt": "a", "top_k": -1}', "line 2: top-k")],
)  # fmt: skip
def test_a_wrong_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"a"\n{line}\n')
    with pytest.raises(ValueError, match=words):
        read_prompts(file, GenerationOptions())
