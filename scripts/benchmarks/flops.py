"""Arithmetic of a training sample for every variant: what GPU-hours are estimated from. Nothing is computed."""

from __future__ import annotations

import torch
from monai.bundle import ConfigParser
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import TRAUMA_BUNDLE, Row, Settings, compare


def run(settings: Settings) -> list[Row]:
    """Count the floating-point operations of a forward pass of one window, mask decoder included."""
    operations, parameters = {}, {}
    for file in sorted((TRAUMA_BUNDLE / "configs/variants").glob("*.yaml")):
        parser = ConfigParser(ConfigParser.load_config_files([TRAUMA_BUNDLE / "configs/train.yaml", file]))
        parser.update({"pretrained": False, "device": "cpu"})
        network = parser.get_parsed_content("training_net").to("meta")
        size, groups, channels = (int(parser[name]) for name in ("image_size", "num_groups", "channels"))
        stack = torch.empty(1, groups, channels, size, size, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(stack)
        operations[file.stem] = counter.get_total_flops() / 1e12
        parameters[file.stem] = sum(weight.numel() for weight in network.parameters()) / 1e6
    return compare("flops", "forward pass of a window", operations, "TFLOP") + compare(
        "flops", "parameters in training", parameters, "million"
    )
