"""pass@k of one or several models on the same problems: table, JSON and picture, with the crossover marked.

    python eval.py --model runs/family-habit/learner runs/family-habit/explorer --data runs/family-habit/heldout.jsonl

pass@k is the chance that at least one of k independent rollouts is right. From n >= k rollouts of which c are right,
"any of the first k" is a noisy estimate; 1 - C(n-c, k) / C(n, k), averaged over problems, uses every subset of size k
and is unbiased (Chen et al., 2021). The paper's motivation is a crossover: the larger model wins at k = 1, the smaller
one at large k, because its rollouts differ more from each other.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import reward
from model import OutOfMemory, fitting, load, lock, write_whole
from sample import add_sampling_flags, decode, encode_prompt, pick_device, sample


WORTH_IT = 30  # the rule of `when` in recipes/claims.py: explorer's success over the learner's own, where its groups fail


def pass_at_k(correct, n, k):
    """Unbiased pass@k from `correct` [P], the number of right rollouts out of n per problem: mean over problems of
    1 - C(n-c, k) / C(n, k), as the product of (1 - k/i) over i = n-c+1 .. n, which cannot overflow.
    ValueError if k > n: the estimator needs at least k rollouts."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n, and n is {n}")
    all_fail = [0.0 if n - c < k else np.prod(1.0 - k / np.arange(n - c + 1, n + 1)) for c in correct]
    return float(1.0 - np.mean(all_fail))


def evaluate(model, tokenizer, problems, n, generator, max_new_tokens, template=None, thinking=None, **sampling):
    """Samples n rollouts per problem. Returns {"answer": [P], "strict": [P]}, the numbers of rollouts whose final answer
    (whose every step) is right, "truncated" [P] and "tokens" [P], those cut short and their total length, and "texts"."""
    prompts = [encode_prompt(problem, tokenizer, template, thinking) for problem in problems]
    rollouts = sample(model, prompts, n, generator, max_new_tokens, **sampling)
    texts = decode(rollouts, tokenizer)
    scores = [[reward.score(problem, text) for text in group] for problem, group in zip(problems, texts)]
    return {"answer": [sum(s.answer for s in group) for group in scores],
            "strict": [sum(s.strict for s in group) for group in scores], "texts": texts,
            "truncated": (~rollouts.finished).sum(1).tolist(), "tokens": rollouts.lengths.sum(1).tolist()}


def bootstrap(correct, n, draws=1_000):
    """95% interval of pass@1: problems are drawn anew, with replacement, as another exam of the same kind would."""
    problems = np.random.default_rng(0).integers(len(correct), size=(draws, len(correct)))
    return np.quantile((np.array(correct) / n)[problems].mean(1), (0.025, 0.975)).tolist()


def powers_of_two(n):
    return [2 ** i for i in range(n.bit_length())]


def crossover(ks, first, second):
    """The k (interpolated in log k) at which the curve that starts lower takes the lead; None if it never does."""
    lead = [(math.log(k), a - b) for k, a, b in zip(ks, first, second) if a != b]
    for (x, before), (next_x, after) in zip(lead, lead[1:]):
        if before * after < 0:
            return math.exp(x + (next_x - x) * before / (before - after))
    return None


def rescue(learner, explorer, n, group_size):
    """What an explorer could add, from right rollouts out of n > group_size per problem of each, [P] both: (share of the
    learner's groups that all fail; on those problems, the explorer's success, and the learner's own in other rollouts).
    A problem counts with the chance C(n-c, G) / C(n, G) that a group of G of its n rollouts holds no right one; the c right
    ones are then among the n - G others. Where no group fails, the two are 0."""
    fails = np.array([1.0 - pass_at_k([c], n, group_size) for c in learner])  # [P]
    there = lambda right, of: float((fails * right).sum() / of / max(fails.sum(), 1e-9))
    return float(fails.mean()), there(explorer, n), there(learner, n - group_size)


def table(ks, curves):
    """Text table of {name: [pass@k for k in ks]}."""
    width = max(map(len, curves))
    rows = [f"{name:{width}}" + "".join(f"{value:8.3f}" for value in values) for name, values in curves.items()]
    return "\n".join([" " * width + "".join(f"{f'@{k}':>8}" for k in ks), *rows])


