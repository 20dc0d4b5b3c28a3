"""Distil a pretrained Transformer into a hybrid xLSTM student, in two stages.

    stage I    align: every layer's new mixer learns to reproduce the output of the softmax
               attention it replaces. Only the new parameters train (Eq. 12).
    stage II   distil: the whole student learns next tokens and the teacher's distribution over
               its top-k tokens (Eq. 13).

Settings default to the paper's (arXiv 2603.15590: 8B teachers, context 4096); without --teacher
a small preset runs on the teacher that ships in tests/teacher. The run writes into --out:

    data/        the texts as token ids, made once
    seed/        the student after stage I (a folder that model.load_pretrained opens)
    student/     the student after stage II
    checkpoints/ the last two, for --resume
    run.json, results.json, log.jsonl     settings, the final table, the losses

With --experts, stage II runs once per --data file from the same seed and the experts are merged
(Eq. 14). Under torchrun the batch is dealt out and stage II sharded (FSDP2). Not here: the
mathematics (model.py), merging (merge.py), scoring (evaluate.py).

Run:
    python distill.py                                             # shipped teacher, minutes on CPU
    python distill.py --teacher DIR --data a.jsonl=2 b.txt=1 --out RUN     # two thirds from a.jsonl
    python distill.py --teacher DIR --data a.jsonl=2 b.txt=1 --out RUN --resume      # after a stop
    torchrun --nproc-per-node 8 distill.py --teacher DIR --data a.jsonl --out RUN
    python distill.py --teacher DIR --train mixer --plan          # the memory it would take
    python distill.py --mixer swa --out RUN                       # an ablation: windows alone
    python distill.py --experts                                   # branch, merge, score

Contents: 1 data · 2 losses · 3 processes · 4 targets on disk · 5 held-out comparison · 6 optimiser
and checkpoints · 7 stage I · 8 stage II · 9 memory, progress, report · 10 students · 11 command
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import hashlib
import json
import math
import mmap
import multiprocessing
import os
import shutil
import signal
import sys
import textwrap
import time
import uuid
import warnings
import weakref
import zlib
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import evaluate
from merge import merge
from model import (MIXERS, Attention, ModelConfig, Tokenizer, Transformer, assign, generate, is_new,
                   load_pretrained, load_with_tokenizer, local_rows, read_json,
                   reverse_complement, save_pretrained, save_tensors, sha256, student_config,
                   student_from_teacher, write_json)

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------------
# 1. Data: files -> token ids on disk, once -> packed rows that keep their document boundaries
# ----------------------------------------------------------------------------------------------

DATA_FORMAT = 3  # part of the cache key: raise it when the files below change their meaning
FILES = {"tokens.bin": np.uint32,  # the tokens' ids, document after document
         "loss.bin": bool,  # for each token: may it be a label
         "documents.bin": np.int64}  # for each document its length, a hash of its content, where
#   its first member starts, the id of the separator behind each member (no family: 0, -1)
PART = 1 << 25  # bytes of a file that one process tokenises at a time, and that a stop can lose


def document_start(file, offset, is_text):
    """The first byte at or after `offset` of an open file where a document may begin.

    Behind a line end. In a .txt, which may have none for gigabytes: if none is within 64 KB, behind
    a blank, or at least between two characters.
    """
    size = os.fstat(file.fileno()).st_size
    if not 0 < offset < size:
        return max(0, min(offset, size))
    file.seek(offset)
    if not is_text:
        return offset + len(file.readline())
    ahead = file.read(1 << 16)
    line_end = ahead.find(b"\n") + 1
    if not line_end and offset + len(ahead) == size:
        return size
    characters = (i for i, byte in enumerate(ahead) if byte & 0xC0 != 0x80)
    return offset + (line_end or ahead.find(b" ") + 1 or next(characters, 0))


def read_pieces(path, start, stop):
    """Yield (offset, bytes) of each line of a .jsonl, or document of a .txt, in start..stop."""
    is_text = path.suffix == ".txt"
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        stop = size if stop is None else document_start(file, stop, is_text)
        start = document_start(file, start, is_text)
        length = min(max(size // 50, 2000), 1 << 16)
        while start < stop:
            end = document_start(file, start + length, True) if is_text else None
            file.seek(start)
            piece = file.read(min(end, stop) - start) if is_text else file.readline()
            yield start, piece
            start += len(piece)


def read_documents(path, tokenizer, start=0, stop=None):
    """Yield the documents of a .txt or .jsonl file, or of its bytes start..stop.

    Each is (kind, [(text, in_loss), ...]). .jsonl: one JSON object a line with `text`, or with
    `messages` ([{"role", "content"}, ...]; kind "chat"), rendered in the teacher's chat format with
    only the assistant's parts in the loss, or `sequences` (members of one "family": homologues,
    molecules), or `dna` (a text whose reverse complement is another document). .txt: one long
    text, cut at line ends into about fifty documents or more (kind "piece") so that some can be
    held out. Ranges that meet hold every document once. Raises ValueError naming file and line.
    """
    for offset, piece in read_pieces(path, start, stop):
        try:
            if path.suffix == ".txt":
                document = "piece", [(_decode(piece), True)]
            elif piece.strip():
                document = parse_row(_decode(piece), tokenizer)
            else:
                continue
            documents = [document]
            if document[0] == "dna":  # its other strand is as good a text
                documents.append(("dna", [(reverse_complement(document[1][0][0]), True)]))
        except ValueError as error:
            line = 1
            with open(path, "rb") as file:  # counted only now: parts do not know their line
                for start in range(0, offset, 1 << 20):
                    line += file.read(min(1 << 20, offset - start)).count(b"\n")
            if isinstance(error.__cause__, UnicodeDecodeError):
                line += piece[:error.__cause__.start].count(b"\n")
            raise ValueError(f"{path}:{line}: {error}") from None
        yield from documents


def _decode(data):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error}); convert the file") from error


def parse_row(line, tokenizer):
    """One line of a .jsonl -> (kind, [(text, in_loss), ...]); ValueError says what is wrong."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON object ({error})") from None
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return "text", [(row["text"], True)]
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        try:
            return "chat", tokenizer.render_chat_parts(row["messages"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"messages cannot be rendered ({error})") from None
    if isinstance(row, dict) and isinstance(row.get("dna"), str):
        return "dna", [(row["dna"], True)]
    sequences = row.get("sequences") if isinstance(row, dict) else None
    if isinstance(sequences, list) and sequences and all(
            isinstance(s, str) and s for s in sequences):
        return "family", [(sequence, True) for sequence in sequences]
    raise ValueError('expected a string "text" or "dna", a list "messages", or a list "sequences" '
                     "of strings that are not empty")


def encode_document(kind, parts, tokenizer, eos_id):
    """A document of read_documents -> its token ids and in-loss flags, two lists of one length.

    A text is [BOS] text EOS, a piece has no EOS, a conversation is what its chat format says, a
    family is [BOS], its members with the separator after each, EOS.
    """
    if kind == "family":
        ids = tokenizer.encode("", specials=False)  # BOS, or nothing
        for text, _ in parts:
            ids += tokenizer.encode_member(text)
        ids += [] if eos_id is None else [eos_id]
        return ids, [True] * len(ids)
    ids, in_loss = [], []
    for text, learn in parts:
        # Plain text may spell a special token: that is text. A chat format means it.
        new = tokenizer.encode(text, bos=False if kind == "chat" else None, specials=kind == "chat")
        ids += new
        in_loss += [learn] * len(new)
    if kind in ("text", "dna") and eos_id is not None:
        ids, in_loss = ids + [eos_id], in_loss + [True]
    return ids, in_loss


def describe_document(kind, parts, ids, tokenizer):
    """A row of documents.bin. The hash is that of both strands, and of a family in any order."""
    content, family = ids.tobytes(), (0, -1)
    if kind == "dna":
        strand = parts[0][0]
        content = min(strand, reverse_complement(strand)).encode()
    elif kind == "family":
        content = json.dumps(sorted(text for text, _ in parts)).encode()
        family = len(tokenizer.encode("", specials=False)), tokenizer.separator_id
    return np.array([len(ids), zlib.crc32(content), *family])


def tokenise_part(path, tokenizer, eos_id, start, stop):
    """The documents in bytes start..stop of a file -> {name: array} of FILES."""
    found = {name: [np.zeros(0, dtype)] for name, dtype in FILES.items()}
    for kind, parts in read_documents(path, tokenizer, start, stop):
        ids, in_loss = encode_document(kind, parts, tokenizer, eos_id)
        if len(ids) < 2:
            continue  # nothing to predict
        ids = np.array(ids, np.uint32)
        found["tokens.bin"].append(ids)
        found["loss.bin"].append(np.array(in_loss, bool))
        found["documents.bin"].append(describe_document(kind, parts, ids, tokenizer))
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


def _tokenise_parts(pipe, path, directory, eos_id, bounds):
    """A worker process: send each part, or the error that stops here. Waits until it is taken."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its workers
    try:
        tokenizer = Tokenizer(directory)
        for start, stop in bounds:
            pipe.send(tokenise_part(path, tokenizer, eos_id, start, stop))
    except BrokenPipeError:
        pass  # the parent was killed
    except (ValueError, OSError) as error:
        pipe.send(error)


def tokenise_parts(path, tokenizer, eos_id, bounds, workers):
    """Yield tokenise_part of each (start, stop) of `bounds`, in order, from `workers` processes.

    Processes, not threads: almost half of the time is spent in Python itself. Worker w makes parts
    w, w + workers, ...; each holds one part until its turn comes, so memory is bounded. They are
    spawned: the parent may hold threads, a GPU, a process group.
    """
    if workers == 1 or len(bounds) < 2:
        for start, stop in bounds:
            yield tokenise_part(path, tokenizer, eos_id, start, stop)
        return
    spawn, pipes, processes = multiprocessing.get_context("spawn"), [], []
    try:
        for w in range(min(workers, len(bounds))):
            pipe, theirs = spawn.Pipe(duplex=False)
            pipes.append(pipe)
            processes.append(spawn.Process(
                target=_tokenise_parts, daemon=True,
                args=(theirs, path, Path(tokenizer.path).parent, eos_id, bounds[w::workers])))
            processes[-1].start()
            theirs.close()  # so that a worker's death is the end of its pipe
        for i in range(len(bounds)):
            try:
                part = pipes[i % len(pipes)].recv()
            except EOFError:
                raise OSError("a worker process was killed; is there too little memory?") from None
            if isinstance(part, Exception):
                raise part
            yield part
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _append(folder, part):
    """Add a part to the files of a folder. It counts once its row of file sizes is in parts.bin."""
    sizes = []
    for name, array in part.items():
        with open(folder / name, "ab") as file:
            file.write(array)
            file.flush()
            os.fsync(file.fileno())
            sizes.append(file.tell())
    with open(folder / "parts.bin", "ab") as file:
        file.write(np.array(sizes, np.int64))


def _finished_parts(folder):
    """How many whole parts a folder holds; what a stop has left behind them is cut off."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [*FILES, "parts.bin"]
    for name in names:
        (folder / name).touch()
    sizes = np.fromfile(folder / "parts.bin", np.int64)
    done = len(sizes) // len(FILES)
    ends = sizes[(done - 1) * len(FILES):done * len(FILES)] if done else [0] * len(FILES)
    for name, size in zip(names, [*ends, done * len(FILES) * sizes.itemsize]):
        os.truncate(folder / name, size)
    return done


def tokenise(path, tokenizer, eos_id, folder, workers=None):
    """Write a file's documents as token ids into a new sub-folder of `folder`; return it.

    It holds FILES, which depend neither on the number of `workers` (None: all cores, 32 at most)
    nor on stops: a killed call has kept its finished parts in *.tmp, and the next goes on. Keyed by
    the hashes of the text and of the tokenizer's files, so a second call with the same input finds
    the first one's work. One call at a time. Raises ValueError naming file and line, or OSError.
    """
    key = (f"{DATA_FORMAT} {eos_id} {tokenizer.separator_id} {path.suffix} {file_sha256(path)} "
           f"{tokenizer_sha256(tokenizer)}")
    folder = folder / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if folder.exists():
        return folder
    tmp, size = folder.with_name(folder.name + ".tmp"), path.stat().st_size
    workers = workers or min(os.cpu_count(), 32)
    try:
        done, tokens, started = _finished_parts(tmp), 0, time.time()
        bounds = [(start, min(start + PART, size)) for start in range(0, size, PART)]
        with tqdm(desc=f"tokenise {path.name}", total=size, initial=min(done * PART, size),
                  unit="B", unit_scale=True, leave=False) as bar:
            parts = tokenise_parts(path, tokenizer, eos_id, bounds[done:], workers)
            for (start, stop), part in zip(bounds[done:], parts):
                _append(tmp, part)
                tokens += len(part["tokens.bin"])
                bar.set_postfix_str(f"{tokens / (time.time() - started):,.0f} tok/s", False)
                bar.update(stop - start)
        if not (tmp / "documents.bin").stat().st_size:
            raise ValueError(f"{path}: there is no document of two tokens or more in this file")
        os.replace(tmp, folder)
    except ValueError:
        shutil.rmtree(tmp)  # the file must change, and with it the key
        raise
    except OSError as error:
        raise OSError(f"{path}: tokenising stopped ({error}). {tmp} keeps what is done: when the "
                      "cause, such as a full disk, is gone, the same call goes on") from None
    return folder


@cache
def _sha256(path, size, time_ns):
    return sha256(path)


def file_sha256(path):
    """sha256 of a file. A process reads it once, as long as its size and time stay the same."""
    stat = path.stat()
    return _sha256(path.resolve(), stat.st_size, stat.st_mtime_ns)


def teacher_sha256(folder):
    """One digest of the files that decide what a teacher computes."""
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    return hashlib.sha256(" ".join(map(file_sha256, files)).encode()).hexdigest()


def tokenizer_sha256(tokenizer):
    """sha256 of the files that decide how a tokenizer encodes texts and conversations."""
    names = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.txt"
    return sha256(*filter(Path.is_file, (Path(tokenizer.path).with_name(n) for n in names)))


def map_array(path, dtype):
    """A file as an array that is read where it is used, and without what stands around it.

    Rows come in random order. A mapping that reads ahead, up to megabytes for a row of 16 KB, is
    six times as slow.
    """
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapping.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapping, dtype)


