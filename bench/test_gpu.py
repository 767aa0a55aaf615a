"""Would it run on a GPU, and would the GPU have to wait? On a pretend device (pretend.py), which needs none.

    pytest bench/test_gpu.py
"""
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plumbing  # before torch, which reads a variable that it sets

import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import grpo
import model as models
from plumbing.problems import load_problems, save_problems
import reward
import sample as sampling
import train as training
from plumbing import family as families, nucleus, pictures
from plumbing.optimizer import Optimizer
from plumbing.text import cut, decode
from pretend import CUDA, pretend
from recipes import explorers, measured, pool, remedies, rescue, retokenize, separate

PROMPTS = [[5, 6], [7, 8, 9, 10, 11, 3, 2], [5, 6], [4]]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_model(device="cpu", dtype=torch.float32, **changes):
    """A random model, far from uniform. The last 3 ids are padding of the vocabulary."""
    hf = dict(model_type="qwen3", vocab_size=24, max_position_embeddings=256, hidden_size=32,
              intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              rms_norm_eps=1e-6)
    model, generator = models.Transformer(models.Config.from_hf(hf | changes)), seeded()
    for name, p in model.named_parameters():
        p.data.normal_(float("norm" in name), 0.2 if p.dim() > 1 else 0.1, generator=generator)
    model.num_tokens = 21
    return model.to(device, dtype)


def on_device(call):
    """(result, what was seen) of call() on the pretend device. A fault fails it, also one that was caught."""
    with pretend() as seen:
        result = call()
    assert not seen.faults, seen.faults
    return result, seen


def sampled(device="cpu", n=2, tokens=8, prompts=PROMPTS, dtype=torch.float32, stops=(0,), **settings):
    return sampling.sample(tiny_model(device, dtype), prompts, n, seeded(), tokens, stops, **settings)


def updated(device="cuda", prompts=PROMPTS, stops=(0,), **objective):
    """update's metrics of a step with advantages on random rollouts, and the learner then."""
    learner, rollouts = tiny_model(device), sampled(device, 4, 12, prompts, stops=stops)
    A = torch.tensor([[1.0, -1.0, 0.5, -0.5]] * len(prompts), device=device)
    metrics, _ = grpo.update(learner, None, Optimizer(learner, 1e-3), prompts, rollouts, A,
                             grpo.Objective(**objective), seeded())
    return metrics, learner


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """Two models that have hardly learnt anything, on disk, and a few problems."""
    out = tmp_path_factory.mktemp("family") / "sums"
    sizes = {"explorer": (16, 1), "learner": (24, 2)}
    families.make_family(out, "natural", sizes=sizes, corpus_size=256, epochs=1)
    for name in ("train", "heldout"):
        save_problems(load_problems(out / f"{name}.jsonl")[:8], out / f"{name}.jsonl")
    return out


@pytest.fixture(autouse=True)
def little_else(monkeypatch):
    """Rewards differ within a group, whatever such models write, and no time goes to matplotlib."""
    by_length = lambda problem, text: reward.Score(float(len(text) % 2), True, True)
    monkeypatch.setattr(training, "score", by_length)
    monkeypatch.setattr(pictures, "draw", lambda *given: None)


def run(family, out, device, more="", steps=1, **options):
    """A run by train.main's own path, which always ends with SystemExit: its metrics."""
    flags = (f"--learner {family}/learner --explorer {family}/explorer --data {family}/train.jsonl --out "
             f"{out} --steps {steps} --prompts-per-step 4 --group-size 4 --lr 1e-3 --max-new-tokens 5 "
             f"--schedule constant --eval-problems 2 --eval-n 2 --micro-batch-tokens 64 "
             f"--minibatches 2 --device {device} {more}")
    with pytest.raises(SystemExit) as leaving:
        training.main(flags.split(), **options)
    assert not leaving.value.code
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


# ---- the pretend device itself -----------------------------------------------------------------------------

@pytest.mark.parametrize("wrong", [
    lambda x, c: x + c, lambda x, c: torch.cat([x, c]), lambda x, c: c[x.long()], lambda x, c: x.numpy(),
    lambda x, c: torch.where(c > 0, x, x), lambda x, c: x.normal_(generator=torch.Generator()),
    lambda x, c: torch.rand(3, device="cuda", generator=torch.Generator()), lambda x, c: torch.isin(x, c),
    lambda x, c: x.long()[None] @ x.long()[:, None], lambda x, c: c.copy_(x) + x,
    lambda x, c: x.masked_fill(c > 0, 0.0)])
