"""The whole loss of one batch and its gradient (v1 Eq. 5, v2 Eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from bitskip_ref.config import HEAD_BITS
from bitskip_train import losses
from bitskip_train.draws import Draws
from bitskip_train.evaluate import LOGIT_BUDGET
from bitskip_train.model import BitskipModel
from bitskip_train.readings import shifted
from bitskip_train.schedule import dropout_probabilities, ramp
from bitskip_train.settings import TrainConfig
from bitskip_train.soft_targets import Soft


class Objective:
    """Forward and backward of batches through a model, with every term but the quantization loss.

    Heads run backward at once, exit by exit and piece by piece, into the hidden states; the blocks
    then run backward once. So only one piece's logits are ever held, and an exit costs its head
    and nothing else.
    """

    def __init__(self, model: BitskipModel, train: TrainConfig, device: torch.device) -> None:
        """Raises ConfigError for exits that the model does not have."""
        self.model, self.train, self.device = model, train, device
        self.depth = model.config.num_hidden_layers
        self.dtype = torch.bfloat16 if train.dtype == "bfloat16" else None
        self.exits: dict[int, float] = {}  # of the early-exit loss
        if train.exit_lambda:
            self.exits = losses.exit_weights(train, self.depth)

    def backward(
        self, ids: Tensor, step: int, draws: Draws, soft: Soft | None = None
    ) -> dict[str, Tensor]:
        """Add the gradient of the mean loss over ids [B, T + 1] to the parameters'.

        Exits rotate with `step`; `draws`, of the B samples, decide layer dropout and gates. soft:
        a teacher's part of the B * T targets, of the last layer and of the exits. The gradient is
        divided by `accumulation`; the terms returned, detached, are not: `loss` of the
        last layer, and where they are on `exit_loss`, the weighted mean of the step's exits,
        `route_loss`, and `peak_loss` (`losses.peak_loss`).
        """
        train = self.train
        exits = losses.exit_subset(self.exits, train.exit_subset, step)
        collect = set(range(1, self.depth + 1)) if train.route_lambda else {*exits, self.depth}
        keep = self.keep(step, draws)
        peaks: list[list[Tensor]] | None = [] if train.peak_lambda else None
        reads_codes = self.model.config.head_format in HEAD_BITS
        with self.autocast():
            hidden = self.model(
                ids[:, :-1],
                keep=keep,
                collect=collect,
                peaks=peaks,
                peak_blocks=0 if train.peak_rest else train.peak_blocks,
            )
            if peaks is not None and train.peak_rest and reads_codes:
                peaks.append([self.model.head_peak(hidden[self.depth])])
        leaves = {n: hidden[n].detach().requires_grad_() for n in sorted(collect)}
        terms = self._head_losses(
            leaves, ids, exits, train.exit_lambda * ramp(train.exit_ramp, step), soft
        )
        if train.route_lambda:
            with self.autocast():
                gates = [self.model.gate(h, n) for n, h in leaves.items()]
            mean_layer = losses.mean_exit_layer(
                [losses.sample_exits(p, draws.uniform(p.shape[1])) for p in gates],
                train.route_leftover,
            )
            terms["route_loss"] = losses.route_loss(mean_layer, self.depth)
            (train.route_lambda * terms["route_loss"] / train.accumulation).backward()
        ends, gradients = [hidden[n] for n in leaves], [h.grad for h in leaves.values()]
        if peaks and any(peaks):
            terms["peak_loss"] = losses.peak_loss(peaks, train.peak_blocks, train.peak_rest)
            ends.append(train.peak_lambda * terms["peak_loss"] / train.accumulation)
            gradients.append(torch.ones_like(ends[-1]))
        torch.autograd.backward(ends, gradients)
        return {name: term.detach() for name, term in terms.items()}

    def _head_losses(
        self, leaves: dict[int, Tensor], ids: Tensor, exits: dict[int, float], exit_lambda: float,
        soft: Soft | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Loss of the last layer and of the exits, with their gradients left in the leaves."""
        train, depth = self.train, self.depth
        flat = {n: leaf.flatten(0, 1) for n, leaf in leaves.items()}  # [B * T, D]
        targets = shifted(ids, train.targets).flatten()
        exit_targets = shifted(ids, train.exit_targets).flatten()
        scale = 1 / (len(targets) * train.accumulation)
        main = exit_total = torch.zeros((), device=self.device)
        rows = max(1, LOGIT_BUDGET // self.model.config.vocab_size)
        for start in range(0, len(targets), rows):
            piece = slice(start, start + rows)
            said = soft and Soft(*(part[piece] for part in soft))
            logits = self._logits(flat[depth][piece], depth)
            loss = losses.cross_entropy(logits, targets[piece], said)
            (loss * scale).backward()
            main = main + loss.detach()
            teacher = logits.detach()
            for n, weight in exits.items():
                logits = self._logits(flat[n][piece], n, normed=not train.exit_raw)
                loss = losses.cross_entropy(logits, exit_targets[piece], said)
                if train.exit_distill:
                    loss = loss + train.exit_distill * losses.distillation(logits, teacher)
                (exit_lambda * weight * scale * loss).backward(inputs=self._receivers(n, leaves[n]))
                exit_total = exit_total + weight * loss.detach()
        terms = {"loss": main / len(targets)}
        if exits:
            # A subset's weights do not add up to 1; divided by their sum, steps can be compared.
            terms["exit_loss"] = exit_total / (len(targets) * sum(exits.values()))
        return terms

    def _receivers(self, n: int, leaf: Tensor) -> list[Tensor] | None:
        """What exit n's loss sends gradients to: its hidden states and its own norm and head, if it
        has any, but not what it shares; None: to everything."""
        if not self.train.exit_detach:
            return None
        own = self.model.exits[str(n)].parameters() if n < self.depth else ()
        return [leaf, *own]

    def _logits(self, hidden: Tensor, n: int, normed: bool = True) -> Tensor:
        with self.autocast():
            return self.model.logits(hidden, n, normed=normed)

    def keep(self, step: int, draws: Draws) -> Tensor | None:
        """Which samples each block runs for: bool [L, B] on the CPU, or None for all."""
        p = dropout_probabilities(self.train, self.depth, step)
        if not any(p):
            return None
        return (draws.uniform(len(p)) >= torch.tensor(p)).t()

    def autocast(self) -> torch.autocast:
        """The region in which products run in the chosen dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)
