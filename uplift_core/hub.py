"""One file from the Hugging Face hub, through ``huggingface_hub``: its cache, resume, mirrors, offline mode, token.

The environment it honours: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN.
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import CheckpointError, DownloadError, MissingExtra, UpliftError
from .foreign import kind_of, safetensors_header

log = logging.getLogger(__name__)

_TRIES = 3
_BROKEN_OFF = {"ProtocolError", "RemoteProtocolError", "ReadError", "ReadTimeout", "ChunkedEncodingError"}

Progress = Callable[[int, int], None]  # bytes there, bytes in all (0: not known)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtra("huggingface_hub", "hub", "Downloading weights") from None
    return huggingface_hub


def _address(repo: str, filename: str, revision: str) -> str:
    """Where the file is on the hub; huggingface_hub knows best, but errors name the place without it as well."""
    try:
        return str(_hub().hf_hub_url(repo, filename, revision=revision))
    except MissingExtra:
        endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
        return f"{endpoint}/{repo}/resolve/{revision}/{filename}"


def cached(repo: str, filename: str, revision: str | None = None) -> Path | None:
    """The file in the hub's cache on this machine, or None. Never touches the network."""
    try:
        found = _hub().try_to_load_from_cache(repo, filename, revision=revision)
    except MissingExtra:
        return None
    return Path(found) if isinstance(found, str) and os.path.isfile(found) else None


def fetch(repo: str, filename: str, *, folder: Path | None, by_hand: Path, progress: Progress | None = None,
          token: str | None = None, revision: str | None = None, offline: bool = False, rename: str = "") -> Path:
    """Download the file into the hub's cache, or into ``folder`` if one is given; the whole file or none.

    Raises DownloadError naming the file, its address, the folder to put it in by hand (``by_hand``, there called
    ``rename``), and the cause; MissingExtra without huggingface_hub.
    """
    revision = revision or "main"
    url = _address(repo, filename, revision)

    def failed(cause: str) -> DownloadError:
        what, name = (f"{repo}/{filename}", f" as {rename}") if rename else (filename, "")
        return DownloadError(f"{what} could not be downloaded: {cause}. Get it from {url} with a browser or on "
                             f"another machine and put it into {folder or by_hand}{name}")

    if offline:
        raise failed("offline mode was asked for")
    hub = _hub()
    options: dict[str, Any] = {"revision": revision, "token": token}
    if progress is not None and "tqdm_class" in inspect.signature(hub.hf_hub_download).parameters:
        options["tqdm_class"] = _reporter(progress)
    staging = folder / f".{filename}.download" if folder else None
    try:
        ready = cached(repo, filename, revision)
        if ready is None:  # one question first: downloading asks five times, with warnings
            hub.get_hf_file_metadata(url, token=token)
        if folder and staging:
            if ready is None or not _looks_whole(ready):
                staging.mkdir(parents=True, exist_ok=True)
                ready = Path(_resumed(hub.hf_hub_download, repo, filename, local_dir=staging, **options))
                notes = [staging / place / f"download/{filename}.metadata"
                         for place in (".cache/huggingface", ".huggingface")]  # the second before version 0.25
                _verify(ready, next((note for note in notes if note.is_file()), notes[0]))
            if progress is not None:  # the last chance to stop, and with an old huggingface_hub the only one
                progress(ready.stat().st_size, ready.stat().st_size)
            path = _publish(ready, folder / filename, move=staging in ready.parents)
        else:
            path = Path(_resumed(hub.hf_hub_download, repo, filename, **options))
            _verify(path, None)
    except UpliftError as bad:
        if not isinstance(bad, CheckpointError):
            raise  # the caller's progress callback asked to stop
        raise failed(f"what arrived is not the file ({bad})") from None
    except Exception as error:  # whatever http library and version huggingface_hub brings
        log.debug("download of %s failed", url, exc_info=True)
        raise failed(cause(error, url)) from error
    finally:
        if staging and not any(staging.rglob("*.incomplete")):  # what is left of those can be resumed
            shutil.rmtree(staging, ignore_errors=True)
    if progress is not None:
        progress(path.stat().st_size, path.stat().st_size)
    return path


def is_absent(error: DownloadError) -> bool:
    """Whether the hub was reached and has no such file."""
    return getattr(getattr(error.__cause__, "response", None), "status_code", None) == 404


