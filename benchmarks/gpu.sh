#!/usr/bin/env bash
# Everything that is worth running on a GPU, the most valuable first, within a time limit.
#
#     benchmarks/gpu.sh [SECONDS] [FOLDER]
#
# SECONDS is the time limit, by default 540. FOLDER is for the results; by default it is $OUT, or else out/gpu. Each step
# writes what it prints to FOLDER/STEP.txt and its warnings to FOLDER/STEP.err, and figures as JSON to files beside them.
# A step that fails, runs out of memory or takes too long does not stop the others; FOLDER/summary.txt lists how each
# step has ended. Neither a virtual environment nor an installed fxstream is needed: $PYTHON, by default python3, must
# find torch, torchvision, pytest, rich and matplotlib. Without a GPU, or if FXSTREAM_SMALL is set, all sizes are tiny.
set -u
seconds=${1:-540}
folder=${2:-${OUT:-out/gpu}}
python=${PYTHON:-python3}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
SECONDS=0

say() { echo "$*" | tee -a "$folder/summary.txt"; }

# step NAME LIMIT COMMAND...: run a command for at most LIMIT seconds, and no longer than the time that is left.
step() {
    local name=$1 limit=$2 left=$((seconds - SECONDS - 3)) began=$SECONDS status
    shift 2
    if ((left < 10)); then
        say "$name: not started, $left s are left"
        return
    fi
    # An interrupt lets pytest write its reports; whoever ignores it is killed three seconds later.
    timeout --signal INT --kill-after 3 "$((limit < left ? limit : left))" "$@" \
        >"$folder/$name.txt" 2>"$folder/$name.err"
    status=$?
    say "$name: exit status $status after $((SECONDS - began)) s (124 or 137: stopped)"
    tail -n "$shown" "$folder/$name.txt"
    ((status == 0)) || tail -n 5 "$folder/$name.err"
}

: >"$folder/summary.txt"
shown=4
step environment 60 "$python" -c '
import torch
there = torch.cuda.is_available()
print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
print(torch.cuda.get_device_name() if there else "no GPU: everything runs on the CPU, at tiny sizes")
'
device=cuda
grep -q "^no GPU" "$folder/environment.txt" && device=cpu

if [[ $device == cpu || -n ${FXSTREAM_SMALL:-} ]]; then
    networks=(notebook) others=(notebook) size=160 large=192 tiles=(32 64) large_tiles=(64) profiled=(96 48) overhead=64
else
    networks=(resnet18 unet resnet50 convnext_tiny) others=(unet resnet50 convnext_tiny)
    size=4096 large=8192 tiles=(512 1024 2048) large_tiles=(1024 2048) profiled=(2048 512) overhead=256
fi
bench=("$python" benchmarks/compare.py --shared --unchecked --steps 3 --repeats 1 --count-up-to 0 --timeout 60)
first=${networks[0]}

# The tests that are skipped without a GPU. Some compare steps in float32, for which TF32 would be too coarse.
shown=1
step tests $((seconds * 2 / 5)) env NVIDIA_TF32_OVERRIDE=0 "$python" -m pytest -v -rA -n 4 --dist worksteal -p no:cacheprovider \
    --junitxml "$folder/tests.xml" -k "cuda or gpu or host_memory" \
    tests/test_cuda.py tests/test_mixed_precision.py tests/test_fetch.py tests/test_ops.py
grep -E '^(FAILED|ERROR)|^(plain|estimate|synchronising)' "$folder/tests.txt" | cut -c 1-200 | tail -n 40

shown=12
step overhead 60 "$python" benchmarks/overhead.py --device $device --size $overhead --repeats 2 --output "$folder"
step profile 60 "$python" benchmarks/profiled.py --model "$first" --size "${profiled[0]}" --tile "${profiled[1]}" \
    --output "$folder"

shown=100
step compare 600 "${bench[@]}" --models "${networks[@]}" --sizes $size --tiles "${tiles[@]}" \
    --ways conventional checkpoint fxstream --autocast none bfloat16 --output "$folder/compare"
step host 120 "${bench[@]}" --models "$first" --sizes $size --tiles "${tiles[@]}" --image-on host \
    --ways conventional fxstream --autocast none bfloat16 --output "$folder/host"
step large 120 "${bench[@]}" --models "$first" --sizes $large --tiles "${large_tiles[@]}" \
    --ways conventional checkpoint fxstream --autocast none bfloat16 --output "$folder/large"
# A conventional step of these networks does not fit into 80 GB.
step large_others 600 "${bench[@]}" --models "${others[@]}" --sizes $large --tiles "${large_tiles[@]}" \
    --ways fxstream checkpoint --output "$folder/large_others"
step large_host 120 "${bench[@]}" --models "$first" --sizes $large --tiles "${large_tiles[@]}" --image-on host \
    --ways fxstream --output "$folder/large_host"

echo
cat "$folder/summary.txt"
