"""The main route: UPLiFT as an upscaler of Hires. fix.

No hook of the host may replace the latents before the second pass, so ``p.sample_hr_pass`` is wrapped. With a
denoising strength above 0 the host's own second pass starts from the larger latents; at 0 there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from uplift_core.errors import Cancelled

from . import guards, infotext, pictures, say
from . import job as jobs
from .enlarge import enlarge
from .job import Job
from .pictures import PATCH

MODES = {"UPLiFT 2x": 2, "UPLiFT 4x": 4}
FALLBACK = {"mode": "bicubic", "antialias": True}
"""How the host resizes our latents to a factor we do not make; it leaves those of the right size alone."""


def register(latent_upscale_modes: dict[str, Any]) -> None:
    """Put our names into the list of Hires. fix upscalers; again and again does no harm."""
    for name in MODES:
        latent_upscale_modes[name] = dict(FALLBACK)


def asked_scale(p: Any) -> int:
    """2 or 4 if this job's Hires. fix has UPLiFT for its upscaler, else 0."""
    return MODES.get(getattr(p, "hr_upscaler", None) or "", 0) if getattr(p, "enable_hr", False) else 0


def unhook(p: Any) -> None:
    """Take our wrapper off, also one that was copied along with another ``p``."""
    if getattr(vars(p).get("sample_hr_pass"), "is_uplift", False):
        del p.sample_hr_pass


def hook(p: Any, job: Job) -> None:
    """Wrap ``p.sample_hr_pass`` of this job."""
    original = p.sample_hr_pass

    def sample_hr_pass(samples: Any, decoded_samples: Any = None, *rest: Any, **named: Any) -> Any:
        if jobs.of(p) is not job:  # left behind inside another extension's wrapper
            return original(samples, decoded_samples, *rest, **named)
        return _Pass(p, job, original, samples, decoded_samples, rest, named).run()

    sample_hr_pass.is_uplift = True  # type: ignore[attr-defined]
    p.sample_hr_pass = sample_hr_pass


def before_sampling(p: Any, job: Job) -> None:
    """Another checkpoint for the second pass is put in place before ``sample_hr_pass``. Without a second pass it is
    not needed; with one, the host is made to decode the picture first, while the VAE of its latents is there."""
    job.reference = None
    if not job.hires_scale or job.reason or not _swaps(p):
        return
    if not p.denoising_strength:
        p.hr_checkpoint_info = p.hr_checkpoint_name = None
        if getattr(p, "hr_additional_modules", None) is not None:
            p.hr_additional_modules = ["Use same choices"]
    elif getattr(p, "firstpass_image", None) is None:
        p.latent_scale_mode = None


def _swaps(p: Any) -> bool:
    """Whether the host will load something else for the second pass."""
    modules = getattr(p, "hr_additional_modules", None)
    return getattr(p, "hr_checkpoint_info", None) is not None or (
        isinstance(modules, list) and "Use same choices" not in modules)


