"""merge.py: sums against float64, TIES against the paper's definition, and what it refuses."""

import contextlib
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge as merging
from merge import merge, simplex_grid, sweep
from model import ModelConfig, Transformer, load_pretrained, save_pretrained, sha256

CONFIG = dict(model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48,
              num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
              hybrid=dict(window=8, sinks=2, mixer="hybrid", folded=False))
INDEX = "model.safetensors.index.json"


def build_student(folder, seed, dtype=torch.float32):
    """A folder with a random student; the new parameters stay fp32, as distill.py stores them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    model = Transformer(ModelConfig.from_hf(folder))
    random = torch.Generator().manual_seed(seed)
    weights = {n: torch.randn(p.shape, generator=random) for n, p in model.named_parameters()}
    save_file({n: w if "gate" in n else w.to(dtype) for n, w in weights.items()},
              folder / "model.safetensors")
    return folder


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def students(request, tmp_path):
    return [build_student(tmp_path / f"expert-{i}", i, request.param) for i in range(4)]


@pytest.fixture
def pair(tmp_path):
    return [build_student(tmp_path / name, i) for i, name in enumerate("AB")]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(merging, "PIECE_BYTES", 1 << 10)  # or no tensor here has a second piece


def stored(folder):
    return {n: w for file in folder.glob("*.safetensors") for n, w in load_file(file).items()}


def change(folder, name, new):
    """Replace (new: a tensor) or remove (None) one tensor of a folder."""
    weights = stored(folder) | {name: new}
    save_file({n: w for n, w in weights.items() if w is not None}, folder / "model.safetensors")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ------------------------------------------------------------------ linear, Eq. 14


def test_linear_is_a_float64_sum_rounded_once(students, tmp_path):
    lambdas = (.35, .35, .2, .1)
    merge(students, tmp_path / "out", weights=lambdas)
    experts, merged = [stored(s) for s in students], stored(tmp_path / "out")
    assert merged.keys() == experts[0].keys()
    for name, got in merged.items():
        want = sum(w * e[name].double() for w, e in zip(lambdas, experts))
        assert got.dtype == experts[0][name].dtype
        assert torch.equal(got, want.to(got.dtype)), name


def test_weights_are_uniform_by_default(students, tmp_path):
    merge(students, tmp_path / "default")
    merge(students, tmp_path / "given", weights=[.25] * 4)
    assert all(torch.equal(w, stored(tmp_path / "given")[n])
               for n, w in stored(tmp_path / "default").items())


@pytest.mark.parametrize("weights, count", [([1], 1), ([1, 0], 2)], ids=["alone", "beside a zero"])
def test_one_model_with_weight_one_comes_out_bit_for_bit(students, tmp_path, weights, count):
    name = "model.norm.weight"
    change(students[0], name, torch.full_like(stored(students[0])[name], -0.0))
    merge(students[:count], tmp_path / "out", weights=weights)
    file = "model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (students[0] / file).read_bytes()


def test_output_loads_as_a_student_and_remembers_its_inputs(pair, tmp_path):
    merge(pair, tmp_path / "out", weights=[.75, .25])
    a, b, merged = (dict(load_pretrained(f).named_parameters()) for f in [*pair, tmp_path / "out"])
    for name, p in merged.items():
        torch.testing.assert_close(p, .75 * a[name] + .25 * b[name])
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert record["method"] == "linear"
    assert [(r["directory"], r["weight"]) for r in record["inputs"]] == [
        (str(pair[0]), .75), (str(pair[1]), .25)]
    assert all(len(r["sha256"]) == 64 for r in record["inputs"])


def test_shards_make_no_difference(pair, tmp_path):
    for folder in pair:
        save_pretrained(load_pretrained(folder), folder.with_name(folder.name + "-sharded"),
                        max_shard_bytes=20_000)
    sharded = [folder.with_name(folder.name + "-sharded") for folder in pair]
    merge(pair, tmp_path / "whole")
    merge([sharded[0], pair[1]], tmp_path / "parts")  # laid out as the first: in shards
    whole, parts = stored(tmp_path / "whole"), stored(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert whole.keys() == parts.keys() and all(torch.equal(whole[n], parts[n]) for n in whole)
    load_pretrained(tmp_path / "parts")


# ------------------------------------------------------------------ TIES


def dense_ties(seed, experts, weights, density):
    """The definition (arXiv 2306.01708, section 4) on one whole tensor, with a sort."""
    changes = []
    for expert in experts:
        change = (expert.double() - seed.double()).flatten()
        order = change.abs().argsort(descending=True)
        kept = torch.zeros_like(change)
        kept[order[:round(density * len(order))]] = change[order[:round(density * len(order))]]
        changes.append(kept)
    merged = torch.zeros_like(changes[0])
    for p in range(len(merged)):
        sign = sum(w * c[p] for w, c in zip(weights, changes)).sign()
        agreeing = [(w, c[p]) for w, c in zip(weights, changes) if c[p] * sign > 0]
        if agreeing:
            merged[p] = sum(w * c for w, c in agreeing) / sum(w for w, _ in agreeing)
    return (seed.double() + merged.view(seed.shape)).to(seed.dtype)


@pytest.mark.parametrize("weights", [[1 / 3] * 3, [.5, .3, .2]], ids=["uniform", "weighted"])
@pytest.mark.parametrize("density", [.2, .77])
def test_ties_equals_the_dense_definition(tmp_path, weights, density):
    *folders, seed = [build_student(tmp_path / f"{i}", i) for i in range(4)]
    merge(folders, tmp_path / "out", weights=weights, method="ties", seed=seed, density=density)
    merged, start, experts = stored(tmp_path / "out"), stored(seed), [stored(f) for f in folders]
    for name in ("model.layers.1.self_attn.k_proj.weight", NORM):  # two pieces, and less than one
        want = dense_ties(start[name], [e[name] for e in experts], weights, density)
        torch.testing.assert_close(merged[name], want, rtol=1e-6, atol=0)
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert record["density"] == density and record["seed"] == str(seed)


def test_ties_of_unchanged_experts_is_the_seed(pair, tmp_path):
    merge([pair[0], pair[0]], tmp_path / "out", method="ties", seed=pair[0])
    assert all(torch.equal(w, stored(pair[0])[n]) for n, w in stored(tmp_path / "out").items())


def test_all_that_a_tokenizer_reads_is_copied(pair, tmp_path):
    names = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja")
    for folder in pair:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)
    merge(pair, tmp_path / "out")
    for name in names:
        assert (tmp_path / "out" / name).read_text() == name
    (pair[1] / "generation_config.json").write_text('{"temperature": 0.7}')  # of taste
    merge(pair, tmp_path / "tasted")
    (pair[1] / names[0]).write_text("another template")
    with pytest.raises(ValueError, match="chat_template.jinja is sha256"):
        merge(pair, tmp_path / "other")


def test_ties_refuses_a_seed_that_is_not_the_experts(pair, tmp_path):
    """Their changes would be counted from another origin, and the mean of them be noise."""
    seed = {"seed_sha256": sha256(pair[0] / "model.safetensors")}
    for lineage, refused in ((seed, False), ({"seed_sha256": "00"}, True)):
        (pair[1] / "lineage.json").write_text(json.dumps(lineage))
        with pytest.raises(ValueError, match="B was not distilled from the seed") if refused else (
                contextlib.nullcontext()):
            merge([pair[1]], tmp_path / f"{refused}", method="ties", seed=pair[0])


def test_ties_keeps_the_seed_where_signs_are_even(pair, tmp_path):
    seed, plus, minus = (build_student(tmp_path / n, 5) for n in ("seed", "plus", "minus"))
    for folder, step in ((seed, 0.), (plus, 1.), (minus, -1.)):
        change(folder, "model.norm.weight", torch.full((32,), 2 + step))
    merge([plus, minus], tmp_path / "out", method="ties", seed=seed)
    assert torch.equal(stored(tmp_path / "out")["model.norm.weight"], torch.full((32,), 2.))


# ------------------------------------------------------------------ refusals

GATE, NORM = "model.layers.0.self_attn.input_gate.weight", "model.norm.weight"
def only_index(folder, shard):
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))


REFUSALS = {  # name -> (what is done to folder B, what the error must name)
    "missing tensor": (lambda b: change(b, NORM, None), f"tensor {NORM} is missing"),
    "unexpected tensor": (lambda b: change(b, "more", torch.ones(2)), "tensor more is F32"),
    "shape": (lambda b: change(b, NORM, torch.ones(31)), "F32 [31], in"),
    "dtype": (lambda b: change(b, NORM, torch.ones(32).half()), "F16 [32], in"),
    "integers": (lambda b: change(b, NORM, torch.ones(32).int()), "I32, as in a quantised"),
    "config": (lambda b: edit(b / "config.json", rms_norm_eps=1e-3), "norm_eps is 0.001"),
    "features": (lambda b: edit(b / "config.json", hybrid=dict(CONFIG["hybrid"], features=2)),
                 "'features': 2"),
    "hybrid": (lambda b: edit(b / "config.json", hybrid=dict(window=9)), "hybrid is {'window': 9"),
    "tokenizer": (lambda b: (b / "tokenizer.json").write_text("[]"), "tokenizer.json is sha256"),
    "no tokenizer": (lambda b: (b / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no letters": (lambda b: (b / "vocab.txt").write_text("A\nC\n"), "vocab.txt is sha256"),
    "NaN": (lambda b: change(b, NORM, torch.full((32,), torch.nan)), f"{NORM} has NaN or inf"),
    "infinite": (lambda b: change(b, NORM, torch.full((32,), torch.inf)), "distil it again"),
    "no folder": (shutil.rmtree, "B holds neither model.safetensors"),
    "truncated": (lambda b: os.truncate(b / "model.safetensors", 5000), "is truncated"),
    "shard outside": (lambda b: only_index(b, "../a.safetensors"), "not a plain"),
    "lost shard": (lambda b: only_index(b, "a.safetensors"), "missing; copy it again"),
    "other seed": (lambda b: (b / "lineage.json").write_text('{"seed_sha256": "ff"}'),
                   "different stage-I seeds"),
}


@pytest.mark.parametrize("damage, words", REFUSALS.values(), ids=REFUSALS.keys())
def test_mismatch_is_refused_and_nothing_written(pair, tmp_path, damage, words):
    (pair[0] / "lineage.json").write_text('{"seed_sha256": "00"}')
    damage(pair[1])
    with pytest.raises((ValueError, OSError)) as error:
        merge(pair, tmp_path / "out")
    assert words in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} <= {"A", "B"}


@pytest.mark.parametrize("options, words", [
    (dict(weights=[1.]), "1 weights are given for 2 folders"),
    (dict(weights=[.5, .4]), "must sum to 1"),
    (dict(weights=[1.5, -.5]), "none may be negative"),
    (dict(weights=[.5, float("nan")]), "must sum to 1"),
    (dict(method="ties"), "ties needs --seed-model"),
    (dict(directories=[]), "must sum to 1"),
    (dict(method="slerp"), "method 'slerp'"),
    (dict(density=0), "density 0"),
])
def test_bad_settings_are_refused(pair, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        merge(**{"directories": pair, "output": tmp_path / "out", **options})
    assert {p.name for p in tmp_path.iterdir()} == {"A", "B"}


def test_all_mismatches_come_in_one_error(pair, tmp_path):
    change(pair[1], NORM, torch.ones(31))
    change(pair[1], GATE, None)
    edit(pair[1] / "config.json", rope_theta=1.)
    (pair[1] / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError) as error:
        merge(pair, tmp_path / "out")
    for words in (NORM, GATE, "rope", "tokenizer.json"):
        assert words in str(error.value)


@pytest.mark.parametrize("inputs", ["out", "out.sweep/candidate"])
def test_inputs_are_safe_from_the_output(pair, tmp_path, inputs):
    (tmp_path / inputs).parent.mkdir(exist_ok=True)
    shutil.copytree(pair[0], tmp_path / inputs)
    with pytest.raises(ValueError, match="not empty|the input .* lies where"):
        merge([tmp_path / inputs, pair[1]], tmp_path / "out")
    assert stored(tmp_path / inputs).keys() == stored(pair[0]).keys()


def test_a_link_is_followed_and_what_is_the_users_own_stays(pair, tmp_path):
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp/thesis.txt").touch()
    (tmp_path / "large/disk").mkdir(parents=True)
    (tmp_path / "large/disk.0123abcd.tmp").mkdir()  # of a killed merge
    (tmp_path / "out").symlink_to(tmp_path / "large/disk")
    merge(pair, tmp_path / "out")
    assert stored(tmp_path / "large/disk").keys() == stored(pair[0]).keys()
    assert (tmp_path / "out").is_symlink() and (tmp_path / "out.tmp/thesis.txt").exists()
    assert [p.name for p in (tmp_path / "large").iterdir()] == ["disk"]


def test_output_that_is_not_empty_is_refused(pair, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(ValueError, match="not empty"):
        merge(pair, tmp_path / "out")


@pytest.mark.parametrize("failure", [OSError("no space"), KeyboardInterrupt()])
def test_failure_while_writing_leaves_nothing(pair, tmp_path, monkeypatch, failure):
    def pieces(*_):
        yield torch.zeros(3)
        raise failure
    monkeypatch.setattr(merging, "merged_pieces", pieces)
    with pytest.raises(type(failure)):
        merge(pair, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"A", "B"}


def test_unknown_parent_is_said(pair, tmp_path, capsys):
    merge(pair, tmp_path / "out")
    assert "lineage.json" in capsys.readouterr().out
    for folder in pair:
        (folder / "lineage.json").write_text('{"seed_sha256": "00"}')
    merge(pair, tmp_path / "again")
    merge([tmp_path / "again", pair[0]], tmp_path / "further")  # its seed is its experts'
    assert "lineage.json" not in capsys.readouterr().out
    assert not (tmp_path / "out/lineage.json").exists()  # theirs was not known
    (pair[0] / "lineage.json").unlink()
    merge(pair, tmp_path / "one", weights=[0, 1])
    assert (tmp_path / "one/lineage.json").exists()


# ------------------------------------------------------------------ memory

def anonymous():
    """Bytes of this process's memory, mapped files excluded."""
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    monkeypatch.undo()  # pieces as large as they are
    first = build_student(tmp_path / "0", 0, torch.bfloat16)
    change(first, "large", torch.ones(1024, 5_000, dtype=torch.bfloat16))  # 40 MB in float64
    folders = [shutil.copytree(first, tmp_path / str(i)) for i in (1, 2, 3)]
    found = []
    for options in (dict(), dict(method="ties", seed=first)):
        before, peak, over = anonymous(), 0, threading.Event()

        def watch():
            nonlocal peak
            while not over.wait(0.002):
                peak = max(peak, anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        merge(folders, tmp_path / f"out-{len(options)}", **options)
        over.set()
        watcher.join()
        found.append((peak - before) >> 20)
    assert found[0] < 50 and found[1] < 100, f"{found} MB"  # ties: one tensor twice, in fp32


# ------------------------------------------------------------------ sweep


def closeness(target):
    """A score that is best (0) where the merged final norm is `target`."""
    return lambda folder: -(stored(folder)[NORM].mean() - target).abs().item()


@pytest.fixture
def triple(tmp_path):
    folders = [build_student(tmp_path / str(i), i) for i in range(3)]
    for i, folder in enumerate(folders):
        change(folder, NORM, torch.full((32,), float(i)))
    return folders


def test_grid_covers_the_simplex():
    grid = simplex_grid(3, .25)
    assert len(grid) == len(set(grid)) == 15
    assert all(sum(w) == 1 and min(w) >= 0 for w in grid)
    for step in (.3, 0, -1, float("nan"), 1e-5):  # the last: 5e9 models to write and score
        with pytest.raises(ValueError, match="step"):
            simplex_grid(3, step)


def test_sweep_merges_the_best_and_records_all(triple, tmp_path):
    best = sweep(triple, tmp_path / "out", closeness(1.75), step=.25)
    assert best == (0, .25, .75)
    assert torch.equal(stored(tmp_path / "out")[NORM], torch.full((32,), 1.75))
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert len(record["scores"]) == 15 and [r["weight"] for r in record["inputs"]] == [0, .25, .75]
    assert {p.name for p in (tmp_path / "out.sweep").iterdir()} == {"results.jsonl"}


def test_equal_scores_go_to_the_most_even_lambdas(triple, tmp_path):
    assert sweep(triple, tmp_path / "out", lambda folder: 1, step=1 / 3) == (1 / 3, 1 / 3, 1 / 3)


def test_greedy_soup_adds_what_does_no_harm(triple, tmp_path):
    best = sweep(triple, tmp_path / "out", closeness(1.4), greedy=True)
    assert best == (0, .5, .5)  # from 1 on: 2 helps (1.5), then 0 harms (1)
    assert len(json.loads((tmp_path / "out/merge.json").read_text())["scores"]) == 5


def test_of_equal_scores_the_most_even_lambdas_win(triple, tmp_path):
    # (0, .5, .5) has no larger weight than (.25, .25, .5), and leaves an expert out.
    best = sweep(triple, tmp_path / "out", lambda folder: 1, step=.25)
    assert sorted(best) == [.25, .25, .5]


def test_sweep_goes_on_where_it_stopped(triple, tmp_path):
    scored, score = [], closeness(.5)

    def stops_after_four(folder):
        if len(scored) == 4:
            raise OSError("stopped")
        scored.append(json.loads((folder / "merge.json").read_text())["inputs"])
        return score(folder)

    with pytest.raises(OSError, match="stopped"):
        sweep(triple, tmp_path / "out", stops_after_four, step=.5)
    assert not (tmp_path / "out").exists()
    with open(tmp_path / "out.sweep/results.jsonl", "a") as f:
        f.write("[[0.5, 0")  # a crash in the middle of a line

    def counted(folder):
        scored.append(json.loads((folder / "merge.json").read_text())["inputs"])
        return score(folder)

    assert sweep(triple, tmp_path / "out", counted, step=.5) == (.5, .5, 0)
    assert len(scored) == 6 and len({str(s) for s in scored}) == 6


def test_scores_of_other_models_or_tasks_are_not_used(triple, tmp_path):
    def scored(**options):
        folders = []
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        sweep(triple, tmp_path / "out", lambda folder: folders.append(folder) or 1, step=1,
              **options)
        return len(folders)

    assert [scored(about="one"), scored(about="two"), scored(about="one")] == [3, 3, 0]
    change(triple[0], NORM, torch.ones(32))
    assert [scored(about="one"), scored(about="one")] == [3, 0]


def test_damaged_scores_are_named_by_line(triple, tmp_path):
    sweep(triple, tmp_path / "out", lambda folder: 1, step=1)
    shutil.rmtree(tmp_path / "out")
    results = tmp_path / "out.sweep/results.jsonl"
    results.write_text(results.read_text().replace("[0.0, 1.0", "[0.0; 1.0"))
    with pytest.raises(ValueError, match=r"results.jsonl:2: not a JSON object"):
        sweep(triple, tmp_path / "out", lambda folder: 1, step=1)


def test_score_that_is_not_a_number_is_refused(triple, tmp_path):
    with pytest.raises(ValueError, match="scores nan"):
        sweep(triple, tmp_path / "out", lambda folder: float("nan"))


# ------------------------------------------------------------------ the command


def test_command_merges_and_explains_errors(pair, tmp_path, capsys):
    merging.main([*map(str, pair), "--out", str(tmp_path / "out"), "--weights", ".25", ".75"])
    assert capsys.readouterr().out.startswith("linear merge into")
    want = .25 * stored(pair[0])[NORM].double() + .75 * stored(pair[1])[NORM].double()
    assert torch.equal(stored(tmp_path / "out")[NORM], want.float())
    with pytest.raises(ValueError, match="exists and is not empty; name a new folder"):
        merging.main([*map(str, pair), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("flags, words", [
    (["--greedy"], "are of a --sweep"), (["--step", ".5"], "are of a --sweep"),
    (["--sweep", "t.jsonl", "--greedy", "--step", ".5"], "--greedy tries uniform means only"),
    (["--density", ".5"], "--density is of --method ties")])
def test_flags_that_would_do_nothing_are_refused(pair, tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        merging.main([*map(str, pair), "--out", str(tmp_path / "out"), *flags])
    assert {p.name for p in tmp_path.iterdir()} == {"A", "B"}


def test_command_sweeps_over_task_files(pair, tmp_path, monkeypatch):
    import evaluate

    def scores(directory, task_files, *, device):  # two tasks, whose mean is best at (1, 0)
        first = json.loads((directory / "merge.json").read_text())["inputs"][0]["weight"]
        return {"one": first, "two": 0.5}

    monkeypatch.setattr(evaluate, "evaluate_tasks", scores)
    for folder in pair:
        shutil.copy(Path(__file__).parent / "teacher/tokenizer.json", folder)
    tasks = tmp_path / "tasks.jsonl"
    arguments = [*map(str, pair), "--out", str(tmp_path / "out"), "--sweep", str(tasks)]
    with pytest.raises(FileNotFoundError, match="tasks.jsonl"):
        merging.main(arguments)
    tasks.write_text('{"type": "essay"}')
    with pytest.raises(ValueError, match="tasks.jsonl:1: expected a type"):
        merging.main(arguments)
    row = {"id": "a", "type": "generate", "prompt": "a", "gold": "b", "max_new_tokens": 2048}
    tasks.write_text(json.dumps(row))
    with pytest.raises(ValueError, match="tasks.jsonl:1: max_new_tokens 2048 of 2048"):
        merging.main(arguments)
    tasks.write_text(json.dumps(dict(row, max_new_tokens=1)))
    with pytest.raises(ValueError, match="--device mps"):
        merging.main([*arguments, "--device", "mps"])
    assert {p.name for p in tmp_path.iterdir()} == {"A", "B", "tasks.jsonl"}
    merging.main([*arguments, "--device", "cpu"])
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert [r["weight"] for r in record["inputs"]] == [1, 0]
    assert max(s["score"] for s in record["scores"]) == .75
