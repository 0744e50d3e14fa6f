"""One training run: its identity, its folder, how far it is, and the command that trains it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bitskip_experiments.corpora import Corpus
from bitskip_experiments.definitions import Point
from bitskip_experiments.errors import ExperimentError
from bitskip_ref.config import ModelConfig
from bitskip_ref.files import replace_file
from bitskip_train.run_folder import write_config
from bitskip_train.settings import TrainConfig

# Settings that say where and how often, not what: they are no part of a run's identity.
_ELSEWHERE = ("data", "valid", "tokenizer", "device", "threads", "save_every", "log_every")


@dataclass(frozen=True)
class Run:
    """A point with a seed, in a work folder."""

    point: Point
    seed: int
    corpus: Corpus
    work: Path

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What makes the run what it is; two tables that ask for the same share its folder.

        Settings at their defaults are left out, so that an option added later changes no identity.
        """
        train = _set(self.point.train.replace(seed=self.seed))
        return {
            "model": _set(self.point.model),
            "train": {k: v for k, v in train.items() if k not in _ELSEWHERE},
            "tokenizer": self.point.train.tokenizer,
            "data": self.corpus.digest(),
        }

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of the identity."""
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def folder(self) -> Path:
        """Where the run's files lie."""
        return self.work / self.digest

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.point.label}, seed {self.seed}"

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return self.folder / "last.pt"

    @property
    def trained(self) -> bool:
        """Whether training is over (`about.json` is written then)."""
        return "finished" in self.about

    @property
    def about(self) -> dict[str, Any]:
        """What the sessions that trained it noted; empty before the first."""
        path = self.folder / "about.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    def note(self, **values: Any) -> None:
        """Add to `about.json`."""
        with replace_file(self.folder / "about.json") as file:
            file.write(json.dumps(self.about | values, indent=1).encode())

    def history(self) -> list[dict[str, Any]]:
        """The entries of history.jsonl so far; a line that is being written is left out."""
        path = self.folder / "history.jsonl"
        if not path.exists():
            return []
        lines = path.read_text("utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def step(self) -> int:
        """The last step that history knows of."""
        entries = self.history()
        return entries[-1]["step"] if entries else 0

    def command(self, processes: int = 1) -> list[str]:
        """What trains it, or goes on; under torchrun for several processes, which share each step.

        Raises ExperimentError if a step cannot be divided among them.
        """
        start = [sys.executable, "-m"]
        if processes > 1:
            start += ["torch.distributed.run", "--standalone", "--nproc-per-node"]
            start += [str(processes), "-m"]
        start += ["bitskip", "train"]
        common = ["--out", str(self.folder), "--token-cache", str(self.work / "tokens")]
        common += ["--no-tensorboard"]
        for name, value in self._share(processes).items():
            common += ["--set", f"train.{name}={value}"]
        if self.last.exists():
            return [*start, "--resume", *common]
        return [*start, "--config", str(self._write_settings()), *common]

    def _share(self, processes: int) -> dict[str, int]:
        """One process's part of a step: the step's windows stay as many as the settings say."""
        train = self.point.train
        parts = {"batch": train.batch, "accumulation": train.accumulation}
        for name in ("accumulation", "batch"):
            if parts[name] % processes == 0:
                return parts | {name: parts[name] // processes}
        raise ExperimentError(
            f"--nproc {processes}: divides neither accumulation = {train.accumulation} nor batch = "
            f"{train.batch} of {self.name}"
        )

    def _write_settings(self) -> Path:
        """All settings, as the run itself will write them."""
        train = self.point.train.replace(
            seed=self.seed, data=[self.corpus.place("train")], valid=[self.corpus.place("valid")],
            tokenizer=self.corpus.tokenizer(self.point.train.tokenizer, self.work),
        )  # fmt: skip
        return write_config(self.folder, self.point.model, train)


def _set(config: ModelConfig | TrainConfig) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {k: v for k, v in config.to_dict().items() if getattr(config, k) != defaults[k]}


def runs_of(
    points: list[Point], seeds: tuple[int, ...], data: Path | None, work: Path
) -> list[Run]:
    """All runs, the first seed's first."""
    return [Run(p, seed, Corpus(p.data, data, work), work) for seed in seeds for p in points]
