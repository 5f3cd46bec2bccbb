"""Makes ggml.safetensors with gguf 0.19.0 and numpy 2.4.6: `python ggml.py`.

Per block type: random blocks (`<type>.bytes`) and their values (`<type>.values`); for the types
that are written also an input and its quantised bytes (`<type>.input`, `<type>.quantized`).
Scales are drawn as ordinary halves, so that no value is NaN.
"""

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file

rng = np.random.default_rng(20261123)
# Bytes per block and where its f16 fields start.
LAYOUTS = {
    "Q4_0": (18, [0]),
    "Q4_1": (20, [0, 2]),
    "Q5_0": (22, [0]),
    "Q5_1": (24, [0, 2]),
    "Q8_0": (34, [0]),
    "Q4_K": (144, [0, 2]),
    "Q5_K": (176, [0, 2]),
    "Q6_K": (210, [208]),
}
WRITTEN = ["Q8_0", "Q4_0", "Q4_1", "F16", "BF16"]

tensors = {}
for name, (size, halves) in LAYOUTS.items():
    blocks = rng.integers(0, 256, (4, size), dtype=np.uint8)
    for at in halves:
        scale = rng.normal(0, 0.1, 4).astype("<f2")
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(4, 2)
    tensors[f"{name}.bytes"] = blocks
    tensors[f"{name}.values"] = dequantize(blocks, T[name]).astype(np.float32)
for name in WRITTEN:
    values = rng.normal(0, 3, (8, 64)).astype(np.float32)
    tensors[f"{name}.input"] = values
    tensors[f"{name}.quantized"] = quantize(values, T[name]).view(np.uint8)
save_file(tensors, "ggml.safetensors")
