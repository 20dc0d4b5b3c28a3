"""Merge experts into one student: theta = sum_i lambda_i theta_i (arXiv 2603.15590, Eq. 14).

Experts distilled one by one from the same stage-I seed, each for its own domain, lie so close
together that a weighted mean of their weights keeps what each has learnt. Two methods:

    linear   that mean
    ties     only each expert's largest changes to the seed count, and of those only the ones
             whose sign the experts elect (TIES, arXiv 2306.01708), which lessens interference

Why a mean of weights may work at all: experts that share their start stay in one basin of the
loss, where the way from one to the other leads over no hill. Experts of different seeds do not,
even if trained alike, so their mean is refused.

The output has the layout of the first folder: its shards, headers and small files. So merging is
arithmetic on byte ranges, disk to disk in small pieces, and needs the same little memory for any
model. All is checked before a byte is written, the output appears complete or not at all, and its
merge.json says what went in. Not here: training experts (distill.py), scoring (evaluate.py).

Run:
    python merge.py MATH CODE STEM CHAT --out DIR                            # uniform lambdas
    python merge.py MATH CODE STEM CHAT --out DIR --weights .35 .35 .2 .1    # the paper's, Llama
    python merge.py MATH CODE STEM CHAT --out DIR --method ties --seed-model RUN/seed
    python merge.py MATH CODE STEM CHAT --out DIR --sweep a.jsonl b.jsonl    # again: it goes on
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import (TOKENIZER_FILES, ModelConfig, check_device, list_tensors, read_json, read_rows,
                   run_command, sha256)

PIECE_BYTES = 1 << 19  # of every expert in memory at a time
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DENSITY = 0.2  # of the changes that TIES keeps; the setting its paper recommends

# ----------------------------------------------------------------------------------------------
# 1. Folders, and all that must hold before they are merged
# ----------------------------------------------------------------------------------------------
# A mean of unlike things is still a number, and a model of it still talks. So nothing is skipped or
# cropped to fit: every mismatch is an error, and all of them come in one list, since a user who
# copies 16 GB for each would see them one a day.


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor's bytes lie."""
    path: Path
    offset: int  # of the tensor in the file
    nbytes: int
    dtype: torch.dtype

    def pieces(self):
        """Yield the tensor in pieces of PIECE_BYTES, (elements,) each, in the stored dtype.

        Read, not mapped: pages of a mapped file would stay in memory. Equal tensors of several
        folders have equal pieces, so `zip` walks through them together.
        """
        for start in range(0, self.nbytes, PIECE_BYTES):
            count = min(PIECE_BYTES, self.nbytes - start)
            data = np.fromfile(self.path, np.uint8, count, offset=self.offset + start)
            yield torch.from_numpy(data).view(self.dtype)


@dataclasses.dataclass
class Folder:
    """A folder to merge, opened and described."""
    path: Path
    tensors: dict  # name -> Stored
    facts: dict  # what must be equal in all folders: a name for the user -> value
    parent: str | None  # sha256 of the stage-I seed, by lineage.json
    nbytes: int  # of all tensors
    sha256: str | None = None  # of the weights, once `read_through`


def open_folder(path):
    """Headers and small files of a folder; ValueError or OSError naming the file that is wrong.

    Every setting of `ModelConfig` is a fact: a merge of students of other windows or feature widths
    is no mean of one function. So is the tokenizer: equal shapes, other words.
    """
    tensors, facts = {}, {}
    for file in sorted({file for file, _ in list_tensors(path).values()}):  # checks their form
        with open(file, "rb") as f:  # length of the header (8 bytes), header (JSON), data
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            tensors[name] = Stored(file, 8 + size + start, stop - start, DTYPES[entry["dtype"]])
            facts[f"tensor {name}"] = f"{entry['dtype']} {entry['shape']}"
    for name, value in dataclasses.asdict(ModelConfig.from_hf(path)).items():
        facts[f"config.json's {name}"] = value
    tokenizer, lineage = path / "tokenizer.json", path / "lineage.json"
    if tokenizer.exists():
        facts["tokenizer.json"] = "sha256 " + sha256(tokenizer)
    parent = read_json(lineage).get("seed_sha256") if lineage.exists() else None
    return Folder(path, tensors, facts, parent, sum(t.nbytes for t in tensors.values()))


