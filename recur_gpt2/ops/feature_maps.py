"""Feature maps phi of linear attention: phi(q) . phi(k) stands in for exp(q . k / sqrt(d)). Not for attention itself.

A map takes (..., H, T, d) to (..., H, T, k), each head with weights of its own that queries and keys share. It does not
know which of the two it sees: the caller multiplies queries by `query_scale` first, or calls `features` on both. The
attention divides by the sum of the products, so that a factor that all features share changes nothing.

H heads, T tokens, d = D / H, k features of a head. k is the size of the state too, whatever the map: one whose features
come in pairs (rfa, hedgehog) has k / 2 pairs.
"""

import torch
from torch import Tensor, nn

from ..errors import InputError, check_range
from ..utils.tensors import widen

LARGEST_SIZE = 2**16  # k: more would be no saving beside any window
FLOOR = 1e-6  # least denominator of features that cannot be negative


class FeatureMap(nn.Module):
    """phi. Attributes: `out_features` (k), `query_scale` (factor of queries before phi), `floor` (of denominators)."""

    query_scale = 1.0
    floor = FLOOR

    def __init__(self, heads: int, width: int, out_features: int, seed: int):
        super().__init__()
        self.heads, self.width, self.out_features, self.seed = heads, width, out_features, seed

    @classmethod
    def sizes(cls, width: int, feature_size: int) -> tuple[int, int]:
        """What a head costs: k, the features of its state, and the rows of the matrix that makes them.

        Args:
            width: d.
            feature_size: k as the configuration has it.
        """
        return feature_size, feature_size

    def reset_parameters(self):
        """Back to how the map starts."""

    def features(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (..., H, T, d) -> phi of both, (..., H, T, k)."""
        return self(query * self.query_scale), self(key)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, width={self.width}, out_features={self.out_features}"

    def _random_normal(self, *shape):
        """The same numbers for the same seed, wherever the parameters are."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed), device="cpu")


class AffineMap(FeatureMap):
    """What t2r and hedgehog share: phi(x) = activate(W x + b) with r rows of W for each head."""

    def __init__(self, heads, width, rows, out_features, seed):
        super().__init__(heads, width, out_features, seed)
        self.weight = nn.Parameter(torch.empty(heads, width, rows))
        self.bias = nn.Parameter(torch.empty(heads, rows))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        projected = x @ self.weight.to(x.dtype)
        return self.activate(projected + self.bias[:, None].to(projected.dtype))

    def fold(self, weight: Tensor, bias: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Fold W and b into a projection x = scale (h @ weight + bias), so that x is never built.

        Args:
            weight, bias: (D, H d) and (H d), of queries or of keys.
            scale: `query_scale` for queries, 1 for keys.

        Returns:
            (D, H r) and (H r), a projection whose heads give phi(x) once `activate` is applied.
        """
        own = scale * self.weight.double()
        weight_by_head, bias_by_head = (
            weight.double().unflatten(-1, (self.heads, -1)),
            bias.double().view(self.heads, -1),
        )
        folded = torch.einsum("nhd,hdr->nhr", weight_by_head, own)
        shift = torch.einsum("hd,hdr->hr", bias_by_head, own) + self.bias.double()
        return folded.flatten(1).to(weight.dtype), shift.flatten().to(bias.dtype)


class T2R(AffineMap):
    """phi(x) = ReLU(W x + b) (Kasai et al. 2021, "Finetuning Pretrained Transformers into RNNs"); queries times d^-1/2.

    Starts with random directions and no bias. Of the starts that need no data this is as near to softmax as any that
    was measured, and a bias takes it away: b > 0 makes all weights alike, b < 0 leaves queries without features.
    """

    def __init__(self, heads: int, width: int, feature_size: int, *, seed: int = 0):
        self.query_scale = width**-0.5
        super().__init__(heads, width, feature_size, feature_size, seed)

    @torch.no_grad()
    def reset_parameters(self):
        self.weight.copy_(self._random_normal(*self.weight.shape) * self.width**-0.5)
        self.bias.zero_()

    def activate(self, projected: Tensor) -> Tensor:
        return projected.relu()


class Hedgehog(AffineMap):
    """phi(x) = max(softmax([W x + b, -(W x + b)]), 1e-6) (Zhang et al. 2024, "The Hedgehog & the Porcupine").

    The exponentials of a learned map and of its negative; the softmax, over features, keeps them from overflowing. The
    least value keeps denominators off their floor, and products of two out of the denormal numbers, which make a CPU
    many times slower. W starts as the identity's first k / 2 rows. Queries are not scaled: dividing them by sqrt(d)
    fits softmax clearly worse.
    """

    def __init__(self, heads: int, width: int, feature_size: int, *, seed: int = 0):
        super().__init__(heads, width, _half(feature_size, "hedgehog"), feature_size, seed)

    @classmethod
    def sizes(cls, width: int, feature_size: int) -> tuple[int, int]:
        return feature_size, feature_size // 2

    @torch.no_grad()
    def reset_parameters(self):
        self.weight.copy_(torch.eye(*self.weight.shape[1:], device="cpu").expand_as(self.weight))
        self.bias.zero_()

    def activate(self, projected: Tensor) -> Tensor:
        features = torch.cat((projected, -projected), dim=-1).softmax(dim=-1)
        return features.clamp_min(self.floor).to(projected.dtype)


class ELU(FeatureMap):
    """phi(x) = elu(x) + 1 (Katharopoulos et al. 2020, "Transformers are RNNs"); nothing learned, and always k = d."""

    def __init__(self, heads: int, width: int, feature_size: int | None = None, *, seed: int = 0):
        super().__init__(heads, width, width, seed)

    @classmethod
    def sizes(cls, width: int, feature_size: int) -> tuple[int, int]:
        return width, 0

    def forward(self, x: Tensor) -> Tensor:
        # Written out: in 16 bit elu(x) is -1 for x < -6, and adding 1 leaves nothing.
        return torch.where(x > 0, x + 1, x.clamp_max(0).exp().to(x.dtype))


class RFA(FeatureMap):
    """phi(x) = (k / 2)^-1/2 [sin(w_i . x / |x|), cos(w_i . x / |x|)], w_i = sigma * n_i, n_i ~ N(0, I).

    Random Fourier features (Peng et al. 2021, "Random Feature Attention"): their product is on average the Gaussian
    kernel exp(-|sigma * (q/|q| - k/|k|)|^2 / 2). sigma (H, d) is learned; the directions n are not, and are saved.

    The average is positive, a product need not be: its error is about k^-1/2, the kernel of opposite vectors
    exp(-2 sigma^2). With sigma = 1 denominators pass zero at k = 32 and 64; sigma starts at 0.5, where they do not.
    """

    floor = 1e-2
    SIGMA = 0.5

    def __init__(self, heads: int, width: int, feature_size: int, *, seed: int = 0):
        super().__init__(heads, width, feature_size, seed)
        self.sigma = nn.Parameter(torch.empty(heads, width))
        self.register_buffer("directions", torch.empty(heads, width, _half(feature_size, "rfa")))
        self.reset_parameters()

    @classmethod
    def sizes(cls, width: int, feature_size: int) -> tuple[int, int]:
        return feature_size, feature_size // 2

    @torch.no_grad()
    def reset_parameters(self):
        self.sigma.fill_(self.SIGMA)
        self.directions.copy_(self._random_normal(*self.directions.shape))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # 16-bit angles would be off by a hundredth
            unit = nn.functional.normalize(widen(x), dim=-1, eps=1e-3)
            angles = unit @ (self.sigma[..., None] * self.directions).to(unit.dtype)
            features = torch.cat((angles.sin(), angles.cos()), dim=-1) * (self.out_features / 2) ** -0.5
        return features.to(x.dtype)


FEATURE_MAPS = {"t2r": T2R, "elu": ELU, "rfa": RFA, "hedgehog": Hedgehog}


def make_feature_map(name: str, heads: int, width: int, feature_size: int, *, seed: int = 0) -> FeatureMap:
    """A new map by name.

    Args:
        name: one of FEATURE_MAPS.
        heads, width: H and d.
        feature_size: k; elu has d features instead.
        seed: of whatever starts at random.

    Raises:
        InputError: there is no such map, or it cannot have k features.
    """
    if name not in FEATURE_MAPS:
        raise InputError(f"feature_map={name!r} is not known; use one of {', '.join(FEATURE_MAPS)}")
    check_range(1, LARGEST_SIZE, feature_size=feature_size)
    return FEATURE_MAPS[name](heads, width, feature_size, seed=seed)


def _half(feature_size, name):
    if feature_size % 2:
        raise InputError(f"feature_size={feature_size} is odd, but {name} has features in pairs; use an even number")
    return feature_size // 2
