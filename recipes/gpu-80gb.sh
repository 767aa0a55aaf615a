#!/bin/sh
# One 80 GB card: Qwen3-1.7B-Base explores for Qwen3-4B-Base on DAPO-Math-17k, all weights trained, moments in bfloat16.
# Memory (estimated, recipes/plan.py): 64 GiB while sampling, 67 GiB in the update. For the 8B learner: LoRA 43 GiB (--lora-rank
# 64), all weights 130 GiB. Time (estimated, a third of an H100's peak and 30 ms a decoding step): 4 minutes a step, 7 hours a
# run. Result: not measured.
set -e
FLAGS="--learner Qwen/Qwen3-4B-Base --data dapo-math-17k --eval-data aime24 --eval-problems 30 --eval-n 16
 --max-new-tokens 1024 --steps 100 --prompts-per-step 32 --group-size 16 --lr 1e-6 --dtype bfloat16 --optimizer-dtype bfloat16
 --checkpoint-layers --micro-batch-tokens 8192 --rollout-rows 128 --compile on"
EXPLORER="--explorer Qwen/Qwen3-1.7B-Base --explorer-temperature 0.7 --explorer-top-p 0.95"
python recipes/plan.py --prompt-tokens 300 $FLAGS $EXPLORER
python train.py $FLAGS $EXPLORER --out runs/dapo-s2lpo
python train.py $FLAGS --explorer none --out runs/dapo-grpo
