"""Checks of length.py: what it measures, by hand, and its stages from models to report, very small."""
import gzip
import json
import random
import re
from types import SimpleNamespace

import pytest
import torch

from grpo import Objective
from plumbing import family as families
from plumbing.tasks import HABIT_OPERATOR, habit_problem, habit_solution, habit_table
from recipes import length
from reward import Problem, score


def test_a_long_solution_is_one_step_a_digit_and_checked_to_its_end():
    """A check that looked at five steps alone would pay for a wrong tenth."""
    question, answer = habit_problem(random.Random(0), steps=10)
    right = habit_solution(question, HABIT_OPERATOR[question[0]])
    assert len(question) == 3 + 11 + 1 and len(right) == 30 and right[-1] == answer
    problem = Problem(question, answer, "habit")
    assert score(problem, right).strict
    for place in (13, 28):  # a digit that was misread: the running value and the answer stay
        wrong = right[:place] + str((int(right[place]) + 1) % 10) + right[place + 1:]
        assert score(problem, wrong) == (0, False, True)


def test_coherence_by_hand():
    question, habit = "Aab1234=", {"Aab": "-"}  # three steps
    plus, minus = habit_solution(question, "+"), habit_solution(question, "-")
    assert (plus, minus) == ("+23+36+40", "-29-36-42")
    mixed = plus[:6] + minus[6:]
    found = length.coherence([(question, text) for text in (plus, minus, minus, mixed)], 3, habit)
    assert (found["executed"], found["habit"], found["changed"]) == (0.75, 0.5, 0.25)
    assert found["first error"] == [0, 0, 0.25, 0.75]
    assert found["method entropy"] == pytest.approx(0.6931, abs=1e-4)  # + and - as often
    # first and last: ++ 1/4, +- 1/4, -- 1/2; entropies ln 2, .5623, 1.0397
    assert found["mutual information"] == pytest.approx(0.6931 + 0.5623 - 1.0397, abs=1e-3)
    none = length.coherence([(question, "")], 3, habit)
    assert none["executed"] == none["changed"] == none["mutual information"] == 0


def test_a_temperature_of_the_first_token_leaves_the_others():
    logits = torch.tensor([[0.0, -1.0, -2.0]] * 2)
    left = length.hot_at_first(2.0, logits, None, torch.tensor([0, 3]))
    assert left.tolist() == [[0, -0.5, -1], [0, -1, -2]]


def test_the_habits_are_those_of_the_corpus():
    """Else `habit` would be measured against a table that nobody was trained on."""
    corpus = families.make_corpus("habit", 200, 7, noise=0.0, steps=4)
    table = habit_table(random.Random("habit corpus 7"))
    assert all(solution == habit_solution(question, table[question[:3]]) for question, solution in corpus)
    assert {len(solution) for _, solution in corpus} == {12}


def test_min_p_takes_what_is_rarer_than_a_share_of_the_likeliest():
    logits = torch.tensor([[0.0, -1.0, -2.0, -6.0]])
    for temperature, kept in ((1.0, 2), (2.0, 3)):  # e^-1 and e^-2 of the likeliest; at 2 their roots
        left = length.without_rare(0.2, temperature, logits)
        assert (left > -torch.inf).sum() == kept
        p = (logits / temperature).softmax(-1)
        assert ((p >= 0.2 * p.max()) == (left > -torch.inf)).all()


def test_only_groups_that_the_explorer_alone_solved_are_withheld():
    """A group that the learner solves, here or beside, must teach what it always does."""
    rewards = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 0]])  # [P, G]
    from_explorer = torch.tensor([[True, False]] * 4)
    alone = torch.tensor([False, True, False, False])
    whole = length.advantages_of(rewards, from_explorer, Objective())
    kept = length.withheld_advantages(alone, rewards, from_explorer, Objective())
    assert (whole[:3] != 0).all() and (kept[0] == 0).all() and torch.equal(kept[1:], whole[1:])


def test_on_failing_groups_the_learner_has_only_its_other_rollouts():
    """The rollouts of a failed group, drawn as if they were new, make the learner look worse than it is."""
    learner, other = [0, 1], [32, 0]  # right ones of 32: groups of 16 fail always, and in half of the draws
    assert length.solved_there(learner, other) == pytest.approx(1 / 1.5)
    assert length.solved_there(learner, learner) == pytest.approx(0.5 / 1.5)


