"""One step of a whole network, and where its time goes.

A training step is data, forward, backward, optimiser; inference is data and forward. Inside the
thread's layers their stages can be marked too. The marks of a part touch those of the next, so the
parts are the whole step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlab.algorithms import ALGORITHMS
from convlab.algorithms.base import add_bias
from convlab.algorithms.thread import fold_stage, output_size, product_stage, unfold_stage
from convlab.datasets import Dataset
from convlab.problem import parse_device
from convlab.stages import Clock, stopwatch
from convlab.timing import synchronize

PARTS = {"train": ("data", "forward", "backward", "optimiser"), "forward": ("data", "forward")}
STAGES = ("unfold", "product", "fold")


class Step:
    """Calling it makes one step on a new batch of `data`.

    Args:
        model: is moved to `device` and put into training or evaluation mode.
        batch: images per step.
        pass_: "train" (with SGD) or "forward" (inference: no gradients recorded).
        nhwc: whether the images come in channels_last.

    Attributes:
        parts: name → function, to be called in this order.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        batch: int,
        pass_: str = "train",
        device: str | torch.device = "cpu",
        nhwc: bool = False,
    ) -> None:
        if pass_ not in PARTS:
            raise ValueError(f"pass_ must be 'train' or 'forward', got {pass_!r}")
        if not (type(batch) is int and batch >= 1):
            raise ValueError(f"batch must be an integer of at least 1, got {batch!r}")
        self.device = parse_device(device)
        self.model = model.to(self.device).train(pass_ == "train")
        self.dataset, self.batch, self.training = data, batch, pass_ == "train"
        self.layout = torch.channels_last if nhwc else torch.contiguous_format
        self.generator = torch.Generator().manual_seed(0)
        self.optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        functions = self.data, self.forward, self.backward, self.optimiser.step
        self.parts: dict[str, Callable[[], object]] = dict(zip(PARTS[pass_], functions))

    def __call__(self) -> None:
        for part in self.parts.values():
            part()

    def data(self) -> None:
        """Draw a batch, shift and normalise it, bring it to the device."""
        index = torch.randint(len(self.dataset.images), (self.batch,), generator=self.generator)
        images, labels = self.dataset.batch(index, self.generator if self.training else None)
        dtype = next(self.model.parameters()).dtype
        self.images = images.to(self.device, dtype, memory_format=self.layout)
        self.labels = labels.to(self.device)

    def forward(self) -> None:
        with torch.set_grad_enabled(self.training):
            self.logits = self.model(self.images)
            self.loss = F.cross_entropy(self.logits, self.labels)

    def backward(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        self.loss.backward()

    def timed(self, stages: bool = False) -> dict[str, float]:
        """Make one step; part → seconds.

        Args:
            stages: also unfold, product and fold of all layers by `thread`, forward and backward
                together; what surrounds them is in the parts.
        """
        mark, elapsed = stopwatch(self.device)
        log: dict[str, list] = {name: [] for name in STAGES}
        with marked_stages(log, mark) if stages else contextlib.nullcontext():
            synchronize(self.device)
            marks = [mark()]
            for part in self.parts.values():
                part()
                marks.append(mark())
            synchronize(self.device)
        found = {name: elapsed(*marks[i : i + 2]) for i, name in enumerate(self.parts)}
        if stages:
            found |= {name: sum(elapsed(*pair) for pair in pairs) for name, pairs in log.items()}
        return found


@contextlib.contextmanager
def marked_stages(log: dict[str, list], mark: Clock) -> Iterator[None]:
    """Inside, each call of `thread` adds (begin, end) of its stages to `log`, backward too.

    A layer whose input needs no gradient has no backward of its unfold, and the backward of its
    product, which then has no end, is not marked.
    """
    thread = ALGORITHMS["thread"]
    plain = thread.function

    def marked(x, weight, bias, stride, padding, dilation, groups) -> Tensor:
        if x.requires_grad:
            x = x.view_as(x)  # a node that no other layer adds gradients to
        size, marks = output_size(x, weight, stride, padding, dilation), [mark()]
        columns = unfold_stage(x, weight, stride, padding, dilation)
        marks.append(mark())
        product = product_stage(columns, weight, groups)
        marks.append(mark())
        y = fold_stage(product, size)
        marks.append(mark())
        for name, *pair in zip(STAGES, marks, marks[1:]):
            log[name].append(tuple(pair))
        backward = []
        for name, value in (("", y), ("fold", product), ("product", columns), ("unfold", x)):
            if value.requires_grad:
                value.register_hook(_ending(backward, log, name, mark))
        return add_bias(y, bias)

    thread.function = marked
    try:
        yield
    finally:
        thread.function = plain


def _ending(marks: list, log: dict[str, list], name: str, mark: Clock) -> Callable:
    """A hook: the stage that ends here began where the one before it ended."""

    def hook(_: Tensor) -> None:
        marks.append(mark())
        if name:
            log[name].append(tuple(marks[-2:]))

    return hook
