"""Snapshots: all a run needs to go on exactly where it was, in a folder that appears whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import CheckpointError

log = logging.getLogger(__name__)
WEIGHTS, STATE, NOTES = "model.safetensors", "training.safetensors", "training.json"


def write(folder: Path, step: int, save_model: Callable[[Path], None], tensors: dict[str, Tensor],
          notes: dict[str, Any], keep: int) -> Path:
    """Write ``folder/step-N`` and remove all but the newest ``keep``. Raises CheckpointError."""
    target, part = folder / f"step-{step:08d}", folder / f".{uuid.uuid4().hex}.part"
    try:
        part.mkdir(parents=True)
        save_model(part / WEIGHTS)
        safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part / STATE)
        (part / STATE).chmod((part / WEIGHTS).stat().st_mode & 0o777)  # safetensors would let nobody else read it
        (part / NOTES).write_text(json.dumps({"step": step, **notes}, indent=1), encoding="utf-8")
        for file in part.iterdir():
            with file.open("r+b") as opened:  # Windows flushes only what may be written
                os.fsync(opened.fileno())
        if not _whole(target, part):  # else it stays: the same step of the same run, and never none of it is there
            if target.exists():
                shutil.rmtree(target)
            os.replace(part, target)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"the snapshot {target} cannot be written "
                              f"({getattr(error, 'strerror', None) or error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in found(folder)[:-max(1, keep)]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _whole(snapshot: Path, like: Path) -> bool:
    """Whether a snapshot can be read and its files are as large as those of ``like``."""
    try:
        read(snapshot)
        return all((snapshot / name).stat().st_size == (like / name).stat().st_size for name in (WEIGHTS, STATE))
    except (OSError, CheckpointError):
        return False


def found(folder: Path) -> list[Path]:
    """Snapshots in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / NOTES).is_file())


def read(snapshot: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The notes and tensors of a snapshot. Raises CheckpointError for one that is damaged."""
    try:
        notes = json.loads((snapshot / NOTES).read_text(encoding="utf-8"))
        return notes, safetensors.torch.load_file(snapshot / STATE)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{snapshot} cannot be read ({error}); remove it to go on from the one before") from None


def sweep(folder: Path) -> None:
    """Remove what killed runs left half-written."""
    for part in folder.glob(".*.part"):
        shutil.rmtree(part, ignore_errors=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors for safetensors, and as plain values for JSON."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                plain[f"{index}.{name}"] = value
    return tensors, plain


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    for key, value in plain.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