def test_a_run_that_ends_far_below_its_best_has_collapsed():
    run = {"step": [0, 8, 16], "strict@1": [0.4, 0.9, 0.1], "withheld": [2, 1]} | {
        cost: [0, 1, 2] for cost in ("flops", "flops of all", "seconds")}
    found = length.endpoints(run, run)
    assert (found["collapsed"], found["at 8"], found["end"], found["withheld"]) == (1, 0.9, 0.1, 3)
    assert length.endpoints(run | {"strict@1": [0.4, 0.9, 0.75]}, run)["collapsed"] == 0


def test_each_arm_has_the_better_of_two_rates():
    low, high = ({"area": torch.tensor(x), "at 8": torch.tensor([place])}
                 for x, place in (([0.2, 0.4], 9.0), ([0.3, 0.5], 1.0)))
    found = length.better({"GRPO": low, "S2L-PO": high, "abrupt switch": high}, {"GRPO": high, "S2L-PO": low})
    assert found == {"GRPO": high, "S2L-PO": high}  # whole, also where its other endpoints are lower


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The stages with models that have hardly learnt anything, in this process."""
    monkeypatch.chdir(tmp_path)
    once = lambda jobs, workers, title, work, is_done: [work(job) for job in jobs if not is_done(job)]
    for name, value in {
            "RUNS": tmp_path / "runs", "ASSETS": tmp_path / "assets" / "results.json.gz", "do": once,
            "SEARCH": (range(50, 52), 2), "CONFIRM": (range(60, 62), 1), "SEEDS": 1,
            "PROBLEMS": 4, "ROLLOUTS": 16,
            "CANDIDATES": {5: [((8, 1), (8, 1), 640, 1, 64)]},
            "GRID": {5: {m: (4e-4,) for m in (1, 2, 4)}}, "HEATS": (1.6,),
            "SHAPES": {"": ("--steps 8 --mix-steps 4 --prompts-per-step 4 --eval-every 4 --eval-n 2", 2),
                       "worth": ("--steps 8 --mix-steps 2 --prompts-per-step 4 --eval-n 2", 1)},
            "ARMS": {arm: length.ARMS[arm] for arm in (
                "GRPO", "GRPO, hot", "GRPO, min-p", "RAFT warm start", "S2L-PO")},
            "fits": lambda found: {"executes": True}}.items():
        monkeypatch.setattr(length, name, value)
    return SimpleNamespace(steps=[5], workers=1)


def test_the_stages_lead_to_a_report_that_needs_the_published_file_alone(small, monkeypatch, capsys):
    """What is published must be all that the verdicts rest on, and an interrupted study goes on."""
    length.search(small)
    assert "no models for 5 steps that fit" in capsys.readouterr().out
    length.models(small)
    length.base(small)
    with pytest.raises(ValueError, match="GRPO has not been searched"):
        length.confirm(small)
    length.search(small)
    length.confirm(small)
    said = capsys.readouterr().out
    jobs = [result["job"] for result in json.loads(gzip.decompress(length.ASSETS.read_bytes()))]
    of = lambda kind: [job for job in jobs if job[0] == kind]
    assert len(of("pair")) == 2 + 1 and len(of("base")) == len(length.SOURCES)
    best = {item for among in ("", length.FEW, length.MANY)
            for item in length.best_of(length.published(), 5, among).items()}
    half = length.halved(length.published(), 5)
    assert len(of("run")) == 2 * 5 * 3 + len(best | {*half.items()}) + 3 * 2  # as worth.md
    runs = {job: result for job, result in length.published().items() if job[0] == "run"}
    counts = {job[4]: len(result["withheld"]) for job, result in runs.items()}
    assert counts.pop("S2L-PO, withheld") == 8 and {*counts.values()} == {0}  # a number a step
    assert {arm for arm, _ in best} == {*length.ARMS, *length.ABLATIONS}
    assert half["GRPO"] == "--lr 0.0002 --minibatches 4"
    monkeypatch.setattr(length, "RUNS", length.RUNS / "elsewhere")
    monkeypatch.setattr(length, "work", None)  # nothing is made again
    length.confirm(small)
    length.report(small)
    again = capsys.readouterr().out
    assert re.search(r"better of both rates, area: S2L-PO - GRPO, hot: [-+]", again)  # and not: "missing"
    assert said.split("\n5 steps, pairs")[-1][-400:] in again


def test_supervised_steps_pay_for_no_pi_old(small, monkeypatch):
    """Charged for it, the warm start seemed behind by FLOPs where it is level."""
    seen = set()
    monkeypatch.setattr(length, "flops", lambda line, size, passes: seen.add((line["share"], passes)) or 0)
    length.trained(5, 0, 50, length.RAFT, "--lr 0.0004 --minibatches 4", 0)
    assert seen == {(1, 6), (0, 8)}
