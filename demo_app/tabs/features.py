"""Dense features: from tokens to pixels, what is like a pixel, segments, and matches with a second picture."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .. import dense
from ..context import App
from ..core import ready
from ..dense import COLOURS, MAX_SEGMENTS, MAX_SIDE, MIN_SIDE, SCALES, Walk
from ..jobs import QUEUE, Job
from ..limits import picture_input
from ..weights import FEATURE_MODELS

BACKBONES = [("DINOv3 small plus, patch 16", FEATURE_MODELS[0]), ("DINOv2 small, patch 14", FEATURE_MODELS[1])]
FIRST = "Compute the features of a picture first."
HINT = "Colours are the first three principal components, the same in all steps."


def build(app: App, samples: list[str]) -> tuple[gr.Dropdown, gr.Dropdown, Any, gr.Markdown]:
    """The tab's contents. Returns the lists of backbones and models, a function that says what is missing,
    and where it is said."""
    said = gr.Markdown("", elem_id="features-said")
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            picture = picture_input(label="Picture", height=260, elem_id="f-picture")
            gr.Examples(samples, picture, label="Or take one of these", elem_id="f-samples")
            backbone = gr.Dropdown(BACKBONES, value=FEATURE_MODELS[0], label="Backbone", elem_id="backbone")
            with gr.Accordion("More settings", open=False):
                side = gr.Slider(MIN_SIDE, MAX_SIDE, 224, step=14, label="Longer side",
                                 info="The picture is brought to this size first.", elem_id="side")
                model = gr.Dropdown(["auto"], value="auto", label="UPLiFT", allow_custom_value=True,
                                    info="auto: the one made for the backbone.")
            with gr.Row():
                go = gr.Button("Compute features", variant="primary", scale=3, elem_id="f-go")
                stop = gr.Button("Stop", variant="stop", scale=1, min_width=80)
        with gr.Column(scale=3, min_width=320):
            step_picture = gr.Image(label="Features, as colours", height=400, interactive=False, elem_id="steps",
                                    buttons=["download", "fullscreen"], format="png")
            step = gr.Slider(0, len(SCALES) - 1, len(SCALES) - 1, step=1, label="Step: from tokens to pixels",
                             elem_id="step")
            report = gr.Markdown(HINT, elem_id="f-report")
    found, second, facts = gr.State(), gr.State(), gr.JSON(visible=False)
    with gr.Tab("Similarity"):
        gr.Markdown("Click a pixel: what has features like it lights up.")
        with gr.Row():
            shown = _image("Click here", "f-click")
            by_tokens, by_pixels = _image("By the backbone's features", "by-tokens"), _image("By UPLiFT's", "by-pixels")
        x, y = gr.Number(visible=False), gr.Number(visible=False)
    with gr.Tab("Segments"):
        with gr.Row():
            count = gr.Slider(2, MAX_SEGMENTS, 5, step=1, label="K, the number of segments", scale=3, elem_id="k")
            split = gr.Button("Segment", variant="primary", scale=1, elem_id="segment")
        annotated = gr.AnnotatedImage(label="k-means of the features of all pixels", height=400, elem_id="segments",
                                      color_map={}, format="png")
    with gr.Tab("Correspondence"), gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=260):
            other = picture_input(label="A second picture", height=240, elem_id="f-other")
            pair = gr.Button("Match points of a grid", variant="primary", elem_id="match")
            gr.Markdown("Or click a point of the first picture:")
            first_shown = _image("First picture", "f-first")
        with gr.Column(scale=2, min_width=320):
            matched = gr.Image(label="Matches", height=400, interactive=False, elem_id="matches", format="png",
                               buttons=["download", "fullscreen"])
            rows = gr.Dataframe(headers=["", "first", "second", "likeness", "mutual"], interactive=False,
                                label="Matches", elem_id="match-rows")

    async def features(picture: str, backbone: str = FEATURE_MODELS[0], model: str = "auto", side: float = 224,
                       request: gr.Request | None = None, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        def work(job: Job) -> Any:
            walk = dense.walk(app, picture, backbone, model, side, job)
            return str(walk.steps[-1]), walk.facts, walk

        return await app.jobs.run(work, request, progress)

    async def likeness(x: float, y: float, found: Walk | None, request: gr.Request,
                       progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        def work(job: Job) -> Any:
            job.say("Comparing")
            return tuple(map(str, dense.similar(_first(found), (x, y))))

        return await app.jobs.run(work, request, progress)

    async def segment(count: float, found: Walk | None, request: gr.Request,
                      progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        def work(job: Job) -> Any:
            job.say("Segmenting")
            masks = dense.parts(_first(found), count)
            colours = {label: COLOURS[i % len(COLOURS)] for i, (_, label) in enumerate(masks)}
            return gr.AnnotatedImage((str(_first(found).shown), masks), color_map=colours)

        return await app.jobs.run(work, request, progress)

    async def correspond(second_picture: str, x: float | None, y: float | None, found: Walk | None,
                         second: tuple[Any, Walk] | None, request: gr.Request,
                         progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        def work(job: Job) -> Any:
            first = _first(found)
            known = second
            wanted = (second_picture, first.backbone, first.model, first.side)
            if known is None or known[0] != wanted:
                known = wanted, dense.walk(app, second_picture, first.backbone, first.model, first.side, job,
                                           steps=False)
            points = dense.grid(first) if x is None or y is None else [(x, y)]
            path, lines = dense.match(first, known[1], points)
            return str(path), lines, known

        return await app.jobs.run(work, request, progress)

    def pick(number: float, found: Walk | None) -> Any:
        return str(found.steps[int(number)]) if found else None

    def computed(facts: dict[str, Any], found: Walk) -> Any:
        sizes = " \u2192 ".join(f"{w}×{h}" for w, h in facts["sizes"])
        text = (f"**{sizes}**, {facts['channels']} channels, in **{facts['seconds']:.1f} s** with "
                f"`{facts['backbone']}`. Peak memory {facts['peak_memory_mb']:,} MB. {HINT}")
        picture = str(found.large)
        return text, len(SCALES) - 1, picture, picture, None, None, None, None, None

    def missing(backbone: str) -> str:
        ready()
        from ..catalogue import missing as lacking

        text = lacking(backbone)
        return f"\u26a0\ufe0f {text}." if text else ""

    def clicked(found: Walk, event: gr.SelectData) -> tuple[float, float]:
        return (event.index[0] + 0.5) / found.factor, (event.index[1] + 0.5) / found.factor

    private: dict[str, Any] = {"api_visibility": "private"}
    run = go.click(features, [picture, backbone, model, side], [step_picture, facts, found], api_name="features",
                   api_description=FEATURES_API, show_progress_on=[step_picture], **QUEUE)
    run.success(computed, [facts, found], [report, step, shown, first_shown, by_tokens, by_pixels, annotated, matched,
                                           rows], queue=False, **private)
    step.input(pick, [step, found], step_picture, queue=False, show_progress="hidden", **private)
    backbone.change(missing, backbone, said, queue=False, show_progress="hidden", **private)
    near = {"fn": likeness, "inputs": [x, y, found], "outputs": [by_tokens, by_pixels], **QUEUE}
    runs = [run, shown.select(clicked, found, [x, y], queue=False, **private).success(**near, **private)]
    gr.Button(visible=False).click(**near, api_name="similarity", api_description="After /features: heat maps of what "
                                   "is like pixel x, y, by the backbone's features and by UPLiFT's.")
    runs.append(split.click(segment, [count, found], annotated, api_name="segments", show_progress_on=[annotated],
                            api_description="After /features: k-means of the pixels' features as masks.", **QUEUE))
    # No point means a grid of them.
    blank = gr.Number(None, visible=False)
    matches = {"fn": correspond, "outputs": [matched, rows, second], "show_progress_on": [matched], **QUEUE}
    runs.append(pair.click(inputs=[other, blank, blank, found, second], **matches, **private))
    runs.append(first_shown.select(clicked, found, [x, y], queue=False, **private
                                   ).success(inputs=[other, x, y, found, second], **matches, **private))
    gr.Button(visible=False).click(inputs=[other, x, y, found, second], **matches, api_name="correspondences",
                                   api_description="After /features: where points of its picture are in a second one: "
                                   "pixel x, y, or a grid of points where they are None.")
    stop.click(app.jobs.stop, cancels=runs, queue=False, **private)
    return backbone, model, missing, said


def _image(label: str, name: str) -> gr.Image:
    return gr.Image(label=label, height=300, interactive=False, elem_id=name, buttons=["fullscreen"], format="png",
                    min_width=240)


def _first(found: Walk | None) -> Walk:
    if found is None:
        from uplift_core.errors import InputError

        raise InputError(FIRST)
    return found


FEATURES_API = """Features of a picture from the backbone's tokens to every pixel. Returns a picture of the pixels'
features and facts (sizes of all steps, channels, seconds, memory). backbone: dinov3-splus16 or dinov2-s14. model: auto
or a name of /models. side: longer side in pixels the picture is brought to first. The session keeps the features for
/similarity, /segments and /correspondences."""
