"""What OMP_WAIT_POLICY=PASSIVE, which train.py sets, costs on a quiet machine and gains beside other work.

    python bench/busy.py        1 to 10 minutes: the slow case is the point

Steps per second of pretraining the laptop's learner, in a process of its own, with the variable and with
ACTIVE, which is what most builds of OpenMP do when nothing is set; alone, and beside a busy process a core.
"""
import os
import statistics
import subprocess
import sys
import time

from common import machine, report, target

SECONDS, ROUNDS = 10, 3


def steps_per_second():
    """Counts steps in this process until the time is over."""
    import torch
    import torch.nn.functional as F
    from common import TINY, config_of

    import model as models
    torch.manual_seed(0)
    laptop = dict(TINY, hidden_size=64, intermediate_size=192, num_hidden_layers=3, head_dim=16)
    model = models.Transformer(config_of(laptop))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids, count, started = torch.randint(512, (64, 26)), -3, None
    while count < 1 or time.perf_counter() - started < SECONDS:
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1) @ model.head.T, ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        count += 1
        if count == 0:
            started = time.perf_counter()
    print(count / (time.perf_counter() - started))


def measure(policy, busy):
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        run = subprocess.run([sys.executable, __file__, "steps"], capture_output=True, text=True, check=True,
                             env=os.environ | {"OMP_WAIT_POLICY": policy})
        return float(run.stdout)
    finally:
        for other in others:
            other.kill()
            other.wait()


if __name__ == "__main__":
    if sys.argv[1:]:
        steps_per_second()
        sys.exit()
    print(f"{machine()}\n\nsteps a second      PASSIVE      ACTIVE")
    for busy in (0, os.cpu_count()):
        rates = {policy: [] for policy in ("PASSIVE", "ACTIVE")}
        for _ in range(ROUNDS):
            for policy, found in rates.items():
                found.append(measure(policy, busy))
        passive, active = (statistics.median(found) for found in rates.values())
        print(f"{f'beside {busy}':16}{passive:11.1f}{active:12.1f}")
        target(f"passive_of_active_beside_{busy}", passive / active, 1.0 if busy else 0.97, at_least=True)
    report()
