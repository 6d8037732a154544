"""What a user sees in ComfyUI's page, in a real Chromium."""

from __future__ import annotations

import json

import pytest

from hosts.comfyui.comfy_host import ComfyHost
from hosts.comfyui.conftest import PACK
from hosts.comfyui.page import Page, browser
from hosts.comfyui.workflow import WORKFLOWS

pytestmark = pytest.mark.slow

OFFLINE = next(path for path in WORKFLOWS if "Offline" in path.stem)


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
    page.load(json.loads(OFFLINE.read_text()))
    page.shot("chinese")
    assert page.tab.evaluate("app.graph._nodes.map(n => n.title)").count("UPLiFT \u56fe\u50cf\u653e\u5927") == 1


@pytest.mark.parametrize("page", [{"VueNodes_Enabled": True}], indirect=True)
def test_new_style_of_nodes(page):
    page.load(json.loads(OFFLINE.read_text()))
    page.tab.wait_for_timeout(1500)
    page.shot("vue")
    assert page.tab.get_by_text("UPLiFT Upscale Image").count() >= 1
    page.run()
    page.wait("[...document.images].some(image => image.src.includes('uplift_offline') && image.naturalWidth)", 60)
    page.shot("vue_done")
    assert page.faults == []


def points_graph():
    """Photo, features, mask, saved: as the page would save it."""
    def node(number, kind, at, inputs=(), outputs=(), values=()):
        return {"id": number, "type": kind, "pos": list(at), "size": [320, 180], "flags": {}, "order": number,
                "mode": 0, "inputs": [{"name": name, "type": of, "link": link} for name, of, link in inputs],
                "outputs": [{"name": of, "type": of, "links": links} for of, links in outputs], "properties": {},
                "widgets_values": list(values)}

    mask = node(4, "UPLiFTFeatureMask", (760, 0), [("features", "UPLIFT_FEATURES", 3)], [("MASK", []), ("IMAGE", [4])],
                ["[]", 0.6, 0.1])
    mask["size"] = [420, 560]
    nodes = [node(1, "UPLiFTSamplePhoto", (0, 0), [], [("IMAGE", [1])], ["astronaut"]),
             node(2, "UPLiFTModelLoader", (0, 260), [], [("UPLIFT_MODEL", [2])], ["vit_tiny.safetensors", "auto"]),
             node(3, "UPLiFTDenseFeatures", (380, 0), [("image", "IMAGE", 1), ("model", "UPLIFT_MODEL", 2)],
                  [("UPLIFT_FEATURES", [3]), ("IMAGE", [])], ["vit_tiny_patch16_224.safetensors", 64, "pixel", "auto"]),
             mask, node(5, "PreviewImage", (1220, 0), [("images", "IMAGE", 4)])]
    links = [[1, 1, 0, 3, 0, "IMAGE"], [2, 2, 0, 3, 1, "UPLIFT_MODEL"], [3, 3, 0, 4, 0, "UPLIFT_FEATURES"],
             [4, 4, 1, 5, 0, "IMAGE"]]
    return {"last_node_id": 5, "last_link_id": 4, "nodes": nodes, "links": links, "groups": [], "config": {},
            "extra": {}, "version": 0.4}


@pytest.mark.parametrize("page", [{}, {"VueNodes_Enabled": True}, {"ColorPalette": "light"}], indirect=True,
                         ids=["classic", "vue", "light"])
def test_points_are_set_by_clicking(page, server):
    """Click, unwanted, drag, double click, keyboard; a click re-runs the mask alone; the points are saved."""
    if server.front == "old" and page.settings.get("VueNodes_Enabled"):
        pytest.skip("the new nodes of that year are tried in the newer page")
    page.load(points_graph())
    mask = "app.graph._nodes.find(n => n.type === 'UPLiFTFeatureMask')"
    page.run()
    page.wait(f"{mask}.upliftPoints.image", 90)
    canvas = page.tab.locator(".uplift-points canvas")
    box = None
    while box != (box := canvas.bounding_box()):  # the page is still arranging itself on a busy machine
        page.tab.wait_for_timeout(1000)

    def points():
        return json.loads(page.tab.evaluate(f"{mask}.widgets.find(w => w.name === 'points').value"))

    def spot(x, y):  # picture pixels of the 256x256 photo to the page
        box = canvas.bounding_box()
        scale = min(box["width"], box["height"]) / 256
        return (box["x"] + (box["width"] - 256 * scale) / 2 + (x + 0.5) * scale,
                box["y"] + (box["height"] - 256 * scale) / 2 + (y + 0.5) * scale)

    def near(point, x, y, label):
        assert abs(point["x"] - x) <= 2 and abs(point["y"] - y) <= 2 and point["label"] == label, point

    mouse = page.tab.mouse
    mouse.click(*spot(100, 60))
    mouse.click(*spot(30, 200), button="right")
    page.tab.keyboard.down("Shift")
    mouse.click(*spot(220, 40))
    page.tab.keyboard.up("Shift")
    assert len(points()) == 3
    for point, wanted in zip(points(), [(100, 60, 1), (30, 200, 0), (220, 40, 0)]):
        near(point, *wanted)
    mouse.move(*spot(100, 60))
    mouse.down()
    mouse.move(*spot(120, 100), steps=4)
    mouse.up()
    near(points()[0], 120, 100, 1)
    mouse.dblclick(*spot(220, 40))
    assert len(points()) == 2
    page.tab.locator(".uplift-points").focus()
    for key in ("ArrowLeft", "ArrowUp", "Enter"):
        page.tab.keyboard.press(key)
    near(points()[2], 123, 123, 1)
    page.tab.keyboard.press("Delete")
    assert len(points()) == 2

    page.tab.evaluate("""() => { window.ran = [];
        app.api.addEventListener('executing', e => e.detail && ran.push(String(e.detail.node ?? e.detail))); }""")
    page.run()
    page.wait("ran.includes('4') && ran.includes('5')", 60)
    assert "3" not in page.tab.evaluate("ran")
    page.tab.wait_for_timeout(1500)
    if page.settings.get("ColorPalette") == "light":  # text that can be read on its ground
        shade = """(e, what) => getComputedStyle(e)[what].match(/[0-9.]+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"""
        box = page.tab.locator(".uplift-points")
        text, ground = (box.evaluate(shade, what) for what in ("color", "backgroundColor"))
        assert ground > 450 and ground - text > 300
    page.shot("points " + (" ".join(map(str, page.settings.values())) or "classic"))
    kept = page.tab.evaluate("app.graph.serialize().nodes.find(n => n.type === 'UPLiFTFeatureMask').widgets_values")
    assert json.loads(kept[0]) == points()
    page.load(page.tab.evaluate("app.graph.serialize()"))
    assert len(points()) == 2
    assert page.faults == []
