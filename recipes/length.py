"""Does coherent exploration beat token noise where solutions are long? The plan: docs/length.md.

    python -m recipes.length models      sizes, epochs and batch size for each length, by the plan's rule
    python -m recipes.length base        no training: pass@k and coherence of each source of diversity
    python -m recipes.length search      every arm at all of its settings, on search pairs
    python -m recipes.length confirm     every arm at its best setting on fresh pairs
    python -m recipes.length report      tables, verdicts, picture, from assets/length/results.json.gz alone

Every stage takes `--steps 5 10` to look at some lengths only, without the picture. The task is `habit` with
that many steps in a solution. A *job* makes a pair of models, measures or trains one, and leaves a file under
runs/length. All are published together, and what is published is not made again. An interrupted command goes
on where it stopped.

Shapes: n rollouts a problem. A rollout of L steps has L triples: method (the operator), digit, running value.
"""
import argparse
import contextlib
import gzip
import json
import os
import random
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch

import train
from eval import evaluate, headroom, pass_at_k, powers_of_two
from grpo import advantages_of
from plumbing.books import keep_books
from plumbing.checkpoint import load
from plumbing.family import make_family
from plumbing.files import write_whole
from plumbing.pictures import new_figure
from plumbing.problems import load_problems
from plumbing.steps import steps as steps_of
from plumbing.tasks import OPERATIONS, habit_solution, habit_table
from plumbing.terminal import one_line
from plumbing.text import decode, encode_all
from recipes.claims import area, do, interval, run_quietly, shown
from recipes.remedies import LOOPS, groups_of, without_rare
from recipes.worth import by_pair, flops
from sample import sample
from train import learn, score_all, writer

RUNS, ASSETS = Path("runs/length"), Path("assets/length/results.json.gz")
SEARCH, CONFIRM, SEEDS = (range(50, 54), 2), (range(60, 80), 6), 2  # pairs: whence the first so many that fit
CANDIDATES = {  # steps: (explorer, learner: width, layers; texts, epochs, batch size), the cheapest first
    5: [((32, 2), (64, 3), 12_000, 10, 64)],
    10: [((32, 2), (64, 3), 12_000, 10, 64), ((32, 2), (80, 3), 12_000, 10, 64)],
    20: [((48, 2), (112, 3), 12_000, 10, 64), ((32, 2), (80, 3), 12_000, 10, 16)],
    40: [((32, 2), (80, 3), 12_000, 5, 8), ((32, 2), (80, 3), 12_000, 10, 16)]}
PROBLEMS, ROLLOUTS = 128, 32

RATES = {1: (4e-4, 8e-4, 1.6e-3), 2: (4e-4, 8e-4), 4: (4e-4, 8e-4)}
LONG = {1: (4e-4, 8e-4, 1.6e-3, 3.2e-3), 4: (4e-4, 8e-4, 1.6e-3)}
GRID = {5: RATES, 10: RATES, 20: LONG, 40: LONG}  # steps: {mini-batches: rates} that an arm is searched at
HEATS = (1.3, 1.6, 2.2)  # and "GRPO, hot" at these temperatures
FEW, MANY = "--minibatches 1", "--minibatches 4"  # settings that S2L-PO and RAFT are compared at too
HALF, BETTER = "some arms at half their best rate", "some arms at the better of both rates"
WORTH = {m: f"as docs/worth.md with --minibatches {m}" for m in (2, 1)}
SHAPES = {  # of a run, and for how many steps the explorer is alone in ALONE. `worth`: as in docs/worth.md
    "": ("--steps 40 --mix-steps 20 --prompts-per-step 16 --eval-every 4 --eval-n 4", 10),
    "worth": ("--steps 96 --mix-steps 16 --prompts-per-step 8 --eval-every 8 --eval-n 16", 8)}


# ---- sources of diversity ----------------------------------------------------------------------------------

