"""S2L-PO: GRPO on a large learner, part of whose rollout groups a frozen small explorer writes (arXiv 2605.30789).

    python train.py                       the laptop run: makes its two models the first time, then trains
    python train.py --explorer none       the same without an explorer: plain GRPO
    python train.py --learner Qwen/Qwen3-1.7B-Base --explorer Qwen/Qwen3-0.6B-Base --data gsm8k.jsonl --dtype bfloat16

`train` is the paper's Algorithm 1. Everything below it loads, keeps the books and survives: kill a run at any moment and
the same command with --resume goes on from its last checkpoint. Random numbers depend on (seed, step, purpose) alone, so
on a CPU the same seed gives the same metrics to the last digit, and a resumed run equals an unbroken one.

Not the paper's by default: batch and learning rate (a laptop's), the explorer's sampling (temperature 1 without nucleus;
the paper: 0.7 and 0.95) and the KL penalty (off; the paper: 0.001).

Shapes: P prompts a step, G rollouts a prompt (one group).
"""
import argparse
import copy
import json
import os
import re
import signal
import sys
import time
import zipfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from anneal import SCHEDULES, explorer_share, split_group
from eval import draw_run, evaluate, pass_at_k, powers_of_two, table
from grpo import LOSSES, OFF_POLICY, Optimizer, group_advantages, update
from model import Transformer, add_lora, fingerprint, load, pick_device, save
from reward import TASKS, load_problems, score
from sample import check_lengths, decode, encode, join, sample

LEARNER, EXPLORER, MINIBATCH, EVALUATION, ADAPTER = range(5)  # what a random stream is for


def train(args, run, explore):
    """S2L-PO, Algorithm 1. explore(prompts, n, generator) writes the explorer's rollouts [P, n]; None: plain GRPO."""
    for step in range(run.history[-1]["step"] + 1 if run.history else 1, args.steps + 1):    # for i = 1..T
        random = partial(generator, args.seed, step)
        batch = batch_of(step, args.prompts_per_step, len(run.problems), args.seed)
        problems, prompts = [run.problems[i] for i in batch], [run.prompts[i] for i in batch]
        clock = [time.perf_counter()]

        # 1. Who writes how much of each group
        past = [line for line in run.history if line["step"] > 0]
        share = explorer_share(step, args.mix_steps, args.schedule, args.explorer_share, past) if explore else 0.0  # alpha_i
        n_explorer, n_learner = split_group(share, args.group_size, args.schedule == "measured")             # G_w, G_s

        # 2. Rollouts: one group a prompt
        explored = own = None
        if n_explorer:
            explored = explore(prompts, n_explorer, random(EXPLORER))                        # sample(pi_omega, G_w)
        if n_learner:
            own = sample(run.learner, prompts, n_learner, random(LEARNER), args.max_new_tokens, args.temperature,
                         rows=args.rollout_rows)                                             # sample(pi_theta, G_s)
        rollouts = join(explored, own)                                                       # O [P, G]
        clock.append(time.perf_counter())

        # 3. Rewards  4. Advantages, over the combined group
        texts = decode(rollouts, run.tokenizer)                                              # [P][G]
        scores = score_all(problems, texts, rollouts.ids.device)                             # [P, G, (reward, strict, answer)]
        advantages = group_advantages(scores[..., 0], scale=args.loss != "dr_grpo")          # [P, G]
        clock.append(time.perf_counter())

        # 5. theta <- GRPO update
        metrics = update(run.learner, run.reference, run.optimizer, prompts, rollouts, advantages, random(MINIBATCH),
                         **update_settings(args))
        clock.append(time.perf_counter())

        if keep_books(args, run, {"step": step, "share": share} | metrics, batch, rollouts, texts, scores, clock):
            break  # a signal came


def score_all(problems, texts, device):
    """Scores [P, G, (reward, strict, answer)] of texts [P][G]."""
    scores = [[score(problem, text) for text in group] for problem, group in zip(problems, texts)]
    return torch.tensor(scores, dtype=torch.float32, device=device)


def update_settings(args):
    return {name: getattr(args, name) for name in ("loss", "off_policy", "clip_low", "clip_high", "kl_coef", "minibatches",
            "micro_batch_tokens", "max_new_tokens", "temperature", "max_grad_norm")}


