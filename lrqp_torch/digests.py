"""Short digests that tell models and tensors apart."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_DIGESTED = 65_536
"""Elements of each parameter that the digest reads: enough to tell models apart, in no time."""


def digest_model(model: nn.Module) -> str:
    """A short digest of the model's weights: the beginning of each parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        # A tensor-parallel model holds a part of it on each rank.
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        digest.update(_bytes(whole.detach().flatten()[:_DIGESTED]))
    return digest.hexdigest()[:16]


def digest_values(values: Mapping[str, Any]) -> str:
    """A short digest of named values; of tensors it reads every element, shape and dtype."""
    digest = hashlib.sha256()
    for name in sorted(values):
        value = values[name]
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            digest.update(_bytes(value.detach()))
        else:
            digest.update(f"{name} {value!r};".encode())
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> Any:
    return tensor.flatten().cpu().contiguous().view(torch.uint8).numpy()
