"""The indirect-object-identification task: names, templates, prefixes and the data set."""

from lrqp_torch.ioi.dataset import IOIDataset
from lrqp_torch.ioi.names import NAMES
from lrqp_torch.ioi.pairs import swap_order
from lrqp_torch.ioi.templates import ABBA_TEMPLATES, BABA_TEMPLATES, OBJECTS, PLACES

__all__ = [
    "ABBA_TEMPLATES",
    "BABA_TEMPLATES",
    "NAMES",
    "OBJECTS",
    "PLACES",
    "IOIDataset",
    "swap_order",
]
