"""A reader of jaxvq files written from the format document alone: the Python standard library and numpy."""

import json
import math
import zlib

import ml_dtypes
import numpy as np

DTYPES = {"U32": "<u4", "I8": "i1", "F32": "<f4", "F16": "<f2", "I32": "<i4", "U8": "u1", "F64": "<f8", "I64": "<i8"}
DTYPES["BF16"] = ml_dtypes.bfloat16


def read_tensors(path):
    """(tensors by name, metadata), after comparing every checksum."""
    with open(path, "rb") as file:
        data = file.read()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    metadata = header.pop("__metadata__")
    tensors, pieces = {}, []
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        piece = data[begin + start : begin + stop]
        tensors[name] = np.frombuffer(piece, DTYPES[entry["dtype"]]).reshape(entry["shape"])
        pieces.append((start, stop, name, piece))
    crcs = [zlib.crc32(data[:begin])] + [zlib.crc32(piece) for _, _, name, piece in sorted(pieces) if name != "#crc32"]
    assert tensors.pop("#crc32").tolist() == crcs
    assert metadata["format"] == "jaxvq"
    assert metadata["version"] == "1"
    return tensors, metadata


def read_weights(path):
    """Every leaf by name, quantized ones decoded."""
    tensors, metadata = read_tensors(path)
    weights = {}
    for leaf in json.loads(metadata["leaves"]):
        name = leaf["name"]
        if "quantized" in leaf:
            parts = {key.split("#")[-1]: value for key, value in tensors.items() if key.rsplit("#", 1)[0] == name}
            weights[name] = decode(leaf["quantized"], parts)
        elif "empty" not in leaf:
            weights[name] = tensors[name]
    return weights


def decode(entry, parts):
    stack, layout = tuple(entry["stack"]), entry["layout"]
    dtype = ml_dtypes.bfloat16 if layout["dtype"] == "bfloat16" else np.dtype(layout["dtype"])
    weight = np.zeros(stack + tuple(layout["shape"]), dtype)
    for layer in np.ndindex(*stack):
        weight[layer] = decode_layer(entry, layout, {key: value[layer] for key, value in parts.items()})
    return weight


def decode_layer(entry, layout, parts):
    shape, out_axis, in_axis, dim = layout["shape"], layout["out_axis"], layout["in_axis"], layout["dim"]
    rest = [axis for axis in range(len(shape)) if axis not in (out_axis, in_axis)]
    row_axes = ([] if in_axis is None else [in_axis]) + rest
    rows = math.prod(shape[axis] for axis in row_axes)
    columns = 1 if out_axis is None else shape[out_axis]
    if layout["along_out"]:
        groups, outs = rows, (columns + layout["pad"]) // dim
    else:
        groups, outs = (rows + layout["pad"]) // dim, columns
    weight = np.zeros(shape)
    for index in np.ndindex(*shape):
        row = 0
        for axis in row_axes:
            row = row * shape[axis] + index[axis]
        column = 0 if out_axis is None else index[out_axis]
        g, out, j = (row, column // dim, column % dim) if layout["along_out"] else (row // dim, column, row % dim)
        weight[index] = decode_value(entry, parts, (g, out, j), (groups, outs))
    return weight


def decode_value(entry, parts, place, grid):
    g, out, j = place

    def pick(name):
        array = parts[name]
        block = [at * side // length for at, side, length in zip((g, out), array.shape[:2], grid, strict=True)]
        return array[tuple(block)]

    stages = parts["codes"].shape[2]
    codes = [read_code(entry, parts["codes"], (g, out), m) for m in range(stages)]
    bits = entry["bits"]
    if entry["decoder"] == "affine":
        zero = 0.5 if bits == 1 else 2 ** (bits - 1) - 1
        if "zero_point" in parts:
            zero = pick("zero_point")[0]
        return (np.float32(codes[0]) - np.float32(zero)) * np.float32(pick("scale")[0])
    total = np.float32(0)
    for m, code in enumerate(codes):
        value = np.float32(pick("vectors")[m, code, j])
        if "scale" in parts:
            scale = pick("scale")
            value *= np.float32(scale[m if scale.shape[0] > 1 else 0, 0, 0])
        total += value
    return total


def read_code(entry, words, place, m):
    axis, bits = entry["axis"], entry["bits"]
    line = words[:, place[1], m] if axis == 0 else words[place[0], :, m]
    stream = sum(int(word) << (32 * number) for number, word in enumerate(line))
    return stream >> (place[axis] * bits) & (2**bits - 1)
