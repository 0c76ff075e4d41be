"""Whether a call may go round torch's dispatcher, and whether a tensor's memory is what its address says.

The dispatcher serves every other kind of tensor and every mode: wrapper subclasses, fake and functional tensors, lazily
negated views, tracers, transforms. Going round it saves 15 µs a call, and is right only where no such thing is there.
So these functions know what is ordinary, and take nothing else for it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

# Whose tensors have memory that an address points to.
DEVICES = ("cpu", "cuda", "mps", "xpu")
_CLASSES = (Tensor, nn.Parameter)
_keys_of = torch._C._dispatch_keys
_included = torch._C._dispatch_tls_local_include_set


def _raw(*names: str) -> int:
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return functools.reduce(operator.or_, keys).raw_repr()


# Of dense tensors on each device, made in inference mode or not.
_ORDINARY_KEYS = {
    device: (
        _raw(device.upper(), f"Autocast{device.upper()}", f"Autograd{device.upper()}", "ADInplaceOrView"),
        _raw(device.upper(), f"Autocast{device.upper()}"),
    )
    for device in DEVICES
}
_ORDINARY_KEYS_ANYWHERE = frozenset(keys for of_device in _ORDINARY_KEYS.values() for keys in of_device)
# Of a thread without any mode, in inference mode or not.
_DEFAULT_KEYS = _raw("BackendSelect", "ADInplaceOrView"), _raw("BackendSelect")


def has_no_mode() -> bool:
    """Whether no compiler, dispatch mode, tracer or transform has to see this thread's calls, nor a forward-mode level.

    torch adds the keys of each mode that it enters to those that the thread includes by default.
    """
    if torch.compiler.is_compiling():
        return False
    return _included().raw_repr() in _DEFAULT_KEYS and forward_ad._current_level < 0


def are_ordinary(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all are dense tensors of torch's own class, with memory of their own on one of DEVICES.

    No dispatch key says otherwise, as those of any other kind do.
    """
    for t in tensors:
        if t is not None and not (type(t) in _CLASSES and _keys_of(t).raw_repr() in _ORDINARY_KEYS_ANYWHERE):
            return False
    return True


def may_be_read(t: Tensor) -> bool:
    """Whether nothing is known against what the dispatcher has handed on: of any class, on any device."""
    device_type = t.device.type
    return device_type not in DEVICES or _keys_of(t).raw_repr() in _ORDINARY_KEYS[device_type]


def is_traced(*tensors: Tensor) -> bool:
    """Whether reading a value would fail or break a graph: under a compiler, a tracer, or on tensors without data."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if any(isinstance(t, torch._subclasses.FakeTensor) or t.is_meta for t in tensors):
        return True
    keys = torch._C._TorchDispatchModeKey
    modes = [torch._C._get_dispatch_mode(key) for key in (keys.FAKE, keys.FUNCTIONAL, keys.PROXY)]
    return is_traced_before_dispatch() or any(mode is not None for mode in modes)


def is_traced_before_dispatch() -> bool:
    """Whether a tracer records calls above autograd, as make_fx(pre_dispatch=True) and torch.export do."""
    return torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)


def check_memory(names: Iterable[str], tensors: Sequence[Tensor | None]) -> None:
    """ValueError for the name of a tensor on one of DEVICES whose storage is smaller than what it spans.

    FSDP and others free the memory of tensors that live on; torch itself reads it all the same.
    """
    for t in tensors:
        if t is not None and (t.untyped_storage().nbytes() < t.nbytes or not t.is_contiguous() or t.storage_offset()):
            break
    else:
        return
    for name, t in zip(names, tensors, strict=True):
        if t is None:
            continue
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        end = (t.storage_offset() + last + 1) * t.itemsize if t.numel() else 0
        held = t.untyped_storage().nbytes()
        if held < end:
            raise ValueError(f"{name} must be in memory, but its storage holds {held} bytes of the {end} that it spans")


def refuse_transforms(tensors: Iterable[Tensor | None] = ()) -> None:
    """RuntimeError under a transform of torch.func, NotImplementedError where one of the tensors has a tangent."""
    if torch.compiler.is_dynamo_compiling():  # the operator refuses, in the graph
        return
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("sigmoid_loss does not run under torch.func transforms (vmap, grad, vjp, jvp, jacrev, …)")
    if forward_ad._current_level < 0:
        return
    for t in tensors:
        if t is not None and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(
                "sigmoid_loss has no forward-mode derivative: use backward or torch.autograd.grad"
            )
