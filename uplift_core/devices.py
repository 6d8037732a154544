"""Where to compute and in which number format, when the user does not say.

CUDA has been run on an H100 (tests/test_graphics_device.py). Untested: what is particular to XPU and MPS, here and in
memory.py, measure.py and maps.py, was written from torch's documentation.
"""

from __future__ import annotations

import functools
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import autocast

from .errors import InputError

log = logging.getLogger(__name__)

DTYPES = {
    "fp32": torch.float32, "float32": torch.float32, "float": torch.float32,
    "fp16": torch.float16, "float16": torch.float16, "half": torch.float16,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp64": torch.float64, "float64": torch.float64, "double": torch.float64,
}


def _count(kind: str) -> int:
    """How many devices of this kind torch sees; an old torch may not know the kind at all."""
    if kind == "cpu":
        return 1
    if kind == "mps":
        backend = getattr(torch.backends, "mps", None)
        return int(backend is not None and backend.is_available())
    module = getattr(torch, kind, None)
    return int(module.device_count()) if module is not None and module.is_available() else 0


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name; ``auto`` takes the first there is of cuda, xpu, mps, cpu.

    Raises InputError for a name torch does not know and for a device that is not there.
    """
    if str(name).lower() == "auto":
        return torch.device(next(kind for kind in ("cuda", "xpu", "mps", "cpu") if _count(kind)))
    try:
        device = torch.device(name if isinstance(name, torch.device) else str(name).lower())
    except RuntimeError:
        raise InputError(f"device is {name!r}; expected auto, cpu, cuda, cuda:N, xpu or mps") from None
    if device.type not in ("cpu", "cuda", "xpu", "mps"):
        return device  # another back end: torch itself knows whether it is there
    there = _count(device.type)
    if not there:
        raise InputError(f"{device.type} was asked for but this torch sees no {device.type.upper()} device; "
                         "choose device=auto or cpu, or install a torch built for it")
    if (device.index or 0) >= there and device.type != "cpu":
        raise InputError(f"{device} was asked for but there are {there} {device.type.upper()} devices, counted from 0")
    return device


def choose_dtype(name: str | torch.dtype = "auto", device: str | torch.device = "cpu") -> torch.dtype:
    """The number format of that name; ``auto`` is fp32 on CPU and MPS, else bf16 where the device has it, or fp16
    (fp32 on the GTX 16 cards, whose fp16 convolutions give NaN).

    fp16 on a CPU becomes fp32, with a warning, where torch cannot compute in it. fp32 on CUDA is what torch's settings
    make of it: convolutions in TF32, ten bits, unless ``torch.backends.cudnn.allow_tf32`` is False.

    Raises InputError for anything else than fp32, fp16, bf16 and fp64 (not on MPS).
    """
    device = torch.device(device)
    if isinstance(name, torch.dtype):
        dtype = name
    elif name.lower() == "auto":
        if device.type not in ("cuda", "xpu"):
            return torch.float32
        if _has_bf16(device):
            return torch.bfloat16
        return torch.float32 if _is_gtx_16(device) else torch.float16
    else:
        found = DTYPES.get(name.lower().removeprefix("torch."))
        if found is None:
            raise InputError(f"dtype is {name!r}; expected auto, fp32, fp16 or bf16")
        dtype = found
    if dtype not in DTYPES.values():
        raise InputError(f"dtype is {dtype}; expected a floating point format: fp32, fp16 or bf16")
    if dtype == torch.float16 and device.type == "cpu" and not has_cpu_fp16():
        log.warning("torch %s computes no fp16 convolutions on a CPU; fp32 is used", torch.__version__)
        return torch.float32
    if dtype == torch.float64 and device.type == "mps":
        raise InputError("MPS devices have no fp64; choose dtype=fp32")
    return dtype


@functools.cache
def has_cpu_fp16() -> bool:
    """Whether torch has fp16 convolutions for the CPU; versions before 2.3 or so have none."""
    try:
        torch.nn.functional.conv2d(torch.ones(1, 1, 3, 3).half(), torch.ones(1, 1, 3, 3).half())
    except RuntimeError:
        return False
    return True


def no_autocast(kind: str) -> AbstractContextManager[Any]:
    """No mixed precision inside, on devices of this kind; where torch knows none for them, there is nothing to do."""
    try:
        return autocast(kind, enabled=False)
    except RuntimeError:
        return nullcontext()


def _is_gtx_16(device: torch.device) -> bool:
    return device.type == "cuda" and "GTX 16" in torch.cuda.get_device_name(device)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda" and not torch.version.hip:
        return torch.cuda.get_device_capability(device)[0] >= 8  # torch also reports slow emulation as support
    supported = getattr(getattr(torch, device.type), "is_bf16_supported", None)
    return bool(supported()) if supported else device.type == "xpu"
