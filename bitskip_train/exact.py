"""Operations with the definition's bits, for evaluation on CPU (SPEC 2 to 8)."""

from __future__ import annotations

from bitskip_train.fast import FastOps


class ExactOps(FastOps):
    """Placeholder until the exact operations land."""

    exact = True
