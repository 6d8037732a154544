"""Pictures and guides: crop number n is always the same, whatever else is in the folder."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from training_runs import logged, recipe
from uplift_core.errors import InputError
from uplift_core.training import Trainer
from uplift_core.training.objective import pyramid
from uplift_core.training.photos import Photos, Positions
from uplift_core.training.recipe import DataPart


def test_crops_depend_on_their_number_alone(photos):
    part = DataPart(size=48, zoom=2, turns=True)
    one, other = Photos(photos, part, 5, 1 << 30), Photos(photos, part, 5)
    for n in (0, 7, 3, 100, 3):
        assert torch.equal(one[n]["image"], other[n]["image"])
    assert not torch.equal(one[0]["image"], Photos(photos, part, 6)[0]["image"])
    assert sorted(one._index(n)[1] for n in range(3, 6)) == [0, 1, 2]  # an epoch shows every picture


def test_crops_come_again_when_asked_to(photos):
    few = Photos(photos, DataPart(size=48, crops_per_photo=2), 1)
    seen = {}
    for n in range(30):
        seen.setdefault(few._index(n)[1], set()).add(few[n]["key"])
    assert {len(keys) for keys in seen.values()} <= {1, 2}


def test_a_center_crop_is_the_resized_center(photos):
    crop = Photos(photos, DataPart(size=50, crop="center", flips=False), 0)
    names = [p.name for p in crop.files]
    picture = data.astronaut()[:100, :140]
    n = next(n for n in range(3) if crop._index(n)[1] == names.index("astronaut.png"))
    expected = Image.fromarray(picture).resize((70, 50), Image.Resampling.BILINEAR).crop((10, 0, 60, 50))
    assert np.abs(crop[n]["image"].permute(1, 2, 0).numpy() * 255 - np.asarray(expected, float)).max() < 1.01


def test_broken_pictures_are_skipped_and_named(tmp_path):
    Image.fromarray(data.coffee()[:64, :64]).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG nothing")
    photos = Photos(tmp_path, DataPart(size=32), 0)
    items = [photos[n] for n in range(4)]
    assert sum("bad.png" in item["broken"] for item in items) == 2
    (tmp_path / "good.png").unlink()
    with pytest.raises(InputError, match=r"bad\.png"):
        Photos(tmp_path, DataPart(size=32), 0)[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures"):
        Photos(tmp_path / "empty", DataPart(size=32), 0)


def test_linked_folders_are_looked_into_once(photos, tmp_path):
    (tmp_path / "own").mkdir()
    Image.fromarray(data.coffee()[:64, :64]).save(tmp_path / "own" / "mine.png")
    for name, target in (("a", photos), ("b", photos), ("own/round", tmp_path)):
        (tmp_path / name).symlink_to(target)
    found = Photos(tmp_path, DataPart(size=32), 0).files
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "a/astronaut.png", "a/more/chelsea.png", "a/more/coffee.png", "own/mine.png"]


def test_what_stands_in_for_a_broken_picture_is_another_crop_of_its_neighbour(tmp_path):
    Image.fromarray(data.coffee()[:200, :200]).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    photos = Photos(tmp_path, DataPart(size=32, zoom=4), 0)
    for epoch in range(3):
        one, other = (photos[2 * epoch + n]["image"] for n in range(2))
        assert not torch.equal(one, other)
    assert torch.equal(photos[0]["image"], Photos(tmp_path, DataPart(size=32, zoom=4), 0)[0]["image"])


def test_processes_share_the_positions():
    whole = list(Positions(4, 1, 3))
    halves = [list(Positions(2, 1, 3, rank, 2)) for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == whole
    assert halves[0] == [4, 5, 8, 9]


def test_tiny_pictures_are_enlarged_to_the_crop(tmp_path):
    for name, size in (("dot", (1, 1)), ("strip", (200, 3)), ("small", (20, 31))):
        Image.new("RGB", size, (200, 100, 50)).save(tmp_path / f"{name}.png")
    for crop in ("random", "center"):
        photos = Photos(tmp_path, DataPart(size=32, crop=crop, zoom=3, turns=True), 0)
        for n in range(6):
            item = photos[n]
            colours = (item["image"] * 255).round().to(torch.uint8)
            assert colours.shape == (3, 32, 32) and not item["broken"]
            assert (colours == torch.tensor([200, 100, 50], dtype=torch.uint8).view(3, 1, 1)).all()
    (tmp_path / "tall").mkdir()
    picture = Image.fromarray(data.coffee()[100:140, 200:208])
    picture.save(tmp_path / "tall" / "tall.png")
    crop = Photos(tmp_path / "tall", DataPart(size=32, crop="center", flips=False), 0)[0]["image"]
    expected = picture.resize((32, 160), Image.Resampling.BILINEAR).crop((0, 64, 32, 96))  # in proportion
    assert np.abs(crop.permute(1, 2, 0).numpy() * 255 - np.asarray(expected, float)).max() < 1.01


def test_nested_folders_are_counted_whole_and_what_is_broken_in_them_too(photos, codec, tmp_path, caplog):
    """One epoch of pictures at every depth, among them tiny, broken and empty ones; text and hidden folders do not
    count."""
    folder = tmp_path / "pictures"
    deepest = folder / "a" / "b" / "c"
    for place in (deepest, folder / "d", folder / ".thumbnails"):
        place.mkdir(parents=True)
    for place in (folder, folder / "a", folder / "a" / "b", deepest, folder / "d", folder / ".thumbnails"):
        Image.fromarray(data.coffee()[:70, :80]).save(place / "good.png")
        Image.new("RGB", (5, 7), "red").save(place / "tiny.JPG")
    whole = (folder / "good.png").read_bytes()
    for place, content in ((folder, b""), (deepest, whole[:len(whole) // 2]), (folder / "d", b"text"),
                           (folder / ".thumbnails", b"")):
        (place / "broken.png").write_bytes(content)
    (folder / "a" / "notes.txt").write_text("no picture")
    trainer = Trainer(recipe(run={"epochs": 1, "log_every": 1}, data__batch=1), folder, tmp_path / "out", teacher=codec,
                      cpu=True)
    assert len(trainer.photos) == 5 + 5 + 3 and trainer.steps == 13
    trainer.run()
    assert [int(row["step"]) for row in logged(tmp_path / "out")] == list(range(1, 14))
    assert len(trainer.broken) == 3 and caplog.text.count("3 pictures could not be read, skipped") == 1
    for place in (folder, deepest, folder / "d"):
        assert sum(str(place / "broken.png") in line for line in trainer.broken) == 1


def shown(trainer):
    """Run, and list what the model was shown: guide and input of every step and depth."""
    seen = []
    trainer.task.network.register_forward_pre_hook(lambda module, given: seen.append(given[:2]))
    torch.seed()  # what others draw changes nothing
    trainer.run()
    return seen


@pytest.mark.parametrize("share", [0.0, 1.0, 0.3])
def test_that_share_of_the_guides_is_decoded_latents(photos, codec, tmp_path, share):
    """The others are the small pictures themselves; the latents are those of the small pictures for all of them."""
    run = recipe(data__guides_decoded=share, data__batch=8, run__steps=12, run__save_every=0,
                 latents={"augment": 0.0, "normalise": False})
    trainer = Trainer(run, photos, tmp_path / "out", teacher=codec, cpu=True)
    seen = iter(shown(trainer))
    decoded = torch.zeros(12, 2, 8, dtype=torch.bool)
    for step in range(12):
        sizes = pyramid(torch.stack([trainer.photos[step * 8 + i]["image"] for i in range(8)]), 2)
        for depth in (1, 2):
            guides, latents = next(seen)
            expected = codec.encode(sizes[depth], tile=None)
            torch.testing.assert_close(latents, expected)
            again = codec.decode(expected, tile=None)
            for i, guide in enumerate(guides):
                choices = [bool((guide - one[i]).abs().max() < 1e-5) for one in (sizes[depth], again)]
                assert sum(choices) == 1
                decoded[step, depth - 1, i] = choices[1]
    assert torch.equal(decoded[:, 0], decoded[:, 1])  # a picture's guides are of one kind
    assert abs(float(decoded.float().mean()) - share) <= (0.12 if 0 < share < 1 else 0)
    if 0 < share < 1:
        assert len(set(decoded[:, 0].sum(1).tolist())) > 1  # drawn for each picture, not the same number a batch


def test_which_guides_are_decoded_follows_from_the_seed(photos, codec, tmp_path):
    first, again, other = (
        [guide for guide, _ in shown(Trainer(recipe(
            data__guides_decoded=0.5, data__crop="center", data__flips=False, data__batch=3, run__seed=seed,
            latents__normalise=False), photos, tmp_path / name, teacher=codec, cpu=True))]
        for name, seed in (("first", 5), ("again", 5), ("other", 6)))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not all(torch.equal(one.mean(0), two.mean(0)) for one, two in zip(first, other, strict=True))
