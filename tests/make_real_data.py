"""
Makes text for the teacher of make_real_teacher.py, from what any machine can get.

Six kinds, a file of rows {"text"} or {"messages"} each, in --out/data:

    prose      Jane Austen's novels, a chapter a document
    manuals    Debian's reference, developer's reference and policy; Python's help topics
    code       the sources of Python's standard library
    reference  WordNet's definitions, computing dictionaries, The Devil's Dictionary
    recall     facts asked for again, and sentences repeated, 30 to 1500 tokens later in prose
    chat       answers sampled from the teacher itself, to prompts written here

Key ideas. A student is distilled on what its teacher would read or say, so its own answers are the
conversations, and no data set has to be found. The recall kind is what the recurrent branch has to
prove: a fact farther back than the window can only come out of the state.

Debian's packages are downloaded and unpacked beside the data, not installed: no root is needed,
only apt-get and dpkg-deb. Where those are missing, or a package is, it is said, and the rest goes
on; Python's own text is always there.

A document is held out (for the tasks of make_real_tasks.py) by a hash of what it is: the file, the
chapter, the definition; so no seed and no run can mix the sides up. Rows are the training side
only. Not here: tokens (distill.py), and enough text for pretraining.

Run:  python tests/make_real_data.py --teacher /tmp/real/teacher --out /tmp/real
      # a minute; then the conversations, half an hour of a core, which can be stopped and go on
      # (none: --conversations 0)
"""

import argparse
import gzip
import random
import re
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # the repository's root
from distill import choose_dtype
from make_teacher import is_held_out, split_text, write_rows
from model import generate, load_with_tokenizer, read_rows

LONGEST = 8000                         # characters of a document, about 2000 tokens
KIND_BYTES = 3_000_000                 # text kept of a kind, about 750 thousand tokens


# ------------------------------------------------------------------------------------------------
# Documents: {(kind, held_out): texts}
# ------------------------------------------------------------------------------------------------
# Readers yield (name, text). The name decides the side, so it must be the same on every machine: a
# path below the library, a topic, the first words of a chapter. Sides are decided before a document
# is cut into pieces, lest two halves of a chapter come to lie on both.

# Typographic characters of the manuals -> ASCII, which is what split_text keeps.
PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-",
                       "\u2014": "--", "\u2026": "...", "\u2022": "*", "\u00a0": " ",
                       "\u00a9": "(c)", "\u00b7": "*", "\u2192": "->"})


