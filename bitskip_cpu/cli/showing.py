"""Each token in the colour of its exit layer, on a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import IO

from rich.color import Color
from rich.console import COLOR_SYSTEMS, Console
from rich.style import Style

from bitskip_cpu.colours import RGB, depth_colour, ink
from bitskip_cpu.generate import Piece


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
            name = str(depth) if self._system is None else self._style(f" {depth} ", depth)
            parts.append(f"{name}: {count} ({100 * count / len(depths):.0f} %)")
        return "  ".join(parts)

    def _style(self, text: str, depth: int) -> str:
        if self._system is None or not text:
            return text
        colour = depth_colour(depth, self.blocks)
        style = Style(color=_rich(ink(colour)), bgcolor=_rich(colour))
        # By lines: a terminal would paint a line's end to its border.
        lines = text.split("\n")
        return "\n".join(style.render(x, color_system=self._system) if x else "" for x in lines)


def _rich(colour: RGB) -> Color:
    return Color.from_rgb(*colour)
