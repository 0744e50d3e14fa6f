"""Sharing a job's parts between the leader and helper threads.

`sync` (address of int64 [SYNC_WORDS], one cache line each) holds

    WORK      number of the job << 32 | parts not yet taken
    PENDING   parts not yet finished
    STOP      not 0: helpers leave

The leader writes the job into the state, then PENDING, then WORK. Whoever lowers WORK by one owns
that part, and the state cannot change before PENDING is 0; the job's number in WORK keeps a helper
that was away from mistaking a later job for the one it saw. Parts are taken as they come: a
helper that the operating system keeps waiting holds up at most the part in its hands.
"""

from __future__ import annotations

from bitskip_cpu.kernels import sync
from bitskip_cpu.kernels.inner import inner
from bitskip_cpu.kernels.jobs import run_part

atomic_read, atomic_write, atomic_add = sync.read, sync.write, sync.add
exchange, pause, sleep = sync.exchange, sync.pause, sync.sleep

WORK, PENDING, STOP = 0, 64, 128  # bytes from `sync`
SYNC_WORDS = 24
LEFT = 0xFFFFFFFF

SPINS = 2_000  # of some 40 ns: as long as the gaps within a token
NAP = 100  # microseconds between looks after that
NAPS = 300  # then the helper goes back to Python, to sleep until it is called


@inner
def take_parts(s, products, thread):
    """Run parts of the present job until none is left to take."""
    while True:
        work = atomic_read(s.sync + WORK)
        left = work & LEFT
        if left == 0:
            return
        if exchange(s.sync + WORK, work, work - 1):
            run_part(s, products, thread, s.count - left)
            atomic_add(s.sync + PENDING, -1)


@inner
def share(s, products, job, count, cost):
    """Run `count` parts of a job, alone if it is the only one or too cheap to share.

    `cost` is in bytes to read, about; SHARED of them take as long as waking somebody.
    """
    s.job = job
    if s.helpers == 0 or count == 1 or cost < s.worth:
        for part in range(count):
            run_part(s, products, 0, part)
        return
    s.count = count
    atomic_write(s.sync + PENDING, count)
    number = (atomic_read(s.sync + WORK) >> 32) + 1
    atomic_write(s.sync + WORK, number << 32 | count)
    take_parts(s, products, 0)
    spins = 0
    while atomic_read(s.sync + PENDING):
        pause()
        spins += 1
        if spins > SPINS:
            sleep(1)


@inner
def help_out(s, products, thread):
    """A helper's life: parts while there are any, then waiting, then leave."""
    idle = 0
    while atomic_read(s.sync + STOP) == 0 and idle < SPINS + NAPS:
        if atomic_read(s.sync + WORK) & LEFT:
            take_parts(s, products, thread)
            idle = 0
        idle += 1
        if idle < SPINS:
            pause()
        else:
            sleep(NAP)
