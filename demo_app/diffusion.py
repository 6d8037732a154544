"""Stable Diffusion 1.5 with diffusers, and its latents straight to UPLiFT."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .context import App
from .jobs import Job
from .limits import local_path

if TYPE_CHECKING:
    from uplift_core.vae import KLCodec

DEFAULT = "stable-diffusion-v1-5/stable-diffusion-v1-5"
TOKENIZERS = (("openai/clip-vit-large-patch14", ""), (DEFAULT, "tokenizer/"))
TOKENIZER_FILES = ("vocab.json", "merges.txt")
ENDINGS = (".safetensors", ".ckpt")
MAX_SIDE, MAX_STEPS = 1024, 100

# What a checkpoint file of Stable Diffusion 1.x leaves to be known, in the words of diffusers and transformers.
CONFIGS: dict[str, dict[str, Any]] = {
    "model_index.json": {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.27.0", "requires_safety_checker": False,
        "feature_extractor": [None, None], "safety_checker": [None, None], "image_encoder": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"]},
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel", "sample_size": 64, "in_channels": 4, "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "attention_head_dim": 8,
        "cross_attention_dim": 768, "norm_num_groups": 32, "norm_eps": 1e-5, "act_fn": "silu",
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3},
    "vae/config.json": {
        "_class_name": "AutoencoderKL", "sample_size": 512, "in_channels": 3, "out_channels": 3, "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32, "act_fn": "silu",
        "scaling_factor": 0.18215, "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4},
    "text_encoder/config.json": {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 768,
        "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 49408,
        "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 768,
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
    "scheduler/scheduler_config.json": {
        "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1},
    "tokenizer/tokenizer_config.json": {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
}


def what_is_missing(app: App, source: str = "") -> str:
    """One line on what to do before pictures can be generated, or nothing."""
    from uplift_core import hub
    from uplift_core.registry import FULL, find

    wanted = source.strip() or app.settings.checkpoint
    if not wanted and not hub.cached(DEFAULT, "model_index.json"):
        where = "write its path below" if app.settings.alone else "have the page started with it"
        return (f"There is no Stable Diffusion 1.5 on this machine yet: {where}, or start the page with "
                "`--checkpoint v1-5-pruned-emaonly.safetensors`.")
    own = app.shelf.default_model not in ("auto", "uplift-mini") or bool(app.shelf.models)
    if find(FULL) is None and not own:
        return f"UPLiFT's weights for these latents, {FULL}, are not here yet: the Models tab downloads them."
    return ""


def pipeline(app: App, source: str, job: Job) -> Any:
    """The diffusers pipeline of a checkpoint file, a diffusers folder or a name on the hub, kept while it is used.

    Raises InputError, CheckpointError, DownloadError, MissingExtra.
    """
    from uplift_core.errors import CheckpointError, InputError, MissingExtra

    named = (source or "").strip()
    if named and named != app.settings.checkpoint and not app.settings.alone:
        local_path(named, app.settings)  # says why not
    named = named or app.settings.checkpoint or DEFAULT
    path = Path(named).expanduser()
    if not path.exists() and (named.count("/") != 1 or named.startswith((".", "/", "~")) or path.suffix in ENDINGS):
        raise InputError(f"{named} does not exist; expected a checkpoint file ({', '.join(ENDINGS)}), a diffusers "
                         "folder, or owner/name on the hub")
    if path.is_file() and path.suffix.lower() not in ENDINGS:
        raise CheckpointError(f"{path.name} is no checkpoint; expected a file that ends in {' or '.join(ENDINGS)}")
    try:
        import transformers  # noqa: F401
        from diffusers import StableDiffusionPipeline
    except ImportError:
        raise MissingExtra("diffusers", "demo", "Generating pictures") from None
    job.say(f"Loading {path.name}")
    return app.shelf.kept("pipeline", named, lambda: _load(StableDiffusionPipeline, named, path, app, job))


def _load(kind: Any, named: str, path: Path, app: App, job: Job) -> Any:
    from uplift_core.devices import choose_device, choose_dtype
    from uplift_core.errors import CheckpointError, DownloadError, UpliftError

    device = choose_device(app.settings.device)
    options: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    try:
        if path.is_file():
            options["config"] = str(_config_folder(path, app, job))
            loaded = kind.from_single_file(str(path), local_files_only=True, **options)
        else:
            local = path.is_dir() or app.settings.offline
            loaded = kind.from_pretrained(str(path) if path.is_dir() else named, local_files_only=local, **options)
    except UpliftError:
        raise
    except Exception as error:  # diffusers, transformers and the hub raise all kinds
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        failed = CheckpointError if path.exists() else DownloadError
        raise failed(f"{named} cannot be loaded as Stable Diffusion 1.5: {type(error).__name__}: {reason}") from error
    loaded.set_progress_bar_config(disable=True)
    dtype = choose_dtype("auto", device)
    return loaded.to(device) if loaded.dtype == dtype else loaded.to(device, dtype)


def _config_folder(checkpoint: Path, app: App, job: Job) -> Path:
    """What diffusers asks for beside a checkpoint file, so that it need not ask the hub."""
    folder = app.settings.temp / "sd15"
    for name, content in CONFIGS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    for name in TOKENIZER_FILES:
        shutil.copyfile(_tokenizer_file(name, checkpoint, app, job), folder / "tokenizer" / name)
    return folder


def _tokenizer_file(name: str, checkpoint: Path, app: App, job: Job) -> Path:
    """A checkpoint has no list of words in it: beside it, in a model folder, in the hub's cache, or fetched once."""
    from uplift_core import hub
    from uplift_core.errors import DownloadError
    from uplift_core.registry import model_folders, user_folder

    for folder in (checkpoint.parent, checkpoint.parent / "tokenizer", *(f / "tokenizer" for f in model_folders())):
        if (folder / name).is_file():
            return folder / name
    for repo, at in TOKENIZERS:
        if found := hub.cached(repo, at + name):
            return found
    repo = TOKENIZERS[0][0]
    if app.settings.offline:
        raise DownloadError(f"a checkpoint file has no tokenizer in it: put {' and '.join(TOKENIZER_FILES)} of {repo} "
                            f"into a folder called tokenizer beside it, or into {user_folder() / 'tokenizer'}")
    job.say("Downloading the tokenizer (1.5 MB, once)")
    return hub.fetch(repo, name, folder=None, by_hand=user_folder() / "tokenizer", progress=job.report)


