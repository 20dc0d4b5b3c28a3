"""kernels.py against model.py in float64: in Triton's interpreter without a GPU, compiled with one.

The interpreter is chosen when triton is first imported, hence the lines before the imports.
Run as a script (`test_kernels.py 128 4 80 90`: heads of 128, features of 4 x 128, sm_80 and sm_90)
it compiles every kernel for GPUs that need not exist and prints what each uses.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROOT = Path(__file__).resolve().parent.parent
if __name__ != "__main__":
    if not CUDA:
        assert "triton" not in sys.modules, "triton was imported before its interpreter was chosen"
        os.environ["TRITON_INTERPRET"] = "1"
    triton = pytest.importorskip("triton")  # its package exists for Linux only
    if not CUDA and triton.__version__[:3] == "3.6" and np.lib.NumpyVersion(
            np.__version__) >= "2.4.0":
        pytest.skip("Triton 3.6's interpreter fails with NumPy 2.4: pip install 'numpy<2.4'",
                    allow_module_level=True)
    import kernels
    import model
    import time_gpu
    from time_gpu import worst

needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")


def gates(kind, shape):
    """log_i, log_f (B, H, T)."""
    r = torch.Generator().manual_seed(3)
    log_i, x = torch.randn(shape, generator=r), torch.rand(shape, generator=r)
    return {"ordinary": (log_i, F.logsigmoid(4 * x)),
            "extreme": (log_i.sign() * 50, -10 ** (8 * x - 6)),  # -1e-6 ... -100
            "forgetting": (log_i * 10, -50 - x),  # every token: sums reach -5000
            "keeping": (log_i * 10, -1e-6 * x),
            "beyond": (log_i, torch.where(x < 0.1, -1e9 * x, -x))}[kind]


def mlstm_inputs(T=70, kind="ordinary", B=1, H=2, K=1, width=16, E=16, dtype=torch.float32):
    """q, k (features `width` wide), v, log_i, log_f and a state, on DEVICE, requiring gradients."""
    r = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, heads, T, n, generator=r)
               for heads, n in ((H, width), (K, width), (K, E)))
    state = (torch.rand(B, H, width, E, generator=r), torch.rand(B, H, width, generator=r) + 0.1,
             torch.randn(B, H, generator=r))
    inputs = [x.to(dtype) for x in (q.softmax(-1), k.softmax(-1), v)] + [*gates(kind, (B, H, T))]
    return [[x.detach().to(DEVICE).requires_grad_() for x in xs] for xs in (inputs, state)]


def outputs_and_gradients(function, leaves):
    """Outputs of function() and the gradients in leaves of a random projection of all of them."""
    outputs = function()
    r = torch.Generator().manual_seed(9)
    weights = [torch.randn(x.shape, generator=r).to(DEVICE, x.dtype) for x in outputs]
    loss = sum((x * w).sum() for x, w in zip(outputs, weights))
    return [*outputs, *torch.autograd.grad(loss, leaves)]


def run_mlstm(form, inputs, state=None, dtype=None, **options):
    """h, S, z, m and all gradients, those of the incoming state included.

    The state that a loss may look at is (S, z) e^m. Here times a constant, or it could overflow.
    """
    xs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in [*inputs, *(state or [])]]

    def run():
        h, (S, z, m) = form(*xs[:5], state=tuple(xs[5:]) or None, **options)
        scale = torch.exp(m - m.detach())
        return [h, S * scale[..., None, None], z * scale[..., None], m.detach()]

    return outputs_and_gradients(run, xs)


# ------------------------------------------------------------------ the mLSTM


@pytest.mark.parametrize("kind, with_state", [("ordinary", False), ("ordinary", True), (
    "extreme", True), ("forgetting", True), ("keeping", True), ("beyond", True)])
def test_mlstm_equals_the_definition(kind, with_state):
    inputs, state = mlstm_inputs(kind=kind)
    state = state if with_state else None
    expected = run_mlstm(model.mlstm_recurrent, inputs, state, torch.float64)
    assert worst(run_mlstm(kernels.mlstm, inputs, state), expected) < 1e-5


def test_gates_of_minus_infinity_write_nothing_and_forget_all():
    inputs, _ = mlstm_inputs()
    inputs[4].data[..., 20] = -torch.inf  # forget
    inputs[3].data[..., 30:66] = -torch.inf  # write: a whole chunk, and its neighbours
    expected = model.mlstm_recurrent(*(x.double() for x in inputs))[0]
    assert worst([kernels.mlstm(*inputs)[0]], [expected]) < 1e-5


@pytest.mark.parametrize("T", [1, 32, 33])
def test_mlstm_of_any_length(T):
    inputs, state = mlstm_inputs(T)
    expected = run_mlstm(model.mlstm_recurrent, inputs, state, torch.float64)
    assert worst(run_mlstm(kernels.mlstm, inputs, state), expected) < 1e-5


@pytest.mark.parametrize("B, H, K, width, E", [(2, 4, 2, 16, 16), (1, 1, 1, 16, 64),
                                               (1, 2, 1, 64, 16), (1, 1, 1, 256, 64)])
def test_mlstm_of_any_heads_and_widths(B, H, K, width, E):
    inputs, state = mlstm_inputs(40, B=B, H=H, K=K, width=width, E=E)
    expected = run_mlstm(model.mlstm_recurrent, inputs, state, torch.float64)
    assert worst(run_mlstm(kernels.mlstm, inputs, state), expected) < 1e-5


@pytest.mark.parametrize("dtype, width, E", [(torch.bfloat16, 16, 16), (torch.float16, 16, 16),
                                             (torch.bfloat16, 512, 128)])
def test_mlstm_in_half_precision(dtype, width, E):
    """Two chunks (of 128 tokens in bf16). Without m0's gradient, a sum that cancels to nothing."""
    inputs, state = mlstm_inputs(130 if dtype == torch.bfloat16 else 40, H=1, width=width, E=E,
                                 dtype=dtype)
    expected = run_mlstm(model.mlstm_chunkwise, inputs, state, torch.float64)
    found = run_mlstm(kernels.mlstm, inputs, state)
    assert found[0].dtype == dtype and {x.dtype for x in found[1:4]} == {torch.float32}
    assert worst(found[:-1], expected[:-1]) < 2e-2


