"""How drafting of one text goes, and how many drafts that makes worth while (SPEC 11.4)."""

from __future__ import annotations

from bitskip_ref.decoding.draft import MOST

RETRY = 8


class Pace:
    """SPEC 11.4's K, from the drafts that were judged and those of them that were right."""

    def __init__(self, cost: float) -> None:
        """cost: c of 11.4, what a draft costs beside a token."""
        self._cost, self._judged, self._right, self._idle = cost, 4.0, 3.0, 0

    def count(self) -> int:
        """Drafts of the next round; one where none is worth while, once in RETRY rounds."""
        rate, cost = self._right / self._judged, self._cost
        total, power, count = 1.0, rate, 0
        while count < MOST and (total + power) * (1 + cost * count) > total * (
            1 + cost * (count + 1)
        ):
            total, power, count = total + power, power * rate, count + 1
        if count == 0:
            self._idle = (self._idle + 1) % RETRY
            return int(self._idle == 0)
        return count

    def note(self, drafted: int, accepted: int) -> None:
        """A round is over."""
        self._judged += min(accepted + 1, drafted)
        self._right += accepted
        if self._judged >= 64:
            self._judged, self._right = self._judged / 2, self._right / 2


class Tally:
    """What became of a text's drafts so far."""

    draft_exit: int | None = None  # where drafts come from; None: from no exit

    def __init__(self) -> None:
        self.rounds = 0  # passes that verified drafts
        self.drafted = 0  # tokens that were drafted and verified
        self.accepted = 0  # those that became text

    def statistics(self) -> dict[str, int | float | None]:
        """What became of the drafts; `acceptance` is None without any, as without a round."""
        return {
            "draft_exit": self.draft_exit,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance": self.accepted / self.drafted if self.drafted else None,
            "accepted_per_round": self.accepted / self.rounds if self.rounds else None,
        }

    def note(self, drafted: int, accepted: int) -> None:
        """A round is over."""
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
