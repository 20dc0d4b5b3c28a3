"""Merge experts into one student: theta = sum_i lambda_i theta_i (arXiv 2603.15590, Eq. 14).

Experts distilled one by one from the same stage-I seed, each for its own domain, lie so close
together that a weighted mean of their weights keeps what each has learnt. Two methods:

    linear   that mean
    ties     only each expert's largest changes to the seed count, and of those only the ones
             whose sign the experts elect (TIES, arXiv 2306.01708), which lessens interference

Why a mean of weights may work at all: experts that share their start stay in one basin of the
loss, where the way from one to the other leads over no hill. Experts of different seeds do not,
even if trained alike, so their mean is refused.

The output is a copy of the first folder whose tensors are overwritten where they lie. So merging
is arithmetic on byte ranges, disk to disk in small pieces, and needs little memory: linear the same
for any model, TIES twice the largest tensor in fp32. Folders that do not match are refused before a
byte is written, the output appears complete or not at all, and its merge.json says what went in.
Not here: training experts (distill.py), scoring (evaluate.py).

Run:
    python merge.py MATH CODE STEM CHAT --out DIR                            # uniform lambdas
    python merge.py MATH CODE STEM CHAT --out DIR --weights .35 .35 .2 .1    # the paper's, Llama
    python merge.py MATH CODE STEM CHAT --out DIR --method ties --seed-model RUN/seed
    python merge.py MATH CODE STEM CHAT --out DIR --sweep a.jsonl b.jsonl    # again: it goes on
"""

import argparse
import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import (ModelConfig, append_json, check_device, drop_torn_line, list_tensors, new_folder,
                   read_json, read_rows, replacing_folder, run_command, sha256, tokenizer_files,
                   write_json)

PIECE_BYTES = 1 << 19  # of every expert in memory at a time
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STEP = 0.25  # of a sweep's grid
DENSITY = 0.2  # of the changes that TIES keeps; the setting its paper recommends

# ----------------------------------------------------------------------------------------------
# 1. Folders, and all that must hold before they are merged
# ----------------------------------------------------------------------------------------------
# A mean of unlike things is still a number, and a model of it still talks. So nothing is skipped or
# cropped to fit: every mismatch is an error, and all of them come in one list, since a user who
# copies 16 GB for each would see them one a day.


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor on disk: where its bytes lie, and how to read them."""
    name: str
    path: Path
    offset: int  # of the tensor in the file
    nbytes: int
    dtype: torch.dtype

    def pieces(self):
        """Yield the tensor in pieces of PIECE_BYTES, (elements,) each, in the stored dtype.

        Read, not mapped: pages of a mapped file would stay in memory. Equal tensors of several
        folders have equal pieces, so `zip` walks through them together. ValueError for values that
        are not finite: one NaN of one expert would be in every copy of the merged model.
        """
        for start in range(0, self.nbytes, PIECE_BYTES):
            count = min(PIECE_BYTES, self.nbytes - start)
            data = np.fromfile(self.path, np.uint8, count, offset=self.offset + start)
            piece = torch.from_numpy(data).view(self.dtype)
            if not piece.isfinite().all():
                raise ValueError(f"{self.path}: {self.name} has NaN or inf; distil it again")
            yield piece


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder to merge, opened and described."""
    path: Path
    tensors: dict  # name -> Stored
    facts: dict  # what must be equal in all folders: a name for the user -> value
    parent: str | None  # sha256 of the stage-I seed, by lineage.json
    sha256: str  # of its *.safetensors, in order of their names


def open_folder(path):
    """Headers, small files and hash of a folder; ValueError or OSError naming what is wrong.

    Every setting of `ModelConfig` is a fact: a merge of students of other windows or feature widths
    is no mean of one function. So are tokenizer and chat template: equal shapes, other words.
    """
    tensors, facts = {}, {}
    files = sorted({file for file, _ in list_tensors(path).values()})  # checks their form
    for file in files:
        with open(file, "rb") as f:  # length of the header (8 bytes), header (JSON), data
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            tensors[name] = Stored(name, file, 8 + size + start, stop - start,
                                   DTYPES[entry["dtype"]])
            facts[f"tensor {name}"] = f"{entry['dtype']} {entry['shape']}"
    config = ModelConfig.from_hf(path)
    ropes = [*dict.fromkeys(config.layer_ropes)]  # each once, or a difference would fill a page
    for name, value in {**dataclasses.asdict(config), "ropes": ropes,
                        "layer_ropes": [*map(ropes.index, config.layer_ropes)]}.items():
        facts[f"config.json's {name}"] = value
    facts |= {name: f"sha256 {sha256(path / name)}" for name in tokenizer_files(path)
              if name != "generation_config.json"}  # its eos ids are above, the rest is taste
    parent = read_json(path / "lineage.json", missing={}).get("seed_sha256")
    return Folder(path, tensors, facts, parent, sha256(*files))


