"""Puts the repository and its folders of scripts on the import path, and has torch compute in one thread: the tests'
models are so small that a second one makes them slower, ten times so on a machine that is busy."""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "records")]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that tests start have it too
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):  # torch would take up code that it compiled for this CPU's own
    cache = Path(tempfile.gettempdir()) / f"torchinductor_tests_{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