def read_through(folder, bar):
    """Set folder.sha256; return a sentence for each tensor with NaN or infinite values.

    Hashed are name and bytes of each tensor in order of names, so shards make no difference.
    """
    digest, found = hashlib.sha256(), []
    for name, tensor in sorted(folder.tensors.items()):
        digest.update(name.encode())
        bad = 0
        for piece in tensor.pieces():
            digest.update(piece.view(torch.uint8).numpy())
            bad += int((~piece.isfinite()).sum())
            bar.update(piece.nbytes)
        if bad:
            found.append(f"{tensor.path}: {bad} values of tensor {name} are NaN or infinite; "
                         "distil this expert again")
    folder.sha256 = digest.hexdigest()
    return found


def check_settings(paths, output, weights, method, seed, density):
    """What is wrong with a call, before any folder is opened: a list of sentences.

    An input inside of what is written would be deleted with it when the merge fails.
    """
    ours = [path.resolve() for path in (output, beside(output, ".tmp"), beside(output, ".sweep"))]
    right = {
        f"{len(weights)} weights are given for {len(paths)} folders": len(weights) == len(paths),
        f"the weights {weights} must sum to 1 and none may be negative":
            all(w >= 0 for w in weights) and abs(sum(weights) - 1) <= 1e-6,
        f"method {method!r} with seed model {seed}: give 'linear' and no seed, or 'ties' and the "
        "stage-I folder that all experts started from": method == ("ties" if seed else "linear"),
        f"density {density} must be above 0 and at most 1": 0 < density <= 1,
        f"{output} exists and is not empty; name a new folder":
            not output.exists() or output.is_dir() and not any(output.iterdir()),
        **{f"the input {path} lies where {output} is written; name another output":
           not any(path.resolve().is_relative_to(place) for place in ours)
           for path in paths + [seed] * bool(seed)}}
    return [sentence for sentence, holds in right.items() if not holds]


def check_folders(experts, folders, output):
    """What is wrong with opened folders (the experts, and with TIES the seed): sentences.

    Reads all weights once, which costs as much time as the merge itself, and buys that a damaged
    expert is found before its NaN has spread into every copy.
    """
    first, *others = folders
    found = [f"{other.path}: {key} is {other.facts.get(key, 'missing')}, in {first.path} "
             f"{first.facts.get(key, 'missing')}" for other in others
             for key in {**first.facts, **other.facts}
             if other.facts.get(key) != first.facts.get(key)]
    parents = {str(expert.path): expert.parent for expert in experts}
    if len(set(parents.values()) - {None}) > 1:
        found.append(f"the experts come from different stage-I seeds (lineage.json): {parents}")
    if unknown := [path for path, parent in parents.items() if parent is None]:
        print("not checked, for want of a lineage.json: the stage-I seed of " + ", ".join(unknown))
    disk = next(p for p in output.resolve().parents if p.exists())
    if first.nbytes > (free := shutil.disk_usage(disk).free):
        found.append(f"{output} needs {first.nbytes:,} bytes, {disk} has {free:,}; make room")
    with progress("check", sum(folder.nbytes for folder in folders)) as bar:
        return found + [words for folder in folders for words in read_through(folder, bar)]


def check(directories, output, weights, method, seed, density):
    """Refuse what cannot be merged -> (expert Folders, seed Folder or None).

    Nothing is written. Raises one ValueError that lists everything that is wrong.
    """
    paths, seed, folders = [Path(d) for d in directories], seed and Path(seed), []
    found = check_settings(paths, output, weights, method, seed, density)
    for path in paths + [seed] * bool(seed):
        try:
            folders.append(open_folder(path))
        except (ValueError, OSError) as error:
            found.append(str(error))
    if folders:
        found += check_folders([f for f in folders if f.path != seed], folders, output)
    if found:
        raise ValueError("nothing is merged: " + "; ".join(found))
    return folders[:len(paths)], folders[-1] if seed else None


def beside(output, suffix):
    """The path next to `output` with a longer name."""
    return output.with_name(output.name + suffix)


