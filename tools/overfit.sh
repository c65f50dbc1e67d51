#!/usr/bin/env bash
# Does the detector overfit eight real images, from random weights? A quick test of the whole path from files to AP.
# About six minutes on two CPU cores.
#
#     ./tools/overfit.sh <folder in COCO's layout> [further flags of main.py]
set -euo pipefail
# shellcheck source=tools/dev/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/dev/env.sh"
[[ $# -ge 1 && -d $1 ]] || die "usage: ./tools/overfit.sh <folder with train2017 and annotations> [flags of main.py]"
require_torch
coco=$1
shift
python tools/subset_coco.py --coco_path "$coco" --num_images 8 --output_dir data/overfit8
exec python -u main.py --coco_path data/overfit8 --output_dir exps/overfit8 \
  --backbone resnet18 --backbone_weights none --backbone_norm gn --with_box_refine \
  --hidden_dim 128 --enc_layers 2 --dec_layers 3 --dim_feedforward 512 --num_queries 50 --dropout 0 \
  --augmentation none --train_sizes 224 --eval_size 224 --max_size 320 \
  --batch_size 2 --lr 4e-4 --lr_backbone 4e-4 --lr_drop_epochs 100 --epochs 120 --eval_every 40 --num_workers 0 \
  --cache_mode "$@"
