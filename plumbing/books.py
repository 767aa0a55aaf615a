"""The books of a run: what a step measures, what is evaluated, where it is written, what is printed.

A step's metrics are in the checkpoint before anything that takes long or can fail. What is only there to be
looked at (the page, the picture, the --log) may fail with a warning, and never ends the run.
"""
import contextlib
import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np

from eval import crossover, evaluate, interval, pass_at_k, powers_of_two, table
from plumbing import pictures
from plumbing.checkpoint import save
from plumbing.steps import EVALUATION, generator, last_step
from plumbing.survival import save_checkpoint, settle


def keep_books(args, run, step, **line):
    """After an update. `line`: what the loop has to say of the step, its share at least. FloatingPointError
    if in each of five steps an update was skipped."""
    step.rollouts, last = step.rollouts.cpu(), step.number == args.steps
    line = {"step": step.number} | line | step.metrics | measure(step)
    run.history.append(line)
    warn(args, run, step)
    if len(run.history) >= 5 and all(past.get("skipped_updates") for past in run.history[-5:]):
        raise FloatingPointError(f"loss or gradient not finite in five steps, up to {step.number}: "
                                 "try a lower --lr")
    if last or due(step.number, args.save_every) and not line["skipped_updates"]:
        save_checkpoint(run, Path(args.out), args.keep)
    settle(run)
    publish(args, run)
    if last or step.number == 1 or due(step.number, args.eval_every):
        with only_to_look_at("no rollouts to look at"):
            if step.number == 1:
                pictures.show_rollouts(step, run.tokenizer)
            if step.tokens:
                pictures.note(Path(args.out), step, run.tokenizer)


def due(step, every):
    return every and step % every == 0


@contextlib.contextmanager
def only_to_look_at(what):
    try:
        yield
    except Exception as error:
        print(f"warning: {what}: {error!r:.300}", file=sys.stderr)


# ---- what is measured --------------------------------------------------------------------------------------

def measure(step):
    """Metrics of a step's rollouts, scores and seconds, which docs/metrics.md explains."""
    lengths, finished, explorer = (getattr(step.rollouts, name) for name in (
        "lengths", "finished", "from_explorer"))  # [P, G] each
    rewards, right = step.scores[..., 0], step.scores[..., 1] > 0  # [P, G] each
    by_learner = (right & ~explorer).any(1)  # [P, G] -> [P] the learner solved it
    mean = lambda x: x.float().mean().item() if x.numel() else None
    return {f"seconds_{phase}": value for phase, value in step.seconds.items()} | {
        "rollouts_explorer": int(explorer.sum()), "rollouts_learner": int((~explorer).sum()),
        "reward": mean(rewards), "reward_explorer": mean(rewards[explorer]),
        "reward_learner": mean(rewards[~explorer]), "reward_answer": mean(step.scores[..., 2]),
        "groups_all_fail": mean(~right.any(1)), "groups_all_pass": mean(right.all(1)),
        "groups_informative": mean(rewards.amax(1) > rewards.amin(1)),
        "groups_learner": mean(by_learner), "groups_explorer_only": mean(right.any(1) & ~by_learner),
        "length": mean(lengths), "length_explorer": mean(lengths[explorer]),
        "length_learner": mean(lengths[~explorer]), "truncated": mean(~finished),
        "tokens_per_second": lengths.sum().item() / step.seconds["sampling"]}


def evaluate_run(args, run, write):
    """Held-out metrics of write(prompts, n, generator), with the same random numbers every time, so that
    evaluations differ by the model alone."""
    n, random = args.eval_n, generator(args.seed, 0, EVALUATION)
    result = evaluate(write, run.tokenizer, run.eval_problems, run.eval_prompts, n, random)
    metrics = {f"eval_{prefix}pass@{k}": pass_at_k(result[kind], n, k)
               for prefix, kind in (("", "answer"), ("strict_", "strict")) for k in (1, 16) if k <= n}
    curve = [pass_at_k(result["strict"], n, k) for k in powers_of_two(n)]
    return metrics | {"eval_curve": curve, "eval_interval": interval(curve[0], len(run.eval_problems))}


# ---- where it is written -----------------------------------------------------------------------------------

def open_books(args, run, explore):
    """Writes metrics.jsonl anew. A new run begins with step 0, the base models' pass@k; of a resumed one the
    last step is published again, since its evaluation came after the checkpoint."""
    path = Path(args.out, "metrics.jsonl")
    if run.history:
        take_up_evaluation(path, run.history[-1])
    elif run.eval_problems:
        run.history.append(evaluate_base_models(args, run, explore))
    path.write_text("".join(map(as_json, run.history[:-1])))
    if run.history:
        publish(args, run)


def take_up_evaluation(path, line):
    """Adds to the line of a step what metrics.jsonl has of its evaluation, which need not be made again."""
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # a line that was cut short
            if (written := json.loads(text))["step"] == line["step"]:
                line |= {key: x for key, x in written.items() if key.startswith("eval_")}


def publish(args, run):
    """Evaluates the newest step where that is due, then writes, logs, prints and draws it."""
    line, out = run.history[-1], Path(args.out)
    step, looked_at = line["step"], line["step"] == args.steps or due(line["step"], args.eval_every)
    if run.eval_problems and looked_at and "eval_curve" not in line:
        line |= evaluate_run(args, run, run.write)
        keep_best(args, run, out)
    with open(out / "metrics.jsonl", "a") as file:
        file.write(as_json(line))
    with only_to_look_at(f"--log {args.log} failed"):
        run.log(line)
    if step:
        report(args, run, line)
        if looked_at or step == 1:
            with only_to_look_at("no picture"):
                pictures.draw(out, run.history, crossing(run.history[0]))


