"""Score students against their teacher, and say how lossless the distillation was.

    tasks        JSONL files: choices by log-likelihood, generated answers, code, needles in a
                 haystack, sequences; scored as lm-evaluation-harness scores
    statistics   recovery, Win-and-Tie rate C_alpha and critical tolerance alpha* (arXiv
                 2603.15590, "the paper", Eq. 15-17), with bootstrap intervals over tasks' rows
    gates        the map of the output gates: where the mLSTM speaks, where the window
    speed        teacher against student: prefill, first token, decoding and memory over a grid
                 of contexts and batches (the paper's Figures 5 and 10 to 14)

A score is worth something only beside the teacher's on the same rows, read in the same way. So
one `Scorer` serves both, and nothing in a row's score depends on what else was scored with it
(but for probes, which are fitted on their file's other rows, and the rounding of batches).

Published benchmarks (PIQA, MMLU, GSM8K, ...) run in lm-evaluation-harness itself, through the
bridge in section 8. Not here: benchmarks judged by another language model (MT-Bench), training
(distill.py), merging (merge.py).

Run:
    python evaluate.py compare --teacher DIR --student DIR --tasks FILE.jsonl... --out REPORT
    python evaluate.py gates --student DIR --data FILE.txt|.jsonl --picture gates.png
    python evaluate.py molecules --model DIR --data FAMILIES.jsonl       # pip install rdkit
    python evaluate.py lm-eval --model DIR --tasks arc_easy,piqa         # pip install lm_eval
    python evaluate.py speed --out SPEED      # the shipped teacher; or --teacher DIR

Contents: 1 statistics · 2 task files · 3 log-likelihoods and generation · 4 code in a subprocess ·
5 scoring task files · 6 sequences · 7 output gates · 8 bridge to lm-evaluation-harness · 9 report ·
10 speed · 11 command
"""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import (MIXERS, PREFILL, Cache, HybridAttention, ModelConfig, Tokenizer, Transformer,
                   append_json, check_device, drop_torn_line, finite, generate, is_out_of_memory,
                   load_pretrained, load_with_tokenizer, model_sha256, naming, new_folder, number,
                   read_json, read_rows, reverse_complement, run_command, sha256, stream,
                   student_from_teacher, write_json)

# ----------------------------------------------------------------------------------------------
# 1. Statistics: recovery, Win-and-Tie rate, critical tolerance
# ----------------------------------------------------------------------------------------------
# All of these take scores as dicts task -> number; A_S and A_T are the student's and the teacher's.
# The paper's claim is stated in them: "lossless" is C_0 >= 1/2, and alpha* says how much worse than
# its teacher a student may be called before half of the tasks agree. Two traps. Near the level of
# guessing any student "recovers" all of a teacher's score, so recovery is also told above chance.
# And alpha* is a median over tasks: a student that fails one kind of task wholly can still have
# alpha* = 0. Read the table beside the number.

TIE = 1e-12  # rounding of a ratio; scores that differ by one row in a billion differ by more


def recovery(student, teacher, chance=None):
    """Recovery A_S / A_T of every task (Eq. 15), as a dict.

    chance: level of guessing per task; both scores are counted from there. Infinite where the
    teacher's score is at or below chance (0 when none is given). Raises ValueError if tasks differ
    or a score is negative or not finite.
    """
    if student.keys() != teacher.keys() or not teacher:
        raise ValueError("both models need scores of the same tasks, one or more; only one has "
                         f"{sorted(student.keys() ^ teacher.keys())}")
    if not all(0 <= score < math.inf for score in (*student.values(), *teacher.values())):
        raise ValueError("scores must be finite and not negative")
    level = chance or dict.fromkeys(teacher, 0.0)
    return {task: (student[task] - level[task]) / (teacher[task] - level[task])
            if teacher[task] > level[task] else math.inf for task in teacher}


def win_and_tie(student, teacher, alpha):
    """C_alpha: share of tasks with A_S >= (1 - alpha) A_T (Eq. 16). Errors as in `recovery`."""
    drops = [1 - r for r in recovery(student, teacher).values()]  # of the student, a share of A_T
    return sum(drop <= alpha + TIE for drop in drops) / len(drops)


