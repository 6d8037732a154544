"""What one does with dense features: pictures of them, masks by likeness, segments, matches between pictures.

Everything here reads the features in bands of rows and works on parts of a band, so they may lie in a file and be
larger than memory. Beyond a band, what grows with the picture is the result alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dense import DenseFeatures
from .errors import InputError

Points = Sequence[tuple[float, float]]
SEGMENT_COLORS = torch.tensor([[0.90, 0.62, 0.00], [0.34, 0.71, 0.91], [0.00, 0.62, 0.45], [0.94, 0.89, 0.26],
                               [0.00, 0.45, 0.70], [0.84, 0.37, 0.00], [0.80, 0.47, 0.65], [0.60, 0.60, 0.60]])
_HEAT = torch.tensor([[0.07, 0.03, 0.20], [0.36, 0.07, 0.43], [0.72, 0.20, 0.33], [0.96, 0.49, 0.10],
                      [0.99, 0.95, 0.60]])
_SAMPLE = 16384
_PART = 2 << 20  # bytes of features that are worked on at a time
_EPS = 1e-6


@dataclass
class PCA:
    """mean ``c``, components ``3 c``, and the range of values that is shown, ``3`` each."""

    mean: Tensor
    components: Tensor
    low: Tensor
    high: Tensor

    def project(self, features: DenseFeatures) -> Tensor:
        """``3 h w``: coordinates on the first three components."""
        _check_channels(features, len(self.mean))
        out = torch.empty(3, *features.shape[1:])
        for where, x in _parts(features):
            out.view(3, -1)[:, where] = self.of(x)
        return out

    def of(self, x: Tensor) -> Tensor:
        """Features ``c n`` to coordinates ``3 n``."""
        return self.components @ (x - self.mean[:, None])

    def picture(self, features: DenseFeatures) -> Tensor:
        """RGB ``3 h w`` in [0, 1]; the same feature has the same colour in every picture of this PCA."""
        _check_channels(features, len(self.mean))
        spread, out = (self.high - self.low)[:, None], torch.empty(3, *features.shape[1:])
        for where, x in _parts(features):
            shown = (self.of(x) - self.low[:, None]) / spread.clamp_min(_EPS)
            out.view(3, -1)[:, where] = torch.where(spread > _EPS, shown, 0.5).clamp(0, 1)
        return out


def fit_pca(features: DenseFeatures | Sequence[DenseFeatures]) -> PCA:
    """The first three principal components of one or several feature maps together, each map counting the same.

    Exact (the covariance of all features, in double precision), so the same on every run; the sign of a component is
    that of its largest entry. Colours span the 1st to the 99th percentile. Constant features give a gray picture.
    """
    maps = [features] if isinstance(features, DenseFeatures) else list(features)
    if not maps:
        raise InputError("there are no features to analyse")
    c = maps[0].shape[0]
    origin = maps[0].read(slice(0, 1), slice(0, 1)).flatten().double()  # near the values: no cancellation below
    mean, second = torch.zeros(c, dtype=torch.float64), torch.zeros(c, c, dtype=torch.float64)
    for one in maps:
        _check_channels(one, c)
        pixels = one.shape[1] * one.shape[2] * len(maps)
        for _, x in _parts(one):
            flat = x.double().sub_(origin[:, None])
            mean += flat.sum(1) / pixels
            second.addmm_(flat, flat.T, alpha=1 / pixels)
    values, vectors = torch.linalg.eigh(second - torch.outer(mean, mean))
    components = torch.zeros(3, c, dtype=torch.float64)
    found = vectors[:, values > values[-1].clamp_min(0) * 1e-10].flip(1).T[:3]
    sign = found.gather(1, found.abs().argmax(1, keepdim=True)).sign()
    components[:len(found)] = found * sign
    unscaled = PCA((origin + mean).float(), components.float(), torch.zeros(3), torch.ones(3))
    share = min(1 << 18, (1 << 23) // len(maps))  # older torch takes no more than 2^24 values for quantiles
    seen = torch.cat([_thinned(unscaled, one, share) for one in maps], 1)
    ends = torch.quantile(seen, torch.tensor([0.01, 0.99]), dim=1) if seen.shape[1] > 1 else seen.T.repeat(2, 1)
    return PCA(unscaled.mean, unscaled.components, ends[0], ends[1])


def pca_pictures(features: Sequence[DenseFeatures], like: Sequence[DenseFeatures] | None = None) -> list[Tensor]:
    """PCA pictures ``3 h w`` in [0, 1] of several maps (pictures, steps, methods) in the same colours: their own, or
    those of the maps ``like``."""
    pca = fit_pca(features if like is None else like)
    return [pca.picture(one) for one in features]


def similarity(features: DenseFeatures, positive: Points = (), negative: Points = (), *, mask: Tensor | None = None,
               negative_mask: Tensor | None = None, centre: bool = False, of: DenseFeatures | None = None) -> Tensor:
    """Cosine similarity ``h w`` in [-1, 1] to what is marked.

    positive, negative: points (x, y) in picture pixels; mask, negative_mask: ``H W`` of the picture or ``h w`` of the
    features, above 0.5 where marked (their mean feature counts as one point). A pixel's value is its likeness to the
    nearest positive mark, less that to the nearest negative one where this is above 0. centre: subtract the mean
    feature first, which tells more apart where all features have much in common. of: the features of the picture that
    is marked, when it is another one (the first frame of a film, say).

    Raises InputError when nothing positive is marked, a mask is empty or of another size, or a point is outside.
    """
    marked = features if of is None else of
    _check_channels(features, marked.shape[0])
    wanted = _marks(marked, positive, mask)
    if not len(wanted):
        raise InputError("nothing is marked: give at least one positive point or a mask")
    unwanted = _marks(marked, negative, negative_mask)
    base = _mean(features) if centre else torch.zeros(features.shape[0])
    wanted, unwanted = F.normalize(wanted - base, dim=1), F.normalize(unwanted - base, dim=1)
    out = torch.empty(features.shape[1:])
    for where, x in _parts(features):
        if centre:
            x = x - base[:, None]
        near = (wanted @ x).amax(0)
        if len(unwanted):
            near -= (unwanted @ x).amax(0).clamp_min(0)
        out.view(-1)[where] = near / _length(x)
    return out.clamp_(-1, 1)


def feature_mask(likeness: Tensor, image_size: tuple[int, int], *, threshold: float = 0.5, softness: float = 0.1
                 ) -> Tensor:
    """A mask ``H W`` in [0, 1] of the picture from :func:`similarity`: 1 above ``threshold``, 0 below, with a ramp of
    width ``softness`` (0 for a hard edge) around it."""
    if not -1 <= threshold <= 1 or softness < 0:
        raise InputError(f"threshold {threshold}, softness {softness}: expected -1 to 1, and 0 or more")
    large = _to_picture(likeness, image_size)
    if softness == 0:
        return (large > threshold).float()
    return (large - threshold).div_(softness).add_(0.5).clamp_(0, 1)


def segments(features: DenseFeatures, count: int, *, seed: int = 0, iterations: int = 25, restarts: int = 4,
             clean: int = 0) -> Tensor:
    """Labels ``h w`` (int64, 0 the largest segment) of ``count`` clusters: k-means with k-means++ starts on the
    directions of the features. The means are found on up to 16384 features drawn by ``seed``, then every feature goes
    to its nearest mean. clean: radius of a majority vote that removes specks. Fewer labels come back where there are
    fewer different features."""
    c, h, w = features.shape
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= h * w:
        raise InputError(f"segments is {count!r}; expected 1 to {h * w}, the number of features")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(h * w, generator=generator)[:_SAMPLE].sort().values
    data, filled = torch.empty(len(chosen), c), 0  # made once: many small pieces would leave the memory in holes
    for where, x in _parts(features):
        inside = chosen[(chosen >= where.start) & (chosen < where.stop)] - where.start
        data[filled:filled + len(inside)] = x[:, inside].T
        filled += len(inside)
    data = F.normalize(data, dim=1)
    runs = [_kmeans(data, count, iterations, generator) for _ in range(max(1, restarts))]
    centres = min(runs, key=lambda run: run[1])[0]
    del data
    labels = torch.empty(h, w, dtype=torch.int64)
    for where, x in _parts(features):
        far = centres.square().sum(1, keepdim=True) / 2 - (centres @ x) / _length(x)
        labels.view(-1)[where] = far.argmin(0)
    if clean:
        _vote(labels, len(centres), clean)
    sizes = torch.bincount(labels.flatten(), minlength=len(centres))
    place = sizes.argsort(descending=True, stable=True).argsort()
    for rows in _rows(h, w):
        labels[rows] = place[labels[rows]]
    return labels


def segment_masks(labels: Tensor, image_size: tuple[int, int]) -> Tensor:
    """``k H W`` masks (0 or 1) of the picture from the labels of :func:`segments`; they add up to 1."""
    large = _labels_of(labels, image_size)
    masks = torch.empty(int(labels.max()) + 1, *image_size)
    for k, mask in enumerate(masks):
        mask.copy_(large == k)
    return masks


def segment_picture(labels: Tensor, image_size: tuple[int, int]) -> Tensor:
    """RGB ``3 H W`` of the labels of :func:`segments`, in eight colours that most people can tell apart (Okabe and Ito
    2008, gray for black); more segments begin again with the first."""
    large, out = _labels_of(labels, image_size), torch.empty(3, *image_size)
    for rows in _rows(*image_size):
        out[:, rows] = SEGMENT_COLORS[large[rows] % len(SEGMENT_COLORS)].movedim(-1, 0)
    return out


def heat_picture(likeness: Tensor, picture: Tensor, opacity: float = 0.6) -> Tensor:
    """``3 H W``: :func:`similarity` as colours from dark violet (0 and below) to yellow (1) over a gray ``picture``
    ``3 H W`` in [0, 1]."""
    size = (picture.shape[1], picture.shape[2])
    large, out = _to_picture(likeness, size), torch.empty(3, *size)
    for rows in _rows(*size):
        place = large[rows].clamp(0, 1) * (len(_HEAT) - 1)
        low = place.floor().long().clamp_max(len(_HEAT) - 2)
        share = (place - low)[..., None]
        heat = (_HEAT[low] * (1 - share) + _HEAT[low + 1] * share).movedim(-1, 0)
        gray = (picture[:, rows] * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
        out[:, rows] = heat * opacity + gray * (1 - opacity)
    return out


class Matches(NamedTuple):
    """points: ``[(x, y)]`` in the other picture; likeness ``n`` in [-1, 1]; mutual ``n``: whether the way back leads
    to the same feature or one beside it."""

    points: list[tuple[float, float]]
    likeness: Tensor
    mutual: Tensor


def correspondences(first: DenseFeatures, second: DenseFeatures, points: Points) -> Matches:
    """For points (x, y) of the first picture the most similar (cosine) places of the second."""
    _check_channels(second, first.shape[0])
    best, likeness = _nearest(second, first.at(points))
    w = second.shape[2]
    there = [(min((int(i) % w + 0.5) * second.stride, second.image_size[1] - 0.5),
              min((int(i) // w + 0.5) * second.stride, second.image_size[0] - 0.5)) for i in best]
    back, _ = _nearest(first, second.at(there))
    own = torch.tensor(first.cells(points))
    apart = torch.stack([back // first.shape[2], back % first.shape[2]], 1) - own
    return Matches(there, likeness, apart.abs().amax(1) <= 1)


def _nearest(features: DenseFeatures, wanted: Tensor) -> tuple[Tensor, Tensor]:
    unit = F.normalize(wanted, dim=1)
    best, where = torch.full((len(unit),), -2.0), torch.zeros(len(unit), dtype=torch.int64)
    for part, x in _parts(features):
        value, index = ((unit @ x) / _length(x)).max(1)
        better = value > best
        best = torch.where(better, value, best)
        where = torch.where(better, index + part.start, where)
    return where, best


def _kmeans(data: Tensor, count: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Centres and the sum of squared distances: k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's steps."""
    first = int(torch.randint(len(data), (1,), generator=generator))
    centres = data[first:first + 1]
    distance = (data - centres).square().sum(1)
    while len(centres) < count and distance.max() > _EPS:
        far = int(torch.multinomial(distance.clamp_min(0), 1, generator=generator))
        centres = torch.cat([centres, data[far:far + 1]])
        distance = torch.minimum(distance, (data - data[far]).square().sum(1))
    for _ in range(iterations):
        nearest = torch.cdist(data, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, data)
        number = torch.bincount(nearest, minlength=len(centres))[:, None]
        moved = torch.where(number > 0, sums / number.clamp_min(1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres, float(torch.cdist(data, centres).amin(1).square().sum())


def _vote(labels: Tensor, count: int, radius: int) -> None:
    """In place, the label that most positions within ``radius`` have; the lower one of equals."""
    h, w = labels.shape
    above = labels[:0]  # the rows before as they were
    for rows in _rows(h, w):
        seen = torch.cat([above, labels[rows.start:rows.stop + radius]])
        best, winner = torch.full(seen.shape, -1.0), torch.zeros_like(seen)
        for k in range(count):
            votes = F.avg_pool2d((seen == k).float()[None], 2 * radius + 1, 1, radius, count_include_pad=False)[0]
            better = votes > best + _EPS
            best, winner = torch.where(better, votes, best), torch.where(better, k, winner)
        ends = len(above) + rows.stop - rows.start
        labels[rows] = winner[len(above):ends]
        above = seen[max(0, ends - radius):ends]


def _marks(features: DenseFeatures, points: Points, mask: Tensor | None) -> Tensor:
    found = [features.at(points)] if len(points) else []
    if mask is not None:
        chosen = _on_grid(features, mask)
        total, number = torch.zeros(features.shape[0], dtype=torch.float64), int(chosen.sum())
        if not number:
            raise InputError("the mask is empty: nothing in it is above 0.5")
        for where, x in _parts(features):
            total += x[:, chosen.view(-1)[where]].double().sum(1)
        found.append((total / number).float()[None])
    return torch.cat(found) if found else torch.zeros(0, features.shape[0])


def _on_grid(features: DenseFeatures, mask: Tensor) -> Tensor:
    h, w = features.shape[1:]
    mask = mask.cpu()
    if tuple(mask.shape) == (h, w):
        return mask > 0.5
    if tuple(mask.shape) != tuple(features.image_size):
        raise InputError(f"the mask has shape {tuple(mask.shape)}; expected that of the picture, "
                         f"{features.image_size}, or of the features, {(h, w)}")
    chosen = torch.zeros(h, w, dtype=torch.bool)
    for rows in _rows(*features.image_size):  # every marked pixel counts, however few
        y, x = (mask[rows] > 0.5).nonzero().double().unbind(1)
        i, j = ((n / features.stride).long() for n in (y + rows.start, x))
        chosen[i.clamp_max(h - 1), j.clamp_max(w - 1)] = True
    return chosen


def _covered(grid: Tensor, image_size: tuple[int, int]) -> tuple[int, int]:
    """The size in pixels that the whole grid covers, the last row and column of which may reach beyond the picture."""
    stride = max(n / g for n, g in zip(image_size, grid.shape[-2:], strict=True))
    return (max(image_size[0], round(grid.shape[-2] * stride)), max(image_size[1], round(grid.shape[-1] * stride)))


def _to_picture(values: Tensor, image_size: tuple[int, int]) -> Tensor:
    if tuple(values.shape) == tuple(image_size):
        return values
    large = F.interpolate(values[None, None], size=_covered(values, image_size), mode="bilinear", align_corners=False)
    return large[0, 0, :image_size[0], :image_size[1]]


def _labels_of(labels: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Labels ``H W`` of the picture."""
    if tuple(labels.shape) == tuple(image_size):
        return labels
    large = F.interpolate(labels[None, None].float(), size=_covered(labels, image_size), mode="nearest")[0, 0]
    return large[:image_size[0], :image_size[1]].long()


def _mean(features: DenseFeatures) -> Tensor:
    total = torch.zeros(features.shape[0], dtype=torch.float64)
    for _, x in _parts(features):
        total += x.double().sum(1)
    return (total / (features.shape[1] * features.shape[2])).float()


def _parts(features: DenseFeatures) -> Iterator[tuple[slice, Tensor]]:
    """All features as ``(positions, c n float32)``, row after row; not to be changed, each holds until the next."""
    step = max(1, _PART // (4 * features.shape[0]))
    for rows, x in features.bands():
        start = rows.start * features.shape[2]
        for k, part in enumerate(x.flatten(1).split(step, 1)):
            yield slice(start + k * step, start + k * step + part.shape[1]), part


def _thinned(pca: PCA, features: DenseFeatures, most: int) -> Tensor:
    """``3 n``: coordinates of at most ``most`` of the features, taken evenly."""
    count = features.shape[1] * features.shape[2]
    step = -(-count // most)
    out = torch.empty(3, -(-count // step))
    for where, x in _parts(features):
        first = -(-where.start // step)  # of those that are taken
        found = x[:, first * step - where.start::step]
        out[:, first:first + found.shape[1]] = pca.of(found)
    return out


def _rows(h: int, w: int) -> Iterator[slice]:
    """All rows of a map, some 2^17 positions at a time."""
    step = max(1, (1 << 17) // w)
    for start in range(0, h, step):
        yield slice(start, min(h, start + step))


def _length(x: Tensor) -> Tensor:
    return x.norm(dim=0).clamp_min(1e-12)


def _check_channels(features: DenseFeatures, channels: int) -> None:
    if features.shape[0] != channels:
        raise InputError(f"these features have {features.shape[0]} channels, the others {channels}; use the same "
                         "backbone for all")
