"""What grows with the number of studies, and what a very long study needs: time may grow, memory must not."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks.common import ORGAN_BUNDLE, TRAUMA_BUNDLE, Row, Settings, compare, phantoms
from benchmarks.infer import weights_of

STUDIES = 6
LONG_STUDY = (512, 512, 1000)


def run(settings: Settings) -> list[Row]:
    """Predict 1, 2 and 4 times as many small studies, and one study of 1,000 slices, each in a process of its own.

    The many are predicted by the small networks of the demo, the long one by those of the base.
    """
    seconds, memory = {}, {}
    for times in (1, 2, 4):
        source = phantoms(settings.work, STUDIES * times, 128, 7.0) / "train_images"
        name = f"{STUDIES * times} studies"
        seconds[name], memory[name] = _predict(source, settings, "demo")
    rows = compare("scale", "prediction", seconds, "s") + compare("scale", "peak memory", memory, "GiB")
    long_seconds, long_memory = _predict(_long_study(settings.work), settings, None)
    rows += compare("scale", "1,000 slices of 512 x 512, time", {"one study": long_seconds}, "s")
    return rows + compare("scale", "1,000 slices of 512 x 512, peak memory", {"one study": long_memory}, "GiB")


def _predict(source: Path, settings: Settings, variant: str | None) -> tuple[float, float]:
    """Run the command in a process of its own; return seconds and the GiB that it held at most."""
    out = settings.work / "predicted"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "trauma_monai", "predict", str(source), str(out), "--device", str(settings.device)]
    command += ["--organ-weights", str(weights_of(ORGAN_BUNDLE, settings.work, variant))]
    command += ["--trauma-weights", str(weights_of(TRAUMA_BUNDLE, settings.work, variant))]
    command += ["--variant", variant] if variant else []
    watch = f"import resource, subprocess, sys; code = subprocess.call({command!r}, stderr=subprocess.DEVNULL); "
    watch += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True, check=True)
    return time.perf_counter() - start, int(done.stdout.split()[-1]) / 2**20


def _long_study(work: Path) -> Path:
    path = work / "long.nii"
    if not path.exists():
        noise = np.random.default_rng(0).integers(-100, 200, LONG_STUDY, dtype=np.int16)
        nib.save(nib.Nifti1Image(noise, np.diag([-0.8, -0.8, 0.6, 1.0])), path)
    return path
