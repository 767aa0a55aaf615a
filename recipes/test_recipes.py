"""Checks of the recipes, file by file.

    pytest recipes/test_recipes.py
"""
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model as models
import reward
import sample as sampling
import train as training
from recipes import data, explorers, internlm2, overnight, pool, retokenize
from recipes import rescue as rescuing
from recipes import separate as separating
from test_part_a import ROOT, family, flags, hf_pair, read_metrics, seeded, tiny_model, weights  # noqa: F401


@pytest.fixture(autouse=True)
def handlers():
    """Puts back what runs do to signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run_here(family, out, *more, loop=training.train, open_explorer=training.open_explorer):
    """train.main's path with a recipe's loop or explorer: (run, the metrics of its steps)."""
    args = training.parse_flags(flags(family, out, "--eval-every", 0, *more))
    run, explore = training.load_run(args, open_explorer)
    loop(args, run, explore)
    training.finish(args, run)
    return run, read_metrics(out)


def spied(monkeypatch, module, name):
    """[(arguments, result)] of all calls of module.name to come, with the weights of the learner not copied."""
    calls, real = [], getattr(module, name)

    def spy(*args, **more):
        result = real(*args, **more)
        calls.append((args, result))
        return result

    monkeypatch.setattr(module, name, spy)
    return calls


def same_weights(*outs):
    first, *others = (weights(out) for out in outs)
    return all(torch.equal(first[name], other[name]) for other in others for name in first)


def record(ids_of_prompt, ids, logps, **more):
    return json.dumps(more | {"prompt_ids": ids_of_prompt, "response_ids": ids, "small_model_log_probs": logps}) + "\n"


# ---- pool.py -----------------------------------------------------------------------------------------------

def test_training_from_a_pool_equals_live_sampling_of_the_same_rollouts(family, tmp_path, capsys):
    lines = []

    def open_explorer(args, run):
        explore = training.open_explorer(args, run)

        def spy(prompts, n, generator):
            r = explore(prompts, n, generator)
            for prompt, *group in zip(prompts, r.ids, r.logps, r.lengths):
                lines.extend(record(prompt, ids[:n].tolist(), logps[:n].tolist()) for ids, logps, n in zip(*group))
            return r
        return spy

    more = ("--mix-steps", 4, "--off-policy", "behaviour", "--lr", 1e-2)
    _, live = run_here(family, tmp_path / "live", *more, open_explorer=open_explorer)
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(lines) + '{"prompt_ids": [5, 3')  # and a torn last line
    _, from_pool = run_here(family, tmp_path / "run", *more, "--explorer", path)
    assert from_pool == live and same_weights(tmp_path / "live", tmp_path / "run")
    assert [line["rollouts_explorer"] for line in live] == [16, 12, 8, 0]
    assert "has no settings beside it" in capsys.readouterr().out
    path.write_text("".join(lines[:-3]))  # three of step 3's rollouts, two prompts
    with pytest.raises(ValueError, match=r"lacks 3 rollouts of 2 prompts, .* --model EXPLORER .* --n 4 --out NEW"):
        run_here(family, tmp_path / "short", *more, "--explorer", path)
    path.write_text("".join(lines[1:]) + lines[0])
    with pytest.raises(ValueError, match="began with other settings: weights"):  # another pool draws other rollouts
        run_here(family, tmp_path / "run", *more, "--explorer", path, "--resume")


@pytest.fixture
def learner():
    model = tiny_model()
    model.stop_ids = (0, 2)
    return model


def test_a_draw_takes_different_rollouts_at_random_and_cuts_them(learner, tmp_path):
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(record(prompt, [3 + i, *[5] * i, 0], [-1.0] * (i + 2), prompt='"prompt_ids": [9, 9]')
                            for i in range(8) for prompt in ([1, 2], [12])))
    places, _ = pool.index(path)
    draw = lambda seed, n=5, most=6: pool.draw(path, places, learner, most, [[1, 2], [12]], n, seeded(seed))
    r = draw(0)
    assert not r.from_explorer.any() and r.ids.shape == (2, 5, 6)
    first = r.ids[:, :, 0].tolist()
    assert all(group == sorted(set(group)) for group in first) and first != draw(1).ids[:, :, 0].tolist()
    assert draw(0).ids[:, :, 0].tolist() == first and first[0] != first[1]
    everything = draw(0, 8)
    assert everything.ids[0, :, 0].tolist() == [3 + i for i in range(8)]
    assert everything.lengths[0].tolist() == [2, 3, 4, 5, 6, 6, 6, 6]
    assert everything.finished[0].tolist() == [True] * 5 + [False] * 3  # cut before its stop token: not finished
    assert everything.logps.sum().item() == -everything.lengths.sum().item()
    with pytest.raises(ValueError, match="has 8 rollouts of a prompt, and 9"):
        draw(0, 9)


@pytest.mark.parametrize("line", [b"{}", b"[]", b"5", b'{"prompt_ids": [1], "a": {"prompt_ids": [1]}}',
                                  b'{"prompt_ids": [1.5]}', b'{"prompt_ids": 7}', b'{"prompt_ids": [1], "response'])
def test_a_line_that_is_no_rollout_is_named_when_a_pool_is_opened(line, tmp_path):
    (tmp_path / "pool.jsonl").write_bytes(record([5], [1], [-1.0]).encode() + line + b"\n")
    with pytest.raises(ValueError, match="pool.jsonl, line 2: not one rollout"):
        pool.index(tmp_path / "pool.jsonl")


@pytest.mark.parametrize("change, complaint", [
    ({"response_ids": [1, 2, 3]}, "after a stop token"), ({"response_ids": [1, 20, 3]}, "tokens that the learner has not"),
    ({"response_ids": [1, True, 3]}, "has not"), ({"response_ids": [1, 3]}, "for each a log-prob"),
    ({"response_ids": [], "small_model_log_probs": []}, "needs tokens"), ({"response_ids": 5}, "not iterable"),
    ({"small_model_log_probs": [-1.0, math.nan, 0]}, "NaN"), ({"small_model_log_probs": [-1.0, "x", 0]}, "log-prob"),
    ({"small_model_log_probs": [-1.0, 5.0, 0]}, "above 0"), ({"prompt_ids": [6]}, "another prompt")])
def test_a_broken_record_is_named_when_it_is_drawn(change, complaint, learner, tmp_path):
    good = {"prompt_ids": [5], "response_ids": [1, 4, 2], "small_model_log_probs": [-1.0, -math.inf, 0.0]}
    path, lines = tmp_path / "pool.jsonl", [json.dumps(good | x) + "\n" for x in ({}, change)]
    path.write_text("".join(lines))
    draw = lambda places: pool.draw(path, {b"5": places}, learner, 9, [[5]], len(places), seeded())
    assert draw([0]).logps.tolist() == [[[-1.0, -1e4, 0.0]]] and draw([0]).finished.all()
    with pytest.raises(OSError, match=f"pool.jsonl, byte {len(lines[0])}: no rollout to use: .*{complaint}"):
        draw([0, len(lines[0])])


def write_pool(capsys, family, problems, out, *more):
    """recipes/pool.py in this process: (exit code, stderr)."""
    try:
        pool.main([str(x) for x in ("--model", family / "explorer", "--data", problems, "--n", 3, "--max-new-tokens", 4,
                                    "--device", "cpu", "--out", out, *more)])
    except SystemExit as stopped:
        return stopped.code, capsys.readouterr().err
    return 0, ""


def test_a_pool_is_the_same_whether_or_not_its_writer_was_killed(family, tmp_path, capsys):
    problems = [reward.Problem(f"{a}+{b}=", str((a + b) % 10), "natural") for a in range(10) for b in range(4)]
    reward.save_problems(problems, tmp_path / "problems.jsonl")  # 40: two whole batches and a short one
    out, write = tmp_path / "pool.jsonl", lambda *more: write_pool(capsys, family, tmp_path / "problems.jsonl", *more)
    assert write(out)[0] == 0
    whole, place = out.read_bytes(), random.Random(0)
    records = [json.loads(line) for line in whole.splitlines()]
    assert [x["prompt_id"] for x in records] == [i for i in range(40) for _ in range(3)]
    assert records[0].keys() == {"prompt_id", "prompt", "prompt_ids", "response", "response_ids", "reward", "is_correct",
                                 "small_model_log_probs", "data_source", "ground_truth"}
    right = [reward.score(problems[x["prompt_id"]], x["response"]).strict for x in records]
    assert [x["is_correct"] for x in records] == right and any(right) and not all(right)
    batch = len(b"".join(whole.splitlines(keepends=True)[:16 * 3]))
    for length in (0, 5, batch, batch + 5, len(whole) - 1, len(whole), *place.sample(range(len(whole)), 2)):
        out.write_bytes(whole[:length])
        assert write(out)[0] == 0 and out.read_bytes() == whole, length
    settings = json.loads((tmp_path / "pool.jsonl.settings.json").read_text())
    assert settings["stop_ids"] == [0] and settings["weights"] == models.fingerprint(models.load(family / "explorer")[0])
    assert write(tmp_path / "few", "--rollout-rows", 6)[0] == 0 and (tmp_path / "few").read_bytes() == whole
    code, error = write(out, "--temperature", 0.5)
    assert code == 2 and "was written with other settings" in error and out.read_bytes() == whole
    shards = [tmp_path / f"{shard}.jsonl" for shard in (1, 2, 3)]
    assert [write(path, "--shard", f"{path.stem}/3")[0] for path in shards] == [0, 0, 0]
    parts = [json.loads(line)["prompt_id"] for path in shards for line in path.read_text().splitlines()]
    assert sorted(parts) == [x["prompt_id"] for x in records] and write(tmp_path / "x", "--shard", "4/3")[0] == 2
    # A run takes the pool's stop tokens beside its own, and parses no record before it is drawn.
    (tmp_path / "pool.jsonl.settings.json").write_text(json.dumps(settings | {"stop_ids": [0, 7]}))
    args = training.parse_flags(flags(family, tmp_path / "run", "--explorer", out, "--data", tmp_path / "problems.jsonl",
                                      "--group-size", 3))
    with pytest.MonkeyPatch.context() as patch:
        parsed = spied(patch, pool, "read")
        run, _ = training.load_run(args, training.open_explorer)
    assert run.learner.stop_ids == (0, 7) and len(parsed) == 1


# ---- retokenize.py -----------------------------------------------------------------------------------------

def other_tokenizer(directory):
    """A byte-level BPE of many-character tokens, in which a family's characters have other ids."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast
    bpe, alphabet = Tokenizer(kinds.BPE()), pre_tokenizers.ByteLevel.alphabet()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator([f"{a}+{b}={a + b}" for a in range(40) for b in range(40)], trainers.BpeTrainer(
        vocab_size=350, special_tokens=["<pad>", "<end>"], initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


def test_retokenized_rollouts_keep_text_end_and_log_prob(family):
    explorer, theirs = models.load(family / "explorer")
    ours = other_tokenizer(family)
    prompts = [theirs(text).input_ids for text in ("3+4=", "9+0=")]
    r = sampling.sample(explorer, prompts, 20, seeded(), 3, 1.5)
    new = retokenize.retokenize(r, theirs, ours, 1, 3)
    assert 0 < r.finished.float().mean() < 1 and not torch.equal(new.ids, r.ids)
    assert sampling.decode(new, ours) == sampling.decode(r, theirs) and torch.equal(new.finished, r.finished)
    assert torch.allclose(new.logps.sum(-1), r.logps.sum(-1), atol=1e-5) and not new.logps[~new.mask].any()
    last = new.ids.gather(2, new.lengths[..., None] - 1)[..., 0]
    assert torch.equal(last == 1, new.finished)
    cut = retokenize.retokenize(r, theirs, ours, 1, 1)
    assert torch.allclose(cut.logps, new.logps[:, :, :1])  # a part of the text has a part of its log-prob
    assert cut.lengths.max() == 1 and torch.equal(cut.finished, r.finished & (new.lengths == 1))
    # A special token that a model spells out is text.
    spelled = SimpleNamespace(decode=lambda ids, skip_special_tokens: "1+1=<end>2")
    one = torch.ones(1, 1, dtype=torch.long)
    new = retokenize.retokenize(sampling.Rollouts(one[..., None], one, torch.zeros(1, 1, 1), one == 1, one == 0),
                                spelled, ours, 1, 50)
    assert new.ids[0, 0, :-1].ne(1).all() and ours.decode(new.ids[0, 0, :-1]) == "1+1=<end>2"


def test_a_learner_learns_from_an_explorer_with_another_tokenizer(family, tmp_path):
    models.save(tiny_model(vocab_size=400, scale=0.1), other_tokenizer(tmp_path), tmp_path / "learner")
    more = ("--learner", tmp_path / "learner", "--schedule", "constant", "--explorer-share", 1, "--lr", 1e-2, "--steps", 60,
            "--group-size", 16, "--eval-data", family / "train.jsonl", "--eval-problems", 20, "--off-policy", "positive")
    with pytest.raises(ValueError, match="tokenisers of learner and explorer differ .* recipes/retokenize.py"):
        run_here(family, tmp_path / "run", *more)
    for choice in ("behaviour", "truncated"):
        with pytest.raises(ValueError, match="log-prob of each token"):
            run_here(family, tmp_path / "run", *more, "--off-policy", choice, open_explorer=retokenize.open_explorer)
    _, lines = run_here(family, tmp_path / "run", *more, open_explorer=retokenize.open_explorer)
    assert lines[-1]["eval_strict_pass@1"] > 0.1  # from nothing but texts of the explorer


# ---- explorers.py ------------------------------------------------------------------------------------------

def test_a_fleet_shares_the_explorers_rollouts(family, tmp_path, monkeypatch):
    asked = []
    name = lambda i: lambda prompts, n, generator: asked.append((i, n)) or sampling.sample(
        tiny_model(seed=i), prompts, n, generator, 4)
    fleet, prompts = explorers.fleet([name(i) for i in range(3)]), [[1, 2], [3]]
    for n in (4, 3, 2, 1):
        assert fleet(prompts, n, seeded()).ids.shape == (2, n, 4)
    assert asked == [(0, 1), (1, 1), (2, 2), (0, 1), (1, 1), (2, 1), (1, 1), (2, 1), (2, 1)]
    random = seeded()
    alone = [sampling.sample(tiny_model(seed=i), prompts, n, random, 4).ids for i, n in enumerate((1, 1, 2))]
    assert torch.equal(fleet(prompts, 4, seeded()).ids, torch.cat(alone, dim=1))  # one stream: nobody draws the same
    for i, end in enumerate((3, 4)):  # a member each that stops at a token of its own
        model, tokenizer = models.load(family / "explorer")
        model.stop_ids = (0, end)
        models.save(model, tokenizer, tmp_path / str(i))
    monkeypatch.setattr(training, "main", lambda argv, open_explorer: run_here(
        family, tmp_path / "run", *argv, "--mix-steps", 4, open_explorer=open_explorer))
    calls = spied(monkeypatch, training, "sample")
    explorers.main(["fleet", "--also", str(tmp_path / "0"), "--also", str(tmp_path / "1"), "--group-size", "6"])
    writers = {id(args[0]): args[0] for args, _ in calls}
    assert len(writers) == 4 and {model.stop_ids for model in writers.values()} == {(0, 3, 4)}
    assert len(json.loads((tmp_path / "run" / "config.json").read_text())["weights"]["explorer"]) == 3
    assert [line["rollouts_explorer"] for line in read_metrics(tmp_path / "run")] == [24, 16, 8, 0]


def test_a_hot_copy_stays_what_the_learner_was(family, tmp_path, monkeypatch):
    calls = spied(monkeypatch, training, "sample")
    monkeypatch.setattr(training, "main", lambda argv, open_explorer: run_here(
        family, tmp_path / "run", "--schedule", "step", "--lr", 1e-2, *argv, open_explorer=open_explorer))
    explorers.main(["hot-copy", "--explorer-temperature", "1.6"])
    copy, learner = calls[0][0][0], calls[-1][0][0]
    initial = models.load(family / "learner")[0].state_dict()
    assert all(torch.equal(x, initial[name]) for name, x in copy.state_dict().items()) and copy is not learner
    assert not torch.equal(learner.norm.weight, initial["norm.weight"])


def test_thinned_groups_have_one_method_as_often_as_before(family):
    explorer, tokenizer = models.load(family / "explorer")
    prompts = [tokenizer(f"{a}+{b}=").input_ids for a in range(10) for b in range(2)] * 8
    write = lambda prompts, n, generator: sampling.sample(explorer, prompts, n, generator, 4)
    plain, thin = write(prompts, 8, seeded()), explorers.thinned(write)(prompts, 8, seeded())
    methods = lambda r: sum(len(set(group.tolist())) for group in r.ids[:, :, 0]) / len(r.ids)
    assert methods(plain) > 3 and methods(thin) == 1 and thin.ids.shape[:2] == plain.ids.shape[:2]
    share = lambda r: torch.bincount(r.ids[:, :, 0].flatten(), minlength=40) / r.ids[:, :, 0].numel()
    assert (share(plain) - share(thin)).abs().max() < 0.1


# ---- rescue.py and separate.py -----------------------------------------------------------------------------

@pytest.mark.parametrize("loop", [rescuing.rescue, separating.separate])
def test_loops_at_share_0_are_plain_grpo_to_the_bit_and_resume_as_it_does(loop, family, tmp_path):
    _, plain = run_here(family, tmp_path / "plain", "--explorer", "none")
    for name, more in (("zero", ("--schedule", "constant", "--explorer-share", 0)), ("none", ("--explorer", "none"))):
        _, lines = run_here(family, tmp_path / name, *more, loop=loop)
        assert lines == plain and same_weights(tmp_path / "plain", tmp_path / name)
    half = ("--schedule", "constant", "--save-every", 2)
    _, unbroken = run_here(family, tmp_path / "half", *half, loop=loop)
    whole = weights(tmp_path / "half")
    (tmp_path / "half" / "checkpoint_000004.pt").unlink()
    assert run_here(family, tmp_path / "half", *half, "--resume", loop=loop)[1] == unbroken != plain
    assert all(torch.equal(x, whole[name]) for name, x in weights(tmp_path / "half").items())


def test_rescue_puts_the_explorer_only_where_the_learner_failed(family, tmp_path, monkeypatch):
    calls, steps, real, update = [], [], rescuing.sample, rescuing.update

    def noted(who, write):
        def call(prompts, n, generator):
            calls.append((who, prompts, n, write(prompts, n, generator)))
            return calls[-1][-1]
        return call

    monkeypatch.setattr(rescuing, "sample", lambda model, prompts, n, generator, **more: noted(
        "learner", lambda *asked: real(model, *asked, **more))(prompts, n, generator))
    monkeypatch.setattr(rescuing, "update", lambda *args, **more: steps.append(
        (*args[3:5], [calls.pop(0) for _ in calls[:]])) or update(*args, **more))
    run, lines = run_here(family, tmp_path / "run", "--schedule", "constant", "--prompts-per-step", 8,
                          loop=rescuing.rescue,
                          open_explorer=lambda *given: noted("explorer", training.open_explorer(*given)))
    problems, mixed, fresh = dict(zip(map(tuple, run.prompts), run.problems)), False, False
    for (prompts, r, ((who, asked, n, first), *rest)), line in zip(steps, lines, strict=True):
        assert (who, asked, n) == ("learner", prompts, 2) and torch.equal(r.ids[:, :2], first.ids)
        failed = torch.tensor([not any(reward.score(problems[tuple(prompt)], text).strict for text in group[:2])
                               for prompt, group in zip(prompts, sampling.decode(r, run.tokenizer))])
        assert torch.equal(r.from_explorer, failed[:, None] & torch.tensor([False, False, True, True]))
        assert len(rest) == len(set(failed.tolist()))
        for who, asked, n, written in rest:  # each group's second half is what its own prompt was answered with
            there = failed == (who == "explorer")
            assert n == 2 and asked == [prompt for prompt, wanted in zip(prompts, there) if wanted]
            assert torch.equal(r.ids[there, 2:], written.ids) and torch.equal(r.lengths[there, 2:], written.lengths)
            fresh |= who == "learner" and not torch.equal(first.ids[there], written.ids)
        mixed |= len(rest) == 2
        assert line["share"] == line["rollouts_explorer"] / 32 == failed.sum() / 16
    assert mixed and fresh


def test_separate_updates_each_source_by_itself(family, tmp_path, monkeypatch):
    updates, real = [], separating.update

    def spy(learner, *args, **more):
        rollouts, advantages = args[3:5]
        updates.append((rollouts.from_explorer, advantages, learner.norm.weight.clone()))
        return real(learner, *args, **more) | {"skipped_updates": 1, "loss": float(len(updates))}

    monkeypatch.setattr(separating, "update", spy)
    _, lines = run_here(family, tmp_path / "run", "--mix-steps", 4, "--lr", 1e-2, loop=separating.separate)
    # Explorer's rollouts of a group of 4: 4, 3, 2, 0; a group of one (step 2's learner) has nothing to be compared with.
    assert [(A.shape[1], bool(who.all()), bool(who.any())) for who, A, _ in updates] == [
        (4, True, True), (3, True, True), (2, True, True), (2, False, False), (4, False, False)]
    assert not torch.equal(updates[2][2], updates[3][2])  # the learner has moved before its own rollouts are used
    assert all(A.sum(1).abs().max() < 1e-5 for _, A, _ in updates)  # compared within their source
    assert [(line["rollouts_explorer"], line["rollouts_learner"]) for line in lines] == [(16, 0), (12, 0), (8, 8), (0, 16)]
    assert [(line["loss"], line["skipped_updates"]) for line in lines] == [(1, 1), (2, 1), (3.5, 2), (5, 1)]
    assert lines[2]["ratio_explorer"] is not None and lines[2]["ratio_learner"] is not None


# ---- data.py -----------------------------------------------------------------------------------------------

def convert(capsys, source, out):
    """(exit code, [(question, answer, task)], what was printed)."""
    code = 0
    try:
        data.main([str(source), "--out", str(out)])
    except SystemExit as stopped:
        code = stopped.code
    written = [tuple(json.loads(line).values()) for line in out.read_text().splitlines()] if out.exists() else []
    return code, written, "".join(capsys.readouterr())


@pytest.mark.parametrize("record, problem", [
    ({"question": "q", "answer": 7}, ("q", "7", "math")), ({"problem": "q", "answer": "7"}, ("q", "7", "math")),
    ({"question": "q", "answer": "3 + 4 = 7\n#### 7"}, ("q", "7", "math")),
    ({"problem": "q", "solution": r"so \boxed{\frac{1}{2}}."}, ("q", r"\frac{1}{2}", "math")),
    ({"question": "q", "answer": None, "final_answer": ["$2$"]}, ("q", "$2$", "math")),
    ({"question": "3+4=", "answer": "7", "task": "natural"}, ("3+4=", "7", "natural")),
    ({"question": "q", "choices": {"label": ["A", "B"], "text": ["bank", "mall"]}, "answerKey": "B"},
     ("q\nA. bank\nB. mall", "B", "choice")),
    ({"prompt": "q", "completion": r"it is \boxed{5}"}, ("q", "5", "math")),
    ({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "#### 5"}]},
     ("q", "5", "math")),
    ({"prompt": [{"role": "user", "content": "q"}], "label": "34"}, ("q", "34", "instructed")),
    ({"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "5", "style": "rule"}},
     ("q", "5", "instructed"))])
def test_layouts_of_known_data_sets(record, problem, tmp_path, capsys):
    for name, text in (("a.jsonl", json.dumps(record) + "\n\n"), ("b.json", json.dumps([record], indent=1))):
        (tmp_path / name).write_text(text)
        assert convert(capsys, tmp_path / name, tmp_path / f"{name}.out")[:2] == (0, [problem])


def test_duplicates_and_golds_that_nobody_can_match_are_left_out_and_counted(tmp_path, capsys):
    answers = {"a\u2028": "1", "b": "It suffices to show that x.\nIndeed, x.", "c": r"\boxed{1} and \boxed{2}", "d": "p - q"}
    lines = [json.dumps({"question": q, "answer": a}, ensure_ascii=False) for q, a in answers.items()]
    (tmp_path / "data.jsonl").write_text("\n".join(lines + lines[:1]))
    code, written, said = convert(capsys, tmp_path / "data.jsonl", tmp_path / "new" / "out.jsonl")
    assert written == [("a\u2028", "1", "math"), ("d", "p - q", "math")]
    assert "2 of 4 problems left out" in said and "2 problems of 5 records; 1 came again" in said
    assert convert(capsys, tmp_path / "data.jsonl", tmp_path / "new" / "out.jsonl")[0] == 2  # it is there already
    (tmp_path / "data.jsonl").write_text(lines[1])
    code, written, said = convert(capsys, tmp_path / "data.jsonl", tmp_path / "none.jsonl")
    assert code == 2 and "whose answers can be matched" in said and not (tmp_path / "none.jsonl").exists()


def test_a_data_set_by_name_is_the_split_that_was_asked_for(tmp_path, monkeypatch, capsys):
    import huggingface_hub
    asked, parquet = [], SimpleNamespace(ParquetFile=lambda path: SimpleNamespace(iter_batches=lambda: [
        SimpleNamespace(to_pylist=lambda: [{"question": path.stem, "answer": "#### 1"}])]))
    (tmp_path / "hub" / "main").mkdir(parents=True)
    for name in ("main/train-0.parquet", "main/train-1.parquet", "main/test-0.parquet", "README.md"):
        (tmp_path / "hub" / name).touch()  # the hub's cache holds both splits once both were asked for
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=parquet))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **more: asked.append(
        (repository, more)) or str(tmp_path / "hub"))
    assert convert(capsys, "gsm8k", tmp_path / "a")[1] == [("train-0", "1", "math"), ("train-1", "1", "math")]
    assert convert(capsys, "gsm8k-test", tmp_path / "b")[1] == [("test-0", "1", "math")]
    assert asked[0] == ("openai/gsm8k", {"repo_type": "dataset", "allow_patterns": "main/train*"})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "`pip install pyarrow` reads parquet" in convert(capsys, "gsm8k", tmp_path / "c")[2]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **more: 1 / 0)
    assert "gsm8k cannot be downloaded" in convert(capsys, "gsm8k", tmp_path / "c")[2]


