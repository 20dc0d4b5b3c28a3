"""model.py: teachers against transformers, the mLSTM against float64, the window against a mask."""

import copy
import json
import math
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import model
import time_cpu
from model import (MIXERS, Cache, ModelConfig, Transformer, choose_kernels, decode_step,
                   generate, load_pretrained, mlstm_chunkwise, mlstm_recurrent, mlstm_step,
                   save_pretrained, stream, student_from_teacher, window_attention)

# ------------------------------------------------------------------ teachers on disk

SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=300, max_position_embeddings=256)
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=32, beta_fast=32,
            beta_slow=1, attention_factor=1.2079441541679836)
FAMILIES = {
    "llama3.1": ("llama", dict(rope_scaling=LLAMA3_ROPE, rope_theta=5e5, rms_norm_eps=1e-5)),
    "llama3.2-tied": ("llama", dict(tie_word_embeddings=True, head_dim=32)),
    "llama-bias": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-linear-rope": ("llama", dict(rope_scaling=dict(rope_type="linear", factor=4.0))),
    "llama-yarn": ("llama", dict(rope_scaling={**YARN, "attention_factor": None})),
    "mistral": ("mistral", dict(sliding_window=20)),
    "mistral-full": ("mistral", dict(sliding_window=None, head_dim=32)),
    "qwen2.5": ("qwen2", dict(rope_theta=1e6, sliding_window=8)),  # ignored: not in use
    "qwen2-sliding": ("qwen2", dict(use_sliding_window=True, sliding_window=24,
                                    max_window_layers=2)),
    "qwen3": ("qwen3", dict(head_dim=32)),
    "olmo2": ("olmo2", dict(rope_theta=5e5, eos_token_id=1, num_key_value_heads=4)),
    "olmo3": ("olmo3", dict(sliding_window=16, rope_scaling=YARN, rope_theta=5e5,
                            eos_token_id=1)),
}


def random_tokens(B=2, T=100, seed=1):
    return torch.randint(0, 300, (B, T), generator=torch.Generator().manual_seed(seed))


