"""The page's files: a fixed list, read once, so that no request names a file.

`source.js` is where its texts come from: here the server's; `export --to web` has another one.
"""

from __future__ import annotations

from importlib.resources import files

TYPES = {
    "index.html": "text/html; charset=utf-8", "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}  # fmt: skip
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}  # fmt: skip


def page_files() -> dict[str, tuple[bytes, str]]:
    """Path of a request -> (content, its type)."""
    found = {f"/{name}": (page_file(name), kind) for name, kind in TYPES.items()}
    found["/source.js"] = (page_file("server.js"), TYPES["page.js"])
    return {"/": found["/index.html"], **found}


def page_file(name: str) -> bytes:
    """The content of a file of the page."""
    return (files("bitskip_serve") / "page" / name).read_bytes()
