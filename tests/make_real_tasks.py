"""
Makes task files for the teacher of make_real_teacher.py, on which it is well above chance.

    prose-cloze, manual-cloze, code-cloze      which of four words ends the sentence; stands here
    prose-continuation, code-continuation      which of four pieces of the same kind comes next
    prose-order, code-order                    which of four is not garbled
    dictionary-word, -meaning, -kind           the word of a definition, the definition of a word,
                                               what a thing is a kind of
    copy-64, -256, -1000                       words of a sentence read so many tokens before
    lookup-64, -256, -1000                     one of two facts, told so many tokens before
    needle                                     evaluate.py's haystack, 128 to 512 tokens
    long/lookup-2000, -4000, needle-2000, -4000        the same, beyond the context of README's runs
    chat-answer, -list, -json                  what the prompt says, in the form that was asked for

Key idea: a task tells something about a student only where its teacher has the skill, so each form
was chosen by measuring the teacher (README has its scores), and words and distractors are such
that four choices differ in one token where possible: then one pass scores all of them.

All text is of the held-out side of make_real_data.py (documents, definitions), or drawn here from
other seeds. A row that shares TWELVE words in a row with the training text is dropped
nevertheless: sources quote each other.

Run:  python tests/make_real_tasks.py --teacher /tmp/real/teacher --out /tmp/real    # a minute
      python evaluate.py compare --teacher /tmp/real/teacher --student DIR \\
             --tasks /tmp/real/tasks/*.jsonl --out REPORT
"""

import argparse
import itertools
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # the repository's root
from make_real_data import THINGS, copying, lookup, read_documents, sentences
from make_tasks import choice, cut, garble
from make_teacher import write_rows
from model import Tokenizer, read_rows

ROWS = 100
TWELVE = 12
BEYOND = (2000, 4000)                  # tokens: two and four contexts of README's runs
EXAMPLES = 2                           # earlier turns of a chat task


def shingles(text):
    """The runs of TWELVE words in a text, by which a row is compared with the training data.

    Twelve: fewer are met by chance in licences, signatures and set phrases; a sentence that both
    sides quote has more.
    """
    words = text.split()
    return {" ".join(words[i:i + TWELVE]) for i in range(len(words) - TWELVE + 1)}


def row_text(row):
    """What a row shows as true: the prompt or context, and the right answer.

    A needle's text is evaluate.py's own, and in no data; only its number counts, so it is "".
    """
    if row["type"] == "choice":
        return row["context"] + row["choices"][row["gold"]]
    return row.get("prompt", "") + " " + row.get("gold", "")


# ------------------------------------------------------------------------------------------------
# Prose, manuals, code: cloze, continuation, order. Each is a generator of rows without an end.
# ------------------------------------------------------------------------------------------------


def cloze(rng, documents, single):
    """Which word ends a sentence; wrong are words that end others, of the same length +- 2.

    All four are one token behind a space, and the wrong ones fit by grammar as well, since what
    ends a sentence is mostly a noun. single(text): whether a text is one token.
    """
    text = [" ".join(document.split()) for document in documents]
    ends = [(document, end) for document in text
            for end in re.finditer(r"(?<= )([a-z]{4,})\.(?= |$)", document)
            if end.start() > 300 and single(f" {end[1]}")]
    while True:
        document, end = rng.choice(ends)
        context = document[:end.start() - 1][-240:].partition(" ")[2]
        wrong = {other[1] for _, other in rng.sample(ends, 40)
                 if abs(len(other[1]) - len(end[1])) <= 2 and other[1] not in context} - {end[1]}
        if len(wrong) >= 3:
            yield choice(rng, context, f" {end[1]}",
                         [f" {word}" for word in rng.sample(sorted(wrong), 3)], "acc")


def code_cloze(rng, documents, single):
    """Which name stands at a place in code; wrong are others of the lines before.

    The right one stands in those lines too, so it is a matter of which, not of having seen it. A
    name behind a space is left out: there the space belongs to its token.
    """
    while True:
        document = rng.choice(documents)
        names = [name for name in re.finditer(r"\b[A-Za-z_]{3,}\b", document)
                 if single(name[0])]
        if len(names) < 60:
            continue
        at = rng.randrange(50, len(names))
        context = document[:names[at].start()][-400:].partition("\n")[2]
        seen = sorted({n[0] for n in names[:at] if n[0] in context} - {names[at][0]})
        if names[at][0] in context and len(seen) >= 3 and not context.endswith(" "):
            yield choice(rng, context, names[at][0], rng.sample(seen, 3), "acc")


