"""Are the Triton kernels right on this GPU, and how fast? One command, one report to send back.

    python tests/time_gpu.py --report report.md            # about 20 minutes on an H100
    python tests/time_gpu.py --report report.md --only check table
    python tests/time_gpu.py --report report.md --tiny     # rehearsal in Triton's interpreter, CPU

Parts, each written to the report as soon as it is known: `check` (every kernel against its plain
PyTorch form in float64, outputs and gradients), `table` (times against the least the GPU could
take, plain PyTorch, FlexAttention and SDPA), `distill` (a minute of both stages with kernels and
without: losses, tokens/s, peak memory beside the plan), `generate` (tokens/s of compiled steps).

Nothing here raises: what fails is a row that says why, and the exit status is 1.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WIDTHS = [(d, f) for d in (64, 128) for f in (1, 2, 4)], [(16, 1), (16, 2)]  # in earnest, tiny
PARTS = ("check", "table", "distill", "generate")


class Report:
    """Markdown, to the terminal and to a file line by line: a crash leaves what was known."""

    def __init__(self, path):
        self.file, self.failures = open(path, "w", encoding="utf-8"), 0

    def write(self, line=""):
        print(line, flush=True)
        print(line, file=self.file, flush=True)

    def row(self, *cells):
        self.write("| " + " | ".join(f"{x:.3g}" if isinstance(x, float) else str(x)
                                     for x in cells) + " |")

    def table(self, title, *columns):
        self.write(f"\n## {title}\n")
        self.row(*columns)
        self.row(*["---"] * len(columns))

    def attempt(self, function, *names, columns=1):
        """function(), or None and a row that says what went wrong in it."""
        try:
            return function()
        except Exception as error:  # out of memory, a kernel that does not compile: all are news
            self.failures += 1
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300].replace("|", "/")
            self.row(*names, f"FAILED: {text}", *[""] * (columns - 1))
            print(traceback.format_exc(), file=sys.stderr)


# ----------------------------------------------------------------------------------------------
# check
# ----------------------------------------------------------------------------------------------
# A kernel gets inputs in its dtype; the reference gets the same numbers in float64 and is not a
# kernel: model.py's plain form, or a definition written here. What is compared are outputs and the
# gradients of a fixed random projection of them, so that no error hides in a symmetric loss.


def random_inputs(device, B, H, K, T, D, features, dtype, wild=False):
    """Seeded q, k of feature width, v, log_i, log_f. wild: gates at their extremes."""
    r = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(B, T, heads, width, generator=r, device=device, dtype=dtype)
               .transpose(1, 2) for heads, width in ((H, features * D), (K, features * D), (K, D)))
    log_i, forget = torch.randn(2, B, T, H, generator=r, device=device).transpose(2, 3)
    log_f = -10 ** (2 * forget) if wild else logsigmoid(forget + 4)
    return q.softmax(-1), k.softmax(-1), v, log_i * (25 if wild else 1), log_f


def feature_map(x, weight, plain=None):
    """The definition: the second half of the columns reads `plain`, where there is one."""
    if plain is None:
        return (x @ weight).softmax(-1)
    a, b = weight.chunk(2, dim=-1)
    return torch.cat((x @ a, plain @ b), dim=-1).softmax(-1)


def results(function, inputs, dtype):
    """[outputs], [gradients] of a fixed random projection of function(*inputs in dtype)."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    outputs = function(*inputs)
    r = torch.Generator(inputs[0].device).manual_seed(1)
    loss = sum((x.to(dtype or torch.float32) * torch.randn(
        x.shape, generator=r, device=x.device)).sum() for x in outputs)
    return outputs, torch.autograd.grad(loss, inputs)


def worst(found, expected):
    """Largest root mean square error, relative to that of the result, but to 0.1 at least: with
    gates at their extremes gradients cancel to nearly nothing."""
    def rms(x):
        return x.double().pow(2).mean().sqrt().item()
    return max(rms(a.double() - b) / max(rms(b), 0.1) for a, b in zip(found, expected, strict=True))


