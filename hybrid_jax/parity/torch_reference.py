"""The model family in plain PyTorch, written from its formulas: the mathematics others must match.

It lives in the package, and not beside its tests in `tests/parity`, because `hybrid-jax parity`
needs it at run time wherever transformers is known to compute something else: rotary positions on
part of the head, head counts that are not powers of two, and configs that transformers cannot
load. It is slow and obvious on purpose: the recurrence runs token by token, experts one by one.
"""

import dataclasses
import math
import pathlib
from typing import Any

from hybrid_jax.parity import published

Tensor = published.Tensor

# The released code builds the norm inside lightning attention with its class default, 1e-6,
# whatever `rms_norm_eps` says.
LIGHTNING_NORM_EPS = 1e-6


def slopes(num_heads: int) -> list[float]:
    """ALiBi slopes, one a head; the original rule also for counts that are not powers of two."""
    lower = 2 ** int(math.log2(num_heads))
    if lower == num_heads:
        start = 2.0 ** (-8.0 / num_heads)
        return [start ** (head + 1) for head in range(num_heads)]
    return slopes(lower) + slopes(2 * lower)[0::2][: num_heads - lower]


def layer_factor(layer: int, num_layers: int) -> float:
    """What multiplies every slope of an absolute layer; softmax layers are counted too."""
    # With one layer the released formula divides by zero; serving code takes the first layer's.
    return 1.0 - layer / max(num_layers - 1, 1) + 1e-5


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * scale over the last dim."""
    return x * (x * x).mean(-1, keepdim=True).add(eps).rsqrt() * scale


def silu(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """A bias-free layer whose stored weight is (out, in)."""
    return x @ weight.T


def lightning_recurrence(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, slope_H: Tensor, segment_ids_BT: Tensor
) -> Tensor:
    """o_t = q_t S_t with S_t = exp(-slope) S_{t-1} + k_t^T v_t, one state a segment.

    Padding (segment 0) leaves the state alone and yields zeros; a new id starts from zero.
    """
    import torch

    batch, _, heads, key_dim = q_BTHK.shape
    decay_1H11 = torch.exp(-slope_H)[None, :, None, None]
    state_BHKV = q_BTHK.new_zeros(batch, heads, key_dim, v_BTHV.shape[-1])
    last_B = segment_ids_BT.new_zeros(batch)
    outs = []
    # unbind, not x[:, t]: the gradient of an index is a tensor as large as x.
    steps = (x.unbind(1) for x in (q_BTHK, k_BTHK, v_BTHV, segment_ids_BT))
    for q_BHK, k_BHK, v_BHV, id_B in zip(*steps, strict=True):
        real_B111 = (id_B != 0)[:, None, None, None]
        same_B111 = (id_B == last_B)[:, None, None, None]
        write_BHKV = k_BHK[..., None] * v_BHV[..., None, :]
        new_BHKV = decay_1H11 * state_BHKV * same_B111 + write_BHKV
        state_BHKV = torch.where(real_B111, new_BHKV, state_BHKV)
        out_BHV = torch.einsum("bhk,bhkv->bhv", q_BHK, state_BHKV)
        outs.append(out_BHV * real_B111[..., 0])
        last_B = torch.where(id_B != 0, id_B, last_B)
    return torch.stack(outs, 1)


def rotate(x_BTHK: Tensor, positions_BT: Tensor, rotary_dim: int, theta: float) -> Tensor:
    """Rotate pairs (i, i + rotary_dim/2) of the first `rotary_dim` dims; the others pass."""
    import torch

    half = rotary_dim // 2
    exponent = torch.arange(half, dtype=x_BTHK.dtype) * 2 / rotary_dim
    angle_BT1R = (positions_BT[..., None].to(x_BTHK.dtype) * theta**-exponent)[:, :, None]
    cos, sin = angle_BT1R.cos(), angle_BT1R.sin()
    a, b, rest = x_BTHK.split([half, half, x_BTHK.shape[-1] - rotary_dim], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def causal_attention(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, segment_ids_BT: Tensor
) -> Tensor:
    """Softmax attention to earlier tokens of the same segment; kv head g serves H/G query heads."""
    import torch

    time, group = q_BTHK.shape[1], q_BTHK.shape[2] // k_BSGK.shape[2]
    k_BSHK, v_BSHK = (x.repeat_interleave(group, 2) for x in (k_BSGK, v_BSGK))
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) / math.sqrt(q_BTHK.shape[-1])
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    real_BT1 = (segment_ids_BT != 0)[:, :, None]
    causal_TS = torch.ones(time, time, dtype=torch.bool).tril()
    # Padding queries look at themselves alone so that the softmax is defined; then they give zero.
    allowed_BTS = torch.where(real_BT1, same_BTS & causal_TS, torch.eye(time, dtype=torch.bool))
    weights_BHTS = scores_BHTS.masked_fill(~allowed_BTS[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhts,bshk->bthk", weights_BHTS, v_BSHK) * real_BT1[..., None]


def default_positions(segment_ids_BT: Tensor) -> Tensor:
    """Count the real tokens of each segment from 0; what padding gets does not matter."""
    import torch

    next_B = last_B = torch.zeros_like(segment_ids_BT[:, 0])
    positions = []
    for id_B in segment_ids_BT.unbind(1):
        real_B = id_B != 0
        position_B = torch.where(id_B == last_B, next_B, 0)
        positions.append(position_B)
        next_B = torch.where(real_B, position_B + 1, next_B)
        last_B = torch.where(real_B, id_B, last_B)
    return torch.stack(positions, 1)


@dataclasses.dataclass(frozen=True)
class Reference:
    """A model: its spec and its weights by published name, all leaves that need gradients."""

    spec: published.Spec
    weights: dict[str, Tensor]
    preferences: list[Tensor] = dataclasses.field(default_factory=list, repr=False)
    """What the routers of the last call preferred, one [B * T, experts] a layer."""

    def __call__(
        self, tokens_BT: Tensor, segment_ids: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Logits [B, T, vocab]."""
        return self.trace(tokens_BT, segment_ids, positions)[0]

    def trace(
        self, tokens_BT: Tensor, segment_ids: Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits, and x_BTD after every layer, both of its residual additions made."""
        import torch

        if segment_ids is None:
            segment_ids = torch.ones_like(tokens_BT)
        if positions is None:
            positions = default_positions(segment_ids)
        table_WD = self.weights["model.embed_tokens.weight"]
        x_BTD = table_WD[tokens_BT]
        layers = []
        self.preferences.clear()
        for layer in range(self.spec.num_layers):
            x_BTD = self._layer(layer, x_BTD, segment_ids, positions)
            layers.append(x_BTD)
        x_BTD = rms_norm(x_BTD, self.weights["model.norm.weight"], self.spec.norm_eps)
        head_WD = table_WD if self.spec.tied else self.weights["lm_head.weight"]
        return linear(x_BTD, head_WD), layers

    def _layer(
        self, layer: int, x_BTD: Tensor, segment_ids_BT: Tensor, positions_BT: Tensor
    ) -> Tensor:
        spec, mixer = self.spec, self.spec.mixers[layer]
        prefix = f"model.layers.{layer}"

        def normed(name: str, x_BTD: Tensor) -> Tensor:
            return rms_norm(x_BTD, self.weights[f"{prefix}.{name}.weight"], spec.norm_eps)

        alpha, beta = spec.alpha_beta[mixer]
        h_BTD = normed("input_layernorm", x_BTD)
        if mixer == published.LIGHTNING:
            mixed_BTD = self._lightning(layer, h_BTD, segment_ids_BT)
        else:
            mixed_BTD = self._softmax(layer, h_BTD, segment_ids_BT, positions_BT)
        # Post-norm carries the normalised tensor on, pre-norm the one before the norm.
        x_BTD = alpha * (h_BTD if spec.postnorm else x_BTD) + beta * mixed_BTD

        alpha, beta = spec.alpha_beta["ffn"]
        h_BTD = normed("post_attention_layernorm", x_BTD)
        return alpha * (h_BTD if spec.postnorm else x_BTD) + beta * self._ffn(layer, h_BTD)

    def _lightning(self, layer: int, h_BTD: Tensor, segment_ids_BT: Tensor) -> Tensor:
        import torch

        spec, prefix = self.spec, f"model.layers.{layer}.self_attn"
        fused = silu(linear(h_BTD, self.weights[f"{prefix}.qkv_proj.weight"]))
        # The output of qkv_proj is head-major: (head, [q | k | v], head_dim).
        q, k, v = fused.unflatten(-1, (spec.heads, 3, spec.head_dim)).unbind(-2)
        factor = layer_factor(layer, spec.num_layers)
        slope_H = torch.tensor([slope * factor for slope in slopes(spec.heads)], dtype=q.dtype)
        out = lightning_recurrence(q, k, v, slope_H, segment_ids_BT).flatten(-2)
        out = rms_norm(out, self.weights[f"{prefix}.norm.weight"], LIGHTNING_NORM_EPS)
        gate = linear(h_BTD, self.weights[f"{prefix}.output_gate.weight"]).sigmoid()
        return linear(gate * out, self.weights[f"{prefix}.out_proj.weight"])

    def _softmax(
        self, layer: int, h_BTD: Tensor, segment_ids_BT: Tensor, positions_BT: Tensor
    ) -> Tensor:
        spec, prefix = self.spec, f"model.layers.{layer}.self_attn"
        q, k, v = (linear(h_BTD, self.weights[f"{prefix}.{n}_proj.weight"]) for n in "qkv")
        if spec.qk_norm:  # over the whole projection, before it is split into heads
            q = rms_norm(q, self.weights[f"{prefix}.q_norm.weight"], spec.norm_eps)
            k = rms_norm(k, self.weights[f"{prefix}.k_norm.weight"], spec.norm_eps)
        q, k, v = (x.unflatten(-1, (-1, spec.head_dim)) for x in (q, k, v))
        q, k = (rotate(x, positions_BT, spec.rotary_dim, spec.rope_theta) for x in (q, k))
        out = causal_attention(q, k, v, segment_ids_BT).flatten(-2)
        return linear(out, self.weights[f"{prefix}.o_proj.weight"])

    def _ffn(self, layer: int, h_BTD: Tensor) -> Tensor:
        prefix = f"model.layers.{layer}"
        x_RD = h_BTD.flatten(0, -2)
        out_RD = self._experts(f"{prefix}.block_sparse_moe", x_RD)
        if f"{prefix}.coefficient.weight" in self.weights:
            gate, up, down = (
                self.weights[f"{prefix}.shared_mlp.{name}_proj.weight"]
                for name in ("gate", "up", "down")
            )
            shared_RD = linear(silu(linear(x_RD, gate)) * linear(x_RD, up), down)
            share_R1 = linear(x_RD, self.weights[f"{prefix}.coefficient.weight"]).sigmoid()
            out_RD = out_RD * (1 - share_R1) + shared_RD * share_R1
        return out_RD.view_as(h_BTD)

    def _experts(self, prefix: str, x_RD: Tensor) -> Tensor:
        import torch

        spec = self.spec
        logits_RE = linear(x_RD, self.weights[f"{prefix}.gate.weight"])
        scores_RE = logits_RE.sigmoid() if spec.sigmoid_router else logits_RE.softmax(-1)
        # The correction bias chooses experts and never weighs them.
        bias_E = self.weights.get(f"{prefix}.e_score_correction_bias")
        preference_RE = scores_RE if bias_E is None else scores_RE + bias_E
        self.preferences.append(preference_RE.detach())
        chosen_RA = preference_RE.topk(spec.experts_per_token, -1).indices
        weight_RA = scores_RE.gather(-1, chosen_RA)
        weight_RA = weight_RA / weight_RA.sum(-1, keepdim=True)
        out_RD = torch.zeros_like(x_RD)
        for expert in range(spec.experts):
            row, slot = (chosen_RA == expert).nonzero(as_tuple=True)
            if not len(row):
                continue
            w1, w2, w3 = (self.weights[f"{prefix}.experts.{expert}.w{i}.weight"] for i in (1, 2, 3))
            hidden = silu(linear(x_RD[row], w1)) * linear(x_RD[row], w3)
            out_RD = out_RD.index_add(0, row, linear(hidden, w2) * weight_RA[row, slot, None])
        return out_RD


def next_token_loss(
    logits_BTW: Tensor, tokens_BT: Tensor, segment_ids_BT: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of every token given those before it in its segment."""
    import torch

    nll_BT = -logits_BTW[:, :-1].log_softmax(-1).gather(-1, tokens_BT[:, 1:, None])[..., 0]
    if segment_ids_BT is None:
        return nll_BT.mean()
    left, right = segment_ids_BT[:, :-1], segment_ids_BT[:, 1:]
    keep_BT = ((left == right) & (right != 0)).to(torch.float32)
    return (nll_BT * keep_BT).sum() / keep_BT.sum()


def gradients(
    model: Reference, tokens_BT: Tensor, segment_ids: Tensor | None = None
) -> dict[str, Tensor]:
    """d `next_token_loss` / d weight, by published name; zeros where a weight had no part."""
    import torch

    loss = next_token_loss(model(tokens_BT, segment_ids), tokens_BT, segment_ids)
    values = torch.autograd.grad(loss, list(model.weights.values()), allow_unused=True)
    return {
        name: torch.zeros_like(weight) if value is None else value
        for (name, weight), value in zip(model.weights.items(), values, strict=True)
    }


def greedy(model: Reference, tokens_BT: Tensor, max_new_tokens: int) -> Tensor:
    """The most likely continuation [B, max_new_tokens], each step from the whole text so far."""
    import torch

    text = tokens_BT
    with torch.no_grad():
        for _ in range(max_new_tokens):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
    return text[:, tokens_BT.shape[1] :]


def load(path: str | pathlib.Path, dtype: str = "float32") -> Reference:
    """Read a published directory (three dialects of `config.json`, safetensors).

    `dtype` is "float32", or "float64" for an oracle whose own rounding does not count.
    """
    directory = pathlib.Path(path)
    spec = published.read_spec(directory)
    weights: dict[str, Any] = published.read_weights(directory, spec, dtype)
    return Reference(spec, {name: weight.requires_grad_() for name, weight in weights.items()})
