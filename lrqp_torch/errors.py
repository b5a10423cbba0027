"""Every error that lrqp_torch raises on bad input, one class a cause.

Each message says what is wrong, where, and how to mend it. All derive from
:class:`LRQPError`, and from the built-in class that a caller would expect
(``ValueError`` for a bad argument, ``RuntimeError`` for a failed run), so both
``except LRQPError`` and ``except ValueError`` work.
"""


class LRQPError(Exception):
    """Base class of all errors raised by lrqp_torch."""


class SiteError(LRQPError, ValueError):
    """A site name that does not parse, a layer out of range, or a site that the family lacks."""


class UnknownFamilyError(LRQPError, ValueError):
    """A model whose family has no row in the table of :mod:`lrqp_torch.sites`."""


class PositionError(LRQPError, ValueError):
    """Token positions out of range, on padding, or of a wrong shape or dtype."""


class TargetError(LRQPError, ValueError):
    """Target or source classes out of range, or of a wrong shape or dtype."""


class WidthError(LRQPError, ValueError):
    """Tensors whose widths or batch sizes do not fit together."""


class NonFiniteError(LRQPError, ValueError):
    """NaN or infinity in activations, probe, covariance or floor."""


class CovarianceError(LRQPError, ValueError):
    """A covariance that is not symmetric positive semidefinite, or too few samples for one."""


class LabelError(LRQPError, ValueError):
    """Labels that no probe can be fitted to: one class only, a class missing, too few examples."""


class BatchError(LRQPError, ValueError):
    """Batches that cannot be gone through twice, or that differ from one pass to the next."""


class ConvergenceError(LRQPError, RuntimeError):
    """An optimiser stopped before it reached the promised gradient norm."""


class InfeasibleError(LRQPError, RuntimeError):
    """A target that no activation reaches, for example two classes with equal weights."""


class SolverError(LRQPError, RuntimeError):
    """A solver that is unknown, is not installed, or cannot run on the tensors' device."""


class EditNeverFiredError(LRQPError, RuntimeError):
    """An edit whose context closed although some of its positions never ran through the model."""


class TokenizerError(LRQPError, ValueError):
    """A tokenizer under which the task cannot be built (too few single-token names, no offsets)."""


class PrefixError(LRQPError, ValueError):
    """A source of prefix sentences that is missing, empty, or filtered out entirely."""


class ModelError(LRQPError, RuntimeError):
    """A model that cannot be found or loaded under the given name."""


class MissingExtraError(LRQPError, ImportError):
    """An optional package that the requested feature needs is not installed."""


class OutputError(LRQPError, OSError):
    """An output folder or file that cannot be written."""


class SavedEditError(LRQPError, ValueError):
    """A saved edit that is missing, damaged, foreign, or of a newer format."""


class SettingError(LRQPError, ValueError):
    """A setting of a study that is out of its range, or that contradicts another."""


class PromptError(LRQPError, ValueError):
    """A request for task prompts that cannot be met, for example more than there are."""


class SelectionError(LRQPError, IndexError):
    """An index into a data set that is out of range, or of a wrong shape or dtype."""


class StatisticsError(LRQPError, ValueError):
    """A share, a mean or an interval of nothing, or of counts that contradict each other."""


class LearningError(LRQPError, RuntimeError):
    """An edit that cannot be learned: no prompts, no gradient, a loss of NaN, a foreign folder."""


class PairError(LRQPError, ValueError):
    """An edit that needs activations of paired prompts and has none, or not one for each row."""


class ActivationStoreError(LRQPError, ValueError):
    """Stored activations that are missing, damaged, foreign, unfinished, or of another capture."""


class ProvenanceError(LRQPError, ValueError):
    """An edit put into a model that it was not fitted on, or a damaged record of its origin."""


class HubError(LRQPError, RuntimeError):
    """An edit that cannot be sent to or fetched from the Hugging Face Hub."""


class ConstraintError(LRQPError, ValueError):
    """A constraint or penalty of the user's own that is not convex, not DPP, or not a term."""


class RankError(LRQPError, RuntimeError):
    """Processes of one run that were launched wrongly, disagree, or lost one of them."""


class ToldError(RankError):
    """An error of another process of the same run, which has told it already."""


class CompiledModelError(LRQPError, RuntimeError):
    """A model edited or read inside a function that ``torch.compile`` compiles."""
