"""Names of pytorch-metric-learning 2.9 that are not here: the error for one says what to use instead.

``ABSENT`` lists every public name that is missing, by module; ``MODULES`` lists whole modules. docs/switching.md shows
both, and a test compares them with the installed package.
"""

from __future__ import annotations

import dis
import sys
from typing import Any

PAGE = "docs/switching.md"
THEIR_LOSS = "pytorch-metric-learning's own, which takes the tuples of `dml_kernels.miners`"
THEIR_MINER = "pytorch-metric-learning's own, whose tuples `dml_kernels.losses` take"
THEIR_SAMPLER = "pytorch-metric-learning's own"
OWN_LOSS = "`dml_kernels.functional` for a loss of your own; docs/design.md says how to add one here"

ABSENT: dict[str, dict[str, str]] = {
    "losses": {
        **dict.fromkeys(
            ["AngularLoss", "DynamicSoftMarginLoss", "FastAPLoss", "HistogramLoss", "InstanceLoss",
             "IntraPairVarianceLoss", "ManifoldLoss", "P2SGradLoss", "PNPLoss", "RankedListLoss",
             "SignalToNoiseRatioContrastiveLoss", "SmoothAPLoss", "ThresholdConsistentMarginLoss", "TupletMarginLoss",
             "VICRegLoss"],
            THEIR_LOSS),
        "BaseMetricLossFunction": OWN_LOSS,
        "GenericPairLoss": OWN_LOSS,
        "BaseLossWrapper": "`torch.nn.Module` around a loss",
        "EmbeddingRegularizerMixin": "the arguments `embedding_regularizer` and `embedding_reg_weight` of every loss",
        "WeightRegularizerMixin": "the arguments `weight_regularizer` and `weight_reg_weight` of losses with a bank",
    },
    "miners": {
        "AngularMiner": THEIR_MINER,
        "HDCMiner": THEIR_MINER,
        "UniformHistogramMiner": THEIR_MINER,
        "BaseMiner": "`dml_kernels.miners.Miner`; a loss takes any tuple of indices",
    },
    "distances": {
        "BaseDistance": "`LpDistance`, `CosineSimilarity` or `DotProductSimilarity`: losses stream only those",
        "BatchedDistance": "`dml_kernels.evaluation`, which goes through the matrix in pieces, as losses do",
        "SNRDistance": "pytorch-metric-learning's own, in its losses and miners",
    },
    "reducers": {"BaseReducer": "`dml_kernels.reducers.Reducer`, with `reduce(name, part)`"},
    "regularizers": {"BaseRegularizer": "`dml_kernels.regularizers.Regularizer`, or any callable on rows (M, D)"},
    "samplers": {
        "FixedSetOfTriplets": THEIR_SAMPLER,
        "HierarchicalSampler": THEIR_SAMPLER,
        "TuplesToWeightsSampler": THEIR_SAMPLER,
    },
}  # fmt: skip

# Whole modules that are not here.
MODULES: dict[str, str] = {
    "testers": "`dml_kernels.evaluation`, on embeddings; or pytorch-metric-learning's own",
    "trainers": "a loop of your own; or pytorch-metric-learning's own, which take losses and miners from here",
    "datasets": "a `torch.utils.data.Dataset` of your own; or pytorch-metric-learning's own",
    "utils": "pytorch-metric-learning's own, or what the page names for its parts",
    "utils.accuracy_calculator": "`dml_kernels.evaluation.evaluate_retrieval`, or `dml_kernels.evaluation.evaluate`",
    "utils.common_functions": "PyTorch",
    "utils.distributed": "`dml_kernels.distributed`: `DistributedLossWrapper`, `DistributedMinerWrapper`, `gather`",
    "utils.inference": "`dml_kernels.evaluation` to judge; pytorch-metric-learning's own to search, which takes "
                       "distances from here",
    "utils.key_checker": "pytorch-metric-learning's own",
    "utils.logging_presets": "pytorch-metric-learning's own",
    "utils.loss_and_miner_utils": "`indices_tuple=None`: losses see every pair and triplet that the labels make",
    "utils.loss_tracker": "pytorch-metric-learning's own",
    "utils.module_with_records": "`torch.nn.Module`",
    "utils.module_with_records_and_reducer": "`torch.nn.Module`",
}  # fmt: skip


def _importing() -> bool:
    """Whether the caller's caller is a ``from module import name``, which would drop an AttributeError's message."""
    caller = sys._getframe(2)
    return caller.f_code.co_name == "_handle_fromlist" or (
        dis.opname[caller.f_code.co_code[max(caller.f_lasti, 0)]] == "IMPORT_FROM"
    )


def explain(module: str) -> None:
    """Give a module of this package a ``__getattr__`` that says what to use instead of a name that is missing here.

    The function is set from here, not defined in the module, so that type checkers still refuse unknown names.

    Args:
        module: the full name of the module.
    """
    absent = MODULES if module == "dml_kernels" else ABSENT[module.removeprefix("dml_kernels.")]

    def asked(name: str) -> Any:
        if name not in absent:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        error = ImportError if _importing() else AttributeError
        raise error(f"{module} has no {name}, which pytorch-metric-learning has. Use {absent[name]}. All names: {PAGE}")

    sys.modules[module].__dict__["__getattr__"] = asked
