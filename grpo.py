"""GRPO: group advantages, the clipped policy loss and its variants, and the KL penalty.

For a prompt, G responses o_1..o_G with rewards r_1..r_G (in S2L-PO some of them the explorer's), per token t:

    A_i      = (r_i - mean(r)) / std(r)                                     over the combined group
    ratio    = pi_theta(o_it | ...) / pi_old(o_it | ...)                    pi_old: the policy at the start of the step
    L_it     = -min(ratio * A_i, clip(ratio, 1 - eps_low, 1 + eps_high) * A_i) + beta * KL(pi_theta || pi_ref)
    loss     = sum_it weight_it * L_it                                      weight: see token_weights

Why a group: the mean reward of a prompt's own rollouts is the baseline, so no value network is needed. Why the loss is
0 at the first update: every ratio is 1 and the advantages of a group sum to 0; its gradient is REINFORCE's and is not 0.

From the first line of a group's rewards to the optimiser's step: `group_advantages`, then `update`.

Shapes: P prompts, G rollouts each, N = P*G rows, T response tokens, L prompt and response tokens, D hidden.
"""
import numpy as np
import torch

from model import fused_logprobs

LOSSES = ("grpo", "dapo", "dr_grpo", "gspo")
EXPLORER_RATIOS = ("recompute", "behaviour", "truncated")


def group_advantages(rewards, scale=True):
    """A [P, G] of rewards [P, G]: each row centred on its mean and, with `scale`, divided by its standard deviation.

    The standard deviation is the unbiased one (ddof 1), as in the authors' trainer. A group of equal rewards teaches
    nothing and gets exactly 0: rounding of its mean must not be blown up by a tiny standard deviation.
    ValueError if G < 2: one rollout is its own baseline."""
    if rewards.shape[1] < 2:
        raise ValueError("a group needs at least 2 rollouts: with one, the reward minus the group's mean is always 0")
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale:
        centred = centred / (rewards.std(1, keepdim=True) + 1e-6)
    informative = rewards.max(1, keepdim=True).values > rewards.min(1, keepdim=True).values
    return torch.where(informative, centred, 0.0)


def token_weights(mask, loss, max_new_tokens):
    """Weight of each token in the loss, [N, T], for the N rows of one mini-batch. This is all that the loss types
    differ in (and `gspo` in its ratio). Computed before micro-batches are cut, so cutting cannot change the loss.

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


def explorer_treatment(choice, learner_logps, sampler_logps, explorer):
    """(old log-probs, loss weight), both [N, T]: what stands in the ratio's denominator for tokens of the explorer.

    learner_logps: of the learner at the start of the step. sampler_logps: of whoever drew the token. explorer: [N] bool.

        recompute  the learner's own, as if it had written the tokens: every ratio starts at 1 and the clip limits the
                   drift within the step. The paper's choice: biased, and stable.
        behaviour  the explorer's: an importance ratio against the policy that really drew the token. Unbiased per
                   token, but far from 1 from the start, so the clip stops most of the tokens that matter.
        truncated  recompute, with each token's loss times min(pi_learner / pi_explorer, 2): tokens that the learner
                   would hardly have drawn count less.
    """
    rows = explorer[:, None]
    old = torch.where(rows, sampler_logps, learner_logps) if choice == "behaviour" else learner_logps
    weight = torch.ones_like(old)
    if choice == "truncated":
        weight = torch.where(rows, (learner_logps - sampler_logps).exp().clamp(max=2.0), weight)
    return old, weight


def policy_loss(logps, old_logps, advantages, weights, clip_low=0.2, clip_high=0.2, sequence_ratio=False):
    """(loss, ratio, clipped): the clipped surrogate of logps [N, T] with advantages [N] and token weights [N, T] (0
    where there is no token). Ratio and clipped are [N, T], without gradient, for the metrics.

    The clip removes the gradient only where the step has already gone far enough the right way: ratio > 1 + clip_high
    with A > 0, ratio < 1 - clip_low with A < 0. sequence_ratio (GSPO): one ratio per row, the geometric mean of its
    tokens' ratios."""
    log_ratio = (logps - old_logps).masked_fill(weights == 0, 0.0)
    if sequence_ratio:
        tokens = (weights != 0).sum(1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(1, keepdim=True) / tokens).expand_as(logps)  # [N, T] -> [N, 1] -> [N, T]
    ratio = log_ratio.exp()
    A = advantages[:, None]  # [N] -> [N, 1]
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
    with torch.no_grad():
        clipped = ((A > 0) & (ratio > 1 + clip_high)) | ((A < 0) & (ratio < 1 - clip_low))
    return -(weights * surrogate).sum(), ratio.detach(), clipped


