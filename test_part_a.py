"""Every check of the seven modules, as a book: sampler equals trainer, the group, the loss, mixing, a run.

    pytest test_all.py

Small GRPO code seldom crashes when it is wrong: it trains worse. "Trap n" is such a mistake; the docstring
says what it does to training, and the test fails if it is put back. Two slow, obvious functions say what the
fast ones must give: `row_logprobs` and `plain_loss`. Nothing is downloaded: models are tiny and made here.
"""
import copy
import itertools
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import grpo
import model as models
import reward
import sample as sampling
import train as training
from recipes import family as families

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
    reward.save_problems(problems[:10], out / "heldout.jsonl")
    reward.save_problems(problems[10:], out / "train.jsonl")
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


@pytest.mark.parametrize("name, change, complaint", [
    ("config.json", b"{", "cannot be loaded"), ("config.json", {"vocab_size": ...}, "no 'vocab_size'"),
    ("config.json", {"model_type": "gpt2"}, "gpt2"), ("config.json", {"hidden_act": "gelu"}, "gelu"),
    ("config.json", {"rope_parameters": LLAMA3 | {"rope_type": "yarn"}}, "yarn"),
    ("config.json", {"hidden_size": 16}, "disagree"), ("config.json", {"num_hidden_layers": 3}, "layers.2"),
    ("model-00002-of-00005.safetensors", b"", "cannot be loaded"),
    ("model-00002-of-00005.safetensors", None, "no model"), ("tokenizer.json", b"{}", "cannot be loaded"),
    ("generation_config.json", {"eos_token_id": 64}, "64")])
def test_a_broken_checkpoint_is_refused_in_one_line(name, change, complaint, tmp_path):
    file = hf_pair("qwen3", tmp_path)[1] / name
    if isinstance(change, dict):
        changed = (json.loads(file.read_text()) | change).items()
        change = json.dumps({key: value for key, value in changed if value is not ...}).encode()
    file.unlink() if change is None else file.write_bytes(change)
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
        metrics = grpo.update(model, reference, optimizer, PROMPTS, r, A, seeded(), kl_coef=0.1)
    assert metrics["kl"] > 1e-4  # the learner has moved; its reference has not, and takes no memory
    assert all(torch.equal(weight, before[name]) for name, weight in reference.state_dict().items())
    assert {p.data_ptr() for p in reference.parameters()} <= memory
    expected = by_row(model, plain)
    models.save(model, tokenizer, tmp_path / "merged")
    merged = by_row(models.load(tmp_path / "merged")[0], plain)
    assert torch.allclose(merged, expected, atol=1e-4) and (expected - plain.logps).abs().max() > 1e-2


def test_merging_into_bfloat16_weights_loses_nothing():
    """Most of what adapters have learnt is less than bfloat16 can tell beside the weight."""
    model = tiny_model().bfloat16()
    models.add_lora(model, 3, seeded())
    linear = model.layers[1].self_attn.o_proj
    linear.B.data.normal_(0, 1e-4, generator=seeded())
    exact = linear.weight.float() + 32 / 3 * linear.B.float() @ linear.A.float()
    models.merge_lora(model)
    assert (linear.weight - exact).abs().max() < 1e-7 < (exact.bfloat16() - exact).abs().max()


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


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("compile, chunk", [(False, 1024), (True, 1024), (False, 4096)])  # 3 chunks, or 1
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
    for seed in range(8):  # so that any number of rows is idle at some time
        whole = sampling.sample(model, prompts, 2, seeded(seed), 24)
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "decode_step", lambda *given: rows.append(len(given[1])) or step(*given))
            few = sampling.sample(model, prompts, 2, seeded(seed), 24, rows=8)
        assert all(torch.equal(vars(few)[name], vars(whole)[name]) for name in ("ids", "lengths", "finished"))
        assert torch.allclose(few.logps, whole.logps, atol=1e-5)
        batch_after_batch += sum(whole.lengths[i:i + 4].max().item() - 1 for i in range(0, 12, 4))
    assert max(rows) == 8 and len(rows) < 0.95 * batch_after_batch


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


def test_presence_penalty_counts_what_was_written():
    model = tiny_model()
    model.stop_ids = ()
    write = lambda penalty: sampling.sample(model, [[5]], 1, seeded(), 20, 0, presence_penalty=penalty)
    assert len(write(0).ids.unique()) < 20 == len(write(1e4).ids.unique())


