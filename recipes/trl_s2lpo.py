"""S2L-PO on TRL's GRPOTrainer: past one GPU, with accelerate, FSDP2, DeepSpeed, vLLM and W&B.

    pip install trl==1.16.0        run with it: 1 and 2 CPU processes, FSDP2. Not run: GPUs, vLLM, DeepSpeed
    python -m recipes.trl_s2lpo --learner LEARNER --explorer EXPLORER --data train.jsonl --out runs/trl
    accelerate launch --config_file recipes/fsdp2.yaml -m recipes.trl_s2lpo ...      on 8 GPUs

`S2LPOTrainer` is Algorithm 1: it writes each group in two parts. Rewards, advantages and update are TRL's.
Schedule, reward and the explorer's sampler are train.py's. Flags: train.py's names, or any of GRPOConfig but
those that follow from train.py's. A run keeps its settings in --out, where --resume finds them.

The hook is a private method, whose arguments have changed before; so have those of the public, "experimental"
`rollout_func`, which would have to call it too. Tokenising, vLLM, evaluation, sharded weights stay TRL's.

What differs from train.py, beside DEFAULTS:
    advantages    over std + 1e-4, not 1e-6: at most 4e-4 less, if G = 16. dr_grpo: add --scale_rewards none
    mini-batches  are cut between a process's rows, not between groups; `dapo` divides by their mean tokens
    explorer      a copy in each process
    data          in another order; problems that do not fill a last step are left out, as are those of which
                  a pool has fewer than --group-size rollouts
"""
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch

from anneal import explorer_share, split_group
from plumbing.checkpoint import load
from plumbing.files import write_whole
from plumbing.pool import Pool
from plumbing.problems import load_problems
from plumbing.terminal import fail, one_line
from plumbing.text import stop_texts, turn_ends
from reward import Problem, score
from sample import sample

refuse = partial(fail, "trl_s2lpo.py", 2)
try:
    from datasets import Dataset
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoTokenizer, HfArgumentParser
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    refuse(f"{error}: pip install trl==1.16.0")

NAMES = {"--group-size": "--num_generations", "--max-new-tokens": "--max_completion_length",  # TRL's names
         "--lr": "--learning_rate", "--loss": "--loss_type", "--kl-coef": "--beta", "--out": "--output_dir",
         "--clip-low": "--epsilon", "--clip-high": "--epsilon_high"}
FLAGS = {"--learner": "", "--explorer": "", "--data": "", "--eval-data": "", "--steps": 40, "--mix-steps": 0,
         "--prompts-per-step": 16, "--minibatches": 2, "--rollout-rows": 1024, "--explorer-temperature": 1.0,
         "--explorer-top-p": 1.0, "--eval-every": 5, "--save-every": 20}  # train.py's
FREE = ("resume", "output_dir", "steps", "rollout_rows", "per_device_", "save_", "eval_", "log", "report_to",
        "run_name", "disable_tqdm", "dataloader_", "ddp_", "gradient_checkpointing", "torch_compile",
        "vllm_gpu_", "vllm_server_")  # a resumed run may change what begins so
DEFAULTS = {                          # TRL's:
    "loss_type": "grpo",              # dapo
    "use_bias_correction_kl": False,  # True, which is not the paper's k3
    "lr_scheduler_type": "constant",  # linear, down to 0
    "num_generations": 16, "num_generations_eval": 1,  # 8, and as many in evaluations
    "bf16": torch.cuda.is_available(), "use_cpu": not torch.accelerator.is_available()}  # True, False


class S2LPOTrainer(GRPOTrainer):
    """Algorithm 1. explore(prompts, n, generator) writes the explorer's rollouts; without it, plain GRPO."""
    explore, mix_steps, n_explorer, until = None, 1, 0, None

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **more):
        """(responses, log-probs or None) to prompt_ids, P prompts G times each. A process holds whole groups,
        so that all split alike: under FSDP or ZeRO-3 one that skips `write` alone hangs the others."""
        generate = super()._generate_single_turn

        def write(rows, n):
            rows, logps = generate(rows, images, multimodal_fields, n, **more)
            ends = [self.until(row) if self.until else None for row in rows]    # where it says a --stop text
            return [row[:end] for row, end in zip(rows, ends)], logps and [
                row[:end] for row, end in zip(logps, ends)]
        G, prompts, P = num_generations, prompt_ids[::num_generations], len(prompt_ids) // num_generations

        # 1. Who writes how much of each group. An evaluation is of the learner alone
        batches = self.args.steps_per_generation * self.num_iterations          # until TRL samples again
        step = self.state.global_step * self.args.gradient_accumulation_steps // batches + 1    # i = 1..T
        share = explorer_share(step, self.mix_steps) if self.explore and self.model.training else 0.0
        n_explorer, n_learner = split_group(share, G)                           # alpha_i -> G_w, G_s
        self.n_explorer = n_explorer
        if not n_explorer:
            return write(prompt_ids, G)

        # 2. Rollouts: one group a prompt
        r = self.explore(prompts, n_explorer, torch.default_generator)          # sample(pi_omega, G_w)
        explored = [ids[:n].tolist() for ids, n in zip(r.ids.flatten(0, 1), r.lengths.flatten())]
        own, logps = [], []
        if n_learner:                                                           # sample(pi_theta, G_s)
            own, logps = write([prompt for prompt in prompts for _ in range(n_learner)], n_learner)
        theirs, ours = torch.arange(P * G).split([P * n_explorer, P * n_learner])
        order = torch.cat([theirs.view(P, n_explorer), ours.view(P, n_learner)], 1)  # [P, G]
        together = lambda first, second: [(first + second)[row] for row in order.flatten()]

        # pi_old is the learner for all, as in the paper. With vLLM, TRL weighs tokens by learner / sampler:
        # the explorer's log-probs would weigh its rollouts towards 0, None weighs them by 1.
        logps = together([[None] * len(ids) for ids in explored], logps) if self.use_vllm else None
        return together(explored, own), logps                                   # O


