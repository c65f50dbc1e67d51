#!/usr/bin/env bash
# Trains one epoch with BatchFormerV2 in two CPU processes, evaluates the checkpoint with two processes and with one, and
# compares the results. It takes some minutes for 50 + 50 images.
#
#     ./tools/dev/check_distributed.sh <folder in COCO's layout> [further flags of main.py]
set -euo pipefail
# shellcheck source=tools/dev/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[[ $# -ge 1 && -d $1 ]] || die "usage: ./tools/dev/check_distributed.sh <folder with train2017, val2017, annotations> [flags of main.py]"
require_torch
run=exps/check_distributed
flags=(--device cpu --coco_path "$1" --backbone resnet18 --backbone_weights none --backbone_norm gn --enc_layers 2 --dec_layers 2
  --num_queries 100 --bf 1 --share_bf 0 --insert_idx 0 --train_sizes 192 224 256 --crop_resize_sizes 224 --crop_sizes 128 224
  --eval_size 256 --max_size 426 --batch_size 2 --num_workers 1 "${@:2}")
export OMP_NUM_THREADS=1 # the number of threads changes the order of sums, and so the last bits

./tools/run_dist_launch.sh 2 main.py "${flags[@]}" --epochs 1 --output_dir "$run"
evaluate=("${flags[@]}" --resume "$run/checkpoint.pth" --eval --save_predictions)
./tools/run_dist_launch.sh 2 main.py "${evaluate[@]}" --output_dir "$run/two"
python -u main.py "${evaluate[@]}" --output_dir "$run/one"
python - "$run" <<'PYTHON'
import json, sys
from pathlib import Path
from util.checkpoint import read_checkpoint

run = Path(sys.argv[1])
one, two = (json.loads((run / name / "predictions.json").read_text()) for name in ("one", "two"))
metrics = [read_checkpoint(run / name / "eval.pth")["stats"] for name in ("one", "two")]
metrics.append(json.loads((run / "log.txt").read_text().splitlines()[-1])["test_coco_eval_bbox"])
images = len({detection["image_id"] for detection in one})
equal = metrics[0] == metrics[1] == metrics[2]
print(f"{len(one)} detections in {images} images; equal for one and two processes: {one == two}")
print(f"twelve metrics equal for one process, two processes and the training run: {equal}")
print("  ".join(f"{value:.3g}" for value in metrics[0]))
sys.exit(not (one == two and equal))
PYTHON
