"""What all hosts of the family share, and what an adapter says of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uplift_core.model import UPLiFT


class Host:
    """The running host: its modules, and what is done differently from host to host.

    ``name`` is for messages. ``tiles_decode``: whether the VAE goes on in tiles by itself when memory ends.
    """

    name = ""
    tiles_decode = True

    def __init__(self) -> None:
        from modules import devices, processing, shared

        self.devices, self.processing, self.shared = devices, processing, shared

    # -- common to all ---------------------------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        return self.shared.state

    def option(self, name: str, default: Any) -> Any:
        """A value of the settings page; the default where it was never saved."""
        value = getattr(self.shared.opts, name, None)
        return default if value is None else value

    def should_stop(self) -> bool:
        """Whether the user pressed Interrupt or Skip."""
        return bool(self.state.interrupted or self.state.skipped)

    def models_folder(self) -> Path:
        """The folder that holds the host's folders of models."""
        from modules import paths

        return Path(paths.models_path)

    def decode(self, p: Any, latents: Tensor) -> Any:
        """Scaled latents ``b 4 h w`` to the host's DecodedSamples: ``3 8h 8w`` each, about -1 to 1, on the CPU.

        The host's own way, so that its choice of VAE, its check for NaN and its retry in fp32 hold here too.
        """
        return self.processing.decode_latent_batch(p.sd_model, latents, target_device=self.devices.cpu,
                                                   check_for_nans=True)

    def decoded_samples(self, pictures: Tensor) -> Any:
        """Pictures ``b 3 H W`` in -1 to 1 as what the host takes for already decoded."""
        samples = self.processing.DecodedSamples()
        samples.extend(pictures)
        return samples

    def handed_picture(self, decoded: Tensor) -> Tensor:
        """What the host hands to ``sample_hr_pass`` as ``decoded_samples``, in -1 to 1."""
        return decoded

    # -- the adapter's own -----------------------------------------------------------------------------------------

    def device(self) -> torch.device:
        """Where to compute."""
        raise NotImplementedError

    def preferred_dtype(self, device: torch.device, parameters: int) -> torch.dtype:
        """The number format this host would run a model of that many parameters in."""
        raise NotImplementedError

    def home(self) -> torch.device:
        """Where weights wait when they are not used."""
        return torch.device("cpu")

    def wrap(self, model: UPLiFT) -> Any:
        """Called once after loading: the host's own object for a model it moves between memories, or None."""
        return None

    def free_bytes(self, device: torch.device) -> int | None:
        """What may be used on the device now; None leaves it to the core."""
        return None

    @contextlib.contextmanager
    def in_place(self, model: UPLiFT, handle: Any, needed: int) -> Iterator[None]:
        """The weights where they compute, with ``needed`` bytes of room beside them, as far as there is room."""
        raise NotImplementedError
        yield

    def collect(self) -> None:
        """Give unused device memory back."""
        self.devices.torch_gc()
