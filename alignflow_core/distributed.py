"""One stage on several processes, as ``torchrun`` starts them: rank 0 *is* the stage, the others lend it their gradients.

Rank 0 runs the stage as a single process would: it alone locks, logs, saves and publishes. When it reaches a network that can be trained
together (``devices.ready``) it calls the others, who then run the same stage function with its writing turned off. Every rank draws the
same global batch from the same seeded generator and computes its own rows of it; gradients are averaged by DistributedDataParallel. The
result is that of one process, up to the order of floating-point sums. What is never called for runs on rank 0 alone.

All of this is off, and costs nothing, unless :func:`run_together` has been entered.
"""

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from alignflow_core.config import load_project
from alignflow_core.errors import InputError
from alignflow_core.runner import Context, call
from alignflow_core.stages import STAGES, node_id

POLL_SECONDS = 0.2
COLLECTIVE_TIMEOUT = timedelta(hours=1)  # a rank may have to read its data before it joins

_store: "dist.Store | None" = None  # what the processes tell each other before, after and besides training


def run_together(lead: Callable[[], int], root: Path, stage: str, key: str | None) -> int:
    """Exit code of this process among those that torchrun started; ``lead`` is what rank 0 runs.

    The first rank that fails says why; the others, whose exchange of gradients then breaks, leave without a word.
    """
    global _store
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"WORLD_SIZE is set and {', '.join(missing)} not; start several processes with torchrun, or unset WORLD_SIZE")
    _store, rank, _ = next(dist.rendezvous("env://"))
    try:
        if rank == 0:
            code = lead()
            _store.set("finished", "")
        else:
            code = _follow(_store, root.resolve(), stage, key)
    except (Exception, KeyboardInterrupt):
        if _store.compare_set("failed on rank", "", str(rank)) != str(rank).encode():
            return 1
        raise
    if dist.is_initialized():  # not after a failure: it would wait for ranks that are gone
        dist.destroy_process_group()
    return code


def _follow(store: dist.Store, root: Path, name: str, key: str | None) -> int:
    """Wait to be called to training or dismissed; when called run the stage function, its files going to a scratch folder."""
    while not store.check(["training"]):
        if store.check(["finished"]):
            return 0
        time.sleep(POLL_SECONDS)  # not store.wait, which would hold back signals
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(key, root, root / ".alignflow" / "work" / node_id(name, key), lambda *_: None, lambda *_: None)
        call(load_project(root / "params.yaml"), STAGES[name], key, Path(scratch), context)
    while not store.check(["finished"]):
        time.sleep(POLL_SECONDS)
    return 0


def together(model: nn.Module, device: torch.device) -> nn.Module:
    """The network made ready for joint training where several processes were started, otherwise as it is."""
    if _store is None:
        return model
    if not dist.is_initialized():
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if rank == 0:
            _store.set("training", "")
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=dist.PrefixStore("group", _store),
                                rank=rank, world_size=world, timeout=COLLECTIVE_TIMEOUT)
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def local_rank() -> int | None:
    """Number of this process on its machine, ``None`` where it is alone."""
    return None if _store is None else int(os.environ["LOCAL_RANK"])


def leads() -> bool:
    """Whether this process is the one that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def own_rows(batch: int) -> slice:
    """This process's rows of a global batch; all of them where it trains alone.

    Raises:
        InputError: the batch cannot be shared evenly, so that the mean of the ranks' gradients would not be its gradient.
    """
    if not dist.is_initialized():
        return slice(None)
    world, rank = dist.get_world_size(), dist.get_rank()
    if batch % world:
        raise InputError(f"training.batch: {batch} images cannot be shared evenly by {world} processes; start as many as divide it")
    return slice(batch // world * rank, batch // world * (rank + 1))


def mean(numbers: dict[str, float]) -> dict[str, float]:
    """Numbers averaged over the ranks; not finite where they are not on any rank."""
    if not dist.is_initialized():
        return numbers
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    dist.all_reduce(values)
    return dict(zip(numbers, (values / dist.get_world_size()).tolist(), strict=True))


def largest(number: int) -> int:
    """The largest of the ranks' numbers."""
    if not dist.is_initialized():
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)
