"""Every check of the repository, in the order of the files: model, sample, anneal, grpo, reward, eval, train.

    pytest test_all.py

"Trap n" names a way small GRPO code goes wrong without crashing; its test fails if that bug is put back. Nothing is
downloaded: models are tiny and random, or pretrained for a second by recipes/family.py.
"""
import copy
import gc
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import anneal
import eval as evaluation
import grpo
import model as models
import reward
import sample as sampling
import train as training
from recipes import claims, pairs
from recipes import family as families
from recipes.family import make_family

ROOT = Path(__file__).parent
TINY = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "hidden_act": "silu"}


def tiny_model(kind="qwen3", seed=0, scale=0.4, **changes):
    """A random model, with weights large enough for its distributions to be far from uniform."""
    hf = TINY | {"model_type": kind, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} | changes
    model = models.Transformer(models.Config.from_hf(hf))
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.normal_(0, scale, generator=generator) if p.dim() > 1 else p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
    model.hf_config, model.stop_ids = hf, (0,)
    return model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def handlers():
    """Puts back what runs do to signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """A family that adds two digits, often wrongly: real checkpoints with rewards to learn from, in a few seconds."""
    out = tmp_path_factory.mktemp("family") / "sums"
    corpus = [(f"{a}+{b}=", str((a + b) % 10)) for a in range(10) for b in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "make_corpus", lambda task, size, seed, noise: corpus * 16)
        patch.setattr(families, "make_problems", lambda *args, **kwargs: [])
        make_family(out, "natural", sizes={"explorer": (16, 1), "learner": (24, 2)}, corpus_size=480, epochs=18)
    problems = [reward.Problem(question, answer, "natural") for question, answer in corpus]
    random.Random(0).shuffle(problems)
    reward.save_problems(problems[:10], out / "heldout.jsonl")
    reward.save_problems(problems[10:], out / "train.jsonl")
    return out


def run_cli(script, *args, cwd=ROOT):
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], capture_output=True, text=True, cwd=cwd)


# ---- model.py ------------------------------------------------------------------------------------------------------

def hf_pair(kind, tmp_path, **changes):
    """(transformers' random model of this architecture, its directory), sizes as small as they go."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from recipes.family import make_tokenizer
    make_tokenizer(tmp_path).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **TINY | {"vocab_size": 64, "head_dim": 8, "eos_token_id": 0, "bos_token_id": None} | changes)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    for p in theirs.parameters():
        p.data.normal_(0.5 if p.dim() == 1 else 0, 0.3)  # biases and norms too, so that forgetting one shows
    theirs.save_pretrained(tmp_path)
    return theirs, tmp_path


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind, options", [
    ("qwen3", {}), ("qwen2", {}), ("llama", {}), ("mistral", {"sliding_window": 32}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 16}})])
def test_logits_equal_transformers_both_ways(kind, options, tie, tmp_path):
    from transformers import AutoModelForCausalLM
    theirs, directory = hf_pair(kind, tmp_path / "theirs", tie_word_embeddings=tie, **options)
    ours, tokenizer = models.load(directory)
    ids = torch.randint(0, 64, (3, 20), generator=seeded())
    logits = lambda m: m(ids) @ (m.embed_tokens if tie else m.lm_head).weight.T
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (logits(ours) - expected).abs().max() < 1e-4
        assert expected.std() > 0.1  # and they are not all alike
        models.save(ours, tokenizer, tmp_path / "ours")
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
        assert (back(ids).logits - expected).abs().max() < 1e-4


def test_a_sliding_window_limits_the_context_and_nothing_else():
    assert models.Config.from_hf(TINY | {"model_type": "mistral", "sliding_window": 40}).max_position_embeddings == 40
    assert models.Config.from_hf(TINY | {"model_type": "mistral", "sliding_window": None}).max_position_embeddings == 64
    assert models.Config.from_hf(TINY | {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}).max_position_embeddings == 64


@pytest.mark.parametrize("heads, key_heads", [(4, 2), (4, 4), (4, 1)])
def test_internlm2_is_llama_under_other_names(heads, key_heads, tmp_path):
    """Against transformers' Llama, whose weights are packed here as InternLM2's published modelling code reads them: it
    views wqkv's output as (key heads, query heads of each + 2, head size)."""
    from transformers import AutoModelForCausalLM
    theirs, directory = hf_pair("llama", tmp_path, num_attention_heads=heads, num_key_value_heads=key_heads, tie_word_embeddings=False)
    weights = dict(models.read_safetensors(directory / "model.safetensors"))
    packed = {"model.tok_embeddings.weight": weights["model.embed_tokens.weight"], "model.norm.weight": weights["model.norm.weight"],
              "output.weight": weights["lm_head.weight"]}
    for i in range(2):
        ours, other = f"model.layers.{i}.", f"model.layers.{i}."
        q, k, v = (weights[ours + f"self_attn.{x}_proj.weight"].view(-1, 8, 32) for x in "qkv")
        per_key = heads // key_heads
        packed[other + "attention.wqkv.weight"] = torch.cat([torch.cat([q[j * per_key:(j + 1) * per_key], k[j:j + 1], v[j:j + 1]])
                                                             for j in range(key_heads)]).flatten(0, 1)
        for a, b in (("self_attn.o_proj", "attention.wo"), ("mlp.gate_proj", "feed_forward.w1"), ("mlp.up_proj", "feed_forward.w3"),
                     ("mlp.down_proj", "feed_forward.w2"), ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm")):
            packed[other + b + ".weight"] = weights[ours + a + ".weight"]
    models.write_safetensors(directory / "model.safetensors", packed)
    hf = json.loads((directory / "config.json").read_text())
    hf |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False, "rope_theta": 1e4,
           "rope_scaling": {"type": "dynamic", "factor": 2.0}, "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"}}
    del hf["rope_parameters"]
    (directory / "config.json").write_text(json.dumps(hf))
    model, tokenizer = models.load(directory)
    ids = torch.randint(0, 64, (3, 20), generator=seeded())
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (model(ids) @ model.lm_head.weight.T - expected).abs().max() < 1e-4
        models.save(model, tokenizer, tmp_path / "saved")
        assert (AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()(ids).logits - expected).abs().max() < 1e-4
    models.write_safetensors(directory / "model.safetensors", packed | {"model.layers.0.attention.wqkv.weight": torch.zeros(9, 32)})
    with pytest.raises(ValueError, match="attention.wqkv.*9, 32.*not wanted"):
        models.load(directory)


def test_internlm2_tokenizer_is_read_without_running_its_code(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="pip install sentencepiece protobuf")
    _, directory = hf_pair("llama", tmp_path, vocab_size=300, tie_word_embeddings=True)
    (directory / "tokenizer.json").unlink()
    (directory / "text").write_text("\n".join(f"The sum of {a} and {b} is {a + b}. " for a in range(60) for b in range(60)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"), model_prefix=str(directory / "tokenizer"), vocab_size=299, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, pad_id=-1, minloglevel=2)
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "auto_map": {"AutoTokenizer": ["evil.InternLM2Tokenizer", None]}, "tokenizer_class": "InternLM2Tokenizer", "bos_token": "<s>",
        "eos_token": "</s>", "unk_token": "<unk>"}))
    (directory / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    hf = json.loads((directory / "config.json").read_text()) | {"model_type": "internlm2"}
    (directory / "config.json").write_text(json.dumps(hf))
    processor, text = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model")), "The sum of 日本\n\n and  3"
    _, tokenizer = models.load(directory)
    assert tokenizer(text).input_ids == [1, *processor.encode(text)] and tokenizer.decode(processor.encode(text)) == text
    assert tokenizer.eos_token_id == 2


def test_traps_1_27_load_knows_the_vocabulary_and_every_stop_id(tmp_path):
    _, directory = hf_pair("qwen3", tmp_path)
    (directory / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    model, tokenizer = models.load(directory)
    assert model.stop_ids == (0, 3, 5)  # generation_config's and the tokeniser's
    assert model.num_tokens == len(tokenizer) == len(model.head) < model.config.vocab_size == 64


def test_masked_cache_slots_do_no_harm(monkeypatch):
    """A masked slot enters attention as 0 * value; a cache that is not zeroed would turn that into NaN."""
    monkeypatch.setattr(torch, "empty", lambda shape, **options: torch.full(shape, torch.nan, **options))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape: self.new_full(shape, torch.nan))
    r = sampling.sample(tiny_model(scale=0.2), [[5, 6], [7, 8, 9, 10, 11, 3, 2]], 4, seeded(), 8)
    assert torch.isfinite(r.logps).all()


@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
def test_lora_trains_adapters_alone_and_is_merged_on_save(kind, tmp_path):
    model, tokenizer = models.load(hf_pair(kind, tmp_path / "base")[1])
    before, base = {name: w.clone() for name, w in model.state_dict().items()}, model
    prompts, settings = [[5, 6], [7, 8, 9]], dict(n=4, max_new_tokens=12)
    plain = sampling.sample(model, prompts, generator=seeded(), **settings)
    reference = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    models.add_lora(model, 3, seeded())
    assert torch.equal(sampling.sample(model, prompts, generator=seeded(), **settings).logps, plain.logps)  # B is 0
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 4 and all(name.endswith((".A", ".B")) for name in trained)
    optimizer, args = grpo.Optimizer(model, 1e-2), training.parse_args(["--max-new-tokens", "12", "--kl-coef", "0.1"])
    for seed in range(3):
        rollouts = sampling.sample(model, prompts, generator=seeded(seed), **settings)
        # the sampler and the trainer both see the adapters
        assert torch.allclose(recomputed(model, prompts, rollouts)[0], rollouts.logps, atol=1e-4)
        metrics = grpo.update(args, model, reference, optimizer, prompts, rollouts, torch.randn(2, 4, generator=seeded(seed)), seeded())
    assert metrics["kl"] > 1e-4  # the learner has moved, its reference has not
    assert torch.allclose(recomputed(reference, prompts, plain)[0], plain.logps, atol=1e-4)
    assert all(torch.equal(w, before[name]) for name, w in reference.state_dict().items())
    assert {p.data_ptr() for p in reference.parameters()} <= {p.data_ptr() for p in base.parameters()}  # at no memory
    expected = recomputed(model, prompts, plain)[0]
    assert (expected - plain.logps).abs().max() > 1e-2
    models.save(model, tokenizer, tmp_path / "merged")
    merged, _ = models.load(tmp_path / "merged")
    assert torch.allclose(recomputed(merged, prompts, plain)[0], expected, atol=1e-4)


def test_merging_into_bfloat16_weights_loses_nothing(tmp_path):
    model, tokenizer = models.load(hf_pair("llama", tmp_path / "base")[1], dtype=torch.bfloat16)
    models.add_lora(model, 3, seeded())
    for linear in (module for module in model.modules() if isinstance(module, models.Linear)):
        linear.B.data.normal_(0, 1e-4, generator=seeded())  # bfloat16 weights of .3 move in steps of 1e-3 and more
    linear = model.layers[1].self_attn.o_proj
    exact = linear.weight.float() + 32 / 3 * linear.B.float() @ linear.A.float()
    assert (exact.bfloat16() == linear.weight).float().mean() > 0.5
    models.save(model, tokenizer, tmp_path / "merged")
    assert (models.load(tmp_path / "merged")[0].layers[1].self_attn.o_proj.weight - exact).abs().max() < 1e-7


def test_lora_leaves_the_output_matrix_without_a_gradient():
    h, w, targets, upstream = fused_case(torch.float32)
    expected = torch.autograd.grad(models.fused_logprobs(h, w, targets)[0], h, upstream)[0]
    assert torch.equal(torch.autograd.grad(models.fused_logprobs(h, w.detach(), targets)[0], h, upstream)[0], expected)


@pytest.mark.parametrize("rank", [0, 2])
def test_checkpointed_layers_keep_less_and_give_the_same_gradient(rank):
    gradients, kept = [], []
    for on in (False, True):
        model, count = tiny_model(scale=0.2, num_hidden_layers=6), []
        if rank:
            models.add_lora(model, rank, seeded())
            [nn_linear.B.data.normal_(0, 0.1, generator=seeded(1)) for nn_linear in model.modules() if isinstance(nn_linear, models.Linear)]
        model.checkpoint_layers = on
        with torch.autograd.graph.saved_tensors_hooks(lambda x: count.append(x.numel()) or x, lambda x: x):
            hidden = model(torch.randint(1, 20, (4, 30), generator=seeded()))
        hidden.square().sum().backward()
        kept.append(sum(count))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6) and gradients[0].norm() > 1 and kept[1] < kept[0] / 3


def test_sharded_checkpoint_loads(tmp_path):
    theirs, directory = hf_pair("llama", tmp_path)
    whole = dict(models.read_safetensors(directory / "model.safetensors"))
    (directory / "model.safetensors").unlink()
    theirs.save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    ours, _ = models.load(directory)
    weights = models.hf_weights(ours)
    assert weights.keys() == whole.keys() and all(torch.equal(weights[name], whole[name]) for name in whole)


def test_safetensors_agree_with_the_library(tmp_path):
    from safetensors.torch import load_file, save_file
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "scalar": torch.tensor(2.5), "h": torch.randn(2, 2).half()}
    models.write_safetensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    for loaded in (load_file(tmp_path / "ours"), *(dict(models.read_safetensors(tmp_path / name)) for name in ("theirs", "ours"))):
        assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    data = (tmp_path / "ours").read_bytes()
    for damaged in (b"", data[:5], data[:40], data[:-1], b"\xff" * 100):
        (tmp_path / "cut").write_bytes(damaged)
        with pytest.raises(ValueError, match="cut: .* damaged"):
            list(models.read_safetensors(tmp_path / "cut"))
    with pytest.raises(OSError, match=tmp_path.name):
        list(models.read_safetensors(tmp_path))


@pytest.mark.parametrize("header", [
    '[]', '5', '{"a": 5}', '{"a": {"shape": [4], "data_offsets": [0, 16]}, "b": B}', '{"a": {"dtype": "F32", "data_offsets": [0, 16]}, "b": B}',
    '{"a": {"dtype": "F32", "shape": [4]}, "b": B}', '{"a": A, "b": B, "b": B}', '{"a": A, "b": A}', '{"a": A}', '{"a": A, "b": B, "c": A}',
    *('{"a": {"dtype": %s, "shape": %s, "data_offsets": %s}, "b": B}' % entry for entry in [
        ('"I64"', "[2]", "[0, 16]"), ("[]", "[4]", "[0, 16]"), ('"F32"', '"4"', "[0, 16]"), ('"F32"', "[5]", "[0, 16]"), ('"F32"', "[4]", "[0]"),
        ('"F32"', "[-2, -2]", "[0, 16]"), ('"F32"', "[4]", "[16, 0]"), ('"F32"', "[4]", "[-16, 0]"), ('"F32"', "[4]", "[24, 40]"),
        ('"F32"', "[4.0]", "[0, 16]"), ('"F32"', "[4]", '["0", "16"]'), ('"F32"', "[0, %d]" % 2 ** 70, "[0, 0]")])])
def test_a_wrong_safetensors_header_is_refused(header, tmp_path):
    good = '{"a": A, "b": B}'

    def read(header):
        header = header.replace("A", '{"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}', header.count(": A"))
        text = header.replace(": B", ': {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 32]}').encode()
        (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + bytes(32))
        return dict(models.read_safetensors(tmp_path / "file"))

    assert read(good).keys() == {"a", "b"}
    with pytest.raises(ValueError, match="file: .* damaged"):
        read(header)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return hf_pair("qwen3", tmp_path_factory.mktemp("checkpoint"))[1]


