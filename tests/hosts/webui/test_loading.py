"""How the host loads the extension: the list of upscalers, sys.path, reloads, the panel, the settings page."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hosts.webui.flavours import FLAVOURS
from hosts.webui.standin import ROOT, P, Standin
from hosts.webui.test_routes import OFF, ON, hires
from hub_standin import HubStandIn


def test_upscalers_are_in_the_list_with_modes_the_host_can_run(host: Standin) -> None:
    modes = host.shared.latent_upscale_modes
    assert list(modes) == ["Latent", "UPLiFT 2x", "UPLiFT 4x"]
    for mode in modes.values():
        assert F.interpolate(torch.zeros(1, 4, 8, 8), size=(16, 16), **mode).shape[-1] == 16


def test_reload_twice(host: Standin) -> None:
    once = host.run(hires(host), *OFF)
    labels, modes = list(host.shared.opts.labels), dict(host.shared.latent_upscale_modes)
    for _ in range(2):
        host.load()
    assert dict(host.shared.latent_upscale_modes) == modes and list(host.shared.opts.labels) == labels
    p = hires(host, denoising_strength=0.4)
    again = host.run(p, *OFF)
    assert len(p.second_pass_from) == 1 and again.pictures[0].size == once.pictures[0].size and not host.errors


def test_other_extensions_find_their_own_modules(host: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our folder holds ``nodes`` and ``tests``: it must not stay on sys.path."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT])
    for name in [n for n in sys.modules if n.split(".")[0] == "nodes"]:
        monkeypatch.delitem(sys.modules, name)
    host.load()
    assert not [entry for entry in sys.path if entry and Path(entry).resolve() == ROOT]
    assert find_spec("nodes") is None
    assert host.run(hires(host), *OFF).pictures[0].size == (128, 128)  # what is imported late is found all the same


def test_each_host_gets_its_adapter(host: Standin) -> None:
    names = {"a1111": "A1111", "forge": "Forge", "neo": "Forge", "classic": "Classic", "reforge": "Classic"}
    adapter = host.module.HOST
    assert type(adapter).__name__ == names[host.flavour.name]
    assert ("Neo" in adapter.name) == (host.flavour.name == "neo")


def test_panel_is_off_and_can_be_built_again(host: Standin) -> None:
    for _ in range(2):
        controls = host.script.ui(False)
        assert [c.label.split(":")[0] for c in controls] == ["UPLiFT", "Scale", "Noise", "Color fix"]
        assert [c.value for c in controls] == [False, "2x", 1.0, True]
        assert len({c.elem_id for c in controls}) == 4


def test_pasted_text_sets_the_panel(host: Standin) -> None:
    p = P(host)
    text = {key: str(value) for key, value in host.run(p, True, "4x", 0.5, False).texts[0].items()}
    enabled, scale, noise, color_fix = host.script.ui(False)

    def pasted(given: dict[str, str]) -> list[Any]:
        fields = dict((id(control), what) for control, what in host.script.infotext_fields)
        return [what(given) if callable(what) else given.get(what) for what in
                (fields[id(control)] for control in (enabled, scale, noise, color_fix))]

    assert pasted(text) == [True, "4x", "0.5", False]
    assert pasted({"Steps": "20"})[0] is False
    hires_text = {key: str(value) for key, value in host.run(hires(host), *OFF).texts[0].items()}
    assert pasted(hires_text)[0] is False  # or the picture would be enlarged by both routes


def test_settings_page(host: Standin) -> None:
    labels = host.shared.opts.labels
    assert list(labels) == ["uplift_model", "uplift_models_path", "uplift_precision", "uplift_tile",
                            "uplift_hires_noise", "uplift_color_fix"]
    for name, info in labels.items():
        arguments = info.component_args() if callable(info.component_args) else info.component_args
        component = info.component(label=info.label, value=info.default, elem_id=f"setting_{name}", **arguments)
        assert info.section == ("uplift", "UPLiFT")
        assert not hasattr(component, "choices") or info.default in component.choices


def test_settings_change_the_result(forge: Standin) -> None:
    usual = forge.run(hires(forge), *OFF).pictures[0].tobytes()
    for name, value in (("uplift_hires_noise", 0.0), ("uplift_color_fix", "none"), ("uplift_precision", "bf16")):
        before = getattr(forge.shared.opts, name)
        setattr(forge.shared.opts, name, value)
        result = forge.run(hires(forge), *OFF)
        assert result.pictures[0].tobytes() != usual and not result.comments, name
        setattr(forge.shared.opts, name, before)
    forge.shared.opts.uplift_tile = "off"
    assert forge.run(hires(forge), *OFF).pictures[0].tobytes() == usual


@pytest.mark.parametrize("name, value", [("uplift_tile", "7"), ("uplift_precision", "int3"), ("uplift_color_fix", 5),
                                         ("uplift_hires_noise", "much"), ("uplift_model", "")])
def test_settings_nobody_can_use_count_as_the_default(forge: Standin, name: str, value: Any) -> None:
    usual = forge.run(hires(forge), *OFF).pictures[0].tobytes()
    setattr(forge.shared.opts, name, value)
    assert forge.run(hires(forge), *OFF).pictures[0].tobytes() == usual


# -- models ------------------------------------------------------------------------------------------------------------

def button(host: Standin) -> Any:
    """The download button, found as the settings page is built."""
    made = sys.modules["gradio"].made  # type: ignore[attr-defined]
    made.clear()
    for name in ("setting_uplift_models_path", "setting_uplift_model"):
        host.call("on_after_component", object(), elem_id=name)
    assert [type(component).__name__ for component in made] == ["Button", "HTML"]
    return made[0].clicks[0]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, small_model: Path) -> Iterator[None]:
    """A hub that has the published file."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with HubStandIn.serving({f"UPLiFT-upsampler/uplift_sd1.5vae/{small_model.name}": small_model.read_bytes()}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        yield


