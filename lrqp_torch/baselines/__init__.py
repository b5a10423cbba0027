"""Other ways to make the same edit, one a file, with the same call as LRQP."""

from lrqp_torch.baselines.alterrep import AlterRep
from lrqp_torch.baselines.base import Baseline, Paired
from lrqp_torch.baselines.conditional_mean import ConditionalMean
from lrqp_torch.baselines.das import DAS
from lrqp_torch.baselines.das_training import DASReport
from lrqp_torch.baselines.data import BaselineData, Behaviour, answer_loss
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
from lrqp_torch.baselines.registry import BASELINES, build

__all__ = [
    "BASELINES",
    "DAS",
    "LEACE",
    "AlterRep",
    "Baseline",
    "BaselineData",
    "Behaviour",
    "ConditionalMean",
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
