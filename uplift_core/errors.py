"""Everything that can go wrong, as one small family of exceptions.

Every message names the thing, what was expected, and what to do about it, so that a host can show it as it is.
"""


class UpliftError(Exception):
    """Base of all errors raised on purpose by this project."""


class ConfigError(UpliftError, ValueError):
    """A model configuration that no UPLiFT can be built from."""


class InputError(UpliftError, ValueError):
    """A picture, latent or option that does not fit what was asked."""


class CheckpointError(UpliftError):
    """A weights file that is missing, damaged, foreign or does not fit the model."""


class DownloadError(CheckpointError):
    """Weights that are neither on this machine nor within reach."""


class OutOfMemory(UpliftError, MemoryError):
    """The work does not fit in memory, even in the smallest tiles."""


class MissingExtra(UpliftError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package '{package}': pip install 'uplift-upscale[{extra}]'")


class Cancelled(UpliftError):
    """The caller asked to stop; nothing was written."""
