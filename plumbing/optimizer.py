"""The optimiser: AdamW whose weights and sums are float32, and a mini-batch in parts that fit into memory."""
import numpy as np
import torch


class Optimizer:
    """AdamW in float32 for weights of any dtype: bfloat16 loses relative changes below 1/256, and at a
    learning rate of 1e-6 almost every change is smaller. Float32 weights are their own masters; others get a
    float32 copy."""

    def __init__(self, model, lr):
        self.weights = [w for w in model.parameters() if w.requires_grad]
        self.masters = [w if w.dtype == torch.float32 else w.detach().float() for w in self.weights]
        fused = self.weights[0].device.type != "mps"
        self.adamw = torch.optim.AdamW(self.masters, lr=lr, weight_decay=0.0, fused=fused)

    def accumulate(self):
        """Moves a micro-batch's gradients from weights to masters, where they are summed in float32."""
        for master, weight in zip(self.masters, self.weights):
            if master is not weight and weight.grad is not None:
                master.grad = torch.zeros_like(master) if master.grad is None else master.grad
                master.grad += weight.grad  # in place, in float32
                weight.grad = None

    def step(self, max_norm, loss=0.0):
        """One update from the accumulated gradients, which it clears. Returns their norm before it is scaled
        down to max_norm. Where that or the loss is not finite, nothing is updated and nan returned."""
        for master in self.masters:  # none if no group was informative: AdamW still moves by its moments
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_norm)
        norm, total = torch.stack([norm, norm + loss]).tolist()  # the device is asked once
        finite = np.isfinite(total)
        if finite:
            self.adamw.step()
            self.copy_masters()
        self.adamw.zero_grad()
        return norm if finite else np.nan

    @torch.no_grad()
    def restore(self, masters, adamw):
        """Takes up saved masters and AdamW's state_dict."""
        for master, saved in zip(self.masters, masters, strict=True):
            master.copy_(saved)
        self.adamw.load_state_dict(adamw)
        self.copy_masters()

    @torch.no_grad()
    def copy_masters(self):
        for master, weight in zip(self.masters, self.weights):
            if master is not weight:
                weight.copy_(master)


def micro_batches(rows, groups, prompts, responses, tokens):
    """Splits rows (a list of indices) into parts that run at most so many tokens, padding counted, or hold
    one row. Given are, for each row, its group, prompt length and response length (lists).

    A part runs groups x longest prompt + rows x longest response tokens. So a group's rows had better stay
    together, but rows sorted by length need less padding. The cheaper of the two orders is taken."""
    def run(size):
        its_groups, prompt, response, count = size
        return len(its_groups) * prompt + count * response

    def split(order):
        parts, sizes = [], []  # size: (groups, longest prompt, longest response, rows) of a part
        for row in order:
            size = {groups[row]}, prompts[row], responses[row], 1
            if parts:
                its_groups, prompt, response, count = sizes[-1]
                wider = its_groups | size[0], max(prompt, size[1]), max(response, size[2]), count + 1
            if parts and run(wider) <= tokens:
                parts[-1].append(row)
                sizes[-1] = wider
            else:
                parts.append([row])
                sizes.append(size)
        return parts, sum(map(run, sizes))

    together, by_length = lambda row: (groups[row], responses[row]), lambda row: responses[row]
    plans = [split(sorted(rows, key=order)) for order in (together, by_length)]
    return min(plans, key=lambda plan: plan[1])[0]
