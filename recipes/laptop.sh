#!/bin/sh
# The laptop run: S2L-PO, then plain GRPO, on the same models. Measured on 2 CPU cores: 2.5 minutes of pretraining the
# first time, then 40 seconds each; 0.6 GB of memory. Expected: held-out strict pass@1 .412 -> .990 and .412 -> .980, and the
# former at .957 by step 15, where the latter is at .697.
set -e
python train.py --out runs/laptop-s2lpo
python train.py --out runs/laptop-grpo --explorer none