def check_settings(inputs, output, weights, method, seed, density):
    """Refuse (ValueError) what is wrong with a call, before any folder is opened.

    An input inside of a sweep's own folder would be deleted with its candidates.
    """
    if not all(w >= 0 for w in weights) or not abs(sum(weights) - 1) <= 1e-6:  # NaN is refused too
        raise ValueError(f"the weights {weights} must sum to 1 and none may be negative")
    if len(weights) + bool(seed) != len(inputs):
        raise ValueError(f"{len(weights)} weights are given for {len(inputs) - bool(seed)} folders")
    if method != ("ties" if seed else "linear"):
        raise ValueError(f"method {method!r}, seed model {seed}: ties needs --seed-model, linear "
                         "takes none")
    if not 0 < density <= 1:
        raise ValueError(f"density {density} must be above 0 and at most 1")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty; name a new folder")
    for path in inputs:
        if Path(f"{output}.sweep").resolve() in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"the input {path} lies where a sweep for {output} writes; move it")


def check(directories, output, weights, method, seed, density):
    """Refuse what cannot be merged -> (expert Folders, seed Folder or None).

    Nothing is written. Raises one ValueError that lists all that differs between the folders.
    """
    inputs = [Path(path) for path in (*directories, seed) if path]
    check_settings(inputs, output, weights, method, seed, density)
    folders = [open_folder(path) for path in tqdm(inputs, desc="read", unit="folder", leave=False)]
    experts = folders[:len(weights)]  # a seed is the last folder
    first, *others = folders
    found = [f"{other.path}: {key} is {other.facts.get(key, 'missing')}, in {first.path} "
             f"{first.facts.get(key, 'missing')}" for other in others
             for key in {**first.facts, **other.facts}
             if other.facts.get(key) != first.facts.get(key)]
    parents = {str(expert.path): expert.parent for expert in experts}
    if len(set(parents.values()) - {None}) > 1:
        found.append(f"the experts come from different stage-I seeds (lineage.json): {parents}")
    if seed:
        found += [f"{expert.path} was not distilled from the seed {seed} (lineage.json)"
                  for expert in experts if expert.parent not in (None, folders[-1].sha256)]
    if found:
        raise ValueError("nothing is merged: " + "; ".join(found))
    if unknown := [path for path, parent in parents.items() if parent is None]:
        print("not checked, for want of a lineage.json: the stage-I seed of " + ", ".join(unknown))
    return experts, folders[-1] if seed else None


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
        for pieces in zip(*(expert.pieces() for expert in experts)):
            # Eq. 14. From -0.0 on: 0.0 + -0.0 is 0.0, and one expert alone must come out as it is.
            total = sum((w * piece.double() for w, piece in zip(weights, pieces)), -0.0)
            yield total.to(pieces[0].dtype)


def elect_and_average(changes, weights, thresholds):
    """TIES (arXiv 2306.01708, Alg. 1): each expert's change to the seed, (N,) -> theirs, (N,).

    Trim to the changes that reach the threshold, elect the sign with the larger sum, average the
    changes of that sign. Weights count in the election and in the average; the paper's experts
    are equal. Where the sum is exactly 0 nobody is elected and the seed's value stays.
    """
    # float: as where the threshold was found, or rounding could drop the change that it is.
    trimmed = torch.stack([torch.where(c.float().abs() >= threshold, c, 0)
                           for c, threshold in zip(changes, thresholds)])  # (K, N)
    weights = torch.tensor(weights, dtype=torch.float64)[:, None]
    elected = (weights * trimmed).sum(0).sign()
    weights = weights * (trimmed.sign() == elected)
    return (weights * trimmed).sum(0) / weights.sum(0).clamp(min=torch.finfo(torch.float64).tiny)


def trim_threshold(expert, seed, density):
    """The smallest of the `density` largest |expert - seed| of a tensor, as float of an fp32.

    Paper: the largest of the whole model. Here: of each tensor, because tensors are streamed.
    """
    changes = np.concatenate([(own.double() - base.double()).float().abs().numpy()
                              for own, base in zip(expert.pieces(), seed.pieces())])
    keep = max(1, round(density * len(changes)))
    changes.partition(-keep)  # in place, and in linear time: no sort
    return float(changes[-keep])


