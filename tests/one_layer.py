"""How near each head's output comes to its teacher's; and one layer trained alone, in minutes.

    python tests/one_layer.py --teacher DIR --data a.jsonl b.jsonl --out ONE --student RUN/seed
    python tests/one_layer.py --teacher DIR --data a.jsonl b.jsonl --out ONE --layer 20 \
        --features 1 4 8 --steps 300

Stage I gives every layer its TEACHER's input, so no layer's learning depends on another's. One can
be trained without the rest, on inputs that the teacher makes once: an idea for a mixer costs
minutes here where a stage I costs an hour, and shows in the heads that it helps.

Printed for held-out rows of each file, per head: |h_S - h_T|^2 / |h_T|^2, where h is what attention
returns (Eq. 12). 0 is the teacher; a head of which nothing is found has about 1.

The first form reads all layers of a student. The second trains one, once for each --features, on
the same rows in the same order, with stage I's optimiser, schedule and loss.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill  # noqa: E402
from model import (is_new, load_pretrained, load_with_tokenizer, number,  # noqa: E402
                   student_from_teacher)


def open_rows(run, tokenizer, eos_ids):
    """(training rows of all files in turns, {name: held-out rows}), each row (tokens, docs, _)."""
    folders = [distill.tokenise(path, tokenizer, (*eos_ids, None)[0], run.out)
               for path in run.data]
    held_out = np.concatenate([distill.held_out_hashes(folder) for folder in folders])
    train, held = ([distill.Source(path.stem, folder, split, run.context, held_out=held_out)
                    for path, folder in zip(run.data, folders)] for split in ("train", "heldout"))
    mixture = distill.Mixture(train, [1] * len(train), run.rows, seed=0)
    return ([distill.collate([mixture.row(i)], "cpu") for i in range(run.rows)],
            {s.name: [distill.collate([s.row(i)], "cpu")
                      for i in range(min(run.eval_rows, s.num_rows))] for s in held})


@torch.no_grad()
def errors(mixer, heads, target, docs):
    """(H,) sums over tokens of the squared error, and of the teacher's square: (2, H) fp64."""
    h = mixer.mix(heads, document_ids=docs)
    return torch.stack([(x.double() ** 2).sum((0, 2, 3)) for x in (h.double() - target, target)])


def show(title, sums):
    """A line of relative errors, a number a head."""
    print(f"{title:<28}" + "".join(f"{x:6.2f}" for x in (sums[0] / sums[1]).tolist()), flush=True)


def show_layers(student, held):
    """The relative errors of all heads of all layers, for each file."""
    for name, rows in held.items():
        sums = [0] * student.config.num_layers
        for tokens, docs, _ in tqdm(rows, desc=name, unit="row", leave=False):
            for i, (mixer, heads, target) in enumerate(
                    distill.teacher_walk(student, tokens, docs)):
                sums[i] = sums[i] + errors(mixer, heads, target, docs)
        for i, layer in enumerate(sums):
            show(f"{name}, layer {i}", layer)


def layer_inputs(teacher, layer, rows):
    """What the teacher gives a layer for each row: [(heads, target, docs), ...]."""
    found = []
    for tokens, docs, _ in tqdm(rows, desc=f"inputs of layer {layer}", unit="row", leave=False):
        for i, (_, heads, target) in enumerate(
                distill.teacher_walk(teacher, tokens, docs)):
            if i == layer:
                found.append((heads, target, docs))
                break
    return found


def train_layer(run, mixer, train, held, title):
    """Stage I of one mixer, a row a step; its errors before, at each quarter and at the end."""
    trainable = {name: p.requires_grad_() for name, p in mixer.named_parameters() if is_new(name)}
    optimizer, started = distill.make_optimizer(trainable), time.perf_counter()
    for step in range(run.steps + 1):
        if step % max(1, run.steps // 4) == 0 or step == run.steps:
            for name, rows in held.items():
                show(f"{title}, step {step}, {name}", sum(errors(mixer, *row) for row in rows))
        if step == run.steps:
            print(f"{title}: {time.perf_counter() - started:.0f} s")
            return
        heads, target, docs = train[step % len(train)]
        for group in optimizer.param_groups:
            group["lr"] = distill.learning_rate(step, run.steps, 5, run.lr, run.lr * 1e-3)
        h = mixer.mix(heads, document_ids=docs)
        (h.float() - target.float()).square().mean().backward()
        distill.clip_gradients(trainable)
        optimizer.step()
        optimizer.zero_grad()


def main():
    """The command; see the top of the file."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--teacher", type=Path, required=True)
    p.add_argument("--data", type=Path, nargs="+", required=True, help=".txt or .jsonl")
    p.add_argument("--out", type=Path, required=True, help="folder for the token ids")
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--student", type=Path, help="show all its layers")
    which.add_argument("--layer", type=int, help="train this one, from 0")
    p.add_argument("--features", type=int, nargs="+", default=[4])
    p.add_argument("--window", type=number(int, 1), default=64)
    p.add_argument("--context", type=number(int, 1), default=1024)
    p.add_argument("--rows", type=number(int, 1), default=240, help="to train on, again and again")
    p.add_argument("--eval-rows", type=number(int, 1), default=4, help="held out, of each file")
    p.add_argument("--steps", type=number(int, 1), default=300, help="of one row")
    p.add_argument("--lr", type=number(float, 0), default=1e-2, help="its peak")
    run = p.parse_args()
    dtype = distill.choose_dtype("auto", torch.device("cpu"))
    teacher, tokenizer = load_with_tokenizer(run.teacher, dtype=dtype)
    teacher.requires_grad_(False)
    train, held = open_rows(run, tokenizer, teacher.config.eos_ids)
    print(f"{'squared error, head':<28}" + "".join(
        f"{i:6}" for i in range(teacher.config.num_heads)))
    if run.student:
        return show_layers(load_pretrained(run.student, dtype=lambda name: (
            torch.float32 if is_new(name) else dtype)), held)
    train = layer_inputs(teacher, run.layer, train)
    held = {name: layer_inputs(teacher, run.layer, rows) for name, rows in held.items()}
    for features in run.features:
        student = student_from_teacher(teacher, window=run.window, features=features)
        train_layer(run, student.model["layers"][run.layer].self_attn, train, held,
                    f"{features} D")


if __name__ == "__main__":
    main()
