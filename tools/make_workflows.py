"""Writes workflows/*.json, the graphs that ComfyUI lists under the pack's templates, from the descriptions below.

    python tools/make_workflows.py

tools/make_thumbnails.py makes the pictures beside them.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACK = "uplift-upscale"  # the name in pyproject.toml, by which node managers find what is missing
SD15 = "v1-5-pruned-emaonly-fp16.safetensors"
SD15_URL = f"https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/{SD15}"
PUBLISHED, BUNDLED = "uplift_sd1.5vae.safetensors (download)", "uplift-mini (bundled)"
OUTPUTS = {
    "CheckpointLoaderSimple": [("MODEL", "MODEL"), ("CLIP", "CLIP"), ("VAE", "VAE")],
    "CLIPTextEncode": [("CONDITIONING", "CONDITIONING")], "EmptyLatentImage": [("LATENT", "LATENT")],
    "KSampler": [("LATENT", "LATENT")], "VAEDecode": [("IMAGE", "IMAGE")], "LoadImage": [("IMAGE", "IMAGE"),
                                                                                        ("MASK", "MASK")],
    "VAEEncode": [("LATENT", "LATENT")], "LatentUpscaleBy": [("LATENT", "LATENT")], "ImageStitch": [("IMAGE", "IMAGE")],
    "ImageScaleBy": [("IMAGE", "IMAGE")],
    "UPLiFTModelLoader": [("UPLIFT_MODEL", "UPLIFT_MODEL")],
    "UPLiFTLatentUpscale": [("LATENT", "LATENT"), ("guide", "IMAGE")], "UPLiFTImageUpscale": [("IMAGE", "IMAGE")],
    "UPLiFTColorMatch": [("IMAGE", "IMAGE")], "UPLiFTTinyVAE": [("VAE", "VAE")],
    "UPLiFTSamplePhoto": [("IMAGE", "IMAGE")],
    "UPLiFTDenseFeatures": [("UPLIFT_FEATURES", "UPLIFT_FEATURES"), ("PCA", "IMAGE")],
    "UPLiFTFeatureMask": [("MASK", "MASK"), ("heat map", "IMAGE")], "GrowMask": [("MASK", "MASK")],
    "SetLatentNoiseMask": [("LATENT", "LATENT")], "ImageScale": [("IMAGE", "IMAGE")],
    "UPLiFTFeatureSegments": [("MASK", "MASK"), ("IMAGE", "IMAGE")],
    "SaveImage": [], "PreviewImage": [], "MarkdownNote": [],
}


class Graph:
    """A workflow in the form in which ComfyUI's page saves it."""

    def __init__(self, name: str):
        self.name, self.nodes, self.links = name, [], []  # type: ignore[var-annotated]

    def add(self, kind: str, at: tuple[int, int], size: tuple[int, int], widgets: list[Any] | None = None,
            title: str = "", **inputs: tuple[int, int]) -> int:
        """A node; its inputs are (node, output) pairs. Returns its number."""
        number = len(self.nodes) + 1
        sockets = []
        for slot, (name, (source, output)) in enumerate(inputs.items()):
            origin = self.nodes[source - 1]["outputs"][output]
            link = len(self.links) + 1
            origin["links"].append(link)
            self.links.append([link, source, output, number, slot, origin["type"]])
            sockets.append({"name": name, "type": origin["type"], "link": link})
        properties = {} if kind == "MarkdownNote" else {
            "cnr_id": PACK if kind.startswith("UPLiFT") else "comfy-core", "Node name for S&R": kind}
        if kind == "CheckpointLoaderSimple":
            properties["models"] = [{"name": SD15, "url": SD15_URL, "directory": "checkpoints"}]
        node = {"id": number, "type": kind, "pos": list(at), "size": list(size), "flags": {}, "order": number - 1,
                "mode": 0, "inputs": sockets,
                "outputs": [{"name": name, "type": kind_of, "links": []} for name, kind_of in OUTPUTS[kind]],
                "properties": properties, "widgets_values": widgets or []}
        if title:
            node["title"] = title
        if kind == "MarkdownNote":
            node |= {"color": "#432", "bgcolor": "#653"}
        self.nodes.append(node)
        return number

    def write(self) -> None:
        data = {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK}/{self.name}")), "revision": 0,
                "last_node_id": len(self.nodes), "last_link_id": len(self.links), "nodes": self.nodes,
                "links": self.links, "groups": [], "config": {}, "extra": {"ds": {"scale": 0.8, "offset": [40, 60]}},
                "version": 0.4}
        (ROOT / "workflows" / f"{self.name}.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def first_pass(graph: Graph, prompt: str) -> dict[str, int]:
    """SD1.5 from checkpoint to the first sampler."""
    checkpoint = graph.add("CheckpointLoaderSimple", (0, 0), (340, 100), [SD15])
    positive = graph.add("CLIPTextEncode", (380, 0), (340, 130), [prompt], "Prompt", clip=(checkpoint, 1))
    negative = graph.add("CLIPTextEncode", (380, 180), (340, 100), ["text, watermark, blurry"], "Negative prompt",
                         clip=(checkpoint, 1))
    empty = graph.add("EmptyLatentImage", (380, 330), (340, 110), [512, 512, 1])
    sampler = graph.add("KSampler", (760, 0), (320, 270), [156680208700286, "randomize", 20, 8, "euler", "normal", 1],
                        "First pass", model=(checkpoint, 0), positive=(positive, 0), negative=(negative, 0),
                        latent_image=(empty, 0))
    return {"checkpoint": checkpoint, "positive": positive, "negative": negative, "sampler": sampler}


def uplift(graph: Graph, at: tuple[int, int], samples: int, vae: int) -> int:
    """The published model and the latent upscale."""
    loader = graph.add("UPLiFTModelLoader", (at[0] - 360, at[1] + 330), (320, 82), [PUBLISHED, "auto"])
    return graph.add("UPLiFTLatentUpscale", at, (340, 230), ["2x", 0, "fixed", 1.0, "auto"], model=(loader, 0),
                     samples=(samples, 0), vae=(vae, 2))


def note(graph: Graph, at: tuple[int, int], size: tuple[int, int], text: str) -> None:
    graph.add("MarkdownNote", at, size, [text])


def text_to_image() -> None:
    graph = Graph("UPLiFT 1 Text to image 2x")
    parts = first_pass(graph, "a lighthouse on a cliff above the sea, evening light, photograph")
    up = uplift(graph, (1120, 0), parts["sampler"], parts["checkpoint"])
    decoded = graph.add("VAEDecode", (1500, 0), (220, 46), samples=(up, 0), vae=(parts["checkpoint"], 2))
    matched = graph.add("UPLiFTColorMatch", (1500, 110), (260, 82), ["mean"], image=(decoded, 0), reference=(up, 1))
    graph.add("SaveImage", (1800, 0), (420, 460), ["uplift"], images=(matched, 0))
    note(graph, (0, 160), (340, 250),
         "### 512 to 1024 without a second diffusion pass\n\nThe sampler's latent goes straight through **UPLiFT "
         "Latent Upscale**. Its second output is the small picture; **UPLiFT Color Match** brings the colours back."
         "\n\nOn first use the published weights (214 MB) are downloaded into `models/uplift`.")
    graph.write()


def hires_fix() -> None:
    graph = Graph("UPLiFT 2 Hires fix")
    parts = first_pass(graph, "a market street in the rain, lanterns, reflections, photograph")
    up = uplift(graph, (1120, 0), parts["sampler"], parts["checkpoint"])
    second = graph.add("KSampler", (1500, 0), (320, 270), [156680208700286, "fixed", 14, 8, "euler", "normal", 0.3],
                       "Second pass, light", model=(parts["checkpoint"], 0), positive=(parts["positive"], 0),
                       negative=(parts["negative"], 0), latent_image=(up, 0))
    decoded = graph.add("VAEDecode", (1860, 0), (220, 46), samples=(second, 0), vae=(parts["checkpoint"], 2))
    graph.add("SaveImage", (1860, 110), (420, 460), ["uplift_hires"], images=(decoded, 0))
    note(graph, (0, 160), (340, 250),
         "### The hires fix that keeps the composition\n\nBilinear latents need a denoise above 0.5 to become sharp, "
         "and then the picture changes. UPLiFT's are sharp before the second pass: **0.2 to 0.35** is enough to add "
         "detail.")
    graph.write()


def photo() -> None:
    graph = Graph("UPLiFT 3 Photo 4x")
    loaded = graph.add("LoadImage", (0, 0), (320, 330), ["example.png", "image"])
    checkpoint = graph.add("CheckpointLoaderSimple", (0, 390), (340, 100), [SD15])
    loader = graph.add("UPLiFTModelLoader", (0, 550), (340, 82), [PUBLISHED, "auto"])
    up = graph.add("UPLiFTImageUpscale", (380, 0), (340, 270), ["4x", 0, "fixed", 1.0, "auto", "mean", True],
                   model=(loader, 0), image=(loaded, 0), vae=(checkpoint, 2))
    graph.add("SaveImage", (760, 0), (560, 560), ["uplift_photo"], images=(up, 0))
    note(graph, (380, 330), (340, 190),
         "Only the VAE of the checkpoint is used. **consistency** pins the result to your pixels: good for clean "
         "photographs; switch it off for noisy ones.\n\nNothing to download? See the workflow with the tiny VAE.")
    graph.write()


def side_by_side() -> None:
    graph = Graph("UPLiFT 4 Side by side")
    loaded = graph.add("LoadImage", (0, 0), (320, 330), ["example.png", "image"])
    checkpoint = graph.add("CheckpointLoaderSimple", (0, 390), (340, 100), [SD15])
    encoded = graph.add("VAEEncode", (380, 0), (220, 46), pixels=(loaded, 0), vae=(checkpoint, 2))
    bilinear = graph.add("LatentUpscaleBy", (640, 0), (340, 82), ["bilinear", 2], samples=(encoded, 0))
    loader = graph.add("UPLiFTModelLoader", (0, 550), (340, 82), [PUBLISHED, "auto"])
    up = graph.add("UPLiFTLatentUpscale", (640, 130), (340, 230), ["2x", 0, "fixed", 1.0, "auto"], model=(loader, 0),
                   samples=(encoded, 0), vae=(checkpoint, 2), image=(loaded, 0))
    plain = graph.add("VAEDecode", (1020, 0), (220, 46), title="Bilinear", samples=(bilinear, 0), vae=(checkpoint, 2))
    sharp = graph.add("VAEDecode", (1020, 130), (220, 46), title="UPLiFT", samples=(up, 0), vae=(checkpoint, 2))
    both = graph.add("ImageStitch", (1020, 240), (260, 150), ["right", True, 8, "white"], image1=(plain, 0),
                     image2=(sharp, 0))
    graph.add("PreviewImage", (1320, 0), (900, 520), images=(both, 0))
    note(graph, (640, 400), (340, 170),
         "Left: the latent enlarged bilinearly. Right: by UPLiFT.\n\nNewer versions of ComfyUI have **Compare "
         "Images**: connect the two decoded pictures there.")
    graph.write()


def offline() -> None:
    graph = Graph("UPLiFT 5 Offline photo 2x")
    sample = graph.add("UPLiFTSamplePhoto", (0, 0), (300, 60), ["chelsea"])
    loader = graph.add("UPLiFTModelLoader", (0, 120), (300, 82), [BUNDLED, "auto"])
    vae = graph.add("UPLiFTTinyVAE", (0, 260), (300, 46))
    up = graph.add("UPLiFTImageUpscale", (340, 0), (340, 270), ["2x", 0, "fixed", 1.0, "auto", "mean", True],
                   model=(loader, 0), image=(sample, 0), vae=(vae, 0))
    graph.add("SaveImage", (720, 0), (640, 480), ["uplift_offline"], images=(up, 0))
    note(graph, (340, 330), (340, 150),
         "Runs at once, without network: the small model and its VAE come with the pack.\n\nPut **Load Image** in "
         "place of the sample photo. For SD1.5 latents use the published model instead.")
    graph.write()


def click_to_inpaint() -> None:
    graph = Graph("UPLiFT 6 Click to inpaint")
    loaded = graph.add("LoadImage", (0, 0), (320, 330), ["example.png", "image"])
    checkpoint = graph.add("CheckpointLoaderSimple", (0, 390), (340, 100), [SD15])
    features = graph.add("UPLiFTDenseFeatures", (380, 0), (340, 200), ["dinov3-splus16", 512, "pixel", "auto"],
                         image=(loaded, 0))
    mask = graph.add("UPLiFTFeatureMask", (760, 0), (400, 560), ["[]", 0.6, 0.1], features=(features, 0))
    grown = graph.add("GrowMask", (1200, 0), (320, 82), [6, True], mask=(mask, 0))
    encoded = graph.add("VAEEncode", (760, 620), (220, 46), pixels=(loaded, 0), vae=(checkpoint, 2))
    masked = graph.add("SetLatentNoiseMask", (1200, 140), (320, 46), samples=(encoded, 0), mask=(grown, 0))
    positive = graph.add("CLIPTextEncode", (380, 260), (340, 130), ["a bunch of sunflowers, photograph"], "Prompt",
                         clip=(checkpoint, 1))
    negative = graph.add("CLIPTextEncode", (380, 440), (340, 100), ["text, watermark, blurry"], "Negative prompt",
                         clip=(checkpoint, 1))
    sampler = graph.add("KSampler", (1200, 250), (320, 270), [156680208700286, "fixed", 20, 8, "euler", "normal", 0.9],
                        model=(checkpoint, 0), positive=(positive, 0), negative=(negative, 0), latent_image=(masked, 0))
    decoded = graph.add("VAEDecode", (1560, 0), (220, 46), samples=(sampler, 0), vae=(checkpoint, 2))
    graph.add("SaveImage", (1560, 110), (420, 460), ["uplift_inpaint"], images=(decoded, 0))
    note(graph, (0, 550), (340, 190),
         "### Click on it, paint over it\n\nRun once (the sampler finds an empty mask and changes nothing), then click "
         "on what is to be replaced in **UPLiFT Feature Mask** and run again: only what follows the click is done "
         "anew.")
    graph.write()


def gallery() -> None:
    graph = Graph("UPLiFT 7 What DINO sees")
    loaded = graph.add("UPLiFTSamplePhoto", (0, 0), (300, 60), ["astronaut"])
    fine = graph.add("UPLiFTDenseFeatures", (340, 280), (320, 220), ["dinov3-splus16", 448, "pixel", "auto"],
                     title="UPLiFT", image=(loaded, 0))
    coarse = graph.add("UPLiFTDenseFeatures", (340, 0), (320, 220), ["dinov3-splus16", 448, "1x", "auto"],
                       title="Backbone alone, in the same colours", image=(loaded, 0), colors_of=(fine, 0))
    large = graph.add("ImageScale", (700, 0), (300, 130), ["nearest-exact", 448, 0, "disabled"], image=(coarse, 1))
    both = graph.add("ImageStitch", (700, 190), (300, 150), ["right", True, 8, "white"], image1=(large, 0),
                     image2=(fine, 1))
    graph.add("PreviewImage", (1040, 0), (760, 460), images=(both, 0))
    cut = graph.add("UPLiFTFeatureSegments", (700, 400), (300, 130), [5, 0, "fixed", 1], features=(fine, 0))
    graph.add("PreviewImage", (1040, 520), (420, 420), images=(cut, 1))
    note(graph, (0, 120), (300, 170),
         "Left: one DINOv3 feature for each 16x16 pixels. Right: one for every pixel. Below: five segments of like "
         "features. The weights (115 MB and 3 MB) are downloaded on first use.")
    graph.write()


if __name__ == "__main__":
    (ROOT / "workflows").mkdir(exist_ok=True)
    for make in (text_to_image, hires_fix, photo, side_by_side, offline, click_to_inpaint, gallery):
        make()
