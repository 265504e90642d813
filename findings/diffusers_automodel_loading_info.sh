#!/usr/bin/env bash
# diffusers.AutoModel.from_pretrained(..., output_loading_info=True) ends in an AttributeError on a
# folder that its own model class loads with the same argument: AutoModel marks what the class
# returned, which with this argument is a tuple of the model and the report.
#
# Versions: torch 2.13.0 (CPU build), diffusers 0.42.1, transformers 5.24.0.
#
# Seen:
#   SanaTransformer2DModel: a tuple of 2
#   AutoModel: AttributeError: 'tuple' object has no attribute '_diffusers_load_id'
#
# So metaquery.load_weights, which must know whether weights are missing, reads the class's name from
# the folder's config.json and calls that class.
# Exits 0 if this is still so, 1 if it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 "diffusers==0.42.1" "transformers==5.24.0" accelerate numpy

cat > "$folder/load.py" <<'PY'
import sys

import diffusers

print("diffusers", diffusers.__version__)
model = diffusers.SanaTransformer2DModel(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
    num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
    caption_channels=64, sample_size=4,
)
model.save_pretrained(sys.argv[1])
found = diffusers.SanaTransformer2DModel.from_pretrained(sys.argv[1], output_loading_info=True)
print("SanaTransformer2DModel: a", type(found).__name__, "of", len(found))
try:
    diffusers.AutoModel.from_pretrained(sys.argv[1], output_loading_info=True)
except AttributeError as error:
    print("AutoModel: AttributeError:", error)
    print("as seen")
else:
    print("AutoModel: loaded: changed")
    sys.exit(1)
PY
"$folder/venv/bin/python" "$folder/load.py" "$folder/model" 2>/dev/null
