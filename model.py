"""The model: a Transformer whose softmax attention can be replaced by a hybrid xLSTM mixer.

"Effective Distillation to Hybrid xLSTM Architectures" (arXiv 2603.15590), called "the paper"
below, keeps everything of a pretrained Transformer but the way its heads look back. Softmax
attention reads all T previous tokens, so its cache grows with T. The hybrid mixes two readers
whose memory is constant:

    window + sinks   exact softmax attention, over the last W tokens and the first few
    mLSTM            a matrix per head that every token is written into and fades from

and a learned scalar gate per head and token chooses between them (Eq. 11).

One Transformer, one Block, two mixers: `Attention` (the teacher's) and `HybridAttention`, which
inherits the projections and overrides `mix`. That override is the paper's contribution. Sections 2
to 6 are all one needs to read first, and of section 1 `ModelConfig`; how files spell it, caches,
weights on disk and the tokenizer can wait.

Contents: 1 configuration · 2 norm, RoPE, softmax attention · 3 the mLSTM · 4 window and sinks ·
5 the hybrid mixer · 6 the Transformer · 7 cache, generation · 8 weights on disk · 9 tokenizer ·
10 a conversation (python model.py DIR)

Glossary (code: meaning, symbol in the paper)
    B, T, V         batch, tokens, vocabulary
    H, K            query heads, key/value heads; H / K query heads, a group, share one of K
    D, E            width of a head of queries or keys, of values (the same in every teacher here)
    F, width        features of a query or key in the mLSTM (the paper's: D; F is also torch's)
    S, z, m         mLSTM matrix state, normaliser, stabiliser; the true state is (S, z) * e^m
    log_i, log_f    log input gate (its preactivation), log forget gate (log sigmoid of its own)
    phi             feature map of queries and keys; the functions mlstm_* take them mapped
    mlstm, swa      the two readers' outputs; swa is attention in a sliding window, with sinks
    W, L            tokens a window sees; tokens of a chunk or block computed at once. (In section
                    3 W_ts is a weight, in FeatureMap W the matrix.)
    N               chunks or blocks; in softmax attention keys
    o               output gate, o_t: 0 the window speaks, 1 the mLSTM
    (x)             outer product
    stage I, II     distill.py's trainings: of the new parameters, layer by layer, towards the
                    teacher's attention; then of the student towards its next-token probabilities

Layout: every per-head tensor is (B, H, T, D). Not here: training (distill.py), scoring
(evaluate.py), merging (merge.py), GPU kernels (kernels.py).
"""

import argparse
import codecs
import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import unicodedata
import uuid
from pathlib import Path
from typing import NamedTuple

import jinja2.ext
import jinja2.sandbox
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------
# 1. Configuration: what a folder's config.json says, in one vocabulary for all families
# ----------------------------------------------------------------------------------------------
# Families differ in a dozen settings and in what their config.json leaves unsaid. Everything is
# decided here, once; the model below asks a ModelConfig and never knows the file's spelling. A
# setting that would change the logits and is not implemented is refused by name: a model that runs
# with a setting overlooked looks healthy and is a worse teacher.
#
# A student's folder describes itself in the same way: it has the teacher's config.json, and in it
# one more object, "hybrid". So one loader serves both, and other programs that read the file find
# the keys they know:
#
#     {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, ...,
#      "hybrid": {"window": 512, "sinks": 4, "mixer": "hybrid", "features": 4}}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position settings of a kind of layer (RoFormer, arXiv 2104.09864)."""

    theta: float
    kind: str = "default"  # "default", "linear", "llama3" or "yarn"
    factor: float = 1.0  # by how much the context is stretched
    original: int = 0  # context length of pretraining, before the stretch by `factor`
    low_freq_factor: float = 0.0  # llama3, which has no default
    high_freq_factor: float = 0.0  # llama3, likewise
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: multiplies cos AND sin, so q.k scales by its square


NOPE = Rope(theta=1.0, kind="linear", factor=math.inf)  # all angles 0: no positions (SmolLM3)


@dataclasses.dataclass(frozen=True)
class Hybrid:
    """The student's part of the configuration: the "hybrid" object in its config.json."""

    window: int = 512  # W: tokens the softmax branch sees, the current one included
    sinks: int = 4  # first tokens of the document that every later token sees
    mixer: str = "hybrid"  # a key of MIXERS
    features: int = 1  # F / D (`FeatureMap`). Where the file is silent: 1, as in the paper

    def __post_init__(self):
        if self.mixer not in MIXERS:
            raise ValueError(f"mixer {self.mixer!r} is unknown; known: {', '.join(MIXERS)}")
        if not (isinstance(self.window, int) and self.window >= 1
                and isinstance(self.sinks, int) and self.sinks >= 0):
            raise ValueError(f"window {self.window!r} must be at least 1 and sinks {self.sinks!r} "
                             "at least 0")
        if self.features not in (1, 2, 4, 8):
            raise ValueError(f"features {self.features!r} must be 1 (the paper's), 2, 4 or 8")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a teacher or a student; every setting that changes a logit is here."""

    family: str  # a key of FAMILIES
    vocab_size: int  # V, rows of the embedding: may exceed the tokenizer's ids
    hidden_size: int  # width of the residual stream
    intermediate_size: int  # width inside the MLP
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D: H * D need not be hidden_size
    norm_eps: float
    tied: bool  # lm_head is the embedding matrix
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    layer_windows: tuple  # per layer: the TEACHER's own window (tokens, itself included) or None
    layer_ropes: tuple  # per layer: its Rope; Olmo 3 has two kinds, SmolLM3 layers with none
    max_positions: int  # of the teacher's training: evaluate.py refuses longer texts, nothing here
    eos_ids: tuple  # ids that end a generation
    embedding_multiplier: float = 1.0  # Granite scales what enters the first layer,
    residual_multiplier: float = 1.0  # what a branch adds,
    attention_multiplier: float | None = None  # q.k (None: by 1/sqrt(D)),
    logits_scaling: float = 1.0  # and divides the logits
    separator_id: int | None = None  # token at which positions restart, between sequences
    hybrid: Hybrid | None = None  # None: a teacher

    @property
    def qk_norm(self):
        """Width over which q and k are normalised: "head" (Qwen3), "projection" (Olmo), None."""
        return {"qwen3": "head", "olmo2": "projection", "olmo3": "projection"}.get(self.family)

    @property
    def is_olmo(self):
        """Olmo 2/3: norms on the branch outputs, and other rounding orders in bf16."""
        return self.family in ("olmo2", "olmo3")

    def with_layers(self, n):
        """This model with n layers, whose kinds take turns as they do here: to measure by."""
        return dataclasses.replace(self, num_layers=n, layer_windows=(self.layer_windows * n)[:n],
                                   layer_ropes=(self.layer_ropes * n)[:n])

    @staticmethod
    def from_hf(directory):
        """Read a Hugging Face folder's config.json (and generation_config.json for the eos ids).

        Raises FileNotFoundError when there is no config.json, ValueError naming the file and the
        setting when the family or a setting is one this file does not implement.
        """
        path, snapshots = Path(directory, "config.json"), [*Path(directory).glob("snapshots/*")]
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; " + (
                f"name the snapshot inside: {snapshots[0]}" if snapshots else
                "name a folder, such as this makes: hf download org/name --local-dir DIR"))
        config = read_json(path)
        try:
            config = naming(path, _parse_config, config)
        except (LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise ValueError(f"{path}: a setting is missing or cannot be ({error!r})"
                             ) from None
        # generation_config.json overrides config.json: instruct models stop at more ids (Llama's
        # at three). An id below 0 would never be sampled, so that no answer ends. Nor would one
        # above the vocabulary, and it has no embedding; but transformers writes Olmo's 50279 for
        # however small a model.
        generation = read_json(path.with_name("generation_config.json"), {})
        eos = _as_tuple(generation.get("eos_token_id")) or config.eos_ids
        if not all(type(i) is int and i >= 0 for i in eos):
            raise ValueError(f"{path} or generation_config.json: eos_token_id {eos} is no token id")
        known = tuple(i for i in eos if i < config.vocab_size)
        if known != eos:
            print(f"{path} or generation_config.json: eos_token_id {eos} is not all in the "
                  f"vocabulary of {config.vocab_size}; what is not ends no text")
        return dataclasses.replace(config, eos_ids=known)


# What a config.json means where it is silent: first Llama's defaults (and two keys that others
# read), then those in which a family differs. A published config.json often leaves out what its
# family's class in transformers has as default, so these are read off there (but sizes, which the
# tensors check, and eos ids). A key whose value is null is not silent: "sliding_window": null is
# Mistral's full attention.
FAMILIES = {
    "llama": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
              "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 2048,
              "max_window_layers": 28, "no_rope_layer_interval": 4},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096,
                "max_position_embeddings": 131072},
    "qwen2": {"sliding_window": 4096, "max_position_embeddings": 32768},
    "qwen3": {"sliding_window": 4096, "max_position_embeddings": 32768, "head_dim": 128},
    "olmo2": {"rms_norm_eps": 1e-5},
    "olmo3": {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096},
    "smollm3": {"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True,
                "max_position_embeddings": 32768},
    "granite": {"embedding_multiplier": 1.0, "residual_multiplier": 1.0,
                "attention_multiplier": 1.0, "logits_scaling": 1.0}}
FAMILIES["ministral"] = FAMILIES["mistral"]


def _parse_config(c):
    """config.json's dictionary -> ModelConfig, with each family's defaults where it is silent.

    Keys that change no logit (dropout, use_cache, initialisation, names of classes) are passed by.
    A mixture of experts, multi-head latent attention and the like come under a model_type of their
    own, which is refused.
    """
    family = c.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not supported; supported: "
                         + ", ".join(FAMILIES))
    if family == "mistral" and "layer_types" in c:  # so transformers reads it (Ministral 8B)
        family = "ministral"
    c = {**FAMILIES["llama"], **FAMILIES[family], **c, "model_type": family}
    c["num_key_value_heads"] = c.get("num_key_value_heads") or c["num_attention_heads"]
    _check_config(c)
    # SmolLM3 leaves every fourth layer without positions (NoPE, arXiv 2501.18795). In its list of
    # no_rope_layers 1 means RoPE, whatever the name says.
    layers = range(c["num_hidden_layers"] if family == "smollm3" else 0)
    rotated = c.get("no_rope_layers") or [(i + 1) % c["no_rope_layer_interval"] for i in layers]
    nope = [i for i in layers if not rotated[i]]
    windows = _parse_windows(c, nope)
    hybrid = {**(c.get("hybrid") or {})}
    if hybrid.pop("folded", False):  # earlier versions could; False says that this one is not
        raise ValueError("a student with a folded output gate is no longer read: save it anew from "
                         "the student it was folded from")
    return ModelConfig(
        family=family, vocab_size=c["vocab_size"], hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"], num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"], num_kv_heads=c["num_key_value_heads"],
        head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
        norm_eps=c["rms_norm_eps"], tied=c["tie_word_embeddings"],
        # Qwen2 always has biases on q, k, v and none on o, and no key that says so.
        qkv_bias=family == "qwen2" or c["attention_bias"],
        o_bias=family != "qwen2" and c["attention_bias"],
        mlp_bias=family in ("llama", "smollm3", "granite") and c["mlp_bias"],
        layer_windows=windows, layer_ropes=_parse_ropes(c, windows, nope),
        max_positions=c["max_position_embeddings"],
        eos_ids=_as_tuple(c.get("eos_token_id")), separator_id=c.get("separator_id"),
        hybrid=Hybrid(**hybrid) if c.get("hybrid") is not None else None,
        **{name: c[name] for name in FAMILIES["granite"] if family == "granite"})


def _check_config(c):
    """Refuse what is not implemented, and sizes that cannot be."""
    if quantised := c.get("quantization_config"):
        raise ValueError(f"quantised by {quantised.get('quant_method')}, and only plain floats are "
                         "read: fetch the original, or dequantise and save it")
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size",
                 "intermediate_size", "vocab_size", *(["head_dim"] if c.get("head_dim") else [])):
        if not (type(c[name]) is int and 1 <= c[name] <= 1 << 24):
            raise ValueError(f"{name} = {c[name]!r} is not an integer from 1 to 2^24")
    for name in ("rms_norm_eps", *(FAMILIES["granite"] if c["model_type"] == "granite" else ())):
        if not _is_positive(c[name]):
            raise ValueError(f"{name} = {c[name]!r} is not a positive number")
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads "
                         f"{kv_heads}")
    if (c.get("head_dim") or c["hidden_size"] / heads) % 2:
        raise ValueError(f"head_dim, or hidden_size over {heads} heads, is not even")
    if c["hidden_act"] != "silu":
        raise ValueError(f"hidden_act {c['hidden_act']!r} is not supported, only 'silu'")
    separator = c.get("separator_id")
    if separator is not None and not (type(separator) is int and 0 <= separator < c["vocab_size"]):
        raise ValueError(f"separator_id {separator!r} is no token id below vocab_size "
                         f"{c['vocab_size']}")


def _is_positive(x):
    """Whether x is a number above 0: no text, no nan, not infinite."""
    return isinstance(x, (int, float)) and 0 < x < math.inf


def _parse_windows(c, nope):
    """The teacher's own sliding windows: one entry a layer, None for full attention.

    Which layers slide is said by layer_types, or by a rule of the family: all (Mistral), those
    from max_window_layers on (Qwen), three of four (Olmo 3), those without RoPE (SmolLM3).
    """
    family, layers, window = c["model_type"], range(c["num_hidden_layers"]), c.get("sliding_window")
    kinds = c.get("layer_types")
    # Qwen's files name a width also where it is not in use; SmolLM3's do, unless they list kinds.
    switched = family in ("qwen2", "qwen3") or family == "smollm3" and not kinds
    if switched and not c.get("use_sliding_window"):
        window = None
    late = layers[c["max_window_layers"]:]
    sliding = {"mistral": layers, "ministral": layers, "qwen2": late, "qwen3": late,
               "olmo3": [i for i in layers if (i + 1) % 4], "smollm3": nope}.get(family, ())
    if kinds and family in ("ministral", "qwen2", "qwen3", "olmo3", "smollm3"):
        if len(kinds) != len(layers) or not set(kinds) <= {"sliding_attention", "full_attention"}:
            raise ValueError(f"layer_types must be {len(layers)} times sliding_attention or "
                             f"full_attention, not {kinds}")
        sliding = [i for i in layers if kinds[i] == "sliding_attention"]
    if sliding and window is not None and not (isinstance(window, int) and window >= 1):
        raise ValueError(f"sliding_window = {window!r} is no number of tokens")
    return tuple(window if i in sliding else None for i in layers)


def _parse_ropes(c, windows, nope):
    """RoPE settings -> each layer's Rope: of full attention, of a sliding window, or NOPE.

    They stand in rope_scaling beside rope_theta (old), in rope_parameters with theta inside (new),
    or there once for each kind of layer.
    """
    old, new = c.get("rope_scaling") or {}, c.get("rope_parameters") or {}
    if old and new and old != new:
        raise ValueError(f"rope_scaling {old} and rope_parameters {new} differ: keep one")
    r = old or new
    full = sliding = r
    if "full_attention" in r or "sliding_attention" in r:
        if c["model_type"] != "olmo3":
            raise ValueError("rope_parameters by kind of layer are Olmo 3's alone")
        full, sliding = r.get("full_attention") or {}, r.get("sliding_attention") or {}
    elif c["model_type"] == "olmo3":  # stretches its full-attention layers only
        sliding = {"rope_theta": r.get("rope_theta")}
    full, sliding = _parse_rope(full, c), _parse_rope(sliding, c)
    return tuple(NOPE if i in nope else full if window is None else sliding
                 for i, window in enumerate(windows))


def _parse_rope(r, c):
    """The RoPE settings of a kind of layer; the whole config c has what they leave out.

    The key was "type" before it was "rope_type".
    """
    kind = r.get("rope_type") or r.get("type") or "default"
    theta = r.get("rope_theta") or c.get("rope_theta") or 10000.0  # RoFormer's
    if not _is_positive(theta) or kind == "yarn" and theta == 1:  # YaRN divides by its logarithm
        raise ValueError(f"rope_theta = {theta!r} cannot be")
    if kind == "default":
        return Rope(theta)
    if (kind not in ("linear", "llama3", "yarn") or r.get("mscale") or r.get("mscale_all_dim")
            or r.get("truncate", True) is not True):
        raise ValueError(f"rope type {kind!r} with {sorted(r)} is not supported, only default, "
                         "linear, llama3, and yarn without mscale and truncate")
    return Rope(theta, kind, **_parse_stretch(kind, r, c))


def _parse_stretch(kind, r, c):
    """How a longer context than was trained on is reached, as arguments of `Rope`.

    By slower angles for all features (linear), for the slow ones only (llama3), by a ramp over
    features (yarn).
    """
    factor, key = r["factor"], "original_max_position_embeddings"
    reads = {"linear": (), "llama3": ("low_freq_factor", "high_freq_factor"),
             "yarn": ("beta_fast", "beta_slow", "attention_factor")}[kind]
    # llama3 has no defaults for its two: null is refused below, and what is missing by `from_hf`.
    given = {name: r[name] for name in reads if kind == "llama3" or r.get(name)}
    # As transformers reads it: from the top first, and without the key the stretched length.
    original = c.get(key) or r.get(key) or c["max_position_embeddings"]
    for name, x in {"factor": factor, key: original, **given}.items():
        if not _is_positive(x):
            raise ValueError(f"rope's {name} = {x!r} is not a positive number")
    if kind == "yarn" and factor > 1:  # YaRN's temperature, if the file does not give it
        given = {"attention_factor": 0.1 * math.log(factor) + 1.0, **given}
    return {"factor": float(factor), "original": original, **given}


def _as_tuple(value):
    """eos_token_id may be absent, null, one id or a list of ids."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