@pytest.mark.parametrize("files, source, complaint", [
    ({}, "gms8k", "did you mean gsm8k"), ({}, "", "holds nothing, and read are .jsonl"),
    ({"data-0.arrow": "", "state.json": "{}"}, "", r"of save_to_disk: python -c .*load_from_disk\('[^']+'\).to_json"),
    ({"dataset_dict.json": "{}", "train/data-0.arrow": ""}, "", r"\['train'\].to_json"),
    ({"x.csv": "question,answer"}, "x.csv", "holds .csv, .*pandas.read_csv"),
    ({"gsm8k_train.jsonl": "", "gsm8k_test.jsonl": ""}, "", "holds test and train files"),
    ({"x.jsonl": '{"question": "q", "answer": "1"}\n{"question": '}, "x.jsonl", "x.jsonl, record 2: "),
    ({"x.jsonl": '{"id": 1, "text": "x"}'}, "x.jsonl", "record 1: no known layout but id, text: rename"),
    ({"x.jsonl": "[]"}, "x.jsonl", "no problems"), ({"x.parquet": "PAR"}, "x.parquet", "x.parquet, record 0|pyarrow")])
def test_what_cannot_be_read_gets_one_line(files, source, complaint, tmp_path, capsys, monkeypatch):
    for name, text in files.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    (tmp_path / "in").mkdir(exist_ok=True)
    code, _, said = convert(capsys, source if source == "gms8k" else tmp_path / "in" / source, tmp_path / "out.jsonl")
    import re
    assert code == 2 and re.search(complaint, said) and "error" in said.splitlines()[-1]


