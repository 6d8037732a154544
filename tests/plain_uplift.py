"""UPLiFT once more, written from its definition alone: a section of the published config language and a state dict in,
numbers out. It shares no code with the package, so that an error there cannot hide in both. Slow and in fp64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

NEIGHBOURS = {
    5: "-1,0 0,-1 0,0 0,1 1,0",
    9: "-1,-1 -1,0 -1,1 0,-1 0,0 0,1 1,-1 1,0 1,1",
    13: "-2,0 -1,-1 -1,0 -1,1 0,-2 0,-1 0,0 0,1 0,2 1,-1 1,0 1,1 2,0",
    17: "-2,-2 -2,0 -2,2 -1,-1 -1,0 -1,1 0,-2 0,-1 0,0 0,1 0,2 1,-1 1,0 1,1 2,-2 2,0 2,2",
    25: " ".join(f"{dy},{dx}" for dy in range(-2, 3) for dx in range(-2, 3)),
}


class PlainUplift:
    def __init__(self, section, state, patch):
        self.section, self.patch = section, patch
        self.state = {key: value.double() for key, value in state.items()}

    def __call__(self, image, latent, steps, noise, outsize=None):
        section, results, x, maps = self.section, [], latent.double(), None
        for step in range(steps):
            if maps is None or not section.get("enc_share", False):
                size = [n * section.get("up_factor", 2) ** step if maps is not None else n for n in image.shape[2:]]
                guide = resize(image.double(), size)
                if self.patch == 14:
                    guide = resize(guide, [n * 16 // 14 for n in guide.shape[2:]])
                maps = self.encode(guide)
            x = self.step(x, maps, noise, step)
            results.append(x)
        if outsize:
            results[-1] = resize(results[-1], outsize)
        return results

    def encode(self, x):
        section, maps = self.section["encoder"], []
        for g in range(section["down_steps"] + 1):
            if g:
                x = self.down(f"encoder.down_{g}", section[f"down_{g}"], x)
            x = self.group(f"encoder.block_{g}", section[f"block_{g}"], x)
            maps.append(x)
        return maps

    def step(self, x, maps, noise, step):
        section, value = self.section["decoder"], x
        for s in range(section["up_steps"] + 1):
            if s:
                x = self.up(f"decoder.up_{s}", section[f"up_{s}"], x)
            x = join(x, maps[len(maps) - 1 - s], section, noise, step, f"decoder{s}")
            x = self.group(f"decoder.block_{s}", section[f"block_{s}"], x)
        n = self.section.get("attender", -1)
        if n == -1:
            out = self.conv("decoder.outc", x)
            if section.get("residual_outc", True):
                out = out + fit(x, out.shape[1])
        else:
            logits = self.conv("attender.conv1", x)
            shares = torch.exp(logits + fit(x, n))
            shares = shares / shares.sum(1, keepdim=True)
            out = attend(shares, value, [tuple(map(int, pair.split(","))) for pair in NEIGHBOURS[n].split()])
        if self.section.get("refiner"):
            section = self.section["refiner"]
            source = maps[section.get("ref_con", -1 - self.section["decoder"]["up_steps"])]
            y = self.group("refiner", section["block_0"], join(out, source, section, noise, step, "refiner"))
            y = self.conv("ref_outc", y)
            out = out + y if section.get("residual") else y
        return out

    def group(self, name, section, x):
        for i in range(section["count"]):
            if section["block"] == "TransposeConv":
                x = self.conv_up(f"{name}.blocks.{i}.up", x, 2)
            elif section["block"] != "IdentityBlock":
                x = self.block(f"{name}.blocks.{i}.conv", section, x)
        return x

    def block(self, name, section, x):
        y, at = x, 0
        stride = section.get("stride", 1)
        for _ in range({"SingleConv": 1, "DoubleConv": 2}[section["block"]]):
            y = F.conv2d(y, self.state[f"{name}.{at}.weight"], padding=1, stride=stride)
            y = self.norm(f"{name}.{at + 1}", section.get("norm", "batch"), y).clamp(min=0)
            at += 3
        if section.get("one_by", True):
            y = self.conv(f"{name}.{at}", y)
        if section.get("residual", True):
            y = y + fit(corners(x, 0.5) if stride == 2 else x, y.shape[1])
        return y

    def norm(self, name, kind, x):
        weight, bias = (self.state[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        if kind == "layer":
            centred = x - x.mean(1, keepdim=True)
            return centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight + bias
        mean, var = (self.state[f"{name}.running_{part}"][:, None, None] for part in ("mean", "var"))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def down(self, name, section, x):
        if section["down_op"] == "none":
            return x
        if section["down_op"] == "max":
            h, w = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
            y = torch.stack([x[:, :, i:h:2, j:w:2] for i in (0, 1) for j in (0, 1)]).amax(0)
        else:
            y = F.conv2d(x, self.state[f"{name}.down.0.weight"], self.state[f"{name}.down.0.bias"], padding=1,
                         stride=int(1 / section.get("factor", 0.5)))
            y = self.norm(f"{name}.down.1", "batch", y).clamp(min=0)
        return y + corners(x, section.get("factor", 0.5)) if section.get("residual") == "bilinear" else y

    def up(self, name, section, x):
        if section["up_op"] == "none":
            return x
        y = self.conv_up(f"{name}.up", x, section.get("factor", 2))
        return y + corners(x, section.get("factor", 2)) if section.get("residual") == "bilinear" else y

    def conv_up(self, name, x, k):
        """A transpose convolution whose stride is its kernel: every input pixel becomes a k x k block."""
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        y = torch.einsum("bchw,cokl->bohkwl", x, weight)
        return y.reshape(x.shape[0], -1, x.shape[2] * k, x.shape[3] * k) + bias[:, None, None]

    def conv(self, name, x):
        """A 1x1 convolution."""
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return torch.einsum("bchw,oc->bohw", x, weight[:, :, 0, 0]) + bias[:, None, None]


def fit(x, channels):
    """Cut to so many channels, or filled up with zeros."""
    return torch.cat([x[:, :channels], x.new_zeros(x.shape[0], max(0, channels - x.shape[1]), *x.shape[2:])], 1)


def corners(x, factor):
    return F.interpolate(x, size=[int(n * factor) for n in x.shape[2:]], mode="bilinear", align_corners=True)


def resize(x, size):
    return F.interpolate(x, size=list(size), mode="bilinear", antialias=True)


def join(x, f, section, noise, step, site):
    h, w = x.shape[2:]
    how = section.get("enc_resample", "none")
    if how == "nearest":
        f = F.interpolate(f, size=(h, w), mode="nearest")
    elif how == "bilinear":
        f = resize(f, (h, w))
    parts = [x, f]
    if section.get("ncat_c", 0):
        drawn = noise((x.shape[0], section["ncat_c"], h, w), step, site)
        parts.append(drawn.double() * section.get("ncat_s", 1))
    return torch.cat(parts, 1)


def attend(shares, value, neighbours):
    h, w = value.shape[2:]
    height, width = shares.shape[2:]
    y, x = torch.arange(height) // (height // h), torch.arange(width) // (width // w)
    out = 0
    for k, (dy, dx) in enumerate(neighbours):
        near = value[:, :, (y + dy).clamp(0, h - 1)][:, :, :, (x + dx).clamp(0, w - 1)]
        out = out + shares[:, k:k + 1] * near
    return out
