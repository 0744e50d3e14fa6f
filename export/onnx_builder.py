"""Collecting ONNX nodes, constants and weights; knows nothing of models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from bitskip_ref.floats import BFLOAT16

# The first opset and file version with 2-bit integers.
OPSET, IR_VERSION = 25, 13
ALIGNMENT = 64  # of weights in an external file

Dim = int | str


@dataclass(frozen=True)
class Weight:
    """A tensor too large for a constant: raw little-endian bytes under an ONNX type."""

    data: np.ndarray  # uint8 [bytes]
    onnx_type: int
    shape: tuple[int, ...]


class GraphBuilder:
    """Nodes of one graph; `child` makes the body of a Scan, which sees everything outside it."""

    def __init__(self, parent: GraphBuilder | None = None) -> None:
        self.root: GraphBuilder = parent.root if parent else self
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}
        self.weights: dict[str, Weight] = {}
        self.scope_name: str = parent.scope_name if parent else ""
        self.described: list[onnx.ValueInfoProto] = []
        self.made = 0

    def child(self) -> GraphBuilder:
        """A builder for the body of a `scan`; its constants and weights belong to the root."""
        return GraphBuilder(self)

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names of nodes made inside start with `name/`."""
        outer, self.scope_name = self.scope_name, f"{self.scope_name}{name}/"
        try:
            yield
        finally:
            self.scope_name = outer

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Add a node with one output, called `name` or after the scope; returns that name."""
        return self._ops(kind, *inputs, name=name, **attributes)[0]

    def halves(self, x: str, axis: int) -> list[str]:
        """Cut x into two along an axis of even length."""
        return self._ops("Split", x, count=2, axis=axis, num_outputs=2)

    def split(self, x: str, axis: int, sizes: Sequence[int]) -> list[str]:
        """Cut x into parts of these lengths along an axis."""
        return self._ops("Split", x, self.const(np.array(sizes)), count=len(sizes), axis=axis)

    def scan(
        self,
        body: GraphBuilder,
        inputs: Mapping[str, onnx.ValueInfoProto],
        output: onnx.ValueInfoProto,
    ) -> str:
        """Run a body for each index of the first axis of the inputs, and stack what it gives.

        `inputs`: tensor -> the body's input that receives its rows; body and output are described
        without that axis.
        """
        graph = helper.make_graph(body.nodes, "body", list(inputs.values()), [output])
        return self.op("Scan", *inputs, body=graph, num_scan_inputs=len(inputs))

    def describe(self, x: str, kind: type, shape: Sequence[Dim]) -> None:
        """State the shape of x where ONNX cannot infer it.

        Without this, ONNX Runtime takes each buffer for one of a kind, and its planning of memory
        takes time quadratic in the number of nodes: half a minute for 24 blocks.
        """
        self.described.append(value_info(x, kind, shape))

    def cast(self, x: str, kind: type) -> str:
        """x as another NumPy type."""
        return self.op("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(kind)))

    def pad(self, x: str, axis: int, amounts: str) -> str:
        """x with float zeros before and after one axis, by `amounts` int64 [2]."""
        return self.op("Pad", x, amounts, self.const(np.float32(0.0)), self.const(np.array([axis])))

    def reshape(self, x: str, *shape: int) -> str:
        """x in another shape; 0 keeps an axis, -1 is what is left."""
        return self.op("Reshape", x, self.const(np.array(shape, np.int64)))

    def const(self, value: np.ndarray | np.generic) -> str:
        """A small constant; equal ones are stored once."""
        value = np.asarray(value)
        key = (value.dtype.str, value.shape, value.tobytes())
        known = self.root.constants
        if key not in known:
            known[key] = onnx.numpy_helper.from_array(value, f"constant_{len(known)}")
        return known[key].name

    def weight(self, name: str, value: np.ndarray) -> str:
        """A large constant under a name of its own; BFLOAT16 is bfloat16 there, too."""
        kind = onnx.TensorProto.BFLOAT16
        if value.dtype != BFLOAT16:
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        return self._add_weight(name, Weight(raw, kind, value.shape))

    def int2_weight(self, name: str, codes: np.ndarray) -> str:
        """Integers in -2..1 as an INT2 tensor: two's complement, four a byte, first lowest."""
        flat = np.zeros(-(-codes.size // 4) * 4, np.uint8)
        flat[: codes.size] = codes.reshape(-1).view(np.uint8) & 3
        a, b, c, d = (flat[i::4] for i in range(4))
        raw = a | b << 2 | c << 4 | d << 6
        return self._add_weight(name, Weight(raw, onnx.TensorProto.INT2, codes.shape))

    def _add_weight(self, name: str, weight: Weight) -> str:
        self.root.weights[name] = weight
        return name

    def _ops(
        self, kind: str, *inputs: str, count: int = 1, name: str | None = None, **attributes: Any
    ) -> list[str]:
        self.root.made += 1
        name = name or f"{self.scope_name}{kind}_{self.root.made}"
        names = [name, *(f"{name}.{i}" for i in range(1, count))]
        self.nodes.append(helper.make_node(kind, inputs, names, name, **attributes))
        return names

    def model(
        self,
        name: str,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        metadata: Mapping[str, str],
        external: tuple[str, Mapping[str, int]] | None = None,
    ) -> onnx.ModelProto:
        """The whole model. `external`: (file name, byte offset of each weight in that file)."""
        initializers = list(self.constants.values())
        for key, weight in self.weights.items():
            tensor = onnx.TensorProto(name=key, data_type=weight.onnx_type, dims=weight.shape)
            if external is None:
                tensor.raw_data = weight.data.tobytes()
            else:
                location, offsets = external
                tensor.data_location = onnx.TensorProto.EXTERNAL
                place = {"location": location, "offset": offsets[key], "length": weight.data.size}
                for field, value in place.items():
                    tensor.external_data.add(key=field, value=str(value))
            initializers.append(tensor)
        graph = helper.make_graph(
            self.nodes, name, inputs, outputs, initializers, value_info=self.described
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="bitskip",
        )
        helper.set_model_props(model, dict(metadata))
        return model


def value_info(name: str, kind: type, shape: Sequence[Dim]) -> onnx.ValueInfoProto:
    """Type and shape of a graph's input or output; text stands for a length known when it runs."""
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    return helper.make_tensor_value_info(name, dtype, shape)


def lay_out(weights: Mapping[str, Weight]) -> tuple[dict[str, int], int]:
    """(offset of each weight, total bytes) in an external file, aligned."""
    offsets, end = {}, 0
    for name, weight in weights.items():
        offsets[name] = end
        end = math.ceil((end + weight.data.size) / ALIGNMENT) * ALIGNMENT
    return offsets, end