# Below: the small files that all commands share, read and written in one way. A fault in one of
# them should name the file and the line, and a run that is killed should leave none half written.


def naming(place, function, *args, **options):
    """What the function returns; an error of bad input becomes one that names the place."""
    try:
        return function(*args, **options)
    except (ValueError, OverflowError, RecursionError, re.error) as error:
        raise ValueError(f"{place}: {error}") from None


def sha256(*paths):
    """Hex digest of files' contents one after the other, read in pieces.

    A run's report names what it was made of by these: a path says little once a folder was moved.
    """
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            hashlib.file_digest(f, lambda: digest)  # goes on with this one
    return digest.hexdigest()


def read_json(path, missing=None):
    """A JSON file's object as a dict; `missing`, if given, where there is no such file.

    Raises FileNotFoundError, or ValueError, each with the remedy.
    """
    if missing is not None and not Path(path).exists():
        return missing
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds {str(value)[:40]!r}")
        return value
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: copy it from where the folder came") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError among them
        raise ValueError(f"{path} is no JSON object ({error}); copy the file again") from None


def _unwritten(path, error):
    """The OSError for a full disk or missing rights, with the remedy."""
    return OSError(f"{path} cannot be written ({error}): make room or make it writable; what was "
                   "saved before is whole, to go on from")


@contextlib.contextmanager
def replacing(path):
    """A new file, open to write, that takes the place of `path` if the block ends well.

    So readers see the old one or the new one, whole, after a kill and beside other processes that
    write it as well. Folders on the way are made. Raises OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(tmp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        raise _unwritten(path, error) from None
    finally:
        tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path):
    """A new folder, to fill, that becomes `path` if the block ends well.

    As `replacing`: whoever finds the folder finds it whole. `path` may exist, if it is empty. What
    a killed call has left is cleared away, known by its name: eight hex digits before ".tmp". So
    one call at a time for a path.
    """
    ours = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.tmp")
    for old in path.parent.glob("*.tmp"):
        if ours.fullmatch(old.name):
            shutil.rmtree(old, ignore_errors=True)
    tmp = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    tmp.mkdir(parents=True)
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)  # gone, if all went well


def write_json(path, value):
    """Write a small JSON file by `replacing`; value: anything json writes."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def append_json(path, value):
    """Add a line to a log, a .jsonl; OSError names it. (`drop_torn_line` cuts off half a line.)"""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
    except OSError as error:
        raise _unwritten(path, error) from None


def drop_torn_line(path):
    """Cut off a log's last line if it has no end, as a full disk leaves it. A new log is made."""
    path.touch()
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


class Place(NamedTuple):
    """A line of a file for messages, as file:line; its number is counted only if it is printed."""

    path: Path
    offset: int  # of a byte in the line

    def __str__(self):
        line, left = 1, self.offset
        with open(self.path, "rb") as file:
            while left and (piece := file.read(min(left, 1 << 20))):  # the file may be of any size
                line, left = line + piece.count(b"\n"), left - len(piece)
        return f"{self.path}:{line}"


def read_rows(path, start=0, stop=None):
    """Yield (place, row) for each JSON object of a .jsonl file, of lines that begin in start..stop.

    The one reader of rows for all commands. Lines end at a newline byte and nowhere else: JSON
    strings may hold U+2028 or U+0085, at which str.splitlines would cut. start, stop: in bytes, so
    that processes can share a file: ranges that meet yield every line once. Empty lines are passed
    over, and a byte-order mark before the first. Raises ValueError naming file:line, or OSError.
    """
    with open(path, "rb") as file:
        if start:  # a line that begins before `start` belongs to the range before
            file.seek(start - 1)
            file.readline()
        while (offset := file.tell()) < (math.inf if stop is None else stop) and (
                line := file.readline()):
            place = Place(path, offset)
            try:
                text = line.decode("utf-8" if offset else "utf-8-sig").strip()
                row = json.loads(text) if text else {}
                if not isinstance(row, dict):
                    raise ValueError(f"found {text[:40]!r}")
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError among them
                raise ValueError(f"{place}: not a JSON object in UTF-8 ({error})") from None
            if text:
                yield place, row


# ----------------------------------------------------------------------------------------------
# 2. Norm, rotary positions, softmax attention: the parts a teacher and its student share
# ----------------------------------------------------------------------------------------------
# What a head does takes three steps: project the block's input to q, k, v; rotate q and k by their
# positions, so that q.k depends on distance; mix values over time. A student keeps the first two to
# the bit and replaces the third. So the third has a method of its own, `Attention.mix`, and what it
# may read has a name, `Heads`.
#
# Rounding is part of a teacher: families multiply and round in different orders, and a bf16 model
# that rounds in another place is a slightly other model.
#
# Three things in this section are easily overlooked. Heads are grouped: K key/value heads serve H
# query heads, because a cache of keys and values is what decoding reads and so what it costs.
# Rows are packed: training fills a row of T tokens with several documents, and `document_ids` says
# which token is whose; a token never looks into another document. And a teacher may have windows of
# its own, some layers (Olmo 3, Mistral) or none (Llama): `layer_windows`.


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; statistics in fp32 (arXiv 1910.07467)."""

    def __init__(self, width, eps, round_last):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.round_last = eps, round_last

    def forward(self, x):
        """x (..., width) -> the same shape and dtype."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.round_last:  # Olmo: multiply in fp32, round once
            return (self.weight * normed).to(x.dtype)
        return self.weight.to(x.dtype) * normed.to(x.dtype)  # Llama, Qwen, Mistral: round first


# RoPE turns each pair of features (x1, x2) of q and k by an angle: position times the pair's own
# frequency. Turning both by the same angle changes no dot product, so q_t.k_s depends on t - s
# only. Fast pairs tell neighbours apart, slow ones far places. A teacher that was stretched to a
# longer context has slower angles than it was first trained with; `kind` says for which pairs.


def rope_frequencies(rope, head_dim):
    """Angle per position of each pair of features, (D / 2,) fp32, stretched as `rope` says."""
    k = torch.arange(0, head_dim, 2, dtype=torch.float32)
    f = 1.0 / rope.theta ** (k / head_dim)
    if rope.kind == "linear":
        return f / rope.factor
    if rope.kind == "llama3":  # low frequencies are slowed, high ones kept, a ramp between
        wavelength = 2 * math.pi / f
        keep = (rope.original / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor)
        keep = keep.clamp(0, 1)
        return (1 - keep) * f / rope.factor + keep * f
    if rope.kind == "yarn":  # the same idea, with the ramp over feature index (arXiv 2309.00071)
        def index(rotations):
            return head_dim * math.log(rope.original / (rotations * 2 * math.pi)) / (
                2 * math.log(rope.theta))
        low = max(math.floor(index(rope.beta_fast)), 0)
        high = min(math.ceil(index(rope.beta_slow)), head_dim - 1)
        slow = ((k / 2 - low) / max(high - low, 0.001)).clamp(0, 1)
        return f / rope.factor * slow + f * (1 - slow)
    return f


def rope_tables(rope, positions, head_dim):
    """cos and +-sin of every position's angles: positions (B, T) -> two (B, 1, T, D) fp32.

    Feature j and feature j + D / 2 are a pair (Hugging Face's order; the RoFormer paper pairs
    neighbours). sin is negative in the first half, so that `rotate` needs one roll and no sign.
    """
    f = rope_frequencies(rope, head_dim).to(positions.device)
    angle = positions[:, None, :, None].float() * torch.cat((-f, f))
    return angle.cos() * rope.attention_factor, angle.sin() * rope.attention_factor


def rotate(x, tables):
    """Rotate x (B, H, T, D) by its positions: (x1, x2) cos + (-x2, x1) sin."""
    cos, sin = tables  # sin is negative in its first half (`rope_tables`); `roll` swaps x1 and x2
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


def document_starts(document_ids):
    """Index of the first token of each token's document: (B, T) ids -> (B, T) int64.

    A document is a run of equal ids, so ids may be reused by documents that do not touch.
    """
    B, T = document_ids.shape
    index = torch.arange(T, device=document_ids.device).expand(B, T)
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(first, index, 0).cummax(dim=1).values