def generator(seed, step, purpose):
    state = np.random.SeedSequence([seed, step, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def batch_of(step, size, count, seed):
    """Indices of the step's problems: every problem once, in an order shuffled anew, before any comes again."""
    positions = range((step - 1) * size, step * size)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in {p // count for p in positions}}
    return [int(orders[p // count][p % count]) for p in positions]


# ---- flags -----------------------------------------------------------------------------------------------------------

def parse_flags(argv=None):
    parser = argparse.ArgumentParser(description="Train a learner with S2L-PO (or, with --explorer none, plain GRPO).",
                                     usage="%(prog)s [flags], which --help explains",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("models and problems (without --learner: the laptop family's)").add_argument
    add("--learner", help="model to train: a directory or a Hugging Face hub name")
    add("--explorer", help="frozen model that helps to explore, its rollouts on disk (recipes/pool.py writes POOL.jsonl), or "
        "`none` for plain GRPO")
    add("--data", help="problems to train on: JSONL with `question` and `answer` (recipes/data.py makes it of known data sets)")
    add("--eval-data", help="held-out problems; with --data and without them nothing is evaluated")
    add("--task", choices=TASKS, default="habit", help="the laptop family's task")
    add("--thinking", choices=("on", "off"), help="for chat templates that can, such as Qwen3's; without it the template's own")
    add = parser.add_argument_group("explorer schedule (anneal.py)").add_argument
    add("--schedule", choices=SCHEDULES, default="linear", help="; ".join(f"{name}: {what}" for name, what in SCHEDULES.items()))
    add("--mix-steps", type=int, help="T_mix: where linear and cosine reach 0, and step ends; without it half of --steps")
    add("--explorer-share", type=float, default=0.5, help="the share of --schedule constant")
    add = parser.add_argument_group("rollouts (sample.py)").add_argument
    add("--steps", type=int, default=40, help="T, steps in all")
    add("--prompts-per-step", type=int, default=16, help="P")
    add("--group-size", type=int, default=16, help="G, rollouts per prompt")
    add("--max-new-tokens", type=int, default=16, help="longest response")
    add("--temperature", type=float, default=1.0, help="learner's sampling temperature, also in its log-probs")
    add("--explorer-temperature", type=float, default=1.0, help="the paper's is 0.7")
    add("--explorer-top-p", type=float, default=1.0, help="the paper's is 0.95")
    add("--rollout-rows", type=int, default=1024, help="rows sampled at once, in whole groups: lower it to save memory")
    add = parser.add_argument_group("update (grpo.py)").add_argument
    add("--lr", type=float, default=8e-4, help="AdamW's learning rate, constant; 1e-6 for billions of parameters")
    add("--minibatches", type=int, default=2, help="optimiser steps per training step; with 1 the clip acts on nothing but "
        "--off-policy behaviour")
    add("--micro-batch-tokens", type=int, default=8192, help="tokens per forward and backward pass, prompts and padding counted: "
        "lower it to save memory; the loss is the same")
    add("--checkpoint-layers", action="store_true", help="keep a layer's input only and compute the rest again in the backward "
        "pass: a third more time for far less memory")
    add("--lora-rank", type=int, default=0, help="train adapters of this rank (model.py Linear) in place of all weights; 0: off")
    add("--loss", choices=LOSSES, default="grpo", help="how tokens are weighted; gspo: one ratio per sequence; dr_grpo: "
        "advantages not divided by std")
    add("--off-policy", choices=OFF_POLICY, default="recompute", help="how the explorer's tokens count, which the learner "
        "did not draw: grpo.py off_policy_correction")
    add("--clip-low", type=float, default=0.2, help="ratios are clipped below at 1 - this")
    add("--clip-high", type=float, default=0.2, help="ratios are clipped above at 1 + this")
    add("--kl-coef", type=float, default=0.0, help="weight of the KL to the initial learner; 0 keeps no copy of it")
    add("--max-grad-norm", type=float, default=1.0, help="gradients are scaled down to this norm")
    add = parser.add_argument_group("run").add_argument
    add("--eval-every", type=int, default=5, help="steps between evaluations; 0: only before and after")
    add("--eval-problems", type=int, default=256, help="held-out problems used")
    add("--eval-n", type=int, default=32, help="rollouts per held-out problem")
    add("--save-every", type=int, default=20, help="steps between checkpoints; 0: only at the end")
    add("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")
    add("--seed", type=int, default=0, help="of problems' order, rollouts, mini-batches and evaluations")
    add("--device", default="auto", help="auto: cuda, then mps, then cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights; updates are made in float32")
    add("--compile", choices=("auto", "on", "off"), default="auto",
        help="torch.compile of decoding and log-prob kernel: about a minute; auto: where enough tokens are to be written")
    add("--out", help="directory of the run, new or empty; without it runs/ and the time")
    args = parser.parse_args(argv)
    try:
        check_flags(args)
    except ValueError as error:
        parser.exit(2, f"train.py: error: {error}\n")
    return args


RANGES = {  # flag: (least, most); NaN lies in none
    "steps": (1, 10 ** 9), "mix_steps": (1, 10 ** 9), "prompts_per_step": (1, 10 ** 6), "group_size": (2, 10 ** 6),
    "max_new_tokens": (1, 10 ** 6), "rollout_rows": (1, 10 ** 9), "micro_batch_tokens": (1, 10 ** 9),
    "eval_problems": (1, 10 ** 9), "eval_n": (1, 10 ** 6), "eval_every": (0, 10 ** 9), "save_every": (0, 10 ** 9),
    "seed": (0, 2 ** 63), "lora_rank": (0, 10 ** 5), "explorer_share": (0, 1), "temperature": (1e-3, 100),
    "explorer_temperature": (1e-3, 100), "explorer_top_p": (1e-3, 1), "lr": (0, 1), "clip_low": (0, 1), "clip_high": (0, 10 ** 6),
    "kl_coef": (0, 10 ** 6), "max_grad_norm": (1e-9, 10 ** 9)}


def check_flags(args):
    """Fills in the defaults that depend on other flags. ValueError, one line, for flags that make no sense."""
    args.mix_steps = max(1, args.steps // 2) if args.mix_steps is None else args.mix_steps
    for name, (least, most) in RANGES.items():
        if not least <= getattr(args, name) <= most:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} does not lie between {least:,} and {most:,}")
    if args.mix_steps > args.steps:
        raise ValueError(f"--mix-steps {args.mix_steps} is beyond --steps {args.steps}")
    if not 1 <= args.minibatches <= args.prompts_per_step:
        raise ValueError("--minibatches must be between 1 and --prompts-per-step")
    if args.learner and not (args.explorer and args.data):
        raise ValueError("--learner needs --data, and --explorer: a model, a pool, or `none` for plain GRPO")
    if args.resume and not args.out:
        raise ValueError("--resume needs --out: the directory of the run to continue")
    if not args.learner:
        family = Path("runs", f"family-{args.task}")
        args.learner, args.explorer = str(family / "learner"), args.explorer or str(family / "explorer")
        args.data, args.eval_data = args.data or str(family / "train.jsonl"), args.eval_data or str(family / "heldout.jsonl")
    args.out = args.out or time.strftime("runs/%Y%m%d-%H%M%S")


# ---- loading ---------------------------------------------------------------------------------------------------------

COMPILE_FROM = 5_000_000  # tokens: where torch.compile has earned its minute on the laptop's models (bench/README.md)


@dataclass
class Run:
    """What is loaded, and what has happened so far."""
    learner: Transformer
    tokenizer: object
    problems: list       # [Problem], and the token ids of their prompts
    prompts: list
    eval_problems: list  # [Problem], held out
    reference: Transformer | None = None  # pi_ref, for the KL
    optimizer: Optimizer | None = None
    weights: dict = field(default_factory=dict)  # {"learner": fingerprint of what was loaded, "explorer": ..}
    history: list = field(default_factory=list)  # [metrics of a step]
    curves: dict = field(default_factory=dict)   # {"k": [..], "learner before": pass@k, ..}
    stopped: int = 0     # the signal that came


def load_run(args, open_explorer):
    """(Run, explore). Everything the user typed is checked before anything is made or written. ValueError or OSError, one
    line, on what does not fit."""
    out, family = Path(args.out), Path(args.learner).parent
    if out.exists() and any(out.iterdir()) and not args.resume:
        raise ValueError(f"{out} is there already: --resume continues a run, another --out begins one")
    if out.exists() and any(out.iterdir()) and not (out / "config.json").exists():
        raise ValueError(f"{out} holds something that is no run of train.py")
    device, dtype = pick_device(args.device), getattr(torch, args.dtype)
    for path in filter(None, (args.data, args.eval_data)):
        if Path(path).parent != family:
            load_problems(path)
    if family == Path("runs", f"family-{args.task}") and not family.exists():
        from recipes.family import make_family
        print(f"first run: making the two base models of task `{args.task}`, kept in {family}")
        make_family(family, args.task, device=device)

    learner, tokenizer = load(args.learner, device, dtype)
    problems = load_problems(args.data)
    eval_problems = load_problems(args.eval_data)[:args.eval_problems] if args.eval_data else []
    prompts = [encode(problem.prompt, tokenizer, problem.in_words, args.thinking) for problem in problems + eval_problems]
    check_lengths(learner, prompts, args.max_new_tokens)
    tokens = args.steps * args.prompts_per_step * args.group_size * args.max_new_tokens
    learner.compiled = args.compile == "on" or (args.compile == "auto" and tokens >= COMPILE_FROM and device != "mps")
    learner.checkpoint_layers = args.checkpoint_layers
    run = Run(learner, tokenizer, problems, prompts[:len(problems)], eval_problems, weights={"learner": fingerprint(learner)})
    if args.kl_coef:  # a copy of the learner before any update; with LoRA the same tensors without the adapters
        shared = {id(weight): weight for weight in learner.parameters()} if args.lora_rank else {}
        run.reference = copy.deepcopy(learner, shared).requires_grad_(False)
    if args.lora_rank:
        add_lora(learner, args.lora_rank, generator(args.seed, 0, ADAPTER))
    run.optimizer = Optimizer(learner, args.lr)
    explore = open_explorer(args, run) if args.explorer != "none" else None
    claim(args, run, out)

    count = lambda weights: f"{sum(w.numel() for w in weights):,}"
    print(f"learner   {args.learner}: {count(learner.parameters())} parameters, {count(run.optimizer.weights)} trained at "
          f"{args.lr:g}, {args.dtype} on {device}, compile {'on' if learner.compiled else 'off'}")
    print(f"explorer  {args.explorer}: " + (f"writes by schedule `{args.schedule}`" if explore else "plain GRPO"))
    print(f"problems  {len(problems)} to train on, {len(eval_problems)} held out; the first prompt and its answer:\n"
          f"          {tokenizer.decode(prompts[0])!r}\n          {problems[0].answer!r}")
    return run, explore


def open_explorer(args, run):
    """explore(prompts, n, generator) -> Rollouts [P, n], from --explorer: a frozen model, or rollouts on disk."""
    if args.explorer.endswith(".jsonl"):
        from recipes.pool import Pool
        return Pool(args.explorer, run.learner, args.max_new_tokens).draw
    explorer, tokenizer = load(args.explorer, run.learner.head.device, run.learner.head.dtype)
    a, b = run.tokenizer.get_vocab(), tokenizer.get_vocab()
    if different := sorted(token for token in a.keys() | b.keys() if a.get(token) != b.get(token)):
        raise ValueError(f"the tokenisers of learner and explorer differ in {len(different)} tokens, such as {different[0]!r}, but "
                         "the learner trains on the explorer's ids: recipes/retokenize.py trains on its texts")
    check_lengths(explorer, run.prompts, args.max_new_tokens)
    explorer.requires_grad_(False)
    explorer.compiled, run.weights["explorer"] = run.learner.compiled, fingerprint(explorer)
    # One end for both: else a base learner would learn an instruct explorer's stop token and not stop at it.
    run.learner.stop_ids = explorer.stop_ids = tuple(sorted({*run.learner.stop_ids, *explorer.stop_ids}))
    return partial(sample, explorer, max_new_tokens=args.max_new_tokens, temperature=args.explorer_temperature,
                   top_p=args.explorer_top_p, rows=args.rollout_rows)


# ---- survival: whole checkpoints, found again ------------------------------------------------------------------------

FREE = {"resume", "out", "device", "compile", "eval_every", "save_every", "rollout_rows", "micro_batch_tokens",
        "checkpoint_layers"}  # a resumed run may change them: no part of the experiment
KEEP = 2  # checkpoints


def claim(args, run, out):
    """Makes `out` this run's, or takes up the run in it. ValueError if that was another experiment."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE} | {"weights": run.weights}
    config = out / "config.json"
    if config.exists():
        before = json.loads(config.read_text())
        changed = [f"{name} {before.get(name)} -> {value}" for name, value in settings.items() if before.get(name) != value]
        if changed:
            raise ValueError(f"{out} began with other settings: {', '.join(changed)}")
        restore(run, out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(config, lambda file: file.write(json.dumps(settings, indent=2).encode()))
    (out / "metrics.jsonl").write_text("".join(map(as_json, run.history)))
    (out / "rollouts").mkdir(exist_ok=True)


def write_whole(path, write):
    """write(file), so that `path` then holds all of it, or what it held before, whatever happens."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())  # on the disk before its name is: else a power cut may leave the name of an empty file
    os.replace(partial, path)


def checkpoint(run, out):
    """A run between two steps. No random state and no place in the data: both follow from (seed, step)."""
    state = {"weights": run.optimizer.masters, "adamw": run.optimizer.adamw.state_dict(), "history": run.history,
             "curves": run.curves}
    write_whole(out / f"checkpoint_{run.history[-1]['step']:06d}.pt", lambda file: torch.save(state, file))
    for old in sorted(out.glob("checkpoint_*.pt"))[:-KEEP]:
        old.unlink()


def restore(run, out):
    """Takes up the newest checkpoint whose checksums hold; from the beginning if there is none."""
    for path in sorted(out.glob("checkpoint_*.pt"), reverse=True):
        try:
            if damaged := zipfile.ZipFile(path).testzip():  # torch.load does not look at its checksums
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        except zipfile.BadZipFile as error:
            print(f"warning: {path} is damaged ({error}), going on from the one before", file=sys.stderr)
            continue
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for master, saved in zip(run.optimizer.masters, state["weights"], strict=True):
                master.copy_(saved)
            run.optimizer.copy_masters()
        run.optimizer.adamw.load_state_dict(state["adamw"])
        run.history, run.curves = state["history"], state["curves"]
        break
    print(f"resumed   after step {run.history[-1]['step'] if run.history else 0}")


# ---- the books -------------------------------------------------------------------------------------------------------

def keep_books(args, run, line, batch, rollouts, texts, scores, clock):
    """After a step: evaluates, saves and writes if it is time to, warns of what is amiss. `line`: step, share and update's
    metrics. Returns whether to stop. docs/metrics.md explains each metric."""
    step, out, explorer = line["step"], Path(args.out), rollouts.from_explorer
    rewards, strict, answers = scores.unbind(-1)  # [P, G] each
    right = strict > 0
    by_learner = (right & ~explorer).any(1)  # [P, G] -> [P] groups that the learner solved
    mean = lambda x: x.float().mean().item() if x.numel() else None
    sampling, scoring, training = np.diff(clock).tolist()
    line |= {"rollouts_explorer": int(explorer.sum()), "rollouts_learner": int((~explorer).sum()),
             "reward": mean(rewards), "reward_explorer": mean(rewards[explorer]), "reward_learner": mean(rewards[~explorer]),
             "reward_answer": mean(answers), "groups_all_fail": mean(~right.any(1)), "groups_all_pass": mean(right.all(1)),
             "groups_learner": mean(by_learner), "groups_explorer_only": mean(right.any(1) & ~by_learner),
             "length": mean(rollouts.lengths), "length_explorer": mean(rollouts.lengths[explorer]),
             "length_learner": mean(rollouts.lengths[~explorer]), "truncated": mean(~rollouts.finished),
             "seconds_sampling": sampling, "seconds_scoring": scoring, "seconds_training": training,
             "tokens_per_second": rollouts.lengths.sum().item() / sampling}
    run.history.append(line)
    last = step == args.steps
    if run.eval_problems and (last or (args.eval_every and step % args.eval_every == 0)):
        line |= evaluate_model(args, run, learner_writes(args, run), "learner after" if last else None)
        group = zip(explorer[0].tolist(), rewards[0].tolist(), texts[0])
        (out / "rollouts" / f"step_{step}.txt").write_text(run.problems[batch[0]].question + "\n\n" + "\n".join(
            f"{'explorer' if by_explorer else 'learner'}, reward {r:g}: {text}" for by_explorer, r, text in group))
    with open(out / "metrics.jsonl", "a") as file:
        file.write(as_json(line))
    due = args.save_every and step % args.save_every == 0 and not line["skipped_updates"]
    if last or due or run.stopped:
        checkpoint(run, out)
    tqdm.write(f"step {step}/{args.steps}  reward {line['reward']:.2f}  explorer {line['share']:.0%}")
    if line["truncated"] > 0.5:
        print(f"warning: {line['truncated']:.0%} of the rollouts were cut at --max-new-tokens {args.max_new_tokens}; cut before "
              "the answer they earn nothing", file=sys.stderr)
    if line["skipped_updates"]:
        print(f"warning: step {step}: {line['skipped_updates']} updates skipped, loss or gradient not finite; the step's "
              f"problems, counted from 0: {batch}", file=sys.stderr)
    if len(run.history) >= 5 and all(past.get("skipped_updates") for past in run.history[-5:]):
        raise FloatingPointError(f"loss or gradient not finite in five steps in a row, up to step {step}: a lower --lr in another "
                                 "--out may do")
    return run.stopped


def as_json(line):
    return json.dumps({key: None if isinstance(x, float) and not np.isfinite(x) else x for key, x in line.items()}) + "\n"


def learner_writes(args, run):
    return partial(sample, run.learner, max_new_tokens=args.max_new_tokens, rows=args.rollout_rows)


def evaluate_model(args, run, write, curve_name=None):
    """Held-out metrics of write(prompts, n, generator), with the same random numbers every time, so that evaluations differ
    by the model alone. With a name, its strict pass@k curve is kept."""
    random = generator(args.seed, 0, EVALUATION)
    result = evaluate(write, run.tokenizer, run.eval_problems, args.eval_n, random, args.thinking)
    if curve_name:
        ks = run.curves["k"] = powers_of_two(args.eval_n)
        run.curves[curve_name] = [pass_at_k(result["strict"], args.eval_n, k) for k in ks]
    return {f"eval_{prefix}pass@{k}": pass_at_k(result[kind], args.eval_n, k)
            for prefix, kind in (("", "answer"), ("strict_", "strict")) for k in (1, 16) if k <= args.eval_n}


def evaluate_base_models(args, run, explore):
    if run.history or not run.eval_problems:
        return
    print(f"pass@k before training: {len(run.eval_problems)} held-out problems, {args.eval_n} rollouts each")
    line = {"step": 0} | evaluate_model(args, run, learner_writes(args, run), "learner before")
    if explore and not args.explorer.endswith(".jsonl"):  # a pool has no rollouts of held-out problems
        evaluate_model(args, run, explore, "explorer")
    print(table(run.curves["k"], {name: curve for name, curve in run.curves.items() if name != "k"}))
    run.history.append(line)
    (Path(args.out) / "metrics.jsonl").write_text(as_json(line))


def finish(args, run):
    """Saves the learner, draws the picture, says what came out."""
    out, evals = Path(args.out), [line for line in run.history if "eval_pass@1" in line]
    (out / "pass_at_k.json").write_text(json.dumps(run.curves))
    save(run.learner, run.tokenizer, out / "learner")
    draw_run(out / "curve.png", run.history, run.curves)
    if len(evals) > 1:
        print(f"\n{'held out':16}{'before':>10}{'step ' + str(evals[-1]['step']):>10}")
        for key in (key for key in evals[-1] if key.startswith("eval_") and key in evals[0]):
            print(f"{key.removeprefix('eval_').replace('_', ' '):16}{evals[0][key]:10.3f}{evals[-1][key]:10.3f}")
    print(f"\neverything is in {out}: " + ", ".join(sorted(path.name for path in out.iterdir())))
    if run.history and run.history[-1]["step"] < args.steps:
        print(f"stopped after step {run.history[-1]['step']}: the same command with --out {out} --resume goes on")


def listen(run):
    """Ctrl-C and SIGTERM let the step end, which then is saved; a second one leaves at once."""
    def note(number, frame):
        run.stopped = number
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nfinishing this step, then saving; once more quits at once\n")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)


OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|ALLOC_FAILED")  # CUDA's and MPS's; the CPU's; cuBLAS's


def main(loop=train, open_explorer=open_explorer):
    """Recipes give another loop, or another value of the seam `explore`. Exit codes: 2 bad input or a full disk, 3 out of
    memory, 4 not finite, 128 + n signal n."""
    try:
        args = parse_flags()
        run, explore = load_run(args, open_explorer)
        listen(run)
        evaluate_base_models(args, run, explore)
        loop(args, run, explore)
        finish(args, run)
    except (ValueError, OSError) as error:
        fail(2, error)
    except FloatingPointError as error:
        fail(4, error)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        fail(3, "out of memory: lower --rollout-rows if it was sampling, --micro-batch-tokens if it was training, or see "
                "recipes/plan.py; --resume goes on from the last checkpoint")
    except KeyboardInterrupt:  # while loading: there is nothing to save yet
        sys.exit(130)
    sys.exit(128 + run.stopped if run.stopped else 0)


def fail(code, error):
    print(f"train.py: error: {str(error).partition(chr(10))[0]}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
