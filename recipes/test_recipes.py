"""Checks of the recipes, file by file.

    pytest recipes/test_recipes.py
"""
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import grpo
from plumbing.problems import load_problems, save_problems
import reward
import sample as sampling
import train as training
from plumbing import books, checkpoint, pictures
from plumbing import pool as reader
from plumbing.steps import Step
from plumbing.text import decode
from recipes import (compare, data, explorers, internlm2, measured, overnight, pool, pool_import, remedies,
                     retokenize)
from recipes import rescue as rescuing
from recipes import separate as separating
from test_all import (  # noqa: F401
    ROOT, family, files_up_to, flags, hf_pair, read_metrics, seeded, tiny_model, weights)


def run_here(family, out, *more, loop=training.train, open_explorer=training.open_explorer):
    """train.main's way with a recipe's loop or explorer: (run, its steps' metrics, its weights)."""
    args = training.parse_flags(flags(family, out, "--eval-every", 0, *more))
    run, explore = training.load_run(args, open_explorer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "draw", lambda *_: None)  # half the time
        books.open_books(args, run, None)  # step 0 without the explorer, whose calls are the steps' alone
        loop(args, run, explore)
        books.finish(args, run)
    return run, read_metrics(out)[1:], torch.cat([x.flatten() for x in weights(out).values()]).tolist()


def noted(calls, who, write):
    """An explore(prompts, n, generator) that appends (who, prompts, n, generator, its rollouts) to calls."""
    def explore(*asked):
        calls.append((who, *asked, write(*asked)))
        return calls[-1][-1]
    return explore


# ---- pool.py -----------------------------------------------------------------------------------------------

def test_training_from_a_pool_equals_live_sampling_of_the_same_rollouts(family, tmp_path, capsys):
    calls, path = [], tmp_path / "pool.jsonl"
    more = ("--mix-steps", 4, "--off-policy", "behaviour", "--lr", 1e-2)
    _, *live = run_here(family, tmp_path / "live", *more, open_explorer=lambda *given: noted(
        calls, "", training.open_explorer(*given)))
    lines = [record(prompt, ids[:n].tolist(), logps[:n].tolist()) for _, prompts, _, _, r in calls
             for prompt, *group in zip(prompts, r.ids, r.logps, r.lengths) for ids, logps, n in zip(*group)]
    torn = '{"prompt_ids": [5, 3'
    path.write_text("".join([*lines, torn]))
    _, *from_pool = run_here(family, tmp_path / "run", *more, "--explorer", path)
    assert from_pool == live and [line["rollouts_explorer"] for line in live[0]] == [16, 12, 8, 0]
    assert "has no settings beside it" in capsys.readouterr().out
    path.write_text("".join(lines[:-3]))  # three of step 3's rollouts, two prompts
    for prompts, lacking in ((4, "3 rollouts of 2 prompts"), (20, "47 rollouts of 16 prompts")):
        with pytest.raises(ValueError, match=f"lacks {lacking}, .* --model EXPLORER .* --n 4"):
            run_here(family, tmp_path / "short", *more, "--explorer", path, "--prompts-per-step", prompts)
    note, settings = tmp_path / "pool.jsonl.settings.json", json.dumps({"model": "other", "stops": [0]})
    for changed, said in ((lines[1:] + lines[:1], None), (lines, settings)):  # it would draw, or stop, anew
        path.write_text("".join([*changed, torn]))
        note.write_text(said) if said else None
        with pytest.raises(ValueError, match="other settings: hash_of_explorer"):
            run_here(family, tmp_path / "run", *more, "--explorer", path, "--resume")


def test_measured_ends_in_one_line_where_a_pool_holds_too_little(family, tmp_path, capsys):
    """What it will ask for nobody knows before: 2 of a group of 4 at first, where the schedule asks for 1."""
    path = tmp_path / "pool.jsonl"
    prompts = [line.split('"')[3] for line in (family / "train.jsonl").read_text().splitlines()]
    tokenizer = checkpoint.load(family / "learner")[1]
    path.write_text("".join(record(tokenizer(prompt).input_ids, [3, 0], [-1.0, -1.0]) for prompt in prompts))
    more = ("--explorer", path, "--schedule", "constant", "--explorer-share", 0.25)
    with pytest.raises(SystemExit, match="2"):
        training.main(flags(family, tmp_path / "run", *more), loop=measured.measured, recipe="measured")
    *_, said = capsys.readouterr().err.splitlines()
    assert said == f"train.py: error: {path} has 1 rollouts of a prompt, and 2 are asked for"


def record(prompt, ids, logps):
    return json.dumps({"prompt_ids": prompt, "response_ids": ids, "small_model_log_probs": logps}) + "\n"


@pytest.fixture
def stock(tmp_path):
    """(path, draw): a pool of 8 rollouts, of 2 to 9 tokens, of each of two prompts."""
    path = tmp_path / "pool.jsonl"
    draw = lambda *asked, seed=0: reader.Pool(path, 20, (0, 2)).draw(*asked, seeded(seed), 6)
    path.write_text("".join(record(prompt, [3 + i, *[5] * i, 0], [-1.0] * (i + 2))
                            for i in range(8) for prompt in ([1, 2], [12])))
    return path, draw


def test_a_draw_takes_different_rollouts_at_random_and_cuts_them(stock):
    _, draw = stock
    r, again, other = draw([[1, 2], [12]], 5), draw([[1, 2], [12]], 5), draw([[1, 2], [12]], 5, seed=1)
    first = r.ids[:, :, 0].tolist()
    assert r.ids.shape == (2, 5, 6) and first[0] != first[1] and first == [sorted(set(x)) for x in first]
    assert again.ids[:, :, 0].tolist() == first != other.ids[:, :, 0].tolist() and not r.from_explorer.any()
    r = draw([[12]], 8)
    assert r.ids[0, :, 0].tolist() == [*range(3, 11)] and r.lengths[0].tolist() == [2, 3, 4, 5, 6, 6, 6, 6]
    assert r.finished[0].tolist() == [True] * 5 + [False] * 3  # cut before its stop token: not finished
    assert r.logps.sum() == -r.lengths.sum()
    with pytest.raises(OSError, match="has 8 rollouts of a prompt, and 9"):
        draw([[12]], 9)


