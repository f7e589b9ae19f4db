"""Where tensors live: device, threads, precision, determinism."""

import contextlib
import os

import torch
from torch import nn

from alignflow_core import distributed
from alignflow_core.config import Machine
from alignflow_core.errors import InputError


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
    return device


def autocast(machine: Machine, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bf16 autocast where the profile asks for it and the device is a GPU."""
    if machine.precision == "bf16" and device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def ready(model: nn.Module, machine: Machine, device: torch.device) -> nn.Module:
    """Move a network to its device, in channels-last layout, shared by all processes (``distributed.py``), compiled if the profile says so."""
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = distributed.together(model, device)
    return torch.compile(model) if machine.compile and device.type == "cuda" else model  # type: ignore[return-value]
