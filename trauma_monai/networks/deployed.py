"""A network as it runs outside training: exact by default, faster where a device gains from it."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any, cast

import torch
from torch import nn

from trauma_monai.memory import keep_freed_memory

__all__ = ["accelerate", "can_compile", "for_inference", "gains_from_float16"]


def for_inference(network: nn.Module, device: str | torch.device, fast: bool = False) -> nn.Module:
    """Place a network on a device.

    Convolution weights are laid out channels last, which all devices compute faster, and on a CPU the process keeps the
    memory that layers free (:func:`trauma_monai.memory.keep_freed_memory`). No result depends on either.

    Args:
        network: what is run; changed in place, so that weights may be loaded before or after.
        device: where.
        fast: compute in float16 and compiled, as far as the device gains from it. Masks and probabilities change a
            little; docs/performance.md says how much.

    Returns:
        The network.
    """
    deep = any(isinstance(module, nn.Conv3d) for module in network.modules())
    memory_format = torch.channels_last_3d if deep else torch.channels_last
    cast(Any, network).to(device=torch.device(device), memory_format=memory_format)
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    if fast:
        accelerate(network, half=gains_from_float16(device), compiled=can_compile(device))
    return network


def accelerate(network: nn.Module, half: bool, compiled: bool) -> None:
    """Let a network compute in float16 and compiled, in place; its weights and its output stay float32.

    The published systems were trained with it. bfloat16 is no faster and has three bits less: with it probabilities
    move ten times as far.

    Args:
        network: takes and returns one tensor. It may name its parts that bear float16, ``half_precision_parts``.
        half: compute convolutions and matrix products in float16.
        compiled: let torch.compile fuse the layers, at the first call of each input shape: a minute or so.
    """
    if half:
        device_type = next(network.parameters()).device.type
        names = getattr(network, "half_precision_parts", ())
        for part in [network.get_submodule(name) for name in names] or [network]:
            part.forward = torch.autocast(device_type, dtype=torch.float16)(part.forward)
            part.register_forward_hook(lambda module, inputs, output: _as_float32(output))
    if compiled:
        network.compile(dynamic=False)


def _as_float32(output: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    return output.float() if isinstance(output, torch.Tensor) else [tensor.float() for tensor in output]


def gains_from_float16(device: str | torch.device) -> bool:
    """Whether a device computes in float16 natively: a GPU with tensor cores, a CPU with AVX-512 FP16 or AMX FP16."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (7, 0)
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not in all torch versions
    return bool(capabilities.get("avx512_fp16") or capabilities.get("amx_fp16"))


def can_compile(device: str | torch.device) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler for a CPU, Triton for a GPU."""
    if torch.device(device).type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(compiler) for compiler in ("g++", "clang++"))
