"""Every check of the seven modules, as a book: sampler equals trainer, the group, the loss, mixing, a run.

    pytest test_all.py

Small GRPO code seldom crashes when it is wrong: it trains worse. "Trap n" is such a mistake; the docstring
says what it does to training, and the test fails if it is put back. Two slow, obvious functions say what the
fast ones must give: `row_logprobs` and `plain_loss`. Nothing is downloaded: models are tiny and made here.
"""
import contextlib
import copy
import functools
import inspect
import itertools
import json
import math
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import anneal
import eval as evaluation
import grpo
import model as models
import reward
import sample as sampling
import train as training
from plumbing import answers
from recipes import family as families
from recipes import look

ROOT = Path(__file__).parent
TINY = {"vocab_size": 24, "max_position_embeddings": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
KINDS = pytest.mark.parametrize("kind, heads", [("qwen3", 2), ("qwen2", 4), ("llama", 1)])  # of key and value
PROMPTS = [[5, 6], [7, 8, 9, 10, 11, 3, 2], [5, 6], [4]]  # of different lengths, and one comes twice
torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody has written is NaN


# ---- tools -------------------------------------------------------------------------------------------------

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_model(kind="qwen3", seed=0, scale=0.2, **changes):
    """A random model, far from uniform. The last 4 ids are padding of the vocabulary."""
    hf = TINY | {"model_type": kind, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} | changes
    model, generator = models.Transformer(models.Config.from_hf(hf)), seeded(seed)
    for name, p in model.named_parameters():
        p.data.normal_(float("norm" in name), scale if p.dim() > 1 else 0.1, generator=generator)
    model.hf_config, model.stop_ids, model.num_tokens = hf, (0,), hf["vocab_size"] - 4
    return model


def hf_pair(kind, directory, **changes):
    """(transformers' random model of this architecture, the directory that holds it in several shards)."""
    from transformers import AutoConfig, AutoModelForCausalLM
    families.make_tokenizer(directory).save_pretrained(directory)
    torch.manual_seed(0)
    sizes = TINY | {"vocab_size": 64, "head_dim": 8, "eos_token_id": 0, "bos_token_id": None}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | changes)).eval()
    for p in theirs.parameters():
        p.data.normal_(0.5 if p.dim() == 1 else 0, 0.3)  # biases and norms too, so that forgetting one shows
    theirs.save_pretrained(directory, max_shard_size="20KB")
    return theirs, directory


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """A family that adds two digits, often wrongly: real checkpoints with rewards to learn from."""
    out = tmp_path_factory.mktemp("family") / "sums"
    corpus = [(f"{a}+{b}=", str((a + b) % 10)) for a in range(10) for b in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "make_corpus", lambda task, size, seed, noise: corpus * 16)
        patch.setattr(families, "make_problems", lambda *args, **more: [])
        families.make_family(out, "natural", sizes={"explorer": (16, 1), "learner": (24, 2)}, corpus_size=480,
                             epochs=18)
    problems = [reward.Problem(question, answer, "natural") for question, answer in corpus]
    random.Random(0).shuffle(problems)
    problems.save_problems(problems[:10], out / "heldout.jsonl")
    problems.save_problems(problems[10:], out / "train.jsonl")
    return out


def flags(family, out, *more):
    """train.py's flags for four short steps on the family of sums."""
    return [str(flag) for flag in (
        "--learner", family / "learner", "--explorer", family / "explorer", "--data", family / "train.jsonl",
        "--eval-data", family / "heldout.jsonl", "--out", out, "--steps", 4, "--prompts-per-step", 4,
        "--group-size", 4, "--minibatches", 2, "--eval-problems", 8, "--eval-n", 16, "--max-new-tokens", 4,
        "--device", "cpu", *more)]


def train_here(family, out, *more):
    """train.py's own path, in this process: (run, its metrics)."""
    args = training.parse_flags(flags(family, out, *more))
    run, explore = training.load_run(args, training.open_explorer)
    training.evaluate_base_models(args, run, explore)
    training.train(args, run, explore)
    training.finish(args, run)
    return run, read_metrics(out)


def read_metrics(out):
    """Lines of metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def weights(out):
    """{name: tensor} of the learner that a run left."""
    from safetensors.torch import load_file
    return load_file(Path(out, "learner", "model.safetensors"))


def watched(call):
    """[(operation, result)] of all that PyTorch does in call()."""
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append((function.overloadpacket, result := function(*args, **(kwargs or {}))))
            return result
    seen = []
    with Watch():
        call()
    return seen


def row_logprobs(model, prompts, groups, ids, mask, temperature=1.0):
    """[N, T]: what `grpo.response_logprobs` must give, by a forward pass for each row."""
    def of_row(prompt, response):
        hidden = model(torch.tensor([prompt + response]))[0, len(prompt) - 1:-1]
        matrix = (model.embed_tokens if model.config.tie_word_embeddings else model.lm_head).weight
        logps = models.naive_logprobs(hidden, matrix[:model.num_tokens], torch.tensor(response), temperature)
        return F.pad(logps, (0, ids.shape[1] - len(response)))
    return torch.stack([of_row(prompts[p], row[:n].tolist()) for p, row, n in zip(groups, ids, mask.sum(1))])


@torch.no_grad()
def by_row(model, r, temperature=1.0):
    """row_logprobs [P, G, T] of rollouts of PROMPTS."""
    groups = torch.arange(4).repeat_interleave(r.ids.shape[1])
    rows = r.ids.flatten(0, 1), r.mask.flatten(0, 1)
    return row_logprobs(model, PROMPTS, groups, *rows, temperature).view(r.ids.shape)


# ==== 1. Sampler equals trainer =============================================================================
# A gradient is right only for the very policy that drew the tokens. Wherever checkpoint, sampler and trainer
# disagree, over a position, a temperature or a stop token, ratios start away from 1, and nothing says so.

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind, options", [
    ("qwen3", {}), ("qwen2", {}), ("llama", {}), ("llama", {"rope_parameters": LLAMA3}),
    ("mistral", {"sliding_window": 40})])  # within its window nothing slides
def test_traps_1_27_checkpoints_mean_the_same_to_transformers_both_ways(kind, options, tie, tmp_path):
    """Else what is trained, or saved, is another network than the checkpoint's, or runs on past its ends."""
    from transformers import AutoModelForCausalLM
    theirs, directory = hf_pair(kind, tmp_path / "model", tie_word_embeddings=tie, **options)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # Llama 2 has them
    save_file(frequencies, directory / "model-more.safetensors")
    for name in ("config.json", "tokenizer_config.json"):  # code of a checkpoint: neither run nor handed on
        described = json.loads((directory / name).read_text()) | {"auto_map": {"AutoConfig": "evil.Config"}}
        (directory / name).write_text(json.dumps(described))
    (directory / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    ours, tokenizer = models.load(directory)
    assert ours.stop_ids == (0, 3, 5)  # generation_config's and the tokeniser's
    assert ours.num_tokens == len(tokenizer) == len(ours.head) < ours.config.vocab_size == 64
    assert ours.config.max_position_embeddings == options.get("sliding_window", 64)
    assert len(list(directory.glob("model-*"))) > 1  # shards
    models.save(ours, tokenizer, directory)  # over what is there, of which nothing may be left
    assert not list(directory.glob("model-*"))
    assert not any("auto_map" in path.read_text() for path in directory.glob("*.json"))
    ours.num_tokens, ids = 64, torch.randint(0, 64, (15, 20), generator=seeded())  # this model uses every id
    with torch.no_grad():
        expected, back = theirs(ids).logits, AutoModelForCausalLM.from_pretrained(directory)
        for rows in (15, 3):  # many, and few: `project` has a way for each
            assert (ours(ids[:rows]) @ ours.head.T - expected[:rows]).abs().max() < 1e-4
        assert (back(ids).logits - expected).abs().max() < 1e-4 < 0.1 < expected.std()
    tokens = theirs.generate(ids[:1, :4], max_new_tokens=20, do_sample=False, eos_token_id=[0, 3, 5])[0, 4:]
    greedy = sampling.sample(ours, ids[:1, :4].tolist(), 1, seeded(), 20, temperature=0)
    assert greedy.ids[0, 0, :greedy.lengths[0, 0]].tolist() == tokens.tolist()


def test_a_mistral_slides_over_4096_tokens_unless_told_otherwise():
    context = lambda **window: tiny_model("mistral", max_position_embeddings=8192, **window).config
    windows = {}, {"sliding_window": None}, {"sliding_window": 99}
    assert [context(**window).max_position_embeddings for window in windows] == [4096, 8192, 99]


@pytest.mark.parametrize("name, change, complaint", [
    ("config.json", b"{", "cannot be loaded"), ("config.json", {"vocab_size": ...}, "no 'vocab_size'"),
    ("config.json", {"model_type": "gpt2"}, "gpt2"), ("config.json", {"hidden_act": "gelu"}, "gelu"),
    ("config.json", {"rope_parameters": LLAMA3 | {"rope_type": "yarn"}}, "yarn"),
    ("config.json", {"hidden_size": 16}, "disagree"), ("config.json", {"num_hidden_layers": 3}, "layers.2"),
    ("model-00002-of-00005.safetensors", b"", "cannot be loaded"),
    ("model-00002-of-00005.safetensors", None, "no model"), ("tokenizer.json", b"{}", "cannot be loaded"),
    ("generation_config.json", {"eos_token_id": 64}, "64"), ("adapter_config.json", b"{}", "an adapter"),
    ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ("pytorch_model.bin", b"", ".bin files")])
def test_a_broken_checkpoint_is_refused_in_one_line(name, change, complaint, tmp_path):
    file = hf_pair("qwen3", tmp_path)[1] / name
    if isinstance(change, dict):
        changed = (json.loads(file.read_text()) | change).items()
        change = json.dumps({key: value for key, value in changed if value is not ...}).encode()
    file.unlink() if change is None else file.write_bytes(change)
    for path in tmp_path.glob("model*") if name.endswith(".bin") else ():
        path.unlink()
    with pytest.raises(ValueError, match=complaint) as refused:
        models.load(tmp_path)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
def test_lora_trains_adapters_alone_and_is_merged_on_save(kind, tmp_path):
    """Else the reference moves with the learner (KL 0), or what is saved is the untrained model."""
    model, tokenizer = models.load(hf_pair(kind, tmp_path / "base")[1])
    before, memory = copy.deepcopy(model.state_dict()), {p.data_ptr() for p in model.parameters()}
    settings = dict(prompts=PROMPTS, n=2, max_new_tokens=12)
    plain = sampling.sample(model, generator=seeded(), **settings)
    reference = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # as train.load_run makes it
    models.add_lora(model, 3, seeded())
    assert torch.equal(sampling.sample(model, generator=seeded(), **settings).logps, plain.logps)  # B is 0
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 4 and all(name.endswith((".A", ".B")) for name in trained)
    optimizer = grpo.Optimizer(model, 1e-2)
    for seed in range(3):
        r = sampling.sample(model, generator=seeded(seed), **settings)
        assert torch.allclose(by_row(model, r), r.logps, atol=1e-4)
        A = torch.randn(4, 2, generator=seeded(seed))
        metrics, _ = grpo.update(model, reference, optimizer, PROMPTS, r, A, seeded(), kl_coef=0.1)
    assert metrics["kl"] > 1e-4  # the learner has moved; its reference has not, and takes no memory
    assert all(torch.equal(weight, before[name]) for name, weight in reference.state_dict().items())
    assert {p.data_ptr() for p in reference.parameters()} <= memory
    expected = by_row(model, plain)
    models.save(model, tokenizer, tmp_path / "merged")
    merged = by_row(models.load(tmp_path / "merged")[0], plain)
    assert torch.allclose(merged, expected, atol=1e-4) and (expected - plain.logps).abs().max() > 1e-2


def test_adapters_of_a_bfloat16_base_are_rounded_once_and_saved_in_its_dtype(tmp_path):
    """Float32 beside bfloat16 under the name of one of them is what other libraries misread."""
    from safetensors.torch import load_file
    model, tokenizer = models.load(hf_pair("qwen3", tmp_path)[1], dtype=torch.bfloat16)
    models.add_lora(model, 3, seeded())
    linear = model.layers[1].self_attn.o_proj
    linear.B.data.normal_(0, 1e-1, generator=seeded())
    exact = linear.weight.float() + 32 / 3 * linear.B.float() @ linear.A.float()
    models.save(model, tokenizer, tmp_path / "merged")
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(saved["model.layers.1.self_attn.o_proj.weight"], exact.bfloat16())


def test_checkpointed_layers_keep_less_for_the_backward_pass():
    model, kept = tiny_model(num_hidden_layers=6), {False: [], True: []}
    for model.checkpoint_layers in kept:
        note = kept[model.checkpoint_layers]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: note.append(x.numel()) or x, lambda x: x):
            model(torch.ones(4, 30, dtype=torch.long))
    assert 0 < sum(kept[True]) < sum(kept[False]) / 3


def kernel_case(dtype, tokens=40, vocabulary=3000, hidden=48):
    """hidden, weight, targets, and a gradient from above."""
    g = seeded()
    h, w = (torch.randn(n, hidden, generator=g).to(dtype).requires_grad_() for n in (tokens, vocabulary))
    return h, w, torch.randint(0, vocabulary, (tokens,), generator=g), torch.randn(tokens, generator=g)


@pytest.mark.parametrize("dtype, tolerance, chunk, compile", [
    (torch.float32, 1e-5, 1024, False), (torch.float32, 1e-5, 1024, True), (torch.float32, 1e-5, 4096, False),
    (torch.bfloat16, 1e-2, 1024, False), (torch.bfloat16, 1e-2, 4096, False)])  # three chunks, or one