@pytest.mark.parametrize("line", [b"{}", b"[]", b'{"prompt_ids": [1], "a": {"prompt_ids": [1]}}',
                                  b'{"prompt_ids": 7}', b'{"prompt_ids": [1], "response'])
def test_a_line_that_is_no_rollout_is_named_when_a_pool_is_opened(line, stock):
    stock[0].write_bytes(stock[0].read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match="pool.jsonl, line 17: not one rollout"):
        reader.index(stock[0])


@pytest.mark.parametrize("ids, logps, complaint", [
    ([1, 20, 3], [-1, -1, 0], "that the learner has not"),
    ([1, True], [-1, 0], "has not"), ([1, 3], [-1], "for each a log-prob"), ([], [], "needs tokens"),
    (5, [-1], "not iter"), ([1, 3], [-1, math.nan], "NaN"), ([1, 3], [-1, "x"], "log-prob"),
    ([1, 3], [-1, 5.0], "above 0")])
def test_a_broken_record_is_named_when_it_is_drawn(ids, logps, complaint, stock):
    path, draw = stock
    path.write_text(good := record([9], [1, 4, 2], [-1.0, -math.inf, 0.0]))
    assert draw([[9]], 1).logps.tolist() == [[[-1.0, -1e4, 0.0]]] and draw([[9]], 1).finished.all()
    path.write_text(good + record([9], ids, logps))
    with pytest.raises(OSError, match=f"pool.jsonl, byte {len(good)}: no rollout to use: .*{complaint}"):
        draw([[9]], 2)


def test_a_pool_whose_writer_had_fewer_stop_tokens_is_cut_at_the_learners(stock):
    """Refused, it would end a run hours in: a base model writes on past the token that ends a chat's turn."""
    path, draw = stock
    path.write_text(record([9], [1, 2, 3, 0], [-1.0, -2.0, -3.0, -4.0]))
    found = draw([[9]], 1)
    assert found.ids.tolist() == [[[1, 2]]] and found.logps.sum() == -3 and found.finished.all()


def test_a_pool_is_the_same_whether_or_not_its_writer_was_killed(family, tmp_path, monkeypatch, capsys):
    sums = [(f"{a}+{b}=", str((a + b) % 10)) for a in range(10) for b in range(4)]
    problems = [reward.Problem(*x, "natural") for x in sums]  # 40: two whole batches and a short one
    save_problems(problems, tmp_path / "sums.jsonl")
    out, note, seeds = tmp_path / "pool.jsonl", tmp_path / "pool.jsonl.settings.json", []
    monkeypatch.setattr(pool, "sample", lambda model, prompts, n, generator, *more, **settings: seeds.append(
        generator.initial_seed()) or sampling.sample(model, prompts, n, generator, *more, **settings))

    def write(out, *more):
        data = tmp_path / "sums.jsonl"
        pool.main([str(x) for x in ("--model", family / "explorer", "--data", data, "--n", 3, "--out", out,
                                    "--max-new-tokens", 4, "--device", "cpu", *more)])
        return [json.loads(line) for line in out.read_text().splitlines()]

    records, whole = write(out), out.read_bytes()
    assert [x["prompt_id"] for x in records] == [i for i in range(40) for _ in range(3)]
    assert set(records[0]) == {"prompt_id", "prompt", "prompt_ids", "response", "response_ids", "reward",
                               "is_correct", "small_model_log_probs", "data_source", "ground_truth"}
    right = [reward.score(problems[x["prompt_id"]], x["response"]).strict for x in records]
    assert [x["is_correct"] for x in records] == right and any(right) and not all(right)
    batch = len(b"".join(whole.splitlines(keepends=True)[:16 * 3]))
    for length in (0, 5, batch, batch + 5, 3 * batch // 2, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:length])
        write(out)
        assert out.read_bytes() == whole, length
    assert len(set(seeds)) == 3  # one a batch, and below one a shard
    few = write(tmp_path / "few", "--rollout-rows", 6)
    assert [x["response_ids"] for x in few] == [x["response_ids"] for x in records]
    parts = [x["prompt_id"] for i in "123" for x in write(tmp_path / i, "--shard", f"{i}/3")]
    assert sorted(parts) == [x["prompt_id"] for x in records] and len(set(seeds[-3:])) == 3
    for name, more in ((out, ("--temperature", 0.5)), (tmp_path / "new", ("--shard", "4/3"))):
        with pytest.raises(SystemExit):
            write(name, *more)
    said = capsys.readouterr().err
    assert "written with other settings" in said and "not from 1/3 to 3/3" in said
    assert out.read_bytes() == whole
    # A run takes up the explorer's stop tokens, and parses a single record before it is asked for rollouts.
    settings = json.loads(note.read_text())
    assert settings["stops"] == [0] and settings["weights"]
    note.write_text(json.dumps(settings | {"stops": [0, 7]}))
    args = training.parse_flags(flags(family, tmp_path / "run", "--explorer", out, "--data",
                                      tmp_path / "sums.jsonl", "--group-size", 3))
    parsed, real = [], reader.read
    monkeypatch.setattr(reader, "read", lambda *given: parsed.append(given) or real(*given))
    run, _ = training.load_run(args, training.open_explorer)
    assert run.stops == (0, 7) and len(parsed) == 1


def interrupt(monkeypatch, module, calls):
    """Ctrl-C, a real one, in the call of module.sample after so many."""
    real, count = module.sample, itertools.count()

    def sample(*given, **named):
        if next(count) == calls:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # another test's `listen` took it
            os.kill(os.getpid(), signal.SIGINT)
        return real(*given, **named)
    monkeypatch.setattr(module, "sample", sample)


def test_ctrl_c_ends_pool_and_eval_without_a_traceback_and_they_go_on(family, tmp_path, monkeypatch, capsys):
    """Of a night's sampling only the batch is lost that it was at."""
    problems = load_problems(family / "train.jsonl")
    problems = [reward.Problem(f"{i}+{p.question}", p.answer, "natural") for i in (1, 2) for p in problems]
    save_problems(problems, tmp_path / "data.jsonl")  # 40: three batches
    argv = lambda out: [str(x) for x in (
        "--model", family / "explorer", "--data", tmp_path / "data.jsonl", "--n", 2, "--max-new-tokens", 4,
        "--device", "cpu", "--out", tmp_path / out)]
    kept, texts = {"pool": 32 * 2, "eval": 1 + 2}, {}

    def run(name, out):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv(out)])
        {"pool": pool, "eval": evaluation}[name].main()
    for name, module in (("pool", pool), ("eval", evaluation)):
        run(name, f"{name}-whole")
        with monkeypatch.context() as patch:
            interrupt(patch, module, 2)
            with pytest.raises(SystemExit, match="130"):
                run(name, name)
        assert "Traceback" not in capsys.readouterr().err
        paths = [tmp_path / out for out in (name, f"{name}-whole")]
        whole = [path if name == "pool" else next(path.glob("result-*.jsonl")) for path in paths]
        assert len(whole[0].read_text().splitlines()) == kept[name]
        interrupt(monkeypatch, module, 1)  # of one batch that is left no second is asked for
        run(name, name)
        assert whole[0].read_bytes() == whole[1].read_bytes()


