"""KV-cached sampling: prompts in, rollouts out.

    python sample.py --model runs/family-habit/learner --prompt "Bfa483920=" --n 4
    python sample.py --model EXPLORER --data train.jsonl --n 32 --out pool.jsonl          rollouts to train from later

A group of G rollouts shares its prompt, so the prompt is prefilled once and its cache copied to the G rows. Rows that
drew a stop token leave the batch, and waiting prompts take their place. Cache slot == position: a row of n tokens writes
its next key into slot n, so prompts of different lengths need no padding tricks.
Each rollout carries the log-probability of its tokens under the distribution they were really drawn from: after
penalty, temperature, top-k and top-p.

Read `sample` for the loop, `decode_step` for one token through the network, `draw` for logits to token.

Shapes: P prompts, G rollouts each, T response tokens, R rows in flight, S cache slots, V vocabulary; D hidden, H query
heads, K key/value heads, h head size.
"""
import argparse
import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import reward
from model import OutOfMemory, compiled, fitting, load, lock, rms_norm, rotary, rotate, write_whole


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

    def groups(self, prompts):
        """The groups of these prompts (indices), in this order."""
        return Rollouts(**{field.name: getattr(self, field.name)[prompts] for field in fields(Rollouts)})


def mix(*parts, dim=1):
    """One group per prompt from all parts: [P, G1, ...], [P, G2, ...] -> [P, G1+G2, ...]; with dim=0, one set of groups
    from several: [P1, G, ...], [P2, G, ...] -> [P1+P2, G, ...]."""
    T = max(part.ids.shape[2] for part in parts)
    widen = lambda x: F.pad(x, (0, T - x.shape[2])) if x.dim() == 3 else x
    together = lambda name: torch.cat([widen(getattr(part, name)) for part in parts], dim)
    return Rollouts(**{field.name: together(field.name) for field in fields(Rollouts)})


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
    p = logits.softmax(-1)
    cdf = p.cumsum(-1)  # [R, V]
    target = uniform[:, None].clamp(max=1 - 2 ** -22) * cdf[:, -1:]  # strictly below the sum, also after rounding
    token = torch.searchsorted(cdf, target, right=True)  # first id with cdf > target, so never one of probability 0
    token = token.clamp(max=logits.shape[-1] - 1)  # of NaN logits, which the update will find, none is
    return token.squeeze(1), p.gather(1, token).squeeze(1).log()


class KVCache:
    """Keys and values of the rows in flight: a tensor [2, R, K, S, h] per layer, and each row's number of tokens [R].

    Zeros, not `empty`: a masked slot still enters the attention sum as 0 * value, and 0 * NaN is NaN."""

    def __init__(self, model, rows, slots):
        c, weight = model.config, model.embed_tokens.weight
        self.layers = [weight.new_zeros(2, rows, c.num_key_value_heads, slots, c.head_dim) for _ in model.layers]
        self.lengths = torch.zeros(rows, dtype=torch.long, device=weight.device)

    def select(self, rows):
        """Keeps these rows [R] and frees the others' memory."""
        for i, kv in enumerate(self.layers):  # layer by layer, so that only one is ever held twice
            self.layers[i] = kv[:, rows]
        self.lengths = self.lengths[rows]

    def put(self, rows, other, which):
        """Overwrites these rows [R'] with the rows `which` [R'] of another cache of as many slots or fewer. What an earlier
        rollout left in the slots behind is masked until it is overwritten too."""
        for kv, new in zip(self.layers, other.layers):
            kv[:, rows, :, :new.shape[3]] = new[:, which]
        self.lengths[rows] = other.lengths[which]


def prefill(model, prompts):
    """(logits [P, V] of the first response token, cache of P rows) for P prompts (lists of ids), each run once."""
    device, slots = model.norm.weight.device, max(map(len, prompts))
    cache = KVCache(model, len(prompts), slots)
    cache.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    padded = torch.tensor([prompt + [0] * (slots - len(prompt)) for prompt in prompts], device=device)
    hidden = model(padded, cache.layers)  # [P, slots, D]
    last = hidden[torch.arange(len(prompts), device=device), cache.lengths - 1]  # [P, D]
    return (last @ model.head.T).float(), cache


