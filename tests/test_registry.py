"""Known models: found in order, downloaded through the hub's client, every failure explained."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest
from safetensors.torch import save, save_file

from hub_standin import COMMIT, HubStandIn
from quick_python import python
from rule_weights import published_shapes, rule_state
from uplift_core import hub, registry
from uplift_core.assets import asset
from uplift_core.config import PRESETS
from uplift_core.errors import CheckpointError, DownloadError, InputError, MissingExtra
from uplift_core.registry import KNOWN, describe, find, get, installed, lookup, model_folders, user_folder

ROOT = Path(__file__).parent.parent
DINO = KNOWN["dinov2-s14"]
SERVED = f"{DINO.repo}/{DINO.filename}"


@pytest.fixture(scope="module")
def content() -> bytes:
    return save(rule_state(published_shapes("dinov2-s14")), metadata={"format": "pt"})


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A machine of its own: no models, no cache."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("UPLIFT_MODELS", raising=False)
    monkeypatch.setattr(hub, "cached", lambda *_: None)
    return tmp_path


def run(tmp_path: Path, code: str, url: str = "http://127.0.0.1:9", **env: str):
    """What ``code`` puts into ``out``, run in a Python of its own, as huggingface_hub reads the environment once."""
    program = ("import json, sys, time; time.sleep = lambda seconds: None; out = {}\n"
               "from uplift_core import registry, hub\nfrom uplift_core.errors import *\n"
               f"{textwrap.dedent(code)}\njson.dump(out, sys.stdout, default=str)")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "UPLIFT_", "XDG_"))
             and not k.lower().endswith("_proxy")}
    own = {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "XDG_DATA_HOME": str(tmp_path / "data"),
           "HF_ENDPOINT": url, "OMP_NUM_THREADS": "1"}
    done = python("-c", program, env={**clean, **own, **env}, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def make_cache(home: Path, content: bytes) -> Path:
    """A hub cache as huggingface_hub leaves it, made by hand."""
    repo = home / "hf" / "hub" / ("models--" + DINO.repo.replace("/", "--"))
    for part in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (repo / part).mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs" / "etag").write_bytes(content)
    pointer = repo / "snapshots" / COMMIT / DINO.filename
    pointer.symlink_to(Path("../../blobs/etag"))
    return pointer


# -- the data ------------------------------------------------------------------------------------------------------

def test_known_models():
    assert {name for name, model in KNOWN.items() if not model.bundled} == set(PRESETS)
    assert KNOWN["uplift-mini"].bundled and find("uplift-mini") == get("mini") == asset("uplift-mini.safetensors")
    for name in PRESETS:
        model = KNOWN[name]
        assert model.name == name and PRESETS[model.preset].latent_space == model.latent_space
        assert model.repo.startswith("UPLiFT-upsampler/uplift_") and model.filename.endswith(".safetensors")
        numbers = sum(v.numel() for k, v in rule_state(published_shapes(name)).items() if "running" not in k
                      and "num_batches" not in k) if name != "sd15-vae" else 53_487_445
        assert model.size_bytes == 4 * numbers


def test_names_and_aliases():
    for name in ("sd15-vae", "SD15", "uplift_sd1.5vae", "uplift_sd1.5vae.safetensors",
                 "UPLiFT-upsampler/uplift_sd1.5vae"):
        assert lookup(name) is KNOWN["sd15-vae"]
    assert lookup("sd15-vae/") is None and lookup("") is None
    words = [word for model in KNOWN.values() for word in (model.name, *model.aliases)]
    assert len(words) == len(set(words))


# -- finding -------------------------------------------------------------------------------------------------------

def test_order_of_the_search(home, monkeypatch, tmp_path):
    places = [tmp_path / "host", tmp_path / "env1", tmp_path / "env2", user_folder()]
    monkeypatch.setenv("UPLIFT_MODELS", os.pathsep.join(map(str, [places[1], "", places[2]])))
    assert model_folders([places[0]]) == places
    assert find("dinov2-s14", folders=[places[0]]) is None
    cache = tmp_path / "cached.safetensors"
    monkeypatch.setattr(hub, "cached", lambda *_: cache)
    assert find("dinov2-s14", folders=[places[0]]) == cache
    for place in reversed(places):
        place.mkdir(parents=True)
        (place / DINO.filename).touch()
        assert find("dinov2-s14", folders=[places[0]]) == find("DINOv2", folders=[places[0]]) == place / DINO.filename


def test_paths_and_file_names(home, monkeypatch):
    folder = home / "models"
    folder.mkdir()
    own = folder / "mine.pth"
    own.touch()
    assert find(own) == find(str(own)) == own
    assert find("mine", folders=[folder]) == find("mine.pth", folders=[folder]) == own
    assert find("mine") is None and find(folder / "other.pth") is None
    monkeypatch.chdir(folder)
    assert find("mine.pth") == Path("mine.pth") and find("./mine.pth") == Path("mine.pth")
    (folder / "sd15-vae").mkdir()
    assert find("sd15-vae") is None  # a folder of that name is not the model


def test_user_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert user_folder() == tmp_path / "uplift" / "models"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert user_folder().parts[-2:] == ("uplift", "models") and user_folder().is_absolute()


def test_unknown_names(home):
    with pytest.raises(InputError, match=r"no model is called 'dinov3-splus'.*known are sd15-vae.*Did you mean dinov3"):
        get("dinov3-splus")
    with pytest.raises(InputError, match="known are"):
        get("zebra")
    for path in ("nowhere.safetensors", "some/where/x", "~/nowhere", home / "no"):
        with pytest.raises(CheckpointError, match="does not exist"):
            get(path)
    with pytest.raises(InputError, match="known are"):
        registry.download("zebra")


def test_get_prefers_what_is_there(home, monkeypatch):
    monkeypatch.setattr(hub, "fetch", lambda *_, **__: pytest.fail("asked the hub"))
    (home / "host").mkdir()
    (home / "host" / DINO.filename).touch()
    assert get("dinov2", folders=[home / "host"]) == home / "host" / DINO.filename


def test_installed(home, content):
    folder = home / "host"
    folder.mkdir()
    for name in ("mine.pth", "notes.txt", ".hidden.pth", DINO.filename):
        (folder / name).write_bytes(content)
    entries = {entry.name: entry for entry in installed([folder, home / "not there"])}
    assert list(entries) == [*KNOWN, "mine.pth"]
    assert entries["sd15-vae"].state == "not downloaded" and entries["sd15-vae"].known is KNOWN["sd15-vae"]
    assert entries["dinov2-s14"].state == str(folder / DINO.filename)
    assert entries["mine.pth"].known is None and entries["mine.pth"].path == folder / "mine.pth"


def test_describe(tmp_path, content):
    path = tmp_path / DINO.filename
    path.write_bytes(content)
    about = describe(path)
    assert json.loads(json.dumps(about)) == about
    assert about["parameters"] == 789_521 and about["dtype"] == "float32" and about["size_bytes"] == len(content)
    assert (about["latent_space"], about["patch"], about["channels"]) == ("dinov2-s14", 14, 384)
    assert about["config_source"] == "known model dinov2-s14" and about["refiner_blocks"] == 0
    save_file({"a": rule_state({"a": (2,)})["a"]}, tmp_path / "no.safetensors")
    with pytest.raises(CheckpointError, match="not an UPLiFT"):
        describe(tmp_path / "no.safetensors")


# -- without a network ---------------------------------------------------------------------------------------------

def test_without_huggingface_hub(home, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "data"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert find("sd15-vae") is None
    with pytest.raises(MissingExtra, match=r"uplift-upscale\[hub\]"):
        get("sd15-vae")


def test_cache_is_found_offline(tmp_path, content):
    pointer = make_cache(tmp_path, content)
    out = run(tmp_path, """
        out["find"] = registry.find("dinov2-s14")
        out["get"] = registry.get("dinov2-s14", offline=True)
        out["download"] = registry.download("dinov2-s14")
        out["folder"] = registry.download("dinov2-s14", folder=FOLDER)
        """.replace("FOLDER", repr(str(tmp_path / "models"))), HF_HUB_OFFLINE="1")
    assert out["find"] == out["get"] == out["download"] == str(pointer)
    assert Path(out["folder"]).read_bytes() == content
    assert [p.name for p in (tmp_path / "models").iterdir()] == [DINO.filename]


FAIL = """
def attempt(name, call):
    try:
        out[name] = [None, str(call())]
    except UpliftError as error:
        out[name] = [type(error).__name__, str(error)]