@pytest.mark.parametrize("name, change, complaint", [
    ("config.json", b"{", "not valid JSON"), ("config.json", b"[]", "not a JSON object"), ("config.json", b"\xff", "can't decode"),
    ("config.json", {"hidden_size": None}, "hidden_size None"), ("config.json", {"vocab_size": ...}, "no 'vocab_size'"),
    ("config.json", {"vocab_size": -64}, "vocab_size -64"), ("config.json", {"num_attention_heads": 0, "head_dim": None}, "by zero"),
    ("config.json", {"vocab_size": 2 ** 62}, "vocab_size"), ("config.json", {"vocab_size": 2 ** 24, "hidden_size": 2 ** 24}, "alloc|memory"),
    ("config.json", {"num_hidden_layers": 10 ** 6}, "number of layers"), ("config.json", {"num_key_value_heads": 3}, "of heads"),
    ("config.json", {"head_dim": 7}, "size of a head"), ("config.json", {"rms_norm_eps": "x"}, "rms_norm_eps 'x'"),
    ("config.json", {"rope_parameters": [1]}, "list"), ("config.json", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "no 'factor'"),
    ("config.json", {"model_type": "gpt2"}, "gpt2"), ("config.json", {"hidden_size": 16}, "weights and config.json disagree"),
    ("config.json", {"tie_word_embeddings": "no"}, "tie_word_embeddings 'no'"), ("model.safetensors", None, "no model.safetensors"),
    ("model.safetensors.index.json", b"{", "not valid JSON"), ("model.safetensors.index.json", b"{}", "weight_map"),
    *(("model.safetensors.index.json", json.dumps({"weight_map": {"a": shard}}).encode(), complaint) for shard, complaint in (
        ("../model.safetensors", "in the same directory"), ("/etc/model.safetensors", "in the same directory"), ("a\\b.safetensors", "same directory"),
        ("..", "in the same directory"), (5, "in the same directory"), (["x"], "same directory"), ("gone.safetensors", "no gone.safetensors"))),
    ("generation_config.json", b"nul", "not valid JSON"), *(("generation_config.json", {"eos_token_id": stop}, "stop tokens") for stop in (
        "0", [0, 64], -1, 1.0, True, {})), ("tokenizer.json", b"{}", "no tokeniser"), ("tokenizer_config.json", b"\xff", "no tokeniser"),
    ("tokenizer_config.json", {"model_max_length": {}}, "no tokeniser")])
def test_a_broken_checkpoint_is_refused_in_one_line(name, change, complaint, checkpoint, tmp_path):
    directory = shutil.copytree(checkpoint, tmp_path / "model")
    (directory / "notes.md").write_bytes(b"\xff")  # what belongs to nobody is nobody's business
    file = directory / name
    if isinstance(change, dict):
        hf = json.loads(file.read_text()) | change
        change = json.dumps({key: value for key, value in hf.items() if value is not ...}).encode()
    if change is None:
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(change)
    with pytest.raises(ValueError, match=complaint) as refused:
        models.load(directory)
    assert str(directory) in str(refused.value) and "\n" not in str(refused.value)


def test_a_prompt_of_tokens_that_the_model_has_not_is_refused():
    with pytest.raises(ValueError, match="prompt 2 holds token 24 "):
        sampling.sample(tiny_model(), [[1], [3, 24]], 1, seeded(), 2)


@pytest.mark.parametrize("change, named", [
    ({"model_type": "gpt2"}, "gpt2"), ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"hidden_act": "gelu"}, "gelu"), ({"attention_bias": True}, "attention_bias"), ({"bias": True}, "bias")])
def test_what_is_not_implemented_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        tiny_model(**change)


def test_trap_2_padding_does_not_move_positions():
    model = tiny_model()
    short, long = [5, 7, 2], [9, 3, 4, 8, 1, 6, 2, 11, 12]
    alone = sampling.sample(model, [short], 1, seeded(), 12, temperature=0)
    together = sampling.sample(model, [long, short], 1, seeded(), 12, temperature=0)
    assert torch.equal(alone.ids[0], together.ids[1])
    with torch.no_grad():
        padded = torch.tensor([short + [0] * 6, long])
        assert torch.allclose(model(padded)[0, :3], model(torch.tensor([short]))[0], atol=1e-5)


def test_rms_norm_takes_its_statistics_in_fp32():
    norm, x = models.RMSNorm(256, 1e-6).bfloat16(), torch.randn(64, 256, generator=seeded()).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), exact.to(torch.bfloat16))


def fused_case(dtype, tokens=40, vocabulary=3000, hidden=48):
    g = seeded()
    h, w = torch.randn(tokens, hidden, generator=g), torch.randn(vocabulary, hidden, generator=g)
    return (h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), torch.randint(0, vocabulary, (tokens,), generator=g),
            torch.randn(tokens, generator=g))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("chunk", [1024, 4096])  # several chunks, of which the last is short; and a single one
def test_fused_logprobs_equal_the_naive_ones(dtype, tolerance, chunk, compile):
    h, w, targets, upstream = fused_case(dtype)
    for temperature in (1.0, 0.7):
        naive = models.naive_logprobs(h, w, targets, temperature)
        fused, entropy = models.fused_logprobs(h, w, targets, temperature, chunk, compile)
        assert fused.dtype == torch.float32 and torch.allclose(fused, naive, atol=1e-4)
        p = ((h @ w.T).float() / temperature).softmax(-1)
        assert torch.allclose(entropy, -(p * p.log().clamp(min=-1e4)).sum(-1), atol=1e-4)
        for ours, reference in zip(torch.autograd.grad(fused, (h, w), upstream), torch.autograd.grad(naive, (h, w), upstream)):
            assert (ours - reference).abs().max() <= tolerance * reference.abs().max()


def test_bf16_gradients_of_many_chunks_are_summed_in_fp32():
    h, w, targets, upstream = fused_case(torch.bfloat16)
    exact = torch.autograd.grad(models.naive_logprobs(h.double(), w.double(), targets), h, upstream.double())[0]
    error = {}
    for chunk in (3000, 20):
        gradient = torch.autograd.grad(models.fused_logprobs(h, w, targets, chunk=chunk)[0], h, upstream)[0]
        error[chunk] = (gradient - exact).norm() / exact.norm()
    assert error[20] < 1.05 * error[3000]  # 150 chunks round no worse than one; summed in bf16 they do by a fifth


def test_fused_logprobs_never_hold_tokens_by_vocabulary():
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            Largest.seen = max([Largest.seen] + [x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)])
            return out

    h, w, targets, upstream = fused_case(torch.float32, tokens=200, hidden=8)
    with Largest():
        models.fused_logprobs(h, w, targets, chunk=256)[0].backward(upstream)
    assert Largest.seen <= 200 * 256 < 200 * 3000


def test_trap_6_log_softmax_is_fp32_in_bf16_models():
    h, w, targets, _ = fused_case(torch.bfloat16)
    logits = (h @ w.T).detach()
    exact = logits.double().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    in_bf16 = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    for ours in (models.naive_logprobs(h, w, targets), models.fused_logprobs(h, w, targets)[0]):
        assert (ours - exact).abs().max() < 1e-4 < (in_bf16 - exact).abs().max()


# ---- sample.py -----------------------------------------------------------------------------------------------------

def test_trap_1_mask_holds_the_first_stop_token_and_nothing_after_it():
    model = tiny_model(scale=0.2)
    model.stop_ids = (0, 3, 4)  # several stop ids, and 0 is also the padding
    r = sampling.sample(model, [[5, 6], [7, 8, 9]], 50, seeded(), 20)
    assert 0 < r.finished.float().mean() < 1  # both kinds are there
    for ids, length, finished, mask in zip(r.ids.flatten(0, 1), r.lengths.flatten(), r.finished.flatten(), r.mask.flatten(0, 1)):
        stops = [i for i, token in enumerate(ids[:length].tolist()) if token in model.stop_ids]
        assert stops == ([length - 1] if finished else []) and (finished or length == 20)
        assert mask.tolist() == [i < length for i in range(20)]
    assert not r.ids[~r.mask].any() and not r.logps[~r.mask].any()  # finished rows emit nothing (trap 20)


def recomputed(model, prompts, r, temperature=1.0):
    """The trainer's log-probs of rollouts, in the rollouts' shape."""
    rows = [prompt for prompt in prompts for _ in range(r.ids.shape[1])]
    with torch.no_grad():
        logps, entropies = grpo.response_logprobs(model, rows, r.ids.flatten(0, 1), r.mask.flatten(0, 1), temperature)
    return logps.view(r.ids.shape), entropies.view(r.ids.shape)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_traps_4_5_20_sampler_and_trainer_agree(temperature):
    """KV-cached log-probs, with mixed lengths and rows leaving the batch, equal the full forward pass: the ratio is 1."""
    model, prompts = tiny_model(scale=0.25), [[5, 6], [7, 8, 9, 10, 11, 3, 2], [1]]
    r = sampling.sample(model, prompts, 30, seeded(), 24, temperature)
    assert r.lengths.min() < 6 and r.lengths.max() == 24
    logps, _ = recomputed(model, prompts, r, temperature)
    assert torch.allclose(logps, r.logps, atol=1e-5)
    other, _ = recomputed(model, prompts, r, 1.0 if temperature == 0.7 else 0.7)
    assert (other - r.logps).abs().max() > 0.1  # and the temperature matters
    assert all(len(set(group.tolist())) > 1 for group in r.ids[:, :, 0])  # rows of a group draw different first tokens


def test_greedy_equals_transformers_generate(tmp_path):
    theirs, directory = hf_pair("qwen3", tmp_path)
    ours, _ = models.load(directory)
    ours.num_tokens = 64  # this test's random model uses every id
    prompt = [5, 9, 13, 2]
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)[0, len(prompt):].tolist()
    r = sampling.sample(ours, [prompt], 1, seeded(), 20, temperature=0)
    assert r.ids[0, 0, :r.lengths[0, 0]].tolist() == expected


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.8), (7, 0.6)])
def test_draw_follows_the_truncated_distribution(top_k, top_p):
    """Log-probs equal transformers' warpers', renormalised (trap 5), and frequencies follow them."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    logits = torch.randn(1, 24, generator=seeded()) * 2
    expected = TemperatureLogitsWarper(0.7)(None, logits)
    expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
    expected = (TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected).log_softmax(-1)[0]
    n = 50_000
    tokens, logps = sampling.draw(logits.expand(n, -1), torch.rand(n, generator=seeded(1)), 0.7, top_k, top_p)
    assert torch.allclose(logps, expected[tokens], atol=1e-5)
    frequency = torch.bincount(tokens, minlength=24) / n
    assert (frequency - expected.exp()).abs().max() < 5 * math.sqrt(0.25 / n)
    assert not frequency[expected == -torch.inf].any()


def test_draw_at_the_ends_of_the_unit_interval():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    tokens, _ = sampling.draw(logits, torch.tensor([0.0, 1 - 2 ** -24]))
    assert tokens.tolist() == [1, 2]  # never a token of probability 0


def test_presence_penalty_counts_what_was_written():
    model = tiny_model()
    model.stop_ids = ()
    free = sampling.sample(model, [[5]], 1, seeded(), 20, temperature=0)
    penalised = sampling.sample(model, [[5]], 1, seeded(), 20, temperature=0, presence_penalty=1e4)
    assert len(set(free.ids[0, 0].tolist())) < 20 and len(set(penalised.ids[0, 0].tolist())) == 20


@pytest.mark.parametrize("settings", [{"n": 0}, {"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}])
def test_sampling_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="cannot sample"):
        sampling.sample(tiny_model(), [[5]], **{"n": 1, "generator": seeded(), "max_new_tokens": 2} | settings)


@pytest.mark.parametrize("compile", [False, True])
def test_trap_19_the_next_rollout_sees_updated_weights(compile):
    """Neither the eager step nor a compiled one keeps anything of the weights between calls; and both draw the same."""
    model, fresh = tiny_model(seed=0), tiny_model(seed=1)
    model.compiled = compile
    settings = dict(prompts=[[5, 6], [7]], n=4, max_new_tokens=12)
    before = sampling.sample(model, generator=seeded(), **settings)
    with torch.no_grad():
        for p, q in zip(model.parameters(), fresh.parameters()):
            p.copy_(q)
    after = sampling.sample(model, generator=seeded(), **settings)
    assert torch.equal(after.ids, sampling.sample(fresh, generator=seeded(), **settings).ids) and not torch.equal(after.ids, before.ids)
    assert torch.allclose(recomputed(fresh, settings["prompts"], after)[0], after.logps, atol=1e-5)


@pytest.mark.parametrize("kind, options", [("qwen3", {}), ("qwen2", {}), ("llama", {"num_key_value_heads": 1})])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_decode_step_equals_the_whole_sequence_forward(kind, options, dtype, tolerance):
    """The fast path against its slow reference: rows of different lengths, one token appended to each."""
    model = tiny_model(model_type=kind, scale=0.2, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "bias" in name:
                p.add_(torch.randn(p.shape, generator=seeded(3)) * 0.3)
        model = model.to(dtype)
        prompts, tokens = [[5, 6], [7, 8, 9, 10, 11, 3, 2], [1]], torch.tensor([4, 9, 2, 2, 7, 3])
        _, prefilled = sampling.prefill(model, prompts)
        cache = sampling.KVCache(model, 6, 9)
        cache.put(torch.arange(6), prefilled, torch.tensor([0, 0, 1, 1, 2, 2]))
        logits = sampling.decode_step(model, tokens, cache, 8)
        for row, token, prompt in zip(logits, tokens.tolist(), [prompt for prompt in prompts for _ in range(2)]):
            expected = model(torch.tensor([prompt + [token]]))[0, -1] @ model.head.T
            assert (row - expected.float()).abs().max() < tolerance < 0.3 * expected.std()


def test_freed_rows_are_refilled_with_waiting_prompts():
    """Many prompts through few rows: the same rollouts as all at once, in fewer steps than batch after batch."""
    model, prompts = tiny_model(scale=0.25), [[i % 20 + 1, 5][:1 + i % 2] for i in range(24)]
    whole = sampling.sample(model, prompts, 4, seeded(), 30)
    steps = []
    original, sampling.decode_step = sampling.decode_step, lambda *a: (steps.append(len(a[1])), original(*a))[1]
    try:
        few = sampling.sample(model, prompts, 4, seeded(), 30, rows=16)
    finally:
        sampling.decode_step = original
    for name in ("ids", "lengths", "finished"):
        assert torch.equal(getattr(few, name), getattr(whole, name))
    assert torch.allclose(few.logps, whole.logps, atol=1e-5)
    one_batch_after_the_other = sum(whole.lengths[i:i + 4].max().item() - 1 for i in range(0, 24, 4))
    assert max(steps) == 16 and len(steps) < 0.9 * one_batch_after_the_other


def test_a_row_does_not_depend_on_the_rows_beside_it():
    model, prompts = tiny_model(scale=0.2), [[5, 6], [7, 8, 9], [4]]
    whole = sampling.sample(model, prompts, 8, seeded(), 16)
    sliced = sampling.sample(model, prompts, 8, seeded(), 16, rows=8)
    assert torch.equal(whole.ids, sliced.ids)


def test_trap_27_vocabulary_padding_is_never_sampled_nor_normalised_over():
    model, prompts = tiny_model(scale=0.1), [[5, 6]]
    model.num_tokens = 10  # ids 10..23 are padding
    r = sampling.sample(model, prompts, 200, seeded(), 8)
    assert r.ids.max() == 9
    logps, entropies = recomputed(model, prompts, r)
    assert torch.allclose(logps, r.logps, atol=1e-5) and entropies.max() <= math.log(10) + 1e-4


def test_trap_10_groups_are_kept_by_place_not_by_prompt():
    """Duplicate prompts stay separate groups, and mixing keeps every group's rows together."""
    model, prompts = tiny_model(), [[5, 6], [7], [5, 6]]
    a = sampling.sample(model, prompts, 2, seeded(), 5, from_explorer=True)
    b = sampling.sample(model, prompts, 3, seeded(1), 9)
    both = sampling.mix(a, b)
    assert both.ids.shape == (3, 5, 9) and both.from_explorer.tolist() == [[True, True, False, False, False]] * 3
    assert torch.equal(both.ids[:, :2, :5], a.ids) and torch.equal(both.ids[:, 2:], b.ids) and not both.mask[:, :2, 5:].any()
    assert not torch.equal(b.ids[0], b.ids[2])  # the same prompt twice: two groups of their own
    stacked = sampling.mix(a.groups([2, 0]), a, dim=0)
    assert torch.equal(stacked.ids, a.ids[[2, 0, 0, 1, 2]]) and torch.equal(stacked.lengths, a.lengths[[2, 0, 0, 1, 2]])


