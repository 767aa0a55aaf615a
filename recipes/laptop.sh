#!/bin/sh
# The laptop run: S2L-PO, then plain GRPO, on the same models. Pretraining, the first time, takes 2.5 minutes,
# each run 40 seconds and 0.6 GB of memory (measured on 2 CPU cores at commit 64873bb). Expected: held-out
# strict pass@1 .411 -> .980 and .411 -> .975; at step 15 the former is at .939, the latter at .773.
set -e
python train.py --out runs/laptop-s2lpo
python train.py --out runs/laptop-grpo --explorer none
