"""A generated text as one HTML file: how deep, and how long, each token ran. Nothing is loaded."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from bitskip_cpu.cli.showing import counts
from bitskip_cpu.colours import css, depth_colour, ink
from bitskip_cpu.generate import Piece, TextStream
from bitskip_cpu.generation_options import GenerationOptions
from bitskip_cpu.model import Model
from bitskip_ref.exits.named import rule_label
from bitskip_ref.files import replace_file

BAR, GAP = 60, 14  # heights in the chart: of the bars, between the two rows

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --dim: #5c5c5c; --line: #d0d0d0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181c; --ink: #e8e8e8; --dim: #a4a8b0; --line: #3c4048; }
}
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 2rem 0 .5rem; }
#text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 2.1; font-size: 1.05rem; }
.prompt { color: var(--dim); }
.t { border-radius: 3px; padding: .12em 0; }
.t:hover { outline: 2px solid var(--ink); }
body:has(#numbers:checked) .t::after { content: attr(data-d); font-size: .6em;
  vertical-align: super; padding: 0 .15em; }
ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .4rem 1rem; }
.chip { border-radius: 3px; padding: .1em .5em; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: 11rem; border: 1px solid var(--line); }
svg g:hover { fill: var(--ink); }
figcaption, .note { color: var(--dim); font-size: .85rem; } figure { margin: 0; }
table { border-collapse: collapse; font-size: .9rem; }
td, th { text-align: left; padding: .15rem 1rem .15rem 0; border-bottom: 1px solid var(--line);
  font-weight: normal; vertical-align: top; }
th { color: var(--dim); }
"""


def write_page(
    path: Path,
    prompt: str,
    pieces: Sequence[Piece],
    stream: TextStream,
    model: Model,
    options: GenerationOptions,
) -> None:
    """Write the page of what `stream` gave, whole or not at all; `options` made it."""
    g, config = stream.generation(), model.config
    settings: dict[str, object] = {
        "model": model.folder.path.name,
        "exit": rule_label(stream.rule, config),
        "tokens": f"{g.prompt_tokens} of the prompt, {len(g.token_ids)} generated",
        "ended": g.stop_reason.replace("_", " "),
    }
    if g.mean_exit_layer is not None:
        settings["mean exit layer"] = f"{g.mean_exit_layer:.2f} of {config.num_hidden_layers}"
    if g.ttft_s is not None:
        settings["first token after"] = f"{g.ttft_s * 1e3:.1f} ms"
    if g.decode_tokens_per_s is not None:
        settings["tokens/s after it"] = f"{g.decode_tokens_per_s:.0f}"
    if g.speculation is not None:
        settings |= g.speculation.statistics()
    settings["threads"] = model.threads
    shown = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_tokens")
    options = options.recommended(model.folder)
    settings |= {name.replace("_", " "): getattr(options, name) for name in shown}
    with replace_file(path) as file:
        file.write(page(prompt, pieces, config.num_hidden_layers, settings).encode())


def page(prompt: str, pieces: Sequence[Piece], blocks: int, settings: Mapping[str, object]) -> str:
    """The page's source."""
    tokens = [p for p in pieces if p.exit_layer is not None]
    depths = [p.exit_layer for p in tokens if p.exit_layer is not None]
    chips = [
        f'<li><span class="chip d{depth}">{depth}</span> {count} '
        f"({100 * count / len(depths):.0f} %)</li>"
        for depth, count in counts(depths)
    ]
    rows = [f"<tr><th>{_safe(k)}</th><td>{_safe(str(v))}</td></tr>" for k, v in settings.items()]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Exit layers of a text</title>
<style>{STYLE}{_colours(depths, blocks)}</style>
</head>
<body>
<h1>Exit layers of a text</h1>
<ul aria-label="Tokens by exit layer">
<li>tokens by exit layer (of {blocks}):</li>
{"".join(chips)}
<li><label><input type="checkbox" id="numbers"> numbers</label></li>
</ul>
<p id="text"><span class="prompt">{_safe(prompt)}</span>{"".join(map(_token, pieces))}</p>
<p class="note">Point at a token for its exit layer and time. The grey text is the prompt. A token
that holds part of a character appears with the one that completes it.</p>
<h2>Token by token</h2>
{_chart(tokens, blocks)}
<h2>Settings</h2>
<table>
{"".join(rows)}
</table>
</body>
</html>
"""


def _token(piece: Piece) -> str:
    """A piece of the text; what has no token of its own was held back until then."""
    if not piece.text:
        return ""
    if piece.exit_layer is None:
        return _safe(piece.text)
    n = piece.exit_layer
    return f'<span class="t d{n}" data-d="{n}" title="{_about(piece)}">{_safe(piece.text)}</span>'


def _about(piece: Piece) -> str:
    time = "" if piece.seconds is None else f", {piece.seconds * 1e3:.2f} ms"
    return f"exit layer {piece.exit_layer}{time}, token {piece.token_id}"


def _chart(tokens: Sequence[Piece], blocks: int) -> str:
    """Two rows of bars, one a token: its depth, and its time."""
    if not tokens:
        return "<p>No tokens.</p>"
    times = [p.seconds or 0.0 for p in tokens]
    # One slow token (the first has the prompt before it) shall not flatten all others.
    most = max(1e-9, sorted(times)[int(0.98 * (len(times) - 1))])
    bars = []
    for k, (p, time) in enumerate(zip(tokens, times, strict=True)):
        depth = p.exit_layer or 0
        fill = css(depth_colour(depth, blocks))
        bars.append(f'<g fill="{fill}"><title>{_safe(p.text)}: {_about(p)}</title>')
        for bottom, share in ((BAR, depth / blocks), (2 * BAR + GAP, min(1.0, time / most))):
            high = max(0.5, share * BAR)
            place = f'x="{k}" y="{bottom - high:.1f}" width="1" height="{high:.1f}"'
            bars.append(f"<rect {place}/>")
        bars.append("</g>")
    caption = (
        f"Above: blocks run, of {blocks}. Below: time; the full height is {most * 1e3:.2f} ms, "
        f"longest {max(times) * 1e3:.2f} ms (the first token's includes the prompt)."
    )
    return (
        f'<figure><svg viewBox="0 0 {len(tokens)} {2 * BAR + GAP}" preserveAspectRatio="none" '
        f'role="img" aria-label="Depth and time of each token">{"".join(bars)}</svg>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _colours(depths: Sequence[int], blocks: int) -> str:
    """A class for each exit layer, its text black or white, whichever reads better."""
    rules = []
    for depth, _ in counts(depths):
        colour = depth_colour(depth, blocks)
        rules.append(f".d{depth} {{ background: {css(colour)}; color: {css(ink(colour))}; }}")
    return "\n".join(rules)


def _safe(text: str) -> str:
    """Text for HTML: escaped, and without characters that it may not hold."""
    allowed = (
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text
    )
    return html.escape("".join(allowed))
