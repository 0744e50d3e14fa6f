"""Loss of held-out text: windows, and the mean over tokens (SPEC 10, reading 21)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bitskip_ref.checks import check_logits

PIECE = 16  # tokens at a time: binary64 in the processor's caches


def check_windows(context: int | None, stride: int | None, limit: int) -> tuple[int, int]:
    """(context, stride): None is the most there is, `limit` positions, and no overlap.

    Raises ValueError for numbers out of range.
    """
    context = limit if context is None else context
    stride = context if stride is None else stride
    if not 1 <= context <= limit:
        raise ValueError(f"context {context}: this model's is {limit}, choose 1..{limit}")
    if not 1 <= stride <= context:
        raise ValueError(f"stride {stride}: must be within 1..{context}, the context")
    return context, stride


def windows(count: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, scored, end): inputs begin..end-1 predict begin+1..end; new are scored+1..end.

    Of `count` tokens every one but the first is scored once. With stride = context windows do not
    overlap; the last may be shorter.
    """
    scored = 0
    for begin in range(0, count - 1, stride):
        end = min(begin + context, count - 1)
        yield begin, scored, end
        if end == count - 1:
            return
        scored = end


def token_losses(logits: np.ndarray | Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] in binary64: logits f32 [T, V], or T of [V]; targets [T] -> [T].

    Raises ValueError for logits that have no loss (SPEC 9.5); tokens are counted from 0.
    """
    losses = np.empty(len(targets))
    for at in range(0, len(targets), PIECE):
        part = slice(at, at + PIECE)
        z, chosen = _shifted(logits[part], at), targets[part]
        of_targets = z[np.arange(len(chosen)), chosen]
        losses[part] = _log_sums(z, z) - of_targets
    return losses


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """log softmax in binary64: logits f32 [T, V] -> [T, V]; the negatives of `token_losses`."""
    z = _shifted(logits, 0)
    return z - _log_sums(z)[:, None]


def _shifted(logits: np.ndarray | Sequence[np.ndarray], first: int) -> np.ndarray:
    """Logits less their row's largest, f64 [T, V]; first: number of the first token."""
    z = np.array(logits, np.float64)
    largest = z.max(1, keepdims=True)
    check_logits(largest[:, 0], first)
    z -= largest
    return z


def _log_sums(z: np.ndarray, exponentials: np.ndarray | None = None) -> np.ndarray:
    """log of each row's sum of exponentials [T], which `exponentials`, if given, become."""
    return np.log(np.exp(z, out=exponentials).sum(1))


@dataclass(frozen=True, eq=False)
class HeldOutLoss:
    """Losses of a text, window by window; the mean is over tokens, not windows."""

    sums: np.ndarray  # [W] nats, of the tokens new in each window
    sizes: np.ndarray  # [W] how many those are
    text_bytes: int  # UTF-8 bytes; end-of-text adds to the loss, not to the bytes

    @property
    def tokens(self) -> int:
        """Predicted: all but the first."""
        return int(self.sizes.sum())

    @cached_property
    def loss(self) -> float:
        """Nats a predicted token."""
        return math.fsum(self.sums) / self.tokens

    @property
    def loss_se(self) -> float | None:
        """Standard error of `loss`; None for one window."""
        return self.error_of(self.sums - self.loss * self.sizes)

    @property
    def ppl(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The whole loss in bits, over the text's bytes."""
        return math.fsum(self.sums) / math.log(2) / max(1, self.text_bytes)

    def facts(self) -> dict[str, float | None]:
        """Its numbers under the names that every JSON output gives them."""
        names = ("tokens", "loss", "loss_se", "ppl", "bits_per_byte")
        return {name: getattr(self, name) for name in names}

    def above(self, other: HeldOutLoss) -> tuple[float, float | None]:
        """How much larger this loss is than another of the same windows, and the error of that.

        The windows' difficulty is common to both, so that the error is far below that of a loss.
        """
        more = self.sums - other.sums
        mean = math.fsum(more) / self.tokens
        return mean, self.error_of(more - mean * self.sizes)

    def error_of(self, residuals: np.ndarray) -> float | None:
        """Standard error of a ratio estimate over windows, the independent units; None for one."""
        count = len(self.sizes)
        if count < 2:
            return None
        return math.sqrt(float((residuals**2).sum()) * count / (count - 1)) / self.tokens