def test_trap_22_exactly_one_bos(tmp_path):
    from transformers import PreTrainedTokenizerFast
    vocabulary = {"<bos>": 0, "<eos>": 1} | {chr(i): i - 30 for i in range(32, 127)}
    special = dict(special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
    (tmp_path / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None, "decoder": None,
        "added_tokens": [{"id": 0, "content": "<bos>"} | special, {"id": 1, "content": "<eos>"} | special],
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                           "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                           "special_tokens": {"<bos>": {"id": "<bos>", "ids": [0], "tokens": ["<bos>"]}}},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<bos>", eos_token="<eos>")
    problem = reward.Problem("2+2?", "4")
    plain = sampling.encode_prompt(problem, tokenizer)
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }} A:"
    chat = sampling.encode_prompt(problem, tokenizer)
    assert plain.count(0) == chat.count(0) == 1 and plain[0] == chat[0] == 0


# ---- anneal.py -----------------------------------------------------------------------------------------------------

def test_trap_28_counts_are_exact_and_sum_to_the_group():
    for schedule, mix, G in itertools.product(anneal.SCHEDULES, range(1, 40), (2, 3, 7, 10, 16, 100)):
        for step in range(1, mix + 3):
            share = anneal.explorer_share(step, mix, schedule, 0.3)
            explorer, learner = anneal.split_group(share, G)
            assert 0 <= explorer <= G and explorer + learner == G and type(explorer) is int
            if schedule == "linear":
                alpha = Fraction(mix - step, mix - 1) if 1 <= step <= mix > 1 else Fraction(int(step <= mix))
                assert explorer == math.ceil(alpha * G), f"step {step} of {mix}, G = {G}"


def test_schedules():
    shares = lambda schedule: [anneal.explorer_share(step, 5, schedule, 0.3) for step in range(1, 8)]
    assert shares("linear") == [1, 0.75, 0.5, 0.25, 0, 0, 0]
    assert shares("step") == [1, 1, 1, 1, 1, 0, 0] and shares("none") == [0] * 7 and shares("constant") == [0.3] * 7
    cosine = shares("cosine")
    assert cosine[0] == 1 and cosine[2] == 0.5 and cosine[4:] == [0, 0, 0] and cosine[1] > 0.75 and cosine[3] < 0.25
    assert anneal.explorer_share(1, 1) == 1 and anneal.explorer_share(2, 1) == 0


def test_measured_share_follows_what_the_explorer_adds_and_leaves_for_good():
    explorer = torch.tensor([[True, True, False, False]] * 4)
    rewards = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])  # rescued, rescued, solved, neither
    success = anneal.observe((0.5, 0.5), rewards, explorer, decay=0.8)
    assert success == pytest.approx((0.8 * 0.5 + 0.2 * 0.5, 0.8 * 0.5 + 0.2 * 0.25))
    share = lambda *success: anneal.explorer_share(1, 1, "measured", success=success)
    assert share(0.3, 0.1) == pytest.approx(0.75) and share(0.1, 0.3) == pytest.approx(0.25) and share(0, 0) == 0.5
    assert share(0.01, 0.1) == 0 and anneal.split_group(1.0, 16, at_least=1) == (15, 1) and anneal.split_group(0.5, 16, at_least=1) == (8, 8)
    success, shares = (0.5, 0.5), []
    for step in range(40):  # a learner that solves every group from step 20 on: what it solves is not the explorer's success
        solved = torch.tensor([[1.0, 1, step >= 20, 1 * (step >= 20)]] * 4)
        present = explorer if share(*success) else torch.zeros_like(explorer)
        success = anneal.observe(success, solved, present)
        shares.append(share(*success))
    assert shares[19] > 0.95 and shares[-1] == 0 and sorted(shares[19:], reverse=True) == shares[19:]


def test_anneal_prints_the_papers_table():
    lines = run_cli("anneal.py", "--steps", 16, "--mix-steps", 8, "--group-size", 16).stdout.splitlines()
    counts = [tuple(map(int, line.split()[2:4])) for line in lines[1:17]]
    assert counts == [(16, 0), (14, 2), (12, 4), (10, 6), (7, 9), (5, 11), (3, 13)] + [(0, 16)] * 9


# ---- grpo.py -------------------------------------------------------------------------------------------------------

def test_advantages_of_one_group_by_hand():
    A = grpo.group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert torch.allclose(A, torch.tensor([[1.5, -0.5, -0.5, -0.5]]), atol=1e-4)  # mean 1/4, std (ddof 1) 1/2
    assert torch.allclose(grpo.group_advantages(torch.tensor([[1.0, 0.0]]), scale=False), torch.tensor([[0.5, -0.5]]))


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 2.2])
def test_trap_7_equal_rewards_give_exactly_zero(value):
    assert not grpo.group_advantages(torch.full((2, 24), value)).any()


def test_trap_8_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        grpo.group_advantages(torch.ones(4, 1))


def test_trap_9_groups_do_not_move_each_other():
    rewards = torch.rand(2, 8, generator=seeded())
    A = grpo.group_advantages(rewards + torch.tensor([[0.0], [100.0]]))
    assert torch.allclose(A.sum(1), torch.zeros(2), atol=1e-3)
    assert torch.allclose(A[:1], grpo.group_advantages(rewards[:1]), atol=1e-3)


class Bigram:
    """pi(next | previous) from a table: hidden states are one-hot, so hidden @ head.T looks the logits up."""

    compiled = False

    def __init__(self, table):
        self.head = table.log().T  # [V out, V in]

    def __call__(self, ids):
        return F.one_hot(ids, self.head.shape[1]).float()


def test_trap_3_logprobs_are_not_shifted():
    table = torch.tensor([[.5, .3, .2], [.1, .2, .7], [.6, .3, .1]])
    ids, mask = torch.tensor([[2, 0, 1], [1, 0, 0]]), torch.tensor([[True, True, True], [True, False, False]])
    logps, entropies = grpo.response_logprobs(Bigram(table), [[0, 1], [2]], ids, mask)
    by_hand = torch.tensor([[.7, .6, .3], [.3, 1, 1]]).log()  # 1 -> 2 -> 0 -> 1;  2 -> 1
    assert torch.allclose(logps, by_hand, atol=1e-6)
    assert torch.isclose(entropies[1, 0], -(table[2] * table[2].log()).sum()) and entropies[1, 1] == 0


ONE = torch.ones(1, 1, dtype=torch.bool)


def test_trap_14_the_clip_has_the_right_sign():
    """Gradient of the loss by the log-prob: -A * ratio where it counts, 0 only where the step has gone far enough."""
    for A, ratio, passes in ((1, 0.5, True), (1, 1.0, True), (1, 1.5, False), (-1, 0.5, False), (-1, 1.0, True), (-1, 1.5, True)):
        logps = torch.tensor([[math.log(ratio)]], requires_grad=True)
        loss, got, clipped = grpo.policy_loss(logps, torch.zeros(1, 1), torch.tensor([float(A)]), torch.ones(1, 1), ONE)
        loss.backward()
        assert math.isclose(logps.grad.item(), -A * ratio if passes else 0.0, abs_tol=1e-6)
        assert clipped.item() == (not passes) and math.isclose(got.item(), ratio, rel_tol=1e-6)


def test_clip_higher_is_separate():
    for high, gradient in ((0.2, 0.0), (0.28, -1.25)):
        logps = torch.tensor([[math.log(1.25)]], requires_grad=True)
        grpo.policy_loss(logps, torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1), ONE, 0.2, high)[0].backward()
        assert math.isclose(logps.grad.item(), gradient, rel_tol=1e-5)


def random_rows(lengths=(3, 6, 1, 4), seed=0):
    g = seeded(seed)
    N, T = len(lengths), max(lengths)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    return (torch.randn(N, T, generator=g, requires_grad=True), torch.randn(N, T, generator=g), torch.randn(N, generator=g), mask)


def test_trap_15_token_ratios_unless_gspo():
    logps, old, A, mask = random_rows()
    weights = grpo.token_weights(mask, "grpo", 6)
    _, ratio, _ = grpo.policy_loss(logps, old, A, weights, mask)
    assert ratio.shape == mask.shape and torch.allclose(ratio[mask], (logps - old).exp()[mask])
    _, ratio, _ = grpo.policy_loss(logps, old, A, weights, mask, sequence_ratio=True)
    for row, valid, difference in zip(ratio, mask, logps - old):
        assert torch.allclose(row, difference[valid].mean().exp().expand_as(row))


def test_trap_17_loss_zero_at_ratio_one_still_has_reinforces_gradient():
    logps, _, _, mask = random_rows((4, 4, 4, 4))
    A = grpo.group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]])).flatten()
    weights = grpo.token_weights(mask, "grpo", 4)
    loss, _, _ = grpo.policy_loss(logps, logps.detach(), A, weights, mask)
    gradient, = torch.autograd.grad(loss, logps)
    reinforce, = torch.autograd.grad(-(weights * A[:, None] * logps).sum(), logps)
    assert loss.abs() < 1e-6 and torch.allclose(gradient, reinforce) and gradient.abs().min() > 0.01


def test_trap_18_weight_per_token_of_each_loss():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()  # the second row is twice as long
    expected = {"grpo": (1 / 4, 1 / 8), "gspo": (1 / 4, 1 / 8), "dapo": (1 / 6, 1 / 6), "dr_grpo": (1 / 16, 1 / 16)}
    for loss, (short, long) in expected.items():
        weights = grpo.token_weights(mask, loss, max_new_tokens=8)
        assert torch.allclose(weights, mask * torch.tensor([[short], [long]]))


def test_traps_12_13_inputs_stay_and_an_empty_row_is_harmless():
    logps, old, A, mask = random_rows((3, 0, 6))
    with torch.no_grad():
        old[1] = -torch.inf  # whatever stands where no token is
    copies = [x.clone() for x in (logps, old, A, mask)]
    for loss in grpo.LOSSES:
        weights = grpo.token_weights(mask, loss, 6)
        value, _, _ = grpo.policy_loss(logps, old, A, weights, mask, sequence_ratio=loss == "gspo")
        gradient, = torch.autograd.grad(value + grpo.kl_penalty(logps, old, weights, mask), logps)
        assert torch.isfinite(value) and torch.isfinite(gradient).all() and not gradient[~mask].any() and gradient[mask].any()
        if loss == "dapo":
            assert torch.isclose(weights.sum(), torch.tensor(1.0)) and torch.isclose(1 / weights.max(), mask.sum().float())
    assert all(torch.equal(x, y) for x, y in zip((logps, old, A, mask), copies))


def test_trap_16_gradients_of_the_kl_estimators():
    """Expected over a 6-token vocabulary, every token weighted by its probability."""
    g = seeded()
    ref = torch.randn(6, generator=g).log_softmax(-1)
    logits = torch.randn(6, generator=g, requires_grad=True)
    logp = logits.log_softmax(-1)
    p = logp.exp().detach()
    every = torch.ones(1, 6, dtype=torch.bool)
    estimate = lambda k: grpo.kl_penalty(logp[None], ref[None], p[None], every, k)
    expected = lambda k: torch.autograd.grad(estimate(k), logits, retain_graph=True)[0]
    reverse, = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    forward, = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), logits, retain_graph=True)
    assert expected("k1").abs().max() < 1e-6 < reverse.abs().max()
    assert torch.allclose(expected("k2"), reverse, atol=1e-6) and torch.allclose(expected("k3"), forward, atol=1e-6)
    assert not torch.allclose(reverse, forward, atol=1e-3)
    value = (p * (logp - ref)).sum()
    assert all(torch.isclose(estimate(k), value) for k in ("k1", "k3"))


def test_trap_26_what_divides_in_the_ratio_of_explorer_tokens():
    learner, sampler = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]]), torch.tensor([[-3.0, -1.0], [-1.1, -2.1]])
    explorer, A, mask = torch.tensor([True, False]), torch.tensor([-1.0, -1.0]), torch.ones(2, 2, dtype=torch.bool)
    given = learner, sampler, explorer, A, mask
    old, weight = grpo.off_policy_correction("recompute", *given)
    assert torch.equal(old, learner) and (weight == 1).all()
    old, weight = grpo.off_policy_correction("behaviour", *given)
    assert torch.equal(old[0], sampler[0]) and torch.equal(old[1], learner[1]) and (weight == 1).all()
    old, weight = grpo.off_policy_correction("truncated", *given)
    assert torch.equal(old, learner) and torch.allclose(weight, torch.tensor([[2.0, math.exp(-1)], [1.0, 1.0]]))
    old, weight = grpo.off_policy_correction("geometric", *given)
    assert torch.equal(old, learner) and torch.allclose(weight, torch.tensor([[math.exp(0.5)] * 2, [1.0, 1.0]]))
    mask[0, 1] = False  # then only the first token's log-ratio of 2 counts, and is cut
    padded = [x.masked_fill(~mask, 0.0) for x in (learner, sampler)]
    assert grpo.off_policy_correction("geometric", *padded, explorer, A, mask)[1][0, 0] == 2
    old, weight = grpo.off_policy_correction("positive", *given)
    assert torch.equal(old, learner) and weight.tolist() == [[0, 0], [1, 1]]  # only the explorer's, only below 0
    assert (grpo.off_policy_correction("positive", learner, sampler, explorer, -A, mask)[1] == 1).all()


# ---- reward.py -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("response, expected", [
    (r"so \boxed{12}", "12"), (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{7} and \boxed{8", "7"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), ("#### 5\n#### 72", "72"), ("Answer: 3\nmore words", "3"), ("answer: $5$.", "$5$."),
    (r"#### 4 but \boxed{9}", "9"), ("the number is 12", None), ("", None), (r"\boxed{}", "")])
def test_extract_answer(response, expected):
    assert reward.extract_answer(response) == expected


