"""Options of linear attention, as configurations, conversion and commands take them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearAttentionOptions:
    """Fields of RecurGPT2Config, which has them from here."""

    feature_map: str = "t2r"
    """t2r, hedgehog, elu or rfa."""
    feature_size: int = 32
    """k, features of a head."""
    near_tokens: int = 0
    """w, nearest positions that keep softmax in linear layers."""
    carry_linear_state: bool = False
    """Carry the sums (S, z) from window to window."""
