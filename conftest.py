"""Keeps the checkout off ``sys.path``: there, ``import kernels`` would find our folder instead of Hugging Face's.

Tests and the programs they start use one thread each: models are tiny, and threads that wait for a core burn another.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_checkout = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or Path.cwd()).resolve() != _checkout]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch, NumPy and others are imported
