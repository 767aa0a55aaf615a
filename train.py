"""S2L-PO: GRPO on a large learner, part of whose rollout groups a frozen small explorer writes (arXiv 2605.30789).

    python train.py                       the laptop run: makes its two models the first time, then trains
    python train.py --explorer none       the same without an explorer: plain GRPO
    python train.py --learner Qwen/Qwen3-1.7B-Base --explorer Qwen/Qwen3-0.6B-Base --data gsm8k_train.jsonl \\
        --max-new-tokens 512 --micro-batch-tokens 4096 --lr 1e-6 --dtype bfloat16

`train` is the paper's Algorithm 1, line for line; `Run` loads what it needs and keeps the books. Defaults that are not the
paper's: batch and learning rate (a laptop's), the explorer's sampling (temperature 1 without nucleus; the paper: 0.7 and
0.95) and the KL penalty (off; the paper: 0.001).

Everything random is seeded by (seed, step, purpose), so a step depends on nothing but the weights and the optimiser before
it: on a CPU the same seed gives the same metrics to the last digit, and a resumed run equals an unbroken one.

Shapes: P prompts a step, G rollouts a prompt (one group).
"""
import argparse
import copy
import itertools
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import reward
from anneal import MIXES, SCHEDULES, Explorer, explorer_share, observe, sample_groups, split_group
from eval import draw_run, evaluate, pass_at_k, powers_of_two, table
from grpo import LOSSES, OFF_POLICY, Optimizer, group_advantages, update
from model import WHAT_HELPS, OutOfMemory, add_lora, fitting, load, lock, save, write_whole
from sample import Pool, add_prompt_flags, check_lengths, decode, encode_prompt, mix, pick_device

COMPILE_FROM = 5_000_000  # tokens: where torch.compile has earned its minute on the laptop's models (bench/README.md)
LEARNER, EXPLORER, MINIBATCH, EVALUATION, ADAPTER = range(5)  # what a random stream is for
FREE = {"resume", "force", "overwrite", "out", "device", "compile", "eval_every", "save_every", "keep", "max_bad_steps",
        "rollout_rows", "micro_batch_tokens", "checkpoint_layers"}  # a resumed run may change them: no part of the experiment


