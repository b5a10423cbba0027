"""Activations on disk: safetensors shards with an index, written as they are read."""

from lrqp_torch.activation_store.store import ActivationStore, StoredActivations
from lrqp_torch.activation_store.storing import capture_to

__all__ = ["ActivationStore", "StoredActivations", "capture_to"]