def cases(kernels, model, device, K, T, D, features, dtype, wild):
    """(operator, kernels' form, plain form, inputs), of 2 K query heads."""
    q, k, v, log_i, log_f = random_inputs(device, 1, 2 * K, K, T, D, features, dtype, wild)
    ids = torch.arange(T, device=device)[None] // 147
    x, plain, w = q[..., :D] * D, k[..., :D].repeat(1, 2, 1, 1), torch.randn(
        2 * K, D, features * D, device=device, generator=torch.Generator(device).manual_seed(2))
    sources = (x, w.to(dtype)) if features == 1 else (x, w.to(dtype), plain)
    yield ("mlstm", lambda *x: kernels.mlstm(*x, document_ids=ids)[:1],
           lambda *x: model.mlstm_chunkwise(*x, document_ids=ids)[:1], (q, k, v, log_i, log_f))
    yield ("feature map", lambda *x: [kernels.feature_map(*x)],
           lambda *x: [feature_map(*x)], sources)
    if features == 1:
        narrow = [x[..., :D] for x in (q * D, k * D, v)]
        options = dict(window=90, sinks=4, document_ids=ids)
        yield ("window", lambda *x: [kernels.window_attention(*x, **options)],
               lambda *x: [model.window_attention(*x, **options)], narrow)


def check(report, device, tiny):
    """Limits: 1e-4 in fp32; in bf16 3e-2, or 2e-1 with wild gates: where one token has nearly all
    the weight dh.v - dh.h cancels, and h is known to 2^-9 (measured: up to 0.08, T = 40)."""
    import kernels
    import model

    report.table("check: kernels against float64", "operator", "head", "features", "dtype", "gates",
                 "outputs", "gradients", "limit", "")
    settings = ((torch.float32, False, 1e-4), (torch.float32, True, 1e-4),
                (torch.bfloat16, False, 3e-2), (torch.bfloat16, True, 2e-1))
    K, T = (1, 20) if tiny else (2, 300)
    for D, features in WIDTHS[tiny]:
        for dtype, wild, limit in settings[::3] if tiny else settings:
            names = D, features, str(dtype)[6:], "wild" if wild else "ordinary"
            for operator, ours, plain, inputs in cases(kernels, model, device, K, T, D, features,
                                                       dtype, wild):
                def errors():
                    pairs = zip(results(ours, inputs, None), results(plain, inputs, torch.float64))
                    return [worst(*pair) for pair in pairs]

                if found := report.attempt(errors, operator, *names, columns=4):
                    right = max(found) < limit
                    report.failures += not right
                    report.row(operator, *names, *found, limit, "ok" if right else "WRONG")


# ----------------------------------------------------------------------------------------------
# table
# ----------------------------------------------------------------------------------------------
# A time alone says little about a kernel: "x floor" is the time as a multiple of the least that
# this GPU could take, whose two speeds (a copy, a large product) are measured on the spot. Forms
# that do not fit memory are rows that say so.


def floor_ms(B, H, K, T, D, features, window, bandwidth, flops):
    """The least time in bf16: {operator: (forward, forward + backward)} in ms.

    mLSTM: the bytes that chunks of 128 cannot avoid. Forward: q, h once, k, v for the states and
    again for h, states written and read. Backward: q, dh, k, v and states twice over, once more h,
    dh for delta, and dq, dk, dv and the states' gradients. Feature map: x (rotated, plain), phi;
    then phi, dphi, x and dx, dx twice for W. Window: arithmetic of W keys a query, 2 products
    forward, 5 more backward.
    """
    F, tokens = features * D, 2 * B * T  # bytes of one bf16 number a token
    states = tokens * H * F * D // 128
    forward = tokens * (H * (F + D) + 2 * K * (F + D)) + 2 * states
    both = forward + tokens * (H * (3 * F + 4 * D) + 3 * K * (F + D)) + 4 * states
    x, phi = tokens * (H + K) * D * min(features, 2), tokens * (H + K) * F
    pairs = 2 * B * H * T * min(window, T) * D
    return {"mlstm": (1e3 * forward / bandwidth, 1e3 * both / bandwidth),
            "feature map": (1e3 * (x + phi) / bandwidth, 1e3 * (3 * x + 3 * phi) / bandwidth),
            "window": (2e3 * pairs / flops, 7e3 * pairs / flops)}


