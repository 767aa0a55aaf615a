"""S2L-PO: GRPO on a large learner with a frozen small explorer in its rollout groups (arXiv 2605.30789).

    python train.py                       the laptop run: makes its two models the first time, then trains
    python train.py --explorer none       the same without an explorer: plain GRPO
    python train.py --learner Qwen/Qwen3-1.7B-Base --explorer Qwen/Qwen3-0.6B-Base --data gsm8k.jsonl

`train` and `learn` are the paper's Algorithm 1. Below them stand the flags, and what is loaded. How a run
survives being killed, and what it writes down, is in plumbing/.

Not the paper's by default: batch and learning rate (a laptop's), the explorer's sampling (temperature 1
without nucleus; the paper: 0.7 and 0.95) and the KL penalty (off; the paper: 0.001).

Shapes: P prompts a step, G rollouts a prompt (one group).
"""
import argparse
import copy
import hashlib
import importlib.util
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import plumbing  # before torch, which reads a variable that it sets

import torch

from anneal import SCHEDULES, explorer_share, split_group
from grpo import LOSSES, OFF_POLICY, Objective, advantages_of, update
from model import Transformer, add_lora
from plumbing.books import announce, finish, keep_books, open_books
from plumbing.checkpoint import fingerprint, load
from plumbing.log import open_log
from plumbing.optimizer import Optimizer
from plumbing.pool import open_pool
from plumbing.problems import load_problems, scorer_hash
from plumbing.steps import ADAPTER, EXPLORER, LEARNER, MINIBATCH, generator, last_step, steps
from plumbing.survival import check_place, claim, listen, save_checkpoint, settings_of
from plumbing.terminal import one_line, pick_device
from plumbing.text import decode, encode_all, stop_texts
from reward import SYNTHETIC, score
from sample import check_lengths, join, sample, signed


def train(args, run, explore):
    """S2L-PO, Algorithm 1. explore(prompts, n, generator) writes the explorer's rollouts [P, n].
    Without it (None) this is plain GRPO."""
    write = writer(args, run, run.learner, args.temperature)
    for step in steps(args, run):                                                    # for i = 1..T
        # 1. Who writes how much of each group
        share = share_of(args, step, explore)                                        # alpha_i
        n_explorer, n_learner = split_group(share, args.group_size)                  # G_w, G_s

        # 2. Rollouts: one group a prompt
        parts = []
        if n_explorer:
            parts.append(explore(step.prompts, n_explorer, step.random(EXPLORER)))   # sample(pi_omega, G_w)
        if n_learner:
            parts.append(write(step.prompts, n_learner, step.random(LEARNER)))       # sample(pi_theta, G_s)
        learn(run, step, join(*parts))                                               # O [P, G]
        keep_books(args, run, step, share=share)


def learn(run, step, rollouts, objective=None, advantages=advantages_of):
    """Algorithm 1 from the rollouts on; the step keeps what comes of it. Variants give another objective than
    the flags', or another function of (rewards, from_explorer, objective)."""
    step.lap("sampling")
    objective = objective or run.objective

    # 3. Rewards: reward, strict, answer of each rollout
    step.scores = score_all(step.problems, decode(rollouts, run.tokenizer))          # [P, G, 3]

    # 4. Advantages, over the combined group
    A = advantages(step.scores[..., 0], rollouts.from_explorer.cpu(), objective)     # [P, G]
    step.lap("scoring")

    # 5. theta <- GRPO update
    run.busy = True  # a signal waits from here until keep_books has entered the step, and saved it if due
    step.metrics, step.tokens = update(run.learner, run.reference, run.optimizer, step.prompts, rollouts,
                                       A.to(rollouts.ids.device), objective, step.random(MINIBATCH))
    step.rollouts, step.advantages = rollouts, A
    step.lap("training")


def share_of(args, step, explore):
    """alpha_i of a step; 0 without an explorer."""
    return explorer_share(step.number, args.mix_steps, args.schedule, args.explorer_share) if explore else 0.0


