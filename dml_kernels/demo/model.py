"""The demo's network: three convolution blocks and a linear layer, from a drawing to its embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["EmbeddingNet", "embed"]

SIDE = 32  # pixels; three poolings leave 4 x 4


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.MaxPool2d(2),  # before the norm and ReLU, which then have a quarter of the work
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class EmbeddingNet(nn.Module):
    """Maps grey drawings (n, 32, 32) in 0 ... 255, of any dtype, to embeddings (n, embedding_size) fp32, unnormalised.

    Three blocks of width, 2 width and 4 width channels (3 x 3 convolution, 2 x 2 max pooling, batch norm, ReLU) are
    followed by a linear layer on all 4 x 4 places, because the place of a stroke tells characters apart. The batch norm
    at the end centres each coordinate over the batch: without it all embeddings start out in a narrow cone, and the
    first epochs are spent on opening it.

    Args:
        embedding_size: the dimensions of an embedding.
        width: the channels of the first block.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, embedding_size: int = 64, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.Sequential(_block(1, width), _block(width, 2 * width), _block(2 * width, 4 * width))
        self.head = nn.Linear(4 * width * (SIDE // 8) ** 2, embedding_size, bias=False)
        self.norm = nn.BatchNorm1d(embedding_size)
        self.register_buffer("pixel_mean", torch.tensor(0.0))
        self.register_buffer("pixel_std", torch.tensor(255.0))
        self.to(memory_format=torch.channels_last)  # a third faster than the default layout

    def set_pixel_statistics(self, images: Tensor) -> None:
        """Set the mean and standard deviation of the pixels from the training set; the state_dict keeps them."""
        # In chunks, because the whole set as floats would be four times its size.
        parts = [images[i : i + 1024].double() for i in range(0, len(images), 1024)]
        mean = torch.stack([part.sum() for part in parts]).sum() / images.numel()
        variance = torch.stack([(part - mean).square().sum() for part in parts]).sum() / images.numel()
        self.pixel_mean.copy_(mean)
        self.pixel_std.copy_(variance.sqrt().clamp(min=1.0))

    def forward(self, images: Tensor) -> Tensor:
        """The embeddings (n, embedding_size) of images (n, 32, 32)."""
        if images.dim() != 3 or images.shape[1:] != (SIDE, SIDE):
            raise ValueError(f"images must have shape (n, {SIDE}, {SIDE}); got {tuple(images.shape)}")
        pixels = (images.unsqueeze(1).float() - self.pixel_mean) / self.pixel_std
        return cast(Tensor, self.norm(self.head(self.blocks(pixels).flatten(1))))


@torch.no_grad()
def embed(
    model: nn.Module, images: Tensor, batch_size: int = 128, progress: Callable[[int], object] | None = None
) -> Tensor:
    """Compute embeddings in evaluation mode, a batch at a time.

    Args:
        model: the network.
        images: (n, 32, 32).
        batch_size: drawings in a batch. On a CPU batches of 128 take two thirds of the time of batches of 512, because
            their activations stay in the cache.
        progress: called with the number of drawings just finished.

    Returns:
        (n, D) fp32.
    """
    was_training = model.training
    model.eval()
    parts = []
    for batch in images.split(batch_size):
        parts.append(model(batch))
        if progress:
            progress(len(batch))
    model.train(was_training)
    return torch.cat(parts)