def critical_tolerance(student, teacher):
    """alpha*: the smallest alpha >= 0 with C_alpha >= 0.5 (Eq. 17). Errors as in `recovery`.

    0 means lossless: the student ties or wins on at least half of the tasks. No search is needed:
    C_alpha rises by 1/n at each task's drop, so it reaches 1/2 at the ceil(n/2)-th smallest.
    """
    drops = sorted(1 - r for r in recovery(student, teacher).values())
    drop = drops[(len(drops) + 1) // 2 - 1]
    return drop if drop > TIE else 0.0


def bootstrap(student, teacher, *, draws=4000, seed=0):
    """How far C_0 and alpha* would move with other test rows: a paired bootstrap.

    student, teacher: dicts task -> list of scores, one a row, rows in the same order. Each draw
    resamples every task's rows with replacement, the same for both models: most rows are solved
    by both or neither, so unpaired draws would exaggerate the error.

    Returns {"win_and_tie": [low, high], "critical_tolerance": [low, high], "p_lossless": share of
    draws with C_0 >= 0.5}; the intervals hold 95 % of the draws. p_lossless is 1 if all rows agree,
    and only about 0.7 for a student as good as its teacher that errs on other rows.
    """
    generator, means = np.random.default_rng(seed), []
    for task, scores in teacher.items():
        if len(scores) != len(student[task]):
            raise ValueError(f"{task}: {len(student[task])} student and {len(scores)} teacher rows")
        # Scores take few values, so draw how often each (student, teacher) pair occurs.
        pairs, counts = np.unique(list(zip(student[task], scores)), axis=0, return_counts=True)
        drawn = generator.multinomial(len(scores), counts / len(scores), size=draws)
        means.append(drawn @ pairs / len(scores))  # (draws, 2)
    worlds = [[dict(zip(teacher, scores)) for scores in world.T.tolist()]
              for world in np.stack(means, axis=1)]  # each (tasks, 2)
    rates = np.array([win_and_tie(*world, 0.0) for world in worlds])
    tolerances = [critical_tolerance(*world) for world in worlds]
    # Both are steps, not smooth: a normal approximation would be wrong, so quantiles of the draws.
    return {"win_and_tie": np.quantile(rates, (0.025, 0.975)).tolist(),
            "critical_tolerance": np.quantile(tolerances, (0.025, 0.975)).tolist(),
            "p_lossless": float((rates >= 0.5).mean())}


# ----------------------------------------------------------------------------------------------
# 2. Task files
# ----------------------------------------------------------------------------------------------
# One JSON object a line. Strings are final: what the model reads, character for character, with
# no template, because a template that differs by one space is another benchmark. A file is a
# task, named as the file; its score is the mean over its rows.
#
#   type       field           meaning
#   (all)      type, id        strings; an id stands once in a file
#   choice     context         may be "" (then BOS, or EOS, stands before the choice); otherwise
#                              best ends in a word (`Scorer.encode_pair` says why)
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

# Both tables below are the whole grammar: a new type of row is a line in FIELDS, its rules, and a
# function that `score_rows` calls.

FIELDS = {  # type: {name: default, or where there is none the value's type}
    "choice": {"context": str, "choices": list, "gold": int, "metric": "acc"},
    "generate": {"prompt": str, "gold": str, "stop": [], "max_new_tokens": 256, "extract": "",
                 "match": "exact"},
    "code": {"prompt": str, "test": str, "stop": [], "max_new_tokens": 512},
    "needle": {"length": int, "depth": float, "seed": int},
    "family": {"sequences": list},
    "strand": {"dna": str},
    "probe": {"dna": str, "labels": str},
    "molecule": {"sequences": list, "seed": int, "temperature": 1.0, "max_new_tokens": 128}}
RULES = {  # name: (what holds for this value in its row, what to expect where it does not)
    "choices": (lambda v, row: len(v) > 1 and all(map(str.strip, v)), "two or more, none empty"),
    "gold": (lambda v, row: v in range(len(row["choices"])) if row["type"] == "choice"
             else v.strip(), "an index of choices, or text that is not empty"),
    "metric": (lambda v, row: v in ("acc", "acc_norm"), "acc or acc_norm"),
    "match": (lambda v, row: v in ("exact", "contains") or v == "number"
              and _as_number(row["gold"]) is not None, "exact, contains, or number (in gold too)"),
    "extract": (lambda v, row: re.compile(v), "a regular expression"),
    "max_new_tokens": (lambda v, row: 1 <= v < 1 << 30, "1 or more, below 2^30"),
    "length": (lambda v, row: 64 <= v < 1 << 30, "64 or more, below 2^30"),
    "depth": (lambda v, row: 0 <= v <= 1, "a number from 0 to 1"),
    "seed": (lambda v, row: 0 <= v < 1 << 63, "a number from 0 to 2^63 - 1"),
    "temperature": (lambda v, row: 0 <= v <= 1e6, "0 or more, up to 1e6"),
    "sequences": (lambda v, row: v or row["type"] == "molecule", "one or more"),
    "dna": (lambda v, row: reverse_complement(v), "one base or more"),
    "labels": (lambda v, row: len(v) == len(row["dna"]), "one label a base")}


def read_task(path):
    """The rows of a task file, defaults filled in, each with "where", its file:line.

    All rows are checked before the first is scored: a bad last line must not cost an hour. Raises
    ValueError naming file:line for whatever is wrong with a row, OSError for the file.
    """
    rows = {}
    for place, row in read_rows(path):
        row = {**naming(place, _check_row, row), "where": place}
        if row["id"] in rows:
            raise ValueError(f"{place}: the id {row['id']!r} occurs twice in this file")
        rows[row["id"]] = row
    if not rows:
        raise ValueError(f"{path}: there is no row in this file")
    return list(rows.values())


def _check_row(row):
    """The row with its defaults; ValueError says what is wrong.

    A misspelt field would leave its default in force without a word, so unknown ones are refused.
    """
    if str(row.get("type")) not in FIELDS:
        raise ValueError("expected a type, one of " + ", ".join(FIELDS))
    fields = {"id": str, "type": str, **FIELDS[row["type"]]}
    for name, value in {**fields, **row}.items():
        if name not in fields:
            raise ValueError(f"{name!r} is no field of type {row['type']!r}")
        kind = fields[name] if isinstance(fields[name], type) else type(fields[name])
        if type(value) is not kind and (kind, type(value)) != (float, int):  # True is no int here
            raise ValueError(f"{name}: expected {kind.__name__}, found {row.get(name)!r}")
        if kind is list and not all(isinstance(v, str) and v for v in value):
            raise ValueError(f"{name} = {value!r}: expected strings, none of them empty")
    row = {**fields, **row}
    for name, (holds, expected) in RULES.items():
        if name in row and not holds(row[name], row):
            raise ValueError(f"{name} = {row[name]!r:.60}: expected {expected}")
    return row


def _as_number(text):
    """The last number of a text, a Fraction, since 1200 equals $1,200.00; None if there is none.

    What looks like a number need not be one: 1.2.3. And model text must never go through `eval`.
    """
    try:
        return Fraction(re.sub(r"[$,]", "", re.findall(r"-?[$0-9.,]*[0-9]", text)[-1]))
    except (IndexError, ValueError):
        return None


def is_right(row, text):
    """Whether a "generate" row's output agrees with its gold; the rules stand in the table.

    GSM8K's two rules, for example, are extract "#### (-?[0-9.,]+)" with match "number" (strict)
    and match "number" alone (flexible: the last number of the output, wherever it stands).
    """
    if row["extract"]:
        found = re.search(row["extract"], text)
        if found is None:
            return False
        text = found[1 if found.re.groups else 0] or ""
    text, gold = text.strip(), row["gold"].strip()
    return {"exact": text == gold, "contains": gold in text,
            "number": _as_number(text) == _as_number(gold)}[row["match"]]


HAY = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def needle_prompt(row, tokenizer):
    """A "needle" row's text and the number hidden in it, both decided by its seed.

    Whole copies of HAY stand around the needle, as many as fit into `length` tokens with the rest.
    """
    number = str(random.Random(row["seed"]).randint(10 ** 6, 10 ** 7 - 1))
    needle = f" The magic number is {number}."
    question = "\nQuestion: What is the magic number in the text?\nAnswer: The magic number is"
    room = row["length"] - len(tokenizer.encode(needle + question))
    times = max(0, room // len(tokenizer.encode(HAY, bos=False)))
    before = round(row["depth"] * times)
    text = HAY * before + needle + HAY * (times - before)
    return text.lstrip() + question, number


# ----------------------------------------------------------------------------------------------
# 3. Log-likelihoods and generation
# ----------------------------------------------------------------------------------------------
# What the harness asks of a model: how likely a continuation is, and what comes next. Two rules
# follow from the student's memory. Rows of a batch are equally long, since padding on the left
# would fill sinks and state. And what many continuations share is read once: a cache of constant
# size is cheap to copy.

LONG = 512      # a context of so many tokens is prefilled once for all its continuations
ROWS = 16       # prompts generated from together
TOKENS = 8192   # scored together on a GPU


def _equal_lengths(items, length, most):
    """Cut items into lists of equal length T, longest first, of at most most(T) items each.

    Longest first, so that memory that does not suffice shows at once.
    """
    ordered = sorted(items, key=length, reverse=True)
    for T, group in itertools.groupby(ordered, length):
        group = list(group)
        for a in range(0, len(group), most(T)):
            yield group[a:a + most(T)]


def check_length(tokens, most, new=0):
    """ValueError if a text, and `new` tokens to write, are more than the model was made to read."""
    if tokens + new > most:
        raise ValueError(f"{tokens} tokens" + f" and {new} new ones" * bool(new) + ", and the model"
                         f" reads {most} (config.json: max_position_embeddings): take fewer")


class Reader:
    """A model's texts as it reads them. It needs no weights, so that tasks can be checked early."""

    def __init__(self, config, tokenizer):
        self.tokenizer, self.max_tokens = tokenizer, config.max_positions
        # What stands before a text that has no context: BOS, or EOS where a family has none.
        bos_id = tokenizer.bos_id
        self.prefix = config.eos_ids[:1] if bos_id is None else (bos_id,)

    def encode(self, text):
        """Ids with BOS as the tokenizer's own files say, but not twice where text spells it.

        Chat templates spell it: a second BOS is what no model saw in training.
        """
        bos = self.tokenizer.adds_bos and self.tokenizer.decode([self.tokenizer.bos_id])
        return self.tokenizer.encode(text, bos=False if bos and text.startswith(bos) else None)

    def encode_pair(self, context, continuation):
        """Two strings -> (context ids, continuation ids), tuples, and how many tokens were lost.

        The harness's rule (its `_encode_pair`). White space at the context's end goes to the
        continuation: most tokenizers glue a space to the next word. The continuation's tokens are
        those of both strings as one text, behind as many as the context has alone. Where a token
        crosses that border (":" + newline) what is read is not quite the text: end a task's
        contexts in a word. A pair longer than the model's context loses tokens at its left end.
        Raises ValueError if the continuation has no tokens or too many.
        """
        left = self.encode(context.rstrip())
        right = self.encode(context + continuation)[len(left):]
        left = left or self.prefix
        if not left or not 1 <= len(right) <= self.max_tokens:
            raise ValueError(f"the continuation has {len(right)} tokens; expected 1 to "
                             f"{self.max_tokens} (what the model reads), behind one or more. (Its "
                             "first characters may be one token with the context's last)")
        lost = max(0, len(left) + len(right) - 1 - self.max_tokens)  # the last is only predicted
        return (tuple(left[lost:]), tuple(right)), lost

    def cut_prompt(self, text, max_new_tokens):
        """A prompt's ids, and how many were lost at its left end for the output to fit.

        The left end, as in the harness: the question stands on the right, examples before it. The
        report counts such rows, since a student that reads less is not scored on the same task.
        """
        ids = self.encode(text) or list(self.prefix)
        room = self.max_tokens - max_new_tokens
        if room < 1:
            raise ValueError(f"max_new_tokens {max_new_tokens} of {self.max_tokens}: no text fits")
        return ids[-room:], max(0, len(ids) - room)

    def check_row(self, row):
        """ValueError for a task's row that the model cannot read, or not write all that it asks.

        A prompt may lose its left end, which is counted; a sequence may not.
        """
        new = row.get("max_new_tokens", 0)
        for choice in row.get("choices", ()):
            self.encode_pair(row["context"], choice)
        if row["type"] in ("generate", "code"):
            self.cut_prompt(row["prompt"], new)
        if "sequences" in row or "dna" in row:
            members = [self.tokenizer.encode_member(x) for x in row.get("sequences", ())]
            bases = self.tokenizer.encode(row.get("dna", ""), bos=False)
            tokens = sum(map(len, members), len(bases))
            if row["type"] in ("probe", "molecule"):  # reads BOS or EOS, and all tokens; in the
                tokens += 1  # others the last is predicted and not read, which makes room for it
            check_length(tokens, self.max_tokens, new)
            if row["type"] == "probe" and len(bases) != len(row["labels"]):
                raise ValueError(f"{len(bases)} tokens, {len(row['labels'])} labels; a probe needs "
                                 "a token a base")


class Scorer(Reader):
    """A model on disk, its tokenizer, and what the harness asks of a model.

    Loads and raises as `load_with_tokenizer`.
    """

    def __init__(self, directory, device="cpu"):
        self.model, tokenizer = load_with_tokenizer(directory, device=device)
        super().__init__(self.model.config, tokenizer)
        self.device = torch.device(device)

    @torch.inference_mode()
    def loglikelihoods(self, pairs):
        """[(context ids, continuation ids)] -> [(log-probability, greedy)], one a pair.

        log-probability (nats, fp32 sum): of the continuation given the context; greedy: whether
        each of its tokens is the most likely one. Raises ValueError on NaN.

        A result depends on its pair alone, on a GPU to the rounding of batches, which equally long
        sequences share. On a CPU each goes alone, because matrix kernels round differently below 16
        rows, and in padded rows (up to 2e-5 in a logit, measured), while a batch saves 20 %. Texts
        that many pairs read are computed once: whole inputs (all one-token choices of a question),
        and long contexts, whose cache is then copied.
        """
        # short: inputs -> the pairs that read them (the last token is predicted, and never read);
        # long: context -> its continuations.
        found, short, long = {}, {}, {}
        for context, new in dict.fromkeys(pairs):
            if len(context) < LONG:
                short.setdefault(context + new[:-1], []).append((context, new))
            else:
                long.setdefault(context, []).append(new)
        at_once = 0 if self.device.type == "cpu" else TOKENS  # 0: each goes alone
        for batch in _equal_lengths(short, len, lambda T: max(1, at_once // T)):
            for inputs, logits in zip(batch, self.model(torch.tensor(batch, device=self.device))):
                for context, new in short[inputs]:
                    found[context, new] = self._read(logits[-len(new):], new)
        for context, continuations in long.items():
            cache = Cache(self.model, 1, len(context) + max(map(len, continuations)))
            for piece in torch.tensor([context[:-1]], device=self.device).split(PREFILL, dim=1):
                self.model.hidden(piece, cache=cache)
            for new in continuations:  # the context's last token predicts the first of these
                inputs = torch.tensor([context[-1:] + new[:-1]], device=self.device)
                logits = self.model(inputs, cache=copy.deepcopy(cache))[0]
                found[context, new] = self._read(logits, new)
        return [found[pair] for pair in pairs]

    @torch.inference_mode()
    def token_logprobs(self, ids):
        """Log-probability of each token of a text that stands after BOS (or EOS): (T,) float64.

        In pieces, since (T, V) in fp32 would be 0.5 GB for 1k tokens of a vocabulary of 128k.
        """
        if not self.prefix:
            raise ValueError(f"{self.model.source}: config.json names no BOS or EOS to begin with")
        check_length(len(ids), self.max_tokens)
        new, found = torch.tensor([*self.prefix, *ids], device=self.device), []
        cache = Cache(self.model, 1, len(new))
        for a in range(0, len(ids), PREFILL):
            h = self.model.hidden(new[None, a:min(a + PREFILL, len(ids))], cache=cache)[0]
            logprobs = F.linear(h, self.model.lm_head_weight).float().log_softmax(-1)
            found.append(logprobs.gather(1, new[a + 1:a + 1 + len(h), None])[:, 0].double())
        return finite(torch.cat(found))

    def _read(self, logits, new):
        """logits (n, V) at which the n tokens of `new` were predicted -> (nats, greedy)."""
        new = torch.tensor(new, device=self.device)
        logprobs = logits.float().log_softmax(-1)
        total = finite(logprobs.gather(1, new[:, None]).sum())
        return float(total), bool((logits.argmax(-1) == new).all())

    def generate(self, requests):
        """Yield (i, text): the greedy continuation of each request, in an order of its own.

        requests: (ids of the prompt, strings that end the text, most new tokens); the model's eos
        ids end it too. The strings are searched in the decoded text, since tokens cut it elsewhere,
        and cut off. Special tokens end a text where a string names them, and are no part of it, as
        in the harness. The beginning of a character whose other bytes have not come is held back.
        """
        eos, special = self.model.config.eos_ids, self.tokenizer.special

        def cut(text, stops):
            return text[:min((text.find(s) for s in stops if s in text), default=len(text))]

        for batch in _equal_lengths(range(len(requests)), lambda i: len(requests[i][0]),
                                    lambda T: ROWS):
            prompts, stops, most = zip(*(requests[i] for i in batch))
            new, texts = [[] for _ in batch], [None for _ in batch]
            prompts = torch.tensor(prompts, device=self.device)
            for tokens in stream(self.model, prompts, max_new_tokens=max(most)):
                for b, token in enumerate(tokens.tolist()):
                    if texts[b] is None:
                        if token not in eos:
                            new[b].append(token)
                        whole = self.tokenizer.decode(new[b]).rstrip("\ufffd")
                        text = cut(whole, stops[b])
                        ended = token in eos or text != whole or len(new[b]) == most[b]
                        if special.intersection(new[b]):
                            whole = self.tokenizer.special_pattern.sub("", text)
                            text = cut(whole, stops[b])
                        if ended or text != whole:
                            texts[b] = text
                if None not in texts:
                    break
            yield from zip(batch, texts)


# ----------------------------------------------------------------------------------------------
# 4. Code in a subprocess
# ----------------------------------------------------------------------------------------------
# This guards against accidents, not adversaries: models write endless loops, rm -rf and fork
# bombs by mistake. Code that means to break out of a Python process can. For code of strangers
# use a virtual machine.
#
# Three walls. The kernel's limits stop what eats memory, time or disk. An audit hook, which Python
# calls before it opens a file or starts a process and which no program can take off again, stops
# writing outside, other processes and the network. And a session of its own lets one signal end
# what got past them.

# What the fresh interpreter runs first. The program cannot print the secret by accident, and
# sys.exit(), os._exit(0) or a crash before the end of the tests never reaches the last line.
_RUNNER = """
import os, resource, sys
folder, secret = os.path.realpath(os.getcwd()), sys.argv.pop()
limits = dict(AS=1 << 30, CPU=int(sys.argv.pop()), FSIZE=1 << 24, CORE=0)
for name, most in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
never = ("os.fork", "os.exec", "os.kill", "os.posix_spawn", "os.spawn", "os.system",
         "subprocess.Popen", "socket.bind", "socket.connect", "socket.getaddrinfo", "socket.send")
changes = {"os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir",
           "os.symlink", "os.truncate", "os.utime", "shutil.rmtree", "sqlite3.connect"}
writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
def refuse(event, args):
    if event.startswith(never):
        raise PermissionError(event + " is not allowed here")
    if event in changes or event == "open" and isinstance(args[2], int) and args[2] & writes:
        for path in args[:1] if event == "open" else args[:2]:
            path = os.path.realpath(path) if isinstance(path, (str, bytes, os.PathLike)) else folder
            if not (os.fsdecode(path) + "/").startswith((folder + "/", "/dev/null/")):
                raise PermissionError(f"{event} outside of {folder}: {path}")
sys.addaudithook(refuse)
main = sys.modules["__main__"] = type(sys)("__main__")  # where dataclasses and pickle look it up
exec(compile(sys.stdin.read(), "program", "exec"), vars(main))
os.write(1, secret.encode())
"""


def run_program(program, *, seconds=10):
    """Whether a Python program (str) reaches its last line within `seconds`, in a process apart.

    seconds: of wall clock, and of CPU. Fresh isolated interpreter in an empty folder of its own; no
    environment but its place; limits on memory (1 GB), CPU time and file size (16 MB); no child
    processes (a limit on their number would count all of the user's), no network, and by `open` and
    its like no writing outside of the folder. What is left of its session is killed.
    """
    secret = os.urandom(16).hex()
    with (tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
          tempfile.TemporaryFile() as output):
        # -I: no packages of the user, no PYTHON* variables, no current folder on the path. The
        # program comes on stdin, since an argument may be no longer than 128 kB; what it prints
        # goes to a file, whose size has a limit, which a pipe's flood has not.
        process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", "-c", _RUNNER, str(seconds), secret],
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, cwd=folder,
            env={"TMPDIR": folder}, start_new_session=True)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(program.encode("utf-8", "replace"), seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):  # nobody is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return secret.encode() in output.read()


# ----------------------------------------------------------------------------------------------
# 5. Scoring task files
# ----------------------------------------------------------------------------------------------
# Each kind of row has a function (scorer, rows) that yields (row, result) in an order of its own,
# as results come. `evaluate_rows` writes them down at once. A stop loses what is under way: up to
# 256 rows of choices, 16 prompts, or a file's probes.


def score_choices(scorer, rows):
    """Yield (row, result) of "choice" rows: every choice's log-probability, acc and acc_norm.

    Longer choices are less likely just because they are longer; acc_norm is the harness's remedy,
    the mean over characters, which no tokenizer can shift. In blocks of 256 rows: enough to find
    equal lengths for a GPU's batches, few enough to lose little when the run is stopped.
    """
    for a in range(0, len(rows), 256):
        block = [(row, [naming(row["where"], scorer.encode_pair, row["context"], choice)
                        for choice in row["choices"]]) for row in rows[a:a + 256]]
        found = iter(scorer.loglikelihoods([pair for _, pairs in block for pair, _ in pairs]))
        for row, pairs in block:
            own = [next(found)[0] for _ in pairs]
            per_character = [x / len(choice.removeprefix(" "))
                             for x, choice in zip(own, row["choices"])]
            # index(max(...)): the first of equals wins, as in the harness
            result = {name: float(x.index(max(x)) == row["gold"])
                      for name, x in (("acc", own), ("acc_norm", per_character))}
            yield row, {"score": result[row["metric"]], **result, "chance": 1 / len(own),
                        "lost_tokens": max(lost for _, lost in pairs), "logprobs": own}


def score_texts(scorer, rows):
    """Yield (row, result) of "generate", "code" and "needle" rows: the output, and if it is right.

    A batch can change the rounding of a step, so two tokens within 2e-5 of each other could swap;
    on the 600 prompts in tests/tasks none did, against prompts one by one.
    """
    asked, requests = [], []
    for row in rows:
        if row["type"] == "needle":
            prompt, number = needle_prompt(row, scorer.tokenizer)
            row = {**row, "prompt": prompt, "gold": number, "stop": [], "extract": "",
                   "match": "contains", "max_new_tokens": 16}
        ids, n = naming(row["where"], scorer.cut_prompt, row["prompt"], row["max_new_tokens"])
        asked.append((row, n))
        requests.append((ids, row["stop"], row["max_new_tokens"]))
    for i, text in scorer.generate(requests):
        row, lost = asked[i]
        right = (run_program(f"{row['prompt']}{text}\n{row['test']}") if row["type"] == "code"
                 else is_right(row, text))
        yield row, {"score": float(right), "lost_tokens": lost, "chance": 0.0, "output": text}


def score_rows(scorer, rows):
    """Yield (row, result) of rows of any types."""
    for score, types in ((score_choices, ("choice",)), (score_probes, ("probe",)),
                         (score_texts, ("generate", "code", "needle")),
                         (score_sequences, ("family", "strand", "molecule"))):
        if chosen := [row for row in rows if row["type"] in types]:
            yield from score(scorer, chosen)


def _read_samples(path, model):
    """The results that a samples file holds of a model: {(sha256 of the task file, id): result}.

    A last line without its end is cut off: the run was killed while it wrote. Results of another
    model are left aside, which is said; those of a task file that was edited have another key.
    """
    drop_torn_line(path)
    results = [result for _, result in read_rows(path)]
    own = {(r["file"], r["id"]): r for r in results if r.get("model") == model}
    if others := sum(r.get("model") != model for r in results):
        print(f"{path}: {others} lines are not of this model on this kind of device, and not used")
    return own


def read_tasks(directory, task_files, allow_code_execution=False, limit=None):
    """{name of the file without .jsonl: its first `limit` rows}; refuses what would stop scoring.

    That is, beside bad rows: files of one name, code without the flag or on a system that runs no
    program with limits, molecules without RDKit, a probe alone; and what the model in
    `directory` cannot read (`Reader.check_row`). Call it before hours of training, too. Raises
    ValueError or OSError.
    """
    tasks = {Path(path).stem: read_task(path)[:limit] for path in task_files}
    if len(tasks) < len(task_files):
        raise ValueError("--tasks: two files have the same name, which is the name of the task")
    first = {row["type"]: row["where"] for rows in tasks.values() for row in reversed(rows)}
    if "code" in first and not allow_code_execution:
        raise ValueError(f"{first['code']} runs code that the model writes; if you accept that, "
                         "score it by `evaluate.py compare` with --allow-code-execution")
    if "code" in first and not run_program("pass"):
        raise ValueError(f"{sys.executable} runs no program with limits here, as code tasks need")
    if "molecule" in first:
        canonical_smiles([])
    for rows in tasks.values():
        probes = [row["where"] for row in rows if row["type"] == "probe"]
        if len(probes) == 1:
            raise ValueError(f"{probes[0]}: a probe is fitted on the file's others: two rows or "
                             "more")
    reader = Reader(ModelConfig.from_hf(directory), Tokenizer(directory))
    for row in itertools.chain(*tasks.values()):
        naming(row["where"], reader.check_row, row)
    return tasks


def evaluate_rows(directory, task_files, *, samples=None, device="cpu", limit=None,
                  allow_code_execution=False):
    """Score a model folder on task files: {task: [result, ...]}, a result a row, in file order.

    A result is a dict with "score" (0 to 1), "chance" (the score of guessing), "lost_tokens" (of an
    over-long context) and what the functions of this and the next section add. samples: a JSONL
    file that results are added to as they come and read from first, so that a second call goes on
    after a stop. limit: of rows a task. Raises ValueError or OSError naming file, line or flag.
    """
    tasks = read_tasks(directory, task_files, allow_code_execution, limit)
    files = {task: sha256(path) for task, path in zip(tasks, task_files)}
    # A GPU computes in the stored dtype, bf16 mostly, where a CPU computes in fp32.
    model = f"{model_sha256(Path(directory))} on {torch.device(device).type}" if samples else None
    done = _read_samples(Path(samples), model) if samples else {}
    todo = {task: _rows_left(rows, files[task], done) for task, rows in tasks.items()}
    scorer = Scorer(directory, device) if any(todo.values()) else None
    for task, rows in todo.items():
        for row, result in tqdm(score_rows(scorer, rows), desc=task, total=len(rows), leave=False):
            result = {"model": model, "file": files[task], "id": row["id"], **result}
            done[files[task], row["id"]] = result
            if samples:
                append_json(samples, result)
    return {task: [done[files[task], row["id"]] for row in rows] for task, rows in tasks.items()}


def _rows_left(rows, file, done):
    """Rows without a result; all, if a probe is among them: it is fitted on its file's others.

    So a probe's result counts only if it had as many others (with another --limit it had not).
    """
    probes = sum(row["type"] == "probe" for row in rows)
    left = [row for row in rows if (file, row["id"]) not in done
            or done[file, row["id"]].get("probes", probes) != probes]
    return rows if any(row["type"] == "probe" for row in left) else left


def mean_scores(results, key="score"):
    """{task: [result, ...]} -> {task: mean of result[key]}. No task is empty: `read_task` and
    --limit see to that, so this is never a mean over nothing.
    """
    return {task: sum(r[key] for r in rows) / len(rows) for task, rows in results.items()}


def evaluate_tasks(directory, task_files, **options):
    """Score a model folder on task files: {task: mean score}. Arguments as `evaluate_rows`."""
    return mean_scores(evaluate_rows(directory, task_files, **options))


# ----------------------------------------------------------------------------------------------
# 6. Sequences: families, both strands of DNA, molecules
# ----------------------------------------------------------------------------------------------
# What a causal model knows of a protein family shows in how much cheaper a member gets behind its
# relatives; of DNA, in both strands, because a gene can lie on either; of molecules, in samples.


def family_nats(scorer, sequences):
    """Negative log-probability of each sequence given those before it: [(nats, tokens), ...].

    As in training: each has a separator behind it (not counted), at which positions restart.
    """
    members = [scorer.tokenizer.encode_member(sequence) for sequence in sequences]
    parts = scorer.token_logprobs(sum(members, [])).split([len(member) for member in members])
    return [(-float(part[:-1].sum()), len(part) - 1) for part in parts]


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
        ids = [*scorer.prefix, *scorer.tokenizer.encode(bases, bos=False)]
        check_length(len(ids), scorer.max_tokens)
        h = finite(scorer.model.hidden(torch.tensor([ids], device=scorer.device))[0])
        return h[len(scorer.prefix):].float().cpu()

    return torch.cat((embed(dna), embed(reverse_complement(dna)).flip(0)), dim=1)


def ridge_probe(features, labels, test_features, penalty=1e-3):
    """Labels predicted for test_features (M, D) by ridge regression on features (N, D).

    labels (N,) int64 from 0. One-hot targets, features standardised by their mean and deviation,
    penalty * N * |W|^2; solved in closed form in float64, so that no optimizer's settings are
    part of the score.
    """
    x, t = features.double(), test_features.double()
    mean, scale = x.mean(0), x.std(0, correction=0).clamp_min(1e-12)
    x, t = (x - mean) / scale, (t - mean) / scale
    y = F.one_hot(labels).double()
    bias, gram = y.mean(0), x.T @ x  # (D, D)
    gram.diagonal().add_(penalty * len(x))
    return (t @ torch.linalg.solve(gram, x.T @ (y - bias)) + bias).argmax(1)


def canonical_smiles(texts):
    """RDKit's one way to write each molecule (OCC and CCO are CCO); None for what is no molecule.

    Syntax, valences and aromaticity are judged by RDKit. Two things that it takes are refused: the
    empty string, and anything behind a space, which it reads as the molecule's name. ValueError
    where RDKit is not installed.
    """
    try:
        from rdkit import Chem, rdBase
    except ImportError:
        raise ValueError("molecules are judged by RDKit: pip install rdkit") from None
    with rdBase.BlockLogs():  # it would print a line for every invalid one
        found = [Chem.MolFromSmiles(text) if text.split() == [text] else None for text in texts]
    return [None if molecule is None else Chem.MolToSmiles(molecule) for molecule in found]


def sample_sequences(scorer, members, number, *, seed, temperature=1.0, max_new_tokens=128):
    """`number` further members of a family (or of [], any), each up to its separator or EOS."""
    tokenizer = scorer.tokenizer
    ends = {tokenizer.separator_id, *scorer.model.config.eos_ids}
    ids = sum(map(tokenizer.encode_member, members), [*scorer.prefix])
    check_length(len(ids), scorer.max_tokens, max_new_tokens)
    rows = generate(scorer.model, torch.tensor([ids] * number, device=scorer.device), seed=seed,
                    max_new_tokens=max_new_tokens, temperature=temperature, stop=ends - {None})
    return [tokenizer.decode(itertools.takewhile(lambda i: i not in ends, row[len(ids):]))
            for row in rows.tolist()]


def molecule_shares(samples, known):
    """{"valid", "unique", "novel"}: of samples; of the valid; of the unique, not among `known`.

    Molecules are compared in canonical form, so two ways to write one count once. A share of
    nothing (no molecule is valid) is NaN.
    """
    valid = [text for text in canonical_smiles(samples) if text]
    unique = set(valid)
    novel = unique - set(canonical_smiles(known))
    return {name: len(part) / len(whole) if whole else math.nan for name, part, whole in (
        ("valid", valid, samples), ("unique", unique, valid), ("novel", novel, unique))}


def score_sequences(scorer, rows):
    """Yield (row, result) of "family", "strand" and "molecule" rows."""
    for row in rows:
        result = naming(row["where"], _score_sequence, scorer, row)
        yield row, {**result, "chance": 0.0, "lost_tokens": 0}


def _score_sequence(scorer, row):
    match row["type"]:
        case "family":
            members = [math.exp(nats / n) for nats, n in family_nats(scorer, row["sequences"])]
            return {"score": 1 / members[-1], "perplexity": members}
        case "strand":
            total = sum(strand_scores(scorer, row["dna"]))
            return {"score": math.exp(total / (2 * len(row["dna"])))}
        case "molecule":
            text, = sample_sequences(scorer, row["sequences"], 1, **{
                key: row[key] for key in ("seed", "temperature", "max_new_tokens")})
            return {"score": float(canonical_smiles([text]) != [None]), "output": text}


def score_probes(scorer, rows):
    """Yield (row, result) of all "probe" rows of a file: two halves, by parity, each labelled by a
    probe that was fitted on the other.

    Whole rows change sides, since neighbouring bases share most of what they see. chance: the most
    common label.
    """
    features = [base_embeddings(scorer, row["dna"]) for row in rows]
    alphabet = sorted(set("".join(row["labels"] for row in rows)))
    labels = [torch.tensor([alphabet.index(c) for c in row["labels"]]) for row in rows]
    chance = torch.cat(labels).bincount().max().item() / sum(map(len, labels))
    for parity in (0, 1):
        x, y = torch.cat(features[1 - parity::2]), torch.cat(labels[1 - parity::2])
        tests, own = features[parity::2], labels[parity::2]
        found = ridge_probe(x, y, torch.cat(tests)).split([len(test) for test in tests])
        for row, right, answer in zip(rows[parity::2], own, found):
            yield row, {"score": (answer == right).double().mean().item(), "chance": chance,
                        "lost_tokens": 0, "probes": len(rows)}


# ----------------------------------------------------------------------------------------------
# 7. Output gates: where the mLSTM speaks, and where the window
# ----------------------------------------------------------------------------------------------
# The mixer's output is o h_mLSTM + (1 - o) h_window, o a number a head and token (Eq. 11). So its
# median shows which heads have learnt to read the memory (App. E.2 of the paper).


def read_column(path, name, kind):
    """{place: what the row holds under `name`} of a .jsonl file: text, or a list of strings (kind).

    ValueError naming file:line where a row does not, and for a file without rows: what is made of
    nothing, a mean or a map, must not be shown.
    """
    found = {place: row.get(name) for place, row in read_rows(path)}
    for place, value in found.items():
        if type(value) is not kind or not all(isinstance(part, str) for part in value):
            what = {str: "a string", list: "a list of strings"}[kind]
            raise ValueError(f'{place}: expected "{name}", {what}')
    if not found:
        raise ValueError(f"{path}: there is no row in this file")
    return found


@torch.inference_mode()
def gate_map(scorer, texts, *, tokens=1024, rows=128):
    """Median output gate o_t of every layer and head: (layers, H) fp32 on the CPU.

    0: only the window is read, 1: only the mLSTM. Over the first `rows` rows of at most `tokens`
    tokens (no more than the model was made to read), cut from the texts. Raises ValueError for a
    model without output gates, and if the texts have no tokens.
    """
    hybrid, tokens = scorer.model.config.hybrid, min(tokens, scorer.max_tokens)
    if hybrid is None or MIXERS[hybrid.mixer] is not HybridAttention:
        raise ValueError("--student: this model has no output gates; only hybrid students have")
    ids = (scorer.encode(text) for text in texts if text)  # of "" it would be BOS alone
    cut = (row[a:a + tokens] for row in ids for a in range(0, len(row), tokens))
    gates = [[] for _ in scorer.model.model["layers"]]
    hooks = [block.self_attn.output_gate.register_forward_hook(
        # All 128 x 1024 gates are kept, for the median: in fp16, whose steps near 1 are 0.0005.
        lambda module, inputs, logits, kept=kept: kept.append(logits[0].sigmoid().half().cpu()))
        for block, kept in zip(scorer.model.model["layers"], gates)]
    for row in tqdm(itertools.islice(cut, rows), total=rows, desc="gates", unit="row", leave=False):
        scorer.model.hidden(torch.tensor([row], device=scorer.device))
    for hook in hooks:
        hook.remove()
    if not gates[0]:
        raise ValueError("--data: the texts are empty, and a median over nothing is no number")
    return torch.stack([torch.cat(kept, dim=1).float().median(dim=1).values for kept in gates])


def show_gates(medians):
    """The map in the terminal, in percent: a line a layer, a column a head.

    A student starts at 12 % everywhere (the gate's bias is -2); what moved, training moved.
    """
    print("median output gate in percent (0: window, 100: mLSTM)")
    print("layer  head" + "".join(f"{h:>4}" for h in range(medians.shape[1])) + "   mean")
    for layer, row in enumerate(medians):
        print(f"{layer:5}      " + "".join(f"{100 * o:4.0f}" for o in row)
              + f"{100 * row.mean():7.0f}")


# ----------------------------------------------------------------------------------------------
# 8. Bridge to lm-evaluation-harness, for the published benchmarks
# ----------------------------------------------------------------------------------------------


def lm_eval_model(scorer):
    """The Scorer as an `lm_eval.api.model.LM`; lm_eval.simple_evaluate(model=...) takes it.

    The harness brings prompts, few-shot examples and metrics; the numbers are the Scorer's, to the
    last bit.
    """
    from lm_eval.api.model import LM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Bridge(LM):
        tokenizer_name = property(lambda self: str(scorer.model.source))

        def uncut(self, found):  # [(ids, tokens lost), ...] -> ids; and says what was lost
            ids, lost = zip(*found) if found else ((), ())
            if any(lost):
                print(f"{sum(map(bool, lost))} of {len(lost)} requests were too long and lost "
                      "their left end")
            return ids

        def loglikelihood(self, requests):
            pairs = self.uncut([scorer.encode_pair(*request.args) for request in requests])
            return scorer.loglikelihoods(pairs)

        def loglikelihood_rolling(self, requests):
            totals = []
            for request in requests:
                # No BOS: it stands before the first window. (HFLM scores a second one as a token.)
                ids = scorer.tokenizer.encode(request.args[0], bos=False)
                windows = get_rolling_token_windows(ids, scorer.prefix[0], scorer.max_tokens, 1)
                pairs = [tuple(map(tuple, make_disjoint_window(w))) for w in windows]
                totals.append(sum(total for total, _ in scorer.loglikelihoods(pairs)))
            return totals

        def generate_until(self, requests):
            prompts, limits = [], []
            for text, options in (request.args for request in requests):
                options = normalize_gen_kwargs(options)  # its keys have several names
                samples = options.get("do_sample") and options.get("temperature", 1) > 0
                if samples or options.get("num_beams", 1) > 1:
                    raise ValueError("this task samples, or searches with beams; the bridge "
                                     "generates greedily only")
                new, until = options["max_gen_toks"], [x for x in options["until"] if x]
                prompts.append(scorer.cut_prompt(text, new))
                limits.append((until, new))
            asked = [(ids, *limit) for ids, limit in zip(self.uncut(prompts), limits)]
            return [text for _, text in sorted(scorer.generate(asked))]

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            text = scorer.tokenizer.render_chat(chat_history,
                                                generation_prompt=add_generation_prompt)
            if add_generation_prompt:
                return text
            # The harness has begun the answer, which must stay open: cut behind it, as transformers
            # does. A template may have trimmed it.
            said = chat_history[-1]["content"]
            said = said if said in text else said.strip()
            return text[:text.rindex(said) + len(said)]

    return Bridge()


# ----------------------------------------------------------------------------------------------
# 9. Report
# ----------------------------------------------------------------------------------------------
# report.json holds all that the terminal shows and the pictures draw, so that other figures can be
# made of it without scoring again. The samples files hold what each row gave: outputs,
# log-probabilities, the perplexity of every member of a family.


def make_report(teacher, students):
    """The paper's statistics of students against their teacher, as a dict for JSON.

    teacher: results of `evaluate_rows`; students: name -> results on the same tasks. Recovery is
    given plain and above chance; None stands for infinite, which JSON does not know.
    """
    def per_row(results):
        return {task: [r["score"] for r in rows] for task, rows in results.items()}

    def for_json(ratios):
        return {task: r if math.isfinite(r) else None for task, r in ratios.items()}

    models = [teacher, *students.values()]
    a_t, chance = mean_scores(teacher), mean_scores(teacher, "chance")
    report = {"teacher": a_t, "chance": chance, "students": {},
              "rows": {task: len(rows) for task, rows in teacher.items()},
              "contexts_cut": sum(any(result["lost_tokens"] for result in row) for task in teacher
                                  for row in zip(*(model[task] for model in models)))}
    for name, results in students.items():
        a_s = mean_scores(results)
        report["students"][name] = {
            "scores": a_s, "recovery": for_json(recovery(a_s, a_t)),
            "recovery_above_chance": for_json(recovery(a_s, a_t, chance)),
            "win_and_tie": win_and_tie(a_s, a_t, 0.0),
            "critical_tolerance": critical_tolerance(a_s, a_t),
            "intervals": bootstrap(per_row(results), per_row(teacher))}
    return report


def show_report(report):
    """One table a student: a line a task, then C_0 and alpha*.

    The intervals stand beside both, since with few rows the two numbers are mostly luck.
    """
    for student, s in report["students"].items():
        width = max(4, *map(len, report["rows"]))
        columns = report["teacher"], s["scores"], s["recovery"], s["recovery_above_chance"]
        print(f"\n{student}\n{'task':{width}}  rows   teacher   student  recovery (above chance)")
        for task, rows in report["rows"].items():
            shown = ("-" if column[task] is None else f"{column[task]:.3f}" for column in columns)
            print(f"{task:{width}}{rows:6}" + "".join(f"{text:>10}" for text in shown))
        rate, tolerance = (s["intervals"][key] for key in ("win_and_tie", "critical_tolerance"))
        print(f"C_0    = {s['win_and_tie']:.3f}   95 % of draws: {rate[0]:.3f} to {rate[1]:.3f}   "
              f"lossless: {'yes' if s['win_and_tie'] >= 0.5 else 'no'}, in "
              f"{s['intervals']['p_lossless']:.0%} of draws")
        print(f"alpha* = {s['critical_tolerance']:.4f}  95 % of draws: {tolerance[0]:.4f} to "
              f"{tolerance[1]:.4f}")
    if report["contexts_cut"]:
        print(f"{report['contexts_cut']} contexts were too long for one model or more, which lost "
              "their left end")


PICTURES = (".png", ".svg", ".pdf")  # to name others would need matplotlib


def save_picture(path, draw, data, rows=1, columns=1):
    """Have draw(data, figure, axes) fill a matplotlib figure; a sentence without matplotlib.

    axes: one, or an array (rows, columns). A picture is an extra: its lack must not end a run whose
    numbers are there. `Figure` instead of pyplot needs no display and keeps nothing alive.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: pictures need matplotlib (pip install matplotlib)")
        return
    figure = Figure(figsize=(5 * columns, 3.5 * rows), dpi=150, layout="constrained")
    draw(data, figure, figure.subplots(rows, columns))
    figure.savefig(path)
    print(f"picture: {path}")


def draw_curves(report, figure, axes):
    """C_alpha over alpha for every student; alpha* is where a curve crosses one half.

    A curve tells what alpha* hides: whether the other half of the tasks follows soon, or never.
    """
    alphas = np.linspace(0, 0.2, 401)
    for name, s in report["students"].items():
        rates = [win_and_tie(s["scores"], report["teacher"], alpha) for alpha in alphas]
        # Folders differ at their ends; the whole of a long path would leave no room for the curves.
        label = f"{name[-40:]}: {s['critical_tolerance']:.3f}"
        axes.step(alphas, rates, where="post", label=label)
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="tolerance alpha", ylabel="Win-and-Tie rate", ylim=(0, 1.03))
    axes.legend(title="alpha*")


def draw_gates(medians, figure, axes):
    """The map of `gate_map` as a picture: window blue, mLSTM red."""
    image = axes.imshow(medians.numpy(), vmin=0, vmax=1, cmap="coolwarm", aspect="auto")
    figure.colorbar(image, label="median output gate (1: mLSTM)")
    axes.set(xlabel="head", ylabel="layer")
    axes.locator_params(integer=True)


# ----------------------------------------------------------------------------------------------
# 10. Speed and memory, teacher against student
# ----------------------------------------------------------------------------------------------
# What Figures 5 and 10 to 14 of the paper (§4.4, App. E.4) show: cost over context and batch. The
# prompts are random ids and new parameters need no training: neither changes what is computed.
# Times of one model alone say little, since machines differ and are shared. So both models take
# turns in each cell of the grid, and the ratio is what to read.

PASSES = 4  # over a cell, the first to warm up
QUANTITIES = ("prefill_tokens_per_s", "first_token_ms", "decode_step_ms", "decode_tokens_per_s",
              "cache_MB", "peak_MB")  # the last above the weights, on GPUs only


def time_once(model, batch, context, new_tokens):
    """Read random tokens (batch, context), continue them greedily by 1 + new_tokens: QUANTITIES.

    Timed is `stream`, which is what users run. The peak is what came on top of the memory that was
    allocated before; it is known on a GPU only, and missing in the dict of a CPU.
    """
    device = model.lm_head_weight.device
    tokens = torch.randint(model.config.vocab_size, (batch, context), device=device)
    if on_gpu := device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    times = [time.perf_counter()]
    cache = Cache(model, batch, context + new_tokens)
    for ids in stream(model, tokens, max_new_tokens=1 + new_tokens, stop=(), cache=cache):
        ids.tolist()  # waits for the device, as printing the token would
        times.append(time.perf_counter())
    first, *steps = np.diff(times).tolist()
    step = float(np.median(steps))
    values = [batch * context / first, 1e3 * first, 1e3 * step, batch / step,
              1e-6 * sum(x.nbytes for x in cache.tensors())]
    if on_gpu:
        values.append(1e-6 * (torch.cuda.max_memory_allocated(device) - before))
    return dict(zip(QUANTITIES, values))


def measure_cell(models, batch, context, new_tokens, seconds):
    """Time models in turns on one cell of the grid: {name: medians of what `time_once` returns}.

    models: name -> Transformer. The first turn warms up and does not count; of the PASSES - 1 that
    do, none but the first begins after `seconds`. {} for a model that ran out of memory.
    """
    passes, started = {name: [] for name in models}, time.perf_counter()
    for turn in range(PASSES):
        if turn > 1 and time.perf_counter() - started > seconds:
            break
        for name in list(passes):
            try:
                passes[name].append(time_once(models[name], batch, context, new_tokens))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                del passes[name]
    found = dict.fromkeys(models, {})
    for name, (first, *later) in passes.items():
        found[name] = {key: float(np.median([p[key] for p in later])) for key in first}
    return found


def show_speed(cell):
    """A cell's table: a line a quantity, with the student's share of the teacher's."""
    print(f"\nbatch {cell['batch']}, context {cell['context']:,}")
    print(f"{'':20}{'teacher':>14}{'student':>14}{'student/teacher':>18}")
    for key in QUANTITIES:
        values = [cell[name].get(key) for name in ("teacher", "student")]
        shown = "".join(f"{v:14,.{2 if v < 100 else 0}f}" if v else f"{'OOM':>14}" for v in values)
        if any(values) or key != "peak_MB":
            print(f"{key:20}{shown}" + (f"{values[1] / values[0]:18.2g}" if all(values) else ""))


def draw_speed(cells, figure, panels):
    """A panel a quantity: a line a model and batch, over the contexts.

    What to look for: a teacher's cache and step grow with the context, a student's stay level.
    """
    for axes, key in zip(panels.flat, QUANTITIES):
        axes.set(title=key, xlabel="context (tokens)", xscale="log")
        batches = dict.fromkeys(cell["batch"] for cell in cells)
        for name, batch in itertools.product(("teacher", "student"), batches):
            points = sorted((cell["context"], cell[name][key]) for cell in cells
                            if cell["batch"] == batch and key in cell[name])
            axes.plot(*zip(*points), marker="o", label=f"{name}, batch {batch}")
        axes.set_ylim(bottom=0)
        axes.set_visible(bool(axes.lines))  # no empty panel for what a CPU does not tell
    panels.flat[0].legend()


def open_speed_models(run):
    """{"teacher": Transformer, "student": Transformer} for `speed`; ValueError if they do not fit.

    --random-layers: what a layer of a large model costs can be measured without its weights, and
    on machines that could not hold all its layers. A student that is made here shares all but its
    new parameters with the teacher.
    """
    if run.student and run.window:
        raise ValueError("--window is of an untrained student; the one in --student has its own")
    check_device(run.device)
    dtype = torch.float32 if torch.device(run.device).type == "cpu" else None  # as for scoring
    if run.random_layers:
        config = ModelConfig.from_hf(run.teacher).with_layers(run.random_layers)
        with torch.device(run.device):
            teacher = Transformer(config).to(dtype or torch.bfloat16)
    else:
        teacher = load_pretrained(run.teacher, device=run.device, dtype=dtype)
    student = (load_pretrained(run.student, device=run.device, dtype=dtype) if run.student
               else naming(run.teacher, student_from_teacher, teacher, window=run.window or 512))
    if not student.config.hybrid or teacher.config != dataclasses.replace(
            student.config, hybrid=None, eos_ids=teacher.config.eos_ids):
        raise ValueError(f"--student {run.student} is no student of {run.teacher}; leave it out")
    return {"teacher": teacher, "student": student}


# ----------------------------------------------------------------------------------------------
# 11. The command
# ----------------------------------------------------------------------------------------------
# A function a command. Whatever is wrong with what the user gave is a ValueError or OSError whose
# text is one sentence with a remedy; it ends the program with status 2 and no traceback. A
# traceback is thus always a fault of this program.


def run_compare(run):
    """`compare`: score, print, write report.json and the picture; goes on where it stopped."""
    for folder in run.teacher, *run.student:  # before the teacher's hours
        ModelConfig.from_hf(folder)
    run.out.mkdir(parents=True, exist_ok=True)
    before = read_json(run.out / "report.json", {}).get("students", {})
    now = {path.resolve() for path in run.student}
    if gone := [name for name in before if Path(name).resolve() not in now]:
        print(f"{run.out / 'report.json'} is of other students, and will be replaced. What was "
              f"scored is kept: to have them in it as well, add --student {' '.join(gone)}")

    def score(folder, name):
        name = re.sub(r"[^a-zA-Z0-9._]+", "-", name)[-200:]  # a file's name has its limit
        samples = run.out / f"samples-{name}.jsonl"
        return evaluate_rows(folder, run.tasks, samples=samples, device=run.device, limit=run.limit,
                             allow_code_execution=run.allow_code_execution)

    teacher = score(run.teacher, "the teacher")
    report = make_report(teacher, {str(path): score(path, str(path)) for path in run.student})
    show_report(report)
    write_json(run.out / "report.json", report)
    print(f"report: {run.out / 'report.json'}")
    save_picture(run.out / "win_and_tie.png", draw_curves, report)


def run_gates(run):
    """`gates`: the map in the terminal, and as a picture.

    The data is read before the model: its errors come in a second, a model of 16 GB in a minute.
    """
    if run.picture and not (run.picture.parent.is_dir() and run.picture.suffix.lower() in PICTURES):
        raise ValueError(f"--picture {run.picture}: name a file that ends in one of "
                         f"{', '.join(PICTURES)}, in a folder that exists")
    if run.data.suffix not in (".jsonl", ".txt"):
        raise ValueError(f"--data {run.data}: name a .jsonl or .txt file")
    texts = (read_column(run.data, "text", str).values() if run.data.suffix == ".jsonl"
             else [naming(run.data, run.data.read_text, "utf-8-sig")])
    scorer = Scorer(run.student, run.device)
    medians = gate_map(scorer, texts, tokens=run.context, rows=run.rows)
    if run.context > scorer.max_tokens:
        print(f"rows have {scorer.max_tokens} tokens, which the model was made to read, for "
              f"--context {run.context}")
    show_gates(medians)
    if run.picture:
        save_picture(run.picture, draw_gates, medians)


def run_molecules(run):
    """`molecules`: sample members of families, and print the valid, unique and novel shares.

    The three belong together: a model that repeats what it was shown is valid and not novel, one
    that always says methane is valid and not unique.
    """
    families = read_column(run.data, "sequences", list)
    known = list(itertools.chain(*families.values()))
    canonical_smiles(known[:1])  # before the samples: is RDKit here?
    scorer, samples = Scorer(run.model, run.device), []
    chosen = itertools.islice(families.items(), run.rows)
    for i, (place, family) in enumerate(tqdm([*chosen], desc="molecules", leave=False)):
        samples += naming(place, sample_sequences, scorer, family[:run.shots], run.number,
                       seed=run.seed + i, temperature=run.temperature)
    print(*samples[::run.number][:4], sep="\n")
    print(f"{len(samples)} samples: " + "  ".join(
        f"{name} {share:.3f}" for name, share in molecule_shares(samples, known).items()))


def run_lm_eval(run):
    """`lm-eval`: the harness's own tasks through the bridge.

    Teacher and student each in a run of its own; their tables can be compared line by line.
    """
    try:
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError:
        raise ValueError("the bridge needs lm-evaluation-harness: pip install lm_eval") from None
    if run.include_path and not Path(run.include_path).is_dir():
        raise ValueError(f"--include-path {run.include_path} is no folder")
    manager, names = lm_eval.tasks.TaskManager(include_path=run.include_path), run.tasks.split(",")
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():  # a task's YAML
            raise ValueError(f"--tasks: {name!r} is none of the harness's tasks; `lm_eval ls "
                             "tasks` lists them, --include-path adds your own")
    results = lm_eval.simple_evaluate(
        model=lm_eval_model(Scorer(run.model, run.device)), tasks=names, num_fewshot=run.shots,
        limit=run.limit, apply_chat_template=run.chat, task_manager=manager,
        confirm_run_unsafe_code=run.allow_code_execution)
    print(lm_eval.utils.make_table(results))


def run_speed(run):
    """`speed`: measure the grid, print a table, write speed.json after each cell, and a picture."""
    models = open_speed_models(run)
    about = {name: f"{sum(p.numel() for p in model.parameters()):,} parameters, "
                   f"{model.lm_head_weight.dtype}, {model.config.hybrid or 'softmax attention'}"
             for name, model in models.items()}
    about |= {"torch": torch.__version__, "new_tokens": run.new_tokens, "seconds": run.seconds}
    about["device"] = (torch.cuda.get_device_name(run.device) if run.device.startswith("cuda")
                       else f"{os.uname().machine}, {torch.get_num_threads()} threads")
    print(*(f"{name}: {text}" for name, text in about.items()), sep="\n")
    print(f"In each cell both models take turns: one to warm up, and 1 to {PASSES - 1} that count")
    run.out.mkdir(parents=True, exist_ok=True)
    cells = []
    for batch, context in itertools.product(run.batches, run.contexts):
        cells.append({"batch": batch, "context": context, **measure_cell(
            models, batch, context, run.new_tokens, run.seconds)})
        write_json(run.out / "speed.json", {**about, "cells": cells})
        show_speed(cells[-1])
    print(f"\nreport: {run.out / 'speed.json'}")
    save_picture(run.out / "speed.png", draw_speed, cells, rows=2, columns=3)


def parse_arguments(argv):
    """The command line -> settings; `run` is the command's function."""
    p = argparse.ArgumentParser(description="Score students against their teacher.")
    commands = p.add_subparsers(dest="command", required=True)
    folder, file = dict(type=Path, metavar="DIR"), dict(type=Path, metavar="FILE")
    new = dict(type=new_folder, metavar="DIR")
    need = dict(required=True, default=argparse.SUPPRESS)  # whose help shows no default

    def command(name, function, help):
        c = commands.add_parser(name, help=help,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        c.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                       help="of torch, such as cuda:1")
        c.set_defaults(run=function)
        return c.add_argument

    add = command("compare", run_compare, "tasks, recovery, Win-and-Tie rate")
    add("--teacher", **folder, **need)
    add("--student", action="append", help="may be given several times", **folder, **need)
    add("--tasks", nargs="+", **file, **need)
    add("--out", help="the report; the same command again goes on there", **new, **need)
    add("--limit", type=number(int, 1), help="rows a task")
    add("--allow-code-execution", action="store_true", help="run what the model writes")

    add = command("gates", run_gates, "the map of the output gates")
    add("--student", **folder, **need)
    add("--data", help=".txt or .jsonl", **file, **need)
    add("--picture", help="such as gates.png", **file)
    add("--context", type=number(int, 1), default=1024, help="tokens a row")
    add("--rows", type=number(int, 1), default=128, help="rows to read")

    add = command("molecules", run_molecules, "sample SMILES: valid, unique and novel shares")
    add("--model", help="teacher or student", **folder, **need)
    add("--data", help="families, rows of `sequences`; what they hold is not novel", **file, **need)
    add("--shots", type=number(int, 0), default=4, help="members before a sample")
    add("--rows", type=number(int, 1), default=100, help="families")
    add("--number", type=number(int, 1), default=10, help="samples a family")
    add("--temperature", type=number(float, 0), default=1.0, help="of the sampling")
    add("--seed", type=number(int, 0), default=0, help="of the sampling")

    add = command("lm-eval", run_lm_eval, "published benchmarks, in lm-evaluation-harness")
    add("--model", help="teacher or student", **folder, **need)
    add("--tasks", help="names, with commas between", **need)
    add("--shots", type=number(int, 0), help="examples in the prompt; None: as the task says")
    add("--chat", action="store_true", help="in the model's chat format")
    add("--include-path", help="folder with tasks of your own (YAML)")
    add("--limit", type=number(int, 1), help="rows a task")
    add("--allow-code-execution", action="store_true", help="run what the model writes")

    add = command("speed", run_speed, "prefill, first token, decoding and memory")
    add("--teacher", default=Path(__file__).parent / "tests/teacher", help="its folder", **folder)
    add("--student", help="None: an untrained one of the teacher, which is as fast", **folder)
    add("--random-layers", type=number(int, 1), metavar="N",
        help="of random weights, in the shape of --teacher")
    add("--window", type=number(int, 1), help="W of an untrained student; None: 512")
    add("--contexts", type=number(int, 1), nargs="+", default=[1024, 4096, 16384],
        help="4k is 4096")
    add("--batches", type=number(int, 1), nargs="+", default=[1, 8], help="rows together")
    add("--new-tokens", type=number(int, 1), default=64, help="decoded in every pass")
    add("--seconds", type=number(float, 0), default=20.0, help="of a cell, about")
    add("--out", help="speed.json and speed.png", **new, **need)
    return p.parse_args(argv)


def main(argv=None):
    """One of the five commands."""
    run = parse_arguments(argv)
    run.run(run)


if __name__ == "__main__":
    run_command(main)
