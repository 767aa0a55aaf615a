"""KV-cached sampling: prompts in, rollouts out.

    python sample.py --model runs/family-habit/learner --prompt "Bfa483920=" --n 4

A group of G rollouts shares its prompt, so the prompt is prefilled once and its cache copied to the G rows. Rows that
drew a stop token leave the batch. Prompts of different lengths need no padding tricks: cache slot == position (model.py).
Each rollout carries the log-probability of its tokens under the distribution they were really drawn from: after
penalty, temperature, top-k and top-p.

Shapes: P prompts, G rollouts each, T response tokens, R rows still in the batch, V vocabulary.
"""
import argparse
import sys
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from model import KVCache, load

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass
class Rollouts:
    """G responses to each of P prompts. Responses are right-padded with 0; `lengths` says where each ends."""
    ids: torch.Tensor       # [P, G, T] sampled token ids, the stop token included
    lengths: torch.Tensor   # [P, G]    number of tokens, the stop token counted
    logps: torch.Tensor     # [P, G, T] log-prob of each token under its sampler's distribution; 0 where padded
    finished: torch.Tensor  # [P, G]    True: drew a stop token; False: cut at max_new_tokens
    from_explorer: torch.Tensor  # [P, G] True where the explorer wrote it

    @property
    def mask(self):
        """[P, G, T] True on the response's tokens: up to and including the first stop token, nothing after it."""
        return torch.arange(self.ids.shape[2], device=self.ids.device) < self.lengths[..., None]


def mix(first, second):
    """One group per prompt from both: [P, G1, ...] and [P, G2, ...] -> [P, G1+G2, ...]. Either may be None."""
    if first is None or second is None:
        return first or second
    T = max(first.ids.shape[2], second.ids.shape[2])
    widen = lambda x: F.pad(x, (0, T - x.shape[2])) if x.dim() == 3 else x
    both = lambda name: torch.cat([widen(getattr(first, name)), widen(getattr(second, name))], dim=1)
    return Rollouts(**{field.name: both(field.name) for field in fields(Rollouts)})


def draw(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """(token, its log-prob) per row, from logits [R, V] and one uniform number in [0, 1) per row.

    Inverse-CDF sampling: one number a row instead of V, and a row's draws do not depend on which rows are beside it.
    Temperature 0 takes the most likely token, whose log-prob under that one-point distribution is 0."""
    if temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits))
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]  # [R, 1]
        logits = logits.masked_fill(logits < kth, -torch.inf)  # [R, V]
    if top_p < 1:  # keep the smallest set of likeliest tokens whose mass reaches top_p
        p, order = logits.softmax(-1).sort(descending=True)  # [R, V] each
        outside = p.cumsum(-1) - p >= top_p  # [R, V] in order of likelihood
        logits = logits.masked_fill(torch.empty_like(outside).scatter_(1, order, outside), -torch.inf)
    logps = logits.log_softmax(-1)
    cdf = logps.exp().cumsum(-1)  # [R, V]
    total = cdf[:, -1:]  # [R, 1]
    target = uniform[:, None].clamp(max=1 - 2 ** -22) * total  # strictly below total, also after rounding
    token = torch.searchsorted(cdf, target, right=True)  # first id with cdf > target, so never one of probability 0
    return token.squeeze(1), logps.gather(1, token).squeeze(1)


