"""Distil a pretrained Transformer into a hybrid xLSTM student, in two stages.

    stage I    align: every layer's new mixer learns to reproduce the output of the softmax
               attention it replaces. Only the new parameters train (Eq. 12).
    stage II   distil: the whole student learns next tokens and the teacher's distribution over
               its top-k tokens (Eq. 13).

Settings default to the paper's (arXiv 2603.15590: 8B teachers, context 4096), but for wider
--features; without --teacher a small preset runs on the teacher that ships in tests/teacher. The
run writes into --out:

    data/        the texts as token ids, made once
    seed/        the student after stage I (a folder that model.load_pretrained opens)
    student/     the student after stage II
    checkpoints/ the last two, for --resume
    run.json, results.json, log.jsonl     settings, the final table, the losses

With --experts, stage II runs from the same seed once per --data file (RUN/NAME/student) and once on
all files for as long as all experts together (RUN/generalist/student, to compare with); the experts
are merged (RUN/merged, Eq. 14). --tasks writes RUN/report. Under torchrun the batch is dealt out
and stage II sharded (FSDP2). Not here: the mathematics (model.py), merging (merge.py), scoring
(evaluate.py).

Run:
    python distill.py                                             # shipped teacher, minutes on CPU
    python distill.py --teacher DIR --data a.jsonl=2 b.txt=1 --out RUN     # two thirds from a.jsonl
    python distill.py --teacher DIR --data a.jsonl=2 b.txt=1 --out RUN --resume      # after a stop
    torchrun --nproc-per-node 8 distill.py --teacher DIR --data a.jsonl --out RUN
    python distill.py --teacher DIR --train mixer --plan          # the memory it would take
    python distill.py --mixer swa --out RUN                       # an ablation: windows alone
    python distill.py --experts                                   # branch, merge, score

Contents: 1 data · 2 losses · 3 processes · 4 targets on disk · 5 held-out comparison · 6 optimiser
and checkpoints · 7 the two stages · 8 memory and time, before and during a run · 9 students and
experts · 10 the command. To learn the method read 2 and 7; a new loss of the same two terms is a
change in 2 alone.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import math
import mmap
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import weakref
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

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
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import evaluate
from merge import merge
from model import (MIXERS, Attention, ModelConfig, Place, Tokenizer, Transformer, append_json,
                   check_device, drop_torn_line, generate, is_new, list_tensors,
                   load_pretrained, load_with_tokenizer, local_rows, model_sha256, naming,
                   new_folder, number, read_json, read_rows, replacing, reverse_complement,
                   run_command, save_pretrained, save_tensors, sha256, student_config,
                   student_from_teacher, tokenizer_files, write_json)

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------------
# 1. Data: files -> token ids on disk, once -> packed rows that keep their document boundaries
# ----------------------------------------------------------------------------------------------
# A row is `context` tokens of documents end to end, the last one cut. Where each ends is carried
# along as a document id a token, never guessed from an end-of-text token: attention, recurrent
# state and positions restart there, and no label crosses. Without that a recurrent student learns
# to read the leftovers of another text in its state. Order is a function of (seed, step), so that a
# run resumes from one integer, without a loader's state.
#
#     file --read_rows / read_text--> rows --parse_row--> documents as ids --> part files
#     part files --end to end--> FILES, the same for any number of processes
#     FILES --Source--> rows of one file --Mixture--> rows by weight --collate--> tensors
#
# Token ids lie flat in a file and are mapped into memory, so that a corpus costs 64 bytes of memory
# a document, and none a token.

DATA_FORMAT = 7  # part of the cache key: raise it when the files below change their meaning
DOCUMENT = np.dtype([
    ("length", "<i8"),  # tokens
    ("labels", "<i8"),  # how many of them may be a label: those in the loss, never the first
    ("skipped", "<i8"),  # assistant's turns that are read and not learnt
    ("hash", "<i8"),  # of the content: decides whether the document is held out
    ("head", "<i8"),  # of a family (a row of "sequences"): where its first member starts
    ("separator", "<i8")])  # of a family: the id behind each member; else -1
FILES = {"tokens.bin": np.uint32,  # the tokens' ids, document after document
         "loss.bin": bool,  # for each token: is it in the loss
         "documents.bin": DOCUMENT,
         "dropped.bin": bool}  # one for each row that holds no document: nothing to predict
PART = 1 << 25  # bytes of a file that a process tokenises at a time, and that a stop can lose


def text_start(file, offset):
    """Where in an open .txt, behind `offset`, a piece may begin; at 0: where the file does.

    A function of the file and the offset alone, so that processes which share a file agree on its
    pieces without talking. Behind a line end; there may be none for gigabytes: if none is within
    64 KB, between two characters.
    """
    file.seek(offset)
    if offset:
        file.readline(1 << 16)
        while file.peek(1)[:1] and file.peek(1)[0] & 0xC0 == 0x80:  # amid a character
            file.seek(1, os.SEEK_CUR)
    return file.tell()


def read_text(path, start=0, stop=None):
    """Yield (place, piece) of a .txt file, or of its bytes start..stop.

    One long text, cut at line ends so that some of it can be held out: into pieces of 2 to 64 KB
    and the rest of a line: about fifty of a file of 0.1 to 3 MB, more of a larger one. Ranges that
    meet hold every piece once. ValueError names file and line.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = min(max(size // 50, 2000), 1 << 16)
        start, stop = (text_start(file, x) for x in (start, size if stop is None else stop))
        while start < stop:
            end = min(text_start(file, start + length), stop)
            file.seek(start)
            piece = file.read(end - start)
            try:
                yield Place(path, start), piece.decode("utf-8" if start else "utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{Place(path, start + error.start)}: not UTF-8 ({error}); "
                                 "convert the file") from None
            start = end


class Document(NamedTuple):
    """What `parse_row` makes of a text."""

    ids: list  # tokens
    in_loss: bool | list = True  # for each token; True: all are
    skipped: int = 0  # assistant's turns that are read and not learnt
    content: str | None = None  # equal for all guises of one content; None: the ids say it
    head: int = 0  # of a family (below): where its first member starts
    separator: int = -1  # of a family: the id behind each member


def parse_row(row, tokenizer, eos_id):
    """A row of a .jsonl, or a piece of a .txt (a str) -> its documents, [Document, ...].

    `text` is [BOS] text EOS, a piece has no EOS. `dna`: a text, and its reverse complement as
    another. `messages`: a conversation, with a row's `tools`. `sequences`: a "family" (homologues,
    molecules) is [BOS], its members with the separator after each, EOS.
    An empty text is no document: behind BOS the end would be learnt. ValueError where the row has
    none or several of these keys, each with its type: which is meant is not guessed.
    """
    plain = partial(tokenizer.encode, specials=False)  # "<|eot|>" in a text means its letters
    end = [] if eos_id is None else [eos_id]
    if isinstance(row, str):
        return [Document(plain(row))]
    kinds = {"text": str, "messages": list, "dna": str, "sequences": list}
    found = [kind for kind, type_ in kinds.items() if isinstance(row.get(kind), type_)]
    value = row[found[0]] if len(found) == 1 else None
    if found == ["text"]:
        return [Document(plain(value) + end)] if value else []
    if found == ["messages"]:
        return [Document(*encode_chat(value, row.get("tools"), tokenizer))]
    if found == ["dna"]:  # the other strand is as good a text, and no other content
        strands = (value, reverse_complement(value)) if value else ()
        return [Document(plain(strand) + end, content=min(strands)) for strand in strands]
    if found == ["sequences"] and value and all(isinstance(s, str) and s for s in value):
        return [encode_family(value, tokenizer, end)]
    raise ValueError('expected one of: a string "text" or "dna", a list "messages", a list '
                     f'"sequences" of strings that are not empty; found {", ".join(row) or "{}"}')


def encode_family(sequences, tokenizer, end):
    """A family's `Document`; end: the ids behind it, [EOS] or none."""
    head = tokenizer.encode("", specials=False)  # BOS, or nothing
    members = [i for sequence in sequences for i in tokenizer.encode_member(sequence)]
    if end == [tokenizer.separator_id]:
        end = []  # the last member ends with it already; a second would be an empty member
    return Document(head + members + end, content=json.dumps(sorted(sequences)), head=len(head),
                    separator=tokenizer.separator_id)


def encode_chat(messages, tools, tokenizer):
    """A conversation in the words of the teacher's chat template: ids, in-loss flags, skipped.

    Only the assistant's words are in the loss. Its parts are encoded one by one: an answer's first
    token then starts where generation starts, and no token straddles what is given and what is
    learnt. skipped: as `Tokenizer.render_chat_parts`, whose errors become one ValueError.
    """
    try:
        parts, skipped = tokenizer.render_chat_parts(messages, tools=tools)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"messages cannot be rendered ({error})") from None
    parts = [(tokenizer.encode(text, bos=False), learn) for text, learn in parts]
    in_loss = [learn for ids, learn in parts for _ in ids]
    return [i for ids, _ in parts for i in ids], in_loss, skipped


def tokenise_part(path, tokenizer, eos_id, out, start, stop):
    """Write the documents that begin in bytes start..stop of a file as an .npz `out` of FILES.

    tokenizer: a Tokenizer, or in a process of its own the folder of one. Raises ValueError naming
    file and line, whoever refuses: the reader, the chat template or the tokenizer.
    """
    tokenizer = _worker_tokenizer(tokenizer) if isinstance(tokenizer, Path) else tokenizer
    found = {name: [np.zeros(0, dtype)] for name, dtype in FILES.items()}
    for place, row in (read_text if path.suffix == ".txt" else read_rows)(path, start, stop):
        documents = naming(place, parse_row, row, tokenizer, eos_id)
        documents = [document for document in documents if len(document.ids) > 1]
        if not documents:
            found["dropped.bin"].append(np.ones(1, bool))
        for ids, in_loss, skipped, content, *family in documents:
            ids = np.array(ids, np.uint32)
            in_loss = np.broadcast_to(np.array(in_loss, bool), len(ids))
            # What is held out is not trained on in another guise: one hash for both strands of DNA,
            # and for a family in any order of its members.
            key = zlib.crc32(ids.tobytes() if content is None else content.encode())
            described = len(ids), in_loss[1:].sum(), skipped, key, *family
            for name, value in zip(FILES, (ids, in_loss, np.array([described], DOCUMENT))):
                found[name].append(value)
    with replacing(out) as file:
        np.savez(file, **{name: np.concatenate(arrays) for name, arrays in found.items()})


_worker_tokenizer = cache(Tokenizer)  # read once a process, not once a part


def _start_worker():
    """A worker of `tokenise` leaves Ctrl-C to its parent, and never outlives it.

    The pool alone would leave workers behind when the parent is killed: they wait for work at a
    pipe whose other end they hold open themselves.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(daemon=True, target=lambda: (
        multiprocessing.parent_process().join(), os._exit(1))).start()


def tokenise_parts(path, tokenizer, eos_id, parts, workers):
    """Make the parts [(out, start, stop), ...] by `tokenise_part`; yields after each.

    In processes, not threads: almost half of the time is spent in Python itself. Spawned, not
    forked: the parent may hold threads, a GPU, a process group. The workers write their parts to
    the disk themselves, so that no memory is needed for what is done and waits its turn. A worker
    that dies, as when memory runs out, is an OSError.
    """
    if workers == 1 or len(parts) < 2:
        for part in parts:
            yield tokenise_part(path, tokenizer, eos_id, *part)
        return
    pool = ProcessPoolExecutor(min(workers, len(parts)), multiprocessing.get_context("spawn"),
                               _start_worker)
    make = partial(tokenise_part, path, tokenizer.folder, eos_id)
    try:
        yield from pool.map(make, *zip(*parts))
    except BrokenExecutor:
        raise OSError(f"{path}: a process that tokenised it was killed; is there too little "
                      "memory? What is done is kept: the same command goes on") from None
    finally:
        pool.shutdown(cancel_futures=True)


def tokenise(path, tokenizer, eos_id, folder, workers=None):
    """Write a file's documents as token ids into a new sub-folder of `folder`; return it.

    It holds FILES, which depend neither on the number of `workers` (None: all cores, 32 at most)
    nor on stops: a killed call has kept its finished parts in *.tmp, and the next goes on. Keyed by
    the hashes of the text and of the tokenizer's files, so a second call with the same input finds
    the first one's work. One call at a time. Raises ValueError naming file and line, or OSError.
    """
    source = tokenizer.folder
    key = (f"{DATA_FORMAT} {eos_id} {tokenizer.separator_id} {path.suffix} {sha256(path)} "
           + sha256(*(source / name for name in tokenizer_files(source))))
    folder = folder / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if folder.exists():
        sizes, count = {file.name: file.stat().st_size for file in folder.iterdir()}, 0
        if sizes.keys() >= FILES.keys():
            count = np.fromfile(folder / "documents.bin", DOCUMENT)["length"].sum()
        if not 0 < count == sizes["loss.bin"] == sizes["tokens.bin"] / 4:
            raise ValueError(f"{folder} is damaged, as by a copy that was cut off: delete it, and "
                             "the run makes it again")
        return folder
    tmp, size = folder.with_name(folder.name + ".tmp"), path.stat().st_size
    parts = [(tmp / f"{i:06d}.npz", start, min(start + PART, size))
             for i, start in enumerate(range(0, size, PART))]
    todo = [part for part in parts if not part[0].exists()]
    try:
        made = tokenise_parts(path, tokenizer, eos_id, todo, workers or min(os.cpu_count(), 32))
        for _ in tqdm(made, f"tokenise {path.name}", len(parts), initial=len(parts) - len(todo),
                      unit="part", leave=False):
            pass
        for name in FILES:  # the parts end to end; for a moment they take the disk twice
            with replacing(tmp / name) as file:
                for part, _, _ in parts:
                    with np.load(part) as arrays:
                        file.write(arrays[name].tobytes())
        if not (tmp / "documents.bin").stat().st_size:
            raise ValueError(f"{path}: there is no document of two tokens or more in this file")
        for path_ in set(tmp.iterdir()) - {tmp / name for name in FILES}:
            path_.unlink()
        os.replace(tmp, folder)
    except ValueError:
        shutil.rmtree(tmp, ignore_errors=True)  # the file must change, and with it the key
        raise
    return folder


def map_array(path, dtype):
    """A file as an array that is read where it is used, and without what stands around it.

    Rows come in random order. A mapping that reads ahead, up to megabytes for a row of 16 KB, is
    six times as slow.
    """
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapping.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapping, dtype)


def held_out_hashes(folder, fraction=0.02):
    """Hashes of the documents that a tokenised file holds out: the smallest `fraction`, at least 1.

    A hash, not a position: order in the file does not matter, and all copies go to one side.
    """
    hashes = np.fromfile(folder / "documents.bin", DOCUMENT)["hash"]
    rank = max(1, round(fraction * len(hashes))) - 1
    return hashes[hashes <= np.partition(hashes, rank)[rank]]


class Source:
    """One file's documents as rows of T tokens: packed back to back, cut where a row is full.

    split "train" or "heldout": `held_out` are the content hashes of what is held out; None: of this
    file alone, as `held_out_hashes` chooses.
    """

    def __init__(self, name, folder, split, T, held_out=None):
        documents = np.fromfile(folder / "documents.bin", DOCUMENT)
        held_out = held_out_hashes(folder) if held_out is None else held_out
        self.name, self.folder, self.T = name, folder, T
        self.skipped = int(documents["skipped"].sum())  # of the whole file, and so is
        self.dropped = (folder / "dropped.bin").stat().st_size
        starts = documents["length"].cumsum() - documents["length"]
        self.tokens = map_array(folder / "tokens.bin", np.uint32)
        self.loss = map_array(folder / "loss.bin", bool)
        chosen = np.isin(documents["hash"], held_out) == (split == "heldout")
        documents = documents[chosen]
        self.lengths, self.starts = documents["length"], starts[chosen]  # in the files
        self.heads, self.separators = documents["head"], documents["separator"]
        self.ends = self.lengths.cumsum()  # in the stream of chosen documents
        self.total, self.labels = int(self.lengths.sum()), int(documents["labels"].sum())
        self.mute = int((documents["labels"] == 0).sum())
        self.num_rows = max(0, self.total - 1) // T

    def row(self, i, seed=None):
        """Row i: token ids, document ids, in-loss flags; T + 1 of each (the last: label only).

        Rows i and i + 1 share one token, the label of one and the first input of the other: over an
        epoch every token is input once, but for up to T at the stream's end, which fill no row and
        are never read. A document longer than what is left of the row goes on in the next, there as
        a new document: what came before cannot be seen from it.

        seed: integers that decide how each family's members are ordered; None: as in the file.
        """
        # The documents of this split end to end are "the stream".
        stream = np.arange(i * self.T, (i + 1) * self.T + 1)
        docs = np.searchsorted(self.ends, stream, "right")  # whose token each is
        where = stream - self.ends[docs] + self.lengths[docs] + self.starts[docs]  # in the files
        if seed is not None:
            for d in np.unique(docs[self.separators[docs] >= 0]):
                own = docs == d
                where[own] = self.shuffled(d, seed)[where[own] - self.starts[d]]
        return self.tokens[where], docs, self.loss[where]

    def shuffled(self, d, seed):
        """Where the tokens of family d stand in the files, members in a new order: (length,).

        A family is a set: a student that saw one order only would learn the order too.
        """
        where = np.arange(self.starts[d], self.starts[d] + self.lengths[d])
        ends = np.flatnonzero(self.tokens[where] == self.separators[d]) + 1
        head, *members, tail = np.split(where, [self.heads[d], *ends])
        new = np.random.default_rng((*seed, int(d))).permutation(len(members))
        return np.concatenate([head, *(members[m] for m in new), tail])


def collate(rows, device):
    """Rows -> tokens, document_ids, labels, each (B, T) int64; labels -100 where none counts.

    labels[t] is the token at t + 1. The last token of a document has none: the next one belongs to
    another text. Nor has a token before one that is not in the loss, as a user's words in a chat.
    """
    tokens, docs, loss = (torch.from_numpy(np.stack(x)) for x in zip(*rows))
    tokens = tokens.long()
    labels = torch.where((docs[:, 1:] == docs[:, :-1]) & loss[:, 1:], tokens[:, 1:], -100)
    return tuple(x.to(device) for x in (tokens[:, :-1], docs[:, :-1].long(), labels))


class Mixture:
    """Rows of several sources by weight. What a step sees depends on (seed, step) alone.

    So resuming needs one integer. After n rows, for every n, each source has given its share of n
    to within one row; a source that runs out starts over in a new order. Attributes, for each row:
    which (its source), nth (which row of that source, from 0, counted over its epochs).

    reorder: each epoch reads a family's members in an order of its own. False keeps the files'
    order, for which teacher targets are stored.
    """

    def __init__(self, sources, weights, total_rows, seed, reorder=True):
        self.sources, self.seed, self.orders, self.reorder = sources, seed, {}, reorder
        self.which, self.nth = interleave(weights, total_rows)

    def locate(self, i):
        """Row i of the mixture is row j of source s: (s, j)."""
        s = int(self.which[i])
        epoch, j = divmod(int(self.nth[i]), self.sources[s].num_rows)
        if self.orders.get(s, (None,))[0] != epoch:
            # Seeded by all that it depends on, and by no state: no epoch needs those before.
            rng = np.random.default_rng((self.seed, s, epoch))
            self.orders[s] = epoch, rng.permutation(self.sources[s].num_rows)
        return s, int(self.orders[s][1][j])

    def row(self, i):
        """Row i of the mixture, as `Source.row` gives it."""
        s, j = self.locate(i)
        epoch = int(self.nth[i]) // self.sources[s].num_rows
        return self.sources[s].row(j, (self.seed, s, epoch) if self.reorder else None)


def interleave(weights, n):
    """(n,) uint16, (n,) int64: the source of each row, and which row of that source it is, from 0.

    Any first m rows hold m * share of each source to within one row. The quota method (Balinski and
    Young, 1975): of the sources that are behind their share, the one whose next row is due first.
    Sorting by due time alone gives a large source, against many small ones, its rows too early.
    """
    share = [w / sum(weights) for w in weights]
    given, which, nth = [0] * len(share), np.empty(n, np.uint16), np.empty(n, np.int64)
    for m in range(n):
        behind = [s for s, p in enumerate(share) if given[s] < p * (m + 1)]
        s = min(behind, key=lambda s: (given[s] + 1) / share[s])
        which[m], nth[m] = s, given[s]
        given[s] += 1
    return which, nth


# `run`, here and below: what `parse_arguments` returns, and beside the flags device, dtype, rank
# and world, which `start_processes` sets, and align_steps and distil_steps, which `main` does.


def open_data(run, tokenizer, eos_id):
    """--data -> (training sources, their weights, held-out sources), tokenised; says what they are.

    Weights default to the number of tokens, so that files without one are as if concatenated.
    Raises ValueError / FileNotFoundError naming the file or flag: also for a split in which no
    token is a label, such as conversations without an assistant, whose losses would be means over
    nothing and look like success.
    """
    train, weights, heldout = [], [], []
    folders = [tokenise(path, tokenizer, eos_id, run.out / "data") for path, _ in run.data]
    # Of all files together: what one holds out is not trained on as another's document.
    held_out = np.concatenate([held_out_hashes(folder) for folder in folders])
    for (path, weight), folder in zip(run.data, folders):
        for sources, split in ((train, "train"), (heldout, "heldout")):
            source = Source(path.stem, folder, split, run.context, held_out=held_out)
            sources.append(source)
            if source.num_rows == 0:
                raise ValueError(f"--data {path}: {source.total} {split} tokens do not fill a row "
                                 f"of --context {run.context}; give more documents, of which one "
                                 "in fifty is held out, or a shorter context")
            if source.labels == 0:
                raise ValueError(f"--data {path}: none of the {source.total} {split} tokens is to "
                                 "be learnt; do its conversations have an assistant's turns?")
        weights.append(weight or float(train[-1].total))
    for source, weight, held in zip(train, weights, heldout):
        print(f"data      {source.name}: {source.num_rows * run.context:,} of {source.total:,} "
              f"tokens fill rows to train on; {source.labels:,} labels, the longest document "
              f"{source.lengths.max():,}; "
              + (f"{weight / sum(weights):.0%} of every batch" + " of stage I" * run.experts
                 if not (run.experts and why_no_align(run)) else
                 "stage I, which alone weighs files, is skipped")
              + f"; {min(run.eval_rows, held.num_rows)} rows held out to measure by")
        if source.dropped:
            print(f"          {source.dropped:,} rows of the file hold no text of two tokens and "
                  "are left out")
        if source.mute:
            print(f"          {source.mute:,} of its {len(source.lengths):,} documents have no "
                  "token to learn, such as conversations without an assistant's turn")
        if source.skipped:
            print(f"          {source.skipped:,} of its assistant's turns are read and not learnt: "
                  "the chat template rewrites them once others follow")
    return train, weights, heldout


# ----------------------------------------------------------------------------------------------
# 2. Losses
# ----------------------------------------------------------------------------------------------
# Stage I compares what attention returns, layer by layer; stage II what the model says. Both are
# means over tokens, so that a learning rate means the same whatever the batch: a reduction over the
# batch only, as "batchmean" does with (B, T, V), would make it grow with the context.
#
# Logits are the largest thing in stage II: 4096 tokens x 128k x 4 bytes are 2.1 GB, and a loss
# needs several such. So each use of them below takes a slice of tokens at a time.

LOGITS_AT_ONCE = 1 << 26  # 256 MB in fp32: 512 tokens of Llama 3, all 1024 of a short SmolLM2 row


def slices(vocab_size, *tensors):
    """The tensors (N, ...), cut alike into slices of N whose logits are few: tuples of slices.

    By `split`: the backward of a plain index would fill a tensor of the whole length each time.
    """
    size = max(1, LOGITS_AT_ONCE // vocab_size)
    return list(zip(*(x.split(size) for x in tensors)))


@torch.no_grad()
def teacher_topk(hidden, lm_head_weight, k):
    """The k most likely tokens, in no order: hidden (..., hidden) -> ids, logprobs (N, k).

    fp32. Log-probabilities are over the full vocabulary: the mass outside the top k stays known.
    No order: the loss does not care, and sorting 256 of 128k for every token would take longer.
    """
    k, found = min(k, len(lm_head_weight)), []
    for (x,) in slices(len(lm_head_weight), hidden.flatten(0, -2)):
        logits = F.linear(x, lm_head_weight).float()
        top = logits.topk(k, dim=-1, sorted=False)
        largest = top.values.amax(-1, keepdim=True)
        log_z = logits.sub_(largest).exp_().sum(-1, keepdim=True).log()  # logsumexp would copy
        found.append((top.indices, top.values - largest - log_z))
    return tuple(map(torch.cat, zip(*found)))


def sparse_kd_loss(hidden, lm_head_weight, labels, topk_ids, topk_logprobs, *, gamma=0.9, beta=0.1):
    """loss = gamma * CE(labels) + beta * KL(teacher || student), means over valid tokens (Eq. 13).

    hidden (..., hidden), lm_head_weight (V, hidden), labels (...) int64 with -100 = not valid,
    topk_ids and topk_logprobs (..., k): the teacher's top tokens and their log-probabilities.
    Returns (loss, {"ce", "kl"}) in fp32, in nats per token; 0 where no token is valid.

    Paper: KL over "the distribution over the top-k tokens". Here: both distributions are
    renormalised over those k tokens, because cutting them off without is biased (2503.16870).
    With k = V it is the full KL. A slice's logits are forgotten and computed again in the backward
    pass: there is never a (tokens, V) matrix, for 2 % more of an 8B model's step.
    """
    kind, weight = hidden.device.type, lm_head_weight
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    if weight.requires_grad:
        # Autograd sums the slices' gradients of lm_head in the dtype of the tensor that they all
        # read. So that one is fp32, and each slice casts it for itself (`weight.to` below).
        # Autocast or FSDP2 would hand them one bf16 copy, and the sum would be bf16.
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))

    def sums(x, labels, ids, logprobs):  # of a slice: CE and KL, (2,)
        logits = F.linear(x.to(dtype), weight.to(dtype))
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        # One gather, the label as one more column: its backward fills a tensor as large as logits.
        columns = torch.cat((ids.long(), labels.clamp_min(0)[:, None]), dim=1)  # (slice, k + 1)
        z = logits.gather(1, columns)
        ce = logits.logsumexp(-1) - z[:, -1]
        log_p = logprobs.to(z.dtype).log_softmax(-1)  # teacher over its top k
        log_q = z[:, :-1].log_softmax(-1)  # student over the same k
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        return (torch.stack((ce, kl)) * (labels != -100)).sum(1)

    parts = slices(len(weight), hidden.flatten(0, -2), labels.flatten(), topk_ids.flatten(0, -2),
                   topk_logprobs.flatten(0, -2))
    # Computed again in the backward pass; but a single slice is small enough to be kept.
    again = partial(checkpoint, sums, use_reentrant=False, preserve_rng_state=False)
    of_slice = again if len(parts) > 1 else sums
    total = sum(of_slice(*part) for part in parts)
    ce, kl = total / (labels != -100).sum().clamp_min(1)
    return gamma * ce + beta * kl, {"ce": ce.detach(), "kl": kl.detach()}


@torch.no_grad()
def teacher_walk(student, tokens, document_ids):
    """Yield each layer's (mixer, its `Heads`, softmax attention's output (B, H, T, D)).

    The teacher's forward pass inside its student: the teacher's output goes on to the next layer.
    """
    positions = student.positions(tokens, document_ids=document_ids)
    layers, x = student.model["layers"], student.embed(tokens)
    for block, tables in zip(layers, student.rope_tables(positions, x.dtype)):
        attention = block.self_attn
        heads = attention.heads(block.attention_input(x), tables)
        # The teacher's `mix` called on the student's module: the same projections, but the
        # teacher's own window (`attention.window`), no sinks and no state.
        target = Attention.mix(attention, heads, document_ids=document_ids)
        yield attention, heads, target
        if block is not layers[-1]:  # nobody reads what leaves the last
            x = block.after_attention(x, attention.o_proj(target.transpose(1, 2).flatten(2)))


def alignment_losses(student, tokens, document_ids, backward_scale=None):
    """Stage I (Eq. 12): per layer, the mean over tokens, heads and width of (h_T - h_S)^2.

    h is what a mixer returns for its heads, before o_proj mixes them (model.Attention.mix). The
    teacher's forward pass is made inside its student, whose frozen weights are the teacher's own.
    Each layer gets the TEACHER's input; softmax attention gives the target, the student's mixer the
    prediction, and the teacher's output goes on to the next layer. So layers do not depend on each
    other, and memory is that of one: with `backward_scale` each layer's gradients (of scale * loss)
    are added and its graph is freed before the next.
    Returns (layers,) fp32, detached.

    Paper: sums. Here: means, so that gradients, which are clipped at 1, have one size at every
    context and width.
    """
    losses = []
    for attention, heads, target in teacher_walk(student, tokens, document_ids):
        with torch.set_grad_enabled(backward_scale is not None):
            h = attention.mix(heads, document_ids=document_ids)
            loss = (h.float() - target.float()).square().mean()
            if backward_scale is not None:
                # Outside of autocast, which would make the fp32 products of the mLSTM bf16 ones
                # on the way back.
                with torch.autocast(tokens.device.type, enabled=False):
                    (loss * backward_scale).backward()
        losses.append(loss.detach())
    return torch.stack(losses)


# ----------------------------------------------------------------------------------------------
# 3. Number format, and several processes (torchrun): rows are dealt out, stage II is sharded
# ----------------------------------------------------------------------------------------------


def choose_dtype(wanted, device):
    """What --dtype means: "auto" is bf16 where products of it are fast, else fp32.

    That is on GPUs and on CPUs with AMX, Intel's matrix unit (four to six times fp32, measured), or
    with AVX512's bf16 products (twice fp32; 1.25 and 1.45 times in stage I and II of 135M).
    """
    if wanted == "auto":
        cpu = torch.cpu.get_capabilities()
        fast = device.type == "cuda" or cpu.get("amx_bf16") or cpu.get("avx512_bf16")
        wanted = "bfloat16" if fast else "float32"
    return getattr(torch, wanted)


def frozen_dtype(run):
    """What frozen weights are kept in: fp32 for --dtype float32, else None, which is as stored."""
    return torch.float32 if run.dtype == torch.float32 else None


def autocast(run):
    """Matrix products in run.dtype, from weights and activations of any.

    The weights that train stay fp32 underneath. An AdamW step at 7e-7 would move 1 % of bf16
    weights, one at 1e-5 16 % (measured): the others would round it away.
    """
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype == torch.bfloat16)


# A step has --batch rows however many processes share them, and losses and gradients are sums over
# all rows divided by the step's count. So results do not depend on the number of processes. Without
# torchrun there is one: it has all rows, and sums and barriers do nothing.


def start_processes(run):
    """Join torchrun's processes, if it started this one; set run.device, .dtype, .rank, .world.

    Raises ValueError for a device that this torch lacks, and for rows that cannot be dealt out.
    """
    if "RANK" in os.environ and run.device.startswith("cuda"):
        run.device = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(run.device)
    run.device = torch.device(run.device)
    run.dtype, run.rank, run.world = choose_dtype(run.dtype, run.device), 0, 1
    if "RANK" not in os.environ:
        return
    if run.device.type == "cuda":
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
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def leave(status):
    """End this process with exit status 0 (all is done or saved) or another (`run_command`'s).

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
    """Have the first process call make(), unless `path` exists; all go on when it is done.

    make leaves `path` whole or not at all, so that a run that was stopped in it does it again.
    """
    if run.rank == 0 and not path.exists():
        make()
    barrier()


def all_sum(tensor):
    """The sum of every process's tensor, on every process (in place)."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(trainable):
    """Stage I: add up all processes' gradients, in one message.

    Of a few MB a layer. One message a tensor would wait for the network hundreds of times a step.
    """
    if dist.is_initialized():
        grads = [p.grad for p in trainable.values()]
        flat = all_sum(nn.utils.parameters_to_vector(grads))
        nn.utils.vector_to_parameters(flat, grads)


def clip_gradients(trainable):
    """Scale gradients down to a norm of 1, as the paper does; return what it was before.

    Of sharded gradients the norm is that of all processes together.
    """
    norm = nn.utils.clip_grad_norm_(trainable.values(), 1.0)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def shard(model, device, dtype):
    """FSDP2: every process keeps 1/world of each matrix; a block is gathered while it runs.

    In `dtype`, with gradients summed in fp32 and the fp32 masters sharded. The new parameters
    (gates, feature maps) are gathered in fp32: rounding a forget gate's bias of 8.6 to bf16 moves
    its half-life by up to 3 %. Gradients are summed and scattered after every micro-batch:
    waiting for the last one would need whole gradients on every GPU.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    half = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                cast_forward_inputs=False)
    for block in model.model["layers"]:
        new = [m for name, m in block.self_attn.named_children() if is_new(name)]
        if new:
            fully_shard(new, mesh=mesh, mp_policy=exact)
        fully_shard(block, mesh=mesh, mp_policy=half)
    fully_shard(model, mesh=mesh, mp_policy=half)
    # It warns that some modules return views, which nobody may change in place; nobody does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)


