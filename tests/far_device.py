"""A pretend accelerator: what a program would do on a GPU, seen without one.

A far tensor holds real numbers in this machine's memory and claims to be on another device. While a
FarDevice is entered, an operation that mixes the two places raises, as it would on a GPU, and all
that a GPU would feel is noted: where the host waits for it, what it is sent, what it computes.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import cpu_runtime
from torch import Tensor
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as tg

FAR = torch.device("meta")  # whose autograd needs no driver

# Operations of which the host must know a number or the shape: it waits for all before them.
READS = {
    "_local_scalar_dense",  # item, bool, int, float
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
COPIES = {"_to_copy", "copy_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# Others take single numbers from the host too.
ALL_IN_ONE_PLACE = {"cat", "stack"}
# What computes nothing, besides views.
FREE = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class FarTensor(Tensor):
    """Numbers here, device FAR to everyone who asks."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "FarTensor":
        far = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=FAR,
        )
        far.inner = inner
        return far

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch has it for its own tensors only

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> None:
        raise RuntimeError(f"{func} of a far tensor, whose device is not entered")


def is_far(tensor: Tensor) -> bool:
    return isinstance(tensor, FarTensor)


class Costs(NamedTuple):
    """How often it happened."""

    reads: int = 0  # the host waited for numbers of the device
    waits: int = 0  # the host waited until its own numbers were on the device
    uploads: int = 0  # the host sent numbers and went on
    launches: int = 0  # the device computed an operation


NOTHING = Costs()


class FarDevice(TorchDispatchMode):
    """Computes all operations on this machine; those of far tensors are noted, by name.

    float64: whether it has that format, which Apple's GPU has not.
    """

    def __init__(self, float64: bool = True) -> None:
        super().__init__()
        self.float64 = float64
        self.noted: dict[str, list[str]] = {kind: [] for kind in Costs._fields}

    def costs(self, since: Costs = NOTHING) -> Costs:
        """So far, or since then."""
        counts = [len(names) for names in self.noted.values()]
        return Costs(*(now - then for now, then in zip(counts, since)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors: list[Tensor] = []

        def inside(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor.inner if is_far(tensor) else tensor

        plain_args = mapped(inside, args)
        plain_kwargs = mapped(inside, kwargs or {})
        goes_far = any(map(is_far, tensors))
        if plain_kwargs.get("device") is not None:
            goes_far = torch.device(plain_kwargs["device"]) == FAR
            plain_kwargs["device"] = torch.device("cpu")
        name = func.overloadpacket.__name__
        for kind in kinds_of(name, args, kwargs or {}, tensors, goes_far):
            if not (kind == "launches" and func.is_view):
                self.noted[kind].append(name)
        known = {id(tensor.inner if is_far(tensor) else tensor): tensor for tensor in tensors}

        def outside(tensor: Tensor) -> Tensor:
            if id(tensor) in known:  # changed in place
                return known[id(tensor)]
            if not goes_far:
                return tensor
            if tensor.dtype == torch.float64 and not self.float64:
                raise TypeError(f"{name} makes float64, which the device has not")
            return FarTensor(tensor)

        return mapped(outside, func(*plain_args, **plain_kwargs))


def mapped(change: Callable[[Tensor], Any], value: Any) -> Any:
    """The arguments or results of an operation with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(change, part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(change, part) for part in value)
    return value


def kinds_of(name: str, args: Any, kwargs: Any, tensors: list[Tensor], goes_far: bool) -> list[str]:
    """What an operation costs, fields of Costs; RuntimeError if a GPU could not do it."""
    far = [tensor for tensor in tensors if is_far(tensor)]
    near = [tensor for tensor in tensors if not is_far(tensor)]
    if any(tensor.device == FAR for tensor in near):
        raise RuntimeError(f"{name} of a tensor that was made on {FAR} from numbers of Python's")
    if not far and not goes_far:
        return []
    if name in COPIES and near:
        return [kind_of_copy(args, kwargs, far)]
    if name in COPIES and not goes_far:
        return ["reads"]
    costs = []
    if name in INDEXING and is_far(args[0]):
        indices = [index for index in args[1] if index is not None]
        costs += ["reads" for index in indices if index.dtype == torch.bool]  # how many are true
        costs += ["waits" for index in indices if not is_far(index)]
        near = [tensor for tensor in near if not any(tensor is index for index in indices)]
    mixed = [tuple(x.shape) for x in near if x.ndim > 0 or name in ALL_IN_ONE_PLACE]
    if far and mixed:
        raise RuntimeError(f"{name} mixes devices: near are tensors of shapes {mixed}")
    if name in READS:
        costs.append("reads")
    elif name not in FREE:
        costs.append("launches")
    return costs


def kind_of_copy(args: Any, kwargs: Any, far: list[Tensor]) -> str:
    """Of copy_(to, from) or _to_copy(from) where something is near."""
    if far and not is_far(args[0]):
        return "reads"
    in_the_background = kwargs.get("non_blocking", False) or args[2:] == (True,)
    return "uploads" if in_the_background else "waits"


# --- the program on it ----------------------------------------------------------------------------


def far_runtime() -> tg.Runtime:
    """A runtime of one process on the pretend device."""
    rt = cpu_runtime(lag=2, fixed_rows=True)
    rt.device = FAR

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(FAR, non_blocking=True)

    rt.put = put
    return rt


def no_inference_mode(mode: bool = True) -> contextlib.AbstractContextManager:
    """In place of torch.inference_mode, whose tensors cannot be wrapped."""
    return torch.no_grad() if mode else contextlib.nullcontext()


def fused_devices() -> list[str]:
    """Where AdamW is one operation."""
    return ["cpu", FAR.type]


@contextlib.contextmanager
def far_device(float64: bool = True) -> Iterator[FarDevice]:
    """The pretend device while the block runs, and the program made ready for it."""
    device = FarDevice(float64)
    decorated = [(tg.Scorer, "predict"), (tg, "check_future"), (tg, "check_distribution")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "inference_mode", no_inference_mode)
        for owner, name in decorated:
            undecorated = getattr(owner, name).__wrapped__
            patch.setattr(owner, name, torch.no_grad()(undecorated))
        patch.setattr(optimizers, "_get_fused_kernels_supported_devices", fused_devices)
        tg.rotary_tables.cache_clear()
        try:
            with device:
                yield device
        finally:
            tg.rotary_tables.cache_clear()
