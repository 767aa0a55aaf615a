"""Makes the laptop family: an explorer and a learner, pretrained on one corpus, that differ in size only.

    python -m plumbing.family --task habit --out runs/family-habit

Writes explorer/ and learner/ (Hugging Face directories), train.jsonl and heldout.jsonl (problems that share
no question with each other or with the corpus) and family.json (the settings). `python train.py` calls this
the first time.
"""
import argparse
import json
import os
import random
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import Config, Transformer
from plumbing.checkpoint import save
from plumbing.problems import save_problems
from plumbing.tasks import TOPICS, WRITERS
from plumbing.terminal import one_line, pick_device
from reward import SYNTHETIC, Problem

# Width, layers. The learner is large enough to memorise the writers' habits, the explorer too small for that
# and just large enough to execute what it writes. On `habit` pass@k crosses over, on `natural` it does not.
SIZES = {"habit": {"explorer": (32, 2), "learner": (64, 3)},
         "natural": {"explorer": (48, 2), "learner": (96, 3)}}
CORPUS = {"habit": (12_000, 10), "natural": (10_000, 13)}  # worked solutions, epochs
LR, BATCH = 3e-3, 64
EOS = "<eos>"
ALPHABET = sorted(set("0123456789+-~*=ABCD" + TOPICS))


def make_corpus(task, size, seed, noise=0.01, **more):
    """[(question, worked solution)] for pretraining. `seed` also fixes the table of habits. more: `steps`, of
    a solution to `habit`."""
    return list(WRITERS[task][1](random.Random(f"{task} corpus {seed}"), size, noise, **more))


def make_problems(task, count, seed, exclude=(), **more):
    """`count` distinct problems whose questions are not in `exclude`."""
    rng, seen, problems = random.Random(f"{task} problems {seed}"), set(exclude), []
    while len(problems) < count:
        question, answer = WRITERS[task][0](rng, **more)
        if question not in seen:
            seen.add(question)
            problems.append(Problem(question, answer, task))
    return problems


# ---- the models --------------------------------------------------------------------------------------------

def make_tokenizer(directory):
    """A character-level tokenizer as an ordinary tokenizer.json (a BPE without merges), no BOS, pad = EOS."""
    from transformers import PreTrainedTokenizerFast
    vocabulary = {token: i for i, token in enumerate([EOS, *ALPHABET])}
    eos = {"id": 0, "content": EOS, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
           "normalized": False}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [eos], "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "dropout": None, "unk_token": None}}))
    file = str(directory / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, eos_token=EOS, pad_token=EOS)


def new_model(width, layers, tokenizer, generator, context=128):
    hf = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": len(tokenizer),
          "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width // 4, "hidden_act": "silu",
          "rms_norm_eps": 1e-6, "max_position_embeddings": context, "tie_word_embeddings": True,
          "attention_bias": False, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
          "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    model = Transformer(Config.from_hf(hf))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02 if "embed" in name else p.shape[1] ** -0.5, generator=generator)
    model.hf_config = hf
    return model


