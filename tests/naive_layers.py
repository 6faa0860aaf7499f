"""Custom layers as people write them first, for the tests of `diagnose`."""

import torch
import torch.nn.functional as F
from torch import nn


class Custom(nn.Module):
    """A weight (K, C, k, k), stride 1 unless said otherwise, and padding that keeps the size."""

    def __init__(self, channels=8, out_channels=6, kernel_size=3, stride=1):
        super().__init__()
        self.k, self.s, self.p = kernel_size, stride, kernel_size // 2
        shape = out_channels, channels, kernel_size, kernel_size
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator) / kernel_size)

    def rows(self):
        return self.weight.flatten(1)

    def columns(self, x):
        return F.unfold(x, self.k, padding=self.p, stride=self.s)

    def folded(self, y, x):
        size = [(n + 2 * self.p - self.k) // self.s + 1 for n in x.shape[2:]]
        return y.unflatten(2, size)

    def windows(self, x):
        """(N, C, OH, OW, k, k), a view of padded x."""
        x = F.pad(x, (self.p,) * 4)
        return x.unfold(2, self.k, self.s).unfold(3, self.k, self.s)


class Adder(Custom):
    def forward(self, x):
        columns = self.columns(x)
        distance = (columns.unsqueeze(1) - self.rows()[None, :, :, None]).abs()
        return self.folded(-distance.sum(2), x)


class AdderOfWindows(Custom):
    def forward(self, x):
        windows = self.windows(x)
        return -(windows.unsqueeze(1) - self.weight[:, :, None, None]).abs().sum((2, 5, 6))


class AdderFunction(torch.autograd.Function):
    """With gradients of its own, as AdderNet defines them: all products in one matrix."""

    @staticmethod
    def forward(ctx, weight, columns):
        ctx.save_for_backward(weight, columns)
        return -(weight.unsqueeze(2) - columns.unsqueeze(0)).abs().sum(1)

    @staticmethod
    def backward(ctx, grad):
        weight, columns = ctx.saved_tensors
        difference = columns.unsqueeze(0) - weight.unsqueeze(2)
        to_weight = (difference * grad.unsqueeze(1)).sum(2)
        return to_weight, (-difference.clamp(-1, 1) * grad.unsqueeze(1)).sum(0)


class AdderOfItsOwnGradient(Custom):
    def forward(self, x):
        columns = self.columns(x)
        flat = columns.permute(1, 2, 0).contiguous().flatten(1)
        y = AdderFunction.apply(self.rows(), flat)
        return self.folded(y.unflatten(1, (-1, len(x))).permute(2, 0, 1).contiguous(), x)


class Cosine(Custom):
    def forward(self, x):
        columns = F.normalize(self.columns(x), dim=1)
        return self.folded(F.normalize(self.rows(), dim=1) @ columns, x)


class CosineBroadcast(Custom):
    def forward(self, x):
        columns, rows = self.columns(x)[:, None], self.rows()[None, :, :, None]
        return self.folded(F.cosine_similarity(columns, rows, dim=2), x)


class CosineOfWindows(Custom):
    def forward(self, x):
        windows = self.windows(x)
        dot = torch.einsum("nchwij,kcij->nkhw", windows, self.weight)
        norm = windows.square().sum((1, 4, 5)).sqrt()
        return dot / norm[:, None] / self.rows().norm(dim=1)[:, None, None]


class Involution(nn.Module):
    def __init__(self, channels=8, kernel_size=3, groups=2):
        super().__init__()
        self.k, self.groups = kernel_size, groups
        self.reduce = nn.Sequential(nn.Conv2d(channels, channels // 2, 1), nn.ReLU())
        self.span = nn.Conv2d(channels // 2, kernel_size**2 * groups, 1)
        self.unfold = nn.Unfold(kernel_size, padding=kernel_size // 2)

    def forward(self, x):
        n, c, h, w = x.shape
        weight = self.span(self.reduce(x)).view(n, self.groups, 1, self.k**2, h, w)
        columns = self.unfold(x).view(n, self.groups, c // self.groups, self.k**2, h, w)
        return (weight * columns).sum(3).view(n, c, h, w)


class Printing(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        print("mean of the output:", y.mean())
        return y


class Item(Printing):
    def forward(self, x):
        y = self.conv(x)
        return y if y.abs().max().item() < 1e6 else y.clamp(-1, 1)


class PrintsAndUnfolds(Custom):
    def forward(self, x):
        y = self.rows() @ self.columns(x)
        print(y.shape, y.mean().item())
        return self.folded(y, x)


class OneImageAtATime(Printing):
    def forward(self, x):
        return torch.cat([self.conv(image[None]) for image in x])


class Filled(Custom):
    """Columns in a buffer, filled tap by tap."""

    def forward(self, x):
        n, c, h, w = x.shape
        padded = F.pad(x, (self.p,) * 4)
        columns = x.new_zeros(n, c, self.k, self.k, h, w)
        for i in range(self.k):
            for j in range(self.k):
                columns[:, :, i, j] = padded[:, :, i : i + h, j : j + w]
        return self.folded(self.rows() @ columns.view(n, -1, h * w), x)


class Stacked(Custom):
    def forward(self, x):
        h, w = x.shape[2:]
        padded = F.pad(x, (self.p,) * 4)
        taps = [padded[..., i : i + h, j : j + w] for i in range(self.k) for j in range(self.k)]
        columns = torch.stack(taps, 2).flatten(1, 2).flatten(2)
        return self.folded(self.rows() @ columns, x)


class Indexed(Custom):
    def forward(self, x):
        h, w = x.shape[2:]
        rows = torch.arange(h)[:, None, None, None] + torch.arange(self.k)[:, None]
        cols = torch.arange(w)[:, None, None] + torch.arange(self.k)
        windows = F.pad(x, (self.p,) * 4)[:, :, rows, cols]
        return torch.einsum("nchwij,kcij->nkhw", windows, self.weight)


class Picked(Custom):
    """Columns by a convolution with one weight of 1 per tap."""

    def forward(self, x):
        eye = torch.eye(self.k**2, dtype=x.dtype).view(-1, 1, self.k, self.k)
        eye = eye.repeat(x.shape[1], 1, 1, 1)
        columns = F.conv2d(x, eye, padding=self.p, groups=x.shape[1])
        return self.folded(self.rows() @ columns.flatten(2), x)


class MaxPlus(Custom):
    def forward(self, x):
        return (self.windows(x).unsqueeze(1) + self.weight[:, :, None, None]).amax((2, 5, 6))


class LogSumExp(Custom):
    def forward(self, x):
        sums = self.columns(x)[:, None] + self.rows()[None, :, :, None]
        return self.folded(sums.logsumexp(2), x)


class Distance(Custom):
    def forward(self, x):
        rows = self.rows()[None].expand(len(x), -1, -1)
        return self.folded(torch.cdist(rows, self.columns(x).transpose(1, 2)), x)


class Standardised(Custom):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.std((1, 2, 3), keepdim=True)
        return self.folded(weight.flatten(1) @ self.columns(x), x)


class TopK(Custom):
    def forward(self, x):
        columns = self.columns(x)
        threshold = columns.abs().topk(columns.shape[1] // 2, dim=1).values[:, -1:]
        return self.folded(self.rows() @ (columns * (columns.abs() >= threshold)), x)


class Clipped(Custom):
    def forward(self, x):
        return self.folded(self.rows() @ self.columns(x).clamp(-1, 1), x)


class Normalised(Custom):
    """Each patch less its mean and over its spread."""

    def forward(self, x):
        columns = self.columns(x)
        columns = columns - columns.mean(1, keepdim=True)
        return self.folded(self.rows() @ (columns / columns.norm(dim=1, keepdim=True)), x)


class LocallyConnected(nn.Module):
    def __init__(self, channels=4, side=10):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, channels * 9, side * side))

    def forward(self, x):
        y = torch.einsum("ncl,kcl->nkl", F.unfold(x, 3, padding=1), self.weight)
        return y.unflatten(2, x.shape[2:])


class Median(Custom):
    def forward(self, x):
        return self.windows(x).flatten(4).median(4).values
