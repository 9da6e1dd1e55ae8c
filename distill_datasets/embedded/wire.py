"""The SDK's protobuf messages, and its tensors as arrays."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .failures import RequestError

if TYPE_CHECKING:
    from tinker.proto import tinker_public_pb2 as pb
else:

    def _public_proto() -> Any:
        """Load the SDK's messages alone: importing `tinker` itself takes seconds."""
        loaded = sys.modules.get("tinker.proto.tinker_public_pb2")
        if loaded is not None:
            return loaded
        package = importlib.util.find_spec("tinker")
        folder = Path(package.submodule_search_locations[0])
        name = f"{__package__}._tinker_public_pb2"
        spec = importlib.util.spec_from_file_location(
            name, folder / "proto" / "tinker_public_pb2.py"
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    pb = _public_proto()

__all__ = ["Array", "Floats", "Ints", "Layout", "pb", "read_json_tensor", "read_tensor"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Array = NDArray[Any]
_KINDS = {pb.DTYPE_FLOAT32: np.float32, pb.DTYPE_INT64: np.int64, pb.DTYPE_INT32: np.int32}


@dataclass(frozen=True)
class Layout:
    """Where the listed values of a sparse (CSR) tensor lie; the others have no value."""

    shape: tuple[int, int]
    row_starts: Ints
    columns: Ints

    @property
    def rows(self) -> Ints:
        """The row of each listed value."""
        return np.repeat(np.arange(self.shape[0]), np.diff(self.row_starts))

    def spread(self, values: Array, filler: int) -> Array:
        """The dense matrix, with `filler` where nothing is listed."""
        dense = np.full(self.shape, filler, values.dtype)
        dense[self.rows, self.columns] = values
        return dense

    def require(self, values: Array, name: str) -> None:
        """Refuse indices that lead out of the matrix, or that don't number the values."""
        rows, columns = self.shape
        starts = self.row_starts
        sound = (
            len(starts) == rows + 1
            and starts[0] == 0
            and starts[-1] == len(values) == len(self.columns)
            and bool((np.diff(starts) >= 0).all())
            and bool(((self.columns >= 0) & (self.columns < columns)).all())
        )
        if not sound:
            raise RequestError(
                f"expected {name} in CSR: {rows + 1} ascending row pointers that end at the number "
                f"of values, and columns below {columns}; found {len(starts)} row pointers, "
                f"{len(values)} values and {len(self.columns)} columns"
            )


def read_tensor(tensor: pb.Tensor, name: str) -> Array:
    """A tensor of one or two dimensions; what a sparse one doesn't list is 0."""
    if tensor.dtype not in _KINDS:
        raise RequestError(f"expected {name} as float32 or int64; found {tensor.dtype}")
    kind, shape = _KINDS[tensor.dtype], tuple(tensor.shape)
    if tensor.HasField("sparse_csr"):
        part = tensor.sparse_csr
        layout = Layout(
            _require_matrix(shape, name),
            np.frombuffer(part.crow_indices, np.int64),
            np.frombuffer(part.col_indices, np.int64),
        )
        values = np.frombuffer(part.values, kind)
        layout.require(values, name)
        return layout.spread(values, 0)
    values = np.frombuffer(tensor.dense, kind)
    return _shaped(values, shape or (len(values),), name)


def read_json_tensor(body: Mapping[str, Any], name: str) -> tuple[Array, Layout | None]:
    """A matrix of ids in the SDK's JSON, -1 where none is; its layout if it came sparse."""
    shape = _require_matrix(tuple(body.get("shape") or ()), name)
    values = np.asarray(body["data"], np.int64)
    if body.get("sparse_crow_indices") is None:
        return _shaped(values, shape, name), None
    layout = Layout(
        shape,
        np.asarray(body["sparse_crow_indices"], np.int64),
        np.asarray(body["sparse_col_indices"], np.int64),
    )
    layout.require(values, name)
    return layout.spread(values, -1), layout


def _shaped(values: Array, shape: Sequence[int], name: str) -> Array:
    if len(shape) > 2 or int(np.prod(shape)) != len(values):
        raise RequestError(
            f"expected {name} of shape (N,) or (N, K); found shape {tuple(shape)} and "
            f"{len(values)} values"
        )
    return values.reshape(shape)


def _require_matrix(shape: Sequence[int], name: str) -> tuple[int, int]:
    if len(shape) != 2:
        raise RequestError(f"expected {name} of shape (N, K); found shape {tuple(shape)}")
    return int(shape[0]), int(shape[1])
