"""Networks and training state on disk: tensors in safetensors, the rest in JSON, never pickle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from alignflow_core.artifact import file_hash, read_json, write_json, write_whole
from alignflow_core.errors import InputError


def save_network(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write ``weights.safetensors`` and ``config.json`` (with the weights' SHA-256)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "weights.safetensors", weights)
    write_json(folder / "config.json", {**config, "weights_sha256": file_hash(folder / "weights.safetensors")})


def load_network(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights and config. Raises :class:`InputError` on a missing, damaged or altered file."""
    config = read_json(folder / "config.json")
    file = folder / "weights.safetensors"
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'}: no description of a network; rebuild the artifact it belongs to")
    if not file.exists() or file_hash(file) != config.get("weights_sha256"):
        raise InputError(f"{file}: missing or not what config.json records; rebuild the artifact it belongs to")
    return load_tensors(file), config


def rebuilt(folder: Path, build: Callable[[dict[str, Any]], nn.Module]) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint folder with its weights, in evaluation mode, and its config.

    What the config describes is first laid out without memory and held against the weights: a config from elsewhere can name anything.

    Raises:
        InputError: the config describes no network, or another one than the weights are of.
    """
    weights, config = load_network(folder)
    try:
        with torch.device("meta"):
            expected = {name: value.shape for name, value in build(config).state_dict().items()}
        if expected != {name: value.shape for name, value in weights.items()}:
            raise InputError("its weights are those of another network")
        model = build(config)
        model.load_state_dict(weights)
    except (InputError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise InputError(f"{folder}: config.json does not describe a network of ours ({' '.join(str(error).split())[:200]}); "
                         "rebuild the artifact") from error
    return model.eval(), config


def save_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as :func:`write_whole` does."""
    write_whole(file, to_bytes({name: value.detach().cpu().contiguous() for name, value in tensors.items()}))


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Read tensors; a damaged file is an :class:`InputError`."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: not a readable safetensors file ({error}); rebuild the artifact it belongs to") from error


def pack_optimiser(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimiser moments as flat tensors: ``<parameter number>/<name>``."""
    state = optimiser.state_dict()["state"]
    return {f"{index}/{name}": torch.as_tensor(value) for index, values in state.items() for name, value in values.items()}


def unpack_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the moments of :func:`pack_optimiser` back, in the memory layout of their parameters: fused steps rely on it."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition("/")
        like = parameters[int(index)]
        state.setdefault(int(index), {})[name] = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with ``prefix:`` before each name."""
    return {f"{prefix}:{name}": value for name, value in tensors.items()}


def section(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors saved under ``prefix:``."""
    return {name.removeprefix(f"{prefix}:"): value for name, value in tensors.items() if name.startswith(f"{prefix}:")}


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside the wrapper of DistributedDataParallel, where there is one."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model  # type: ignore[no-any-return]
