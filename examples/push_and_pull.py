"""Push a trained model to the Hub and load it again. Log in first: `hf auth login`, or set HF_TOKEN.

python examples/push_and_pull.py out/discovery user/my-parts
"""

import sys

from diffdiscover3d import StructureDiscoveryModel
from diffdiscover3d.hub import pull, push
from diffdiscover3d.utils.provenance import weights_sha256

folder, repo_id = sys.argv[1:]
print(push(folder, repo_id, private=True, commit_message="My parts"))  # as `diffdiscover3d push`

network = StructureDiscoveryModel.from_pretrained(repo_id)  # by Hub id
print(f"{network.config.num_parts} parts from {repo_id}")

snapshot = pull(repo_id)  # files are verified against the hashes of the repository
print("same weights:", weights_sha256(snapshot) == weights_sha256(folder))
