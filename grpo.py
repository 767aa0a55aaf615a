"""GRPO: group advantages, the clipped policy loss and its variants, and the KL penalty.

For a prompt, G responses o_1..o_G with rewards r_1..r_G (in S2L-PO some of them the explorer's), per token t:

    A_i      = (r_i - mean(r)) / std(r)                                     over the combined group
    ratio    = pi_theta(o_it | ...) / pi_old(o_it | ...)                    pi_old: the policy at the start of the step
    L_it     = -min(ratio * A_i, clip(ratio, 1 - eps_low, 1 + eps_high) * A_i) + beta * KL(pi_theta || pi_ref)
    loss     = sum_it weight_it * L_it                                      weight: see token_weights

Why a group: the mean reward of a prompt's own rollouts is the baseline, so no value network is needed. Why the loss is 0
at a step's first update (with the default loss): every ratio is 1, every row has the same weight, and the advantages of a
group sum to 0. Its gradient is REINFORCE's and is not 0.

From the first line of a group's rewards to the optimiser's step: `group_advantages`, then `update`.

Shapes: P prompts, G rollouts each, N = P*G rows, T response tokens, L prompt and response tokens, D hidden.
"""
import numpy as np
import torch

from model import fitting, fused_logprobs

LOSSES = ("grpo", "dapo", "dr_grpo", "gspo")
OFF_POLICY = ("recompute", "behaviour", "truncated", "geometric", "positive")


def group_advantages(rewards, scale=True):
    """A [P, G] of rewards [P, G]: each row centred on its mean and, with `scale`, divided by its standard deviation.

    The standard deviation is the unbiased one (ddof 1), plus 1e-6. A group of equal rewards teaches nothing and gets
    exactly 0: rounded, the mean of rewards like 0.7 differs from each of them, and dividing that by a standard
    deviation near 0 would blow it up.
    ValueError if G < 2: one rollout is its own baseline."""
    if rewards.shape[1] < 2:
        raise ValueError("a group needs at least 2 rollouts: with one, the reward minus the group's mean is always 0")
    centred = rewards - rewards.mean(1, keepdim=True)  # [P, G] - [P, 1]
    if scale:
        centred = centred / (rewards.std(1, keepdim=True) + 1e-6)
    informative = rewards.max(1, keepdim=True).values > rewards.min(1, keepdim=True).values
    return torch.where(informative, centred, 0.0)


def token_weights(mask, loss, max_new_tokens):
    """Weight of each token in the loss, [N, T], for the N rows of one mini-batch. This is all that the loss types differ
    in, but for gspo's ratio and dr_grpo's advantages, which are not divided by std. Computed before micro-batches are
    cut, so cutting cannot change the loss.

        grpo, gspo  1 / (N * length_i)     mean over tokens, then rows: tokens of long responses count less
        dapo        1 / (all tokens)       every token of the mini-batch counts the same
        dr_grpo     1 / (N * max tokens)   the same constant for every mini-batch, so no bias by length at all
    """
    mask = mask.float()
    if loss == "dapo":
        return mask / mask.sum().clamp(min=1)
    if loss == "dr_grpo":
        return mask / (len(mask) * max_new_tokens)
    return mask / (len(mask) * mask.sum(1, keepdim=True).clamp(min=1))