def progress(name, nbytes):
    """A progress bar over bytes."""
    return tqdm(desc=name, total=nbytes, unit="B", unit_scale=True, leave=False)


# ----------------------------------------------------------------------------------------------
# 2. The two methods, on one tensor
# ----------------------------------------------------------------------------------------------
# Eq. 14 lets experts cancel: where one has learnt +x and another -x, the mean forgets both, and
# what one expert changed alone shrinks by its lambda. TIES answers both: small changes, mostly
# noise of the training, are trimmed, and the rest is averaged over those that agree only.


def merged_pieces(experts, weights, seed, density):
    """Yield one tensor of the merged model piece by piece, (elements,) in the stored dtype.

    Sums are in float64 and rounded once: in pieces that costs nothing, and where experts cancel
    an fp32 sum is off by more than a rounding. seed: the seed's tensor, None for linear.
    """
    if seed:
        thresholds = [trim_threshold(expert, seed, density) for expert in experts]
        for base, *tensors in zip(seed.pieces(), *(expert.pieces() for expert in experts)):
            base = base.double()
            changes = [tensor.double() - base for tensor in tensors]
            yield (base + elect_and_average(changes, weights, thresholds)).to(seed.dtype)
    else:
        for first, *others in zip(*(expert.pieces() for expert in experts)):
            total = weights[0] * first.double()  # not 0 + ...: that would turn -0.0 into 0.0
            for weight, tensor in zip(weights[1:], others):
                total += weight * tensor.double()  # Eq. 14
            yield total.to(first.dtype)


def elect_and_average(changes, weights, thresholds):
    """TIES (arXiv 2306.01708, Alg. 1): each expert's change to the seed, (N,) -> theirs, (N,).

    Trim to the changes that reach the threshold, elect the sign with the larger sum, average the
    changes of that sign. Weights count in the election and in the average; the paper's experts
    are equal. Where the sum is exactly 0 nobody is elected and the seed's value stays.
    """
    trimmed = torch.stack([torch.where(c.float().abs() >= threshold, c, 0)
                           for c, threshold in zip(changes, thresholds)])  # (K, N)
    weights = torch.tensor(weights, dtype=torch.float64)[:, None]
    elected = (weights * trimmed).sum(0).sign()
    weights = weights * (trimmed.sign() == elected)
    return (weights * trimmed).sum(0) / weights.sum(0).clamp(min=torch.finfo(torch.float64).tiny)