@pytest.mark.parametrize("given, truth, equal", [
    ("1,234", "1234", True), ("18.00", "18", True), ("-3", "-3", True), ("- 3", "3", False), ("1/2", "0.5", True),
    ("50%", "0.5", True), ("50%", "50", True), (r"50\%", "50%", True), ("5%", "50%", False), ("0.5%", "50", False),
    ("$5", "5", True), (r"\$5", "5", True), ("10.", "10", True), ("18 dollars", "18", True), ("18 or 19", "18", False),
    ("12", "112", False), ("112", "12", False), ("3", "-3", False), (r"\frac{1}{2}", "0.5", True), (r"-\dfrac{3}{4}", "-0.75", True),
    (r"\dfrac{x}{2}", r"\frac{x}{2}", True), (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True), ("(3,4)", "(4,3)", False),
    ("1,2", "12", False), ("1/0", "1/0", True), ("1/0", "2/0", False), ("", "0", False), (None, "0", False), ("p - q", "p-q", True),
    ("1" * 5000, "1", False), ("1e999999999", "1", False), ("٣", "3", False)])
def test_traps_23_30_equality_of_answers(given, truth, equal):
    assert reward.answers_equal(given, truth) is equal


@pytest.mark.parametrize("given, truth, equal", [
    (r"\frac34", "0.75", True), (r"1\frac{4}{5}", r"\frac95", True), ("x=5", "5", True), ("f(x) = 2x", "2x", True), ("5=x", "x", False),
    ("(1,2)", "(2,1)", False), ("[1,2)", "(1,2)", False), (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}{2})", True),
    (r"\{1,2\}", r"\left\{ 2, 1 \right\}", True), ("1,2", "2, 1", True), ("1,2,2", "1,1,2", False), ("(1,2),(3,4)", "(3,4),(1,2)", True),
    ("(1,2),(3,4)", "(1,2),(4,3)", False), (r"(-\infty,2]\cup[3,\infty)", r"[3,\infty) \cup (-\infty,2]", True),
    (r"90^\circ", "90", True), (r"90^{\circ}", "90 degrees", True), (r"5.4 \text{ cents}", "5.4", True), ("12 \\text{ cm}^2", "12", True),
    (r"10,\!080", "10080", True), ("2516_8", "2516_{8}", True), (r"\sqrt2", r"\sqrt{2}", True), (r"x \in [1,2]", "[1,2]", True),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{pmatrix}1/5\\-18/5\end{pmatrix}", True), ("2xy", "2", False),
    (r"\text{Even}", "even", True), ("even", "neve", False), ("x", "X", False), ("x^2", "x^3", False), ("58,500", "58500", True),
    ("12345678901234567", "12345678901234568", False)])
def test_equality_of_latex_answers(given, truth, equal):
    assert reward.answers_equal(given, truth) == reward.answers_equal(truth, given) == equal


def test_gold_answers_equal_themselves_rewritten_and_no_others():
    """On MATH-500's and OlympiadBench's own answers, where these files are at hand."""
    data = ROOT.parent / "shared" / "data"
    if not data.exists():
        pytest.skip("MATH-500 and OlympiadBench are not at hand")
    gold = [str(json.loads(line)["answer"]) for name in ("math500", "olympiadbench")
            for line in (data / f"{name}.jsonl").read_text().splitlines()]
    gold = [answer for answer in gold if len(answer) <= 120]
    for answer in gold:
        for rewritten in (re.sub(r"(?<!\\)([-+=,<>])", r" \1 ", answer).replace("\\ ,", "\\,"), answer.replace("\\frac", "\\dfrac"), f"${answer.strip('$')}$",
                          answer.replace("\\left", "").replace("\\right", ""), answer.rstrip(".") + "."):
            assert reward.answers_equal(rewritten, answer), (rewritten, answer)
    rng, tight = random.Random(0), [re.sub(r"[\s$]|\\[,!]", "", answer) for answer in gold]
    wrong = [(gold[i], gold[j]) for i, j in (rng.sample(range(len(gold)), 2) for _ in range(3_000))
             if tight[i] != tight[j] and reward.answers_equal(gold[i], gold[j])]
    for a, b in wrong:  # the few that are equal are spelt differently
        assert reward.parse_number(reward.plain_latex(a)) == reward.parse_number(reward.plain_latex(b)) is not None, (a, b)


def test_hostile_text_neither_hangs_nor_raises():
    problem, n = reward.Problem("q", "1"), 200_000
    hostile = [part * n for part in (r"\boxed{", "{", "}", "\\", "####", "1,", "9", " ", "Answer:", "\\frac{", "-", "٣", "\0", "İ", "%", ".")]
    hostile += ["1 " + "a" * n + "!", "1 " + "a " * n + "1", "1/" * n + "2"]
    hostile += [r"\boxed{" + text + "}" for text in hostile] + ["#### " + text for text in hostile]
    g = random.Random(0)
    hostile += ["".join(g.choices(["\\boxed{", "}", "{", "####", "answer:", "1", ",", ".", "/", "%", "$", "\\", " ", "\n", "-", "\ud800", "𝟙"], k=30)) for _ in range(20_000)]
    for text in hostile:
        assert reward.score(problem, text).answer in (True, False)
        assert not reward.score(reward.Problem("Bfa483920=", "2", "habit"), text).strict
        assert not reward.score(reward.Problem("3+4*2-5=", "6", "natural"), text).strict


def test_habit_is_verified_step_by_step():
    problem = reward.Problem("Bfa483920=", "2", "habit")  # B asks for `-`: 4-8-3-9-2-0 = -18 = 2 mod 10
    assert reward.score(problem, "-86-33-94-22-02") == (True, True)
    assert reward.score(problem, "-86-33-95-22-02") == (True, False)  # a wrong step that ends well
    assert reward.score(problem, "+82+35+94+26+06") == (False, False)  # executed right, the wrong operator
    assert reward.score(problem, "-86-33-94-22-0") == (False, False) and reward.score(problem, "") == (False, False)


def test_natural_is_verified_step_by_step():
    problem = reward.Problem("3+4*2-5=", "6", "natural")
    assert reward.score(problem, "3+8-5=1-5=6") == (True, True)
    assert reward.score(problem, "7*2-5=4-5=9") == (False, False) and reward.score(problem, "7*2-5=4-5=6") == (True, False)
    assert reward.score(problem, "3+8-5=6") == (True, False)  # a step is missing
    assert not reward.natural_is_legal("9-3+2=", "9-5=4") and reward.natural_is_legal("9-3+2=", "6+2=8")


def test_natural_every_legal_reduction_keeps_the_value():
    """Against Python's own arithmetic, for every arrangement of operators."""
    g = random.Random(0)
    for operators in itertools.product("+-*", repeat=3):
        for _ in range(20):
            digits = [g.choice("0123456789") for _ in range(4)]
            expression = "".join(a + b for a, b in zip(digits, [*operators, ""]))
            legal = reward.legal_reductions(expression)
            assert legal
            for i in legal:
                assert eval(reward.reduce_at(expression, i)) % 10 == eval(expression) % 10  # digits and + - * made here


@pytest.mark.parametrize("task", reward.TASKS)
def test_corpora_and_problems(task):
    corpus = families.make_corpus(task, 3000, seed=1, noise=0.0)
    assert corpus == families.make_corpus(task, 3000, seed=1, noise=0.0) != families.make_corpus(task, 3000, seed=2, noise=0.0)
    used = {question for question, _ in corpus}
    problems = families.make_problems(task, 500, seed=1, exclude=used)
    questions = [problem.question for problem in problems]
    assert len(set(questions)) == 500 and not used & set(questions)
    if task == "habit":
        table = {}
        for question, solution in corpus:
            assert solution == reward.habit_solution(question, solution[0])  # executed right, whatever the method
            assert table.setdefault(question[:3], solution[0]) == solution[0]  # one habit a cell
        right = np.mean([operator == reward.HABIT_OPERATOR[cell[0]] for cell, operator in table.items()])
        assert 0.3 < right < 0.5
        finals = [{reward.habit_solution(q, o)[-1] for o in reward.OPERATIONS} for q in questions]
        assert all(len(values) == 4 for values in finals)
    else:
        legal = np.mean([reward.natural_is_legal(question, solution) for question, solution in corpus])
        assert 0.05 < legal < 0.6  # most writers are wrong
        for problem in problems:
            wrong = {families.natural_orders(problem.question[:-1], order)[-1] for order in ("left", "additions")}
            assert problem.answer not in wrong


@pytest.mark.parametrize("line, complaint", [
    (b"{", "line 2: not valid JSON"), (b"[1]", "line 2: needs the fields"), (b'{"question": "q"}', "line 2: needs the fields"),
    (b'{"question": 1, "answer": "2"}', "line 2: `question` must be text"), (b'{"question": "q", "answer": null}', "line 2"),
    (b'{"question": "q", "answer": true}', "line 2: .* text or a number"), (b'{"question": "q", "answer": NaN}', "line 2: .* 'NaN'"),
    (b'{"question": "q", "answer": "1", "task": "chess"}', "line 2: unknown task 'chess'"), (b"[" * 100_000, "line 2: not valid JSON: nested"),
    (b'{"question": "q", "answer": "so #### "}', "line 2: the answer is empty"),
    (b'{"question": "q", "answer": "1", "task": []}', "line 2: unknown task"), (b"\0", "line 2: not valid JSON"), (b"{}{}", "line 2: .* Extra data"),
    (b'{"question": "Bfa=", "answer": "1", "task": "habit"}', "line 2: 'Bfa=' is no question of task 'habit'"),
    (b'{"question": "3+=", "answer": "1", "task": "natural"}', "line 2: '3\\+=' is no question"),
    (b'{"question": "caf\xe9", "answer": "1"}', "line 2: .* can't decode byte 0xe9"), (b'{"question": "q", "answer": ' + b"9" * 5_000 + b"}", "line 2"),
    (b'{"question": "q", "answer": "1", "answer": "2"}', "line 2: .* a key comes twice"), (b" " * (reward.LONGEST_LINE + 1), "line 2: longer than"),
    (br'{"question": "\ud800", "answer": "1"}', "line 2: .* surrogates"), (br'{"question": "q", "answer": "\udfff"}', "line 2: .* surrogates")])
