"""Lossless coding of a file's tensors: DEFLATE (zlib), which gives frequent codes fewer bits.

Codes of few bits are not used equally often: of 4 bits a weight, about 3.5 are information. Numbers of several bytes are
split into planes first, all first bytes, then all second bytes, since signs and exponents repeat where mantissas do not.
"""

import zlib

import torch
from torch import Tensor


def deflate(tensor: Tensor, level: int) -> Tensor:
    """The tensor's bytes, coded: uint8 (n,). `level` is zlib's, 1 (fast) to 9 (small)."""
    octets = tensor.contiguous().flatten().view(torch.uint8).reshape(-1, tensor.element_size())
    coded = zlib.compress(octets.T.contiguous().numpy().tobytes(), level)
    return torch.frombuffer(bytearray(coded), dtype=torch.uint8)


def inflate(coded: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The tensor of that shape and type that `deflate` coded. No more bytes are decoded than it has.

    Raises:
        ValueError: the bytes are damaged, or they are another tensor's.
    """
    size = torch.empty((), dtype=dtype).element_size()
    expected, decoder = size * shape.numel(), zlib.decompressobj()
    if coded.dtype != torch.uint8:
        raise ValueError(f"coded tensors are uint8, and one is {coded.dtype}")
    try:
        octets = decoder.decompress(coded.numpy().tobytes(), expected + 1)
    except zlib.error as error:
        raise ValueError(f"a coded tensor is damaged ({error})") from None
    if len(octets) != expected or not (decoder.eof or expected == 0):
        raise ValueError(f"a coded tensor has {len(octets)} bytes or more, and {expected} are expected")
    if not expected:
        return torch.empty(shape, dtype=dtype)
    planes = torch.frombuffer(bytearray(octets), dtype=torch.uint8).view(size, -1)
    return planes.T.flatten().view(dtype).reshape(shape)
