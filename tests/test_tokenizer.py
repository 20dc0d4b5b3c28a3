"""Tokenizer: ids equal to those of the `tokenizers` library, whose from_file is the oracle.

Every tokenizer here is trained on the standard library's source in a second or two; nothing is
downloaded. Conversations: test_chat.py.

Run: python -m pytest tests/test_tokenizer.py
"""

import importlib
import inspect
import itertools
import json
import random
import unicodedata

import pytest
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Oracle
from tokenizers import processors, trainers

from model import Tokenizer

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN = LLAMA3.replace("{1,3}", "")
MODULES = "argparse ast calendar difflib doctest inspect mailbox optparse tarfile typing uuid"
CORPUS = [inspect.getsource(importlib.import_module(name)) for name in MODULES.split()] + [
    "Ünïcödé façade naïve — “quotes” … 你好，世界！ Привет, мир. 안녕하세요 مرحبا שלום 🙂👩‍👩‍👧‍👦 "
    "DON'T I'LL We've it's 123456 7890 3.14159\r\n\r\n\tindent    wide\n\n\n   tail   "] * 20


def byte_level(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior, invert), byte_level(False)])


def train(pre_tokenizer, specials, normalizer=None, without=""):
    """A byte-level BPE of 3000 tokens, as the dict of its tokenizer.json."""
    oracle = Oracle(models.BPE())
    oracle.pre_tokenizer = pre_tokenizer
    if normalizer:
        oracle.normalizer = normalizer
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet() if c not in without]
    oracle.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=3000, show_progress=False, initial_alphabet=alphabet))
    oracle.add_special_tokens([AddedToken(text, special=True) for text in specials])
    return json.loads(oracle.to_str())


def make_llama3():
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
             "<|eot_id|>", "<|eot_id|>|"]
    spec = train(split(LLAMA3), names)
    bos = spec["added_tokens"][0]
    oracle = Oracle.from_str(json.dumps(spec))
    oracle.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=bos["content"] + " $A",
                                      special_tokens=[(bos["content"], bos["id"])])])
    return json.loads(oracle.to_str())


def make_ignore_merges():
    """As Llama 3's file was made: merges = all pairs of tokens that spell a token, by rank; and
    tokens that no merge completes, which ignore_merges uses where they are a whole piece."""
    spec = make_llama3()
    model, added = spec["model"], {t["content"] for t in spec["added_tokens"]}
    tokens = [t for t in model["vocab"] if t not in added]
    vocab = {t: i for i, t in enumerate(tokens + ["ĠZzyzx", "qqwwq", "ĠQzxJwQ"])}
    merges = []
    for token in vocab:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in pairs if a in vocab and b in vocab]
        merges += [f"{a} {b}" for a, b in sorted(pairs, key=lambda p: (vocab[p[0]], vocab[p[1]]))]
    model.update(vocab=vocab, merges=merges, ignore_merges=True)
    for i, token in enumerate(spec["added_tokens"]):
        token["id"] = len(vocab) + i
    single = spec["post_processor"]["processors"][1]["special_tokens"]["<|begin_of_text|>"]
    single["ids"] = [spec["added_tokens"][0]["id"]]
    return spec


def make_qwen():
    return train(split(QWEN), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                 normalizers.NFC())


def make_gpt2():
    return train(byte_level(True), ["<|endoftext|>"])