class Source:
    """One file's documents as rows of T tokens: packed back to back, cut where a row is full.

    split "train" or "heldout": the `fraction` of documents with the smallest content hashes is
    held out, at least one. A hash, not a position: order in the file and copies do not matter.
    """

    def __init__(self, name, folder, split, T, fraction=0.02):
        lengths, hashes, *family = np.fromfile(folder / "documents.bin", np.int64).reshape(-1, 4).T
        rank = max(1, round(fraction * len(hashes))) - 1
        limit = np.partition(hashes, rank)[rank]
        chosen = hashes <= limit if split == "heldout" else hashes > limit
        self.name, self.folder, self.T = name, folder, T
        self.tokens = map_array(folder / "tokens.bin", np.uint32)
        self.loss = map_array(folder / "loss.bin", bool)
        self.lengths = lengths[chosen]
        self.starts = (lengths.cumsum() - lengths)[chosen]  # in the files
        self.heads, self.separators = (column[chosen] for column in family)
        self.ends = self.lengths.cumsum()  # in the stream of chosen documents
        self.total = int(self.lengths.sum())
        self.num_rows = max(0, self.total - 1) // T

    def row(self, i, order=None):
        """Row i: token ids, document ids, in-loss flags; T + 1 of each (the last: label only).

        order: integers that decide how each family's members are ordered; None: as in the file.
        """
        a, b = i * self.T, (i + 1) * self.T + 1
        ids = np.arange(np.searchsorted(self.ends, a, "right"),
                        np.searchsorted(self.ends, b, "left") + 1)
        pieces = []
        for d in ids:
            shift = self.starts[d] - (self.ends[d] - self.lengths[d])  # stream -> file
            piece = slice(max(a + shift, self.starts[d]),
                          min(b + shift, self.starts[d] + self.lengths[d]))
            if order is not None and self.separators[d] >= 0:
                first = self.starts[d]
                piece = self.shuffled(d, order)[piece.start - first:piece.stop - first]
            pieces.append(piece)
        tokens = [self.tokens[piece] for piece in pieces]
        return (np.concatenate(tokens), np.repeat(ids, [len(t) for t in tokens]),
                np.concatenate([self.loss[piece] for piece in pieces]))

    def shuffled(self, d, order):
        """Where the tokens of family d stand in the files, members in a new order: (length,)."""
        where = np.arange(self.starts[d], self.starts[d] + self.lengths[d])
        ends = np.flatnonzero(self.tokens[where] == self.separators[d]) + 1
        head, *members, tail = np.split(where, [self.heads[d], *ends])
        new = np.random.default_rng((*order, int(d))).permutation(len(members))
        return np.concatenate([head, *(members[m] for m in new), tail])


def collate(rows, device):
    """Rows -> tokens, document_ids, labels, each (B, T) int64; labels -100 where none counts.

    The last token of a document has no label: the next one belongs to another text.
    """
    tokens, ids, loss = (torch.from_numpy(np.stack(x)) for x in zip(*rows))
    tokens = tokens.long()
    labels = torch.where((ids[:, 1:] == ids[:, :-1]) & loss[:, 1:], tokens[:, 1:], -100)
    return tuple(x.to(device) for x in (tokens[:, :-1], ids[:, :-1].long(), labels))


class Mixture:
    """Rows of several sources by weight. What a step sees depends on (seed, step) alone.

    So resuming needs one integer. After n rows, for every n, each source has given its share of n
    to within one row; a source that runs out starts over in a new order. Attributes, for each row:
    which (its source), nth (its how-manieth row).

    reorder: each epoch reads a family's members in an order of its own. False keeps the files'
    order, for which teacher targets are stored.
    """

    def __init__(self, sources, weights, total_rows, seed, reorder=True):
        self.sources, self.seed, self.orders, self.reorder = sources, seed, {}, reorder
        self.which = interleave(weights, total_rows)
        self.nth = np.empty(total_rows, np.int64)
        for s in range(len(sources)):
            chosen = self.which == s
            self.nth[chosen] = np.arange(chosen.sum())

    def locate(self, i):
        """Row i of the mixture is row j of source s: (s, j)."""
        s = int(self.which[i])
        epoch, j = divmod(int(self.nth[i]), self.sources[s].num_rows)
        if self.orders.get(s, (None,))[0] != epoch:
            self.orders[s] = epoch, row_order(self.seed, s, epoch, self.sources[s].num_rows)
        return s, int(self.orders[s][1][j])

    def row(self, i):
        s, j = self.locate(i)
        order = self.seed, s, int(self.nth[i]) // self.sources[s].num_rows
        return self.sources[s].row(j, order if self.reorder else None)


def row_order(seed, s, epoch, n):
    """The order in which source s gives its n rows in an epoch."""
    return np.random.default_rng((seed, s, epoch)).permutation(n)


def interleave(weights, n):
    """(n,) uint16: the source of each row. Any first m of them hold m * share to within one row.

    The quota method (Balinski and Young, 1975): of the sources that are behind their share, the one
    whose next row is due first. Sorting by due time alone gives a large source, against many small
    ones, its rows too early.
    """
    share = [w / sum(weights) for w in weights]
    given, order = [0] * len(share), np.empty(n, np.uint16)
    for m in range(n):
        behind = [s for s, p in enumerate(share) if given[s] < p * (m + 1)]
        s = min(behind, key=lambda s: (given[s] + 1) / share[s])
        given[s] += 1
        order[m] = s
    return order


def parse_data(spec):
    """One --data argument FILE[=WEIGHT] -> (path, weight or None); ValueError naming the flag."""
    name, _, weight = (spec, "", "") if "=" not in spec or Path(spec).exists() else (
        spec.rpartition("="))
    path = Path(name)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"--data {spec}: expected FILE.txt or FILE.jsonl, optionally =WEIGHT")
    if not path.is_file():
        raise FileNotFoundError(f"--data {spec}: there is no file {path}")
    try:
        weight = float(weight) if weight else None
    except ValueError:
        raise ValueError(f"--data {spec}: the weight {weight!r} is not a number") from None
    if weight is not None and not 0 < weight < math.inf:
        raise ValueError(f"--data {spec}: the weight must be positive and finite")
    return path, weight


def open_data(specs, tokenizer, eos_id, folder, T):
    """--data arguments -> (training sources, their weights, held-out sources), tokenised.

    Weights default to the number of tokens, so that files without one are as if concatenated.
    Raises ValueError / FileNotFoundError naming the file or flag.
    """
    train, weights, heldout = [], [], []
    for path, weight in map(parse_data, specs):
        cached = tokenise(path, tokenizer, eos_id, folder)
        train.append(Source(path.stem, cached, "train", T))
        heldout.append(Source(path.stem, cached, "heldout", T))
        for source, split in ((train[-1], "training"), (heldout[-1], "held-out")):
            if source.num_rows == 0:
                raise ValueError(f"--data {path}: {source.total} {split} tokens do not fill a row "
                                 f"of --context {T}; give more text or a shorter context")
        weights.append(weight or float(train[-1].total))
    return train, weights, heldout


