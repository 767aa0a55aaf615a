"""pass@k of one or several models on the same problems: table, JSON and picture, with the crossover marked.

    python eval.py --model runs/family-habit/learner runs/family-habit/explorer --data PROBLEMS.jsonl

pass@k is the chance that at least one of k independent rollouts is right. From n >= k rollouts of which c are
right, "any of the first k" is a noisy estimate; 1 - C(n-c, k) / C(n, k), averaged over problems, uses every
subset of size k and is unbiased (Chen et al., 2021). The paper's motivation is a crossover: the larger model
wins at k = 1, the smaller one at large k, because its rollouts differ more from each other.
"""
import argparse
import hashlib
import importlib.util
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import plumbing  # before torch, which reads a variable that it sets

import numpy as np
import torch
from tqdm import tqdm

from plumbing.answers import after_thought
from plumbing.checkpoint import fingerprint
from plumbing.files import made_once
from plumbing.pictures import new_figure, plot_curves
from plumbing.problems import load_problems, scorer_hash
from plumbing.survival import load_any, run_of
from plumbing.terminal import one_line, pick_device
from plumbing.text import decode, encode_all, stop_texts
from reward import Score, score
from sample import check_lengths, sample


def pass_at_k(correct, n, k):
    """Unbiased pass@k from `correct` [P], the number of right rollouts out of n per problem: mean over
    problems of 1 - C(n-c, k) / C(n, k), as the product of (1 - k/i) over i = n-c+1 .. n, which cannot
    overflow. ValueError if k > n: the estimator needs at least k rollouts."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n, and n is {n}")
    all_fail = [0.0 if n - c < k else np.prod(1.0 - k / np.arange(n - c + 1, n + 1)) for c in correct]
    return float(1.0 - np.mean(all_fail))


def evaluate(write, tokenizer, problems, prompts, n, generator, score=score):
    """n rollouts of every problem, whose prompts (lists of ids) are given, by write(prompts, n, generator) ->
    Rollouts. Returns the number of rollouts whose final answer is right, "answer" [P], whose every step is
    right, "strict" [P], that were cut short, "truncated" [P], their total length, "tokens" [P], and "texts"
    [P][n]."""
    rollouts = write(prompts, n, generator)
    texts = decode(rollouts, tokenizer)
    scores = [[score(problem, text) for text in group] for problem, group in zip(problems, texts)]
    return {"answer": [sum(s.answer for s in group) for group in scores],
            "strict": [sum(s.strict for s in group) for group in scores], "texts": texts,
            "truncated": (~rollouts.finished).sum(1).tolist(), "tokens": rollouts.lengths.sum(1).tolist()}


def math_verify_score(problem, text):
    """math-verify's verdict, for comparison with published figures. Not to train against: it evaluates
    expressions, so that a response which repeats the question's own sum is right."""
    from math_verify import parse, verify
    if problem.task not in ("math", "instructed"):
        return score(problem, text)
    right = verify(parse(f"\\boxed{{{problem.answer}}}"), parse(after_thought(text)))
    return Score(float(right), right, right)


def interval(share, count, z=1.96):
    """Wilson's 95% interval of a share over `count` problems. With several rollouts per problem it is too
    wide rather than too narrow."""
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count ** 2))
    return [(centre + sign * spread) / (1 + z * z / count) for sign in (-1, 1)]


def powers_of_two(n):
    return [2 ** i for i in range(n.bit_length())]


def crossover(ks, first, second):
    """The k, interpolated in log k, at which the curve that starts lower takes the lead; None if never."""
    lead = [(math.log(k), a - b) for k, a, b in zip(ks, first, second)]
    leader = next((ahead for _, ahead in lead if ahead), 0.0)  # its sign: of whom is ahead at first
    for (x, before), (next_x, after) in zip(lead, lead[1:]):
        if leader * after < 0:
            return math.exp(x + (next_x - x) * before / (before - after))
    return None


def headroom(learner, explorer, n, group_size):
    """What an explorer could add, from each one's right rollouts out of n > group_size per problem, [P] both.
    Returns the share of the learner's groups that all fail and, on those problems, the explorer's success and
    the learner's own outside of the group; 0 if no group fails.

    With c right among n rollouts, a group of G of them fails with the chance C(n-c, G) / C(n, G), by which
    the problem is weighted. All c are then among the other n - G: its own success there is c / (n - G)."""
    fails = np.array([1.0 - pass_at_k([c], n, group_size) for c in learner])  # [P]
    there = lambda right, of: float((fails * right).sum() / of / max(fails.sum(), 1e-9))
    return float(fails.mean()), there(explorer, n), there(learner, n - group_size)