def keep_best(args, run, out):
    """If the step that was just evaluated is the best of those that were saved, best.pt is its checkpoint."""
    newest = out / f"checkpoint_{last_step(run):06d}.pt"
    at_1 = [line["eval_strict_pass@1"] for line in run.history if line["step"] and "eval_curve" in line
            and (line["step"] == args.steps or due(line["step"], args.save_every))]
    if newest.exists() and at_1 and at_1[-1] == max(at_1):
        with only_to_look_at("best.pt is not kept"):
            (out / "best.pt").unlink(missing_ok=True)
            os.link(newest, out / "best.pt")  # a second name: it takes no room and no time


def as_json(line):
    finite = lambda x: None if isinstance(x, float) and not np.isfinite(x) else x
    return json.dumps({key: finite(x) for key, x in line.items()}) + "\n"


def crossing(line):
    """The k at which the explorer overtakes the base learner, or None."""
    curves = line.get("eval_curve"), line.get("explorer_curve")
    return crossover(powers_of_two(2 ** (len(curves[0]) - 1)), *curves) if all(curves) else None


# ---- what is printed ---------------------------------------------------------------------------------------

def announce(args, run, device):
    """Prints what is trained on what."""
    stops = run.tokenizer.convert_ids_to_tokens(run.stops) + [text.replace("\\n", "\n") for text in args.stop]
    count = lambda weights: f"{sum(w.numel() for w in weights):,}"
    print(f"learner   {args.learner}: {count(run.learner.parameters())} parameters, "
          f"{count(run.optimizer.weights)} trained at {args.lr:g}, {args.dtype} on {device}\n"
          f"explorer  {args.explorer}: "
          f"{'plain GRPO' if args.explorer == 'none' else f'schedule {args.schedule}'}\n"
          f"a step    {args.prompts_per_step} prompts x {args.group_size} rollouts of up to "
          f"{args.max_new_tokens} tokens, {args.minibatches} mini-batches\n"
          f"stops at  {', '.join(map(repr, stops))}\n"
          f"problems  {len(run.problems)} to train on, {len(run.eval_problems)} held out; first prompt and "
          f"answer:\n          {run.tokenizer.decode(run.prompts[0])!r}, {run.problems[0].answer!r}\n"
          "The loss stays near 0, as it should (README.md): watch the reward.")


def evaluate_base_models(args, run, explore):
    """Step 0: pass@k before training, printed. Of the learner at temperature 1, as in all evaluations, and of
    the explorer as it will sample. A pool has no rollouts of held-out problems."""
    print(f"pass@k before training: {len(run.eval_problems)} problems x {args.eval_n} rollouts", flush=True)
    line = {"step": 0} | evaluate_run(args, run, run.write)
    curves = {"learner": line["eval_curve"]}
    if explore and not args.explorer.endswith(".jsonl"):
        curves["explorer"] = line["explorer_curve"] = evaluate_run(args, run, explore)["eval_curve"]
    print(table(powers_of_two(args.eval_n), curves), flush=True)
    return line


def report(args, run, line):
    """Prints a step's line."""
    recent = [past for past in run.history if past["step"]][-5:]
    seconds = [sum(past[f"seconds_{phase}"] for phase in ("sampling", "scoring", "training"))
               for past in recent]
    left = (args.steps - line["step"]) * np.mean(seconds)
    left = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
    by = [f"{who} {line[f'reward_{who}']:.3f}" for who in ("explorer", "learner") if line[f"rollouts_{who}"]]
    held_out = f"   held out {line['eval_strict_pass@1']:.3f}" if "eval_curve" in line else ""
    print(f"step {line['step']:3d}/{args.steps}   explorer {line['share']:4.0%}   "
          f"reward {line['reward']:.3f} ({', '.join(by)})   {seconds[-1]:.1f} s, {left} left{held_out}",
          flush=True)


def warn(args, run, step):
    """Prints what is amiss with the newest step."""
    say, line = partial(print, "warning:", file=sys.stderr), run.history[-1]
    recent = [past for past in run.history if past["step"]][-3:]
    if line["truncated"] > 0.5:
        say(f"{line['truncated']:.0%} of the rollouts were cut at --max-new-tokens {args.max_new_tokens}, "
            "perhaps before an answer")
    if line["skipped_updates"]:
        say(f"{line['skipped_updates']} updates skipped, loss or gradient not finite; problems {step.batch}")
    if len(recent) > 2 and not any(past["groups_informative"] for past in recent):
        say("nothing was learnt in three steps: in every group all rewards were equal. Do the rollouts in "
            f"{args.out}/rollouts.html end with an answer? Are the problems too hard, or too easy?")


def finish(args, run):
    """Saves the learner, says what came out."""
    out, evals = Path(args.out), [line for line in run.history if "eval_pass@1" in line]
    save(run.learner, run.tokenizer, run.stops, out / "learner")
    if len(evals) > 1:
        print(f"\n{'held out':16}{'before':>10}{'step ' + str(evals[-1]['step']):>10}")
        for key in (key for key in evals[-1] if "pass@" in key):
            name = key.removeprefix("eval_").replace("_", " ")
            print(f"{name:16}{evals[0][key]:10.3f}{evals[-1][key]:10.3f}")
    print(f"\neverything is in {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if last_step(run) < args.steps:
        print(f"stopped after step {last_step(run)}: `--out {out} --resume` goes on")
