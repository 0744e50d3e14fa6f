"""Models that come with the package, each a model folder (FORMAT) under this one."""

from __future__ import annotations

from pathlib import Path

DEFAULT = "stories-24"


def names() -> list[str]:
    """Names of the models in this installation."""
    return sorted(p.parent.name for p in Path(__file__).parent.glob("*/config.json"))


def path(name: str = DEFAULT) -> Path:
    """The folder of a shipped model. Raises ValueError, listing the names, for an unknown one."""
    if name not in names():
        raise ValueError(
            f"no model {name!r} comes with this installation (there are: "
            f"{', '.join(names()) or 'none'}); give the path of a model folder"
        )
    return Path(__file__).parent / name


def resolve(model: str | None = None) -> Path:
    """What a MODEL argument means: a folder, a shipped name, or the default for None.

    A folder wins over a shipped name. Raises ValueError if it is neither.
    """
    if model is None:
        return path()
    if model in names() and not Path(model).is_dir():
        return path(model)
    if not Path(model).is_dir():
        raise ValueError(
            f"no model folder at {model}, and no model of that name comes with this installation "
            f"(there are: {', '.join(names()) or 'none'})"
        )
    return Path(model)
