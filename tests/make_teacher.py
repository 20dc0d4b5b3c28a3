"""
Makes the small teacher in tests/teacher/: text, tokenizer, training, measurement, one file.

A bare `python distill.py` needs a teacher on disk with skills worth distilling. This one is
Llama-shaped, 1.1M parameters, and trained from scratch on a CPU on four domains:

    code    the sources of Python's standard library
    prose   its docstrings and the language reference in pydoc_data
    math    one problem a line: addition, subtraction, multiplication, maximum; digit by digit
    recall  look-up in a table and repetition of a list, each far behind in the text; copy, reverse

Key idea: the recall domain is what the recurrent branch of a student has to prove. A student with
a window of 16 tokens and 4 layers sees at most 64 tokens back through stacked windows, so tables
and lists are asked for after up to 400 tokens of prose. Such a skill appears late and suddenly,
and dense supervision makes it appear earlier: a document asks for EVERY key, in several rounds,
and training starts with documents of 64 tokens and ends with 512.

Training draws math and recall afresh for each batch, from seeds. What must not be seen in
training is decided by a hash: of the source file for code and prose, of the problem, table or
list itself for math and recall (`is_held_out`), so no run and no seed can mix the two up.
The rows in data/*.jsonl are a sample of the training side, for distillation.

Not here: documents packed into one row (each row is one document, cut at its end, which is what
the student's per-document mask shows too), and anything that a real pretraining run would need.

Run:  pip install tokenizers                                     # beside requirements.txt
      python tests/make_teacher.py --out tests/teacher           # about one hour on 2 cores
      python tests/make_teacher.py --out /tmp/teacher --minutes 5
      python tests/make_teacher.py --out tests/teacher --measure # only measure, rewrite README.md
      python tests/make_teacher.py --out out/student --measure   # a student's skills
"""

import argparse
import ast
import hashlib
import json
import math
import os
import random
import re
import shutil
import string
import sys
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # the repository's root
import make_bio
from model import ModelConfig, Tokenizer, Transformer, load_pretrained, save_pretrained

CONTEXT = 512
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
    "vocab_size": 1024, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 512, "hidden_act": "silu",
    "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
    "bos_token_id": 1022, "eos_token_id": 1023,
}
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def is_held_out(key):
    """Whether `key` belongs to the held-out 5 %: a hash decides, the same in every run."""
    return hashlib.sha1(key.encode()).digest()[0] < 0.05 * 256


# ------------------------------------------------------------------------------------------------
# Code and prose: what every Python installation has
# ------------------------------------------------------------------------------------------------

def split_text(text, longest=1500):
    """Cut at blank lines into pieces of at most about `longest` characters (about 512 tokens)."""
    pieces, piece = [], ""
    for block in re.split(r"(?<=\n)\n+(?=\S)", text):
        while len(block) > longest:                        # a long class: cut at a line instead
            cut = block.rfind("\n", 0, longest) + 1 or longest
            block, head = block[cut:], block[:cut]
            pieces += [piece, head]
            piece = ""
        if len(piece) + len(block) > longest:
            pieces, piece = pieces + [piece], ""
        piece += ("\n" if piece else "") + block
    return [p.strip("\n") + "\n" for p in pieces + [piece] if len(p) > 200 and p.isascii()]


