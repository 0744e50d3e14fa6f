"""The data sets: files, their digests, and the tokenizers trained on them."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from bitskip_experiments.errors import ExperimentError

FILES = {  # data set -> split -> file below the data folder
    "wikitext-2": {
        split: f"wikitext-2/wiki.{split}.tokens" for split in ("train", "valid", "test")
    },
    "tinystories": {
        split: f"tinystories/tinystories_{split}.txt" for split in ("train", "valid")
    },
}  # fmt: skip
PARTS = {"wikitext-2-16th": ("wikitext-2", 16), "tinystories-8th": ("tinystories", 8)}
"""Data set -> another, and of how many parts of its training text it has the first."""
HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}


@dataclass(frozen=True)
class Corpus:
    """A data set in a folder, or on the hub (folder None)."""

    name: str
    folder: Path | None
    work: Path | None = None  # where parts of data sets are kept

    @property
    def whole(self) -> str:
        """The data set that this one is, or is a part of."""
        return PARTS.get(self.name, (self.name, 1))[0]

    def place(self, split: str) -> str:
        """What `train --data` takes for a split: a file, or the hub's name.

        Raises ExperimentError for a split that the data set lacks and for a missing file.
        """
        files = FILES[self.whole]
        if split not in files:
            raise ExperimentError(f"{self.name} has no split {split!r}")
        if self.folder is None:
            if self.name in PARTS:
                raise ExperimentError(f"{self.name}: a part of a file; needs --data DIR")
            return self.name
        path = self.folder / files[split]
        if not path.is_file():
            raise ExperimentError(f"{path}: no such file; --data DIR must hold {files[split]}")
        if self.name in PARTS and split == "train":
            path = self._part(path)
        return str(path.resolve())

    def _part(self, path: Path) -> Path:
        """The first lines of a file, up to its share of bytes; written once, below `work`."""
        assert self.work is not None  # whoever trains has one
        part = self.work / "parts" / f"{self.name}.txt"
        if not part.exists():
            from bitskip_ref.files import replace_file

            text = path.read_bytes()
            end = text.index(b"\n", len(text) // PARTS[self.name][1]) + 1
            with replace_file(part) as file:
                file.write(text[:end])
        return part

    def digest(self) -> str:
        """Of the training and validation text, or the hub's name: part of a run's identity."""
        if self.folder is None:
            return f"hub:{self.name}"
        return "sha256:" + _digest(self.place("train"), self.place("valid"))

    def tokenizer(self, spec: str, work: Path) -> str:
        """What `train --set tokenizer=` takes: `bpe:SIZE` is trained once and kept below `work`.

        `gpt2` is the folder `gpt2` beside the data where it exists, else the hub's.
        """
        if spec == "gpt2" and self.folder is not None and (self.folder / "gpt2").is_dir():
            return str((self.folder / "gpt2").resolve())
        if not spec.startswith("bpe:"):
            return spec
        key = hashlib.sha256(f"{self.digest()} {spec}".encode()).hexdigest()[:12]
        path = work / "tokenizers" / f"{self.name}-{spec.removeprefix('bpe:')}-{key}.json"
        if not path.exists():
            from bitskip_ref.files import replace_file
            from bitskip_train.data import TextSource
            from bitskip_train.tokenizer import make_tokenizer

            source = TextSource((self.place("train"),), "train")
            text = make_tokenizer(spec, source.documents()).json
            with replace_file(path) as file:
                file.write(text.encode())
        return str(path.resolve())


@functools.cache
def _digest(*places: str) -> str:
    digest = hashlib.sha256()
    for place in places:
        with open(place, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