def _grouped_attention(q, k, v, visible):
    """Softmax attention of q (B, H, L, D) on fewer heads k, v (B, K, N, D), as `visible` says.

    The H / K query heads that share a key/value head are laid along the query axis, so k and v are
    read once and never copied. visible: bool (B or 1, L, N), or None for all.
    """
    B, H, L, D = q.shape
    K = k.shape[1]
    q = q.reshape(B, K, H // K * L, D)
    if visible is not None:  # the G = H / K heads of a group see the same: (B or 1, 1, G L, N)
        visible = visible.repeat(1, H // K, 1)[:, None]
    h = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return h.reshape(B, H, L, -1)


def softmax_attention(q, k, v, *, window=None, document_ids=None):
    """The teacher's attention: causal, optionally over a window, never across documents.

    q (B, H, T, D); k, v (B, K, N, D) with N >= T: queries are the last T of N positions (N > T
    when a cache holds the first). window: keys visible, itself included; None for all.
    document_ids (B, N) or None. Returns (B, H, T, D). Scale 1/sqrt(D).

    The plain case needs no mask, and torch has a kernel for it that never forms (T, T) weights. The
    others do need one, and with it torch may form them, so queries go in blocks: each sees the keys
    from its first query's window on up to its own last, under a mask of that size.
    """
    T, N = q.shape[2], k.shape[2]
    if T == N and document_ids is None and (window is None or window >= N):
        # `is_causal` wants as many queries as keys, so a group's heads cannot be laid along the
        # query axis as above, and k and v are copied for each.
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    starts = None if document_ids is None else document_starts(document_ids)
    outputs = []
    # Blocks of queries: memory O(L N), not O(T N). The first `old` positions have no query.
    L, old = min(512, max(128, N // 16)), N - T
    for a in range(old, N, L):
        b, low = min(a + L, N), 0 if window is None else max(0, a - window + 1)
        t = torch.arange(a, b, device=q.device)[:, None]
        s = torch.arange(low, b, device=q.device)
        visible = (s <= t)[None]
        if window is not None:
            visible = visible & (s > t - window)
        if starts is not None:
            visible = visible & (s >= starts[:, a:b, None])
        if T == 1 and starts is None:  # a step with a cache: it sees all from `low` on, no mask
            visible = None
        outputs.append(_grouped_attention(q[:, :, a - old:b - old], k[:, :, low:b],
                                          v[:, :, low:b], visible))
    return torch.cat(outputs, dim=2)


class Heads(NamedTuple):
    """What a mixer may read of one layer. The teacher's needs the last three only."""

    x: torch.Tensor  # (B, T, hidden), what `Block.attention_input` gives: for gates
    raw: tuple  # projections of x before norm and rotation, q (B, T, H D), k and v (B, T, K D)
    q_plain: torch.Tensor  # (B, H, T, D) and
    k_plain: torch.Tensor  # (B, K, T, D), normed and not rotated: content without position
    q: torch.Tensor  # the same two, rotated
    k: torch.Tensor
    v: torch.Tensor  # (B, K, T, D)


class Attention(nn.Module):
    """The teacher's attention block: project, normalise and rotate, mix over time, project back.

    A student's mixers override `mix`, add parameters that it needs, and change nothing else: what
    is projected, normalised and rotated here is the same to the bit in teacher and student.
    Parameter names are Hugging Face's.
    """

    def __init__(self, config, layer):
        super().__init__()
        c = config
        self.config, self.window = c, c.layer_windows[layer]
        q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q_width, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv_width, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv_width, bias=c.qkv_bias)
        self.o_proj = nn.Linear(q_width, c.hidden_size, bias=c.o_bias)
        if c.qk_norm:
            per_head = c.qk_norm == "head"
            self.q_norm = RMSNorm(c.head_dim if per_head else q_width, c.norm_eps, c.is_olmo)
            self.k_norm = RMSNorm(c.head_dim if per_head else kv_width, c.norm_eps, c.is_olmo)

    def heads(self, x, tables):
        """x (B, T, hidden) and RoPE tables -> `Heads`.  Eq. 1"""
        D, norm = self.config.head_dim, self.config.qk_norm
        raw = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = raw
        if norm == "projection":  # Olmo: over the whole width, before the heads are split
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.unflatten(-1, (-1, D)).transpose(1, 2) for y in (q, k, v))
        if norm == "head":  # Qwen3
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.attention_multiplier:
            # Granite: scores are q.k times this. All here divide by sqrt(D), so that is undone.
            q = q * (self.config.attention_multiplier * math.sqrt(D))
        return Heads(x, raw, q, k, rotate(q, tables), rotate(k, tables), v)

    def mix(self, heads, *, document_ids=None, cache=None):
        """How heads look back: `Heads` -> h (B, H, T, D). cache: this layer's, or None."""
        q, k, v = heads.q, heads.k, heads.v
        if cache is not None:
            return cache.attention(q, k, v, window=self.window)
        return softmax_attention(q, k, v, window=self.window, document_ids=document_ids)

    def forward(self, x, tables, *, document_ids=None, cache=None):
        """x (B, T, hidden), of `Block.attention_input`, and its RoPE tables -> (B, T, hidden)."""
        h = self.mix(self.heads(x, tables), document_ids=document_ids, cache=cache)
        return self.o_proj(h.transpose(1, 2).flatten(2))

    def new_cache(self, batch, max_length, like):
        """What this layer remembers of `batch` texts, in the dtype and on the device of `like`."""
        return KVCache(batch, self.config, max_length, like)


# ----------------------------------------------------------------------------------------------
# 3. The mLSTM: definition, then the chunkwise form that trains, then one step
# ----------------------------------------------------------------------------------------------
# Softmax attention gives query t the mean of all values v_s, weighted by exp(q_t . k_s). The
# exponential ties each query to each key, so all keys must be kept. Now let the weight be a plain
# product of features, phi(q_t) . phi(k_s). Then the query can be taken out of the sum:
#
#     sum_s (phi(q_t) . phi(k_s)) v_s  =  phi(q_t) S_t        S_t = sum_s phi(k_s) (x) v_s
#
# All that was read is now in one matrix S, F x E numbers a head whatever T is, and in z, the sum of
# phi(k_s), which gives the sum of weights to divide by: phi(q_t) . z_t. A new token adds its own
# outer product. That is linear attention. Its weakness is that S only ever grows: F features hold
# about F different keys apart, and after thousands of tokens everything is a blur. So the mLSTM
# adds two gates, scalars per head and token: f fades what S held, i says how strongly a token is
# written. The weight of token s for query t becomes
#
#     (phi(q_t) . phi(k_s)) * i_s * f_{s+1} ... f_t         normalised to sum 1
#
# phi makes positive features (section 5), so the sum that normalises is positive and the plain
# ratio is safe. What follows is one function in three forms: `mlstm_recurrent` defines it,
# `mlstm_chunkwise` trains with it, `mlstm_step` generates with it.
#
# One numerical idea carries all three forms. The input gate is an exponential, so S and z would
# overflow: they are kept divided by e^m, where m is the largest exponent so far. The factor is the
# same above and below the fraction and cancels: an input gate of e^90, which fp32 cannot hold, is
# harmless, and what it drowns was worth nothing beside it. Nothing is added to the denominator, it
# is clamped only against 0 / 0, and there is no 1/sqrt(D). (xLSTM's max(|q z|, e^-m) belongs to the
# version with a norm layer behind it.) Everything here runs in fp32, the chunkwise form's gates in
# fp64: bf16 gates alone would cost up to 1 % of the output.

EMPTY = -1e30  # log of nothing: m of an empty state. Finite, because -inf - -inf is NaN
FORGET = -1e4  # log of a forget gate that forgets all: e^-1e4 is exactly 0, and sums stay exact


def empty_state(batch, heads, width, E, device):
    """The mLSTM's state before the first token, fp32: S (B, H, F, E), z (B, H, F), m (B, H)."""
    return (torch.zeros(batch, heads, width, E, device=device),
            torch.zeros(batch, heads, width, device=device),
            torch.full((batch, heads), EMPTY, device=device))


def mlstm_recurrent(q, k, v, log_i, log_f, *, state=None):
    """The definition (Eq. 8-10), one token at a time.

    q (B, H, T, F), k (B, K, T, F): feature-mapped, non-negative. v (B, K, T, E).
    log_i, log_f (B, H, T) fp32: log input gate, log forget gate (at most 0). So each query head has
    a state of its own, also where a group shares its keys and values.
    state: (S, z, m) of the tokens before, fp32 (`empty_state` when None).
    Returns h (B, H, T, E) in v's dtype and the state after the last token. In float64 inputs the
    whole computation is float64: that is the tests' reference.
    """
    (B, H, T, width), dtype = q.shape, v.dtype
    S, z, m = state or empty_state(B, H, width, v.shape[-1], q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide).repeat_interleave(H // x.shape[1], dim=1) for x in (q, k, v))
    log_i, log_f = log_i.to(wide), log_f.to(wide)
    h = []
    for t in range(T):
        q_t, k_t, v_t, li, lf = (x[:, :, t] for x in (q, k, v, log_i, log_f))
        # The state's exponent is m + lf once it has faded, the new token's is li. The larger one is
        # the new m; keep and write are e^(exponent - new m), so the larger of them is 1.
        m_new = torch.maximum(m + lf, li)
        keep, write = (m + lf - m_new).exp()[..., None], (li - m_new).exp()[..., None]
        S = keep[..., None] * S + (write * k_t)[..., None] * v_t[..., None, :]  # Eq. 8
        z = keep * z + write * k_t                                              # Eq. 9
        m = m_new
        den = (q_t * z).sum(-1, keepdim=True).clamp_min(1e-30)  # only against 0 / 0
        h.append((q_t[..., None, :] @ S).squeeze(-2) / den)                     # Eq. 10
    return torch.stack(h, dim=2).to(dtype), (S, z, m)


def mlstm_step(q, k, v, log_i, log_f, state):
    """The same for the one token (T = 1) of a decoding step. Returns h (B, H, 1, E) in v's dtype.

    state is updated in place, so that its memory never moves: no gradients. Reading and writing S
    is nearly all that a step costs, so S passes through memory as seldom as plain operations
    allow; the definition's line would write three more tensors of its size.
    """
    (S, z, m), dtype = state, v.dtype
    q, k, v, li, lf = (x.squeeze(2).to(S.dtype) for x in (q, k, v, log_i, log_f))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    m_new = torch.maximum(m + lf, li)
    keep, write = (m + lf - m_new).exp()[..., None], (li - m_new).exp()[..., None]
    m.copy_(m_new)
    k = write * k
    S.mul_(keep[..., None]).addcmul_(k[..., None], v[..., None, :])
    z.mul_(keep).add_(k)
    den = (q * z).sum(-1, keepdim=True).clamp_min(1e-30)
    return ((q[:, :, None] @ S) / den[..., None]).to(dtype)


# The definition does little work a token, in T serial steps: far too many to train with. Now let a
# chunk of L tokens be one step. What a query gets from tokens of its own chunk is an attention with
# a small (L, L) matrix of weights; what it gets from all before comes from the state at the
# chunk's start. Both are matrix products. Let b_t be the sum of log_f from the chunk's start up to
# and including t. At time t, token s has the log-weight b_t + c_s, where c_s = log_i_s - b_s, and
# what the state holds has b_t + m. So b_t stands in every term of row t and cancels in the ratio.
# Row t is divided by e^(r_t) besides, with r_t chosen so that its largest exponent is 0:
#
#     W_ts = e^(c_s - r_t) for s <= t      carry_t = e^(m - r_t)       r_t = max(m, c_1 .. c_t)
#     h_t = (sum_s W_ts (q_t.k_s) v_s + carry_t q_t S) / (the same with 1 for v_s, z for S)
#     keep = e^(m + b_L - m')    write_s = e^(c_s + b_L - m')          m' = b_L + max(m, c_1 .. c_L)
#     S' = keep S + sum_s write_s k_s (x) v_s
#
# As a table, for L = 3, of what each query weighs; the left column stands for all of the past:
#
#              S, z       k_1, v_1        k_2, v_2        k_3, v_3
#     q_1      carry_1    W_11 q_1.k_1    -               -
#     q_2      carry_2    W_21 q_2.k_1    W_22 q_2.k_2    -
#     q_3      carry_3    W_31 q_3.k_1    W_32 q_3.k_2    W_33 q_3.k_3
#
# A token costs about L (F + E) products inside its chunk, and F E each to read and to write S.
# Small chunks save the first and large ones serial steps; near L = 64 neither weighs much.
#
# No exponent is above 0. Gates are one number a head and token, where keys are F, so they are
# worked out for all chunks at once, and in float64: b reaches thousands where forget gates are
# nearly closed, while differences of it matter to 1e-6.


def _chunk_gates(log_i, log_f, m, document_ids, L):
    """Gates (B, H, T) and the first m -> c, r (B, H, N, L), m (B, H, N + 1), total (B, H, N).

    float64. m: the stabiliser before every chunk, and last the one after all. total: b_L.
    """
    log_f = log_f.double()
    if document_ids is not None:  # a document's first token forgets the document before
        first = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))
        log_f = log_f.masked_fill(first[:, None], FORGET)
    pad = -log_i.shape[-1] % L  # padding writes nothing and forgets nothing
    b = F.pad(log_f.clamp_min(FORGET), (0, pad)).unflatten(2, (-1, L)).cumsum(-1)
    c = F.pad(log_i.double().clamp_min(EMPTY), (0, pad), value=EMPTY).unflatten(2, (-1, L)) - b
    total = b[..., -1]
    # m' = total + max(m, max c). For x = m - (the totals of all chunks before) that is
    # x' = max(x, max c - before): a running maximum, and no loop. m is rounded to the dtype that
    # will store it before anything is computed with it: S and z are divided by just this e^m.
    before = F.pad(total.cumsum(-1), (1, 0))  # (B, H, N + 1)
    x = torch.cat((m[..., None].double(), c.amax(-1) - before[..., :-1]), dim=-1)
    m = (x.cummax(-1).values + before).to(m.dtype).double()
    r = torch.maximum(m[..., :-1, None], c.cummax(-1).values)
    # r cancels in h, so any gradient of it is right. It is given that of c_t: W_tt = e^(c_t - r_t)
    # then has one of exactly 0, without an error of rounding in which the forget gates' small
    # gradients would drown.
    return c, r.detach() + (c - c.detach()), m, total


def mlstm_chunkwise(q, k, v, log_i, log_f, *, state=None, document_ids=None, chunk_size=64):
    """The same function as `mlstm_recurrent`, a chunk of `chunk_size` tokens at a time.

    Shapes as there. document_ids (B, T): the state restarts where they change; a given `state`
    belongs to the first document, the returned one to the last. (Exactly, unless input gates of
    neighbouring documents differ by more than e^9900.) Any T; differentiable in all inputs.

    The loop goes over chunks, not over all of them in one batch: memory is what costs, and a batch
    was 2 to 4 times slower (13 with the backward). `split` and `unbind`, not slices: the gradient
    of a slice fills a tensor of the whole length, for every chunk (5 times slower at 4096 tokens).
    """
    B, H, _, width = q.shape
    K, E, dtype = v.shape[1], v.shape[3], v.dtype
    wide, L = torch.promote_types(q.dtype, torch.float32), chunk_size
    with torch.autocast(q.device.type, enabled=False):
        S, z, m = state or empty_state(B, H, width, E, q.device)
        S = torch.cat((S, z[..., None]), dim=-1).flatten(0, 1).to(wide)  # (B H, F, E + 1), z last
        c, r, m, total = _chunk_gates(log_i, log_f, m.to(wide), document_ids, L)
        carry = (m[..., :-1, None] - r).exp()
        write = (c + (total - m[..., 1:])[..., None]).exp()
        keep = (m[..., :-1] + total - m[..., 1:]).exp()[..., None, None]
        carry, write, keep = (x.to(wide) for x in (carry, write, keep))
        # Each: N of (B H, L); keep: of (B H, 1, 1). c and r stay fp64 until they are subtracted.
        gates = [x.flatten(0, 1).unbind(1) for x in (c, r, carry, write, keep)]
        v = F.pad(v, (0, 1), value=1.0)  # z is the state of a value that is always 1
        q, k, v = (x.flatten(0, 1).split(L, dim=1) for x in (q, k, v))  # each: N of (B heads, L, .)
        future = torch.ones(L, L, dtype=torch.bool, device=c.device).triu(1)
        h = []
        for q_n, k_n, v_n, c_n, r_n, carry_n, write_n, keep_n in zip(q, k, v, *gates):
            l = q_n.shape[1]  # L, or what is left
            q_n = q_n.to(wide)  # (B H, l, F); k_n alike, v_n (B H, l, E + 1)
            k_n, v_n = (x.to(wide).repeat_interleave(H // K, dim=0) for x in (k_n, v_n))
            # Mask before the exponential: behind it the future overflows, and its gradient is NaN.
            log_W = (c_n[:, None, :l] - r_n[:, :l, None]).to(wide)
            W = log_W.masked_fill(future[:l, :l], -torch.inf).exp()  # (B H, l, l)
            P = W * (q_n @ k_n.transpose(1, 2))
            h.append(torch.baddbmm(carry_n[:, :l, None] * (q_n @ S), P, v_n))
            S = torch.baddbmm(keep_n * S, (write_n[:, :l, None] * k_n).transpose(1, 2), v_n)
        h, S = torch.cat(h, dim=1).unflatten(0, (B, H)), S.unflatten(0, (B, H))
        h = h[..., :E] / h[..., E:].clamp_min(1e-30)  # only against 0 / 0
    return h.to(dtype), (S[..., :E], S[..., E], m[..., -1].to(wide))


# ----------------------------------------------------------------------------------------------
# 4. Sliding window with sinks
# ----------------------------------------------------------------------------------------------
# The other reader is the teacher's own attention, exact but short-sighted: most of what a token
# needs stands within a few hundred tokens. Sinks are the first tokens of a document. Softmax must
# put its weight somewhere, and a teacher has learnt to leave on them what it needs nowhere else
# (StreamingLLM, arXiv 2309.17453). A window past them would spread that weight over words. What
# tokens 3 to 7 see with W = 3 and two sinks:
#
#     t     0 1 2 3 4 5 6 7
#     3     x x x x                  its window, 1 to 3, and sink 0
#     4     x x x x x
#     5     x x . x x x              the first token that is lost: 2
#     6     x x . . x x x
#     7     x x . . . x x x          never more than W + sinks, so the cache is a ring of W slots
#
# It costs T (W + sinks) products instead of T^2, if nothing is computed where the table has dots.
# That is all the function below is about: the rule itself is the two lines `see_sink`, `see_band`.


def window_attention(q, k, v, *, window, sinks, document_ids=None):
    """Softmax attention over the last `window` tokens and the document's first `sinks` (Eq. 3, 4).

    q (B, H, T, D), k and v (B, K, T, D), q and k rotated; document_ids (B, T) or None. The current
    token counts as one of the window; a sink inside the window counts once. Returns (B, H, T, D).

    A mask over all keys would be (T, T). So queries go in blocks of L, and each block gets its own
    keys: the band of L + W tokens that ends with it, and in front of them the sinks of the document
    that its first query belongs to. (Documents that begin later have theirs inside the band.)
    """
    # A window longer than the text is the text.
    (B, _, T, D), K, W = q.shape, k.shape[1], min(window, q.shape[2])
    L = max(32, min(W, 256))  # wide blocks waste products, small ones copy keys more often
    N = -(-T // L)  # blocks
    pad = N * L - T
    starts = q.new_zeros(1, T, dtype=torch.long) if document_ids is None else (
        document_starts(document_ids))
    t = torch.arange(N * L, device=q.device).view(N, L, 1)
    s = t[:, :1] - W + torch.arange(W + L, device=q.device)  # (N, 1, W + L): the band
    # value=T: padded rows are a document that sees itself; a row that sees no key would be NaN.
    start = F.pad(starts, (0, pad), value=T).view(-1, N, L, 1)  # (B or 1, N, L, 1)
    sink = start[:, :, :1] + torch.arange(sinks, device=q.device)  # (B or 1, N, 1, sinks)
    see_sink = (sink >= start) & (sink < s[..., :1])  # unless it is in the band already
    see_band = (s <= t) & (s >= start) & ((s > t - W) | (s < start + sinks))
    visible = torch.cat((see_sink, see_band), dim=-1)  # (B or 1, N, L, sinks + W + L)
    at = sink.clamp(max=T - 1).view(len(sink), 1, N * sinks, 1).expand(B, K, -1, D)

    def blocks(x):
        """x (B, K, T, D) -> the keys or values of every block: (B N, K, sinks + W + L, D)."""
        band = F.pad(x, (0, 0, W, pad)).unfold(2, W + L, L).transpose(-1, -2)
        x = torch.cat((x.gather(2, at).unflatten(2, (N, sinks)), band), dim=3)
        return x.transpose(1, 2).flatten(0, 1)

    q = F.pad(q, (0, 0, 0, pad)).unflatten(2, (N, L)).transpose(1, 2).flatten(0, 1)
    visible = visible.expand(B, -1, -1, -1).flatten(0, 1)
    h = _grouped_attention(q, blocks(k), blocks(v), visible)  # (B N, H, L, D)
    return h.unflatten(0, (B, N)).transpose(1, 2).flatten(2, 3)[:, :, :T]


# ----------------------------------------------------------------------------------------------
# 5. The hybrid mixer, built up as the paper's ablation (Fig. 15) takes it apart
# ----------------------------------------------------------------------------------------------
# The teacher's attention is cut open between its rotation and its output projection, and three
# small things are put in: phi, the gates i and f, the gate o. All else in the picture is copied.
#
#     x --+-- q, k, v --+-- rotated -----------------> window + sinks -- swa ----+
#         |             |                                                        |
#         |             +-- rotated and not -- phi --> mLSTM --------- mlstm ----+-- o mlstm
#         |             |                                |                       |   + (1 - o) swa
#         |             +-- [q; k; v] -- o --------------|-----------------------+        |
#         +-- i, f --------------------------------------+                             o_proj
#
# Why two readers: the window is exact where most of the weight lies, and the mLSTM need only carry
# what has left it. Why a gate and no sum: both outputs are means of values, and a mixture of two
# means is a third, of the size that o_proj was trained on. Sinks, window and mLSTM read the same v.
#
# The classes below build this up, an idea each: windows alone, a recurrence without gates, the
# mLSTM's gates, and the two readers mixed. The order of quality is linear < mlstm < hybrid; windows
# alone read well and remember nothing.
#
# New parameters per layer, beside all that is copied: two feature maps, an input and a forget gate
# that read the block's input, and an output gate that reads the head's own q, k, v. They are all
# that stage I trains: 1 % of an 8B student. Each starts where the student is nearly its teacher's
# window, since a student that starts far away first unlearns what was copied (`initialise_mixer`).


class FeatureMap(nn.Module):
    """phi(x) = softmax(x W) over the FEATURES, one W per head (Hedgehog, arXiv 2402.04347).

    Positive, so that a sum of weights can be divided by, and spiky, so that a query can single a
    key out as softmax attention does; 1 + elu, the usual choice, is flat and reads a blur.

    Paper: D features of the rotated x. Here F = `features` * D, and from 2 on the first half reads
    the rotated x and the second half the unrotated one, because memory is a matter of width: S
    holds about as many distinct keys as they have features, and keys that carry their position
    only cannot be looked up by content. What each is worth: README, "The student's memory".
    """

    def __init__(self, heads, D, features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, D, features * D))

    def forward(self, x, plain, kernels="torch"):
        """Rotated x and unrotated `plain` (B, heads, T, D) -> (B, heads, T, F) fp32, sum 1.

        From the Triton kernel in x's dtype.
        """
        D, width = self.weight.shape[1:]
        if kernels == "triton":
            return _kernels().feature_map(x, self.weight, plain=None if width == D else plain)
        W = self.weight.to(x.dtype)
        logits = x @ W if width == D else torch.cat(
            (x @ W[..., :width // 2], plain @ W[..., width // 2:]), dim=-1)
        return logits.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))


class OutputGate(nn.Module):
    """Logit of o_t per head from that head's [q; k; v], before norm and rotation (Eq. 11).

    Its own projections tell a head what it looks for and what stands here, so 3 D numbers a head
    are enough. Paper: q, k, v before rotation. Here: before Qwen's and Olmo's norm of q and k as
    well, so that the logit stays linear in x: one more linear map of the input.
    """

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_heads, 3, config.head_dim))
        self.bias = nn.Parameter(torch.empty(config.num_heads))

    def forward(self, raw):
        """raw: projections q (B, T, H D), k and v (B, T, K D) -> logits (B, H, T) fp32."""
        (H, _, D), logits, device = self.weight.shape, self.bias.float(), self.bias.device
        with torch.autocast(device.type, enabled=False):
            for flat, w in zip(raw, self.weight.float().unbind(1)):
                heads = flat.shape[-1] // D  # H or K: a group's heads share k and v
                own = torch.eye(heads, device=device).repeat_interleave(H // heads, dim=0)
                w = (own[..., None] * w[:, None]).flatten(1)  # (H, heads D), 0 for other heads
                logits = logits + F.linear(flat.float(), w)  # one large product beats H small ones
        return logits.transpose(1, 2)


class Gate(nn.Linear):
    """A linear map of x with one output per head, computed in fp32 whatever the weights' dtype.

    A forget gate of 0.999 has a preactivation of 7, which bf16 would round by up to 0.016: the head
    would forget 1.6 % faster or slower, and what is multiplied thousands of times shows that.

    Paper: exp(x w_i), sigmoid(x w_f). Here: and a bias, since it says where a head starts
    (`initialise_mixer`); the output gate likewise.
    """

    def forward(self, x):
        """x (B, T, hidden) -> (B, H, T) fp32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float()).transpose(1, 2)


class StudentAttention(Attention):
    """What a student's mixers share: who computes, and how much memory they ask of a cache.

    A mixer has a `window_branch`, a `recurrent_branch` or both; `mix` says what becomes of them.
    In training documents are told apart by ids; in generation a cache holds one document a row.
    """

    kernels = "torch"  # what computes sequences: see `choose_kernels`. Steps are always torch
    short_window = sinks = 0  # tokens that the window branch remembers: a mixer without one, none
    state_heads = 0  # heads with an mLSTM state: a mixer without one, none

    def new_cache(self, batch, max_length, like):
        """As `Attention.new_cache`; max_length does not matter."""
        return HybridCache(batch, self, like)


class WindowAttention(StudentAttention):
    """"swa", the control: window and sinks alone. No new parameters."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        hybrid, own = config.hybrid, self.window
        # `window` is the teacher's, `short_window` the student's.
        # A teacher layer that never looked further than W is kept as it was, without sinks; one
        # with a longer window of its own (Olmo 3's sliding layers: 4096) is shortened as others.
        exact = own is not None and own <= hybrid.window
        self.short_window, self.sinks = (own, 0) if exact else (hybrid.window, hybrid.sinks)

    def window_branch(self, heads, document_ids, cache):
        """`Heads` -> (B, H, T, D): exact softmax over the window and the sinks."""
        q, k, v = heads.q, heads.k, heads.v
        attend = _kernels().window_attention if self.kernels == "triton" else window_attention
        if cache is not None:
            return cache.window_attention(q, k, v, attend)
        return attend(q, k, v, window=self.short_window, sinks=self.sinks,
                      document_ids=document_ids)

    def mix(self, heads, *, document_ids=None, cache=None):
        """The window and nothing else."""
        return self.window_branch(heads, document_ids, cache)


class LinearAttention(StudentAttention):
    """"linear": the recurrence with feature maps and no gates, S_t = S_{t-1} + phi(k) (x) v."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        c, features = config, config.hybrid.features
        self.state_heads = c.num_heads
        self.feature_map_q = FeatureMap(c.num_heads, c.head_dim, features)
        self.feature_map_k = FeatureMap(c.num_kv_heads, c.head_dim, features)

    def log_gates(self, x):
        """x (B, T, hidden) -> log input gate, log forget gate, each (B, H, T) fp32."""
        zeros = x.new_zeros(x.shape[0], self.config.num_heads, x.shape[1], dtype=torch.float32)
        return zeros, zeros  # both gates are 1

    def recurrent_branch(self, heads, document_ids, cache):
        """`Heads` -> (B, H, T, D): what the state gives. A fork with another state starts here."""
        x, _, q_plain, k_plain, q, k, v = heads
        step = cache is not None and q.shape[2] == 1
        kernels = "torch" if step else self.kernels
        args = (self.feature_map_q(q, q_plain, kernels), self.feature_map_k(k, k_plain, kernels),
                v, *self.log_gates(x))
        if step:
            return mlstm_step(*args, cache.state)
        form = _kernels().mlstm if kernels == "triton" else mlstm_chunkwise
        if cache is None:
            return form(*args, document_ids=document_ids)[0]
        h, state = form(*args, state=cache.state)
        for old, new in zip(cache.state, state):
            old.copy_(new)
        return h

    def mix(self, heads, *, document_ids=None, cache=None):
        """The state and nothing else."""
        return self.recurrent_branch(heads, document_ids, cache)


class MLSTMAttention(LinearAttention):
    """"mlstm": the same with the mLSTM's input and forget gates."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.input_gate = Gate(config.hidden_size, config.num_heads)
        self.forget_gate = Gate(config.hidden_size, config.num_heads)

    def log_gates(self, x):
        """An exponential input gate, a sigmoid forget gate. Both may differ by head and token."""
        return self.input_gate(x), F.logsigmoid(self.forget_gate(x))  # i = exp, f = sigmoid


class HybridAttention(MLSTMAttention, WindowAttention):
    """"hybrid": mLSTM and window + sinks, mixed per token and head. The paper's mixer.

    With `sinks=0` it is the ablation "mlstm+swa".
    """

    def __init__(self, config, layer):
        # `super` walks Hybrid, MLSTM, Linear, Window, StudentAttention: the super() of
        # LinearAttention is here WindowAttention, so each __init__ runs once and adds its part.
        super().__init__(config, layer)
        self.output_gate = OutputGate(config)

    def mix(self, heads, *, document_ids=None, cache=None):
        """`Heads` -> (B, H, T, D). The two branches know nothing of each other."""
        o = torch.sigmoid(self.output_gate(heads.raw))  # (B, H, T)
        mlstm = self.recurrent_branch(heads, document_ids, cache)
        swa = self.window_branch(heads, document_ids, cache)
        return torch.lerp(swa, mlstm, o[..., None].to(swa.dtype))  # Eq. 11: o mlstm + (1 - o) swa


MIXERS = {"hybrid": HybridAttention, "mlstm+swa": HybridAttention, "mlstm": MLSTMAttention,
          "linear": LinearAttention, "swa": WindowAttention}

# The names of what a student adds to the teacher's modules:
NEW = {"feature_map_q", "feature_map_k", "input_gate", "forget_gate", "output_gate"}


def is_new(name):
    """Whether a parameter or module was added by the student (and is no copy of the teacher's)."""
    return not NEW.isdisjoint(name.split("."))


@torch.no_grad()
def initialise_mixer(attention):
    """Start values of the new parameters: the student begins near window-only attention.

    Stage I then need only find what the window lacks. Feature maps start as copies of q and k (from
    4 D on with their negatives, since a softmax sees large values only; at 8 D also the same turned
    at random), so that near means similar from the first step; input gates write all tokens alike;
    forget gates start nearly open, because a head that forgets at once learns nothing of the
    distant past, and differ by head, because one span does not suit all. Our choice, by measurement
    on the shipped teacher.
    """
    for name, p in attention.named_parameters():
        if "feature_map" in name:
            D, features = p.shape[1], p.shape[2] // p.shape[1]
            random = torch.randn(D, D, generator=torch.Generator().manual_seed(0))
            turn = torch.linalg.qr(random).Q
            # Blocks of D columns. 1 D: one. 2, 4, 8 D: two equal halves of one, two, four.
            half = [torch.eye(D), -torch.eye(D), turn, -turn][:max(1, features // 2)]
            p.copy_(torch.cat(half * min(features, 2), dim=-1).expand_as(p))
        elif is_new(name):
            p.zero_()
    if hasattr(attention, "forget_gate"):  # heads forget half after 256 ... 4096 tokens
        keep = 0.5 ** (1 / torch.logspace(8, 12, attention.config.num_heads, base=2))
        attention.forget_gate.bias.copy_(torch.logit(keep))
    if hasattr(attention, "output_gate"):
        attention.output_gate.bias.fill_(-2.0)  # o = 0.12: mostly window


# ----------------------------------------------------------------------------------------------
# 6. The Transformer that holds either mixer
# ----------------------------------------------------------------------------------------------
# One class for teacher and student: `config.hybrid` says which mixer its blocks have, and what both
# have bears the same names. So a student is made by handing the teacher's tensors over, one loader
# reads both, and every difference between the two models is in section 5.
#
# Training needs a little more than logits of tokens, and asks for it by name: `embed`, `positions`,
# `rope_tables` and a block's `attention_input` and `after_attention` are the steps of the forward
# pass, so that stage I can walk the layers itself, with the teacher's mixer and the student's side
# by side on one input; `forward(head=...)` lets a loss see the hidden states and the matrix that
# would make logits of them: 128k words x 4096 tokens in fp32 are 2 GB, and a loss needs a slice.


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x):
        """x (B, T, hidden) -> (B, T, hidden)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x += attention(norm(x)), x += mlp(norm(x)): in steps, so that stage I can walk them.

    Families differ in where the norms stand, under like names: Llama, Qwen and Mistral normalise
    what a branch reads (input_layernorm, post_attention_layernorm), Olmo what it writes
    (post_attention_layernorm, post_feedforward_layernorm).
    """

    def __init__(self, config, layer):
        super().__init__()
        self.is_olmo, self.scale = config.is_olmo, config.residual_multiplier
        mixer = MIXERS[config.hybrid.mixer] if config.hybrid else Attention
        self.self_attn, self.mlp = mixer(config, layer), MLP(config)
        names = ("post_attention_layernorm", "post_feedforward_layernorm") if self.is_olmo else (
            "input_layernorm", "post_attention_layernorm")
        for name in names:
            self.add_module(name, RMSNorm(config.hidden_size, config.norm_eps, config.is_olmo))
        self.recompute = False  # in training: keep only the block's input, run it twice

    def attention_input(self, x):
        """Residual stream x (B, T, hidden) -> what the mixer reads."""
        return x if self.is_olmo else self.input_layernorm(x)

    def after_attention(self, x, y):
        """Residual stream x and attention output y -> the residual stream after this block.

        `scale` is 1 in all families but Granite.
        """
        if self.is_olmo:
            x = x + self.post_attention_layernorm(y)
            return x + self.post_feedforward_layernorm(self.mlp(x))
        x = x.add(y, alpha=self.scale)
        return x.add(self.mlp(self.post_attention_layernorm(x)), alpha=self.scale)

    def run(self, x, tables, document_ids, cache):
        """The block itself; arguments as `forward`."""
        y = self.self_attn(self.attention_input(x), tables, document_ids=document_ids, cache=cache)
        return self.after_attention(x, y)

    def forward(self, x, tables, *, document_ids=None, cache=None):
        """Residual stream x (B, T, hidden) -> the same behind this block. cache: this layer's."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.run, x, tables, document_ids, cache, use_reentrant=False,
                              preserve_rng_state=False)
        return self.run(x, tables, document_ids, cache)


class Transformer(nn.Module):
    """A decoder with Hugging Face parameter names; `config.hybrid` decides teacher or student."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.source = None  # folder it was loaded from: save_pretrained copies the small files
        self.kernels = "torch"  # what its mixers compute with (`choose_kernels`), to be told
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.num_layers)),
            "norm": RMSNorm(config.hidden_size, config.norm_eps, config.is_olmo)})
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def lm_head_weight(self):
        """(V, hidden)."""
        return self.model["embed_tokens"].weight if self.config.tied else self.lm_head.weight

    def rope_tables(self, positions, dtype):
        """positions (B, T) -> one pair of tables a layer; layers of a kind share theirs.

        In the residual stream's `dtype`; Olmo rotates in fp32.
        """
        c = self.config
        made = {rope: rope_tables(rope, positions, c.head_dim) for rope in {*c.layer_ropes}}
        if not c.is_olmo:
            made = {rope: [x.to(dtype) for x in tables] for rope, tables in made.items()}
        return [made[rope] for rope in c.layer_ropes]

    def positions(self, tokens, *, document_ids=None, cache=None):
        """The positions RoPE rotates tokens (B, T) by when none are given: (B or 1, T) int64.

        They count from 0 at every document, and at every `separator_id` if the config names one:
        each sequence of a family (homologues, say) then has its own positions, separator or BOS
        at 0, while attention and recurrent state run on through the document. With a cache they
        go on where it stands.
        """
        separator = self.config.separator_id
        index = torch.arange(tokens.shape[1], device=tokens.device)[None]
        # start: where position 0 lies, as an index into these tokens (negative: in an earlier
        # call). A separator moves it, and cummax hands the last one on to all that follow.
        start = -cache.position if cache is not None else torch.zeros_like(index[:, :1])
        if document_ids is not None:
            start = document_starts(document_ids)
        if separator is not None:
            start = torch.where(tokens == separator, index, start).cummax(dim=1).values
        return index - start

    def embed(self, tokens):
        """tokens (B, T) -> (B, T, hidden): what enters the first layer."""
        x = self.model["embed_tokens"](tokens)
        if self.config.family == "granite":
            x = x * self.config.embedding_multiplier
        if torch.is_autocast_enabled(x.device.type):  # the residual stream too is in half precision
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def hidden(self, tokens, *, document_ids=None, positions=None, cache=None):
        """tokens (B, T) int64 -> the final norm's output (B, T, hidden); arguments as `forward`.

        It represents the token and what came before it: per-base embeddings, for example.
        """
        if cache is not None and document_ids is not None:
            raise ValueError("a cache holds one document a row: give cache or document_ids")
        if positions is None:
            positions = self.positions(tokens, document_ids=document_ids, cache=cache)
        elif positions.dim() != 2 or positions.shape[1] != tokens.shape[1]:
            raise ValueError(f"positions {tuple(positions.shape)} must be (B or 1, T) as tokens "
                             f"{tuple(tokens.shape)}")
        x = self.embed(tokens)
        layers, tables = self.model["layers"], self.rope_tables(positions, x.dtype)
        caches = [None] * len(layers) if cache is None else cache.layers
        for block, layer_tables, layer_cache in zip(layers, tables, caches):
            x = block(x, layer_tables, document_ids=document_ids, cache=layer_cache)
        if cache is not None:
            cache.position.copy_(positions[:, -1:] + 1)
        x = self.model["norm"](x)
        # Granite divides the logits; dividing here is the same, and reaches a loss in `head` too.
        return x / self.config.logits_scaling if self.config.family == "granite" else x

    def forward(self, tokens, *, document_ids=None, positions=None, cache=None, head=F.linear):
        """tokens (B, T) int64 -> logits (B, T, V) in the weights' dtype.

        document_ids (B, T): packed documents, which do not see each other. positions (B or 1, T)
        int64: rotate by these (None: `Transformer.positions`); who sees whom does not change.
        cache: a `Cache` whose tokens come before these; it takes these in. Any T works after any
        length. head(hidden, lm_head_weight): what to return instead of logits. A loss goes here,
        so that (tokens, V) logits never exist, and FSDP, which gathers sharded weights for the
        length of this call, has lm_head at hand.
        """
        h = self.hidden(tokens, document_ids=document_ids, positions=positions, cache=cache)
        return head(h, self.lm_head_weight)


