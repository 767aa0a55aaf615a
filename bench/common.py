"""What the benchmarks share: interleaved timing, peak memory, models of random weights with their
transformers twin. They import it before torch and before the project's own files, which it makes importable.
"""
import ctypes
import os
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a benchmark is run as a file: its own folder is all that Python would search

import plumbing  # before torch, which reads a variable that it sets

import torch

from model import Config, Transformer
from plumbing.checkpoint import hf_weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMOLLM2 = dict(model_type="llama", vocab_size=49_152, hidden_size=576, intermediate_size=1_536,
               num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64)  # of 135M
TINY = dict(model_type="qwen3", vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32)  # 0.85M parameters
QWEN3_06B = dict(model_type="qwen3", vocab_size=151_936, hidden_size=1_024, intermediate_size=3_072,
                 num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128)


def machine():
    """One line for the head of each table: ratios travel between machines, absolute figures do not."""
    import transformers
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    return (f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, torch "
            f"{torch.__version__}, transformers {transformers.__version__}")


def full(config):
    return dict(config, rms_norm_eps=1e-6, max_position_embeddings=4_096, tie_word_embeddings=True,
                hidden_act="silu", rope_parameters={"rope_type": "default", "rope_theta": 1e4})


def config_of(config):
    return Config.from_hf(full(config))


def pair(config, dtype=torch.float32):
    """(our model, transformers' model) of the same random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**full(config))).to(DEVICE, dtype).eval()
    ours = Transformer(config_of(config)).to(DEVICE, dtype)
    weights = theirs.state_dict()
    with torch.no_grad():
        for name, weight in hf_weights(ours).items():
            weight.copy_(weights[name])
    return ours, theirs


def interleaved(functions, repeats=5):
    """{name: median seconds} of {name: function}: one unmeasured round, then rounds of one call each, so that
    whatever else the machine does falls on all of them alike."""
    seconds = {name: [] for name in functions}
    for round in range(repeats + 1):
        for name, function in functions.items():
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if round:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_memory(function):
    """Bytes that `function` needs at its peak beyond what is held before and what it returns."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = function()
        held = max(before, torch.cuda.memory_allocated() if kept is not None else 0)
        return torch.cuda.max_memory_allocated() - held
    def rss(field):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that malloc hoards is not held
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    before = rss("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
    kept = function()
    peak = rss("VmHWM")
    return peak - max(before, rss("VmRSS") if kept is not None else 0)


def laptop_family():
    """Directory of the two models that `python train.py` makes the first time."""
    from plumbing.family import make_family
    from train import family_of
    family = family_of("habit")
    if not family.exists():
        make_family(family)
    return family


TARGETS = []


def target(name, measured, goal, at_least=False):
    """Notes a ratio to be printed by `report`: at most `goal`, or at least."""
    ok = measured >= goal if at_least else measured <= goal
    sign = ">=" if at_least else "<="
    TARGETS.append(f"TARGET {name} {measured:.3g} {sign}{goal:g} {'ok' if ok else 'short'}")


def report():
    print("\n" + "\n".join(TARGETS))
