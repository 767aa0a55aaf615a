"""S2L-PO: GRPO on a large learner, part of whose rollout groups a frozen small explorer writes (arXiv 2605.30789).

    python train.py                                   the laptop run: makes its two models the first time, then trains
    python train.py --explorer none                   the same without an explorer: plain GRPO
    python train.py --learner Qwen/Qwen3-1.7B-Base --explorer Qwen/Qwen3-0.6B-Base --data gsm8k_train.jsonl ...

Algorithm 1 of the paper is the body of `train`, line for line. Everything random is seeded by (seed, step, purpose), so
a step's outcome depends on nothing but the weights: the same seed gives the same metrics, and a resumed run equals one
that was never interrupted.

Shapes: P prompts a step, G rollouts a prompt (one group), N = P*G rows, T response tokens.
"""
import argparse
import copy
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import reward
from anneal import SCHEDULES, explorer_share, split_group
from eval import draw_run, evaluate, pass_at_k, powers_of_two, table
from grpo import (EXPLORER_RATIOS, LOSSES, explorer_treatment, group_advantages, kl_penalty, policy_loss,
                  response_logprobs, token_weights)
from model import load, pick_device, save
from sample import check_lengths, decode, encode_prompt, mix, sample

LEARNER, EXPLORER, MINIBATCH, EVALUATION = range(4)  # what a random stream is for


