"""Every private name of torch that the package uses, each looked up when it is asked for.

`import fomaml` asks for none of them, and the eager engines can do without. Where one is missing that compiling needs,
`compile=True` says so in one line and the engine runs as it is.

Not here: `_parameters`, `_buffers` and `_modules` of a module, which modules that were saved whole hold by these names.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

COMPILING = "compile=True warns, and the engine runs uncompiled"
KEEPING = "what is compiled is not kept for other processes"
STEPPING = "an outer step of few small tensors takes three times as long"
# name → what happens without it
NAMES = {
    "torch._guards:TracingContext": COMPILING,
    "torch._guards:tracing": COMPILING,
    "torch._subclasses.fake_tensor:FakeTensorMode": COMPILING,
    "torch.fx.experimental.proxy_tensor:make_fx": COMPILING,
    "torch._inductor:compile": COMPILING,
    "torch._inductor:list_options": COMPILING,
    "torch.utils._triton:has_triton": "on CUDA the operators of a trace are recorded as they are, not fused",
    "torch._inductor.cpu_vec_isa:VecISA.check_build": "what vectors there are is found out by compiling, for seconds",
    "torch._inductor.codecache:CppWrapperCodeCache.load_pybinding": KEEPING,
    "torch._C._dynamo.guards:_torchinductor_pyobject_tensor_data_ptr": KEEPING,
    "torch._C._aoti:unsafe_alloc_void_ptrs_from_tensors": KEEPING,
    "torch._C._aoti:alloc_tensors_by_stealing_from_void_ptrs": KEEPING,
    "torch._ops:OpOverload._schema": COMPILING,
    "torch.nn:Module._forward_hooks": COMPILING,
    "torch.nn:Module._forward_pre_hooks": COMPILING,
    "torch.nn:Module._backward_hooks": COMPILING,
    "torch.nn:Module._backward_pre_hooks": COMPILING,
    "torch:ops.aten._native_batch_norm_legit": "the batch norms of torch 2.7 and 2.8 are not fused",
    "torch._subclasses.fake_tensor:DataDependentOutputException": "a warning gives torch's reason alone",
    "torch._subclasses.fake_tensor:DynamicOutputShapeException": "a warning gives torch's reason alone",
    "torch.utils._python_dispatch:TorchDispatchMode": "a forward pass counts as random, a module as one launch",
    "torch:Tensor._version": "a buffer counts as written",
    "torch:_foreach_add": "tensors are added one by one",
    "torch:_foreach_div": "tensors are divided one by one",
    "torch:_fused_adam_": STEPPING,
    "torch:_fused_adamw_": STEPPING,
    "torch:_foreach_add_": STEPPING,
    "torch.optim:Optimizer._optimizer_step_pre_hooks": STEPPING,
    "torch.optim:Optimizer._optimizer_step_post_hooks": STEPPING,
    "torch.optim.optimizer:_global_optimizer_pre_hooks": STEPPING,
    "torch.optim.optimizer:_global_optimizer_post_hooks": STEPPING,
    "torch:cpu._is_avx512_bf16_supported": "a CPU counts as one that imitates bfloat16",
    "torch:cpu._is_amx_tile_supported": "a CPU counts as one that imitates bfloat16",
}


class Missing(RuntimeError):
    """This torch lacks a private name."""

    def __init__(self, name: str):
        super().__init__(f"torch {torch.__version__} has no {name.replace(':', '.')}")


def find(name: str, owner: Any = None) -> Any:
    """What a name of `NAMES` stands for, or that attribute of an object, its owner.

    Raises:
        Missing: in this torch it stands for nothing.
    """
    try:
        return pkgutil.resolve_name(name) if owner is None else getattr(owner, re.split("[:.]", name)[-1])
    except (ImportError, AttributeError):
        raise Missing(name) from None


# --- compiling --------------------------------------------------------------------------------------


def trace(function: Callable, *inputs: Tensor) -> GraphModule:
    """The tensor operations of a function as a graph, found out without data."""
    make_fx = find("torch.fx.experimental.proxy_tensor:make_fx")
    # one fake mode: by itself make_fx makes another for each node, which took more than half of its time
    fake = find("torch._subclasses.fake_tensor:FakeTensorMode")
    shapes = fake(allow_fallback_kernels=True, allow_non_fake_inputs=True)
    context = find("torch._guards:TracingContext")(shapes)
    with _without_torchs_warnings(), find("torch._guards:tracing")(context):
        # without data, or the trace holds that of several steps at once
        return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)


def has_triton() -> bool:
    """Whether `torch.compile`'s backend can build kernels for a GPU."""
    try:
        return find("torch.utils._triton:has_triton")()
    except Missing:
        return False


