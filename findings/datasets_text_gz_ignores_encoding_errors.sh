#!/usr/bin/env bash
# `datasets` 5.2.0's "text" reader takes encoding_errors="replace" for a plain .txt, and ignores it
# for the same bytes in a .txt.gz, on disk and streamed: one invalid byte then ends the whole shard.
# So extras/curation names such a packed shard and goes no further in it.
# Seen: "plain: 3 rows", "gz: UnicodeDecodeError".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0
cat > "$folder/check.py" <<'PYTHON'
import gzip
import sys
from pathlib import Path

import datasets

print("datasets", datasets.__version__)
folder = Path(sys.argv[1])
lines = b"a boat\n\xff a tree\na plane\n"
(folder / "plain.txt").write_bytes(lines)
with gzip.open(folder / "packed.txt.gz", "wb") as file:
    file.write(lines)


def read(name):
    rows = datasets.load_dataset(
        "text", data_files=str(folder / name), split="train", encoding_errors="replace",
        streaming=True,
    )
    try:
        return f"{len(list(rows))} rows"
    except UnicodeDecodeError as error:
        return type(error).__name__


plain, packed = read("plain.txt"), read("packed.txt.gz")
print("plain:", plain)
print("gz:", packed)
same = plain == packed
raise SystemExit("the behaviour has changed: both are read alike" if same else 0)
PYTHON
"$folder/venv/bin/python" "$folder/check.py" "$folder"
