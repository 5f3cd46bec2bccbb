"""Makes dtypes.safetensors with safetensors 0.8.0: `python dtypes.py`.

One tensor of every type, three numbers each, in an order that is neither the file's nor sorted.
"""

import ctypes
import struct

from safetensors import TensorSpec, serialize

NUMBERS = {
    "bool": bytes([0, 1, 1]),
    "uint8": bytes([0, 127, 255]),
    "int8": bytes([0, 127, 128]),
    "float8_e5m2": bytes([0x3C, 0xBD, 0x7B]),  # 1, -1.25, 57344
    "float8_e4m3fn": bytes([0x38, 0xB9, 0x7E]),  # 1, -1.125, 448
    "int16": struct.pack("<3h", 0, 32767, -32768),
    "uint16": struct.pack("<3H", 0, 1, 65535),
    "float16": struct.pack("<3e", 0.5, -2.0, 65504.0),
    "bfloat16": bytes([0x80, 0x3F, 0x49, 0xC0, 0x00, 0x00]),  # 1, -3.140625, 0
    "int32": struct.pack("<3i", 0, 2147483647, -2147483648),
    "uint32": struct.pack("<3I", 0, 1, 4294967295),
    "float32": struct.pack("<3f", 0.1, -2.5, 3.4e38),
    "float64": struct.pack("<3d", 0.1, -2.5, 1e30),
    "int64": struct.pack("<3q", 0, 2**62, -(2**63)),
    "uint64": struct.pack("<3Q", 0, 1, 2**63 - 1),
}
kept = []


def spec(dtype, shape, data):
    buffer = ctypes.create_string_buffer(data, max(len(data), 1))
    kept.append(buffer)
    address = ctypes.addressof(buffer)
    return TensorSpec(dtype=dtype, shape=shape, data_ptr=address, data_len=len(data))


tensors = {f"x.{name}": spec(name, [3], data) for name, data in reversed(NUMBERS.items())}
tensors["scalar"] = spec("float32", [], struct.pack("<f", 1.5))
tensors["empty"] = spec("float32", [0, 4], b"")
tensors['quoted "ü"\n'] = spec("int8", [1, 1], b"\x07")
with open("dtypes.safetensors", "wb") as file:
    file.write(serialize(tensors, {"made by": 'safetensors "0.8.0"'}))
