"""What this process computes on: device, number type, memory.

    device, dtype = device_and_dtype("cuda", "bfloat16")
    row["peak_gib"] = peak_gib()

Copy this file alone: it needs torch.
"""
import os
import sys

import torch

try:
    import resource
except ImportError:                              # Windows
    resource = None


def device_and_dtype(device=None, dtype=None):
    """torch.device and torch.dtype of what the command line says.

    Default: cuda, mps or cpu, the first that is there; under torchrun each process has its own GPU.
    bfloat16, float16 on mps and old GPUs, float32 on a CPU.
    """
    if device is None:
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        if torch.cuda.is_available():
            device = "cuda"
    if str(device).partition(":")[0] not in ("cuda", "mps", "cpu"):
        raise ValueError(f"--device {device}: it is cuda, mps or cpu")
    try:
        device = torch.device(device)
    except RuntimeError as e:
        raise ValueError(f"--device {device}: it is cuda, mps, cpu, or such as cuda:1") from e
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: torch has none here; use --device cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no CUDA device here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: there are {torch.cuda.device_count()}")
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        own = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
        device = torch.device("cuda", own)
        torch.cuda.set_device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.float16
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            dtype = torch.bfloat16
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if found not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"--dtype {dtype}: it is float32, float16 or bfloat16")
        dtype = found
    return device, dtype


def peak_gib():
    """The most memory this process has held: of its GPU, else of the machine; None on Windows."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    elif resource is None:
        return None
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return round(peak / 2 ** 30, 2)
