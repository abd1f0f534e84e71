"""A training that records the batches of each process: TRACE=FOLDER python traced_training.py PHASE OPTIONS."""

import hashlib
import json
import os
import sys

from diffdiscover3d.train import main
from diffdiscover3d.training.data_order import TrainingVolumes

RANK = os.environ.get("RANK", "0")
_get = TrainingVolumes.__getitem__


def traced(self, key):
    item = _get(self, key)
    row = {name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for name, value in item.items()}
    row |= {"index": key[0], "step": key[1], "slot": key[2]}
    with open(os.path.join(os.environ["TRACE"], f"{RANK}.jsonl"), "a") as file:
        file.write(json.dumps(row) + "\n")
    return item


if __name__ == "__main__":
    TrainingVolumes.__getitem__ = traced
    sys.exit(main())
