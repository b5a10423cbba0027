"""Other ways to make the same edit, with the same call as LRQP.

A baseline is a class with a ``name`` and an ``edit``, and a row in :data:`BASELINES`.
"""

from lrqp_torch.baselines.base import Baseline, FullPatch, NoEdit, Paired
from lrqp_torch.baselines.das import DAS, DASLeast, DASReport
from lrqp_torch.baselines.data import BaselineData, Behaviour, answer_loss
from lrqp_torch.baselines.least import (
    EuclideanLeastEdit,
    InverseMetric,
    LeastEdit,
    RandomDirection,
)
from lrqp_torch.baselines.means import ConditionalMean, ExactMeanDifference, MeanDifference
from lrqp_torch.baselines.projections import LEACE, AlterRep
from lrqp_torch.baselines.transport import NeuronTransport, OptimalTransport
from lrqp_torch.errors import SettingError, quoted

__all__ = [
    "BASELINES",
    "DAS",
    "LEACE",
    "AlterRep",
    "Baseline",
    "BaselineData",
    "Behaviour",
    "ConditionalMean",
    "DASLeast",
    "DASReport",
    "EuclideanLeastEdit",
    "ExactMeanDifference",
    "FullPatch",
    "InverseMetric",
    "LeastEdit",
    "MeanDifference",
    "NeuronTransport",
    "NoEdit",
    "OptimalTransport",
    "Paired",
    "RandomDirection",
    "answer_loss",
    "build",
]

BASELINES: dict[str, type[Baseline]] = {
    cls.name: cls
    for cls in (
        NoEdit,
        RandomDirection,
        LeastEdit,
        EuclideanLeastEdit,
        InverseMetric,
        MeanDifference,
        ExactMeanDifference,
        ConditionalMean,
        OptimalTransport,
        NeuronTransport,
        LEACE,
        AlterRep,
        DAS,
        DASLeast,
        FullPatch,
    )
}
"""Name to class, in the order of a table; ``"lrqp"`` is the reference itself."""


def build(name: str, data: BaselineData) -> Baseline:
    """The baseline of a name, fitted with its default options.

    Raises:
        SettingError: no such baseline.
        PairError: it needs paired activations and a model, and ``data`` has none.
        MissingExtraError: it needs a package that is not installed.
    """
    if name not in BASELINES:
        raise SettingError(f"unknown baseline {quoted(name)}; choose one of {', '.join(BASELINES)}")
    return BASELINES[name].from_data(data)