# ---- retokenize.py, explorers.py ---------------------------------------------------------------------------

def other_tokenizer():
    """A byte-level BPE of many-character tokens, among which a family's characters have other ids."""
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
    (explorer, theirs, stops), ours = checkpoint.load(family / "explorer"), other_tokenizer()
    prompts = [theirs(text).input_ids for text in ("3+4=", "9+0=")]
    r = sampling.sample(explorer, prompts, 20, seeded(), 3, stops, 1.5)
    new = retokenize.retokenize(r, theirs, ours, 1, 3)
    assert 0 < r.finished.float().mean() < 1 and not torch.equal(new.ids, r.ids)
    assert decode(new, ours) == decode(r, theirs) and torch.equal(new.finished, r.finished)
    assert torch.allclose(new.logps.sum(-1), r.logps.sum(-1), atol=1e-5) and not new.logps[~new.mask].any()
    assert torch.equal(new.ids.gather(2, new.lengths[..., None] - 1)[..., 0] == 1, new.finished)
    cut = retokenize.retokenize(r, theirs, ours, 1, 1)
    assert torch.allclose(cut.logps, new.logps[:, :, :1])  # a part of the text has a part of its log-prob
    assert cut.lengths.max() == 1 and torch.equal(cut.finished, r.finished & (new.lengths == 1))
    # A special token that a model spells out is text.
    spelled, one = SimpleNamespace(decode=lambda ids, **more: "1+1=<end>2"), torch.ones(1, 1, 1).long()
    r = sampling.Rollouts(one, one[0], one * 0.0, one[0] == 1, one[0] == 0)
    new = retokenize.retokenize(r, spelled, ours, 1, 50)
    assert new.ids[0, 0, :-1].ne(1).all() and ours.decode(new.ids[0, 0, :-1]) == "1+1=<end>2"


def test_a_learner_learns_from_an_explorer_with_another_tokenizer(family, tmp_path):
    checkpoint.save(tiny_model(vocab_size=400, scale=0.1), other_tokenizer(), (1,), tmp_path / "learner")
    more = ("--learner", tmp_path / "learner", "--schedule", "constant", "--explorer-share", 1, "--lr", 1e-2,
            "--steps", 40, "--group-size", 16, "--eval-data", family / "train.jsonl", "--eval-problems", 20)
    with pytest.raises(ValueError, match="tokenisers of learner and explorer differ .*retokenize.py"):
        run_here(family, tmp_path / "run", *more)
    run = lambda choice: run_here(family, tmp_path / "run", *more, "--off-policy", choice,
                                  open_explorer=retokenize.open_explorer)
    with pytest.raises(ValueError, match="log-prob of each token"):
        run("truncated")
    _, lines, _ = run("positive")
    assert lines[-1]["eval_strict_pass@1"] > 0.1  # from nothing but texts of the explorer


def test_a_fleet_shares_the_explorers_rollouts_and_the_ends(family, tmp_path):
    calls, prompts, stream = [], [[1, 2], [3]], seeded()
    write = lambda i, *asked: sampling.sample(tiny_model(seed=i), *asked, 4, (0,))
    fleet = explorers.fleet([noted(calls, i, lambda *asked, i=i: write(i, *asked)) for i in range(3)])
    shared = [fleet(prompts, n, seeded()).ids for n in (4, 3, 2, 1)]
    assert [ids.shape[1] for ids in shared] == [4, 3, 2, 1]
    assert [call[0] for call in calls] == [0, 1, 2, 0, 1, 2, 1, 2, 2]
    assert [call[2] for call in calls] == [1, 1, 2, 1, 1, 1, 1, 1, 1]
    alone = [write(i, prompts, n, stream).ids for i, n in ((0, 1), (1, 1), (2, 2))]  # from a single stream
    assert torch.equal(shared[0], torch.cat(alone, dim=1))
    model, tokenizer, _ = checkpoint.load(family / "explorer")
    stops = tuple(tokenizer("0123456789").input_ids)  # the answers themselves
    checkpoint.save(model, tokenizer, stops, tmp_path / "last")
    args = training.parse_flags(flags(family, tmp_path / "run"))
    run, fleet = training.load_run(args, partial(explorers.open_fleet, also=[str(tmp_path / "last")]))
    r = fleet(run.prompts, 8, seeded())  # the first member stops at the last one's stop tokens too
    stops = torch.isin(r.ids, torch.tensor(run.stops)) & r.mask
    assert stops.sum(2).max() == 1 and len(run.hashes["explorer"]) == 2
    with pytest.raises(ValueError, match="give --also a model"):
        explorers.open_fleet(args, run, ["pool.jsonl"])
    with pytest.raises(ValueError, match="give --explorer a model"):
        explorers.open_thinned(SimpleNamespace(explorer="pool.jsonl"), run)