def student_config(config, window, sinks, mixer, features):
    """The `ModelConfig` of a teacher's student; raises as `student_from_teacher`."""
    if config.hybrid is not None:
        raise ValueError("a student is made from a teacher, and this model is a student")
    hybrid = Hybrid(window, 0 if mixer == "mlstm+swa" else sinks, mixer, features)
    return dataclasses.replace(config, hybrid=hybrid)


def choose_kernels(wanted, device, head_dim, features):
    """kernels="auto" | "torch" | "triton" -> "torch" (this file) or "triton" (kernels.py).

    "auto" takes Triton on a CUDA device where kernels.py and its package are there, and says why
    if it does not. A wish for "triton" is never dropped in silence: ValueError says what it lacks.
    (Triton's interpreter, TRITON_INTERPRET=1, is for tests.)
    """
    if wanted not in ("auto", "torch", "triton"):
        raise ValueError(f"kernels {wanted!r} is unknown; known: auto, torch, triton")
    cuda = torch.device(device).type == "cuda"
    if wanted == "torch" or wanted == "auto" and not cuda:
        return "torch"
    if cuda or os.environ.get("TRITON_INTERPRET") == "1":
        try:
            missing = _kernels().refusal(head_dim, features)
        except ImportError as error:
            missing = f"they need kernels.py and the triton package ({error})"
    else:
        missing = f"they need a CUDA device, not {device}"
    if missing and wanted == "triton":
        raise ValueError(f"kernels='triton': {missing}; use kernels='torch'")
    if missing:
        print(f"kernels   plain PyTorch: {missing}")
    return "torch" if missing else "triton"