def contenders(kernels, model, inputs, features, window):
    """(operator, name, function, inputs): ours, plain PyTorch, and PyTorch's own attention."""
    q, k, v = inputs[:3]
    (_, H, T, F), D, K = q.shape, v.shape[-1], v.shape[1]
    yield "mlstm", "kernels.py", lambda *x: kernels.mlstm(*x)[0], inputs
    yield "mlstm", "model.py", lambda *x: model.mlstm_chunkwise(*x)[0], inputs
    leaves = [torch.randn(1, T, n, D, device=v.device, dtype=v.dtype).transpose(1, 2)
              .requires_grad_() for n in (H, K)]
    weights = [torch.randn(n, D, F, device=v.device, dtype=v.dtype).requires_grad_()
               for n in (H, K)]
    for name, form in (("kernels.py", kernels.feature_map), ("model.py", feature_map)):
        yield ("feature map", name, lambda q, k, w, u, f=form: torch.cat(
            [f(x, y, x if features > 1 else None) for x, y in ((q, w), (k, u))], dim=1),
            [*leaves, *weights])
    if features > 1:
        return  # the window does not know of features
    options = dict(window=window, sinks=4)
    yield "window", "kernels.py", lambda *x: kernels.window_attention(*x, **options), inputs[:3]
    yield "window", "model.py", lambda *x: model.window_attention(*x, **options), inputs[:3]
    if v.is_cuda:  # on a CPU FlexAttention has no backward
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        mask = create_block_mask(
            lambda b, h, t, s: (s <= t) & ((s > t - window) | (s < 4)), None, None, T, T)
        flex = torch.compile(flex_attention)
        yield "window", "FlexAttention", lambda *x: flex(*x, block_mask=mask, enable_gqa=True
                                                         ), inputs[:3]
    yield "all keys", "SDPA", lambda *x: scaled_dot_product_attention(
        *x, is_causal=True, enable_gqa=True), inputs[:3]


def table(report, device, tiny):
    """Times, and how many floors they are. The floor's speeds are measured by the same timer."""
    import kernels
    import model
    from triton.testing import do_bench

    def timer(function):
        if not tiny:
            return do_bench(function, return_mode="median")
        started = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - started)

    H, K, window, size = (2, 1, 16, 64) if tiny else (32, 8, 512, 8192)
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    bandwidth = 2e3 * x.nbytes / timer(lambda: x.clone())
    flops = 2e3 * size**3 / timer(lambda: x @ x)
    report.table(f"table: {H} / {K} heads, batch 1, bf16, window {window}; copy "
                 f"{bandwidth / 1e12:.2f} TB/s, products {flops / 1e12:.0f} TFLOP/s",
                 "operator", "form", "head", "features", "tokens", "forward ms", "x floor",
                 "and backward ms", "x floor")
    for D, features in WIDTHS[tiny]:
        for T in (20,) if tiny else (4096, 16384, 65536):
            floors = floor_ms(1, H, K, T, D, features, window, bandwidth, flops)
            inputs = [x.requires_grad_() for x in random_inputs(
                device, 1, H, K, T, D, features, torch.bfloat16)]
            for operator, name, function, used in contenders(kernels, model, inputs, features,
                                                             window):
                def times():
                    with torch.no_grad():
                        out = function(*used)
                        forward = timer(lambda: function(*used))
                    return forward, timer(lambda: torch.autograd.grad(function(*used), used, out))

                names = operator, name, D, features, T
                if found := report.attempt(times, *names, columns=4):
                    least = floors.get(operator, (float("nan"),) * 2)
                    report.row(*names, found[0], found[0] / least[0], found[1], found[1] / least[1])


# ----------------------------------------------------------------------------------------------
# distill, generate
# ----------------------------------------------------------------------------------------------
# Whole runs, since a kernel may be right and fast by itself and wrong or slow where it is used. The
# two runs differ in rounding only: their losses should agree to about a hundredth. The plan that
# distill.py prints for a stage and the peak that the wrapper prints should agree to 15 %.