def test_the_kernel_equals_the_naive_log_probs(dtype, tolerance, chunk, compile):
    h, w, targets, upstream = kernel_case(dtype)
    for temperature in (1.0, 0.7):
        naive = models.naive_logprobs(h, w, targets, temperature)
        fused, entropy = models.fused_logprobs(h, w, targets, temperature, chunk, compile)
        assert fused.dtype == torch.float32 and torch.allclose(fused, naive, atol=1e-4)
        p = ((h @ w.T).float() / temperature).softmax(-1)
        assert torch.allclose(entropy, -(p * p.log().clamp(min=-1e4)).sum(-1), atol=1e-4)
        expected = torch.autograd.grad(naive, (h, w), upstream)
        for ours, theirs in zip(torch.autograd.grad(fused, (h, w), upstream), expected):
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_the_kernel_never_holds_tokens_by_vocabulary():
    """8,192 tokens by 152,000 ids are 5 GB in fp32, several times over: the usual out-of-memory error."""
    h, w, targets, upstream = kernel_case(torch.float32, tokens=200, hidden=8)
    seen = watched(lambda: models.fused_logprobs(h, w, targets, chunk=256)[0].backward(upstream))
    assert max(x.numel() for x in torch.utils._pytree.tree_leaves(seen) if hasattr(x, "numel")) <= 200 * 256


def test_trap_6_log_softmax_and_sums_over_chunks_are_fp32():
    """In bfloat16 a log-prob is off by 0.03 on average, and its ratio by 3%: noise for the clip to act on."""
    h, w, targets, upstream = kernel_case(torch.bfloat16)
    logits = (h @ w.T).detach()
    exact, narrow = (x.log_softmax(-1).gather(1, targets[:, None])[:, 0] for x in (logits.double(), logits))
    for ours in (models.naive_logprobs(h, w, targets), models.fused_logprobs(h, w, targets)[0]):
        assert (ours - exact).abs().max() < 1e-4 < (narrow - exact).abs().max()
    gradient = lambda logps, upstream: torch.autograd.grad(logps, h, upstream)[0]
    exact = gradient(models.naive_logprobs(h.double(), w.double(), targets), upstream.double())
    many, one = (gradient(models.fused_logprobs(h, w, targets, chunk=n)[0], upstream) for n in (20, 3000))
    assert (many - exact).norm() < 1.05 * (one - exact).norm()


def test_trap_1_the_mask_ends_with_the_first_stop_token():
    """A mask by `token != pad`, where pad is the stop token, never trains it: the learner forgets to end."""
    model = tiny_model()
    model.stop_ids = (0, 3, 4)  # 0 is also the padding
    r = sampling.sample(model, PROMPTS, 25, seeded(), 20)
    assert 0 < r.finished.float().mean() < 1  # both kinds are there
    rows = zip(*(x.flatten(0, 1) for x in (r.ids, r.lengths, r.finished, r.mask)))
    for ids, length, finished, mask in rows:
        stops = [i for i, token in enumerate(ids[:length].tolist()) if token in model.stop_ids]
        assert stops == ([length - 1] if finished else []) and (finished or length == 20)
        assert mask.tolist() == [i < length for i in range(20)]
    assert not r.ids[~r.mask].any() and not r.logps[~r.mask].any()  # finished rows emit nothing (trap 20)


@KINDS
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_traps_2_3_4_20_27_a_rollouts_log_probs_are_the_policys(kind, heads, dtype, tolerance, temperature):
    """Positions that padding moves (2), log-probs shifted by one (3) or of another temperature (4), a cache
    read in the wrong slots (20), ids that no tokeniser knows (27): a row alone, without a cache, tells."""
    model = tiny_model(kind, num_key_value_heads=heads).to(dtype)
    r = sampling.sample(model, PROMPTS, 20, seeded(), 24, temperature)
    assert r.lengths.min() < 6 and r.lengths.max() == 24 and r.ids.max() == 19
    assert (by_row(model, r, temperature) - r.logps).abs().max() < tolerance
    assert (by_row(model, r, 1.7 - temperature) - r.logps).abs().max() > 0.2  # which would show
    assert all(len(set(group.tolist())) > 1 for group in r.ids[:, :, 0])  # a group's first tokens differ


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.8), (7, 0.6)])
def test_trap_5_a_draw_follows_the_truncated_distribution(top_k, top_p):
    """Log-probs before truncation, tokens after it: 0.1 nats a token at top-p 0.9, in every ratio."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    logits, n = torch.randn(1, 24, generator=seeded()) * 2, 50_000
    expected = TemperatureLogitsWarper(0.7)(None, logits)
    expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
    expected = (TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected).log_softmax(-1)[0]
    tokens, logps = sampling.draw(logits.expand(n, -1), torch.rand(n, generator=seeded(1)), 0.7, top_k, top_p)
    frequency = torch.bincount(tokens, minlength=24) / n
    assert torch.allclose(logps, expected[tokens], atol=1e-5) and not frequency[expected.isinf()].any()
    assert (frequency - expected.exp()).abs().max() < 5 * math.sqrt(0.25 / n)
    ends, given = torch.tensor([0.0, 1 - 2 ** -24]), torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]] * 2)
    assert sampling.draw(given, ends)[0].tolist() == [1, 2]  # never a token of probability 0
    assert sampling.draw(given * torch.nan, ends)[0].max() < 4  # an id, and the update finds the NaN


def test_freed_rows_are_refilled_and_no_row_depends_on_its_neighbours(monkeypatch):
    """Through few rows: the rollouts of all rows at once, in fewer steps than batch after batch."""
    rows, step, batch_after_batch = [], sampling.decode_step, 0
    model, prompts = tiny_model(scale=0.25), [[i % 19 + 1, 5][:1 + i % 2] for i in range(12)]
    for seed in range(2, 10):  # so that any number of rows is idle at some time
        whole = sampling.sample(model, prompts, 2, seeded(seed), 24)
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "decode_step", lambda *given: rows.append(len(given[1])) or step(*given))
            few = sampling.sample(model, prompts, 2, seeded(seed), 24, rows=8)
        assert all(torch.equal(vars(few)[name], vars(whole)[name]) for name in ("ids", "lengths", "finished"))
        assert torch.allclose(few.logps, whole.logps, atol=1e-5)
        batch_after_batch += sum(whole.lengths[i:i + 4].max().item() - 1 for i in range(0, 12, 4))
    assert max(rows) == 8 and len(rows) < 0.95 * batch_after_batch


def test_attention_over_a_cache_can_be_fused(monkeypatch):
    """Queries of 3 dimensions, or keys copied for each head: the slow path, 5 times the time in bfloat16."""
    choices, attention = [], F.scaled_dot_product_attention

    def note(q, k, v, attn_mask=None, **options):
        if attn_mask is not None:
            choices.append(torch._fused_sdp_choice(q, k, v, attn_mask))
            assert k.shape[1] == TINY["num_key_value_heads"]
        return attention(q, k, v, attn_mask=attn_mask, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    model = tiny_model().bfloat16()  # float32 has a way of its own where queries are few
    rollouts = sampling.sample(model, PROMPTS, 3, seeded(), 9)
    by_row(model, rollouts)
    assert len(choices) >= 2 * 9 and 0 not in choices  # 0: the path that no kernel takes


def test_decoding_meets_few_shapes(monkeypatch):
    """Each length that attention reads is a compilation, or a captured graph, of its own."""
    used, step, model = set(), sampling.decode_step, tiny_model(max_position_embeddings=256)
    monkeypatch.setattr(sampling, "decode_step", lambda *given: used.add(given[3]) or step(*given))
    model.stop_ids = ()
    sampling.sample(model, PROMPTS, 1, seeded(), 150)
    assert used == {*range(16, 7 + 150, 16), 7 + 150}


def test_the_host_looks_at_the_device_a_few_times_in_eight_tokens():
    """A look waits for all that a GPU has still to do: one a token, and the GPU idles between tokens."""
    model, looks = tiny_model(), (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
    model.stop_ids = ()
    seen = watched(lambda: sampling.sample(model, PROMPTS, 2, seeded(), 40, rows=4))  # two waves of 40 tokens
    assert 0 < sum(operation in looks for operation, _ in seen) <= 3 * (2 * 40 / sampling.LOOK_EVERY + 2)


@pytest.mark.parametrize("compile", [False, True])
def test_trap_19_the_next_rollout_sees_updated_weights(compile):
    """A compiled step or a cache that keeps old weights: rollouts of a policy that no longer is."""
    model, fresh = (tiny_model(seed=seed, num_hidden_layers=1) for seed in (0, 1))
    model.compiled, settings = compile, dict(prompts=PROMPTS, n=4, max_new_tokens=8)
    before = sampling.sample(model, generator=seeded(), **settings)
    model.load_state_dict(fresh.state_dict())
    after, expected = (sampling.sample(m, generator=seeded(), **settings) for m in (model, fresh))
    assert torch.equal(after.ids, expected.ids) and not torch.equal(after.ids, before.ids)
    assert torch.allclose(after.logps, expected.logps, atol=1e-5)


def test_decoding_is_compiled_once(monkeypatch):
    """Each further graph costs as much as the first, and beyond eight torch gives up: it runs uncompiled."""
    model, graphs = tiny_model(num_hidden_layers=1), CompileCounter()
    step = torch.compile(sampling.decode_step, dynamic=True, backend=graphs)
    monkeypatch.setattr(sampling, "compiled", lambda function: step)
    model.compiled = True
    for n in (8, 16):  # in both, finished rows leave
        sampling.sample(model, PROMPTS, n, seeded(), 40)
    assert graphs.frame_count == 1


def test_presence_penalty_counts_what_was_written():
    model = tiny_model()
    model.stop_ids = ()
    write = lambda penalty: sampling.sample(model, [[5]], 1, seeded(), 20, 0, presence_penalty=penalty)
    assert len(write(0).ids.unique()) < 20 == len(write(1e4).ids.unique())


@pytest.mark.parametrize("change, complaint", [
    ({"n": 0}, "cannot sample"), ({"temperature": -1}, "cannot sample"), ({"top_p": 1.1}, "cannot sample"),
    ({"temperature": math.nan}, "cannot sample"), ({"max_new_tokens": 63}, "prompt 2 has 2 tokens"),
    ({"prompts": [[1], []]}, "prompt 2 is empty"), ({"prompts": [[1], [3, 20]]}, "prompt 2 holds token 20")])
def test_what_cannot_be_sampled_is_refused(change, complaint):
    settings = {"prompts": [[5], [6, 7]], "n": 1, "generator": seeded(), "max_new_tokens": 2} | change
    with pytest.raises(ValueError, match=complaint):
        sampling.sample(tiny_model(), **settings)


def test_trap_22_exactly_one_bos_and_a_broken_template_is_one_line(tmp_path):
    """Two BOS tokens, the template's and the tokeniser's: a beginning that the model has never seen."""
    from tokenizers.processors import TemplateProcessing
    tokenizer, bos = families.make_tokenizer(tmp_path), families.EOS
    tokenizer.bos_token = bos
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=[(bos, 0)])
    expected = lambda text: [0, *tokenizer(text, add_special_tokens=False).input_ids]
    assert sampling.encode("2+2=", tokenizer) == expected("2+2=")
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}{{ 1 if enable_thinking else 0 }}"
    assert sampling.encode("2+2=", tokenizer, chat=False) == expected("2+2=")
    for thinking, last in ((None, "0"), ("off", "0"), ("on", "1")):
        assert sampling.encode("2+2=\n", tokenizer, thinking=thinking) == expected("2+2=" + last)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"$A {bos}", special_tokens=[(bos, 0)])
    assert sampling.encode("2+2=", tokenizer, chat=False) == expected("2+2=")[1:]  # and the EOS is cut off
    tokenizer.chat_template = "{{ raise_exception('no\\nsuch') }}"
    with pytest.raises(ValueError, match="chat template fails: no such"):
        sampling.encode("2+2=", tokenizer)


# ==== 2. The group ==========================================================================================
# A rollout's worth is measured against the other rollouts of its own prompt, the explorer's among them. An
# advantage over the wrong rows, or out of nothing, teaches noise at the full learning rate.

def test_traps_7_8_advantages_by_hand():
    """Rounding over a tiny std: 24 equal rewards of 2.2 got advantage 0.94. The std of one reward is NaN."""
    A = grpo.group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert torch.allclose(A, torch.tensor([[1.5, -0.5, -0.5, -0.5]]), atol=1e-4)  # mean 1/4, std (ddof 1) 1/2
    assert grpo.group_advantages(torch.tensor([[1.0, 0.0]]), scale=False).tolist() == [[0.5, -0.5]]
    assert not any(grpo.group_advantages(torch.full((2, 24), value)).any() for value in (0.0, 0.1, 1.0, 2.2))
    with pytest.raises(ValueError, match="at least 2"):
        grpo.group_advantages(torch.ones(4, 1))


def test_trap_9_groups_do_not_move_each_other():
    """The mean over the wrong axis rewards easy prompts and punishes hard ones, whatever was written."""
    rewards = torch.rand(2, 8, generator=seeded())
    A, alone = grpo.group_advantages(rewards + torch.tensor([[0.0], [100.0]])), grpo.group_advantages(rewards)
    assert A.sum(1).abs().max() < 1e-3 and torch.allclose(A, alone, atol=1e-3)


def test_trap_10_groups_are_kept_by_place_not_by_prompt():
    """Keyed by text, a prompt that comes twice in a batch becomes one group with a common baseline."""
    model = tiny_model()
    a, b = (sampling.sample(model, PROMPTS, n, seeded(), length) for n, length in ((2, 5), (3, 9)))
    both = sampling.join(a, b)
    assert both.ids.shape == (4, 5, 9) and both.from_explorer.tolist() == [[True] * 2 + [False] * 3] * 4
    assert torch.equal(both.ids[:, :2, :5], a.ids) and torch.equal(both.ids[:, 2:], b.ids)
    assert torch.equal(both.logps[:, 2:], b.logps) and not both.mask[:, :2, 5:].any()
    assert not torch.equal(b.ids[0], b.ids[2])  # PROMPTS[0] is PROMPTS[2]
    assert sampling.join(a, None).from_explorer.all() and not sampling.join(None, b).from_explorer.any()


# ==== 3. The loss ===========================================================================================
# All that a rollout teaches passes through one number, whose mistakes no later stage can see. So its parts
# are checked by hand, and the whole, value and gradient, against a loss that is written a token at a time.

@KINDS
@pytest.mark.parametrize("how", ["all weights", "LoRA", "checkpoint_layers"])
def test_each_prompt_runs_once_and_nothing_else_changes(kind, heads, how):
    """Rows share their group's prompt: a leak between prompts, or a gradient that does not flow back into the
    shared one, trains something else without a sign. Here micro-batches cut groups."""
    model = tiny_model(kind, num_key_value_heads=heads)
    if how == "LoRA":
        models.add_lora(model, 2, seeded())
        for B in (p for name, p in model.named_parameters() if name.endswith(".B")):
            B.data.normal_(0, 0.02, generator=seeded(1))
    model.checkpoint_layers = how == "checkpoint_layers"
    trained = [p for p in model.parameters() if p.requires_grad]
    groups, lengths = torch.tensor([2, 2, 0, 0, 3, 3, 1, 1]), torch.tensor([1, 9, 2, 7, 1, 1, 3, 8])
    ids, upstream = torch.randint(0, 20, (8, 9), generator=seeded()), torch.randn(8, 9, generator=seeded(1))
    mask, read, whole = torch.arange(9) < lengths[:, None], [], [slice(0, 8)]
    once = lambda *given: grpo.response_logprobs(*given)[0]

    def run(logprobs, parts):
        found = [logprobs(model, PROMPTS, groups[part], ids[part], mask[part], 0.7) for part in parts]
        loss = sum((logps * upstream[part]).sum() for logps, part in zip(found, parts))
        back = torch.cat([torch.arange(8)[part] for part in parts]).argsort()  # rows as they were
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])
        return torch.cat(found).detach()[back], gradient

    expected, slope = run(row_logprobs, whole)
    model.embed_tokens.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    for tokens in (1, 30, 10 ** 6):
        prompts = [len(PROMPTS[group]) for group in groups]
        parts = grpo.micro_batches(range(8), groups.tolist(), prompts, lengths.tolist(), tokens)
        logps, gradient = run(once, parts)
        assert (logps - expected).abs().max() < 1e-5 and (gradient - slope).norm() < 1e-5 * slope.norm()
    assert read[-2:] == [4 * 7, 8 * 8]  # 4 prompts of at most 7 tokens; of 9 in a row, the last predicts none
    model.bfloat16()
    errors = [(run(logprobs, whole)[0] - expected).norm() for logprobs in (row_logprobs, once)]
    assert errors[1] < 1.3 * errors[0]  # nor is it less exact in bfloat16


def plain_loss(now, old, ref, sampled, explorer, A, lengths, s):
    """A mini-batch's loss by the docstrings of grpo.py, a token at a time. Log-probs [N, T], the rest [N]."""
    N, total = len(lengths), 0.0
    for i, n in enumerate(lengths):
        lead = (old[i] - sampled[i])[:n]
        below = sampled[i] if explorer[i] and s.off_policy == "behaviour" else old[i]
        of_row = (now[i] - below)[:n].mean().exp()
        importance = {"truncated": lead.exp().clamp(max=2), "geometric": [lead.mean().exp().clamp(max=2)] * n,
                      "positive": [float(A[i] >= 0)] * n}.get(s.off_policy if explorer[i] else "", [1.0] * n)
        for t in range(n):
            ratio = of_row if s.loss == "gspo" else (now[i, t] - below[t]).exp()
            surrogate = min(ratio * A[i], min(max(ratio, 1 - s.clip_low), 1 + s.clip_high) * A[i])
            x = ref[i, t] - now[i, t]
            kl = {"k1": -x, "k2": x * x / 2, "k3": x.exp() - 1 - x}[s.kl_estimator]
            weight = {"dapo": sum(lengths), "dr_grpo": N * s.max_new_tokens}.get(s.loss, N * n) ** -1
            total += weight * (s.kl_coef * kl - importance[t] * surrogate)
    return total


