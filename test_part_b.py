# -- copies of part a's tools
import functools
import inspect
import itertools
import json
import math
import random
import re
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

import anneal
import eval as evaluation
import grpo
import model as models
import reward
import sample as sampling
import train as training
from recipes import family as families
from test_part_a import ROOT, family, flags, read_metrics, seeded, train_here, weights
# -- end of copies


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


# ==== 5. A run: reward.py's tasks and files, eval.py, train.py ==============================================
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


@pytest.mark.parametrize("task", reward.TASKS)
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
    (b'{"question": 1, "answer": "2"}', "must be text"), (b'{"question": "q", "answer": true}', "a number"),
    (b'{"question": "q", "answer": "1", "task": "chess"}', "no question of a task 'chess'"),
    (b'{"question": "3+=", "answer": "1", "task": "natural"}', "no question of a task 'natural'"),
    (b'{"question": "q", "answer": "so #### "}', "the answer is empty"), (b"[" * 100_000, ""),
    (b'{"question": "caf\xe9", "answer": "1"}', "can't decode byte 0xe9")])
def test_a_broken_line_is_named(line, complaint, tmp_path):
    """Skipped, or read as something else, it is a problem that no response can solve."""
    path, good = tmp_path / "data.jsonl", b'{"question": "q", "answer": "a #### 1,200"}'
    path.write_bytes(good + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=f"data.jsonl, line 2: .*{complaint}.{{,200}}$") as refused:
        reward.load_problems(path)
    assert "\n" not in str(refused.value)
    path.write_bytes(b'\xef\xbb\xbf%s\r\n\n%s\n{"question": "\xc3\xa9", "answer": 70}' % (good, good))
    assert reward.load_problems(path) == [reward.Problem("q", "1,200"), reward.Problem("é", "70")]


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


def test_sample_cli_prints_no_terminal_escapes(family, monkeypatch, capsys):
    """A model's text is data: printed raw, it could clear the screen."""
    argv = ["sample.py", "--model", str(family / "learner"), "--prompt", "3+4=", "--n", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sampling, "decode", lambda rollouts, tokenizer: [["\x1b[2J7"] * 2])
    sampling.main()
    out = capsys.readouterr().out
    assert out.count("log-prob") == 2 and "\x1b" not in out and r"\x1b[2J7" in out


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
        metrics = grpo.update(*inputs, **settings)
        if len(read_metrics(out)) == 4:
            raise KeyboardInterrupt  # which nothing below train.main catches
        return metrics
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


@pytest.mark.parametrize("damage", ["cut short", "one bit"])
def test_a_damaged_checkpoint_is_passed_over(damage, family, tmp_path, capsys, resumes):
    """torch.load looks at no checksum: after one flipped bit, training goes on from what nobody learnt."""
    out, more = tmp_path / "run", ("--save-every", 1, "--eval-data", "")
    run, _ = train_here(family, out, *more)
    before, newest = sorted(out.glob("checkpoint_*.pt"))  # two are kept
    data = bytearray(newest.read_bytes())
    data[data.index(run.optimizer.masters[0].detach().numpy().tobytes()) + 50] ^= 1  # within a weight
    newest.write_bytes(data if damage == "one bit" else data[:-100])
    (out / "checkpoint_000009.pt.partial").write_bytes(b"torn")
    resumes(out, *more)
    said = capsys.readouterr()
    assert "checkpoint_000004.pt is damaged" in said.err and "after step 3" in said.out
    [path.write_bytes(b"") for path in (before, newest)]
    code, _, error = main_here(capsys, flags(family, out, "--resume", *more))
    assert code == 2 and error.splitlines()[-1].startswith("train.py: error: no checkpoint in")


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
    resumes(out, *more)


def test_one_experiment_an_out(family, tmp_path, capsys):
    """Half a run at one rate and half at another, or on other weights, is a curve of no experiment."""
    shutil.copytree(family / "learner", tmp_path / "learner")
    (tmp_path / "notes" / "of a year").mkdir(parents=True)
    more = ("--learner", tmp_path / "learner", "--steps", 2, "--lr", 1e-3, "--eval-data", "")
    contents = lambda: {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    def refused(out, complaint, *extra):
        before = contents()
        code, _, error = main_here(capsys, flags(family, tmp_path / out, *more, *extra))
        assert code == 2 and complaint in error and error.count("\n") == 1 and contents() == before, error
    train_here(family, tmp_path / "run", *more)
    for out in ("run", "notes", "learner"):
        refused(out, f"{out} is there already")
    refused("notes", "notes is there already", "--resume")
    refused("learner", "other settings", "--resume")
    refused("run", "other settings: lr 0.001 -> 0.0001, seed 0 -> 3\n", "--resume", "--lr", 1e-4, "--seed", 3)
    train_here(family, tmp_path / "run", "--resume", *more, "--micro-batch-tokens", 64)  # no part of it
    shutil.copytree(tmp_path / "run" / "learner", tmp_path / "learner", dirs_exist_ok=True)
    refused("run", "other settings: weights", "--resume")


@pytest.mark.parametrize("change, complaint", [
    ("--learner no/such", "no/such"), ("--explorer no/such", "no/such"), ("--data broken", "broken, line 2"),
    ("--eval-data long", "context of 128"), ("--max-new-tokens 125", "context of"), ("--mix-steps 5", "mix"),
    ("--explorer other", "differ in 2 tokens"), ("--group-size 1", "group"), ("--minibatches 9", "minibatch"),
    ("--device nonsense", "nonsense"), ("--learner {laptop}", "gone.jsonl")])
def test_bad_input_is_one_line_exit_code_2_and_nothing_made(
        change, complaint, family, tmp_path, capsys, monkeypatch):
    """Trap 27 among them: another tokeniser's ids are other words, and the learner would train on noise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(families, "make_family", lambda *args, **more: pytest.fail("minutes for a slip"))
    Path("broken").write_text((family / "train.jsonl").read_text()[:60] + "\n")
    reward.save_problems([reward.Problem("1+1" * 100, "2")], "long")
    tokens = Path(shutil.copytree(family / "explorer", "other"), "tokenizer.json")
    tokens.write_text(tokens.read_text().replace('"b"', '"B2"'))
    argv, before = flags(family, "run", *change.split()), {*tmp_path.iterdir()}
    code, _, error = main_here(capsys, ["--data", "gone.jsonl"] if "{laptop}" in change else argv)
    assert code == 2 and error.startswith("train.py: error:") and complaint in error
    assert error.count("\n") == 1 and {*tmp_path.iterdir()} == before


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


def test_the_readme_names_what_exists():
    """A reader's first command must not fail."""
    text, flag = (ROOT / "README.md").read_text(), r"(?<![\w-])--[a-z][a-z0-9-]*"
    sources = [p for p in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if not p.name.startswith("test_")]
    known = lambda paths: {"--help"}.union(*(re.findall(r'add\w*\("(--[^"]+)"', p.read_text()) for p in paths))
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (ROOT / link).exists(), link
    assert {*re.findall(flag, text)} <= known(sources)
    for script, words in re.findall(r"python ((?:\w+/)*\w+\.py)((?:\\\n|[^\n`#|&])*)", text):
        also = "train.py" if "/" in script else script  # recipes hand train.py's flags on
        assert {*re.findall(flag, words)} <= known([ROOT / script, ROOT / also]), f"{script} {words}"
