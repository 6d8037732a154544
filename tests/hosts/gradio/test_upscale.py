"""The Upscale tab through its API: the core's numbers, its files, its limits; stopping; several people."""

from __future__ import annotations

import json
import struct
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from demo_host import photo
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import uplift_core as uplift
from uplift_core.imageio import read_settings


def upscale(client, path, **options):
    return client.predict(handle_file(path), api_name="/upscale", **options)


def core(image, **options):
    model = uplift.load("uplift-mini", device="cpu")
    options = {"consistency": True, **options}
    return np.asarray(uplift.upscale_image(model, uplift.load_vae("tiny"), image, **options))


def refused(call, *words):
    with pytest.raises(AppError) as error:
        call()
    for word in words:
        assert word.lower() in str(error.value).lower(), str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def client(demo):
    return demo.client()


@pytest.mark.parametrize("options", [{}, {"scale": 4, "seed": 7, "noise_strength": 0.5, "color_fix": "wavelet",
                                          "consistency": "off", "tile": "64"}])
def test_the_numbers_are_the_cores(client, picture, options):
    file, _, facts = upscale(client, picture, **options)
    wanted = {k: (False if v == "off" else v) for k, v in options.items()}
    expected = core(Image.open(picture), **wanted)
    found = np.asarray(Image.open(file))
    assert found.shape == expected.shape == (36 * facts["scale"], 44 * facts["scale"], 3)
    assert np.abs(found.astype(int) - expected).max() <= 1  # the same numbers, but for rounding between threads
    assert np.mean(found == expected) > 0.999
    other = core(Image.open(picture), **{**wanted, "seed": 8})
    if options:
        assert np.mean(found == other) < 0.999


def test_settings_are_in_the_file_and_in_the_facts(client, picture):
    file, pair, facts = upscale(client, picture, seed=3)
    inside = read_settings(file)
    assert inside["model"] == "uplift-mini" and inside["seed"] == 3 and inside["scale"] == 2
    assert Path(file).name == "picture_2x.png"
    assert {k: facts[k] for k in inside} == inside
    assert facts["from"] == [44, 36] and facts["to"] == [88, 72]
    assert facts["seconds"] > 0 and facts["peak_memory_mb"] > 50 and "bundled" in facts["notes"][0]
    low, high = (np.asarray(Image.open(p).convert("RGB")) for p in pair)
    assert low.shape == high.shape == (72, 88, 3)
    lanczos = np.asarray(Image.open(picture).resize((88, 72), Image.Resampling.LANCZOS))
    assert np.abs(low.astype(int) - lanczos).max() <= 2


def test_transparency_is_kept(client, tmp_path):
    image = photo().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(tmp_path / "clear.png")
    file, _, _ = upscale(client, tmp_path / "clear.png")
    assert Image.open(file).mode == "RGBA"


def test_many_pictures_come_as_a_zip(client, tmp_path):
    for name, seed in (("a.png", 1), ("b.png", 2)):
        photo(seed=seed).save(tmp_path / name)
    (tmp_path / "c.png").write_text("no picture at all")
    files = [handle_file(tmp_path / n) for n in ("a.png", "b.png", "c.png")]
    archive, table = client.predict(files, api_name="/upscale_batch", seed=5)
    with zipfile.ZipFile(archive) as inside:
        assert sorted(inside.namelist()) == ["a_2x.png", "b_2x.png"]
        with inside.open("b_2x.png") as file:
            found = np.asarray(Image.open(file))
    assert np.abs(found.astype(int) - core(Image.open(tmp_path / "b.png"), seed=5)).max() <= 1
    assert [row[0] for row in table["data"]] == ["a.png", "b.png", "c.png"]
    assert "not a picture" in table["data"][2][3]


# -- what must not come in ------------------------------------------------------------------------------------------

