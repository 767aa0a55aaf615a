"""Every check of the seven modules, as a book: sampler equals trainer, the group, the loss, mixing, a run.

    pytest test_all.py

Small GRPO code seldom crashes when it is wrong: it trains worse. Thirty mistakes that do so, the test that
fails if one is put back, and what the mistake does to training:

 1  the stop token is not trained: it forgets to end     test_trap_1_the_mask_ends_with_the_first_stop_token
 2  padding moves positions: another network is trained  test_traps_2_3_4_20_27_log_probs_are_the_policys
 3  log-probs of the token beside the one that was drawn test_traps_2_3_4_20_27_log_probs_are_the_policys
 4  the gradient is of a policy at another temperature   test_traps_2_3_4_20_27_log_probs_are_the_policys
 5  top-p in the sampler alone moves every ratio from 1  test_trap_5_a_draw_follows_the_truncated_distribution
 6  a log-softmax in bfloat16: 3% of noise in each ratio test_trap_6_log_softmax_and_sums_are_fp32
 7  equal rewards teach noise at the full learning rate  test_traps_7_8_advantages_by_hand
 8  the std of one reward is NaN, and so is the learner  test_traps_7_8_advantages_by_hand
 9  easy prompts are rewarded and hard ones punished     test_trap_9_groups_do_not_move_each_other
10  a prompt that comes twice gets one common baseline   test_trap_10_groups_are_kept_by_place
11  each batch size on each GPU is another objective     test_traps_11_12_update_equals_the_plain_loss
12  a mask changed in place divides by another number    test_traps_11_12_update_equals_the_plain_loss
13  one empty row is 0 / 0, and all weights become NaN   test_traps_12_13_15_ratios_by_hand
14  a bad token's probability falls without end          test_trap_14_the_clip_has_the_right_sign
15  one ratio a row is soon outside of every clip        test_traps_12_13_15_ratios_by_hand
16  a KL penalty whose gradient is 0 holds nothing back  test_trap_16_gradients_of_the_kl_estimators
17  a right loss, which is 0, is taken for broken        test_trap_17_loss_zero_has_reinforces_gradient
18  a wrong answer costs less the longer it is           test_trap_18_weight_per_token_of_each_loss
19  rollouts are of a policy that is no longer there     test_trap_19_the_next_rollout_sees_updated_weights
20  a cache read in the wrong slots: others' rollouts    test_traps_2_3_4_20_27_log_probs_are_the_policys
21  texts encoded anew: tokens that nobody drew          test_traps_5_21_a_run_begins_at_ratio_1
22  two BOS tokens: a beginning the model never saw      test_trap_22_exactly_one_bos
23  right answers are paid as wrong, and wrong as right  test_traps_23_30_answers_that_differ
24  a resumed run trains on, but as another run          test_trap_24_resume_equals_never_having_stopped
25  a pass@k so noisy that crossovers come and go        test_trap_25_pass_at_k_is_the_mean_over_all_subsets
26  the explorer's tokens pass for the learner's own     test_trap_26_what_divides_in_the_explorers_ratio
27  ids that no tokeniser knows, or means otherwise      test_traps_1_27_checkpoints_mean_the_same_both_ways
28  the explorer writes one too many, or after its time  test_trap_28_counts_are_exact_and_sum_to_the_group
29  cut rollouts earn 0 for ever, like a hard problem    test_trap_29_truncation_is_logged_and_warned_about
30  "12" inside "112" is paid: it learns to write much   test_traps_23_30_answers_that_differ

Two slow, obvious functions say what the fast ones must give: `row_logprobs` and `plain_loss`. Nothing is
downloaded: models are tiny and made here. Numbers 22, 23 and 30, with the other checks of the basement, stand
in plumbing/test_plumbing.py.
"""
import ast
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
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import plumbing  # noqa: F401, before torch, which reads a variable that it sets

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import anneal
import eval as evaluation
import grpo
import model as models
from plumbing.problems import load_problems, save_problems, scorer_hash
import reward
import sample as sampling
import train as training
from plumbing import answers, checkpoint, steps, tasks
from plumbing import family as families
from plumbing.optimizer import Optimizer, micro_batches
from plumbing.text import decode

ROOT = Path(__file__).parent
TINY = {"vocab_size": 24, "max_position_embeddings": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
KINDS = pytest.mark.parametrize("kind, heads", [("qwen3", 2), ("qwen2", 4), ("llama", 1)])  # of key and value
PROMPTS = [[5, 6], [7, 8, 9, 10, 11, 3, 2], [5, 6], [4]]  # of different lengths, and one comes twice
STOPS = (0,)  # the stop token of tiny models


# ---- tools -------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch):
    """Else what reads memory that nobody has written finds zeros there most of the time."""
    def filled(make, *inputs, **more):
        x = make(*inputs, **more)
        return x.fill_(torch.nan if x.is_floating_point() else 99 if x.dtype != torch.bool else True)
    for where, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        make = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *inputs, make=make, **more: filled(make, *inputs, **more))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_model(kind="qwen3", seed=0, scale=0.2, **changes):
    """A random model, far from uniform. The last 4 ids are padding of the vocabulary."""
    hf = TINY | {"model_type": kind, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} | changes
    model, generator = models.Transformer(models.Config.from_hf(hf)), seeded(seed)
    for name, p in model.named_parameters():
        p.data.normal_(float("norm" in name), scale if p.dim() > 1 else 0.1, generator=generator)
    model.hf_config, model.num_tokens = hf, hf["vocab_size"] - 4
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
    save_problems(problems[:10], out / "heldout.jsonl")
    save_problems(problems[10:], out / "train.jsonl")
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
    args.recipe = None
    run, explore = training.load_run(args, training.open_explorer)
    training.open_books(args, run, explore)
    training.train(args, run, explore)
    training.finish(args, run)
    return run, read_metrics(out)


