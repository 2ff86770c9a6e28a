"""GPT-2's block, opened between projection and attention so that a window's attention can see memory.

The parameters, their names and their arithmetic are transformers' own.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from ..errors import InputError
from ..ops.feature_maps import AffineMap, FeatureMap, make_feature_map
from ..ops.hybrid import MixingGate
from ..ops.matmul import Projection

# gelu_new is this formula written as eight kernels; the fused one gives the same numbers in a fraction of the time.
FUSED_ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh"}
# Without gradients on a CPU, tokens that pass the feed-forward net together: its inner layer is four times as wide as
# all else, and stays in the cache.
TOKENS_AT_ONCE = 1024
STATE_DECAY = -2.0  # logit of the factor that a new layer's carried (S, z) decays by


NEW_PARTS = {"recurrence", "feature_map", "far_gate"}  # what GPT-2 has not
HEADS = {"score", "classifier"}  # of models that classify
NEW = NEW_PARTS | HEADS | {"state_decay"}


def is_new(name: str) -> bool:
    """Whether a parameter of this name is none of GPT-2's."""
    return not NEW.isdisjoint(name.split("."))


def is_feature_map(name: str) -> bool:
    """Whether a parameter of this name belongs to a feature map, or to the gate of what it weighs."""
    return not {"feature_map", "far_gate"}.isdisjoint(name.split("."))