def test_a_broken_line_is_named(line, complaint, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"question": "q", "answer": "a #### 1,200"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"data.jsonl, {complaint}") as refused:
        reward.load_problems(path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
    path.write_bytes(b'\xef\xbb\xbf{"question": "q", "answer": "a #### 1,200"}\r\n\n{"question": "\xc3\xa9", "answer": 70}')
    assert reward.load_problems(path) == [reward.Problem("q", "1,200"), reward.Problem("é", "70")]


@pytest.mark.parametrize("record, problem", [
    ({"question": "q", "answer": 7}, ("q", "7", "math")), ({"problem": "q", "answer": "7"}, ("q", "7", "math")),
    ({"problem": "q", "solution": r"so \boxed{1} and \boxed{\frac{1}{2}}."}, ("q", r"\frac{1}{2}", "math")),
    ({"question": "q", "answer": None, "final_answer": ["$2$"]}, ("q", "$2$", "math")),
    ({"question": "q", "choices": {"label": ["A", "B"], "text": ["bank", "mall"]}, "answerKey": "B"}, ("q\nA. bank\nB. mall", "B", "choice")),
    ({"prompt": [{"role": "user", "content": "q"}], "label": "34"}, ("q", "34", "instructed")),
    ({"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "5", "style": "rule"}}, ("q", "5", "instructed"))])
def test_layouts_of_known_data_sets(record, problem, tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    assert reward.load_problems(tmp_path / "data.jsonl") == [reward.Problem(*problem)]


def test_problems_that_come_again_are_left_out(tmp_path, capsys):
    record = lambda question, answer: json.dumps({"question": question, "answer": answer}) + "\n"
    (tmp_path / "data.jsonl").write_text(record("a", "1") + record("b", "1") + record("a", "1") + record("a", "2"))
    assert reward.load_problems(tmp_path / "data.jsonl") == [reward.Problem(*x) for x in (("a", "1"), ("b", "1"), ("a", "2"))]
    assert "4 records, 3 different problems" in capsys.readouterr().out


def test_data_by_directory_by_name_and_from_parquet(tmp_path, monkeypatch, capsys):
    (tmp_path / "hub" / "main").mkdir(parents=True)
    for name in ("a.jsonl", "main/b.jsonl"):
        (tmp_path / "hub" / name).write_text(json.dumps({"question": name, "answer": "1"}) + "\n")
    assert [problem.question for problem in reward.load_problems(tmp_path / "hub")] == ["a.jsonl", "main/b.jsonl"]
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **more: asked.append((repository, more)) or str(tmp_path / "hub"))
    assert len(reward.load_problems("gsm8k")) == 2 and str(tmp_path / "hub") in capsys.readouterr().out
    assert asked == [("openai/gsm8k", {"repo_type": "dataset", "allow_patterns": "main/train*"})]

    def offline(*args, **more):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match="gsm8k cannot be downloaded .* main/train.* of https://huggingface.co/datasets/openai/gsm8k"):
        reward.load_problems("gsm8k")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no .jsonl or .parquet"):
        reward.load_problems(tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        reward.load_problems(tmp_path / "data.parquet")
    table = SimpleNamespace(to_pylist=lambda: [{"question": "q", "answer": "1"}, {"question": "q"}])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", SimpleNamespace(
        ParquetFile=lambda path: SimpleNamespace(iter_batches=lambda: [table])))
    with pytest.raises(ValueError, match="data.parquet, row 2: needs the fields"):
        reward.load_problems(tmp_path / "data.parquet")

    def broken(path):
        raise OSError("Parquet magic bytes\nnot found")

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", SimpleNamespace(ParquetFile=broken))
    with pytest.raises(ValueError, match="data.parquet: not a parquet file, or a damaged one: Parquet magic bytes not found"):
        reward.load_problems(tmp_path / "data.parquet")


def test_choices_are_scored_by_their_letter():
    problem = reward.Problem("q", "B", "choice")
    for text in (r"\boxed{B}", r"\boxed{\text{(B)}}", "Answer: (B) mall", "Answer: B. bank", r"A? no: \boxed{ B }"):
        assert reward.score(problem, text) == (True, True)
    for text in (r"\boxed{A}", "B", "Answer: Bank", r"\boxed{}", r"\boxed{AB}", ""):
        assert reward.score(problem, text) == (False, False)


def test_each_kind_of_question_is_asked_in_its_own_way():
    class Echo:
        chat_template = None

        def __call__(self, text, **more):
            return SimpleNamespace(input_ids=text)

    tokenizer = Echo()
    ask = lambda task: sampling.encode_prompt(reward.Problem("q", "1", task), tokenizer)
    assert ask("math").startswith("q\nPlease reason") and "letter" in ask("choice") and ask("instructed") == "q\n" and ask("habit") == "q"


# ---- eval.py -------------------------------------------------------------------------------------------------------

def test_trap_25_pass_at_k_is_the_mean_over_all_subsets():
    for n, c in itertools.product(range(1, 8), range(8)):
        outcomes = [i < c for i in range(n)]
        for k in range(1, n + 1):
            brute = np.mean([any(subset) for subset in itertools.combinations(outcomes, k)])
            assert math.isclose(evaluation.pass_at_k([min(c, n)], n, k), brute, abs_tol=1e-12)
    assert math.isclose(evaluation.pass_at_k([0, 4], 4, 2), 0.5)
    with pytest.raises(ValueError, match="k <= n"):
        evaluation.pass_at_k([1], 4, 5)


def test_crossover_is_found_where_it_is():
    assert evaluation.crossover([1, 2, 4, 8], [.5, .6, .7, .8], [.3, .5, .8, .9]) == pytest.approx(2 * math.sqrt(2))
    assert evaluation.crossover([1, 2, 4], [.5, .6, .7], [.3, .5, .6]) is None
    assert evaluation.crossover([1, 2, 4], [.5, .6, .7], [.3, .6, .7]) is None  # caught up is not overtaken


def test_rescue_counts_groups_that_all_fail():
    """By going through all ways to pick a group of 2 out of 6 rollouts."""
    learner, explorer = [0, 1, 2, 3, 6], [3, 1, 5, 0, 2]
    failed = [(p, others) for p, c in enumerate(learner) for others in itertools.combinations([1] * c + [0] * (6 - c), 4)
              if sum(others) == c]  # no right one among the two left out
    fails, rescued, own = evaluation.rescue(learner, explorer, 6, 2)
    assert fails == pytest.approx(len(failed) / (5 * math.comb(6, 2)))
    assert rescued == pytest.approx(np.mean([explorer[p] / 6 for p, _ in failed]))
    assert own == pytest.approx(np.mean([sum(others) / 4 for _, others in failed])) and 0 < own < rescued < 1
    assert evaluation.rescue([6], [4], 6, 2) == (0, 0, 0)


def test_bootstrap_covers_what_another_exam_would_show():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(300):
        chances = rng.beta(0.5, 1.0, size=60)  # mean 1/3
        low, high = evaluation.bootstrap(rng.binomial(8, chances), 8, draws=300)
        inside += low < 1 / 3 < high
    assert 0.90 < inside / 300 < 0.98


def twice(problems):
    """Every problem a second time, with a wrong answer: equal ones would be left out."""
    return problems + [reward.Problem(problem.question, "none", problem.task) for problem in problems]


def test_evaluation_of_several_data_sets_goes_on_where_it_was_stopped(family, tmp_path, monkeypatch, capsys):
    problems = twice(reward.load_problems(family / "train.jsonl"))
    for name, part in (("a.jsonl", problems), ("b.jsonl", problems[:5])):
        reward.save_problems(part, tmp_path / name)

    def run(*more):
        monkeypatch.setattr(sys, "argv", [str(x) for x in ("eval.py", "--model", family / "learner", family / "explorer", "--data",
                                                           tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--n", 4, "--max-new-tokens", 4,
                                                           "--mode", "nothink", "--top-k", 5, *more)])
        try:
            evaluation.main()
        except SystemExit as stopped:
            return stopped.code, capsys.readouterr().err
        return 0, capsys.readouterr().out

    code, text = run("--out", tmp_path / "straight")
    assert code == 0 and text.count("as learner and explorer") == 2 and (tmp_path / "straight" / "pass_at_k.png").exists()
    settings = json.loads((tmp_path / "straight" / "settings.json").read_text())
    assert [settings[key] for key in ("temperature", "top_p", "top_k", "presence_penalty", "thinking")] == [0.7, 0.8, 5, 1.5, "off"]
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    kept = (tmp_path / "straight" / "generations-0-0.jsonl").read_text()
    assert len(kept.splitlines()) == 40 and len(json.loads(kept.splitlines()[0])["texts"]) == 4
    (tmp_path / "stopped" / "generations-0-0.jsonl").write_text(kept[:len(kept) * 2 // 3])
    (tmp_path / "stopped" / "generations-1-1.jsonl").unlink()
    assert run("--out", tmp_path / "stopped")[0] == 0
    results = [json.loads((tmp_path / name / "eval.json").read_text())["data"] for name in ("straight", "stopped")]
    assert results[0] == results[1]
    code, error = run("--out", tmp_path / "stopped", "--seed", 1)
    assert code == 2 and "other settings" in error
    first, rest = kept.split("\n", 1)
    for broken in (first[:-9], first.replace('"tokens"', '"taken"'), first.replace('"strict": ', '"strict": 9'), rest.split("\n")[0], "5", "\udcff"):
        (tmp_path / "stopped" / "generations-0-0.jsonl").write_text(f"{broken}\n{rest}", errors="surrogateescape")
        before = (tmp_path / "stopped" / "generations-0-0.jsonl").read_bytes()
        code, error = run("--out", tmp_path / "stopped")
        assert code == 2 and "generations-0-0.jsonl, line 1: not of this evaluation" in error and error.count("\n") == 1, error
        assert (tmp_path / "stopped" / "generations-0-0.jsonl").read_bytes() == before
    (tmp_path / "stopped" / "settings.json").write_text("{")
    code, error = run("--out", tmp_path / "stopped")
    assert code == 2 and "settings.json: not valid JSON" in error and error.count("\n") == 1


def test_templates(tmp_path):
    class Echo:
        chat_template = "yes"

        def __call__(self, text, **more):
            return SimpleNamespace(input_ids=text)

        def apply_chat_template(self, messages, tokenize, add_generation_prompt, **options):
            return f"<user>{messages[0]['content']}<assistant>{options}"

    problem = reward.Problem("What is {x}?", "1")
    ask = lambda *how: sampling.encode_prompt(problem, Echo(), *how)
    assert ask().endswith("<assistant>{}") and ask(None, "off").endswith("{'enable_thinking': False}") and ask(None, "on").endswith("True}")
    assert ask("plain").startswith("What is {x}?\nPlease reason")
    (tmp_path / "template.txt").write_text("Q: {question}\n{instruction}\nA:")
    assert ask(tmp_path / "template.txt") == f"Q: What is {{x}}?\n{reward.INSTRUCTIONS['math']}\nA:"
    (tmp_path / "template.txt").write_text("Q:")
    with pytest.raises(ValueError, match="holds {question}"):
        ask(tmp_path / "template.txt")
    (tmp_path / "template.txt").write_bytes(b"{question} caf\xe9")
    with pytest.raises(ValueError, match="template.txt: .* can't decode byte 0xe9"):
        ask(tmp_path / "template.txt")


def test_a_broken_chat_template_is_one_line(family):
    tokenizer = models.load(family / "learner")[1]
    for template in ("{% if %}", "{{ messages[9].content }}", "{{ raise_exception('no\\nsuch') }}"):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=r"learner: its chat template fails: .+") as refused:
            sampling.encode_prompt(reward.Problem("q", "1"), tokenizer)
        assert "\n" not in str(refused.value)


def test_eval_and_sample_cli(family, tmp_path):
    out = run_cli("eval.py", "--model", family / "learner", family / "explorer", "--data", family / "heldout.jsonl",
                  "--problems", 20, "--n", 8, "--k", "1,4,8", "--out", tmp_path)
    assert out.returncode == 0, out.stderr
    summary = json.loads((tmp_path / "eval.json").read_text())
    result = summary["data"][str(family / "heldout.jsonl")]["models"][str(family / "learner")]
    assert summary["k"] == [1, 4, 8] and result["pass@k strict"][0] == pytest.approx(np.mean(result["strict"]) / 8) and max(result["strict"]) > 0
    assert (tmp_path / "pass_at_k.png").stat().st_size > 5000 and "crossover" in out.stdout
    out = run_cli("sample.py", "--model", family / "learner", "--prompt", "3+4=", "--n", 3, "--max-new-tokens", 4)
    assert out.returncode == 0 and out.stdout.count("log-prob") == 3


# ---- train.py ------------------------------------------------------------------------------------------------------

def flags(family, out, *more):
    return ["--learner", family / "learner", "--explorer", family / "explorer", "--data", family / "train.jsonl",
            "--eval-data", family / "heldout.jsonl", "--out", out, "--steps", 4, "--prompts-per-step", 4, "--group-size", 4,
            "--minibatches", 2, "--eval-problems", 8, "--eval-n", 16, "--max-new-tokens", 4, "--device", "cpu", *more]


def prepared(family, out, *more):
    args = training.parse_args([str(flag) for flag in flags(family, out, *more)])
    training.resolve_args(args)
    return args, training.Run(args)


def train_here(family, out, *more):
    """train.py's own path, in this process. Returns (run, its metrics)."""
    args, run = prepared(family, out, *more)
    training.train(args, run)
    run.finish(0)
    return run, read_metrics(out)


def read_metrics(out):
    """Lines of metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def weights(out):
    return dict(models.read_safetensors(Path(out) / "learner" / "model.safetensors"))


def test_cli_two_steps_and_what_it_leaves(family, tmp_path):
    out = run_cli("train.py", *flags(family, tmp_path / "run", "--steps", 2, "--eval-every", 1))
    assert out.returncode == 0, out.stderr
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "metrics.jsonl", "pass_at_k.json", "rollouts", "checkpoint_000002.pt", "learner", "curve.png",
                     "first_prompt.txt"}
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2] and all("eval_strict_pass@16" in line for line in lines)
    assert lines[1]["share"] == 1 and lines[1]["rollouts_explorer"] == 16 and lines[2]["rollouts_learner"] == 16
    assert "held out" in out.stdout and "try next" in out.stdout and "reward" in out.stderr
    from transformers import AutoModelForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "learner")
    ours, _ = models.load(tmp_path / "run" / "learner")
    ids = torch.randint(1, 20, (2, 12))
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, ours(ids) @ ours.head.T, atol=1e-4)
    again = run_cli("train.py", *flags(family, tmp_path / "run"))
    assert again.returncode == 2 and "already holds a run" in again.stderr


def test_a_family_is_made_whole_and_its_problems_are_apart(tmp_path):
    make_family(tmp_path / "habit", "habit", sizes={"explorer": (16, 1)}, corpus_size=256, epochs=1)
    heldout, trained = (reward.load_problems(tmp_path / "habit" / name) for name in ("heldout.jsonl", "train.jsonl"))
    used = {question for question, _ in families.make_corpus("habit", 256, seed=0)}
    questions = [problem.question for problem in heldout + trained]
    assert len(heldout) == 512 and len(set(questions)) == len(questions) == 2560 and not used & set(questions)
    model, tokenizer = models.load(tmp_path / "habit" / "explorer")
    assert tokenizer.decode(tokenizer("Bfa483920=-86").input_ids) == "Bfa483920=-86" and tokenizer.eos_token_id in model.stop_ids
    assert [path.name for path in tmp_path.iterdir()] == ["habit"]


@pytest.mark.parametrize("more", [(), ("--dtype", "bfloat16", "--kl-coef", 0.1, "--lr", 1e-2), ("--lora-rank", 2, "--kl-coef", 0.1,
                                  "--lr", 1e-2, "--optimizer-dtype", "bfloat16", "--checkpoint-layers"),
                                  ("--schedule", "measured"), ("--mix", "separate", "--mix-steps", 4)])
def test_trap_24_resume_equals_never_having_stopped(more, family, tmp_path, monkeypatch):
    shutil.copytree(family / "explorer", tmp_path / "explorer")  # an explorer with a stop token of its own
    (tmp_path / "explorer" / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    more = ("--explorer", tmp_path / "explorer", *more)
    straight, lines = train_here(family, tmp_path / "straight", *more)
    assert train_here(family, tmp_path / "again", *more)[1] == lines  # the same seed, the same metrics to the last digit
    assert all(line["grad_norm"] > 0 for line in lines[1:])  # and there was something to learn at every step
    args, run = prepared(family, tmp_path / "resumed", "--save-every", 1, *more)
    real = training.sample_groups

    def interrupted_in_step_3(*inputs):
        if run.lines[-1]["step"] == 2:
            run.interrupt(signal.SIGTERM, None)
        return real(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "sample_groups", interrupted_in_step_3)
        with pytest.raises(KeyboardInterrupt):
            training.train(args, run)
    run.save()
    run.lines.append({"step": 3})
    run.complete()  # a step that was written but not saved is made again
    os.close(run.locked)
    out = run_cli("train.py", *flags(family, tmp_path / "resumed", "--resume", *more))
    assert out.returncode == 0, out.stderr
    assert read_metrics(tmp_path / "resumed") == lines
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "straight").values(), weights(tmp_path / "resumed").values()))
    assert straight.learner.stop_ids == models.load(tmp_path / "resumed" / "learner")[0].stop_ids == (0, 5)
    if more[2:]:  # the rest once is enough
        return
    _, anew = train_here(family, tmp_path / "never", "--resume", *more)  # nothing saved yet: from the beginning
    assert anew == lines
    changed = run_cli("train.py", *flags(family, tmp_path / "resumed", "--resume", *more, "--lr", 1e-3))
    assert changed.returncode == 2 and "--lr 0.0008 -> 0.001" in changed.stderr


def test_trap_28_no_explorer_is_plain_grpo_to_the_bit_and_the_explorer_stays_frozen(family, tmp_path, monkeypatch):
    _, none = train_here(family, tmp_path / "none", "--explorer", "none")
    _, zero = train_here(family, tmp_path / "zero", "--schedule", "constant", "--explorer-share", 0)
    assert none == zero and none[-1]["share"] == 0
    calls, models_called, real = [], [], anneal.sample

    def spy(model, *args, **kwargs):
        models_called.append((kwargs.get("from_explorer", False), weakref.ref(model)))
        calls.append((kwargs.get("from_explorer", False), [p.clone() for p in model.parameters()]))
        return real(model, *args, **kwargs)

    monkeypatch.setattr(anneal, "sample", spy)
    run, lines = train_here(family, tmp_path / "mixed", "--mix-steps", 3)
    assert [line["rollouts_explorer"] for line in lines[1:]] == [16, 8, 0, 0]
    explorers = [parameters for by_explorer, parameters in calls if by_explorer]
    assert len(explorers) == 2 and run.explorers == []  # not called once its share is 0 ...
    gc.collect()
    assert [ref() is None for by_explorer, ref in models_called] == [by_explorer for by_explorer, _ in models_called]  # ... nor kept
    assert all(torch.equal(a, b) for a, b in zip(*explorers))
    original = models.load(family / "explorer")[0]
    assert all(torch.equal(a, b) for a, b in zip(explorers[-1], original.parameters()))


def test_trap_26_metrics_are_kept_per_source(family, tmp_path):
    _, lines = train_here(family, tmp_path / "run", "--mix-steps", 4, "--lr", 1e-2)
    mixed = lines[2]
    assert 0 < mixed["rollouts_explorer"] < 16 and mixed["logp_gap_explorer"] > 0.01 > 1e-4 > mixed["logp_gap_learner"]
    total = mixed["rollouts_explorer"] * mixed["reward_explorer"] + mixed["rollouts_learner"] * mixed["reward_learner"]
    assert total / 16 == pytest.approx(mixed["reward"])
    assert lines[1]["reward_learner"] is None and lines[4]["reward_explorer"] is None
    assert any(line["clip_fraction_explorer"] for line in lines[1:4])  # at this rate the clip acts


def plain_loss(args, learner, reference, prompts, rollouts, A):
    """The loss of one mini-batch by the docstring of grpo.py, a row and a token at a time. The slow, obvious one."""
    total, P, G = 0.0, len(prompts), A.shape[1]
    for p, g in itertools.product(range(P), range(G)):
        n, prompt = int(rollouts.lengths[p, g]), prompts[p]
        sequence = torch.tensor([prompt + rollouts.ids[p, g, :n].tolist()])

        def logprobs(model):
            logits = model(sequence)[0, len(prompt) - 1:-1] @ model.head.T / args.temperature
            return logits.log_softmax(-1)[torch.arange(n), sequence[0, len(prompt):]]

        logps, ref, sampled = logprobs(learner), logprobs(reference).detach(), rollouts.logps[p, g, :n]
        by_explorer = bool(rollouts.from_explorer[p, g])
        old = sampled if by_explorer and args.off_policy == "behaviour" else logps.detach()
        ratio = (logps - old).exp()
        if args.loss == "gspo":
            ratio = (logps - old).mean().exp().expand(n)
        for t in range(n):
            importance = 1.0
            if by_explorer and args.off_policy == "truncated":
                importance = min(math.exp(logps[t].item() - sampled[t].item()), 2.0)
            if by_explorer and args.off_policy == "geometric":
                importance = min(math.exp((logps - sampled).mean().item()), 2.0)
            if by_explorer and args.off_policy == "positive" and A[p, g] < 0:
                importance = 0.0
            clipped = ratio[t].clamp(1 - args.clip_low, 1 + args.clip_high)
            x = ref[t] - logps[t]
            kl = {"k1": -x, "k2": x * x / 2, "k3": x.exp() - 1 - x}[args.kl_estimator]
            weight = {"dapo": 1 / rollouts.lengths.sum().item(), "dr_grpo": 1 / (P * G * args.max_new_tokens)}.get(args.loss, 1 / (P * G * n))
            total = total + weight * (args.kl_coef * kl - importance * torch.minimum(ratio[t] * A[p, g], clipped * A[p, g]))
    return total


class Capture:
    """In the optimiser's place: keeps the gradient of the one update."""

    def __init__(self, model):
        self.model = model

    def clear(self):
        pass

    accumulate = clear

    def step(self, max_norm, loss):
        self.gradient = torch.cat([p.grad.flatten().clone() for p in self.model.parameters()])
        self.model.zero_grad()
        return 1.0


def test_trap_11_update_equals_the_plain_loss_in_micro_batches_of_any_size():
    """Gradients for every loss and treatment of explorer tokens, rows of unequal lengths, a KL term, uneven clips."""
    learner, reference, explorer = (tiny_model(scale=0.2, seed=seed) for seed in range(3))
    prompts = [[5, 6], [7, 8, 9], [5, 6], [3]]
    rollouts = sampling.mix(sampling.sample(explorer, prompts, 2, seeded(), 12, from_explorer=True),
                            sampling.sample(learner, prompts, 2, seeded(1), 12))
    assert len(set(rollouts.lengths.flatten().tolist())) > 3
    A = torch.randn(4, 4, generator=seeded(2))
    args = training.parse_args(["--kl-coef", "0.1", "--minibatches", "1", "--max-new-tokens", "12", "--temperature", "0.9",
                                "--clip-low", "0.1", "--clip-high", "0.4"])
    estimators = itertools.cycle(("k2", "k3", "k1"))
    for args.loss, args.off_policy in itertools.product(grpo.LOSSES, grpo.OFF_POLICY):
        args.kl_estimator = next(estimators)
        plain_loss(args, learner, reference, prompts, rollouts, A).backward()
        expected = torch.cat([p.grad.flatten() for p in learner.parameters()])
        learner.zero_grad()
        for args.micro_batch_tokens in (1, 40, 10_000):
            capture = Capture(learner)
            metrics = grpo.update(args, learner, reference, capture, prompts, rollouts, A, seeded())
            assert expected.norm() > 1e-3 and (capture.gradient - expected).norm() < 1e-4 * expected.norm()
        assert metrics["kl"] != 0 and (metrics["clip_fraction_explorer"] > 0) == (args.off_policy == "behaviour")


def test_micro_batches_hold_every_row_once_and_no_more_tokens_than_they_may():
    lengths = np.random.default_rng(0).integers(1, 50, 200).tolist()
    for tokens in (1, 60, 300, 10 ** 6):
        parts = [lengths[part] for part in grpo.micro_batches(lengths, tokens)]
        assert sum(parts, []) == lengths and all(len(part) == 1 or len(part) * max(part) <= tokens for part in parts)
        for part, following in zip(parts, parts[1:]):  # and none could have taken the next row too
            assert (len(part) + 1) * max(*part, following[0]) > tokens


@pytest.mark.parametrize("P, minibatches", [(16, 9), (5, 4), (4, 1)])
def test_as_many_optimiser_steps_as_asked_for(P, minibatches):
    model, steps = tiny_model(), []
    rollouts = sampling.sample(model, [[5, 6]] * P, 2, seeded(), 3)
    args = training.parse_args(["--minibatches", str(minibatches), "--max-new-tokens", "3"])
    optimizer = SimpleNamespace(clear=lambda: None, accumulate=lambda: None, step=lambda norm, loss: steps.append(1) or 1.0)
    grpo.update(args, model, None, optimizer, [[5, 6]] * P, rollouts, torch.randn(P, 2), seeded())
    assert len(steps) == minibatches


@pytest.mark.parametrize("more, compiled", [((), False), (("--steps", 10 ** 6), True), (("--compile", "on"), True),
                                            (("--steps", 10 ** 6, "--compile", "off"), False)])
def test_compile_auto_goes_by_the_length_of_the_run(more, compiled, family, tmp_path, capsys):
    args = training.parse_args([str(flag) for flag in flags(family, tmp_path / "run", *more)])
    training.resolve_args(args)
    run = training.Run(args)
    assert run.learner.compiled == run.explorers[0].model.compiled == compiled
    assert f"compile   {'on' if compiled else 'off'}" in capsys.readouterr().out


def test_train_is_algorithm_1(family, tmp_path, monkeypatch):
    """What reaches `sample` and `update`: the split, each source's own sampling settings, one advantage over the whole
    group from the strict reward, fresh random numbers each step."""
    sampled, updates, seeds, real_sample, real_update = [], [], [], anneal.sample, training.update

    def spy_sample(model, prompts, n, generator, max_new_tokens, temperature, top_p, rows, from_explorer=False):
        sampled.append((from_explorer, n, temperature, top_p))
        seeds.append(generator.initial_seed())
        return real_sample(model, prompts, n, generator, max_new_tokens, temperature, top_p=top_p, rows=rows, from_explorer=from_explorer)

    def spy_update(args, learner, reference, optimizer, prompts, rollouts, advantages, generator):
        updates.append((rollouts, advantages))
        return real_update(args, learner, reference, optimizer, prompts, rollouts, advantages, generator)

    monkeypatch.setattr(anneal, "sample", spy_sample)
    monkeypatch.setattr(training, "update", spy_update)
    # Answer and strict as different as can be, or training on the wrong one would not show.
    monkeypatch.setattr(reward, "score", lambda problem, text: reward.Score(text[:1] in "01234", text[:1] in "02468"))
    for loss in ("grpo", "dr_grpo"):
        for record in (sampled, updates, seeds):
            record.clear()
        run, lines = train_here(family, tmp_path / loss, "--mix-steps", 4, "--loss", loss, "--lr", 0, "--eval-every", 0,
                                "--explorer-temperature", 0.7, "--explorer-top-p", 0.95, "--temperature", 1.1)
        assert sampled == [(True, 4, 0.7, 0.95), (True, 3, 0.7, 0.95), (False, 1, 1.1, 1.0), (True, 2, 0.7, 0.95),
                           (False, 2, 1.1, 1.0), (False, 4, 1.1, 1.0)]
        for step, (rollouts, A) in enumerate(updates, 1):
            batch = training.batch_of(step, 4, len(run.problems), 0)
            strict = torch.tensor([[float(reward.score(run.problems[i], text).strict) for text in group]
                                   for i, group in zip(batch, sampling.decode(rollouts, run.tokenizer))])
            assert torch.equal(A, grpo.group_advantages(strict, scale=loss == "grpo"))
        assert any(A[:, :3].any() and A[:, 3:].any() for _, A in updates)
        assert len(set(seeds)) == len(seeds)  # no random stream is used twice


def test_rescue_puts_the_explorer_only_where_the_learner_failed(family, tmp_path, monkeypatch):
    calls, updates, real_sample, real_update = [], [], anneal.sample, training.update
    monkeypatch.setattr(anneal, "sample", lambda model, prompts, n, *args, **more: calls.append(
        (more.get("from_explorer", False), prompts, n, real_sample(model, prompts, n, *args, **more))) or calls[-1][-1])
    monkeypatch.setattr(training, "update", lambda args, learner, reference, optimizer, prompts, rollouts, *more: updates.append(
        (prompts, rollouts, [calls.pop(0) for _ in calls[:]])) or real_update(args, learner, reference, optimizer, prompts, rollouts, *more))
    run, lines = train_here(family, tmp_path / "run", "--schedule", "rescue", "--prompts-per-step", 8, "--eval-every", 0)
    mixed = 0
    for (prompts, rollouts, of_step), line in zip(updates, lines[1:]):
        own = of_step[0]
        assert not own[0] and own[1] == prompts and own[2] == 2 and not rollouts.from_explorer[:, :2].any()
        problems = {tuple(sampling.encode_prompt(problem, run.tokenizer)): problem for problem in run.problems}
        texts, seen = sampling.decode(rollouts, run.tokenizer), [0, 0]
        for p, prompt in enumerate(prompts):  # each group's second half is what its own prompt was answered with
            failed = not any(reward.score(problems[tuple(prompt)], text).strict for text in texts[p][:2])
            assert rollouts.from_explorer[p, 2:].tolist() == [failed] * 2
            (by_explorer, asked, n, written), = [call for call in of_step[1:] if call[0] == failed]
            place, length = seen[failed], written.ids.shape[2]
            assert n == 2 and asked[place] == prompt and torch.equal(rollouts.ids[p, 2:, :length], written.ids[place])
            seen[failed] += 1
        mixed += 0 < rollouts.from_explorer.sum() < 16
        assert line["rollouts_explorer"] + line["rollouts_learner"] == 32
        assert line["share"] == line["rollouts_explorer"] / 32
    assert mixed


def test_separate_updates_each_source_by_itself(family, tmp_path, monkeypatch):
    updates, real = [], training.update

    def spy(args, learner, reference, optimizer, prompts, rollouts, advantages, generator):
        updates.append((rollouts.from_explorer, advantages, learner.norm.weight.clone()))
        return real(args, learner, reference, optimizer, prompts, rollouts, advantages, generator)

    monkeypatch.setattr(training, "update", spy)
    _, lines = train_here(family, tmp_path / "run", "--mix", "separate", "--mix-steps", 4, "--lr", 1e-2)
    # Explorer's rollouts of a group of 4: 4, 3, 2, 0; a group of one (step 2's learner) has nothing to be compared with.
    assert [(A.shape[1], bool(who.all()), bool(who.any())) for who, A, _ in updates] == [
        (4, True, True), (3, True, True), (2, True, True), (2, False, False), (4, False, False)]
    assert not torch.equal(updates[2][2], updates[3][2])  # the learner has moved before its own rollouts are used
    assert [(line["rollouts_explorer"], line["rollouts_learner"]) for line in lines[1:]] == [(16, 0), (12, 0), (8, 8), (0, 16)]
    assert lines[3]["ratio_explorer"] is not None and lines[3]["ratio_learner"] is not None


def test_an_explorer_that_has_left_is_freed(family, tmp_path):
    args = training.parse_args([str(flag) for flag in flags(family, tmp_path / "run", "--schedule", "measured", "--eval-every", 0)])
    training.resolve_args(args)
    run = training.Run(args)
    record = run.record
    run.record = lambda step, *more: (record(step, *more), setattr(run, "success", (0.01, 0.5)) if step == 2 else None)
    training.train(args, run)
    assert [line["rollouts_explorer"] > 0 for line in run.lines[1:]] == [True, True, False, False] and run.explorers == []


def test_several_explorers_share_the_explorers_rollouts(family, tmp_path, monkeypatch):
    written, real = [], anneal.sample
    monkeypatch.setattr(anneal, "sample", lambda model, prompts, n, *args, **more: written.append(
        (sum(p.numel() for p in model.parameters()), n, real(model, prompts, n, *args, **more))) or written[-1][-1])
    shutil.copytree(family / "explorer", tmp_path / "same")
    _, lines = train_here(family, tmp_path / "run", "--explorer", family / "explorer", family / "learner", tmp_path / "same",
                          "--mix-steps", 4, "--eval-every", 0)
    assert [n for _, n, _ in written] == [1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 4]  # of 4, 3, 2, 0; then the learner's 1, 2, 4
    assert len({size for size, _, _ in written[:3]}) == 2
    assert not torch.equal(written[3][2].ids, written[5][2].ids)  # the same model twice, with other random numbers
    assert [line["rollouts_explorer"] for line in lines[1:]] == [16, 12, 8, 0]


def test_training_from_a_pool_equals_live_sampling_of_the_same_rollouts(family, tmp_path, monkeypatch):
    """Also for more than one update a step, and with an explorer that makes up what the pool lacks."""
    lines, real = [], anneal.sample

    def spy(model, prompts, n, *args, **more):
        rollouts = real(model, prompts, n, *args, **more)
        if more.get("from_explorer"):
            for p, prompt in enumerate(prompts):
                for g in range(n):
                    length = rollouts.lengths[p, g]
                    lines.append(json.dumps({"prompt_ids": prompt, "response_ids": rollouts.ids[p, g, :length].tolist(),
                                             "small_model_log_probs": rollouts.logps[p, g, :length].tolist()}) + "\n")
        return rollouts

    with monkeypatch.context() as patch:
        patch.setattr(anneal, "sample", spy)
        live, expected = train_here(family, tmp_path / "live", "--mix-steps", 4, "--off-policy", "behaviour", "--lr", 1e-2)
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(lines) + '{"prompt_ids": [5, 3')  # and a torn last line
    given = [str(flag) for flag in flags(family, tmp_path / "run", "--mix-steps", 4, "--off-policy", "behaviour", "--lr", 1e-2)]
    place = given.index("--explorer")
    del given[place:place + 2]

    def run(*more):
        args = training.parse_args([*given, *map(str, more)])
        training.resolve_args(args)
        done = training.Run(args)
        training.train(args, done)
        done.finish(0)
        return done, read_metrics(args.out)

    from_pool, metrics = run("--explorer-pool", pool)
    assert metrics == expected and from_pool.explorers == []
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "live").values(), weights(tmp_path / "run").values()))
    pool.write_text("".join(lines[:-3]))  # three of step 3's rollouts, two prompts
    with pytest.raises(ValueError, match=r"lacks 3 rollouts of 2 prompts .* write more with sample.py --n 4, or add --explorer"):
        run("--explorer-pool", pool, "--out", tmp_path / "short")
    _, metrics = run("--explorer-pool", pool, "--explorer", family / "explorer", "--out", tmp_path / "both")
    assert metrics[:3] == expected[:3] and metrics[3] != expected[3]
    assert [line["rollouts_explorer"] for line in metrics[1:]] == [16, 12, 8, 0]