def hot_at_first(temperature, logits, ids, lengths):
    """`sample`'s hook for a temperature of the first token alone, the method: noise that stays coherent."""
    return torch.where(lengths[:, None] == 0, logits / temperature, logits)


SOURCES = {  # name: who, and the settings of `sample`
    **{f"learner, T {T:g}": ("learner", {"temperature": T}) for T in (1.0, 1.3, 1.6, 2.2)},
    "learner, T 1.6, top-p .95": ("learner", {"temperature": 1.6, "top_p": 0.95}),
    "learner, T 2.2, min-p .05": (
        "learner", {"temperature": 2.2, "adjust": partial(without_rare, 0.05, 2.2)}),
    "learner, T 2.2 at first": ("learner", {"adjust": partial(hot_at_first, 2.2)}),
    "explorer, T 1": ("explorer", {})}


# ---- what is trained ---------------------------------------------------------------------------------------

BESIDE = 5  # what a random stream is for, after plumbing/steps.py's


def withheld(args, run, explore):
    """S2L-PO without what it supplies. As many rollouts as a group has are drawn from the learner beside, to
    see which problems it solves by itself; a group that only the explorer solved gets no advantage."""
    own = writer(args, run, run.learner, args.temperature)
    for step in steps_of(args, run):
        share, rollouts = groups_of(args, step, explore, own)
        beside = own(step.prompts, args.group_size, step.random(BESIDE))
        alone = score_all(step.problems, decode(beside, run.tokenizer))[..., 0].sum(1) > 0  # [P]
        learn(run, step, rollouts, advantages=partial(withheld_advantages, alone))
        right = step.scores[..., 0]  # [P, G]
        only = (right > 0).any(1) & ~solved(alone, right, rollouts.from_explorer.cpu())
        keep_books(args, run, step, share=share, groups_withheld=int(only.sum()),
                   tokens_thrown_away=int(beside.lengths.sum()))


def solved(alone, rewards, from_explorer):
    """[P]: whether the learner solves the problem, `alone` [P] or in its group [P, G]."""
    return alone | ((rewards > 0) & ~from_explorer).any(1)


def withheld_advantages(alone, rewards, from_explorer, objective):
    """A [P, G] that is 0 where the learner does not solve the problem."""
    return advantages_of(rewards, from_explorer, objective) * solved(alone, rewards, from_explorer)[:, None]


RAFT = "RAFT warm start"
ALONE = "--schedule step --mix-steps {}"  # nearly as many rollouts by the explorer as S2L-PO's
ARMS = {  # name: (flags, loop)
    "GRPO": ("--explorer none", train.train), "GRPO, hot": ("--explorer none", train.train),
    "GRPO, min-p": ("--explorer none --temperature 2.2", LOOPS["minp"]),
    "clip-high .28": ("--explorer none --clip-high 0.28", train.train),
    RAFT: (ALONE, LOOPS["raft"]), "abrupt switch": (ALONE, train.train),
    "S2L-PO": ("", train.train), "S2L-PO, hot": ("--temperature 1.6", train.train)}
ABLATIONS = {"S2L-PO, positive": ("--off-policy positive", train.train), "S2L-PO, withheld": ("", withheld)}


# ---- jobs --------------------------------------------------------------------------------------------------

def path_of(job):
    return RUNS / "results" / ("_".join(map(str, job)).replace(" ", "") + ".json")


def work(job):
    """In a worker: does a job and leaves its result, as path_of names it."""
    torch.set_num_threads(1)
    result = {"pair": made, "base": measured, "run": trained}[job[0]](*job[1:])
    path_of(job).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path_of(job), lambda file: file.write(json.dumps({"job": job} | result).encode()))


def pair_at(steps, candidate, pair):
    """The directory of a pair, pretrained where it is not there: published results come without models."""
    base = RUNS / f"habit-{steps}-{candidate}-{pair}"
    if not base.exists():
        explorer, learner, texts, epochs, batch_size = CANDIDATES[steps][candidate]
        with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
            make_family(base, "habit", pair, sizes={"explorer": explorer, "learner": learner},
                        corpus_size=texts, epochs=epochs, batch_size=batch_size, steps=steps)
    return base