# ----------------------------------------------------------------------------------------------
# 2. Losses
# ----------------------------------------------------------------------------------------------


def _chunks(count, width):
    """Slices of range(count) so small that (slice, width) in fp32 stays below 256 MB."""
    size = max(1, (1 << 26) // width)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


@torch.no_grad()
def teacher_topk(hidden, lm_head_weight, k):
    """The k most likely tokens, in no order: hidden (..., hidden) -> ids, logprobs (N, k).

    fp32. Log-probabilities are over the full vocabulary: the mass outside the top k stays known.
    """
    hidden = hidden.flatten(0, -2)
    k = min(k, len(lm_head_weight))
    ids, logprobs = [], []
    for rows in _chunks(len(hidden), len(lm_head_weight)):
        logits = F.linear(hidden[rows], lm_head_weight).float()
        top = logits.topk(k, dim=-1, sorted=False)
        ids.append(top.indices)
        largest = top.values.amax(-1, keepdim=True)
        log_z = logits.sub_(largest).exp_().sum(-1, keepdim=True).log()  # logsumexp would copy
        logprobs.append(top.values - largest - log_z)
    return torch.cat(ids), torch.cat(logprobs)


def sparse_kd_loss(hidden, lm_head_weight, labels, topk_ids, topk_logprobs, *, gamma=0.9, beta=0.1):
    """loss = gamma * CE(labels) + beta * KL(teacher || student), means over valid tokens (Eq. 13).

    hidden (..., hidden), lm_head_weight (V, hidden), labels (...) int64 with -100 = not valid,
    topk_ids and topk_logprobs (..., k): the teacher's top tokens and their log-probabilities.
    Returns (loss, {"ce", "kl"}) in fp32, in nats per token.

    Paper: KL over "the distribution over the top-k tokens". Here: both distributions are
    renormalised over those k tokens, because cutting them off without is biased (2503.16870).
    With k = V it is the full KL. Logits exist for one slice of the vocabulary at a time, and
    gradients are formed in the forward pass: there is never a (tokens, V) matrix.
    """
    loss, ce, kl = _SparseKD.apply(
        hidden.flatten(0, -2), lm_head_weight, labels.flatten(), topk_ids.flatten(0, -2),
        topk_logprobs.flatten(0, -2), gamma, beta)
    return loss, {"ce": ce.detach(), "kl": kl.detach()}


class _SparseKD(torch.autograd.Function):
    """Two passes over slices of the vocabulary: log Z and the logits that count, then gradients.

    Slices of V, not of tokens: every row of lm_head's gradient is then one matrix product over all
    tokens, rounded once, and needs no fp32 buffer of lm_head's size. The price is that logits are
    computed twice, 2 % of an 8B model's step.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, ids, logprobs, gamma, beta):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        wide = torch.promote_types(dtype, torch.float32)
        x, (N, V) = hidden.to(dtype), (len(hidden), len(weight))
        slices = _chunks(V, max(N, x.shape[1]))  # no (slice, hidden) product above 256 MB either
        valid = (labels != -100)[:, None]
        share = valid.to(wide) / valid.sum().clamp_min(1)
        # The label is one more column of ids; each column is looked up in the slice it falls in.
        ids = torch.cat((ids.long(), labels.clamp_min(0)[:, None]), dim=1)  # (N, k + 1)

        def local(v):
            if v.stop - v.start == V:
                return ids, torch.ones((), dtype=torch.bool, device=ids.device)
            return (ids - v.start).clamp(0, v.stop - v.start - 1), (ids >= v.start) & (ids < v.stop)

        with torch.autocast(kind, enabled=False):
            log_z = torch.full((N, 1), -torch.inf, dtype=wide, device=hidden.device)
            z_ids = torch.zeros(ids.shape, dtype=wide, device=hidden.device)
            for v in slices:
                z = (x @ weight[v].to(dtype).T).to(wide)  # (N, slice)
                at, here = local(v)
                z_ids = torch.where(here, z.gather(1, at), z_ids)
                top = z.amax(-1, keepdim=True)
                z.sub_(top).exp_()
                log_z = torch.logaddexp(log_z, z.sum(-1, keepdim=True).log() + top)
            ce = ((log_z - z_ids[:, -1:]) * share).sum()
            log_p = logprobs.to(wide).log_softmax(-1)  # teacher over its top k
            log_q = z_ids[:, :-1].log_softmax(-1)  # student over the same k
            p, q = log_p.exp(), log_q.exp()
            kl = (p * (log_p - log_q) * share).sum()

            # d CE / dz = softmax(z) - onehot(label);  d KL / dz_k = q_k - p_k
            need_x, need_w = ctx.needs_input_grad[:2]
            grad_x = torch.zeros_like(hidden, dtype=wide) if need_x else None
            grad_w = torch.empty_like(weight) if need_w else None
            change = torch.cat((beta * share * (q - p), -gamma * share), dim=1)
            for v in slices if need_x or need_w else ():
                if len(slices) > 1:
                    z = (x @ weight[v].to(dtype).T).to(wide).sub_(log_z).exp_()
                else:
                    z.mul_((top - log_z).exp())
                g = z.mul_(gamma * share)
                at, here = local(v)
                g = g.scatter_add_(1, at, change * here).to(dtype)
                if need_x:
                    grad_x += g @ weight[v].to(dtype)
                if need_w:
                    grad_w[v] = g.T @ x
        ctx.grads = grad_x if grad_x is None else grad_x.to(hidden.dtype), grad_w
        return gamma * ce + beta * kl, ce, kl

    @staticmethod
    def backward(ctx, grad, _ce, _kl):
        grads, ctx.grads = ctx.grads, None  # let go of them: else autograd must copy them
        return *(None if g is None else g.mul_(grad) for g in grads), *(None,) * 5


@torch.no_grad()
def teacher_layers(student, tokens, document_ids, positions=None):
    """The teacher's forward pass inside its student, as far as stage I needs it, layer by layer.

    Yields the student's mixer, what both read (`model.Heads`), and the teacher's softmax output
    (B, H, T, D), which goes on to the next layer.
    """
    if positions is None:
        positions = student.positions(tokens, document_ids=document_ids)
    x, layers = student.embed(tokens), student.model["layers"]
    for block, tables in zip(layers, student.rope_tables(positions, x.dtype)):
        attention = block.self_attn
        heads = attention.heads(block.attention_input(x), tables)
        target = Attention.mix(attention, heads, document_ids=document_ids)
        yield attention, heads, target
        if block is not layers[-1]:
            x = block.after_attention(x, attention.o_proj(target.transpose(1, 2).flatten(2)))


def alignment_losses(student, tokens, document_ids, backward_scale=None, *, positions=None):
    """Stage I (Eq. 12): per layer, the mean over tokens, heads and width of ||h_T - h_S||^2.

    Each layer gets the TEACHER's input; its softmax output is the target, its hybrid output the
    prediction. So student and teacher share one copy of all frozen weights, layers do not depend
    on each other, and memory is that of one layer: with `backward_scale` each layer's graph is used
    at once (gradients of scale * loss are added) and freed. positions: as in `Transformer.forward`.
    Returns (layers,) fp32, detached.
    """
    losses = []
    for attention, heads, target in teacher_layers(student, tokens, document_ids, positions):
        with torch.set_grad_enabled(backward_scale is not None):
            h = attention.mix(heads, document_ids=document_ids)
            loss = (h.float() - target.float()).square().mean()
            if backward_scale is not None:
                (loss * backward_scale).backward()
        losses.append(loss.detach())
    return torch.stack(losses)


# ----------------------------------------------------------------------------------------------
# 3. Number format, and several processes (torchrun): rows are dealt out, stage II is sharded
# ----------------------------------------------------------------------------------------------


def choose_dtype(wanted, device):
    """What --dtype means: "auto" is bf16 where products of it are fast, else fp32.

    That is on GPUs and on CPUs with AMX, Intel's matrix unit (four to six times fp32, measured).
    """
    if wanted == "auto":
        fast = device.type == "cuda" or torch.cpu.get_capabilities().get("amx_bf16")
        wanted = "bfloat16" if fast else "float32"
    return getattr(torch, wanted)


def frozen_dtype(run):
    """What frozen weights are kept in: fp32 for --dtype float32, else None, which is as stored."""
    return torch.float32 if run.dtype == torch.float32 else None


def autocast(run):
    """Matrix products in run.dtype."""
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype == torch.bfloat16)


# Nothing below depends on how many there are: a step has --batch rows whatever their number, losses
# and gradients are sums over all rows divided by the step's count. Without torchrun every function
# from here to section 4 is the identity.


def start_processes(run):
    """Join torchrun's processes, if it started this one; set run.device, .dtype, .rank, .world."""
    run.device, run.rank, run.world = torch.device(run.device), 0, 1
    run.dtype = choose_dtype(run.dtype, run.device)
    if "RANK" not in os.environ:
        return
    if run.device.type == "cuda":
        run.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(run.device)
    # The others wait for the first one's slow work (tokenising, saving): longer than the default
    # half hour. A process that dies is noticed by torchrun, which stops all.
    dist.init_process_group("nccl" if run.device.type == "cuda" else "gloo",
                            timeout=datetime.timedelta(days=2))
    run.rank, run.world = dist.get_rank(), dist.get_world_size()
    if run.batch % run.world:
        raise ValueError(f"--batch {run.batch} rows cannot be dealt out to {run.world} processes "
                         "evenly; make it a multiple")
    if run.rank > 0:  # one voice: errors still reach stderr from every process
        sys.stdout = open(os.devnull, "w")


def leave(status):
    """End this process with exit status 0 (all is done or saved) or 2 (bad input).

    Under torchrun without Python's own shutdown: a thread of gloo's may still hold tensors of a sum
    long done, and if it frees them while Python shuts down, the process aborts, its work done. To
    destroy the group does not end its threads, since DTensor's caches hold the group as well.
    """
    if dist.is_initialized():
        if status == 0:
            dist.destroy_process_group()  # after an error the others may be amid a sum
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def barrier():
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def once(run, path, make):
    """Have the first process call make(), unless `path` exists; all go on when it is done."""
    if run.rank == 0 and not path.exists():
        make()
    barrier()


def all_sum(tensor):
    """The sum of every process's tensor, on every process (in place)."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(trainable):
    """Stage I: add up all processes' gradients, in one message."""
    if dist.is_initialized():
        grads = [p.grad for p in trainable.values()]
        flat = all_sum(torch.cat([g.flatten() for g in grads]))
        for g, part in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(part.view_as(g))


def clip_gradients(trainable, largest):
    """Scale gradients down to a norm of `largest`; return the norm before, over all processes."""
    norm = nn.utils.clip_grad_norm_(trainable.values(), largest)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def shard(model, device, dtype):
    """FSDP2: every process keeps 1/world of each matrix; a block is gathered while it runs.

    In `dtype`, with gradients summed in fp32 and the fp32 masters sharded. The new parameters
    (gates, feature maps) are gathered in fp32: rounding a forget gate's bias of 6.9 to bf16 moves
    its half-life by 3 %. Micro-batches each sum their gradients: keeping them until the last one
    would need whole gradients on every GPU.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    half = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                cast_forward_inputs=False)
    for block in model.model["layers"]:
        new = [m for name, m in block.self_attn.named_children() if is_new(f".{name}.")]
        if new:
            fully_shard(new, mesh=mesh, mp_policy=exact)
        fully_shard(block, mesh=mesh, mp_policy=half)
    fully_shard(model, mesh=mesh, mp_policy=half)
    # It warns that some modules return views, which nobody may change in place; nobody does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)


def my_micro_batches(run, step):
    """The mixture's row numbers of a step that are this process's, in --micro-batch pieces."""
    mine = range(step * run.batch + run.rank, (step + 1) * run.batch, run.world)
    return [mine[a:a + run.micro_batch] for a in range(0, len(mine), run.micro_batch)]


# ----------------------------------------------------------------------------------------------
# 4. Teacher targets on disk: the teacher runs once; stage II then needs it no more
# ----------------------------------------------------------------------------------------------

TARGETS_FORMAT = 1  # raise it when the files change their meaning
SHARD_ROWS = 64


def targets_row(T, k, vocab_size):
    """The numpy dtype of a row: the top k ids and fp16 log-probs of T tokens, and their CRC-32.

    Ids take 2 bytes, and a third in `high` where the vocabulary has more than 2^16 tokens: with
    k = 256, 1024 or 1280 bytes a token.
    """
    parts = [("low", "<u2", (T, k)), ("logprobs", "<f2", (T, k))]
    parts += [("high", "u1", (T, k))] if vocab_size > 1 << 16 else []
    return np.dtype([("targets", parts), ("crc", "<u4")])


@contextlib.contextmanager
def replacing(path):
    """A new file that takes the place of `path` if the block ends well, whoever else does so."""
    tmp = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(tmp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


class TargetCache:
    """The teacher's top-k log-probabilities for rows of the sources, in files of SHARD_ROWS rows.

    Keyed by (source, row), not by step: epochs, experts and other weights share them. A source's
    rows stand in the order of the first epoch, so that a run shorter than it needs the first
    shards only. A shard exists whole or not at all. manifest.json says whose targets these are
    (`described`, see `describe_targets`); ValueError names what differs. The seed may differ: the
    manifest's orders the rows.
    """

    def __init__(self, folder, sources, described):
        self.folder, self.sources = folder, sources
        path = folder / "manifest.json"
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with replacing(path) as file:
                file.write((json.dumps(described, indent=2) + "\n").encode())
        found = read_json(path)
        differs = [f"{key} was {found.get(key)!r}, now {value!r}"
                   for key, value in described.items() if key != "seed" and found.get(key) != value]
        if differs:
            raise ValueError(f"--targets {folder} was made with other settings: "
                             f"{'; '.join(differs)}. Name another folder, or delete this one")
        self.row_type = targets_row(described["context"], described["k"], described["vocab_size"])
        self.orders = [row_order(found["seed"], s, 0, source.num_rows)
                       for s, source in enumerate(sources)]
        self.places = [np.argsort(order) for order in self.orders]  # row -> its place in the files

    def shard(self, s, n):
        """Path and rows of shard n of source s."""
        rows = self.orders[s][n * SHARD_ROWS:(n + 1) * SHARD_ROWS]
        return self.folder / self.sources[s].name / f"shard-{n:06d}", rows

    def needed(self, mixtures):
        """The shards [(s, n), ...] that mixtures draw from."""
        found = []
        for s, places in enumerate(self.places):
            drawn = [row_order(m.seed, s, 0, len(places))[:(m.which == s).sum()] for m in mixtures]
            found += [(s, n) for n in np.unique(places[np.concatenate(drawn)] // SHARD_ROWS)]
        return found

    def is_whole(self, s, n):
        path, rows = self.shard(s, n)
        return path.exists() and path.stat().st_size == len(rows) * self.row_type.itemsize

    def rows(self, where, device="cpu"):
        """[(source, row), ...] -> ids (N, T, k) int32 and log-probs (N, T, k) fp16, from the disk.

        As sparse_kd_loss takes them, which widens a chunk at a time. Raises FileNotFoundError, or
        ValueError if a row is damaged.
        """
        ids, logprobs = [], []
        for s, j in where:
            n, i = divmod(int(self.places[s][j]), SHARD_ROWS)
            path, _ = self.shard(s, n)
            row = np.memmap(path, self.row_type, "r")[i]
            targets = row["targets"]
            if zlib.crc32(targets.tobytes()) != row["crc"]:
                raise ValueError(f"{path}: row {i} is damaged; delete this file, and the run makes "
                                 "it again")
            wide = targets["low"].astype(np.int32)
            if "high" in targets.dtype.names:
                wide |= targets["high"].astype(np.int32) << 16
            ids.append(wide)
            logprobs.append(targets["logprobs"])
        return tuple(torch.from_numpy(np.stack(x)).to(device) for x in (ids, logprobs))

    def write(self, s, n, teacher, micro_batch, device, after):
        """Make shard n of source s. after(tokens) is called behind each micro-batch."""
        path, rows = self.shard(s, n)
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as file:
            for a in range(0, len(rows), micro_batch):
                part = rows[a:a + micro_batch]
                out = np.zeros(len(part), self.row_type)
                targets = out["targets"]
                shape = targets["low"].shape
                tokens, document_ids, _ = collate([self.sources[s].row(int(j)) for j in part],
                                                  device)
                with torch.no_grad():
                    ids, logprobs = teacher(tokens, document_ids=document_ids,
                                            head=partial(teacher_topk, k=shape[-1]))
                ids = ids.cpu().numpy().reshape(shape)
                targets["low"] = ids & 0xFFFF
                if "high" in targets.dtype.names:
                    targets["high"] = ids >> 16
                least = torch.finfo(torch.float16).min  # a masked token is not -inf: 0 * inf is nan
                targets["logprobs"] = logprobs.clamp_min(least).cpu().numpy().reshape(shape)
                out["crc"] = [zlib.crc32(t.tobytes()) for t in targets]
                file.write(out)
                after(tokens.numel())


def describe_targets(run, teacher, tokenizer, mixture):
    """What a target cache depends on: the content of its manifest.json."""
    return {"format": TARGETS_FORMAT, "teacher_sha256": teacher_sha256(run.teacher),
            "tokenizer_sha256": tokenizer_sha256(tokenizer),
            "data": [source.folder.name for source in mixture.sources],  # name, hash
            "rows": [source.num_rows for source in mixture.sources], "context": run.context,
            "k": min(run.topk, teacher.config.vocab_size),
            "vocab_size": teacher.config.vocab_size, "seed": mixture.seed}


def prepare_targets(run, teacher, tokenizer, mixtures, stop=None, rank=0, world=1):
    """Open the cache run.targets and make what `mixtures` draw and it lacks, shard by shard.

    Process `rank` of `world` makes every world-th shard; afterwards they must wait for each other.
    Processes that do not know of each other do no harm, only work twice. A killed call loses its
    unfinished shard. Raises ValueError when the folder is another's or the disk too small, OSError,
    and Stopped when `stop` becomes true.
    """
    described = describe_targets(run, teacher, tokenizer, mixtures[0])
    cache = TargetCache(run.targets, mixtures[0].sources, described)
    for tmp in run.targets.glob("**/*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - tmp.stat().st_mtime > 3600:  # a live process writes all the time
                tmp.unlink()
    needed = cache.needed(mixtures)
    missing = [x for x in needed if not cache.is_whole(*x)]
    rows = sum(len(cache.shard(*x)[1]) for x in missing)
    row_bytes, size = cache.row_type.itemsize, tqdm.format_sizeof
    need, free = rows * row_bytes, shutil.disk_usage(run.targets).free
    if rank == 0:
        for path in (cache.shard(*x)[0] for x in missing):
            if path.exists():
                print(f"targets   {path} is torn ({path.stat().st_size:,} bytes): it is made again")
        print(f"targets   {run.targets}: top {described['k']}, {row_bytes / run.context:,.0f} bytes"
              f" a token; {len(needed) - len(missing)} of {len(needed)} files are there. To make: "
              f"{rows:,} rows of {run.context}, {size(need)}B; free: {size(free)}B")
    if need > free:
        raise ValueError(f"--targets {run.targets}: {size(need)}B are to be written, {size(free)}B "
                         "are free: take another disk, fewer --tokens or a lower --topk")
    mine = sorted(set(needed[rank::world]) & set(missing))
    with tqdm(desc="targets", total=sum(len(cache.shard(*x)[1]) for x in mine) * run.context,
              unit="tok", unit_scale=True, disable=rank > 0 or not mine) as bar:
        def after(tokens):
            bar.update(tokens)
            if stop:
                raise Stopped("a part of the targets")

        for x in mine:
            try:
                with autocast(run):
                    cache.write(*x, teacher, run.micro_batch, run.device, after)
            except OSError as error:
                raise OSError(f"--targets {cache.shard(*x)[0]}: {error}. The files before it are "
                              "whole, and the same command goes on behind them") from None
    return cache


# ----------------------------------------------------------------------------------------------
# 5. Held-out comparison of student and teacher
# ----------------------------------------------------------------------------------------------


@torch.no_grad()
def compare(run, student, teacher, sources):
    """Held-out CE of the student, KL(teacher || student) over the full vocabulary, agreement.

    On the first run.eval_rows rows of every source. Returns {source: {"ce", "kl" (nats per token),
    "top1" (share of tokens where both rank the same token first)}, ..., "all": their mean}. With
    student=teacher: the teacher's own CE, and KL 0.
    """
    results = {}
    for source in sources:
        sums = torch.zeros(4, dtype=torch.float64, device=run.device)  # ce, kl, top1, tokens
        n = min(run.eval_rows, source.num_rows)
        # Every process makes as many calls as any other: FSDP2 gathers weights in each.
        for a in range(0, n, run.micro_batch * run.world):
            a += run.rank * run.micro_batch
            rows = [source.row(i) for i in range(a, min(a + run.micro_batch, n))]
            tokens, ids, labels = collate(rows or [source.row(0)], run.device)
            labels = labels if rows else torch.full_like(labels, -100)
            with autocast(run):
                sums += teacher(tokens, document_ids=ids, head=lambda h_t, w_t: (
                    _agreement(h_t, w_t, h_t, w_t, labels) if student is teacher else
                    student(tokens, document_ids=ids, head=lambda h_s, w_s: (
                        _agreement(h_t, w_t, h_s, w_s, labels)))))
        *sums, count = all_sum(sums).tolist()
        results[source.name] = dict(zip(("ce", "kl", "top1"), (x / max(count, 1) for x in sums)))
    results["all"] = {key: sum(r[key] for r in results.values()) / len(results)
                      for key in ("ce", "kl", "top1")}
    return results


def _agreement(hidden_t, weight_t, hidden_s, weight_s, labels):
    """Sums over valid tokens: student's CE, KL to the teacher, equal argmax, 1.  -> (4,) fp64."""
    valid = labels.flatten() != -100
    labels = labels.flatten()[valid, None]
    hidden_t, hidden_s = hidden_t.flatten(0, -2)[valid], hidden_s.flatten(0, -2)[valid]
    sums = torch.zeros(4, dtype=torch.float64, device=labels.device)
    for part in _chunks(len(labels), len(weight_t)):
        p = F.linear(hidden_t[part], weight_t).float().log_softmax(-1)
        q = F.linear(hidden_s[part], weight_s).float().log_softmax(-1)
        sums += torch.stack([-q.gather(1, labels[part]).sum(), (p.exp() * (p - q)).sum(),
                             (p.argmax(-1) == q.argmax(-1)).sum(),
                             valid.new_ones(len(q)).sum()]).double()
    return sums


# ----------------------------------------------------------------------------------------------
# 6. Optimiser, schedule, checkpoints
# ----------------------------------------------------------------------------------------------


def learning_rate(step, steps, warmup, peak, final):
    """Linear warm-up to `peak`, then a cosine to `final` (final = peak: constant). step from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


TRAIN = {"new": is_new, "mixer": lambda name: ".self_attn." in name, "all": lambda name: True}


def select_trainable(student, which):
    """Set requires_grad: "new" (gates and feature maps), "mixer" (+ q, k, v, o) or "all".

    Returns the trainable parameters by name. Raises ValueError when there are none.
    """
    for name, p in student.named_parameters():
        p.requires_grad_(TRAIN[which](name))
    trainable = {name: p for name, p in student.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(f"--train {which}: the mixer {student.config.hybrid.mixer!r} has no such "
                         "parameters; use --train mixer or all")
    return trainable


def make_optimizer(trainable):
    """AdamW with weight decay 0.1 on matrices (Paper: 0.1), none on norms and biases.

    Paper: betas not stated. Here: (0.9, 0.95), as its runs are short for the default 0.999. Fused:
    the default on a GPU makes temporary copies as large as the parameters.
    """
    matrices = [p for p in trainable.values() if p.dim() > 1]
    vectors = [p for p in trainable.values() if p.dim() <= 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                              {"params": vectors, "weight_decay": 0.0}],
                             betas=(0.9, 0.95), fused=True)


STATE = ("weight", "exp_avg", "exp_avg_sq")  # a checkpoint's files: STATE-RANK.safetensors


def save_checkpoint(run, stage, step, trainable, optimizer):
    """Write trained weights and optimiser state after `step` steps of `stage`; keep the last two.

    The folder is complete or absent: it is written as *.tmp, synced and renamed. Every process
    writes its own rows of sharded tensors, the first one those that all hold alike. Frozen weights
    are not in it: they come from the teacher (stage I) or seed/ (stage II).
    """
    path = run.checkpoints / f"{stage}-{step:08d}"
    tmp = path.with_name(path.name + ".tmp")
    if run.rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    barrier()
    sharded = any(hasattr(p, "to_local") for p in trainable.values())
    if sharded or run.rank == 0:
        for state in STATE:
            tensors = {name: p.detach() if state == "weight" else optimizer.state[p][state]
                       for name, p in trainable.items()}
            save_tensors({name: local_rows(x)[0] for name, x in tensors.items()},
                         tmp / f"{state}-{run.rank:04d}.safetensors")
    barrier()
    if run.rank == 0:
        write_json(tmp / "manifest.json", {"stage": stage, "step": step, "world": run.world,
                                           "files": run.world if sharded else 1})
        shutil.rmtree(path, ignore_errors=True)
        os.replace(tmp, path)
        for old in checkpoints(run, stage)[:-2]:
            shutil.rmtree(old)


def checkpoints(run, stage):
    """Folders of the stage's checkpoints, oldest first."""
    return sorted(run.checkpoints.glob(f"{stage}-{'[0-9]' * 8}"))


class StoredState:
    """The tensors of one kind of STATE in a checkpoint, whatever number of processes wrote it.

    Raises ValueError for a torn checkpoint.
    """

    def __init__(self, path, state):
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            self.world = manifest["world"]
            self.files = [safe_open(path / f"{state}-{i:04d}.safetensors", framework="pt")
                          for i in range(manifest["files"])]
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ValueError(f"checkpoint {path} cannot be read ({error})") from None

    def names(self):
        return self.files[0].keys()

    def rows(self, name, first=0, count=None):
        """Rows first ... first + count of a tensor (all by default): each file holds the next."""
        pieces, start = [], 0
        for file in self.files:
            stored = file.get_slice(name)
            size = stored.get_shape()[0]
            a, b = max(first - start, 0), size if count is None else first + count - start
            if a < min(b, size):
                pieces.append(stored[a:min(b, size)])
            start += size
        return torch.cat(pieces)


def load_checkpoint(run, stage, trainable, optimizer):
    """Restore the newest whole checkpoint of `stage`; return its step, 0 if there is none.

    A torn one is named and passed over. One written by another number of processes is read by
    rows; the losses then go on equal up to the order of sums.
    """
    for path in reversed(checkpoints(run, stage)):
        try:
            stored = {state: StoredState(path, state) for state in STATE}
        except ValueError as error:
            print(f"{error}; trying the one before")
            continue
        step = int(path.name.rpartition("-")[2])
        for name, p in trainable.items():
            weight, first = local_rows(p.detach())
            optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device),
                                  "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}
            for state in STATE:
                into = weight if state == "weight" else local_rows(optimizer.state[p][state])[0]
                if len(into):
                    into.copy_(stored[state].rows(name, first, len(into)))
        world = stored["weight"].world
        print(f"resuming {stage} from {path}" + ("" if world == run.world else (
            f", written by {world} processes, now {run.world}: sums change their order, so losses "
            "go on equal to rounding, not to the bit")))
        return step
    return 0