def decode_step(model, tokens, cache, used):
    """Logits [R, V] of what follows tokens [R], whose keys and values go to slot cache.lengths of each row; the caller
    then advances cache.lengths. Attention reads the first `used` slots, which must reach one beyond the longest row.
    The same network as Transformer.forward, for one token a row and written for speed:

      * a row is a column here, x [D, R], and a layer is W @ x. With few rows x @ W.T leaves all but one core idle: BLAS
        shares out the rows. W @ x is shared out by output feature (1.4 times the speed on two cores);
      * q and k are rotated together, and the H/K query heads that share a key head form one small GEMM with it."""
    c, R = model.config, len(tokens)
    H, K, h, eps = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rms_norm_eps
    norm = lambda x, module: rms_norm(x, module.weight[:, None], eps, dim=0)
    heads = torch.arange(2 * R * K, device=tokens.device).view(2, R, K)
    write = (heads * cache.layers[0].shape[3] + cache.lengths[:, None]).flatten()  # where the new k and v go in [2*R*K*S, h]
    x = model.embed_tokens(tokens).T.contiguous()  # [D, R]
    cos, sin = (angles.T.contiguous() for angles in rotary(cache.lengths, c, x.dtype))  # [h, R] each
    visible = torch.arange(used, device=tokens.device) <= cache.lengths.repeat_interleave(K)[:, None]  # [R*K, S]
    mask = torch.zeros(visible.shape, dtype=x.dtype, device=x.device).masked_fill(~visible, -torch.inf)[:, None]
    for layer, kv in zip(model.layers, cache.layers):
        attn, mlp = layer.self_attn, layer.mlp
        qkv = attn.qkv_proj.columns(norm(x, layer.input_layernorm))  # [(H+2K)*h, D] @ [D, R]
        qk, v = qkv.view(H + 2 * K, h, R).split([H + K, K])
        if c.qk_norm:
            weight = torch.cat([attn.q_norm.weight.expand(H, h), attn.k_norm.weight.expand(K, h)])
            qk = rms_norm(qk, weight[..., None], eps, dim=1)
        qk = rotate(qk, cos, sin, dim=1)
        kv.view(-1, h).index_copy_(0, write, torch.stack([qk[H:], v]).permute(0, 3, 1, 2).reshape(-1, h))
        keys, values = kv[:, :, :, :used].flatten(1, 2)  # [R*K, S, h] each
        q = qk[:H].view(K, H // K, h, R).permute(3, 0, 1, 2).flatten(0, 1)  # [R*K, H/K, h]
        if x.dtype == torch.float32:  # for one query a head, faster than SDPA's CPU kernel
            y = torch.baddbmm(mask, q, keys.transpose(1, 2), alpha=h ** -0.5).softmax(-1) @ values
        else:
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        x = x + attn.o_proj.columns(y.reshape(R, H * h).T)
        gate, up = mlp.gate_up_proj.columns(norm(x, layer.post_attention_layernorm)).chunk(2)  # [I, R] each
        x = x + mlp.down_proj.columns(F.silu(gate) * up)
    return (model.head @ norm(x, model.norm)).T.float().contiguous()  # [V, D] @ [D, R] -> [R, V]


@torch.no_grad()
def sample(model, prompts, n, generator, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, presence_penalty=0.0,
           rows=1024, from_explorer=False):
    """Rollouts of `n` responses to each prompt (a list of id lists), at most max(rows, n) at once.

    `generator` is a CPU torch.Generator: the same one gives the same uniform numbers on every device.
    ValueError for settings out of range, and if a prompt and max_new_tokens do not fit the model's context."""
    if n < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(f"cannot sample n={n}, max_new_tokens={max_new_tokens}, temperature={temperature}, top_k={top_k}, "
                         f"top_p={top_p}: n and max_new_tokens start at 1, the others at 0, top_p lies in (0, 1]")
    check_lengths(model, prompts, max_new_tokens)
    P, G, T, device = len(prompts), n, max_new_tokens, model.norm.weight.device
    uniform = torch.rand(P, G, T, generator=generator).flatten(0, 1).to(device)  # [P*G, T]
    stops = torch.tensor(model.stop_ids, device=device, dtype=torch.long)
    ids = torch.zeros(P * G, T + 1, dtype=torch.long, device=device)  # column T takes what finished rows still draw
    logps = torch.zeros(P * G, T + 1, device=device)
    lengths = torch.zeros(P * G, dtype=torch.long, device=device)
    finished = torch.zeros(P * G, dtype=torch.bool, device=device)
    seen = torch.zeros(P * G, len(model.head), dtype=torch.bool, device=device) if presence_penalty else None

    R, waiting = G * min(P, max(1, rows // G)), prompts  # rows in flight; a group enters as a whole
    cache = KVCache(model, R, slots=max(map(len, prompts)) + T)
    active, token = torch.zeros(2, R, dtype=torch.long, device=device)  # which rollout each row writes; its last token
    running = torch.zeros(R, dtype=torch.bool, device=device)
    step = compiled(decode_step) if model.compiled else decode_step
    while waiting or running.any():
        idle, entering = (~running).nonzero().squeeze(1), []
        if len(idle) >= 0.25 * len(running):  # not at every finish: to enter costs a prefill, to leave a copy of the cache
            if waiting:
                entering, waiting = waiting[:len(idle) // G], waiting[len(idle) // G:]
            else:
                keep = running.nonzero().squeeze(1)
                cache.select(keep)
                active, token, running = active[keep], token[keep], running[keep]
        # [R, V]; idle rows decode too, at a slot that they do not advance, and what they draw is thrown away below
        if running.any():
            logits = step(model, token, cache, int(cache.lengths.max()) + 1)
        else:
            logits = torch.zeros(R, len(model.head), device=device)
        cache.lengths += running
        if entering:
            seats, end = idle[:len(entering) * G], (P - len(waiting)) * G
            active[seats] = torch.arange(end - len(seats), end, device=device)
            first_logits, prompt_cache = prefill(model, entering)
            group = torch.arange(len(entering), device=device).repeat_interleave(G)  # each prompt serves its G rows
            cache.put(seats, prompt_cache, group)
            logits[seats], running[seats] = first_logits[group], True
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
    ids, lengths, logps, finished = (x.unflatten(0, (P, G)) for x in (ids[:, :T], lengths, logps[:, :T], finished))
    return Rollouts(ids, lengths, logps, finished, torch.full_like(finished, from_explorer))


def retokenize(rollouts, theirs, ours, stop_id, max_new_tokens):
    """The same texts in our tokeniser's tokens, for an explorer that has another: log-probs are recomputed by the learner
    anyhow. What was finished ends with our stop token; what has become longer than max_new_tokens is cut. The explorer's
    log-prob of a whole rollout is spread evenly over its new tokens: enough for weights of whole rollouts."""
    P, G, _ = rollouts.ids.shape
    texts = sum(decode(rollouts, theirs), [])
    # Model text is data: `<|im_end|>` spelled out by an explorer must not become our stop token.
    rows = [ours(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in texts]
    rows = [ids + [stop_id] if done or not ids else ids for ids, done in zip(rows, rollouts.finished.flatten().tolist())]
    whole = rollouts.lengths.new_tensor([len(ids) for ids in rows]).view(P, G)
    rows = [rollouts.ids.new_tensor(ids[:max_new_tokens]) for ids in rows]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).unflatten(0, (P, G))  # [P, G, T]
    per_token = (rollouts.logps.sum(-1) / whole)[..., None].expand(ids.shape)
    new = Rollouts(ids, whole.clamp(max=max_new_tokens), per_token, rollouts.finished & (whole <= max_new_tokens),
                   rollouts.from_explorer)
    new.logps = per_token * new.mask
    return new


class Pool:
    """Explorer rollouts on disk, sampled ahead of training: JSONL, a rollout a line, with the fields of the authors'
    sampler, of which prompt_ids, response_ids and small_model_log_probs are used. Only the lines' places are kept in
    memory."""

    def __init__(self, paths, num_tokens, context):
        """ValueError names the line of a record that cannot be used; a last line that was cut short is left out."""
        self.num_tokens, self.context, self.places = num_tokens, context, {}
        for path in paths:
            place = 0
            for number, line in reward.lines(path):
                try:
                    self.places.setdefault(self.read(line)[0], []).append((path, place))
                except (ValueError, KeyError, TypeError) as error:
                    if line.endswith(b"\n"):
                        raise ValueError(f"{path}, line {number}: not a rollout of this model's family in the authors' "
                                         f"layout: {' '.join(str(error).split()):.100}") from None
                place += len(line)

    def read(self, line):
        """(prompt_ids as a tuple, response_ids, log-probs) of one line."""
        record = reward.parse(line)
        prompt, ids, logps = (record[key] for key in ("prompt_ids", "response_ids", "small_model_log_probs"))
        if not all(type(i) is int and 0 <= i < self.num_tokens for i in (*prompt, *ids)):
            raise ValueError("token ids that the learner does not have")
        if not prompt or not ids or len(ids) != len(logps):
            raise ValueError("a prompt and as many log-probs as response ids are needed, at least one of each")
        if not all(type(x) in (int, float) and -1e9 < x < 0.1 for x in logps):  # also false for NaN; rounding may pass 0
            raise ValueError("log-probs must be finite and not above 0")
        if len(prompt) + len(ids) > self.context:
            raise ValueError(f"{len(prompt)} + {len(ids)} tokens do not fit the learner's context of {self.context}")
        return tuple(prompt), ids, logps

    def count(self, prompt):
        return len(self.places.get(tuple(prompt), ()))

    def draw(self, prompts, n, generator, model):
        """Rollouts [P, n], n different ones of each prompt's, in the order of the file."""
        records = []
        for prompt in prompts:
            places = self.places[tuple(prompt)]
            for i in torch.randperm(len(places), generator=generator)[:n].sort().values.tolist():
                path, place = places[i]
                with open(path, "rb") as file:
                    file.seek(place)
                    records.append(self.read(file.readline())[1:])
        device, T = model.norm.weight.device, max(len(ids) for ids, _ in records)
        padded = lambda rows, dtype: torch.tensor([[*row, *[0] * (T - len(row))] for row in rows], dtype=dtype, device=device)
        ids, logps = padded([ids for ids, _ in records], torch.long), padded([logps for _, logps in records], torch.float32)
        lengths = torch.tensor([len(ids) for ids, _ in records], device=device)
        finished = torch.tensor([ids[-1] in model.stop_ids for ids, _ in records], device=device)
        group = [x.unflatten(0, (len(prompts), n)) for x in (ids, lengths, logps, finished, torch.ones_like(finished))]
        return Rollouts(*group)


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
    """ValueError that names the first prompt which leaves no room for max_new_tokens in the model's context, or is empty, or
    holds a token that the model has not."""
    context = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i + 1} is empty")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(f"prompt {i + 1} has {len(prompt)} tokens; with {max_new_tokens} new tokens it does not fit "
                             f"the model's context of {context}: lower --max-new-tokens or drop the prompt")
        if max(prompt) >= model.num_tokens:
            raise ValueError(f"prompt {i + 1} holds token {max(prompt)} of a tokeniser that is larger than the model's "
                             f"vocabulary of {model.num_tokens}: they do not belong together")


def encode_prompt(problem, tokenizer, template=None, thinking=None):
    """Token ids of a problem's prompt. Synthetic tasks are their own prompt. A question in words gets its instruction and,
    where the tokeniser has one, its chat template (which already holds the BOS token: exactly one is wanted), told to think
    ("on") or not ("off") where it can be, as Qwen3's. Otherwise `template`: "plain" for no chat template, or the path of a
    file in which {question} and {instruction} are filled in."""
    if problem.task in reward.TASKS:
        return tokenizer(problem.question).input_ids
    instruction = reward.INSTRUCTIONS[problem.task]
    if template not in (None, "plain"):
        try:
            text = Path(template).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{template}: {error}") from None
        if "{question}" not in text:
            raise ValueError(f"{template}: a template holds {{question}}, which this file does not")
        # Not str.format: questions and templates are full of braces.
        return tokenizer(text.replace("{instruction}", instruction).replace("{question}", problem.question)).input_ids
    text = f"{problem.question}\n{instruction}".rstrip("\n")
    if template == "plain" or not tokenizer.chat_template:
        return tokenizer(text + "\n").input_ids
    options = {} if thinking is None else {"enable_thinking": thinking == "on"}
    message = [{"role": "user", "content": text}]
    try:
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, **options)
    except Exception as error:  # a template is a small program of the checkpoint's, and may do whatever it likes
        raise ValueError(f"{tokenizer.name_or_path}: its chat template fails: {' '.join(str(error).split()):.200}") from None
    return tokenizer(text, add_special_tokens=False).input_ids


def add_prompt_flags(add):
    """The flags of encode_prompt, through an argument parser's add_argument."""
    add("--template", help="of prompts: `plain` for no chat template, or a file with {question} and {instruction}; the "
        "tokeniser's chat template, if it has one, where not given")
    add("--thinking", choices=("on", "off"), help="for chat templates that can, such as Qwen3's; the template's own where not given")


def decode(rollouts, tokenizer):
    """[P][G] texts, special tokens left out."""
    return [[tokenizer.decode(ids[:length].tolist(), skip_special_tokens=True) for ids, length in zip(*group)]
            for group in zip(rollouts.ids, rollouts.lengths)]


def add_sampling_flags(add):
    """The flags that sample.py and eval.py share, through an argument parser's add_argument."""
    add_prompt_flags(add)
    add("--max-new-tokens", type=int, default=64, help="longest response")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="0: off")
    add("--top-p", type=float, default=1.0, help="1: off")
    add("--presence-penalty", type=float, default=0.0, help="taken off the logits of tokens already written")
    add("--rollout-rows", type=int, default=1024, help="rows sampled at once, in whole groups: lower it to save memory")
    add("--seed", type=int, default=0, help="of the rollouts")
    add("--device", default="auto", help="auto: cuda, then mps, then cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and activations")


