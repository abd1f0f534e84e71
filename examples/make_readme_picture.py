"""The picture of the README: parts found by the embedded models in synthetic cells, above the true ones.

python examples/make_readme_picture.py docs/parts-synthetic.png
"""

import sys

import numpy as np

from diffdiscover3d import load_volumes
from diffdiscover3d.hub import load_discovery
from diffdiscover3d.metrics import dice_matrix, match_parts
from diffdiscover3d.reporting.pictures import save_slices

LEVELS = {1: 2, 2: 4, 3: 8}

volume = load_volumes("synthetic-regular", "test")[int(sys.argv[2]) if len(sys.argv) > 2 else 2]
rows, titles = [], []
for level, parts in LEVELS.items():
    found = load_discovery("synthetic-regular", level).segment(volume["volume"][None]).labels[0].numpy()
    true = volume["labels"][level - 1].numpy()
    # the true parts take the numbers of the parts they match, so that colours can be compared
    predicted, matched = match_parts(dice_matrix(found, true, parts, parts))
    numbers = np.empty(parts, dtype=np.uint8)
    numbers[matched] = predicted
    rows += [found, numbers[true]]
    titles += [f"level {level}: found", f"level {level}: true"]
save_slices(sys.argv[1], [volume["volume"][0].numpy()] * len(rows), rows, titles=titles)