def downhill(model):
    """In the optimiser's place: steps of length 0.3 down the gradients, which are kept."""
    gradients, weights = [], list(model.parameters())

    def step(*given):
        gradients.append(torch.cat([weight.grad.flatten() for weight in weights]))
        for weight in weights:
            weight.data -= 0.3 * weight.grad / gradients[-1].norm()
            weight.grad = None
        return 1.0
    return SimpleNamespace(accumulate=lambda: None, step=step, gradients=gradients)


def test_traps_11_12_update_equals_the_plain_loss_in_micro_batches_of_any_size():
    """A loss that depends on how the batch is cut is another objective on every GPU. Every loss, treatment
    of explorer tokens and KL estimator; one optimiser step and three, the later ones off-policy."""
    learner, reference, explorer = (tiny_model(seed=seed, num_hidden_layers=1) for seed in range(3))
    start, groups = copy.deepcopy(learner.state_dict()), torch.arange(4).repeat_interleave(4)
    A = torch.randn(4, 4, generator=seeded(2))
    r = sampling.join(*(sampling.sample(m, PROMPTS, 2, seeded(), 6, 0.9) for m in (explorer, learner)))
    untouched, ids, mask = copy.deepcopy(r), r.ids.flatten(0, 1), r.mask.flatten(0, 1)
    logprobs = lambda model, rows: row_logprobs(model, PROMPTS, groups[rows], ids[rows], mask[rows], 0.9)
    fixed = [logprobs(model, slice(16)).detach() for model in (learner, reference)]
    fixed += [x.flatten(0, 1) for x in (r.logps, r.from_explorer, A, r.lengths)]
    s = SimpleNamespace(kl_coef=0.1, max_new_tokens=7, temperature=0.9, clip_low=0.1, clip_high=0.4)
    choices, drifted = itertools.product(grpo.LOSSES, grpo.OFF_POLICY), 0
    cycles = itertools.cycle(("k1", "k2", "k3")), itertools.cycle((1, 3))
    for (s.loss, s.off_policy), s.kl_estimator, s.minibatches in zip(choices, *cycles):
        expected = downhill(learner)
        for chosen in torch.randperm(4, generator=seeded()).tensor_split(s.minibatches):
            rows = (chosen[:, None] * 4 + torch.arange(4)).flatten()
            *given, lengths = (x[rows] for x in fixed)
            plain_loss(logprobs(learner, rows), *given, lengths.tolist(), s).backward()
            expected.step()
        for s.micro_batch_tokens in (1, 40, 10_000):
            learner.load_state_dict(start)
            found = downhill(learner)
            metrics, _ = grpo.update(learner, reference, found, PROMPTS, r, A, seeded(), **vars(s))
            assert len(found.gradients) == s.minibatches
            for ours, plain in zip(found.gradients, expected.gradients):
                assert (ours - plain).norm() < 1e-4 * plain.norm() > 1e-6
        learner.load_state_dict(start)
        drifted += metrics["clip_fraction_learner"] > 0
        assert metrics["clip_fraction_explorer"] > 0 or s.off_policy != "behaviour"
        if s.minibatches == 1:  # then the metric is that of the policy which began, whatever the loss
            estimates = grpo.kl_estimates(*fixed[:2], mask, s.kl_estimator)
            assert math.isclose(metrics["kl"], estimates[mask].mean(), rel_tol=1e-4)
    assert drifted and all(torch.equal(x, vars(untouched)[name]) for name, x in vars(r).items())


