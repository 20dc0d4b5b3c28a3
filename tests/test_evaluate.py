"""evaluate.py: the paper's statistics, scoring rules, the code sandbox, and what it refuses."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from evaluate import (Scorer, bootstrap, critical_tolerance, evaluate_rows, evaluate_tasks,
                      gate_map, is_right, needle_prompt, read_task, recovery, run_program,
                      win_and_tie)
from model import Tokenizer, generate, load_pretrained, save_pretrained, student_from_teacher

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "tests/teacher"
TASKS = sorted((ROOT / "tests/tasks").glob("*.jsonl"))


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("student") / "student"
    teacher = load_pretrained(TEACHER, dtype=torch.float32)
    save_pretrained(student_from_teacher(teacher, window=16), directory)
    return directory


@pytest.fixture(scope="module", params=("teacher", "student"))
def scorer(request, student_dir):
    return Scorer(TEACHER if request.param == "teacher" else student_dir)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


CHOICE = {"id": "a", "type": "choice", "context": "max(3,5)=", "choices": ["5\n", "3\n"], "gold": 0}
SUM = {"id": "b", "type": "generate", "prompt": "2+3=", "gold": "5", "stop": ["\n"],
       "max_new_tokens": 8}
NEEDLE = {"id": "c", "type": "needle", "length": 200, "depth": 0.5, "seed": 1}
CODE = {"id": "d", "type": "code", "prompt": "x = 1\n#", "stop": ["\n"], "max_new_tokens": 4,
        "test": "assert x == 1"}

# ------------------------------------------------------------------ statistics

# The paper's tables: PIQA, ARC-e, ARC-c, HellaSwag, Winogrande, MMLU, GPQA-D, GPQA, GSM8K,
# HumanEval, HumanEval+, MBPP, MBPP+.
PUBLISHED = {
    "Llama3.1-8B": [80.1, 81.6, 57.8, 81.9, 76.9, 65.9, 10.6, 13.8, 48.4, 35.4, 29.9, 48.4, 61.9],
    "xLSTM-Llama3.1-8B": [80.0, 82.9, 55.9, 82.3, 79.0, 66.1, 17.7, 15.8, 57.8, 39.0, 23.8, 42.8,
                          56.9],
    "LoLCATs": [79.5, 83.2, 54.6, 75.3, 74.0, 52.9, 1.77, 2.23, 3.87, 2.13, 3.35, 0.0, 0.0],
    "Olmo3-7B": [78.1, 80.7, 58.4, 56.7, 73.4, 66.4, 20.7, 19.0, 67.5, 32.9, 28.7, 50.6, 71.7],
    "xLSTM-Olmo3-7B": [77.9, 81.1, 57.8, 56.9, 72.8, 65.7, 17.7, 19.4, 56.6, 32.3, 27.4, 36.8,
                       52.4]}


@pytest.mark.parametrize("student, teacher, alpha", [
    ("xLSTM-Llama3.1-8B", "Llama3.1-8B", 0.0000),  # published: 0.00
    ("xLSTM-Olmo3-7B", "Olmo3-7B", 0.0105),        # published: 0.01
    # Published: 1.0. Eq. 17 on the published scores gives 0.833; we know no reading that gives 1.
    ("LoLCATs", "Llama3.1-8B", 0.8330)])
def test_critical_tolerance_of_the_published_tables(student, teacher, alpha):
    s, t = (dict(enumerate(PUBLISHED[name])) for name in (student, teacher))
    assert round(critical_tolerance(s, t), 4) == alpha
    assert win_and_tie(s, t, critical_tolerance(s, t)) >= 0.5
    if alpha:
        assert win_and_tie(s, t, critical_tolerance(s, t) - 1e-6) < 0.5


def test_closed_form_equals_a_search_over_alpha():
    rng = random.Random(0)
    for _ in range(300):
        n = rng.randint(1, 9)
        s, t = ({i: rng.randint(0, 6) / 6 for i in range(n)} for _ in range(2))
        drops = [0.0, *(1 - s[i] / t[i] for i in range(n) if t[i])]
        brute = min(a for a in drops if a >= 0 and 2 * sum(
            s[i] >= (1 - a) * t[i] - 1e-12 for i in range(n)) >= n)
        assert critical_tolerance(s, t) == pytest.approx(brute, abs=1e-12)


def test_ties_are_ties_and_a_teacher_at_zero_cannot_be_missed():
    assert win_and_tie({"a": 0.7}, {"a": 1.0}, 0.3) == 1  # 1 - 0.7 > 0.3 in floats
    assert win_and_tie({"a": 49 / 100}, {"a": 50 / 100}, 0) == 0
    assert recovery({"a": 0.0}, {"a": 0.0})["a"] == float("inf")
    assert critical_tolerance({"a": 0.0, "b": 0.1}, {"a": 0.0, "b": 1.0}) == 0
    assert critical_tolerance({"a": 0.3}, {"a": 0.1 + 0.2}) == 0  # 0.30000000000000004
    assert recovery({"a": 0.4}, {"a": 0.5}, {"a": 0.25})["a"] == pytest.approx(0.6)
    for student in ({"b": 1.0}, {"a": float("nan")}, {"a": -1.0}):
        with pytest.raises(ValueError):
            recovery(student, {"a": 1.0})


def test_bootstrap_is_paired_seeded_and_equals_plain_resampling():
    rng = np.random.default_rng(0)
    teacher = {task: (rng.random(200) < 0.7).astype(float) for task in "abc"}
    flips = {task: rng.random(200) < 0.1 for task in "abc"}
    student = {task: np.where(flips[task], 1 - t, t) for task, t in teacher.items()}
    found = bootstrap(student, teacher)
    assert bootstrap(student, teacher, draws=9) == bootstrap(student, teacher, draws=9)
    plain = []
    for _ in range(2000):
        means = {}, {}
        for task in "abc":
            rows = rng.integers(0, 200, 200)
            means[0][task], means[1][task] = student[task][rows].mean(), teacher[task][rows].mean()
        plain.append(critical_tolerance(*means))
    assert np.allclose(found["critical_tolerance"], np.quantile(plain, (0.025, 0.975)), atol=0.01)
    same = bootstrap(teacher, teacher, draws=99)
    assert same["p_lossless"] == 1 and same["critical_tolerance"] == [0, 0]
    with pytest.raises(ValueError, match="rows"):
        bootstrap({"a": [1.0]}, {"a": [1.0, 0.0]})


# ------------------------------------------------------------------ log-likelihoods


def random_pairs(tokenizer, n=12):
    rng = random.Random(0)
    def ids(low, high):
        return tuple(rng.randrange(1000) for _ in range(rng.randint(low, high)))
    contexts = [(tokenizer.bos_id, *ids(a, 60)) for a in (0, 40, 40)[:n // 4]]
    return [(c, ids(1, 9)) for c in contexts for _ in range(4)]  # four share a context


def direct(model, context, new):
    """The definition, one sequence at a time. Its last token is predicted and not read."""
    logits = model(torch.tensor([context + new[:-1]]))[0, -len(new):].float()
    new = torch.tensor(new)
    total = logits.log_softmax(-1).gather(1, new[:, None]).sum().item()
    return total, bool((logits.argmax(-1) == new).all())


def test_loglikelihoods_equal_the_direct_computation_to_the_last_bit(scorer):
    pairs = random_pairs(scorer.tokenizer)
    with torch.no_grad():
        for (context, new), (total, greedy) in zip(pairs, scorer.loglikelihoods(pairs)):
            assert (total, greedy) == direct(scorer.model, context, new)


def test_loglikelihoods_do_not_depend_on_what_else_is_asked(scorer):
    pairs = random_pairs(scorer.tokenizer)
    together = dict(zip(pairs, scorer.loglikelihoods(pairs)))
    shuffled = random.Random(1).sample(pairs, len(pairs))
    assert scorer.loglikelihoods(shuffled) == [together[pair] for pair in shuffled]
    assert all(scorer.loglikelihoods([pair]) == [together[pair]] for pair in pairs)


def test_long_contexts_prefilled_once_give_the_same(scorer, monkeypatch):
    pairs = random_pairs(scorer.tokenizer)
    whole = scorer.loglikelihoods(pairs)
    monkeypatch.setattr(evaluate, "LONG", 8)
    monkeypatch.setattr(evaluate, "PREFILL", 32)
    prefilled = scorer.loglikelihoods(pairs)
    error = max(abs(a - b) / len(p[1]) for p, (a, _), (b, _) in zip(pairs, whole, prefilled))
    assert error < 5e-5  # nats a token, in fp32
    assert scorer.loglikelihoods(pairs[-1:]) == prefilled[-1:]


def test_nan_is_refused_rather_than_chosen(student_dir):
    scorer = Scorer(student_dir)
    scorer.model.model["norm"].weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        scorer.loglikelihoods([((1, 2), (3,))])
    with pytest.raises(ValueError, match="not finite"):
        list(scorer.generate([([1, 2, 3], [], 4)]))
    with pytest.raises(ValueError, match="not finite"):
        scorer.token_logprobs([1, 2, 3])
    with pytest.raises(ValueError, match="not finite"):
        evaluate.base_embeddings(scorer, "ACGT")


def test_pairs_are_encoded_as_one_text(scorer):
    encode, bos = scorer.tokenizer.encode, scorer.tokenizer.bos_id
    (context, new), lost = scorer.encode_pair("the cat ", "sat")
    assert list(context) == encode("the cat") and list(new) == encode(" sat", bos=False)
    assert lost == 0
    assert scorer.encode_pair("", "sat")[0] == ((bos,), tuple(encode("sat", bos=False)))
    assert scorer.encode("<|begin_of_text|>x") == scorer.encode("x")  # no second BOS
    with pytest.raises(ValueError, match="0 tokens"):
        scorer.encode_pair("the cat", "")


@pytest.mark.parametrize("context, continuation", [
    ("the cat ", "sat"), ("def f(x):\n", "    return x"), ("f(x)", ":\n    return"), ("a\n\n", "b")])
def test_pairs_are_split_as_the_harness_splits_them(scorer, context, continuation):
    left = scorer.encode(context.rstrip())  # also where ":" and a line's end are one token
    right = scorer.encode(context + continuation)[len(left):]
    assert scorer.encode_pair(context, continuation)[0] == (tuple(left), tuple(right))
    model = pytest.importorskip("lm_eval.api.model")
    theirs = model.TemplateLM._encode_pair(
        SimpleNamespace(backend="causal", tok_encode=scorer.encode), context, continuation)
    assert theirs == (left, right)


def test_what_a_family_without_bos_begins_with_is_eos(student_dir, monkeypatch):
    monkeypatch.setattr(evaluate, "load_with_tokenizer", lambda *_, **__: (
        SimpleNamespace(config=SimpleNamespace(eos_ids=(5, 6), max_positions=9)),
        SimpleNamespace(bos_id=None)))
    assert Scorer(student_dir).prefix == (5,)


def test_too_long_contexts_lose_their_left_end_and_are_counted(scorer):
    limit = scorer.max_tokens
    text = " ".join("abcdefgh"[i % 8] for i in range(2 * limit))
    (context, new), lost = scorer.encode_pair(text, " b c")
    assert len(context) + len(new) - 1 == limit and lost == len(scorer.encode(text + " b")) - limit
    ids = scorer.encode(text)
    assert scorer.cut_prompt(text, 100) == (ids[-(limit - 100):], len(ids) - (limit - 100))
    with pytest.raises(ValueError):
        scorer.encode_pair("a", text)
    with pytest.raises(ValueError):
        scorer.cut_prompt("a", limit)


def test_the_first_of_equal_choices_wins_and_one_space_is_not_counted(tmp_path):
    rows = [{**CHOICE, "id": "tie", "choices": ["5", "5"], "gold": 1},
            {**CHOICE, "id": "norm", "choices": [" 5", "  5"], "metric": "acc_norm"}]
    results = evaluate_rows(TEACHER, [write_rows(tmp_path / "t.jsonl", rows)])["t"]
    assert results[0]["acc"] == 0 and results[0]["chance"] == 0.5
    one, two = (x / n for x, n in zip(results[1]["logprobs"], (1, 2)))
    assert results[1]["score"] == results[1]["acc_norm"] == float(one >= two)


# ------------------------------------------------------------------ generation


def test_generation_is_greedy_and_cut_at_stops_in_the_text(scorer):
    prompt = scorer.encode("def f(x):\n    return")
    ids = generate(scorer.model, torch.tensor([prompt]), max_new_tokens=12)[0, len(prompt):]
    eos = [i for i, t in enumerate(ids.tolist()) if t in scorer.model.config.eos_ids]
    text = scorer.tokenizer.decode(ids[:eos[0] if eos else None].tolist())
    assert list(scorer.generate([(prompt, [], 12)])) == [(0, text.rstrip("\ufffd"))]
    stop = text[3:5]  # any two characters: tokens cut the text elsewhere
    both = dict(scorer.generate([(prompt, ["never", stop], 12), (prompt, [], 3)]))
    assert both[0] == text[:text.find(stop)] and text.startswith(both[1])


def test_special_tokens_end_a_text_but_are_no_part_of_it(scorer, monkeypatch, tmp_path):
    a, b = scorer.tokenizer.encode("a", bos=False)[0], scorer.tokenizer.encode("b", bos=False)[0]
    mark = scorer.tokenizer.added["<|begin_of_text|>"]
    monkeypatch.setattr(evaluate, "stream", lambda *args, **kwargs: (
        torch.tensor([i]) for i in (a, mark, b, a)))
    for stops, text in (([], "aba"), (["<|begin_of_text|>"], "a"), (["ba"], "a"), (["ab"], ""),
                        (["<|begin_of_text|>b"], "a"), (["a<|begin_of_text|>b"], "")):
        assert list(scorer.generate([([1], stops, 4)])) == [(0, text)]
    # Of two special tokens one may begin as the other: the longer one goes whole.
    spec = json.loads((TEACHER / "tokenizer.json").read_text())
    token, short = spec["added_tokens"][0], scorer.tokenizer.vocab_size
    spec["added_tokens"] += [{**token, "id": short, "content": "<|in"},
                             {**token, "id": short + 1, "content": "<|ing|>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    monkeypatch.setattr(scorer, "tokenizer", Tokenizer(tmp_path))
    monkeypatch.setattr(evaluate, "stream", lambda *args, **kwargs: (
        torch.tensor([i]) for i in (a, short + 1, b)))
    assert scorer.tokenizer.special >= {short, short + 1}
    assert list(scorer.generate([([1], [], 3)])) == [(0, "ab")]


def test_half_a_character_is_held_back(scorer, monkeypatch):
    # Whatever is generated, let its n tokens be the first n bytes of three euro signs.
    monkeypatch.setattr(scorer.tokenizer, "decode",
                        lambda ids: ("€€€".encode()[:len(ids)]).decode("utf-8", "replace"))
    prompt = scorer.encode("copy: f k =")
    assert list(scorer.generate([(prompt, ["\ufffd"], 5)])) == [(0, "€")]  # no U+FFFD to stop at or to show


def test_generated_answers_do_not_depend_on_batch_or_order(scorer, monkeypatch):
    rows = [row for path in TASKS for row in read_task(path)[:5] if row["type"] == "generate"
            and path.stem in ("math-add", "math-sub", "recall-copy")]
    together = {row["prompt"]: r["output"] for row, r in evaluate.score_texts(scorer, rows)}
    monkeypatch.setattr(evaluate, "ROWS", 3)
    random.Random(0).shuffle(rows)
    assert together == {row["prompt"]: r["output"] for row, r in evaluate.score_texts(scorer, rows)}


@pytest.mark.parametrize("right, fields, text", [
    (True, {"gold": "5"}, " 5\n"), (False, {"gold": "5"}, "55"),
    (True, {"gold": "5", "match": "contains"}, "it is 5."),
    (True, {"gold": "1200", "match": "number"}, "not 7 but $1,200.00."),
    (False, {"gold": "1200", "match": "number"}, "1200 or 7"),
    (False, {"gold": "1200", "match": "number"}, "none"),
    (False, {"gold": "1", "match": "number"}, "1.2.3"),
    (True, {"gold": "18", "extract": r"#### (-?[0-9.,]+)"}, "so\n#### 18\n#### 19"),
    (False, {"gold": "18", "extract": r"#### (-?[0-9.,]+)"}, "18"),
    (True, {"gold": "19", "extract": r"(?s).*#### ([0-9]+)"}, "so\n#### 18\n#### 19")])
def test_answers_are_matched(right, fields, text):
    assert is_right({"match": "exact", "extract": "", **fields}, text) == right


def test_needles_come_from_their_seed_at_their_depth(scorer):
    prompts = [needle_prompt({**NEEDLE, "depth": d}, scorer.tokenizer) for d in (0.0, 0.5, 1.0)]
    at = [text.index(number) / len(text) for text, number in prompts]
    assert at[0] < 0.1 < 0.3 < at[1] < 0.6 < 0.7 < at[2] < 0.9
    assert all(150 < len(scorer.encode(text)) <= 200 for text, _ in prompts)
    assert len({number for _, number in prompts}) == 1 and len(prompts[0][1]) == 7
    assert needle_prompt({**NEEDLE, "seed": 2}, scorer.tokenizer)[1] != prompts[0][1]


# ------------------------------------------------------------------ task and samples files


@pytest.mark.parametrize("change, words", [
    ({"gold": 2}, "gold = 2"), ({"gold": -1}, "gold"), ({"gold": True}, "gold"),
    ({"choices": ["a"]}, "two or more"), ({"choices": ["a", " "]}, "empty"),
    ({"choices": ["a", ""]}, "empty"), ({"choices": "ab"}, "expected list"),
    ({"id": "first"}, "occurs twice"), ({"type": "essay"}, "choice, generate, code, needle"),
    ({"golden": 1}, "'golden' is no field"), ({"context": None}, "context"),
    ({"metric": "f1"}, "metric"), ({**SUM, "max_new_tokens": 0}, "max_new_tokens"),
    ({**SUM, "stop": [""]}, "stop"), ({**SUM, "match": "fuzzy"}, "match"),
    ({**SUM, "match": "number", "gold": "five"}, "number (in gold too)"),
    ({**SUM, "extract": "("}, "unterminated subpattern"),
    ({**SUM, "extract": "a{99999999999999999999}"}, "too large"),
    ({**NEEDLE, "length": 10 ** 30}, "below 2^30"),
    ({**NEEDLE, "depth": 1.5}, "depth"), ({**NEEDLE, "length": 1}, "length"),
    ({**NEEDLE, "seed": -1}, "seed"), ({**NEEDLE, "depth": float("nan")}, "depth"),
    ({"type": ["choice"]}, "expected a type")])
def test_bad_rows_are_named(tmp_path, change, words):
    base = CHOICE if "type" not in change else {}
    path = write_rows(tmp_path / "t.jsonl", [{**CHOICE, "id": "first"}, {**base, **change}])
    with pytest.raises(ValueError, match=r"t\.jsonl:2: ") as error:
        read_task(path)
    assert words in str(error.value)


def test_bad_lines_are_named(tmp_path):
    for line in (b"{", b"\xff\xfe", b"[1]", b'{"id": "x"}', b'{"type": "choice"}'):
        path = tmp_path / "t.jsonl"
        path.write_bytes(json.dumps(CHOICE).encode() + b"\n\n" + line + b"\n")
        with pytest.raises(ValueError, match=r"t\.jsonl:3: "):
            read_task(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no row"):
        read_task(path)
    path = write_rows(path, [{**CHOICE, "choices": ["<|end_of_text|>" * 600, "a"]}])
    with pytest.raises(ValueError, match=r"t\.jsonl:1: .*600 tokens"):
        evaluate_tasks(TEACHER, [path])


def test_a_stopped_run_goes_on_and_foreign_results_are_left_aside(tmp_path, student_dir,
                                                                   monkeypatch, capsys):
    path = write_rows(tmp_path / "t.jsonl", [CHOICE, SUM, NEEDLE, {**SUM, "id": "e"}])
    samples = tmp_path / "samples.jsonl"
    whole = evaluate_rows(TEACHER, [path], samples=samples)
    lines = samples.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    samples.write_bytes(lines[0] + lines[1] + lines[2][:20])  # killed in the middle of a line
    assert evaluate_rows(TEACHER, [path], samples=samples) == whole
    assert sorted(samples.read_bytes().splitlines(keepends=True)) == sorted(lines)
    with monkeypatch.context() as patch:  # nothing is left to do: the model is not even loaded
        patch.setattr(evaluate, "Scorer", None)
        assert evaluate_tasks(TEACHER, [path], samples=samples).keys() == {"t"}
        assert len(evaluate_rows(TEACHER, [path], samples=samples, limit=2)["t"]) == 2
    other = evaluate_rows(student_dir, [path], samples=samples)  # another model: all is scored
    assert "4 lines are not of this model" in capsys.readouterr().out
    with monkeypatch.context() as patch:  # a GPU computes in bf16: another score
        patch.setattr(evaluate, "Scorer", lambda folder, device: Scorer(folder))
        on_cpu, *on_gpus = (
            evaluate_rows(TEACHER, [path], device=device, samples=tmp_path / "more.jsonl",
                          limit=1)["t"][0]["model"] for device in ("cpu", "cuda", "cuda:1"))
    assert on_cpu not in on_gpus and len(set(on_gpus)) == 1
    assert on_cpu == whole["t"][0]["model"]
    assert other == evaluate_rows(student_dir, [path], samples=samples)
    assert len(samples.read_bytes().splitlines()) == 8
    write_rows(path, [CHOICE])  # another version of the task
    assert evaluate_rows(TEACHER, [path], samples=samples)["t"][0]["file"] != whole["t"][0]["file"]
    samples.write_text("nonsense\n")
    with pytest.raises(ValueError, match="samples.jsonl:1: not a JSON object"):
        evaluate_tasks(TEACHER, [path], samples=samples)


def test_shipped_tasks_are_balanced_and_not_in_the_training_text():
    training = " ".join(" ".join(json.loads(line)["text"].split())
                        for path in (TEACHER / "data").glob("*.jsonl")
                        for line in path.read_text(encoding="utf-8").splitlines())
    assert len(TASKS) >= 8 and {path.stem.split("-")[0] for path in TASKS} == {
        "math", "code", "recall", "prose"}
    for path in TASKS:
        rows = read_task(path)
        assert len(rows) == 100
        for row in rows:
            text = row.get("prompt") or row["context"] + row["choices"][row["gold"]]
            assert " ".join(text.split("\nfind")[0].split()) not in training, row["where"]


# ------------------------------------------------------------------ code


def test_code_needs_the_flag(tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [CHOICE, CODE])
    with pytest.raises(ValueError, match="t.jsonl:2 .*--allow-code-execution"):
        evaluate_tasks(TEACHER, [path])
    assert evaluate_rows(TEACHER, [path], allow_code_execution=True)["t"][1]["score"] == 1


@pytest.mark.parametrize("program, passes", [
    ("assert 1 + 1 == 2", True),
    ("assert 1 + 1 == 3", False),
    ("x = 1\n" * 50_000 + "assert x == 1", True),  # 300 kB
    ("import sys; sys.exit(0)\nassert False", False),
    ("import os; os._exit(0)\nassert False", False),
    ("while True: pass", False),
    ("import time; time.sleep(60)", False),
    ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", False),
    ("x = bytearray(1 << 33)", False),
    ("while True: print('flood' * 1000)", False),
    ("import os\nassert 'HOME' not in os.environ and not os.listdir('.')", True),
    ("import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x')", True),
    ("import socket; socket.create_connection(('1.1.1.1', 80), timeout=1)", False),
    ("import asyncio; asyncio.run(asyncio.sleep(0))", True),  # which has a pair of sockets
    ("import subprocess; subprocess.run(['true'])", False),
    ("import threading\nfor i in range(80): threading.Thread(target=print).start()", True),
    ("import sys; sys.stdout.close(); sys.stdin.close()", True),
    ("from __future__ import annotations\nimport dataclasses, typing\n@dataclasses.dataclass\n"
     "class A:\n    n: typing.ClassVar[int] = 3\nassert not dataclasses.fields(A)", True),
    ("import pickle\nclass A: pass\npickle.loads(pickle.dumps(A()))", True),
    ("this is no program", False), ("\ud800", False)])
def test_programs_pass_only_if_their_tests_were_reached(program, passes):
    started = time.time()
    assert run_program(program, seconds=5 if passes else 1) == passes
    assert time.time() - started < 5


def test_programs_cannot_change_files_outside_by_accident(tmp_path):
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "folder").mkdir()
    for line in (f"open({str(tmp_path / 'new')!r}, 'w')", "open('../new', 'w')",
                 f"import os; os.remove({str(tmp_path / 'kept')!r})",
                 f"import os; os.rename({str(tmp_path / 'kept')!r}, 'mine')",
                 f"import os; os.symlink('mine', {str(tmp_path / 'new')!r})",
                 f"import shutil; shutil.rmtree({str(tmp_path)!r})",
                 f"import sqlite3; sqlite3.connect({str(tmp_path / 'new')!r})",
                 f"import pathlib; pathlib.Path({str(tmp_path)!r}, 'folder').rmdir()"):
        assert not run_program(line, seconds=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "kept"]


# ------------------------------------------------------------------ gates, bridge, command


def test_gate_map_is_the_median_of_the_gates(student_dir):
    scorer = Scorer(student_dir)
    texts = ["def f(x):\n    return x\n" * 20, "table: k V m Q\nfind: m Q"]
    assert torch.allclose(gate_map(scorer, texts), torch.tensor(-2.0).sigmoid(), atol=1e-4)
    for layer, block in enumerate(scorer.model.model["layers"]):
        block.self_attn.output_gate.bias.data += torch.arange(4.0) * layer
    medians = gate_map(scorer, texts, tokens=32)
    assert medians.shape == (4, 4)
    assert torch.allclose(medians[3], torch.sigmoid(-2 + 3 * torch.arange(4.0)), atol=1e-3)
    gate = scorer.model.model["layers"][3].self_attn.output_gate
    torch.nn.init.normal_(gate.weight)
    seen = []
    with torch.no_grad():
        gate.register_forward_hook(lambda module, inputs, logits: seen.append(logits[0].sigmoid()))
        medians = gate_map(scorer, texts)
    expected = torch.cat(seen, dim=1)  # (H, tokens)
    assert (expected.mean(1) - expected.median(1).values).abs().max() > 0.05
    assert torch.allclose(medians[3], expected.median(1).values, atol=1e-3)
    seen.clear()  # no row is longer than what the model was made to read
    gate_map(scorer, ["one two " * 2000], tokens=4096, rows=1)
    assert [gates.shape[-1] for gates in seen] == [512]
    with pytest.raises(ValueError, match="no output gates"):
        gate_map(Scorer(TEACHER), texts)


def test_lm_eval_gives_the_same_numbers(student_dir, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    scorer = Scorer(student_dir)
    files = {kind: write_rows(tmp_path / f"{kind}.jsonl", [
        {**row, "gold": str(row["gold"]), "where": ""} for row in read_task(path)[:20]])
        for kind, path in (("choice", ROOT / "tests/tasks/prose-order.jsonl"),
                           ("text", ROOT / "tests/tasks/math-sub.jsonl"))}

    def rows_of(kind):
        return {"dataset_path": "json", "test_split": "test",
                "dataset_kwargs": {"data_files": {"test": str(files[kind])}}}

    tasks = [
        {**rows_of("choice"), "task": "choice",
         "output_type": "multiple_choice", "doc_to_text": "{{context}}", "target_delimiter": "",
         "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold|int}}",
         "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
        {**rows_of("text"), "task": "text",
         "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{gold}}",
         "generation_kwargs": {"until": ["\n"], "max_gen_toks": 32},
         "metric_list": [{"metric": "exact_match"}]}]
    theirs = lm_eval.simple_evaluate(model=evaluate.lm_eval_model(scorer), tasks=tasks,
                                     log_samples=True, bootstrap_iters=0)
    ours = evaluate_rows(student_dir, [ROOT / "tests/tasks/prose-order.jsonl",
                                       ROOT / "tests/tasks/math-sub.jsonl"], limit=20)
    for sample, row in zip(theirs["samples"]["choice"], ours["prose-order"]):
        assert [r[0][0] for r in sample["resps"]] == row["logprobs"]
        assert sample["acc"] == row["acc"]
    for sample, row in zip(theirs["samples"]["text"], ours["math-sub"]):
        assert sample["resps"][0][0] == row["output"]
        assert sample["exact_match"] == row["score"]


def test_rolling_loglikelihood_predicts_each_token_once(student_dir):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    scorer = Scorer(student_dir)
    scorer.max_tokens = 20
    text = "The magic number is 42. " * 6
    [total] = evaluate.lm_eval_model(scorer).loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), 0)])
    ids, expected = tuple(scorer.tokenizer.encode(text, bos=False)), 0.0
    for a in range(0, len(ids), 20):
        new = ids[a:a + 20]
        context = (scorer.tokenizer.bos_id,) if a == 0 else ids[a + len(new) - 21:a]
        expected += direct(scorer.model, context, new)[0]
    assert total == pytest.approx(expected, abs=1e-3)


def test_the_harness_s_other_names_for_a_limit_are_read_and_sampling_is_refused(
        student_dir, capsys):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    scorer = Scorer(student_dir)

    def said(**options):
        return evaluate.lm_eval_model(scorer).generate_until([Instance(
            "generate_until", {}, ("sum: 1+2=", {"until": ["", "no such end"], **options}), 0)])

    full = said(max_gen_toks=12)
    assert "requests were too long" not in capsys.readouterr().out
    scorer.max_tokens = 15
    said(max_gen_toks=12)
    evaluate.lm_eval_model(scorer).loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in (
        ("word " * 20, " end"), ("a", " b"))])
    said_so = capsys.readouterr().out
    assert "1 of 1 requests were too long and lost" in said_so and "1 of 2 requests" in said_so
    scorer.max_tokens = 512
    assert full[0] and full == said(max_new_tokens=12) == said(max_tokens=12, temperature=0.0)
    for sampled in ({"temperature": 0.8}, {"do_sample": True}, {"num_beams": 2}):
        with pytest.raises(ValueError, match="greedily only"):
            said(**sampled)


def test_lm_eval_s_command_runs_in_a_process_of_its_own():
    pytest.importorskip("lm_eval")  # which loads its parts when they are asked for
    result = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", "lm-eval", "--model", TEACHER, "--tasks", "nosuch"],
        capture_output=True, text=True)
    assert result.returncode == 2 and "'nosuch' is none of" in result.stderr.splitlines()[-1]


def test_a_choice_that_melts_into_its_context_is_refused_before_a_model_is_loaded(tmp_path):
    for choices, words in ((["t", "r"], "has 0 tokens"), ([" sat" * 600, " b"], "expected 1 to")):
        path = write_rows(tmp_path / "t.jsonl", [
            {**CHOICE, "context": "the ca", "choices": choices, "gold": 0}])
        with pytest.raises(ValueError, match=words):
            evaluate.read_tasks(TEACHER, [path])


def test_chat_prompts_are_the_tokenizer_s_and_a_begun_answer_stays_open(student_dir):
    pytest.importorskip("lm_eval")
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    scorer = Scorer(student_dir)
    # As Qwen 3's, the template trims, and writes an empty thought before an answer that is whole.
    scorer.tokenizer.chat_templates = {"default": (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think></think>"
        "{% endif %}{{ m.content | trim }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")}
    bridge = evaluate.lm_eval_model(scorer)
    chat = [{"role": "user", "content": "2+3?"}]
    assert bridge.apply_chat_template(chat) == "<user>2+3?</><assistant>"
    begun = [*chat, {"role": "assistant", "content": "It is "}]
    expected, _ = chat_template_utils.render_jinja_template(
        [begun], chat_template=scorer.tokenizer.chat_templates["default"],
        continue_final_message=True)
    assert [bridge.apply_chat_template(begun, add_generation_prompt=False)] == expected


def test_compare_fills_every_field():
    def rows(*scores, lost=0):
        return [{"score": s, "chance": 0.25, "lost_tokens": lost} for s in scores]

    report = evaluate.make_report({"a": rows(1, 1, 0, 0, lost=3), "b": rows(1, 1, 1, 1)},
                                  {"s": {"a": rows(1, 1, 0, 0), "b": rows(1, 1, 1, 0, lost=1)}})
    s = report["students"]["s"]
    assert report["contexts_cut"] == 8 and report["rows"] == {"a": 4, "b": 4}
    assert report["teacher"] == {"a": 0.5, "b": 1.0} and s["scores"] == {"a": 0.5, "b": 0.75}
    assert s["recovery"] == {"a": 1.0, "b": 0.75}
    assert s["recovery_above_chance"] == {"a": 1.0, "b": pytest.approx(0.5 / 0.75)}
    assert s["win_and_tie"] == 0.5 and s["critical_tolerance"] == 0
    assert s["intervals"]["p_lossless"] == 1  # "a" ties in every draw, and half is enough


@pytest.mark.filterwarnings("error")  # such as matplotlib's where the legend fills the picture
def test_long_names_leave_room_for_the_curves(tmp_path):
    pytest.importorskip("matplotlib")
    rows = {"t": [{"score": 1.0, "chance": 0.0, "lost_tokens": 0}]}
    students = {f"/{'long/' * 40}{i}": rows for i in range(6)}
    evaluate.save_picture(tmp_path / "a.png", evaluate.draw_curves,
                          evaluate.make_report(rows, students))


def test_compare_command_reports_and_goes_on(tmp_path, student_dir, capsys):
    out = tmp_path / "report"
    command = ["compare", "--teacher", str(TEACHER), "--student", str(student_dir), "--limit", "2",
               "--device", "cpu", "--out", str(out), "--tasks", *map(str, TASKS[:4])]
    evaluate.main(command)
    first = capsys.readouterr().out
    assert "alpha*" in first and "C_0" in first
    report = json.loads((out / "report.json").read_text())
    student = report["students"][str(student_dir)]
    assert student["scores"].keys() == report["teacher"].keys() == {p.stem for p in TASKS[:4]}
    assert student["critical_tolerance"] == critical_tolerance(student["scores"], report["teacher"])
    assert "pip install matplotlib" in first or (out / "win_and_tie.png").exists()
    evaluate.main(command)
    assert capsys.readouterr().out == first
    command[command.index(str(student_dir))] = str(TEACHER)
    evaluate.main(command)
    assert f"in it as well, add --student {student_dir}" in capsys.readouterr().out


# ------------------------------------------------------------------ speed


def speed(out, *flags):
    """Run `speed` on tiny cells; returns the cells of speed.json."""
    window = [] if "--student" in flags else ["--window", "16"]
    evaluate.main(["speed", "--new-tokens", "2", "--seconds", "0", *window,
                   "--device", "cpu", "--out", str(out), *flags])
    return json.loads((out / "speed.json").read_text())["cells"]


def test_speed_measures_every_cell(tmp_path, capsys):
    cells = speed(tmp_path, "--contexts", "32", "64", "--batches", "1", "2")
    assert [(c["batch"], c["context"]) for c in cells] == [(1, 32), (1, 64), (2, 32), (2, 64)]
    for cell in cells:
        for m in (cell["teacher"], cell["student"]):
            assert [*m] == list(evaluate.QUANTITIES[:-1])  # no GPU
            assert all(0 < value < float("inf") for value in m.values())
            assert m["decode_tokens_per_s"] * m["decode_step_ms"] == pytest.approx(
                1000 * cell["batch"])
            assert m["prefill_tokens_per_s"] * m["first_token_ms"] == pytest.approx(
                1000 * cell["batch"] * cell["context"])
        # 4 layers, keys and values, 2 heads, 32 wide, fp32; and int64 lengths and positions
        counters = 8 * (4 + cell["batch"])
        assert round(1e6 * cell["teacher"]["cache_MB"]) - counters == (
            cell["batch"] * (cell["context"] + 2) * 4 * 2 * 2 * 32 * 4)
        assert round(1e6 * cell["student"]["cache_MB"]) - counters == cell["batch"] * (
            round(1e6 * cells[0]["student"]["cache_MB"]) - 8 * (4 + 1))  # nothing that grows
    shown = capsys.readouterr().out
    assert all(shown.count(f"\n{name} ") == 4 for name in evaluate.QUANTITIES[:-1])
    assert "pip install matplotlib" in shown or (tmp_path / "speed.png").stat().st_size > 10_000
    assert evaluate.number(int, 1)("4k") == 4096


def test_medians_leave_the_warm_up_out(monkeypatch):
    steps = iter([9.0, 1.0, 3.0, 5.0, 9.0, 2.0])
    monkeypatch.setattr(evaluate, "time_once", lambda *_: {"decode_step_ms": next(steps)})
    assert evaluate.measure_cell({"a": None}, 3, 10, 2, seconds=1e9) == {
        "a": {"decode_step_ms": 3.0}}
    assert evaluate.measure_cell({"a": None}, 3, 10, 2, seconds=0) == {  # one counts, always
        "a": {"decode_step_ms": 2.0}}


def test_a_cell_out_of_memory_is_named_and_the_grid_goes_on(tmp_path, monkeypatch, capsys):
    def limited(model, batch, context, new_tokens):
        if context == 64 and model.config.hybrid is None:
            raise error
        return dict.fromkeys(evaluate.QUANTITIES, 1.0)

    monkeypatch.setattr(evaluate, "time_once", limited)
    monkeypatch.setattr(evaluate, "draw_speed", lambda *_: None)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")):
        cells = speed(tmp_path, "--contexts", "32", "64", "128", "--batches", "1")
        assert [cell["teacher"] == {} for cell in cells] == [False, True, False]
        assert all(cell["student"]["decode_step_ms"] == 1 for cell in cells)
        assert "OOM" in capsys.readouterr().out
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        speed(tmp_path, "--contexts", "64")


def test_ctrl_c_keeps_the_cells_that_were_measured(tmp_path, monkeypatch, capsys):
    def interrupted(models, batch, context, *args):
        if context == 64:
            raise KeyboardInterrupt
        return {name: dict.fromkeys(evaluate.QUANTITIES, 1.0) for name in models}

    monkeypatch.setattr(evaluate, "measure_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        speed(tmp_path, "--contexts", "32", "64", "--batches", "1")
    assert [cell["context"] for cell in json.loads((tmp_path / "speed.json").read_text())[
        "cells"]] == [32]
    assert "context 32" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.tmp"))


def test_random_layers_have_the_shape_of_the_config(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(evaluate, "measure_cell", lambda models, *_: seen.update(models) or {
        name: dict.fromkeys(evaluate.QUANTITIES, 1.0) for name in models})
    monkeypatch.setattr(evaluate, "draw_speed", lambda *_: None)
    folder = tmp_path / "shape"
    folder.mkdir()
    (folder / "config.json").write_bytes((TEACHER / "config.json").read_bytes())  # no weights
    speed(tmp_path, "--teacher", str(folder), "--random-layers", "6", "--contexts", "32")
    for model in seen.values():
        assert len(model.model["layers"]) == 6 == len(model.config.layer_windows)
        assert model(torch.tensor([[1, 2, 3]])).isfinite().all()
    real = load_pretrained(TEACHER).model["layers"][0]
    assert ([p.shape for p in seen["teacher"].model["layers"][0].parameters()]
            == [p.shape for p in real.parameters()])


def test_speed_refuses_what_it_cannot_measure(tmp_path, student_dir, capsys):
    out = tmp_path / "out"
    for flags, words in ((["--contexts", "0"], "'0' is not a whole number from 1 to"),
                         (["--contexts", "4q"], "'4q'"),
                         (["--seconds", "nan"], "'nan' is not a number from 0 to"),
                         (["--batches", "1", "-1"], "--batches: '-1' is not a whole number from 1")):
        with pytest.raises(SystemExit) as status:
            speed(out, *flags)
        assert status.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]
    for flags, words in ((["--teacher", str(student_dir)], "student: .* this model is a student"),
                         (["--student", str(TEACHER)], "--student .* is no student of"),
                         (["--teacher", str(ROOT / "tests/bio_teacher"), "--student",
                           str(student_dir)], "is no student of"),
                         (["--device", "mps"], "--device mps: .* take --device cpu")):
        with pytest.raises(ValueError, match=words):
            speed(out, *flags)
    assert not out.exists()
    cells = speed(out, "--student", str(student_dir), "--contexts", "32", "--batches", "1")
    assert cells[0]["student"]["decode_step_ms"] > 0


# ------------------------------------------------------------------ bad input


def test_bad_input_is_one_sentence(tmp_path, student_dir):
    out, data = str(tmp_path / "r"), tmp_path / "a.jsonl"
    data.write_text('{"text": "fine\u2028so"}\n{"text": 3}\n', encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    (tmp_path / "c.txt").write_text("")
    gates = ["gates", "--student", str(student_dir), "--data"]
    for arguments, words in (
            (["compare", "--teacher", str(TEACHER), "--student", str(student_dir), "--out", out,
              "--tasks", str(tmp_path / "none.jsonl")], "none.jsonl"),
            (["gates", "--student", str(TEACHER), "--data", str(TASKS[0])], '1: expected "text"'),
            ([*gates, str(data)], 'a.jsonl:2: expected "text"'),
            ([*gates, str(tmp_path / "b.txt")], "b.txt: 'utf-8' codec"),
            ([*gates, str(tmp_path / "c.txt")], "--data: the texts are empty"),
            ([*gates, str(tmp_path / "d.csv")], "d.csv: name a .jsonl or .txt"),
            (["speed", "--teacher", str(tmp_path / "none"), "--out", out], "none"),
            (["speed", "--student", str(student_dir), "--window", "8", "--out", out],
             "--window is of an untrained student"),
            ([*gates, str(TASKS[0]), "--picture", str(tmp_path / "no/g.png")], "in a folder that exi"),
            ([*gates, str(TASKS[0]), "--picture", str(tmp_path / "g")], "ends in one of .png"),
            (["lm-eval", "--model", str(TEACHER), "--tasks", "nosuchtask"],
             "'nosuchtask' is none of|pip install lm_eval"),
            (["lm-eval", "--model", str(TEACHER), "--tasks", "piqa", "--device", "abc"],
             "--device abc|pip install lm_eval")):
        with pytest.raises((ValueError, OSError), match=words):
            evaluate.main(arguments)


def test_a_command_ends_with_one_sentence_and_status_2_and_survives_an_ascii_terminal(tmp_path):
    out = tmp_path / "né"
    out.mkdir()
    write_rows(out / "samples-the-teacher.jsonl", [{"model": "x", "file": "y", "id": "z"}])
    tasks = write_rows(tmp_path / "t.jsonl", [CHOICE])
    (tmp_path / "none").mkdir()
    (tmp_path / "none/config.json").write_text((TEACHER / "config.json").read_text())  # no weights
    command = [sys.executable, ROOT / "evaluate.py", "compare", "--teacher", TEACHER, "--student",
               tmp_path / "none", "--tasks", tasks, "--out", out, "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, env={
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"})
    assert "n?/samples-the-teacher.jsonl: 1 lines are not of this model" in result.stdout
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