def my_micro_batches(run, step):
    """The mixture's row numbers of a step that are this process's, in --micro-batch pieces.

    Process r takes rows r, r + world, ...: any number of processes reads the same rows in a step.
    """
    mine = range(step * run.batch + run.rank, (step + 1) * run.batch, run.world)
    return [mine[a:a + run.micro_batch] for a in range(0, len(mine), run.micro_batch)]


# ----------------------------------------------------------------------------------------------
# 4. Teacher targets on disk: the teacher runs once; stage II then needs it no more
# ----------------------------------------------------------------------------------------------
# A fifth to a quarter of stage II's work is the teacher's forward pass, and it says the same of a
# row every time. Storing it pays where rows come again: several experts or epochs over the same
# data, a search over learning rates, a teacher that does not fit beside its student. It does not
# pay for one pass over much data: 256 tokens' ids and log-probabilities are 1 KB a token (1.25 KB
# above 65,536 tokens of vocabulary), so 5B tokens are 5.1 or 6.4 TB.
#
# A file a row, named by source and row, not by step: epochs, experts, other weights and other seeds
# share them, and whoever lacks some makes those. A row of 4096 tokens is a file of 4 or 5 MB.

TARGETS_FORMAT = 3  # raise it when the files change their meaning


def changes(old, new):
    """What of the settings `new` is another in `old`, both dicts as JSON knows them: in words."""
    return "; ".join(f"{key} was {old.get(key)!r}, now {value!r}"
                     for key, value in new.items() if old.get(key) != value)