def wake_gates(student, seed=2):
    """Give a fresh student's new parameters values that make every branch matter."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "_gate" in name and p.dim() > 1 and "mlp" not in name:
                p.normal_(0, 0.3, generator=random)
            elif "output_gate.bias" in name:
                p.zero_()
    return student


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_teacher_logits_equal_transformers(folders, family):
    folder, hf = folders(family)
    tokens = random_tokens()
    expected = hf(tokens).logits
    assert expected.std() > 1  # otherwise the comparison proves little
    assert (load_pretrained(folder)(tokens) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama3.1", "qwen3", "olmo3"])
@torch.no_grad()
def test_bf16_rounds_in_the_same_places(folders, family):
    folder, hf = folders(family, torch.bfloat16)
    hf.set_attn_implementation("sdpa")
    model = load_pretrained(folder)
    assert model.lm_head_weight.dtype == torch.bfloat16
    a, b = model(random_tokens()).float(), hf(random_tokens()).logits.float()
    assert (a - b).abs().mean() < 0.05 and (a.argmax(-1) == b.argmax(-1)).float().mean() > 0.95


@torch.no_grad()
def test_old_and_new_spellings_of_rope_mean_the_same(folders, tmp_path):
    folder, hf = folders("llama3.1")
    config = json.loads((folder / "config.json").read_text())
    rope = {**LLAMA3_ROPE, "rope_theta": 5e5}
    config.pop("rope_parameters", None)
    spellings = [dict(rope_parameters=rope), dict(rope_theta=5e5, rope_scaling=LLAMA3_ROPE),
                 dict(rope_theta=5e5, rope_scaling={"type": "llama3", **{
                     k: v for k, v in LLAMA3_ROPE.items() if k != "rope_type"}})]
    for i, spelling in enumerate(spellings):
        copied = tmp_path / str(i)
        shutil.copytree(folder, copied)
        (copied / "config.json").write_text(json.dumps({**config, **spelling}))
        assert ModelConfig.from_hf(copied).layer_ropes == ModelConfig.from_hf(folder).layer_ropes


@pytest.mark.parametrize("flat", [True, False])
def test_olmo3_stretches_only_its_full_attention_layers(folders, tmp_path, flat):
    folder, _ = folders("olmo3")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {**YARN, "rope_theta": 5e5} if flat else {
        "full_attention": {**YARN, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    parsed = ModelConfig.from_hf(tmp_path)
    assert [rope.kind for rope in parsed.layer_ropes] == ["default"] * 3 + ["yarn"]
    assert parsed.layer_windows == (16, 16, 16, None)


@torch.no_grad()
def test_shards_dtype_and_strays(folders, tmp_path):
    folder, hf = folders("llama3.2-tied")
    hf.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    stray = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**load_file(first), stray: torch.ones(8)}, first, metadata={"format": "pt"})
    tokens = random_tokens()
    assert torch.equal(load_pretrained(tmp_path)(tokens), load_pretrained(folder)(tokens))
    assert load_pretrained(tmp_path, dtype=torch.bfloat16)(tokens).dtype == torch.bfloat16


def test_eos_ids_may_be_a_list_and_generation_config_wins(folders, tmp_path):
    folder, _ = folders("llama-bias")
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m/generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert ModelConfig.from_hf(tmp_path / "m").eos_ids == (7, 9)


def drop(tensors):
    del tensors["model.norm.weight"]


def misshape(tensors):
    tensors["model.norm.weight"] = torch.ones(3)


def add(tensors):
    tensors["model.layers.9.extra"] = torch.ones(3)


@pytest.mark.parametrize("fault, words", [
    (drop, "model.norm.weight is missing, by config.json (64,)"),
    (misshape, "model.norm.weight is (3,), by config.json (64,)"),
    (add, "model.layers.9.extra is (3,), by config.json absent")])
def test_every_wrong_tensor_is_named(folders, tmp_path, fault, words):
    shutil.copytree(folders("llama-bias")[0], tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    fault(tensors)
    save_file(tensors, tmp_path / "m/model.safetensors")
    with pytest.raises(ValueError) as error:
        load_pretrained(tmp_path / "m")
    assert words in str(error.value) and str(tmp_path / "m") in str(error.value)


def test_broken_folders_are_refused_in_one_sentence(folders, tmp_path):
    def damaged(change):
        target = tmp_path / "m"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folders("llama-bias")[0], target)
        change(target)
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            load_pretrained(target)
        assert "\n" not in str(error.value)
        return str(error.value)

    def config(**changes):
        def change(folder):
            c = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**c, **changes}))
        return change

    def index(weight_map):
        def change(folder):
            (folder / "model.safetensors").rename(folder / "model-1.safetensors")
            (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": weight_map}))
        return change

    def truncate(folder):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-100])

    def pickle(folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    norm = "model.norm.weight"
    assert "truncated" in damaged(truncate)
    assert "pickle" in damaged(pickle)
    assert "plain" in damaged(index({norm: "../model.safetensors"}))
    assert "plain" in damaged(index({norm: "/etc/model.safetensors"}))
    assert "missing" in damaged(index({norm: "gone.safetensors"}))
    assert "nothing" in damaged(index({"nothing": "model-1.safetensors"}))
    assert "config.json" in damaged(lambda f: (f / "config.json").unlink())
    assert "JSON" in damaged(lambda f: (f / "config.json").write_text("{"))
    assert "num_attention_heads" in damaged(config(num_attention_heads=10**9))
    assert "multiple" in damaged(config(num_key_value_heads=3))
    assert "gpt_neox" in damaged(config(model_type="gpt_neox"))
    assert "longrope" in damaged(config(rope_parameters={"rope_type": "longrope"}))


# ------------------------------------------------------------------ the mLSTM

GATES = {
    "ordinary": lambda r, shape: (torch.randn(shape, generator=r),
                                  torch.randn(shape, generator=r) + 2),
    "input +-30": lambda r, shape: (torch.randint(0, 2, shape, generator=r) * 60.0 - 30,
                                    torch.randn(shape, generator=r)),
    "forget near 0": lambda r, shape: (torch.randn(shape, generator=r),
                                       -30 * torch.rand(shape, generator=r)),
    "forget near 1": lambda r, shape: (torch.rand(shape, generator=r) * 60 - 30,
                                       torch.rand(shape, generator=r) * 20 + 5),
    "both wild": lambda r, shape: (torch.rand(shape, generator=r) * 60 - 30,
                                   torch.randn(shape, generator=r) * 15),
}


def mlstm_inputs(T, gates="ordinary", B=2, H=4, K=2, D=16, width=None, seed=0, peak=1.0):
    """q, k of `width` (D), v of D."""
    r, width = torch.Generator().manual_seed(seed), width or D
    q = (peak * torch.randn(B, H, T, width, generator=r)).softmax(-1)
    k = (peak * torch.randn(B, K, T, width, generator=r)).softmax(-1)
    v = torch.randn(B, K, T, D, generator=r)
    log_i, forget = GATES[gates](r, (B, H, T))
    state = (torch.rand(B, H, width, D, generator=r), torch.rand(B, H, width, generator=r) + 0.1,
             torch.randn(B, H, generator=r))
    return [q, k, v, log_i, F.logsigmoid(forget)], state


def outputs_and_gradients(form, inputs, state, dtype=torch.float32, **options):
    """h, the final state in comparable scale, and the gradients of a random projection of both."""
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    state = None if state is None else [x.to(dtype).requires_grad_() for x in state]
    h, (S, z, m) = form(*inputs, state=None if state is None else tuple(state), **options)
    r = torch.Generator().manual_seed(9)
    # S / sum(z): the state's direction. m only fixes the scale, and S, z come in e^m of each other.
    direction = S / z.sum(-1)[..., None, None]
    loss = sum((x * torch.randn(x.shape, generator=r).to(dtype)).sum() for x in (h, direction))
    leaves = inputs + (state[:2] if state else [])
    true_log_norm = m + z.sum(-1).log()
    return [h, direction, true_log_norm, *torch.autograd.grad(loss, leaves)]


def relative_error(a, b):
    # Of norms. Some gradients cancel to nothing (T = 1: h does not depend on q), so the scale is at
    # least 3, a tenth of what is usual here.
    return ((a - b).norm() / b.norm().clamp_min(3.0)).item()


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 150])
@pytest.mark.parametrize("with_state", [False, True])
def test_chunkwise_equals_recurrent(gates, T, with_state):
    inputs, state = mlstm_inputs(T, gates)
    state = state if with_state else None
    expected = outputs_and_gradients(mlstm_recurrent, inputs, state, torch.float64)
    for form in (mlstm_chunkwise, mlstm_recurrent):
        for a, b in zip(outputs_and_gradients(form, inputs, state), expected):
            assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("width", [64, 8])
def test_features_of_any_width_equal_recurrent(width):
    inputs, state = mlstm_inputs(150, "both wild", width=width)
    expected = outputs_and_gradients(mlstm_recurrent, inputs, state, torch.float64)
    for form in (mlstm_chunkwise, mlstm_recurrent):
        found = outputs_and_gradients(form, inputs, state)
        assert max(map(relative_error, found, expected)) < 1e-5


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 1000])
def test_chunk_size_does_not_matter(chunk_size):
    inputs, state = mlstm_inputs(100, "both wild")
    expected = outputs_and_gradients(mlstm_recurrent, inputs, state, torch.float64)
    found = outputs_and_gradients(mlstm_chunkwise, inputs, state, chunk_size=chunk_size)
    assert max(map(relative_error, found, expected)) < 1e-5


def test_chunkwise_equals_recurrent_over_many_chunks():
    inputs, _ = mlstm_inputs(600, B=1, H=2, K=1)
    expected = outputs_and_gradients(mlstm_recurrent, inputs, None, torch.float64)
    found = outputs_and_gradients(mlstm_chunkwise, inputs, None)
    assert max(map(relative_error, found, expected)) < 1e-5


def test_peaked_features_keep_their_accuracy():
    inputs, state = mlstm_inputs(150, peak=8.0)  # denominators down to 1e-11
    expected = outputs_and_gradients(mlstm_recurrent, inputs, state, torch.float64)
    found = outputs_and_gradients(mlstm_chunkwise, inputs, state)
    assert max(map(relative_error, found[:3], expected[:3])) < 1e-5


def test_the_first_output_is_the_first_value():
    (q, k, v, log_i, log_f), _ = mlstm_inputs(1)
    h, _ = mlstm_chunkwise(q, k, v, log_i, log_f)
    torch.testing.assert_close(h, v.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("with_state", [False, True])
def test_chunkwise_has_the_definitions_gradients_of_every_output(gates, T, with_state):
    # Of h and of S, z and m as they are, to all inputs and the incoming S, z and m.
    inputs, state = mlstm_inputs(T, gates)

    def everything(form, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs + list(state) * with_state]
        h, end = form(*leaves[:5], state=tuple(leaves[5:]) or None)
        r = torch.Generator().manual_seed(3)
        loss = sum((x * torch.randn(x.shape, generator=r).to(dtype)).sum() for x in (h, *end))
        return [h, *end, *torch.autograd.grad(loss, leaves)]

    expected = everything(mlstm_recurrent, torch.float64)
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        found = everything(mlstm_chunkwise, dtype)
        assert max(map(relative_error, found, expected)) < limit


@pytest.mark.parametrize("documents", [False, True])
def test_a_gate_of_minus_infinity_forgets_all(documents):
    # -1e4 is as good as -inf: more than any input gate makes up for.
    inputs, _ = mlstm_inputs(100)
    ids = (torch.arange(100) // 30).expand(2, -1) if documents else None
    results = []
    for closed in (-math.inf, -1e4):
        inputs[4] = inputs[4].index_fill(2, torch.tensor([0, 5, 33, 64, 65, 99]), closed)
        leaves = [x.clone().requires_grad_() for x in inputs]
        h, _ = mlstm_chunkwise(*leaves, document_ids=ids)
        results.append([h, *torch.autograd.grad(h.square().sum(), leaves)])
    for a, b in zip(*results):
        assert a.isfinite().all() and relative_error(a, b) < 1e-6
    if not documents:
        assert relative_error(results[0][0], mlstm_recurrent(*inputs)[0]) < 1e-5


@pytest.mark.parametrize("lengths", [[1, 1, 3, 59, 1, 35, 100], [64, 64, 72], [5, 195]])
def test_mlstm_gradients_of_documents_equal_separate_runs(lengths):
    inputs, state = mlstm_inputs(200, "both wild")
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1)
    weight = torch.randn(2, 4, 200, 16, generator=torch.Generator().manual_seed(4))
    leaves = [x.clone().requires_grad_() for x in (*inputs, *state)]
    h, end = mlstm_chunkwise(*leaves[:5], state=tuple(leaves[5:]), document_ids=ids)
    found = torch.autograd.grad((h * weight).sum() + sum(x.sum() for x in end), leaves)
    exact = [x.double().requires_grad_() for x in (*inputs, *state)]
    start, part_state, loss = 0, tuple(exact[5:]), 0
    for length in lengths:
        part = [x[:, :, start:start + length] for x in exact[:5]]
        part_h, part_end = mlstm_recurrent(*part, state=part_state)
        loss = loss + (part_h * weight[:, :, start:start + length]).sum()
        start, part_state = start + length, None
    for a, b in zip(found, torch.autograd.grad(loss + sum(x.sum() for x in part_end), exact)):
        assert relative_error(a, b) < 1e-5


def test_documents_move_each_other_by_rounding_at_most():
    ids = torch.tensor([0] * 30 + [1] * 50 + [2] * 70).expand(2, -1)
    inside = slice(30, 80)
    for seed in range(3):
        inputs, _ = mlstm_inputs(150, "both wild", seed=seed)
        other = [x.clone() for x in mlstm_inputs(150, "both wild", seed=seed + 10)[0]]
        results = []
        for x in (inputs, other):
            for a, b in zip(x, inputs):
                a[:, :, inside] = b[:, :, inside]  # only the other documents differ
            leaves = [a.clone().requires_grad_() for a in x]
            q, k, v = leaves[:3]
            h = mlstm_chunkwise(*leaves, document_ids=ids)[0][:, :, inside]
            swa = window_attention(q, k, v, window=9, sinks=2, document_ids=ids)[:, :, inside]
            grads = torch.autograd.grad(h.square().sum() + swa.square().sum(), leaves)
            for g in grads:
                assert g[:, :, inside].any()
                assert g[:, :, :30].abs().max() < 1e-6 and g[:, :, 80:].abs().max() < 1e-6
            results.append([h, swa, *(g[:, :, inside] for g in grads)])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("K", [1, 4])
def test_grouped_heads_equal_repeated_ones(K):
    inputs, _ = mlstm_inputs(100, K=K)
    repeated = [x.repeat_interleave(4 // K, dim=1) if x.shape[1] == K else x for x in inputs]
    for form in (lambda *x: mlstm_chunkwise(*x)[0],
                 lambda q, k, v, i, f: window_attention(q, k, v, window=9, sinks=2)):
        torch.testing.assert_close(form(*inputs), form(*repeated))


@pytest.mark.parametrize("T", [1, 64, 100])
def test_the_layout_in_memory_does_not_matter(T):
    inputs, state = mlstm_inputs(T, B=1)
    results = []
    for turn in (lambda x: x, lambda x: x.transpose(1, -1).contiguous().transpose(1, -1)):
        leaves = [turn(x).requires_grad_() for x in (*inputs, *state)]
        q, k, v = leaves[:3]
        h, (S, z, m) = mlstm_chunkwise(*leaves[:5], state=tuple(leaves[5:]))
        swa = window_attention(q, k, v, window=9, sinks=2)
        loss = sum((turn(x) * torch.linspace(0, 1, x.numel()).view(x.mT.shape).mT).sum()
                   for x in (h, S, swa)) + z.sum() + m.sum()
        results.append([h, S, swa, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_mlstm_in_bf16_under_autocast_and_checkpointing():
    inputs, _ = mlstm_inputs(100)
    mixed = [x.bfloat16() if i == 2 else x for i, x in enumerate(inputs)]  # v, as in a student

    def gradients(inputs, form):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16):
            h = form(*leaves)
            return h, torch.autograd.grad(h.float().square().sum(), leaves)

    def form(*x):
        return mlstm_chunkwise(*x)[0]

    h, grads = gradients(mixed, form)
    assert h.dtype == torch.bfloat16
    expected, expected_grads = gradients([x.float() for x in mixed], form)
    assert (h - expected).abs().max() < 0.01 * expected.abs().max()
    for a, b in zip(grads, expected_grads):  # h is rounded for the loss, nothing inside is
        assert relative_error(a.float(), b) < 0.01
    again, grads_again = gradients(mixed, lambda *x: torch.utils.checkpoint.checkpoint(
        form, *x, use_reentrant=False))
    assert torch.equal(h, again) and all(map(torch.equal, grads, grads_again))


@pytest.mark.parametrize("shape", [{}, {"width": 32}])
def test_a_step_in_place_equals_the_definition(shape):
    for gates in GATES:
        inputs, state = mlstm_inputs(40, gates, **shape)
        expected, expected_state = mlstm_recurrent(*(x.double() for x in inputs), state=tuple(
            x.double() for x in state))
        addresses = [x.data_ptr() for x in state]
        h = torch.cat([mlstm_step(*(x[:, :, t:t + 1] for x in inputs), state)
                       for t in range(40)], dim=2)
        assert addresses == [x.data_ptr() for x in state]
        for a, b in zip((h, *state), (expected, *expected_state)):
            assert relative_error(a, b) < 1e-5


# Documents of one token, across chunk borders, several in a chunk, and one over many chunks.
DOCUMENTS = [[1, 1, 3, 59, 1, 35, 100], [64, 64, 72], [200], [5, 195]]


@pytest.mark.parametrize("lengths", DOCUMENTS)
def test_mlstm_documents_equal_separate_runs(lengths):
    inputs, state = mlstm_inputs(200, "both wild")
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1)
    h, final = mlstm_chunkwise(*inputs, state=state, document_ids=ids)
    start, part_state = 0, state
    for length in lengths:
        part = [x[:, :, start:start + length].double() for x in inputs]
        part_state = None if part_state is None else tuple(x.double() for x in part_state)
        expected, end = mlstm_recurrent(*part, state=part_state)
        assert relative_error(h[:, :, start:start + length], expected) < 1e-5
        start, part_state = start + length, None  # a given state belongs to the first document
    for a, b in zip(final, end):
        assert relative_error(a, b) < 1e-5


class LargestTensor(TorchDispatchMode):
    """Records the element count of the largest tensor any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.storage_offset() == 0:
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_no_tensor_grows_with_the_square_of_the_length():
    def largest(T):
        (q, k, v, log_i, log_f), _ = mlstm_inputs(T, B=1, H=2, K=1, D=8)
        v = v.requires_grad_()
        with LargestTensor() as seen:
            mlstm_chunkwise(q, k, v, log_i, log_f)[0].sum().backward()
            window_attention(q, k, v, window=16, sinks=4).sum().backward()
        return seen.numel

    assert largest(4096) < 1.1 * 2 * largest(2048) and largest(4096) < 4096 * 4096 // 8


