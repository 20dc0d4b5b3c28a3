"""
Sequences for tests/bio_teacher/: proteins, DNA and molecules from generators with a seed.

    proteins    a family is an ancestor whose columns are conserved or variable; its members are
                copies with substitutions, insertions and deletions. Nothing but the members seen
                so far says what comes next: this is in-context learning, from up to 450 bytes
                back, where a student with a window of 8 and 4 layers sees 28.
    DNA         background with binding sites on either strand. All motifs share their first four
                bases, and a document uses one of twelve: which one, only earlier sites say, more
                than 28 bases back. Five of six sites lie on the forward strand, as genes prefer
                the leading strand in bacteria, so a strand and its reverse complement differ.
    molecules   Kekule SMILES: head, ring, linker, ring, each with a substituent. A family shares
                rings and linker (the scaffold) and a palette of three substituents a place.

What is held out is decided by a hash of the ancestor, the DNA or the scaffold.
None of this is biology: the generators plant what the pipeline must find again.

Run:  python tests/make_bio.py --out tests/bio_teacher           # data, teacher, and bio_tasks
                                                                 # beside it; 25 minutes
      python tests/make_bio.py --out tests/bio_teacher --measure # only measure, rewrite README.md
"""

import functools
import itertools
import math
import random

import torch
import torch.nn.functional as F

import make_teacher
from make_tasks import choice
from make_teacher import is_held_out, padded, write_figures, write_rows
from model import Tokenizer, load_pretrained, write_json

CONTEXT = 512  # bytes a document, with BOS and EOS


# ------------------------------------------------------------------------------------------------
# Proteins
# ------------------------------------------------------------------------------------------------

AMINO_ACIDS = "ALGVESIKRDTPNQFYMHCW"                  # about as common, in percent, as in nature:
SHARES = (8.3, 9.7, 7.1, 6.9, 6.7, 6.6, 5.9, 5.8, 5.5, 5.5, 5.3, 4.7, 4.1, 3.9, 3.9, 2.9, 2.4, 2.3,
          1.4, 1.1)


def residues(rng, n):
    return rng.choices(AMINO_ACIDS, SHARES, k=n)


def protein_family(rng):
    """(ancestor, endless homologues): columns substitute with a rate of their own; indels."""
    ancestor = residues(rng, rng.randint(36, 46))
    rates = [rng.choice((0.03, 0.03, 0.25)) for _ in ancestor]

    def homologues():
        while True:
            member = []
            for residue, rate in zip(ancestor, rates):
                event = rng.random()
                if event < 0.01:                           # deletion
                    continue
                if event < 0.02:                           # insertion of one or two before it
                    member += residues(rng, rng.randint(1, 2))
                member += residues(rng, 1) if rng.random() < rate else [residue]
            yield "".join(member)

    return "".join(ancestor), homologues()


# ------------------------------------------------------------------------------------------------
# DNA
# ------------------------------------------------------------------------------------------------

COMPLEMENT = str.maketrans("ACGT", "TGCA")
CORE = "TATA"
TAILS = ("GCCGTTAC", "CGATTGCA", "AGGCATCG", "TCCAGGTA", "GTTCACGG", "CATGCGAT",
         "ACTGGACC", "TGACCTGG", "GGATACCT", "CTAGAGTC", "AACCGTGT", "TTGGCACA")


def dna_sites(rng, forward=5 / 6, length=CONTEXT - 2):
    """A document and what it was made of: (bases, site flags "0" or "1" a base, its motif)."""
    motif = CORE + rng.choice(TAILS)
    gc = rng.uniform(0.2, 0.3)                             # of G, and as much of C
    text, sites = "", ""
    while len(text) < length:
        gap = rng.randint(30, 44)
        text += "".join(rng.choices("ACGT", (0.5 - gc, gc, gc, 0.5 - gc), k=gap))
        site = "".join(b if rng.random() > 0.02 else rng.choice("ACGT") for b in motif)
        text += site if rng.random() < forward else site.translate(COMPLEMENT)[::-1]
        sites += "0" * gap + "1" * len(site)
    return text[:length], sites[:length], motif


# ------------------------------------------------------------------------------------------------
# Molecules
# ------------------------------------------------------------------------------------------------

# R is a substituent, % a ring's number. What follows a ring is bound to its last atom.
RINGS = ("C%=CC(R)=CC=C%", "C%=NC(R)=CC=C%", "C%=NC(R)=NC=C%", "C%CCC(R)CC%", "C%CN(R)CCC%",
         "N%CCN(R)CC%", "C%=CSC(R)=C%", "C%=COC(R)=C%", "C%CCN(R)C%", "C%C[C@@H](R)NC%",
         "C%C[C@H](R)OC%", "C%=NN(R)C=C%")
LINKERS = ("", "C", "CC", "N", "C(=O)N", "S(=O)(=O)C", "NC(=O)", "C=C", "C#C", "CS", "C(=O)",
           "C(C)", "CNC")
