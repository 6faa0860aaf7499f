"""The reader's function of x and w: what it may be, what it closes over, its derivatives."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import types
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

PROBES = 7  # values on which the function is tried
REMEMBERED = 256  # functions whose graphs are kept
UNBOUNDED = ("div", "reciprocal", "rsqrt", "sqrt", "log", "log2", "log10", "log1p", "pow", "tan")
ROUNDED_ONCE = (
    *("add", "sub", "mul", "div", "neg", "abs", "maximum", "minimum", "where", "sqrt", "square"),
    *("relu", "clamp", "clamp_min", "clamp_max", "sgn", "sign", "gt", "ge", "lt", "le", "eq", "ne"),
    *("full_like", "zeros_like", "ones_like", "scalar_tensor", "reciprocal", "alias", "detach"),
)
WITHOUT_PRODUCT = (
    *("add", "sub", "neg", "abs", "maximum", "minimum"),
    *("relu", "clamp", "clamp_min", "clamp_max"),
)
READS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "numpy")


class Combine:
    """combine(x, w) or combine(x, w, aux), checked, with the graphs of its value and derivatives.

    Attributes:
        captured: the tensors of one number that it closes over.
        names: what they are called there.
        value: graph (x, w, [aux,] *captured) → the combination, for tensors of any shapes that
            broadcast.
        partials: graph of the same → derivatives by x, w, [aux,] *captured.
        exact: whether every operation of the value is rounded as IEEE 754 says, so that different
            loops come to the same number bit for bit.
        unbounded: whether a derivative may be infinite where the value is not.
        product_free: whether the value holds nothing that a processor's multiply-add units do.
        text: both graphs as text: equal texts compute the same.

    Raises:
        TypeError: it is not callable, or takes other arguments.
        ValueError: it is not elementwise, not repeatable, or has effects beyond its result.
    """

    def __init__(self, function: Callable[..., Tensor], dtype: torch.dtype, with_aux: bool) -> None:
        self.function = function
        self.arity = 3 if with_aux else 2
        self.captured, self.names = _try_out(function, self.arity, dtype)
        numbers = [torch.tensor(v, dtype=dtype) for v in (0.5, 0.25, 0.75)[: self.arity]]
        numbers += [t.detach().to("cpu", dtype).reshape(()) for t in self.captured]
        with torch.enable_grad():
            self.value = _graph(self._value, numbers)
            self.partials = _graph(self._partials, numbers)
        self.exact = _operations(self.value) <= set(ROUNDED_ONCE)
        self.product_free = _operations(self.value) <= set(WITHOUT_PRODUCT)
        self.unbounded = not _operations(self.partials).isdisjoint(UNBOUNDED)
        constants = _constants(self.value, self.partials)
        self.text = f"{self.arity} {dtype} {self.value.code}{self.partials.code}{constants}"

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Combine) and self.text == other.text

    def __repr__(self) -> str:
        return f"<combine {hashlib.sha256(self.text.encode()).hexdigest()[:16]}>"

    def _value(self, *numbers: Tensor) -> Tensor:
        with _Substituted(self.captured, numbers[self.arity :]):
            return self.function(*numbers[: self.arity])

    def _partials(self, *numbers: Tensor) -> tuple[Tensor, ...]:
        y, backward = torch.func.vjp(self._value, *numbers)
        return backward(torch.ones_like(y))


def parse(function: Callable[..., Tensor], dtype: torch.dtype, with_aux: bool) -> Combine:
    """The `Combine` of a function, remembered as long as what it closes over stays the same."""
    key = _fingerprint(function)
    if key is None:
        return Combine(function, dtype, with_aux)
    return _remembered(_Keyed(key, function), dtype, with_aux)


class _Keyed:
    """A function that is equal to another of the same key."""

    def __init__(self, key: tuple, function: Callable) -> None:
        self.key, self.function = key, function

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return self.key == other.key


@functools.lru_cache(maxsize=REMEMBERED)
def _remembered(keyed: _Keyed, dtype: torch.dtype, with_aux: bool) -> Combine:
    return Combine(keyed.function, dtype, with_aux)


class _Same:
    """An object that is equal to itself only; keeps it alive, so that its place stays its own."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return self.value is other.value


