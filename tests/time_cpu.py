"""Time the plain PyTorch forms on a CPU, beside others: README, "Memory and speed".

    python tests/time_cpu.py [--threads 2]      # the mLSTM, the window, a decoding step; 4 minutes
    pip install --no-deps mlstm_kernels einops  # a rival; like transformers', timed where installed
    git worktree add ../before 6927858          # whole runs, this checkout and another in turns:
    python tests/time_cpu.py --against ../before --threads 2

Contenders take turns, so that a noisy machine slows all of them. After a round to warm up (fresh
memory costs page faults) printed are medians of 11 rounds of the first case, 3 of the cost a token
and 30 of decoding; the other cases take seconds and have one.
"""

import argparse
import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model  # noqa: E402


def rivals():
    """Other chunkwise mLSTMs in PyTorch that are installed: {name: f(q, k, v, i, f)}."""
    found = {}
    with contextlib.suppress(ImportError):
        from mlstm_kernels.torch.chunkwise.native import mlstm_chunkwise__native_autograd as native
        found["mlstm_kernels native"] = lambda q, k, v, i, f: native(
            q, k, v, i, F.logsigmoid(f), chunk_size=64)
    with contextlib.suppress(ImportError):
        from transformers.models.xlstm.modeling_xlstm import mlstm_chunkwise_native_autograd as hf
        found["transformers xlstm"] = lambda q, k, v, i, f: hf(
            q, k, v, i, f, chunk_size=64, return_last_states=False)
    return found


