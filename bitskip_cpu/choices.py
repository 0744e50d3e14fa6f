"""What kernels are told about choosing tokens within a call."""

from __future__ import annotations

import numpy as np

from bitskip_cpu.aligned import aligned
from bitskip_cpu.compiling import KERNELS
from bitskip_cpu.kernels.layout import STATE, row
from bitskip_ref.decoding.choice import MOST, Chosen
from bitskip_ref.decoding.sampling import uniform

CHOICE, CHOICE_AT = row(
    "followed", "most_followed", "seen_count", "end_count", "choices", "top_k", "penalty",
    "temperature", "reach",
)  # fmt: skip
FOLLOWED, DRAWN = (STATE.fields[name][1] // 8 for name in ("followed", "drawn"))  # type: ignore[index]


class Choices:
    """The part of a workspace's state that STEPS and CHOOSE look at."""

    def __init__(self, state: np.void, memory: memoryview, ids: np.ndarray, vocab: int) -> None:
        """memory: the bytes of the state. ids: int32 [CHUNK], the workspace's."""
        self._state, self._memory, self._words = state, memory, memory.cast("q")
        self._ids, self._vocab = ids, vocab
        self._seen, self._ends = (aligned((vocab,), np.int32) for _ in range(2))
        before = aligned((vocab,), np.float32, zeros=False)
        self._arrays = self._put(seen=self._seen, ends=self._ends, before=before)

    def _put(self, **arrays: np.ndarray) -> list[np.ndarray]:
        """Tell the state where they are; they have to be kept."""
        for name, array in arrays.items():
            self._state[name] = array.ctypes.data
        return list(arrays.values())

    def set(self, count: int, chosen: Chosen, choices: int) -> None:
        """At most so many tokens after the one at hand, each among the first `choices` logits.

        A count of 0: one, among logits that are given.
        """
        how, seen = chosen.sampler, chosen.seen[chosen.seen < choices]
        self._seen[: len(seen)], self._ends[: len(chosen.ends)] = seen, chosen.ends
        if how.temperature:
            if not self._state["choose"]:
                self._room()
            self._filters[:] = how.top_p, how.min_p
            for i in range(max(1, count)):
                self._draws[i] = uniform(how.seed, chosen.made + i)
        CHOICE.pack_into(
            self._memory, CHOICE_AT, 0, count, len(seen), len(chosen.ends), choices,
            how.top_k if how.top_k < choices else 0, how.repetition_penalty, how.temperature,
            -how.reach,
        )  # fmt: skip

    def _room(self) -> None:
        """Have the piece `choose`, and what it works in."""
        self._filters, self._draws = aligned((2,), np.float64), aligned((MOST,), np.float64)
        room = aligned((16 * self._vocab + 4,), np.uint8, zeros=False)
        self._arrays += self._put(filters=self._filters, draws=self._draws, choice_room=room)
        self._state["choose"] = KERNELS.piece("choose")

    @property
    def drawn(self) -> int:
        """The token that CHOOSE left; -1: none."""
        return self._words[DRAWN]

    @property
    def followed(self) -> list[int]:
        """The tokens that STEPS went on with."""
        found: list[int] = self._ids[1 : 1 + self._words[FOLLOWED]].tolist()
        return found
