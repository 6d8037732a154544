"""What a user sees in ComfyUI's page, in a real Chromium."""

from __future__ import annotations

import json

import pytest

from hosts.comfyui.comfy_host import ComfyHost
from hosts.comfyui.conftest import PACK
from hosts.comfyui.page import Page, browser
from hosts.comfyui.workflow import WORKFLOWS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chromium():
    with browser() as running:
        yield running


@pytest.fixture(scope="module", params=["old", "new"])
def server(request, comfy, comfy_home, base):
    """The page that came with this ComfyUI, and a year newer one."""
    if request.param == "old":
        comfy.front = "old"
        yield comfy
        return
    host = ComfyHost(base, comfy_home, "--front-end-root", str(comfy_home / "newer_page"))
    host.front = "new"
    yield host
    host.close()


@pytest.fixture
def page(chromium, server, request):
    opened = Page(chromium, server, **getattr(request, "param", {}))
    yield opened
    opened.close()


def test_template_runs_offline_to_a_picture(page):
    """The workflow without downloads, from the list of templates to the saved picture in its node."""
    page.open_template(PACK, "UPLiFT 5 Offline photo 2x")
    page.run()
    page.wait("app.graph._nodes.find(n => n.type === 'SaveImage').imgs?.[0]?.naturalWidth === 902", 60)
    page.tab.wait_for_timeout(500)
    page.shot("offline")
    assert page.faults == []


def test_workflows_load_as_written(page):
    """No missing node, and the page's own API form of the graph has every value where it belongs."""
    for path in WORKFLOWS:
        written = json.loads(path.read_text())
        page.load(written)
        page.shot(path.stem)
        prompt = page.tab.evaluate("async () => (await app.graphToPrompt()).output")
        kinds = sorted(node["type"] for node in written["nodes"] if node["type"] != "MarkdownNote")
        assert sorted(node["class_type"] for node in prompt.values()) == kinds
        assert page.tab.evaluate("app.graph._nodes.every(n => LiteGraph.registered_node_types[n.type])")
        for node in prompt.values():
            inputs = node["inputs"]
            if node["class_type"] == "UPLiFTLatentUpscale":
                assert [inputs[name] for name in ("scale", "seed", "noise_strength", "tile")] == ["2x", 0, 1, "auto"]
            if node["class_type"] == "UPLiFTImageUpscale":
                assert (inputs["color_fix"], inputs["consistency"]) == ("mean", True)


def test_help_page_of_a_node(page):
    page.load(json.loads(WORKFLOWS[0].read_text()))
    page.tab.mouse.click(*page.place_of("UPLiFTLatentUpscale"))
    page.tab.wait_for_timeout(600)
    page.tab.locator("[data-testid=info-button], button:has([class*=lucide--info])").first.click()
    page.tab.get_by_text("Tiles leave no seams").wait_for(timeout=15000)
    page.shot("help")


@pytest.mark.parametrize("page", [{"Locale": "zh"}], indirect=True)
def test_texts_in_chinese(page, server):
    if server.front == "old":
        pytest.skip("pages before December 2025 drop the texts of node packs in other languages than English")
    page.load(json.loads(WORKFLOWS[-1].read_text()))
    page.shot("chinese")
    assert page.tab.evaluate("app.graph._nodes.map(n => n.title)").count("UPLiFT 图像放大") == 1


@pytest.mark.parametrize("page", [{"VueNodes_Enabled": True}], indirect=True)
def test_new_style_of_nodes(page):
    page.load(json.loads(WORKFLOWS[-1].read_text()))
    page.tab.wait_for_timeout(1500)
    page.shot("vue")
    assert page.tab.get_by_text("UPLiFT Upscale Image").count() >= 1
    page.run()
    page.wait("[...document.images].some(image => image.src.includes('uplift_offline') && image.naturalWidth)", 60)
    page.shot("vue_done")
    assert page.faults == []
