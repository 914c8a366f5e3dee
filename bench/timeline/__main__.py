"""`python -m bench.timeline`."""

import sys

from bench.timeline.run import main

sys.exit(main())
