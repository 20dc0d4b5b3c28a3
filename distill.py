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
(Eq. 14). One process, one device. Not here: the mathematics (model.py), merging (merge.py),
scoring (evaluate.py).

Run:
    python distill.py                                             # shipped teacher, minutes on CPU
    python distill.py --teacher DIR --data a.jsonl b.txt --out RUN        # your own
    python distill.py --teacher DIR --data a.jsonl=2 b.txt=1 --out RUN    # two thirds from a.jsonl
    python distill.py --teacher DIR --data a.jsonl --out RUN --resume     # go on after a stop
    python distill.py --mixer swa --out RUN                      # an ablation: window, sinks only
    python distill.py --experts                                  # branch, merge, score

Contents: 1 data · 2 losses · 3 held-out comparison · 4 optimiser and checkpoints · 5 stage I ·
6 stage II · 7 report · 8 experts · 9 command
"""

import argparse
import contextlib
import dataclasses
import functools
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
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import evaluate
from merge import merge
from model import (MIXERS, Attention, Tokenizer, generate, is_new, load_pretrained,
                   load_with_tokenizer, read_json, reverse_complement, save_pretrained, sha256,
                   student_from_teacher)

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
    molecules), or `dna` (a text whose reverse complement is another document). .txt: one long text, cut at line ends into about fifty
    documents or more (kind "piece") so that some can be held out. Ranges that meet hold every
    document once. Raises ValueError naming file and line.
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


@functools.cache
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

    def rows(self, start, stop):
        return [self.row(i) for i in range(start, stop)]


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


def _chunks(tokens, vocab_size):
    """Slices of tokens so small that (slice, vocab_size) in fp32 stays below 256 MB."""
    size = max(1, (1 << 26) // vocab_size)
    return [slice(i, min(i + size, tokens)) for i in range(0, tokens, size)]


@torch.no_grad()
def teacher_topk(hidden, lm_head_weight, k):
    """The teacher's k most likely tokens: hidden (N, hidden) -> ids (N, k), log-probs (N, k) fp32.

    Log-probabilities are over the full vocabulary, so the mass outside the top k stays known.
    """
    ids, logprobs = [], []
    for rows in _chunks(len(hidden), len(lm_head_weight)):
        logits = F.linear(hidden[rows], lm_head_weight).float()
        top = logits.topk(k, dim=-1)
        ids.append(top.indices)
        logprobs.append(top.values - logits.logsumexp(-1, keepdim=True))
    return torch.cat(ids), torch.cat(logprobs)


def sparse_kd_loss(hidden, lm_head_weight, labels, topk_ids, topk_logprobs, *, gamma=0.9, beta=0.1):
    """loss = gamma * CE(labels) + beta * KL(teacher || student), means over valid tokens (Eq. 13).

    hidden (..., hidden), lm_head_weight (V, hidden), labels (...) int64 with -100 = not valid,
    topk_ids and topk_logprobs (..., k): the teacher's top tokens and their log-probabilities.
    Returns (loss, {"ce", "kl"}) in fp32, in nats per token.

    Paper: KL over "the distribution over the top-k tokens". Here: both distributions are
    renormalised over those k tokens, because cutting them off without is biased (2503.16870).
    With k = V it is the full KL. Logits exist for one chunk of tokens at a time, and gradients
    are formed with them: neither pass holds a (tokens, V) matrix.
    """
    loss, ce, kl = _SparseKD.apply(
        hidden.flatten(0, -2), lm_head_weight, labels.flatten(), topk_ids.flatten(0, -2),
        topk_logprobs.flatten(0, -2), gamma, beta)
    return loss, {"ce": ce.detach(), "kl": kl.detach()}


class _SparseKD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, ids, logprobs, gamma, beta):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        wide = torch.promote_types(dtype, torch.float32)
        x, w = hidden.to(dtype), weight.to(dtype)
        need_x, need_w = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(hidden) if need_x else None
        grad_w = torch.zeros_like(weight, dtype=wide) if need_w else None
        valid = labels != -100
        count = valid.sum().clamp_min(1)
        ce = kl = torch.zeros((), dtype=wide, device=hidden.device)
        with torch.autocast(kind, enabled=False):
            for rows in _chunks(len(x), len(w)):
                z = (x[rows] @ w.T).to(wide)  # (C, V)
                ok = valid[rows, None].to(wide) / count
                label, id_k = labels[rows, None].clamp_min(0), ids[rows].long()
                lse = z.logsumexp(-1, keepdim=True)
                ce = ce + ((lse - z.gather(1, label)) * ok).sum()
                log_p = logprobs[rows].to(wide).log_softmax(-1)  # teacher over its top k
                log_q = z.gather(1, id_k).log_softmax(-1)  # student over the same k
                kl = kl + (log_p.exp() * (log_p - log_q) * ok).sum()
                if not (need_x or need_w):
                    continue
                # d CE / dz = softmax(z) - onehot(label);  d KL / dz_k = q_k - p_k
                g = z.sub_(lse).exp_().mul_(gamma * ok)
                g.scatter_add_(1, label, -gamma * ok)
                g.scatter_add_(1, id_k, beta * ok * (log_q.exp() - log_p.exp()))
                g = g.to(dtype)
                if need_x:
                    grad_x[rows] = (g @ w).to(grad_x.dtype)
                if need_w:
                    grad_w += g.T @ x[rows]
        ctx.save_for_backward(grad_x, grad_w)
        return gamma * ce + beta * kl, ce, kl

    @staticmethod
    def backward(ctx, grad, _ce, _kl):
        return *(None if g is None else g * grad for g in ctx.saved_tensors), *(None,) * 5


def alignment_losses(student, tokens, document_ids, backward_scale=None, *, positions=None):
    """Stage I (Eq. 12): per layer, the mean over tokens, heads and width of ||h_T - h_S||^2.

    Walks the layers once. Each gets the TEACHER's layer input; its softmax output is the target,
    its hybrid output the prediction, and the teacher's output goes on to the next layer. So
    student and teacher share one copy of all frozen weights, layers do not depend on each other,
    and memory is that of one layer: with `backward_scale` each layer's graph is used at once
    (gradients of scale * loss are added) and freed. positions: as in `Transformer.forward`.
    Returns (layers,) fp32, detached.
    """
    if positions is None:
        positions = student.positions(tokens, document_ids=document_ids)
    losses = []
    with torch.no_grad():
        x = student.model["embed_tokens"](tokens)
        for block, tables in zip(student.model["layers"], student.rope_tables(positions)):
            attention, a = block.self_attn, block.attention_input(x)
            raw = attention.project(a)
            qkv = attention.split(*raw, tables)
            target = Attention.mix(attention, a, raw, *qkv, document_ids=document_ids)
            with torch.set_grad_enabled(backward_scale is not None):
                h = attention.mix(a, raw, *qkv, document_ids=document_ids)
                loss = (h.float() - target.float()).square().mean()
                if backward_scale is not None:
                    (loss * backward_scale).backward()
            losses.append(loss.detach())
            x = block.after_attention(x, attention.o_proj(target.transpose(1, 2).flatten(2)))
    return torch.stack(losses)


# ----------------------------------------------------------------------------------------------
# 2b. Teacher targets on disk: the teacher runs once; stage II then needs it no more
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

    def rows(self, where):
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
        return torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(logprobs))

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
                    hidden = teacher.hidden(tokens, document_ids=document_ids).flatten(0, 1)
                    ids, logprobs = teacher_topk(hidden, teacher.lm_head_weight, shape[-1])
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
                cache.write(*x, teacher, run.micro_batch, run.device, after)
            except OSError as error:
                raise OSError(f"--targets {cache.shard(*x)[0]}: {error}. The files before it are "
                              "whole, and the same command goes on behind them") from None
    return cache


# ----------------------------------------------------------------------------------------------
# 3. Held-out comparison of student and teacher
# ----------------------------------------------------------------------------------------------


def autocast(device):
    """bf16 matrix products on a GPU; fp32 on a CPU, where bf16 is slower on most machines."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def compare(student, teacher, sources, rows, batch_size, device):
    """Held-out CE of the student, KL(teacher || student) over the full vocabulary, agreement.

    On the first `rows` rows of every source. Returns {source: {"ce", "kl" (nats per token),
    "top1" (share of tokens where both rank the same token first)}, ..., "all": their mean}. With
    student=teacher: the teacher's own CE, and KL 0.
    """
    results = {}
    for source in sources:
        sums, count = torch.zeros(3, dtype=torch.float64), 0
        n = min(rows, source.num_rows)
        for a in range(0, n, batch_size):
            batch = [source.row(i) for i in range(a, min(a + batch_size, n))]
            tokens, ids, labels = collate(batch, device)
            valid = labels.flatten() != -100
            labels = labels.flatten()[valid]
            with autocast(device):
                hidden_t = teacher.hidden(tokens, document_ids=ids).flatten(0, 1)[valid]
                hidden_s = hidden_t if student is teacher else (
                    student.hidden(tokens, document_ids=ids).flatten(0, 1)[valid])
            for part in _chunks(len(labels), teacher.config.vocab_size):
                p = F.linear(hidden_t[part], teacher.lm_head_weight).float().log_softmax(-1)
                q = p if student is teacher else (
                    F.linear(hidden_s[part], student.lm_head_weight).float().log_softmax(-1))
                sums += torch.stack([-q.gather(1, labels[part, None]).sum(),
                                     (p.exp() * (p - q)).sum(),
                                     (p.argmax(-1) == q.argmax(-1)).sum()]).double().cpu()
            count += len(labels)
        results[source.name] = dict(zip(("ce", "kl", "top1"), (sums / max(count, 1)).tolist()))
    results["all"] = {key: sum(r[key] for r in results.values()) / len(results)
                      for key in ("ce", "kl", "top1")}
    return results


