#!/bin/sh
# The laptop run: S2L-PO, then plain GRPO, on the same models. Measured on 2 CPU cores: 2.5 minutes of pretraining the
# first time, then 1 minute each; 0.6 GB of memory. Expected: held-out strict pass@1 .412 -> .973 and .412 -> .992.
set -e
python train.py --out runs/laptop-s2lpo
python train.py --out runs/laptop-grpo --explorer none
