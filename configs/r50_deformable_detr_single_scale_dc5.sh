#!/usr/bin/env bash
# Deformable DETR with ResNet-50 on one feature level of twice the resolution (dilated last stage).
set -euo pipefail
# shellcheck source=tools/dev/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tools/dev/env.sh"
require_torch
exec python -u main.py --output_dir exps/r50_deformable_detr_single_scale_dc5 --num_feature_levels 1 --dilation "$@"