def plot_curves(axis, ks, curves):
    """Draws pass@k curves on a matplotlib axis and marks where the second overtakes the first."""
    for name, values in curves.items():
        axis.plot(ks, values, marker="o", markersize=4, label=name)
    if len(curves) > 1:
        k = crossover(ks, *list(curves.values())[:2])
        if k:
            axis.axvline(k, color="grey", linestyle=":", label=f"crossover at k = {k:.1f}")
    axis.set(xscale="log", xlabel="k", ylabel="pass@k", ylim=(0, 1.02), title="pass@k on held-out problems")
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.minorticks_off()
    axis.legend(fontsize=8)


def new_figure(panels):
    """(figure, axes), or None with a note where matplotlib is missing: only the pictures need it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install matplotlib draws it", file=sys.stderr)
        return None
    figure = Figure(figsize=(5.2 * panels, 3.8), layout="constrained")
    return figure, figure.subplots(1, panels)


def draw_run(directory):
    """curve.png of a training run: pass@k before and after, and the learning curve over the explorer's share."""
    if (figure := new_figure(2)) is None:
        return
    figure, (left, right) = figure
    if (directory / "pass_at_k.json").exists():
        curves = json.loads((directory / "pass_at_k.json").read_text())
        plot_curves(left, curves.pop("k"), curves)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps, evals = [line for line in lines if line["step"] > 0], [line for line in lines if "eval_pass@1" in line]
    x = [line["step"] for line in steps]
    share = [line["share"] for line in steps]
    right.fill_between(x, share, step="mid", alpha=0.15, color="tab:orange", label="explorer's share")
    right.plot(x, [line["reward"] for line in steps], color="grey", linewidth=0.8, label="reward in training")
    for key, label in (("eval_strict_pass@1", "held-out pass@1"), ("eval_strict_pass@16", "held-out pass@16")):
        if evals and all(key in line for line in evals):
            right.plot([line["step"] for line in evals], [line[key] for line in evals], "o-", markersize=4, label=label)
    right.set(xlabel="step", ylim=(0, 1.02), title="training")
    right.legend(fontsize=8)
    figure.savefig(directory / "curve.png", dpi=130)


MODES = {"think": {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "presence_penalty": 0.0, "thinking": "on"},
         "nothink": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "presence_penalty": 1.5, "thinking": "off"}}


def main():
    parser = argparse.ArgumentParser(description="pass@k of one or several models on the same problems.",
                                     usage="%(prog)s [flags], which --help explains",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", required=True, help="checkpoint directories or Hugging Face hub names")
    add("--data", nargs="+", required=True, help="problems: files, directories or names, as train.py's --data")
    add("--problems", type=int, default=0, help="use the first so many problems of each; 0: all")
    add("--n", type=int, default=64, help="rollouts per problem")
    add("--k", help="comma-separated k of pass@k; powers of two up to n where not given")
    add("--mode", choices=MODES, help="the paper's sampling settings for evaluation; flags that are given win")
    add_sampling_flags(add)
    add("--out", help="directory of eval.json, pass_at_k.png and the generations; continued if it is there; runs/eval- and "
        "the time where not given")
    args = parser.parse_args()
    if args.mode:
        parser.set_defaults(**MODES[args.mode])
        args = parser.parse_args()
    try:
        ks = [int(k) for k in args.k.split(",")] if args.k else powers_of_two(args.n)
        if not ks or not all(1 <= k <= args.n for k in ks) or args.problems < 0:
            raise ValueError("--n must be at least 1, every --k between 1 and --n, and --problems at least 0")
        problems = {data: reward.load_problems(data)[:args.problems or None] for data in args.data}
        out = Path(args.out or time.strftime("runs/eval-%Y%m%d-%H%M%S"))
        out.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(args).items() if key not in ("out", "device", "k", "rollout_rows")}
        if (out / "settings.json").exists() and reward.read_object(out / "settings.json") != settings:
            raise ValueError(f"{out} holds an evaluation with other settings (settings.json): take another --out")
        write_whole(out / "settings.json", lambda file: file.write(json.dumps(settings, indent=2).encode()))
        results = {data: {} for data in problems}
        for i, name in enumerate(args.model):
            model, tokenizer = load(name, pick_device(args.device), getattr(torch, args.dtype))
            for j, data in enumerate(problems):
                path = out / f"generations-{i}-{j}.jsonl"
                results[data][name] = evaluate_resumably(args, model, tokenizer, problems[data], path, f"{name} on {data}")
    except (ValueError, OSError, OutOfMemory) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        sys.exit(2)

    summary, curves_of = {"settings": vars(args), "k": ks, "data": {}}, {}
    for data, models in results.items():
        print(f"\n{data}: {len(problems[data])} problems, {args.n} rollouts each"
              + (", answers compared with the help of math-verify" if reward.math_verify() else ""))
        found, curves_of[data] = report(models, problems[data], ks, args.n)
        summary["data"][data] = {"crossover": found, "models": models}
    (out / "eval.json").write_text(json.dumps(summary, indent=2))
    if figure := new_figure(len(results)):
        for axis, (data, curves) in zip(np.atleast_1d(figure[1]), curves_of.items()):
            plot_curves(axis, ks, curves)
            axis.set_title(Path(data).name)
        figure[0].savefig(out / "pass_at_k.png", dpi=130)
    print(f"\nwrote {out / 'eval.json'}, the generations" + (f" and {out / 'pass_at_k.png'}" if figure else ""))