def make_smollm2():
    steps = [pre_tokenizers.Digits(individual_digits=True), byte_level(True)]
    return train(pre_tokenizers.Sequence(steps), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


def make_olmo():
    """Split is written Removed + invert, added tokens stand in model.vocab too, one of them is not
    special, ids have a gap before the last."""
    spec = train(split(LLAMA3, "removed", True), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    name = "|||IP_ADDRESS|||"
    spec["added_tokens"].append(dict(spec["added_tokens"][0], id=3100, content=name, special=False,
                                     normalized=True))
    spec["model"]["vocab"] |= {t["content"]: t["id"] for t in spec["added_tokens"]}
    return spec


def make_shuffled():
    """Ids say nothing about the order of merges."""
    spec = train(split(QWEN), ["<|endoftext|>"])
    vocab = spec["model"]["vocab"]
    ids = list(vocab.values())
    random.Random(0).shuffle(ids)
    spec["model"]["vocab"] = dict(zip(vocab, ids))
    return spec


def make_extended():
    """Merges appended to a finished list, as when a vocabulary is extended: older merges take the
    parts of many new tokens first, so these are never built although a merge spells them."""
    spec = train(split(QWEN), ["<|endoftext|>"])
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    short, rng = [token for token in vocab if len(token) <= 4], random.Random(0)
    for left, right in (rng.sample(short, 2) for _ in range(4000)):
        if left + right not in vocab and right[0] != "Ġ":
            vocab[left + right] = len(vocab)
            merges.append([left, right])
    spec["added_tokens"][0]["id"] = len(vocab)
    return spec


MAKERS = {f.__name__[5:]: f for f in (make_llama3, make_ignore_merges, make_qwen, make_gpt2,
                                      make_smollm2, make_olmo, make_shuffled, make_extended)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(family) -> (directory, oracle, spec), made once."""
    made = {}

    def get(family):
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            spec = MAKERS[family]()
            (directory / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
            made[family] = directory, Oracle.from_file(str(directory / "tokenizer.json")), spec
        return made[family]
    return get


def write(directory, spec, config=None):
    (directory / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def rare_marks():
    """Characters that Python and `tokenizers` normalise differently (other Unicode versions)."""
    nfc = normalizers.NFC()
    rare = set()
    for c in map(chr, itertools.chain(range(0xD800), range(0xE000, 0x20000))):
        for text in (f"a\u0315{c}", f"a{c}\u0327", f"{c}\u0301"):
            if nfc.normalize_str(text) != unicodedata.normalize("NFC", text):
                rare.add(c)
    return rare


def adversarial_strings(specials, n=1050, seed=0):
    rng = random.Random(seed)
    words = ["don't", "DON'T", "I'LL", "'ſ", "we'Re", "x's", "naïve", "e\u0301", "A\u030a", "ﬁ",
             "ǅ", "1234567", "٣٤٥", "½²", "Ⅷ", "3.14", "", "self.", " return", "Zzyzx",
             "qqwwq", " QzxJwQ", "и и",
             "🙂", "👩‍👩‍👧‍👦", "🇩🇪", "你好", "안녕", "각", "\u1112\u1161\u11ab", "שָׁלוֹם", "نَصّ",
             "नमस्ते", "\ufeff", "\u200d", "\u00a0", "\u2003", "\u2028", "\x85",
             "\x0b", "\x1c", "\x00", "\x7f", "\xad",
             "\r\n", "\n", "\r", "\n\n", "\r\n\r\n", "\t", " ", "  ", "   ", " " * 40, "\n" * 9,
             " \n \n", "!!!", "...", "==" * 20, "/*", "()", "{}", "_", "-", "'", '"', "'s", "<|",
             "|>", "<|im_", "endoftext|>", *specials]
    ranges = [(32, 127), (0x80, 0x250), (0x300, 0x370), (0x370, 0x600), (0x900, 0x980),
              (0x1e00, 0x2000), (0x2000, 0x2070), (0x3000, 0x30ff), (0x4e00, 0x4f00),
              (0xac00, 0xad00), (0x1f300, 0x1f650)]
    for i in range(n):
        parts = []
        for _ in range(rng.randrange(1, 25)):
            kind = rng.random()
            if kind < .6:
                parts.append(rng.choice(words))
            elif kind < .9:
                a, b = rng.choice(ranges)
                parts.append("".join(chr(rng.randrange(a, b)) for _ in range(rng.randrange(1, 6))))
            else:
                text = rng.choice(CORPUS)
                start = rng.randrange(len(text))
                parts.append(text[start:start + rng.randrange(60)])
        yield "".join(parts)


@pytest.mark.parametrize("family", MAKERS)
def test_ids_equal_the_tokenizers_library(folder, family):
    directory, oracle, spec = folder(family)
    ours = Tokenizer(directory)
    specials = [token["content"] for token in spec["added_tokens"]]
    rare = rare_marks() if family == "qwen" else set()
    assert len(rare) < 200, "more than the rare marks of newer Unicode versions differ"
    n = 0
    for text in adversarial_strings(specials):
        if not rare.intersection(text):
            assert ours.encode(text) == oracle.encode(text).ids, repr(text)
            assert ours.encode(text, bos=False) == oracle.encode(text, add_special_tokens=False).ids
            n += 1
    assert n >= 1000
    for text in CORPUS:
        assert ours.encode(text) == oracle.encode(text).ids


@pytest.mark.parametrize("family", MAKERS)
def test_specials_false_keeps_specials_and_only_them_as_ordinary_text(folder, family):
    directory, oracle, spec = folder(family)
    ours, oracle = Tokenizer(directory), Oracle.from_str(oracle.to_str())
    oracle.encode_special_tokens = True
    special = {token["id"] for token in spec["added_tokens"] if token["special"]}
    contents = [token["content"] for token in spec["added_tokens"]]
    rare = rare_marks() if family == "qwen" else set()
    for text in [*contents, "".join(contents), *adversarial_strings(contents, n=400, seed=1)]:
        if not rare.intersection(text):
            ids = ours.encode(text, bos=False, specials=False)
            assert not special.intersection(ids)
            assert ids == oracle.encode(text, add_special_tokens=False).ids, repr(text)


# Special or not, cut out of raw or of normalised text, parts and overlaps of each other, accents.
OVERLAPS = [("<|im_start|>", True, False), ("<|im_start|>user", False, True),
            ("<|im_end|>", True, False), ("|><|", False, False), ("[MOL]", False, True),
            ("[MOL", False, False), ("MOL][M", False, True), ("<tool_call>", False, False),
            ("tool", True, True), ("caf\u00e9", False, True), ("fe\u0301", False, False),
            ("e\u0301s", False, True), ("\u1112\u1161\u11ab", False, True), (" lead", False, True),
            ("trail ", False, False), ("\n\n\n", False, True), ("aa", False, True),
            ("aaa", True, False), ("aaaa", False, False), ("\u212b", False, True)]


@pytest.mark.parametrize("family", ["qwen", "llama3"])
@pytest.mark.parametrize("specials", [True, False])
def test_added_tokens_are_cut_as_tokenizers_cuts_them(folder, tmp_path, family, specials):
    """Strings of added tokens, their parts, overlaps and decomposed forms."""
    spec = json.loads(json.dumps(folder(family)[2]))
    known = {token["content"] for token in spec["added_tokens"]}
    for content, special, normalized in OVERLAPS:
        if content not in known:
            spec["added_tokens"].append(dict(
                spec["added_tokens"][0], id=1 + max(t["id"] for t in spec["added_tokens"]),
                content=content, special=special, normalized=normalized))
    ours = Tokenizer(write(tmp_path, spec))
    oracle = Oracle.from_file(str(tmp_path / "tokenizer.json"))
    oracle.encode_special_tokens = not specials
    rng, n = random.Random(family), 0
    words = [content for content, _, _ in OVERLAPS]
    words += [unicodedata.normalize(form, w) for w in words for form in ("NFC", "NFD")]
    words += [w[a:b] for w in words for a, b in ((0, -1), (1, None), (0, 3), (-3, None))]
    for _ in range(1200):
        text = "".join(rng.choice(words) if rng.random() < .8 else rng.choice(" ax\n[<|e\u0301")
                       for _ in range(rng.randrange(1, 12)))
        expected = oracle.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, bos=False, specials=specials) == expected, repr(text)
        n += any(i >= 3000 for i in expected)
    assert n > 800  # most strings hold added tokens


def test_ordinary_text_never_becomes_an_added_token(folder, tmp_path):
    """Even a word that is a whole piece, in a vocabulary that ignores merges and lists it."""
    spec = json.loads(json.dumps(folder("ignore_merges")[2]))
    spec["added_tokens"][-1]["content"] = "STOPWORD"
    spec["model"]["vocab"]["STOPWORD"] = stop = spec["added_tokens"][-1]["id"]
    ours = Tokenizer(write(tmp_path, spec))
    assert ours.encode("STOPWORD", bos=False) == [stop]
    assert stop not in ours.encode("STOPWORD", specials=False)


@pytest.mark.parametrize("family", [f for f in MAKERS if f != "qwen"])
def test_decode_inverts_encode(folder, family):
    ours = Tokenizer(folder(family)[0])
    for text in adversarial_strings(["<|endoftext|>"], n=300):
        assert ours.decode(ours.encode(text, bos=False)) == text


def test_bos_follows_the_post_processor_unless_told(folder, tmp_path):
    ours, oracle = Tokenizer(folder("llama3")[0]), folder("llama3")[1]
    bos = oracle.token_to_id("<|begin_of_text|>")
    assert ours.adds_bos and ours.bos_id == bos
    assert ours.encode("x")[0] == ours.encode("x", bos=True)[0] == bos
    assert ours.encode("x", bos=False) == ours.encode("x")[1:]
    # A bos_token in the config alone is known, but not put in front.
    directory, oracle, spec = folder("gpt2")
    ours = Tokenizer(write(tmp_path, spec, {"bos_token": {"content": "<|endoftext|>"}}))
    assert not ours.adds_bos and ours.encode("x") == oracle.encode("x").ids
    assert ours.encode("x", bos=True)[0] == ours.bos_id == oracle.token_to_id("<|endoftext|>")
    with pytest.raises(ValueError, match="no BOS"):
        Tokenizer(directory).encode("x", bos=True)


def test_decode_survives_padding_rows_and_broken_utf8(folder):
    ours, oracle = Tokenizer(folder("olmo")[0]), folder("olmo")[1]
    assert ours.vocab_size == 3101 == 1 + max(oracle.get_vocab().values())
    assert ours.decode([ours.vocab_size, 10**6, -1, *ours.encode("ok"), 3050]) == "ok"
    euro = Tokenizer(folder("gpt2")[0]).encode("\U0001f0a1")
    assert Tokenizer(folder("gpt2")[0]).decode(euro[:-1]) == "\ufffd"
    assert ours.decode([ours.added["<|im_end|>"]]) == "<|im_end|>"


@pytest.mark.parametrize("space", [" ", "\t", " \n", "\u2003"])
def test_a_million_spaces_do_not_panic(folder, space):
    ours, oracle = Tokenizer(folder("gpt2")[0]), folder("gpt2")[1]
    short = "a" + (space * 100_000)[:100_000] + "b"
    assert ours.encode(short) == oracle.encode(short).ids
    long = "a" + (space * 1_000_000)[:1_000_000] + "b"
    assert ours.decode(ours.encode(long)) == long


def test_long_text_is_not_cut(folder):
    ours, oracle = Tokenizer(folder("llama3")[0]), folder("llama3")[1]
    for text in ("".join(CORPUS), "a" * 450_000, "word " * 100_000, "1" * 450_000):
        assert ours.encode(text) == oracle.encode(text).ids


def test_a_byte_without_a_token_is_dropped(tmp_path):
    directory = write(tmp_path, train(byte_level(True), [], without="Āđ"))  # NUL and DC1
    oracle, ours = Oracle.from_file(str(directory / "tokenizer.json")), Tokenizer(directory)
    text = "zero\x00width \x11 and \U0001f642"
    assert ours.encode(text) == oracle.encode(text).ids
    assert ours.decode(ours.encode(text)) == "zerowidth  and \U0001f642"


def test_a_character_that_is_a_special_token_is_still_text(folder, tmp_path):
    """Llama 3 and Qwen with "!" (id 0) for padding: flagged special, it must not leave the text."""
    spec = json.loads(json.dumps(folder("qwen")[2]))
    mark = {**spec["added_tokens"][0], "content": "!", "id": spec["model"]["vocab"]["!"],
            "special": True}
    spec["added_tokens"].insert(0, mark)
    ours = Tokenizer(write(tmp_path, spec))
    oracle = Oracle.from_file(str(tmp_path / "tokenizer.json"))
    oracle.encode_special_tokens = True  # as ordinary text
    expected = oracle.encode("Stop! Go!", add_special_tokens=False).ids
    assert ours.encode("Stop! Go!", bos=False, specials=False) == expected
    assert ours.decode(expected) == "Stop! Go!"


def test_lone_surrogates_do_not_crash(folder):
    assert "\ufffd" in Tokenizer(folder("qwen")[0]).decode(
        Tokenizer(folder("qwen")[0]).encode("a\ud83d b"))


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
REFUSALS = {
    "Metaspace": lambda spec: spec.update(pre_tokenizer=METASPACE),
    "SentencePiece": lambda spec: (spec.pop("pre_tokenizer"), spec["model"]["vocab"].update(
        {"\u2581a": 9000}), spec["model"]["merges"].append(["\u2581", "a"])),
    "Whitespace": lambda spec: spec.update(pre_tokenizer={"type": "Whitespace"}),
    "add_prefix_space": lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True),
    "Lowercase": lambda spec: spec.update(normalizer={"type": "Lowercase"}),
    "byte_fallback": lambda spec: spec["model"].update(byte_fallback=True),
    "model.type 'Unigram'": lambda spec: spec.update(model={"type": "Unigram", "vocab": []}),
    "unk_token": lambda spec: (spec["model"].update(unk_token="a"),
                               spec["model"]["vocab"].pop("!")),
    "lstrip": lambda spec: spec["added_tokens"][0].update(lstrip=True),
    "RobertaProcessing": lambda spec: spec.update(post_processor={"type": "RobertaProcessing"}),
    "does not match": lambda spec: spec.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\p{L}+|\s+"}, "behavior": "Isolated",
         "invert": False}, dict(spec["pre_tokenizer"], use_regex=False)]}),
    r"1,3}\+' in the pattern": lambda spec: spec.update(pre_tokenizer={
        "type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}+|\P{N}"}, "behavior": "Isolated",
             "invert": False}, dict(spec["pre_tokenizer"], use_regex=False)]}),
    r"\(\?m' in the pattern": lambda spec: spec.update(pre_tokenizer={
        "type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\p{L}+|(?m:.)"}, "behavior": "Isolated",
             "invert": False}, dict(spec["pre_tokenizer"], use_regex=False)]}),
    "ignore_merges with 'qzqz'": lambda spec: (  # two tokens spell it, and no merge
        spec["model"].update(ignore_merges=True), spec["model"]["vocab"].update(qz=9000, qzqz=9001),
        spec["model"]["merges"].append(["q", "z"])),
    "the id 7 of": lambda spec: spec["added_tokens"][0].update(id=7),
    "damaged": lambda spec: spec.pop("model"),
}


@pytest.mark.parametrize("word", REFUSALS)
def test_what_cannot_be_expressed_is_refused_by_name(folder, tmp_path, word):
    spec = json.loads(json.dumps(folder("gpt2")[2]))
    REFUSALS[word](spec)
    with pytest.raises(ValueError, match=word) as error:
        Tokenizer(write(tmp_path, spec))
    assert str(tmp_path / "tokenizer.json") in str(error.value)


def test_an_added_token_that_tokenizer_json_lacks_is_refused(folder, tmp_path):
    """transformers adds it; here it would be letters without a word."""
    write(tmp_path, folder("gpt2")[2])
    token = folder("gpt2")[2]["added_tokens"][0]
    for content, refused in ((token["content"], False), ("<|later|>", True)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(
            {"added_tokens_decoder": {"9000": {**token, "content": content}}}))
        if refused:
            with pytest.raises(ValueError, match=r"'<\|later\|>', which tokenizer_config.json adds"):
                Tokenizer(tmp_path)
        else:
            assert Tokenizer(tmp_path).added[content] == token["id"]


def test_keys_that_a_file_may_leave_out(folder, tmp_path):
    tokenizers, spec = pytest.importorskip("tokenizers"), json.loads(json.dumps(folder("gpt2")[2]))
    for key in ("normalizer", "post_processor", "added_tokens"):
        spec.pop(key)
    ours = Tokenizer(write(tmp_path, spec))
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ours.encode("It's 42, eh?") == hf.encode("It's 42, eh?").ids


def test_missing_and_torn_files_are_named_with_a_remedy(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json is missing: copy it"):
        Tokenizer(tmp_path)
    text = json.dumps(folder("gpt2")[2])
    for damaged in (text[:len(text) // 2].encode(), b"\xff\xfe\x00", b"[" * 100_000, b"[]"):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        with pytest.raises(ValueError, match="tokenizer.json .*copy the file again"):
            Tokenizer(tmp_path)
    write(tmp_path, folder("gpt2")[2], "not an object")
    with pytest.raises(ValueError, match="tokenizer_config.json .*copy the file again"):
        Tokenizer(tmp_path)
