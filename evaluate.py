"""Score students against their teacher, and say how lossless the distillation was.

    tasks        JSONL files: choices by log-likelihood, generated answers, code, needles in a
                 haystack, all scored as lm-evaluation-harness does
    statistics   recovery, Win-and-Tie rate C_alpha and critical tolerance alpha* (arXiv
                 2603.15590, "the paper", Eq. 15-17), with bootstrap intervals over tasks' rows
    gates        the map of the output gates: where the mLSTM speaks, where the window
    speed        teacher against student: prefill, first token, decoding and memory over a grid
                 of contexts and batches (the paper's Figures 5 and 10 to 14)

Published benchmarks (PIQA, MMLU, GSM8K, ...) run in lm-evaluation-harness itself, through the
bridge in section 8. Not here: benchmarks judged by another language model (MT-Bench), training
(distill.py), merging (merge.py).

Run:
    python evaluate.py compare --teacher DIR --student DIR --tasks FILE.jsonl... --out REPORT
    python evaluate.py gates --student DIR --data FILE.txt|.jsonl --picture gates.png
    python evaluate.py molecules --model DIR --data FAMILIES.jsonl       # valid, unique, novel
    python evaluate.py lm-eval --model DIR --tasks arc_easy,piqa       # pip install lm_eval
    python evaluate.py speed --out SPEED      # the shipped teacher; or --teacher DIR, or --shape 8b

Contents: 1 statistics · 2 task files · 3 log-likelihoods and generation · 4 code in a subprocess ·
5 scoring task files · 6 sequences · 7 output gates · 8 bridge to lm-evaluation-harness · 9 report ·
10 speed · 11 command
"""

import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import os
import platform
import random
import re
import secrets
import signal
import subprocess
import statistics
import sys
import tempfile
import time
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import (MIXERS, SMILES_PIECES, Cache, HybridAttention, ModelConfig, Rope, Transformer,
                   generate, load_pretrained, load_with_tokenizer,
                   reverse_complement, sha256, student_from_teacher, write_json)

# ----------------------------------------------------------------------------------------------
# 1. Statistics: recovery, Win-and-Tie rate, critical tolerance
# ----------------------------------------------------------------------------------------------
# All of these take scores as dicts task -> number; A_S and A_T are the student's and the teacher's.

TIE = 1e-12  # rounding of a ratio; scores that differ by one row in a billion differ by more


def recovery(student, teacher, chance=None):
    """Recovery A_S / A_T of every task (Eq. 15), as a dict.

    chance: level of guessing per task; both scores are counted from there, since near that level
    any student "recovers" all of it. Infinite where the teacher's score is at or below chance (0
    when none is given). Raises ValueError if tasks differ or a score is negative or not finite.
    """
    if student.keys() != teacher.keys() or not teacher:
        raise ValueError("student and teacher must be scored on the same tasks, one or more; only "
                         f"one of them has {sorted(student.keys() ^ teacher.keys())}")
    if not all(0 <= score < math.inf for score in (*student.values(), *teacher.values())):
        raise ValueError("scores must be finite and not negative")
    level = {task: (chance or {}).get(task, 0.0) for task in teacher}
    return {task: (student[task] - level[task]) / (teacher[task] - level[task])
            if teacher[task] > level[task] else math.inf for task in teacher}


def win_and_tie(student, teacher, alpha):
    """C_alpha: share of tasks with A_S >= (1 - alpha) A_T (Eq. 16). Errors as in `recovery`."""
    drops = [1 - r for r in recovery(student, teacher).values()]
    return sum(drop <= alpha + TIE for drop in drops) / len(drops)


