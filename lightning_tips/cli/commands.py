"""The names of our own subcommands."""

from __future__ import annotations

# Our own subcommands: name to (function, help). The function takes the arguments behind the name and returns an exit
# code; "module:function" is imported when it is called. A tip that brings a subcommand adds a line.
COMMANDS: dict[str, tuple[str, str]] = {
    "compare": (
        "lightning_tips.cli.compare:compare",
        "Does a tip help here? A yaml without, with each and with all its tips, over seeds.",
    ),
    "curve": ("lightning_tips.cli.curve:draw_curve", "What more data would bring, from fits on parts of it."),
    "ensemble": (
        "lightning_tips.cli.ensemble:train_ensemble",
        "Train a yaml with several seeds and weigh the members.",
    ),
    "preview": (
        "lightning_tips.cli.preview:show_preview",
        "Draw what the augmentation of a yaml shows, without training.",
    ),
    "prune": ("lightning_tips.cli.prune:prune", "Make a trained checkpoint smaller, with exports and a report."),
    "quality": ("lightning_tips.cli.quality:check_quality", "Duplicates and label errors in the data of a yaml."),
    "tips": ("lightning_tips.cli.tips:show_tips", "List the tips, by the short names that a yaml can use."),
}