def made(steps, candidate, pair):
    """What the plan's rule asks of a pair."""
    found = {who: measured(steps, candidate, pair, f"{who}, T 1") for who in ("explorer", "learner")}
    settings = json.loads((pair_at(steps, candidate, pair) / "family.json").read_text())
    return found | {"seconds": settings["seconds"]}


def measured(steps, candidate, pair, source):
    """What a source of diversity writes to a pair's held-out problems: right ones of n, and how coherent."""
    who, settings = SOURCES[source]
    base = pair_at(steps, candidate, pair)
    model, tokenizer, stops = load(base / who)
    problems = load_problems(base / "heldout.jsonl")[:PROBLEMS]
    write = partial(sample, model, max_new_tokens=3 * steps + 1, stops=stops, **settings)
    found = evaluate(write, tokenizer, problems, encode_all(problems, tokenizer), ROLLOUTS,
                     torch.Generator().manual_seed(0))
    habit = habit_table(random.Random(f"habit corpus {pair}"))
    return {"strict": found["strict"]} | coherence(
        [(problem.question, text) for problem, texts in zip(problems, found["texts"]) for text in texts],
        steps, habit)


def coherence(pairs, steps, habit):
    """Of [(question, text)], the shares that are executed (every step right by the first one's method), that
    follow the writers' habit, that change their method midway; in which step the first error falls, [steps +
    1] with "in none" last; in nats, the entropy of the first method within a problem, and the mutual
    information of the first and the last method."""
    names = [*OPERATIONS, ""]  # "": no method at all
    place = lambda method: names.index(method if method in names else "")
    first_error, joint, within, shares = np.zeros(steps + 1), np.zeros((5, 5)), {}, []
    for question, text in pairs:
        methods, right = text[::3], habit_solution(question, text[:1] if text[:1] in OPERATIONS else "+")
        wrong = [text[3 * i:3 * i + 3] != right[3 * i:3 * i + 3] for i in range(steps)]
        first_error[[*wrong, True].index(True)] += 1
        joint[place(text[:1]), place(methods[steps - 1:steps])] += 1
        within.setdefault(question, np.zeros(5))[place(text[:1])] += 1
        shares.append([text == right, text[:1] == habit[question[:3]], len({*methods} & {*OPERATIONS}) > 1])
    joint /= len(pairs)
    return dict(zip(("executed", "habit", "changed"), np.mean(shares, axis=0).tolist())) | {
        "first error": (first_error / len(pairs)).tolist(),
        "method entropy": float(np.mean([entropy(counts / counts.sum()) for counts in within.values()])),
        "mutual information": entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)}


def entropy(p):
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def trained(steps, candidate, pair, arm, setting, seed, shape=""):
    """A run of training: its curves over steps, FLOPs and seconds."""
    base, (common, alone) = pair_at(steps, candidate, pair), SHAPES[shape]
    own, loop = (ARMS | ABLATIONS)[arm]
    flags = f"{common} --max-new-tokens {3 * steps + 1} --seed {seed} {setting} {own.format(alone)}"
    args, run = run_quietly(base, flags.split(), loop=loop)
    size = {who: sum(p.numel() for p in load(base / who)[0].parameters()) for who in ("learner", "explorer")}
    rows = args.prompts_per_step * args.group_size
    of = lambda cost: np.cumsum([cost(line) if line["step"] else 0 for line in run.history])
    supervised = lambda line: loop is LOOPS["raft"] and line["share"] == 1
    passes = lambda line: 6 if args.minibatches == 1 or supervised(line) else 8  # with pi_old's forward pass
    cost = lambda line: flops(line, size, passes(line))
    idle_too = lambda line: cost(line | {  # RAFT's passes over successes may be more
        "tokens_trained": max(line["tokens_trained"], rows * line["length"])})
    seconds = lambda line: sum(x for key, x in line.items() if key.startswith("seconds_"))
    spent = {"flops": of(cost), "flops of all": of(idle_too), "seconds": of(seconds)}
    at = [i for i, line in enumerate(run.history) if "eval_curve" in line]
    shutil.rmtree(args.out)
    return ({name: x[at].tolist() for name, x in spent.items()}
            | {"withheld": [line["groups_withheld"] for line in run.history if "groups_withheld" in line]}
            | {"step": [run.history[i]["step"] for i in at],
               "strict@1": [run.history[i]["eval_strict_pass@1"] for i in at]})


