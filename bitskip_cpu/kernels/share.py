"""Sharing a stage's parts between the leader and helper threads.

`sync` (address of int64 [sync_words], one cache line each, but for what follows AHEAD) holds

    STAGE     number of the latest stage that was shared; the leader's own
    AHEAD     number of the stage whose weights are known, so that they can be read before it
    ...AT, ...END, ...PART, ...APART    where they begin and end, bytes of a part, and how many
              further on its other half is (0: it has none)
    PENDING   parts not yet finished, as far as threads have told
    STOP      not 0: helpers leave
    RANGES    for each thread: number of the stage << 32 | begin << 16 | end of its parts left

The leader writes the stage into the state, then PENDING and the ranges; a helper looks at its own.
Each thread takes parts from its own range upwards, so that it reads memory in order, and when that
is empty from the ends of the others'. Whoever changes a range's word owns the part, and the state
cannot change before PENDING is 0, which threads count down when they find no more to take; the
stage's number in the word keeps a helper that was away from mistaking a later stage for the one it
saw. A helper that the operating system keeps waiting holds up at most the part in its hands.

What follows AHEAD is overwritten only after the stage of that number was shared, so of each number
once: who finds an older one in its range has read what belongs together.
"""

from __future__ import annotations

from bitskip_cpu.kernels.layout import (
    SYNC_AHEAD,
    SYNC_AHEAD_APART,
    SYNC_AHEAD_AT,
    SYNC_AHEAD_END,
    SYNC_AHEAD_PART,
    SYNC_PENDING,
    SYNC_RANGES,
    SYNC_STAGE,
    SYNC_STOP,
)
from bitskip_cpu.kernels.numba_inside import atomics
from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.products.ternary_layout import LINE
from bitskip_cpu.kernels.stages import run_part

atomic_read, atomic_write, atomic_add = atomics.read, atomics.write, atomics.add
exchange, pause, sleep = atomics.exchange, atomics.pause, atomics.sleep
touch = atomics.touch

MOST_PARTS = 0xFFFF
NUMBER = 0xFFFFFFFF

SPINS = 2_000  # of some 40 ns: as long as the gaps within a token
NAP = 100  # microseconds between looks after that
NAPS = 300  # then the helper goes back to Python, to sleep until it is called

AHEAD = 1 << 18  # bytes of its part of the next product that a thread reads while it waits
LINES = 16  # of LINE bytes, between two looks whether that has begun


@kernel
def shared(s, parts, cost):
    """Whether a stage is: if not, sharing would cost more than it saves."""
    return s.helpers > 0 and parts > 1 and cost >= s.share_from


@kernel
def tell_ahead(s):
    """Tell helpers which weights the next stage to be shared reads, if they do not know."""
    number = (atomic_read(s.sync + SYNC_STAGE) + 1) & NUMBER
    if s.ahead_bytes and atomic_read(s.sync + SYNC_AHEAD) != number:
        atomic_write(s.sync + SYNC_AHEAD_AT, s.ahead)
        atomic_write(s.sync + SYNC_AHEAD_END, s.ahead + s.ahead_bytes)
        atomic_write(s.sync + SYNC_AHEAD_PART, s.ahead_part)
        atomic_write(s.sync + SYNC_AHEAD_APART, s.ahead_apart)
        atomic_write(s.sync + SYNC_AHEAD, number)


@kernel
def seen_stage(s, thread):
    """The number of the latest stage that a thread's range is of."""
    return (atomic_read(s.sync + SYNC_RANGES + 64 * thread) >> 32) & NUMBER


@kernel
def waits(s, thread, stage):
    """Whether a thread that found no more to take of a stage is still to wait."""
    if thread:
        return seen_stage(s, thread) == stage
    return atomic_read(s.sync + SYNC_PENDING) != 0


@kernel
def read_ahead(s, thread, stage):
    """Read the first of the weights that a thread needs after `stage`, as long as it waits.

    Return whether they are known. Memory would lie idle while another ends the stage, or while the
    leader computes what one thread computes.
    """
    if atomic_read(s.sync + SYNC_AHEAD) != (stage + 1) & NUMBER:
        return False
    first, last = atomic_read(s.sync + SYNC_AHEAD_AT), atomic_read(s.sync + SYNC_AHEAD_END)
    part_bytes, threads = atomic_read(s.sync + SYNC_AHEAD_PART), s.helpers + 1
    apart = atomic_read(s.sync + SYNC_AHEAD_APART)
    parts = ((apart or last - first) + part_bytes - 1) // part_bytes
    at = first + thread * parts // threads * part_bytes
    most = AHEAD // 2 if apart else AHEAD
    stop = min(first + (thread + 1) * parts // threads * part_bytes, last, at + most)
    at = at // LINE * LINE
    while at < stop and waits(s, thread, stage):
        touch_lines(at, stop)
        if apart:
            touch_lines(at + apart, min(stop + apart, last))
        at += LINES * LINE
    return True


@kernel
def touch_lines(at, stop):
    """Read the next LINES lines, if they begin before `stop`."""
    touch(at, min(LINES, max(0, (stop - at + LINE - 1) // LINE)))


@kernel
def take_parts(s, products, thread, done):
    """Run parts of the stage at hand until none is left to take; `done`: those it has run."""
    threads = s.helpers + 1
    for i in range(threads):
        at = s.sync + SYNC_RANGES + 64 * ((thread + i) % threads)
        while True:
            work = atomic_read(at)
            begin, end = (work >> 16) & MOST_PARTS, work & MOST_PARTS
            if begin >= end:
                break
            # One's own from the front, another's from the back.
            part, rest = (begin, work + (1 << 16)) if i == 0 else (end - 1, work - 1)
            if exchange(at, work, rest):
                run_part(s, products, thread, part)
                done += 1
    if done:
        atomic_add(s.sync + SYNC_PENDING, -done)


@kernel
def run_stage(s, products, stage, parts, cost):
    """Run a stage of `parts` <= MOST_PARTS; `cost`: bytes read, roughly."""
    s.stage = stage
    if not shared(s, parts, cost):
        if s.helpers:
            tell_ahead(s)
        for part in range(parts):
            run_part(s, products, 0, part)
        return
    atomic_write(s.sync + SYNC_PENDING, parts)
    threads, number = s.helpers + 1, (atomic_read(s.sync + SYNC_STAGE) + 1) & NUMBER
    atomic_write(s.sync + SYNC_STAGE, number)
    first = min(1, parts // threads)  # the leader's own, if it has one, is not asked for
    for i in range(threads):
        begin, end = i * parts // threads, (i + 1) * parts // threads
        begin = begin if i else first
        atomic_write(s.sync + SYNC_RANGES + 64 * i, number << 32 | begin << 16 | end)
    tell_ahead(s)
    if first:
        run_part(s, products, 0, 0)
    take_parts(s, products, 0, first)
    read_ahead(s, 0, number)
    spins = 0
    while atomic_read(s.sync + SYNC_PENDING):
        pause()
        spins += 1
        if spins > SPINS:
            sleep(1)


@kernel
def help_out(s, products, thread):
    """Live as a helper: run parts while there are any, then wait, then leave."""
    idle, seen, read = 0, -1, -1
    while atomic_read(s.sync + SYNC_STOP) == 0 and idle < SPINS + NAPS:
        number = seen_stage(s, thread)
        if number != seen:
            seen = number
            take_parts(s, products, thread, 0)
            idle = 0
        elif read != seen and read_ahead(s, thread, seen):
            read = seen
        idle += 1
        if idle < SPINS:
            pause()
        else:
            sleep(NAP)