# Runs distill.py as its command does, then says how much memory the GPU had in use at most.
WRAPPER = """import atexit, runpy, sys, torch
atexit.register(lambda: torch.cuda.is_available() and print(
    f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""


def distill(report, device, tiny):
    """The shipped teacher, both stages, on kernels and on plain PyTorch: the same data and seed."""
    tokens = "4096" if tiny else "1e6"
    for kernels in ("torch",) if tiny else ("triton", "torch"):
        report.write(f"\n## distill: kernels {kernels}\n\n```")

        def run():
            with tempfile.TemporaryDirectory() as out:
                started = time.time()
                done = subprocess.run(
                    [sys.executable, "-c", WRAPPER, "distill.py", "--out", f"{out}/run", "--device",
                     device, "--kernels", kernels, "--align-tokens", tokens, "--tokens", tokens],
                    cwd=ROOT, capture_output=True, text=True, timeout=1200)
                log = Path(out, "run", "log.jsonl")
                rows = [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
            report.write(done.stdout)
            for stage in dict.fromkeys(x["stage"] for x in rows):
                last = [x for x in rows if x["stage"] == stage][-1]
                report.write(f"last step of {stage}: {json.dumps(last)}")
            bars = [x for x in done.stderr.replace("\r", "\n").splitlines() if "100%" in x]
            report.write("\n".join([*bars, f"whole run {time.time() - started:.0f} s"]))
            if done.returncode:
                raise RuntimeError(f"exit status {done.returncode}: {done.stderr[-300:]}")

        report.attempt(run, "distill", kernels)
        report.write("```")


def generate(report, device, tiny):
    """Greedy tokens/s of the shipped teacher and its student, a compiled step at a time."""
    import model

    report.table("generate: the shipped teacher and a student of it, compiled steps", "model",
                 "batch", "context", "tokens/s")
    teacher = model.load_pretrained(ROOT / "tests/teacher", device=device)
    student = model.student_from_teacher(teacher, window=64)
    new = 4 if tiny else 256
    for name, which in (("teacher", teacher), ("student", student)):
        for batch, context in ((1, 8),) if tiny else ((1, 256), (8, 256), (1, 4096), (8, 4096)):
            def speed():
                tokens, times = torch.randint(1, 500, (batch, context), device=device), []
                with torch.no_grad():
                    for _ in model.stream(which, tokens, max_new_tokens=new, stop=(),
                                          compile=not tiny):
                        times += [time.perf_counter()]
                half = len(times) // 2  # the first half pays for the prompt and for compiling
                return batch * (len(times) - 1 - half) / (times[-1] - times[half])

            if found := report.attempt(speed, name, batch, context):
                report.row(name, batch, context, float(found))


def main(argv=None):
    """The command. Exit status 0 if all is right, 1 if a row says otherwise, 2 without a GPU."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--report", required=True, metavar="FILE")
    p.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    p.add_argument("--tiny", action="store_true", help="rehearse on the CPU, in the interpreter")
    args = p.parse_args(argv)
    if args.tiny:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    elif not torch.cuda.is_available():
        print("time_gpu.py needs a CUDA GPU, and PyTorch sees none here; --tiny rehearses without")
        return 2
    import triton

    report, device = Report(args.report), "cpu" if args.tiny else "cuda"
    gpu = "none" if args.tiny else (f"{torch.cuda.get_device_name()}, "
                                    f"{torch.cuda.mem_get_info()[1] / 1e9:.0f} GB")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                            capture_output=True).stdout.strip()
    report.write(f"# time_gpu.py at {commit or 'no commit'}\n\nGPU {gpu}; torch {torch.__version__}"
                 f" (CUDA {torch.version.cuda}), triton {triton.__version__}, Python "
                 f"{platform.python_version()}, {platform.platform()}")
    for part in args.only:
        started = time.time()
        report.attempt(lambda: globals()[part](report, device, args.tiny), part)
        report.write(f"\n({part}: {time.time() - started:.0f} s)")
    report.write(f"\n{report.failures} failures")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
