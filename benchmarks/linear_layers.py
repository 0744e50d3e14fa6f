"""The linear layers of a preset's blocks alone, in PyTorch or ONNX Runtime: no norms, no head.

    python -m benchmarks.linear_layers KIND PRESET [-t THREADS] [-p PROMPT] [-n STEPS]

prints {"ppP": tokens/s, "tgN": tokens/s} as JSON. What a whole model would reach is less.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from bitskip_ref.config import ModelConfig, preset

Run = Callable[[int], object]
"""Runs every linear layer once on that many tokens."""

KINDS = {
    "torch-f32": "torch float32",
    "torch-bf16": "torch bfloat16",
    "torch-int8": "torch int8 (dynamic)",
    "ort-int8": "onnxruntime MatMulInteger",
    "ort-2bit": "onnxruntime MatMulNBits 2 bits (not exact)",
    "ort-f32": "onnxruntime float32",
}


def torch_layers(config: ModelConfig, kind: str, threads: int) -> Run:
    """Modules `torch.nn.Linear`, or what quantizing them dynamically gives."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if kind == "torch-bf16" else torch.float32
    shapes = config.linear_shapes().values()
    layers = []
    for _ in range(config.num_hidden_layers):
        made = [torch.nn.Linear(n_in, n_out, bias=False, dtype=dtype) for n_out, n_in in shapes]
        if kind == "torch-int8":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "deprecated": there is no other in torch itself
                whole = torch.nn.Sequential(*made)
                made = list(torch.ao.quantization.quantize_dynamic(whole, dtype=torch.qint8))
        layers += made
    inputs: dict[int, dict[int, Any]] = {}

    def run(tokens: int) -> None:
        if tokens not in inputs:
            widths = config.linear_inputs()
            inputs[tokens] = {n: torch.randn(tokens, n, dtype=dtype) for n in widths}
        with torch.inference_mode():
            for layer in layers:
                layer(inputs[tokens][layer.in_features])

    return run


def onnx_layers(config: ModelConfig, kind: str, threads: int) -> Run:
    """One graph in which each block's layers follow each other; casts and maxima join them."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes: list[Any] = []
    weights: list[Any] = []
    outputs: list[str] = []

    def constant(values: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(values, f"w{len(weights)}"))
        return weights[-1].name

    def node(op: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [f"n{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    def linear(x: str, name: str) -> str:
        rows, width = config.linear_shapes()[name]
        if kind == "ort-int8":
            codes = rng.integers(-1, 2, (width, rows), np.int8)
            return node("Cast", node("MatMulInteger", x, constant(codes)), to=TensorProto.UINT8)
        if kind == "ort-f32":
            return node("MatMul", x, constant(rng.standard_normal((width, rows), np.float32)))
        blocks = width // 128
        packed = constant(rng.integers(0, 256, (rows, blocks, 32), np.uint8))
        scales = constant(np.full(rows * blocks, 1e-2, np.float32))
        shape = {"K": width, "N": rows, "bits": 2, "block_size": 128, "accuracy_level": 4}
        return node("MatMulNBits", x, packed, scales, domain="com.microsoft", **shape)

    x = "x"
    for _ in range(config.num_hidden_layers):
        outputs += [linear(x, "k_proj"), linear(x, "v_proj")]
        x = linear(linear(x, "q_proj"), "o_proj")
        up = linear(x, "up_proj")
        x = linear(node("Max", linear(x, "gate_proj"), up) if config.gated else up, "down_proj")
    outputs.append(x)
    number = TensorProto.UINT8 if kind == "ort-int8" else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "linear layers",
        [helper.make_tensor_value_info("x", number, ["tokens", config.hidden_size])],
        [helper.make_tensor_value_info(name, number, None) for name in outputs],
        weights,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = _session(model, options, onnx, ort)
    dtype = np.uint8 if kind == "ort-int8" else np.float32

    def run(tokens: int) -> Any:
        return session.run(None, {"x": np.ones((tokens, config.hidden_size), dtype)})

    return run


def _session(model: Any, options: Any, onnx: Any, ort: Any) -> Any:
    """A session of a model that may be larger than a protobuf message can be."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layers.onnx"
        onnx.save(model, path, save_as_external_data=True, location="weights")
        return ort.InferenceSession(path, options)


def speeds(run: Run, prompt: int, steps: int) -> dict[str, float]:
    """Tokens/s of a prompt in one call and of single tokens, each after an unmeasured run."""
    found = {}
    for name, tokens, times in ((f"pp{prompt}", prompt, 1), (f"tg{steps}", 1, steps)):
        run(tokens)
        start = time.perf_counter()
        for _ in range(times):
            run(tokens)
        found[name] = tokens * times / (time.perf_counter() - start)
    return found


def main() -> None:
    """Print the two speeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("preset")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--steps", type=int, default=64)
    options = parser.parse_args()
    config = preset(options.preset).replace(hadamard=False)
    layers = torch_layers if options.kind.startswith("torch") else onnx_layers
    run = layers(config, options.kind, options.threads)
    print(json.dumps(speeds(run, options.prompt, options.steps)))


if __name__ == "__main__":
    main()
