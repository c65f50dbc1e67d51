"""The processes of one run: the process group, what starts them, and the watchdog that explains a hang.

Every layer above may use this room; it knows nothing of training.
"""

from util.distributed.processes import (
    broadcast_from_main,
    equalise_buffers,
    process_group,
    rank,
    sum_over_processes,
)
from util.distributed.watchdog import note