HEADS = ("C", "CC", "N", "O", "N#C", "FC(F)(F)", "OC(=O)", "CO", "CN(C)", "[O-][N+](=O)", "NC(=O)",
         "CS(=O)(=O)", "CC(C)", "[NH3+]C", "BrC=C")
SUBSTITUENTS = ("C", "CC", "CO", "CCN", "CF", "CCl", "CBr", "C#N", "C(F)(F)F", "C(=O)O", "CN(C)C",
                "C(C)C", "S(C)(=O)=O", "CCO", "C(N)=O", "CI", "CP(=O)(O)O", "CB(O)O", "C[NH3+]",
                "C(=O)[O-]", "CSC", "C=C")


def molecule_family(rng):
    """(scaffold, endless molecules): two rings and a linker; three choices at each other place."""
    numbers = rng.choice((("1", "1"), ("1", "2"), ("2", "1"), ("1", "%10")))
    first, second = (rng.choice(RINGS).replace("%", n) for n in numbers)
    linker = rng.choice(LINKERS)
    if "N1" in second[:2] and linker.endswith(("N", "S")):  # keep to bonds that chemists make
        linker = "C"
    heads, *palettes = rng.sample(HEADS, 3), *(rng.sample(SUBSTITUENTS, 3) for _ in range(3))

    def molecules():
        while True:
            a, b, tail = (rng.choice(palette) for palette in palettes)
            yield (rng.choice(heads) + first.replace("R", a) + linker + second.replace("R", b)
                   + tail)

    return first + linker + second, molecules()


# ------------------------------------------------------------------------------------------------
# Documents
# ------------------------------------------------------------------------------------------------

FAMILIES = {"protein": protein_family, "chemistry": molecule_family}
DOMAINS = ("dna", "protein", "chemistry")


def draw_family(domain, rng, held_out):
    """A family on the wanted side: its endless members."""
    while True:
        key, members = FAMILIES[domain](rng)
        if is_held_out(key) == held_out:
            return members


def family_members(domain, rng, held_out=False):
    """As many members of one family as fit into CONTEXT bytes, each with its newline."""
    members, room = [], CONTEXT - 2
    for member in draw_family(domain, rng, held_out):
        room -= len(member) + 1
        if room < 0:
            return members
        members.append(member)


def dna_document(rng, held_out=False, forward=5 / 6):
    """(bases, site flags, motif) on the wanted side."""
    while True:
        found = dna_sites(rng, forward)
        if is_held_out(found[0]) == held_out:
            return found


# ------------------------------------------------------------------------------------------------
# The teacher: how it is trained stands in make_teacher.py
# ------------------------------------------------------------------------------------------------

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
    "vocab_size": 258, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3,
    "num_key_value_heads": 3, "head_dim": 32, "intermediate_size": 192, "hidden_act": "silu",
    "rope_theta": 1000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
    "bos_token_id": 256, "eos_token_id": 257, "separator_id": ord("\n"),
}
TOKENIZER = {"tokenizer_class": "bytes", "bos_token": "<s>", "eos_token": "</s>"}
MIXTURE = {"dna": 0.2, "protein": 0.45, "chemistry": 0.35}


def document(domain, rng, held_out=False):
    """A document of a domain as text: members with a newline each, or DNA of either strand."""
    if domain in FAMILIES:
        return "".join(m + "\n" for m in family_members(domain, rng, held_out))
    bases = dna_document(rng, held_out)[0]
    return rng.choice((bases, bases.translate(COMPLEMENT)[::-1]))


