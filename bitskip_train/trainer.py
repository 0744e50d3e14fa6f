"""The training loop: one step, evaluation, checkpoints."""

from __future__ import annotations

import hashlib
import math
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitskip_ref.config import ConfigError, ModelConfig
from bitskip_ref.files import remove_leftovers
from bitskip_train import losses
from bitskip_train.checked import Damage, restore_optimizer
from bitskip_train.checkpoint import Checkpoint, save_checkpoint
from bitskip_train.data import Split, Windows
from bitskip_train.draws import Draws
from bitskip_train.errors import CheckpointError, TrainingError
from bitskip_train.evaluate import evaluate
from bitskip_train.model import BitskipModel
from bitskip_train.objective import Objective
from bitskip_train.progress import Report
from bitskip_train.readings import public_init
from bitskip_train.run_folder import CONFIG, write_config
from bitskip_train.schedule import learning_rate
from bitskip_train.settings import TrainConfig, check_settings
from bitskip_train.soft_targets import Soft, SoftTargets, read_soft_targets
from bitskip_train.threads import time_threads
from bitskip_train.world import World

YARDSTICK = "validation"  # of a fingerprint: what may change, and begins best.pt anew
_COMPILERS = ("torch._dynamo", "torch._inductor")  # modules whose errors compiling raises


