"""S2L-PO on TRL's GRPOTrainer: past one GPU, with accelerate, FSDP2, DeepSpeed, vLLM and W&B.

    pip install trl==1.16.0        run with it: 1 and 2 CPU processes, FSDP2. Not run: GPUs, vLLM, DeepSpeed
    python recipes/trl_s2lpo.py --learner LEARNER --explorer EXPLORER --data train.jsonl --out runs/trl
    accelerate launch --config_file recipes/fsdp2.yaml recipes/trl_s2lpo.py ...      on 8 GPUs

`S2LPOTrainer` is Algorithm 1: it writes each group in two parts. Rewards, advantages and update are TRL's.
Schedule, reward and the explorer's sampler are train.py's. Flags: train.py's names, or any of GRPOConfig.

The hook is a private method, whose arguments have changed before; so have those of the public, "experimental"
`rollout_func`, which would have to call it too. Tokenising, vLLM, evaluation, sharded weights stay TRL's.

What differs from train.py, beside DEFAULTS:
    advantages    over std + 1e-4, not 1e-6: at most 4e-4 less, if G = 16. dr_grpo: add --scale_rewards none
    mini-batches  are cut between a process's rows, not between groups; `dapo` divides by their mean tokens
    data          in another order; problems that do not fill a last step are left out
    explorer      a model, not a pool, with the learner's stop tokens; a copy in each process
"""
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch

try:
    from datasets import Dataset
    from transformers import AutoTokenizer, HfArgumentParser
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    sys.exit(f"trl_s2lpo.py: error: {error}: pip install trl==1.16.0")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from anneal import explorer_share, split_group
from model import load
from reward import Problem, load_problems, score
from sample import sample

NAMES = {"--group-size": "--num_generations", "--max-new-tokens": "--max_completion_length",  # TRL's names
         "--lr": "--learning_rate", "--loss": "--loss_type", "--kl-coef": "--beta", "--out": "--output_dir",
         "--clip-low": "--epsilon", "--clip-high": "--epsilon_high"}
DEFAULTS = {                          # TRL's:
    "loss_type": "grpo",              # dapo
    "use_bias_correction_kl": False,  # True, which is not the paper's k3
    "lr_scheduler_type": "constant",  # linear, down to 0
    "num_generations": 16, "num_generations_eval": 1,  # 8, and as many in evaluations
    "bf16": torch.cuda.is_available(), "use_cpu": not torch.accelerator.is_available()}  # True, False


class S2LPOTrainer(GRPOTrainer):
    """Algorithm 1. explore(prompts, n, generator) writes the explorer's rollouts; without it, plain GRPO."""
    explore, mix_steps, minibatches, n_explorer = None, 1, 1, 0

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **more):
        """(responses, log-probs or None) to prompt_ids, P prompts G times each. A process holds whole groups,
        so that all split alike: under FSDP or ZeRO-3 one that skips `write` alone hangs the others."""
        generate = super()._generate_single_turn
        write = lambda rows, n: generate(rows, images, multimodal_fields, n, **more)
        G, prompts, P = num_generations, prompt_ids[::num_generations], len(prompt_ids) // num_generations

        # 1. Who writes how much of each group. An evaluation is of the learner alone
        step = self.state.global_step // self.minibatches + 1                       # i = 1..T
        share = explorer_share(step, self.mix_steps) if self.explore and self.model.training else 0.0
        self.n_explorer, n_learner = split_group(share, G)                          # alpha_i -> G_w, G_s
        if not self.n_explorer:
            return write(prompt_ids, G)

        # 2. Rollouts: one group a prompt
        rollouts = self.explore(prompts, self.n_explorer, torch.default_generator)  # sample(pi_omega, G_w)
        lengths = rollouts.lengths.flatten().tolist()
        explored = [ids[:n] for ids, n in zip(rollouts.ids.flatten(0, 1).tolist(), lengths)]
        own, logps = [], []
        if n_learner:                                                               # sample(pi_theta, G_s)
            own, logps = write([prompt for prompt in prompts for _ in range(n_learner)], n_learner)

        # pi_old is the learner for all, as in the paper. With vLLM, TRL weighs tokens by learner / sampler:
        # the explorer's log-probs would weigh its rollouts towards 0, None weighs them by 1.
        logps = join([[None] * n for n in lengths], logps, P) if self.use_vllm else None
        return join(explored, own, P), logps                                        # O


