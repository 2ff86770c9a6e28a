"""GPT-2's block, opened between projection and attention so that a window's attention can see memory.

The parameters, their names and their arithmetic are transformers' own.
"""

from einops import rearrange
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

# gelu_new is this formula written as eight kernels; the fused one gives the same numbers in a fraction of the time.
FUSED_ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh"}


class RecurGPT2Block(GPT2Block):
    """One layer. B stands for all leading dimensions here (rows, or rows and windows)."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        fused = FUSED_ACTIVATIONS.get(config.activation_function)
        if fused:
            self.mlp.act = ACT2FN[fused]

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) layer input -> query, key, value, each (B, H, T, D / H)."""
        return tuple(map(self._split_heads, self.attn.c_attn(self.ln_1(hidden)).chunk(3, dim=-1)))

    def project_memory(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, D) supplementary embeddings -> key, value, each (B, H, M, D / H). Memory never queries."""
        c_attn = self.attn.c_attn
        width = c_attn.weight.shape[0]
        projected = self.ln_1(embeddings) @ c_attn.weight[:, width:].to(embeddings.dtype)
        return tuple(map(self._split_heads, (projected + c_attn.bias[width:]).chunk(2, dim=-1)))

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Layer input (B, T, D) and what its heads attended to (B, H, T, D / H) -> layer output (B, T, D)."""
        attended = rearrange(attended, "... h t d -> ... t (h d)")
        hidden = hidden + self.attn.resid_dropout(self.attn.c_proj(attended))
        return hidden + self.mlp(self.ln_2(hidden))

    @property
    def attention_options(self) -> dict[str, float]:
        """Scale and dropout of the attention weights."""
        return {"scale": self.attn.scaling, "dropout": self.attn.attn_dropout.p if self.training else 0.0}

    def _split_heads(self, projected):
        return rearrange(projected, "... t (h d) -> ... h t d", h=self.attn.num_heads)