# ----------------------------------------------------------------------------------------------
# 3. Merging and the sweep
# ----------------------------------------------------------------------------------------------
# Which lambdas are best is a question to validation data. Every candidate is a whole model that
# must be written and scored, so a sweep takes hours, will be stopped, and must go on.


def merge(directories, output, *, weights=None, method="linear", seed=None, density=DENSITY):
    """Merge student folders into a new folder `output` that model.load_pretrained opens.

    weights: the lambdas, one a folder, >= 0 with sum 1; None: uniform. method "linear", or "ties"
    with the stage-I folder `seed` and the `density` in (0, 1] of changes kept. Each tensor keeps
    its dtype. Raises OSError or ValueError for a folder that cannot be read, one ValueError listing
    all in which the folders differ, both before anything is written, and ValueError for a tensor
    with NaN or inf; whatever fails, nothing is left behind.
    """
    uniform = [1 / len(directories) for _ in directories]
    weights = [float(w) for w in (uniform if weights is None else weights)]  # as JSON knows them
    output = Path(output).resolve()  # of a link, what it leads to
    experts, seed = check(directories, output, weights, method, seed, density)
    write(experts, seed, weights, density, output)


def write(experts, seed, weights, density, output, **record):
    """Write the merged folder, checked before, and into its merge.json also `record`."""
    record["inputs"] = [{"directory": str(e.path), "weight": w, "sha256": e.sha256}
                        for e, w in zip(experts, weights)]
    record["method"] = "ties" if seed else "linear"
    if seed:
        record |= {"seed": str(seed.path), "seed_sha256": seed.sha256, "density": density}
    # An expert of weight 0 is left out, so weights (1, 0) give the first expert bit for bit.
    experts, weights = zip(*[(e, w) for e, w in zip(experts, weights) if w > 0])
    first = experts[0]
    with replacing_folder(output) as tmp:
        shards = {tensor.path.name for tensor in first.tensors.values()}
        # Experts of one seed make a student of that seed; unless one's is not known.
        lineage = ["lineage.json"] if all(expert.parent for expert in experts) else []
        for name in ("config.json", "model.safetensors.index.json", *tokenizer_files(first.path),
                     *lineage, *shards):
            if (first.path / name).exists():
                (tmp / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(first.path / name, tmp / name)  # its bytes, not its rights
        for name, tensor in tqdm(first.tensors.items(), desc="merge", unit="tensor", leave=False):
            with open(tmp / tensor.path.name, "r+b") as file:
                file.seek(tensor.offset)
                for piece in merged_pieces([e.tensors[name] for e in experts], weights,
                                           seed and seed.tensors[name], density):
                    file.write(piece.view(torch.uint8).numpy())
        write_json(tmp / "merge.json", record)


def simplex_grid(count, step):
    """Every tuple of `count` multiples of `step` that sums to 1; ValueError if there is none."""
    n = round(1 / step) if 0 < step <= 1 else 0
    if not abs(n * step - 1) <= 1e-6:
        raise ValueError(f"--step {step}: 1 is not a multiple of it; give for example 0.25")
    if (candidates := math.comb(n + count - 1, n)) > 10_000:
        raise ValueError(f"--step {step}: {candidates:,} candidates, and each is a model to write "
                         "and score; take a larger step, or --greedy")
    # n stars in a row and count - 1 bars between them: a weight is the stars between two bars.
    return [tuple((b - a - 1) / n for a, b in itertools.pairwise((-1, *bars, n + count - 1)))
            for bars in itertools.combinations(range(n + count - 1), count - 1)]


def sweep(directories, output, score, *, greedy=False, step=STEP, method="linear", seed=None,
          density=DENSITY, about=None):
    """Choose the lambdas by `score` (a callable: folder -> float, more is better), then merge.

    Tried are all multiples of `step`; of equal scores the most even lambdas win. greedy: from the
    best single expert on, try each other one, best first, and keep it if the uniform mean gets no
    worse (greedy soup, arXiv 2203.05482): 2 K - 1 scores for K experts.

    Scores go to OUT.sweep/results.jsonl as they come, and the same call goes on from there. Each
    line says what it is of: the experts' hashes, the settings, and `about` (JSON), which is what
    else a score depends on; lines of anything else are no danger and may stay. merge.json records
    all scores. Returns the lambdas. Raises ValueError as `merge` does, and for a score that is no
    number.
    """
    count, output = len(directories), Path(output).resolve()

    def soup(members):
        return tuple((i in members) / len(members) for i in range(count))

    grid = [] if greedy else simplex_grid(count, step)
    # The weights do not matter yet: any will do.
    experts, seed = check(directories, output, soup(range(count)), method, seed, density)
    candidate, results = Path(f"{output}.sweep/candidate"), Path(f"{output}.sweep/results.jsonl")
    results.parent.mkdir(parents=True, exist_ok=True)
    drop_torn_line(results)
    hashes = [folder.sha256 for folder in (*experts, seed) if folder]
    key = json.dumps([hashes, method, density, about])
    scores = {tuple(row["weights"]): row["score"] for _, row in read_rows(results)
              if row.get("of") == key}
    print(f"{2 * count - 1 if greedy else len(grid)} candidates; {len(scores)} scores, of other "
          f"steps too, are in {results}")

    def measure(weights):
        if weights not in scores:
            shutil.rmtree(candidate, ignore_errors=True)
            write(experts, seed, weights, density, candidate)
            value = float(score(candidate))
            if not math.isfinite(value):
                raise ValueError(f"{candidate} (lambdas {weights}) scores {value}; look at it")
            append_json(results, {"of": key, "weights": weights, "score": value})
            scores[weights] = value
            print(f"{value:.4f}  lambdas " + " ".join(f"{w:.3f}" for w in weights), flush=True)
        return scores[weights]

    if greedy:
        first, *others = sorted(range(count), key=lambda i: -measure(soup([i])))
        members = [first]
        for i in others:  # of equal scores `max` takes the first: one member more
            members = max([*members, i], members, key=lambda some: measure(soup(some)))
        best = soup(members)
    else:
        best = max(grid, key=lambda weights: (measure(weights), -sum(w * w for w in weights)))
    shutil.rmtree(candidate, ignore_errors=True)
    write(experts, seed, best, density, output, greedy=greedy, about=about,
          scores=[{"weights": w, "score": value} for w, value in scores.items()])
    return best


# ----------------------------------------------------------------------------------------------
# 4. The command
# ----------------------------------------------------------------------------------------------


def parse_arguments(argv):
    """The command line -> settings. Their ranges are checked by `check`, for callers too."""
    p = argparse.ArgumentParser(description="Merge experts into one student (Eq. 14).",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="the experts")
    p.add_argument("--out", type=new_folder, required=True, default=argparse.SUPPRESS,
                   metavar="DIR", help="folder to write")
    p.add_argument("--method", choices=("linear", "ties"), default="linear")
    p.add_argument("--seed-model", type=Path, metavar="DIR", help="ties: the stage-I folder")
    p.add_argument("--density", type=float, default=DENSITY, help="ties: fraction of changes kept")
    lambdas = p.add_mutually_exclusive_group()
    lambdas.add_argument("--weights", nargs="+", type=float, help="one a folder; none: uniform")
    lambdas.add_argument("--sweep", nargs="+", type=Path, metavar="TASKS",
                         help="the best by the mean score on these validation task files")
    p.add_argument("--greedy", action="store_true", help="sweep over uniform means only")
    p.add_argument("--step", type=float, default=STEP, help="of the sweep's grid")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="on which the sweep scores")
    return p.parse_args(argv)


