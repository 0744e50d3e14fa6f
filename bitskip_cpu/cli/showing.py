"""Each token in the colour of its exit layer, on a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import IO

from rich.console import COLOR_SYSTEMS, Console
from rich.style import Style

from bitskip_cpu.generate import Piece

RGB = tuple[int, int, int]

# From few blocks to all: told apart by the colour-blind, and read on light and on dark.
RAMP: tuple[RGB, ...] = ((43, 127, 235), (128, 134, 140), (222, 98, 20))


def ramp(colours: Sequence[RGB], depth: int, blocks: int) -> RGB:
    """The colour of an exit layer 1..L: linear between colours that are evenly spaced."""
    place = (depth - 1) / max(1, blocks - 1) * (len(colours) - 1)
    low = min(int(place), len(colours) - 2)
    pairs = zip(colours[low], colours[low + 1], strict=True)
    r, g, b = (round(x + (place - low) * (y - x)) for x, y in pairs)
    return r, g, b


def counts(depths: Sequence[int]) -> list[tuple[int, int]]:
    """(exit layer, tokens), from the shallowest."""
    return sorted(Counter(depths).items())


class Colours:
    """Colour codes of exit layers for a file: none but for a terminal.

    NO_COLOR in the environment takes them away, FORCE_COLOR brings them everywhere.
    """

    def __init__(self, blocks: int, file: IO[str]) -> None:
        """blocks: L."""
        console = Console(file=file)
        plain = console.no_color or console.color_system is None
        self._system = None if plain else COLOR_SYSTEMS[str(console.color_system)]
        self.blocks = blocks

    def paint(self, piece: Piece) -> str:
        """A piece's text in the colour of its exit layer."""
        return piece.text if piece.exit_layer is None else self._style(piece.text, piece.exit_layer)

    def legend(self, depths: Sequence[int]) -> str:
        """One line: which colour is which layer, and how many tokens it predicted."""
        parts = ["tokens by exit layer"]
        for depth, count in counts(depths):
            name = str(depth) if self._system is None else self._style(f"██ {depth}", depth)
            parts.append(f"{name}: {count} ({100 * count / len(depths):.0f} %)")
        return "  ".join(parts)

    def _style(self, text: str, depth: int) -> str:
        if self._system is None or not text:
            return text
        r, g, b = ramp(RAMP, depth, self.blocks)
        return Style(color=f"rgb({r},{g},{b})").render(text, color_system=self._system)
