"""Warnings are errors, in this process and in those that tests start; these few are not ours to mend."""

import warnings

ALLOWED = [
    # (message as a regular expression, category name)
    (r".*does not have many workers which may be a bottleneck.*", "UserWarning"),  # tests want none
    (r".*isinstance\(treespec, LeafSpec\).* is deprecated.*", "FutureWarning"),  # Lightning with torch >= 2.9
    (r".*is smaller than the logging interval.*", "UserWarning"),  # tiny data sets
    (r".*exists and is not empty", "UserWarning"),  # a resumed run goes on in its folder
    (r"The dirpath has changed from", "UserWarning"),  # validating elsewhere than one trained
    # Lightning's CLI with jsonargparse >= 4.49
    (r"[\s\S]*was deprecated in v4\.[\s\S]*", "DeprecationWarning"),
    (r"\s*By default only one JsonargparseDeprecationWarning", "DeprecationWarning"),
    (r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*", "DeprecationWarning"),
    # Python 3.12 and later: how a DataLoader starts its workers
    (r"This process .* is multi-threaded, use of fork", "DeprecationWarning"),
]


def ini_lines() -> list[str]:
    return ["error", *(f"ignore:{message}:{category}" for message, category in ALLOWED)]


def apply() -> None:
    """For a process that is not pytest."""
    warnings.simplefilter("error")
    for message, category in ALLOWED:
        warnings.filterwarnings("ignore", message, getattr(__import__("builtins"), category))