def test_real_data_sets_are_converted(tmp_path, capsys):
    real = ROOT.parent / "shared" / "data"
    if not real.exists():
        pytest.skip(f"no published data sets in {real}")
    count = lambda name: len(convert(capsys, real / f"{name}.jsonl", tmp_path / name)[1])
    names = ("gsm8k_test", "aime24", "math500", "commonsenseqa", "dapo_math_sample", "olympiadbench")
    assert [count(name) for name in names] == [1319, 30, 500, 100, 8, 684]


# ---- internlm2.py ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("heads, key_heads", [(4, 2), (4, 4), (4, 1)])
def test_internlm2_is_llama_under_other_names(heads, key_heads, tmp_path):
    """Against transformers' Llama, whose weights are packed here as InternLM2's published modelling code reads them: it
    views wqkv's output as (key heads, query heads of each + 2, head size)."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM
    theirs, source = hf_pair("llama", tmp_path / "source", num_attention_heads=heads, num_key_value_heads=key_heads,
                             tie_word_embeddings=False)
    weights, per_key = load_file(source / "model.safetensors"), heads // key_heads
    back = {new: old for old, new in internlm2.NAMES.items()}
    packed = {}
    for name, tensor in weights.items():
        if "self_attn.q_proj" in name:
            q, k, v = (weights[name.replace("q_proj", f"{x}_proj")].view(-1, 8, 32) for x in "qkv")
            tensor = torch.cat([torch.cat([q[j * per_key:(j + 1) * per_key], k[j:j + 1], v[j:j + 1]])
                                for j in range(key_heads)]).flatten(0, 1)
            name = name.replace("self_attn.q_proj", "attention.wqkv")
        for new, old in back.items():
            name = name.replace(new, old)
        packed |= {} if "self_attn" in name else {name: tensor}
    half = list(packed)[:7]
    shards = {"model-1.safetensors": half, "model-2.safetensors": [name for name in packed if name not in half]}
    for shard, names in shards.items():
        save_file({name: packed[name].contiguous() for name in names}, source / shard)
    (source / "model.safetensors").unlink()
    hf = json.loads((source / "config.json").read_text())
    hf |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False, "rope_theta": 1e4,
           "rope_scaling": {"type": "dynamic", "factor": 2.0}, "auto_map": {"AutoConfig": "evil.InternLM2Config"}}
    del hf["rope_parameters"]
    (source / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match="recipes/internlm2.py"):
        models.load(source)
    internlm2.convert(source, tmp_path / "out")
    model, _ = models.load(tmp_path / "out")
    ids = torch.randint(0, 64, (3, 20), generator=seeded())
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (model(ids) @ model.lm_head.weight.T - expected).abs().max() < 1e-4
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert (theirs(ids).logits - expected).abs().max() < 1e-4
    with pytest.raises(ValueError, match="no internlm2 checkpoint"):
        internlm2.convert(tmp_path / "out", tmp_path / "again")


def test_internlm2_tokenizer_is_read_without_running_its_code(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="pip install sentencepiece protobuf")
    from transformers import AutoTokenizer
    _, source = hf_pair("llama", tmp_path / "source", vocab_size=300)
    (source / "tokenizer.json").unlink()
    text = "\n".join(f"The sum of {a} and {b} is {a + b}. " for a in range(60) for b in range(60))
    (source / "text").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(source / "text"), model_prefix=str(source / "tokenizer"), vocab_size=299, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=False, pad_id=-1, minloglevel=2)
    (source / "tokenizer_config.json").write_text(json.dumps({
        "auto_map": {"AutoTokenizer": ["evil.InternLM2Tokenizer", None]}, "tokenizer_class": "InternLM2Tokenizer",
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))
    (source / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    hf = json.loads((source / "config.json").read_text()) | {"model_type": "internlm2"}
    (source / "config.json").write_text(json.dumps(hf))
    internlm2.convert(source, tmp_path / "out")
    processor, text = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model")), "The 日本\n\n and  3"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(text).input_ids == [1, *processor.encode(text)] and tokenizer.eos_token_id == 2
    assert tokenizer.decode(processor.encode(text)) == text
    assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()


# ---- overnight.py ------------------------------------------------------------------------------------------

STUB = """
import json, os, signal, sys, time
from pathlib import Path
out, plan = Path(sys.argv[sys.argv.index("--out") + 1]), json.loads(sys.argv[1])
out.mkdir(exist_ok=True)
(out / "config.json").touch()
with open(out / "starts", "a") as file:
    file.write(json.dumps(sys.argv[2:]) + "\\n")
