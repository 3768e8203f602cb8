"""Who is right: transformers where its mathematics is that of the model, else our own PyTorch.

Both answer the same four questions (`Oracle`), in float32, by published tensor names.
"""

import pathlib
from importlib import util
from typing import Any, Protocol

import numpy as np

from hybrid_jax.parity import published, torch_reference

Tensor = published.Tensor

NEEDS_TORCH = (
    "hybrid-jax parity compares with PyTorch and needs torch, transformers and safetensors: "
    "pip install torch==2.13.0 transformers safetensors "
    "(for CPUs: --index-url https://download.pytorch.org/whl/cpu for torch)."
)


class Oracle(Protocol):
    """The other side of a comparison; every array is numpy float32, tokens are int [B, T]."""

    name: str

    def trace(self, tokens_BT: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits, and x_BTD after every layer."""

    def gradients(self, tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
        """d mean next-token cross-entropy / d weight, by published name."""

    def greedy(self, tokens_BT: np.ndarray, max_new_tokens: int) -> np.ndarray:
        """The most likely continuation [B, max_new_tokens]; no token ends it."""

    def router_gap(self, tokens_BT: np.ndarray) -> np.ndarray:
        """[B]: by how much, relative, the closest choice of an expert in a row was made."""


def require_torch() -> None:
    """`ValueError` with the way out if PyTorch or transformers is missing."""
    missing = [n for n in ("torch", "transformers", "safetensors") if not util.find_spec(n)]
    if missing:
        raise ValueError(f"{NEEDS_TORCH} Missing: {', '.join(missing)}.")


def choose(directory: pathlib.Path) -> tuple[Oracle, list[str]]:
    """The oracle for a directory, and in words what transformers would compute otherwise."""
    require_torch()
    spec = published.read_spec(directory)
    reasons = transformers_cannot(directory, spec)
    if reasons:
        return ReferenceOracle(directory), reasons
    oracle = TransformersOracle(directory, spec)
    return oracle, oracle.notes


def transformers_cannot(directory: pathlib.Path, spec: published.Spec) -> list[str]:
    """Why transformers cannot be the judge of this directory, or nothing."""
    reasons = []
    config = published.read_json(directory / "config.json")
    if spec.dialect != config["model_type"]:
        reasons.append(
            f"transformers cannot load model_type {config['model_type']!r}, "
            f"which config.json had before transformers knew the model"
        )
    elif config.get("quantization_config"):
        reasons.append("transformers does not compute this quantised checkpoint in float32 on CPUs")
    else:
        rotated = 2 * _rotary(config).inv_freq.numel()
        if rotated != spec.rotary_dim:
            reasons.append(
                f"transformers rotates {rotated} of {spec.head_dim} dims of a head; "
                f"config.json says {spec.rotary_dim}"
            )
        if spec.dialect == "minimax_m2" and not spec.qk_norm:
            reasons.append("transformers always norms q and k; config.json says it does not")
    return reasons


def _rotary(config: dict[str, Any]) -> Any:
    """The rotary module transformers would build for a config."""
    from transformers import MiniMaxConfig, MiniMaxM2Config
    from transformers.models.minimax import modeling_minimax
    from transformers.models.minimax_m2 import modeling_minimax_m2

    if config["model_type"] == "minimax":
        return modeling_minimax.MiniMaxRotaryEmbedding(MiniMaxConfig.from_dict(config))
    return modeling_minimax_m2.MiniMaxM2RotaryEmbedding(MiniMaxM2Config.from_dict(config))


class ReferenceOracle:
    """`torch_reference`: the formulas, slowly."""

    def __init__(self, directory: pathlib.Path):
        self.name = "PyTorch float32 reference (hybrid_jax.parity.torch_reference)"
        self.model = torch_reference.load(directory)

    def trace(self, tokens_BT: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        import torch

        with torch.no_grad():
            logits, layers = self.model.trace(_tensor(tokens_BT))
        return logits.numpy(), [layer.numpy() for layer in layers]

    def gradients(self, tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
        named = torch_reference.gradients(self.model, _tensor(tokens_BT))
        return {name: value.numpy() for name, value in named.items()}

    def greedy(self, tokens_BT: np.ndarray, max_new_tokens: int) -> np.ndarray:
        return torch_reference.greedy(self.model, _tensor(tokens_BT), max_new_tokens).numpy()

    def router_gap(self, tokens_BT: np.ndarray) -> np.ndarray:
        self.trace(tokens_BT)
        return _closest(self.model.preferences, self.model.spec, len(tokens_BT))


class TransformersOracle:
    """transformers, with its decay buffers recomputed from the original formula.

    The buffers are what it gets wrong for every `minimax`: other denominator in the layer factor,
    no rule for head counts that are not powers of two, and, in a bf16 checkpoint, bf16 values.
    """

    def __init__(self, directory: pathlib.Path, spec: published.Spec):
        import torch
        import transformers

        self.name = f"transformers {transformers.__version__}"
        self._spec = spec
        # Its bars and warnings would stand in the middle of the table.
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        model, info = loaded
        unwanted = {
            kind: [str(name) for name in info[kind] if not published.DERIVED.search(str(name))]
            for kind in ("missing_keys", "mismatched_keys")
        }
        if any(unwanted.values()):
            raise ValueError(f"transformers could not load all of {directory}: {unwanted}.")
        self.model = model.eval()
        self.notes = recompute_decay(self.model, spec)
        if self.notes:
            self.name += ", decay buffers recomputed by the original formula"

    def trace(self, tokens_BT: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        import torch

        layers: list[np.ndarray] = []
        hooks = [
            layer.register_forward_hook(lambda _module, _args, out: layers.append(out.numpy()))
            for layer in self.model.model.layers
        ]
        try:
            with torch.no_grad():
                logits = self.model(_tensor(tokens_BT), use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return logits.numpy(), layers

    def gradients(self, tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
        tokens = _tensor(tokens_BT)
        self.model.zero_grad()
        loss = torch_reference.next_token_loss(self.model(tokens, use_cache=False).logits, tokens)
        loss.backward()
        named: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            named |= published.by_released_name(name, _gradient(parameter))
        return {name: value.numpy() for name, value in named.items()}

    def greedy(self, tokens_BT: np.ndarray, max_new_tokens: int) -> np.ndarray:
        tokens = _tensor(tokens_BT)
        self.model.generation_config.eos_token_id = None
        text = self.model.generate(
            tokens,
            attention_mask=tokens.new_ones(tokens.shape),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return text[:, tokens.shape[1] :].numpy()

    def router_gap(self, tokens_BT: np.ndarray) -> np.ndarray:
        import torch

        with torch.no_grad():
            out = self.model(_tensor(tokens_BT), use_cache=False, output_router_logits=True)
        if not self._spec.sigmoid_router:
            preferences = [logits.softmax(-1) for logits in out.router_logits]
        else:
            biases = [layer.mlp.e_score_correction_bias for layer in self.model.model.layers]
            pairs = zip(out.router_logits, biases, strict=True)
            preferences = [logits.sigmoid() + bias for logits, bias in pairs]
        return _closest(preferences, self._spec, len(tokens_BT))


def recompute_decay(model: Any, spec: published.Spec) -> list[str]:
    """Overwrite the decay buffers of a transformers `minimax`; says what was wrong with them."""
    import torch

    worst, worst_layer = 0.0, 0
    for layer, module in enumerate(layer.self_attn for layer in model.model.layers):
        if spec.mixers[layer] != published.LIGHTNING:
            continue
        factor = torch_reference.layer_factor(layer, spec.num_layers)
        rates = [slope * factor for slope in torch_reference.slopes(spec.heads)]
        slope = torch.tensor(rates)[:, None, None]
        relative = ((module.slope_rate - slope).abs() / slope).max().item()
        if relative > worst:
            worst, worst_layer = relative, layer
        module.slope_rate.copy_(slope)
        names = ("query_decay", "key_decay", "diagonal_decay")
        for name, value in zip(names, module.decay_factors(slope), strict=True):
            getattr(module, name).copy_(value)
    if not worst:
        return []
    why = "the denominator of its layer factor, or buffers stored in bf16"
    if spec.heads & (spec.heads - 1):
        why = f"it has no ALiBi rule for {spec.heads} heads, which is not a power of two"
    return [
        f"transformers decays layer {worst_layer} by slopes up to {worst:.1e} off the original "
        f"formula ({why}): its decay buffers were recomputed"
    ]


def _closest(preferences: list[Tensor], spec: published.Spec, rows: int) -> np.ndarray:
    """[B]: the least of (last expert taken - first one left) / last one taken, over all choices."""
    if spec.experts_per_token >= spec.experts:
        return np.full(rows, np.inf)
    gaps = []
    for preference_RE in preferences:
        best = preference_RE.topk(spec.experts_per_token + 1, -1).values
        gap_R = (best[:, -2] - best[:, -1]) / best[:, -2].abs()
        gaps.append(gap_R.view(rows, -1).amin(-1).numpy())
    return np.min(gaps, axis=0)


def _gradient(parameter: Tensor) -> Tensor:
    import torch

    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _tensor(tokens_BT: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(tokens_BT, dtype=np.int64))
