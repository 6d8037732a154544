"""Networks of others: found in torch.hub's folder or installed, called as their own code wants it, never in a host's
way."""

import importlib
import shutil
import sys
import types

import pytest
import torch

from uplift_core.errors import DownloadError, InputError, UpliftError
from uplift_core.peers import PEERS, Features, folder_of, installed, load_peer

NEAREST = "torch.nn.functional.interpolate({}, size={}, mode='nearest')"
HUB = """import torch
class Up(torch.nn.Module):
    def forward(self, {arguments}):
        return {result}
def {entry}(pretrained=True):
    up = Up()
    up.pretrained = pretrained
    return up
"""
JAFAR = {
    "utils/img.py": "def create_coordinate(h, w, device='cuda'):\n    import torch\n"
                    "    return torch.zeros(h, w, device=device)\n",
    "src/upsampler/__init__.py": "from .jafar import JAFAR\n",
    "src/upsampler/jafar.py": "import torch\nfrom utils.img import create_coordinate\nclass JAFAR(torch.nn.Module):\n"
                              "    def __init__(self, v_dim):\n        super().__init__()\n"
                              "        self.scale = torch.nn.Parameter(torch.ones(v_dim, 1, 1))\n"
                              "    def forward(self, image, low, size):\n"
                              "        create_coordinate(3, 4)\n"
                              f"        return self.scale * {NEAREST.format('low', 'size')}\n"}
LIFT = {"lift.py": "import torch\nclass LiFT(torch.nn.Module):\n"
                   "    def __init__(self, channels, patch, pre_shape, post_shape):\n        super().__init__()\n"
                   "        self.patch_size, self.gain = patch, torch.nn.Parameter(torch.ones(1))\n"
                   "        assert not pre_shape and not post_shape\n"
                   "    def forward(self, image, low):\n"
                   "        assert tuple(image.shape[2:]) == tuple(n * self.patch_size for n in low.shape[2:])\n"
                   "        return self.gain * low.repeat_interleave(2, 2).repeat_interleave(2, 3)\n"}
FEATUP = {"featup/__init__.py": "", "featup/upsamplers.py":
          "import torch\nclass Stack(torch.nn.Module):\n    def forward(self, low, guide):\n"
          f"        return {NEAREST.format('low', 'guide.shape[2:]')}\n"
          "def get_upsampler(kind, dim):\n    assert (kind, dim) == ('jbu_stack', 384)\n    return Stack()\n"}
FILES = {
    "anyup": {"hubconf.py": HUB.format(arguments="image, low, size", entry="anyup",
                                       result=NEAREST.format("low", "size"))},
    "loftup": {"hubconf.py": HUB.format(arguments="low, image", entry="loftup_dinov2s",
                                        result=NEAREST.format("low", "image.shape[2:]"))},
    "jafar": JAFAR, "lift": LIFT, "featup": FEATUP,
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A folder of torch.hub with stand-ins that have the real repositories' files, names and argument orders."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for name, files in FILES.items():
        for file, text in files.items():
            path = tmp_path / f"{PEERS[name].repository.replace('/', '_')}_main" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return tmp_path


PACKAGES = {
    "anyup": {"anyup/__init__.py": "", "anyup/model.py":
              "import torch\nclass AnyUp(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
              "        self.gain = torch.nn.Parameter(torch.ones(1))\n"
              "    def forward(self, image, low, size):\n"
              f"        return self.gain * {NEAREST.format('low', 'size')}\n"},
    "featup": {"featup/__init__.py": "", "featup/upsamplers.py":
               "import torch\nclass Stack(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
               "        self.gain = torch.nn.Parameter(torch.ones(1))\n    def forward(self, low, guide):\n"
               f"        return self.gain * {NEAREST.format('low', 'guide.shape[2:]')}\n"
               "def get_upsampler(kind, dim):\n    assert (kind, dim) == ('jbu_stack', 384)\n    return Stack()\n",
               "featup/layers.py":
               "from torch.nn import LayerNorm, Module\nclass ChannelNorm(Module):\n    def __init__(self, dim):\n"
               "        super().__init__()\n        self.norm = LayerNorm(dim)\n"
               "    def forward(self, x):\n"
               "        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)\n"},
}


@pytest.fixture(params=PACKAGES)
def package(request, monkeypatch, tmp_path):
    """The name of a peer of which a stand-in is installed, its modules named as the real ones; no copies in torch.hub's
    folder, and no network."""
    site, name = tmp_path / "site-packages", request.param
    for file, text in PACKAGES[name].items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(text)

    def out_of_reach(address, path, **options):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", out_of_reach)
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    yield name
    for key in [key for key in sys.modules if key.split(".")[0] in PACKAGES]:
        del sys.modules[key]


def test_an_installed_package_is_found_and_called(package, tmp_path):
    low, guide = torch.rand(1, 384, 3, 2), torch.rand(1, 3, 42, 28)
    assert installed() == [package] and folder_of(package) == tmp_path / "site-packages" / package
    features = Features(384, 14, "vit_small_patch14_dinov2.lvd142m")
    network = load_peer(package, features, weights=False)
    nearest = torch.nn.functional.interpolate(low, size=(42, 28), mode="nearest")
    assert torch.equal(PEERS[package].call(network, guide, low, (42, 28)), nearest)
    with pytest.raises(DownloadError, match=r"downloaded \(no route\).*https://.*put it into .*checkpoints"):
        load_peer(package, features)
    gain = torch.full((1,), 2.0)
    file, state = {"anyup": ("anyup_paper.pth", {"gain": gain}), "featup": ("dinov2_jbu_stack_cocostuff.ckpt", {
        "state_dict": {"model.0.backbone": gain, "model.1.norm.weight": torch.ones(384), "scale_net.x": gain,
                       "model.1.norm.bias": torch.zeros(384), "upsampler.gain": gain}})}[package]
    torch.save(state, tmp_path / "hub" / "checkpoints" / file)
    normed = torch.nn.functional.layer_norm(nearest.movedim(1, 3), (384,)).movedim(3, 1)
    found = PEERS[package].call(load_peer(package, features), guide, low, (42, 28))
    assert torch.allclose(found, 2 * (normed if package == "featup" else nearest), atol=1e-5)


def test_a_copy_in_torch_hubs_folder_comes_before_the_package(package, tmp_path):
    copy = tmp_path / "hub" / f"{PEERS[package].repository.replace('/', '_')}_main"
    copy.mkdir(parents=True)
    assert folder_of(package) == copy


def test_a_folder_of_a_packages_name_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "anyup" / "docs").mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UpliftError, match="no installed package anyup.*git clone"):
        folder_of("anyup")