# ------------------------------------------------------------------ window and sinks


def dense_window(q, k, v, window, sinks, lengths):
    """The definition: one (T, T) mask."""
    B, H, T, D = q.shape
    lengths = torch.tensor(lengths)
    start = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    t, s = torch.arange(T)[:, None], torch.arange(T)[None]
    seen = (s <= t) & (s >= start[:, None]) & ((s > t - window) | (s < start[:, None] + sinks))
    k, v = (x.repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(D)).masked_fill(~seen, -math.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("window, sinks", [(1, 0), (1, 4), (5, 2), (16, 4), (64, 4), (100, 0),
                                           (500, 4)])
@pytest.mark.parametrize("lengths", DOCUMENTS)
def test_window_equals_a_dense_mask(window, sinks, lengths):
    r = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 200, 16, generator=r, dtype=torch.float64, requires_grad=True)
               for h in (4, 2, 2))
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1)
    found = window_attention(q, k, v, window=window, sinks=sinks,
                             document_ids=ids if len(lengths) > 1 else None)
    expected = dense_window(q, k, v, window, sinks, lengths)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(expected.shape, generator=r, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad((found * weight).sum(), (q, k, v)),
                    torch.autograd.grad((expected * weight).sum(), (q, k, v))):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------ student


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_wide_window_and_closed_gate_give_the_teacher(folders, family):
    teacher = load_pretrained(folders(family)[0])
    student = student_from_teacher(teacher, window=100)
    for block in student.model["layers"]:
        block.self_attn.output_gate.bias.fill_(-1e4)
    tokens = random_tokens()
    assert (student(tokens) - teacher(tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_documents_do_not_leak(folders, mixer):
    teacher = load_pretrained(folders("olmo3")[0])
    ids = torch.tensor([[0] * 30 + [1] + [2] * 40 + [3] * 29, [5] * 64 + [6] * 36])
    tokens = random_tokens()
    edited = tokens.clone()
    edited[0, 31:71] = random_tokens(1, 40, seed=5)
    edited[1, :64] = 3
    for model in (teacher, wake_gates(student_from_teacher(teacher, window=9, mixer=mixer))):
        before, after = (model(x, document_ids=ids) for x in (tokens, edited))
        torch.testing.assert_close(before[0, :31], after[0, :31], atol=1e-5, rtol=0)
        torch.testing.assert_close(before[0, 71:], after[0, 71:], atol=1e-5, rtol=0)
        torch.testing.assert_close(before[1, 64:], after[1, 64:], atol=1e-5, rtol=0)
        assert not torch.equal(before[0, 31:71], after[0, 31:71])
        alone = model(tokens[:1, 71:])
        assert (alone - before[:1, 71:]).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama3.1", "olmo3"])
@pytest.mark.parametrize("mixer", [None, *MIXERS])
@torch.no_grad()
def test_prefill_and_steps_equal_the_full_forward(folders, family, mixer):
    model = load_pretrained(folders(family)[0])
    if mixer is not None:
        model = wake_gates(student_from_teacher(model, window=9, mixer=mixer))
    tokens = random_tokens(T=60)
    full = model(tokens)
    # Prefills around the sinks (4), the window (9) and both (13); then steps, which pass these too;
    # then a second sequence that continues both.
    for length in (1, 4, 5, 9, 13, 40):
        cache = Cache(model, 2, 60)
        parts = [model(tokens[:, :length], cache=cache)]
        parts += [model(tokens[:, i:i + 1], cache=cache) for i in range(length, length + 11)]
        parts += [model(tokens[:, length + 11:], cache=cache)]
        assert (torch.cat(parts, dim=1) - full).abs().max() < 1e-4
    if mixer is not None:
        slots = {layer.k.shape[2] for layer in cache.layers}
        assert max(slots) <= 13  # constant: it never held the 60 tokens
        assert (max(slots) == 0) == (mixer in ("linear", "mlstm"))  # which have no window


@pytest.mark.parametrize("features", [1, 2, 4, 8])
@torch.no_grad()
def test_students_of_any_feature_width_start_near_the_window_and_decode(folders, tmp_path, features):
    teacher = load_pretrained(folders("qwen3")[0])
    student = student_from_teacher(teacher, window=9, features=features)
    tokens = random_tokens(T=60)
    windows = student_from_teacher(teacher, window=9, mixer="swa")(tokens)
    assert (student(tokens) - windows).abs().mean() < 0.1 * (windows - teacher(tokens)).abs().mean(
        ) + 0.3  # the gate starts at 0.12
    wake_gates(student)
    maps = [p for n, p in student.named_parameters() if "feature_map" in n]
    D = teacher.config.head_dim
    assert {tuple(p.shape[1:]) for p in maps} == {(D, features * D)}
    cache, full = Cache(student, 2, 60), student(tokens)
    parts = [student(tokens[:, :30], cache=cache)]
    parts += [student(tokens[:, t:t + 1], cache=cache) for t in range(30, 60)]
    assert (torch.cat(parts, dim=1) - full).abs().max() < 1e-4
    assert cache.layers[0].state[0].shape[-2:] == (features * D, D)
    save_pretrained(student, tmp_path / "s")
    assert torch.equal(load_pretrained(tmp_path / "s")(tokens), full)


def test_folders_of_earlier_versions_mean_what_they_did(folders, tmp_path):
    student = student_from_teacher(load_pretrained(folders("qwen3")[0]), window=9, features=1)
    save_pretrained(student, tmp_path / "s")
    config = json.loads((tmp_path / "s/config.json").read_text())
    del config["hybrid"]["features"]  # then the paper's was the only one
    config["hybrid"]["folded"] = False
    (tmp_path / "s/config.json").write_text(json.dumps(config))
    assert torch.equal(load_pretrained(tmp_path / "s")(random_tokens()), student(random_tokens()))
    config["hybrid"]["folded"] = True
    (tmp_path / "s/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json: .* folded output gate"):
        load_pretrained(tmp_path / "s")
    with pytest.raises(ValueError, match="features 3"):
        student_from_teacher(load_pretrained(folders("qwen3")[0]), features=3)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_student_folder_describes_itself(folders, tmp_path, mixer):
    student = wake_gates(student_from_teacher(load_pretrained(folders("qwen3")[0]), window=9,
                                              mixer=mixer))
    save_pretrained(student, tmp_path / "s", max_shard_bytes=100_000)
    assert (tmp_path / "s/model.safetensors.index.json").exists()
    loaded = load_pretrained(tmp_path / "s")
    assert loaded.config == student.config
    assert torch.equal(loaded(random_tokens()), student(random_tokens()))
    before = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    with pytest.raises(ValueError, match="not empty"):
        save_pretrained(loaded, tmp_path / "s")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_student_of_a_bf16_teacher_computes_what_the_fp32_one_does(folders, mixer):
    # Copied weights in bf16, new ones in fp32: what stage I trains on a GPU.
    students = [wake_gates(student_from_teacher(load_pretrained(folders("qwen3")[0], dtype=dtype),
                                                window=9, mixer=mixer))
                for dtype in (torch.bfloat16, torch.float32)]
    a, b = (student(random_tokens()).float() for student in students)
    assert 0 < (a - b).abs().mean() < 0.1 and (a.argmax(-1) == b.argmax(-1)).float().mean() > 0.9
    assert generate(students[0], random_tokens(), max_new_tokens=3, stop=()).shape == (2, 103)


def test_student_shares_the_teachers_weights_and_adds_few(folders):
    teacher = load_pretrained(folders("llama3.1")[0])
    student = student_from_teacher(teacher)
    copied = dict(teacher.named_parameters())
    shared = [name for name, p in student.named_parameters() if copied.get(name) is p]
    assert sorted(shared) == sorted(copied)


def test_ablation_mixers_are_the_hybrid_without_parts(folders):
    teacher = load_pretrained(folders("llama3.1")[0])
    new = {mixer: {n.split("self_attn.")[1] for n, _ in student_from_teacher(
        teacher, mixer=mixer).named_parameters() if n not in dict(teacher.named_parameters())}
        for mixer in MIXERS}
    assert new["swa"] == set()
    assert new["linear"] == {"feature_map_q.weight", "feature_map_k.weight"}
    assert new["mlstm"] == new["linear"] | {f"{g}_gate.{p}" for g in ("input", "forget")
                                            for p in ("weight", "bias")}
    assert new["hybrid"] == new["mlstm+swa"] == new["mlstm"] | {
        "output_gate.weight", "output_gate.bias"}
    assert student_from_teacher(teacher, mixer="mlstm+swa").config.hybrid.sinks == 0
    with pytest.raises(ValueError, match="known: hybrid"):
        student_from_teacher(teacher, mixer="attention")


# ------------------------------------------------------------------ generation


@pytest.fixture
def both(folders):
    teacher = load_pretrained(folders("llama3.1")[0])
    return teacher, wake_gates(student_from_teacher(teacher, window=9))


@torch.no_grad()
def test_greedy_generation_equals_an_argmax_loop(both):
    for model in both:
        tokens = random_tokens(2, 20)
        found = generate(model, tokens, max_new_tokens=30, stop=())
        for _ in range(30):
            tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1)[:, None]), dim=1)
        assert torch.equal(found, tokens)