def read_metrics(out):
    """Lines of metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def weights(out):
    """{name: tensor} of the learner that a run left."""
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
def test_traps_1_27_checkpoints_mean_the_same_both_ways(kind, options, tie, tmp_path):
    """Else what is trained, or saved, is another network than the checkpoint's, or runs on past its ends."""
    from transformers import AutoModelForCausalLM
    theirs, directory = hf_pair(kind, tmp_path / "model", tie_word_embeddings=tie, **options)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # Llama 2 has them
    save_file(frequencies, directory / "model-more.safetensors")
    for name in ("config.json", "tokenizer_config.json"):  # code of a checkpoint: neither run nor handed on
        described = json.loads((directory / name).read_text()) | {"auto_map": {"AutoConfig": "evil.Config"}}
        (directory / name).write_text(json.dumps(described))
    (directory / "generation_config.json").write_text('{"eos_token_id": [3, 5], "top_p": 0.8}')
    ours, tokenizer, stops = checkpoint.load(directory)
    assert stops == (0, 3, 5)  # generation_config's and the tokeniser's
    assert ours.num_tokens == len(tokenizer) == len(ours.head) < ours.config.vocab_size == 64
    assert ours.config.max_position_embeddings == options.get("sliding_window", 64)
    assert len(list(directory.glob("model-*"))) > 1  # shards
    checkpoint.save(ours, tokenizer, stops, directory)  # over what is there, of which nothing may be left
    assert not list(directory.glob("model-*"))
    kept = json.loads((directory / "generation_config.json").read_text())
    assert kept == {"eos_token_id": [0, 3, 5], "top_p": 0.8}
    assert len({path.stat().st_mode for path in directory.iterdir()}) == 1  # who may read one may read all
    assert not any("auto_map" in path.read_text() for path in directory.glob("*.json"))
    ours.num_tokens, ids = 64, torch.randint(0, 64, (15, 20), generator=seeded())  # this model uses every id
    with torch.no_grad():
        expected, back = theirs(ids).logits, AutoModelForCausalLM.from_pretrained(directory)
        for rows in (15, 3):  # many, and few: `project` has a way for each
            assert (ours(ids[:rows]) @ ours.head.T - expected[:rows]).abs().max() < 1e-4
        assert (back(ids).logits - expected).abs().max() < 1e-4 < 0.1 < expected.std()
    tokens = theirs.generate(ids[:1, :4], max_new_tokens=20, do_sample=False, eos_token_id=[0, 3, 5])[0, 4:]
    greedy = sampling.sample(ours, ids[:1, :4].tolist(), 1, seeded(), 20, stops, temperature=0)
    assert greedy.ids[0, 0, :greedy.lengths[0, 0]].tolist() == tokens.tolist()


def test_a_mistral_slides_over_4096_tokens_unless_told_otherwise():
    context = lambda **window: tiny_model("mistral", max_position_embeddings=8192, **window).config
    windows = {}, {"sliding_window": None}, {"sliding_window": 99}
    assert [context(**window).max_position_embeddings for window in windows] == [4096, 8192, 99]


@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
def test_lora_trains_adapters_alone_and_is_merged_on_save(kind, tmp_path):
    """Else the reference moves with the learner (KL 0), or what is saved is the untrained model."""
    model, tokenizer, stops = checkpoint.load(hf_pair(kind, tmp_path / "base")[1])
    before, memory = copy.deepcopy(model.state_dict()), {p.data_ptr() for p in model.parameters()}
    settings = dict(prompts=PROMPTS, n=2, max_new_tokens=12, stops=stops)
    plain = sampling.sample(model, generator=seeded(), **settings)
    reference = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # as train.load_run makes it
    models.add_lora(model, 3, seeded())
    assert torch.equal(sampling.sample(model, generator=seeded(), **settings).logps, plain.logps)  # B is 0
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 4 and all(name.endswith((".A", ".B")) for name in trained)
    optimizer = Optimizer(model, 1e-2)
    for seed in range(3):
        r = sampling.sample(model, generator=seeded(seed), **settings)
        assert torch.allclose(by_row(model, r), r.logps, atol=1e-4)
        A = torch.randn(4, 2, generator=seeded(seed))
        held = grpo.Objective(kl_coef=0.1)
        metrics, _ = grpo.update(model, reference, optimizer, PROMPTS, r, A, held, seeded())
    assert metrics["kl"] > 1e-4  # the learner has moved; its reference has not, and takes no memory
    assert all(torch.equal(weight, before[name]) for name, weight in reference.state_dict().items())
    assert {p.data_ptr() for p in reference.parameters()} <= memory
    expected = by_row(model, plain)
    checkpoint.save(model, tokenizer, stops, tmp_path / "merged")
    merged = by_row(checkpoint.load(tmp_path / "merged")[0], plain)
    assert torch.allclose(merged, expected, atol=1e-4) and (expected - plain.logps).abs().max() > 1e-2


def test_adapters_of_a_bfloat16_base_are_rounded_once_and_saved_in_its_dtype(tmp_path):
    """Float32 beside bfloat16 under the name of one of them is what other libraries misread."""
    model, tokenizer, stops = checkpoint.load(hf_pair("qwen3", tmp_path)[1], dtype=torch.bfloat16)
    models.add_lora(model, 3, seeded())
    linear = model.layers[1].self_attn.o_proj
    linear.B.data.normal_(0, 1e-1, generator=seeded())
    exact = linear.weight.float() + 32 / 3 * linear.B.float() @ linear.A.float()
    checkpoint.save(model, tokenizer, stops, tmp_path / "merged")
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


def test_trap_6_log_softmax_and_sums_are_fp32():
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
    stops = (0, 3, 4)  # 0 is also the padding
    r = sampling.sample(tiny_model(), PROMPTS, 25, seeded(), 20, stops)
    assert 0 < r.finished.float().mean() < 1  # both kinds are there
    rows = zip(*(x.flatten(0, 1) for x in (r.ids, r.lengths, r.finished, r.mask)))
    for ids, length, finished, mask in rows:
        found = [i for i, token in enumerate(ids[:length].tolist()) if token in stops]
        assert found == ([length - 1] if finished else []) and (finished or length == 20)
        assert mask.tolist() == [i < length for i in range(20)]
    assert not r.ids[~r.mask].any() and not r.logps[~r.mask].any()  # finished rows emit nothing (trap 20)


@KINDS
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_traps_2_3_4_20_27_log_probs_are_the_policys(kind, heads, dtype, tolerance, temperature):
    """Positions that padding moves (2), log-probs shifted by one (3) or of another temperature (4), a cache
    read in the wrong slots (20), ids that no tokeniser knows (27): a row alone, without a cache, tells."""
    model = tiny_model(kind, num_key_value_heads=heads).to(dtype)
    r = sampling.sample(model, PROMPTS, 20, seeded(), 24, STOPS, temperature)
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
        whole = sampling.sample(model, prompts, 2, seeded(seed), 24, STOPS)
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "decode_step", lambda *given: rows.append(len(given[1])) or step(*given))
            few = sampling.sample(model, prompts, 2, seeded(seed), 24, STOPS, rows=8)
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
    rollouts = sampling.sample(model, PROMPTS, 3, seeded(), 9, STOPS)
    by_row(model, rollouts)
    assert len(choices) >= 2 * 9 and 0 not in choices  # 0: the path that no kernel takes