def continuation(rng, documents, code, order):
    """Which piece comes next; wrong are pieces from elsewhere, or (order) the right one garbled.

    acc_norm: by log-probability a character, since the pieces of "continuation" differ in length.
    """
    while True:
        (context, right), *others = (cut(rng, rng.choice(documents), code, 4, 28)
                                     for _ in range(4))
        wrong = [garble(right, rng) for _ in others] if order and len(
            right.split()) > 3 else [text for _, text in others]
        if all(20 <= len(text) <= 90 for text in (right, *wrong)):
            yield choice(rng, context, right, wrong, "acc_norm")


# ------------------------------------------------------------------------------------------------
# Dictionary
# ------------------------------------------------------------------------------------------------


def entries(synsets, single):
    """The synsets whose first word is one token, which makes it a frequent one: (word, synset).

    A meaning that spells its word gives the answer away, and long ones cost time.
    """
    found = ((s["words"][0], s) for s in synsets if 4 <= len(s["meaning"].split()) <= 14)
    return [(word, s) for word, s in found if word.isalpha() and len(word) > 3
            and word not in s["meaning"] and single(f" {word}")]


def dictionary(rng, synsets, single, form):
    """Rows of one form; wrong are three entries of the same kind (noun, verb, ...), no kin."""
    usable = entries(synsets, single)
    if form == "kind":
        usable = [(w, s) for w, s in usable if s["above"] and single(f" {s['above'][0]}")]
    while True:
        (word, right), *_ = rng.sample(usable, 4)
        kin = {*right["words"], *right["above"]}
        drawn = [(word, right)] + [
            (w, s) for w, s in rng.sample(usable, 60)
            if s["kind"] == right["kind"] and not {*s["words"], *s["above"]} & kin][:3]
        if len(drawn) < 4:
            continue
        if form == "word":
            context, answers = f"The word for \"{right['meaning']}\" is", [w for w, _ in drawn]
        elif form == "meaning":
            context = f"The dictionary says that the {right['kind']} \"{word}\" means:"
            answers = [s["meaning"] for _, s in drawn]
        else:
            context = f"{word.capitalize()} ({right['meaning']}) is a kind of"
            answers = [s["above"][0] for _, s in drawn]
        first, *wrong = (f" {answer}" for answer in answers)
        # meanings differ in length, by which acc would choose; words are one token each
        yield choice(rng, context, first, wrong, "acc_norm" if form == "meaning" else "acc")


# ------------------------------------------------------------------------------------------------
# Recall and chat
# ------------------------------------------------------------------------------------------------


def copies(rng, prose, distance):
    """"generate" rows: the next words, no more, of a sentence that has begun again."""
    while True:
        prompt, answer = copying(rng, prose, distance)
        words = r"\s*(" + r"\s+".join([r"\S+"] * len(answer.split())) + ")"
        yield {"type": "generate", "prompt": prompt, "gold": answer.strip(), "extract": words,
               "max_new_tokens": 12}


def lookups(rng, prose, distance):
    """"choice" rows: the thing told of whom is asked for, of the other, and two never told."""
    while True:
        prompt, answer, other = lookup(rng, prose, distance)
        untold = [thing for thing in THINGS if thing not in prompt]
        yield choice(rng, prompt, answer, [other, *(f" {t}" for t in rng.sample(untold, 2))],
                     "acc")


def needles(rng, lengths=(128, 256, 512)):
    while True:
        yield {"type": "needle", "length": rng.choice(lengths),
               "depth": round(rng.random(), 2), "seed": rng.randrange(10 ** 6)}


PEOPLE = "Alan Beth Cora Dirk Ella Fred Gina Hans Ines Jack Kira Lars Mary Nick Ott Pia".split()
CITIES = "Paris London Madrid Rome Vienna Prague Oslo Lisbon Dublin Athens Warsaw Berlin".split()


