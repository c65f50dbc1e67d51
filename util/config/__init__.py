"""The flags of main.py. Every room above uses this one; it imports no torch.

    config = parse_config(["--bf", "1", "--insert_idx", "0"])
    config.batchformer.insert_idx      # (0,)

fields.py has the table of flags, checks.py what may be combined, config.py the object, parser.py the
command line. `python -m util.config` prints docs/flags.md.
"""

from util.config.checks import as_typed, check_trainable, plain_text
from util.config.config import Config, with_classes
from util.config.fields import FLAGS, DataConfig, OptimConfig, RunConfig, flags_of
from util.config.model_fields import (
    LEARNED_POSITIONS,
    BackboneConfig,
    BatchFormerConfig,
    TransformerConfig,
)
from util.config.parser import (
    WEIGHTS,
    add_detector_flags,
    add_score_threshold_flag,
    add_weights_flag,
    detector_flags,
    make_parser,
    parse_config,
    parse_with_config,
)