def make(args, title, jobs):
    """Does the jobs that are neither published nor there, and publishes all: {job: result}."""
    results = published()
    try:
        do([job for job in jobs if job not in results], args.workers, title, work,
           lambda job: path_of(job).exists())
    finally:
        for path in sorted((RUNS / "results").glob("*.json")):
            result = json.loads(path.read_text())
            results[tuple(result["job"])] = result
        ASSETS.parent.mkdir(parents=True, exist_ok=True)
        packed = gzip.compress(json.dumps([*results.values()]).encode(), mtime=0)
        write_whole(ASSETS, lambda file: file.write(packed))
    return results


def published():
    results = json.loads(gzip.decompress(ASSETS.read_bytes())) if ASSETS.exists() else []
    return {tuple(result["job"]): result for result in results}


# ---- the stages --------------------------------------------------------------------------------------------

def curve(strict):
    return [pass_at_k(strict, ROLLOUTS, k) for k in powers_of_two(ROLLOUTS)]


def fits(found):
    """The plan's rule, of a pair's {"explorer", "learner"}: who executes, mixes, follows habits, crosses."""
    explorer, learner = found["explorer"], found["learner"]
    return {"executes": explorer["executed"] >= 0.8, "mixes": explorer["method entropy"] >= 0.5,
            "habits": learner["habit"] >= 0.9,
            "crosses": curve(learner["strict"])[0] > curve(explorer["strict"])[0] - 0.05
            and curve(explorer["strict"])[-1] > curve(learner["strict"])[-1]}


def fitting(results, steps, candidate, among):
    return [pair for pair in among if (found := results.get(("pair", steps, candidate, pair)))
            and all(fits(found).values())]


def chosen(results, steps):
    """(candidate, search pairs): the first candidate of which enough fit. ValueError if there is none."""
    among, count = SEARCH
    for candidate in range(len(CANDIDATES[steps])):
        if len(pairs := fitting(results, steps, candidate, among)) >= count:
            return candidate, pairs[:count]
    raise ValueError(f"no models for {steps} steps that fit: python -m recipes.length models --steps {steps}")


def with_models(lengths):
    """(steps, candidate, search pairs) of the lengths that have models; says which have none."""
    for steps in lengths:
        try:
            yield steps, *chosen(published(), steps)
        except ValueError as missing:
            print(missing)


def qualified(args, steps, candidate, among, count):
    """The first `count` pairs of `among` that fit, or fewer; they are made as they are needed. Where none of
    the first `count` fits, no more are made."""
    among, pairs = [*among], []
    while among and len(pairs) < count:
        block, among = among[:count - len(pairs)], among[count - len(pairs):]
        results = make(args, f"{steps} steps, pairs", [("pair", steps, candidate, pair) for pair in block])
        pairs += fitting(results, steps, candidate, block)
        if not pairs:
            break
    return pairs


def models(args):
    for steps in args.steps:
        for candidate, sizes in enumerate(CANDIDATES[steps]):
            if len(qualified(args, steps, candidate, *SEARCH)) == SEARCH[1]:
                print(f"{steps} steps: candidate {candidate}, {sizes}")
                break
        report_models(published(), steps)


