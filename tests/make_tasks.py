"""
Makes tests/tasks/*.jsonl: ten small tasks over the four domains of tests/teacher.

    math    math-add, math-sub, math-max           the answer, exactly
    recall  recall-lookup, recall-repeat           from beyond what windows of 16 tokens reach
                                                   through four layers (64 tokens)
            recall-copy                            a few letters, at once
    code    code-continuation                      which of four lines comes next
            code-order                             which line is not garbled (two words swapped)
    prose   prose-continuation, prose-order        the same with eight words

Held out by construction: the generators of make_teacher.py put every problem, table, list and
source file on one side by a hash, and all of these rows are drawn with held_out=True, while
teacher and distillation see the other side only. A row whose text stands in tests/teacher/data in
spite of that (standard libraries differ between versions of Python) is dropped.

Run:  python tests/make_tasks.py
"""

import json
import random
from pathlib import Path

from make_teacher import skill_example, standard_library, write_rows

HERE = Path(__file__).resolve().parent
ROWS = 100
SKILLS = {"math-add": "add2", "math-sub": "sub", "math-max": "max", "recall-copy": "copy",
          "recall-lookup": "lookup", "recall-repeat": "repeat"}
GAPS = (64, 128)                       # tokens of prose before what is asked for


def generate_rows(skill, rng, filler):
    """Endless "generate" rows of one skill; an answer is one line."""
    while True:
        prompt, answer = skill_example(skill, rng, filler, rng.choice(GAPS))
        yield {"type": "generate", "prompt": prompt, "stop": ["\n"], "gold": answer.strip(),
               # a look-up's line goes on with the next key: its answer is one letter, one token
               "max_new_tokens": 1 if skill == "lookup" else 32}


def cut(rng, document, code, lines=3, words=25):
    """(context, continuation) at a random place: the next line of code, the next eight words.

    lines, words: the least that stand before it.
    """
    if code:
        text = document.splitlines(keepends=True)
        i = rng.randrange(lines, max(lines + 1, len(text)))
        return "".join(text[:i])[-160:], "".join(text[i:i + 1]).rstrip("\n")
    text = document.split()
    i = rng.randrange(words, max(words + 1, len(text) - 8))
    return " ".join(text[i - words:i]), "".join(f" {word}" for word in text[i:i + 8])


def garble(text, rng):
    """The text with two neighbouring words swapped."""
    indent, words = text[:-len(text.lstrip())], text.split()
    i = rng.randrange(len(words) - 1)
    words[i], words[i + 1] = words[i + 1], words[i]
    return indent + " ".join(words)


def choice(rng, context, right, wrong, metric):
    """A "choice" row, or None if two choices are the same."""
    choices = [right, *wrong]
    if len(set(choices)) < len(choices):
        return None
    rng.shuffle(choices)
    return {"type": "choice", "context": context, "choices": choices,
            "gold": choices.index(right), "metric": metric}


def choice_rows(domain, kind, rng, documents):
    """Endless "choice" rows; wrong are other continuations, or the right one garbled."""
    while True:
        (context, right), *others = (cut(rng, d, domain == "code")
                                     for d in rng.sample(documents, 4))
        # A context ends in a word: ":" and a line's end can be one token with what follows.
        if len(right.split()) < 4 or not context.rstrip()[-1:].isalnum():
            continue
        wrong = [garble(right, rng) if kind == "order" else text for _, text in others]
        if all(20 <= len(text) <= 80 for text in (right, *wrong)):
            if row := choice(rng, context, right, wrong, "acc_norm"):
                yield row


def one_line(text):
    return " ".join(text.split())


def write(task, rows, training):
    """The first ROWS distinct rows whose text does not stand in the training text."""
    kept = {}
    for row in rows:
        text = row.get("prompt") or row["context"] + row["choices"][row["gold"]]
        if one_line(text.split("\nfind")[0]) not in training:
            kept.setdefault(text, row)
        if len(kept) == ROWS:
            break
    write_rows(HERE / f"tasks/{task}.jsonl",
               [{"id": f"{task}-{i}", **row} for i, row in enumerate(kept.values())])


def main():
    text = standard_library()
    training = one_line("\n".join(json.loads(line)["text"]
                                  for path in HERE.glob("teacher/data/*.jsonl")
                                  for line in path.read_text(encoding="utf-8").splitlines()))
    for task, skill in SKILLS.items():
        write(task, generate_rows(skill, random.Random(task), text["filler", True]), training)
    for domain in ("code", "prose"):
        for kind in ("continuation", "order"):
            task = f"{domain}-{kind}"
            rows = choice_rows(domain, kind, random.Random(task), text[domain, True])
            write(task, rows, training)


if __name__ == "__main__":
    main()
