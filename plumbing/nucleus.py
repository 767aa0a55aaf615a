"""Top-p: which tokens lie outside of the nucleus, the smallest set of likeliest tokens with a mass of top_p.

Where it ends among equally likely tokens, any of them complete it. On a CPU sorting is the faster way. A GPU
is slow to sort, and would sort the whole vocabulary at every token: there the probability of the nucleus's
last token is sought by bisection (not measured, as no GPU was at hand).

Shapes: R rows, V vocabulary.
"""
import torch


def outside_nucleus(p, top_p):
    """[R, V] True where a token of the distributions p [R, V] lies outside."""
    return (by_sorting if p.device.type == "cpu" else by_bisection)(p, top_p)


def by_sorting(p, top_p):
    ranked, order = p.sort(descending=True)
    outside = ranked.cumsum(-1) - ranked >= top_p  # [R, V] in order of likelihood
    return torch.empty_like(outside).scatter_(1, order, outside)


def by_bisection(p, top_p):
    """Looks for the largest probability from which on upwards the mass reaches top_p. The bits of positive
    floats, read as whole numbers, have the floats' order, and those of 1.0 are a number below 2^30."""
    mass = lambda chosen: p.masked_fill(~chosen, 0).sum(-1, keepdim=True)  # [R, 1]
    low, high = torch.zeros_like(p[:, :1], dtype=torch.int32), p.amax(-1, keepdim=True).view(torch.int32) + 1
    for _ in range(30):
        middle = (low + high) // 2
        enough = mass(p >= middle.view(p.dtype)) >= top_p
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    last = low.view(p.dtype)  # that of the nucleus's last token, and perhaps of others
    equal = p == last
    return (p < last) | equal & (mass(p > last) + (equal.cumsum(-1) - 1) * last >= top_p)
