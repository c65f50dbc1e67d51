"""Image files that can't be used: stop at the first one, or skip them and count."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from util.errors import UserError
from util.images.files import BadImageError

log = logging.getLogger(__name__)

REPLACED = "replaced by the next usable image"
LEFT_OUT = "left out: it counts as an image without detections"


class BadImages:
    """The image files that this process could not use. Each is logged once.

    Args:
        on_bad_image: "stop": the first one ends the run; or "skip".
        limit: --max_bad_images; more different files end the run.
    """

    def __init__(self, on_bad_image: str = "stop", limit: int = 0) -> None:
        self.skip, self.limit = on_bad_image == "skip", limit
        self._paths: dict[str, None] = {}  # a dict, because it keeps the order

    @property
    def count(self) -> int:
        """Number of different files skipped, including those before a resume."""
        return len(self._paths)

    def add(self, errors: Iterable[UserError], consequence: str) -> None:
        """Record what went wrong in a batch.

        Raises:
            UserError: an error that can't be skipped, or more than `limit` different files.
        """
        for error in errors:
            # only image files can be skipped, not a full /dev/shm
            if not self.skip or not isinstance(error, BadImageError):
                raise error
            if error.path in self._paths:
                continue

            # first time that this file is met
            self._paths[error.path] = None
            log.warning("%s %s; %s", error.path, error.reason, consequence)
            if self.count > self.limit:
                more = f"more than --max_bad_images {self.limit}"
                last = f"the last is {error.path}, which {error.reason}"
                remedy = "mend the data or raise --max_bad_images"
                raise UserError(f"{self.count} image files can't be used, {more}; {last}; {remedy}")

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"paths": list(self._paths)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint. Raises UserError for anything that `state_dict` never returns."""
        # the file may be damaged in any way
        paths = state.get("paths") if isinstance(state, Mapping) else None
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise UserError(
                "the checkpoint's list of skipped images is damaged; resume from another checkpoint"
            )
        self._paths = dict.fromkeys(paths)

    def load_merged(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue from the records of any number of processes."""
        self.load_state_dict({"paths": [path for state in states for path in state["paths"]]})
