"""GGUF files: metadata to `ModelConfig`, quantised tensors to float32 under Hugging Face names."""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFEndian, GGUFReader, GGUFValueType, ReaderTensor
from gguf.quants import dequantize

from star_attention.errors import UserError, reason_of, refusing
from star_attention.models.fields import Fields
from star_attention.models.gguf_config import ROPE_FACTORS, read_config
from star_attention.models.gguf_name import split_files
from star_attention.models.weights import Checkpoint, Weight, check_stored, weight_table

_LONG_ARRAY = 1024


def read_header(path: Path) -> Fields:
    """A GGUF file's metadata, without arrays longer than 1,024 values.

    Raises:
        UserError: the file is truncated or not GGUF.
        OSError: it cannot be read.
    """
    return _header(path, _read(path))


def open_gguf(path: Path) -> Checkpoint:
    """Reads the headers of a file and of those that it is split into; tensors are dequantised when
    asked for.

    Raises:
        UserError: a file is missing, truncated or not GGUF, its architecture is not supported, or
            there are other weights than it asks for.
        OSError: a file cannot be read.
    """
    readers = _read_parts(path)
    header = _header(path, readers[0])
    tensors: dict[str, ReaderTensor] = {}
    for reader in readers:
        for tensor in reader.tensors:
            if tensor.name in tensors:
                raise UserError(f"{path}: {tensor.name!r} is in two of the files it is split into")
            tensors[tensor.name] = tensor
    config = read_config(path, header, tensors, functools.partial(_numbers, path, tensors))
    shapes = {
        name: tuple(map(int, reversed(tensor.shape)))
        for name, tensor in tensors.items()
        if name not in ROPE_FACTORS
    }
    check_stored(path, shapes, (weight.gguf for weight in weight_table(config)))
    interleaved = header.get("general.architecture") == "llama"

    def tensor(weight: Weight) -> torch.Tensor:
        stored = weight.gguf
        values = _values(path, tensors[stored.name], slice(stored.begin, stored.end))
        values = values.view(weight.shape)
        if interleaved and weight.rotary_heads:
            # llama.cpp stores rotary pairs side by side; Hugging Face keeps them half a head apart.
            pairs = values.view(weight.rotary_heads, -1, 2, *values.shape[1:])
            values = pairs.transpose(1, 2).reshape(values.shape)
        return weight.arranged(values)

    return Checkpoint(path, config, tensor)


def _values(path: Path, stored: ReaderTensor, rows: slice) -> torch.Tensor:
    try:
        return torch.from_numpy(dequantize(stored.data[rows], stored.tensor_type))
    except (NotImplementedError, ValueError, TypeError):
        raise UserError(
            f"{path}: {stored.name} is stored as {stored.tensor_type.name}, which is not read"
        ) from None


def _numbers(path: Path, tensors: Mapping[str, ReaderTensor], name: str) -> list[float]:
    return _values(path, tensors[name], slice(None)).flatten().tolist()


def _read(path: Path) -> GGUFReader:
    path.open("rb").close()  # or why not
    # The library trusts the file.
    with refusing(f"{path} is truncated or not GGUF"), np.errstate(all="raise"):
        reader = _HeaderReader(path, "c")  # copies of what is written, so that torch takes it
    if reader.endianess is not GGUFEndian.LITTLE:
        raise UserError(f"{path} is big-endian, which is not read")
    return reader


def _read_parts(path: Path) -> list[GGUFReader]:
    """Of all files that the model is split into."""
    files = split_files(path)
    readers = [_read(file) for file in files]
    for index, (file, reader) in enumerate(zip(files, readers, strict=True)):
        header = _header(file, reader)
        count, number = header.whole("split.count", 1, 0), header.whole("split.no", 0, 0)
        if max(count, 1) != len(files) or number != index:
            raise UserError(
                f"{file} says that it is part {number + 1} of {count}, which is not its name: "
                "use the names that it was split into, NAME-00001-of-0000N.gguf"
            )
    found = sum(len(reader.tensors) for reader in readers)
    wanted = _header(path, readers[0]).whole("split.tensors.count", found, 0)
    if len(files) > 1 and wanted != found:
        raise UserError(f"{path}: the files have {found} tensors in all, not {wanted}")
    return readers


class _HeaderReader(GGUFReader):
    """Skips long arrays: a vocabulary takes seconds to read, and weights do not need it."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list, list]:
        if raw_type == GGUFValueType.ARRAY and self.byte_order != "S":
            data = memoryview(self.data)
            kind, count = struct.unpack_from("<IQ", data, orig_offs)
            if count > _LONG_ARRAY:
                end = orig_offs + struct.calcsize("<IQ")
                if kind == GGUFValueType.STRING:
                    for _ in range(count):
                        end += 8 + struct.unpack_from("<Q", data, end)[0]
                else:
                    end += count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
                return end - orig_offs, [], [], [GGUFValueType.ARRAY]
        return super()._get_field_parts(orig_offs, raw_type)


def _header(path: Path, reader: GGUFReader) -> Fields:
    try:
        values = {name: field.contents() for name, field in reader.fields.items() if field.data}
    except (ValueError, IndexError, TypeError) as error:
        raise UserError(f"{path}: the header is damaged: {reason_of(error)}") from None
    return Fields(values, f"{path}: the header")
