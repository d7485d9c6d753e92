"""Make a dense model the pruned and recovered one."""

from transformers import PreTrainedModel

from pruning.families import Family
from pruning.models.surgery import apply_plan
from pruning.plan import Plan
from pruning.recovery.compensation import apply_weights
from pruning.recovery.emulation import Recovery
from pruning.recovery.fuse import Fusion, apply_fusion


def apply_recovery(model: PreTrainedModel, family: Family, plan: Plan, recovery: Recovery | Fusion) -> None:
    """Make a dense model the pruned one, in place: changed weights, fused units, and what `apply_plan` cuts."""
    apply_weights(model, recovery.weights)
    if isinstance(recovery, Fusion):
        apply_fusion(model, family, recovery)
        apply_plan(model, family, recovery.plan(plan), {})
    else:
        apply_plan(model, family, plan, recovery.emulations)