def table(ks, curves):
    """Text table of {name: [pass@k for k in ks]}."""
    width = max(map(len, curves))
    rows = [" " * width + "".join(f"{f'@{k}':>8}" for k in ks)]
    for name, curve in curves.items():
        rows.append(f"{name:{width}}" + "".join(f"{value:8.3f}" for value in curve))
    return "\n".join(rows)


def presence_penalty(penalty, logits, ids, lengths):
    """`sample`'s hook of a presence penalty: it is taken off the logits [R, V] of all tokens that a row's
    response so far, ids [R, T] up to lengths [R], holds."""
    written = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # [R, T]
    return logits - penalty * (torch.zeros_like(logits).scatter_add_(1, ids, written.to(logits)) > 0)


# ---- the command line --------------------------------------------------------------------------------------

VERIFIERS = {"strict": score, "math-verify": math_verify_score}
MODES = {
    "think": dict(temperature=[0.6], top_p=0.95, top_k=20, presence_penalty=0.0, thinking="on"),
    "nothink": dict(temperature=[0.7], top_p=0.8, top_k=20, presence_penalty=1.5, thinking="off")}


def parse_flags():
    parser = argparse.ArgumentParser(description="pass@k of one or several models on the same problems.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", required=True, default=argparse.SUPPRESS,  # --help then names no default
        help="checkpoint directories, hub names, runs of train.py, their .pt. The first's run, if it is one, "
             "says --data (its held-out problems), --max-new-tokens, --stop, --thinking (flags win)")
    add("--data", nargs="+", default=argparse.SUPPRESS, help="problems: JSONL files as train.py's --data")
    add("--problems", type=int, default=10 ** 9, help="use the first so many problems of each")
    add("--n", type=int, default=64, help="rollouts per problem")
    add("--mode", choices=MODES, help="the paper's settings of an evaluation; flags that are given win")
    add("--max-new-tokens", type=int, default=64, help="longest response")
    add("--stop", nargs="+", default=[], help="texts that end a response; \\n is a new line")
    add("--temperature", type=float, nargs="+", default=[1.0], help="one for all models or one for each; 0 "
        "is greedy. A model that is named twice shows what a temperature does where its groups fail")
    add("--top-k", type=int, default=0, help="0: off")
    add("--top-p", type=float, default=1.0, help="1: off")
    add("--presence-penalty", type=float, default=0.0, help="taken off the logits of tokens already written")
    add("--thinking", choices=("on", "off"), help="for chat templates that can; None: the template's own")
    add("--verifier", choices=VERIFIERS, default="strict", help="who compares answers; strict: reward.py")
    add("--rollout-rows", type=int, default=1024, help="rows sampled at once: lower it to save memory")
    add("--seed", type=int, default=0, help="of the rollouts")
    add("--device", default="auto", help="auto: cuda, then mps, then cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and activations")
    add("--out", default=time.strftime("runs/eval-%Y%m%d-%H%M%S"), help="directory of results and picture")
    args = parser.parse_args()
    _, run = run_of(args.model[0])
    own = {name: run[name] for name in ("max_new_tokens", "stop", "thinking") if name in run}
    own |= {"data": [run["eval_data"]]} if run.get("eval_data") else {}
    parser.set_defaults(**own | MODES.get(args.mode, {}))  # flags that are given win
    args = parser.parse_args()
    if "data" not in args:
        parser.error("--data is missing: the problems")
    return args


def result_of(write, tokenizer, problems, prompts, settings, path, about):
    """`evaluate`'s result of one model on one data set, 16 problems at a time, which have random numbers of
    their own. The file `path` keeps them, so that a killed evaluation goes on."""
    def batch(start):
        random = torch.Generator().manual_seed((settings["seed"] * 1_000_003 + start) % 2 ** 63)
        part = slice(start, start + 16)
        return evaluate(write, tokenizer, problems[part], prompts[part], settings["n"], random,
                        VERIFIERS[settings["verifier"]])
    starts = range(0, len(problems), 16)
    seconds = 0.1 if sys.stderr.isatty() else 30  # in a log, a line is a line
    batches = list(tqdm(made_once(path, about, starts, batch), about["data"], len(starts), unit="batch",
                        mininterval=seconds))
    return {key: sum((found[key] for found in batches), []) for key in batches[0]}


