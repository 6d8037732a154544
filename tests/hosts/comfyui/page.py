"""ComfyUI's page in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


def find_browser() -> str:
    """An installed Chromium; skips when there is none."""
    named = os.environ.get("UPLIFT_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.skip("no Chromium on this machine: apt install chromium, or name one in UPLIFT_CHROMIUM")
    return found


@contextmanager
def browser(width: int = 1600, height: int = 900) -> Iterator[Any]:
    """A context in which pages share what they have loaded."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=find_browser(), args=FLAGS)
        try:
            yield chromium.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce")
        finally:
            chromium.close()


def shots() -> Path | None:
    """Where screenshots are kept (UPLIFT_SHOTS), or None."""
    folder = os.environ.get("UPLIFT_SHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder) if folder else None


SETTINGS = {"TutorialCompleted": True, "Workflow.ShowMissingModelsWarning": False,
            "Workflow.ShowMissingNodesWarning": True, "Locale": "en", "VueNodes.Enabled": False, "ColorPalette": "dark",
            "Minimap.Visible": False}

STILL = """([calm, seconds]) => new Promise((done, fail) => {
    const start = performance.now();
    let last = '', since = start, frames = 0;
    const look = (now) => {
        const boxes = [...document.querySelectorAll('[data-node-id], .uplift-points, .p-dialog')]
            .map(e => Object.values(e.getBoundingClientRect().toJSON()));
        const seen = JSON.stringify([app.canvas.ds.offset, app.canvas.ds.scale, boxes,
                                     app.graph._nodes.map(n => [...n.pos, ...n.size])]);
        if (seen !== last) [last, since, frames] = [seen, now, 0];
        if (++frames > 3 && now - since >= calm) done();
        else if (now - start > seconds * 1000) fail(new Error('the page does not come to rest'));
        else requestAnimationFrame(look);
    };
    requestAnimationFrame(look);
})"""
"""Resolves when nothing on the graph has moved for ``calm`` milliseconds."""


class Page:
    """A loaded page of a running ComfyUI. ``settings`` are those of ComfyUI's own dialog."""

    def __init__(self, context: Any, url: str, front: str = "", **settings: Any):
        self.context, self.url, self.front, self.faults, self.tab = context, url, front, [], None
        self.settings: dict[str, Any] = {}
        self.set(**settings)

    def set(self, **settings: Any) -> None:
        """These settings and the usual ones for the rest. The page is loaded anew only for another language."""
        asked = {f"Comfy.{name}": value for name, value in
                 (SETTINGS | {name.replace("_", "."): value for name, value in settings.items()}).items()}
        before = self.settings
        self.settings = asked
        self.faults.clear()
        if before.get("Comfy.Locale") != asked["Comfy.Locale"]:
            self._open()
        else:
            self.tab.evaluate("""async settings => { for (const [name, value] of Object.entries(settings))
                                     await app.extensionManager.setting.set(name, value);
                                 app.extensionManager.toast.removeAll?.();
                                 app.extensionManager.sidebarTab.activeSidebarTabId = null; }""",
                              {name: value for name, value in asked.items() if before.get(name) != value})

    def _open(self) -> None:
        request = urllib.request.Request(f"{self.url}/settings", json.dumps(self.settings).encode(),
                                         {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=60).close()
        if self.tab:
            self.tab.close()
        self.tab = self.context.new_page()
        self.tab.on("pageerror", lambda error: self.faults.append(str(error)))
        self.tab.goto(self.url, timeout=90_000)  # the first on a busy machine
        self.wait("window.app?.graph && app.extensionManager?.workflow?.activeWorkflow")
        self.still()

    def wait(self, condition: str, seconds: float = 60) -> None:
        self.tab.wait_for_function(f"!!({condition})", timeout=seconds * 1000)

    def still(self, calm: float = 250) -> None:
        self.tab.evaluate(STILL, [calm, 60])

    def open_template(self, pack: str, name: str) -> None:
        """As a user does: Templates, the pack below Extensions, the workflow's card."""
        self.tab.get_by_text("Templates", exact=True).first.click()
        self.tab.get_by_text(pack, exact=True).click()
        card = self.tab.get_by_text(name, exact=True).first
        card.wait_for()
        self.shot("templates")
        card.click()
        self.wait("app.graph._nodes.some(node => node.type.startsWith('UPLiFT'))")
        self.fit()

    def load(self, workflow: dict[str, Any]) -> None:
        self.tab.evaluate("graph => window.app.loadGraphData(graph)", workflow)
        self.still()
        self.fit()

    def fit(self) -> None:
        """The whole graph into view, as the key "." does."""
        self.tab.mouse.click(self.tab.viewport_size["width"] // 2, self.tab.viewport_size["height"] - 60)
        self.tab.keyboard.press(".")
        self.still()

    def run(self) -> None:
        self.tab.get_by_test_id("queue-button").or_(self.tab.get_by_text("Run", exact=True)).first.click()

    def place_of(self, kind: str, x: float = 0.5, y: float = -15) -> tuple[float, float]:
        """Where on the page a node of that class is; x a share of its width, y in graph units from its top."""
        return tuple(self.tab.evaluate(
            """([kind, x, y]) => { const node = app.graph._nodes.find(n => n.type === kind);
               const box = app.canvas.canvas.getBoundingClientRect();
               const [a, b] = app.canvas.ds.convertOffsetToCanvas(
                   [node.pos[0] + x * node.size[0], node.pos[1] + y]);
               return [a + box.left, b + box.top]; }""", [kind, x, y]))

    def shot(self, name: str) -> None:
        """A screenshot below UPLIFT_SHOTS, if that is set."""
        folder = shots()
        if folder:
            self.tab.screenshot(path=str(folder / f"{name} ({self.front}).png"))

    def close(self) -> None:
        self.tab.close()
