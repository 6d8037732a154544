"""Generate: Stable Diffusion 1.5 text to image, and UPLiFT on its latents."""

from __future__ import annotations

import random
from typing import Any

import gradio as gr

from .. import diffusion
from ..context import App
from ..core import ready
from ..jobs import QUEUE, Job

PARTS = {"generate": "Stable Diffusion", "decode": "its picture (VAE)", "uplift": "UPLiFT",
         "decode_large": "the large picture (VAE)"}


def build(app: App) -> tuple[gr.Dropdown, Any, gr.Markdown]:
    """The tab's contents. Returns the model list, a function that says what is missing, and where it is said."""
    said = gr.Markdown("", elem_id="generate-said")
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            prompt = gr.Textbox("", label="Prompt", lines=3, max_length=2000, elem_id="prompt",
                                placeholder="a lighthouse on a cliff at dusk, detailed photograph")
            negative = gr.Textbox("", label="Negative prompt", lines=1, max_length=2000)
            with gr.Row():
                scale = gr.Radio([2, 4], value=2, label="Scale", elem_id="g-scale", min_width=120)
                steps = gr.Slider(1, diffusion.MAX_STEPS, 25, step=1, label="Steps", elem_id="g-steps", min_width=160)
            with gr.Accordion("More settings", open=False):
                with gr.Row():
                    width = gr.Slider(64, diffusion.MAX_SIDE, 512, step=64, label="Width", min_width=140)
                    height = gr.Slider(64, diffusion.MAX_SIDE, 512, step=64, label="Height", min_width=140)
                guidance = gr.Slider(0, 30, 7.5, step=0.5, label="Guidance")
                with gr.Row(equal_height=True):
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, scale=4, min_width=120)
                    dice = gr.Button("\U0001f3b2 Roll", size="sm", scale=1, min_width=80)
                model = gr.Dropdown(["auto"], value="auto", label="UPLiFT", allow_custom_value=True,
                                    info="auto: sd15-vae.")
            checkpoint = gr.Textbox("", label="Stable Diffusion 1.5", visible=app.settings.alone, elem_id="checkpoint",
                                    placeholder=app.settings.checkpoint or diffusion.DEFAULT,
                                    info="A checkpoint file, a diffusers folder, or owner/name on the hub.")
            with gr.Row():
                go = gr.Button("Generate", variant="primary", scale=3, elem_id="g-go")
                stop = gr.Button("Stop", variant="stop", scale=1, min_width=80)
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                low = gr.Image(label="As generated", interactive=False, height=400, elem_id="g-low", format="png",
                               buttons=["download", "fullscreen"], min_width=260)
                high = gr.Image(label="UPLiFT, from the same latents", interactive=False, height=400, format="png",
                                elem_id="g-high", buttons=["download", "fullscreen"], min_width=260)
            report = gr.Markdown("Both pictures appear here, with the seconds of each part.", elem_id="g-report")
    facts = gr.JSON(visible=False)

    async def generate(prompt: str, negative_prompt: str = "", scale: float = 2, steps: float = 25, width: float = 512,
                       height: float = 512, guidance: float = 7.5, seed: float = 0, model: str = "auto",
                       checkpoint: str = "", request: gr.Request | None = None,
                       progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        def work(job: Job) -> Any:
            small, large, facts = diffusion.generate(app, checkpoint, prompt, negative_prompt, width, height, steps,
                                                     guidance, seed, scale, model, job)
            return str(small), str(large), facts

        return await app.jobs.run(work, request, progress)

    def missing(checkpoint: str) -> str:
        ready()
        text = diffusion.what_is_missing(app, checkpoint)
        return f"\u26a0\ufe0f {text}" if text else ""

    run = go.click(generate, [prompt, negative, scale, steps, width, height, guidance, seed, model, checkpoint],
                   [low, high, facts], api_name="generate", api_description=GENERATE_API, show_progress_on=[low, high],
                   **QUEUE)
    run.success(_told, facts, report, queue=False, api_visibility="private")
    checkpoint.blur(missing, checkpoint, said, queue=False, show_progress="hidden", api_visibility="private")
    dice.click(lambda: random.SystemRandom().randrange(2**32), None, seed, api_visibility="private", queue=False)
    stop.click(app.jobs.stop, cancels=[run], queue=False, api_visibility="private")
    return model, missing, said


def _told(facts: dict[str, Any]) -> str:
    seconds = facts["seconds"]
    first = max(1e-9, seconds["generate"] + seconds["decode"])
    (w, h), (large_w, large_h) = facts["from"], facts["to"]
    rows = "\n".join(f"| {title} | {seconds[key]:.2f} s | {100 * seconds[key] / first:.0f} % |"
                     for key, title in PARTS.items())
    return (f"**{w} × {h} \u2192 {large_w} × {large_h}**, seed {facts['seed']}\n\n"
            f"| part | time | of generating and decoding |\n|---|---|---|\n{rows}")


GENERATE_API = """Stable Diffusion 1.5 text to image, its latents enlarged by UPLiFT. Returns both PNGs and facts with
the seconds of each part. scale: 2 or 4. model: auto or a name of /models. checkpoint: a file, a diffusers folder or a
name on the hub, on the machine itself; empty: the one the page was started with."""