def generator(seed, step, purpose):
    state = np.random.SeedSequence([seed, step, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train a learner with S2L-PO (or, with --explorer none, plain GRPO).",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group("models and problems")
    group.add_argument("--learner", help="model to train: a directory or a Hugging Face hub name (default: the laptop family's)")
    group.add_argument("--explorer", help="frozen model that helps to explore, or `none` (default: the laptop family's)")
    group.add_argument("--task", choices=reward.TASKS, default="habit", help="the laptop family's task, where --learner is not given")
    group.add_argument("--data", help="problems to train on: JSONL with `question` and `answer` (default: the laptop family's)")
    group.add_argument("--eval-data", help="held-out problems, the same layout; without them nothing is evaluated (default: the laptop family's)")
    group = parser.add_argument_group("explorer schedule (anneal.py)")
    group.add_argument("--schedule", choices=SCHEDULES, default="linear", help="how the explorer's share falls")
    group.add_argument("--mix-steps", type=int, help="T_mix, the steps with an explorer (default: half of --steps)")
    group.add_argument("--explorer-share", type=float, default=0.5, help="the share of --schedule constant")
    group = parser.add_argument_group("rollouts (sample.py)")
    group.add_argument("--steps", type=int, default=60, help="T, steps in all")
    group.add_argument("--prompts-per-step", type=int, default=16, help="P")
    group.add_argument("--group-size", type=int, default=16, help="G, rollouts per prompt")
    group.add_argument("--max-new-tokens", type=int, default=16, help="longest response")
    group.add_argument("--temperature", type=float, default=1.0, help="learner's sampling temperature, also in its log-probs")
    group.add_argument("--rollout-rows", type=int, default=1024, help="rows sampled at once: lower it to save memory")
    group.add_argument("--top-p", type=float, default=1.0, help="learner's nucleus; below 1 the ratio ignores the truncation")
    group.add_argument("--explorer-temperature", type=float, default=1.0, help="the paper's is 0.7")
    group.add_argument("--explorer-top-p", type=float, default=1.0, help="the paper's is 0.95")
    group = parser.add_argument_group("update (grpo.py)")
    group.add_argument("--lr", type=float, default=2e-4, help="AdamW's learning rate, constant; 1e-6 for billions of parameters")
    group.add_argument("--minibatches", type=int, default=2, help="optimiser updates per step")
    group.add_argument("--micro-batch", type=int, default=256, help="rows per forward pass: lower it to save memory, the loss does not change")
    group.add_argument("--loss", choices=LOSSES, default="grpo", help="how tokens are weighted; gspo: one ratio per sequence")
    group.add_argument("--clip-low", type=float, default=0.2, help="ratios are clipped at 1 - this")
    group.add_argument("--clip-high", type=float, default=0.2, help="and at 1 + this")
    group.add_argument("--explorer-ratio", choices=EXPLORER_RATIOS, default="recompute", help="old log-probs of explorer tokens")
    group.add_argument("--kl-coef", type=float, default=0.0, help="beta of the KL penalty to the initial learner (0.001 in the paper); 0 keeps no copy of it")
    group.add_argument("--kl-estimator", choices=("k1", "k2", "k3"), default="k3")
    group.add_argument("--max-grad-norm", type=float, default=1.0, help="gradients are scaled down to this norm")
    group = parser.add_argument_group("run")
    group.add_argument("--eval-every", type=int, default=10, help="steps between evaluations (0: only before and after)")
    group.add_argument("--eval-problems", type=int, default=128, help="held-out problems used")
    group.add_argument("--eval-n", type=int, default=32, help="rollouts per held-out problem")
    group.add_argument("--save-every", type=int, default=20, help="steps between checkpoints (0: only at the end)")
    group.add_argument("--resume", action="store_true", help="continue the run in --out from its checkpoint")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--device", default="auto", help="auto: cuda, then mps, then cpu")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and activations; updates are made in float32")
    group.add_argument("--out", help="directory of the run (default: runs/ and the time)")
    return parser.parse_args(argv)


def settle(args):
    """Fills in the defaults that depend on other flags and makes the laptop family if it is wanted and not there.
    ValueError, one line, for flags that make no sense."""
    if args.learner is None:
        family = Path("runs", f"family-{args.task}")
        if not family.exists():
            from recipes.family import make_family
            print(f"first run: making the two base models of task {args.task!r}, kept in {family} from now on")
            make_family(family, args.task, device=pick_device(args.device))
        args.learner, args.explorer = str(family / "learner"), args.explorer or str(family / "explorer")
        args.data, args.eval_data = args.data or str(family / "train.jsonl"), args.eval_data or str(family / "heldout.jsonl")
    if args.explorer == "none" or args.schedule == "none":
        args.explorer, args.schedule = "none", "none"
    args.mix_steps = args.mix_steps or max(1, args.steps // 2)
    args.out = args.out or str(Path("runs", time.strftime("%Y%m%d-%H%M%S")))
    for wrong, message in (
            (args.data is None, "--data is needed with --learner: problems as JSONL with `question` and `answer`"),
            (args.explorer is None, "--explorer is needed with --learner: a model, or `none` for plain GRPO"),
            (args.group_size < 2, f"--group-size must be at least 2, not {args.group_size}: the advantage compares the rollouts of a group"),
            (args.mix_steps > args.steps, f"--mix-steps {args.mix_steps} is beyond --steps {args.steps}"),
            (not 1 <= args.minibatches <= args.prompts_per_step, "--minibatches must be between 1 and --prompts-per-step"),
            (not 0 <= args.explorer_share <= 1, "--explorer-share must be between 0 and 1"),
            (args.temperature <= 0, "--temperature must be above 0: greedy rollouts of a group are all the same"),
            (min(args.steps, args.prompts_per_step, args.max_new_tokens, args.micro_batch, args.eval_n) < 1,
             "--steps, --prompts-per-step, --max-new-tokens, --micro-batch and --eval-n must be at least 1"),
            (Path(args.out, "metrics.jsonl").exists() and not args.resume, f"{args.out} already holds a run: --resume continues it, another --out starts anew"),
            (args.resume and not Path(args.out, "checkpoint.pt").exists(), f"--resume: there is no checkpoint.pt in {args.out}")):
        if wrong:
            raise ValueError(message)
    if args.resume:
        before = json.loads(Path(args.out, "config.json").read_text())
        free = {"resume", "out", "device", "eval_every", "save_every"}  # the rest decides what the run computes
        changed = [f"--{name.replace('_', '-')} {before[name]} -> {value}" for name, value in vars(args).items()
                   if name not in free and before.get(name) != value]
        if changed:
            raise ValueError(f"--resume with other settings than {args.out} began with: {', '.join(changed)}")


def check_tokenizers(learner, explorer):
    """ValueError unless both turn text into the same ids: the learner trains on the ids that the explorer wrote."""
    a, b = learner.get_vocab(), explorer.get_vocab()
    different = sorted(token for token in a.keys() | b.keys() if a.get(token) != b.get(token))
    if different:
        token = different[0]
        raise ValueError(f"the tokenisers of learner and explorer differ in {len(different)} tokens ({len(a)} and {len(b)} in all), "
                         f"such as {token!r}: id {a.get(token)} and {b.get(token)}; both must be of one family")


def batch_of(step, size, count, seed):
    """Indices of the step's problems: every problem once, in an order shuffled anew, before any comes again."""
    positions = range((step - 1) * size, step * size)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in {p // count for p in positions}}
    return [int(orders[p // count][p % count]) for p in positions]


def train(args, run):
    """Algorithm 1. `run` holds the models and keeps the books (class Run); the method is all here."""
    for step in run.steps():
        share = explorer_share(step, args.mix_steps, args.schedule, args.explorer_share)          # alpha_i
        n_explorer, n_learner = split_group(share, args.group_size)                               # G_w, G_s
        batch = batch_of(step, args.prompts_per_step, len(run.problems), args.seed)
        problems, prompts = [run.problems[i] for i in batch], [run.prompts[i] for i in batch]
        started = time.perf_counter()

        by_explorer = by_learner = None
        if n_explorer:                                                                            # sample(pi_omega, G_w)
            by_explorer = sample(run.explorer, prompts, n_explorer, generator(args.seed, step, EXPLORER), args.max_new_tokens,
                                 args.explorer_temperature, top_p=args.explorer_top_p, rows=args.rollout_rows, explorer=True)
        if n_learner:                                                                             # sample(pi_theta, G_s)
            by_learner = sample(run.learner, prompts, n_learner, generator(args.seed, step, LEARNER), args.max_new_tokens,
                                args.temperature, top_p=args.top_p, rows=args.rollout_rows)
        rollouts = mix(by_explorer, by_learner)                                                   # O, one group a prompt
        sampled = time.perf_counter()

        texts = decode(rollouts, run.tokenizer)
        scores = torch.tensor([[reward.score(problem, text) for text in group] for problem, group in zip(problems, texts)],
                              dtype=torch.float32, device=rollouts.ids.device)                    # [P, G, (answer, strict)]
        advantages = group_advantages(scores[..., 1], scale=args.loss != "dr_grpo")               # over the combined group
        scored = time.perf_counter()

        metrics = update(args, run, prompts, rollouts, advantages, generator(args.seed, step, MINIBATCH))  # theta <- ...
        run.record(step, share, problems, rollouts, texts, scores, metrics, seconds_sampling=sampled - started,
                   seconds_scoring=scored - sampled, seconds_training=time.perf_counter() - scored)


def update(args, run, prompts, rollouts, advantages, minibatch_generator):
    """One GRPO update of --minibatches optimiser steps on a step's rollouts. Returns its metrics."""
    P, G, T = rollouts.ids.shape
    ids, mask, sampler_logps, explorer = (x.flatten(0, 1) for x in (rollouts.ids, rollouts.mask, rollouts.logps, rollouts.explorer))
    A, N = advantages.flatten(), P * G  # [P, G] -> [N]
    row_prompts = [prompt for prompt in prompts for _ in range(G)]

    def logprobs(model, rows):
        return response_logprobs(model, [row_prompts[i] for i in rows.tolist()], ids[rows], mask[rows], args.temperature)

    def frozen_logprobs(model):
        with torch.no_grad():
            return torch.cat([logprobs(model, rows)[0] for rows in torch.arange(N, device=ids.device).split(args.micro_batch)])

    start_logps = frozen_logprobs(run.learner)  # pi_old, [N, T]
    reference_logps = frozen_logprobs(run.reference) if run.reference else None
    old_logps, treatment = explorer_treatment(args.explorer_ratio, start_logps, sampler_logps, explorer)
    ratio, clipped, entropy = (torch.zeros(N, T, device=ids.device) for _ in range(3))
    losses, kls, grad_norms, skipped = [], [], [], 0
    for some in torch.randperm(P, generator=minibatch_generator).to(ids.device).chunk(args.minibatches):
        rows = (some[:, None] * G + torch.arange(G, device=ids.device)).flatten()  # whole groups: [P/m, G] -> [rows]
        weights = token_weights(mask[rows], args.loss, args.max_new_tokens)
        losses.append(0.0), kls.append(0.0)
        for micro in torch.arange(len(rows), device=ids.device).split(args.micro_batch):
            r, w = rows[micro], weights[micro]
            logps, H = logprobs(run.learner, r)
            entropy[r] = H.detach()
            loss, ratio[r], clip = policy_loss(logps, old_logps[r], A[r], w * treatment[r], args.clip_low, args.clip_high,
                                               sequence_ratio=args.loss == "gspo")
            clipped[r] = clip.float()
            if run.reference:
                kl = kl_penalty(logps, reference_logps[r], w, args.kl_estimator)
                loss = loss + args.kl_coef * kl
                kls[-1] += kl.item()
            loss.backward()
            losses[-1] += loss.item()
        grad_norms.append(run.optimizer.step(args.max_grad_norm))
        skipped += not np.isfinite(grad_norms[-1])

    def mean(x, rows):
        chosen = x[mask & rows[:, None]]
        return chosen.mean().item() if len(chosen) else None

    everyone, gap = torch.ones_like(explorer), (start_logps - sampler_logps).abs()
    return {"loss": np.mean(losses), "kl": np.mean(kls) if run.reference else None, "grad_norm": np.mean(grad_norms),
            "skipped_updates": skipped, "entropy": mean(entropy, everyone), "ratio": mean(ratio, everyone),
            "ratio_explorer": mean(ratio, explorer), "ratio_learner": mean(ratio, ~explorer),
            "clip_fraction": mean(clipped, everyone), "clip_fraction_explorer": mean(clipped, explorer),
            "clip_fraction_learner": mean(clipped, ~explorer),
            "logp_gap_explorer": mean(gap, explorer), "logp_gap_learner": mean(gap, ~explorer)}


class Optimizer:
    """AdamW in float32 for weights of any dtype: at bfloat16 a relative change below 1/256 would be rounded away, and
    learning rates of 1e-6 make little else. For float32 weights the masters are the weights themselves."""

    def __init__(self, model, lr):
        self.weights = list(model.parameters())
        self.masters = [w if w.dtype == torch.float32 else w.detach().float() for w in self.weights]
        self.adamw = torch.optim.AdamW(self.masters, lr=lr, weight_decay=0.0, fused=self.weights[0].device.type != "mps")

    @torch.no_grad()
    def step(self, max_norm):
        """One update from the weights' gradients, which it clears. Returns the gradient's norm before clipping; if
        that is not finite, the update is skipped."""
        for master, weight in zip(self.masters, self.weights):
            if master is not weight:
                master.grad = weight.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_norm).item()
        if np.isfinite(norm):
            self.adamw.step()
            self.copy_masters()
        for tensor in (*self.masters, *self.weights):
            tensor.grad = None
        return norm

    @torch.no_grad()
    def copy_masters(self):
        for master, weight in zip(self.masters, self.weights):
            if master is not weight:
                weight.copy_(master)

    def state(self):
        return {"masters": self.masters, "adamw": self.adamw.state_dict()}

    @torch.no_grad()
    def restore(self, state):
        for master, saved in zip(self.masters, state["masters"]):
            master.copy_(saved)
        self.adamw.load_state_dict(state["adamw"])
        self.copy_masters()


class Run:
    """What a run holds (models, optimiser, problems) and what it writes to --out: config.json, metrics.jsonl (a line a
    step), pass_at_k.json, rollouts.txt (a few at each evaluation), checkpoint.pt, learner/, curve.png."""

    def __init__(self, args):
        """Loads everything and checks that it fits together. ValueError or OSError: one line on what is wrong."""
        device, dtype = pick_device(args.device), getattr(torch, args.dtype)
        self.args, self.out = args, Path(args.out)
        self.learner, self.tokenizer = load(args.learner, device, dtype)
        self.problems = reward.load_problems(args.data)
        self.eval_problems = reward.load_problems(args.eval_data)[:args.eval_problems] if args.eval_data else []
        self.prompts = [encode_prompt(problem, self.tokenizer) for problem in self.problems]
        check_lengths(self.learner, self.prompts, args.max_new_tokens)
        shares = [explorer_share(step, args.mix_steps, args.schedule, args.explorer_share) for step in range(1, args.steps + 1)]
        self.last_explorer_step = max((step for step, share in enumerate(shares, 1) if share > 0), default=0)
        self.reference = copy.deepcopy(self.learner).requires_grad_(False) if args.kl_coef else None  # before any update
        self.optimizer = Optimizer(self.learner, args.lr)
        self.first_step = 1
        if args.resume:
            state = torch.load(self.out / "checkpoint.pt", map_location=device, weights_only=True)
            self.optimizer.restore(state["optimizer"])
            self.first_step = state["step"] + 1
        self.explorer = None
        if self.first_step <= self.last_explorer_step:
            self.explorer, explorer_tokenizer = load(args.explorer, device, dtype)
            check_tokenizers(self.tokenizer, explorer_tokenizer)
            check_lengths(self.explorer, self.prompts, args.max_new_tokens)
            self.explorer.requires_grad_(False)
        self.interrupted, self.warned = False, False

        self.out.mkdir(parents=True, exist_ok=True)
        if args.resume:  # drop lines of steps after the checkpoint: they will be made again
            lines = [line for line in (self.out / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] < self.first_step]
            (self.out / "metrics.partial").write_text("".join(line + "\n" for line in lines))
            os.replace(self.out / "metrics.partial", self.out / "metrics.jsonl")
        else:
            (self.out / "config.json").write_text(json.dumps(vars(args), indent=2))
        print(f"learner  {args.learner}: {sum(w.numel() for w in self.optimizer.weights):,} parameters, on {device}\n"
              f"explorer {args.explorer}: " + (f"{sum(w.numel() for w in self.explorer.parameters()):,} parameters, frozen, until step "
                                               f"{self.last_explorer_step} of {args.steps}" if self.explorer else "not used") +
              f"\nproblems {len(self.problems)} to train on, {len(self.eval_problems)} held out; the first prompt is\n"
              f"    {self.tokenizer.decode(self.prompts[0])!r}")

    def evaluate(self, step, model):
        """{metric: value} of a model on the held-out problems; the same random numbers each time, to compare steps."""
        n = self.args.eval_n
        result = evaluate(model, self.tokenizer, self.eval_problems, n, generator(self.args.seed, 0, EVALUATION), self.args.max_new_tokens,
                          temperature=self.args.temperature, top_p=self.args.top_p, rows=self.args.rollout_rows)
        self.curve = [pass_at_k(result["strict"], n, k) for k in powers_of_two(n)]
        return {f"eval_{prefix}pass@{k}": pass_at_k(result[kind], n, k)
                for prefix, kind in (("", "answer"), ("strict_", "strict")) for k in (1, 16) if k <= n}

    def note_curve(self, name):
        path = self.out / "pass_at_k.json"
        curves = json.loads(path.read_text()) if path.exists() else {"k": powers_of_two(self.args.eval_n)}
        path.write_text(json.dumps(curves | {name: self.curve}))

    def write(self, metrics):
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")

    def steps(self):
        """Yields the steps to take, under a progress bar; Ctrl-C ends it after the current step."""
        def interrupt(signum, frame):
            self.interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print("\nCtrl-C: finishing this step, then saving (once more to quit at once)", file=sys.stderr)

        if self.first_step == 1 and self.eval_problems:
            print(f"pass@k before training, {len(self.eval_problems)} held-out problems, {self.args.eval_n} rollouts each ...")
            self.write({"step": 0} | self.evaluate(0, self.learner))
            self.note_curve("learner before")
            if self.explorer:
                self.evaluate(0, self.explorer)
                self.note_curve("explorer")
            curves = json.loads((self.out / "pass_at_k.json").read_text())
            print(table(curves.pop("k"), curves))
        previous = signal.signal(signal.SIGINT, interrupt)
        self.bar = tqdm(total=self.args.steps, initial=self.first_step - 1, desc="training", unit="step", dynamic_ncols=True)
        for step in range(self.first_step, self.args.steps + 1):
            yield step
            if step >= self.last_explorer_step:
                self.explorer = None  # frozen, and never asked again: its memory is free
            self.bar.update()
            if self.interrupted or step == self.args.steps or (self.args.save_every and step % self.args.save_every == 0):
                self.save_checkpoint(step)
            if self.interrupted:
                break
        self.bar.close()
        signal.signal(signal.SIGINT, previous)

    def record(self, step, share, problems, rollouts, texts, scores, metrics, **seconds):
        """Writes the step's line of metrics.jsonl; evaluates when it is time."""
        answers, rewards = scores.unbind(-1)  # [P, G] each
        explorer, lengths = rollouts.explorer, rollouts.lengths.float()
        mean = lambda x: x.float().mean().item() if x.numel() else None
        line = {"step": step, "share": share, "rollouts_explorer": int(explorer.sum()), "rollouts_learner": int((~explorer).sum()),
                "reward": mean(rewards), "reward_explorer": mean(rewards[explorer]), "reward_learner": mean(rewards[~explorer]),
                "reward_answer": mean(answers), "groups_all_fail": mean(rewards.amax(1) == 0), "groups_all_pass": mean(rewards.amin(1) == 1),
                **metrics, "length": mean(lengths), "length_explorer": mean(lengths[explorer]), "length_learner": mean(lengths[~explorer]),
                "truncated": mean(~rollouts.finished), **seconds, "tokens_per_second": lengths.sum().item() / seconds["seconds_sampling"]}
        last = step == self.args.steps
        if self.eval_problems and (last or (self.args.eval_every and step % self.args.eval_every == 0)):
            line |= self.evaluate(step, self.learner)
            if last:
                self.note_curve("learner after")
            with open(self.out / "rollouts.txt", "a") as file:
                for i, who in enumerate(explorer[0].tolist()):
                    file.write(f"step {step}, {'explorer' if who else 'learner'}, reward {rewards[0, i]:g}: {problems[0].question} {texts[0][i]}\n")
        self.write(line)
        self.bar.set_postfix(reward=f"{line['reward']:.2f}", explorer=f"{share:.0%}", **{"held-out": f"{v:.2f}" for k, v in line.items() if k == "eval_strict_pass@1"})
        if line["truncated"] > 0.5 and not self.warned:
            self.warned = True
            self.bar.write(f"warning: {line['truncated']:.0%} of the rollouts were cut at --max-new-tokens {self.args.max_new_tokens}; "
                           "a rollout cut before its answer earns nothing: raise it", file=sys.stderr)

    def save_checkpoint(self, step):
        temporary = self.out / "checkpoint.pt.partial"
        torch.save({"step": step, "optimizer": self.optimizer.state()}, temporary)
        os.replace(temporary, self.out / "checkpoint.pt")  # so checkpoint.pt is always a whole one

    def finish(self, seconds):
        """Saves the learner, draws the picture, says what came out and what to try next."""
        save(self.learner, self.tokenizer, self.out / "learner")
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        evals = [line for line in lines if "eval_pass@1" in line]
        if self.eval_problems and len(evals) > 1:
            print(f"\n{'held out':24}{'before':>8}{'after':>8}")
            for key in [key for key in evals[-1] if key.startswith("eval_")]:
                print(f"{key.removeprefix('eval_').replace('_', ' '):24}{evals[0][key]:8.3f}{evals[-1][key]:8.3f}")
        draw_run(self.out)
        print(f"\n{'stopped after step ' + str(lines[-1]['step']) + ' by Ctrl-C, ' if self.interrupted else ''}{seconds / 60:.1f} minutes; "
              f"everything is in {self.out}: curve.png, metrics.jsonl, rollouts.txt, learner/ (a Hugging Face directory)")
        again = shlex.join(argument for argument in sys.argv[1:] if argument != "--resume")
        if self.interrupted:
            print(f"go on: python train.py {again + ' ' if again else ''}{'' if '--out' in again else f'--out {self.out} '}--resume")
        elif self.args.explorer == "none":
            print("try next, the same with an explorer: leave out `--explorer none` (and --schedule none)")
        else:
            print(f"try next, the same without an explorer: python train.py {again + ' ' if again else ''}--explorer none")


def main():
    args = parse_args()
    started = time.time()
    try:
        settle(args)
        run = Run(args)
    except (ValueError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    train(args, run)
    run.finish(time.time() - started)
    if run.interrupted:
        sys.exit(130)


if __name__ == "__main__":
    main()