def chat_turn(rng, form):
    """A user's text and the assistant's answer to it, in the form that it asks for."""
    if form == "list":
        things = rng.sample(THINGS, 4)
        return (f"Write as a numbered list: {', '.join(things)}",
                "\n".join(f"{i}. {thing}" for i, thing in enumerate(things, 1)))
    name, age, city = rng.choice(PEOPLE), rng.randint(18, 80), rng.choice(CITIES)
    text = f"{name} is {age} years old and lives in {city}."
    if form == "json":
        return f"Write as JSON: {text}", json.dumps({"name": name, "age": age, "city": city})
    question, answer = rng.choice(((f"In which city does {name} live?", city),
                                   (f"How many years old is {name}?", str(age))))
    return f"{text} {question} Answer with one word.", answer


def chat(rng, tokenizer, form):
    """"generate" rows of one form of answer, behind EXAMPLES of it as earlier turns.

    Yes-or-no questions are not among the forms: this teacher is at their chance (45 % right of
    what the prompt says, 50 % of what kind a thing is).
    """
    while True:
        messages = []
        for _ in range(EXAMPLES + 1):
            asked, gold = chat_turn(rng, form)
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": gold}]
        yield {"type": "generate", "prompt": tokenizer.render_chat(messages[:-1]), "gold": gold,
               "max_new_tokens": 32}


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def generators(text, synsets, tokenizer):
    """{task: a generator of its rows}, seeded by the task's name.

    A task whose text the machine does not have (no novels, no WordNet) is left out.
    """
    def single(word):
        return len(tokenizer.encode(word, bos=False)) == 1

    def rng(task):
        return random.Random(task)

    prose, manual, code = (text[kind, True] for kind in ("prose", "manuals", "code"))
    filler, found = sentences(prose or manual + code), {}  # without novels: any English
    for task, documents in (("prose", prose), ("manual", manual)):
        found[f"{task}-cloze"] = documents and cloze(rng(f"{task}-cloze"), documents, single)
    found["code-cloze"] = code_cloze(rng("code-cloze"), code, single)
    for task, documents in (("prose", prose), ("code", code)):
        for form in ("continuation", "order"):
            found[f"{task}-{form}"] = documents and continuation(
                rng(f"{task}-{form}"), documents, task == "code", form == "order")
    for form in ("word", "meaning", "kind"):
        task = f"dictionary-{form}"
        found[task] = synsets[True] and dictionary(rng(task), synsets[True], single, form)
    for task, rows in (("copy", copies), ("lookup", lookups)):
        for distance in (64, 256, 1000):
            name = f"{task}-{distance}"
            found[name] = filler and rows(rng(name), filler, distance)
    for tokens in BEYOND:
        name = f"long/lookup-{tokens}"
        found[name] = filler and lookups(rng(name), filler, tokens)
        found[f"long/needle-{tokens}"] = needles(rng(f"needle-{tokens}"), (tokens,))
    for form in ("answer", "list", "json"):
        found[f"chat-{form}"] = chat(rng(f"chat-{form}"), tokenizer, form)
    return {task: rows for task, rows in found.items() if rows} | {"needle": needles(rng("needle"))}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the teacher")
    parser.add_argument("--out", type=Path, required=True, help="that of make_real_data.py")
    run = parser.parse_args(argv)
    text, synsets = read_documents(run.out / "packages")
    seen = set()
    for path in run.out.glob("data/*.jsonl"):
        for _, row in read_rows(path):
            seen |= shingles(row.get("text") or " ".join(m["content"] for m in row["messages"]))
    # Python's library repeats itself and dictionaries quote each other: the documents' hash alone
    # does not keep the sides apart
    for task, rows in generators(text, synsets, Tokenizer(run.teacher)).items():
        kept, dropped = {}, 0
        # The same row twice is kept once. 50: where the text is little, it has not ROWS of them
        for row in itertools.islice(rows, 50 * ROWS):
            if row is None or shingles(row_text(row)) & seen:
                dropped += 1
            else:
                kept.setdefault(json.dumps(row), row)
            if len(kept) == ROWS:
                break
        path = run.out / (f"{task}.jsonl" if "/" in task else f"tasks/{task}.jsonl")
        write_rows(path, [{"id": f"{path.stem}-{i}", **row} for i, row in enumerate(kept.values())])
        print(f"{task}: {len(kept)} rows, {dropped} dropped")


if __name__ == "__main__":
    main()
