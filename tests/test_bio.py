"""Sequences: tokenizers, positions of families, both strands of DNA, molecules, the bio teacher."""

import argparse
import itertools
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import make_bio
from distill import (Mixture, Source, alignment_losses, collate, held_out_hashes, learning_rate,
                     make_optimizer, parse_row, plan_students, select_trainable, tokenise)
import evaluate
from evaluate import (Scorer, base_embeddings, canonical_smiles, evaluate_rows, family_nats,
                      molecule_shares, ridge_probe, sample_sequences, strand_scores)
from model import (Cache, ModelConfig, Tokenizer, Transformer, generate, load_pretrained,
                   reverse_complement, save_pretrained, student_from_teacher)

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "tests/bio_teacher"
NEWLINE = ord("\n")


def bio_folder(folder, **changes):
    """A folder with the bio teacher's config and tokenizer, and no weights."""
    folder.mkdir()
    config = {**make_bio.CONFIG, "hidden_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    (folder / "tokenizer_config.json").write_text(json.dumps(make_bio.TOKENIZER))
    return folder


def random_model(folder, mixer=None, seed=0):
    """A random teacher, or with `mixer` its student, with windows of 4 and 2 sinks."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig.from_hf(folder))
    model.source = folder
    random_ = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.normal_(0, 1.5 / p.shape[-1] ** 0.5, generator=random_)
    return student_from_teacher(model, window=4, sinks=2, mixer=mixer) if mixer else model


@pytest.fixture
def folder(tmp_path):
    return bio_folder(tmp_path / "bio")


def family_tokens(lengths=(9, 12, 7, 10), batch=2, seed=0):
    """(batch, 1 + sum + 4) ids: BOS, then members of letters, a newline behind each."""
    rng = np.random.default_rng(seed)
    rows = [[256] + sum((rng.integers(65, 90, n).tolist() + [NEWLINE] for n in lengths), [])
            for _ in range(batch)]
    return torch.tensor(rows)


# ------------------------------------------------------------------ tokenizers


def write_tokenizer(folder, kind, tokens=None):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    if tokens:
        (folder / "vocab.txt").write_text("".join(token + "\n" for token in tokens))
    return Tokenizer(folder)


def generator_vocabulary(k=6):
    """GENERator's vocab.txt: 32 marks, then all k-mers in this order (DNAKmerTokenizer, hub)."""
    marks = ["<oov>", "<s>", "</s>", "<pad>", "<mask>"] + [f"<m{i}>" for i in range(27)]
    return marks + ["".join(kmer) for kmer in itertools.product("ATCG", repeat=k)]


def test_bytes_are_their_own_ids_and_come_back(tmp_path):
    tokenizer = write_tokenizer(tmp_path, "bytes")
    text = "MKV\nACGT C1=CC é 蛋白 \x00 <s> </s>"
    ids = tokenizer.encode(text, specials=False)
    assert ids == [256, *text.encode()]
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.encode("A</s>", bos=False) == [65, 257]
    assert tokenizer.vocab_size == 258


def test_a_generator_folder_gives_its_own_ids(tmp_path):
    vocabulary = generator_vocabulary()
    tokenizer = write_tokenizer(tmp_path, "DNAKmerTokenizer", vocabulary)
    rng = random.Random(0)
    dna = "".join(rng.choices("ACGT", k=6 * 50))
    expected = [vocabulary.index(dna[i:i + 6]) for i in range(0, len(dna), 6)]
    assert tokenizer.encode(dna) == [1, *expected]
    assert tokenizer.encode(f"<m3>{dna}", bos=False) == [8, *expected]
    assert tokenizer.decode(expected) == dna


@pytest.mark.parametrize("bad, words", [("ACGTACG", "'G' (character 6"), ("ACGTNACGTAC", "'A'"),
                                        ("acgtac", "'a' (character 0"), ("ACGTAC\n", r"'\n'")])
def test_kmers_refuse_what_they_have_no_token_for(tmp_path, bad, words):
    tokenizer = write_tokenizer(tmp_path, "kmer", generator_vocabulary())
    with pytest.raises(ValueError) as error:
        tokenizer.encode(bad)
    assert words in str(error.value) and "vocab.txt" in str(error.value)


def test_single_letters_take_the_remainder_if_they_are_tokens(tmp_path):
    vocabulary = [*generator_vocabulary(3), *"ACGTN"]
    tokenizer = write_tokenizer(tmp_path, "kmer", vocabulary)
    ids = tokenizer.encode("ACGNTTTCA", bos=False)
    assert [vocabulary[i] for i in ids] == ["ACG", "N", "TTT", "C", "A"]


def test_smiles_are_cut_at_atoms(tmp_path):
    atoms = ["<s>", "</s>", "<sep>", "C", "N", "O", "Cl", "Br", "[C@@H]", "[NH3+]", "=", "#", "(",
             ")", "1", "%10"]
    tokenizer = write_tokenizer(tmp_path, "smiles", atoms)
    text = "BrC%10C[C@@H](Cl)NC%10C#N"
    pieces = ["Br", "C", "%10", "C", "[C@@H]", "(", "Cl", ")", "N", "C", "%10", "C", "#", "N"]
    assert [atoms[i] for i in tokenizer.encode(text, bos=False)] == pieces
    assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text
    for bad in ("C[nH]", "CB", "C C", "C[N", "c1"):
        with pytest.raises(ValueError, match="has no token"):
            tokenizer.encode(bad)


def test_marks_may_look_like_atoms(tmp_path):
    tokenizer = write_tokenizer(tmp_path, "smiles", ["[bos]", "[eos]", "C", "[nH]", "c"])
    assert tokenizer.bos_id is None  # the class's default marks are not in this list
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "smiles", "bos_token": {"content": "[bos]"}, "eos_token": "[eos]"}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("Cc[nH]") == [0, 2, 4, 3]
    assert tokenizer.encode("[eos]", bos=False) == [1]
    with pytest.raises(ValueError, match="has no token"):
        tokenizer.encode("C[eos]", specials=False)  # text of strangers


