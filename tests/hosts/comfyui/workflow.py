"""Workflows as the page saves them, turned into what ``/prompt`` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hosts.comfyui.comfy_host import ROOT

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOTES = ("Note", "MarkdownNote")


def to_api(path: Path, info: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A workflow in API format; ``changes`` replaces values of widgets wherever an input has that name."""
    workflow = json.loads(path.read_text())
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    result = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        values, inputs = list(node["widgets_values"]), {}
        for kind in ("required", "optional"):
            for name, (kind_of, *more) in info[node["type"]]["input"].get(kind, {}).items():
                if not (isinstance(kind_of, list) or kind_of in WIDGETS):
                    continue
                options = more[0] if more else {}
                saved = values.pop(0) if values else options["default"]
                inputs[name] = changes.get(name, saved)
                if options.get("control_after_generate") and values:
                    values.pop(0)
        inputs |= {entry["name"]: links[entry["link"]] for entry in node["inputs"] if entry["link"]}
        result[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return result
