"""Triton kernels for the parts of model.py that a GPU spends its time in. Optional: speed only.

Three operators, each the same function as its plain PyTorch form in model.py (the definition):

    operator           plain form                   kernels forward; backward
    mlstm              model.mlstm_chunkwise        gates_fwd, chunk_sums, scan_fwd, out_fwd;
                                                    delta, the first three again, chunk_sums,
                                                    scan_bwd, q_bwd, k_bwd, v_bwd, f_bwd
    window_attention   model.window_attention       window_fwd; delta, window_dq, window_dkv
    feature_map        model.FeatureMap             feature_fwd; PyTorch's

The key idea: all three are limited by memory traffic or by the tensor cores. So each moves little
beside inputs, outputs and the chunks' states, keeps what lies between on the chip, and hands the
tensor cores tiles of 64 to 128. Whoever knows Triton's tutorials on softmax and flash attention
knows the window; new is the mLSTM, whose state makes it linear in T (section 2).

What is kept, so that a fast kernel is a right one:
* Gates, S, z, stabilisers, softmax, every sum: fp32 (sums of forget gates: fp64). Operands of
  products, the S of each chunk among them, are bf16 when v is bf16, else fp32 as three TF32
  products, fp16 included, because S outgrows fp16.
* No atomics: every result is the same in every run.
* No size overflows: pointers are int64 where batch, heads and tokens enter, int32 inside a tile.

Not here: one decoding step (T = 1), which has nothing to fuse and stays in PyTorch; the mix of the
two readers (Eq. 11), where a fused backward would save 0.2 of the 27 ms that an 8B layer takes for
16k tokens (counted); other widths than WIDTHS and FEATURE_WIDTHS (`refusal` says so); autotuning,
which would need a GPU to choose and would choose anew on each machine.

Layout: in this file (B, T, heads, width), as projections produce it; the public functions take
and return model.py's (B, heads, T, width) views of it. Names: B batch, T tokens, H query heads,
K key/value heads, D width of a head, E of a value head, F of its features; L tokens a chunk, N
chunks; BR, BF, BQ, BK, ... rows or columns of a tile; MM the operands' type.

Sections: 1 tiles and checks; 2 mLSTM forward; 3 backward; 4 as an operator; 5 window; 6 feature
map. tests/time_gpu.py checks and times all of it on a GPU.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

WIDTHS = (16, 32, 64, 128)  # of a head
FEATURE_WIDTHS = (*WIDTHS, 256, 512)  # of a head's mapped queries and keys
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when this file was imported

# ----------------------------------------------------------------------------------------------
# 1. Tiles: what all kernels share
# ----------------------------------------------------------------------------------------------
# A program of the grid works on a tile: a few dozen consecutive tokens of one head. Its first
# token is `row` = b T + t0, and `n` of its tokens exist: the last tile of a sequence is ragged,
# and what does not exist is read as 0 and not written. The row goes into the pointer as int64 and
# only offsets inside the tile are int32: 8 rows of 131,072 tokens with 32 heads of 512 features
# have 1.7e10 numbers, 8 times what int32 counts, while a tile spans 128 x 32 x 512 = 2^21.
#
# Grids: heads and batch in x (at most 2^31 - 1), tiles of tokens in y (at most 65,535, so 2 million
# tokens a sequence with the smallest tiles). Neighbours in x run at the same time, so tiles that
# read the same rows (of k, of the state) are neighbours there and meet them in the L2 cache.


@triton.jit
def rows(x, row, head, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, cols):
    """Pointers to a (BLOCK, len(cols)) tile of x (B, T, HEADS, WIDTH)."""
    x += (row.to(tl.int64) * HEADS + head) * WIDTH
    return x + tl.arange(0, BLOCK)[:, None] * (HEADS * WIDTH) + cols[None, :]


@triton.jit
def load(x, row, n, head, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, cols):
    """That tile, zero where no token exists."""
    seen = (tl.arange(0, BLOCK) < n)[:, None]
    return tl.load(rows(x, row, head, HEADS, WIDTH, BLOCK, cols), mask=seen, other=0.0)


@triton.jit
def store(x, value, row, n, head, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
          cols):
    """Write a tile back, where tokens exist."""
    seen = (tl.arange(0, BLOCK) < n)[:, None]
    value = value.to(x.dtype.element_ty)
    tl.store(rows(x, row, head, HEADS, WIDTH, BLOCK, cols), value, mask=seen)


@triton.jit
def vector(x, row, n, head, HEADS: tl.constexpr, BLOCK: tl.constexpr, other: tl.constexpr = 0):
    """(BLOCK,) of x (B, T, HEADS), `other` where no token exists."""
    t = tl.arange(0, BLOCK)
    return tl.load(x + row.to(tl.int64) * HEADS + head + t * HEADS, mask=t < n, other=other)


@triton.jit
def first_seen(start, row, n, t0, BLOCK: tl.constexpr):
    """First token of each token's document, counted from t0. Missing tokens see none at all."""
    return vector(start, row, n, 0, 1, BLOCK, 1 << 30) - t0


