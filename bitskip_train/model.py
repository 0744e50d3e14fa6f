"""The model: embedding, blocks, exits (SPEC 7.4, 8). One forward order over two arithmetics."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from bitskip_ref.config import ModelConfig
from bitskip_ref.rope import rope_table
from bitskip_ref.tensors import linear_layers
from bitskip_train.checkpoint import Checkpoint
from bitskip_train.exact import ExactOps
from bitskip_train.fast import FastOps
from bitskip_train.functions import PassThrough
from bitskip_train.layers import (
    BYPASSES,
    Block,
    Cache,
    FeedForward,
    Norm,
    Pass,
    TensorTrace,
    Weight,
    peak,
)
from bitskip_train.readings import AfterOps, departures, operations
from bitskip_train.settings import TrainConfig

Bypass = Literal["none", "weights", "activations"]
INIT_STD = 0.02


class Exit(nn.Module):
    """What exit n < L has of its own (SPEC 8.1, 8.8); empty where it shares everything."""

    block: FeedForward
    norm: Norm
    head: Weight

    def __init__(self, config: ModelConfig, n: int) -> None:
        super().__init__()
        if n in config.exit_blocks:
            self.block = FeedForward(config, config.exit_block_shapes(), config.exit_block_norms())
        if config.exit_norm == "per_layer":
            self.norm = Norm(config.hidden_size, config.norm, config.norm_eps)
        if config.exit_head == "per_layer":
            self.head = Weight(config.vocab_size, config.hidden_size)


class BitskipModel(nn.Module):
    """A model of any configuration; parameters carry the tensor names of FORMAT 3, in float32.

    `arithmetic` chooses "fast" (training; bfloat16 products under `torch.autocast`) or "exact"
    (the definition's bits, on CPU, without gradients).
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None) -> None:
        """Random weights from `generator`, or from PyTorch's global one (`torch.manual_seed`)."""
        super().__init__()
        self.config = config
        self.arithmetic: Literal["fast", "exact"] = "fast"
        self.reading = TrainConfig()  # fast arithmetic is in this run's reading of the papers
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        if config.embedding_norm:
            self.embedding_norm = Norm(config.hidden_size, config.norm, config.norm_eps)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.exits = nn.ModuleDict(
            {str(n): Exit(config, n) for n in range(1, config.num_hidden_layers)}
        )
        self.final_norm = Norm(config.hidden_size, config.norm, config.norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Weight(config.vocab_size, config.hidden_size)
        for name, table in zip(("rope_cos", "rope_sin"), rope_table(config), strict=True):
            self.register_buffer(name, torch.from_numpy(np.array(table)), persistent=False)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weights, std 0.02; the two projections onto the residual by 1 / sqrt(2 L) less."""
        residual = 1.0 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, module in self.named_modules():
            if isinstance(module, Weight):
                scale = residual if name.endswith(("o_proj", "down_proj")) else 1.0
                nn.init.normal_(module.weight, 0.0, INIT_STD * scale, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Norm):
                nn.init.ones_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def restored(cls, checkpoint: Checkpoint) -> BitskipModel:
        """The model of a checkpoint, in the reading of the papers that it was trained with."""
        model = cls(checkpoint.config)
        model.reading = TrainConfig.from_dict(checkpoint.train)
        model.load_state_dict(checkpoint.state)
        return model

    # ---- forward --------------------------------------------------------------------

    def ops(self) -> FastOps:
        """The operations of the chosen arithmetic; call outside a disabled autocast region."""
        if self.arithmetic == "exact":
            if found := departures(self.reading.to_dict()):
                raise ValueError(f"{', '.join(found)}: exact arithmetic has the definition alone")
            return ExactOps()
        device = self.rope_cos.device.type
        enabled = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if enabled else torch.float32
        ops = operations(self.reading, self.config.hadamard)(dtype)
        ops.causal = self.reading.mask == "causal"
        return ops

    @contextmanager
    def region(self, ops: FastOps) -> Iterator[None]:
        """Where operations run: they choose their dtypes themselves, which autocast would undo,
        and exact ones have no gradients."""
        grad = torch.is_grad_enabled() and not ops.exact
        with torch.autocast(self.rope_cos.device.type, enabled=False), torch.set_grad_enabled(grad):
            yield

    def start(self, ops: FastOps, bypass: str, first: int, tokens: int) -> Pass:
        """What the blocks of a pass over positions first .. first + tokens - 1 are given."""
        rows = slice(first, first + tokens)
        config = self.config
        widths = (*config.linear_inputs(), config.kv_size) if config.hadamard else ()
        make = ops.rotations if config.linear == "ternary" else ops.unpadded_rotations
        rotations = make(widths, self.rope_cos.device)
        return Pass(ops, bypass, first, self.rope_cos[rows], self.rope_sin[rows], rotations)

    def embed(self, ids: Tensor, ops: FastOps) -> Tensor:
        """ids [B, T] -> f32 [B, T, D], normed where the configuration says so."""
        table = self.embed_tokens
        x = ops.embed(ids, table.weight, table.scale, self.config.head_format)
        x = self.turn_head(x, ops)
        return self.embedding_norm(x, ops) if self.config.embedding_norm else x

    def turn_head(self, x: Tensor, ops: FastOps) -> Tensor:
        """SPEC 5.4, where the configuration says so: f32 [..., D] -> [..., D]."""
        if not self.config.rotated_head:
            return x
        return ops.rotate_unpadded(x, ops.unpadded_rotations([x.shape[-1]], x.device))

    def head_peak(self, hidden: Tensor) -> Tensor:
        """`layers.peak` of what the last head reads: f32 [..., D] after all blocks -> scalar."""
        ops, norm = self.ops(), self.exit_norm(self.config.num_hidden_layers)
        with self.region(ops):
            return peak(self.turn_head(norm(hidden, ops), ops))

    def forward(
        self,
        ids: Tensor,
        *,
        exit_layer: int | None = None,
        keep: Tensor | None = None,
        collect: Collection[int] = (),
        bypass: Bypass = "none",
        cache: Cache | None = None,
        trace: TensorTrace | None = None,
        peaks: list[list[Tensor]] | None = None,
        peak_blocks: int = 0,
    ) -> dict[int, Tensor]:
        """Hidden states f32 [B, T, D] after n blocks, for n in `collect` and the last one run.

        ids int64 [B, T]; `exit_layer` 1..L counts executed blocks (None: L). keep bool [L, B]:
        where False, block l (from 0) is the identity for sample b; only kept samples are computed.
        `bypass` leaves weights, or weights and activations, unquantized (SPEC 10.20). `cache`
        holds earlier positions and is advanced. peaks: to be filled, a list for each of the first
        `peak_blocks` blocks, 0: of all (`layers.peak`). Raises ValueError for values out of range.
        """
        config = self.config
        depth = config.num_hidden_layers if exit_layer is None else exit_layer
        self._check(ids, depth, keep, collect, bypass, cache)
        first = cache.length if cache is not None else 0
        ops = self.ops()
        with self.region(ops):
            run = self.start(ops, bypass, first, ids.shape[1])
            x = self.embed(ids, ops)
            if trace is not None:
                trace("embed", x)
            hidden = {0: x} if 0 in collect else {}
            for i in range(depth):
                found: list[Tensor] = []  # of one block: compiled code is made for a list's length
                counts = peaks is not None and (i < peak_blocks or not peak_blocks)
                own = run._replace(peaks=found) if counts else run
                x = self.run_block(i, x, own, None if keep is None else keep[i], cache, trace)
                if peaks is not None and counts:
                    peaks.append(found)
                if i + 1 in collect or i + 1 == depth:
                    hidden[i + 1] = x
        if cache is not None:
            cache.advance(first, ids.shape[1], depth)
        return hidden

    def run_block(
        self,
        i: int,
        x: Tensor,
        run: Pass,
        keep: Tensor | None = None,
        cache: Cache | None = None,
        trace: TensorTrace | None = None,
    ) -> Tensor:
        """Block i on the samples that `keep` bool [B] names (None: all); x f32 [B, T, D]."""
        block = self.block(i)
        # A compiled block rounds elsewhere, and is made for training's passes only.
        plain = cache is None and trace is None and not run.ops.exact
        call = block if plain else block.forward
        if keep is not None and not bool(keep.all()):
            chosen = keep.nonzero().squeeze(1).to(x.device)
            if not len(chosen):
                return PassThrough.apply(x, *block.own_parameters())
            return x.index_copy(0, chosen, call(x.index_select(0, chosen), run))
        remember = report = None
        if cache is not None:
            remember = lambda keys, values: cache.write(i, run.first, keys, values)  # noqa: E731
        if trace is not None:
            report = lambda stage, values: trace(f"layers.{i}.{stage}", values)  # noqa: E731
        return call(x, run, remember, report)

    def block(self, i: int) -> Block:
        """Block i, from 0."""
        return cast(Block, self.layers[i])

    # ---- exits ----------------------------------------------------------------------

    def exit_norm(self, n: int) -> Norm:
        """The final norm of exit n = 1..L."""
        return cast(Norm, self.get_submodule(self.config.exit_names(n)[0]))

    def exit_head(self, n: int) -> Weight:
        """The head of exit n = 1..L."""
        return cast(Weight, self.get_submodule(self.config.exit_names(n)[1]))

    def logits(
        self, hidden: Tensor, n: int, trace: TensorTrace | None = None, *, normed: bool = True
    ) -> Tensor:
        """SPEC 8.1, 8.8: f32 [..., D] after n = 1..L blocks -> logits [..., V].

        float32, or bfloat16 under autocast. normed: False leaves the norm out (SPEC 10 row 24).
        """
        self._check_exit(n)
        ops, norm, head = self.ops(), self.exit_norm(n), self.exit_head(n)
        with self.region(ops):
            if n in self.config.exit_blocks:
                hidden = self.exit_block(n, hidden, ops, trace)
            normed_hidden = norm(hidden, ops) if normed else hidden
            turned = self.turn_head(normed_hidden, ops)
            z = ops.head(turned, head.weight, head.scale, self.config.head_format)
        if trace is not None:
            trace("exit_norm", normed_hidden)
            trace("logits", z)
        return z

    def exit_block(
        self, n: int, hidden: Tensor, ops: FastOps, trace: TensorTrace | None = None
    ) -> Tensor:
        """SPEC 8.8: f32 [..., D] after n blocks -> f32 [..., D], through the exit's own block."""
        at = f"exits.{n}.block"
        run = self.start(ops, "none", 0, 0)  # no position is asked for
        block = cast(FeedForward, self.get_submodule(at))
        report = trace or (lambda *_: None)
        return block.feed_forward(hidden, run, lambda name, x: report(f"{at}.{name}", x))

    def gate_logits(self, hidden: Tensor, n: int) -> Tensor:
        """The argument of the routing gate's sigmoid after block n = 1..L: f32 [...]."""
        self._check_exit(n)
        if not self.config.gates:
            raise ValueError("this model has no routing gates: use a configuration with gates")
        ops = self.ops()
        with self.region(ops):
            return self.block(n - 1).gate(hidden, ops)

    def gate(self, hidden: Tensor, n: int) -> Tensor:
        """SPEC 8.4: probability of exiting after block n = 1..L: f32 [B, T, D] -> f32 [B, T]."""
        ops, z = self.ops(), self.gate_logits(hidden, n)
        with self.region(ops):
            return ops.sigmoid(z)

    # ---- other ----------------------------------------------------------------------

    def quantized_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, weight f32 [out, in]) of every ternary linear layer; none in an FP32 model."""
        if self.config.linear == "ternary":
            for name in linear_layers(self.config):
                yield f"{name}.weight", cast(Weight, self.get_submodule(name)).weight

    def _check_exit(self, n: int) -> None:
        if not 1 <= n <= self.config.num_hidden_layers:
            raise ValueError(
                f"exit {n}: must count executed blocks, 1..{self.config.num_hidden_layers}"
            )

    def _check(
        self,
        ids: Tensor,
        depth: int,
        keep: Tensor | None,
        collect: Collection[int],
        bypass: str,
        cache: Cache | None,
    ) -> None:
        config = self.config
        self._check_exit(depth)
        if ids.dim() != 2 or not ids.numel():
            raise ValueError(f"ids of shape {tuple(ids.shape)}: must be [B, T], not empty")
        end = ids.shape[1] + (cache.length if cache is not None else 0)
        if end > config.max_position_embeddings:
            raise ValueError(
                f"{end} positions: more than the context of {config.max_position_embeddings}"
            )
        if any(not 0 <= n <= depth for n in collect):
            raise ValueError(f"collect {sorted(collect)}: must lie in 0..{depth}, the blocks run")
        if bypass not in BYPASSES:
            raise ValueError(f"bypass {bypass!r}: must be one of {', '.join(BYPASSES)}")
        if keep is not None and tuple(keep.shape) != (config.num_hidden_layers, ids.shape[0]):
            raise ValueError(
                f"keep of shape {tuple(keep.shape)}: must be [L, B] = "
                f"[{config.num_hidden_layers}, {ids.shape[0]}]"
            )
        ops = operations(self.reading, config.hadamard)
        if bypass == "activations" and issubclass(ops, AfterOps):
            raise ValueError(f"bypass {bypass!r}: this reading transforms quantized values only")
        if cache is not None and self.reading.mask != "causal":
            raise ValueError("a cache without a causal mask: later tokens would change the past")
        if keep is not None and cache is not None:
            raise ValueError("keep with a cache: layer dropout is for training, without a cache")
