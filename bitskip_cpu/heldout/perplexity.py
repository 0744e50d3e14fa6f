"""The verb `perplexity`: held-out loss of a text under exit rules (SPEC 10, reading 21)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bitskip.tables import table
from bitskip.terminal import progress_bar
from bitskip_cpu.heldout.scoring import AT_ONCE, exit_losses, facts, step_through
from bitskip_cpu.heldout.text import read_text
from bitskip_cpu.model import Model
from bitskip_ref.exits.named import rule_label
from bitskip_ref.heldout import HeldOutLoss, check_windows
from bitskip_ref.rule import ExitRule


def report(
    model: Model,
    path: Path,
    rules: Sequence[ExitRule],
    context: int | None,
    stride: int | None,
    limit: int | None,
    as_json: bool,
) -> str:
    """What `bitskip-cpu perplexity` prints, with a progress bar on a terminal's standard error."""
    engine, config = model.engine, model.config
    context, stride = check_windows(context, stride, config.max_position_embeddings)
    text = read_text(path, model, limit)
    fixed = {rule.deepest(config): rule for rule in rules if not rule.looks(config)}
    dynamic = [rule for rule in rules if rule.looks(config)]
    total = (len(text.tokens) - 1) * (bool(fixed) + len(dynamic))
    with progress_bar("scoring", total) as advance:
        cut = {"context": context, "stride": stride}
        losses = exit_losses(engine, text, [*fixed], **cut, advance=advance) if fixed else {}
        stepped = step_through(engine, text, dynamic, **cut, at_once=AT_ONCE, advance=advance)
    found: list[tuple[ExitRule, HeldOutLoss, float]]
    found = [(fixed[n], value, float(n)) for n, value in losses.items()]
    found += [(s.rule, s.losses, s.mean_depth) for s in stepped]
    if as_json:
        about = {
            "model": str(model.folder.path),
            "text": str(path),
            "context": context,
            "trained_context": model.folder.trained_context,
            "stride": stride,
            "kv_cache": model.kv_cache,
            "documents": text.documents,
            "bytes": text.bytes,
            "exits": [facts(rule, config, value, depth) for rule, value, depth in found],
        }
        return json.dumps(about)
    rows = [
        (
            rule_label(rule, config),
            f"{depth:.2f}".removesuffix(".00"),
            f"{value.loss:.4f}" + ("" if value.loss_se is None else f" ± {value.loss_se:.4f}"),
            f"{value.ppl:.3f}",
            f"{value.bits_per_byte:.4f}",
        )
        for rule, value, depth in found
    ]
    header = ("exit", "mean depth", "loss (nats/token)", "perplexity (token)", "bits/byte")
    counted = (
        f"{found[0][1].tokens} tokens predicted, {text.documents} documents, {text.bytes} bytes; "
        f"context {context}, stride {stride}"
        f"{'' if model.kv_cache == 'float32' else f', {model.kv_cache} KV cache'}"
    )
    trained = model.folder.trained_context
    if trained is not None and context > trained:
        counted += (
            f"\nwindows of {context} tokens are longer than the {trained} of training: "
            f"--ctx {trained} keeps to those"
        )
    return f"{table(header, rows)}\n{counted}"
