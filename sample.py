"""KV-cached sampling: prompts in, rollouts out.

    python sample.py --model runs/family-habit/learner --prompt "Bfa483920=" --n 4

A group of G rollouts shares its prompt, so the prompt is prefilled once and its cache copied to the G rows.
Rows that are done leave the batch, not at once but when a quarter are, and waiting prompts take their place.
Cache slot == position: a row of n tokens writes its next key into slot n, so prompts of different lengths
need no padding tricks. Each rollout carries the log-probability of its tokens under the distribution they
were really drawn from: after penalty, temperature, top-k and top-p.

Read `sample` for the loop, `decode_step` for one token through the network, `draw` for logits to token.

Shapes: P prompts, G rollouts each, T response tokens, R rows in flight, S cache slots, V vocabulary; D
hidden, H query heads, K key/value heads, h head size.
"""
import argparse
import itertools
import os
from dataclasses import dataclass, fields

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: threads that spin for long starve others

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import compiled, load, one_line, pick_device, project, read_prompts

LOOK_EVERY = 8  # tokens: how often the host asks which rows have finished. Each time it waits for the GPU


@dataclass
class Rollouts:
    """G responses to each of P prompts. Responses are right-padded with 0; `lengths` says where each ends."""
    ids: torch.Tensor       # [P, G, T] sampled token ids, the stop token included
    lengths: torch.Tensor   # [P, G]    number of tokens, the stop token counted
    logps: torch.Tensor     # [P, G, T] log-prob of each token under what it was drawn from; 0 where padded
    finished: torch.Tensor  # [P, G]    True: drew a stop token; False: cut at max_new_tokens
    from_explorer: torch.Tensor  # [P, G] True where the explorer wrote it; set by `join`

    @property
    def mask(self):
        """[P, G, T] True on the response's tokens: up to the first stop token, which it includes."""
        return torch.arange(self.ids.shape[2], device=self.ids.device) < self.lengths[..., None]


def join(explored, own):
    """One group a prompt from the explorer's rollouts [P, G_w] and the learner's [P, G_s] -> [P, G_w + G_s].
    Either may be None."""
    parts = [part for part in (explored, own) if part is not None]
    T = max(part.ids.shape[2] for part in parts)
    widen = lambda x: F.pad(x, (0, T - x.shape[2])) if x.dim() == 3 else x
    together = lambda name: torch.cat([widen(getattr(part, name)) for part in parts], dim=1)
    rollouts = Rollouts(*(together(field.name) for field in fields(Rollouts)))
    rollouts.from_explorer[:] = False
    if explored:
        rollouts.from_explorer[:, :explored.lengths.shape[1]] = True
    return rollouts


def draw(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """(token, its log-prob) per row, from logits [R, V] and one uniform number in [0, 1) per row.

    Inverse-CDF sampling: one number a row instead of V, and a row's draws do not depend on which rows are
    beside it. Temperature 0 takes the most likely token, whose log-prob under that one-point distribution is
    0."""
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
    p = logits.softmax(-1)
    cdf = p.cumsum(-1)  # [R, V]
    target = uniform[:, None].clamp(max=1 - 2 ** -22) * cdf[:, -1:]  # strictly below the sum, if rounded too
    token = torch.searchsorted(cdf, target, right=True).squeeze(1)  # first id with cdf > target: none of p 0
    token = token.clamp(max=logits.shape[-1] - 1)  # if the logits are NaN, none is; the update finds them
    return token, p.gather(1, token[:, None]).squeeze(1).log()


class KVCache:
    """Keys and values of the rows in flight: a tensor [2, R, K, S, h] per layer, and each row's number of
    tokens [R]. Slot == position: a row's next key goes to slot lengths[row].

    Zeros, not `empty`: a masked slot still enters the attention sum as 0 * value, and 0 * NaN is NaN."""

    def __init__(self, model, rows, slots):
        c, weight = model.config, model.embed_tokens.weight
        shape = 2, rows, c.num_key_value_heads, slots, c.head_dim
        self.layers = [weight.new_zeros(shape) for _ in model.layers]
        self.lengths = torch.zeros(rows, dtype=torch.long, device=weight.device)

    def select(self, rows):
        """Keeps these rows [R] and frees the others' memory."""
        for i, kv in enumerate(self.layers):  # layer by layer, so that only one is ever held twice
            self.layers[i] = kv[:, rows]
        self.lengths = self.lengths[rows]

    def put(self, rows, prompts, lengths, which):
        """Writes to these rows [R'] the prompts `which` [R'], from read_prompts. What an earlier rollout left
        in the slots behind is masked until it is overwritten too."""
        for i, kv in enumerate(self.layers):
            kv[:, rows, :, :prompts[i][0].shape[2]] = torch.stack(prompts[i])[:, which]
        self.lengths[rows] = lengths[which]

    def past(self, used):
        """Transformer.forward's `past` for one new token a row. Attention reads the first `used` slots, which
        must reach one beyond the longest row."""
        _, R, K, S, h = self.layers[0].shape
        heads = torch.arange(2 * R * K, device=self.lengths.device).view(2, R, K)  # k or v, row, key head
        write = (heads * S + self.lengths[:, None]).flatten()  # where their new ones go in [2*R*K*S, h]
        visible = torch.arange(used, device=self.lengths.device) <= self.lengths[:, None]  # [R, used]
        mask = torch.where(visible, 0.0, -torch.inf).to(self.layers[0].dtype)[:, None, None]  # [R,1,1,used]

        def extend(layer, k, v):  # [R, K, 1, h] each
            kv = self.layers[layer]
            kv.view(-1, h).index_copy_(0, write, torch.stack([k, v]).view(-1, h))
            return *kv[:, :, :, :used], mask
        return extend


def decode_step(model, tokens, cache, used):
    """Logits [R, V] of what follows tokens [R], whose keys and values go to slot cache.lengths of each row.
    The caller then advances cache.lengths."""
    hidden = model(tokens[:, None], cache.lengths[:, None], cache.past(used))[:, 0]  # [R, 1, D] -> [R, D]
    return project(hidden, model.head).float()


def check_lengths(model, prompts, max_new_tokens):
    """ValueError that names the first prompt which leaves no room for max_new_tokens in the model's context,
    or is empty, or holds a token that the model does not have."""
    context = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ValueError(f"prompt {i} is empty")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens: with {max_new_tokens} new ones it does "
                             f"not fit the model's context of {context}")
        if max(prompt) >= model.num_tokens:
            raise ValueError(f"prompt {i} holds token {max(prompt)}, but the model has {model.num_tokens}: "
                             "the tokeniser is another model's")


