"""Decides whether a call may bypass torch's dispatcher, and whether a tensor's address points to its values.

The dispatcher handles every other kind of tensor and every mode: wrapper subclasses, fake and functional tensors,
lazily negated views, tracers, transforms. Bypassing it saves 15 µs a call, and is correct only if none of these is
present. So these functions recognise what is ordinary. They treat anything unknown as not ordinary.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

# Device types on which a tensor's address points to its memory.
DEVICES = ("cpu", "cuda", "mps", "xpu")
_CLASSES = (Tensor, nn.Parameter)
_keys_of = torch._C._dispatch_keys
_included = torch._C._dispatch_tls_local_include_set


def _raw(*names: str) -> int:
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return functools.reduce(operator.or_, keys).raw_repr()


# The dispatch keys of a dense tensor on each device: made outside inference mode, and made in it.
_ORDINARY_KEYS = {
    device: (
        _raw(device.upper(), f"Autocast{device.upper()}", f"Autograd{device.upper()}", "ADInplaceOrView"),
        _raw(device.upper(), f"Autocast{device.upper()}"),
    )
    for device in DEVICES
}
_ORDINARY_KEYS_ANYWHERE = frozenset(keys for of_device in _ORDINARY_KEYS.values() for keys in of_device)
# The dispatch keys that a thread includes when no mode is on: outside inference mode, and in it.
_DEFAULT_KEYS = _raw("BackendSelect", "ADInplaceOrView"), _raw("BackendSelect")


def has_no_mode() -> bool:
    """Whether this thread runs under no compiler, dispatch mode, tracer, transform or forward-mode level.

    Entering a mode adds its dispatch keys to those that the thread includes by default.
    """
    if torch.compiler.is_compiling():
        return False
    return _included().raw_repr() in _DEFAULT_KEYS and forward_ad._current_level < 0


def are_ordinary(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all are dense tensors of torch's own class, with their own memory on one of DEVICES.

    Tensors of any other kind have other dispatch keys.
    """
    for t in tensors:
        if t is not None and not (type(t) in _CLASSES and _keys_of(t).raw_repr() in _ORDINARY_KEYS_ANYWHERE):
            return False
    return True


def may_be_read(t: Tensor) -> bool:
    """Whether a kernel may read a tensor of any class from the dispatcher. On DEVICES its keys must be ordinary."""
    device_type = t.device.type
    return device_type not in DEVICES or _keys_of(t).raw_repr() in _ORDINARY_KEYS[device_type]


def is_traced(*tensors: Tensor) -> bool:
    """Whether reading a value would fail or break a graph: under a compiler or tracer, or for tensors without data."""
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
    """Raise ValueError, naming the tensor, if a tensor on one of DEVICES spans more bytes than its storage holds.

    FSDP and others free the memory of tensors that stay alive. torch itself reads such a tensor without a check.
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
    """Raise RuntimeError under a torch.func transform, NotImplementedError if one of the tensors has a tangent."""
    if torch.compiler.is_dynamo_compiling():  # the operator in the graph refuses them
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