@pytest.mark.parametrize("change, complaint", [
    ({"n": 0}, "cannot sample"), ({"temperature": -1}, "cannot sample"), ({"top_p": 1.1}, "cannot sample"),
    ({"max_new_tokens": 63}, "prompt 2 has 2 tokens"), ({"prompts": [[1], []]}, "prompt 2 is empty"),
    ({"prompts": [[1], [3, 20]]}, "prompt 2 holds token 20")])
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
        return torch.cat(found).detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])

    expected, slope = run(row_logprobs, whole)
    model.embed_tokens.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    for tokens in (1, 30, 10 ** 6):
        prompts = [len(PROMPTS[group]) for group in groups]
        parts = grpo.micro_batches(groups.tolist(), prompts, lengths.tolist(), tokens)
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
            metrics = grpo.update(learner, reference, found, PROMPTS, r, A, seeded(), **vars(s))
            assert len(found.gradients) == s.minibatches
            for ours, plain in zip(found.gradients, expected.gradients):
                assert (ours - plain).norm() < 1e-4 * plain.norm() > 1e-6
        learner.load_state_dict(start)
        drifted += metrics["clip_fraction_learner"] > 0
        assert metrics["kl"] and (metrics["clip_fraction_explorer"] > 0 or s.off_policy != "behaviour")
    assert drifted and all(torch.equal(x, vars(untouched)[name]) for name, x in vars(r).items())


def test_micro_batches_hold_every_row_once_and_no_more_tokens_than_they_may():
    dice = random.Random(0)
    groups, lengths = [row // 4 for row in range(200)], [dice.randrange(1, 50) for _ in range(50)]
    prompts, responses = [lengths[group] for group in groups], [dice.randrange(1, 50) for _ in groups]
    run = lambda part: len({*groups[part]}) * max(prompts[part]) + len(groups[part]) * max(responses[part])
    for tokens in (1, 60, 300, 10 ** 6):
        parts = grpo.micro_batches(groups, prompts, responses, tokens)
        assert [row for part in parts for row in range(200)[part]] == list(range(200))
        assert all(run(part) <= tokens or part.stop - part.start == 1 for part in parts)
        assert all(run(slice(part.start, part.stop + 1)) > tokens for part in parts[:-1])  # none has room


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
    gradient, = torch.autograd.grad(value + grpo.kl_penalty(logps, old, w, mask), logps)
    assert torch.isfinite(value) and torch.isfinite(gradient).all()
    assert not gradient[~mask].any() and gradient[mask].any()
    assert all(torch.equal(x, y) for x, y in zip((mask, A, logps, old), copies))


def test_trap_16_gradients_of_the_kl_estimators():
    """k1 in a loss has the expected gradient 0: a penalty in name only. Each of 6 tokens by its weight."""
    logits, ref = (torch.randn(1, 6, generator=seeded(i), requires_grad=i == 0) for i in (0, 1))
    logp, ref, every = logits.log_softmax(1), ref.log_softmax(1), torch.ones(1, 6) > 0
    k1, k2, k3 = (grpo.kl_penalty(logp, ref, logp.exp().detach(), every, k) for k in ("k1", "k2", "k3"))
    slope = lambda x: torch.autograd.grad(x, logits, retain_graph=True)[0]
    kl = (logp.exp() * (logp - ref)).sum()
    reverse, forward = slope(kl), slope((ref.exp() * (ref - logp)).sum())
    assert slope(k1).abs().max() < 1e-6 < 1e-3 < (reverse - forward).abs().max()
    assert torch.allclose(slope(k2), reverse, atol=1e-6) and torch.allclose(slope(k3), forward, atol=1e-6)
    assert torch.isclose(k1, kl) and torch.isclose(k3, kl)


@pytest.mark.parametrize("choice, weight", [
    ("recompute", [1, 1]), ("behaviour", [1, 1]), ("truncated", [2, math.exp(-1)]),
    ("geometric", [math.exp(0.5)] * 2), ("positive", [0, 0])])
def test_trap_26_what_divides_in_the_ratio_of_explorer_tokens(choice, weight):
    """Explorer tokens scored as if the learner had drawn them: a choice with a name, not an accident."""
    learner, sampler = torch.tensor([[-1.0, -2.0]] * 2), torch.tensor([[-3.0, -1.0], [-1.1, -2.1]])
    explorer, A, mask = torch.tensor([True, False]), torch.tensor([-1.0, -1.0]), torch.ones(2, 2) > 0
    old, found = grpo.off_policy_correction(choice, learner, sampler, explorer, A, mask)
    assert torch.equal(old, torch.stack([(sampler if choice == "behaviour" else learner)[0], learner[1]]))
    assert torch.allclose(found, torch.tensor([weight, [1.0, 1.0]]))
    mask[0, 0] = False  # then the second token alone counts, with its log-ratio of -1
    padded = [x.masked_fill(~mask, 0.0) for x in (learner, sampler)]
    _, found = grpo.off_policy_correction(choice, *padded, explorer, -A, mask)
    expected = math.exp(-1) if choice in ("truncated", "geometric") else 1  # `positive` lets A > 0 pass
    assert found[0, 1].item() == pytest.approx(expected)