class TargetCache:
    """The teacher's top-k log-probabilities for rows of the sources, on disk.

    Log-probabilities are over the full vocabulary, in fp16: off by 1/2048 of their value at most,
    or by 3e-8. Rows are as their files have them: a family's members are not reordered where
    targets are stored.

    manifest.json says whose targets these are (`described`); ValueError names what differs. A row's
    file holds the ids and fp16 log-probs of its T tokens, (T, k) each, and their CRC-32. Ids take 2
    bytes, and a third in `high` where the vocabulary has more than 2^16 tokens: with k = 256, 1024
    or 1280 bytes a token.
    """

    def __init__(self, folder, sources, described):
        self.folder, self.sources, path = folder, sources, folder / "manifest.json"
        if not path.exists():
            write_json(path, described)
        if changed := changes(read_json(path), described):
            raise ValueError(f"--targets {folder} was made with other settings: {changed}. Name "
                             "another folder, or delete this one")
        shape = described["context"], described["k"]
        parts = [("low", "<u2", shape), ("logprobs", "<f2", shape)]
        parts += [("high", "u1", shape)] if described["vocab_size"] > 1 << 16 else []
        self.row_type = np.dtype([("targets", parts), ("crc", "<u4")])

    def path(self, s, j):
        """The file of row j of source s. A folder holds a thousand: more are slow to list."""
        return self.folder / self.sources[s].name / f"{j // 1000:06d}" / f"{j:09d}"

    def rows(self, where, device="cpu"):
        """[(source, row), ...] -> ids (N, T, k) int32 and log-probs (N, T, k) fp16, from the disk.

        As sparse_kd_loss takes them, which widens a slice at a time. Raises FileNotFoundError, or
        ValueError if a row is damaged.
        """
        ids, logprobs = [], []
        for s, j in where:
            row = np.fromfile(self.path(s, j), self.row_type)
            if len(row) != 1 or zlib.crc32(row["targets"].tobytes()) != row["crc"][0]:
                raise ValueError(f"{self.path(s, j)} is damaged; delete this file, and the run "
                                 "makes it again")
            targets = row["targets"][0]
            ids.append(targets["low"].astype(np.int32))
            if "high" in targets.dtype.names:
                ids[-1] |= targets["high"].astype(np.int32) << 16
            logprobs.append(targets["logprobs"])
        return tuple(torch.from_numpy(np.stack(x)).to(device) for x in (ids, logprobs))

    def write(self, run, where, teacher):
        """Make the targets of rows [(source, row), ...], one micro-batch."""
        out = np.zeros(len(where), self.row_type)
        targets, shape = out["targets"], out["targets"]["low"].shape  # (N, T, k)
        batch = collate([self.sources[s].row(j) for s, j in where], run.device)
        ids, logprobs = teacher_targets(run, teacher, batch)
        ids = ids.cpu().numpy().reshape(shape)
        targets["low"] = ids & 0xFFFF
        if "high" in targets.dtype.names:
            targets["high"] = ids >> 16
        least = torch.finfo(torch.float16).min  # a masked token is not -inf: 0 * inf is nan
        targets["logprobs"] = logprobs.clamp_min(least).cpu().numpy().reshape(shape)
        for (s, j), row in zip(where, out):
            row["crc"] = zlib.crc32(row["targets"].tobytes())
            with replacing(self.path(s, j)) as file:
                file.write(row.tobytes())


