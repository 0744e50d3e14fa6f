"""The page's files: a fixed list, read once, so that no request names a file."""

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
    folder = files("bitskip_serve") / "page"
    found = {f"/{name}": ((folder / name).read_bytes(), kind) for name, kind in TYPES.items()}
    return {"/": found["/index.html"], **found}
