"""The path `dotprod` compiled on another machine: `python -m tests.kernels.arm FOLDER`.

Writes each kernel as AArch64 assembly (.s) and object file (.o), and main.c, which calls them on
ARM and names those whose sums differ from the exact ones. The kernels are typed and optimized by
this machine's Numba, and only then given another target.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np

from bitskip_cpu import isa

TRIPLE = "aarch64-unknown-linux-gnu"
WIDTH, ROWS, TOKENS = 300, 29, 8  # one unit of columns and a tail; two tiles; all that a call takes
TERNARY = {f"packed_{n}": n for n in (1, 2, 3, 4, 8)}  # tokens of a call
VOCAB = {f"int{bits}_{tokens}": (bits, tokens) for bits in (4, 6, 8) for tokens in (1, 4)}
CACHE = {"scores_4": 14, "values_2": 11}  # number of arguments; an int8 cache's (SPEC 6.8)
FLOATS = {"silu_products": 4, "dot_tree": 4, "rope": 4}  # number of arguments


def for_arm(module: llvm.ModuleRef, folder: Path, name: str) -> None:
    """Write a module's assembly and object file."""
    machine = llvm.Target.from_triple(TRIPLE).create_target_machine(
        cpu="neoverse-n1", features="+dotprod", opt=3, reloc="pic"
    )
    module.triple, module.data_layout = TRIPLE, str(machine.target_data)
    (folder / f"{name}.s").write_text(machine.emit_assembly(module))
    (folder / f"{name}.o").write_bytes(machine.emit_object(module))


def c_array(name: str, array: np.ndarray) -> str:
    """Definition of an array in C."""
    kind = f"{array.dtype}_t"
    values = ",".join(map(str, array.reshape(-1).tolist()))
    return f"static {kind} {name}[] __attribute__((aligned(64))) = {{{values}}};\n"


class Program:
    """main.c: data, calls, comparisons."""

    def __init__(self) -> None:
        self.data, self.calls, self.declared = "", "", set[str]()

    def array(self, name: str, array: np.ndarray) -> str:
        """Define data; the name."""
        self.data += c_array(name, array)
        return name

    def call(self, kernel: str, *arguments: str | int) -> None:
        """Call by Numba's convention: two places, then int64."""
        if kernel not in self.declared:
            self.declared.add(kernel)
            self.data += f"int {kernel}(void *, void *{', int64_t' * len(arguments)});\n"
        passed = ", ".join(f"(int64_t)({a})" for a in arguments)
        self.calls += f"  {kernel}(places, places + 1, {passed});\n"

    def compare(self, kernel: str, found: str, exact: np.ndarray, row: int) -> None:
        """Exact [T, N] against found, `row` int32 from one token's sums to the next."""
        name = self.array(f"exact_{self.calls.count('compare')}", exact.astype(np.int32))
        tokens, count = exact.shape
        self.calls += f'  compare("{kernel}", {found}, {row}, {name}, {tokens}, {count});\n'

    def source(self) -> str:
        """The program; with an argument, one sum is wrong on purpose."""
        return f"""
#include <stdint.h>
#include <stdio.h>
#include <string.h>
{self.data}
static void *places[2];
static int wrong;
static void compare(const char *name, int32_t *found, int row, int32_t *exact, int t, int n) {{
  for (int i = 0; i < t; i++)
    if (memcmp(found + i * row, exact + i * n, 4 * n)) {{ puts(name); wrong = 1; return; }}
}}
int main(int count, char **words) {{
  exact_0[7] += count > 1;
{self.calls}
  puts("compared");
  return wrong;
}}
"""


def ternary(program: Program) -> None:
    """Packed rows -> tiles -> sums, packed and unpacked."""
    from bitskip_cpu.kernels.products import ternary_layout
    from bitskip_ref.packing import pack_ternary

    rng = np.random.default_rng(0)
    weights = rng.integers(-1, 2, (ROWS, WIDTH)).astype(np.int8)
    packed = pack_ternary(weights)
    padded, size = ternary_layout.padded_width(WIDTH), ternary_layout.tile_bytes(WIDTH)
    units, tail = ternary_layout.units(WIDTH), ternary_layout.tail_lines(WIDTH)
    codes = np.zeros((TOKENS, padded), np.int8)
    codes[:, :WIDTH] = rng.integers(-127, 128, (TOKENS, WIDTH))
    codes[0, :WIDTH] = 127
    exact = codes[:, :WIDTH].astype(np.int32) @ (weights.astype(np.int32) + 1).T
    scratch = 32 * (max(padded, 4 * packed.shape[1]) + 64) + 512
    program.array("packed", packed)
    program.array("codes", codes)
    program.data += f"static uint8_t tiled[{2 * size + 64}], scratch[{scratch}];\n"
    program.data += f"static uint8_t bytes[{2 * 16 * padded}];\nstatic int32_t out[{64 * 64}];\n"
    program.call("repack", "packed", packed.shape[1], ROWS, units, tail, "tiled", "scratch")
    for kernel, tokens in TERNARY.items():
        for i in range(2):
            program.call(kernel, f"tiled + {i * size}", units, tail, "codes", padded, tokens - 1,
                         f"out + {16 * i}", 256)  # fmt: skip
        program.compare(kernel, "out", exact[:tokens], 64)
        program.calls += "  memset(out, 7, sizeof out);\n"
    for i in range(2):
        unpacked = f"bytes + {i * 16 * padded}"
        program.call("unpack_tile", f"tiled + {i * size}", units, tail, unpacked)
        program.call("bytes_panel", unpacked, 16 * padded, 0, padded // 4,
                     "codes", padded, isa.PATH.panel[1] - 1, f"out + {16 * i}", 256)  # fmt: skip
    program.compare("bytes_panel", "out", exact[: isa.PATH.panel[1]], 64)


