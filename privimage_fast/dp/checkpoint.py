"""Checkpoints of a private training loop: one safetensors file with a JSON header, no pickle.

Tensors: ``module/<key>`` and ``optimizer/<parameter number>/<name>``. The header's ``state`` holds the optimizer's groups and
numbers, the account, and the user's own JSON values.
"""

from __future__ import annotations

import json
import os
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from privimage_fast.dp.dp_optimizer import DPOptimizer

FORMAT = "privimage-checkpoint-1"


def save_file(
    path: str | os.PathLike[str],
    *,
    module: nn.Module,
    optimizer: Optimizer | None,
    account: dict[str, Any],
    extra: dict[str, Any],
) -> None:
    """Writes beside ``path`` and renames: an interruption leaves the old file. TypeError for what is no JSON value."""
    tensors = {f"module/{key}": t for key, t in module.state_dict().items()}
    state: dict[str, Any] = {"account": account, "extra": extra}
    if optimizer is not None:
        values = optimizer.state_dict()
        numbers: dict[str, dict[str, Any]] = {}
        for index, entry in values["state"].items():
            for name, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{index}/{name}"] = value
                else:
                    numbers.setdefault(str(index), {})[name] = value
        state["optimizer"] = {"numbers": numbers, "param_groups": values["param_groups"]}
        if isinstance(optimizer, DPOptimizer):
            state["max_grad_norm"] = optimizer.max_grad_norm  # moves under adaptive clipping
    # Tied weights share storage, which the format does not know.
    data = save(
        {k: t.detach().cpu().clone().contiguous() for k, t in tensors.items()}, {"format": FORMAT, "state": json.dumps(state)}
    )
    temporary = f"{os.fspath(path)}.part"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_file(
    path: str | os.PathLike[str], *, module: nn.Module, optimizer: Optimizer | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(account, extra). ValueError where the file is no checkpoint, or has no optimizer and one is given."""
    tensors: dict[str, Tensor] = {}
    with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path}: format {metadata.get('format')!r}, expected {FORMAT!r}")
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    state = json.loads(metadata["state"])
    if optimizer is not None and "optimizer" not in state:
        raise ValueError(f"{path}: holds no optimizer state; load it with optimizer=None")
    module.load_state_dict({key.removeprefix("module/"): t for key, t in tensors.items() if key.startswith("module/")})
    if optimizer is not None:
        entries: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in state["optimizer"]["numbers"].items()}
        for key, t in tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/", 2)
                entries.setdefault(int(index), {})[name] = t
        optimizer.load_state_dict({"state": entries, "param_groups": [_group(g) for g in state["optimizer"]["param_groups"]]})
        if isinstance(optimizer, DPOptimizer) and "max_grad_norm" in state:  # not where its inner optimizer was saved
            optimizer.max_grad_norm = state["max_grad_norm"]
    return state["account"], state["extra"]


def _group(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; Adam's betas are one."""
    return {name: tuple(v) if isinstance(v, list) and name != "params" else v for name, v in values.items()}
