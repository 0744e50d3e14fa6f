"""Where things are kept that can be made anew."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def user_cache() -> Path:
    """BITSKIP_CACHE_DIR, or the user's cache folder.

    Without a home, as in containers, a folder of the user's among the temporary files.
    """
    root = os.environ.get("BITSKIP_CACHE_DIR")
    if root:
        return Path(root)
    import platformdirs

    try:
        folder = Path(platformdirs.user_cache_dir("bitskip"))
    except (KeyError, OSError, RuntimeError):  # no HOME, and no such user
        folder = Path("~")
    if folder.is_absolute():
        return folder
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"bitskip-{user}"
