"""KV-cached sampling: prompts in, rollouts out.

    python sample.py --model runs/family-habit/learner --prompt "Bfa483920=" --n 4

A group of G rollouts shares its prompt, so the prompt runs once and its keys and values are copied to G rows.
Once a quarter of the rows have finished, waiting prompts take their places, or the finished rows leave. Cache
slot == position: a row of n tokens writes its next key into slot n, so prompts of different lengths need no
padding tricks. Each rollout carries the log-probability of its tokens under the distribution they were really
drawn from: after temperature, top-k and top-p.

Read `sample` for the loop, `Flight` for the rows in flight, `draw` for logits to token.

Shapes: P prompts, G rollouts each, T response tokens, R rows in flight, S cache slots, V vocabulary; D
hidden, H query heads, K key/value heads, h head size.
"""
import argparse
from dataclasses import dataclass, fields

import plumbing  # before torch, which reads a variable that it sets

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import compiled, read_prompts
from plumbing.nucleus import outside_nucleus
from plumbing.text import cut, decode, encode, printable, stop_texts

LOOK_EVERY = 8  # tokens: how often the host asks which rows have finished. Each time it waits for the GPU


@dataclass
class Rollouts:
    """G responses to each of P prompts. Responses are right-padded with 0; `lengths` says where each ends."""
    ids: torch.Tensor       # [P, G, T] sampled token ids, the stop token included
    lengths: torch.Tensor   # [P, G]    number of tokens, the stop token counted
    logps: torch.Tensor     # [P, G, T] log-prob of each token under what it was drawn from; 0 where padded
    finished: torch.Tensor  # [P, G]    True: drew a stop token; False: cut at max_new_tokens
    from_explorer: torch.Tensor  # [P, G] True where the explorer wrote it: `signed` says so

    @property
    def mask(self):
        """[P, G, T] True on the response's tokens: up to the first stop token, which it includes."""
        return torch.arange(self.ids.shape[2], device=self.ids.device) < self.lengths[..., None]

    def cpu(self):
        """The rollouts where asking for a value waits for no device."""
        return Rollouts(*(getattr(self, field.name).cpu() for field in fields(self)))

    def __getitem__(self, which):
        """The rollouts of some prompts: `which` [P'] are their indices."""
        return Rollouts(*(getattr(self, field.name)[which] for field in fields(self)))


def join(*parts, dim=1):
    """The rollouts of all parts: of the same prompts, [P, G_w] and [P, G_s] -> [P, G_w + G_s]; with dim 0 of
    other prompts, [P, G] and [P', G] -> [P + P', G]."""
    T = max(part.ids.shape[2] for part in parts)
    widen = lambda x: F.pad(x, (0, T - x.shape[2])) if x.dim() == 3 else x
    together = lambda name: torch.cat([widen(getattr(part, name)) for part in parts], dim)
    return Rollouts(*(together(field.name) for field in fields(Rollouts)))


def signed(write):
    """The writer write(prompts, n, generator) -> Rollouts [P, n] as an explorer: its rollouts say who wrote
    them."""
    def explore(prompts, n, generator):
        rollouts = write(prompts, n, generator)
        rollouts.from_explorer = torch.ones_like(rollouts.finished)  # [P, n]
        return rollouts
    return explore


def draw(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """(token, its log-prob) per row, from logits [R, V] and one uniform number in [0, 1) per row.

    Inverse-CDF sampling: one number a row instead of V, and a row's draws do not depend on which rows are
    beside it. Its 24 bits never reach the rarest of 152,000 tokens, 1e-4 to 5e-4 of the mass together (for
    normal logits). Temperature 0 takes the likeliest token: under that one-point distribution its log-prob is
    0."""
    if temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits))
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]  # [R, 1]
        logits = logits.masked_fill(logits < kth, -torch.inf)  # [R, V]
    if top_p < 1:  # keep the smallest set of likeliest tokens whose mass reaches top_p
        logits = logits.masked_fill(outside_nucleus(logits.softmax(-1), top_p), -torch.inf)
    p = logits.softmax(-1)
    cdf = p.cumsum(-1)  # [R, V]
    target = uniform[:, None].clamp(max=1 - 2 ** -22) * cdf[:, -1:]  # below the sum, rounded too
    token = torch.searchsorted(cdf, target, right=True).squeeze(1)  # the first id with cdf > target
    token = token.clamp(max=logits.shape[-1] - 1)  # of NaN logits there is none: the update notices them
    # A GPU adds a single row up in parallel: by rounding its cdf may rise at a token of p 0 (not measured).
    token = torch.where(p.gather(1, token[:, None]).squeeze(1) > 0, token, p.argmax(-1))
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
        """Writes to these rows [R'] the keys and values of the prompts `which` [R'], of read_prompts. What an
        earlier rollout left in the slots behind is masked until it is overwritten too."""
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
    return model.logits(hidden)


