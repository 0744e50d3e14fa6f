"""Which logits a token is chosen from (SPEC 9.6): what an engine is told that wants a token."""

from __future__ import annotations

from dataclasses import dataclass

from bitskip_ref.checks import is_number, is_whole
from bitskip_ref.excerpt import shown

MOST_CONTENDERS = 256  # beyond, finding them costs more than it saves
LEAST, LARGEST = 1e-6, 100.0  # what f32 logits are divided by, and stay finite


@dataclass(frozen=True)
class Contenders:
    """Logits that may be chosen; an engine may give -inf in place of all others.

    Those are, after division by `temperature` in f32, at least the `count`-th largest, less
    `reach`. The default is what greedy decoding chooses from: the largest.
    """

    count: int = 1
    temperature: float = 1.0
    reach: float = 0.0

    def check(self) -> None:
        """Raise ValueError for a value out of range."""
        if not is_whole(self.count) or not 1 <= self.count <= MOST_CONTENDERS:
            raise ValueError(f"{shown(self.count)} contenders: choose 1..{MOST_CONTENDERS}")
        for name, value, least in (
            ("at temperature", self.temperature, LEAST), ("within", self.reach, 0.0),
        ):  # fmt: skip
            if not is_number(value) or not least <= value <= LARGEST:
                raise ValueError(
                    f"contenders {name} {shown(value)}: must be between {least:g} and {LARGEST:g}"
                )


def check_contenders(contenders: Contenders | None) -> Contenders | None:
    """What an engine was given as such. Raises ValueError if it is none, or out of range."""
    if contenders is not None:
        if not isinstance(contenders, Contenders):
            raise ValueError(
                f"{shown(contenders)} is not which logits are asked for: give Contenders"
            )
        contenders.check()
    return contenders
