"""The training loop: one step, evaluation, checkpoints."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitskip_ref.config import ConfigError, ModelConfig
from bitskip_train import losses
from bitskip_train.checkpoint import Checkpoint, save_checkpoint
from bitskip_train.data import Split, Windows
from bitskip_train.errors import CheckpointError, TrainingError
from bitskip_train.evaluate import LOGIT_BUDGET, check_exits, evaluate
from bitskip_train.model import BitskipModel
from bitskip_train.progress import Report
from bitskip_train.schedule import dropout_probabilities, learning_rate
from bitskip_train.settings import TrainConfig


class Trainer:
    """One run. All randomness is a function of (seed, step), so a resumed run repeats the bits."""

    def __init__(
        self,
        config: ModelConfig,
        train: TrainConfig,
        data: Split,
        valid: Split | None,
        tokenizer_json: str,
        out: Path,
        resume: Checkpoint | None = None,
    ) -> None:
        """Build model and optimizer, from a checkpoint if one is given.

        Raises ConfigError where settings do not fit each other, CheckpointError where the
        checkpoint cannot be resumed.
        """
        check_settings(config, train)
        if train.threads:
            torch.set_num_threads(train.threads)
        self.config, self.train, self.valid, self.out = config, train, valid, out
        self.tokenizer_json = tokenizer_json
        self.device = pick_device(train.device)
        self.autocast = torch.bfloat16 if train.dtype == "bfloat16" else None
        self.windows = Windows(data.tokens, train.context, train.seed)
        torch.manual_seed(train.seed)
        self.model = BitskipModel(config).to(self.device)
        self.optimizer = make_optimizer(self.model, train)
        self.exits: dict[int, float] = {}  # of the early-exit loss
        if train.exit_lambda:
            self.exits = losses.exit_weights(train, config.num_hidden_layers)
        self.step = self.position = 0
        self.best_loss: float | None = None
        self.history: list[dict[str, Any]] = []
        if resume is not None:
            if resume.optimizer is None:
                raise CheckpointError("the checkpoint has no optimizer state: resume from last.pt")
            self.model.load_state_dict(resume.state)
            self.optimizer.load_state_dict(resume.optimizer)
            self.step, self.position = resume.step, resume.position
            self.best_loss, self.history = resume.best_loss, list(resume.history)
        if train.compile:
            for block in self.model.layers:
                block.compile()

    # ---- one step --------------------------------------------------------------------

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns the mean of each term of the loss and the gradient norm."""
        train = self.train
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(train, self.step)
        totals: dict[str, Tensor] = {}
        for part in range(train.accumulation):
            ids = torch.from_numpy(self.windows.batch(self.position, train.batch)).to(self.device)
            self.position += train.batch
            for name, value in self._pass(ids, part).items():
                totals[name] = totals.get(name, 0) + value / train.accumulation
        if train.quant_lambda:
            weights = (weight for _, weight in self.model.quantized_weights())
            term = losses.quant_loss(weights, train.quant_reduction)
            (train.quant_lambda * term).backward()
            totals["quant_loss"] = term.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.clip)
        values = {name: float(value) for name, value in totals.items()}
        values["grad_norm"] = float(norm)
        if not all(math.isfinite(value) for value in values.values()):
            raise TrainingError(
                f"step {self.step + 1}: the loss or its gradient is not finite "
                f"(loss {values['loss']}); try a smaller train.lr or a longer train.warmup"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return values

    def _pass(self, ids: Tensor, part: int) -> dict[str, Tensor]:
        """Forward and backward of one batch of windows, ids [B, T + 1].

        Heads run backward at once, exit by exit and piece by piece, into the hidden states; the
        blocks then run backward once. So only one piece's logits are ever held, and an exit costs
        its head and nothing else.
        """
        train, depth = self.train, self.config.num_hidden_layers
        turn = self.step * train.accumulation + part
        generator = torch.Generator().manual_seed(mix(train.seed, turn))
        exits = losses.exit_subset(self.exits, train.exit_subset, turn)
        collect = set(exits) | {depth}
        if train.route_lambda:
            collect = set(range(1, depth + 1))
        keep = self._keep(ids.shape[0], generator)
        with self._autocast():
            hidden = self.model(ids[:, :-1], keep=keep, collect=collect)
        leaves = {n: hidden[n].detach().requires_grad_() for n in sorted(collect)}
        terms = self._head_losses(leaves, ids, exits)
        if train.route_lambda:
            with self._autocast():
                gates = [
                    losses.sample_exits(self.model.gate(h, n).float(), generator)
                    for n, h in leaves.items()
                ]
            terms["route_loss"] = losses.route_loss(gates, train.route_leftover)
            (train.route_lambda * terms["route_loss"] / train.accumulation).backward()
        used = [n for n in leaves if leaves[n].grad is not None]
        torch.autograd.backward([hidden[n] for n in used], [leaves[n].grad for n in used])
        return {name: term.detach() for name, term in terms.items()}

    def _head_losses(
        self, leaves: dict[int, Tensor], ids: Tensor, exits: dict[int, float]
    ) -> dict[str, Tensor]:
        """Loss of the last layer and of the exits, with their gradients left in the leaves."""
        train, depth = self.train, self.config.num_hidden_layers
        flat = {n: leaf.flatten(0, 1) for n, leaf in leaves.items()}  # [B * T, D]
        targets = ids[:, 1:].flatten()
        exit_targets = targets if train.exit_targets == "next" else ids[:, :-1].flatten()
        scale = 1 / (len(targets) * train.accumulation)
        main = exit_total = torch.zeros((), device=self.device)
        rows = max(1, LOGIT_BUDGET // self.config.vocab_size)
        for start in range(0, len(targets), rows):
            piece = slice(start, start + rows)
            logits = self._logits(flat[depth][piece], depth)
            loss = losses.cross_entropy(logits, targets[piece])
            (loss * scale).backward()
            main = main + loss.detach()
            teacher = logits.detach()
            for n, weight in exits.items():
                logits = self._logits(flat[n][piece], n)
                loss = losses.cross_entropy(logits, exit_targets[piece])
                if train.exit_distill:
                    loss = loss + train.exit_distill * losses.distillation(logits, teacher)
                (train.exit_lambda * weight * scale * loss).backward()
                exit_total = exit_total + weight * loss.detach()
        terms = {"loss": main / len(targets)}
        if exits:
            terms["exit_loss"] = exit_total / len(targets)
        return terms

    def _logits(self, hidden: Tensor, n: int) -> Tensor:
        with self._autocast():
            return self.model.logits(hidden[None], n)[0]

    def _keep(self, batch: int, generator: torch.Generator) -> Tensor | None:
        """Which samples each block runs for: bool [L, B] on the CPU, or None for all."""
        p = dropout_probabilities(self.train, self.config.num_hidden_layers, self.step)
        if not any(p):
            return None
        draw = torch.rand((len(p), batch), generator=generator)
        return draw >= torch.tensor(p)[:, None]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    # ---- the run ---------------------------------------------------------------------

    def run(self, tensorboard: bool | None = None) -> bool:
        """Train to the end. Returns False if Ctrl-C stopped it, after writing last.pt.

        The first Ctrl-C lets the step finish; a second one stops at once. Writes last.pt, best.pt
        (at each record of the validation loss, without optimizer state) and history.jsonl.
        """
        train = self.train
        report = Report(self.out, train.steps, self.step, self.history, tensorboard)
        tokens, since = 0, time.monotonic()
        try:
            with _interrupts() as interrupted:
                while self.step < train.steps and not interrupted:
                    if self._patience_is_over():
                        report.note(f"stopped early: no better loss in {train.patience} checks")
                        break
                    values = self.train_step()
                    tokens += train.batch * train.accumulation * train.context
                    report.advance(self.step)
                    if self.step % train.log_every == 0 or self.step == train.steps:
                        now = time.monotonic()
                        values["lr"] = self.optimizer.param_groups[0]["lr"]
                        values["tokens_per_second"] = tokens / max(now - since, 1e-9)
                        report.train(self.step, values)
                        tokens, since = 0, now
                    if train.eval_every and self.step % train.eval_every == 0:
                        self._evaluate(report)
                        tokens, since = 0, time.monotonic()
                    if self.step % train.save_every == 0:
                        self._save("last.pt")
            finished = self.step >= train.steps or not interrupted
            if finished and (not self.history or "valid_loss" not in self.history[-1]):
                self._evaluate(report)
            self._save("last.pt")
        finally:
            report.close()
        return finished

    def _evaluate(self, report: Report) -> None:
        if self.valid is None:
            return
        train = self.train
        tokens, size = self.valid.tokens, self.valid.bytes
        if train.eval_tokens:
            tokens = tokens[: train.eval_tokens + 1]
        results = evaluate(
            self.model, tokens, size, context=train.context, batch=train.batch,
            exits=[*train.eval_exits, self.config.num_hidden_layers], autocast=self.autocast,
        )  # fmt: skip
        by_exit = {r.exit_layer: r.loss for r in results}
        loss = results[-1].loss
        best = self.best_loss is None or loss < self.best_loss
        report.valid(self.step, by_exit, best)
        if best:
            self.best_loss = loss
            self._save("best.pt", optimizer=False)

    def _patience_is_over(self) -> bool:
        found = [e["valid_loss"] for e in self.history if "valid_loss" in e]
        if not self.train.patience or not found:
            return False
        return len(found) - 1 - int(np.argmin(found)) >= self.train.patience

    def _save(self, name: str, optimizer: bool = True) -> None:
        checkpoint = Checkpoint(
            config=self.config,
            state=self.model.state_dict(),
            tokenizer_json=self.tokenizer_json,
            train=self.train.to_dict(),
            step=self.step,
            position=self.position,
            best_loss=self.best_loss,
            history=self.history,
            optimizer=self.optimizer.state_dict() if optimizer else None,
        )
        save_checkpoint(self.out / name, checkpoint)


def check_settings(config: ModelConfig, train: TrainConfig) -> None:
    """Raise ConfigError where model and training settings contradict each other."""
    check_exits(train.eval_exits, config.num_hidden_layers)
    if train.context > config.max_position_embeddings:
        raise ConfigError(
            f"context = {train.context}: the model holds {config.max_position_embeddings} "
            "positions; raise model.max_position_embeddings"
        )
    if train.route_lambda and not config.gates:
        raise ConfigError("route_lambda above 0: needs model.gates = true")
    if train.quant_lambda and config.linear != "ternary":
        raise ConfigError("quant_lambda above 0: needs model.linear = 'ternary'")


def make_optimizer(model: torch.nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; norms and biases have none.

    Not the fused kernel: it leaves tensors' version counters as they were, and by those the blocks
    see that their quantized weights are out of date.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), foreach=True)


def pick_device(name: str) -> torch.device:
    """The device a name means; `auto` is cuda where there is one, else cpu. Raises ConfigError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device = {name!r}: must be auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device = {name!r}: no CUDA device here; use auto or cpu")
    return device


def mix(seed: int, turn: int) -> int:
    """A generator seed for one pass: neighbours of either number give unrelated draws."""
    return int(np.random.SeedSequence([seed, turn]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that the first Ctrl-C fills; the second raises KeyboardInterrupt as usual."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: Ctrl-C does not come here
        yield seen
        return
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