def bomb(path: Path, side: int = 30000) -> Path:
    """A PNG that unpacks to side x side pixels from a few kilobytes."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
                     + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def test_bad_pictures_are_refused_in_words_and_the_page_goes_on(demo, client, tmp_path, picture):
    photo(1200, 1000).save(tmp_path / "large.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:200])
    svg = tmp_path / "drawing.png"
    svg.write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>')
    text = tmp_path / "text.png"
    text.write_text("just words")
    empty = tmp_path / "empty.png"
    empty.touch()
    vector = tmp_path / "real.svg"
    vector.write_text(svg.read_text())
    bad = {tmp_path / "large.png": "1,000,000", bomb(tmp_path / "bomb.png"): "pixels", broken: "damaged",
           svg: "not a picture", text: "not a picture", empty: "empty", vector: "not a picture"}
    for path, word in bad.items():
        said = refused(lambda path=path: upscale(client, path), path.name, word)
        assert str(demo.temp) not in said  # where things lie on the server is nobody's business
    assert upscale(client, picture)[2]["to"] == [88, 72]
    assert "Traceback" not in demo.log(), demo.log()


def test_results_over_the_limit_are_refused_before_the_work(client, tmp_path):
    photo(900, 700).save(tmp_path / "wide.png")
    begun = time.monotonic()
    refused(lambda: upscale(client, tmp_path / "wide.png", scale=8), "7200x5600", "smaller scale")
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("options, word", [
    ({"scale": 1}, "2, 4, 8"), ({"scale": 99}, "2, 4, 8"), ({"scale": 3.5e9}, "2, 4, 8"), ({"seed": -1}, "inimum"),
    ({"noise_strength": 9}, "aximum"), ({"color_fix": "rainbow"}, "hoice"), ({"consistency": "maybe"}, "hoice"),
    ({"tile": "-3"}, "tile"), ({"tile": "x" * 10000}, "tile"), ({"model": "nothing"}, "no model is called"),
    ({"model": "/etc/passwd"}, "no model is called"), ({"vae": "../../secret"}, "no VAE is called"),
    ({"model": "sd15-vae"}, "Models tab"), ({"vae": "sd15"}, "Models tab"), ({"model": "dinov2-s14"}, "Models tab")])
def test_bad_options_are_refused_in_words(client, picture, options, word):
    said = refused(lambda: upscale(client, picture, **options), word)
    assert len(said) < 21000


def test_no_picture_is_said_so(client):
    refused(lambda: client.predict(None, api_name="/upscale"), "no picture yet")


# -- files outside --------------------------------------------------------------------------------------------------

def raw(demo, endpoint, data):
    """A call as any program can make it, without the client's own care for paths."""
    request = urllib.request.Request(f"{demo.url}/gradio_api/call/{endpoint}", json.dumps({"data": data}).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        number = json.load(answer)["event_id"]
    return demo.get(f"/gradio_api/call/{endpoint}/{number}").decode()


def test_files_outside_cannot_be_read(demo, client, picture):
    secret = demo.home / "secret.txt"
    secret.write_text("nobody may read this")
    Image.new("RGB", (40, 40), "red").save(demo.home / "private.png")
    outside = [secret, demo.home / "private.png", Path("/etc/passwd"), Path(__file__), demo.log_path,
               demo.temp / ".." / "secret.txt"]
    for path in outside:
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/"):
            with pytest.raises(urllib.error.HTTPError) as error:
                demo.get(f"{route}{path}")
            assert error.value.code in (403, 404, 405), (route, path)
    for path in (demo.home / "private.png", Path("/etc/passwd"), Path(f"file://{demo.home}/private.png")):
        told = {"path": str(path), "meta": {"_type": "gradio.FileData"}, "orig_name": "x.png"}
        for endpoint, given in (("upscale", told), ("upscale_batch", [told])):
            answer = raw(demo, endpoint, [given, "auto", 2, 0, 1, "mean", "auto", "auto", "auto"])
            assert "event: error" in answer and "event: complete" not in answer, answer
            assert "root:" not in answer
    assert not list(demo.temp.rglob("private*"))
    assert upscale(client, picture)


def test_the_queue_cannot_be_gone_around(demo):
    body = json.dumps({"data": [None] * 9}).encode()
    for route in ("/gradio_api/run/upscale", "/gradio_api/api/upscale"):
        request = urllib.request.Request(demo.url + route, body, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(request, timeout=30)


# -- stopping, and several people -----------------------------------------------------------------------------------

def started(demo, job):
    """Wait until the work itself is under way."""
    for _ in range(600):
        status = job.status()
        data = status.progress_data
        if data and "nlarging" in (data[0].desc or "") and (data[0].progress or 0) > 0:
            return
        assert not job.done(), job.outputs() or job.exception()
        time.sleep(0.1)
    raise AssertionError("the work did not start")


def test_cancel_frees_the_worker(demo, tmp_path, picture):
    photo(900, 700).save(tmp_path / "long.png")
    first, second = demo.client(), demo.client()
    job = first.submit(handle_file(tmp_path / "long.png"), scale=2, api_name="/upscale")
    started(demo, job)
    before = time.monotonic()
    job.cancel()
    assert upscale(second, picture)[2]["to"] == [88, 72]
    assert time.monotonic() - before < 15  # the whole would take minutes


def test_two_people_get_their_own_results(demo, tmp_path):
    results, errors = {}, []

    def person(number):
        try:
            path = tmp_path / f"of-{number}.png"
            photo(40 + 8 * number, 32, seed=number).save(path)
            results[number] = upscale(demo.client(), path, seed=number)[0]
        except Exception as error:  # shown below
            errors.append(error)

    people = [threading.Thread(target=person, args=(n,)) for n in range(3)]
    for one in people:
        one.start()
    for one in people:
        one.join()
    assert not errors
    for number, file in results.items():
        assert Path(file).name == f"of-{number}_2x.png"
        found = np.asarray(Image.open(file)).astype(int)
        assert np.abs(found - core(photo(40 + 8 * number, 32, seed=number), seed=number)).max() <= 1


def test_nothing_is_written_outside_the_temporary_folder(demo):
    allowed = {"temp", "downloads", "secret.txt", "private.png", demo.log_path.name}
    new = {p.relative_to(demo.home).parts[0] for p in demo.home.rglob("*") if p.is_file()}
    assert new <= allowed, new - allowed