def inputs(H, T, D, features=1):
    """q, k as feature maps give them, v, logits of input and forget gate: leaves with gradients."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, H, T, features * D).softmax(-1) for _ in range(2))
    gates = torch.randn(1, H, T), torch.randn(1, H, T) + 3
    return [x.requires_grad_() for x in (q, k, torch.randn(1, H, T, D), *gates)]


def ours(q, k, v, i, f):
    return model.mlstm_chunkwise(q, k, v, i, F.logsigmoid(f))[0]


def our_window(q, k, v, i, f):
    return model.window_attention(q, k, v, window=512, sinks=4)


def causal(q, k, v, i, f):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def passes(f, x):
    """Forward, and forward and backward, of f(*x), as functions. Gradients are not added up: that
    would read and write as much memory as all inputs have, once more."""
    return (lambda: torch.no_grad()(f)(*x),
            lambda: torch.autograd.grad(f(*x).sum(), x, allow_unused=True))


def in_turns(contenders, rounds):
    """{name: function} -> {name: median seconds} of `rounds` rounds after one to warm up."""
    times = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, function in contenders.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return {name: sorted(x[1:])[rounds // 2] for name, x in times.items()}


def compare(title, x, contenders, rounds):
    """Print forward, and forward and backward, of {name: function of the inputs x}."""
    print(f"\n{title}: milliseconds, times the first")
    for i, label in enumerate(("forward", "and backward")):
        seconds = in_turns({name: passes(f, x)[i] for name, f in contenders.items()}, rounds)
        first = next(iter(seconds.values()))
        print(f"  {label:<14}" + "   ".join(f"{name} {s * 1e3:.1f} ({s / first:.2f})"
                                            for name, s in seconds.items()), flush=True)


def decoding_step(lengths, H=32, K=8, D=128):
    """One token through the mixers of a student's and a teacher's layer, at several contexts."""
    config = model.ModelConfig(
        family="llama", vocab_size=64, hidden_size=H * D, intermediate_size=64, num_layers=1,
        num_heads=H, num_kv_heads=K, head_dim=D, norm_eps=1e-5, tied=True, qkv_bias=False,
        o_bias=False, mlp_bias=False, layer_windows=(None,), layer_ropes=(model.Rope(1e4),),
        max_positions=max(lengths) + 1, eos_ids=())
    mixers = {"teacher": model.Attention(config, 0)} | {
        f"student, {n} D features": model.HybridAttention(dataclasses.replace(
            config, hybrid=model.Hybrid(features=n)), 0) for n in (1, 4)}
    tables = model.rope_tables(config.layer_ropes[0], torch.zeros(1, 1), D)
    x = torch.randn(1, 1, H * D)
    print(f"\none token, a layer's mixer ({H} heads of {D}, {K} key/value heads), milliseconds")
    for name, mixer in mixers.items():
        if name != "teacher":
            model.initialise_mixer(mixer)
        heads = mixer.heads(x, tables)
        steps = {}  # not student and teacher in turns: the teacher's 0.5 GB would empty the caches
        for length in lengths:
            cache = mixer.new_cache(1, length + 200, x)
            if name == "teacher":  # untouched memory is one page of zeros, read over and over
                cache.k.normal_(), cache.v.normal_()
            cache.length.fill_(length)
            steps[length] = torch.no_grad()(partial(mixer.mix, heads, cache=cache))
        seconds = in_turns(steps, 30)
        print(f"  {name}  " + "   ".join(f"{s * 1e3:.2f} at {length:,} tokens"
                                         for length, s in seconds.items()))


def whole_runs(against, rounds, threads):
    """`python distill.py` in both checkouts: tokens/s by its own bars, which give whole seconds.

    At one width of features, which the checkouts' presets need not have in common.
    """
    tokens = 819_200  # a stage
    for _ in range(rounds):
        for checkout in (against, ROOT):
            with tempfile.TemporaryDirectory() as out:
                run = subprocess.run(
                    [sys.executable, "distill.py", "--out", f"{out}/run", "--align-tokens",
                     str(tokens), "--tokens", str(tokens), "--features", "4"], cwd=checkout,
                    check=True, capture_output=True, text=True,
                    env=os.environ | {"OMP_NUM_THREADS": str(threads)})
            speeds = []
            for stage in ("align", "distil"):
                bar = re.findall(rf"{stage}: 100%.*?\[(\d+):(\d+)<", run.stderr)[-1]
                speeds.append(tokens / (60 * int(bar[0]) + int(bar[1])) / 1e3)
            print(f"  {str(checkout):<40} thousand tokens/s: stage I {speeds[0]:.1f}, "
                  f"stage II {speeds[1]:.1f}", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--against", type=Path, metavar="CHECKOUT", help="time whole runs instead")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} thread(s)")
    if args.against:
        return whole_runs(args.against.resolve(), 2, args.threads)
    for H, D, rounds in ((9, 64, 11), (32, 128, 1)):  # SmolLM2's and Llama 3.1's heads
        compare(f"mLSTM, {H} heads of {D}, 4096 tokens", inputs(H, 4096, D),
                {"ours": ours} | rivals(), rounds)  # rivals take 10 s a round, and know no F
        compare(f"mLSTM, {H} heads of {D} with 4 D features, 4096 tokens",
                inputs(H, 4096, D, features=4), {"ours": ours}, rounds)
    x = inputs(8, 16384, 64)
    compare("mLSTM, 8 heads of 64, 16k tokens", x, {"ours": ours, "SDPA": causal}, 1)
    compare("window 512 + 4 sinks, 8 heads of 64, 16k tokens", x,
            {"ours": our_window, "SDPA": causal}, 1)
    print("\nmLSTM, 8 heads of 64: microseconds a token, forward and with backward")
    many = {T: passes(ours, inputs(8, T, 64)) for T in (4096, 16384, 65536)}
    forward, both = (in_turns({T: x[i] for T, x in many.items()}, 3) for i in range(2))
    for T in many:
        print(f"  {T:>6,} tokens  {forward[T] / T * 1e6:.2f}   {both[T] / T * 1e6:.2f}")
    decoding_step((1024, 8192, 65536))
    decoding_step((1024, 8192, 65536), H=9, K=3, D=64)


if __name__ == "__main__":
    main()
