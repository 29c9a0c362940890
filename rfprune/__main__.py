"""python -m rfprune: the same as python -m rfprune.main."""

import sys

from rfprune.main import main

if __name__ == "__main__":
    sys.exit(main())