def kl_penalty(logps, ref_logps, weights, estimator="k3"):
    """Estimate of KL(pi_theta || pi_ref) [scalar] from tokens of pi_theta. With x = log pi_ref - log pi_theta:

        k1  -x            unbiased value; as a loss its expected gradient is 0, so it does not hold the policy back
        k2  x^2 / 2       biased value; as a loss its expected gradient is that of KL(pi_theta || pi_ref)
        k3  e^x - 1 - x   unbiased, positive value (the paper's); as a loss its gradient is that of KL(pi_ref || pi_theta)

    Equal near pi_ref, where the penalty is used. On explorer tokens none of them is an estimate of the KL: the tokens
    are not drawn from pi_theta; the penalty still pulls towards pi_ref there."""
    x = (ref_logps - logps).masked_fill(weights == 0, 0.0)
    k = {"k1": -x, "k2": x.square() / 2, "k3": x.exp() - 1 - x}[estimator]
    return (weights * k).sum()


def response_logprobs(model, prompts, ids, mask, temperature=1.0):
    """(log-probs, entropies), each [N, T], of the responses ids [N, T] (valid where mask [N, T]) to N prompts (lists of
    ids) in one forward pass. At the sampler's temperature, or the ratio would not be 1 before the first update."""
    lengths = mask.sum(1).tolist()
    rows = [torch.cat([ids.new_tensor(prompt), row[:n]]) for prompt, row, n in zip(prompts, ids, lengths)]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [N, L], padded on the right
    # The hidden state at position j predicts token j + 1: position len(prompt) - 1 scores the first response token.
    positions = torch.arange(tokens.shape[1] - 1, device=ids.device)
    first = torch.tensor([len(prompt) - 1 for prompt in prompts], device=ids.device)[:, None]
    predicts = (positions >= first) & (positions < first + mask.sum(1, keepdim=True))  # [N, L-1]
    hidden = model(tokens[:, :-1])[predicts]  # [N, L-1, D] -> [response tokens, D]
    logps, entropies = fused_logprobs(hidden, model.head, tokens[:, 1:][predicts], temperature)
    blank = torch.zeros(mask.shape, device=ids.device)
    return blank.masked_scatter(mask, logps), blank.masked_scatter(mask, entropies)


