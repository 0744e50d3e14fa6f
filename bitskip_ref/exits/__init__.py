"""Ways of choosing the exit, one file each, behind `bitskip_ref.engine.ExitRule` (SPEC 8)."""

from bitskip_ref.exits.confidence import ConfidenceExit
from bitskip_ref.exits.fixed import FixedExit
from bitskip_ref.exits.gate import GateExit

__all__ = ["ConfidenceExit", "FixedExit", "GateExit"]