def base(args):
    for steps, candidate, _ in with_models(args.steps):
        pairs = qualified(args, steps, candidate, *CONFIRM)
        make(args, f"{steps} steps, base models", [("base", steps, candidate, pair, source) for pair in pairs
                                                   for source in SOURCES])
    report(args)


def search(args):
    for steps, candidate, pairs in with_models(args.steps):
        make(args, f"{steps} steps, search",
             [("run", steps, candidate, pair, arm, setting, 100) for pair in pairs for arm in ARMS
              for setting in grid(steps, arm)])
    report(args)


def grid(steps, arm):
    settings = [f"--lr {lr} --minibatches {m}" for m, rates in GRID[steps].items() for lr in rates]
    if arm == "GRPO, hot":
        return [f"{setting} --temperature {T}" for T in HEATS for setting in settings]
    return settings


def searched(results, steps, arm, among=""):
    """[(mean area on the search pairs, setting)], the best first, of the settings that contain `among`.
    ValueError if there is none."""
    heights, (_, pairs) = {}, chosen(results, steps)
    for (kind, *job), result in results.items():
        if kind == "run" and (job[0], job[3]) == (steps, arm) and job[2] in pairs and among in job[4]:
            heights.setdefault(job[4], []).append(area(result["strict@1"]))
    whole = [(np.mean(h), setting) for setting, h in heights.items() if len(h) == len(pairs)]
    if not whole:
        raise ValueError(f"{arm} has not been searched: python -m recipes.length search --steps {steps}")
    return sorted(whole, reverse=True)


def best_of(results, steps, among=""):
    """{arm: setting}. The ablations have S2L-PO's: they change one thing only."""
    arms = {arm: searched(results, steps, arm, among)[0][1] for arm in (("S2L-PO", RAFT) if among else ARMS)}
    return arms | {arm: arms["S2L-PO"] for arm in ABLATIONS if not among}


def halved(results, steps):
    """{arm: setting} of the arms that the picture shows, at half their best rate."""
    best, half = best_of(results, steps), lambda rate: f"--lr {float(rate[1]) / 2:g}"
    return {arm: re.sub(r"--lr (\S+)", half, best[arm]) for arm in SHOWN}


def as_worth(minibatches):
    """{arm: setting} of docs/worth.md's first arms, with so many mini-batches."""
    rates = {"S2L-PO": 4e-4, "GRPO": 8e-4, RAFT: 4e-4}
    return {arm: f"--lr {lr} --minibatches {minibatches}" for arm, lr in rates.items()}


def confirm(args):
    """Each arm at its best setting; S2L-PO and RAFT with one mini-batch and four too; some arms at half their
    best rate; at 5 steps also docs/worth.md's setting."""
    for steps, candidate, _ in with_models(args.steps):
        results = published()
        best = [best_of(results, steps, among) for among in ("", FEW, MANY)] + [halved(results, steps)]
        pairs, seeds = qualified(args, steps, candidate, *CONFIRM), range(SEEDS)
        jobs = [("run", steps, candidate, pair, arm, setting, seed) for seed in seeds for pair in pairs
                for settings in best for arm, setting in settings.items()]
        jobs += [("run", steps, candidate, pair, arm, setting, seed, "worth")
                 for seed in seeds for pair in pairs for m in WORTH if steps == 5
                 for arm, setting in as_worth(m).items()]
        make(args, f"{steps} steps, confirm", jobs)
    report(args)


# ---- the report --------------------------------------------------------------------------------------------

def report_models(results, steps):
    for job, found in sorted((job, found) for job, found in results.items() if job[:2] == ("pair", steps)):
        explorer, learner = found["explorer"], found["learner"]
        misses = [key for key, met in fits(found).items() if not met]
        ends = ", ".join(f"{curve(who['strict'])[i]:.3f}" for who in (learner, explorer) for i in (0, -1))
        print(f"{steps} steps, {CANDIDATES[steps][job[2]]}, pair {job[3]}, {found['seconds']:.0f} s: "
              f"explorer executes {explorer['executed']:.2f}, mixes {explorer['method entropy']:.2f} nats; "
              f"habits {learner['habit']:.2f}; @1, @{ROLLOUTS} of learner, explorer {ends}: "
              f"{misses or 'fits'}")