"""


def explained(entry, *words: str) -> None:
    kind, message = entry
    assert kind == "DownloadError", entry
    for word in (DINO.filename, f"/{DINO.repo}/resolve/main/{DINO.filename}", "put it into", *words):
        assert word in message, message


def test_offline_and_out_of_reach(tmp_path):
    code = FAIL + 'attempt("get", lambda: registry.get("dinov2-s14"))'
    explained(run(tmp_path, code, HF_HUB_OFFLINE="1")["get"], "HF_HUB_OFFLINE", str(tmp_path / "data"))
    explained(run(tmp_path, code)["get"], "http://127.0.0.1:9 cannot be reached")
    code += '\nattempt("asked", lambda: registry.get("dinov2-s14", offline=True))'
    with HubStandIn.serving({}) as server:
        explained(run(tmp_path, code, server.url)["asked"], "offline mode was asked for")


def test_offline_is_said_where_huggingface_hub_is_missing(monkeypatch, tmp_path):
    """Not that a package for downloading is wanted, which would not help."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setenv("UPLIFT_MODELS", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(DownloadError, match="offline mode was asked for. Get it from http.*dinov2-s14.*put it into"):
        get("dinov2-s14", offline=True)


# -- with a hub ----------------------------------------------------------------------------------------------------

def test_download_into_the_cache(tmp_path, content):
    with HubStandIn.serving({SERVED: content}) as server:
        out = run(tmp_path, """
            seen = []
            out["path"] = registry.get("dinov2-s14", progress=lambda *counts: seen.append(counts))
            out["seen"] = seen
            out["again"] = registry.get("dinov2-s14")
            out["pinned"] = registry.download("dinov2-s14", revision="COMMIT")
            """.replace("COMMIT", COMMIT), server.url)
        bodies = server.bodies
    path = Path(out["path"])
    assert path.read_bytes() == content and tmp_path / "hf" in path.parents
    assert out["again"] == out["pinned"] == out["path"] and bodies == 1
    assert out["seen"][-1] == [len(content)] * 2
    assert out["seen"] == sorted(out["seen"]) and all(total == len(content) for _, total in out["seen"])


