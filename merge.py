"""Merge experts into one student: theta = sum_i lambda_i theta_i (arXiv 2603.15590, Eq. 14).

Experts that were distilled separately from the same stage-I seed, one for each domain, lie so
close together that a weighted mean of their weights keeps what each has learnt. Two methods:

    linear   the mean itself
    ties     only each expert's largest changes to the seed count, and only those whose sign
             the experts agree on (TIES, arXiv 2306.01708), which lessens interference

The lambdas are uniform, given, or chosen by a sweep that scores candidates on task files.

The merged model has the layout of the first folder: its shards, its headers, its small files. So
merging is arithmetic on ranges of bytes that pass from disk to disk in small pieces, and models of
any size need the same 200 MB of memory. Everything is checked before the first byte is written,
and the output appears complete or not at all. OUT/merge.json says what went in.

Not here: training the experts (distill.py), scoring (evaluate.py).

Run:
    python merge.py MATH CODE STEM CHAT --out MERGED                            # uniform
    python merge.py MATH CODE STEM CHAT --out MERGED --weights .35 .35 .2 .1    # the paper's, Llama
    python merge.py MATH CODE STEM CHAT --out MERGED --method ties --seed-model RUN/seed
    python merge.py MATH CODE STEM CHAT --out MERGED --sweep a.jsonl b.jsonl    # go on: run it again
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import TOKENIZER_FILES, ModelConfig, _list_tensors, _read_json

PIECE_BYTES = 1 << 21  # of every expert in memory at once
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# ----------------------------------------------------------------------------------------------
# 1. Folders and what must agree between them
# ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor's bytes lie. Pieces of tensors of equal dtype and shape correspond."""

    path: Path
    offset: int  # of its first byte in the file
    nbytes: int
    dtype: str  # a key of DTYPES
    shape: tuple

    @property
    def starts(self):
        """Where its pieces start, in bytes from its own first one."""
        return range(0, self.nbytes, PIECE_BYTES)

    def read_bytes(self, start):
        """The piece from `start` on, (bytes,) uint8. Read and not mapped: no pages stay behind."""
        return np.fromfile(self.path, np.uint8, min(PIECE_BYTES, self.nbytes - start),
                           offset=self.offset + start)

    def read(self, start):
        """The same piece as numbers, (elements,) float64."""
        return torch.from_numpy(self.read_bytes(start)).view(DTYPES[self.dtype]).double()


@dataclasses.dataclass(frozen=True)
class Folder:
    path: Path
    tensors: dict  # name -> Stored
    config: ModelConfig
    tokenizer: str | None  # sha256 of tokenizer.json
    parent: str | None  # sha256 of the stage-I seed, from lineage.json

    @property
    def nbytes(self):
        return sum(t.nbytes for t in self.tensors.values())


def open_folder(path):
    """Read a folder's small files and tensor headers; ValueError or OSError naming the file."""
    path, tensors = Path(path), {}
    for file in sorted({file for file, _ in _list_tensors(path).values()}):  # well-formed files
        with open(file, "rb") as f:  # 8 bytes: length of the header, JSON header, data
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            tensors[name] = Stored(file, 8 + size + start, stop - start, entry["dtype"],
                                   tuple(entry["shape"]))
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{file}: tensor {name} is {entry['dtype']}, which has no mean; "
                                 f"convert it to one of {', '.join(DTYPES)}")
    tokenizer, lineage = path / "tokenizer.json", path / "lineage.json"
    return Folder(
        path, tensors, ModelConfig.from_hf(path),
        hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.exists() else None,
        _read_json(lineage).get("seed_sha256") if lineage.exists() else None)


