"""What `--help` shows: the options that most people need, in the order of use; `--help-all` shows all by group."""

from typing import TYPE_CHECKING

from cyclopts import Group, Parameter
from cyclopts.help import DefaultFormatter

if TYPE_CHECKING:
    from cyclopts.help import HelpPanel
    from rich.console import Console, ConsoleOptions

FIRST = Parameter(group=Group("Options", sort_key=0))
"""What `--help` shows of a recipe; at most twelve options, in this order:"""
ORDER = (
    "--model", "--output", "--kv-budget", "--weight-budget", "--max-loss-increase", "--target-tokens", "--kv-memory",
    "--context", "--task", "--calibration", "--effort", "--recipe", "--dry-run",
)  # fmt: skip
SHOWN = ("Options", "Commands", "Parameters")
EVERYTHING = "--help-all"

ABOUT = """Make a smaller language model: fewer bytes of KV cache, or fewer weights.

Example: `prune-export smollm2-135m --output smaller --kv-budget 50% --context 8192 --effort balanced`

Say how much, for what, and how long it may take."""
MORE = f"`{EVERYTHING}` shows every option, by group."


class Help(DefaultFormatter):
    """The short help, or everything."""

    everything = False

    def __call__(self, console: "Console", options: "ConsoleOptions", panel: "HelpPanel") -> None:
        """Print one panel, or nothing where the short help leaves it out."""
        if panel.title == "Options":
            panel.entries.sort(key=lambda entry: ORDER.index(entry.positive_names[-1]))
            if not self.everything:
                panel.entries = [entry.copy(negative_names=(), default=None) for entry in panel.entries]
        elif not self.everything and panel.title not in SHOWN:
            return
        if panel.title == "Commands" and not self.everything:
            panel.entries = [entry for entry in panel.entries if not entry.names[0].startswith("-")]
        super().__call__(console, options, panel)


def asked(arguments: list[str], formatter: Help) -> list[str]:
    """The arguments with `--help-all` read: the formatter then shows everything."""
    formatter.everything = EVERYTHING in arguments
    return ["--help" if argument == EVERYTHING else argument for argument in arguments]
