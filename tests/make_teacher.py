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
      python tests/make_bio.py --out tests/bio_teacher           # the teacher of sequences
"""

import argparse
import ast
import hashlib
import json
import math
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # the repository's root
from model import (ModelConfig, Tokenizer, Transformer, load_pretrained, save_tensors,
                   write_json)

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


def write_rows(path, rows):
    """Replace a .jsonl file in one step, so that a stop leaves the old one or the new one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tmp.replace(path)


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


def math_document(rng, tokens):
    """Problems of all kinds, one a line, for about `tokens` tokens."""
    lines = []
    while sum(map(len, lines)) < tokens:                   # nearly one token a character
        _, prompt, answer = draw(rng.choice(MATH), rng, False)
        lines.append(f"{prompt}{answer}\n")
    return "".join(lines)


def recall_document(rng, filler, tokens):
    """A table or a list, asked for again and again with prose between; or copy and reverse.

    Each round asks for all keys of the table, in a new order. Many rounds with little prose
    between make a look-up easy to learn, one round at the far end makes it long.
    """
    kind = rng.choice(("table", "table", "list", "list", "lines"))
    if kind == "lines":
        text = ""
        while len(text) < 1.6 * tokens:
            _, prompt, answer = draw(rng.choice((copying, reversal)), rng, False)
            text += f"{prompt}{answer}\n"
        return text
    key, *pairs = draw(table if kind == "table" else letters, rng, False)
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


def document(domain, rng, text, tokens):
    """One document of the training side; tokens: of a generated one, about."""
    if domain == "math":
        return math_document(rng, tokens)
    if domain == "recall":
        return recall_document(rng, text["filler", False], tokens)
    return rng.choice(text[domain, False])


def skill_example(skill, rng, filler, gap):
    """(prompt, answer) of the held-out side; FAR_SKILLS have `gap` tokens of prose between."""
    if skill == "lookup":
        key, pairs = draw(table, rng, True)
        asked = rng.choice(list(pairs))
        return f"table: {key}\n{gap_of_prose(rng, filler, gap)}find: {asked}", f" {pairs[asked]}"
    if skill == "repeat":
        key, = draw(letters, rng, True)
        return f"list: {key}\n{gap_of_prose(rng, filler, gap)}list:", f" {key}\n"
    make = {"add2": lambda r: addition(r, 2), "add3": lambda r: addition(r, 3),
            "sub": subtraction, "mul": multiplication, "max": maximum,
            "copy": copying, "reverse": reversal}[skill]
    _, prompt, answer = draw(make, rng, True)
    return prompt, f"{answer}\n"


SKILLS = ("add2", "add3", "sub", "mul", "max", "copy", "reverse")
FAR_SKILLS, GAPS = ("lookup", "repeat"), (0, 64, 128, 256, 384)
BEYOND = (896, 1920)                   # gaps that make texts of 2 and 4 times CONTEXT


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
    write_json(directory / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS})


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------

TOKENS_PER_STEP = 4096                 # few: a skill appears after so many steps, not tokens
MIXTURE = {"code": 0.25, "prose": 0.15, "math": 0.25, "recall": 0.35}


def padded(rows, length, eos=CONFIG["eos_token_id"]):
    """Lists of ids -> tokens (B, length) and labels, the next token each. One document a row.

    Rows are cut at `length`, short ones end in EOS tokens, of which only the first is a label; the
    others are -100.
    """
    ids = torch.tensor([(row + [eos] * (length + 1))[:length + 1] for row in rows])
    tokens, labels = ids[:, :-1], ids[:, 1:]
    return tokens, labels.masked_fill(tokens == eos, -100)


def batch_at(step, seed, text, tokenizer, length):
    """The batch of a step: a function of its number and the seed."""
    rng = random.Random(f"{seed} {step}")
    domains = rng.choices(list(MIXTURE), list(MIXTURE.values()), k=TOKENS_PER_STEP // length)
    documents = [document(domain, rng, text, length) for domain in domains]
    return padded(map(tokenizer.encode, documents), length)


def length_at(tokens_seen):
    """Curriculum: short documents until look-up has appeared (2M to 5M tokens), then longer."""
    millions = tokens_seen / 1e6
    return 64 if millions < 4 else 128 if millions < 8 else 256 if millions < 16 else CONTEXT


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


def train(args, draw, measure, about, bf16):
    """Train the model that config.json in args.out describes; write its weights and README.md.

    Ends at --tokens or --minutes, whichever comes first; the schedule follows the nearer end.
    draw(step, tokens seen) -> (tokens, labels); measure(model) -> {(name, ...): figure}, now and
    then; about: README.md's text, with places for parameters, millions of tokens and minutes;
    bf16: whether matrix products are in bf16.
    """
    torch.manual_seed(args.seed)
    model = Transformer(ModelConfig.from_hf(args.out))
    initialise(model)
    # Muon for the matrices inside the blocks, AdamW for the embedding and the norms.
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = {0.01: torch.optim.Muon(matrices, weight_decay=0.01, momentum=0.95),
                  0.005: torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)}
    # Compiled once per length of the curriculum: twice as fast, but it needs a C++ compiler.
    forward = torch.compile(model, dynamic=False) if args.compile else model
    step, started, reported_at = 0, time.time(), 0.0
    bar = tqdm(total=args.tokens, unit="tok", unit_scale=True, mininterval=10)
    while True:
        seen, minutes = step * TOKENS_PER_STEP, (time.time() - started) / 60
        progress = max(seen / args.tokens, minutes / args.minutes)
        if progress >= 1:
            break
        # ---------------------------------------------------------------------- one step
        tokens, labels = draw(step, seen)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
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
            bar.write(f"{progress:4.0%}  {seen / 1e6:.1f}M tokens  {minutes:.1f} min  " + "  ".join(
                f"{name} {figure:.2f}" for (name, *_), figure in measure(model).items()))
    bar.close()
    save_tensors(dict(model.named_parameters()), args.out / "model.safetensors")
    (args.out / "README.md").write_text(about.format(
        parameters=sum(p.numel() for p in model.parameters()), millions=seen / 1e6,
        minutes=minutes), encoding="utf-8")