def prepare_targets(run, teacher, mixtures, stop):
    """Open the cache run.targets and make what `mixtures` draw and it lacks.

    Each of run.world processes makes every world-th row, and waits for the others at the end.
    Processes that do not know of each other do no harm, only work twice. A killed call loses its
    unfinished micro-batch. Raises ValueError when the folder is another's or the disk too small,
    OSError, and Stopped once `stop`, of `catch_stop`, is not empty.
    """
    sources, config = mixtures[0].sources, teacher.config
    stored = TargetCache(run.targets, sources, {
        "format": TARGETS_FORMAT, "teacher_sha256": model_sha256(run.teacher),
        "data": [source.folder.name for source in sources],  # name and hash of each file
        "context": run.context, "k": min(run.topk, config.vocab_size),
        "vocab_size": config.vocab_size})
    needed = sorted({m.locate(i) for m in mixtures for i in range(len(m.which))})
    missing = [row for row in needed if not stored.path(*row).exists()]
    row_bytes, size = stored.row_type.itemsize, tqdm.format_sizeof
    need, free = len(missing) * row_bytes, shutil.disk_usage(run.targets).free
    if run.rank == 0:
        print(f"targets   {run.targets}: {row_bytes / run.context:,.0f} bytes a token; "
              f"{len(needed) - len(missing):,} of {len(needed):,} rows are there. To write: "
              f"{size(need)}B; free: {size(free)}B")
    if need > free:
        raise ValueError(f"--targets {run.targets}: {size(need)}B are to be written, {size(free)}B "
                         "are free: take another disk, fewer --tokens or a lower --topk")
    # From `needed`, which is the same on all processes; `missing` shrinks while others write.
    mine = sorted(set(needed[run.rank::run.world]) & set(missing))
    with tqdm(desc="targets", total=len(mine) * run.context, unit="tok", unit_scale=True,
              disable=run.rank > 0 or not mine) as bar:
        for a in range(0, len(mine), run.micro_batch):
            part = mine[a:a + run.micro_batch]
            stored.write(run, part, teacher)
            bar.update(len(part) * run.context)
            if stop:
                break
    # Summed, so that all processes leave or none: one that is done may have seen no signal yet.
    if all_sum(torch.tensor(float(bool(stop)), device=run.device)):
        raise Stopped("a part of the targets", "the same command")
    return stored


# ----------------------------------------------------------------------------------------------
# 5. Held-out comparison of student and teacher
# ----------------------------------------------------------------------------------------------
# What a stage was good for, on text that it never saw. Here the KL is over the whole vocabulary, as
# the training loss, over the teacher's top k, is no measure of what lies outside.

METRICS = ("ce", "kl", "top1")


@torch.no_grad()
def compare(run, student, teacher, sources):
    """Held-out CE of the student, KL(teacher || student) over the full vocabulary, agreement.

    On the first run.eval_rows rows of every source. Returns {source: {"ce", "kl" (nats per token),
    "top1" (share of tokens where both rank the same token first)}, ..., "all": their mean}; None in
    place of a mean over nothing, for a source whose rows hold no label. With student=teacher: the
    teacher's own CE, and KL 0.
    """
    results = {}
    for source in sources:
        sums = torch.zeros(4, dtype=torch.float64, device=run.device)  # ce, kl, top1, tokens
        n = min(run.eval_rows, source.num_rows)
        # Every process makes as many calls as any other: FSDP2 gathers weights in each.
        for a in range(0, n, run.micro_batch * run.world):
            a += run.rank * run.micro_batch
            rows = [source.row(i) for i in range(a, min(a + run.micro_batch, n))]
            tokens, docs, labels = collate(rows or [source.row(0)], run.device)
            labels = labels if rows else torch.full_like(labels, -100)

            # As the teacher's `head`, so inside its forward pass: there both lm_heads are gathered.
            def agree(h_t, w_t):
                if student is teacher:
                    return agreement(h_t, w_t, h_t, w_t, labels)
                return student(tokens, document_ids=docs,
                               head=partial(agreement, h_t, w_t, labels=labels))

            with autocast(run):
                sums += teacher(tokens, document_ids=docs, head=agree)
        *sums, count = all_sum(sums).tolist()
        results[source.name] = {key: x / count if count else None for key, x in zip(METRICS, sums)}
    known = [r for r in results.values() if r["ce"] is not None]
    results["all"] = {key: sum(r[key] for r in known) / len(known) if known else None
                      for key in METRICS}
    return results


def agreement(hidden_t, weight_t, hidden_s, weight_s, labels):
    """Sums over valid tokens: student's CE, KL to the teacher, equal argmax, 1.  -> (4,) fp64.

    Sums, so that slices and processes add up; fp64, so that their order does not show.
    """
    valid, labels = labels.flatten() != -100, labels.flatten()
    sums = torch.zeros(4, dtype=torch.float64, device=labels.device)
    for x, y, label in slices(len(weight_t), hidden_t.flatten(0, -2)[valid],
                              hidden_s.flatten(0, -2)[valid], labels[valid, None]):
        p = F.linear(x, weight_t).float().log_softmax(-1)
        q = F.linear(y, weight_s).float().log_softmax(-1)
        sums += torch.stack([-q.gather(1, label).sum(), (p.exp() * (p - q)).sum(),
                             (p.argmax(-1) == q.argmax(-1)).sum(),
                             label.new_tensor(len(label))]).double()
    return sums


def number_or_dash(x):
    """A held-out number for print."""
    return "-" if x is None else f"{x:.4f}"


def show(metrics):
    """A model's held-out numbers in words."""
    ce, kl, top1 = (number_or_dash(metrics[key]) for key in METRICS)
    return f"CE {ce}  KL {kl}  top-1 {top1}"


# ----------------------------------------------------------------------------------------------
# 6. Optimiser, schedule, checkpoints
# ----------------------------------------------------------------------------------------------


def learning_rate(step, steps, warmup, peak, final):
    """Linear warm-up to `peak`, then a cosine towards `final` (= peak: constant). step from 0.

    A stage shorter than the warm-up reaches its peak at its end, which `describe` says.
    Paper: stage I falls to a thousandth of its peak, stage II is constant.
    """
    warmup = min(warmup, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


TRAIN = {"new": is_new, "mixer": lambda name: ".self_attn." in name, "all": lambda name: True}


def select_trainable(student, which):
    """Set requires_grad: "new" (gates and feature maps), "mixer" (all of attention) or "all".

    Paper: all. "mixer" is the middle curve of its Fig. 17, a little worse in CE and as close in KL;
    an 8B model's stage II then takes about a third of the memory.
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

    Paper: betas not stated. Here: (0.9, 0.95), as 0.999, the default, is a mean over a thousand
    steps, and the paper's stage I has some 2,500. Fused: the default on a GPU makes temporary
    copies as large as the parameters.
    """
    matrices = [p for p in trainable.values() if p.dim() > 1]
    vectors = [p for p in trainable.values() if p.dim() <= 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                              {"params": vectors, "weight_decay": 0.0}],
                             betas=(0.9, 0.95), fused=True)


