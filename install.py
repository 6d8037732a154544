"""Run by the WebUI at every start: brings the few small packages that are missing. Quick, and silent when all is
there; without a network it says what is missing and goes on."""

import importlib.util
import sys

NEEDED = {"safetensors": "safetensors", "huggingface_hub": "huggingface_hub", "PIL": "pillow"}

missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
if missing:
    try:
        import launch

        launch.run_pip(f"install {' '.join(missing)}", f"UPLiFT: {', '.join(missing)}")
    except Exception as error:  # offline, say: the WebUI must start all the same
        sys.stderr.write(f"UPLiFT: {', '.join(missing)} could not be installed ({error}). Install by hand: "
                         f"pip install {' '.join(missing)}\n")
