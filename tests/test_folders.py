"""Checkpoints as they lie on the hub: families, odd files, refusals; the oracle is transformers.

Run: python -m pytest tests/test_folders.py
"""

import json
import math
import os
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import (ModelConfig, Transformer, generate, load_pretrained, load_with_tokenizer,
                   read_json, save_pretrained, save_tensors, student_from_teacher)

SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=300, max_position_embeddings=256, eos_token_id=1,
             bos_token_id=2, pad_token_id=0)
FAMILIES = {
    "smollm3": ("smollm3", {}),  # every fourth layer without positions, tied, theta 2e6
    "smollm3-listed": ("smollm3", dict(no_rope_layers=[0, 1, 1, 0, 1], tie_word_embeddings=False)),
    "smollm3-sliding": ("smollm3", dict(use_sliding_window=True, sliding_window=16)),
    "ministral": ("ministral", dict(sliding_window=16, head_dim=32, layer_types=[
        "sliding_attention", "full_attention", "sliding_attention", "sliding_attention",
        "full_attention"])),
    "ministral-sliding": ("ministral", dict(sliding_window=12, head_dim=16)),
    "granite": ("granite", dict(embedding_multiplier=6.0, residual_multiplier=0.4,
                                attention_multiplier=0.1, logits_scaling=0.5)),
    "granite-biased": ("granite", dict(attention_bias=True, mlp_bias=True, logits_scaling=2.0,
                                       attention_multiplier=0.2, tie_word_embeddings=True)),
    "llama-linear": ("llama", dict(rope_parameters=dict(  # the last is YaRN's alone
        rope_type="linear", rope_theta=1e4, factor=4.0, attention_factor=1.3))),
}


@pytest.fixture
def copied(folders, tmp_path):
    """A folder that a test may damage."""
    shutil.copytree(folders("smollm3")[0], tmp_path / "m")
    return tmp_path / "m"


def change_json(path, **changes):
    path.write_text(json.dumps({**read_json(path, {}), **changes}))


