#!/bin/sh
# A real pair that fits anywhere: SmolLM2-135M-Instruct explores for SmolLM2-360M-Instruct, on three kinds of
# short question. Memory (estimated, recipes/plan.py): 6.2 GiB while sampling, 11.4 GiB in the update; of a
# GPU's, with its context, 6.8 and 12.0. Lower --micro-batch-tokens to 512 for 7.5 GiB. Time (estimated from
# the 135M's, by FLOPs): 1 minute a step and 2 hours a run on one CPU core.
# Result: the pair was not run, for want of the 360M. With the 135M as both, and as the learner alone, it
# was: docs/real.md. LEARNER=.. EXPLORER=.. STEPS=.. sh recipes/smollm2.sh takes other models.
set -e
export MALLOC_MMAP_THRESHOLD_=262144  # on Linux: else half as much memory again is kept (docs/real.md)
LEARNER=${LEARNER:-HuggingFaceTB/SmolLM2-360M-Instruct}
EXPLORER=${EXPLORER:-HuggingFaceTB/SmolLM2-135M-Instruct}
test -e data/questions.jsonl ||
    python -m recipes.questions --out data/questions.jsonl --held-out data/questions-test.jsonl
FLAGS="--learner $LEARNER --data data/questions.jsonl --eval-data data/questions-test.jsonl --stop \n
 --max-new-tokens 16 --steps ${STEPS:-100} --prompts-per-step 8 --group-size 16 --lr 1e-5 --eval-problems 200
 --eval-n 2 --micro-batch-tokens 2048 --rollout-rows 128"
python -m recipes.plan --prompt-tokens 95 $FLAGS --explorer "$EXPLORER"
python train.py $FLAGS --explorer none --out runs/smollm2-grpo
python train.py $FLAGS --explorer "$EXPLORER" --out runs/smollm2-s2lpo
python -m recipes.compare runs/smollm2-grpo runs/smollm2-s2lpo --out runs/smollm2.png
python eval.py --model runs/smollm2-grpo runs/smollm2-s2lpo "$LEARNER" "$EXPLORER" --n 16 --rollout-rows 128 \
    --out runs/smollm2-eval