def trim_threshold(expert, seed, density):
    """The smallest of the `density` largest |expert - seed| of a tensor, fp32, without a sort.

    The bits of non-negative fp32 numbers, read as integers, are in the order of the numbers. So a
    histogram of the upper 16 bits finds those of the threshold, and another the lower 16.
    Paper: the largest of the whole model. Here: of each tensor, because tensors are streamed.
    """
    keep = max(1, round(density * (expert.nbytes // expert.dtype.itemsize)))
    known = 0  # the threshold's upper bits so far
    for shift in (16, 0):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for own, base in zip(expert.pieces(), seed.pieces()):
            bits = (own.double() - base.double()).float().abs().view(torch.int32).long()
            digits = torch.where(bits >> shift + 16 == known, bits >> shift & 0xFFFF, 1 << 16)
            counts += torch.bincount(digits, minlength=(1 << 16) + 1)[:-1]  # the others come last
        at_least = counts.flip(0).cumsum(0).flip(0)  # numbers with these bits or higher ones
        digit = int((at_least >= keep).nonzero()[-1])
        keep -= int(at_least[digit] - counts[digit])
        known = known << 16 | digit
    return torch.tensor(known, dtype=torch.int32).view(torch.float32)


# ----------------------------------------------------------------------------------------------
# 3. Merging and the sweep
# ----------------------------------------------------------------------------------------------
# Which lambdas are best is a question to validation data. Every candidate is a whole model that
# must be written and scored, so a sweep takes hours, will be stopped, and must go on.


def merge(directories, output, *, weights=None, method="linear", seed=None, density=DENSITY):
    """Merge student folders into a new folder `output` that model.load_pretrained opens.

    weights: the lambdas, one a folder, >= 0 with sum 1; None: uniform. method "linear", or "ties"
    with the stage-I folder `seed` and the `density` in (0, 1] of changes kept. Each tensor keeps
    its dtype. Raises one ValueError listing all that is wrong, before anything is written; when
    writing fails nothing is left behind.
    """
    if not directories:
        raise ValueError("there is no folder to merge")
    if weights is None:
        weights = [1 / len(directories)] * len(directories)
    weights = [float(w) for w in weights]  # JSON knows no other numbers
    experts, seed = check(directories, Path(output), weights, method, seed, density)
    write(experts, seed, weights, density, Path(output))


def write(experts, seed, weights, density, output, **record):
    """Write the merged folder, checked before, and into its merge.json also `record`.

    Into a folder beside it, renamed when all is there: readers see no half of a model.
    """
    first, tmp = experts[0], beside(output, ".tmp")
    record["inputs"] = [{"directory": str(e.path), "weight": w, "sha256": e.sha256}
                        for e, w in zip(experts, weights)]
    record["method"] = "ties" if seed else "linear"
    if seed:
        record |= {"seed": str(seed.path), "seed_sha256": seed.sha256, "density": density}
    # An expert of weight 0 is left out, so weights (1, 0) give the first expert bit for bit.
    experts, weights = zip(*[(e, w) for e, w in zip(experts, weights) if w > 0])
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        for name in ("config.json", "model.safetensors.index.json", *TOKENIZER_FILES):
            if (first.path / name).exists():
                shutil.copy(first.path / name, tmp)
        with progress("merge", first.nbytes) as bar:
            for name, tensor in sorted(first.tensors.items(), key=lambda item: item[1].offset):
                shard = tmp / tensor.path.name
                if not shard.exists():  # this is its first tensor: what comes before is the header
                    with open(tensor.path, "rb") as source:
                        shard.write_bytes(source.read(tensor.offset))
                with open(shard, "ab") as target:
                    for piece in merged_pieces([e.tensors[name] for e in experts], weights,
                                               seed and seed.tensors[name], density):
                        target.write(piece.view(torch.uint8).numpy())
                        bar.update(piece.nbytes)
        (tmp / "merge.json").write_text(json.dumps(record, indent=2) + "\n")
        if output.exists():
            output.rmdir()
        os.replace(tmp, output)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise


def simplex_grid(count, step):
    """Every tuple of `count` multiples of `step` that sums to 1; ValueError if there is none.

    Stars and bars: `count` - 1 bars among n stars cut them into `count` groups, each as many
    steps as it has stars.
    """
    n = round(1 / step) if 0 < step <= 1 else 0
    if not abs(n * step - 1) <= 1e-6:
        raise ValueError(f"--step {step}: 1 is not a multiple of it; give for example 0.25")
    return [tuple((b - a - 1) / n for a, b in itertools.pairwise((-1, *bars, n + count - 1)))
            for bars in itertools.combinations(range(n + count - 1), count - 1)]


def sweep(directories, output, score, *, search="grid", step=0.25, method="linear", seed=None,
          density=DENSITY, about=None):
    """Choose the lambdas by `score` (a callable: folder -> float, more is better), then merge.

    search "grid": all multiples of `step`; of equal scores the most even lambdas win. "greedy":
    from the best single expert on, add the next best while the uniform mean is no worse (greedy
    soup, arXiv 2203.05482): 2 K - 1 scores for K experts. Scores go to OUT.sweep/results.jsonl as
    they come and the same call goes on from there; `about` (JSON) is what else they depend on.
    merge.json records them all. Returns the lambdas. Raises ValueError as `merge` does, and for a
    score that is no number.
    """
    if search not in ("grid", "greedy"):
        raise ValueError(f"search {search!r} is neither 'grid' nor 'greedy'")
    count, output = len(directories), Path(output)
    grid = simplex_grid(count, step)
    experts, seed = check(directories, output, grid[0], method, seed, density)
    candidate = beside(output, ".sweep") / "candidate"
    results = candidate.with_name("results.jsonl")
    inputs = [folder.sha256 for folder in experts + [seed] * bool(seed)]
    key = hashlib.sha256(json.dumps([inputs, method, density, about]).encode()).hexdigest()
    scores = read_scores(results, key)
    print(f"{len(grid) if search == 'grid' else 2 * count - 1} candidates, {len(scores)} have a "
          f"score in {results}")

    def measure(weights):
        if weights not in scores:
            shutil.rmtree(candidate, ignore_errors=True)
            write(experts, seed, weights, density, candidate)
            value = float(score(candidate))
            if not math.isfinite(value):
                raise ValueError(f"{candidate} (lambdas {weights}) scores {value}; look at it")
            with open(results, "a") as f:
                f.write(json.dumps({"of": key, "weights": weights, "score": value}) + "\n")
            scores[weights] = value
            print(f"{value:.4f}  lambdas " + " ".join(f"{w:.3f}" for w in weights), flush=True)
        return scores[weights]

    def soup(members):
        return tuple((i in members) / len(members) for i in range(count))

    if search == "grid":
        best = max(grid, key=lambda weights: (measure(weights), -max(weights)))
    else:
        first, *others = sorted(range(count), key=lambda i: -measure(soup([i])))
        members = [first]
        for i in others:
            if measure(soup([*members, i])) >= measure(soup(members)):
                members.append(i)
        best = soup(members)
    shutil.rmtree(candidate, ignore_errors=True)
    write(experts, seed, best, density, output, search=search, about=about,
          scores=[{"weights": w, "score": value} for w, value in scores.items()])
    return best


def read_scores(path, key):
    """{lambdas: score} of the lines of results.jsonl that are of this `key`.

    The key is a hash of all that a score depends on, so lines of other models, settings or tasks
    are no danger and may stay. A last line without its end was torn, and is cut off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return {}
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return {tuple(row["weights"]): row["score"] for _, row in read_rows(path)
            if row.get("of") == key}


# ----------------------------------------------------------------------------------------------
# 4. The command
# ----------------------------------------------------------------------------------------------


def parse_arguments(argv):
    """The command line -> settings. Their ranges are checked by `check`, for callers too."""
    p = argparse.ArgumentParser(description="Merge experts into one student (Eq. 14).",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="the experts")
    p.add_argument("--out", type=Path, required=True, default=argparse.SUPPRESS, metavar="DIR",
                   help="folder to write")
    p.add_argument("--method", choices=("linear", "ties"), default="linear")
    p.add_argument("--seed-model", type=Path, metavar="DIR", help="ties: the stage-I folder")
    p.add_argument("--density", type=float, default=DENSITY, help="ties: fraction of changes kept")
    lambdas = p.add_mutually_exclusive_group()
    lambdas.add_argument("--weights", nargs="+", type=float, help="one a folder; none: uniform")
    lambdas.add_argument("--sweep", nargs="+", type=Path, metavar="TASKS",
                         help="the best by the mean score on these validation task files")
    p.add_argument("--search", choices=("grid", "greedy"), default="grid", help="way of the sweep")
    p.add_argument("--step", type=float, default=0.25, help="of the sweep's grid")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="on which the sweep scores")
    return p.parse_args(argv)


def main(argv=None):
    """Merge, or choose lambdas by a sweep and merge.

    What can be wrong with the sweep's tasks or device is found before the first candidate.
    """
    run = parse_arguments(argv)
    how = dict(method=run.method, seed=run.seed_model, density=run.density)
    print(f"{run.method} merge into {run.out} of " + ", ".join(map(str, run.directories))
          + f"; lambdas: {run.weights or ('by a sweep' if run.sweep else 'uniform')}")
    if run.sweep:
        from evaluate import evaluate_tasks, read_tasks  # only a sweep scores
        check_device(run.device)
        read_tasks(run.sweep)
        tasks = {str(path): sha256(path) for path in run.sweep}

        def score(folder):
            scores = evaluate_tasks(folder, run.sweep, device=run.device)
            return sum(scores.values()) / len(scores)

        weights = sweep(run.directories, run.out, score, search=run.search, step=run.step,
                        about=tasks, **how)
        print("chosen lambdas: " + " ".join(f"{w:.3f}" for w in weights))
    else:
        merge(run.directories, run.out, weights=run.weights, **how)
    print(f"done: model.load_pretrained opens {run.out}; its merge.json says what went in")


if __name__ == "__main__":
    run_command(main)
