#!/usr/bin/env bash
# torch.save refuses a file name that begins with a dot, such as ".weights" for a temporary file that
# is renamed when it is complete: it takes what stands before the last dot for the archive's name,
# which then is empty. ".weights.pt" works, and so does any open file object.
#
# Version: torch 2.13.0. Seen:
#   RuntimeError: [enforce fail at inline_container.cc:...] . invalid file name: .../.weights
# For us: temporary names of kept latents end in .tmp instead (training/attention.py).
# Exits 0 if this is still so, 1 if it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/save.py" <<'PY'
import sys
import torch

print("torch", torch.__version__)
x, folder = torch.zeros(2), sys.argv[1]
torch.save(x, f"{folder}/.weights.pt")
with open(f"{folder}/.opened", "wb") as file:
    torch.save(x, file)
print("saved .weights.pt, and .opened through a file object")
try:
    torch.save(x, f"{folder}/.weights")
except RuntimeError as error:
    print("refused .weights:", str(error).splitlines()[0].replace(folder, "FOLDER"))
    sys.exit(not ("invalid file name" in str(error)))
print("saved .weights: changed")
sys.exit(1)
PY
"$folder/venv/bin/python" "$folder/save.py" "$folder"
