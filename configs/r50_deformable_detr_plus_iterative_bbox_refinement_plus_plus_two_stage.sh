#!/usr/bin/env bash
# Deformable DETR with ResNet-50, refined boxes, and two stages: the encoder proposes the queries.
set -euo pipefail
# shellcheck source=tools/dev/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tools/dev/env.sh"
require_torch
exec python -u main.py --output_dir exps/r50_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage --with_box_refine --two_stage "$@"
