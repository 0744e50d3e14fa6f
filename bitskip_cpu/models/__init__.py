"""Models that come with the package, each a model folder (FORMAT) under this one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bitskip_ref.words import unknown

if TYPE_CHECKING:
    from bitskip_cpu.model import Model
    from bitskip_ref.folder import Folder

DEFAULT = "stories-24"
HERE = Path(__file__).parent


def names() -> list[str]:
    """Names of the models in this installation."""
    return sorted(p.parent.name for p in HERE.glob("*/config.json"))


def path(name: str = DEFAULT) -> Path:
    """The folder of a shipped model. Raises ValueError, listing the names, for an unknown one."""
    if name not in names():
        raise ValueError(f"{unknown('model', name, names())}; or give the path of a model folder")
    return HERE / name


def resolve(model: str | os.PathLike[str] | None = None) -> Path:
    """What a MODEL argument means: a folder, a shipped name, or the default for None.

    A folder wins over a shipped name. Raises ValueError, with the remedy, if it is neither.
    """
    if model is None:
        return path()
    text = os.fspath(model)
    place = Path(text)
    if text and place.is_dir():
        if not (place / "config.json").exists():
            for name in ("best.pt", "last.pt"):
                if (place / name).exists():
                    raise ValueError(
                        f"{text} is a training run, not a model: bitskip export {place / name}"
                    )
        return place
    if place.is_file() and place.suffix == ".pt":
        raise ValueError(f"{text} is a checkpoint, not a model folder: bitskip export {text}")
    if place.is_file():
        raise ValueError(f"{text} is a file, not a model folder: give the folder that holds it")
    if text not in names() and os.sep in text:
        raise ValueError(f"no model folder at {text}")
    if text not in names() and " " in text:
        raise ValueError(f"no model is called {text!r}; a text to continue is given as --prompt")
    return path(text)


class Opened(NamedTuple):
    """A model's folder, read and checked, and what its caches are to hold."""

    folder: Folder
    kv_cache: str

    def model(self, threads: int | None) -> Model:
        """The model, loaded; threads: as of `bitskip_cpu.load`."""
        from bitskip_cpu.engine import Engine
        from bitskip_cpu.model import Model

        folder = self.folder
        return Model(Engine(folder.config, folder.tensors, threads, self.kv_cache), folder)


def opened(model: str | os.PathLike[str] | None, kv_cache: str | None, usual_cache: str) -> Opened:
    """A MODEL argument; the others as of `bitskip_cpu.load`."""
    from bitskip_ref.cache import usual_kv_cache
    from bitskip_ref.folder import read_folder

    folder = read_folder(resolve(model))
    usual = usual_kv_cache(folder.kv_cache, usual_cache, folder.config)
    return Opened(folder, kv_cache or usual)
