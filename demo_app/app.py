"""The page: tabs, theme, and what the server may do."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio as gr

from .context import App
from .core import ready
from .jobs import WAITING
from .limits import MAX_FILE_BYTES
from .settings import Settings
from .tabs import features, generate, models, upscale
from .weights import FEATURE_MODELS

TITLE = "UPLiFT"
INTRO = """# UPLiFT
Sharp 2×, 4× and 8×, guided by the picture itself."""
FONT = ("system-ui", "sans-serif")
CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def build(settings: Settings) -> gr.Blocks:
    app = App.of(settings)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(1800, 7200)) as page:
        gr.Markdown(INTRO, elem_id="intro")
        with gr.Tab("Upscale", id="upscale"):
            model, vae = upscale.build(app, samples())
        with gr.Tab("Generate", id="generate"):
            generate_model, generate_missing, generate_said = generate.build(app)
        with gr.Tab("Dense features", id="features"):
            backbone, feature_model, missing, said = features.build(app, samples())
        with gr.Tab("Models", id="models"):
            renew_table, (table, *changes) = models.build(app)

        def renew(backbone: str) -> tuple[Any, ...]:
            ready()
            return (gr.Dropdown(choices=app.shelf.model_names()), gr.Dropdown(choices=app.shelf.vae_names()),
                    renew_table(), gr.Dropdown(choices=app.shelf.model_names(FEATURE_MODELS)), missing(backbone),
                    gr.Dropdown(choices=app.shelf.model_names(("sd15-vae",))), generate_missing(""))

        for change in (page.load, *(event.success for event in changes)):
            change(renew, backbone, [model, vae, table, feature_model, said, generate_model, generate_said],
                   api_visibility="private", show_progress="hidden")
        page.unload(app.jobs.stop)
    return page


def launch(page: gr.Blocks, settings: Settings) -> None:
    page.queue(max_size=WAITING, default_concurrency_limit=8, api_open=False)
    page.launch(server_name=settings.listen, server_port=settings.port, share=settings.share, show_error=True,
                prevent_thread_lock=True, max_file_size=MAX_FILE_BYTES, ssr_mode=False, enable_monitoring=False,
                footer_links=["api", "settings"], theme=theme(), css=CSS)


def theme() -> gr.themes.Base:
    """Gradio's own look with the system's fonts, so that nothing is fetched from elsewhere."""
    return gr.themes.Default(primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", font=FONT,
                             font_mono=("ui-monospace", "monospace"))


def samples() -> list[str]:
    """The bundled pictures, found without importing the core."""
    spec = find_spec("uplift_core")
    folder = Path(spec.origin or "").parent / "assets" / "samples" if spec else Path()
    return [str(path) for path in sorted(folder.glob("*.png"))]
