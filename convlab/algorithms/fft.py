"""A product in the frequency domain: the price of a kernel of any size is the same.

x and the kernel, filled up with zeros, become spectra; a correlation is a product with the
conjugate there, summed over the channels for each frequency; one inverse transform per output
plane. FLOPs: 2.5·S·log₂S per plane of S pixels (N·C + K·C + N·K planes), and 4·N·C·K·S for the
products, with no factor k². Bytes: the spectra of x, weight and y, and the weight's is as large as
K·C images. What the stride skips is computed and dropped.
"""

import torch
import torch.nn.functional as F

from convlab.algorithms.base import add_bias, algorithm
from convlab.algorithms.unfold import unfold


@algorithm(
    "Spectra of x and weight, a product per frequency, one inverse transform.", rounding="fft"
)
def fft(x, weight, bias, stride, padding, dilation, groups):
    if not x.numel():  # no plane to transform
        return unfold.function(x, weight, bias, stride, padding, dilation, groups)
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x = F.pad(x.to(wide), (padding[1], padding[1], padding[0], padding[0]))
    kernel = spread(weight.to(wide), dilation)
    size = [fast_length(n) for n in x.shape[2:]]
    spectra = [torch.fft.rfft2(t, s=size) for t in (x, kernel)]
    y = torch.fft.irfft2(product(*spectra, groups), s=size)
    inside = [n - k + 1 for n, k in zip(x.shape[2:], kernel.shape[2:])]
    y = y[:, :, : inside[0] : stride[0], : inside[1] : stride[1]]
    y = y.clone(memory_format=torch.contiguous_format)
    return add_bias(y, None if bias is None else bias.to(wide)).to(dtype)


def fast_length(n):
    """The smallest product of 2, 3 and 5 that is at least n: other lengths are slow."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


def spread(weight, dilation):
    """weight (K, C / groups, kh, kw), zeros between its taps, as far apart as they are used."""
    if dilation == (1, 1):
        return weight
    size = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:])]
    spread_out = weight.new_zeros(*weight.shape[:2], *size)
    spread_out[:, :, :: dilation[0], :: dilation[1]] = weight
    return spread_out


def product(x, weight, groups):
    """Spectra x (N, C, …), weight (K, C / groups, …) → (N, K, …): a product per frequency."""
    n, k = x.shape[0], weight.shape[0]
    a = x.reshape(n, groups, x.shape[1] // groups, -1).permute(1, 3, 0, 2)  # G, F, N, C / G
    b = weight.reshape(groups, k // groups, weight.shape[1], -1).permute(0, 3, 2, 1)
    y = a @ b.conj()  # G, F, N, K / G
    return y.permute(2, 0, 3, 1).reshape(n, k, *x.shape[2:])
