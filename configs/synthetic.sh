#!/usr/bin/env bash
# A small Deformable DETR on the quickstart's synthetic data set, from random weights, for two CPU cores. It has one
# encoder layer, so that with BatchFormerV2 (--bf 1 --share_bf 0 --insert_idx 0) only the decoder computes both streams.
set -euo pipefail
# shellcheck source=tools/dev/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tools/dev/env.sh"
require_torch
exec python -u main.py --output_dir exps/synthetic --coco_path data/synthetic \
  --backbone resnet18 --backbone_weights none --backbone_norm bn --with_box_refine \
  --hidden_dim 64 --nheads 4 --enc_layers 1 --dec_layers 3 --dim_feedforward 256 --num_queries 30 --enc_n_points 2 --dropout 0 \
  --augmentation flip --train_sizes 72 80 88 96 --eval_size 96 --max_size 128 \
  --batch_size 8 --lr 5e-4 --lr_backbone 5e-4 --lr_drop_epochs 8 --epochs 10 --num_workers 1 --log_every 25 "$@"
