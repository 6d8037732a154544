"""``python -m uplift_core.cli``, for programs that start modules, such as accelerate."""

from . import main

main()
