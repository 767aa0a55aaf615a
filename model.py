"""The policy: one decoder-only transformer, LoRA adapters, and the log-probabilities RL needs.

One class covers Qwen3 (QK-norm), Qwen2 (qkv bias), Llama and Mistral (neither): the tiny models of this
repository and Qwen3-8B come in through the same door. One `forward` trains, prefills and decodes; `past` is
all that differs.

Prompts are padded on the RIGHT: a causal model never looks right, so padding needs no mask, and a token's
position is simply its index.

Shapes: B rows, T tokens, D hidden, H query heads, K key/value heads, h head size, I MLP, V vocabulary.
"""
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


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
    rope_scaling: dict | None  # only Llama 3's: `dynamic` acts beyond the context, which is never reached
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qk_norm: bool
    qkv_bias: bool

    @classmethod
    def from_hf(cls, hf):
        """From a config.json dictionary. ValueError names whatever this file does not implement."""
        kind = hf.get("model_type")
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # transformers 5 | 4
        scaling = rope.get("rope_type", rope.get("type", "default"))
        wrong = [f"{name} {value!r}" for name, value, fine in (
            ("model_type", kind, ("qwen3", "qwen2", "llama", "mistral")),
            ("rope scaling", scaling, ("default", "llama3", "dynamic")),  # dynamic: beyond the context only
            ("hidden_act", hf.get("hidden_act", "silu"), ("silu",)),
            ("attention_bias", hf.get("attention_bias"), (None, False)),
            ("mlp_bias", hf.get("mlp_bias"), (None, False)),
            ("num_hidden_layers", hf.get("num_hidden_layers", 1), range(1, 1_001)),  # of 1e8 it never ends
            ("quantization_config", hf.get("quantization_config"), (None,))) if value not in fine]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} is not implemented: qwen3, qwen2, llama and mistral are "
                             "(recipes/internlm2.py converts internlm2)")
        heads, context = hf["num_attention_heads"], hf["max_position_embeddings"]
        # A sliding window hides nothing from a sequence that is no longer than it.
        window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", kind == "mistral") else None
        return cls(
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


def rotary(positions, c: Config, dtype):
    """cos and sin of each position's rotation angles, both [..., h] for positions [...]. Angles in fp32.
    Channel i is paired with channel i + h/2; the sine of the left half is negated, as in `rotate`."""
    channels = torch.arange(0, c.head_dim, 2, device=positions.device).float()
    frequency = c.rope_theta ** (-channels / c.head_dim)  # [h/2]
    if s := c.rope_scaling:  # Llama 3: slow rotations are slowed down, fast ones kept, those between blended
        turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in the original context
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / s["factor"])
    angle = positions[..., None].float() * frequency  # [..., h/2]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x, cos, sin):
    """(left, right) of each channel pair -> (left cos - right sin, right cos + left sin)."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def project(x, weight):
    """x @ weight.T: [..., in] -> [..., out]. For few rows, as in decoding, a CPU's BLAS uses one core: it
    splits the work by rows. (weight @ x.T).T is split by output feature."""
    rows = x.flatten(0, -2)  # [..., in] -> [N, in]
    if x.device.type == "cpu" and len(rows) <= 64:
        return (weight @ rows.T).T.unflatten(0, x.shape[:-1])
    return F.linear(x, weight)


def attend(q, k, v, mask=None):
    """Attention [B, H, T, h] of queries q [B, H, T, h] over keys and values [B, K, S, h]. Query heads that
    share a key head are folded into the query axis: mask [B, 1, H/K*T, S], 0 or -inf, says what each may see
    (its third dimension may be 1). None: itself and all before it, S = T."""
    if mask is None and q.device.type != "mps" and not (q.is_cuda and q.dtype == torch.float32):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if mask is None:  # CUDA has no kernel for this in float32, and MPS's is reported to see what comes later
        mask = q.new_full((q.shape[2], q.shape[2]), -torch.inf).triu(1).repeat(q.shape[1] // k.shape[1], 1)
    grouped = q.reshape(*k.shape[:2], -1, q.shape[-1])  # [B, H, T, h] -> [B, K, H/K*T, h]
    if q.device.type == "cpu" and q.dtype == torch.float32 and grouped.shape[2] <= 16:  # slow in SDPA
        grouped, k, v, mask = (x.flatten(0, 1) for x in (grouped, k, v, mask.expand(-1, k.shape[1], -1, -1)))
        scores = torch.baddbmm(mask, grouped, k.mT, alpha=q.shape[-1] ** -0.5)  # [B*K, H/K*T, S]
        return (scores.softmax(-1) @ v).reshape(q.shape)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)


class Linear(nn.Linear):
    """y = W x (+ b), and where it has an adapter + (32/r) B A x: LoRA (Hu et al., 2021). W [out, in] is
    frozen then, A [r, in] and B [out, r] are trained. B begins as 0, so the policy begins as it was. 32/r:
    the best learning rate hardly depends on r that way, and is about ten times that of training W."""
    ALPHA = 32

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.register_parameter("A", None)
        self.register_parameter("B", None)

    def forward(self, x):
        """[..., in] -> [..., out]"""
        y = project(x, self.weight)
        y = y if self.bias is None else y + self.bias
        return y if self.A is None else y + (self.ALPHA / len(self.A)) * (x @ self.A.T @ self.B.T)


def add_lora(model, rank, generator):
    """Freezes the model and gives the matrices of its layers adapters to train. q, k and v share an A, as do
    gate and up."""
    model.requires_grad_(False)
    for linear in (module for module in model.layers.modules() if isinstance(module, Linear)):
        A = torch.randn(rank, linear.in_features, generator=generator) / math.sqrt(linear.in_features)
        linear.A = nn.Parameter(A.to(linear.weight))
        linear.B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))


@torch.no_grad()
def merge_lora(model):
    """Adds the adapters to the matrices they adapt, and removes them. A sum is taken in float32 and rounded
    once, to the dtype of the base."""
    for linear in (module for module in model.layers.modules() if isinstance(module, Linear)):
        if linear.A is not None:
            W, A, B = linear.weight.float(), linear.A.float(), linear.B.float()
            linear.weight = nn.Parameter((W + (linear.ALPHA / len(A)) * (B @ A)).to(linear.weight.dtype))
            linear.A = linear.B = None


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.heads = [c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads]  # of q, k and v
        self.head_dim = c.head_dim
        self.qkv_proj = Linear(c.hidden_size, sum(self.heads) * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, past=None):
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, T, D] -> [B, T, H+2K, h]
        q, k, v = qkv.transpose(1, 2).split(self.heads, dim=1)  # [B, heads, T, h] each
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        y = attend(q, *past(k, v)) if past else attend(q, k, v)
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
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = SwiGLU(c)

    def forward(self, x, cos, sin, past=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.num_tokens = config.vocab_size  # load() lowers it to the tokeniser's size
        self.compiled = False  # whether decode_step and the log-prob kernel go through torch.compile
        self.checkpoint_layers = False  # whether the backward pass computes a layer's activations again

    @property
    def head(self):
        """The output matrix [V, D] without vocabulary padding: ids beyond the tokeniser's last are neither
        sampled nor normalised over, in the sampler as in the trainer."""
        weight = self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return weight[:self.num_tokens]

    def forward(self, ids, positions=None, past=None):
        """Final hidden states [B, T, D] of ids [B, T]; multiply by `head.T` for logits.

        positions [B, T]: where the tokens stand; 0, 1, 2, .. if not given. past(layer, k, v): takes a layer's
        new keys and values [B, K, T, h] and gives back all that the queries may see [B, K, S, h], and a mask
        for `attend` where it needs one. Without it the tokens see each other alone. The sampler's KV cache
        and a group's prompt in the update are such pasts; that of read_prompts stores them, unchanged."""
        x = self.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)[None] if positions is None else positions
        cos, sin = rotary(positions[:, None], self.config, x.dtype)  # [B, 1, T, h] each, for all heads
        for i, layer in enumerate(self.layers):
            inputs = x, cos, sin, functools.partial(past, i) if past else None
            if self.checkpoint_layers and torch.is_grad_enabled():
                x = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)  # no dropout
            else:
                x = layer(*inputs)
        return self.norm(x)

    def logits(self, hidden):
        """[R, D] -> [R, V] in float32. The padding of the vocabulary is computed too, and cut off: GPUs are
        slow at a matrix of odd width, and Qwen3's tokeniser has 151,669 tokens (not measured)."""
        weight = self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return project(hidden, weight)[..., :self.num_tokens].float()


