"""Runs a Gluon kernel's own source on the CPU: Triton's interpreter knows only Triton's language.

Layouts mean nothing here. What runs asynchronously on a card comes as late as it may: a copy's target holds NaN from
its start until its group is waited for, and a product reads its operands when it is waited for. So a buffer that is
written too early, or read too early, shows in the numbers; a forgotten barrier of all threads does not. Barriers in
shared memory, the copies that complete them, and warps with programs of their own: ``gluon_partitions.py``.
Invariant: nothing of Triton is changed; the kernel's module is executed a second time, under a name of its own.
"""

import math
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch

from tests.helpers.gluon_partitions import Descriptor, Partitions, spoil

DTYPES = {name: getattr(torch, name) for name in ("float32", "int8", "int32", "int64")}
DTYPES["uint32"] = torch.int64  # torch computes little with the other
TRITON_DTYPES = {"fp32": torch.float32}
LAUNCHES = "argosy.kernels.triton.dependent_launch"


def load_interpreted(module_name: str, *beneath: str) -> SimpleNamespace:
    """The module's names; its kernels are called as ``kernel[(num_programs,)](...)``, with tensors on the CPU.

    ``beneath``: modules of kernels that it takes functions from, each before those that need it."""
    language = _Language()
    gl = SimpleNamespace(
        **{name: getattr(language, name) for name in dir(language) if not name.startswith("_")}, **DTYPES
    )
    hopper = ModuleType("hopper")
    for name in ("fence_async_shared", "warpgroup_mma", "warpgroup_mma_init", "warpgroup_mma_wait"):
        setattr(hopper, name, getattr(language, name))
    hopper.async_copy = language  # type: ignore[attr-defined]
    hopper.mbarrier = hopper.tma = language.partitions  # type: ignore[attr-defined]
    gluon = ModuleType("gluon")
    gluon.jit = language.jit  # type: ignore[attr-defined]
    gluon.constexpr_function = _describe_dtypes  # type: ignore[attr-defined]
    gluon.language = gl  # type: ignore[attr-defined]
    fakes = {"triton": ModuleType("triton"), "triton.experimental": ModuleType("experimental")}
    fakes["triton.experimental"].gluon = gluon  # type: ignore[attr-defined]
    fakes |= {"triton.experimental.gluon": gluon, "triton.experimental.gluon.language.nvidia.hopper": hopper}
    import_module(LAUNCHES)  # what it needs of Triton is real
    with patch.dict(sys.modules, fakes):
        for name in (f"{LAUNCHES}_gluon", *beneath):
            sys.modules[name] = _execute(name)
        return SimpleNamespace(**vars(_execute(module_name)))


def _describe_dtypes(function: Callable[..., object]) -> Callable[..., object]:
    """What is computed at compile time sees of a dtype its width."""

    def compute(*arguments: object) -> object:
        return function(
            *(
                SimpleNamespace(primitive_bitwidth=8 * argument.itemsize)
                if isinstance(argument, torch.dtype)
                else argument
                for argument in arguments
            )
        )

    return compute


def _execute(module_name: str) -> ModuleType:
    spec = find_spec(module_name)
    assert spec is not None and spec.origin is not None
    module = ModuleType(f"interpreted {module_name}")
    with open(spec.origin, encoding="utf-8") as file:
        exec(compile(file.read(), spec.origin, "exec"), vars(module))  # noqa: S102 - our own source
    return module


class _Kernel:
    """A function of the kernel's module: a kernel with a grid, otherwise just called."""

    def __init__(self, function: Callable[..., object], language: "_Language") -> None:
        self._function, self._language = function, language

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(
            *arguments: object, num_warps: int, num_stages: int = 0, launch_pdl: bool = False, **constants: object
        ) -> None:
            del num_warps, num_stages
            assert not launch_pdl
            placed = [_place(value) for value in arguments]
            constants = {name: _place(value) for name, value in constants.items()}
            for program in range(grid[0]):
                self._language.start(program, grid[0])
                self._function(*placed, **constants)

        return launch


