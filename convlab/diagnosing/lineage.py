"""What an operator did to memory: made columns, blew them up, copied, changed the layout.

Each storage carries a mark that says what it holds. A mark is given where a tensor larger than
what it was made from comes into being, passes on to what is computed from it element by element,
and ends where a sum or a product makes it small again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.utils._pytree import tree_leaves

COLUMNS, BLOWN, FOLD, COPY, LAYOUT = "columns", "blow-up", "fold", "copy", "layout"

PRODUCTS = {
    *("mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "dot", "convolution"),
    *("convolution_backward", "_cdist_forward", "_cdist_backward", "mkldnn_convolution"),
    *("cudnn_convolution", "_scaled_dot_product_flash_attention", "linear"),
}
COPIES = {"clone", "copy_", "_to_copy", "copy", "contiguous"}
GATHERS = {
    *("cat", "stack", "index", "index_select", "gather", "take", "repeat", "unfold_copy"),
    *("as_strided_copy", "expand_copy"),
}
FACTORIES = {
    *("zeros", "ones", "full", "empty", "arange", "scalar_tensor", "new_zeros", "new_ones"),
    *("new_full", "new_empty", "new_empty_strided", "zeros_like", "ones_like", "empty_like"),
    *("full_like", "rand", "randn", "rand_like", "randn_like"),
}
NOTABLE = 0.5  # a copy of half of x or y is one worth naming
SEVERAL = 2.0  # times as large as what it was made from


def tensors(values: object) -> list[Tensor]:
    """All tensors in nested arguments or results."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def key(tensor: Tensor) -> int:
    """The storage, as long as it lives."""
    return tensor.untyped_storage()._cdata


def distinct(tensor: Tensor) -> int:
    """How many different values a strided view can show at most."""
    if not tensor.numel():
        return 0
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in pairs)
    return min(span, tensor.numel())


def overlaps(tensor: Tensor) -> bool:
    """Whether a view shows values more than once, its windows overlapping."""
    return shown(tensor) > SEVERAL * distinct(tensor)