def test_a_row_stops_alone_and_repeats_its_stop_id(both):
    prompt = random_tokens(2, 20)
    free = generate(both[1], prompt, max_new_tokens=30, stop=())[:, 20:]
    stop = free[0, 5].item()
    first = [row.index(stop) if stop in row else 30 for row in free.tolist()]
    found = generate(both[1], prompt, max_new_tokens=30, stop=stop)[:, 20:]
    assert torch.equal(found, generate(both[1], prompt, max_new_tokens=30, stop={stop})[:, 20:])
    for row, full, n in zip(found.tolist(), free.tolist(), first):
        assert row[:n + 1] == full[:n + 1][:len(row)] and set(row[n:]) <= {stop}
    assert found.shape[1] == min(30, max(first) + 1)


def test_sampling_follows_seed_temperature_and_top_p(both):
    prompt = random_tokens(1, 10).expand(4, -1)
    args = dict(max_new_tokens=20, stop=())
    greedy = generate(both[1], prompt, **args)
    a, b, c = (generate(both[1], prompt, temperature=1.0, seed=s, **args) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, greedy)
    assert torch.equal(generate(both[1], prompt, temperature=1.0, top_p=1e-6, **args), greedy)
    with pytest.raises(ValueError, match="top_p"):
        generate(both[1], prompt, top_p=0.0, **args)
    for wrong in (-1, both[1].config.vocab_size):
        with pytest.raises(ValueError, match=f"the prompt has ids from .*{wrong}"):
            generate(both[1], torch.tensor([[wrong]]), **args)