def generator(seed, step, purpose):
    state = np.random.SeedSequence([seed, step, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def batch_of(step, size, count, seed):
    """Indices of the step's problems: every problem once, in an order shuffled anew, before any comes again."""
    positions = range((step - 1) * size, step * size)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in {p // count for p in positions}}
    return [int(orders[p // count][p % count]) for p in positions]


def train(args, run):
    for step in run.steps():                                                                    # for i in 1..T
        share = explorer_share(step, args.mix_steps, args.schedule, args.explorer_share, run.success)    # alpha_i
        at_least = int(args.schedule == "measured")  # to be measured, the learner must write
        n_explorer, n_learner = split_group(share, args.group_size, at_least)                   # G_w, G_s
        batch = batch_of(step, args.prompts_per_step, len(run.problems), args.seed)
        updates = [(n_explorer, n_learner)] if args.mix == "joint" else [(n_explorer, 0), (0, n_learner)]
        # --mix separate may leave a group of one, which has nothing to be compared with.
        run.record(step, share, batch, [one_update(args, run, step, batch, *n) for n in updates if sum(n) > 1])


def one_update(args, run, step, batch, n_explorer, n_learner):
    """Rollouts, rewards, advantages, update: what Algorithm 1 does in a step. Returns what `Run.record` writes down."""
    problems, prompts = [run.problems[i] for i in batch], [run.prompts[i] for i in batch]
    clock = [time.perf_counter()]
    failed = lambda rollouts: (judge(run, problems, rollouts)[1][..., 1].amax(1) == 0).tolist()
    rollouts = fitting(args, "rollout_rows", args.group_size, lambda: sample_groups(
        args, run, prompts, n_explorer, n_learner, generator(args.seed, step, EXPLORER),
        generator(args.seed, step, LEARNER), failed))                                           # O
    clock.append(time.perf_counter())
    texts, scores = judge(run, problems, rollouts)                                              # [P, G, (answer, strict)]
    advantages = group_advantages(scores[..., 1], scale=args.loss != "dr_grpo")                 # [P, G], combined group
    clock.append(time.perf_counter())
    metrics = update(args, run.learner, run.reference, run.optimizer, prompts, rollouts,        # theta <- GRPO update
                     advantages, generator(args.seed, step, MINIBATCH))
    metrics |= {"groups_all_fail": (scores[..., 1].amax(1) == 0).float().mean().item(),
                "groups_all_pass": (scores[..., 1].amin(1) == 1).float().mean().item()}
    clock.append(time.perf_counter())
    return rollouts, texts, scores, metrics, np.diff(clock)


def judge(run, problems, rollouts):
    """Texts [P][G], and their scores [P, G, (answer, strict)]."""
    texts = decode(rollouts, run.tokenizer)
    scores = [[reward.score(problem, text) for text in group] for problem, group in zip(problems, texts)]
    return texts, torch.tensor(scores, dtype=torch.float32, device=rollouts.ids.device)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train a learner with S2L-PO (or, with --explorer none, plain GRPO).",
                                     usage="%(prog)s [flags], which --help explains",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("models and problems (the laptop family's where --learner is not given)").add_argument
    add("--learner", help="model to train: a directory or a Hugging Face hub name")
    add("--lora-rank", type=int, default=0, help="train adapters of this rank (model.py Linear) in place of all weights; 0: off")
    add("--explorer", nargs="+", help="frozen model that helps to explore, or `none` for plain GRPO; several share the work")
    add("--retokenize", action="store_true", help="take an explorer with another tokeniser: its texts are tokenised anew")
    add("--explorer-pool", nargs="+", help="the explorer's rollouts on disk (sample.py --data --out), in place of the explorer; "
        "with --explorer too, it makes up what is missing")
    add("--task", choices=reward.TASKS, default="habit", help="the laptop family's task")
    add("--data", help="problems to train on: JSONL with `question` and `answer`")
    add("--eval-data", help="held-out problems in the same layout; with --data and without them nothing is evaluated")
    add_prompt_flags(add)
    add = parser.add_argument_group("explorer schedule (anneal.py)").add_argument
    explained = lambda choices: "; ".join(f"{name}: {meaning}" for name, meaning in choices.items())
    add("--schedule", choices=SCHEDULES, default="linear", help=explained(SCHEDULES))
    add("--mix-steps", type=int, help="T_mix: where linear and cosine reach 0, and step ends; half of --steps if not given")
    add("--explorer-share", type=float, default=0.5, help="the share of --schedule constant and rescue")
    add("--mix", choices=MIXES, default="joint", help=explained(MIXES))
    add = parser.add_argument_group("rollouts (sample.py)").add_argument
    add("--steps", type=int, default=40, help="T, steps in all")
    add("--prompts-per-step", type=int, default=16, help="P")
    add("--group-size", type=int, default=16, help="G, rollouts per prompt")
    add("--max-new-tokens", type=int, default=16, help="longest response")
    add("--temperature", type=float, default=1.0, help="learner's sampling temperature, also in its log-probs")
    add("--top-p", type=float, default=1.0, help="learner's nucleus; below 1 the ratio ignores the truncation")
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
    add("--optimizer-dtype", choices=("float32", "bfloat16"), default="float32", help="of AdamW's two moments")
    add("--loss", choices=LOSSES, default="grpo", help="how tokens are weighted; gspo: one ratio per sequence; dr_grpo: "
        "advantages not divided by std")
    add("--clip-low", type=float, default=0.2, help="ratios are clipped below at 1 - this")
    add("--clip-high", type=float, default=0.2, help="ratios are clipped above at 1 + this")
    add("--off-policy", choices=OFF_POLICY, default="recompute", help="how the explorer's tokens count, which the learner "
        "did not draw: grpo.py off_policy_correction")
    add("--kl-coef", type=float, default=0.0, help="weight of the KL to the initial learner; 0 keeps no copy of it")
    add("--kl-estimator", choices=("k1", "k2", "k3"), default="k3", help="how the KL is estimated from tokens")
    add("--max-grad-norm", type=float, default=1.0, help="gradients are scaled down to this norm")
    add = parser.add_argument_group("run").add_argument
    add("--eval-every", type=int, default=5, help="steps between evaluations; 0: only before and after")
    add("--eval-problems", type=int, default=256, help="held-out problems used")
    add("--eval-n", type=int, default=32, help="rollouts per held-out problem")
    add("--eval-temperature", type=float, default=1.0, help="sampling temperature of evaluations, which have no nucleus")
    add("--max-bad-steps", type=int, default=5, help="stop after so many steps in a row with an update skipped, its loss or "
        "gradient not being finite")
    add("--save-every", type=int, default=20, help="steps between checkpoints; 0: only at the end")
    add("--keep", type=int, default=2, help="checkpoints kept, the newest")
    add("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")
    add("--force", action="store_true", help="resume although flags that change the experiment are others now")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--seed", type=int, default=0, help="of problems' order, rollouts, mini-batches and evaluations")
    add("--device", default="auto", help="auto: cuda, then mps, then cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights; updates are made in float32")
    add("--compile", choices=("auto", "on", "off"), default="auto",
        help="torch.compile of decoding step and log-prob kernel: about a minute; auto: where enough tokens are to be written")
    add("--out", help="directory of the run; runs/ and the time where not given")
    return parser.parse_args(argv)


def resolve_args(args):
    """Fills in the defaults that depend on other flags, and makes the laptop family if it is wanted and not there.
    ValueError, one line, for flags that make no sense."""
    laptop = args.learner is None
    if args.explorer == ["none"] or args.schedule == "none":
        args.explorer, args.schedule = [], "none"
    args.mix_steps = max(1, args.steps // 2) if args.mix_steps is None else args.mix_steps
    for wrong, message in (
            (not laptop and args.data is None, "--learner needs --data: problems as JSONL with `question` and `answer`"),
            (not laptop and args.explorer is None and not args.explorer_pool,
             "--learner needs --explorer (a model, or `none` for plain GRPO) or --explorer-pool"),
            (args.explorer == [] and args.explorer_pool, "--explorer-pool and no explorer: leave one of them out"),
            (args.group_size < 2, f"--group-size {args.group_size}: the advantage compares rollouts, so at least 2"),
            (args.mix_steps > args.steps, f"--mix-steps {args.mix_steps} is beyond --steps {args.steps}"),
            (not 1 <= args.minibatches <= args.prompts_per_step, "--minibatches must be between 1 and --prompts-per-step"),
            (not 0 <= args.explorer_share <= 1, "--explorer-share must be between 0 and 1"),
            (args.schedule == "rescue" and 0 in split_group(args.explorer_share, args.group_size),
             "--schedule rescue needs an --explorer-share that leaves both a part of the group"),
            (args.mix == "separate" and (args.schedule in ("measured", "rescue") or args.group_size < 3),
             "--mix separate has groups of one source: no --schedule measured or rescue, and --group-size at least 3"),
            (args.retokenize and args.off_policy in ("behaviour", "truncated"),
             f"--off-policy {args.off_policy} needs the explorer's log-prob of every token, which --retokenize has not"),
            (args.eval_temperature < 0, "--eval-temperature must be at least 0"),
            (min(args.temperature, args.explorer_temperature) <= 0,
             "--temperature and --explorer-temperature must be above 0: greedy rollouts of a group are all the same"),
            (not (0 < args.top_p <= 1 and 0 < args.explorer_top_p <= 1), "--top-p and --explorer-top-p must lie in (0, 1]"),
            (args.seed < 0, "--seed must be at least 0"), (args.lora_rank < 0, "--lora-rank must be at least 0"),
            (args.resume and not args.out, "--resume needs --out: the directory of the run to continue"),
            (args.resume and args.overwrite, "--resume and --overwrite: leave one of them out")):
        if wrong:
            raise ValueError(message)
    for flag in ("steps", "mix_steps", "prompts_per_step", "max_new_tokens", "micro_batch_tokens", "rollout_rows",
                 "eval_problems", "eval_n", "max_bad_steps", "keep"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1")
    if laptop:
        family = Path("runs", f"family-{args.task}")
        if not family.exists():
            from recipes.family import make_family
            print(f"first run: making the two base models of task `{args.task}`, kept in {family}")
            make_family(family, args.task, device=pick_device(args.device))
        args.learner = str(family / "learner")
        args.explorer = [str(family / "explorer")] if args.explorer is None and not args.explorer_pool else args.explorer
        args.data = args.data or str(family / "train.jsonl")
        args.eval_data = args.eval_data or str(family / "heldout.jsonl")
    args.explorer = args.explorer or []
    args.out = args.out or str(Path("runs", time.strftime("%Y%m%d-%H%M%S")))
    if (config := Path(args.out, "config.json")).exists() and not args.overwrite:
        if not args.resume:
            raise ValueError(f"{args.out} already holds a run: --resume continues it, --overwrite replaces it")
        before = reward.read_object(config)
        changed = [f"--{name.replace('_', '-')} {before.get(name)} -> {value}" for name, value in vars(args).items()
                   if name not in FREE and before.get(name) != value]
        if changed and not args.force:
            raise ValueError(f"--resume with other settings than {args.out} began with (--force does it): {', '.join(changed)}")


def compare_tokenizers(learner, explorer):
    """None if every token has the same id in both, for the learner trains on the ids that the explorer wrote; else a sentence."""
    a, b = learner.get_vocab(), explorer.get_vocab()
    different = sorted(token for token in a.keys() | b.keys() if a.get(token) != b.get(token))
    if different:
        token = different[0]
        return (f"the tokenisers of learner and explorer differ in {len(different)} tokens ({len(a)} and {len(b)} in all), such "
                f"as {token!r}: id {a.get(token)} and {b.get(token)}")


def as_json(line):
    return json.dumps({key: None if isinstance(x, float) and not np.isfinite(x) else x for key, x in line.items()}) + "\n"


class Run:
    """What a run holds (models, optimiser, problems) and what it leaves in --out: config.json, metrics.jsonl (a line a
    step), pass_at_k.json, rollouts/ (one group at each evaluation), checkpoint_*.pt, learner/, curve.png.

    A checkpoint is a run between two steps: trained weights, AdamW's moments, the metrics so far, e and l of --schedule
    measured. No state of random generators and no place in the data: both follow from (seed, step)."""

    def __init__(self, args):
        """Loads everything and checks that it fits together, before anything is written. ValueError or OSError, one line, on
        what does not."""
        device, dtype = pick_device(args.device), getattr(torch, args.dtype)
        self.args, self.out, self.locked, self.warned = args, Path(args.out), None, False
        self.stopped = self.until = self.timer = None  # by which signal, until when, and what ends it then
        self.first_step, self.lines, self.curves, self.success = 1, [], {}, (0.5, 0.5)
        self.learner, self.tokenizer = load(args.learner, device, dtype)
        tokens = args.steps * args.prompts_per_step * args.group_size * args.max_new_tokens
        self.learner.compiled = args.compile == "on" or (args.compile == "auto" and tokens >= COMPILE_FROM and device != "mps")
        self.problems = reward.load_problems(args.data)
        self.eval_problems = reward.load_problems(args.eval_data)[:args.eval_problems] if args.eval_data else []
        self.prompts, eval_prompts = ([encode_prompt(problem, self.tokenizer, args.template, args.thinking) for problem in problems]
                                      for problems in (self.problems, self.eval_problems))
        checked = self.prompts + eval_prompts
        check_lengths(self.learner, checked, args.max_new_tokens)
        # A copy of the learner before any update; with LoRA the same tensors without the adapters, at no memory.
        shared = {id(weight): weight for weight in self.learner.parameters()} if args.lora_rank else {}
        self.reference = copy.deepcopy(self.learner, shared).requires_grad_(False) if args.kl_coef else None
        if args.lora_rank:
            add_lora(self.learner, args.lora_rank, generator(args.seed, 0, ADAPTER))
        self.learner.checkpoint_layers = args.checkpoint_layers
        self.optimizer = Optimizer(self.learner, args.lr, getattr(torch, args.optimizer_dtype))
        if args.resume:
            self.restore()
        self.last_explorer_step = max((step for step in range(1, args.steps + 1) if self.share(step) > 0), default=0)
        self.explorers = []
        for name in args.explorer if self.first_step <= self.last_explorer_step else ():
            model, tokenizer = load(name, device, dtype)
            model.requires_grad_(False)
            model.compiled, own = self.learner.compiled, None
            if different := compare_tokenizers(self.tokenizer, tokenizer):
                if not args.retokenize:
                    raise ValueError(f"{different}; --retokenize trains on the texts all the same")
                own = [encode_prompt(problem, tokenizer, args.template, args.thinking)
                       for problem in self.problems + self.eval_problems]
            check_lengths(model, own or checked, args.max_new_tokens)
            self.explorers.append(Explorer(model, tokenizer, dict(zip(map(tuple, checked), own))) if own else
                                  Explorer(model, self.tokenizer, None))
        context = self.learner.config.max_position_embeddings
        self.pool = Pool(args.explorer_pool, self.learner.num_tokens, context) if args.explorer_pool else None
        if self.pool and not self.explorers:
            self.check_stock()
        # One end for all who share a tokeniser: else a base learner would learn a stop token of an instruct explorer and not
        # stop at it.
        kin = [self.learner, *(explorer.model for explorer in self.explorers if not explorer.prompts)]
        stop_ids = tuple(sorted({token for model in kin for token in model.stop_ids}))
        for model in kin:
            model.stop_ids = stop_ids
        self.stop_id = self.tokenizer.eos_token_id if self.tokenizer.eos_token_id in stop_ids else max(stop_ids, default=0)

        self.claim()
        self.write("config.json", json.dumps(vars(args) | {"resume": False, "force": False, "overwrite": False}, indent=2))
        self.write("metrics.jsonl", "".join(map(as_json, self.lines[:-1])))  # the last one by `complete`
        size = lambda model: f"{sum(p.numel() for p in model.parameters()):,} parameters"
        trained = f", of which LoRA trains {sum(w.numel() for w in self.optimizer.weights):,}" if args.lora_rank else ""
        print(f"learner   {args.learner}: {size(self.learner)}{trained}, on {device}")
        for name, explorer in zip(args.explorer, self.explorers):
            print(f"explorer  {name}: {size(explorer.model)}, frozen, writes until step {self.last_explorer_step} of {args.steps}")
        if self.pool:
            print(f"explorer  {sum(map(len, self.pool.places.values())):,} rollouts of {len(self.pool.places):,} prompts on disk")
        elif not self.explorers:
            print("explorer  not used")
        print(f"compile   {'on' if self.learner.compiled else 'off'} (--compile {args.compile}: up to {tokens:,} tokens to "
              f"write, on from {COMPILE_FROM:,})")
        first_prompt = self.tokenizer.decode(self.prompts[0])
        self.write("first_prompt.txt", first_prompt)
        print(f"problems  {len(self.problems)} to train on, {len(self.eval_problems)} held out; the first prompt:\n"
              f"          {first_prompt!r}")

    def share(self, step):
        return explorer_share(step, self.args.mix_steps, self.args.schedule, self.args.explorer_share, self.success)

    def check_stock(self):
        """ValueError if the pool has not enough rollouts of some prompt for the steps to come."""
        args, wanted = self.args, {}
        for step in range(self.first_step, self.last_explorer_step + 1):
            n, _ = split_group(self.share(step), args.group_size)
            n = args.group_size - 1 if args.schedule == "measured" else n  # not known beforehand
            for i in batch_of(step, args.prompts_per_step, len(self.problems), args.seed):
                wanted[i] = max(n, wanted.get(i, 0))
        missing = {i: n - self.pool.count(self.prompts[i]) for i, n in wanted.items() if n > self.pool.count(self.prompts[i])}
        if missing:
            i = min(missing)
            raise ValueError(f"--explorer-pool lacks {sum(missing.values()):,} rollouts of {len(missing):,} prompts that this "
                             f"run asks, such as {missing[i]} of {wanted[i]} for {self.problems[i].question[:40]!r}: write more "
                             f"with sample.py --n {max(wanted.values())}, or add --explorer to make them up")

    def claim(self):
        """Makes --out this run's alone for as long as it lives. ValueError if it is another's."""
        if self.locked is None:
            self.out.mkdir(parents=True, exist_ok=True)
            self.locked = os.open(self.out, os.O_RDONLY)
            lock(self.locked, self.out)
        if (self.out / "config.json").exists() and not (self.args.resume or self.args.overwrite):
            raise ValueError(f"{self.out} already holds a run: --resume continues it, --overwrite replaces it")
        if self.args.overwrite:
            for pattern in ("checkpoint_*", "rollouts/*", "pass_at_k.json", "curve.png"):
                for path in self.out.glob(pattern):
                    path.unlink()
            shutil.rmtree(self.out / "learner", ignore_errors=True)

    def restore(self):
        """Takes up the newest checkpoint, or, where that is damaged, the one before. ValueError if all there are damaged."""
        if self.out.exists():
            self.claim()
        damaged = []
        for path in sorted(self.out.glob("checkpoint_*.pt"), reverse=True):
            try:
                if bad := zipfile.ZipFile(path).testzip():  # torch.load does not look at its checksums
                    raise ValueError(f"wrong checksum of {bad}")
                state = torch.load(path, map_location="cpu", weights_only=True)
                self.optimizer.restore(state["optimizer"])
                self.lines = [json.loads(line) for line in state["metrics"].splitlines()]
                self.first_step, self.success, self.curves = state["step"] + 1, tuple(state["success"]), state["curves"]
                self.learner.stop_ids = tuple(state["stop_ids"])
            except torch.OutOfMemoryError:
                raise  # no fault of the file
            except Exception as error:  # whatever a damaged file makes of the unpickler
                damaged.append((path, f"{path} cannot be read: {' '.join(str(error).split())[:200]}"))
                continue
            for bad, why in damaged:
                print(f"warning: {why}; going on from {path.name}", file=sys.stderr)
                os.replace(bad, bad.with_suffix(".damaged"))
            return
        if damaged:
            raise ValueError(damaged[0][1])
        print(f"--resume: nothing is saved in {self.out} yet, so from the beginning")

    def save(self):
        """Writes a checkpoint of the last whole step and removes all but the newest --keep. If that fails, for want of space
        say, it warns: the run goes on, and the older ones stay."""
        if not self.lines:
            return
        step = self.lines[-1]["step"]
        state = {"step": step, "optimizer": self.optimizer.state(), "success": self.success, "stop_ids": self.learner.stop_ids,
                 "curves": self.curves, "metrics": "".join(map(as_json, self.lines))}
        try:
            write_whole(self.out / f"checkpoint_{step:06d}.pt", lambda file: torch.save(state, file))
            for old in sorted(self.out.glob("checkpoint_*.pt"))[:-self.args.keep]:
                old.unlink()
        except (OSError, RuntimeError) as error:  # the latter for whatever comes between torch.save and the end of the file
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            self.warn(f"step {step} is not saved: {str(error).splitlines()[0]}")

    def write(self, name, text):
        """Writes a file of the run; if that fails it warns, for no file but a checkpoint is needed to go on."""
        try:
            (self.out / name).parent.mkdir(exist_ok=True)
            write_whole(self.out / name, lambda file: file.write(text.encode()))
        except OSError as error:
            self.warn(f"{name} is not written: {error.strerror}")

    def warn(self, message):
        tqdm.write(f"warning: {message}", file=sys.stderr)

    def evaluate(self, model, curve_name=None, tokenizer=None):
        """Metrics of a model on the held-out problems, with the same random numbers every time, so that evaluations
        differ by the model alone. With a name, its strict pass@k curve goes to pass_at_k.json."""
        args = self.args
        result = fitting(args, "rollout_rows", args.eval_n, lambda: evaluate(
            model, tokenizer or self.tokenizer, self.eval_problems, args.eval_n, generator(args.seed, 0, EVALUATION),
            args.max_new_tokens, template=args.template, thinking=args.thinking, temperature=args.eval_temperature,
            rows=args.rollout_rows))
        if curve_name:
            ks = powers_of_two(args.eval_n)
            self.curves = self.curves if self.curves.get("k") == ks else {"k": ks}
            self.curves[curve_name] = [pass_at_k(result["strict"], args.eval_n, k) for k in ks]
            self.write("pass_at_k.json", json.dumps(self.curves))
        return {f"eval_{prefix}pass@{k}": pass_at_k(result[kind], args.eval_n, k)
                for prefix, kind in (("", "answer"), ("strict_", "strict")) for k in (1, 16) if k <= args.eval_n}

    def before_training(self):
        print(f"pass@k before training: {len(self.eval_problems)} held-out problems, {self.args.eval_n} rollouts each")
        line = {"step": 0} | self.evaluate(self.learner, "learner before")
        for i, explorer in enumerate(self.explorers, 1):
            self.evaluate(explorer.model, "explorer" if len(self.explorers) == 1 else f"explorer {i}", explorer.tokenizer)
        print(table(self.curves["k"], {name: curve for name, curve in self.curves.items() if name != "k"}))
        self.lines.append(line)

    def steps(self):
        """Yields the steps to take under a progress bar."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.interrupt)
        if not self.lines and self.eval_problems:
            self.before_training()
        self.complete()
        self.bar = tqdm(total=self.args.steps, initial=self.first_step - 1, desc="training", dynamic_ncols=True)
        for step in range(self.first_step, self.args.steps + 1):
            yield step
            left = self.args.schedule == "measured" and not self.share(step)
            if left or step >= self.last_explorer_step:
                self.explorers = []  # frozen, and never asked again: give their memory back
            self.bar.update()
        self.bar.close()

    def interrupt(self, number, frame):
        """SIGINT (Ctrl-C) and SIGTERM: stops at once where the weights are those of a whole step. Within an update it lets the
        step end, for 8 seconds or until the next signal."""
        first, self.stopped, self.until = self.stopped is None, self.stopped or number, self.until or time.monotonic() + 9
        if first and self.optimizer.moved:
            os.write(2, b"\nfinishing this step, then saving; once more quits at once\n")
            self.later(8, os.kill, os.getpid(), number)
        else:
            self.quit()

    def later(self, seconds, function, *inputs):
        self.timer = threading.Timer(seconds, function, inputs)  # and not SIGALRM, which math-verify needs
        self.timer.daemon = True
        self.timer.start()

    def quit(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # what is begun now is to come to its end
        raise KeyboardInterrupt

    def stop(self):
        """After a signal: saves the last whole step. What `finish` has not done 9 seconds after the signal is left."""
        if self.stopped is None or self.optimizer.moved or not self.lines:  # None: before there was anything to take note
            self.warn("the step under way is given up: --resume goes on from the last checkpoint, or from the beginning")
            sys.exit(128 + (self.stopped or signal.SIGINT))
        self.save()
        self.later(max(1, self.until - time.monotonic()), os._exit, 128 + self.stopped)

    def record(self, step, share, batch, updates):
        """Writes the step's line of metrics.jsonl (README has a glossary), after evaluating if it is time to. `updates`:
        one_update's of the step, one or (--mix separate) two, whose metrics are averaged."""
        rollouts, texts, scores, metrics, seconds = zip(*updates)
        rollouts, scores, seconds = mix(*rollouts), torch.cat(scores, 1), sum(seconds).tolist()
        texts = [sum(groups, []) for groups in zip(*texts)]
        both = {key: [part[key] for part in metrics if part[key] is not None] for key in metrics[0]}
        metrics = {key: sum(values) / len(values) if values else None for key, values in both.items()}
        metrics["skipped_updates"] = sum(both["skipped_updates"])
        args, explorer = self.args, rollouts.from_explorer
        answers, rewards = scores.unbind(-1)  # [P, G] each
        mean = lambda x: x.float().mean().item() if x.numel() else None
        line = {"step": step, "share": mean(explorer) if args.schedule == "rescue" else share,
                "rollouts_explorer": int(explorer.sum()), "rollouts_learner": int((~explorer).sum()),
                "reward": mean(rewards), "reward_explorer": mean(rewards[explorer]),
                "reward_learner": mean(rewards[~explorer]), "reward_answer": mean(answers),
                **metrics,
                "length": mean(rollouts.lengths), "length_explorer": mean(rollouts.lengths[explorer]),
                "length_learner": mean(rollouts.lengths[~explorer]), "truncated": mean(~rollouts.finished),
                **dict(zip(("seconds_sampling", "seconds_scoring", "seconds_training"), seconds)),
                "tokens_per_second": rollouts.lengths.sum().item() / seconds[0]}
        self.success = observe(self.success, rewards, explorer)
        self.lines.append(line)
        self.optimizer.moved = False  # from here on the step is a whole one
        if self.is_evaluated(step):
            group = zip(explorer[0].tolist(), rewards[0].tolist(), texts[0])
            self.write(f"rollouts/step_{step}.txt", self.problems[batch[0]].question + "\n\n" + "\n".join(
                f"{'explorer' if by_explorer else 'learner'}, reward {r:g}: {text}" for by_explorer, r, text in group))
        if self.stopped:
            self.quit()
        due = args.save_every and step % args.save_every == 0
        if step == args.steps or (due and not line["skipped_updates"]):
            self.save()
        self.complete()
        self.bar.set_postfix(reward=f"{line['reward']:.2f}", explorer=f"{line['share']:.0%}")
        if line["truncated"] > 0.5 and not self.warned:
            self.warned = True
            self.warn(f"{line['truncated']:.0%} of the rollouts were cut at --max-new-tokens "
                      f"{args.max_new_tokens}; cut before the answer they earn nothing: raise it")
        if line["skipped_updates"]:
            self.warn(f"step {step}: {line['skipped_updates']} of {args.minibatches * len(updates)} updates skipped, loss or "
                      f"gradient not finite; the step's problems, counted from 0: {batch}")
        bad = [*itertools.takewhile(lambda line: line.get("skipped_updates"), reversed(self.lines))]
        if len(bad) >= args.max_bad_steps:
            saved = max((path.name for path in self.out.glob("checkpoint_*.pt")), default="the beginning")
            raise FloatingPointError(f"loss or gradient not finite in {len(bad)} steps in a row, up to step {step}: --resume --force "
                                     f"with a lower --lr goes on from {saved}")

    def is_evaluated(self, step):
        every = self.args.eval_every
        return step and self.eval_problems and (step == self.args.steps or (every and step % every == 0))

    def complete(self):
        """Writes the last step's line of metrics.jsonl, after evaluating if it is time to. A run that was stopped in between
        does so when it is resumed."""
        if not self.lines:
            return
        line = self.lines[-1]
        if self.is_evaluated(line["step"]) and "eval_pass@1" not in line:
            line |= self.evaluate(self.learner, "learner after" if line["step"] == self.args.steps else None)
        try:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(as_json(line))
        except OSError as error:
            self.warn(f"metrics.jsonl: {error.strerror}; its lines are kept in memory and in checkpoints")

    def finish(self, seconds):
        """Saves the learner, draws the picture, says what came out and what to try next."""
        lines = self.lines
        self.write("metrics.jsonl", "".join(map(as_json, lines)))
        save(self.learner, self.tokenizer, self.out / "learner")
        draw_run(self.out)
        evals = [line for line in lines if "eval_pass@1" in line]
        if len(evals) > 1:
            print(f"\n{'held out':16}{'before':>10}{'step ' + str(evals[-1]['step']):>10}")
            for key in (key for key in evals[-1] if key.startswith("eval_") and key in evals[0]):
                print(f"{key.removeprefix('eval_').replace('_', ' '):16}{evals[0][key]:10.3f}{evals[-1][key]:10.3f}")
        print(f"\n{seconds / 60:.1f} minutes, {lines[-1]['step']} steps; everything is in {self.out}: "
              "curve.png, metrics.jsonl, rollouts/, learner/ (a Hugging Face directory)")
        words = [word for previous, word in zip(["", *sys.argv], sys.argv)
                 if word not in ("--out", "--resume", "--force", "--overwrite") and previous != "--out"]
        again = shlex.join(["python", *words])
        if lines[-1]["step"] < self.args.steps:
            print(f"stopped; go on with: {again} --out {self.out} --resume")
        elif self.args.schedule == "none":
            print("try next, the same with an explorer: leave out `--explorer none`")
        elif not self.args.explorer_pool:
            print(f"try next, the same without an explorer: {again} --explorer none")
        if self.timer:
            self.timer.cancel()
        os.close(self.locked)


def main():
    args, started = parse_args(), time.time()
    try:
        resolve_args(args)
        run = Run(args)
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        fail(error)
    try:
        try:
            train(args, run)
        except KeyboardInterrupt:
            run.stop()
        run.finish(time.time() - started)
    except FloatingPointError as error:  # saved is what was well
        fail(error)
    except (OSError, OutOfMemory, torch.OutOfMemoryError) as error:
        if not run.optimizer.moved:
            run.save()
        fail(error)
    except KeyboardInterrupt:  # within `finish`, which --resume does again
        pass
    if run.stopped:
        sys.exit(128 + run.stopped)  # what a shell expects of a program ended by a signal


def fail(error):
    hint = f": {WHAT_HELPS}" if isinstance(error, (MemoryError, torch.OutOfMemoryError)) else ""
    print(f"train.py: error: {str(error).partition(chr(10))[0] or type(error).__name__}{hint}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # while loading: there is nothing to save yet
        sys.exit(130)
