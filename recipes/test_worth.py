"""Checks of worth.py and its loops, remedies.py.

    pytest recipes/test_worth.py
"""
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import grpo
import train as training
from plumbing import checkpoint
from plumbing.optimizer import Optimizer
from recipes import claims, overtrain, pairs, remedies, worth
from test_all import family, flags, seeded  # noqa: F401


@pytest.fixture
def steps_of(family, tmp_path, monkeypatch):
    """steps_of(loop, flags) runs it: (run, metrics, calls of sample, calls of update); calls hold all given
    and, last, what came back. Of the samples only those that training reads. wider: by how many columns of
    padding the first sample's rollouts, and by how many all others."""
    def run_here(loop, more, wider=(0, 0)):
        samples, updates = [], []

        def sample(*given, **named):
            r = real(*given, **named)
            more = wider[bool(samples)]
            r.ids, r.logps = F.pad(r.ids, (0, more)), F.pad(r.logps, (0, more))
            return r

        def noting(function, calls):
            def noted(*given, **named):
                calls.append((*given, named, function(*given, **named)))
                return calls[-1][-1]
            return noted
        args = training.parse_flags(flags(family, tmp_path / "run", "--eval-every", 0, *more.split()))
        with monkeypatch.context() as patch:
            real = training.sample
            patch.setattr(training, "sample", noting(sample, samples))
            patch.setattr(training, "update", noting(training.update, updates))
            run, explore = training.load_run(args, training.open_explorer)
            run.eval_problems = []
            loop(args, run, explore)
        return run, run.history, samples, updates
    return run_here


def test_the_learner_cools_to_1_and_is_trained_at_the_temperature_it_sampled_at(steps_of):
    """At another one the gradient is of a policy that drew none of this."""
    _, lines, samples, updates = steps_of(remedies.LOOPS["cooling"], "--explorer none --temperature 1.6")
    for heats in ([call[6] for call in samples], [call[6].temperature for call in updates],
                  [line["temperature"] for line in lines]):
        assert heats == pytest.approx([1.6, 1.4, 1.2, 1.0])
    assert all(line["logp_gap_learner"] < 1e-5 for line in lines)


def test_a_hot_learner_beside_an_explorer_at_1(steps_of):
    """Trained at T 1 its own tokens would be off-policy; the explorer's T is another flag."""
    run, lines, samples, updates = steps_of(training.train, "--mix-steps 3 " + worth.ARMS["S2L-PO at T 1.6"])
    own, others = ([call for call in samples if (call[0] is run.learner) == mine] for mine in (True, False))
    assert {call[6] for call in own} == {1.6} and {call[6] for call in others} == {1.0}
    assert all(call[6].temperature == 1.6 for call in updates)
    assert all(line["logp_gap_learner"] < 1e-5 for line in lines if line["rollouts_learner"])


@pytest.mark.parametrize("wider", [(0, 0), (0, 2), (2, 0)])
def test_dynamic_sampling_draws_all_fail_groups_again_and_no_others_and_pays_for_them(wider, steps_of):
    """What is drawn again may be longer or shorter than what was there (rollouts of a pool are)."""
    run, (line,), samples, updates = steps_of(remedies.LOOPS["dynamic"],
                                             "--explorer none --steps 1 --loss dr_grpo", wider)
    problem_of = {tuple(prompt): problem for prompt, problem in zip(run.prompts, run.problems)}
    fails, expected, thrown_away = [0, 1, 2, 3], [None] * 4, 0
    assert len(samples) > 1
    for _, prompts, n, *_, rollouts in samples:
        assert len(prompts) == len(fails) and n == 4
        assert prompts != [expected[i] and expected[i][0] for i in fails]  # other problems
        texts = training.decode(rollouts, run.tokenizer)
        right = training.score_all([problem_of[tuple(prompt)] for prompt in prompts], texts)[..., 1].any(1)
        ids = F.pad(rollouts.ids, (0, 4 + max(wider) - rollouts.ids.shape[2]))
        for i, prompt, *group in zip(fails, prompts, ids, right):
            expected[i] = (prompt, *group)
        last, fails = int(rollouts.lengths[~right].sum()), [i for i, ok in zip(fails, right) if not ok]
        thrown_away += last
    thrown_away -= last if len(samples) == 4 else 0  # after the last draw they stay
    prompts, rollouts, A = updates[0][3:6]
    assert prompts == [group[0] for group in expected] and not rollouts.ids[~rollouts.mask].any()
    for i, (_, ids, right) in enumerate(expected):
        assert torch.equal(rollouts.ids[i], ids) and bool(A[i].any()) <= bool(right)
    assert 0 < A.max() <= 0.75  # (of one right in four; over the standard deviation it would be 1.5)
    assert line["tokens_thrown_away"] == thrown_away > 0
    size = {"learner": 100, "explorer": 10}
    kept = line["length_learner"] * 16
    assert worth.flops(line, size) == pytest.approx(200 * (kept + thrown_away) + 800 * line["tokens_trained"])


