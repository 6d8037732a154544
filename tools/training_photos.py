"""The pictures the bundled pair was trained and measured on, rebuilt from Debian's packages.

    python tools/training_photos.py FOLDER     -> FOLDER/train (115 pictures) and FOLDER/held (23)

Needs apt-get, dpkg-deb and about 3 GB while it runs. The packages' pictures keep their own licences
(uplift_core/assets/ATTRIBUTION.md); `drawing_*.png` are made here by rule and free of any.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ATTRIBUTION = Path(__file__).parents[1] / "uplift_core/assets/ATTRIBUTION.md"
PHOTOS = {
    "lomiri-wallpapers-16.04": [
        "Bridge_by_Sander_Klootwijk", "Dragonfly_by_Bolly", "Picture_0B_by_freespace", "Picture_1A_by_freespace",
        "Wine_by_Jakkub_Mede", "aitzgorri_by_Aitzol_Berasategi", "free_by_Peter_Nerlich",
        "friends_by_Aitzol_Berasategi", "greentock_by_Peter_Nerlich", "life_by_Aitzol_Berasategi",
        "picosdeeuropa_by_Aitzol_Berasategi", "seeding_by_Clements_Engelhardt", "sunset_by_Aitzol_Berasategi",
        "umang_by_Abhishek_Mudgal"],
    "lomiri-wallpapers-20.04": ["Infinite-Sea_by_Aury88", "Kleiber_by_Lukas_Baubkus", "Fossa_by_Jasper_Roks"],
    "gnome-backgrounds": ["adwaita-d", "adwaita-l", "licorice-l", "truchet-l", "wood-l"],
}
HELD = {
    "mate-backgrounds": ["Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird", "RainDrops",
                         "Storm", "TwoWings", "Wood", "YellowFlower"],
    "plasma-workspace-wallpapers": ["Autumn", "BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow",
                                    "FallenLeaf", "Kite", "OneStandsOut", "Path", "summer_1am"],
}
DRAWINGS, SIDE = 32, 768


def unpack(package: str, folder: Path) -> Path:
    """The unpacked package below ``folder``; a package already there is not downloaded again."""
    place = folder / package
    if not place.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        if not list(folder.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
        subprocess.run(["dpkg-deb", "-x", next(folder.glob(f"{package}_*.deb")), place], check=True)
    return place


def drawing(number: int) -> Image.Image:
    """A picture by rule: a gradient, soft discs and bands, in the second half thin lines; made larger and averaged."""
    rng = np.random.default_rng(number)
    side = SIDE * 2
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    angle = rng.uniform(0, 2 * np.pi)
    along = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle) + 0.5
    first, second = rng.uniform(0.02, 0.98, (2, 3)).astype(np.float32)
    picture = first + (second - first) * np.clip(along, 0, 1)[..., None]
    lines = number >= DRAWINGS // 2
    for _ in range(int(rng.integers(12, 40)) if lines else 0):
        # Straight or bent, level more often than not (shores and horizons), a pixel or several wide, some in pairs.
        slant, bend = (rng.normal(0, 0.03) if rng.random() < 0.6 else rng.normal(0, 2)), rng.normal(0, 0.3)
        u, v = (x, y) if rng.random() < 0.7 else (y, x)
        away = v - rng.uniform(0, 1) - slant * (u - 0.5) - bend * (u - 0.5) ** 2
        steep = np.sqrt(1 + (slant + 2 * bend * (u - 0.5)) ** 2)
        width, color = float(np.exp(rng.uniform(np.log(1), np.log(16)))) / side, rng.uniform(0, 1, 3)
        for shift in (0, rng.uniform(1, 4))[:1 + (rng.random() < 0.4)]:
            cover = np.clip((width / 2 - np.abs(away / steep - shift * width)) * side + 0.5, 0, 1)[..., None]
            picture = picture + (color.astype(np.float32) - picture) * cover * rng.uniform(0.3, 1)
    for _ in range(int(rng.integers(1, 4) if lines else rng.integers(2, 9))):
        center, radius, color = rng.uniform(0, 1, 2), rng.uniform(0.05, 0.5), rng.uniform(0, 1, 3).astype(np.float32)
        # From an edge one pixel wide to a glow as wide as the disc.
        softness = float(np.exp(rng.uniform(np.log(1 / side), np.log(radius))))
        distance = np.hypot(x - center[0], y - center[1]) if rng.random() < 0.6 else np.abs(
            (x - center[0]) * np.cos(angle) + (y - center[1]) * np.sin(angle)) * 3
        cover = np.clip((radius - distance) / softness + 0.5, 0, 1)[..., None] * rng.uniform(0.2, 1)
        picture = picture + (color - picture) * cover
    picture = picture.reshape(SIDE, 2, SIDE, 2, 3).mean((1, 3))
    # Dithered: what is measured shall not be the steps of 8 bits.
    return Image.fromarray((picture * 255 + rng.uniform(0, 1, picture.shape)).clip(0, 255).astype(np.uint8))


def copy(source: Path, target: Path) -> None:
    """Pictures as they are, but WebP as PNG, half as large (they are enormous)."""
    if source.suffix == ".webp":
        image = Image.open(source).convert("RGB")
        image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS).save(target.with_suffix(".png"))
    else:
        shutil.copyfile(source, target)


def main(folder: Path) -> None:
    packages, train, held = folder / "packages", folder / "train", folder / "held"
    train.mkdir(parents=True, exist_ok=True)
    held.mkdir(exist_ok=True)
    for chosen, where in ((PHOTOS, train), (HELD, held)):
        for package, names in chosen.items():
            place, short = unpack(package, packages), package.split("-")[0]
            for name in names:
                files = [p for p in place.rglob("*") if p.suffix in (".jpg", ".png", ".webp") and p.stem != "screenshot"
                         and (p.stem == name or p.parts[-4:-3] == (name,))]
                source = max(files, key=lambda p: p.stat().st_size)
                copy(source, where / f"{short}_{name}{source.suffix}")
    textures = unpack("supertuxkart-data", packages) / "usr/share/games/supertuxkart"
    for path in re.findall(r"^- `(data/[^`]+)`", ATTRIBUTION.read_text(), re.M):
        source = textures / path
        if not source.is_file():
            raise SystemExit(f"{path} is not in this version of supertuxkart-data")
        copy(source, train / f"stk_{source.name}")
    for number in range(DRAWINGS):
        drawing(number).save(train / f"drawing_{number:02}.png")
    for place in (train, held):
        print(place, len(list(place.iterdir())), "pictures")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve())