def test_decoding_meets_few_shapes(monkeypatch):
    """Each length that attention reads is a compilation, or a captured graph, of its own."""
    used, step, model = set(), sampling.decode_step, tiny_model(max_position_embeddings=256)
    monkeypatch.setattr(sampling, "decode_step", lambda *given: used.add(given[3]) or step(*given))
    sampling.sample(model, PROMPTS, 1, seeded(), 150, stops=())
    assert used == {*range(16, 7 + 150 + 16, 16)}


def test_the_host_looks_at_the_device_a_few_times_in_eight_tokens():
    """A look waits for all that a GPU has still to do: one a token, and the GPU idles between tokens."""
    model, looks = tiny_model(), (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
    seen = watched(lambda: sampling.sample(model, PROMPTS, 2, seeded(), 40, (), rows=4))  # two waves
    assert 0 < sum(operation in looks for operation, _ in seen) <= 3 * (2 * 40 / sampling.LOOK_EVERY + 2)


@pytest.mark.parametrize("compile", [False, True])
def test_trap_19_the_next_rollout_sees_updated_weights(compile):
    """A compiled step or a cache that keeps old weights: rollouts of a policy that no longer is."""
    model, fresh = (tiny_model(seed=seed, num_hidden_layers=1) for seed in (0, 1))
    model.compiled, settings = compile, dict(prompts=PROMPTS, n=4, max_new_tokens=8, stops=STOPS)
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
        sampling.sample(model, PROMPTS, n, seeded(), 40, STOPS)
    assert graphs.frame_count == 1


def test_presence_penalty_counts_what_was_written():
    model, takes_off = tiny_model(), functools.partial(evaluation.presence_penalty, 1e4)
    write = lambda adjust: sampling.sample(model, [[5]], 1, seeded(), 20, (), 0, adjust=adjust).ids
    assert len(write(None).unique()) < 20 == len(write(takes_off).unique())


@pytest.mark.parametrize("change, complaint", [
    ({"n": 0}, "cannot sample"), ({"temperature": -1}, "cannot sample"), ({"top_p": 1.1}, "cannot sample"),
    ({"temperature": math.nan}, "cannot sample"), ({"max_new_tokens": 63}, "prompt 2 has 2 tokens"),
    ({"prompts": [[1], []]}, "prompt 2 is empty"), ({"prompts": [[1], [3, 20]]}, "prompt 2 holds token 20")])
def test_what_cannot_be_sampled_is_refused(change, complaint):
    settings = {"prompts": [[5], [6, 7]], "n": 1, "generator": seeded(), "max_new_tokens": 2, "stops": STOPS}
    with pytest.raises(ValueError, match=complaint):
        sampling.sample(tiny_model(), **settings | change)


# ==== 2. The group ==========================================================================================
# A rollout's worth is measured against the other rollouts of its own prompt, the explorer's among them. An
# advantage over the wrong rows, or out of nothing, teaches noise at the full learning rate.

def test_traps_7_8_advantages_by_hand():
    """Rounding over a tiny std: 24 equal rewards of 2.2 got advantage 0.94. The std of one reward is NaN."""
    A = grpo.group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert torch.allclose(A, torch.tensor([[1.5, -0.5, -0.5, -0.5]]), atol=1e-4)  # mean 1/4, std (ddof 1) 1/2
    assert grpo.group_advantages(torch.tensor([[1.0, 0.0]]), over_std=False).tolist() == [[0.5, -0.5]]
    assert not any(grpo.group_advantages(torch.full((2, 24), value)).any() for value in (0.0, 0.1, 1.0, 2.2))
    with pytest.raises(ValueError, match="at least 2"):
        grpo.group_advantages(torch.ones(4, 1))


def test_trap_9_groups_do_not_move_each_other():
    """The mean over the wrong axis rewards easy prompts and punishes hard ones, whatever was written."""
    rewards = torch.rand(2, 8, generator=seeded())
    A, alone = grpo.group_advantages(rewards + torch.tensor([[0.0], [100.0]])), grpo.group_advantages(rewards)
    assert A.sum(1).abs().max() < 1e-3 and torch.allclose(A, alone, atol=1e-3)


def test_trap_10_groups_are_kept_by_place():
    """Keyed by text, a prompt that comes twice in a batch becomes one group with a common baseline."""
    model = tiny_model()
    def write(prompts, n, generator):
        return sampling.sample(model, prompts, n, generator, 3 + n, STOPS)
    a, b = sampling.signed(write)(PROMPTS, 2, seeded()), write(PROMPTS, 6, seeded())
    both = sampling.join(a, b)
    assert both.ids.shape == (4, 8, 9) and both.from_explorer.tolist() == [[True] * 2 + [False] * 6] * 4
    assert torch.equal(both.ids[:, :2, :5], a.ids) and torch.equal(both.ids[:, 2:], b.ids)
    assert torch.equal(both.logps[:, 2:], b.logps) and not both.mask[:, :2, 5:].any()
    assert not torch.equal(b.ids[0], b.ids[2])  # PROMPTS[0] is PROMPTS[2]
    other = sampling.join(b, write(PROMPTS[1:2], 6, seeded(1)), dim=0)[[4, 1]]  # other prompts' groups
    assert torch.equal(other.ids[1], b.ids[1]) and not torch.equal(*other.ids)


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
        parts = micro_batches(range(8), groups.tolist(), prompts, lengths.tolist(), tokens)
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
            weight = {"dapo": sum(lengths), "dapo_filter": sum(lengths),
                      "dr_grpo": N * s.max_new_tokens}.get(s.loss, N * n) ** -1
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


def test_traps_11_12_update_equals_the_plain_loss():
    """A loss that depends on how the batch is cut is another objective on every GPU. Every loss, treatment
    of explorer tokens and KL estimator; one optimiser step and three, the later ones off-policy."""
    learner, reference, explorer = (tiny_model(seed=seed, num_hidden_layers=1) for seed in range(3))
    start, groups = copy.deepcopy(learner.state_dict()), torch.arange(4).repeat_interleave(4)
    rewards = torch.randn(4, 4, generator=seeded(2))
    centred = rewards - rewards.mean(1, keepdim=True)
    r = sampling.join(*(sampling.sample(m, PROMPTS, 2, seeded(), 6, STOPS, 0.9) for m in (explorer, learner)))
    r.from_explorer[:, :2], r.finished = True, torch.rand(4, 4, generator=seeded(3)) < 0.7
    untouched, ids, mask = copy.deepcopy(r), r.ids.flatten(0, 1), r.mask.flatten(0, 1)
    logprobs = lambda model, rows: row_logprobs(model, PROMPTS, groups[rows], ids[rows], mask[rows], 0.9)
    fixed = [logprobs(model, slice(16)).detach() for model in (learner, reference)]
    fixed += [x.flatten(0, 1) for x in (r.logps, r.from_explorer, centred, r.lengths)]
    s = grpo.Objective(kl_coef=0.1, max_new_tokens=7, temperature=0.9, clip_low=0.1, clip_high=0.4)
    choices, drifted = itertools.product(grpo.LOSSES, grpo.OFF_POLICY), 0
    cycles = itertools.cycle(("k1", "k2", "k3")), itertools.cycle((1, 3))
    for (s.loss, s.off_policy), s.kl_estimator, s.minibatches in zip(choices, *cycles):
        expected, A = downhill(learner), grpo.advantages_of(rewards, r.from_explorer, s)
        std = 1 if s.loss == "dr_grpo" else rewards.std(1, keepdim=True) + 1e-6
        fixed[4] = (centred / std).flatten()
        counts = r.finished if s.loss == "dapo_filter" else r.lengths > 0  # who is cut short counts as empty
        fixed[5], counted = (r.lengths * counts).flatten(), r.mask.flatten(0, 1) & counts.flatten()[:, None]
        for chosen in torch.randperm(4, generator=seeded()).tensor_split(s.minibatches):
            rows = (chosen[:, None] * 4 + torch.arange(4)).flatten()
            *given, lengths = (x[rows] for x in fixed)
            plain_loss(logprobs(learner, rows), *given, lengths.tolist(), s).backward()
            expected.step()
        for s.micro_batch_tokens in (1, 40, 10_000):
            learner.load_state_dict(start)
            found = downhill(learner)
            metrics, _ = grpo.update(learner, reference, found, PROMPTS, r, A, s, seeded())
            assert len(found.gradients) == s.minibatches
            for ours, plain in zip(found.gradients, expected.gradients):
                assert (ours - plain).norm() < 1e-4 * plain.norm() > 1e-6
        learner.load_state_dict(start)
        drifted += metrics["clip_fraction_learner"] > 0
        assert metrics["clip_fraction_explorer"] > 0 or s.off_policy != "behaviour"
        if s.minibatches == 1:  # then the metric is that of the policy which began, whatever the loss
            estimates = grpo.kl_estimates(*fixed[:2], mask, s.kl_estimator)
            assert math.isclose(metrics["kl"], estimates[counted].mean(), rel_tol=1e-4)
    assert drifted and all(torch.equal(x, vars(untouched)[name]) for name, x in vars(r).items())


def test_a_gradient_has_the_same_bits_however_busy_the_machine_is():
    """Rows that two threads hold add to one prompt's gradient. If they add atomically, the order of the sum,
    and so its last bits, is decided by whatever else the machine does: the same seed gives other runs."""
    model = tiny_model(num_hidden_layers=1, hidden_size=512, intermediate_size=8, num_attention_heads=1,
                       num_key_value_heads=1, head_dim=16, max_position_embeddings=256)
    prompt, groups, mask = [1] * 200, torch.zeros(128, dtype=torch.long), torch.ones(128, 2) > 0
    ids = torch.randint(0, 20, (128, 2), generator=seeded())
    upstream, threads, found = torch.randn(128, 2, generator=seeded()), torch.get_num_threads(), set()
    torch.set_num_threads(2)
    for _ in range(40):
        model.zero_grad()
        logps, _ = grpo.response_logprobs(model, [prompt], groups, ids, mask)
        (logps * upstream).sum().backward()
        found.add(b"".join(p.grad.numpy().tobytes() for p in model.parameters()))
    torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize("loss", grpo.LOSSES)
def test_groups_that_teach_nothing_cost_nothing_and_change_nothing(loss):
    """Left out before the weights are computed, they would raise the weight of all others."""
    model = tiny_model(num_hidden_layers=1)
    r, s = sampling.sample(model, PROMPTS, 4, seeded(), 6, STOPS), grpo.Objective(loss)
    r.finished[:] = torch.tensor([True, True, False, True])
    counts = r.lengths * (r.finished if loss == "dapo_filter" else 1)  # of what is cut short, nothing
    A = torch.randn(4, 4, generator=seeded(2))
    A[1:3] = 0  # all failed, or all passed
    found, wide = downhill(model), downhill(model)
    start, read = copy.deepcopy(model.state_dict()), []
    model.embed_tokens.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    metrics, tokens = grpo.update(model, None, found, PROMPTS, r, A, s, seeded())
    rows = counts[[0, 3]]  # after prompts of 2 and 1 tokens
    assert sum(read) == 2 * 2 + (rows > 0).sum() * (rows.max() - 1)
    assert metrics["tokens_trained"] == rows.sum() == (tokens["ratio"] > 0).sum()
    assert (tokens["entropy"] > 0).flatten(2).any(2).any(1).tolist() == [True, False, False, True]
    model.load_state_dict(start)
    grpo.update(model, copy.deepcopy(model), wide, PROMPTS, r, A, s, seeded())  # a KL of weight 0
    assert (found.gradients[0] - wide.gradients[0]).norm() < 1e-6 * wide.gradients[0].norm()
    some = A.clone()
    some[:, :2].clamp_(min=0)  # as `positive` leaves of an explorer's
    for reference in (None, copy.deepcopy(model)):
        model.load_state_dict(start)
        metrics, _ = grpo.update(model, reference, found, PROMPTS, r, some, s, seeded())
        if not reference:  # nor do rows whose advantage became 0
            assert metrics["tokens_trained"] == counts[some != 0].sum() < counts[A != 0].sum()
    assert (found.gradients[1] - found.gradients[2]).norm() < 1e-6 * found.gradients[1].norm()
    optimizer = Optimizer(model, 1e-3)
    metrics, _ = grpo.update(model, None, optimizer, PROMPTS, r, 0 * A, replace(s, minibatches=2), seeded())
    assert metrics["loss"] == metrics["grad_norm"] == metrics["tokens_trained"] == 0
    assert metrics["ratio"] is None and metrics["skipped_updates"] == 0


@pytest.mark.parametrize("A, ratio, gradient", [
    (1, 0.5, -0.5), (1, 1, -1), (1, 1.25, -1.25), (1, 1.5, 0), (-1, 0.75, 0), (-1, 0.9, 0.9), (-1, 1.5, 1.5)])
def test_trap_14_the_clip_has_the_right_sign(A, ratio, gradient):
    """Turned round for A < 0, it lets a bad token's probability fall without end. The gradient is 0 only
    where the step has gone far enough: here above 1.3 with A > 0, below 0.8 with A < 0."""
    logps, one = torch.tensor([[math.log(ratio)]], requires_grad=True), torch.ones(1, 1)
    loss, got, clipped = grpo.policy_loss(logps, 0 * one, torch.tensor([A]), one, one > 0, 0.2, 0.3)
    assert torch.autograd.grad(loss, logps)[0].item() == pytest.approx(gradient)
    assert got.item() == pytest.approx(ratio) and clipped.item() == (gradient == 0)


def test_trap_17_loss_zero_has_reinforces_gradient():
    """Taken for broken, a right loss gets repaired."""
    logps, mask = torch.randn(4, 4, generator=seeded()).requires_grad_(), torch.ones(4, 4) > 0
    A, w = grpo.group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))[0], grpo.per_row(mask.float(), 4)
    loss, _, _ = grpo.policy_loss(logps, logps.detach(), A, w, mask)
    assert loss.abs() < 1e-6 and torch.allclose(torch.autograd.grad(loss, logps)[0], -w * A[:, None])


