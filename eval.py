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
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import fingerprint, load, pick_device
from reward import load_problems, score
from sample import decode, encode, sample


def pass_at_k(correct, n, k):
    """Unbiased pass@k from `correct` [P], the number of right rollouts out of n per problem: mean over problems of
    1 - C(n-c, k) / C(n, k), as the product of (1 - k/i) over i = n-c+1 .. n, which cannot overflow.
    ValueError if k > n: the estimator needs at least k rollouts."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n, and n is {n}")
    all_fail = [0.0 if n - c < k else np.prod(1.0 - k / np.arange(n - c + 1, n + 1)) for c in correct]
    return float(1.0 - np.mean(all_fail))


def evaluate(write, tokenizer, problems, n, generator, thinking=None):
    """n rollouts of every problem by write(prompts, n, generator) -> Rollouts. Returns {"answer": [P], "strict": [P]}, the
    numbers of rollouts whose final answer (whose every step) is right, "truncated" [P] and "tokens" [P], those cut short
    and their total length, and "texts" [P][n]."""
    prompts = [encode(problem.prompt, tokenizer, problem.in_words, thinking) for problem in problems]
    rollouts = write(prompts, n, generator)
    texts = decode(rollouts, tokenizer)
    scores = [[score(problem, text) for text in group] for problem, group in zip(problems, texts)]
    return {"answer": [sum(s.answer for s in group) for group in scores],
            "strict": [sum(s.strict for s in group) for group in scores], "texts": texts,
            "truncated": (~rollouts.finished).sum(1).tolist(), "tokens": rollouts.lengths.sum(1).tolist()}


def interval(share, count, z=1.96):
    """Wilson's 95% interval of a share seen over `count` problems. Several rollouts a problem only narrow it."""
    centre, spread = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count ** 2))
    return [(centre + sign * spread) / (1 + z * z / count) for sign in (-1, 1)]


def powers_of_two(n):
    return [2 ** i for i in range(n.bit_length())]


def crossover(ks, first, second):
    """The k (interpolated in log k) at which the curve that starts lower takes the lead; None if it never does."""
    lead = [(math.log(k), a - b) for k, a, b in zip(ks, first, second) if a != b]
    for (x, before), (next_x, after) in zip(lead, lead[1:]):
        if before * after < 0:
            return math.exp(x + (next_x - x) * before / (before - after))
    return None


def headroom(learner, explorer, n, group_size):
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


# ---- pictures --------------------------------------------------------------------------------------------------------