class StopRequested:
    """True after Ctrl-C or SIGTERM: loops finish their step, save and leave. A second one kills."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.remember)

    def remember(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def __bool__(self):
        return self.signal is not None


class Stopped(Exception):
    """The run was asked to stop, and has saved."""


# ----------------------------------------------------------------------------------------------
# 7. Stage I: align
# ----------------------------------------------------------------------------------------------


def align(run, student, mixture, stop):
    """Train the new parameters on `alignment_losses` for run.align_steps steps, in place.

    Every process holds all frozen weights and its share of the batch: the walk over the layers
    is no `forward`, which FSDP2 would need, and only the new parameters' gradients (0.5 % of an
    8B model) have to be summed.
    """
    trainable = select_trainable(student, "new")
    describe(run, "stage I (align)", student, trainable, run.align_steps)
    optimizer = make_optimizer(trainable)
    first = load_checkpoint(run, "align", trainable, optimizer)
    with progress_bar("align", first, run.align_steps, run) as bar:
        for step in range(first, run.align_steps):
            # ----- one step -----
            lr = learning_rate(step, run.align_steps, run.warmup, run.align_lr, run.align_lr * 1e-3)
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses = 0.0
            for part in my_micro_batches(run, step):
                tokens, ids, _ = collate(map(mixture.row, part), run.device)
                with autocast(run):
                    scale = len(part) / run.batch
                    losses = losses + scale * alignment_losses(student, tokens, ids, scale)
            sum_gradients(trainable)
            norm = clip_gradients(trainable, run.clip)
            sums = torch.cat((losses, losses.new_tensor([bool(stop)])))
            *losses, stopping = all_sum(sums).tolist()
            check_finite(run, mixture, "align", step, sum(losses), norm)
            optimizer.step()
            optimizer.zero_grad()
            # --------------------
            log(run, bar, "align", step, lr=lr, loss=sum(losses), norm=norm)
            done = step + 1
            if done < run.align_steps and (done % run.save_every == 0 or stopping):
                save_checkpoint(run, "align", done, trainable, optimizer)
                if stopping:
                    raise Stopped(f"stage I, step {done}")
    tqdm.write("loss per layer: " + " ".join(f"{x:.2e}" for x in losses))


# ----------------------------------------------------------------------------------------------
# 8. Stage II: distil
# ----------------------------------------------------------------------------------------------


def distil(run, student, teacher, cache, mixture, heldout, stop):
    """Train run.train's parameters on `sparse_kd_loss` for run.distil_steps steps, in place.

    What the teacher says comes from `cache`, a TargetCache, or else from the teacher, as they go.
    """
    trainable = select_trainable(student, run.train)
    describe(run, "stage II (distil)", student, trainable, run.distil_steps)
    optimizer = make_optimizer(trainable)
    first = load_checkpoint(run, "distil", trainable, optimizer)
    with progress_bar("distil", first, run.distil_steps, run) as bar:
        for step in range(first, run.distil_steps):
            # ----- one step -----
            lr = learning_rate(step, run.distil_steps, run.warmup, run.lr, run.lr)  # constant
            for group in optimizer.param_groups:
                group["lr"] = lr
            parts = my_micro_batches(run, step)
            batches = [collate(map(mixture.row, part), run.device) for part in parts]
            valid = all_sum(sum((labels != -100).sum() for _, _, labels in batches)).clamp_min(1)
            sums = torch.zeros(3, device=run.device)  # ce, kl, whether to stop
            for part, (tokens, ids, labels) in zip(parts, batches):
                if cache:
                    targets = cache.rows([mixture.locate(i) for i in part], run.device)
                else:
                    with torch.no_grad(), autocast(run):
                        targets = teacher(tokens, document_ids=ids,
                                          head=partial(teacher_topk, k=run.topk))
                with autocast(run):
                    loss, terms = student(tokens, document_ids=ids, head=lambda h, w: (
                        sparse_kd_loss(h, w, labels, *targets, gamma=run.gamma, beta=run.beta)))
                share = (labels != -100).sum() / valid  # of all processes' tokens in this step
                (loss * share * run.world).backward()  # FSDP2 takes the mean over processes
                sums[:2] += torch.stack((terms["ce"], terms["kl"])) * share
            sums[2] = bool(stop)
            ce, kl, stopping = all_sum(sums).tolist()
            norm = clip_gradients(trainable, run.clip)
            check_finite(run, mixture, "distil", step, ce + kl, norm)
            optimizer.step()
            optimizer.zero_grad()
            # --------------------
            log(run, bar, "distil", step, lr=lr, norm=norm, ce=ce, kl=kl)
            done = step + 1
            if done % run.save_every == 0 or stopping or done == run.distil_steps:
                save_checkpoint(run, "distil", done, trainable, optimizer)
                if stopping and done < run.distil_steps:
                    raise Stopped(f"stage II, step {done}")
            if done < run.distil_steps and done % run.eval_every == 0:
                r = compare(run, student, teacher or student, heldout)["all"]
                tqdm.write(f"held-out after {done} steps: CE {r['ce']:.4f}" + (
                    f"  KL {r['kl']:.4f}  top-1 {r['top1']:.3f}" if teacher else ""))


# ----------------------------------------------------------------------------------------------
# 9. What the user sees: memory, plan, progress, report
# ----------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it that are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.update(storages((args, kwargs)))  # what was made outside is not counted
        out = func(*args, **(kwargs or {}))
        for storage in storages(out).difference(self.seen):
            self.seen.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, size):
        self.now -= size


def storages(values):
    """The set of memory blocks behind all tensors in a nest of tuples and dicts."""
    return {x.untyped_storage() for x in tree_leaves(values) if isinstance(x, torch.Tensor)}


def working_bytes(run, config, stage, layers):
    """Peak of what one micro-batch needs besides weights, gradients and optimiser state.

    By running it, on tensors that have a shape and no memory, on a model cut to `layers` layers.
    """
    config = dataclasses.replace(config, num_layers=layers,
                                 layer_windows=config.layer_windows[:layers])
    with torch.device("meta"):
        student = Transformer(config)
        teacher = Transformer(dataclasses.replace(config, hybrid=None))
    with FakeTensorMode(), torch.no_grad():
        for model in (student, teacher):
            for name, p in list(model.named_parameters()):
                assign(model, name, nn.Parameter(torch.empty(
                    p.shape, dtype=torch.float32 if is_new(name) else run.dtype)))
        teacher.requires_grad_(False)
        for block in student.model["layers"]:
            block.recompute = run.recompute
        trainable = select_trainable(student, "new" if stage == "align" else run.train)
        for p in trainable.values():  # they are counted as gradients
            p.grad = torch.empty_like(p)
        tokens = torch.zeros(run.micro_batch, run.context, dtype=torch.long)
        with LiveBytes() as live, torch.enable_grad():
            if stage == "align":
                alignment_losses(student, tokens, tokens, 1.0)
            else:
                targets = [torch.zeros(tokens.numel(), run.topk, dtype=dtype) for dtype in (
                    torch.int32, torch.float16)]
                if not run.targets:
                    with torch.no_grad():
                        targets = teacher(tokens, document_ids=tokens,
                                          head=partial(teacher_topk, k=run.topk))
                student(tokens, document_ids=tokens, head=lambda h, w: sparse_kd_loss(
                    h, w, tokens, *targets, gamma=run.gamma, beta=run.beta))[0].backward()
    return live.peak


def plan_memory(run, config, stage, stored=None):
    """Bytes that a step of `stage` ("align", "distil") needs on one process, by kind.

    config: the student's. Weights: fp32 where they train or the teacher is `stored` as "float32",
    else run.dtype. Under torchrun stage II's are sharded, and the block at work, the next one and
    the embeddings whole.
    "at work": activations, the loss chunk and temporary gradients (`working_bytes`).
    """
    sharded, half = stage == "distil" and "RANK" in os.environ, run.dtype.itemsize
    share = run.world if sharded else 1
    with torch.device("meta"):
        student = Transformer(config)
    sizes = {name: p.numel() for name, p in student.named_parameters()}
    copied = sum(n for name, n in sizes.items() if not is_new(name))
    trains = TRAIN["new" if stage == "align" else run.train]
    train = sum(n for name, n in sizes.items() if trains(name))
    frozen = 4 if stored == "float32" else half
    needs = {"weights": (4 * train + frozen * (sum(sizes.values()) - train)) // share,
             "gradients": 4 * train // share, "AdamW": 8 * train // share}
    if stage == "distil" and not run.targets:
        needs["teacher"] = frozen * copied // share
    blocks = [sum(p.numel() for p in b.parameters()) for b in student.model["layers"]]
    if sharded:
        needs["gathered"] = half * (2 * (sum(sizes.values()) - sum(blocks)) + 4 * max(blocks))
    elif half == 2 and stage == "distil":
        needs["bf16 copies"] = 2 * train  # autocast's
    # By running a few layers. Stage I lets go of a layer before the next. Of each more in stage II
    # stays its input, or without --recompute what a third adds to two (the first is special).
    few = min(1 if stage == "align" else 2, config.num_layers)
    needs["at work"] = work = working_bytes(run, config, stage, few)
    if stage == "distil":
        each = half * run.micro_batch * run.context * config.hidden_size
        if not run.recompute and few < config.num_layers:
            each = working_bytes(run, config, stage, few + 1) - work
        needs["at work"] += (config.num_layers - few) * each
    return needs | {"in all": sum(needs.values())}


def why_no_align(run):
    """Why the run has no stage I, or None."""
    return f"the run starts from {run.start}" if run.start else (
        "--skip-align" if run.skip_align else
        "the mixer has no new parameters" if run.mixer == "swa" else None)


def show_plan(run):
    """Print the memory that each stage needs."""
    directory = Path(run.start or run.teacher)
    config, hf = ModelConfig.from_hf(directory), read_json(directory / "config.json")
    stored = hf.get("dtype", hf.get("torch_dtype"))  # the key's new and old name
    if not run.start:
        config = student_config(config, run.window, run.sinks, run.mixer, run.features)
    print(f"memory of one process, GB, at {run.micro_batch} x {run.context} tokens at once:")
    for stage in ("distil",) if why_no_align(run) else ("align", "distil"):
        needs = plan_memory(run, config, stage, stored)
        print(f"  {stage:<7}" + "  ".join(f"{k} {v / 1e9:.3g}" for k, v in needs.items()))


def describe(run, title, student, trainable, steps):
    """Say what is about to train, before it does."""
    kinds = {}
    for name, p in trainable.items():
        kind = ".".join(part for part in name.split(".") if part not in ("model", "layers")
                        and not part.isdigit())
        kinds[kind] = kinds.get(kind, 0) + p.numel()
    total = sum(p.numel() for p in student.parameters())
    count = sum(kinds.values())
    tokens = run.batch * run.context
    print(f"\n{title}: {steps} steps of {run.batch} x {run.context} = {tokens:,} tokens, "
          f"{steps * tokens:,} in all")
    print(f"  {count:,} parameters train, {total - count:,} are frozen. Training:")
    listed = ", ".join(f"{kind} ({n:,})" for kind, n in kinds.items())
    print(textwrap.fill(listed, 96, initial_indent="    ", subsequent_indent="    "))


def progress_bar(name, first, steps, run):
    """tqdm over the tokens of a stage, from step `first` on."""
    tokens = run.batch * run.context
    return tqdm(desc=name, total=steps * tokens, initial=first * tokens, unit="tok",
                unit_scale=True, dynamic_ncols=True, disable=run.rank > 0)


def log(run, bar, stage, step, **metrics):
    """Progress bar each step; log.jsonl too (a line a step: stage, step, metrics)."""
    if run.rank > 0:
        return
    metrics = {key: float(value) for key, value in metrics.items()}
    bar.update(run.batch * run.context)
    bar.set_postfix({key: f"{value:.3g}" for key, value in metrics.items()})
    with open(run.out / "log.jsonl", "a") as f:
        f.write(json.dumps({"stage": stage, "step": step + 1, **metrics}) + "\n")


def rows_of_step(mixture, run, step):
    """The rows of a step in words: "a 5, 17; b 3"."""
    found = {}
    for s, j in map(mixture.locate, range(step * run.batch, (step + 1) * run.batch)):
        found.setdefault(mixture.sources[s].name, []).append(str(j))
    return "; ".join(f"{name} {', '.join(rows)}" for name, rows in found.items())


def check_finite(run, mixture, stage, step, *values):
    """Before the update: weights and the last checkpoint stay good when a loss is not finite."""
    if not all(math.isfinite(float(v)) for v in values):
        raise ValueError(f"{stage} step {step + 1}: loss or gradient is not finite; no update was "
                         f"made. The last good state is in {run.checkpoints}; lower the learning "
                         "rate in a new --out, or look at what this step read: rows of "
                         f"{run.context} tokens, {rows_of_step(mixture, run, step)}")


def report(results):
    """The final table: one line a model, held-out numbers, KL also per source."""
    names = [n for n in next(iter(results.values())) if n != "all"]
    width = max(8, *map(len, names))
    print("\nheld-out            CE  KL to teacher  top-1 agreement   KL on:"
          + "".join(f" {n:>{width}}" for n in names))
    for model, r in results.items():
        a = r["all"]
        print(f"{model:<16}{a['ce']:6.3f} {a['kl']:14.4f} {a['top1']:16.3f}         "
              + "".join(f" {r[n]['kl']:{width}.4f}" for n in names))


def show_samples(run, folder, tokenizer, heldout):
    """One greedy continuation per source, teacher's and student's, side by side."""
    prompts = [torch.from_numpy(source.row(0)[0][None, :run.context // 2]).long().to(run.device)
               for source in heldout]
    texts = []
    for directory in (run.teacher, folder):  # one after the other, whole: FSDP2 does not generate
        model, _ = load_with_tokenizer(directory, device=run.device)
        new = [generate(model, p, max_new_tokens=48)[0, p.shape[1]:].tolist() for p in prompts]
        texts.append([tokenizer.decode(ids) for ids in new])
    for source, prompt, *pair in zip(heldout, prompts, *texts):
        print(f"\n[{source.name}] ...{tokenizer.decode(prompt[0, -24:].tolist())!r}")
        columns = [sum((textwrap.wrap(line, 46) or [""] for line in text.split("\n")), [])
                   for text in pair]
        print(f"  {'teacher':<48}student")
        for i in range(max(map(len, columns))):
            left, right = (c[i] if i < len(c) else "" for c in columns)
            print(f"  {left:<48}{right}")


def align_parts(run, student, _teacher, mixture):
    """A step of `align` on one micro-batch, over and over; yields a part's name at its end."""
    trainable = select_trainable(student, "new")
    optimizer = make_optimizer(trainable)
    yield "set up"
    while True:
        tokens, ids, _ = collate(map(mixture.row, range(run.micro_batch)), run.device)
        yield "data"
        with autocast(run):
            for _ in teacher_layers(student, tokens, ids):
                pass
        yield "teacher forward"  # the next two are nested: they walk the layers once more
        with autocast(run):
            alignment_losses(student, tokens, ids)
        yield "student forward"
        with autocast(run):
            alignment_losses(student, tokens, ids, 1.0)
        yield "backward"
        clip_gradients(trainable, run.clip)
        optimizer.step()
        optimizer.zero_grad()
        yield "update"