@pytest.mark.parametrize("name", FILES)
def test_a_peer_is_called_as_its_own_code_wants_it(hub, name):
    low, guide = torch.rand(1, 384, 3, 2), torch.rand(1, 3, 48, 32)
    network = load_peer(name, Features(384, 16), weights=False)
    expected = torch.nn.functional.interpolate(low, size=(48, 32), mode="nearest")
    assert torch.equal(PEERS[name].call(network, guide, low, (48, 32)), expected)
    assert getattr(network, "pretrained", False) is False
    assert name in installed()


def test_own_modules_of_a_peers_names_stay(hub, monkeypatch):
    mine = types.ModuleType("utils")
    monkeypatch.setitem(sys.modules, "utils", mine)
    load_peer("jafar", Features(384, 16), weights=False)
    assert sys.modules["utils"] is mine
    assert not {"src", "src.upsampler", "utils.img"} & sys.modules.keys()
    assert not any(str(hub) in path for path in sys.path)


def test_weights_of_a_peer_are_read_or_asked_for(hub):
    features = Features(384, 14, "vit_small_patch14_dinov2.lvd142m")
    with pytest.raises(InputError, match=r"vit_small_patch14_dinov2.lvd142m.pth.*github.com/PaulCouairon/JAFAR"):
        load_peer("jafar", features)
    (hub / "checkpoints").mkdir()
    torch.save({"jafar": {"scale": torch.full((384, 1, 1), 3.0)}},
               hub / "checkpoints" / "vit_small_patch14_dinov2.lvd142m.pth")
    network = load_peer("jafar", features)
    enlarged = network(torch.rand(1, 3, 8, 8), torch.ones(1, 384, 1, 1), (2, 2))
    assert torch.equal(enlarged, torch.full((1, 384, 2, 2), 3.0))
    pretrained = hub / "saksham-s_lift_main" / "pretrained"
    pretrained.mkdir()
    torch.save({"module.gain": torch.full((1,), 2.0)}, pretrained / "lift_dino_vits16.pth")
    assert load_peer("lift", Features(384, 16)).gain.item() == 2


@pytest.mark.parametrize(("name", "features", "says"), [
    ("loftup", Features(384, 16, "vit_small_patch16_dinov3"), "DINOv2"), ("loftup", Features(100, 16), "100 channels"),
    ("lift", Features(384, 14), "patches of 8 and 16")])
def test_features_a_peer_has_no_network_for(hub, name, features, says):
    with pytest.raises(InputError, match=says):
        load_peer(name, features)


def test_a_peer_that_is_not_here_or_is_broken(hub):
    shutil.rmtree(folder_of("featup"))
    with pytest.raises(UpliftError, match="git clone https://github.com/mhamilton723/FeatUp"):
        folder_of("featup")
    (folder_of("anyup") / "hubconf.py").write_text("1 / 0\n")
    with pytest.raises(UpliftError, match="cannot be loaded .ZeroDivisionError"):
        load_peer("anyup", Features(384, 16))


def test_offline_no_weights_are_downloaded(monkeypatch, package):
    asked = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *given, **more: asked.append(given))
    with pytest.raises(DownloadError, match="nothing is downloaded offline"):
        load_peer(package, Features(384, 14, "vit_small_patch14_dinov2.lvd142m"), offline=True)
    assert not asked
