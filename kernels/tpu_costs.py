"""`python -m kernels.tpu_costs`: see `kernels.bench.tpu_costs`."""

from kernels.bench.tpu_costs import main

if __name__ == "__main__":
    main()
