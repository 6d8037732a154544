"""Nodes for the tests alone: what passes through a graph comes out as a file, and odd latents go in."""

import os
import sys

import folder_paths
import torch
from comfy import model_management
from comfy.nested_tensor import NestedTensor

if os.environ.get("PROBE_FP16"):  # a host that prefers half precision, as on most graphics cards
    model_management.should_use_fp16 = lambda *_, **__: True


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


NODE_CLASS_MAPPINGS = {"ProbeSave": ProbeSave, "ProbeLatent": ProbeLatent, "ProbeImage": ProbeImage,
                       "ProbeMask": ProbeMask, "ProbeCount": ProbeCount,
                       "ProbeOutOfMemory": ProbeOutOfMemory}
