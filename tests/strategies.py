"""Inputs for the equations that hypothesis draws: ordinary ones, and those on which implementations break.

Arrays come as float32 values, so that the package and the float64 reference see exactly the same numbers.
"""

import hypothesis.extra.numpy as hnp
import numpy as np
from hypothesis import strategies as st

# (B, C, h, w)
map_shapes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))

# The halves' largest value, what "minus infinity" is written as, and what is almost nothing.
EXTREME = [0.0, -0.0, 1.0, -1.0, 1e-6, -1e-6, 1e4, -1e4, 65504.0, -65504.0, -1e9]


def logits(shape: tuple[int, ...], extreme: bool = True) -> st.SearchStrategy[np.ndarray]:
    """Class scores: ordinary and extreme, tied, or all the same."""
    ordinary = st.floats(-20, 20, width=32).map(lambda value: 0.0 if abs(value) < 1e-20 else value)
    elements = ordinary | st.sampled_from(EXTREME) if extreme else ordinary
    constant = elements.map(lambda value: np.full(shape, value, np.float32))
    return hnp.arrays(np.float32, shape, elements=elements) | constant


def tags(shape: tuple[int, int]) -> st.SearchStrategy[np.ndarray]:
    """Multi-hot tags: some, none at all, all, or one class in every image."""
    one = np.zeros(shape, np.float32)
    one[:, 0] = 1
    some = hnp.arrays(np.float32, shape, elements=st.sampled_from([0.0, 1.0]))
    return some | st.just(np.zeros(shape, np.float32)) | st.just(np.ones(shape, np.float32)) | st.just(one)


def masks(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    """Valid positions: some, none (all padding), or all."""
    return hnp.arrays(bool, shape) | st.just(np.zeros(shape, bool)) | st.just(np.ones(shape, bool))


def thresholds() -> st.SearchStrategy[float]:
    """xi in (0, 1), as near to either bound as float32 comes."""
    ordinary = st.floats(2**-10, 1 - 2**-10, width=32)
    return ordinary | st.sampled_from([0.5, 2**-100, 2**-20, 1 - 2**-20, 1 - 2**-24])


def confidences(shape: tuple[int, ...], threshold: float) -> st.SearchStrategy[np.ndarray]:
    """Normalised CAM values in [0, 1], many of them at the threshold or right beside it."""
    xi = np.float32(threshold)
    beside = [float(np.nextafter(xi, np.float32(side))) for side in (0, 1)]
    elements = st.floats(0, 1, width=32) | st.sampled_from([0.0, 1.0, float(xi), *beside])
    return hnp.arrays(np.float32, shape, elements=elements)


def probabilities(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    """SPL (B, K, h, w): flat, one-hot and all between."""

    def normalised(values: np.ndarray) -> np.ndarray:
        values = values + np.float32(1e-6)
        return values / values.sum(axis=1, keepdims=True)

    return hnp.arrays(np.float32, shape, elements=st.floats(0, 1, width=32) | st.sampled_from([0.0, 1.0])).map(
        normalised
    )