def writer(args, run, model, temperature=1.0, **more):
    """write(prompts, n, generator) -> Rollouts [P, n] by a model; more: settings of `sample`. Learner and
    explorer stop at the stop tokens of either: else a base learner would learn to write an instruct
    explorer's, and would not stop."""
    def write(prompts, n, generator):
        return sample(model, prompts, n, generator, args.max_new_tokens, run.stops, temperature,
                      rows=args.rollout_rows, until=run.until, **more)
    return write


def score_all(problems, texts):
    """Scores [P, G, (reward, strict, answer)] of texts [P][G]."""
    scores = [[score(problem, text) for text in group] for problem, group in zip(problems, texts)]
    return torch.tensor(scores, dtype=torch.float32)


# ---- flags -------------------------------------------------------------------------------------------------

def number(default, least, most):
    """argparse's keywords of a number of least's kind, from least to most. NaN lies between no numbers."""
    def kind(text):
        if not least <= (value := type(least)(text)) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least:g} and {most:g}")
        return value
    kind.__name__ = type(least).__name__  # for argparse's message about what is no number
    return {"type": kind, "default": default}


def parse_flags(argv=None):
    """Namespace of all flags, checked. Exits with one line on what makes no sense. With --resume, flags that
    are not given are the run's own."""
    parser = argparse.ArgumentParser(
        description="Train a learner with S2L-PO, or plain GRPO (--explorer none). In brackets: the default.",
        usage="%(prog)s [flags], which --help explains")
    choices = "; ".join(f"{name}: {what}" for name, what in SCHEDULES.items())
    add = parser.add_argument_group("models and problems (without --learner the laptop's)").add_argument
    add("--learner", help="model to train: a directory or a Hugging Face hub name")
    add("--explorer", help="frozen model that explores, of the same tokeniser; or its rollouts, .jsonl by "
                           "recipes.pool; or none")
    add("--data", help="problems: JSONL with answer and question or prompt; docs/data.md")
    add("--eval-data", help="held-out problems; with --learner and without them nothing is evaluated")
    add("--task", choices=SYNTHETIC, default="habit", help="the laptop family's task (habit)")
    add("--thinking", choices=("on", "off"), help="for chat templates that can (the template's own)")
    add = parser.add_argument_group("explorer schedule (anneal.py)").add_argument
    add("--schedule", choices=SCHEDULES, default="linear", help=f"{choices} (linear)")
    add("--mix-steps", **number(None, 1, 1e9), help="T_mix: linear, cosine reach 0 there (half of --steps)")
    add("--explorer-share", **number(0.5, 0.0, 1), help="the share of --schedule constant (0.5)")
    add = parser.add_argument_group("rollouts (sample.py)").add_argument
    add("--steps", **number(40, 1, 1e9), help="T, steps in all; a resumed run may be given more (40)")
    add("--prompts-per-step", **number(16, 1, 1e6), help="P (16)")
    add("--group-size", **number(16, 2, 1e6), help="G, rollouts per prompt (16)")
    add("--max-new-tokens", **number(None, 1, 1e6), help="longest response (16; with --learner 512)")
    add("--stop", nargs="+", default=[], help="texts that end a response too; \\n is a new line (none)")
    add("--temperature", **number(1.0, 1e-3, 100), help="the learner's, also in its log-probs (1)")
    add("--explorer-temperature", **number(1.0, 1e-3, 100), help="the paper's is 0.7 (1)")
    add("--explorer-top-p", **number(1.0, 1e-3, 1), help="the paper's is 0.95 (1)")
    add("--rollout-rows", **number(1024, 1, 1e9), help="rows sampled at once: lower it to save memory (1024)")
    add = parser.add_argument_group("update (grpo.py)").add_argument
    add("--lr", **number(None, 0.0, 1),
        help="AdamW's, constant (6e-4; with --learner 1e-6, with --lora-rank too 1e-5)")
    add("--minibatches", **number(Objective.minibatches, 1, 1e6),
        help="optimiser steps in a step; with 1 nothing is clipped, except with `--off-policy behaviour` (1)")
    add("--micro-batch-tokens", **number(Objective.micro_batch_tokens, 1, 1e9),
        help="run at once: lower it to save memory (8192)")
    add("--checkpoint-layers", action="store_true", help="recompute activations: slower, far less memory")
    add("--lora-rank", **number(0, 0, 1e5), help="train adapters of this rank, not all weights; 0: off (0)")
    add("--loss", choices=LOSSES, default=Objective.loss, help="a row of grpo.py's table LOSSES (grpo)")
    add("--off-policy", choices=OFF_POLICY, default=Objective.off_policy,
        help="how the explorer's tokens count: grpo.py off_policy_correction (recompute)")
    add("--clip-low", **number(Objective.clip_low, 0.0, 1),
        help="ratios are clipped below at 1 - this; 1: never (0.2)")
    add("--clip-high", **number(Objective.clip_high, 0.0, 1e9),
        help="ratios are clipped above at 1 + this (0.2)")
    add("--kl-coef", **number(Objective.kl_coef, 0.0, 1e9),
        help="KL to the initial learner; the paper's is 0.001 (0)")
    add("--max-grad-norm", **number(Objective.max_grad_norm, 1e-9, 1e9),
        help="gradients are scaled down to this norm (1)")
    add = parser.add_argument_group("run").add_argument
    add("--eval-every", **number(5, 0, 1e9), help="steps between evaluations; 0: only before and after (5)")
    add("--eval-problems", **number(None, 1, 1e9), help="held-out problems used (256; with --learner 64)")
    add("--eval-n", **number(None, 1, 1e6), help="rollouts per held-out problem (32; with --learner 4)")
    add("--save-every", **number(20, 0, 1e9), help="steps between checkpoints; 0: only at the end (20)")
    add("--keep", **number(2, 2, 1e6), help="newest checkpoints that are kept, beside the best (2)")
    add("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")
    add("--seed", **number(0, 0, 1e18), help="of problems' order, rollouts, mini-batches and evaluations (0)")
    add("--device", default="auto", help="auto: cuda, then mps, then cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights; masters are float32")
    add("--compile", action="store_true", help="costs a minute and pays from some 5 million tokens on")
    add("--log", choices=("tensorboard", "wandb", "trackio"), help="where metrics go besides metrics.jsonl")
    add("--out", help="directory of the run, new or empty (runs/ and the time)")
    args = parser.parse_args(argv)
    with one_line("train.py"):
        if args.resume and not args.out:
            raise ValueError("--resume needs --out: the directory of the run to continue")
        if args.resume:
            before = settings_of(args.out)
            parser.set_defaults(**{name: before[name] for name in vars(args).keys() - {"resume", "out"}
                                   if name in before})
            args = parser.parse_args(argv)
        given = {name for name, *_ in IDLE if getattr(args, name) != parser.get_default(name)}
        resolve(args)
        for name, idle, when in IDLE:
            if name in given and idle(args):
                print(f"warning: --{name.replace('_', '-')} does nothing {when}", file=sys.stderr)
    return args


