"""Features in a file are used with memory that does not grow with the file."""

import json
import subprocess
import sys

import pytest
import torch

from uplift_core import DenseFeatures

SIDE, CHANNELS = 2048, 32
ALLOWED = 100 << 20  # the largest result, a picture of three floats a pixel, takes half of it; the file has 268 MB

# in a process of its own: in one that has run other tests, a new block may come from memory that is already there
USES = """
import json, sys, torch
from uplift_core import DenseFeatures, load_features
from uplift_core.features import correspondences, feature_mask, fit_pca, segment_picture, segments, similarity
from uplift_core.measure import AnonymousPeak

torch.set_num_threads(1)
uses = {
    "pca": lambda found, out: fit_pca(found).picture(found),
    "similarity": lambda found, out: feature_mask(similarity(found, [(3, 3)], [(9, 9)], centre=True),
                                                  found.image_size),
    "segments": lambda found, out: segments(found, 5, clean=1),
    "colours": lambda found, out: segment_picture(torch.zeros(found.shape[1:], dtype=torch.int64), found.image_size),
    "matches": lambda found, out: correspondences(found, found, [(3, 3), (60, 50)]),
    "export": lambda found, out: found.save(out),
}
small, large = DenseFeatures(torch.rand(32, 64, 64), (64, 64), 1.0), load_features(sys.argv[1])
grown = {}
for name, use in uses.items():
    use(small, "small.npy")  # what torch itself needs for it the first time
    with AnonymousPeak() as peak:
        use(large, "large.safetensors")
    grown[name] = peak.grown
print(json.dumps(grown))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the anonymous memory of a process")
def test_what_is_done_with_features_in_a_file_takes_little_memory(tmp_path):
    row = torch.rand(CHANNELS, 1, SIDE, generator=torch.Generator().manual_seed(0)).half()
    DenseFeatures(row.expand(-1, SIDE, -1), (SIDE, SIDE), 1.0).save(tmp_path / "f.npy")
    assert (tmp_path / "f.npy").stat().st_size > 2 * ALLOWED
    done = subprocess.run([sys.executable, "-c", USES, "f.npy"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    assert len(grown) == 6 and all(n < ALLOWED for n in grown.values()), {k: n >> 20 for k, n in grown.items()}
    assert grown["pca"] > 12 * SIDE * SIDE  # the picture itself: what is measured is there
    assert (tmp_path / "large.safetensors").stat().st_size > 2 * ALLOWED