def critical_tolerance(student, teacher):
    """alpha*: the smallest alpha >= 0 with C_alpha >= 0.5 (Eq. 17). Errors as in `recovery`.

    0 means lossless: the student ties or wins on at least half of the tasks. No search is needed:
    C_alpha rises by 1/n at each task's drop, so it reaches 1/2 at the ceil(n/2)-th smallest.
    """
    drops = sorted(1 - r for r in recovery(student, teacher).values())
    return max(0.0, drops[(len(drops) + 1) // 2 - 1])


def bootstrap(student, teacher, *, draws=4000, seed=0):
    """How far C_0 and alpha* would move with other test rows: a paired bootstrap.

    student, teacher: dicts task -> list of scores, one a row, rows in the same order. Each draw
    resamples every task's rows with replacement, the same for both models: most rows are solved
    by both or neither, so unpaired draws would exaggerate the error.

    Returns {"win_and_tie": [low, high], "critical_tolerance": [low, high], "p_lossless": share of
    draws with C_0 >= 0.5}; the intervals hold 95 % of the draws. p_lossless is 1 if all rows agree,
    and only about 0.7 for a student as good as its teacher that errs on other rows.
    """
    generator = np.random.default_rng(seed)
    means = []
    for task, scores in teacher.items():
        if len(scores) != len(student[task]):
            raise ValueError(f"{task}: {len(student[task])} student and {len(scores)} teacher rows")
        pairs = np.stack((student[task], scores), axis=1).astype(float)
        # Scores take few values, so draw how often each (student, teacher) pair occurs.
        values, counts = np.unique(pairs, axis=0, return_counts=True)
        drawn = generator.multinomial(len(pairs), counts / len(pairs), size=draws)
        means.append(drawn @ values / len(pairs))  # (draws, 2)
    worlds = [[dict(zip(teacher, scores)) for scores in world.T.tolist()]
              for world in np.stack(means, axis=1)]  # each (tasks, 2)
    rates = np.array([win_and_tie(*world, 0.0) for world in worlds])
    tolerances = [critical_tolerance(*world) for world in worlds]
    return {"win_and_tie": np.quantile(rates, (0.025, 0.975)).tolist(),
            "critical_tolerance": np.quantile(tolerances, (0.025, 0.975)).tolist(),
            "p_lossless": float((rates >= 0.5).mean())}


# ----------------------------------------------------------------------------------------------
# 2. Task files
# ----------------------------------------------------------------------------------------------
# One JSON object a line. Strings are final: what the model reads, character for character, with
# no template. A file is a task, named as the file; its score is the mean over its rows.
#
#   type       field           meaning
#   (all)      id              string, once a file
#   choice     context         may be "" (then BOS, or EOS, stands before the choice)
#              choices         two or more continuations, usually with a leading space
#              gold            index of the right one, from 0
#              metric          "acc" (default): highest log-probability; "acc_norm": highest
#                              log-probability per character, one leading space not counted
#   generate   prompt, gold    strings
#              stop            list of strings that end the output and are cut off (default: none)
#              max_new_tokens  default 256
#              extract         regular expression; group 1 (or all) of its first match is compared
#                              instead of the output, no match is wrong. "(?s).*(...)": the last
#              match           "exact" (default) and "contains": after stripping white space;
#                              "number": the last number, as a value, so that $1,200. is 1200.0
#   code       prompt, test    program = prompt + output + "\n" + test; right if it runs to its end
#              stop, max_new_tokens (default 512)
#   needle     length, depth   a 7-digit number hidden in about `length` tokens of filler at
#              seed            `depth` (0: first, 1: last), and asked for at the end
# Sequences (section 6). Likelihoods are geometric means: 1 / perplexity, so that higher is better.
#   family     sequences       likelihood a token of the last one, the others before it
#   strand     dna             likelihood a base, mean of both strands' log-probabilities
#   probe      dna, labels     share of bases whose label (one character a base) a ridge probe on
#                              conjoined embeddings finds; fitted on the file's rows of other parity
#   molecule   sequences       1 if the molecule sampled after these (or none: []) is valid SMILES
#              seed            of the sampling
#              temperature     default 1.0
#              max_new_tokens  default 128

REQUIRED = object()  # in place of a default
FIELDS = {  # name: (type, default); a list is one of strings
    "choice": {"context": (str, REQUIRED), "choices": (list, REQUIRED), "gold": (int, REQUIRED),
               "metric": (str, "acc")},
    "generate": {"prompt": (str, REQUIRED), "gold": (str, REQUIRED), "stop": (list, []),
                 "max_new_tokens": (int, 256), "extract": (str, ""), "match": (str, "exact")},
    "code": {"prompt": (str, REQUIRED), "test": (str, REQUIRED), "stop": (list, []),
             "max_new_tokens": (int, 512)},
    "needle": {"length": (int, REQUIRED), "depth": (float, REQUIRED), "seed": (int, REQUIRED)},
    "family": {"sequences": (list, REQUIRED)},
    "strand": {"dna": (str, REQUIRED)},
    "probe": {"dna": (str, REQUIRED), "labels": (str, REQUIRED)},
    "molecule": {"sequences": (list, REQUIRED), "seed": (int, REQUIRED),
                 "temperature": (float, 1.0), "max_new_tokens": (int, 128)}}


def read_task(path):
    """The rows of a task file, defaults filled in, each with "where", its file:line.

    Raises ValueError naming file:line for whatever is wrong with a row, OSError for the file.
    """
    rows = {}
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = _check_row(json.loads(line))
                if row["id"] in rows:
                    raise ValueError(f"the id {row['id']!r} occurs twice in this file")
            except ValueError as error:  # JSON and UTF-8 errors among them
                raise ValueError(f"{path}:{number}: {error}") from None
            rows[row["id"]] = {**row, "where": f"{path}:{number}"}
    if not rows:
        raise ValueError(f"{path}: there is no row in this file")
    return list(rows.values())


def _check_row(row):
    """A parsed line -> the row with defaults; ValueError says what is wrong."""
    if not isinstance(row, dict) or row.get("type") not in FIELDS:
        raise ValueError("expected a JSON object whose type is one of " + ", ".join(FIELDS))
    fields = {"id": (str, REQUIRED), "type": (str, REQUIRED), **FIELDS[row["type"]]}
    row = {**{name: default for name, (_, default) in fields.items()}, **row}
    for name, value in row.items():
        if name not in fields:
            raise ValueError(f"{name!r} is no field of type {row['type']!r}")
        if value is REQUIRED:
            raise ValueError(f"the field {name!r} is missing")
        kind = fields[name][0]
        if not (type(value) is kind or kind is float and type(value) is int):
            raise ValueError(f"{name} = {value!r} is no {kind.__name__}")
        if kind is list and not all(isinstance(v, str) and v for v in value):
            raise ValueError(f"{name} = {value!r}: expected strings, none of them empty")
    need = {f"max_new_tokens = {row.get('max_new_tokens')} is below 1":
            row.get("max_new_tokens", 1) >= 1}
    match row:
        case {"type": "choice", "choices": choices, "gold": gold, "metric": metric}:
            need |= {"choices must be two or more": len(choices) > 1,
                     "a choice is empty": all(choice.strip() for choice in choices),
                     f"gold = {gold} is not from 0 to {len(choices) - 1}": 0 <= gold < len(choices),
                     f"metric {metric!r} is not acc or acc_norm": metric in ("acc", "acc_norm")}
        case {"type": "generate", "match": how, "gold": gold, "extract": extract}:
            need |= {f"match {how!r} is not exact, contains or number":
                     how in ("exact", "contains", "number"),
                     "gold is empty": gold.strip(),
                     f"gold = {gold!r} holds no number": how != "number" or _as_number(gold)
                     is not None}
            try:
                re.compile(extract)
            except re.error as error:
                raise ValueError(f"extract is no regular expression ({error})") from None
        case {"type": "family", "sequences": sequences}:
            need |= {"there are no sequences": sequences}
        case {"dna": dna}:
            reverse_complement(dna)
            labels = row.get("labels", dna)
            need |= {f"{len(dna)} bases, {len(labels)} labels: expected one a base, at least one":
                     1 <= len(dna) == len(labels)}
        case {"type": "molecule", "temperature": temperature}:
            need |= {f"temperature = {temperature} is below 0": temperature >= 0}
        case {"type": "needle", "length": length, "depth": depth}:
            need |= {f"length = {length} is below 64": length >= 64,
                     f"depth = {depth} is not from 0 to 1": 0 <= depth <= 1}
    for complaint, ok in need.items():
        if not ok:
            raise ValueError(complaint)
    return row


def _as_number(text):
    """The last number of a text as a Decimal, None if there is none. (Never eval model text.)"""
    found = re.findall(r"-?[$0-9.,]*[0-9]", text)
    try:
        return Decimal(re.sub(r"[$,]", "", found[-1])) if found else None
    except InvalidOperation:  # 1.2.3
        return None


def is_right(row, text):
    """Whether a "generate" row's output agrees with its gold."""
    if row["extract"]:
        found = re.search(row["extract"], text)
        if found is None:
            return False
        text = found[1 if found.re.groups else 0] or ""
    match row["match"]:
        case "exact":
            return text.strip() == row["gold"].strip()
        case "contains":
            return row["gold"].strip() in text
        case "number":
            return _as_number(text) == _as_number(row["gold"])


FILLER = (" The grass is green. The sky is blue. The sun is yellow. Here we go. There and back"
          " again.")


def needle_prompt(row, tokenizer):
    """A "needle" row's text and the number hidden in it, both decided by its seed."""
    number = str(random.Random(row["seed"]).randint(10 ** 6, 10 ** 7 - 1))
    needle = f" The magic number is {number}."
    question = "\nQuestion: What is the magic number in the text?\nAnswer: The magic number is"
    room = row["length"] - len(tokenizer.encode(needle + question))
    times = max(0, room // len(tokenizer.encode(FILLER, bos=False)))
    before = round(row["depth"] * times)
    text = FILLER * before + needle + FILLER * (times - before)
    return text.lstrip() + question, number


# ----------------------------------------------------------------------------------------------
# 3. Log-likelihoods and generation
# ----------------------------------------------------------------------------------------------

PREFILL = 2048  # tokens of a prompt per forward pass: memory does not grow with the prompt
LONG = 512      # a context of so many tokens is prefilled once for all its continuations
ROWS = 16       # prompts generated from together
TOKENS = 8192   # scored together on a GPU


def _equal_lengths(items, length, most):
    """Cut items into lists of equal length T, longest first, of at most most(T) items each."""
    ordered = sorted(items, key=length, reverse=True)
    for T, group in itertools.groupby(ordered, length):
        group = list(group)
        for a in range(0, len(group), most(T)):
            yield group[a:a + most(T)]


class Scorer:
    """A model on disk, its tokenizer, and what the harness asks of a model.

    Loads and raises as `load_with_tokenizer`.
    """

    def __init__(self, directory, device="cpu"):
        self.model, self.tokenizer = load_with_tokenizer(directory, device=device)
        config, bos_id = self.model.config, self.tokenizer.bos_id
        self.device, self.max_tokens = torch.device(device), config.max_positions
        # What stands before a text that has no context: BOS, or EOS where a family has none.
        self.prefix = config.eos_ids[:1] if bos_id is None else (bos_id,)

    def encode(self, text):
        """Ids with BOS as the tokenizer's own files say, but not twice where text spells it."""
        bos = self.tokenizer.adds_bos and self.tokenizer.decode([self.tokenizer.bos_id])
        return self.tokenizer.encode(text, bos=False if bos and text.startswith(bos) else None)

    def encode_pair(self, context, continuation):
        """Two strings -> (context ids, continuation ids), tuples, and how many tokens were lost.

        They are encoded as one text, so that tokens are those of natural text, and split where
        the context alone would end. White space at its end goes to the continuation: most
        tokenizers glue a space to the next word. A pair longer than the model's context loses
        tokens at its left end. Raises ValueError if the continuation has no tokens or too many.
        """
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if context:
            ids, split = self.encode(context + continuation), len(self.encode(context))
            left, right = ids[:split], ids[split:]
        else:
            left, right = self.prefix, self.tokenizer.encode(continuation, bos=False)
        if not left or not 1 <= len(right) <= self.max_tokens:
            raise ValueError(f"the continuation has {len(right)} tokens, the context {len(left)}; "
                             f"expected 1 to {self.max_tokens} (what the model reads), 1 or more")
        lost = max(0, len(left) + len(right) - 1 - self.max_tokens)  # the last is only predicted
        return (tuple(left[lost:]), tuple(right)), lost

    @torch.inference_mode()
    def loglikelihoods(self, pairs):
        """[(context ids, continuation ids)] -> [(log-probability, greedy)], one a pair.

        log-probability (nats, fp32 sum): of the continuation given the context; greedy: whether
        each of its tokens is the most likely one. Raises ValueError on NaN.

        A result depends on its pair alone, not on what else is in the list: sequences share a
        batch only if they are equally long, and on a CPU each goes alone, because matrix kernels
        round differently below 16 rows, and in padded rows (up to 2e-5 in a logit, measured),
        while a batch saves 20 %. Texts that many pairs read are computed once: whole inputs
        (all one-token choices of a question), and long contexts, whose cache is then copied.
        """
        found, short, long = {}, {}, {}
        for context, new in dict.fromkeys(pairs):
            if len(context) < LONG:
                short.setdefault(context + new[:-1], []).append((context, new))
            else:
                long.setdefault(context, []).append(new)
        on_gpu = self.device.type != "cpu"
        for batch in _equal_lengths(short, len, lambda T: max(1, on_gpu * TOKENS // T)):
            for inputs, logits in zip(batch, self.model(self._tensor(batch))):
                for context, new in short[inputs]:
                    found[context, new] = self._read(logits[-len(new):], new)
        for context, continuations in long.items():
            cache = Cache(self.model, 1, len(context) + max(map(len, continuations)))
            self._prefill([context[:-1]], cache)
            for new in continuations:
                inputs = self._tensor([context[-1:] + new[:-1]])
                logits = self.model(inputs, cache=copy.deepcopy(cache))[0]
                found[context, new] = self._read(logits, new)
        return [found[pair] for pair in pairs]

    @torch.inference_mode()
    def token_logprobs(self, ids):
        """Log-probability of each token of a text that stands after BOS (or EOS): (T,) float64."""
        if not self.prefix:
            raise ValueError(f"{self.model.source}: neither BOS nor EOS is known, so nothing can "
                             "stand before the first token; name eos_token_id in config.json")
        new, found = self._tensor([*self.prefix, *ids]), []
        cache = Cache(self.model, 1, len(new))
        for a in range(0, len(ids), PREFILL):
            h = self.model.hidden(new[None, a:min(a + PREFILL, len(ids))], cache=cache)[0]
            logprobs = F.linear(h, self.model.lm_head_weight).float().log_softmax(-1)
            found.append(logprobs.gather(1, new[a + 1:a + 1 + len(h), None])[:, 0].double())
        return torch.cat(found)

    def _tensor(self, rows):
        return torch.tensor(rows, device=self.device)

    def _prefill(self, rows, cache):
        """Equally long rows of ids into the cache; returns the last piece's hidden states."""
        tokens = self._tensor(rows)  # (B, T)
        for piece in tokens.split(PREFILL, dim=1):
            h = self.model.hidden(piece, cache=cache)
        return h

    def _read(self, logits, new):
        """logits (n, V) at which the n tokens of `new` were predicted."""
        new = self._tensor(new)
        logprobs = logits.float().log_softmax(-1)
        total = float(logprobs.gather(1, new[:, None]).sum())
        if math.isnan(total):  # argmax would choose it
            raise ValueError("the model's logits are not finite: are its weights damaged?")
        return total, bool((logits.argmax(-1) == new).all())

    @torch.inference_mode()
    def generate(self, prompts, stops, max_new_tokens):
        """Greedy continuations, as text, of prompts (lists of ids) of one length.

        stops, max_new_tokens: per prompt, strings that end it and a number of tokens; the model's
        eos ids end it too. Stops are searched in the decoded text, since tokens cut it elsewhere,
        and cut off. The beginning of a character whose other bytes have not come is held back.
        """
        cache = Cache(self.model, len(prompts), len(prompts[0]) + max(max_new_tokens))
        h = self._prefill(prompts, cache)
        new, texts = [[] for _ in prompts], [None] * len(prompts)
        while None in texts:
            logits = F.linear(h[:, -1], self.model.lm_head_weight)  # (B, V)
            if logits.isnan().any():
                raise ValueError("the model's logits are not finite: are its weights damaged?")
            tokens = logits.float().argmax(-1)
            for i, token in enumerate(tokens.tolist()):
                if texts[i] is not None:
                    continue
                ended = token in self.model.config.eos_ids
                new[i] += [] if ended else [token]
                text = self.tokenizer.decode(new[i]).rstrip("\ufffd")
                cut = min((text.find(s) for s in stops[i] if s in text), default=len(text))
                if ended or cut < len(text) or len(new[i]) == max_new_tokens[i]:
                    texts[i] = text[:cut]
            if None in texts:
                h = self.model.hidden(tokens[:, None], cache=cache)
        return texts

    def cut_prompt(self, text, max_new_tokens):
        """A prompt's ids, and how many were lost at its left end for the output to fit."""
        ids = self.encode(text) or list(self.prefix)
        room = self.max_tokens - max_new_tokens
        if room < 1:
            raise ValueError(f"max_new_tokens = {max_new_tokens} leaves no room for a prompt in a "
                             f"context of {self.max_tokens} tokens")
        return ids[-room:], max(0, len(ids) - room)


# ----------------------------------------------------------------------------------------------
# 4. Code in a subprocess
# ----------------------------------------------------------------------------------------------
# This guards against accidents, not adversaries: models write endless loops, rm -rf and fork
# bombs by mistake. Code that means to break out of a Python process can. For code of strangers
# use a virtual machine.

SECONDS = 10  # of a program, wall clock and CPU

# What the fresh interpreter runs first. The program cannot print the secret by accident, and
# sys.exit(), os._exit(0) or a crash before the end of the tests never reaches the last line.
_RUNNER = """
import os, resource, sys
folder, secret = os.path.realpath(os.getcwd()), sys.argv.pop()
limits = dict(AS=1 << 30, CPU=int(sys.argv.pop()), FSIZE=1 << 24, NPROC=64, CORE=0)
for name, most in limits.items():
    kind = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))
processes = {"os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system",
             "subprocess.Popen", "os.kill", "os.killpg"}
changes = {"os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir",
           "os.symlink", "os.truncate", "shutil.rmtree"}
writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
def refuse(event, args):
    if event in processes:
        raise PermissionError(event + " is not allowed here")
    if event in changes or event == "open" and isinstance(args[2], int) and args[2] & writes:
        for path in args[:2] if event in ("os.rename", "os.link") else args[:1]:
            path = "" if isinstance(path, int) else os.path.realpath(os.fsdecode(path))
            if path and not (path + "/").startswith(folder + "/") and path != "/dev/null":
                raise PermissionError(f"{event} outside of {folder}: {path}")
sys.addaudithook(refuse)
exec(compile(sys.stdin.read(), "program", "exec"), {"__name__": "__main__"})
os.write(1, secret.encode())
"""


@functools.cache
def _no_network():
    """The command prefix that takes the network away, where the system allows it."""
    command = ["unshare", "--map-root-user", "--net"]
    try:
        works = subprocess.run([*command, "true"], capture_output=True).returncode == 0
    except OSError:
        works = False
    return command if works else []


def run_program(program, *, seconds=SECONDS):
    """Whether a Python program (source, str) runs to its end within `seconds`, in a process apart.

    Fresh isolated interpreter in an empty folder of its own; no environment; limits on memory (1
    GB), CPU time, file size (16 MB) and processes; no child processes, and no writing outside of
    the folder; no network where `unshare` works. What is left of its session is killed.
    """
    secret = secrets.token_hex(16)
    with (tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
          tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as output):
        source.write(program.encode("utf-8", "replace"))
        source.seek(0)
        process = subprocess.Popen(
            [*_no_network(), sys.executable, "-I", "-X", "utf8", "-c", _RUNNER, str(seconds),
             secret], stdin=source, stdout=output, stderr=subprocess.STDOUT, cwd=folder,
            env={"TMPDIR": folder}, start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):  # nobody is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return secret.encode() in output.read()


# ----------------------------------------------------------------------------------------------
# 5. Scoring task files
# ----------------------------------------------------------------------------------------------


def score_choices(scorer, rows):
    """Yield (row, result) of "choice" rows: every choice's log-probability, acc and acc_norm."""
    for a in range(0, len(rows), 256):
        block, pairs, lost = rows[a:a + 256], [], []
        for row in block:
            encoded = [_at(row, scorer.encode_pair, row["context"], c) for c in row["choices"]]
            pairs += [pair for pair, _ in encoded]
            lost.append(max(n for _, n in encoded))
        totals = iter(total for total, _ in scorer.loglikelihoods(pairs))
        for row, n in zip(block, lost):
            own = list(itertools.islice(totals, len(row["choices"])))
            per_character = [x / len(choice.removeprefix(" "))
                             for x, choice in zip(own, row["choices"])]
            # index(max(...)): the first of equals wins
            result = {name: float(x.index(max(x)) == row["gold"])
                      for name, x in (("acc", own), ("acc_norm", per_character))}
            yield row, {"score": result[row["metric"]], **result, "lost_tokens": n,
                        "chance": 1 / len(own), "logprobs": own}


def score_texts(scorer, rows):
    """Yield (row, result) of "generate", "code" and "needle" rows: the output, and if it is right.

    Prompts go together only if equally long: padding on the left would enter sinks and state. A
    batch can change the rounding of a step, so two tokens within 2e-5 of each other could swap;
    on the 600 prompts in tests/tasks none did, against prompts one by one.
    """
    requests = []
    for row in rows:
        if row["type"] == "needle":
            prompt, number = needle_prompt(row, scorer.tokenizer)
            row = {**row, "type": "generate", "prompt": prompt, "gold": number, "stop": [],
                   "extract": "", "match": "contains", "max_new_tokens": 16}
        requests.append((row, *_at(row, scorer.cut_prompt, row["prompt"], row["max_new_tokens"])))
    for batch in _equal_lengths(requests, lambda request: len(request[1]), lambda T: ROWS):
        rows, prompts, losses = zip(*batch)
        texts = scorer.generate(prompts, [row["stop"] for row in rows],
                                [row["max_new_tokens"] for row in rows])
        for row, lost, text in zip(rows, losses, texts):
            if row["type"] == "code":
                right = run_program(f"{row['prompt']}{text}\n{row['test']}")
            else:
                right = is_right(row, text)
            yield row, {"score": float(right), "lost_tokens": lost, "chance": 0.0, "output": text}


def _at(row, function, *args):
    """function(*args); its ValueError names the row's file:line."""
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"{row['where']}: {error}") from None


def _model_hash(directory):
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
             "vocab.txt")
    small = [Path(directory, name) for name in names if Path(directory, name).exists()]
    return sha256(*small, *sorted(Path(directory).glob("*.safetensors")))


def _read_samples(path, model, files):
    """The results a samples file holds: {(task, id): result}. A torn last line is cut off.

    model: hash; files: task -> hash. Raises ValueError if the results are not of these.
    """
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):  # the run was killed while it wrote
        os.truncate(path, whole)
    results = {}
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            result = json.loads(line)
            key = result["task"], result["id"]
            same = result["model"] == model, result["file"] == files.get(key[0], result["file"])
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}:{number}: not a result; delete this line") from None
        if not all(same):
            raise ValueError(f"{path}:{number} is a result of another "
                             f"{'version of ' + key[0] if same[0] else 'model'}; name another file")
        results[key] = result
    return results


def evaluate_rows(directory, task_files, *, samples=None, device="cpu", limit=None,
                  allow_code_execution=False):
    """Score a model folder on task files: {task: [result, ...]}, a result a row, in file order.

    A result is a dict with "score" (0.0 or 1.0), "chance", "lost_tokens" (of an over-long
    context) and what `score_choices` or `score_texts` adds. samples: a JSONL file that results
    are added to as they come and read from first, so that a second call goes on after a stop.
    limit: of rows a task. Raises ValueError or OSError naming file, line or flag.
    """
    tasks = {Path(path).stem: read_task(path)[:limit] for path in task_files}
    if len(tasks) < len(task_files):
        raise ValueError("--tasks: two files have the same name, which is the name of the task")
    if not allow_code_execution:
        for row in itertools.chain(*tasks.values()):
            if row["type"] == "code":
                raise ValueError(f"{row['where']} runs code that the model writes. If you accept "
                                 "that, add --allow-code-execution")
    files = {Path(path).stem: sha256(path) for path in task_files}
    model = _model_hash(directory)
    done = _read_samples(Path(samples), model, files) if samples else {}
    todo = {task: [row for row in rows if (task, row["id"]) not in done]
            for task, rows in tasks.items()}
    scorer = Scorer(directory, device) if any(todo.values()) else None
    if allow_code_execution and not run_program("pass"):
        raise ValueError(f"{sys.executable} does not run in a subprocess with limits here, so no "
                         "code task could pass")
    with (open(samples or os.devnull, "a", encoding="utf-8") as log,
          tqdm(total=sum(map(len, todo.values())), desc=Path(directory).name, unit="row",
               dynamic_ncols=True, leave=False) as bar):
        for task, rows in todo.items():
            choices = [row for row in rows if row["type"] == "choice"]
            texts = [row for row in rows if row["type"] in ("generate", "code", "needle")]
            sequences = ((row, _at(row, score_sequence, scorer, row)) for row in rows
                         if row["type"] in ("family", "strand", "molecule"))
            probes = [row for row in tasks[task] if row["type"] == "probe"]  # fitted on all of them
            probes = probes if any(row["type"] == "probe" for row in rows) else []
            for row, result in itertools.chain(score_choices(scorer, choices),
                                               score_texts(scorer, texts), sequences,
                                               score_probes(scorer, probes)):
                key = {"model": model, "file": files[task], "task": task, "id": row["id"]}
                done[task, row["id"]] = {**key, **result}
                log.write(json.dumps({**key, **result}) + "\n")
                log.flush()
                bar.update()
    return {task: [done[task, row["id"]] for row in rows] for task, rows in tasks.items()}


def mean_scores(results, key="score"):
    """{task: [result, ...]} -> {task: mean of result[key]}."""
    return {task: sum(r[key] for r in rows) / len(rows) for task, rows in results.items()}


def evaluate_tasks(directory, task_files, **options):
    """Score a model folder on task files: {task: mean score}. Arguments as `evaluate_rows`."""
    return mean_scores(evaluate_rows(directory, task_files, **options))


# ----------------------------------------------------------------------------------------------
# 6. Sequences: families, both strands of DNA, molecules
# ----------------------------------------------------------------------------------------------


def family_nats(scorer, sequences):
    """Negative log-probability of each sequence given those before it: [(nats, tokens), ...].

    As in training: each has a separator behind it (not counted), at which positions restart.
    """
    ids, spans = [], []
    for member in map(scorer.tokenizer.encode_member, sequences):
        spans.append(slice(len(ids), len(ids) + len(member) - 1))
        ids += member
    logprobs = scorer.token_logprobs(ids)
    return [(-float(logprobs[span].sum()), span.stop - span.start) for span in spans]


def strand_scores(scorer, dna):
    """Log-probability (nats) of a DNA string and of its reverse complement, as a pair.

    Their mean is the post-hoc conjoined score: the same for either strand, exactly.
    """
    return tuple(float(scorer.token_logprobs(scorer.tokenizer.encode(strand, bos=False)).sum())
                 for strand in (dna, reverse_complement(dna)))


@torch.inference_mode()
def base_embeddings(scorer, dna):
    """Conjoined embedding of each token of a DNA string: (T, 2 hidden) fp32 on the CPU.

    The final norm's output h_t(x), which knows what stands before, beside h_{T-1-t}(rc(x)), which
    knows what stands behind. The other strand's are these in reverse order with halves swapped.
    """
    def embed(bases):
        ids = scorer.tokenizer.encode(bases, bos=False)
        h = scorer.model.hidden(scorer._tensor([[*scorer.prefix, *ids]]))[0]
        return h[len(scorer.prefix):].float().cpu()

    return torch.cat((embed(dna), embed(reverse_complement(dna)).flip(0)), dim=1)


def ridge_probe(features, labels, test_features, penalty=1e-3):
    """Labels predicted for test_features (M, D) by ridge regression on features (N, D).

    labels (N,) int64 from 0. One-hot targets, features standardised by their mean and deviation,
    penalty * N * |W|^2; solved in closed form in float64, in D x D or N x N, whichever is smaller.
    """
    x, t = features.double(), test_features.double()
    mean, scale = x.mean(0), x.std(0, correction=0).clamp_min(1e-12)
    x, t = (x - mean) / scale, (t - mean) / scale
    y = F.one_hot(labels).double()
    bias, (N, D) = y.mean(0), x.shape
    gram = x.T @ x if D <= N else x @ x.T
    gram.diagonal().add_(penalty * N)
    w = torch.linalg.solve(gram, x.T @ (y - bias)) if D <= N else (
        x.T @ torch.linalg.solve(gram, y - bias))
    return (t @ w + bias).argmax(1)


# The most bonds of a neutral atom. A charge makes it its neighbour in the periodic table: N+ bonds
# as C does, O- as F.
_VALENCES = {"H": 1, "B": 3, "C": 4, "N": 3, "O": 2, "F": 1, "Al": 3, "Si": 4, "P": 5, "S": 6,
             "Cl": 1, "Br": 1, "I": 1}
_ROWS = ("B", "C", "N", "O", "F"), ("Al", "Si", "P", "S", "Cl"), ("H",), ("Br",), ("I",)
_BRACKET = re.compile(r"\[\d*(H|B|C|N|O|F|P|S|Cl|Br|I)@{0,2}(?:H(\d?))?(?:([+-])(\d?))?(?::\d+)?\]")
_BONDS = {"-": 1, "/": 1, "\\": 1, "=": 2, "#": 3}


def _parse_atom(piece):
    """A piece of SMILES -> (most bonds, hydrogens in its brackets), None if it is no such atom."""
    if piece in ("B", "C", "N", "O", "F", "P", "S", "Cl", "Br", "I"):
        return _VALENCES[piece], 0
    if not (found := _BRACKET.fullmatch(piece)):
        return None
    element, hydrogens, sign, size = found.groups()
    row = next(row for row in _ROWS if element in row)
    column = row.index(element) - (int(f"{sign}{size or 1}") if sign else 0)
    most = _VALENCES[row[column]] if 0 <= column < len(row) else 0
    return most, 0 if hydrogens is None else int(hydrogens or 1)


def smiles_error(text):
    r"""Why a SMILES string is no molecule, as a phrase; None if syntax and valences are right.

    The Kekule subset: atoms B C N O F P S Cl Br I and H, in brackets also with isotope, chirality,
    hydrogens, charge; bonds - = # / and \; branches, rings 0-9 and %10-%99, parts with "." between.
    Aromatic (lower-case) atoms are outside of it: write rings with = instead. Valences are RDKit's,
    except that iodine has one bond only; strained rings are not judged.
    """
    used, most = [], []              # an atom: bonds so far, and at most
    bonded, rings, branches = set(), {}, []
    last = bond = None               # the atom and the bond that the next piece continues
    before = ""
    for piece in re.findall(SMILES_PIECES, text):
        atom = _parse_atom(piece)
        if before == "(" and not (atom or piece in _BONDS):
            return f"a branch starts with {piece}"
        if atom:
            used.append(atom[1])
            most.append(atom[0])
            pair, last = (last, len(used) - 1), len(used) - 1
            if pair[0] is not None:
                bonded.add(pair)
                for end in pair:
                    used[end] += _BONDS[bond or "-"]
            bond = None
        elif piece in ("b", "c", "n", "o", "p", "s"):
            return f"{piece} is aromatic, and only Kekule forms are read here"
        elif last is None:
            return f"{piece} stands before any atom"
        elif piece in _BONDS and bond is None:
            bond = piece
        elif re.fullmatch("%?[0-9]+", piece):
            number = int(piece.strip("%"))
            if number not in rings:
                rings[number] = last, bond
            else:
                first, opened = rings.pop(number)
                order = {_BONDS[b] for b in (opened, bond) if b} or {1}
                if len(order) > 1 or first == last or bonded & {(first, last), (last, first)}:
                    return f"ring {number} closes on itself, on a neighbour or with another bond"
                bonded.add((first, last))
                for end in (first, last):
                    used[end] += min(order)
            bond = None
        elif piece == "(" and bond is None:
            branches.append(last)
        elif piece == ")" and bond is None and branches:
            last = branches.pop()
        elif piece == "." and bond is None:
            last = None
        else:
            return f"{piece} has no meaning here, or is not of the Kekule subset"
        before = piece
    if last is None or bond or rings or branches:
        return "the end is missing: of a bond, a ring or a branch"
    over = next((i for i, n in enumerate(used) if n > most[i]), None)
    return None if over is None else f"atom {over + 1} has {used[over]} bonds of {most[over]}"


def sample_sequences(scorer, members, number, *, seed, temperature=1.0, max_new_tokens=128):
    """`number` further members of a family (or of [], any), each up to its separator or EOS."""
    tokenizer = scorer.tokenizer
    ends = {tokenizer.separator_id, *scorer.model.config.eos_ids}
    ids = sum(map(tokenizer.encode_member, members), [*scorer.prefix])
    rows = generate(scorer.model, scorer._tensor([ids]).expand(number, -1), seed=seed,
                    max_new_tokens=max_new_tokens, temperature=temperature, stop=ends - {None})
    return [tokenizer.decode(itertools.takewhile(lambda i: i not in ends, row[len(ids):]))
            for row in rows.tolist()]


def read_families(path):
    """The lists in a .jsonl file's `sequences`."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return [list(json.loads(line)["sequences"]) for line in lines if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: expected one object with "sequences" a line ({error!r})'
                         ) from None


def molecule_shares(samples, known):
    """{"valid", "unique", "novel"}: of samples; of the valid; of the unique, not among `known`.

    Molecules are compared as strings: two ways to write one count as two.
    """
    valid = [text for text in samples if smiles_error(text) is None]
    return {"valid": len(valid) / len(samples), "unique": len(set(valid)) / max(1, len(valid)),
            "novel": len(set(valid) - set(known)) / max(1, len(set(valid)))}


def score_sequence(scorer, row):
    """The result of a "family", "strand" or "molecule" row."""
    result = {"chance": 0.0, "lost_tokens": 0}
    match row["type"]:
        case "family":
            members = [math.exp(nats / n) for nats, n in family_nats(scorer, row["sequences"])]
            return {"score": 1 / members[-1], **result, "perplexity": members}
        case "strand":
            scores, T = strand_scores(scorer, row["dna"]), len(row["dna"])
            return {"score": math.exp(sum(scores) / (2 * T)), **result,
                    "strand_gap": abs(scores[0] - scores[1]) / T}
        case "molecule":
            text, = sample_sequences(scorer, row["sequences"], 1, **{
                key: row[key] for key in ("seed", "temperature", "max_new_tokens")})
            return {"score": float(smiles_error(text) is None), **result, "output": text}


def score_probes(scorer, rows):
    """Yield (row, result) of all "probe" rows of a file: two halves, by parity, each labelled by a
    probe that was fitted on the other. forward_only: the same without the other strand."""
    features = [base_embeddings(scorer, row["dna"]) for row in rows]
    alphabet = sorted(set("".join(row["labels"] for row in rows)))
    labels = [torch.tensor([alphabet.index(c) for c in row["labels"]]) for row in rows]
    for row, x, y in zip(rows, features, labels):
        if len(x) != len(y) or len(rows) < 2:
            raise ValueError(f"{row['where']}: {len(x)} tokens, {len(y)} labels, {len(rows)} rows; "
                             "a probe needs a token a base, and two rows or more")
    if not rows:
        return
    chance = torch.cat(labels).bincount().max().item() / sum(map(len, labels))
    for parity in (0, 1):
        x, y = torch.cat(features[1 - parity::2]), torch.cat(labels[1 - parity::2])
        tests, D = features[parity::2], x.shape[1]
        both, forward = (ridge_probe(x[:, :n], y, torch.cat(tests)[:, :n]).split(
            [len(t) for t in tests]) for n in (D, D // 2))
        for row, own, a, b in zip(rows[parity::2], labels[parity::2], both, forward):
            yield row, {"score": (a == own).double().mean().item(), "chance": chance,
                        "lost_tokens": 0, "forward_only": (b == own).double().mean().item()}


# ----------------------------------------------------------------------------------------------
# 7. Output gates: where the mLSTM speaks, and where the window
# ----------------------------------------------------------------------------------------------


def read_texts(path):
    """The texts of a .jsonl file (one JSON object a line, with a string "text") or a .txt file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix == ".jsonl":
            return [json.loads(line)["text"] for line in text.splitlines() if line.strip()]
        return [text]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: expected UTF-8, in .jsonl one object with "text" a line '
                         f"({error!r})") from None