no_sampler = lambda args: args.explorer == "none" or args.explorer.endswith(".jsonl")
no_clip = lambda args: args.minibatches == 1 and args.off_policy != "behaviour"
IDLE = (  # flags that do nothing, and when
    ("explorer_temperature", no_sampler, "without an explorer that samples in this run"),
    ("explorer_top_p", no_sampler, "without an explorer that samples in this run"),
    ("explorer_share", lambda args: args.schedule != "constant", "without --schedule constant"),
    ("mix_steps", lambda args: args.schedule == "constant", "with --schedule constant"),
    ("off_policy", lambda args: args.explorer == "none", "without an explorer"),
    ("clip_low", no_clip, "with one mini-batch, where every ratio is 1"),
    ("clip_high", no_clip, "with one mini-batch, where every ratio is 1"))


def resolve(args):
    """Fills in defaults that depend on other flags. ValueError, one line, for flags that make no sense."""
    if args.log and not importlib.util.find_spec(args.log):
        raise ValueError(f"--log {args.log}: pip install {args.log}")
    if args.learner and not (args.explorer and args.data):
        raise ValueError("--learner needs --data, and --explorer: a model, a pool, or `none` for plain GRPO")
    if args.learner:
        lr = 1e-5 if args.lora_rank else 1e-6
        defaults = {"lr": lr, "max_new_tokens": 512, "eval_problems": 64, "eval_n": 4}
    else:
        family = family_of(args.task)
        defaults = {"lr": 6e-4, "max_new_tokens": 16, "eval_problems": 256, "eval_n": 32,
                    "learner": f"{family}/learner", "explorer": f"{family}/explorer",
                    "data": f"{family}/train.jsonl", "eval_data": f"{family}/heldout.jsonl"}
    defaults["mix_steps"] = max(1, args.steps // 2)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, most in (("mix_steps", args.steps), ("minibatches", args.prompts_per_step)):
        if getattr(args, name) > most:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: not between 1 and {most}")


def family_of(task):
    """Directory of a laptop family: beside the code, wherever the run is started."""
    return Path(__file__).resolve().parent / "runs" / f"family-{task}"


# ---- loading -----------------------------------------------------------------------------------------------

@dataclass
class Run:
    """What is loaded, and what has happened so far."""
    learner: Transformer
    tokenizer: object
    stops: tuple         # ids of the tokens that end a response, the learner's and the explorer's
    reference: Transformer | None  # pi_ref, for the KL
    optimizer: Optimizer
    objective: Objective
    problems: list       # [Problem]
    prompts: list        # the token ids of each
    eval_problems: list  # [Problem], held out
    eval_prompts: list
    hashes: dict         # of what decides the run: a resumed one must find the same
    until: object        # until(ids): after how many tokens a response has said a --stop text, or None
    write: object = None  # the learner's writer in evaluations, at temperature 1
    history: list = field(default_factory=list)  # metrics of each step; step 0 is the base models' evaluation
    log: object = lambda line: None  # of --log
    saved: int = 0       # the last step in a checkpoint
    busy: bool = False   # within an update, or saving: a signal has to wait
    stopped: int = 0     # the signal that came


def load_run(args, open_explorer):
    """(Run, explore). Checks everything it can before it writes a file. ValueError or OSError, one line."""
    if args.out:
        check_place(Path(args.out), args.resume)
    device, dtype, family = pick_device(args.device), getattr(torch, args.dtype), family_of(args.task)
    if Path(args.learner) == family / "learner" and not family.exists():
        for path in filter(None, (args.data, args.eval_data)):
            if Path(path).parent != family:
                load_problems(path)
        from plumbing.family import make_family
        print(f"first run: making the two base models of task `{args.task}`, kept in {family}")
        make_family(family, args.task, device=device)

    learner, tokenizer, stops = load(args.learner, device, dtype)
    learner.compiled, learner.checkpoint_layers = args.compile, args.checkpoint_layers
    problems, prompts = read_problems(args, learner, tokenizer, args.data)
    held_out = read_problems(args, learner, tokenizer, args.eval_data) if args.eval_data else ([], [])
    eval_problems, eval_prompts = (some[:args.eval_problems] for some in held_out)
    asked = lambda problems: {" ".join(problem.question.split()) for problem in problems}
    if seen := asked(problems) & asked(eval_problems):
        print(f"warning: {len(seen)} held-out questions are in --data too: pass@k there is not held out",
              file=sys.stderr)
    if args.thinking and "enable_thinking" not in (tokenizer.chat_template or ""):
        print(f"warning: --thinking does nothing: {args.learner} has no chat template that asks for it",
              file=sys.stderr)

    texts = hashlib.sha256(f"{problems}{prompts}{eval_problems}".encode()).hexdigest()
    hashes = {"learner": fingerprint(learner, tokenizer, stops), "explorer": None, "problems": texts[:16],
              "reward": scorer_hash()}
    reference = None
    if args.kl_coef:  # the learner as it began; with LoRA the same tensors, not copied, without adapters
        shared = {id(weight): weight for weight in learner.parameters()} if args.lora_rank else {}
        reference = copy.deepcopy(learner, shared).requires_grad_(False)
    if args.lora_rank:
        add_lora(learner, args.lora_rank, generator(args.seed, 0, ADAPTER))
    run = Run(learner, tokenizer, stops, reference, Optimizer(learner, args.lr), objective_of(args), problems,
              prompts, eval_problems, eval_prompts, hashes, stop_texts(args.stop, tokenizer))
    run.write = writer(args, run, learner)
    explore = signed(open_explorer(args, run)) if args.explorer != "none" else None
    claim(args, run)
    if args.log:
        run.log = open_log(args, last_step(run))
    announce(args, run, device)
    return run, explore


def objective_of(args):
    """The flags that `update` follows, by its names for them."""
    return Objective(**{field.name: getattr(args, field.name) for field in fields(Objective)
                        if hasattr(args, field.name)})


def read_problems(args, learner, tokenizer, path):
    """(problems of a file, their prompts), without those that leave no room for a response. ValueError if
    none does, or the tokeniser loses text."""
    problems, context = load_problems(path), learner.config.max_position_embeddings
    prompts = encode_all(problems, tokenizer, args.thinking)
    kept = {*"".join(map(tokenizer.decode, prompts))}
    if lost := {c for problem in problems for c in problem.prompt if "!" <= c <= "~"} - kept:
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
    """write(prompts, n, generator) -> Rollouts [P, n] of --explorer, a frozen model or rollouts on disk. Adds
    its stop tokens to the run's."""
    if args.explorer.endswith(".jsonl"):
        return open_pool(args, run)
    explorer, tokenizer, stops = load(args.explorer, run.learner.head.device, run.learner.head.dtype)
    a, b = run.tokenizer.get_vocab(), tokenizer.get_vocab()
    if different := sorted({token for token, _ in a.items() ^ b.items()}):
        raise ValueError(f"the tokenisers of learner and explorer differ in {len(different)} tokens, such as "
                         f"{different[0]!r}: recipes/retokenize.py trains on texts, not on ids")
    run.hashes["explorer"] = fingerprint(explorer.requires_grad_(False), tokenizer, stops)
    run.stops = tuple(sorted({*run.stops, *stops}))
    explorer.compiled = run.learner.compiled
    write = writer(args, run, explorer, args.explorer_temperature, top_p=args.explorer_top_p)
    return in_its_own_words(args, run, explorer, tokenizer, write)


def in_its_own_words(args, run, explorer, tokenizer, write):
    """The explorer's writer, asked as its own chat template asks, which may be another than the learner's."""
    prompts = run.prompts + run.eval_prompts
    own = encode_all(run.problems + run.eval_problems, tokenizer, args.thinking)
    check_lengths(explorer, own, args.max_new_tokens)
    if own == prompts:
        return write
    print(f"explorer  is asked in its own way: {tokenizer.decode(own[0])!r}")
    own_of = dict(zip(map(tuple, prompts), own))
    return lambda prompts, n, generator: write([own_of[tuple(p)] for p in prompts], n, generator)


# ---- from start to end -------------------------------------------------------------------------------------

def main(argv=None, loop=train, open_explorer=open_explorer, recipe=None):
    """Recipes give another loop and its name, or an open_explorer(args, run) that returns another writer and
    notes in run.hashes["explorer"] what a resumed run must find again.
    Exit codes: 2 bad input or a full disk, 3 out of memory, 4 NaN, 128 + n signal n."""
    args = parse_flags(argv)
    args.recipe = recipe  # one of the settings, which a resumed run must have again
    with one_line("train.py"):
        run, explore = load_run(args, open_explorer)
    memory = ("lower --rollout-rows (sampling) or --micro-batch-tokens (training), or ask recipes/plan.py; "
              "--resume goes on from the last checkpoint")
    with one_line("train.py", OSError, memory):  # from here on a ValueError is a bug and keeps its traceback
        listen(run)
        try:
            open_books(args, run, explore)
            loop(args, run, explore)
            run.busy = True  # nothing is left but to save
        except KeyboardInterrupt:  # `listen` lets only the first signal come here
            if last_step(run) > run.saved:
                save_checkpoint(run, Path(args.out), args.keep)
        finish(args, run)
    sys.exit(128 + run.stopped if run.stopped else 0)


if __name__ == "__main__":
    main()