def evaluate_resumably(args, model, tokenizer, problems, path, title, at_once=16):
    """`evaluate`, a few problems at a time, each kept as a line of `path`: what was stopped goes on behind the lines that are
    there. Every batch has random numbers of its own, so that the result is the same.
    ValueError names a line of `path` that is not its problem's."""
    most = {"answer": args.n, "strict": args.n, "truncated": args.n, "tokens": args.n * args.max_new_tokens}
    lines, ends = [], [0]  # and where in the file each ends
    with open(path, "ab+") as file:
        lock(file, path)
        file.seek(0)
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break  # cut short when it was stopped
            ends.append(ends[-1] + len(line))
            try:
                lines.append(line := reward.parse(line))
                if line["question"] != problems[number - 1].question or not all(
                        type(line[key]) is int and 0 <= line[key] <= most[key] for key in most):
                    raise ValueError("another question, or impossible counts")
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not of this evaluation, remove the file: {str(error):.100}") from None
        lines = lines if len(lines) == len(problems) else lines[:len(lines) // at_once * at_once]
        file.truncate(ends[len(lines)])
        bar = tqdm(total=len(problems), initial=len(lines), desc=title, unit="problem", dynamic_ncols=True)
        for start in range(len(lines), len(problems), at_once):
            batch = problems[start:start + at_once]
            found = fitting(args, "rollout_rows", args.n, lambda: evaluate(
                model, tokenizer, batch, args.n, torch.Generator().manual_seed(args.seed * 1_000_003 + start), args.max_new_tokens,
                args.template, args.thinking, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                presence_penalty=args.presence_penalty, rows=args.rollout_rows))
            for i, problem in enumerate(batch):
                lines.append({"question": problem.question, "truth": problem.answer} | {key: found[key][i] for key in found})
                file.write(json.dumps(lines[-1]).encode() + b"\n")
            file.flush()
            bar.update(len(batch))
        bar.close()
    return {key: [line[key] for line in lines] for key in most}


def report(models, problems, ks, n):
    """Prints what `models`, {name: evaluate's counts}, reached on one data set and adds it to them. Returns the crossover of
    the first two and the curves."""
    free_text = all(problem.task not in reward.TASKS for problem in problems)  # has no steps to check
    for kind, title in (("answer", "final answer right"), ("strict", "every written step right"))[:1 if free_text else 2]:
        curves = {name: [pass_at_k(result[kind], n, k) for k in ks] for name, result in models.items()}
        print(f"{title}\n{table(ks, curves)}")
        for name, result in models.items():
            result[f"pass@k {kind}"], result[f"pass@1 {kind} 95%"] = curves[name], bootstrap(result[kind], n)
    rollouts = len(problems) * n
    for name, result in models.items():
        low, high = result[f"pass@1 {kind} 95%"]
        print(f"{name}: pass@1 {pass_at_k(result[kind], n, 1):.1%} [{low:.1%}, {high:.1%}], "
              f"{sum(result['tokens']) / rollouts:.1f} tokens a rollout, {sum(result['truncated']) / rollouts:.1%} cut short")
    if len(curves) < 2:
        return None, curves
    found = crossover(ks, *list(curves.values())[:2])
    print(f"crossover of the first two: {f'k = {found:.1f}' if found else 'none'}")
    (first, second), group = [result[kind] for result in list(models.values())[:2]], min(16, n // 2)
    if group:
        fails, rescued, own = rescue(first, second, n, group)
        print(f"as learner and explorer: {fails:.0%} of the first's groups of {group} fail altogether; on those problems "
              f"{rescued:.2%}\nof the second's rollouts are right, and {own:.2%} of the first's own. In the study S2L-PO was the "
              f"faster where\nthe former was more than {WORTH_IT} times the latter, GRPO where it was less (recipes/claims.py when)")
    return found, curves


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the same command, with --out, goes on
        sys.exit(130)
