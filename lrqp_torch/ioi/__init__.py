"""The indirect-object-identification task: names, templates, prefixes and the data set."""

from lrqp_torch.ioi.dataset import IOIDataset, swap_identity, swap_order
from lrqp_torch.ioi.words import ABBA_TEMPLATES, BABA_TEMPLATES, NAMES, OBJECTS, PLACES

__all__ = [
    "ABBA_TEMPLATES",
    "BABA_TEMPLATES",
    "NAMES",
    "OBJECTS",
    "PLACES",
    "IOIDataset",
    "swap_identity",
    "swap_order",
]