# ----------------------------------------------------------------------------------------------
# 4. Optimiser, schedule, checkpoints
# ----------------------------------------------------------------------------------------------


def learning_rate(step, steps, warmup, peak, final):
    """Linear warm-up to `peak`, then a cosine to `final` (final = peak: constant). step from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def select_trainable(student, which):
    """Set requires_grad: "new" (gates and feature maps), "mixer" (+ q, k, v, o) or "all".

    Returns the trainable parameters by name. Raises ValueError when there are none.
    """
    chosen = {"new": is_new, "mixer": lambda name: ".self_attn." in name, "all": lambda name: True}
    for name, p in student.named_parameters():
        p.requires_grad_(chosen[which](name))
    trainable = {name: p for name, p in student.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(f"--train {which}: the mixer {student.config.hybrid.mixer!r} has no such "
                         "parameters; use --train mixer or all")
    return trainable


def make_optimizer(trainable):
    """AdamW with weight decay 0.1 on matrices (Paper: 0.1), none on norms and biases.

    Paper: betas not stated. Here: (0.9, 0.95), as its runs are short for the default 0.999.
    """
    matrices = [p for p in trainable.values() if p.dim() > 1]
    vectors = [p for p in trainable.values() if p.dim() <= 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                              {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95))


def save_checkpoint(folder, stage, step, trainable, optimizer):
    """Write trained weights and optimiser state after `step` steps of `stage`; keep the last two.

    The folder is complete or absent: it is written as *.tmp, synced and renamed. Frozen weights
    are not in it: they come from the teacher (stage I) or seed/ (stage II).
    """
    tensors = {}
    for name, p in trainable.items():
        tensors[f"weight.{name}"] = p.detach().cpu().contiguous()
        for key, value in optimizer.state[p].items():  # step, exp_avg, exp_avg_sq
            tensors[f"{key}.{name}"] = value.cpu().contiguous()
    path = folder / f"{stage}-{step:08d}"
    tmp = path.with_name(path.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    save_file(tensors, tmp / "train.safetensors", metadata={"stage": stage, "step": str(step)})
    with open(tmp / "train.safetensors", "rb") as f:
        os.fsync(f.fileno())
    shutil.rmtree(path, ignore_errors=True)
    os.replace(tmp, path)
    for old in sorted(folder.glob(f"{stage}-????????"))[:-2]:
        shutil.rmtree(old)


def load_checkpoint(folder, stage, trainable, optimizer):
    """Restore the newest whole checkpoint of `stage`; return its step, 0 if there is none.

    A torn one is named and passed over.
    """
    for path in sorted(folder.glob(f"{stage}-????????"), reverse=True):
        try:
            with safe_open(path / "train.safetensors", framework="pt") as f:
                for name, p in trainable.items():
                    p.data.copy_(f.get_tensor(f"weight.{name}"))
                    optimizer.state[p] = {
                        key: f.get_tensor(f"{key}.{name}").to("cpu" if key == "step" else p.device)
                        for key in ("step", "exp_avg", "exp_avg_sq")}
        except (SafetensorError, OSError) as error:
            print(f"checkpoint {path} cannot be read ({error}); trying the one before")
            continue
        print(f"resuming {stage} from {path}")
        return int(path.name.rpartition("-")[2])
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
# 5. Stage I: align
# ----------------------------------------------------------------------------------------------


def align(run, student, mixture, stop):
    """Train the new parameters on `alignment_losses` for run.align_steps steps, in place."""
    trainable = select_trainable(student, "new")
    describe(run, "stage I (align)", student, trainable, run.align_steps)
    optimizer = make_optimizer(trainable)
    first = load_checkpoint(run.checkpoints, "align", trainable, optimizer)
    with progress_bar("align", first, run.align_steps, run) as bar:
        for step in range(first, run.align_steps):
            # ----- one step -----
            lr = learning_rate(step, run.align_steps, run.warmup, run.align_lr, run.align_lr * 1e-3)
            for group in optimizer.param_groups:
                group["lr"] = lr
            rows = mixture.rows(step * run.batch, (step + 1) * run.batch)
            losses = 0.0
            for a in range(0, run.batch, run.micro_batch):
                part = rows[a:a + run.micro_batch]
                tokens, ids, _ = collate(part, run.device)
                with autocast(run.device):
                    scale = len(part) / run.batch
                    losses = losses + scale * alignment_losses(student, tokens, ids, scale)
            norm = nn.utils.clip_grad_norm_(trainable.values(), run.clip)
            check_finite(run, "align", step, losses.sum(), norm)
            optimizer.step()
            optimizer.zero_grad()
            # --------------------
            log(run, bar, "align", step, lr=lr, loss=losses.sum(), norm=norm)
            done = step + 1
            if done < run.align_steps and (done % run.save_every == 0 or stop):
                save_checkpoint(run.checkpoints, "align", done, trainable, optimizer)
                if stop:
                    raise Stopped(f"stage I, step {done}")
    tqdm.write("loss per layer: " + " ".join(f"{x:.2e}" for x in losses.tolist()))


# ----------------------------------------------------------------------------------------------
# 6. Stage II: distil
# ----------------------------------------------------------------------------------------------


def distil(run, student, teacher, mixture, heldout, stop):
    """Train run.train's parameters on `sparse_kd_loss` for run.distil_steps steps, in place."""
    trainable = select_trainable(student, run.train)
    for p in student.parameters():  # frozen weights need no fp32 copy
        if not p.requires_grad:
            p.data = p.data.to(teacher.lm_head_weight.dtype)
    describe(run, "stage II (distil)", student, trainable, run.distil_steps)
    optimizer = make_optimizer(trainable)
    first = load_checkpoint(run.checkpoints, "distil", trainable, optimizer)
    k = min(run.topk, teacher.config.vocab_size)
    with progress_bar("distil", first, run.distil_steps, run) as bar:
        for step in range(first, run.distil_steps):
            # ----- one step -----
            lr = learning_rate(step, run.distil_steps, run.warmup, run.lr, run.lr)  # constant
            for group in optimizer.param_groups:
                group["lr"] = lr
            rows = mixture.rows(step * run.batch, (step + 1) * run.batch)
            batch = collate(rows, run.device)
            valid = (batch[2] != -100).sum().clamp_min(1)  # of the batch: micro-batches differ
            metrics = {"ce": 0.0, "kl": 0.0}
            for tokens, ids, labels in zip(*(x.split(run.micro_batch) for x in batch)):
                with torch.no_grad():
                    hidden = teacher.hidden(tokens, document_ids=ids).flatten(0, 1)
                    targets = teacher_topk(hidden, teacher.lm_head_weight, k)
                with autocast(run.device):
                    hidden = student.hidden(tokens, document_ids=ids).flatten(0, 1)
                    loss, parts = sparse_kd_loss(hidden, student.lm_head_weight, labels.flatten(),
                                                 *targets, gamma=run.gamma, beta=run.beta)
                share = (labels != -100).sum() / valid
                (loss * share).backward()
                metrics = {key: metrics[key] + share * parts[key] for key in metrics}
            norm = nn.utils.clip_grad_norm_(trainable.values(), run.clip)
            check_finite(run, "distil", step, metrics["ce"] + metrics["kl"], norm)
            optimizer.step()
            optimizer.zero_grad()
            # --------------------
            log(run, bar, "distil", step, lr=lr, norm=norm, **metrics)
            done = step + 1
            if done < run.distil_steps and (done % run.save_every == 0 or stop):
                save_checkpoint(run.checkpoints, "distil", done, trainable, optimizer)
                if stop:
                    raise Stopped(f"stage II, step {done}")
            if done < run.distil_steps and done % run.eval_every == 0:
                r = compare(student, teacher, heldout, run.eval_rows, run.micro_batch, run.device)
                tqdm.write(f"held-out after {done} steps: CE {r['all']['ce']:.4f}  "
                           f"KL {r['all']['kl']:.4f}  top-1 {r['all']['top1']:.3f}")