def test_download_on_first_use_and_by_button(make_host: Callable[..., Standin], small_model: Path, tmp_path: Path,
                                             hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    host = make_host(FLAVOURS[3], with_model=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    result = host.run(hires(host), *OFF)
    target = tmp_path / "models" / "UPLiFT" / small_model.name
    assert not result.comments and result.pictures[0].size == (128, 128)
    assert target.read_bytes() == small_model.read_bytes()
    assert any("downloading" in text for text in result.state.texts) and result.state.textinfo is None
    assert "is there" in button(host)()
    target.unlink()
    assert "Downloaded to" in button(host)() and target.is_file()


def test_offline_is_said_in_words(make_host: Callable[..., Standin]) -> None:
    host = make_host(FLAVOURS[0], with_model=False)
    result = host.run(P(host), *ON)
    assert result.pictures[0].size == (64, 64)
    for text in (result.comments[0], button(host)()):
        assert "uplift_sd1.5vae.safetensors could not be downloaded" in text and "models/UPLiFT" in text
    assert host.callbacks and not host.errors


def test_models_of_the_users_own(host: Standin, small_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "mine.safetensors").write_bytes(small_model.read_bytes())
    (other / "notes.txt").write_text("not a model")
    host.shared.opts.uplift_models_path = str(other)
    info = host.shared.opts.labels["uplift_model"]
    assert info.component_args()["choices"] == ["sd15-vae", "mine.safetensors"]
    host.shared.opts.uplift_model = "mine.safetensors"
    result = host.run(P(host), *ON)
    assert result.pictures[0].size == (128, 128) and result.texts[0]["UPLiFT model"] == "mine.safetensors"


def test_models_that_do_not_fit(forge: Standin, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "UPLiFT"
    (folder / "broken.safetensors").write_bytes(b"nothing")
    for name, word in (("broken.safetensors", "broken.safetensors"), ("gone.safetensors", "is not in"),
                       ("uplift-mini", "32 channels")):
        forge.shared.opts.uplift_model = name
        result = forge.run(P(forge), *ON)
        assert result.pictures[0].size == (64, 64) and word in result.comments[0]


def test_a_changed_file_is_read_again(forge: Standin, small_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "models" / "UPLiFT" / "mine.safetensors"
    file.write_bytes(small_model.read_bytes())
    forge.shared.opts.uplift_model = file.name
    assert not forge.run(P(forge), *ON).comments
    file.write_bytes(b"broken")
    assert forge.run(P(forge), *ON).comments


def test_weights_are_no_inference_tensors(forge: Standin) -> None:
    """Those could not be moved or patched by the host later."""
    forge.run(hires(forge), *OFF)
    models = sys.modules["uplift_webui.models"]
    assert not any(value.is_inference() for value in models._kept.model.parameters())


# -- memory ------------------------------------------------------------------------------------------------------------

def test_a1111_decodes_in_tiles_where_memory_would_end(a1111: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    for p, args in ((hires(a1111, "UPLiFT 4x", hr_scale=4.0), OFF), (P(a1111), (True, "4x"))):
        whole = a1111.run(p, *args)
        a1111.sd_model.decoded.clear()
        with monkeypatch.context() as less:
            less.setattr("uplift_webui.pictures.TILES", (16, 8))
            less.setattr("uplift_webui.pictures.KLCodec.margin", 3)
            less.setattr("uplift_webui.pictures.KLCodec.blend", 2)
            less.setattr("uplift_webui.pictures.free_memory", lambda device: 100 << 20)
            tiled = a1111.run(p, *args)
        assert max(shape[2] for shape in a1111.sd_model.decoded) < 32 and not tiled.comments
        difference = torch.tensor(list(whole.pictures[0].tobytes())) - torch.tensor(list(tiled.pictures[0].tobytes()))
        assert whole.pictures[0].size == tiled.pictures[0].size == (256, 256) and difference.abs().max() <= 1


def test_a1111_goes_on_in_tiles_after_an_out_of_memory(a1111: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uplift_webui.pictures.TILES", (16, 8))
    real = a1111.sd_model.decode_first_stage

    def small_only(scaled: torch.Tensor) -> torch.Tensor:
        if scaled.shape[2] > 8:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return real(scaled)

    p = hires(a1111, hr_scale=1.5)  # a factor for which the picture is decoded by us
    monkeypatch.setattr(a1111.sd_model, "decode_first_stage", small_only)
    monkeypatch.setattr("uplift_webui.pictures.KLCodec.margin", 0)
    monkeypatch.setattr("uplift_webui.pictures.KLCodec.blend", 0)
    result = a1111.run(p, *OFF)
    assert result.pictures[0].size == (96, 96) and not result.comments


def test_without_tiles_and_out_of_memory_tiles_are_taken(forge: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    from uplift_webui import enlarge

    usual = forge.run(hires(forge), *OFF).pictures[0].tobytes()
    asked: list[Any] = []
    real = enlarge.upscale_latents

    def full(*args: Any, tile: Any, **named: Any) -> Any:
        asked.append(tile)
        if tile is None:
            raise enlarge.OutOfMemory("out of memory without tiles; choose tile 'auto'")
        return real(*args, tile=tile, **named)

    monkeypatch.setattr(enlarge, "upscale_latents", full)
    forge.shared.opts.uplift_tile = "off"
    result = forge.run(hires(forge), *OFF)
    assert asked == [None, "auto"] and result.pictures[0].tobytes() == usual and not result.comments


# -- wrappers ----------------------------------------------------------------------------------------------------------

def test_the_same_p_again_and_a_copy_of_it(host: Standin) -> None:
    """Scripts of the host run one job several times, or copy it: each is enlarged once."""
    import copy

    p = hires(host, denoising_strength=0.4)
    host.script.process(p, *OFF)
    twin = copy.copy(p)
    twin.second_pass_from, twin.seed, twin.extra_generation_params, twin.comments = [], 11, {}, {}
    host.run(p, *OFF)
    host.run(twin, *OFF)
    host.run(p, *OFF)
    assert len(p.second_pass_from) == 2 and len(twin.second_pass_from) == 1 and not host.errors
    assert torch.equal(p.second_pass_from[0].clone(), p.second_pass_from[1].clone())
    assert not torch.equal(p.second_pass_from[0].clone(), twin.second_pass_from[0].clone())
    assert "sample_hr_pass" not in vars(p)


def test_a_wrapper_of_another_extension_around_ours(host: Standin) -> None:
    plain = hires(host, denoising_strength=0.4)
    host.run(plain, *OFF)
    p = hires(host, denoising_strength=0.4)
    host.script.process(p, *OFF)
    ours = p.sample_hr_pass
    p.sample_hr_pass = lambda *args, **named: ours(*args, **named)  # type: ignore[method-assign]
    host.run(p, *OFF)  # ``process`` comes again
    assert len(p.second_pass_from) == 1 and not host.errors
    assert torch.equal(p.second_pass_from[0].clone(), plain.second_pass_from[0].clone())  # enlarged once


# -- install.py --------------------------------------------------------------------------------------------------------

def run_install(tmp_path: Path, launch: str, without: str = "") -> subprocess.CompletedProcess[str]:
    (tmp_path / "launch.py").write_text(launch)
    hide = (f"import importlib.util as u, sys; real = u.find_spec\n"
            f"u.find_spec = lambda n, *a: None if n == {without!r} else real(n, *a)\n"
            f"sys.path.insert(0, {str(tmp_path)!r})\nimport runpy; runpy.run_path({str(ROOT / 'install.py')!r})\n")
    return subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": ""})


def test_install_is_silent_when_all_is_there(tmp_path: Path) -> None:
    done = run_install(tmp_path, "raise AssertionError('not needed')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_install_brings_what_is_missing(tmp_path: Path) -> None:
    done = run_install(tmp_path, "def run_pip(*a): print('RUN', *a)", without="safetensors")
    assert done.returncode == 0 and done.stdout.startswith("RUN install safetensors ")


def test_install_offline(tmp_path: Path) -> None:
    done = run_install(tmp_path, "def run_pip(*a): raise RuntimeError('no network')", without="safetensors")
    assert done.returncode == 0 and "safetensors could not be installed" in done.stderr


def test_install_takes_no_heavy_package() -> None:
    text = (ROOT / "install.py").read_text()
    assert not [name for name in ("torch", "gradio", "numpy") if name in text]


def test_real_gradio_takes_the_panel() -> None:
    """With the Gradio that is installed here, in a process of its own."""
    pytest.importorskip("gradio")
    code = inspect.cleandoc(f"""
        import sys, types, json
        sys.path.insert(0, {str(ROOT)!r})
        import gradio as gr
        ui = types.ModuleType("modules.ui_components")
        class InputAccordion(gr.Accordion):
            def __init__(self, value, *, label, elem_id):
                super().__init__(label=label, open=value, elem_id=elem_id)
                self.value = value
        ui.InputAccordion = InputAccordion
        sys.modules["modules"], sys.modules["modules.ui_components"] = types.ModuleType("modules"), ui
        from uplift_webui import panel
        with gr.Blocks():
            controls, fields = panel.build(lambda name: name)
        print(json.dumps([c.value for c in controls]))
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [False, "2x", 1.0, True]