def shown(tensor: Tensor) -> int:
    """Values, those that an expanded axis repeats counted once."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in pairs if stride or not size)


class Lineage:
    """Follows marks through the operators of one call.

    Args:
        x, y: input and output of the layer: what counts as large is measured by them.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.large = max(x.numel(), y.numel())
        self.small = min(x.numel(), y.numel())
        self.marks: dict[int, str] = {}
        self.from_x = {key(x)}
        self.sizes: dict[int, str] = {}  # numel → mark, for the way back
        self.largest = 0  # columns: values

    def classify(self, func, args: object, result: object) -> tuple[str, bool]:
        """(mark that the operator's time belongs to, whether it only copied)."""
        name = func._schema.name.partition("::")[2]
        inputs, outputs = tensors(args), tensors(result)
        if any(key(t) in self.from_x for t in inputs):
            self.from_x |= {key(t) for t in outputs}
        else:
            self.from_x -= {key(t) for t in outputs}
        if name in ("im2col", "col2im"):
            return self._unfold_or_fold(name, args, outputs), False
        owned = {key(t) for t in inputs}
        new = [t for t in outputs if key(t) not in owned and t.numel()]
        if name in COPIES and inputs:
            return self._copy(name, args, inputs, new)
        if not new and not func._schema.is_mutable:
            return "", False  # a view
        mark = self._computed(name, inputs, new)
        read = max((t.numel() for t in inputs if self.marks.get(key(t))), default=0)
        for tensor in new:
            self._put(
                tensor, mark if tensor.numel() > NOTABLE * read and tensor.numel() > 1 else ""
            )
        return mark, mark == COPY

    def backward(self, func, args: object, result: object) -> tuple[str, bool]:
        """The same for the backward pass, where sizes tell what a tensor belongs to."""
        name = func._schema.name.partition("::")[2]
        inputs, outputs = tensors(args), tensors(result)
        if name in ("im2col", "col2im"):
            kernel = args[1] if name == "im2col" else args[2]
            return FOLD if _is_one(kernel) else COLUMNS, False
        owned = {key(t) for t in inputs}
        if not func._schema.is_mutable and all(key(t) in owned for t in outputs):
            return "", False
        if name in PRODUCTS:
            return "", False
        found = {self.sizes.get(t.numel(), "") for t in [*inputs, *outputs]}
        copied = name in COPIES
        for mark in (BLOWN, COLUMNS):
            if mark in found:
                return mark, copied
        if copied and inputs[0].numel() >= NOTABLE * self.small:
            return (LAYOUT if _changes_layout(inputs[0], outputs) else COPY), True
        return "", copied

    def _unfold_or_fold(self, name: str, args, outputs: Sequence[Tensor]) -> str:
        if name == "im2col":
            if _is_one(args[1]):
                return COPY
            self._put(outputs[0], COLUMNS)
            return COLUMNS
        self._put(outputs[0], "")
        return FOLD if _is_one(args[2]) else COLUMNS

    def _copy(self, name, args, inputs, new) -> tuple[str, bool]:
        source = inputs[1] if name == "copy_" and len(inputs) > 1 else inputs[0]
        target = inputs[0] if name == "copy_" else (new[0] if new else None)
        if target is None or (name == "copy_" and len(inputs) < 2):
            return "", False
        mark = self.marks.get(key(source), "")
        count = target.numel()
        if count > SEVERAL * shown(source) and count > 1.5 * max(self.large, self.largest):
            mark = BLOWN  # expanded, then copied
        if overlaps(source) and source.numel() > NOTABLE * self.small:
            mark = mark or COLUMNS
            self._put(target, mark)
            return mark, False
        if name == "copy_" and not mark:
            stored, held = stored_values(target), stored_values(source)
            if key(source) in self.from_x and stored > SEVERAL * max(held, self.small):
                self.marks[key(target)] = COLUMNS  # a buffer, filled tap by tap
                self._note(stored, COLUMNS)
                return COLUMNS, False
        self._put(target, mark)
        if mark:
            return mark, True
        if source.numel() < NOTABLE * self.small:
            return "", True
        return (LAYOUT if _changes_layout(source, [target]) else COPY), True

    def _computed(self, name: str, inputs: Sequence[Tensor], new: Sequence[Tensor]) -> str:
        """Any other operator: its mark by what it reads and how much it writes."""
        written = max((t.numel() for t in new), default=0)
        read = max(map(shown, inputs), default=0)
        if name in FACTORIES:
            return ""
        if name in PRODUCTS:
            if written > SEVERAL * self.large and _selects(name, inputs):
                return COLUMNS
            return ""
        marks = {self.marks.get(key(t), "") for t in inputs}
        if any(overlaps(t) and t.numel() > NOTABLE * self.small for t in inputs):
            marks.add(COLUMNS)
        if name in GATHERS:
            whole = {key(t): stored_values(t) for t in inputs}
            if written > self.small and written >= SEVERAL * sum(whole.values()):
                if not any(key(t) in self.from_x for t in inputs):
                    return COPY  # a weight, repeated for every image or place
                return BLOWN if BLOWN in marks else COLUMNS
            return next((m for m in (BLOWN, COLUMNS) if m in marks), "")
        several = len(inputs) > 1 or any(t.numel() > shown(t) for t in inputs)
        if several and written > read and written > 1.5 * max(self.large, self.largest):
            return BLOWN  # broadcast both ways: larger than either operand
        return next((m for m in (BLOWN, COLUMNS) if m in marks), "")

    def _put(self, tensor: Tensor, mark: str) -> None:
        self.marks[key(tensor)] = mark
        self._note(tensor.numel(), mark)

    def _note(self, count: int, mark: str) -> None:
        if mark and count not in (self.large, self.small):
            self.sizes[count] = mark
        if mark == COLUMNS:
            self.largest = max(self.largest, count)


def stored_values(tensor: Tensor) -> int:
    """Values in the storage behind a tensor."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _is_one(kernel: Iterable[int]) -> bool:
    return all(size == 1 for size in kernel)


def _selects(name: str, inputs: Sequence[Tensor]) -> bool:
    """Whether a convolution only picks values: one weight of 1 per output channel."""
    if name != "convolution" or len(inputs) < 2:
        return False
    weight = inputs[1].detach().flatten(1)
    one, others = (weight == 1).sum(1) == 1, (weight != 0).sum(1) == 1
    return weight.shape[1] > 1 and bool((one & others).all())


def _changes_layout(source: Tensor, results: Sequence[Tensor]) -> bool:
    """NCHW to NHWC or back: the axis of stride 1 is another one afterwards, of four."""
    if source.dim() != 4 or not results or results[0].dim() != 4:
        return False
    before, after = source.stride(), results[0].stride()
    nchw, nhwc = (0, 1, 2, 3), (0, 2, 3, 1)
    orders = {_order(source.shape, before), _order(source.shape, after)}
    turned = {nchw, nhwc}
    return orders == turned or orders == {nchw, (0, 3, 1, 2)}


def _order(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Axes from the largest stride to the smallest."""
    return tuple(sorted(range(len(shape)), key=lambda i: (-strides[i], i)))
