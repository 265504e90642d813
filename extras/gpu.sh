#!/usr/bin/env bash
# What to measure on a GPU, in this order. OUT/STEP.txt keeps what a step prints; a command is cut off at 8 minutes.
#     bash extras/gpu.sh                 every step, into runs/gpu
#     bash extras/gpu.sh steps images    some of them
#     SIZE=tiny bash extras/gpu.sh       a rehearsal, on any machine, in minutes
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu} SIZE=${SIZE:-base}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
mkdir -p "$OUT"
stop=150 others="large xlarge" batches="8 16 32 64" images=8000
train="--steps 60 --batch-size 128 --micro-batch-size 16 --workers 8"
openuni="--mllm OpenGVLab/InternVL3-1B-hf --diffusion Efficient-Large-Model/Sana_600M_512px_diffusers"
few=""
if [ "$SIZE" = tiny ]; then
  stop=20 others=tiny batches=2 images=600 train="--steps 60 --batch-size 8 --workers 2" openuni=""
  few="--repeats 1 --steps 2 --layers 2"
fi

note() {  # print a command, run it for at most 8 minutes, and keep what it prints
  echo "+ $(date +%T) $*" | tee -a "$OUT/$step.txt"
  timeout 480 "$@" 2>&1 | tee -a "$OUT/$step.txt"
}

correct() { note python -m pytest -q -rA tests/test_gpu.py; }
steps() { for b in $batches; do note python -m extras.speed --size "$SIZE" --batch-size "$b" --repeats 3 $few; done; }
images() { for size in $others; do note python -m extras.speed --size "$size" --batch-size 1 --repeats 2 $few; done; }
training() {
  note python -m extras.random_parts "$SIZE" --out "$OUT/random" --images "$images"
  run=(python train.py --size "$SIZE" --mllm "$OUT/random/mllm" --diffusion "$OUT/random/diffusion"
    --data "$OUT/random/images" --streaming true --save-every 30 --warmup 2 --out "$OUT/run" $train)
  note timeout -s TERM "$stop" "${run[@]}"  # told to stop, it saves; the same command goes on
  note "${run[@]}"
  tail -n 3 "$OUT/run/log.jsonl" | tee -a "$OUT/$step.txt"  # "data_wait": the share of time that waits for the loader
  rm -rf "$OUT/random" "$OUT/run"
}
public() { note python -m extras.speed --size "$SIZE" --batch-size 1 --repeats 2 $openuni $few; }

for step in ${@:-correct steps images training public}; do "$step"; done