@pytest.mark.parametrize("loss, short, long", [("grpo", 1 / 4, 1 / 8), ("gspo", 1 / 4, 1 / 8),
                                               ("dapo", 1 / 6, 1 / 6), ("dr_grpo", 1 / 16, 1 / 16)])
def test_trap_18_weight_per_token_of_each_loss(loss, short, long):
    """In a mean over each row, tokens of long rows count less: a wrong answer costs less the longer it is."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    assert torch.allclose(grpo.LOSSES[loss].weights(mask.float(), 8), mask * torch.tensor([[short], [long]]))


@pytest.mark.parametrize("loss", grpo.LOSSES)
def test_traps_12_13_15_ratios_by_hand(loss):
    """An empty row is 0 / 0, and one NaN gets into every weight (13). One ratio a row, where token ratios are
    meant, is far outside the clip after a few dozen tokens (15). Inputs must stay what they are (12)."""
    mask, A = torch.arange(6) < torch.tensor([[3], [0], [6]]), torch.tensor([1.0, -1.0, 0.5])
    logps, old = torch.randn(2, 3, 6, generator=seeded())
    logps.requires_grad_(), old[1].fill_(-torch.inf)  # whatever stands where no token is
    row, copies = grpo.LOSSES[loss], [x.detach().clone() for x in (mask, A, logps, old)]
    w = row.weights(mask.float(), 6)
    value, ratio, _ = grpo.policy_loss(logps, old, A, w, mask, one_ratio=row.one_ratio)
    for i, n in ((0, 3), (2, 6)):
        difference = (logps - old)[i, :n]
        expected = difference.mean().expand(n) if loss == "gspo" else difference
        assert torch.allclose(ratio[i, :n], expected.exp())
    gradient, = torch.autograd.grad(value + (w * grpo.kl_estimates(logps, old, mask)).sum(), logps)
    assert torch.isfinite(value) and torch.isfinite(gradient).all()
    assert not gradient[~mask].any() and gradient[mask].any()
    assert all(torch.equal(x, y) for x, y in zip((mask, A, logps, old), copies))


@pytest.mark.parametrize("choice", grpo.OFF_POLICY)
@pytest.mark.parametrize("A", [1.0, -1.0])
def test_a_token_that_was_all_but_impossible_leaves_the_update_finite(choice, A):
    """e^98 is infinite in float32, and 0 times infinity NaN: the whole mini-batch is skipped."""
    logps, mask = torch.tensor([[-2.0, -100.0]] * 2, requires_grad=True), torch.ones(2, 2) > 0
    theirs, explorer = torch.tensor([[-100.0, -2.0]] * 2), torch.tensor([True, False])
    old, weights = grpo.off_policy_correction(choice, logps.detach(), theirs, explorer, mask)
    for one_ratio, estimator in ((False, "k1"), (True, "k2"), (False, "k3")):
        loss, ratio, _ = grpo.policy_loss(logps, old, A * torch.ones(2), weights, mask, one_ratio=one_ratio)
        loss = loss + grpo.kl_estimates(logps, theirs, mask, estimator).sum()
        assert all(x.isfinite().all() for x in (loss, ratio, torch.autograd.grad(loss, logps)[0]))
    x = torch.tensor([[19.0]])  # nothing below e^20 changes
    assert grpo.policy_loss(x, 0 * x, x[0], x, x > 0)[1].item() == pytest.approx(math.exp(19))
    assert grpo.kl_estimates(0 * x, x, x > 0).item() == pytest.approx(math.exp(19) - 20)


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
def test_trap_26_what_divides_in_the_explorers_ratio(choice, weight):
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
    assert equal(explorer.parameters(), checkpoint.load(family / "explorer")[0].parameters())
    assert len({call.generator.initial_seed() for call in sampled + updates}) == 10
    for step, call in enumerate(updates, 1):
        problems = [run.problems[i] for i in steps.batch_of(step, 4, len(run.problems), 0)]
        assert call.prompts == [run.tokenizer(problem.question).input_ids for problem in problems]
        assert call.rollouts.from_explorer.tolist() == [[i < (4, 3, 2, 0)[step - 1] for i in range(4)]] * 4
        texts = decode(call.rollouts, run.tokenizer)
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


def test_traps_5_21_a_run_begins_at_ratio_1(family, tmp_path):
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
    assert equal(run.reference.parameters(), checkpoint.load(family / "learner")[0].parameters())


def test_every_problem_comes_once_before_any_comes_again():
    """Drawn anew each step, some would come three times before others came at all."""
    order = [i for step in range(1, 11) for i in steps.batch_of(step, 4, 10, seed=0)]
    epochs = [order[start:start + 10] for start in (0, 10, 20, 30)]
    assert all(sorted(epoch) == [*range(10)] for epoch in epochs) and epochs[0] != epochs[1]


# ==== 5. The reward: reward.py ==============================================================================
# Whatever a reward pays for wrongly is what training finds.


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
    assert [problem.answer for problem in load_problems(path)] == ["7", "8", "Pro"]
    assert "24 of 27 problems left out. No response matches" in capsys.readouterr().out
    path.write_text(json.dumps(records[1]))
    with pytest.raises(ValueError, match="data.jsonl: no problems in this file whose answers can be matched"):
        load_problems(path)


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
        load_problems(path)
    assert "\n" not in str(refused.value)
    path.write_bytes(b'\xef\xbb\xbf%s\r\n\n%s\n{"question": "\xc3\xa9", "answer": 70}' % (good, good))
    assert load_problems(path) == [reward.Problem("q", "1,200"), reward.Problem("é", "70")]


def test_an_own_reward_sees_its_records_and_loading_asks_no_scorer(tmp_path, monkeypatch):
    """Asked whether `\\boxed{gold}` scores, a reward for something else left every problem out."""
    record = {"question": "q", "answer": "7", "task": "math", "tests": ["f(1) == 2"], "extra": {"n": 1}}
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    monkeypatch.setattr(reward, "score", None)
    monkeypatch.setattr(reward, "TASKS", {name: x._replace(check=None) for name, x in reward.TASKS.items()})
    problem, = problems = load_problems(tmp_path / "data.jsonl")
    assert problem.extra == {"tests": record["tests"], "extra": {"n": 1}}
    assert {problem} == {reward.Problem("q", "7")}  # one question, once
    save_problems(problems, tmp_path / "again.jsonl")
    assert json.loads((tmp_path / "again.jsonl").read_text()) == record
    monkeypatch.undo()
    check = lambda problem, text: (text in problem.extra["right"], True)
    monkeypatch.setitem(reward.TASKS, "code", reward.Task(check, gold="(?s).*"))
    record = {"question": "q", "answer": "", "task": "code", "right": ["a", "b"]}
    (tmp_path / "code.jsonl").write_text(json.dumps(record))
    problem, = load_problems(tmp_path / "code.jsonl")
    assert [reward.score(problem, text) for text in "ac"] == [(1.0, True, True), (0.0, False, True)]


@contextlib.contextmanager
def edited_reward(directory, to, rule="reward=float(strict)", module=reward):
    """Within it a rule of a module's source reads otherwise, as a hash of the file sees it."""
    copy, source = directory / f"{module.__name__}.py", Path(module.__file__).read_text()
    assert source.count(rule) == 1
    copy.write_text(source.replace(rule, to))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "__file__", str(copy))
        yield