def _kernels():
    import kernels  # late: it needs triton, and only a GPU needs it
    return kernels


def _set_kernels(model, wanted):
    """Store `choose_kernels` on the model and every mixer that has a choice; return the model."""
    features = model.config.hybrid.features if model.config.hybrid else 1
    kernels = choose_kernels(wanted, model.lm_head_weight.device, model.config.head_dim, features)
    for module in model.modules():
        if isinstance(module, (Transformer, StudentAttention)):
            module.kernels = kernels
    return model


def student_from_teacher(teacher, *, window=512, sinks=4, mixer="hybrid", features=4,
                         kernels="auto"):
    """A student for `teacher`: every attention replaced, everything else shared.

    The copied weights are the teacher's OWN tensors, so an 8B student costs only its new
    parameters (fp32; 1.1 % with 4 features, 0.4 % with 1). Training the copied ones would change
    the teacher: stage I trains the new ones only, and before stage II save and load the student,
    or `copy.deepcopy` it.
    mixer: a key of MIXERS; "linear" and "mlstm" have no window, "mlstm+swa" no sinks.
    features: width of the mLSTM's q and k in multiples of D: 1 (the paper's), 2, 4 or 8.
    kernels: `choose_kernels`. Raises ValueError for an unknown mixer, a window below 1, negative
    sinks, other features, a teacher that is a student, or kernels that cannot run.
    """
    config = student_config(teacher.config, window, sinks, mixer, features)
    device = teacher.lm_head_weight.device
    with torch.device("meta"):
        student = Transformer(config)
    copied = dict(teacher.named_parameters())
    for name, p in list(student.named_parameters()):
        assign(student, name, copied[name] if name in copied else nn.Parameter(
            torch.empty(p.shape, dtype=torch.float32, device=device)))
    for block in student.model["layers"]:
        initialise_mixer(block.self_attn)
    student.source = teacher.source
    return _set_kernels(student, kernels)


def assign(model, name, parameter):
    """Put `parameter` in the place of the model's parameter `name`."""
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, parameter)


# ----------------------------------------------------------------------------------------------
# 7. Cache and generation: a prefill of any length hands over exactly to one-token steps
# ----------------------------------------------------------------------------------------------
# Here the method pays. A teacher's cache holds keys and values of every token: 128 KB a token for
# Llama-3.1-8B, 17 GB at 131k tokens, and each step reads all of it. A student's holds one matrix
# a head, 270 MB in fp32 for 32 layers with 4 features, and window and sinks, 68 MB in bf16, at any
# length.
#
# Two forms compute the same: a sequence (prefill, of any length after any length) and a step of one
# token. A sequence leaves the cache as steps would have left it, so the two may follow each other
# in any order, and the text a model continues does not depend on how it was cut into pieces.
#
# The window is a ring: a new token overwrites the one that has just left. Two sinks and W = 3:
#
#     slot             0 1   2 3 4
#     after token 4    0 1   2 3 4        five tokens, five slots
#     after token 5    0 1   5 3 4        2 has left the window of 5, which is 3 4 5
#     after token 7    0 1   5 6 7
#
# Buffers and lengths are tensors that are only ever written in place, so that one compiled
# step, or one CUDA graph, serves every position.


class KVCache:
    """A teacher layer's keys and values: fixed buffers (B, K, slots, D), `length` tokens so far."""

    state = ()  # see `HybridCache`

    def __init__(self, batch, config, slots, like):
        self.k = like.new_zeros(batch, config.num_kv_heads, slots, config.head_dim)
        self.v = torch.zeros_like(self.k)
        self.length = torch.zeros((), dtype=torch.long, device=like.device)

    def step(self, q, k, v, slot, visible):
        """One token, in shapes that never change: into `slot` (1,), then a look at all visible."""
        for buffer, x in ((self.k, k), (self.v, v)):
            buffer.index_copy_(2, slot, x.to(buffer.dtype))
        self.length += 1
        return _grouped_attention(q, self.k, self.v, visible[None, None])

    def attention(self, q, k, v, *, window):
        """`softmax_attention` of T new tokens over all so far; takes the new ones in.

        One token on a GPU reads the whole buffer under a mask, filled or not: there a shape that
        changes with every token would cost a launch of everything, or a new compilation. A CPU
        reads what is filled, which is less.
        """
        if q.shape[2] == 1 and (q.is_cuda or torch.compiler.is_compiling()):
            s = torch.arange(self.k.shape[2], device=q.device)
            visible = s <= self.length
            if window is not None:
                visible = visible & (s > self.length - window)
            return self.step(q, k, v, self.length.view(1), visible)
        a = int(self.length)
        b = a + k.shape[2]
        if b > self.k.shape[2]:
            raise ValueError(f"the cache holds {self.k.shape[2]} tokens and {b} were given")
        self.k[:, :, a:b], self.v[:, :, a:b] = k, v
        self.length.fill_(b)
        return softmax_attention(q, self.k[:, :, :b], self.v[:, :, :b], window=window)


class HybridCache(KVCache):
    """A student layer's memory, constant in the length of the text.

    k, v (B, K, sinks + W, D) rotated: token t < sinks has slot t; later ones share a ring, slot
    sinks + (t - sinks) % W. state: the mLSTM's (S, z, m). Keys keep the rotation of their true
    position, so the order of slots does not matter to a softmax. What a mixer lacks, window or
    state, has size 0.
    """

    def __init__(self, batch, mixer, like):
        c, self.window, self.sinks = mixer.config, mixer.short_window, mixer.sinks
        super().__init__(batch, c, self.sinks + self.window, like)
        self.state = empty_state(batch, mixer.state_heads, c.hybrid.features * c.head_dim,
                                 c.head_dim, like.device)

    def slots(self, positions):
        """Positions (N,) or () int64 -> where in the buffers they stand."""
        return torch.where(positions < self.sinks, positions,
                           self.sinks + (positions - self.sinks) % self.window)

    def window_attention(self, q, k, v, attend):
        """Window + sinks for T new tokens after `length` old ones; takes the new ones in.

        attend: `window_attention` or the kernel of the same meaning.
        """
        if q.shape[2] == 1:  # written first, it finds all it may see in the buffers
            filled = torch.arange(self.k.shape[2], device=q.device) <= self.length
            return self.step(q, k, v, self.slots(self.length).view(1), filled)
        # Put the remembered tokens in front, in order. Sinks that left the window are really
        # further away than they stand here, but a sink is visible from any distance.
        old, sinks, W = int(self.length), self.sinks, self.window
        ring = torch.arange(max(sinks, old - W), max(sinks, old), device=q.device)
        slots = self.slots(torch.cat((torch.arange(min(sinks, old), device=q.device), ring)))
        k_all, v_all = (torch.cat(pair, dim=2) for pair in (
            (self.k[:, :, slots], k), (self.v[:, :, slots], v)))
        q = F.pad(q, (0, 0, len(slots), 0))  # remembered tokens ask nothing: rows dropped below
        h = attend(q, k_all, v_all, window=W, sinks=sinks)[:, :, len(slots):]
        # Of the new tokens the first ones of the text and the last W stay. Those between are left
        # out and not overwritten: which of two writes to one slot would win is not defined.
        end = old + k.shape[2]
        positions = torch.arange(old, end, device=k.device)
        kept = (positions < sinks) | (positions >= end - W)
        slots = self.slots(positions[kept])
        self.k[:, :, slots], self.v[:, :, slots] = k[:, :, kept], v[:, :, kept]
        self.length.fill_(end)
        return h


class Cache:
    """What a model remembers of a batch of equally long texts: one cache a layer.

    max_length: tokens a teacher's buffers can hold; a student's are constant and ignore it.
    position (B, 1): of the next token.
    """

    def __init__(self, model, batch, max_length):
        like = model.lm_head_weight
        self.layers = [b.self_attn.new_cache(batch, max_length, like)
                       for b in model.model["layers"]]
        self.position = torch.zeros(batch, 1, dtype=torch.long, device=like.device)

    def tensors(self):
        """All buffers."""
        for layer in self.layers:
            yield from (layer.k, layer.v, layer.length, *layer.state)
        yield self.position


# A step of a small model is a few hundred tiny operations, and launching them takes longer than
# they do. Compiled, they are few; as a CUDA graph, one launch. Both want the same shapes at the
# same addresses every time, which is why caches are written in place and never grow.


def decode_step(model, tokens, cache):
    """One token a row: tokens (B,) int64 -> logits of the next (B, V) fp32; the cache takes it in.

    It compiles as a whole, once for all positions: torch.compile(decode_step, fullgraph=True).
    """
    return F.linear(model.hidden(tokens[:, None], cache=cache)[:, -1], model.lm_head_weight).float()


def _compiled_step(cache, device):
    """`decode_step` compiled; on a GPU as a CUDA graph, which needs buffers known to stay put."""
    cuda = device.type == "cuda"
    for x in cache.tensors() if cuda else ():
        torch._dynamo.mark_static_address(x)
    return torch.compile(decode_step, fullgraph=True, mode="reduce-overhead" if cuda else None)


PREFILL = 2048  # tokens of a prompt per forward pass: memory does not grow with the prompt


def finite(x):
    """x, unless some of it is not finite: ValueError. argmax, for one, would choose a NaN."""
    if not x.isfinite().all():
        raise ValueError("the model's logits are not finite: are its weights damaged?")
    return x


