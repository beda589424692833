"""How much of a stage the rest of the budget pays for, where some of it was charged before an interruption."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from privimage_fast.dp.accounting import DPSGDEvent, Event, affordable_steps

logger = logging.getLogger(__name__)


def affordable(event: DPSGDEvent, prior: Sequence[Event], target_epsilon: float, delta: float, wanted: int) -> int:
    """How many of the ``wanted`` steps the budget allows after ``prior`` events; says so where it is fewer."""
    if math.isinf(target_epsilon) or wanted < 1:
        return wanted
    allowed = affordable_steps(target_epsilon=target_epsilon, delta=delta, event=event, prior_events=prior, at_most=wanted)
    if allowed < wanted:
        logger.warning(
            "%d of the %d remaining steps fit in the budget: steps repeated after an interruption are charged again",
            allowed,
            wanted,
        )
    return min(allowed, wanted)
