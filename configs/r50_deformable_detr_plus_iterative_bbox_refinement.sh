#!/usr/bin/env bash
# Deformable DETR with ResNet-50: each decoder layer refines the boxes of the previous one.
set -euo pipefail
# shellcheck source=tools/dev/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tools/dev/env.sh"
require_torch
exec python -u main.py --output_dir exps/r50_deformable_detr_plus_iterative_bbox_refinement --with_box_refine "$@"