# A checkpoint is a folder of safetensors and a manifest: nothing is pickled, so nothing that is
# read can run. With the step it is all that a run needs to go on, to the bit: data follow from
# (seed, step), nothing else is random, and the schedule is a function of the step. A file for each
# kind of state, because all three of an 8B model in fp32 are 96 GB, much to hold on a host at once.

STATE = ("weight", "exp_avg", "exp_avg_sq")  # the files are STATE-RANK.safetensors


def state_tensor(optimizer, p, state):
    """The tensor of parameter p that is saved as this kind of STATE."""
    return p.detach() if state == "weight" else optimizer.state[p][state]


def save_checkpoint(run, stage, step, trainable, optimizer):
    """Write trained weights and optimiser state after `step` steps of `stage`; keep the last two.

    The folder is complete or absent: it is written as *.tmp, synced and renamed. Every process
    writes its own rows of sharded tensors, the first one those that all hold alike. Frozen weights
    are not in it: they come from the teacher (stage I) or seed/ (stage II).
    """
    path = run.out / "checkpoints" / f"{stage}-{step:08d}"
    tmp = path.with_name(path.name + ".tmp")
    if run.rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    barrier()
    # A plain tensor (stage I, or one process) is alike on all: the first process writes it whole.
    sharded = any(hasattr(p, "to_local") for p in trainable.values())
    if sharded or run.rank == 0:
        for state in STATE:
            save_tensors({name: local_rows(state_tensor(optimizer, p, state))[0]
                          for name, p in trainable.items()},
                         tmp / f"{state}-{run.rank:04d}.safetensors")
    barrier()
    if run.rank == 0:
        write_json(tmp / "manifest.json", {"stage": stage, "step": step, "world": run.world,
                                           "files": run.world if sharded else 1})
        shutil.rmtree(path, ignore_errors=True)
        os.replace(tmp, path)
        # Two, as a copy or a disk can damage the last: `load_checkpoint` then takes the one before.
        for old in checkpoints(run, stage)[:-2]:
            shutil.rmtree(old)


def checkpoints(run, stage):
    """Folders of the stage's checkpoints, oldest first.

    One that is still being written has another name, and is not among them.
    """
    return sorted((run.out / "checkpoints").glob(f"{stage}-{'[0-9]' * 8}"))


def open_state(path, state):
    """The open files of one kind of STATE in a checkpoint, whatever number of processes wrote it.

    FSDP2 cuts every tensor along its first axis, so each file holds the next rows of all tensors.
    Raises ValueError for a torn checkpoint.
    """
    try:
        return [safe_open(path / f"{state}-{i:04d}.safetensors", framework="pt")
                for i in range(read_json(path / "manifest.json")["files"])]
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"checkpoint {path} cannot be read ({error})") from None


def read_whole(files, name):
    """A tensor of `open_state`'s files, all its rows: one at a time, for all are 96 GB (8B)."""
    return torch.cat([file.get_tensor(name) for file in files])


def load_checkpoint(run, stage, trainable, optimizer):
    """Restore the newest whole checkpoint of `stage`; return its step, 0 if there is none.

    A torn one is named and passed over. One of another number of processes is read whole and cut
    into rows; the losses then go on equal up to the order of sums.
    """
    # AdamW makes its state in its first step; it must be there before, to be read into. A new run
    # starts from the same zeros.
    for p in trainable.values():
        optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    for path in reversed(checkpoints(run, stage)):
        try:
            files = {state: open_state(path, state) for state in STATE}
        except ValueError as error:
            print(f"{error}; trying the one before")
            continue
        manifest = read_json(path / "manifest.json")
        step, world = manifest["step"], manifest["world"]
        for name, p in trainable.items():
            optimizer.state[p]["step"].fill_(step)
            for state in STATE:
                into, first = local_rows(state_tensor(optimizer, p, state))
                into.copy_(read_whole(files[state], name)[first:first + len(into)])
        print(f"resuming {stage} from {path}" + ("" if world == run.world else (
            f", written by {world} processes, now {run.world}: sums change their order, so losses "
            "go on equal to rounding, not to the bit")))
        return step
    if checkpoints(run, stage):
        print(f"no checkpoint of {stage} is whole: it begins anew")
    return 0


def catch_stop():
    """A list, empty until Ctrl-C or SIGTERM: loops then finish their step, save and leave.

    No exception, so that no step is cut in two. A second signal finds the default, which kills.
    torchrun kills its processes half a minute after it has handed a signal on: with longer steps
    --save-every is what can be relied on.
    """
    stop = []
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, lambda which, frame: (
            stop.append(which), signal.signal(which, signal.SIG_DFL)))
    return stop


class Stopped(Exception):
    """The run was asked to stop, and has saved.

    Its first argument says where, a second one with which command to go on, if it is not the usual
    one. No error: the command leaves with status 0.
    """


# ----------------------------------------------------------------------------------------------
# 7. The two stages
# ----------------------------------------------------------------------------------------------
# Both are the same loop, written out twice: learning rate, micro-batches, sums over processes, a
# check before the update, log, checkpoint. They differ in what is differentiated, and in who holds
# the weights: stage I walks over the layers by hand, which is no `forward` that FSDP2 could hook
# into, so every process holds all frozen weights, and only the new parameters' gradients (those of
# 0.4 % of an 8B student's parameters with --features 1, of 1.1 % with 4) are summed. Stage II calls
# the model, and is sharded.
#
# A third stage, on-policy distillation for example, would be a third such loop: rows from
# `model.generate`, targets from `teacher_topk`, the loss as in `distil_loss`.


def align(run, student, mixture, stop):
    """Stage I: train the new parameters on `alignment_losses` for run.align_steps steps, in place.

    Raises Stopped when `stop` becomes true, after a checkpoint, and ValueError when a loss is not
    finite, before the update.
    """
    trainable = select_trainable(student, "new")
    describe(run, "stage I (align)", student, trainable, run.align_steps, mixture)
    optimizer = make_optimizer(trainable)
    first = load_checkpoint(run, "align", trainable, optimizer)
    with Progress(run, "align", first, run.align_steps) as progress:
        for step in range(first, run.align_steps):
            # ----- one step -----
            lr = learning_rate(step, run.align_steps, run.warmup, run.align_lr, run.align_lr * 1e-3)
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses = 0.0  # per layer, the mean over the whole batch
            for part in my_micro_batches(run, step):
                tokens, docs, _ = collate(map(mixture.row, part), run.device)
                with autocast(run):
                    scale = len(part) / run.batch
                    losses = losses + scale * alignment_losses(student, tokens, docs, scale)
            sum_gradients(trainable)
            norm = clip_gradients(trainable)
            # Whether to stop is summed as well: all processes leave after the same step, or none.
            sums = torch.cat((losses, losses.new_tensor([bool(stop)])))
            *losses, stopping = all_sum(sums).tolist()
            check_finite(run, mixture, "align", step, sum(losses), norm)
            optimizer.step()
            optimizer.zero_grad()
            # --------------------
            progress.log(step, lr=lr, loss=sum(losses), norm=norm)
            done = step + 1  # no checkpoint after the last step: seed/ takes its place
            if done < run.align_steps and (done % run.save_every == 0 or stopping):
                save_checkpoint(run, "align", done, trainable, optimizer)
                if stopping:
                    raise Stopped(f"stage I, step {done}")
    tqdm.write("loss per layer: " + " ".join(f"{x:.2e}" for x in losses))


def teacher_targets(run, teacher, batch):
    """The teacher's top k of a micro-batch (tokens, document ids, labels), as `teacher_topk`."""
    tokens, docs, _ = batch
    with torch.no_grad(), autocast(run):
        return teacher(tokens, document_ids=docs, head=partial(teacher_topk, k=run.topk))


def distil_loss(run, student, batch, targets):
    """Eq. 13 of a micro-batch (tokens, document ids, labels): what `sparse_kd_loss` returns.

    With --recompute a block keeps its input only, and runs a second time in the backward pass: four
    passes' work in the place of three.
    """
    for block in student.model["layers"]:
        block.recompute = run.recompute
    tokens, docs, labels = batch
    with autocast(run):
        return student(tokens, document_ids=docs, head=lambda h, w: (
            sparse_kd_loss(h, w, labels, *targets, gamma=run.gamma, beta=run.beta)))


