"""Share a trained model and load it back, bit for bit. Log in first: `hf auth login`, or set HF_TOKEN.

python examples/push_and_pull.py out/discovery user/my-parts
"""

import sys

from diffdiscover3d import StructureDiscoveryModel
from diffdiscover3d.hub import pull, push
from diffdiscover3d.utils.provenance import weights_sha256

folder, repo_id = sys.argv[1:]
print(push(folder, repo_id, private=True, commit_message="My parts"))  # with a card; `diffdiscover3d push` does it too

network = StructureDiscoveryModel.from_pretrained(repo_id)  # anyone with access, by name
print(f"{network.config.num_parts} parts from {repo_id}")

snapshot = pull(repo_id)  # every file verified against the repository's hashes
print("same weights:", weights_sha256(snapshot) == weights_sha256(folder))
