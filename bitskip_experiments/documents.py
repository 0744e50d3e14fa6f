"""Tables in the documents: copied from results, never typed.

Between `<!-- results: NAME -->` and `<!-- end -->` a document holds the tables of
`results/NAME/table.md`, or for NAME `claims` those of `results/claims.md`. `NAME, N` is the Nth
table of that page alone. An experiment without results has a line that says so.
`python -m bitskip_experiments.documents FILE...` brings files up to date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from bitskip_experiments.definitions import names
from bitskip_experiments.errors import ExperimentError
from bitskip_ref.files import replace_file

_BLOCK = re.compile(r"(<!-- results: ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def refresh(text: str, results: Path) -> str:
    """A document's text with its tables as the results have them. Raises ExperimentError."""
    return _BLOCK.sub(lambda m: f"{m[1]}{tables_of(m[2], results)}{m[3]}", text)


def tables_of(wanted: str, results: Path) -> str:
    """The Markdown tables of a results page, an empty line between them."""
    name, _, number = wanted.partition(", ")
    path = results / ("claims.md" if name == "claims" else f"{name}/table.md")
    try:
        page = path.read_text("utf-8")
    except OSError:
        if name in names():
            return "*Registered, not run yet.*\n"
        raise ExperimentError(f"{path}: no such page; render it first") from None
    found = [part for part in page.split("\n\n") if part.startswith("|")]
    if number:
        found = found[int(number) - 1 : int(number)]
    if not found:
        raise ExperimentError(f"{path}: has no such table ({wanted})")
    return "\n\n".join(part.strip() for part in found) + "\n"


def main(files: list[str]) -> None:
    """Rewrite documents in place."""
    results = Path(__file__).parent.parent / "results"
    for name in files:
        text = Path(name).read_text("utf-8")
        with replace_file(Path(name)) as file:
            file.write(refresh(text, results).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