def update(args, learner, reference, optimizer, prompts, rollouts, advantages, generator):
    """One GRPO update of `args.minibatches` optimiser steps on a step's rollouts (P prompts, class Rollouts) with
    advantages [P, G]. `reference` is the KL's frozen policy or None. Returns the metrics of README's glossary."""
    P, G, T = rollouts.ids.shape
    ids, mask, sampler_logps, explorer = (
        x.flatten(0, 1) for x in (rollouts.ids, rollouts.mask, rollouts.logps, rollouts.explorer))  # [P, G, ..] -> [N, ..]
    A, N, device = advantages.flatten(), P * G, ids.device
    row_prompts = [prompt for prompt in prompts for _ in range(G)]

    def logprobs(model, rows):
        return response_logprobs(model, [row_prompts[i] for i in rows.tolist()], ids[rows], mask[rows], args.temperature)

    @torch.no_grad()
    def frozen_logprobs(model):
        return torch.cat([logprobs(model, rows)[0] for rows in torch.arange(N, device=device).split(args.micro_batch)])

    start_logps = frozen_logprobs(learner)  # pi_old: the learner before this step's first update, [N, T]
    reference_logps = frozen_logprobs(reference) if reference else None
    old_logps, treatment = explorer_treatment(args.explorer_ratio, start_logps, sampler_logps, explorer)

    ratio, clipped, entropy = (torch.zeros(N, T, device=device) for _ in range(3))
    losses, kls, grad_norms = [], [], []
    for groups in torch.randperm(P, generator=generator).to(device).chunk(args.minibatches):
        rows = (groups[:, None] * G + torch.arange(G, device=device)).flatten()  # whole groups: [P/m, G] -> [rows]
        weights = token_weights(mask[rows], args.loss, args.max_new_tokens)
        losses.append(0.0)
        kls.append(0.0)
        for micro in torch.arange(len(rows), device=device).split(args.micro_batch):
            r, w = rows[micro], weights[micro]
            logps, H = logprobs(learner, r)
            loss, ratio[r], clip = policy_loss(logps, old_logps[r], A[r], w * treatment[r], args.clip_low,
                                               args.clip_high, sequence_ratio=args.loss == "gspo")
            if reference:
                kl = kl_penalty(logps, reference_logps[r], w, args.kl_estimator)
                loss = loss + args.kl_coef * kl
                kls[-1] += kl.item()
            loss.backward()
            losses[-1] += loss.item()
            entropy[r], clipped[r] = H.detach(), clip.float()
        grad_norms.append(optimizer.step(args.max_grad_norm))

    def mean(x, rows):
        chosen = x[mask & rows[:, None]]
        return chosen.mean().item() if len(chosen) else None

    metrics = {"loss": float(np.mean(losses)), "kl": float(np.mean(kls)) if reference else None,
               "grad_norm": float(np.mean(grad_norms)), "skipped_updates": int(np.sum(~np.isfinite(grad_norms)))}
    gap = (start_logps - sampler_logps).abs()
    for name, rows in (("", torch.ones_like(explorer)), ("_explorer", explorer), ("_learner", ~explorer)):
        metrics |= {f"ratio{name}": mean(ratio, rows), f"clip_fraction{name}": mean(clipped, rows),
                    f"logp_gap{name}": mean(gap, rows), f"entropy{name}": mean(entropy, rows)}
    return metrics


class Optimizer:
    """AdamW in float32 for weights of any dtype: bfloat16 rounds a relative change below 1/256 away, and at learning
    rates of 1e-6 there are hardly any others. Float32 weights are their own masters; others get a float32 copy."""

    def __init__(self, model, lr):
        self.weights = list(model.parameters())
        self.masters = [w if w.dtype == torch.float32 else w.detach().float() for w in self.weights]
        self.adamw = torch.optim.AdamW(self.masters, lr=lr, weight_decay=0.0, fused=self.weights[0].device.type != "mps")

    @torch.no_grad()
    def step(self, max_norm):
        """One update from the weights' gradients, which it clears. Returns the gradient's norm before it is scaled
        down to max_norm; where that is not finite, nothing is updated."""
        for master, weight in zip(self.masters, self.weights):
            if master is not weight:
                master.grad = weight.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_norm).item()
        if np.isfinite(norm):
            self.adamw.step()
            self.copy_masters()
        for tensor in (*self.masters, *self.weights):
            tensor.grad = None
        return norm

    @torch.no_grad()
    def copy_masters(self):
        for master, weight in zip(self.masters, self.weights):
            if master is not weight:
                weight.copy_(master)

    def state(self):
        return {"masters": self.masters, "adamw": self.adamw.state_dict()}

    @torch.no_grad()
    def restore(self, state):
        for master, saved in zip(self.masters, state["masters"]):
            master.copy_(saved)
        self.adamw.load_state_dict(state["adamw"])
        self.copy_masters()
