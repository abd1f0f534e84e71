"""Make a brain model's folder from the averaged weights in a checkpoint of a training that was stopped early.

    python tools/brain_from_average.py CHECKPOINT/ema.safetensors OUTPUT

The options are those of the file's `train_config.json`, given with `--config`, or the defaults.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from diffdiscover3d.models.loading import cast_weights
from diffdiscover3d.training.brain import BothLevels, make_network
from diffdiscover3d.training.brain_config import BrainConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("average", type=Path, help="ema.safetensors of a checkpoint")
    parser.add_argument("output", type=Path, help="folder for the model")
    parser.add_argument("--config", type=Path, help="train_config.json of the training")
    arguments = parser.parse_args()
    options = json.loads(arguments.config.read_text()) if arguments.config else {}
    network = make_network(BrainConfig(**options))
    average = load_file(arguments.average)
    step = int(average.pop("step"))
    parameters = list(BothLevels(network).parameters())
    if len(average) != len(parameters):
        raise SystemExit(f"{arguments.average}: has {len(average)} weights, the network {len(parameters)}.")
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            if parameter.shape != average[str(number)].shape:
                raise SystemExit(f"{arguments.average}: weight {number} has another shape than the network's.")
            parameter.copy_(average[str(number)])
    cast_weights(network, "float16")
    network.eval().save_pretrained(arguments.output)
    print(f"{arguments.output}: the average after {step} steps")


if __name__ == "__main__":
    main()