def batch_at(step, seed, tokenizer, length):
    """The batch of a step, as make_teacher.batch_at; every other document lacks its beginning.

    So do documents that packing has cut: a teacher that always met BOS is lost without it.
    """
    rng = random.Random(f"bio {seed} {step}")
    domains = rng.choices(list(MIXTURE), list(MIXTURE.values()),
                          k=make_teacher.TOKENS_PER_STEP // length)
    documents = [document(domain, rng) for domain in domains]
    rows, eos = [], CONFIG["eos_token_id"]
    for text in documents:
        ids = tokenizer.encode(text) + [eos]
        rows.append(ids[rng.randrange(len(ids) // 2) if rng.random() < 0.5 else 0:])
    return padded(rows, length, eos)


def measure(model, tokenizer, documents):
    """{(name,): figure} on held-out documents: nats a byte, and perplexity by homologue."""
    found = {}
    for domain in DOMAINS:
        rng, total, count, by_member = random.Random(f"measure {domain}"), 0.0, 0, {}
        for _ in range(documents):
            text = document(domain, rng, held_out=True)
            tokens = torch.tensor([tokenizer.encode(text)])
            with torch.no_grad():
                nats = F.cross_entropy(model(tokens)[0, :-1].float(), tokens[0, 1:],
                                       reduction="none").double()
            total, count, start = total + nats.sum().item(), count + len(nats), 0
            for nth, member in enumerate(text.splitlines() if domain in FAMILIES else (), 1):
                s, n = by_member.get(nth, (0.0, 0))
                end = start + len(member)              # without its newline
                by_member[nth] = s + nats[start:end].sum().item(), n + len(member)
                start = end + 1
        found[f"{domain}, nats a byte",] = total / count
        for nth in (1, 2, 4, 8) if by_member else ():
            s, n = by_member[nth]
            found[f"{domain}, perplexity of member {nth}",] = math.exp(s / n)
    return found


ABOUT = """# The small teacher of sequences

Llama-shaped: {parameters:,} parameters, hidden 96, 4 layers, 3 heads of width 32, bytes (258 ids),
context 512, positions restart at every newline. Trained from scratch on {millions:.0f}M tokens in
{minutes:.0f} minutes on 1 CPU core. What its three domains are stands at the top of ../make_bio.py;
data/*.jsonl are documents of them, one a row.

    python tests/make_bio.py --out tests/bio_teacher             # all of it again
    python tests/make_bio.py --out tests/bio_teacher --measure   # only the figures below

"""


def write_data(folder):
    """{dna,protein,chemistry}.jsonl: documents of the training side, about 0.5 MB each."""
    for domain in DOMAINS:
        rng, rows = random.Random(f"data {domain}"), []
        for _ in range(1000):
            if domain in FAMILIES:
                rows.append({"sequences": family_members(domain, rng)})
            else:
                rows.append({"dna": dna_document(rng)[0]})
        write_rows(folder / f"{domain}.jsonl", rows)


# ------------------------------------------------------------------------------------------------
# Task files
# ------------------------------------------------------------------------------------------------

ROWS = 60


def homologue_rows(domain, rng):
    """Eight members of a held-out family; what the eighth costs is scored."""
    while True:
        members = draw_family(domain, rng, True)
        yield {"type": "family", "sequences": [next(members) for _ in range(8)]}


def family_rows(domain, rng):
    """Which of four sequences belongs to the family of the seven before."""
    while True:
        members, *others = (draw_family(domain, rng, True) for _ in range(4))
        context = "".join(next(members) + "\n" for _ in range(7))
        right = next(members) + "\n"
        yield choice(rng, context, right, [next(other) + "\n" for other in others], "acc_norm")


def motif_rows(rng):
    """Which of four motifs goes on after the core: the one whose sites stand earlier."""
    while True:
        text, sites, motif = dna_document(rng, True, forward=1.0)
        last = sites.rindex("01") + 1                      # where the last whole or cut site starts
        others = rng.sample([tail for tail in TAILS if tail != motif[4:]], 3)
        yield choice(rng, text[:last] + CORE, motif[4:], others, "acc")


def strand_rows(rng):
    while True:
        yield {"type": "strand", "dna": dna_document(rng, True)[0][:256]}


def probe_rows(rng):
    """Is a base part of a binding site, on either strand?"""
    while True:
        text, sites, _ = dna_document(rng, True, forward=0.5)
        yield {"type": "probe", "dna": text[:256], "labels": sites[:256]}


def molecule_rows(rng):
    while True:
        members = draw_family("chemistry", rng, True)
        yield {"type": "molecule", "sequences": [next(members) for _ in range(4)],
               "seed": rng.randrange(10 ** 6)}


def write_tasks(folder):
    """Eight task files of ROWS rows each, all of held-out families and documents."""
    makers = {"dna-motif": motif_rows, "dna-strand": strand_rows, "dna-probe": probe_rows,
              "chemistry-valid": molecule_rows}
    for domain in FAMILIES:
        for name, rows in (("homologue", homologue_rows), ("family", family_rows)):
            makers[f"{domain}-{name}"] = functools.partial(rows, domain)
    for task, rows in makers.items():
        found = itertools.islice(rows(random.Random(task)), ROWS)
        write_rows(folder / f"{task}.jsonl",
                   [{"id": f"{task}-{i}", **row} for i, row in enumerate(found)])


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def main():
    args = make_teacher.arguments(__doc__.strip().splitlines()[0], tokens=24_000_000)
    if not args.measure:
        write_json(args.out / "config.json", CONFIG)
        write_json(args.out / "tokenizer_config.json", TOKENIZER)
        write_data(args.out / "data")
        write_tasks(args.out.with_name("bio_tasks"))
        tokenizer = Tokenizer(args.out)
        make_teacher.train(
            args, lambda step, seen: batch_at(step, args.seed, tokenizer,
                                              256 if seen < 3e6 else CONTEXT),
            lambda model: measure(model, tokenizer, 20), ABOUT, bf16=False)
    found = measure(load_pretrained(args.out), Tokenizer(args.out), 200)
    rows = "".join(f"| {name} | {figure:.3f} |\n" for (name,), figure in found.items())
    write_figures("## Measured\n\nOn 200 held-out documents a domain:\n\n| | |\n|---|---|\n" + rows,
                  args.out)


if __name__ == "__main__":
    main()