class Flight:
    """R rows in flight: the cache, which rollout each row writes, its last token, whether it still runs."""

    def __init__(self, model, rows, slots):
        device, slots = model.head.device, -(-slots // 16) * 16  # a GPU copies masks of other widths
        self.model, self.slots, self.entering = model, slots, []
        self.cache = KVCache(model, rows, slots + 1)  # a whole axis, read, would be compiled anew
        self.longest = 0  # a bound on the longest row, which the host knows without asking the device
        self.rollout, self.token = torch.zeros(2, rows, dtype=torch.long, device=device)  # [R] each
        self.running = torch.zeros(rows, dtype=torch.bool, device=device)
        self.step = compiled(decode_step) if model.compiled else decode_step

    def stop_where(self, until, ids, lengths):
        """Rows that have said a stop text need not go on: ids [P*G, T], lengths [P*G]."""
        rows = (x.tolist() for x in (self.running, ids[self.rollout], lengths[self.rollout]))
        on = [running and not until(row[:length]) for running, row, length in zip(*rows)]
        self.running = torch.tensor(on, device=self.running.device)

    def look(self):
        """Indices of the rows that do not run, on the CPU. It waits for the device, once, and notes the rows
        for `retire` and how long the longest is."""
        seen = torch.cat([self.cache.lengths.max()[None], self.running]).cpu()
        self.longest, self.runs = int(seen[0]), seen[1:] > 0
        return (~self.runs).nonzero().squeeze(1)

    def admit(self, prompts, rows, rollouts):
        """Gives P' prompts these idle rows, to write `rollouts` in, [P'*G] each, group after group."""
        self.entering, self.seats = prompts, rows.to(rollouts.device)
        self.rollout[self.seats] = rollouts

    def retire(self):
        """Keeps the rows that ran at the last look, and frees the others' memory."""
        keep = self.runs.nonzero().squeeze(1).to(self.running.device)
        self.cache.select(keep)
        self.rollout, self.token, self.running = self.rollout[keep], self.token[keep], self.running[keep]

    @torch.inference_mode()  # quicker than no_grad. `draw` is outside: torch would compile its tokens anew
    def decode(self):
        """Logits [R, V] of every row's next token. Idle rows decode too, at a slot that stands still; what
        they draw is thrown away. Prompts that enter are run here, and predict their rows' first token."""
        R, prompts, self.entering = len(self.running), self.entering, []
        self.longest = min(self.longest + 1, self.slots)
        if prompts and len(self.seats) == R:  # nobody else is there
            logits = torch.zeros(R, self.model.num_tokens, device=self.running.device)
        else:
            used = -(-self.longest // 16) * 16  # few different shapes
            logits = self.step(self.model, self.token, self.cache, used)
            self.cache.lengths += self.running
        if prompts:
            hidden, cache, lengths = read_prompts(self.model, prompts)  # [P', D]
            group = torch.arange(len(prompts), device=self.seats.device)
            group = group.repeat_interleave(len(self.seats) // len(prompts))  # [P'*G]: a prompt serves G rows
            self.cache.put(self.seats, cache, lengths, group)
            logits[self.seats] = self.model.logits(hidden)[group]
            self.running[self.seats], self.longest = True, max(self.longest, *map(len, prompts))
        return logits


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
def sample(model, prompts, n, generator, max_new_tokens, stops, temperature=1.0, top_k=0, top_p=1.0,
           rows=1024, until=None, adjust=None):
    """Rollouts of `n` responses to each prompt (a list of id lists), at most max(rows, n) at once. A response
    ends with the first of the tokens `stops`, where until(ids) says so (see `cut`), or after max_new_tokens.

    `generator` is a CPU torch.Generator: the same one gives the same uniform numbers on every device.
    adjust(logits [R, V], ids [R, T], lengths [R]) -> logits may change them, given what each row has written.
    ValueError for settings out of range, and for a prompt that leaves no room for max_new_tokens."""
    if n < 1 or max_new_tokens < 1 or not temperature >= 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(f"cannot sample n={n}, max_new_tokens={max_new_tokens}, temperature={temperature}, "
                         f"top_k={top_k}, top_p={top_p}: n and tokens start at 1, top_p lies in (0, 1]")
    check_lengths(model, prompts, max_new_tokens)
    P, G, T, device = len(prompts), n, max_new_tokens, model.head.device
    uniform = torch.rand(P, G, T, generator=generator).flatten(0, 1).to(device)  # [P*G, T]
    stops = torch.tensor(stops, device=device, dtype=torch.long)
    ids = torch.zeros(P * G, T + 1, dtype=torch.long, device=device)  # column T: what idle rows still draw
    logps = torch.zeros(P * G, T + 1, device=device)
    lengths = torch.zeros(P * G, dtype=torch.long, device=device)
    finished = torch.zeros(P * G, dtype=torch.bool, device=device)

    flight, waiting = Flight(model, G * min(P, max(1, rows // G)), max(map(len, prompts)) + T), prompts
    bar = tqdm(total=P * G, desc="sampling", unit="rollout", delay=10, leave=False, disable=None)
    while True:
        # Turn over: waiting groups take the rows that have finished, or these leave
        if until:
            flight.stop_where(until, ids, lengths)
        idle, R = flight.look(), len(flight.running)
        bar.update(P * G - len(waiting) * G - (R - len(idle)) - bar.n)
        if len(idle) == R and not waiting:
            break
        if len(idle) >= 0.25 * R:  # not at every finish: entering is a prefill, leaving a copy
            if waiting:
                entering, waiting = waiting[:len(idle) // G], waiting[len(idle) // G:]
                end, seats = (P - len(waiting)) * G, idle[:len(entering) * G]
                flight.admit(entering, seats, torch.arange(end - len(seats), end, device=device))
            else:
                flight.retire()

        for _ in range(LOOK_EVERY):
            logits = flight.decode()                                             # [R, V]
            active, running = flight.rollout, flight.running                     # [R] each
            t = torch.where(running, lengths[active], T)                         # [R]
            if adjust:
                logits = adjust(logits, ids[active, :T], lengths[active])
            token, logp = draw(logits, uniform[active, t.clamp(max=T - 1)], temperature, top_k, top_p)
            ids[active, t], logps[active, t] = token, logp                       # no rollout has two rows
            lengths[active] += running
            finished[active] |= running & torch.isin(token, stops)
            flight.token, flight.running = token, running & ~finished[active] & (t < T - 1)
    bar.close()
    group = [x.unflatten(0, (P, G)) for x in (ids[:, :T], lengths, logps[:, :T], finished)]
    rollouts = Rollouts(*group, from_explorer=torch.zeros_like(group[-1]))
    return cut(rollouts, until) if until else rollouts


def main():
    from plumbing.survival import load_any
    from plumbing.terminal import one_line, pick_device
    parser = argparse.ArgumentParser(description="Print rollouts of one prompt.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    needed = dict(required=True, default=argparse.SUPPRESS)  # --help then names no default
    add("--model", **needed, help="a checkpoint directory, a hub name, or a run of train.py")
    add("--prompt", **needed, help="text, given to the model as it is; in bash $'a\\nb' has a new line")
    add("--chat", action="store_true", help="wrap the prompt in the tokeniser's chat template")
    add("--n", type=int, default=4, help="rollouts")
    add("--max-new-tokens", type=int, default=64, help="longest response")
    add("--stop", nargs="+", default=[], help="texts that end a response; \\n is a new line")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="0: off")
    add("--top-p", type=float, default=1.0, help="1: off")
    add("--seed", type=int, default=0, help="of the rollouts")
    add("--device", default="auto", help="auto: cuda, then mps, then cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and activations")
    args = parser.parse_args()
    with one_line("sample.py"):
        args.prompt.encode()  # ValueError if the terminal gave what is no text
        model, tokenizer, stops = load_any(args.model, pick_device(args.device), getattr(torch, args.dtype))
        prompt = encode(args.prompt, tokenizer, args.chat)
        random = torch.Generator().manual_seed(args.seed)
        rollouts = sample(model, [prompt], args.n, random, args.max_new_tokens, stops, args.temperature,
                          args.top_k, args.top_p, until=stop_texts(args.stop, tokenizer))
    for i, text in enumerate(decode(rollouts, tokenizer)[0]):
        end = "stopped" if rollouts.finished[0, i] else "cut"
        print(f"--- {rollouts.lengths[0, i]} tokens, {end}, log-prob {rollouts.logps[0, i].sum():.2f}")
        print(printable(text))


if __name__ == "__main__":
    main()
