"""Calling the kernels, and calling a whole chain of them again at the price of one.

A step of decoding a small model makes some dozens of native calls, and around each of them Python allocates, slices and
checks for longer than the kernel works. Nothing of that changes from step to step while the same number of tokens meets
the same weights and cache. So `Repeated` runs a function once as it is, writes down which kernels it called with which
arguments, and from then on copies the inputs to where they were and makes those calls: what CUDA graphs do on a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from luciola.model.native.build import library

T = TypeVar("T")
MOST_BYTES = 2 << 20  # of memory that is held for the calls; where they are that large, Python does not matter

_recorder: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)


@cache
def kernel(name: str) -> Kernel | None:
    """A function of the native library that takes one struct of arguments and returns 0 where all went well; None
    without the library."""
    native = library()
    return None if native is None else Kernel(getattr(native, name))


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels of training take these: float32 on a CPU, with numbers in them, where there is a compiler."""
    return library() is not None and all(x.dtype is torch.float32 and x.is_cpu and x.numel() > 0 for x in tensors)


class Kernel:
    """A native function."""

    def __init__(self, function: Any) -> None:
        function.argtypes, function.restype = (ctypes.c_void_p,), ctypes.c_int
        self._function = function
        self.address = ctypes.cast(function, ctypes.c_void_p).value

    def __call__(self, arguments: ctypes.Structure, *owners: Any) -> int:
        """`owners` have the memory that the arguments point to, apart from what the caller has just made."""
        failure: int = self._function(ctypes.addressof(arguments))
        recorder = _recorder.get()
        if recorder is not None:
            recorder.calls.append((self.address, arguments))
            # Not the parameter, which may be given other memory, but what it has now.
            recorder.owners += [owner.detach() if isinstance(owner, Tensor) else owner for owner in owners]
            recorder.usable &= failure == 0
        return failure


class _Recorder(TorchDispatchMode):
    """Takes down what is called; whatever PyTorch computes by itself cannot be repeated so, and is noticed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int | None, ctypes.Structure]] = []
        self.owners: list[Any] = []
        self.made: list[Tensor] = []  # stay alive, for the calls write into them
        self.usable = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format:
            self.made.append(result)
        elif not func.is_view:
            self.usable = False
        return result

    def __enter__(self) -> Any:
        self._token = _recorder.set(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _recorder.reset(self._token)
        super().__exit__(*error)


class _Call(ctypes.Structure):
    """`Call` of repeat.c."""

    _fields_ = (("kernel", ctypes.c_void_p), ("arguments", ctypes.c_void_p))


class Repeated(Generic[T]):
    """A function of tensors that does its work by kernels, faster from the second call on.

    It must be the same function each time, of inputs of the same shapes, and all else that it reads must stay where it
    is. What it returns is overwritten by the next call. A function that does anything but views and native calls is
    simply called.
    """

    def __init__(self, function: Callable[..., T]) -> None:
        self._function = function
        self._inputs: tuple[Tensor, ...] | None = None
        self._result: T | None = None
        self.usable = True

    def __call__(self, *inputs: Tensor) -> T:
        if not self.usable:
            return self._function(*inputs)
        if self._inputs is None:
            return self._record(inputs)
        for kept, new in zip(self._inputs, inputs, strict=True):
            kept.copy_(new)
        failure = ctypes.c_int(0)
        done = self._again(self._calls, len(self._calls), ctypes.byref(failure))
        if done < len(self._calls):
            return self._function(*inputs)  # it will fail alike, and say how
        return self._result  # type: ignore[return-value]

    def _record(self, inputs: tuple[Tensor, ...]) -> T:
        kept = tuple(x.clone(memory_format=torch.contiguous_format) for x in inputs)
        with _Recorder() as recorder:
            result = self._function(*kept)
        self.usable = recorder.usable and bool(recorder.calls) and sum(x.nbytes for x in recorder.made) <= MOST_BYTES
        if self.usable:
            self._inputs, self._result, self._held = kept, result, recorder
            calls = [_Call(address, ctypes.addressof(arguments)) for address, arguments in recorder.calls]
            self._calls = (_Call * len(calls))(*calls)
            native = library()
            assert native is not None
            self._again = native.luciola_repeat
            self._again.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
            self._again.restype = ctypes.c_int64
        return result