def distil_parts(run, student, teacher, mixture):
    """A step of `distil` on one micro-batch, over and over; yields a part's name at its end."""
    student = copy.deepcopy(student).float()  # its own weights, as `train_student` loads them
    trainable = select_trainable(student, run.train)
    for p in student.parameters():
        if not p.requires_grad:
            p.data = p.data.to(teacher.lm_head_weight.dtype)
    for block in student.model["layers"]:
        block.recompute = run.recompute
    optimizer = make_optimizer(trainable)
    yield "set up"
    while True:
        tokens, ids, labels = collate(map(mixture.row, range(run.micro_batch)), run.device)
        yield "data"
        with torch.no_grad(), autocast(run):
            hidden = teacher.hidden(tokens, document_ids=ids)
        yield "teacher forward"
        with autocast(run):
            targets = teacher_topk(hidden, teacher.lm_head_weight, run.topk)
        yield "teacher's top k"
        with autocast(run):
            hidden = student.hidden(tokens, document_ids=ids)
        yield "student forward"
        with autocast(run):
            loss, _ = sparse_kd_loss(hidden, student.lm_head_weight, labels, *targets,
                                     gamma=run.gamma, beta=run.beta)
        yield "loss and its gradient"
        loss.backward()
        yield "backward"
        clip_gradients(trainable, run.clip)
        optimizer.step()
        optimizer.zero_grad()
        yield "update"