@torch.no_grad()  # or the cache would keep the graph of every token so far
def stream(model, tokens, *, max_new_tokens, temperature=0.0, top_p=1.0, stop=None, seed=None,
           cache=None, compile=False):
    """Yield the ids (B,) that continue each row of tokens (B, T) int64, one step at a time.

    temperature 0: the most likely token; otherwise sampling from the smallest set of tokens whose
    probability reaches top_p. stop: id or ids that end a row (None: the model's eos ids; (): none);
    a finished row repeats its stop id until all are done. seed: of the sampling, for all rows
    together.
    cache: a `Cache` of what came before tokens (None: nothing did); it takes in the tokens and all
    ids yielded but the last, so that a conversation can go on with it.
    compile: compile the step (takes up to minutes, once a process and shape).
    Raises ValueError for an empty prompt, settings out of range, or logits that are not finite.
    """
    B, T = tokens.shape
    if T == 0 or not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(f"generate needs a prompt of 1 token or more (got {T}), temperature >= 0 "
                         f"(got {temperature}) and 0 < top_p <= 1 (got {top_p})")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < model.config.vocab_size:
        raise ValueError(f"the prompt has ids from {int(tokens.min())} to {int(tokens.max())}, and "
                         f"the vocabulary is 0 to {model.config.vocab_size - 1}")
    stop = model.config.eos_ids if stop is None else (stop,) if isinstance(stop, int) else stop
    stop = torch.tensor(tuple(stop), dtype=torch.long, device=tokens.device)
    random = torch.Generator(tokens.device)
    random.manual_seed(seed) if seed is not None else random.seed()
    cache = Cache(model, B, T + max_new_tokens) if cache is None else cache
    step = _compiled_step(cache, tokens.device) if compile else decode_step
    # The prompt's last token is not prefilled: it is the first step's, which gives the first logits
    # that anyone needs.
    for a in range(0, T - 1, PREFILL):
        model.hidden(tokens[:, a:min(a + PREFILL, T - 1)], cache=cache)
    new, done = tokens[:, -1].contiguous(), torch.zeros(B, dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        logits = finite(step(model, new, cache))
        new = torch.where(done, new, _sample(logits, temperature, top_p, random))
        yield new
        done = done | torch.isin(new, stop)
        if done.all():
            return


def generate(model, tokens, *, max_new_tokens, temperature=0.0, top_p=1.0, stop=None, seed=None,
             compile=False):
    """Continue each row of tokens (B, T) int64; returns (B, T + new), new <= max_new_tokens.

    Arguments and errors as `stream`.
    """
    new = stream(model, tokens, max_new_tokens=max_new_tokens, temperature=temperature,
                 top_p=top_p, stop=stop, seed=seed, compile=compile)
    return torch.cat((tokens, *(ids[:, None] for ids in new)), dim=1)


def _sample(logits, temperature, top_p, random):
    """logits (B, V) -> one id a row (B,).

    The many unlikely tokens together have a few per cent, and one of them now and then derails a
    text: top_p keeps the likeliest that together reach it, and draws among these.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # Below the largest, and in float64: or a small temperature would overflow.
    logits = (logits - logits.amax(-1, keepdim=True)).double()
    p, ids = (logits / temperature).softmax(-1).sort(descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # keep a token if those before it fall short
    return ids.gather(1, torch.multinomial(p, 1, generator=random))[:, 0]


# ----------------------------------------------------------------------------------------------
# 8. Weights on disk
# ----------------------------------------------------------------------------------------------
# Parameters have Hugging Face's names, so loading is the identity: every tensor of the files goes
# to the parameter of its name, and anything left over on either side is an error. The teacher's
# names are a subset of its student's, which is how one loader serves both.
#
# Two things keep an 8B model at its own size in memory: it is built on the meta device, where a
# tensor has a shape and no memory, and files are read a few rows at a time.
#
#     DIR/config.json                          the architecture (section 1)
#     DIR/model.safetensors                    all weights, or
#     DIR/model-00001-of-00002.safetensors     a part of them, and for all parts
#     DIR/model.safetensors.index.json         which tensor is in which
#     DIR/tokenizer.json, ...                  section 9; copied along as they are
#
# safetensors is a header of names, types and offsets before raw numbers. Pickles (.bin, .pt) are
# never read: opening one can run any code. Numbers that are no floats are never read either: int8
# or fp8 weights mean something only together with their scales, which stand elsewhere.


def check_device(device):
    """ValueError, with the remedy, for a device that this torch lacks or cannot compute fp64 on.

    Found out before gigabytes are read. fp64: the mLSTM's exponents are summed in it.
    """
    try:
        torch.zeros(1, dtype=torch.float64, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ImportError) as error:
        raise ValueError(f"--device {device}: this torch cannot use it; take --device cpu, or cuda "
                         f"where there is a GPU ({str(error).strip().splitlines()[0]})") from None


def load_pretrained(directory, *, device="cpu", dtype=None, kernels="auto", prepare=None):
    """A teacher or student from a folder of config.json and *.safetensors (+ index).

    dtype: a torch.dtype, or a function from a tensor's name to one or None. None: as the embedding
    is stored, and a student's new parameters as each is itself. kernels: a student's, see
    `choose_kernels`. prepare(model): called while the model has no memory yet, to shard it; then
    only this process's rows are read. Loading is strict: every missing, unexpected or misshapen
    tensor is named in one ValueError. Raises FileNotFoundError where there is no config.json or no
    weights, ValueError for bad files, a device that this torch lacks, and kernels that cannot run.
    """
    directory = Path(directory)
    config = ModelConfig.from_hf(directory)
    stored = list_tensors(directory)  # name -> (file, shape)
    check_device(device)
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    # Files may hold two things more: tables of RoPE's angles, which are computed here, and a tied
    # model's lm_head, a copy of its embedding.
    copied = config.tied and stored.get("lm_head.weight", (0, 0))[1] == (
        shapes["model.embed_tokens.weight"])
    found = {name: shape for name, (_, shape) in stored.items() if not (
        name.endswith("rotary_emb.inv_freq") or copied and name == "lm_head.weight")}
    # A tensor too many is as bad as one too few: a bias that nobody adds changes every logit.
    wrong = [f"{name} is {found.get(name, 'missing')}, by config.json {shapes.get(name, 'absent')}"
             for name in sorted(shapes.keys() | found.keys())
             if shapes.get(name) != found.get(name)]
    if wrong:
        raise ValueError(f"{directory}: {len(wrong)} tensors do not fit: " + "; ".join(wrong))

    def read(name, start, stop):
        # The file is opened anew for every piece: one long-lived mapping would keep all pages read
        # so far in memory and double an 8B load's peak (measured on 2 GB: 4.0 GB against 2.2).
        with _open_shard(stored[name][0]) as f:
            return f.get_slice(name)[start:stop]

    # Files may mix dtypes. All of a teacher gets one, that of its embedding; only a student's gates
    # and features stay as they were trained, in fp32.
    for name, shape in shapes.items():
        wanted = dtype(name) if callable(dtype) else dtype
        like = name if is_new(name) else "model.embed_tokens.weight"
        wanted = wanted or read(like, 0, 1).dtype
        assign(model, name, nn.Parameter(torch.empty(shape, dtype=wanted, device="meta")))
    if prepare:
        prepare(model)
    model.to_empty(device=device)
    cast = naming(directory, _fill, model, read, copied)
    if cast and dtype is None:
        print(f"{directory}: {len(cast)} tensors, such as {min(cast)}, are stored in another dtype "
              f"than the embedding, and are read as {model.lm_head_weight.dtype}")
    model.source = directory
    return _set_kernels(model, kernels)


def _fill(model, read, copied):
    """Read all parameters, a few rows at a time, by `read` of `load_pretrained`.

    copied: whether a tied model's lm_head is stored as well. Returns the names of those that were
    stored in another dtype. ValueError for numbers too large for theirs, or a copy that is none.
    """
    cast = set()
    for name, p in model.named_parameters():
        rows, first = local_rows(p.detach())
        step = max(1, (1 << 22) * p.shape[0] // p.numel())  # rows of 4M numbers together
        for a in range(0, len(rows), step):
            b = min(a + step, len(rows))
            rows[a:b] = piece = read(name, first + a, first + b)
            if piece.dtype != rows.dtype:
                cast.add(name)
                if not rows[a:b].isfinite().all() and piece.isfinite().all():
                    raise ValueError(f"{name} has numbers too large for {rows.dtype}; load it as "
                                     "float32 (distill.py: --dtype float32, else --device cpu)")
            # transformers unties a copy with other values and warns; here the folder must decide.
            if copied and name == "model.embed_tokens.weight" and not torch.equal(
                    piece, read("lm_head.weight", first + a, first + b)):
                raise ValueError(f"lm_head.weight is not {name}, as config.json says: set "
                                 "tie_word_embeddings to false there, or drop lm_head.weight")
    return cast


def local_rows(p):
    """The rows of a parameter that this process holds, and the number of the first.

    Of a plain tensor: all. Of one that FSDP2 has sharded (a DTensor): one of equal chunks, the
    last ones shorter or empty.
    """
    if not hasattr(p, "to_local"):
        return p, 0
    mesh = p.device_mesh
    return p.to_local(), min(p.shape[0], -(-p.shape[0] // mesh.size()) * mesh.get_local_rank())


def list_tensors(directory):
    """The folder's tensors: name -> (path of its file, shape). Reads headers only.

    Raises FileNotFoundError where there are no weights, ValueError for a missing or damaged shard,
    for tensors that are no plain floats (a quantised checkpoint), and for an index beside a whole
    model.safetensors, whose weights may be others.
    """
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.exists() and index.exists():
        raise ValueError(f"{whole} has {index.name} beside it, which lists shards; transformers "
                         f"reads {whole.name} only: move away the one that is not meant")
    if not whole.exists() and not index.exists():
        raise FileNotFoundError(f"{directory} holds neither {whole.name} nor {index.name}; pickles "
                                "(.bin, .pt, .pth) can run code and are never read: convert them")
    # The index lists name -> shard. A shard is asked for by a plain name: a path could lead out of
    # the folder.
    weight_map = read_json(index).get("weight_map") if index.exists() else {}
    if not isinstance(weight_map, dict) or not all(
            re.fullmatch(r"[^/\\]+\.safetensors", str(file)) for file in weight_map.values()):
        raise ValueError(f"{index}: weight_map is no object, or a shard in it is not a plain "
                         "*.safetensors name; copy the file again")
    tensors = {}
    for file in sorted(set(weight_map.values())) or [whole.name]:
        with _open_shard(directory / file) as f:
            for name in f.keys():
                tensor = f.get_slice(name)
                tensors[name] = (directory / file, tuple(tensor.get_shape()))
                if tensor.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(f"{directory / file}: {name} is {tensor.get_dtype()}, as in a "
                                     "quantised checkpoint; only plain floats are read")
    for name, file in weight_map.items():
        if name not in tensors or tensors[name][0].name != file:
            raise ValueError(f"{directory / file}: tensor {name} of {index.name} is missing")
    return tensors


def _open_shard(path):
    """A file opened by its header. ValueError names it if it is torn or missing."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated, no safetensors file, or missing; copy it again "
                         f"({error})") from None


def tokenizer_files(folder):
    """Names of what makes a folder complete beside weights and config.json, those that are there.

    Copied along, never written anew; and hashed where a change of them must show.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
             "generation_config.json", "chat_template.jinja", "chat_template.json", "vocab.txt")
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return [*(name for name in names if (folder / name).exists()),
            *(str(path.relative_to(folder)) for path in more)]


def model_sha256(folder):
    """sha256 of all files that decide what a model says: weights, config.json, tokenizer.

    By content, not by name: stored targets, scores and a run's settings carry it, so that none is
    continued with another model that lies in the same place.
    """
    files = [folder / name for name in ("config.json", *tokenizer_files(folder))]
    return sha256(*files, *sorted(folder.glob("*.safetensors")))


def save_pretrained(model, directory, *, max_shard_bytes=4 << 30, extra=()):
    """Write config.json, *.safetensors (+ index) and the source folder's tokenizer files.

    extra: dict of more JSON files, name -> value. The folder appears complete or not at all
    (`replacing_folder`). Tensors keep their dtype. Raises ValueError if `directory` exists and is
    not empty (nothing is ever overwritten) or the model has no `source` folder to take the small
    files from.
    """
    directory = Path(directory).resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not empty; name a new folder")
    if model.source is None:
        raise ValueError("model.source is None: set it to the folder of its config.json")
    source = Path(model.source)
    config = read_json(source / "config.json")
    # The dtype's key has a new and an old name, and files have either or both; transformers loads
    # as it says.
    for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
        config[key] = str(model.lm_head_weight.dtype).removeprefix("torch.")
    if model.config.hybrid is not None:
        config["hybrid"] = dataclasses.asdict(model.config.hybrid)
    # Index and shards are named as transformers names them, so that other programs find them.
    shards = cut_into_shards(model, max_shard_bytes)
    files = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with replacing_folder(directory) as tmp:
        for name in tokenizer_files(source):
            (tmp / name).parent.mkdir(exist_ok=True)
            shutil.copy(source / name, tmp / name)
        for name, value in {"config.json": config, **dict(extra)}.items():
            write_json(tmp / name, value)
        for file, shard in zip(files, shards):  # one at a time leaves the accelerator
            save_tensors(shard, tmp / file)
        if len(shards) > 1:
            write_json(tmp / "model.safetensors.index.json", {
                "metadata": {"total_size": sum(p.nbytes for p in model.parameters())},
                "weight_map": {name: f for f, shard in zip(files, shards) for name in shard}})


def cut_into_shards(model, most):
    """[{name: parameter}, ...] of at most `most` bytes each, or of one parameter.

    In the model's order: a loader that reads layer by layer goes through the files once.
    """
    shards, size = [{}], 0
    for name, p in model.named_parameters():
        if size + p.nbytes > most and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = p
        size += p.nbytes
    return shards


def save_tensors(tensors, path):
    """Tensors by name -> one synced *.safetensors; OSError if the disk is full or fails."""
    path = Path(path)
    # safetensors (since 0.6) writes a file that nobody else may read, and renames it: keep the mode
    # that the umask gives every other file, or a colleague cannot load the student.
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, path,
                  metadata={"format": "pt"})
    except SafetensorError as error:
        raise _unwritten(path, error) from None
    path.chmod(mode)
    with open(path, "rb") as file:  # a checkpoint that only the cache knows is none
        os.fsync(file.fileno())


# ----------------------------------------------------------------------------------------------
# 9. Tokenizer: byte-level BPE read from tokenizer.json and run by tiktoken; chat templates
# ----------------------------------------------------------------------------------------------
# Ids equal those of the `tokenizers` library when three things agree: the added tokens (such as
# <|eot_id|>) are cut out first, the same regex cuts the rest into pieces, and the same merges
# build each piece. What cannot be reproduced exactly is refused by name, never approximated: a
# tokenizer that differs on one word in a thousand shows in no loss curve. (One exception, as no
# such text is to be refused: beside a byte that the vocabulary lacks, see `_bpe_ranks`.)
#
#     "<|im_start|>user\nIt's 42"    added tokens out:   <|im_start|>   "user\nIt's 42"
#     the regex:   "user" "\n" "It" "'s" " " "4" "2"    (Qwen; others keep up to three digits)
#     the merges:  bytes of a piece, joined pair by pair, the pair that was learnt first first
#
# Special and ordinary added tokens: a special one (<|eot_id|>) steers, so text of strangers must
# not be able to write it; an ordinary one ([MOL], Qwen's <tool_call>) is a word of the language
# that happened to be added late, and is one token wherever it stands.

# tokenizer.json writes each byte as one visible character, after GPT-2 ("Ġ" is a space).
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_OF = {chr(b): b for b in _VISIBLE}
_BYTE_OF |= {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(_VISIBLE)))}

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 isolates every digit first, then applies GPT-2's pattern to each stretch between. White
# space before a digit ends its stretch, so it stays whole. The two steps as one pattern:
_SMOLLM2 = _GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"|\s+(?!", r"|\s+(?=\p{N})|\s+(?!")

# tiktoken's regex engine overflows on a million white-space characters in a row, with a panic
# that `except Exception` does not catch. Such runs are cut; no other text needs a cut.
_LONGEST_SPACE = 400_000


def _steps(node, key):
    """The steps of a tokenizer.json section: a Sequence's members, the one step, or none."""
    if node is None:
        return []
    return node[key] if node["type"] == "Sequence" else [node]