def pretrain(name, tokenizer, corpus, size, epochs, seed, device="cpu", stop_after=None, stop=None,
             batch_size=BATCH):
    """A model of size (width, layers) after next-token training on corpus [(question, solution)], loss on the
    solution only. `stop_after` epochs it is an earlier checkpoint of the same training. `stop`: a
    threading.Event that ends it with KeyboardInterrupt."""
    encoded = tokenizer([question + solution + EOS for question, solution in corpus]).input_ids
    prompts = tokenizer([question for question, _ in corpus]).input_ids
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in encoded], batch_first=True)  # [N, L]
    first, end = (torch.tensor([len(row) for row in rows])[:, None] for rows in (prompts, encoded))
    columns = torch.arange(1, ids.shape[1])
    target_mask = (columns >= first) & (columns < end)  # [N, L-1]: solution and EOS
    generator = torch.Generator().manual_seed(seed)
    model = new_model(*size, tokenizer, generator, max(128, ids.shape[1])).to(device)
    steps_per_epoch = len(ids) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, betas=(0.9, 0.95),
                                  fused=device != "mps")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=epochs * steps_per_epoch,
                                                   pct_start=0.05)
    last, parameters = stop_after or epochs, sum(p.numel() for p in model.parameters())
    title = f"pretraining {name}, {parameters:,} parameters"
    seconds = 0.1 if sys.stderr.isatty() else 30  # in a log, a line is a line
    with tqdm(total=last * steps_per_epoch, desc=title, dynamic_ncols=True, mininterval=seconds) as bar:
        for _ in range(last):
            for rows in torch.randperm(len(ids), generator=generator).split(batch_size)[:steps_per_epoch]:
                if stop and stop.is_set():
                    raise KeyboardInterrupt
                batch, mask = ids[rows].to(device), target_mask[rows].to(device)
                hidden = model(batch[:, :-1])[mask]  # [B, L-1, D] -> [tokens, D]
                loss = F.cross_entropy(hidden @ model.head.T, batch[:, 1:][mask])
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
                if bar.n % 50 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model


def make_family(out, task="habit", seed=0, noise=0.01, sizes=None, corpus_size=None, epochs=None,
                device="cpu", batch_size=BATCH, **more):
    """Pretrains the family into directory `out`, which appears only when it is complete. Of several processes
    that make it at once, the first to end has made it. The models are pretrained side by side, a thread each,
    and so with the same bits however many cores there are."""
    out = Path(out)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}-{time.time_ns()}")  # killed, it may lie about
    sizes = sizes or SIZES[task]
    corpus_size, epochs = corpus_size or CORPUS[task][0], epochs or CORPUS[task][1]
    tokenizer = make_tokenizer(partial)
    corpus = make_corpus(task, corpus_size, seed, noise, **more)
    started = time.time()
    threads, stop = torch.get_num_threads(), threading.Event()

    def member(name):
        torch.set_num_threads(1)  # of this thread
        model = pretrain(name, tokenizer, corpus, sizes[name], epochs, seed, device, stop=stop,
                         batch_size=batch_size)
        save(model, tokenizer, (tokenizer.eos_token_id,), partial / name)

    with ThreadPoolExecutor(len(sizes)) as pool:
        try:
            for _ in pool.map(member, sizes):
                pass
        except BaseException:  # Ctrl-C too: else leaving would wait for both models
            stop.set()
            raise
    torch.set_num_threads(threads)
    used = {question for question, _ in corpus}
    problems = make_problems(task, 2_560, seed, exclude=used, **more)
    save_problems(problems[:512], partial / "heldout.jsonl")
    save_problems(problems[512:], partial / "train.jsonl")
    settings = dict(task=task, seed=seed, noise=noise, sizes=sizes, corpus=corpus_size, epochs=epochs, lr=LR,
                    batch=batch_size, **more, seconds=round(time.time() - started, 1))
    (partial / "family.json").write_text(json.dumps(settings, indent=2))
    (partial / "tokenizer.json").unlink()
    try:
        os.rename(partial, out)
    except OSError:
        if not out.exists():
            raise
        shutil.rmtree(partial)


def main():
    parser = argparse.ArgumentParser(description="Pretrain explorer and learner on one synthetic corpus.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    needed = dict(required=True, default=argparse.SUPPRESS)  # --help then names no default
    add("--task", choices=SYNTHETIC, default="habit", help="reward.py describes them")
    add("--out", **needed, help="directory to make")
    add("--seed", type=int, default=0, help="of the corpus (and its table of habits), weights and problems")
    add("--noise", type=float, default=0.01, help="habit: share of writers who choose at random")
    add("--device", default="auto", help="auto: cuda, then mps, then cpu")
    args = parser.parse_args()
    with one_line("family.py"):
        if Path(args.out).exists():
            raise ValueError(f"{args.out} is there already")
        make_family(args.out, args.task, args.seed, args.noise, device=pick_device(args.device))
    print(f"made {args.out}")


if __name__ == "__main__":
    main()
