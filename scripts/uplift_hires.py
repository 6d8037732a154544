"""What the WebUI loads, by path, at every start and every reload: hands each hook on to ``uplift_webui``."""

import sys
from pathlib import Path

from modules import script_callbacks, scripts

_ROOTS = {scripts.basedir(), str(Path(__file__).resolve().parents[1])}


def _leave_the_path(*_):
    """Some hosts keep this folder on sys.path for good, where ``nodes`` and ``tests`` would hide those of others."""
    sys.path[:] = [entry for entry in sys.path if entry not in _ROOTS]


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
try:
    from uplift_webui import hires, hooks, hosts, panel, settings
finally:
    _leave_the_path()

HOST = hosts.pick()
hires.register(HOST.shared.latent_upscale_modes)


class UpliftScript(scripts.Script):
    def title(self):
        return panel.TITLE

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        controls, self.infotext_fields = panel.build(self.elem_id)
        return controls

    def process(self, p, *args):
        hooks.process(HOST, p, args)

    def process_batch(self, p, *args, **kwargs):
        hooks.process_batch(p)

    def post_sample(self, p, ps, *args):
        hooks.post_sample(p, ps)

    def postprocess_batch(self, p, *args, images=None, **kwargs):
        hooks.postprocess_batch(p, images)

    def postprocess(self, p, processed, *args):
        hooks.postprocess(p)


script_callbacks.on_before_ui(_leave_the_path)
script_callbacks.on_ui_settings(lambda: settings.register(HOST))
script_callbacks.on_after_component(
    lambda component, **kwargs: settings.add_button(HOST, component, kwargs.get("elem_id")))
