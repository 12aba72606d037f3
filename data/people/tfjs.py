"""Converts small TensorFlow.js graph models (JSON + weight files) to ONNX.

Only the operations of plain convolutional embedders are known; any other is refused by name.
Pictures stay in TensorFlow's order (N, H, W, C); convolutions are wrapped in transpositions.
"""

import base64
import json
from pathlib import Path

import numpy as np

from viewdiff_nb.files import install_hint

STORED_DTYPES = {"float32": "<f4", "int32": "<i4"}
ELEMENTWISE = {"Add": "Add", "AddV2": "Add", "Sub": "Sub", "Mul": "Mul", "Maximum": "Max", "Minimum": "Min"}
TO_CHANNELS_FIRST, TO_CHANNELS_LAST = (0, 3, 1, 2), (0, 2, 3, 1)
OPSET, IR_VERSION = 18, 9


def read_weights(model, folder):
    """Name -> array of the weights that a tfjs `model.json` lists."""
    weights = {}
    for group in model["weightsManifest"]:
        content = b"".join((Path(folder) / path).read_bytes() for path in group["paths"])
        position = 0
        for entry in group["weights"]:
            if "quantization" in entry:
                raise ValueError(f"weight {entry['name']!r} is quantised, which is not supported")
            if entry["dtype"] not in STORED_DTYPES:
                raise ValueError(f"weight {entry['name']!r} has the unsupported dtype {entry['dtype']!r}")
            dtype = np.dtype(STORED_DTYPES[entry["dtype"]])
            count = int(np.prod(entry["shape"], dtype=np.int64))
            if position + count * dtype.itemsize > len(content):
                end = position + count * dtype.itemsize
                raise ValueError(
                    f"weight {entry['name']!r} needs bytes {position}..{end}, but "
                    f"{', '.join(group['paths'])} hold {len(content)}: the download is incomplete"
                )
            array = np.frombuffer(content, dtype, count, position).reshape(entry["shape"])
            weights[entry["name"]] = array
            position += array.nbytes
        if position != len(content):
            raise ValueError(f"{', '.join(group['paths'])} hold {len(content)} bytes, the model lists {position}")
    return weights


def text(value):
    """A tfjs string attribute, which is stored in base64."""
    return base64.b64decode(value["s"]).decode()


def integers(value):
    """A tfjs list of integers."""
    return [int(item) for item in value["list"]["i"]]


class GraphConverter:
    """Collects ONNX nodes for the nodes of one tfjs graph."""

    def __init__(self, weights):
        self._weights = weights
        self.nodes, self.initialisers, self.inputs = [], {}, []

    def add_node(self, node):
        """Translate one tfjs node."""
        op, name = node["op"], node["name"]
        inputs = [source.split(":")[0] for source in node.get("input", ())]
        attributes = node.get("attr", {})
        if op == "Const":
            return
        if op == "Placeholder":
            self._placeholder(name, attributes)
        elif op in ELEMENTWISE:
            self._emit(ELEMENTWISE[op], [self._tensor(source) for source in inputs], name)
        elif op in ("Conv2D", "DepthwiseConv2dNative"):
            self._convolution(op, name, inputs, attributes)
        elif op == "Pad":
            before_after = self._weights[inputs[1]].T.reshape(-1)
            pads = self._constant(f"{name}/pads", before_after.astype(np.int64))
            self._emit("Pad", [self._tensor(inputs[0]), pads], name)
        elif op == "Reshape":
            shape = self._constant(f"{name}/shape", self._weights[inputs[1]].reshape(-1).astype(np.int64))
            self._emit("Reshape", [self._tensor(inputs[0]), shape], name)
        elif op == "MatMul":
            if any(attributes.get(side, {}).get("b") for side in ("transpose_a", "transpose_b")):
                raise ValueError(f"node {name!r}: a transposed MatMul is not supported")
            self._emit("MatMul", [self._tensor(source) for source in inputs], name)
        else:
            raise ValueError(f"node {name!r} is a {op!r}, which is not supported")

    def _emit(self, op, inputs, output, **attributes):
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def _constant(self, name, array):
        from onnx import numpy_helper

        self.initialisers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def _tensor(self, name):
        """The ONNX name of a tfjs tensor; weights become initialisers when first used."""
        if name in self._weights and name not in self.initialisers:
            self._constant(name, self._weights[name])
        return name

    def _placeholder(self, name, attributes):
        from onnx import TensorProto, helper

        sizes = [int(dimension["size"]) for dimension in attributes["shape"]["shape"]["dim"]]
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *sizes[1:]]))

    def _convolution(self, op, name, inputs, attributes):
        kernel = self._weights[inputs[1]]  # (height, width, in, out or multiplier)
        height, width, channels, last = kernel.shape
        if op == "Conv2D":
            groups, kernel = 1, kernel.transpose(3, 2, 0, 1)
        else:
            groups, kernel = channels, kernel.transpose(2, 3, 0, 1).reshape(channels * last, 1, height, width)
        if "data_format" in attributes and text(attributes["data_format"]) != "NHWC":
            raise ValueError(f"node {name!r}: data format {text(attributes['data_format'])!r} is not supported")
        padding = text(attributes["padding"])
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"node {name!r}: padding {padding!r} is not supported")
        dilations = integers(attributes["dilations"])[1:3] if "dilations" in attributes else [1, 1]
        if padding == "SAME" and dilations != [1, 1]:
            raise ValueError(f"node {name!r}: dilations {dilations} with padding SAME are not supported")
        weights = self._constant(f"{name}/kernel", kernel)
        picture = self._emit("Transpose", [self._tensor(inputs[0])], f"{name}/in", perm=TO_CHANNELS_FIRST)
        result = self._emit(
            "Conv",
            [picture, weights],
            f"{name}/out",
            group=groups,
            dilations=dilations,
            strides=integers(attributes["strides"])[1:3],
            auto_pad="SAME_UPPER" if padding == "SAME" else "VALID",
        )
        self._emit("Transpose", [result], name, perm=TO_CHANNELS_LAST)


def convert_graph(path, output):
    """Convert a tfjs graph model.

    Args:
        path: its `model.json`; the weight files lie beside it.
        output: name of the node whose value is wanted, of shape (N, D).

    Returns:
        a checked `onnx.ModelProto` with one float input (N, H, W, C) and one float output (N, D).
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError(f"converting the recogniser needs onnx: {install_hint('heads')}") from error
    path = Path(path)
    model = json.loads(path.read_text())
    nodes = model["modelTopology"]["node"]
    if output not in {node["name"] for node in nodes}:
        raise ValueError(f"{path} has no node {output!r}; its last node is {nodes[-1]['name']!r}")
    converter = GraphConverter(read_weights(model, path.parent))
    for node in nodes:
        converter.add_node(node)
    outputs = [onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, ["N", None])]
    graph = onnx.helper.make_graph(
        converter.nodes, path.stem, converter.inputs, outputs, list(converter.initialisers.values())
    )
    result = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)])
    result.ir_version = IR_VERSION
    onnx.checker.check_model(result)
    return result
