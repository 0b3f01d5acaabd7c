"""A network as it runs outside training: exact by default, faster where a device gains from it."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any, cast

import torch
from torch import nn

from trauma_monai.memory import keep_freed_memory

__all__ = ["accelerate", "can_compile", "for_inference", "gains_from_bfloat16"]


def for_inference(network: nn.Module, device: str | torch.device, fast: bool = False) -> nn.Module:
    """Place a network on a device.

    Convolution weights are laid out channels last, which all devices compute faster, and on a CPU the process keeps the
    memory that layers free (:func:`trauma_monai.memory.keep_freed_memory`). No result depends on either.

    Args:
        network: what is run; changed in place, so that weights may be loaded before or after.
        device: where.
        fast: compute in bfloat16 and compiled, as far as the device gains from it. Masks and probabilities change a
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
        accelerate(network, bfloat16=gains_from_bfloat16(device), compiled=can_compile(device))
    return network


def accelerate(network: nn.Module, bfloat16: bool, compiled: bool) -> None:
    """Let a network compute in bfloat16 and compiled, in place; its weights and its output stay float32.

    Args:
        network: takes and returns one tensor.
        bfloat16: compute convolutions and matrix products in bfloat16.
        compiled: let torch.compile fuse the layers, at the first call of each input shape: a minute or so.
    """
    if bfloat16:
        device_type = next(network.parameters()).device.type
        network.forward = torch.autocast(device_type, dtype=torch.bfloat16)(network.forward)
        network.register_forward_hook(lambda module, inputs, output: output.float())
    if compiled:
        network.compile(dynamic=False)


def gains_from_bfloat16(device: str | torch.device) -> bool:
    """Whether a device computes in bfloat16 natively; where it does not, bfloat16 is many times slower."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not in all torch versions
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def can_compile(device: str | torch.device) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler for a CPU, Triton for a GPU."""
    if torch.device(device).type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(compiler) for compiler in ("g++", "clang++"))
