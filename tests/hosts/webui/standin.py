"""A small stand-in for the WebUI: the modules an extension sees, and the order in which a picture is made.

It follows the hosts' flow: first pass, the latents resized (those of the right size are left alone), second pass,
``post_sample``, decoding, ``postprocess_batch``. Latents are scaled. Its VAE is a small linear map, so that tiles of
it are exact. Hooks that raise are noted in ``errors`` and otherwise swallowed, as the hosts do.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, autocast

from hosts.webui import gradio_signatures
from hosts.webui.flavours import Flavour

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "uplift_hires.py"
FACTOR = 0.18215


class DecodedSamples(list):
    already_decoded = True


class SdModel:
    def __init__(self, kind: str = "sd1", vae_seed: int = 0):
        self.is_sd1, self.is_sdxl, self.is_sd2, self.is_sd3 = (kind == k for k in ("sd1", "sdxl", "sd2", "sd3"))
        self.mix = torch.randn(3, 4, generator=torch.Generator().manual_seed(vae_seed)) * 0.5
        self.decoded: list[tuple[int, ...]] = []

    def decode_first_stage(self, scaled: Tensor) -> Tensor:
        self.decoded.append(tuple(scaled.shape))
        colors = torch.einsum("oc,bchw->bohw", self.mix.to(scaled), scaled / FACTOR * 0.3)
        return torch.tanh(F.interpolate(colors, scale_factor=8, mode="nearest")).float()


class State:
    def __init__(self) -> None:
        self.interrupted = self.skipped = self.stopping_generation = False
        self.job_no, self.job_count, self.sampling_step, self.sampling_steps = 0, -1, 0, 0
        self.textinfo: str | None = None
        self.current_latent: Any = None
        self.texts: list[str] = []

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "textinfo" and value:
            self.texts.append(value)
        super().__setattr__(name, value)

    def nextjob(self) -> None:
        self.job_no += 1
        self.sampling_step = 0


class Script:
    """As far as the hosts' class goes: names for elements, and the list of controls a paste fills."""

    infotext_fields: Any = None

    def elem_id(self, item_id: str) -> str:
        return f"script_{self.title().lower()}_{item_id}"


class PostSampleArgs:
    def __init__(self, samples: Any):
        self.samples = samples


class OptionInfo:
    def __init__(self, default: Any = None, label: str = "", component: Any = None, component_args: Any = None,
                 onchange: Any = None, section: Any = None, refresh: Any = None, comment_before: str = "",
                 comment_after: str = "", infotext: Any = None, restrict_api: bool = False, category_id: Any = None):
        self.default, self.label, self.component, self.component_args = default, label, component, component_args
        self.section, self.refresh, self.infotext = section, refresh, infotext


class Options(SimpleNamespace):
    def add_option(self, name: str, info: OptionInfo) -> None:
        self.labels[name] = info
        if not hasattr(self, name):
            setattr(self, name, info.default)


class Patcher:
    """What the managed hosts keep of a model."""

    def __init__(self, model: Any, load_device: Any, offload_device: Any, size: int = 0, current_device: Any = None):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device