@pytest.mark.parametrize("module, rule, other", [
    (reward, "reward=float(strict)", "reward=float(answer)"), (answers, "> 1_000", "> 1_001"),
    (tasks, "(a + b) % 10", "(a + b) % 9")])
def test_the_scorers_hash_follows_its_rules_and_not_its_comments(module, rule, other, tmp_path):
    """Without it, an old figure is shown for a new reward."""
    before = scorer_hash()
    with edited_reward(tmp_path, rule, rule, module):
        Path(module.__file__).write_text(Path(module.__file__).read_text() + "\n\n# mine\n")
        assert scorer_hash() == before
    with edited_reward(tmp_path, other, rule, module):
        assert scorer_hash() != before


def test_problems_are_saved_whole_or_not_at_all(tmp_path):
    """A torn file is taken for a whole one: recipes/*.sh convert a data set only if its file is not there."""
    with files_up_to(2_000), pytest.raises(OSError):
        save_problems([reward.Problem("q" * 3_000, "1")], tmp_path / "data.jsonl")
    assert not (tmp_path / "data.jsonl").exists()


# ==== 6. Figures and runs: eval.py, train.py ================================================================
# A flattering figure is what gets published, and a run that is not what its flags say is one.

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
    assert evaluation.crossover(ks, [.4, .6, .8, .8], [.3, .5, .8, 1.0]) == pytest.approx(4)  # equal there


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
    _, tokenizer, _ = checkpoint.load(family / "learner")
    ids = torch.tensor([[tokenizer(text).input_ids for text in ("7<eos>00", "6<eos>00", "1+67")]] * 2)
    lengths = torch.tensor([[2, 2, 4]] * 2)  # [2, 3] of ids [2, 3, 4]
    written = sampling.Rollouts(ids, lengths, torch.zeros(2, 3, 4), lengths < 4, lengths < 0)
    problems = [reward.Problem("3+4=", "7", "natural"), reward.Problem("3+3=", "6", "natural")]
    write = {(((5,), (6,)), 3): written}  # by what it is asked
    found = evaluation.evaluate(lambda prompts, n, generator: write[prompts, n], tokenizer, problems,
                                ((5,), (6,)), 3, seeded())
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