def new_figure(panels):
    """(figure, axes), or None with a note where matplotlib is missing: only the pictures need it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install matplotlib draws it", file=sys.stderr)
        return None
    figure = Figure(figsize=(5.2 * panels, 3.8), layout="constrained")
    return figure, figure.subplots(1, panels)


def plot_curves(axis, ks, curves):
    """Draws pass@k curves on a matplotlib axis and marks where the second overtakes the first."""
    for name, values in curves.items():
        axis.plot(ks, values, marker="o", markersize=4, label=name)
    if len(curves) > 1 and (k := crossover(ks, *list(curves.values())[:2])):
        axis.axvline(k, color="grey", linestyle=":", label=f"crossover at k = {k:.1f}")
    axis.set(xscale="log", xlabel="k", ylabel="pass@k", ylim=(0, 1.02), title="pass@k on held-out problems")
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.minorticks_off()
    axis.legend(fontsize=8)


def draw_run(path, history, curves):
    """A training run's picture: pass@k before and after, and the learning curve over the explorer's share."""
    if (figure := new_figure(2)) is None:
        return
    figure, (left, right) = figure
    if curves:
        plot_curves(left, curves["k"], {name: curve for name, curve in curves.items() if name != "k"})
    steps, evals = [line for line in history if line["step"]], [line for line in history if "eval_pass@1" in line]
    x = [line["step"] for line in steps]
    right.fill_between(x, [line["share"] for line in steps], step="mid", alpha=0.15, color="tab:orange",
                       label="explorer's share")
    right.plot(x, [line["reward"] for line in steps], color="grey", linewidth=0.8, label="reward in training")
    for key, label in (("eval_strict_pass@1", "held-out pass@1"), ("eval_strict_pass@16", "held-out pass@16")):
        if evals and all(key in line for line in evals):
            right.plot([line["step"] for line in evals], [line[key] for line in evals], "o-", markersize=4, label=label)
    right.set(xlabel="step", ylim=(0, 1.02), title="training")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=130)


# ---- the command line ------------------------------------------------------------------------------------------------

MODES = {"think": {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "presence_penalty": 0.0, "thinking": "on"},
         "nothink": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "presence_penalty": 1.5, "thinking": "off"}}


def parse_flags():
    parser = argparse.ArgumentParser(description="pass@k of one or several models on the same problems.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", required=True, help="checkpoint directories or Hugging Face hub names")
    add("--data", nargs="+", required=True, help="problems: JSONL files as train.py's --data")
    add("--problems", type=int, default=0, help="use the first so many problems of each; 0: all")
    add("--n", type=int, default=64, help="rollouts per problem")
    add("--mode", choices=MODES, help="the paper's sampling settings for evaluation; flags that are given win")
    add("--max-new-tokens", type=int, default=64, help="longest response")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="0: off")
    add("--top-p", type=float, default=1.0, help="1: off")
    add("--presence-penalty", type=float, default=0.0, help="taken off the logits of tokens already written")
    add("--thinking", choices=("on", "off"), help="for chat templates that can; the template's own where not given")
    add("--rollout-rows", type=int, default=1024, help="rows sampled at once, in whole groups: lower it to save memory")
    add("--seed", type=int, default=0, help="of the rollouts")
    add("--device", default="auto", help="auto: cuda, then mps, then cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and activations")
    add("--out", help="directory of the results: a model and data set already there are not run again; runs/eval- and the "
        "time where not given")
    args = parser.parse_args()
    if args.mode:
        parser.set_defaults(**MODES[args.mode])
        args = parser.parse_args()
    return args


def result_of(args, name, data, problems, out):
    """`evaluate`'s counts for one model and data set, from `out` if it is there already. Every 16 problems have random
    numbers of their own."""
    model, tokenizer = load(name, pick_device(args.device), getattr(torch, args.dtype))
    settings = {key: value for key, value in vars(args).items() if key not in ("model", "data", "out", "device", "rollout_rows")}
    settings |= {"model": name, "data": data, "weights": fingerprint(model), "questions": [problem.question for problem in problems]}
    for path in out.glob("result-*.json"):
        if (result := json.loads(path.read_text()))["settings"] == settings:
            return result
    write = partial(sample, model, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
                    top_p=args.top_p, presence_penalty=args.presence_penalty, rows=args.rollout_rows)
    result = {"settings": settings}
    for start in tqdm(range(0, len(problems), 16), desc=f"{name} on {data}", unit="batch", dynamic_ncols=True):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + start)
        found = evaluate(write, tokenizer, problems[start:start + 16], args.n, generator, args.thinking)
        result |= {key: result.get(key, []) + found[key] for key in found}
    (out / f"result-{len(list(out.glob('result-*.json')))}.json").write_text(json.dumps(result))
    return result


def report(results, problems, ks, n):
    """Prints what models, {name: result}, reached on one data set. Returns {name: strict pass@k curve}."""
    kinds = (("answer", "final answer right"), ("strict", "every written step right"))
    for kind, title in kinds[:1] if all(problem.in_words for problem in problems) else kinds:  # words have no steps to check
        curves = {name: [pass_at_k(result[kind], n, k) for k in ks] for name, result in results.items()}
        print(f"{title}\n{table(ks, curves)}")
    rollouts = len(problems) * n
    for name, result in results.items():
        low, high = interval(curves[name][0], len(problems))
        print(f"{name}: pass@1 {curves[name][0]:.1%} [{low:.1%}, {high:.1%}], {sum(result['tokens']) / rollouts:.1f} tokens a "
              f"rollout, {sum(result['truncated']) / rollouts:.1%} cut short")
    if len(curves) > 1:
        k = crossover(ks, *list(curves.values())[:2])
        print(f"crossover of the first two: {f'k = {k:.1f}' if k else 'none'}")
    if len(curves) > 1 and (group := min(16, n // 2)):
        fails, explorer, own = headroom(*(result[kind] for result in list(results.values())[:2]), n, group)
        print(f"as learner and explorer: {fails:.0%} of the first's groups of {group} fail altogether; on those problems "
              f"{explorer:.2%}\nof the second's rollouts are right, and {own:.2%} of the first's own (docs/claims.md says what "
              "that foretold)")
    return curves


def main():
    args = parse_flags()
    try:
        if args.n < 1 or args.problems < 0:
            raise ValueError("--n starts at 1 and --problems at 0")
        problems = {data: load_problems(data)[:args.problems or None] for data in args.data}
        out = Path(args.out or time.strftime("runs/eval-%Y%m%d-%H%M%S"))
        out.mkdir(parents=True, exist_ok=True)
        results = {data: {name: result_of(args, name, data, problems[data], out) for name in args.model} for data in problems}
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"eval.py: error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    ks, figure = powers_of_two(args.n), new_figure(len(problems))
    for i, data in enumerate(problems):
        print(f"\n{data}: {len(problems[data])} problems, {args.n} rollouts each")
        curves = report(results[data], problems[data], ks, args.n)
        if figure:
            plot_curves(np.atleast_1d(figure[1])[i], ks, curves)
            np.atleast_1d(figure[1])[i].set_title(Path(data).name)
    if figure:
        figure[0].savefig(out / "pass_at_k.png", dpi=130)
    print(f"\n{out}: " + ", ".join(sorted(path.name for path in out.iterdir())))


if __name__ == "__main__":
    main()