def test_features_may_be_fp32_beside_bf16_values():
    inputs, state = mlstm_inputs(40, dtype=torch.bfloat16)
    expected = run_mlstm(model.mlstm_chunkwise, inputs, state, torch.float64)
    inputs[:2] = [x.detach().float() for x in inputs[:2]]
    found = run_mlstm(kernels.mlstm, inputs, state)[:-1]
    assert found[4].dtype == torch.float32 and worst(found, expected[:-1]) < 2e-2


DOCUMENTS = [[1, 1, 3, 59, 1, 5], [64, 6]]


def ids_of(lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(
        DEVICE)[None] % 3  # ids come back, but never in neighbours


@pytest.mark.parametrize("lengths", DOCUMENTS)
@pytest.mark.parametrize("kind", ["ordinary", "extreme"])
def test_mlstm_documents_equal_the_definition(lengths, kind):
    inputs, state = mlstm_inputs(70, kind, width=32)
    expected = run_mlstm(model.mlstm_chunkwise, inputs, state, torch.float64,
                         document_ids=ids_of(lengths))
    found = run_mlstm(kernels.mlstm, inputs, state, document_ids=ids_of(lengths))
    assert worst(found, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_do_not_touch_each_other(dtype):
    """Another first document changes the second's outputs and gradients by exactly 0."""
    def run(edited):
        xs, _ = mlstm_inputs(70, "extreme", dtype=dtype)
        with torch.no_grad():
            for x in xs[:edited]:
                x[:, :, :41] = x[:, :, :41].flip(2) * 0.9
        options = dict(document_ids=ids_of([41, 29]))
        mixed = outputs_and_gradients(lambda: [
            kernels.mlstm(*xs, **options)[0],
            kernels.window_attention(*xs[:3], window=20, sinks=4, **options)], xs)
        return [x[:, :, 41:] for x in mixed]

    for a, b in zip(run(0), run(5)):
        assert torch.equal(a, b)


def test_two_parts_equal_the_whole_with_gradients_through_the_state():
    inputs, state = mlstm_inputs(60)

    def parts(*xs, state):
        h1, state = kernels.mlstm(*(x[:, :, :35] for x in xs), state=state)
        h2, state = kernels.mlstm(*(x[:, :, 35:] for x in xs), state=state)
        return torch.cat((h1, h2), dim=2), state

    whole = run_mlstm(model.mlstm_recurrent, inputs, state, torch.float64)
    assert worst(run_mlstm(parts, inputs, state), whole) < 1e-5


def test_strides_do_not_matter_and_runs_repeat_to_the_bit():
    inputs, state = mlstm_inputs(50)
    strided = [x.detach().transpose(-1, -2).contiguous().transpose(-1, -2) for x in inputs]
    for a, b in zip(run_mlstm(kernels.mlstm, inputs, state),
                    run_mlstm(kernels.mlstm, strided, state)):
        assert torch.equal(a, b)


# ------------------------------------------------------------------ window and sinks


@pytest.mark.parametrize("window, sinks, lengths", [
    (1, 0, [100]), (1, 4, DOCUMENTS[0]), (5, 2, [100]), (5, 2, DOCUMENTS[0]), (37, 20, [5, 95]),
    (64, 4, [64, 36]), (64, 4, [100]), (500, 4, DOCUMENTS[0])])
def test_window_equals_the_definition(window, sinks, lengths):
    r, T = torch.Generator().manual_seed(0), sum(lengths)
    xs = [torch.randn(1, h, T, 16, generator=r).to(DEVICE).requires_grad_() for h in (2, 1, 1)]
    options = dict(window=window, sinks=sinks,
                   document_ids=ids_of(lengths) if len(lengths) > 1 else None)
    wide = [x.detach().double().requires_grad_() for x in xs]
    expected = outputs_and_gradients(lambda: [model.window_attention(*wide, **options)], wide)
    found = outputs_and_gradients(lambda: [kernels.window_attention(*xs, **options)], xs)
    assert worst(found, expected) < 1e-5


# ------------------------------------------------------------------ the feature map


@pytest.mark.parametrize("features", [1, 2, 4])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_feature_map_equals_the_definition(features, dtype, limit):
    """T past a tile's end; wide maps read the unrotated vectors with their second half."""
    r = torch.Generator().manual_seed(0)
    x, plain = (torch.randn(2, 2, 40, 16, generator=r).to(DEVICE, dtype) for _ in range(2))
    weight = torch.randn(2, 16, 16 * features, generator=r).to(DEVICE, dtype)
    leaves = [x.requires_grad_() for x in ([x, weight] + [plain] * (features > 1))]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = outputs_and_gradients(lambda: [time_gpu.feature_map(*wide)], wide)
    found = outputs_and_gradients(lambda: [kernels.feature_map(*leaves)], leaves)
    assert found[0].dtype == dtype and worst(found, expected) < limit


# ------------------------------------------------------------------ all operators


def mixer(q, k, v, weight, log_i, log_f):
    """All three operators as the hybrid mixer chains them."""
    h, (S, z, m) = kernels.mlstm(kernels.feature_map(q, weight, q.flip(2)),
                                 kernels.feature_map(k, weight[:1], k.flip(2)), v, log_i, log_f)
    swa = kernels.window_attention(q, k, v, window=5, sinks=2)
    return torch.lerp(swa, h, torch.sigmoid(log_i)[..., None]).sum() + S.sum()


def test_torch_compile_sees_opaque_operators():
    (q, k, v, log_i, log_f), _ = mlstm_inputs(5)
    leaves = q, k, v, torch.eye(16, device=DEVICE).repeat(2, 1, 2).requires_grad_(), log_i, log_f
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs_and_gradients(lambda: [compiled(*leaves)], leaves),
                    outputs_and_gradients(lambda: [mixer(*leaves)], leaves)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["mlstm", "window", "feature_map"])
def test_operators_are_registered_as_torch_wants_them(name):
    inputs, state = mlstm_inputs(5)
    q, k, v, log_i, log_f = (x.detach().transpose(1, 2).contiguous().requires_grad_()
                             for x in inputs)
    start = kernels.document_starts(None, inputs[0])
    weight = torch.eye(16, device=DEVICE).repeat(2, 1, 2).requires_grad_()
    arguments = {"mlstm": (q, k, v, log_i, log_f, start, *state),
                 "window": (q, k, v, start.clamp_min(0), 5, 2),
                 "feature_map": (q, q.detach().flip(1), weight)}[name]
    torch.library.opcheck(getattr(torch.ops.xlstm_kernels, name).default, arguments)


def test_unsupported_inputs_are_refused_in_one_sentence(monkeypatch):
    (q, k, v, log_i, log_f), _ = mlstm_inputs(8)

    def refusal(function, *args, **options):
        with pytest.raises(ValueError) as error:
            function(*args, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "float64" in refusal(kernels.mlstm, q.double(), k, v, log_i, log_f)
    assert "width 12" in refusal(kernels.mlstm, q[..., :12], k, v, log_i, log_f)
    assert "k has shape" in refusal(kernels.mlstm, q, k[:, :, 1:], v, log_i, log_f)
    assert "log_i" in refusal(kernels.mlstm, q, k, v, log_i[:, :1], log_f)
    assert "document_ids" in refusal(kernels.mlstm, q, k, v, log_i, log_f,
                                     document_ids=torch.zeros(1, 7))
    assert "window 0" in refusal(kernels.window_attention, q, k, v, window=0, sinks=4)
    assert "do not fit" in refusal(kernels.window_attention, q, k.bfloat16(), v, window=4, sinks=0)
    assert "weight" in refusal(kernels.feature_map, q, torch.ones(3, 16, 16))
    assert "feature widths" in refusal(kernels.feature_map, q, torch.ones(2, 16, 48))
    assert "fit together" in refusal(kernels.mlstm, q, torch.cat((k, k), -1), v, log_i, log_f)
    assert "state has shapes" in refusal(kernels.mlstm, q, k, v, log_i, log_f, state=(q, q, q))
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    assert "on cpu" in refusal(kernels.mlstm, *(x.cpu() for x in (q, k, v, log_i, log_f)))


@pytest.mark.parametrize("head_dim, features, word", [(64, 1, None), (128, 4, None), (80, 4, "80"),
                                                      (96, 4, "96"), (256, 1, "256"),
                                                      (64, 3, "3 x 64")])
def test_heads_that_the_kernels_cannot_serve_are_named(head_dim, features, word):
    why = kernels.refusal(head_dim, features)
    assert why is None if word is None else word in why


# ------------------------------------------------------------------ tests/time_gpu.py


def test_the_gpu_report_is_rehearsed_without_one(tmp_path, capsys):
    path = tmp_path / "report.md"
    assert time_gpu.main(["--tiny", "--report", str(path), "--only", "check", "table"]) == 0
    text = path.read_text()
    assert text.count("| ok |") == 10 and "WRONG" not in text and text.endswith("0 failures\n")
    assert len(re.findall(r"\| (mlstm|feature map|window|all keys) \|.*e", text)) >= 11


def test_what_fails_is_a_row_of_the_gpu_report(tmp_path, capsys, monkeypatch):
    def breaks(*args, **options):
        raise torch.OutOfMemoryError("too | large\nby far")

    right = kernels.feature_map
    monkeypatch.setattr(kernels, "feature_map", lambda x, *more: right(x, *more).flip(-1))
    monkeypatch.setattr(kernels, "mlstm", breaks)
    monkeypatch.setattr(kernels, "window_attention", breaks)
    path = tmp_path / "report.md"
    assert time_gpu.main(["--tiny", "--report", str(path), "--only", "check"]) == 1
    text = path.read_text()
    assert "FAILED: OutOfMemoryError: too / large by far" in text
    assert text.count("WRONG") == 4 and text.count("FAILED") == 6 and "10 failures" in text


def test_the_floor_is_that_of_an_h200():
    floors = time_gpu.floor_ms(1, 32, 32, 16384, 128, 1, 512, 4.3e12, 790e12)
    assert floors["mlstm"][0] == pytest.approx(0.252, rel=0.02)  # 1.08 GB at 4.3 TB/s
    assert floors["mlstm"][1] == pytest.approx(0.787, rel=0.02)
    assert floors["window"][0] == pytest.approx(0.175, rel=0.02)
    assert floors["window"][1] == pytest.approx(0.614, rel=0.02)


@pytest.mark.skipif(CUDA, reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path, capsys):
    assert time_gpu.main(["--report", str(tmp_path / "report.md")]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().out


# ------------------------------------------------------------------ on a GPU


@needs_gpu
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("width, D", [(64, 64), (256, 64), (128, 128), (512, 128)])
def test_real_sizes_on_a_gpu(dtype, limit, width, D):
    inputs, _ = mlstm_inputs(4096 + 17, H=8, K=2, width=width, E=D, dtype=dtype)
    expected = run_mlstm(model.mlstm_chunkwise, inputs, dtype=torch.float64)
    assert worst(run_mlstm(kernels.mlstm, inputs), expected) < limit
    again = [run_mlstm(kernels.mlstm, inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again))
    inputs = [x[..., :D].detach().requires_grad_() for x in inputs[:3]]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = outputs_and_gradients(
        lambda: [model.window_attention(*wide, window=512, sinks=4)], wide)
    found = outputs_and_gradients(
        lambda: [kernels.window_attention(*inputs, window=512, sinks=4)], inputs)
    assert worst(found, expected) < limit


# ------------------------------------------------------------------ compiled for GPUs


def resources(compiled):
    """What a compiled kernel uses: registers a thread, bytes of memory, tensor-core instructions.

    STACK, LOCAL: bytes of registers spilled to memory.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True,
                                text=True).stdout
    ptx = compiled.asm["ptx"]
    return {**{name: int(x) for name, x in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)},
            "shared": compiled.metadata.shared, "wgmma": ptx.count("wgmma.mma_async"),
            "mma.sync": ptx.count("mma.sync")}


def compile_all(width, features, *capabilities):
    """Compile each kernel as the public functions launch it in bf16; its resources, as JSON lines.

    The launches are recorded, not run, so the machine needs no GPU and the test no second list of
    block sizes and warps.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    launches = {}

    def record(kernel, *args, grid, warmup, num_warps=4, num_stages=3, **named):
        launches[kernel] = ({**dict(zip(kernel.arg_names, args)), **named},
                            dict(num_warps=num_warps, num_stages=num_stages))

    JITFunction.run = record
    sys.path.insert(0, str(ROOT))
    import kernels
    kernels.check = lambda *args, **named: None  # let CPU tensors through: nothing will run
    q, k, v = (torch.zeros(1, n, 100, width, dtype=torch.bfloat16, requires_grad=True)
               for n in (8, 2, 2))
    gate = torch.zeros(1, 8, 100, requires_grad=True)
    phi_q, phi_k = (kernels.feature_map(
        x, torch.zeros(x.shape[1], width, features * width, requires_grad=True),
        x if features > 1 else None) for x in (q, k))
    for out in (kernels.mlstm(phi_q, phi_k, v, gate, gate)[0],
                kernels.window_attention(q, k, v, window=512, sinks=4)):
        out.sum().backward()

    types = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
             torch.int32: "*i32"}
    for kernel, (values, options) in launches.items():
        signature, constants, aligned = {}, {}, {}
        for i, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name], aligned[(i,)] = types[value.dtype], [
                    ["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "i32"
        for capability in capabilities:
            compiled = triton.compile(ASTSource(kernel, signature, constants, aligned),
                                      target=GPUTarget("cuda", capability, 32), options=options)
            print(json.dumps({"kernel": kernel.__name__, "capability": capability,
                              "warps": options["num_warps"], **resources(compiled)}), flush=True)


def test_a_student_on_kernels_learns_as_one_without():
    """Through model.py: hidden states and all gradients of a packed row, one layer of a teacher;
    and those of the new parameters alone, as in stage I, where kernels leave out what v and x need.
    """
    teacher = model.load_pretrained(ROOT / "tests/teacher", device=DEVICE)
    teacher.model["layers"] = teacher.model["layers"][:1]
    teacher.config = teacher.config.with_layers(1)
    tokens = torch.randint(0, 1000, (1, 24), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ids = (torch.arange(24) // 15)[None].to(DEVICE)
    weights = torch.randn(1, 24, teacher.config.hidden_size,
                          generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = []
    for choice in ("torch", "triton"):
        student = model.student_from_teacher(teacher, window=8, kernels=choice)
        hidden = student.hidden(tokens, document_ids=ids)
        (hidden * weights).sum().backward()
        found.append([hidden.detach(), *(p.grad.clone() for p in student.parameters())])
        student.zero_grad()
    for a, b in zip(*found):
        assert (a - b).norm() <= 1e-4 * b.norm().clamp_min(0.1)  # some gradients are 0 by symmetry
    for name, p in student.named_parameters():
        p.requires_grad_(model.is_new(name))
    (student.hidden(tokens, document_ids=ids) * weights).sum().backward()
    for (name, p), expected in zip(student.named_parameters(), found[1][1:]):
        assert torch.equal(p.grad, expected) if model.is_new(name) else p.grad is None, name


def test_kernels_compile_without_spilling():
    """For A100 and H100, the widest heads and features: they need the most."""
    output = subprocess.run(
        [sys.executable, __file__, "128", "4", "80", "90"], check=True, timeout=600, text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        stdout=subprocess.PIPE).stdout
    kernels_used = [json.loads(x) for x in output.splitlines() if x.startswith("{")]
    assert len(kernels_used) == 2 * 14
    few = 24 if triton.__version__[:3] == "3.6" else 0  # Triton 3.6, gates_fwd (8 for sm_90)
    for used in kernels_used:
        assert used["STACK"] <= few and used["LOCAL"] == 0, used
        assert used["shared"] <= {80: 166912, 90: 232448}[used["capability"]], used
        assert used["capability"] == 80 or not used["mma.sync"], used  # Hopper: wgmma for all


if __name__ == "__main__":
    compile_all(*map(int, sys.argv[1:]))