TOKENS = torch.randint(0, 300, (2, 60), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers(folders, family):
    folder, hf = folders(family)
    expected = hf(TOKENS).logits
    assert expected.std() > 1  # otherwise the comparison proves little
    assert (load_pretrained(folder)(TOKENS) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["smollm3-listed", "ministral", "granite"])
@torch.no_grad()
def test_a_setting_overlooked_would_show(folders, tmp_path, family):
    """The oracle of the test above can tell: without its special setting a family is far off."""
    folder, hf = folders(family)
    shutil.copytree(folder, tmp_path / "m")
    change_json(tmp_path / "m/config.json", no_rope_layers=[1] * 5, layer_types=[
        "full_attention"] * 5, attention_multiplier=0.25)
    assert (load_pretrained(tmp_path / "m")(TOKENS) - hf(TOKENS).logits).abs().max() > 0.1


@pytest.mark.parametrize("family", ["smollm3", "granite"])
@torch.no_grad()
def test_a_students_cache_and_folder_know_the_family_too(folders, tmp_path, family):
    student = student_from_teacher(load_pretrained(folders(family)[0]), window=8, sinks=2)
    save_pretrained(student, tmp_path / "s")
    student = load_pretrained(tmp_path / "s")
    prompt = TOKENS[:1, :20]
    new = generate(student, prompt, max_new_tokens=6, stop=())
    assert torch.equal(new[:, 20:], student(new)[:, 19:-1].argmax(-1))


@torch.no_grad()
def test_defaults_of_a_short_config_are_transformers(folders, tmp_path):
    """What config.json leaves out means what it means there: theta 2e6, tied, NoPE every fourth."""
    folder, hf = folders("smollm3")
    shutil.copytree(folder, tmp_path / "m")
    short = {k: v for k, v in read_json(folder / "config.json").items() if k not in (
        "rope_parameters", "rope_theta", "no_rope_layers", "layer_types", "tie_word_embeddings",
        "no_rope_layer_interval", "rms_norm_eps", "num_key_value_heads")}
    (tmp_path / "m/config.json").write_text(json.dumps({**short, "num_key_value_heads": 2}))
    assert (load_pretrained(tmp_path / "m")(TOKENS) - hf(TOKENS).logits).abs().max() < 1e-4


@torch.no_grad()
def test_fewer_and_more_layers_take_turns_as_the_familys_do(folders):
    """What --plan and `speed --random-layers` measure by: of SmolLM3 every fourth has no RoPE."""
    config = ModelConfig.from_hf(folders("smollm3")[0])
    for n in (2, 4, 9):
        some = config.with_layers(n)
        assert [rope.factor for rope in some.layer_ropes] == [
            math.inf if i % 5 == 3 else 1.0 for i in range(n)]  # of 5 layers the fourth
        assert Transformer(some)(TOKENS).isfinite().all()


@torch.no_grad()
def test_mistral_with_layer_types_is_ministral(folders, tmp_path):
    """So transformers' AutoConfig reads it; as Mistral's, all layers would slide."""
    folder, hf = folders("ministral")
    shutil.copytree(folder, tmp_path / "m")
    change_json(tmp_path / "m/config.json", model_type="mistral")
    assert (load_pretrained(tmp_path / "m")(TOKENS) - hf(TOKENS).logits).abs().max() < 1e-4


@torch.no_grad()
def test_smollm3_slides_by_its_list_whatever_the_switch_says(folders, tmp_path):
    folder, hf = folders("smollm3-listed")
    shutil.copytree(folder, tmp_path / "m")
    change_json(tmp_path / "m/config.json", use_sliding_window=False, sliding_window=8,
                layer_types=["full_attention", "sliding_attention"] * 2 + ["full_attention"])
    switched = type(hf).from_pretrained(tmp_path / "m", attn_implementation="eager")
    expected = switched(TOKENS).logits
    assert (expected - hf(TOKENS).logits).abs().max() > 0.1
    assert (load_pretrained(tmp_path / "m")(TOKENS) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("keys", [(), ("dtype",), ("torch_dtype",), ("dtype", "torch_dtype")])
def test_a_saved_config_names_the_dtype_of_its_tensors(copied, tmp_path, keys):
    config = read_json(copied / "config.json")
    config = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
    (copied / "config.json").write_text(json.dumps({**config, **dict.fromkeys(keys, "float32")}))
    model = load_pretrained(copied, dtype=torch.bfloat16)
    model.source = str(model.source)  # a user may set it
    save_pretrained(model, tmp_path / "half")
    saved = read_json(tmp_path / "half/config.json")
    assert {k: saved[k] for k in saved if "dtype" in k} == dict.fromkeys(
        keys or ("dtype",), "bfloat16")


def test_a_folder_in_the_place_of_the_weights_is_named(copied):
    (copied / "model.safetensors").unlink()
    (copied / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match="model.safetensors is truncated, no safetensors file"):
        load_pretrained(copied)


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize("changes, words", [
    (dict(rope_scaling=YARN, rope_parameters={"rope_theta": 1e4}), "differ: keep one"),
    (dict(rope_parameters={**YARN, "factor": -4.0}), "factor = -4.0"),
    (dict(rope_parameters={**YARN, "rope_theta": 1}), "rope_theta = 1"),
    (dict(rope_parameters={"rope_theta": "1e4"}), "rope_theta = '1e4'"),
    (dict(rope_parameters={**YARN, "original_max_position_embeddings": "64"}), "= '64'"),
    (dict(rope_parameters={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor"),
    (dict(rope_parameters={"full_attention": YARN}), "Olmo 3's alone"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps = nan"), (dict(head_dim=8.0), "head_dim = 8.0"),
    (dict(use_sliding_window=True, sliding_window=0, layer_types=["sliding_attention"] * 5),
     "sliding_window = 0"),
    (dict(no_rope_layer_interval=0, no_rope_layers=None), "cannot be"),
    (dict(no_rope_layers=[1]), "cannot be"), (dict(hybrid={"mixer": "nope"}), "mixer 'nope'"),
    (dict(hybrid={"window": "9"}), "window '9'"), (dict(hybrid={"sinks": -1}), "sinks -1")])
def test_settings_that_cannot_be_are_refused_by_name(copied, changes, words):
    change_json(copied / "config.json", **changes)
    with pytest.raises(ValueError) as error:
        ModelConfig.from_hf(copied)
    assert words in str(error.value) and str(copied / "config.json") in str(error.value)


@pytest.mark.parametrize("kinds", [["full_attention"] * 4, ["linear_attention"] * 5])
def test_layer_types_that_mean_nothing_are_refused(copied, kinds):
    change_json(copied / "config.json", layer_types=kinds)
    with pytest.raises(ValueError, match="layer_types must be 5 times"):
        ModelConfig.from_hf(copied)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("eos", [300, [1, 10**6], -1, "2"])
def test_an_eos_id_outside_the_vocabulary_is_said_or_refused(copied, file, eos, capsys):
    """transformers writes Olmo's 50279 into the config.json of however small a model."""
    change_json(copied / "config.json", eos_token_id=None)
    (copied / "generation_config.json").unlink(missing_ok=True)
    change_json(copied / file, eos_token_id=eos)
    if eos in (-1, "2"):
        with pytest.raises(ValueError, match="eos_token_id .* is no token id") as error:
            ModelConfig.from_hf(copied)
        said = str(error.value)
    else:
        assert ModelConfig.from_hf(copied).eos_ids == (() if eos == 300 else (1,))
        said = capsys.readouterr().out
        assert "not all in the vocabulary of 300" in said
    assert str(copied) in said and file in said


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "fp8"])
def test_a_quantised_checkpoint_is_refused_by_its_name(copied, method):
    change_json(copied / "config.json", quantization_config={"quant_method": method})
    with pytest.raises(ValueError, match=f"quantised by {method}.*fetch the original"):
        load_pretrained(copied)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_numbers_that_are_no_floats_are_no_weights(copied, dtype):
    path = copied / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} is .*plain floats") as error:
        load_pretrained(copied)
    assert str(path) in str(error.value)


@torch.no_grad()
def test_a_tied_head_may_be_a_copy_but_not_another_one(copied, folders):
    path, hf = copied / "model.safetensors", folders("smollm3")[1]
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    assert (load_pretrained(copied)(TOKENS) - hf(TOKENS).logits).abs().max() < 1e-4
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        load_pretrained(copied)
    longer = tensors | {"lm_head.weight": tensors["lm_head.weight"].repeat(2, 1)}
    save_file(longer, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight is \(600, .*by config.json absent"):
        load_pretrained(copied)
    save_file(tensors, path, metadata={"format": "pt"})
    change_json(copied / "config.json", tie_word_embeddings=False)  # the remedy works
    untied = type(hf).from_pretrained(copied, attn_implementation="eager")
    assert (load_pretrained(copied)(TOKENS) - untied(TOKENS).logits).abs().max() < 1e-4


def test_an_index_beside_a_whole_file_is_refused(copied):
    (copied / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match="move away the one that is not meant"):
        load_pretrained(copied)


def test_a_name_of_the_hub_and_its_cache_get_a_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="hf download org/name --local-dir DIR"):
        load_pretrained("org/name")
    snapshot = tmp_path / "models--org--name/snapshots/0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"the snapshot inside: {snapshot}"):
        load_pretrained(tmp_path / "models--org--name")


def test_json_that_is_no_object_is_refused(copied):
    (copied / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="config.json is no JSON object"):
        ModelConfig.from_hf(copied)


def test_a_device_that_is_not_there_is_refused_in_one_sentence(copied):
    for load in (load_pretrained, load_with_tokenizer):
        for device in ("mps", "cuda:99", "nonsense"):
            with pytest.raises(ValueError, match=f"device {device}: this torch cannot use it") as error:
                load(copied, device=device)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_saved_files_have_the_mode_that_the_umask_says(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_tensors({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o666 & ~mask
