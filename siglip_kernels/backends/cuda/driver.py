"""The CUDA driver by ctypes: loads compiled kernels, encodes tensor maps, launches."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from ctypes import addressof, byref, c_char_p, c_int, c_uint32, c_uint64, c_void_p
from typing import Any

import torch

# Of cuda.h.
_INVALID_CONTEXT = 201
_MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_DATA_TYPES = {torch.float16: 6, torch.bfloat16: 9}  # CU_TENSOR_MAP_DATA_TYPE_
_SWIZZLE_128B, _L2_PROMOTION_256B, _NO_INTERLEAVE, _FILL_ZEROS = 3, 3, 0, 0
_MAP_BYTES = _MAP_ALIGNMENT = 128


class DriverError(RuntimeError):
    """The driver is not there, or refused a call."""


@functools.cache
def load() -> ctypes.CDLL:
    """libcuda, which comes with NVIDIA's driver; DriverError without it or if it is too old for tensor maps."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        library.cuTensorMapEncodeTiled  # noqa: B018, since CUDA 12.0
    except (OSError, AttributeError) as error:
        raise DriverError(f"no driver for CUDA 12 or later: {error}") from error
    return library


@functools.cache
def version() -> tuple[int, int]:
    """(major, minor) of the newest CUDA version that the driver is for."""
    number = c_int()
    _check("cuDriverGetVersion", load().cuDriverGetVersion(byref(number)))
    return number.value // 1000, number.value % 1000 // 10


def load_kernel(cubin: bytes, name: str, shared_bytes: int, device: int) -> c_void_p:
    """A kernel on ``device`` with that much dynamic shared memory."""
    module, function = c_void_p(), c_void_p()
    _use_primary_context(device)
    _check("cuModuleLoadData", load().cuModuleLoadData(byref(module), cubin))
    _check("cuModuleGetFunction", load().cuModuleGetFunction(byref(function), module, name.encode()))
    _check("cuFuncSetAttribute", load().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_BYTES, shared_bytes))
    return function


@functools.lru_cache(64)
def tensor_map(
    dtype: torch.dtype, address: int, rows: int, columns: int, stride: int, box: tuple[int, int]
) -> ctypes.Array[Any]:
    """The tensor map of a [rows, columns] matrix of half precision, for TMA in boxes of (rows, columns).

    ``stride``: elements from row to row. Boxes are swizzled by 128 bytes; loads out of bounds give 0.
    """
    storage = (ctypes.c_byte * (_MAP_BYTES + _MAP_ALIGNMENT))()
    result = (ctypes.c_byte * _MAP_BYTES).from_buffer(storage, -addressof(storage) % _MAP_ALIGNMENT)
    shape, strides = (c_uint64 * 2)(columns, rows), (c_uint64 * 1)(stride * dtype.itemsize)
    box_shape, ones = (c_uint32 * 2)(*reversed(box)), (c_uint32 * 2)(1, 1)
    options = _NO_INTERLEAVE, _SWIZZLE_128B, _L2_PROMOTION_256B, _FILL_ZEROS
    matrix = c_void_p(address), shape, strides, box_shape, ones
    _check("cuTensorMapEncodeTiled", load().cuTensorMapEncodeTiled(result, _DATA_TYPES[dtype], 2, *matrix, *options))
    return result


def launch(
    function: c_void_p, blocks: int, threads: int, shared_bytes: int, arguments: Sequence[Any], device: int, stream: int
) -> None:
    """Launch on a stream of ``device``. ``arguments``: ctypes objects, the kernel's parameters."""
    pointers = struct.pack(f"{len(arguments)}P", *map(addressof, arguments))
    launch_kernel, shape = load().cuLaunchKernel, (blocks, 1, 1, threads, 1, 1, shared_bytes)
    error = launch_kernel(function, *shape, c_void_p(stream), pointers, None)
    if error == _INVALID_CONTEXT:
        _use_primary_context(device)
        error = launch_kernel(function, *shape, c_void_p(stream), pointers, None)
    _check("cuLaunchKernel", error)


def _use_primary_context(device: int) -> None:
    """A thread that has not called CUDA's runtime has no context yet: give it torch's."""
    context, number = c_void_p(), c_int()
    _check("cuCtxGetCurrent", load().cuCtxGetCurrent(byref(context)))
    if not context:
        _check("cuDeviceGet", load().cuDeviceGet(byref(number), device))
        _check("cuDevicePrimaryCtxRetain", load().cuDevicePrimaryCtxRetain(byref(context), number))
        _check("cuCtxSetCurrent", load().cuCtxSetCurrent(context))


def _check(call: str, error: int) -> None:
    if error:
        text = c_char_p()
        load().cuGetErrorString(error, byref(text))
        raise DriverError(f"{call}: {(text.value or b'error %d' % error).decode()}")