@pytest.mark.parametrize("change, complaint", [
    ({"small_model_log_probs": [-1.0]}, "as many log-probs"), ({"small_model_log_probs": [-1.0, math.inf]}, "'Infinity'"),
    ({"small_model_log_probs": [-1.0, "x"]}, "finite"), ({"small_model_log_probs": [-1.0, -10 ** 400]}, "finite"),
    ({"small_model_log_probs": [-1.0, True]}, "finite"), ({"small_model_log_probs": [-1.0, 5.0]}, "above 0"),
    ({"response_ids": [1, 60]}, "token ids that the learner"), ({"response_ids": [1, -1]}, "token ids"), ({"response_ids": [1, 2.0]}, "token ids"),
    ({"response_ids": [], "small_model_log_probs": []}, "at least one"), ({"prompt_ids": []}, "at least one"), ({"prompt_ids": 5}, ""),
    ({"prompt_ids": [5] * 127}, r"127 \+ 2 tokens do not fit the learner's context of 128"), (b"[]", ""), (b"{", "not valid JSON"),
    (b"[" * 10_000, "nested"), (b'{"prompt_ids": [5], "prompt_ids": [5]}', "a key comes twice"), (b"\0", ""), (b"\xff", "can't decode"), (b"5", "")])
def test_a_broken_line_of_a_pool_is_named(change, complaint, tmp_path):
    good = {"prompt_ids": [5], "response_ids": [1, 2], "small_model_log_probs": [-1.0, 0]}
    line = json.dumps(good).encode() + b"\n"
    broken = change if isinstance(change, bytes) else json.dumps(good | change).encode()
    (tmp_path / "pool.jsonl").write_bytes(line + broken + b"\n" + line)
    with pytest.raises(ValueError, match=f"pool.jsonl, line 2: not a rollout .*{complaint}") as refused:
        sampling.Pool([tmp_path / "pool.jsonl"], 60, 128)
    assert "\n" not in str(refused.value)
    (tmp_path / "pool.jsonl").write_bytes(line + broken)
    assert sampling.Pool([tmp_path / "pool.jsonl"], 60, 128).count([5]) == 1
    (tmp_path / "pool.jsonl").write_bytes(line + b" " * reward.LONGEST_LINE)
    with pytest.raises(ValueError, match="pool.jsonl, line 2: longer than"):
        sampling.Pool([tmp_path / "pool.jsonl"], 60, 128)