def open_trainer(args, config):
    """The trainer that the flags ask for."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.learner)
        context = AutoConfig.from_pretrained(args.learner).get_text_config().max_position_embeddings
    except Exception as error:  # a broken file makes transformers raise whatever it likes
        raise ValueError(f"model {args.learner} cannot be loaded: {error}") from error
    context = min(context, config.vllm_max_model_length or context)
    ends, pool = {*turn_ends(tokenizer), tokenizer.eos_token_id} - {None}, None
    if args.explorer.endswith(".jsonl"):
        pool = Pool(args.explorer, len(tokenizer), ends)
        ends = {*pool.stops}
    elif args.explorer != "none":
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        explorer, theirs, stops = load(args.explorer, config.device, dtype)
        context, ends = min(context, explorer.config.max_position_embeddings), ends | {*stops}
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise ValueError("learner and explorer differ in tokens")

    options = {"add_generation_prompt": True, "return_dict": False} | (config.chat_template_kwargs or {})

    def row(problem, pool):  # as plumbing/text.py puts a prompt, in tokens as TRL makes them; None: unusable
        chat, prompt = problem.in_words and tokenizer.chat_template, problem.prompt
        prompt = [{"role": "user", "content": prompt.rstrip("\n")}] if chat else prompt
        ids = tokenizer.apply_chat_template(prompt, **options) if chat else tokenizer(prompt).input_ids
        enough = pool is None or pool.count(ids) >= config.num_generations
        if enough and len(ids) + config.max_completion_length <= context:
            return vars(problem) | {"prompt": prompt, "extra": json.dumps(problem.extra)}  # of one type

    def rows(path, least, pool=None):
        every = load_problems(path)
        fit = [fit for problem in every if (fit := row(problem, pool))]  # another would end the run later
        if len(fit) < len(every):
            few = f", or {pool.path} has fewer than {config.num_generations} rollouts of them" if pool else ""
            print(f"{path}: {len(every) - len(fit):,} of {len(every):,} problems left out: too long for a "
                  f"context of {context} tokens with --max-new-tokens {config.max_completion_length}{few}")
        if len(fit) < least:
            raise ValueError(f"{path}: {len(fit)} problems are left, but a step needs {least}")
        return Dataset.from_list(fit)

    def reward(completion_ids, question, answer, task, extra, exact, log_metric, **rest):
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        problems = map(Problem, question, answer, task, map(json.loads, extra), exact)
        rewards = [score(problem, text).reward for problem, text in zip(problems, texts)]
        G, n_explorer = trainer.num_generations, trainer.n_explorer
        log_metric("explorer_share", n_explorer / G)
        for who, places in (("explorer", range(n_explorer)), ("learner", range(n_explorer, G))):
            if part := [r for i, r in enumerate(rewards) if i % G in places]:
                log_metric(f"reward_{who}", sum(part) / len(part))
        return rewards

    problems = rows(args.data, args.prompts_per_step, pool)
    held_out = args.eval_data and rows(args.eval_data, 1)
    trainer = S2LPOTrainer(args.learner, reward, config, problems, held_out or None, tokenizer)
    trainer.mix_steps, trainer.until = args.mix_steps, stop_texts(args.stop, tokenizer)
    ends |= {*trainer.eos_token_ids}
    if config.use_vllm and ends != {*trainer.eos_token_ids}:
        raise ValueError(f"vLLM stops at {trainer.eos_token_ids}, and it should at {sorted(ends)}: put these "
                         "into the learner's generation_config.json")
    trainer.eos_token_ids = sorted(ends)
    if not config.use_vllm:
        trainer.generation_config.eos_token_id = sorted(ends)
    limits = dict(max_new_tokens=config.max_completion_length, until=trainer.until)
    if pool:
        pool.stops, trainer.explore = ends, partial(pool.draw, **limits)
    elif args.explorer != "none":
        trainer.explore = partial(sample, explorer.requires_grad_(False), rows=args.rollout_rows, **limits,
                                  stops=tuple(sorted(ends)), temperature=args.explorer_temperature,
                                  top_p=args.explorer_top_p)

    trainer.accelerator.wait_for_everyone()  # until each process has looked whether there is a run
    if config.should_save:
        kept = {name: value for name, value in vars(args).items() if not name.endswith("_token")}
        kept = json.dumps(kept, indent=2).encode()
        write_whole(Path(config.output_dir, "settings.json"), lambda file: file.write(kept))
    return trainer


def parse_flags(argv):
    """(our flags, GRPOConfig). A resumed run has the settings that lie beside its checkpoints. Only those in
    FREE may change."""
    parser = HfArgumentParser(GRPOConfig, allow_abbrev=False, usage="%(prog)s [flags], which --help explains")
    parser.error = refuse
    add = parser.add_argument_group("S2L-PO, as in train.py").add_argument
    for name, default in FLAGS.items():
        add(name, type=type(default), default=default)
    add("--stop", nargs="+", default=[])
    add("--resume", action="store_true")
    parser.set_defaults(**DEFAULTS)
    parse = lambda: parser.parse_args([NAMES.get(word, word) for word in argv])
    args, checkpoint = parse(), None
    settings = Path(args.output_dir or refuse("--out is missing"), "settings.json")
    if (there := settings.exists()) != args.resume:
        what = "a run: --resume continues it" if there else "no run to resume"
        refuse(f"{args.output_dir} holds {what}")
    if there:
        parser.set_defaults(**(before := json.loads(settings.read_text())))
        args = parse()
        if changed := [f"{name} {before[name]} -> {value}" for name, value in vars(args).items()
                       if not name.startswith(FREE) and before.get(name, value) != value]:
            refuse(f"{args.output_dir} began with other settings: {', '.join(changed)}")
        whole = settings.parent.glob("checkpoint-*/trainer_state.json")  # TRL writes it last
        newest = max(whole, key=lambda path: json.loads(path.read_text())["global_step"], default=None)
        checkpoint = newest and str(newest.parent)

    args.mix_steps = args.mix_steps or max(1, args.steps // 2)
    for name in (*FLAGS, "--num_generations", "--num_iterations", "--temperature",
                 "--per_device_train_batch_size"):
        value = getattr(args, name[2:].replace("-", "_"))
        most = 1 if name == "--explorer-top-p" else sys.maxsize
        if name != "--eval-data" and not (value if isinstance(value, str) else 0 < value <= most):
            refuse(f"{name} {value}: missing, or out of range")
    typed = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    for flag, theirs in counts(args, checkpoint).items():
        for name in typed & theirs.keys():
            refuse(f"--{name} follows from {flag}")
        vars(args).update(theirs)
    return args, parser.parse_dict(vars(args), allow_extra_keys=True)[0]


def counts(args, checkpoint):
    """What TRL is told, by the flag that it follows from. TRL's steps are optimiser updates, of which
    `updates` make one of ours."""
    P, M, processes = args.prompts_per_step, args.minibatches, int(os.environ.get("WORLD_SIZE", 1))
    rows, size = P * args.num_generations // processes, args.per_device_train_batch_size  # of a process
    if P % processes or rows % (M * size):
        refuse(f"{P} prompts do not go into {processes} processes, or {rows} rows into {M} x {size}")
    updates = M * args.num_iterations
    return {"--steps": {"max_steps": args.steps * updates, "num_train_epochs": 1},
            "--prompts-per-step": {"steps_per_generation": rows // size, "generation_batch_size": None},
            "--minibatches": {"gradient_accumulation_steps": rows // (M * size), "logging_steps": updates},
            "--save-every": {"save_strategy": "steps", "save_steps": args.save_every * updates},
            "--eval-every": {"eval_strategy": "steps" if args.eval_data else "no",
                             "eval_steps": min(args.eval_every, args.steps) * updates},  # once at least
            "--resume": {"resume_from_checkpoint": checkpoint}}


def main():
    users = ValueError, OSError, ImportError, RuntimeError, SafetensorError  # as TRL and its libraries raise
    with one_line("trl_s2lpo.py", users):
        args, config = parse_flags(sys.argv[1:])
        trainer = open_trainer(args, config)
    memory = "lower --rollout-rows (the explorer's sampling) or --per_device_train_batch_size (all else)"
    with one_line("trl_s2lpo.py", OSError, memory):
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        trainer.save_model()


if __name__ == "__main__":
    main()