def _resumed(download: Callable[..., str], *names: str, **options: Any) -> str:
    """The download; a connection that breaks off is taken up where it was, which old versions leave to the caller."""
    for _ in range(_TRIES - 1):
        try:
            return download(*names, **options)
        except UpliftError:
            raise
        except Exception as error:
            if not _class_names(error) & _BROKEN_OFF:
                raise
            log.info("the connection broke off; going on with the download")
    return download(*names, **options)


def _looks_whole(path: Path) -> bool:
    try:
        _check(path)
    except CheckpointError:
        return False
    return True


def _check(path: Path) -> None:
    if kind_of(path) == "safetensors":
        safetensors_header(path)


def _verify(path: Path, note: Path | None) -> None:
    """Check header, length and, where the hub told one, the SHA-256; a bad file is removed before the error."""
    # One link only: what the hub names by checksum may itself be a link to a store with other names.
    blob = path.parent / os.readlink(path) if path.is_symlink() else path
    expected = blob.name
    if note is not None:
        lines = note.read_text().split() if note.is_file() else []
        expected = lines[1] if len(lines) > 1 else ""
    try:
        _check(path)
        if re.fullmatch("[0-9a-f]{64}", expected) and _sha256(blob) != expected:
            raise CheckpointError(f"{path} has another checksum than the hub's")
    except CheckpointError:
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _publish(source: Path, target: Path, *, move: bool) -> Path:
    """Bring a finished file to its place in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if move and not source.is_symlink():
        os.replace(source, target)
        return target
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        shutil.copyfile(source, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _reporter(progress: Progress) -> type:
    """A silent tqdm that hands its counts on. One bar per file, also where the hub would show two."""
    from tqdm.auto import tqdm

    class Reporter(tqdm):  # type: ignore[type-arg,misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            options["disable"] = True
            options.pop("name", None)
            super().__init__(*args, **options)
            self.done, self.of = int(options.get("initial") or 0), int(options.get("total") or 0)

        def update(self, n: float | None = 1) -> None:
            self.done += int(n or 0)
            progress(self.done, max(self.done, self.of) if self.of else 0)

        def update_transfer(self, n: float | None = 1) -> None:
            """Bytes on the wire, which the hub counts beside the bytes of the file."""

        def set_transfer_postfix_str(self, *args: Any, **options: Any) -> None:
            """Speed on the wire; not shown."""

    return Reporter


# -- why a download failed -----------------------------------------------------------------------------------------

def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _class_names(error: BaseException) -> set[str]:
    return {kind.__name__ for e in _chain(error) for kind in type(e).__mro__}


def cause(error: BaseException, url: str) -> str:
    """One clause on the cause. By class names and status, since libraries and versions differ in the classes."""
    chain = list(_chain(error))
    names = _class_names(error)
    status = next((code for e in chain if (code := getattr(getattr(e, "response", None), "status_code", None))), None)
    numbers = {e.errno for e in chain if isinstance(e, OSError)}
    host = re.sub(r"^(\w+://[^/]+).*", r"\1", url)
    if "OfflineModeIsEnabled" in names:
        return "offline mode is on (HF_HUB_OFFLINE)"
    if numbers & {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}:
        return "the disk is full; make room and try again, what has arrived may be resumed"
    if "PermissionError" in names or errno.EROFS in numbers:
        return f"this user may not write there ({error})"
    if "GatedRepoError" in names:
        return f"the repository is gated ({status}): accept its terms on the hub's web page and set HF_TOKEN"
    if status == 401:
        return "the hub answers 401: the token (HF_TOKEN or a saved log-in) is wrong or the repository is private"
    if status == 403:
        return "the hub answers 403: this token has no access to the repository"
    if status == 404:
        missing = "revision" if "RevisionNotFoundError" in names else "file or repository"
        return f"the hub answers 404: no such {missing} there"
    if status == 429:
        return "the hub answers 429: too many requests; try again later"
    if status and status >= 500:
        return f"the hub answers {status}: it has trouble itself; try again later"
    if any("Consistency check failed" in str(e) for e in chain):
        return "the transfer was cut short; try again"
    if "FileMetadataError" in names:
        return f"{host} does not answer like the hub (a proxy, a log-in page, or a wrong HF_ENDPOINT)"
    if names & _BROKEN_OFF:
        return f"the connection to {host} broke off; try again"
    if names & {"ConnectionError", "ConnectError", "ProxyError", "NetworkError", "TimeoutException", "Timeout"}:
        return f"{host} cannot be reached; check the connection, the proxy and HF_ENDPOINT"
    first = (str(chain[0]).strip().splitlines() or [""])[0]
    return f"{type(chain[0]).__name__}: {first}"
