"""The accordion "UPLiFT": the controls of the direct route. Called again and again by the host, so it keeps nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from . import infotext
from .direct import SCALES
from .options import MAX_NOISE

TITLE = "UPLiFT"


def build(elem_id: Callable[[str], str]) -> tuple[list[Any], list[tuple[Any, Any]]]:
    """The controls, in the order of the script's arguments, and what a pasted generation text sets them to."""
    from modules.ui_components import InputAccordion

    with InputAccordion(False, label=TITLE, elem_id=elem_id("enabled")) as enabled:
        with gr.Row():
            scale = gr.Radio(list(SCALES), value="2x", label="Scale", elem_id=elem_id("scale"))
            noise = gr.Slider(0, MAX_NOISE, value=1.0, step=0.05, label="Noise", elem_id=elem_id("noise"))
        color_fix = gr.Checkbox(True, label="Color fix: keep the colors of the small picture",
                                elem_id=elem_id("color_fix"))
    fields = [(enabled, lambda text: infotext.SCALE in text), (scale, infotext.SCALE), (noise, infotext.NOISE),
              (color_fix, lambda text: text.get(infotext.COLOR_FIX, "mean") != "none")]
    return [enabled, scale, noise, color_fix], fields