@torch.inference_mode()
def gate_map(scorer, texts, *, tokens=1024, rows=128):
    """Median output gate o_t of every layer and head (App. E.2): (layers, H) fp32 on the CPU.

    0: only the window is read, 1: only the mLSTM. Over the first `rows` rows of at most `tokens`
    tokens, cut from the texts. Raises ValueError for a model without output gates.
    """
    hybrid = scorer.model.config.hybrid
    if hybrid is None or MIXERS[hybrid.mixer] is not HybridAttention:
        raise ValueError("--student: this model has no output gates; only hybrid students have")
    ids = (scorer.encode(text) for text in texts)
    cut = (row[a:a + tokens] for row in ids for a in range(0, len(row), tokens))
    gates = [[] for _ in scorer.model.model["layers"]]
    hooks = [block.self_attn.output_gate.register_forward_hook(
        # fp16 has steps of 0.0005 near 1, and the median of 128 x 1024 tokens needs all of them
        lambda module, inputs, logits, kept=kept: kept.append(logits[0].sigmoid().half().cpu()))
        for block, kept in zip(scorer.model.model["layers"], gates)]
    for row in tqdm(itertools.islice(cut, rows), total=rows, desc="gates", unit="row", leave=False):
        scorer.model.hidden(torch.tensor([row], device=scorer.device))
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(kept, dim=1).float().median(dim=1).values for kept in gates])