@torch.no_grad()
def sample(model, prompts, n, generator, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0,
           presence_penalty=0.0, rows=1024):
    """Rollouts of `n` responses to each prompt (a list of id lists), at most max(rows, n) at once.

    `generator` is a CPU torch.Generator: the same one gives the same uniform numbers on every device.
    ValueError for settings out of range, and for a prompt that leaves no room for max_new_tokens."""
    if n < 1 or max_new_tokens < 1 or not temperature >= 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(f"cannot sample n={n}, max_new_tokens={max_new_tokens}, temperature={temperature}, "
                         f"top_k={top_k}, top_p={top_p}: n and tokens start at 1, top_p lies in (0, 1]")
    check_lengths(model, prompts, max_new_tokens)
    P, G, T, device = len(prompts), n, max_new_tokens, model.norm.weight.device
    uniform = torch.rand(P, G, T, generator=generator).flatten(0, 1).to(device)  # [P*G, T]
    stops = torch.tensor(model.stop_ids, device=device, dtype=torch.long)
    ids = torch.zeros(P * G, T + 1, dtype=torch.long, device=device)  # column T: what idle rows still draw
    logps = torch.zeros(P * G, T + 1, device=device)
    lengths = torch.zeros(P * G, dtype=torch.long, device=device)
    finished = torch.zeros(P * G, dtype=torch.bool, device=device)
    seen = torch.zeros(P * G, len(model.head), dtype=torch.bool, device=device) if presence_penalty else None

    R, waiting = G * min(P, max(1, rows // G)), prompts  # rows in flight: a group enters as a whole
    slots = max(map(len, prompts)) + T
    cache = KVCache(model, R, slots + 1)  # the last is never read: for a slice of all, torch compiles again
    active, token = torch.zeros(2, R, dtype=torch.long, device=device)  # a row's own rollout, and its token
    running = torch.zeros(R, dtype=torch.bool, device=device)
    step = compiled(decode_step) if model.compiled else decode_step
    bar = tqdm(total=P * G, desc="sampling", unit="rollout", delay=10, leave=False, disable=None)
    for i in itertools.count():  # a turn: look who is done, step the others, let prompts enter, draw, note
        entering = []
        if i % LOOK_EVERY == 0:
            idle, longest = (~running).nonzero().squeeze(1), int(cache.lengths.max())
            bar.update(P * G - len(waiting) * G - (len(running) - len(idle)) - bar.n)
            if len(idle) == len(running) and not waiting:
                break
            if len(idle) >= 0.25 * len(running):  # not at every finish: entering is a prefill, leaving a copy
                if waiting:
                    entering, waiting = waiting[:len(idle) // G], waiting[len(idle) // G:]
                else:
                    keep = running.nonzero().squeeze(1)
                    cache.select(keep)
                    active, token, running, idle = active[keep], token[keep], running[keep], idle[:0]
        longest = min(longest + 1, slots)  # a bound on the longest row, without asking the device
        if len(idle) == len(running):
            logits = torch.zeros(R, len(model.head), device=device)
        else:  # [R, V]; idle rows decode too, at a slot that stands still. What they draw is thrown away
            logits = step(model, token, cache, min(-(-longest // 16) * 16, slots))  # few different shapes
        cache.lengths += running
        if entering:
            seats, end = idle[:len(entering) * G], (P - len(waiting)) * G
            active[seats] = torch.arange(end - len(seats), end, device=device)
            hidden, prompt_cache, prompt_lengths = read_prompts(model, entering)
            group = torch.arange(len(entering), device=device).repeat_interleave(G)  # a prompt serves G rows
            cache.put(seats, prompt_cache, prompt_lengths, group)
            logits[seats], running[seats] = project(hidden, model.head).float()[group], True
            idle, longest = idle[len(seats):], max(longest, *map(len, entering))
        if presence_penalty:
            logits -= presence_penalty * seen[active]
        t = torch.where(running, lengths[active], T)  # [R]
        token, logp = draw(logits, uniform[active, t.clamp(max=T - 1)], temperature, top_k, top_p)
        ids[active, t], logps[active, t] = token, logp
        lengths[active] += running
        finished[active] |= running & torch.isin(token, stops)
        running = running & ~finished[active] & (t < T - 1)
        if presence_penalty:
            seen[active, token] = True
    bar.close()
    group = [x.unflatten(0, (P, G)) for x in (ids[:, :T], lengths, logps[:, :T], finished)]
    return Rollouts(*group, from_explorer=torch.zeros_like(group[-1]))


def encode(text, tokenizer, chat=True, thinking=None):
    """Token ids of a prompt. With `chat`, a tokeniser that has a chat template applies it, told to think
    ("on") or not ("off") where it can be, as Qwen3's. The template already holds the BOS token; exactly one
    is wanted, and no EOS at the end. ValueError if the template, a small program that comes with the
    checkpoint, fails."""
    if not chat or not tokenizer.chat_template:
        ids = tokenizer(text).input_ids
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some end every text so
    options = {} if thinking is None else {"enable_thinking": thinking == "on"}
    message = [{"role": "user", "content": text.rstrip("\n")}]
    try:
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, **options)
    except Exception as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{tokenizer.name_or_path}: its chat template fails: {why:.200}") from error
    return tokenizer(text, add_special_tokens=False).input_ids


def decode(rollouts, tokenizer):
    """[P][G] texts, special tokens left out."""
    return [[tokenizer.decode(ids[:length].tolist(), skip_special_tokens=True) for ids, length in zip(*group)]
            for group in zip(rollouts.ids, rollouts.lengths)]


def printable(text):
    """With what does not print spelled out: a model's escape sequence is no command to the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def main():
    parser = argparse.ArgumentParser(description="Print rollouts of one prompt.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    needed = dict(required=True, default=argparse.SUPPRESS)  # --help then names no default
    add("--model", **needed, help="a checkpoint directory or a Hugging Face hub name")
    add("--prompt", **needed, help="text, given to the model as it is")
    add("--chat", action="store_true", help="wrap the prompt in the tokeniser's chat template")
    add("--n", type=int, default=4, help="rollouts")
    add("--max-new-tokens", type=int, default=64, help="longest response")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="0: off")
    add("--top-p", type=float, default=1.0, help="1: off")
    add("--seed", type=int, default=0, help="of the rollouts")
    add("--device", default="auto", help="auto: cuda, then mps, then cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and activations")
    args = parser.parse_args()
    try:
        args.prompt.encode()  # ValueError if the terminal gave what is no text
        model, tokenizer = load(args.model, pick_device(args.device), getattr(torch, args.dtype))
        prompt = encode(args.prompt, tokenizer, args.chat)
        random = torch.Generator().manual_seed(args.seed)
        rollouts = sample(model, [prompt], args.n, random, args.max_new_tokens, args.temperature, args.top_k,
                          args.top_p)
    except Exception as error:
        parser.exit(2, f"sample.py: error: {one_line(error)}\n")
    for i, text in enumerate(decode(rollouts, tokenizer)[0]):
        end = "stopped" if rollouts.finished[0, i] else "cut"
        print(f"--- {rollouts.lengths[0, i]} tokens, {end}, log-prob {rollouts.logps[0, i].sum():.2f}")
        print(printable(text))


if __name__ == "__main__":
    main()
