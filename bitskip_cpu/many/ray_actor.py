"""Many texts on many machines: an actor for Ray Data, a model in each (extra `ray`)."""

from __future__ import annotations

from typing import Any

import numpy as np

import bitskip_cpu
from bitskip_cpu.generation_options import GenerationOptions


class Generate:
    """For `Dataset.map_batches`: each of its actors loads the model once, then writes batches.

    A row's text is what `Model.generate` says to its prompt, to the bit: whichever actor or machine
    it is on, and whatever else is in its batch. Nothing of Ray is imported here.
    """

    def __init__(
        self, model: str, *, parallel: int = 8, threads: int | None = None,
        kv_cache: str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """model: a shipped model's name, or a folder that every machine sees at this path.

        parallel, options: as of `Model.generate_many`. threads, kv_cache: of each actor, as of
        `load`; give Ray the same number of threads as `num_cpus`.
        """
        self._model = bitskip_cpu.load(model, threads=threads, kv_cache=kv_cache)
        self._parallel, self._options = parallel, GenerationOptions(**options)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """batch: columns of which `prompt` holds texts. The same with `text`, `token_ids`,
        `exit_layers` and `stop_reason` of each.
        """
        prompts = [str(prompt) for prompt in batch["prompt"]]
        made = list(self._model.generate_many(prompts, self._options, parallel=self._parallel))
        return {
            **batch,
            "text": np.array([g.text for g in made], object),
            "token_ids": [g.token_ids for g in made],
            "exit_layers": [g.exit_layers for g in made],
            "stop_reason": np.array([g.stop_reason for g in made], object),
        }
