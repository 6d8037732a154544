"""Models: what is on this machine, what can be downloaded, and files of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from .. import catalogue
from ..context import App
from ..core import ready
from ..jobs import QUEUE, Job
from ..limits import local_path

ADD_INFO = "A .safetensors, .pt or .pth file of an UPLiFT model or of a VAE, or a checkpoint with a VAE in it."


def build(app: App) -> tuple[Any, list[Any]]:
    """The tab's contents. Returns a function that gives its lists anew, and the components they go to."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=320):
            pack = gr.Dropdown([(title, key) for key, (title, _, _) in catalogue.PACKS.items()], value="pictures",
                               label="Download from the Hugging Face hub", elem_id="pack",
                               info="Once; kept in the hub's own cache.")
            with gr.Row():
                fetch = gr.Button("Download", variant="primary", scale=3, elem_id="fetch")
                stop = gr.Button("Stop", variant="stop", scale=1, min_width=80)
        with gr.Column(scale=1, min_width=320):
            file = gr.File(label="Or add a file", height=120, elem_id="model-file")
            path = gr.Textbox("", label="... or the path of one", placeholder="/models/v1-5-pruned.safetensors",
                              info=ADD_INFO, visible=app.settings.alone, elem_id="model-path")
            add = gr.Button("Add", elem_id="add")
    said = gr.Markdown("", elem_id="models-said")
    listed = gr.Dataframe(headers=catalogue.COLUMNS, interactive=False, wrap=True, label="Known models and files",
                          column_widths=catalogue.WIDTHS, max_height=1000, elem_id="models")
    everything = gr.JSON(visible=False)

    def models() -> list[dict[str, Any]]:
        ready()
        return catalogue.entries(app.shelf)

    def renew() -> list[list[str]]:
        ready()
        return catalogue.table(app.shelf)

    async def download(pack: str, request: gr.Request, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        return await app.jobs.run(lambda job: catalogue.download(pack, app.settings.offline, job), request, progress)

    async def add_model(file: str | None, path: str = "", request: gr.Request | None = None,
                        progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        def work(job: Job) -> str:
            from uplift_core.errors import InputError

            if not file and not (path or "").strip():
                raise InputError("name a file first: drop one into the box, or write its path")
            if not file:
                name, what = app.shelf.add(local_path(path, app.settings), job)
                return f"**{name}** can be chosen now: {what}."
            kept = app.shelf.keep_upload(Path(str(file)))
            try:
                name, what = app.shelf.add(kept, job)
            except BaseException:
                kept.unlink(missing_ok=True)
                raise
            return f"**{name}** can be chosen now, until the page ends: {what}."

        return await app.jobs.run(work, request, progress)

    fetching = fetch.click(download, pack, said, api_name="download", show_progress_on=[said],
                           api_description="Download published weights: pictures, taesd, dinov3 or dinov2.", **QUEUE)
    adding = add.click(add_model, [file, path], said, api_name="add_model", show_progress_on=[said],
                       api_description="Add an UPLiFT model or a VAE by upload, or by path on the machine itself.",
                       **QUEUE)
    stop.click(app.jobs.stop, cancels=[fetching, adding], queue=False, api_visibility="private")
    gr.Button("List", visible=False).click(models, None, everything, api_name="models", queue=False,
                                           api_description="What is known and what is on this machine.")
    return renew, [listed, fetching, adding]