def test_a_student_keeps_the_tokenizer_of_its_teacher(tmp_path):
    folder = bio_folder(tmp_path / "dna", vocab_size=300)
    write_tokenizer(folder, "kmer", generator_vocabulary(3))
    save_pretrained(random_model(folder, "hybrid"), tmp_path / "student")
    student = load_pretrained(tmp_path / "student")
    assert student.config.separator_id == NEWLINE
    assert Tokenizer(tmp_path / "student").encode("ACG") == Tokenizer(folder).encode("ACG")
    (folder / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match="vocab.txt is missing"):
        Tokenizer(folder)


# ------------------------------------------------------------------ positions


def test_given_positions_equal_transformers(folder):
    transformers = pytest.importorskip("transformers")
    model, tokens = random_model(folder), family_tokens()
    save_pretrained(model, folder.parent / "saved")
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder.parent / "saved").eval()
    positions = torch.randint(0, 200, tokens.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = hf(tokens, position_ids=positions).logits
        assert (model(tokens, positions=positions) - expected).abs().max() < 1e-4
        plain = hf(tokens, position_ids=torch.arange(tokens.shape[1])[None]).logits
    assert (plain - expected).abs().max() > 0.1


def test_positions_restart_at_separators_and_documents(folder):
    model = random_model(folder)
    tokens = torch.tensor([[256, 65, 66, NEWLINE, 67, NEWLINE, 68, 256, 69, NEWLINE, 70]])
    documents = torch.tensor([[0] * 7 + [1] * 4])
    assert model.positions(tokens).tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 1]]
    assert model.positions(tokens, document_ids=documents).tolist() == [
        [0, 1, 2, 0, 1, 0, 1, 0, 1, 0, 1]]
    explicit = model(tokens, positions=model.positions(tokens))
    assert torch.equal(model(tokens), explicit)
    with pytest.raises(ValueError, match="positions .* must be"):
        model(tokens, positions=torch.arange(3)[None])


def test_without_a_separator_positions_are_as_ever(tmp_path):
    model = random_model(bio_folder(tmp_path / "plain", separator_id=None))
    tokens = family_tokens()
    assert torch.equal(model.positions(tokens), torch.arange(tokens.shape[1])[None])
    with pytest.raises(ValueError, match="separator_id"):
        ModelConfig.from_hf(bio_folder(tmp_path / "bad", separator_id="\n"))
    with pytest.raises(ValueError, match="separator_id 70000 is no token id below vocab_size"):
        ModelConfig.from_hf(bio_folder(tmp_path / "far", separator_id=70000))


