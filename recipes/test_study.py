"""Checks of the study: claims.py, pairs.py, plan.py.

    pytest recipes/test_study.py
"""
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import grpo
from plumbing.problems import save_problems
import reward
import train as training
from plumbing import checkpoint
from plumbing import family as families
from plumbing.optimizer import Optimizer
from plumbing.tasks import habit_solution
from recipes import claims, explorers, pairs, plan
from recipes.measured import measured
from recipes.rescue import rescue
from recipes.separate import separate
from sample import KVCache, sample
from test_all import family, flags, read_metrics, seeded, tiny_model, train_here  # noqa: F401

SMALL = ("--steps 2 --prompts-per-step 4 --group-size 4 --eval-every 1 --max-new-tokens 4 --eval-problems 8 "
         "--eval-n 16 --save-every 0 --minibatches 2").split()


@pytest.fixture
def study(family, tmp_path, monkeypatch):
    """An empty directory to be in, with two pairs, both the family of sums. Work is done in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claims, "STUDY", SMALL)
    monkeypatch.setattr(claims, "do", lambda jobs, *_: [
        claims.work(job) for job in jobs if len(job) == 5 and not claims.path_of(*job).exists()])
    for pair in (10, 11):
        shutil.copytree(family, pairs.directory("natural", pair))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as workers do: with more, sums are taken in another order
    yield
    torch.set_num_threads(threads)


def test_intervals_hold_what_they_promise_when_pairs_differ():
    """95% of intervals over 4 pairs x 5 seeds hold the truth; of intervals over 20 runs far fewer."""
    random, held, naive = np.random.default_rng(0), 0, 0
    for _ in range(2_000):
        runs = 0.3 + 0.2 * random.standard_normal((4, 1)) + 0.1 * random.standard_normal((4, 5))
        mean, half = claims.interval(runs)
        held += abs(mean - 0.3) < half
        naive += abs(mean - 0.3) < 2.093 * runs.std(ddof=1) / 20 ** 0.5
    assert 0.935 < held / 2_000 < 0.965 and naive / 2_000 < 0.75
    assert claims.interval(runs[:3]) == (pytest.approx(runs[:3].mean()), None)  # too few pairs for one
    assert claims.interval([[x] for x in range(10)])[1] == pytest.approx(2.262 * 9.16667 ** 0.5 / 10 ** 0.5)


def test_a_claim_from_runs_to_table(study, family, tmp_path, monkeypatch, capsys):
    """The runs are train.py's, the numbers those of its metrics.jsonl; only a whole claim is published."""
    with pytest.raises(ValueError, match="run `python -m recipes.claims search --task natural`"):
        claims.rates("natural", "GRPO")
    claims.write_json(claims.ASSETS / "search.json", {
        "natural": {"GRPO": {"0.001": 0.3, "0.01": 0.2}, "S2L-PO": {"0.001": 0.3, "0.01": 0.5}}})
    assert claims.rates("natural", "GRPO") == (0.01, 0.001)
    with pytest.raises(ValueError, match="no rates of fleet of 2 on natural: .* search --task natural"):
        claims.rates("natural", "fleet of 2")
    monkeypatch.setattr(sys, "argv", "claims.py gain --task natural --pairs 2 --seeds 2".split())
    claims.main()
    assert "too few pairs for intervals" in capsys.readouterr().out
    assert [path.name for path in claims.ASSETS.iterdir()] == ["search.json"]  # what is published stays
    assert (claims.RUNS / "assets/gain-natural.png").exists()
    result = json.loads((claims.RUNS / "assets/gain-natural.json").read_text())
    assert result["pairs"] == [10, 11]
    assert result["best"]["GRPO"]["lr"] == 0.001 and result["equal"]["GRPO"]["lr"] == 0.01
    for arm, more in (("GRPO", ("--explorer", "none")), ("S2L-PO", ())):
        _, lines = train_here(family, tmp_path / arm, *SMALL, "--lr", 1e-2, "--seed", 1, *more)
        first, second, third = (line["eval_strict_pass@1"] for line in lines)
        assert result["equal"][arm]["runs"][0][1] == pytest.approx(first / 4 + second / 2 + third / 4)
    row = result["equal"]["S2L-PO"]
    gains = np.array(row["runs"]) - result["equal"]["GRPO"]["runs"]
    assert row["gain"] == pytest.approx(gains.mean()) and row["half"] is None
    assert row["wins"] == (gains > 0).sum() and row["of"] == 4
    monkeypatch.setattr(claims, "PAIRS", 2)
    monkeypatch.setattr(claims, "SEEDS", 2)
    claims.main()
    assert json.loads((claims.ASSETS / "gain-natural.json").read_text()) == result


@pytest.mark.parametrize("arm, main", [
    ("separate", lambda argv: training.main(argv, loop=separate)),
    ("rescue", lambda argv: training.main([*argv, "--schedule", "constant"], loop=rescue)),
    ("measured", lambda argv: training.main(argv, loop=measured)),
    ("thinned", lambda argv: explorers.main(["thinned", *argv])),
    ("fleet of 2", lambda argv: explorers.main(["fleet", "--also", "runs/claims/natural-10/middle", *argv]))])
