"""Lets `pytest tests` import the scripts of the folder above.

One thread, whatever the shell says: tiny tensors, no noise, and tests fork, which OpenMP's threads
do not survive.
"""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