def test_thinned_groups_have_one_method_as_often_as_before(family):
    explorer, tokenizer, stops = checkpoint.load(family / "explorer")
    prompts = [tokenizer(f"{a}+{b}=").input_ids for a in range(10) for b in range(2)] * 8
    write = lambda prompts, n, generator: sampling.sample(explorer, prompts, n, generator, 4, stops)
    plain, thin = write(prompts, 8, seeded()), explorers.thinned(write)(prompts, 8, seeded())
    methods = lambda r: sum(len(set(group.tolist())) for group in r.ids[:, :, 0]) / len(r.ids)
    assert methods(plain) > 3 and methods(thin) == 1 and thin.ids.shape[:2] == plain.ids.shape[:2]
    share = lambda r: torch.bincount(r.ids[:, :, 0].flatten(), minlength=40) / r.ids[:, :, 0].numel()
    assert (share(plain) - share(thin)).abs().max() < 0.1


# ---- rescue.py, separate.py, remedies.py, measured.py ------------------------------------------------------

def test_measured_share_follows_what_the_explorer_adds_and_leaves_for_good():
    """Fed with mean rewards it would keep a beaten explorer, which is right now and then too."""
    line = lambda e, l: {"step": 1, "groups_explorer_only": e, "groups_learner": l}
    share = lambda seen: measured.measured_share([{"step": 0}, *(line(*both) for both in seen)])
    assert share([]) == 0.5 and share([(0.5, 0.25)]) == pytest.approx(0.5 / (0.5 + 0.8 * 0.5 + 0.2 * 0.25))
    assert share([(0.3, 0.1)] * 99) == pytest.approx(0.75)
    seen, shares = [], []
    for step in range(60):  # a learner that solves every group from step 20 on
        shares.append(share(seen))
        seen.append((0.9 if step < 20 and shares[-1] else 0.0, float(step >= 20)))
    assert shares[20] > 0.9 and shares[-1] == 0 and sorted(shares[20:], reverse=True) == shares[20:]


LOOPS = {"rescue": rescuing.rescue, "separate": separating.separate, "measured": measured.measured,
         **remedies.LOOPS}


@pytest.mark.parametrize("name", [name for name in LOOPS if name != "entropy"])
def test_loops_at_share_0_are_plain_grpo_to_the_bit(name, family, tmp_path, monkeypatch):
    """A study lays what such a loop gains or loses to its idea, and not to a random stream that it draws from
    twice. (The entropy bonus has no loop of its own.)"""
    more, loop = ("--explorer", "none"), LOOPS[name]
    _, *plain = run_here(family, tmp_path / "plain", *more)
    with monkeypatch.context() as patch:  # without the loop's own idea
        patch.setattr(remedies, "maxrl_advantages", grpo.advantages_of)
        patch.setattr(remedies, "without_rare", lambda min_p, temperature, logits, ids, lengths: logits)
        alone = partial(loop, redraws=0) if name == "dynamic" else loop
        none = run_here(family, tmp_path / "none", *more, loop=alone)
        patch.setattr(measured, "measured_share", lambda history: 0.0)
        more = ("--schedule", "constant", "--explorer-share", 0)
        zero = run_here(family, tmp_path / "zero", *more, loop=alone)
    for _, lines, learnt in (none, zero):
        same = [{key: line[key] for key in of_plain} for line, of_plain in zip(lines, plain[0], strict=True)]
        assert (same, learnt) == (*plain,)


@pytest.mark.parametrize("name", LOOPS)
def test_loops_resume_as_train_does_and_are_not_train(name, family, tmp_path):
    """A generator that lives longer than a step makes another run of a resumed one."""
    more = ("--mix-steps", 4, "--save-every", 2, "--temperature", 1.2, "--kl-coef", 0.1, "--lr", 1e-3)
    of_loop = lambda out, *more, loop=LOOPS[name]: run_here(family, tmp_path / out, *more, loop=loop)[1:]
    unbroken = of_loop("run", *more)
    (tmp_path / "run" / "checkpoint_000004.pt").unlink()
    assert of_loop("run", "--resume") == unbroken != of_loop("train", *more, loop=training.train)


def test_rescue_puts_the_explorer_only_where_the_learner_failed(family, tmp_path, monkeypatch):
    """An explorer's rollouts where the learner succeeds are worse and off-policy: there they only harm."""
    calls, steps, update = [], [], training.update
    monkeypatch.setattr(rescuing, "writer", lambda *given: noted(calls, "learner", training.writer(*given)))
    monkeypatch.setattr(training, "update", lambda *args: steps.append(
        (*args[3:5], [calls.pop(0) for _ in calls[:]])) or update(*args))
    run, lines, _ = run_here(family, tmp_path / "run", "--schedule", "constant", "--prompts-per-step", 8,
                             loop=rescuing.rescue, open_explorer=lambda *given: noted(
                                 calls, "explorer", training.open_explorer(*given)))
    problems, mixed = dict(zip(map(tuple, run.prompts), run.problems)), False
    for (prompts, r, (first, *rest)), line in zip(steps, lines, strict=True):
        *who_what, stream, own = first
        assert who_what == ["learner", prompts, 2] and torch.equal(r.ids[:, :2], own.ids)
        right = [[reward.score(problems[tuple(prompt)], text).strict for text in group[:2]]
                 for prompt, group in zip(prompts, decode(r, run.tokenizer))]
        failed = ~torch.tensor(right).any(1)
        assert torch.equal(r.from_explorer, failed[:, None] & torch.tensor([False, False, True, True]))
        assert len(rest) == len(set(failed.tolist()))
        for who, asked, n, random, written in rest:  # a second half is what its own prompt was answered with
            there = failed == (who == "explorer")
            assert n == 2 and asked == [prompt for prompt, wanted in zip(prompts, there) if wanted]
            assert torch.equal(r.ids[there, 2:], written.ids)
            assert torch.equal(r.logps[there, 2:], written.logps)
            assert (random is stream) == (who == "learner")  # or it would write the same once more
        mixed |= len(rest) == 2
        assert line["share"] == line["rollouts_explorer"] / 32 == failed.sum() / 16
    assert mixed