def induce(graph: GraphModule, inputs: Sequence[Tensor], options: dict) -> tuple[Callable, Path | None]:
    """What `torch.compile`'s backend makes of a graph, and the library in which all of it is, where it is known."""
    found: list[Any] = []
    known = find("torch._inductor:list_options")()  # torch 2.7 has fewer
    options = {name: options[name] for name in options.keys() & known}
    with _without_torchs_warnings(), _quick_probes(), _watching_libraries(found):
        function = find("torch._inductor:compile")(graph, inputs, options)
    files = {getattr(getattr(entry, "__self__", None), "__file__", None) for entry in found}
    [file] = files if len(files) == 1 else [None]
    return function, None if file is None else Path(file)


def entry_of(path: Path) -> Callable[..., list[Tensor]]:
    """The function in a library that `induce` has made. It is loaded without torch's compiler, which takes a second.

    Raises:
        Missing, ImportError: it does not load.
    """
    pointer = find("torch._C._dynamo.guards:_torchinductor_pyobject_tensor_data_ptr")
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(pointer)  # from where such a library reads it
    spec = importlib.util.spec_from_file_location(f"{path.stem}.inductor_entry_cpp", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    entry = module.inductor_entry_cpp
    handles = find("torch._C._aoti:unsafe_alloc_void_ptrs_from_tensors")
    tensors = find("torch._C._aoti:alloc_tensors_by_stealing_from_void_ptrs")

    def run(*inputs: Tensor) -> list[Tensor]:
        return tensors(entry(handles(list(inputs))))

    return run


def product_functions(names: Sequence[str]) -> list[int]:
    """The addresses of torch's C functions that make a tensor of memory, let it go, and of products on a CPU.

    Raises:
        Missing: it has none of this name.
    """
    wanted = ["aoti_torch_create_tensor_from_blob", "aoti_torch_delete_tensor_object"]
    wanted += [f"aoti_torch_cpu_{name}_out" for name in names]
    library = _library()
    found = []
    for name in wanted:
        try:
            found.append(ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0)
        except AttributeError:
            raise Missing(f"torch:{name}") from None
    return found


def code_of(dtype: torch.dtype) -> int:
    """The number by which torch's C functions know a dtype."""
    return {torch.float32: 6, torch.float64: 7}[dtype]


@functools.cache
def _library() -> ctypes.CDLL:
    folder = Path(torch.__file__).parent / "lib"
    paths = [path for suffix in ("so", "dylib") for path in folder.glob(f"libtorch_cpu.{suffix}")]
    if not paths:
        raise Missing("torch:libtorch_cpu")
    return ctypes.CDLL(str(paths[0]))


@contextmanager
def _watching_libraries(found: list[Any]) -> Iterator[None]:
    """Within it `found` gets the functions of the libraries that the backend loads."""
    try:
        owner = find("torch._inductor.codecache:CppWrapperCodeCache")
        load = find("torch._inductor.codecache:CppWrapperCodeCache.load_pybinding")
    except Missing:
        yield
        return

    def watched(*arguments: Any, **options: Any) -> Any:
        entry = load(*arguments, **options)
        found.append(entry)
        return entry

    with _replaced(owner, "load_pybinding", watched):
        yield


@contextmanager
def _quick_probes() -> Iterator[None]:
    """Within it the backend does not compile programs, for six seconds, to find out which vectors it may use: it has
    read what the processor has, and the compiler says in 20 ms which options it knows.
    """
    try:
        owner = find("torch._inductor.cpu_vec_isa:VecISA")
        find("torch._inductor.cpu_vec_isa:VecISA.check_build")
    except Missing:
        yield
        return

    from fomaml.engines.cpu.build import compiler, knows  # not where nothing is compiled

    def check_build(self: Any, code: str) -> bool:
        return knows(tuple(compiler()), tuple(self.build_arch_flags().split()))

    with _replaced(owner, "check_build", check_build):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(owner).get(name, getattr(owner, name))  # of another class in torch 2.7
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


@contextmanager
def _without_torchs_warnings() -> Iterator[None]:
    """No warnings of torch about itself: of deprecated names in its own files, say. A module's own ones are shown.

    Its compiler looks for CUDA where there is none, and logs that it has found none.
    """
    log = logging.getLogger("torch.utils.cpp_extension")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch(\.|$)")
            yield
    finally:
        log.setLevel(level)


def depends_on_values(error: Exception) -> bool:
    """Whether a trace failed at what depends on the values of tensors, as far as can be known."""
    for name in ("DataDependentOutputException", "DynamicOutputShapeException"):
        try:
            if isinstance(error, find(f"torch._subclasses.fake_tensor:{name}")):
                return True
        except Missing:
            continue
    return False


def normalise_batch_norm(node: Node) -> None:
    """Give a batch norm that torch 2.7 or 2.8 has traced the operator that later ones trace."""
    try:
        earlier = find("torch:ops.aten._native_batch_norm_legit")
    except Missing:
        return
    if node.target is earlier.no_stats:
        inputs, gamma, beta, *others = node.args
        node.args = (inputs, gamma, beta, None, None, *others)
    elif node.target is not earlier.default:
        return
    node.target = torch.ops.aten.native_batch_norm.default


def schema(operator: Any) -> Any:
    """The names and types of what an operator of torch takes and gives, and what it writes."""
    return find("torch._ops:OpOverload._schema", operator)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_hooks(module: nn.Module) -> None:
    """Raise `Missing` where a module's hooks are not held under the names of `HOOKS`, so that a new one goes unseen."""
    for name in HOOKS:
        find(f"torch.nn:Module.{name}", module)


# --- what the eager engines use where it is there ---------------------------------------------------


def add(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Sequence[Tensor]:
    """The sum of each pair."""
    try:
        return find("torch:_foreach_add", torch)(lefts, rights)
    except (Missing, TypeError):
        return [left + right for left, right in zip(lefts, rights)]


def divide(tensors: Sequence[Tensor], divisor: float) -> Sequence[Tensor]:
    """Each tensor divided by a number, in memory of its own."""
    try:
        return find("torch:_foreach_div", torch)(list(tensors), divisor)
    except (Missing, TypeError, RuntimeError):  # the last one for sparse tensors
        return [tensor / divisor for tensor in tensors]


def step_hooks(optimizer: torch.optim.Optimizer) -> list[Mapping]:
    """Where what is to be called before and after the steps of an optimiser stands, its own and that of all.

    Raises:
        Missing: that is not known.
    """
    return [
        find("torch.optim:Optimizer._optimizer_step_pre_hooks", optimizer),
        find("torch.optim:Optimizer._optimizer_step_post_hooks", optimizer),
        find("torch.optim.optimizer:_global_optimizer_pre_hooks"),
        find("torch.optim.optimizer:_global_optimizer_post_hooks"),
    ]


def fused_adam(decoupled: bool) -> Callable[..., None]:
    """A step of Adam, or of AdamW, by torch's kernel: (numbers of steps before, parameters, gradients, the two moments,
    the largest second ones, numbers by name).

    Raises:
        Missing: there is none. So does the step, where the kernel takes other arguments; nothing has changed then.
    """
    name = "torch:_fused_adamw_" if decoupled else "torch:_fused_adam_"
    kernel, increase = find(name, torch), find("torch:_foreach_add_", torch)

    def step(steps: list[Tensor], *tensors: list[Tensor], **numbers: float) -> None:
        try:
            increase(steps, 1)
        except TypeError:
            raise Missing("torch:_foreach_add_") from None
        try:
            kernel(*tensors, steps, grad_scale=None, found_inf=None, **numbers)
        except TypeError:
            increase(steps, -1)
            raise Missing(name) from None

    return step


def version(tensor: Tensor) -> int | None:
    """How often a tensor was written in place; None where that is not known."""
    try:
        return find("torch:Tensor._version", tensor)
    except Missing:
        return None


def cpu_has_bfloat16() -> bool:
    """Whether the CPU is known to have instructions for bfloat16."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        try:
            if find(f"torch:cpu.{name}")():
                return True
        except (Missing, TypeError):
            continue
    return False
