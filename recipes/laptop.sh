#!/bin/sh
# The laptop run: plain GRPO, then S2L-PO, on the same models. Pretraining, the first time, takes 2 to 4
# minutes, each run half a minute and 0.6 GB of memory (2 CPU cores). Expected held-out strict pass@1, seen
# on several machines: S2L-PO .54 to .65 at step 5, .72 to .87 at step 10, .94 to .99 at the end; plain GRPO
# .95 to .98.
set -e
python train.py --out runs/laptop-grpo --explorer none
python train.py --out runs/laptop-s2lpo