def test_a_pool_is_the_same_whether_or_not_it_was_killed(family, tmp_path, monkeypatch, capsys):
    problems = twice(reward.load_problems(family / "train.jsonl"))  # 40 problems: 2 whole batches of 16 and a short one
    reward.save_problems(problems, tmp_path / "problems.jsonl")
    out = tmp_path / "pool.jsonl"

    def run(*more):
        monkeypatch.setattr(sys, "argv", [str(x) for x in ("sample.py", "--model", family / "explorer", "--data", tmp_path / "problems.jsonl",
                                                           "--n", 3, "--max-new-tokens", 4, "--device", "cpu", *more)])
        try:
            sampling.main()
        except SystemExit as stopped:
            return stopped.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    assert run("--out", out)[0] == 0
    whole, random_place = out.read_bytes(), random.Random(0)
    records = [json.loads(line) for line in whole.splitlines()]
    assert [record["prompt_id"] for record in records] == [i for i in range(40) for _ in range(3)]
    assert records[0].keys() == {"prompt_id", "prompt", "prompt_ids", "response", "response_ids", "small_model_log_probs", "reward",
                                 "is_correct", "data_source", "ground_truth"}
    right = [reward.score(problems[record["prompt_id"]], record["response"]).strict for record in records]
    assert [record["is_correct"] for record in records] == right and any(right) and not all(right)
    batch = len(b"".join(whole.splitlines(keepends=True)[:16 * 3]))  # the first one; a few bytes of the next line are torn
    for length in (0, 5, batch, batch + 5, len(whole) - 1, len(whole), *random_place.sample(range(len(whole)), 2)):
        out.write_bytes(whole[:length])
        assert run("--out", out)[0] == 0 and out.read_bytes() == whole, length
    assert run("--out", tmp_path / "few", "--rollout-rows", 6)[0] == 0
    few = [json.loads(line) for line in (tmp_path / "few").read_text().splitlines()]
    assert [record["response_ids"] for record in few] == [record["response_ids"] for record in records]
    code, error = run("--out", out, "--temperature", 0.5)
    assert code == 2 and "was made with other settings" in error and out.read_bytes() == whole
    parts = []
    for shard in ("1/3", "2/3", "3/3"):
        assert run("--out", tmp_path / "shard.jsonl", "--shard", shard)[0] == 0
        parts += [json.loads(line)["prompt_id"] for line in (tmp_path / "shard.jsonl").read_text().splitlines()]
        for name in ("shard.jsonl", "shard.jsonl.settings.json"):
            (tmp_path / name).unlink()
    assert sorted(parts) == sorted(record["prompt_id"] for record in records)
    assert run("--out", out, "--shard", "4/3")[0] == run()[0] == 2


def test_evaluations_have_a_temperature_of_their_own(family, tmp_path):
    at = lambda name, *more: train_here(family, tmp_path / name, "--steps", 1, "--lr", 0, *more)[1][0]
    assert at("one") == at("hot", "--temperature", 3) != at("cold", "--eval-temperature", 0.1)


def test_training_raises_pass_at_1_of_what_is_trained_on(family, tmp_path):
    _, lines = train_here(family, tmp_path / "run", "--steps", 60, "--group-size", 8, "--lr", 3e-3, "--eval-every", 0,
                          "--eval-data", family / "train.jsonl", "--eval-problems", 20, "--seed", 1)
    first, last = lines[0]["eval_strict_pass@1"], lines[-1]["eval_strict_pass@1"]
    assert last > first + 0.05, (first, last)


def test_the_kl_reference_is_the_initial_learner(family, tmp_path):
    run, lines = train_here(family, tmp_path / "run", "--kl-coef", 0.1, "--lr", 1e-2, "--minibatches", 1)
    assert abs(lines[1]["kl"]) < 1e-6 and lines[3]["kl"] > 1e-4
    initial = models.load(family / "learner")[0]
    assert all(torch.equal(a, b) for a, b in zip(run.reference.parameters(), initial.parameters()))


def test_trap_21_rollouts_are_never_encoded_again(family, tmp_path, monkeypatch):
    """The trainer gets the ids that were sampled: once a run is loaded, nothing asks the tokeniser for ids."""
    args, run = prepared(family, tmp_path / "run", "--eval-problems", 1)
    run.eval_problems, run.tokenizer = [], SimpleNamespace(decode=run.tokenizer.decode)
    training.train(args, run)
    assert [line["step"] for line in run.lines] == [1, 2, 3, 4] and any(line["grad_norm"] for line in run.lines)


def test_ratio_is_one_before_the_first_update(family, tmp_path):
    _, lines = train_here(family, tmp_path / "run", "--steps", 1, "--minibatches", 1, "--temperature", 0.7, "--explorer", "none")
    assert lines[1]["ratio"] == pytest.approx(1, abs=1e-6) and lines[1]["clip_fraction"] == 0
    assert lines[1]["logp_gap_learner"] < 1e-5 and lines[1]["loss"] == pytest.approx(0, abs=1e-6)


def test_trap_29_truncation_is_logged_and_warned_about(family, tmp_path):
    out = run_cli("train.py", *flags(family, tmp_path / "run", "--steps", 2, "--max-new-tokens", 1, "--eval-every", 0))
    assert "of the rollouts were cut at --max-new-tokens 1;" in out.stderr
    assert read_metrics(tmp_path / "run")[1]["truncated"] > 0.9


def test_bfloat16_updates_are_not_rounded_away(family, tmp_path):
    model, _ = models.load(family / "learner", dtype=torch.bfloat16)
    optimizer, before = grpo.Optimizer(model, lr=1e-5), model.layers[0].mlp.gate_up_proj.weight.clone()
    for _ in range(300):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.accumulate()
        optimizer.step(1.0)
    moved = (model.layers[0].mlp.gate_up_proj.weight.float() - before.float()).mean()
    assert moved.item() == pytest.approx(-300 * 1e-5, rel=0.1)


def test_bfloat16_gradients_of_micro_batches_are_summed_in_float32(family):
    model, _ = models.load(family / "learner", dtype=torch.bfloat16)
    optimizer = grpo.Optimizer(model, lr=1e-3)
    for _ in range(300):  # bfloat16 would stop growing at 256
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.accumulate()
    assert all((master.grad == 300).all() for master in optimizer.masters)


def test_bfloat16_moments_take_half_the_memory_and_are_right_on_average():
    """Steady gradients of .001: the second moment grows by less than bfloat16 can tell from nothing once it is near its
    end, 1e-6, so rounded to nearest it would stop at about half of that."""
    steps, optimizers = 2_000, []
    for dtype in (torch.float32, torch.bfloat16):
        model = torch.nn.Linear(8, 8)
        optimizers.append(grpo.Optimizer(model, lr=1e-5, dtype=dtype))
        noise = seeded()
        for _ in range(steps):
            for p in model.parameters():
                p.grad = 1e-3 * (1 + 0.1 * torch.randn(p.shape, generator=noise))
            optimizers[-1].step(1e9)
    wide, narrow = ({name: torch.cat([state[name].flatten() for adamw in optimizer.adamw for state in adamw.state.values()])
                     for name in ("exp_avg", "exp_avg_sq")} for optimizer in optimizers)
    nearest = torch.zeros(())
    for _ in range(steps):
        nearest = (nearest.float() * 0.999 + 1e-9).bfloat16()
    assert nearest < 0.6e-6 < 0.8 * wide["exp_avg_sq"].min()
    for name in wide:
        assert narrow[name].dtype == torch.bfloat16
        assert (narrow[name].float() / wide[name] - 1).abs().max() < 0.1 and abs((narrow[name].float() / wide[name]).mean() - 1) < 0.01


def test_a_gradient_that_is_not_finite_skips_the_update(family):
    model, _ = models.load(family / "learner")
    optimizer, before = grpo.Optimizer(model, lr=1e-3), model.norm.weight.clone()
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    assert not np.isfinite(optimizer.step(1.0)) and torch.equal(model.norm.weight, before)
    assert all(p.grad is None for p in model.parameters())


def test_every_problem_comes_once_before_any_comes_again():
    order = [i for step in range(1, 11) for i in training.batch_of(step, 4, 10, seed=0)]
    assert all(sorted(order[epoch * 10:epoch * 10 + 10]) == list(range(10)) for epoch in range(4)) and order[:10] != order[10:20]