start = len((out / "starts").read_text().splitlines())
code = plan[min(start, len(plan)) - 1]
if code == "sleep":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    time.sleep(60)
if code == "saved":
    (out / f"checkpoint_{start:06d}.pt").touch()
    code = 1
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""


@pytest.mark.parametrize("plan, code, sizes", [
    ([3, -9, 1, 137, 0], 0, [(4096, 40), (2048, 20), (1024, 16), (1024, 16), (512, 16)]),
    ([4], 4, [(4096, 40)]), ([2], 2, [(4096, 40)]), ([130], 130, [(4096, 40)]), ([-15], 143, [(4096, 40)]),
    ([1], 1, [(4096, 40)] * 5), ([1, 1, 1, 1, "saved", 1], 1, [(4096, 40)] * 10)])
def test_overnight_starts_again_what_can_be_helped(plan, code, sizes, tmp_path):
    (tmp_path / "stub.py").write_text(STUB)
    assert overnight.supervise([str(tmp_path / "stub.py"), json.dumps(plan), "--out", str(tmp_path / "run"), "--lr", "1",
                                "--rollout-rows", "40", "--micro-batch-tokens=4096"]) == code
    starts = [json.loads(line) for line in (tmp_path / "run" / "starts").read_text().splitlines()]
    after = lambda start, name: int(start[start.index(name) + 1])
    assert [(after(start, "--micro-batch-tokens"), after(start, "--rollout-rows")) for start in starts] == sizes
    assert ["--resume" in start for start in starts] == [False] + [True] * (len(starts) - 1)
    assert all(after(start, "--lr") == 1 for start in starts)