@pytest.fixture
def evaluated(family, tmp_path, monkeypatch, capsys):
    """evaluated(*flags): what eval.py prints of two models. evaluated.ran: sizes of the batches it ran."""
    def run(*more):
        run.ran.clear()
        monkeypatch.setattr(sys, "argv", [str(word) for word in (
            "eval.py", "--model", tmp_path / "model", family / "explorer", "--data", family / "train.jsonl",
            "--n", 8, "--max-new-tokens", 4, "--out", tmp_path / "out", *more)])
        evaluation.main()
        return capsys.readouterr().out

    def evaluate(*inputs):
        if len(run.ran) == run.killed_at:
            raise KeyboardInterrupt
        run.ran.append(len(inputs[2]))
        return real(*inputs)
    shutil.copytree(family / "learner", tmp_path / "model")
    real, run.ran, run.killed_at = evaluation.evaluate, [], None
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    return run


def test_eval_cli_keeps_results_and_knows_what_was_replaced(evaluated, family, tmp_path, monkeypatch, capsys):
    """Yesterday's model, or reward, under today's name is the easiest wrong figure to publish."""
    text = evaluated()
    results = [path.read_text().splitlines()[1:] for path in (tmp_path / "out").glob("result-*.jsonl")]
    strict = [sum((json.loads(line)["strict"] for line in lines), []) for lines in results]
    shown = sorted(float(share) for share in re.findall(r"pass@1 ([0-9.]+)% \[", text))
    assert shown == pytest.approx(sorted(100 * np.mean(strict, axis=1) / 8), abs=0.06) and shown[0] > 0
    assert evaluated.ran == [16, 4, 16, 4] and "crossover" in text
    assert (tmp_path / "out" / "pass_at_k.png").exists()
    assert evaluated() == text and evaluated.ran == []
    model, tokenizer, stops = checkpoint.load(tmp_path / "model")
    model.norm.weight.data *= 0.5
    checkpoint.save(model, tokenizer, stops, tmp_path / "model")
    assert evaluated() != text and evaluated.ran == [16, 4]
    assert evaluated("--seed", 1) and evaluated.ran == [16, 4, 16, 4]
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert evaluated() and evaluated.ran == [16, 4]
    with edited_reward(tmp_path, "reward=float(answer)"):
        assert evaluated() and evaluated.ran == [16, 4, 16, 4]
    long = [*load_problems(family / "train.jsonl"), reward.Problem("1+1" * 42 + "=", "2")]
    save_problems(long, tmp_path / "long")
    with pytest.raises(SystemExit):
        evaluated("--data", tmp_path / "long")
    assert f"prompt {len(long)} has 150 tokens" in capsys.readouterr().err and evaluated.ran == []  # at once
    with pytest.raises(SystemExit, match="3"):
        evaluated("--n", 10 ** 13)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("eval.py: error: out of memory: sample fewer rollouts at once, or shorter ones")


