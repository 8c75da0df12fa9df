"""Compile the CPU kernels now and say what came of it: python -m normexp.norms.kernels"""

import sys

from normexp.norms.kernels.native import main

sys.exit(main())
