"""GRPO: group advantages, the clipped policy loss and its variants, and the KL penalty.

For a prompt, G responses o_1..o_G with rewards r_1..r_G (in S2L-PO some of them the explorer's), per token t:

    A_i    = (r_i - mean(r)) / std(r)                                  over the combined group
    ratio  = pi_theta(o_it | ...) / pi_old(o_it | ...)                 pi_old: the policy when the step begins
    L_it   = -min(ratio A_i, clip(ratio, 1 - eps_low, 1 + eps_high) A_i) + beta KL(pi_theta || pi_ref)
    loss   = sum_it weight_it L_it                                     weight: the loss's row in LOSSES

Why a group: the mean reward of a prompt's own rollouts is the baseline, so no value network is needed. Why
the loss is 0 at a step's first mini-batch (with the default loss): every ratio is 1, every row has the same
weight, and the advantages of a group sum to 0. Its gradient is REINFORCE's and is not 0.

Read `group_advantages`, then `update`: from a group's rewards to the optimiser's step.

Shapes: P prompts, G rollouts each, N = P*G rows, T response tokens, L prompt tokens, D hidden.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import fused_logprobs, read_prompts
from plumbing.optimizer import micro_batches


@dataclass
class Objective:
    """What an update maximises, and in what portions. The defaults are train.py's, whose flags have these
    names."""
    loss: str = "grpo"              # a row of LOSSES
    off_policy: str = "recompute"   # one of OFF_POLICY: how the explorer's tokens count
    clip_low: float = 0.2           # ratios are clipped below at 1 - this
    clip_high: float = 0.2          # and above at 1 + this
    kl_coef: float = 0.0            # beta
    kl_estimator: str = "k3"
    temperature: float = 1.0        # the sampler's: else another distribution is trained than was sampled
    max_new_tokens: int = 512       # the constant of dr_grpo
    minibatches: int = 1            # optimiser steps
    micro_batch_tokens: int = 8192  # run at once; no part of the result
    max_grad_norm: float = 1.0


# ---- advantages, and the weight of a token -----------------------------------------------------------------

def group_advantages(rewards, over_std=True):
    """A [P, G] of rewards [P, G]: each row less its mean and, with `over_std`, over its standard deviation.

    The standard deviation is the unbiased one (ddof 1), plus 1e-6. A group of equal rewards teaches nothing
    and gets exactly 0: in floating point the mean of equal rewards can be off by a rounding error, which a
    standard deviation near zero would magnify. ValueError if G < 2: one rollout is its own baseline."""
    if rewards.shape[1] < 2:
        raise ValueError("a group needs at least 2 rollouts: one less its own mean is always 0")
    centred = rewards - rewards.mean(1, keepdim=True)  # [P, G] - [P, 1]
    if over_std:
        centred = centred / (rewards.std(1, keepdim=True) + 1e-6)
    informative = rewards.max(1, keepdim=True).values > rewards.min(1, keepdim=True).values
    return torch.where(informative, centred, 0.0)


def per_row(mask, max_new_tokens):
    """1 / (N * length_i): the mean over tokens, then over rows. Tokens of long responses count less."""
    return mask / (len(mask) * mask.sum(1, keepdim=True).clamp(min=1))


def per_token(mask, max_new_tokens):
    """1 / (all tokens): every token of the mini-batch counts the same."""
    return mask / mask.sum().clamp(min=1)


def constant(mask, max_new_tokens):
    """1 / (N * max_new_tokens): no bias by length at all."""
    return mask / (len(mask) * max_new_tokens)


@dataclass
class Loss:
    """One of the losses, which differ in these things alone."""
    weights: Callable        # of tokens: (mask [N, T] of a mini-batch, max_new_tokens) -> [N, T]
    over_std: bool = True    # whether advantages are divided by the group's standard deviation
    one_ratio: bool = False  # whether a row's tokens share one ratio, the geometric mean of theirs
    cut_rows: bool = True    # False: truncated responses are not trained on


LOSSES = {"grpo": Loss(per_row),                         # Shao et al., 2024
          "dapo": Loss(per_token),                       # Yu et al., 2025
          "dapo_filter": Loss(per_token, cut_rows=False),  # with its overlong filtering
          "dr_grpo": Loss(constant, over_std=False),     # Liu et al., 2025
          "gspo": Loss(per_row, one_ratio=True)}         # Zheng et al., 2025, which clips at 3e-4 and 4e-4


# ---- the explorer's tokens ---------------------------------------------------------------------------------

OFF_POLICY = ("recompute", "behaviour", "truncated", "geometric", "positive")


def advantages_of(rewards, from_explorer, objective):
    """A [P, G] of rewards [P, G] under an objective. from_explorer [P, G] says who wrote what, which matters
    to "positive" alone."""
    A = group_advantages(rewards, LOSSES[objective.loss].over_std)
    return A.masked_fill(from_explorer & (A < 0), 0.0) if objective.off_policy == "positive" else A


def off_policy_correction(choice, learner_logps, sampler_logps, from_explorer, mask):
    """(old log-probs, importance weights), both [N, T]: what stands in the ratio's denominator, and how much
    each token of the explorer counts. learner_logps are the learner's when the step began, sampler_logps
    those of whoever drew the token, both 0 outside mask [N, T]. from_explorer [N] says which rows are the
    explorer's.

        recompute  the learner's own, as if it had written the tokens: every ratio starts at 1 and the clip
                   limits the drift within the step. The paper's choice: biased, and stable.
        behaviour  the explorer's: an importance ratio against the policy that drew the token. It corrects
                   each token given its prefix (not the prefix), but starts far from 1, where the clip stops
                   much of the gradient.
        truncated  recompute, each token times min(pi_learner / pi_explorer, 2), truncated importance
                   sampling: tokens that the learner would hardly have drawn count less.
        geometric  recompute, each row times min(exp(mean of log(pi_learner / pi_explorer) over its tokens),
                   2): how plausible the learner finds the rollout, per token, so that length does not drive
                   it to 0.
        positive   recompute, but advantages_of gives explorer rows with A < 0 an advantage of 0: imitate its
                   successes, do not flee from its failures, which the learner would hardly have written.
    """
    off_policy = from_explorer[:, None]  # [N] -> [N, 1]
    old_logps, weights = learner_logps, torch.ones_like(learner_logps)
    log_ratio = learner_logps - sampler_logps
    if choice == "behaviour":
        old_logps = torch.where(off_policy, sampler_logps, learner_logps)
    if choice == "truncated":
        weights = torch.where(off_policy, log_ratio.exp().clamp(max=2.0), weights)
    if choice == "geometric":
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # [N, T] -> [N, 1]
        weights = torch.where(off_policy, mean.exp().clamp(max=2.0), weights)
    return old_logps, weights


# ---- the loss ----------------------------------------------------------------------------------------------

FAR = 20.0  # a log-ratio beyond it counts as it: e^20 is far outside every clip, and e^89 is infinite


def policy_loss(logps, old_logps, advantages, weights, mask, clip_low=0.2, clip_high=0.2, one_ratio=False):
    """(loss, ratio, clipped): the clipped surrogate of logps [N, T] with advantages [N] and weights [N, T],
    over the tokens in mask [N, T]. Ratio and clipped are [N, T], without gradient, for the metrics.

    The clip removes the gradient only where the step has already gone far enough the right way: ratio > 1 +
    clip_high with A > 0, ratio < 1 - clip_low with A < 0. one_ratio (GSPO): one ratio per row, the geometric
    mean of its tokens' ratios, which moves less."""
    log_ratio = (logps - old_logps).masked_fill(~mask, 0.0)  # whatever the padding holds must not become NaN
    if one_ratio:
        length = mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(1, keepdim=True) / length).expand_as(logps)  # [N, T] -> [N, 1] -> [N, T]
    ratio = log_ratio.clamp(max=FAR).exp()
    A = advantages[:, None]  # [N] -> [N, 1]
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)  # [N, T]
    clipped = surrogate < ratio * A  # there `minimum` took the clamped one, which has no gradient
    return -(weights * surrogate).sum(), ratio.detach(), clipped