def write_pool(args, model, tokenizer):
    """Samples args.n rollouts of every problem of --data (or of its --shard) into --out, in batches that are written whole
    or not at all and have random numbers of their own: killed and started again, it goes on with the batch it was at, and
    the file is the same as if it had never stopped. ValueError if the file there was made with other settings."""
    at_once, out = 16, Path(args.out)
    shard, shards = map(int, args.shard.split("/"))
    problems = list(enumerate(reward.load_problems(args.data)))[shard - 1::shards]
    prompts = [encode_prompt(problem, tokenizer, args.template, args.thinking) for _, problem in problems]
    check_lengths(model, prompts, args.max_new_tokens)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "device", "prompt", "chat", "rollout_rows")}
    note = out.with_name(out.name + ".settings.json")  # beside the pool, whose records hold the authors' fields alone
    out.parent.mkdir(parents=True, exist_ok=True)
    done = place = keep = 0  # whole lines; where the next one begins; where the last whole batch ends
    with open(out, "ab+") as file:
        lock(file, out)
        if out.stat().st_size and (not note.exists() or reward.read_object(note) != settings):
            raise ValueError(f"{out} was made with other settings ({note}): take another --out, or remove both")
        write_whole(note, lambda file: file.write(json.dumps(settings, indent=1).encode()))
        file.seek(0)
        for line in file:
            if not line.endswith(b"\n"):
                break  # cut short when it was stopped
            done, place = done + 1, place + len(line)
            keep = place if done % (at_once * args.n) == 0 or done == len(problems) * args.n else keep
        file.truncate(keep)
        done = len(problems) if done == len(problems) * args.n else done // (at_once * args.n) * at_once  # problems
        bar = tqdm(total=len(problems), initial=done, unit="problem", desc=str(out), dynamic_ncols=True)
        for start in range(done, len(problems), at_once):
            batch = problems[start:start + at_once]
            rollouts = fitting(args, "rollout_rows", args.n, lambda: sample(
                model, prompts[start:start + at_once], args.n, torch.Generator().manual_seed(args.seed * 1_000_003 + batch[0][0]),
                args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.presence_penalty, args.rollout_rows))
            for p, (texts, (number, problem)) in enumerate(zip(decode(rollouts, tokenizer), batch)):
                for g, text in enumerate(texts):
                    length, score = rollouts.lengths[p, g], reward.score(problem, text)
                    record = {
                        "prompt_id": number, "prompt": problem.question, "prompt_ids": prompts[start + p], "response": text,
                        "response_ids": rollouts.ids[p, g, :length].tolist(),
                        "small_model_log_probs": rollouts.logps[p, g, :length].tolist(), "reward": float(score.strict),
                        "is_correct": score.strict, "data_source": args.data, "ground_truth": problem.answer}
                    file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            bar.update(len(batch))
        bar.close()


