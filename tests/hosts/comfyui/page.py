"""ComfyUI's page in a real browser."""

from __future__ import annotations

import os
import shutil
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
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=find_browser(), args=FLAGS)
        try:
            yield chromium
        finally:
            chromium.close()


def shots() -> Path | None:
    """Where screenshots are kept (UPLIFT_SHOTS), or None."""
    folder = os.environ.get("UPLIFT_SHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder) if folder else None


class Page:
    """A loaded page of a running ComfyUI. ``settings`` are those of ComfyUI's own dialog."""

    def __init__(self, chromium: Any, comfy: Any, size: tuple[int, int] = (1600, 900), **settings: Any):
        comfy.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False,
                                 "Comfy.Workflow.ShowMissingNodesWarning": True, "Comfy.Locale": "en",
                                 "Comfy.VueNodes.Enabled": False, "Comfy.Minimap.Visible": False,
                                 **{f"Comfy.{name.replace('_', '.')}": value for name, value in settings.items()}})
        self.faults: list[str] = []
        self.front = comfy.front
        self.tab = chromium.new_page(viewport={"width": size[0], "height": size[1]})
        self.tab.on("pageerror", lambda error: self.faults.append(str(error)))
        self.tab.goto(comfy.url)
        self.wait("window.app && window.app.graph && window.app.extensionManager")
        self.tab.wait_for_timeout(1500)

    def wait(self, condition: str, seconds: float = 60) -> None:
        self.tab.wait_for_function(f"!!({condition})", timeout=seconds * 1000)

    def open_template(self, pack: str, name: str) -> None:
        """As a user does: Templates, the pack below Extensions, the workflow's card."""
        self.tab.get_by_text("Templates", exact=True).first.click()
        self.tab.get_by_text(pack, exact=True).click()
        self.tab.wait_for_timeout(1500)
        self.shot("templates")
        self.tab.get_by_text(name, exact=True).first.click()
        self.wait("app.graph._nodes.some(node => node.type.startsWith('UPLiFT'))")
        self.fit()

    def load(self, workflow: dict[str, Any]) -> None:
        self.tab.evaluate("graph => window.app.loadGraphData(graph)", workflow)
        self.tab.wait_for_timeout(800)
        self.fit()

    def fit(self) -> None:
        """The whole graph into view, as the key "." does."""
        self.tab.mouse.click(self.tab.viewport_size["width"] // 2, self.tab.viewport_size["height"] - 60)
        self.tab.keyboard.press(".")
        self.tab.wait_for_timeout(800)

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

    def shot(self, name: str) -> bytes:
        """A screenshot, also kept below UPLIFT_SHOTS."""
        folder = shots()
        return self.tab.screenshot(**({"path": str(folder / f"{name} ({self.front}).png")} if folder else {}))

    def close(self) -> None:
        self.tab.close()