def test_the_pretend_device_raises_what_cuda_would(wrong):
    """Else the tests below would pass, and the first run on a GPU would not."""
    with pretend() as seen, pytest.raises((RuntimeError, TypeError)):
        wrong(torch.zeros(3, device="cuda"), torch.zeros(3))
    assert len(seen.faults) == 1


def test_the_pretend_device_allows_what_cuda_does_and_counts_it():
    """A device that forbids too much would have the code say things that CUDA does not ask for."""
    def fine():
        x, c = torch.zeros(3, device="cuda"), torch.zeros(3)
        assert x.device == x.view(3, 1).device == (x + 1).device == c.to(x).device == CUDA  # c: a copy
        assert (x + c.sum()).device == x[torch.tensor([0])].device == CUDA  # a copy: indices may cross
        assert x.cpu().device == c.device == torch.device("cpu")            # a copy
        assert torch.empty(2, device="cuda").isnan().all()                  # a wait
        return x.tolist()                                                   # a wait
    _, seen = on_device(fine)
    assert seen.counts == {"wait": 2, "copy": 3}, seen.lines


def test_two_values_for_one_place_are_a_fault():
    """CUDA keeps any of them: the run would differ from itself."""
    with pretend() as seen:
        torch.zeros(3, device="cuda")[[0, 0]] = torch.tensor([1.0, 2.0], device="cuda")
    assert "one place" in seen.faults[0]


# ---- nothing crosses devices -------------------------------------------------------------------------------

@pytest.mark.parametrize("more", [
    "--explorer none --minibatches 1 --loss dr_grpo", "--dtype bfloat16 --kl-coef 0.1 --checkpoint-layers",
    "--lora-rank 2 --kl-coef 0.1 --loss dapo --off-policy truncated", "--loss gspo --off-policy geometric",
    "--rollout-rows 4 --explorer-top-p 0.9 --temperature 0.8 --off-policy behaviour"])
def test_a_run_stays_on_its_device(more, family, tmp_path):
    """With a CPU run's numbers, but for rounding. Else flags that nobody has tried on a GPU end a run there,
    or train something else."""
    ours, _ = on_device(lambda: run(family, tmp_path / "cuda", "cuda", more))
    theirs = run(family, tmp_path / "cpu", "cpu", more)
    for name in ("entropy", "grad_norm", "reward", "tokens_trained"):
        close = pytest.approx(theirs[0][name], rel=0.1 if "bfloat16" in more else 1e-3, abs=1e-6)
        assert ours[0][name] == close, name


def test_a_resumed_run_stays_on_its_device(family, tmp_path):
    """Checkpoints are read to the CPU, and evaluations sample too."""
    more = f"--off-policy positive --dtype bfloat16 --eval-data {family}/heldout.jsonl"
    on_device(lambda: run(family, tmp_path / "run", "cuda", more))
    on_device(lambda: run(family, tmp_path / "run", "cuda", f"{more} --resume", steps=2))


@pytest.mark.parametrize("given", [
    dict(loop=rescue.rescue), dict(loop=separate.separate), dict(loop=measured.measured),
    *(dict(loop=loop) for loop in remedies.LOOPS.values()), dict(open_explorer=retokenize.open_explorer),
    dict(open_explorer=explorers.open_thinned),
    dict(open_explorer=lambda args, run: explorers.open_fleet(args, run, also=[args.explorer]))])
def test_recipes_stay_on_their_device(given, family, tmp_path):
    """A variant that mixes devices cannot be tried where it matters."""
    on_device(lambda: run(family, tmp_path / "run", "cuda", "--kl-coef 0.1 --off-policy geometric", **given))


def test_a_pool_is_written_and_read_on_a_device(family, tmp_path):
    """A pool's rollouts come from a file, and must go where the learner is."""
    path = tmp_path / "pool.jsonl"
    flags = f"--model {family}/explorer --data {family}/train.jsonl --out {path} --n 4 --max-new-tokens 4"
    on_device(lambda: pool.main(f"{flags} --device cuda".split()))
    on_device(lambda: run(family, tmp_path / "run", "cuda", f"--explorer {path}"))


@pytest.mark.parametrize("settings", [
    {}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.7},
    {"adjust": partial(evaluation.presence_penalty, 1.0)}])
def test_a_device_draws_the_same_tokens(settings):
    """model.py has other code for a GPU (project, attend): it must be the same policy."""
    draw = lambda device: [x.cpu() for x in vars(sampled(device, 3, 12, rows=4, **settings)).values()]
    (ours, _), theirs = on_device(lambda: draw("cuda")), draw("cpu")
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs))
    on_device(lambda: sampled("cuda", dtype=torch.bfloat16))


# ---- how often the device is asked -------------------------------------------------------------------------

