"""The policy: one decoder-only transformer, its checkpoints, and the log-probabilities RL needs.

One class covers Qwen3 (QK-norm), Qwen2 (qkv bias), Llama, Mistral and InternLM2 (neither): the tiny models of this
repository and Qwen3-8B come in through the same door. It runs whole sequences; sample.py has the step that appends one
token to cached ones.

Batches are padded on the RIGHT: a causal model never looks right, so padding needs no mask, and a token's position is
simply its index.

Shapes: B rows, T tokens, D hidden, H query heads, K key/value heads, h head size, I MLP, V vocabulary, N = B*T.
"""
import functools
import json
import math
import os
import re
import shutil
import sys
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from reward import parse, read_object


@dataclass
class Config:
    """The part of a Hugging Face config.json that decides the computation."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: dict | None  # Llama 3's; no other kind changes anything within the context
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qk_norm: bool
    qkv_bias: bool

    @classmethod
    def from_hf(cls, hf):
        """From a config.json dictionary. ValueError names whatever this file does not implement, and what cannot be."""
        kind = hf.get("model_type")
        if kind not in ("qwen3", "qwen2", "llama", "mistral", "internlm2"):
            raise ValueError(f"model_type {kind!r:.40} is not implemented (qwen3, qwen2, llama, mistral and internlm2 are)")
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # transformers 5 | 4
        scaling = rope.get("rope_type", rope.get("type", "default"))
        unsupported = [f"{name}={value!r}" for name, value, fine in (
            ("rope scaling", scaling, scaling in ("default", "llama3", "dynamic")),  # dynamic: beyond the context only
            ("hidden_act", hf.get("hidden_act", "silu"), hf.get("hidden_act", "silu") == "silu"),
            ("attention_bias", True, not hf.get("attention_bias")),
            ("mlp_bias", True, not hf.get("mlp_bias")),
            ("bias", True, not hf.get("bias"))) if not fine]
        if unsupported:
            raise ValueError(f"this {kind} checkpoint needs {', '.join(unsupported)}, which is not implemented")
        heads, context = hf["num_attention_heads"], hf["max_position_embeddings"]
        # A sliding window hides nothing from a sequence that is no longer than it.
        window = hf.get("sliding_window") if hf.get("use_sliding_window", kind == "mistral") else None
        config = cls(
            **{key: hf[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                        "num_attention_heads", "rms_norm_eps")},
            max_position_embeddings=min(context, window or context),
            num_key_value_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            rope_theta=rope.get("rope_theta") or hf.get("rope_theta", 10_000.0),
            rope_scaling=rope if scaling == "llama3" else None,
            tie_word_embeddings=hf.get("tie_word_embeddings") or False,
            qk_norm=kind == "qwen3",
            qkv_bias=kind == "qwen2")
        number = lambda x: type(x) in (int, float) and 0 < x < 1e30
        fine = {int: lambda x: type(x) is int and 0 < x <= 2 ** 24, float: number, bool: lambda x: type(x) is bool,
                dict | None: lambda x: x is None or all(number(x[key]) for key in (
                    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))}
        wrong = [f"{field.name} {value!r:.40}" for field, value in zip(fields(cls), vars(config).values())
                 if not fine[field.type](value)]
        if wrong or config.num_hidden_layers > 1_000 or config.head_dim % 2 or heads % config.num_key_value_heads:
            raise ValueError(f"no model has such sizes: {', '.join(wrong) or 'number of layers, of heads or size of a head'}")
        return config


def rms_norm(x, weight, eps, dim=-1):
    """x / rms(x) * weight over one dimension, the mean square taken in fp32 whatever the model's dtype."""
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.square().mean(dim, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def rotary(positions, c: Config, dtype):
    """cos and sin of each position's rotation angles, both [..., h] for positions [...]. Angles in fp32. Channel i is
    paired with channel i + h/2, and the sine carries the sign with which the partner enters."""
    frequency = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, device=positions.device).float() / c.head_dim)
    if c.rope_scaling:  # Llama 3: slow rotations are slowed down by `factor`, fast ones kept, those between blended
        s = c.rope_scaling
        turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)  # within the original context
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / s["factor"])
    angle = positions[..., None].float() * frequency  # [..., h/2]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x, cos, sin, dim=-1):
    """Rotates each channel pair by its position's angle: (left, right) -> (left cos - right sin, right cos + left sin)."""
    return x * cos + x.roll(x.shape[dim] // 2, dim) * sin


class Linear(nn.Linear):
    """y = W x (+ b), and where it has an adapter + (32/r) B A x: LoRA (Hu et al., 2021). W [out, in] is frozen then, A [r, in]
    and B [out, r] are trained. B begins as 0, so the policy begins as it was. 32/r: the best learning rate hardly depends on
    r that way, and is about ten times that of training W."""
    ALPHA = 32

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.register_parameter("A", None)
        self.register_parameter("B", None)

    def forward(self, x):
        """[..., in] -> [..., out]"""
        y = super().forward(x)
        return y if self.A is None else y + (self.ALPHA / len(self.A)) * (x @ self.A.T @ self.B.T)

    def columns(self, x):
        """The same for inputs that stand as columns, as in decoding: [in, R] -> [out, R]."""
        y = self.weight @ x if self.bias is None else self.weight @ x + self.bias[:, None]
        return y if self.A is None else y + (self.ALPHA / len(self.A)) * (self.B @ (self.A @ x))


def add_lora(model, rank, generator):
    """Freezes the model and gives the matrices of its layers adapters to train. q, k and v share an A, as do gate and up."""
    model.requires_grad_(False)
    for linear in (module for module in model.layers.modules() if isinstance(module, Linear)):
        A = torch.randn(rank, linear.in_features, generator=generator) / math.sqrt(linear.in_features)
        linear.A = nn.Parameter(A.to(linear.weight))
        linear.B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))


