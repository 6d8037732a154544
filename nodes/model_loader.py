"""Load UPLiFT Model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import host, models


class UPLiFTModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = models.names()
        return host.schema(
            node_id="UPLiFTModelLoader", display_name="Load UPLiFT Model", category=host.CATEGORY,
            description="Loads an UPLiFT model: a file in models/uplift, the small bundled one, or the published "
                        "weights, which are downloaded on first use.",
            search_aliases=["uplift", "latent upscaler", "upscale model loader", "hires fix"],
            inputs=[
                io.Combo.Input("model_name", options=names, default=names[0],
                               tooltip="Files in models/uplift. '(bundled)' works offline, with the UPLiFT Tiny VAE. "
                                       "'(download)' is fetched once, into models/uplift."),
                io.Combo.Input("dtype", options=models.DTYPES, default="auto",
                               tooltip="The number format of the weights. auto: what ComfyUI prefers on this device."),
            ],
            outputs=[models.UpliftModel.Output(display_name="UPLIFT_MODEL", tooltip="For the UPLiFT upscale nodes.")])

    @classmethod
    def validate_inputs(cls, model_name: Any) -> bool | str:
        # A name that is not in the list now may come from a workflow saved before or after a download.
        try:
            models.locate(model_name)
        except models.CheckpointError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, model_name: str, dtype: str) -> str:
        try:
            path = models.locate(model_name)
        except models.CheckpointError as error:
            return str(error)
        return f"{path} {path.stat().st_mtime_ns if path else ''} {dtype}"

    @classmethod
    def execute(cls, model_name: str, dtype: str) -> io.NodeOutput:
        host.choice("dtype", dtype, models.DTYPES)
        bar = host.Bar()
        return io.NodeOutput(models.load(model_name, dtype, progress=bar.item(0)))