def test_an_arm_is_its_recipe_and_not_plain_s2l_po(arm, main, study, family, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "STUDY", [*SMALL, "--steps", "3", "--mix-steps", "3"])
    shutil.copytree("runs/claims/natural-10/learner", "runs/claims/natural-10/middle")
    with pytest.raises(SystemExit, match="0"):
        main(flags(family, tmp_path / "run", *claims.STUDY, "--lr", 1e-2))
    for name in (arm, "S2L-PO"):
        claims.work(("natural", 10, name, 1e-2, 0))
        claims.path_of("natural", 10, name, 1e-2, 0).rename(tmp_path / "metrics.jsonl")
        steps, of_recipe = (read_metrics(out)[1:] for out in (tmp_path, tmp_path / "run"))
        assert (steps == of_recipe) == (name == arm)


def test_relatives_of_a_pair(study, monkeypatch):
    pairs.make_member("natural", 10, "pruned")
    pruned, learner = (checkpoint.load(f"runs/claims/natural-10/{name}")[0] for name in ("pruned", "learner"))
    assert len(pruned.layers) == 1 and len(learner.layers) == 2
    assert torch.equal(pruned.layers[0].mlp.down_proj.weight, learner.layers[0].mlp.down_proj.weight)
    problems = families.make_problems("habit", 64, 0)
    corpus = [(problem.question, habit_solution(problem.question, "-")) for problem in problems]
    monkeypatch.setattr(families, "make_corpus", lambda *_: corpus)
    monkeypatch.setattr(pairs, "make_corpus", lambda *_: corpus * 4)
    monkeypatch.setitem(pairs.CORPUS, "habit", (256, 2))
    monkeypatch.setitem(pairs.LADDER, "habit", {"learner": (16, 1)})
    monkeypatch.setattr(pairs, "RELATIVES", {"same": {}, "twin": {"init": 1}, "early": {"stop_after": 1}})
    for name in ("same", "twin", "early"):
        pairs.make_member("habit", 3, name)
    norm = lambda name: checkpoint.load(f"runs/claims/habit-3/{name}")[0].norm.weight
    norms = [norm(name) for name in ("same", "twin", "early")]
    assert not torch.equal(norms[0], norms[1]) and not torch.equal(norms[0], norms[2])
    save_problems(problems[:8], "runs/claims/habit-3/heldout.jsonl")
    texts = [[habit_solution(problem.question, sign) for sign in "++--"] + [""] * 12
             for problem in problems[:8]]
    monkeypatch.setattr("eval.decode", lambda *_: texts)
    found = pairs.measure("habit", 3, "same", 16)
    assert found["executed"] == 4 / 16 and found["distinct methods"] == 3 and found["distinct answers"] == 3
    assert found["method entropy"] == pytest.approx(-2 * 0.125 * math.log(0.125) - 0.75 * math.log(0.75))
    assert found["strict"] == [2 * (problem.question[0] in "AB") for problem in problems[:8]]


@pytest.mark.parametrize("more", [[], ["--minibatches", 2, "--kl-coef", 0.1]])
def test_a_plan_counts_what_an_update_keeps_and_computes(more, tmp_path):
    """Beside an update with numbers: FLOPs, and bytes that autograd keeps of a micro-batch; a prompt once."""
    model, (P, G, L, T) = tiny_model(hidden_size=64, intermediate_size=96), (4, 3, 40, 12)
    model.num_tokens = 24
    (tmp_path / "config.json").write_text(json.dumps(model.hf_config))
    args = training.parse_flags([str(x) for x in (
        "--learner", tmp_path, "--data", "any", "--explorer", "none", "--prompts-per-step", P,
        "--group-size", G, "--max-new-tokens", T, "--minibatches", 1, *more)])
    prompts = torch.randint(1, 20, (P, L), generator=seeded()).tolist()
    rollouts, reference = sample(model, prompts, G, seeded(), T, ()), model if args.kl_coef else None
    only_matmuls = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # which are counted
    with only_matmuls, FlopCounterMode(display=False) as counter:
        grpo.update(model, reference, Optimizer(model, 0.0), prompts, rollouts, torch.randn(P, G),
                    training.objective_of(args), seeded())
    assert plan.plan(args, L)[1]["update"] == pytest.approx(counter.get_total_flops(), rel=0.1)
    args.eval_data, args.eval_problems, args.eval_n = "any", 5, 8  # more rows than a step's
    caches = KVCache(model, 5 * 8, L + T), KVCache(model, 5, L)
    planned = plan.plan(args, L)[0]["sampling"]["keys and values"]
    assert planned == plan.size(kv for cache in caches for kv in cache.layers)
    kept, weights = [], {p.untyped_storage()._cdata for p in model.parameters()}
    rows = torch.arange(P).repeat_interleave(G), rollouts.ids.flatten(0, 1), rollouts.mask.flatten(0, 1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grpo.response_logprobs(model, prompts, *rows)
    kept = plan.size(t for t in kept if t.untyped_storage()._cdata not in weights)
    assert plan.kept_activations(model.to("meta"), P, P * G, L, T)[0] == pytest.approx(kept, rel=0.1)