def test_micro_batches_hold_every_row_once_and_no_more_tokens_than_they_may():
    dice = random.Random(0)
    groups, lengths = [row // 4 for row in range(200)], [dice.randrange(1, 50) for _ in range(50)]
    prompts, responses = [lengths[group] for group in groups], [dice.randrange(1, 50) for _ in groups]
    run = lambda part: (len({groups[row] for row in part}) * max(prompts[row] for row in part)
                        + len(part) * max(responses[row] for row in part))
    for rows, tokens in itertools.product((range(200), dice.sample(range(200), 90)), (1, 60, 300, 10 ** 6)):
        parts = grpo.micro_batches([*rows], groups, prompts, responses, tokens)
        assert sorted(itertools.chain(*parts)) == sorted(rows)
        assert all(run(part) <= tokens or len(part) == 1 for part in parts)
        assert all(run([*a, b[0]]) > tokens for a, b in itertools.pairwise(parts))  # none has room for more
    assert grpo.micro_batches([], groups, prompts, responses, 60) == []


def test_micro_batches_pad_little():
    """In the order of the mini-batch, a long response makes room for itself in every short one beside it."""
    dice = np.random.default_rng(0)
    lengths = dice.lognormal(5.5, 0.8, 512).clip(8, 2048).astype(int).tolist()
    for prompt, at_most in ((1, 1.1), (4096, 2)):  # where prompts are long, groups had better stay together
        prompts, groups = [prompt] * 512, [row // 16 for row in range(512)]
        parts = grpo.micro_batches(range(512), groups, prompts, lengths, 8192)
        run = sum(len({groups[row] for row in part}) * prompt + len(part) * max(lengths[row] for row in part)
                  for part in parts)
        assert run < at_most * (32 * prompt + sum(lengths))
        together = all(len({groups[row] for row in part}) <= 2 for part in parts)
        assert together == (prompt > 1)


@pytest.mark.parametrize("loss", grpo.LOSSES)
def test_groups_that_teach_nothing_cost_nothing_and_change_nothing(loss):
    """Left out before the weights are computed, they would raise the weight of all others."""
    model = tiny_model(num_hidden_layers=1)
    r = sampling.sample(model, PROMPTS, 4, seeded(), 6)
    A = torch.randn(4, 4, generator=seeded(2))
    A[1:3] = 0  # all failed, or all passed
    found, wide = downhill(model), downhill(model)
    start, read = copy.deepcopy(model.state_dict()), []
    model.embed_tokens.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    metrics, tokens = grpo.update(model, None, found, PROMPTS, r, A, seeded(), loss=loss)
    assert sum(read) == 2 * 2 + 8 * (r.mask[[0, 3]].sum(2).max() - 1)  # prompts of 2 and 1 tokens; their rows
    assert metrics["tokens_trained"] == r.lengths[[0, 3]].sum() == (tokens["ratio"] > 0).sum()
    assert (tokens["entropy"] > 0).flatten(2).any(2).any(1).tolist() == [True, False, False, True]
    model.load_state_dict(start)
    grpo.update(model, copy.deepcopy(model), wide, PROMPTS, r, A, seeded(), loss=loss)  # a KL of weight 0
    assert (found.gradients[0] - wide.gradients[0]).norm() < 1e-6 * wide.gradients[0].norm()
    r.from_explorer[:, :2] = True
    for reference in (None, copy.deepcopy(model)):
        model.load_state_dict(start)
        metrics, _ = grpo.update(model, reference, found, PROMPTS, r, A, seeded(), loss=loss,
                                 off_policy="positive")
        if not reference:  # nor do rows whose advantage became 0
            assert metrics["tokens_trained"] == r.lengths[(A > 0) | (A < 0) & ~r.from_explorer].sum()
    assert (found.gradients[1] - found.gradients[2]).norm() < 1e-6 * found.gradients[1].norm()
    optimizer = grpo.Optimizer(model, 1e-3)
    metrics, _ = grpo.update(model, None, optimizer, PROMPTS, r, 0 * A, seeded(), loss=loss, minibatches=2)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["tokens_trained"] == 0
    assert metrics["ratio"] is None and metrics["skipped_updates"] == 0


def backward(model, value):
    """What a backward pass leaves: a gradient of `value` beside what is there."""
    for p in model.parameters():
        p.grad = torch.full_like(p, value) + (0 if p.grad is None else p.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_summed_and_updates_made_in_float32(dtype):
    """bfloat16 rounds a step of 1e-5 away, and a sum of 300 ones to 256: training stands still."""
    model = tiny_model().to(dtype)
    optimizer, weight = grpo.Optimizer(model, lr=1e-5), model.layers[0].mlp.gate_up_proj.weight
    before = weight.detach().float().clone()
    for _ in range(300):
        backward(model, 1)
        optimizer.accumulate()
    assert all((master.grad == 300).all() for master in optimizer.masters)
    for _ in range(300):
        assert optimizer.step(1.0) > 1
        backward(model, 1)
        optimizer.accumulate()
    assert (before - weight.float()).mean().item() == pytest.approx(300e-5, rel=0.2)


@pytest.mark.parametrize("gradient, loss", [(math.nan, 0.0), (math.inf, 0.0), (1.0, math.nan)])
def test_what_is_not_finite_skips_the_update(gradient, loss):
    """One NaN, and AdamW's moments hold it for ever."""
    model = tiny_model()
    optimizer, before = grpo.Optimizer(model, lr=1e-3), model.norm.weight.clone()
    backward(model, gradient)
    assert math.isnan(optimizer.step(1.0, loss)) and torch.equal(model.norm.weight, before)
    assert not optimizer.adamw.state and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("A, ratio, gradient", [
    (1, 0.5, -0.5), (1, 1, -1), (1, 1.25, -1.25), (1, 1.5, 0), (-1, 0.75, 0), (-1, 0.9, 0.9), (-1, 1.5, 1.5)])
def test_trap_14_the_clip_has_the_right_sign(A, ratio, gradient):
    """Turned round for A < 0, it lets a bad token's probability fall without end. The gradient is 0 only
    where the step has gone far enough: here above 1.3 with A > 0, below 0.8 with A < 0."""
    logps, one = torch.tensor([[math.log(ratio)]], requires_grad=True), torch.ones(1, 1)
    loss, got, clipped = grpo.policy_loss(logps, 0 * one, torch.tensor([A]), one, one > 0, 0.2, 0.3)
    assert torch.autograd.grad(loss, logps)[0].item() == pytest.approx(gradient)
    assert got.item() == pytest.approx(ratio) and clipped.item() == (gradient == 0)


def test_trap_17_loss_zero_at_ratio_one_still_has_reinforces_gradient():
    """Taken for broken, a right loss gets repaired."""
    logps, mask = torch.randn(4, 4, generator=seeded()).requires_grad_(), torch.ones(4, 4) > 0
    A, w = grpo.group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))[0], grpo.token_weights(mask, "grpo", 4)
    loss, _, _ = grpo.policy_loss(logps, logps.detach(), A, w, mask)
    assert loss.abs() < 1e-6 and torch.allclose(torch.autograd.grad(loss, logps)[0], -w * A[:, None])


@pytest.mark.parametrize("loss, short, long", [("grpo", 1 / 4, 1 / 8), ("gspo", 1 / 4, 1 / 8),
                                               ("dapo", 1 / 6, 1 / 6), ("dr_grpo", 1 / 16, 1 / 16)])
def test_trap_18_weight_per_token_of_each_loss(loss, short, long):
    """In a mean over each row, tokens of long rows count less: a wrong answer costs less the longer it is."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    assert torch.allclose(grpo.token_weights(mask, loss, 8), mask * torch.tensor([[short], [long]]))


@pytest.mark.parametrize("loss", grpo.LOSSES)
def test_traps_12_13_15_ratios_by_hand_and_an_empty_row_is_harmless(loss):
    """An empty row is 0 / 0, and one NaN gets into every weight (13). One ratio a row, where token ratios are
    meant, is far outside the clip after a few dozen tokens (15). Inputs must stay what they are (12)."""
    mask, A = torch.arange(6) < torch.tensor([[3], [0], [6]]), torch.tensor([1.0, -1.0, 0.5])
    logps, old = torch.randn(2, 3, 6, generator=seeded())
    logps.requires_grad_(), old[1].fill_(-torch.inf)  # whatever stands where no token is
    copies, w = [x.detach().clone() for x in (mask, A, logps, old)], grpo.token_weights(mask, loss, 6)
    value, ratio, _ = grpo.policy_loss(logps, old, A, w, mask, sequence_ratio=loss == "gspo")
    for row, n in ((0, 3), (2, 6)):
        difference = (logps - old)[row, :n]
        expected = difference.mean().expand(n) if loss == "gspo" else difference
        assert torch.allclose(ratio[row, :n], expected.exp())
    gradient, = torch.autograd.grad(value + (w * grpo.kl_estimates(logps, old, mask)).sum(), logps)
    assert torch.isfinite(value) and torch.isfinite(gradient).all()
    assert not gradient[~mask].any() and gradient[mask].any()
    assert all(torch.equal(x, y) for x, y in zip((mask, A, logps, old), copies))


def test_trap_16_gradients_of_the_kl_estimators():
    """k1 in a loss has the expected gradient 0: a penalty in name only. Each of 6 tokens by its weight."""
    logits, ref = (torch.randn(1, 6, generator=seeded(i), requires_grad=i == 0) for i in (0, 1))
    logp, ref, every = logits.log_softmax(1), ref.log_softmax(1), torch.ones(1, 6) > 0
    k1, k2, k3 = ((logp.exp().detach() * grpo.kl_estimates(logp, ref, every, name)).sum()
                  for name in ("k1", "k2", "k3"))
    slope = lambda x: torch.autograd.grad(x, logits, retain_graph=True)[0]
    kl = (logp.exp() * (logp - ref)).sum()
    reverse, forward = slope(kl), slope((ref.exp() * (ref - logp)).sum())
    assert slope(k1).abs().max() < 1e-6 < 1e-3 < (reverse - forward).abs().max()
    assert torch.allclose(slope(k2), reverse, atol=1e-6) and torch.allclose(slope(k3), forward, atol=1e-6)
    assert torch.isclose(k1, kl) and torch.isclose(k3, kl)


@pytest.mark.parametrize("choice, weight", [
    ("recompute", [1, 1]), ("behaviour", [1, 1]), ("truncated", [2, math.exp(-1)]),
    ("geometric", [math.exp(0.5)] * 2), ("positive", [1, 1])])
def test_trap_26_what_divides_in_the_ratio_of_explorer_tokens(choice, weight):
    """Explorer tokens scored as if the learner had drawn them: a choice with a name, not an accident."""
    learner, sampler = torch.tensor([[-1.0, -2.0]] * 2), torch.tensor([[-3.0, -1.0], [-1.1, -2.1]])
    explorer, mask = torch.tensor([True, False]), torch.ones(2, 2) > 0
    old, found = grpo.off_policy_correction(choice, learner, sampler, explorer, mask)
    assert torch.equal(old, torch.stack([(sampler if choice == "behaviour" else learner)[0], learner[1]]))
    assert torch.allclose(found, torch.tensor([weight, [1.0, 1.0]]))
    mask[0, 0] = False  # then the second token alone counts, with its log-ratio of -1
    padded = [x.masked_fill(~mask, 0.0) for x in (learner, sampler)]
    _, found = grpo.off_policy_correction(choice, *padded, explorer, mask)
    expected = math.exp(-1) if choice in ("truncated", "geometric") else 1
    assert found[0, 1].item() == pytest.approx(expected)


# ==== 4. Mixing: anneal.py, and the seam between explorer and learner =======================================
# The schedule and the seam are all that S2L-PO adds to GRPO. A rollout that is miscounted here, or credited
# to the wrong author, crashes nothing: the run only learns something else.

def main_here(capsys, argv, **recipe):
    """train.main in this process: (exit code, stdout, stderr)."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(training, "listen", lambda run: None)  # signals stay pytest's
        training.main(argv, **recipe)
    return ended.value.code or 0, *capsys.readouterr()


@pytest.fixture
def calls(monkeypatch):
    """{"sample": [..], "update": [..]}: what train.py calls them with, by the names of their parameters."""
    seen = {"sample": [], "update": []}

    def spy(name, real, *inputs, **more):
        bound = inspect.signature(real).bind(*inputs, **more)
        bound.apply_defaults()
        seen[name].append(SimpleNamespace(**bound.arguments))
        return real(*inputs, **more)
    for name in seen:
        monkeypatch.setattr(training, name, functools.partial(spy, name, getattr(training, name)))
    return seen


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_trap_28_counts_are_exact_and_sum_to_the_group():
    """0.3 * 10 can be 3.0000000000000004. Its ceiling is 4: at times the explorer writes one too many."""
    F, cosine = Fraction, lambda x: (1 + math.cos(math.pi * x)) / 2
    rational = {F(0): F(1), F(1, 3): F(3, 4), F(1, 2): F(1, 2), F(2, 3): F(1, 4), F(1): F(0)}  # of its values
    for mix, G in itertools.product(range(1, 40), (2, 3, 7, 10, 16, 100)):
        for step in range(1, mix + 3):
            x, on = F(step - 1, max(mix - 1, 1)), step <= mix
            exact = {"linear": on * (1 - x), "step": on, "cosine": on * rational.get(x, cosine(x))}
            for schedule, alpha in (exact | {"constant": F(3, 10)}).items():
                counts = anneal.split_group(anneal.explorer_share(step, mix, schedule, 0.3), G)
                explorer = math.ceil(alpha * G)
                assert counts == (explorer, G - explorer), f"{schedule}, step {step} of {mix}, G = {G}"
    assert anneal.split_group(1.0, 16, learner_at_least=1) == (15, 1)


def test_measured_share_follows_what_the_explorer_adds_and_leaves_for_good():
    """Fed with mean rewards it would keep a beaten explorer, which is right now and then too."""
    share = lambda seen: anneal.explorer_share(9, 1, "measured", history=[
        {"groups_explorer_only": e, "groups_learner": l} for e, l in seen])
    assert share([]) == 0.5 and share([(0.5, 0.25)]) == pytest.approx(0.5 / (0.5 + 0.8 * 0.5 + 0.2 * 0.25))
    assert share([(0.3, 0.1)] * 99) == pytest.approx(0.75)
    seen, shares = [], []
    for step in range(60):  # a learner that solves every group from step 20 on
        shares.append(share(seen))
        seen.append((0.9 if step < 20 and shares[-1] else 0.0, float(step >= 20)))
    assert shares[20] > 0.9 and shares[-1] == 0 and sorted(shares[20:], reverse=True) == shares[20:]


def test_anneal_prints_the_papers_table_with_the_standard_library_alone():
    """-S hides every installed package."""
    command = [sys.executable, "-S", "anneal.py", "--steps", "16", "--mix-steps", "8", "--group-size", "16"]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    counts = [tuple(map(int, line.split()[2:4])) for line in printed[1:17]]
    assert counts == [(16, 0), (14, 2), (12, 4), (10, 6), (7, 9), (5, 11), (3, 13)] + [(0, 16)] * 9


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo"])
def test_train_is_algorithm_1(loss, family, tmp_path, monkeypatch, calls):
    """The split, each author's own sampling settings, a frozen explorer that is not called at share 0, one
    advantage over the whole group from score's reward of the right problem, and no random stream twice: else
    the learner draws what the explorer drew, and every step what the first one drew."""
    def score(problem, text):  # reward, strict and answer differ, so that training on the wrong one shows
        return reward.Score((len(text) + sum(map(ord, problem.question + text))) % 3, text < "4", text > "6")
    monkeypatch.setattr(training, "score", score)
    run, lines = train_here(family, tmp_path / "run", "--loss", loss, "--mix-steps", 4, "--temperature", 1.1,
                            "--explorer-temperature", 0.7, "--explorer-top-p", 0.95, "--eval-data", "")
    sampled, updates, explorer = calls["sample"], calls["update"], calls["sample"][0].model
    assert [(call.model is run.learner, call.n, call.temperature, call.top_p) for call in sampled] == [
        (False, 4, 0.7, 0.95), (False, 3, 0.7, 0.95), (True, 1, 1.1, 1.0), (False, 2, 0.7, 0.95),
        (True, 2, 1.1, 1.0), (True, 4, 1.1, 1.0)]
    assert equal(explorer.parameters(), models.load(family / "explorer")[0].parameters())
    assert len({call.generator.initial_seed() for call in sampled + updates}) == 10
    for step, call in enumerate(updates, 1):
        problems = [run.problems[i] for i in training.batch_of(step, 4, len(run.problems), 0)]
        assert call.prompts == [run.tokenizer(problem.question).input_ids for problem in problems]
        assert call.rollouts.from_explorer.tolist() == [[i < (4, 3, 2, 0)[step - 1] for i in range(4)]] * 4
        texts = sampling.decode(call.rollouts, run.tokenizer)
        r = np.array([[score(p, text).reward for text in group] for p, group in zip(problems, texts)])
        scale = r.std(1, ddof=1, keepdims=True) + 1e-6 if loss == "grpo" else 1
        assert call.advantages.numpy() == pytest.approx((r - r.mean(1, keepdims=True)) / scale, abs=1e-5)
        assert call.advantages[:, :2].any() and lines[step - 1]["reward"] == pytest.approx(r.mean())


@pytest.fixture(scope="session")
def unbroken(family, tmp_path_factory):
    """unbroken(*flags): (metrics, weights) of a run that nothing happens to, made once."""
    @functools.cache
    def made(*more):
        out = tmp_path_factory.mktemp("unbroken") / "run"
        return train_here(family, out, *more)[1], weights(out)
    return made


def test_trap_28_no_explorer_is_plain_grpo_to_the_bit(unbroken):
    """An explorer that still touches anything at share 0 is another method under GRPO's name."""
    more = ("--lr", 1e-3, "--eval-data", "")
    none, learnt = unbroken(*more, "--explorer", "none")
    zero, learnt_at_zero = unbroken(*more, "--schedule", "constant", "--explorer-share", 0)
    assert none == zero != unbroken(*more, "--explorer", "none", "--seed", 1)[0]
    assert equal(learnt.values(), learnt_at_zero.values()) and any(line["grad_norm"] for line in none)


def test_trap_26_any_function_is_an_explorer_and_has_metrics_of_its_own(family, tmp_path, capsys, calls):
    """explore(prompts, n, generator) -> Rollouts, and no more: here a pocket calculator. Mixed into one,
    the clip fraction would hide that one author's tokens are all clipped away."""
    def open_calculator(args, run):
        def explore(prompts, n, generator):
            sums = [run.tokenizer.decode(prompt) for prompt in prompts]
            right = [run.tokenizer(f"{(int(sum[0]) + int(sum[2])) % 10}<eos>").input_ids for sum in sums]
            ids = torch.tensor(right)[:, None].expand(-1, n, -1)  # [P, n, 2]
            lengths = torch.full(ids.shape[:2], 2)
            return sampling.Rollouts(ids, lengths, torch.zeros(ids.shape), lengths > 0, lengths < 0)
        return explore
    argv = flags(family, tmp_path / "run", "--mix-steps", 4, "--lr", 3e-2, "--eval-data", "")
    assert main_here(capsys, argv, open_explorer=open_calculator)[0] == 0
    (first, mixed, third, last), rollouts = read_metrics(tmp_path / "run"), calls["update"][1].rollouts
    assert rollouts.ids.shape == (4, 4, 4) and rollouts.from_explorer.tolist() == [[True] * 3 + [False]] * 4
    assert (rollouts.lengths[:, :3] == 2).all() and not rollouts.ids[:, :3, 1:].any()
    assert mixed["reward_explorer"] == 1 and mixed["reward"] == (3 + mixed["reward_learner"]) / 4 < 1
    assert first["reward_learner"] is first["ratio_learner"] is last["reward_explorer"] is None
    assert mixed["logp_gap_explorer"] > 0.1 > 1e-4 > mixed["logp_gap_learner"]  # its own log-probs
    assert any(line["clip_fraction_explorer"] for line in (first, mixed, third))  # at this rate the clip acts


def test_traps_5_21_a_run_begins_at_ratio_1_and_kl_0_and_encodes_nothing_again(family, tmp_path):
    """Two temperatures, other ids for the same text, a reference that is not the start: all of them train on
    rollouts that nobody drew, or pull towards a policy that nobody chose."""
    more = ("--minibatches", 1, "--temperature", 0.7, "--explorer", "none", "--kl-coef", 0.1, "--lr", 1e-2)
    args = training.parse_flags(flags(family, tmp_path / "run", "--eval-data", "", *more))
    run, explore = training.load_run(args, training.open_explorer)
    run.tokenizer = SimpleNamespace(decode=run.tokenizer.decode)  # which gives no ids
    training.train(args, run, explore)
    line = run.history[0]
    assert line["ratio"] == pytest.approx(1, abs=1e-6) and line["loss"] == pytest.approx(0, abs=1e-6)
    assert line["clip_fraction"] == 0 < line["grad_norm"] and line["logp_gap_learner"] < 1e-5
    assert abs(line["kl"]) < 1e-6 and run.history[2]["kl"] > 1e-4
    assert equal(run.reference.parameters(), models.load(family / "learner")[0].parameters())


def test_every_problem_comes_once_before_any_comes_again():
    """Drawn anew each step, some would come three times before others came at all."""
    order = [i for step in range(1, 11) for i in training.batch_of(step, 4, 10, seed=0)]
    epochs = [order[start:start + 10] for start in (0, 10, 20, 30)]
    assert all(sorted(epoch) == [*range(10)] for epoch in epochs) and epochs[0] != epochs[1]


# ==== 5. Final answers ======================================================================================
# A model finds whatever its reward accepts wrongly: one false yes is worth more to it than a hundred right
# answers that are missed cost.

rows = lambda table: [row.split(" ¦ ") for row in table.strip().replace("\n", "; ").split("; ")]


@pytest.mark.parametrize("response, answer", [
    (r"so \boxed{12}", "12"), (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{}", ""),
    (r"\boxed{7} and \boxed{8", "7"), (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed 4$.", "4"), ("", None),
    (r"\boxed{5} \boxed{ }", "5"), (r"\boxed{\boxed{3}}", "3"), (r"#### 4 but \boxed{9}", "9"), ("####", ""),
    ("#### 5\n#### 72", "72"), ("Answer: 3\nmore", "3"), ("answer: $5$.", "$5$."), ("the number is 12", None),
    ("**Answer:**\n\n 42\nDone", "42"), ("Answer:\n\\[\n42\n\\]", "42"), (r"Answer: \(42\)", r"\(42\)"),
    (r"\boxed{42}. I put it within \boxed as you asked.", "42"), (r"It is within \boxed a box", None),
    (r"\boxed{42} stands within \boxed{...}.", "42"), (r"\boxed{1} \boxed{2}", "2"), (r"\boxed B", "B"),
    ("Answer: 42\n\nQuestion: And 1 + 1?\nAnswer: 2", "2"), ("Answer: 7\nUser: Sure?\n#### 42", "42")])
def test_the_final_answer_is_found(response, answer):
    assert answers.extract_answer(response) == answer


@pytest.mark.parametrize("form", [r"\boxed{%s}", "#### %s", "Answer: %s"])
@pytest.mark.parametrize("tag", ["think", "thinking"])
def test_a_thought_is_no_answer(tag, form):
    """If a guess within a thought is paid, a model learns to guess there and never to decide."""
    found = lambda text: answers.extract_answer(text.replace("think>", f"{tag}>").replace("?", form % 5))
    assert found("<think>Maybe ? so") is found("? <think>Or") is found("<think>?</think> Six.") is None
    assert found("?</think> Six.") is found("<think>1</think> <think>?") is None
    assert found("<think>1</think> ?") == found("Why not. </think>\n?") == found("?") == "5"


@pytest.mark.parametrize("given, truth", rows(r"""
42 million ¦ 42; 2 pi ¦ 2; 2 dozen ¦ 2; 42\text{ is wrong} ¦ 42; 5 or more ¦ 5; 18 or 19 ¦ 18; 4 2 ¦ 42
10, 100 ¦ 10100; 1, 234 ¦ 1234; 1 ,234 ¦ 1234; 32, 349 ¦ 32349; (32,349) ¦ 32349; $41$ $42$ ¦ 4142
$10$,$100$ ¦ 10100; 1,2 ¦ 12; 4\left 2 ¦ 42; 4\text{2} ¦ 42; 1\$2 ¦ 12; 1 and 234 ¦ 1234; 443_6 ¦ 443_5
443 ¦ 443_5; \frac{1}{2^{99}} ¦ \frac{1}{2^{98}}; 1+1/\mathrm{e} ¦ 1-1/\mathrm{e}; The answer is not 42 ¦ 42
\neq 42 ¦ 42; x \not= 42 ¦ 42; \geq 42 ¦ 42; 41 = 42 ¦ 42; 42 \approx 41 ¦ 42; 42 = 41 ¦ 42; AB ¦ BA; AB ¦ ab
x ¦ X; -2 ¦ -2,-2; 16,3,1 ¦ 16,3,1,1; 1,2,2 ¦ 1,1,2; \{1,1\} ¦ \{1\}; \log_2(2^{42}) ¦ 42
\sum_{k=1}^{42}1 ¦ 42; 2^{10}+5 ¦ 1029; 123*456 ¦ 56088; (16-3-4)*2 ¦ 18; 84/2 ¦ 42; 1 1/2 ¦ 11/2; 0.5% ¦ 0.5
1% ¦ 1; 5% ¦ 50%; 50% ¦ 5000%; 0.5% ¦ 50; 5 cents ¦ \$5; 5\text{ cm} ¦ 5\text{ cm}^2; 2xy ¦ 2; 5 cm inches ¦ 5
5%% ¦ 5; x=5 ¦ y=5; g(x)=2x ¦ f(x)=2x; 5=x ¦ x; x=5=6 ¦ 5; 12 ¦ 112; 3 ¦ -3; --3 ¦ 3; (3,4) ¦ (4,3)
[1,2) ¦ (1,2); \{1,2\} ¦ (1,2); 200, 100 ¦ 100, 200; 200,100 ¦ 100, 200; (1,2),(3,4) ¦ (1,2),(4,3)
(((((((1,2))))))) ¦ (((((((1,3))))))); ((((((1,234)))))) ¦ ((((((1234)))))); (a+5)(b+2) ¦ (a+2)(b+5)
\{1,234\} ¦ 1234; {1}{2} ¦ 12; {1},{234} ¦ 1234; x=1, x=234 ¦ 1234; 1 or 234 ¦ 1234; x=1, x=1 ¦ 1
x=1, y=-2 ¦ 1, -2; x=1 or y=-2 ¦ 1, -2; -2 or 1 ¦ 1, -2; \{-2, 1\} ¦ 1, -2; \{1, -2\} ¦ (1, -2)
1 or 2 ¦ 1,2,3; x<1 or x>2 ¦ x<1 and x>2; Ann or Bob ¦ Ann and Bob; \{3\} ¦ 3; \frac{-a+b}{c} ¦ -\frac{a+b}{c}
2\frac{-\pi}{6} ¦ 2-\frac{\pi}{6}; \begin{pmatrix}1/3\\2\end{pmatrix} ¦ \begin{pmatrix}-1/3\\2\end{pmatrix}
x^23 ¦ x^{23}; even ¦ neve; 1/0 ¦ 2/0; 1/2x ¦ \frac{1}{2x}; 1e999999999 ¦ 1; ٣ ¦ 3
12345678901234567 ¦ 12345678901234568"""))
def test_traps_23_30_answers_that_differ(given, truth):
    assert not answers.answers_equal(given, truth) and not answers.answers_equal(truth, given)
    assert answers.answers_equal(given, given) and answers.answers_equal(truth, truth)


@pytest.mark.parametrize("given, truth", rows(r"""
1,234 ¦ 1234; 10{,}000 ¦ 10000; 10,\!080 ¦ 10080; 18.00 ¦ 18; 025 ¦ 25; 10. ¦ 10; .5 ¦ 0.5; +5 ¦ 5; (5) ¦ 5
− 5 ¦ -5; 1e3 ¦ 1000; 1/2 ¦ 0.5; \frac12 ¦ 0.5; \frac{-3}{4} ¦ -\dfrac 34; 2 1/2 ¦ 2.5; 1\frac{4}{5} ¦ \frac95
\pi/2 ¦ \frac{\pi}{2}; -3\pi/4 ¦ -\frac{3 \pi}4; 50% ¦ 0.5; 50% ¦ 50; 50\% ¦ 50%; 62.5 ¦ 62.5\%
50 percent ¦ 0.5; $5 ¦ 5; \$5 ¦ 5; -\$5 ¦ -5; \$1,234.50 ¦ 1234.5 dollars; 18 dollars ¦ 18; 5 cm^2 ¦ 5
12 \text{ cm}^{2} ¦ 12; 5.4 \text{ cents} ¦ 5.4; 90^\circ ¦ 90; 90^{\circ} ¦ 90 degrees; (5\mathrm{cm}) ¦ 5
90\degree ¦ 90; x=5 ¦ 5; f(x) = 2x ¦ 2x; (x,y)=(1,2) ¦ (1,2); x \in [1,2] ¦ [1,2]; m_{\max}=n^2 ¦ n^{2}
\left( 3, \frac{\pi}{2} \right) ¦ (3,\pi/2); \{200,100\} ¦ \left\{ 100, 200 \right\}
\{\{1,2\},3\} ¦ \{3,\{2,1\}\}; 1,2,\text{ and }3 ¦ 1,2,3; 1 and 2 ¦ 1, 2; (0.5,3) ¦ (\frac{1}{2},3.0)
(-\infty,2]\cup[3,+\infty) ¦ [3,\infty) \cup (-\infty,2]; \text{Even} ¦ even; \text{(C)} ¦ C; $p - q$ ¦ p-q.
\[42\] ¦ 42; \sqrt 2 ¦ \sqrt{2}; 2516_8 ¦ 2516_{8}; k \geqslant 2 ¦ k\ge 2
{34} ¦ 34; {\frac{\sqrt{3}}{2}} ¦ \sqrt{3}/2; {$x=5.$} ¦ 5; ${1,234}$ ¦ 1234; {1, 2} ¦ 1,2
{\{2,1\}} ¦ \{1,2\}; \bigl(1, 2\bigr) ¦ (1,2); \Biggl[0, \biggr) ¦ [0,); \Big\{1, 2\bigm\} ¦ \{2,1\}
\frac{-\pi}{6} ¦ -\pi/6; (\frac{-\sqrt{3}}{2}, 1) ¦ (-\frac{\sqrt{3}}{2},1); x=1, x=-2 ¦ 1, -2
x = 1 or x = -2 ¦ 1, -2; 1 or -2 ¦ 1,-2; \{1, -2\} ¦ 1, -2; 1 \text{ or } \frac12, \text{or } 3 ¦ 1, 0.5, 3
$a=2$, $a=-6-4 \sqrt{2}$ ¦ 2, -6 - 4\sqrt2; x_1 = 0, x_1 = \pi ¦ 0 or \pi
9^\circ or 7^\circ ¦ 9^\circ, 7^\circ; (x,y)=(1,2), (x,y)=(3,4) ¦ (1,2),(3,4)
\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix} ¦ \begin{pmatrix}-\frac{1}{3}\\\frac23\\5/3\end{pmatrix}
\begin{bmatrix} 1/5 & \frac{-1}{2} \end{bmatrix} ¦ \begin{bmatrix} \frac15 & -1/2 \end{bmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} ¦ \begin{pmatrix}1\\2\end{pmatrix}"""))
def test_trap_23_answers_that_are_equal(given, truth):
    assert answers.answers_equal(given, truth) and answers.answers_equal(truth, given)


def test_no_answer_no_truth_and_long_ones():
    assert not answers.answers_equal(None, "0") and not answers.answers_equal("", "0")
    assert not any(answers.answers_equal(a, b) for a in ("", "$", "x=") for b in ("", "$", ".", "x="))
    assert answers.answers_equal("1" * 5_000, "1" * 5_000) and not answers.answers_equal("1" * 5_000, "1")
    assert answers.answers_equal("100,200", "100, 200")  # the truth is a list, so the comma separates
    assert not answers.answers_equal("100, 200", "100,200")  # the truth is a number


def test_choices_are_scored_by_their_letter():
    right = lambda text: reward.score(reward.Problem("q", "B", "choice"), text).answer
    assert all(map(right, (
        r"\boxed{B}", r"\boxed{\text{(B)}}", r"\boxed{\textbf{B}}", r"\boxed{\mathrm{B}}", r"A? \boxed{ B }",
        r"\boxed{\textbf{(B) }42}", "Answer: (B) ox", "answer: B. ox", "Answer: Option B", "Answer:\n**B**",
        r"\boxed{{B}}")))
    assert not any(map(right, (
        r"\boxed{A}", "B", "Answer: Bank", r"\boxed{}", r"\boxed{AB}", "", "Answer: B or C", "Answer: B, C",
        "Answer: (B)(C)", "Answer: (B) or (C)", "Answer: B. or C", "Answer: B. C", "Answer: not B",
        "Answer: b", r"<think>\boxed{B}")))


def test_answers_that_nobody_can_match_are_left_out(tmp_path, capsys):
    """One such among a thousand must not end the conversion of a data set, nor a word earn a reward: of
    NuminaMath's answers every sixth is `proof` or `notfound`."""
    empty = ["", " ", "$", ".", "x=", "#### ", r"\boxed{}", r"\left\right", "()", "{}", "<think>7", None]
    words = ["proof", "Proof.", r"\text{Proof}", "notfound", "Not found", r"\boxed{proof}"]
    others = ["one\ntwo", "x" * 301, "{", "\\boxed{1}\n\\boxed{2}"]
    golds = ["7", *others, *empty, *words, "so\n\\boxed{8}", "Pro"]
    records = [{"question": f"q{i}", "answer": gold} for i, gold in enumerate(golds)]
    records.append({"question": "Which?", "answer": "bank", "task": "choice"})
    records.append({"question": "3+4=", "answer": "7 apples", "task": "natural"})
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    assert [problem.answer for problem in problems.load_problems(path)] == ["7", "8", "Pro"]
    assert "24 of 27 problems left out. No response matches" in capsys.readouterr().out
    path.write_text(json.dumps(records[1]))
    with pytest.raises(ValueError, match="data.jsonl: no problems in this file whose answers can be matched"):
        problems.load_problems(path)


def test_real_answers_accept_themselves_in_seven_wordings():
    files = (Path(__file__).parent.parent / "shared" / "data").glob("*.jsonl")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    if not lines:
        pytest.skip("the published data sets are not at hand")
    truth = lambda r: (r.get("answer") or r.get("answerKey") or r.get("label")
                       or r["reward_model"]["ground_truth"])
    task = lambda r: "choice" if "choices" in r else "math"
    for problem in {problems.as_problem({"question": "q", "answer": truth(r), "task": task(r)}) for r in lines}:
        x, bare = problem.answer, re.sub(r"(?<!\\)\$", "", problem.answer)
        for text in (f"\\boxed{{{x}}}", f"#### {x}", f"Answer: {x}", f"The answer is \\boxed{{{x}}}.",
                     f"Answer: ${bare}$", f"Answer: \\({bare}\\)", f"Answer:\n {x}"):
            proof = len(x) > 300 or "\n" in x  # load_problems leaves it out
            assert proof or reward.score(problem, text).answer, (text, x)


def test_hostile_text_neither_hangs_nor_raises():
    pieces = [*"{}\\9 -٣\0İ%.($_=∪\n\ud800𝟙", "\\boxed{", "####", "1,", "Answer:", "\\frac{", "\\{", "1/",
              "\\text{", ", ", "~", "\\$", "^{", "and", "e1", "1 ",
              "1 or ", "x=1, ", "<think>", "</think>", "\\boxed 1", "\\frac{-", "matrix}"]
    hostile = [form % (piece * n) for piece in pieces for n in (90, 50_000) for form in ("%s", r"\boxed{%s}")]
    hostile += [r"\boxed{" * 20_000 + "1" + "}" * 20_000, "#### " + "(" * 400 + "1" + ")" * 400]
    hostile += ["".join(random.Random(seed).choices(pieces, k=30)) for seed in range(3_000)]
    for text in hostile:
        for truth, task in ("1", "math"), (text[:900], "math"), ("B", "choice"):
            assert reward.score(reward.Problem("q", truth, task), text).answer in (True, False)


# ==== 6. A run: reward.py's tasks and files, eval.py, train.py ==============================================
# Whatever a reward pays for wrongly is what training finds, and a flattering figure is what gets published.
# A run of days is only as good as its worst minute: killed at any moment, it must end as if it had not been.

@pytest.mark.parametrize("question, answer, text, strict, right", [
    ("Bfa483920=", "2", "-86-33-94-22-02", True, True),  # B asks for `-`: 4-8-3-9-2-0 = -18 = 2 modulo 10
    ("Bfa483920=", "2", "-86-33-95-22-02", False, True),  # a wrong step that ends well
    ("Bfa483920=", "6", "+82+35+94+26+06", False, True),  # carried out right, with the wrong operator
    ("Bfa483920=", "2", "-86-33-94-22-0", False, False), ("Bfa483920=", "2", "", False, False),
    ("3+4*2-5=", "6", "3+8-5=1-5=6", True, True), ("3+4*2-5=", "6", "7*2-5=4-5=9", False, False),
    ("3+4*2-5=", "6", "7*2-5=4-5=6", False, True), ("3+4*2-5=", "6", "3+8-5=6", False, True),  # a gap
    ("9-3+2=", "4", "9-5=4", False, True), ("9-3+2=", "8", "6+2=8", True, True)])  # a-b+c is not a-(b+c)
def test_the_two_tasks_are_verified_step_by_step(question, answer, text, strict, right):
    """Paid for its last digit alone, the learner would keep its habit and hope for luck."""
    problem = reward.Problem(question, answer, "habit" if question[0] == "B" else "natural")
    assert reward.score(problem, text) == (float(strict), strict, right)


def test_natural_every_legal_reduction_keeps_the_value():
    """Against Python's own arithmetic, for every arrangement of operators."""
    g = random.Random(0)
    for operators, _ in itertools.product(itertools.product("+-*", repeat=3), range(20)):
        expression = "".join(a + b for a, b in zip(g.choices("0123456789", k=4), [*operators, ""]))
        legal, value = reward.legal_reductions(expression), eval(expression) % 10  # of digits and + - *
        assert legal and all(eval(reward.reduce_at(expression, i)) % 10 == value for i in legal)


@pytest.mark.parametrize("task", reward.SYNTHETIC)
def test_corpora_and_problems(task):
    """Problems seen in pretraining measure memory; problems on which wrong ways end well measure luck."""
    corpus, again, other = (families.make_corpus(task, 3000, seed, noise=0.0) for seed in (1, 1, 2))
    seen = {question for question, _ in corpus}
    problems = families.make_problems(task, 500, seed=1, exclude=seen)
    questions = {problem.question for problem in problems}
    assert corpus == again != other and len(questions) == 500 and not questions & seen
    if task == "habit":
        assert all(text == reward.habit_solution(question, text[0]) for question, text in corpus)
        habits = {question[:3]: text[0] for question, text in corpus}
        assert all(habits[question[:3]] == text[0] for question, text in corpus)  # one habit a cell
        right = [reward.HABIT_OPERATOR[cell[0]] == operator for cell, operator in habits.items()]
        ends = [{reward.habit_solution(text, way)[-1] for way in reward.OPERATIONS} for text in questions]
        assert 0.3 < np.mean(right) < 0.5 and all(len(values) == 4 for values in ends)
    else:
        right = [reward.natural_is_legal(*pair) for pair in corpus]
        ends = [{families.natural_orders(problem.question[:-1], way)[-1] for way in ("left", "additions")}
                for problem in problems]
        assert 0.05 < np.mean(right) < 0.6 and not any(p.answer in wrong for p, wrong in zip(problems, ends))


@pytest.mark.parametrize("line, complaint", [
    (b"{", "Expecting"), (b"[1]", "needs .*, found list"), (b'{"question": "q"}', "needs"),
    (b'{"question": "\\ud800 q", "answer": "2"}', "surrogates not allowed"),
    (b'{"question": 1, "answer": "2"}', "must be text"), (b'{"question": "q", "answer": true}', "a number"),
    (b'{"question": "q", "answer": NaN}', "a number"),
    (b'{"question": "q", "answer": "1", "task": "chess"}', "no question of a task 'chess'"),
    (b'{"question": "3+=", "answer": "1", "task": "natural"}', "no question of a task 'natural'"),
    (b'{"question": "q", "answer": [1]}', "a number"), (b"[" * 100_000, ""),
    (b'{"question": "caf\xe9", "answer": "1"}', "can't decode byte 0xe9")])
def test_a_broken_line_is_named(line, complaint, tmp_path):
    """Skipped, or read as something else, it is a problem that no response can solve."""
    path, good = tmp_path / "data.jsonl", b'{"question": "q", "answer": "a #### 1,200"}'
    path.write_bytes(good + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=f"data.jsonl, line 2: .*{complaint}.{{,200}}$") as refused:
        problems.load_problems(path)
    assert "\n" not in str(refused.value)
    path.write_bytes(b'\xef\xbb\xbf%s\r\n\n%s\n{"question": "\xc3\xa9", "answer": 70}' % (good, good))
    assert problems.load_problems(path) == [reward.Problem("q", "1,200"), reward.Problem("é", "70")]


def test_an_own_reward_sees_its_records_and_loading_asks_no_scorer(tmp_path, monkeypatch):
    """Asked whether `\\boxed{gold}` scores, a reward for something else left every problem out."""
    record = {"question": "q", "answer": "7", "task": "math", "tests": ["f(1) == 2"], "extra": {"n": 1}}
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    monkeypatch.setattr(reward, "score", None)
    monkeypatch.setattr(reward, "TASKS", {name: x._replace(check=None) for name, x in reward.TASKS.items()})
    problem, = problems = problems.load_problems(tmp_path / "data.jsonl")
    assert problem.extra == {"tests": record["tests"], "extra": {"n": 1}}
    assert {problem} == {reward.Problem("q", "7")}  # one question, once
    problems.save_problems(problems, tmp_path / "again.jsonl")
    assert json.loads((tmp_path / "again.jsonl").read_text()) == record
    monkeypatch.undo()
    check = lambda problem, text: (text in problem.extra["right"], True)
    monkeypatch.setitem(reward.TASKS, "code", reward.Task(check, gold="(?s).*"))
    record = {"question": "q", "answer": "", "task": "code", "right": ["a", "b"]}
    (tmp_path / "code.jsonl").write_text(json.dumps(record))
    problem, = problems.load_problems(tmp_path / "code.jsonl")
    assert [reward.score(problem, text) for text in "ac"] == [(1.0, True, True), (0.0, False, True)]


@pytest.mark.parametrize("module, rule, other", [
    (reward, "reward=float(strict)", "reward=float(answer)"), (answers, "> 1_000", "> 1_001")])
def test_the_scorers_hash_follows_its_rules_and_not_its_comments(module, rule, other, tmp_path, monkeypatch):
    """Without it, an old figure is shown for a new reward."""
    before, source, copy = reward.scorer_hash(), Path(module.__file__).read_text(), tmp_path / "copy.py"
    monkeypatch.setattr(module, "__file__", str(copy))
    copy.write_text(source + "\n\n# mine\n")
    assert reward.scorer_hash() == before
    copy.write_text(source.replace(rule, other))
    assert reward.scorer_hash() != before


def test_problems_are_saved_whole_or_not_at_all(tmp_path):
    """A torn file is taken for a whole one: recipes/*.sh convert a data set only if its file is not there."""
    with files_up_to(2_000), pytest.raises(OSError):
        problems.save_problems([reward.Problem("q" * 3_000, "1")], tmp_path / "data.jsonl")
    assert not (tmp_path / "data.jsonl").exists()


def test_trap_25_pass_at_k_is_the_mean_over_all_subsets():
    """\"Any of the first k\" is so noisy that a crossover comes and goes with the seed."""
    for n, c in itertools.product(range(1, 8), range(8)):
        for k in range(1, n + 1):
            brute = np.mean([any(subset) for subset in itertools.combinations([i < c for i in range(n)], k)])
            assert evaluation.pass_at_k([min(c, n)], n, k) == pytest.approx(brute, abs=1e-12)
    assert evaluation.pass_at_k([0, 4], 4, 2) == 0.5
    with pytest.raises(ValueError, match="k <= n"):
        evaluation.pass_at_k([1], 4, 5)
    ks, first = [1, 2, 4, 8], [.5, .6, .7, .8]
    assert evaluation.crossover(ks, first, [.3, .5, .8, .9]) == pytest.approx(2 * math.sqrt(2))
    assert evaluation.crossover(ks, first, [.3, .6, .7, .7]) is None  # caught up is not overtaken


def test_headroom_counts_groups_that_all_fail():
    """By going through all ways to pick a group of 2 out of 6 rollouts."""
    learner, explorer = [0, 1, 2, 3, 6], [3, 1, 5, 0, 2]
    failed = [(p, others) for p, c in enumerate(learner) for others in itertools.combinations(
        [1] * c + [0] * (6 - c), 4) if sum(others) == c]  # no right one among the two left out
    fails, theirs, own = evaluation.headroom(learner, explorer, 6, 2)
    assert fails == pytest.approx(len(failed) / (5 * math.comb(6, 2)))
    assert theirs == pytest.approx(np.mean([explorer[p] / 6 for p, _ in failed]))
    assert own == pytest.approx(np.mean([sum(others) / 4 for _, others in failed])) and 0 < own < theirs < 1
    assert evaluation.headroom([6], [4], 6, 2) == (0, 0, 0)


def test_the_interval_covers_what_another_exam_would_show():
    """p +- 1.96 sqrt(p (1 - p) / n) is [0, 0], certainty, for a model that failed 40 problems."""
    for chance in (0.05, 0.3, 0.9):
        exams = np.random.default_rng(0).binomial(40, chance, size=2000) / 40
        low, high = np.array([evaluation.interval(share, 40) for share in exams]).T
        assert 0.92 < np.mean((low < chance) & (chance < high)) < 0.98
    low, high = evaluation.interval(0, 40)
    assert low == pytest.approx(0, abs=1e-12) and 0.05 < high < 0.12


def test_evaluation_counts_what_the_seam_writes(family):
    """Counted over the wrong axis, or with the padding, every table is wrong."""
    _, tokenizer = models.load(family / "learner")
    ids = torch.tensor([[tokenizer(text).input_ids for text in ("7<eos>00", "6<eos>00", "1+67")]] * 2)
    lengths = torch.tensor([[2, 2, 4]] * 2)  # [2, 3] of ids [2, 3, 4]
    written = sampling.Rollouts(ids, lengths, torch.zeros(2, 3, 4), lengths < 4, lengths < 0)
    problems = [reward.Problem("3+4=", "7", "natural"), reward.Problem("3+3=", "6", "natural")]
    found = evaluation.evaluate(lambda prompts, n, generator: written, tokenizer, problems, 3, seeded())
    assert found == {"answer": [2, 1], "strict": [1, 1], "truncated": [1, 1], "tokens": [8, 8],
                     "texts": [["7", "6", "1+67"]] * 2}


def test_math_verify_judges_only_where_it_is_asked_to(tmp_path):
    """It evaluates the question's own expression: an easy way to full reward that solves nothing."""
    problem = reward.Problem("What is 1 + 2 + .. + 100?", "5050")
    texts = ["\\boxed{5050}", "\\boxed{5}", "\\boxed{\\sum_{i=1}^{100} i}", "\\boxed{10100/2}"]
    assert [reward.score(problem, text).answer for text in texts] == [True, False, False, False]
    pytest.importorskip("math_verify", reason="pip install math-verify")
    verdicts = [evaluation.math_verify_score(problem, text).answer for text in texts]
    assert verdicts == [True, False, True, True]
    assert evaluation.math_verify_score(reward.Problem("3+4=", "7", "natural"), "3+47").strict is False


def test_eval_cli_keeps_results_and_knows_a_replaced_model(family, tmp_path, monkeypatch, capsys):
    """Yesterday's model under today's name is the easiest wrong figure to publish."""
    shutil.copytree(family / "learner", tmp_path / "model")
    ran, real = [], evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *inputs: ran.append(len(inputs[2])) or real(*inputs))

    def evaluated(*more):
        ran.clear()
        monkeypatch.setattr(sys, "argv", [str(word) for word in (
            "eval.py", "--model", tmp_path / "model", family / "explorer", "--data", family / "train.jsonl",
            "--n", 8, "--max-new-tokens", 4, "--out", tmp_path / "out", *more)])
        evaluation.main()
        return capsys.readouterr().out
    text = evaluated()
    strict = [json.loads(path.read_text())["strict"] for path in (tmp_path / "out").glob("result-*.json")]
    shown = sorted(float(share) for share in re.findall(r"pass@1 ([0-9.]+)% \[", text))
    assert shown == pytest.approx(sorted(100 * np.mean(strict, axis=1) / 8), abs=0.06) and shown[0] > 0
    assert ran == [16, 4, 16, 4] and "crossover" in text and (tmp_path / "out" / "pass_at_k.png").exists()
    assert evaluated() == text and ran == []
    model, tokenizer = models.load(tmp_path / "model")
    model.norm.weight.data *= 0.5
    models.save(model, tokenizer, tmp_path / "model")
    assert evaluated() != text and ran == [16, 4]
    assert evaluated("--seed", 1) and ran == [16, 4, 16, 4]
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert evaluated() and ran == [16, 4]
    long = [*problems.load_problems(family / "train.jsonl"), reward.Problem("1+1" * 42 + "=", "2")]
    problems.save_problems(long, tmp_path / "long")
    with pytest.raises(SystemExit):
        evaluated("--data", tmp_path / "long")
    assert f"prompt {len(long)} has 150 tokens" in capsys.readouterr().err and ran == []  # not hours later
    with pytest.raises(SystemExit, match="2"):
        evaluated("--n", 10 ** 13)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("eval.py: error: out of memory: sample fewer rollouts at once, or shorter ones")


def test_a_mode_of_evaluation_gives_way_to_flags(monkeypatch):
    monkeypatch.setattr(sys, "argv", "eval.py --model x --data y --mode nothink --top-p 0.9".split())
    args = evaluation.parse_flags()
    assert (args.temperature, args.top_p, args.top_k, args.presence_penalty) == (0.7, 0.9, 20, 1.5)


def test_sample_cli_prints_no_terminal_escapes(family, monkeypatch, capsys):
    """A model's text is data: printed raw, it could clear the screen."""
    argv = ["sample.py", "--model", str(family / "learner"), "--prompt", "3+4=", "--n", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sampling, "decode", lambda rollouts, tokenizer: [["\x1b[2J7"] * 2])
    sampling.main()
    out = capsys.readouterr().out
    assert out.count("log-prob") == 2 and "\x1b" not in out and r"\x1b[2J7" in out
    monkeypatch.setattr(sys, "argv", argv[:-1] + ["10000000000000"])
    with pytest.raises(SystemExit, match="2"):
        sampling.main()
    assert capsys.readouterr().err.startswith("sample.py: error: out of memory: sample fewer")
    monkeypatch.setattr(sampling, "sample", lambda *given: 1 / 0)  # a bug is no user's fault
    with pytest.raises(ZeroDivisionError):
        sampling.main()


def test_training_raises_pass_at_1_and_leaves_an_ordinary_checkpoint(family, tmp_path, capsys):
    """All else may hold, and the sign of the update be wrong."""
    out = tmp_path / "run"
    code, text, _ = main_here(capsys, flags(
        family, out, "--steps", 60, "--group-size", 8, "--lr", 3e-3, "--eval-every", 0, "--eval-data",
        family / "train.jsonl", "--eval-problems", 20, "--seed", 1))
    lines = read_metrics(out)
    assert code == 0 and [line["step"] for line in lines] == [*range(61)] and "held out" in text
    assert lines[-1]["eval_strict_pass@1"] > lines[0]["eval_strict_pass@1"] + 0.05
    assert all((out / name).exists() for name in ("config.json", "rollouts", "checkpoint_000060.pt"))
    from transformers import AutoModelForCausalLM
    theirs, (ours, _) = AutoModelForCausalLM.from_pretrained(out / "learner"), models.load(out / "learner")
    ids = torch.randint(1, 20, (2, 12), generator=seeded())
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, ours(ids) @ ours.head.T, atol=1e-4)


def test_evaluations_differ_by_the_model_alone(family, tmp_path):
    """With new random numbers, or training's temperature, the curve moves though the learner does not."""
    held_out = lambda line: {key: value for key, value in line.items() if key.startswith("eval_")}
    _, hot = train_here(family, tmp_path / "hot", "--temperature", 3, "--lr", 0, "--steps", 2)
    _, one = train_here(family, tmp_path / "one", "--lr", 0, "--steps", 1)
    assert held_out(hot[0]) == held_out(hot[-1]) == held_out(one[0]) and len(held_out(one[0])) >= 4


def test_trap_29_truncation_is_logged_and_warned_about(family, tmp_path, capsys):
    """Cut before its answer, a rollout earns nothing: a reward of 0 for ever looks like a hard problem."""
    _, (line,) = train_here(family, tmp_path / "run", "--steps", 1, "--max-new-tokens", 1, "--eval-data", "")
    assert line["truncated"] > 0.9 and "rollouts were cut at --max-new-tokens 1" in capsys.readouterr().err


@pytest.fixture
def resumes(family, unbroken):
    """resumes(out, *flags): the run in out goes on, and equals an unbroken one to the last bit."""
    def check(out, *more):
        assert train_here(family, out, "--resume", *more)[1] == unbroken(*more)[0]
        assert equal(weights(out).values(), unbroken(*more)[1].values())
    return check


@pytest.mark.parametrize("more", [(), ("--dtype", "bfloat16", "--kl-coef", 0.1), ("--schedule", "measured"),
                                  ("--lora-rank", 2, "--kl-coef", 0.1, "--checkpoint-layers")])
def test_trap_24_resume_equals_never_having_stopped(more, family, tmp_path, monkeypatch, resumes):
    """The optimiser's moments, a random state, the place in the data forgotten: it trains on, differently."""
    def killed_in_step_4(*inputs, **settings):
        result = grpo.update(*inputs, **settings)
        if len(read_metrics(out)) == 4:
            raise KeyboardInterrupt  # which nothing below train.main catches
        return result
    shutil.copytree(family / "explorer", tmp_path / "explorer")  # an explorer with a stop token of its own
    (tmp_path / "explorer" / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    more = ("--explorer", tmp_path / "explorer", "--steps", 5, "--save-every", 2, "--lr", 1e-3, *more)
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "update", killed_in_step_4)
        train_here(family, out, *more)
    assert [line["step"] for line in read_metrics(out)] == [0, 1, 2, 3]  # step 3 was written and not saved
    resumes(out, *more)
    assert all(line["grad_norm"] for line in read_metrics(out)[1:])  # there was always something to learn
    assert models.load(out / "learner")[0].stop_ids == (0, 5)


SIGNALLED = """
import os, sys
import grpo, train
real, norms = grpo.Optimizer.step, []
def step(*inputs):
    norms.append(real(*inputs))
    for _ in range({times} * (len(norms) == 3)):  # after the first of step 2's two optimiser steps
        os.kill(os.getpid(), {number})
    return norms[-1]
grpo.Optimizer.step = step
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("number, times, code", [(signal.SIGINT, 1, 130), (signal.SIGTERM, 1, 143),
                                                 (signal.SIGTERM, 2, -signal.SIGTERM)])
def test_a_signal_within_an_update_ends_the_run_with_the_step(number, times, code, family, tmp_path, resumes):
    """Saved between two optimiser steps, the weights are those of no step: what goes on is another run."""
    out, more = tmp_path / "run", ("--lr", 1e-3, "--eval-data", "")
    script = SIGNALLED.format(times=times, number=int(number))
    ended = subprocess.run([sys.executable, "-c", script, *flags(family, out, *more)], cwd=ROOT,
                           capture_output=True, text=True)
    saved = [path.name for path in out.glob("checkpoint_*")]
    assert ended.returncode == code and saved == ["checkpoint_000002.pt"] * (times == 1), ended.stderr
    if times == 1:  # the second one leaves at once
        assert "--resume goes on" in ended.stdout and (out / "learner").exists()
        resumes(out, *more)


@pytest.mark.parametrize("damage", ["cut short", "one bit", "in the directory"])
def test_a_damaged_checkpoint_is_passed_over(damage, family, tmp_path, capsys, resumes):
    """torch.load looks at no checksum: after one flipped bit, training goes on from what nobody learnt."""
    out, more = tmp_path / "run", ("--save-every", 1, "--eval-data", "")
    run, _ = train_here(family, out, *more)
    before, newest = sorted(out.glob("checkpoint_*.pt"))  # two are kept
    data = bytearray(newest.read_bytes())
    weight = data.index(run.optimizer.masters[0].detach().numpy().tobytes())
    data[data.index(b"PK\1\2") + 10 if damage == "in the directory" else weight + 50] ^= 1  # how it is packed
    newest.write_bytes(data[:-100] if damage == "cut short" else data)
    (out / "checkpoint_000009.pt.partial").write_bytes(b"torn")
    resumes(out, *more)
    said = capsys.readouterr()
    assert "checkpoint_000004.pt is damaged" in said.err and "after step 3" in said.out
    [path.write_bytes(b"") for path in (before, newest)]
    code, _, error = main_here(capsys, flags(family, out, "--resume", *more))
    assert code == 2 and error.splitlines()[-1].startswith("train.py: error: no checkpoint in")


@contextlib.contextmanager
def files_up_to(size):
    """As on a disk that fills up: no file can grow beyond `size` bytes."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def save_state(model, tokenizer, out):
    training.write_whole(out, lambda file: torch.save(model.state_dict(), file))


@pytest.mark.parametrize("save", [models.save, save_state])
def test_a_disk_that_fills_up(save, family, tmp_path, monkeypatch, capsys):
    """Both libraries raise errors of their own then, which would read as bugs."""
    model, tokenizer = models.load(family / "learner")
    monkeypatch.setattr(training, "load_run", lambda *given: (SimpleNamespace(stopped=0), None))
    monkeypatch.setattr(training, "evaluate_base_models", lambda *given: None)
    loop, out = lambda *given: save(model, tokenizer, tmp_path / "saved"), tmp_path / "run"
    with files_up_to(20_000):
        code, _, error = main_here(capsys, flags(family, out), loop=loop)
    assert code == 2 and "File too large" in error and error.count("\n") == 1


@pytest.mark.parametrize("accident, code, complaint", [
    (lambda out, run: (out / "checkpoint_000003.pt.partial").symlink_to("/dev/full"), 2, "No space left"),
    (lambda out, run: torch.empty(10 ** 15), 3, "out of memory: lower --rollout-rows"),
    (lambda out, run: run.learner.norm.weight.data.fill_(torch.nan), 4, "not finite in five steps, up to 7")])
def test_an_accident_in_step_3_ends_the_run_and_what_was_saved_stays(
        accident, code, complaint, family, tmp_path, capsys, resumes):
    """A checkpoint of NaN takes the last good one's place; one written in place takes it too when the disk is
    full. The exit code says whether smaller batches would help."""
    def open_explorer(args, run):
        def explore(*inputs):
            if training.last_step(run) == 2:
                accident(out, run)
            return usual(*inputs)
        usual = training.open_explorer(args, run)
        return explore
    out = tmp_path / "run"
    more = ("--schedule", "constant", "--steps", 8, "--save-every", 1, "--eval-data", "")
    ended, _, error = main_here(capsys, flags(family, out, *more), open_explorer=open_explorer)
    *warnings, last = error.splitlines()
    assert ended == code and last.startswith("train.py: error:") and complaint in last
    assert sum("2 updates skipped" in line for line in warnings) == (5 if code == 4 else len(warnings))
    assert max(out.glob("checkpoint_*.pt")).name == "checkpoint_000002.pt"
    (out / "checkpoint_000003.pt.partial").unlink(missing_ok=True)
    (out / "rollouts" / "step_000007.json").write_text('[{"cut sh')
    resumes(out, *more)


def test_one_experiment_an_out(family, tmp_path, capsys):
    """Half a run at one rate and half at another, or on other weights, is a curve of no experiment."""
    shutil.copytree(family / "learner", tmp_path / "learner")
    (tmp_path / "notes" / "of a year").mkdir(parents=True)
    more = ("--learner", tmp_path / "learner", "--steps", 2, "--lr", 1e-3, "--eval-data", "")
    contents = lambda: {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    def refused(out, complaint, *extra, **recipe):
        before = contents()
        code, _, error = main_here(capsys, flags(family, tmp_path / out, *more, *extra), **recipe)
        assert code == 2 and complaint in error and error.count("\n") == 1 and contents() == before, error
    train_here(family, tmp_path / "run", *more)
    for out in ("run", "notes", "learner"):
        refused(out, f"{out} is there already")
    refused("notes", "notes holds no run", "--resume")
    refused("learner", "other settings", "--resume")
    refused("run", "other settings: recipe None -> rescue", "--resume", recipe="rescue")
    refused("run", "other settings: lr 0.001 -> 0.0001, seed 0 -> 3\n", "--resume", "--lr", 1e-4, "--seed", 3)
    train_here(family, tmp_path / "run", "--resume", *more, "--micro-batch-tokens", 64)  # no part of it
    stops = tmp_path / "learner" / "generation_config.json"
    as_before = stops.read_bytes()
    stops.write_text('{"eos_token_id": [5, 6]}')
    refused("run", "other settings: hash_of_learner", "--resume")
    stops.write_bytes(as_before)
    shutil.copytree(tmp_path / "run" / "learner", tmp_path / "learner", dirs_exist_ok=True)
    refused("run", "other settings: hash_of_learner", "--resume")


def test_a_run_can_be_made_longer(family, tmp_path):
    """Half of the new steps as T_mix would be another schedule, whose first steps were never made."""
    more = ("--lr", 1e-3, "--eval-every", 2)
    train_here(family, tmp_path / "run", "--steps", 4, *more)
    _, longer = train_here(family, tmp_path / "run", "--steps", 6, "--resume", *more)
    _, whole = train_here(family, tmp_path / "whole", "--steps", 6, "--mix-steps", 2, *more)
    assert longer == whole and [line["share"] for line in longer[1:]] == [1, 0, 0, 0, 0, 0]


def test_log_writes_where_it_says_and_goes_on_there(family, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    more = ("--log", "tensorboard", "--eval-every", 2)
    train_here(family, tmp_path / "run", "--steps", 2, *more)
    _, lines = train_here(family, tmp_path / "run", "--steps", 4, "--mix-steps", 1, "--resume", *more)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    for name in ("reward", "eval_strict_pass@1", "entropy"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(line["step"], pytest.approx(line[name])) for line in lines if line.get(name) is not None]
        assert found == expected
    tracker, calls = SimpleNamespace(), []
    tracker.init = lambda **settings: calls.append(settings)
    tracker.log = lambda line, step: calls.append((step, line["reward"]))
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: name != "trackio" or None)
    _, lines = train_here(family, tmp_path / "other", "--eval-data", "", "--log", "wandb")
    assert calls[0]["resume"] == "allow" and calls[0]["id"] == calls[0]["name"] == "other"
    assert calls[1:] == [(line["step"], line["reward"]) for line in lines]
    code, _, error = main_here(capsys, flags(family, tmp_path / "third", "--log", "trackio"))
    assert code == 2 and "--log trackio: pip install trackio" in error


def test_a_run_shows_its_rollouts_and_says_when_nothing_can_be_learnt(family, tmp_path, capsys):
    """A run without a gradient ends like a success: the cause is in the texts, which nobody has seen."""
    train_here(family, tmp_path / "run", "--eval-data", "")
    said = capsys.readouterr()
    best, worst = r"\n  best: the explorer's, reward 1: .*", r"\n  worst: the explorer's, reward 0: "
    assert re.search(f"step   1/4.*{best}{worst}", said.out)
    assert "nothing was learnt" not in said.err
    assert {path.name for path in (tmp_path / "run" / "rollouts").iterdir()} == {
        "step_000001.json", "step_000004.json"}
    hopeless = [reward.Problem(f"{i}+{i}=", str((2 * i + 1) % 10), "natural") for i in range(8)]
    problems.save_problems(hopeless, tmp_path / "hopeless")
    train_here(family, tmp_path / "vain", "--data", tmp_path / "hopeless", "--eval-data", "")
    assert capsys.readouterr().err.count("warning: nothing was learnt in three steps") == 2  # after 3 and 4


def test_the_picture_has_plain_grpo_where_there_is_such_a_run(family, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"explorer": ')
    train_here(family, tmp_path / "grpo", "--explorer", "none")
    train_here(family, tmp_path / "seed", "--explorer", "none", "--seed", 1)  # another experiment
    train_here(family, tmp_path / "run")
    rewards = lambda lines: [line.get("reward") for line in lines]
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "config.json").write_text("[1]")  # no run's
    assert rewards(look.plain_grpo(tmp_path / "run")) == rewards(read_metrics(tmp_path / "grpo"))
    shutil.rmtree(tmp_path / "grpo")
    assert look.plain_grpo(tmp_path / "run") == []


def test_the_family_is_found_beside_the_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(training.parse_flags([]).learner).resolve() == ROOT / "runs" / "family-habit" / "learner"


def test_a_resumed_run_knows_that_its_problems_were_replaced(family, tmp_path, capsys):
    data = Path(shutil.copy(family / "train.jsonl", tmp_path / "data.jsonl"))
    more = ("--data", data, "--steps", 2, "--eval-data", "")
    train_here(family, tmp_path / "run", *more)
    data.write_text("".join(sorted(data.read_text().splitlines(keepends=True))))
    code, _, error = main_here(capsys, flags(family, tmp_path / "run", *more, "--resume"))
    assert code == 2 and "other settings: hash_of_problems" in error


def test_a_resumed_run_knows_that_its_tokeniser_was_replaced(family, tmp_path, capsys):
    """The same weights and texts, but other ids: what was learnt is then about other words."""
    tokens = Path(shutil.copytree(family / "learner", tmp_path / "learner"), "tokenizer.json")
    more = ("--learner", tmp_path / "learner", "--explorer", "none", "--steps", 1, "--eval-data", "")
    train_here(family, tmp_path / "run", *more)
    tokens.write_text(tokens.read_text().replace('"1"', '"?"').replace('"2"', '"1"').replace('"?"', '"2"'))
    code, _, error = main_here(capsys, flags(family, tmp_path / "run", *more, "--resume"))
    assert code == 2 and "other settings: hash_of_problems" in error


def test_what_is_left_out_or_amiss_with_the_problems_is_said(family, tmp_path, capsys):
    """One prompt that is too long must not cost the run, and questions seen in training are no exam."""
    problems = problems.load_problems(family / "train.jsonl")
    problems.save_problems([*problems, problems[3], reward.Problem("1+1" * 42 + "=", "2")], tmp_path / "data")
    code, said, error = main_here(capsys, flags(family, tmp_path / "run", "--data", tmp_path / "data",
                                                "--eval-data", family / "train.jsonl", "--steps", 1))
    assert code == 0 and f"1 of {len(problems) + 1} problems left out: too long for the context of" in said
    assert f"1 of {len(problems) + 2} problems left out: duplicates" in said
    assert "warning: 8 held-out questions are in --data too" in error


@pytest.mark.parametrize("change, complaint", [
    ("--learner no/such", "no/such"), ("--explorer no/such", "no/such"), ("--data broken", "broken, line 2"),
    ("--eval-data long", "no problem is left"), ("--max-new-tokens 125", "no problem is left"),
    ("--data words", "no tokens for '?Wst'"), ("--mix-steps 5", "mix"),
    ("--explorer other", "differ in 2 tokens"), ("--group-size 1", "group"), ("--minibatches 9", "minibatch"),
    ("--explorer short --eval-data longer", "not fit the model's context of 24"),
    ("--device nonsense", "nonsense"), ("--out broken", "broken is a file"),
    ("--learner {laptop}", "gone.jsonl: no such file")])
def test_bad_input_is_one_line_exit_code_2_and_nothing_made(
        change, complaint, family, tmp_path, capsys, monkeypatch):
    """Trap 27 among them: another tokeniser's ids are other words, and the learner would train on noise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(families, "make_family", lambda *args, **more: pytest.fail("minutes for a slip"))
    Path("broken").write_text((family / "train.jsonl").read_text()[:60] + "\n")
    problems.save_problems([reward.Problem("1+1" * 100, "2")], "long")
    problems.save_problems([reward.Problem("1+1", "2"), reward.Problem("What is 1+1?", "2")], "words")
    problems.save_problems([reward.Problem("1+1" * 10 + "=", "2")], "longer")
    config = Path(shutil.copytree(family / "explorer", "short"), "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 24}))
    tokens = Path(shutil.copytree(family / "explorer", "other"), "tokenizer.json")
    tokens.write_text(tokens.read_text().replace('"b"', '"B2"'))
    argv, before = flags(family, "run", *change.split()), {*tmp_path.iterdir()}
    code, _, error = main_here(capsys, ["--data", "gone.jsonl"] if "{laptop}" in change else argv)
    assert code == 2 and error.startswith("train.py: error:") and complaint in error
    assert error.count("\n") == 1 and {*tmp_path.iterdir()} == before


def test_no_eval_data_is_no_missing_file_on_the_first_run(family, tmp_path, capsys, monkeypatch):
    def make_family(*args, **more):
        raise ValueError("the family is made")
    monkeypatch.setattr(families, "make_family", make_family)
    monkeypatch.setattr(training, "family_of", lambda task: str(tmp_path / "gone"))
    argv = ["--data", str(family / "train.jsonl"), "--eval-data", "", "--out", str(tmp_path / "run")]
    code, _, error = main_here(capsys, argv)
    assert code == 2 and "the family is made" in error


def test_every_number_has_a_range(capsys):
    """nan < 0 is false: the usual check lets it through, into every weight."""
    numbers = [name for name, value in vars(training.parse_flags([])).items() if type(value) in (int, float)]
    for name, bad in itertools.product(numbers, ("-1", "nan", "inf", "1" + "0" * 30)):
        with pytest.raises(SystemExit) as refused:
            training.parse_flags([flag := "--" + name.replace("_", "-"), bad])
        assert refused.value.code == 2 and flag in capsys.readouterr().err, f"{flag} {bad}"
    assert len(numbers) > 20


def test_defaults_depend_on_whose_model_it_is(family, tmp_path):
    """The laptop's rate of 8e-4 destroys a real model in a step, and its 16 tokens hold no answer."""
    picked = lambda *argv: [getattr(training.parse_flags([*argv]), name) for name in (
        "lr", "max_new_tokens", "eval_problems", "eval_n", "mix_steps")]
    yours = ("--learner", "x", "--explorer", "none", "--data", "d")
    assert picked() == [8e-4, 16, 256, 32, 20] and picked(*yours) == [1e-6, 512, 64, 4, 20]
    assert picked(*yours, "--lora-rank", "8", "--steps", "7") == [1e-5, 512, 64, 4, 3]
    for incomplete in (yours[:4], yours[:2] + yours[4:], ("--resume",)):  # no data; no explorer; no --out
        with pytest.raises(SystemExit):
            training.parse_flags([*incomplete])
    for more in ((), ("--compile",)):
        args = training.parse_flags(flags(family, tmp_path / f"{more}", *more))
        run, explore = training.load_run(args, training.open_explorer)
        assert run.learner.compiled == explore.args[0].compiled == bool(more)


def test_programs_let_idle_threads_sleep_soon():
    """OpenMP's threads spin while they wait, and starve whatever else runs: 20 times slower. The variable is
    read once, when torch is imported."""
    for name in ("train eval sample recipes/family recipes/pool recipes/explorers recipes/rescue "
                 "recipes/separate recipes/retokenize").split():
        text = (ROOT / f"{name}.py").read_text()
        assert 0 < text.find('setdefault("GOMP_SPINCOUNT", "10000")') < text.find("\nimport torch"), name


def test_the_readme_names_what_exists():
    """A reader's first command must not fail."""
    text, flag = (ROOT / "README.md").read_text(), r"(?<![\w-])--[a-z][a-z0-9-]*"
    sources = [p for p in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if not p.name.startswith("test_")]
    flags_of = lambda path: re.findall(r'add\w*\("(--[^"]+)"', path.read_text())
    known = lambda paths: {"--help", "--config"}.union(*map(flags_of, paths))  # accelerate's --config_file
    for link in re.findall(r"\]\((?!https?:|#|\.\./)([^)#]+)", text):
        assert (ROOT / link).exists(), link
    assert {*re.findall(flag, text)} <= known(sources)
    for script, words in re.findall(r"python ((?:\w+/)*\w+\.py)((?:\\\n|[^\n`#|&])*)", text):
        also = "train.py" if "/" in script else script  # recipes hand train.py's flags on
        assert {*re.findall(flag, words)} <= known([ROOT / script, ROOT / also]), f"{script} {words}"