def distil(run, student, teacher, stored, mixture, heldout, stop):
    """Stage II: train run.train's parameters on `distil_loss` for run.distil_steps steps, in place.

    The teacher's targets are those `stored` (a TargetCache) or, if None, made as they are needed.
    Raises as `align`. A step in which no token is a label is said and changes no weight.
    """
    trainable = select_trainable(student, run.train)
    describe(run, "stage II (distil)", student, trainable, run.distil_steps, mixture)
    optimizer = make_optimizer(trainable)
    first = load_checkpoint(run, "distil", trainable, optimizer)
    with Progress(run, "distil", first, run.distil_steps) as progress:
        for step in range(first, run.distil_steps):
            # ----- one step -----
            lr = learning_rate(step, run.distil_steps, run.warmup, run.lr, run.final_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            parts = my_micro_batches(run, step)
            batches = [collate(map(mixture.row, part), run.device) for part in parts]
            # The mean is over all labels of the step, so it must know their number first. Means of
            # micro-batches, averaged, would weigh a label the more, the fewer its row has.
            valid = all_sum(sum((labels != -100).sum() for _, _, labels in batches))
            sums = torch.zeros(3, device=run.device)  # ce, kl, whether to stop
            for part, batch in zip(parts, batches):
                targets = (stored.rows(map(mixture.locate, part), run.device) if stored else
                           teacher_targets(run, teacher, batch))
                loss, terms = distil_loss(run, student, batch, targets)
                share = (batch[2] != -100).sum() / valid.clamp_min(1)
                (loss * share * run.world).backward()  # FSDP2 takes the mean over processes
                sums[:2] += torch.stack((terms["ce"], terms["kl"])) * share
            sums[2] = bool(stop)
            ce, kl, stopping = all_sum(sums).tolist()
            norm = clip_gradients(trainable)
            if valid:
                check_finite(run, mixture, "distil", step, ce + kl, norm)
                optimizer.step()
                progress.log(step, lr=lr, norm=norm, ce=ce, kl=kl)
            else:
                for state in optimizer.state.values():  # AdamW counts this step too, since a
                    state["step"] += 1                  # resumed run sets its count to the run's
                progress.log(step, labels=0)
                tqdm.write(f"distil step {step + 1}: no token is a label, nothing was learnt from "
                           f"rows {rows_of_step(mixture, run, step)}")
            optimizer.zero_grad()
            # --------------------
            done = step + 1
            if done % run.save_every == 0 or stopping or done == run.distil_steps:
                save_checkpoint(run, "distil", done, trainable, optimizer)
                if stopping and done < run.distil_steps:
                    raise Stopped(f"stage II, step {done}")
            if done < run.distil_steps and done % run.eval_every == 0:
                found = compare(run, student, teacher or student, heldout)["all"]
                tqdm.write(f"held-out after {done} steps: " + (
                    show(found) if teacher else f"CE {number_or_dash(found['ce'])}"))


def rows_of_step(mixture, run, step):
    """[(source, row), ...] of a step, for who must look at what it has read."""
    rows = map(mixture.locate, range(step * run.batch, (step + 1) * run.batch))
    return [(mixture.sources[s].name, j) for s, j in rows]


def check_finite(run, mixture, stage, step, *values):
    """Before the update: weights and the last checkpoint stay good when a loss is not finite.

    values: losses and gradient norm. The norm counts too: a backward pass can overflow where the
    forward did not.
    """
    if not all(math.isfinite(float(v)) for v in values):
        raise ValueError(f"{stage} step {step + 1}: loss or gradient is not finite; no update was "
                         f"made. The last good state is in {run.out}; lower the learning rate in a "
                         "new --out, or look at what this step read, rows of "
                         f"{run.context} tokens: {rows_of_step(mixture, run, step)}")


# ----------------------------------------------------------------------------------------------
# 8. Memory and time: before a run, and while it goes on
# ----------------------------------------------------------------------------------------------
# Both are measured, not guessed. Memory: a step is run on tensors that have a shape and no storage,
# of a model of few layers, and what is alive is counted. Time: a micro-batch of each stage is run
# before the first step.


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it that are still alive, and their peak.

    Every operation passes through `__torch_dispatch__`. What it returns is counted by memory block,
    not by tensor, since a view costs nothing, and no longer when Python frees the block. What the
    C++ side of autograd keeps for the backward pass is such a tensor too, and so is counted.
    """

    now = peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # What shares its memory with an argument is a view of it, or was written in place.
        for storage in storages(out) - storages((args, kwargs)):
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, size):
        """A tensor of `size` bytes is gone."""
        self.now -= size


def storages(values):
    """The set of memory blocks behind all tensors in a nest of tuples and dicts."""
    return {x.untyped_storage() for x in tree_leaves(values) if isinstance(x, torch.Tensor)}


def working_bytes(run, config, stage, layers, weight_dtype):
    """What one micro-batch needs besides weights, gradients and optimiser state, at its peaks.

    By running it on tensors without storage, on a model cut to `layers` layers, with trained
    weights in `weight_dtype`. Returns the peaks of the forward and of the backward pass, in bytes:
    two, for they grow differently with the layers. Autocast keeps bf16 copies of all weights that
    train until the forward pass ends; the backward has its largest moment in one layer or the loss.
    """
    config = config.with_layers(layers)
    with FakeTensorMode(), torch.no_grad():
        student = Transformer(config)
        teacher = Transformer(dataclasses.replace(config, hybrid=None)).requires_grad_(False)
        for p in teacher.parameters():
            p.data = p.data.to(run.dtype)
        trainable = select_trainable(student, "new" if stage == "align" else run.train)
        for name, p in student.named_parameters():
            p.data = p.data.to(torch.float32 if is_new(name) else
                               weight_dtype if name in trainable else run.dtype)
            p.grad = torch.empty_like(p) if name in trainable else None  # counted as gradients
        batch = (torch.zeros(run.micro_batch, run.context, dtype=torch.long),) * 3
        targets = [torch.zeros(batch[0].numel(), run.topk, dtype=dtype)  # as TargetCache.rows
                   for dtype in (torch.int32, torch.float16)] if run.targets else None
        with LiveBytes() as live, torch.enable_grad():
            if stage == "align":
                with autocast(run):
                    alignment_losses(student, *batch[:2], 1.0)
                return live.peak, live.peak
            targets = targets or teacher_targets(run, teacher, batch)
            loss, _ = distil_loss(run, student, batch, targets)
            forward, live.peak = live.peak, live.now
            loss.backward()
            return forward, live.peak


def plan_memory(run, config, stage, stored=None):
    """Bytes that a step of `stage` ("align", "distil") needs on one process, by kind.

    config: the student's. Weights: fp32 where they train or the teacher is `stored` as "float32",
    else run.dtype. Under torchrun stage II's are sharded, and the block at work, the next one and
    the embeddings whole.
    "at work": activations, logits, casts of weights, temporary gradients (`working_bytes`).
    """
    sharded = stage == "distil" and "RANK" in os.environ
    itemsize = run.dtype.itemsize
    share = run.world if sharded else 1
    with torch.device("meta"):
        student = Transformer(config)
    sizes = {name: p.numel() for name, p in student.named_parameters()}
    total, copied = sum(sizes.values()), sum(n for name, n in sizes.items() if not is_new(name))
    trains = TRAIN["new" if stage == "align" else run.train]
    train = sum(n for name, n in sizes.items() if trains(name))
    frozen = 4 if stored == "float32" else itemsize
    needs = {"weights": (4 * train + frozen * (total - train)) // share,
             "gradients": 4 * train // share, "AdamW": 8 * train // share}
    if stage == "distil" and not run.targets:
        needs["teacher"] = frozen * copied // share
    if sharded:
        blocks = [sum(p.numel() for p in b.parameters()) for b in student.model["layers"]]
        # Whole, each with its gradients: embeddings and lm_head, and the two blocks.
        needs["gathered"] = itemsize * (2 * (total - sum(blocks)) + 4 * max(blocks))
    # By running few layers; all would take many minutes, at a third of a millisecond an operation.
    # Each peak grows by as much with every layer, the first aside: 2 and 3 tell of them all.
    weight_dtype = run.dtype if sharded else torch.float32
    few = min(2, config.num_layers)
    peaks = [working_bytes(run, config, stage, layers, weight_dtype)
             for layers in (few, min(3, config.num_layers))]
    needs["at work"] = max(a + (config.num_layers - few) * (b - a) for a, b in zip(*peaks))
    return needs | {"in all": sum(needs.values())}


def why_no_align(run):
    """Why the run has no stage I, or None.

    Only for a reason that the user gave, and that is printed: stage II on maps and gates that were
    never aligned starts from a worse student.
    """
    if run.start:
        return f"the run starts from {run.start}"
    if not run.align_tokens:
        return "--align-tokens 0"
    return "the mixer has no new parameters" if run.mixer == "swa" else None


def show_plan(run):
    """Print the memory that each stage needs; of the teacher it reads no weights."""
    directory = Path(run.start or run.teacher)
    config, hf = ModelConfig.from_hf(directory), read_json(directory / "config.json")
    stored = hf.get("dtype", hf.get("torch_dtype"))  # the key's new and old name
    if not run.start:
        config = student_config(config, run.window, run.sinks, run.mixer, run.features)
    print(f"memory of one process, GB, at {run.micro_batch} x {run.context} tokens at once:")
    for stage in ("distil",) if why_no_align(run) else ("align", "distil"):
        needs = plan_memory(run, config, stage, stored)
        print(f"  {stage:<7}" + "  ".join(f"{k} {v / 1e9:.3g}" for k, v in needs.items()))


def describe(run, title, student, trainable, steps, mixture):
    """Say what is about to train, before it does: a wrong --train, budget or weight shows here."""
    drawn = np.bincount(mixture.which, minlength=len(mixture.sources)).tolist()
    train, total = (sum(p.numel() for p in x) for x in (trainable.values(), student.parameters()))
    print(f"\n{title}: {steps} steps of {run.batch} x {run.context} tokens, "
          f"{steps * run.batch * run.context:,} in all\n  {train:,} of {total:,} parameters train "
          f"({train / total:.2%}), the others are frozen\n  times that each source is read: "
          + ", ".join(f"{s.name} {n / s.num_rows:,.2f}" for s, n in zip(mixture.sources, drawn)))
    if run.warmup >= steps:
        print(f"  All {steps} steps are warm-up, as --warmup is {run.warmup}: the learning rate "
              "reaches its peak in the last one")


def show_time(run, student, teacher, stored, students):
    """Before training: say how long each stage will take, and what to set if it is beyond a day.

    A micro-batch of each is run without an update, by what `align` and `distil` call for each of
    theirs: up to three times within a minute, and the best counts, as the first compiles kernels.
    Under torchrun stage II is sharded, which only its own steps, and their bar, can time.
    """
    _, mixture = next(iter(students.values()))  # any of them: rows are of one size
    part = my_micro_batches(run, 0)[0]
    batch = collate(map(mixture.row, part), run.device)
    distil_steps = sum(own.distil_steps for own, _ in students.values())
    for stage, which, steps, flag, budget, skipped in (
            ("align", "new", run.align_steps, "--align-tokens", run.align_tokens,
             why_no_align(run)),
            ("distil", run.train, distil_steps, "--tokens", run.tokens, dist.is_initialized())):
        if skipped:
            continue
        select_trainable(student, which)
        seconds, started = [], time.perf_counter()
        while len(seconds) < 3 and sum(seconds) < 60:
            if stage == "align":
                with autocast(run):
                    alignment_losses(student, *batch[:2], 1.0)
            else:
                targets = (stored.rows(map(mixture.locate, part), run.device) if stored else
                           teacher_targets(run, teacher, batch))
                distil_loss(run, student, batch, targets)[0].backward()
            if run.device.type == "cuda":
                torch.cuda.synchronize(run.device)  # until here its work is queued only
            seconds.append(time.perf_counter() - started - sum(seconds))
        student.zero_grad()
        speed, tokens = batch[0].numel() * run.world / min(seconds), run.batch * run.context
        days = steps * tokens / speed / 86400
        print(f"time      {stage}: about {tqdm.format_interval(days * 86400)} "
              f"(hours:minutes:seconds) at {speed:,.0f} tokens/s")
        if days > 1:
            print(f"          That is {days:,.0f} days. {flag} {budget / days:.1e} takes one, in "
                  f"{steps / days:,.1f} steps: hundreds are needed, with a smaller --batch and "
                  "--context there are more")
    student.requires_grad_(False)


class Progress(tqdm):
    """What a stage shows while it trains: a bar with the time left, and log.jsonl, a line a step.

    On a GPU the bar also has the largest memory so far, to hold against --plan.
    """

    def __init__(self, run, stage, first, steps):
        self.run, self.stage, self.tokens = run, stage, run.batch * run.context
        self.path = run.out / "log.jsonl"
        if run.rank == 0:
            drop_torn_line(self.path)
        super().__init__(desc=stage, total=steps * self.tokens, initial=first * self.tokens,
                         unit="tok", unit_scale=True, dynamic_ncols=True, disable=run.rank > 0)

    def log(self, step, **metrics):
        """A step is done: bar and log.jsonl (stage, step from 1, metrics)."""
        metrics = {key: float(value) for key, value in metrics.items()}
        if self.run.device.type == "cuda":
            metrics["peak_GB"] = torch.cuda.max_memory_allocated(self.run.device) / 1e9
        self.update(self.tokens)
        self.set_postfix({key: f"{value:.3g}" for key, value in metrics.items()})
        if self.run.rank == 0:
            append_json(self.path, {"stage": self.stage, "step": step + 1, **metrics})


def report(results):
    """The final table: one line a model, held-out numbers, KL also per source; "-" for none.

    Per source, because a mean hides what linear attention is bad at: to recall what is far back.
    """
    names = [n for n in next(iter(results.values())) if n != "all"]
    width = max(8, *map(len, names))
    print("\nheld-out            CE  KL to teacher  top-1 agreement   KL on:"
          + "".join(f" {n:>{width}}" for n in names))
    for model, found in results.items():
        ce, kl, top1 = (number_or_dash(found["all"][key]) for key in METRICS)
        print(f"{model:<16}{ce:>7} {kl:>14} {top1:>16}        "
              + "".join(f" {number_or_dash(found[n]['kl']):>{width}}" for n in names))


def show_samples(run, folder, tokenizer, heldout):
    """One greedy continuation per source, the teacher's and the student's."""
    # Half a row of the first: a student that only copies what stands near shows it here.
    prompts = [torch.from_numpy(source.row(0)[0][None, :run.context // 2]).long().to(run.device)
               for source in heldout]
    said = {}
    for name, directory in ("teacher", run.teacher), ("student", folder):
        model, _ = load_with_tokenizer(directory, device=run.device)  # whole: FSDP2 cannot generate
        said[name] = [generate(model, p, max_new_tokens=48)[0, p.shape[1]:] for p in prompts]
    for i, (source, prompt) in enumerate(zip(heldout, prompts)):
        print(f"\n[{source.name}] ...{tokenizer.decode(prompt[0, -24:].tolist())!r}")
        for name, ids in said.items():
            print(f"  {name}: {tokenizer.decode(ids[i].tolist())!r}")


# ----------------------------------------------------------------------------------------------
# 9. A student, or experts and their merger
# ----------------------------------------------------------------------------------------------


def open_model(run, directory, train=None):
    """A model as stage II uses it, sharded over torchrun's processes.

    What trains ("new", "mixer", "all"; None: nothing) is in fp32, since bf16 weights would lose an
    AdamW step of 1e-5; the rest as `frozen_dtype`.
    """
    def dtype(name):
        return torch.float32 if train and TRAIN[train](name) else frozen_dtype(run)

    prepare = partial(shard, device=run.device, dtype=run.dtype) if dist.is_initialized() else None
    return load_pretrained(directory, device=run.device, dtype=dtype, kernels=run.kernels,
                           prepare=prepare).requires_grad_(False)


def new_student(run, teacher):
    """The student before training, or for --start the one to go on from; says what it is.

    A new student shares its teacher's weights. That --start is another teacher's seed, of the same
    shape (`check_models`), can only be told by its weights, and is said.
    """
    if run.start:
        student = open_model(run, run.start)
        for name, p in teacher.named_parameters():
            rows, first = local_rows(student.get_parameter(name).detach())
            if not torch.equal(rows, p[first:first + len(rows)].to(rows.dtype)):
                print(f"student   --start {run.start} has other weights than {run.teacher}: it has "
                      "been through stage II, or is another teacher's")
                break
    else:
        student = student_from_teacher(teacher, window=run.window, sinks=run.sinks, mixer=run.mixer,
                                       features=run.features, kernels=run.kernels)
    select_trainable(student, run.train)  # refuses what has nothing to train
    student.requires_grad_(False)
    hybrid, attention = student.config.hybrid, student.model["layers"][0].self_attn
    if run.start:
        print(f"student   as in --start {run.start}, whatever --mixer, --window, --sinks and "
              "--features say")
    print(f"student   mixer {hybrid.mixer}"
          + f", window {hybrid.window}, {hybrid.sinks} sinks" * bool(attention.short_window)
          + f", {hybrid.features} x head_dim features" * bool(attention.state_heads)
          + f"; on {run.device} in {str(run.dtype)[6:]}, kernels: {student.kernels}")
    return student


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
        steps = run.distil_steps * len(names)
        plans["generalist"] = [1] * len(names), steps, run.out / "generalist"
    # Each is a run of its own below --out, with its own checkpoints: a stop loses no expert.
    students = {}
    for name, (shares, steps, out) in plans.items():
        own = argparse.Namespace(**vars(run) | {"out": out, "distil_steps": steps})
        # Another seed than stage I's, or both stages would begin with the same rows.
        mixture = Mixture(sources, shares, steps * run.batch, run.seed + 1,
                          reorder=not run.targets)  # stored targets are of one order
        students[name] = own, mixture
    return students


def stage_one(run, student, sources, weights, stop):
    """Stage I, unless it is done or not wanted; returns the seed's folder.

    The seed is the student as stage II finds it, aligned or not: experts are trained from one seed,
    and merge.py refuses those that are not.
    """
    seed, skipped = run.start or run.out / "seed", why_no_align(run)
    if skipped:
        print(f"stage I is skipped: {skipped}")
    if not skipped and not seed.exists():
        align(run, student, Mixture(sources, weights, run.align_steps * run.batch, run.seed), stop)
    once(run, seed, lambda: save_pretrained(student, seed))
    if run.rank == 0:
        for old in checkpoints(run, "align"):
            shutil.rmtree(old)
    return seed


def stage_two(run, seed, teacher, stored, mixture, heldout, stop):
    """Stage II: the student folder `seed` -> run.out/student, unless that exists; returns it.

    Its weights are loaded anew: stage I's student shares the teacher's, which must not train.
    """
    final = run.out / "student"
    if not final.exists():
        distil(run, open_model(run, seed, run.train), teacher, stored, mixture, heldout, stop)
    once(run, final, lambda: export_student(run, seed, final))
    if run.rank == 0:
        shutil.rmtree(run.out / "checkpoints", ignore_errors=True)
    return final


def export_student(run, seed, final):
    """`seed` with the weights of stage II's last checkpoint, in the seed's precision -> `final`.

    Tensor by tensor from the checkpoint's files: nobody has to hold the fp32 weights whole.
    """
    student = load_pretrained(seed)
    files = open_state(checkpoints(run, "distil")[-1], "weight")
    for name in files[0].keys():
        p = student.get_parameter(name)
        p.data = read_whole(files, name).to(p.dtype)
    # merge.py refuses experts that do not share a seed.
    files = {file for file, _ in list_tensors(seed).values()}
    lineage = {"seed_sha256": sha256(*sorted(files))}
    save_pretrained(student, final, extra={"lineage.json": lineage})


# ----------------------------------------------------------------------------------------------
# 10. The command
# ----------------------------------------------------------------------------------------------
# The shipped teacher's preset: what differs from the paper's settings below when --teacher is not
# given. A window of 16 makes its context of 512 tokens long. Paper: loss .9 CE + .1 KL. Here: the
# reverse, because this teacher was trained on this very text: CE teaches the student things that
# the teacher does not do, and pulls it away. Paper: a constant rate in stage II. Here: it falls to
# 0, which lets a short run start higher (4 D: KL .104 at a constant 3e-4, .099 at 5e-4 falling).
# Features of 8 D, as its heads are 32 wide (KL .094 and .088 in two seeds; .107 with 4 D). A third
# of the text is sums, which a student can do from the start (KL .007): weighed by size they would
# take a third of every batch from what is hard (README, "The student's memory").
SMALL = dict(
    teacher=HERE / "tests/teacher", out=Path("out"), context=512, window=16, features=8, batch=4,
    micro_batch=4, align_tokens=655_360, align_lr=3e-2, tokens=655_360, lr=5e-4, final_lr=0.0,
    gamma=0.1, beta=0.9, warmup=20, eval_every=100, save_every=100, recompute=False,
    data=[(HERE / f"tests/teacher/data/{name}.jsonl", weight) for name, weight in (
        ("code", 0.35), ("math", 0.05), ("prose", 0.25), ("recall", 0.35))])
# The merged student's C_0 is .6 and .7 in two seeds, after a stage I half as long .6 and .5; with
# half of the tokens an expert as well, .4.
SMALL_EXPERTS = dict(
    out=Path("out-experts"), align_tokens=1_310_720, tokens=409_600,
    tasks=sorted(str(p) for p in (HERE / "tests/tasks").glob("*.jsonl")))


def data_file(spec):
    """An argparse type: FILE[=WEIGHT] -> (path, weight or None)."""
    found = re.fullmatch(r"(.+\.(?:txt|jsonl))(?:=(.*))?", spec)
    if not found:
        raise argparse.ArgumentTypeError(f"{spec}: expected FILE.txt or FILE.jsonl, or FILE=WEIGHT")
    if not Path(found[1]).is_file():
        raise argparse.ArgumentTypeError(f"{spec}: there is no file {found[1]}")
    return Path(found[1]), None if found[2] is None else number(float, 1e-9)(found[2])


COUNT = dict(type=number(int, 1), metavar="N")
AMOUNT = dict(type=number(float, 0), metavar="N")


def parse_arguments(argv):
    """The command line -> settings; without --teacher the small preset comes before the paper's.

    The paper's defaults stand here, and --help prints these; what the shipped teacher has instead
    stands in SMALL. ArgumentParser ends the process with status 2 and one sentence when a value
    does not fit.
    """
    p = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Distil a Transformer into a hybrid xLSTM student. Without --teacher: the "
        "shipped one, with a small preset (SMALL in distill.py) in place of the defaults below, "
        "which are the paper's but for --features.",
        usage="distill.py [--teacher DIR --data FILE... --out RUN] [options]")
    add_run_flags(p.add_argument_group("the run").add_argument)
    add = p.add_argument_group("student").add_argument
    add("--mixer", default="hybrid", choices=MIXERS, help="the paper's, or a part of it alone")
    add("--window", default=512, help="tokens that the window sees", **COUNT)
    add("--sinks", default=4, type=number(int, 0), metavar="N", help="first tokens, seen as well")
    add("--features", default=4, type=int, choices=(1, 2, 4, 8), help="mLSTM width, in head widths")
    add = p.add_argument_group("both stages").add_argument
    add("--context", default=4096, type=number(int, 2), metavar="N", help="tokens a row")
    add("--batch", default=64, help="rows a step", **COUNT)
    add("--micro-batch", default=1, help="rows in a process's memory at once", **COUNT)
    add("--warmup", default=100, help="steps of rising learning rate", **COUNT)
    add("--save-every", default=200, help="steps between checkpoints", **COUNT)
    add = p.add_argument_group("stage I (align)").add_argument
    add("--align-tokens", default="655e6", help="to train on; 0: no stage I", **AMOUNT)
    add("--align-lr", default=1e-2, help="its peak; a cosine falls to a thousandth", **AMOUNT)
    add("--start", type=Path, metavar="DIR", help="no stage I: this student, such as a run's seed/")
    add_distil_flags(p.add_argument_group("stage II (distil)").add_argument)

    known = p.parse_known_args(argv)[0]
    if known.teacher is None:
        p.set_defaults(**SMALL | (SMALL_EXPERTS if known.experts else {}))
    run = p.parse_args(argv)
    run.final_lr = run.lr if run.final_lr is None else run.final_lr
    return run


def add_run_flags(add):
    """The flags of a run as a whole: what is read, where it goes, on what it runs."""
    add("--teacher", type=Path, metavar="DIR", help="Hugging Face folder; None: the shipped one")
    add("--data", nargs="+", type=data_file, metavar="FILE[=WEIGHT]", help=".txt or .jsonl")
    add("--out", type=new_folder, metavar="RUN", help="folder of the run")
    add("--resume", action="store_true", help="go on from the last checkpoint of --out")
    add("--plan", action="store_true", help="print the memory that a step needs, and stop")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="of products; auto: bfloat16 on GPUs and on CPUs with AMX or AVX512's bf16")
    add("--kernels", default="auto", choices=("auto", "torch", "triton"),
        help="what computes mLSTM, window and feature maps; auto: Triton on a GPU")
    add("--seed", default=0, type=number(int, 0), metavar="N", help="of the order of the data")
    add("--tasks", default=[], nargs="+", metavar="FILE", help="score the students on these")
    add("--eval-every", default=500, help="stage II's steps between held-out checks", **COUNT)
    add("--eval-rows", default=16, help="held-out rows a source", **COUNT)


def add_distil_flags(add):
    """The flags of stage II, from the budget over the loss to where the teacher's words come from.

    --gamma and --beta matter by their ratio above all, as AdamW divides by the gradient's size.
    """
    add("--tokens", default="5e9", type=number(float, 1), metavar="N", help="to train on")
    add("--lr", default=1e-5, help="learning rate after warm-up", **AMOUNT)
    add("--final-lr", help="what a cosine takes it to; None: --lr, so constant", **AMOUNT)
    add("--train", default="all", choices=TRAIN, help="new parameters, all of the mixer, or all")
    add("--recompute", default=True, action=argparse.BooleanOptionalAction,
        help="keep only the blocks' inputs and run each block again in the backward")
    add("--gamma", default=0.9, help="weight of next-token CE", **AMOUNT)
    add("--beta", default=0.1, help="weight of KL to the teacher", **AMOUNT)
    add("--topk", default=256, help="teacher's tokens in the KL", **COUNT)
    add("--targets", type=new_folder, metavar="DIR",
        help="the teacher's top k on disk, in its place")
    add("--experts", action="store_true", help="an expert of --tokens per --data file, a "
        "generalist of as many as all experts, and the merged experts (Eq. 14)")


def check_arguments(run):
    """Refuse flags that cannot work, and task files that cannot be scored, before data is read."""
    if (run.data is None or run.out is None) and not run.plan:
        raise ValueError("--teacher DIR also needs --data FILE... and --out DIR")
    names = [path.stem for path, _ in run.data or ()]
    taken = {"data", "seed", "checkpoints", "generalist", "merged", "report", "all", "teacher",
             "entry", "start", "after stage I", "run.json", "results.json", "log.jsonl",
             "manifest.json", "student", ".", ".."}
    if len(set(names)) < len(names) or taken & set(names):
        raise ValueError(f"--data: the files' names {names} name sources, folders and rows of the "
                         f"run; they must differ and be none of {sorted(taken)}: rename a file")
    if len({weight is None for _, weight in run.data or ()}) > 1:
        raise ValueError("--data: give every file a =WEIGHT or none (those without are weighed by "
                         "their tokens, beside which a weight of 2 is nothing)")
    if run.targets and run.out and run.targets.resolve().is_relative_to(run.out.resolve()):
        own = run.targets.resolve().relative_to(run.out.resolve()).parts[:1]
        if not own or own[0] in {"data", "seed", "student", "checkpoints", "generalist", "merged",
                                 "report", *names}:
            raise ValueError(f"--targets {run.targets} is a folder of the run itself: name another")
    if run.experts and len(names) < 2:
        raise ValueError("--experts needs two --data files or more: an expert for each")
    if run.tasks:
        # What would stop the scoring stops here, hours before.
        evaluate.read_tasks(run.teacher, run.tasks)
    if run.gamma + run.beta == 0:
        raise ValueError("--gamma and --beta must not both be 0")


def check_models(run):
    """Refuse a --teacher or --start that cannot be one, by its config.json; bound --topk."""
    config = ModelConfig.from_hf(run.teacher)
    if config.hybrid:
        raise ValueError(f"--teacher {run.teacher} is a student itself (it has \"hybrid\" in its "
                         "config.json): name its teacher")
    start = run.start and ModelConfig.from_hf(run.start)
    if start and (not start.hybrid or dataclasses.replace(start, hybrid=None) != config):
        raise ValueError(f"--start {run.start}: its config.json is not of a student of "
                         f"{run.teacher}")
    if run.topk > config.vocab_size:
        print(f"--topk    {run.topk} is more than the vocabulary: all {config.vocab_size} count")
        run.topk = config.vocab_size


def settings_of(run):
    """What --resume must find unchanged, as JSON: all settings but those in `free`.

    Those change no number, or by rounding alone: devices, processes, formats, memory.
    """
    free = ("out", "resume", "device", "save_every", "eval_every", "plan",
            "micro_batch", "recompute", "rank", "world", "kernels", "dtype")
    if run.start:  # whose student is what its folder says, whatever the flags
        free += "mixer", "window", "sinks", "features"
    return {k: v for k, v in vars(run).items() if k not in free} | {
        "targets": bool(run.targets), "teacher": str(run.teacher.resolve()),
        "teacher_sha256": model_sha256(run.teacher),
        "start": str(run.start), "start_sha256": run.start and model_sha256(run.start),
        "data": [[path.name, weight] for path, weight in run.data],  # wherever it lies:
        "data_sha256": [sha256(path) for path, _ in run.data]}


def open_run(run):
    """Refuse an --out of another run, or for --resume of other settings; return its results.

    results: the rows of the table that a resumed run has measured already; {} for a new run.
    """
    path, results = run.out / "run.json", run.out / "results.json"
    if not run.resume:
        if path.exists():
            raise ValueError(f"--out {run.out} holds a run already; add --resume to go on with it, "
                             "or name another folder")
        # What a run finds finished it does not do again, and these would be another's.
        folders = "", "generalist/", *(f"{file.stem}/" for file, _ in run.data)
        names = "config.json", "seed", "merged", *(
            x + y for x in folders for y in ("student", "checkpoints"))
        parts = [name for name in names if (run.out / name).exists()]
        if parts:
            raise ValueError(f"--out {run.out} has parts of another run ({', '.join(parts)}) and "
                             "no run.json; name another folder, or delete them")
        return {}
    if not path.exists():
        raise FileNotFoundError(f"--resume: {path} does not exist; is {run.out} a run's folder?")
    if changed := changes(read_json(path), settings_of(run)):
        raise ValueError(f"--resume: {run.out} was made with other settings: {changed}")
    return read_json(results) if results.exists() else {}


def load(run):
    """Teacher, its tokenizer, its student and the data, training and held-out; says what they are.

    One process tokenises, which takes all cores anyway; the others wait and find it done.
    """
    teacher, tokenizer = load_with_tokenizer(run.teacher, device=run.device,
                                             dtype=frozen_dtype(run))
    teacher.requires_grad_(False)
    print(f"teacher   {run.teacher} ({teacher.config.family}, "
          f"{sum(p.numel() for p in teacher.parameters()):,} parameters)")
    if run.context > teacher.config.max_positions:
        print(f"          --context {run.context} is longer than the {teacher.config.max_positions}"
              " tokens that it reads (max_position_embeddings): what it says there is a guess")
    eos_ids = teacher.config.eos_ids
    if not eos_ids:
        print("          its config.json names no eos_token_id: texts end without a token for it")
    student = new_student(run, teacher)
    if run.rank > 0:
        barrier()
    data = open_data(run, tokenizer, eos_ids[0] if eos_ids else None)
    if run.rank == 0:
        barrier()
    return teacher, tokenizer, student, *data


def measure(run, results, name, model, teacher, heldout):
    """A model's row of the table, unless a resumed run has it already; all rows to results.json.

    model: or its folder. teacher: None where stored targets replace it in training; then it is
    loaded for this alone.
    """
    if name not in results:
        model = open_model(run, model) if isinstance(model, Path) else model
        found = compare(run, model, teacher or open_model(run, run.teacher), heldout)
        if not all(math.isfinite(x or 0) for x in found["all"].values()):
            raise ValueError(f"{name}: the losses are not finite. Are weights damaged, or was a "
                             "learning rate too high? Lower it in a new --out")
        results[name] = found
        if run.rank == 0:
            write_json(run.out / "results.json", results)
    print(f"held-out, {name}: {show(results[name]['all'])}")


def main(argv=None):
    """One run from top to bottom: load, measure, align, distil, report.

    Each step finds on disk what an earlier run has finished of it, and skips that: --resume is the
    same walk. Raises ValueError or OSError in a sentence for the user, and Stopped.
    """
    run, started = parse_arguments(argv), time.time()
    check_arguments(run)
    start_processes(run)
    check_models(run)
    run.micro_batch = min(run.micro_batch, run.batch // run.world)  # --plan counts what will run
    if run.plan:
        return show_plan(run)
    run.align_steps = math.ceil(run.align_tokens / (run.batch * run.context))
    run.distil_steps = math.ceil(run.tokens / (run.batch * run.context))
    # Everything that can be refused comes before anything is written into --out but the data.
    results = open_run(run)
    teacher, tokenizer, student, sources, weights, heldout = load(run)
    students, stored = plan_students(run, sources, weights), None
    stop = catch_stop()  # from here on Ctrl-C and SIGTERM let a step end first
    if run.targets:
        mixtures = [mixture for _, mixture in students.values()]
        stored = prepare_targets(run, teacher, mixtures, stop)
    if not run.resume:
        if run.device.type == "cuda":  # where memory is short; it takes seconds
            show_plan(run)
        show_time(run, student, teacher, stored, students)
    # Only now: a refused run leaves none.
    once(run, run.out / "run.json", lambda: write_json(run.out / "run.json", settings_of(run)))

    measure(run, results, "teacher", teacher, teacher, heldout)
    if not run.start:  # the student before any training
        measure(run, results, "entry", student, teacher, heldout)
    seed = stage_one(run, student, sources, weights, stop)
    if run.start or not why_no_align(run):  # of --start too: what stage II begins with
        name = "start" if run.start else "after stage I"
        measure(run, results, name, seed, teacher, heldout)

    # Stage I needed the teacher whole. Stage II shards it, or does without.
    student, folders = None, {}
    if stored:
        teacher = None
    elif dist.is_initialized():
        teacher = open_model(run, run.teacher)
    for name, (own, mixture) in students.items():
        if run.experts:
            print(f"\n===== {name} =====")
            once(run, own.out, own.out.mkdir)
        folders[name] = stage_two(own, seed, teacher, stored, mixture, heldout, stop)
        measure(run, results, name, folders[name], teacher, heldout)
    if run.experts:  # the mean of the experts, without the generalist that they are compared with
        experts, folders["merged"] = list(folders.values())[:-1], run.out / "merged"
        once(run, folders["merged"], lambda: merge(experts, folders["merged"]))
        measure(run, results, "merged", folders["merged"], teacher, heldout)
    teacher = None
    for which in (signal.SIGINT, signal.SIGTERM):  # nothing polls `stop` from here on
        signal.signal(which, signal.SIG_DFL)
    if stop:
        raise Stopped("training")
    if run.rank == 0:
        finish(run, folders, results, tokenizer, heldout, started)


def finish(run, folders, results, tokenizer, heldout, started):
    """The table, continuations, --tasks, and where everything is."""
    report(results)
    *_, final = folders.values()
    show_samples(run, final, tokenizer, heldout)
    if run.tasks:  # recovery, C_0 and alpha* (Eq. 15-17)
        students = [f"--student={folder}" for folder in folders.values()]  # "=": -x is a folder
        evaluate.main(["compare", f"--teacher={run.teacher}", *students, "--tasks", *run.tasks,
                       f"--out={run.out / 'report'}", "--device", str(run.device)])
    print(f"\n{time.time() - started:.0f} s. The student is in {final}: model.load_pretrained opens"
          f" it, `python model.py {final}` talks to it")


def command(argv=None):
    """`main` for a shell, by `model.run_command`; a stopped run is no error. Ends the process."""
    try:
        run_command(partial(main, argv), memory="--plan tells what a step needs; a smaller "
                    "--micro-batch, --context or --tokens needs less")
    except Stopped as where:
        done, *remedy = where.args
        print(f"stopped after {done}; go on with", *remedy or ["the same command and --resume"])
    except SystemExit as end:
        leave(end.code)
    leave(0)


if __name__ == "__main__":
    command()