def _fingerprint(function: Callable, depth: int = 0) -> tuple | None:
    """What decides the result of a function; None if that cannot be told."""
    owner = getattr(function, "__self__", None)
    if isinstance(function, types.BuiltinFunctionType):
        free = isinstance(owner, types.NoneType | types.ModuleType | type)
        return (_Same(function),) if free else None
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType) or depth > 8:
        return None
    names, known = _names(function.__code__), function.__globals__
    values = [known[name] for name in names if name in known]
    for cell in function.__closure__ or ():
        if cell == types.CellType():  # not yet filled
            return None
        values.append(cell.cell_contents)
    values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), owner]
    parts = [_part(value, names, depth) for value in values]
    return None if None in parts else (function.__code__, *parts)


@functools.lru_cache(maxsize=REMEMBERED)
def _names(code: types.CodeType) -> tuple[str, ...]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return (*code.co_names, *(name for c in inner for name in _names(c)))


def _part(value: object, names: tuple[str, ...], depth: int) -> tuple | None:
    if isinstance(value, bool | int | float | str | torch.dtype | types.NoneType):
        return type(value), value
    if isinstance(value, types.ModuleType | types.BuiltinFunctionType | Tensor | type):
        return (_Same(value),)
    if isinstance(value, types.FunctionType | types.MethodType):
        module = getattr(value, "__module__", "") or ""
        return (_Same(value),) if module.startswith("torch") else _fingerprint(value, depth + 1)
    if isinstance(value, torch.nn.Module | types.SimpleNamespace):
        found = [getattr(value, name) for name in names if hasattr(value, name)]
        parts = [_part(each, names, depth + 1) for each in found] if depth < 8 else [None]
        return None if None in parts else (_Same(value), *parts)
    return None


def _try_out(function: Callable, arity: int, dtype: torch.dtype):
    """Captured tensors and their names, after the function has been seen to be elementwise."""
    if not callable(function):
        raise TypeError(f"combine must be a function of x and w, got {function!r}")
    inputs = [torch.linspace(-1.3, 1.7, PROBES, dtype=dtype) ** k + 0.1 * k for k in (1, 2, 3)]
    inputs = [inputs[0], inputs[1].flip(0), inputs[2]][:arity]
    copies = [t.clone() for t in inputs]
    watch, printed = _Watching(inputs), io.StringIO()
    try:
        with torch.no_grad(), contextlib.redirect_stdout(printed), watch:
            together = function(*inputs)
    except _Unfit:
        raise
    except Exception as error:
        _check_captured(function, watch.captured)
        if isinstance(error, TypeError) and not _takes(function, arity):
            what = "x, w and aux" if arity == 3 else "x and w"
            raise TypeError(f"combine must take {what}, got {_called(function)}: {error}") from None
        raise ValueError(
            f"combine must be made of elementwise tensor operations; {_called(function)} "
            f"fails on tensors of shape ({PROBES},): {error}"
        ) from error
    if printed.getvalue():
        raise ValueError(f"combine must have no effects but its result; {_called(function)} prints")
    if not all(torch.equal(a, b) for a, b in zip(inputs, copies)):
        raise ValueError(f"combine must not write to its arguments; {_called(function)} does")
    names = _check_captured(function, watch.captured)
    _check_result(function, together, inputs, dtype)
    return watch.captured, names


def _check_captured(function, captured: list[Tensor]) -> list[str]:
    """Their names."""
    names = _names_of(function, captured)
    for tensor, name in zip(captured, names):
        if tensor.numel() != 1 or not tensor.is_floating_point():
            raise ValueError(
                f"combine closes over {name} of shape {tuple(tensor.shape)} and {tensor.dtype}; "
                "only floating-point tensors of one number can be captured"
            )
    return names