def test_sampled_frequencies_match_the_nucleus():
    from model import _sample
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20000, -1)
    ids = _sample(logits, 1.0, 0.8, torch.Generator().manual_seed(0))
    shares = ids.bincount(minlength=4) / 20000
    assert shares[2:].sum() == 0 and abs(shares[0] - 0.625) < 0.02  # .5 / (.5 + .3)


@torch.no_grad()
def test_a_step_compiles_once_for_all_positions(both):
    tokens = random_tokens(2, 40)
    for model in both:  # through sinks, window and the ring's turns
        torch._dynamo.reset()
        cache, full = Cache(model, 2, 40), model(tokens)
        model.hidden(tokens[:, :3], cache=cache)
        step = torch.compile(decode_step, fullgraph=True, backend="eager")
        addresses = [x.data_ptr() for x in cache.tensors()]
        found = [step(model, tokens[:, 3].contiguous(), cache)]
        with torch._dynamo.config.patch(error_on_recompile=True):
            found += [step(model, tokens[:, t].contiguous(), cache) for t in range(4, 40)]
        assert (torch.stack(found, dim=1) - full[:, 3:]).abs().max() < 1e-4
        assert addresses == [x.data_ptr() for x in cache.tensors()]


def test_compiled_generation_equals_plain(both, monkeypatch):
    compiler, calls = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f, **options: calls.append(options) or compiler(
        f, backend="eager", **options))  # the default backend takes a minute here
    args = dict(max_new_tokens=4, stop=())
    prompt = random_tokens(2, 20)
    assert torch.equal(generate(both[1], prompt, compile=True, **args),
                       generate(both[1], prompt, **args))
    assert [options["fullgraph"] for options in calls] == [True]