def differences(folder, first):
    """Everything in which a folder does not match the first one, a sentence each."""
    found = [f"{folder.path}: tensor {name} is missing, {first.path} has it"
             for name in sorted(first.tensors.keys() - folder.tensors.keys())]
    found += [f"{folder.path}: tensor {name} is unexpected, {first.path} has none of that name"
              for name in sorted(folder.tensors.keys() - first.tensors.keys())]
    for name in sorted(first.tensors.keys() & folder.tensors.keys()):
        one, other = first.tensors[name], folder.tensors[name]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            found.append(f"{folder.path}: tensor {name} is {other.dtype} {other.shape}, in "
                         f"{first.path} {one.dtype} {one.shape}")
    for field in dataclasses.fields(ModelConfig):
        one, other = getattr(first.config, field.name), getattr(folder.config, field.name)
        if one != other:
            found.append(f"{folder.path}/config.json: {field.name} is {other}, in {first.path} {one}")
    if folder.tokenizer != first.tokenizer:
        found.append(f"{folder.path}/tokenizer.json is not that of {first.path}")
    return found


def read_through(folder, bar):
    """Read every weight once -> (sha256, a sentence for each tensor with NaN or infinite values).

    The hash is over name and bytes of each tensor in order of name: shards do not change it.
    """
    digest, found = hashlib.sha256(), []
    for name, tensor in sorted(folder.tensors.items()):
        digest.update(name.encode())
        bad = 0
        for start in tensor.starts:
            digest.update(tensor.read_bytes(start))
            bad += int((~tensor.read(start).isfinite()).sum())
            bar.update(min(PIECE_BYTES, tensor.nbytes - start))
        if bad:
            found.append(f"{tensor.path}: tensor {name} has {bad} NaN or infinite values; "
                         "distil this expert again")
    return digest.hexdigest(), found


def check(directories, output, weights, method, seed, density):
    """Refuse what cannot be merged -> (experts, seed or None, {path: sha256}).

    Everything that is wrong is named in one ValueError, and nothing has been written.
    """
    found, folders, hashes = [], [], {}
    if len(weights) != len(directories):
        found.append(f"{len(weights)} weights were given for {len(directories)} folders")
    if not (all(w >= 0 for w in weights) and abs(sum(weights) - 1) <= 1e-6):
        found.append(f"the weights {weights} must not be negative and must sum to 1")
    if method not in ("linear", "ties") or (method == "ties") != (seed is not None):
        found.append(f"method {method!r} with seed model {seed}: give 'linear', or 'ties' with the "
                     "stage-I folder that the experts started from")
    if not 0 < density <= 1:
        found.append(f"density {density} must lie above 0 and not above 1")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        found.append(f"{output} exists and is not empty; name a new folder")
    for directory in [*directories, *([seed] if seed else [])]:
        for ours in (output, beside(output, ".tmp"), beside(output, ".sweep")):
            if Path(directory).resolve().is_relative_to(ours.resolve()):
                found.append(f"the input {directory} lies where {ours} is to be written; name "
                             "another output")
        try:
            folders.append(open_folder(directory))
        except (ValueError, OSError) as error:
            found.append(str(error))
    for folder in folders[1:]:
        found += differences(folder, folders[0])
    parents = {str(f.path): f.parent for f in folders if f.path != seed}
    if len(set(parents.values()) - {None}) > 1:
        found.append(f"the experts come from different stage-I seeds (lineage.json): {parents}")
    elif None in parents.values():
        print("whether the experts share a stage-I seed is not checked: no lineage.json in "
              + ", ".join(path for path, parent in parents.items() if parent is None))
    parent = next(p for p in output.resolve().parents if p.exists())
    need, free = folders[0].nbytes if folders else 0, shutil.disk_usage(parent).free
    if need > free:
        found.append(f"{output} needs {need:,} bytes and {parent} has {free:,} free")
    with progress_bar("check", sum(f.nbytes for f in folders)) as bar:
        for folder in folders:
            hashes[folder.path], bad = read_through(folder, bar)
            found += bad
    if found:
        raise ValueError("nothing was merged:\n  " + "\n  ".join(found))
    return folders[:len(directories)], folders[-1] if seed else None, hashes


def beside(output, suffix):
    return output.with_name(output.name + suffix)


def progress_bar(name, nbytes):
    return tqdm(desc=name, total=nbytes, unit="B", unit_scale=True, leave=False)