@torch.no_grad()
def merge_lora(model):
    """Adds the adapters to the matrices they adapt, and removes them. The sums are float32: most of what was learnt is less
    than bfloat16 can tell beside the weight."""
    for linear in (module for module in model.layers.modules() if isinstance(module, Linear) and module.A is not None):
        W, A, B = linear.weight.float(), linear.A.float(), linear.B.float()
        linear.weight = nn.Parameter(W + (linear.ALPHA / len(A)) * (B @ A))
        linear.A = linear.B = None


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.heads = [c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads]  # of q, k and v
        self.head_dim = c.head_dim
        self.qkv_proj = Linear(c.hidden_size, sum(self.heads) * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, kv=None):
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, T, D] -> [B, H+2K, T, h]
        q, k, v = qkv.split(self.heads, dim=1)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        if kv is not None:  # prefill: keep them for the decoding steps to come
            kv[0, :, :, :x.shape[1]], kv[1, :, :, :x.shape[1]] = k, v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # [B, H, T, h] -> [B, T, H*h] -> [B, T, D]


class SwiGLU(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_up_proj = Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # [B, T, D] -> 2 x [B, T, I]
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = SwiGLU(c)

    def forward(self, x, cos, sin, kv=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, kv)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.num_tokens = config.vocab_size  # load() lowers it to the tokeniser's size
        self.stop_ids = ()
        self.compiled = False  # whether decode_step and the log-prob kernel go through torch.compile: train.py --compile
        self.checkpoint_layers = False  # whether a layer's activations are computed again in the backward pass, not kept

    @property
    def head(self):
        """The output matrix [V, D] without vocabulary padding: ids beyond the tokeniser's last are neither sampled nor
        normalised over, in the sampler as in the trainer."""
        weight = self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return weight[:self.num_tokens]

    def forward(self, ids, kv_layers=None):
        """Final hidden states [B, T, D] of ids [B, T]; multiply by `head.T` for logits. With kv_layers, a tensor
        [2, B, K, >= T, h] for each layer, the tokens' keys and values are written there."""
        x = self.embed_tokens(ids)
        cos, sin = rotary(torch.arange(ids.shape[1], device=ids.device), self.config, x.dtype)  # [T, h] each
        for layer, kv in zip(self.layers, kv_layers or [None] * len(self.layers)):
            recompute = self.checkpoint_layers and torch.is_grad_enabled()
            x = checkpoint(layer, x, cos, sin, use_reentrant=False) if recompute else layer(x, cos, sin, kv)
        return self.norm(x)


# ---- when memory does not suffice ------------------------------------------------------------------------------------

OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|ALLOC_FAILED")  # of CUDA and MPS, of the CPU, of cuBLAS
WHAT_HELPS = ("--dtype bfloat16, a shorter --max-new-tokens, in training --lora-rank, --optimizer-dtype bfloat16 and "
              "--checkpoint-layers, or a smaller model need less (recipes/plan.py says how much)")


class OutOfMemory(Exception):
    """Memory does not suffice for the smallest batch there is."""


def fitting(args, flag, least, work):
    """work(), which reads args.<flag>, a batch size; where memory does not suffice, again with half of it, which stays so.
    Anything random that `work` draws, it must draw anew. OutOfMemory where `least` does not fit either."""
    while True:
        try:
            return work()
        except RuntimeError as error:
            if not OUT_OF_MEMORY.search(str(error)):
                raise
        # Only here, behind the `except`, are the tensors of the attempt let go of.
        name, size = "--" + flag.replace("_", "-"), getattr(args, flag)
        if size <= least:
            raise OutOfMemory(f"out of memory even with {name} {size}: {WHAT_HELPS}")
        setattr(args, flag, max(least, size // 2))
        tqdm.write(f"out of memory: going on with {name} {getattr(args, flag)}", file=sys.stderr)


# ---- log pi(target) without the [tokens, vocabulary] array -------------------------------------------------------

def naive_logprobs(hidden, weight, targets, temperature=1.0):
    """log softmax(hidden @ weight.T / temperature)[target]: [N, D], [V, D], [N] -> [N]. The reference: three lines
    that hold the [N, V] array several times over, usually the largest thing in an RL trainer's memory."""
    logits = (hidden @ weight.T).float() / temperature  # [N, D] @ [D, V] -> [N, V]; in fp32: bf16 is off by up to 0.06
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def _fold_chunk(z, local, inverse_temperature, peak, total, weighted, picked):
    """Online log-sum-exp: folds the logits z [N, C] of one chunk of the vocabulary into per-token statistics, each [N]:
    peak = max z, total = sum e^(z-peak), weighted = sum e^(z-peak) z (for the entropy), picked = the target's z."""
    z = z.float() * inverse_temperature
    new_peak = torch.maximum(peak, z.amax(-1))
    rescale = (peak - new_peak).exp()
    e = (z - new_peak[:, None]).exp()
    here = (local >= 0) & (local < z.shape[1])
    target_z = z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
    return (new_peak, total * rescale + e.sum(-1), weighted * rescale + (e * z).sum(-1),
            torch.where(here, target_z, picked))


def _chunk_grad_(z, local, inverse_temperature, lse, grad):
    """Logits z [N, C] of one chunk -> d loss / d logits, in place. From log pi = z_target - lse, with z = logits / T:
    d loss / d logits = grad * (onehot - softmax) / T."""
    onehot = local[:, None] == torch.arange(z.shape[1], device=z.device)
    softmax = (z.float() * inverse_temperature - lse[:, None]).exp()
    z.copy_((onehot.float() - softmax) * (grad * inverse_temperature)[:, None])


@functools.cache
def compiled(function):
    """torch.compile(function); where that fails, for want of a C++ compiler say, `function` itself and one warning."""
    def run(*inputs):
        nonlocal chosen
        try:
            return chosen(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            warnings.warn(f"{function.__name__} runs uncompiled, correct but slower: {str(error).splitlines()[0]}")
            chosen = function
            return function(*inputs)
    chosen = torch.compile(function, dynamic=True)
    return run


class _FusedLogProb(torch.autograd.Function):
    """Nothing of size [N, V] ever exists: the forward keeps one number per token and statistic, the backward computes
    each chunk's logits again (four GEMMs where the naive version needs three). The GEMMs write to one buffer [N, C];
    torch.compile, when asked for, fuses what is done to it into one pass over memory."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk, compile):
        fold = compiled(_fold_chunk) if compile else _fold_chunk
        N = hidden.shape[0]
        stats = (hidden.new_full((N,), -torch.inf, dtype=torch.float32),
                 *(hidden.new_zeros(N, dtype=torch.float32) for _ in range(3)))
        buffer = hidden.new_empty(N, chunk)
        for start in range(0, weight.shape[0], chunk):
            w = weight[start:start + chunk]
            z = torch.mm(hidden, w.T, out=buffer[:, :len(w)])  # [N, D] @ [D, C] -> [N, C]
            stats = fold(z, targets - start, 1 / temperature, *stats)
        peak, total, weighted, picked = stats
        lse = peak + total.log()
        entropy = lse - weighted / total  # H = -sum p log p = lse - E[z]
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.settings = temperature, chunk, compile
        ctx.mark_non_differentiable(entropy)
        return picked - lse, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, lse = ctx.saved_tensors
        temperature, chunk, compile = ctx.settings
        chunk_grad_ = compiled(_chunk_grad_) if compile else _chunk_grad_
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32)  # summed over chunks, so kept in fp32
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # not with LoRA
        buffer = hidden.new_empty(hidden.shape[0], chunk)
        for start in range(0, weight.shape[0], chunk):
            w = weight[start:start + chunk]
            dz = torch.mm(hidden, w.T, out=buffer[:, :len(w)])
            chunk_grad_(dz, targets - start, 1 / temperature, lse, grad)  # [N, C]
            d_hidden += dz @ w  # [N, C] @ [C, D] -> [N, D]
            if d_weight is not None:
                torch.mm(dz.T, hidden, out=d_weight[start:start + chunk])  # [C, N] @ [N, D] -> [C, D]
        return d_hidden.to(hidden.dtype), d_weight, None, None, None, None


def fused_logprobs(hidden, weight, targets, temperature=1.0, chunk=1024, compile=False):
    """(log pi(target), entropy), each [N] in fp32, of hidden [N, D], weight [V, D], targets [N].

    Equals `naive_logprobs` in value and gradient; but for the gradient itself its memory does not grow with V. The
    entropy is the tempered distribution's and carries no gradient (the paper's entropy coefficient is 0)."""
    return _FusedLogProb.apply(hidden, weight, targets, temperature, min(chunk, len(weight)), compile)


# ---- checkpoints: ordinary Hugging Face directories ---------------------------------------------------------------

SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(path):
    """Yields (name, tensor) of a safetensors file: 8 bytes n, n bytes of JSON {name: dtype, shape, data_offsets}, raw
    data. The file is memory-mapped and copied tensor by tensor.
    ValueError if the file is damaged or cut short, or holds another dtype; OSError if it cannot be read."""
    with open(path, "rb") as file:  # OSError for a directory, of which torch makes a RuntimeError
        size = file.seek(0, os.SEEK_END)
    raw = torch.from_file(str(path), dtype=torch.uint8, size=size) if size else torch.zeros(0, dtype=torch.uint8)
    start = 8 + int.from_bytes(raw[:8].numpy().tobytes(), "little")
    damaged = f"{path}: not a safetensors file, or a damaged one ({size:,} bytes)"
    try:
        entries = parse(raw[8:min(start, 10 ** 8)].numpy().tobytes())  # the library's own limit of a header
        entries.pop("__metadata__", None)
    except (ValueError, AttributeError, TypeError):
        raise ValueError(damaged) from None
    spans = []
    for name, entry in entries.items():
        try:
            dtype, shape, (first, last) = SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            fits = all(type(n) is int and 0 <= n <= size for n in (*shape, first, last, start + last)) and (
                last - first == math.prod(shape) * dtype.itemsize)
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f"{path}: {name!r:.100} is damaged or cut short, or not of dtype {', '.join(SAFETENSORS_DTYPES)}")
        spans.append((first, last))
        yield name, raw[start + first:start + last].clone().view(dtype).view(shape)  # the copy is aligned, whatever `start`
    firsts, lasts = ([span[i] for span in sorted(spans)] for i in (0, 1))
    if [0, *lasts] != [*firsts, size - start]:  # some bytes belong to two tensors or to none
        raise ValueError(damaged)


def write_whole(path, write):
    """write(file), so that `path` then holds all of it, or what it held before, whatever happens: a crash, a full disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before its name is: else a power cut may leave the name of an empty file
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def lock(handle, path):
    """Keeps other processes from locking the open file or directory until it is closed or this process ends, however it ends.
    ValueError if another has it."""
    import fcntl  # not on Windows, where nothing but what is locked works
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{path}: another process is writing there") from None
    except OSError as error:  # some network file systems
        warnings.warn(f"{path} cannot be locked ({error.strerror}): see to it that no other process writes there")


def write_safetensors(path, tensors):
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0  # transformers refuses a file without this note
    for name, t in tensors.items():
        end = offset + t.numel() * t.element_size()
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data starts 8-byte aligned
    def write(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            file.write(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    write_whole(Path(path), write)


def find_file(source, name, required=True):
    """Path of one file of a checkpoint, from a local directory or else from the Hugging Face hub (and cached)."""
    from transformers.utils import cached_file  # slow to import, so only where a checkpoint is read
    try:
        path = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
    except OSError:
        path = None
    if path is None and required:
        raise ValueError(f"{source}: no {name} in a directory of that name, nor on the Hugging Face hub as far as it "
                         "can be reached: check the path or the name")
    return path


def hf_weights(model):
    """{Hugging Face's name: view into our weights}: loading copies into the views, saving writes them. Only here do the
    names differ: q, k, v and gate, up, which all read the same input, are one matrix each, hence one GEMM."""
    head_dim, weights = model.config.head_dim, {}
    parts = {"qkv_proj": (("q_proj", "k_proj", "v_proj"), [n * head_dim for n in model.layers[0].self_attn.heads]),
             "gate_up_proj": (("gate_proj", "up_proj"), [model.config.intermediate_size] * 2)}
    for name, weight in model.state_dict().items():
        name = name if name.startswith("lm_head") else "model." + name
        fused = next((fused for fused in parts if fused in name), None)
        names, sizes = parts.get(fused, ([fused], [len(weight)]))
        weights |= {name.replace(fused, part) if fused else name: w for part, w in zip(names, weight.split(sizes))}
    return weights


INTERNLM2 = {"tok_embeddings": "embed_tokens", "attention.wo": "self_attn.o_proj", "attention_norm": "input_layernorm",
             "ffn_norm": "post_attention_layernorm", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
             "feed_forward.w3": "mlp.up_proj", "output.weight": "lm_head.weight"}


def as_llama(name, tensor, c):
    """[(name, tensor)]: one of InternLM2's tensors under Llama's names. It is the same network; q, k and v lie in one
    matrix, in which the query heads of each key head are followed by that key head and its value head."""
    if "attention.wqkv" in name and tensor.shape[:1] == ((c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim,):
        heads = tensor.unflatten(0, (c.num_key_value_heads, -1, c.head_dim))  # [K, H/K + 2, h, D]
        parts = heads[:, :-2].flatten(0, 2), heads[:, -2].flatten(0, 1), heads[:, -1].flatten(0, 1)
        return [(name.replace("attention.wqkv", f"self_attn.{q}_proj"), part) for q, part in zip("qkv", parts)]
    for old, new in INTERNLM2.items():
        name = name.replace(old, new)
    return [(name, tensor)]


def load(source, device="cpu", dtype=torch.float32):
    """(model, tokenizer) from a Hugging Face directory or hub name. Weights are held once, plus one tensor.
    ValueError: a file is missing or broken, or the architecture is not implemented."""
    from transformers import AutoTokenizer
    config_file = Path(find_file(source, "config.json"))
    hf = read_object(config_file)
    try:
        config = Config.from_hf(hf)
        with torch.device("meta"):  # shapes only: no time is spent on random weights
            model = Transformer(config)
        model = model.to(dtype).to_empty(device=device)
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # RuntimeError: no memory
        what = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{config_file}: {what:.300}") from None
    index = find_file(source, "model.safetensors.index.json", required=False)
    shards = read_object(index).get("weight_map") if index else {"": "model.safetensors"}
    # A file's text is no path elsewhere, `../x` say.
    if not isinstance(shards, dict) or not all(re.fullmatch(r"[\w.-]+\.safetensors", str(shard)) for shard in shards.values()):
        raise ValueError(f"{index}: weight_map must name .safetensors files in the same directory")
    missing = hf_weights(model)
    for shard in sorted(set(shards.values())):
        stored = read_safetensors(find_file(source, shard))
        if hf["model_type"] == "internlm2":
            stored = (pair for name, tensor in stored for pair in as_llama(name, tensor, config))
        for name, tensor in stored:
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue  # some exporters write the tied matrix twice
            if name not in missing or missing[name].shape != tensor.shape:
                raise ValueError(f"{source}: weights and config.json disagree: {shard} has {name!r:.100} {list(tensor.shape)}"
                                 + (f", not {list(missing[name].shape)}" if name in missing else ", which is not wanted"))
            missing.pop(name).copy_(tensor)
    if missing:
        raise ValueError(f"{source}: weights and config.json disagree: no {', '.join(missing)}"[:300])
    try:
        more = {"add_bos_token": True} if hf["model_type"] == "internlm2" else {}  # which its own code, not run here, adds
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **more)
        tokenizer.init_kwargs.pop("auto_map", None)  # nor is it to be run by those who load what is saved
        tokenizer.decode(tokenizer("1\U000f0000").input_ids)  # faults that show in use, and with what no vocabulary holds
        model.num_tokens = min(1 + max(tokenizer.get_vocab().values()), config.vocab_size)
    except Exception as error:  # the libraries below raise whatever they like, down to plain Exception
        raise ValueError(f"{source}: no tokeniser can be read here: {' '.join(str(error).split())[:200]}") from None
    generation = find_file(source, "generation_config.json", required=False)
    stops = read_object(generation).get("eos_token_id") if generation else None
    stops = [stop for stop in [*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id] if stop is not None]
    if not all(type(stop) is int and 0 <= stop < model.num_tokens for stop in stops):
        raise ValueError(f"{generation or source}: stop tokens {stops!r:.100}, not from 0 to {model.num_tokens - 1}")
    model.stop_ids = tuple(sorted(set(stops)))
    if hf["model_type"] == "internlm2":  # saved as what it is
        hf = {key: value for key, value in hf.items() if key not in ("auto_map", "rope_scaling", "bias")}
        hf |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    model.hf_config = hf
    return model, tokenizer


def save(model, tokenizer, directory):
    """Writes config.json, model.safetensors and the tokeniser as transformers' `from_pretrained` reads them, beside a directory
    of that name, which it then replaces. Adapters are merged first, for good; the matrices they adapt are float32 from then
    on."""
    merge_lora(model)
    directory = Path(directory)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = str(model.layers[0].self_attn.o_proj.weight.dtype).removeprefix("torch.")
    (partial / "config.json").write_text(json.dumps(model.hf_config | {"dtype": dtype}, indent=2))
    (partial / "generation_config.json").write_text(json.dumps({"eos_token_id": list(model.stop_ids)}))
    write_safetensors(partial / "model.safetensors", hf_weights(model))
    tokenizer.save_pretrained(partial)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)