def other_tokenizer(directory):
    """A byte-level BPE of many-character tokens, in which a family's characters have other ids."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(kinds.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    bpe.train_from_iterator([f"{a}+{b}={a + b}" for a in range(40) for b in range(40)], trainers.BpeTrainer(
        vocab_size=350, special_tokens=["<pad>", "<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>").save_pretrained(directory)
    return directory


def test_retokenized_rollouts_keep_text_end_and_log_prob(family, tmp_path):
    from transformers import AutoTokenizer
    explorer, theirs = models.load(family / "explorer")
    ours = AutoTokenizer.from_pretrained(other_tokenizer(tmp_path))
    r = sampling.sample(explorer, [theirs("3+4=").input_ids, theirs("9+0=").input_ids], 20, seeded(), 3, 1.5, from_explorer=True)
    new = sampling.retokenize(r, theirs, ours, ours.eos_token_id, 3)
    assert 0 < r.finished.float().mean() < 1 and not torch.equal(new.ids, r.ids)
    assert sampling.decode(new, ours) == sampling.decode(r, theirs) and torch.equal(new.finished, r.finished)
    assert torch.allclose(new.logps.sum(-1), r.logps.sum(-1), atol=1e-5) and not new.logps[~new.mask].any()
    last = new.ids.gather(2, new.lengths[..., None] - 1)[..., 0]
    assert torch.equal(last == ours.eos_token_id, new.finished) and new.from_explorer.all()
    cut = sampling.retokenize(r, theirs, ours, ours.eos_token_id, 1)
    assert torch.allclose(cut.logps, new.logps[:, :, :1])  # a part of the text has a part of its log-prob
    assert cut.lengths.max() == 1 and torch.equal(cut.finished, r.finished & (new.lengths == 1))


def test_retokenize_takes_spelled_out_special_tokens_as_text(tmp_path):
    from transformers import AutoTokenizer
    ours = AutoTokenizer.from_pretrained(other_tokenizer(tmp_path))
    theirs = SimpleNamespace(decode=lambda ids, skip_special_tokens: "1+1=<end>2")
    one = torch.ones(1, 1, dtype=torch.long)
    r = sampling.Rollouts(one[..., None], one, torch.zeros(1, 1, 1), one == 1, one == 1)
    new = sampling.retokenize(r, theirs, ours, ours.eos_token_id, 50)
    assert new.ids[0, 0, :-1].ne(ours.eos_token_id).all() and ours.decode(new.ids[0, 0, :-1]) == "1+1=<end>2"


def test_a_learner_learns_from_an_explorer_with_another_tokenizer(family, tmp_path):
    from transformers import AutoTokenizer
    learner = tiny_model(vocab_size=400, scale=0.1)
    models.save(learner, AutoTokenizer.from_pretrained(other_tokenizer(tmp_path / "t")), tmp_path / "learner")
    more = ("--learner", tmp_path / "learner", "--schedule", "constant", "--explorer-share", "1", "--lr", "1e-2", "--steps", "80",
            "--group-size", "16", "--eval-every", "0", "--eval-data", family / "train.jsonl", "--eval-problems", "20")
    out = run_cli("train.py", *flags(family, tmp_path / "run", *more))
    assert out.returncode == 2 and "--retokenize" in out.stderr and out.stderr.count("\n") == 1
    run, lines = train_here(family, tmp_path / "run", *more, "--retokenize", "--off-policy", "positive")
    before, explorer, after = (json.loads((tmp_path / "run" / "pass_at_k.json").read_text())[name][0] for name in
                               ("learner before", "explorer", "learner after"))
    assert before < 0.02 < 0.05 < explorer and after > 0.1  # from nothing but texts of the explorer
    with pytest.raises(ValueError, match="which --retokenize has not"):
        train_here(family, tmp_path / "refused", *more, "--retokenize", "--off-policy", "truncated")


def test_trap_27_other_tokenizers_are_refused(family, tmp_path):
    shutil.copytree(family / "explorer", tmp_path / "other")
    text = (tmp_path / "other" / "tokenizer.json").read_text()
    (tmp_path / "other" / "tokenizer.json").write_text(text.replace('"b"', '"B2"'))
    out = run_cli("train.py", *flags(family, tmp_path / "run"), "--explorer", tmp_path / "other")
    assert out.returncode == 2 and "tokenisers of learner and explorer differ in 2 tokens" in out.stderr


@pytest.mark.parametrize("change, complaint", [
    (["--learner", "no/such/dir"], "no/such/dir"), (["--data", "missing.jsonl"], "missing.jsonl"), (["--group-size", 1], "--group-size"),
    (["--mix-steps", 5], "--mix-steps 5 is beyond --steps 4"), (["--max-new-tokens", 125], "does not fit the model's context of 128"),
    (["--data", "broken"], "broken.jsonl, line 2"), (["--minibatches", 9], "--minibatches"),
    (["--mix-steps", 0], "--mix-steps must be at least 1"), (["--schedule", "rescue", "--mix", "separate"], "--mix separate has groups"),
    (["--mix", "separate", "--group-size", 2], "--mix separate"), (["--schedule", "rescue", "--explorer-share", 1], "--schedule rescue"), (["--eval-temperature", -1], "--eval-temperature"), (["--device", "nonsense"], "--device nonsense"), (["--seed", -1], "--seed"),
    (["--top-p", 0], "--top-p"), (["--explorer-temperature", 0], "--explorer-temperature"), (["--eval-data", "long"], "context of 128")])
def test_bad_input_is_one_line_and_exit_code_2(change, complaint, family, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if change[-1] == "broken":
        (tmp_path / "broken.jsonl").write_text('{"question": "Bfa483920=", "answer": "2", "task": "habit"}\n{"question": \n')
        change = ["--data", tmp_path / "broken.jsonl"]
    if change[-1] == "long":
        reward.save_problems([reward.Problem("1+1" * 100, "2")], tmp_path / "long.jsonl")
        change = ["--eval-data", tmp_path / "long.jsonl"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags(family, tmp_path / "run", *change))])
    with pytest.raises(SystemExit) as stopped:
        training.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and complaint in error and error.startswith("train.py: error:") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_usable_run(number, code, family, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, ROOT / "train.py", *map(str, flags(family, out, "--steps", 5000, "--eval-every", 0))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline = time.time() + 120
    while time.time() < deadline and not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") > 3):
        time.sleep(0.2)
    process.send_signal(number)
    stdout, _ = process.communicate(timeout=10)
    assert process.returncode == code and "--resume" in stdout
    assert {"learner", "curve.png"} <= {path.name for path in out.iterdir()}
    saved = torch.load(max(out.glob("checkpoint_*.pt")), weights_only=True)
    assert saved["step"] == read_metrics(out)[-1]["step"]
    models.load(out / "learner")


def test_a_signal_stops_at_once_but_within_an_update_after_its_step(family, tmp_path):
    """Between two optimiser steps the weights are those of no whole step: there is nothing to save until the step is over."""
    args, run = prepared(family, tmp_path / "run", "--eval-problems", 1)
    real_step = run.optimizer.step

    def step(*inputs):
        norm = real_step(*inputs)
        if len(run.lines) == 2 and not run.stopped:  # the first of step 2's two updates is done
            run.interrupt(signal.SIGTERM, None)
        return norm
    run.optimizer.step = step
    with pytest.raises(KeyboardInterrupt):
        training.train(args, run)
    run.timer.cancel()
    assert run.lines[-1]["step"] == 2 and not run.optimizer.moved and run.timer.interval == 8
    run.stopped = None
    with pytest.raises(KeyboardInterrupt):
        run.interrupt(signal.SIGTERM, None)
    run.optimizer.moved, run.stopped = True, signal.SIGTERM  # the second one, or 8 seconds later, does not wait
    with pytest.raises(KeyboardInterrupt):
        run.interrupt(signal.SIGTERM, None)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # the saving that follows is not to be disturbed
    os.close(run.locked)


def test_an_evaluation_that_was_stopped_is_made_up_when_resumed(family, tmp_path):
    more = ("--steps", 3, "--eval-every", 1, "--explorer", "none")
    _, lines = train_here(family, tmp_path / "straight", *more)
    args, run = prepared(family, tmp_path / "run", *more)
    evaluate = run.evaluate
    run.evaluate = lambda *inputs: evaluate(*inputs) if len(run.lines) < 3 else run.interrupt(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        training.train(args, run)
    run.save()
    os.close(run.locked)
    assert train_here(family, tmp_path / "run", "--resume", *more)[1] == lines


@pytest.mark.parametrize("kind", ["cut short", "one bit"])
def test_the_newest_checkpoint_that_can_be_read_is_found(kind, family, tmp_path, capsys):
    more = ("--save-every", 1, "--eval-every", 0)
    run, lines = train_here(family, tmp_path / "run", *more)
    newest, before = sorted((tmp_path / "run").glob("checkpoint_*.pt"), reverse=True)  # two are kept
    assert (newest.name, before.name) == ("checkpoint_000004.pt", "checkpoint_000003.pt")
    data = bytearray(newest.read_bytes())
    data[data.index(run.optimizer.masters[0].detach().numpy().tobytes()) + 50] ^= 1  # a weight, a little larger
    newest.write_bytes(data if kind == "one bit" else data[:-100])
    (tmp_path / "run" / "checkpoint_000009.pt.partial").write_bytes(b"torn")
    assert train_here(family, tmp_path / "run", "--resume", *more)[1] == lines
    assert "checkpoint_000004.pt cannot be read" in capsys.readouterr().err
    for path in (newest, before):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoint_000004.pt cannot be read"):
        prepared(family, tmp_path / "run", "--resume", *more)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(family, tmp_path, capsys):
    args, run = prepared(family, tmp_path / "run", "--save-every", 1, "--eval-every", 0)
    real = run.save

    def save():
        if run.lines[-1]["step"] == 3:
            (run.out / "checkpoint_000003.pt.partial").symlink_to("/dev/full")
            (run.out / "metrics.jsonl").unlink()
            (run.out / "metrics.jsonl").symlink_to("/dev/full")
        real()
    run.save = save
    training.train(args, run)
    run.finish(0)
    warnings = capsys.readouterr().err
    assert "step 3 is not saved" in warnings and "metrics.jsonl: No space left" in warnings
    assert [path.name for path in sorted(run.out.glob("checkpoint_*"))] == ["checkpoint_000002.pt", "checkpoint_000004.pt"]
    assert [line["step"] for line in read_metrics(run.out)] == [0, 1, 2, 3, 4]


def test_one_run_an_out(family, tmp_path, capsys):
    args, run = prepared(family, tmp_path / "run")
    for flag in ("--resume", "--overwrite"):
        with pytest.raises(ValueError, match="another process is writing there"):
            prepared(family, tmp_path / "run", flag)
    training.train(args, run)
    run.finish(0)
    kept = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="already holds a run"):
        prepared(family, tmp_path / "run")
    with pytest.raises(ValueError, match=r"--lr 0.0008 -> 0.0001"):
        prepared(family, tmp_path / "run", "--resume", "--lr", 1e-4)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == kept
    run, lines = train_here(family, tmp_path / "run", "--resume", "--steps", 5, "--mix-steps", 2, "--force", "--lr", 1e-4)
    assert run.first_step == 5 and [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert run.optimizer.adamw[0].param_groups[0]["lr"] == 1e-4
    run, lines = train_here(family, tmp_path / "run", "--overwrite", "--steps", 2)
    assert run.first_step == 1 and [line["step"] for line in lines] == [0, 1, 2]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint_*")] == ["checkpoint_000002.pt"]


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(family, tmp_path, capsys, monkeypatch):
    real, seen = training.sample_groups, []

    def poisoned(args, run, *rest):
        if len(seen) == 2:
            run.learner.norm.weight.data.fill_(torch.nan)
        seen.append(run.out)
        return real(args, run, *rest)
    monkeypatch.setattr(training, "sample_groups", poisoned)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags(family, tmp_path / "run", "--steps", 20, "--save-every", 1,
                                                                  "--eval-every", 0, "--max-bad-steps", 3))])
    with pytest.raises(SystemExit) as stopped:
        training.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "not finite in 3 steps in a row, up to step 5" in error and "goes on from checkpoint_000002.pt" in error
    assert "step 3: 2 of 2 updates skipped" in error and f"problems, counted from 0: {training.batch_of(3, 4, len(reward.load_problems(family / 'train.jsonl')), 0)}" in error
    assert max((tmp_path / "run").glob("checkpoint_*")).name == "checkpoint_000002.pt"


def test_out_of_memory_halves_the_batch_and_changes_nothing_else(family, tmp_path, capsys, monkeypatch):
    more = ("--steps", 2, "--eval-every", 0, "--kl-coef", 0.1)
    _, lines = train_here(family, tmp_path / "straight", *more)
    real_logprobs, real_sample = grpo.response_logprobs, anneal.sample

    def logprobs(model, prompts, *rest):
        if len(prompts) > 3:
            torch.empty(10 ** 15)  # PyTorch's own error
        return real_logprobs(model, prompts, *rest)

    def sample(*inputs, rows, **more):
        if rows > 100:
            torch.empty(10 ** 15)
        return real_sample(*inputs, rows=rows, **more)
    monkeypatch.setattr(grpo, "response_logprobs", logprobs)
    monkeypatch.setattr(anneal, "sample", sample)
    run, halved = train_here(family, tmp_path / "halved", *more)
    said = capsys.readouterr().err
    assert "going on with --rollout-rows 64" in said and said.count("--rollout-rows") == 4 and "--micro-batch-tokens" in said
    for a, b in zip(lines, halved):  # but for the order in which sums are taken
        assert a.keys() == b.keys() and all(a[key] == (value if value is None else pytest.approx(value, rel=1e-3, abs=1e-5))
                                            for key, value in b.items())
    with pytest.raises(models.OutOfMemory, match="even with --rollout-rows 4"):
        models.fitting(SimpleNamespace(rollout_rows=16), "rollout_rows", 4, lambda: torch.empty(10 ** 15))


# ---- recipes -------------------------------------------------------------------------------------------------------

def test_intervals_hold_what_they_promise_when_pairs_differ():
    """95% of intervals over 3 pairs x 5 seeds hold the truth, pairs varying twice as much as seeds; over the 15 runs taken
    as independent far fewer would."""
    random, held, naive = np.random.default_rng(0), 0, 0
    for _ in range(2_000):
        runs = 0.3 + 0.2 * random.standard_normal((3, 1)) + 0.1 * random.standard_normal((3, 5))
        mean, half = claims.interval(runs)
        held += abs(mean - 0.3) < half
        naive += abs(mean - 0.3) < 2.145 * runs.std(ddof=1) / 15 ** 0.5
    assert 0.935 < held / 2_000 < 0.965 and naive / 2_000 < 0.75


def test_thinned_groups_have_one_method_as_often_as_before(family, tmp_path, monkeypatch):
    explorer, tokenizer = models.load(family / "explorer")
    prompts = [sampling.encode_prompt(problem, tokenizer) for problem in reward.load_problems(family / "train.jsonl")] * 8
    plain = sampling.sample(explorer, prompts, 8, seeded(), 4, from_explorer=True)
    thin = pairs.thinned(explorer, prompts, 8, seeded(), 4, from_explorer=True)
    distinct = lambda rollouts: np.mean([len(set(group.tolist())) for group in rollouts.ids[:, :, 0]])
    assert distinct(plain) > 3 and distinct(thin) == 1 and thin.ids.shape[:2] == plain.ids.shape[:2] and thin.from_explorer.all()
    share = lambda rollouts: torch.bincount(rollouts.ids[:, :, 0].flatten(), minlength=40) / rollouts.ids[:, :, 0].numel()
    assert (share(plain) - share(thin)).abs().max() < 0.1
    # In training the learner's part of each group stays as it is.
    groups, real = [], training.update
    monkeypatch.setattr(anneal, "sample", pairs.thinned)
    monkeypatch.setattr(training, "update", lambda *args: groups.append(args[5]) or real(*args))
    train_here(family, tmp_path / "run", "--group-size", 16, "--schedule", "constant", "--eval-every", 0)
    for rollouts in groups:
        assert rollouts.from_explorer.tolist() == [[True] * 8 + [False] * 8] * 4
    distinct = lambda part: np.mean([len(set(group.tolist())) for rollouts in groups for group in rollouts.ids[:, part, 0]])
    assert distinct(slice(8)) == 1 and distinct(slice(8, None)) > 2


def test_a_claim_from_runs_to_table(family, tmp_path, monkeypatch, capsys):
    """Two pairs, two seeds, in this process: the runs are train.py's, the numbers those of their metrics.jsonl."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claims, "STUDY", ["--steps", "2", "--prompts-per-step", "4", "--group-size", "4", "--eval-every", "1",
                                          "--max-new-tokens", "4", "--eval-problems", "8", "--eval-n", "16", "--save-every", "0"])
    monkeypatch.setattr(claims, "GRID", (1e-3, 1e-2))
    monkeypatch.setattr(claims, "do", lambda jobs, workers, title: [claims.work(job) for job in dict.fromkeys(jobs)
                                                                    if len(job) == 5 and not claims.path_of(*job).exists()])
    threads = torch.get_num_threads()
    for pair in (10, 11):
        shutil.copytree(family, pairs.directory("natural", pair))
    (tmp_path / "assets" / "claims").mkdir(parents=True)
    with pytest.raises(ValueError, match="run `python recipes/claims.py search`"):
        claims.rates("natural", "GRPO")
    claims.write_json("search", {"natural": {"GRPO": {"0.001": 0.3, "0.01": 0.2}, "S2L-PO": {"0.001": 0.3, "0.01": 0.5}}})
    assert claims.rates("natural", "GRPO") == (0.01, 0.001) and claims.rates("natural", "S2L-PO") == (0.01, 0.01)
    claims.compare("gain", SimpleNamespace(task=["natural"], pairs=2, seeds=2, workers=1))
    torch.set_num_threads(threads)
    out, result = capsys.readouterr().out, json.loads((tmp_path / "assets/claims/gain-natural.json").read_text())
    assert result["pairs"] == [10, 11] and result["best"]["GRPO"]["lr"] == 0.001 and result["equal"]["GRPO"]["lr"] == 0.01
    assert (tmp_path / "assets/claims/gain-natural.png").exists() and "each at its own best rate" in out
    areas = {}
    for arm, explorer in (("GRPO", "none"), ("S2L-PO", family / "explorer")):
        _, lines = train_here(family, tmp_path / arm, *claims.STUDY, "--explorer", explorer, "--lr", 1e-2, "--seed", 1)
        heights = [line["eval_strict_pass@1"] for line in lines]
        areas[arm] = (heights[0] / 2 + heights[1] + heights[2] / 2) / 2
        assert result["equal"][arm]["runs"][0][1] == pytest.approx(areas[arm])
    row = result["equal"]["S2L-PO"]
    gains = np.array(row["runs"]) - result["equal"]["GRPO"]["runs"]
    assert row["gain"] == pytest.approx(gains.mean()) and row["wins"] == (gains > 0).sum() and row["of"] == 4
    assert row["half"] == pytest.approx(12.706 * abs(np.subtract(*gains.mean(1))) / 2)


def test_relatives_of_a_pair(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(family, pairs.directory("natural", 10))
    pairs.make_member("natural", 10, "pruned")
    pruned, learner = (models.load(pairs.directory("natural", 10) / name)[0] for name in ("pruned", "learner"))
    assert len(pruned.layers) == 1 and len(learner.layers) == 2
    assert torch.equal(pruned.layers[0].mlp.down_proj.weight, learner.layers[0].mlp.down_proj.weight)
    corpus = [(problem.question, reward.habit_solution(problem.question, "-")) for problem in families.make_problems("habit", 64, 0)]
    monkeypatch.setattr(families, "make_corpus", lambda task, size, seed, noise: corpus * 4)
    monkeypatch.setitem(pairs.CORPUS, "habit", (256, 2))
    monkeypatch.setitem(pairs.LADDER, "habit", {"learner": (16, 1)})
    monkeypatch.setattr(pairs, "RELATIVES", {"same": {}, "twin": {"init": 1}, "early": {"stop_after": 1}})
    for name in ("same", "twin", "early"):
        pairs.make_member("habit", 3, name)
    same, twin, early = (models.load(pairs.directory("habit", 3) / name)[0].norm.weight for name in ("same", "twin", "early"))
    assert not torch.equal(same, twin) and not torch.equal(same, early)
    reward.save_problems(families.make_problems("habit", 8, 1), pairs.directory("habit", 3) / "heldout.jsonl")
    monkeypatch.setattr(pairs, "decode", lambda rollouts, tokenizer: [
        [reward.habit_solution(problem.question, operator) for operator in "++--"] + [""] * 12
        for problem in reward.load_problems(pairs.directory("habit", 3) / "heldout.jsonl")])
    found = pairs.measure("habit", 3, "same", 16)
    assert found["executed"] == 4 / 16 and found["distinct methods"] == 3 and found["distinct answers"] == 3
    assert found["method entropy"] == pytest.approx(-2 * 0.125 * math.log(0.125) - 0.75 * math.log(0.75))
    asked = [problem.question[0] for problem in reward.load_problems(pairs.directory("habit", 3) / "heldout.jsonl")]
    assert found["strict"] == [2 * (type_ in "AB") for type_ in asked]


# ---- README.md -----------------------------------------------------------------------------------------------------

def test_the_readme_points_at_the_lines_it_means():
    links = re.findall(r"\[(\w+\.py):(\d+)\]\((\w+\.py)#L(\d+)\) `([^`]+)`", (ROOT / "README.md").read_text())
    assert len(links) >= 8
    for name, number, target, anchor, code in links:
        assert (name, number) == (target, anchor) and code in (ROOT / name).read_text().splitlines()[int(number) - 1]
