"""The picture of the README: parts found by the embedded models in synthetic cells, above the true ones.

python examples/make_readme_picture.py docs/parts-synthetic.png
"""

import sys

import numpy as np

from diffdiscover3d import load_volumes
from diffdiscover3d.data.datasets.synthetic import LEVEL_PARTS
from diffdiscover3d.evaluation.metrics import dice_matrix, match_parts, matched_dice
from diffdiscover3d.hub import load_discovery
from diffdiscover3d.reporting.pictures import save_slices

volumes = load_volumes("synthetic-regular", "test")
networks = {level: load_discovery("synthetic-regular", level) for level in LEVEL_PARTS}


def found_and_scores(level, volume):
    found = networks[level].segment(volume["volume"][None]).labels[0].numpy()
    return found, dice_matrix(found, volume["labels"][level - 1].numpy(), LEVEL_PARTS[level], LEVEL_PARTS[level])


# neither the best nor the worst: the volume in the middle of the test set at level 2
ranked = sorted(range(len(volumes)), key=lambda i: matched_dice(found_and_scores(2, volumes[i])[1]))
volume = volumes[ranked[len(ranked) // 2]]
rows, titles = [], []
for level, parts in LEVEL_PARTS.items():
    found, scores = found_and_scores(level, volume)
    true = volume["labels"][level - 1].numpy()
    # the true parts take the numbers of the parts they match, so that colours can be compared
    predicted, matched = match_parts(scores)
    numbers = np.empty(parts, dtype=np.uint8)
    numbers[matched] = predicted
    rows += [found, numbers[true]]
    titles += [f"level {level}: found", f"level {level}: true"]
save_slices(sys.argv[1], [volume["volume"][0].numpy()] * len(rows), rows, titles=titles)
