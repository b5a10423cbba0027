"""Baselines by name."""

from lrqp_torch.baselines.alterrep import AlterRep
from lrqp_torch.baselines.base import Baseline
from lrqp_torch.baselines.conditional_mean import ConditionalMean
from lrqp_torch.baselines.das import DAS
from lrqp_torch.baselines.data import BaselineData
from lrqp_torch.baselines.euclidean import EuclideanLeastEdit
from lrqp_torch.baselines.full_patch import FullPatch
from lrqp_torch.baselines.identity import NoEdit
from lrqp_torch.baselines.inverse_metric import InverseMetric
from lrqp_torch.baselines.leace import LEACE
from lrqp_torch.baselines.least_edit import LeastEdit
from lrqp_torch.baselines.mean_difference import MeanDifference
from lrqp_torch.baselines.mean_difference_exact import ExactMeanDifference
from lrqp_torch.baselines.neuron_transport import NeuronTransport
from lrqp_torch.baselines.optimal_transport import OptimalTransport
from lrqp_torch.baselines.random_direction import RandomDirection
from lrqp_torch.errors import SettingError

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
        raise SettingError(f"unknown baseline {name!r}; choose one of {', '.join(BASELINES)}")
    return BASELINES[name].from_data(data)
