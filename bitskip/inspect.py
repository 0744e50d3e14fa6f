"""The verb `inspect` of the whole program: of models as `bitskip-cpu`'s, and of checkpoints."""

from __future__ import annotations

import json

import click

from bitskip.options import JSON, MODEL


@click.command()
@MODEL
@JSON
@click.pass_context
def inspect(ctx: click.Context, model: str | None, as_json: bool) -> None:
    """Shapes, bits, sizes and ternary statistics of a model; of a checkpoint (FILE.pt) its step,
    last losses, shapes and settings."""
    if model is None or not model.endswith(".pt"):
        from bitskip_cpu.cli import machine

        ctx.invoke(machine.inspect, model=model, as_json=as_json)
        return
    from bitskip_train.inspect import describe, inspect

    facts = inspect(model)
    click.echo(json.dumps(facts) if as_json else describe(facts))
