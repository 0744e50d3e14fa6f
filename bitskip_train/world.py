"""Several processes, one model: what `torchrun` needs of the trainer.

Every process holds the whole model, takes its own windows of each step and averages gradients.
There is no wrapper around the model, so layer dropout and exits work as in one process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among all; alone by default."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine; also its GPU

    @classmethod
    def from_environment(cls) -> World:
        """Join the processes that `torchrun` started; alone without it."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            # Both: gradients may lie on GPUs, flags and losses on the CPU.
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return cls(int(os.environ["RANK"]), size, int(os.environ["LOCAL_RANK"]))

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace f32 tensors, the same shapes everywhere, by their mean over all processes."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def largest(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.size == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def share(self, value: Any) -> Any:
        """The main process's value (plain Python), in every process; the others' is ignored."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1:
            dist.destroy_process_group()
