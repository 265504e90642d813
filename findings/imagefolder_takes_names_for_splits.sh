#!/usr/bin/env bash
# `datasets` 5.2.0 takes words in the names of images for splits: of a folder of four images with
# captions, those with "train" in their names are all that is left, without a word. So data/ lists
# the files of a local folder itself.
# Seen: "split train has 1 of 4 rows", or an error for its captions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pillow==12.3.0
cat > "$folder/check.py" <<'PYTHON'
import sys
from pathlib import Path

import datasets
from PIL import Image

print("datasets", datasets.__version__)
folder = Path(sys.argv[1], "images")
folder.mkdir()
for name in ("a boat", "a train", "a plane", "a tree"):
    Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
print(f"split train has {len(rows)} of 4 rows")
raise SystemExit(0 if len(rows) == 1 else "the behaviour has changed")
PYTHON
HF_DATASETS_CACHE="$folder/cache" "$folder/venv/bin/python" "$folder/check.py" "$folder"
