"""What a token's place in the cache holds: how its latent is stored, and its index key. Chosen once, when building."""

from dataclasses import dataclass

import torch

from argosy.cache.index_key_format import EncodedIndexKeys, IndexKeyFormat, PlainIndexKeys
from argosy.cache.latent_format import EncodedLatents, LatentFormat, PlainLatents
from argosy.cache.layer_settings import CacheDims
from argosy.config import CacheDTypes
from argosy.kernels import FP8, INT8, NumberFormat

NUMBER_FORMATS: dict[str, NumberFormat] = {"int8": INT8, "fp8": FP8}


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheFormat:
    """The formats of the two things that a layer remembers of a token."""

    latents: LatentFormat
    index_keys: IndexKeyFormat

    @property
    def bytes_per_token(self) -> int:
        """Of one layer."""
        parts = self.latents, self.index_keys
        return sum(part.width * part.dtype.itemsize for part in parts)


def build_cache_format(
    dtypes: CacheDTypes, dims: CacheDims, model_dtype: torch.dtype, device: torch.device
) -> CacheFormat:
    """
    Raises:
        ValueError: the model's widths do not fit the format.
    """
    check_cache_format(dtypes, dims)
    latent, index_key = NUMBER_FORMATS.get(dtypes.latent), NUMBER_FORMATS.get(dtypes.index_key)
    return CacheFormat(
        latents=PlainLatents(dims, model_dtype) if latent is None else EncodedLatents(dims, model_dtype, latent),
        index_keys=PlainIndexKeys(dims, model_dtype)
        if index_key is None
        else EncodedIndexKeys(dims, index_key, device),
    )


def check_cache_format(dtypes: CacheDTypes, dims: CacheDims) -> None:
    """Raises ValueError as ``build_cache_format``, without building anything."""
    size = dims.index_head_dim
    if dtypes.index_key in NUMBER_FORMATS and size & (size - 1):
        raise ValueError(
            f"index keys in {dtypes.index_key}: index_head_dim ({size}) must be a power of two, for index keys are "
            "rotated by a Hadamard matrix before they are quantised; set --index-cache-dtype model"
        )
