"""Every node in a real ComfyUI, its numbers against the core called directly."""

from __future__ import annotations

import time
import urllib.request

import pytest
import torch

from hosts.comfyui.comfy_host import Failed, graph
from uplift_core import load, load_vae, match_color, upscale_image, upscale_latents

pytestmark = pytest.mark.slow

NODES = {"UPLiFTModelLoader", "UPLiFTLatentUpscale", "UPLiFTImageUpscale", "UPLiFTColorMatch", "UPLiFTTinyVAE"}
LOADER = ("UPLiFTModelLoader", {"model_name": "small.safetensors", "dtype": "auto"})
MINI = ("UPLiFTModelLoader", {"model_name": "uplift-mini (bundled)", "dtype": "auto"})
LATENT = {"scale": "2x", "seed": 7, "noise_strength": 1.0, "tile": "auto"}
IMAGE = {"scale": "2x", "seed": 7, "noise_strength": 1.0, "tile": "auto", "color_fix": "mean", "consistency": True}


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1.0, float(b.std()))


@pytest.fixture
def put(base, tmp_path):
    """Writes a value to a file for the probe nodes; returns its path."""
    def write(value, name="value"):
        path = tmp_path / f"{name}.pt"
        torch.save(value, path)
        return str(path)
    return write


@pytest.fixture
def saved(base):
    def read(name):
        return torch.load(base / "output" / f"{name}.pt")
    return read


def some_latent(batch=1, channels=4, height=6, width=8, seed=0):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def some_image(batch=1, height=48, width=64, seed=1):
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed))


def latent_graph(path, *, vae="taesd", model=LOADER, nested=False, **options):
    """The latent of a file through UPLiFT Latent Upscale into ``out`` and ``guide``."""
    return graph(
        model=model, vae=("VAELoader", {"vae_name": vae}), latent=("ProbeLatent", {"path": path, "nested": nested}),
        up=("UPLiFTLatentUpscale", {**LATENT, "model": ("model", 0), "samples": ("latent", 0), "vae": ("vae", 0),
                                    **options}),
        out=("ProbeSave", {"value": ("up", 0), "name": "out"}), guide=("ProbeSave", {"value": ("up", 1),
                                                                                     "name": "guide"}))


def image_graph(path, **options):
    return graph(
        model=MINI, vae=("UPLiFTTinyVAE", {}), image=("ProbeImage", {"path": path}),
        up=("UPLiFTImageUpscale", {**IMAGE, "model": ("model", 0), "image": ("image", 0), "vae": ("vae", 0),
                                   **options}),
        out=("ProbeSave", {"value": ("up", 0), "name": "out"}))


def test_nodes_are_there_and_explain_every_input(comfy):
    info = comfy.get("/object_info")
    assert {name for name in info if name.startswith("UPLiFT")} >= NODES
    for name in NODES:
        node = info[name]
        assert node["display_name"] and node["description"]
        for kind in ("required", "optional"):
            for option, (_, details) in node["input"].get(kind, {}).items():
                assert details.get("tooltip"), f"{name}.{option}"


def test_nothing_of_ours_fails_in_the_log(comfy):
    started, _, _ = comfy.log().partition("To see the GUI")  # what follows is other tests', some of which fail jobs
    lines = [line for line in started.splitlines() if "uplift" in line.replace("uplift-tests", "").lower()]
    assert lines and not any("FAILED" in line or "Error" in line for line in lines)


@pytest.mark.parametrize("scale, tile", [("2x", "auto"), ("4x", "off"), ("2x", "256"), ("8x", "auto")])
def test_latent_upscale_is_the_core(comfy, put, saved, base, scale, tile):
    latent = some_latent()
    comfy.run(latent_graph(put({"samples": latent}), scale=scale, tile=tile))
    out, guide = saved("out"), saved("guide")
    assert guide.shape == (1, 48, 64, 3)
    model = load(base / "models/uplift/small.safetensors", device="cpu")
    expected = upscale_latents(model, latent, guide.movedim(-1, 1), scale=int(scale[0]), seed=7)
    close(out["samples"], expected)


