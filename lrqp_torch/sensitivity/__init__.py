"""What an edit did to the answer, by gradient: which part of it, and how much was needed."""

from lrqp_torch.sensitivity.attribution import Attribution, attribute
from lrqp_torch.sensitivity.smallest_odds import SmallestOdds, smallest_odds

__all__ = ["Attribution", "SmallestOdds", "attribute", "smallest_odds"]
