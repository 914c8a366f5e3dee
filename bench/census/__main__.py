"""`python -m bench.census`."""

import sys

from bench.census.compile import main

sys.exit(main())