@torch.no_grad()
def sample(model, prompts, n, generator, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, presence_penalty=0.0,
           rows=1024, from_explorer=False):
    """Rollouts of `n` responses to each prompt (a list of id lists), about `rows` rows at once (groups are not split).

    `generator` is a CPU torch.Generator: the same one gives the same uniform numbers on every device.
    ValueError for settings out of range, and if a prompt and max_new_tokens do not fit the model's context."""
    if n < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(f"cannot sample n={n}, max_new_tokens={max_new_tokens}, temperature={temperature}, top_k={top_k}, "
                         f"top_p={top_p}: n and max_new_tokens start at 1, the others at 0, top_p lies in (0, 1]")
    check_lengths(model, prompts, max_new_tokens)
    uniform = torch.rand(len(prompts), n, max_new_tokens, generator=generator)
    settings = (max_new_tokens, temperature, top_k, top_p, presence_penalty)
    at_once = max(1, rows // n)
    parts = [_sample_batch(model, prompts[i:i + at_once], uniform[i:i + at_once], *settings)
             for i in range(0, len(prompts), at_once)]
    ids, lengths, logps, finished = (torch.cat(part) for part in zip(*parts))
    return Rollouts(ids, lengths, logps, finished, torch.full_like(finished, from_explorer))


def _sample_batch(model, prompts, uniform, max_new_tokens, temperature, top_k, top_p, presence_penalty):
    device, (P, G, T) = model.norm.weight.device, uniform.shape
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = max(len(prompt) for prompt in prompts)
    padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    stops = torch.tensor(model.stop_ids, device=device, dtype=torch.long)

    cache = KVCache(model, P, longest)
    hidden = model(padded, cache)  # [P, longest, D]: each prompt is prefilled once ...
    cache.lengths = prompt_lengths
    group = torch.arange(P, device=device).repeat_interleave(G)  # [P*G]
    last = hidden[torch.arange(P, device=device), prompt_lengths - 1][group]  # [P*G, D]
    cache.select(group, slots=longest + T - 1)  # ... and copied to its G rows; the last token is never fed back

    ids = torch.zeros(P * G, T, dtype=torch.long, device=device)
    logps = torch.zeros(P * G, T, device=device)
    lengths = torch.zeros(P * G, dtype=torch.long, device=device)
    finished = torch.zeros(P * G, dtype=torch.bool, device=device)
    uniform = uniform.flatten(0, 1).to(device)  # [P*G, T]
    seen = torch.zeros(P * G, len(model.head), dtype=torch.bool, device=device) if presence_penalty else None
    active = torch.arange(P * G, device=device)  # which output row each batch row writes
    for t in range(T):
        logits = (last @ model.head.T).float()  # [R, D] @ [D, V] -> [R, V]
        if presence_penalty:
            logits -= presence_penalty * seen[active]
        token, logp = draw(logits, uniform[active, t], temperature, top_k, top_p)
        running = ~finished[active]
        ids[active, t], logps[active, t] = token * running, logp * running  # a finished row emits nothing
        lengths[active] += running
        finished[active] |= torch.isin(token, stops)
        if presence_penalty:
            seen[active, token] = True
        running = ~finished[active]
        alive = int(running.sum())
        if alive == 0 or t == T - 1:
            break
        if alive <= 0.75 * len(active):  # compacting copies the cache, so not at every finish
            keep = running.nonzero().squeeze(1)
            active, token = active[keep], token[keep]
            cache.select(keep, slots=longest + T - 1)
        last = model(token[:, None], cache)[:, 0]  # [R, 1, D] -> [R, D]
        cache.lengths += 1  # of finished rows too, until they leave: what they compute is thrown away
    return tuple(x.unflatten(0, (P, G)) for x in (ids, lengths, logps, finished))


def pick_device(name):
    """`auto` takes CUDA, then Apple's MPS, then the CPU. ValueError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return name


def check_lengths(model, prompts, max_new_tokens):
    """ValueError that names the first prompt which leaves no room for max_new_tokens in the model's context."""
    context = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i + 1} is empty")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(f"prompt {i + 1} has {len(prompt)} tokens; with {max_new_tokens} new tokens it does not fit "
                             f"the model's context of {context}: lower --max-new-tokens or drop the prompt")


def encode_prompt(problem, tokenizer):
    """Token ids of a problem's prompt. Synthetic tasks are their own prompt; a question in words gets the instruction
    and, where the tokeniser has one, its chat template (which already holds the BOS token: exactly one is wanted)."""
    if problem.task != "math":
        return tokenizer(problem.question).input_ids
    text = f"{problem.question}\n{INSTRUCTION}"
    if not tokenizer.chat_template:
        return tokenizer(text + "\n").input_ids
    text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def decode(rollouts, tokenizer):
    """[P][G] texts, special tokens left out."""
    return [[tokenizer.decode(ids[:length].tolist(), skip_special_tokens=True) for ids, length in zip(*group)]
            for group in zip(rollouts.ids, rollouts.lengths)]


def add_sampling_flags(add):
    """The flags that sample.py and eval.py share, through an argument parser's add_argument."""
    add("--max-new-tokens", type=int, default=64, help="longest response")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="0: off")
    add("--top-p", type=float, default=1.0, help="1: off")
    add("--presence-penalty", type=float, default=0.0, help="taken off the logits of tokens already written")
    add("--seed", type=int, default=0, help="of the rollouts")
    add("--device", default="auto", help="auto: cuda, then mps, then cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and activations")


def main():
    parser = argparse.ArgumentParser(description="Print completions of one prompt.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="a checkpoint directory or a Hugging Face hub name")
    add("--prompt", required=True, help="text, given to the model as it is")
    add("--chat", action="store_true", help="wrap the prompt in the tokeniser's chat template")
    add("--n", type=int, default=4, help="completions")
    add_sampling_flags(add)
    args = parser.parse_args()
    try:
        model, tokenizer = load(args.model, pick_device(args.device), getattr(torch, args.dtype))
        text = args.prompt
        if args.chat and not tokenizer.chat_template:
            raise ValueError(f"--chat: the tokeniser of {args.model} has no chat template")
        if args.chat:
            message = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=not args.chat).input_ids
        rollouts = sample(model, [prompt], args.n, torch.Generator().manual_seed(args.seed), args.max_new_tokens,
                          args.temperature, args.top_k, args.top_p, args.presence_penalty)
    except (ValueError, OSError) as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    for i, completion in enumerate(decode(rollouts, tokenizer)[0]):
        end = "stopped" if rollouts.finished[0, i] else "cut at --max-new-tokens"
        print(f"--- {rollouts.lengths[0, i]} tokens, {end}, log-prob {rollouts.logps[0, i].sum():.2f}\n{completion}")


if __name__ == "__main__":
    main()
