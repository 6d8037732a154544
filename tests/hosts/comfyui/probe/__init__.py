"""Nodes for the tests alone: what passes through a graph comes out as a file, and odd latents go in."""

import json
import os
import sys

import folder_paths
import torch
from aiohttp import web
from comfy import model_management
from comfy.nested_tensor import NestedTensor
from server import PromptServer

if os.environ.get("PROBE_FP16"):  # a host that prefers half precision, as on most graphics cards
    model_management.should_use_fp16 = lambda *_, **__: True


@web.middleware
async def newer_page(request, handler):
    """A year newer page, for whoever calls this server "localhost" instead of 127.0.0.1."""
    folder = os.environ.get("PROBE_NEWER_PAGE", "")
    if not folder or not request.host.startswith("localhost"):
        return await handler(request)
    file = os.path.join(folder, request.path.lstrip("/") or "index.html")
    if os.path.isfile(file):
        return web.FileResponse(file)
    answer = await handler(request)
    if request.path.removeprefix("/api") == "/extensions":
        own = [os.path.join(at, name) for at, _, names in os.walk(os.path.join(folder, "extensions")) for name in names]
        packs = [path for path in json.loads(answer.text) if not path.startswith("/extensions/core/")]
        answer = web.json_response(["/" + os.path.relpath(path, folder) for path in own if path.endswith(".js")]
                                   + packs)
    return answer


PromptServer.instance.app.middlewares.append(newer_page)


class ProbeSave:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("*",), "name": ("STRING", {"default": "probe"})}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "save", True, "probe"

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def save(self, value, name):
        path = os.path.join(folder_paths.get_output_directory(), name + ".pt")
        torch.save(value, path)
        return {"ui": {"saved": [path]}}


class ProbeTake(ProbeSave):
    """Asks for a value and forgets it."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("*",)}})

    def save(self, value):
        return {}


class ProbeLatent:
    """samples of the file, or nested."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"path": ("STRING", {}), "nested": ("BOOLEAN", {})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "load", "probe"

    def load(self, path, nested):
        latent = torch.load(path)
        if nested:
            latent["samples"] = NestedTensor([latent["samples"], latent["samples"]])
        return (latent,)


class ProbeImage:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"path": ("STRING", {})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "load", "probe"

    def load(self, path):
        return (torch.load(path),)


class ProbeKept:
    """Passes an image on; features of it that are larger than ``kept`` go to a file."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"image": ("IMAGE",), "kept": ("INT", {"max": 1 << 40})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "set", "probe"

    def set(self, image, kept):
        (module,) = [m for name, m in sys.modules.items() if name.endswith(".nodes.dense_features")]
        module.KEPT_IN_MEMORY = kept
        return (image,)


class ProbeMask(ProbeImage):
    RETURN_TYPES = ("MASK",)


class ProbeCount:
    """Passes an image on and counts how often it was asked to."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"vae": ("VAE",), "name": ("STRING", {})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "count", "probe"

    def count(self, vae, name):
        with open(os.path.join(folder_paths.get_output_directory(), name), "a") as file:
            file.write("x")
        return (vae,)


class ProbeOutOfMemory:
    """Lets the model through; the next run of it without tiles ends as on a full card."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("UPLIFT_MODEL",), "name": ("STRING", {})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("UPLIFT_MODEL",), "arm", "probe"

    def arm(self, model, name):
        (run,) = [module for key, module in sys.modules.items() if key.endswith(".nodes.run")]
        real, error = run.upscale_latents, run.OutOfMemory

        def full(*arguments, tile, **options):
            with open(os.path.join(folder_paths.get_output_directory(), name), "a") as file:
                file.write(f"{tile} ")
            if tile is None:
                raise error("out of memory (pretended); choose tiles")
            run.upscale_latents = real
            return real(*arguments, tile=tile, **options)

        run.upscale_latents = full
        return (model,)


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (ProbeSave, ProbeTake, ProbeLatent, ProbeImage, ProbeMask,
                                                        ProbeKept, ProbeCount, ProbeOutOfMemory)}
