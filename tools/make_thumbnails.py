"""Writes workflows/*.jpg: the graphs as ComfyUI's page draws them; the one that needs no download with its result.

    python tools/make_thumbnails.py http://127.0.0.1:8188 [PART OF A NAME]

Needs a running ComfyUI with this pack, `pip install playwright` and Chromium.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
MARGIN, WIDTH = 30, 960


def main(url: str, named: str = "") -> None:
    from hosts.comfyui.page import Page, browser

    with browser(2600, 1100) as context:
        page = Page(context, url.rstrip("/"), NodeBadge_NodeSourceBadgeMode="None", LinkRenderMode=2)
        for path in sorted((ROOT / "workflows").glob(f"*{named}*.json")):
            page.load(json.loads(path.read_text()))
            if "Offline" in path.stem:
                page.run()
                page.wait("app.graph._nodes.find(n => n.type === 'SaveImage').imgs?.[0]?.naturalWidth")
                page.tab.wait_for_timeout(2500)  # the progress bar goes away
            left, top, right, bottom = page.tab.evaluate("""() => {
                const box = app.canvas.canvas.getBoundingClientRect(), nodes = app.graph._nodes;
                const place = (x, y) => { const p = app.canvas.ds.convertOffsetToCanvas([x, y]);
                                          return [p[0] + box.left, p[1] + box.top]; };
                return [...place(Math.min(...nodes.map(n => n.pos[0])), Math.min(...nodes.map(n => n.pos[1] - 30))),
                        ...place(Math.max(...nodes.map(n => n.pos[0] + n.size[0])),
                                 Math.max(...nodes.map(n => n.pos[1] + n.size[1])))]; }""")
            shot = Image.open(io.BytesIO(page.tab.screenshot())).convert("RGB")
            part = shot.crop((max(0, int(left) - MARGIN), max(0, int(top) - MARGIN), int(right) + MARGIN,
                              int(bottom) + MARGIN))
            part.resize((WIDTH, round(part.height * WIDTH / part.width)), Image.Resampling.LANCZOS).save(
                path.with_suffix(".jpg"), quality=82, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