def test_guide_is_the_decoded_latent(comfy, put, saved, base):
    latent = some_latent()
    comfy.run(latent_graph(put({"samples": latent})))
    codec = load_vae(base / "models/vae_approx/taesd_decoder.safetensors")
    close(saved("guide").movedim(-1, 1), codec.decode(latent), 1e-4)


def test_latent_keeps_its_other_entries_and_batch_seeds(comfy, put, saved):
    batch = {"samples": some_latent(3), "noise_mask": torch.ones(3, 1, 48, 64), "batch_index": [0, 1, 2], "own": "x"}
    comfy.run(latent_graph(put(batch)))
    all_three = saved("out")
    assert set(all_three) == set(batch) and all_three["own"] == "x"
    assert torch.equal(all_three["noise_mask"], batch["noise_mask"])
    one = {"samples": batch["samples"][2:], "batch_index": [2]}
    comfy.run(latent_graph(put(one, "one")))
    close(saved("out")["samples"], all_three["samples"][2:])


def test_seed_and_noise_strength_count(comfy, put, saved):
    path = put({"samples": some_latent()})
    results = []
    for options in ({}, {"seed": 8}, {"noise_strength": 0.0}, {"noise_strength": 2.0}, {"seed": 7, "tile": "off"}):
        comfy.run(latent_graph(path, **options))
        results.append(saved("out")["samples"])
    assert all(not torch.allclose(results[0], other) for other in results[1:4])
    close(results[0], results[4])


def test_half_precision_latents_come_back_as_such(comfy, put, saved):
    comfy.run(latent_graph(put({"samples": some_latent().half()})))
    assert saved("out")["samples"].dtype == torch.float16


def test_connected_image_guides_and_saves_the_decode(comfy, put, saved, base):
    latent, image = some_latent(), some_image()
    nodes = latent_graph(put({"samples": latent}, "latent"), image=("image", 0))
    nodes["up"]["inputs"]["vae"] = ["counted", 0]
    nodes |= graph(image=("ProbeImage", {"path": put(image, "image")}),
                   counted=("ProbeCount", {"vae": ("vae", 0), "name": "counted"}))
    comfy.run(nodes)
    assert not (base / "output" / "counted").exists()
    close(saved("guide"), image)
    model = load(base / "models/uplift/small.safetensors", device="cpu")
    close(saved("out")["samples"], upscale_latents(model, latent, image.movedim(-1, 1), scale=2, seed=7))


def test_the_photo_behind_vae_encode_fits_though_it_was_cropped(comfy, put, saved):
    image = some_image(height=51, width=67)
    nodes = latent_graph(put({"samples": some_latent()}, "latent"), image=("image", 0))
    comfy.run(nodes | graph(image=("ProbeImage", {"path": put(image, "image")})))
    close(saved("guide"), image[:, 1:49, 1:65])


@pytest.mark.parametrize("options", [{}, {"scale": "3x", "color_fix": "wavelet"}, {"consistency": False},
                                     {"scale": "4x", "color_fix": "none", "tile": "256"}])
def test_image_upscale_is_the_core(comfy, put, saved, options):
    image = some_image(2, 45, 61)
    comfy.run(image_graph(put(image), **options))
    chosen = IMAGE | options
    model, vae = load("uplift-mini", device="cpu"), load_vae("tiny")
    for i in range(2):
        expected = upscale_image(model, vae, image[i:i + 1].movedim(-1, 1), scale=int(chosen["scale"][0]), seed=7 + i,
                                 color_fix=chosen["color_fix"], consistency=chosen["consistency"])
        close(saved("out")[i:i + 1].movedim(-1, 1), expected, 1e-4)


def test_alpha_is_left_out(comfy, put, saved):
    image = torch.cat([some_image(), torch.ones(1, 48, 64, 1)], -1)
    comfy.run(image_graph(put(image)))
    assert saved("out").shape == (1, 96, 128, 3)