def _check_result(function, together, inputs, dtype) -> None:
    name = _called(function)
    if not isinstance(together, Tensor):
        raise ValueError(f"combine must return a tensor; {name} returns {together!r}")
    if together.shape != inputs[0].shape or together.dtype != dtype:
        raise ValueError(
            f"combine must return what it is given in shape and dtype; {name} turns "
            f"({PROBES},) and {dtype} into {tuple(together.shape)} and {together.dtype}"
        )
    with torch.no_grad():
        each = [t.split(1) for t in inputs]
        one_by_one = torch.cat([function(*values) for values in zip(*each)])
        again = function(*inputs)
    if not torch.equal(torch.nan_to_num(again), torch.nan_to_num(together)):
        raise ValueError(f"combine must give the same result each time; {name} does not")
    close = torch.allclose(one_by_one, together, rtol=1e-3, atol=1e-5, equal_nan=True)
    if not close:
        raise ValueError(
            f"combine must be elementwise; {name} gives other values on {PROBES} numbers at once "
            "than one by one"
        )


class _Unfit(ValueError):
    """A call that no graph can hold."""


class _Watching(TorchFunctionMode):
    """Collects the tensors that are used and were not made inside; refuses reading a number."""

    def __init__(self, inputs) -> None:
        super().__init__()
        self.made = {id(t): t for t in inputs}  # kept alive: an id stands for one tensor
        self.captured: list[Tensor] = []

    def __torch_function__(self, function, types_, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in READS:
            raise _Unfit(
                f"combine must stay with tensors; it reads a number out of one ({name}), which "
                "would be frozen into the compiled code"
            )
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, Tensor) and id(value) not in self.made:
                if name in ("__get__", "size", "dim", "numel"):
                    continue
                self.made[id(value)] = value
                self.captured.append(value)
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.made.setdefault(id(value), value)
        return result


class _Substituted(TorchFunctionMode):
    """Puts other tensors in the place of captured ones."""

    def __init__(self, captured, others) -> None:
        super().__init__()
        self.others = {id(t): other for t, other in zip(captured, others)}

    def __torch_function__(self, function, types_, args=(), kwargs=None):
        if self.others:
            args = tuple(self.others.get(id(a), a) for a in args)
            kwargs = {name: self.others.get(id(a), a) for name, a in (kwargs or {}).items()}
        return function(*args, **(kwargs or {}))


def _graph(function: Callable, numbers: list[Tensor]) -> torch.fx.GraphModule:
    try:
        graph = make_fx(function)(*numbers)
    except Exception as error:
        raise ValueError(f"combine cannot be differentiated or traced: {error}") from error
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _operations(graph: torch.fx.GraphModule) -> set[str]:
    """Names of the operations in it."""
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    return {getattr(target, "overloadpacket", target).__name__ for target in called}


def _constants(*graphs: torch.fx.GraphModule) -> str:
    return repr([sorted((k, v.tolist()) for k, v in g.named_buffers()) for g in graphs])


def _takes(function: Callable, arity: int) -> bool:
    try:
        inspect.signature(function).bind(*range(arity))
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        pass
    return True


def _called(function: Callable) -> str:
    return getattr(function, "__name__", None) or repr(function)


def _names_of(function: Callable, captured: list[Tensor]) -> list[str]:
    """What each captured tensor is called in the function, or "a tensor"."""
    function = getattr(function, "__func__", function)
    known: dict[str, object] = {}
    if isinstance(function, types.FunctionType):
        free = function.__code__.co_freevars
        cells = zip(free, function.__closure__ or ())
        known = {n: function.__globals__.get(n) for n in _names(function.__code__)}
        known |= {name: cell.cell_contents for name, cell in cells}
    return [next((n for n, v in known.items() if v is t), "a tensor") for t in captured]