def report(results, problems, ks, n):
    """Prints what models, {name: result}, reached on one data set. Returns {name: strict pass@k curve} and
    the first two's crossover."""
    curves_of = lambda kind: {name: [pass_at_k(result[kind], n, k) for k in ks]
                              for name, result in results.items()}
    curves, in_words, found = curves_of("strict"), all(problem.in_words for problem in problems), None
    if not in_words:  # of free text nobody checks the steps: there strict is the final answer
        print(f"final answer right\n{table(ks, curves_of('answer'))}")
    print(f"{'final answer' if in_words else 'every written step'} right\n{table(ks, curves)}")
    for name, result in results.items():
        first, (low, high) = curves[name][0], interval(curves[name][0], len(problems))
        tokens, cut = (sum(result[key]) / len(problems) / n for key in ("tokens", "truncated"))
        print(f"{name}: pass@1 {first:.1%} [{low:.1%}, {high:.1%}], {tokens:.1f} tokens, {cut:.1%} cut")
    if len(curves) > 1:
        found, group = crossover(ks, *list(curves.values())[:2]), min(16, n // 2)
        print(f"crossover of the first two: {f'k = {found:.1f}' if found else 'none'}")
        right = {name: result["strict"] for name, result in results.items()}
        learner, *others = right
        if group:
            there = {name: headroom(right[learner], right[name], n, group) for name in others}
            fails, _, own = there[others[0]]
            shares = {learner: own} | {name: theirs for name, (_, theirs, _) in there.items()}
            print(f"{fails:.0%} of the first's groups of {group} fail. There, of further rollouts are right",
                  *(f"{share:8.2%}  {name}" for name, share in shares.items()), sep="\n")
    return curves, found


def main():
    with one_line("eval.py"):
        args = parse_flags()
        if args.n < 1 or args.problems < 1:
            raise ValueError("--n and --problems start at 1")
        if args.verifier == "math-verify" and not importlib.util.find_spec("math_verify"):
            raise ValueError("--verifier math-verify: pip install math-verify")
        problems, out = {data: load_problems(data)[:args.problems] for data in args.data}, Path(args.out)
        no_part = "model", "data", "out", "device", "mode", "problems", "rollout_rows"  # of a figure's key
        settings = {key: x for key, x in vars(args).items() if key not in no_part}
        if len(args.temperature) not in (1, len(args.model)):
            raise ValueError(f"--temperature: one for all {len(args.model)} models, or one for each")
        temperatures, results = args.temperature * (len(args.model) // len(args.temperature)), {}
        for i, (name, temperature) in enumerate(zip(args.model, temperatures)):
            again = args.model[:i].count(name)  # its rollouts must not be those of the first time, warmed
            mine = results[f"{name} at T {temperature:g}" if again else name] = {}
            settings |= {"temperature": temperature, "seed": args.seed + again}
            model, tokenizer, stops = load_any(name, pick_device(args.device), getattr(torch, args.dtype))
            prompts = {data: encode_all(some, tokenizer, args.thinking) for data, some in problems.items()}
            for some in prompts.values():  # before the first is sampled, not hours later
                check_lengths(model, some, args.max_new_tokens)
            write = partial(sample, model, max_new_tokens=args.max_new_tokens, stops=stops,
                            temperature=temperature, top_k=args.top_k, top_p=args.top_p,
                            rows=args.rollout_rows, until=stop_texts(args.stop, tokenizer),
                            adjust=args.presence_penalty and partial(presence_penalty,
                                                                     args.presence_penalty))
            decides = [settings, fingerprint(model, tokenizer, stops), scorer_hash()]
            out.mkdir(parents=True, exist_ok=True)
            for data, some in problems.items():
                key = json.dumps([decides, prompts[data], [vars(problem) for problem in some]])
                path = out / f"result-{hashlib.sha256(key.encode()).hexdigest()[:12]}.jsonl"
                about = {"model": name, "data": data, "settings": settings}
                mine[data] = result_of(write, tokenizer, some, prompts[data], settings, path, about)
        ks, figure = powers_of_two(args.n), new_figure(len(problems))
        for i, (data, some) in enumerate(problems.items()):
            print(f"\n{data}: {len(some)} problems, {args.n} rollouts each, verifier {args.verifier}")
            curves, found = report({name: results[name][data] for name in results}, some, ks, args.n)
            if figure:
                plot_curves(np.atleast_1d(figure[1])[i], curves, Path(data).name, found)
        if figure:
            figure[0].savefig(out / "pass_at_k.png", dpi=130)
        print(f"\n{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


if __name__ == "__main__":
    main()
