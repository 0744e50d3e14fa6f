"""Drawing a token from logits (SPEC 9.2), without putting the vocabulary in order.

Weights are whole multiples of 2^-32, so their sums are exact however they are added. Ids are taken
best first from heaps, each of the ids that lie STEP further below the largest than those before:
mostly a few ids of the first heap decide. Arguments named `*_at` are addresses.
"""

from __future__ import annotations

import numpy as np

from bitskip_cpu.kernels.arithmetic.elementwise import INFINITY
from bitskip_cpu.kernels.arithmetic.exponential import exp_differences
from bitskip_cpu.kernels.layout import LANES
from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.numba_inside.pieces import piece
from bitskip_cpu.kernels.numba_inside.views import float64s, floats, int32s

f32, f64, i32, i64 = np.float32, np.float64, np.int32, np.int64

STEP = f32(4.0)
LAST = f32(-24.0)  # a multiple of STEP; what lies below weighs nothing: exp(-24) < 2^-33
UNITS = f64(2.0**32)
ROUNDER = f64(1.5 * 2.0**52)  # x + ROUNDER is rounded to a whole number, ties to even
ROUNDER_BITS = np.float64(1.5 * 2.0**52).view(np.int64)


@piece
def choose(s, scratch, largest):
    """SPEC 9.2's token of the logits at hand, the id of the largest given -> `drawn`; -1: none."""
    top = floats(s.logits, s.choices)[largest]
    s.drawn = -1
    if abs(top / s.temperature) < INFINITY:
        filters, u = float64s(s.filters, 2), float64s(s.draws, s.followed + 1)[s.followed]
        s.drawn = draw(
            s.logits, s.choices, top, s.temperature, s.top_k, filters[0], filters[1], s.reach, u,
            s.choice_room,
        )  # fmt: skip


@kernel
def weight(e):
    """A weight as so many 2^-32 (SPEC 9.2)."""
    return i64(f64(f64(e) * UNITS + ROUNDER).view(i64) - ROUNDER_BITS)


@kernel
def before(z, a, b):
    """Whether id a stands before id b in SPEC 9.2's order."""
    return z[a] > z[b] or (z[a] == z[b] and a < b)


@kernel
def sink(z, heap, i, n):
    """Let entry i of a heap of n ids sink below those that stand before it."""
    moved = heap[i]
    child = 2 * i + 1
    while child < n:
        if child + 1 < n and before(z, heap[child + 1], heap[child]):
            child += 1
        if not before(z, heap[child], moved):
            break
        heap[i] = heap[child]
        i, child = child, 2 * child + 1
    heap[i] = moved


@kernel
def within(z_at, n, top, least, most, heap):
    """Ids with least <= z - top < most, in their order; how many."""
    z, found = floats(z_at, n), 0
    for start in range(0, n, LANES):
        stop, some = min(start + LANES, n), i32(0)
        for i in range(start, stop):
            some = i32(some | i32(z[i] - top >= least))
        if some:
            for i in range(start, stop):
                heap[found] = i
                d = z[i] - top
                found += 1 if d >= least and d < most else 0
    return found


@kernel
def draw(z_at, n, largest, temperature, top_k, top_p, min_p, reach, u, room_at):
    """The id that SPEC 9.2 chooses among n logits by a draw u; `largest`: the largest of them.

    top_p, min_p and u are binary64. reach, below 0: the weight of a logit further than that below
    the largest is less than min_p. Room: 16 bytes a logit (tempered, weight, id in a heap, id
    taken), and 4.
    """
    z, y_at, e_at = floats(z_at, n), room_at, room_at + 4 * n
    y, e = floats(y_at, n), floats(e_at, n)
    heap, taken = int32s(room_at + 8 * n, n + 1), int32s(room_at + 12 * n + 4, n)
    for i in range(n):
        y[i] = z[i] / temperature
    top = largest / temperature
    exp_differences(y_at, top, e_at, n)
    total = i64(0)
    for i in range(n):
        total = i64(total + weight(e[i]))
    plain = top_k == 0 and top_p == 1.0 and min_p == 0.0
    most = top_k if top_k > 0 else n
    goal = (u if plain else top_p) * f64(total)
    all_count = top_k > 0 and top_p < 1.0  # top-p is a share of what top-k leaves, min-p or not
    count, running, done = 0, i64(0), False
    above, below = f32(1.0), -STEP
    while not done and above > LAST:
        size = within(y_at, n, top, below, above, heap)
        for i in range(size // 2 - 1, -1, -1):
            sink(y, heap, i, size)
        while size > 0 and not done:
            token = i64(heap[0])
            size -= 1
            heap[0] = heap[size]
            sink(y, heap, 0, size)
            taken[count] = token
            count += 1
            running = i64(running + weight(e[token]))
            if plain:
                done = f64(running) > goal
            else:
                done = count == most or (y[token] - top < reach and not all_count)
                if top_k == 0:
                    done = done or f64(running) >= goal
        above, below = below, f32(below - STEP)
    if plain:
        return i64(taken[count - 1])
    if top_k > 0:
        goal = top_p * f64(running)
    least, left, kept, running = min_p * UNITS, i64(0), 0, i64(0)
    while kept < count and (kept == 0 or f64(running) < goal):
        w = weight(e[i64(taken[kept])])
        running = i64(running + w)
        left = i64(left + (w if f64(w) >= least else i64(0)))
        kept += 1
    goal, running, token = u * f64(left), i64(0), i64(taken[0])
    for i in range(kept):
        w = weight(e[i64(taken[i])])
        if f64(w) >= least and not f64(running) > goal:
            token = i64(taken[i])
            running = i64(running + w)
    return token
