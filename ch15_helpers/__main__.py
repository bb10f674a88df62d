"""``python -m ch15_helpers``: the same as ``ch15``."""

from ch15_helpers.cli import main

main()
