"""Upscale: one picture with a before/after slider, or many into a zip."""

from __future__ import annotations

import random
from typing import Any

import gradio as gr

from .. import upscaling
from ..context import App
from ..jobs import QUEUE, Job
from ..limits import open_picture, picture_input
from ..upscaling import Done, Options, Upscaler

SCALES = [2, 4, 8]
COLOR_FIXES = [("match the mean (as in the paper)", "mean"), ("match mean and contrast", "adain"),
               ("match all coarse colours", "wavelet"), ("none", "none")]
CONSISTENCY = [("with the bundled model", "auto"), ("always", "on"), ("never", "off")]
TILES = [("automatic", "auto"), ("off", "off"), ("256", "256"), ("512", "512"), ("1024", "1024")]
COMPARE = [("Lanczos", "lanczos"), ("bilinear latents", "latents"), ("VAE round trip", "vae")]
ZOOMS = [("whole", 1), ("2×", 2), ("4×", 4), ("8×", 8)]
CENTRE = (0.5, 0.5)
IDLE = "The result appears here. The line can be dragged: left of it *before*, right of it *after*."


def build(app: App, samples: list[str]) -> list[gr.Dropdown]:
    """The tab's contents. Returns the lists of models and of VAEs, which the Models tab renews."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            picture = picture_input(label="Picture", height=300, elem_id="picture")
            gr.Examples(samples, picture, label="Or take one of these", elem_id="samples")
            scale = gr.Radio(SCALES, value=2, label="Scale", elem_id="scale")
            model = gr.Dropdown([app.shelf.default_model], value=app.shelf.default_model, label="Model",
                                allow_custom_value=True, elem_id="model")
            with gr.Accordion("More settings", open=False):
                with gr.Row(equal_height=True):
                    seed = gr.Number(0, label="Seed", info="Same seed, same picture.", precision=0, minimum=0, scale=4,
                                     min_width=120, elem_id="seed")
                    dice = gr.Button("\U0001f3b2 Roll", size="sm", scale=1, min_width=80, elem_id="dice")
                noise = gr.Slider(0, 2, 1, step=0.05, label="Noise strength",
                                  info="Of the noise the model reads; 1 as it was trained.")
                color_fix = gr.Dropdown(COLOR_FIXES, value="mean", label="Colour fix")
                consistency = gr.Radio(CONSISTENCY, value="auto", label="Low-resolution consistency",
                                       info="Pins the result to the pixels given.")
                tile = gr.Dropdown(TILES, value="auto", label="Tile", info="Same numbers, less memory.",
                                   allow_custom_value=True)
                vae = gr.Dropdown(app.shelf.vae_names(), value=app.shelf.default_vae, label="VAE",
                                  info="auto: the one the model was made for.", allow_custom_value=True)
            with gr.Row():
                go = gr.Button("Upscale", variant="primary", scale=3, elem_id="go")
                stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, elem_id="stop")
        with gr.Column(scale=3, min_width=320):
            pair = gr.ImageSlider(label="Before and after", height=460, max_height=460, elem_id="pair",
                                  interactive=False, format="png")
            report = gr.Markdown(IDLE, elem_id="report")
            compare = gr.Radio(COMPARE, value="lanczos", label="Before: the picture enlarged by", elem_id="compare")
            zoom = gr.Radio(ZOOMS, value=1, label="Zoom", info="Click the picture to choose where.", elem_id="zoom")
            download = gr.DownloadButton("Download PNG", elem_id="download", interactive=False)
    facts, done, centre = gr.JSON(visible=False), gr.State(), gr.State(CENTRE)
    options = [model, scale, seed, noise, color_fix, consistency, tile, vae]

    async def upscale(picture: str, model: str = "auto", scale: float = 2, seed: float = 0, noise_strength: float = 1.0,
                      color_fix: str = "mean", consistency: str = "auto", tile: str = "auto", vae: str = "auto",
                      request: gr.Request | None = None, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        chosen = Options(model, vae, scale, seed, noise_strength, color_fix, consistency, tile)

        def work(job: Job) -> Any:
            open_picture(picture, app.settings, 1 if not isinstance(scale, (int, float)) else scale)
            given, result = Upscaler(app, chosen, job).run(picture)
            low = _before("lanczos", given, result, app, job)
            shown = tuple(str(_view(path, result, 1, CENTRE)) for path in (low, result.path))
            return str(result.path), shown, result.facts, result

        return await app.jobs.run(work, request, progress)

    async def look(done: Done | None, compare: str, zoom: float, centre: tuple[float, float],
                   request: gr.Request, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        if done is None:
            return gr.skip()

        def work(job: Job) -> Any:
            low = _before(compare, None, done, app, job)
            return tuple(str(_view(path, done, zoom, centre)) for path in (low, done.path))

        return await app.jobs.run(work, request, progress)

    def point(zoom: float, event: gr.SelectData, picture: str | None) -> Any:
        """A click into the picture is where to look; the first one also comes closer."""
        size = _size(picture)
        x, y = event.index[:2]
        return (min(1.0, x / size[0]), min(1.0, y / size[1])), zoom if zoom > 1 else 4

    run = go.click(upscale, [picture, *options], [download, pair, facts, done], api_name="upscale",
                   api_description=UPSCALE_API, show_progress_on=[pair], **QUEUE)
    run.success(_told, facts, [report, download, compare, zoom, centre], api_visibility="private", queue=False)
    stop.click(app.jobs.stop, cancels=[run], queue=False, api_visibility="private")
    dice.click(lambda: random.SystemRandom().randrange(2**32), None, seed, api_visibility="private", queue=False)
    view = {"fn": look, "inputs": [done, compare, zoom, centre], "outputs": pair, "api_visibility": "private",
            "show_progress_on": [pair], **QUEUE}
    looks: Any = [compare.input(**view), zoom.input(**view)]
    looks.append(picture.select(point, [zoom, picture], [centre, zoom], api_visibility="private", queue=False,
                                ).success(**view))
    stop.click(None, cancels=looks, api_visibility="private")
    picture.clear(lambda: (None, None, gr.DownloadButton(value=None, interactive=False), IDLE), None,
                  [pair, done, download, report], api_visibility="private", queue=False)
    _batch(app, options)
    return [model, vae]


def _batch(app: App, options: list[Any]) -> None:
    with gr.Accordion("Many pictures at once", open=False), gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            files = gr.File(file_count="multiple", label="Pictures", height=180, elem_id="files")
            with gr.Row():
                go = gr.Button("Upscale all, with the settings above", variant="primary", scale=3, elem_id="go-all")
                stop = gr.Button("Stop", variant="stop", scale=1, min_width=80)
        with gr.Column(min_width=320):
            lines = gr.Dataframe(headers=["picture", "size", "seconds", "outcome"], interactive=False, wrap=True,
                                 label="Outcome", elem_id="lines")
            archive = gr.File(label="All results", interactive=False, elem_id="archive")

    async def upscale_batch(pictures: list[str], model: str = "auto", scale: float = 2, seed: float = 0,
                            noise_strength: float = 1.0, color_fix: str = "mean", consistency: str = "auto",
                            tile: str = "auto", vae: str = "auto", request: gr.Request | None = None,
                            progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        chosen = Options(model, vae, scale, seed, noise_strength, color_fix, consistency, tile)

        def work(job: Job) -> Any:
            target, rows = upscaling.upscale_many(app, [str(p) for p in pictures or []], chosen, job)
            return str(target), rows

        return await app.jobs.run(work, request, progress)

    run = go.click(upscale_batch, [files, *options], [archive, lines], api_name="upscale_batch",
                   api_description="Many pictures into one zip; a line on each.", show_progress_on=[lines], **QUEUE)
    stop.click(app.jobs.stop, cancels=[run], queue=False, api_visibility="private")


def _told(facts: dict[str, Any]) -> Any:
    """The facts as a sentence, the download button ready, the view as it begins."""
    (w, h), (large_w, large_h) = facts["from"], facts["to"]
    lines = [f"**{w} × {h} \u2192 {large_w} × {large_h}** in **{facts['seconds']:.1f} s** with `{facts['model']}`, "
             f"seed {facts['seed']}. Peak memory {facts['peak_memory_mb']:,} MB, file {facts['file_mb']:.1f} MB."]
    lines += [f"*{note}*" for note in facts["notes"]]
    return "\n\n".join(lines), gr.DownloadButton(interactive=True), "lanczos", 1, CENTRE


def _size(picture: str | None) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(picture or "") as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except Exception:  # what is no picture is refused where it is used
        return 1, 1


def _before(kind: str, given: Any, done: Done, app: App, job: Job) -> Any:
    """The file of a comparison picture beside the result's, made when first asked for."""
    from uplift_core.imageio import Picture, write_picture

    target = done.path.with_name(f"before_{kind}.png")
    if not target.exists():
        given = given or open_picture(done.source, app.settings)
        write_picture(Picture(upscaling.before(kind, given, done, app, job)), target)
    return target


def _view(path: Any, done: Done, zoom: float, centre: tuple[float, float]) -> Any:
    at = "-".join(str(n) for n in upscaling.window(tuple(done.facts["to"]), zoom, centre))
    return upscaling.view(path, zoom, centre, path.with_name(f"{path.stem}_{at}.png"))


UPSCALE_API = """Enlarge a picture. Returns the whole PNG, the pair shown on the page (before, after), and facts: sizes,
seconds, memory, settings. model: a name of /models. scale: 2, 4 or 8. consistency: auto, on, off. tile: auto,
off, or a side in pixels. The same seed gives the same numbers as uplift_core.upscale_image."""
