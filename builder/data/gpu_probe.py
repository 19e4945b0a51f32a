"""Runs inside the clean environment: what GPU torch sees. Prints one JSON line that starts with GRACEFARM."""

import json

try:
    import torch
except ImportError:
    found = {"reason": "the environment has no torch"}
else:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found = {"device": torch.cuda.get_device_name(), "sm": f"{major}{minor}"}
    else:
        found = {"reason": "no GPU"}
print("GRACEFARM" + json.dumps(found))
