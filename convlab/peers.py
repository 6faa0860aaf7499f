"""What a reader could install in place of a rung of the ladder, called like all the others.

The packages come with the extra `peers`; one that is missing is not supported and says so.
"""

import importlib.util
import warnings

import torch

from convlab.algorithms import ALGORITHMS, Algorithm, algorithm
from convlab.algorithms.base import add_bias
from convlab.algorithms.compiled import limits as compiler_needed
from convlab.algorithms.compiled import specialised
from convlab.algorithms.thread import output_size, thread
from convlab.algorithms.unfold import weight_first_product

NATIVE_MATMUL = "triton.native_matmul"  # a private option of inductor, which old ones lack


def _needs(package: str):
    def limits(problem, device):
        if importlib.util.find_spec(package) is None:
            return f"The package {package} is not installed: pip install 'convlab[peers]'."
        return None

    return limits


@algorithm("unfoldNd: columns by a convolution with one-hot kernels.", limits=_needs("unfoldNd"))
def unfoldnd(x, weight, bias, stride, padding, dilation, groups):
    from unfoldNd import unfoldNd

    columns = unfoldNd(x, weight.shape[2:], dilation=dilation, padding=padding, stride=stride)
    y = weight_first_product(columns, weight, groups)
    size = output_size(x, weight, stride, padding, dilation)
    return add_bias(y.view(x.shape[0], weight.shape[0], *size), bias)


@algorithm("einconv: one einsum with the pattern of the taps.", limits=_needs("einconv"))
def einconv(x, weight, bias, stride, padding, dilation, groups):
    from einconv.functionals import convNd

    return convNd(x, weight, bias, stride, padding, dilation, groups)


@algorithm(
    "fft-conv-pytorch: a product in the frequency domain.",
    limits=_needs("fft_conv_pytorch"),
    rounding="fft",
)
def fft_conv(x, weight, bias, stride, padding, dilation, groups):
    from fft_conv_pytorch import fft_conv

    with warnings.catch_warnings():  # of its own way of indexing
        warnings.simplefilter("ignore", UserWarning)
        return fft_conv(
            x, weight, bias, padding=padding, stride=stride, dilation=dilation, groups=groups
        )


def _fold_can_be_compiled(problem, device):
    if device.type == "cpu" and torch.get_num_threads() > 1:
        return (
            "Compiled for several CPU threads, F.fold of a transposed product writes outside its "
            "memory (pytorch issue 191837; seen here with torch 2.13)."
        )
    return compiler_needed(problem, device)


@algorithm("torch.compile of the thread's layer as it is.", limits=_fold_can_be_compiled)
def compiled_thread(x, weight, bias, stride, padding, dilation, groups):
    return specialised(thread, x, weight, bias, stride, padding, dilation, groups)


def _native_matmul_needed(problem, device):
    if device.type == "cpu":
        return "inductor's option native_matmul writes products in Triton: it needs a CUDA GPU."
    from torch._inductor import config

    if not hasattr(config.triton, NATIVE_MATMUL.rpartition(".")[2]):
        return f"inductor of torch {torch.__version__} has no option {NATIVE_MATMUL}."
    return compiler_needed(problem, device)


@algorithm(
    "torch.compile of the thread's layer, unfold and product in one Triton kernel.",
    limits=_native_matmul_needed,
)
def compiled_native_matmul(x, weight, bias, stride, padding, dilation, groups):
    sizes = stride, padding, dilation, groups
    return specialised(thread, x, weight, bias, *sizes, options=((NATIVE_MATMUL, True),))


PEERS: dict[str, Algorithm] = {
    a.name: a for a in (unfoldnd, einconv, fft_conv, compiled_thread, compiled_native_matmul)
}


def find(name: str) -> Algorithm:
    """The algorithm of that name, ours or a peer's.

    Raises:
        ValueError: there is none.
    """
    known = ALGORITHMS | PEERS
    if name not in known:
        raise ValueError(f"algorithm must be one of {', '.join(known)}, got {name!r}")
    return known[name]
