"""What exits and drafts are decided by: gates, confidence, a draft's lead (SPEC 8.4, 8.5, 11.1)."""

from __future__ import annotations

from bitskip_cpu.kernels.arithmetic.elementwise import (
    confidence,
    decides,
    first_of,
    integer_rows,
    layer_norm,
    relu,
    sigmoid,
    two_largest,
)
from bitskip_cpu.kernels.layout import CONFIDENCE, GATES
from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.numba_inside.pieces import piece
from bitskip_cpu.kernels.numba_inside.views import floats


@piece
def measure(s, scratch, what):
    """GATES of all tokens at hand, CONFIDENCE of one token's logits, or else the draft that row
    `what` of the logits decides: -1, if by less than `least_lead`."""
    if what == GATES:
        for t in range(s.tokens):
            floats(s.gates, s.tokens)[t] = gate(s, t)
    elif what == CONFIDENCE:
        values = confidence(s.logits, s.vocab, scratch)
        s.confidence_max, s.confidence_margin, s.confidence_entropy = values
    else:
        z = s.logits + what * 4 * s.draft_vocab
        first, second = two_largest(z, s.draft_vocab, scratch)
        s.draft = -1
        if not first - second < s.least_lead and decides(z, s.draft_vocab, first):
            s.draft = first_of(z, s.draft_vocab, first)


@kernel
def gate(s, t):
    """The routing gate on token t (SPEC 8.4)."""
    n, width = s.hidden, s.gate_width
    scales_at, middle_at = s.gate + 8 * n, s.input + 4 * n
    rows_at = scales_at + 4 * (width + 1)
    layer_norm(s.x + t * 4 * n, s.gate, s.input, n, s.norm_eps, s.scratch)
    integer_rows(s.input, n, s.codes, rows_at, scales_at, width, middle_at)
    middle = floats(middle_at, width)
    for i in range(width):
        middle[i] = relu(middle[i])
    integer_rows(middle_at, width, s.codes, rows_at + width * n, scales_at + 4 * width, 1, s.input)
    return sigmoid(floats(s.input, 1)[0])
