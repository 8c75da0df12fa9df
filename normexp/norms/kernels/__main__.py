"""Compile the CPU kernels now and print where they are: python -m normexp.norms.kernels"""

import sys

from normexp.norms.kernels.native import main

sys.exit(main())
