"""A whole GRPO step against TRL's GRPOTrainer: 8 prompts x 8 rollouts x 64 tokens, one update, the same tiny
model.

    pip install trl
    python bench/step.py

Seconds: both in this process, step about step. Memory: peak resident set of a process of its own for each.
"""
import random
import statistics
import subprocess
import sys
import tempfile
import time

from common import DEVICE, TINY, Transformer, config_of, machine, pair, report, target

import torch

from grpo import Objective, group_advantages, update
from plumbing.optimizer import Optimizer
from sample import sample

PROMPTS, GROUP, TOKENS, STEPS = 8, 8, 64, 8
WORDS = [f"w{i}" for i in range(TINY["vocab_size"])]


def reward(texts):
    return [float(len(text) % 7) for text in texts]  # anything that differs within a group


def prompt():
    return [random.randrange(1, len(WORDS)) for _ in range(TOKENS)]


class Ours:
    def __init__(self, model):
        self.model, self.optimizer = model, Optimizer(model, lr=1e-5)
        self.objective = Objective(micro_batch_tokens=16_384)

    def step(self):
        prompts = [prompt() for _ in range(PROMPTS)]
        generator = torch.Generator().manual_seed(random.randrange(2 ** 31))
        rollouts = sample(self.model, prompts, GROUP, generator, TOKENS, stops=())
        texts = [[" ".join(WORDS[i] for i in ids) for ids in group] for group in rollouts.ids.tolist()]
        rewards = [reward(group) for group in texts]
        advantages = group_advantages(torch.tensor(rewards, device=rollouts.ids.device))
        update(self.model, None, self.optimizer, prompts, rollouts, advantages, self.objective, generator)


def trl_trainer(model, out, steps, callbacks=()):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=WORDS[0], pad_token=WORDS[0])
    config = GRPOConfig(
        output_dir=out, per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
        max_completion_length=TOKENS, generation_kwargs={"min_new_tokens": TOKENS}, max_steps=steps,
        learning_rate=1e-5, beta=0.0, temperature=1.0, gradient_checkpointing=False, bf16=False,
        use_cpu=DEVICE == "cpu", report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True)
    texts = [" ".join(WORDS[i] for i in prompt()) for _ in range(PROMPTS * steps)]
    return GRPOTrainer(model, reward_funcs=lambda completions, **_: reward(completions), args=config,
                       train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
                       processing_class=tokenizer, callbacks=list(callbacks))


def interleaved_seconds(out):
    """{side: median seconds of a step}, without the first two steps."""
    from transformers import TrainerCallback
    model, twin = pair(TINY)
    ours, seconds = Ours(model), {"ours": [], "TRL": []}

    class Clock(TrainerCallback):  # TRL's rollouts are made between these two
        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            middle = time.perf_counter()
            ours.step()
            seconds["TRL"].append(middle - self.started)
            seconds["ours"].append(time.perf_counter() - middle)

    trl_trainer(twin, out, STEPS, [Clock()]).train()
    return {side: statistics.median(times[2:]) for side, times in seconds.items()}


def memory(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))


def alone(side, out):
    """Takes three steps on one side only. Prints this process's memory after imports and at its peak, in
    bytes."""
    if side == "ours":
        from transformers import AutoTokenizer  # noqa: F401  train.py needs it, so it counts
    else:
        from trl import GRPOTrainer  # noqa: F401
    imports = memory("VmRSS")
    if side == "ours":
        ours = Ours(Transformer(config_of(TINY)))
        for _ in range(3):
            ours.step()
    else:
        trl_trainer(pair(TINY)[1], out, 3).train()
    print(imports, memory("VmHWM"))


if __name__ == "__main__":
    try:
        import trl
    except ImportError:
        sys.exit("bench/step.py compares with TRL: pip install trl")
    with tempfile.TemporaryDirectory() as out:
        if sys.argv[1:]:
            alone(sys.argv[1], out)
            sys.exit()
        seconds = interleaved_seconds(out)
        alone_in = {side: [int(x) for x in subprocess.run(
            [sys.executable, __file__, side], capture_output=True, text=True, check=True).stdout.split()[-2:]]
            for side in seconds}
    print(f"{machine()}, trl {trl.__version__}\n\n{PROMPTS} prompts x {GROUP} rollouts x {TOKENS} tokens")
    for side in seconds:
        imports, peak = alone_in[side]
        print(f"  {side:6}{seconds[side]:8.3f} s a step {peak / 1e6:10,.0f} MB, of which imports "
              f"{imports / 1e6:,.0f}")
    target("step_faster_than_trl", seconds["TRL"] / seconds["ours"], 2.2, at_least=True)
    target("step_memory_of_trl", alone_in["ours"][1] / alone_in["TRL"][1], 0.7)
    beyond = [peak - imports for imports, peak in (alone_in["ours"], alone_in["TRL"])]
    print(f"peak less imports, of TRL's: {beyond[0] / beyond[1]:.2f}")
    report()