def main():
    parser = argparse.ArgumentParser(description="Print completions of one prompt, or write rollouts of many to a file.",
                                     usage="%(prog)s [flags], which --help explains",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="a checkpoint directory or a Hugging Face hub name")
    add("--prompt", help="text, given to the model as it is")
    add("--chat", action="store_true", help="wrap the prompt in the tokeniser's chat template")
    add("--data", help="problems whose rollouts are written to --out, for train.py --explorer-pool")
    add("--out", help="JSONL to write; goes on where it was stopped")
    add("--shard", default="1/1", help="3/8: every eighth problem from the third on; the files of all shards make one pool")
    add("--n", type=int, default=4, help="rollouts per prompt")
    add_sampling_flags(add)
    args = parser.parse_args()
    try:
        if bool(args.prompt) == bool(args.data) or bool(args.data) != bool(args.out):
            raise ValueError("give either --prompt, or --data and --out")
        shard = args.shard.split("/")
        if not (len(shard) == 2 and all(x.isdecimal() for x in shard) and 1 <= int(shard[0]) <= int(shard[1])):
            raise ValueError(f"--shard {args.shard}: i/n with 1 <= i <= n is wanted, such as 3/8")
        model, tokenizer = load(args.model, pick_device(args.device), getattr(torch, args.dtype))
        if args.data:
            return write_pool(args, model, tokenizer)
        if args.chat and not tokenizer.chat_template:
            raise ValueError(f"--chat: the tokeniser of {args.model} has no chat template")
        prompt = (encode_prompt(reward.Problem(args.prompt, "", "instructed"), tokenizer, thinking=args.thinking) if args.chat
                  else tokenizer(args.prompt).input_ids)
        rollouts = fitting(args, "rollout_rows", args.n, lambda: sample(
            model, [prompt], args.n, torch.Generator().manual_seed(args.seed), args.max_new_tokens, args.temperature, args.top_k,
            args.top_p, args.presence_penalty, args.rollout_rows))
    except (ValueError, OSError, OutOfMemory) as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    for i, completion in enumerate(decode(rollouts, tokenizer)[0]):
        end = "stopped" if rollouts.finished[0, i] else "cut at --max-new-tokens"
        print(f"--- {rollouts.lengths[0, i]} tokens, {end}, log-prob {rollouts.logps[0, i].sum():.2f}\n{completion}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the same command goes on
        sys.exit(130)