class Texts(HTMLParser):
    """What a browser shows in a page's <pre>, and the tags that it meets."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.inside = set(), [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.inside |= tag == "pre"
        self.texts += [""] * (tag == "pre")

    def handle_endtag(self, tag):
        self.inside &= tag != "pre"

    def handle_data(self, data):
        if self.inside:
            self.texts[-1] += data


def test_the_page_of_rollouts_shows_whatever_was_written_and_runs_none_of_it(tmp_path):
    """A model's text is the least trusted input there is, and a page is where it would be run."""
    hostile = ["<script>alert(1)</script>", "</pre></main><img src=x onerror=alert(1)>", "\x1b[2J\x07",
               "&lt;", "a" * 10 ** 5]
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(hostile[i] for i in ids))
    ids = torch.tensor([[[0, 1, 2], [3, 4, 0]]] * 2)  # [P, G, T]
    lengths = torch.tensor([[3, 2]] * 2)
    written = sampling.Rollouts(ids, lengths, torch.zeros(2, 2, 3), lengths > 0, lengths > 2)
    ratio = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]], [[1.3, 0.5, 1.0], [torch.nan, 1.0, 1.0]]])
    tokens = {"ratio": ratio, "clip_fraction": (ratio > 1.2).float(), "logp_gap": ratio - 1}
    problems = [reward.Problem("<b>1</b>", "1"), reward.Problem("2", "<i>2")]
    (tmp_path / "rollouts").mkdir()
    for step in (1, 2):
        done = Step(step, [0, 1], problems, None, None, written, torch.ones(2, 2, 3), ratio[..., 0],
                    tokens=tokens)
        pictures.note(tmp_path, done, tokenizer)
    page = (tmp_path / "rollouts.html").read_text()
    read = Texts(page)
    assert not {"script", "img", "b"} & read.tags and "\x1b" not in page and "http" not in page
    texts = ["".join(hostile[:2]) + "\\x1b[2J\\x07", "".join(hostile[3:])]
    assert read.texts == ["2", *texts, "<b>1</b>", *texts] * 2  # the group that moved further stands first
    levels = re.findall(r'<i class="g(\d+) r(\d+)( c)?">', page)[:3]
    assert levels == [("6", "10", " c"), ("4", "0", ""), ("5", "5", "")]  # 5 is white: a ratio of 1
    assert all(f"#ratio:checked ~ main .r{level} " in page for level in (0, 10))


def test_separate_updates_each_source_by_itself(family, tmp_path, monkeypatch):
    """With one baseline for both the explorer's failures would praise the learner's own."""
    updates, real = [], training.update

    def spy(learner, *args, **more):
        rollouts, advantages = args[3:5]
        updates.append((rollouts.from_explorer, advantages, learner.norm.weight.clone()))
        metrics, tokens = real(learner, *args, **more)
        n = len(updates)
        return metrics | {"skipped_updates": 1, "tokens_trained": n, "loss": float(n)}, tokens

    monkeypatch.setattr(training, "update", spy)
    _, lines, _ = run_here(family, tmp_path / "run", "--mix-steps", 4, "--lr", 1e-2, loop=separating.separate)
    # The explorer's of a group of 4: 4, 3, 2, 0. A single rollout (the learner's at step 2) is left out.
    assert [(A.shape[1], bool(who.all()), bool(who.any())) for who, A, _ in updates] == [
        (4, True, True), (3, True, True), (2, True, True), (2, False, False), (4, False, False)]
    assert not torch.equal(updates[2][2], updates[3][2])  # the learner moves before its own are used
    assert [line["rollouts_explorer"] for line in lines] == [16, 12, 8, 0]
    assert [line["rollouts_learner"] for line in lines] == [0, 0, 8, 16]
    assert [(line["loss"], line["skipped_updates"]) for line in lines] == [(1, 1), (2, 1), (3.5, 2), (5, 1)]
    assert [line["tokens_trained"] for line in lines] == [1, 2, 7, 5]
    with pytest.raises(ValueError, match="one of each source"):  # where neither would have a group
        run_here(family, tmp_path / "new", "--group-size", 2, open_explorer=separating.open_explorer)
    assert not (tmp_path / "new").exists()


# ---- data.py -----------------------------------------------------------------------------------------------

def convert(capsys, source, out):
    """([(question, answer, task)] or the exit code, what was printed)."""
    try:
        data.main([str(source), "--out", str(out)])
        lines = map(json.loads, out.read_text().splitlines())
        return [tuple(line.values()) for line in lines], capsys.readouterr().out
    except SystemExit as stopped:
        return stopped.code, capsys.readouterr().err


CHAT = [{"role": "user", "content": "q"}]
TOLD = [{"role": "system", "content": "s"}, {"role": "user", "content": "q Answer: x"}]


@pytest.mark.parametrize("record, problem", [
    ({"question": "q", "answer": 7}, ("q", "7", "math")),
    ({"question": "q", "answer": "3 + 4 = 7\n#### 7"}, ("q", "7", "math")),
    ({"problem": "q", "answer": None, "solution": r"so \boxed{\frac{1}{2}}."}, ("q", r"\frac{1}{2}", "math")),
    ({"question": "q", "final_answer": ["$2$"]}, ("q", "$2$", "math")),
    ({"question": "3+4=", "answer": "7", "task": "natural"}, ("3+4=", "7", "natural")),
    ({"question": "q", "choices": {"label": ["A", "B"], "text": ["bank", "mall"]}, "answerKey": "B"},
     ("q\nA. bank\nB. mall", "B", "choice")),
    ({"prompt": "q", "completion": r"it is \boxed{5}"}, ("q", "5", "math")),
    ({"prompt": CHAT, "completion": [{"role": "assistant", "content": "#### 5"}]}, ("q", "5", "math")),
    ({"prompt": CHAT, "label": "34"}, ("q", "34", "math")),
    ({"prompt": "q", "answer": "4"}, ("q", "4", "math")),
    ({"prompt": TOLD, "reward_model": {"ground_truth": "5"}},
     ("s\n\nq Answer: x", "5", "instructed")),  # verl's
    ({"prompt": "q", "solution": "9", "source_prompt": TOLD, "reward_model": {"ground_truth": "9"}},
     ("q", "9", "math"))])  # DAPO-Math-17k-Processed: nothing in it tells the model how to answer
