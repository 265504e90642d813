#!/usr/bin/env bash
# PyTorch says that a CPU "supports" bfloat16 where it is no faster than float32, and computes it
# 20 to 40 times slower than float32, without a warning, where it does not.
#
# Versions: torch 2.13.0 (CPU build), on x86-64 with AVX-512 and AVX512-BF16 (AMD EPYC), one thread.
# Processors without these instructions are imitated by oneDNN's own ONEDNN_MAX_CPU_ISA.
#
# Seen: a matrix product of 512 x 512, seconds in float32 and in bfloat16
#   AVX512_CORE_BF16   supported: True    0.0027  0.0006   bfloat16 is 5 times faster
#   AVX512_CORE        supported: True    0.0027  0.0031   it is not, and a convolution takes twice
#   AVX2               supported: False   0.0027  0.0960   it is 35 times slower; nothing warns
#
# So torch.ops.mkldnn._is_mkldnn_bf16_supported() alone does not tell whether to compute in bfloat16:
# on x86 ask torch.cpu._is_avx512_bf16_supported() too (cli.choose_dtype does).
# Exits 0 if this is still so, 1 if it changed, 3 if this processor lacks AVX-512.
set -euo pipefail
grep -qw avx512f /proc/cpuinfo || { echo "this processor has no AVX-512: cannot be checked here"; exit 3; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy

cat > "$folder/time.py" <<'PY'
import time
import torch

torch.set_num_threads(1)
seconds = []
for dtype in (torch.float32, torch.bfloat16):
    x = torch.randn(512, 512, dtype=dtype)
    for _ in range(3):
        x @ x
    runs = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(4):
            x @ x
        runs.append((time.process_time() - began) / 4)
    seconds.append(min(runs))
supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
print(supported, f"{seconds[0]:.4f} {seconds[1]:.4f} {seconds[1] / seconds[0]:.2f}")
PY

"$folder/venv/bin/python" -c "import torch; print('torch', torch.__version__)"
avx512=$(ONEDNN_MAX_CPU_ISA=AVX512_CORE "$folder/venv/bin/python" -W error "$folder/time.py")
avx2=$(ONEDNN_MAX_CPU_ISA=AVX2 "$folder/venv/bin/python" -W error "$folder/time.py")
echo "AVX512_CORE  supported, seconds in float32, in bfloat16, ratio: $avx512"
echo "AVX2         supported, seconds in float32, in bfloat16, ratio: $avx2"
awk -v a="$avx512" -v b="$avx2" 'BEGIN {
    split(a, x, " "); split(b, y, " ")
    as_seen = x[1] == "True" && x[4] > 0.8 && y[1] == "False" && y[4] > 8
    print as_seen ? "as seen" : "changed"
    exit !as_seen
}'
