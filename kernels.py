"""Triton kernels for the parts of model.py that a GPU spends its time in. Optional: speed only.

Four operators, each the same function as its plain PyTorch form in model.py (the definition):

    mlstm               model.mlstm_chunkwise      gate_sums, states_fwd, out_fwd
                                                   states_bwd, q_bwd, k_bwd, v_bwd, forget_bwd
    window_attention    model.window_attention     window_fwd; window_dq, window_dkv
    feature_map         model.FeatureMap           feature_fwd; feature_bwd
    gate_mix            o * mlstm + (1 - o) * swa  mix_fwd; mix_bwd

One decoding step (T = 1) has nothing to fuse: it stays in PyTorch (model.mlstm_recurrent).

The mLSTM over chunks of L tokens (`blocks`). Let W_ts = exp(log_i_s + sum of log_f after s up
to t) be the weight with which token t sees token s of its chunk, carry_t = exp(sum of log_f from
the chunk's start to t) that of the state, and write_s, keep the same two at the chunk's end. All
are kept as logarithms and divided by the largest in sight (r_t, m, lse_t) before the exponential:

    h_t   = (sum_s W_ts (q_t.k_s) v_s + carry_t q_t S) / (sum_s W_ts (q_t.k_s) + carry_t q_t.z)
    lse_t = log of that denominator
    S    <- keep S + sum_s write_s k_s (x) v_s           z <- keep z + sum_s write_s k_s

Backward, with w = W / denominator, c = carry / denominator, delta_t = dh_t.h_t (the gradient
through the denominator: not to be left out, since no norm layer follows), and
x_ts = (dh_t.v_s - delta_t) w_ts:

    dq_t = sum_s x_ts k_s + c_t (S dh_t - delta_t z)
    dk_s = sum_t x_ts q_t + write_s (dS v_s + dz)
    dv_s = sum_t w_ts (q_t.k_s) dh_t + write_s dS k_s
    dS  <- keep dS + sum_t c_t q_t (x) dh_t              dz  <- keep dz - sum_t c_t delta_t q_t
    dlog_i_s = k_s.dk_s
    dlog_f_t = what flows from tokens s < t to tokens t' >= t
             = flux + sum over s < t of the chunk of (k_s.dk_s - q_s.dq_s)
               flux = <S, dS> + <z, dz> at the chunk's start

(q.dq is 0 but for the rounding of h in delta; without it that rounding would add up. Starting anew
at every chunk likewise keeps errors from piling up over T.)

Documents: a token sees s >= start (the first token of its document), the state only if its document
was open when the chunk began. Gates, S, z, m, r, lse, delta and all sums are fp32; matrix products
take bf16 operands when v is bf16 and fp32 operands (three TF32 products on a GPU) otherwise, fp16
included, because S outgrows fp16. No atomics: every result is the same in every run.

Layout: inside this file (B, T, heads, width), as projections produce it; the public functions take
and return model.py's (B, heads, T, width) views of it. H query heads, K key/value heads, G = H / K.

Run: python kernels.py        on a machine with a CUDA GPU: self-check, benchmark table, JSON
"""

import json
import math
import sys

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

WIDTHS = (16, 32, 64, 128)
EMPTY = -1e30  # stabiliser of an empty state, as in model.py
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when this file was imported

# ----------------------------------------------------------------------------------------------
# 1. Tiles: what all kernels share
# ----------------------------------------------------------------------------------------------
# `row` = b * T + t0 is the first token of a tile, `n` how many of its tokens exist. The row goes
# into the pointer as int64 and only offsets inside the tile are int32, so no size overflows.


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
    """Decorator: register a function with torch.library, `fake` giving its results' shapes.

    torch.compile and FSDP then see one opaque operator and need not look inside.
    """
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


# ----------------------------------------------------------------------------------------------
# 2. The mLSTM
# ----------------------------------------------------------------------------------------------


@triton.jit
def gate_sums(log_f, start, coarse, fine, T, H: tl.constexpr, L: tl.constexpr):
    """Running sums of log_f from the chunk's start, in two parts, so that differences are exact.

    One fp32 sum of 64 forget gates near 0 reaches -6000, and the weight of two neighbours, a
    difference of two such sums, is then wrong by 5e-4. Here `coarse` sums multiples of 1/64: no
    rounding up to 2^18 (hence log_f is cut at -4096, where nothing is left of the past unless
    input gates differ by e^4000; gradients pass the cut). `fine` sums the remainders, at most 1 in
    all, and starts anew in every document, so documents do not touch each other's last bits.
    """
    c, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    row, n = b * T + c * L, T - c * L
    t = tl.arange(0, L)
    f = tl.maximum(vector(log_f, row, n, h, H, L), -4096.0)
    whole = tl.floor(f * 64) / 64
    seen = t[None, :] <= t[:, None]  # [t, u]
    store_vector(coarse, tl.sum(tl.where(seen, whole[None, :], 0.0), axis=1), row, n, h, H, L)
    seen &= t[None, :] >= first_seen(start, row, n, c * L, L)[:, None]
    rest = tl.sum(tl.where(seen, (f - whole)[None, :], 0.0), axis=1)
    store_vector(fine, rest, row, n, h, H, L)


@triton.jit
def log_weights(log_i, coarse, fine, first, BY_KEY: tl.constexpr, L: tl.constexpr):
    """log W of one chunk, laid out [t, s], or [s, t] if BY_KEY; -inf where t does not see s."""
    n, key = tl.arange(0, L), log_i - fine
    if BY_KEY:
        log_w = (coarse[None, :] - coarse[:, None]) + (fine[None, :] + key[:, None])
        return tl.where((n[:, None] <= n[None, :]) & (n[:, None] >= first[None, :]), log_w,
                        float("-inf"))
    log_w = (coarse[:, None] - coarse[None, :]) + (fine[:, None] + key[None, :])
    return tl.where((n[None, :] <= n[:, None]) & (n[None, :] >= first[:, None]), log_w,
                    float("-inf"))


@triton.jit
def log_ends(log_i, coarse, fine, start, row, n, t0, head, HEADS: tl.constexpr, L: tl.constexpr):
    """log write_s (L,) and log keep of a chunk: -inf for what the chunk's last document hides."""
    s, end = tl.arange(0, L), row + tl.minimum(n, L) - 1
    own = tl.load(start + end) - t0  # first token of the document open at the chunk's end
    coarse_end, fine_end = tl.load(coarse + end * HEADS + head), tl.load(fine + end * HEADS + head)
    write = coarse_end - vector(coarse, row, n, head, HEADS, L)
    write += fine_end - vector(fine, row, n, head, HEADS, L) + vector(log_i, row, n, head, HEADS, L)
    return (tl.where((s < n) & (s >= own), write, float("-inf")),
            tl.where(own < 0, coarse_end + fine_end, float("-inf")))