def show_gates(medians):
    """The map in the terminal, in percent: a line a layer, a column a head."""
    print("median output gate in percent (0: window, 100: mLSTM)")
    print("layer  head" + "".join(f"{h:>4}" for h in range(medians.shape[1])) + "   mean")
    for layer, row in enumerate(medians):
        print(f"{layer:5}      " + "".join(f"{100 * o:4.0f}" for o in row)
              + f"{100 * row.mean():7.0f}")


# ----------------------------------------------------------------------------------------------
# 8. Bridge to lm-evaluation-harness, for the published benchmarks
# ----------------------------------------------------------------------------------------------


def lm_eval_model(scorer):
    """The Scorer as an `lm_eval.api.model.LM`; lm_eval.simple_evaluate(model=...) takes it."""
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Bridge(LM):
        tokenizer_name = property(lambda self: str(scorer.model.source))

        def loglikelihood(self, requests):
            return scorer.loglikelihoods([scorer.encode_pair(*r.args)[0] for r in requests])

        def loglikelihood_rolling(self, requests):
            totals = []
            for request in requests:
                ids = scorer.tokenizer.encode(request.args[0], bos=False)
                windows = get_rolling_token_windows(ids, scorer.prefix[0], scorer.max_tokens, 1)
                pairs = [tuple(map(tuple, make_disjoint_window(w))) for w in windows]
                totals.append(sum(total for total, _ in scorer.loglikelihoods(pairs)))
            return totals

        def generate_until(self, requests):
            found = {}
            for i, request in enumerate(requests):
                options = request.args[1]
                if options.get("do_sample") and options.get("temperature", 1) > 0:
                    raise ValueError("this task samples; the bridge generates greedily only")
                until, new = options.get("until") or [], options.get("max_gen_toks", 256)
                until = [until] if isinstance(until, str) else until
                found[i] = scorer.cut_prompt(request.args[0], new)[0], until, new
            for batch in _equal_lengths(found, lambda i: len(found[i][0]), lambda T: ROWS):
                prompts, stops, new = zip(*(found[i] for i in batch))
                found.update(zip(batch, scorer.generate(prompts, stops, new)))
            return [found[i] for i in range(len(requests))]

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return scorer.tokenizer.render_chat(chat_history,
                                                generation_prompt=add_generation_prompt)

    return Bridge()