def test_memory_of_a_students_generation_does_not_grow_with_the_prompt(both):
    def largest(length):
        with LargestTensor() as seen:
            generate(both[1], random_tokens(1, length), max_new_tokens=2, stop=())
        return seen.numel

    assert largest(2050) == largest(4100)  # that of a piece, 2048


def test_generation_keeps_no_graph(both):  # it would hold every token's activations
    for model in both:
        cache = Cache(model, 2, 30)
        for _ in stream(model, random_tokens(2, 20), max_new_tokens=5, stop=(), cache=cache):
            pass
        assert not any(x.requires_grad for x in cache.tensors())


def test_generation_of_nothing_returns_the_prompt(both):
    prompt = random_tokens(2, 5)
    assert torch.equal(generate(both[1], prompt, max_new_tokens=0), prompt)


class ElementsRead(LargestTensor):
    """Sums the element counts of all operations' inputs."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.numel += sum(x.numel() for x in args if isinstance(x, torch.Tensor))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_student_step_reads_the_same_memory_at_any_length(both):
    def work(model, length):
        cache = Cache(model, 1, length + 1)
        model.hidden(random_tokens(1, length), cache=cache)
        with ElementsRead() as seen:
            decode_step(model, torch.tensor([5]), cache)
        return seen.numel, sum(x.nbytes for x in cache.tensors())

    teacher, student = both
    assert work(student, 20) == work(student, 200)
    assert work(teacher, 20)[0] < work(teacher, 200)[0]


@torch.no_grad()
def test_a_copied_cache_goes_its_own_way(both):
    tokens = random_tokens(2, 30)
    for model in both:
        cache = Cache(model, 2, 40)
        model.hidden(tokens[:, :20], cache=cache)
        before = [x.clone() for x in cache.tensors()]
        first = model(tokens[:, 20:], cache=copy.deepcopy(cache))
        assert all(map(torch.equal, before, cache.tensors()))
        assert torch.equal(model(tokens[:, 20:], cache=copy.deepcopy(cache)), first)


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other(both):
    prompt = random_tokens(3, 20)
    together = generate(both[1], prompt, max_new_tokens=10, stop=())
    alone = [generate(both[1], prompt[i:i + 1], max_new_tokens=10, stop=()) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


# ------------------------------------------------------------------ choice of kernels


class FakeKernels(types.ModuleType):
    """kernels.py as model.py sees it: counts calls and answers with the plain form."""

    def __init__(self):
        super().__init__("kernels")
        self.calls = []

    def refusal(self, head_dim, features):
        return None if features < 8 else "too wide"

    def mlstm(self, *args, **options):
        self.calls.append("mlstm")
        return mlstm_chunkwise(*args, **options)

    def window_attention(self, *args, **options):
        self.calls.append("window")
        return window_attention(*args, **options)

    def feature_map(self, x, weight, plain):
        self.calls.append("features")
        rotated, unrotated = weight.chunk(2, dim=-1)
        return torch.cat((x @ rotated, plain @ unrotated), dim=-1).softmax(-1)


@torch.no_grad()
def test_kernels_run_sequences_when_chosen_and_steps_stay_plain(folders, tmp_path, monkeypatch):
    fake = FakeKernels()
    monkeypatch.setitem(sys.modules, "kernels", fake)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    teacher = load_pretrained(folders("llama3.1")[0])
    plain = wake_gates(student_from_teacher(teacher, window=9))
    save_pretrained(plain, tmp_path / "s")
    student = copy.deepcopy(load_pretrained(tmp_path / "s", kernels="triton"))
    assert (plain.kernels, student.kernels) == ("torch", "triton")
    tokens, ids = random_tokens(T=40), torch.arange(40).expand(2, -1) // 25
    assert torch.equal(plain(tokens, document_ids=ids), plain(tokens, document_ids=ids))
    assert not fake.calls
    expected = plain(tokens, document_ids=ids)
    torch.testing.assert_close(student(tokens, document_ids=ids), expected)
    assert sorted(fake.calls) == sorted(["mlstm", "window", "features", "features"] * 4)
    cache = Cache(student, 2, 40)
    parts = [student(tokens[:, :39], cache=cache)]
    fake.calls.clear()
    parts.append(student(tokens[:, 39:], cache=cache))
    assert not fake.calls
    torch.testing.assert_close(torch.cat(parts, dim=1), plain(tokens), atol=1e-4, rtol=1e-4)
    assert student_from_teacher(teacher, kernels="triton").kernels == "triton"


def test_a_wish_for_triton_is_granted_or_refused(folders, monkeypatch, capsys):
    folder = folders("llama3.1")[0]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert load_pretrained(folder).kernels == "torch"
    with pytest.raises(ValueError, match="need a CUDA device"):
        load_pretrained(folder, kernels="triton")
    with pytest.raises(ValueError, match="need a CUDA device"):
        student_from_teacher(load_pretrained(folder), kernels="triton")
    with pytest.raises(ValueError, match="known: auto, torch, triton"):
        load_pretrained(folder, kernels="cuda")
    monkeypatch.setitem(sys.modules, "kernels", FakeKernels())
    assert [choose_kernels(w, "cuda", 64, 4) for w in ("auto", "torch", "triton")] == [
        "triton", "torch", "triton"]
    assert choose_kernels("auto", "cuda", 64, 8) == "torch" and "too wide" in capsys.readouterr().out
    with pytest.raises(ValueError, match="too wide"):
        choose_kernels("triton", "cuda", 64, 8)
    monkeypatch.setitem(sys.modules, "kernels", None)  # as if the file were deleted
    assert choose_kernels("auto", "cuda", 64, 4) == "torch"
    with pytest.raises(ValueError, match="need kernels.py and the triton package"):
        choose_kernels("triton", "cuda", 64, 4)


# ------------------------------------------------------------------ memory

PEAK = """
import sys, threading, time
import torch
from model import load_pretrained, student_from_teacher

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