@triton.jit
def states_fwd(k, v, log_i, coarse, fine, start, S0, z0, m0,  # inputs
               S_in, z_in, m_in, S_end, z_end,  # states entering every chunk; after the last
               T, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
               L: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, MM: tl.constexpr):
    """The recurrence over chunks. One program: a (BD, BE) tile of one head's S, from start to end.

    m_in has one entry more than chunks; writes and keep are scaled with the very value stored.
    """
    bh, tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    b, h = bh // H, bh % H
    d, e = tile // (E // BE) * BD + tl.arange(0, BD), tile % (E // BE) * BE + tl.arange(0, BE)
    N = tl.cdiv(T, L)
    de = d[:, None] * E + e[None, :]
    S, z, m = tl.load(S0 + bh * D * E + de), tl.load(z0 + bh * D + d), tl.load(m0 + bh)
    for c in range(N):
        tl.store(S_in + (bh * N + c) * D * E + de, S.to(S_in.dtype.element_ty))
        tl.store(z_in + (bh * N + c) * D + d, z)
        tl.store(m_in + bh * (N + 1) + c, m)
        row, n = b * T + c * L, T - c * L
        write, keep = log_ends(log_i, coarse, fine, start, row, n, c * L, h, H, L)
        m_next = tl.maximum(m + keep, tl.max(write, axis=0))
        # (m - m_next) is exact where it matters; (m + keep) - m_next would lose keep's last bits
        scale = tl.exp((m - m_next) + keep)
        kw = load(k, row, n, h // (H // K), K, D, L, d) * tl.exp(write - m_next)[:, None]
        S = scale * S + product(tl.trans(kw), load(v, row, n, h // (H // K), K, E, L, e), MM)
        z = scale * z + tl.sum(kw, axis=0)
        m = m_next
    tl.store(S_end + bh * D * E + de, S)
    tl.store(z_end + bh * D + d, z)
    tl.store(m_in + bh * (N + 1) + N, m)


@triton.jit
def out_fwd(q, k, v, log_i, coarse, fine, start, S_in, z_in, m_in,  # inputs
            out, lse,  # outputs
            T, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
            L: tl.constexpr, BE: tl.constexpr, MM: tl.constexpr):
    """h and lse of one chunk and head: attention inside the chunk, the state for all before."""
    c, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h, N = bh // H, bh % H, tl.cdiv(T, L)
    row, n = b * T + c * L, T - c * L
    d = tl.arange(0, D)
    first = first_seen(start, row, n, c * L, L)
    hi, lo = vector(coarse, row, n, h, H, L), vector(fine, row, n, h, H, L)
    log_w = log_weights(vector(log_i, row, n, h, H, L), hi, lo, first, False, L)
    log_carry = tl.load(m_in + bh * (N + 1) + c) + (hi + lo)
    log_carry = tl.where(first < 0, log_carry, float("-inf"))
    r = tl.maximum(tl.maximum(log_carry, tl.max(log_w, axis=1)), -1e30)
    carry = tl.exp(log_carry - r)

    q = load(q, row, n, h, H, D, L, d)
    kT = tl.trans(load(k, row, n, h // (H // K), K, D, L, d))
    P = product(q, kT, MM) * tl.exp(log_w - r[:, None])  # (L, L) [t, s]
    z = tl.load(z_in + (bh * N + c) * D + d)
    den = tl.sum(P, axis=1) + carry * tl.sum(q * z[None, :], axis=1)
    den = tl.maximum(den, 1e-30)  # only against 0 / 0
    for e0 in range(0, E, BE):
        e = e0 + tl.arange(0, BE)
        S = tl.load(S_in + (bh * N + c) * D * E + d[:, None] * E + e[None, :])
        num = product(q, S, MM) * carry[:, None]
        num += product(P, load(v, row, n, h // (H // K), K, E, L, e), MM)
        store(out, num / den[:, None], row, n, h, H, E, L, e)
    store_vector(lse, r + tl.log(den), row, n, h, H, L)


@triton.jit
def states_bwd(q, dh, delta, lse, coarse, fine, start, S_in, z_in, m_in, dS_end, dz_end,  # inputs
               dS_out, dz_out, dS0, dz0,  # gradients of the states leaving every chunk; of S0, z0
               flux,  # (B, H, N, tiles): this tile's share of <S, dS> + <z, dz> where chunks start
               T, H: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
               L: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, MM: tl.constexpr):
    """states_fwd backwards in time, over the same tiles."""
    TILES: tl.constexpr = D // BD * (E // BE)
    bh, tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    b, h = bh // H, bh % H
    d, e = tile // (E // BE) * BD + tl.arange(0, BD), tile % (E // BE) * BE + tl.arange(0, BE)
    N = tl.cdiv(T, L)
    de = d[:, None] * E + e[None, :]
    dS, dz = tl.load(dS_end + bh * D * E + de), tl.load(dz_end + bh * D + d)
    for back in range(N):
        c = N - 1 - back
        tl.store(dS_out + (bh * N + c) * D * E + de, dS.to(dS_out.dtype.element_ty))
        tl.store(dz_out + (bh * N + c) * D + d, dz)
        row, n = b * T + c * L, T - c * L
        m, m_next = tl.load(m_in + bh * (N + 1) + c), tl.load(m_in + bh * (N + 1) + c + 1)
        first = first_seen(start, row, n, c * L, L)
        end = row + tl.minimum(n, L) - 1
        keep = tl.load(coarse + end * H + h) + tl.load(fine + end * H + h)
        scale = tl.where(tl.load(start + end) < c * L, tl.exp((m - m_next) + keep), 0.0)
        log_carry = vector(coarse, row, n, h, H, L) + vector(fine, row, n, h, H, L)
        log_carry += m - vector(lse, row, n, h, H, L)
        carry = tl.exp(tl.where(first < 0, log_carry, float("-inf")))
        qc = load(q, row, n, h, H, D, L, d) * carry[:, None]
        dS = scale * dS + product(tl.trans(qc), load(dh, row, n, h, H, E, L, e), MM)
        dz = scale * dz - tl.sum(qc * vector(delta, row, n, h, H, L)[:, None], axis=0)
        S = tl.load(S_in + (bh * N + c) * D * E + de).to(tl.float32)
        z = tl.load(z_in + (bh * N + c) * D + d) * (BE / E)  # E / BE tiles share these rows of z
        tl.store(flux + (bh * N + c) * TILES + tile, tl.sum(S * dS) + tl.sum(z * dz))
    tl.store(dS0 + bh * D * E + de, dS)
    tl.store(dz0 + bh * D + d, dz)


@triton.jit
def q_bwd(q, k, v, log_i, coarse, fine, start, dh, delta, lse, S_in, z_in, m_in,  # inputs
          dq, q_dq,  # outputs; q_dq (B, T, H) = q_t.dq_t
          T, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
          L: tl.constexpr, BE: tl.constexpr, MM: tl.constexpr):
    """dq of one chunk and head: out_fwd's counterpart."""
    c, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h, N = bh // H, bh % H, tl.cdiv(T, L)
    row, n = b * T + c * L, T - c * L
    d = tl.arange(0, D)
    carried, x = tl.zeros((L, D), tl.float32), tl.zeros((L, L), tl.float32)  # x [t, s]
    for e0 in range(0, E, BE):
        e = e0 + tl.arange(0, BE)
        S = tl.load(S_in + (bh * N + c) * D * E + d[:, None] * E + e[None, :])
        dh_e = load(dh, row, n, h, H, E, L, e)
        carried += product(dh_e, tl.trans(S), MM)
        x += product(dh_e, tl.trans(load(v, row, n, h // (H // K), K, E, L, e)), MM)

    first = first_seen(start, row, n, c * L, L)
    hi, lo = vector(coarse, row, n, h, H, L), vector(fine, row, n, h, H, L)
    log_w = log_weights(vector(log_i, row, n, h, H, L), hi, lo, first, False, L)
    norm = vector(lse, row, n, h, H, L)
    delta_t = vector(delta, row, n, h, H, L)[:, None]
    x = (x - delta_t) * tl.exp(log_w - norm[:, None])
    log_carry = tl.load(m_in + bh * (N + 1) + c) + (hi + lo) - norm
    carry = tl.exp(tl.where(first < 0, log_carry, float("-inf")))[:, None]
    z = tl.load(z_in + (bh * N + c) * D + d)[None, :]
    dq_t = (carried - delta_t * z) * carry
    dq_t += product(x, load(k, row, n, h // (H // K), K, D, L, d), MM)
    store(dq, dq_t, row, n, h, H, D, L, d)
    q_t = load(q, row, n, h, H, D, L, d)
    store_vector(q_dq, tl.sum(q_t * dq_t, axis=1), row, n, h, H, L)


@triton.jit
def k_bwd(q, k, v, log_i, coarse, fine, start, dh, delta, lse, m_in, dS_out, dz_out,  # inputs
          dk, dlog_i,  # outputs
          T, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
          L: tl.constexpr, BE: tl.constexpr, MM: tl.constexpr):
    """dk of one chunk and key/value head, over its G query heads, and their dlog_i.

    x is laid out [s, t] and computed anew: transposing q_bwd's x and feeding it to the next product
    gave wrong gradients on Hopper (flash-linear-attention, pull request 826).
    """
    c, bk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, kv, N = bk // K, bk % K, tl.cdiv(T, L)
    row, n = b * T + c * L, T - c * L
    d = tl.arange(0, D)
    first = first_seen(start, row, n, c * L, L)
    dk_sum = tl.zeros((L, D), tl.float32)
    for h in range(kv * (H // K), (kv + 1) * (H // K)):
        bh = b * H + h
        dk_h, x = tl.zeros((L, D), tl.float32), tl.zeros((L, L), tl.float32)
        for e0 in range(0, E, BE):
            e = e0 + tl.arange(0, BE)
            v_e = load(v, row, n, kv, K, E, L, e)
            dS = tl.load(dS_out + (bh * N + c) * D * E + d[:, None] * E + e[None, :])
            dk_h += product(v_e, tl.trans(dS), MM)
            x += product(v_e, tl.trans(load(dh, row, n, h, H, E, L, e)), MM)

        hi, lo = vector(coarse, row, n, h, H, L), vector(fine, row, n, h, H, L)
        log_w = log_weights(vector(log_i, row, n, h, H, L), hi, lo, first, True, L)
        x = (x - vector(delta, row, n, h, H, L)[None, :]) * tl.exp(
            log_w - vector(lse, row, n, h, H, L)[None, :])
        write, _ = log_ends(log_i, coarse, fine, start, row, n, c * L, h, H, L)
        write = tl.exp(write - tl.load(m_in + bh * (N + 1) + c + 1))[:, None]
        dk_h = (dk_h + tl.load(dz_out + (bh * N + c) * D + d)[None, :]) * write
        dk_h += product(x, load(q, row, n, h, H, D, L, d), MM)
        dk_sum += dk_h

        di = tl.sum(load(k, row, n, kv, K, D, L, d) * dk_h, axis=1)
        store_vector(dlog_i, di, row, n, h, H, L)
    store(dk, dk_sum, row, n, kv, K, D, L, d)


@triton.jit
def forget_bwd(dlog_i, q_dq, start, flux, dlog_f, T, H: tl.constexpr, L: tl.constexpr,
               TILES: tl.constexpr):
    """dlog_f of one chunk and head: what enters it, plus what tokens before t give, less take."""
    c, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h, N = bh // H, bh % H, tl.cdiv(T, L)
    row, n = b * T + c * L, T - c * L
    t = tl.arange(0, L)
    first = first_seen(start, row, n, c * L, L)
    seen = (t[None, :] < t[:, None]) & (t[None, :] >= first[:, None])  # [t, s]
    flow = vector(dlog_i, row, n, h, H, L) - vector(q_dq, row, n, h, H, L)
    df = tl.sum(tl.where(seen, flow[None, :], 0.0), axis=1)
    inflow = tl.sum(tl.load(flux + (bh * N + c) * TILES + tl.arange(0, TILES)), axis=0)
    store_vector(dlog_f, df + tl.where(first < 0, inflow, 0.0), row, n, h, H, L)


@triton.jit
def v_bwd(q, k, log_i, coarse, fine, start, dh, lse, m_in, dS_out,  # inputs
          dv,  # output
          T, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
          L: tl.constexpr, BE: tl.constexpr, MM: tl.constexpr):
    """BE columns of dv of one chunk and key/value head, over its G query heads."""
    c, bk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, kv, N = bk // K, bk % K, tl.cdiv(T, L)
    row, n = b * T + c * L, T - c * L
    d, e = tl.arange(0, D), tl.program_id(2) * BE + tl.arange(0, BE)
    first = first_seen(start, row, n, c * L, L)
    dv_sum = tl.zeros((L, BE), tl.float32)
    for h in range(kv * (H // K), (kv + 1) * (H // K)):
        bh = b * H + h
        k_t = load(k, row, n, kv, K, D, L, d)
        dS = tl.load(dS_out + (bh * N + c) * D * E + d[:, None] * E + e[None, :])
        write, _ = log_ends(log_i, coarse, fine, start, row, n, c * L, h, H, L)
        write = tl.exp(write - tl.load(m_in + bh * (N + 1) + c + 1))[:, None]
        dv_sum += product(k_t, dS, MM) * write
        hi, lo = vector(coarse, row, n, h, H, L), vector(fine, row, n, h, H, L)
        log_w = log_weights(vector(log_i, row, n, h, H, L), hi, lo, first, True, L)
        P = product(k_t, tl.trans(load(q, row, n, h, H, D, L, d)), MM)  # (L, L) [s, t]
        P *= tl.exp(log_w - vector(lse, row, n, h, H, L)[None, :])
        dv_sum += product(P, load(dh, row, n, h, H, E, L, e), MM)
    store(dv, dv_sum, row, n, kv, K, E, L, e)


def matmul_type(dtype):
    """Operand type of tl.dot. (The interpreter garbles bf16 products, so it gets fp32.)"""
    return tl.bfloat16 if dtype == torch.bfloat16 and not INTERPRETED else tl.float32


def state_type(dtype):
    """Storage of the chunks' states, which are only operands: what a product would round to."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def blocks(dtype, D, E):
    """Tokens a chunk, columns of D and of E a tile.

    In bf16 nothing spills up to width 128 (tests). fp32 operands spill at 128: right, not fast.
    """
    size = 64 if dtype == torch.bfloat16 else 32
    return size, min(D, size), min(E, size)


def run_states_fwd(k, v, log_i, log_f, start, S0, z0, m0, L, BD, BE):
    """Returns gates: (log_i, coarse, fine, start); states: (S_in, z_in, m_in); S_end, z_end."""
    (B, T, K, D), E, H, N = k.shape, v.shape[-1], log_i.shape[-1], triton.cdiv(k.shape[1], L)
    gates = log_i, torch.empty_like(log_f), torch.empty_like(log_f), start
    gate_sums[(N, B * H)](log_f, start, gates[1], gates[2], T, H, L, num_warps=4)
    S_in = k.new_empty(B, H, N, D, E, dtype=state_type(k.dtype))
    z_in, m_in = S0.new_empty(B, H, N, D), S0.new_empty(B, H, N + 1)
    S_end, z_end = torch.empty_like(S0), torch.empty_like(z0)
    states_fwd[(D // BD * (E // BE), B * H)](
        k, v, *gates, S0, z0, m0, S_in, z_in, m_in, S_end, z_end,
        T, H, K, D, E, L, BD, BE, matmul_type(k.dtype), num_warps=4, num_stages=3)
    return gates, (S_in, z_in, m_in), S_end, z_end


@operator("mlstm", lambda q, k, v, log_i, log_f, start, S0, z0, m0: (
    q.new_empty(*q.shape[:3], v.shape[3]), *likes(log_i, S0, z0, m0)))
def _mlstm_op(q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor, start: Tensor,
             S0: Tensor, z0: Tensor, m0: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, T, H, D), K, E = q.shape, k.shape[2], v.shape[3]
    h, lse = v.new_empty(B, T, H, E), torch.empty_like(log_i)
    L, BD, BE = blocks(q.dtype, D, E)
    with torch.cuda.device_of(q):
        gates, states, S, z = run_states_fwd(k, v, log_i, log_f, start, S0, z0, m0, L, BD, BE)
        out_fwd[(triton.cdiv(T, L), B * H)](
            q, k, v, *gates, *states, h, lse,
            T, H, K, D, E, L, BE, matmul_type(q.dtype), num_warps=4, num_stages=1)
    return h, lse, S, z, states[2][..., -1].clone()


@operator("mlstm_backward", lambda dh, dS, dz, q, k, v, log_i, log_f, start, S0, z0, *_: likes(
    q, k, v, log_i, log_f, S0, z0))
def _mlstm_backward_op(
        dh: Tensor, dS: Tensor, dz: Tensor, q: Tensor, k: Tensor, v: Tensor, log_i: Tensor,
        log_f: Tensor, start: Tensor, S0: Tensor, z0: Tensor, m0: Tensor, h: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, T, H, D), K, E, MM = q.shape, k.shape[2], v.shape[3], matmul_type(q.dtype)
    dq, dk, dv, di, df, dS0, dz0 = likes(q, k, v, log_i, log_f, S0, z0)
    L, BD, BE = blocks(q.dtype, D, E)
    tiles, N = D // BD * (E // BE), triton.cdiv(T, L)
    with torch.cuda.device_of(q):
        delta = row_delta(dh, h)
        # Recomputed, not saved: a tenth of all bytes moved, against twice q's memory per layer
        gates, states, _, _ = run_states_fwd(k, v, log_i, log_f, start, S0, z0, m0, L, BD, BE)
        dS_out, dz_out = likes(*states[:2])
        flux, q_dq = S0.new_empty(B, H, N, tiles), torch.empty_like(lse)
        states_bwd[(tiles, B * H)](
            q, dh, delta, lse, *gates[1:], *states, dS, dz, dS_out, dz_out, dS0, dz0, flux,
            T, H, D, E, L, BD, BE, MM, num_warps=4, num_stages=2)
        q_bwd[(N, B * H)](
            q, k, v, *gates, dh, delta, lse, *states, dq, q_dq,
            T, H, K, D, E, L, BE, MM, num_warps=8, num_stages=2)
        k_bwd[(N, B * K)](
            q, k, v, *gates, dh, delta, lse, states[2], dS_out, dz_out, dk, di,
            T, H, K, D, E, L, BE, MM, num_warps=8, num_stages=2)
        forget_bwd[(N, B * H)](di, q_dq, start, flux, df, T, H, L, tiles, num_warps=4)
        v_bwd[(N, B * K, E // BE)](
            q, k, *gates, dh, lse, states[2], dS_out, dv,
            T, H, K, D, E, L, BE, MM, num_warps=4, num_stages=2)
    return dq, dk, dv, di, df, dS0, dz0


def _mlstm_setup(ctx, inputs, output):
    h, lse, S, z, m = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*inputs, h, lse, S, z)


def mlstm_autograd(ctx, dh, _, dS, dz, dm):
    """The kernels differentiate in the true state (S, z) e^m; here m's own share is added."""
    *inputs, h, lse, S, z = ctx.saved_tensors
    q, k, v, log_i, log_f, start, S0, z0, m0 = inputs
    state_used = not (dS is None and dz is None and dm is None)
    dh = torch.zeros_like(h) if dh is None else dh.contiguous()
    dS = torch.zeros_like(S) if dS is None else dS.contiguous()
    dz = torch.zeros_like(z) if dz is None else dz.contiguous()
    dq, dk, dv, di, df, dS0, dz0 = _mlstm_backward_op(dh, dS, dz, *inputs, h, lse)
    dm0 = (dS0 * S0).sum((-1, -2)) + (dz0 * z0).sum(-1)
    if state_used:
        # S and z are divided by e^m and m is the largest exponent of all tokens of the last
        # document (and of the incoming state), so what m receives goes to that one token's gate
        # and to all forget gates after it. It is 0 when the loss sees only (S, z) e^m.
        dm = (0 if dm is None else dm) - (dS * S).sum((-1, -2)) - (dz * z).sum(-1)  # (B, H)
        to_end = log_f.flip(1).cumsum(1).flip(1)  # (B, T, H): from before t to the end
        token = torch.arange(log_f.shape[1], device=start.device)
        hidden = (token < start[:, -1:])[..., None]
        exponents = (log_i + to_end - log_f).masked_fill(hidden, -math.inf)
        whole = (m0 + to_end[:, 0]).masked_fill(start[:, -1:] >= 0, -math.inf)
        largest = torch.cat((whole[:, None], exponents), dim=1).argmax(1)[:, None]  # 0: the state
        di += torch.where(token[:, None] + 1 == largest, dm[:, None], 0)
        df += torch.where(token[:, None] + 1 > largest, dm[:, None], 0)
        dm0 = dm0 + torch.where(largest[:, 0] == 0, dm, 0)
    return dq, dk, dv, di, df, None, dS0, dz0, dm0


_mlstm_op.register_autograd(mlstm_autograd, setup_context=_mlstm_setup)


def document_starts(document_ids, x):
    """First token of each token's document, (B, T) int32, and -1 in the first document.

    -1, because the incoming state belongs to it: a document that began before a chunk does.
    x (B, heads, T, width): shape and device when document_ids is None.
    """
    B, _, T, _ = x.shape
    if document_ids is None:
        return torch.full((B, T), -1, dtype=torch.int32, device=x.device)
    if document_ids.shape != (B, T):
        raise ValueError(f"document_ids has shape {tuple(document_ids.shape)}; it needs ({B}, {T})")
    new = document_ids[:, 1:] != document_ids[:, :-1]
    index = torch.where(new, torch.arange(1, T, device=x.device), -1)
    return F.pad(index, (1, 0), value=-1).cummax(1).values.int()


def token_major(*tensors):
    """(B, heads, T, ...) -> contiguous (B, T, heads, ...): no copy for views of projections."""
    return [x.transpose(1, 2).contiguous() for x in tensors]


def check(name, **tensors):
    """One clear ValueError for what the kernels do not support."""
    q = next(iter(tensors.values()))
    for key, x in tensors.items():
        if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"kernels.{name}: {key} is {x.dtype}; the kernels take bfloat16, "
                             "float16 or float32 (kernels=\"torch\" takes any)")
        if not (x.is_cuda or INTERPRETED):
            raise ValueError(f"kernels.{name}: {key} is on {x.device}; the kernels need a CUDA "
                             "device (on a CPU use kernels=\"torch\")")
        if x.shape[-1] not in WIDTHS:
            raise ValueError(f"kernels.{name}: {key} has width {x.shape[-1]}; the kernels have "
                             f"widths {WIDTHS} (kernels=\"torch\" has all)")
        if x.dim() != 4 or x.shape[0] != q.shape[0] or x.shape[2] != q.shape[2] or (
                q.shape[1] % x.shape[1] or x.shape[2] == 0):
            raise ValueError(f"kernels.{name}: {key} has shape {tuple(x.shape)}, which does not "
                             f"fit {tuple(q.shape)}, (batch, heads, tokens, width)")


def mlstm(q, k, v, log_i, log_f, *, state=None, document_ids=None):
    """The mLSTM over a sequence: model.mlstm_chunkwise, with gradients, on a GPU.

    q (B, H, T, D), k (B, K, T, D): feature-mapped, non-negative. v (B, K, T, E). Products run in
    v's dtype (bf16, fp16, fp32). log_i, log_f (B, H, T) fp32, log_f at most 0. state: (S, z, m) in
    fp32 from an earlier part of the sequence, or None. document_ids (B, T): the state restarts
    where they change. Returns h (B, H, T, E) in v's dtype and the state after the last token.
    Raises ValueError for CPU tensors, float64, widths not in WIDTHS. arXiv 2603.15590, Eq. 8-10.
    """
    check("mlstm", q=q, k=k, v=v)
    B, H, _, D = q.shape
    if log_i.shape != q.shape[:3] or log_f.shape != q.shape[:3]:
        raise ValueError(f"kernels.mlstm: log_i {tuple(log_i.shape)} and log_f "
                         f"{tuple(log_f.shape)} must have q's shape {tuple(q.shape[:3])}")
    if state is None:
        state = (q.new_zeros(B, H, D, v.shape[-1], dtype=torch.float32),
                 q.new_zeros(B, H, D, dtype=torch.float32),
                 q.new_full((B, H), EMPTY, dtype=torch.float32))
    h, _, S, z, m = _mlstm_op(
        *token_major(q.to(v.dtype), k.to(v.dtype), v, log_i.float(), log_f.float()),
        document_starts(document_ids, q), *(x.float().contiguous() for x in state))
    return h.transpose(1, 2), (S, z, m)


# ----------------------------------------------------------------------------------------------
# 3. Sliding window with sinks
# ----------------------------------------------------------------------------------------------
# FlashAttention (arXiv 2205.14135) over a band. Only tiles on the band's edges, or with a document
# boundary, need a mask, so every loop runs in phases, one of them without.


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
    t0, bh = tl.program_id(0) * BQ, tl.program_id(1).to(tl.int64)
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
    t0, bh = tl.program_id(0) * BQ, tl.program_id(1).to(tl.int64)
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
    """dk, dv of one block of keys of one key/value head, over its G query heads.

    A block that holds sinks is walked to its document's end. Such blocks are few and come first in
    the grid, so the others run beside them. No partial sums, no atomics.
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
    (B, T, H, _), wide = q.shape, q.dtype == torch.bfloat16
    h, lse = torch.empty_like(q), q.new_empty(B, T, H, dtype=torch.float32)
    BQ, BK = (128, 64) if wide else (64, 32)
    with torch.cuda.device_of(q):
        window_fwd[(triton.cdiv(T, BQ), B * H)](
            q, k, v, start, h, lse, **window_sizes(q, k, window, sinks), BQ=BQ, BK=BK, BS=16,
            num_warps=8, num_stages=2)
    return h, lse


@operator("window_backward", lambda dh, q, k, v, *_: likes(q, k, v))
def _window_backward_op(dh: Tensor, q: Tensor, k: Tensor, v: Tensor, start: Tensor, h: Tensor,
                       lse: Tensor, window: int, sinks: int) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, _), K, wide = q.shape, k.shape[2], q.dtype == torch.bfloat16
    dq, dk, dv = likes(q, k, v)
    sizes, block = window_sizes(q, k, window, sinks), 64 if wide else 32
    index = torch.arange(T, device=q.device, dtype=torch.int32)
    begins = torch.where(start == index, index, T)  # the next document's first token, else T
    stop = F.pad(begins[:, 1:], (0, 1), value=T).flip(1).cummin(1).values.flip(1).contiguous()
    with torch.cuda.device_of(q):
        delta = row_delta(dh, h)
        window_dq[(triton.cdiv(T, block), B * H)](
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

    q (B, H, T, D), k and v (B, K, T, D) of one dtype (bf16, fp16, fp32), rotated; document_ids
    (B, T) or None. Returns (B, H, T, D). arXiv 2603.15590, Eq. 3, 4. Raises ValueError for CPU
    tensors, float64, widths not in WIDTHS, dtypes that differ.
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
# 4. Feature map and gate mix: bound by memory, so what counts is the number of passes
# ----------------------------------------------------------------------------------------------


@triton.jit
def feature_fwd(x, weight, phi, T, H: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr,
                BT: tl.constexpr, MM: tl.constexpr):
    """phi = softmax(x W) of SPAN tokens of one head, W read once."""
    t0, bh = tl.program_id(0) * SPAN, tl.program_id(1).to(tl.int64)
    b, h, d = bh // H, bh % H, tl.arange(0, D)
    W = tl.load(weight + h * D * D + d[:, None] * D + d[None, :])
    for t in range(t0, tl.minimum(t0 + SPAN, T), BT):
        y = product(load(x, b * T + t, T - t, h, H, D, BT, d), W, MM)
        y = tl.exp(y - tl.max(y, axis=1)[:, None])
        store(phi, y / tl.sum(y, axis=1)[:, None], b * T + t, T - t, h, H, D, BT, d)


@triton.jit
def feature_bwd(dphi, x, weight, phi, dx, dW, T, H: tl.constexpr, D: tl.constexpr,
                SPAN: tl.constexpr, BT: tl.constexpr, MM: tl.constexpr):
    """dx of SPAN tokens of one head and their share of dW (B, spans, H, D, D)."""
    t0, bh = tl.program_id(0) * SPAN, tl.program_id(1).to(tl.int64)
    b, h, d = bh // H, bh % H, tl.arange(0, D)
    at = d[:, None] * D + d[None, :]
    W = tl.load(weight + h * D * D + at)
    acc = tl.zeros((D, D), tl.float32)
    for t in range(t0, tl.minimum(t0 + SPAN, T), BT):
        p = load(phi, b * T + t, T - t, h, H, D, BT, d).to(tl.float32)
        g = load(dphi, b * T + t, T - t, h, H, D, BT, d).to(tl.float32)
        dy = p * (g - tl.sum(p * g, axis=1)[:, None])
        acc += product(tl.trans(load(x, b * T + t, T - t, h, H, D, BT, d)), dy, MM)
        store(dx, product(dy, tl.trans(W), MM), b * T + t, T - t, h, H, D, BT, d)
    tl.store(dW + ((b * tl.num_programs(0) + tl.program_id(0)) * H + h) * D * D + at, acc)


SPAN = 1024  # tokens a program: dW's partial sums stay small beside x, the GPU full from T = 4k on


@operator("feature_map", lambda x, weight: torch.empty_like(x))
def _feature_map_op(x: Tensor, weight: Tensor) -> Tensor:
    (B, T, H, D), phi = x.shape, torch.empty_like(x)
    with torch.cuda.device_of(x):
        feature_fwd[(triton.cdiv(T, SPAN), B * H)](
            x, weight, phi, T, H, D, SPAN, 64, matmul_type(x.dtype), num_warps=4, num_stages=2)
    return phi


@operator("feature_map_backward", lambda dphi, x, weight, phi: likes(x, weight))
def _feature_map_backward_op(dphi: Tensor, x: Tensor, weight: Tensor, phi: Tensor
                            ) -> tuple[Tensor, Tensor]:
    (B, T, H, D), spans = x.shape, triton.cdiv(x.shape[1], SPAN)
    dx, dW = torch.empty_like(x), x.new_empty(B, spans, H, D, D, dtype=torch.float32)
    with torch.cuda.device_of(x):
        feature_bwd[(spans, B * H)](
            dphi, x, weight, phi, dx, dW, T, H, D, SPAN, 64 if x.dtype == torch.bfloat16 else 16,
            matmul_type(x.dtype), num_warps=8, num_stages=1)
    return dx, dW.sum((0, 1)).to(weight.dtype)


def _feature_map_autograd(ctx, dphi):
    return _feature_map_backward_op(dphi.contiguous(), *ctx.saved_tensors)


_feature_map_op.register_autograd(
    _feature_map_autograd,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output))


def feature_map(x, weight):
    """phi(x) = softmax(x W) over the features, one W per head: model.FeatureMap on a GPU.

    x (B, H, T, D) in bf16, fp16 or fp32, weight (H, D, D) in any of them -> (B, H, T, D) in x's
    dtype. model.py returns fp32; in bf16 each feature is rounded once, to 2^-9 of itself, as the
    products that read it would round it anyway; the softmax before is fp32, logits included. Halves
    the bytes. Raises ValueError for CPU tensors, float64, widths not in WIDTHS. arXiv 2402.04347.
    """
    check("feature_map", x=x)
    if weight.shape != (x.shape[1], x.shape[3], x.shape[3]) or weight.device != x.device:
        raise ValueError(f"kernels.feature_map: weight {tuple(weight.shape)} on {weight.device} "
                         f"does not fit x {tuple(x.shape)} on {x.device}")
    return _feature_map_op(*token_major(x), weight.contiguous()).transpose(1, 2)


@triton.jit
def mix_fwd(o, a, b, out, n_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out = o a + (1 - o) b, all (rows, WIDTH) but o (rows,)."""
    row, d = tl.program_id(0) * BLOCK, tl.arange(0, WIDTH)
    n = n_rows - row
    gate = vector(o, row, n, 0, 1, BLOCK)[:, None]
    a = load(a, row, n, 0, 1, WIDTH, BLOCK, d).to(tl.float32)
    b = load(b, row, n, 0, 1, WIDTH, BLOCK, d).to(tl.float32)
    store(out, gate * a + (1 - gate) * b, row, n, 0, 1, WIDTH, BLOCK, d)


@triton.jit
def mix_bwd(dout, o, a, b, do, da, db, n_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of mix_fwd, from dout (rows, WIDTH)."""
    row, d = tl.program_id(0) * BLOCK, tl.arange(0, WIDTH)
    n = n_rows - row
    gate = vector(o, row, n, 0, 1, BLOCK)[:, None]
    g = load(dout, row, n, 0, 1, WIDTH, BLOCK, d).to(tl.float32)
    a = load(a, row, n, 0, 1, WIDTH, BLOCK, d).to(tl.float32)
    b = load(b, row, n, 0, 1, WIDTH, BLOCK, d).to(tl.float32)
    store(da, g * gate, row, n, 0, 1, WIDTH, BLOCK, d)
    store(db, g * (1 - gate), row, n, 0, 1, WIDTH, BLOCK, d)
    store_vector(do, tl.sum(g * (a - b), axis=1), row, n, 0, 1, BLOCK)


@operator("gate_mix", lambda o, a, b: torch.empty_like(a))
def _gate_mix_op(o: Tensor, a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty_like(a)
    with torch.cuda.device_of(a):
        mix_fwd[(triton.cdiv(o.numel(), 32),)](o, a, b, out, o.numel(), a.shape[-1], 32)
    return out


@operator("gate_mix_backward", lambda dout, o, a, b: likes(o, a, b))
def _gate_mix_backward_op(dout: Tensor, o: Tensor, a: Tensor, b: Tensor
                         ) -> tuple[Tensor, Tensor, Tensor]:
    do, da, db = likes(o, a, b)
    with torch.cuda.device_of(a):
        mix_bwd[(triton.cdiv(o.numel(), 32),)](dout, o, a, b, do, da, db, o.numel(), a.shape[-1],
                                               32)
    return do, da, db


_gate_mix_op.register_autograd(
    lambda ctx, dout: _gate_mix_backward_op(dout.contiguous(), *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def gate_mix(o, mlstm_h, window_h):
    """o * mlstm_h + (1 - o) * window_h (Eq. 11): o (B, H, T) fp32, the others (B, H, T, D).

    Eager PyTorch moves 7 tensors of h's size forward and 12 backward, this 3 and 5: 94 us instead
    of 218 for 32 heads of 128 over 16k tokens at 4.3 TB/s, near half of the mLSTM's forward.
    """
    check("gate_mix", mlstm_h=mlstm_h, window_h=window_h)
    if o.shape != mlstm_h.shape[:3] or mlstm_h.shape != window_h.shape:
        raise ValueError(f"kernels.gate_mix: o {tuple(o.shape)} does not fit "
                         f"{tuple(mlstm_h.shape)} and {tuple(window_h.shape)}")
    out = _gate_mix_op(*token_major(o.float(), mlstm_h, window_h.to(mlstm_h.dtype)))
    return out.transpose(1, 2)


# ----------------------------------------------------------------------------------------------
# 5. python kernels.py: are they right on this GPU, and how fast
# ----------------------------------------------------------------------------------------------


def random_inputs(B, H, K, T, D, dtype, device, wild=False):
    """Seeded q, k, v (before feature maps), log_i, log_f. wild: gates at their extremes."""
    r = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(B, T, heads, D, generator=r, device=device, dtype=dtype).transpose(1, 2)
               for heads in (H, K, K))
    log_i, forget = torch.randn(2, B, T, H, generator=r, device=device).transpose(2, 3)
    if wild:
        return q, k, v, 25 * log_i, -10 ** (forget * 2)
    return q, k, v, log_i, F.logsigmoid(forget + 4)


def results(function, inputs, dtype):
    """Outputs and gradients (of a fixed random projection) of function(*inputs in dtype)."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    outputs = function(*inputs)
    r = torch.Generator(inputs[0].device).manual_seed(1)
    weights = [torch.randn(x.shape, generator=r, device=x.device) for x in outputs]
    loss = sum((x.to(dtype or torch.float32) * w).sum() for x, w in zip(outputs, weights))
    return [x.double() for x in (*outputs, *torch.autograd.grad(loss, inputs))]


def self_check(device="cuda", T=300, D=128):
    """Kernels against model.py in float64: {case: largest error of outputs and gradients}.

    Errors are root mean squares, relative to that of the result (to 0.1 where it is less: with
    gates at their extremes gradients cancel to nearly nothing). Raises ValueError with the
    figures when one exceeds 1e-4 in fp32, in bf16 3e-2, or 1e-1 when wild: delta_t is taken from
    the rounded h, and dh_t.v_s - delta_t cancels where one token has nearly all the weight.
    """
    import model

    ids = torch.arange(T, device=device)[None] // 47
    feature, errors = model.FeatureMap(4, D).to(device, torch.float64), {}

    def rms(x):
        return x.pow(2).mean().sqrt().item()

    def reference_map(x, weight):
        return torch.func.functional_call(feature, {"weight": weight}, (x,))

    for dtype, wild, limit in ((torch.float32, False, 1e-4), (torch.float32, True, 1e-4),
                               (torch.bfloat16, False, 3e-2), (torch.bfloat16, True, 1e-1)):
        q, k, v, log_i, log_f = random_inputs(1, 4, 2, T, D, dtype, device, wild)
        weight = torch.eye(D, device=device).repeat(4, 1, 1) + 0.01
        for name, ours, plain, inputs in (
                ("mlstm", lambda *x: mlstm(*x, document_ids=ids)[:1],
                 lambda *x: model.mlstm_chunkwise(*x, document_ids=ids)[:1],
                 (q.softmax(-1), k.softmax(-1), v, log_i, log_f)),
                ("window", lambda *x: [window_attention(*x, window=90, sinks=4)],
                 lambda *x: [model.window_attention(*x, window=90, sinks=4)], (q, k, v)),
                ("feature map", lambda *x: [feature_map(*x)],
                 lambda *x: [reference_map(*x)], (q, weight)),
                ("gate mix", lambda *x: [gate_mix(*x)],
                 lambda o, a, b: [o[..., None] * a + (1 - o[..., None]) * b],
                 (torch.sigmoid(log_i), q, q.flip(2)))):
            pairs = zip(results(ours, inputs, None), results(plain, inputs, torch.float64))
            case = f"{name}, {str(dtype)[6:]}{', wild gates' if wild else ''}"
            errors[case] = max(rms(a - b) / max(rms(b), 0.1) for a, b in pairs)
            if not errors[case] < limit:
                raise ValueError(f"self-check failed: {case} above {limit} in {errors}")
    return errors


def floor_ms(B, H, K, T, D, window, bandwidth, flops):
    """The least time this GPU could take (bf16): {operator: (forward, forward + backward)} in ms.

    mLSTM: the bytes this decomposition cannot avoid, with chunks of 128. Forward: q, h once, k, v
    for the states and again for h, states written and read. Backward: q, dh, k, v and states
    twice over, once more h, dh for delta, and dq, dk, dv and the states' gradients.
    Window: arithmetic of W keys a query, two products forward and five more backward.
    """
    query, key, states = (2 * B * n for n in (H * T * D, K * T * D, H * T * D * D // 128))
    forward = 2 * query + 4 * key + 2 * states
    both = forward + 7 * query + 6 * key + 4 * states
    pairs = 2 * B * H * T * min(window, T) * D
    return {"mlstm": (1e3 * forward / bandwidth, 1e3 * both / bandwidth),
            "window": (2e3 * pairs / flops, 7e3 * pairs / flops)}


def contenders(inputs, window, sinks):
    """(operator, name, function of inputs): ours, plain PyTorch, and PyTorch's own attention."""
    import model

    T = inputs[0].shape[2]
    yield "mlstm", "ours", lambda q, k, v, i, f: mlstm(q, k, v, i, f)[0]
    yield "mlstm", "model.py", lambda q, k, v, i, f: model.mlstm_chunkwise(q, k, v, i, f)[0]
    yield "window", "ours", lambda q, k, v, *_: window_attention(
        q, k, v, window=window, sinks=sinks)
    yield "window", "model.py", lambda q, k, v, *_: model.window_attention(
        q, k, v, window=window, sinks=sinks)
    if inputs[0].is_cuda:  # on a CPU FlexAttention has no backward
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        mask = create_block_mask(
            lambda b, h, t, s: (s <= t) & ((s > t - window) | (s < sinks)), None, None, T, T)
        flex = torch.compile(flex_attention)
        yield "window", "FlexAttention", lambda q, k, v, *_: flex(
            q, k, v, block_mask=mask, enable_gqa=True)
    yield "all keys", "SDPA", lambda q, k, v, *_: F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True)


def benchmark(timer, lengths, B=1, H=32, K=8, D=128, window=512, sinks=4, device="cuda"):
    """Rows {operator, name, T, forward_ms, both_ms and their ratios to the floor}.

    timer(function) -> ms. The floor's bandwidth and arithmetic are measured with it, by a copy and
    a product of matrices. A form that runs out of memory has None.
    """
    size = 8192 if device == "cuda" else 64
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    bandwidth, flops = (2 * x.nbytes * 1e3 / timer(lambda: x.clone()),
                        2 * size**3 * 1e3 / timer(lambda: x @ x))
    print(f"measured: {bandwidth / 1e12:.2f} TB/s copy, {flops / 1e12:.0f} TFLOP/s bf16 product")
    rows = []
    for T in lengths:
        q, k, v, log_i, log_f = random_inputs(B, H, K, T, D, torch.bfloat16, device)
        floors = floor_ms(B, H, K, T, D, window, bandwidth, flops)
        inputs = [x.requires_grad_() for x in (q.softmax(-1), k.softmax(-1), v, log_i, log_f)]
        dh = torch.ones_like(q)
        for operator, name, function in contenders(inputs, window, sinks):
            used = inputs if operator == "mlstm" else inputs[:3]

            def both():
                torch.autograd.grad(function(*inputs), used, dh)

            try:
                with torch.no_grad():
                    times = [timer(lambda: function(*inputs))]
                times.append(timer(both))
            except torch.OutOfMemoryError:
                times = [None, None]
            least = floors.get(operator, (None, None))
            ratios = [t and f and t / f for t, f in zip(times, least)]
            rows.append(dict(operator=operator, name=name, T=T, forward_ms=times[0],
                             both_ms=times[1], forward_floors=ratios[0], both_floors=ratios[1]))
    return rows


def print_table(rows):
    """One line a row; `x floor` is the time as a multiple of the least possible."""
    def cell(value, digits):
        return f"{'-' if value is None else f'{value:.{digits}f}':>9}"

    print(f"{'operator':10}{'T':>7}  {'form':14}{'fwd ms':>9}{'x floor':>9}{'+bwd ms':>9}"
          f"{'x floor':>9}")
    for r in rows:
        print(f"{r['operator']:10}{r['T']:>7}  {r['name']:14}{cell(r['forward_ms'], 3)}"
              f"{cell(r['forward_floors'], 2)}{cell(r['both_ms'], 3)}{cell(r['both_floors'], 2)}")


def main():
    """Self-check, benchmark table, JSON; exit status 2 without a GPU."""
    if not torch.cuda.is_available():
        print("kernels.py needs a CUDA GPU, and PyTorch sees none here; without one, "
              "`pytest tests/test_kernels.py` runs the kernels in Triton's interpreter")
        sys.exit(2)
    errors = self_check()
    print("self-check, largest relative error against float64 (outputs and gradients):")
    for case, error in errors.items():
        print(f"  {case:36}{error:.1e}")
    rows = benchmark(lambda f: triton.testing.do_bench(f, return_mode="median"),
                     (4096, 16384, 65536))
    print_table(rows)
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                      "triton": triton.__version__, "errors": errors, "rows": rows}))


if __name__ == "__main__":
    main()
