"""Where tensors live: device, threads, precision, determinism, and what makes a GPU fast."""

import contextlib
import os

import torch
from torch import Tensor, nn

from alignflow_core import distributed
from alignflow_core.config import Machine
from alignflow_core.errors import InputError
from alignflow_core.flow.path import VelocityModel
from alignflow_core.networks.on_gpu import suit_gpu

RECOMPILATIONS = 32  # all networks of a process count together: two of stage 2, with and without gradient, some batch sizes
WARM_UPS = 3  # calls before a recording: libraries choose their kernels in the first


def prepare(machine: Machine) -> torch.device:
    """Set threads and deterministic algorithms, return the device; of several processes on one machine each has a GPU of its own.

    Raises:
        InputError: ``cuda`` asked for and not there, or fewer GPUs than processes.
    """
    if machine.device == "cuda" and not torch.cuda.is_available():
        raise InputError("machine.device: cuda is not available here; use machine.device=auto or cpu")
    device = torch.device("cuda" if machine.device != "cpu" and torch.cuda.is_available() else "cpu")
    number = distributed.local_rank()
    if device.type == "cuda" and number is not None:
        if number >= torch.cuda.device_count():
            raise InputError(f"machine.device: process {number} of this machine finds only {torch.cuda.device_count()} GPUs; start one for each")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    torch.set_num_threads(machine.threads)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a pass over memory for every result
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # its gradient varies from run to run; flash attention's does not
    return device


def autocast(machine: Machine, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bf16 autocast where the profile asks for it and the device is a GPU."""
    if machine.precision == "bf16" and device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def placed(model: nn.Module, machine: Machine, device: torch.device) -> nn.Module:
    """Move a network to its device, in channels-last layout; on a GPU with layers to its liking, and compiled if the profile says so."""
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device.type == "cuda":
        suit_gpu(model, machine.compile)
        if machine.compile:
            torch._dynamo.config.recompile_limit = RECOMPILATIONS
            torch._functorch.config.donated_buffer = False  # private alignment goes back through one graph several times
            model.compile()
    return model


def ready(model: nn.Module, machine: Machine, device: torch.device) -> nn.Module:
    """:func:`placed` for training, shared by all processes (``distributed.py``)."""
    return distributed.together(placed(model, machine, device), device)


class Replayed:
    """A velocity model without gradient whose GPU work is recorded once for each shape of its inputs and replayed (CUDA graphs).

    The weights are read anew at each call, their names are not: change them in place. On a CPU calls are passed on.
    """

    def __init__(self, model: VelocityModel) -> None:
        self.model = model
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None  # of scratch memory; recordings never run at once
        self.recorded: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Velocity [B, C, H, W] of x_t at times t [B] under cond."""
        inputs = (x_t, t, cond)
        if x_t.device.type != "cuda":
            return self.model(*inputs)
        key = tuple(each.shape for each in inputs)
        if key not in self.recorded:
            self.recorded[key] = self._record(inputs)
        graph, held, result = self.recorded[key]
        for place, value in zip(held, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return result.clone()  # the next replay writes there

    @torch.no_grad()
    def _record(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
        held = tuple(each.clone() for each in inputs)
        kind = held[0].device.type
        # Casts of weights must be part of the graph: a cached one would keep the weights of the recording.
        with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(WARM_UPS):
                    self.model(*held)
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                result = self.model(*held)
        return graph, held, result