def off_policy_correction(choice, learner_logps, sampler_logps, from_explorer, advantages, mask):
    """(old log-probs, importance weights), both [N, T]: what stands in the ratio's denominator, and how much each token
    of the explorer counts. learner_logps are the learner's at the start of the step, sampler_logps those of whoever drew
    the token (elsewhere called old and rollout log-probs), both 0 outside mask [N, T]; from_explorer [N] says which rows
    are the explorer's; advantages [N].

        recompute  the learner's own, as if it had written the tokens: every ratio starts at 1 and the clip limits the
                   drift within the step. The paper's choice: biased, and stable.
        behaviour  the explorer's: an importance ratio against the policy that drew the token. It corrects each token
                   given its prefix (not the prefix), but starts far from 1, where the clip stops much of the gradient.
        truncated  recompute, each token times min(pi_learner / pi_explorer, 2), truncated importance sampling: tokens
                   that the learner would hardly have drawn count less.
        geometric  recompute, each row times min(exp(mean of log(pi_learner / pi_explorer) over its tokens), 2): how
                   plausible the learner finds the whole rollout, per token, so that length does not drive it to 0.
        positive   recompute, but explorer rows with A < 0 are left out: imitate its successes, do not flee from its
                   failures, which the learner would hardly have written.
    """
    off_policy = from_explorer[:, None]  # [N] -> [N, 1]
    old_logps, weights = learner_logps, torch.ones_like(learner_logps)
    if choice == "behaviour":
        old_logps = torch.where(off_policy, sampler_logps, learner_logps)
    if choice == "truncated":
        weights = torch.where(off_policy, (learner_logps - sampler_logps).exp().clamp(max=2.0), weights)
    if choice == "geometric":
        mean = (learner_logps - sampler_logps).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # [N, 1]
        weights = torch.where(off_policy, mean.exp().clamp(max=2.0), weights)
    if choice == "positive":
        weights = torch.where(off_policy & (advantages[:, None] < 0), 0.0, weights)
    return old_logps, weights


def policy_loss(logps, old_logps, advantages, weights, mask, clip_low=0.2, clip_high=0.2, sequence_ratio=False):
    """(loss, ratio, clipped): the clipped surrogate of logps [N, T] with advantages [N] and weights [N, T], over the
    tokens in mask [N, T]. Ratio and clipped are [N, T], without gradient, for the metrics.

    The clip removes the gradient only where the step has already gone far enough the right way: ratio > 1 + clip_high
    with A > 0, ratio < 1 - clip_low with A < 0. sequence_ratio (GSPO): one ratio per row, the geometric mean of its
    tokens' ratios."""
    log_ratio = (logps - old_logps).masked_fill(~mask, 0.0)  # whatever stands in the padding, it must not become NaN
    if sequence_ratio:
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # [N, T] -> [N, 1]
        log_ratio = log_ratio.expand_as(logps)
    ratio = log_ratio.exp()
    A = advantages[:, None]  # [N] -> [N, 1]
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)  # [N, T]
    with torch.no_grad():
        clipped = ((A > 0) & (ratio > 1 + clip_high)) | ((A < 0) & (ratio < 1 - clip_low))
    return -(weights * surrogate).sum(), ratio.detach(), clipped


def kl_penalty(logps, ref_logps, weights, mask, estimator="k3"):
    """Estimate of KL(pi_theta || pi_ref) [scalar] from tokens of pi_theta. With x = log pi_ref - log pi_theta:

        k1  -x            unbiased value; as a loss its expected gradient is 0, so it does not hold the policy back
        k2  x^2 / 2       biased value; as a loss its expected gradient is that of KL(pi_theta || pi_ref)
        k3  e^x - 1 - x   unbiased, positive value (the paper's); as a loss its gradient is that of KL(pi_ref || pi_theta)

    Equal near pi_ref, where the penalty is used. On explorer tokens none of them is an estimate of the KL: the tokens
    are not drawn from pi_theta; the penalty still pulls towards pi_ref there."""
    x = (ref_logps - logps).masked_fill(~mask, 0.0)
    k = {"k1": -x, "k2": x.square() / 2, "k3": x.exp() - 1 - x}[estimator]
    return (weights * k).sum()


def response_logprobs(model, prompts, ids, mask, temperature=1.0):
    """(log-probs, entropies), each [N, T], of the responses ids [N, T] (valid where mask [N, T]) to N prompts (lists of
    ids) in one forward pass. At the sampler's temperature: else the gradient is of a policy that drew none of this."""
    lengths = mask.sum(1).tolist()
    rows = [torch.cat([ids.new_tensor(prompt), row[:n]]) for prompt, row, n in zip(prompts, ids, lengths)]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [N, L], padded on the right
    # The hidden state at position j predicts token j + 1: position len(prompt) - 1 scores the first response token.
    positions = torch.arange(tokens.shape[1] - 1, device=ids.device)
    first = torch.tensor([len(prompt) - 1 for prompt in prompts], device=ids.device)[:, None]
    predicts = (positions >= first) & (positions < first + mask.sum(1, keepdim=True))  # [N, L-1]
    hidden = model(tokens[:, :-1])[predicts]  # [N, L-1, D] -> [response tokens, D], row by row
    logps, entropies = fused_logprobs(hidden, model.head, tokens[:, 1:][predicts], temperature,
                                      compile=model.compiled)
    blank = torch.zeros(mask.shape, device=ids.device)
    return blank.masked_scatter(mask, logps), blank.masked_scatter(mask, entropies)