class Words:
    """A tokeniser that has one word."""
    def decode(self, ids, skip_special_tokens):
        return "word"


def asked(more, less=lambda: None):
    """(waits, copies) of the call `more` beyond those of the call `less`."""
    first, second = (on_device(call)[1].counts for call in (more, less))
    return tuple(first[what] - second[what] for what in ("wait", "copy"))


def test_the_device_is_asked_seldom(family, tmp_path):
    """Whenever the host asks for a value, or sends one, the GPU runs dry for some ten microseconds. Once a
    token or once a rollout that is more than the work. This is all that may be: (waits, copies)."""
    few, many = (on_device(lambda n=n: sampled("cuda", n))[0] for n in (2, 8))
    brief, long = (lambda t=t: sampled("cuda", tokens=t, stops=()) for t in (8, 16))
    update = lambda size, minibatches: lambda: updated(micro_batch_tokens=size, minibatches=minibatches)
    step, steps = (lambda n=n: run(family, tmp_path / str(n), "cuda", "--explorer none", n) for n in (2, 3))
    found = {
        "a look at 8 tokens": asked(long, brief),
        "4 prompts and 24 rollouts more": asked(lambda: sampled("cuda", 4, prompts=2 * PROMPTS), brief),
        "texts": asked(lambda: decode(few, Words())),
        "texts of 24 rollouts more": asked(lambda: decode(many, Words()), lambda: decode(few, Words())),
        "stop texts of 24 rollouts more": asked(lambda: cut(many, len), lambda: cut(few, len)),
        "15 parts of an update more": asked(update(1, 1), update(10 ** 9, 1)),
        "a mini-batch of one part more": asked(update(10 ** 9, 3), update(10 ** 9, 2)),
        "a step of 2 parts, and pi_old": asked(steps, step)}
    assert found == {
        "a look at 8 tokens": (0, 1), "4 prompts and 24 rollouts more": (0, 0), "texts": (2, 0),
        "texts of 24 rollouts more": (0, 0), "stop texts of 24 rollouts more": (0, 0),
        "15 parts of an update more": (0, 15 * 4),
        "a mini-batch of one part more": (2, 6), "a step of 2 parts, and pi_old": (7, 28)}


# ---- what a GPU does slowly, or wrongly --------------------------------------------------------------------

