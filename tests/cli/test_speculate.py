"""`generate --speculate` as a user meets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bitskip_cpu
from bitskip_cpu.cache import KVCache
from bitskip_ref.decoding import generate as decoding
from bitskip_ref.decoding import speculate
from bitskip_ref.exits import FixedExit
from tests.cli.conftest import CONFIG, write_model
from tests.cli.test_generate import facts, generate, one_line

STATISTICS = {
    "draft_exit", "rounds", "drafted", "accepted", "acceptance", "accepted_per_round",
}  # fmt: skip


@pytest.mark.parametrize("count", ["1", "4", "auto"])
def test_the_text_is_the_same(folder: Path, count: str) -> None:
    options = (folder, "-p", "Once", "-n", 40)
    plain = facts(*options)
    got = facts(*options, "--speculate", count, "--draft-exit", 2)
    for name in ("text", "token_ids", "exit_layers", "stop_reason"):
        assert got[name] == plain[name]
    assert plain["speculation"] is None
    made = got["speculation"]
    assert made.keys() == STATISTICS and made["draft_exit"] == 2
    assert made["accepted"] + made["rounds"] == 40
    if count != "auto":
        assert made["accepted"] > 0
        assert made["acceptance"] == made["accepted"] / made["drafted"]


def test_a_fixed_exit_verifies(folder: Path) -> None:
    options = (folder, "-p", "Once", "-n", 12, "--exit-layer", 3)
    got = facts(*options, "--speculate", 2, "--draft-vocab", 100)
    assert got["text"] == facts(*options)["text"]
    assert set(got["exit_layers"]) == {3} and got["speculation"]["draft_exit"] == 1


def test_seeded_text_does_not_depend_on_the_number_of_drafts(folder: Path) -> None:
    options = (folder, "-p", "Once", "-n", 20, "--temperature", 0.9, "--seed", 3)
    texts = {facts(*options, "--speculate", count)["text"] for count in (1, 5, "auto")}
    assert len(texts) == 1


def test_it_stops_within_a_run_where_plain_decoding_stops(folder: Path, tmp_path: Path) -> None:
    plain = bitskip_cpu.load(folder)
    whole = plain.generate("Once", max_tokens=40)
    for at in range(0, len(whole.text) - 3, 3):
        stop = [whole.text[at : at + 3]]
        expected = plain.generate("Once", max_tokens=40, stop=stop)
        got = plain.generate("Once", max_tokens=40, stop=stop, speculate=4, draft_exit=3)
        assert (got.text, got.stop_reason) == (expected.text, "stop_string")
        assert got.token_ids == expected.token_ids
    for end in set(whole.token_ids[3:20]):
        model = bitskip_cpu.load(write_model(tmp_path / str(end), CONFIG, eos_token_id=end))
        got = model.generate("Once", max_tokens=40, speculate=4, draft_exit=3)
        assert got.token_ids == whole.token_ids[: whole.token_ids.index(end)]
        assert got.stop_reason == "end_of_text"


def test_the_context_is_used_to_its_end(folder: Path) -> None:
    for ctx in (5, 20, 64):
        options = (folder, "-p", "Once", "-n", 200, "--ctx", ctx)
        plain, got = facts(*options), facts(*options, "--speculate", 16, "--draft-exit", 3)
        assert got["stop_reason"] == plain["stop_reason"] == "context"
        assert got["token_ids"] == plain["token_ids"]


def test_the_line_of_statistics(folder: Path) -> None:
    result = generate(folder, "-p", "Once", "-n", 9, "--speculate", 2, "--draft-exit", 3)
    assert "drafts at 3 right" in result.stderr
    assert "drafts" not in generate(folder, "-p", "Once", "-n", 9).stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--speculate", "0"], "0 is not in the range x>=1"),
        (["--speculate", "some"], "known: auto, lookup, or a whole number"),
        (["--speculate", "2", "--draft-exit", "4"], "choose 1..3"),
        (["--speculate", "2", "--exit-layer", "2", "--draft-exit", "2"], "choose 1..1"),
        (["--speculate", "2", "--exit-layer", "1"], "nothing lies below 1"),
        (["--speculate", "auto", "--exit-layer", "gate"], "choose an exit layer by number"),
        (["--speculate", "2", "--exit", "max", "--exit-threshold", "0.5"], "exit layer by number"),
        (["--speculate", "2", "--draft-vocab", "999"], "1..320"),
        (["--draft-exit", "2"], "needs speculate"),
    ],
)
def test_a_meaningless_combination_is_one_line(
    folder: Path, options: list[str], message: str
) -> None:
    one_line(generate(folder, "-p", "a", *options), message)


@pytest.mark.parametrize(
    "how",
    [{}, {"speculate": "lookup"}, {"speculate": 4}, {"speculate": 4, "temperature": 1.0}],
    ids=str,
)
def test_ctrl_c_in_a_call_leaves_no_draft_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    """The cache holds what was said, wherever Ctrl-C came: the next text goes on from there."""
    monkeypatch.setattr(decoding, "CALL_S", 1e9)  # as many tokens a call as there may be
    model = bitskip_cpu.load(folder, threads=1)
    prompt = model.prompt_ids("Once, once, once")
    places = [(KVCache, "advance", 3)] + [(speculate, "settle", 4)] * ("temperature" in how)
    for where, name, which in places:
        cache, calls = model.new_cache(), 0
        run = getattr(where, name)

        def broken(*arguments: Any, run: Any = run, which: int = which) -> Any:
            nonlocal calls
            found, calls = run(*arguments), calls + 1
            if calls == which:
                raise KeyboardInterrupt
            return found

        stream = model.stream("Once, once, once", cache=cache, max_tokens=30, **how)
        with monkeypatch.context() as patch:
            patch.setattr(where, name, broken)
            with pytest.raises(KeyboardInterrupt):
                list(stream)
        stream.finish()
        said = [*prompt, *stream.generation().token_ids]
        assert cache.length == len(said)
        z, _ = model.step(1, cache, FixedExit())
        assert z.tobytes() == model.logits([*said, 1])[-1].tobytes()