def join(first, second, groups):
    """One list of both, group by group: a group's rows of the first, then its rows of the second."""
    part = lambda rows, g: rows[len(rows) // groups * g:len(rows) // groups * (g + 1)]
    return [row for g in range(groups) for row in part(first, g) + part(second, g)]


def open_trainer(args, config):
    """The trainer that the flags ask for."""
    tokenizer = AutoTokenizer.from_pretrained(args.learner)

    def rows(path):  # as sample.py's `encode` puts a prompt
        chat = lambda p: p.in_words and tokenizer.chat_template
        put = lambda p: [{"role": "user", "content": p.prompt.rstrip("\n")}] if chat(p) else p.prompt
        row = lambda p: vars(p) | {"prompt": put(p), "extra": json.dumps(p.extra)}  # a column has one type
        return Dataset.from_list([row(p) for p in load_problems(path)])

    def reward(completion_ids, question, answer, task, extra, log_metric, **rest):
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        problems = map(Problem, question, answer, task, map(json.loads, extra))
        rewards = [score(problem, text).reward for problem, text in zip(problems, texts)]
        G, n_explorer = trainer.num_generations, trainer.n_explorer
        log_metric("explorer_share", n_explorer / G)
        for who, places in (("explorer", range(n_explorer)), ("learner", range(n_explorer, G))):
            if part := [r for i, r in enumerate(rewards) if i % G in places]:
                log_metric(f"reward_{who}", sum(part) / len(part))
        return rewards

    held_out = rows(args.eval_data) if args.eval_data else None
    trainer = S2LPOTrainer(args.learner, reward, config, rows(args.data), held_out, tokenizer)
    trainer.mix_steps, trainer.minibatches = args.mix_steps, args.minibatches
    if args.explorer != "none":
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        explorer, theirs = load(args.explorer, config.device, dtype)
        if theirs.get_vocab() != tokenizer.get_vocab() or {*explorer.stop_ids} != {*trainer.eos_token_ids}:
            sys.exit("trl_s2lpo.py: error: learner and explorer differ in tokens, or in stop tokens")
        trainer.explore = partial(sample, explorer.requires_grad_(False), rows=args.rollout_rows,
                                  max_new_tokens=config.max_completion_length, top_p=args.explorer_top_p,
                                  temperature=args.explorer_temperature)
    return trainer


def parse_flags(argv):
    """(our flags, GRPOConfig). A step is --minibatches of TRL's steps, which are optimiser updates."""
    parser = HfArgumentParser(GRPOConfig, allow_abbrev=False, usage="%(prog)s [flags], which --help explains")
    add = parser.add_argument_group("S2L-PO, as in train.py").add_argument
    for name, default in {"--learner": None, "--explorer": None, "--data": None, "--eval-data": "",
                          "--steps": 40, "--mix-steps": 0, "--prompts-per-step": 16, "--minibatches": 2,
                          "--rollout-rows": 1024, "--explorer-temperature": 1.0, "--explorer-top-p": 1.0,
                          "--save-every": 20}.items():
        add(name, type=str if default is None else type(default), default=default, required=default is None)
    add("--resume", action="store_true")
    parser.set_defaults(**DEFAULTS)
    args = parser.parse_args([NAMES.get(word, word) for word in argv])
    args.mix_steps = args.mix_steps or max(1, args.steps // 2)
    P, M, processes = args.prompts_per_step, args.minibatches, int(os.environ.get("WORLD_SIZE", 1))
    rows, size = P * args.num_generations // processes, args.per_device_train_batch_size  # of a process
    if P % processes or rows % (M * size):
        parser.error(f"{P} prompts do not go into {processes} processes, or {rows} rows into {M} x {size}")
    return args, parser.parse_dict(vars(args) | {
        "max_steps": args.steps * M, "logging_steps": M, "save_steps": args.save_every * M,
        "gradient_accumulation_steps": rows // (M * size), "steps_per_generation": rows // size}, True)[0]


def main():
    args, config = parse_flags(sys.argv[1:])
    trainer = open_trainer(args, config)
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model()


if __name__ == "__main__":
    main()
