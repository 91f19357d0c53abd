"""The kinds of signature: what routers keep of an expert beside its adapter, each in one file.

A kind is a line here, and a router that measures it (`Router.measures`), the cheapest first. Gates
are trained instead. Reading, saving, the Hub, checks and errors go through `KINDS`.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kind:
    """One kind of signature, by name."""

    name: str
    words: str  # what an error calls it
    needs_data: bool  # whether it takes examples of the expert's own to make
    follows_adapter: bool  # one vector for each adapted module, worthless when the adapter changes
    command: str = "phatgoose experts derive"  # makes it
    older: tuple[str, ...] = ()  # files that releases before format 2 wrote beside it

    @property
    def file(self) -> str:
        """Its file in an expert's folder."""
        return f"phatgoose_{self.name}.safetensors"

    @property
    def files(self) -> tuple[str, ...]:
        """All files that it may have there."""
        return (self.file, *self.older)

    def remedy(self, folder: Path | str | None) -> str:
        """The command that makes it for the expert in `folder`."""
        data = " --tasks TASKS" if self.needs_data and self.name != GATES else ""
        return f"{self.command} {folder or 'FOLDER'}{data}"


GATES = "gates"
KINDS = {
    kind.name: kind
    for kind in (
        # Trained, by PHATGOOSE's recipe.
        Kind(GATES, "gates", True, True, "phatgoose gate", older=("phatgoose_config.json",)),
        # The top right singular vector of the adapter at each module.
        Kind("arrow", "Arrow vectors", False, True),
        # The mean input of the base's first linear module over prompts.
        Kind("prompt_mean", "mean prompt", True, False),
        # The mean input of each adapted module, with the expert applied.
        Kind("average_activation", "average activation", True, True),
    )
}