class _Pass:
    """One call of ``sample_hr_pass``."""

    def __init__(self, p: Any, job: Job, original: Callable[..., Any], samples: Any, decoded: Any,
                 rest: Sequence[Any], named: dict[str, Any]):
        self.p, self.job, self.original = p, job, original
        self.samples, self.handed, self.rest, self.named = samples, decoded, rest, named
        self.host = job.host
        self.first: Any = None  # the first pass, decoded, as the host would have done it

    def run(self) -> Any:
        p, host = self.p, self.host
        p.latent_scale_mode = host.shared.latent_upscale_modes.get(p.hr_upscaler) or dict(FALLBACK)
        if self.handed is not None:
            self.first = host.decoded_samples(host.handed_picture(self.handed))
        if host.should_stop():
            return self._stopped()
        second_pass = bool(p.denoising_strength)
        if not second_pass:
            # The host would have counted its second pass; UPLiFT takes its place on the progress bar.
            host.state.current_latent = None  # nothing new to preview
            host.state.nextjob()
        try:
            larger = self._enlarged()
            if not second_pass:
                return self._finished(larger)
        except Cancelled:
            return self._stopped()
        except Exception as error:  # whatever it is, the user keeps the first pass
            say.failed(p, self.job, error)
            larger = None
        if larger is None:
            if second_pass:
                host.state.nextjob()
            return self._kept()
        return self._second_pass(larger)

    def _kept(self) -> Any:
        """The first pass as it is."""
        return self.samples if self.first is None else self.first

    def _stopped(self) -> Any:
        infotext.clear(self.p)
        return self._kept()

    def _enlarged(self) -> Tensor | None:
        reason = self.job.reason or guards.not_latents(self.samples) or self._wrong_model()
        if reason:
            say.left_alone(self.p, self.job, reason)
            return None
        guide = self._guide()
        self._reference = guide
        return enlarge(self.job, self.samples, guide, self.job.hires_scale, self._seeds(),
                       own_step=not self.p.denoising_strength)

    def _wrong_model(self) -> str:
        reason = guards.not_sd1(self.p.sd_model)
        return reason and f"{reason} (the one for the second pass)"

    def _guide(self) -> Tensor:
        """The picture of the first pass, ``b 3 H W`` in [0, 1]."""
        given = getattr(self.p, "firstpass_image", None)
        if given is not None and self.first is None:
            guide = pictures.from_image(given)
            if guide.shape[2:] == tuple(n * PATCH for n in self.samples.shape[2:]):
                # The host rounds down when it makes bytes: a little more, so that these come out as they were.
                self.first = self.host.decoded_samples((guide + 0.25 / 255) * 2 - 1)
                return guide
        if self.first is None:
            self.first = pictures.decode(self.host, self.p, self.samples)
        return pictures.check_guide(pictures.to_unit(torch.stack(list(self.first))), self.samples)

    def _seeds(self) -> Sequence[int]:
        seeds = self.rest[0] if self.rest else self.named.get("seeds")
        seeds = list(seeds if seeds is not None else self.p.seeds)
        return seeds if len(seeds) == len(self.samples) else [seeds[0] + i for i in range(len(self.samples))]

    # -- without a second pass -------------------------------------------------------------------------------------

    def _finished(self, larger: Tensor | None) -> Any:
        """The larger latents for the host to decode; a picture, where only that gives the asked size or fits."""
        if larger is None:
            return self._kept()
        p = self.p
        self._save_first_pass()
        rows, columns = p.hr_upscale_to_y // PATCH, p.hr_upscale_to_x // PATCH
        cut_y, cut_x = _cut(rows, getattr(p, "truncate_y", 0)), _cut(columns, getattr(p, "truncate_x", 0))
        height, width = self._reference.shape[2:]
        self.job.reference = self._reference[:, :, _share(cut_y, height, rows), _share(cut_x, width, columns)]
        if tuple(larger.shape[2:]) == (rows, columns):
            larger = larger[:, :, cut_y, cut_x]
            return larger if pictures.fits(self.host, larger) else pictures.decode(self.host, p, larger)
        whole = pictures.resized(pictures.decode(self.host, p, larger), rows * PATCH, columns * PATCH)
        return self.host.decoded_samples(whole[:, :, _pixels(cut_y), _pixels(cut_x)])

    # -- with one --------------------------------------------------------------------------------------------------

    def _second_pass(self, larger: Tensor) -> Any:
        """The host's own second pass. It would save our large latents as the picture before Hires. fix: keep it from
        that, and save the small one."""
        p = self.p
        saves = self._save_first_pass()
        before = getattr(p, "do_not_save_samples", False)
        try:
            if saves:
                p.do_not_save_samples = True
            return self.original(larger, None, *self.rest, **self.named)
        finally:
            if saves:
                p.do_not_save_samples = before

    def _save_first_pass(self) -> bool:
        """"Save a copy of image before applying highres fix", where the user wants it; whether that is so."""
        p, host = self.p, self.host
        if not host.option("save_images_before_highres_fix", False) or not p.save_samples():
            return False
        try:
            self._save_each()
        except Exception as error:  # a copy that cannot be saved is no reason to lose the picture
            say.log.error("UPLiFT could not save the picture before Hires. fix", exc_info=error)
        return True

    def _save_each(self) -> None:
        from modules import images
        from PIL import Image

        p, processing = self.p, self.host.processing
        for i, picture in enumerate(self.first):
            values = (pictures.to_unit(picture) * 255).to(torch.uint8).movedim(0, -1).cpu().numpy()
            info = processing.create_infotext(p, p.all_prompts, p.all_seeds, p.all_subseeds, [],
                                              iteration=p.iteration, position_in_batch=i)
            images.save_image(Image.fromarray(values), p.outpath_samples, "", p.seeds[i], p.prompts[i],
                              self.host.shared.opts.samples_format, info=info, p=p, suffix="-before-highres-fix")


def _cut(size: int, away: int) -> slice:
    """What the host keeps of an axis when it cuts ``away`` latent pixels off in the middle's favour."""
    return slice(away // 2, size - (away + 1) // 2)


def _pixels(cut: slice) -> slice:
    return slice(cut.start * PATCH, cut.stop * PATCH)


def _share(cut: slice, size: int, of: int) -> slice:
    """The same stretch of an axis of another length; at least a pixel."""
    start = min(size - 1, round(cut.start * size / of))
    return slice(start, max(start + 1, round(cut.stop * size / of)))
