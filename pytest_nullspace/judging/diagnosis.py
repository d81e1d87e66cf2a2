"""From figures, audit and comparison to causes by their names: one diagnosis a distinct cause, not one a layer.

Pure. A cause is named only on evidence that the good adapters do not show; what is not told apart says so.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

from pytest_nullspace.judging import activations, tensors
from pytest_nullspace.judging.audit import Audit
from pytest_nullspace.judging.baseline import Comparison
from pytest_nullspace.judging.evidence import Case, Diagnosis
from pytest_nullspace.judging.weights import Weights
from pytest_nullspace.run.stats import RunStats


def diagnose(
    run: RunStats,
    audit: Audit | None = None,
    compared: Comparison | None = None,
    weights: Weights | None = None,
    left_out: Collection[str] = (),
    passed: bool = False,
) -> list[Diagnosis]:
    """Name what is wrong with a trained adapter.

    Args:
        run: What was measured of it.
        audit: Its tensors against their start, if they were compared.
        compared: The run against an earlier one, if it was.
        weights: Its weights, where they alone are known.
        left_out: Figures that are not judged, so that no cause follows from them.
        passed: Whether every verdict is a pass, so that no cause follows from any figure: only an audit proves one.

    Returns:
        One diagnosis for each cause; none for an adapter that shows no mistake.
    """
    case = Case(run, [layer for layer in run.layers if layer.defect is None], audit, compared, weights, left_out)
    finders = _OF_WHOLE if run.is_whole else _FINDERS
    if passed:
        finders = () if audit is None else _PROVEN
    return [found for find in finders for found in find(case)]


_FINDERS: Sequence[Callable[[Case], Iterator[Diagnosis]]] = (
    activations.non_finite,
    tensors.b_trained,
    tensors.b_rescaled,
    tensors.nothing_learned,
    tensors.scale_zero,
    tensors.scale_wrong,
    tensors.wrong_base,
    tensors.outside,
    activations.wrong_subspace,
    activations.plain_lora,
    tensors.v1_trained,
    activations.data_shift,
    activations.underflow,
    activations.strength,
)

_OF_WHOLE: Sequence[Callable[[Case], Iterator[Diagnosis]]] = (activations.non_finite, activations.strength)
"""Those of an update that is a whole matrix, which has neither A nor B."""

_PROVEN: Sequence[Callable[[Case], Iterator[Diagnosis]]] = (
    tensors.b_trained,
    tensors.b_rescaled,
    tensors.nothing_learned,
    tensors.scale_wrong,
    tensors.wrong_base,
    tensors.outside,
    activations.data_shift,
)
"""Those that find what an audit saw, whatever the figures."""