def main(argv=None):
    """Merge, or choose lambdas by a sweep and merge.

    What can be wrong with the sweep's tasks or device is found before the first candidate.
    """
    run = parse_arguments(argv)
    if not run.sweep and (run.greedy or run.step != STEP):
        raise ValueError("--greedy and --step are of a --sweep, and none is asked for")
    if run.greedy and run.step != STEP:
        raise ValueError("--step is of a grid; --greedy tries uniform means only")
    if run.method == "linear" and run.density != DENSITY:
        raise ValueError("--density is of --method ties; a linear merge keeps all changes")
    how = dict(method=run.method, seed=run.seed_model, density=run.density)
    print(run.method, "merge into", run.out, "of", *run.directories)
    if run.sweep:
        from evaluate import evaluate_tasks, read_tasks  # only a sweep scores
        check_device(run.device)
        read_tasks(run.directories[0], run.sweep)
        tasks = {str(path): sha256(path) for path in run.sweep}

        def score(folder):
            scores = evaluate_tasks(folder, run.sweep, device=run.device)
            return sum(scores.values()) / len(scores)

        weights = sweep(run.directories, run.out, score, greedy=run.greedy, step=run.step,
                        about=tasks, **how)
        print("chosen lambdas: " + " ".join(f"{w:.3f}" for w in weights))
    else:
        merge(run.directories, run.out, weights=run.weights, **how)
    print(f"done: model.load_pretrained opens {run.out}; its merge.json says what went in")


if __name__ == "__main__":
    run_command(main, memory="a merge itself needs little, so close other programs")