def report_search(results, steps):
    """What each arm reached at its best rate (and temperature) with one, two and four mini-batches."""
    for arm in ARMS:
        with contextlib.suppress(ValueError):  # not searched yet
            best = [searched(results, steps, arm, f"--minibatches {m}")[0] for m in GRID[steps]]
            print(f"{arm:18}" + "".join(f"   {height:.3f} at {setting:44}" for height, setting in best))


def solved_there(learner, strict):
    """On what share of the learner's groups of 16 that fail another group of 16 has a success: of another
    source, or of the learner itself if `strict` is `learner`. Both: right ones of ROLLOUTS by problem."""
    passes, solves = (np.array([pass_at_k([c], ROLLOUTS, ROLLOUTS // 2) for c in right])
                      for right in (learner, strict))
    if strict is learner:  # the other 16 of its 32 rollouts have all that are right
        solves = np.array(learner) > 0
    return ((1 - passes) * solves).sum() / max((1 - passes).sum(), 1e-9)


def report_base(results, steps):
    """The table of the sources. Where the learner's groups of 16 fail: `there`, the share of a source's
    rollouts that is right, and `groups`, the share of its groups of 16 with a right one. Returns {source:
    (pass@16, share that changes its method)}."""
    ends, keys = {}, ("executed", "habit", "changed", "method entropy", "mutual information")
    print(f"\n{steps} steps{'':20}" + "".join(f"{f'@{k}':>7}" for k in powers_of_two(ROLLOUTS))
          + f"{'there':>8}{'groups':>8}" + "".join(f"{key:>20}" for key in (*keys, "first error at")))
    of = {source: [result for job, result in sorted(results.items(), key=str)
                   if job[:2] == ("base", steps) and job[4] == source] for source in SOURCES}  # of each pair
    for source, found in of.items():
        if found:
            which = 2 if source == "learner, T 1" else 1  # of headroom's
            pairs = [(own["strict"], result["strict"]) for own, result in zip(of["learner, T 1"], found)]
            there = np.mean([headroom(*pair, ROLLOUTS, ROLLOUTS // 2)[which] for pair in pairs])
            groups = np.mean([solved_there(*pair) for pair in pairs])
            means = {key: np.mean([result[key] for result in found]) for key in keys}
            heights = curve(sum((result["strict"] for result in found), []))
            ends[source] = heights[4], means["changed"]
            errors = np.mean([result["first error"] for result in found], axis=0)[:-1]  # without "none"
            first = f"{(errors * np.arange(1, steps + 1)).sum() / max(errors.sum(), 1e-9):.1f}"
            print(f"{source:28}" + "".join(f"{x:7.3f}" for x in heights) + f"{there:8.4f}{groups:8.3f}"
                  + "".join(f"{mean:20.3f}" for mean in means.values()) + f"{first:>20}")
    return ends


def runs_of(results, steps, arm, setting, shape=""):
    """{(pair, seed): run} of the confirmation."""
    return {(job[3], job[6]): result for job, result in sorted(results.items())
            if job[0] == "run" and job[1] == steps and job[3] in CONFIRM[0] and job[4:6] == (arm, setting)
            and job[7:] == ((shape,) if shape else ())}


def endpoints(run, reference):
    """Area over all steps; at step 8; at the end; area up to what the reference's run spent (a run that ends
    before keeps its last value); how many groups `withheld` withheld; 1 if the run collapsed, else 0."""
    at = lambda cost: area(np.interp(np.linspace(0, reference[cost][-1], 193), run[cost], run["strict@1"]))
    return {"area": area(run["strict@1"]), "at 8": run["strict@1"][run["step"].index(8)],
            "end": run["strict@1"][-1], **{f"equal {cost}": at(cost) for cost in (
                "flops", "flops of all", "seconds")}, "withheld": sum(run["withheld"]),
            "collapsed": float(max(run["strict@1"]) - run["strict@1"][-1] > 0.2)}


def report_runs(results, steps, settings, shape=""):
    """Prints the means of each arm of settings {arm: setting} and its differences to S2L-PO. Returns {arm:
    {endpoint: [pairs, seeds]}}. ValueError if an arm has not all of its runs."""
    found, counts = {}, ("withheld", "collapsed")
    reference = runs_of(results, steps, "S2L-PO", settings["S2L-PO"], shape)
    for arm in sorted(settings, key=lambda arm: arm != "S2L-PO"):
        runs = runs_of(results, steps, arm, settings[arm], shape)
        if len(runs) < CONFIRM[1] * SEEDS or runs.keys() != reference.keys():
            raise ValueError(f"{arm}, {settings[arm]}: {len(runs)} runs of {CONFIRM[1] * SEEDS} are there")
        each = {key: endpoints(run, reference[key]) for key, run in runs.items()}
        names = next(iter(each.values()))
        found[arm] = {name: by_pair({key: row[name] for key, row in each.items()}) for name in names}
        print(f"{arm}, {settings[arm]}\n" + "".join(f"    {name:20}{x.mean():8.3f}" + (
            f"   less S2L-PO's {shown(*interval(x - found['S2L-PO'][name]))}, "
            f"won {(x > found['S2L-PO'][name]).sum()} of {x.size}"
            if arm != "S2L-PO" and name not in counts else "") + "\n"
            for name, x in found[arm].items() if name not in counts or x.any()), end="")
    return found


def better(best, half):
    """Of each arm of `half` the one with the larger mean area: is the order of arms that of their collapses?
    All are report_runs'."""
    return {arm: max(best[arm], of, key=lambda of: of["area"].mean()) for arm, of in half.items()}


HYPOTHESES = {  # name: endpoint, (steps, settings), its first arm, its second, with what steps it is compared
    "a1": ("at 8", (10, ""), "S2L-PO", "GRPO, hot", 5),
    "a2": ("at 8", (20, ""), "S2L-PO", "GRPO, hot", 5),
    "a3": ("area", (20, ""), "S2L-PO", "GRPO, hot", 5),
    "b1": ("area", (10, FEW), "S2L-PO", RAFT, None), "b2": ("area", (10, MANY), RAFT, "S2L-PO", None),
    "b3": ("area", (20, FEW), "S2L-PO", RAFT, None), "b4": ("area", (20, MANY), RAFT, "S2L-PO", None),
    "c1": ("area", (5, WORTH[2]), RAFT, "S2L-PO", None), "c2": ("area", (5, WORTH[1]), "S2L-PO", RAFT, None),
    "d1": ("area", (10, ""), "GRPO, min-p", "GRPO, hot", None),
    "d2": ("area", (20, ""), "GRPO, min-p", "GRPO, hot", None),
    "d3": ("area", (10, ""), "S2L-PO", "GRPO, min-p", None),
    "d4": ("area", (20, ""), "S2L-PO", "GRPO, min-p", None)}
AFTERWARDS = {  # what was looked at when the planned runs were there
    "a in area": ("area", (10, ""), "S2L-PO", "GRPO, hot", 5),
    "a3 again": ("area", (20, BETTER), "S2L-PO", "GRPO, hot", 5)} | {
    f"{name} again, {steps}": ("area", (steps, BETTER), first, second, None) for steps in (5, 10, 20)
    for name, first, second in (("a", "S2L-PO", "GRPO, hot"), ("b", RAFT, "S2L-PO"),
                                ("d", "S2L-PO", "GRPO, min-p"))}


def verdicts(found):
    """The plan's hypotheses, of what report_runs returned by (steps, settings)."""
    for name, (key, (steps, part), first, second, shorter) in (HYPOTHESES | AFTERWARDS).items():
        less = lambda at: found[at][first][key] - found[at][second][key]
        what = f"{name}. {steps} steps{part and ', '}{part}, {key}: {first} - {second}"
        what += f", and less the same with {shorter}" if shorter else ""
        try:
            mean, half = interval(less((steps, part)) - (less((shorter, part)) if shorter else 0))
        except KeyError:
            print(f"{what}: not among --steps, or runs are missing")
            continue
        sure = half is not None and abs(mean) > half
        verdict = ("confirmed" if mean > 0 else "refuted") if sure else "not shown"
        print(f"{what}: {shown(mean, half)}, {'not planned' if name in AFTERWARDS else verdict}")


def report(args):
    results, ends, found = published(), {}, {}
    for steps in args.steps:
        report_models(results, steps)
        ends[steps] = report_base(results, steps)
        report_search(results, steps)
        parts = [(among, partial(best_of, results, steps, among), "") for among in ("", FEW, MANY)]
        parts += [(HALF, partial(halved, results, steps), "")]
        parts += [(WORTH[m], partial(as_worth, m), "worth") for m in WORTH if steps == 5]
        for part, settings, shape in parts:
            print(f"\n{steps} steps, {part or 'each arm at its best setting'}")
            try:
                found[steps, part] = report_runs(results, steps, settings(), shape)
            except ValueError as missing:
                print(missing)
        if {(steps, ""), (steps, HALF)} <= found.keys():
            found[steps, BETTER] = better(found[steps, ""], found[steps, HALF])
    print()
    verdicts(found)
    if args.steps == [*CANDIDATES]:
        draw(ASSETS.with_name("length.png"), results, {steps: of for steps, of in ends.items() if of},
             [steps for steps, part in found if part == ""])


SHOWN = {"GRPO": "#000000", "GRPO, hot": "#e69f00", "GRPO, min-p": "#cc79a7", RAFT: "#009e73",
         "S2L-PO": "#0072b2"}  # Okabe and Ito's


def draw(path, results, ends, trained):
    """Against length, what the sources reach and how often they change their method; then, for the lengths
    `trained`, the mean curves of some arms at their best settings. ends: {steps: report_base's}."""
    if not ends or (figure := new_figure(2 + len(trained))) is None:
        return
    figure, panels = figure
    for panel, i, what in ((panels[0], 0, "strict pass@16"), (panels[1], 1, "share that changes its method")):
        for source in SOURCES:
            panel.plot([*ends], [found[source][i] for found in ends.values()], marker="o", label=source)
        panel.set(xlabel="steps in a solution", ylabel=f"base models: {what}", xticks=[*ends])
    panels[0].legend(fontsize=6, loc="upper right", bbox_to_anchor=(1, 0.85))
    for panel, steps in zip(panels[2:], trained):
        for arm, color in SHOWN.items():
            runs = [*runs_of(results, steps, arm, best_of(results, steps)[arm]).values()]
            mean = np.mean([run["strict@1"] for run in runs], axis=0)
            panel.plot(runs[0]["step"], mean, color=color, label=arm)
        panel.set(xlabel="step", ylabel="held-out strict pass@1", ylim=(0, 1.02), title=f"{steps} steps")
    panels[-1].legend(fontsize=6)
    figure.savefig(path, dpi=130)


def main(argv=None):
    parser = argparse.ArgumentParser(description="S2L-PO beside token noise, by the length of solutions.")
    add = parser.add_argument
    add("stage", choices=("models", "base", "search", "confirm", "report"), help="of docs/length.md's plan")
    add("--steps", type=int, nargs="+", choices=CANDIDATES, default=list(CANDIDATES), help="lengths (all)")
    add("--workers", type=int, default=os.cpu_count(), help="processes of one thread each (all cores)")
    args = parser.parse_args(argv)
    with one_line("length.py"):
        globals()[args.stage](args)


if __name__ == "__main__":
    main()