@torch.no_grad()
def test_memory_lives_on_where_positions_restart(folder):
    model, tokens = random_model(folder, "hybrid"), family_tokens(batch=1)
    edited = tokens.clone()
    edited[0, 3] = 90  # in the first member; the fourth is beyond 2 windows of 4
    changed = (model(tokens) - model(edited)).abs().amax(-1)[0]
    assert changed[:3].max() == 0 and changed[-8:].min() > 1e-3
    swa = random_model(folder, "swa")
    changed = (swa(tokens) - swa(edited)).abs().amax(-1)[0]
    assert changed[-8:].max() == 0
    documents = torch.zeros_like(tokens)
    documents[0, 20:] = 1  # packed: neither positions nor memory pass a document's end
    changed = (model(tokens, document_ids=documents) - model(edited, document_ids=documents))
    assert changed[0, 20:].abs().max() == 0


@pytest.mark.parametrize("mixer", [None, "hybrid", "swa"])
@torch.no_grad()
def test_cached_pieces_restart_where_the_full_forward_does(folder, mixer):
    model, tokens = random_model(folder, mixer), family_tokens((9, 12, 7, 10))
    tokens[1] = family_tokens((4, 20, 10, 4), batch=1, seed=1)[0]  # rows restart at other places
    expected, cache, found = model(tokens), Cache(model, 2, tokens.shape[1]), []
    for piece in tokens.split([10, 1, 1, 12, 1, 1, *[1] * (tokens.shape[1] - 26)], dim=1):
        found.append(model(piece, cache=cache))
    assert (torch.cat(found, 1) - expected).abs().max() < 1e-4
    cache = Cache(model, 2, tokens.shape[1])  # given positions are used as they are
    given = torch.arange(100, 100 + tokens.shape[1])[None]
    found = [model(piece, cache=cache, positions=p) for piece, p in zip(
        tokens.split(7, dim=1), given.split(7, dim=1))]
    assert (torch.cat(found, 1) - model(tokens, positions=given)).abs().max() < 1e-4


@torch.no_grad()
def test_generation_restarts_behind_a_separator_that_it_writes(folder):
    model, prompt = random_model(folder, "hybrid"), family_tokens((3,), batch=1)
    model.model["embed_tokens"].weight[NEWLINE] *= 3  # so that separators are likely
    tokens = generate(model, prompt, max_new_tokens=40, temperature=1.0, seed=0, stop=())
    assert (tokens[0, prompt.shape[1]:] == NEWLINE).sum() >= 2
    greedy, expected = generate(model, tokens, max_new_tokens=12, stop=()), tokens
    for _ in range(12):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(greedy, expected)


def test_stage_one_rotates_by_the_same_positions(folder):
    student, tokens = random_model(folder, "hybrid"), family_tokens()
    documents = torch.zeros_like(tokens)
    given = student.positions(tokens)
    own = alignment_losses(student, tokens, documents)
    student.positions = lambda tokens, document_ids: given
    assert torch.equal(own, alignment_losses(student, tokens, documents))
    student.positions = lambda tokens, document_ids: torch.arange(tokens.shape[1])[None]
    assert (own - alignment_losses(student, tokens, documents)).abs().max() > 1e-4


# ------------------------------------------------------------------ data


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def families(tmp_path):
    """A .jsonl of 40 families, and the families."""
    rng, found = random.Random(0), []
    for _ in range(40):
        found.append([m for m in itertools.islice(make_bio.protein_family(rng)[1],
                                                  rng.randint(1, 9))])
    return write_rows(tmp_path / "families.jsonl", [{"sequences": f} for f in found]), found


def documents_of(source, order):
    """The documents of a source as texts, read back from its rows."""
    rows = [source.row(i, order) for i in range(source.num_rows)]
    tokens, ids = (np.concatenate([r[column][:-1] for r in rows]) for column in (0, 1))
    return [tokens[ids == d] for d in np.unique(ids)[:-1]]  # the last may be cut


