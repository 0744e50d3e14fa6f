"""The order of a block and its stages read side by side: the same names in both files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from bitskip_cpu.kernels import forward, stages
from bitskip_cpu.kernels.layout import row

STAGES = {"ATTENTION_IN": "attention_in", "ROWS": "rows", "STORE": "store", "ATTEND": "attend_part",
          "OUT_IN": "out_in", "FFN_IN": "ffn_in", "DOWN_IN": "down_in", "BLOCK_OUT": "block_out",
          "EXIT_IN": "exit_in"}  # fmt: skip


def dispatched(text: str) -> dict[str, str]:
    """Stage -> the function that `run_part` calls for it; the last one under ''."""
    tree = ast.parse(text)
    part = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "run_part")
    branch, found = part.body[-1], {}
    while isinstance(branch, ast.If):
        test, call = branch.test, branch.body[0]
        assert isinstance(test, ast.Compare) and len(branch.body) == 1, "run_part only dispatches"
        found[ast.unparse(test.comparators[0])] = ast.unparse(call).split("(")[0]
        branch = branch.orelse[0]
    return found | {"": ast.unparse(branch).split("(")[0]}


def test_every_stage_has_its_function() -> None:
    text = Path(stages.__file__).read_text("utf-8")
    found = dispatched(text)
    last = found.pop("")
    (missing,) = STAGES.keys() - found.keys()
    assert found | {missing: last} == STAGES
    assert sorted(getattr(stages, name) for name in STAGES) == list(range(len(STAGES)))
    planted = text.replace("        out_in(s, products", "        ffn_in(s, products")
    assert dispatched(planted)["OUT_IN"] == "ffn_in" != STAGES["OUT_IN"]


def test_the_functions_stand_in_the_order_of_the_schedule() -> None:
    """`forward`'s calls of `run_stage`, and the definitions in `stages`."""
    tree = ast.parse(Path(forward.__file__).read_text("utf-8"))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    run = [c for c in calls if ast.unparse(c.func) == "run_stage"]
    run.sort(key=lambda call: call.lineno)
    order = [ast.unparse(c.args[2]) for c in run]
    assert set(order) == set(STAGES)
    defined = ast.parse(Path(stages.__file__).read_text("utf-8")).body
    names = [n.name for n in defined if isinstance(n, ast.FunctionDef)]
    wanted = [STAGES[stage] for stage in dict.fromkeys(order) if stage != "ROWS"]  # after each
    assert [name for name in names if name in wanted] == wanted


@pytest.mark.parametrize(
    "apart", [("tokens", "logits"), ("logits", "from_row"), ("draft_vocab", "confidence_max")]
)
def test_fields_written_at_once_must_lie_in_a_row(apart: tuple[str, str]) -> None:
    assert row("tokens", "from_row")[0].size == 16
    with pytest.raises(AssertionError, match="does not lie behind"):
        row(*apart)
