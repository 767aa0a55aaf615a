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
from model import load
from sample import add_sampling_flags, decode, encode_prompt, pick_device, sample


def pass_at_k(correct, n, k):
    """Unbiased pass@k from `correct` [P], the number of right rollouts out of n per problem: mean over problems of
    1 - C(n-c, k) / C(n, k), as the product of (1 - k/i) over i = n-c+1 .. n, which cannot overflow.
    ValueError if k > n: the estimator needs at least k rollouts."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n, and n is {n}")
    all_fail = [0.0 if n - c < k else np.prod(1.0 - k / np.arange(n - c + 1, n + 1)) for c in correct]
    return float(1.0 - np.mean(all_fail))


def evaluate(model, tokenizer, problems, n, generator, max_new_tokens, **sampling):
    """Samples n rollouts per problem. Returns {"answer": [P], "strict": [P]}, the numbers of rollouts whose final answer
    (whose every step) is right, and "truncated" [P] and "tokens" [P], those cut short and their total length."""
    prompts = [encode_prompt(problem, tokenizer) for problem in problems]
    rollouts = sample(model, prompts, n, generator, max_new_tokens, **sampling)
    texts = decode(rollouts, tokenizer)
    scores = [[reward.score(problem, text) for text in group] for problem, group in zip(problems, texts)]
    return {"answer": [sum(s.answer for s in group) for group in scores],
            "strict": [sum(s.strict for s in group) for group in scores],
            "truncated": (~rollouts.finished).sum(1).tolist(), "tokens": rollouts.lengths.sum(1).tolist()}


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
    """(share of the learner's groups that all fail, the explorer's success on those problems), from right rollouts out of n
    per problem of each, [P] both. A problem counts with the chance C(n-c, G) / C(n, G) that a group of G of the learner's
    rollouts holds no right one; where none ever fails, the second is 0."""
    fails = np.array([1.0 - pass_at_k([c], n, group_size) for c in learner])  # [P]
    return float(fails.mean()), float((fails * explorer).sum() / n / max(fails.sum(), 1e-9))


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
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib draws it", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot.subplots(1, panels, figsize=(5.2 * panels, 3.8), layout="constrained")


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
        if evals and key in evals[0]:
            right.plot([line["step"] for line in evals], [line[key] for line in evals], "o-", markersize=4, label=label)
    right.set(xlabel="step", ylim=(0, 1.02), title="training")
    right.legend(fontsize=8)
    figure.savefig(directory / "curve.png", dpi=130)


def main():
    parser = argparse.ArgumentParser(description="pass@k of one or several models on the same problems.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", required=True, help="checkpoint directories or Hugging Face hub names")
    add("--data", required=True, help="problems: JSONL with `question` and `answer`")
    add("--problems", type=int, default=0, help="use the first so many problems; 0: all")
    add("--n", type=int, default=64, help="rollouts per problem")
    add("--k", help="comma-separated k of pass@k; powers of two up to n where not given")
    add_sampling_flags(add)
    add("--out", help="directory for eval.json and pass_at_k.png; runs/eval- and the time where not given")
    args = parser.parse_args()
    try:
        ks = [int(k) for k in args.k.split(",")] if args.k else powers_of_two(args.n)
        if not ks or not all(1 <= k <= args.n for k in ks) or args.problems < 0:
            raise ValueError("--n must be at least 1, every --k between 1 and --n, and --problems at least 0")
        problems = reward.load_problems(args.data)[:args.problems or None]
        results = {name: evaluate_with_progress(args, name, problems) for name in args.model}
    except (ValueError, OSError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        sys.exit(2)

    rollouts = len(problems) * args.n
    print(f"{len(problems)} problems, {args.n} rollouts each")
    for kind, title in (("answer", "final answer right"), ("strict", "every written step right")):
        curves = {name: [pass_at_k(result[kind], args.n, k) for k in ks] for name, result in results.items()}
        print(f"\n{title}\n{table(ks, curves)}")
        for name in results:
            results[name][f"pass@k {kind}"] = curves[name]
        if all(problem.task not in reward.TASKS for problem in problems):
            break  # free text has no steps to check
    for name, result in results.items():
        print(f"\n{name}: {sum(result['tokens']) / rollouts:.1f} tokens a rollout, "
              f"{sum(result['truncated']) / rollouts:.1%} cut at --max-new-tokens {args.max_new_tokens}")
    found = None
    if len(curves) > 1:
        found = crossover(ks, *list(curves.values())[:2])
        print(f"crossover of the first two: {f'k = {found:.1f}' if found else 'none'}")
        (first, second), group = [result[kind] for result in list(results.values())[:2]], min(16, args.n)
        fails, rescued = rescue(first, second, args.n, group)
        print(f"as learner and explorer: {fails:.0%} of the first's groups of {group} fail altogether; on those problems "
              f"{rescued:.1%}\nof the second's rollouts are right, while of the first's own {pass_at_k(first, args.n, 1):.1%} are "
              "on all problems")

    out = Path(args.out or time.strftime("runs/eval-%Y%m%d-%H%M%S"))
    out.mkdir(parents=True, exist_ok=True)
    summary = {"settings": vars(args), "k": ks, "crossover": found, "models": results}
    (out / "eval.json").write_text(json.dumps(summary, indent=2))
    if figure := new_figure(1):
        plot_curves(figure[1], ks, curves)
        figure[0].savefig(out / "pass_at_k.png", dpi=130)
    print(f"wrote {out / 'eval.json'}" + (f" and {out / 'pass_at_k.png'}" if figure else ""))


def evaluate_with_progress(args, name, problems, at_once=16):
    """`evaluate` a few problems at a time, under a progress bar."""
    model, tokenizer = load(name, pick_device(args.device), getattr(torch, args.dtype))
    generator, parts = torch.Generator().manual_seed(args.seed), []
    with tqdm(total=len(problems), desc=name, unit="problem", dynamic_ncols=True) as bar:
        for i in range(0, len(problems), at_once):
            parts.append(evaluate(model, tokenizer, problems[i:i + at_once], args.n, generator, args.max_new_tokens,
                                  temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                                  presence_penalty=args.presence_penalty))
            bar.update(len(problems[i:i + at_once]))
    return {key: sum((part[key] for part in parts), []) for key in parts[0]}


if __name__ == "__main__":
    main()