# ------------------------------------------------------------------------------------------------
# Measurement
# ------------------------------------------------------------------------------------------------

@torch.no_grad()
def held_out_loss(model, tokenizer, documents):
    """Nats a token over whole documents, each from its own BOS."""
    total_nats = total_tokens = 0
    for i in range(0, len(documents), 16):
        tokens, labels = padded(map(tokenizer.encode, documents[i:i + 16]), CONTEXT)
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
        rows = [tokenizer.encode(prompt + answer) for prompt, answer in pairs[i:i + 25]]
        tokens, labels = padded(rows, max(CONTEXT, *map(len, rows)))
        guesses = model(tokens).argmax(-1)                 # (B, T)
        for row, (prompt, _) in enumerate(pairs[i:i + 25]):
            last, end = len(tokenizer.encode(prompt)) - 1, len(rows[row]) - 1
            right += torch.equal(guesses[row, last:end], labels[row, last:end])
            distances.append(last - tokens[row].tolist().index(tokens[row, last]))
    return right / len(pairs), sum(distances) / len(distances)


def measure(model, tokenizer, text, examples, gaps=(GAPS,)):
    """{(name, mean distance in tokens or None): figure} on held-out text and problems.

    gaps: groups of them, one after the other, so that a further group changes no problem of those
    before. Training leaves the long texts of BEYOND out: they would take most of the time.
    """
    found = {(domain, None): held_out_loss(model, tokenizer, text[domain, True][:examples])
             for domain in ("code", "prose")}
    rng = random.Random("measure")
    for skill, gap in [(s, 0) for s in SKILLS] + [
            (s, g) for group in gaps for s in FAR_SKILLS for g in group]:
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
    for domain, rows in {"code": 420, "prose": 420, "math": 900, "recall": 600}.items():
        rng = random.Random(f"data {domain} {seed}")
        if domain in ("code", "prose"):
            documents = rng.sample(text[domain, False], rows)
        else:
            documents = [document(domain, rng, text, rng.randint(128, CONTEXT))
                         for _ in range(rows)]
        write_rows(out / f"data/{domain}.jsonl", [{"text": piece} for piece in documents])


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


def write_figures(rows, out):
    """Replace what README.md says from "## Measured" on by `rows`, and print them."""
    readme = out / "README.md"
    about = readme.read_text(encoding="utf-8").split("## Measured")[0] if readme.exists() else ""
    readme.write_text(about + rows, encoding="utf-8")
    print(rows)


def arguments(description, tokens):
    """The options of the scripts that make a teacher, this one and make_bio.py."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder of the teacher")
    parser.add_argument("--tokens", type=int, default=tokens,
                        help="end after this many tokens (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="or after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", action="store_true", help="no training: measure --out")
    parser.add_argument("--no-compile", dest="compile", action="store_false",
                        help="without torch.compile: no C++ compiler needed, half as fast")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def make(text, args):
    """Everything in the folder but the figures in README.md."""
    write_json(args.out / "config.json", CONFIG)
    write_data(text, args.out, args.seed)
    rng = random.Random(args.seed)
    train_tokenizer(rng.sample(text["code", False], 2000) + rng.sample(text["prose", False], 800)
                    + [document("recall", rng, text, CONTEXT) for _ in range(400)], args.out)
    tokenizer = Tokenizer(args.out)
    train(args, lambda step, seen: batch_at(step, args.seed, text, tokenizer, length_at(seen)),
          lambda model: measure(model, tokenizer, text, examples=50), ABOUT, bf16=True)


def main():
    args = arguments(__doc__.strip().splitlines()[0], tokens=41_000_000)
    text = standard_library()
    for (kind, held_out), pieces in text.items():
        print(f"{kind:6} {'held out' if held_out else 'training':8} {len(pieces):6} pieces "
              f"{sum(map(len, pieces)) / 1e6:6.2f} MB")
    if not args.measure:
        make(text, args)
    found = measure(load_pretrained(args.out), Tokenizer(args.out), text, examples=200,
                    gaps=(GAPS, BEYOND))
    rng, rows = random.Random("readme"), FIGURES.format(examples=200)
    for (name, distance), figure in found.items():
        shown, value = "held-out text", f"{figure:.3f}"
        if name in SKILLS + FAR_SKILLS:
            prompt, answer = skill_example(name, rng, ["…"], 0.1)
            shown = f"`{prompt}` -> `{answer.strip()}`".replace("\n", "\\n")
            value = f"{figure:.1%}"
        rows += f"| {name} | {shown} | {distance or ''} | {value} |\n"
    write_figures(rows, args.out)


if __name__ == "__main__":
    main()