def time_stage(run, parts, nested=()):
    """Seconds by part of a whole step, from `align_parts` or `distil_parts`: medians of 5 rounds.

    Two more come first, to warm up. nested: parts that each do the one before them again.
    """
    laps, started = {}, time.perf_counter()
    for part in parts:
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        laps.setdefault(part, []).append(time.perf_counter() - started)
        if len(laps.get("update", ())) == 7:
            break
        started = time.perf_counter()
    del laps["set up"]
    seconds = {part: sorted(times[2:])[2] for part, times in laps.items()}
    for inner, outer in reversed(list(zip(nested, nested[1:]))):
        seconds[outer] -= seconds[inner]
    return {part: s * (1 if part == "update" else run.batch / run.micro_batch)
            for part, s in seconds.items()}


def report_speed(run, student, teacher, mixture):
    """`--speed`: tokens/s of both stages, each part's share of a step; also in speed.json."""
    if run.world > 1:
        raise ValueError("--speed times one process; start it without torchrun")
    run.micro_batch, on_gpu, found = min(run.micro_batch, run.batch), run.device.type == "cuda", {}
    for stage, steps, parts, nested in (
            ("align", run.align_steps, align_parts,
             ("teacher forward", "student forward", "backward")),
            ("distil", run.distil_steps, distil_parts, ())):
        if stage == "align" and why_no_align(run):
            continue
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(run.device)
        seconds = time_stage(run, parts(run, student, teacher, mixture), nested)
        step, tokens = sum(seconds.values()), run.batch * run.context
        peak = torch.cuda.max_memory_allocated(run.device) if on_gpu else None
        found[stage] = {"tokens_per_s": tokens / step, "step_s": step, "parts_s": seconds,
                        "peak_bytes": peak}
        print(f"\n{stage}: {tokens / step:,.0f} tokens/s. A step of {run.batch} x {run.context} "
              f"takes {step:.3g} s, {steps:,} steps {steps * step / 3600:.3g} hours"
              + (f"; peak memory {peak / 1e9:.1f} GB" if on_gpu else ""))
        for part, s in seconds.items():
            print(f"    {part:<22}{s / step:7.1%}{s:10.3g} s")
    write_json(run.out / "speed.json", {
        "device": str(run.device), "torch": torch.__version__, "threads": torch.get_num_threads(),
        "dtype": str(run.dtype)[6:], "teacher": str(run.teacher), "context": run.context,
        "batch": run.batch, "micro_batch": run.micro_batch, "recompute": run.recompute,
        "train": run.train, "stages": found})
    print(f"\nreport: {run.out / 'speed.json'}; nothing was trained")