def test_eval_cli_asks_what_temperature_and_explorer_add(evaluated, family, tmp_path, capsys):
    """Drawn with the same random numbers, a warmed copy fails where its cold self did, and temperature looks
    worthless."""
    learner, explorer, plain = tmp_path / "model", family / "explorer", evaluated()
    text = evaluated("--model", learner, explorer, learner, "--temperature", 1, 1, 1)
    assert evaluated.ran == [16, 4]  # what the first two wrote is there
    lines = [path.read_text().splitlines() for path in (tmp_path / "out").glob("result-*.jsonl")]
    texts = [json.loads(line)["texts"] for _, *rest in lines for line in rest]
    assert len(lines) == 3 and len(texts) == 6 and all(a != b for a, b in itertools.combinations(texts, 2))
    shares = dict(line.split("%  ")[::-1] for line in text.splitlines() if re.match(r" +[0-9.]+%  ", line))
    assert [*shares] == [str(learner), str(explorer), f"{learner} at T 1"] and "0.00" not in shares.values()
    assert all(f"{share}%  {name}" in plain for name, share in list(shares.items())[:2])
    with pytest.raises(SystemExit, match="2"):
        evaluated("--temperature", 1, 1, 1.6)
    assert "--temperature: one for all 2 models, or one for each" in capsys.readouterr().err


def test_eval_cli_goes_on_where_it_was_stopped(evaluated, tmp_path):
    """An evaluation of a day that begins anew is not made again."""
    text, path = evaluated(), min((tmp_path / "out").glob("result-*.jsonl"))
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("result-*.jsonl")}
    shutil.rmtree(tmp_path / "out")
    evaluated.killed_at = 3
    with pytest.raises(SystemExit, match="130"):  # Ctrl-C, and no traceback
        evaluated()
    evaluated.killed_at = None
    assert evaluated() == text and evaluated.ran == [4]
    path.write_bytes(whole[path.name][:-30])  # killed while it wrote a line
    assert evaluated() == text and evaluated.ran == [4]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("result-*.jsonl")} == whole


def test_a_mode_of_evaluation_gives_way_to_flags(monkeypatch):
    monkeypatch.setattr(sys, "argv", "eval.py --model x --data y --mode nothink --top-p 0.9".split())
    args = evaluation.parse_flags()
    assert (args.temperature, args.top_p, args.top_k, args.presence_penalty) == ([0.7], 0.9, 20, 1.5)


def test_sample_cli_prints_no_terminal_escapes(family, monkeypatch, capsys):
    """A model's text is data: printed raw, it could clear the screen."""
    argv = ["sample.py", "--model", str(family / "learner"), "--prompt", "3+4=", "--n", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sampling, "decode", lambda rollouts, tokenizer: [["\x1b[2J7"] * 2])
    sampling.main()
    out = capsys.readouterr().out
    assert out.count("log-prob") == 2 and "\x1b" not in out and r"\x1b[2J7" in out
    monkeypatch.setattr(sys, "argv", argv[:-1] + ["10000000000000"])
    with pytest.raises(SystemExit, match="3"):
        sampling.main()
    assert capsys.readouterr().err.startswith("sample.py: error: out of memory: sample fewer")
    monkeypatch.setattr(sampling, "sample", lambda *given, **more: 1 / 0)  # a bug is no user's fault
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
    theirs, ours = AutoModelForCausalLM.from_pretrained(out / "learner"), checkpoint.load(out / "learner")[0]
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


