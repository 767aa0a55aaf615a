"""An explorer with another tokeniser: the learner trains on its texts, in tokens of its own.

    python -m recipes.retokenize --learner LEARNER --explorer MODEL --data gsm8k.jsonl [train.py's flags]

The explorer reads each problem as its own tokeniser and chat template put it, and its response is tokenised
anew. The learner computes the log-probs of the new tokens itself, as always. The explorer's log-prob of each
token is lost: a rollout's is spread evenly, enough to weigh whole rollouts (--off-policy geometric).
"""
import torch

import train
from plumbing.checkpoint import fingerprint, load
from plumbing.text import decode, stop_texts
from sample import Rollouts, sample


def open_explorer(args, run):
    """explore(prompts, n, generator) -> Rollouts [P, n] in the learner's tokens."""
    if args.off_policy in ("behaviour", "truncated"):
        raise ValueError(f"--off-policy {args.off_policy} needs the explorer's log-prob of each token")
    explorer, theirs, stops = load(args.explorer, run.learner.head.device, run.learner.head.dtype)
    run.hashes["explorer"] = fingerprint(explorer.requires_grad_(False), theirs, stops)
    explorer.compiled = run.learner.compiled
    stop_id = max(run.stops) if run.tokenizer.eos_token_id is None else run.tokenizer.eos_token_id

    def write(prompts, n, generator):
        rollouts = sample(explorer, prompts, n, generator, args.max_new_tokens, stops, args.explorer_temperature,
                          top_p=args.explorer_top_p, rows=args.rollout_rows,
                          until=stop_texts(args.stop, theirs))
        return retokenize(rollouts, theirs, run.tokenizer, stop_id, args.max_new_tokens)
    return train.in_its_own_words(args, run, explorer, theirs, write)


def retokenize(rollouts, theirs, ours, stop_id, max_new_tokens):
    """The same texts in our tokeniser's tokens. What was finished ends with stop_id. What has become longer
    than max_new_tokens is cut, and not finished then."""
    P, G, _ = rollouts.ids.shape
    texts = sum(decode(rollouts, theirs), [])
    # Model text is data: `<|im_end|>` spelled out by an explorer must not become our stop token.
    rows = [ours(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in texts]
    ended = rollouts.finished.flatten().tolist()
    rows = [ids + [stop_id] if end or not ids else ids for ids, end in zip(rows, ended)]  # none is empty
    whole = rollouts.lengths.new_tensor([len(ids) for ids in rows]).view(P, G)
    rows = [rollouts.ids.new_tensor(ids[:max_new_tokens]) for ids in rows]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).unflatten(0, (P, G))  # [P, G, T]
    per_token = (rollouts.logps.sum(-1) / whole)[..., None].expand(ids.shape)
    finished = rollouts.finished & (whole <= max_new_tokens)
    new = Rollouts(ids, whole.clamp(max=max_new_tokens), per_token, finished, rollouts.from_explorer)
    new.logps = per_token * new.mask
    return new


if __name__ == "__main__":
    train.main(open_explorer=open_explorer)
