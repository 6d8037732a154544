"""The picture as the encoder of a step reads it, a window at a time: an enlarged picture is never held whole."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .resample import Span, reads, sample


class Guide:
    """``image`` ``b 3 H W``, on any device, brought to the last of ``sizes`` (height, width) by antialiased bilinear
    resizes, one after the other."""

    def __init__(self, image: Tensor, sizes: Sequence[tuple[int, int]]):
        self.image = image
        own = (image.shape[2], image.shape[3])
        self._sizes = [own]
        self._sizes += [size for before, size in zip((own, *sizes), sizes, strict=False) if size != before]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what the encoder reads."""
        return self._sizes[-1]

    def window(self, y: Span, x: Span) -> Tensor:
        """``b 3 y x``."""
        return self._cut(len(self._sizes) - 1, y, x)

    def whole(self) -> Tensor:
        return self.window(*(Span.all(n) for n in self.size))

    def _cut(self, step: int, y: Span, x: Span) -> Tensor:
        if not step:
            return self.image[:, :, y.lo:y.hi, x.lo:x.hi]
        height, width = self._sizes[step - 1]
        y_in, x_in = reads("antialias", y, height), reads("antialias", x, width)
        return sample(self._cut(step - 1, y_in, x_in), "antialias", y_in, x_in, y, x)