# ----------------------------------------------------------------------------------------------
# 7. What the user sees: plan, progress, report
# ----------------------------------------------------------------------------------------------


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
                unit_scale=True, dynamic_ncols=True)


def log(run, bar, stage, step, **metrics):
    """Progress bar each step; log.jsonl too (a line a step: stage, step, metrics)."""
    metrics = {key: float(value) for key, value in metrics.items()}
    bar.update(run.batch * run.context)
    bar.set_postfix({key: f"{value:.3g}" for key, value in metrics.items()})
    with open(run.out / "log.jsonl", "a") as f:
        f.write(json.dumps({"stage": stage, "step": step + 1, **metrics}) + "\n")


def check_finite(run, stage, step, *values):
    """Before the update: weights and the last checkpoint stay good when a loss is not finite."""
    if not all(math.isfinite(float(v)) for v in values):
        raise ValueError(f"{stage} step {step + 1}: loss or gradient is not finite; no update was "
                         f"made. The last good state is in {run.checkpoints}; lower the learning "
                         f"rate in a new --out, or look at rows {step * run.batch} to "
                         f"{(step + 1) * run.batch - 1} of the data's order")


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


def show_samples(run, student, teacher, tokenizer, heldout):
    """One greedy continuation per source, teacher's and student's, side by side."""
    for source in heldout:
        prompt = torch.from_numpy(source.row(0)[0][None, :run.context // 2]).long().to(run.device)
        texts = []
        for model in (teacher, student):
            new = generate(model, prompt, max_new_tokens=48)[0, prompt.shape[1]:]
            texts.append(tokenizer.decode(new.tolist()))
        tail = tokenizer.decode(prompt[0, -24:].tolist())
        print(f"\n[{source.name}] ...{tail!r}")
        columns = [sum((textwrap.wrap(line, 46) or [""] for line in text.split("\n")), [])
                   for text in texts]
        print(f"  {'teacher':<48}student")
        for i in range(max(map(len, columns))):
            left, right = (c[i] if i < len(c) else "" for c in columns)
            print(f"  {left:<48}{right}")


# ----------------------------------------------------------------------------------------------
# 8. A student, or experts and their merger
# ----------------------------------------------------------------------------------------------


def write_json(path, value):
    """Replace a small file in one step."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(tmp, path)


def train_student(run, seed, final, teacher, mixture, heldout, stop):
    """Stage II: the student folder `seed` -> the student folder `final`, unless that exists."""
    if not final.exists():
        # A copy of its own in fp32: bf16 weights would lose an AdamW step of 1e-5.
        student = load_pretrained(seed, device=run.device, dtype=torch.float32)
        distil(run, student, teacher, mixture, heldout, stop)
        for name, p in student.named_parameters():  # store the copied weights as they came
            p.data = p.data if is_new(name) else p.data.to(teacher.lm_head_weight.dtype)
        save_pretrained(student, final)
        # merge.py refuses experts that do not share a seed.
        weights = sorted(seed.glob("*.safetensors"))
        write_json(final / "lineage.json", {"seed_sha256": sha256(*weights)})
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    return load_pretrained(final, device=run.device, dtype=torch.float32)


def train_experts(run, seed, teacher, sources, heldout, stop, measure):
    """Branch and merge (Eq. 14): an expert per --data file, a generalist, and the experts' mean.

    An expert draws 70 % of its rows from its own file and the rest from the others; the
    generalist draws from all alike and trains as long as all experts together. Returns the
    students' folders by name.
    """
    names, folders = [source.name for source in sources], {}
    plans = {name: ([0.7 if n == name else 0.3 / (len(names) - 1) for n in names],
                    run.distil_steps) for name in names}
    plans["generalist"] = [1] * len(names), run.distil_steps * len(names)
    for name, (weights, steps) in plans.items():
        print(f"\n===== {name} =====")
        part = argparse.Namespace(**{**vars(run), "out": run.out / name, "distil_steps": steps})
        part.checkpoints, folders[name] = part.out / "checkpoints", part.out / "student"
        part.out.mkdir(exist_ok=True)
        mixture = Mixture(sources, weights, steps * run.batch, run.seed + 1)
        measure(name, train_student(part, seed, folders[name], teacher, mixture, heldout, stop))
    folders["merged"] = run.out / "merged"
    if not folders["merged"].exists():
        merge([folders[name] for name in names], folders["merged"])
    measure("merged", load_pretrained(folders["merged"], device=run.device, dtype=torch.float32))
    return folders


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
# 9. The command
# ----------------------------------------------------------------------------------------------

# The shipped teacher's preset: what differs from the paper's settings below when --teacher is not
# given. A window of 16 makes its context of 512 tokens long. Paper: loss .9 CE + .1 KL. Here: the
# reverse, because this teacher was trained on this very text: CE teaches the student things that
# the teacher does not do, and pulls it away (README, "How stage II weighs its losses").
SMALL = dict(
    teacher=HERE / "tests/teacher", out=Path("out"), context=512, window=16, batch=4,
    micro_batch=4, align_tokens=819_200, align_lr=3e-2, tokens=819_200, lr=3e-4, gamma=0.1,
    beta=0.9, warmup=20, eval_every=100, eval_rows=16, save_every=100,
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
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--seed", type=int, default=0)

    g = p.add_argument_group("student")
    g.add_argument("--mixer", choices=MIXERS, default="hybrid")
    g.add_argument("--window", type=int, default=512, help="W, tokens")
    g.add_argument("--sinks", type=int, default=4, help="S, tokens")

    g = p.add_argument_group("both stages")
    g.add_argument("--context", type=int, default=4096, help="tokens a row")
    g.add_argument("--batch", type=int, default=64, help="rows a step")
    g.add_argument("--micro-batch", type=int, default=1, help="rows in memory at once")
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
    g.add_argument("--gamma", type=float, default=0.9, help="weight of next-token CE")
    g.add_argument("--beta", type=float, default=0.1, help="weight of KL to the teacher")
    g.add_argument("--topk", type=int, default=256, help="teacher tokens in the KL")
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
    if run.data is None or run.out is None:
        raise ValueError("--teacher DIR also needs --data FILE... and --out DIR")
    for name in ("context", "batch", "micro_batch", "warmup", "save_every", "topk", "eval_every",
                 "eval_rows", "align_tokens", "tokens", "window"):
        if getattr(run, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    names = [parse_data(spec)[0].stem for spec in run.data]
    taken = {"data", "seed", "checkpoints", "generalist", "merged", "report", "all"}
    if len(set(names)) < len(names) or taken & set(names):
        raise ValueError(f"--data: the files' names {names} name sources and folders of the run; "
                         f"they must differ and be none of {sorted(taken)}: rename a file")
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
    free = ("out", "checkpoints", "resume", "device", "save_every", "eval_every")
    settings = {k: v for k, v in vars(run).items() if k not in free}
    settings["teacher"], settings["start"] = str(run.teacher.resolve()), str(run.start)
    settings["teacher_sha256"] = sha256(*sorted(run.teacher.glob("*.safetensors")),
                                        run.teacher / "config.json")
    settings["data_sha256"] = [sha256(parse_data(spec)[0]) for spec in run.data]
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
        student = load_pretrained(run.start, device=run.device, dtype=torch.float32)
        if dataclasses.replace(student.config, hybrid=None) != teacher.config:
            raise ValueError(f"--start {run.start}: its config.json is not of a student of "
                             f"{run.teacher}")
    else:
        student = student_from_teacher(teacher, window=run.window, sinks=run.sinks,
                                       mixer=run.mixer)
    hybrid = student.config.hybrid
    if hybrid is None:
        raise ValueError(f"--start {run.start} is a teacher, not a student")
    print(f"student   mixer {hybrid.mixer}, window {hybrid.window}, {hybrid.sinks} sinks; on "
          f"{run.device}")
    return student


def load_data(run, tokenizer, eos_ids):
    """--data -> `open_data`'s sources, weights and held-out sources, and say what they are."""
    eos_id = eos_ids[0] if eos_ids else None
    train, weights, heldout = open_data(run.data, tokenizer, eos_id, run.out / "data", run.context)
    for source, weight in zip(train, weights):
        print(f"data      {source.name}: {source.total:,} tokens to train on, the longest document "
              f"{source.lengths.max():,}; {weight / sum(weights):.0%} of every batch")
    return train, weights, heldout


def main(argv=None):
    """One run from top to bottom: load, measure, align, distil, report."""
    run, started = parse_arguments(argv), time.time()
    check_arguments(run)
    torch.manual_seed(run.seed)
    run.device, run.checkpoints = torch.device(run.device), run.out / "checkpoints"
    run.align_steps = math.ceil(run.align_tokens / (run.batch * run.context))
    run.distil_steps = math.ceil(run.tokens / (run.batch * run.context))
    run.warmup = min(run.warmup, run.align_steps, run.distil_steps)
    results = open_run(run)
    teacher, tokenizer = load_with_tokenizer(run.teacher, device=run.device)
    teacher.requires_grad_(False)
    print(f"teacher   {run.teacher} ({teacher.config.family}, "
          f"{sum(p.numel() for p in teacher.parameters()):,} parameters)")
    student = new_student(run, teacher)
    sources, weights, heldout = load_data(run, tokenizer, teacher.config.eos_ids)
    if not run.resume:
        write_json(run.out / "run.json", settings_of(run))  # only now: a refused run leaves none

    def measure(name, model):
        if name not in results:
            results[name] = compare(model, teacher, heldout, run.eval_rows, run.micro_batch,
                                    run.device)
            write_json(run.out / "results.json", results)
        r = results[name]["all"]
        print(f"held-out, {name}: CE {r['ce']:.4f}  KL {r['kl']:.4f}  top-1 {r['top1']:.3f}")

    measure("teacher", teacher)
    stop, seed = StopRequested(), run.start or run.out / "seed"
    skipped = f"the run starts from {run.start}" if run.start else (
        "--skip-align" if run.skip_align else
        "the mixer has no new parameters" if run.mixer == "swa" else None)
    if skipped:
        print(f"stage I is skipped: {skipped}")
    if not run.start:
        measure("entry", student)
    if not seed.exists():
        if not skipped:
            total = run.align_steps * run.batch
            align(run, student, Mixture(sources, weights, total, run.seed), stop)
        save_pretrained(student, seed)
    if not skipped or run.start:
        measure("after stage I", student)
    if run.experts:
        folders = train_experts(run, seed, teacher, sources, heldout, stop, measure)
        student = load_pretrained(folders["merged"], device=run.device, dtype=torch.float32)
    else:
        # Another seed than stage I's, or both stages would begin with the same rows.
        mixture = Mixture(sources, weights, run.distil_steps * run.batch, run.seed + 1)
        folders = {"student": run.out / "student"}
        student = train_student(run, seed, folders["student"], teacher, mixture, heldout, stop)
        measure("after stage II", student)

    report(results)
    show_samples(run, student, teacher, tokenizer, heldout)
    if run.tasks:
        prove(run, folders)
    print(f"\n{time.time() - started:.0f} s. The student is in {list(folders.values())[-1]}; "
          "model.load_pretrained opens it.\nNext: what the mLSTM adds, "
          f"`python distill.py --mixer swa --out {run.out}-swa`")


if __name__ == "__main__":
    try:
        main()
    except Stopped as where:
        print(f"stopped after {where}; go on with the same command and --resume")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
