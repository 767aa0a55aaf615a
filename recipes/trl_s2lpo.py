"""S2L-PO on TRL's GRPOTrainer: past one GPU, with accelerate, FSDP2, DeepSpeed, vLLM and W&B.

    pip install trl==1.16.0        run with it: 1 and 2 CPU processes, FSDP2. Not run: GPUs, vLLM, DeepSpeed
    python recipes/trl_s2lpo.py --learner LEARNER --explorer EXPLORER --data train.jsonl --out runs/trl
    accelerate launch --config_file recipes/fsdp2.yaml recipes/trl_s2lpo.py ...      on 8 GPUs

`S2LPOTrainer` is Algorithm 1: it writes each group in two parts. Rewards, advantages and update are TRL's.
Schedule, reward and the explorer's sampler are train.py's. Flags: train.py's names, or any of GRPOConfig but
those that follow from train.py's. A run keeps its settings in --out, where --resume finds them.

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


def fail(error):  # as train.py does
    print(f"trl_s2lpo.py: error: {' '.join(str(error).split()):.300}", file=sys.stderr)
    sys.exit(2)


try:
    from datasets import Dataset
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoTokenizer, HfArgumentParser
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    fail(f"{error}: pip install trl==1.16.0")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from anneal import explorer_share, split_group
from plumbing.checkpoint import load
from plumbing.problems import load_problems
from reward import Problem, score
from sample import sample

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
    explore, mix_steps, n_explorer = None, 1, 0

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **more):
        """(responses, log-probs or None) to prompt_ids, P prompts G times each. A process holds whole groups,
        so that all split alike: under FSDP or ZeRO-3 one that skips `write` alone hangs the others."""
        generate = super()._generate_single_turn
        write = lambda rows, n: generate(rows, images, multimodal_fields, n, **more)
        G, prompts, P = num_generations, prompt_ids[::num_generations], len(prompt_ids) // num_generations

        # 1. Who writes how much of each group. An evaluation is of the learner alone
        batches = self.args.steps_per_generation * self.num_iterations              # until TRL samples again
        step = self.state.global_step * self.args.gradient_accumulation_steps // batches + 1        # i = 1..T
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
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.learner)
        context = AutoConfig.from_pretrained(args.learner).get_text_config().max_position_embeddings
    except Exception as error:  # a broken file makes transformers raise whatever it likes
        raise ValueError(f"model {args.learner} cannot be loaded: {error}") from error
    context = min(context, config.vllm_max_model_length or context)
    if args.explorer != "none":
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        explorer, theirs, stops = load(args.explorer, config.device, dtype)
        context = min(context, explorer.config.max_position_embeddings)

    def fits(prompt):  # in tokens as TRL makes them
        options = {"add_generation_prompt": True, "return_dict": False} | (config.chat_template_kwargs or {})
        ids = (tokenizer(prompt).input_ids if isinstance(prompt, str)
               else tokenizer.apply_chat_template(prompt, **options))
        return len(ids) + config.max_completion_length <= context

    def rows(path, least):  # as sample.py's `encode` puts a prompt
        chat = lambda p: p.in_words and tokenizer.chat_template
        put = lambda p: [{"role": "user", "content": p.prompt.rstrip("\n")}] if chat(p) else p.prompt
        row = lambda p: vars(p) | {"prompt": put(p), "extra": json.dumps(p.extra)}  # a column has one type
        every = [row(p) for p in load_problems(path)]
        short = [row for row in every if fits(row["prompt"])]  # a longer one would end the run in its step
        if len(short) < len(every):
            print(f"{path}: {len(every) - len(short):,} of {len(every):,} problems left out: too long for a "
                  f"context of {context} tokens with --max-new-tokens {config.max_completion_length}")
        if len(short) < least:
            raise ValueError(f"{path}: {len(short)} problems are left, but a step needs {least}")
        return Dataset.from_list(short)

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

    problems, held_out = rows(args.data, args.prompts_per_step), args.eval_data and rows(args.eval_data, 1)
    trainer = S2LPOTrainer(args.learner, reward, config, problems, held_out or None, tokenizer)
    trainer.mix_steps = args.mix_steps
    if args.explorer != "none":
        if theirs.get_vocab() != tokenizer.get_vocab() or {*stops} != {*trainer.eos_token_ids}:
            raise ValueError("learner and explorer differ in tokens, or in stop tokens")
        trainer.explore = partial(sample, explorer.requires_grad_(False), rows=args.rollout_rows,
                                  max_new_tokens=config.max_completion_length, stops=stops,
                                  temperature=args.explorer_temperature, top_p=args.explorer_top_p)

    trainer.accelerator.wait_for_everyone()  # until each process has looked whether there is a run
    if config.should_save:
        kept = {name: value for name, value in vars(args).items() if not name.endswith("_token")}
        beside = Path(config.output_dir, "settings.json.partial")
        beside.write_text(json.dumps(kept, indent=2))
        beside.replace(beside.with_suffix(""))
    return trainer


def parse_flags(argv):
    """(our flags, GRPOConfig). TRL's steps are optimiser updates, of which `updates` make one of ours.
    A resumed run has the settings that lie beside its checkpoints. Only those in FREE may change."""
    parser = HfArgumentParser(GRPOConfig, allow_abbrev=False, usage="%(prog)s [flags], which --help explains")
    parser.error = fail
    add = parser.add_argument_group("S2L-PO, as in train.py").add_argument
    for name, default in FLAGS.items():
        add(name, type=type(default), default=default)
    add("--resume", action="store_true")
    parser.set_defaults(**DEFAULTS)
    parse = lambda: parser.parse_args([NAMES.get(word, word) for word in argv])
    args, checkpoint = parse(), None
    out = Path(args.output_dir or fail("--out is missing"))
    if (there := (out / "settings.json").exists()) != args.resume:
        fail(f"{out} holds a run: --resume continues it" if there else f"--resume: {out} holds no run")
    if there:
        parser.set_defaults(**(before := json.loads((out / "settings.json").read_text())))
        args = parse()
        if changed := [f"{name} {before[name]} -> {value}" for name, value in vars(args).items()
                       if not name.startswith(FREE) and before.get(name, value) != value]:
            fail(f"{out} began with other settings: {', '.join(changed)}")
        whole = out.glob("checkpoint-*/trainer_state.json")  # TRL writes it last
        checkpoint = max(whole, key=lambda path: json.loads(path.read_text())["global_step"], default=None)

    args.mix_steps = args.mix_steps or max(1, args.steps // 2)
    for name in (*FLAGS, "--num_generations", "--num_iterations", "--temperature",
                 "--per_device_train_batch_size"):
        value = getattr(args, name[2:].replace("-", "_"))
        most = 1 if name == "--explorer-top-p" else sys.maxsize
        if name != "--eval-data" and not (value if isinstance(value, str) else 0 < value <= most):
            fail(f"{name} {value}: missing, or out of range")
    P, M, processes = args.prompts_per_step, args.minibatches, int(os.environ.get("WORLD_SIZE", 1))
    rows, size = P * args.num_generations // processes, args.per_device_train_batch_size  # of a process
    if P % processes or rows % (M * size):
        fail(f"{P} prompts do not go into {processes} processes, or {rows} rows into {M} x {size}")

    updates = M * args.num_iterations
    computed = {  # what TRL is told, by the flag that it follows from
        "--steps": {"max_steps": args.steps * updates, "num_train_epochs": 1},
        "--prompts-per-step": {"steps_per_generation": rows // size, "generation_batch_size": None},
        "--minibatches": {"gradient_accumulation_steps": rows // (M * size), "logging_steps": updates},
        "--save-every": {"save_strategy": "steps", "save_steps": args.save_every * updates},
        "--eval-every": {"eval_strategy": "steps" if args.eval_data else "no",
                         "eval_steps": min(args.eval_every, args.steps) * updates},  # once at least
        "--resume": {"resume_from_checkpoint": checkpoint and str(checkpoint.parent)}}
    typed = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    if clash := [(name, flag) for flag, theirs in computed.items() for name in typed & theirs.keys()]:
        fail("--{} follows from {}".format(*clash[0]))
    for theirs in computed.values():
        vars(args).update(theirs)
    return args, parser.parse_dict(vars(args), allow_extra_keys=True)[0]


def main():
    try:
        args, config = parse_flags(sys.argv[1:])
        trainer = open_trainer(args, config)
    except (ValueError, OSError, ImportError, RuntimeError, SafetensorError) as error:  # of TRL's, too
        fail(error)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
