"""S2L-PO: GRPO on a large learner with a frozen small explorer in its rollout groups (arXiv 2605.30789).

    python train.py                       the laptop run: makes its two models the first time, then trains
    python train.py --explorer none       the same without an explorer: plain GRPO
    python train.py --learner Qwen/Qwen3-1.7B-Base --explorer Qwen/Qwen3-0.6B-Base --data gsm8k.jsonl

`train` is the paper's Algorithm 1. All below it loads, keeps the books and survives: kill a run at any
moment, and the same command with --resume goes on from its last checkpoint. Random numbers depend on (seed,
step, purpose) alone. On a CPU the same seed therefore gives the same metrics to the last digit, but for
clocks, and a resumed run equals an unbroken one.

Not the paper's by default: batch and learning rate (a laptop's), the explorer's sampling (temperature 1
without nucleus; the paper: 0.7 and 0.95) and the KL penalty (off; the paper: 0.001).

Shapes: P prompts a step, G rollouts a prompt (one group).
"""
import argparse
import copy
import hashlib
import importlib.util
import json
import os
import signal
import sys
import time
import zipfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: threads that spin for long starve others

import numpy as np
import torch

from anneal import SCHEDULES, explorer_share, split_group
from eval import evaluate, pass_at_k, powers_of_two, table
from grpo import LOSSES, OFF_POLICY, Optimizer, group_advantages, update
from model import Transformer, add_lora, fingerprint, load, out_of_memory, pick_device, save
from reward import SYNTHETIC, load_problems, score
from sample import check_lengths, decode, encode, join, sample

LEARNER, EXPLORER, MINIBATCH, EVALUATION, ADAPTER = range(5)  # what a random stream is for


def train(args, run, explore):
    """S2L-PO, Algorithm 1. explore(prompts, n, generator) writes the explorer's rollouts [P, n].
    Without it (None) this is plain GRPO."""
    for step in range(last_step(run) + 1, args.steps + 1):                           # for i = 1..T
        random = partial(generator, args.seed, step)
        batch = batch_of(step, args.prompts_per_step, len(run.problems), args.seed)
        problems, prompts = [run.problems[i] for i in batch], [run.prompts[i] for i in batch]
        clock = [time.perf_counter()]

        # 1. Who writes how much of each group
        share = 0.0
        if explore:
            share = explorer_share(step, args.mix_steps, args.schedule, args.explorer_share, past_steps(run))
        at_least = int(args.schedule == "measured")  # to be measured, the learner must write
        n_explorer, n_learner = split_group(share, args.group_size, at_least)        # alpha_i -> G_w, G_s

        # 2. Rollouts: one group a prompt
        explored = own = None
        if n_explorer:
            explored = explore(prompts, n_explorer, random(EXPLORER))                # sample(pi_omega, G_w)
        if n_learner:
            own = sample(run.learner, prompts, n_learner, random(LEARNER), args.max_new_tokens,
                         args.temperature, rows=args.rollout_rows)                   # sample(pi_theta, G_s)
        rollouts = join(explored, own)                                               # O [P, G]
        clock.append(time.perf_counter())

        # 3. Rewards (a score is reward, strict, answer)  4. Advantages, over the combined group
        scores = score_all(problems, decode(rollouts, run.tokenizer)).to(rollouts.ids.device)  # [P, G, 3]
        advantages = group_advantages(scores[..., 0], scale=args.loss != "dr_grpo")  # [P, G]
        clock.append(time.perf_counter())

        # 5. theta <- GRPO update
        metrics, tokens = update(run.learner, run.reference, run.optimizer, prompts, rollouts, advantages,
                                 random(MINIBATCH), **update_settings(args))
        clock.append(time.perf_counter())

        # The books
        keep_books(args, run, {"step": step, "share": share} | metrics, batch, rollouts, scores, advantages,
                   tokens, clock)
        if run.stopped:
            break