def micro_batches(lengths, tokens):
    """Slices of consecutive rows of these lengths that hold at most so many tokens, padding counted, and a row at least."""
    slices, start, longest = [], 0, 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if row > start and (row + 1 - start) * longest > tokens:
            slices.append(slice(start, row))
            start, longest = row, length
    return [*slices, slice(start, len(lengths))]


def update(args, learner, reference, optimizer, prompts, rollouts, advantages, generator):
    """One GRPO update of `args.minibatches` optimiser steps on a step's rollouts (P prompts, class Rollouts) with
    advantages [P, G]. `reference` is the KL's frozen policy or None. Returns the metrics of README's glossary."""
    P, G, _ = rollouts.ids.shape
    ids, mask, sampler_logps, from_explorer, A = (x.flatten(0, 1) for x in (  # [P, G, ...] -> [N, ...]
        rollouts.ids, rollouts.mask, rollouts.logps, rollouts.from_explorer, advantages))
    row_prompts, device = [prompt for prompt in prompts for _ in range(G)], ids.device
    sizes = [len(prompt) + n for prompt, n in zip(row_prompts, mask.sum(1).tolist())]  # prompt and response

    def logprobs(model, rows):
        return response_logprobs(model, [row_prompts[i] for i in rows.tolist()], ids[rows], mask[rows], args.temperature)

    def in_micro_batches(rows, work):
        """[work(part) for slices of these rows], smaller ones where memory does not suffice."""
        def attempt():
            optimizer.clear()  # what an attempt that came to nothing has left
            return [work(part) for part in micro_batches([sizes[row] for row in rows.tolist()], args.micro_batch_tokens)]
        return fitting(args, "micro_batch_tokens", max(sizes), attempt)

    @torch.no_grad()
    def frozen_logprobs(model):
        rows = torch.arange(P * G, device=device)
        return torch.cat(in_micro_batches(rows, lambda part: logprobs(model, rows[part])[0]))

    # pi_old [N, T] is held fixed while theta moves, or nothing would ever clip. Before a single update it does not move,
    # and the update's own forward pass gives the same numbers.
    learner_logps = frozen_logprobs(learner) if args.minibatches > 1 else None
    reference_logps = frozen_logprobs(reference) if reference else None

    def gradient(rows, weights):
        """Adds a micro-batch's gradient to the mini-batch's. Returns (loss, KL, per-token metrics)."""
        logps, entropies = logprobs(learner, rows)
        before = logps.detach() if learner_logps is None else learner_logps[rows]
        old_logps, importance = off_policy_correction(args.off_policy, before, sampler_logps[rows], from_explorer[rows],
                                                      A[rows], mask[rows])
        loss, ratio, clipped = policy_loss(logps, old_logps, A[rows], weights * importance, mask[rows],
                                           args.clip_low, args.clip_high, sequence_ratio=args.loss == "gspo")
        kl = kl_penalty(logps, reference_logps[rows], weights, mask[rows], args.kl_estimator) if reference else torch.zeros(())
        loss = loss + args.kl_coef * kl
        loss.backward()
        optimizer.accumulate()
        return loss.item(), kl.item(), (rows, ratio, clipped.float(), entropies, (before - sampler_logps[rows]).abs())

    losses, kls, grad_norms, parts = [], [], [], []
    for groups in torch.randperm(P, generator=generator).to(device).tensor_split(args.minibatches):
        minibatch = (groups[:, None] * G + torch.arange(G, device=device)).flatten()  # whole groups: [P/m, G] -> [rows]
        all_weights = token_weights(mask[minibatch], args.loss, args.max_new_tokens)
        found = in_micro_batches(minibatch, lambda part: gradient(minibatch[part], all_weights[part]))
        losses.append(sum(loss for loss, _, _ in found))
        kls.append(sum(kl for _, kl, _ in found))
        parts += [per_token for _, _, per_token in found]
        grad_norms.append(optimizer.step(args.max_grad_norm, losses[-1]))

    order, ratio, clipped, entropies, gap = map(torch.cat, zip(*parts))  # every row once, in the order it was trained on
    per_token = {"ratio": ratio, "clip_fraction": clipped, "entropy": entropies, "logp_gap": gap}
    metrics = {"loss": sum(losses) / args.minibatches, "kl": sum(kls) / args.minibatches if reference else None,
               "grad_norm": float(np.mean(grad_norms)), "skipped_updates": int(np.sum(~np.isfinite(grad_norms)))}
    for suffix, which in (("", torch.ones_like(from_explorer)), ("_explorer", from_explorer), ("_learner", ~from_explorer)):
        chosen = (mask & which[:, None])[order]
        metrics |= {name + suffix: x[chosen].mean().item() if chosen.any() else None for name, x in per_token.items()}
    return metrics