student_from_teacher(load_pretrained(sys.argv[2]))  # pages of torch itself do not count
before, peak, done = resident(), [0], []
def watch():
    while not done:
        peak[0] = max(peak[0], resident())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
student = student_from_teacher(load_pretrained(sys.argv[1]))
done.append(1)
thread.join()
print((peak[0] - before) / sum(p.nbytes for p in student.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_loading_and_building_a_student_peaks_at_its_own_size(tmp_path):
    sizes = dict(hidden_size=2048, intermediate_size=7168, num_hidden_layers=1, vocab_size=32000,
                 num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=256)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    with torch.device("meta"):
        empty = Transformer(ModelConfig.from_hf(tmp_path))
    save_file({name: torch.zeros(p.shape, dtype=torch.bfloat16) + 0.01
               for name, p in empty.named_parameters()}, tmp_path / "model.safetensors")
    result = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path), "tests/teacher"],
                            capture_output=True, text=True, check=True,
                            cwd=Path(__file__).parent.parent)
    assert float(result.stdout) < 1.1  # of 0.37 GB


def test_the_script_behind_the_readmes_times_runs(capsys):
    x = time_cpu.inputs(2, 64, 16)
    time_cpu.compare("tiny", x, {"ours": time_cpu.ours, "again": lambda q, *_: q + 1}, 1)
    time_cpu.decoding_step((32, 64), H=4, K=2, D=16)
    printed = capsys.readouterr().out
    for words in ("forward ", "and backward ", "ours", "(1.00)", "student, 4 D", "at 64 tokens"):
        assert words in printed