# ----------------------------------------------------------------------------------------------
# 10. A student, or experts and their merger
# ----------------------------------------------------------------------------------------------


def open_model(run, directory, train=None):
    """A model as stage II uses it: what trains in fp32 (bf16 weights would lose an AdamW step of
    1e-5), the rest as `frozen_dtype`; sharded over torchrun's processes.
    """
    def dtype(name):
        return torch.float32 if train and TRAIN[train](name) else frozen_dtype(run)

    prepare = partial(shard, device=run.device, dtype=run.dtype) if dist.is_initialized() else None
    model = load_pretrained(directory, device=run.device, dtype=dtype, kernels=run.kernels,
                            prepare=prepare)
    return model.requires_grad_(False)


def train_student(run, seed, teacher, cache, mixture, heldout, stop):
    """Stage II: the student folder `seed` -> run.out/student, unless that exists; returns it."""
    final = run.out / "student"
    if not final.exists():
        student = open_model(run, seed, run.train)
        for block in student.model["layers"]:
            block.recompute = run.recompute
        distil(run, student, teacher, cache, mixture, heldout, stop)
        del student
    once(run, final, lambda: export_student(run, seed, final))
    return final


def export_student(run, seed, final):
    """`seed` with the weights of stage II's last checkpoint, in the seed's precision -> `final`.

    Tensor by tensor from the checkpoint's files: nobody has to hold the fp32 weights whole.
    """
    student = load_pretrained(seed)
    weights = StoredState(checkpoints(run, "distil")[-1], "weight")
    for name in weights.names():
        p = student.get_parameter(name)
        p.data = weights.rows(name).to(p.dtype)
    # merge.py refuses experts that do not share a seed.
    lineage = {"seed_sha256": sha256(*sorted(seed.glob("*.safetensors")))}
    save_pretrained(student, final, extra={"lineage.json": lineage})
    shutil.rmtree(run.checkpoints, ignore_errors=True)


def plan_students(run, sources, weights):
    """What stage II trains: {name: (settings, mixture)}.

    One student, "after stage II"; or with --experts (Eq. 14) an expert per --data file, which
    draws 70 % of its rows from its own file and the rest from the others, and a generalist, which
    draws from all alike and trains as long as all experts together.
    """
    plans = {"after stage II": (weights, run.distil_steps, run.out)}
    if run.experts:
        names = [source.name for source in sources]
        plans = {name: ([0.7 if n == name else 0.3 / (len(names) - 1) for n in names],
                        run.distil_steps, run.out / name) for name in names}
        plans["generalist"] = ([1] * len(names), run.distil_steps * len(names),
                               run.out / "generalist")
    students = {}
    for name, (shares, steps, out) in plans.items():
        own = argparse.Namespace(**vars(run) | {
            "out": out, "checkpoints": out / "checkpoints", "distil_steps": steps})
        # Another seed than stage I's, or both stages would begin with the same rows.
        mixture = Mixture(sources, shares, steps * run.batch, run.seed + 1,
                          reorder=not run.targets)  # stored targets are of one order
        students[name] = own, mixture
    return students


def finish(run, folders, results, tokenizer, heldout, started):
    """The table, continuations, --tasks, and where everything is."""
    report(results)
    final = list(folders.values())[-1]
    show_samples(run, final, tokenizer, heldout)
    if run.tasks:
        prove(run, folders if run.experts else {"student": final})
    print(f"\n{time.time() - started:.0f} s. The student is in {final}; "
          "model.load_pretrained opens it.\nNext: what the mLSTM adds, "
          f"`python distill.py --mixer swa --out {run.out}-swa`")


def prove(run, folders):
    """Score teacher and students on --tasks and print recovery, C_0 and alpha* (Eq. 15-17)."""
    out = run.out / "report"
    out.mkdir(exist_ok=True)
    scores = {name: evaluate.evaluate_rows(folder, run.tasks, device=run.device.type,
                                           samples=out / f"{name}.jsonl")
              for name, folder in {"teacher": run.teacher, **folders}.items()}
    found = evaluate.compare(scores.pop("teacher"), scores)
    write_json(out / "report.json", found)
    evaluate.show_report(found)
    evaluate.draw_curves(found, out / "win_and_tie.png")


# ----------------------------------------------------------------------------------------------
# 11. The command
# ----------------------------------------------------------------------------------------------

# The shipped teacher's preset: what differs from the paper's settings below when --teacher is not
# given. A window of 16 makes its context of 512 tokens long. Paper: loss .9 CE + .1 KL. Here: the
# reverse, because this teacher was trained on this very text: CE teaches the student things that
# the teacher does not do, and pulls it away (README, "How stage II weighs its losses").
SMALL = dict(
    teacher=HERE / "tests/teacher", out=Path("out"), context=512, window=16, batch=4,
    micro_batch=4, align_tokens=819_200, align_lr=3e-2, tokens=819_200, lr=3e-4, gamma=0.1,
    beta=0.9, warmup=20, eval_every=100, eval_rows=16, save_every=100, recompute=False,
    data=sorted(str(p) for p in (HERE / "tests/teacher/data").glob("*.jsonl")))
SMALL_EXPERTS = dict(
    out=Path("out-experts"), tokens=204_800,
    tasks=sorted(str(p) for p in (HERE / "tests/tasks").glob("*.jsonl")))


