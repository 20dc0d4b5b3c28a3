"""distill.py: packing, mixtures, losses against autograd, exact resume, and what it refuses."""

import contextlib
import copy
import dataclasses
import glob
import io
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import distill
import one_layer
from distill import (Mixture, Source, alignment_losses, collate, learning_rate, open_data,
                     read_text, sparse_kd_loss, teacher_topk, tokenise)
from model import (Attention, Tokenizer, document_starts, is_new, load_pretrained, save_tensors,
                   sha256, student_from_teacher)

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "tests/teacher"
SMALL = None  # set below
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums in one order: losses can be bit-equal


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TEACHER)


@pytest.fixture(scope="module")
def teacher():
    return load_pretrained(TEACHER).requires_grad_(False)


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    """SMALL, the shipped teacher's first two layers: a run's course takes half the time.

    Trained ones, not random: without its softmax a random teacher says nearly the same.
    """
    global SMALL
    SMALL = tmp_path_factory.mktemp("teacher")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TEACHER / name, SMALL)
    config = json.loads((TEACHER / "config.json").read_text())
    (SMALL / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    save_tensors({name: p for name, p in load_pretrained(TEACHER).named_parameters()
                  if not re.search(r"layers\.[23]\.", name)}, SMALL / "model.safetensors")


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def words(rng, n):
    return " ".join("".join(rng.choice(list("abcdefgh"), 3)) for _ in range(n))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rng = np.random.default_rng(0)
    return write_rows(tmp_path_factory.mktemp("corpus") / "a.jsonl",
                      [words(rng, int(rng.integers(1, 120))) for _ in range(300)])


# ------------------------------------------------------------------ data


def test_rows_hold_every_document_once_and_in_order(tmp_path, corpus, tokenizer):
    folder = tokenise(corpus, tokenizer, 1023, tmp_path / "data")
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    stream = {}
    for split in ("train", "heldout"):
        source = Source("a", folder, split, 64, distill.held_out_hashes(folder, 0.1))
        rows = [source.row(i) for i in range(source.num_rows)]
        for row, following in zip(rows, rows[1:]):  # the label-only token is the next row's first
            assert row[0][-1] == following[0][0] and row[1][-1] == following[1][0]
        tokens = np.concatenate([r[0][:-1] for r in rows])
        ids = np.concatenate([r[1][:-1] for r in rows])
        whole = np.unique(ids)[:-1]  # the last may be cut
        stream[split] = {tokenizer.decode(tokens[ids == d][1:-1]) for d in whole}  # no BOS, EOS
        assert all(tokens[ids == d][0] == tokenizer.bos_id and tokens[ids == d][-1] == 1023
                   for d in whole)
    assert stream["train"] | stream["heldout"] <= set(texts)
    assert not stream["train"] & stream["heldout"]
    assert len(stream["train"]) >= 260 and len(stream["heldout"]) >= 25


def test_copies_of_a_document_stay_on_one_side(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    texts = [words(rng, 40) for _ in range(50)]
    folder = tokenise(write_rows(tmp_path / "a.jsonl", texts * 3), tokenizer, None, tmp_path / "d")
    sides = [{tuple(source.tokens[s:s + n]) for s, n in zip(source.starts, source.lengths)}
             for source in (Source("a", folder, split, 64, distill.held_out_hashes(folder, 0.1))
                            for split in ("train", "heldout"))]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_what_one_file_holds_out_no_other_trains_on(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    texts = [words(rng, 80) for _ in range(1200)]
    files = [(write_rows(tmp_path / f"{n}.jsonl", rows), None)
             for n, rows in (("a", texts[:300]), ("b", texts))]
    train, _, heldout = open_data(
        Namespace(data=files, out=tmp_path, context=64, experts=False, eval_rows=1), tokenizer,
        1023)
    train, heldout = ({tuple(s.tokens[a:a + n]) for s in sources
                       for a, n in zip(s.starts, s.lengths)} for sources in (train, heldout))
    assert not train & heldout and len(train | heldout) == 1200 and len(heldout) >= 24


def test_labels_stop_at_document_ends_and_skip_masked_tokens():
    row = (np.arange(7), np.array([0, 0, 0, 1, 1, 2, 2]), np.array([1, 1, 0, 1, 1, 1, 1], bool))
    tokens, ids, labels = collate([row], "cpu")
    assert tokens.tolist() == [[0, 1, 2, 3, 4, 5]] and ids.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert labels.tolist() == [[1, -100, -100, 4, -100, 6]]


def test_specials_in_plain_text_stay_text(tmp_path, tokenizer):
    special = next(iter(tokenizer.added))
    path = write_rows(tmp_path / "a.jsonl", [f"before {special} after"] * 2)
    folder = tokenise(path, tokenizer, None, tmp_path / "d")
    ids = np.fromfile(folder / "tokens.bin", np.uint32)
    assert (ids == tokenizer.added[special]).sum() == (
        2 if tokenizer.added[special] == tokenizer.bos_id else 0)  # the BOS in front, no other


def test_text_files_are_cut_at_line_ends_and_lose_nothing(tmp_path):
    text = "".join(f"line {i} of a text é\n" for i in range(3000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = [piece for _, piece in read_text(tmp_path / "a.txt")]
    assert len(found) > 20 and "".join(found) == text
    assert all(piece.endswith("\n") for piece in found)


def test_a_text_without_line_ends_is_cut_between_characters(tmp_path):
    for unit in ("word € ", "€"):
        text = unit * 60_000
        path = tmp_path / "a.txt"
        path.write_text(text, encoding="utf-8")
        found = [piece for _, piece in read_text(path)]
        assert "".join(found) == text and max(len(piece.encode()) for piece in found) < 1 << 17
        parts = [piece for a, b in ((0, 100_001), (100_001, None))  # inside a character
                 for _, piece in read_text(path, a, b)]
        assert "".join(parts) == text


@pytest.fixture(scope="module")
def many_parts(tmp_path_factory):
    """A .jsonl and a .txt file; with PART = 3000 about thirty parts each."""
    folder, rng = tmp_path_factory.mktemp("parts"), np.random.default_rng(1)
    rows = [words(rng, int(rng.integers(1, 200))) for _ in range(200)]
    text = folder / "t.txt"
    text.write_text("".join(words(rng, 12) + " é\n" for _ in range(1800)), encoding="utf-8")
    return write_rows(folder / "r.jsonl", rows + ["long " * 3000] + rows[:9]), text


def read_files(folder):
    return {name: (folder / name).read_bytes() for name in distill.FILES}


@pytest.fixture
def forked(monkeypatch):
    """Workers are forked, which takes no seconds of imports; one test below spawns them."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(distill.multiprocessing, "get_context", lambda kind: context)


@pytest.mark.parametrize("file, workers", [(0, 1), (0, 2), (1, 2)])
def test_tokens_do_not_depend_on_the_number_of_processes(tmp_path, tokenizer, monkeypatch, request,
                                                         many_parts, file, workers):
    path = many_parts[file]
    monkeypatch.setattr(distill, "PART", 3000)
    if path.suffix == ".txt":
        request.getfixturevalue("forked")  # the .jsonl's are spawned
    found = read_files(tokenise(path, tokenizer, 1023, tmp_path / "some", workers))
    if path.suffix == ".jsonl":  # parts begin at rows: they change nothing
        monkeypatch.setattr(distill, "PART", 1 << 25)
    assert found == read_files(tokenise(path, tokenizer, 1023, tmp_path / "one", 1))


def test_a_killed_tokenisation_goes_on_where_it_stopped(tmp_path, tokenizer, monkeypatch,
                                                         many_parts):
    monkeypatch.setattr(distill, "PART", 3000)
    path, _ = many_parts
    whole = tokenise(path, tokenizer, 1023, tmp_path / "whole", 1)
    made, part = [], distill.tokenise_part
    for _ in range(2):  # each dies in its eighth part
        child = os.fork()
        if child == 0:
            def die_in_the_eighth(*args):
                made.append(args)
                if len(made) == 8:
                    with distill.replacing(args[3]) as file:
                        file.write(b"half of a part")
                        os.kill(os.getpid(), signal.SIGKILL)
                part(*args)
            monkeypatch.setattr(distill, "tokenise_part", die_in_the_eighth)
            tokenise(path, tokenizer, 1023, tmp_path / "d", 1)
            os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    [left] = (tmp_path / "d").iterdir()
    assert left.suffix == ".tmp"
    monkeypatch.setattr(distill, "tokenise_part", lambda *args: made.append(part(*args)))
    resumed = tokenise(path, tokenizer, 1023, tmp_path / "d", 1)
    assert len(made) == -(-path.stat().st_size // 3000) - 14  # seven parts each, none again
    assert resumed.name == whole.name and read_files(resumed) == read_files(whole)
    assert sorted(p.name for p in resumed.iterdir()) == sorted(distill.FILES)


def test_a_killed_worker_is_one_sentence(tmp_path, tokenizer, monkeypatch, many_parts,
                                           forked):
    monkeypatch.setattr(distill, "PART", 3000)
    path, _ = many_parts
    monkeypatch.setattr(distill, "partial", lambda f, *args: _die)
    with pytest.raises(OSError, match="r.jsonl: a process that tokenised it was killed.*goes on"):
        tokenise(path, tokenizer, 1023, tmp_path / "d", 2)


def _die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_do_not_outlive_a_killed_parent(tmp_path, tokenizer, monkeypatch, many_parts,
                                               forked):
    monkeypatch.setattr(distill, "PART", 3000)
    path, _ = many_parts
    started = tmp_path / "started"
    parent = os.fork()
    if parent == 0:
        monkeypatch.setattr(distill, "partial", lambda f, *args: partial(_wait, started))
        tokenise(path, tokenizer, 1023, tmp_path / "d", 2)
        os._exit(1)
    deadline = time.time() + 120
    while not started.exists():
        assert time.time() < deadline
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    while is_running(int(started.read_text())):
        assert time.time() < deadline
        time.sleep(0.01)


def _wait(started, *args):
    write = started.with_name(f"{os.getpid()}")
    write.write_text(f"{os.getpid()}")
    os.replace(write, started)
    time.sleep(600)


def is_running(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_row_is_named_by_its_line_in_any_part(tmp_path, tokenizer, monkeypatch, workers,
                                                    many_parts, forked):
    monkeypatch.setattr(distill, "PART", 3000)
    path, text = many_parts
    for path, bad in ((path, b'{"text": "half'), (path, b'{"text": "\xff"}'), (text, b"\xff"),
                      (path, b'{"dna": "ACGX"}')):
        lines = path.read_bytes().splitlines()
        for at in (2, len(lines)) if workers == 1 else (150,):
            broken = tmp_path / f"broken{path.suffix}"
            broken.write_bytes(b"\n".join([*lines[:at - 1], bad, *lines[at - 1:]]) + b"\n")
            with pytest.raises(ValueError, match=f"broken{path.suffix}:{at}: .*(not |no DNA)"):
                tokenise(broken, tokenizer, 1023, tmp_path / "d", workers)
            assert not list((tmp_path / "d").glob("*"))


def test_a_character_without_a_token_is_named_by_its_line(tmp_path, tokenizer, monkeypatch):
    def refuse(text, **options):
        if "X" in text:
            raise ValueError("vocab.txt has no token 'X'")
        return [1, 2, 3]

    monkeypatch.setattr(tokenizer, "encode", refuse)
    path = write_rows(tmp_path / "a.jsonl", ["ACGT", "ACXT"])
    with pytest.raises(ValueError, match="a.jsonl:2: vocab.txt has no token 'X'"):
        tokenise(path, tokenizer, None, tmp_path / "d", 1)


def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer):
    rows = write_rows(tmp_path / "a.jsonl", ["one é", "two"])
    (tmp_path / "a.txt").write_text("one é\ntwo\n", encoding="utf-8")
    for path in (rows, tmp_path / "a.txt"):
        marked = tmp_path / f"marked{path.suffix}"
        marked.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        plain, found = (tokenise(p, tokenizer, 1023, tmp_path / "d", 1) for p in (path, marked))
        assert read_files(plain) == read_files(found)


def test_a_split_without_a_label_is_refused_and_skipped_turns_are_counted(
        tmp_path, tokenizer, monkeypatch, capsys):
    """Otherwise its losses are means over nothing: 0, which looks like success."""
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": [{"content": f"{i} " * 9}]}) + "\n"
                            for i in range(200)))
    run = Namespace(data=[(path, None)], out=tmp_path / "none", context=64, experts=False,
                    eval_rows=1)

    def parts(learnt):
        monkeypatch.setattr(tokenizer, "render_chat_parts", lambda messages, tools: (
            [("<u>", False), (messages[0]["content"], learnt)], 3))

    parts(False)
    with pytest.raises(ValueError, match="chat.jsonl: none of the .* train tokens is to be lea"):
        open_data(run, tokenizer, 1023)
    parts(True)
    run.out = tmp_path / "all"
    open_data(run, tokenizer, 1023)
    assert "600 of its assistant's turns are read and not learnt" in capsys.readouterr().out


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(distill, "PART", 10_000)
    whole = read_files(tokenise(corpus, tokenizer, 1023, tmp_path / "whole", 1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole["tokens.bin"]) // 2, hard))
    try:
        with pytest.raises(OSError, match="bin cannot be written .*to go on from"):
            tokenise(corpus, tokenizer, 1023, tmp_path / "d", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_files(tokenise(corpus, tokenizer, 1023, tmp_path / "d", 1)) == whole


def test_an_epoch_holds_every_token_once_and_in_order_and_positions_restart(tmp_path, tokenizer):
    rng = np.random.default_rng(2)
    path = write_rows(tmp_path / "a.jsonl", [words(rng, int(n)) for n in rng.integers(1, 400, 40)])
    folder = tokenise(path, tokenizer, 1023, tmp_path / "d")
    source = Source("a", folder, "train", T=64)
    assert source.lengths.max() > 4 * 64 > 4 * source.lengths.min()
    stream = np.concatenate([source.tokens[s:s + n]
                             for s, n in zip(source.starts, source.lengths)])
    mixture = Mixture([source], [1], 2 * source.num_rows, seed=0)
    for epoch in range(2):
        indices = range(epoch * source.num_rows, (epoch + 1) * source.num_rows)
        rows = {mixture.locate(i)[1]: mixture.row(i) for i in indices}
        assert sorted(rows) == list(range(source.num_rows))
        found = np.concatenate([rows[j][0][:-1] for j in sorted(rows)])
        assert np.array_equal(found, stream[:len(found)]) and len(stream) - len(found) <= 64
    tokens, ids, labels = collate([rows[j] for j in sorted(rows)], "cpu")
    ends = np.isin(np.arange(len(found)), source.ends - 1)  # a document's last token: no label
    assert np.array_equal(labels.flatten() == -100, ends)
    positions = torch.arange(64) - document_starts(ids)
    assert (positions[:, 0] == 0).all() and (ids[1:, 0] == ids[:-1, -1]).any()  # cut, and restarts


@pytest.mark.parametrize("weights", [[0.7, 0.1, 0.1, 0.1], [50] + [1] * 50, [1, 1, 1], [3, 1e-9]])
def test_any_number_of_rows_has_its_share_of_every_source(weights):
    which, nth = distill.interleave(weights, 2000)
    share = np.array(weights) / sum(weights)
    given = np.cumsum(which[:, None] == np.arange(len(weights)), axis=0)
    assert np.abs(given - share * np.arange(1, 2001)[:, None]).max() < 1
    assert np.array_equal(nth, given[np.arange(2000), which] - 1)


def test_mixture_counts_are_exact_and_order_depends_on_seed_and_step(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    files = [write_rows(tmp_path / f"{n}.jsonl", [words(rng, 60) for _ in range(60)])
             for n in "ab"]
    run = Namespace(data=[(files[0], 3.0), (files[1], 1.0)], out=tmp_path, context=64,
                    experts=False, eval_rows=1)
    train, weights, _ = open_data(run, tokenizer, 1023)
    mixture = Mixture(train, weights, 400, seed=5)
    assert np.abs(np.cumsum(mixture.which == 0) - 0.75 * np.arange(1, 401)).max() <= 1
    again = Mixture(train, weights, 400, seed=5)
    rows = [mixture.row(i) for i in range(400)]
    for i in (399, 7, 200):  # any position, in any order, without reading what came before
        assert all(np.array_equal(a, b) for a, b in zip(again.row(i), rows[i]))
    reseeded = Mixture(train, weights, 400, seed=6)
    other = [reseeded.row(i) for i in range(20)]
    assert any(not np.array_equal(a[0], b[0]) for a, b in zip(other, rows))
    first_epoch = [tuple(r[0]) for r, s in zip(rows, mixture.which) if s == 0][:train[0].num_rows]
    assert len(set(first_epoch)) == train[0].num_rows  # each row once before any comes twice


def test_tokenising_twice_reads_the_first_result(tmp_path, corpus, tokenizer):
    corpus = Path(shutil.copy(corpus, tmp_path))
    folder = tokenise(corpus, tokenizer, 1023, tmp_path / "d")
    stamp = (folder / "tokens.bin").stat().st_mtime_ns
    assert tokenise(corpus, tokenizer, 1023, tmp_path / "d") == folder
    assert (folder / "tokens.bin").stat().st_mtime_ns == stamp
    corpus.write_text(corpus.read_text() + '{"text": "one more document"}\n')
    assert tokenise(corpus, tokenizer, 1023, tmp_path / "d") != folder


def test_who_changes_the_files_must_raise_their_format(tmp_path, tokenizer, monkeypatch):
    """Or files and targets of the format before would be taken for the new ones, without a word.

    The digest is what format 7 holds of these rows: raise DATA_FORMAT if it has to change.
    """
    monkeypatch.setattr(tokenizer, "chat_templates", {"default": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}.{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (
        {"text": "two words, <|eot|> and 42"}, {"text": ""}, {"dna": "AACG"},
        {"messages": [{"role": "user", "content": "hi"},
                      {"role": "assistant", "content": "yes"}]})))
    folder = tokenise(path, tokenizer, 1, tmp_path / "data")
    digest = sha256(*(folder / name for name in distill.FILES))
    assert (distill.DATA_FORMAT, digest[:16]) == (7, "bd97666fe1eb1cd2")


def test_conversations_learn_the_assistants_tokens_only(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "render_chat_parts", lambda messages, tools: ([
        ("<u>" + messages[0]["content"], False), (messages[1]["content"] + "</s>", True)], 2))
    row = {"messages": [{"role": "user", "content": "what?"},
                        {"role": "assistant", "content": "that."}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    folder = tokenise(tmp_path / "chat.jsonl", tokenizer, 1023, tmp_path / "d")
    tokens = np.fromfile(folder / "tokens.bin", np.uint32)
    loss = np.fromfile(folder / "loss.bin", bool)
    assert tokenizer.decode(tokens[loss]) == "that.</s>"
    assert tokenizer.decode(tokens[~loss]) == "<u>what?"
    [document] = np.fromfile(folder / "documents.bin", distill.DOCUMENT)
    assert document["labels"] == loss[1:].sum() and document["skipped"] == 2


# ------------------------------------------------------------------ losses


def full_matrix_loss(hidden, weight, labels, ids, logprobs, gamma, beta):
    """Eq. 13 by autograd on the whole (tokens, V) matrix."""
    logits = hidden @ weight.T
    valid = labels != -100
    ce = F.cross_entropy(logits, labels, ignore_index=-100)
    log_p = logprobs.log_softmax(-1)
    log_q = logits.gather(1, ids).log_softmax(-1)
    kl = F.kl_div(log_q[valid], log_p[valid], log_target=True, reduction="batchmean")
    return gamma * ce + beta * kl, ce, kl


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("gamma, beta", [(0.9, 0.1), (1.0, 0.0), (0.0, 1.0)])
def test_sparse_kd_loss_equals_autograd_on_the_full_matrix(monkeypatch, dtype, tolerance, gamma,
                                                           beta):
    monkeypatch.setattr(distill, "LOGITS_AT_ONCE", 37 * 500)  # three slices, under checkpoint
    r = torch.Generator().manual_seed(0)
    N, V, width, k = 80, 500, 16, 20
    hidden, weight, other = (torch.randn(n, width, generator=r).to(dtype) for n in (N, V, V))
    ids, logprobs = teacher_topk(hidden, other, k)
    expected_p = (hidden @ other.T).log_softmax(-1)
    torch.testing.assert_close(logprobs, expected_p.gather(1, ids).float())
    assert torch.equal(ids.sort().values, expected_p.topk(k).indices.sort().values)
    labels = torch.randint(0, V, (N,), generator=r)
    labels[::7] = -100
    results = []
    for loss in (sparse_kd_loss, full_matrix_loss):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if loss is sparse_kd_loss:
            value, parts = loss(h, w, labels, ids, logprobs, gamma=gamma, beta=beta)
            ce, kl = parts["ce"], parts["kl"]
        else:
            value, ce, kl = loss(h, w, labels, ids, logprobs.to(dtype), gamma, beta)
        (3 * value).backward()  # an upstream factor must reach the gradients
        results.append((value, ce, kl, h.grad, w.grad))
    for a, b in zip(*results):
        assert (a - b).norm() <= tolerance * b.norm().clamp_min(1)


def test_the_sparse_kl_over_the_whole_vocabulary_is_the_kl():
    r = torch.Generator().manual_seed(0)
    hidden, weight, other = (torch.randn(n, 8, generator=r) for n in (30, 50, 50))
    targets = teacher_topk(hidden, other, 50)
    _, parts = sparse_kd_loss(hidden, weight, torch.zeros(30, dtype=torch.long), *targets)
    p, q = ((hidden @ w.T).log_softmax(-1) for w in (other, weight))
    torch.testing.assert_close(parts["kl"], (p.exp() * (p - q)).sum(-1).mean())


def test_the_loss_holds_no_tokens_by_vocabulary_matrix(monkeypatch):
    from test_model import LargestTensor
    monkeypatch.setattr(distill, "LOGITS_AT_ONCE", 1 << 20)
    N, V, width = 1024, 8000, 8
    hidden = torch.randn(N, width, requires_grad=True)
    weight = torch.randn(V, width, requires_grad=True)
    with LargestTensor() as seen:
        targets = teacher_topk(hidden.detach(), weight.detach(), 4)
        sparse_kd_loss(hidden, weight, torch.zeros(N, dtype=torch.long), *targets)[0].backward()
    assert seen.numel <= 1 << 20 < N * V


@pytest.mark.parametrize("autocast, dtype", [(True, torch.float32), (False, torch.bfloat16),
                                             (True, torch.bfloat16)])
def test_the_gradient_of_lm_head_is_summed_in_fp32_over_slices(monkeypatch, autocast, dtype):
    """fp32 masters under autocast; bf16, as FSDP2 gathers them. 100 slices: summed in bf16 the
    error would be a twentieth, each slice alone rounded to bf16 leaves it at 1e-3."""
    monkeypatch.setattr(distill, "LOGITS_AT_ONCE", 2 * 50)
    r = torch.Generator().manual_seed(0)
    hidden, weight, other = (torch.randn(n, 16, generator=r).bfloat16() for n in (200, 50, 50))
    hidden[:, 0] += 3  # so that slices do not cancel
    labels = torch.zeros(200, dtype=torch.long)
    targets = teacher_topk(hidden, other, 8)
    found = []
    for h, w in ((hidden.double(), weight.double()), (hidden, weight.to(dtype))):
        w.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and w.dtype != torch.float64):
            sparse_kd_loss(h, w, labels, *targets)[0].backward()
        assert w.grad.dtype == w.dtype
        found.append(w.grad.double())
        frozen = h.clone().requires_grad_()  # a frozen lm_head hands the gradient on
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and w.dtype != torch.float64):
            sparse_kd_loss(frozen, w.detach(), labels, *targets)[0].backward()
        assert frozen.grad.norm() > 0
    assert (found[1] - found[0]).norm() < 4e-3 * found[0].norm()


@pytest.mark.parametrize("bf16", [False, True])
def test_alignment_trains_the_new_parameters_as_plain_autograd_would(teacher, bf16):
    """In bf16 too: autograd's pass back is outside autocast, as torch's pages ask."""
    student = student_from_teacher(teacher, window=8)
    tokens = torch.randint(0, 1000, (2, 40), generator=torch.Generator().manual_seed(0))
    ids = torch.arange(40).expand(2, -1) // 25
    trainable = distill.select_trainable(student, "new")
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with autocast:
        losses = alignment_losses(student, tokens, ids, backward_scale=0.5)
    found = {name: p.grad.clone() for name, p in trainable.items()}
    # The oracle: run the teacher, remember each attention's input and mixed heads, and let
    # autograd differentiate the sum over layers in one graph.
    seen, mix = [], Attention.mix
    def remember(self, heads, **options):
        h = mix(self, heads, **options)
        seen.append((heads, h))
        return h
    Attention.mix = remember
    try:
        with autocast:
            teacher(tokens, document_ids=ids)
    finally:
        Attention.mix = mix
    student.zero_grad()
    expected = []
    for block, (heads, target) in zip(student.model["layers"], seen):
        with autocast:
            h = block.self_attn.mix(heads, document_ids=ids)
            expected.append(((h.float() - target.float()) ** 2).mean())
    (0.5 * sum(expected)).backward()
    torch.testing.assert_close(losses, torch.stack(expected).detach())
    for name, p in trainable.items():
        assert (found[name] - p.grad).norm() < 1e-5 * p.grad.norm(), name
    assert all(p.grad is None for name, p in student.named_parameters() if not is_new(name))


def test_both_losses_under_bf16_autocast_stay_near_fp32(teacher):
    """What a GPU runs: bf16 teacher and autocast, fp32 gates, states, gradients and masters."""
    tokens = torch.randint(0, 1000, (2, 128), generator=torch.Generator().manual_seed(0))
    ids = torch.arange(128).expand(2, -1) // 50
    found = {}
    for bf16 in (False, True):
        frozen = load_pretrained(TEACHER, dtype=torch.bfloat16 if bf16 else None)
        targets = teacher_topk(frozen.hidden(tokens).flatten(0, 1).detach(),
                               frozen.lm_head_weight.detach(), 64)
        aligned = student_from_teacher(frozen, window=16)
        student = load_pretrained(TEACHER)
        student = student_from_teacher(student, window=16)
        new = distill.select_trainable(aligned, "new")
        everything = distill.select_trainable(student, "all")
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            align = alignment_losses(aligned, tokens, ids, backward_scale=1.0)
            hidden = student.hidden(tokens, document_ids=ids).flatten(0, 1)
            loss, _ = sparse_kd_loss(hidden, student.lm_head_weight, tokens.flatten(), *targets)
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in (*new.values(), *everything.values()))
        found[bf16] = [align, loss.detach()] + [
            torch.cat([p.grad.flatten() for p in ps.values()]) for ps in (new, everything)]
    for a, b in zip(found[True], found[False]):
        assert (a - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize("wanted, device, unit, dtype", [
    ("auto", "cuda", None, torch.bfloat16), ("auto", "cpu", "amx_bf16", torch.bfloat16),
    ("auto", "cpu", "avx512_bf16", torch.bfloat16), ("auto", "cpu", None, torch.float32),
    ("float32", "cuda", "amx_bf16", torch.float32), ("bfloat16", "cpu", None, torch.bfloat16)])
def test_dtype_is_bf16_where_products_of_it_are_fast(monkeypatch, wanted, device, unit, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {unit: True})
    assert distill.choose_dtype(wanted, torch.device(device)) == dtype


def test_schedule_warms_up_and_ends_where_it_should():
    rates = [learning_rate(i, 100, 10, 1.0, 0.1) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and rates[-1] < 0.101
    assert {learning_rate(i, 100, 10, 1.0, 1.0) for i in range(10, 100)} == {1.0}
    assert [learning_rate(i, 4, 10, 1.0, 0.1) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_stage_one_s_rate_falls_to_a_thousandth(whole):
    rates = [row["lr"] for (stage, _), row in sorted(logged(whole[0]).items()) if stage == "align"]
    n = len(rates)
    assert rates[-1] == pytest.approx(learning_rate(n - 1, n, 2, 1e-2, 1e-5)) and n > 2


def test_the_optimizer_decays_matrices_alone_and_gradients_are_clipped_at_1():
    trainable = {"matrix": torch.nn.Parameter(torch.ones(2, 3)),
                 "vector": torch.nn.Parameter(torch.ones(3))}
    optimizer = distill.make_optimizer(trainable)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    for p in trainable.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(trainable["matrix"].data, torch.full((2, 3), 1 - 0.5 * 0.1))
    assert torch.equal(trainable["vector"].data, torch.ones(3))
    for p in trainable.values():
        p.grad = torch.full_like(p, 4.0)
    assert distill.clip_gradients(trainable).item() == pytest.approx(12)  # of 9 numbers
    assert trainable["vector"].grad == pytest.approx(torch.full((3,), 1 / 3), rel=1e-4)


def test_an_empty_text_is_no_document_and_the_tail_is_counted(tmp_path, tokenizer, capsys):
    rng = np.random.default_rng(0)
    texts = [words(rng, 60) for _ in range(60)]
    folders = [tokenise(write_rows(tmp_path / f"{name}.jsonl", rows), tokenizer, 1023, tmp_path, 1)
               for name, rows in (("a", texts), ("b", ["", *texts, ""]))]
    assert (folders[0] / "tokens.bin").read_bytes() == (folders[1] / "tokens.bin").read_bytes()
    [source], _, _ = open_data(Namespace(data=[(tmp_path / "a.jsonl", None)], out=tmp_path / "run",
                                         context=64, experts=False, eval_rows=1), tokenizer, 1023)
    assert (f"{source.num_rows * 64:,} of {source.total:,} tokens fill rows"
            in capsys.readouterr().out)
    open_data(Namespace(data=[(tmp_path / "b.jsonl", None)], out=tmp_path / "run", context=64,
                        experts=False, eval_rows=1), tokenizer, 1023)
    assert "2 rows of the file hold no text of two tokens" in capsys.readouterr().out
    assert distill.parse_row({"dna": ""}, tokenizer, 1023) == []
    for name, size in (("tokens.bin", 400), ("loss.bin", 0), ("documents.bin", 0)):
        whole = (folders[0] / name).read_bytes()
        os.truncate(folders[0] / name, size)
        with pytest.raises(ValueError, match=f"{folders[0]} is damaged"):
            tokenise(tmp_path / "a.jsonl", tokenizer, 1023, tmp_path, 1)
        (folders[0] / name).unlink()
        with pytest.raises(ValueError, match=f"{folders[0]} is damaged"):
            tokenise(tmp_path / "a.jsonl", tokenizer, 1023, tmp_path, 1)
        (folders[0] / name).write_bytes(whole)
    assert tokenise(tmp_path / "a.jsonl", tokenizer, 1023, tmp_path, 1) == folders[0]


@pytest.mark.parametrize("which, shares", [("new", "new"), ("mixer", "self_attn"), ("all", "")])
def test_train_selects_what_it_says(teacher, which, shares):
    student = student_from_teacher(teacher, window=8)
    chosen = set(distill.select_trainable(student, which))
    names = {n for n, _ in student.named_parameters()}
    assert chosen == {n for n in names if (is_new(n) if which == "new" else shares in n)}


# ------------------------------------------------------------------ teacher targets on disk


def prepare(folder, tokenizer):
    """Settings and a mixture of two sources, with some rows of a second epoch."""
    sources = []
    for name, step in (("a", 2), ("b", 3)):
        rng = np.random.default_rng(step)
        path = folder / f"{name}.jsonl"
        if not path.exists():  # other processes may be reading it
            write_rows(path, [words(rng, n) for n in range(1, 50, step)])
        data = tokenise(path, tokenizer, 1023, folder / "data", 1)
        sources.append(Source(name, data, "train", 64))
    run = Namespace(teacher=TEACHER, targets=folder / "targets", context=64, topk=16,
                    micro_batch=3, device=torch.device("cpu"), dtype=torch.float32, rank=0,
                    world=1)
    return run, Mixture(sources, [1, 1], 2 * sources[0].num_rows + 6, seed=1)


@pytest.fixture
def targets(tmp_path, tokenizer):
    return prepare(tmp_path, tokenizer)


def everything_in(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class LongHead:
    """A model under another lm_head."""

    def __init__(self, model, weight):
        self.hidden, self.lm_head_weight = model.hidden, weight
        self.config = dataclasses.replace(model.config, vocab_size=len(weight))

    def __call__(self, tokens, *, document_ids, head):
        return head(self.hidden(tokens, document_ids=document_ids), self.lm_head_weight)


@pytest.mark.parametrize("vocab_size", [1024, 66_000])
def test_cached_targets_give_the_online_loss_to_fp16_rounding(targets, teacher, monkeypatch,
                                                              vocab_size):
    run, mixture = targets
    if vocab_size > 1024:  # ids beyond two bytes: the same teacher under a longer, shuffled head
        head = torch.zeros(vocab_size, teacher.config.hidden_size)
        head[torch.randperm(vocab_size)[:1024]] = teacher.lm_head_weight.detach()
        teacher, mixture = LongHead(teacher, head), Mixture(mixture.sources, [1, 1], 6, seed=1)
    cache = distill.prepare_targets(run, teacher, [mixture], [])
    student = student_from_teacher(load_pretrained(TEACHER), window=8)
    weight = teacher.lm_head_weight.clone().requires_grad_()
    for start in (0, len(mixture.which) - 4):  # of a long mixture's second epoch
        where = [mixture.locate(i) for i in range(start, start + 4)]
        tokens, ids, labels = collate(map(mixture.row, range(start, start + 4)), "cpu")
        hidden = student.hidden(tokens, document_ids=ids)
        online = teacher_topk(teacher.hidden(tokens, document_ids=ids).flatten(0, 1),
                              teacher.lm_head_weight, 16)
        cached = cache.rows(where)
        assert (cached[0].flatten(0, 1) == online[0]).all() and cached[0].max() < vocab_size
        torch.testing.assert_close(cached[1].flatten(0, 1).float(), online[1], rtol=2 ** -11,
                                   atol=2 ** -24)
        found = []
        for targets_ in (cached, [x.view(4, 64, 16) for x in online]):
            loss, _ = sparse_kd_loss(hidden, weight, labels, *targets_, gamma=0.1, beta=0.9)
            found.append((loss, *torch.autograd.grad(loss, [hidden, weight], retain_graph=True)))
        for a, b in zip(*found):
            assert (a - b).norm() < 1e-3 * b.norm()
    assert cache.row_type.itemsize == 64 * 16 * (4 if vocab_size == 1024 else 5) + 4


def test_a_short_run_makes_only_the_rows_it_draws_and_a_long_one_the_rest(targets, teacher):
    run, mixture = targets
    short = Mixture(mixture.sources, [1, 3], 16, seed=1)  # 4 and 12 rows
    cache = distill.prepare_targets(run, teacher, [short], [])
    first = everything_in(run.targets)
    assert len(first) == 1 + 16
    cache.rows([short.locate(i) for i in range(16)])
    again = Mixture(mixture.sources, [1, 1], 8, seed=9)  # another seed: other rows, the same files
    cache = distill.prepare_targets(run, teacher, [again, mixture], [])
    cache.rows([m.locate(i) for m in (again, mixture) for i in range(len(m.which))])
    assert first.items() < everything_in(run.targets).items()


def test_processes_write_what_one_process_writes(targets, teacher, tmp_path):
    run, mixture = targets
    distill.prepare_targets(run, teacher, [mixture], [])
    one = everything_in(run.targets)

    def start(out, rank, world):
        child = os.fork()
        if child == 0:
            run.targets, run.rank, run.world = tmp_path / out, rank, world
            distill.prepare_targets(run, teacher, [mixture], [])
            os._exit(0)
        return child

    # Two that share the work; and two that do not know of each other, of which one is killed.
    for child in [start("shared", 0, 2), start("shared", 1, 2)]:
        assert os.waitpid(child, 0)[1] == 0
    assert everything_in(tmp_path / "shared") == one
    strangers = [start("alone", 0, 1), start("alone", 0, 1)]
    deadline = time.time() + 120
    while not list((tmp_path / "alone").rglob("*[0-9]")):
        assert time.time() < deadline
        time.sleep(0.001)
    os.kill(strangers[0], signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(strangers[0], 0)[1]) == signal.SIGKILL
    assert os.waitpid(strangers[1], 0)[1] == 0
    found = everything_in(tmp_path / "alone")
    assert {k: v for k, v in found.items() if not k.endswith(".tmp")} == one


def test_a_killed_call_leaves_no_torn_file_and_the_next_makes_only_the_rest(targets, teacher):
    run, mixture = targets
    cache = distill.prepare_targets(run, teacher, [mixture], [])
    whole = everything_in(run.targets)
    child = os.fork()
    if child == 0:  # dies by SIGKILL in the middle of a file
        shutil.rmtree(run.targets)
        crc32, calls = distill.zlib.crc32, []
        def die_in_the_eighth(data):
            calls.append(0)
            if len(calls) == 8:
                with distill.replacing(run.targets / "a/torn") as file:
                    file.write(data[:100])
                    os.kill(os.getpid(), signal.SIGKILL)
            return crc32(data)
        distill.zlib.crc32 = die_in_the_eighth
        distill.prepare_targets(run, teacher, [mixture], [])
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left = everything_in(run.targets)
    [torn] = [k for k in left if k.endswith(".tmp")]
    del left[torn]
    assert len(left) == 1 + 7 and left.items() < whole.items()
    left = len(left) - 1
    made, write = [], distill.TargetCache.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill.TargetCache, "write", lambda self, run, where, teacher: (
            made.extend(where), write(self, run, where, teacher)))
        distill.prepare_targets(run, teacher, [mixture], [])
    (run.targets / torn).unlink()
    assert len(made) == len(whole) - 1 - left and everything_in(run.targets) == whole


def test_a_stop_and_a_full_disk_leave_whole_files_only(targets, teacher):
    run, mixture = targets
    with pytest.raises(distill.Stopped):
        distill.prepare_targets(run, teacher, [mixture], [signal.SIGTERM])
    before = everything_in(run.targets)
    assert len(before) == 1 + run.micro_batch
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a row needs 4 KB
    try:
        with pytest.raises(OSError, match="targets/a/000000/.* cannot be written .*to go on from"):
            distill.prepare_targets(run, teacher, [mixture], [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert everything_in(run.targets) == before


def test_targets_of_another_teacher_or_setting_are_refused(targets, teacher, tmp_path,
                                                           monkeypatch):
    run, mixture = targets
    distill.prepare_targets(run, teacher, [mixture], [])
    before = everything_in(run.targets)

    def refused(match, mixture=mixture, error=ValueError, **changed):
        with pytest.raises(error, match=match):
            distill.prepare_targets(Namespace(**{**vars(run), **changed}), teacher, [mixture], [])
        assert everything_in(run.targets) == before

    shutil.copytree(TEACHER, tmp_path / "other")
    with open(tmp_path / "other/model.safetensors", "ab") as file:
        file.write(b" ")
    refused("teacher_sha256 was", teacher=tmp_path / "other")
    refused("k was 16, now 8", topk=8)
    refused("context was 64, now 32", context=32)
    refused("data was .*a-.*b-.*, now .*b-", mixture=Mixture(mixture.sources[1:], [1], 9, 1))
    monkeypatch.setattr(distill.shutil, "disk_usage", lambda _: Namespace(free=10))
    small = tmp_path / "small"
    with pytest.raises(ValueError, match="small: .*B are to be written, 10.0B are free"):
        distill.prepare_targets(Namespace(**{**vars(run), "targets": small}), teacher, [mixture],
                                [])
    assert [p.name for p in small.rglob("*")] == ["manifest.json"]
    distill.prepare_targets(run, teacher, [mixture], [])  # all there: needs no disk


def test_a_damaged_row_is_named(targets, teacher):
    run, mixture = targets
    cache = distill.prepare_targets(run, teacher, [mixture], [])
    (first, second), path = map(mixture.locate, (0, 1)), cache.path(*mixture.locate(1))
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    cache.rows([first])
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        cache.rows([second])


# ------------------------------------------------------------------ the command


def command(*args):
    """distill.py as a shell runs it, without the seconds of imports: status, stdout, stderr."""
    outputs = [io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stdout(outputs[0]), contextlib.redirect_stderr(outputs[1]):
        with pytest.raises(SystemExit) as end:
            distill.command([str(arg) for arg in args])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for output in outputs:
        output.seek(0)
    return Namespace(returncode=end.value.code, stdout=outputs[0].read(), stderr=outputs[1].read())


def tiny(out, corpus, *more):
    return ("--teacher", SMALL, "--data", corpus, "--out", out, "--context", 64, "--window", 8,
            "--batch", 4, "--micro-batch", 2, "--align-tokens", 64 * 4 * 12, "--tokens",
            64 * 4 * 12, "--warmup", 2, "--lr", 1e-3, "--save-every", 3, "--eval-every", 6,
            "--eval-rows", 1, "--dtype", "float32", *more)


def logged(out):
    return {(r["stage"], r["step"]): r for r in all_lines(out)}


def test_one_layer_alone_learns_what_stage_one_teaches_it():
    """one_layer.py trains a layer without the others: the same weights as with all of them."""
    def student():
        teacher = load_pretrained(TEACHER).requires_grad_(False)
        return distill.student_from_teacher(teacher, window=16, features=2)

    rows = [(torch.randint(0, 1000, (1, 96), generator=torch.Generator().manual_seed(i)),
             torch.zeros(1, 96, dtype=torch.long), None) for i in range(3)]
    alone, together, run = student(), student(), Namespace(steps=3, lr=1e-2)
    inputs = one_layer.layer_inputs(alone, 2, rows)
    mixer = alone.model["layers"][2].self_attn
    before = one_layer.errors(mixer, *inputs[0])
    one_layer.train_layer(run, mixer, inputs, {}, "")
    after = one_layer.errors(mixer, *inputs[0])
    assert (after[0] < before[0]).all() and torch.equal(after[1], before[1])
    trainable = distill.select_trainable(together, "new")
    optimizer = distill.make_optimizer(trainable)
    for step, (tokens, docs, _) in enumerate(rows):
        alignment_losses(together, tokens, docs, 1.0)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = learning_rate(
            step, 3, 5, 1e-2, 1e-5)
        optimizer.step()
        optimizer.zero_grad()
    like = dict(together.model["layers"][2].self_attn.named_parameters())
    for name, p in mixer.named_parameters():
        assert torch.allclose(p, like[name], atol=1e-6), name


def test_nothing_to_train_is_refused_before_anything_is_written(tmp_path, corpus):
    refused = command(*tiny(tmp_path / "run", corpus, "--mixer", "swa", "--train", "new"))
    assert refused.returncode == 2 and "--train new: the mixer 'swa'" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_plan_counts_what_will_run(tmp_path, corpus):
    plans = [command(*tiny(tmp_path / "run", corpus, "--plan", "--micro-batch", n, "--topk", k)
                     ).stdout for n, k in ((4, 1024), (400, 10 ** 6))]  # of a batch of 4, V = 1024
    said, plan = plans[1].split("\n", 1)
    assert plans[0] == plan and "at 4 x 64 tokens at once" in plan
    assert "1000000 is more than the vocabulary: all 1024 count" in said


def test_who_is_whose_is_checked_before_a_plan_too(tmp_path, corpus, whole):
    out, done = whole
    for flags, words in ((["--start", TEACHER], f"--start {TEACHER}: its config.json is not of a"),
                         (["--teacher", out / "seed"], f"--teacher {out}/seed is a student itself")):
        for plan in ([], ["--plan"]):
            refused = command(*tiny(tmp_path / "run", corpus, *flags, *plan))
            assert refused.returncode == 2 and words in refused.stderr and not refused.stdout
    assert not (tmp_path / "run/run.json").exists()


def test_targets_in_the_runs_own_folders_are_refused(tmp_path, corpus):
    for own in ("", "checkpoints", "seed", "a/targets", "student"):
        refused = command(*tiny(tmp_path / "run", corpus, "--targets", tmp_path / "run" / own))
        assert refused.returncode == 2 and "is a folder of the run itself" in refused.stderr


def test_a_lack_of_memory_is_one_sentence(tmp_path, corpus):
    done = command(*tiny(tmp_path / "run", corpus, "--tokens", "1e13"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: out of memory: --plan tells" in done.stderr.splitlines()[-1]


def test_what_a_student_has_not_is_not_said_of_it(tmp_path, corpus):
    for mixer, words, none in (("mlstm", "4 x head_dim features; on", "window"),
                               ("swa", "window 8, 4 sinks; on", "features")):
        said = command(*tiny(tmp_path / mixer, corpus, "--mixer", mixer, "--context", 600,
                             "--tokens", 600, "--align-tokens", 600)).stdout
        [line] = [line for line in said.splitlines() if line.startswith("student   mixer")]
        assert words in line and none not in line
        assert "--context 600 is longer than the 512 tokens that it reads" in said


def test_tasks_that_the_teacher_cannot_do_are_refused_before_training(tmp_path, corpus):
    task = {"id": "a", "type": "generate", "prompt": "x", "gold": "y", "max_new_tokens": 512}
    (tmp_path / "t.jsonl").write_text(json.dumps(task))
    refused = command(*tiny(tmp_path / "run", corpus, "--tasks", tmp_path / "t.jsonl"))
    assert refused.returncode == 2 and "t.jsonl:1: max_new_tokens 512 of 512" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_teacher_without_an_end_of_text_is_said(tmp_path):
    shutil.copytree(TEACHER, tmp_path / "m")
    config = json.loads((TEACHER / "config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    (tmp_path / "m/generation_config.json").unlink(missing_ok=True)
    done = command(*tiny(tmp_path / "run", write_rows(tmp_path / "b.jsonl", ["too short"]),
                         "--teacher", tmp_path / "m"))
    assert "names no eos_token_id: texts end without a token for it" in done.stdout


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path, corpus):
    for flag in ("--out", "--targets"):
        for path in (corpus, corpus / "run"):
            refused = command(*tiny(tmp_path / "run", corpus, flag, path))
            assert refused.returncode == 2 and f"{flag}: {corpus} is a file" in refused.stderr


def test_molecules_of_no_family_need_no_separator(tmp_path):
    pytest.importorskip("rdkit")
    task = {"id": "a", "type": "molecule", "sequences": [], "seed": 0, "max_new_tokens": 511}
    (tmp_path / "t.jsonl").write_text(json.dumps(task))
    config = distill.ModelConfig.from_hf(TEACHER)
    assert config.separator_id is None and config.max_positions == 512
    assert distill.evaluate.read_tasks(TEACHER, [tmp_path / "t.jsonl"])


def test_parts_of_another_run_are_not_taken_for_ones_own(tmp_path, corpus):
    for i, part in enumerate(("student", "a/checkpoints", "generalist/student", "config.json")):
        (tmp_path / f"{i}" / part).mkdir(parents=True)
        refused = command(*tiny(tmp_path / f"{i}", corpus))
        assert refused.returncode == 2 and f"parts of another run ({part})" in refused.stderr
        there = [str(p.relative_to(tmp_path / f"{i}")) for p in (tmp_path / f"{i}").rglob("*")]
        assert max(there, key=len) == part and len(there) == 1 + part.count("/")  # nothing else


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus):
    """A run from top to bottom: its folder and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = command(*tiny(out, corpus))
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_ends_with_a_table_and_a_student(whole, corpus):
    out, done = whole
    for words_ in ("teacher ", "entry", "after stage I ", "after stage II", "KL to teacher"):
        assert words_ in done.stdout
    student = load_pretrained(out / "student")
    assert (student.config.hybrid.window, student.config.hybrid.features) == (8, 4)
    assert Tokenizer(out / "student").encode("x") == Tokenizer(TEACHER).encode("x")
    rows = int(re.search(r"data      a: ([0-9,]+) of", done.stdout)[1].replace(",", "")) // 64
    assert done.stdout.count(f"each source is read: a {48 / rows:,.2f}\n") == 2  # 12 steps of 4
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["teacher", "entry", "after stage I", "after stage II"]
    assert not (out / "checkpoints").exists()
    assert json.loads((out / "student/config.json").read_text())["torch_dtype"] == "float32"
    again = command(*tiny(out, corpus))
    assert again.returncode == 2 and "--resume" in again.stderr
    again = command(*tiny(out, os.path.relpath(corpus), "--resume"))  # the same file, by its content
    assert again.returncode == 0 and "held-out, after stage II" in again.stdout


@pytest.mark.parametrize("flags", [[], ["--experts"]])
def test_without_a_teacher_the_shipped_one_and_its_texts_are_used(flags, tmp_path):
    run = distill.parse_arguments([*flags, "--out", str(tmp_path / "run")])
    distill.check_arguments(run)
    assert run.teacher == TEACHER and len(run.data) == 4 and not run.tasks == bool(flags)
    assert len(distill.settings_of(run)["data_sha256"]) == 4
    run.context, run.device = 64, torch.device("cpu")
    train, weights, heldout = distill.open_data(run, Tokenizer(TEACHER), 1023)
    assert [s.name for s in train] == ["code", "math", "prose", "recall"] == [
        s.name for s in heldout] and all(w > 0 for w in weights)


def test_a_run_says_before_it_trains_how_long_each_stage_takes(whole):
    _, done = whole
    before = done.stdout.split("held-out, teacher")[0]
    for stage in ("align", "distil"):
        assert re.search(rf"^time      {stage}: about 00:[0-9][0-9] .* at [0-9,]+ tokens/s", before,
                         re.M)
    assert "days" not in before


def test_more_than_a_day_is_said_with_the_flag_to_set(tmp_path, corpus, capsys):
    run = Namespace(batch=4, context=64, micro_batch=4, rank=0, world=1, align_tokens=1e12,
                    align_steps=int(1e12) // 256, tokens=256, start=None, mixer="hybrid",
                    train="all", device=torch.device("cpu"), dtype=torch.float32, topk=4,
                    gamma=0.9, beta=0.1, recompute=False)
    teacher = load_pretrained(TEACHER).requires_grad_(False)
    student = student_from_teacher(teacher, window=8)
    source = Source("a", tokenise(corpus, Tokenizer(TEACHER), 1, tmp_path, 1), "train", 64)
    before = {name: p.clone() for name, p in student.named_parameters()}
    distill.show_time(run, student, teacher, None,
                      {"": (Namespace(distil_steps=1), Mixture([source], [1], 4, 0))})
    assert re.search(r"That is [0-9,]+ days. --align-tokens [0-9.]+e.* takes one, in [0-9,.]+ ",
                     capsys.readouterr().out)
    for name, p in student.named_parameters():  # nothing was learnt, nothing is left behind
        assert torch.equal(p, before[name]) and p.grad is None and not p.requires_grad


def test_a_table_never_shows_a_mean_over_nothing(capsys):
    some, none = ({"ce": x, "kl": x, "top1": x} for x in (0.5, None))
    distill.report({"teacher": {"a": some, "b": none, "all": some}})
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("teacher")]
    assert row.split() == ["teacher", "0.5000", "0.5000", "0.5000", "0.5000", "-"]


def test_a_held_out_source_without_labels_has_no_number(teacher, tokenizer, corpus, tmp_path):
    source = Source("a", tokenise(corpus, tokenizer, 1023, tmp_path, 1), "train", 64)
    mute = Source("b", source.folder, "train", 64)
    mute.loss = np.zeros_like(mute.loss)
    run = Namespace(device=torch.device("cpu"), dtype=torch.float32, eval_rows=2, micro_batch=2,
                    world=1, rank=0)
    found = distill.compare(run, teacher, teacher, [source, mute])
    assert found["b"] == {"ce": None, "kl": None, "top1": None} and found["all"] == found["a"]
    assert distill.compare(run, teacher, teacher, [mute])["all"]["ce"] is None
    broken = copy.deepcopy(teacher)
    broken.model["norm"].weight.data[0] = math.nan
    run.out = tmp_path
    with pytest.raises(ValueError, match="after stage I: the losses are not finite"):  # it diverged
        distill.measure(run, {}, "after stage I", broken, teacher, [source])
    assert not (tmp_path / "results.json").exists()


def test_a_step_without_labels_says_so_and_changes_nothing(tmp_path, corpus, monkeypatch, capsys):
    """Rows of a long prompt, say. AdamW would decay the weights, the log would show losses of 0."""
    row = Mixture.row

    def mute(self, i):
        tokens, ids, loss = row(self, i)
        return tokens, ids, loss & (not i < 4)  # stage II's first step

    monkeypatch.setattr(Mixture, "row", mute)
    monkeypatch.setattr(distill.torch.optim.AdamW, "step", lambda self, step=torch.optim.AdamW.step:
                        (step(self), counts.append(int(self.state[self.param_groups[0]["params"][0]]
                                                       ["step"]))))
    out, counts = tmp_path / "run", []
    done = command(*tiny(out, corpus, "--align-tokens", 0, "--tokens", 64 * 4 * 3, "--save-every",
                         1, "--eval-every", 99))
    assert done.returncode == 0, done.stderr
    assert "stage I is skipped: --align-tokens 0" in done.stdout
    assert "distil step 1: no token is a label" in done.stdout + done.stderr
    assert [set(row) & {"ce", "labels"} for row in all_lines(out)] == [{"labels"}, {"ce"}, {"ce"}]
    assert counts == [2, 3]  # as after resuming from step 1


def test_the_rate_of_stage_two_falls_to_its_end(tmp_path, corpus):
    done = command(*tiny(tmp_path / "run", corpus, "--align-tokens", 0, "--final-lr", 0,
                         "--tokens", 64 * 4 * 8))
    assert done.returncode == 0, done.stderr
    rates = [row["lr"] for row in all_lines(tmp_path / "run")]
    assert rates[:3] == [5e-4, 1e-3, 1e-3] and rates[-1] < 1e-4
    assert all(a > b for a, b in zip(rates[2:], rates[3:]))
    default = distill.parse_arguments(["--teacher", "x", "--lr", "3e-4"])
    assert default.final_lr == 3e-4 and distill.parse_arguments([]).final_lr == 0


@pytest.mark.parametrize("flag", ["align-tokens", "align-lr", "batch", "beta", "context",
                                  "eval-every", "eval-rows", "final-lr", "gamma", "lr",
                                  "micro-batch", "save-every", "seed", "sinks", "tokens", "topk",
                                  "warmup", "window"])
def test_every_number_has_its_range(flag, capsys):
    for value in ("nan", "inf", "-1", "much", ""):
        with pytest.raises(SystemExit) as end:
            distill.parse_arguments([f"--{flag}", value])
        assert end.value.code == 2
        assert f"argument --{flag}: {value!r} is not a" in capsys.readouterr().err


def test_help_fits_a_screen_a_group(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        distill.parse_arguments(["--help"])
    groups = capsys.readouterr().out.split("\n\n")
    assert len(groups) >= 6 and max(group.count("\n") for group in groups) < 24
    numbers = {a for a, value in vars(distill.parse_arguments([])).items()
               if type(value) in (int, float)}
    assert len(numbers) == 19  # all of the test above, and --features, a choice


def test_nothing_printed_ends_a_run_in_a_terminal_without_the_characters(tmp_path, corpus):
    """In a process with the C locale, and over real pipes: text, path and help are not ASCII."""
    out = tmp_path / "é"
    env = {**ONE_THREAD, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    data = tmp_path / "données.jsonl"
    write_rows(data, ["π ≈ é " * 30 + str(i) for i in range(100)])
    done = subprocess.run(
        [sys.executable, str(ROOT / "distill.py"), *map(str, tiny(
            out, data, "--align-tokens", 256, "--tokens", 256))],
        capture_output=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    assert b"The student is in" in done.stdout and (out / "student").exists()


@pytest.mark.parametrize("flags, moves", [
    (["--train", "new"], lambda name: is_new(name)),
    (["--train", "mixer", "--mixer", "mlstm"], lambda name: "self_attn" in name),
    (["--align-tokens", 0, "--mixer", "mlstm+swa", "--features", 1], lambda name: True),
    (["--mixer", "swa", "--gamma", 0], lambda name: True)])
def test_ablation_flags_change_what_they_say(tmp_path, corpus, flags, moves):
    done = command(*tiny(tmp_path / "run", corpus, "--align-tokens", 768, "--tokens", 768, *flags))
    assert done.returncode == 0, done.stderr
    student, teacher = (dict(load_pretrained(x).named_parameters())
                        for x in (tmp_path / "run/student", SMALL))
    for name, p in student.items():
        assert name not in teacher or torch.equal(p, teacher[name]) != moves(name), name
    aligned = any(stage == "align" for stage, _ in logged(tmp_path / "run"))
    assert aligned == ("after stage I " in done.stdout) == ("stage I is skipped" not in done.stdout)


def all_lines(out):
    """Every whole line of the log, repeated steps too."""
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(x) for x in lines if x.endswith("\n")]


def start(args, rank=None, port=None):
    """The command in a forked child (fork: no seconds of imports), its output in a file.

    rank, port: as one of two processes, as torchrun would start them.
    """
    def child():
        sys.stdout = sys.stderr = open(Path(args[args.index("--out") + 1]).with_suffix(".txt"), "a")
        if port:
            os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2",
                              MASTER_ADDR="localhost", MASTER_PORT=f"{port}")
        distill.command([str(a) for a in args])

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def start_two(args):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [start(args, rank, port) for rank in range(2)]


def wait_for(out, stage, step, is_alive):
    """Until the log has that step."""
    while not (out / "log.jsonl").exists() or (stage, step) not in logged(out):
        assert is_alive()
        time.sleep(0.01)


def saving(out):
    return glob.glob(f"{out}/checkpoints/*.tmp/*")  # Path.glob raises when a folder vanishes


def test_runs_killed_at_random_go_on_with_the_same_losses(tmp_path, corpus):
    more = ("--save-every", 1, "--align-tokens", 64 * 4 * 20, "--tokens", 64 * 4 * 20)
    whole = start(tiny(tmp_path / "whole", corpus, *more))
    whole.join(600)
    assert whole.exitcode == 0
    expected = logged(tmp_path / "whole")
    out, rng = tmp_path / "run", np.random.default_rng(0)
    flags, kills, in_save = tiny(out, corpus, *more), 0, 0

    def lines_of(stage):
        return sum(row["stage"] == stage for row in all_lines(out)) if (
            out / "log.jsonl").exists() else 0

    while True:
        resume = ("--resume",) if (out / "run.json").exists() else ()
        process, began = start((*flags, *resume)), time.time()
        if kills < 12:  # six in each stage, after one or two more steps and a part of the next
            stage = "align" if kills < 6 else "distil"
            enough = lines_of(stage) + rng.integers(1, 3)
            while process.is_alive() and lines_of(stage) < enough:
                assert time.time() < began + 600
            if kills % 3 == 0:  # every third one in the middle of a save
                while process.is_alive() and not saving(out):
                    pass
            else:
                time.sleep(rng.uniform(0, 0.1))
            in_save += bool(saving(out))
            process.kill()
            kills += 1
        process.join(600)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert len(list(out.glob("checkpoints/*"))) <= 6  # of each stage two, a torn one
    assert kills == 12 and in_save >= 2
    for row in all_lines(out):  # bit-equal, also the steps that were done twice
        assert row == expected[row["stage"], row["step"]]
    assert logged(out) == expected
    a, b = (load_pretrained(o / "student").parameters() for o in (out, tmp_path / "whole"))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_a_stop_is_saved_and_other_settings_are_refused(tmp_path, corpus):
    for stage, name in (("align", "seed"), ("distil", "student")):
        out = tmp_path / stage
        process = start(tiny(out, corpus, "--save-every", 100))
        wait_for(out, stage, 7, process.is_alive)
        process.terminate()
        process.join(60)
        assert process.exitcode == 0 and "and --resume" in out.with_suffix(".txt").read_text()
        assert not (out / name).exists() and list(out.glob(f"checkpoints/{stage}-*"))
        changed = command(*tiny(out, corpus, "--resume", "--seed", 3, "--beta", 0.2))
        assert changed.returncode == 2
        assert "seed was 0, now 3" in changed.stderr and "beta was 0.1, now 0.2" in changed.stderr


def test_a_disk_that_fills_while_saving_is_one_sentence(tmp_path, corpus):
    flags = tiny(tmp_path / "run", corpus, "--teacher", TEACHER, "--align-tokens", 768, "--tokens",
                 768)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, hard))  # no file above 3 MB
    try:
        full = command(*flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert "cannot be written" in full.stderr.splitlines()[-1]
    assert not (tmp_path / "run/seed").exists()
    resumed = command(*flags, "--resume")
    assert resumed.returncode == 0, resumed.stderr


def test_a_torn_checkpoint_is_named_and_the_one_before_is_used(tmp_path, corpus):
    out = tmp_path / "run"
    process = start(tiny(out, corpus, "--save-every", 2))
    wait_for(out, "distil", 7, process.is_alive)
    process.kill()
    process.join()
    last = sorted(out.glob("checkpoints/distil-*[0-9]"))[-1]
    file = last / "exp_avg-0000.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with open(out / "log.jsonl", "a") as log:
        log.write('{"stage": "distil", "st')  # as a full disk leaves it
    resumed = command(*tiny(out, corpus, "--save-every", 2, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert f"{last} cannot be read" in resumed.stdout
    assert logged(out)["distil", 8]


def test_if_all_checkpoints_are_torn_the_stage_begins_anew_and_says_so(tmp_path, capsys):
    run = Namespace(out=tmp_path, world=1)
    (tmp_path / "checkpoints/align-00000007").mkdir(parents=True)
    assert distill.load_checkpoint(run, "distil", {}, None) == 0
    assert capsys.readouterr().out == ""
    assert distill.load_checkpoint(run, "align", {}, None) == 0
    assert "no checkpoint of align is whole: it begins anew" in capsys.readouterr().out


# ------------------------------------------------------------------ several processes


def closeness(a, b):
    """Largest relative difference of two logs' losses."""
    assert a.keys() == b.keys()
    return max(abs(a[at][key] - b[at][key]) / abs(a[at][key])
               for at in a for key in ("loss", "ce", "kl") if key in a[at])


def assert_close(one, two, apart):
    """Losses of every step, and the tables."""
    assert closeness(logged(one), logged(two)) < apart
    results = [json.loads((out / "results.json").read_text()) for out in (one, two)]
    for name, r in results[0].items():
        assert r["all"]["kl"] == pytest.approx(results[1][name]["all"]["kl"], rel=max(1e-3, apart))


@pytest.mark.parametrize("more, apart", [
    (["--train", "mixer", "--targets", "TMP/t"], 1e-5),
    (["--dtype", "bfloat16"], 1e-2)])  # one rounding of bf16: 4e-3
def test_two_processes_have_the_losses_of_one(tmp_path, corpus, more, apart):
    flags = ("--micro-batch", 1, "--align-tokens", 64 * 4 * 6, "--tokens", 64 * 4 * 6,
             "--no-recompute", *(x.replace("TMP", str(tmp_path)) for x in more))
    two = start_two(tiny(tmp_path / "two", corpus, *flags))
    for process in two:
        process.join(240)
    said = (tmp_path / "two.txt").read_text()
    assert [process.exitcode for process in two] == [0, 0], said
    one = command(*tiny(tmp_path / "one", corpus, *flags))  # reads the targets that two have made
    assert one.returncode == 0, one.stderr
    assert_close(tmp_path / "one", tmp_path / "two", apart)
    assert said.count("held-out, after stage II") == 1  # one process speaks


@pytest.mark.parametrize("torchrun, stage", [(False, "align"), (True, "distil")])
def test_a_run_of_two_processes_goes_on_with_one(tmp_path, corpus, whole, torchrun, stage):
    """Until then it has the losses of one, with --recompute; the longer one by torchrun itself."""
    out = tmp_path / "run"
    if torchrun:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
             "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", ROOT / "distill.py",
             *map(str, tiny(out, corpus))], cwd=ROOT, env=ONE_THREAD, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        wait_for(out, stage, 7, lambda: launcher.poll() is None)
        launcher.send_signal(signal.SIGTERM)  # torchrun hands it on
        launcher.wait(60)
    else:
        two = start_two(tiny(out, corpus))
        wait_for(out, stage, 7, two[1].is_alive)
        for process in two:
            process.terminate()
        for process in two:
            process.join(60)
            assert process.exitcode == 0
    resumed = command(*tiny(out, corpus, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert "written by 2 processes, now 1" in resumed.stdout
    assert_close(whole[0], out, 1e-5)


@pytest.mark.parametrize("status", [0, 2])
def test_a_process_of_torchrun_leaves_without_pythons_shutdown(tmp_path, status):
    """In that a thread of gloo's would abort it now and then; distill.leave says why."""
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(tmp_path / "said", "w")
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store",
                                             rank=0, world_size=1)
        print(distill.all_sum(torch.ones(1)).item())
        try:
            distill.leave(status)
        finally:
            print("Python shuts down", flush=True)
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    assert (tmp_path / "said").read_text() == "1.0\n"


def test_the_planned_memory_is_what_a_step_takes():
    """Peak of resident memory in processes of their own, over two steps, against plan_memory."""
    steps = [["align"], ["distil", "--train", "mixer", "--micro-batch", 2],
             ["distil", "--no-recompute"], ["distil", "--dtype", "bfloat16", "--context", 32],
             ["align", "--dtype", "bfloat16", "--micro-batch", 2]]
    # Freed blocks go back at once: else the C library keeps some, at its own discretion.
    env = {**ONE_THREAD, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, "-c", PEAK], input=json.dumps(steps),
                          capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for step, line in zip(steps, done.stdout.splitlines(), strict=True):
        planned, measured = map(int, line.split())
        assert planned == pytest.approx(measured, rel=0.15) and measured > 100e6, step


PEAK = """
import ctypes, dataclasses, gc, json, os, sys
import torch, distill
from model import ModelConfig, Transformer, initialise_mixer, student_config, student_from_teacher

def status(key):
    return next(int(x.split()[1]) << 10 for x in open("/proc/self/status") if x.startswith(key))

def measure(stage, *flags):
    run = distill.parse_arguments(["--teacher", "-", "--context", "512", "--dtype", "float32",
                                   *map(str, flags)])
    run.device, run.world, run.dtype = torch.device("cpu"), 1, getattr(torch, run.dtype)
    small = ModelConfig.from_hf("tests/teacher")
    large = dataclasses.replace(small.with_layers(4), vocab_size=16384, hidden_size=384,
                                num_heads=6, num_kv_heads=2, head_dim=64, intermediate_size=1024,
                                tied=False)
    planned = distill.plan_memory(run, student_config(large, 256, 4, "hybrid", 4), stage)["in all"]
    peaks = [peak(run, stage, config) for config in (small, large)]  # the first loads the code
    print(planned, peaks[1])

def peak(run, stage, config):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the first has left behind would be used, and not seen
    base = status("VmRSS")
    teacher = Transformer(config).requires_grad_(False).to(run.dtype)
    if stage == "align":
        student = student_from_teacher(teacher, window=256)
    else:
        student = Transformer(student_config(config, 256, 4, "hybrid", 4))
        for block in student.model["layers"]:
            initialise_mixer(block.self_attn)
    optimizer = distill.make_optimizer(distill.select_trainable(
        student, "new" if stage == "align" else run.train))
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    for step in range(2):
        tokens = torch.randint(0, 1024, (run.micro_batch, run.context))
        batch = tokens, torch.zeros_like(tokens), tokens
        if stage == "align":
            with distill.autocast(run):
                distill.alignment_losses(student, *batch[:2], 1.0)
        else:
            targets = distill.teacher_targets(run, teacher, batch)
            distill.distil_loss(run, student, batch, targets)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return status("VmHWM") - base

for step in json.load(sys.stdin):  # each in a child: what one leaves in memory, another would use
    if os.fork() == 0:
        measure(*step)
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.parametrize("key, stored, size", [
    ("dtype", "float32", 4), ("torch_dtype", "float32", 4), ("torch_dtype", "bfloat16", 2)])
def test_the_plan_counts_a_teacher_as_it_is_stored(tmp_path, monkeypatch, key, stored, size):
    monkeypatch.setattr(distill, "working_bytes", lambda *args: (0, 0))
    config = json.loads((TEACHER / "config.json").read_text())
    del config["torch_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config | {key: stored}))
    printed = command("--teacher", tmp_path, "--plan", "--dtype", "bfloat16", "--context", 64,
                      "--window", 16).stdout
    planned = float(printed.split(" teacher ")[1].split()[0])
    count = sum(p.numel() for p in load_pretrained(TEACHER).parameters())
    assert planned == pytest.approx(size * count / 1e9, rel=1e-2)


def test_bad_input_is_one_sentence_and_exit_2(tmp_path, corpus, tokenizer):
    out = tmp_path / "run"

    def refused(*args):
        done = command(*args)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        *before, last = done.stderr.replace("\r", "\n").strip().splitlines()
        assert "error: " in last and not any("error" in line for line in before)
        assert not (out / "student").exists() and not (out / "run.json").exists()
        return last

    def data(name, content):
        (tmp_path / name).write_bytes(content)
        return refused(*tiny(out, tmp_path / name))

    good = corpus.read_bytes()
    assert f"{tmp_path / 'torn.jsonl'}:301" in data("torn.jsonl", good + b'{"text": "half')
    assert "UTF-8" in data("bytes.jsonl", good + b'{"text": "\xff\xfe"}\n')
    assert "messages" in data("other.jsonl", good + b'{"prompt": "x"}\n')
    chat = b'{"messages": [{"role": "user", "content": "x"}]}'
    assert "chat template" in data("chat.jsonl", chat)
    assert "no document" in data("empty.jsonl", b"\n")
    assert "--context" in data("short.txt", b"too little\n" * 10)
    assert "no file" in refused(*tiny(out, tmp_path / "gone.jsonl"))
    assert "FILE.txt" in refused(*tiny(out, tmp_path / "a.parquet"))
    assert "not a number" in refused(*tiny(out, f"{corpus}=much"))
    assert "config.json" in refused(*tiny(out, corpus, "--teacher", tmp_path / "nowhere"))
    shutil.copytree(TEACHER, tmp_path / "mixed")
    spec = json.loads((TEACHER / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 2000, "content": "<|more|>"})
    (tmp_path / "mixed/tokenizer.json").write_text(json.dumps(spec))
    assert "not of one model" in refused(*tiny(out, corpus, "--teacher", tmp_path / "mixed"))
    seed = write_rows(tmp_path / "seed.jsonl", ["one", "two"])
    assert "rename" in refused(*tiny(out, seed))
    assert "=WEIGHT or none" in refused(
        *tiny(out, corpus, "--data", f"{corpus}=2", tmp_path / "short.txt"))
    assert "--window" in refused(*tiny(out, corpus, "--window", 0))
    for device in ("mps", "cuda:7", "gpu", "meta"):
        assert f"--device {device}: this torch cannot use it" in refused(
            *tiny(out, corpus, "--device", device))
    both = tmp_path / "both.jsonl"
    both.write_text('{"text": "a", "messages": []}\n')
    assert f"{both}:1: expected one of" in refused(*tiny(out, both))
    assert "--resume" in refused(*tiny(out, corpus, "--resume"))


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, corpus):
    done = command(*tiny(tmp_path / "run", corpus, "--lr", 1e13))
    assert done.returncode == 2 and "not finite" in done.stderr
    assert not (tmp_path / "run/student").exists() and (tmp_path / "run/seed").exists()


def test_experts_share_a_seed_and_are_merged_and_scored(tmp_path, corpus):
    rng = np.random.default_rng(1)
    other = write_rows(tmp_path / "b.jsonl", [words(rng, 60) for _ in range(200)])
    task = tmp_path / "copy.jsonl"
    task.write_text(json.dumps({"id": "1", "type": "generate", "prompt": "copy: x y =",
                                "gold": " x y", "stop": ["\n"], "max_new_tokens": 8}) + "\n")
    out = tmp_path / "run"
    flags = tiny(out, corpus, "--experts", "--tasks", task, "--align-tokens", 64 * 4 * 4,
                 "--tokens", 64 * 4 * 4)
    done = command(*(x for flag in flags for x in ([flag, other] if flag == corpus else [flag])))
    assert done.returncode == 0, done.stderr
    weights = {name: dict(load_pretrained(out / name).named_parameters())
               for name in ("a/student", "b/student", "generalist/student", "merged", "seed")}
    for name, merged in weights["merged"].items():
        mean = (weights["a/student"][name].double() + weights["b/student"][name].double()) / 2
        assert torch.equal(merged, mean.float())
        assert not torch.equal(weights["a/student"][name], weights["b/student"][name])
    lineages = {(out / name / "lineage.json").read_text()
                for name in ("a/student", "b/student", "generalist/student")}
    assert len(lineages) == 1
    report = json.loads((out / "report/report.json").read_text())
    assert set(report["students"]) == {str(out / name) for name in (
        "a/student", "b/student", "generalist/student", "merged")}
    steps = [len((out / name / "log.jsonl").read_text().splitlines())
             for name in ("a", "b", "generalist")]
    assert steps == [4, 4, 8]  # the generalist trains as long as both
    assert not [*out.rglob("checkpoints/*")]
    again = command(*tiny(tmp_path / "more", corpus, "--start", out / "seed"))
    assert again.returncode == 0 and "stage I is skipped" in again.stdout
    assert "whatever --mixer" in again.stdout and "held-out, start:" in again.stdout
    assert "has other weights" not in again.stdout
    later = command(*tiny(tmp_path / "later", corpus, "--start", out / "merged", "--tokens", 64))
    assert later.returncode == 0 and "merged has other weights" in later.stdout
    assert not any(stage == "align" for stage, _ in logged(tmp_path / "more"))
    weighed = command(*tiny(tmp_path / "weighed", corpus, "--data", f"{corpus}=3", f"{other}=1",
                            "--experts", "--start", out / "seed", "--tokens", 64))
    assert weighed.returncode == 0
    assert weighed.stdout.count("stage I, which alone weighs files, is skipped") == 2