# ------------------------------------------------------------------ precision and start values


def test_gates_and_features_are_fp32_under_bf16():
    torch.manual_seed(0)
    x, gate = torch.randn(2, 9, 64), model.Gate(64, 4)
    exact = F.linear(x.bfloat16().double(), gate.weight.double(), gate.bias.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = gate(x.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double().transpose(1, 2), exact, rtol=1e-5, atol=1e-5)
    phi = model.FeatureMap(2, 16, 4)
    torch.nn.init.normal_(phi.weight)
    q, plain = torch.randn(2, 1, 2, 9, 16).bfloat16()
    features = phi(q, plain)
    assert features.dtype == torch.float32 and (features.sum(-1) - 1).abs().max() < 1e-6


def test_heads_start_with_half_lives_from_256_to_4096_tokens(folders):
    student = student_from_teacher(load_pretrained(folders("llama3.1")[0]), window=8)
    bias = student.model["layers"][0].self_attn.forget_gate.bias.double()
    half_lives = math.log(0.5) / F.logsigmoid(bias)
    assert half_lives.tolist() == pytest.approx([256, 645, 1625, 4096], rel=1e-2)


@pytest.mark.parametrize("window, kept", [(19, False), (20, True), (21, True)])
def test_a_layer_whose_own_window_is_no_longer_stays_as_it_was(folders, window, kept):
    student = student_from_teacher(load_pretrained(folders("mistral")[0]), window=window)
    attention = student.model["layers"][0].self_attn  # the teacher's own window is 20
    assert (attention.short_window, attention.sinks) == ((20, 0) if kept else (window, 4))


@pytest.mark.parametrize("temperature", [1e-40, 1e-300])
def test_a_tiny_temperature_is_greedy(folders, temperature):
    teacher, prompt = load_pretrained(folders("llama3.1")[0]), random_tokens(2, 9)
    sampled, greedy = (generate(teacher, prompt, max_new_tokens=5, temperature=t, seed=0, stop=())
                       for t in (temperature, 0))
    assert torch.equal(sampled, greedy)


def test_saving_spares_all_that_is_not_its_own(folders, tmp_path):
    shutil.copytree(folders("llama3.1")[0], tmp_path / "mine.tmp")
    save_pretrained(load_pretrained(tmp_path / "mine.tmp"), tmp_path / "mine")
    assert load_pretrained(tmp_path / "mine.tmp") and load_pretrained(tmp_path / "mine")
    assert {p.name for p in tmp_path.iterdir()} == {"mine", "mine.tmp"}


def test_numbers_too_large_for_the_dtype_are_refused_and_a_cast_is_said(tmp_path, folders, capsys):
    shutil.copytree(folders("llama3.1")[0], tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].half()
    save_file(tensors, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    load_pretrained(tmp_path / "m")
    assert "tensors, such as lm_head.weight, are stored in another dtype" in capsys.readouterr().out
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model.norm.weight has numbers too large for torch.float16"):
        load_pretrained(tmp_path / "m")
    load_pretrained(tmp_path / "m", dtype=torch.float32)
    assert not capsys.readouterr().out