# ----------------------------------------------------------------------------------------------
# 9. Report
# ----------------------------------------------------------------------------------------------


def mean_details(results):
    """What results tell beside their scores: {task: {name: mean, or means where it is a list}}.

    Lists of several lengths (perplexity by member) are cut to the shortest.
    """
    found = {}
    for task, rows in results.items():
        for name in ("perplexity", "strand_gap", "forward_only"):
            if all(name in row for row in rows):
                values = [row[name] if isinstance(row[name], list) else [row[name]] for row in rows]
                shortest = min(map(len, values))
                means = np.mean([v[:shortest] for v in values], axis=0).tolist()
                found.setdefault(task, {})[name] = means
    return found


def compare(teacher, students):
    """The paper's statistics of students against their teacher, as a dict for JSON.

    teacher: results of `evaluate_rows`; students: name -> results on the same tasks.
    """
    def per_row(results):
        return {task: [r["score"] for r in rows] for task, rows in results.items()}

    def finite(ratios):  # JSON has no infinity
        return {task: r if math.isfinite(r) else None for task, r in ratios.items()}

    a_t, chance = mean_scores(teacher), mean_scores(teacher, "chance")
    report = {"teacher": a_t, "chance": chance, "students": {},
              "rows": {task: len(rows) for task, rows in teacher.items()},
              "contexts_cut": sum(r["lost_tokens"] > 0 for rows in teacher.values() for r in rows),
              "details": mean_details(teacher)}
    for name, results in students.items():
        a_s = mean_scores(results)
        report["students"][name] = {
            "scores": a_s, "details": mean_details(results), "recovery": finite(recovery(a_s, a_t)),
            "recovery_above_chance": finite(recovery(a_s, a_t, chance)),
            "win_and_tie": win_and_tie(a_s, a_t, 0.0),
            "critical_tolerance": critical_tolerance(a_s, a_t),
            "intervals": bootstrap(per_row(results), per_row(teacher))}
    return report


