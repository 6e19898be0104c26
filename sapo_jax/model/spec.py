"""One parameter of the table: shape, logical axes, initialiser, and the tensors of files it is."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import jax
import numpy as np

LOOKED_UP = ("vocab", "positions")  # axes of tables that rows are taken from


@dataclasses.dataclass(frozen=True)
class Spec:
    """One parameter; those of layers are described without their leading L axis, see `stacked`.

    Attributes:
      shape: sizes of the axes.
      axes: logical names of the axes.
      hf_name: name in a Hugging Face checkpoint, with a ``{}`` for the layer's number and one for
        the expert's.
      fan_in: inputs of a linear map, whose initial variance is 1/fan_in; 0 for norms and biases.
      scale: multiplies the initial standard deviation; where fan_in is 0, the initial value.
      layers: numbers of the layers that have it, the order along the leading axis.
      dtype: where it is not ``config.param_dtype``.
      kernel: sizes of a convolution's window in the files, where inputs are one axis here.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    hf_name: str
    fan_in: int = 0
    scale: float = 1.0
    layers: tuple[int, ...] = ()
    dtype: str | None = None
    kernel: tuple[int, ...] = ()

    @property
    def transposed(self) -> bool:
        """Hugging Face's linear weights are [out, in]; ours are [in..., out...]."""
        return self.fan_in > 0 and not set(self.axes) & set(LOOKED_UP)

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the axes along which tensors of the files are stacked: layers, experts."""
        return self.shape[: self.hf_name.count("{}")]

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of each tensor of the files."""
        own = self.shape[len(self.lead) :]
        if self.transposed:
            return (math.prod(own) // self.fan_in, *(self.kernel or (self.fan_in,)))
        return own if self.fan_in else (math.prod(own),)

    def name(self, at: tuple[int, ...]) -> str:
        """The name in the files of the tensor at a place along the leading axes."""
        numbers = (self.layers[at[0]], *at[1:]) if at else ()
        return self.hf_name.format(*numbers)

    def tensors(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """(place along the leading axes, name in the files) of each tensor."""
        for at in itertools.product(*map(range, self.lead)):
            yield at, self.name(at)

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """A tensor of the files in the shape that it has here."""
        if self.transposed:
            tensor = tensor.reshape(-1, self.fan_in).T
        return tensor.reshape(self.shape[len(self.lead) :])

    def to_hf(self, leaf: jax.Array, at: tuple[int, ...]) -> np.ndarray:
        """The tensor of the files at a place of the parameter."""
        own = np.asarray(leaf[at])
        if self.transposed:
            own = own.reshape(self.fan_in, -1).T
        return np.ascontiguousarray(own.reshape(self.hf_shape))


def stacked(table: dict[str, Spec]) -> dict[str, Spec]:
    """The specs of layers with their leading axis."""
    return {
        name: dataclasses.replace(
            spec, shape=(len(spec.layers), *spec.shape), axes=("layers", *spec.axes)
        )
        for name, spec in table.items()
    }