def unpack(package, folder):
    """A Debian package's files in folder/package; None, and a sentence, if it cannot be had."""
    target = folder / package
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True,
                       capture_output=True, text=True)
        deb = max(folder.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", deb, target], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None) or str(error)
        print(f"{package}: not to be had, left out ({why.strip().splitlines()[-1]}); on Debian or "
              "Ubuntu apt-get update may help")
        return None
    return target


def novels(package):
    """(name, text) of each chapter of r-cran-janeaustenr.

    An R database is zlib streams, each after 4 bytes of its length when unpacked; in one, strings
    are marked 00 04 00 09 and follow 4 bytes of their length. Each string is a line of a book.
    """
    data, lines = (package / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes(), []
    while len(data) > 4:
        stream = zlib.decompressobj()
        book, data = stream.decompress(data[4:]), stream.unused_data
        for mark in re.finditer(rb"\x00\x04\x00\x09(....)", book, re.DOTALL):
            line = book[mark.end():mark.end() + int.from_bytes(mark[1], "big")]
            lines.append(line.decode("utf-8", "replace"))
    for chapter in re.split(r"\n(?=(?:CHAPTER|Chapter|VOLUME|LETTER)\b)", "\n".join(lines)):
        paragraphs = [" ".join(p.split()) for p in chapter.split("\n\n")]
        yield chapter[:200], "\n\n".join(p for p in paragraphs if p)


def manuals(packages):
    """(name, text) of each section of Debian's manuals and of Python's help topics.

    A manual is one text file; its sections are numbered, 4.2. and so on, at the margin. Headings
    in its table of contents are indented or too short for `split_text`, which drops them.
    """
    from pydoc_data.topics import topics
    yield from topics.items()
    for package in packages:
        for path in sorted(package.rglob("*.txt.gz")):
            text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
            for section in re.split(r"\n(?=(?:Chapter )?\d+\.[\d.]*\.? [A-Z])", text):
                yield section[:200], section


def library():
    """(name, text) of each source file of the standard library but its tests and tables.

    Docstrings stay where they are, so they are no kind of their own: seen twice, they would be
    learnt twice. Packages installed beside it are not Python's own and differ between machines.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data",
            "idle_test", "lib2to3"}
    for path in sorted(root.rglob("*.py")):
        if not skip & set(path.relative_to(root).parts):
            yield path.relative_to(root).as_posix(), path.read_text("utf-8", "replace")


def wordnet(package):
    """WordNet's synsets: dicts of words, kind (noun, verb, adj, adv), meaning, above.

    meaning: the gloss without its examples; above: words of the synset it is a kind of, or [].
    A line is "offset file type count(hex) word id ... pointers | gloss; "example"" (wndb(5WN)); a
    pointer @ to a noun names what a thing is a kind of.
    """
    found = {}
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (package / f"usr/share/wordnet/data.{kind}").open(encoding="utf-8"):
            if line.startswith("  "):                      # the licence
                continue
            numbers, _, gloss = line.partition(" | ")
            key, _, _, count, *rest = numbers.split()
            words = [w.split("(")[0].replace("_", " ") for w in rest[:2 * int(count, 16):2]]
            above = re.search(r" @ (\d{8}) n ", numbers)
            found[kind, key] = {"words": words, "kind": kind, "above": above and above[1],
                                "meaning": gloss.split('; "')[0].strip()}
    for synset in found.values():
        above = found.get(("noun", synset["above"]), {"words": []})
        synset["above"] = above["words"]
    return list(found.values())


def dictionaries(packages):
    """(name, text) of the entries of dictd's dictionaries: a headword at the margin opens one."""
    for package in packages:
        for path in sorted(package.rglob("*.dict.dz")):
            text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
            for entry in re.split(r"\n\n+(?=\S)", text):
                yield entry[:200], entry


def definitions(synsets):
    """Twenty entries a document, as a dictionary prints them, shuffled.

    In WordNet's order neighbours are kin, and a reader could guess one from the last.
    """
    lines = [f"{s['words'][0]} ({s['kind']}): {s['meaning']}.\n" for s in synsets]
    random.Random("definitions").shuffle(lines)
    return ["\n".join(lines[i:i + 20]) for i in range(0, len(lines), 20)]


def read_documents(folder):
    """({(kind, held_out): documents}, {held_out: synsets}); folder: of Debian's packages.

    Each text once. A kind whose packages are missing is an empty list.
    """
    names = {"prose": ["r-cran-janeaustenr"], "wordnet": ["wordnet-base"],
             "manuals": ["debian-reference-en", "developers-reference", "debian-policy"],
             "dictionaries": ["dict-foldoc", "dict-jargon", "dict-devil"]}
    at = {kind: [path for name in found if (path := unpack(name, folder))]
          for kind, found in names.items()}
    named = {"prose": [pair for path in at["prose"] for pair in novels(path)],
             "manuals": manuals(at["manuals"]), "code": library(),
             "reference": dictionaries(at["dictionaries"])}
    text = {(kind, side): [] for kind in named for side in (False, True)}
    for kind, pairs in named.items():
        for name, document in pairs:
            text[kind, is_held_out(name)].append(document.translate(PLAIN))
    # dictionaries' short entries are gathered into documents first
    text = {key: split_text("\n".join(found), LONGEST) if key[0] == "reference" else
            [piece for document in found for piece in split_text(document, LONGEST)]
            for key, found in text.items()}
    synsets = {side: [s for path in at["wordnet"] for s in wordnet(path)
                      if is_held_out(s["meaning"]) == side] for side in (False, True)}
    for side in (False, True):
        text["reference", side] += definitions(synsets[side])
    return {key: list(dict.fromkeys(found)) for key, found in text.items()}, synsets


# ------------------------------------------------------------------------------------------------
# Recall: a seeded generator of training text, and of the tasks' prompts
# ------------------------------------------------------------------------------------------------
# What is asked for cannot be guessed from the prose between, so a student with a window of W has it
# from its state or not at all. Prose and seeds of the tasks are others than those of the training.

NAMES = ("Anna Boris Clara David Emma Felix Greta Henry Irene James Karen Louis Maria Nora Oscar "
         "Paula Quentin Rosa Simon Tina Ursula Victor Wanda Xavier Yvonne Zoe Albert Bella Carl "
         "Diana Edgar Flora George Helen Ivan Julia Kevin Laura Martin Nina Oliver Peter Rachel "
         "Stella Thomas Vera Walter Agnes Bruno Celia Dennis Elsa Frank Gloria Hugo Iris Jacob "
         "Kate Leo Mona Norman Olga Philip Ruth").split()
THINGS = ("apple chair river pencil window garden bottle carpet mirror ladder basket hammer "
          "blanket candle button pillow rose lion piano rocket cheese guitar tiger lemon table "
          "knife coffee ring boat horse").split()          # one token each behind a space
WORD = 1.35                            # tokens a word of prose; only sets lengths


def sentences(documents):
    """Sentences of 12 to 40 words, without quotation marks, that end in a full stop."""
    found = (s for text in documents
             for s in re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(text.split())))
    return [s for s in found if 12 <= len(s.split()) <= 40 and s[0].isupper() and s[-1] == "."
            and not set('"_()[]*') & set(s)]


def prose_of(rng, prose, tokens):
    """Sentences that stand together in `prose`, of about `tokens` tokens.

    Together, so that the text between is as easy to read as a novel and not a list.
    """
    start, text = rng.randrange(len(prose)), []
    while sum(len(s.split()) for s in text) * WORD < tokens:
        text.append(prose[(start + len(text)) % len(prose)])
    return " ".join(text)


def lookup(rng, prose, distance):
    """(prompt, answer, the other fact's): one of two facts, told `distance` tokens before.

    Two, since this teacher mixes up four: it finds the right one of four in half of the cases.
    """
    (asked, thing), (name, other) = zip(rng.sample(NAMES, 2), rng.sample(THINGS, 2))
    told = [f"The favourite thing of {asked} is the {thing}.",
            f"The favourite thing of {name} is the {other}."]
    rng.shuffle(told)
    return (f"{' '.join(told)}\n\n{prose_of(rng, prose, distance)}\n\nThe favourite thing of "
            f"{asked} is the", f" {thing}", f" {other}")


def copying(rng, prose, distance, shown=5, asked=4):
    """(prompt, answer): words of a sentence, read whole `distance` tokens of prose before."""
    sentence = rng.choice(prose)
    words = sentence.split()
    return (f"Remember: {sentence}\n\n{prose_of(rng, prose, distance)}\n\n"
            f"Remember: {' '.join(words[:shown])}", "".join(
                f" {word}" for word in words[shown:shown + asked]))


def repetition(rng, prose):
    """A passage, prose, and the passage once more, twice in half of the cases.

    Of the repetition every token has to be remembered, and is: induction is what a Transformer does
    best. A look-up has one such token in a hundred.
    """
    passage = prose_of(rng, prose, 2 ** rng.uniform(5.5, 8.5))
    between = prose_of(rng, prose, rng.choice((0, 50, 100, 200)))
    return "\n\n".join([passage, between] + [passage] * rng.choice((1, 2))) + "\n\n"


FORMS = ("The favourite thing of {} is the {}.", "{} has the {}.", "{}: {}",
         "{} went out to buy a {}.", "What did {} bring? The {}.")


def questions(rng, prose):
    """Facts about 4 to 24 names, told once and asked twice, in other orders, with prose between.

    One form of sentence a list, from FORMS; things are words or numbers of four digits.
    """
    form, names = rng.choice(FORMS), rng.sample(NAMES, rng.randrange(4, 25))
    things = rng.choice((rng.sample(THINGS, len(names)),
                         [rng.randrange(1000, 10000) for _ in names]))
    facts, text = [form.format(*fact) for fact in zip(names, things)], ""
    for _ in range(3):
        rng.shuffle(facts)
        text += "\n".join(facts) + "\n\n" + prose_of(rng, prose, rng.choice((0, 50, 100, 200)))
        text = text.rstrip() + "\n\n"
    return text


def recall_documents(prose, characters):
    """Look-ups, copies, repetitions and lists of questions, until there are so many characters.

    Distances of the first two are even in their logarithm, 32 to 1450 tokens: short ones are
    learnt first.
    """
    rng, documents = random.Random("recall"), []
    while sum(map(len, documents)) < characters:
        text = ""
        while len(text) < LONGEST * rng.random():
            make = rng.choice((lookup, copying, repetition, questions))
            if make in (repetition, questions):
                text += make(rng, prose)
            else:
                prompt, answer, *_ = make(rng, prose, round(2 ** rng.uniform(5, 10.5)))
                text += f"{prompt}{answer}\n\n"
        documents += [text] if text else []
    return documents


# ------------------------------------------------------------------------------------------------
# Chat: prompts, and the teacher's own answers
# ------------------------------------------------------------------------------------------------
# Short on purpose, and many of a form: prompts of one length are answered together, and a core
# that multiplies bf16 samples 10 tokens a second of one answer, 110 of 24.

TOPICS = ("rain, the moon, friendship, gravity, bread, democracy, bees, volcanoes, music, sleep, "
          "money, trees, the internet, vaccines, rivers, history, computers, glass, salt, bridges, "
          "the heart, football, photography, tea, whales, electricity, poetry, mountains, clocks, "
          "maps, recycling, dinosaurs, magnets, chess, coffee, libraries, winter, trains, honey, "
          "painting").split(", ")
CHORES = ("sleep better, learn a language, save money, cook rice, write a letter, prepare for an "
          "interview, keep a garden, stay healthy, read more books, plan a trip, make new friends, "
          "clean a kitchen, study for an exam, train a dog, speak in public").split(", ")
PROGRAMS = ("adds two numbers, reverses a string, counts vowels, finds the largest number in a "
            "list, checks whether a number is prime, sorts a list of words, removes duplicates "
            "from a list, reads a file line by line, computes a factorial, joins two "
            "dictionaries, prints the even numbers up to n, counts words in a text, converts "
            "Celsius to Fahrenheit, finds the average of a list, checks for a palindrome"
            ).split(", ")


def prompts(synsets, prose):
    """Distinct prompts, shuffled: questions about topics and chores, words, sentences of novels.

    synsets, prose: of the training side; without synsets there are no questions about words.
    """
    rng = random.Random("prompts")
    asked = [form.format(topic) for topic in TOPICS for form in (
        "Explain {} to a child in two sentences.", "Write a short poem about {}.",
        "What are three facts about {}?", "Why is {} important?")]
    asked += [form.format(chore) for chore in CHORES for form in (
        "Give me three tips to {}.", "How do I {}? Answer briefly.")]
    asked += [f"Write a Python function that {program}." for program in PROGRAMS]
    words = [s["words"][0] for s in synsets if s["kind"] == "noun" and s["words"][0].isalpha()
             and s["words"][0].islower() and 4 <= len(s["words"][0]) <= 9]
    if words:
        for form in ("What is a {}?", "Use the word {} in a sentence.",
                     "Is a {} alive? Answer yes or no, then say why."):
            asked += [form.format(word) for word in rng.sample(words, min(300, len(words)))]
    for form in ("Rewrite in simple words: {}", "Continue this story: {}"):
        asked += [form.format(s) for s in rng.sample(prose, min(60, len(prose)))]
    rng.shuffle(asked)
    return list(dict.fromkeys(asked))


def converse(directory, asked, path, *, max_new_tokens=160, most=24):
    """Rows {"messages"} of the teacher's own sampled answers to the prompts `asked`.

    Prompts go together only if equally long, since the teacher knows no padding. After every batch
    `path` holds all answers so far, rows {"prompt", "answer"}, and a second call asks only for the
    rest. An answer that its length cuts off is kept as "" and makes no row: a student would learn
    that it ends there.
    """
    dtype = choose_dtype("auto", torch.device("cpu"))
    model, tokenizer = load_with_tokenizer(directory, dtype=dtype)
    answers = {row["prompt"]: row["answer"] for _, row in read_rows(path)} if path.exists() else {}
    by_length = {}
    for prompt in (prompt for prompt in asked if prompt not in answers):
        chat = tokenizer.render_chat([{"role": "user", "content": prompt}])
        ids = tokenizer.encode(chat, bos=False)
        by_length.setdefault(len(ids), []).append((prompt, ids))
    batches = [group[i:i + most] for group in by_length.values()
               for i in range(0, len(group), most)]
    for seed, batch in enumerate(tqdm(batches, desc="conversations", unit="batch",
                                      dynamic_ncols=True)):
        tokens = torch.tensor([ids for _, ids in batch])
        new = generate(model, tokens, max_new_tokens=max_new_tokens, temperature=0.7, top_p=0.95,
                       seed=seed)[:, tokens.shape[1]:]
        for (prompt, _), ids in zip(batch, new.tolist()):
            end = next((i for i, t in enumerate(ids) if t in model.config.eos_ids), 0)
            answers[prompt] = tokenizer.decode(ids[:end]).strip()
        write_rows(path, [{"prompt": p, "answer": a} for p, a in answers.items()])
    return [{"messages": [{"role": "user", "content": prompt},
                          {"role": "assistant", "content": answers[prompt]}]}
            for prompt in asked if answers[prompt]]


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def some(kind, documents, characters=KIND_BYTES):
    """Documents of `characters` together, or all, if there are fewer.

    The kind's name is the seed: other kinds, or more of them, change nothing here.
    """
    documents, kept = random.Random(kind).sample(documents, len(documents)), []
    while documents and characters > 0:
        kept.append(documents.pop())
        characters -= len(kept[-1])
    return kept


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the teacher")
    parser.add_argument("--out", type=Path, required=True, help="folder of data/ and packages/")
    parser.add_argument("--conversations", type=int, default=1000,
                        help="prompts that the teacher answers (fewer make no held-out row of "
                        "1024 tokens)")
    run = parser.parse_args(argv)
    text, synsets = read_documents(run.out / "packages")
    rows = {kind: some(kind, found) for (kind, held_out), found in text.items() if not held_out}
    prose = sentences(rows["prose"] or rows["manuals"])    # Python's help, if there are no novels
    rows["recall"] = recall_documents(prose, KIND_BYTES // 2)
    for kind, documents in rows.items():
        if not documents:
            print(f"{kind}: nothing to be had, no file")
            continue
        write_rows(run.out / f"data/{kind}.jsonl", [{"text": document} for document in documents])
        size = sum(map(len, documents)) / 1e6
        print(f"{kind:9} {len(documents):6} rows {size:6.2f} MB", flush=True)
    if run.conversations:
        asked = prompts(synsets[False], prose)[:run.conversations]
        chats = converse(run.teacher, asked, run.out / "conversations.jsonl")
        write_rows(run.out / "data/chat.jsonl", chats)
        print(f"chat      {len(chats):6} rows; {len(asked) - len(chats)} answers were too long")


if __name__ == "__main__":
    main()