def masks_and_options(monkeypatch, call):
    """[(query's dtype, mask, options)] of the calls of SDPA in call() on the pretend device."""
    seen, sdpa = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **options):
        seen.append((q.dtype, attn_mask, options))
        return sdpa(q, k, v, attn_mask, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    on_device(call)
    return seen


@pytest.mark.parametrize("call", [
    lambda: sampled("cuda", 4, tokens=19, rows=8, dtype=torch.bfloat16),
    lambda: updated(micro_batch_tokens=60)])
def test_masks_lie_as_a_gpu_wants_them(call, monkeypatch):
    """CUDA's attention copies a mask whose rows do not begin at multiples of 8, in every layer, and keeps
    the copy."""
    masks = [mask for _, mask, _ in masks_and_options(monkeypatch, call) if mask is not None]
    prompts_alone = [mask for mask in masks if mask.dim() == 2]  # a single one for all rows
    assert len(masks) > len(prompts_alone)
    for mask in masks:
        *rows, last = mask.stride()
        assert last == 1 and (mask.dim() == 2 or not any(stride % 8 for stride in rows)), (mask.shape, rows)


def test_float32_has_a_fast_kernel_on_a_gpu(monkeypatch):
    """CUDA's fast kernels share no key heads in float32: enable_gqa would hold every head's L x L scores."""
    seen = masks_and_options(monkeypatch, lambda: (sampled("cuda"), sampled("cuda", dtype=torch.bfloat16)))
    shares = {(dtype, "enable_gqa" in options) for dtype, _, options in seen}
    assert shares == {(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["pretended", "present"])
def test_nothing_sees_what_comes_later(device, dtype):
    """Attention that leaks is trained to look ahead, and cannot when it samples. Apple's is reported to."""
    def read(device):
        model, ids = tiny_model(device, dtype), torch.randint(1, 20, (2, 40), generator=seeded()).to(device)
        changed = ids.clone()
        changed[:, 23:] = 20
        with torch.no_grad():
            return torch.stack([model(ids), model(changed)]).cpu()
    present = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    one, other = on_device(lambda: read("cuda"))[0] if device == "pretended" else read(present)
    assert torch.equal(one[:, :23], other[:, :23]) and not torch.equal(one[:, 23:], other[:, 23:])


def test_the_nucleus_is_the_same_by_sorting_and_by_bisection():
    """Top-p decides what the explorer writes: a GPU's way to it must find the very same tokens. The
    probabilities are whole 2^20ths, so that sums are exact in any order, and many are equal or 0."""
    for kind in (1, 30, 2000):
        counts = torch.randint(0, kind + 1, (50, 400), generator=seeded(kind)).double() ** 3
        counts = (counts / counts.sum(1, keepdim=True) * 2 ** 20).floor()
        counts[:, 7] += 2 ** 20 - counts.sum(1)
        p = (counts / 2 ** 20).float()
        assert torch.equal(p.sum(1), torch.ones(50))
        for top_p in (1e-3, 0.25, 0.5, 0.7, 0.95, 1 - 2 ** -20):
            ours, theirs = (p.masked_fill(outside(p, top_p), 0).sort(descending=True).values
                            for outside in (nucleus.by_bisection, nucleus.by_sorting))
            assert torch.equal(ours, theirs)  # of equal ones either may be kept, but as many
            least = torch.where(ours > 0, ours, 2.0).amin(1)
            assert (ours.sum(1) >= top_p).all() and (ours.sum(1) - least < top_p).all()  # the smallest one


def test_no_device_draws_a_token_of_probability_0(monkeypatch):
    """CUDA adds up a single row in parallel, and by rounding the sum may rise, or fall, where a token of
    probability 0 stands. Drawn, its log-prob is -inf, and the step's loss NaN."""
    cumsum = torch.Tensor.cumsum
    shaken = lambda x, dim: cumsum(x, dim) + 2e-3 * (torch.rand(x.shape, generator=seeded()) - 0.5)
    logits = torch.randn(1, 40, generator=seeded())
    logits[:, ::2] = -torch.inf
    draws = lambda: [sampling.draw(logits, torch.tensor([u / 2000])) for u in range(2000)]
    usual = draws()
    monkeypatch.setattr(torch.Tensor, "cumsum", shaken)
    shaken_draws = draws()
    assert all(logp.isfinite() for _, logp in shaken_draws)
    assert sum(int(a != b) for (a, _), (b, _) in zip(usual, shaken_draws)) not in (0, 2000)


def test_the_vocabularys_padding_is_multiplied_and_cut_off(monkeypatch):
    """Qwen3's tokeniser has 151,669 tokens, of 151,936 rows: a product of odd width is slow on a GPU."""
    widths, project = [], models.project
    monkeypatch.setattr(models, "project", lambda x, weight: widths.append(len(weight)) or project(x, weight))
    model, hidden = tiny_model(), torch.randn(3, 32, generator=seeded())
    logits = model.logits(hidden)
    assert widths == [24] and logits.shape == (3, 21)
    assert torch.allclose(logits, hidden @ model.head.T, atol=1e-5)


def test_gradients_are_summed_in_place_and_in_float32():
    """A second copy of all gradients is memory that a model of the limit's size has not."""
    model = tiny_model(dtype=torch.bfloat16)
    optimizer, sums = Optimizer(model, 1e-3), []
    for _ in range(3):
        for weight in optimizer.weights:
            weight.grad = torch.full_like(weight, 1 + 2 ** -7)
        optimizer.accumulate()
        sums.append([master.grad.data_ptr() for master in optimizer.masters])
    assert sums[0] == sums[1] == sums[2] and {weight.grad for weight in optimizer.weights} == {None}
    assert all((master.grad == 3 * (1 + 2 ** -7)).all() for master in optimizer.masters)  # no bfloat16


def test_checkpointed_layers_ask_for_no_random_state(monkeypatch):
    """Nothing is random in a layer, and to read a GPU's random state is to wait for it, a layer a part."""
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("asked"))
    model = tiny_model()
    model.checkpoint_layers = True
    model(torch.ones(2, 5, dtype=torch.long)).sum().backward()
    assert model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0


def test_what_was_sampled_can_be_trained_on():
    """Tensors made in inference mode cannot be saved for a backward pass: none may leave `sample`."""
    rollouts = sampled(top_p=0.9)
    assert not any(getattr(rollouts, name).is_inference() for name in vars(rollouts))
    _, learner = updated("cpu")
    weight = lambda model: model.layers[0].mlp.down_proj.weight
    assert not torch.equal(weight(learner), weight(tiny_model()))


def test_what_was_decided_about_cudas_arithmetic():
    """Each is a line in plumbing/terminal.py that another library, or a default, could undo unseen."""
    cuda = torch.backends.cuda
    assert not cuda.cudnn_sdp_enabled() and not cuda.matmul.allow_tf32
    assert not cuda.matmul.allow_bf16_reduced_precision_reduction
