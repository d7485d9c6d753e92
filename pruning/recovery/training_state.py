"""State of a training run on disk: one safetensors file with JSON in its header, no pickle."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pruning.errors import StorageError


@dataclass(slots=True)
class TrainingState:
    """Where a run is.

    Attributes:
        best: Name -> trained parameter, where the validation figures were best.
        curve: One entry a validation: step, seconds, figures.
        step: Updates done.
        seconds: Time they took.
        best_step: Update that `best` is from; 0: the start.
    """

    best: dict[str, Tensor]
    curve: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0
    best_step: int = 0


@dataclass(frozen=True, slots=True)
class Carried:
    """What one part of a training leaves to the next, which trains another student with some of the same parts.

    Attributes:
        parameters: Name -> trained parameter.
        moments: Name -> what the optimizer keeps of it; nothing where the part is new.
        step: Updates done.
        seconds: Time they took.
        first: The block from which on weights were trained.
    """

    parameters: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Any]]
    step: int
    seconds: float
    first: int = 0

    @classmethod
    def of(
        cls, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: TrainingState, first: int
    ) -> "Carried":
        """All there is after the first part."""
        moments = {name: dict(optimizer.state.get(parameter, {})) for name, parameter in parameters.items()}
        trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        return cls(trained, moments, state.step, state.seconds, first)


@torch.no_grad()
def carry(carried: Carried, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Put the parameters of the second part, and what its optimizer keeps of them, where the first part left them."""
    for name, parameter in parameters.items():
        parameter.copy_(carried.parameters[name])
        optimizer.state[parameter] = {
            kind: value.clone() if isinstance(value, Tensor) else value
            for kind, value in carried.moments.get(name, {}).items()
        }


def save_state(
    path: Path | None,
    scope: str,
    state: TrainingState,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write the state, in one step: a run that is killed leaves the old or the new one.

    Args:
        path: File; None writes nothing.
        scope: What the run depends on; another one does not find this state.
        state: Where the run is.
        parameters: What is trained, by name.
        optimizer: Its moments are kept; it may train some of them only.

    Raises:
        StorageError: The file cannot be written.
    """
    if path is None:
        return
    tensors = {f"now.{name}": parameter.detach() for name, parameter in parameters.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in state.best.items()}
    for name, parameter in parameters.items():
        tensors |= {f"optimizer:{key}:{name}": value for key, value in optimizer.state.get(parameter, {}).items()}
    header = {
        "scope": _digest(scope), "step": state.step, "seconds": state.seconds, "best_step": state.best_step,
        "curve": state.curve,
    }  # fmt: skip
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        packed = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        save_file(packed, temporary, metadata={"state": json.dumps(header)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error}; free some space, then run the same line again") from error


def load_state(
    path: Path | None, scope: str, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> TrainingState | None:
    """Put parameters and optimizer where an earlier run left them; None where there is no state of this scope."""
    if path is None or not path.exists():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = json.loads((file.metadata() or {}).get("state", "{}"))
            if header.get("scope") != _digest(scope):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):
        return None  # not one of ours, or damaged: the run starts anew
    best = {}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"now.{name}"])
            if f"best.{name}" in tensors:
                best[name] = tensors[f"best.{name}"].to(parameter.device)
        for key, tensor in tensors.items():
            if key.startswith("optimizer:"):
                _, kind, name = key.split(":", 2)
                place = tensor.device if kind == "step" else parameters[name].device
                optimizer.state[parameters[name]][kind] = tensor.to(place)
    return TrainingState(best, header["curve"], header["step"], header["seconds"], header["best_step"])


def _digest(scope: str) -> str:
    return hashlib.sha256(scope.encode()).hexdigest()
