"""Lets `pytest tests` import the scripts of the folder above, and makes teachers on disk.

One thread, whatever the shell says: tiny tensors, no noise, and tests fork, which OpenMP's threads
do not survive.
"""

import math
import os
import sys
import threading
from pathlib import Path

import pytest
from tqdm import tqdm

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402: reads the number of threads

# tqdm's own lock is one for all processes that were forked: a test that kills a child while it
# draws its bar would leave it locked, and the next bar would wait for ever.
tqdm.set_lock(threading.RLock())


def random_teacher(folder, kind, settings, dtype):
    """A random model of transformers with spread logits, saved to folder; returns it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **settings)
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if p.dim() > 1:  # default initialisation is so small that it hides RoPE faults
                p.normal_(0, 2 / math.sqrt(p.shape[1]), generator=random)
            elif "norm" in name:
                p.uniform_(0.5, 1.5, generator=random)
            else:
                p.normal_(0, 0.5, generator=random)
    hf.to(dtype).save_pretrained(folder)
    return hf


@pytest.fixture(scope="module")
def folders(request, tmp_path_factory):
    """folders(family) -> (folder, transformers' model), each made once.

    A test file's FAMILIES has a kind and settings for each family, its SIZES those of them all.
    """
    made = {}

    def get(family, dtype=torch.float32):
        if (family, dtype) not in made:
            folder = tmp_path_factory.mktemp("teachers") / family
            kind, special = request.module.FAMILIES[family]
            settings = {**request.module.SIZES, **special}
            made[family, dtype] = folder, random_teacher(folder, kind, settings, dtype)
        return made[family, dtype]

    return get
