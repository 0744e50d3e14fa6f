"""The one colour scale of depth: terminal, pages, server."""

from __future__ import annotations

RGB = tuple[int, int, int]

# Of Cividis, from few blocks (light) to all (dark): even in lightness, also for the colour-blind;
# without its ends, which a white or a black page would swallow.
SCALE: tuple[RGB, ...] = (
    (240, 208, 72), (203, 187, 105), (166, 157, 117), (124, 123, 120), (87, 93, 109), (42, 63, 109),
)  # fmt: skip
BLACK: RGB = (0, 0, 0)
WHITE: RGB = (255, 255, 255)


def depth_colour(depth: int, blocks: int) -> RGB:
    """The colour of a depth 1..L of L blocks: linear between those of the scale, evenly spaced."""
    place = (depth - 1) / max(1, blocks - 1) * (len(SCALE) - 1)
    low = min(int(place), len(SCALE) - 2)
    pairs = zip(SCALE[low], SCALE[low + 1], strict=True)
    r, g, b = (round(x + (place - low) * (y - x)) for x, y in pairs)
    return r, g, b


def ink(colour: RGB) -> RGB:
    """Black or white, whichever reads better on a colour: at 0.179 both contrast by 4.6 : 1."""
    return BLACK if luminance(colour) > 0.179 else WHITE


def luminance(colour: RGB) -> float:
    """Relative luminance of sRGB, 0..1 (WCAG 2)."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4
              for x in (c / 255 for c in colour)]  # fmt: skip
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def css(colour: RGB) -> str:
    """A colour as stylesheets write it."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def palette(blocks: int) -> list[tuple[str, str]]:
    """(background, ink) of each depth 1..L, as stylesheets write them."""
    colours = [depth_colour(depth, blocks) for depth in range(1, blocks + 1)]
    return [(css(colour), css(ink(colour))) for colour in colours]