def show_report(report):
    """One table a student."""
    def cell(value):
        return f"{value:10.3f}" if value is not None else f"{'-':>10}"

    for name, s in report["students"].items():
        width = max(4, *map(len, report["rows"]))
        print(f"\n{name}\n{'task':{width}}  rows   teacher   student  recovery  above chance")
        for task, rows in report["rows"].items():
            print(f"{task:{width}}{rows:6}" + cell(report["teacher"][task])
                  + cell(s["scores"][task]) + cell(s["recovery"][task])
                  + "    " + cell(s["recovery_above_chance"][task]))
        for task, details in s["details"].items():
            for name, values in details.items():
                teacher = report["details"][task][name]
                print(f"{task}, {name}: " + " ".join(f"{v:.3f}" for v in values)
                      + "   teacher: " + " ".join(f"{v:.3f}" for v in teacher))
        rate, tolerance = (s["intervals"][key] for key in ("win_and_tie", "critical_tolerance"))
        print(f"C_0    = {s['win_and_tie']:.3f}   95 % of draws: {rate[0]:.3f} to {rate[1]:.3f}   "
              f"lossless: {'yes' if s['win_and_tie'] >= 0.5 else 'no'}, in "
              f"{s['intervals']['p_lossless']:.0%} of draws")
        print(f"alpha* = {s['critical_tolerance']:.4f}  95 % of draws: {tolerance[0]:.4f} to "
              f"{tolerance[1]:.4f}")
    if report["contexts_cut"]:
        print(f"{report['contexts_cut']} contexts were too long and lost their left end")


def new_picture():
    """A matplotlib (figure, axes), or None and a sentence where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: it needs matplotlib (pip install matplotlib)")
        return None
    figure = Figure(figsize=(5, 3.5), dpi=150, layout="constrained")
    return figure, figure.subplots()


def draw_curves(report, path):
    """C_alpha over alpha for every student, alpha* where a curve crosses one half."""
    if (picture := new_picture()) is None:
        return
    figure, axes = picture
    alphas = np.linspace(0, 0.2, 401)
    for name, s in report["students"].items():
        rates = [win_and_tie(s["scores"], report["teacher"], alpha) for alpha in alphas]
        axes.step(alphas, rates, where="post", label=f"{name}: {s['critical_tolerance']:.3f}")
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="tolerance alpha", ylabel="Win-and-Tie rate", ylim=(0, 1.03))
    axes.legend(title="alpha*")
    figure.savefig(path)
    print(f"picture: {path}")


def draw_gates(medians, path):
    """The map of `gate_map` as a picture: window blue, mLSTM red."""
    if (picture := new_picture()) is None:
        return
    figure, axes = picture
    image = axes.imshow(medians.numpy(), vmin=0, vmax=1, cmap="coolwarm", aspect="auto")
    figure.colorbar(image, label="median output gate (1: mLSTM)")
    axes.set(xlabel="head", ylabel="layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    figure.savefig(path)
    print(f"picture: {path}")


# ----------------------------------------------------------------------------------------------
# 10. Speed and memory, teacher against student
# ----------------------------------------------------------------------------------------------
# What Figures 5 and 10 to 14 of the paper (§4.4, App. E.4) show: cost over context and batch. The
# prompts are random ids and new parameters need no training: neither changes what is computed.

QUANTITIES = {  # key of a measurement: title, unit, how many of these are one of the key's unit
    "prefill_tokens_per_s": ("prefill throughput", "tokens/s", 1),
    "first_token_s": ("time to first token", "ms", 1e3),
    "step_s": ("decode latency", "ms a token", 1e3),
    "decode_tokens_per_s": ("decode throughput", "tokens/s", 1),
    "cache_bytes": ("cache", "MB", 1e-6),
    "peak_bytes": ("peak memory above the weights", "MB", 1e-6)}  # None on a CPU
PASSES = 4  # over a cell, the first to warm up


def random_8b_stack(layers, device, dtype):
    """A teacher of random weights: layers of Llama-3.1-8B's shape, and only 1024 token ids."""
    config = ModelConfig(
        family="llama", vocab_size=1024, hidden_size=4096, intermediate_size=14336,
        num_layers=layers, num_heads=32, num_kv_heads=8, head_dim=128, norm_eps=1e-5, tied=True,
        qkv_bias=False, o_bias=False, mlp_bias=False, rope=Rope(5e5), sliding_rope=Rope(5e5),
        layer_windows=(None,) * layers, max_positions=1 << 17, eos_ids=())
    with torch.device(device):
        return Transformer(config).to(dtype)