def read_prompts(model, prompts):
    """Runs P prompts (lists of ids), each once. Returns the hidden state at each one's last token [P, D],
    every layer's keys and values {layer: (k, v)}, each [P, K, L, h] with L the longest, and lengths [P]."""
    padded = nn.utils.rnn.pad_sequence(list(map(torch.tensor, prompts)), batch_first=True, padding_value=-1)
    padded, cache = padded.to(model.head.device), {}  # [P, L]: they cross once, and a GPU waits for each copy
    lengths = (padded >= 0).sum(1)

    def keep(layer, k, v):
        cache.setdefault(layer, (k, v))  # checkpoint_layers comes by once more, in the backward pass
        return k, v

    hidden = model(padded.clamp(min=0), past=keep)  # [P, L, D]
    return hidden[torch.arange(len(prompts), device=padded.device), lengths - 1], cache, lengths


# ---- log pi(target) without the [tokens, vocabulary] array -------------------------------------------------

def naive_logprobs(hidden, weight, targets, temperature=1.0):
    """log softmax(hidden @ weight.T / temperature)[target]: [N, D], [V, D], [N] -> [N]. The reference, for
    tests: it holds the [N, V] array several times over, the largest thing in an RL trainer's memory."""
    logits = (hidden @ weight.T).float() / temperature  # [N, D] @ [D, V] -> [N, V]; bf16 is off by up to 0.06
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def _fold_chunk(z, local, inverse_temperature, peak, total, weighted, picked):
    """Online log-sum-exp: folds the logits z [N, C] of one chunk of the vocabulary into per-token statistics,
    each [N]: peak = max z, total = sum e^(z-peak), weighted = sum e^(z-peak) z (for the entropy), picked =
    the target's z."""
    z = z.float() * inverse_temperature
    new_peak = torch.maximum(peak, z.amax(-1))
    rescale = (peak - new_peak).exp()
    e = (z - new_peak[:, None]).exp()
    here = (local >= 0) & (local < z.shape[1])
    target_z = z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
    return (new_peak, total * rescale + e.sum(-1), weighted * rescale + (e * z).sum(-1),
            torch.where(here, target_z, picked))