def generate(app: App, source: str, prompt: str, negative: str, width: float, height: float, steps: float,
             guidance: float, seed: float, scale: float, model: str, job: Job) -> tuple[Path, Path, dict[str, Any]]:
    """A generated picture, the same enlarged by UPLiFT from its latents, and the seconds of each part."""
    import torch

    from uplift_core import match_color, upscale_latents
    from uplift_core.errors import InputError
    from uplift_core.imageio import Picture, write_picture
    from uplift_core.vae.spaces import check_pair

    if not (prompt or "").strip():
        raise InputError("there is no prompt yet: write what the picture should show")
    _within("width", width, 64, MAX_SIDE)
    _within("height", height, 64, MAX_SIDE)
    _within("steps", steps, 1, MAX_STEPS)
    _within("guidance", guidance, 0, 30)
    _within("seed", seed, 0, 2**63 - 1)
    if scale not in (2, 4):
        raise InputError(f"scale is {scale!r}; expected 2 or 4")
    if (text := what_is_missing(app, source)) and model in ("auto", ""):
        raise InputError(text)
    chosen = app.shelf.default_model if model == "auto" and app.shelf.default_model != "auto" else model
    net, name, _ = app.shelf.model("sd15-vae" if chosen == "auto" else chosen, job)
    pipe = pipeline(app, source, job)
    codec = _codec(pipe)
    check_pair(net.config.latent_space, codec.latent_space)
    if net.config.patch != codec.patch or net.config.channels != codec.channels:
        raise InputError(f"{name} enlarges {net.config.channels}-channel latents of {net.config.patch}x"
                         f"{net.config.patch} pixels and this checkpoint makes {codec.channels}-channel latents of "
                         f"{codec.patch}x{codec.patch} pixels")
    if width % codec.patch or height % codec.patch:
        raise InputError(f"{width:g}x{height:g} pixels: width and height have to be multiples of {codec.patch}")
    width, height = int(width), int(height)
    count, seconds = int(steps), dict[str, float]()

    def step(_: Any, i: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        job.report(min(i + 1, count), count)
        return values

    def timed(what: str, work: Any) -> Any:
        begun = time.perf_counter()
        result = work()
        seconds[what] = round(time.perf_counter() - begun, 3)
        return result

    job.say("Generating")
    with torch.no_grad():
        scaled = timed("generate", lambda: pipe(
            prompt, negative_prompt=negative or None, width=width, height=height, num_inference_steps=count,
            guidance_scale=guidance, generator=torch.Generator("cpu").manual_seed(int(seed)), output_type="latent",
            callback_on_step_end=step).images)
        latents = codec.from_scaled(scaled.float())
        job.say("Decoding")
        low = timed("decode", lambda: codec.decode(latents, should_stop=job.should_stop))
        job.say("UPLiFT")
        larger = timed("uplift", lambda: upscale_latents(
            net, latents.cpu(), low.cpu(), scale=int(scale), seed=int(seed), progress=job.report,
            should_stop=job.should_stop))
        job.say("Decoding the large picture")
        high = timed("decode_large", lambda: match_color(
            codec.decode(larger, should_stop=job.should_stop), low, "mean").clamp(0, 1))
    settings = {"prompt": prompt, "negative_prompt": negative, "steps": count, "guidance": guidance, "seed": int(seed),
                "model": name, "scale": int(scale)}
    small_path, large_path = app.storage.new("generated.png"), app.storage.new(f"generated_{scale:g}x.png")
    write_picture(Picture(low[0].cpu()), small_path, settings={**settings, "scale": 1})
    write_picture(Picture(high[0].cpu()), large_path, settings=settings)
    return small_path, large_path, {**settings, "from": [width, height], "to": [high.shape[3], high.shape[2]],
                                    "seconds": seconds}


def _codec(pipe: Any) -> KLCodec:
    from uplift_core.vae import KLCodec

    config = pipe.vae.config
    space = "sd15" if config.latent_channels == 4 and abs(config.scaling_factor - 0.18215) < 1e-4 else ""
    return KLCodec(pipe.vae, space, scaling_factor=config.scaling_factor)


def _within(name: str, value: Any, least: float, most: float) -> None:
    from uplift_core.errors import InputError

    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise InputError(f"{name} is {value!r}; expected {least:g} to {most:g}")