def jump(cache, filled, length):
    """Bring a cache that has read `filled` tokens to the size and age of `length`, untruly.

    Rows that a teacher would have filled get random numbers (untouched memory would be faster
    than real one); a student's memory has no more rows, and only grows older.
    """
    for layer in cache.layers:
        layer.length.fill_(length)
        for rows in (layer.k, layer.v):
            rows[:, :, filled:length].normal_()  # none, if there are no more than `filled`
    cache.position.fill_(length)


@torch.no_grad()
def time_once(model, tokens, new_tokens, seconds):
    """Read tokens (B, T) and decode new_tokens greedily, as `generate` does; one measurement each.

    Returns {"prefill_s", "first_token_s" (both None if prefill took more than `seconds`; the
    cache then jumps to T), "steps_s": [of each token after the first], "cache_bytes",
    "peak_bytes" (beyond what was allocated before; None on a CPU)}.
    """
    (B, T), device, now = tokens.shape, tokens.device, time.perf_counter
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    started, done = now(), 0
    cache = Cache(model, B, T + new_tokens)
    for piece in tokens.split(PREFILL, dim=1):
        h = model.hidden(piece, cache=cache)
        if on_gpu:
            torch.cuda.synchronize(device)
        done += piece.shape[1]
        if now() - started > seconds:
            break
    prefill = now() - started
    if done < T:
        jump(cache, done, T)
    times = []
    for _ in range(new_tokens + 1):
        new = F.linear(h[:, -1], model.lm_head_weight).float().argmax(-1)
        new.tolist()  # waits for the device, as printing the token would
        times.append(now())
        if len(times) <= new_tokens:
            h = model.hidden(new[:, None], cache=cache)
    return {"prefill_s": prefill if done == T else None,
            "first_token_s": times[0] - started if done == T else None,
            "steps_s": np.diff(times).tolist(),
            "cache_bytes": sum(x.nbytes for x in cache.tensors()),
            "peak_bytes": torch.cuda.max_memory_allocated(device) - before if on_gpu else None}


def measure_cell(models, batch, context, new_tokens, seconds, passes=PASSES):
    """Time models in turns on one cell of the grid: {name: measurement}, keys as in QUANTITIES.

    models: name -> Transformer. Each gets up to `passes` passes, none begun after its `seconds`
    are over; the first warms up, and counts only if it stays alone. Values are medians of "passes"
    passes and "steps" steps; "jumped": `jump` filled the cache. Out of memory: {"oom": True}.
    """
    found, spent = {name: [] for name in models}, dict.fromkeys(models, 0.0)
    for _, (name, model) in itertools.product(range(passes), models.items()):
        if found[name] is None or spent[name] >= seconds:
            continue
        started, device = time.perf_counter(), model.lm_head_weight.device
        try:
            tokens = torch.randint(model.config.vocab_size, (batch, context), device=device)
            found[name].append(time_once(model, tokens, new_tokens, seconds))
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, (MemoryError, torch.OutOfMemoryError))
                    or "can't allocate memory" in str(error)):  # what a CPU says
                raise
            found[name] = None
        if found[name] is None and device.type == "cuda":
            torch.cuda.empty_cache()
        spent[name] += time.perf_counter() - started
    return {name: _medians(passes, batch, context) if passes else {"oom": True}
            for name, passes in found.items()}


def _medians(passes, batch, context):
    kept = passes[1:] or passes
    steps = [seconds for p in kept for seconds in p["steps_s"]]
    median = {key: None if kept[0][key] is None else statistics.median(p[key] for p in kept)
              for key in kept[0] if key != "steps_s"}
    prefill, step = median.pop("prefill_s"), statistics.median(steps)
    return {"prefill_tokens_per_s": prefill and batch * context / prefill, **median,
            "step_s": step, "decode_tokens_per_s": batch / step, "passes": len(kept),
            "steps": len(steps), "jumped": prefill is None}


def show_speed(cells):
    """One table a quantity, a line a cell."""
    def number(value):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"

    for key, (title, unit, factor) in QUANTITIES.items():
        if not any(cell[name].get(key) for cell in cells for name in ("teacher", "student")):
            continue
        print(f"\n{f'{title} ({unit})':<36}{'batch':>6}{'context':>10}"
              f"{'teacher':>12}{'student':>12}{'student/teacher':>18}")
        for cell in cells:
            values = [cell[name].get(key) for name in ("teacher", "student")]
            shown = [number(factor * value) if value else "OOM" if "oom" in cell[name] else "-"
                     for value, name in zip(values, ("teacher", "student"))]
            ratio = f"{values[1] / values[0]:18.2g}" if all(values) else ""
            print(f"{cell['batch']:42}{cell['context']:10,}{shown[0]:>12}{shown[1]:>12}{ratio}")


def draw_speed(cells, folder):
    """A picture a quantity: a line a model and batch, over the contexts."""
    contexts, batches = (sorted({cell[key] for cell in cells}) for key in ("context", "batch"))
    for key, (title, unit, factor) in QUANTITIES.items():
        lines = {(name, batch): [(cell["context"], factor * cell[name][key]) for cell in cells
                                 if cell["batch"] == batch and cell[name].get(key)]
                 for batch in batches for name in ("teacher", "student")}
        if not any(lines.values()):
            continue
        if (picture := new_picture()) is None:
            return
        figure, axes = picture
        for (name, batch), points in lines.items():
            if points:
                axes.plot(*zip(*sorted(points)), marker="o", label=f"{name}, batch {batch}",
                          color="C0" if name == "teacher" else "C1",
                          linestyle=("-", "--", ":", "-.")[batches.index(batch) % 4])
        axes.set(xlabel="context (tokens)", ylabel=f"{title} ({unit})", xscale="log")
        axes.set_ylim(bottom=0)
        axes.set_xticks(contexts, [f"{c // 1024}k" if c % 1024 == 0 else str(c) for c in contexts])
        axes.minorticks_off()
        axes.legend()
        path = folder / f"{title.replace(' ', '_')}.png"
        figure.savefig(path)
        print(f"picture: {path}")


# ----------------------------------------------------------------------------------------------
# 11. The command
# ----------------------------------------------------------------------------------------------


def run_compare(run):
    """`compare`: score, print, write report.json and the picture; goes on where it stopped."""
    names = [path.name for path in run.student]
    names = names if len(set(names)) == len(names) else [str(path) for path in run.student]
    run.out.mkdir(parents=True, exist_ok=True)

    def score(folder, name):
        samples = run.out / f"samples-{re.sub(r'[^a-zA-Z0-9._]+', '-', name)}.jsonl"
        return evaluate_rows(folder, run.tasks, samples=samples, device=run.device, limit=run.limit,
                             allow_code_execution=run.allow_code_execution)

    teacher = score(run.teacher, "the teacher")
    report = compare(teacher, {n: score(d, n) for n, d in zip(names, run.student)})
    show_report(report)
    write_json(run.out / "report.json", report)
    print(f"report: {run.out / 'report.json'}")
    draw_curves(report, run.out / "win_and_tie.png")


def run_gates(run):
    """`gates`: the map in the terminal, and as a picture."""
    medians = gate_map(Scorer(run.student, run.device), read_texts(run.data), tokens=run.context,
                       rows=run.rows)
    show_gates(medians)
    if run.picture:
        draw_gates(medians, run.picture)


def run_molecules(run):
    """`molecules`: sample members of families, and print the valid, unique and novel shares."""
    scorer, families, samples = Scorer(run.model, run.device), read_families(run.data), []
    for i, family in enumerate(tqdm(families[:run.rows], desc="molecules", leave=False)):
        samples += sample_sequences(scorer, family[:run.shots], run.number, seed=run.seed + i,
                                    temperature=run.temperature)
    for text in samples[::run.number][:4]:
        print(f"  {text}   {smiles_error(text) or 'valid'}")
    shares = molecule_shares(samples, itertools.chain(*families))
    print(f"{len(samples)} samples: " + "  ".join(f"{k} {v:.3f}" for k, v in shares.items()))


def run_lm_eval(run):
    """`lm-eval`: the harness's own tasks through the bridge."""
    try:
        import lm_eval
    except ImportError:
        raise ValueError("the bridge needs lm-evaluation-harness: pip install lm_eval") from None
    results = lm_eval.simple_evaluate(
        model=lm_eval_model(Scorer(run.model, run.device)), tasks=run.tasks.split(","),
        num_fewshot=run.shots, limit=run.limit, apply_chat_template=run.chat,
        task_manager=lm_eval.tasks.TaskManager(include_path=run.include_path),
        confirm_run_unsafe_code=run.allow_code_execution)
    print(lm_eval.utils.make_table(results))


