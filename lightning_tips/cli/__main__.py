"""For ``python -m lightning_tips.cli``."""

import sys

from lightning_tips.cli import main

sys.exit(main())