def generator(seed, step, purpose):
    """A torch.Generator of its own for every use of randomness: nothing random needs to be saved."""
    state = np.random.SeedSequence([seed, step, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def batch_of(step, size, count, seed):
    """Indices of the step's problems: each comes once, in an order shuffled anew, before any comes again."""
    positions = range((step - 1) * size, step * size)
    epochs = {position // count for position in positions}
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs}
    return [int(orders[position // count][position % count]) for position in positions]


def score_all(problems, texts):
    """Scores [P, G, (reward, strict, answer)] of texts [P][G]."""
    scores = [[score(problem, text) for text in group] for problem, group in zip(problems, texts)]
    return torch.tensor(scores, dtype=torch.float32)


def update_settings(args):
    """The flags that grpo.py's `update` takes, by its names for them."""
    return {name: getattr(args, name) for name in (
        "loss", "off_policy", "clip_low", "clip_high", "kl_coef", "minibatches", "micro_batch_tokens",
        "max_new_tokens", "temperature", "max_grad_norm")}


# ---- flags -------------------------------------------------------------------------------------------------

def parse_flags(argv=None):
    """Namespace of all flags, checked. Exits with one line on what makes no sense."""
    parser = argparse.ArgumentParser(
        description="Train a learner with S2L-PO, or plain GRPO (--explorer none). In brackets: the default.",
        usage="%(prog)s [flags], which --help explains")
    choices = "; ".join(f"{name}: {what}" for name, what in SCHEDULES.items())
    add = parser.add_argument_group("models and problems (without --learner the laptop's)").add_argument
    add("--learner", help="model to train: a directory or a Hugging Face hub name")
    add("--explorer", help="frozen model that explores; or its rollouts, .jsonl by recipes/pool.py; or none")
    add("--data", help="problems: JSONL with question and answer; recipes/data.py makes it of data sets")
    add("--eval-data", help="held-out problems; with --learner and without them nothing is evaluated")
    add("--task", choices=SYNTHETIC, default="habit", help="the laptop family's task (habit)")
    add("--thinking", choices=("on", "off"), help="for chat templates that can (the template's own)")
    add = parser.add_argument_group("explorer schedule (anneal.py)").add_argument
    add("--schedule", choices=SCHEDULES, default="linear", help=f"{choices} (linear)")
    add("--mix-steps", type=int, help="T_mix: linear and cosine reach 0 there (half of --steps)")
    add("--explorer-share", type=float, default=0.5, help="the share of --schedule constant (0.5)")
    add = parser.add_argument_group("rollouts (sample.py)").add_argument
    add("--steps", type=int, default=40, help="T, steps in all; a resumed run may be given more (40)")
    add("--prompts-per-step", type=int, default=16, help="P (16)")
    add("--group-size", type=int, default=16, help="G, rollouts per prompt (16)")
    add("--max-new-tokens", type=int, help="longest response (16; with --learner 512)")
    add("--temperature", type=float, default=1.0, help="the learner's, also in its log-probs (1)")
    add("--explorer-temperature", type=float, default=1.0, help="the paper's is 0.7 (1)")
    add("--explorer-top-p", type=float, default=1.0, help="the paper's is 0.95 (1)")
    add("--rollout-rows", type=int, default=1024, help="rows sampled at once: lower it to save memory (1024)")
    add = parser.add_argument_group("update (grpo.py)").add_argument
    add("--lr", type=float, help="AdamW's, constant (8e-4; with --learner 1e-6, with --lora-rank too 1e-5)")
    add("--minibatches", type=int, default=2,
        help="optimiser steps in a step; with 1 nothing is clipped, except with `--off-policy behaviour` (2)")
    add("--micro-batch-tokens", type=int, default=8192, help="run at once: lower it to save memory (8192)")
    add("--checkpoint-layers", action="store_true", help="recompute activations: slower, far less memory")
    add("--lora-rank", type=int, default=0, help="train adapters of this rank, not all weights; 0: off (0)")
    add("--loss", choices=LOSSES, default="grpo", help="weight of tokens: grpo.py token_weights (grpo)")
    add("--off-policy", choices=OFF_POLICY, default="recompute",
        help="how the explorer's tokens count: grpo.py off_policy_correction (recompute)")
    add("--clip-low", type=float, default=0.2, help="ratios are clipped below at 1 - this; 1: never (0.2)")
    add("--clip-high", type=float, default=0.2, help="ratios are clipped above at 1 + this (0.2)")
    add("--kl-coef", type=float, default=0.0, help="KL to the initial learner; the paper's is 0.001 (0)")
    add("--max-grad-norm", type=float, default=1.0, help="gradients are scaled down to this norm (1)")
    add = parser.add_argument_group("run").add_argument
    add("--eval-every", type=int, default=5, help="steps between evaluations; 0: only before and after (5)")
    add("--eval-problems", type=int, help="held-out problems used (256; with --learner 64)")
    add("--eval-n", type=int, help="rollouts per held-out problem (32; with --learner 4)")
    add("--save-every", type=int, default=20, help="steps between checkpoints; 0: only at the end (20)")
    add("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")
    add("--seed", type=int, default=0, help="of problems' order, rollouts, mini-batches and evaluations (0)")
    add("--device", default="auto", help="auto: cuda, then mps, then cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights; masters are float32")
    add("--compile", action="store_true", help="costs a minute and pays from some 5 million tokens on")
    add("--log", choices=("tensorboard", "wandb", "trackio"), help="where metrics go besides metrics.jsonl")
    add("--out", help="directory of the run, new or empty (runs/ and the time)")
    args = parser.parse_args(argv)
    try:
        resolve(args)
    except ValueError as error:
        parser.exit(2, f"train.py: error: {error}\n")
    return args


RANGES = {  # flag: (least, most); NaN lies in none
    "steps": (1, 1e9), "prompts_per_step": (1, 1e6), "group_size": (2, 1e6), "max_new_tokens": (1, 1e6),
    "rollout_rows": (1, 1e9), "temperature": (1e-3, 100), "explorer_temperature": (1e-3, 100),
    "explorer_top_p": (1e-3, 1), "explorer_share": (0, 1), "lr": (0, 1), "micro_batch_tokens": (1, 1e9),
    "lora_rank": (0, 1e5), "clip_low": (0, 1), "clip_high": (0, 1e9), "kl_coef": (0, 1e9),
    "max_grad_norm": (1e-9, 1e9), "eval_every": (0, 1e9), "eval_problems": (1, 1e9), "eval_n": (1, 1e6),
    "save_every": (0, 1e9), "seed": (0, 1e18)}


def resolve(args):
    """Fills in defaults that depend on other flags. ValueError, one line, for flags that make no sense."""
    if args.resume and not args.out:
        raise ValueError("--resume needs --out: the directory of the run to continue")
    if args.log and not importlib.util.find_spec(args.log):
        raise ValueError(f"--log {args.log}: pip install {args.log}")
    if args.learner and not (args.explorer and args.data):
        raise ValueError("--learner needs --data, and --explorer: a model, a pool, or `none` for plain GRPO")
    defaults = {"out": time.strftime("runs/%Y%m%d-%H%M%S"), "mix_steps": max(1, args.steps // 2)}
    if args.resume and Path(args.out, "config.json").exists():  # if it gets longer, T_mix stays as it was
        before = json.loads(Path(args.out, "config.json").read_text())
        defaults["mix_steps"] = before.get("mix_steps", defaults["mix_steps"])
    if args.learner:
        lr = 1e-5 if args.lora_rank else 1e-6
        defaults |= {"lr": lr, "max_new_tokens": 512, "eval_problems": 64, "eval_n": 4}
    else:
        family = family_of(args.task)
        defaults |= {"lr": 8e-4, "max_new_tokens": 16, "eval_problems": 256, "eval_n": 32,
                     "learner": f"{family}/learner", "explorer": f"{family}/explorer",
                     "data": f"{family}/train.jsonl", "eval_data": f"{family}/heldout.jsonl"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    ranges = RANGES | {"mix_steps": (1, args.steps), "minibatches": (1, args.prompts_per_step)}
    for name, (least, most) in ranges.items():
        if not least <= (value := getattr(args, name)) <= most:
            raise ValueError(f"--{name.replace('_', '-')} {value}: not between {least:g} and {most:g}")


def family_of(task):
    """Directory of a laptop family: beside the code, wherever the run is started."""
    return os.path.relpath(Path(__file__).parent / "runs" / f"family-{task}")


# ---- loading -----------------------------------------------------------------------------------------------

@dataclass
class Run:
    """What is loaded, and what has happened so far."""
    learner: Transformer
    tokenizer: object
    reference: Transformer | None  # pi_ref, for the KL
    optimizer: Optimizer
    problems: list       # [Problem]
    prompts: list        # the token ids of each
    eval_problems: list  # [Problem], held out
    hashes: dict         # {"learner": .., "explorer": .., "problems": ..}, of what was loaded
    history: list = field(default_factory=list)  # metrics of each step; step 0 is the base models' evaluation
    log: object = lambda line: None  # of --log
    stopped: int = 0     # the signal that came


def last_step(run):
    return run.history[-1]["step"] if run.history else 0


def past_steps(run):
    return [line for line in run.history if line["step"] > 0]


def load_run(args, open_explorer):
    """(Run, explore). What can be checked is, before anything is made. ValueError or OSError, one line."""
    out, family = Path(args.out), Path(family_of(args.task))
    there = [path for path in out.glob("*") if path.suffix != ".partial"]  # which a killed run leaves
    if out.is_file():
        raise ValueError(f"--out {out} is a file, not a directory")
    if there and args.resume and not (out / "config.json").exists():
        raise ValueError(f"--resume: {out} holds no run")
    if there and not args.resume:
        raise ValueError(f"{out} is there already: --resume continues a run, another --out begins one")
    device, dtype = pick_device(args.device), getattr(torch, args.dtype)
    if Path(args.learner) == family / "learner" and not family.exists():
        for path in filter(None, (args.data, args.eval_data)):
            if Path(path).parent != family:
                load_problems(path)
        from recipes.family import make_family
        print(f"first run: making the two base models of task `{args.task}`, kept in {family}")
        make_family(family, args.task, device=device)

    learner, tokenizer = load(args.learner, device, dtype)
    problems, prompts = read_problems(args, learner, tokenizer, args.data)
    held_out = read_problems(args, learner, tokenizer, args.eval_data)[0] if args.eval_data else []
    held_out = held_out[:args.eval_problems]
    asked = lambda problems: {" ".join(problem.question.split()) for problem in problems}
    if seen := asked(problems) & asked(held_out):
        print(f"warning: {len(seen)} held-out questions are in --data too: pass@k there is not held out",
              file=sys.stderr)
    learner.compiled, learner.checkpoint_layers = args.compile, args.checkpoint_layers
    texts = hashlib.sha256(f"{problems}{prompts}{held_out}".encode()).hexdigest()
    hashes, reference = {"learner": fingerprint(learner), "explorer": None, "problems": texts[:16]}, None
    if args.kl_coef:  # the learner as it began; with LoRA the same tensors, not copied, without adapters
        shared = {id(weight): weight for weight in learner.parameters()} if args.lora_rank else {}
        reference = copy.deepcopy(learner, shared).requires_grad_(False)
    if args.lora_rank:
        add_lora(learner, args.lora_rank, generator(args.seed, 0, ADAPTER))
    run = Run(learner, tokenizer, reference, Optimizer(learner, args.lr), problems, prompts, held_out, hashes)
    explore = open_explorer(args, run) if args.explorer != "none" else None
    claim(args, run, out)
    if args.log:
        from recipes.log import open_log
        run.log = open_log(args, last_step(run))

    count = lambda weights: f"{sum(w.numel() for w in weights):,}"
    print(f"learner   {args.learner}: {count(learner.parameters())} parameters, "
          f"{count(run.optimizer.weights)} trained at {args.lr:g}, {args.dtype} on {device}\n"
          f"explorer  {args.explorer}: {f'schedule {args.schedule}' if explore else 'plain GRPO'}\n"
          f"a step    {args.prompts_per_step} prompts x {args.group_size} rollouts of up to "
          f"{args.max_new_tokens} tokens, {args.minibatches} mini-batches\n"
          f"problems  {len(problems)} to train on, {len(held_out)} held out; first prompt and its answer:\n"
          f"          {tokenizer.decode(prompts[0])!r}, {problems[0].answer!r}\n"
          "The loss stays near 0, as it should (README.md): watch the reward.")
    return run, explore


def read_problems(args, learner, tokenizer, path):
    """(problems of a file, their prompts), without those that leave no room for a response. ValueError if
    none does, or the tokeniser loses text."""
    problems, context = load_problems(path), learner.config.max_position_embeddings
    prompts = [encode(p.prompt, tokenizer, p.in_words, args.thinking) for p in problems]
    kept = {*"".join(map(tokenizer.decode, prompts))}
    if lost := {c for problem in problems for c in problem.question if "!" <= c <= "~"} - kept:
        raise ValueError(f"{path}: {args.learner}'s tokeniser has no tokens for {''.join(sorted(lost))!r}")
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) + args.max_new_tokens <= context]
    if len(fits) < len(problems):
        print(f"{path}: {len(problems) - len(fits):,} of {len(problems):,} problems left out: too long for "
              f"the context of {context} tokens with --max-new-tokens {args.max_new_tokens}")
    problems, prompts = [problems[i] for i in fits], [prompts[i] for i in fits]
    if not problems:
        raise ValueError(f"{path}: no problem is left: lower --max-new-tokens")
    check_lengths(learner, prompts, args.max_new_tokens)
    return problems, prompts


def open_explorer(args, run):
    """explore(prompts, n, generator) -> Rollouts [P, n] of --explorer, a frozen model or rollouts on disk.
    Both models stop at the stop tokens of either. Else a base learner would learn to write an instruct
    explorer's stop token, and not stop at it."""
    if args.explorer.endswith(".jsonl"):
        from recipes.pool import open_pool
        return open_pool(args, run)
    explorer, tokenizer = load(args.explorer, run.learner.head.device, run.learner.head.dtype)
    a, b = run.tokenizer.get_vocab(), tokenizer.get_vocab()
    if different := sorted({token for token, _ in a.items() ^ b.items()}):
        raise ValueError(f"the tokenisers of learner and explorer differ in {len(different)} tokens, such as "
                         f"{different[0]!r}: recipes/retokenize.py trains on texts, not on ids")
    held_out = [encode(p.prompt, run.tokenizer, p.in_words, args.thinking) for p in run.eval_problems]
    for prompts in (run.prompts, held_out):
        check_lengths(explorer, prompts, args.max_new_tokens)
    run.hashes["explorer"] = fingerprint(explorer.requires_grad_(False))
    run.learner.stop_ids = explorer.stop_ids = tuple(sorted({*run.learner.stop_ids, *explorer.stop_ids}))
    explorer.compiled = run.learner.compiled
    return partial(sample, explorer, max_new_tokens=args.max_new_tokens, rows=args.rollout_rows,
                   temperature=args.explorer_temperature, top_p=args.explorer_top_p)


# ---- survival: whole checkpoints, found again --------------------------------------------------------------

FREE = {"resume", "out", "log", "steps", "device", "compile", "eval_every", "save_every", "rollout_rows",
        "micro_batch_tokens", "checkpoint_layers"}  # a resumed run may change them


def write_whole(path, write):
    """write(file), so that `path` then holds all of it, or what it held before, whatever happens."""
    beside = path.with_name(path.name + ".partial")
    with open(beside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave the name of an empty file
    os.replace(beside, path)


def claim(args, run, out):
    """Makes `out` this run's, or takes up the run in it. ValueError if that was another experiment."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    settings |= {f"hash_of_{name}": value for name, value in run.hashes.items()}
    if (out / "config.json").exists():
        before = json.loads((out / "config.json").read_text())
        known = {"learner", "explorer", "data", "eval_data"}  # by their hashes, wherever they lie
        if changed := [f"{name} {before.get(name)} -> {settings[name]}"
                       for name in sorted(settings.keys() - known) if settings[name] != before.get(name)]:
            raise ValueError(f"{out} began with other settings: {', '.join(changed)}")
        restore(run, out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "config.json", lambda file: file.write(json.dumps(settings, indent=2).encode()))
    (out / "rollouts").mkdir(exist_ok=True)
    for path in (out / "rollouts").glob("step_*.json"):  # of steps to come again; one may be cut short
        if int(path.stem.removeprefix("step_")) > last_step(run):
            path.unlink()
    (out / "metrics.jsonl").write_text("".join(map(as_json, run.history)))


def save_checkpoint(run, out):
    """A run between two steps. No random state and no place in the data: both follow from (seed, step)."""
    optimizer = run.optimizer
    state = {"weights": optimizer.masters, "adamw": optimizer.adamw.state_dict(), "history": run.history}
    write_whole(out / f"checkpoint_{last_step(run):06d}.pt", lambda file: torch.save(state, file))
    for old in sorted(out.glob("checkpoint_*.pt"))[:-2]:
        old.unlink()


def restore(run, out):
    """Takes up the newest checkpoint whose checksums hold. From the beginning if none was written yet.
    ValueError if all there are damaged."""
    damaged = None
    for path in sorted(out.glob("checkpoint_*.pt"), reverse=True):
        try:
            damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look at its checksums
        except Exception as error:  # in a damaged header zipfile trips over anything
            damaged = error
        if not damaged:
            state = torch.load(path, map_location="cpu", weights_only=True)
            run.optimizer.restore(state["weights"], state["adamw"])
            run.history = state["history"]
            break
        print(f"warning: {path} is damaged ({damaged})", file=sys.stderr)
    if damaged:
        raise ValueError(f"no checkpoint in {out} can be read: remove that directory to begin anew")
    print(f"resumed   after step {last_step(run)}")


# ---- the books ---------------------------------------------------------------------------------------------

def keep_books(args, run, line, batch, rollouts, scores, advantages, tokens, clock):
    """After a step: measures, reports, evaluates, writes and saves where it is time to. `line`: the step, its
    share, and update's metrics; `tokens`: update's other value."""
    step, out, problems = line["step"], Path(args.out), [run.problems[i] for i in batch]
    line |= measure(rollouts, scores, clock)
    run.history.append(line)
    last = step == args.steps
    due = lambda every: every and step % every == 0
    if run.eval_problems and (last or due(args.eval_every)):
        line |= evaluate_model(args, run, learner_of(args, run))
    with open(out / "metrics.jsonl", "a") as file:
        file.write(as_json(line))
    run.log(line)
    report(args, run, line, batch)
    if last or step == 1 or due(args.eval_every):
        from recipes import look
        look.draw(out, run.history, len(run.eval_problems))
        if step == 1:
            look.show_rollouts(problems, rollouts, scores, run.tokenizer)
        if tokens:
            look.note(out, step, problems, rollouts, scores, advantages, tokens, run.tokenizer)
    if len(run.history) >= 5 and all(past.get("skipped_updates") for past in run.history[-5:]):
        raise FloatingPointError(f"loss or gradient not finite in five steps, up to {step}: try a lower --lr")
    if last or run.stopped or due(args.save_every) and not line["skipped_updates"]:
        save_checkpoint(run, out)


def measure(rollouts, scores, clock):
    """Metrics of a step's rollouts [P, G] and scores [P, G, 3], which docs/metrics.md explains, and of its
    phases: clock has the times at their ends."""
    explorer, rewards, right = rollouts.from_explorer, scores[..., 0], scores[..., 1] > 0  # [P, G] each
    by_learner = (right & ~explorer).any(1)  # [P, G] -> [P] the learner solved it
    mean = lambda x: x.float().mean().item() if x.numel() else None
    seconds = dict(zip(("seconds_sampling", "seconds_scoring", "seconds_training"), np.diff(clock).tolist()))
    return seconds | {
        "rollouts_explorer": int(explorer.sum()), "rollouts_learner": int((~explorer).sum()),
        "reward": mean(rewards), "reward_explorer": mean(rewards[explorer]),
        "reward_learner": mean(rewards[~explorer]), "reward_answer": mean(scores[..., 2]),
        "groups_all_fail": mean(~right.any(1)), "groups_all_pass": mean(right.all(1)),
        "groups_informative": mean(rewards.amax(1) > rewards.amin(1)),
        "groups_learner": mean(by_learner), "groups_explorer_only": mean(right.any(1) & ~by_learner),
        "length": mean(rollouts.lengths), "length_explorer": mean(rollouts.lengths[explorer]),
        "length_learner": mean(rollouts.lengths[~explorer]), "truncated": mean(~rollouts.finished),
        "tokens_per_second": rollouts.lengths.sum().item() / seconds["seconds_sampling"]}


def report(args, run, line, batch):
    """Prints a step's line, and warnings."""
    step, recent = line["step"], past_steps(run)[-5:]
    phases = "seconds_sampling", "seconds_scoring", "seconds_training"
    seconds = [sum(past[phase] for phase in phases) for past in recent]
    left = (args.steps - step) * np.mean(seconds)
    left = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
    by = [f"{who} {line[f'reward_{who}']:.3f}" for who in ("explorer", "learner") if line[f"rollouts_{who}"]]
    held_out = f"   held out {line['eval_strict_pass@1']:.3f}" if "eval_curve" in line else ""
    print(f"step {step:3d}/{args.steps}   explorer {line['share']:4.0%}   reward {line['reward']:.3f} "
          f"({', '.join(by)})   {seconds[-1]:.1f} s, {left} left{held_out}", flush=True)
    warn = partial(print, "warning:", file=sys.stderr)
    if line["truncated"] > 0.5:
        warn(f"{line['truncated']:.0%} of the rollouts were cut at --max-new-tokens {args.max_new_tokens}, "
             "perhaps before an answer")
    if line["skipped_updates"]:
        warn(f"{line['skipped_updates']} updates skipped, loss or gradient not finite; problems {batch}")
    if len(recent) > 2 and not any(past["groups_informative"] for past in recent[-3:]):
        warn("nothing was learnt in three steps: in every group all rewards were equal. Do the rollouts in "
             f"{args.out}/rollouts.html end with an answer? Are the problems too hard, or too easy?")


def as_json(line):
    finite = lambda x: None if isinstance(x, float) and not np.isfinite(x) else x
    return json.dumps({key: finite(x) for key, x in line.items()}) + "\n"


def learner_of(args, run):
    return partial(sample, run.learner, max_new_tokens=args.max_new_tokens, rows=args.rollout_rows)


def evaluate_model(args, run, write):
    """Held-out metrics of write(prompts, n, generator), with the same random numbers every time, so that
    evaluations differ by the model alone."""
    n, random = args.eval_n, generator(args.seed, 0, EVALUATION)
    result = evaluate(write, run.tokenizer, run.eval_problems, n, random, args.thinking)
    metrics = {f"eval_{prefix}pass@{k}": pass_at_k(result[kind], n, k)
               for prefix, kind in (("", "answer"), ("strict_", "strict")) for k in (1, 16) if k <= n}
    return metrics | {"eval_curve": [pass_at_k(result["strict"], n, k) for k in powers_of_two(n)]}


def evaluate_base_models(args, run, explore):
    """pass@k before training, printed and kept as step 0: of the learner at temperature 1, as in all
    evaluations, and of the explorer as it will sample."""
    if run.history or not run.eval_problems:
        return
    print(f"pass@k before training: {len(run.eval_problems)} problems x {args.eval_n} rollouts", flush=True)
    line = {"step": 0} | evaluate_model(args, run, learner_of(args, run))
    curves = {"learner": line["eval_curve"]}
    if explore and not args.explorer.endswith(".jsonl"):  # a pool has no rollouts of held-out problems
        curves["explorer"] = line["explorer_curve"] = evaluate_model(args, run, explore)["eval_curve"]
    print(table(powers_of_two(args.eval_n), curves), flush=True)
    run.history.append(line)
    run.log(line)
    (Path(args.out) / "metrics.jsonl").write_text(as_json(line))


def finish(args, run):
    """Saves the learner, draws the picture, says what came out."""
    out, evals = Path(args.out), [line for line in run.history if "eval_pass@1" in line]
    save(run.learner, run.tokenizer, out / "learner")
    if len(evals) > 1:
        print(f"\n{'held out':16}{'before':>10}{'step ' + str(evals[-1]['step']):>10}")
        for key in (key for key in evals[-1] if "pass@" in key):
            name = key.removeprefix("eval_").replace("_", " ")
            print(f"{name:16}{evals[0][key]:10.3f}{evals[-1][key]:10.3f}")
    print(f"\neverything is in {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if last_step(run) < args.steps:
        print(f"stopped after step {last_step(run)}: the same command with --out {out} --resume goes on")


# ---- from start to end -------------------------------------------------------------------------------------

def listen(run):
    """Ctrl-C and SIGTERM let the step end, which is then saved. A second one leaves at once."""
    def note(number, frame):
        run.stopped = number
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nfinishing this step, then saving; once more quits at once\n")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)


def fail(code, error):
    print(f"train.py: error: {str(error).partition(chr(10))[0]}", file=sys.stderr)
    sys.exit(code)


def main(argv=None, loop=train, open_explorer=open_explorer, recipe=None):
    """Recipes give another loop and its name, or an open_explorer(args, run) that returns another `explore`
    and notes in run.hashes["explorer"] what a resumed run must find again.
    Exit codes: 2 bad input or a full disk, 3 out of memory, 4 NaN, 128 + n signal n."""
    run = None
    try:
        args = parse_flags(argv)
        args.recipe = recipe  # one of the settings, which a resumed run must have again
        run, explore = load_run(args, open_explorer)
        listen(run)
        evaluate_base_models(args, run, explore)
        loop(args, run, explore)
        finish(args, run)
    except (ValueError, OSError) as error:
        if run and isinstance(error, ValueError):
            raise  # nothing that the user typed: the traceback is wanted
        fail(2, error)
    except FloatingPointError as error:
        fail(4, error)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error.__context__, OSError):  # a full disk, over which torch.save raises its own
            fail(2, error.__context__)
        if not out_of_memory(error):
            raise
        fail(3, "out of memory: lower --rollout-rows (sampling) or --micro-batch-tokens (training), or ask "
                "recipes/plan.py; --resume goes on from the last checkpoint")
    except KeyboardInterrupt:  # while loading: there is nothing to save yet
        sys.exit(130)
    sys.exit(128 + run.stopped if run.stopped else 0)


if __name__ == "__main__":
    main()