def test_flops_by_hand():
    line = {"rollouts_learner": 4, "length_learner": 5.0, "rollouts_explorer": 8, "length_explorer": 3.0,
            "tokens_trained": 30}
    assert worth.flops(line, {"learner": 100, "explorer": 10}) == 2 * 100 * 20 + 2 * 10 * 24 + 8 * 100 * 30
    alone = line | {"rollouts_explorer": 0, "length_explorer": None}
    assert worth.flops(alone, {"learner": 100, "explorer": 10}) == 2 * 100 * 20 + 8 * 100 * 30


def test_maxrl_advantages_by_hand():
    rewards = torch.tensor([[1., 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    assert remedies.maxrl_advantages(rewards).tolist() == [[3, -1, -1, -1], [0] * 4, [0] * 4, [1, 1, -1, -1]]


def test_the_entropy_bonus_has_the_entropys_gradient(steps_of):
    """Over all tokens, each as often as it is drawn: minus the entropy's gradient. k3 has another."""
    logits = torch.randn(1, 7, generator=seeded(), requires_grad=True)
    logps = logits.log_softmax(-1)
    uniform = torch.full((1, 7), -math.log(7))
    bonus = (logps.exp().detach() * grpo.kl_estimates(logps, uniform, torch.ones(1, 7) > 0, "k2")).sum()
    less_entropy = (logps.exp() * logps).sum()
    both = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (bonus, less_entropy)]
    assert torch.allclose(*both, atol=1e-6)
    run, _, _, updates = steps_of(remedies.LOOPS["entropy"], "--explorer none --steps 1 --kl-coef 0.1")
    learner, reference, _, prompts, rollouts, _, objective, *_ = updates[0]
    ids, mask = rollouts.ids.flatten(0, 1), rollouts.mask.flatten(0, 1)
    logps, _ = grpo.response_logprobs(reference, prompts, torch.arange(4).repeat_interleave(4), ids, mask)
    assert torch.allclose(logps[mask], torch.tensor(-math.log(len(learner.head))))
    assert objective.kl_estimator == "k2" and objective.kl_coef == 0.1 and reference is not learner


def test_raft_imitates_the_explorers_successes_then_leaves_it(steps_of, family):
    more = "--schedule step --mix-steps 1 --lr 1e-3 --max-grad-norm 1e9"
    run, (line,), _, updates = steps_of(remedies.LOOPS["raft"], f"{more} --steps 1")
    args = training.parse_flags(flags(family, "plain", *more.split()))
    learner, *_ = checkpoint.load(args.learner)
    optimizer = Optimizer(learner, 1e-3)
    prompts, rollouts, right = updates[0][3], updates[0][4], updates[0][5].flatten() == 1
    assert 0 < right.sum() < 16 and rollouts.from_explorer.all()
    ids, mask = rollouts.ids.flatten(0, 1)[right], rollouts.mask.flatten(0, 1)[right]
    for _ in range(2):  # two passes over the successes, and nothing else
        logps, _ = grpo.response_logprobs(learner, prompts, torch.arange(16)[right] // 4, ids, mask)
        (-(logps.sum(1) / mask.sum(1)).sum() / 16).backward()
        optimizer.step(1e9)
    for mine, its in zip(learner.parameters(), run.learner.parameters()):
        assert torch.allclose(mine, its, atol=2e-6)
    assert line["tokens_trained"] == 2 * mask.sum()


def test_after_the_warm_start_raft_is_grpo(steps_of):
    _, lines, _, updates = steps_of(remedies.LOOPS["raft"], "--schedule step --mix-steps 1 --steps 2")
    assert [line["rollouts_explorer"] for line in lines] == [16, 0]
    assert [call[6].minibatches for call in updates] == [1, 1, 2]
    assert torch.allclose(updates[2][5].sum(1), torch.zeros(4), atol=1e-5)


# ---- the study ---------------------------------------------------------------------------------------------

@pytest.fixture
def study(family, tmp_path, monkeypatch):
    """An empty directory with three pairs, all the family of sums; work is done in this process."""
    monkeypatch.chdir(tmp_path)
    small = ("--prompts-per-step 4 --group-size 4 --eval-every 8 --max-new-tokens 4 --eval-problems 4 "
             "--eval-n 16 --save-every 0 --device cpu")
    monkeypatch.setattr(claims, "STUDY", small.split())
    monkeypatch.setattr(worth, "PLACES", {"home": ("natural", "learner", "explorer", 16)})
    monkeypatch.setattr(worth, "RATES", ["--lr 0.001", "--lr 0.01"])
    monkeypatch.setattr(worth, "SEARCH_PAIRS", (20,))
    monkeypatch.setattr(worth, "make_models", lambda *_: None)
    monkeypatch.setattr(worth, "qualified", lambda task, count, first: [*range(first, first + count)])
    monkeypatch.setattr(worth, "do", lambda jobs, workers, title, work, is_done: [
        worth.work(job) for job in jobs if not is_done(job)])
    for pair in (20, 23, 24):
        shutil.copytree(family, pairs.directory("natural", pair))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_killed_study_goes_on_and_its_report_needs_no_runs(study, monkeypatch, capsys):
    jobs, usual = [], worth.work

    def work(job):
        if len(jobs) == 3:
            monkeypatch.setattr(worth, "work", lambda job: jobs.append(job) or usual(job))
            raise KeyboardInterrupt
        jobs.append(job)
        usual(job)
    monkeypatch.setattr(worth, "work", work)
    asked = ["--arms", "GRPO", "--pairs", "2", "--seeds", "1"]
    with pytest.raises(SystemExit, match="130"):
        worth.main(["search", *asked])
    worth.main(["search", *asked])
    arms = "GRPO", "S2L-PO"
    assert sorted(jobs) == sorted(("home", 20, arm, lr, 100) for arm in arms for lr in worth.RATES)
    worth.main(["confirm", *asked])
    assert len(jobs) == 8 and {job[1] for job in jobs[4:]} == {23, 24}
    told = capsys.readouterr().out
    assert "2 pairs x 1 seeds" in told and "at equal rollouts highest: " in told and not worth.ASSETS.exists()
    shutil.rmtree(worth.RUNS / "results")
    worth.main(["report", *asked])
    assert told.endswith(capsys.readouterr().out) and (worth.RUNS / "assets/worth.png").exists()
    worth.main(["search", *asked, "--arms", "GRPO", "MaxRL"])  # on another machine
    assert [job[2] for job in jobs[8:]] == ["MaxRL"] * 2 and capsys.readouterr()
    worth.main(["report", *asked])
    assert told.endswith(capsys.readouterr().out)
    with pytest.raises(SystemExit, match="2"):
        worth.main(["report", *asked, "--arms", "clip-high .28"])  # not searched


def test_a_runs_numbers_are_those_of_its_metrics(study, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # leave the run where it was made
    job = ("home", 20, "S2L-PO at T 1.6", "--lr 0.01", 0)
    worth.work(job)
    result = json.loads(worth.path_of(job).read_text())
    out, = claims.RUNS.glob("worker-*")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert result["step"] == [0, 8, 16] and result["flops"][0] == 0
    assert result["strict@1"] == [lines[step]["eval_strict_pass@1"] for step in (0, 8, 16)]
    size = {who: sum(p.numel() for p in checkpoint.load(pairs.directory("natural", 20) / who)[0].parameters())
            for who in ("learner", "explorer")}
    assert result["flops"][1] == pytest.approx(sum(worth.flops(line, size) for line in lines[1:9]))
    assert json.loads((out / "config.json").read_text())["temperature"] == 1.6


def test_the_report_of_places_where_nothing_may_be_lost(capsys):
    """Paired by pair and seed in whatever order; the search's pairs and other rates stay out."""
    runs = {(place, pair, arm, rate, seed): {"strict@1": [0.1 * pair + 0.01 * seed + gain] * 2}
            for rate, less in (("--lr 0.0008", 0.02), ("--lr 0.0004", -0.02)) for seed in (1, 0)
            for pair in (26, 24, 20, 25, 23)
            for place, arm, gain in (("pruned", "GRPO", 0), ("twin", "rescue, positive", less))}
    worth.report_boundary(runs)
    assert capsys.readouterr().out.splitlines() == [
        f"twin       rescue, positive     --lr {rate}, less GRPO's 2.455: {found}" for rate, found in (
            ("0.0004", "-0.020 [-0.020, -0.020], won 0 of 8: worse"),
            ("0.0008", "+0.020 [+0.020, +0.020], won 8 of 8: better"))]
    for arm in ("GRPO", "rescue, positive"):
        del runs["pruned" if arm == "GRPO" else "twin", 24, arm, "--lr 0.0008", 1]
    with pytest.raises(ValueError, match="runs are missing"):
        worth.report_boundary(runs)


def test_endpoints_by_hand():
    run = {"step": [0, 8, 16], "flops": [0, 10e9, 40e9], "strict@1": [0.4, 0.6, 1.0],
           "strict@16": [0.5, 0.7, 1.0], "cold": 0.9}
    found = worth.endpoints(run, 20e9)
    assert [found[key] for key in ("area", "early", "steps", "GFLOPs")] == pytest.approx([0.65, 0.65, 12, 25])
    assert found["cost"] == 2 and found["equal"] == pytest.approx((0.5 + 0.6 + 0.2 / 3) / 2, abs=1e-3)
    longer = worth.endpoints(run, 80e9)["equal"]
    assert longer == pytest.approx((0.5 * 10 + 0.8 * 30 + 1.0 * 40) / 80, abs=2e-3)
    assert worth.reached([0, 8], [0.1, 0.7]) == 8 and worth.reached([0, 8], [0.9, 0.7]) == 0


def test_verdicts():
    spread = 0.01 * np.array([[-1.], [1], [-1], [1]])  # 4 pairs: half width .0184
    for mean, verdict in ((0.03, "better"), (0.0, "as good"), (-0.005, "as good"), (-0.015, "undecided"),
                          (-0.1, "worse")):
        assert worth.judged(mean + spread).endswith(verdict), mean
    assert worth.judged(0.1 + spread[:3]).endswith("too few pairs")
    assert "won 4 of 4" in worth.judged(0.02 + spread)


# ---- over-training -----------------------------------------------------------------------------------------

def test_a_cells_result_is_that_of_its_pair_and_its_runs(study, family, monkeypatch, capsys):
    """Made once, goes on after Ctrl-C, and what is published needs no runs. Both arms, both seeds; the areas
    are those of the runs."""
    made, left = [], []

    def make_family(out, task, seed, corpus_size, epochs):
        made.append((out.name, task, seed, corpus_size, epochs))
        shutil.copytree(family, out)

    def run_quietly(base, more):
        args, run = claims.run_quietly(base, ("--steps", 8, "--mix-steps", 2, *more))
        evals = [line["eval_strict_pass@1"] for line in run.history if line["step"] in (0, 8)]
        left.append((Path(args.explorer).parent.name, args.seed, args.lr, sum(evals) / 2))
        return args, run

    def do(jobs, workers, title, work, is_done):
        for job in jobs:
            work(job)
            if len(made) == 1:
                raise KeyboardInterrupt

    here = {"make_family": make_family, "run_quietly": run_quietly, "CORPORA": (64, 128), "EPOCHS": (2,),
            "ROLLOUTS": 32, "do": do}
    for name, value in here.items():
        monkeypatch.setattr(overtrain, name, value)
    for code in (130, 0):
        with pytest.raises(SystemExit, match=f"^{code}$"):
            overtrain.main(["--pairs", "1"])
        told = capsys.readouterr().out
        assert ("no predictions yet: 1 cells of 2" in told) == bool(code)
    assert made == [("natural-40-64x2", "natural", 40, 64, 2), ("natural-40-128x2", "natural", 40, 128, 2)]
    assert [run[:3] for run in left] == [(explorer, seed, 4e-4) for pair in ("40-64x2", "40-128x2")
                                         for explorer in ("", f"natural-{pair}") for seed in (0, 1)]
    results = json.loads((worth.RUNS / "assets" / "overtrain.json").read_text())
    assert [result["corpus"] for result in results] == [64, 128] and len(results[0]["learner"]) == 10
    areas = [result[arm] for result in results for arm in ("GRPO", "S2L-PO")]
    assert sum(areas, []) == pytest.approx([run[3] for run in left])
    assert told.count(" 2/2") + told.count(" 1/2") + told.count(" 0/2") == 2 and "always no" in told
    shutil.rmtree(worth.RUNS / "overtrain")  # what is published is not made again
    with pytest.raises(SystemExit, match="^0$"):
        overtrain.main(["--pairs", "1"])
    assert capsys.readouterr().out == told and len(left) == 8
    path = overtrain.path_of((64, 2, 40))  # rounded otherwise, say: it takes the published one's place
    path.parent.mkdir()
    path.write_text(json.dumps(results[0] | {"GRPO": [0.0, 0.0]}))
    with pytest.raises(SystemExit, match="^0$"):
        overtrain.main(["--pairs", "1"])
    again = json.loads((worth.RUNS / "assets" / "overtrain.json").read_text())
    assert [result["GRPO"] for result in again] == [[0.0, 0.0], results[1]["GRPO"]]


def test_what_a_cell_is_like_by_hand():
    """Two problems: the learner knows the first and never the second; the explorer now and then does both."""
    result = {"learner": [64, 0], "explorer": [16, 32], "GRPO": [0.5, 0.6], "S2L-PO": [0.7, 0.5]}
    cell = overtrain.cell_of([result])
    at = [cell[key] for key in ("learner@1", "explorer@1", "learner@64", "explorer@64")]
    assert at == pytest.approx([0.5, 0.375, 0.5, 1])
    assert cell["crosses"] and 1 < cell["at k"] < 2
    assert cell["groups fail"] == 0.5 and cell["explorer's"] == 0.5
    assert cell["gain"] == pytest.approx(0.05) and cell["won"] == "1/2" and cell["ratio"] == math.inf
    assert cell["GRPO's headroom"] == 0 and cell["gap at 16"] > 0.4
    behind = overtrain.cell_of([result | {"explorer": [0, 0]}])
    assert not behind["crosses"] and behind["at k"] is None and behind["ratio"] == 0
    level = overtrain.cell_of([result | {"learner": [64, 0], "explorer": [32, 32]}])
    assert level["crosses"]  # level at k = 1, and ahead from there on


def test_a_predictor_is_fitted_on_one_half_of_the_cells_and_scored_on_the_other():
    assert overtrain.border([1, 2, 3, 4], [False, False, True, True]) == (2.5, 1)
    assert overtrain.border([1, 2, 3, 4], [True, False, False, False]) == (1.5, -1)
    assert overtrain.border([1, 2], [True, True])[0] == -math.inf
    assert overtrain.border([2, 3, math.inf], [False, False, True]) == (5, 1)
    cell = lambda own, gain: dict.fromkeys(overtrain.PREDICTORS, 0.0) | {"own": own, "gain": gain}
    cells = {(0, 0): cell(1, 0.1), (1, 1): cell(5, -0.1), (2, 0): cell(2, 0.1),
             (0, 1): cell(2.9, 0.1), (1, 0): cell(6, 0.1), (1, 2): cell(9, -0.1), (3, 2): cell(8, -0.1)}
    found = overtrain.predictions(cells)
    assert found["own"] == (3.5, -1, 0.75) and found["always no"][2] == 0.5