class P:
    """One job: ``hr`` for txt2img with Hires. fix, ``mask`` for inpainting."""

    sampler_name = "Euler"
    outpath_samples = "out"
    do_not_save_samples = False

    def __init__(self, host: Standin, **given: Any):
        self.host = host
        self.sd_model = host.sd_model
        self.width = self.height = 64
        self.batch_size, self.n_iter, self.iteration, self.seed, self.denoising_strength = 1, 1, 0, 7, 0.0
        self.enable_hr, self.hr_upscaler, self.hr_scale, self.hr_resize_x, self.hr_resize_y = False, None, 2.0, 0, 0
        self.truncate_x = self.truncate_y = 0
        self.hr_checkpoint_info = self.hr_checkpoint_name = self.firstpass_image = self.image_mask = None
        self.latent_scale_mode = None
        self.script_args: Any = [0]
        self.scripts: Any = SimpleNamespace(selectable_scripts=[])
        self.extra_generation_params: dict[str, Any] = {}
        self.comments: dict[str, int] = {}
        self.second_pass_from: list[Tensor] = []
        self.first_samples: list[Tensor] = []
        self.checkpoint_loads = 0
        vars(self).update(given)

    def comment(self, text: str) -> None:
        self.comments[text] = 1

    def save_samples(self) -> bool:
        return not self.do_not_save_samples

    def init(self) -> None:
        if not self.enable_hr:
            return
        self.latent_scale_mode = self.host.shared.latent_upscale_modes.get(self.hr_upscaler)
        self.extra_generation_params["Hires upscaler"] = self.hr_upscaler
        if self.hr_resize_x and self.hr_resize_y:
            wide = self.width / self.height < self.hr_resize_x / self.hr_resize_y
            x = self.hr_resize_x if wide else self.hr_resize_y * self.width // self.height
            y = self.hr_resize_x * self.height // self.width if wide else self.hr_resize_y
            self.truncate_x, self.truncate_y = (x - self.hr_resize_x) // 8, (y - self.hr_resize_y) // 8
            self.hr_upscale_to_x, self.hr_upscale_to_y = x, y
        else:
            self.hr_upscale_to_x = int(self.width * self.hr_scale)
            self.hr_upscale_to_y = int(self.height * self.hr_scale)
        self.host.shared.state.job_count *= 2

    def sample(self, seeds: list[int]) -> Any:
        handed = None
        if self.enable_hr and self.firstpass_image is not None:
            assert self.latent_scale_mode is not None, "the host has no latents to enlarge"
            samples = first_latents(seeds, self.height // 8, self.width // 8)
        else:
            samples = first_latents(seeds, self.height // 8, self.width // 8)
            if self.host.flavour.autocast:
                samples = samples.bfloat16().float()
            samples = samples.to(self.host.latent_dtype)
            self.first_samples.append(samples)
            if not self.enable_hr:
                return samples
            if self.latent_scale_mode is None:
                handed = torch.stack(self.host.processing.decode_latent_batch(self.sd_model, samples)).float()
                if self.host.flavour.unit_pictures:
                    handed = ((handed + 1) / 2).clamp(0, 1)
        if self.hr_checkpoint_info is not None:
            self.checkpoint_loads += 1
            self.sd_model = self.hr_checkpoint_info
        return self.sample_hr_pass(samples, handed, seeds, seeds, 0, [""] * len(seeds))

    def sample_hr_pass(self, samples: Any, decoded_samples: Any, seeds: Any, subseeds: Any, subseed_strength: Any,
                       prompts: Any) -> Any:
        host = self.host
        if host.shared.state.interrupted:
            return samples
        assert self.latent_scale_mode is not None
        if self.save_samples() and host.shared.opts.save_images_before_highres_fix:
            host.saved += [("host", tuple(samples.shape))] * len(samples)
        size = (self.hr_upscale_to_y // 8, self.hr_upscale_to_x // 8)
        samples = F.interpolate(samples.float(), size=size, **self.latent_scale_mode).to(samples)
        host.shared.state.nextjob()
        ty, tx = self.truncate_y, self.truncate_x
        samples = samples[:, :, ty // 2:samples.shape[2] - (ty + 1) // 2, tx // 2:samples.shape[3] - (tx + 1) // 2]
        self.second_pass_from.append(samples)
        if host.second_pass_fails:
            raise RuntimeError("the second pass failed")
        return host.processing.decode_latent_batch(self.sd_model, samples * (1 - 0.01 * self.denoising_strength))


def first_latents(seeds: list[int], height: int, width: int) -> Tensor:
    """What the stand-in's sampler makes: scaled latents, one for each seed."""
    return torch.stack([torch.randn(4, height, width, generator=torch.Generator().manual_seed(s)) for s in seeds]) * 0.8


class Standin:
    """A running host of this flavour, with the extension loaded from its own folder."""

    def __init__(self, flavour: Flavour, folder: Path, monkeypatch: Any):
        self.flavour, self.folder, self.monkeypatch = flavour, folder, monkeypatch
        self.sd_model, self.latent_dtype = SdModel(), torch.float32
        self.errors: list[BaseException] = []
        self.saved: list[tuple[str, Any]] = []
        self.second_pass_fails = False
        self.moved: list[str] = []
        self.callbacks: dict[str, list[Any]] = {}
        self._modules()
        self.load()

    # -- what an extension imports ---------------------------------------------------------------------------------

    def _module(self, name: str, **content: Any) -> ModuleType:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []  # type: ignore[attr-defined]
        vars(module).update(content)
        self.monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
        return module

    def _modules(self) -> None:
        cpu = torch.device("cpu")

        def decode_latent_batch(model: Any, batch: Tensor, target_device: Any = None, check_for_nans: bool = False
                                ) -> DecodedSamples:
            with autocast("cpu", enabled=False):  # as the host does: some VAEs overflow under it
                return DecodedSamples(model.decode_first_stage(batch))

        self._module("modules")
        opts = Options(labels={}, save_images_before_highres_fix=False, samples_format="png")
        self.shared = self._module("modules.shared", opts=opts, state=State(), OptionInfo=OptionInfo,
                                   latent_upscale_modes={"Latent": {"mode": "bilinear", "antialias": False}},
                                   sd_model=self.sd_model)
        self._module("modules.devices", device=cpu, cpu=cpu, dtype=torch.float32, dtype_vae=torch.float32,
                     torch_gc=lambda: self.moved.append("gc"))
        self.processing = self._module("modules.processing", DecodedSamples=DecodedSamples,
                                       decode_latent_batch=decode_latent_batch, create_infotext=lambda *a, **k: "")
        self._module("modules.paths", models_path=str(self.folder / "models"))
        self._module("modules.images", save_image=lambda image, *a, suffix="", **k: self.saved.append(
            (suffix, image.size)))
        self._module("modules.scripts", Script=Script, AlwaysVisible=object(), PostSampleArgs=PostSampleArgs,
                     basedir=lambda: str(ROOT))
        self._module("modules.script_callbacks", **{
            name: (lambda function, name=name: self.callbacks.setdefault(name, []).append(function))
            for name in ("on_before_ui", "on_ui_settings", "on_after_component")})
        self._module("modules.ui_components", InputAccordion=gradio_signatures.InputAccordion)
        self.monkeypatch.setitem(sys.modules, "gradio", gradio_signatures.module(self.flavour.gradio))
        for name in ("panel", "settings"):  # they hold the other gradio
            self.monkeypatch.delitem(sys.modules, f"uplift_webui.{name}", raising=False)
            if "uplift_webui" in sys.modules:
                self.monkeypatch.delattr(sys.modules["uplift_webui"], name, raising=False)
        for name in ("backend", "ldm_patched", "modules_forge"):
            self.monkeypatch.delitem(sys.modules, name, raising=False)
        if self.flavour.memory != "devices":
            self._managed(cpu)

    def _managed(self, cpu: torch.device) -> None:
        def load_models_gpu(models: list[Patcher], memory_required: float = 0) -> None:
            assert memory_required > 0
            self.moved.append("loaded")

        manager = dict(get_torch_device=lambda: cpu, unet_offload_device=lambda: cpu, load_models_gpu=load_models_gpu,
                       get_free_memory=lambda dev=None: 2 << 30, get_total_memory=lambda dev=None: 8 << 30,
                       should_use_fp16=lambda device=None, model_params=0: True)
        self._module("modules_forge")
        self._module("modules_forge.forge_version", version=self.flavour.version)
        if self.flavour.memory == "backend":
            self._module("backend")
            self._module("backend.memory_management", **manager)
            self._module("backend.patcher")
            self._module("backend.patcher.base", ModelPatcher=Patcher)
        else:
            self._module("ldm_patched")
            self._module("ldm_patched.modules")
            self._module("ldm_patched.modules.model_management", **manager)
            self._module("ldm_patched.modules.model_patcher", ModelPatcher=Patcher)

    # -- loading the script as the hosts do ------------------------------------------------------------------------

    def load(self) -> None:
        """At the start, and again at every reload of the page."""
        self.callbacks.clear()
        before = sys.path
        if self.flavour.keeps_path and str(ROOT) not in before:
            sys.path = before = [str(ROOT), *before]
        try:
            sys.path = [str(ROOT), *before]
            spec = importlib.util.spec_from_file_location(SCRIPT.name, SCRIPT)
            assert spec and spec.loader
            self.module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(self.module)
        finally:
            sys.path = before
        classes = [c for c in vars(self.module).values() if inspect.isclass(c) and issubclass(c, Script)]
        assert len(classes) == 1
        self.script = classes[0]()
        self.call("on_before_ui")
        self.call("on_ui_settings")

    def call(self, name: str, *args: Any, **named: Any) -> None:
        for function in self.callbacks.get(name, []):
            function(*args, **named)

    # -- making pictures -------------------------------------------------------------------------------------------

    def _hook(self, name: str, *args: Any, **named: Any) -> None:
        try:
            getattr(self.script, name)(*args, **named)
        except Exception as error:
            self.errors.append(error)

    def run(self, p: P, *args: Any) -> SimpleNamespace:
        """Pictures, each with its generation text as a dict."""
        state = self.shared.state = State()
        pictures: list[Image.Image] = []
        texts: list[dict[str, Any]] = []
        p.all_prompts = [""] * p.batch_size * p.n_iter
        p.all_seeds = p.all_subseeds = [p.seed + i for i in range(p.batch_size * p.n_iter)]
        self._hook("process", p, *args)
        mode = torch.inference_mode() if self.flavour.inference else torch.no_grad()
        with mode:
            state.job_count = p.n_iter
            p.init()
            for n in range(p.n_iter):
                p.iteration, p.sd_model = n, self.sd_model
                p.seeds = p.all_seeds[n * p.batch_size:(n + 1) * p.batch_size]
                p.prompts = [""] * p.batch_size
                self._hook("process_batch", p, *args, batch_number=n, prompts=p.prompts, seeds=p.seeds)
                with autocast("cpu", dtype=torch.bfloat16, enabled=self.flavour.autocast):
                    samples = p.sample(p.seeds)
                ps = PostSampleArgs(samples)
                self._hook("post_sample", p, ps, *args)
                samples = ps.samples
                if not getattr(samples, "already_decoded", False):
                    samples = self.processing.decode_latent_batch(p.sd_model, samples)
                images = ((torch.stack(list(samples)).float() + 1) / 2).clamp(0, 1)
                state.nextjob()
                self._hook("postprocess_batch", p, *args, images=images, batch_number=n)
                for image in images:
                    pictures.append(Image.fromarray((image.movedim(0, -1) * 255).to(torch.uint8).numpy()))
                    texts.append(dict(p.extra_generation_params))
        self._hook("postprocess", p, None, *args)
        return SimpleNamespace(pictures=pictures, texts=texts, state=state, comments=list(p.comments))
