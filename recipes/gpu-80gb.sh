#!/bin/sh
# One 80 GB card: Qwen3-1.7B-Base explores for Qwen3-4B-Base on DAPO-Math-17k, with LoRA.
# Memory (estimated, recipes/plan.py): 37 GiB while sampling, 17 GiB in the update; an 8B learner 45 and 27.
# All of the 4B's weights do not fit: 80 and 83 GiB, since AdamW's moments are float32. Time (estimated, a
# third of an H100's peak and 30 ms a decoding step): 3 minutes a step, 5 hours a run. Result: not measured.
set -e
mkdir -p data
for NAME in dapo-math-17k aime24; do
    test -e data/$NAME.jsonl || python -m recipes.data $NAME --out data/$NAME.jsonl
done
FLAGS="--learner Qwen/Qwen3-4B-Base --data data/dapo-math-17k.jsonl --eval-data data/aime24.jsonl
 --eval-problems 30 --eval-n 16 --max-new-tokens 1024 --steps 100 --prompts-per-step 32 --group-size 16
 --lr 1e-5 --dtype bfloat16 --lora-rank 64 --checkpoint-layers --micro-batch-tokens 8192 --rollout-rows 128
 --compile"
EXPLORER="--explorer Qwen/Qwen3-1.7B-Base --explorer-temperature 0.7 --explorer-top-p 0.95"
python -m recipes.plan --prompt-tokens 300 $FLAGS $EXPLORER
python train.py $FLAGS $EXPLORER --out runs/dapo-s2lpo
python train.py $FLAGS --explorer none --out runs/dapo-grpo
