"""Random requests, and what each says alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bitskip_cpu.generation_options import GenerationOptions
from bitskip_cpu.many.scheduler import Scheduler
from bitskip_cpu.many.sequence import End, Likely, Said, Sequence
from bitskip_cpu.model import Model
from bitskip_ref.heldout import log_probabilities


@dataclass
class Heard:
    """What a request was told."""

    ids: list[int]
    options: GenerationOptions
    alternatives: int | None = None
    echo: bool = False
    arrives: int = 0  # the step before which it comes
    gone_after: int | None = None  # it is cancelled after so many tokens
    said: list[Said] = field(default_factory=list)
    end: End | None = None
    text: Any = None
    steps_after: int = 0  # tokens told after it was cancelled

    def tell(self, event: Said | End) -> None:
        """As of `Sequence`."""
        if isinstance(event, End):
            assert self.end is None, "two ends"
            self.end = event
            return
        assert self.end is None, "told after the end"
        if self.text is not None and self.text.cancelled and event.piece.token_id is not None:
            self.steps_after += 1
        self.said.append(event)

    @property
    def tokens(self) -> list[int]:
        """All ids told."""
        return [s.piece.token_id for s in self.said if s.piece.token_id is not None]


def random_request(rng: random.Random, model: Model, heads: list[list[int]]) -> Heard:
    """Of any kind; its prompt often begins as others do."""
    config = model.config
    tail = [rng.randrange(1, 290) for _ in range(rng.choice((1, 2, 7, 30)))]
    ids = [*rng.choice(heads), *tail]
    blocks = config.num_hidden_layers
    how = rng.choice(("fixed", "fixed", "gate", "max", "margin", "entropy", "speculate", "none"))
    options: dict[str, Any] = {"max_tokens": rng.choice((0, 1, 3, 9, 20))}
    if how == "fixed":
        options["exit_layer"] = rng.randint(1, blocks)
    elif how == "speculate":
        options["exit_layer"] = rng.randint(2, blocks)
        options["speculate"] = rng.choice(("auto", 1, 4))
    elif how != "none":
        options["exit_layer"] = how
        options["exit_threshold"] = rng.choice((0.01, 0.1, 0.5))
        options["exit_looks"] = tuple(range(1, blocks))
    if rng.random() < 0.5:
        options |= {"temperature": 0.9, "top_k": rng.choice((0, 20)), "top_p": 0.95}
        options["seed"] = rng.randrange(1 << 64)
    if rng.random() < 0.2:
        options["repetition_penalty"] = 1.3
    if rng.random() < 0.2:
        options["logit_bias"] = ((rng.randrange(1, 290), 5.0), (rng.randrange(1, 290), -100.0))
    if rng.random() < 0.3:
        options["stop"] = (rng.choice(("a", "e", " t", "\n")),)
    plain = how != "speculate"
    return Heard(
        ids, GenerationOptions(**options),
        alternatives=rng.choice((None, 0, 3)) if plain else None,
        echo=plain and rng.random() < 0.15,
        arrives=rng.randrange(60),
        gone_after=rng.randrange(1, 6) if rng.random() < 0.1 else None,
    )  # fmt: skip


def run_all(scheduler: Scheduler, requests: list[Heard]) -> None:
    """Each arrives at its step; some go."""
    waiting = sorted(requests, key=lambda r: r.arrives)
    step = 0
    while True:
        while waiting and waiting[0].arrives <= step:
            request = waiting.pop(0)
            request.text = Sequence(
                scheduler.model, request.ids, request.options, request.tell,
                alternatives=request.alternatives, echo=request.echo,
            )  # fmt: skip
            scheduler.submit([request.text])
        for request in requests:
            after = request.gone_after
            if after is not None and request.text and len(request.tokens) >= after:
                scheduler.cancel([request.text])
        busy = scheduler.step()
        step += 1
        if not busy and not waiting:
            return


def alone(model: Model, request: Heard) -> tuple[str, list[int], list[int], str]:
    """(text, ids, exit layers, why it ended) of the same request through TextStream."""
    from bitskip_cpu.generate import TextStream

    options, folder = request.options, model.folder
    rule = options.rule(folder)
    told = TextStream(
        model.engine, model.tokenizer, request.ids, rule=rule,
        speculation=options.speculation(rule, folder), sampler=options.sampler,
        max_tokens=options.max_tokens, stop=options.stop, eos_token_id=folder.end_ids,
    )  # fmt: skip
    for _ in told:
        pass
    g = told.generation()
    return g.text, g.token_ids, g.exit_layers, g.stop_reason


def likely(z: np.ndarray, token: int, count: int) -> Likely:
    """From logits f32 [V], in a plain way."""
    p = log_probabilities(z[None])[0]
    best = sorted(range(len(p)), key=lambda i: (-p[i], i))[:count]
    return Likely(token, float(p[token]), tuple((i, float(p[i])) for i in best))


def likelies(model: Model, request: Heard, tokens: list[int]) -> list[Likely]:
    """Of the tokens that a request was told, from steps of its own."""
    cache, rule = model.new_cache(), request.options.rule(model.folder)
    depth = rule.deepest(model.config)
    z = model.extend(request.ids, cache, exit_layer=depth, last_only=True)[0]
    found = []
    for token in tokens:
        found.append(likely(z, token, request.alternatives or 0))
        if len(found) < len(tokens):
            z, _ = model.step(token, cache, rule)
    return found


def check(model: Model, request: Heard) -> None:
    """What was told is what the request says alone."""
    assert request.end is not None, "lost"
    assert request.end.error is None, request.end.error
    text, ids, depths, reason = alone(model, request)
    g = request.end.generation
    assert "".join(s.piece.text for s in request.said) == g.text
    assert request.tokens == g.token_ids
    if request.text.cancelled and g.stop_reason == "interrupted":
        assert request.steps_after == 0, "run after nobody waited"
        assert ids[: len(g.token_ids)] == g.token_ids
    else:
        assert (g.text, g.token_ids, g.exit_layers, g.stop_reason) == (text, ids, depths, reason)
    if request.alternatives is not None:
        mine = [s.likely for s in request.said if s.piece.token_id is not None]
        assert mine == likelies(model, request, request.tokens)
    if request.echo and not request.text.cancelled:
        depth = request.options.rule(model.folder).deepest(model.config)
        z = model.logits(request.ids, depth)
        wanted = request.alternatives or 0
        told = [likely(z[i], t, wanted) for i, t in enumerate(request.ids[1:])]
        assert list(request.end.echo) == told
