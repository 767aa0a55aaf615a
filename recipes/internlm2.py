"""InternLM2 -> Llama, once: the same network under other names, with q, k and v in one matrix.

    python -m recipes.internlm2 internlm/internlm2_5-1_8b --out models/internlm2_5-1_8b

What it writes is an ordinary Llama checkpoint for train.py and transformers alike. No code of the source is
run. To read its tokeniser takes `pip install sentencepiece protobuf`.
"""
import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from plumbing.checkpoint import directory_of
from plumbing.terminal import one_line

NAMES = {"tok_embeddings": "embed_tokens", "output.weight": "lm_head.weight",
         "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj",
         "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj"}


def as_llama(name, tensor, heads, key_heads):
    """{name: tensor} of one of InternLM2's tensors. In wqkv, the query heads of each key head are followed by
    that key head and its value head."""
    if "attention.wqkv" in name:
        groups = tensor.view(key_heads, heads // key_heads + 2, -1, tensor.shape[1])  # [K, H/K + 2, h, D]
        parts = groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)
        return {name.replace("attention.wqkv", f"self_attn.{x}_proj"): part for x, part in zip("qkv", parts)}
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return {name: tensor}


def convert(source, out):
    """Writes the directory `out`, a file of weights for each of the source's."""
    from transformers import AutoTokenizer
    source = directory_of(source)
    config = json.loads((source / "config.json").read_text())
    if config["model_type"] != "internlm2" or config.pop("bias", False):
        raise ValueError(f"{source} is no internlm2 checkpoint without biases")
    # add_bos_token: InternLM2's own tokeniser, whose code is not run, adds one.
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, add_bos_token=True)
    tokenizer.init_kwargs.pop("auto_map", None)
    tokenizer.save_pretrained(out)
    weight_map = {}
    for path in sorted(source.glob("model*.safetensors")):
        weights = {}
        for name, tensor in load_file(path).items():
            weights |= as_llama(name, tensor, config["num_attention_heads"], config["num_key_value_heads"])
        weights = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(weights, out / path.name, {"format": "pt"})
        weight_map |= dict.fromkeys(weights, path.name)
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    if (source / "generation_config.json").exists():
        shutil.copy(source / "generation_config.json", out)
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config.pop("auto_map", None)
    (out / "config.json").write_text(json.dumps(config, indent=2))  # last: without it, `out` is no checkpoint


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert an InternLM2 checkpoint to a Llama directory.")
    parser.add_argument("source", help="a directory or a Hugging Face hub name")
    parser.add_argument("--out", required=True, type=Path, help="directory to write")
    args = parser.parse_args()
    with one_line("internlm2.py", (ValueError, OSError, KeyError)):
        convert(args.source, args.out)
