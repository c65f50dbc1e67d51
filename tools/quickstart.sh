#!/usr/bin/env bash
# The whole path on synthetic data: creates the environment, trains a small Deformable DETR with BatchFormerV2, evaluates
# it, and draws curves, a report, and detections beside the ground truth. About ten minutes on two CPU cores after the
# installation. If it was interrupted, run it again: it continues.
#   ./tools/quickstart.sh           the full run
#   ./tools/quickstart.sh --short   the same steps in two minutes; too short to learn anything
#   ./tools/quickstart.sh --masks   with a mask for every detection; also together with --short
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/dev/env.sh
source tools/dev/env.sh
name=synthetic images=2000 val_images=200 epochs=10 masks=()
for flag in "$@"; do
  case $flag in
    --short) name=synthetic_short images=48 val_images=16 epochs=2 ;;
    --masks) masks=(--masks) ;;
    *) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 2 ;;
  esac
done
# shellcheck source=tools/dev/setup.sh
source tools/dev/setup.sh

data=data/$name
run=exps/$name${masks:+_masks}
config=(./configs/synthetic.sh --coco_path "$data" --output_dir "$run" --epochs "$epochs" --eval_every 4
  --bf 1 --share_bf 0 --insert_idx 0 ${masks[@]+"${masks[@]}"})

echo "== synthetic data set in $data"
python -m datasets.synthetic --output_dir "$data" --train_images "$images" --val_images "$val_images" --num_classes 3 --max_objects 4
echo "== training in $run"
"${config[@]}" --resume auto --save_predictions
echo "== evaluation on held-out images"
python -u main.py --resume "$run/checkpoint.pth" --eval --coco_path "$data" --batch_size 8 --output_dir "$run/evaluation"
echo "== pictures"
python tools/plot_logs.py "$run" --output "$run/curve.png"
python tools/report.py "$run" --output "$run/report.html"
python tools/draw_detections.py --annotations "$data/annotations/instances_val2017.json" --images "$data/val2017" \
  --predictions "$run/predictions.json" --output_dir "$run/pictures"
echo
echo "Detections beside the ground truth are $run/pictures/contact_sheet.png, the curve of the run is $run/curve.png,"
echo "and a page with all results, for a browser, is $run/report.html"
