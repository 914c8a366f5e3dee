"""`python -m bench.predictor`."""

import sys

from bench.predictor.run import main

sys.exit(main())
