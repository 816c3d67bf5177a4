"""`python -m kernels.benchmark`: see `kernels.bench.benchmark`."""

import sys

from kernels.bench.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
