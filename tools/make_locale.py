"""Writes locales/en/nodeDefs.json, what ComfyUI's page shows, from the nodes of a running ComfyUI.

    python tools/make_locale.py http://127.0.0.1:8188
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def texts(info: dict[str, Any]) -> dict[str, Any]:
    """``/object_info`` to the texts of our nodes, in the form of a nodeDefs.json."""
    result = {}
    for name, node in info.items():
        if not name.startswith("UPLiFT"):
            continue
        entry: dict[str, Any] = {"display_name": node["display_name"], "description": node["description"]}
        inputs = {option: {"name": option, "tooltip": spec[1].get("tooltip", "")}
                  for kind in ("required", "optional") for option, spec in node["input"].get(kind, {}).items()}
        if inputs:
            entry["inputs"] = inputs
        tooltips = node.get("output_tooltips") or [None] * len(node["output_name"])
        entry["outputs"] = {str(i): {"name": shown, **({"tooltip": tip} if tip else {})}
                            for i, (shown, tip) in enumerate(zip(node["output_name"], tooltips))}
        result[name] = entry
    return result


if __name__ == "__main__":
    with urllib.request.urlopen(sys.argv[1].rstrip("/") + "/object_info") as answer:
        found = texts(json.load(answer))
    target = ROOT / "locales/en/nodeDefs.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print(target, len(found), "nodes")