def open_speed_models(run):
    """{"teacher": Transformer, "student": Transformer} for `speed`."""
    on_cpu, window = torch.device(run.device).type == "cpu", 512
    dtype = torch.float32 if on_cpu else None  # as load_with_tokenizer
    if run.shape:
        teacher = random_8b_stack(run.layers, run.device, dtype or torch.bfloat16)
    else:
        folder = run.teacher or Path(__file__).resolve().parent / "tests/teacher"
        window = 512 if run.teacher else 16  # as distill.py's preset for the shipped teacher
        teacher = load_pretrained(folder, device=run.device, dtype=dtype)
        if teacher.config.hybrid:
            raise ValueError(f"--teacher {folder} is a student; name its teacher's folder")
    if not run.student:
        student = student_from_teacher(teacher, window=run.window or window)
    else:
        student = load_pretrained(run.student, device=run.device, dtype=dtype)
        if not student.config.hybrid:
            raise ValueError(f"--student {run.student} is no student: its config.json has no "
                             '"hybrid" object; leave the flag out to measure an untrained student')
    return {"teacher": teacher, "student": student}


def describe_machine(device):
    """What the figures of `speed` were measured on, as a dict for JSON."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        cpu = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.*)", cpu.read_text() if cpu.exists() else "")
        name = found[1] if found else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}


def plan_speed(run, models):
    """Say what `speed` will do; returns the head of speed.json."""
    report = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "machine": describe_machine(run.device),
              "settings": {"contexts": run.contexts, "batches": run.batches,
                           "new_tokens": run.new_tokens, "seconds": run.seconds,
                           "prefill_piece": PREFILL}, "models": {}, "cells": []}
    untrained = "" if run.student else "the same weights and untrained new ones"
    for name, model in models.items():
        hybrid, dtype = model.config.hybrid, str(model.lm_head_weight.dtype).removeprefix("torch.")
        stack = f"random weights, --shape {run.shape} --layers {run.layers}"
        source = hybrid and untrained or str(model.source or stack)
        count, size = (sum(sizes) for sizes in zip(*((p.numel(), p.nbytes)
                                                     for p in model.parameters())))
        report["models"][name] = {"source": source, "parameters": count, "parameter_bytes": size,
                                  "dtype": dtype, "hybrid": hybrid and vars(hybrid)}
        print(f"{name}   {source}: {count:,} parameters, {size / 1e6:,.1f} MB, {dtype}")
        if hybrid:
            print(f"          mixer {hybrid.mixer}, window {hybrid.window}, {hybrid.sinks} sinks")
    print("machine   " + ", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(f"grid      batches {run.batches} x contexts {run.contexts}. In each cell both read a "
          f"random prompt and\n          decode {run.new_tokens} tokens, in turns, up to {PASSES} "
          "times, the first to warm up; medians are kept.\n          No model starts again after "
          f"{run.seconds:g} s. A longer prefill is given up (-), and decoding timed\n          "
          "from a cache filled with random numbers. Peak memory is measured on GPUs only.")
    return report


def run_speed(run):
    """`speed`: measure the grid, print tables, write speed.json after each cell, and pictures."""
    models = open_speed_models(run)
    report, path = plan_speed(run, models), run.out / "speed.json"
    run.out.mkdir(parents=True, exist_ok=True)
    grid, cells = list(itertools.product(run.batches, run.contexts)), report["cells"]
    try:
        for batch, context in tqdm(grid, desc="speed", unit="cell", dynamic_ncols=True):
            cells.append({"batch": batch, "context": context, **measure_cell(
                models, batch, context, run.new_tokens, run.seconds)})
            write_json(path, report)
    except KeyboardInterrupt:
        print(f"stopped: {len(cells)} of {len(grid)} cells are measured")
    if cells:
        show_speed(cells)
        print(f"\nreport: {path}")
        draw_speed(cells, run.out)


def number_of_tokens(text):
    """"4096" or "4k" -> 4096."""
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def parse_arguments(argv):
    """The command line -> settings."""
    p = argparse.ArgumentParser(description="Score students against their teacher.")
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("compare", help="tasks, recovery, Win-and-Tie rate")
    c.add_argument("--teacher", type=Path, required=True, metavar="DIR")
    c.add_argument("--student", type=Path, required=True, action="append", metavar="DIR")
    c.add_argument("--tasks", nargs="+", required=True, metavar="FILE.jsonl")
    c.add_argument("--out", type=Path, required=True, help="folder of the report and its samples; "
                   "the same command again goes on where it stopped")
    c.set_defaults(run=run_compare)

    g = commands.add_parser("gates", help="the map of the output gates")
    g.add_argument("--student", type=Path, required=True, metavar="DIR")
    g.add_argument("--data", type=Path, required=True, metavar="FILE", help=".txt or .jsonl")
    g.add_argument("--picture", type=Path, metavar="FILE.png")
    g.add_argument("--context", type=int, default=1024, help="tokens a row")
    g.add_argument("--rows", type=int, default=128)
    g.set_defaults(run=run_gates)

    m = commands.add_parser("molecules", help="sample SMILES: valid, unique and novel shares")
    m.add_argument("--model", type=Path, required=True, metavar="DIR", help="teacher or student")
    m.add_argument("--data", type=Path, metavar="FILE.jsonl", required=True,
                   help="rows with `sequences`: families to sample from; none of them is novel")
    m.add_argument("--shots", type=int, default=4, help="members before a sample (0: from nothing)")
    m.add_argument("--rows", type=int, default=100, help="families")
    m.add_argument("--number", type=int, default=10, help="samples a family")
    m.add_argument("--temperature", type=float, default=1.0)
    m.add_argument("--seed", type=int, default=0)
    m.set_defaults(run=run_molecules)

    e = commands.add_parser("lm-eval", help="published benchmarks, in lm-evaluation-harness")
    e.add_argument("--model", type=Path, required=True, metavar="DIR", help="teacher or student")
    e.add_argument("--tasks", required=True, help="names, with commas between")
    e.add_argument("--shots", type=int, help="examples in the prompt (default: the task's own)")
    e.add_argument("--chat", action="store_true", help="in the model's chat format")
    e.add_argument("--include-path", help="folder with tasks of your own (YAML)")
    e.set_defaults(run=run_lm_eval)

    s = commands.add_parser("speed", help="prefill, first token, decoding and memory")
    s.add_argument("--teacher", type=Path, metavar="DIR", help="none: the shipped small one")
    s.add_argument("--student", type=Path, metavar="DIR", help="none: an untrained one of the "
                   "teacher, which is as fast")
    s.add_argument("--shape", choices=("8b",), help="no --teacher: random layers of this shape")
    s.add_argument("--layers", type=int, default=1, help="of --shape")
    s.add_argument("--window", type=int, help="W of an untrained student (default: 512, and 16 "
                   "for the shipped teacher)")
    s.add_argument("--contexts", type=number_of_tokens, nargs="+", metavar="N", help="tokens read "
                   "before decoding, such as 1k 4k 16k 64k (default: those; on a CPU not 64k)")
    s.add_argument("--batches", type=int, nargs="+", metavar="N", help="(default: 1 8; on a CPU "
                   "with --shape only 1)")
    s.add_argument("--new-tokens", type=int, default=64, help="decoded in every pass")
    s.add_argument("--seconds", type=float, help="a model and cell, about (default: 60; on a CPU "
                   "10)")
    s.add_argument("--out", type=Path, required=True, help="folder of speed.json and pictures")
    s.set_defaults(run=run_speed)

    for command in (c, e):
        command.add_argument("--limit", type=int, help="rows a task")
        command.add_argument("--allow-code-execution", action="store_true",
                             help="run what the model writes")
    for command in (c, g, m, e, s):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run = p.parse_args(argv)
    for name in ("limit", "context", "rows", "number", "layers", "window", "contexts", "batches",
                 "new_tokens"):
        value = getattr(run, name, None)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1")
    if run.device.startswith("cuda") and not torch.cuda.is_available():
        p.error(f"--device {run.device}: this torch sees no GPU; use --device cpu")
    if run.command == "speed":
        if run.shape and (run.teacher or run.student) or run.student and not run.teacher:
            p.error("--student needs its --teacher, and neither goes with --shape")
        if run.student and run.window:
            p.error("--window is for an untrained student; the one of --student has its own")
        on_cpu = torch.device(run.device).type == "cpu"
        run.contexts = run.contexts or [1024, 4096, 16384] + [65536] * (not on_cpu)
        run.batches = run.batches or ([1] if on_cpu and run.shape else [1, 8])
        run.seconds = run.seconds or (10.0 if on_cpu else 60.0)
    return run


def main(argv=None):
    """One of the four commands."""
    run = parse_arguments(argv)
    run.run(run)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