def _piece_pattern(pre_tokenizer):
    """The one regex whose matches are the pieces; ValueError names what it cannot express."""
    match [{"use_regex": True, **step} for step in _steps(pre_tokenizer, "pretokenizers")]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return _GPT2
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return _SMOLLM2
        # Olmo writes Removed + invert: keep the matches only, which are all of the text.
        case [({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"} |
               {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed",
                "invert": True}),
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            # Written for Oniguruma, run by another engine: what the two read differently.
            unlike = r"\{[0-9,]+\}\+|\{,[0-9]|\(\?[a-z]*m|\[\[:|\\[wWbB]|\$|(?<!\[)\^"
            if found := re.search(unlike, regex):
                raise ValueError(f"{found[0]!r} in the pattern {regex!r} is not supported")
            return regex
    raise ValueError(f"pre_tokenizer {json.dumps(pre_tokenizer)} is not supported, only byte-level "
                     "BPE; SentencePiece (Metaspace, or none), as in Llama 2, is not")


def _unlike(model, added):
    """Settings of a BPE model and its added tokens with which ids would differ here, in words.

    An added token may take the white space around it along (lstrip, rstrip), or be one only between
    other words (single_word); the byte-level families ask for neither. And `tokenizers` numbers
    added tokens itself: a file that says otherwise is not what it reads.
    """
    vocab, words = model["vocab"], {i: token for token, i in model["vocab"].items()}
    last = {token["content"]: token["id"] for token in added}  # of a token that is listed twice
    return [
        *(f"model.{key} = {model[key]!r}" for key in (
            "byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
          if model.get(key)),
        *(f"lstrip, rstrip or single_word of {token}" for token in added
          if token["lstrip"] or token["rstrip"] or token["single_word"]),
        *(f"the id {i} of {text!r}" for text, i in ((t["content"], t["id"]) for t in added)
          if (vocab.get(text, i), words.get(i, text), last[text]) != (i, text, i))]


# Byte-level BPE begins with a piece's bytes and has a list of merges, in the order in which they
# were learnt. It joins the pair of neighbours that stands first in the list, again and again:
#
#     merges: l o, lo w, e r        "lower"    l o w e r    lo w e r    low e r    low er
#
# tiktoken does that fast (in Rust), but knows no merges, only tokens with ranks, and joins what
# makes the token of lowest rank. `_bpe_ranks` finds ranks for which the two are one and the same.


def _last_merge(token, priority):
    """Plain BPE on one token: the rank of the merge that completes it, None if none does.

    priority: (left, right) -> rank. Of equal ranks the leftmost pair is joined first.
    """
    parts, rank = list(token), None
    while len(parts) > 1:
        ranks = [priority.get(pair, math.inf) for pair in zip(parts, parts[1:])]
        rank = min(ranks)
        if rank == math.inf:
            return None
        i = ranks.index(rank)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return rank


def _bpe_ranks(model, added):
    """tiktoken's table (bytes -> rank) and the table back (rank -> id), from the merge list.

    tiktoken joins two neighbours whenever their union is a token, lowest rank first, and looks a
    whole piece up before it joins anything. That equals the merge list if every token's rank is
    the position of the merge that completes it, and tokens that merges never complete are left
    out. (Ids often serve as ranks, but not in a vocabulary that was shuffled or extended.)
    """
    priority = {tuple(m.split(" ") if isinstance(m, str) else m): 256 + i
                for i, m in enumerate(model["merges"])}
    listed = {a + b: rank for (a, b), rank in priority.items()}
    # A byte without a token gets a rank but no id, and encode drops it, as `tokenizers` does
    # (SmolLM2 lacks some control characters). There it is gone before anything is merged; here its
    # neighbours inside a piece do not merge: "-", U+0004, "-" are two tokens, there that of "--".
    ranks, id_of_rank = {bytes([b]): b for b in range(256)}, {}
    for token, i in model["vocab"].items():
        if token in added and token not in listed and len(token) > 1:
            continue  # Olmo lists these here too; ordinary text must never become one
        rank = _BYTE_OF[token] if len(token) == 1 else _last_merge(token, priority)
        if rank is None and model.get("ignore_merges"):
            # Llama 3 has 588 such tokens, used where they are a whole piece, as tiktoken does. It
            # lists every pair that spells one, so that inside a piece both rules agree as well.
            halves = ((token[:at], token[at:]) for at in range(1, len(token)))
            if any(a in model["vocab"] and b in model["vocab"] and (a, b) not in priority
                   for a, b in halves):
                raise ValueError(f"not supported: ignore_merges with {token!r}, which no merges "
                                 "spell, though two tokens do")
            rank = listed.get(token, 256 + len(priority) + i)
        if rank is not None:
            ranks[bytes(_BYTE_OF[c] for c in token)] = rank
            id_of_rank[rank] = i
    return ranks, id_of_rank


# Tokenizers of sequences need no merges: a pattern cuts the pieces, and each is looked up whole.
# A folder names one as "tokenizer_class" in tokenizer_config.json, beside bos_token and eos_token,
# and lists its tokens in vocab.txt, one a line, its number (from 0) the id, empty lines unused.
# "bytes" needs no list: ids 0 to 255, then BOS and EOS. "DNAKmerTokenizer" is GENERator's own.
_SEQUENCES = {
    "bytes": r"[\s\S]",
    "kmer": r"[ACGT]{K}|[\s\S]",  # what is left before another letter or the end: one by one
    "DNAKmerTokenizer": r"[ACGT]{K}|[\s\S]",
    "smiles": r"\[[^\[\]]*\]|Br|Cl|%[0-9]{2}|[\s\S]"}  # atoms and ring numbers stay whole


def _one_of(texts):
    """A regex that finds the longest of some literal texts; (?!) never matches."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


class Tokenizer:
    """Text to token ids and back, and conversations to text, as a Hugging Face folder's files say.

    Reads tokenizer.json, and tokenizer_config.json and a chat template where present. Takes
    about 25 microseconds for each token of the vocabulary (_bpe_ranks). If tokenizer_config.json
    names a tokenizer of sequences (`_SEQUENCES`: bytes, k-mers, SMILES), that one instead.

    Attributes: folder, path (of tokenizer.json, or vocab.txt), vocab_size (1 + the highest id; an
    embedding may have more rows), bos_id (None if the family has none), adds_bos (encode's
    default), added (added token -> id), special (the ids of those flagged so), special_pattern (it
    finds these in a text), separator_id (config.json's: the token between the sequences of a
    family, or None), chat_templates (name -> Jinja text; empty if the folder has none).

    Raises FileNotFoundError, or ValueError naming the file and what is not supported.
    """

    def __init__(self, directory):
        folder = Path(directory)
        self.separator_id = read_json(folder / "config.json", {}).get("separator_id")
        config = read_json(folder / "tokenizer_config.json", {})
        # A mark such as "bos_token" is a string, or an object with its text as "content". All of
        # them are variables of the chat template. special_tokens_map.json is of old folders, and
        # not read, as in transformers, where the configuration lists the added tokens itself.
        old = {} if "added_tokens_decoder" in config else read_json(
            folder / "special_tokens_map.json", {})
        more = config.get("extra_special_tokens")
        marks = {**config, **old, **(more if isinstance(more, dict) else {})}
        self._marks = {name: x.get("content") if isinstance(x, dict) else x
                       for name, x in marks.items()
                       if name.endswith("_token") and isinstance(x, (str, dict))}
        self.chat_templates = _read_chat_templates(folder, config)
        kind, self._nfc, self._pieces = str(config.get("tokenizer_class")), False, None
        self.folder = folder
        self.path = str(folder / ("vocab.txt" if kind in _SEQUENCES else "tokenizer.json"))
        if kind != "bytes" and not os.path.exists(self.path):
            raise FileNotFoundError(f"{self.path} is missing: copy it from the teacher's folder "
                                    "(SentencePiece's tokenizer.model is not supported)")
        spec = {} if kind in _SEQUENCES else read_json(self.path)
        try:
            pattern, ranks, normalised = (
                self._read_sequences(kind) if kind in _SEQUENCES else
                self._read_bpe(spec, config.get("added_tokens_decoder") or {}))
            self._bpe = tiktoken.Encoding(self.path, pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens={})
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} is damaged, or no byte-level BPE ({error!r}): fetch the "
                             "folder again") from None
        if not self._pieces:  # sequences check each piece instead
            self._check_pattern(pattern)
        self._bytes |= {i: token.encode() for token, i in self.added.items()}
        self.vocab_size = 1 + max(self._bytes)
        # `tokenizers` first cuts the tokens that are "normalized": false out of the raw text, then
        # the others, in normalised spelling, out of what is left once that is normalised too.
        respelt = {self._normalise(token): self.added[token] for token in normalised}
        self._cuts = _one_of(self.added.keys() - normalised), _one_of(respelt)
        self._id_of = {**respelt, **self.added}
        self.special_pattern = _one_of(t for t, i in self.added.items() if i in self.special)

    def _check_pattern(self, pattern):
        """Refuse a pattern that leaves characters unmatched, which tiktoken would lose.

        Tried on each pair of Unicode categories, one character for each: a sample, which finds a
        class that the pattern forgot.
        """
        kinds = {unicodedata.category(chr(c)): chr(c) for c in range(0x3000)}.values()
        for two in map("".join, itertools.product(kinds, repeat=2)):
            if self._bpe.decode_bytes(self._bpe.encode_ordinary(two)) != two.encode():
                raise ValueError(f"{self.path}: pattern {pattern!r} does not match {two!r}")

    def _read_sequences(self, kind):
        """Set up a tokenizer of sequences -> (pattern, table, normalised), as `_read_bpe`.

        In tiktoken's table a rank is an id here.

        Nothing is merged: tiktoken looks a whole piece up before it tries to build it, and every
        piece is in the table or refused (`_encode_text`). What vocab.txt lists beside pieces, such
        as "<s>" or a tag for a species, is an added token.
        """
        marks = [self._marks.get("bos_token") or "<s>", self._marks.get("eos_token") or "</s>"]
        pattern, table = _SEQUENCES[kind], {bytes([b]): b for b in range(256)}
        self.added = dict(zip(marks, (256, 257)))
        if kind != "bytes":
            lines = Path(self.path).read_text(encoding="utf-8").splitlines()
            tokens = {token: i for i, token in enumerate(lines) if token}
            k = max((len(t) for t in tokens if re.fullmatch("[ACGT]+", t)), default=1)
            pattern = pattern.replace("K", str(k))
            table = {t.encode(): i for t, i in tokens.items()
                     if t not in marks and re.fullmatch(pattern, t)}
            if not table:
                raise ValueError(f"none of its lines is a token of {pattern!r}")
            self.added = {t: i for t, i in tokens.items() if t.encode() not in table}
            self._pieces = re.compile(pattern)
        self.special = set(self.added.values())
        self._ranks, self._bytes = table, {i: token for token, i in table.items()}
        self._id_of_rank = {i: i for i in self._bytes}
        self.bos_id = self.added.get(marks[0])
        self.adds_bos = self.bos_id is not None
        return pattern, table, set()

    def _read_bpe(self, spec, configured):
        """Set up the tokenizer of a tokenizer.json -> (pattern, tiktoken's table, normalised).

        configured: tokenizer_config.json's added tokens, which must be there as well. normalised:
        the added tokens to be looked for in normalised text.
        """
        model = spec["model"]
        if model.get("type", "BPE") != "BPE":
            raise ValueError(f"not supported: model.type {model['type']!r}, only byte-level BPE is")
        pattern = _piece_pattern(spec.get("pre_tokenizer"))  # first: it names SentencePiece
        added = [token for token in spec.get("added_tokens") or ()
                 if token["content"]]  # "" is none, as there
        self.added = {token["content"]: token["id"] for token in added}
        self.special = {token["id"] for token in added if token["special"]}
        normalizers = _steps(spec.get("normalizer"), "normalizers")
        self._nfc = bool(normalizers)
        self._read_bos(spec.get("post_processor"))
        ranks, self._id_of_rank = _bpe_ranks(model, self.added)
        refused = [f"normalizer {step}" for step in normalizers if step["type"] != "NFC"]
        refused += _unlike(model, added)
        refused += [f"{token['content']!r}, which tokenizer_config.json adds (load and save the "
                    "folder with transformers, and tokenizer.json has it)"
                    for token in configured.values() if token["content"] not in self.added]
        if model.get("unk_token") and not self._id_of_rank.keys() >= set(range(256)):
            refused.append("model.unk_token where the vocabulary lacks bytes")
        if refused:
            raise ValueError(f"not supported: {'; '.join(refused)}")
        self._bytes = {i: bytes(_BYTE_OF[c] for c in token)
                       for token, i in model["vocab"].items() if token not in self.added}
        normalised = {token["content"] for token in added if token["normalized"]}
        return pattern, ranks, normalised

    def _read_bos(self, post_processor):
        """Which token is BOS, and whether encode puts it in front."""
        self.bos_id, self.adds_bos = self.added.get(self._marks.get("bos_token")), False
        for step in _steps(post_processor, "processors"):
            match step:
                case {"type": "TemplateProcessing",
                      "single": [{"SpecialToken": {"id": name}}, {"Sequence": _}]}:
                    self.adds_bos, [self.bos_id] = True, step["special_tokens"][name]["ids"]
                case {"type": "TemplateProcessing", "single": [{"Sequence": _}]}:
                    pass  # adds nothing
                case {"type": "ByteLevel"}:
                    pass  # moves offsets, which nobody asks for here
                case _:
                    raise ValueError(f"post_processor {json.dumps(step)} is not supported")

    # NFC writes an accented letter as one character wherever there is one: "e" + U+0301 is "é".
    # Python's and tokenizers' Unicode versions differ in some hundred rare marks.

    def _normalise(self, text):
        """Text in the spelling that the regex and the merges are applied to."""
        return unicodedata.normalize("NFC", text) if self._nfc else text

    def _cut(self, text, cut, specials):
        """Cut added tokens out: yield (the text before one, its id), at last (the rest, None).

        Of several that begin at one place the longest is taken (`_one_of`).
        """
        start = 0
        # A special token that must stay text still hides an ordinary one inside it, as there.
        for found in cut.finditer(text):
            i = self._id_of[found[0]]
            if specials or i not in self.special:
                yield text[start:found.start()], i
                start = found.end()
        yield text[start:], None

    def _encode_text(self, text):
        """Ids of normalised text without added tokens."""
        for piece in self._pieces.finditer(text) if self._pieces else ():
            if piece[0].encode() not in self._ranks:  # tiktoken would panic
                raise ValueError(f"{self.path} has no token {piece[0]!r} (character "
                                 f"{piece.start()} of {len(text)}): clean the text; k-mers: cut it "
                                 "to a multiple of k")
        # Where to cut, for tiktoken's sake: at the ends of runs of exactly the longest length.
        # (Shorter ones match too, or the search would start anew at each of their characters.)
        cuts = [run.end() for run in re.finditer(r"\s{1000,%d}" % _LONGEST_SPACE, text)
                if len(run[0]) == _LONGEST_SPACE]
        return [self._id_of_rank[rank]
                for start, end in zip([0, *cuts], [*cuts, len(text)])
                for rank in self._bpe.encode_ordinary(text[start:end])
                if rank in self._id_of_rank]

    def encode(self, text, *, bos=None, specials=True):
        """Token ids of a str, as a list.

        bos: whether bos_id stands first; None does as the folder's post-processor says. A
        rendered chat brings its own: pass False.
        specials: whether special tokens written in the text are parsed. Pass False for text of
        strangers, in which "<|eot_id|>" must remain ten ordinary characters. Added tokens that
        the folder does not flag as special ("[MOL]", Qwen's "<tool_call>") always are. Half of a
        surrogate pair, which is no character, counts as U+FFFD.
        """
        bos = self.adds_bos if bos is None else bos
        if bos and self.bos_id is None:
            raise ValueError(f"{self.path}: bos=True, but this tokenizer has no BOS token")
        ids, (raw, normalised) = [self.bos_id if bos else None], self._cuts
        for stretch, token in self._cut(text, raw, specials):
            for part, inner in self._cut(self._normalise(stretch), normalised, specials):
                ids += [*self._encode_text(part), inner]
            ids.append(token)
        return [i for i in ids if i is not None]  # None: no token stood there

    def encode_member(self, text):
        """Ids of one sequence of a family, the separator behind it.

        ValueError if the folder names no separator, or the sequence contains it.
        """
        if self.separator_id is None:
            raise ValueError("sequences of a family need a separator: add \"separator_id\", a "
                             f"token's id, to {self.folder / 'config.json'}")
        ids = self.encode(text, bos=False, specials=False)
        # A separator inside would make two members of one, and restart positions at it.
        if self.separator_id in ids:
            raise ValueError(f"sequence {text[:40]!r} contains the separator, {self.separator_id}")
        return ids + [self.separator_id]

    # A token may be part of a character: bytes are joined first and decoded then.

    def decode(self, ids):
        """The tokens' bytes as text, broken UTF-8 as U+FFFD; ids of padding rows give nothing."""
        return b"".join(self._bytes.get(int(i), b"") for i in ids).decode("utf-8", "replace")

    def decode_stream(self, ids):
        """Yield the text of ids one by one, "" where a character is not yet complete: the texts
        join to `decode(ids)`.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            yield decoder.decode(self._bytes.get(int(i), b""))
        yield decoder.decode(b"", final=True)

    # A chat template is a program in Jinja that the folder brings. It writes a list of messages as
    # one text, with the marks of whose turn it is that the model was trained with. It is run as
    # transformers runs it, and never recognised: ChatML alone is published with some ten different
    # texts, which differ in the mark in front, the default system prompt, the end of the last turn.

    def render_chat(self, messages, *, tools=None, generation_prompt=True, marks=("", "")):
        """A conversation as the folder's chat template writes it (transformers' text, to a byte).

        messages: [{"role": str, ...}, ...]. All of a message, its content as a string or a list of
        parts, tool_calls, reasoning_content, goes to the template, and so does tools, a list of
        objects or None: the template decides. generation_prompt: end with the header of the
        assistant's next turn. marks: written around {% generation %} blocks. Raises ValueError if
        the folder has no template, the messages are no such list, or the template refuses them
        (with its own words).
        """
        source = self._chat_template(tools)
        for what, x in (("messages", messages), ("tools", tools or [])):
            if not isinstance(x, list) or not all(isinstance(item, dict) for item in x):
                raise ValueError(f"{what} must be a list of objects, not {str(x)[:40]!r}")
        if not messages or not all(isinstance(m.get("role"), str) for m in messages):
            raise ValueError('messages must be at least one, each with a "role"')
        # A key of value null is a key that is not there, as in transformers: data sets in columns
        # give every message every key, and a template asks for "tool_calls" by its presence.
        messages = [{k: x for k, x in m.items() if x is not None} for m in messages]
        # Thinking has three names in data sets; a template finds it by two, as in transformers.
        for m in messages:
            said = [m[k] for k in _THINKING if k in m]
            if said:
                m["reasoning_content"], m["thinking"] = said[0], m.get("thinking", said[0])
        try:
            return _compile_template(source).render(
                **self._marks, messages=messages, tools=tools, documents=None,
                add_generation_prompt=generation_prompt, generation_marks=marks)
        except Exception as error:  # a template is a program of strangers: anything may come
            raise ValueError(f"the chat template of {self.folder} refuses this conversation: "
                             + " ".join(str(error).split())) from None

    def _chat_template(self, tools):
        """The text of the chat template for conversations with these tools; ValueError if none."""
        name = "default" if tools is None or "tool_use" not in self.chat_templates else "tool_use"
        if name not in self.chat_templates:
            raise ValueError(f"{self.folder} has no chat template: copy chat_template.jinja or "
                             "tokenizer_config.json from the instruct model, or use plain text")
        return self.chat_templates[name]

    def render_chat_parts(self, messages, *, tools=None):
        """A conversation cut into what is learnt and what is given: (parts, skipped).

        parts: [(text, learnt), ...], which join to render_chat(..., generation_prompt=False), and
        a last stop token where the template writes it only once another turn follows (Qwen 1.5).
        Learnt is what an assistant's turn holds behind its header up to its stop token: encoded
        part by part (bos=False), an answer starts where generation starts. A turn with "train":
        false or "weight": 0 is not learnt. skipped: turns that cannot be, because the template
        writes them differently once others follow (Qwen3 drops earlier thinking).

        messages, tools, errors: as `render_chat`; and ValueError if no turn that is to be learnt
        can be found in the text, or a tool call or the tools are not in it.
        """
        text = self.render_chat(messages, tools=tools, generation_prompt=False)
        # A turn that is not to be learnt is located all the same: generation blocks are counted.
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        spans = self._turn_spans(text, messages, tools, turns)
        self._check_all_is_written(text, messages, tools, spans)
        wanted = [i for i in turns if _is_learnt(messages[i])]
        found = [i for i in wanted if spans[i]]
        if wanted and not found:
            raise ValueError(f"none of the assistant's {len(wanted)} turns can be found as it was "
                             "generated: the chat template rewrites or omits them")
        parts, done = [], 0
        for i in found:
            start, end = spans[i]
            # Without its call the turn is an empty answer, and silence would be learnt.
            for call in messages[i].get("tool_calls") or ():
                if call.get("function", call).get("name", "") not in text[start:end]:
                    raise ValueError(f"the chat template does not write the tool call {call}")
            parts += [(text[done:start], False), (text[start:end], True)]
            done = end
        parts.append((text[done:], False))
        stop = self._marks.get("eos_token")
        if stop and found and done == len(text) and not text.endswith(stop) and (
                self.render_chat(messages, tools=tools).startswith(text + stop)):
            parts.append((stop, True))
        return [part for part in parts if part[0]], len(wanted) - len(found)

    def _check_all_is_written(self, text, messages, tools, spans):
        """ValueError for tools, contents and thoughts that the template leaves out in silence.

        A role that it does not know ("developer"), thinking, words beside a tool call: what is not
        found in the text is left out where rendering without it gives the same. A content that is a
        list of parts many write as Python does, [{'type': ..., or (Qwen 3's) not at all. Turns
        without a span are left aside: `render_chat_parts` counts them.
        """
        render = functools.partial(self.render_chat, generation_prompt=False)
        if tools and render(messages) == text:
            raise ValueError("the chat template does not write the tools: leave them out")
        written = [i for i in range(len(messages)) if spans.get(i, True)]
        for i, key in itertools.product(written, ("content", "function_call", *_THINKING)):
            value = messages[i].get(key)
            for x in (value, *(value if isinstance(value, list) else ())):
                if not isinstance(x, str) and "'" in str(x) and str(x) in text:
                    raise ValueError(f"the chat template writes a {key} that is no string as "
                                     f"Python shows it ({str(x)[:40]}): give a string")
            if not value or isinstance(value, str) and value.strip() in text:
                continue
            fewer = [type(value)()]
            if isinstance(value, list):  # a part may be left out: a picture, say, beside a text
                fewer = [value[:j] + value[j + 1:] for j, part in enumerate(value)
                         if part != {"type": "text", "text": ""}]
            for less in fewer:
                changed = [*messages[:i], {**messages[i], key: less}, *messages[i + 1:]]
                try:
                    left_out = render(changed, tools=tools) == text
                except ValueError:
                    continue  # what the template refuses to miss it reads
                if left_out:
                    raise ValueError(f"the chat template does not write the {key} of message {i} "
                                     f"({messages[i]['role']}), or not all: {str(value)[:60]!r}. "
                                     "Leave out what it does not, or say it as the template can")

    def _turn_spans(self, text, messages, tools, turns):
        r"""Turn -> the (start, end) in text of what the assistant said there, or None.

        A template with {% generation %} blocks says it itself. With others, less of the
        conversation is rendered. A turn starts behind what stands before it with the generation
        prompt, and ends where the conversation up to it ends:

            the text         <|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n<|user|>\nBye...
            before, prompted <|user|>\nHi<|end|>\n<|assistant|>\n
            up to the turn   <|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n
            learnt                                            Hello<|end|>

        None where the text does not begin with these: then the template writes this turn otherwise
        now than it did when the turn was generated, and no token of it stands behind the context
        that it will have in use.
        """
        render = functools.partial(self.render_chat, tools=tools, generation_prompt=False)
        if _compile_template(self._chat_template(tools)).environment.has_generation:
            marked = render(messages, marks=_MARKS)
            # The text outside, inside, outside ... of the blocks, in turns.
            pieces = re.split("|".join(_MARKS), marked)
            if "".join(pieces) != text or len(pieces) // 2 != len(turns):
                raise ValueError(f"the chat template has {len(pieces) // 2} generation blocks for "
                                 f"{len(turns)} assistant turns: which is whose is not known")
            ends = [*itertools.accumulate(map(len, pieces))]
            return dict(zip(turns, zip(ends[0::2], ends[1::2])))
        spans = {}
        for i in turns:
            prompt = render(messages[:i], generation_prompt=True) if i else ""
            if all(m["role"] == "system" for m in messages[:i]):
                # There is nothing to render before it, or Granite's template, say, adds no header
                # to it: the first header behind it, found by what is added to the end. (Should a
                # template add nothing, no first turn of it starts where generation does.)
                longer = render(messages, generation_prompt=True)
                header = longer[len(os.path.commonprefix((text, longer))):]
                if not prompt.endswith(header):
                    at = text.find(header, len(prompt))
                    prompt = at >= 0 and text[:at + len(header)]
            end = prompt and self._end_of_turn(text, prompt, render(messages[:i + 1]))
            located = prompt and text.startswith(prompt) and end > len(prompt)
            spans[i] = (len(prompt), end) if located else None
        return spans

    def _end_of_turn(self, text, prompt, turn):
        """Where in text ends the stop token of the turn that ends the rendering `turn`; or 0.

        White space behind a stop token ("<|im_end|>\\n") is the template's, which writes it before
        the next turn: generation has ended by then. Where a template closes a turn by white space
        alone, that is the stop, and learnt.
        """
        stops = self.special_pattern.pattern
        if text.startswith(turn):
            if re.search(rf"(?:{stops})\s*\Z", turn[len(prompt):]):
                return len(turn.rstrip())
            late = self._marks.get("eos_token") or ""  # comes with the next turn (Qwen 1.5)
            return len(turn) + (len(late) if text.startswith(late, len(turn)) else 0)
        # Olmo 3 ends the last turn with another stop token than earlier ones: compare without.
        said = re.sub(rf"(?:\s|{stops})*\Z", "", turn[len(prompt):])
        stop = re.compile(rf"\s*(?:{stops})").match(text, len(prompt + said))
        return stop.end() if stop and text.startswith(prompt + said) else 0


def _is_learnt(message):
    """Whether an assistant's message is to be learnt: its keys "train" and "weight" may say no."""
    marks = message.get("train"), message.get("weight")
    if any(x not in (None, 0, 1) for x in marks):  # True is 1, False is 0
        raise ValueError('"train" and "weight" of a message must be true, false, 1 or 0')
    return 0 not in marks


_THINKING = "reasoning_content", "thinking", "reasoning"  # its names in data sets
_MARKS = "\ufdd0", "\ufdd1"  # Unicode keeps these two for a program's own use: no text has them


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: its text, between the marks of `render_chat`.

    Jinja lets a program add statements. This one reads its body as a macro (`caller`) and calls
    `mark` in its place, with the two marks that the rendering was given; two empty ones change
    nothing.
    """

    tags = {"generation"}

    def __init__(self, environment):
        super().__init__(environment)
        environment.has_generation = False  # an environment compiles one template only

    def parse(self, parser):
        self.environment.has_generation = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("mark", [jinja2.nodes.Name("generation_marks", "load")])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def mark(self, marks, caller):
        return marks[0] + caller() + marks[1]


@functools.cache
def _compile_template(source):
    """A chat template in the sandbox, and with the functions, that transformers gives it.

    In the sandbox a template can neither reach Python's internals nor change the messages. The
    functions are what published templates call: raise_exception to refuse a conversation, tojson
    for tools and arguments, strftime_now for the date.
    """
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)  # Jinja's own escapes for HTML

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = tojson
    # strftime_now: Llama 3.2 writes the day it is, so that the same row has other tokens tomorrow.
    sandbox.globals.update(raise_exception=raise_exception,
                           strftime_now=lambda form: datetime.datetime.now().strftime(form))
    return sandbox.from_string(source)


def _read_chat_templates(folder, config):
    """The folder's chat templates: name -> text. There are three places where one may stand.

    The newest wins, as in transformers: chat_template.jinja and, by name, those in
    additional_chat_templates/, then tokenizer_config.json, which may hold several by name
    ("tool_use" for conversations with tools), then chat_template.json.
    """
    files = {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    if (folder / "chat_template.jinja").exists():
        files["default"] = folder / "chat_template.jinja"
    if files:
        try:
            return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        except UnicodeDecodeError as error:
            raise ValueError(f"{folder}: a chat template (*.jinja) is not UTF-8 ({error}); convert "
                             "it") from None
    templates = config.get("chat_template") or read_json(
        folder / "chat_template.json", {}).get("chat_template") or []
    if isinstance(templates, str):
        return {"default": templates}
    if not isinstance(templates, list) or not all(
            isinstance(t, dict) and isinstance(t.get("template"), str) for t in templates):
        raise ValueError(f"{folder}: chat_template is neither a text nor a list of objects with a "
                         "name and a template; copy tokenizer_config.json again")
    return {t.get("name"): t["template"] for t in templates}


# A gene may stand on either strand: a model of DNA is asked about both, and the mean is its score.
_COMPLEMENT = str.maketrans("ACGTRYKMBDHVacgtrykmbdhv", "TGCAYRMKVHDBtgcayrmkvhdb")


def reverse_complement(bases):
    """The other strand of a DNA string, read in its own direction: AACG -> CGTT.

    Upper or lower case; IUPAC's letters for several bases too. ValueError for other characters.
    """
    wrong = re.search("[^ACGTRYKMBDHVSWNacgtrykmbdhvswn]", bases)
    if wrong:
        raise ValueError(f"{wrong[0]!r} (character {wrong.start()} of {len(bases)}) is no DNA base")
    return bases.translate(_COMPLEMENT)[::-1]


def load_with_tokenizer(directory, *, device="cpu", dtype="auto"):
    """(model, tokenizer) of a folder, checked against each other.

    dtype: as `load_pretrained`; "auto": fp32 on a CPU, elsewhere as stored, because most CPUs
    multiply bf16 slowly. Raises as `load_pretrained` and `Tokenizer`, and ValueError if the
    tokenizer has more ids than the embedding has rows.
    """
    if dtype == "auto":
        dtype = torch.float32 if str(device).startswith("cpu") else None
    model = load_pretrained(directory, device=device, dtype=dtype)
    tokenizer = Tokenizer(directory)
    if tokenizer.vocab_size > model.config.vocab_size:  # fewer is fine: padding rows
        raise ValueError(f"{tokenizer.path} has {tokenizer.vocab_size} ids, the embedding "
                         f"{model.config.vocab_size} rows; they are not of one model")
    return model, tokenizer


# ----------------------------------------------------------------------------------------------
# 10. Talk to it: python model.py DIR
# ----------------------------------------------------------------------------------------------
# The quickest look at what a distillation has done: ask the teacher, then ask the student. The
# numbers behind each answer show what it was for. A teacher's cache grows by the same bytes with
# every token, a student's stays what it was at the first; and no prompt is read twice, because the
# cache of one answer is where the next begins.


def chat(model, tokenizer, prompts, run):
    """Answer each prompt; the conversation stays in the cache, so that nothing is read twice.

    What the cache has read is known as a text. The next prompt, rendered with all before it, must
    begin with that text; only what follows is read. (Comparing ids would not do: a model may write
    a word in other tokens than the tokenizer.) A template that drops earlier thinking breaks this;
    then a new cache reads everything, and that is said.

    prompts: an iterable of str. run: the options of `main`. Raises ValueError as `stream` and
    `render_chat` do.
    """
    messages, text = [], ""
    held, count, cache = "", 0, None  # what the cache has read: as text, in tokens
    for prompt in prompts:
        messages.append({"role": "user", "content": prompt})
        text = text + prompt if run.raw else tokenizer.render_chat(messages)
        if not text.startswith(held):
            print("(the chat template rewrote what was said: all is read again)")
            held, count, cache = "", 0, None
        # BOS once, at the very beginning; a chat template writes its own.
        bos = None if run.raw and not count else False
        ids, new, times = tokenizer.encode(text[len(held):], bos=bos), [], [time.perf_counter()]
        if not ids:  # such as an empty line of --raw
            print("(nothing to read)")
            continue
        # Room for the longest answer that may come. A teacher's buffers grow with every turn, and
        # are copied, not read again; a student's have the same size at any length.
        larger = Cache(model, 1, count + len(ids) + run.max_new_tokens)
        for x, old in zip(larger.tensors(), cache.tensors() if cache else ()):
            x[tuple(map(slice, old.shape))] = old
        cache = larger

        # decode_stream holds a character back until all its bytes are there: an emoji is four
        # bytes, and may be as many tokens.
        def spoken():
            for step in stream(model, torch.tensor([ids], device=run.device), cache=cache,
                               max_new_tokens=run.max_new_tokens, seed=run.seed,
                               temperature=run.temperature, top_p=run.top_p):
                new.append(int(step))
                times.append(time.perf_counter())
                if new[-1] not in model.config.eos_ids:
                    yield new[-1]

        said = ""
        for piece in tokenizer.decode_stream(spoken()):
            said += piece
            print(piece, end="", flush=True)
        # The last token was never given back to the model: the cache has not read it. Mostly it is
        # the stop token, which the next rendering may well spell in another way.
        held, count = text + tokenizer.decode(new[:-1]), count + len(ids) + len(new) - 1
        text += said
        messages.append({"role": "assistant", "content": said})
        # Reading is timed up to the first token, writing from there on (one token: all).
        rate = max(len(new) - 1, 1) / (times[-1] - times[min(1, len(new) - 1)])
        print(f"\n[{len(ids)} tokens read in {times[1] - times[0]:.2f} s, {len(new)} written, "
              f"{rate:,.1f} a second; cache {sum(x.nbytes for x in cache.tensors()) / 1e6:,.1f} MB "
              f"for {count} tokens]")
        if count > model.config.max_positions:
            print(f"(more than the {model.config.max_positions} tokens that it was made to read)")
        if held.endswith("\ufffd"):  # cut inside of a character, whose next byte is in new[-1]
            held, count, cache = "", 0, None  # so read all again, as text


def main(argv=None):
    """`python model.py DIR`: options, and prompts from --prompt or line by line.

    argv: list of strings (None: the command line's). Raises ValueError or OSError for bad input.
    """
    parser = argparse.ArgumentParser(prog="python model.py", description="Talk to a teacher or a "
                                     "student: a prompt a line, the end of input or ^C leaves.")
    option = parser.add_argument
    option("directory", help="folder with config.json, *.safetensors and tokenizer.json")
    option("--prompt", help="answer this one and leave")
    option("--raw", action="store_true", help="continue plain text, without the chat template")
    option("--temperature", type=float, default=0.0, help="0: always the most likely token")
    option("--top-p", type=float, default=1.0, help="sample from so much of the probability "
           "(beside --temperature)")
    option("--max-new-tokens", type=number(int, 1), default=256, help="an answer (default: 256)")
    option("--seed", type=number(int, 0), help="of the sampling (beside --temperature)")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run = parser.parse_args(argv)
    try:
        model, tokenizer = load_with_tokenizer(run.directory, device=run.device)
        if not run.raw and not tokenizer.chat_templates:
            print("(no chat template in this folder: plain continuation, as by --raw)")
            run.raw = True
        # input() edits lines and keeps a history where Python has readline; its end is EOFError.
        lines = iter(lambda: input("> " if sys.stdin.isatty() else ""), None)
        chat(model, tokenizer, lines if run.prompt is None else [run.prompt], run)
    except (EOFError, KeyboardInterrupt):
        print()


def number(kind, low):
    """An argparse type: an int or a float from `low` to 1e13, neither nan nor infinite.

    A final k stands for 1024. A negative learning rate would train uphill without a word.
    """
    def parse(text):
        try:
            value = kind(text.removesuffix("k")) * (1024 if text.endswith("k") else 1)
        except ValueError:
            value = math.nan
        if low <= value <= 1e13:  # nan is neither
            return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a{' whole' if kind is int else ''} "
                                         f"number from {low:g} to 1e+13")

    return parse


def new_folder(text):
    """An argparse type: a folder to write, as a Path; it need not exist, but must be possible."""
    path = Path(text)
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is a file; name a folder")
    return path


def is_out_of_memory(error):
    """Whether a MemoryError or RuntimeError says so: torch has a class for GPUs only."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "can't allocate memory" in str(error))


def run_command(main, memory="shorter texts and fewer new tokens need less"):
    """`main` for a shell: bad input ends in one sentence and exit status 2. For all commands.

    So does a lack of memory, with `memory` as the remedy. Other exceptions are our mistakes, and
    keep their traceback. A terminal or log that cannot show a character shows another: nothing
    printed may end a run.
    """
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(errors="replace")
    try:
        main()
    except (ValueError, OSError) as error:
        # Python's own "[Errno 2] No such file or directory: 'a.txt'" in the order of all others.
        name, cause = getattr(error, "filename", None), getattr(error, "strerror", None)
        print("error:", f"{name}: {cause}" if name and cause else error, file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        cause = f" ({str(error).splitlines()[0]})" if str(error) else ""
        print(f"error: out of memory: {memory}{cause}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # what shells say of a program that Ctrl-C has ended


if __name__ == "__main__":
    run_command(main)
