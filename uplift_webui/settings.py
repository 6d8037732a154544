"""The settings page "UPLiFT", with a button that downloads the published model."""

from __future__ import annotations

import html
import logging
from typing import Any

import gradio as gr

from uplift_core.color import COLOR_METHODS
from uplift_core.errors import UpliftError

from . import infotext, models, options
from .hosts import Host

log = logging.getLogger(__name__)
SECTION = ("uplift", "UPLiFT")


def register(host: Host) -> None:
    """Add the options; the callback of ``on_ui_settings``."""
    info = host.shared.OptionInfo

    def add(name: str, label: str, component: Any, arguments: Any, **more: Any) -> None:
        host.shared.opts.add_option(name, info(options.DEFAULTS[name], label, component, arguments, section=SECTION,
                                               **more))

    folder = host.models_folder() / models.FOLDER
    add(options.MODEL, f"Model (files in {folder}; {models.PUBLISHED.name} is downloaded on first use, "
                       f"{models.PUBLISHED.size_bytes // 10**6} MB)", gr.Dropdown,
        lambda: {"choices": models.names(host)}, refresh=lambda: None)
    add(options.MODELS_PATH, "Another folder with models, searched first; downloads go there", gr.Textbox, {})
    add(options.PRECISION, "Precision", gr.Radio, {"choices": options.PRECISIONS})
    add(options.TILE, "Tile, in pixels of the small picture. Tiles are exact and only save memory: auto takes the "
                      "largest that fit", gr.Radio, {"choices": options.TILES})
    add(options.NOISE, "Noise in Hires. fix: 1 as trained, 0 none", gr.Slider,
        {"minimum": 0, "maximum": options.MAX_NOISE, "step": 0.05}, infotext=infotext.HIRES_NOISE)
    add(options.COLOR_FIX, "Color fix where no second pass runs: how the colors of the small picture are kept",
        gr.Radio, {"choices": list(COLOR_METHODS)})


def add_button(host: Host, component: Any, elem_id: str | None) -> None:
    """Put the button below the folder of models as the page is being built; ``on_after_component``."""
    if elem_id != f"setting_{options.MODELS_PATH}":
        return
    button = gr.Button(f"Download {models.PUBLISHED.name}", elem_id="uplift_download")
    said = gr.HTML(value="", elem_id="uplift_download_said")
    button.click(fn=lambda: fetch(host), inputs=[], outputs=[said])


def fetch(host: Host) -> str:
    """Download the published model unless it is there; a line for the user."""
    try:
        found = models.locate(host, models.PUBLISHED.name)
        path = found or models.download(host)
        return html.escape(f"{path} is there." if found else f"Downloaded to {path}.")
    except UpliftError as error:
        log.warning("UPLiFT: %s", error)
        return html.escape(str(error))
    except Exception as error:
        log.exception("UPLiFT: the download failed")
        return html.escape(f"The download failed: {type(error).__name__}: {error}")
