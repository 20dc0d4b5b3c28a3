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
The rows in data/*.jsonl are a sample of the same text; the last 5 % of each file are held out.

Not here: documents packed into one row (each row is one document, cut at its end, which is what
the student's per-document mask shows too), and anything that a real pretraining run would need.

Run:  pip install tokenizers                                     # beside requirements.txt
      python tests/make_teacher.py --out tests/teacher           # about one hour on 2 cores
      python tests/make_teacher.py --out /tmp/teacher --minutes 5
      python tests/make_teacher.py --out tests/teacher --measure # only measure, rewrite README.md
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import string
import sys
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

if importlib.util.find_spec("model") is None:        # started as a script: the root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import ModelConfig, Transformer, save_pretrained

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


def is_held_out(key, percent=5):
    """Whether `key` belongs to the held-out part: a hash decides, the same in every run."""
    return hashlib.sha1(key.encode()).digest()[0] < 256 * percent / 100


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
    """{"code", "prose"} -> (training documents, held-out documents).

    The file decides the split, for code and for its docstrings alike: otherwise a held-out
    docstring would be seen inside the training code.
    """
    from pydoc_data.topics import topics
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "test", "tests", "encodings", "pydoc_data", "idle_test"}
    split = {"code": ([], []), "prose": ([], [])}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if skip & set(relative.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            text = docstrings(source)
        except (SyntaxError, UnicodeDecodeError):          # lib2to3's bad examples
            continue
        part = is_held_out(relative.as_posix())
        split["code"][part].extend(split_text(source))
        split["prose"][part].extend(split_text(text))
    for name, text in sorted(topics.items()):
        split["prose"][is_held_out(name)].extend(split_text(text))
    return split


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
TOKENS_PER_CHARACTER = 0.36            # of prose, with the tokenizer below; only sets lengths


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

    Each round asks for all keys of the table, in a new order; one fixed gap a document.
    """
    kind = rng.choice(("table", "table", "list", "list", "lines"))
    if kind == "lines":
        text = ""
        while len(text) < 1.6 * tokens:
            _, prompt, answer = draw(rng.choice((copying, reversal)), rng, held_out)
            text += f"{prompt}{answer}\n"
        return text
    key, *pairs = draw(table if kind == "table" else letters, rng, held_out)
    payload = len(key) // 2 + 3                            # tokens of one line
    gap = rng.choice((0, 1, 1)) * rng.randint(0, max(0, tokens - 2 * payload - 24))
    text, used = f"{kind}: {key}\n", payload
    while used < tokens:
        between = gap_of_prose(rng, filler, gap)
        if kind == "table":
            order = rng.sample(list(pairs[0]), len(pairs[0]))
            text += between + "find: " + " ".join(f"{k} {pairs[0][k]}" for k in order) + "\n"
        else:
            text += between + f"list: {key}\n"
        used += payload + int(len(between) * TOKENS_PER_CHARACTER)
    return text


def skill_example(skill, rng, filler=(), gap=0, held_out=True):
    """(prompt, answer) of one skill of SKILLS; `gap` tokens of prose before a look-up."""
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


SKILLS = ("add2", "add3", "sub", "mul", "max", "copy", "reverse", "lookup", "repeat")
GAPS = {"lookup": (0, 64, 128, 256, 384), "repeat": (0, 64, 128, 256, 384)}


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
    return tokenizer


def load_tokenizer(directory):
    from tokenizers import Tokenizer
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------

MIXTURE = {"code": 0.25, "prose": 0.15, "math": 0.25, "recall": 0.35}


def rows_of_tokens(texts, tokenizer, length):
    """One document a row: BOS, text, EOS; cut at `length`, padded with EOS. -> (B, length)"""
    eos = CONFIG["eos_token_id"]
    rows = [e.ids[:length] for e in tokenizer.encode_batch(texts)]
    return torch.tensor([row + [eos] * (length - len(row)) for row in rows])


def labels_of(tokens):
    """The next token; of the EOS tokens that pad a row, only the first counts. -> (B, T)"""
    eos = CONFIG["eos_token_id"]
    labels = F.pad(tokens[:, 1:], (0, 1), value=eos)       # (B, T)
    labels = labels.masked_fill(tokens == eos, -100)
    labels[:, -1] = -100
    return labels


def batch_at(step, seed, text, filler, tokenizer, tokens_per_step, length):
    """The batch of a step: a function of its number, so that a resumed run sees the same."""
    rng = random.Random(f"{seed} {step}")
    domains = rng.choices(list(MIXTURE), list(MIXTURE.values()), k=tokens_per_step // length)
    make = {"code": lambda: rng.choice(text["code"]), "prose": lambda: rng.choice(text["prose"]),
            "math": lambda: math_document(rng, length),
            "recall": lambda: recall_document(rng, filler, length)}
    return rows_of_tokens([make[domain]() for domain in domains], tokenizer, length)


def length_at(progress):
    """Curriculum: short documents first, where a look-up is easy to find."""
    return 64 if progress < 0.04 else 128 if progress < 0.12 else 256 if progress < 0.40 else CONTEXT


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


def make_optimizers(model, muon_rate, adam_rate):
    """Muon for the matrices inside the blocks, AdamW for embedding and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.01, momentum=0.95),
                  torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def train(model, text, filler, tokenizer, out, args):
    """Run to --tokens or --minutes, whichever ends first; the schedule follows the nearer end."""
    optimizers = make_optimizers(model, args.muon_rate, args.adam_rate)
    state_file = out / "train_state.pt"
    step, spent_seconds = 0, 0.0
    if args.resume:
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        step, spent_seconds = state["step"], state["seconds"]
    # Compiled once per length of the curriculum; without a C++ compiler pass --no-compile.
    forward = torch.compile(model, dynamic=False) if args.compile else model
    started, saved_at = time.time() - spent_seconds, time.time()
    bar = tqdm(total=args.tokens, initial=step * args.tokens_per_step, unit="tok",
               unit_scale=True, mininterval=10)
    last_report = 0.0
    while True:
        seconds = time.time() - started
        progress = max(step * args.tokens_per_step / args.tokens, seconds / (60 * args.minutes))
        if progress >= 1:
            break
        # ---------------------------------------------------------------------- one step
        tokens = batch_at(step, args.seed, text, filler[0], tokenizer, args.tokens_per_step,
                          length_at(progress))
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(tokens)                       # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels_of(tokens).flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate_at(progress)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        # ------------------------------------------------------------------------------
        bar.update(args.tokens_per_step)
        bar.set_postfix(loss=f"{loss.item():.3f}", T=tokens.shape[1], refresh=False)
        if progress - last_report >= args.report_every:
            last_report = progress
            found = measure(model, tokenizer, text, filler[1], examples=50)
            bar.write(f"{progress:4.0%} {step * args.tokens_per_step / 1e6:6.1f}M tokens  "
                      f"{time.time() - started:5.0f} s  " + brief(found))
        if time.time() - saved_at > 120:
            saved_at = time.time()
            save_teacher(model, out)
            replace_file(state_file, lambda path: torch.save(
                {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                 "step": step, "seconds": saved_at - started}, path))
    bar.close()
    save_teacher(model, out)
    state_file.unlink(missing_ok=True)
    return step * args.tokens_per_step, time.time() - started


def replace_file(path, write):
    """Write beside, then rename: a reader or a kill never meets half a file."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def save_teacher(model, out):
    """The weights in a folder beside, then moved in; config and tokenizer are there already."""
    beside = out / "saving"
    beside.mkdir(exist_ok=True)
    save_pretrained(model, beside)
    os.replace(beside / "model.safetensors", out / "model.safetensors")
    for path in beside.iterdir():
        path.unlink()
    beside.rmdir()


# ------------------------------------------------------------------------------------------------
# Measurement
# ------------------------------------------------------------------------------------------------

@torch.no_grad()
def held_out_loss(model, tokenizer, documents):
    """Nats a token over whole documents, each from its own BOS."""
    total_nats = total_tokens = 0
    for i in range(0, len(documents), 16):
        tokens = rows_of_tokens(documents[i:i + 16], tokenizer, CONTEXT)
        labels = labels_of(tokens)
        total_nats += F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(),
                                      reduction="sum").item()
        total_tokens += (labels != -100).sum().item()
    return total_nats / total_tokens


@torch.no_grad()
def exact_match(model, tokenizer, pairs):
    """Share of (prompt, answer) whose answer is the most likely token at every place.

    That is what greedy generation would write, in one forward pass. Returned with it: tokens from
    the second end of the prompt's last token to its first (for look-ups: the distance).
    """
    right, distance = 0, []
    for i in range(0, len(pairs), 25):
        encoded = [tokenizer.encode(p + a).ids for p, a in pairs[i:i + 25]]
        starts = [len(tokenizer.encode(p).ids) for p, _ in pairs[i:i + 25]]
        tokens = torch.full((len(encoded), max(map(len, encoded))), CONFIG["eos_token_id"])
        for row, ids in enumerate(encoded):
            tokens[row, :len(ids)] = torch.tensor(ids)
        guesses = model(tokens).argmax(-1)                 # (B, T)
        for row, (ids, start) in enumerate(zip(encoded, starts)):
            right += guesses[row, start - 1:len(ids) - 1].tolist() == ids[start:]
            distance.append(start - 1 - ids.index(ids[start - 1]))
    return right / len(pairs), sum(distance) / len(distance)


def measure(model, tokenizer, text, filler, examples=200, seed=1):
    """{name: (figure, distance in tokens or None)} on held-out text and held-out problems."""
    found = {}
    for domain in ("code", "prose"):
        documents = text[f"{domain} held out"][:examples]
        found[f"{domain} loss"] = held_out_loss(model, tokenizer, documents), None
    rng = random.Random(f"measure {seed}")
    for skill in SKILLS:
        for gap in GAPS.get(skill, (None,)):
            pairs = [skill_example(skill, rng, filler, gap or 0) for _ in range(examples)]
            share, distance = exact_match(model, tokenizer, pairs)
            name = skill if gap is None else f"{skill} gap {gap}"
            found[name] = share, None if gap is None else distance
    return found


def brief(found):
    return "  ".join(f"{n} {v:.2f}" for n, (v, _) in found.items())


# ------------------------------------------------------------------------------------------------
# The folder
# ------------------------------------------------------------------------------------------------

def read_jsonl(path):
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def write_data(text, filler, out, seed):
    """data/{code,prose,math,recall}.jsonl, 19 training rows for each held-out one, those last."""
    (out / "data").mkdir(exist_ok=True)
    for domain, rows in {"code": 400, "prose": 400, "math": 900, "recall": 500}.items():
        rng, texts = random.Random(f"data {domain} {seed}"), []
        for part, count in (("", rows - rows // 20), (" held out", rows // 20)):
            held_out = bool(part)
            if domain in ("code", "prose"):
                texts += rng.sample(text[domain + part], count)
            elif domain == "math":
                texts += [math_document(rng, held_out=held_out) for _ in range(count)]
            else:
                texts += [recall_document(rng, filler[held_out], rng.randint(128, CONTEXT), held_out)
                          for _ in range(count)]
        lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
        (out / "data" / f"{domain}.jsonl").write_text(lines, encoding="utf-8")


README = """# The small teacher

Llama-shaped: {parameters:,} parameters, hidden 128, 4 layers, 4 heads (2 for keys and values) of
width 32, byte-level BPE with 1024 ids (digits one by one), context {context}. Trained from scratch
by ../make_teacher.py{trained}. What its four domains are, and what
decides that something is held out, stands at the top of that file.

    python tests/make_teacher.py --out tests/teacher              # all of it again
    python tests/make_teacher.py --out tests/teacher --measure    # the figures below again

Held-out text (nats a token over documents of at most {context} tokens):

| domain | loss | documents |
|---|---|---|
{losses}

Held-out problems ({examples} each; right = greedy decoding gives the whole answer):

| skill | prompt and answer | right |
|---|---|---|
{short}

The same at a distance: tokens from where the look-up is asked to where its answer stands, with
prose between (mean over the examples).

| skill | prompt and answer | distance | right |
|---|---|---|---|
{long}

data/*.jsonl is text of the same four kinds, one document a row; the last 5 % of the rows of each
file are held out. code and prose are from CPython's standard library (PSF License Version 2).
"""


def write_readme(found, model, out, trained, examples):
    """README.md from what was measured just now, nothing by hand."""
    rng = random.Random("readme")

    def shown(skill):
        prompt, answer = skill_example(skill, rng, ["Some prose."], 4)
        return "`" + (prompt + "` -> `" + answer.rstrip("\n")).replace("\n", "\\n") + "`"

    rows = {"losses": [], "short": [], "long": []}
    for name, (figure, distance) in found.items():
        if name.endswith(" loss"):
            rows["losses"].append(f"| {name[:-5]} | {figure:.3f} | {examples} |")
        elif distance is None:
            rows["short"].append(f"| {name} | {shown(name)} | {figure:.1%} |")
        else:
            skill = name.split(" gap ")[0]
            rows["long"].append(f"| {skill} | {shown(skill)} | {distance:.0f} | {figure:.1%} |")
    filled = README.format(parameters=sum(p.numel() for p in model.parameters()), context=CONTEXT,
                           trained=trained, examples=examples,
                           **{part: "\n".join(lines) for part, lines in rows.items()})
    (out / "README.md").write_text(filled, encoding="utf-8")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the teacher")
    parser.add_argument("--tokens", type=int, default=80_000_000, help="end after this many tokens")
    parser.add_argument("--minutes", type=float, default=math.inf, help="or after this long")
    parser.add_argument("--tokens-per-step", type=int, default=8192)
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=0.005)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report-every", type=float, default=0.04, help="share of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--no-compile", dest="compile", action="store_false",
                        help="without torch.compile: no C++ compiler needed, half as fast")
    parser.add_argument("--measure", action="store_true", help="no training: measure --out")
    return parser.parse_args()


def main():
    args = parse_arguments()
    torch.manual_seed(args.seed)
    out, examples = args.out, 200
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    text = {}
    for domain, (train_part, held_out_part) in standard_library().items():
        text[domain], text[f"{domain} held out"] = train_part, held_out_part
    filler = sentences(text["prose"]), sentences(text["prose held out"])
    for name, documents in text.items():
        print(f"{name:16} {len(documents):6} documents, {sum(map(len, documents)) / 1e6:5.2f} MB")
    print(f"filler           {len(filler[0]):6} sentences, {len(filler[1])} held out")
    write_data(text, filler, out, args.seed)
    rng = random.Random(args.seed)
    if not args.resume:
        train_tokenizer(rng.sample(text["code"], 2000) + rng.sample(text["prose"], 800)
                        + [recall_document(rng, filler[0]) for _ in range(400)], out)
    tokenizer = load_tokenizer(out)
    model = Transformer(ModelConfig.from_hf(out))
    initialise(model)
    tokens, seconds = train(model, text, filler, tokenizer, out, args)
    found = measure(model, tokenizer, text, filler[1], examples)
    trained = f" on {tokens / 1e6:.0f}M tokens in {seconds / 60:.0f} minutes on a CPU"
    write_readme(found, model, out, trained, examples)
    print(brief(found))


if __name__ == "__main__":
    main()