@pytest.mark.parametrize("more", [(), ("--dtype", "bfloat16", "--kl-coef", 0.1),
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
    assert checkpoint.load(out / "learner")[2] == (0, 5)


@contextlib.contextmanager
def files_up_to(size):
    """As on a disk that fills up: no file can grow beyond `size` bytes."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@pytest.mark.parametrize("argv, idle", [
    ("--explorer none --explorer-temperature .7", "explorer-temperature"),
    ("--explorer a.jsonl --explorer-top-p .9", "explorer-top-p"), ("--explorer-share .3", "explorer-share"),
    ("--explorer none --off-policy positive", "off-policy"), ("--minibatches 1 --clip-low .1", "clip-low"),
    ("--minibatches 1 --clip-high .3", "clip-high"),
    ("--explorer-temperature .7 --explorer-top-p .9 --schedule constant --explorer-share .3 --minibatches 1 "
     "--off-policy behaviour --clip-low .1 --clip-high .3", None)])
def test_flags_that_do_nothing_are_named(argv, idle, family, capsys):
    """Recorded as settings, they pass for what made the difference."""
    training.parse_flags(flags(family, "run", *argv.split()))
    error = capsys.readouterr().err
    assert error.startswith(f"warning: --{idle} does nothing with") if idle else not error
    assert error.count("\n") == bool(idle)


def test_the_family_is_found_beside_the_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(training.parse_flags([]).learner).resolve() == ROOT / "runs" / "family-habit" / "learner"


def test_what_is_left_out_or_amiss_with_the_problems_is_said(family, tmp_path, capsys):
    """One prompt that is too long must not cost the run, and questions seen in training are no exam."""
    problems = load_problems(family / "train.jsonl")
    save_problems([*problems, problems[3], reward.Problem("1+1" * 42 + "=", "2", exact=True)],
                  tmp_path / "data")
    code, said, error = main_here(capsys, flags(family, tmp_path / "run", "--data", tmp_path / "data",
                                                "--eval-data", family / "train.jsonl", "--steps", 1,
                                                "--thinking", "on"))
    assert code == 0 and f"1 of {len(problems) + 1} problems left out: too long for the context of" in said
    assert f"1 of {len(problems) + 2} problems left out: duplicates" in said
    assert "warning: 8 held-out questions are in --data too" in error
    assert "warning: --thinking does nothing: " in error


@pytest.mark.parametrize("change, complaint", [
    ("--learner no/such", "no/such"), ("--explorer no/such", "no/such"), ("--data broken", "broken, line 2"),
    ("--eval-data long", "no problem is left"), ("--max-new-tokens 125", "no problem is left"),
    ("--data words", "no tokens for '?Wst'"), ("--mix-steps 5", "mix"),
    ("--explorer other", "differ in 2 tokens"),
    ("--minibatches 9", "--minibatches 9: not between 1 and 4"),
    ("--data asked", "no tokens for ',.P"),  # the instruction's letters
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
    exact = lambda question: reward.Problem(question, "2", exact=True)
    save_problems([exact("1+1" * 100)], "long")
    save_problems([exact("1+1"), exact("What is 1+1?")], "words")
    save_problems([exact("1+1" * 10 + "=")], "longer")
    save_problems([reward.Problem("1+1=", "2")], "asked")
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
    monkeypatch.setattr(training, "family_of", lambda task: tmp_path / "gone")
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
    for word in ("1", "two"):  # trap 8: a group of one
        with pytest.raises(SystemExit, match="2"):
            training.parse_flags(["--group-size", word])
    assert len(numbers) > 20


def test_defaults_depend_on_whose_model_it_is(family, tmp_path, monkeypatch):
    """The laptop's rate of 6e-4 destroys a real model in a step, and its 16 tokens hold no answer."""
    picked = lambda *argv: [getattr(training.parse_flags([*argv]), name) for name in (
        "lr", "max_new_tokens", "eval_problems", "eval_n", "mix_steps")]
    yours = ("--learner", "x", "--explorer", "none", "--data", "d")
    assert picked() == [6e-4, 16, 256, 32, 20] and picked(*yours) == [1e-6, 512, 64, 4, 20]
    assert picked(*yours, "--lora-rank", "8", "--steps", "7") == [1e-5, 512, 64, 4, 3]
    for incomplete in (yours[:4], yours[:2] + yours[4:], ("--resume",)):  # no data; no explorer; no --out
        with pytest.raises(SystemExit):
            training.parse_flags([*incomplete])
    usual = training.objective_of(training.parse_flags(["--prompts-per-step", "1"]))  # defaults fit any batch
    assert usual == grpo.Objective(max_new_tokens=16)  # what a reader of grpo.py sees is what runs
    used = []

    def sample(model, *given, **more):
        used.append(model)
        return SimpleNamespace(finished=torch.ones(1))
    for more in ((), ("--compile",)):
        args = training.parse_flags(flags(family, tmp_path / f"{more}", *more))
        run, explore = training.load_run(args, training.open_explorer)
        monkeypatch.setattr(training, "sample", sample)
        explore([[5]], 1, seeded()), run.write([[5]], 1, seeded())
        explorer, learner = used[-2:]
        assert learner is run.learner is not explorer
        assert learner.compiled == explorer.compiled == bool(more)


# ==== 7. The house ==========================================================================================
# A reader who wants one concept opens one file. That holds as long as no stair goes up.

CORE = "anneal eval grpo model reward sample train".split()
BASEMENT = sorted(f"plumbing.{path.stem}" for path in ROOT.glob("plumbing/[a-z]*.py")
                  if not path.stem.startswith("test_"))
FILES = {name: ROOT / f"{name.replace('.', '/')}.py" for name in [*CORE, *BASEMENT]}
FILES["plumbing"] = ROOT / "plumbing" / "__init__.py"


def imports_of(name):
    """Every module that a file imports, in functions too. Of `from plumbing import text`, plumbing.text."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: a relative import, which this map cannot read"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= inner or {node.module}
    return found


def test_stairs_go_down_only():
    """In a circle no file can be read, or replaced, alone."""
    arrows = {name: imports_of(name) for name in FILES}
    below = lambda name: arrows[name] & FILES.keys() - {"plumbing"}  # which imports nothing
    outside = lambda name: {module.partition(".")[0] for module in arrows[name] - FILES.keys()}
    closed, reward_and_below = [], {"plumbing.answers", "plumbing.tasks"}
    while open_ := FILES.keys() - closed:
        lowest = [name for name in open_ if below(name) <= {*closed}]
        assert lowest, f"a circle among {sorted(open_)}"
        closed += lowest
    upstairs = {"recipes", "bench", "endurance", "test_all"}
    assert not any(upstairs & outside(name) for name in FILES)
    assert not below("model") | below("anneal") and below("reward") == reward_and_below
    for name in ("anneal", "plumbing", "reward", *reward_and_below):
        assert outside(name) <= {*sys.stdlib_module_names}, name
    assert not any(map(below, reward_and_below)) and len(FILES) > 15


def test_concepts_do_not_know_the_command_line():
    """A function that takes `args` can be called by train.py alone."""
    for name in ("anneal", "eval", "grpo", "model", "reward", "sample"):
        for node in ast.walk(ast.parse(FILES[name].read_text())):
            if isinstance(node, (ast.FunctionDef, ast.Lambda)) and getattr(node, "name", "") != "main":
                taken = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
                assert "args" not in taken, f"{name}, line {node.lineno}"


def test_the_index_names_a_test_for_every_trap():
    """A trap whose test was renamed away is open again, and nobody sees it."""
    rows = re.findall(r"^ ?(\d+)  \S.*? (test_traps?_(\w+))$", __doc__, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == [*range(1, 31)]
    written = (ROOT / "test_all.py").read_text() + (ROOT / "plumbing" / "test_plumbing.py").read_text()
    for number, name, rest in rows:
        assert f"\ndef {name}(" in written and number in re.match(r"[\d_]+", rest)[0].split("_"), name


def test_the_readme_names_what_exists():
    """A reader's first command must not fail."""
    text, flag = (ROOT / "README.md").read_text(), r"(?<![\w-])--[a-z][a-z0-9-]*"
    sources = [p for p in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if not p.name.startswith("test_")]
    flags_of = lambda path: re.findall(r'add\w*\("(--[^"]+)"', path.read_text())
    known = lambda paths: {"--help", "--config"}.union(*map(flags_of, paths))  # accelerate's --config_file
    for link in re.findall(r"\]\((?!https?:|#|\.\./)([^)#]+)", text):
        assert (ROOT / link).exists(), link
    assert {*re.findall(flag, text)} <= known(sources)
    for module, script, words in re.findall(
            r"python (?:-m ([\w.]+)|((?:\w+/)*\w+\.py))((?:\\\n|[^\n`#|&])*)", text):
        script = script or f"{module.replace('.', '/')}.py"
        also = "train.py" if "/" in script else script  # recipes hand train.py's flags on
        assert {*re.findall(flag, words)} <= known([ROOT / script, ROOT / also]), f"{script} {words}"
