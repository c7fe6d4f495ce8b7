"""Pipeline phases: what a rank does in a step of DeepSpeed's PipelineEngine, reported to its beacon."""

from collections.abc import Callable
from typing import Any

from megatron_nexus.parallel.beacon import Beacon, Phase
from megatron_nexus.training.zero_state import DeepSpeedEngine

_PHASES = {
    "LoadMicroBatch": Phase.DATA,
    "ForwardPass": Phase.FORWARD,
    "BackwardPass": Phase.BACKWARD,
    "SendActivation": Phase.PIPELINE,
    "RecvActivation": Phase.PIPELINE,
    "SendGrad": Phase.PIPELINE,
    "RecvGrad": Phase.PIPELINE,
    "ReduceGrads": Phase.REDUCTION,
    "ReduceTiedGrads": Phase.REDUCTION,
    "OptimizerStep": Phase.OPTIMIZER,
}
"""Phases by the names of instructions in DeepSpeed's schedules."""


def mark_pipeline_phases(engine: DeepSpeedEngine, beacon: Beacon) -> None:
    """Have each instruction of a training schedule mark its phase before it is carried out."""

    def marking(phase: Phase, carry_out: Callable[..., None]) -> Callable[..., None]:
        def marked(self: DeepSpeedEngine, *args: Any, **kwargs: Any) -> None:
            if self.module.training:
                beacon.mark(phase)
            carry_out(self, *args, **kwargs)

        return marked

    instructions = engine._INSTRUCTION_MAP
    engine._INSTRUCTION_MAP = {  # of this engine alone: the class has one for all
        kind: marking(_PHASES[kind.__name__], carry_out) for kind, carry_out in instructions.items()
    }
