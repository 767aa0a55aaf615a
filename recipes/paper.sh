#!/bin/sh
# The paper's run, as far as ../README.md (What differs) goes: Qwen3-1.7B-Base explores for Qwen3-8B-Base, DAPO-Math-17k in 16
# steps of 1,024 prompts, G = 16, T_mix = 8, responses up to 4,096 tokens, then AIME and CommonsenseQA. The explorer's rollouts are
# sampled ahead, by as many machines as there are shards. --mix separate in place of joint is the authors' launch script.
# Memory (estimated, recipes/plan.py): 144 GiB in the update, 128 GiB of it without the KL's reference: one 141 GB card holds it at
# --kl-coef 0 only. Time (estimated, 40% of an H200's peak and 35 ms a decoding step): 10 days on one card. Not measured.
set -e
for SHARD in 1 2 3 4 5 6 7 8; do  # each on a machine of its own, if there are
    python sample.py --model Qwen/Qwen3-1.7B-Base --data dapo-math-17k --n 16 --temperature 0.7 --top-p 0.95 \
        --max-new-tokens 4096 --dtype bfloat16 --rollout-rows 128 --shard $SHARD/8 --out runs/pool-$SHARD.jsonl
done
python train.py --learner Qwen/Qwen3-8B-Base --explorer-pool runs/pool-?.jsonl --data dapo-math-17k \
    --steps 16 --mix-steps 8 --prompts-per-step 1024 --group-size 16 --minibatches 32 --max-new-tokens 4096 --lr 1e-6 \
    --clip-low 0.2 --clip-high 0.2 --kl-coef 0.001 --kl-estimator k3 --temperature 1 --dtype bfloat16 \
    --optimizer-dtype bfloat16 --checkpoint-layers --micro-batch-tokens 8192 --rollout-rows 64 --compile on --save-every 1 \
    --out runs/paper
python eval.py --model runs/paper/learner Qwen/Qwen3-8B-Base Qwen/Qwen3-1.7B-Base --data aime24 aime25 commonsenseqa \
    --mode nothink --n 16 --max-new-tokens 4096 --dtype bfloat16 --rollout-rows 64 --out runs/paper-eval
