"""`selftest` must go red for any wrong bit, and say where it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import bitskip_ref
from bitskip.program import runtime as main
from bitskip_cpu.selftest import selftest, smaller_cache
from bitskip_ref.exits import FixedExit
from tests.cli.conftest import write_model


class Faulty:
    """The reference with one fault of a test's choice."""

    def __init__(self, model: Any, **faults: Callable[..., Any]) -> None:
        self.model, self.faults = model, faults
        self.config = model.config

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.model, name)
        fault = self.faults.get(name)
        return method if fault is None else lambda *a, **k: fault(method, *a, **k)


def flip(x: np.ndarray) -> np.ndarray:
    """A copy whose last value differs in its lowest bit."""
    y = np.ascontiguousarray(x).copy()
    y.reshape(-1).view(np.uint32)[-1] ^= 1
    return y


def wrong_stage(extend: Any, ids: Any, cache: Any, trace: Any = None, **options: Any) -> Any:
    def report(name: str, x: np.ndarray) -> None:
        trace(name, flip(x) if name == "layers.2.mid" else x)

    return extend(ids, cache, trace=report if trace else None, **options)


def wrong_single(extend: Any, ids: Any, *arguments: Any, **options: Any) -> Any:
    z = extend(ids, *arguments, **options)
    return flip(z) if len(ids) == 1 else z


def wrong_exit(logits: Any, ids: Any, exit_layer: int) -> Any:
    z = logits(ids, exit_layer)
    return flip(z) if exit_layer == 2 else z


def wrong_depth(step: Any, token: int, cache: Any, rule: Any, **asked: Any) -> Any:
    z, depth = step(token, cache, rule, **asked)
    return z, depth + (not isinstance(rule, FixedExit))


def wrong_sample(step_on: Any, *arguments: Any, **asked: Any) -> Any:
    ids, z = step_on(*arguments, **asked)
    return ids, -z


def wrong_round(speculate: Any, *arguments: Any, **options: Any) -> Any:
    drafts, z = speculate(*arguments, **options)
    return drafts, flip(z)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return bitskip_ref.load(folder)


def test_the_reference_equals_itself(reference: Any) -> None:
    checks = list(selftest(reference, lambda _: reference, [1, 2]))
    assert [c.problem for c in checks] == [None] * len(checks)
    assert {c.threads for c in checks} == {1, 2}
    names = [c.name for c in checks]
    for rule in ("max >", "margin >", "gate >"):
        (exits,) = {name.split("exits ")[1] for name in names if name.startswith(rule)}
        assert "," in exits  # it stopped in more places than one


@pytest.mark.parametrize(
    ("faults", "first", "problem"),
    [
        ({"extend": wrong_stage}, "every stage", "layers.2.mid: 1 of"),
        ({"logits": wrong_exit}, "exit 2", "logits: 1 of"),
        ({"extend": wrong_single}, "token by token", "logits: 12 of"),
        ({"step": wrong_depth}, "max >", "exit layers: 6 of 6"),
        ({"step_on": wrong_sample}, "sampled tokens", "expected"),
        ({"speculate": wrong_round}, "a round of speculation", "after drafts: 1 of"),
    ],
)
def test_a_planted_fault_is_found_and_named(
    reference: Any, faults: dict[str, Any], first: str, problem: str
) -> None:
    faulty = Faulty(reference, **faults)
    found = [c for c in selftest(reference, lambda _: faulty, [2]) if c.problem]
    assert found[0].name.startswith(first) and found[0].threads == 2
    assert found[0].problem is not None and problem in found[0].problem


def test_a_fault_with_a_smaller_cache_is_found(reference: Any) -> None:
    faulty = Faulty(reference, extend=wrong_single)
    right = smaller_cache(reference, lambda *_: reference, [1, 2])
    assert [c.problem for c in right] == [None, None]
    (found,) = smaller_cache(reference, lambda *_: faulty, [2])
    assert found.problem is not None and "logits: 12 of" in found.problem


def test_the_verb(folder: Path) -> None:
    result = CliRunner().invoke(main, ["selftest", str(folder)])
    assert result.exit_code == 0, result.output
    assert (
        "comparisons equal" in result.stdout
        and "float16 cache; token by token, int8 cache" in result.stdout
    )


def test_the_verb_names_a_difference(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitskip_cpu.selftest as module

    whole = module.Engine

    def faulty(*arguments: Any) -> Any:
        return Faulty(whole(*arguments), logits=wrong_exit)

    monkeypatch.setattr(module, "Engine", faulty)
    result = CliRunner().invoke(main, ["selftest", str(folder)])
    assert result.exit_code == 1
    assert "DIFFERENT with 1 thread(s), exit 2: logits: 1 of" in result.stdout
    assert "[11, 319]" in result.stdout


@pytest.mark.parametrize("name", ["wt2-bitskip", "llama3"])
def test_models_of_other_kinds(name: str, tmp_path: Path) -> None:
    from bitskip_ref.config import small_twin

    config = small_twin(name).replace(vocab_size=300)
    result = CliRunner().invoke(main, ["selftest", str(write_model(tmp_path / "m", config))])
    assert result.exit_code == 0, result.output