@triton.jit
def store_vector(x, value, row, n, head, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Write such a vector back."""
    t = tl.arange(0, BLOCK)
    tl.store(x + row.to(tl.int64) * HEADS + head + t * HEADS, value, mask=t < n)


@triton.jit
def product(a, b, MM: tl.constexpr):
    """a @ b accumulated in fp32, operands in MM: bf16, or fp32 to (almost) full precision."""
    return tl.dot(a.to(MM), b.to(MM), input_precision="tf32x3")


def likes(*tensors):
    """New tensors of their shapes and dtypes."""
    return tuple(map(torch.empty_like, tensors))


def operator(name, fake):
    """Decorator: register a function with torch.library, `fake` giving its results' shapes."""
    def register(function):
        op = torch.library.custom_op(f"xlstm_kernels::{name}", function, mutates_args=())
        op.register_fake(fake)
        return op
    return register


@triton.jit
def delta_kernel(dh, h, delta, n_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """delta = sum over the width of dh * h, both (rows, WIDTH)."""
    row = tl.program_id(0) * BLOCK
    n, cols = n_rows - row, tl.arange(0, WIDTH)
    a = load(dh, row, n, 0, 1, WIDTH, BLOCK, cols).to(tl.float32)
    b = load(h, row, n, 0, 1, WIDTH, BLOCK, cols).to(tl.float32)
    store_vector(delta, tl.sum(a * b, axis=1), row, n, 0, 1, BLOCK)


def row_delta(dh, h):
    """dh, h (B, T, H, E) -> (B, T, H) fp32."""
    delta = dh.new_empty(dh.shape[:-1], dtype=torch.float32)
    n = delta.numel()
    delta_kernel[(triton.cdiv(n, 64),)](dh, h, delta, n, WIDTH=dh.shape[-1], BLOCK=64)
    return delta


def matmul_type(dtype):
    """Operand type of tl.dot. (The interpreter garbles bf16 products, so it gets fp32.)"""
    return tl.bfloat16 if dtype == torch.bfloat16 and not INTERPRETED else tl.float32


def token_major(*tensors):
    """(B, heads, T, ...) -> contiguous (B, T, heads, ...): no copy for views of projections."""
    return [x.transpose(1, 2).contiguous() for x in tensors]


def document_starts(document_ids, x):
    """First token of each token's document, (B, T) int32, and -1 in the first document.

    -1 there, since the incoming state belongs to the first document: a document sees the state of a
    chunk if it began before the chunk.
    x (B, heads, T, width): shape and device when document_ids is None.
    """
    B, _, T, _ = x.shape
    if document_ids is None:
        return torch.full((B, T), -1, dtype=torch.int32, device=x.device)
    if document_ids.shape != (B, T):
        raise ValueError(f"document_ids has shape {tuple(document_ids.shape)}; it needs ({B}, {T})")
    new = document_ids[:, 1:] != document_ids[:, :-1]
    index = torch.where(new, torch.arange(1, T, device=x.device), -1)
    return pad(index, (1, 0), value=-1).cummax(1).values.int()


def document_stops(start):
    """One past the last token of each token's document, (B, T) int32, from document_starts."""
    index = torch.arange(start.shape[1], device=start.device, dtype=torch.int32)
    begins = torch.where(start == index, index, len(index))[:, 1:]
    return pad(begins, (0, 1), value=len(index)).flip(1).cummin(1).values.flip(1).contiguous()


def refusal(head_dim, features):
    """Why the kernels cannot serve heads of this width and feature multiple: a sentence, or None.

    Tiles are powers of two, so widths are; padding 80 or 96 to 128 would move up to 1.6 times the
    bytes. Heads of 256 would need tiles over the head too.
    """
    if head_dim not in WIDTHS:
        return (f"the Triton kernels take heads of width {', '.join(map(str, WIDTHS))}, and these "
                f"have {head_dim}")
    if head_dim * features not in FEATURE_WIDTHS:
        return (f"the Triton kernels take features of width {', '.join(map(str, FEATURE_WIDTHS))}, "
                f"and these have {features} x {head_dim}")
    return None


def check(name, widths=WIDTHS, **tensors):
    """One clear ValueError for what the kernels do not support."""
    q = next(iter(tensors.values()))
    for key, x in tensors.items():
        if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"kernels.{name}: {key} is {x.dtype}; the kernels take bfloat16, "
                             "float16 or float32 (kernels=\"torch\" takes any)")
        if not (x.is_cuda or INTERPRETED):
            raise ValueError(f"kernels.{name}: {key} is on {x.device}; the kernels need a CUDA "
                             "device (on a CPU use kernels=\"torch\")")
        if x.shape[-1] not in widths:
            raise ValueError(f"kernels.{name}: {key} has width {x.shape[-1]}; the kernels have "
                             f"widths {widths} (kernels=\"torch\" has all)")
        if x.dim() != 4 or x.shape[0] != q.shape[0] or x.shape[2] != q.shape[2] or (
                q.shape[1] % x.shape[1] or x.shape[2] == 0):
            raise ValueError(f"kernels.{name}: {key} has shape {tuple(x.shape)}, which does not "
                             f"fit {tuple(q.shape)}, (batch, heads, tokens, width)")


# ----------------------------------------------------------------------------------------------
# 2. The mLSTM: forward
# ----------------------------------------------------------------------------------------------
# Linear attention with gates: token t sees token s with weight W_ts q_t.k_s, where
#
#     W_ts = exp(log_i_s + sum of log_f after s up to t),
#
# divided by the sum of these weights. Since q.k is a plain product, all tokens before a chunk of L
# may be summed up once, in S = sum W k (x) v (F, E) and z = sum W k (F). So a chunk is attention
# over itself, as in flash attention but without a softmax, plus one product with the state:
#
#     h_t = (sum_s W_ts (q_t.k_s) v_s + carry_t q_t S) / (sum_s W_ts (q_t.k_s) + carry_t q_t.z)
#     S  <- keep S + sum_s write_s k_s (x) v_s           z <- keep z + sum_s write_s k_s
#
# carry_t, write_s, keep: what the gates leave of the state at t, of token s at the chunk's end, of
# the state at the chunk's end. W may exceed any float (input gates are exponentials), so all are
# kept as logarithms and divided by the largest in sight before the exponential: m for a state
# (the true one is S e^m), r inside a chunk, lse = log of the denominator in the backward pass.
# (r_t holds b_t here, and not m: what model.py calls b_t + r_t is `top` in out_fwd.)
#
# Documents: a token sees s >= start, the first token of its document, and the state only if its
# document was open when the chunk began: start lies before the chunk. Start is -1 in the first
# document, to which a given state belongs.
#
# Four kernels, so that only one walks along the time:
#
#     gates_fwd    numbers of a chunk and head: sums of log_f, write, keep
#     chunk_sums   S and z of each chunk as if nothing had come before; all chunks at once
#     scan_fwd     decay and add those sums, element by element, chunk after chunk
#     out_fwd      h of all chunks at once
#
# The scan moves the states once more (read, write) than one program that walks all chunks with S in
# registers. But such programs are only B H F E / 64^2 and each waits for one product after another:
# 9 heads of 64 would keep 9 of an H100's 132 processors busy.
#
# Features may be wider than the head (F up to 512). Scores are sums over tiles of BF features and
# S is written and read tile by tile, so nothing on the chip grows with F. In global memory the
# states weigh F E / L numbers a token and head, against F of q: hence chunks of L = 128.


@triton.jit
def log_weights(s, log_i, b_s, t, b_t, norm, bound, BY_KEY: tl.constexpr):
    """log W - norm_t of tokens t and s of a chunk, [t, s] or, if BY_KEY, [s, t]; -inf where unseen.

    bound: the first token that each t sees; if BY_KEY, the first after s that does not see s (one
    number a row in both layouts, since numbers a column cost a thread 16 times the registers).
    Masked before the exponential: above the diagonal it would overflow. b goes in as two fp32
    numbers: a difference of the high parts is right to its own last bit, and tiles in fp64 would
    not fit registers.
    """
    high_s, high_t = b_s.to(tl.float32), b_t.to(tl.float32)
    key, query = log_i - (b_s - high_s).to(tl.float32), (b_t - high_t).to(tl.float32) - norm
    if BY_KEY:
        see = (s[:, None] <= t[None, :]) & (t[None, :] < bound[:, None])
        log_w = (high_t[None, :] - high_s[:, None]) + (query[None, :] + key[:, None])
    else:
        see = (s[None, :] <= t[:, None]) & (s[None, :] >= bound[:, None])
        log_w = (high_t[:, None] - high_s[None, :]) + (query[:, None] + key[None, :])
    return tl.where(see, log_w, float("-inf"))


@triton.jit
def gates_fwd(log_i, log_f, start,  # inputs
              b, r, write, peak, keep,  # outputs
              T, H: tl.constexpr, L: tl.constexpr):
    """Gates of one chunk and head.

    b (B, T, H) fp64: sum of log_f from the chunk's or the document's start, whichever is later.
    fp64, because weights are exp of differences of such sums: forget gates near 0 add up to -6000
    in a chunk, where fp32 knows differences to 5e-4 only. A sum over the mask and not a running
    sum, so that not even the rounding in one document depends on another.
    r (B, T, H): the largest log W_ts of the token's row.
    write (B, T, H), peak (B, H, N): token s enters the state at the chunk's end with weight
    write_s e^peak, the largest write being 1, and 0 for documents that ended in the chunk.
    keep (B, H, N): log of what is left of the incoming state; -inf if a document began.
    """
    bh, c, N = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row, n, h = bh // H * T + c * L, T - c * L, bh % H
    t, last, first = tl.arange(0, L), tl.minimum(n, L) - 1, first_seen(start, row, n, c * L, L)
    i, f = vector(log_i, row, n, h, H, L), vector(log_f, row, n, h, H, L).to(tl.float64)
    seen = (t[None, :] <= t[:, None]) & (t[None, :] >= first[:, None])  # [t, u]
    sums = tl.sum(tl.where(seen, f[None, :], 0.0), axis=1)
    store_vector(b, sums, row, n, h, H, L)
    log_w = log_weights(t, i, sums, t, sums, 0.0, first, False)
    store_vector(r, tl.max(log_w, axis=1), row, n, h, H, L)

    end = tl.sum(tl.where(t == last, sums, 0.0), axis=0)
    own = tl.load(start + row + last) - c * L  # where the document open at the end began
    log_write = tl.where((t < n) & (t >= own), end - sums + i, float("-inf"))
    top = tl.max(log_write, axis=0).to(tl.float32)
    store_vector(write, tl.exp((log_write - top).to(tl.float32)), row, n, h, H, L)
    tl.store(peak + bh * N + c, top)
    tl.store(keep + bh * N + c, tl.where(own < 0, end, float("-inf")).to(tl.float32))


@triton.jit
def chunk_sums(x, y, weight, z_weight,  # inputs: rows x (F wide), y (E wide), their weights
               S, z,  # outputs (B, H, N, F, E), (B, H, N, F)
               T, H: tl.constexpr, K: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
               L: tl.constexpr, BF: tl.constexpr, MM: tl.constexpr):
    """sum_s weight_s x_s (x) y_s and sum_s z_weight_s x_s over one chunk: BF rows of S and z.

    Forward x, y = k, v and both weights are write; backward x, y = q, dh. K heads of x and y
    serve H heads of weights.
    """
    tile, bh = tl.program_id(0) % (F // BF), tl.program_id(0).to(tl.int64) // (F // BF)
    c, N, h = tl.program_id(1), tl.num_programs(1), bh % H
    row, n, head = bh // H * T + c * L, T - c * L, h // (H // K)
    f, e = tile * BF + tl.arange(0, BF), tl.arange(0, E)
    x_s = load(x, row, n, head, K, F, L, f)
    weighted = load(y, row, n, head, K, E, L, e) * vector(weight, row, n, h, H, L)[:, None]
    # y is weighted, not x: a transposed operand that was computed is what failed (`k_bwd`), and
    # takes 123 registers a thread in the place of 61 (heads of 64, F 256).
    total = product(tl.trans(x_s), weighted, MM)
    at = (bh * N + c) * F + f
    tl.store(S + at[:, None] * E + e[None, :], total.to(S.dtype.element_ty))
    tl.store(z + at, tl.sum(x_s * vector(z_weight, row, n, h, H, L)[:, None], axis=0))


@triton.jit
def scan_fwd(S, z,  # in place: each chunk's own sums become the state that enters the chunk
             peak, keep, S0, z0, m0,  # inputs
             m, S_end, z_end,  # outputs; m (B, H, N + 1): stabilisers of those states
             N, F: tl.constexpr, E: tl.constexpr, BF: tl.constexpr):
    """The recurrence over chunks, for BF rows of one head's S and z. The true state is S e^m."""
    tile, bh = tl.program_id(0) % (F // BF), tl.program_id(0).to(tl.int64) // (F // BF)
    f = tile * BF + tl.arange(0, BF)
    fe = f[:, None] * E + tl.arange(0, E)[None, :]
    S_c, z_c, m_c = tl.load(S0 + bh * F * E + fe), tl.load(z0 + bh * F + f), tl.load(m0 + bh)
    for c in tl.range(N, num_stages=3):  # loads run ahead: no address depends on the state
        at = (bh * N + c) * F
        S_new, z_new = tl.load(S + at * E + fe), tl.load(z + at + f)
        tl.store(S + at * E + fe, S_c.to(S.dtype.element_ty))
        tl.store(z + at + f, z_c)
        tl.store(m + bh * (N + 1) + c, m_c)
        kept, top = tl.load(keep + bh * N + c), tl.load(peak + bh * N + c)
        m_next = tl.maximum(m_c + kept, top)
        # (m - m_next) is exact where it matters; (m + kept) - m_next would lose kept's last bits
        fade, gain = tl.exp((m_c - m_next) + kept), tl.exp(top - m_next)
        S_c, z_c, m_c = fade * S_c + gain * S_new, fade * z_c + gain * z_new, m_next
    tl.store(S_end + bh * F * E + fe, S_c)
    tl.store(z_end + bh * F + f, z_c)
    tl.store(m + bh * (N + 1) + N, m_c)


@triton.jit
def out_fwd(q, k, v, log_i, b, r, start, S, z, m,  # inputs
            out, lse, carry,  # outputs; lse = log of the denominator, carry = e^(m + b - lse)
            T, H: tl.constexpr, K: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
            L: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr, MM: tl.constexpr):
    """h of BR tokens t of one chunk and head: attention inside it, the state for all before."""
    t0, bh = tl.program_id(0) % (L // BR) * BR, tl.program_id(0).to(tl.int64) // (L // BR)
    c, N, h, kv = tl.program_id(1), tl.num_programs(1), bh % H, bh % H // (H // K)
    row, n = bh // H * T + c * L, T - c * L
    row_t, n_t, t = row + t0, n - t0, t0 + tl.arange(0, BR)  # this program's rows
    s, e = tl.arange(0, L), tl.arange(0, E)
    P = tl.zeros((BR, L), tl.float32)  # [t, s]
    for f0 in range(0, F, BF):
        f = f0 + tl.arange(0, BF)
        q_f = load(q, row_t, n_t, h, H, F, BR, f)
        P += product(q_f, tl.trans(load(k, row, n, kv, K, F, L, f)), MM)
    first, b_t = first_seen(start, row_t, n_t, c * L, BR), vector(b, row_t, n_t, h, H, BR)
    log_carry = (tl.load(m + bh * (N + 1) + c) + b_t).to(tl.float32)
    log_carry = tl.where(first < 0, log_carry, float("-inf"))
    top = tl.maximum(log_carry, vector(r, row_t, n_t, h, H, BR))
    carried = tl.exp(log_carry - top)
    P *= tl.exp(log_weights(s, vector(log_i, row, n, h, H, L), vector(b, row, n, h, H, L),
                            t, b_t, top, first, False))
    den, P = tl.sum(P, axis=1), P.to(MM)

    num, qz = tl.zeros((BR, E), tl.float32), tl.zeros((BR,), tl.float32)
    for f0 in range(0, F, BF):  # q a second time: P and num in one walk would not fit registers
        f = f0 + tl.arange(0, BF)
        q_f, at = load(q, row_t, n_t, h, H, F, BR, f), (bh * N + c) * F + f
        num += product(q_f, tl.load(S + at[:, None] * E + e[None, :]), MM)
        qz += tl.sum(q_f * tl.load(z + at)[None, :], axis=1)
    den = tl.maximum(den + carried * qz, 1e-30)  # only against 0 / 0
    num = num * carried[:, None]
    num += product(P, load(v, row, n, kv, K, E, L, e), MM)
    store(out, num / den[:, None], row_t, n_t, h, H, E, BR, e)
    store_vector(lse, top + tl.log(den), row_t, n_t, h, H, BR)
    store_vector(carry, carried / den, row_t, n_t, h, H, BR)


# ----------------------------------------------------------------------------------------------
# 3. The mLSTM: backward
# ----------------------------------------------------------------------------------------------
# With w = W / denominator, c = carry / denominator, delta_t = dh_t.h_t (the gradient through the
# denominator: not to be left out, since no norm layer follows), x_ts = (dh_t.v_s - delta_t) w_ts:
#
#     dq_t = sum_s x_ts k_s + c_t (S dh_t - delta_t z)
#     dk_s = sum_t x_ts q_t + write_s (dS v_s + dz)
#     dv_s = sum_t w_ts (q_t.k_s) dh_t + write_s dS k_s
#     dS  <- keep dS + sum_t c_t q_t (x) dh_t              dz  <- keep dz - sum_t c_t delta_t q_t
#     dlog_i_s = k_s.dk_s
#     dlog_f_t = what flows from tokens s < t to tokens t' >= t
#              = flux + sum over s < t of the chunk of (k_s.dk_s - q_s.dq_s)
#                flux = <S, dS> + <z, dz> at the chunk's start
#
# (q.dq is 0 but for the rounding of h in delta; without it that rounding would add up. Starting
# anew at every chunk likewise keeps errors from piling up over T.)
#
# So the walk is the forward's: chunk_sums of (q, dh) in place of (k, v), a scan from the last chunk
# to the first, then one kernel each for dq, dk and dv. Three, because each needs its own L x L
# weights beside its sums, and together they do not fit registers. dk and dv come out per query
# head and are summed over a group by PyTorch: a loop over the group inside the kernels spilled.


@triton.jit
def scan_bwd(dS, dz,  # in place: each chunk's sums become the gradient of the state leaving it
             S, z, m, keep, dS_end, dz_end,  # inputs
             dS0, dz0, flux,  # outputs; flux (B, H, N, tiles): <S, dS> + <z, dz> at chunk starts
             N, F: tl.constexpr, E: tl.constexpr, BF: tl.constexpr):
    """scan_fwd backwards in time."""
    tile, bh = tl.program_id(0) % (F // BF), tl.program_id(0).to(tl.int64) // (F // BF)
    f = tile * BF + tl.arange(0, BF)
    fe = f[:, None] * E + tl.arange(0, E)[None, :]
    dS_c, dz_c = tl.load(dS_end + bh * F * E + fe), tl.load(dz_end + bh * F + f)
    for back in tl.range(N, num_stages=3):
        c = N - 1 - back
        at = (bh * N + c) * F
        dS_new, dz_new = tl.load(dS + at * E + fe), tl.load(dz + at + f)
        tl.store(dS + at * E + fe, dS_c.to(dS.dtype.element_ty))
        tl.store(dz + at + f, dz_c)
        m_c, m_next = tl.load(m + bh * (N + 1) + c), tl.load(m + bh * (N + 1) + c + 1)
        fade = tl.exp((m_c - m_next) + tl.load(keep + bh * N + c))
        dS_c, dz_c = fade * dS_c + dS_new, fade * dz_c + dz_new
        flow = tl.sum(tl.load(S + at * E + fe) * dS_c) + tl.sum(tl.load(z + at + f) * dz_c)
        tl.store(flux + (bh * N + c) * (F // BF) + tile, flow)
    tl.store(dS0 + bh * F * E + fe, dS_c)
    tl.store(dz0 + bh * F + f, dz_c)


@triton.jit
def q_bwd(q, k, v, log_i, b, start, dh, delta, lse, carry, S, z,  # inputs
          dq, q_dq,  # outputs; q_dq (B, T, H) = q_t.dq_t
          T, H: tl.constexpr, K: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
          L: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr, MM: tl.constexpr):
    """dq of BR tokens t of one chunk and head: out_fwd's counterpart."""
    t0, bh = tl.program_id(0) % (L // BR) * BR, tl.program_id(0).to(tl.int64) // (L // BR)
    c, N, h, kv = tl.program_id(1), tl.num_programs(1), bh % H, bh % H // (H // K)
    row, n = bh // H * T + c * L, T - c * L
    row_t, n_t, t = row + t0, n - t0, t0 + tl.arange(0, BR)  # this program's rows
    s, e = tl.arange(0, L), tl.arange(0, E)
    dh_t, delta_t = load(dh, row_t, n_t, h, H, E, BR, e), vector(delta, row_t, n_t, h, H, BR)
    x = product(dh_t, tl.trans(load(v, row, n, kv, K, E, L, e)), MM) - delta_t[:, None]  # [t, s]
    x *= tl.exp(log_weights(s, vector(log_i, row, n, h, H, L), vector(b, row, n, h, H, L),
                            t, vector(b, row_t, n_t, h, H, BR), vector(lse, row_t, n_t, h, H, BR),
                            first_seen(start, row_t, n_t, c * L, BR), False))
    carry_t, flow = vector(carry, row_t, n_t, h, H, BR), tl.zeros((BR,), tl.float32)
    for f0 in range(0, F, BF):
        f = f0 + tl.arange(0, BF)
        at = (bh * N + c) * F + f
        dq_f = product(dh_t, tl.trans(tl.load(S + at[:, None] * E + e[None, :])), MM)
        dq_f = (dq_f - delta_t[:, None] * tl.load(z + at)[None, :]) * carry_t[:, None]
        dq_f += product(x, load(k, row, n, kv, K, F, L, f), MM)
        store(dq, dq_f, row_t, n_t, h, H, F, BR, f)
        flow += tl.sum(load(q, row_t, n_t, h, H, F, BR, f) * dq_f, axis=1)
    store_vector(q_dq, flow, row_t, n_t, h, H, BR)


@triton.jit
def write_weights(write, peak, m, row, n, c, bh, N, H: tl.constexpr, BR: tl.constexpr):
    """(BR,) weights with which tokens enter the state after their chunk, in that state's scale."""
    scale = tl.exp(tl.load(peak + bh * N + c) - tl.load(m + bh * (N + 1) + c + 1))
    return vector(write, row, n, bh % H, H, BR) * scale


@triton.jit
def k_bwd(q, k, v, log_i, b, stop, write, peak, m, dh, delta, lse, dS, dz,  # inputs
          dk, dlog_i,  # outputs, of query heads: dk (B, T, H, F)
          T, H: tl.constexpr, K: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
          L: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr, MM: tl.constexpr):
    """dk and dlog_i = k.dk of BR tokens s of one chunk and head.

    x is laid out [s, t] and computed anew: transposing q_bwd's x and feeding it to the next product
    gave wrong gradients on Hopper (flash-linear-attention, pull request 826).
    """
    s0, bh = tl.program_id(0) % (L // BR) * BR, tl.program_id(0).to(tl.int64) // (L // BR)
    c, N, h, kv = tl.program_id(1), tl.num_programs(1), bh % H, bh % H // (H // K)
    row, n = bh // H * T + c * L, T - c * L
    row_s, n_s, s = row + s0, n - s0, s0 + tl.arange(0, BR)  # this program's rows
    t, e = tl.arange(0, L), tl.arange(0, E)
    v_s, bound = load(v, row_s, n_s, kv, K, E, BR, e), vector(stop, row_s, n_s, 0, 1, BR) - c * L
    x = product(v_s, tl.trans(load(dh, row, n, h, H, E, L, e)), MM)  # [s, t]
    x -= vector(delta, row, n, h, H, L)[None, :]
    x *= tl.exp(log_weights(
        s, vector(log_i, row_s, n_s, h, H, BR), vector(b, row_s, n_s, h, H, BR),
        t, vector(b, row, n, h, H, L), vector(lse, row, n, h, H, L), bound, True))
    weights = write_weights(write, peak, m, row_s, n_s, c, bh, N, H, BR)
    di = tl.zeros((BR,), tl.float32)
    for f0 in range(0, F, BF):
        f = f0 + tl.arange(0, BF)
        at = (bh * N + c) * F + f
        dk_f = product(v_s, tl.trans(tl.load(dS + at[:, None] * E + e[None, :])), MM)
        dk_f = (dk_f + tl.load(dz + at)[None, :]) * weights[:, None]
        dk_f += product(x, load(q, row, n, h, H, F, L, f), MM)
        store(dk, dk_f, row_s, n_s, h, H, F, BR, f)
        di += tl.sum(load(k, row_s, n_s, kv, K, F, BR, f) * dk_f, axis=1)
    store_vector(dlog_i, di, row_s, n_s, h, H, BR)


@triton.jit
def v_bwd(q, k, log_i, b, stop, write, peak, m, dh, lse, dS,  # inputs
          dv,  # output, of query heads: (B, T, H, E)
          T, H: tl.constexpr, K: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
          L: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr, MM: tl.constexpr):
    """dv of BR tokens s of one chunk and head."""
    s0, bh = tl.program_id(0) % (L // BR) * BR, tl.program_id(0).to(tl.int64) // (L // BR)
    c, N, h, kv = tl.program_id(1), tl.num_programs(1), bh % H, bh % H // (H // K)
    row, n = bh // H * T + c * L, T - c * L
    row_s, n_s, s = row + s0, n - s0, s0 + tl.arange(0, BR)  # this program's rows
    t, e = tl.arange(0, L), tl.arange(0, E)
    P, dv_s = tl.zeros((BR, L), tl.float32), tl.zeros((BR, E), tl.float32)  # P [s, t]
    for f0 in range(0, F, BF):
        f = f0 + tl.arange(0, BF)
        k_f = load(k, row_s, n_s, kv, K, F, BR, f)
        P += product(k_f, tl.trans(load(q, row, n, h, H, F, L, f)), MM)
        dS_f = tl.load(dS + ((bh * N + c) * F + f)[:, None] * E + e[None, :])
        dv_s += product(k_f, dS_f, MM)
    P *= tl.exp(log_weights(
        s, vector(log_i, row_s, n_s, h, H, BR), vector(b, row_s, n_s, h, H, BR),
        t, vector(b, row, n, h, H, L), vector(lse, row, n, h, H, L),
        vector(stop, row_s, n_s, 0, 1, BR) - c * L, True))
    dv_s *= write_weights(write, peak, m, row_s, n_s, c, bh, N, H, BR)[:, None]
    dv_s += product(P, load(dh, row, n, h, H, E, L, e), MM)
    store(dv, dv_s, row_s, n_s, h, H, E, BR, e)


@triton.jit
def f_bwd(dlog_i, q_dq, start, flux,  # inputs
          dlog_f,  # output
          T, H: tl.constexpr, L: tl.constexpr, TILES: tl.constexpr):
    """dlog_f of one chunk and head: what enters it, plus what tokens before t give, less take."""
    bh, c, N = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row, n, h = bh // H * T + c * L, T - c * L, bh % H
    t, first = tl.arange(0, L), first_seen(start, row, n, c * L, L)
    seen = (t[None, :] < t[:, None]) & (t[None, :] >= first[:, None])  # [t, s]
    flow = vector(dlog_i, row, n, h, H, L) - vector(q_dq, row, n, h, H, L)
    df = tl.sum(tl.where(seen, flow[None, :], 0.0), axis=1)
    inflow = tl.sum(tl.load(flux + (bh * N + c) * TILES + tl.arange(0, TILES)), axis=0)
    store_vector(dlog_f, df + tl.where(first < 0, inflow, 0.0), row, n, h, H, L)


# ----------------------------------------------------------------------------------------------
# 4. The mLSTM as an operator of PyTorch
# ----------------------------------------------------------------------------------------------
# The forward pass is one torch.library operator with tensors in and out, the backward pass another,
# so that torch.compile and FSDP see what is saved (inputs, h, lse, carry) and never look inside.
#
# In global memory the forward pass moves 3 (F + E) + 4 F E / L numbers a token and head, the
# backward pass 10 (F + E + F E / L), in 4 and 10 launches of kernels. With 32 heads of 128 over 16k
# tokens in bf16 that is 1.3 and 4.0 GB, or .31 and .94 ms at an H200's 4.3 TB/s; with F = 512 it is
# 4.2 and 12.1 GB. (Computed, not measured.)


def blocks(dtype, F, E):
    """L tokens a chunk; tiles: BR tokens, BF features of a product, BS features of the scan; warps.

    In bf16 nothing spills on sm_80 and sm_90, F 512 beside E 128 included (a test compiles it), but
    for 8 to 24 bytes of gates_fwd with Triton 3.6. BR is 64, the least that a warp group of Hopper
    multiplies; with 128 rows the L x L weights and the sums leave no registers for the gates. So a
    processor holds one program of 8 warps at a time (170 to 230 registers a thread), and num_stages
    has the next tile loaded under the products of this one, if there are two: hence BF <= F / 2
    (one tile of 64 spilled). BS makes 2048 numbers a program, enough programs to fill a GPU from
    one row of text. fp32 operands: right, not fast.
    """
    L, BR, BF, warps = (128, 64, 64, 8) if dtype == torch.bfloat16 else (32, 32, 32, 4)
    return L, BR, min(BF, max(16, F // 2)), min(F, 2048 // E), warps


def enter_states(k, v, log_i, log_f, start, S0, z0, m0, L, BF, BS):
    """-> gates (b, r, write, peak, keep), entering states (S, z, m), S and z after the last token.

    S of each chunk is kept in bf16 when v is: it is an operand, which a product would round anyway.
    The scan adds up in fp32, so chunks' roundings (2^-9 each) do not build up in the last state.
    """
    (B, T, K, F), E, H, N = k.shape, v.shape[-1], log_i.shape[-1], triton.cdiv(k.shape[1], L)
    b, r, write = torch.empty_like(log_f, dtype=torch.float64), *likes(log_f, log_f)
    peak, keep, m = (m0.new_empty(B, H, n) for n in (N, N, N + 1))
    S = k.new_empty(B, H, N, F, E, dtype=k.dtype if k.dtype == torch.bfloat16 else torch.float32)
    z, S_end, z_end = z0.new_empty(B, H, N, F), *likes(S0, z0)
    gates_fwd[(B * H, N)](log_i, log_f, start, b, r, write, peak, keep, T, H, L, num_warps=16)
    chunk_sums[(F // BF * B * H, N)](k, v, write, write, S, z, T, H, K, F, E, L, BF,
                                     matmul_type(k.dtype), num_warps=8)
    scan_fwd[(F // BS * B * H,)](S, z, peak, keep, S0, z0, m0, m, S_end, z_end, N, F, E, BS,
                                 num_warps=4)
    return (b, r, write, peak, keep), (S, z, m), S_end, z_end


@operator("mlstm", lambda q, k, v, log_i, log_f, start, S0, z0, m0: (
    q.new_empty(*q.shape[:3], v.shape[3]), *likes(log_i, log_i, S0, z0, m0)))
def _mlstm_op(q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor, start: Tensor,
              S0: Tensor, z0: Tensor, m0: Tensor
              ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, T, H, F), K, E = q.shape, k.shape[2], v.shape[3]
    h, lse, carry = v.new_empty(B, T, H, E), *likes(log_i, log_i)
    L, BR, BF, BS, warps = blocks(q.dtype, F, E)
    with torch.cuda.device_of(q):
        gates, states, S, z = enter_states(k, v, log_i, log_f, start, S0, z0, m0, L, BF, BS)
        out_fwd[(L // BR * B * H, triton.cdiv(T, L))](
            q, k, v, log_i, *gates[:2], start, *states, h, lse, carry,
            T, H, K, F, E, L, BR, BF, matmul_type(q.dtype), num_warps=warps, num_stages=2)
    return h, lse, carry, S, z, states[2][..., -1].clone()


@operator("mlstm_backward", lambda dh, dS, dz, q, k, v, log_i, log_f, start, S0, z0, *_: likes(
    q, k, v, log_i, log_f, S0, z0))
def _mlstm_backward_op(
        dh: Tensor, dS_end: Tensor, dz_end: Tensor, q: Tensor, k: Tensor, v: Tensor, log_i: Tensor,
        log_f: Tensor, start: Tensor, S0: Tensor, z0: Tensor, m0: Tensor, h: Tensor, lse: Tensor,
        carry: Tensor, wants_dv: bool
        ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, T, H, F), K, E, MM = q.shape, k.shape[2], v.shape[3], matmul_type(q.dtype)
    dq, di, df, dS0, dz0 = likes(q, log_i, log_f, S0, z0)
    dk, dv = torch.empty_like(q), v.new_empty(B, T, H, E)
    L, BR, BF, BS, warps = blocks(q.dtype, F, E)
    N, blocks_of_rows = triton.cdiv(T, L), (L // BR * B * H, triton.cdiv(T, L))
    sizes = dict(T=T, H=H, K=K, F=F, E=E, L=L, BR=BR, BF=BF, MM=MM, num_warps=warps, num_stages=2)
    with torch.cuda.device_of(q):
        delta, stop = row_delta(dh, h), document_stops(start)
        # Recomputed, not saved: 10 % of all bytes moved (14 % with F = 4 E), against q's memory
        # once more in every layer between the two passes.
        (b, _, write, peak, keep), (S, z, m), _, _ = enter_states(
            k, v, log_i, log_f, start, S0, z0, m0, L, BF, BS)
        (dS, dz), q_dq = likes(S, z), torch.empty_like(lse)
        chunk_sums[(F // BF * B * H, N)](q, dh, carry, -carry * delta, dS, dz,
                                         T, H, H, F, E, L, BF, MM, num_warps=8)
        flux = S0.new_empty(B, H, N, F // BS)
        scan_bwd[(F // BS * B * H,)](dS, dz, S, z, m, keep, dS_end, dz_end, dS0, dz0, flux,
                                     N, F, E, BS, num_warps=4)
        q_bwd[blocks_of_rows](q, k, v, log_i, b, start, dh, delta, lse, carry, S, z, dq, q_dq,
                              **sizes)
        k_bwd[blocks_of_rows](q, k, v, log_i, b, stop, write, peak, m, dh, delta, lse, dS, dz,
                              dk, di, **sizes)
        if wants_dv:  # stage I does not: v comes from frozen weights
            v_bwd[blocks_of_rows](q, k, log_i, b, stop, write, peak, m, dh, lse, dS, dv, **sizes)
        f_bwd[(B * H, N)](di, q_dq, start, flux, df, T, H, L, F // BS, num_warps=8)
    if H > K:  # a group's query heads share k and v
        dk, dv = (x.unflatten(2, (K, H // K)).sum(3) for x in (dk, dv))
    return dq, dk, dv, di, df, dS0, dz0


def _mlstm_setup(ctx, inputs, output):
    h, lse, carry, S, z, m = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, carry, m)
    ctx.save_for_backward(*inputs, h, lse, carry)


def _mlstm_autograd(ctx, dh, _, __, dS, dz, ___):
    """Differentiates in the true state (S, z) e^m, so m0's gradient is that of a scale."""
    *inputs, h, lse, carry = ctx.saved_tensors
    S0, z0 = inputs[6:8]
    dh, dS, dz = (torch.zeros_like(x) if d is None else d.contiguous()
                  for d, x in ((dh, h), (dS, S0), (dz, z0)))
    wants_dv = ctx.needs_input_grad[2]
    dq, dk, dv, di, df, dS0, dz0 = _mlstm_backward_op(dh, dS, dz, *inputs, h, lse, carry, wants_dv)
    dm0 = (dS0 * S0).sum((-1, -2)) + (dz0 * z0).sum(-1)
    return dq, dk, dv if wants_dv else None, di, df, None, dS0, dz0, dm0


_mlstm_op.register_autograd(_mlstm_autograd, setup_context=_mlstm_setup)


def mlstm(q, k, v, log_i, log_f, *, state=None, document_ids=None):
    """The mLSTM over a sequence: model.mlstm_chunkwise, with gradients, on a GPU.

    q (B, H, T, F), k (B, K, T, F): feature-mapped, non-negative. v (B, K, T, E). q and k are cast
    to v's dtype; products run in bf16 if that is bf16, else in fp32. log_i, log_f (B, H, T) fp32,
    log_f at most 0. state: (S, z, m) in fp32 from an earlier part of the sequence, S (B, H, F, E),
    or None. document_ids (B, T): the state restarts where they change. Returns h (B, H, T, E) in
    v's dtype and the state after the last token. Only (S, z) e^m means something, so gradients
    through the state are those of that product: the returned m has none, the incoming one's is that
    of the scale e^m. Raises ValueError for CPU tensors, float64, widths other than FEATURE_WIDTHS
    and WIDTHS, shapes that do not fit. arXiv 2603.15590, Eq. 8-10.
    """
    check("mlstm", FEATURE_WIDTHS, q=q, k=k)
    check("mlstm", WIDTHS, v=v)
    (B, H, T, F), E = q.shape, v.shape[-1]
    if k.shape[3] != F or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"kernels.mlstm: q {tuple(q.shape)}, k {tuple(k.shape)} and v "
                         f"{tuple(v.shape)} do not fit together")
    if log_i.shape != (B, H, T) or log_f.shape != (B, H, T):
        raise ValueError(f"kernels.mlstm: log_i {tuple(log_i.shape)} and log_f "
                         f"{tuple(log_f.shape)} must have q's shape {(B, H, T)}")
    shapes = (B, H, F, E), (B, H, F), (B, H)
    if state is None:  # empty: -1e30 and not -inf, which would give NaN as a difference
        state = [torch.full(shape, x, dtype=torch.float32, device=q.device)
                 for shape, x in zip(shapes, (0.0, 0.0, -1e30))]
    if tuple(tuple(x.shape) for x in state) != shapes:
        raise ValueError(f"kernels.mlstm: state has shapes {[tuple(x.shape) for x in state]}; "
                         f"(S, z, m) need {list(shapes)}")
    h, _, _, S, z, m = _mlstm_op(
        # Clamped to model.EMPTY and model.FORGET: -inf would give NaN.
        *token_major(q.to(v.dtype), k.to(v.dtype), v, log_i.float().clamp_min(-1e30),
                     log_f.float().clamp_min(-1e4)),
        document_starts(document_ids, q), *(x.float().contiguous() for x in state))
    return h.transpose(1, 2), (S, z, m)


# ----------------------------------------------------------------------------------------------
# 5. Sliding window with sinks
# ----------------------------------------------------------------------------------------------
# FlashAttention (arXiv 2205.14135) over a band: a token sees its document's first SINKS tokens and
# the last WINDOW, itself among them. Only tiles on the band's edges, or with a document boundary,
# need a mask, so every loop runs in phases, one of them without. A document's sinks lie in the band
# of its early tokens and far before that of its late ones; `visible` counts them once, and the
# phase for old sinks reads a tile of BS = 16 keys instead of a whole one.
#
# Scores are kept in base 2 (SCALE includes log2 e), where the GPU's exponential is one instruction.
# The backward pass knows lse = log2 of the softmax's sum, so it forms p = 2^(score - lse) directly
# and needs no second online softmax; delta = dh.h is the softmax's own correction:
#
#     dscore_ts = p_ts (dh_t.v_s - delta_t)
#     dq_t = sum_s dscore_ts k_s        dk_s = sum_t dscore_ts q_t        dv_s = sum_t p_ts dh_t
#
# Two kernels, one per owner of the sum (a block of queries, a block of keys), instead of atomics.


@triton.jit
def visible(s, t, start, WINDOW: tl.constexpr, SINKS: tl.constexpr):
    """Whether token t, in the document that begins at start, sees token s. Shapes broadcast."""
    return (s <= t) & (s >= start) & ((s > t - WINDOW) | (s < start + SINKS))


@triton.jit
def keys_of(phase: tl.constexpr, start, row, t0, T, WINDOW: tl.constexpr, SINKS: tl.constexpr,
            BQ: tl.constexpr, BK: tl.constexpr):
    """Keys [begin, stop) that the queries t0 ... t0 + BQ - 1 meet in a phase.

    Phase 0: sinks older than the band, of the first query's document only, since later documents
    have theirs in the band. 1: the band's lower edge. 2: what all queries see. 3: upper edge.
    """
    end, own = tl.minimum(t0 + BQ, T), tl.load(start + row)
    low = tl.maximum(own, t0 - WINDOW + 1) // BK * BK
    if phase == 0:
        return own, tl.minimum(own + SINKS, low)
    last_own = tl.load(start + row + (end - 1 - t0))
    full = tl.cdiv(tl.maximum(last_own, t0 + BQ - WINDOW), BK) * BK  # seen by the last query too
    full = tl.minimum(tl.maximum(full, low), end)
    full_end = tl.maximum(full, (t0 + 1) // BK * BK)  # not after the first query
    if phase == 1:
        return low, full
    if phase == 2:
        return full, full_end
    return full_end, end


@triton.jit
def window_fwd(q, k, v, start,  # inputs
               out, lse,  # outputs; lse in base 2
               T, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
               WINDOW: tl.constexpr, SINKS: tl.constexpr, BS: tl.constexpr,
               BQ: tl.constexpr, BK: tl.constexpr, MM: tl.constexpr):
    """One block of queries of one head."""
    bh, t0 = tl.program_id(0).to(tl.int64), tl.program_id(1) * BQ
    b, h, kv = bh // H, bh % H, bh % H // (H // K)
    row, n, d = b * T + t0, T - t0, tl.arange(0, D)
    q = load(q, row, n, h, H, D, BQ, d)
    t, first = t0 + tl.arange(0, BQ)[:, None], first_seen(start, row, n, 0, BQ)[:, None]
    acc, total = tl.zeros((BQ, D), tl.float32), tl.zeros((BQ,), tl.float32)
    peak = tl.full((BQ,), -1e30, tl.float32)
    for phase in tl.static_range(4):
        begin, stop = keys_of(phase, start, row, t0, T, WINDOW, SINKS, BQ, BK)
        for s0 in range(begin, stop, BS if phase == 0 else BK):
            k_s = load(k, b * T + s0, T - s0, kv, K, D, BS if phase == 0 else BK, d)
            scores = product(q, tl.trans(k_s), MM) * SCALE
            if phase != 2:
                s = s0 + tl.arange(0, BS if phase == 0 else BK)[None, :]
                see = visible(s, t, first, WINDOW, SINKS) & (s < stop)
                scores = tl.where(see, scores, float("-inf"))
            new = tl.maximum(peak, tl.max(scores, axis=1))  # the online softmax, in base 2
            p, fade = tl.exp2(scores - new[:, None]), tl.exp2(peak - new)
            v_s = load(v, b * T + s0, T - s0, kv, K, D, BS if phase == 0 else BK, d)
            acc = acc * fade[:, None] + product(p, v_s, MM)
            total, peak = total * fade + tl.sum(p, axis=1), new
    store(out, acc / total[:, None], row, n, h, H, D, BQ, d)
    store_vector(lse, peak + tl.log2(total), row, n, h, H, BQ)


@triton.jit
def window_dq(q, k, v, start, dh, delta, lse,  # inputs
              dq,  # output
              T, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
              WINDOW: tl.constexpr, SINKS: tl.constexpr, BS: tl.constexpr,
              BQ: tl.constexpr, BK: tl.constexpr, MM: tl.constexpr):
    """dq of one block of queries of one head: window_fwd's walk again."""
    bh, t0 = tl.program_id(0).to(tl.int64), tl.program_id(1) * BQ
    b, h, kv = bh // H, bh % H, bh % H // (H // K)
    row, n, d = b * T + t0, T - t0, tl.arange(0, D)
    q, dh = load(q, row, n, h, H, D, BQ, d), load(dh, row, n, h, H, D, BQ, d)
    norm, delta_t = vector(lse, row, n, h, H, BQ)[:, None], vector(delta, row, n, h, H, BQ)[:, None]
    t, first = t0 + tl.arange(0, BQ)[:, None], first_seen(start, row, n, 0, BQ)[:, None]
    acc = tl.zeros((BQ, D), tl.float32)
    for phase in tl.static_range(4):
        begin, stop = keys_of(phase, start, row, t0, T, WINDOW, SINKS, BQ, BK)
        for s0 in range(begin, stop, BS if phase == 0 else BK):
            k_s = load(k, b * T + s0, T - s0, kv, K, D, BS if phase == 0 else BK, d)
            scores = product(q, tl.trans(k_s), MM) * SCALE - norm
            if phase != 2:
                s = s0 + tl.arange(0, BS if phase == 0 else BK)[None, :]
                see = visible(s, t, first, WINDOW, SINKS) & (s < stop)
                scores = tl.where(see, scores, float("-inf"))
            v_s = load(v, b * T + s0, T - s0, kv, K, D, BS if phase == 0 else BK, d)
            dp = product(dh, tl.trans(v_s), MM)
            acc += product(tl.exp2(scores) * (dp - delta_t), k_s, MM)
    store(dq, acc * (SCALE * 0.6931471805599453), row, n, h, H, D, BQ, d)  # ln 2: base 2 above


@triton.jit
def window_dkv(q, k, v, start, stop, dh, delta, lse,  # inputs
               dk, dv,  # outputs
               T, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
               WINDOW: tl.constexpr, SINKS: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
               MM: tl.constexpr):
    """dk, dv of one block of keys of one key/value head, over the query heads of its group.

    A block that holds sinks is walked to its document's end. With one document such blocks come
    first in the grid, so the others run beside them; of packed ones the walks are short. No partial
    sums, no atomics.
    """
    bk, s0 = tl.program_id(0).to(tl.int64), tl.program_id(1) * BK
    b, kv = bk // K, bk % K
    row, n, d = b * T + s0, T - s0, tl.arange(0, D)
    k, v = load(k, row, n, kv, K, D, BK, d), load(v, row, n, kv, K, D, BK, d)
    s, last = s0 + tl.arange(0, BK)[:, None], tl.minimum(s0 + BK, T) - 1
    end = tl.load(stop + b * T + last)  # of the last key's document: the others end before it
    if tl.load(start + b * T + last) + SINKS <= s0:  # no sinks here that later queries see
        end = tl.minimum(end, last + WINDOW)
    full_from = tl.minimum(tl.cdiv(s0 + BK - 1, BQ) * BQ, end)
    full_to = tl.minimum(s0 + WINDOW, tl.load(stop + row)) // BQ * BQ
    full_to = tl.minimum(tl.maximum(full_to, full_from), end)
    dk_sum, dv_sum = tl.zeros((BK, D), tl.float32), tl.zeros((BK, D), tl.float32)
    for h in range(kv * (H // K), (kv + 1) * (H // K)):
        for phase in tl.static_range(3):
            begin = s0 // BQ * BQ if phase == 0 else (full_from if phase == 1 else full_to)
            until = full_from if phase == 0 else (full_to if phase == 1 else end)
            for t0 in range(begin, until, BQ):
                at, m = b * T + t0, T - t0
                q_t, dh_t = load(q, at, m, h, H, D, BQ, d), load(dh, at, m, h, H, D, BQ, d)
                norm = vector(lse, at, m, h, H, BQ)[None, :]
                scores = product(k, tl.trans(q_t), MM) * SCALE - norm  # [s, t]
                if phase != 1:
                    t = t0 + tl.arange(0, BQ)[None, :]
                    first = first_seen(start, at, m, 0, BQ)[None, :]
                    see = visible(s, t, first, WINDOW, SINKS)
                    scores = tl.where(see, scores, float("-inf"))
                p = tl.exp2(scores)
                dv_sum += product(p, dh_t, MM)
                dp = product(v, tl.trans(dh_t), MM) - vector(delta, at, m, h, H, BQ)[None, :]
                dk_sum += product(p * dp, q_t, MM)
    store(dk, dk_sum * (SCALE * 0.6931471805599453), row, n, kv, K, D, BK, d)
    store(dv, dv_sum, row, n, kv, K, D, BK, d)


def window_sizes(q, k, window, sinks):
    """Arguments that all three kernels share. SCALE: 1 / sqrt(D), for powers of 2."""
    (_, T, H, D), K = q.shape, k.shape[2]
    return dict(T=T, H=H, K=K, D=D, SCALE=D**-0.5 * math.log2(math.e), WINDOW=window, SINKS=sinks,
                MM=matmul_type(q.dtype))


@operator("window", lambda q, k, v, *_: (
    torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)))
def _window_op(q: Tensor, k: Tensor, v: Tensor, start: Tensor, window: int, sinks: int
              ) -> tuple[Tensor, Tensor]:
    (B, T, H, _), half = q.shape, q.dtype == torch.bfloat16
    h, lse = torch.empty_like(q), q.new_empty(B, T, H, dtype=torch.float32)
    BQ, BK = (128, 64) if half else (64, 32)  # a tile of keys serves as many queries as fit
    with torch.cuda.device_of(q):
        window_fwd[(B * H, triton.cdiv(T, BQ))](
            q, k, v, start, h, lse, **window_sizes(q, k, window, sinks), BQ=BQ, BK=BK, BS=16,
            num_warps=8, num_stages=2)
    return h, lse


@operator("window_backward", lambda dh, q, k, v, *_: likes(q, k, v))
def _window_backward_op(dh: Tensor, q: Tensor, k: Tensor, v: Tensor, start: Tensor, h: Tensor,
                       lse: Tensor, window: int, sinks: int) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, _), K, half = q.shape, k.shape[2], q.dtype == torch.bfloat16
    dq, dk, dv = likes(q, k, v)
    sizes, block = window_sizes(q, k, window, sinks), 64 if half else 32
    with torch.cuda.device_of(q):
        delta, stop = row_delta(dh, h), document_stops(start)
        window_dq[(B * H, triton.cdiv(T, block))](
            q, k, v, start, dh, delta, lse, dq, **sizes, BQ=block, BK=block, BS=16,
            num_warps=8, num_stages=2)
        window_dkv[(B * K, triton.cdiv(T, block))](
            q, k, v, start, stop, dh, delta, lse, dk, dv, **sizes, BQ=block // 2, BK=block,
            num_warps=8, num_stages=2)
    return dq, dk, dv


def _window_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.window, ctx.sinks = inputs[4:]
    ctx.save_for_backward(*inputs[:4], *output)


def _window_autograd(ctx, dh, _):
    grads = _window_backward_op(dh.contiguous(), *ctx.saved_tensors, ctx.window, ctx.sinks)
    return *grads, None, None, None


_window_op.register_autograd(_window_autograd, setup_context=_window_setup)


def window_attention(q, k, v, *, window, sinks, document_ids=None):
    """Softmax attention over a window and the document's sinks: model.window_attention on a GPU.

    q (B, H, T, D), k and v (B, K, T, D) of one dtype (bf16, fp16, fp32), q and k rotated;
    document_ids (B, T) or None. Returns (B, H, T, D). arXiv 2603.15590, Eq. 3, 4. Raises ValueError
    for CPU tensors, float64, widths not in WIDTHS, dtypes that differ.
    """
    check("window_attention", q=q, k=k, v=v)
    if not (q.dtype == k.dtype == v.dtype) or q.shape[-1] != k.shape[-1] or k.shape != v.shape:
        raise ValueError(f"kernels.window_attention: q {q.dtype} {tuple(q.shape)}, k {k.dtype} "
                         f"{tuple(k.shape)}, v {v.dtype} {tuple(v.shape)} do not fit together")
    if window < 1 or sinks < 0:
        raise ValueError(f"kernels.window_attention: window {window} must be at least 1 and sinks "
                         f"{sinks} at least 0")
    start = document_starts(document_ids, q).clamp_min(0)
    return _window_op(*token_major(q, k, v), start, window, sinks)[0].transpose(1, 2)


# ----------------------------------------------------------------------------------------------
# 6. Feature map: bound by memory, so what counts is the number of passes
# ----------------------------------------------------------------------------------------------
# The map is a kernel of its own, not part of the mLSTM's. Inside them nothing F wide would ever be
# in global memory: with heads of 128 and F = 512 that is half of all bytes of map and mLSTM,
# forward and backward. But each of the five kernels that read q or k would form its features anew,
# with W (D x F, 128 KiB) beside all else on the chip, and two of them (q_bwd, k_bwd) W's gradient.


@triton.jit
def feature_fwd(x, plain, weight, phi, T, H: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
                HALVES: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, MM: tl.constexpr):
    """phi = softmax([x W, plain W']) of BT tokens of one head; W' the second half of the columns.

    Two walks over the tiles of W (first the softmax's sum, then the features) cost a second product
    but no memory traffic, W being in the L2 cache: F logits in fp32 would not stay in registers.
    """
    bh, t0, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BT, tl.arange(0, D)
    row, n, h = bh // H * T + t0, T - t0, bh % H
    peak, total = tl.full((BT,), -1e30, tl.float32), tl.zeros((BT,), tl.float32)
    for walk in tl.static_range(2):
        for half in tl.static_range(HALVES):
            x_t = load(x if half == 0 else plain, row, n, h, H, D, BT, d)
            for f0 in range(half * F // HALVES, (half + 1) * F // HALVES, BF):
                f = f0 + tl.arange(0, BF)
                W = tl.load(weight + (h * D + d[:, None]) * F + f[None, :])
                y = product(x_t, W, MM)
                if walk == 0:
                    new = tl.maximum(peak, tl.max(y, axis=1))  # the online softmax
                    total = total * tl.exp(peak - new) + tl.sum(tl.exp(y - new[:, None]), axis=1)
                    peak = new
                else:
                    store(phi, tl.exp(y - peak[:, None]) / total[:, None], row, n, h, H, F, BT, f)


@operator("feature_map", lambda x, plain, weight: x.new_empty(*x.shape[:3], weight.shape[2]))
def _feature_map_op(x: Tensor, plain: Tensor | None, weight: Tensor) -> Tensor:
    (B, T, H, D), F, halves = x.shape, weight.shape[2], 1 if plain is None else 2
    phi, BT = x.new_empty(B, T, H, F), 128 if x.dtype == torch.bfloat16 else 32
    with torch.cuda.device_of(x):
        feature_fwd[(B * H, triton.cdiv(T, BT))](
            x, x if plain is None else plain, weight, phi, T, H, D, F, halves, BT,
            min(64, F // halves), matmul_type(x.dtype), num_warps=8, num_stages=3)
    return phi


def _feature_map_autograd(ctx, dphi):
    """PyTorch's own softmax backward, then its products: a pass more than fused, 70 lines less."""
    x, plain, weight, phi = ctx.saved_tensors
    sources = [x] if plain is None else [x, plain]
    dy = torch._softmax_backward_data(dphi, phi, -1, phi.dtype).chunk(len(sources), dim=-1)
    columns = weight.chunk(len(sources), dim=-1)
    dx = [torch.einsum("bthf,hdf->bthd", g, w) if wanted else None  # not in stage I
          for g, w, wanted in zip(dy, columns, ctx.needs_input_grad)]
    dW = torch.cat([torch.einsum("bthd,bthf->hdf", s, g) for s, g in zip(sources, dy)], dim=-1)
    return dx[0], dx[-1] if len(dx) == 2 else None, dW


_feature_map_op.register_autograd(
    _feature_map_autograd,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output))


def feature_map(x, weight, plain=None):
    """phi = softmax over the features, one W per head: model.FeatureMap on a GPU.

    x (B, heads, T, D) in bf16, fp16 or fp32, weight (heads, D, F) -> (B, heads, T, F) in x's dtype.
    plain: x before rotation, or None; with it the first F / 2 columns of W read x, the others
    plain. model.py returns fp32; in bf16 each feature is rounded once, to 2^-9 of itself, as the
    products that read it would round it anyway; logits and softmax are fp32. Raises ValueError for
    CPU tensors, float64, widths not in WIDTHS and FEATURE_WIDTHS. arXiv 2402.04347.
    """
    check("feature_map", WIDTHS, x=x, **({} if plain is None else {"plain": plain}))
    (_, H, _, D), F = x.shape, weight.shape[-1]
    if weight.shape != (H, D, F) or F not in FEATURE_WIDTHS or weight.device != x.device or (
            plain is not None and (plain.shape != x.shape or F == 16)):
        raise ValueError(f"kernels.feature_map: weight {tuple(weight.shape)} on {weight.device} "
                         f"does not fit x {tuple(x.shape)} on {x.device}; feature widths are "
                         f"{FEATURE_WIDTHS}, with plain from 32")
    x, *plain = token_major(x, *([] if plain is None else [plain.to(x.dtype)]))
    weight = weight.to(x.dtype).contiguous()
    return _feature_map_op(x, plain[0] if plain else None, weight).transpose(1, 2)