def test_download_into_a_folder(tmp_path, content):
    folder = tmp_path / "models" / "uplift"
    folder.mkdir(parents=True)
    (folder / DINO.filename).write_bytes(b"older")
    with HubStandIn.serving({SERVED: content}) as server:
        out = run(tmp_path, f'out["path"] = registry.download("dinov2-s14", folder={str(folder)!r})', server.url)
    assert Path(out["path"]) == folder / DINO.filename and (folder / DINO.filename).read_bytes() == content
    assert [p.name for p in folder.iterdir()] == [DINO.filename]


def test_a_broken_connection_is_resumed(tmp_path, content):
    with HubStandIn.serving({SERVED: content}) as server:
        server.mode = "breaks"
        out = run(tmp_path, """
            from huggingface_hub import constants, file_download
            # What is resumed are whole chunks; 10 MB otherwise. Old versions keep the number elsewhere.
            constants.DOWNLOAD_CHUNK_SIZE = file_download.DOWNLOAD_CHUNK_SIZE = 65536
            seen = []
            out["path"] = registry.download("dinov2-s14", progress=lambda *counts: seen.append(counts))
            out["seen"] = seen
            """, server.url)
        ranges = [wanted for method, path, wanted in server.requests if method == "GET" and "/resolve/" in path]
    assert Path(out["path"]).read_bytes() == content
    assert ranges == ["", f"bytes={len(content) // 2 // 65536 * 65536}-"]
    assert out["seen"][-1] == [len(content)] * 2 and max(done for done, _ in out["seen"]) == len(content)