def round_in_turn(x, step):
    """float32 -> bfloat16, its upper half: up where the lower half reaches a threshold that walks evenly through its range."""
    threshold = int(step * 0.6180339887 % 1 * 2 ** 16)  # the golden ratio's multiples fill the unit interval evenly
    return ((x.view(torch.int32) + threshold) & -2 ** 16).view(torch.float32).bfloat16()  # the sum carries over, or not


class Optimizer:
    """AdamW in float32 for weights of any dtype: bfloat16 rounds a relative change below 1/256 away, and at learning
    rates of 1e-6 there are hardly any others. Float32 weights are their own masters; others get a float32 copy.

    `dtype`: that of the two moments, which are as large as the masters each, between updates. AdamW moves the second by a
    thousandth at a time, and bfloat16 would round that away: `round_in_turn` is right on average."""

    def __init__(self, model, lr, dtype=torch.float32):
        self.weights = [w for w in model.parameters() if w.requires_grad]
        self.masters = [w if w.dtype == torch.float32 else w.detach().float() for w in self.weights]
        self.dtype, fused = dtype, self.weights[0].device.type != "mps"
        self.moved = False  # whether there was an update since this was last set to False: train.py Run
        # With rounded moments one optimiser for each weight, so that only one weight's are ever wide.
        sets = [self.masters] if dtype == torch.float32 else [[master] for master in self.masters]
        self.adamw = [torch.optim.AdamW(masters, lr=lr, weight_decay=0.0, fused=fused) for masters in sets]

    def accumulate(self):
        """Moves the weights' gradients of one micro-batch to their masters, where they are summed in float32."""
        for master, weight in zip(self.masters, self.weights):
            if master is not weight and weight.grad is not None:
                gradient, weight.grad = weight.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad + gradient

    def step(self, max_norm, loss=0.0):
        """One update from the accumulated gradients, which it clears. Returns the gradient's norm before it is scaled
        down to max_norm. Where that or the loss is not finite, nothing is updated and nan returned."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_norm).item()
        if not np.isfinite(norm + loss):
            self.clear()
            return np.nan
        self.moved = True
        for adamw in self.adamw:
            self.cast_moments(adamw, torch.float32)
            adamw.step()
            self.cast_moments(adamw, self.dtype)
        self.clear()
        self.copy_masters()
        return norm

    def clear(self):
        for weight in (*self.weights, *self.masters):
            weight.grad = None

    def cast_moments(self, adamw, dtype):
        for state in adamw.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                x = state[name]
                state[name] = x.float() if dtype == torch.float32 else round_in_turn(x, state["step"].item())

    @torch.no_grad()
    def copy_masters(self):
        for master, weight in zip(self.masters, self.weights):
            if master is not weight:
                weight.copy_(master)

    def state(self):
        return {"masters": self.masters, "moments": [adamw.state_dict()["state"] for adamw in self.adamw]}

    @torch.no_grad()
    def restore(self, state):
        """ValueError for the state of a model of other sizes."""
        if [saved.shape for saved in state["masters"]] != [master.shape for master in self.masters]:
            raise ValueError("it holds weights of other sizes")
        for master, saved in zip(self.masters, state["masters"]):
            master.copy_(saved)
        for adamw, saved in zip(self.adamw, state["moments"], strict=True):
            adamw.load_state_dict(adamw.state_dict() | {"state": saved})  # at the learning rate of now
            self.cast_moments(adamw, self.dtype)  # which AdamW widens, exactly
        self.copy_masters()