def _chunk_grad_(z, local, inverse_temperature, lse, grad):
    """Logits z [N, C] of one chunk -> d loss / d logits, in place. From log pi = z_target - lse, with z =
    logits / T: d loss / d logits = grad * (onehot - softmax) / T."""
    onehot = local[:, None] == torch.arange(z.shape[1], device=z.device)
    softmax = (z.float() * inverse_temperature - lse[:, None]).exp()
    z.copy_((onehot.float() - softmax) * (grad * inverse_temperature)[:, None])


@functools.cache
def compiled(function):
    """torch.compile(function). Where that fails, for want of a C++ compiler say, torch warns and runs
    `function` itself."""
    torch._dynamo.config.suppress_errors = True
    return torch.compile(function, dynamic=True)


class _FusedLogProb(torch.autograd.Function):
    """Nothing of size [N, V] ever exists: the forward keeps one number per token and statistic, the backward
    computes each chunk's logits again (four GEMMs where the naive version needs three). The GEMMs write to
    one buffer [N, C]; torch.compile, when asked for, fuses what is done to it into one pass over memory."""

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


def fused_logprobs(hidden, weight, targets, temperature=1.0, chunk=None, compile=False):
    """(log pi(target), entropy), each [N] in fp32, of hidden [N, D], weight [V, D], targets [N].

    Equals `naive_logprobs` in value and gradient; but for the gradient itself its memory does not grow with
    V. The entropy is the tempered distribution's and carries no gradient (the paper's entropy coefficient is
    0)."""
    chunk = chunk or (1024 if hidden.device.type == "cpu" else 4096)  # a GPU wants few, large products
    return _FusedLogProb.apply(hidden, weight, targets, temperature, min(chunk, len(weight)), compile)