def kl_estimates(logps, ref_logps, mask, estimator="k3"):
    """Each token's estimate of KL(pi_theta || pi_ref), [N, T], 0 outside mask. With x = log pi_ref - log
    pi_theta:

        k1  -x           unbiased value; as a loss its expected gradient is 0, so it does not hold the policy
        k2  x^2 / 2      biased value; as a loss its expected gradient is that of KL(pi_theta || pi_ref)
        k3  e^x - 1 - x  unbiased, positive value (the paper's); as a loss its gradient is that of
                         KL(pi_ref || pi_theta)

    Equal near pi_ref, where the penalty is used. On explorer tokens none of them is an estimate of the KL:
    the tokens are not drawn from pi_theta; as a penalty it still pulls towards pi_ref there."""
    x = (ref_logps - logps).masked_fill(~mask, 0.0).clamp(max=FAR)
    return {"k1": -x, "k2": x.square() / 2, "k3": x.exp() - 1 - x}[estimator]


# ---- the update --------------------------------------------------------------------------------------------

def response_logprobs(model, prompts, groups, ids, mask, temperature=1.0):
    """(log-probs, entropies), each [N, T], of the responses ids [N, T] (valid where mask [N, T]) to the
    prompts (lists of ids) that groups [N] names, at the sampler's temperature. Pass groups and mask on the
    CPU: they decide shapes, and asking a GPU for them would stall it.

    A group shares its prompt, so each prompt runs once. The responses attend to its keys and values, through
    which their gradients flow back into it. The prompt's last token predicts a response's first, and the
    response's last token predicts nothing: T - 1 of its tokens run."""
    present, groups = groups.unique(return_inverse=True)  # groups [N] now counts these rows' prompts alone
    last, cache, lengths = read_prompts(model, [prompts[group] for group in present.tolist()])
    T, L, device = int(mask.sum(1).max()), cache[0][0].shape[2], ids.device  # longest response and prompt
    N, real = len(ids), mask[:, :T].flatten().nonzero().squeeze(1)  # which of N*T places hold a token
    groups, real = groups.to(device), real.to(device)

    width = -(-(L + T - 1) // 8) * 8  # of the mask, cut off later: a GPU copies masks of other strides
    steps, slots = torch.arange(T - 1, device=device), torch.arange(width, device=device)
    in_prompt = slots < lengths[groups, None, None]  # [N, 1, width]
    so_far = (slots >= L) & (slots - L <= steps[:, None])  # [T-1, width]
    allowed = torch.where(in_prompt | so_far, 0.0, -torch.inf).to(last.dtype)[:, None]  # [N, 1, T-1, width]
    query_heads = model.config.num_attention_heads // model.config.num_key_value_heads  # of a key head
    allowed = allowed.repeat(1, 1, query_heads, 1)[..., :L + T - 1]  # `attend` folds heads into queries

    def after_prompt(layer, k, v):  # [N, K, T-1, h] -> [N, K, L+T-1, h]
        return *(torch.cat([old.index_select(0, groups), new], dim=2)
                 for old, new in zip(cache[layer], (k, v))), allowed

    # index_select, not old[groups]: that one's backward pass adds with atomics, in an order that other
    # processes on the machine decide, and the last bits of a sum depend on its order.
    hidden = last.index_select(0, groups)[:, None]  # [N, 1, D]: a prompt's last token predicts the first
    if T > 1:
        rest = model(ids[:, :T - 1], lengths[groups, None] + steps, after_prompt)  # [N, T-1, D]
        hidden = torch.cat([hidden, rest], dim=1)
    hidden = hidden.flatten(0, 1).index_select(0, real)  # [N, T, D] -> [response tokens, D], row by row
    targets = ids[:, :T].flatten()[real]
    found = fused_logprobs(hidden, model.head, targets, temperature, compile=model.compiled)
    blank = torch.zeros(N * T, device=device)
    return [F.pad(blank.index_copy(0, real, x).view(N, T), (0, ids.shape[1] - T)) for x in found]


def update(learner, reference, optimizer, prompts, rollouts, advantages, objective, generator):
    """One GRPO update, of objective.minibatches optimiser steps, on a step's rollouts (P prompts, class
    Rollouts) with advantages [P, G]. `reference` is the KL's frozen policy or None. Returns metrics
    (docs/metrics.md) and each token's ratio, clip_fraction, entropy, logp_gap (trainer's less sampler's) and,
    with a reference, kl, 0 where it was not trained on, {name: [P, G, T]} on the CPU."""
    P, G, T = rollouts.ids.shape
    ids, mask, sampler_logps, from_explorer, A = (x.flatten(0, 1) for x in (  # [P, G, ...] -> [N, ...]
        rollouts.ids, rollouts.mask, rollouts.logps, rollouts.from_explorer, advantages))
    device, loss = ids.device, LOSSES[objective.loss]
    mask = mask if loss.cut_rows else mask & rollouts.finished.flatten()[:, None]
    groups, mask_cpu = torch.arange(P).repeat_interleave(G), mask.cpu()  # [N] each row's prompt; [N, T]
    sizes = groups.tolist(), [len(prompts[row // G]) for row in range(P * G)], mask_cpu.sum(1).tolist()
    # Without a KL term a row with A = 0 has no gradient and is skipped. If the learner has become NaN, all
    # its rewards are equal; its rows are kept, so that the NaN loss shows.
    broken = sampler_logps.sum(1).isnan() & ~from_explorer
    teaches = (((reference is not None) | (A != 0) | broken) & mask.any(1)).tolist()

    def logprobs(model, part, rows):
        return response_logprobs(model, prompts, groups[part], ids[rows], mask_cpu[part],
                                 objective.temperature)

    def parts_of(rows):
        parts = micro_batches([row for row in rows if teaches[row]], *sizes, objective.micro_batch_tokens)
        return [(part, torch.tensor(part, device=device)) for part in parts]  # for the host, for the device

    @torch.no_grad()
    def fixed_logprobs(model):
        logps = torch.zeros(mask.shape, device=device)
        for part, rows in parts_of(range(P * G)):
            logps[rows] = logprobs(model, part, rows)[0]
        return logps

    # pi_old [N, T] is held fixed while theta moves, or nothing would ever clip. With only one mini-batch it
    # is what the update's own forward pass gives. pi_ref [N, T] never moves.
    learner_logps = fixed_logprobs(learner) if objective.minibatches > 1 else None
    ref_logps = fixed_logprobs(reference) if reference else None

    losses, grad_norms, trained = [], [], torch.zeros_like(mask_cpu)
    weights = torch.zeros(mask.shape, device=device)  # [N, T]
    names = ["ratio", "clip_fraction", "entropy", "logp_gap"] + ["kl"] * (reference is not None)
    at_token = torch.zeros(len(names), *mask.shape, device=device)  # what the metrics are means of
    order = torch.randperm(P, generator=generator)
    for chosen in order.tensor_split(objective.minibatches):  # [P/m]
        minibatch = (chosen[:, None] * G + torch.arange(G)).flatten()  # whole groups: [P/m*G]
        # Weights come from the whole mini-batch, so neither its parts nor skipped rows change the loss
        weights[minibatch] = loss.weights(mask[minibatch].float(), objective.max_new_tokens)
        part_losses, parts = [A.new_zeros(())], parts_of(minibatch.tolist())
        for part, rows in tqdm(parts, "training", unit="part", delay=10, leave=False, disable=None):
            logps, entropies = logprobs(learner, part, rows)
            before = logps.detach() if learner_logps is None else learner_logps[rows]
            old_logps, importance = off_policy_correction(
                objective.off_policy, before, sampler_logps[rows], from_explorer[rows], mask[rows])
            part_loss, ratio, clipped = policy_loss(
                logps, old_logps, A[rows], weights[rows] * importance, mask[rows], objective.clip_low,
                objective.clip_high, loss.one_ratio)
            values = [ratio, clipped, entropies, before - sampler_logps[rows]]
            if reference:
                kl = kl_estimates(logps, ref_logps[rows], mask[rows], objective.kl_estimator)
                part_loss = part_loss + objective.kl_coef * (weights[rows] * kl).sum()
                values.append(kl.detach())
            part_loss.backward()
            optimizer.accumulate()
            part_losses.append(part_loss.detach())
            trained[part], at_token[:, rows] = mask_cpu[part], torch.stack(values)
        losses.append(torch.stack(part_losses))  # [parts + 1]
        grad_norms.append(optimizer.step(objective.max_grad_norm, losses[-1].sum()))  # nan: skipped

    losses = [sum(found.tolist()) for found in losses]
    at_token, from_explorer = at_token.cpu(), from_explorer.cpu()  # they cross once
    metrics = {"loss": float(np.mean(losses)), "grad_norm": float(np.mean(grad_norms)),
               "skipped_updates": int(np.isnan(grad_norms).sum()), "tokens_trained": int(trained.sum())}
    sources = {"": torch.ones_like(from_explorer), "_explorer": from_explorer, "_learner": ~from_explorer}
    for name, x in zip(names, at_token):
        x = x.abs() if name == "logp_gap" else x
        for source, which in sources.items():
            tokens = x[trained & which[:, None]]
            metrics[name + source] = tokens.mean().item() if len(tokens) else None
    return metrics, {name: (x * trained).unflatten(0, (P, G)) for name, x in zip(names, at_token)}
