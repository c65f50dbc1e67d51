#!/usr/bin/env bash
# A small Deformable DETR with BatchFormerV2 on the synthetic data set, from random weights, made for two CPU cores.
set -euo pipefail
# shellcheck source=tools/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tools/env.sh"
require_torch
exec python -u main.py --output_dir exps/synthetic --coco_path data/synthetic --num_classes 6 \
  --backbone resnet18 --backbone_weights none --backbone_norm bn --with_box_refine \
  --hidden_dim 128 --enc_layers 2 --dec_layers 3 --dim_feedforward 256 --num_queries 30 --dropout 0 \
  --bf 1 --share_bf 0 --insert_idx 0 \
  --augmentation flip --train_sizes 96 112 128 --eval_size 112 --max_size 150 \
  --batch_size 8 --lr 4e-4 --lr_backbone 4e-4 --lr_drop_epochs 7 --epochs 8 --num_workers 1 --log_every 25 "$@"
