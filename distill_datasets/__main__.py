"""`python -m distill_datasets` is `distill-datasets`."""

import sys

from distill_datasets.cli.main import main

sys.exit(main())
