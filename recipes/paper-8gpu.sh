#!/bin/sh
# The paper's run with all weights trained, on one machine of 8 cards of 80 GB: Qwen3-1.7B-Base explores for
# Qwen3-8B-Base on DAPO-Math-17k, 16 steps of 1,024 prompts, G = 16, T_mix = 8, responses up to 4,096 tokens.
# NOT RUN: nobody here has 8 cards. The authors' script leaves verl's defaults, set here too: every token
# weighs the same (dapo), dual clip at 3 (--delta), weight decay 0.01. vLLM brings a torch of its own: install
# 'trl[vllm]==1.16.0' in an environment apart.
# Not the paper's: the explorer samples in the run, one copy a card, and not ahead.
# Memory a card, in GiB (estimated): recipes/plan.py's figures with --explorer Qwen/Qwen3-1.7B-Base --dtype
# bfloat16 --checkpoint-layers --rollout-rows 64 --micro-batch-tokens 17600 (4 rows); sharded ones over 8:
#     always    weights 30.5 + reference 30.5 (float32 in TRL) + AdamW's moments 61.0, over 8:  15.3
#               the explorer, in bfloat16, whole:                                                3.2
#     explorer  its keys and values 30.1, logits 0.6:                                all in all   49
#     learner   vLLM's --vllm_gpu_memory_utilization 0.5, of 74.5:                   all in all   56
#     update    gradients 30.5, over 8; 2.7 gathered (embedding, head, a layer); kept
#               activations 5.3, log-prob kernel 5.9; vLLM asleep:                   all in all   36
# TRL's kernels differ from those that plan.py knows, and NCCL's buffers come on top.
set -e
mkdir -p data runs
for NAME in dapo-math-17k aime24 aime25 commonsenseqa; do
    test -e data/$NAME.jsonl || python -m recipes.data $NAME --out data/$NAME.jsonl
done
accelerate launch --config_file recipes/fsdp2.yaml -m recipes.trl_s2lpo --out runs/paper-8gpu \
    --learner Qwen/Qwen3-8B-Base --explorer Qwen/Qwen3-1.7B-Base --data data/dapo-math-17k.jsonl \
    --steps 16 --mix-steps 8 --prompts-per-step 1024 --group-size 16 --minibatches 32 --max-new-tokens 4096 \
    --explorer-temperature 0.7 --explorer-top-p 0.95 --rollout-rows 64 --save-every 1 --save_total_limit 2 \
    --lr 1e-6 --weight_decay 0.01 --loss dapo --delta 3 --kl-coef 0.001 --per_device_train_batch_size 4 \
    --use_vllm True --vllm_mode colocate --vllm_enable_sleep_mode True --vllm_gpu_memory_utilization 0.5 \
    --vllm_max_model_length 5120 --vllm_importance_sampling_correction False --ddp_timeout 7200 "$@"
python eval.py --model runs/paper-8gpu Qwen/Qwen3-8B-Base Qwen/Qwen3-1.7B-Base --data data/aime24.jsonl \
    data/aime25.jsonl data/commonsenseqa.jsonl --mode nothink --n 16 --max-new-tokens 4096 --dtype bfloat16 \
    --rollout-rows 64 --out runs/paper-8gpu-eval
