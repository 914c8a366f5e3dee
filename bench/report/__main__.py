"""`python -m bench.report`."""

import sys

from bench.report.readme import main

sys.exit(main())