def parse_arguments(argv):
    """The command line -> settings; without --teacher the small preset comes before the paper's."""
    p = argparse.ArgumentParser(description="Distil a Transformer into a hybrid xLSTM student.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--teacher", type=Path, help="Hugging Face folder; none: the shipped teacher "
                   "with its own small preset of the settings below")
    p.add_argument("--data", nargs="+", metavar="FILE[=WEIGHT]", help=".txt or .jsonl")
    p.add_argument("--out", type=Path, help="folder of the run")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint of --out")
    p.add_argument("--plan", action="store_true", help="print the memory that a step needs, stop")
    p.add_argument("--speed", action="store_true", help="time both stages' parts and stop")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                   help="of matrix products; auto: bfloat16 on GPUs and on CPUs with AMX")
    p.add_argument("--kernels", choices=("auto", "torch", "triton"), default="auto",
                   help="what computes mLSTM and window; auto: Triton on a GPU")
    p.add_argument("--seed", type=int, default=0)

    g = p.add_argument_group("student")
    g.add_argument("--mixer", choices=MIXERS, default="hybrid")
    g.add_argument("--window", type=int, default=512, help="W, tokens")
    g.add_argument("--sinks", type=int, default=4, help="tokens")
    g.add_argument("--features", type=int, choices=(1, 2, 4, 8), default=4, help="width of the "
                   "mLSTM's keys as a multiple of the heads'; the paper's is 1")

    g = p.add_argument_group("both stages")
    g.add_argument("--context", type=int, default=4096, help="tokens a row")
    g.add_argument("--batch", type=int, default=64, help="rows a step")
    g.add_argument("--micro-batch", type=int, default=1, help="rows in a process's memory at once")
    g.add_argument("--warmup", type=int, default=100, help="steps of rising learning rate")
    g.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    g.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")

    g = p.add_argument_group("stage I (align)")
    g.add_argument("--align-tokens", type=float, default=655e6)
    g.add_argument("--align-lr", type=float, default=1e-2, help="peak; cosine to a thousandth")
    g.add_argument("--skip-align", action="store_true", help="ablation: no stage I")
    g.add_argument("--start", type=Path, metavar="DIR", help="no stage I: start stage II from this "
                   "student folder, such as another run's seed/")

    g = p.add_argument_group("stage II (distil)")
    g.add_argument("--tokens", type=float, default=5e9)
    g.add_argument("--lr", type=float, default=1e-5, help="constant after warm-up")
    g.add_argument("--train", choices=("new", "mixer", "all"), default="all",
                   help="new parameters; and attention projections; and everything")
    g.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=True,
                   help="keep only the blocks' inputs and run each block again in the backward")
    g.add_argument("--gamma", type=float, default=0.9, help="weight of next-token CE")
    g.add_argument("--beta", type=float, default=0.1, help="weight of KL to the teacher")
    g.add_argument("--topk", type=int, default=256, help="teacher tokens in the KL")
    g.add_argument("--targets", type=Path, metavar="DIR", help="the teacher's top k on disk: made "
                   "first where missing, then stage II runs without the teacher")
    g.add_argument("--targets-only", action="store_true", help="make --targets and stop")
    g.add_argument("--experts", action="store_true", help="an expert of --tokens per --data file, "
                   "a generalist of as many as all experts, and the merged experts (Eq. 14)")
    g.add_argument("--tasks", nargs="+", metavar="FILE", default=[],
                   help="task files on which the students are scored at the end (evaluate.py)")
    g.add_argument("--eval-every", type=int, default=500, help="steps between held-out checks")
    g.add_argument("--eval-rows", type=int, default=16, help="held-out rows a source")

    run, _ = p.parse_known_args(argv)
    if run.teacher is None:
        p.set_defaults(**SMALL | (SMALL_EXPERTS if run.experts else {}))
    return p.parse_args(argv)


def check_arguments(run):
    """Refuse what cannot work, before anything is read or written."""
    if (run.data is None or run.out is None) and not run.plan:
        raise ValueError("--teacher DIR also needs --data FILE... and --out DIR")
    for name in ("context", "batch", "micro_batch", "warmup", "save_every", "topk", "eval_every",
                 "eval_rows", "align_tokens", "tokens", "window"):
        if getattr(run, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    names = [parse_data(spec)[0].stem for spec in run.data or ()]
    taken = {"data", "seed", "checkpoints", "generalist", "merged", "report", "all"}
    if len(set(names)) < len(names) or taken & set(names):
        raise ValueError(f"--data: the files' names {names} name sources and folders of the run; "
                         f"they must differ and be none of {sorted(taken)}: rename a file")
    if run.targets_only and not run.targets:
        raise ValueError("--targets-only needs --targets DIR, where to make them")
    if run.experts and len(run.data) < 2:
        raise ValueError("--experts needs two --data files or more: an expert for each")
    for path in run.tasks:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--tasks {path}: there is no such file")
    if not (run.gamma >= 0 and run.beta >= 0 and run.gamma + run.beta > 0):
        raise ValueError("--gamma and --beta must not be negative, nor both 0")
    if run.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {run.device}: this torch sees no GPU; use --device cpu")


def settings_of(run):
    """What must not change between a run and its resumption, as JSON."""
    free = ("out", "checkpoints", "resume", "device", "save_every", "eval_every", "plan", "speed",
            "targets_only", "micro_batch", "recompute", "rank", "world",
            "kernels", "dtype")
    settings = {k: v for k, v in vars(run).items() if k not in free}
    settings["targets"] = bool(run.targets)
    settings["teacher"], settings["start"] = str(run.teacher.resolve()), str(run.start)
    settings["teacher_sha256"] = teacher_sha256(run.teacher)
    settings["data_sha256"] = [file_sha256(parse_data(spec)[0]) for spec in run.data]
    return settings


def open_run(run):
    """Refuse an --out of another run, or for --resume of other settings; return its results."""
    path, results = run.out / "run.json", run.out / "results.json"
    if not run.resume:
        if path.exists():
            raise ValueError(f"--out {run.out} holds a run already; add --resume to go on with it, "
                             "or name another folder")
        return {}
    if not path.exists():
        raise FileNotFoundError(f"--resume: {path} does not exist; is {run.out} a run's folder?")
    old, new = json.loads(path.read_text()), settings_of(run)
    changed = [f"{k} was {old.get(k)!r}, now {v!r}" for k, v in new.items() if old.get(k) != v]
    if changed:
        raise ValueError(f"--resume: {run.out} was made with other settings: " + "; ".join(changed))
    return json.loads(results.read_text()) if results.exists() else {}


def new_student(run, teacher):
    """The student before training, or for --start the one to go on from."""
    if run.start:
        student = open_model(run, run.start)
        if dataclasses.replace(student.config, hybrid=None) != teacher.config:
            raise ValueError(f"--start {run.start}: its config.json is not of a student of "
                             f"{run.teacher}")
    else:
        student = student_from_teacher(teacher, window=run.window, sinks=run.sinks,
                                       mixer=run.mixer, features=run.features,
                                       kernels=run.kernels)
    hybrid = student.config.hybrid
    if hybrid is None:
        raise ValueError(f"--start {run.start} is a teacher, not a student")
    print(f"student   mixer {hybrid.mixer}, window {hybrid.window}, {hybrid.sinks} sinks; on "
          f"{run.device} in {str(run.dtype)[6:]}, kernels: {student.kernels}")
    return student


def load_data(run, tokenizer, eos_ids):
    """--data -> `open_data`'s sources, weights and held-out sources, and say what they are."""
    if run.rank > 0:
        barrier()  # the first process tokenises, the others find it done
    eos_id = eos_ids[0] if eos_ids else None
    train, weights, heldout = open_data(run.data, tokenizer, eos_id, run.out / "data", run.context)
    if run.rank == 0:
        barrier()
    for source, weight in zip(train, weights):
        print(f"data      {source.name}: {source.total:,} tokens to train on, the longest document "
              f"{source.lengths.max():,}; {weight / sum(weights):.0%} of every batch")
    return train, weights, heldout


def main(argv=None):
    """One run from top to bottom: load, measure, align, distil, report."""
    run, started = parse_arguments(argv), time.time()
    check_arguments(run)
    torch.manual_seed(run.seed)
    start_processes(run)
    if run.plan:
        return show_plan(run)
    run.checkpoints = run.out / "checkpoints"
    run.align_steps = math.ceil(run.align_tokens / (run.batch * run.context))
    run.distil_steps = math.ceil(run.tokens / (run.batch * run.context))
    run.warmup = min(run.warmup, run.align_steps, run.distil_steps)
    results = open_run(run)
    teacher, tokenizer = load_with_tokenizer(run.teacher, device=run.device,
                                             dtype=frozen_dtype(run))
    teacher.requires_grad_(False)
    print(f"teacher   {run.teacher} ({teacher.config.family}, "
          f"{sum(p.numel() for p in teacher.parameters()):,} parameters)")
    student = new_student(run, teacher)
    sources, weights, heldout = load_data(run, tokenizer, teacher.config.eos_ids)
    if run.speed:
        return report_speed(run, student, teacher, Mixture(sources, weights, run.batch, run.seed))
    students, stop, cache = plan_students(run, sources, weights), StopRequested(), None
    if run.targets:
        mixtures = [mixture for _, mixture in students.values()]
        cache = prepare_targets(run, teacher, tokenizer, mixtures, stop, run.rank, run.world)
        barrier()
        if run.targets_only:
            return print(f"the targets are in {run.targets}")
    if not run.resume:
        show_plan(run)
    # Only now: a refused run leaves none.
    once(run, run.out / "run.json", lambda: write_json(run.out / "run.json", settings_of(run)))

    def measure(name, model):
        if name not in results:
            results[name] = compare(run, model, teacher or open_model(run, run.teacher), heldout)
            if run.rank == 0:
                write_json(run.out / "results.json", results)
        r = results[name]["all"]
        print(f"held-out, {name}: CE {r['ce']:.4f}  KL {r['kl']:.4f}  top-1 {r['top1']:.3f}")

    measure("teacher", teacher)
    seed, skipped = run.start or run.out / "seed", why_no_align(run)
    if skipped:
        print(f"stage I is skipped: {skipped}")
    if not run.start:
        measure("entry", student)
    if not seed.exists():
        if not skipped:
            total = run.align_steps * run.batch
            align(run, student, Mixture(sources, weights, total, run.seed), stop)
        once(run, seed, lambda: save_pretrained(student, seed))
    if not skipped or run.start:
        measure("after stage I", open_model(run, seed))

    # Stage I needed the teacher whole. Stage II shards it, or does without.
    student, folders = None, {}
    teacher = None if cache else open_model(run, run.teacher) if dist.is_initialized() else teacher
    for name, (own, mixture) in students.items():
        if run.experts:
            print(f"\n===== {name} =====")
            once(run, own.out, own.out.mkdir)
        folders[name] = train_student(own, seed, teacher, cache, mixture, heldout, stop)
        measure(name, open_model(run, folders[name]))
    if run.experts:
        experts, folders["merged"] = list(folders.values())[:-1], run.out / "merged"
        once(run, folders["merged"], lambda: merge(experts, folders["merged"]))
        measure("merged", open_model(run, folders["merged"]))
    teacher = None
    if run.rank == 0:
        finish(run, folders, results, tokenizer, heldout, started)


if __name__ == "__main__":
    try:
        main()
    except Stopped as where:
        print(f"stopped after {where}; go on with the same command and --resume")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        leave(2)
    leave(0)
