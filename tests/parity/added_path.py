"""Paths that are not in `bitskip_cpu.isa`, added as a contributor would: a record, maybe a `dot`.

And paths whose weights are read as no CPU at hand may want it: both halves of a product in turns.

`python -m tests.parity.added_path PATH NAME ...` compares an engine on that path with the
reference, as `engine_check` does.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

from bitskip_cpu import isa
from bitskip_cpu.isa import Fetch, Path

HALVES = Fetch("halves", halves=True)
ADDED = [
    *(replace(path, name=f"halves-{path.name}", matrix_unit=False, fetch=HALVES)
      for path in isa.PATHS if path.name in ("vbmi512", "vnni512", "avx2", "plain")),
    # VNNI in registers of 256 bits with thresholds of its own: nothing but a record.
    Path("narrow", ("avx512vl", "avx512vnni"), width=32, panel=(2, 2), unpack_above=5,
         bytes_above=1),
    # 128 bits and no special instruction: a record and a `dot`.
    Path("widening", (), dot="widening", width=16, panel=(1, 3), unpack_above=9, bytes_above=2),
    # Plain loops with other thresholds, which can also be interpreted.
    Path("eager", (), kernels="plain", unpack_above=1),
]  # fmt: skip


def widening(builder: Any, total: Any, u: Any, s: Any) -> Any:
    """u8 * s8 products widened to 32 bits, four of them added to each lane."""
    from llvmlite import ir

    from bitskip_cpu.kernels.products.dot import INT, INTS, WIDTH

    wide = ir.VectorType(INT, WIDTH)
    products = builder.mul(builder.zext(u, wide), builder.sext(s, wide))
    for i in range(4):
        lanes = ir.Constant(INTS, list(range(i, WIDTH, 4)))
        total = builder.add(total, builder.shuffle_vector(products, products, lanes))
    return total


def main(path: str, names: list[str]) -> None:
    """Add the paths, choose one, and only then declare kernels."""
    isa.PATHS[:0] = ADDED
    isa.PATH = isa.choose_path(path)
    if path.startswith("halves"):
        from bitskip_cpu.kernels import parts

        isa.PATH = replace(isa.PATH, fetch=HALVES)  # not what this CPU wants
        parts.PART_BYTES = 1  # so that small products have parts of two runs, too
    if isa.PATH.compiled:
        from bitskip_cpu.kernels.products.dot import DOTS

        DOTS["widening"] = widening
    from tests.parity.engine_check import check_named

    problems = {name: check_named(name) for name in names}
    print(json.dumps({"path": isa.PATH.name, "problems": problems}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
