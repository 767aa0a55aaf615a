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
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import reward
from model import load, pick_device
from sample import decode, encode_prompt, sample


def pass_at_k(correct, n, k):
    """Unbiased pass@k from `correct` [P], the number of right rollouts out of n per problem: mean over problems of
    1 - C(n-c, k) / C(n, k), as the product of (1 - k/i) over i = n-c+1 .. n, which cannot overflow.
    ValueError if k > n: the estimator needs at least k rollouts."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n, and n is {n}")
    return float(np.mean([1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)) for c in correct]))


def evaluate(model, tokenizer, problems, n, generator, max_new_tokens, **sampling):
    """Samples n rollouts per problem: {"answer": [P] right final answers, "strict": [P], "truncated": share,
    "tokens": mean length, "texts": [P][n]}."""
    rollouts = sample(model, [encode_prompt(problem, tokenizer) for problem in problems], n, generator, max_new_tokens, **sampling)
    texts = decode(rollouts, tokenizer)
    scores = [[reward.score(problem, text) for text in group] for problem, group in zip(problems, texts)]
    return {"answer": [sum(s.answer for s in group) for group in scores],
            "strict": [sum(s.strict for s in group) for group in scores],
            "truncated": 1 - rollouts.finished.float().mean().item(),
            "tokens": rollouts.lengths.float().mean().item(), "texts": texts}


def powers_of_two(n):
    return [2 ** i for i in range(n.bit_length())]


def crossover(ks, first, second):
    """The k (interpolated in log k) at which the curve that starts lower takes the lead; None if it never does."""
    lead = [a - b for a, b in zip(first, second)]
    for k, next_k, before, after in zip(ks, ks[1:], lead, lead[1:]):
        if before * lead[0] > 0 and after * lead[0] < 0:
            return math.exp(np.interp(0, *zip(*sorted([(before, math.log(k)), (after, math.log(next_k))]))))
    return None


def table(ks, curves):
    """Text table of {name: [pass@k for k in ks]}."""
    width = max(len(name) for name in curves)
    lines = [" " * width + "".join(f"{f'@{k}':>8}" for k in ks)]
    return "\n".join(lines + [f"{name:{width}}" + "".join(f"{value:8.3f}" for value in values) for name, values in curves.items()])


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
    right.fill_between(x, [line["share"] for line in steps], step="mid", alpha=0.15, color="tab:orange", label="explorer's share")
    right.plot(x, [line["reward"] for line in steps], color="grey", linewidth=0.8, label="reward in training")
    for key, label in (("eval_strict_pass@1", "held-out pass@1"), ("eval_strict_pass@16", "held-out pass@16")):
        if evals and key in evals[0]:
            right.plot([line["step"] for line in evals], [line[key] for line in evals], marker="o", markersize=4, label=label)
    right.set(xlabel="step", ylim=(0, 1.02), title="training")
    right.legend(fontsize=8)
    figure.savefig(directory / "curve.png", dpi=130)


def main():
    parser = argparse.ArgumentParser(description="pass@k of one or several models on the same problems.")
    parser.add_argument("--model", nargs="+", required=True, help="checkpoint directories or Hugging Face hub names")
    parser.add_argument("--data", required=True, help="problems: JSONL with `question` and `answer`")
    parser.add_argument("--problems", type=int, default=0, help="use the first so many problems (0: all)")
    parser.add_argument("--n", type=int, default=64, help="rollouts per problem")
    parser.add_argument("--k", default="", help="comma-separated k of pass@k (default: powers of two up to n)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="0: off")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--presence-penalty", type=float, default=0.0, help="subtracted from the logits of tokens already written")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto: cuda, then mps, then cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", default="", help="directory for eval.json and pass_at_k.png (default: beside the first model)")
    args = parser.parse_args()
    try:
        ks = [int(k) for k in args.k.split(",")] if args.k else powers_of_two(args.n)
        if not all(1 <= k <= args.n for k in ks):
            raise ValueError(f"--k must lie between 1 and --n, which is {args.n}")
        problems = reward.load_problems(args.data)[:args.problems or None]
        results = {name: run(args, name, problems) for name in args.model}
    except (ValueError, OSError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        sys.exit(2)

    labels = {name: name.rstrip("/") if len(results) > 1 else "pass@k" for name in results}
    summary = {"data": args.data, "problems": len(problems), "n": args.n, "k": ks, "settings": vars(args), "models": {}}
    for kind in ("answer", "strict"):
        curves = {labels[name]: [pass_at_k(result[kind], args.n, k) for k in ks] for name, result in results.items()}
        if kind == "strict" and all(problem.task == "math" for problem in problems):
            break  # free text has no steps to check
        print(f"\n{'final answer' if kind == 'answer' else 'every step right'}: {len(problems)} problems, {args.n} rollouts each")
        print(table(ks, curves))
        for name, curve in zip(results, curves.values()):
            summary["models"].setdefault(name, {})[kind] = dict(zip(map(str, ks), curve))
        drawn = curves
    for name, result in results.items():
        summary["models"][name] |= {"truncated": result["truncated"], "tokens": result["tokens"], "correct": result["strict"]}
        print(f"{name}: {result['tokens']:.1f} tokens a rollout, {result['truncated']:.1%} cut at --max-new-tokens {args.max_new_tokens}")
    if len(results) > 1:
        summary["crossover"] = crossover(ks, *list(drawn.values())[:2])
        print(f"crossover of the first two: {'none up to k = ' + str(ks[-1]) if summary['crossover'] is None else 'k = %.1f' % summary['crossover']}")

    out = Path(args.out) if args.out else Path(args.model[0]).parent if Path(args.model[0]).is_dir() else Path(".")
    out.mkdir(parents=True, exist_ok=True)
    (out / "eval.json").write_text(json.dumps(summary, indent=2))
    written = [out / "eval.json"]
    if figure := new_figure(1):
        plot_curves(figure[1], ks, drawn)
        figure[0].savefig(out / "pass_at_k.png", dpi=130)
        written.append(out / "pass_at_k.png")
    print("wrote", ", ".join(map(str, written)))


def run(args, name, problems):
    """Evaluates one model, a few problems at a time so that there is a progress bar."""
    model, tokenizer = load(name, pick_device(args.device), getattr(torch, args.dtype))
    generator = torch.Generator().manual_seed(args.seed)
    parts = []
    for i in tqdm(range(0, len(problems), 16), desc=name, unit="x16 problems", dynamic_ncols=True):
        parts.append(evaluate(model, tokenizer, problems[i:i + 16], args.n, generator, args.max_new_tokens,
                              temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                              presence_penalty=args.presence_penalty))
    merged = {key: sum((part[key] for part in parts), []) for key in ("answer", "strict", "texts")}
    sizes = [len(part["answer"]) for part in parts]
    return merged | {key: float(np.average([part[key] for part in parts], weights=sizes)) for key in ("truncated", "tokens")}


if __name__ == "__main__":
    main()
