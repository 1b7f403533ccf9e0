"""The layouts on which parity is tested, those of the default suite among them."""

from __future__ import annotations

from dataclasses import dataclass

# Models of `parity_cases` that have experts.
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel axes of a job."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    virtual: int = 1
    context: int = 1
    expert: int = 1

    @property
    def num_processes(self) -> int:
        """Ranks of the job."""
        return self.tensor * self.pipeline * self.context * self.data

    def takes(self, model: str) -> bool:
        """Whether the layout can hold a model: experts need sequence parallelism beside tensor ranks, two key heads."""
        if model in EXPERTS:
            return self.tensor == 1 or (self.tensor == 2 and self.sequence)
        return self.expert == 1 and (model == "deep" or self.pipeline * self.virtual <= 2)


LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tensor=2),
    "pp2": Layout(pipeline=2),
    "tp2+sp": Layout(tensor=2, sequence=True),
    "dp2": Layout(data=2),
    "tp2xpp2": Layout(tensor=2, pipeline=2),
    "tp2xdp2": Layout(tensor=2, data=2),
    "pp2xdp2": Layout(pipeline=2, data=2),
    "tp2xpp2+sp": Layout(tensor=2, pipeline=2, sequence=True),
    # With the axes that take a model of more layers, or one with experts.
    "cp2": Layout(context=2),
    "pp2+vpp2": Layout(pipeline=2, virtual=2),
    "ep2": Layout(data=2, expert=2),
    "tp2xcp2+sp": Layout(tensor=2, context=2, sequence=True),
    "tp2xpp2+vpp2+sp": Layout(tensor=2, pipeline=2, virtual=2, sequence=True),
    "pp2xcp2": Layout(pipeline=2, context=2),
    "tp2xdp2+sp+ep4": Layout(tensor=2, data=2, sequence=True, expert=4),
    "pp2xdp2+vpp2+ep2": Layout(pipeline=2, data=2, virtual=2, expert=2),
    "cp4": Layout(context=4),
    "pp3": Layout(pipeline=3),
    "pp4": Layout(pipeline=4),
    "tp4": Layout(tensor=4),
    "tp4+sp": Layout(tensor=4, sequence=True),
    "dp4": Layout(data=4),
    "cp2xdp2": Layout(context=2, data=2),
    "tp2xdp2+sp": Layout(tensor=2, data=2, sequence=True),
    "pp2xcp2+vpp2": Layout(pipeline=2, context=2, virtual=2),
    "pp2xdp2+vpp2": Layout(pipeline=2, data=2, virtual=2),
    "dp4+ep2": Layout(data=4, expert=2),
    "dp4+ep4": Layout(data=4, expert=4),
    "cp2+ep2": Layout(context=2, expert=2),
    "tp2+sp+ep2": Layout(tensor=2, sequence=True, expert=2),
    "pp2xdp2+ep2": Layout(pipeline=2, data=2, expert=2),
    "tp2xpp2+sp+ep2": Layout(tensor=2, pipeline=2, sequence=True, expert=2),
    "tp2xcp2+sp+ep2": Layout(tensor=2, context=2, sequence=True, expert=2),
    "pp2xcp2+vpp2+ep2": Layout(pipeline=2, context=2, virtual=2, expert=2),
}
SMALL_SUITE = ("one", "tp2", "pp2", "tp2+sp", "dp2", "tp2xpp2")
QUICK = ("cp2", "pp2+vpp2", "ep2", "tp2xcp2+sp", "tp2xpp2+vpp2+sp", "pp2xcp2", "tp2xdp2+sp+ep4", "pp2xdp2+vpp2+ep2")
DEFAULT = SMALL_SUITE + QUICK
OLDER = (*SMALL_SUITE, "tp2xdp2", "pp2xdp2", "tp2xpp2+sp")  # those that the widest choice of cases runs on
