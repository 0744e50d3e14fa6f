"""Token by token generation over any engine (SPEC 8.2, 8.3, 9)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.engine import Engine, ExitRule


class Token(NamedTuple):
    """A generated token and the number of blocks whose logits chose it (SPEC 8.7)."""

    id: int
    depth: int


def stream(
    engine: Engine,
    prompt: Sequence[int],
    rule: ExitRule,
    sampler: Sampler,
    max_tokens: int,
    eos_token_id: int | None = None,
) -> Iterator[Token]:
    """Yield tokens until end-of-text (not yielded), `max_tokens`, or a full context.

    Raises ValueError, before any work, for an empty prompt, one longer than the context, or a rule
    that means nothing for the model.
    """
    rule.check(engine.config)
    if max_tokens < 0:
        raise ValueError(f"max tokens {max_tokens}: must be 0 or more")
    cache = engine.new_cache()
    depth = rule.deepest(engine.config)
    z = engine.extend(prompt, cache, exit_layer=depth, last_only=True)[0]
    seen = set(prompt)
    for index in range(max_tokens):
        token = sampler.choose(z, seen, index)
        if token == eos_token_id:
            return
        yield Token(token, depth)
        if index + 1 == max_tokens or cache.length == engine.config.max_position_embeddings:
            return
        seen.add(token)
        z, depth = engine.step(token, cache, rule)