def _place(argument: object) -> object:
    """As a kernel gets it."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    from triton.language import dtype

    if isinstance(argument, torch.Tensor):
        return _Pointer.to(argument)
    if isinstance(argument, TensorDescriptor):
        return Descriptor(argument.base, argument.block_shape)
    if isinstance(argument, dtype):
        return TRITON_DTYPES[argument.name]
    return argument


@dataclass
class _Pointer:
    memory: torch.Tensor  # [n]: all of the storage
    offset: torch.Tensor

    @staticmethod
    def to(tensor: torch.Tensor) -> "_Pointer":
        memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        return _Pointer(memory, torch.tensor(tensor.storage_offset()))

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, offset: torch.Tensor | int) -> "_Pointer":
        return _Pointer(self.memory, self.offset + offset)


@dataclass
class _Padded:
    """``padding`` numbers behind each ``interval``; the place in the tensor that each bit of an offset adds."""

    interval: int
    padding: int
    offset_bases: list[list[int]]


@dataclass
class _Shared:
    values: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def slice(self, start: int, length: int) -> "_Shared":
        return _Shared(self.values[start : start + length])

    def index(self, position: int) -> "_Shared":
        return _Shared(self.values[position])

    def permute(self, order: Sequence[int]) -> "_Shared":
        return _Shared(self.values.permute(*order))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: "_Padded | None") -> "_Shared":
        """From this part's first byte on; of padded numbers it is a copy, to load from."""
        memory = torch.empty(0, dtype=torch.uint8).set_(self.values.untyped_storage())
        memory = memory[self.values.storage_offset() * self.values.element_size() :]
        if layout is None:
            return _Shared(memory[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape))
        values = torch.empty(*shape, dtype.itemsize, dtype=torch.uint8)
        for offset in range(math.prod(shape)):
            bits = [base for bit, base in enumerate(layout.offset_bases) if offset >> bit & 1]
            place = tuple(map(sum, zip(*bits, strict=True))) if bits else (0,) * len(shape)
            start = (offset + offset // layout.interval * layout.padding) * dtype.itemsize
            values[place] = memory[start : start + dtype.itemsize]
        return _Shared(values.view(dtype).view(shape))

    def load(self, layout: None) -> torch.Tensor:
        return self.values.clone()

    def store(self, values: torch.Tensor) -> None:
        assert values.dtype == self.values.dtype and values.shape == self.values.shape
        self.values.copy_(values)


@dataclass
class _Product:
    compute: Callable[[], torch.Tensor]
    before: "_Product | None" = None  # its sum so far, while that is not yet known
    value: torch.Tensor | None = None  # when it was waited for

    def finish(self) -> torch.Tensor:
        value = self.compute()
        self.compute, self.before = lambda: value, None
        return value


@dataclass
class _Language:
    """``gl`` and what lies beside it, as far as it is used."""

    program: int = 0
    programs: int = 1
    partitions: Partitions = field(default_factory=Partitions)
    # Of a thread: begun and not committed; groups of those that are committed and not waited for.
    copies: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)
    committed: dict[int, list[list[tuple[torch.Tensor, torch.Tensor]]]] = field(default_factory=dict)
    products: dict[int, list[_Product]] = field(default_factory=dict)  # of a thread: begun and not waited for

    def start(self, program: int, programs: int) -> None:
        self.program, self.programs = program, programs
        self.partitions.start(program)
        self.copies.clear()
        self.committed.clear()
        self.products.clear()

    def jit(self, function: Callable[..., object] | None = None, **_: object) -> object:
        return self.jit if function is None else _Kernel(function, self)

    # --- numbers

    def constexpr(self, value: object) -> object:
        return value

    def layout(self, *_: object, **__: object) -> None:
        return None

    BlockedLayout = SliceLayout = NVMMASharedLayout = NVMMADistributedLayout = DistributedLinearLayout = layout
    DotOperandLayout = SwizzledSharedLayout = layout

    def PaddedSharedLayout(  # noqa: N802 - as Gluon calls it
        self, intervals: list[list[int]], offset_bases: list[list[int]], _blocks: list, _shape: list[int]
    ) -> _Padded:
        (interval,) = intervals
        return _Padded(*interval, offset_bases)

    def program_id(self, axis: int) -> torch.Tensor:
        assert axis == 0
        return torch.tensor(self.program)

    def num_programs(self, axis: int) -> torch.Tensor:
        assert axis == 0
        return torch.tensor(self.programs)

    def warp_specialize(self, *arguments: Sequence) -> None:
        self.partitions.warp_specialize(*arguments)

    def static_range(self, end: int) -> range:
        return range(end)

    def arange(self, start: int, end: int, layout: None) -> torch.Tensor:
        return torch.arange(start, end, dtype=torch.int32)

    def cast(self, x: torch.Tensor, dtype: torch.dtype, bitcast: bool) -> torch.Tensor:
        assert bitcast
        return x.view(dtype)

    def full(self, shape: list[int], value: torch.Tensor | float, dtype: torch.dtype, layout: None) -> torch.Tensor:
        return torch.as_tensor(value, dtype=dtype).expand(shape).clone()

    def zeros(self, shape: list[int], dtype: torch.dtype, layout: None) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def permute(self, x: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
        return x.permute(*order)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.unbind(-1)

    def expand_dims(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        return x.unsqueeze(axis)

    def reshape(self, x: torch.Tensor, shape: list[int]) -> torch.Tensor:
        return x.reshape(shape)

    def convert_layout(self, x: torch.Tensor, layout: None) -> torch.Tensor:
        return x

    def where(self, condition: torch.Tensor | bool, x: torch.Tensor | float, y: torch.Tensor | float) -> torch.Tensor:
        return torch.where(torch.as_tensor(condition), x, y)

    def maximum(self, x: torch.Tensor | int, y: torch.Tensor | int) -> torch.Tensor:
        return torch.maximum(torch.as_tensor(x), torch.as_tensor(y))

    def minimum(self, x: torch.Tensor | int, y: torch.Tensor | int) -> torch.Tensor:
        return torch.minimum(torch.as_tensor(x), torch.as_tensor(y))

    def max(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        return x.amax(axis)

    def sum(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        return x.sum(axis)

    def min(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        return x.amin(axis)

    def associative_scan(
        self, x: torch.Tensor, axis: int, combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        parts = list(x.unbind(axis))
        for i in range(1, len(parts)):
            parts[i] = combine(parts[i - 1], parts[i])
        return torch.stack(parts, axis)

    abs = staticmethod(torch.abs)
    div_rn = staticmethod(torch.div)

    @staticmethod
    def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Rounded once: a product of float32 numbers is exact in float64."""
        return (a.double() * b.double() + c.double()).float()

    def inline_asm_elementwise(
        self, asm: str, constraints: str, operands: list[torch.Tensor], dtype: torch.dtype, is_pure: bool, pack: int
    ) -> torch.Tensor:
        """The one instruction that kernels write out."""
        assert asm == "fma.rn.f32 $0, $1, $2, $3;" and constraints == "=f,f,f,f" and dtype == torch.float32
        return self.fma(*operands)

    exp2 = staticmethod(torch.exp2)
    log2 = staticmethod(torch.log2)

    # --- memory

    def load(self, pointer: _Pointer, mask: torch.Tensor | bool = True, other: float = 0.0) -> torch.Tensor:
        offset, mask = torch.broadcast_tensors(pointer.offset, torch.as_tensor(mask))
        values = torch.full(offset.shape, other, dtype=pointer.memory.dtype)
        values[mask] = pointer.memory[offset[mask]]
        return values

    def store(self, pointer: _Pointer, values: torch.Tensor | int, mask: torch.Tensor) -> None:
        offset, mask = torch.broadcast_tensors(pointer.offset, mask)
        if not isinstance(values, torch.Tensor):
            values = torch.full(offset.shape, values, dtype=pointer.memory.dtype)
        assert values.dtype == pointer.memory.dtype
        pointer.memory[offset[mask]] = values[mask]

    def atomic_add(self, pointer: _Pointer, value: int, sem: str) -> torch.Tensor:
        """One program runs at a time, so nobody comes between."""
        before = self.load(pointer)
        pointer.memory[pointer.offset] += value
        return before

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: None) -> _Shared:
        shared = _Shared(torch.empty(shape, dtype=dtype))
        spoil(shared.values)
        return shared

    def async_copy_global_to_shared(self, shared: _Shared, pointer: _Pointer, mask: torch.Tensor | bool = True) -> None:
        values = self.load(pointer, mask, 0.0)
        assert values.shape == shared.values.shape
        spoil(shared.values)
        self.copies.setdefault(threading.get_ident(), []).append((shared.values, values))

    def commit_group(self) -> None:
        copies = self.copies.pop(threading.get_ident(), [])
        self.committed.setdefault(threading.get_ident(), []).append(copies)

    def wait_group(self, num_outstanding: int) -> None:
        """Of the groups of copies all are done but the last ones."""
        groups = self.committed.get(threading.get_ident(), [])
        while len(groups) > num_outstanding:
            for target, values in groups.pop(0):
                target.copy_(values)

    def fence_async_shared(self) -> None:
        """Nothing to do: see the module's first lines."""

    barrier = fence_async_shared

    # --- products

    def warpgroup_mma_init(self, value: torch.Tensor) -> _Product:
        return _Product(lambda: value, value=value)

    def warpgroup_mma(
        self,
        a: _Shared | torch.Tensor,
        b: _Shared,
        total: torch.Tensor | _Product,
        *,
        use_acc: bool = True,
        is_async: bool,
    ) -> _Product:
        assert is_async
        rows = a if isinstance(a, torch.Tensor) else a.values

        def compute() -> torch.Tensor:
            before = total.finish() if isinstance(total, _Product) else total
            exact = torch.float32 if before.dtype.is_floating_point else torch.float64
            product = (rows.to(exact) @ b.values.to(exact)).to(before.dtype)
            return before + product if use_acc else product

        product = _Product(compute, total if isinstance(total, _Product) else None)
        self.products.setdefault(threading.get_ident(), []).append(product)
        return product

    def warpgroup_mma_wait(
        self, num_outstanding: int, deps: Sequence[_Product | torch.Tensor]
    ) -> "torch.Tensor | _Product | tuple[torch.Tensor | _Product, ...]":
        """Of the products of these warps all are done but the last ones."""
        products = self.products.get(threading.get_ident(), [])
        while len(products) > num_outstanding:
            product = products.pop(0)
            product.value = product.finish()
        values = tuple(dep if isinstance(dep, torch.Tensor) or dep.value is None else dep.value for dep in deps)
        return values[0] if len(values) == 1 else values