@pytest.mark.parametrize("method", ["mean", "adain", "wavelet"])
def test_color_match_is_the_core(comfy, put, saved, method):
    image, reference = some_image(2), some_image(1, 24, 20, seed=5)
    comfy.run(graph(image=("ProbeImage", {"path": put(image, "image")}),
                    reference=("ProbeImage", {"path": put(reference, "reference")}),
                    match=("UPLiFTColorMatch", {"image": ("image", 0), "reference": ("reference", 0),
                                                "method": method}),
                    out=("ProbeSave", {"value": ("match", 0), "name": "out"})))
    expected = match_color(image.movedim(-1, 1), reference.movedim(-1, 1), method).clamp(0, 1)
    close(saved("out").movedim(-1, 1), expected)


def test_tiny_vae_serves_the_hosts_own_nodes(comfy, put, saved):
    image = some_image(1, 72, 128)
    comfy.run(graph(vae=("UPLiFTTinyVAE", {}), image=("ProbeImage", {"path": put(image)}),
                    encoded=("VAEEncode", {"pixels": ("image", 0), "vae": ("vae", 0)}),
                    decoded=("VAEDecode", {"samples": ("encoded", 0), "vae": ("vae", 0)}),
                    tiled=("VAEDecodeTiled", {"samples": ("encoded", 0), "vae": ("vae", 0), "tile_size": 64,
                                              "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}),
                    a=("ProbeSave", {"value": ("encoded", 0), "name": "encoded"}),
                    b=("ProbeSave", {"value": ("decoded", 0), "name": "decoded"}),
                    c=("ProbeSave", {"value": ("tiled", 0), "name": "tiled"})))
    codec = load_vae("tiny")
    latent = codec.encode(image.movedim(-1, 1))
    close(saved("encoded")["samples"], latent)
    close(saved("decoded").movedim(-1, 1), codec.decode(latent))
    close(saved("tiled").movedim(-1, 1), codec.decode(latent), 0.3)


def test_the_bundled_pair_behind_the_hosts_own_nodes(comfy, put, saved):
    """VAE Encode, UPLiFT Latent Upscale, VAE Decode with what comes along: the core's numbers, and a line that says
    which model it is."""
    image = some_image(1, 48, 64)
    comfy.run(graph(
        model=MINI, vae=("UPLiFTTinyVAE", {}), image=("ProbeImage", {"path": put(image)}),
        encoded=("VAEEncode", {"pixels": ("image", 0), "vae": ("vae", 0)}),
        up=("UPLiFTLatentUpscale", {**LATENT, "model": ("model", 0), "samples": ("encoded", 0), "vae": ("vae", 0),
                                    "image": ("image", 0)}),
        decoded=("VAEDecode", {"samples": ("up", 0), "vae": ("vae", 0)}),
        out=("ProbeSave", {"value": ("decoded", 0), "name": "out"})))
    model, codec = load("uplift-mini", device="cpu"), load_vae("tiny")
    guide = image.movedim(-1, 1)
    latent = upscale_latents(model, codec.encode(guide), guide, scale=2, seed=LATENT["seed"])
    close(saved("out").movedim(-1, 1), codec.decode(latent).clamp(0, 1), 1e-4)
    assert "the small bundled model" in comfy.log()


def test_the_bundled_model_refuses_sd15_latents_and_the_bundled_vae_sd15_models(comfy, put):
    latent = put({"samples": some_latent()})
    with pytest.raises(Failed, match="uplift-mini.*32.*channels|tiny"):
        comfy.run(latent_graph(latent, model=MINI))
    nodes = latent_graph(latent)
    nodes["vae"] = {"class_type": "UPLiFTTinyVAE", "inputs": {}}
    with pytest.raises(Failed, match="tiny"):
        comfy.run(nodes)


def test_second_pass_and_decode_from_a_checkpoint(comfy, saved, base):
    """The hires-fix graph with a random SD1.5: sample, UPLiFT, sample again at low denoise, decode, colours."""
    sampler = {"steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "positive": ("text", 0),
               "negative": ("text", 0), "model": ("checkpoint", 0), "seed": 1}
    comfy.run(graph(
        checkpoint=("CheckpointLoaderSimple", {"ckpt_name": "random_sd15.ckpt"}), model=LOADER,
        text=("CLIPTextEncode", {"text": "a lake", "clip": ("checkpoint", 1)}),
        empty=("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        first=("KSampler", {**sampler, "latent_image": ("empty", 0), "denoise": 1.0}),
        up=("UPLiFTLatentUpscale", {**LATENT, "model": ("model", 0), "samples": ("first", 0),
                                    "vae": ("checkpoint", 2)}),
        second=("KSampler", {**sampler, "latent_image": ("up", 0), "denoise": 0.3}),
        decoded=("VAEDecode", {"samples": ("second", 0), "vae": ("checkpoint", 2)}),
        matched=("UPLiFTColorMatch", {"image": ("decoded", 0), "reference": ("up", 1), "method": "mean"}),
        a=("ProbeSave", {"value": ("first", 0), "name": "first"}), b=("ProbeSave", {"value": ("up", 0), "name": "up"}),
        c=("ProbeSave", {"value": ("up", 1), "name": "guide"}), d=("ProbeSave", {"value": ("matched", 0),
                                                                                  "name": "matched"})))
    assert saved("matched").shape == (1, 128, 128, 3)
    model = load(base / "models/uplift/small.safetensors", device="cpu")
    close(saved("up")["samples"], upscale_latents(model, saved("first")["samples"], saved("guide").movedim(-1, 1),
                                                  scale=2, seed=7))


# -- what goes wrong ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape, nested, message", [
    ((1, 16, 6, 8), False, r"16 channels \(like a latent of Stable Diffusion 3 or Flux\).*takes 4.*Stable Diffusion 1"),
    ((1, 32, 6, 8), False, r"32 channels \(like a latent of the bundled tiny codec\)"),
    ((1, 4, 5, 6, 8), False, "video model"),
    ((4, 6, 8), False, r"is 4x6x8; expected batch x 4"),
    ((1, 4, 6, 8), True, "nested"),
])
def test_foreign_latents_are_named(comfy, put, shape, nested, message):
    with pytest.raises(Failed, match=message):
        comfy.run(latent_graph(put({"samples": torch.zeros(shape)}), nested=nested))
    comfy.get("/system_stats")


@pytest.mark.parametrize("image, message", [
    (some_image(height=96), "the image is 64x96 and the latent covers 64x48"),
    (some_image(2), "1 latents and 2 pictures"),
    (torch.zeros(1, 48, 64, 1), "expected an IMAGE"),
])
def test_guides_that_do_not_fit(comfy, put, image, message):
    nodes = latent_graph(put({"samples": some_latent()}, "latent"), image=("image", 0))
    with pytest.raises(Failed, match=message):
        comfy.run(nodes | graph(image=("ProbeImage", {"path": put(image, "image")})))


@pytest.mark.parametrize("vae, message", [("taesdxl", "makes 'sdxl'.*SDXL"), ("taef1", "16 latent channels.*Flux")])
def test_vaes_of_other_spaces(comfy, put, vae, message):
    with pytest.raises(Failed, match=message):
        comfy.run(latent_graph(put({"samples": some_latent()}), vae=vae))


@pytest.mark.parametrize("options, message", [
    ({"scale": "3x"}, "scale.*3x"), ({"tile": "17"}, "tile.*17"), ({"noise_strength": 3.0}, "noise_strength|bigger"),
    ({"seed": -1}, "seed|smaller")])
def test_options_out_of_range(comfy, put, options, message):
    with pytest.raises(Failed, match=message):
        comfy.run(latent_graph(put({"samples": some_latent()}), **options))


def test_a_result_that_cannot_fit_is_refused_before_anything_runs(comfy, put, base):
    huge = {"samples": torch.zeros(1, 4, 1, 1).expand(1, 4, 6000, 6000)}
    nodes = latent_graph(put(huge), scale="8x")
    start = time.time()
    with pytest.raises(Failed, match=r"48000x48000.* GB .*smaller scale"):
        comfy.run(nodes)
    assert time.time() - start < 20
    with pytest.raises(Failed, match=r"pictures of 96000x96000.* GB"):
        comfy.run(image_graph(put(torch.zeros(1, 1, 1, 1).expand(1, 12000, 12000, 3), "picture"), scale="8x"))
    comfy.get("/system_stats")


def test_progress_is_shown(comfy, put):
    values = []
    comfy.run(image_graph(put(some_image(2, 128, 128)), tile="256"),
              on_event=lambda e: values.append(e["data"]["value"] / e["data"]["max"])
              if e["type"] == "progress" and e["data"]["node"] == "up" else None)
    assert len(values) >= 5 and values == sorted(values) and values[-1] == 1


def test_interrupt_ends_the_work_at_once(comfy, put):
    asked = []

    def interrupt(event):
        if event["type"] == "progress" and event["data"]["node"] == "up" and not asked:
            urllib.request.urlopen(urllib.request.Request(comfy.url + "/interrupt", b"", method="POST"), timeout=10)
            asked.append(time.time())

    _, events = comfy.run(image_graph(put(some_image(1, 512, 512)), scale="8x", seed=99), on_event=interrupt)
    assert events[-1]["type"] == "execution_interrupted"
    assert time.time() - asked[0] < 2
    comfy.run(image_graph(put(some_image())))  # the next job is not interrupted


def test_weights_out_of_reach_are_named(comfy, put):
    name = "uplift_sd1.5vae.safetensors (download)"
    model = ("UPLiFTModelLoader", {"model_name": name, "dtype": "auto"})
    with pytest.raises(Failed, match=r"uplift_sd1.5vae.safetensors could not be downloaded.*https://.*models/uplift"):
        comfy.run(latent_graph(put({"samples": some_latent()}), model=model))


def test_a_name_without_its_file_is_refused_with_the_choices(comfy, put):
    model = ("UPLiFTModelLoader", {"model_name": "gone.safetensors", "dtype": "auto"})
    with pytest.raises(Failed, match=r"gone.safetensors.*is not in .*models/uplift.*uplift-mini \(bundled\)"):
        comfy.run(latent_graph(put({"samples": some_latent()}), model=model))


def test_a_file_that_is_no_uplift(comfy, put, base):
    torch.save({"state_dict": {"a": torch.zeros(3)}}, base / "models/uplift/other.pth")
    model = ("UPLiFTModelLoader", {"model_name": "other.pth", "dtype": "auto"})
    with pytest.raises(Failed, match="other.pth"):
        comfy.run(latent_graph(put({"samples": some_latent()}), model=model))


def test_bundled_model_keeps_its_name_in_old_workflows(comfy, put):
    for name in ("uplift-mini (bundled)", "uplift-mini"):
        nodes = image_graph(put(some_image()))
        nodes["model"]["inputs"]["model_name"] = name
        comfy.run(nodes)


def test_out_of_memory_falls_back_to_tiles(comfy, put, saved, base):
    """tile "off" on a full card: the node goes on in tiles, with the same numbers, and says so in the log."""
    path = put({"samples": some_latent()})
    comfy.run(latent_graph(path, tile="off"))
    expected = saved("out")["samples"]
    run = latent_graph(path, tile="off")
    run["full"] = {"class_type": "ProbeOutOfMemory", "inputs": {"model": ["model", 0], "name": "tiles.txt"}}
    run["up"]["inputs"]["model"] = ["full", 0]
    comfy.run(run)
    close(saved("out")["samples"], expected)
    assert (base / "output" / "tiles.txt").read_text().split() == ["None", "auto"]
    assert "out of memory (pretended)" in comfy.log()
