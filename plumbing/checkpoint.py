"""Checkpoints: ordinary Hugging Face directories, in and out.

`load` reads what transformers' `save_pretrained` wrote, `save` writes what its `from_pretrained` reads. Code
that comes with a checkpoint is never run.
"""
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch

from model import Config, Transformer, merge_lora
from plumbing.text import turn_ends


def directory_of(source):
    """Path of a checkpoint: a directory, or a name on the Hugging Face hub, which is downloaded once."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download  # comes with transformers
    files = ["*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=files))
    except Exception as error:  # no such name, a gated one, no connection: each raises something else
        why = " ".join(str(error).split())
        raise ValueError(f"no such directory, and the hub says: {why}") from error


def hf_weights(model):
    """{Hugging Face's name: view into our weights}: loading copies into the views, saving writes them. Only
    here do the names differ: q, k and v, which all read the same input, are one matrix, hence one GEMM; so
    are gate and up."""
    head_dim, weights = model.config.head_dim, {}
    qkv_sizes = [heads * head_dim for heads in model.layers[0].self_attn.heads]
    parts = {"qkv_proj": (("q_proj", "k_proj", "v_proj"), qkv_sizes),
             "gate_up_proj": (("gate_proj", "up_proj"), [model.config.intermediate_size] * 2)}
    for name, weight in model.state_dict().items():
        name = name if name.startswith("lm_head") else "model." + name
        fused = next((fused for fused in parts if fused in name), None)
        names, sizes = parts.get(fused, ([name], [len(weight)]))
        for part, view in zip(names, weight.split(sizes)):
            weights[name.replace(fused, part) if fused else part] = view
    return weights


def load_weights(model, directory):
    """Copies a checkpoint's safetensors into the model, one tensor at a time."""
    from safetensors import safe_open
    missing = hf_weights(model)
    for path in sorted(directory.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if name == "lm_head.weight" and model.config.tie_word_embeddings or "rotary_emb" in name:
                    continue  # some exporters write the tied matrix twice, or (Llama 2) RoPE's frequencies
                if name not in missing or list(missing[name].shape) != file.get_slice(name).get_shape():
                    raise ValueError(f"weights and config.json disagree about {name!r} in {path.name}")
                missing.pop(name).copy_(file.get_tensor(name))
    if missing:
        raise ValueError(f"no model*.safetensors, or not all of it there: no {', '.join(missing)}")


def fingerprint(model, tokenizer, stops):
    """A hash of all that a checkpoint's figures depend on: a path may hold another model than it did
    yesterday. It reads every weight, at a second or two a gigabyte."""
    words = sorted(tokenizer.get_vocab().items())
    digest = hashlib.sha256(f"{model.config}{stops}{words}{tokenizer.chat_template}".encode())
    for weight in model.parameters():
        digest.update(weight.detach().contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()[:16]


def load(source, device="cpu", dtype=torch.float32):
    """(model, tokenizer, stops) from a Hugging Face directory or hub name. `stops`: the ids of the tokens
    that end a response, a sorted tuple. ValueError, one line that names the source: a file is missing or
    broken, or the architecture is not implemented."""
    from transformers import AutoTokenizer
    try:
        directory = directory_of(source)
        if (directory / "adapter_config.json").exists():
            raise ValueError("an adapter without its base: peft's merge_and_unload makes one model of both")
        if [*directory.glob("*.bin")] and not [*directory.glob("model*.safetensors")]:
            raise ValueError("weights in .bin files: transformers' save_pretrained makes safetensors of them")
        hf = json.loads((directory / "config.json").read_text())
        with torch.device("meta"):  # shapes only: no time is spent on random weights
            model = Transformer(Config.from_hf(hf))
        model = model.to(dtype).to_empty(device=device)
        load_weights(model, directory)
        if not model(torch.zeros(1, 1, dtype=torch.long, device=device)).isfinite().all():
            raise ValueError("its output is not finite")  # other faults show in the call itself
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        tokenizer.decode(tokenizer("1").input_ids)
        model.num_tokens = min(1 + max(tokenizer.get_vocab().values()), model.config.vocab_size)
        generation = directory / "generation_config.json"
        generation = json.loads(generation.read_text()) if generation.exists() else {}
        stops = generation.get("eos_token_id")
        stops = {*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id} - {None}
        stops |= turn_ends(tokenizer)
        if not stops <= set(range(model.num_tokens)):
            raise ValueError(f"stop tokens {sorted(stops)} are not all below {model.num_tokens}")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a broken file makes the libraries below raise whatever they like
        what = f"no {error} in config.json" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"model {source} cannot be loaded: {what:.300}") from error
    tokenizer.init_kwargs.pop("auto_map", None)  # the checkpoint's code: no copy of ours shall run it
    model.hf_generation = generation
    model.hf_config = {key: value for key, value in hf.items() if key != "auto_map"}
    return model, tokenizer, tuple(sorted(stops))


def save(model, tokenizer, stops, directory):
    """Writes config.json, model.safetensors and the tokeniser as transformers' `from_pretrained` reads them,
    beside a directory of that name, which it then replaces. Adapters are merged first, for good. OSError if
    the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    merge_lora(model)
    directory = Path(directory)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = str(model.layers[0].self_attn.o_proj.weight.dtype).removeprefix("torch.")
    (partial / "config.json").write_text(json.dumps(model.hf_config | {"dtype": dtype}, indent=2))
    generation = getattr(model, "hf_generation", {}) | {"eos_token_id": list(stops)}
    (partial / "generation_config.json").write_text(json.dumps(generation))
    try:
        save_file(hf_weights(model), partial / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(partial / "config.json", partial / "model.safetensors")  # else its owner's alone
    except SafetensorError as error:  # the disk is full
        raise OSError(str(error)) from error
    tokenizer.save_pretrained(partial)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)
