#!/bin/sh
# The paper's settings on one card: Qwen3-1.7B-Base explores for Qwen3-8B-Base, DAPO-Math-17k in 16 steps of
# 1,024 prompts, G = 16, T_mix = 8, responses up to 4,096 tokens, then AIME and CommonsenseQA. The explorer's
# rollouts are sampled ahead, by as many machines as there are shards. --loss dapo: the authors' script leaves
# verl's default, where every token weighs the same. `-m recipes.separate` in the place of train.py makes that
# script's two updates a step.
# Not the paper's: LoRA, at ten times its learning rate. Memory (estimated, recipes/plan.py): 58 GiB while
# sampling, 24 GiB in the update. All weights, as in the paper, take 174 GiB in the update, 159 without the
# KL's reference: no card of 141 GB holds that, since AdamW's moments are float32. Time (estimated, 40% of an
# H100's peak and 35 ms a decoding step): 8 days. Result: not measured.
set -e
mkdir -p data runs
for NAME in dapo-math-17k aime24 aime25 commonsenseqa; do
    test -e data/$NAME.jsonl || python -m recipes.data $NAME --out data/$NAME.jsonl
done
for SHARD in 1 2 3 4 5 6 7 8; do  # each on a machine of its own, if there are
    python -m recipes.pool --model Qwen/Qwen3-1.7B-Base --data data/dapo-math-17k.jsonl --n 16 \
        --temperature 0.7 --top-p 0.95 --max-new-tokens 4096 --dtype bfloat16 --rollout-rows 128 \
        --shard $SHARD/8 --out runs/pool-$SHARD.jsonl
done
cat runs/pool-[1-8].jsonl > runs/pool.jsonl
cp runs/pool-1.jsonl.settings.json runs/pool.jsonl.settings.json
FLAGS="--learner Qwen/Qwen3-8B-Base --explorer runs/pool.jsonl --data data/dapo-math-17k.jsonl --steps 16
 --mix-steps 8 --prompts-per-step 1024 --group-size 16 --minibatches 32 --max-new-tokens 4096 --lr 1e-5
 --lora-rank 64 --loss dapo --clip-low 0.2 --clip-high 0.2 --kl-coef 0.001 --temperature 1 --dtype bfloat16
 --checkpoint-layers --micro-batch-tokens 8192 --rollout-rows 64 --compile --save-every 1"
python -m recipes.plan --prompt-tokens 300 $FLAGS
python train.py $FLAGS --out runs/paper
python eval.py --model runs/paper/learner Qwen/Qwen3-8B-Base Qwen/Qwen3-1.7B-Base --data data/aime24.jsonl \
    data/aime25.jsonl data/commonsenseqa.jsonl --mode nothink --n 16 --max-new-tokens 4096 --dtype bfloat16 \
    --rollout-rows 64 --out runs/paper-eval
