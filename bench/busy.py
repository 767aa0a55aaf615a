"""What GOMP_SPINCOUNT=10000, which train.py sets, costs on a quiet machine and gains beside other work.

    python bench/busy.py        2 to 5 minutes, Linux

OpenMP's threads spin while they wait for each other, for milliseconds if nobody says otherwise. Beside a busy
process a core, a thread then spins where its partner could run. Printed are steps per second of pretraining
the laptop's learner, in a process of its own: as train.py starts, with nothing set, and with
OMP_WAIT_POLICY=PASSIVE, which never spins; alone, and beside a busy process a core.
"""
import os
import statistics
import subprocess
import sys
import time

import torch  # before common, which sets GOMP_SPINCOUNT: OpenMP must see what `measure` set, or nothing
import torch.nn.functional as F
from common import TINY, Transformer, config_of, machine, report, target

SECONDS, ROUNDS = 5, 4
SETTINGS = {"as train.py": {"GOMP_SPINCOUNT": "10000"}, "nothing set": {},
            "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"}}
GIVEN = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}


def steps_per_second():
    """Counts steps in this process until the time is over."""
    torch.manual_seed(0)
    laptop = dict(TINY, hidden_size=64, intermediate_size=192, num_hidden_layers=3, head_dim=16)
    model = Transformer(config_of(laptop))
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


def measure(setting, busy):
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        run = subprocess.run([sys.executable, __file__, "steps"], capture_output=True, text=True, check=True,
                             env=GIVEN | setting)
        return float(run.stdout)
    finally:
        for other in others:
            other.kill()
            other.wait()


if __name__ == "__main__":
    if sys.argv[1:]:
        steps_per_second()
        sys.exit()
    print(f"{machine()}\n\n{'steps a second, medians (lowest)':36}" + "".join(f"{x:>20}" for x in SETTINGS))
    for busy in (0, os.cpu_count()):
        rates = {name: [] for name in SETTINGS}
        for _ in range(ROUNDS):
            for name, found in rates.items():
                found.append(measure(SETTINGS[name], busy))
        medians = [statistics.median(found) for found in rates.values()]
        print(f"{f'beside {busy} busy processes':36}" + "".join(
            f"{f'{median:.1f} ({min(found):.1f})':>20}" for median, found in zip(medians, rates.values())))
        goal = 5 if busy else 0.97
        target(f"short_spin_of_default_beside_{busy}", medians[0] / medians[1], goal, at_least=True)
    report()
