"""Several processes of one run, which `torchrun --nproc_per_node=N SCRIPT ...` starts and numbers by RANK."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch

from .errors import UserError, first_line


@dataclass(frozen=True)
class Processes:
    """The rank of this process, the number of processes, and what they do together."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, items):
        """This process's share of a sequence or a tensor: items rank, rank + count, ..."""
        return items[self.rank :: self.count]

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x over all processes; in place."""
        if self.count > 1:
            torch.distributed.all_reduce(x)
        return x

    def any(self, *here: bool) -> list[bool]:
        """For each of several conditions, whether it holds in any process."""
        return list(here) if self.count == 1 else (self.add(torch.tensor(here).int()) > 0).tolist()

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.count > 1:
            torch.distributed.barrier()

    def broadcast(self, value: object) -> object:
        """The first process's value, in all processes."""
        box = [value]
        if self.count > 1:
            torch.distributed.broadcast_object_list(box)
        return box[0]

    @contextmanager
    def in_turns(self) -> Iterator[None]:
        """A block for the first process, then the first of each machine, then the others, in this order."""
        turn = 0 if self.first else 1 if int(os.environ.get("LOCAL_RANK", 0)) == 0 else 2
        for _ in range(turn):
            self.barrier()
        yield
        for _ in range(2 - turn):
            self.barrier()


def join_processes(device: torch.device) -> Processes:
    """Join the process group if torchrun started this process; UserError where that fails."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Processes()
    group, backends = torch.distributed, {"cpu": ["gloo"], "cuda": ["nccl", "gloo"]}.get(device.type)
    if not backends:
        raise UserError(f"processes on {device.type} can't talk to each other: use one, or --device cpu")
    for backend in backends:  # gloo for tensors on the CPU: it keeps no GPU waiting
        if not group.is_available() or not getattr(group, f"is_{backend}_available")():
            instead = "; --device cpu needs gloo instead" if backend == "nccl" else ""
            raise UserError(f"this PyTorch has no {backend}, which processes on {device.type} need{instead}")
    if not group.is_initialized():
        by = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        try:  # two hours, for the first process decodes and draws previews
            group.init_process_group(by, timeout=timedelta(hours=2))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the processes could not meet: {first_line(error)}") from None
    return Processes(group.get_rank(), group.get_world_size())