def test_overnight_hands_a_signal_on_and_ends(tmp_path):
    (tmp_path / "stub.py").write_text(STUB)
    night = subprocess.Popen([sys.executable, ROOT / "recipes" / "overnight.py", tmp_path / "stub.py", '["sleep"]', "--out",
                              tmp_path / "run"])
    while not (tmp_path / "run" / "starts").exists():
        time.sleep(0.05)
    time.sleep(0.2)
    night.terminate()
    assert night.wait(20) == 143 and len((tmp_path / "run" / "starts").read_text().splitlines()) == 1


def test_overnight_brings_a_run_through_that_runs_out_of_memory(family, tmp_path):
    (tmp_path / "short_of_memory.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
real = train.update
def update(*args, **settings):
    if settings["micro_batch_tokens"] > 512 and len(args[2].adamw.state):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                           "tried to allocate 64000000 bytes. Error code 12 (Cannot allocate memory)")
    return real(*args, **settings)
train.update = update
train.main()
""")
    _, undisturbed = run_here(family, tmp_path / "plain", "--save-every", 1)
    assert overnight.supervise([str(tmp_path / "short_of_memory.py"), *flags(
        family, tmp_path / "run", "--eval-every", 0, "--save-every", 1, "--micro-batch-tokens", 1024)]) == 0
    assert read_metrics(tmp_path / "run")[1:] == undisturbed and same_weights(tmp_path / "plain", tmp_path / "run")


# ---- family.py ---------------------------------------------------------------------------------------------

def test_a_family_is_made_by_two_at_once_and_after_any_kill(tmp_path):
    """Children are forked by a process that has not used torch yet, whose threads a fork would lose."""
    script = f"""
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import transformers, transformers.modeling_utils
from transformers import PreTrainedTokenizerFast
from recipes.family import make_family
os.environ["TQDM_DISABLE"] = "1"
def start(out):
    if pid := os.fork():
        return pid
    try:
        make_family(out, "natural", sizes={{"explorer": (8, 1), "learner": (8, 1)}}, corpus_size=640, epochs=4)
        os._exit(0)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)
out, parts, place, begun = Path(sys.argv[1]), set(), random.Random(0), time.time()
assert os.waitpid(start(out / "timed"), 0)[1] == 0
whole = time.time() - begun
for _ in range(6):
    child = start(out / "family")
    time.sleep(place.uniform(0.1, 0.95) * whole)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    parts.add(tuple(sorted(path.name for path in (out / "family").glob("*"))))
both = start(out / "family"), start(out / "family")
assert [os.waitpid(child, 0)[1] for child in both] == [0, 0]
print(parts, len(list(out.iterdir())))
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    whole = ("explorer", "family.json", "heldout.jsonl", "learner", "train.jsonl")
    parts = set(eval(done.stdout.rpartition(" ")[0]))
    assert parts <= {(), whole} and () in parts  # killed, it has left a whole family or none
    assert len(list(tmp_path.glob("family*"))) > 1  # scratch of those that were killed, over which nobody tripped
    assert tuple(sorted(path.name for path in (tmp_path / "family").iterdir())) == whole
    models.load(tmp_path / "family" / "learner")