class Trainer:
    """One run. All randomness is a function of the seed and of how many windows have been used, so
    a resumed run repeats the bits, and several processes draw what one draws."""

    def __init__(
        self,
        config: ModelConfig,
        train: TrainConfig,
        data: Split,
        valid: Split | None,
        tokenizer_json: str,
        out: Path,
        resume: Checkpoint | None = None,
        world: World = World(),  # noqa: B008 (frozen)
        accept_changes: bool = False,
        first: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Build model and optimizer, from a checkpoint if one is given; choose the threads.

        first: weights to begin with, name -> f32 parameter (None: drawn from the seed).
        accept_changes: resume although the run is not the checkpoint's (`fingerprint`). Raises
        ConfigError where settings do not fit each other, CheckpointError where the checkpoint
        cannot be resumed.
        """
        check_settings(config, train)
        if train.threads:
            torch.set_num_threads(train.threads)
        self.config, self.train, self.valid, self.out = config, train, valid, out
        self.tokenizer_json, self.world = tokenizer_json, world
        self.device = pick_device(train.device, world.local_rank)
        self.windows = Windows(data.tokens, train.context, train.seed)
        self.soft: SoftTargets | None = None
        if train.soft_targets:
            path = Path(train.soft_targets)
            self.soft = read_soft_targets(path, data.tokens, config.vocab_size)
        torch.manual_seed(train.seed)
        self.model = BitskipModel(config)
        if train.init == "public":
            public_init(self.model, config.hadamard)
        if first is not None:
            self.model.load_state_dict(first)
        self.model.reading = train
        self.model.to(self.device)
        self.optimizer = make_optimizer(self.model, train)
        self.objective = Objective(self.model, train, self.device)
        self.thread_times: dict[int, float] = {}
        if not train.threads:
            self._choose_threads()
        self.fingerprint = fingerprint(train, data, valid, world, self.soft)
        self.stopped_by: int | None = None
        self.step = self.position = 0
        self.best_loss: float | None = None
        self.judged_anew = False  # losses of another text cannot be compared with this one's
        self.history: list[dict[str, Any]] = []
        if resume is not None:
            if resume.optimizer is None:
                raise CheckpointError("the checkpoint has no optimizer state: resume from last.pt")
            if not accept_changes:
                check_same_run(resume.fingerprint, self.fingerprint)
            self.model.load_state_dict(resume.state)
            try:
                restore_optimizer(self.optimizer, resume.optimizer)
            except Damage as error:
                raise CheckpointError(f"damaged checkpoint ({error})") from None
            if train.steps < resume.step:
                raise ConfigError(f"steps = {train.steps}: {resume.step} of the run are done")
            self.step, self.position = resume.step, resume.position
            self.history = list(resume.history)
            before = resume.fingerprint.get(YARDSTICK)
            if valid is not None:
                self.judged_anew = before not in (None, self.fingerprint[YARDSTICK])
            self.best_loss = None if self.judged_anew else resume.best_loss
        if train.compile:
            for block in self.model.layers:
                block.compile()

    def _choose_threads(self) -> None:
        """Measure passes of the first windows; leaves no gradient and no decision behind."""
        ids = torch.from_numpy(self.windows.batch(0, self.train.batch)).to(self.device)

        def run_pass() -> None:
            self.objective.backward(ids, 0, Draws(self.train.seed, 0, self.train.batch))

        if self.device.type == "cpu":
            self.thread_times = time_threads(run_pass, torch.get_num_threads())
            self.optimizer.zero_grad(set_to_none=True)
        best = min(self.thread_times, key=self.thread_times.__getitem__, default=0)
        best = self.world.share(best or torch.get_num_threads())
        torch.set_num_threads(best)
        self.train = self.train.replace(threads=best)

    @property
    def tokens_per_step(self) -> int:
        """Predicted tokens of one step, over all processes."""
        train = self.train
        return self.world.size * train.batch * train.accumulation * train.context

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns the mean of each term of the loss and the gradient norm.

        Raises TrainingError if one of them is not finite.
        """
        train, world = self.train, self.world
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(train, self.step)
        totals: dict[str, Tensor] = {}
        for _ in range(train.accumulation):
            first = self.position + world.rank * train.batch
            ids = torch.from_numpy(self.windows.batch(first, train.batch)).to(self.device)
            self.position += world.size * train.batch
            draws = Draws(train.seed, first, train.batch)
            soft = self._soft_rows(first)
            with self._separate_pass():
                terms = self.objective.backward(ids, self.step, draws, soft)
            for name, value in terms.items():
                totals[name] = totals.get(name, 0) + value / train.accumulation
        world.average([p.grad for p in self.model.parameters() if p.grad is not None])
        world.average(list(totals.values()))
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

    def _soft_rows(self, first: int) -> Soft | None:
        """The teacher's part of the targets of a pass whose windows are numbered from `first`."""
        if self.soft is None:
            return None
        train = self.train
        starts = [start + 1 for start in self.windows.starts(first, train.batch)]
        rows = self.soft.rows(starts, train.context, train.soft_share)
        return Soft(*(part.to(self.device) for part in rows))

    @contextmanager
    def _separate_pass(self) -> Iterator[None]:
        """Adds up a pass's gradients by themselves, then adds those of earlier passes: in the order
        in which two processes with a pass each would, so that they give the same bits."""
        earlier = {p: p.grad for p in self.model.parameters() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        yield
        for parameter, gradient in earlier.items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def run(self, tensorboard: bool | None = None) -> bool:
        """Train to the end. Returns False if a signal stopped it (`stopped_by`), after writing
        last.pt.

        The first Ctrl-C or SIGTERM lets the step finish, one more Ctrl-C stops at once. Writes
        config.toml, last.pt, best.pt (at each record of the validation loss, without optimizer
        state) and history.jsonl. Only one process may use the folder (`run_folder.locked`).
        """
        if self.world.main:
            for name in ("last.pt", "best.pt", "history.jsonl", CONFIG):
                remove_leftovers(self.out / name)
            write_config(self.out, self.config, self.train)
        report = Report(
            self.out if self.world.main else None, self.train.steps, self.step, self.history,
            tensorboard,
        )  # fmt: skip
        if self.judged_anew:
            report.note("other validation text than before: best.pt begins anew")
        try:
            with _signals() as seen:
                finished = self._loop(report, seen)
                self._save("last.pt")
                if finished and (not self.history or "valid_loss" not in self.history[-1]):
                    self._evaluate(report)
                    self._save("last.pt")
        except torch.cuda.OutOfMemoryError:
            raise TrainingError(
                "out of GPU memory: lower train.batch and raise train.accumulation"
            ) from None
        except Exception as error:
            if self.train.compile and type(error).__module__.startswith(_COMPILERS):
                reason = str(error).strip().splitlines()[0]
                raise TrainingError(
                    f"train.compile: {reason} (it needs a C++ compiler; try compile=false)"
                ) from error
            raise
        finally:
            report.close()
        return finished

    def _loop(self, report: Report, seen: list[int]) -> bool:
        """Steps until the last, until patience is over, or until a signal: then returns False."""
        train = self.train
        tokens, since = 0, time.monotonic()
        while self.step < train.steps:
            if signalled := self.world.largest(seen[0] if seen else 0):
                self.stopped_by = signalled
                return False
            if self._patience_is_over():
                report.note(f"stopped early: no better loss in {train.patience} checks")
                return True
            values = self.train_step()
            tokens += self.tokens_per_step
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
        return True

    def _evaluate(self, report: Report) -> None:
        """Validation losses, computed by the main process and told to all."""
        if self.valid is None:
            return
        train, found = self.train, None
        exits = sorted({*train.eval_exits, self.config.num_hidden_layers})
        if self.world.main:
            results = evaluate(
                self.model, _judging(train, self.valid), self.valid.bytes, context=train.context,
                batch=train.batch, exits=exits, autocast=self.objective.dtype,
                targets=train.targets,
            )  # fmt: skip
            found = [results[n].loss for n in exits]
        found = self.world.share(found)
        best = found[-1] < (math.inf if self.best_loss is None else self.best_loss)
        report.valid(self.step, dict(zip(exits, found, strict=True)), best)
        if best:
            self.best_loss = found[-1]
            self._save("best.pt", optimizer=False)

    def _patience_is_over(self) -> bool:
        found = [e["valid_loss"] for e in self.history if "valid_loss" in e]
        if not self.train.patience or self.best_loss not in found:
            return False
        return len(found) - 1 - found.index(self.best_loss) >= self.train.patience

    def _save(self, name: str, optimizer: bool = True) -> None:
        if not self.world.main:
            return
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
            fingerprint=self.fingerprint,
        )
        save_checkpoint(self.out / name, checkpoint)


DIGESTS = ("data", "soft targets")  # of a fingerprint: what they differ in says nothing to people


def fingerprint(
    train: TrainConfig, data: Split, valid: Split | None, world: World, soft: SoftTargets | None
) -> dict[str, Any]:
    """What must not change within a run, or it is another one: name -> value. And YARDSTICK.

    A teacher may come or go, as one is a setting; it may not become another under the same name.
    """
    yardstick = [train.context, train.targets]
    if valid is not None:
        yardstick.append(_digest(_judging(train, valid)))
    return {
        "data": _digest(data.tokens),
        **({"soft targets": [_digest(soft.ids), _digest(soft.probabilities)]} if soft else {}),
        "seed": train.seed,
        "context": train.context,
        "windows a step": train.batch * train.accumulation * world.size,
        YARDSTICK: yardstick,
    }


def _judging(train: TrainConfig, valid: Split) -> np.ndarray:
    """The validation tokens of a run."""
    return valid.tokens[: train.eval_tokens + 1] if train.eval_tokens else valid.tokens


def _digest(tokens: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(tokens).data).hexdigest()


def check_same_run(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise CheckpointError where a fingerprint differs from the checkpoint's, which may be of an
    earlier version and hold less."""
    changed = [
        f"other {name}" if name in DIGESTS else f"{name}: {now[name]}, was {before[name]}"
        for name in now
        if name in before and name != YARDSTICK and before[name] != now[name]
    ]
    if changed:
        raise CheckpointError(
            f"this is not the run that the checkpoint is of ({'; '.join(changed)}): give what it "
            "was begun with, or add --accept-changes"
        )


def make_optimizer(model: torch.nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; norms and biases have none."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), fused=True)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device a name means; `auto` is a GPU where there is one, else cpu. Raises ConfigError."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = f"cuda:{local_rank}" if gpus else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise ConfigError(f"device = {name!r}: must be auto, cpu, cuda or cuda:N")
    if name.startswith("cuda") and int(name[5:] or 0) >= gpus:
        raise ConfigError(f"device = {name!r}: {gpus} CUDA devices here; use auto or cpu")
    return torch.device(name)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that Ctrl-C and SIGTERM fill; a Ctrl-C after them raises KeyboardInterrupt as usual.

    SIGTERM never does: job schedulers and launchers may each send one.
    """
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)

    try:
        before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals do not come here
        yield seen
        return
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
