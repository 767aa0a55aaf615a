"""Other explorers: values of the seam explore(prompts, n, generator) -> Rollouts [P, n].

    python -m recipes.explorers fleet --also MODEL [--also MODEL]        several, who share the work
    python -m recipes.explorers thinned                                  groups of one method each

Both take train.py's flags too. The second is a control: another policy without its variety within a group.
"""
import argparse
from functools import partial

import torch

import train
from sample import join


def fleet(explores):
    """Several explorers share n as evenly as it goes; the last get the remainder."""
    def explore(prompts, n, generator):
        counts = [(n + i) // len(explores) for i in range(len(explores))]
        parts = [write(prompts, count, generator) for write, count in zip(explores, counts) if count]
        return join(*parts)
    return explore


def thinned(write):
    """A group holds rollouts of one method only, that of its first rollout: each method comes as often as
    before. They are chosen out of 4n. The method is the first token, as in the task `habit`."""
    def explore(prompts, n, generator):
        pool = write(prompts, 4 * n, generator)
        same = pool.ids[:, :, 0] == pool.ids[:, :1, 0]  # [P, 4n]
        order = (~same).int().argsort(dim=1, stable=True)  # rollouts of the first one's method stand first
        places = torch.arange(n, device=order.device) % same.sum(1, keepdim=True)  # repeated where too few
        chosen = order.gather(1, places)  # [P, n]
        return pool[torch.arange(len(prompts), device=order.device)[:, None], chosen]
    return explore


def open_fleet(args, run, also):
    """Opens --explorer and those of --also, each as train.py does."""
    if pools := [name for name in also if name.endswith(".jsonl")]:
        raise ValueError(f"--also {pools[0]}: give --also a model, and the pool to --explorer")
    explores, hashes = [], []
    for name in (args.explorer, *also):
        explores.append(train.open_explorer(argparse.Namespace(**vars(args) | {"explorer": name}), run))
        hashes.append(run.hashes["explorer"])
    run.hashes["explorer"] = hashes
    return fleet(explores)


def open_thinned(args, run):
    if args.explorer.endswith(".jsonl"):
        raise ValueError("thinned draws 4 times as many rollouts as it keeps: give --explorer a model")
    return thinned(train.open_explorer(args, run))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train with another explorer. Other flags are train.py's.")
    parser.add_argument("kind", choices=("fleet", "thinned"))
    parser.add_argument("--also", action="append", default=[], help="fleet: one more beside --explorer")
    own, flags = parser.parse_known_args(argv)
    if own.kind == "fleet":
        train.main(flags, open_explorer=partial(open_fleet, also=own.also))
    else:
        train.main(flags, open_explorer=open_thinned, recipe="thinned")


if __name__ == "__main__":
    main()