class RecurGPT2Block(GPT2Block):
    """One layer. B stands for all leading dimensions here (rows, or rows and windows).

    Attributes:
        feature_map: phi of a layer with linear attention; None where attention is softmax.
        state_decay: (H,) logits of the factors by which (S, z) decays at the border of two windows; None where it is
            not carried.
        far_gate: weighs linear attention against softmax attention to near positions; None where there is none.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        fused = FUSED_ACTIVATIONS.get(config.activation_function)
        if fused:
            self.mlp.act = ACT2FN[fused]
        for part, name in ((self.attn, "c_attn"), (self.attn, "c_proj"), (self.mlp, "c_fc"), (self.mlp, "c_proj")):
            setattr(part, name, Projection(getattr(part, name)))
        self.feature_map = self.state_decay = self.far_gate = None
        self.register_buffer("fused_weight", None, persistent=False)
        self.register_buffer("fused_bias", None, persistent=False)
        if layer_idx in config.linear_layers:
            self.make_linear(self.new_feature_map(config), config)

    @property
    def name(self) -> str:
        """Of the layer, in states."""
        return str(self.attn.layer_idx)

    def forward(self, layer: Callable | Tensor, *inputs, **_):
        """Calls `layer`, the function of `inputs` that the model makes of this layer.

        Whatever hooks into modules (gradient checkpointing, offloading, sharding) hooks in here.
        """
        if not callable(layer):  # as GPT2Block is called, which would read without memory
            raise InputError("a layer cannot be called by itself: its window and memory are the model's; call that")
        return layer(*inputs)

    def new_feature_map(self, config) -> FeatureMap:
        """A map as the configuration wants it, for this layer's heads."""
        weight, seed = self.attn.c_attn.weight, self.attn.layer_idx
        made = make_feature_map(
            config.feature_map, self.attn.num_heads, self.attn.head_dim, config.feature_size, seed=seed
        )
        return made.to(device=weight.device, dtype=weight.dtype)

    def make_linear(self, feature_map: FeatureMap, config) -> None:
        """Give the layer linear attention, as the configuration wants it, with this map."""
        self.feature_map = feature_map
        weight, heads = self.attn.c_attn.weight, self.attn.num_heads
        if config.near_tokens:
            self.far_gate = MixingGate(heads, self.attn.head_dim, config.near_tokens).to(weight)
        if config.carry_linear_state:
            self.state_decay = nn.Parameter(weight.new_full((heads,), STATE_DECAY))

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) layer input -> query, key, value, each (B, H, T, D / H)."""
        return self.project_together(hidden).unbind(-4)

    def project_together(self, hidden: Tensor) -> Tensor:
        """(B, T, D) layer input -> query, key and value, (B, 3, H, T, D / H)."""
        projected = self.attn.c_attn(self.ln_1(hidden))
        return projected.unflatten(-1, (3, self.attn.num_heads, self.attn.head_dim)).movedim(-4, -2)

    def project_features(self, hidden: Tensor, keys: slice | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(B, T, D) layer input -> phi of queries and of keys (B, H, T, k), values, and keys (B, H, T', d).

        `keys` says at which positions the keys themselves are wanted; None for nowhere. Where phi is folded into the
        projections, queries are never built, and keys only there.
        """
        if self.fused_weight is None:
            query, key, value = self.project(hidden)
            features = self.feature_map.features(query * self.query_factor, key)
            return *features, value, None if keys is None else key[..., keys, :]
        normed = self.ln_1(hidden)
        width = self.attn.embed_dim
        features = (self.fused_bias.numel() - width) // 2
        parts = nn.functional.linear(normed, self.fused_weight, self.fused_bias).split((features, features, width), -1)
        query, key, value = map(self._split_heads, parts)
        raw = None if keys is None else self._split_heads(nn.functional.linear(normed[..., keys, :], *self._own(1)))
        return self.feature_map.activate(query), self.feature_map.activate(key), value, raw

    @torch.no_grad()
    def fuse_feature_map(self) -> None:
        """Fold phi's matrix into the projections of queries and keys, if there is one and nothing else needs them."""
        if not isinstance(self.feature_map, AffineMap) or self.far_gate is not None:
            return
        if not isinstance(self.attn.c_attn, Projection):
            return  # wrapped in an adapter, which must be merged first
        scale = self.feature_map.query_scale * self.query_factor
        weights, biases = [], []
        for part, factor in enumerate((scale, 1.0)):
            weight, bias = self._own(part)
            weight, bias = self.feature_map.fold(weight.T, bias, scale=factor)
            weights.append(weight.T)
            biases.append(bias)
        weight, bias = self._own(2)
        self.fused_weight, self.fused_bias = torch.cat((*weights, weight)), torch.cat((*biases, bias))

    def unfuse_feature_map(self) -> None:
        """Go back to the projections and the map themselves."""
        self.fused_weight = self.fused_bias = None

    def _own(self, part):
        """Weight (D, D), as nn.Linear has it, and bias (D,) of queries (0), keys (1) or values (2)."""
        weight, bias = self.attn.c_attn.weight, self.attn.c_attn.bias
        columns = slice(part * weight.shape[0], (part + 1) * weight.shape[0])
        return weight[:, columns].T, bias[columns]

    @property
    def query_factor(self) -> float:
        """What queries are multiplied by so that d^-1/2 is the scale that softmax attention would have used."""
        return self.attn.scaling * self.attn.head_dim**0.5

    def project_memory(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, D) supplementary embeddings -> key, value, each (B, H, M, D / H). Memory never queries."""
        _, key, value = self.project(embeddings)  # queries too: the layer may be wrapped in an adapter
        return key, value

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Layer input (B, T, D) and what its heads attended to (B, H, T, D / H) -> layer output (B, T, D)."""
        attended = attended.transpose(-3, -2).flatten(-2)
        hidden = hidden + self.attn.resid_dropout(self.attn.c_proj(attended))
        if torch.is_grad_enabled() or hidden.is_cuda or hidden.shape[:-1].numel() <= TOKENS_AT_ONCE:
            return hidden + self.mlp(self.ln_2(hidden))
        for some in hidden.view(-1, hidden.shape[-1]).split(TOKENS_AT_ONCE):
            some += self.mlp(self.ln_2(some))
        return hidden

    @property
    def attention_options(self) -> dict[str, float]:
        """Scale and dropout of the attention weights."""
        return {"scale": self.attn.scaling, "dropout": self.attn.attn_dropout.p if self.training else 0.0}

    def _split_heads(self, projected):
        return projected.unflatten(-1, (self.attn.num_heads, -1)).transpose(-3, -2)