def test_families_are_joined_and_reordered_each_epoch(tmp_path, folder, families):
    path, expected = families
    source = Source("f", tokenise(path, Tokenizer(folder), 257, tmp_path / "d"), "train", T=64)
    as_written = documents_of(source, None)
    texts = [bytes(d[1:-1].tolist()).decode() for d in as_written]
    assert all(d[0] == 256 and d[-1] == 257 for d in as_written)
    assert {*texts} < {"".join(m + "\n" for m in family) for family in expected}
    orders = [documents_of(source, (0, 0, epoch)) for epoch in (0, 0, 1)]
    for a, b, c, d in zip(as_written, *orders):
        assert np.array_equal(b, c) and len(b) == len(a)
        for other in (b, d):  # the same members, BOS and EOS at their places
            assert other[0] == 256 and other[-1] == 257
            assert sorted(bytes(other[1:-1].tolist()).split(b"\n")) == sorted(
                bytes(a[1:-1].tolist()).split(b"\n"))
    many = [i for i, d in enumerate(as_written) if (d == NEWLINE).sum() > 3]
    moved = [not np.array_equal(orders[0][i], orders[2][i]) for i in many]
    assert sum(moved) > 0.8 * len(many) > 5


def test_a_mixture_shuffles_by_seed_and_step_alone(tmp_path, folder, families):
    source = Source("f", tokenise(families[0], Tokenizer(folder), 257, tmp_path / "d"), "train", 64)
    whole = Mixture([source], [1.0], 5 * source.num_rows, seed=3)
    rows = [whole.row(i) for i in range(5 * source.num_rows)]
    again = Mixture([source], [1.0], 5 * source.num_rows, seed=3)
    for i in (4 * source.num_rows + 1, 2, source.num_rows):  # as after a stop, out of order
        assert all(np.array_equal(a, b) for a, b in zip(rows[i], again.row(i)))
    tokens, ids, labels = collate(rows[:4], torch.device("cpu"))
    assert tokens.shape == ids.shape == labels.shape == (4, 64)
    plain = source.row(whole.locate(0)[1])
    assert np.array_equal(plain[1], rows[0][1])  # packing does not move
    assert not np.array_equal(plain[0], rows[0][0])
    run = argparse.Namespace(experts=False, batch=2, distil_steps=10, out=tmp_path, seed=2,
                             targets=tmp_path)  # stored for the files' order
    (_, stored), = plan_students(run, [source], [1.0]).values()
    for i in range(20):
        assert np.array_equal(stored.row(i)[0], source.row(stored.locate(i)[1])[0])


def test_the_split_sees_neither_order_nor_strand(tmp_path, folder, families):
    tokenizer, rng = Tokenizer(folder), random.Random(1)
    again = [{"sequences": rng.sample(f, len(f))} for f in families[1]]
    other = tokenise(write_rows(tmp_path / "b.jsonl", again), tokenizer, 257, tmp_path / "d")
    first = tokenise(families[0], tokenizer, 257, tmp_path / "d")
    held = [{tuple(sorted(bytes(s.tokens[a + 1:a + n - 1].tolist()).split(b"\n")))
             for a, n in zip(s.starts, s.lengths)}
            for s in (Source("f", x, "heldout", 64, held_out_hashes(x, 0.2))
                      for x in (first, other))]
    assert held[0] == held[1] and len(held[0]) == 8
    strands = ["".join(rng.choices("ACGT", k=rng.randint(20, 60))) for _ in range(60)]
    both = tokenise(write_rows(tmp_path / "dna.jsonl", [{"dna": s} for s in strands]), tokenizer,
                    257, tmp_path / "d")
    for split, count in (("train", 96), ("heldout", 24)):
        source = Source("dna", both, split, 64, held_out_hashes(both, 0.2))
        texts = [bytes(source.tokens[a + 1:a + n - 1].tolist()).decode()
                 for a, n in zip(source.starts, source.lengths)]
        assert len(texts) == count and {reverse_complement(t) for t in texts} == set(texts)


@pytest.mark.parametrize("row, words", [
    ({"sequences": []}, "sequences"), ({"sequences": ["MK", 3]}, "sequences"),
    ({"sequences": ["MK\nV"]}, "contains the separator"), ({"dna": 3}, '"dna"'),
    ({"dna": "ACGX"}, "'X' (character 3 of 4)")])
def test_bad_rows_name_file_and_line(tmp_path, folder, row, words):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "fine"}, row])
    with pytest.raises(ValueError) as error:
        tokenise(path, Tokenizer(folder), 257, tmp_path / "d")
    assert words in str(error.value)


def test_a_separator_that_is_the_eos_ends_a_family_once(folder):
    """A second one would be an empty member, which the shuffle puts between the others."""
    tokenizer = Tokenizer(folder)
    [(ids, *_)] = parse_row({"sequences": ["MKV", "MA"]}, tokenizer, tokenizer.separator_id)
    assert ids.count(tokenizer.separator_id) == 2 and ids[-1] == tokenizer.separator_id