def vocabulary(program: Program) -> None:
    """Rows of 8, 6 and 4 bits."""
    from bitskip_cpu.kernels.products.vocab_layout import OFFSET, VOCAB_COLUMNS, pack, row_bytes

    rng = np.random.default_rng(1)
    rows = rng.integers(-127, 128, (16, 192)).astype(np.int8)
    codes = rng.integers(-127, 128, (4, 192)).astype(np.int8)
    rows[0], codes[0] = -127, 127
    program.array("head_codes", codes)
    for kernel, (bits, tokens) in VOCAB.items():
        top = 2 ** (bits - 1) - 1
        clipped = np.clip(rows, -top, top)
        packed = np.zeros((16, row_bytes(192, bits)), np.uint8)
        pack(clipped, bits, packed)
        tile = program.array(f"{kernel}_rows", packed)
        program.call(kernel, tile, 192 // VOCAB_COLUMNS, "head_codes", 192, tokens - 1, "out", 256)
        exact = codes.astype(np.int32) @ (clipped.astype(np.int32) + OFFSET[bits]).T
        program.compare(kernel, "out", exact[:tokens], 64)


def int8_cache(program: Program) -> None:
    """A page's scores with four queries, and its values with two."""
    rng = np.random.default_rng(2)
    keys, queries = (rng.integers(-127, 128, (n, 64)).astype(np.int8) for n in (16, 4))
    values = rng.integers(-127, 128, (16, 64)).astype(np.int8)
    weights = rng.integers(0, 128, (4, 16)).astype(np.uint8)
    keys[0], queries[0], values[:, 0], weights[0] = -127, 127, -127, 127
    (steps, value_steps), own = rng.random((2, 16), np.float32), rng.random(4, np.float32)
    page = [
        keys.reshape(16, 16, 4).swapaxes(0, 1).reshape(-1).view(np.uint8), steps.view(np.uint8),
        value_steps.view(np.uint8),
        values.reshape(4, 4, 64).swapaxes(1, 2).reshape(-1).view(np.uint8),
    ]  # fmt: skip
    sums = queries.astype(np.int32).sum(1, dtype=np.int32)
    program.array("cache_page", np.concatenate(page))
    program.array("cache_queries", queries)
    program.array("cache_facts", np.stack([own.view(np.int32), sums], 1))
    program.array("cache_weights", weights)
    tops = np.full((4, 64), -np.inf, np.float32)
    tops[1, 3] = 1e9
    program.array("cache_tops", tops.view(np.int32))
    program.array("cache_steps", np.zeros(16, np.int32))
    program.data += "static int64_t table[1];\n"
    program.calls += "  table[0] = (int64_t)cache_page;\n"
    program.call("scores_4", "table", 0, 0, 16, "cache_queries", 64, "cache_facts", 3, "out", 256,
                 "cache_tops", "cache_steps", "table", 0)  # fmt: skip
    scores = (queries.astype(np.int32) @ keys.astype(np.int32).T).astype(np.float32)
    scores *= own[:, None] * steps
    program.compare("scores_4", "out", scores.view(np.int32), 64)
    tops[:, :16] = np.maximum(tops[:, :16], scores)
    program.compare("scores_4", "cache_tops", tops.view(np.int32), 64)
    program.compare("scores_4", "cache_steps", value_steps[None].view(np.int32), 16)
    program.calls += "  memset(out, 0, sizeof out);\n"
    for line in range(4):
        program.call("values_2", "table", 1152, 1, 4, line, 3, "cache_weights", 16, 3,
                     f"out + {16 * line}", 256)  # fmt: skip
    exact = weights.astype(np.int32) @ values.astype(np.int32)
    program.compare("values_2", "out", exact, 64)


def outermost(kernel: Callable[..., None], arguments: int) -> Callable[..., None]:
    """A function that only calls a kernel; Numba wants its arguments one by one."""
    names = ", ".join(f"a{i}" for i in range(arguments))
    return eval(f"lambda {names}: kernel({names})", {"kernel": kernel})  # type: ignore[no-any-return]


def main(folder: Path) -> None:
    """Write all of it."""
    isa.ARM64 = True  # before any kernel is declared
    isa.PATH = next(path for path in isa.PATHS if path.name == "dotprod")
    from bitskip_cpu.kernels import object_code
    from bitskip_cpu.kernels.arithmetic import elementwise, exponential
    from bitskip_cpu.kernels.attention import attend, int8_passes
    from bitskip_cpu.kernels.products import simd

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    wanted: dict[str, tuple[Callable[..., None], int]] = {}  # kernel, arguments
    wanted["repack"] = object_code.FUNCTIONS["repack"], 7
    wanted |= {name: (getattr(simd, name), 8) for name in TERNARY}
    wanted |= {"unpack_tile": (simd.unpack_tile, 4), "bytes_panel": (simd.bytes_panel, 9)}
    wanted |= {name: (getattr(simd, name), 7) for name in VOCAB}
    wanted |= {name: (getattr(int8_passes, name), n) for name, n in CACHE.items()}
    wanted["weigh_page"] = attend.weighing(2), 8
    for name, arguments in FLOATS.items():
        found = (getattr(m, name, None) for m in (exponential, elementwise, attend))
        wanted[name] = next(f for f in found if f), arguments
    for name, (kernel, arguments) in wanted.items():
        object_code.FUNCTIONS.setdefault(name, outermost(kernel, arguments))
        for_arm(object_code.module(name, arguments), folder, name)
    program = Program()
    ternary(program)
    vocabulary(program)
    int8_cache(program)
    (folder / "main.c").write_text(program.source())
    (folder / "kernels.json").write_text(json.dumps(list(wanted)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
