"""The oldest versions that pyproject.toml allows, of what reads files that others made.

Run with ``pip install --no-deps --target FOLDER timm==1.0.22`` and ``CEGATE_OLDEST=FOLDER``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
FLOOR = re.search(r'"timm>=([0-9.]+)', PYPROJECT.read_text())[1]

PROGRAM = """
import pickle, sys
from pathlib import Path

import timm, torch

assert timm.__version__ == sys.argv[1], timm.__version__
folder = Path(sys.argv[2])

import cegate
from cegate.adapter_folder import save_adapter
from cegate.backbone.vit import weight_hash
from cegate.errors import BackboneError


class Planted:
    def __reduce__(self):
        return (Path.touch, (folder / "ran",))


mapping = {"data": {"classes": ["land", "water"], "crop": 32}, "model": {"image_size": 32}}
mapping["model"] |= {"backbone": "vit_tiny_patch16_224", "weights": "none"}
model = cegate.build(mapping)
torch.save(model.vit.state_dict(), folder / "vit.pth")
mapping["model"]["weights"] = str(folder / "vit.pth")
model = cegate.build(mapping)
save_adapter(folder / "adapter", model, weight_hash(model.vit), {})
loaded = cegate.load(folder / "adapter", "cpu", weights=folder / "vit.pth")
images = torch.zeros(1, 3, 32, 32)
assert torch.equal(loaded(images), model.eval()(images))

for name, write in (("zip.pth", torch.save), ("bare.pth", lambda v, p: p.write_bytes(pickle.dumps(v)))):
    write({"pos_embed": Planted()}, folder / name)
    try:
        cegate.load(folder / "adapter", "cpu", weights=folder / name)
    except BackboneError as error:
        assert "a pickled object is never run" in str(error), error
    else:
        raise AssertionError(name)
assert not (folder / "ran").exists()
print("well")
"""


@pytest.mark.oldest
def test_the_oldest_timm_loads_strictly_and_runs_no_pickle(tmp_path):
    if not (folder := os.environ.get("CEGATE_OLDEST")):
        pytest.skip(f"set CEGATE_OLDEST to a folder made by: pip install --no-deps --target FOLDER timm=={FLOOR}")
    path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, FLOOR, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0 and ran.stdout == "well\n", ran.stderr