def test_families_need_a_separator(tmp_path):
    tokenizer = Tokenizer(bio_folder(tmp_path / "plain", separator_id=None))
    path = write_rows(tmp_path / "a.jsonl", [{"sequences": ["MKV"]}])
    with pytest.raises(ValueError, match='add "separator_id"'):
        tokenise(path, tokenizer, 257, tmp_path / "d")


# ------------------------------------------------------------------ both strands of DNA


def test_reverse_complement_is_an_involution():
    assert reverse_complement("AACGTN") == "NACGTT" and reverse_complement("acRY") == "RYgt"
    dna = "".join(random.Random(0).choices("ACGTRYKMBDHVSWNacgt", k=500))
    assert reverse_complement(reverse_complement(dna)) == dna
    with pytest.raises(ValueError, match="'U'"):
        reverse_complement("ACU")


@pytest.fixture
def scorer(folder):
    save_pretrained(random_model(folder, "hybrid"), folder.parent / "student")
    return Scorer(folder.parent / "student")


def test_conjoined_score_and_embedding_are_those_of_the_other_strand(scorer):
    dna = "".join(random.Random(0).choices("ACGT", k=100))
    (a, b), other = strand_scores(scorer, dna), strand_scores(scorer, reverse_complement(dna))
    logits = scorer.model(torch.tensor([[256, *dna.encode()]]))[0].log_softmax(-1)
    expected = sum(logits[t, c].item() for t, c in enumerate(dna.encode()))
    assert abs(a - expected) < 1e-3 and abs(a - b) > 1e-2
    assert (a + b) / 2 == sum(other) / 2
    x, y = base_embeddings(scorer, dna), base_embeddings(scorer, reverse_complement(dna))
    hidden = scorer.model.hidden(torch.tensor([[256, *dna.encode()]]))[0, 1:]
    assert (x[:, :48] - hidden).abs().max() < 1e-5
    assert (x - torch.cat((y[:, 48:], y[:, :48]), 1).flip(0)).abs().max() < 1e-5


@pytest.mark.parametrize("N, D", [(200, 20), (30, 50)])
def test_ridge_probe_equals_least_squares_with_rows_for_the_penalty(N, D):
    random_ = np.random.default_rng(0)
    x, t = random_.normal(3, 2, (N, D)), random_.normal(3, 2, (40, D))
    y = (x @ random_.normal(size=(D, 3)) + random_.normal(size=(N, 3))).argmax(1)
    mean, scale = x.mean(0), x.std(0)
    targets = np.eye(3)[y]
    system = np.concatenate(((x - mean) / scale, np.sqrt(1e-3 * N) * np.eye(D)))
    right = np.concatenate((targets - targets.mean(0), np.zeros((D, 3))))
    w = np.linalg.lstsq(system, right, rcond=None)[0]
    expected = ((t - mean) / scale @ w + targets.mean(0)).argmax(1)
    found = ridge_probe(*map(torch.from_numpy, (x, y, t)))
    assert np.array_equal(found, expected)


# ------------------------------------------------------------------ molecules

VALID = """C CC(C)C C1CC1 C12CC1C2 OP(=O)(O)O [13C@@H](F)(Cl)Br F/C=C/F [NH3+]CC(=O)[O-] C.C [H][H]
    C1=CC(CN2CCNCC2)=CC=C1C(=O)NC c1ccccc1C(=O)O Cc1c[nH]cn1 CN1C=NC2=C1C(=O)N(C(=O)N2C)C"""
INVALID = """C( C) C() (C)C C= =C C==C C1CC C11 C(C)(C)(C)(C)C CN(C)(C)C C=C(=C)C=C [CH5] C[ C[XY]C CX
    c1ccc1c c1ccccc1( C-=C [] \ufffd"""


