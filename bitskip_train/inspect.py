"""What a checkpoint holds: its model, how far its run is, its last losses, its settings."""

from __future__ import annotations

from typing import Any

from bitskip_train.checkpoint import load_checkpoint
from bitskip_train.settings import TrainConfig

LINES = 5  # of the history's end, in words


def inspect(path: str) -> dict[str, Any]:
    """Everything `bitskip inspect` prints of a checkpoint. Raises CheckpointError.

    Keys: path, step, steps, windows, resumable, best_loss, parameters, tensors (name -> shape),
    history (as in history.jsonl), tokenizer (whether it holds one), config, train, fingerprint.
    """
    found = load_checkpoint(path)
    return {
        "path": path,
        "step": found.step,
        "steps": TrainConfig.from_dict(found.train).steps,
        "windows": found.position,
        "resumable": found.optimizer is not None,
        "best_loss": found.best_loss,
        "parameters": found.config.parameters(),
        "tensors": {name: list(tensor.shape) for name, tensor in found.state.items()},
        "history": found.history,
        "tokenizer": found.tokenizer_json is not None,
        "config": found.config.to_dict(),
        "train": found.train,
        "fingerprint": found.fingerprint,
    }


def describe(facts: dict[str, Any]) -> str:
    """The facts of `inspect` as text."""
    of_use = "can be resumed" if facts["resumable"] else "no optimizer: for use, not for resuming"
    lines = [
        facts["path"],
        f"step {facts['step']} of {facts['steps']}, {facts['windows']} windows used; {of_use}",
        f"{facts['parameters']:,} parameters; {'with a' if facts['tokenizer'] else 'no'} tokenizer",
    ]
    if facts["best_loss"] is not None:
        lines.append(f"best validation loss {facts['best_loss']:.4f}")
    for name in ("loss", "valid_loss"):
        entries = [e for e in facts["history"] if name in e][-LINES:]
        if entries:
            ends = ", ".join(f"{e[name]:.4f} (step {e['step']})" for e in entries)
            lines.append(f"{'validation ' if name == 'valid_loss' else ''}loss: {ends}")
    lines += ["", "block 1 and what lies outside the blocks:"]
    lines += [
        f"  {name} {' x '.join(map(str, shape))}"
        for name, shape in facts["tensors"].items()
        if not name.startswith("layers.") or name.startswith("layers.0.")
    ]
    for table, word in (("config", "model"), ("train", "train")):
        lines += ["", f"[{word}]", *(f"{k} = {v}" for k, v in facts[table].items())]
    return "\n".join(lines)
