"""Who is measured beside whom: PyTorch's layers in several ways, and each of our backends.

No peer that fuses these layers can stand beside them: In-Place Activated BatchNorm inverts its
activation, which ReLU does not allow, and cuDNN's fused BatchNorm-ReLU is what PyTorch calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fused_preact import ops


@dataclass(frozen=True)
class Contender:
    """One way to run a case.

    backend   "eager", PyTorch's layers; "reference"; or one of our kernels' backends.
    compiled  the mode of torch.compile, or None.
    units     compiled unit by unit.
    captured  a step is captured into a CUDA graph by hand and replayed.
    note      what a reader of its results must know.
    """

    name: str
    backend: str = "eager"
    memory_format: str = "channels_last"  # by name: pickle finds torch's own object anywhere
    compiled: str | None = None
    units: bool = False
    captured: bool = False
    note: str = ""

    @property
    def graphs(self) -> bool:
        """Whether it runs in CUDA graphs, whose memory and saved tensors are not seen."""
        return self.captured or self.compiled == "max-autotune"

    @property
    def ours(self) -> bool:
        return self.backend not in ("eager", "reference")


EAGER = Contender("eager")
REFERENCE = Contender("reference", "reference")
PLANNED = Contender("auto", "auto", note="the planner's choice, what users get")
NCHW = Contender("eager NCHW", memory_format="contiguous_format")
COMPILE = Contender("compile", compiled="default")
UNITS_NOTE = "compiled unit by unit, as the whole graph takes too long"
COMPILE_UNITS = Contender("compile units", compiled="default", units=True, note=UNITS_NOTE)
AUTOTUNE = Contender(
    "compile max-autotune", compiled="max-autotune", note="with torch.compile's own CUDA graphs"
)
AUTOTUNE_UNITS = Contender(
    "compile max-autotune units",
    compiled="max-autotune-no-cudagraphs",
    units=True,
    captured=True,
    note=f"{UNITS_NOTE}; then captured into one CUDA graph by hand",
)


def our_backends(device: str) -> tuple[str, ...]:
    """The backends whose kernels can run on this machine's device ("cpu" or "cuda")."""
    names = ("cpu",) if device == "cpu" else ("cuda", "triton")
    status = ops.backend_status()
    return tuple(name for name in names if status[name] is None)


def contenders(
    case: Any, device: str, backends: Sequence[str], full: bool
) -> tuple[Contender, ...]:
    """Everybody who runs case, eager first; backends are those of our_backends().

    Operators meet their eager counterpart alone, units all layouts and torch.compile. Networks
    take minutes to compile, and max-autotune takes minutes for anything: with full only. Of ours
    there is what users get, the planner's choice, with full each backend as well.
    """
    ours = [Contender(name, name) for name in backends]
    if case.group == "operator":
        return EAGER, *ours
    ours = [PLANNED, *(ours if full else ())]
    chosen = [EAGER]
    if case.group == "unit" or full:
        chosen += [NCHW, COMPILE_UNITS if case.deep else COMPILE]
    if device == "cuda":
        chosen += [_captured(EAGER)]
        if full:
            chosen += [AUTOTUNE_UNITS if case.deep else AUTOTUNE]
        ours += [_captured(one) for one in ours]
    return *chosen, *ours


def _captured(contender: Contender) -> Contender:
    note = "captured into a CUDA graph by hand"
    return replace(contender, name=f"{contender.name} graph", captured=True, note=note)
