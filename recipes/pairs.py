"""Base pairs for the study of recipes/claims.py: made, measured and qualified before any RL.

A pair is an explorer and a learner that plumbing/family.py pretrains from one seed (own corpus, table of
habits, initial weights, problems) into runs/claims/TASK-SEED. Its relatives are other models pretrained on
the same corpus, or (`noise`) on one with the same table and other writers.
"""
import functools
from pathlib import Path

import numpy as np
import torch

from eval import evaluate
from plumbing.checkpoint import load, save
from plumbing.family import CORPUS, make_corpus, make_family, pretrain
from plumbing.tasks import OPERATIONS, habit_solution
from plumbing.text import encode_all
from recipes.explorers import thinned
from plumbing.problems import load_problems
from sample import sample

RUNS = Path("runs/claims")
FIRST_PAIR = 10  # seeds below it are for searching
LADDER = {  # width, layers
    "habit": {"narrow": (24, 2), "explorer": (32, 2), "middle": (48, 2), "learner": (64, 3)},
    "natural": {"narrow": (32, 2), "explorer": (48, 2), "middle": (64, 3), "learner": (96, 3)}}
RELATIVES = {  # what differs from the learner's pretraining
    "narrow": {"like": "narrow"}, "middle": {"like": "middle"},  # other sizes
    "twin": {"init": 1_000},                           # other initial weights, corpus in another order
    "early": {"stop_after": 4},                        # the learner before it has learnt the habits
    **{f"noise {percent}%": {"noise": percent / 100} for percent in (0, 8, 32)},  # stronger and weaker habits
    **{f"epoch {n}": {"like": "explorer", "stop_after": n} for n in (3, 4)}}      # that execute less well


def directory(task, pair):
    return RUNS / f"{task}-{pair}"


def make_member(task, pair, name):
    """Pretrains one model of a pair unless it is there. "pruned" is the learner without its middle layer, and
    without any training after that."""
    base = directory(task, pair)
    if not base.exists():
        make_family(base, task, pair)
    if (base / name).exists():
        return
    member, tokenizer, stops = load(base / "learner")
    if name == "pruned":
        del member.layers[len(member.layers) // 2]
        member.hf_config = member.hf_config | {"num_hidden_layers": len(member.layers)}
    else:
        change, (size, epochs) = RELATIVES[name], CORPUS[task]
        corpus = make_corpus(task, size, pair, change.get("noise", 0.01))
        member = pretrain(name, tokenizer, corpus, LADDER[task][change.get("like", "learner")], epochs,
                          pair + change.get("init", 0), stop_after=change.get("stop_after"))
    save(member, tokenizer, stops, base / name)


@functools.cache
def measure(task, pair, name, n, thin=False, temperature=1.0, problems=128):
    """What a model does on its pair's held-out problems, n rollouts each: numbers of right ones per problem,
    and how much groups of 16 vary. In `habit` a solution has a *method*, its operator, and is *executed* if
    every step is right under that operator, whether or not the problem asked for it."""
    base = directory(task, pair)
    model, tokenizer, stops = load(base / name)
    problems = load_problems(base / "heldout.jsonl")[:problems]
    write = functools.partial(sample, model, max_new_tokens=16, stops=stops, temperature=temperature)
    seeded = torch.Generator().manual_seed(0)
    write, prompts = thinned(write) if thin else write, encode_all(problems, tokenizer)
    found = evaluate(write, tokenizer, problems, prompts, n, seeded)
    texts = found["texts"]  # [P][n]
    groups = [of_one[i:i + 16] for of_one in texts for i in range(0, n - 15, 16)]
    distinct = lambda part: float(np.mean([len({part(text) for text in group}) for group in groups]))
    found = {"strict": found["strict"], "distinct answers": distinct(lambda text: text[-1:]),
             "distinct texts": distinct(lambda text: text)}
    if task == "habit":
        executed = [text[:1] in OPERATIONS and text == habit_solution(problem.question, text[0])
                    for problem, group in zip(problems, texts) for text in group]
        methods = [[text[:1] for text in group] for group in texts]
        shares = [np.array([group.count(method) / n for method in set(group)]) for group in methods]
        found |= {"executed": float(np.mean(executed)), "distinct methods": distinct(lambda text: text[:1]),
                  "method entropy": float(np.mean([-(p * np.log(p)).sum() for p in shares]))}  # nats
    return found


def qualified(task, count, first=FIRST_PAIR):
    """The first `count` pairs from `first` on whose explorer executes (at least .8 of its rollouts) and mixes
    methods (entropy at least .5 nats). `natural` has no methods: all its pairs count."""
    pairs, pair = [], first
    while len(pairs) < count:
        make_member(task, pair, "explorer")
        found = measure(task, pair, "explorer", 32)
        if task == "natural" or found["executed"] >= 0.8 and found["method entropy"] >= 0.5:
            pairs.append(pair)
        else:
            print(f"pair {pair} does not qualify: executed {found['executed']:.2f}, "
                  f"entropy {found['method entropy']:.2f}")
        pair += 1
    return pairs
