"""A graph of aten operations on numbers, spelled as a Triton device function."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

TYPES = {
    torch.bool: "tl.int1",
    torch.int8: "tl.int8",
    torch.int16: "tl.int16",
    torch.int32: "tl.int32",
    torch.int64: "tl.int64",
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
}
NAN = "propagate_nan=tl.PropagateNan.ALL"
MAXIMUM, MINIMUM = (f"tl.{name}({{0}}, {{1}}, {NAN})" for name in ("maximum", "minimum"))

# Arguments are first made to be of the result's type. Beside an operator a number takes the type of
# the other side; given to a function it must have one.
ARITHMETIC = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "sgn": "({0} > 0).to({type}) - ({0} < 0).to({type})",
    "sign": "({0} > 0).to({type}) - ({0} < 0).to({type})",
    "reciprocal": "1.0 / {0}",
    "sigmoid": "1.0 / (1.0 + tl.exp(-{0}))",
    "rsqrt": "1.0 / tl.sqrt({0})",
}
FUNCTIONS = {
    "maximum": MAXIMUM,
    "minimum": MINIMUM,
    "fmax": "tl.maximum({0}, {1})",
    "fmin": "tl.minimum({0}, {1})",
    "relu": f"tl.maximum({{0}}, 0.0, {NAN})",
    "exp": "tl.exp({0})",
    "exp2": "tl.exp2({0})",
    "log": "tl.log({0})",
    "log2": "tl.log2({0})",
    "sqrt": "tl.sqrt({0})",
    "sin": "tl.sin({0})",
    "cos": "tl.cos({0})",
    "erf": "tl.erf({0})",
    "floor": "tl.floor({0})",
    "ceil": "tl.ceil({0})",
    "hardshrink_backward": "tl.where(tl.abs({1}) <= {2}, 0.0, {0})",
    "softshrink_backward": "tl.where(tl.abs({1}) <= {2}, 0.0, {0})",
    "remainder": (
        "tl.where((libdevice.fmod({0}, {1}) != 0) & ((libdevice.fmod({0}, {1}) < 0) != ({1} < 0)), "
        "libdevice.fmod({0}, {1}) + {1}, libdevice.fmod({0}, {1}))"
    ),
}
LIBDEVICE = {
    **{name: name for name in ("sinh", "cosh", "tanh", "tan", "asin", "acos", "atan", "atan2")},
    **{name: name for name in ("asinh", "acosh", "atanh", "expm1", "log1p", "log10", "hypot")},
    **{name: name for name in ("erfc", "erfinv", "fmod", "trunc", "copysign")},
    "round": "nearbyint",
    "special_erfcx": "erfcx",
    "i0": "cyl_bessel_i0",
    "bessel_i0": "cyl_bessel_i0",
    "bessel_i1": "cyl_bessel_i1",
}
POWERS = {0.5: "tl.sqrt({0})", 1: "{0}", 2: "{0} * {0}", 3: "{0} * {0} * {0}"}
# Arguments are first made to be of one type, or to be true or false.
TESTS = {
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "isnan": "{0} != {0}",
    "signbit": "({0} < 0) | (({0} == 0) & (1.0 / {0} < 0))",
    "isinf": 'tl.abs({0}) == float("inf")',
}
LOGICAL = {
    "logical_and": "{0} & {1}",
    "logical_or": "{0} | {1}",
    "logical_xor": "{0} != {1}",
    "logical_not": "{0} == 0",
}
BITWISE = {
    "bitwise_and": "{0} & {1}",
    "bitwise_or": "{0} | {1}",
    "bitwise_xor": "{0} != {1}",
    "bitwise_not": "{0} == 0",
}
SAME = {
    *("alias", "detach", "clone", "lift_fresh", "lift_fresh_copy", "_to_copy"),
    *("convert_element_type", "view_of"),
    *("view", "expand", "reshape", "unsqueeze", "squeeze"),
}
CONSTANT = {"ones_like": 1, "zeros_like": 0}
FILLED = {"full": 1, "full_like": 1, "scalar_tensor": 0}  # which argument is the value
OTHERS = ("where", "clamp", "pow")
SPELLED = {
    *(
        *ARITHMETIC,
        *FUNCTIONS,
        *LIBDEVICE,
        *TESTS,
        *LOGICAL,
        *BITWISE,
        *SAME,
        *CONSTANT,
        *FILLED,
        *OTHERS,
    )
}
INFINITE = {  # at some finite number; the others, multiplied by zero, are zero
    *("div", "reciprocal", "sqrt", "rsqrt", "log", "log2", "log10", "log1p", "pow", "fmod"),
    *("exp", "exp2", "expm1", "sinh", "cosh", "hypot", "tan", "asin", "acos", "acosh", "atanh"),
    *("erfinv", "special_erfcx", "i0", "bessel_i0", "bessel_i1", "remainder"),
}


class Unspellable(ValueError):
    """An operation that has no spelling in Triton."""


def simplified(graph: GraphModule) -> GraphModule:
    """The same graph in operations that `device_function` spells, as far as PyTorch knows how."""
    numbers = [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"]
    examples = [torch.full((), 0.5, dtype=n.dtype) for n in numbers]
    with torch.no_grad():
        function = torch.func.functionalize(graph)
        simple = make_fx(function, decomposition_table=_decompositions())(*examples)
    simple.graph.eliminate_dead_code()
    return simple


@functools.cache
def _decompositions() -> dict[Callable, Callable]:
    known = torch._decomp.decomposition_table
    rounded = ("Tensor_mode", "Scalar_mode")  # division, rounded
    return {
        op: rule
        for op, rule in known.items()
        if _name(op) not in SPELLED or op._overloadname in rounded
    }


def device_function(graph: GraphModule, which: int | None, name: str, arguments: list[str]) -> str:
    """Triton source of one result of a simplified graph.

    Args:
        which: number of the result; None if there is one only.
        arguments: names of x, w, aux and the captured numbers, in the graph's order. The function
            takes x, w, aux and a tuple whose numbers 1, 2, … are the captured ones.

    Raises:
        Unspellable: it names the operation.
    """
    result = _results(graph)[which or 0]
    spelling = _Spelling(graph, arguments)
    returned = spelling.operand(result, spelling.dtype)
    body = "".join(f"    {line}\n" for line in [*spelling.lines, f"return {returned}"])
    return f"@triton.jit\ndef {name}(x, w, aux, numbers):\n{body}"


def is_finite(graph: GraphModule, which: int) -> bool:
    """Whether this result is finite wherever the arguments are."""
    found, waiting = set(), [_results(graph)[which]]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return all(_name(n.target) not in INFINITE for n in found if n.op == "call_function")


def _results(graph: GraphModule) -> tuple[Node, ...]:
    (results,) = next(n for n in graph.graph.nodes if n.op == "output").args
    return (results,) if isinstance(results, Node) else tuple(results)


def _name(target: Callable) -> str:
    """Of an operation of aten or prims, which mean the same by a name, without its overload."""
    return str(getattr(target, "overloadpacket", target)).rpartition(".")[2]


class _Spelling:
    """The lines that a result needs; an operation is written when its value is first asked for."""

    def __init__(self, graph: GraphModule, arguments: list[str]) -> None:
        inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
        self.graph, self.dtype = graph, inputs[0].meta["val"].dtype
        self.lines: list[str] = []
        self.names: dict[Node, str] = {}
        captured = len([name for name in arguments if name not in ("x", "w", "aux")])
        for place, (node, name) in enumerate(zip(inputs, arguments), captured + 1 - len(inputs)):
            self.names[node] = f"numbers[{place}]" if place > 0 else name

    def operand(self, value, dtype: torch.dtype) -> str:
        """A node or a number, of this type; beside a tensor Triton gives numbers its type.

        Not float64: there a comparison or a `tl.where` takes them for float32.
        """
        if not isinstance(value, Node):
            double = dtype == torch.float64
            return _constant(value, dtype) if double else _literal(value, dtype)
        if value not in self.names:
            text = self._spell(value)
            self.names[value] = text if text.isidentifier() else f"t{len(self.lines)}"
            if not text.isidentifier():
                self.lines.append(f"{self.names[value]} = {text}")
        name, own = self.names[value], value.meta["val"].dtype
        if own == dtype:
            return name
        return f"({name} != 0)" if dtype == torch.bool else f"{name}.to({TYPES[dtype]})"

    def _spell(self, node: Node) -> str:
        """The right-hand side of one line, or the name of a value that is the same."""
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(self.graph)
            return _constant(value.item(), value.dtype)
        name, dtype, given = _name(node.target), node.meta["val"].dtype, node.args
        if node.meta["val"].dim():
            raise _unspellable(node)
        if name in CONSTANT or name in FILLED:
            return _constant(CONSTANT[name] if name in CONSTANT else given[FILLED[name]], dtype)
        if name == "mul" and (ones := [_is_one(a) for a in given]) != [False, False]:
            text = self.operand(given[1 - ones.index(True)], dtype)
            return text if text.isidentifier() else f"{text} * 1.0"
        if name in SAME:
            return self.operand(given[0], dtype)
        if name == "where":
            given, tested = given[1:], self.operand(given[0], torch.bool)
            return f"tl.where({tested}, {', '.join(self._typed(given, dtype))})"
        if dtype == torch.bool and name in ("mul", "add"):
            name = "logical_and" if name == "mul" else "logical_or"
        if name in LOGICAL or name == "logical_not" or (name in BITWISE and dtype == torch.bool):
            sides = [self.operand(a, torch.bool) for a in given]
            return (LOGICAL | BITWISE)[name].format(*sides)
        if name in TESTS:
            return TESTS[name].format(*(self.operand(a, _common(given)) for a in given))
        if name == "pow":
            return self._power(*given)
        if name == "clamp":
            return self._clamp(*given, dtype=dtype)
        if name in LIBDEVICE and dtype in (torch.float32, torch.float64):
            return f"libdevice.{LIBDEVICE[name]}({', '.join(self._typed(given, dtype))})"
        if name in FUNCTIONS:
            return FUNCTIONS[name].format(*self._typed(given, dtype))
        if name not in ARITHMETIC or len(given) > 2 or node.kwargs.get("rounding_mode"):
            raise _unspellable(node)
        sides = [self.operand(a, dtype) for a in given]
        if node.kwargs.get("alpha", 1) != 1:
            sides[1] = f"{self.operand(node.kwargs['alpha'], dtype)} * {sides[1]}"
        return ARITHMETIC[name].format(*sides, type=TYPES[dtype])

    def _typed(self, values, dtype: torch.dtype) -> list[str]:
        """Operands that have this type by themselves."""
        return [
            self.operand(a, dtype) if isinstance(a, Node) else _constant(a, dtype) for a in values
        ]

    def _clamp(self, value, low=None, high=None, *, dtype: torch.dtype) -> str:
        text = self.operand(value, dtype)
        for bound, form in ((low, MAXIMUM), (high, MINIMUM)):
            if bound is not None:
                text = form.format(text, *self._typed([bound], dtype))
        return text

    def _power(self, base, exponent) -> str:
        dtype = next(a for a in (base, exponent) if isinstance(a, Node)).meta["val"].dtype
        if not isinstance(exponent, Node) and exponent in POWERS:
            return POWERS[exponent].format(self.operand(base, dtype))
        return f"libdevice.pow({', '.join(self._typed([base, exponent], dtype))})"


def _unspellable(node: Node) -> Unspellable:
    return Unspellable(
        f'combine uses {_name(node.target)}, which backend="triton" has no spelling '
        "for, here or in a derivative; "
        'backend="inductor" or backend="eager" can compute it'
    )


def _literal(value: float, dtype: torch.dtype) -> str:
    if not dtype.is_floating_point:
        return repr(int(value))
    return repr(float(value)) if abs(value) < float("inf") else f'float("{float(value)}")'


def _constant(value: float, dtype: torch.dtype) -> str:
    return f"tl.full((), {_literal(value, dtype)}, {TYPES[dtype]})"


def _is_one(value) -> bool:
    if not isinstance(value, Node):
        return value == 1
    return value.op == "call_function" and _name(value.target) == "ones_like"


def _common(values) -> torch.dtype:
    """The type in which values are compared."""
    tensors = [a.meta["val"].dtype for a in values if isinstance(a, Node)]
    common = functools.reduce(torch.promote_types, tensors)
    floats = any(isinstance(a, float) for a in values)
    return torch.promote_types(common, torch.float32) if floats else common