def docstrings(source):
    """All docstrings of a module, its classes and functions, one under the other."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(n) for n in ast.walk(ast.parse(source)) if isinstance(n, kinds)]
    return "\n\n".join(text + "\n" for text in found if text and len(text) > 60)


def standard_library():
    """{(domain, held_out): documents} for "code" and "prose", and their sentences for "filler".

    The file decides what is held out, for code and for its docstrings alike: otherwise a held-out
    docstring would be seen inside the training code.
    """
    from pydoc_data.topics import topics
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "test", "tests", "encodings", "pydoc_data", "idle_test"}
    text = {(domain, side): [] for domain in ("code", "prose") for side in (False, True)}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if skip & set(relative.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            documentation = docstrings(source)
        except (SyntaxError, UnicodeDecodeError):          # lib2to3's examples of bad files
            continue
        held_out = is_held_out(relative.as_posix())
        text["code", held_out] += split_text(source)
        text["prose", held_out] += split_text(documentation)
    for name, topic in sorted(topics.items()):
        text["prose", is_held_out(name)] += split_text(topic)
    for side in (False, True):
        text["filler", side] = sentences(text["prose", side])
    return text


def sentences(documents):
    """One-line sentences of 40 to 200 characters, the filler between a table and its queries."""
    flat = (" ".join(text.split()) for text in documents)
    found = [s for text in flat for s in re.split(r"(?<=[.:]) ", text)]
    return [s for s in found if 40 <= len(s) <= 200 and s[0].isupper() and s[-1] == "."]


# ------------------------------------------------------------------------------------------------
# Math and recall: generators with a seed. A line is a prompt and an answer.
# ------------------------------------------------------------------------------------------------

# Keys and values are single letters, one token each. "a", "A" and "I" are words of the prose.
KEYS = string.ascii_lowercase[1:]
VALUES = string.ascii_uppercase.replace("A", "").replace("I", "")


def draw(make, rng, held_out):
    """Draw from `make` until the first item of what it returns is on the wanted side."""
    while True:
        result = make(rng)
        if is_held_out(result[0]) == held_out:
            return result


def addition(rng, digits=None):
    low, high = 10 ** ((digits or 1) - 1), 10 ** (digits or rng.choice((1, 2, 2, 3))) - 1
    a, b = rng.randint(low, high), rng.randint(low, high)
    return f"{min(a, b)}+{max(a, b)}", f"{a}+{b}=", f"{a + b}"


def subtraction(rng):
    high = rng.choice((9, 99, 99, 999))
    b, a = sorted((rng.randint(0, high), rng.randint(0, high)))
    return f"{a}-{b}", f"{a}-{b}=", f"{a - b}"


def multiplication(rng):
    a, b = rng.randint(2, 9), rng.choice((rng.randint(2, 9), rng.randint(10, 99)))
    a, b = rng.sample((a, b), 2)
    return f"{min(a, b)}*{max(a, b)}", f"{a}*{b}=", f"{a * b}"


def maximum(rng):
    high = rng.choice((9, 99, 999))
    a, b = rng.randint(0, high), rng.randint(0, high)
    return f"max {min(a, b)} {max(a, b)}", f"max({a},{b})=", f"{max(a, b)}"


def copying(rng):
    word = " ".join(rng.choices(KEYS, k=rng.randint(3, 10)))
    return word, f"copy: {word} =", f" {word}"


def reversal(rng):
    word = " ".join(rng.choices(KEYS, k=rng.randint(3, 8)))
    return word, f"reverse: {word} =", f" {word[::-1]}"


def table(rng):
    keys = rng.sample(KEYS, rng.randint(4, 12))
    pairs = dict(zip(keys, rng.choices(VALUES, k=len(keys))))
    return " ".join(f"{k} {v}" for k, v in pairs.items()), pairs


def letters(rng):
    """Distinct letters, so that the one before decides the next."""
    return (" ".join(rng.sample(KEYS + VALUES, rng.randint(8, 24))),)


MATH = (addition, subtraction, multiplication, maximum)
TOKENS_PER_CHARACTER = 0.37            # of prose, with the tokenizer below; only sets lengths


def gap_of_prose(rng, filler, tokens):
    """Sentences of about `tokens` tokens together on one line, or nothing."""
    text = ""
    while len(text) * TOKENS_PER_CHARACTER < tokens:
        text += rng.choice(filler) + " "
    return text.strip() + "\n" if text else ""


def math_document(rng, tokens=CONTEXT, held_out=False):
    """Problems of all kinds, one a line, for about `tokens` tokens."""
    lines = []
    while sum(map(len, lines)) < tokens:                   # nearly one token a character
        _, prompt, answer = draw(rng.choice(MATH), rng, held_out)
        lines.append(f"{prompt}{answer}\n")
    return "".join(lines)


def recall_document(rng, filler, tokens=CONTEXT, held_out=False):
    """A table or a list, asked for again and again with prose between; or copy and reverse.

    Each round asks for all keys of the table, in a new order. Many rounds with little prose
    between make a look-up easy to learn, one round at the far end makes it long.
    """
    kind = rng.choice(("table", "table", "list", "list", "lines"))
    if kind == "lines":
        text = ""
        while len(text) < 1.6 * tokens:
            _, prompt, answer = draw(rng.choice((copying, reversal)), rng, held_out)
            text += f"{prompt}{answer}\n"
        return text
    key, *pairs = draw(table if kind == "table" else letters, rng, held_out)
    payload = len(key) // 2 + 5                            # tokens of one line
    rounds = min(rng.choice((1, 1, 2, 3, 4, 8, 99)), max(1, tokens // payload - 1))
    gap = (tokens - payload) // rounds - payload - 16      # the last sentence runs over by 16
    text = f"{kind}: {key}\n"
    for _ in range(rounds):
        text += gap_of_prose(rng, filler, gap)
        if kind == "table":
            order = rng.sample(list(pairs[0]), len(pairs[0]))
            text += "find: " + " ".join(f"{k} {pairs[0][k]}" for k in order) + "\n"
        else:
            text += f"list: {key}\n"
    return text


def skill_example(skill, rng, filler=(), gap=0, held_out=True):
    """(prompt, answer) of one skill; for FAR_SKILLS with `gap` tokens of prose between."""
    if skill == "lookup":
        key, pairs = draw(table, rng, held_out)
        asked = rng.choice(list(pairs))
        return f"table: {key}\n{gap_of_prose(rng, filler, gap)}find: {asked}", f" {pairs[asked]}"
    if skill == "repeat":
        key, = draw(letters, rng, held_out)
        return f"list: {key}\n{gap_of_prose(rng, filler, gap)}list:", f" {key}\n"
    make = {"add2": lambda r: addition(r, 2), "add3": lambda r: addition(r, 3),
            "sub": subtraction, "mul": multiplication, "max": maximum,
            "copy": copying, "reverse": reversal}[skill]
    _, prompt, answer = draw(make, rng, held_out)
    return prompt, f"{answer}\n"


SKILLS = ("add2", "add3", "sub", "mul", "max", "copy", "reverse")
FAR_SKILLS, GAPS = ("lookup", "repeat"), (0, 64, 128, 256, 384)


# ------------------------------------------------------------------------------------------------
# Tokenizer: byte-level BPE, single digits, the two specials last
# ------------------------------------------------------------------------------------------------

def train_tokenizer(documents, directory):
    """Write tokenizer.json; ids are bytes, then merges in order of rank, then BOS and EOS."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    # Qwen's pattern: Llama 3's with digits one by one, so that arithmetic is per digit.
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=CONFIG["vocab_size"] - 2, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.add_special_tokens([BOS, EOS])
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)])
    assert (bos, tokenizer.token_to_id(EOS)) == (CONFIG["bos_token_id"], CONFIG["eos_token_id"])
    for letter in KEYS + VALUES:
        assert len(tokenizer.encode(f" {letter}", add_special_tokens=False).ids) == 1, letter
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    (directory / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------

TOKENS_PER_STEP = 4096                 # few: a skill appears after so many steps, not tokens
MIXTURE = {"code": 0.25, "prose": 0.15, "math": 0.25, "recall": 0.35}


def rows_of_tokens(texts, tokenizer, length):
    """One document a row: BOS, text, EOS; cut at `length`, padded with EOS.

    Returns tokens (B, length) and labels, the next token each; of the EOS tokens that pad a row
    only the first is a label, the others are -100.
    """
    eos = CONFIG["eos_token_id"]
    tokens = torch.full((len(texts), length + 1), eos)
    for row, text in zip(tokens, texts):
        ids = tokenizer.encode(text)[:length + 1]
        row[:len(ids)] = torch.tensor(ids)
    tokens, labels = tokens[:, :-1], tokens[:, 1:]
    return tokens, labels.masked_fill(tokens == eos, -100)


def batch_at(step, seed, text, tokenizer, length):
    """The batch of a step: a function of its number, so that a resumed run sees the same."""
    rng = random.Random(f"{seed} {step}")
    domains = rng.choices(list(MIXTURE), list(MIXTURE.values()), k=TOKENS_PER_STEP // length)
    documents = []
    for domain in domains:
        if domain == "math":
            documents.append(math_document(rng, length))
        elif domain == "recall":
            documents.append(recall_document(rng, text["filler", False], length))
        else:
            documents.append(rng.choice(text[domain, False]))
    return rows_of_tokens(documents, tokenizer, length)


def length_at(tokens_seen):
    """Curriculum: short documents until look-up has appeared (2M to 5M tokens), then longer."""
    millions = tokens_seen / 1e6
    return 64 if millions < 4 else 128 if millions < 8 else 256 if millions < 16 else CONTEXT


def bio_batch_at(step, seed, tokenizer, length):
    """`batch_at` for the teacher of make_bio.py: every other document lacks its beginning.

    So do documents that packing has cut: a teacher that always met BOS is lost without it.
    """
    rng = random.Random(f"bio {seed} {step}")
    domains = rng.choices(list(make_bio.MIXTURE), list(make_bio.MIXTURE.values()),
                          k=TOKENS_PER_STEP // length)
    documents = [make_bio.document(domain, rng, is_held_out) for domain in domains]
    rows, eos = [], make_bio.CONFIG["eos_token_id"]
    for text in documents:
        ids = tokenizer.encode(text) + [eos]
        cut = rng.randrange(len(ids) // 2) if rng.random() < 0.5 else 0
        rows.append(ids[cut:cut + length + 1] + [eos] * (length + 1 - len(ids) + cut))
    tokens, labels = torch.tensor(rows)[:, :-1], torch.tensor(rows)[:, 1:]
    return tokens, labels.masked_fill(tokens == eos, -100)


def rate_at(progress):
    """Relative learning rate: warm-up, constant, then linear to zero over the last half."""
    return min(1.0, progress / 0.01, (1.0 - progress) / 0.5)


def initialise(model):
    """Projections that write to the residual stream start at zero: every block starts as the
    identity, which lets Muon use a high rate from the first step."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(weight)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(weight)
        else:
            torch.nn.init.normal_(weight, std=0.02 if "embed" in name else weight.shape[1] ** -0.5)


def train(model, draw, measure, out, args):
    """Run to --tokens or --minutes, whichever ends first; the schedule follows the nearer end.

    draw(step, tokens seen) -> (tokens, labels); measure() -> {name: figure}, now and then.
    Returns (tokens, minutes), those of an earlier part that was resumed included.
    """
    # Muon for the matrices inside the blocks, AdamW for the embedding and the norms.
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = {0.01: torch.optim.Muon(matrices, weight_decay=0.01, momentum=0.95),
                  0.005: torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)}
    step, spent_seconds = 0, 0.0
    if args.resume:
        state = torch.load(out / "train_state.pt")
        step, spent_seconds = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers.values(), state["optimizers"]):
            optimizer.load_state_dict(saved)
    # Compiled once per length of the curriculum: twice as fast, but it needs a C++ compiler.
    forward = torch.compile(model, dynamic=False) if args.compile else model
    started, saved_at, reported_at = time.time() - spent_seconds, time.time(), 0.0
    bar = tqdm(total=args.tokens, initial=step * TOKENS_PER_STEP, unit="tok", unit_scale=True,
               mininterval=10)
    while True:
        seen, seconds = step * TOKENS_PER_STEP, time.time() - started
        progress = max(seen / args.tokens, seconds / (60 * args.minutes))
        if progress >= 1:
            break
        # ---------------------------------------------------------------------- one step
        tokens, labels = draw(step, seen)
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.bio):
            logits = forward(tokens)                       # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for rate, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_at(progress)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        # ------------------------------------------------------------------------------
        bar.update(TOKENS_PER_STEP)
        bar.set_postfix(loss=f"{loss.item():.3f}", T=tokens.shape[1], refresh=False)
        if progress - reported_at > 0.04:
            reported_at = progress
            bar.write(f"{progress:4.0%}  {seen / 1e6:.1f}M tokens  {seconds:.0f} s  " + "  ".join(
                f"{name} {figure:.2f}" for (name, *_), figure in measure().items()))
        if time.time() - saved_at > 120:
            saved_at = time.time()
            save(model, out, {"step": step, "seconds": saved_at - started,
                              "model": model.state_dict(),
                              "optimizers": [o.state_dict() for o in optimizers.values()]})
    bar.close()
    save(model, out)
    (out / "train_state.pt").unlink(missing_ok=True)
    return seen, seconds / 60


def save(model, out, state=None):
    """Write beside, then rename: neither a reader nor a kill ever meets half a file."""
    beside = out / "saving"
    shutil.rmtree(beside, ignore_errors=True)
    save_pretrained(model, beside)                         # config and tokenizer are in `out`
    os.replace(beside / "model.safetensors", out / "model.safetensors")
    if state:
        torch.save(state, beside / "train_state.pt")
        os.replace(beside / "train_state.pt", out / "train_state.pt")
    shutil.rmtree(beside)


# ------------------------------------------------------------------------------------------------
# Measurement
# ------------------------------------------------------------------------------------------------

@torch.no_grad()
def held_out_loss(model, tokenizer, documents):
    """Nats a token over whole documents, each from its own BOS."""
    total_nats = total_tokens = 0
    for i in range(0, len(documents), 16):
        tokens, labels = rows_of_tokens(documents[i:i + 16], tokenizer, CONTEXT)
        total_nats += F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(),
                                      reduction="sum").item()
        total_tokens += (labels != -100).sum().item()
    return total_nats / total_tokens


@torch.no_grad()
def exact_match(model, tokenizer, pairs):
    """Share of (prompt, answer) whose answer is the most likely token at every place.

    That is what greedy generation would write, in one forward pass. Returned with it: the mean
    distance from a prompt's last token back to its first occurrence (for FAR_SKILLS, the source).
    """
    right, distances = 0, []
    for i in range(0, len(pairs), 25):
        texts = [prompt + answer for prompt, answer in pairs[i:i + 25]]
        tokens, labels = rows_of_tokens(texts, tokenizer, CONTEXT)
        guesses = model(tokens).argmax(-1)                 # (B, T)
        for row, (prompt, answer) in enumerate(pairs[i:i + 25]):
            last = len(tokenizer.encode(prompt)) - 1
            end = len(tokenizer.encode(prompt + answer)) - 1
            right += torch.equal(guesses[row, last:end], labels[row, last:end])
            distances.append(last - tokens[row].tolist().index(tokens[row, last]))
    return right / len(pairs), sum(distances) / len(distances)


def measure(model, tokenizer, text, examples):
    """{(name, mean distance in tokens or None): figure} on held-out text and problems."""
    found = {(domain, None): held_out_loss(model, tokenizer, text[domain, True][:examples])
             for domain in ("code", "prose")}
    rng = random.Random("measure")
    for skill, gap in [(s, 0) for s in SKILLS] + [(s, g) for s in FAR_SKILLS for g in GAPS]:
        pairs = [skill_example(skill, rng, text["filler", True], gap) for _ in range(examples)]
        share, distance = exact_match(model, tokenizer, pairs)
        found[skill, round(distance) if skill in FAR_SKILLS else None] = share
    return found


# ------------------------------------------------------------------------------------------------
# The folder
# ------------------------------------------------------------------------------------------------

def write_data(text, out, seed):
    """data/{code,prose,math,recall}.jsonl: rows {"text"} of about 500 KB a domain.

    Of the training side only: what is held out here stays unseen by a student trained on these.
    """
    (out / "data").mkdir(exist_ok=True)
    for domain, rows in {"code": 420, "prose": 420, "math": 900, "recall": 600}.items():
        rng = random.Random(f"data {domain} {seed}")
        if domain == "math":
            documents = [math_document(rng, rng.randint(128, CONTEXT)) for _ in range(rows)]
        elif domain == "recall":
            documents = [recall_document(rng, text["filler", False], rng.randint(128, CONTEXT))
                         for _ in range(rows)]
        else:
            documents = rng.sample(text[domain, False], rows)
        lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
        (out / "data" / f"{domain}.jsonl").write_text(lines, encoding="utf-8")


ABOUT = """# The small teacher

Llama-shaped: {parameters:,} parameters, hidden 128, 4 layers, 4 heads (2 for keys and values) of
width 32, byte-level BPE with 1024 ids (digits one by one), context 512. Trained from scratch on
{millions:.0f}M tokens in {minutes:.0f} minutes on 2 CPU cores. What its four domains are, and
what decides that something is held out, stands at the top of ../make_teacher.py.

data/*.jsonl is text of the same four kinds, one document a row, nothing of it held out from the
teacher. code and prose are from CPython's standard library (PSF License Version 2).

    python tests/make_teacher.py --out tests/teacher              # all of it again
    python tests/make_teacher.py --out tests/teacher --measure    # only the figures below

"""

FIGURES = """## Measured

Held-out text: nats a token. Held-out problems, {examples} each: the share that greedy decoding
answers wholly right. Distance: from where an answer is asked for back to where it stands, with
prose between, in tokens (mean).

| skill | prompt and answer | distance | figure |
|---|---|---|---|
"""


def write_figures(found, readme, examples):
    """Replace README.md from "## Measured" on by what was measured just now."""
    rng, rows = random.Random("readme"), FIGURES.format(examples=examples)
    for (name, distance), figure in found.items():
        shown, value = "held-out text", f"{figure:.3f}"
        if name in SKILLS + FAR_SKILLS:
            prompt, answer = skill_example(name, rng, ["…"], 0.1)
            shown = f"`{prompt}` -> `{answer.strip()}`".replace("\n", "\\n")
            value = f"{figure:.1%}"
        rows += f"| {name} | {shown} | {distance or ''} | {value} |\n"
    about = readme.read_text(encoding="utf-8").split("## Measured")[0] if readme.exists() else ""
    readme.write_text(about + rows, encoding="utf-8")
    print(rows)


def write_bio_figures(found, readme):
    """The same for the teacher of make_bio.py: a figure a line."""
    about = readme.read_text(encoding="utf-8").split("## Measured")[0] if readme.exists() else ""
    rows = "".join(f"| {name} | {figure:.3f} |\n" for (name,), figure in found.items())
    readme.write_text(about + "## Measured\n\nOn 200 held-out documents a domain:\n\n"
                      f"| | |\n|---|---|\n{rows}", encoding="utf-8")
    print(rows)


def make(text, out, args):
    """Everything in the folder but the figures in README.md. Returns the model."""
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    write_data(text, out, args.seed)
    if not args.resume:
        rng = random.Random(args.seed)
        train_tokenizer(rng.sample(text["code", False], 2000)
                        + rng.sample(text["prose", False], 800)
                        + [recall_document(rng, text["filler", False]) for _ in range(400)], out)
    torch.manual_seed(args.seed)
    model = Transformer(ModelConfig.from_hf(out))
    model.source = out                                     # whose config.json it is saved with
    initialise(model)
    tokenizer = Tokenizer(out)
    tokens, minutes = train(
        model, lambda step, seen: batch_at(step, args.seed, text, tokenizer, length_at(seen)),
        lambda: measure(model, tokenizer, text, examples=50), out, args)
    (out / "README.md").write_text(ABOUT.format(
        parameters=sum(p.numel() for p in model.parameters()), millions=tokens / 1e6,
        minutes=minutes), encoding="utf-8")
    return model


BIO_ABOUT = """# The small teacher of sequences

Llama-shaped: {parameters:,} parameters, hidden 96, 4 layers, 3 heads of width 32, bytes (258 ids),
context 512, positions restart at every newline. Trained from scratch on {millions:.0f}M tokens in
{minutes:.0f} minutes on 1 CPU core. What its three domains are stands at the top of ../make_bio.py;
data/*.jsonl are documents of them, one a row.

    python tests/make_teacher.py --bio --out tests/bio_teacher             # all of it again
    python tests/make_teacher.py --bio --out tests/bio_teacher --measure   # only the figures below

"""


def make_bio_teacher(out, args):
    """The folder of make_bio.py's teacher but for the figures in README.md. Returns the model."""
    for name, value in (("config", make_bio.CONFIG), ("tokenizer_config", make_bio.TOKENIZER)):
        (out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    make_bio.write_data(out / "data", is_held_out)
    torch.manual_seed(args.seed)
    model = Transformer(ModelConfig.from_hf(out))
    model.source, tokenizer = out, Tokenizer(out)
    initialise(model)
    tokens, minutes = train(
        model, lambda step, seen: bio_batch_at(step, args.seed, tokenizer,
                                               256 if seen < 3e6 else make_bio.CONTEXT),
        lambda: make_bio.measure(model, tokenizer, is_held_out, 20), out, args)
    (out / "README.md").write_text(BIO_ABOUT.format(
        parameters=sum(p.numel() for p in model.parameters()), millions=tokens / 1e6,
        minutes=minutes), encoding="utf-8")
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the teacher")
    parser.add_argument("--tokens", type=int, help="end after this many tokens (default: 41 "
                        "million, with --bio 24)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="or after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--bio", action="store_true", help="the teacher of sequences instead "
                        "(make_bio.py)")
    parser.add_argument("--measure", action="store_true", help="no training: measure --out")
    parser.add_argument("--no-compile", dest="compile", action="store_false",
                        help="without torch.compile: no C++ compiler needed, half as fast")
    args = parser.parse_args()
    args.tokens = args.tokens or (24_000_000 if args.bio else 41_000_000)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.bio:
        model = load_pretrained(args.out) if args.measure else make_bio_teacher(args.out, args)
        found = make_bio.measure(model, Tokenizer(args.out), is_held_out, 200)
        write_bio_figures(found, args.out / "README.md")
        return
    text = standard_library()
    for (kind, held_out), pieces in text.items():
        print(f"{kind:6} {'held out' if held_out else 'training':8} {len(pieces):6} pieces "
              f"{sum(map(len, pieces)) / 1e6:6.2f} MB")
    model = load_pretrained(args.out) if args.measure else make(text, args.out, args)
    found = measure(model, Tokenizer(args.out), text, examples=200)
    write_figures(found, args.out / "README.md", examples=200)


if __name__ == "__main__":
    main()
