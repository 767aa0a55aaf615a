"""The steps of a run: which problems, which random numbers, how long it takes.

Random numbers depend on (seed, step, purpose) alone, and so does the order of the problems. Nothing random has
to be saved, therefore, and no place in the data.
"""
import time
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

LEARNER, EXPLORER, MINIBATCH, EVALUATION, ADAPTER = range(5)  # what a random stream is for


def generator(seed, step, purpose):
    """A CPU torch.Generator of its own for every use of randomness."""
    state = np.random.SeedSequence([seed, step, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def batch_of(step, size, count, seed):
    """Indices of the step's problems: each comes once, in an order shuffled anew, before any comes again."""
    positions = range((step - 1) * size, step * size)
    epochs = {position // count for position in positions}
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs}
    return [int(orders[position // count][position % count]) for position in positions]


def last_step(run):
    return run.history[-1]["step"] if run.history else 0


@dataclass
class Step:
    """A step of training: what it trains on, how long its phases take, and what came of it."""
    number: int        # i = 1, 2, .., T
    batch: list        # [P] indices of its problems
    problems: list     # [P]
    prompts: list      # [P] their token ids
    random: object     # random(purpose): a generator of its own for each
    rollouts: object = None    # [P, G], as are
    scores: object = None      # [P, G, 3] reward, strict, answer
    advantages: object = None  # [P, G]
    metrics: dict = field(default_factory=dict)  # of the update
    tokens: dict | None = None                   # of each token: {name: [P, G, T]}
    seconds: dict = field(default_factory=dict)  # {phase: seconds}
    since: float = field(default_factory=time.perf_counter)

    def lap(self, phase):
        """Counts the time since the last lap as that phase's."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.since
        self.since = now


def steps(args, run):
    """The steps that this run has still to do."""
    for number in range(last_step(run) + 1, args.steps + 1):
        batch = batch_of(number, args.prompts_per_step, len(run.problems), args.seed)
        problems, prompts = [run.problems[i] for i in batch], [run.prompts[i] for i in batch]
        yield Step(number, batch, problems, prompts, partial(generator, args.seed, number))