def test_layouts_of_known_data_sets(record, problem, tmp_path, capsys):
    for name, text in (("a.jsonl", json.dumps(record) + "\n\n"), ("b.json", json.dumps([record], indent=1))):
        (tmp_path / name).write_text(text)
        assert convert(capsys, tmp_path / name, tmp_path / f"{name}.out")[0] == [problem]


def test_csv_and_a_mixture(tmp_path, capsys):
    (tmp_path / "a.csv").write_text('question,answer\n"1, 2?",3\n"a\nb",4\n')
    (tmp_path / "b.jsonl").write_text("".join(
        json.dumps({"question": f"q{i}", "answer": str(i)}) + "\n" for i in range(9)))
    written, _ = convert(capsys, tmp_path / "a.csv", tmp_path / "a")
    assert written == [("1, 2?", "3", "math"), ("a\nb", "4", "math")]
    (tmp_path / "few.csv").write_text('prompt,answer\n"Answer: 3\n\nAnswer:",4\n')
    for more, given in (((), "question"), (("--exact",), "prompt")):  # published prompts are questions
        data.main([str(tmp_path / "few.csv"), "--out", str(tmp_path / f"few-{given}"), *more])
        assert json.loads((tmp_path / f"few-{given}").read_text())[given] == "Answer: 3\n\nAnswer:"
    data.main([str(tmp_path / "a.csv"), f"{tmp_path}/b.jsonl:4", "--out", str(tmp_path / "both")])
    assert len(load_problems(tmp_path / "both")) == 6
    code, said = convert(capsys, f"{tmp_path}/b.jsonl:10", tmp_path / "c")
    assert code == 2 and "there are only 9 problems" in said
    several = [*TOLD, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": several, "label": "1"}))
    assert "a chat of several turns" in convert(capsys, tmp_path / "d.jsonl", tmp_path / "d")[1]


def test_duplicates_and_golds_that_nobody_can_match_are_left_out_and_counted(tmp_path, capsys):
    answers = {"a\u2028": "1", "b": "It suffices.\nIndeed.", "c": r"\boxed{1} or \boxed{2}", "d": "p - q"}
    lines = [json.dumps({"question": q, "answer": a}, ensure_ascii=False) for q, a in answers.items()]
    (tmp_path / "data.jsonl").write_text("\n".join(lines + lines[:1]))
    written, said = convert(capsys, tmp_path / "data.jsonl", tmp_path / "new" / "out.jsonl")
    assert written == [("a\u2028", "1", "math"), ("d", "p - q", "math")]
    assert "2 of 4 problems left out" in said and "2 problems of 5 records" in said
    assert "is there already" in convert(capsys, tmp_path / "data.jsonl", tmp_path / "new" / "out.jsonl")[1]
    (tmp_path / "data.jsonl").write_text(lines[1])
    assert "answers can be matched" in convert(capsys, tmp_path / "data.jsonl", tmp_path / "none.jsonl")[1]
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize("empty", [
    {"question": "q", "answer": ""}, {"problem": "q", "answer": "$"}, {"question": "q", "answer": None},
    {"problem": "q", "answer": None, "solution": None}, {"problem": "q", "answer": "notfound"},
    {"prompt": CHAT, "label": None}, {"prompt": CHAT, "reward_model": {"ground_truth": None}},
    {"prompt": "q", "completion": None}, {"question": "q", "final_answer": [None]},
    {"question": "q", "answer": [], "choices": {"label": ["A"], "text": ["bank"]}, "answerKey": ""}])
def test_one_empty_answer_does_not_end_a_conversion(empty, tmp_path, capsys):
    records = [{"question": "a", "answer": "1"}, empty, {"question": "b", "answer": "2"}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    written, said = convert(capsys, tmp_path / "data.json", tmp_path / "out.jsonl")
    assert [answer for _, answer, _ in written] == ["1", "2"] and "1 of 3 problems left out" in said


def test_a_full_disk_leaves_no_data_that_look_whole(tmp_path, capsys):
    lines = [json.dumps({"question": f"{i}" * 50, "answer": "1"}) for i in range(200)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    with files_up_to(8_192):
        code, said = convert(capsys, tmp_path / "data.jsonl", tmp_path / "out.jsonl")
    assert code == 2 and "File too large" in said and not (tmp_path / "out.jsonl").exists()
    assert len(convert(capsys, tmp_path / "data.jsonl", tmp_path / "out.jsonl")[0]) == 200  # and again


def test_a_data_set_by_name_is_the_split_that_was_asked_for(tmp_path, monkeypatch, capsys):
    import huggingface_hub
    asked, hub = [], tmp_path / "hub"
    (hub / "main").mkdir(parents=True)
    for name in ("train-0", "train-1", "test-0"):  # the cache holds both splits once both were asked for
        (hub / "main" / f"{name}.jsonl").write_text(json.dumps({"question": name, "answer": "1"}))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **b: asked.append((a, b)) or hub)
    questions = lambda name: [question for question, *_ in convert(capsys, name, tmp_path / name)[0]]
    assert questions("gsm8k") == ["train-0", "train-1"] and questions("gsm8k-test") == ["test-0"]
    assert asked[0] == (("openai/gsm8k",), {"repo_type": "dataset", "allow_patterns": "main/train*"})
    parquet = hub / "OlympiadBench" / "OE_TO_maths_en_COMP" / "OE_TO_maths_en_COMP.parquet"
    parquet.parent.mkdir(parents=True), parquet.touch()
    assert data.download("olympiadbench") == [parquet]  # and not its folder
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **b: 1 / 0)
    assert "gsm8k cannot be downloaded" in convert(capsys, "gsm8k", tmp_path / "c")[1]


@pytest.mark.parametrize("files, source, complaint", [
    ({}, "gms8k", "did you mean gsm8k"), ({}, "", "holds nothing, and read are .jsonl"),
    ({"data-0.arrow": "", "state.json": "{}"}, "", r"save_to_disk: python -c .*\('[^']+'\).to_json"),
    ({"dataset_dict.json": "{}", "train/data-0.arrow": ""}, "", r"\['train'\].to_json"),
    ({"x.csv": "question,answer"}, "x.csv", "no problems"), ({"x.txt": ""}, "", "holds .txt, and read are"),
    ({"gsm8k_train.jsonl": "", "gsm8k_test.jsonl": ""}, "", "holds test and train files"),
    ({"x.jsonl": '{"question": "q", "answer": "1"}\n{"question": '}, "x.jsonl", "x.jsonl, record 2: "),
    ({"x.jsonl": '{"id": 1, "text": "x"}'}, "x.jsonl", "record 1: no known layout but id, text: rename"),
    ({"x.jsonl": "[]"}, "x.jsonl", "no problems"), ({"x.parquet": ""}, "x.parquet", "`pip install pyarrow`")])
def test_what_cannot_be_read_gets_one_line(files, source, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "in").mkdir()
    for name, text in files.items():
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    source = tmp_path / "in" / source if files or not source else source
    code, said = convert(capsys, source, tmp_path / "out.jsonl")
    assert code == 2 and re.search(complaint, said) and said.count("\n") == 1


def test_real_data_sets_are_converted(tmp_path, capsys):
    real = ROOT.parent / "shared" / "data"
    if not real.exists():
        pytest.skip(f"no published data sets in {real}")
    count = lambda name: len(convert(capsys, real / f"{name}.jsonl", tmp_path / name)[0])
    names = ("gsm8k_test", "aime24", "math500", "commonsenseqa", "dapo_math_sample", "olympiadbench")
    assert [count(name) for name in names] == [1319, 30, 500, 100, 8, 684]


# ---- internlm2.py ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_internlm2_is_llama_under_other_names(key_heads, tmp_path):
    """Against transformers' Llama, whose weights are packed here as InternLM2's published code reads them: it
    views wqkv's output as (key heads, query heads of each + 2, head size)."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM
    sizes = {"num_key_value_heads": key_heads, "tie_word_embeddings": False}
    (theirs, source), weights, packed = hf_pair("llama", tmp_path / "source", **sizes), {}, {}
    for path in source.glob("model*.safetensors"):
        weights |= load_file(path)
        path.unlink()
    for name, tensor in weights.items():
        if "q_proj" in name:
            parts = [weights[name.replace("q_proj", f"{x}_proj")].view(key_heads, -1, 8, 32) for x in "qkv"]
            name = name.replace("self_attn.q_proj", "attention.wqkv")
            tensor = torch.cat(parts, 1).view(-1, 32)
        for old, new in internlm2.NAMES.items():
            name = name.replace(new, old)
        packed |= {} if "_proj" in name else {name: tensor}
    for i, part in enumerate((list(packed)[::2], list(packed)[1::2])):
        save_file({name: packed[name].contiguous() for name in part}, source / f"model-{i}.safetensors")
    hf = json.loads((source / "config.json").read_text())
    hf |= {"model_type": "internlm2", "bias": False, "rope_theta": 1e4, "rope_parameters": None,
           "rope_scaling": {"type": "dynamic", "factor": 2.0}, "auto_map": {"AutoConfig": "evil.Config"}}
    (source / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match="recipes/internlm2.py"):
        checkpoint.load(source)
    internlm2.convert(source, tmp_path / "out")
    (model, *_), ids = checkpoint.load(tmp_path / "out"), torch.randint(0, 64, (3, 20), generator=seeded())
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (model(ids) @ model.lm_head.weight.T - expected).abs().max() < 1e-4
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert (again(ids).logits - expected).abs().max() < 1e-4
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()


# ---- overnight.py, family.py -------------------------------------------------------------------------------

STUB = """
import json, os, signal, sys, time
from pathlib import Path
plan, out = json.loads(sys.argv[1]), Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(exist_ok=True)
(out / "config.json").touch()
with open(out / "starts", "a") as file:
    file.write(json.dumps(sys.argv) + "\\n")
start = len((out / "starts").read_text().splitlines())
code = plan[min(start, len(plan)) - 1]
if code == "saved":
    (out / f"checkpoint_{start:06d}.pt").touch()
if code == "sleep":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.kill(os.getppid(), signal.SIGTERM)  # to the supervisor, who is to hand it on
    time.sleep(60)
os.kill(os.getpid(), -code) if code in (-9, -15) else sys.exit(code)
"""


def supervised(*argv):
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    code = overnight.supervise([str(x) for x in argv])
    [signal.signal(*handler) for handler in before]
    return code


@pytest.mark.parametrize("plan, code, sizes", [
    ([3, -9, 1, 137, 0], 0, [(4096, 40), (2048, 20), (1024, 16), (1024, 16), (512, 16)]),
    ([4], 4, [(4096, 40)]), ([2], 2, [(4096, 40)]), ([130], 130, [(4096, 40)]), ([-15], 143, [(4096, 40)]),
    (["sleep"], 143, [(4096, 40)]), ([1], 1, [(4096, 40)] * 5), ([1, 1, 1, "saved", 1], 1, [(4096, 40)] * 9)])
def test_overnight_starts_again_what_can_be_helped(plan, code, sizes, tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.chdir(tmp_path)
    assert supervised("stub", json.dumps(plan), "--out", tmp_path / "run", "--lr", 1, "--rollout-rows", 40,
                      "--micro-batch-tokens=4096") == code
    starts = [json.loads(line) for line in (tmp_path / "run" / "starts").read_text().splitlines()]
    after = lambda start, name: int(start[start.index(name) + 1])
    assert [(after(x, "--micro-batch-tokens"), after(x, "--rollout-rows")) for x in starts] == sizes
    assert ["--resume" in x for x in starts] == [False] + [True] * (len(starts) - 1)
    assert all(after(x, "--lr") == 1 for x in starts)


@pytest.mark.parametrize("module", ["train", "recipes.rescue"])
def test_overnight_brings_a_run_through_that_runs_out_of_memory(module, family, tmp_path, monkeypatch):
    """From the second step on half the memory does, and what comes out is the undisturbed run's."""
    (tmp_path / "short_of_memory.py").write_text(f"""
import runpy
import train
import grpo
real = grpo.update
def update(*given):
    if given[6].micro_batch_tokens > 512 and given[2].adamw.state:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate"
                           " memory: you tried to allocate 64 bytes. Error code 12 (Cannot allocate memory)")
    return real(*given)
grpo.update = train.update = update
runpy.run_module({module!r}, run_name="__main__")
""")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    short = ("--schedule", "constant", "--eval-every", 0, "--save-every", 1, "--eval-n", 1, "--steps", 2)
    loop = rescuing.rescue if module == "recipes.rescue" else training.train
    _, undisturbed, _ = run_here(family, tmp_path / "plain", *short, loop=loop)
    assert supervised("short_of_memory", *flags(family, tmp_path / "run", *short, "--micro-batch-tokens",
                                                1024)) == 0
    assert read_metrics(tmp_path / "run")[1:] == undisturbed
    assert json.loads((tmp_path / "run" / "config.json").read_text())["micro_batch_tokens"] == 512


def test_a_family_is_made_by_two_at_once_and_after_any_kill(tmp_path):
    """In a process of its own, since a fork loses the threads that torch has started."""
    script = f"""
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import torch._dynamo, transformers
from plumbing.family import make_family

def start():
    if child := os.fork():
        return child
    try:
        sizes = {{"explorer": (8, 1), "learner": (8, 1)}}
        make_family("family", "natural", sizes=sizes, corpus_size=64, epochs=1)
        os._exit(0)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)

transformers.PreTrainedTokenizerFast  # imported once for all
for last in ("tokenizer.json", "explorer/config.json", "learner", "heldout.jsonl", "family.json"):
    child = start()
    while not list(Path().glob(f"family.partial-{{child}}-*/{{last}}")) and not Path("family").exists():
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not Path("family").exists() or len(list(Path("family").iterdir())) == 5, last
print(len(list(Path().iterdir())))
both = start(), start()
sys.exit(any([os.waitpid(child, 0)[1] for child in both]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"})
    assert done.returncode == 0 and int(done.stdout) >= 4, done.stdout + done.stderr  # it leaves its scratch
    checkpoint.load(tmp_path / "family" / "learner")
    assert {path.name for path in (tmp_path / "family").iterdir()} == {
        "explorer", "learner", "train.jsonl", "heldout.jsonl", "family.json"}


# ---- pool_import.py ----------------------------------------------------------------------------------------

def test_a_pool_is_made_of_what_any_engine_wrote(family, tmp_path, capsys):
    """Matched by a wrong number, right answers would be paid as wrong ones, without a sign."""
    lines = (family / "train.jsonl").read_text().splitlines()[:6]
    asked = [json.loads(line)["question"] for line in lines]
    (tmp_path / "data.jsonl").write_text("\n".join([lines[0], lines[0], *lines[1:]]) + "\n")  # one is twice
    right = [f"{(int(q[0]) + int(q[2])) % 10}" for q in asked]
    choices = [{"message": {"content": right[2]}, "finish_reason": "stop"},
               {"message": {"content": right[2] + "1"}, "finish_reason": "length"}]
    texts = [{"question": asked[0], "responses": [right[0], "x", "<eos>"]},
             {"prompt": asked[1], "outputs": [{"text": right[1], "finish_reason": "stop"}]},
             {"custom_id": "request-3", "response": {"body": {"choices": choices}}},  # its line in the file
             {"question": "unknown", "responses": ["1"]}]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(text) for text in texts) + "\n\n")
    out = tmp_path / "pool.jsonl"
    argv = [str(tmp_path / "texts.jsonl"), "--tokenizer", str(family / "learner"), "--data",
            str(tmp_path / "data.jsonl"), "--out", str(out)]
    pool_import.main(argv)
    said = capsys.readouterr().out
    assert "6 rollouts of 3 of 6 problems, mean reward 0.500" in said
    assert "; 1 lines answer no problem" in said
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["prompt"], r["reward"], r["response_ids"][-1] == 0) for r in found] == [
        (asked[0], 1, True), (asked[0], 0, True), (asked[0], 0, True), (asked[1], 1, True),
        (asked[2], 1, True), (asked[2], 0, False)]
    assert found[2]["response_ids"].count(0) == 1  # the control token that the text spells out is none
    (tmp_path / "texts.jsonl").write_text('{"question": "1+1="}\n')
    with pytest.raises(SystemExit, match="2"):
        pool_import.main(argv)
    assert "texts.jsonl, line 1: in none of the layouts" in capsys.readouterr().err


def test_a_pool_of_texts_trains_and_refuses_what_needs_log_probs(family, tmp_path):
    problems = load_problems(family / "train.jsonl")
    lines = [{"question": p.question, "responses": [p.answer, "x", "1", "2"]} for p in problems]
    (tmp_path / "texts").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out, more = tmp_path / "pool.jsonl", ("--lr", 1e-3)
    pool_import.main([str(tmp_path / "texts"), "--tokenizer", str(family / "learner"), "--data",
                      str(family / "train.jsonl"), "--out", str(out)])
    _, lines, _ = run_here(family, tmp_path / "run", *more, "--explorer", out)
    assert lines[0]["reward_explorer"] > 0 and lines[0]["grad_norm"] > 0 and lines[0]["logp_gap"] is None
    for choice in ("behaviour", "truncated", "geometric"):
        with pytest.raises(ValueError, match="needs the log-probabilities"):
            run_here(family, tmp_path / choice, *more, "--explorer", out, "--off-policy", choice)


# ---- compare.py --------------------------------------------------------------------------------------------

def test_runs_are_compared_by_their_own_books(tmp_path, capsys):
    for run, values in (("a", [0.1, 0.4, 0.3]), ("b", [0.2, 0.1, 0.9])):
        (tmp_path / run).mkdir()
        lines = [{"step": i, "eval_strict_pass@1": value, "seconds_training": i, "seconds_sampling": 1.0}
                 for i, value in enumerate(values)]
        (tmp_path / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    compare.main([str(tmp_path / run) for run in "ab"] + ["--out", str(tmp_path / "x.png")])
    rows = [line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["2", "0.100", "0.300", "0.400", "2.50"], ["2", "0.200", "0.900", "0.900", "2.50"]]
    assert (tmp_path / "x.png").exists()
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1, "seconds_training": 1.0}\n')
    for runs, said in (("a", "--eval-data"), ("c", "No such file")):
        with pytest.raises(SystemExit, match="2"):
            compare.main([str(tmp_path / runs)])
        assert said in capsys.readouterr().err