def test_molecules_are_judged_by_rdkit_and_compared_as_molecules(capfd):
    pytest.importorskip("rdkit")
    assert all(canonical_smiles(VALID.split())) and not any(canonical_smiles(INVALID.split()))
    assert not any(canonical_smiles(["", " ", "C C", "C\n", "C |name|"]))  # names, to RDKit
    assert canonical_smiles(["OCC", "C1=CC=CC=C1"]) == canonical_smiles(["CCO", "c1ccccc1"])
    samples = ["OCC", "CCO", "CC", "C(", "c1ccccc1"]
    assert molecule_shares(samples, ["C1=CC=CC=C1", "C(C"]) == {
        "valid": 4 / 5, "unique": 3 / 4, "novel": 2 / 3}
    assert str(molecule_shares(["C("], [])) == "{'valid': 0.0, 'unique': nan, 'novel': nan}"
    assert capfd.readouterr() == ("", "")  # RDKit's own log is silent


def test_generated_molecules_are_valid():
    pytest.importorskip("rdkit")
    rng = random.Random(0)
    molecules = [next(make_bio.molecule_family(rng)[1]) for _ in range(200)]
    assert all(canonical_smiles(molecules))


def test_without_rdkit_one_sentence_comes_before_the_work(tmp_path, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    path = write_rows(tmp_path / "t.jsonl", [{"id": "a", **task_rows()[2]}])
    with pytest.raises(ValueError, match="pip install rdkit"):
        evaluate_rows(folder, [path])
    with pytest.raises(ValueError, match="pip install rdkit"):
        evaluate.main(["molecules", "--model", str(folder), "--data", str(path)])


def test_molecules_command_samples_and_counts(tmp_path, capsys):
    pytest.importorskip("rdkit")
    path = tmp_path / "families.jsonl"
    path.write_text('\ufeff{"sequences": ["CCO", "CCN"]}\n{"sequences": ["CC"]}\n')  # BOM
    command = ["molecules", "--model", str(TEACHER), "--data", str(path), "--number", "2",
               "--device", "cpu"]
    evaluate.main(command)
    assert "4 samples: valid " in capsys.readouterr().out
    for line, words in (('{"text": "C"}', r"families.jsonl:1: expected \"sequences\""),
                        ('{"sequences": [3]}', "families.jsonl:1"), ("", "no row")):
        path.write_text(line)
        with pytest.raises(ValueError, match=words):
            evaluate.main(command)


# ------------------------------------------------------------------ rows of task files


def task_rows():
    rng = random.Random(0)
    dna = ["".join(rng.choices("ACGT", k=40)) for _ in range(4)]
    return [{"type": "family", "sequences": ["MKVLA", "MKVIA", "MKLA"]},
            {"type": "strand", "dna": dna[0]},
            {"type": "molecule", "sequences": ["CC", "CO"], "seed": 1, "max_new_tokens": 20},
            *({"type": "probe", "dna": d, "labels": "01" * 20} for d in dna)]


def test_a_probe_s_chance_is_the_share_of_the_most_common_label(scorer):
    rows = [{"where": "", "dna": "ACGT" * 5, "labels": "0" * 15 + "1" * 5} for _ in range(2)]
    assert {result["chance"] for _, result in evaluate.score_probes(scorer, rows)} == {0.75}


def test_rows_of_sequences_are_scored_and_go_on_after_a_stop(tmp_path, scorer):
    pytest.importorskip("rdkit")
    path = write_rows(tmp_path / "t.jsonl", [{"id": str(i), **row}
                                             for i, row in enumerate(task_rows())])
    folder, samples = scorer.model.source, tmp_path / "samples.jsonl"
    results = evaluate_rows(folder, [path], samples=samples)["t"]
    nats, n = family_nats(scorer, ["MKVLA", "MKVIA", "MKLA"])[-1]
    ids = [256, *b"MKVLA\nMKVIA\nMKLA"]
    logits = scorer.model(torch.tensor([ids]))[0].double().log_softmax(-1)
    assert abs(nats + sum(logits[t, ids[t + 1]].item() for t in range(12, 16))) < 1e-4 and n == 4
    assert math.isclose(results[0]["score"], math.exp(-nats / n))
    assert [len(results[0]["perplexity"]), results[3]["chance"]] == [3, 0.5]
    assert math.isclose(math.log(results[1]["score"]),
                        sum(strand_scores(scorer, task_rows()[1]["dna"])) / 80)
    output = sample_sequences(scorer, ["CC", "CO"], 1, seed=1, max_new_tokens=20)[0]
    assert results[2]["output"] == output and "\n" not in output
    assert results[2]["score"] == (canonical_smiles([output]) != [None])
    samples.write_text("".join(samples.read_text().splitlines(True)[:3]))  # stopped in the probes
    assert evaluate_rows(folder, [path], samples=samples)["t"] == results
    few, alone = ([row["score"] for row in evaluate_rows(
        folder, [path], samples=x, limit=5)["t"]] for x in (samples, None))
    assert few == alone != [row["score"] for row in results[:5]]  # probes: fitted on fewer


@pytest.mark.parametrize("row, words", [
    ({"type": "strand", "dna": "ACGU"}, "'U'"), ({"type": "strand", "dna": ""}, "one base or more"),
    ({"type": "probe", "dna": "ACGT", "labels": "010"}, "one label a base"),
    ({"type": "family", "sequences": []}, "one or more"),
    ({"type": "family", "sequences": ["MK\nV"]}, "contains the separator"),
    ({"type": "molecule", "sequences": [], "seed": 1, "temperature": -1.0}, "0 or more"),
    ({"type": "molecule", "sequences": [], "seed": 1, "max_new_tokens": 512}, "and 512 new ones"),
    ({"type": "molecule", "sequences": ["C" * 400], "seed": 1}, "402 tokens and 128 new ones"),
    ({"type": "strand", "dna": "ACGT" * 256}, "1024 tokens, and the model reads 512"),
    ({"type": "probe", "dna": "ACGT", "labels": "0101"}, "two rows or more")])
def test_bad_rows_of_sequences_are_named(tmp_path, scorer, row, words):
    path = write_rows(tmp_path / "t.jsonl", [{"id": "a", **row}])
    with pytest.raises(ValueError) as error:
        evaluate_rows(scorer.model.source, [path])
    assert words in str(error.value) and "t.jsonl:1" in str(error.value)


# ------------------------------------------------------------------ the shipped teacher


def test_tasks_are_held_out_and_come_from_their_seeds(tmp_path):
    make_bio.write_tasks(tmp_path / "tasks")
    data = "".join(path.read_text() for path in (TEACHER / "data").glob("*.jsonl"))
    shipped = sorted((ROOT / "tests/bio_tasks").glob("*.jsonl"))
    assert len(shipped) == 8
    for path in shipped:
        assert path.read_text() == (tmp_path / "tasks" / path.name).read_text()
        for row in map(json.loads, path.read_text().splitlines()):
            for text in (*row.get("sequences", ()), row.get("dna", ""), row.get("context", "")):
                assert not text or f'"{text}"' not in data


def test_the_teacher_learns_a_family_in_context():
    scorer = Scorer(TEACHER)
    rows = [json.loads(line) for line in open(ROOT / "tests/bio_tasks/protein-homologue.jsonl")]
    nats = np.array([family_nats(scorer, row["sequences"]) for row in rows[:20]])
    perplexity = np.exp(nats[:, :, 0].sum(0) / nats[:, :, 1].sum(0))
    assert perplexity[0] > 15 and perplexity[7] < 3  # README of the teacher: measured on 200


def test_after_a_little_stage_one_the_state_carries_a_family(tmp_path):
    teacher, tokenizer = load_pretrained(TEACHER).requires_grad_(False), Tokenizer(TEACHER)
    data = tokenise(TEACHER / "data/protein.jsonl", tokenizer, 257, tmp_path, workers=1)
    mixture = Mixture([Source("protein", data, "train", 512)], [1.0], 100, seed=0)
    student = student_from_teacher(teacher, window=8, sinks=4)
    trainable = select_trainable(student, "new")
    optimizer = make_optimizer(trainable)
    for step in range(16):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 16, 4, 3e-2, 3e-5)
        tokens, ids, _ = collate([mixture.row(step)], "cpu")
        alignment_losses(student, tokens, ids, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    rows = [json.loads(line) for line in open(ROOT / "tests/bio_tasks/protein-homologue.jsonl")]
    found = {}
    for name, model in (("student", student),
                        ("window", student_from_teacher(teacher, window=8, sinks=4, mixer="swa"))):
        save_pretrained(model, tmp_path / name)
        scorer = Scorer(tmp_path / name)
        nats = np.array([family_nats(scorer, row["sequences"]) for row in rows[:6]])
        found[name] = np.exp(nats[:, -1, 0].sum() / nats[:, -1, 1].sum())
    # measured: 16.8 and 5.5; the teacher 3.1
    assert found["window"] > 14 and found["student"] < 0.6 * found["window"]