def test_tokens(tmp_path, content):
    code = FAIL + """
        attempt("given", lambda: registry.download("dinov2-s14", token="hf_right", folder=FOLDER))
        attempt("wrong", lambda: registry.download("dinov2-s14", token="hf_wrong", folder=FOLDER + "2"))
        attempt("environment", lambda: registry.download("dinov2-s14"))
        """.replace("\n        ", "\n").replace("FOLDER", repr(str(tmp_path / "models")))
    with HubStandIn.serving({SERVED: content}, token="hf_right") as server:
        out = run(tmp_path, code, server.url, HF_TOKEN="hf_right")
        assert out["given"][0] is out["environment"][0] is None
        explained(out["wrong"], "401", "HF_TOKEN")
        assert "hf_wrong" not in out["wrong"][1]
        explained(run(tmp_path / "other", code, server.url)["environment"], "401")


def test_every_failure_is_explained_and_leaves_nothing(tmp_path, content):
    expected = {"401": "401", "403": "403", "404": "404", "500": "500", "429": "429", "gated": "gated",
                "norepo": "401", "short": "cut short", "portal": "does not answer like the hub",
                "page": "ut", "corrupt": "another checksum"}
    folder = tmp_path / "models"
    code = FAIL + f"""
import urllib.request
for mode in {list(expected)!r}:
    urllib.request.urlopen(urllib.request.Request(ENDPOINT + "/_mode/" + mode, method="POST"))
    attempt(mode, lambda: registry.download("dinov2-s14"))
    attempt(mode + "-folder", lambda: registry.download("dinov2-s14", folder={str(folder)!r}))
attempt("revision", lambda: registry.download("dinov2-s14", revision="nonsense"))
"""
    with HubStandIn.serving({SERVED: content}) as server:
        out = run(tmp_path, code.replace("ENDPOINT", repr(server.url)), server.url)
    for mode, word in expected.items():
        explained(out[mode], word, str(tmp_path / "data"))
        explained(out[f"{mode}-folder"], word, str(folder))
    assert not folder.exists() or not list(folder.iterdir())
    left = [p for p in (tmp_path / "hf").rglob("*") if p.is_file() and p.suffix in (".safetensors", ".incomplete")]
    assert not [p for p in left if ".no_exist" not in p.parts]


def test_progress_can_stop_a_download(tmp_path, content):
    code = FAIL + f"""
def stop(done, total):
    raise Cancelled("stopped")
attempt("cache", lambda: registry.download("dinov2-s14", progress=stop))
attempt("folder", lambda: registry.download("dinov2-s14", progress=stop, folder={str(tmp_path / "models")!r}))
"""
    with HubStandIn.serving({SERVED: content}) as server:
        out = run(tmp_path, code, server.url)
    assert out["cache"] == out["folder"] == ["Cancelled", "stopped"]
    assert not list((tmp_path / "models").glob("*"))


def test_full_disk_and_forbidden_folder(tmp_path, content):
    code = FAIL + """
import errno, huggingface_hub
def broken(number):
    def hf_hub_download(*_, **__):
        raise OSError(number, "from the system")
    return hf_hub_download
for name in ("ENOSPC", "EACCES", "EROFS"):
    huggingface_hub.hf_hub_download = broken(getattr(errno, name))
    attempt(name, lambda: registry.download("dinov2-s14"))
"""
    with HubStandIn.serving({SERVED: content}) as server:
        out = run(tmp_path, code, server.url)
    explained(out["ENOSPC"], "disk is full")
    explained(out["EACCES"], "may not write")
    explained(out["EROFS"], "may not write")
