"""Measure speed and memory side by side with other ways to do the same: python scripts/benchmark.py [PART ...].

Every figure is a ratio of times taken in turn within one run, so that a busy machine slows both sides. Peers are
optional: one that is not installed is named and left out (pip install SimpleITK itk dicomsdl albumentations).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from benchmarks import flops, infer, prepare, read, sample, scale, train
from benchmarks.common import Row, Settings, print_table

PARTS = {
    "read": read.run,
    "prepare": prepare.run,
    "sample": sample.run,
    "infer": infer.run,
    "train": train.run,
    "flops": flops.run,
    "scale": scale.run,
}


def main() -> None:
    """Run the parts that were asked for, print their tables and write all rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; all by default")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N: where the networks run")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side has its turn; the best one counts")
    parser.add_argument("--work", type=Path, help="folder for the synthetic studies, kept for the next run")
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"), help="where the rows go")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; expected {', '.join(PARTS)}")
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        settings = Settings(work, torch.device(arguments.device), arguments.rounds)
        rows: list[Row] = []
        for part in arguments.parts or PARTS:
            done = in_own_process(PARTS[part], settings)
            print_table(part, done)
            rows += done
    content = {"machine": machine(settings.device), "rows": [row.as_dict() for row in rows]}
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"rows in {arguments.out}", file=sys.stderr)


def in_own_process(part: Callable[[Settings], list[Row]], settings: Settings) -> list[Row]:
    """Run a part where no threads, memory settings or compiled networks of another part reach it."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(part, settings).result()


def machine(device: torch.device) -> dict[str, str | int]:
    """Describe what the figures were taken on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
